"""Rows of the store after those taken, and the counts of stored rows that are never taken: late, changed, foreign.

A position notes what is stored up to the ends of series (see ``stream_late``), with these ends: what is more, or other,
at a later look came too late. Each look notes it anew, for the ends that its last piece leads to. A watch that dies
within a backlog goes on from the note before: then what came late into the pieces taken meanwhile passes for taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl

from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import load_dataset
from tsforge.app.stream_late import LeftOut, compared, notes, stored_times, watched
from tsforge.app.watch.intake import Intake, Portion
from tsforge.app.watch.sources import Offer
from tsforge.artifact import match_frame
from tsforge.core.errors import DataError, EmptySpanError
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore

_LOG = get_logger(__name__)
_REVISED = "revised: rows of the store changed by a batch, up to"


class StoredRows:
    """Rows of the store after the last one taken of each series. Where it goes on is known by the detector alone.

    A position has what ``notes`` returns, the ``ends`` that it belongs to, and the last grid step told of each series
    that the detector does not know (``strangers``); any other is that of an earlier version, which counted nothing.

    Args:
        workspace: whose store. dataset: which. intake: of the artifact.
    """

    def __init__(self, workspace: Workspace, dataset: str, intake: Intake) -> None:
        self._workspace = workspace
        self._dataset = dataset
        self._intake = intake
        self._store = SeriesStore(workspace.database_url)
        self._fitted = FittedData.of(intake.artifact, dataset)
        self._holds = pl.any_horizontal(pl.col(intake.schema.columns).is_not_null())
        self._left: Portion | None = None
        self._then: dict[str, Any] = {}  # position once nothing is left
        self._seen: str | None = None  # state of the data set at the last look

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return stored rows after those taken; a backlog is read once and offered in pieces."""
        portions: list[Portion] = []
        place = position
        if self._left is None:
            changed = self._store.changed(self._dataset)
            if changed == self._seen:
                return None
            self._then = position
            place, apart = self._look(position, ends)
            portions += [] if apart is None else [apart]
            self._seen = changed
        if self._left is not None:
            portions.append(self._cut(self._left, limit))
        if self._left is None:
            place = self._then
        if not portions and place == position:
            return None
        return Offer(portions=tuple(portions), position=place, what=f"data set '{self._dataset}'", divisible=False)

    def _cut(self, left: Portion, limit: int) -> Portion:
        """Return the first rows of a backlog, and keep the others."""
        table, cut = left.table, min(limit, left.table.height)
        if cut < table.height:  # rows of one time stay together
            cut = int((table["time"] <= table["time"][limit - 1]).sum())
        self._left = self._portion(table.slice(cut), left.ahead) if cut < table.height else None
        return self._portion(table.head(cut), left.ahead)

    def _look(self, position: dict[str, Any], ends: pl.DataFrame) -> tuple[dict[str, Any], Portion | None]:
        """Read what follows the rows taken; return the position before it, and rows counted that are not taken.

        Rows are counted in one snapshot after they were read: one that comes in these seconds, and before the end that
        they lead to, passes for taken.
        """
        noted = position if "ends" in position else None
        columns = watched(self._intake.artifact.schema, self._store.config(self._dataset))
        left = self._reached(self._after(ends))
        old, now, then = _times(noted["ends"] if noted else {}), stored_times(ends), self._ends_after(left, ends)
        stock = self._store.stock(
            self._dataset,
            pl.concat([old, now, then]),
            columns,
            after=noted["batch"] if noted else 0,
            only_if_news=left is None and old.equals(now),
        )
        if left is None and old.equals(now) and not stock.news:
            return position, None
        strangers: dict[str, int] = {}
        found = LeftOut()
        if noted and noted["made"] == stock.made:  # else there is nothing yet, or another data set of that name
            strangers, found = noted["strangers"], compared(noted, old, stock)
        else:
            noted = None
        foreign = self._foreign(strangers, ends)
        steps = foreign.with_columns(pl.Series("at", self._intake.artifact.grid.index_of(foreign["time"])))
        last = steps.group_by("series_id").agg(pl.col("at").max()).sort("series_id")
        strangers = {**strangers, **dict(last.iter_rows())}
        place, self._then = (
            {**notes(times, stock), "ends": dict(times.iter_rows()), "strangers": strangers} for times in (now, then)
        )
        self._left = left
        return place, self._apart(found, foreign) if noted else None

    def _apart(self, found: LeftOut, foreign: pl.DataFrame) -> Portion | None:
        """Return a portion of rows that are counted and not taken, and say which."""
        told = []
        if found.late:
            told.append(f"{found.rows_late} rows came late (rows after them were taken before)")
        if found.revised:
            told.append(f"batches changed up to {found.revised} rows that were taken")
        if told:
            _LOG.warning(
                "data set '%s': %s: not judged; start the watch anew (reset=true) to judge them",
                self._dataset,
                ", and ".join(told),
            )
        if not told and not foreign.height:
            return None
        revised = {_REVISED: found.revised} if found.revised else {}
        return Portion(table=foreign, rows_read=found.rows_late + foreign.height, late=found.rows_late, notes=revised)

    def _ends_after(self, left: Portion | None, ends: pl.DataFrame) -> pl.DataFrame:
        """Return the ends, with times as the store keeps them, once a backlog is taken."""
        if left is None:
            return stored_times(ends)
        if self._intake.artifact.network.capabilities.rows_coupled:  # all series move together
            return stored_times(ends.with_columns(pl.lit(left.table["time"].max()).alias("time")))
        reached = left.table.group_by("series_id").agg(pl.col("time").max())
        return stored_times(ends.update(reached, on="series_id"))

    def _after(self, ends: pl.DataFrame) -> pl.DataFrame:
        """Return the rows after the ends, those ahead of the last target among them, as the network reads them."""
        artifact = self._intake.artifact
        tables = []
        for names, start in self._spans(ends):
            try:
                frame = load_dataset(
                    self._workspace, self._fitted, series=names, start=start, extend=artifact.window.horizon
                )
            except EmptySpanError:
                continue
            tables.append(match_frame(artifact, frame).table)
        if not tables:
            return self._intake.nothing()
        return _later(pl.concat(tables), ends)

    def _spans(self, ends: pl.DataFrame) -> Iterator[tuple[list[str], Any]]:
        """Yield series and the time to read them from; those that stopped long ago are not read with all others."""
        if not ends.height:
            return
        artifact = self._intake.artifact
        last = artifact.grid.index_of(ends["time"])
        is_front = last > int(last.max()) - artifact.window.context_length
        for part in (is_front, ~is_front):
            if part.any():
                names = ends["series_id"].filter(pl.Series(part)).to_list()
                yield names, artifact.grid.time_at(int(last[part].min()))

    def _foreign(self, strangers: Mapping[str, int], ends: pl.DataFrame) -> pl.DataFrame:
        """Return rows of series that the detector does not know after those told; all rows of one not told of yet."""
        names = sorted(self._store.series_ids(self._dataset) - set(ends["series_id"]))
        known = [name for name in names if name in strangers]
        steps = np.array([strangers[name] for name in known], dtype=np.int64)
        marks = pl.DataFrame(
            {"series_id": pl.Series(known, dtype=pl.String), "time": self._intake.artifact.grid.time_at(steps)}
        )
        fresh = [name for name in names if name not in strangers]
        # with sums all are read: to name a series without rows is an error
        has_sums = bool(names and self._fitted.settings(self._store.config(self._dataset)).get("hierarchy"))
        tables = [self._intake.nothing()]
        for some, start in [*self._spans(marks), *([(fresh, None)] if fresh else [])]:
            try:
                frame = load_dataset(self._workspace, self._fitted, series=None if has_sums else some, start=start)
            except EmptySpanError:
                continue
            table = frame.table.select(tables[0].columns).filter(pl.col("series_id").is_in(some))
            tables.append(_later(table, marks) if start is not None else table)
        return pl.concat(tables).filter(self._holds).sort("time", "series_id")

    def _reached(self, table: pl.DataFrame) -> Portion | None:
        """Return the rows up to the last one with a target, and known covariates of those after it."""
        artifact = self._intake.artifact
        targets = pl.any_horizontal(pl.col(artifact.schema.targets).is_not_null())
        reached = table.filter(targets).group_by("series_id").agg(pl.col("time").max().alias("reached"))
        taken = table.join(reached, on="series_id").filter(pl.col("time") <= pl.col("reached")).drop("reached")
        if not taken.height:
            return None
        known = artifact.schema.known
        ahead = table.select("series_id", "time", *known) if known else None
        return self._portion(taken.sort("time", "series_id"), ahead)

    def _portion(self, table: pl.DataFrame, ahead: pl.DataFrame | None) -> Portion:
        """Return a portion; rows that fill the grid of the store count for nothing."""
        return Portion(table=table, rows_read=table.filter(self._holds).height, ahead=ahead)

    def rest(self) -> float | None:
        """Tell nothing: what is stored can be read."""
        return None

    def refuse(self, offer: Offer) -> Offer:
        """Stop: rows of the store passed the same checks, so that this is no matter of some rows."""
        raise DataError(f"the detector refuses rows of data set '{self._dataset}'; start the watch anew (reset=true)")

    def waiting(self) -> int | None:
        """Tell nothing."""
        return None

    def notices(self) -> tuple[str, ...]:
        """Tell nothing."""
        return ()

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def _later(table: pl.DataFrame, ends: pl.DataFrame) -> pl.DataFrame:
    """Return the rows after the end of their series."""
    later = table.join(ends.rename({"time": "end"}), on="series_id").filter(pl.col("time") > pl.col("end"))
    return later.drop("end")


def _times(ends: Mapping[str, int]) -> pl.DataFrame:
    """Return the ends of a position as ``stored_times`` does."""
    return pl.DataFrame(list(ends.items()), schema={"series_id": pl.String, "time": pl.Int64}, orient="row")
