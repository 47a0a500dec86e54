"""Guarded contexts: values that raised an alarm are hidden from later forecasts, in stored rows and in streams alike.

The oracle is plain detection: where the network is shown a table in which the hidden values were replaced by hand, and
the untouched values are judged, it must give the same scores without any guard.
"""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_online_detector import START, artifact_of, as_frame, between, hours
from typer.testing import CliRunner

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.guard import Guard
from tsforge.anomaly.online import OnlineDetector
from tsforge.artifact import Artifact
from tsforge.cli import app
from tsforge.contracts.tables import AnomalyReport
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame

BEGIN, ROWS = 620, 800
SHIFT = range(BEGIN + 60, BEGIN + 100)
NAMES = ["x", "y", "z"]


def made() -> pl.DataFrame:
    """Two series of three variates and a covariate known ahead: spikes, and a shift of one variate of series a."""
    generator = np.random.default_rng(5)
    hour, parts = np.arange(ROWS), []
    for name in ("a", "b"):
        x = np.zeros(ROWS)
        for row in range(1, ROWS):
            x[row] = 0.9 * x[row - 1] + generator.normal(0, 0.3)
        values = np.stack([x, 0.8 * x + generator.normal(0, 0.3, ROWS), generator.normal(0, 1.0, ROWS)], axis=1)
        values[:, 2] += np.cos(2 * np.pi * hour / 24)
        for row in (10, 12, 13, 30, 140, 141, 150):
            values[BEGIN + row, row % 3] += 9.0
        if name == "a":
            values[SHIFT.start : SHIFT.stop, 0] += 6.0
        values[BEGIN + 110 : BEGIN + 116] = np.nan
        values[generator.random(values.shape) < 0.02] = np.nan
        times = [hours(int(row)) for row in hour]
        cells = dict(zip(NAMES, values.T, strict=True)) | {"k": np.cos(2 * np.pi * hour / 24)}
        parts.append(pl.DataFrame({"series_id": [name] * ROWS, "time": times, **cells}).fill_nan(None))
    return pl.concat(parts)


def fitted(frame: SeriesFrame, name: str = "linear", **model: Any) -> Artifact:
    return artifact_of(frame, {"name": name, **model}, "normal", horizon=4)


def settings(**changes: Any) -> DetectConfig:
    plain: dict[str, Any] = {
        "rule": {"kind": "quantile", "alpha": 0.01},
        "calibration": {"min_rows": 60, "min_scale_rows": 50},
        "score": {"joint": "max_abs", "horizon_reduction": "first"},
    }
    return validate(DetectConfig, plain | changes)


def alarms(report: AnomalyReport, series: str = "a") -> np.ndarray:
    joint = report.scores.table.filter(series_id=series, variate="*").sort("time")
    return joint["alarm"].to_numpy().astype(bool)


def hidden_by_hand(report: AnomalyReport, table: pl.DataFrame, longest: int, least: float) -> pl.DataFrame:
    """Return the table with what a guard should have hidden, worked out from the report row by row."""
    shown = {(row["series_id"], row["time"]): row for row in table.iter_rows(named=True)}
    scores = report.scores.table.sort("series_id", "time")
    for (series,), part in scores.group_by(["series_id"], maintain_order=True):
        stretch = 0
        for (time,), cells in part.group_by(["time"], maintain_order=True):
            joint = cells.filter(variate="*").row(0, named=True)
            if not joint["alarm"]:
                stretch = stretch if joint["score"] is None else 0
                continue
            far = cells.filter(
                (pl.col("variate") != "*") & (pl.col("score") >= least) & pl.col("expected").is_not_null()
            )
            if stretch < longest and far.height:
                stretch += 1
                for cell in far.iter_rows(named=True):
                    shown[series, time][cell["variate"]] = cell["expected"]
    return pl.DataFrame(list(shown.values()), schema=table.schema)


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return made()


@pytest.fixture(scope="module")
def linear(table: pl.DataFrame) -> Artifact:
    return fitted(as_frame(table))


