"""Moments of lag windows of a training span: what every closed-form linear model here is fitted from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tsforge.models._ar_filled import MOST_VALUES, filled_moments
from tsforge.models._ar_layout import LagLayout
from tsforge.ops.moments import Channel, WindowMoments, channel_moments, observed_runs
from tsforge.ops.toeplitz import short_gap

MissingRule = Literal["auto", "windows", "filled"]
_CHUNK_VALUES = 4_000_000


def lag_moments(
    layout: LagLayout,
    values: Tensor,
    mask: Tensor,
    bounds: Sequence[int],
    *,
    past: Tensor | None = None,
    missing: MissingRule = "auto",
    uses_scale: bool = False,
    most_values: int | None = None,
) -> tuple[WindowMoments, bool]:
    """Return moments summed over variates and series, and whether any are of filled windows.

    Whole windows are exact least squares on every gap-free window. With ``"auto"`` straight lines bridge gaps of a few
    rows; where the rest leave less than half of a variate's windows whole, and fewer than could be filled, windows with
    filled gaps take over for it.
    ``uses_scale`` appends one more column, the standard deviation of the context; ``most_values`` limits the values of
    the windows that are filled.

    Shapes:
        values [N, V] centred, mask [N, V], bounds [num_series + 1] rows, past [N, P].

    Raises:
        ModelError: the span holds no window.
    """
    total: WindowMoments | None = None
    gappy = []
    for variate in range(values.shape[1]):
        own, seen = values[:, variate], mask[:, variate]
        if not bool(seen.any()):
            continue
        if missing == "auto":
            own, seen = bridge_short(own, seen, bounds, short_gap(layout.lags))
        runs = observed_runs(seen, bounds)
        if missing == "filled" or (missing == "auto" and _too_few(layout, runs, bounds)):
            gappy.append(variate)
            continue
        channels = layout.channels(own, seen, past)
        if uses_scale:
            channels.append(window_scale(own, seen, layout.lags))
        moments = channel_moments(channels, runs, layout.span)
        total = moments if total is None else total + moments
    if gappy:
        moments = filled_moments(
            layout,
            values[:, gappy],
            mask[:, gappy],
            bounds,
            past=past,
            uses_scale=uses_scale,
            most_values=most_values,
        )
        total = moments if total is None else total + moments
    if total is None:  # nothing observed at all: say so the way an empty span does
        return channel_moments([Channel(values[:, 0], layout.span)], [], layout.span), False
    return total, bool(gappy)


def bridge_short(values: Tensor, mask: Tensor, bounds: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """Return values and mask [N] with straight lines over gaps of at most ``most`` rows between rows of one series."""
    if most < 1 or bool(mask.all()):
        return values, mask
    seen = mask.cpu().numpy()
    rows = np.flatnonzero(seen)
    size = np.diff(rows) - 1
    series = np.searchsorted(np.asarray(bounds), rows, side="right")
    short = (size > 0) & (size <= most) & (np.diff(series) == 0)
    count = size[short]
    place = np.repeat(rows[:-1][short] + 1 - np.concatenate([[0], np.cumsum(count)[:-1]]), count) + np.arange(
        count.sum()
    )
    observed = torch.from_numpy(rows).to(values.device)
    line = np.interp(place, rows, values[observed].double().cpu().numpy())
    result, where = values.clone(), torch.from_numpy(place).to(values.device)
    result[where] = torch.from_numpy(line).to(result)
    whole = mask.clone()
    whole[where] = True
    return result, whole


def window_scale(values: Tensor, mask: Tensor, length: int) -> Channel:
    """Return the standard deviation of the observed values among the ``length`` rows from each row on, as a channel.

    Two cumulative sums give it for every window at once. Windows without two observations do not count as observed.
    """
    clean = torch.where(mask, values.double(), 0.0)
    sums = [torch.cat([clean.new_zeros(1), part.cumsum(0)]) for part in (mask.double(), clean, clean.square())]
    start = torch.arange(len(values), device=values.device)
    stop = (start + length).clamp(max=len(values))
    count, total, square = (part[stop] - part[start] for part in sums)
    variance = square / count.clamp(min=1.0) - (total / count.clamp(min=1.0)).square()
    return Channel(variance.clamp(min=0.0).sqrt(), 1, 0, count > 1)


def _too_few(layout: LagLayout, runs: Sequence[tuple[int, int]], bounds: Sequence[int]) -> bool:
    """Return whether gaps leave less than half of the windows whole, and fewer than could be filled."""

    def count(spans: Sequence[tuple[int, int]]) -> int:
        return sum(max(last - first - layout.span + 1, 0) for first, last in spans)

    whole = count(runs)
    return whole < 0.5 * count(list(pairwise(bounds))) and whole < MOST_VALUES // layout.span


def explicit_windows(
    layout: LagLayout, values: Tensor, mask: Tensor, bounds: Sequence[int], past: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (features [c, p + P q], targets [c, H]) of every gap-free window in chunks, ordered as in ``LagLayout``."""
    for variate in range(values.shape[1]):
        channels = layout.channels(values[:, variate], mask[:, variate], past)
        for first, last in observed_runs(mask[:, variate], bounds):
            rows = last - first - layout.span + 1
            if rows < 1:
                continue
            views = [
                channel.values[first + channel.start : last].double().unfold(0, channel.width, 1)[:rows]
                for channel in channels
            ]
            step = max(_CHUNK_VALUES // sum(channel.width for channel in channels), 1)
            for start in range(0, rows, step):
                window = torch.cat([view[start : start + step] for view in views], dim=1)
                yield window[:, layout.features], window[:, layout.targets]
