"""What a watch takes from a folder, a table, standard input and the store: every row once, bad ones set apart."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from watching import FIRST, MAPPING, NEW, SEEN, Watched, assert_told, keys, new_rows

from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.watch.files import Folder
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import FolderSource, StdinSource, TableSource
from tsforge.app.watch.sources import TablePoll
from tsforge.app.watch.status import watch_names, watch_status
from tsforge.app.watch.stdin import Lines
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import CalendarConfig
from tsforge.data.config import SqlSource, TextMarks
from tsforge.data.sql_poll import KeyedTable, read_key, write_key

NO_ENDS = pl.DataFrame(schema={"series_id": pl.String, "time": pl.Datetime("us", "UTC")})


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    (tmp_path / "incoming").mkdir()
    return Watched(tmp_path, Workspace.open(site.home))


def drop(plant: Watched, rows: pl.DataFrame, kinds: tuple[str, ...] = ("csv", "parquet", "jsonl")) -> None:
    for number, start in enumerate(range(0, rows.height, 90)):
        plant.write(f"{number:03d}.{kinds[number % len(kinds)]}", rows[start : start + 90])


def test_a_folder_of_three_kinds_of_files_tells_what_batch_detection_finds(plant: Watched) -> None:
    """Checklist 7, for the whole way from files to sinks: values outside their range are judged, and hidden."""
    rows = new_rows()
    drop(plant, rows)
    result = plant.watch()
    events = plant.truth(rows)
    assert events.height > 8
    assert events["start"].is_in([FIRST + timedelta(hours=SEEN + 100)]).any()  # the impossible value
    assert_told(plant.told(), events)
    assert result.facts["rows_taken"] == rows.height
    assert (result.facts["late"], result.facts["refused"], result.undelivered) == (0, 0, 0)
    again = plant.watch()
    assert again.facts["rows_read"] == result.facts["rows_read"]
    assert len(plant.told()) == result.facts["opened"] + result.facts["closed"]


def test_events_are_the_same_however_rows_arrive(plant: Watched) -> None:
    """Checklist 7: another cutting, runs in between, an event open across them, the state stored each time."""
    rows = new_rows()
    for number, start in enumerate(range(0, rows.height, 37)):
        plant.write(f"{number:03d}.parquet", rows[start : start + 37])
        plant.watch(chunk_rows=(7, 1000)[number % 2])
    told = plant.told()
    assert any(
        record["transition"] == "opened" and record["state"] == "open" for record in told
    )  # some were told while they lasted
    assert_told(told, plant.truth(rows))


def test_nothing_later_changes_what_was_told_before(plant: Watched) -> None:
    rows = new_rows()
    early, late = rows[:NEW], rows[NEW:]
    plant.write("0.parquet", early)
    plant.watch()
    before = plant.told()
    plant.write("1.parquet", late.with_columns(pl.col("x", "y") * 3.0))
    plant.watch()
    assert plant.told()[: len(before)] == before
    assert len(before) > 3


def test_rows_of_another_name_format_and_order(plant: Watched) -> None:
    rows = new_rows()
    shuffled = rows.sample(fraction=1.0, shuffle=True, seed=1)
    text = shuffled.select(
        pl.col("machine").alias("unit"),
        pl.col("ts").dt.strftime("%d.%m.%Y %H:%M").alias("when"),
        pl.col("x").alias("pressure"),
        "y",
    )
    text.write_csv(plant.incoming / "all.csv", separator=";")
    mapping = {"time": "when", "series": "unit", "columns": {"x": "pressure"}, "time_format": "%d.%m.%Y %H:%M"}
    source = {"kind": "folder", "path": str(plant.incoming), "settle_seconds": 0, "rows": mapping}
    plant.watch(source=source | {"csv": {"separator": ";"}}, chunk_rows=61)
    assert_told(plant.told(), plant.truth(rows))


def test_calendar_features_are_made_for_rows_and_the_horizon_after_them(plant: Watched, site: Any) -> None:
    data = {**site.data(), "calendar": {"features": ["hour", "weekday"]}}
    settings = {
        "data": data,
        "model": {"name": "ar_net", "lags": 24},
        "window": {"context_length": 48, "horizon": 6},
        "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
        "tracking": {"enabled": False},
    }
    ingest(validate(IngestConfig, {"data": data}), plant.workspace)
    assert fit(validate(FitConfig, settings), plant.workspace).artifact.schema.known
    rows = new_rows()
    drop(plant, rows, ("parquet",))
    plant.watch(chunk_rows=35)
    events = plant.truth(rows, calendar=CalendarConfig(features=("hour", "weekday")))
    assert events.height > 5
    assert_told(plant.told(), events)


def test_a_bad_file_is_refused_with_its_reason_and_read_once_repaired(plant: Watched) -> None:
    rows = new_rows()
    drop(plant, rows[:180])
    bad = plant.incoming / "000a.csv"
    bad.write_text("machine,ts,x\na,2026-03-12,1\n")
    (plant.incoming / "000b.parquet").write_bytes(b"PAR1 not really")
    (plant.incoming / "000c.jsonl").write_text('{"machine": "a"\n')
    (plant.incoming / ".hidden.csv").write_text("half")
    (plant.incoming / "notes.txt").write_text("no rows")
    result = plant.watch()
    assert (result.facts["refused"], result.facts["rows_taken"]) == (3, 180)
    reasons = {item["what"]: item["reason"] for item in result.facts["refusals"]}
    assert "no column 'y'" in reasons["000a.csv"]
    assert "not a readable Parquet file" in reasons["000b.parquet"]
    assert "line 1 is no JSON" in reasons["000c.jsonl"]
    assert plant.watch().facts["refused"] == 3  # not read again as it is
    plant.write("000a.csv", rows[180:200])
    assert plant.watch().facts["rows_taken"] == 200
    assert_told(plant.told(), plant.truth(rows[:200]))


def test_late_rows_and_unknown_series_are_left_out_and_counted(plant: Watched) -> None:
    rows = new_rows()
    stranger = rows.filter(machine="a")[:4].with_columns(machine=pl.lit("c"))
    plant.write("0.parquet", pl.concat([rows[:60], stranger]))
    plant.write("1.parquet", rows[40:100])
    facts = plant.watch().facts
    assert (facts["rows_taken"], facts["late"], facts["series_left_out"]) == (100, 20, {"c": 4})


def test_bad_cells_are_null_or_refuse_a_file_as_told(plant: Watched) -> None:
    text = new_rows()[:60].with_columns(pl.col("x").cast(pl.String))
    spoilt = text.with_columns(x=pl.when(pl.int_range(60) == 7).then(pl.lit("broken")).otherwise("x"))
    plant.write("0.csv", spoilt)
    facts = plant.watch(name="lenient").facts
    assert facts["rows_taken"] == 60
    assert facts["cleaning"] == {"replaced: unreadable cells in column 'x'": 1}
    source = plant.plain()["source"]
    strict = source | {"rows": MAPPING | {"bad_cells": "error"}}
    facts = plant.watch(name="strict", source=strict).facts
    assert (facts["rows_taken"], facts["refused"]) == (0, 1)
    assert "'broken'" in facts["refusals"][0]["reason"]


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_file_still_growing_is_not_read_nor_overtaken(plant: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that follow wait for it: their rows would make its rows late."""
    from tsforge.app.watch import files

    rows = new_rows()
    first = plant.write("0.csv", rows[:20])
    plant.write("1.csv", rows[20:40])
    intake = _intake(plant)
    clock = Clock()
    monkeypatch.setattr(files.time, "time", lambda: first.stat().st_mtime)  # the disk's clock says: written just now
    folder = Folder(FolderSource(path=str(plant.incoming), settle_seconds=5, rows=MAPPING), intake, {}, clock)
    nothing = pl.DataFrame()
    assert folder.next({}, nothing, 100) is None
    assert folder.rest() == pytest.approx(5)
    clock.now += 4
    with first.open("a") as handle:
        handle.write(rows[20:21].write_csv(include_header=False))
    assert folder.next({}, nothing, 100) is None
    clock.now += 4
    assert folder.next({}, nothing, 100) is None
    assert (folder.rest(), folder.waiting()) == (pytest.approx(1), 2)
    clock.now += 1
    offer = folder.next({}, nothing, 100)
    assert offer is not None
    assert (offer.what, offer.portions[0].rows_read) == ("0.csv", 21)


