"""Several processes at one event store, and processes killed in the middle: nothing lost, twice or half done."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from sqlalchemy import create_engine, text

from tsforge.data.event_store import EventStore

START = datetime(2026, 3, 3, tzinfo=UTC)

CHILD = """
import sys
from datetime import timedelta
import polars as pl
from tsforge.core.errors import DataError
from tsforge.data.event_store import EventStore

url, role, name, table = sys.argv[1:5]
store = EventStore(url)
events = pl.read_parquet(table)
print("ready", flush=True)
sys.stdin.readline()
if role == "act":
    for event_id in events["event_id"]:
        try:
            store.set_state(event_id, name, actor=name, comment=f"{name} says so")
        except DataError as error:
            assert "your comment was kept" in str(error), error
elif role == "record":
    for hours in range(1, 6):
        grown = events.with_columns(pl.col("end") + timedelta(hours=hours))
        done = store.record("plant", grown, source=name, artifact="a")
        print(done.new, flush=True)
elif role == "suppress":
    store.suppress({"series": "s0*", "reason": "test"}, actor=name)
print("done", flush=True)
"""


def write_events(path: Path, count: int) -> pl.DataFrame:
    rows = [
        {
            "event_id": f"event{number:04d}",
            "series_id": f"s{number % 10}",
            "start": START + timedelta(hours=number),
            "end": START + timedelta(hours=number),
            "peak_time": START + timedelta(hours=number),
            "peak_score": 5.0,
            "p_value": 0.01,
            "threshold": 4.0,
            "rule": "fixed(value=4)",
            "state": "open",
            "variates": [{"variate": "x"}],
        }
        for number in range(count)
    ]
    table = pl.DataFrame(rows).with_columns(pl.col("start", "end", "peak_time").cast(pl.Datetime("us", "UTC")))
    table.write_parquet(path)
    return table


def start(url: str, role: str, name: str, table: Path) -> subprocess.Popen[str]:
    """Start a child that has imported what it needs and waits."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, url, role, name, str(table)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "POLARS_MAX_THREADS": "1"},
    )


def together(*children: subprocess.Popen[str]) -> list[list[str]]:
    """Let children that wait go at once and return what each printed."""
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=100) for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors
    return [printed.split() for printed, _ in outputs]


def test_two_people_at_the_same_events(url: str, tmp_path: Path) -> None:
    """One confirms, one dismisses: each event gets one of both, and both comments."""
    table = write_events(tmp_path / "events.parquet", 25)
    store = EventStore(url)
    store.record("plant", table, source="detect:1", artifact="a")
    together(*(start(url, "act", name, tmp_path / "events.parquet") for name in ("confirmed", "dismissed")))
    trail = store.log()
    said = trail.filter(pl.col("what").is_in(["confirmed", "dismissed"]))
    assert said.height == 25, "an event was judged twice"
    assert said["event_id"].n_unique() == 25
    judged = dict(said.select("event_id", "to").iter_rows())
    assert dict(store.events().select("event_id", "human_state").iter_rows()) == judged
    comments = Counter(trail.drop_nulls("comment")["event_id"].to_list())
    assert set(comments.values()) == {2}, "a comment was lost"
    assert set(store.events()["comments"]) == {2}
    store.close()


def test_a_first_start_waits_for_another_one(tmp_path: Path) -> None:
    """Somebody else is about to make the same file; SQLite alone would give up at once."""
    place = tmp_path / "store.db"
    other = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.5, other.rollback)
    release.start()
    store = EventStore(f"sqlite:///{place}")
    store.suppress({"series": "s0*", "reason": "test"}, actor="eva")
    release.join()
    assert store.suppressions().height == 1
    store.close()
    other.close()


def test_several_detectors_and_a_rule_at_once(url: str, tmp_path: Path) -> None:
    """Nobody made the tables before: they are made once, every event is new once, and a rule sees all or is seen."""
    write_events(tmp_path / "events.parquet", 30)
    roles = [("record", "detect"), ("record", "watch"), ("suppress", "eva")]
    printed = together(*(start(url, role, name, tmp_path / "events.parquet") for role, name in roles))
    assert sum(int(count) for lines in printed[:2] for count in lines[:-1]) == 30
    store = EventStore(url)
    events, trail = store.events(), store.log()
    assert events.height == 30
    assert trail.filter(pl.col("what") == "recorded").height == 30
    assert (events["end"] - events["start"]).unique().to_list() == [timedelta(hours=5)]
    silenced = events.filter(pl.col("suppressed_by").is_not_null())["series_id"].unique().to_list()
    assert silenced == ["s0"]
    assert events.filter(pl.col("series_id") == "s0")["suppressed_by"].null_count() == 0
    store.close()


NURSERY = """
import os, signal, sys
import polars as pl
from sqlalchemy import event
from tsforge.data.event_store import EventStore

url, table = sys.argv[1:3]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def live(role, moment):
    store = EventStore(url)

    def die_before(connection, cursor, statement, *_):
        if statement.startswith(moment):
            die()

    if moment == "COMMIT":
        event.listen(store.engine, "commit", die)
    else:
        event.listen(store.engine, "before_cursor_execute", die_before)
    if role == "record":
        store.record("plant", pl.read_parquet(table), source="killed", artifact="a")
    elif role == "act":
        store.set_state("event0000", "confirmed", actor="eva", comment="seen")
    elif role == "prune":
        store.prune("2027-01-01", actor="eva")

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        live(*line.strip().split("|"))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILLS = [
    ("record", "INSERT INTO tsf_events"),
    ("record", "INSERT INTO tsf_event_log"),
    ("record", "COMMIT"),
    ("act", "INSERT INTO tsf_event_log"),
    ("act", "COMMIT"),
    ("prune", "DELETE FROM tsf_events"),
    ("prune", "COMMIT"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="forks a preloaded process")
def test_killed_in_the_middle(url: str, tmp_path: Path) -> None:
    """SIGKILL between the statements of a change: all of it is undone, and the next process completes it."""
    table = write_events(tmp_path / "events.parquet", 40)
    store = EventStore(url)
    store.record("plant", table.head(1).with_columns(state=pl.lit("closed")), source="first", artifact="a")
    before = store.events(), store.log()
    command = [sys.executable, "-c", NURSERY, url, str(tmp_path / "events.parquet")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for role, moment in KILLS:
            nursery.stdin.write(f"{role}|{moment}\n")
            nursery.stdin.flush()
            assert nursery.stdout.readline() == f"-{signal.SIGKILL:d}\n", (role, moment)
            assert store.events().equals(before[0]), (role, moment)
            assert store.log().equals(before[1]), (role, moment)
        nursery.stdin.close()
    assert store.record("plant", table, source="again", artifact="a").new == 39
    store.set_state("event0000", "confirmed", actor="eva", comment="seen")
    assert store.log().height == 41
    if url.startswith("sqlite"):
        engine = create_engine(url)
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
        engine.dispose()
    store.close()
