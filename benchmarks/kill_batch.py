"""kill -9 at random moments of ingest and batch: is anything lost, doubled or half-written, does the next run finish?

    python benchmarks/kill_batch.py --kills 50 --output benchmarks/results

A source file grows by six hours per batch (and corrects old values). Each batch (ingest, check, forecast, detect,
publish) is a process of its own, killed up to three times in a row at uniformly random moments of its run; then it is
started once more and must finish. A twin workspace runs the same batches undisturbed. Judged with the standard library
alone (hashlib, json, sqlite3), after every kill and at the end:

* a published folder is absent or whole: every file of its manifest has the hash the manifest states
* after the next run: exactly one folder for the batch, no leftovers, the ledger says done
* at the end: files, events and stored rows equal those of the undisturbed twin

Children are forked from a process that has loaded torch and SciPy but runs a single thread, so that a kill hits the
work and not the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import random
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
FITTED_DAYS, STEP_HOURS = 50, 6
STAGES = ("ingest", "check", "forecast", "detect", "publish")


def batch_time(number: int) -> datetime:
    """Return the as_of of batch ``number``."""
    return FIRST + timedelta(days=FITTED_DAYS + 6, hours=STEP_HOURS * number)


def partition_name(number: int) -> str:
    """Return the folder name of batch ``number``."""
    return batch_time(number).strftime("as_of=%Y-%m-%dT%H-%M-%SZ")


# --- work done in children -------------------------------------------------------------------------------------------


def write_source(home: Path, number: int) -> None:
    """Write the source as it is when batch ``number`` runs: history up to its as_of, old values corrected."""
    import numpy as np
    import polars as pl

    rows = int((batch_time(number) - FIRST).total_seconds() // 3600) + 1
    hours = np.arange(rows)
    generator = np.random.default_rng(11)
    noise = generator.standard_normal((4, 24 * 400))
    columns: dict[str, Any] = {"ds": [FIRST + timedelta(hours=int(hour)) for hour in hours]}
    for place, name in enumerate(("a.x", "a.y", "b.x", "b.y")):
        wave = np.sin(2 * np.pi * (hours + 3 * place) / 24) + 0.5 * np.sin(2 * np.pi * hours / 168 + place)
        columns[name] = 10 * (place + 1) + 3 * wave + 0.3 * noise[place, :rows]
        columns[name][24 * 57 + 5 :: 24 * 5] += 12.0  # an anomaly every five days
    for past in range(number + 1):
        columns["b.y"][24 * 52 + past] += 1.0
    temporary = home.parent / f".{home.name}.parquet"
    pl.DataFrame(columns).write_parquet(temporary)
    temporary.replace(home.parent / f"{home.name}.parquet")


def settings(home: Path) -> dict[str, Any]:
    """Return the data set of a workspace, as in YAML."""
    source = {"kind": "parquet", "path": str(home.parent / f"{home.name}.parquet")}
    return {"name": "plant", "source": source, "separator": ".", "freq": "1h"}


def workspace(home: Path) -> Any:
    """Return the workspace in a folder."""
    from tsforge.core.workspace import Workspace

    return Workspace(
        root=home, database_url=f"sqlite:///{home / 'store.db'}", tracking_uri=f"sqlite:///{home / 'mlflow.db'}"
    )


def set_up(home: Path) -> None:
    """Ingest the history and fit a closed-form model."""
    from tsforge.app.fit import FitConfig, fit
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate

    home.mkdir(parents=True)
    write_source(home, 0)
    ends = [(FIRST + timedelta(days=days)).isoformat() for days in (FITTED_DAYS - 10, FITTED_DAYS, FITTED_DAYS + 2)]
    config = {
        "data": settings(home),
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 12},
        "split": {"kind": "times", "ends": ends},
        "tracking": {"enabled": False},
    }
    ingest(validate(IngestConfig, {"data": settings(home)}), workspace(home))
    artifact = fit(validate(FitConfig, config), workspace(home)).artifact
    (home / "model").write_text(artifact.id)


def run_one(home: Path, number: int, ready: Callable[[], None], log: Path) -> None:
    """Run batch ``number``; ``ready`` is called when everything is imported and the clock may start."""
    import pipelines.batch_forecast  # noqa: F401
    from tsforge.app.batch import BatchConfig, run_batch
    from tsforge.core.config import validate
    from tsforge.core.logs import configure_logging

    write_source(home, number)
    config = validate(
        BatchConfig,
        {
            "name": "daily",
            "data": settings(home),
            "model": (home / "model").read_text(),
            "detect": {"span": "3d"},
            "checks": [{"kind": "fresh", "max_age": "1h"}],
        },
    )
    stream = log.open("w", buffering=1)
    sys.stderr = stream
    configure_logging(as_json=True)
    ready()
    run_batch(config, batch_time(number), workspace(home))


def run_twin(home: Path, batches: int) -> None:
    """Run the same batches undisturbed, each on the source as it was then."""
    for number in range(batches):
        run_one(home, number, lambda: None, home.parent / "twin.log")


def stored_fingerprint(home: Path, result: Path) -> None:
    """Write what the store holds: rows, and a hash over all values."""
    from tsforge.app.ingest import load_dataset

    frame = load_dataset(workspace(home), "plant")
    result.write_text(json.dumps({"rows": frame.num_rows, "fingerprint": frame.fingerprint()}))


# --- processes -------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child and return its process id; its exit status is 0 when ``work`` returns."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:  # reached after an error only: the child must never return into the parent's code
        traceback.print_exc()
        os._exit(1)


def wait(pid: int) -> int:
    """Return the exit status of a child (negative = the signal that ended it)."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a child and stop the benchmark if it fails."""
    status = wait(fork(work))
    if status != 0:
        raise SystemExit(f"a step that must succeed ended with {status}")


