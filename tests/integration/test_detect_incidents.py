"""``detect`` with a grouping key: a fault at three series at once is one incident, by pattern and by static column."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.app.detect import Detection
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.contracts.tables import AnomalyReport
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame

START = datetime(2024, 1, 1)
ROWS, TRAIN, VALID = 900, 400, 700
SERIES = {"p1_a": 1.0, "p1_b": 1.0, "p2_a": 2.0, "odd": 2.0}
FAULTS = {"p1_a": (800, 803), "p1_b": (802, 805), "p2_a": (804, 806), "odd": (850, 850)}


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    rng = np.random.default_rng(1)
    parts = []
    for name in SERIES:
        value = np.sin(2 * np.pi * np.arange(ROWS) / 24) + rng.normal(0, 0.2, ROWS)
        first, last = FAULTS[name]
        value[first : last + 1] += 9.0
        times = [START + timedelta(hours=row) for row in range(ROWS)]
        parts.append(pl.DataFrame({"series_id": name, "time": times, "x": value, "site": SERIES[name]}))
    return SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["x"], static=["site"])


@pytest.fixture(scope="module")
def artifact(frame: SeriesFrame) -> Artifact:
    """A network that reads no static column."""
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": 24, "horizon": 1},
        "split": {"kind": "counts", "counts": [TRAIN, VALID - TRAIN, ROWS - VALID]},
    }
    return fit_frame(frame.with_covariates(), validate(FitConfig, settings))[0]


def found(artifact: Artifact, frame: SeriesFrame, **events: Any) -> tuple[AnomalyReport, dict[str, str | None]]:
    rule = {"kind": "fixed", "value": 40.0}
    config = validate(DetectConfig, {"rule": rule, "events": {"merge_gap": 30, **events}})
    report = detect(artifact, frame, config)
    strongest = report.events.sort("peak_score").unique("series_id", keep="last")
    return report, dict(strongest.select("series_id", "incident_id").iter_rows())


def test_a_pattern_joins_series_of_one_plant(artifact: Artifact, frame: SeriesFrame) -> None:
    report, of = found(artifact, frame, group_by=r"id:^(p\d)_")
    assert of["p1_a"] == of["p1_b"] is not None
    assert of["p2_a"] not in (of["p1_a"], None)
    assert of["odd"] is None
    assert any("1 of 4 series have no group" in notice for notice in report.metadata["notices"])
    detection = Detection(report=report)
    assert detection.summary()["incidents"] == report.events["incident_id"].drop_nulls().n_unique()
    assert "incident_id" in detection.rows()[0]


def test_a_static_column_groups_even_where_the_network_does_not_read_it(artifact: Artifact, frame: SeriesFrame) -> None:
    assert artifact.schema.static == ()
    _, of = found(artifact, frame, group_by="static:site")
    assert of["p1_a"] == of["p1_b"]
    assert of["p2_a"] != of["odd"], "45 rows apart"
    _, of = found(artifact, frame, group_by="static:site", group_gap=60)
    assert of["p2_a"] == of["odd"]


def test_without_a_key_no_event_has_an_incident(artifact: Artifact, frame: SeriesFrame) -> None:
    report, _ = found(artifact, frame)
    assert report.events["incident_id"].null_count() == report.events.height > 0
    detection = Detection(report=report)
    assert "incidents" not in detection.summary()
    assert "incident_id" not in detection.rows()[0]


def test_ids_are_the_same_when_scoring_starts_later(artifact: Artifact, frame: SeriesFrame) -> None:
    _, whole = found(artifact, frame, group_by="all")
    rule = {"kind": "fixed", "value": 40.0}
    config = validate(DetectConfig, {"rule": rule, "events": {"merge_gap": 30, "group_by": "all"}})
    later = detect(artifact, frame, config, start=START + timedelta(hours=790))
    assert set(later.events["incident_id"]) >= {whole["p1_a"]}


def test_a_key_that_fits_nothing_is_refused_before_the_work(artifact: Artifact, frame: SeriesFrame) -> None:
    with pytest.raises(ConfigError, match="no static column 'place'"):
        found(artifact, frame, group_by="static:place")
