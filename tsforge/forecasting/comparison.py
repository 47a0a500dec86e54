"""Which differences between the models of a backtest are more than chance: every model against two of them.

Losses are mean absolute errors of a window, averaged over variates, in the unit of MASE where one is defined, so that
no large series decides alone. Diebold-Mariano runs over cutoffs (``metrics.significance.panel_diebold_mariano``),
Wilcoxon
over units that are independent of each other: the series, where there are at least 6 of them (fewer cannot reach 5 %),
else the cutoffs, joined into blocks whose forecasts share no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from tsforge.metrics.point import FloatArray
from tsforge.metrics.ranking import critical_difference, friedman, mean_ranks
from tsforge.metrics.significance import holm, panel_diebold_mariano, wilcoxon

KEYS = ("series_id", "variate", "cutoff")
LEAST_UNITS = 6  # the smallest two-sided p-value of 5 signed ranks is 2 / 2^5
TESTS_SCHEMA: dict[str, type[pl.DataType]] = {
    "against": pl.String,
    "model": pl.String,
    "difference": pl.Float64,
    "dm_statistic": pl.Float64,
    "dm_p": pl.Float64,
    "dm_p_holm": pl.Float64,
    "dm_kernel": pl.String,
    "dm_lags": pl.Int64,
    "cutoffs": pl.Int64,
    "wilcoxon_p": pl.Float64,
    "wilcoxon_p_holm": pl.Float64,
    "units": pl.Int64,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tests between models, and what they rest on.

    Attributes:
        tests: one row a pair, ``against`` first the reference, then the best model: ``difference`` of mean losses
            (negative: ``model`` is better), statistics, p-values as they are and adjusted (Holm) over the models that
            were held against the same one. Null where undecidable.
        facts: ``loss, unit, units, cutoffs_sharing_rows`` and ``ranks``: mean rank of each model over the units, the
            p-value of Friedman's test that all rank alike, and the critical difference (Nemenyi, 5 %) from 3 models on.
    """

    tests: pl.DataFrame
    facts: Mapping[str, Any]


def common_windows(forecasts: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the forecasts of windows that every model has, and a note about the others."""
    windows = forecasts.select("model", "series_id", "cutoff").unique()
    number = windows["model"].n_unique()
    shared = windows.group_by("series_id", "cutoff").len().filter(pl.col("len") == number).drop("len")
    common = forecasts.join(shared, on=["series_id", "cutoff"], how="semi", maintain_order="left")
    total = windows.select("series_id", "cutoff").unique().height
    if shared.height == total:
        return common, []
    return common, [f"{total - shared.height} of {total} windows are not graded: some model had too little history"]


def window_losses(cells: pl.DataFrame, *, scaled: bool) -> pl.DataFrame:
    """Return ``series_id, variate, cutoff, loss``: the mean error of each window; without unit, no row."""
    name = "scaled" if scaled else "absolute"
    return cells.group_by(*KEYS).agg(pl.col(name).mean().alias("loss")).drop_nulls("loss")


def compare(losses: Mapping[str, pl.DataFrame], reference: str, best: str, *, loss: str, overlap: int) -> Comparison:
    """Return all tests of the models of a backtest.

    Args:
        losses: ``window_losses`` of each model.
        reference: what skill is measured against.
        best: the model to hold every other against.
        loss: what the losses are, for the record.
        overlap: cutoffs in a row whose forecasts share rows; 1 when a horizon ends before the next begins.
    """
    models = list(losses)
    panel = _panel(losses, models)  # [models, series, cutoffs]
    units, unit = _units(panel, overlap)
    parts = [
        _against(panel, units, models, other, overlap) for other in dict.fromkeys((reference, best)) if len(models) > 1
    ]
    ranks = {name: float(rank) for name, rank in zip(models, mean_ranks(units), strict=True)}
    known = int((~np.isnan(units).any(axis=1)).sum())
    several = len(models) >= 3 and known >= 2
    facts = {
        "loss": loss,
        "unit": unit,
        "units": known,
        "cutoffs_sharing_rows": overlap,
        "ranks": {
            "mean_rank": ranks,
            "friedman_p": _known(friedman(units).p_value) if several else None,
            "critical_difference": critical_difference(len(models), known) if several else None,
        },
    }
    return Comparison(tests=pl.concat(parts) if parts else pl.DataFrame(schema=TESTS_SCHEMA), facts=facts)


def _panel(losses: Mapping[str, pl.DataFrame], models: Sequence[str]) -> FloatArray:
    """Return losses [models, series, cutoffs in time order], means over variates; NaN where a model has none."""
    table: pl.DataFrame | None = None
    for name in models:
        part = losses[name].rename({"loss": name})
        table = part if table is None else table.join(part, on=list(KEYS))  # the same variates for every model
    if table is None:
        return np.full((0, 0, 0), np.nan)
    table = table.group_by("series_id", "cutoff").agg(pl.col(name).mean() for name in models)
    series = table["series_id"].rank("dense").cast(pl.Int64).to_numpy() - 1
    cutoffs = table["cutoff"].rank("dense").cast(pl.Int64).to_numpy() - 1
    panel = np.full((len(models), table["series_id"].n_unique(), table["cutoff"].n_unique()), np.nan)
    panel[:, series, cutoffs] = table.select(models).to_numpy().T
    return panel


def _units(panel: FloatArray, overlap: int) -> tuple[FloatArray, str]:
    """Return losses [units, models] of what is independent of each other, and what that is."""
    shared = np.where(np.isnan(panel).any(axis=0), np.nan, panel)  # a window counts for all models or for none
    if panel.shape[1] >= LEAST_UNITS:
        return _mean(shared, axis=2).T, "series"
    by_cutoff = _mean(shared, axis=1)  # [models, cutoffs]
    blocks = [by_cutoff[:, start : start + overlap] for start in range(0, by_cutoff.shape[1], overlap)]
    return np.array([_mean(block, axis=1) for block in blocks]).reshape(-1, len(panel)), "cutoff"


def _mean(values: FloatArray, axis: int) -> FloatArray:
    """Return the mean over what is there, NaN where nothing is."""
    seen = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(seen, values, 0.0).sum(axis=axis) / seen.sum(axis=axis))


def _against(panel: FloatArray, units: FloatArray, models: Sequence[str], other: str, overlap: int) -> pl.DataFrame:
    place = models.index(other)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(models):
        if index == place:
            continue
        found = panel_diebold_mariano(panel[index], panel[place], min(overlap, max(panel.shape[2] - 1, 1)))
        ranked = wilcoxon(units[:, index], units[:, place])
        rows.append(
            {
                "against": other,
                "model": name,
                "difference": found.difference,
                "dm_statistic": found.statistic,
                "dm_p": found.p_value,
                "dm_kernel": found.kernel,
                "dm_lags": found.lags,
                "cutoffs": found.count,
                "wilcoxon_p": ranked.p_value,
                "units": ranked.count,
            }
        )
    adjusted = {f"{name}_holm": holm([row[name] for row in rows]) for name in ("dm_p", "wilcoxon_p")}
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.Series(n, v) for n, v in adjusted.items())
    return table.select(pl.col(name).cast(kind) for name, kind in TESTS_SCHEMA.items()).fill_nan(None)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
