"""Lyapunov spectra against closed forms and the Lorenz system, and the Kaplan-Yorke dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.attractors import flow_map, simulate
from tsforge.metrics.lyapunov import kaplan_yorke, lyapunov_spectrum, spectrum_of_jacobians

Array = np.ndarray[Any, np.dtype[np.float64]]


def constant(matrix: Array) -> Any:
    return lambda z: np.broadcast_to(matrix, (*z.shape, len(matrix)))


def henon(z: Array) -> Array:
    return np.stack([1.0 - 1.4 * z[..., 0] ** 2 + z[..., 1], 0.3 * z[..., 0]], axis=-1)


def henon_jacobian(z: Array) -> Array:
    result = np.zeros((*z.shape, 2))
    result[..., 0, 0], result[..., 0, 1], result[..., 1, 0] = -2.8 * z[..., 0], 1.0, 0.3
    return result


def test_a_linear_map_has_the_logarithms_of_its_multipliers() -> None:
    values = np.array([1.3, 0.9, 0.2])
    basis = np.random.default_rng(0).standard_normal((3, 3))
    matrix = basis @ np.diag(values) @ np.linalg.inv(basis)
    found = lyapunov_spectrum(
        lambda z: z, constant(matrix), np.zeros(3), steps=500, transient=3, align=200, every=2, dt=0.5
    )
    assert found.values == pytest.approx(np.log(values) / 0.5, abs=1e-9)
    assert (found.steps, found.every, found.align, found.transient, found.dt) == (500, 2, 200, 3, 0.5)


def test_a_diagonal_map_keeps_its_leading_exponents() -> None:
    """Unit vectors span invariant subspaces here: the first two are not the leading ones."""
    matrix = np.diag([0.2, 0.9, 1.3])
    found = lyapunov_spectrum(
        lambda z: z, constant(matrix), np.zeros(3), steps=300, transient=0, align=300, exponents=2
    )
    assert found.values == pytest.approx(np.log([1.3, 0.9]), abs=1e-9)


def test_a_singular_map_has_minus_infinity_and_a_diverging_one_nan() -> None:
    matrix = np.diag([0.5, 0.0])
    found = lyapunov_spectrum(lambda z: z, constant(matrix), np.zeros(2), steps=100, transient=0)
    assert found.values[0] == pytest.approx(np.log(0.5))
    assert found.values[1] < -30
    lost = lyapunov_spectrum(lambda z: 1e9 * z, constant(np.eye(2)), np.ones(2), steps=100, transient=0)
    assert np.isnan(lost.values).all()
    assert np.isnan(lost.kaplan_yorke)
    assert lost.steps == 0


@pytest.mark.parametrize("trajectories", [1, 8])
def test_henon_map(trajectories: int) -> None:
    """lambda_1 is 0.4192 (published); the sum is ln |det| = ln 0.3 exactly."""
    start = 0.1 * np.random.default_rng(0).standard_normal((trajectories, 2))
    found = lyapunov_spectrum(henon, henon_jacobian, start, steps=16_000 // trajectories, transient=500)
    assert found.values[0] == pytest.approx(0.4192, abs=0.01)
    assert found.values.sum() == pytest.approx(np.log(0.3), abs=1e-9)
    assert found.trajectories == trajectories
    assert 0 < found.standard_error[0] < 0.01


def test_one_vector_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start = np.array([0.1, 0.1])
    whole = lyapunov_spectrum(henon, henon_jacobian, start, steps=900, every=3, align=99)
    monkeypatch.setattr("tsforge.metrics.lyapunov._CHUNK_BYTES", 8 * 4 * 50)
    parts = lyapunov_spectrum(henon, henon_jacobian, start[None], steps=900, every=3, align=99)
    assert parts.values == pytest.approx(whole.values, rel=1e-10)


def test_jacobians_of_an_orbit_against_their_plain_product() -> None:
    orbit = [np.array([0.1, 0.1])]
    for _ in range(3000):
        orbit.append(henon(orbit[-1]))
    matrices = henon_jacobian(np.array(orbit[:-1]))
    found = spectrum_of_jacobians(matrices)
    pieces = spectrum_of_jacobians((matrices[a : a + 700] for a in range(0, 3000, 700)), every=4)
    assert pieces.values == pytest.approx(found.values, abs=2e-3)
    assert pieces.steps == 3000
    # growth of one vector, scaled in every step: no QR
    vector, growth = np.array([0.3, 0.7]), 0.0
    for matrix in matrices:
        vector = matrix @ vector
        size = float(np.linalg.norm(vector))
        vector, growth = vector / size, growth + np.log(size)
    assert found.values[0] == pytest.approx(growth / 3000, abs=1e-3)
    side = spectrum_of_jacobians(np.stack([matrices[:1500], matrices[1500:]], axis=1))
    assert side.values == pytest.approx(found.values, abs=2e-3)
    assert side.trajectories == 2
    assert spectrum_of_jacobians(matrices, every=7).steps == 2996


def test_checklist_8_8_lorenz63_short() -> None:
    """20 trajectories of 50 time units side by side."""
    flow = flow_map("lorenz63", 0.01)
    start = simulate("lorenz63", 20_000, 0.01, seed=1)[::1000]
    found = lyapunov_spectrum(flow.step, flow.jacobian, start, steps=5000, align=500, transient=0, every=10, dt=0.01)
    assert found.values[0] == pytest.approx(0.9056, abs=0.03)
    assert found.values[1] == pytest.approx(0.0, abs=0.03)
    assert found.values[2] == pytest.approx(-14.574, abs=0.05)
    assert found.values.sum() == pytest.approx(-(10 + 1 + 8 / 3), abs=1e-3)
    assert found.kaplan_yorke == pytest.approx(2.062, abs=0.004)


@pytest.mark.slow
def test_checklist_8_8_lorenz63_over_2000_time_units() -> None:
    flow = flow_map("lorenz63", 0.01)
    start = simulate("lorenz63", 1, 0.01)[0]
    found = lyapunov_spectrum(flow.step, flow.jacobian, start, steps=200_000, every=10, dt=0.01)
    assert found.values == pytest.approx([0.9056, 0.0, -14.572], abs=0.01)
    assert found.values.sum() == pytest.approx(-(10 + 1 + 8 / 3), abs=1e-3)
    assert found.kaplan_yorke == pytest.approx(2.062, abs=0.001)


def test_kaplan_yorke_by_hand() -> None:
    assert kaplan_yorke([0.9, 0.0, -14.5]) == pytest.approx(2 + 0.9 / 14.5)
    assert kaplan_yorke([-14.5, 0.9, 0.0]) == pytest.approx(2 + 0.9 / 14.5)
    assert kaplan_yorke([-0.1, -2.0]) == 0.0
    assert kaplan_yorke([0.0, -2.0]) == 1.0
    assert kaplan_yorke([0.5, 0.1]) == 2.0
    assert kaplan_yorke([0.5, -np.inf]) == 1.0
    assert np.isnan(kaplan_yorke([np.nan, 1.0]))
    with pytest.raises(DataError, match="at least one"):
        kaplan_yorke([])


def test_bad_input() -> None:
    identity = constant(np.eye(2))
    with pytest.raises(DataError, match="z0"):
        lyapunov_spectrum(lambda z: z, identity, np.zeros((1, 1, 2)))
    with pytest.raises(DataError, match="jacobian gave shape"):
        lyapunov_spectrum(lambda z: z, lambda z: z, np.zeros(2), steps=10)
    with pytest.raises(ConfigError, match="multiples"):
        lyapunov_spectrum(lambda z: z, identity, np.zeros(2), steps=101, every=10)
    with pytest.raises(ConfigError, match="every >= 1"):
        lyapunov_spectrum(lambda z: z, identity, np.zeros(2), every=0)
    with pytest.raises(ConfigError, match="3 exponents"):
        lyapunov_spectrum(lambda z: z, identity, np.zeros(2), exponents=3)
    with pytest.raises(DataError, match="no block"):
        spectrum_of_jacobians(np.zeros((3, 2, 2)), every=4)
    with pytest.raises(DataError, match="Jacobians must be"):
        spectrum_of_jacobians(np.zeros((3, 2, 1)))
