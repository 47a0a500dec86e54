"""From held-out windows to the calibration table of a fitted network: which windows, which scores, which margins.

Margins over all steps (status ``pooled``) rest on a handful of windows that overlap and often lie in one mood of the
series. None is smaller than what the windows that trained the network ask for, whose errors are if anything too small.
Not from the source of split conformal calibration, whose guarantee such margins lack anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.conformal import Pool, calibration_table, make_buckets
from tsforge.forecasting.conformal_buckets import BucketKind, Origins
from tsforge.forecasting.conformal_scores import (
    QUANTILE_SCORES,
    FloatArray,
    IntArray,
    ScoreArray,
    interval_scores,
    paired_levels,
)
from tsforge.forecasting.recent_errors import earlier_cutoffs, recent_errors, recent_unit
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.network import ForecastNetwork

_LOG = get_logger(__name__)

Method = Literal["auto", "absolute", "cqr", "cqr_asymmetric", "scaled", "recent"]
DEFAULT_LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MAX_WINDOWS = 2000  # evenly spaced; more overlapping windows add memory, not evidence
MAX_BUCKET_CELLS = 50_000_000  # scores kept when every bucket needs windows of its own


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How scores become margins; the fields are those of ``CalibrationConfig``."""

    method: Method = "auto"
    pool: Pool = "auto"
    bucket: BucketKind = "none"
    half_life: float | None = None


def settled_method(method: Method, network: ForecastNetwork, windows: WindowDataset) -> Method:
    """Return what ``auto`` means for a network and its held-out windows, any other method as it is.

    A distribution: ``cqr``. Points: ``recent``, and ``absolute`` for a model whose state a stream carries, which would
    have to forecast from windows again; for data that was revised; and where the held-out cutoffs span less than half
    the rows that units of recent errors look back, for these would then know little
    (``benchmarks/coverage_default.py``).
    """
    if method != "auto":
        return method
    if network.likelihood.has_distribution:
        return "cqr"
    if network.model.recurrent or windows.panel.versions is not None or not len(windows):
        return "absolute"
    reach = int(earlier_cutoffs(windows.spec.horizon)[0][-1])
    return "recent" if int(np.ptp(windows.cutoff_index)) >= reach // 2 else "absolute"


def score_kind(method: Method, *, has_distribution: bool) -> str:
    """Return the score behind a settled method for a network of points or one with a distribution.

    Raises:
        ConfigError: ``cqr`` for points.
    """
    if has_distribution:
        return method
    if method == "cqr":
        raise ConfigError(
            "calibration.method=cqr needs forecast quantiles, and this network gives points; choose absolute, or a "
            "likelihood that is a distribution"
        )
    return {"cqr_asymmetric": "asymmetric", "scaled": "scaled_volatility"}.get(method, method)


def calibrate(
    network: ForecastNetwork,
    windows: WindowDataset,
    levels: Sequence[float] = DEFAULT_LEVELS,
    *,
    max_windows: int | None = None,
    choices: Choices | None = None,
    learnt: WindowDataset | None = None,
) -> pl.DataFrame:
    """Return the calibration table of a fitted network from windows it was not trained on.

    Args:
        network: the fitted network.
        windows: held-out windows, later than the training span.
        levels: quantile levels the artifact will offer, closed under mirroring at 0.5.
        max_windows: items of ``windows`` to use when there are more: evenly spaced, with buckets drawn (even spacing
            could miss labels). Default 2,000; with buckets as many as 50 million scores allow.
        choices: score, pooling, label and recency.
        learnt: windows that trained the network.

    Raises:
        ConfigError: levels without mirror image, or a method or label that network or data do not allow.
        DataError: there is no window, or none has a target.
    """
    choices = choices or Choices()
    choices = replace(choices, method=settled_method(choices.method, network, windows))
    table = _counted(network, windows, levels, max_windows, choices)
    if learnt is not None and "pooled" in table["status"]:
        plain = Choices(method=choices.method, pool="step")
        table = _no_less(table, _counted(network, learnt, levels, None, plain))
    _tell(table)
    return table


def _no_less(table: pl.DataFrame, least: pl.DataFrame) -> pl.DataFrame:
    """Return a table whose pooled margins, also where labels fall back on them, are at least those of another."""
    keys = ["step", "variate", "level"]
    pooled = table.filter(status="pooled").select(*keys, stands_in=pl.lit(True))
    other = least.filter(pl.col("status") == "ok").select(*keys, least_low="low", least_high="high")
    both = table.join(pooled, on=keys, how="left", maintain_order="left")
    both = both.join(other, on=keys, how="left", maintain_order="left")
    touched = pl.col("stands_in") & pl.col("status").is_in(["pooled", "fallback"])
    low = pl.when(touched).then(pl.min_horizontal("low", "least_low")).otherwise("low").alias("low")
    high = pl.when(touched).then(pl.max_horizontal("high", "least_high")).otherwise("high").alias("high")
    return both.with_columns(low, high).select(table.columns)