@pytest.mark.parametrize(
    ("score", "guard"),
    [
        ({}, {"max_rows": 300}),
        ({}, {"max_rows": 7, "min_score": 4.0}),
        ({"joint": "mean_abs", "steps": [1, 3], "horizon_reduction": "median"}, {"max_rows": 12}),
        ({"joint": "mahalanobis", "smoothing": 0.5}, {}),
    ],
    ids=lambda part: "_".join(map(str, part.values())) or "plain",
)
def test_scores_are_those_of_a_table_with_the_values_hidden_by_hand(
    linear: Artifact, table: pl.DataFrame, score: dict[str, Any], guard: dict[str, Any]
) -> None:
    shown = settings().score.model_dump(exclude_unset=True) | score
    config = settings(score=shown, guard=guard)
    report = detect(linear, as_frame(table), config, start=hours(BEGIN))
    by_hand = hidden_by_hand(report, table, guard.get("max_rows", 24), guard.get("min_score", 3.0))
    plain = detect(linear, as_frame(by_hand), settings(score=shown), start=hours(BEGIN), values=as_frame(table))
    assert report.scores.table.equals(plain.scores.table)
    named = ("event_id", "continues", "measure")  # a guard is part of what the score is
    assert report.events.drop(named).equals(plain.events.drop(named))
    changed = (by_hand.select(NAMES).fill_null(0.0) != table.select(NAMES).fill_null(0.0)).sum_horizontal() > 0
    found = {name: facts["rows_guarded"] for name, facts in report.metadata["series"].items()}
    assert found == {name: int(changed.filter(by_hand["series_id"] == name).sum()) for name in ("a", "b")}
    assert min(found.values()) > 2


def test_covariates_known_ahead_are_those_of_the_row(table: pl.DataFrame) -> None:
    frame = as_frame(table, known=["k"])
    artifact = fitted(frame, "ar_net")
    report = detect(artifact, frame, settings(guard={"max_rows": 300}), start=hours(BEGIN))
    by_hand = hidden_by_hand(report, table, 300, 3.0)
    assert not by_hand.equals(table)
    plain = detect(artifact, as_frame(by_hand, known=["k"]), settings(), start=hours(BEGIN), values=frame)
    assert report.scores.table.equals(plain.scores.table)


@pytest.mark.parametrize("kind", ["tail", "interval", "nll"])
def test_scores_of_distributions_are_those_of_the_hidden_table(
    linear: Artifact, table: pl.DataFrame, kind: str
) -> None:
    """Rows that were hidden are left out: a distribution is asked for the value that the network is shown."""
    shown = {"kind": kind, "joint": "mean_abs", "steps": [1, 3]}
    report = detect(linear, as_frame(table), settings(score=shown, guard={"max_rows": 12}), start=hours(BEGIN))
    by_hand = hidden_by_hand(report, table, 12, 3.0)
    plain = detect(linear, as_frame(by_hand), settings(score=shown), start=hours(BEGIN), values=as_frame(table))
    kept = table.join(by_hand, on=["series_id", "time", *NAMES], how="semi", nulls_equal=True).select(
        "series_id", "time"
    )
    assert 5 < table.height - kept.height < 100
    found, expected = (
        each.scores.table.join(kept, on=["series_id", "time"], how="semi").sort("series_id", "variate", "time")
        for each in (report, plain)
    )
    assert found.equals(expected)


def test_a_lasting_fault_stays_visible_until_the_guard_gives_way(linear: Artifact, table: pl.DataFrame) -> None:
    inside = slice(SHIFT.start - BEGIN, SHIFT.stop - BEGIN)
    without = alarms(detect(linear, as_frame(table), settings(), start=hours(BEGIN)))
    guarded = alarms(detect(linear, as_frame(table), settings(guard={"max_rows": 100}), start=hours(BEGIN)))
    capped = alarms(detect(linear, as_frame(table), settings(guard={"max_rows": 10}), start=hours(BEGIN)))
    assert without[inside].mean() < 0.2
    assert guarded[inside].mean() > 0.9
    assert capped[inside][:10].all()
    assert capped[inside][20:].mean() < 0.2, "a change that stays becomes ordinary after max_rows rows"
    quiet = slice(SHIFT.stop - BEGIN + 30, None)
    assert guarded[quiet].sum() <= without[quiet].sum() + 1, "the guard ends with the fault"


