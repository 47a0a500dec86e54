"""Where free runs of a fitted map end: the capture test.

A model may follow its data for a while and still lose many free runs to a spurious fixed point or cycle; no
short-horizon error shows that. So several hundred data states are run freely for a long time and the ends classified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsforge.core.errors import ModelError
from tsforge.dynamics.piecewise import Array, PiecewiseLinear, as_float64, checked_states, piecewise_linear
from tsforge.ops.plrnn import Shallow, free_run

KINDS = ("fixed", "contracting", "near_zero", "expanding", "diverged")
AT_REST = 1e-6
NEAR_ZERO = 1e-3  # a step
_WINDOW = 500
_RENORMALISE = 10


@dataclass(frozen=True)
class CaptureSettings:
    """Size of the capture test.

    Attributes:
        runs: data states to start from, evenly spaced.
        steps: free steps before a run is judged (at least 500, the window that is looked at).
        tangent_steps: steps over which the growth of a small deviation is measured.
        near_zero: growth rates up to this size, per step, count as neither contracting nor expanding.
        far: distance from the mean of the data, in standard deviations of any unit, beyond which a run is lost.
    """

    runs: int = 400
    steps: int = 20_000
    tangent_steps: int = 5000
    near_zero: float = NEAR_ZERO
    far: float = 4.0

    def __post_init__(self) -> None:
        """Refuse sizes that measure nothing."""
        if self.runs < 1 or self.steps < _WINDOW or self.tangent_steps < 100 or self.near_zero < 0 or self.far <= 0:
            raise ModelError(
                f"the capture test needs runs >= 1, steps >= {_WINDOW}, tangent_steps >= 100, near_zero >= 0 "
                f"and far > 0, not {self}"
            )


@dataclass(frozen=True, eq=False)
class Capture:
    """How each of R free runs ends.

    Attributes:
        ends: (R, M) last states, not finite where a run diverged.
        kinds: (R,) index into ``KINDS``.
        periods: (R,) period of the cycle a run has settled on (1 for a fixed point), 0 where it has not.
        growth: (R,) logarithmic growth of a small deviation per step, the largest Lyapunov exponent.
        beyond: (R,) the run spends most of the last 500 steps far from the data, or diverged.
        steps: free steps of every run.
        near_zero: see ``CaptureSettings``.
    """

    ends: Array
    kinds: NDArray[np.int64]
    periods: NDArray[np.int64]
    growth: Array
    beyond: NDArray[np.bool_]
    steps: int
    near_zero: float = NEAR_ZERO

    def share(self, kind: str) -> float:
        """Return the share of runs of one of ``KINDS``; the five shares add up to 1."""
        return float((self.kinds == KINDS.index(kind)).mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of the report.

        ``kept``: shares of all runs that end in a way and near the data. ``growth``: median rate of the runs that did
        not diverge.
        """
        finite = self.growth[np.isfinite(self.growth)]
        settled, counts = np.unique(self.periods[self.periods > 0], return_counts=True)
        return {
            "runs": len(self.kinds),
            "steps": self.steps,
            **{kind: self.share(kind) for kind in KINDS},
            "beyond": float(self.beyond.mean()),
            "kept": {kind: float(((self.kinds == place) & ~self.beyond).mean()) for place, kind in enumerate(KINDS)},
            "growth": float(np.median(finite)) if len(finite) else None,
            "settled": {
                str(period): float(count / len(self.kinds)) for period, count in zip(settled, counts, strict=True)
            },
        }


