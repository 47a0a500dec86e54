"""Every kind of score through ``detect``: what it finds, what it must not read, and what refuses it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly import deviations as module
from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.contexts import context_traces
from tsforge.anomaly.detector import detect
from tsforge.anomaly.latent import fit_latent, hidden_function
from tsforge.anomaly.reconstruction import WindowPca
from tsforge.app.detect import list_detections, read_detection
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.predict import artifact_panel
from tsforge.forecasting.rolling import rolling_forecasts

START = datetime(2024, 1, 1)
ROWS, TRAIN, VALID, NOW = 1300, 500, 900, 1100
FAULT = slice(1000, 1010)


def made(rows: int = ROWS) -> pl.DataFrame:
    """Two coupled oscillations and a mode of the day; y leaves x for ten hours; some hours are missing."""
    rng = np.random.default_rng(0)
    hour = np.arange(rows)
    x = np.sin(2 * np.pi * hour / 24) + 0.05 * rng.normal(size=rows)
    y = 0.8 * np.cos(2 * np.pi * hour / 24) + 0.05 * rng.normal(size=rows)
    y[FAULT] = 0.9 - 0.1 * rng.normal(size=10)
    x[700:703] = y[700:703] = y[1050] = np.nan
    times = [START + timedelta(hours=int(h)) for h in hour]
    night = (hour % 24 < 8).astype(float)
    return pl.DataFrame({"id": ["a"] * rows, "time": times, "x": x, "y": y, "night": night}).fill_nan(None)


def as_frame(data: pl.DataFrame) -> SeriesFrame:
    return SeriesFrame.from_long(data, time="time", series_id="id", targets=["x", "y"], known=["night"])


def fitted(model: dict[str, Any], **changes: Any) -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": model,
        "window": {"context_length": 24, "horizon": 4},
        "split": {"kind": "counts", "counts": [TRAIN, VALID - TRAIN, ROWS - VALID]},
        "train": {"max_epochs": 2, "learning_rate": 5e-3, "accelerator": "cpu"},
    }
    return fit_frame(as_frame(made()), validate(FitConfig, settings | changes))[0]


@pytest.fixture(scope="module")
def linear() -> Artifact:
    return fitted({"name": "linear"}, likelihood={"name": "normal"})


@pytest.fixture(scope="module")
def s4() -> Artifact:
    return fitted({"name": "s4", "d_model": 8, "d_state": 8, "num_layers": 1})


@pytest.fixture(scope="module")
def plrnn() -> Artifact:
    return fitted({"name": "plrnn", "latent": 6, "hidden": 12, "ensemble": 1})


def scored(artifact: Artifact, data: pl.DataFrame, score: dict[str, Any], **more: Any) -> AnomalyReport:
    settings = {"calibration": {"min_scale_rows": 100}, "rule": {"kind": "quantile", "alpha": 0.01}} | more
    return detect(artifact, as_frame(data), validate(DetectConfig, {"score": score} | settings))


def joint(report: AnomalyReport) -> np.ndarray:
    table = report.scores.table.filter(pl.col("variate") == JOINT).sort("time")
    return table["score"].fill_null(np.nan).to_numpy()


def later_changed(data: pl.DataFrame, now: int = NOW) -> pl.DataFrame:
    inside = pl.col("time") > START + timedelta(hours=now)
    return data.with_columns(pl.when(inside).then(pl.col(c) + 3.0).otherwise(pl.col(c)).alias(c) for c in "xy")


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"kind": "interval"}),
    ("linear", {"kind": "nll", "joint": "mean_abs"}),
    ("linear", {"kind": "normalised", "smoothing": {"kind": "cusum", "shift": 2.0}}),
    ("linear", {"kind": "normalised", "smoothing": {"kind": "median", "window": 3}}),
    ("linear", {"kind": "reconstruction", "window": 12}),
    ("linear", {"kind": "reconstruction", "window": 12, "overlap_reduction": "median"}),
    ("linear", {"kind": "innovation"}),
    ("linear", {"kind": "innovation", "window": 3, "order": 4, "joint": "balanced"}),
    ("s4", {"kind": "latent", "joint": "mean_abs"}),
    ("plrnn", {"kind": "growth", "steps": [1, 3]}),
]


@pytest.mark.parametrize(("name", "score"), KINDS)
def test_each_kind_finds_the_fault_and_reads_no_row_later_than_its_latency(
    name: str, score: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Checklist 5: scores, p-values, thresholds and alarms up to a row do not move when later rows do."""
    artifact: Artifact = request.getfixturevalue(name)
    data = made()
    before = scored(artifact, data, score)
    after = scored(artifact, later_changed(data), score)
    until = NOW + 1 - before.metadata["latency"]
    tables = [report.scores.table.filter(pl.col("variate") == JOINT).sort("time") for report in (before, after)]
    for column in ("score", "p_value", "threshold", "alarm"):
        assert tables[0][column][: until - VALID].equals(tables[1][column][: until - VALID]), column
    assert not tables[0]["score"][until - VALID :].equals(tables[1]["score"][until - VALID :])
    scores = joint(before)
    fault = scores[FAULT.start - VALID : FAULT.stop - VALID]
    assert np.nanmax(fault) > np.nanquantile(scores[: FAULT.start - VALID], 0.99)
    missing = made().select(pl.all_horizontal(pl.col("x", "y").is_null())).to_series().to_numpy()
    assert np.isnan(scores[missing[VALID:]]).all()


