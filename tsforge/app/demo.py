"""The main job on the embedded data, as a newcomer sees it first: what a night would do, in about a minute."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.backtest import BacktestJobConfig, backtest
from tsforge.app.batch import BatchConfig, parse_as_of, run_batch
from tsforge.app.detect import DetectJobConfig, detect
from tsforge.app.explain import ExplainConfig, explain
from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.app.stream import StreamConfig, stream
from tsforge.app.triage import act_on_shown, queue, read_events
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import WatchConfig
from tsforge.core.config import load, validate
from tsforge.core.errors import ModelError
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore
from tsforge.forecasting.attribution import Attribution

AS_OF = "2013-12-20T00:00Z"
_FOLLOWED = ("2013-12-13T00:00", "2013-12-27T23:00")

Say = Callable[[str], None]


def run_demo(workspace: Workspace, *, progress: bool = True) -> dict[str, Any]:
    """Run the main job and return what it made: rows, errors, the sensor error found, grades, the published batch.

    Repeating it is safe: ingestion and the batch do nothing the second time, fits make new artifacts.

    Args:
        workspace: everything is kept there.
        progress: tell each step on standard output.
    """
    say: Say = print if progress else _silent
    started = time.perf_counter()
    made: dict[str, Any] = {}
    with _step("Ingest a year of real weather at three airports, and generated series with known anomalies", say):
        made["ingest"] = [_ingest(name, workspace, say) for name in ("nyc_weather", "synthetic")]
    with _step("Fit AR-Net a day ahead from three days of weather; tracked, calibrated, registered as champion", say):
        made["weather"] = _fit("experiment/demo_weather", workspace, say)
    with _step("Ask it what its temperature at Newark a day ahead rests on", say):
        made["explanation"] = _explain(workspace, say)
    with _step("Backtest it beside the naive forecasts, from six cutoffs of the past", say):
        made["backtest"] = _backtest(workspace, say)
    with _step("Watch the sensors with a model that has seen January only", say):
        made["sensor"] = _find_sensor_error(workspace, say)
    with _step("Let the champion follow files as they come; simultaneous events are one incident in the store", say):
        made["watch"] = _follow(workspace, say)
    with _step("Grade the detector on generated anomalies, whose truth is known", say):
        made["grade"] = _grade(workspace, say)
    with _step("Look through the alarms as somebody on call would; the dashboard shows them under Triage", say):
        made["triage"] = _triage(workspace, say)
    with _step("Carry a small S4 through December row by row: every reading scored before it is absorbed", say):
        made["stream"] = _stream(workspace, say)
    with _step("Let a small ReGENN learn how the weather hangs together; the dashboard shows it under Graphs", say):
        made["graph"] = _fit("experiment/demo_graph", workspace, say)
    with _step(f"Run the nightly batch as of {AS_OF}: ingest, check, forecast, detect, publish", say):
        made["batch"] = _batch(workspace, say)
    made["seconds"] = round(time.perf_counter() - started, 1)
    say(f"\nDone in {made['seconds']:.0f} s. Everything is in {workspace.root}")
    where = _home_option(workspace)
    say(f"Look at it:  .venv/bin/tsforge dashboard{where}        (then open http://localhost:8501)")
    say(f"Ask for it:  .venv/bin/tsforge predict artifact=weather@champion{where}")
    return made


def _home_option(workspace: Workspace) -> str:
    """Return the option that leads a command of this shell to the workspace, nothing where it goes there anyway."""
    usual = Path(os.environ.get("TSFORGE_HOME") or ".tsforge").expanduser().resolve()
    return "" if workspace.root == usual else f" --home {shlex.quote(str(workspace.root))}"


def _silent(_: str) -> None:
    pass


@contextmanager
def _step(title: str, say: Say) -> Iterator[None]:
    say(f"\n== {title}")
    started = time.perf_counter()
    yield
    say(f"   ({time.perf_counter() - started:.1f} s)")


def _facts(say: Say, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in facts.items():
        say(f"   {name}: {value}")
    return facts


def _ingest(name: str, workspace: Workspace, say: Say) -> Mapping[str, Any]:
    result = ingest(load(IngestConfig, "ingest", [f"data={name}"]), workspace).summary()
    return _facts(say, {"data set": name, "new rows": result["rows_new"], "unchanged rows": result["rows_unchanged"]})


def _fit(experiment: str, workspace: Workspace, say: Say) -> Mapping[str, Any]:
    result = fit(load(FitConfig, experiment), workspace)
    error = f"{result.metrics['test_mae']:.3f} standard deviations (mean absolute)"
    facts = {"artifact": result.artifact.id, "error on the test span": error}
    return _facts(say, facts if result.version is None else {**facts, "registered version": result.version})


def _explain(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    asked = ["artifact=weather@champion", "series=EWR", "variate=temp", "steps=[24]"]
    found = explain(load(ExplainConfig, "explain", asked), workspace)
    if not isinstance(found, Attribution):
        raise ModelError("the explanation of a forecast came back without its parts")
    baseline = found.table.filter(kind="baseline")["contribution"][0]
    parts = {row["source"]: round(row["contribution"], 2) for row in found.rows()[:4]}
    forecast = baseline + found.table.filter(pl.col("kind").is_in(["target", "known"]))["contribution"].sum()
    facts = {"from a flat window": f"{baseline:.1f} F", "moved by": parts, "to": f"{forecast:.1f} F"}
    return _facts(say, {**facts, "divided": found.metadata["method"]})


def _backtest(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    job = load(BacktestJobConfig, "experiment/demo_backtest")
    report = backtest(job, workspace)
    rows = {row["model"]: round(row["mase"], 3) for row in report.leaderboard.to_dicts()}
    return _facts(say, {"MASE by model (smaller is better)": rows})


def _find_sensor_error(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    artifact = fit(load(FitConfig, "experiment/demo_sensor"), workspace).artifact
    found = detect(load(DetectJobConfig, "experiment/demo_watch", [f"artifact={artifact.id}"]), workspace).report
    strongest = found.events.sort("peak_score", descending=True).to_dicts()[0]
    blamed = strongest["variates"][0]["variate"]
    raw = load_dataset(workspace, "nyc_weather", series=[strongest["series_id"]]).table
    value = raw.filter(pl.col("time") == strongest["peak_time"])[blamed][0]
    return _facts(
        say,
        {
            "scored": f"{found.metadata['scored'][0]} to {found.metadata['scored'][1]}",
            "events": found.events.height,
            "strongest event": f"{strongest['series_id']} at {strongest['peak_time']:%Y-%m-%d %H:%M} UTC",
            "variate blamed": f"{blamed}, which read {value:,.0f}",
        },
    )


def _follow(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    """Lay a file a day into a folder, as a data logger would, and watch it with the champion."""
    folder = workspace.root / "incoming"
    folder.mkdir(exist_ok=True)
    stored = load_dataset(workspace, "nyc_weather", start=_FOLLOWED[0], end=_FOLLOWED[1])
    rows = stored.table.select("series_id", "time", *stored.schema.targets)
    for (day,), part in rows.group_by(pl.col("time").dt.date(), maintain_order=True):
        part.sort("time").write_csv(folder / f"{day}.csv")
    settings = {
        "name": "weather",
        "artifact": "weather@champion",
        "start": _FOLLOWED[0],
        "source": {"kind": "folder", "path": str(folder), "settle_seconds": 0},
        "detector": {"rule": {"alarms_per_day": 0.5}, "events": {"group_by": "all", "group_gap": 3}},
        "reset": True,
    }
    facts = watch(validate(WatchConfig, settings), workspace, once=True).facts
    told = read_events(workspace, "nyc_weather").filter(source="watch:weather")
    return _facts(
        say,
        {
            "files": rows["time"].dt.date().n_unique(),
            "rows taken": facts["rows_taken"],
            "events": told.height,
            "incidents": told["incident_id"].drop_nulls().n_unique(),
            "events in the largest": max(queue(told)["events"].to_list(), default=0),
        },
    )


def _grade(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    artifact = fit(load(FitConfig, "experiment/demo_graded"), workspace).artifact
    grade = detect(load(DetectJobConfig, "detect", [f"artifact={artifact.id}"]), workspace).grade
    if grade is None:
        raise ModelError("the generated data set carries no labels in the scored span")
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in grade.overall.items()}
    found = {
        row["kind"]: f"{row['found']} of {row['scorable']}" if row["scorable"] else "no values to score"
        for row in grade.rows()
    }
    return _facts(say, {**shown, "found by kind": found})


def _triage(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    """Confirm the sensor error, judge two thirds of the generated alarms by what is known of them, take up the next."""
    sensor = read_events(workspace, "nyc_weather").sort("peak_score")[-1:]
    act_on_shown(workspace, sensor, "confirmed", actor="demo", comment="no storm explains this reading: a sensor error")
    alarms = read_events(workspace, "synthetic")
    with closing(SeriesStore(workspace.database_url)) as store:
        known = store.labels("synthetic").select(at="series_id", first="start", last="end")
    same_rows = (pl.col("start") <= pl.col("last"), pl.col("end") >= pl.col("first"))
    true = alarms.join_where(known, pl.col("series_id") == pl.col("at"), *same_rows)["event_id"].unique().implode()
    looked_at, left = alarms[: 2 * alarms.height // 3], alarms[2 * alarms.height // 3 :]
    act_on_shown(
        workspace, looked_at.filter(pl.col("event_id").is_in(true)), "confirmed", actor="demo", comment="a true one"
    )
    act_on_shown(
        workspace, looked_at.filter(~pl.col("event_id").is_in(true)), "dismissed", actor="demo", comment="false alarm"
    )
    act_on_shown(workspace, left[:1], "acknowledged", actor="demo", comment="looking at it")
    rows = queue(read_events(workspace, None))
    counts = dict(rows.group_by("human_state", maintain_order=True).len().iter_rows())
    return _facts(say, {"events and incidents": rows.height, **counts})


def _stream(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    artifact = fit(load(FitConfig, "experiment/demo_stream"), workspace).artifact
    result = stream(
        load(StreamConfig, "stream", [f"artifact={artifact.id}", "name=demo", "reset=true", "start=2013-12-01T00:00"]),
        workspace,
    )
    facts = result.summary()
    share = facts["values_outside"] / max(facts["values_scored"], 1)
    strongest = result.rows()[0]
    return _facts(
        say,
        {
            "rows taken one by one": facts["rows_taken"],
            "values outside their 90 % intervals": f"{share:.1%} of {facts['values_scored']}",
            "strangest reading": f"{strongest['variate']} of {strongest['series_id']} at {strongest['time']}",
            "forecast from the state until": str(facts["forecast_until"]),
        },
    )


def _batch(workspace: Workspace, say: Say) -> Mapping[str, Any]:
    job = load(BatchConfig, "experiment/demo_batch")
    return _facts(say, run_batch(job, parse_as_of(AS_OF), workspace).summary())