def test_half_a_last_line_is_no_row(plant: Watched) -> None:
    rows = new_rows()[:40]
    text = rows.write_csv()
    place = plant.incoming / "0.csv"
    plant.incoming.mkdir(exist_ok=True)
    for part, taken in ((text[: text.rindex(",")], 0), (text.rstrip("\n"), 40)):
        place.write_text(part)
        facts = plant.watch().facts
        assert facts["rows_read"] == taken
        assert facts["refused"] == 1
        assert watch_status("plant", plant.workspace)["files_waiting"] == 0
    (refusal,) = watch_status("plant", plant.workspace)["refusals"]
    assert "ends in the middle of a line (3 of 4 cells)" in refusal["reason"]


def test_files_changed_or_made_again_after_they_were_read(plant: Watched, caplog: pytest.LogCaptureFixture) -> None:
    rows = new_rows()
    intake = _intake(plant)
    place = plant.write("0.csv", rows[:20])
    folder = Folder(FolderSource(path=str(plant.incoming), settle_seconds=0, rows=MAPPING), intake, {})

    def read() -> int | None:
        offer = folder.next({}, pl.DataFrame(), 100)
        if offer is None:
            return None
        folder.settle(offer)
        return offer.portions[0].rows_read

    assert (read(), folder.waiting()) == (20, 0)
    with place.open("a") as handle:
        handle.write(rows[20:30].write_csv(include_header=False))
    assert [read(), read()] == [None, None]
    said = [record.getMessage() for record in caplog.records if "has changed since it was read" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("0.csv")
    place.unlink()
    assert read() is None  # nothing is stored meanwhile
    plant.write("0.csv", rows[20:30])
    assert read() == 10


def _intake(plant: Watched, **rows: Any) -> Any:
    from tsforge.app.forecast import find_artifact
    from tsforge.app.watch.intake import Intake
    from tsforge.app.watch.settings import RowsConfig
    from tsforge.artifact import load_artifact

    artifact = load_artifact(find_artifact("latest", plant.workspace))
    return Intake(artifact, {}, RowsConfig(**(MAPPING | rows)), TextMarks(), "plant")


# --- a table


def fill(path: Path, rows: pl.DataFrame, first: int = 1) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS readings (id INTEGER PRIMARY KEY, machine TEXT, ts TEXT, x REAL, y REAL)"
        )
        lines = [(first + at, row[0], row[1].isoformat(), *row[2:]) for at, row in enumerate(rows.iter_rows())]
        connection.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", lines)
    connection.close()


