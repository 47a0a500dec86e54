"""What a stream leaves out: rows that came late, values revised or absent when their row was taken, and what it says.

A stream takes every row once. Beside its state it keeps, for every series, how many rows were stored up to its end and
a digest of their values: what is more, or other, at the next run came too late for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tsforge.app.fitted_data import FittedData
from tsforge.core.errors import listing
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import Extent, SeriesStore, Stock
from tsforge.forecasting.stream import Stream

_LOG = get_logger(__name__)
_KEY = "taken"  # in the facts of the stream; absent from states of earlier versions, which say nothing until kept
_EMPTY = Extent(0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a stream has not taken of the rows up to its ends since its last run.

    Attributes:
        late: rows by series that were stored after their series had gone on.
        revised: bound on the taken rows with a value that was revised or filled in since.
        batches: numbers of the batches that brought them.
        is_noted: the facts of the stream have changed and must be kept.
    """

    late: Mapping[str, int] = field(default_factory=dict)
    revised: int = 0
    batches: tuple[int, ...] = ()
    is_noted: bool = False

    @property
    def rows_late(self) -> int:
        """Late rows of all series."""
        return sum(self.late.values())

    def warn(self, stream: str) -> None:
        """Say it once, if there is anything to say."""
        told = []
        if self.late:
            told.append(
                f"{self.rows_late} stored rows lie before the end of their series in stream '{stream}' "
                f"({_by_count(self.late)})"
            )
        if self.revised:
            taken = "that it has taken" if self.late else f"that stream '{stream}' has taken"
            told.append(f"values of up to {self.revised} rows {taken} were revised or filled in")
        if told:
            _LOG.warning("%s%s; they are left out: reset=true takes them", " and ".join(told), self._source())

    def _source(self) -> str:
        if not self.batches:  # records older than the rows: a store that was restored from a copy
            return ""
        first, last = self.batches[0], self.batches[-1]
        return f" (batch {first})" if first == last else f" (batches {first}-{last})"


def find_left_out(live: Stream, before: pl.DataFrame | None, data: FittedData, workspace: Workspace) -> LeftOut:
    """Return what was left out up to the ends ``before`` a run, and note in the stream what is stored up to its ends.

    Rows are counted in one snapshot after they were read: one that comes in these seconds, and before the end that they
    reach, passes for taken.

    Args:
        live: the stream after the run.
        before: its ends before it; None for a new stream, which has left out nothing yet.
        data: what it follows.
        workspace: whose store to read.
    """
    noted = None if before is None else live.about.get(_KEY)
    now = stored_times(live.ends())
    old = now.clear() if noted is None or before is None else stored_times(before)
    is_still = noted is not None and old.equals(now)
    with closing(SeriesStore(workspace.database_url)) as store:
        stock = store.stock(
            data.name,
            pl.concat([old, now]),
            watched(live.artifact.schema, store.config(data.name)),
            after=0 if noted is None else noted["batch"],
            only_if_news=is_still,
        )
    if is_still and not stock.news:
        return LeftOut()
    found = LeftOut(is_noted=True) if noted is None else compared(noted, old, stock)
    live.about[_KEY] = notes(now, stock)
    return found


def stored_times(ends: pl.DataFrame) -> pl.DataFrame:
    """Return the ends of series with times as the store keeps them."""
    return ends.select("series_id", pl.col("time").cast(pl.Int64)).sort("series_id")


def watched(schema: SeriesSchema, settings: Mapping[str, Any]) -> list[str]:
    """Return the columns whose stored values are taken with the row of the same time.

    Args:
        schema: what the artifact reads. settings: kept with the data set.
    """
    delay = settings.get("publication_delay")
    delayed = [name for name in schema.past if isinstance(delay, Mapping) and name in delay]  # one for all moves none
    return [name for name in schema.columns if name not in delayed]


def notes(ends: pl.DataFrame, stock: Stock) -> dict[str, Any]:
    """Return what is stored up to the ends of series, in types that JSON knows."""
    found = stock.extents
    extents = {name: list(found[name, time]) for name, time in ends.iter_rows() if (name, time) in found}
    return {"made": stock.made, "batch": stock.batch, "series": extents}


def compared(noted: Mapping[str, Any], old: pl.DataFrame, stock: Stock) -> LeftOut:
    """Return what came up to the ends ``old`` since ``notes`` were taken of them."""
    late: dict[str, int] = {}
    differing = again = whole = 0
    for name, time in old.iter_rows():
        then = Extent(*noted["series"].get(name, _EMPTY))
        extent = stock.extents.get((name, time), _EMPTY)
        if extent.rows > then.rows:
            late[name] = extent.rows - then.rows
        if extent.digest != then.digest:
            differing += 1
            again += max(extent.publications - then.publications - late.get(name, 0), 0)
            whole += min(extent.rows, then.rows)
    # a bound: changed rows that the stream has not taken yet are among them, the digests say if any other is
    revised = sum(changed for _, _, changed in stock.news) + again if differing else 0
    if noted["made"] != stock.made:  # the data set was removed and ingested again: every row of it is new
        revised = whole
    return LeftOut(late=late, revised=revised, batches=tuple(batch for batch, _, _ in stock.news), is_noted=True)


def count_missing(rows: pl.DataFrame, targets: tuple[str, ...], covariates: tuple[str, ...]) -> dict[str, int]:
    """Return how many values of each covariate are missing in rows with an observed target, where any is."""
    if not covariates:
        return {}
    seen = rows.filter(pl.any_horizontal(pl.col(targets).is_not_null()))
    counts = seen.select(pl.col(covariates).null_count()).row(0, named=True)
    return {name: count for name, count in counts.items() if count}


def warn_missing(missing: Mapping[str, int], stream: str) -> None:
    """Say once which covariates the rows just taken lack."""
    if missing:
        _LOG.warning(
            "%d covariate values are missing in the rows that stream '%s' has just taken (%s); the training mean "
            "stands for them, also when they come later: ingest them with the targets, or declare publication_delay",
            sum(missing.values()),
            stream,
            _by_count(missing),
        )


def _by_count(counts: Mapping[str, int]) -> str:
    return listing(f"{name}: {count}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