def run_batch_process(home: Path, number: int, log: Path, kill_after: float | None) -> tuple[int, float]:
    """Run batch ``number`` in a process, killed ``kill_after`` seconds after it is ready; return status and seconds."""
    reader, writer = os.pipe()

    def work() -> None:
        os.close(reader)
        run_one(home, number, lambda: os.close(writer), log)

    pid = fork(work)
    os.close(writer)
    os.read(reader, 1)  # end of file: everything is imported, or the child is gone
    os.close(reader)
    started = time.monotonic()
    if kill_after is not None:
        watch = os.pidfd_open(pid)
        if not select.select([watch], [], [], kill_after)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(watch)
    return wait(pid), time.monotonic() - started


def preload() -> None:
    """Load what takes long and starts no thread; refuse to fork a process with threads."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    for name in ("torch", "scipy.stats", "sqlalchemy", "pydantic", "apscheduler.schedulers.background"):
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"{threads} threads after the imports; forking would not be safe")


# --- judgement with the standard library -----------------------------------------------------------------------------


def whole(path: Path) -> str | None:
    """Return what is wrong with a published folder, or None when it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"{path.name}: manifest {error}"
    for name, facts in manifest["files"].items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            return f"{path.name}/{name}: {error}"
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return f"{path.name}/{name}: differs from its hash"
    return None


def hashes(home: Path) -> dict[str, dict[str, str]]:
    """Return the hash of every published file by folder."""
    found = {}
    for path in sorted((home / "published" / "daily").glob("as_of=*")):
        flaw = whole(path)
        manifest = {"files": {flaw: {"sha256": ""}}} if flaw else json.loads((path / "manifest.json").read_text())
        found[path.name] = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return found


def ledger(home: Path) -> list[tuple[str, str, int]]:
    """Return slot, status and attempt of every batch in the ledger."""
    connection = sqlite3.connect(home / "store.db", timeout=30)
    try:
        query = "SELECT slot, status, attempt FROM ledger_runs WHERE job = 'batch/daily' ORDER BY slot"
        return [(str(slot), str(status), int(attempt)) for slot, status, attempt in connection.execute(query)]
    finally:
        connection.close()


def integrity(home: Path) -> str:
    """Return SQLite's own verdict on the database."""
    connection = sqlite3.connect(home / "store.db", timeout=30)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


