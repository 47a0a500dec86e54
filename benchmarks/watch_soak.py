"""Millions of rows through ``tsforge watch``, killed and restarted on the way: memory, pace, lost and doubled events.

    python benchmarks/watch_soak.py --rows 10000000 --output benchmarks/results

Files of 4 series x 3 variates, one row a minute, are dropped into a folder as they are taken. The watch (a closed-form
linear model, the default rule) runs as the command line runs it; in the first half of the rows its process is killed
with SIGKILL at random moments and started again, in the second half it is left alone, so that its memory can be seen
over time. The truth is one detector in one process that nobody disturbs and that gets the same rows in other pieces,
and batch detection (``detect``) over the first of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import find_artifact
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.app.watch.settings import WatchConfig
from tsforge.app.watch.status import watch_status
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import to_yaml, validate
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.watch_state import WatchState

FIRST = datetime(2020, 1, 1, tzinfo=UTC)
NAMES, VARIATES = ("a", "b", "c", "d"), ("x", "y", "z")
HISTORY = 12_000  # minutes of every series before the watch
FILES_AHEAD = 4
ODD_PIECE = 70_000  # rows that the undisturbed detector gets at a time


def part(start: int, stop: int) -> pl.DataFrame:
    """Return long rows of minutes [start, stop): daily waves, noise, a spike or a shift about every 3,000 minutes."""
    minutes = np.arange(start, stop)
    times = pl.Series("time", FIRST.timestamp() * 1e6 + minutes * 60e6).cast(pl.Int64).cast(pl.Datetime("us", "UTC"))
    tables = []
    for place, name in enumerate(NAMES):
        generator = np.random.default_rng([start, place])
        level = np.sin(2 * np.pi * (minutes + 200 * place) / 1440)
        columns = {
            v: 5 * (k + 1) + (k + 1) * level + 0.3 * generator.standard_normal(len(minutes))
            for k, v in enumerate(VARIATES)
        }
        if start >= HISTORY:
            for at in generator.choice(len(minutes), max(1, len(minutes) // 3000), replace=False):
                length = int(generator.integers(1, 20))
                columns[VARIATES[int(generator.integers(3))]][at : at + length] += generator.choice((-4.0, 4.0))
        tables.append(pl.DataFrame({"series_id": name, "time": times, **columns}))
    return pl.concat(tables).sort("time", "series_id")


def set_up(home: Path) -> tuple[Workspace, Artifact]:
    """Ingest the history and fit a closed-form model."""
    workspace = Workspace(
        root=home, database_url=f"sqlite:///{home / 'store.db'}", tracking_uri=f"sqlite:///{home / 'mlflow.db'}"
    )
    (home / "incoming").mkdir(parents=True)
    part(0, HISTORY).write_parquet(home / "history.parquet")
    source = {"kind": "parquet", "path": str(home / "history.parquet")}
    data = {"name": "soak", "source": source, "layout": "long", "series": "series_id", "time": "time", "freq": "1m"}
    ends = [(FIRST + timedelta(minutes=minutes)).isoformat() for minutes in (6_000, 8_000, 9_000)]
    config = {
        "data": data,
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 4},
        "split": {"kind": "times", "ends": ends},
        "tracking": {"enabled": False},
    }
    ingest(validate(IngestConfig, {"data": data}), workspace)
    return workspace, fit(validate(FitConfig, config), workspace).artifact


class Feeder:
    """Drops files into the folder while few wait there, and removes those that were read."""

    def __init__(self, home: Path, given: argparse.Namespace) -> None:
        self.home = home
        self.left = list(starts(given))

    def feed(self) -> None:
        """Bring the folder up to date."""
        folder, state = self.home / "incoming", self.home / "watch" / "soak" / "state.db"
        if state.is_file():
            with closing(WatchState(state, read_only=True)) as seen:
                for name in seen.files() if seen.snapshot() is not None else ():
                    (folder / name).unlink(missing_ok=True)
        while self.left and len(list(folder.glob("*.parquet"))) < FILES_AHEAD:
            start, stop = self.left.pop(0)
            hidden = folder / ".next"
            part(start, stop).write_parquet(hidden)
            hidden.rename(folder / f"{start:012d}.parquet")


def resident(pid: int) -> float | None:
    """Return the resident memory of a process in MiB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) / 1024 if lines else None


