"""kill -9 at chosen moments of a watch: is an event lost, told twice, or told differently?

    python benchmarks/kill_watch.py --kills 60 [--source folder|sql] [--sink-url postgresql+psycopg://...] [--guard]

A watch takes new rows in small chunks and tells its events to four sinks at once: a file of JSON lines, a SQL table,
the event store, and a webhook on a real HTTP server that now and then takes a delivery and answers nothing. Each run of
it is a process that kills itself with SIGKILL at a moment drawn from those that matter (before and after a commit, an
acknowledgement, a delivery, a flush to disk, an update of the detector, the naming of incidents, in the middle of a
line), until one run gets to the end. Judged with the standard library against batch detection over the same rows:

* file: every transition once, numbers rising; table: one row a transition; webhook: the idempotency key names the
  transition, a second delivery says the same
* event store: one row and one line of the trail an event; incidents whose events have all ended are those of the batch
* an event that ended has the span, peak and length of the batch event; one that is open there was opened here

Children are forked from a process that has loaded torch and runs a single thread, so that a kill hits the work.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import importlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
HISTORY, NEW, PER_FILE, CHUNK = 24 * 60, 24 * 16, 24 * 2, 66  # hours a series; hours in a file; rows of a chunk
SECRET = "kept in the environment"
DETECTOR = {"rule": {"kind": "quantile", "alpha": 0.004}, "events": {"group_by": "all", "group_gap": 2}}
KINDS = ("opened", "closed")
AROUND = ("commit", "acknowledge", "update", "send", "fsync", "name_incidents")
MOMENTS = ("half a line", *(f"{when} {name}" for name in AROUND for when in ("before", "after")))
BETWEEN = "between the halves"


# --- work done in children -------------------------------------------------------------------------------------------


def rows(start: int, stop: int) -> Any:
    """Return long rows of hours [start, stop) of two machines: waves and noise, spikes, shifts, a missing stretch."""
    import numpy as np
    import polars as pl

    hours = np.arange(HISTORY + NEW)
    tables = []
    for place, name in enumerate(("a", "b")):
        noise = np.random.default_rng(place).standard_normal((2, len(hours)))
        x = 10 + 3 * np.sin(2 * np.pi * (hours + 5 * place) / 24) + 0.3 * noise[0]
        y = 20 + 0.8 * x + 0.3 * noise[1]
        for at in range(HISTORY + 11 + 3 * place, HISTORY + NEW, 41):
            x[at] += 6.0
        for at in range(HISTORY + 30 + place, HISTORY + NEW, 67):
            y[at : at + 7] += 5.0
        x[HISTORY + 120 : HISTORY + 126] = np.nan
        times = [FIRST + timedelta(hours=int(hour)) for hour in hours]
        tables.append(pl.DataFrame({"machine": name, "ts": times, "x": x, "y": y}).fill_nan(None)[start:stop])
    return pl.concat(tables).sort("ts", "machine")


def workspace(home: Path) -> Any:
    """Return the workspace in a folder."""
    from tsforge.core.workspace import Workspace

    return Workspace(
        root=home, database_url=f"sqlite:///{home / 'store.db'}", tracking_uri=f"sqlite:///{home / 'mlflow.db'}"
    )


def set_up(home: Path) -> None:
    """Ingest the history, fit a closed-form model, lay out the new rows as files and as a table."""
    import polars as pl

    from tsforge.app.fit import FitConfig, fit
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate

    (home / "incoming").mkdir(parents=True)
    rows(0, HISTORY).write_parquet(home / "history.parquet")
    source = {"kind": "parquet", "path": str(home / "history.parquet")}
    data = {"name": "plant", "source": source, "layout": "long", "series": "machine", "time": "ts", "freq": "1h"}
    ends = [(FIRST + timedelta(days=days)).isoformat() for days in (25, 35, 40)]
    config = {
        "data": data,
        "model": {"name": "linear"},
        "window": {"context_length": 36, "horizon": 4},
        "split": {"kind": "times", "ends": ends},
        "tracking": {"enabled": False},
    }
    ingest(validate(IngestConfig, {"data": data}), workspace(home))
    fit(validate(FitConfig, config), workspace(home))
    for start in range(HISTORY, HISTORY + NEW, PER_FILE):
        part = rows(start, start + PER_FILE)
        kind = ("csv", "parquet", "jsonl")[start // PER_FILE % 3]
        path = home / "incoming" / f"{start:06d}.{kind}"
        if kind == "csv":
            part.write_csv(path)
        elif kind == "parquet":
            part.write_parquet(path)
        else:
            part.with_columns(pl.col("ts").dt.to_string("iso:strict")).write_ndjson(path)
    (home / "incoming" / "000000_bad.csv").write_text("machine,ts,x\na,2026-01-01,1\n")
    new = rows(HISTORY, HISTORY + NEW)
    with sqlite3.connect(home / "readings.db") as connection:
        connection.execute("CREATE TABLE readings (id INTEGER PRIMARY KEY, machine TEXT, ts TEXT, x REAL, y REAL)")
        lines = [(row[0], row[1].isoformat(), row[2], row[3]) for row in new.iter_rows()]
        connection.executemany("INSERT INTO readings (machine, ts, x, y) VALUES (?, ?, ?, ?)", lines)
    connection.close()


def detector(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the detector, as in YAML."""
    return DETECTOR | ({"guard": True} if given.guard else {})