def table_source(path: Path, **changes: Any) -> dict[str, Any]:
    place = {"path": str(path), "table": "readings", "key": "id"}
    return {"kind": "sql", **place, "settle_seconds": 0, "rows": MAPPING} | changes


def test_a_polled_table_tells_what_batch_detection_finds(plant: Watched) -> None:
    rows, place = new_rows(), plant.root / "plant.db"
    fill(place, rows[:200])
    plant.watch(source=table_source(place))
    fill(place, rows[200:], first=201)
    facts = plant.watch(source=table_source(place)).facts
    assert (facts["rows_taken"], facts["refused"], facts["late"]) == (rows.height, 0, 0)
    assert_told(plant.told(), plant.truth(rows))


def test_rows_of_a_table_that_spoil_a_reading_are_set_apart(plant: Watched) -> None:
    """Times off the grid and a year nobody means cost those rows, not the fifty around them."""
    rows, place = new_rows()[:120], plant.root / "plant.db"
    fill(place, rows)
    with sqlite3.connect(place) as connection:
        connection.execute("UPDATE readings SET ts = '2026-03-12T05:17:00+00:00' WHERE id = 17")
        connection.execute("UPDATE readings SET ts = '2296-03-12T05:00:00+00:00' WHERE id = 88")
        connection.execute("UPDATE readings SET ts = 'yesterday' WHERE id = 90")
    connection.close()
    facts = plant.watch(source=table_source(place)).facts
    assert (facts["rows_taken"], facts["refused"]) == (117, 2)
    reasons = " ".join(item["reason"] for item in facts["refusals"])
    assert "off the grid" in reasons
    assert "wrong time" in reasons
    assert facts["cleaning"] == {"refused: unreadable times in column 'ts'": 1}
    strict = table_source(place, rows=MAPPING | {"bad_rows": "error"})
    with pytest.raises(DataError, match="1 of 50 times lie off the grid of step 1h from 2026-01-01 00:00"):
        plant.watch(name="strict", source=strict)
    assert watch_status("strict", plant.workspace)["rows_taken"] == 0


