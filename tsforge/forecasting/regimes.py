"""Regimes: labels of windows and rows by which the errors of a backtest are broken down.

``volatility`` and ``level`` compare the last rows before a cutoff with the earlier history of the same series and
variate: blocks of ``rows`` rows are counted back from the cutoff, and the standard deviation (or mean) of the newest
block is ``low``, ``middle`` or ``high`` by the terciles of the earlier blocks. Nothing after the cutoff is read,
because the frame that comes in ends there, and no unit is needed, because a series is compared with itself. ``hour``,
``weekday`` and ``month`` are the calendar (UTC) of the row that is forecast, known long before. A user's column gives
its last value up to the cutoff.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.core.errors import ConfigError, listing, nearest
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.panel import Panel
from tsforge.metrics.point import FloatArray
from tsforge.metrics.summary import summarise

Regime = Literal["volatility", "level", "hour", "weekday", "month"]
HISTORY: tuple[Regime, ...] = ("volatility", "level")
CALENDAR: tuple[Regime, ...] = ("hour", "weekday", "month")
UNKNOWN = "unknown"
LABEL_SCHEMA = {"series_id": pl.String, "variate": pl.String, "kind": pl.String, "regime": pl.String}
_TERCILES = ("low", "middle", "high")
_LEAST_BLOCKS = 3  # of earlier history; fewer have no terciles
_MOST_CODES = 24
_ORDER: dict[str, list[str]] = {
    **{kind: [*_TERCILES, UNKNOWN] for kind in HISTORY},
    "hour": [f"{hour:02d}" for hour in range(24)],
    "weekday": ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"],
    "month": ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"],
}


def check_regimes(frame: SeriesFrame, kinds: Sequence[Regime], column: str | None) -> None:
    """Check that the frame can give these labels.

    Raises:
        ConfigError: calendar labels of integer time, or no such column.
    """
    calendar = [kind for kind in kinds if kind in CALENDAR]
    if calendar and frame.schema.has_integer_time:
        raise ConfigError(f"regimes {listing(calendar)} need dates; this data has integer time")
    known = (*frame.schema.columns, *frame.schema.static)
    if column is not None and column not in known:
        raise ConfigError(
            f"regime_column '{column}' is no column of the data{nearest(column, known)} (known: {listing(known, 20)})"
        )


def block_rows(season: int, steps: int) -> int:
    """Return the rows of a block: whole seasons, at least as many rows as are forecast, at least 8."""
    return season * -(-max(steps, 8) // season)


def window_labels(
    visible: SeriesFrame, cutoff: TimeLike, kinds: Sequence[Regime], *, rows: int, column: str | None = None
) -> pl.DataFrame:
    """Return ``series_id, variate, kind, regime`` of every series at one cutoff, for the kinds that history decides.

    Args:
        visible: what is known at the cutoff; it ends there.
        cutoff: the time of the last visible row.
        kinds: those of the calendar are left out, they belong to rows (``regime_table``).
        rows: length of a block.
        column: a column of codes; its kind is its name.

    A newest block that is less than half observed, fewer than 3 such blocks before it, or a column without a value is
    ``unknown``.
    """
    panel = Panel.from_frame(visible)
    last = int(panel.grid.index_of(pl.Series([cutoff], dtype=visible.table["time"].dtype))[0])
    parts = [pl.DataFrame(schema=LABEL_SCHEMA)]
    wanted = [kind for kind in kinds if kind in HISTORY]
    if wanted:
        means, deviations = _blocks(panel, last, rows)
        for kind in wanted:
            parts.append(_named(panel, kind, _terciles(deviations if kind == "volatility" else means)))
    if column is not None:
        parts.append(_named(panel, column, _codes(visible, column, panel.num_targets)))
    return pl.concat(parts)


def regime_table(
    cells: pl.DataFrame, labels: pl.DataFrame, kinds: Sequence[Regime], column: str | None = None
) -> pl.DataFrame:
    """Return the metrics of one model in every regime: ``kind, regime, count, mse, mae ...``.

    Args:
        cells: of ``metrics.summary.score_cells``.
        labels: ``series_id, variate, cutoff, kind, regime`` of all cutoffs.
        kinds, column: as in ``window_labels``.

    Raises:
        ConfigError: the column holds more than 24 different codes.
    """
    parts = []
    for kind in (*kinds, *([] if column is None else [column])):
        if kind in CALENDAR and kind != column:
            place = {"hour": pl.col("time").dt.hour(), "weekday": pl.col("time").dt.weekday() - 1}.get(
                kind, pl.col("time").dt.month() - 1
            )
            names = pl.Series(_ORDER[kind])
            labelled = cells.with_columns(names.gather(cells.select(place).to_series()).alias("regime"))
        else:
            own = labels.filter(kind=kind).drop("kind")
            labelled = cells.join(own, on=["series_id", "variate", "cutoff"], how="left")
        wide = summarise(labelled.with_columns(pl.col("regime").fill_null(UNKNOWN)), ["regime"])
        if kind == column and wide.height > _MOST_CODES:
            raise ConfigError(
                f"regime_column '{column}' has {wide.height} different values at the cutoffs, more than "
                f"{_MOST_CODES} make no sense; give it a few codes"
            )
        order = _ORDER.get(kind) or sorted(wide["regime"], key=lambda code: (code == UNKNOWN, _number(code)))
        place = pl.col("regime").replace_strict(order, range(len(order)), return_dtype=pl.Int64)
        parts.append(wide.sort(place).select(pl.lit(kind).alias("kind"), pl.all()))
    return pl.concat(parts, how="diagonal") if parts else pl.DataFrame(schema={"kind": pl.String, "regime": pl.String})


def _blocks(panel: Panel, last: int, rows: int) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard deviation [series, variate, block] of blocks counted back from ``last``, newest first.

    NaN where less than half of a block was observed, or a series does not reach.
    """
    lengths = panel.lengths
    series = np.repeat(np.arange(panel.num_series), lengths)
    row = np.arange(panel.num_rows) - np.repeat(panel.indptr[:-1], lengths) + np.repeat(panel.offset, lengths)
    block = (last - row) // rows
    number = int(block.max(initial=0)) + 1
    key, size = series * number + block, panel.num_series * number
    shape = (panel.num_series, panel.num_targets, number)
    means, deviations = np.empty(shape), np.empty(shape)
    for variate in range(panel.num_targets):
        seen = panel.observed[:, variate].astype(np.float64)
        values = panel.values[:, variate]
        count = np.bincount(key, seen, size)
        enough = count >= max(2.0, rows / 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.bincount(key, values * seen, size) / count
            square = np.bincount(key, np.square(np.where(seen > 0, values - mean[key], 0.0)), size) / count
            spread = np.sqrt(square)
            spread = np.where(spread > 1e-9 * np.abs(mean), spread, 0.0)  # a constant has no rounding noise
        means[:, variate] = np.where(enough, mean, np.nan).reshape(-1, number)
        deviations[:, variate] = np.where(enough, spread, np.nan).reshape(-1, number)
    return means, deviations


def _terciles(blocks: FloatArray) -> NDArray[np.str_]:
    """Return the labels [series, variate] of the newest block by the terciles of all earlier ones."""
    newest, earlier = blocks[..., 0], np.sort(blocks[..., 1:], axis=-1)  # NaN last
    count = (~np.isnan(earlier)).sum(axis=-1)
    known = (count >= _LEAST_BLOCKS) & ~np.isnan(newest)
    if not known.any():
        return np.full(newest.shape, UNKNOWN)
    low, high = (_quantile(earlier, count, share) for share in (1 / 3, 2 / 3))
    slack = 1e-9 * (np.abs(low) + np.abs(high))  # rounding is no regime
    label = np.where(newest < low - slack, _TERCILES[0], np.where(newest > high + slack, _TERCILES[2], _TERCILES[1]))
    return np.where(known, label, UNKNOWN)


def _quantile(ordered: FloatArray, count: NDArray[np.int64], share: float) -> FloatArray:
    """Return the quantile of the first ``count`` of each row of ordered values, interpolated between neighbours."""
    place = np.maximum(count - 1, 0) * share
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low, high = (np.take_along_axis(ordered, index[..., None], axis=-1)[..., 0] for index in (below, above))
    return np.asarray(low + (place - below) * (high - low))


def _codes(visible: SeriesFrame, column: str, variates: int) -> NDArray[np.str_]:
    """Return the last value of a column as text [series, variate]."""
    if column in visible.schema.static and visible.static is not None:
        found = visible.static[column]
    else:
        last = pl.col(column).drop_nulls().last()
        found = visible.table.group_by("series_id", maintain_order=True).agg(last)[column]
    text = [UNKNOWN if value is None else _text(value) for value in found.to_list()]
    return np.repeat(np.array(text)[:, None], variates, axis=1)


def _text(code: float) -> str:
    """Return all digits of a code: two dates or long numbers must not become one regime."""
    return str(int(code)) if float(code).is_integer() else repr(code)


def _named(panel: Panel, kind: str, labels: NDArray[np.str_]) -> pl.DataFrame:
    number = panel.num_targets
    return pl.DataFrame(
        {
            "series_id": np.repeat(np.array(panel.series_ids), number),
            "variate": list(panel.schema.targets) * panel.num_series,
            "kind": kind,
            "regime": labels.ravel().tolist(),
        },
        schema=LABEL_SCHEMA,
    )


def _number(code: str) -> float:
    return np.inf if code == UNKNOWN else float(code)
