"""Rows, lines and files that no watch can take: each costs itself and is counted, whatever stands around it."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from watching import FIRST, MAPPING, SEEN, Watched, assert_told, keys, new_rows

from tsforge.app.forecast import find_artifact
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.watch import files, screening
from tsforge.app.watch.files import UNENDED_SECONDS, Folder
from tsforge.app.watch.intake import Intake
from tsforge.app.watch.records import ROWS
from tsforge.app.watch.run import watch
from tsforge.app.watch.screening import Bounds
from tsforge.app.watch.settings import FolderSource, RowsConfig, StdinSource, TextMarks
from tsforge.app.watch.sources import Offer, salvage
from tsforge.app.watch.status import watch_status
from tsforge.app.watch.stdin import Lines
from tsforge.artifact import load_artifact
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace

NO_ENDS = pl.DataFrame(schema={"series_id": pl.String, "time": pl.Datetime("us", "UTC")})


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    (tmp_path / "incoming").mkdir()
    return Watched(tmp_path, Workspace.open(site.home))


def intake(plant: Watched, bounds: Bounds = Bounds(), **rows: Any) -> Intake:
    artifact = load_artifact(find_artifact("latest", plant.workspace))
    return Intake(artifact, {}, RowsConfig(**(MAPPING | rows)), TextMarks(), "plant", bounds=bounds)


def texts(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Return rows whose times are text."""
    return [row | {"ts": row["ts"].strftime("%Y-%m-%dT%H:%M:%SZ")} for row in rows.iter_rows(named=True)]


