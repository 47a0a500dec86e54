"""Grouping of simultaneous events (spec 6.5): against a naive closure over all pairs, ids, keys, refusals, speed."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.incidents import (
    continue_incidents,
    group_labels,
    join_intervals,
    ungrouped_notice,
    with_incidents,
)
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.data.grid import TimeGrid

START = datetime(2024, 1, 1)
GRID = TimeGrid(START, "1h")


def naive(starts: list[int], ends: list[int], groups: list[int], gap: int) -> list[int]:
    """The transitive closure of "at most ``gap`` rows apart", by relabelling all pairs until nothing moves."""
    label = list(range(len(starts)))
    moved = True
    while moved:
        moved = False
        for a in range(len(starts)):
            for b in range(len(starts)):
                apart = max(starts[a], starts[b]) - min(ends[a], ends[b])
                if groups[a] == groups[b] and apart <= gap and label[b] > label[a]:
                    label[b], moved = label[a], True
    firsts = {}
    for incident in set(label):
        members = [place for place, found in enumerate(label) if found == incident]
        firsts[incident] = min(members, key=lambda place: (starts[place], place))
    return [firsts[found] for found in label]


interval = st.tuples(st.integers(-20, 40), st.integers(0, 9), st.integers(-1, 2))


@settings(deadline=None)
@given(st.lists(interval, max_size=25), st.integers(0, 4))
def test_incidents_are_the_closure_of_all_pairs(rows: list[tuple[int, int, int]], gap: int) -> None:
    starts, groups = [row[0] for row in rows], [row[2] for row in rows]
    ends = [row[0] + row[1] for row in rows]
    assert join_intervals(starts, ends, groups, gap).tolist() == naive(starts, ends, groups, gap)


def test_a_long_event_holds_later_ones_together() -> None:
    assert join_intervals([0, 2, 9, 12], [10, 3, 9, 12], [7, 7, 7, 7], 0).tolist() == [0, 0, 0, 3]
    assert join_intervals([0, 2, 9, 12], [10, 3, 9, 12], [7, 7, 7, 7], 2).tolist() == [0, 0, 0, 0]
    assert join_intervals([0, 10], [9, 12], [1, 1], 0).tolist() == [0, 1], "rows next to each other are not shared"
    assert join_intervals([0, 10], [9, 12], [1, 1], 1).tolist() == [0, 0]
    assert join_intervals([], [], [], 3).tolist() == []


def test_a_hundred_thousand_events_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 10_000_000, 100_000)
    rows = pl.Series(starts)
    table = pl.DataFrame(
        {
            "series_id": [f"s{number % 500}" for number in range(starts.size)],
            "start": rows,
            "end": rows + 20,
            "rule": "quantile",
        }
    )
    groups = {f"s{number}": f"g{number % 20}" for number in range(500)}
    started = time.perf_counter()
    found = with_incidents(table, groups, 5, TimeGrid(0, "1i"))
    assert time.perf_counter() - started < 5.0  # 0.4 s on a quiet core; the pairs alone would take minutes
    assert found["incident_id"].n_unique() < table.height


def events(*rows: tuple[str, int, int]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"series_id": name, "start": START + timedelta(hours=a), "end": START + timedelta(hours=b), "rule": "r"}
            for name, a, b in rows
        ]
    ).with_columns(pl.col("start", "end").dt.replace_time_zone("UTC").dt.cast_time_unit("us"))


def ids(table: pl.DataFrame, groups: dict[str, str], gap: int = 0) -> list[str | None]:
    return with_incidents(table, groups, gap, GRID)["incident_id"].to_list()


def test_only_series_of_one_group_share_an_incident() -> None:
    table = events(("a1", 5, 9), ("b1", 6, 7), ("a2", 8, 12), ("c", 8, 8))
    first, other, second, alone = ids(table, {"a1": "a", "a2": "a", "b1": "b"})
    assert first == second
    assert first != other
    assert alone is None, "a series without a group is in no incident"
    assert ids(table, {}) == [None] * 4


def test_ids_do_not_depend_on_order_on_later_events_or_on_who_else_is_there() -> None:
    groups = {"a": "g", "b": "g", "c": "h"}
    table = events(("a", 5, 9), ("b", 7, 12), ("b", 30, 31), ("c", 6, 6))
    whole = dict(zip(table["start"], ids(table, groups), strict=True))
    turned = table.reverse()
    assert dict(zip(turned["start"], ids(turned, groups), strict=True)) == whole
    assert ids(table[:1], groups) == [whole[table["start"][0]]], "the first event alone has the id of the whole"
    grown = pl.concat([table, events(("c", 40, 50), ("a", 11, 29))])
    assert ids(grown, groups)[0] == whole[table["start"][0]]
    assert len(set(whole.values())) == 3


def test_the_rule_is_part_of_the_name() -> None:
    table = events(("a", 5, 9))
    assert ids(table, {"a": "g"}) != ids(table.with_columns(rule=pl.lit("other")), {"a": "g"})


def test_keys_name_groups_and_say_whom_they_leave_out() -> None:
    static = pl.DataFrame({"series_id": ["p1_x", "p2_x", "odd"], "site": [1.0, 2.5, 1.0]})
    names = ("p1_x", "p2_x", "odd")
    assert group_labels(names, static, "all") == dict.fromkeys(names, "all")
    assert group_labels(names, static, "static:site") == {"p1_x": "site=1", "p2_x": "site=2.5", "odd": "site=1"}
    found = group_labels(names, None, r"id:^(p\d)_")
    assert found == {"p1_x": "p1", "p2_x": "p2"}
    assert group_labels(names, None, None) == {}
    assert ungrouped_notice(names, found, r"id:^(p\d)_") == [
        r"1 of 3 series have no group by id:^(p\d)_ (odd): no incident has them"
    ]
    assert ungrouped_notice(names, {}, None) == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("site", "no grouping key; give all, static:COLUMN"),
        ("static:", "no grouping key"),
        ("id:(a", "no regular expression"),
        ("id:abc", "has 0 groups"),
        ("id:(a)(b)", "has 2 groups"),
    ],
)
def test_a_bad_key_is_refused_with_the_config(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        validate(DetectConfig, {"events": {"group_by": key}})


def test_a_gap_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_gap has no effect without group_by"):
        validate(DetectConfig, {"events": {"group_gap": 2}})


def test_a_key_that_no_series_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="matches none of 2 series ids"):
        group_labels(("a", "b"), None, "id:^plant(.)")
    with pytest.raises(ConfigError, match="no static column 'site'"):
        group_labels(("a", "b"), None, "static:site")


@settings(deadline=None, max_examples=25)
@given(st.lists(interval, min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 4))
def test_events_that_arrive_piece_by_piece_end_up_in_the_incidents_of_all(
    rows: list[tuple[int, int, int]], gap: int, stride: int
) -> None:
    """Rows of all series come in time order; an open event is told as it begins and again whenever it has grown."""
    grid = TimeGrid(0, "1i")
    groups = {f"s{place}": f"g{row[2]}" for place, row in enumerate(rows)}
    whole = pl.DataFrame(
        [
            {"event_id": f"e{place}", "series_id": f"s{place}", "start": row[0], "end": row[0] + row[1], "rule": "r"}
            for place, row in enumerate(rows)
        ]
    )
    stored: dict[str, dict[str, object]] = {}
    for now in range(-20 + stride - 1, 50 + stride, stride):
        begun = whole.filter(pl.col("start") <= now).with_columns(end=pl.min_horizontal("end", pl.lit(now)))
        news = [row for row in begun.to_dicts() if row.items() - stored.get(row["event_id"], {}).items()]
        if not news:
            continue
        new = pl.DataFrame(news)
        near = pl.DataFrame(list(stored.values()), schema={**whole.schema, "incident_id": pl.String})
        near = near.filter(pl.col("end") >= int(new["start"].to_numpy().min()) - gap)
        found = continue_incidents(new, near, groups, gap, grid)
        assert set(found["event_id"]) >= set(new["event_id"])
        for row in news:
            stored[row["event_id"]] = {**row, "incident_id": None}
        for name, incident in found.iter_rows():
            stored[name]["incident_id"] = incident
    expected = dict(with_incidents(whole, groups, gap, grid).select("event_id", "incident_id").iter_rows())
    assert {name: row["incident_id"] for name, row in stored.items()} == expected


def test_an_event_that_reaches_back_moves_the_later_incident_into_the_earlier() -> None:
    grid, groups = TimeGrid(0, "1i"), {"a": "g", "b": "g", "c": "g"}
    schema = {"event_id": pl.String, "series_id": pl.String, "start": pl.Int64, "end": pl.Int64, "rule": pl.String}
    old = pl.DataFrame([("e1", "a", 0, 9, "r"), ("e2", "b", 12, 15, "r")], schema=schema, orient="row")
    near = with_incidents(old, groups, 0, grid)
    assert near["incident_id"].n_unique() == 2
    bridge = pl.DataFrame([("e3", "c", 9, 13, "r")], schema=schema, orient="row")
    moved = dict(continue_incidents(bridge, near, groups, 0, grid).iter_rows())
    assert moved == {"e3": near["incident_id"][0], "e2": near["incident_id"][0]}, "e1 stays where it is"
    late = near.filter(event_id="e2").with_columns(incident_id=pl.lit("older"))
    assert dict(continue_incidents(bridge, late, groups, 0, grid).iter_rows())["e3"] != "older", "e3 begins before e2"
    last = pl.DataFrame([("e4", "a", 15, 18, "r")], schema=schema, orient="row")
    assert dict(continue_incidents(last, late, groups, 0, grid).iter_rows()) == {"e4": "older"}