def settings(home: Path, given: argparse.Namespace, port: int) -> dict[str, Any]:
    """Return the watch, as in YAML."""
    mapping = {"time": "ts", "series": "machine"}
    source: dict[str, Any] = {"kind": "folder", "path": str(home / "incoming"), "settle_seconds": 0, "rows": mapping}
    if given.source == "sql":
        place = {"path": str(home / "readings.db"), "table": "readings", "key": "id"}
        source = {"kind": "sql", **place, "settle_seconds": 0, "rows": mapping}
    table = {"url": given.sink_url} if given.sink_url else {"path": str(home / "events.db")}
    hook = {"url": f"http://127.0.0.1:{port}/events", "secret_env": "WATCH_SECRET", "timeout_seconds": 1.0}
    return {
        "source": source,
        "chunk_rows": CHUNK,
        "detector": detector(given),
        "sinks": {
            "file": {"kind": "jsonl", "path": str(home / "events.jsonl")},
            "table": {"kind": "sql", **table},
            "store": {"kind": "store"},
            "hook": {"kind": "webhook", **hook, "tries": 50, "backoff_seconds": 0.01, "max_backoff_seconds": 0.05},
        },
    }


class Moments:
    """Counts the moments that matter and kills the process at one of them: a name, and which of that name."""

    def __init__(self, deadly: tuple[str, int], note: Path) -> None:
        self.name, self.left = deadly
        self.note = note

    def pass_by(self, name: str, before_death: Callable[[], None] | None = None) -> None:
        """Count a moment; die in it if it is the chosen one."""
        self.left -= name == self.name
        if name == self.name and self.left == 0:
            self.note.write_text(name)
            if before_death is not None:
                before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Let a function or method pass a moment before and after."""
        inner = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            self.pass_by(f"before {name}")
            found = inner(*given, **named)
            self.pass_by(f"after {name}")
            return found

        setattr(owner, name, outer)

    def watch_lines(self, owner: Any) -> None:
        """Let the sink of lines pass a moment in which half of a line reaches the file."""
        inner = owner.send

        def outer(sink: Any, items: Any, mark: int) -> int:
            def tear() -> None:
                with sink._path.open("ab") as handle:
                    whole = items[0].record.encode()
                    handle.write(whole[: len(whole) // 2])

            self.pass_by("half a line", tear)
            return int(inner(sink, items, mark))

        owner.send = outer


def run_watch(config: dict[str, Any], home: Path, deadly: tuple[str, int], saboteur: str | None) -> None:
    """Run the watch to its end, or to the deadly moment."""
    from tsforge.anomaly.online import OnlineDetector
    from tsforge.app.watch import sinks
    from tsforge.app.watch.run import watch
    from tsforge.app.watch.settings import WatchConfig
    from tsforge.core.config import validate
    from tsforge.data import event_store
    from tsforge.data.watch_state import WatchState

    if saboteur == "late_outbox":  # not one transaction: what the judge must notice
        whole = WatchState.commit

        def parted(self: Any, *, transitions: Any = (), **named: Any) -> None:
            whole(self, **named)
            moments.pass_by(BETWEEN)
            whole(self, transitions=transitions, **(named | {"detector": None, "files": (), "refusals": ()}))

        WatchState.commit = parted
    moments = Moments(deadly, home / "moment")
    for owner, names in (
        (WatchState, ("commit", "acknowledge")),
        (OnlineDetector, ("update",)),
        (sinks.SqlTable, ("send",)),
        (sinks.StoredEvents, ("send",)),
        (event_store, ("name_incidents",)),
        (sinks.Webhook, ("send",)),
        (os, ("fsync",)),
    ):
        for name in names:
            moments.around(owner, name)
    moments.watch_lines(sinks.JsonlFile)
    watch(validate(WatchConfig, config), workspace(home), once=True)


def truth(home: Path, detection: dict[str, Any]) -> None:
    """Write what batch detection finds over the same rows, and how many rows its guard hid."""
    import polars as pl

    from tsforge.anomaly.config import DetectConfig
    from tsforge.anomaly.detector import detect
    from tsforge.app.forecast import find_artifact
    from tsforge.artifact import load_artifact
    from tsforge.core.config import validate
    from tsforge.data.frame import SeriesFrame

    artifact = load_artifact(find_artifact("latest", workspace(home)))
    table = rows(0, HISTORY + NEW).rename({"machine": "series_id", "ts": "time"})
    frame = SeriesFrame(table.with_columns(pl.col("time").cast(pl.Datetime("us", "UTC"))), artifact.schema)
    start = FIRST + timedelta(hours=HISTORY)
    report = detect(artifact, frame, validate(DetectConfig, detection), start=start)
    names = ("event_id", "series_id", "start", "end", "peak_score", "length", "state", "incident_id")
    found = [{name: row[name] for name in names} for row in report.events.iter_rows(named=True)]
    hidden = sum(facts.get("rows_guarded", 0) for facts in report.metadata["series"].values())
    (home / "rows_guarded").write_text(str(hidden))
    (home / "truth.json").write_text(json.dumps(found, default=lambda value: value.isoformat()))


def serve(listening: socket.socket, log: Path, seed: int) -> None:
    """Take deliveries: log them, check the signature, and leave every ninth without an answer."""
    generator = random.Random(seed)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            signed = self.headers["X-Tsforge-Timestamp"].encode() + b"." + body
            good = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
            is_signed = self.headers["X-Tsforge-Signature"] == f"sha256={good}"
            with log.open("a", encoding="utf-8") as handle:
                line = {"key": self.headers["Idempotency-Key"], "signed": is_signed, "body": json.loads(body)}
                handle.write(json.dumps(line) + "\n")
            if generator.random() < 1 / 9:
                self.close_connection = True
                return
            self.send_response(503 if generator.random() < 1 / 9 else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.serve_forever()


# --- processes -------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a child and return its process id; what it says goes to ``log``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        os._exit(0)
    finally:  # reached after an error only: the child must never return into the parent's code
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int) -> int:
    """Return the exit status of a child (negative = the signal that ended it)."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def must(work: Callable[[], None], log: Path) -> None:
    """Run ``work`` in a child and stop if it fails."""
    if wait(fork(work, log)) != 0:
        raise SystemExit(f"a step that must succeed did not:\n{log.read_text()[-3000:]}")


