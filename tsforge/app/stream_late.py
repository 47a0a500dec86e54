"""What a stream leaves out: rows that came late, values revised or absent when their row was taken, and what it says.

A stream takes every row once. Beside its state it keeps, for every series, how many rows were stored up to its end and
a digest of their values: what is more, or other, at the next run came too late for it.

It also keeps which series every sum of a hierarchy is made of. A sum of other series is another series under the same
name, so that the stream lets go of what it had and waits for a whole context, as it does for any new series.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from tsforge.app.fitted_data import FittedData
from tsforge.core.config import validate
from tsforge.core.errors import DataError, listing
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.hierarchy import HierarchyConfig, build_hierarchy
from tsforge.data.schema import SeriesSchema
from tsforge.data.sql import transaction
from tsforge.data.store import Extent, SeriesStore, Stock
from tsforge.data.store_records import definition, statics
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.stream import Stream
from tsforge.forecasting.stream_buffer import Buffer

_LOG = get_logger(__name__)
_KEY = "taken"  # in the facts of the stream; absent from states of earlier versions, which say nothing until kept
_SUMS = "sums"  # likewise: the series that each sum is made of
_GONE = "gone"  # series that are no longer stored, and were named in a warning
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


@dataclass(frozen=True, kw_only=True)
class Lapsed:
    """Series of a stream that it has no new rows of.

    Attributes:
        names: gone from the store; or sums of other series now, of a model that must keep them.
        is_noted: the facts of the stream have changed and must be kept.
    """

    names: frozenset[str] = frozenset()
    is_noted: bool = False


def find_lapsed(live: Stream, stored: Collection[str], sums: Mapping[str, list[str]], stream: str) -> Lapsed:
    """Note what each sum is made of and what is gone, and return the series to take no rows of; warn of what is new.

    A sum that is made of other series than before leaves the stream. Where a model couples series none can leave: what
    the stream knows of the sum is hidden instead.

    Args:
        live: the stream before its rows are taken; is changed.
        stored: series in the store. sums: of ``sum_members``.
        stream: its name.

    Raises:
        DataError: no series would be left.
    """
    noted = live.about.get(_SUMS)
    known: dict[str, list[str]] = noted or {}
    other = [name for name in live.series if name in known and name in sums and known[name] != sums[name]]
    held = other if live.buffer.coupled else []
    if other:
        _warn_other(live, {name: (known[name], sums[name]) for name in other}, stream)
        (_hide if held else _let_go)(live, other)
    record = {**known, **sums, **{name: known[name] for name in held}}
    gone = sorted(set(live.ends()["series_id"]) - set(stored) - sums.keys())
    told = live.about.get(_GONE, [])
    if new := [name for name in gone if name not in told]:
        _LOG.warning(
            "%d series of stream '%s' are no longer stored (%s); it goes on without rows of them, and forecasts them "
            "from their last ones: reset=true leaves them out",
            len(new),
            stream,
            listing(new),
        )
    is_noted = record != known or gone != told
    if is_noted:
        live.about |= {_SUMS: record, _GONE: gone}
    return Lapsed(names=frozenset((*held, *gone)), is_noted=is_noted)


def sum_members(data: FittedData, workspace: Workspace) -> dict[str, list[str]]:
    """Return the series that each sum made on reading a data set is made of; none without a hierarchy of series.

    Raises:
        DataError: the data set is unknown, or its hierarchy does not fit its series.
    """
    with closing(SeriesStore(workspace.database_url)) as store:
        plain = data.settings(store.config(data.name)).get("hierarchy")
        if plain is None:
            return {}
        structure, names = validate(HierarchyConfig, plain, where="hierarchy"), sorted(store.series_ids(data.name))
        if structure.over != "series":
            return {}
        with transaction(store.engine, f"read dataset '{data.name}' from", write=False) as connection:
            constants = statics(connection, definition(connection, data.name), None)
    tree = build_hierarchy(structure, names, constants)
    given = set() if structure.given == "rebuild" else set(names)
    made = [place for place, name in enumerate(tree.nodes[: tree.num_aggregates]) if name not in given]
    return {tree.nodes[place]: [tree.bottoms[k] for k in tree.aggregation[[place]].indices] for place in made}


def _warn_other(live: Stream, changes: Mapping[str, tuple[list[str], list[str]]], stream: str) -> None:
    shown = []
    for name, (old, new) in changes.items():
        before, now = set(old), set(new)
        joined, left = [part for part in new if part not in before], [part for part in old if part not in now]
        parts = [f"{word} {listing(some, 3)}" for word, some in (("with", joined), ("without", left)) if some]
        shown.append(f"{name}: {', '.join(parts)}")
    is_closed = live.buffer.coupled or live.artifact.network.needs_known_series
    remedy = "their rows are left out: fit again" if is_closed else "each waits until the new sum fills a context"
    _LOG.warning(
        "%d sums that stream '%s' follows are made of other series than before (%s); %s",
        len(changes),
        stream,
        listing(shown),
        remedy,
    )


def _hide(live: Stream, names: Sequence[str]) -> None:
    places = [place for place, name in enumerate(live.series) if name in names]
    live.buffer.rows[places, :, : len(live.artifact.schema.targets)] = np.nan


def _let_go(live: Stream, names: Sequence[str]) -> None:
    keep = [place for place, name in enumerate(live.series) if name not in names]
    if not keep:
        raise DataError(f"all {len(names)} series of the stream are sums of other series now; reset=true begins anew")
    series = tuple(live.series[place] for place in keep)
    live.buffer = Buffer(live.artifact, series, **{name: value[keep] for name, value in live.buffer.tensors().items()})
    if live.carried is not None:
        live.carried = live.carried.take(live.buffer.everyone.new_tensor(keep))
    if live.online is not None:
        live.online = replace(live.online, state=_without(live.online.state, names))


def _without(state: OnlineConformal, names: Sequence[str]) -> OnlineConformal:
    """Return what intervals have learned of all other series."""
    tables, theirs = state.tables(), pl.col("series_id").is_in(list(names))
    kept = tables["cells"].with_row_index("cell").filter(~theirs)
    pending = tables["pending"]
    if pending.width:
        moved = dict(zip(kept["cell"].to_list(), range(kept.height), strict=True))
        pending = pending.filter(~theirs).with_columns(
            pl.col("cell").replace_strict(list(moved), list(moved.values()), return_dtype=pl.Int64)
        )
    return OnlineConformal.from_tables(state.config, {"cells": kept.drop("cell"), "pending": pending}, state.tally)


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
