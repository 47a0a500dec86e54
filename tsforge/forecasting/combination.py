"""Weights of a mixture from errors on held-out windows: greedy forward selection with replacement.

Source: Caruana, Niculescu-Mizil, Crew, Ksikes (2004), Ensemble Selection from Libraries of Models, ICML, Sec. 2: start
empty, add the candidate that lowers the held-out loss of the average most, allow it again, keep the best length.

Deviations, for data ordered in time: the loss is the mean logarithm over stretches of time, so that one turbulent
stretch does not decide alone; in place of bagging random subsets of candidates, the selection is repeated with each
stretch left out in turn and the weights are averaged, those below 2 % left out. The selection may lean on an anchor, a
candidate trusted before any error is seen, the more the less clearly the stretches speak against it (``anchor_share``):
held-out rows of one regime choose what loses in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Loss = Literal["mse", "mae"]
Scope = Literal["global", "variate", "series"]

ROUNDS = 30
_TINY = 1e-12
_LEAST = 0.02  # a member with less costs its time and tells nothing
_DOUBT = 2.0  # standard errors of the gain over an anchor at which it keeps half of the say
_MOST = 0.95  # of the say, for an anchor that nothing speaks against: the others may still complete it


@dataclass(frozen=True, kw_only=True)
class HeldOutErrors:
    """Errors of M candidates in the same N windows, none of which they were fitted on.

    Shapes:
        errors [M, N, H, V] float32, forecast minus target in comparable units, 0 where not observed; mask [N, H, V];
        series [N]; block [N], which stretch of time a window belongs to (0, 1, ...).
    """

    errors: NDArray[np.float32]
    mask: NDArray[np.bool_]
    series: NDArray[np.int64]
    block: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.errors.shape[1:] != self.mask.shape or not len(self.errors):
            raise DataError(f"errors have shape {self.errors.shape}, the mask {self.mask.shape}; they do not match")
        if not self.mask.any():
            raise DataError("no observed cell in the held-out windows: there is nothing to choose by")
        if not np.isfinite(self.errors).all():
            raise DataError("a candidate's errors are not finite; leave it out")

    def take(
        self, *, candidates: Any = slice(None), windows: Any = slice(None), variates: Any = slice(None)
    ) -> HeldOutErrors:
        """Return the errors of some candidates, windows or variates (index arrays or slices)."""
        return HeldOutErrors(
            errors=self.errors[candidates][:, windows][..., variates],
            mask=self.mask[windows][..., variates],
            series=self.series[windows],
            block=self.block[windows],
        )

    def mixed(self, weights: Sequence[float] | Floats) -> NDArray[np.float32]:
        """Return the errors [N, H, V] of a mixture."""
        return np.asarray(np.tensordot(np.asarray(weights, dtype=np.float32), self.errors, axes=1))


class _Blocks:
    """Loss of mixtures in each stretch of time; stretches without an observed cell are left out."""

    def __init__(self, held: HeldOutErrors, loss: Loss) -> None:
        self.loss = loss
        self.size = len(held.errors)
        self.parts: list[Floats] = []  # mse: a matrix of mean products [M, M]; mae: the errors of observed cells [M, C]
        for block in np.unique(held.block):
            rows = held.block == block
            seen = held.mask[rows]
            if not seen.any():
                continue
            cells = held.errors[:, rows][:, seen].astype(np.float64)
            self.parts.append(cells @ cells.T / cells.shape[1] if loss == "mse" else cells)

    def after_adding(self, counts: Floats, only: Sequence[int]) -> Floats:
        """Return the mean log loss [M] over the stretches ``only`` after one more pick of each candidate."""
        total = counts.sum() + 1.0
        found = np.zeros(self.size)
        for index in only:
            part = self.parts[index]
            if self.loss == "mse":
                value = (counts @ part @ counts + 2.0 * part @ counts + np.diag(part)) / total**2
            else:
                value = np.abs((counts @ part)[None] + part).mean(axis=1) / total
            found += np.log(np.maximum(value, _TINY))
        return found / len(only)

    def losses(self, weights: Floats) -> Floats:
        """Return the loss of a mixture in every stretch."""
        if self.loss == "mse":
            return np.array([weights @ part @ weights for part in self.parts])
        return np.array([np.abs(weights @ part).mean() for part in self.parts])

    def greedy(self, only: Sequence[int], start: Floats, max_members: int) -> Floats:
        """Return weights [M] from picks of at most ``max_members`` candidates, counted on top of ``start`` [M]."""
        counts, best, best_value = start.copy(), start.copy(), np.inf
        for _ in range(ROUNDS):
            value = self.after_adding(counts, only)
            if (counts > start).sum() >= max_members:  # what the start holds takes no place
                value = np.where(counts > 0, value, np.inf)
            pick = int(value.argmin())
            counts[pick] += 1.0
            if value[pick] < best_value - 1e-9:
                best, best_value = counts.copy(), float(value[pick])
        return np.asarray(best / best.sum())


def block_losses(held: HeldOutErrors, weights: Sequence[float] | Floats, loss: Loss = "mse") -> Floats:
    """Return the loss of a mixture in every stretch of time that has an observed cell."""
    return _Blocks(held, loss).losses(np.asarray(weights, dtype=np.float64))


def greedy_weights(
    held: HeldOutErrors, *, loss: Loss = "mse", max_members: int = 8, start: Floats | None = None
) -> Floats:
    """Return non-negative weights [M] that sum to 1; at most ``max_members`` differ from 0.

    Args:
        held: errors to choose by.
        loss: squared or absolute.
        max_members: candidates in the mixture; those that ``start`` holds take no place among the ones that are picked,
            and the heaviest of all stay in the end.
        start: picks made before [M], in units of ``ROUNDS``: weights that sum to 1 keep at least half of the say.

    Raises:
        ConfigError: ``max_members`` below 1.
    """
    if max_members < 1:
        raise ConfigError(f"max_members is {max_members}; a mixture needs at least one")
    blocks = _Blocks(held, loss)
    number = len(blocks.parts)
    before = np.zeros(blocks.size) if start is None else np.asarray(start, dtype=np.float64) * ROUNDS
    everything = range(number)
    without = [[index for index in everything if index != left] for left in everything] if number > 2 else [everything]
    weights = np.mean([blocks.greedy(only, before, max_members) for only in without], axis=0)
    weights[np.argsort(-weights, kind="stable")[max_members:]] = 0.0
    weights[weights < min(_LEAST, weights.max())] = 0.0
    return np.asarray(weights / weights.sum())


def mixture_weights(
    held: HeldOutErrors,
    *,
    scope: Scope = "global",
    loss: Loss = "mse",
    max_members: int = 8,
    num_series: int = 1,
    anchor: int | None = None,
) -> Floats:
    """Return weights [G, M, 1, V or 1] in the layout of ``EnsembleNetwork``.

    Weights of a variate or series start from the global ones and move at most half of the way; only members of the
    global mixture take part. A series without held-out windows keeps the global ones, as does the last set (G =
    ``num_series`` + 1), which is for series that were not there.

    Args:
        held, loss, max_members: as of ``greedy_weights``.
        scope: what has weights of its own.
        num_series: in the data.
        anchor: candidate that keeps its ``anchor_share`` of the global weights, while it is among the ``max_members``
            heaviest; the others are chosen beside it.
    """
    common = greedy_weights(held, loss=loss, max_members=max_members)
    if anchor is not None:
        alone = np.eye(len(common))[anchor]
        losses = (block_losses(held, alone, loss), block_losses(held, common, loss))
        common = leaning_weights(held, anchor, losses, loss=loss, max_members=max_members)
    if scope == "global":
        return common[None, :, None, None]
    members = np.flatnonzero(common > 0)
    few = held.take(candidates=members)

    def own(part: HeldOutErrors) -> Floats:
        full = np.zeros_like(common)
        full[members] = greedy_weights(part, loss=loss, max_members=max_members, start=common[members])
        return full

    if scope == "variate":
        columns = [
            own(few.take(variates=slice(v, v + 1))) if held.mask[..., v].any() else common
            for v in range(held.mask.shape[-1])
        ]
        return np.stack(columns, axis=-1)[None, :, None, :]
    rows = []
    for series in range(num_series):
        windows = held.series == series
        rows.append(own(few.take(windows=windows)) if held.mask[windows].any() else common)
    return np.stack([*rows, common])[:, :, None, None]


def leaning_weights(
    held: HeldOutErrors, anchor: int, losses: tuple[Floats, Floats], *, loss: Loss = "mse", max_members: int = 8
) -> Floats:
    """Return greedy weights [M] beside a candidate that keeps its ``anchor_share``.

    Args:
        held, loss, max_members: as of ``greedy_weights``.
        anchor: place of that candidate.
        losses: of the anchor alone and of the mixture chosen without one, in every stretch of time.
    """
    share = anchor_share(*losses)
    before = share / (1.0 - share) * np.eye(len(held.errors))[anchor]
    return greedy_weights(held, loss=loss, max_members=max_members, start=before)


def anchor_share(alone: Floats, mixed: Floats) -> float:
    """Return the share of the say that an anchor keeps whatever else is chosen, at most 95 %.

    With a gain of z standard errors it is 4 / (4 + z^2): half at two, a seventh at five. Two, since stretches that
    touch are not independent and the mixture was chosen by the same errors.

    Args:
        alone, mixed: loss of the anchor and of the mixture chosen without one, in every stretch of time.
    """
    gain, error = clear_gain(alone, mixed)
    if gain <= 0:
        return _MOST
    if not np.isfinite(error):
        return 0.5  # one stretch tells nothing of the noise
    return min((_DOUBT * error) ** 2 / ((_DOUBT * error) ** 2 + gain**2), _MOST)


def clear_gain(old: Floats, new: Floats) -> tuple[float, float]:
    """Return the mean gain in log loss of ``new`` over ``old`` across stretches of time, and its standard error."""
    gains = np.log(np.maximum(old, _TINY)) - np.log(np.maximum(new, _TINY))
    error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else np.inf
    return float(gains.mean()), error
