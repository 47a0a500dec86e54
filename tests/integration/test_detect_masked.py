"""Hidden cells as a score: what is told of the newest row, what it is told from, and what a forecast does not see."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.anomaly.config import DetectConfig, ScoreConfig
from tsforge.anomaly.contexts import context_traces
from tsforge.anomaly.detector import detect
from tsforge.anomaly.masked import masked_function
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tensors import Batch
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.metrics.anomaly import auc_roc

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS, TRAIN, VALID, CONTEXT = 2200, 1200, 1500, 16
FAULTS = (slice(1800, 1840), slice(1950, 1990), slice(2100, 2140))
SCORE = {"kind": "masked", "joint": "max_abs"}
MODEL = {
    **{"name": "chimera", "d_model": 16, "d_state": 4, "num_layers": 1, "skip": "none", "dropout": 0.0},
    **{"normalisation": "none", "variate_embedding": True, "reconstruct": True},
}


def made() -> pl.DataFrame:
    """Three sensors of one AR(1) chain; in the faults the third follows another chain of the same law."""
    rng = np.random.default_rng(0)

    def chain() -> np.ndarray:
        values, found = 0.0, np.empty(ROWS)
        for row, push in enumerate(rng.normal(size=ROWS)):
            values = 0.8 * values + 0.6 * push
            found[row] = values
        return found

    shared, other = chain(), chain()
    columns = {name: shared + 0.1 * rng.normal(size=ROWS) for name in "xyz"}
    for fault in FAULTS:
        columns["z"][fault] = other[fault]
    columns["x"][1600:1603] = np.nan
    times = [START + timedelta(hours=row) for row in range(ROWS)]
    return pl.DataFrame({"id": ["a"] * ROWS, "time": times, **columns}).fill_nan(None)


def as_frame(table: pl.DataFrame) -> SeriesFrame:
    return SeriesFrame.from_long(table, time="time", series_id="id", targets=["x", "y", "z"], freq="1h")


def fitted(**changes: Any) -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": MODEL | changes,
        "window": {"context_length": CONTEXT, "horizon": 1},
        "split": {"kind": "counts", "counts": [TRAIN, VALID - TRAIN, ROWS - VALID]},
        "train": {"max_epochs": 8, "learning_rate": 1e-2, "batch_size": 32, "accelerator": "cpu"},
    }
    return fit_frame(as_frame(made()), validate(FitConfig, settings))[0]


@pytest.fixture(scope="module")
def chimera() -> Artifact:
    return fitted()


def test_a_sensor_that_leaves_the_others_is_found_where_its_forecast_stays_good(chimera: Artifact) -> None:
    table = made()
    rule = {"calibration": {"min_scale_rows": 100}, "rule": {"kind": "quantile", "alpha": 0.01}}
    found = {}
    for kind in ("masked", "normalised"):
        score: dict[str, Any] = {"kind": kind, "joint": "max_abs"} | ({"steps": [1]} if kind == "normalised" else {})
        report = detect(chimera, as_frame(table), validate(DetectConfig, {"score": score} | rule))
        scores = report.scores.table.filter(pl.col("variate") == "z").sort("time")
        values = scores["score"].fill_null(np.nan).to_numpy()
        labels = np.zeros(ROWS, dtype=bool)
        for fault in FAULTS:
            labels[fault] = True
        labels = labels[ROWS - len(values) :]
        seen = ~np.isnan(values)
        found[kind] = auc_roc(labels[seen], values[seen])
        if kind == "masked":
            assert report.metadata["latency"] == 0
            assert report.metadata["score_answers"] == "variate at odds with its past and with the other variates"
            expected = scores["expected"].fill_null(np.nan).to_numpy()
            usual = ~labels & ~np.isnan(expected)
            rest = table["z"].to_numpy()[ROWS - len(values) :][usual] - expected[usual]
            assert rest.std() < 0.35, "cells are told worse than by the neighbours"
    assert found["masked"] > 0.8, found
    assert found["normalised"] < 0.65, found


def test_the_told_row_does_not_depend_on_the_cell_it_tells_nor_on_later_rows(chimera: Artifact) -> None:
    """Each cell of the newest row is changed in turn: what is told of it stays, what is told of the others moves."""
    network = chimera.network
    data = made().select("x", "y", "z").to_numpy()
    row = 1700
    context = data[row - CONTEXT + 1 : row + 1]

    def told(values: np.ndarray) -> np.ndarray:
        batch = Batch(torch.tensor(values[None], dtype=torch.float32), torch.ones(1, CONTEXT, 3, dtype=torch.bool))
        batch = batch._replace(series_index=torch.tensor([0]), cutoff_index=torch.tensor([row + 1]))
        with torch.no_grad():
            return masked_function(chimera).compute(batch, network.scaler.scale(batch))[0][0].double().numpy()

    before = told(context)
    for variate in range(3):
        moved = context.copy()
        moved[-1, variate] += 1.0
        change = np.abs(told(moved) - before)
        assert change[variate] < 1e-6
        assert np.delete(change, variate).max() > 1e-2
    function = masked_function(chimera)
    frame = match_frame(chimera, as_frame(made()))
    later = made().with_columns(
        pl.when(pl.col("time") > START + timedelta(hours=row)).then(pl.col(name) + 5.0).otherwise(pl.col(name))
        for name in "xyz"
    )
    rows = (row - 5, row + 6)
    found = [
        context_traces(chimera, match_frame(chimera, part), rows, function)["a"] for part in (frame, as_frame(later))
    ]
    np.testing.assert_allclose(found[0][5], before, rtol=1e-4, atol=1e-5)
    assert np.array_equal(found[0][:6], found[1][:6])
    assert not np.array_equal(found[0][6:], found[1][6:])


def test_what_cannot_do_it_says_so() -> None:
    plain = fitted(reconstruct=False)
    rule = {"calibration": {"min_scale_rows": 100}}
    with pytest.raises(ModelError, match=r"'chimera' was not fitted to tell hidden cells.*model\.reconstruct=true"):
        detect(plain, as_frame(made()), validate(DetectConfig, {"score": SCORE} | rule))
    for changes, message in (
        ({"steps": [1]}, "steps and horizon_reduction are for forecasts"),
        ({"window": 20}, "window has no effect with kind 'masked'"),
        ({"explained": 0.9}, "explained has no effect with kind 'masked'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ScoreConfig, SCORE | changes)