@pytest.mark.parametrize("name", ["linear", "ar_net", "seasonal_naive", "gru"])
def test_any_cutting_of_the_rows_equals_the_batch_run(table: pl.DataFrame, name: str) -> None:
    model = {"d_model": 16, "dropout": 0.0} if name == "gru" else {}
    frame = as_frame(table, known=["k"]) if name == "ar_net" else as_frame(table)
    artifact, config = fitted(frame, name, **model), settings(guard={"max_rows": 9})
    report = detect(artifact, frame, config, start=hours(BEGIN))
    assert sum(facts["rows_guarded"] for facts in report.metadata["series"].values()) > 5
    middle = np.random.default_rng(1).choice(np.arange(BEGIN + 1, ROWS), 15, replace=False)
    for edges in ([BEGIN, ROWS], [BEGIN, *sorted(middle.tolist()), ROWS], list(range(BEGIN, ROWS + 1))):
        detector = OnlineDetector.start(artifact, frame, config, start=hours(BEGIN))
        found, closed = [], []
        for start, stop in pairwise(edges):
            detector = OnlineDetector.load(detector.to_bytes(), artifact)
            result = detector.update(between(table, start, stop), known=between(table, start, stop + 4))
            found.append(result.scores)
            closed.append(result.closed)
        key = ["series_id", "variate", "time"]
        assert pl.concat(found).sort(key).equals(report.scores.table.sort(key))
        assert set(pl.concat(closed)["event_id"]) == set(report.events.filter(state="closed")["event_id"])


def test_rows_of_one_series_alone_and_a_short_series(linear: Artifact, table: pl.DataFrame) -> None:
    """Series that end apart: what is missing at the end is not scored, and the other series is not moved by it."""
    short = table.filter((pl.col("series_id") == "b") | (pl.col("time") < hours(BEGIN + 50)))
    config = settings(guard=True)
    both = detect(linear, as_frame(short), config, start=hours(BEGIN)).scores.table
    alone = detect(linear, as_frame(table.filter(series_id="b")), config, start=hours(BEGIN)).scores.table
    assert both.filter(series_id="b").equals(alone)
    end = both.filter((pl.col("series_id") == "a") & (pl.col("time") >= hours(BEGIN + 50)))
    assert end.height == 4 * (ROWS - BEGIN - 50)
    assert end["score"].null_count() == end.height


def test_later_rows_change_nothing_before_them(linear: Artifact, table: pl.DataFrame) -> None:
    config, cut = settings(guard=True), hours(BEGIN + 70)
    other = table.with_columns(
        pl.when(pl.col("time") > cut).then(pl.col(name) * -3 + 40).otherwise(name) for name in NAMES
    )
    found = [
        detect(linear, as_frame(data), config, start=hours(BEGIN)).scores.table.filter(pl.col("time") <= cut)
        for data in (table, other)
    ]
    assert found[0].equals(found[1])


