"""Split conformal calibration: intervals whose coverage is counted on held-out windows, not assumed.

Scores are taken in units of each window's scale (what the scaler divides by), so that calm and lively series share one
table, per step and per variate. Two scores: ``absolute``, |y - mean|, for networks that only give a point, and ``cqr``,
how far the target falls outside the forecast quantiles (negative when they are too wide), for all others.

For n exchangeable scores the k-th smallest with k = ceil((n + 1) coverage) covers at least ``coverage``; when k > n no
finite interval does, and the margin is infinite with status ``too_few``. It is never the largest score at hand, let
alone the smallest. Overlapping windows are dependent, so n overstates the evidence; the backtest measures the coverage.

Source: Papadopoulos et al. (2002), ECML; Lei et al. (2018), JASA 113:1094-1111, Eq. (split conformal); Romano,
Patterson, Candes (2019), NeurIPS, Eq. (6)-(8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.network import ForecastNetwork

_LOG = get_logger(__name__)

FloatArray = NDArray[np.float64]
CALIBRATION_SCHEMA: dict[str, type[pl.DataType]] = {
    "step": pl.Int32,
    "variate": pl.String,
    "level": pl.Float64,
    "n": pl.Int64,
    "low": pl.Float64,
    "high": pl.Float64,
    "score": pl.String,
    "status": pl.String,
}
DEFAULT_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_WINDOWS = 2000  # evenly spaced; more overlapping windows add memory, not evidence


def conformal_rank(count: int, coverage: float) -> int:
    """Return k = ceil((n + 1) coverage): the k-th smallest of n scores is the margin; k > n means there is none.

    Raises:
        ConfigError: coverage lies outside (0, 1).
    """
    if not 0.0 < coverage < 1.0:
        raise ConfigError(f"coverage {coverage} must lie between 0 and 1")
    return math.ceil(round((count + 1) * coverage, 9))  # 10 * 0.9 must not become 9.000000000000002


def conformal_margin(scores: FloatArray, mask: NDArray[np.bool_], coverage: float) -> tuple[FloatArray, FloatArray]:
    """Return the margin and the number of scores behind it; infinite where they are too few.

    Shapes:
        scores [N, ...], mask [N, ...] True = counts -> margin [...], n [...].
    """
    count = mask.sum(axis=0)
    ordered = np.sort(np.where(mask, scores, np.inf), axis=0)
    rank = np.ceil(np.round((count + 1) * coverage, 9)).astype(np.int64)
    enough = rank <= count
    place = np.where(enough, rank - 1, 0)[None]
    if not ordered.shape[0]:
        return np.full(count.shape, np.inf), count
    return np.where(enough, np.take_along_axis(ordered, place, axis=0)[0], np.inf), count


def paired_levels(levels: Sequence[float]) -> list[tuple[float, int, int]]:
    """Return (coverage, position of the low level, position of the high level) of each central interval, widest first.

    Raises:
        ConfigError: levels do not ascend within (0, 1), or one below or above 0.5 has no mirror image.
    """
    given = [float(level) for level in levels]
    if not given or any(not 0.0 < level < 1.0 for level in given) or sorted(set(given)) != given:
        raise ConfigError(f"quantile levels must ascend within (0, 1), given: {listing(given, 20)}")
    alone = [a for a in given if not any(abs(a + b - 1.0) < 1e-9 for b in given)]
    if alone:
        raise ConfigError(
            f"quantile level(s) {listing(alone)} have no mirror image (0.1 goes with 0.9); "
            "a calibrated interval needs both bounds"
        )
    half = len(given) // 2
    return [(round(given[-1 - i] - given[i], 9), i, len(given) - 1 - i) for i in range(half)]


def interval_scores(
    target: FloatArray, mean: FloatArray, quantiles: FloatArray | None, levels: Sequence[float], scale: FloatArray
) -> FloatArray:
    """Return the conformity score of every cell and central interval, in units of ``scale``.

    Shapes:
        target, mean [N, H, V], quantiles [N, H, V, Q] or None (absolute score), scale [N, V] -> [N, H, V, P].
    """
    pairs = paired_levels(levels)
    unit = scale[:, None, :, None]
    if quantiles is None:
        return np.repeat(np.abs(target - mean)[..., None], len(pairs), axis=-1) / unit
    low, high = quantiles[..., [i for _, i, _ in pairs]], quantiles[..., [j for _, _, j in pairs]]
    return np.asarray(np.maximum(low - target[..., None], target[..., None] - high) / unit)


def calibration_table(
    scores: FloatArray, mask: NDArray[np.bool_], levels: Sequence[float], variates: Sequence[str], score: str
) -> pl.DataFrame:
    """Return the margins of every step, variate and central interval as a long table.

    Columns ``step, variate, level`` (nominal coverage), ``n, low`` (added to the lower bound), ``high`` (added to the
    upper bound), ``score, status`` (``ok`` or ``too_few``).

    Shapes:
        scores [N, H, V, P] from ``interval_scores``, mask [N, H, V].
    """
    steps, number = scores.shape[1], len(variates)
    tables = []
    for position, (coverage, _, _) in enumerate(paired_levels(levels)):
        margin, count = conformal_margin(scores[..., position], mask, coverage)
        tables.append(
            pl.DataFrame(
                {
                    "step": np.repeat(np.arange(1, steps + 1), number),
                    "variate": list(variates) * steps,
                    "level": np.full(steps * number, coverage),
                    "n": count.ravel(),
                    "low": -margin.ravel(),
                    "high": margin.ravel(),
                    "score": [score] * (steps * number),
                    "status": np.where(np.isfinite(margin.ravel()), "ok", "too_few").tolist(),
                }
            )
        )
    if not tables:
        return pl.DataFrame(schema=CALIBRATION_SCHEMA)
    return pl.concat(tables).select(pl.col(name).cast(kind) for name, kind in CALIBRATION_SCHEMA.items())


def calibrate(
    network: ForecastNetwork,
    windows: WindowDataset,
    levels: Sequence[float] = DEFAULT_LEVELS,
    *,
    max_windows: int = MAX_WINDOWS,
) -> pl.DataFrame:
    """Return the calibration table of a fitted network from windows it was not trained on.

    Args:
        network: the fitted network.
        windows: held-out windows, later than the training span.
        levels: quantile levels the artifact will offer, closed under mirroring at 0.5.
        max_windows: evenly spaced items of ``windows`` to use when there are more.

    Raises:
        ConfigError: levels without mirror image.
        DataError: there is no window, or none has a target.
    """
    paired_levels(levels)
    count = len(windows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, max_windows)).round().astype(np.int64))
    asked = tuple(levels) if network.likelihood.has_distribution else ()
    parts, masks = [], []
    for part in forecast_batches(network, windows, asked, indices=chosen):
        if part.target is None or part.mask is None:
            raise DataError("calibration needs windows with targets; these are for prediction only")
        parts.append(interval_scores(part.target, part.mean, part.quantiles, levels, part.scale).astype(np.float32))
        masks.append(part.mask)
    if not parts:
        raise DataError("calibration needs at least one held-out window; shorten the horizon or widen the valid span")
    score = "cqr" if asked else "absolute"
    variates = windows.panel.schema.targets
    table = calibration_table(np.concatenate(parts), np.concatenate(masks), levels, variates, score)
    short = table.filter(status="too_few")
    if short.height:
        _LOG.warning(
            "%d of %d intervals have too few held-out windows (fewest: %d) and are infinite; "
            "widen the valid span or ask for lower coverage than %g",
            short.height,
            table.height,
            short["n"].min(),
            short["level"].min(),
        )
    return table


def calibrated_levels(calibration: pl.DataFrame) -> tuple[float, ...]:
    """Return the quantile levels a calibration table can serve, ascending, 0.5 included."""
    cover = calibration["level"].unique().to_list()
    return tuple(sorted({round(0.5 + sign * c / 2.0, 9) for c in cover for sign in (-1.0, 1.0)} | {0.5}))


def apply_calibration(
    calibration: pl.DataFrame,
    mean: FloatArray,
    quantiles: FloatArray | None,
    levels: Sequence[float],
    scale: FloatArray,
    variates: Sequence[str],
) -> FloatArray:
    """Return calibrated quantiles; they never cross.

    Where margins would cross bounds, the outer one is pushed outwards: intervals only ever grow, so coverage stays.

    Args:
        calibration: table of ``calibrate``.
        mean: location, the 0.5 quantile of point networks.
        quantiles: the network's own quantiles at ``levels``; None for point networks.
        levels: ascending levels, each with its mirror image; all calibrated.
        scale: unit of each window and variate.
        variates: names along V.

    Shapes:
        mean [N, H, V], quantiles [N, H, V, Q], scale [N, V] -> [N, H, V, Q].
    Raises:
        ConfigError: a level is not calibrated, or the kind of score does not fit the quantiles given.
    """
    check_calibration(calibration, levels, has_quantiles=quantiles is not None)
    steps = mean.shape[1]
    result = np.repeat(mean[..., None], len(levels), axis=-1) if quantiles is None else np.array(quantiles)
    for coverage, below, above in paired_levels(levels):
        low, high = _margins(calibration, coverage, steps, variates)
        result[..., below] += low * scale[:, None, :]
        result[..., above] += high * scale[:, None, :]
    return nested(result)


def check_calibration(calibration: pl.DataFrame, levels: Sequence[float], *, has_quantiles: bool) -> None:
    """Check that a calibration table serves these levels for this kind of network.

    Raises:
        ConfigError: it does not; the message lists the levels it has.
    """
    known = calibrated_levels(calibration)
    unknown = [level for level in levels if not any(abs(level - other) < 1e-9 for other in known)]
    if unknown:
        raise ConfigError(
            f"quantile level(s) {listing(unknown)} are not calibrated; choose among {listing(known, 30)}, "
            "or refit with the levels wanted"
        )
    expected = "cqr" if has_quantiles else "absolute"
    found = calibration["score"].unique().to_list()
    if found and found != [expected]:
        raise ConfigError(f"the calibration holds '{found[0]}' scores, this network needs '{expected}'; refit it")


def nested(quantiles: FloatArray) -> FloatArray:
    """Return quantiles pushed outwards from the middle until none cross; symmetric level sets, shape [..., Q]."""
    number = quantiles.shape[-1]
    half = number // 2
    result = np.array(quantiles)
    if not half:
        return result
    low, high = result[..., half - 1], result[..., number - half]
    if number % 2:
        middle_low = middle_high = result[..., half]
    else:  # without a median only an inverted innermost interval needs a middle
        with np.errstate(invalid="ignore"):
            middle = (low + high) / 2.0
        middle_low, middle_high = np.where(low > high, middle, low), np.where(low > high, middle, high)
    result[..., half - 1] = np.minimum(low, middle_low)
    result[..., number - half] = np.maximum(high, middle_high)
    result[..., :half] = np.minimum.accumulate(result[..., :half][..., ::-1], axis=-1)[..., ::-1]
    result[..., number - half :] = np.maximum.accumulate(result[..., number - half :], axis=-1)
    return result


def _margins(
    calibration: pl.DataFrame, coverage: float, steps: int, variates: Sequence[str]
) -> tuple[FloatArray, FloatArray]:
    order = pl.DataFrame({"variate": list(variates), "place": range(len(variates))})
    rows = (
        calibration.filter((pl.col("level") - coverage).abs() < 1e-9, pl.col("step") <= steps)
        .join(order, on="variate")
        .sort("step", "place")
    )
    if rows.height != steps * len(variates):
        raise DataError(
            f"the calibration has {rows.height} margins of coverage {coverage:g} for {steps} steps and "
            f"{len(variates)} variates; the artifact does not belong to this network"
        )
    shape = (steps, len(variates))
    return rows["low"].to_numpy().reshape(shape), rows["high"].to_numpy().reshape(shape)
