"""Values outside a declared range: reported, each at its own row; no fit and no score of another row rests on them.

The oracle is the same run over data in which these cells are missing: equal to the last bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from test_online_detector import (
    BEGIN,
    KEY,
    ROWS,
    TRAIN,
    Log,
    artifact_of,
    as_frame,
    between,
    check_equal,
    cuts,
    hours,
    made,
    settings,
)

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.artifact import Artifact
from tsforge.contracts.tables import AnomalyReport

WRONG = -9999.0
SCORES: dict[str, dict[str, Any]] = {
    "normalised": {},
    "one step": {"steps": [1], "joint": "max_abs"},
    "tail": {"kind": "tail"},
    "balanced": {"joint": "balanced"},
    "consensus": {"joint": "consensus"},
    "fisher": {"joint": "fisher"},
    "innovation": {"kind": "innovation"},
    "reconstruction": {"kind": "reconstruction", "window": 6},
    "reconstruction late": {"kind": "reconstruction", "window": 5, "overlap_reduction": "mean"},
    "states": {"kind": "states", "window": 24, "stride": 5, "bins": 4, "joint": "max_abs"},
    "spectrum": {"kind": "spectrum", "window": 24, "stride": 1, "joint": "max_abs"},
    "spectrum in strides": {"kind": "spectrum", "window": 24, "stride": 5, "joint": "mean_abs"},
}


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return made()


@pytest.fixture(scope="module")
def linear(table: pl.DataFrame) -> Artifact:
    return artifact_of(as_frame(table), {"name": "linear"}, "normal")


def spoiled(table: pl.DataFrame, *rows: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the table with impossible values of x of series a in some rows, and the same with these cells missing."""
    there = (pl.col("series_id") == "a") & pl.col("time").is_in([hours(row) for row in rows])
    raw = table.with_columns(pl.when(there).then(WRONG).otherwise(pl.col("x")).alias("x"))
    return raw, raw.with_columns(pl.when(pl.col("x") > -100).then(pl.col("x")).alias("x"))


def watched(score: dict[str, Any], **changes: Any) -> DetectConfig:
    return settings(score=score, rule={"kind": "quantile", "alpha": 0.02}, **changes)


def judged(artifact: Artifact, raw: pl.DataFrame, masked: pl.DataFrame, config: DetectConfig) -> AnomalyReport:
    return detect(artifact, as_frame(masked), config, start=hours(BEGIN), values=as_frame(raw))


def streamed(
    artifact: Artifact, raw: pl.DataFrame, masked: pl.DataFrame, config: DetectConfig, edges: list[int]
) -> Log:
    """Return what a stream says that goes through a file between any two updates."""
    log = Log(OnlineDetector.start(artifact, as_frame(masked), config, start=hours(BEGIN), values=as_frame(raw)))
    for start, stop in pairwise(edges):
        log.detector = OnlineDetector.load(log.detector.to_bytes(), artifact)
        log.take(between(masked, start, stop), judged=between(raw, start, stop))
    return log


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("rows", [(40,), (TRAIN + 40, BEGIN - 60)], ids=["training", "scale and calibration"])
def test_nothing_is_learnt_from_an_impossible_value(
    linear: Artifact, table: pl.DataFrame, name: str, rows: tuple[int, ...]
) -> None:
    """One reading of -9999 among the training rows must not hide the faults of 8 that come later."""
    raw, masked = spoiled(table, *rows)
    config = watched(SCORES[name])
    found, expected = judged(linear, raw, masked, config), judged(linear, masked, masked, config)
    assert expected.scores.table["score"].drop_nulls().n_unique() > 10
    if (
        name.startswith(("states", "spectrum")) and rows[0] >= TRAIN
    ):  # a window that ends with a missing cell has a score
        score = pl.col("score")
        assert_frame_equal(
            found.scores.table.select(score), expected.scores.table.select(score), rel_tol=0.05, abs_tol=0.05
        )
        return
    assert_frame_equal(found.scores.table, expected.scores.table, check_exact=True)
    assert found.events.equals(expected.events)