def _counted(
    network: ForecastNetwork,
    windows: WindowDataset,
    levels: Sequence[float],
    max_windows: int | None,
    choices: Choices,
) -> pl.DataFrame:
    pairs = paired_levels(levels)
    score = score_kind(choices.method, has_distribution=network.likelihood.has_distribution)
    if score == "recent" and windows.panel.versions is not None:
        raise ConfigError(
            "calibration.method=recent reads what came of earlier forecasts, and this data was published late or "
            "revised: what was known when is not at hand there; choose another method"
        )
    asked = tuple(levels) if score in QUANTILE_SCORES else ()
    chosen = _chosen(windows, len(pairs), max_windows, bucketed=choices.bucket != "none", settled=score == "recent")
    parts, masks, places, scales = [], [], [], []
    for part in forecast_batches(network, windows, asked, indices=chosen):
        if part.target is None or part.mask is None:
            raise DataError("calibration needs windows with targets; these are for prediction only")
        if score == "recent":  # the unit needs all windows
            found = np.where(part.mask, np.abs(part.target - part.mean), 0.0)
        else:
            origins = _origins(windows, part.series_index, part.cutoff_index)
            local = origins.volatility()[:, None] if score == "scaled_volatility" else None
            found = interval_scores(
                part.target, part.mean, part.quantiles, levels, part.scale, score=score, local=local
            )
        parts.append(found.astype(np.float32))
        masks.append(part.mask)
        places.append((part.series_index, part.cutoff_index))
        scales.append(part.scale)
    if not parts:
        raise DataError("calibration needs at least one held-out window; shorten the horizon or widen the valid span")
    scores, mask = np.concatenate(parts), np.concatenate(masks)
    origins = _origins(windows, *(np.concatenate(found) for found in zip(*places, strict=True)))
    usual = None
    if score == "recent":
        usual, scores = _relative(network, windows, origins, scores, mask, np.concatenate(scales), len(pairs))
    table = calibration_table(
        scores,
        mask,
        levels,
        windows.panel.schema.targets,
        score,
        pool=choices.pool,
        weights=_recency(origins.cutoff_index, choices.half_life),
        buckets=make_buckets(choices.bucket, origins, mask.shape[1]),
    )
    if usual is not None:
        step, variate = np.indices(usual.shape)
        names = pl.Series(windows.panel.schema.targets, dtype=pl.String).gather(variate.ravel())
        keys = {"step": pl.Series(step.ravel() + 1, dtype=pl.Int32), "variate": names}
        # ``expected`` of ``recent`` scores: mean absolute error of the held-out windows, in units of a window
        extra = pl.DataFrame(keys | {"expected": usual.ravel()})
        table = table.join(extra, on=["step", "variate"], how="left", maintain_order="left")
    return table


def _relative(
    network: ForecastNetwork,
    windows: WindowDataset,
    origins: Origins,
    errors: ScoreArray,
    mask: NDArray[np.bool_],
    scale: FloatArray,
    pairs: int,
) -> tuple[FloatArray, ScoreArray]:
    """Return the usual error [H, V] in units of a window, and errors [N, H, V] over recent ones as scores [N, H, V, P].

    Only errors of the held-out span count as recent: those on rows the network was fitted on may be too small.
    """
    count = np.maximum(mask.sum(axis=0), 1)
    usual = (np.where(mask, errors, 0.0) / scale[:, None]).sum(axis=0, dtype=np.float64) / count
    total, weight = recent_errors(
        network,
        windows.panel,
        windows.spec,
        origins.series_index,
        origins.cutoff_index,
        first_row=int(windows.cutoff_index.min()),
    )
    scores = (errors / recent_unit(total, weight, usual, scale)).astype(np.float32)
    return usual, np.broadcast_to(scores[..., None], (*scores.shape, pairs))


def _chosen(windows: WindowDataset, pairs: int, most: int | None, *, bucketed: bool, settled: bool) -> IntArray:
    """Return the items to calibrate on; ``settled``: not those too early in the span to look back within it."""
    if settled:
        cutoff = windows.cutoff_index[:: windows.rows_per_item]
        reach = int(earlier_cutoffs(windows.spec.horizon)[0][-1])
        late = cutoff >= cutoff.min() + min(reach, int(np.ptp(cutoff)) // 4)
        items: IntArray = np.flatnonzero(late)
        return items[_spread(len(items), windows, pairs, most, bucketed=bucketed)]
    return _spread(len(windows), windows, pairs, most, bucketed=bucketed)


def _spread(count: int, windows: WindowDataset, pairs: int, most: int | None, *, bucketed: bool) -> IntArray:
    """Return which of so many items to take."""
    if most is None:
        cells = windows.spec.horizon * windows.panel.num_targets * max(pairs, 1) * windows.rows_per_item
        most = max(MAX_WINDOWS, MAX_BUCKET_CELLS // cells) if bucketed else MAX_WINDOWS
    if bucketed and count > most:
        return np.sort(np.random.default_rng(0).choice(count, most, replace=False))
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _origins(windows: WindowDataset, series: IntArray, cutoff: IntArray) -> Origins:
    return Origins(
        panel=windows.panel,
        series_index=series,
        cutoff_index=cutoff,
        context_length=windows.spec.context_length,
    )


def _recency(cutoff: IntArray, half_life: float | None) -> FloatArray | None:
    """Return the weight of each window: halved every ``half_life`` rows before the newest."""
    return None if half_life is None else np.exp2((cutoff - cutoff.max()) / half_life)


def _tell(table: pl.DataFrame) -> None:
    pooled = table.filter(status="pooled")
    if pooled.height:
        _LOG.warning(
            "%d of %d intervals have too few held-out windows for a margin of their step and take one over all steps, "
            "which covers on average over the horizon and the last steps less often; widen the valid span if you can",
            pooled.height,
            table.height,
        )
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
    if "bucket" in table.columns:
        split = table.filter(pl.col("bucket").is_not_null())
        fallen = split.filter(status="fallback")
        if fallen.height:
            _LOG.warning(
                "%d of %d margins by %s have too few held-out windows for their coverage and fall back to the margin "
                "over all of them (%d of %d labels: %s)",
                fallen.height,
                split.height,
                table["by"][0],
                fallen["bucket"].n_unique(),
                split["bucket"].n_unique(),
                listing(fallen["bucket"].unique().sort().to_list()),
            )
