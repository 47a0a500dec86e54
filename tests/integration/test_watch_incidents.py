"""Incidents of a watch: whatever the rows are cut into, the event store ends up with those of ``detect``."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from watching import NEW, RULE, Watched, assert_told, new_rows

from tsforge.app.events import list_events
from tsforge.app.triage import queue
from tsforge.app.watch.status import watch_status
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.event_store import EventStore

STORE = {"kind": "store"}
TABLES = ("tsf_events", "tsf_incident_members", "tsf_event_log")


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    (tmp_path / "incoming").mkdir()
    return Watched(tmp_path, Workspace.open(site.home))


def grouped(group_by: str, gap: int = 0) -> dict[str, Any]:
    return {"rule": RULE, "events": {"group_by": group_by, **({"group_gap": gap} if gap else {})}}


def settings(plant: Watched, detector: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"detector": detector, "sinks": plant.plain()["sinks"] | {"store": STORE}} | changes


def stored(plant: Watched) -> pl.DataFrame:
    with closing(EventStore(plant.workspace.database_url)) as store:
        return store.events("plant")


def incidents(events: pl.DataFrame) -> dict[str, str | None]:
    return dict(events.select("event_id", "incident_id").iter_rows())


def of_ended(events: pl.DataFrame) -> dict[str, str | None]:
    """The incidents of which every event is over: an open event is told with the end that it had when it opened."""
    names = pl.coalesce("incident_id", "event_id")
    return incidents(events.filter((pl.col("state") == "closed").all().over(names)))


def content(plant: Watched) -> list[list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(plant.workspace.database_url.removeprefix("sqlite:///"))) as connection:
        return [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall() for table in TABLES]


@pytest.mark.parametrize(
    ("group_by", "gap", "chunk", "files"),
    [("all", 0, 13, 1), ("all", 2, 50, 3), ("all", 12, 1, 5), ("id:^([ab])$", 20, 33, 2), ("id:^(a)$", 20, 400, 4)],
)
def test_any_cut_of_the_rows_ends_in_the_incidents_of_detect(
    plant: Watched, group_by: str, gap: int, chunk: int, files: int
) -> None:
    rows, detector = new_rows(), grouped(group_by, gap)
    truth = plant.truth(rows, detector)
    ended = of_ended(truth)
    assert len(set(ended.values())) < len(ended) > truth.height / 2, "some incidents have several events"
    if chunk == 1:
        rows = rows[: NEW // 3]  # a commit a row
        truth = plant.truth(rows, detector)
        ended = of_ended(truth)
    for number, start in enumerate(range(0, rows.height, -(-rows.height // files))):
        plant.write(f"{number}.parquet", rows[start : start + -(-rows.height // files)])
        plant.watch(**settings(plant, detector, chunk_rows=chunk))
    assert_told(plant.told(), truth)
    assert all("incident_id" not in record for record in plant.told()), "other sinks tell single events"
    found = incidents(stored(plant))
    assert set(found) == set(truth["event_id"])
    assert {name: found[name] for name in ended} == ended
    notices = watch_status("plant", plant.workspace)["notices"]
    assert any("1 of 2 series have no group" in notice for notice in notices) == (group_by == "id:^(a)$")


def test_a_delivery_that_comes_again_changes_no_byte(plant: Watched) -> None:
    """The store took everything and its word got lost; a receiver that is down keeps the transitions in the outbox."""
    rows, detector = new_rows(), grouped("all", 2)
    down = {"kind": "webhook", "url": "http://127.0.0.1:9/", "backoff_seconds": 600.0}
    given = settings(plant, detector, drain_seconds=0.0)
    given["sinks"] = given["sinks"] | {"hook": down}
    plant.write("0.parquet", rows[:NEW])
    plant.watch(**given)
    plant.write("1.parquet", rows[NEW:])
    plant.watch(**given)
    before = content(plant)
    assert all(before)
    for acked in (0, 5, 11):
        with closing(sqlite3.connect(plant.workspace.root / "watch/plant/state.db")) as connection, connection:
            connection.execute("UPDATE sinks SET acked = ? WHERE name = 'store'", (acked,))
        assert plant.watch(**given).facts["sinks"]["store"]["to_deliver"] == 0
        assert content(plant) == before


def test_another_grouping_is_refused_until_the_watch_is_started_anew(plant: Watched) -> None:
    rows = new_rows()
    plant.write("0.parquet", rows)
    plant.watch(**settings(plant, grouped("all")))
    first = incidents(stored(plant))
    for other, words in ((grouped("all", 9), "group_gap is 9, was 0"), (grouped("id:(.)"), "group_by is id:")):
        with pytest.raises(ConfigError, match=rf"detector\.events\.{words}.*another name.*reset=true"):
            plant.watch(**settings(plant, other))
    with pytest.raises(ConfigError, match=r"detector\.events\.group_by is None, was all"):
        plant.watch(**settings(plant, {"rule": RULE}))
    wide = grouped("all", 9)
    plant.watch(**settings(plant, wide, reset=True))
    second, wanted = incidents(stored(plant)), of_ended(plant.truth(rows, wide))
    assert {name: second[name] for name in wanted} == wanted
    assert len(set(second.values())) < len(set(first.values())), "the wider gap joins more"
    scopes = {row[1] for row in content(plant)[1]}
    assert scopes == {
        "watch:plant generation 1 group_by all group_gap 0",
        "watch:plant generation 2 group_by all group_gap 9",
    }


def test_incidents_need_the_event_store(plant: Watched) -> None:
    with pytest.raises(ConfigError, match=r"group_by names incidents in the event store.*sinks\.store\.kind=store"):
        plant.watch(detector=grouped("all"))


def test_a_key_that_fits_nothing_is_refused_before_the_watch_begins(plant: Watched) -> None:
    with pytest.raises(ConfigError, match="no static column 'site'"):
        plant.watch(**settings(plant, grouped("static:site")))
    with pytest.raises(ConfigError, match="matches none of 2 series"):
        plant.watch(**settings(plant, grouped("id:^pump(.)")))
    plant.watch()  # nothing was begun with the refused settings


def test_triage_and_the_list_show_them(plant: Watched) -> None:
    plant.write("0.parquet", new_rows())
    plant.watch(**settings(plant, grouped("all", 2)))
    events = stored(plant)
    rows = queue(events)
    assert rows.height == events["incident_id"].n_unique() < events.height
    assert set(rows["key"]) == {f"plant/{name}" for name in events["incident_id"]}
    listed = list_events(plant.workspace)
    assert listed.summary()["incidents"] == rows.height
    assert {row["event_id"]: row["incident_id"] for row in listed.rows()} == incidents(events)
