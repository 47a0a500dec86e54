"""How large the errors of a network were just before a cutoff: the unit of margins that follow calm and stormy times.

The fitted network forecasts once more from earlier cutoffs, and what came of those forecasts by the cutoff at hand is
averaged, step by step, newer ones counting more. Divided by that, errors of a quiet year and of a wild one look alike,
so margins counted on one serve the other. It is the local scale of Papadopoulos et al. (2002), ECML, and Lei et al.
(2018), JASA 113:1094-1111, section 5.2, with a running mean of past errors in place of a second model.

Earlier cutoffs reach back eight horizons (64 rows at least), 32 of them at most, evenly spaced; a weight halves over a
quarter of that. Of the forecast from k rows back only the first k steps are known. The mean leans, with the weight
``PRIOR``, towards the error of the step in held-out windows (in units of each window): without any known error that
is the whole unit, and where errors vanish it keeps the unit above zero.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from tsforge.core.logs import get_logger
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec, windows_at
from tsforge.forecasting.window_forecasts import as_array, evaluating, window_batches
from tsforge.network import ForecastNetwork

_LOG = get_logger(__name__)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
PRIOR = 0.2
_HORIZONS, _LEAST_ROWS, _MOST = 8, 64, 32
_CELLS = 16_000_000  # errors held at a time


def earlier_cutoffs(horizon: int) -> tuple[IntArray, FloatArray]:
    """Return how many rows before a cutoff the earlier ones lie, ascending, and the weight of each."""
    reach = max(_HORIZONS * horizon, _LEAST_ROWS)
    spacing = math.ceil(reach / _MOST)
    back = np.arange(spacing, reach + 1, spacing)
    return back, np.exp2(-back / (reach / 4))


def rows_needed(window: WindowSpec) -> int:
    """Return how many rows before a cutoff its newest earlier forecast reads: fewer, and no error is known."""
    return window.context_length + int(earlier_cutoffs(window.horizon)[0][0])


def rows_looked_back(window: WindowSpec) -> int:
    """Return how many rows before a cutoff the oldest of its earlier forecasts may read."""
    return window.context_length + int(earlier_cutoffs(window.horizon)[0][-1])


def known_steps(back: int, horizon: int) -> int:
    """Return how many steps of a forecast from ``back`` rows before a cutoff are known at it."""
    return min(back, horizon)


def recent_errors(
    network: ForecastNetwork,
    panel: Panel,
    window: WindowSpec,
    series: IntArray,
    cutoff: IntArray,
    *,
    first_row: int | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Return the weighted sum of the absolute errors known at each cutoff, and the sum of their weights.

    Args:
        network: fitted; it forecasts from every earlier cutoff with a whole context in the series and anything
            observed in it. A forecast that is no number counts for nothing.
        panel: the data; nothing of it from ``cutoff`` on is read but known covariates.
        window: sizes.
        series, cutoff: series and absolute row of the first forecast step of each window.
        first_row: leave out errors on rows before it, such as those the network was trained on.

    Shapes:
        series, cutoff [N] -> [N, H, V] in data units, [N, H, V].
    """
    shape = (len(series), window.horizon, panel.num_targets)
    total, weight = np.zeros(shape), np.zeros(shape)
    back, share = earlier_cutoffs(window.horizon)
    order = np.lexsort((series, cutoff) if network.capabilities.rows_coupled else (cutoff, series))
    step = max(1, _CELLS // (len(back) * shape[1] * shape[2]))
    for start in range(0, len(order), step):  # neighbours share most of their earlier cutoffs
        mine = order[start : start + step]
        earlier = cutoff[mine, None] - back
        owner = np.broadcast_to(series[mine, None], earlier.shape)
        usable, where = _has_context(panel, window.context_length, owner, earlier), np.full(earlier.shape, -1)
        if not usable.any():
            continue
        first = earlier[usable].min()
        width = earlier[usable].max() - first + 1
        keys, where[usable] = np.unique(owner[usable] * width + earlier[usable] - first, return_inverse=True)
        errors = _absolute_errors(network, panel, window, keys // width, keys % width + first)
        for number, (rows, part) in enumerate(zip(back, share, strict=True)):
            there = np.flatnonzero(where[:, number] >= 0)
            known = known_steps(int(rows), window.horizon)
            found = errors[where[there, number], :known]
            counts = ~np.isnan(found)
            if first_row is not None:
                counts &= (earlier[there, number, None] + np.arange(known) >= first_row)[..., None]
            total[mine[there], :known] += part * np.where(counts, found, 0.0)
            weight[mine[there], :known] += part * counts
    return total, weight


def recent_unit(total: FloatArray, weight: FloatArray, expected: FloatArray, scale: FloatArray) -> FloatArray:
    """Return the unit of every cell: the mean of the recent errors, leaning towards the expected one.

    Args:
        total, weight: of ``recent_errors`` [N, H, V].
        expected: mean absolute error of held-out windows in units of the window [H, V].
        scale: unit of each window [N, V].
    """
    usual = expected * scale[:, None]
    least = 1e-3 * scale[:, None]
    return np.asarray(np.maximum((total + PRIOR * usual) / (weight + PRIOR), least))


def calibrated_unit(
    network: ForecastNetwork,
    panel: Panel,
    window: WindowSpec,
    series: IntArray,
    cutoff: IntArray,
    scale: FloatArray,
    calibration: pl.DataFrame,
    *,
    tell: bool = True,
) -> FloatArray:
    """Return the units [N, H, V] of windows for a calibration table of ``recent`` scores; H = trained horizon.

    Windows before which no error is known have the usual one for a unit; ``tell`` warns of them.
    """
    total, weight = recent_errors(network, panel, window, series, cutoff)
    present = panel.lengths[series] > 0  # a model that couples series has windows of others too
    bare = int((present & (weight == 0).all(axis=(1, 2))).sum())
    if bare and tell:
        _LOG.warning(
            "%d of %d windows have no forecasts before them to measure recent errors on (it takes %d rows of "
            "history up to the cutoff); their intervals rest on the usual error of the held-out windows",
            bare,
            int(present.sum()),
            rows_needed(window),
        )
    names = list(panel.schema.targets)
    order = pl.DataFrame({"variate": names, "place": range(len(names))})
    usual = calibration.unique(["step", "variate"]).join(order, on="variate").sort("step", "place")["expected"]
    return recent_unit(total, weight, usual.to_numpy().reshape(window.horizon, len(names)), scale)


def _has_context(panel: Panel, length: int, series: IntArray, cutoff: IntArray) -> NDArray[np.bool_]:
    """Return where a whole context lies inside the rows of the series and holds an observed target."""
    first = cutoff - length - panel.offset[series]
    inside = (first >= 0) & (first + length <= panel.lengths[series])
    running = np.concatenate([[0], np.cumsum(panel.target_observed.any(axis=1))])
    start = panel.indptr[series] + np.where(inside, first, 0)
    stop = np.where(inside, start + length, start)
    return np.asarray(running[stop] > running[start])


@torch.no_grad()
def _absolute_errors(
    network: ForecastNetwork, panel: Panel, window: WindowSpec, series: IntArray, cutoff: IntArray
) -> NDArray[np.float32]:
    """Return [N, H, V] for series and cutoffs in ascending order, NaN where the target is unknown or no number came."""
    coupled = network.capabilities.rows_coupled
    windows: WindowDataset
    if coupled:
        moments, place = np.unique(cutoff, return_inverse=True)
        windows = windows_at(panel, window, None, moments)
        chosen = place * panel.num_series + series
    else:
        windows = windows_at(panel, window, series, cutoff)
        chosen = np.arange(len(series))
    with evaluating(network):
        parts = [as_array(network.predict(batch).mean) for batch in window_batches(network, windows)]
    mean = np.concatenate(parts)[chosen]
    rows = (panel.indptr[series] + cutoff - panel.offset[series])[:, None] + np.arange(window.horizon)
    there = rows < panel.indptr[series + 1][:, None]
    rows = np.where(there, rows, 0)
    known = panel.target_observed[rows] & there[..., None] & np.isfinite(mean)
    actual = panel.values[rows][..., : panel.num_targets]
    return np.where(known, np.abs(actual - np.where(known, mean, 0.0)), np.nan).astype(np.float32)
