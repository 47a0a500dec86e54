"""Kill an ingestion with SIGKILL at random moments and count what the store lost, doubled or left half-done.

    python benchmarks/kill_ingest.py --kills 50 [--database-url postgresql+psycopg://...]

Each round a child process ingests a batch that adds rows to, and corrects rows of, the one before. It is killed at a
moment drawn uniformly over (1.3 times) what an undisturbed ingestion takes. Then the store must hold exactly the rows
before the batch or exactly those after it, as its batch record says; and running the same batch again must complete it.
What the store holds is read with plain SQL, and what it should hold is kept in a table of this script's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
from sqlalchemy import create_engine, text

from tsforge.app.ingest import IngestConfig, ingest
from tsforge.core.config import to_yaml, validate
from tsforge.core.workspace import Workspace

RESULTS = Path(__file__).resolve().parent / "results"
NUM_SERIES = 5
SHIFT = 0.1  # part of a batch that is new; the rest overlaps the batch before
START = datetime(2024, 1, 1, tzinfo=UTC)

CHILD = """
import sys
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.core.config import load
from tsforge.core.workspace import Workspace
config, workspace = load(IngestConfig, sys.argv[1]), Workspace.open(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
ingest(config, workspace)
print("done", flush=True)
"""


class Harness:
    """One store under attack.

    Args:
        folder: an empty folder for the source files and, without ``database_url``, the store.
        rows: rows of a batch.
        seed: of the moments and values.
        database_url: the store, default SQLite in ``folder``.
    """

    def __init__(self, folder: Path, *, rows: int, seed: int, database_url: str | None = None) -> None:
        self.folder = folder
        self.rows = rows
        self.random = random.Random(seed)
        url = database_url or f"sqlite:///{folder / 'store.db'}"
        self.workspace = Workspace(root=folder, database_url=url, tracking_uri="")
        self.expected = pl.DataFrame(
            schema={"series_id": pl.String, "time": pl.Int64, "x": pl.Float64, "y": pl.Float64}
        )
        self.config = validate(
            IngestConfig,
            {
                "data": {
                    "name": "attacked",
                    "source": {"kind": "parquet", "path": str(folder / "batch.parquet")},
                    "layout": "long",
                    "series": "series",
                    "time": "time",
                    "targets": ["x", "y"],
                    "freq": "1m",
                }
            },
        )
        (folder / "ingest.yaml").write_text(to_yaml(self.config), encoding="utf-8")

    def write_batch(self, number: int) -> pl.DataFrame:
        """Write the source file of a batch and return the rows the store must hold after it."""
        length = self.rows // NUM_SERIES
        first = int(number * length * SHIFT)
        times = [START + timedelta(minutes=first + at) for at in range(length)]
        parts = [
            pl.DataFrame(
                {
                    "series": f"s{at}",
                    "time": pl.Series(times, dtype=pl.Datetime("us", "UTC")),
                    # every tenth value changes from batch to batch: a correction of the rows that overlap
                    "x": [float(number if (row + number) % 10 == 0 else row) for row in range(first, first + length)],
                    "y": [None if row % 7 == 0 else row / 3 for row in range(first, first + length)],
                }
            )
            for at in range(NUM_SERIES)
        ]
        batch = pl.concat(parts)
        batch.write_parquet(self.folder / "batch.parquet")
        plain = batch.select(pl.col("series").alias("series_id"), pl.col("time").cast(pl.Int64), "x", "y")
        both = pl.concat([self.expected, plain])
        return both.unique(["series_id", "time"], keep="last", maintain_order=True).sort("series_id", "time")

    def stored(self) -> tuple[pl.DataFrame, list[str], str]:
        """Return the observations, the status of every batch and what the database says about itself, by plain SQL."""
        engine = create_engine(self.workspace.database_url)
        try:
            with engine.connect() as connection:
                is_sqlite = engine.dialect.name == "sqlite"
                health = str(connection.execute(text("PRAGMA integrity_check")).scalar()) if is_sqlite else "ok"
                catalogue = "sqlite_master" if is_sqlite else "information_schema.tables"
                column = "name" if is_sqlite else "table_name"
                names = [str(name) for name in connection.execute(text(f"SELECT {column} FROM {catalogue}")).scalars()]  # noqa: S608
                tables = [name for name in names if name.startswith("tsf_obs_") and "autoindex" not in name]
                statuses: list[str] = []
                if "tsf_batches" in names:
                    statuses = [
                        str(row[0]) for row in connection.execute(text("SELECT status FROM tsf_batches ORDER BY id"))
                    ]
                if not tables:
                    return self.expected.clear(), statuses, health
                rows = connection.execute(
                    text(f"SELECT series_id, time, v1_x, v2_y FROM {tables[0]} ORDER BY series_id, time")  # noqa: S608
                ).all()
            table = pl.DataFrame([tuple(row) for row in rows], schema=self.expected.schema, orient="row")
            return table, statuses, health
        finally:
            engine.dispose()

    def attack(self, number: int, typical_seconds: float) -> dict[str, Any]:
        """Ingest a batch in a child, kill it, judge the store, complete the batch; return what was seen."""
        before, after = self.expected, self.write_batch(number)
        done_before = self.stored()[1].count("done")
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.folder / "ingest.yaml"), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        child.stdin.write("go\n")
        child.stdin.flush()
        delay = self.random.uniform(0, typical_seconds)
        time.sleep(delay)
        child.kill()
        child.communicate()
        table, statuses, health = self.stored()
        done = statuses.count("done") > done_before
        began = statuses[-1:] == ["running"]
        moment = "after the commit" if done else ("inside the batch" if began else "before the batch began")
        whole = table.equals(after) if done else table.equals(before)
        ingest(self.config, self.workspace)
        final, final_statuses, _ = self.stored()
        self.expected = after
        return {
            "delay": round(delay, 4),
            "moment": moment,
            "healthy": health == "ok",
            "whole": whole,
            "completed": final.equals(after) and final_statuses[-1] == "done",
            "repeated_keys": final.height - final.n_unique(["series_id", "time"]),
            "left_running": final_statuses.count("running"),
        }

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TSFORGE_DATABASE_URL": self.workspace.database_url}

    def undisturbed_seconds(self) -> float:
        """Ingest batch 0 and return the time a second, overlapping ingestion of it takes in a warm process."""
        self.expected = self.write_batch(0)
        ingest(self.config, self.workspace)
        start = time.perf_counter()
        ingest(self.config, self.workspace)
        return time.perf_counter() - start


def attack(folder: Path, *, kills: int, rows: int, seed: int = 0, database_url: str | None = None) -> dict[str, Any]:
    """Return the counts over ``kills`` rounds; ``failures`` is empty when nothing was lost, doubled or stuck."""
    harness = Harness(folder, rows=rows, seed=seed, database_url=database_url)
    seconds = harness.undisturbed_seconds()
    return summarise([harness.attack(number, seconds * 1.3) for number in range(1, kills + 1)], seconds)


def summarise(rounds: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the counts of all rounds."""
    failures = [
        item
        for item in rounds
        if not (item["healthy"] and item["whole"] and item["completed"])
        or item["repeated_keys"]
        or item["left_running"]
    ]
    return {
        "kills": len(rounds),
        "undisturbed_seconds": round(seconds, 3),
        "moments": dict(Counter(item["moment"] for item in rounds)),
        "failures": failures,
    }


def main() -> None:
    """Run the attack and write the dated result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database-url", help="an empty database (default: SQLite in a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tsforge_kill_") as folder:
        result = attack(
            Path(folder), kills=given.kills, rows=given.rows, seed=given.seed, database_url=given.database_url
        )
    store = "postgresql" if (given.database_url or "").startswith("postgresql") else "sqlite"
    record = {
        "question": "does an ingestion killed at any moment lose, double or block anything?",
        "store": store,
        "rows": given.rows,
        "seed": given.seed,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
        **result,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    name = f"kill_ingest_{store}_cpu{os.cpu_count()}_{record['date']}.json"
    (given.output / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
