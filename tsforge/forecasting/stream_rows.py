"""New rows of a stream: checked as a whole before anything changes, then laid out with their gaps filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, show_time
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.forecasting.window_forecasts import FloatArray

MAX_GAP = 1_000_000  # grid steps without a row: beyond it is a wrong time rather than an outage
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StreamPlace:
    """Where a stream stands.

    Attributes:
        schema, grid: of the artifact.
        series: name -> position.
        last: int64 [S], absolute row that each series has reached.
        ahead: [S, H, F] known covariates of the rows after it, NaN where not told yet; None without any.
        shared_clock: all series move together (models that couple rows).
    """

    schema: SeriesSchema
    grid: TimeGrid
    series: Mapping[str, int]
    last: Ints
    ahead: Tensor | None
    shared_clock: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Series by position."""
        return tuple(self.series)


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows to absorb, one series after another, every grid row from the one after ``last`` on.

    Shapes:
        count, start [S] int64: how many rows a series gets and where they begin; values [N, C] float32 in the order of
        ``schema.columns``, NaN where not observed; known [N + S * H, F], those of the rows and of the H rows after them
        (series s begins at ``start[s] + s * H``), None without any; judged [N, V] float64, NaN where nothing is scored.
    """

    count: Tensor
    start: Tensor
    values: Tensor
    known: Tensor | None
    judged: FloatArray

    @cached_property
    def owner(self) -> Tensor:
        """Position of the series of every row [N]."""
        return torch.from_numpy(np.repeat(np.arange(len(self.count)), self.count.numpy()))

    @cached_property
    def done(self) -> Tensor:
        """How many new rows of its series come before each row [N]."""
        return torch.from_numpy(np.arange(len(self.values)) - self.start.numpy()[self.owner.numpy()])

    def known_from(self, series: Tensor, done: Tensor, steps: int) -> Tensor | None:
        """Return known covariates [B, steps, F] of the rows after the first ``done`` [B] new ones of ``series`` [B]."""
        if self.known is None:
            return None
        horizon = (len(self.known) - len(self.values)) // len(self.count)
        first = self.start[series] + series * horizon + done
        return self.known[first[:, None] + torch.arange(steps)]

    def turns(self) -> Iterator[NewRows]:
        """Yield the first row of every series that has one, then the second ones, and so on, each as new rows.

        Later rows tell an earlier turn nothing but known covariates, as a table of these would.
        """
        total, start = self.count.numpy(), self.start.numpy()
        horizon = 0 if self.known is None else (len(self.known) - len(self.values)) // len(total)
        for turn in range(int(total.max(initial=0))):
            count = (total > turn).astype(np.int64)
            rows = torch.from_numpy(start[count > 0] + turn)
            known = self.known
            if known is not None:
                first = start + np.arange(len(total)) * horizon + np.minimum(turn, total)
                size = horizon + count
                place = np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())
                known = known[torch.from_numpy(place)]
            yield NewRows(
                count=torch.from_numpy(count),
                start=torch.from_numpy(np.cumsum(count) - count),
                values=self.values[rows],
                known=known,
                judged=self.judged[rows.numpy()],
            )


def collect_rows(
    rows: pl.DataFrame,
    place: StreamPlace,
    *,
    known: pl.DataFrame | None = None,
    judged: pl.DataFrame | None = None,
) -> NewRows:
    """Return new rows after every check; the stream is not touched.

    Args:
        rows: ``series_id, time`` and all columns of the schema; null = not observed.
        place: where the stream stands.
        known: known covariates of later rows; those beyond the horizon are left out.
        judged: targets to score instead of those in ``rows`` (which may be masked for the model).

    Raises:
        DataError: columns missing or not numeric, unknown series, times off the grid, twice, or not after the last row
            of their series, infinite or huge values, a gap that only a wrong time explains; nothing was changed.
    """
    schema = replace(place.schema, static=())
    panel = _panel(rows, schema, place, "new rows")
    count = _counts(rows, panel, place)
    start = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.int64)
    width, variates = len(schema.columns), len(schema.targets)
    values = torch.full((int(count.sum()), width), torch.nan)
    if panel is not None:
        values[torch.from_numpy(_places(panel, place, start))] = _cells(panel)
    ahead = None if place.ahead is None else _known_rows(known, values, place, count, start)
    if ahead is not None:
        own = _known_index(count, place)
        values[:, width - ahead.shape[1] :] = ahead[own]
    return NewRows(
        count=torch.from_numpy(count),
        start=torch.from_numpy(start),
        values=values,
        known=ahead,
        judged=_judged(judged, panel, place, count, start, variates),
    )


def _panel(
    table: pl.DataFrame, schema: SeriesSchema, place: StreamPlace, what: str, *, for_network: bool = True
) -> Panel | None:
    """Return checked rows on the artifact's grid, None when there is none."""
    missing = [name for name in ("series_id", "time", *schema.columns) if name not in table.columns]
    if missing:
        hint = nearest(missing[0], table.columns)
        raise DataError(f"the {what} lack column(s) {listing(missing)}{hint} (they have {listing(table.columns, 20)})")
    if not table.height:
        return None
    place.grid.index_of(table["time"])  # against the artifact's own origin: rows alone only show their own phase
    ids = table["series_id"].cast(pl.String)
    strangers = [name for name in ids.drop_nulls().unique(maintain_order=True) if name not in place.series]
    if strangers:
        count = int(ids.is_in(strangers).sum())
        raise DataError(
            f"{count} of {table.height} {what} belong to {len(strangers)} series that are not in the stream "
            f"({listing(strangers)}{nearest(strangers[0], place.names)}); leave them out, or add them with a history"
        )
    panel = Panel.from_frame(SeriesFrame(table, schema, require_targets=False), grid=place.grid)
    if for_network:
        panel.resident()  # refuses values that single precision cannot hold
    return panel


