"""Comparing forecasters over many series: skill against a baseline, mean ranks and what tells them apart.

A table of losses has one row a series (or data set, or cutoff) and one column a model; smaller is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError
from tsforge.metrics.point import FloatArray
from tsforge.metrics.significance import ROUNDING, Significance


def skill_score(loss: ArrayLike, baseline: ArrayLike) -> FloatArray:
    """Return 1 - loss / baseline: 1 is perfect, 0 equal to the baseline; NaN where the baseline is 0."""
    ours, theirs = np.asarray(loss, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(theirs > 0, 1.0 - ours / theirs, np.nan))


def better(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.bool_]:
    """Return where a loss is smaller than another by more than rounding; NaN is no better than anything."""
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(right - left > ROUNDING * np.abs(right))


def mean_ranks(losses: ArrayLike) -> FloatArray:
    """Return the mean rank of each column over the rows without missing losses; ties share their mean rank.

    Losses that differ by less than a millionth are a tie: that is rounding, not skill.

    Shapes:
        losses [rows, models] -> [models]; NaN when no row is complete.
    """
    from scipy import stats

    table = _levels(_complete(losses))
    if not table.shape[0]:
        return np.full(table.shape[1], np.nan)
    return np.asarray(stats.rankdata(table, axis=1).mean(axis=0))


def friedman(losses: ArrayLike) -> Significance:
    """Test whether all columns rank alike (Friedman); NaN with fewer than 3 columns, 2 rows, or only ties.

    Source: Demsar (2006), JMLR 7:1-30, section 3.2.2.
    """
    from scipy import stats

    table = _levels(_complete(losses))
    rows, models = table.shape
    ranks = stats.rankdata(table, axis=1)
    if models < 3 or rows < 2 or np.ptp(ranks, axis=1).max() == 0:
        return Significance(statistic=np.nan, p_value=np.nan, count=rows)
    outcome = stats.friedmanchisquare(*table.T)
    return Significance(statistic=float(outcome.statistic), p_value=float(outcome.pvalue), count=rows)


def critical_difference(num_models: int, num_rows: int, alpha: float = 0.05) -> float:
    """Return by how much two mean ranks must differ to matter (Nemenyi).

    Raises:
        DataError: fewer than 2 models, or no row.

    Source: Demsar (2006), section 3.2.2: q_alpha sqrt(k (k + 1) / (6 N)), q from the studentised range over sqrt(2).
    """
    if num_models < 2 or num_rows < 1:
        raise DataError(f"a critical difference needs 2 models and 1 row, given {num_models} and {num_rows}")
    from scipy import stats

    q = stats.studentized_range.ppf(1.0 - alpha, num_models, np.inf) / np.sqrt(2.0)
    return float(q * np.sqrt(num_models * (num_models + 1) / (6.0 * num_rows)))


def leaderboard(losses: pl.DataFrame, models: Sequence[str], baseline: str) -> pl.DataFrame:
    """Return one row a model, best mean rank first.

    Args:
        losses: one row a series, one column a model; rows with a missing loss are left out for all of them.
        models: columns to compare.
        baseline: the column skill is measured against.

    Returns:
        ``model, mean_rank, mean_loss, skill`` (of mean losses), ``win_share`` (rows ``better`` than the baseline),
        ``count``.

    Raises:
        DataError: a model or the baseline is no column.
    """
    missing = [name for name in (*models, baseline) if name not in losses.columns]
    if missing:
        raise DataError(f"no losses for {missing[0]}; the table has {losses.columns}")
    columns = [*models, *([] if baseline in models else [baseline])]
    table = _complete(losses.select(columns).to_numpy())
    reference = table[:, columns.index(baseline)]
    table = table[:, : len(models)]
    means = table.mean(axis=0) if len(table) else np.full(len(models), np.nan)
    base = float(reference.mean()) if len(table) else np.nan
    ranks = mean_ranks(table)
    rows = [
        {
            "model": name,
            "mean_rank": float(ranks[column]),
            "mean_loss": float(means[column]),
            "skill": float(skill_score(means[column], base)),
            "win_share": float(better(table[:, column], reference).mean()) if len(table) else np.nan,
            "count": len(table),
        }
        for column, name in enumerate(models)
    ]
    return pl.DataFrame(rows, schema_overrides={"count": pl.Int64}).sort("mean_rank", "model")


def _complete(losses: ArrayLike) -> FloatArray:
    table = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    return np.asarray(table[~np.isnan(table).any(axis=1)])


def _levels(table: FloatArray) -> FloatArray:
    """Return the place of each loss in its row, from 0; losses that differ by rounding only have the same."""
    order = np.argsort(table, axis=1, kind="stable")
    ordered = np.take_along_axis(table, order, axis=1)
    steps = np.zeros(table.shape)
    steps[:, 1:] = np.cumsum(better(ordered[:, :-1], ordered[:, 1:]), axis=1)
    found = np.empty_like(steps)
    np.put_along_axis(found, order, steps, axis=1)
    return found