def test_a_series_with_few_training_rows_learns_nothing_impossible_from_those_after(
    linear: Artifact, table: pl.DataFrame
) -> None:
    late = table.filter((pl.col("series_id") == "b") | (pl.col("time") >= hours(TRAIN - 8)))
    raw, masked = spoiled(late, TRAIN + 40)
    for joint in ("mahalanobis", "consensus"):
        config = watched({"joint": joint})
        found, expected = judged(linear, raw, masked, config), judged(linear, masked, masked, config)
        assert_frame_equal(found.scores.table, expected.scores.table, check_exact=True)


def test_a_variate_of_impossible_values_alone_is_named(linear: Artifact, table: pl.DataFrame) -> None:
    raw, masked = spoiled(table, *range(BEGIN))
    for score in ("normalised", "innovation"):
        report = judged(linear, raw, masked, watched(SCORES[score]))
        assert any("are not scored" in notice and "'x' of 'a'" in notice for notice in report.metadata["notices"])


@pytest.mark.parametrize("name", SCORES)
def test_an_impossible_value_is_reported_once_and_moves_no_other_row(
    linear: Artifact, table: pl.DataFrame, name: str
) -> None:
    places = [BEGIN + 107, BEGIN + 115]
    raw, masked = spoiled(table, *places)
    config = watched(SCORES[name])
    found, expected = (judged(linear, each, masked, config).scores.table.sort(KEY) for each in (raw, masked))
    own = (pl.col("series_id") == "a") & pl.col("time").is_in([hours(row) for row in places])
    there = own & pl.col("variate").is_in(["x", "*"])
    assert_frame_equal(found.filter(~there), expected.filter(~there), check_exact=True)
    assert (found.filter(own, variate="x")["value"] == WRONG).all()
    if name != "fisher":  # its ranks are no rarer than one in the calibration rows, however wrong a value is
        assert found.filter(own, variate="*")["alarm"].all()
    largest = expected.filter(pl.col("series_id") == "a", variate="x")["score"].abs().quantile(0.9)
    assert found.filter(own, variate="x")["score"].abs().min() > largest  # type: ignore[operator]


@pytest.mark.parametrize("name", SCORES)
def test_a_stream_with_impossible_values_equals_the_batch_run(linear: Artifact, table: pl.DataFrame, name: str) -> None:
    rows = (40, TRAIN + 40, BEGIN - 60, BEGIN - 2, BEGIN - 1, BEGIN, BEGIN + 20, BEGIN + 21, BEGIN + 107, ROWS - 2)
    raw, masked = spoiled(table, *rows)
    for rule in ({"kind": "quantile", "alpha": 0.02}, {"kind": "rolling_quantile", "alpha": 0.05, "window": 150}):
        config = settings(score=SCORES[name], rule=rule)
        report = judged(linear, raw, masked, config)
        edges = sorted({*cuts("random"), BEGIN + 1, BEGIN + 21, BEGIN + 22, BEGIN + 108})
        check_equal(report, streamed(linear, raw, masked, config, edges), config.score.latency)


def test_an_event_under_way_at_the_start_begins_with_its_first_impossible_value(
    linear: Artifact, table: pl.DataFrame
) -> None:
    """They calibrate nothing, and are judged all the same: a later run gives the event the same id."""
    raw, masked = spoiled(table, *range(BEGIN - 6, BEGIN + 3))
    events = judged(linear, raw, masked, watched({})).events.filter(pl.col("series_id") == "a")
    assert hours(BEGIN - 6) in events["start"].to_list()


def test_a_state_of_an_earlier_version_goes_on(linear: Artifact, table: pl.DataFrame) -> None:
    """It kept raw values of the last rows: they leave with these rows."""
    raw, masked = spoiled(table, BEGIN - 2)
    config = watched(SCORES["reconstruction"])
    log = Log(OnlineDetector.start(linear, as_frame(masked), config, start=hours(BEGIN), values=as_frame(raw)))
    trail = log.detector.recent.kept["a"].trail
    assert np.isnan(trail[-2, 0])
    trail[-2, 0] = WRONG
    log.detector = OnlineDetector.load(log.detector.to_bytes(), linear)
    log.take(between(masked, BEGIN, ROWS), judged=between(raw, BEGIN, ROWS))
    told, report = pl.concat(log.scores).sort(KEY), judged(linear, raw, masked, config).scores.table.sort(KEY)
    aged = pl.col("time") >= hours(BEGIN + 5)
    assert told.filter(aged).equals(report.filter(aged))
    assert not told.equals(report)
