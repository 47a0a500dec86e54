"""New rows of a stream that are plainly right, as arrays in a fraction of a millisecond.

``forecasting.stream_rows.collect_rows`` checks everything and explains every fault, in some milliseconds a table. Here
the same rows come out of a handful of array operations; anything out of the ordinary gives None, and the caller lets
``collect_rows`` decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from tsforge.data.grid import TimeGrid
from tsforge.forecasting.stream_rows import MAX_GAP, NewRows, StreamPlace
from tsforge.forecasting.window_forecasts import FloatArray

Ints = NDArray[np.int64]
_FLOATS = (pl.Float64, pl.Float32)
_UNITS = ("us", "ms")
_FEW = 32
_LARGEST = float(np.finfo(np.float32).max)


def plain_rows(rows: pl.DataFrame, place: StreamPlace, judged: pl.DataFrame | None) -> NewRows | None:
    """Return new rows as ``collect_rows`` does, None where that has to look.

    Plain are: independent series without known covariates on a grid of equal steps, text ids, times of the grid after
    the last row of their series in order, numbers of one kind without infinities; judged rows of the same times.

    Args:
        rows, judged: as in ``collect_rows``.
        place: where the stream stands.
    """
    if place.shared_clock or place.ahead is not None:
        return None
    columns = place.schema.columns
    found = _cells(rows, place, columns)
    if found is None:
        return None
    series, index, cells = found
    variates = len(place.schema.targets)
    seen = cells[:, :variates]
    if judged is not None:
        other = _cells(judged, place, place.schema.targets)
        if other is None or not (np.array_equal(other[0], series) and np.array_equal(other[1], index)):
            return None
        seen = other[2]
    if np.fmax.reduce(np.abs(cells), axis=None) > _LARGEST:
        return None
    step = index - place.last[series]
    follows = np.flatnonzero(series[1:] == series[:-1]) + 1
    step[follows] = index[follows] - index[follows - 1]
    if step.min() < 1 or step.max() > MAX_GAP:
        return None
    count = np.zeros(len(place.last), dtype=np.int64)
    count[series] = index - place.last[series]  # the last row of a series stays
    start = np.cumsum(count) - count
    total = int(count.sum())
    values, scored = cells.astype(np.float32), seen
    if total > len(cells):  # rows between are taken as not observed
        where = start[series] + index - place.last[series] - 1
        values = np.full((total, len(columns)), np.nan, dtype=np.float32)
        values[where] = cells
        scored = np.full((total, variates), np.nan)
        scored[where] = seen
    return NewRows(
        count=torch.from_numpy(count),
        start=torch.from_numpy(start),
        values=torch.from_numpy(values),
        known=None,
        judged=scored,
    )


def _cells(table: pl.DataFrame, place: StreamPlace, columns: Sequence[str]) -> tuple[Ints, Ints, FloatArray] | None:
    """Return series, absolute row [M] and cells [M, C] of a table whose series come one after another."""
    chosen = _columns(tuple(table.columns), tuple(columns)) if table.height else None
    if chosen is None or table["series_id"].dtype != pl.String:
        return None
    names = table["series_id"].to_list()
    try:
        series = np.array([place.series[name] for name in names], dtype=np.int64)
    except KeyError:
        return None
    if len(series) > 1 and np.diff(series).min() < 0:
        return None
    index = _index(table["time"], place.grid)
    if index is None:
        return None
    few = [chosen(record) for record in table.rows()] if table.height <= _FEW else None
    plain = few is not None and set(map(type, chain.from_iterable(few))) == {float}  # types of columns cost more
    if not plain and any(table[name].dtype not in _FLOATS for name in columns):
        return None
    if few is None:
        cells = np.empty((table.height, len(columns)))
        for column, name in enumerate(columns):
            cells[:, column] = table[name].to_numpy()
    else:  # straight from records: a table operation costs more than the whole row
        cells = np.array(few, dtype=np.float64)
    return None if np.isinf(cells).any() else (series, index, cells)


@lru_cache(maxsize=16)
def _columns(names: tuple[str, ...], wanted: tuple[str, ...]) -> Callable[[Sequence[Any]], Sequence[Any]] | None:
    """Return what picks the wanted columns out of a record; None where a column is missing."""
    if not {"series_id", "time", *wanted} <= set(names):
        return None
    first, *more = (names.index(name) for name in wanted)
    return itemgetter(first, *more) if more else itemgetter(slice(first, first + 1))


def _index(times: pl.Series, grid: TimeGrid) -> Ints | None:
    """Return the absolute row of each time, None where a time is missing, off the grid or of an unusual type."""
    kind = times.dtype
    if kind == pl.Int64 and grid.is_integer:
        return None if times.null_count() else grid.index_of_values(times.to_numpy())
    if not isinstance(kind, pl.Datetime) or grid.is_integer or kind.time_unit not in _UNITS:
        return None
    # a zone changes how a time is shown, not the instant; zone-less times count as UTC
    if times.null_count():
        return None
    return grid.index_of_values(times.to_numpy().astype("datetime64[us]").view(np.int64))
