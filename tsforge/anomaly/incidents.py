"""Incidents: simultaneous events of several series, joined where the user says which series belong together.

Which series do is never guessed: ``group_by`` names a static column, a pattern over series ids, or all of them. Events
of one group form an incident when they share a row or lie at most ``group_gap`` rows apart, directly or through others.
An incident is named after its group, its first row and its rule, so later events never change its name; only an event
that ends up reaching back to an earlier incident moves into that one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError, listing
from tsforge.data.grid import TimeGrid

ALL = "all"
STATIC = "static:"
PATTERN = "id:"

Ints = NDArray[np.int64]


def check_grouping(group_by: str) -> None:
    """Refuse what is no grouping key.

    Raises:
        ValueError: neither ``all``, ``static:COLUMN`` nor ``id:PATTERN`` with exactly one group in the pattern.
    """
    if group_by == ALL or (group_by.startswith(STATIC) and group_by != STATIC):
        return
    if not group_by.startswith(PATTERN):
        raise ValueError(
            f"'{group_by}' is no grouping key; give all, static:COLUMN (a static column of the data), or id:PATTERN (a "
            "regular expression over series ids with one group)"
        )
    try:
        found = re.compile(group_by.removeprefix(PATTERN))
    except re.error as error:
        raise ValueError(f"'{group_by.removeprefix(PATTERN)}' is no regular expression: {error}") from error
    if found.groups != 1:
        raise ValueError(
            f"'{group_by.removeprefix(PATTERN)}' has {found.groups} groups; exactly one says what series share, as in "
            r"id:^(plant\d+)_; write (?:...) for the others"
        )


def group_labels(series_ids: Sequence[str], static: pl.DataFrame | None, group_by: str | None) -> dict[str, str]:
    """Return the group of each series that has one; a series that a pattern does not match has none.

    Args:
        series_ids: of the events.
        static: ``series_id`` and the static columns, None when the data has none.
        group_by: the grouping key (``check_grouping``); None groups nothing.

    Raises:
        ConfigError: no such static column, or a pattern that matches no series.
    """
    if group_by is None:
        return {}
    if group_by == ALL:
        return dict.fromkeys(series_ids, ALL)
    if group_by.startswith(STATIC):
        name = group_by.removeprefix(STATIC)
        columns = [] if static is None else [column for column in static.columns if column != "series_id"]
        if static is None or name not in columns:
            raise ConfigError(
                f"group_by {group_by}: the data has no static column '{name}' (it has: {listing(columns)})"
            )
        wanted = set(series_ids)
        rows = static.select("series_id", name).iter_rows()
        return {series: f"{name}={value:g}" for series, value in rows if series in wanted}
    pattern = re.compile(group_by.removeprefix(PATTERN))
    found = {name: match.group(1) for name in series_ids if (match := pattern.search(name)) and match.group(1)}
    if series_ids and not found:
        raise ConfigError(
            f"group_by {group_by}: the pattern matches none of {len(series_ids)} series ids ({listing(series_ids)})"
        )
    return found


def join_intervals(starts: ArrayLike, ends: ArrayLike, groups: ArrayLike, gap: int) -> Ints:
    """Return for each interval the position of the first one of its incident.

    Intervals of one group belong together when the later starts at most ``gap`` rows after the end of the earlier (0:
    they share a row), directly or through a chain of others. The first is the one with the earliest start; of equal
    starts, the one given first. In O(n log n).

    Shapes:
        starts, ends (rows, both included), groups (any integers): [N]; returned [N].
    """
    start, end = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    if not start.size:
        return np.zeros(0, dtype=np.int64)
    group = np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True)[1]
    order = np.lexsort((start, group))
    # each group on a stretch of rows of its own, out of reach of the one before: one running maximum serves all
    stretch = int(end.max() - start.min()) + gap + 1
    offset = group[order] * stretch - int(start.min())
    reach = np.maximum.accumulate(end[order] + offset)
    is_first = np.ones(start.size, dtype=bool)
    is_first[1:] = start[order][1:] + offset[1:] > reach[:-1] + gap
    firsts = order[is_first]
    out = np.empty(start.size, dtype=np.int64)
    out[order] = firsts[np.cumsum(is_first) - 1]
    return out


def incident_id(group: str, start: object, rule: str) -> str:
    """Return 16 hex digits that name an incident: the same group, first row and rule give the same id on every run."""
    return hashlib.sha256(f"incident\n{group}\n{start}\n{rule}".encode()).hexdigest()[:16]


def with_incidents(events: pl.DataFrame, groups: Mapping[str, str], gap: int, grid: TimeGrid) -> pl.DataFrame:
    """Return the events with the column ``incident_id`` (null for series without a group).

    Args:
        events: ``series_id, start, end, rule``, in any order, which is kept.
        groups: label by series, as ``group_labels`` gives them.
        gap: rows between events that still belong together.
        grid: of the times.

    Raises:
        DataError: a start or end lies off the grid.
    """
    names: list[str | None] = [None] * events.height
    labels = [groups.get(series) for series in events["series_id"]]
    grouped = np.flatnonzero([label is not None for label in labels])
    if grouped.size:
        part = events[grouped]
        codes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
        first = join_intervals(
            grid.index_of(part["start"]),
            grid.index_of(part["end"]),
            [codes[labels[place]] for place in grouped],
            gap,
        )
        starts, rules = part["start"].to_list(), part["rule"].to_list()
        ids = {
            place: incident_id(str(labels[grouped[place]]), starts[place], rules[place]) for place in np.unique(first)
        }
        for place, found in zip(grouped, first, strict=True):
            names[place] = ids[found]
    return events.with_columns(pl.Series("incident_id", names, dtype=pl.String))


def continue_incidents(
    new: pl.DataFrame, near: pl.DataFrame, groups: Mapping[str, str], gap: int, grid: TimeGrid
) -> pl.DataFrame:
    """Return new or grown events, and earlier ones that move with them, with the incidents they are in by now.

    Whatever the events arrive in, together or one by one, they end up in the incidents of ``with_incidents`` over all.

    Args:
        new: ``event_id, series_id, start, end, rule``.
        near: the same columns and ``incident_id`` of earlier events of the same rule, at least all of those that end no
            more than ``gap`` rows before the earliest start in ``new``.
        groups, gap, grid: as for ``with_incidents``.

    Returns:
        ``event_id, incident_id`` of every event of ``new`` and of those of ``near`` whose incident changes.
    """
    columns = ["event_id", "series_id", "start", "end", "rule", "incident_id"]
    told = dict(near.select("event_id", "incident_id").iter_rows())
    fresh = new.with_columns(pl.Series("incident_id", [told.get(name) for name in new["event_id"]], dtype=pl.String))
    others = near.filter(~pl.col("event_id").is_in(new["event_id"].implode()))
    events = pl.concat([fresh.select(columns), others.select(columns)])
    named = with_incidents(events.drop("incident_id"), groups, gap, grid)
    # the first event of an incident may have left with others before it: the name it was given then is the older one
    oldest = (
        named.with_columns(known=events["incident_id"])
        .filter(pl.col("start") == pl.col("start").min().over("incident_id"))
        .group_by("incident_id")
        .agg(pl.col("known").drop_nulls().first())
        .filter(pl.col("incident_id").is_not_null(), pl.col("known").is_not_null())
    )
    names = dict(oldest.iter_rows())
    found = named.select("event_id", pl.col("incident_id").replace(names))
    moved = found["incident_id"].ne_missing(events["incident_id"])
    return found.filter(moved | (pl.int_range(pl.len()) < new.height))


def ungrouped_notice(series_ids: Sequence[str], groups: Mapping[str, str], group_by: str | None) -> list[str]:
    """Return a notice about series that the grouping key says nothing about, none when there are none."""
    left = [] if group_by is None else [name for name in series_ids if name not in groups]
    if not left:
        return []
    return [
        f"{len(left)} of {len(series_ids)} series have no group by {group_by} ({listing(left)}): no incident has them"
    ]