def test_a_long_run_says_how_far_it_is(
    linear: Artifact, table: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a clock that jumps seven seconds whenever it is looked at, so that every second row is ten seconds later."""
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr("tsforge.anomaly.online.time.monotonic", lambda: float(next(clock)))
    stop = hours(BEGIN + 40)
    with caplog.at_level(logging.INFO, logger="tsforge.anomaly.online"):
        detect(linear, as_frame(table), settings(guard=True), start=hours(BEGIN), stop=stop)
    told = [record.fields for record in caplog.records if record.getMessage() == "rows judged one by one"]  # type: ignore[attr-defined]
    assert len(told) > 10
    done = [line["done"] for line in told]
    assert done == sorted(set(done))
    assert {line["of"] for line in told} == {told[0]["of"]}
    assert told[0]["of"] >= done[-1] >= told[0]["of"] - 2


def test_an_outage_neither_ends_nor_lengthens_a_stretch() -> None:
    guard = Guard(min_score=3.0, max_rows=2)
    far, near, lost = np.array([9.0, 1.0]), np.array([1.0, 1.0]), np.array([np.nan, np.nan])
    expected = np.zeros(2)
    assert guard.hidden("s", far, expected, alarm=True).tolist() == [True, False]
    assert not guard.hidden("s", lost, expected, alarm=False).any()
    assert guard.hidden("s", -far, expected, alarm=True).tolist() == [True, False]
    assert not guard.hidden("s", far, expected, alarm=True).any(), "two rows in a row were hidden"
    assert not guard.hidden("s", near, expected, alarm=False).any()
    assert guard.hidden("s", far, expected, alarm=True).any(), "an ordinary row makes the guard whole again"
    assert not guard.hidden("s", near, expected, alarm=True).any(), "no value of its own is strange"
    assert not guard.hidden("other", far, lost, alarm=True).any(), "nothing can stand in"
    assert guard.rows == {"s": 3}


def test_what_cannot_be_guarded_is_refused(linear: Artifact, table: pl.DataFrame) -> None:
    assert settings(guard=True).guard == settings(guard={}).guard
    assert settings(guard=False).guard is None
    with pytest.raises(ConfigError, match=r"guard: give true, false, or settings .*given: 'perhaps'"):
        settings(guard="perhaps")
    with pytest.raises(ConfigError, match=r"guard\.max_row: unknown key; did you mean 'max_rows'"):
        settings(guard={"max_row": 3})
    with pytest.raises(ConfigError, match="kind 'reconstruction' makes none"):
        settings(guard=True, score={"kind": "reconstruction"})
    with pytest.raises(ConfigError, match=r"two_sided judges it 30 rows later; use exponential smoothing"):
        settings(guard=True, score={"smoothing": {"kind": "two_sided"}})
    coupled = fitted(as_frame(table), "regenn", dropout=0.0, ff_dim=16, attend="entities", graph="identity")
    with pytest.raises(ModelError, match="'regenn' reads several series at once"):
        detect(coupled, as_frame(table), settings(guard=True), start=hours(BEGIN))
    whole = table.with_columns(((pl.col("time") - START).dt.total_hours()).alias("time"))
    numbered = fitted(as_frame(whole))
    with pytest.raises(ConfigError, match=r"give guard\.max_rows or season_length"):
        detect(numbered, as_frame(whole), settings(guard=True), start=BEGIN)
    report = detect(numbered, as_frame(whole), settings(guard=True, season_length=24), start=BEGIN)
    assert report.metadata["series"]["a"]["rows_guarded"] > 2


def test_the_command_says_how_many_rows_were_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "home"))
    made().filter(series_id="a").select("time", *NAMES).write_csv(tmp_path / "plant.csv")
    run = CliRunner().invoke
    source = ["data=csv", "data.name=plant", f"data.source.path={tmp_path / 'plant.csv'}", "data.targets=[x,y,z]"]
    source.append("data.time=time")
    assert run(app, ["ingest", *source]).exit_code == 0
    fit = run(app, ["fit", *source, "model=linear", "window.context_length=24", "window.horizon=4"])
    assert fit.exit_code == 0, fit.output
    few = ["detector.calibration.min_rows=30", "detector.calibration.min_scale_rows=25"]
    found = run(
        app, ["detect", "artifact=latest", "detector.guard=true", "detector.rule.alarms_per_day=1", *few, "--json"]
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["rows_guarded"] > 0, found.stdout
    refused = run(app, ["detect", "artifact=latest", "detector.guard.max_rows=0"])
    assert refused.exit_code != 0
    assert "detector.guard.max_rows" in str(refused.exception)
