"""Noise in data is measured, and windows get what is missing to 5 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.core.config import validate
from tsforge.data.attractors import simulate
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.network import Reconstruction
from tsforge.dynamics.training_noise import observation_noise, training_noise

LORENZ = simulate("lorenz63", 4000, 0.01, standardise=True)
WAVE = np.sin(np.arange(4000)[:, None] * np.array([0.05, 0.3]))
NORMAL = np.random.default_rng(0).normal(size=(4000, 3))


@pytest.mark.parametrize("level", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("clean", [LORENZ, WAVE], ids=["lorenz63", "sinusoids"])
def test_known_noise_is_found_within_five_per_cent(clean: np.ndarray, level: float) -> None:
    noisy = clean + level * NORMAL[:, : clean.shape[1]]
    np.testing.assert_allclose(observation_noise([noisy]), level, rtol=0.05)


@pytest.mark.parametrize("clean", [LORENZ, WAVE], ids=["lorenz63", "sinusoids"])
def test_data_without_noise_have_none(clean: np.ndarray) -> None:
    assert (observation_noise([clean]) < 1e-4).all()
    assert (observation_noise([clean.astype(np.float32).astype(np.float64)]) < 1e-4).all()


def test_white_noise_is_all_noise() -> None:
    np.testing.assert_allclose(observation_noise([NORMAL]), 1.0, rtol=0.05)


def test_each_variate_has_its_own() -> None:
    found = observation_noise([LORENZ + np.array([0.0, 0.02, 0.2]) * NORMAL])
    assert found[0] < 1e-4
    np.testing.assert_allclose(found[1:], [0.02, 0.2], rtol=0.05)


def test_no_difference_reaches_over_an_end_or_a_missing_value() -> None:
    """Jumps of 10 standard deviations every 50 rows, between trajectories and over a hole."""
    steps = 10.0 * np.arange(80)[:, None, None]
    pieces = LORENZ.reshape(80, 50, 3) + steps
    assert (observation_noise(list(pieces)) < 1e-4).all()
    assert (observation_noise([pieces.reshape(-1, 3)]) > 0.01).all()
    pieces[:, -1] = np.nan
    assert (observation_noise([pieces.reshape(-1, 3)]) < 1e-4).all()


def test_what_is_lacking_is_added() -> None:
    noisy = LORENZ + np.array([0.0, 0.03, 0.2]) * NORMAL
    found = training_noise([noisy], None)
    np.testing.assert_allclose(found.added[:2], [0.05, 0.04], rtol=0.03)
    assert found.added[2] == 0.0
    np.testing.assert_allclose(found.added, training_noise([noisy[:2000], noisy[2000:]], None).added, rtol=0.05)


def test_data_that_have_the_five_per_cent_get_nothing_and_a_scale_is_followed() -> None:
    noisy = LORENZ + 0.05 * NORMAL
    assert training_noise([noisy], None).added.tolist() == [0.0, 0.0, 0.0]
    assert training_noise([NORMAL], None).added.tolist() == [0.0, 0.0, 0.0]
    scale = np.array([1.0, 1000.0, 0.001])
    np.testing.assert_allclose(training_noise([LORENZ * scale + 7], None).added, 0.05 * scale, rtol=0.01)


def test_a_number_is_taken_as_it_is_and_nothing_is_guessed() -> None:
    assert training_noise([LORENZ], 0.3).added.tolist() == [0.3, 0.3, 0.3]
    assert training_noise([LORENZ], 0.0).added.tolist() == [0.0, 0.0, 0.0]
    holes = LORENZ.copy()
    holes[::2, 1] = np.nan  # no two differences of neighbours are left
    found = training_noise([holes], None)
    assert np.isnan(found.measured).tolist() == [False, True, False]
    np.testing.assert_allclose(found.added, [0.05, 0.0, 0.05], rtol=0.01)


def test_published_data_have_the_noise_they_are_said_to_have(shared_data: Path) -> None:
    for name, expected in (("lorenz63_noise05_train", 0.05), ("lorenz63_noise10_train", 0.1), ("roessler", 0.0)):
        rows = pl.read_parquet(shared_data / "dynamics" / f"{name}.parquet", columns=["x01", "x02", "x03"]).to_numpy()
        rows = (rows - rows.mean(0)) / rows.std(0)
        np.testing.assert_allclose(observation_noise([rows]), expected, rtol=0.02, atol=5e-4)


@pytest.mark.parametrize(("noise", "added"), [(None, [0.05, 0.0]), (0.0, [0.0, 0.0]), (0.1, [0.1, 0.1])])
def test_windows_get_it(noise: float | None, added: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise on the inputs alone, windows less targets are the noise."""
    seen: list[torch.Tensor] = []
    original = Reconstruction.loss

    def noted(self: Reconstruction, x: torch.Tensor, targets: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append((x[:, 1:] - targets).flatten(0, 2))
        return original(self, x, targets, *args)

    monkeypatch.setattr(Reconstruction, "loss", noted)
    size = {"epochs": 2, "batches_per_epoch": 10, "sequence_length": 20}
    where = {} if noise == 0 else {"noise_on": "inputs"}  # of no noise there is no place
    plain = {"data": {"path": "x.parquet"}, "model": {"hidden": 4}, "train": {**size, "noise": noise, **where}}
    rows = WAVE + np.array([0.0, 0.1]) * NORMAL[:, :2]
    train_seeds([rows], validate(ReconstructionConfig, plain), [0])
    spread = torch.cat(seen).std(0).numpy()
    np.testing.assert_allclose(spread, np.array(added) * (1 if noise is not None else rows.std(0)), rtol=0.05)
