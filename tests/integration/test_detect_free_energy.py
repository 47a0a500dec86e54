"""The free energy of a row as a score: through ``detect``, its parts, what it must not read and what refuses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_detect_scores import (
    FAULT,
    NOW,
    ROWS,
    TRAIN,
    VALID,
    as_frame,
    fitted,
    joint,
    later_changed,
    made,
    scored,
)

from tsforge.anomaly import deviations as module
from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.contexts import context_traces
from tsforge.anomaly.free_energy import RowEnergies, energy_function
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import JOINT
from tsforge.contracts.tensors import Batch
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.forecasting.predict import artifact_panel

SCORE = {"kind": "free_energy", "joint": "mean_abs"}
SMALL = {"name": "pvrnn", "units": [16], "latents": [2], "time_constants": [1.5], "window": 6}
STEPS = {"training_steps": 3, "inference_steps": 8, "inference_rate": 0.2}


@pytest.fixture(scope="module")
def pvrnn() -> Artifact:
    train = {"max_epochs": 12, "learning_rate": 2e-2, "batch_size": 48, "accelerator": "cpu"}
    return fitted(SMALL | STEPS, train=train)


def test_the_fault_is_found_and_no_later_row_is_read(pvrnn: Artifact) -> None:
    """Scores, p-values, thresholds and alarms up to a row do not move when later rows do."""
    data = made()
    reports = [scored(pvrnn, part, SCORE) for part in (data, later_changed(data))]
    before, after = (report.scores.table.filter(pl.col("variate") == JOINT).sort("time") for report in reports)
    until = NOW + 1 - VALID
    for column in ("score", "p_value", "threshold", "alarm"):
        assert before[column][:until].equals(after[column][:until]), column
    assert not before["score"][until:].equals(after["score"][until:])
    scores = joint(reports[0])
    fault = scores[FAULT.start - VALID : FAULT.stop - VALID]
    assert np.nanmax(fault) > np.nanquantile(scores[: FAULT.start - VALID], 0.99)
    assert reports[0].metadata["latency"] == 0
    assert reports[0].metadata["score_answers"].startswith("row that the model explains badly")
    missing = data.select(pl.all_horizontal(pl.col("x", "y").is_null())).to_series().to_numpy()
    assert np.isnan(scores[missing[VALID:]]).all()


def test_a_score_of_the_next_row_is_caught(pvrnn: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur: every row gets what the row after it costs."""
    honest = module.context_traces

    def peeking(artifact: Artifact, frame: Any, rows: tuple[int, int], function: Any) -> dict[str, np.ndarray]:
        return honest(artifact, frame, (rows[0] + 1, rows[1] + 1), function)

    monkeypatch.setattr(module, "context_traces", peeking)
    with pytest.raises(AssertionError, match="score"):
        test_the_fault_is_found_and_no_later_row_is_read(pvrnn)


def test_rows_cost_what_the_model_says_of_the_context_that_ends_with_them(pvrnn: Artifact) -> None:
    data = made()
    frame = match_frame(pvrnn, as_frame(data))
    rows = (695, 712)
    found = RowEnergies.of(context_traces(pvrnn, frame, rows, energy_function(pvrnn))["a"])
    table = data.select("x", "y").to_numpy()
    for place, row in enumerate(range(*rows)):
        batch = one_context(table[row - 23 : row + 1][None])
        with torch.no_grad():
            told = pvrnn.network.model.free_energy(pvrnn.network.scaler.scale(batch))
        seen = ~np.isnan(table[row])
        np.testing.assert_allclose(found.reconstruction[place][seen], told[0][0].numpy()[seen], rtol=1e-4, atol=1e-4)
        assert np.isnan(found.reconstruction[place][~seen]).all()
        np.testing.assert_allclose(found.divergence[place], told[1][0].numpy(), rtol=1e-4, atol=1e-5)
        loc, scale = pvrnn.network.scaler.stats(batch)
        np.testing.assert_allclose(found.expected[place], (told[2] * scale[:, 0] + loc[:, 0])[0], rtol=1e-4, atol=1e-4)


def one_context(context: np.ndarray) -> Batch:
    values = torch.tensor(context, dtype=torch.float32)
    return Batch(values.nan_to_num(), ~values.isnan(), series_index=torch.tensor([0]), cutoff_index=torch.tensor([0]))


def test_parts_add_up_and_each_is_a_score(pvrnn: Artifact) -> None:
    frame = match_frame(pvrnn, as_frame(made()))
    panel = artifact_panel(pvrnn, frame)
    parts = {}
    for part in ("both", "reconstruction", "divergence"):
        config = validate(ScoreConfig, SCORE | {"part": part})
        parts[part] = module.collect_deviations(pvrnn, frame, config, (VALID, ROWS), panel, (0, TRAIN))
    told = {name: found.deviations[0, :, 0] for name, found in parts.items()}
    np.testing.assert_allclose(told["both"], told["reconstruction"] + told["divergence"], rtol=1e-12)
    seen = ~np.isnan(told["both"]).any(axis=1)
    assert (told["divergence"][seen, 0] == told["divergence"][seen, 1]).all()  # shared by all variates
    assert (told["divergence"][seen] >= 0).all()
    values = parts["both"].values[0]
    assert (np.isnan(values) == np.isnan(told["both"])).all()
    usual = (values - parts["both"].expected[0])[:80]
    assert np.nanmean(usual**2) < 0.5 * np.nanvar(values)
    report = scored(pvrnn, made(), SCORE | {"part": "divergence"})
    assert np.isfinite(joint(report)).sum() > 300


def test_values_that_were_masked_as_impossible_are_far_out() -> None:
    energies = RowEnergies(np.array([[0.5, np.nan]]), np.array([0.25]), np.zeros((1, 2)))
    both = energies.costs(np.array([[1.0, 9.0]]), "both", impossible=1250.0)
    np.testing.assert_array_equal(both, [[0.75, 1250.25]])
    missing = energies.costs(np.array([[1.0, np.nan]]), "reconstruction", impossible=1250.0)
    np.testing.assert_array_equal(missing, [[0.5, np.nan]])
    early = RowEnergies(np.full((1, 2), np.nan), np.array([np.nan]), np.zeros((1, 2)))  # no whole context
    assert np.isnan(early.costs(np.ones((1, 2)), "both", impossible=1250.0)).all()


def test_what_cannot_do_it_says_so(pvrnn: Artifact) -> None:
    linear = fitted({"name": "linear"})
    with pytest.raises(ModelError, match="'linear' has no free energy.*needs an artifact of pvrnn"):
        scored(linear, made(), SCORE)
    for changes, message in (
        ({"steps": [1]}, "steps and horizon_reduction are for forecasts"),
        ({"window": 20}, "window has no effect with kind 'free_energy'"),
        ({"part": "all"}, "part"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ScoreConfig, SCORE | changes)
    with pytest.raises(ConfigError, match="part has no effect with kind 'latent'"):
        validate(ScoreConfig, {"kind": "latent", "part": "both"})
