"""Rows at odds with a linear state-space model of all variates, learnt from the training rows: its innovations.

    x[t+1] = A x[t] + K e[t],   y[t] = C x[t] + e[t],   Cov e = S,   y standardised by the training rows

**Score.** The exact Kalman filter tells each row from the rows before it: nu = y - C x, S_t = C P_t C' + S. Missing
cells are left out of the update, so that P_t, and with it S_t, grows over a gap. What is handed on is the deviation

    d = L_o L_t^-1 nu,   L_o L_o' = S and L_t L_t' = S_t of the observed cells,   so that d' S^-1 d = nu' S_t^-1 nu

in data units: plain residuals while nothing is missing, and rows after a gap in the units of all others.

**Memory.** Time is cut into blocks of w rows, counted from row 0 of the grid. The rows of a block are told by a filter
that starts with the stationary distribution w rows before the block: each row reads between w and 2 w - 1 rows before
it, blocks run side by side, and however rows are cut into calls, the bits are the same. Rows before the series are
missing ones. w is chosen such that more rows would lower the variance of a prediction by less than 1 %.

Sources: Durbin, Koopman (2012), Time Series Analysis by State Space Methods, ch. 4 (the filter, missing cells left
out); Anderson, Moore (1979), Optimal Filtering (noises that correlate). The fit: ``state_space_fit``.

Legend: N rows, V variates, U of them in the model, k states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from tsforge.anomaly.covariance import by_row

FloatArray = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
SHORTEST_WINDOW, LONGEST_WINDOW = 8, 128
_FORGOTTEN = 0.01  # share of a prediction's variance that rows before the window may still explain
_ROUNDING = 1e-12  # more certain than that nothing is: predictions that depend exactly must not break the factor
_CERTAIN = 1e-16  # variance of the state, as a share of the stationary one, that counts as none
_BLOCK = 1 << 22  # numbers held at once
_KEPT = 1 << 22  # numbers of filter steps kept at hand


class Told(NamedTuple):
    """Deviations d and predictions [N, V] of rows, in data units; d is NaN where the cell is missing."""

    deviations: FloatArray
    expected: FloatArray


@dataclass(eq=False)
class _Step:
    """What the filter does after one pattern of observed cells.

    Shapes: gain [k, U], 0 where missing; spread [U, U] = L_o L_t^-1, None where it is the identity; others [U, U],
    what nu says of the missing cells, None where none is.
    """

    gain: FloatArray
    spread: FloatArray | None
    others: FloatArray | None
    after: _Certainty


@dataclass(eq=False)
class _Certainty:
    """Covariance [k, k] of the state before a row, None where the state is known; steps from here by pattern."""

    covariance: FloatArray | None
    steps: dict[bytes, _Step] = field(default_factory=dict)


@dataclass(eq=False)
class _AtHand:
    """Steps that were asked for: from where nothing was observed, from where all was; how many numbers they hold."""

    unseen: _Certainty
    known: _Certainty
    numbers: int = 0

    def forget(self) -> None:
        """Forget all steps; those in use live on with whoever uses them."""
        self.unseen.steps.clear()
        self.known.steps.clear()
        self.numbers = 0


@dataclass(frozen=True, kw_only=True)
class StateSpace:
    """The model of one series, in standardised variates.

    Attributes:
        center, scale: [V] of rows; a variate that was seldom observed has center NaN and no score.
        used: [V] variates in the model; the others were constant and are expected to stay so.
        transition: A [k, k]. loadings: C [U, k]. gain: K [k, U]. noise: S [U, U].
        window: fewest rows that tell a row.
    """

    center: FloatArray
    scale: FloatArray
    used: Bools
    transition: FloatArray
    loadings: FloatArray
    gain: FloatArray
    noise: FloatArray
    window: int

    @property
    def reach(self) -> int:
        """Rows before a row that its score reads."""
        return 2 * self.window - 1

    @cached_property
    def _at_hand(self) -> _AtHand:
        noise = self.gain @ self.noise @ self.gain.T
        return _AtHand(_Certainty(stationary_covariance(self.transition, noise)), _Certainty(None))

    def told(self, values: FloatArray, first: int) -> Told:
        """Return what is said of rows [N, V].

        Args:
            values: [reach + N, V] in time order, NaN where not observed.
            first: absolute row of the first of the N.
        """
        z = np.ascontiguousarray(((values - self.center) / self.scale)[:, self.used])
        predicted, apart, _ = self.filtered(z, first - self.reach)
        rows = values[self.reach :]
        expected = np.tile(self.center, (len(rows), 1))
        expected[:, self.used] = predicted[self.reach :] * self.scale[self.used] + self.center[self.used]
        deviations = rows - expected
        deviations[:, self.used] = apart[self.reach :] * self.scale[self.used]
        return Told(deviations, expected)

    def filtered(self, z: FloatArray, begin: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return predictions, deviations and rows with missing cells told [reach + N, U]; the first ``reach`` anything.

        Args:
            z: [reach + N, U].
            begin: absolute row of the first.
        """
        w, count = self.window, len(z)
        seen = ~np.isnan(z)
        predicted, apart, whole = np.zeros_like(z), np.full_like(z, np.nan), np.where(seen, z, 0.0)
        if count <= self.reach or not z.shape[1]:
            return predicted, apart, whole
        patterns, pattern = _patterns(seen)
        block = np.arange((begin + self.reach) // w, (begin + count - 1) // w + 1)
        start = block * w - w - begin  # place in z where the filter of a block starts
        state = np.zeros((len(block), len(self.transition)))
        before = [self._at_hand.unseen]  # what is known before the step, and which of it each block is at
        which = np.zeros(len(block), dtype=np.int64)
        for step in range(2 * w):
            place = start + step
            live = int(np.searchsorted(place, count))  # the last block may end early
            if not live:
                break
            place, which, state = place[:live], which[:live], state[:live]
            means = by_row(self.loadings, state)
            nu = np.where(seen[place], z[place] - means, 0.0)
            deviates, hidden, moved = nu.copy(), means.copy(), np.empty_like(state)
            groups, rows_of = _grouped(which * len(patterns) + pattern[place])
            pairs = [divmod(group, len(patterns)) for group in groups]
            steps = self._steps([(before[here], patterns[kind]) for here, kind in pairs])
            after = {id(one.after): one.after for one in steps}
            number = {name: place for place, name in enumerate(after)}
            for one, rows in zip(steps, rows_of, strict=True):
                moved[rows] = by_row(one.gain, nu[rows])
                if step >= w and one.spread is not None:
                    deviates[rows] = by_row(one.spread, nu[rows])
                if step >= w and one.others is not None:
                    hidden[rows] += by_row(one.others, nu[rows])
                which[rows] = number[id(one.after)]
            if step >= w:
                predicted[place] = means
                apart[place] = np.where(seen[place], deviates, np.nan)
                whole[place] = np.where(seen[place], z[place], hidden)
            state, before = by_row(self.transition, state) + moved, list(after.values())
        return predicted, apart, whole

    def _steps(self, asked: list[tuple[_Certainty, Bools]]) -> list[_Step]:
        """Return what the filter does from what is known and with the cells [U] that are observed, of each pair."""
        found = [before.steps.get(seen.tobytes()) for before, seen in asked]
        lacking = [number for number, one in enumerate(found) if one is None]
        size = max(_BLOCK // (8 * self.noise.size), 1)
        for low in range(0, len(lacking), size):
            part = lacking[low : low + size]
            for number, one in zip(part, self._made_steps([asked[number] for number in part]), strict=True):
                before, seen = asked[number]
                before.steps[seen.tobytes()] = found[number] = one
        self._at_hand.numbers += len(lacking) * (2 * self.noise.size + self.gain.size + self.transition.size)
        if self._at_hand.numbers > _KEPT:
            self._at_hand.forget()
        return [one for one in found if one is not None]

    def _made_steps(self, asked: list[tuple[_Certainty, Bools]]) -> list[_Step]:
        """Return what ``_steps`` does not have yet; each is computed by itself, whatever the others are."""
        a, c, k, s = self.transition, self.loadings, self.gain, self.noise
        p = np.stack([np.zeros_like(a) if before.covariance is None else before.covariance for before, _ in asked])
        seen = np.stack([each for _, each in asked])
        both = seen[:, :, None] & seen[:, None, :]
        missing = np.eye(len(s)) * ~seen[:, None, :]  # cells of their own: they touch no other
        told = c @ p
        total = told @ c.T + s
        total = total * (1.0 + _ROUNDING * np.eye(len(s)))
        inverse = np.linalg.inv(np.linalg.cholesky(np.where(both, total, missing)))
        precision = np.where(both, inverse.transpose(0, 2, 1) @ inverse, 0.0)
        gain = (a @ told.transpose(0, 2, 1) + k @ s) @ precision
        others = np.where(seen[:, :, None], 0.0, total) @ precision
        spread = np.where(both, np.linalg.cholesky(np.where(both, s, missing)) @ inverse, 0.0)
        # as squares, so that it stays a covariance
        shrunk, rest = a - gain @ c, k - gain
        later = shrunk @ p @ shrunk.transpose(0, 2, 1) + rest @ s @ rest.transpose(0, 2, 1)
        made = []
        for number, (before, each) in enumerate(asked):
            certain, complete = before.covariance is None, bool(each.all())
            if certain and complete:
                made.append(_Step(k, None, None, self._at_hand.known))
                continue
            covariance = 0.5 * (later[number] + later[number].T)
            after = self._at_hand.known if self._is_certain(covariance) else _Certainty(covariance)
            one = _Step(
                gain=gain[number].copy(),
                spread=None if certain else spread[number].copy(),
                others=None if complete else others[number].copy(),
                after=after,
            )
            made.append(one)
        return made

    def _is_certain(self, covariance: FloatArray) -> bool:
        stationary = self._at_hand.unseen.covariance
        widest = 0.0 if stationary is None else np.abs(stationary).max(initial=0.0)
        return bool(np.abs(covariance).max(initial=0.0) <= _CERTAIN * widest)

    def settled(self) -> int:
        """Return the observed rows after which still earlier ones hardly matter, 8 to 128."""
        complete, here = np.ones(len(self.noise), dtype=bool), self._at_hand.unseen
        precision = cho_factor(self.noise, lower=True)
        for rows in range(LONGEST_WINDOW):
            if here.covariance is None:
                return max(rows, SHORTEST_WINDOW)
            extra = self.loadings @ here.covariance @ self.loadings.T
            if float(np.trace(cho_solve(precision, extra))) <= _FORGOTTEN * len(self.noise):
                return max(rows, SHORTEST_WINDOW)
            (one,) = self._steps([(here, complete)])
            here = one.after
        return LONGEST_WINDOW


def _patterns(seen: Bools) -> tuple[Bools, Ints]:
    """Return the different rows of ``seen`` [N, U], the complete one first, and which of them each row is [N]."""
    pattern = np.zeros(len(seen), dtype=np.int64)
    partly = np.flatnonzero(~seen.all(axis=1))
    _, place, number = np.unique(np.packbits(seen[partly], axis=1), axis=0, return_index=True, return_inverse=True)
    pattern[partly] = number.ravel() + 1
    return np.concatenate([np.ones((1, seen.shape[1]), dtype=bool), seen[partly[place]]]), pattern


def _grouped(names: Ints) -> tuple[list[int], list[Ints | slice]]:
    """Return the different names [M], and the places of each."""
    if len(names) and (names == names[0]).all():
        return [int(names[0])], [slice(None)]
    groups, member, counts = np.unique(names, return_inverse=True, return_counts=True)
    return groups.tolist(), [*np.split(np.argsort(member, kind="stable"), np.cumsum(counts)[:-1])]


def stationary_covariance(transition: FloatArray, noise: FloatArray) -> FloatArray:
    """Return P = A P A' + Q [k, k] of a stable A; by doubling, so that it is a covariance however A rounds.

    Source: sum of A^i Q A'^i, twice as many terms a round (doubling: Anderson, Moore 1979, ch. 6).
    """
    total, power = noise, transition
    for _ in range(60):
        added = power @ total @ power.T
        total = total + added
        if np.abs(added).max(initial=0.0) <= 1e-17 * np.abs(total).max(initial=0.0):
            break
        power = power @ power
    return np.asarray(0.5 * (total + total.T))
