"""Detection of changed dynamics: windowed scores of any artifact, innovations and regions of a PLRNN."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.contexts import context_traces
from tsforge.anomaly.detector import detect
from tsforge.anomaly.regions import region_function
from tsforge.anomaly.residuals import TrainingRange
from tsforge.anomaly.scoring import fit_score_model
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.contracts.tensors import Batch
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel

START = datetime(2024, 1, 1)
ROWS, TRAIN, VALID, FAST = 2400, 1000, 1600, slice(2000, 2250)


def made(change: bool = True) -> pl.DataFrame:
    """Two oscillations of 24 hours that turn in 13 for 250 hours, at the same amplitude; hours 1700 to 1720 missing."""
    rng = np.random.default_rng(0)
    speed = np.full(ROWS, 2 * np.pi / 24)
    if change:
        speed[FAST] = 2 * np.pi / 13
    phase = np.cumsum(speed)
    x = np.sin(phase) + 0.1 * rng.normal(size=ROWS)
    y = np.cos(phase) + 0.1 * rng.normal(size=ROWS)
    x[1700:1720] = y[1700:1720] = np.nan
    times = [START + timedelta(hours=hour) for hour in range(ROWS)]
    return pl.DataFrame({"series_id": ["a"] * ROWS, "time": times, "x": x, "y": y}).fill_nan(None)


def as_frame(data: pl.DataFrame) -> SeriesFrame:
    return SeriesFrame.from_long(data, time="time", series_id="series_id", targets=["x", "y"])


def fitted(model: dict[str, Any]) -> Artifact:
    settings = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": model,
        "window": {"context_length": 24, "horizon": 6},
        "split": {"kind": "counts", "counts": [TRAIN, VALID - TRAIN, ROWS - VALID]},
        "train": {"max_epochs": 6, "learning_rate": 5e-3, "accelerator": "cpu"},
    }
    return fit_frame(as_frame(made()), validate(FitConfig, settings))[0]


@pytest.fixture(scope="module")
def linear() -> Artifact:
    return fitted({"name": "linear"})


@pytest.fixture(scope="module")
def plrnn() -> Artifact:
    model = {"name": "plrnn", "kind": "almost_linear", "latent": 8, "rectified": 3, "ensemble": 1}
    return fitted({**model, "normalisation": "none"})


def scored(artifact: Artifact, data: pl.DataFrame, score: dict[str, Any]) -> AnomalyReport:
    config = validate(DetectConfig, {"score": score, "calibration": {"min_scale_rows": 100}})
    return detect(artifact, as_frame(data), config)


def joint(report: AnomalyReport) -> np.ndarray:
    """Return the scores of the rows from VALID on, NaN where null."""
    table = report.scores.table.filter(pl.col("variate") == JOINT).sort("time")
    return table["score"].fill_null(np.nan).to_numpy()


@pytest.mark.parametrize("kind", ["spectrum", "states"])
def test_changed_speed_is_found_though_every_value_looks_usual(linear: Artifact, kind: str) -> None:
    report = scored(linear, made(), {"kind": kind, "window": 96, "stride": 4, "joint": "mean_abs"})
    scores = joint(report)
    fast = scores[FAST.start + 96 - VALID : FAST.stop - VALID]
    usual = scores[: FAST.start - VALID]
    assert np.nanmin(fast) > np.nanmax(usual)
    assert report.metadata["steps"] == []
    assert report.metadata["score"] == f"{kind}, mean_abs"
    variates = report.scores.table.filter(pl.col("variate") != JOINT)
    assert set(variates["variate"]) == {"x", "y"}
    assert variates["expected"].null_count() == variates.height
    assert report.events.height >= 1


@pytest.mark.parametrize("kind", ["spectrum", "states", "regions"])
def test_windowed_scores_do_not_depend_on_later_rows(plrnn: Artifact, kind: str) -> None:
    score = {"kind": kind, "window": 64, "stride": 4}
    whole = joint(scored(plrnn, made(), score))
    later = made().with_columns(pl.when(pl.int_range(pl.len()) >= 2100).then(7.0).otherwise(pl.col("x")).alias("x"))
    np.testing.assert_array_equal(joint(scored(plrnn, later, score))[: 2100 - VALID], whole[: 2100 - VALID])
    gap = whole[1720 - VALID : 1735 - VALID]
    assert np.isnan(gap).all()  # 20 of 64 rows are missing there
    assert np.isfinite(whole[1800 - VALID :]).all()


def test_regions_of_an_almost_linear_network_tell_changed_dynamics(plrnn: Artifact) -> None:
    scores = joint(scored(plrnn, made(), {"kind": "regions", "window": 64, "stride": 4, "joint": "mean_abs"}))
    assert np.nanmedian(scores[FAST.start + 64 - VALID : FAST.stop - VALID]) > np.nanmax(scores[200:400])


def test_innovations_of_one_and_several_steps(plrnn: Artifact) -> None:
    for steps in ((1,), (6,)):
        report = scored(plrnn, made(), {"steps": steps})
        scores = joint(report)
        assert report.metadata["steps"] == list(steps)
        assert np.nanmedian(scores[FAST.start - VALID : FAST.stop - VALID]) > np.nanmedian(scores[: FAST.start - VALID])


def test_a_region_belongs_to_the_last_row_of_its_context(plrnn: Artifact) -> None:
    frame = as_frame(made())
    found = context_traces(plrnn, frame, (1200, 1230), region_function(plrnn))["a"][:, 0]
    network, panel = plrnn.network.eval(), Panel.from_frame(frame)
    for row in (1200, 1217, 1229):
        values = torch.from_numpy(panel.values[row - 23 : row + 1]).float().unsqueeze(0)
        batch = Batch(values, torch.ones_like(values, dtype=torch.bool))
        assert found[row - 1200] == int(network.model.symbols(network.scaler.scale(batch))[0, -1])


def test_windows_nearer_to_training_than_usual_are_not_strange() -> None:
    training = TrainingRange.of(np.array([[0.0], [1000.0]]))
    config = ScoreConfig(kind="spectrum", joint="mean_abs")
    usual = np.random.default_rng(0).normal(0.5, 0.1, size=(200, 1, 1))
    model = fit_score_model(usual, np.ones((200, 1)), training, config)
    near, far = (model.score(np.full((1, 1, 1), value), np.ones((1, 1))).joint[0] for value in (0.1, 0.9))
    assert near == 0
    assert far == pytest.approx(4.0, abs=0.5)  # in robust deviations of usual windows, whatever the unit of the data


def test_regions_need_a_model_that_has_them(linear: Artifact, plrnn: Artifact) -> None:
    with pytest.raises(ModelError, match="'linear' has no linear regions"):
        scored(linear, made(), {"kind": "regions"})
    shallow = fitted({"name": "plrnn", "latent": 4, "hidden": 8, "ensemble": 1})
    with pytest.raises(ModelError, match="almost_linear"):
        scored(shallow, made(), {"kind": "regions"})


def test_a_window_longer_than_the_training_rows_is_refused(linear: Artifact) -> None:
    with pytest.raises(DataError, match=r"'a': 1000 training rows .* lower score\.window, to 600"):
        scored(linear, made(), {"kind": "spectrum", "window": 1200})


@pytest.mark.parametrize(
    ("score", "part"),
    [
        ({"window": 100}, "window has no effect with kind 'normalised'"),
        ({"kind": "tail", "stride": 4}, "stride has no effect"),
        ({"kind": "spectrum", "bins": 5}, "bins has no effect"),
        ({"kind": "regions", "lag": 5}, "lag has no effect"),
        ({"kind": "states", "steps": [1]}, "steps and horizon_reduction are for forecasts"),
        ({"kind": "spectrum", "horizon_reduction": "last"}, "steps and horizon_reduction"),
        ({"kind": "spectrum", "window": 8}, "window"),
    ],
)
def test_settings_without_effect_are_refused(score: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        validate(DetectConfig, {"score": score})
