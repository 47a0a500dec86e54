"""New rows of the fitted workspace for tests of ``tsforge watch``, and what batch detection finds in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.app.forecast import find_artifact
from tsforge.app.ingest import load_dataset, mask_invalid
from tsforge.app.watch.run import WatchResult, watch
from tsforge.app.watch.settings import WatchConfig
from tsforge.artifact import load_artifact
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
SEEN = 70 * 24  # hours that the workspace was fitted and calibrated on
NEW = 8 * 24
RULE = {"kind": "quantile", "alpha": 0.002}
MAPPING = {"time": "ts", "series": "machine"}


def new_rows(hours: int = NEW, start: int = 0, seed: int = 0) -> pl.DataFrame:
    """Return long rows ``machine, ts, x, y`` of the hours after the stored ones, sorted by time: spikes, shifts, a
    missing stretch, and one value outside the valid range of y."""
    index = np.arange(SEEN, SEEN + NEW)
    tables = []
    for place, name in enumerate(("a", "b")):
        noise = 0.3 * np.random.default_rng([seed, place]).standard_normal((2, NEW))
        columns = {}
        for at, variate in enumerate(("x", "y")):
            k = 2 * place + at
            wave = np.sin(2 * np.pi * (index + 3 * k) / 24) + 0.5 * np.sin(2 * np.pi * index / 168 + k)
            columns[variate] = 10 * (k + 1) + 3 * wave + noise[at]
        columns["x"][20 + place : NEW : 53] += 7.0
        columns["y"][31 + place : 38] += 6.0
        columns["x"][70:74] = np.nan
        columns["y"][100] = 1e3
        times = [FIRST + timedelta(hours=int(hour)) for hour in index]
        tables.append(pl.DataFrame({"machine": name, "ts": times, **columns}).fill_nan(None)[start : start + hours])
    return pl.concat(tables).sort("ts", "machine").with_columns(pl.col("ts").cast(pl.Datetime("us", "UTC")))


@dataclass(frozen=True)
class Watched:
    """A copy of the fitted workspace with a folder of new files."""

    root: Path
    workspace: Workspace

    @property
    def incoming(self) -> Path:
        """The folder that is watched."""
        return self.root / "incoming"

    @property
    def lines(self) -> Path:
        """The file of the sink ``log``."""
        return self.root / "events.jsonl"

    def write(self, name: str, rows: pl.DataFrame) -> Path:
        """Write rows as a file of the kind that its name says, renamed into place."""
        self.incoming.mkdir(exist_ok=True)
        hidden = self.incoming / f".{name}"
        if name.endswith("csv"):
            rows.write_csv(hidden)
        elif name.endswith("parquet"):
            rows.write_parquet(hidden)
        else:
            rows.with_columns(pl.col("ts").dt.to_string("iso:strict")).write_ndjson(hidden)
        return hidden.rename(self.incoming / name)

    def plain(self, **changes: Any) -> dict[str, Any]:
        """Return settings as in YAML: the folder, one file of JSON lines."""
        source = {"kind": "folder", "path": str(self.incoming), "settle_seconds": 0, "rows": MAPPING}
        sinks = {"log": {"kind": "jsonl", "path": str(self.lines)}}
        return {"source": source, "detector": {"rule": RULE}, "sinks": sinks, "chunk_rows": 50} | changes

    def config(self, **changes: Any) -> WatchConfig:
        """Return the validated settings."""
        return validate(WatchConfig, self.plain(**changes))

    def watch(self, **changes: Any) -> WatchResult:
        """Take what is there."""
        return watch(self.config(**changes), self.workspace, once=True)

    def told(self) -> list[dict[str, Any]]:
        """Return the lines told so far."""
        return [json.loads(line) for line in self.lines.read_text().splitlines()] if self.lines.exists() else []

    def truth(
        self, rows: pl.DataFrame, detector: dict[str, Any] | None = None, calendar: CalendarConfig | None = None
    ) -> pl.DataFrame:
        """Return the events of batch detection over the stored rows and these."""
        artifact = load_artifact(find_artifact("latest", self.workspace))
        stored = load_dataset(self.workspace, "plant")
        plain = SeriesSchema(targets=stored.schema.targets, freq=stored.schema.freq)
        new = rows.rename({"machine": "series_id", "ts": "time"}).select("series_id", "time", *plain.targets)
        both = SeriesFrame(pl.concat([stored.table.select(new.columns), new]), plain)
        raw = add_calendar(both.extend(artifact.window.horizon), calendar or CalendarConfig())
        settings = validate(DetectConfig, detector or {"rule": RULE})
        seen = mask_invalid(raw, "plant", self.workspace)
        return detect(artifact, seen, settings, start=new["time"].min(), values=raw).events


def keys(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return event id and transition of records."""
    return [(record["event_id"], record["transition"]) for record in records]


def assert_told(records: list[dict[str, Any]], events: pl.DataFrame) -> None:
    """Every event was opened once, every closed one closed once, as batch detection has it, and nothing else."""
    wanted = {(row["event_id"], "opened"): row for row in events.iter_rows(named=True)}
    wanted |= {(row["event_id"], "closed"): row for row in events.filter(state="closed").iter_rows(named=True)}
    found = keys(records)
    assert len(found) == len(set(found))
    assert set(found) == set(wanted)
    for record in records:
        row = wanted[record["event_id"], record["transition"]]
        assert datetime.fromisoformat(record["start"]) == row["start"]
        if record["transition"] == "closed":
            assert datetime.fromisoformat(record["end"]) == row["end"]
            assert datetime.fromisoformat(record["peak_time"]) == row["peak_time"]
            assert np.isclose(record["peak_score"], row["peak_score"], rtol=1e-9)
            assert record["length"] == row["length"]
            assert [item["variate"] for item in record["variates"]] == [item["variate"] for item in row["variates"]]