def test_a_score_that_peeks_one_row_ahead_is_caught(linear: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checklist 5, the saboteur: deviations shifted by one row."""
    honest = module.compared

    def peeking(*args: Any) -> np.ndarray:
        found = honest(*args)
        return np.concatenate([found[:, 1:], found[:, -1:]], axis=1)

    monkeypatch.setattr(module, "compared", peeking)
    with pytest.raises(AssertionError, match="score"):
        test_each_kind_finds_the_fault_and_reads_no_row_later_than_its_latency(
            "linear", {"kind": "normalised"}, type("Held", (), {"getfixturevalue": lambda *_: linear})()
        )


def test_a_reconstruction_of_latency_0_that_reads_its_whole_window_is_caught(
    linear: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checklist 5, the saboteur: ``last`` answers with the median over windows, some of which end later."""
    honest = WindowPca.expected
    monkeypatch.setattr(WindowPca, "expected", lambda self, values, overlap="last": honest(self, values, "median"))
    with pytest.raises(AssertionError, match="score"):
        test_each_kind_finds_the_fault_and_reads_no_row_later_than_its_latency(
            "linear",
            {"kind": "reconstruction", "window": 12},
            type("Held", (), {"getfixturevalue": lambda *_: linear})(),
        )


def test_interval_deviates_are_the_conformal_score_in_half_widths(linear: Artifact) -> None:
    frame = match_frame(linear, as_frame(made()))
    config = validate(ScoreConfig, {"kind": "interval", "interval": 0.9, "steps": [2]})
    panel = artifact_panel(linear, frame)
    found = module.collect_deviations(linear, frame, config, (VALID, ROWS), panel, (0, TRAIN)).deviations[0, :, 0]
    told = rolling_forecasts(linear, frame, VALID, ROWS, steps=2, quantile_levels=(0.05, 0.95))
    assert told.quantiles is not None
    low, high = np.moveaxis(told.quantiles[0, :, 1], -1, 0)
    y = made().select("x", "y").to_numpy()[VALID:]
    conformal = np.maximum(low - y, y - high)  # negative inside
    assert np.nanmin(conformal) < 0.0 < np.nanmax(conformal)
    np.testing.assert_allclose(np.abs(found) - 1.0, conformal / (0.5 * (high - low)), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(np.sign(found), np.sign(y - 0.5 * (low + high)))


def test_nll_is_that_of_the_forecast_distribution_in_data_units(linear: Artifact) -> None:
    told = rolling_forecasts(
        linear,
        as_frame(made()),
        VALID,
        ROWS,
        steps=1,
        quantile_levels=(0.1586552539, 0.8413447461),
        outputs=("log_density",),
    )
    assert told.quantiles is not None
    assert told.log_density is not None
    sigma = 0.5 * (told.quantiles[..., 1] - told.quantiles[..., 0])
    z = (told.target[:, :, None] - told.mean) / sigma
    expected = -0.5 * z**2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(told.log_density, expected, rtol=1e-3, atol=1e-3)


def test_latent_distances_are_those_of_the_training_states_by_hand(s4: Artifact) -> None:
    frame, rows, training = as_frame(made()), (VALID, VALID + 40), (0, TRAIN)
    before, after = (context_traces(s4, frame, part, hidden_function(s4))["a"] for part in (training, rows))
    config = validate(ScoreConfig, {"kind": "latent"})
    panel = artifact_panel(s4, match_frame(s4, frame))
    found = module.collect_deviations(s4, match_frame(s4, frame), config, rows, panel, training).deviations[0, :, 0]
    assert found.shape == (40, 2)  # independent variates: one state each
    for r in range(2):
        h = before[:, r][~np.isnan(before[:, r]).any(axis=1)]
        covariance = np.cov(h.T)
        values, directions = np.linalg.eigh(covariance)
        order = np.argsort(-values)
        count = int(np.argmax(np.cumsum(values[order]) / values.sum() >= 0.95)) + 1
        kept = directions[:, order[:count]]
        for t in range(40):
            c = kept.T @ (after[t, r] - h.mean(axis=0))
            expected = np.sqrt(c @ np.linalg.inv(kept.T @ covariance @ kept) @ c)
            assert found[t, r] == pytest.approx(expected, rel=1e-6)


def test_latent_scores_answer_another_question_and_name_it(s4: Artifact, linear: Artifact) -> None:
    report = scored(s4, made(), {"kind": "latent", "joint": "mean_abs"})
    assert report.metadata["score_answers"] == "unfamiliar regime"
    assert scored(linear, made(), {"kind": "normalised"}).metadata["score_answers"] == "bad forecast"
    with pytest.raises(ModelError, match="'linear' has no hidden state"):
        scored(linear, made(), {"kind": "latent"})
    with pytest.raises(ModelError, match="'linear' does not tell how errors grow"):
        scored(linear, made(), {"kind": "growth"})
    with pytest.raises(ModelError, match="has no density"):
        scored(s4, made(), {"kind": "nll"})
    with pytest.raises(DataError, match="never moves"):
        fit_latent(np.ones((60, 1, 3)))
    with pytest.raises(DataError, match="latent scores need 50 training rows .* 49 have one"):
        fit_latent(np.random.default_rng(0).normal(size=(49, 1, 3)))
    with pytest.raises(DataError, match="0 have one; give the detector all rows that trained"):
        fit_latent(np.full((200, 1), np.nan))  # of contexts that no series has
    states = np.random.default_rng(0).normal(size=(60, 2, 3))
    alone = fit_latent(states[:, 1:]).distances(states[:, 1:])
    states[:, 0] = 0.1  # a mean of 60 such numbers rounds away from it
    found = fit_latent(states).distances(states)
    assert np.isnan(found[:, 0]).all()
    np.testing.assert_array_equal(found[:, 1:], alone)


def test_late_scores_are_late_and_nothing_rests_on_scores_that_read_scored_rows(linear: Artifact) -> None:
    score = {"kind": "reconstruction", "window": 12, "overlap_reduction": "mean"}
    report = scored(linear, made(), score)
    assert report.metadata["latency"] == 11
    assert any("each score reads 11 later rows" in notice for notice in report.metadata["notices"])
    assert np.isnan(joint(report)[-11:]).all()
    other = scored(linear, later_changed(made(), VALID - 1), score)
    for key in ("rows", "tail", "smallest_conformal_p"):
        assert report.metadata["series"]["a"][key] == other.metadata["series"]["a"][key]
    # the threshold of a static rule comes from calibration scores alone
    thresholds = [r.scores.table.filter(pl.col("variate") == JOINT)["threshold"][0] for r in (report, other)]
    assert thresholds[0] == thresholds[1]
    assert scored(linear, made(), {"kind": "reconstruction", "window": 12}).metadata["latency"] == 0


def test_reconstruction_says_what_it_expected(linear: Artifact) -> None:
    report = scored(linear, made(), {"kind": "reconstruction", "window": 12})
    table = report.scores.table.filter(pl.col("variate") == "y").sort("time")
    usual = table.slice(0, 60).drop_nulls(["expected", "value"])
    assert np.corrcoef(usual["expected"], usual["value"])[0, 1] > 0.97
    assert report.events.sort("peak_score")["variates"][-1][0]["variate"] == "y"


def test_innovations_by_the_command(site: Any, command: Any) -> None:
    """The jump of a.x on day 61 through ``tsforge detect``: found, and what the score says of it."""
    settings = ["detector.score.kind=innovation", "detector.score.order=6", "detector.rule.alarms_per_day=0.1"]
    code, out, err = command("detect", "artifact=latest", *settings, "--json")
    assert code == 0, err
    told = json.loads(out)
    (found,) = list_detections(Workspace.open(site.home))
    report = read_detection(Workspace.open(site.home), str(found["id"]))
    assert (report.metadata["latency"], told["artifact"]) == (0, site.artifact)
    assert report.metadata["score_answers"] == "row at odds with a linear state-space model of all variates"
    first = report.events.sort("peak_score")[-1].to_dicts()[0]
    assert (first["series_id"], str(first["start"])[:16], first["variates"][0]["variate"]) == (
        "a",
        "2026-03-03 05:00",
        "x",
    )
    table = report.scores.table.filter(pl.col("variate") == "x", pl.col("series_id") == "b").drop_nulls("value")
    assert np.abs(table["value"] - table["expected"]).median() < 1.0
    code, _, err = command("detect", "artifact=latest", "detector.score.order=6")
    assert code == 2
    assert "order has no effect with kind 'normalised'" in err


def test_modes_have_thresholds_of_their_own_and_small_ones_are_pooled_with_a_notice(s4: Artifact) -> None:
    data = made().with_columns(
        y=pl.when(pl.col("night") == 1.0).then(pl.col("y")).otherwise(pl.col("y") * 1.0)
        + pl.Series(np.random.default_rng(1).normal(size=ROWS)) * pl.col("night") * 0.5
    )
    rule = {"kind": "quantile", "alpha": 0.2}  # 10 / alpha = 50 rows a mode are enough
    plain = scored(s4, data, {}, rule=rule)
    own = scored(s4, data, {}, rule=rule, calibration={"min_scale_rows": 100, "by": "night"})
    night = data["night"].to_numpy()[VALID:] == 1.0
    alarms = [
        r.scores.table.filter(pl.col("variate") == JOINT).sort("time")["alarm"].fill_null(False).to_numpy()
        for r in (plain, own)
    ]
    # normal rows alone: by one threshold the loud nights have most of the alarms
    usual = np.ones(ROWS - VALID, dtype=bool)
    usual[FAULT.start - VALID : FAULT.stop - VALID + 24] = False
    pooled, by_mode = ([found[usual & part].mean() for part in (night, ~night)] for found in alarms)
    assert pooled[0] > 2.5 * pooled[1]
    assert by_mode[0] / by_mode[1] < 0.6 * pooled[0] / pooled[1]
    assert not any("calibration.by" in notice for notice in own.metadata["notices"])
    small = scored(s4, data, {}, calibration={"min_scale_rows": 100, "by": "hour_of_week"})
    assert any("168 of 168 buckets" in notice for notice in small.metadata["notices"])
    with pytest.raises(ConfigError, match="'nihgt' is neither hour_of_week nor a column"):
        scored(s4, data, {}, calibration={"by": "nihgt"})
    with pytest.raises(ConfigError, match="promises no alarm rate"):
        scored(s4, data, {}, rule={"kind": "fixed", "value": 3.0}, calibration={"by": "night", "min_scale_rows": 100})


def test_random_ties_fall_the_same_way_from_any_start(linear: Artifact) -> None:
    data = made().with_columns(pl.col("x", "y").round(0))
    calibration = {"min_scale_rows": 100, "ties": "random", "seed": 4, "method": "conformal"}
    one, same, other = (
        scored(linear, data, {"joint": "max_abs"}, calibration=calibration | {"seed": seed}) for seed in (4, 4, 5)
    )
    p = [r.scores.table.filter(pl.col("variate") == JOINT)["p_value"] for r in (one, same, other)]
    assert p[0].equals(p[1])
    conservative = scored(
        linear, data, {"joint": "max_abs"}, calibration={"min_scale_rows": 100, "method": "conformal"}
    )
    assert (
        p[0].drop_nulls() <= conservative.scores.table.filter(pl.col("variate") == JOINT)["p_value"].drop_nulls()
    ).all()
    with pytest.raises(ConfigError, match="seed has no effect"):
        scored(linear, data, {}, calibration={"seed": 3})