def mixed(rows: pl.DataFrame, every: int, bad: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with one of the bad ones, in turn, after so many of them; a bad one states what it has of its own."""
    found = []
    for at, row in enumerate(texts(rows), start=1):
        found.append(row)
        if at % every == 0:
            found.append(row | bad[at // every % len(bad)])
    return found


BAD: list[dict[str, Any]] = [
    {"ts": "2026-03-12T05:00:07Z"},
    {"ts": "yesterday"},
    {"ts": "2296-03-12T05:00:00Z"},
    {"ts": None},
    {"machine": " "},
]


def as_table(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write rows into a table with a serial key and return the source."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE readings (id INTEGER PRIMARY KEY, machine TEXT, ts TEXT, x, y)")
        lines = [(at, row["machine"], row["ts"], row["x"], row["y"]) for at, row in enumerate(rows, start=1)]
        connection.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", lines)
    connection.close()
    place = {"path": str(path), "table": "readings", "key": "id"}
    return {"kind": "sql", **place, "settle_seconds": 0, "rows": MAPPING}


def assert_adds_up(facts: Mapping[str, Any]) -> None:
    """Rows read are those taken and those that were not, each counted once."""
    read, *parts = (facts[name] for name in ROWS)
    assert read == sum(parts) + sum(facts["series_left_out"].values()), facts


# --- rows


def test_a_bad_row_after_every_tenth_costs_no_event(plant: Watched) -> None:
    """Thirty rows off the grid among 1,500 once cost 755 rows and half the events."""
    rows = new_rows()
    source = as_table(plant.root / "plant.db", mixed(rows, 10, BAD))
    facts = plant.watch(source=source, chunk_rows=5000).facts
    bad = rows.height // 10
    assert (facts["rows_read"], facts["rows_taken"], facts["rows_refused"]) == (rows.height + bad, rows.height, bad)
    assert_adds_up(facts)
    assert_told(plant.told(), plant.truth(rows))
    assert facts["refused"] == 2, "one of a reason, not one of a row"
    reasons = " ".join(item["reason"] for item in facts["refusals"])
    assert "lie off the grid of step 1h" in reasons
    assert "wrong time" in reasons
    places = [item["what"].rpartition(", row")[2] for item in facts["refusals"]]
    assert sorted(places) == ["s 22, 77, 132, 187, 242 and 3 more", "s 55, 110, 165, 220, 275 and 2 more"]


def many(count: int) -> pl.DataFrame:
    hours = count // 2
    times = [FIRST + timedelta(hours=SEEN + hour) for hour in range(hours)]
    tables = [pl.DataFrame({"machine": name, "ts": times, "x": 1.5, "y": 2.5}) for name in "ab"]
    return pl.concat(tables).sort("ts", "machine")


def test_five_hundred_bad_rows_in_one_portion_take_no_more_readings_than_one(
    plant: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = intake(plant)
    readings = []
    plain = taker._clean
    monkeypatch.setattr(taker, "_clean", lambda *settings: (readings.append(1), plain(*settings))[1])
    further: list[dict[str, Any]] = [*BAD, {"ts": "2026-03-12T05:00:07"}, {"ts": "0001-01-01T00:00:00Z"}]
    rows = mixed(many(5000), 10, further)
    good = 5000 + 500 // 7  # a time without an offset among others is read by itself; in the year 1 it is another row
    off = sum("05:00:07" in (row["ts"] or "") for row in rows)
    table = pl.DataFrame(rows).select("machine", "ts", "x", "y")
    ends = pl.DataFrame({"series_id": ["a", "b"], "time": [FIRST + timedelta(hours=SEEN - 1)] * 2}).cast(
        {"time": pl.Datetime("us", "UTC")}
    )
    portions, refusals = salvage(taker, table, "here", ends, is_text=False)
    assert sum(portion.table.height for portion in portions) == 5000
    assert sum(portion.late for portion in portions) == good - 5000
    refused = sum(refusal.rows for refusal in refusals) + sum(portion.refused for portion in portions)
    assert refused == len(rows) - good
    assert [refusal.rows for refusal in refusals if "off the grid" in refusal.reason] == [off]
    assert len(readings) == 1
    assert len(refusals) == 2


def test_what_only_spoils_a_reading_in_company_is_found_by_halves(
    plant: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort never gives up rows that can be read, however many cannot."""
    from tsforge.core.errors import DataError

    taker = intake(plant)
    plain = taker.clean_screened

    def reads(raw: Any) -> Any:
        if (raw.frame.collect()["x"] == 13.0).any():
            raise DataError("thirteen")
        return plain(raw)

    monkeypatch.setattr(taker, "clean_screened", reads)
    rows = many(1000).with_columns(x=pl.when(pl.int_range(1000) % 3 == 1).then(13.0).otherwise("x"))
    portions, refusals = salvage(taker, rows, "here", NO_ENDS, is_text=False)
    assert sum(portion.table.height for portion in portions) == 667
    assert [refusal.rows for refusal in refusals] == [1] * 333


def test_local_times_that_clocks_show_twice_cost_themselves(plant: Watched) -> None:
    times = [datetime(2026, 10, 25, hour) for hour in range(6)]
    rows = pl.DataFrame({"machine": "a", "ts": times, "x": 1.0, "y": 1.0})
    taker = intake(plant, timezone="Europe/Berlin")
    portions, refusals = salvage(taker, rows, "here", NO_ENDS, is_text=False)
    assert [portion.table["time"].dt.hour().to_list() for portion in portions if portion.table.height] == [
        [22, 23, 2, 3, 4]
    ]
    assert [(refusal.rows, "occur twice in Europe/Berlin" in refusal.reason) for refusal in refusals] == [(1, True)]
    taker = intake(plant, timezone="Europe/Berlin", ambiguous="earliest")
    (portion,), refusals = salvage(taker, rows, "here", NO_ENDS, is_text=False)
    assert (portion.table.height, portion.rows_read, portion.refused, refusals) == (6, 6, 0, [])


@pytest.mark.parametrize(
    ("column", "cells", "words"),
    [
        ("ts", [1e300, 2.5, float("nan"), 3.0], ("no whole numbers, or too large", "numbers, not dates")),
        ("ts", [True, False, True, True], ("has type Boolean",)),
        ("machine", [1.5, 2.0, 2.5, 3.0], ("are fractions",)),
        ("machine", [[1], [2], None, [3]], ("have type List",)),
        ("machine", [None, None, "", " "], ("no series id",)),
    ],
)
def test_columns_of_a_kind_that_cannot_be_read_are_refused(
    plant: Watched, column: str, cells: list[Any], words: tuple[str, ...]
) -> None:
    rows = many(4).with_columns(pl.Series(column, cells))
    portions, refusals = salvage(intake(plant), rows, "here", NO_ENDS, is_text=False)
    taken = sum(portion.table.height for portion in portions)
    assert taken + sum(refusal.rows for refusal in refusals) + sum(portion.refused for portion in portions) == 4
    assert all(word in " ".join(refusal.reason for refusal in refusals) for word in words)


def test_cells_of_a_table_that_are_no_numbers_cost_no_row_that_has_one(plant: Watched) -> None:
    """In a portion by itself such a row was once refused, and a number beside the bad cell lost."""
    rows = texts(new_rows()[:20])
    given = [*rows[:5], rows[5] | {"x": "ERR"}, rows[6] | {"x": "ERR", "y": None}, *rows[7:]]
    source = as_table(plant.root / "plant.db", given)
    for size in (1, 3, 100):
        facts = plant.watch(name=f"cut{size}", source=source, chunk_rows=size).facts
        assert (facts["rows_read"], facts["rows_taken"], facts["rows_refused"], facts["refused"]) == (20, 19, 1, 1)
        assert facts["cleaning"] == {"replaced: unreadable cells in column 'x'": 1}
        assert_adds_up(facts)


def test_a_row_far_ahead_of_the_clock_does_not_make_later_rows_late(
    plant: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, start = new_rows(), FIRST + timedelta(hours=SEEN)
    far = {"ts": (start + timedelta(hours=2000)).strftime("%Y-%m-%dT%H:%M:%SZ")}
    source = as_table(plant.root / "plant.db", mixed(rows, 150, [far]))
    clock = start + timedelta(hours=rows.height // 2)
    monkeypatch.setattr(screening.time, "time", clock.timestamp)
    facts = plant.watch(source=source).facts
    assert (facts["rows_taken"], facts["late"], facts["rows_refused"]) == (rows.height, 0, rows.height // 150)
    assert "ahead of the clock" in facts["refusals"][0]["reason"]
    assert "raise max_ahead_seconds" in facts["refusals"][0]["reason"]
    assert_told(plant.told(), plant.truth(rows))
    plant.write("0.jsonl", pl.DataFrame({"machine": "a", "ts": [start + timedelta(hours=2000)], "x": 1.0, "y": 1.0}))
    other = {"name": "other", "source": plant.plain()["source"]}
    refused = plant.watch(**other).facts
    assert (refused["refused"], refused["rows_refused"], refused["rows_read"]) == (1, 1, 1)
    assert plant.watch(**other, max_ahead_seconds=None, reset=True).facts["rows_taken"] == 1
    monkeypatch.setattr(screening.time, "time", (start - timedelta(days=300)).timestamp)
    facts = plant.watch(name="simulated", source=source | {"path": str(plant.root / "plant.db")}).facts
    assert facts["rows_refused"] == 0, "the clock of the stored rows is another one"


def test_rows_read_are_the_sum_of_what_became_of_them(plant: Watched) -> None:
    rows = texts(new_rows()[:60])
    empty = [row | {"x": None, "y": None} for row in rows[20:24]]
    gap = [row for at, row in enumerate(rows) if not 30 <= at < 40]
    given = [*gap[:20], *empty, *gap[24:], rows[5], rows[-1], rows[-1] | {"machine": "c"}, rows[-1] | {"ts": "no"}]
    source = as_table(plant.root / "plant.db", given)
    facts = plant.watch(source=source, chunk_rows=1000).facts
    assert facts["rows_read"] == len(given)
    assert (facts["rows_taken"], facts["rows_empty"], facts["late"], facts["rows_refused"]) == (46, 4, 2, 1)
    assert facts["series_left_out"] == {"c": 1}
    assert_adds_up(facts)
    plant.write("0.parquet", new_rows()[:60].with_columns(x=None, y=None).cast({"x": pl.Float64, "y": pl.Float64}))
    facts = plant.watch(name="files").facts
    assert (facts["rows_read"], facts["rows_taken"], facts["rows_empty"]) == (60, 0, 60)


def test_rows_of_a_file_that_is_refused_half_way_count_too(plant: Watched) -> None:
    rows = new_rows()[:60]
    late = pl.when(pl.int_range(60) >= 58).then(pl.col("ts") + timedelta(days=30)).otherwise("ts")
    plant.write("0.parquet", rows.with_columns(ts=late))
    facts = plant.watch(chunk_rows=25, max_gap=100).facts
    assert (facts["rows_taken"], facts["rows_refused"], facts["refused"]) == (50, 10, 1)
    assert_adds_up(facts)


@pytest.mark.parametrize(("off", "right"), [(20, 10), (3, 27), (30, 0)])
def test_rows_off_the_grid_are_counted_and_the_right_ones_not_blamed(plant: Watched, off: int, right: int) -> None:
    """The rows of a file have a phase of their own; what counts is that of the artifact."""
    rows = new_rows().filter(machine="a")[: off + right]
    moved = pl.when(pl.int_range(rows.height) < off).then(pl.col("ts") + timedelta(minutes=30)).otherwise("ts")
    plant.write("0.csv", rows.with_columns(ts=moved))
    facts = plant.watch().facts
    assert (facts["refused"], facts["rows_refused"], facts["rows_read"]) == (1, 30, 30)
    words = f"{off} of 30 times lie off the grid of step 1h from 2026-01-01 00:00 (first: 2026-03-12 00:30)"
    assert words in facts["refusals"][0]["reason"]
    assert_adds_up(facts)


def test_rows_of_files_that_are_refused_whole_are_counted(plant: Watched) -> None:
    rows = new_rows()[:40].with_columns(pl.col("x").cast(pl.String))
    plant.write("0.csv", rows.with_columns(x=pl.when(pl.int_range(40) == 7).then(pl.lit("broken")).otherwise("x")))
    (plant.incoming / "1.jsonl").write_text('{"machine": "a"\n\n{"machine": "a"}\n')
    (plant.incoming / "2.csv").write_text("machine,x,y\na,1,2\n")
    source = plant.plain()["source"] | {"rows": MAPPING | {"bad_cells": "error"}}
    facts = plant.watch(source=source).facts
    assert (facts["refused"], facts["rows_refused"]) == (3, 42), "without a column of times a file holds no rows"
    assert "'broken'" in facts["refusals"][2]["reason"]
    assert_adds_up(facts)


def test_rows_that_fill_the_grid_of_the_store_count_for_nothing(plant: Watched, site: Any) -> None:
    rows = new_rows()
    config = plant.config(source={"kind": "dataset"})
    watch(config, plant.workspace, once=True)
    stored = pl.read_parquet(site.source)
    wide = rows.pivot(on="machine", index="ts", values=["x", "y"])
    names = {f"{variate}_{machine}": f"{machine}.{variate}" for machine in "ab" for variate in "xy"}
    new = wide.rename(names | {"ts": "ds"}).select(stored.columns).with_columns(pl.col("ds").cast(stored["ds"].dtype))
    pl.concat([stored, new[:30], new[40:90]]).write_parquet(site.source)
    ingest(validate(IngestConfig, {"data": site.data()}), plant.workspace)
    facts = watch(config, plant.workspace, once=True).facts
    assert facts["rows_read"] == facts["rows_taken"] == 160


# --- lines


ODD = {
    "forty_digits": ('{"machine": "a", "ts": "2026-03-12T00:00:00Z", "x": ' + "7" * 40 + ', "y": 1}', "beyond 64 bits"),
    "four_hundred": ('{"machine": "a", "ts": "2026-03-12T00:00:00Z", "x": 1, "y": 1' + "0" * 400 + "}", "beyond 64"),
    "thousands": ('{"machine": "a", "ts": "2026-03-12T00:00:00Z", "x": 1, "y": 1' + "0" * 9000 + "}", "is no JSON"),
    "brackets": ("[" * 100_000, "brackets within brackets"),
    "a_list": ('{"machine": "a", "ts": "2026-03-12T00:00:00Z", "x": [1], "y": 1}', "is a list"),
    "half_a_pair": ('{"machine": "\\ud800", "ts": "2026-03-12T00:00:00Z", "x": 1, "y": 1}', "no characters"),
}


def lines_of(plant: Watched, content: bytes, settings: dict[str, Any], limit: int = 100) -> list[Offer]:
    """Return what standard input offers; a file stands for it."""
    place = plant.root / "lines"
    place.write_bytes(content)
    handle = os.open(place, os.O_RDONLY)
    lines = Lines(validate(StdinSource, {"kind": "stdin", **settings}), intake(plant), handle)
    offers: list[Offer] = []
    while not (lines.has_ended and lines.rest() is None):
        offer = lines.next(offers[-1].position if offers else {}, NO_ENDS, limit)
        offers += [] if offer is None else [offer]
    os.close(handle)
    return offers


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_line_of_json_costs_itself_or_its_file(plant: Watched, kind: str) -> None:
    odd, words = ODD[kind]
    rows = new_rows()[:20]
    good = [json.dumps(row) for row in texts(rows)]
    (plant.incoming / "0.jsonl").write_text("\n".join([*good[:3], odd, *good[3:5]]))
    (plant.incoming / "1.jsonl").write_text("\n".join(good) + "\n")
    facts = plant.watch().facts
    assert (facts["rows_taken"], facts["refused"]) == (20, 1)
    (refusal,) = facts["refusals"]
    assert refusal["what"] == "0.jsonl"
    assert words in refusal["reason"]
    offers = lines_of(plant, "\n".join([*good[:3], odd, *good[3:]]).encode(), {"format": "jsonl"})
    assert sum(portion.table.height for offer in offers for portion in offer.portions) == 20
    ((_, reason, count),) = [refusal for offer in offers for refusal in offer.refusals]
    assert words in reason
    assert count == 1


def test_a_time_that_no_number_can_be_refuses_its_file(plant: Watched) -> None:
    for name, cell in (("0.jsonl", "1e300"), ("1.jsonl", "NaN")):
        (plant.incoming / name).write_text(f'{{"machine": "a", "ts": {cell}, "x": 1, "y": 1}}\n')
    plant.write("2.parquet", new_rows()[:20])
    facts = plant.watch().facts
    assert (facts["rows_taken"], facts["refused"]) == (20, 2)


def test_an_odd_line_of_csv_costs_itself(plant: Watched) -> None:
    rows = new_rows()[:20]
    lines = rows.write_csv().encode().splitlines(keepends=True)
    lines.insert(5, b"a,2026-03-12T00:00:00Z," + b"9" * 140_000 + b",1\n")
    lines.insert(9, b"a,2026-03-12T00:00:00Z,1,\xff\n")
    lines.insert(12, b"a,2026-03-12T00:00:00Z,1\r2,1\n")
    offers = lines_of(plant, b"".join(lines), {"format": "csv"})
    assert sum(portion.table.height for offer in offers for portion in offer.portions) == 20
    reasons = [refusal.reason for offer in offers for refusal in offer.refusals]
    assert len(reasons) == 3
    assert "field larger than field limit (131072)" in reasons[0]
    assert "is not text of the encoding" in reasons[1]
    (plant.incoming / "0.csv").write_bytes(lines[0] + lines[5])
    plant.write("1.csv", rows)
    facts = plant.watch().facts
    assert (facts["rows_taken"], facts["refused"]) == (20, 1)
    assert "field larger than field limit" in facts["refusals"][0]["reason"]


# --- files


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_csv_file_cut_inside_its_last_cell_is_waited_for(plant: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """``12.5`` cut to ``1`` is a number too; it once raised a false event, and the rest of the file was never read."""
    text = new_rows()[:20].write_csv()
    place = plant.incoming / "0.csv"
    place.write_text(text[: text.rindex(",") + 2])
    (plant.incoming / "1.parquet").write_bytes(b"")
    clock = Clock()
    monkeypatch.setattr(files.time, "time", lambda: place.stat().st_mtime)  # the disk's clock says: written just now
    folder = Folder(FolderSource(path=str(plant.incoming), rows=MAPPING), intake(plant), {}, clock)
    assert folder.next({}, NO_ENDS, 100) is None
    clock.now += 1.5
    assert folder.next({}, NO_ENDS, 100) is None, "quiet for settle_seconds, and not at the end of a line"
    assert folder.rest() == pytest.approx(UNENDED_SECONDS - 1.5)
    place.write_text(text)
    assert folder.next({}, NO_ENDS, 100) is None
    clock.now += 1.5
    offer = folder.next({}, NO_ENDS, 100)
    assert offer is not None
    assert (offer.what, offer.portions[0].table.height) == ("0.csv", 20)
    folder.settle(offer)
    (plant.incoming / "1.parquet").unlink()
    (plant.incoming / "2.csv").write_text(text.rstrip("\n"))  # by a writer that ends no file with a new line
    monkeypatch.setattr(files.time, "time", lambda: (plant.incoming / "2.csv").stat().st_mtime)
    assert folder.next({}, NO_ENDS, 100) is None
    clock.now += UNENDED_SECONDS
    offer = folder.next({}, NO_ENDS, 100)
    assert offer is not None
    assert (offer.what, offer.portions[0].table.height) == ("2.csv", 20)


# --- keys of a table


def test_keys_that_fall_and_rows_without_one_are_told(plant: Watched, caplog: pytest.LogCaptureFixture) -> None:
    rows, place = texts(new_rows()), plant.root / "plant.db"
    with sqlite3.connect(place) as connection:
        connection.execute("CREATE TABLE readings (id INTEGER, machine TEXT, ts TEXT, x REAL, y REAL)")
        lines = [(at or None, row["machine"], row["ts"], row["x"], row["y"]) for at, row in enumerate(rows[:31])]
        connection.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", lines)
    source = {"kind": "sql", "path": str(place), "table": "readings", "key": "id", "settle_seconds": 0, "rows": MAPPING}
    facts = plant.watch(source=source).facts
    assert facts["rows_taken"] == 30
    (notice,) = facts["notices"]
    assert "1 rows have no key ('id' is NULL) and are not read" in notice
    with sqlite3.connect(place) as connection:
        connection.execute("DELETE FROM readings")
        connection.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?)", [(1, *line[1:]) for line in lines[-1:]])
    plant.watch(source=source)
    (notice,) = watch_status("plant", plant.workspace)["notices"]
    assert "the greatest key is 1, below the last one taken (30)" in notice
    assert "reset=true" in notice
    assert any("the greatest key is 1" in record.getMessage() for record in caplog.records)
    with sqlite3.connect(place) as connection:
        connection.execute("UPDATE readings SET id = 31")
    connection.close()
    assert plant.watch(source=source).facts["notices"] == []
    assert len(set(keys(plant.told()))) == len(plant.told())