def preload() -> None:
    """Load what takes long and starts no thread; refuse to fork a process with threads."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"
    os.environ["WATCH_SECRET"] = SECRET
    for name in ("torch", "scipy.stats", "sqlalchemy.dialects.sqlite", "pydantic", "hydra", "tsforge.core.config"):
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"{threads} threads after the imports; forking would not be safe")


# --- judgement with the standard library -----------------------------------------------------------------------------


def expected(home: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the transitions that must be told, with the batch event of each."""
    found = {}
    for event in json.loads((home / "truth.json").read_text()):
        for kind in KINDS if event["state"] == "closed" else KINDS[:1]:
            found[event["event_id"], kind] = event
    return found


def compare(name: str, told: list[dict[str, Any]], wanted: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Return every flaw of what a sink was told."""
    counts = Counter((record["event_id"], record["transition"]) for record in told)
    flaws = [f"{name}: {key} told {count} times" for key, count in counts.items() if count > 1]
    flaws += [f"{name}: {key} lost" for key in wanted if key not in counts]
    flaws += [f"{name}: {key} told, but not found by batch detection" for key in counts if key not in wanted]
    for record in told:
        event = wanted.get((record["event_id"], record["transition"]))
        fixed = ["series_id", "start"] if record["transition"] == "opened" else ["series_id", "start", "end", "length"]
        if event is not None:
            wrong = [key for key in fixed if str(record[key]) != str(event[key])]
            if record["transition"] == "closed":
                near = abs(record["peak_score"] - event["peak_score"]) <= 1e-9 * abs(event["peak_score"])
                wrong += [] if near else ["peak_score"]
            flaws += [f"{name}: {record['event_id']} {record['transition']} differs in {key}" for key in wrong]
    return flaws


def told_by_table(home: Path, url: str | None) -> list[dict[str, Any]]:
    """Return the rows of the SQL sink by plain SQL."""
    names = ("event_id", "transition", "series_id", "start", "end", "length", "peak_score")
    columns = ", ".join(f'"{name}"' for name in names)
    query = f"SELECT {columns} FROM tsforge_events"  # noqa: S608 - fixed names
    if url is None:
        connection: Any = sqlite3.connect(home / "events.db")
    else:
        import psycopg

        connection = psycopg.connect(url.replace("postgresql+psycopg", "postgresql"))
    try:
        cursor = connection.cursor()
        cursor.execute(query)
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    finally:
        connection.close()


def compare_store(home: Path) -> tuple[list[str], dict[str, Any]]:
    """Return every flaw of the event store, and how many incidents it must have."""
    with sqlite3.connect(home / "store.db") as connection:
        stored = {
            name: (state, incident)
            for name, state, incident in connection.execute("SELECT event_id, state, incident_id FROM tsf_events")
        }
        query = "SELECT event_id, what, count(*) FROM tsf_event_log GROUP BY event_id, what HAVING count(*) > 1"
        flaws = [f"store: {name} {what} {count} times" for name, what, count in connection.execute(query)]
    connection.close()
    events = json.loads((home / "truth.json").read_text())
    wanted = {event["event_id"]: (event["state"], event["incident_id"]) for event in events}
    growing = {incident for state, incident in wanted.values() if state != "closed"}  # grow untold until they end
    flaws += [f"store: {name} lost" for name in wanted if name not in stored]
    flaws += [f"store: {name} told, but not found by batch detection" for name in stored if name not in wanted]
    for name in stored.keys() & wanted.keys():
        if stored[name][0] != wanted[name][0]:
            flaws.append(f"store: {name} is {stored[name][0]}, not {wanted[name][0]}")
        elif wanted[name][1] not in growing and stored[name][1] != wanted[name][1]:
            flaws.append(f"store: {name} is in incident {stored[name][1]}, not {wanted[name][1]}")
    over = [incident for _, incident in wanted.values() if incident not in growing]
    return flaws, {"incidents_over": len(set(over)), "events_in_them": len(over)}


def judge(home: Path, sink_url: str | None) -> tuple[list[str], dict[str, Any]]:
    """Return every flaw, and what was seen."""
    wanted = expected(home)
    lines = [json.loads(line) for line in (home / "events.jsonl").read_text().splitlines()]
    flaws = compare("file", lines, wanted)
    numbers = [line["seq"] for line in lines]
    if numbers != sorted(set(numbers)):
        flaws.append("file: sequence numbers do not rise")
    flaws += compare("table", told_by_table(home, sink_url), wanted)
    received = [json.loads(line) for line in (home / "received").read_text().splitlines()]
    by_key: dict[str, dict[str, Any]] = {}
    for item in received:
        if not item["signed"]:
            flaws.append(f"webhook: {item['key']} has a wrong signature")
        if by_key.setdefault(item["key"], item["body"]) != item["body"]:
            flaws.append(f"webhook: {item['key']} says something else the second time")
    flaws += compare("webhook", list(by_key.values()), wanted)
    found, grouped = compare_store(home)
    seen = {"transitions": len(wanted), "webhook_deliveries": len(received), "webhook_keys": len(by_key)}
    return flaws + found, seen | grouped


# --- the benchmark ---------------------------------------------------------------------------------------------------


def one_round(home: Path, given: argparse.Namespace, generator: random.Random, moments: Counter[str], log: Path) -> int:
    """Run a watch, killed again and again, until it gets to the end; return its exit status."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        receiver = fork(lambda: serve(listening, home / "received", given.seed), log)
    config = settings(home, given, port)
    try:
        while True:
            deadly = ("", 0)
            if moments.total() < given.kills:
                deadly = (generator.choice(MOMENTS if given.saboteur is None else (BETWEEN,)), generator.randint(1, 4))
            status = wait(fork(partial(run_watch, config, home, deadly, given.saboteur), log))
            if status != -signal.SIGKILL:
                return status
            moments[(home / "moment").read_text()] += 1
    finally:
        os.kill(receiver, signal.SIGKILL)
        wait(receiver)


def in_schema(url: str, name: str, log: Path) -> str:
    """Return the address of a new schema of a PostgreSQL database, so that a round finds no table of another one."""

    def create() -> None:
        from sqlalchemy import create_engine
        from sqlalchemy.schema import CreateSchema

        with create_engine(url).begin() as connection:
            connection.execute(CreateSchema(name))

    must(create, log)
    return f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}"


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill a watch until it is through, start over with fresh state until there were enough kills; judge each."""
    generator, database = random.Random(given.seed), given.sink_url
    log, origin = folder / "log", folder / "origin"
    must(lambda: set_up(origin), log)
    must(lambda: truth(origin, detector(given)), log)
    flaws: list[str] = []
    moments: Counter[str] = Counter()
    rounds, seen = 0, {}
    while moments.total() < given.kills or not rounds:
        home = folder / f"round{rounds}"
        shutil.copytree(origin, home)
        rounds += 1
        if database is not None:
            given.sink_url = in_schema(database, f"kills_{os.getpid()}_{rounds}", log)
        status = one_round(home, given, generator, moments, log)
        if status != 0:
            flaws.append(f"round {rounds}: a run ended with {status}: {log.read_text()[-1500:]}")
            break
        found, seen = judge(home, given.sink_url)
        flaws += [f"round {rounds}: {flaw}" for flaw in found]
    return {
        "kills": moments.total(),
        "rounds": rounds,
        "rows_guarded": int((origin / "rows_guarded").read_text()),
        "killed": dict(moments.most_common()),
        "of_the_last_round": seen,
        "flaws": flaws,
    }


def main() -> None:
    """Run, print the record, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--source", choices=("folder", "sql"), default="folder")
    parser.add_argument("--sink-url", help="PostgreSQL of the SQL sink, a schema a round (default: SQLite)")
    parser.add_argument("--guard", action="store_true", help="hide the values of alarms from later forecasts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saboteur", choices=("late_outbox",), help="break the watch; the judge must notice")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="tsforge_watch_") as folder:
        result = measure(given, Path(folder))
    record = {
        "question": "does a watch killed at any moment lose an event, tell it twice, or tell it differently?",
        "source": given.source,
        "sink": "postgresql" if given.sink_url else "sqlite",
        "guard": given.guard,
        "seed": given.seed,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        **result,
    }
    text = json.dumps(record, indent=1)
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        kind = given.source + ("_guard" if given.guard else "") + ("_postgresql" if given.sink_url else "")
        name = f"kill_watch_{kind}_cpu{os.cpu_count()}_{record['date']}.json"
        (given.output / name).write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(1 if result["flaws"] else 0)


if __name__ == "__main__":
    main()