def test_equal_keys_are_never_parted_and_keys_survive_json(tmp_path: Path) -> None:
    place = tmp_path / "t.db"
    with sqlite3.connect(place) as connection:
        connection.execute("CREATE TABLE t (k TEXT, v REAL)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(k, i) for i, k in enumerate("aabbbbcd")])
    connection.close()
    table = KeyedTable(SqlSource(path=str(place), table="t"), "k", ["v"])
    assert table.newest() == "d"
    sizes, last = [], None
    while True:
        rows, key = table.after(last, "d", 3)
        if key is None:
            break
        sizes.append(rows["v"].to_list())
        last = read_key(json.loads(json.dumps(write_key(key))))
    assert sizes == [[0, 1], [2, 3, 4, 5], [6, 7]]
    assert read_key(write_key(FIRST)) == FIRST
    with pytest.raises(DataError, match=r"lacks column\(s\) w"):
        KeyedTable(SqlSource(path=str(place), table="t"), "k", ["w"]).newest()


def test_a_key_that_appears_late_is_not_passed_over(plant: Watched) -> None:
    """A transaction took key 5 and commits after key 6 was seen: rows wait until keys have settled."""
    rows, place, clock = new_rows(), plant.root / "plant.db", Clock()
    fill(place, rows[:4])
    fill(place, rows[5:6], first=6)
    poll = TablePoll(TableSource(**table_source(place, settle_seconds=2)), _intake(plant), clock)
    assert poll.next({}, NO_ENDS, 100) is None
    assert poll.rest() == 2
    fill(place, rows[4:5], first=5)
    clock.now += 2
    offer = poll.next({}, NO_ENDS, 100)
    assert offer is not None
    assert (offer.portions[0].rows_read, offer.position) == (6, {"plain": 6, "rows": 6})
    assert poll.next(offer.position, NO_ENDS, 100) is None
    assert poll.rest() is None


@pytest.mark.parametrize("kind", ["float8", "numeric"])
def test_a_table_in_postgresql(plant: Watched, postgres_url: str, kind: str) -> None:
    """A cell that is NaN counts as missing and costs no row beside it, of either type of numbers."""
    from sqlalchemy import create_engine, text

    rows, engine = new_rows(), create_engine(postgres_url)
    odd = pl.int_range(rows.height) == 40
    rows = rows.with_columns(pl.when(odd).then(None).otherwise(pl.col("x")).alias("x"))
    with engine.begin() as connection:
        connection.execute(
            text(f"CREATE TABLE readings (at timestamptz, machine text, ts timestamptz, x {kind}, y {kind})")
        )
        columns = ("at", "machine", "ts", "x", "y")
        lines = [dict(zip(columns, (row[1], *row), strict=True)) for row in rows.iter_rows()]
        lines[40]["x"] = math.nan
        connection.execute(text("INSERT INTO readings VALUES (:at, :machine, :ts, :x, :y)"), lines)
    engine.dispose()
    source = table_source(plant.root, url=postgres_url, key="at")
    del source["path"]
    facts = plant.watch(
        source=source, sinks=plant.plain()["sinks"] | {"table": {"kind": "sql", "url": postgres_url}}
    ).facts
    assert facts["rows_taken"] == rows.height
    assert_told(plant.told(), plant.truth(rows))
    with engine.begin() as connection:
        stored = connection.execute(text("SELECT event_id, transition FROM tsforge_events ORDER BY seq")).all()
    engine.dispose()
    assert [tuple(row) for row in stored] == keys(plant.told())


# --- standard input


def piped(plant: Watched, text: str, settings: dict[str, Any], limit: int = 50) -> tuple[list[Any], Lines]:
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    lines = Lines(validate(StdinSource, settings), _intake(plant), reader)
    offers, position = [], {}
    while not (lines.has_ended and lines.rest() is None):
        offer = lines.next(position, NO_ENDS, limit)
        if offer is not None:
            offers.append(offer)
            position = offer.position
    os.close(reader)
    return offers, lines


def test_lines_of_standard_input_and_those_that_are_no_rows(plant: Watched) -> None:
    rows = new_rows()[:40]
    text = rows.write_csv().replace("\n", "\r\n", 3) + "a,b\nx,not a time,1,2\n"
    offers, _ = piped(plant, text, {"kind": "stdin"}, limit=16)
    assert sum(portion.rows_read for offer in offers for portion in offer.portions) == 41
    assert [reason for offer in offers for _, reason, _ in offer.refusals] == ["line 9 has 2 cells, the header 4"]
    assert offers[-1].position == {"rows": 42}
    table = pl.concat([portion.table for offer in offers for portion in offer.portions])
    assert table["x"].equals(rows["x"])
    quoted = rows.write_csv().splitlines(keepends=True)
    quoted[7] = quoted[7].replace("a,", 'a,"', 1).replace("b,", 'b,"', 1)  # a quote that nobody closes
    offers, _ = piped(plant, "".join(quoted), {"kind": "stdin"}, limit=100)
    assert [reason for offer in offers for _, reason, _ in offer.refusals] == ["line 7 has 2 cells, the header 4"]
    assert sum(portion.rows_read for offer in offers for portion in offer.portions) == 39
    with pytest.raises(DataError, match="header of standard input lacks y"):
        piped(plant, "machine,ts,x\na,2026-03-12,1\n", {"kind": "stdin"})
    good = '{"machine": "a", "ts": "2026-03-12T00:00:00Z", "x": 1, "y": null, "more": 1}\n'
    offers, _ = piped(plant, good + '{"machine": "a"}\n[1]\n', {"kind": "stdin", "format": "jsonl"})
    assert [portion.table["x"].to_list() for portion in offers[0].portions] == [[1.0]]
    assert [reason for _, reason, _ in offers[0].refusals] == [
        "line 2 lacks ts, x, y",
        "line 3 lacks ts, machine, x, y",
    ]


# --- the store


def test_rows_that_tsforge_ingest_stores(plant: Watched, site: Any) -> None:
    rows = new_rows()
    settings = plant.plain(source={"kind": "dataset"})
    config = plant.config(source={"kind": "dataset"})
    events = plant.truth(rows)
    assert watch(config, plant.workspace, once=True).facts["rows_taken"] == 0
    stored = pl.read_parquet(site.source)
    wide = rows.pivot(on="machine", index="ts", values=["x", "y"])
    names = {f"{variate}_{machine}": f"{machine}.{variate}" for machine in "ab" for variate in "xy"}
    new = wide.rename(names | {"ts": "ds"}).select(stored.columns).with_columns(pl.col("ds").cast(stored["ds"].dtype))
    for cut in (90, NEW):
        pl.concat([stored, new[:cut]]).write_parquet(site.source)
        ingest(validate(IngestConfig, {"data": site.data()}), plant.workspace)
        facts = watch(config, plant.workspace, once=True).facts
    assert facts["rows_taken"] == facts["rows_read"] == rows.height
    assert_told(plant.told(), events)
    assert settings["source"] == {"kind": "dataset"}


# --- what does not fit


def test_settings_that_cannot_work_say_so(plant: Watched) -> None:
    source = plant.plain()["source"]
    for changes, words in (
        ({"source": source | {"path": str(plant.root / "nowhere")}}, "there is no folder"),
        ({"source": source | {"rows": MAPPING | {"columns": {"z": "q"}}}}, "the artifact reads no z"),
        ({"source": source | {"rows": {"time": "ts", "series": None}}}, "name the column of series ids"),
        ({"source": table_source(plant.root / "no.db")}, "does not exist"),
        ({"dataset": "unknown"}, "unknown"),
    ):
        with pytest.raises((ConfigError, DataError, BackendError), match=words):
            plant.watch(**changes)
        assert watch_names(plant.workspace) == []  # nothing was begun that a corrected setting would contradict
    for changes, words in (
        ({"detector": {"events": {"group_by": "all"}}}, "none of the sinks is one: add sinks.store"),
        ({"source": table_source(plant.root) | {"table": None, "query": "SELECT 1"}}, "polls a table or view"),
        ({"sinks": {"x": {"kind": "webhook", "url": "ftp://host"}}}, "no address"),
        ({"sinks": {"x": {"kind": "webhook", "url": "https://me:pass@host"}}}, "holds a user or password"),
        ({"sinks": {"x": {"kind": "sql", "path": "a.db", "table": "a; b"}}}, "no table name"),
        ({"name": "../up"}, "a name is"),
    ):
        with pytest.raises(ConfigError, match=words):
            plant.config(**changes)