def capture_test(
    params: Shallow, states: Any, *, clipped: bool = False, settings: CaptureSettings | None = None, seed: int = 0
) -> Capture:
    """Run the map freely from data states and classify the ends, in float64.

    fixed: a standard deviation below 1e-6 over the last 500 steps; then by the growth rate of a small deviation:
    contracting (a stable cycle, or a fixed point not yet reached), near zero (a closed curve), expanding (chaos);
    diverged: not finite. For chaotic data the expanding share should be 1.

    Args:
        params: shallow form of one group, see ``piecewise_linear``.
        states: (T, M) states of the data in latent coordinates; also the yardstick of ``beyond``.
        clipped: the map is the clipped one.
        settings: size of the test.
        seed: of the deviations' directions.

    Raises:
        ModelError: shapes that do not fit or values that are not finite.
    """
    settings = settings or CaptureSettings()
    mapping = piecewise_linear(params, clipped=clipped)
    data = checked_states(states, mapping.latent)
    starts = data[np.linspace(0, len(data) - 1, min(settings.runs, len(data))).round().astype(np.int64)]
    tail = _tail(params, starts, settings.steps, clipped)
    finite = np.isfinite(tail).all(axis=(0, 2))
    safe = tail[:, finite]
    centre, spread = data.mean(axis=0), np.maximum(data.std(axis=0), AT_REST)
    beyond = np.ones(len(starts), dtype=bool)
    beyond[finite] = np.median((np.abs(safe - centre) / spread).max(axis=2), axis=0) > settings.far
    periods = np.zeros(len(starts), dtype=np.int64)
    periods[finite] = _periods(safe)
    growth = np.full(len(starts), np.nan)
    growth[finite] = _growth(mapping, safe[-1], settings.tangent_steps, np.random.default_rng(seed))
    escaped = np.isnan(growth)  # also a run that overflows only while its growth is measured
    kinds = np.select(
        [escaped, periods == 1, growth < -settings.near_zero, growth <= settings.near_zero],
        [KINDS.index(kind) for kind in ("diverged", "fixed", "contracting", "near_zero")],
        KINDS.index("expanding"),
    ).astype(np.int64)
    settled = np.where(escaped, 0, periods)
    return Capture(tail[-1], kinds, settled, growth, beyond | escaped, settings.steps, settings.near_zero)


def _tail(params: Shallow, starts: Array, steps: int, clipped: bool) -> Array:
    """Return the last 500 states (500, R, M) of free runs."""
    exact = Shallow(*(torch.as_tensor(as_float64(part)) for part in params))
    z = torch.from_numpy(starts)
    if steps > _WINDOW:
        z = free_run(z, exact, steps - _WINDOW, clipped=clipped, every=steps - _WINDOW)[-1]
    return as_float64(free_run(z, exact, _WINDOW, clipped=clipped))


def _periods(tail: Array) -> NDArray[np.int64]:
    """Return the least period of each run (T, R, M) over its last states, 1 at rest, 0 where none closes it."""
    window = len(tail)
    periods = np.zeros(tail.shape[1], dtype=np.int64)
    with np.errstate(all="ignore"):  # a run about to overflow has no standard deviation
        periods[(tail.std(axis=0) < AT_REST).all(axis=1)] = 1
    for period in range(2, window // 2 + 1):  # a settled cycle repeats at least twice
        open_runs = np.flatnonzero(periods == 0)
        near = np.abs(tail[-1, open_runs] - tail[-1 - period, open_runs]).max(axis=1) < AT_REST
        for run in open_runs[near]:
            if np.abs(tail[period:, run] - tail[:-period, run]).max() < AT_REST:
                periods[run] = period
    return periods


def _growth(mapping: PiecewiseLinear, z: Array, steps: int, rng: np.random.Generator) -> Array:
    """Return the growth rate (R,) of a random deviation along the orbits of z (R, M); NaN where an orbit overflows.

    The rate is the slope of a straight line through its logarithm. The difference of the two ends is the usual
    estimate, but within a cycle of fast and slow parts a deviation swells and shrinks by orders of magnitude, which
    over a few cycles looks like growth; the line averages it out.
    """
    runs = len(z)
    if not runs:
        return np.zeros(0)
    deviation = rng.normal(size=z.shape)
    deviation /= np.linalg.norm(deviation, axis=1, keepdims=True)
    both = np.concatenate([z, deviation])
    total, align = np.zeros(runs), steps // 10  # the first tenth turns the deviation into its fastest direction
    align -= align % _RENORMALISE
    times = np.arange(0.0, steps + _RENORMALISE, _RENORMALISE).clip(max=steps)
    times -= times.mean()
    leverage, slope, place = times / np.square(times).sum(), np.zeros(runs), 0
    with np.errstate(all="ignore"):
        for index in range(1, align + steps + 1):
            drive = both @ mapping.normal.T
            active = drive[:runs] + mapping.offset
            mask = active > 0.0
            drive[:runs] = active
            drive[:runs] *= mask
            drive[runs:] *= mask
            both = both @ mapping.linear.T + drive @ mapping.weight.T
            both[:runs] += mapping.constant
            if index % _RENORMALISE == 0 or index == align + steps:
                size = np.linalg.norm(both[runs:], axis=1)
                both[runs:] /= np.where(size > 0.0, size, 1.0)[:, None]  # a deviation may vanish exactly
                if index > align:
                    place += 1
                    total += np.log(size)
                    slope += leverage[place] * total
    rate = np.where(np.isneginf(total), -np.inf, slope)
    return np.where(np.isfinite(both[:runs]).all(axis=1), rate, np.nan)
