"""Rows of the store after those taken, and the counts of stored rows that are never taken: late, changed, foreign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import load_dataset
from tsforge.app.watch.intake import OF_STORE, Intake, Portion
from tsforge.app.watch.sources import Offer
from tsforge.artifact import match_frame
from tsforge.core.errors import DataError, EmptySpanError
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore

_LOG = get_logger(__name__)
_REVISED = "revised: rows of the store changed by a batch, up to"


class Batched(NamedTuple):
    """Rows that all batches of a data set have added and changed."""

    new: int
    changed: int


@dataclass(frozen=True, kw_only=True)
class Books:
    """What became of the rows of batches since a watch first looked; kept as its position.

    Every row that batches added is one that was offered, still waits, is foreign, or came late: the last of these is
    what is left.

    Attributes:
        new: rows that batches had added at the first look. waiting: those after the last ones taken, at that look.
        changed: rows that batches had changed when that was told last.
        offered, foreign, late: rows since then.
        strangers: last grid step that was told of each series that the detector does not know.
    """

    new: int
    waiting: int
    changed: int
    offered: int = 0
    foreign: int = 0
    late: int = 0
    strangers: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, position: Mapping[str, Any]) -> Books | None:
        """Return the books of a position, None where there are none yet."""
        return cls(**position) if position else None


class StoredRows:
    """Rows of the store after the last one taken of each series. Where it goes on is known by the detector alone.

    Args:
        workspace: whose store. dataset: which. intake: of the artifact.
    """

    def __init__(self, workspace: Workspace, dataset: str, intake: Intake) -> None:
        self._workspace = workspace
        self._dataset = dataset
        self._intake = intake
        self._fitted = FittedData.of(intake.artifact, dataset)
        self._holds = pl.any_horizontal(pl.col(intake.schema.columns).is_not_null())
        self._left: Portion | None = None
        self._told: datetime | None = None  # last change of the store that is in the books

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return stored rows after those taken; a backlog is read once and offered in pieces."""
        books = Books.of(position)
        apart = None
        if self._left is None or not self._left.table.height:
            books, apart = self._look(books, ends)
        portions = [] if apart is None else [apart]
        if self._left is not None:
            portion = self._cut(self._left, limit)
            portions.append(portion)
            books = books and replace(books, offered=books.offered + portion.rows_read)
        place = asdict(books) if books else position
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

    def _look(self, books: Books | None, ends: pl.DataFrame) -> tuple[Books | None, Portion | None]:
        """Read what follows the rows taken; return the books, and a portion of rows that are counted and not taken.

        Batches that come while it reads are in the books with the next look.
        """
        changed = self._changed()
        batched = self._batched() if books is None or changed != self._told else None
        table = self._after(ends)
        self._left = self._reached(table)
        if batched is None:
            return books, None
        foreign = self._foreign(books, ends)
        if self._batched() != batched:
            return books, None
        self._told = changed
        return self._account(books, batched, table.filter(self._holds).height, foreign)

    def _account(
        self, books: Books | None, batched: Batched, beyond: int, foreign: pl.DataFrame
    ) -> tuple[Books, Portion | None]:
        late = revised = 0
        if books is None:
            books = Books(new=batched.new, waiting=beyond, changed=batched.changed)
        else:
            books = replace(books, foreign=books.foreign + foreign.height)
            if not self._has(*OF_STORE):  # else a row that a batch adds need not be one row here
                taken = books.offered + beyond - books.waiting
                late = max(0, batched.new - books.new - books.foreign - taken - books.late)
            revised = batched.changed - books.changed
            books = replace(books, late=books.late + late, changed=batched.changed)
        steps = foreign.with_columns(pl.Series("at", self._intake.artifact.grid.index_of(foreign["time"])))
        last = steps.group_by("series_id").agg(pl.col("at").max())
        books = replace(books, strangers={**books.strangers, **dict(last.sort("series_id").iter_rows())})
        if late or revised:
            _LOG.warning(
                "data set '%s': %s rows came late (rows after them were taken before), and batches changed up to %s "
                "rows that were taken: neither is judged; start the watch anew (reset=true) to judge them",
                self._dataset,
                late,
                revised,
            )
        if not (late or revised or foreign.height):
            return books, None
        notes = {_REVISED: revised} if revised else {}
        return books, Portion(table=foreign, rows_read=late + foreign.height, late=late, notes=notes)

    def _changed(self) -> datetime | None:
        """Return when a batch reached the store last; the records of all batches are too many to read at every look."""
        with closing(SeriesStore(self._workspace.database_url)) as store:
            moments = store.datasets().filter(name=self._dataset)["updated"]
        return moments[0] if len(moments) else None

    def _batched(self) -> Batched:
        with closing(SeriesStore(self._workspace.database_url)) as store:
            done = store.batches(self._dataset).filter(status="done")
        return Batched(int(done["rows_new"].sum()), int(done["rows_changed"].sum()))

    def _has(self, *names: str) -> bool:
        """Return whether the data set has one of the things that only the store makes: see ``OF_STORE``."""
        with closing(SeriesStore(self._workspace.database_url)) as store:
            settings = self._fitted.settings(store.config(self._dataset))
        return any(settings.get(name) for name in names)

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
                with closing(SeriesStore(self._workspace.database_url)) as store:
                    store.config(self._dataset)  # an unknown data set is an error, an empty span is none
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

    def _foreign(self, books: Books | None, ends: pl.DataFrame) -> pl.DataFrame:
        """Return rows of series that the detector does not know, as far as they were not told yet.

        At the first look these are rows after all that were taken; of a series that comes later, all its rows.
        """
        with closing(SeriesStore(self._workspace.database_url)) as store:
            names = sorted(store.series_ids(self._dataset) - set(ends["series_id"]))
        grid = self._intake.artifact.grid
        begun = dict.fromkeys(names, int(grid.index_of(ends["time"]).max())) if books is None else books.strangers
        known = [name for name in names if name in begun]
        steps = np.array([begun[name] for name in known], dtype=np.int64)
        marks = pl.DataFrame({"series_id": pl.Series(known, dtype=pl.String), "time": grid.time_at(steps)})
        fresh = [name for name in names if name not in begun]
        has_sums = bool(names) and self._has("hierarchy")  # all are read then: to name one without rows is an error
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
        """Hold nothing."""


def _later(table: pl.DataFrame, ends: pl.DataFrame) -> pl.DataFrame:
    """Return the rows after the end of their series."""
    later = table.join(ends.rename({"time": "end"}), on="series_id").filter(pl.col("time") > pl.col("end"))
    return later.drop("end")