def _numbers(panel: Panel, place: StreamPlace) -> Ints:
    return np.array([place.series[name] for name in panel.series_ids], dtype=np.int64)


def _rows_of(panel: Panel) -> tuple[Ints, Ints]:
    """Return for every panel row the series of the panel and the absolute grid row, both [M]."""
    owner = np.repeat(np.arange(panel.num_series), panel.lengths)
    return owner, panel.offset[owner] + np.arange(panel.num_rows) - panel.indptr[owner]


def _places(panel: Panel, place: StreamPlace, start: Ints) -> Ints:
    """Return where every panel row goes among the new rows."""
    owner, index = _rows_of(panel)
    series = _numbers(panel, place)[owner]
    places: Ints = start[series] + index - place.last[series] - 1
    return places


def _cells(panel: Panel) -> Tensor:
    """Return all columns [M, C] in single precision, as windows hold them; NaN where not observed."""
    data = panel.resident()
    parts = [torch.where(data.mask, data.target, torch.nan), data.past, data.known]
    return torch.cat([part for part in parts if part is not None], dim=1)


def _counts(rows: pl.DataFrame, panel: Panel | None, place: StreamPlace) -> Ints:
    """Return how many rows each series advances [S], after the check that every row is new."""
    count = np.zeros(len(place.last), dtype=np.int64)
    if panel is None:
        return count
    series = _numbers(panel, place)
    if (panel.offset <= place.last[series]).any():
        _raise_late(rows, place)
    gap = panel.offset - place.last[series] - 1
    widest = int(gap.argmax())
    if gap[widest] > MAX_GAP:
        time = show_time(place.grid.time_at(int(panel.offset[widest])))
        raise DataError(
            f"the first new row of '{panel.series_ids[widest]}' ({time}) comes {gap[widest]} steps of {place.grid.freq}"
            f" after its last row; more than {MAX_GAP} are taken for a wrong time: correct it, or start the stream anew"
        )
    count[series] = panel.offset + panel.lengths - 1 - place.last[series]
    return np.full_like(count, count.max()) if place.shared_clock else count