def after_kill(home: Path, number: int, log: Path) -> tuple[str, list[str]]:
    """Return the stage the kill hit, and every flaw in what is published."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    finished = [line["stage"] for line in lines if line.get("message") == "batch stage"]
    last = STAGES.index(finished[-1]) + 1 if finished else 0
    stage = STAGES[last] if last < len(STAGES) else "closing"
    if any(line["message"].startswith("batch ") and line["message"] != "batch stage" for line in lines):
        stage = "after"
    folder = home / "published" / "daily"
    flaws = [flaw for path in folder.glob("as_of=*") if (flaw := whole(path)) is not None]
    known = {partition_name(past) for past in range(number + 1)}
    flaws += [f"{path.name}: never asked for" for path in folder.glob("as_of=*") if path.name not in known]
    return stage, flaws


def after_rerun(home: Path, number: int) -> list[str]:
    """Return every flaw once batch ``number`` was run to its end."""
    folder = home / "published" / "daily"
    flaws = []
    expected = {partition_name(past) for past in range(number + 1)}
    present = {path.name for path in folder.iterdir()}
    if present != expected:
        flaws.append(f"folders: {len(present - expected)} too many, {len(expected - present)} missing")
    flaws += [flaw for path in folder.glob("as_of=*") if (flaw := whole(path)) is not None]
    rows = ledger(home)
    if [status for _, status, _ in rows] != ["done"] * (number + 1):
        flaws.append(f"ledger: {Counter(status for _, status, _ in rows)}")
    return flaws


# --- the benchmark ---------------------------------------------------------------------------------------------------


def kill_and_finish(home: Path, number: int, log: Path, delays: list[float]) -> tuple[Counter[str], list[str], float]:
    """Kill a batch after each delay, then let it finish; return the stages hit, flaws, and the last duration."""
    stages: Counter[str] = Counter()
    flaws: list[str] = []
    for delay in delays:
        status, _ = run_batch_process(home, number, log, delay)
        if status == -signal.SIGKILL:
            stage, found = after_kill(home, number, log)
            stages[stage] += 1
            flaws += [f"batch {number}, killed in {stage}: {flaw}" for flaw in found]
        elif status != 0:
            flaws.append(f"batch {number} ended with {status} by itself: {log.read_text()[-500:]}")
    status, seconds = run_batch_process(home, number, log, None)
    if status != 0:
        flaws.append(f"batch {number}: the next run ended with {status}: {log.read_text()[-500:]}")
    flaws += [f"batch {number}, after the next run: {flaw}" for flaw in after_rerun(home, number)]
    return stages, flaws, seconds


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the benchmark in an empty folder and return its record."""
    generator = random.Random(seed)
    home, twin = folder / "killed", folder / "twin"
    in_child(lambda: set_up(home))
    shutil.copytree(home, twin)
    stages, flaws, seconds = kill_and_finish(home, 0, folder / "log", [])
    durations, number = [seconds], 0
    while stages.total() < kills:
        number += 1
        typical = sorted(durations)[len(durations) // 2]
        wanted = min(generator.randint(1, 3), kills - stages.total())
        delays = [generator.uniform(0.0, typical) for _ in range(wanted)]
        hit, found, seconds = kill_and_finish(home, number, folder / "log", delays)
        stages += hit
        flaws += found
        if not hit["closing"] and not hit["after"]:  # else the last run only had to close the books
            durations.append(seconds)
    in_child(lambda: run_twin(twin, number + 1))
    stored = []
    for place in (home, twin):
        in_child(partial(stored_fingerprint, place, folder / f"{place.name}.json"))
        stored.append(json.loads((folder / f"{place.name}.json").read_text()))
    if stored[0] != stored[1]:
        flaws.append(f"the store differs from the undisturbed one: {stored}")
    if hashes(home) != hashes(twin):
        different = [name for name, files in hashes(twin).items() if hashes(home).get(name) != files]
        flaws.append(f"published files differ from the undisturbed ones in {len(different)} batches: {different[:3]}")
    if integrity(home) != "ok":
        flaws.append(f"database: {integrity(home)}")
    return {
        "kills": stages.total(),
        "batches": number + 1,
        "flaws": flaws,
        "killed_in": {stage: stages[stage] for stage in (*STAGES, "closing", "after") if stages[stage]},
        "taken_over": sum(attempt > 1 for _, _, attempt in ledger(home)),
        "median_batch_seconds": round(sorted(durations)[len(durations) // 2], 3),
        "stored_rows": stored[0]["rows"],
    }


def report(record: dict[str, Any]) -> str:
    """Return the record as a short page."""
    hit = ", ".join(f"{stage} {count}" for stage, count in record["killed_in"].items())
    verdict = "none" if not record["flaws"] else "\n".join(f"- {flaw}" for flaw in record["flaws"])
    return (
        f"# kill -9 of ingest and batch\n\n"
        f"{record['date']}, {record['machine']}, {record['versions']}. "
        f"`python benchmarks/kill_batch.py --kills {record['kills']} --seed {record['seed']}`, "
        f"{record['seconds']:.0f} s.\n\n"
        f"{record['kills']} kills in {record['batches']} batches (median run {record['median_batch_seconds']} s on a "
        f"busy machine; a kill that came after the end of its run does not count). Killed in: {hit}. "
        f"Claims taken over by the next run: {record['taken_over']}.\n\n"
        f"Compared with the undisturbed twin: every published file, {record['stored_rows']} stored rows, the ledger, "
        f"SQLite's integrity check.\n\nLoss, duplicates, half-written folders, runs that did not finish: {verdict}\n"
    )


def main() -> int:
    """Run the benchmark; exit status 1 when a flaw was found."""
    parser = argparse.ArgumentParser(description="Kill batches at random moments and look for damage.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--output", type=Path, help="folder for the result; default: print only")
    given = parser.parse_args()
    preload()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-batch-") as folder:
        record = measure(given.kills, given.seed, Path(folder))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("polars", "sqlalchemy"))
    record |= {
        "seed": given.seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - started, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }
    print(json.dumps(record, indent=2))
    if given.output is not None:
        stem = given.output / f"kill_batch_cpu{os.cpu_count()}_{record['date']}"
        stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        stem.with_suffix(".md").write_text(report(record))
    return 1 if record["flaws"] else 0


if __name__ == "__main__":
    sys.exit(main())
