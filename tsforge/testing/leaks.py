"""Does a fit see the future? Public helper for anybody's own fit in a rolling backtest.

A backtest hands a fit the frame cut off at its cutoff, but a fit is a closure: it may also hold the whole frame, or a
statistic of it. So the future is changed behind everybody's back: in the frame object itself, wherever it is held. Then
every forecast made before the change must stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

import numpy as np
import polars as pl

from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import show_time
from tsforge.forecasting.backtest import BacktestConfig, Fit, backtest
from tsforge.forecasting.report import BacktestReport

_STRENGTH = 10.0  # standard deviations: a peek cannot be lost in rounding


def assert_no_future_leak(
    fit: Fit | Mapping[str, Fit],
    frame: SeriesFrame,
    config: BacktestConfig | None = None,
    *,
    horizon: int,
    seed: int = 0,
) -> None:
    """Assert that no forecast and no regime label of a backtest rests on anything after its cutoff.

    The backtest runs on the data as it is and again for the first, the middle and the last cutoff with everything after
    that cutoff replaced: noise is added to targets and past covariates and a tenth of them goes missing; known
    covariates get noise after the last row that a forecast covers. What was made at that cutoff or before must stay.

    Args:
        fit, frame, config, horizon: as for ``backtest``. Let the fit take the data from the frame it is given; if it
            holds ``frame`` itself, it is found out, because the object is changed in place (and put back). Data that it
            reads elsewhere (a file, a database, a copy made before) cannot be changed from here.
        seed: of the noise.

    Raises:
        AssertionError: something changed; the message says what, for which model and cutoff. Also when two runs on the
            same data differ: a fit must be reproducible to be tested.
        DataError: nothing follows the cutoffs.
    """
    config = config or BacktestConfig()
    first = backtest(fit, frame, config, horizon=horizon)
    _assert_equal(first, backtest(fit, frame, config, horizon=horizon), None, "the same data twice")
    cutoffs = first.forecasts["cutoff"].unique().sort()
    for place in sorted({0, len(cutoffs) // 2, len(cutoffs) - 1}):
        cutoff = cutoffs[place]
        reach = first.forecasts.filter(pl.col("cutoff") <= cutoff)["time"].max()
        with _changed_after(frame, cutoff, reach, seed):
            found = backtest(fit, frame, config, horizon=horizon)
        _assert_equal(first, found, cutoff, f"the data after {show_time(cutoff)} changed")


@contextmanager
def _changed_after(frame: SeriesFrame, cutoff: datetime | int, reach: object, seed: int) -> Iterator[None]:
    """Replace what follows a cutoff in the very object that others may hold; put it back in the end."""
    table, later = frame.table, pl.col("time") > pl.lit(cutoff)
    count = int(table.select(later.sum()).item())
    if not count:
        raise DataError(f"no row follows the cutoff {show_time(cutoff)}; there is no future to change")
    rng = np.random.default_rng(seed)
    changes = []
    for name in frame.schema.columns:
        known = name in frame.schema.known
        spread = table.select(pl.col(name).std().fill_null(0.0)).item()
        size = _STRENGTH * (float(spread) or 1.0)
        noise = pl.Series(rng.normal(0.0, size, table.height))
        where = pl.col("time") > pl.lit(reach) if known else later
        changed = pl.col(name) + noise
        if not known:
            lost = pl.Series(rng.random(table.height) < 0.1)
            changed = pl.when(~lost).then(changed)
        changes.append(pl.when(where).then(changed).otherwise(pl.col(name)).alias(name))
    kept = frame._table
    frame._table = table.with_columns(changes)
    try:
        yield
    finally:
        frame._table = kept


def _assert_equal(before: BacktestReport, after: BacktestReport, cutoff: datetime | int | None, why: str) -> None:
    """Compare what was made at a cutoff or earlier (at any, without one)."""
    for what in ("forecasts", "regime_labels"):
        one, other = (_made_until(getattr(report, what), cutoff) for report in (before, after))
        if one.equals(other):
            continue
        for model in one["model"].unique(maintain_order=True) if "model" in one.columns else (None,):
            ours, theirs = (part if model is None else part.filter(model=model) for part in (one, other))
            if not ours.equals(theirs):
                whose = "regime labels" if model is None else f"forecasts of '{model}'"
                raise AssertionError(f"{why}: {whose} change {_where(ours, theirs)}")


def _made_until(table: pl.DataFrame, cutoff: datetime | int | None) -> pl.DataFrame:
    kept = table.drop("actual", strict=False)
    return kept if cutoff is None else kept.filter(pl.col("cutoff") <= pl.lit(cutoff))


def _where(ours: pl.DataFrame, theirs: pl.DataFrame) -> str:
    if ours.height != theirs.height:
        return f"in number, from {ours.height} to {theirs.height} rows"
    different = pl.any_horizontal(
        (~ours[name].eq_missing(theirs[name])).alias(name) for name in ours.columns if name in theirs.columns
    )
    rows = ours.filter(different)
    if not rows.height:
        return "in their columns"
    return f"at {rows['cutoff'].n_unique()} cutoff(s), first at {show_time(rows['cutoff'].min())} ({rows.height} rows)"