def _raise_late(rows: pl.DataFrame, place: StreamPlace) -> NoReturn:
    ids = rows["series_id"].cast(pl.String).to_list()
    last = place.last[[place.series[name] for name in ids]]
    late = np.flatnonzero(place.grid.index_of(rows["time"]) <= last)
    first = int(late[0])
    reached = show_time(place.grid.time_at(int(last[first])))
    clock = "the last row of the stream" if place.shared_clock else "the last row of their series"
    raise DataError(
        f"{len(late)} of {rows.height} new rows do not come after {clock} (first: '{ids[first]}' at "
        f"{show_time(rows['time'][first])}, already at {reached}); a stream takes every row once, in time order: leave "
        "them out, or start the stream anew to take in corrections"
    )


def _known_rows(known: pl.DataFrame | None, values: Tensor, place: StreamPlace, count: Ints, start: Ints) -> Tensor:
    """Return known covariates of the new rows and the H after them: as told before, by ``known``, by the rows."""
    assert place.ahead is not None  # asked for by the caller only then
    total, horizon, width = place.ahead.shape
    result = torch.full((len(values) + total * horizon, width), torch.nan)
    first = torch.from_numpy(start) + torch.arange(total) * horizon
    result[first[:, None] + torch.arange(horizon)] = place.ahead
    for entry, cells in _known_cells(known, place, count + horizon):
        target = first[entry[0]] + entry[1]
        result[target] = torch.where(torch.isnan(cells), result[target], cells)
    own = values[:, values.shape[1] - width :]
    target = _known_index(count, place)
    result[target] = torch.where(torch.isnan(own), result[target], own)
    return result


def _known_index(count: Ints, place: StreamPlace) -> Tensor:
    """Return where each new row [N] stands among the known rows, in which every series has H more."""
    horizon = 0 if place.ahead is None else place.ahead.shape[1]
    return torch.arange(int(count.sum())) + torch.repeat_interleave(torch.from_numpy(count)) * horizon


def _known_cells(
    known: pl.DataFrame | None, place: StreamPlace, reach: Ints
) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Return series, row after ``last`` (from 0) and cells of the known rows within ``reach`` [S]; no or one item."""
    if known is None:
        return []
    panel = _panel(known, SeriesSchema(targets=place.schema.known, freq=place.schema.freq), place, "known rows")
    if panel is None:
        return []
    owner, index = _rows_of(panel)
    series = _numbers(panel, place)[owner]
    step = index - place.last[series] - 1
    inside = (step >= 0) & (step < reach[series])
    return [((torch.from_numpy(series[inside]), torch.from_numpy(step[inside])), _cells(panel)[inside])]


def overlay_known(known: pl.DataFrame | None, place: StreamPlace) -> Tensor | None:
    """Return known covariates [S, H, F] of the rows after the last ones, with those of ``known`` where it has any."""
    if place.ahead is None:
        return None
    result = place.ahead.clone()
    for entry, cells in _known_cells(known, place, np.full(len(place.last), result.shape[1])):
        result[entry] = torch.where(torch.isnan(cells), result[entry], cells)
    return result


def _judged(
    judged: pl.DataFrame | None, panel: Panel | None, place: StreamPlace, count: Ints, start: Ints, variates: int
) -> FloatArray:
    """Return the values to score [N, V] in double precision."""
    result = np.full((int(count.sum()), variates), np.nan)
    source: Any = panel
    if judged is not None:
        schema = SeriesSchema(targets=place.schema.targets, freq=place.schema.freq)
        source = _panel(judged, schema, place, "rows to judge", for_network=False)
    if source is None:
        return result
    owner, index = _rows_of(source)
    series = _numbers(source, place)[owner]
    inside = (index > place.last[series]) & (index <= place.last[series] + count[series])
    cells = np.where(source.target_observed, source.values[:, :variates], np.nan)
    result[_places(source, place, start)[inside]] = cells[inside]
    return result