def run(home: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Feed the watch, kill it in the first half, let it run in the second; return what was seen."""
    generator = random.Random(given.seed)
    workspace = Workspace.open(home)
    feeder = Feeder(home, given)
    samples: list[dict[str, float]] = []
    started, kills, taken = time.monotonic(), 0, 0
    log = (home / "turns.jsonl").open("ab")
    errors = (home / "errors").open("ab")
    child: subprocess.Popen[bytes] | None = None
    born = until = 0.0
    at_kill = [round(given.rows / 2 * (k + 1) / (given.kills + 1)) for k in range(given.kills)]
    while taken < given.rows:
        feeder.feed()
        if child is None or child.poll() is not None:
            if child is not None and child.returncode not in (-signal.SIGKILL, 0):
                raise SystemExit(f"the watch ended with {child.returncode}:\n{(home / 'errors').read_text()[-2000:]}")
            command = [
                sys.executable,
                "-m",
                "tsforge",
                "--log-level",
                "warning",
                "watch",
                str(home / "soak.yaml"),
                "--json",
            ]
            child = subprocess.Popen(command, stdout=log, stderr=errors, env={**os.environ, "TSFORGE_HOME": str(home)})
            born = time.monotonic()
        time.sleep(0.5)
        memory = resident(child.pid)
        if (home / "watch" / "soak" / "state.db").is_file():
            with closing(WatchState(home / "watch" / "soak" / "state.db", read_only=True)) as state:
                snapshot = state.snapshot()
            taken = 0 if snapshot is None else snapshot.facts["rows_taken"]
        if memory is not None:
            age = time.monotonic() - born
            samples.append(
                {"seconds": time.monotonic() - started, "rows": taken, "mib": memory, "life": kills, "age": age}
            )
        if kills < given.kills and taken >= at_kill[kills]:
            until = until or time.monotonic() + generator.uniform(0.0, 2.0)
            if time.monotonic() >= until:
                child.kill()
                child.wait()
                kills, until = kills + 1, 0.0
    seconds = time.monotonic() - started
    assert child is not None
    child.send_signal(signal.SIGTERM)
    status = child.wait(timeout=120)
    log.close()
    errors.close()
    facts = watch_status("soak", workspace)
    return {"seconds": seconds, "kills": kills, "last_status": status, "samples": samples, "facts": facts}


def undisturbed(
    workspace: Workspace, artifact: Artifact, settings: DetectConfig, given: argparse.Namespace
) -> dict[Any, Any]:
    """Return the transitions of one detector that takes the rows in odd pieces."""
    frame = load_dataset(workspace, "soak")
    detector = OnlineDetector.start(artifact, frame, settings)
    found: dict[Any, Any] = {}
    parts = list(starts(given))
    left = None
    for start, stop in parts:
        table = part(start, stop)
        left = table if left is None else pl.concat([left, table])
        while left.height >= ODD_PIECE or (start == parts[-1][0] and left.height):
            result = detector.update(left.head(ODD_PIECE))
            left = left.slice(ODD_PIECE)
            for name, events in (("opened", result.opened), ("closed", result.closed)):
                found |= {(row["event_id"], name): row for row in events.iter_rows(named=True)}
    return found


def compare(home: Path, truth: dict[Any, Any]) -> dict[str, Any]:
    """Return how the file of lines differs from the truth."""
    lines = [json.loads(line) for line in (home / "events.jsonl").read_text().splitlines()]
    counts = Counter((line["event_id"], line["transition"]) for line in lines)
    differing = 0
    for line in lines:
        row = truth.get((line["event_id"], line["transition"]))
        if row is not None and line["transition"] == "closed":
            same = datetime.fromisoformat(line["end"]) == row["end"] and line["length"] == row["length"]
            differing += not (same and abs(line["peak_score"] - row["peak_score"]) <= 1e-9 * row["peak_score"])
    return {
        "transitions": len(lines),
        "lost": len(truth.keys() - counts.keys()),
        "doubled": sum(count > 1 for count in counts.values()),
        "made_up": len(counts.keys() - truth.keys()),
        "differing": differing,
    }


def starts(given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Yield first minute and end of every file."""
    step, stop = given.file_rows // len(NAMES), HISTORY + given.rows // len(NAMES)
    for start in range(HISTORY, stop, step):
        yield start, min(start + step, stop)


def batch(
    workspace: Workspace, artifact: Artifact, settings: DetectConfig, home: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Return how the lines differ from batch detection over the first rows (events that ended in them)."""
    frame = load_dataset(workspace, "soak")
    rows = min(given.batch_rows, given.rows)
    stop = HISTORY + rows // len(NAMES)
    parts = [part(start, end).select(frame.table.columns) for start, end in starts(given) if start < stop]
    end = FIRST + timedelta(minutes=stop - 1)
    whole = SeriesFrame(pl.concat([frame.table, *parts]).filter(pl.col("time") <= end), frame.schema)
    report = detect(artifact, whole, settings, start=FIRST + timedelta(minutes=HISTORY))
    events = {row["event_id"]: row for row in report.events.filter(state="closed").iter_rows(named=True)}
    lines = [json.loads(line) for line in (home / "events.jsonl").read_text().splitlines()]
    told = {line["event_id"]: line for line in lines if line["transition"] == "closed"}
    early = {name for name, line in told.items() if datetime.fromisoformat(line["end"]) < end - timedelta(minutes=60)}
    wrong = sum(
        datetime.fromisoformat(told[name]["end"]) != row["end"]
        or abs(told[name]["peak_score"] - row["peak_score"]) > 1e-9 * row["peak_score"]
        for name, row in events.items()
        if name in told
    )
    return {
        "rows": rows,
        "events": len(events),
        "lost": len(events.keys() - told.keys()),
        "made_up": len(early - events.keys()),
        "differing": wrong,
    }


def summarise(seen: dict[str, Any], home: Path, rows: int) -> dict[str, Any]:
    """Return memory over the undisturbed half, and the pace."""
    of_life = [item for item in seen["samples"] if item["life"] == seen["kills"]]
    last = [item for item in of_life if item["rows"] > of_life[0]["rows"]]  # imports are no growth
    working = [item for item in seen["samples"] if item["mib"] > 0.8 * statistics.median(one["mib"] for one in last)]
    turns = [json.loads(line) for line in (home / "turns.jsonl").read_text().splitlines() if line.endswith("}")]
    busy = [turn["seconds"] for turn in turns if turn.get("rows_taken") and "seconds" in turn]
    cut = max(1, len(last) // 4)
    early = statistics.median(item["mib"] for item in last[:cut])
    late = statistics.median(item["mib"] for item in last[-cut:])
    return {
        "memory": {
            "rows_of_the_undisturbed_stretch": int(last[-1]["rows"] - last[0]["rows"]),
            "samples_of_it": len(last),
            "first_quarter_mib": round(early, 1),
            "last_quarter_mib": round(late, 1),
            "growth_mib_per_million_rows": round(
                (late - early) / max(1e-9, 0.75 * (last[-1]["rows"] - last[0]["rows"]) / 1e6), 2
            ),
            "peak_mib": round(max(item["mib"] for item in seen["samples"]), 1),
        },
        "seconds": round(seen["seconds"], 1),
        "rows_per_second": round(rows / seen["seconds"]),
        "rows_per_second_of_a_turn": round(
            statistics.median(
                turn["rows_taken"] / turn["seconds"] for turn in turns if turn.get("rows_taken") and turn.get("seconds")
            )
        ),
        "turns": len(busy),
        "curve": [
            {"rows": int(item["rows"]), "mib": round(item["mib"], 1), "life": int(item["life"])}
            for item in working[:: max(1, len(working) // 40)]
        ],
    }


def page(record: dict[str, Any]) -> str:
    """Return the result as a page."""
    memory, truth, first = record["memory"], record["against_undisturbed"], record["against_batch"]
    rows = [f"| {item['rows']:,} | {item['mib']} | {item['life'] + 1} |" for item in record["curve"]]
    return "\n".join(
        [
            f"# Soak of tsforge watch, {record['date']}",
            "",
            f"{record['machine']}, load {record['load'][0]} at the start and {record['load'][1]} at the end, Python "
            f"{record['python']}. {record['rows']:,} rows, {record['kills']} kills (SIGKILL) in the first half, chunks "
            f"of {record['chunk_rows']:,}; {record['seconds']:.0f} s, {record['rows_per_second']:,} rows a second with "
            f"restarts and feeding ({record['rows_per_second_of_a_turn']:,} within a turn, median).",
            "",
            f"Events: {truth['transitions']:,} transitions; lost {truth['lost']}, doubled {truth['doubled']}, made up "
            f"{truth['made_up']}, differing {truth['differing']} against one undisturbed detector over the same rows "
            f"in other pieces. Against batch detection over the first {first['rows']:,} rows: {first['events']:,} "
            f"events, lost {first['lost']}, made up {first['made_up']}, differing {first['differing']}.",
            "",
            f"Memory of the last process, over {memory['rows_of_the_undisturbed_stretch']:,} rows: "
            f"{memory['first_quarter_mib']} MiB in its first quarter, {memory['last_quarter_mib']} MiB in its last "
            f"({memory['growth_mib_per_million_rows']} MiB a million rows); peak of all {memory['peak_mib']} MiB.",
            "",
            "| rows taken | resident MiB | process |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Run the soak and write the dated result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--chunk-rows", type=int, default=50_000)
    parser.add_argument("--file-rows", type=int, default=500_000)
    parser.add_argument("--batch-rows", type=int, default=800_000, help="first rows that batch detection judges too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.file_rows = min(given.file_rows, max(len(NAMES), given.rows // 10))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="tsforge_soak_") as folder:
        home = Path(folder) / "home"
        workspace, artifact = set_up(home)
        settings = DetectConfig()
        source = {"kind": "folder", "path": str(home / "incoming"), "settle_seconds": 0}
        sinks = {"log": {"kind": "jsonl", "path": str(home / "events.jsonl")}, "store": {"kind": "store"}}
        plain = {"source": source, "sinks": sinks, "chunk_rows": given.chunk_rows, "poll_seconds": 0.2}
        (home / "soak.yaml").write_text(to_yaml(validate(WatchConfig, plain)))
        seen = run(home, given)
        artifact = load_artifact(find_artifact("latest", workspace))
        truth = undisturbed(workspace, artifact, settings, given)
        record = {
            "question": "does a watch that is killed and restarted lose or double an event, and does it grow?",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} {platform.machine()} cores",
            "python": platform.python_version(),
            "rows": given.rows,
            "chunk_rows": given.chunk_rows,
            "seed": given.seed,
            "kills": seen["kills"],
            "exit_status": seen["last_status"],
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            "rows_taken": seen["facts"]["rows_taken"],
            "late": seen["facts"]["late"],
            "refused": seen["facts"]["refused"],
            **summarise(seen, home, given.rows),
            "against_undisturbed": compare(home, truth),
            "against_batch": batch(workspace, artifact, settings, home, given),
        }
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        path = given.output / f"watch_soak_cpu{os.cpu_count()}_{record['date']}"
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(page(record))
    flaws = [record["against_undisturbed"], record["against_batch"]]
    bad = sum(item.get(name, 0) for item in flaws for name in ("lost", "doubled", "made_up", "differing"))
    sys.exit(1 if bad or record["rows_taken"] != given.rows else 0)


if __name__ == "__main__":
    main()
