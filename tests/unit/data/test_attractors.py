"""Simulated systems against an independent integrator, finite differences, known facts and the shared files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.integrate import solve_ivp

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.attractors import (
    SYSTEMS,
    flow_map,
    hindmarsh_rose,
    lorenz63,
    lorenz63_with_shift,
    lorenz96,
    roessler,
    shift,
    simulate,
)
from tsforge.metrics.dynamics import d_h, d_stsp
from tsforge.metrics.lyapunov import lyapunov_spectrum

Array = np.ndarray[Any, np.dtype[np.float64]]


def right_hand_side(name: str, z: Array) -> Array:
    """The published equations, written again."""
    if name == "lorenz96":
        return (np.roll(z, -1) - np.roll(z, 2)) * np.roll(z, 1) - z + 8.0
    x, y, w = z
    if name == "lorenz63":
        return np.array([10.0 * (y - x), x * (28.0 - w) - y, x * y - 8.0 / 3.0 * w])
    if name == "roessler":
        return np.array([-y - w, x + 0.2 * y, 0.2 + w * (x - 5.7)])
    return np.array([y - x**3 + 3 * x**2 - w + 3.25, 1 - 5 * x**2 - y, 0.006 * (4.0 * (x + 1.6) - w)])


@pytest.mark.parametrize("name", SYSTEMS)
def test_trajectories_follow_the_equations(name: str) -> None:
    first = simulate(name, 1, seed=3)[0]
    found = simulate(name, 41, 0.01, start=first, transient=0.0, substeps=4)
    times = 0.01 * np.arange(41)
    expected = solve_ivp(lambda _, z: right_hand_side(name, z), (0, 0.4), first, t_eval=times, rtol=1e-11, atol=1e-12)
    assert found == pytest.approx(expected.y.T, rel=1e-5, abs=1e-5)


def test_the_error_falls_with_the_fourth_power_of_the_step() -> None:
    first = simulate("lorenz63", 1)[0]
    exact = simulate("lorenz63", 2, 0.1, start=first, transient=0.0, substeps=160)[1]
    errors = [
        np.linalg.norm(simulate("lorenz63", 2, 0.1, start=first, transient=0.0, substeps=n)[1] - exact)
        for n in (10, 20)
    ]
    assert 11 < errors[0] / errors[1] < 23


@pytest.mark.parametrize(
    "system", [lorenz63(speed=1.3), lorenz96(5), roessler(), hindmarsh_rose()], ids=lambda s: s.name
)
@pytest.mark.parametrize("substeps", [1, 3])
def test_flow_map_is_the_simulation_and_its_jacobian_exact(system: Any, substeps: int) -> None:
    states = simulate(system, 6, 0.05, substeps=substeps)
    flow = flow_map(system, 0.05, substeps=substeps)
    assert flow.step(states[:-1]) == pytest.approx(states[1:], rel=1e-12, abs=1e-12)
    assert flow.step(states[0]) == pytest.approx(states[1], rel=1e-12, abs=1e-12)
    found = flow.jacobian(states)
    assert found.shape == (6, system.dimension, system.dimension)
    assert flow.jacobian(states[2]) == pytest.approx(found[2], rel=1e-13)
    for column in range(system.dimension):
        away = np.zeros(system.dimension)
        away[column] = 1e-5
        difference = (flow.step(states + away) - flow.step(states - away)) / 2e-5
        assert found[..., column] == pytest.approx(difference, rel=1e-6, abs=1e-7)


def test_multipliers_of_the_fixed_points_of_lorenz63() -> None:
    """The origin and the lobes of the time-0.01 map."""
    flow = flow_map("lorenz63", 0.01)
    lobe = np.array([np.sqrt(72.0), np.sqrt(72.0), 27.0])
    assert flow.step(lobe) == pytest.approx(lobe, abs=1e-12)
    origin = np.sort(np.abs(np.linalg.eigvals(flow.jacobian(np.zeros(3)))))[::-1]
    assert origin == pytest.approx([1.1256, 0.9737, 0.7959], abs=1e-4)
    around = np.sort(np.abs(np.linalg.eigvals(flow.jacobian(lobe))))[::-1]
    assert around == pytest.approx([1.0009, 1.0009, 0.8706], abs=1e-4)


def test_seed_noise_and_units() -> None:
    a, b, c = (simulate("lorenz63", 3000, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.allclose(a[0], c[0], atol=0.1)
    clean = simulate("lorenz63", 3000, standardise=True)
    assert clean.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-12)
    assert clean.std(axis=0) == pytest.approx(np.ones(3))
    noisy = simulate("lorenz63", 3000, standardise=True, noise=0.1)
    assert (noisy - clean).std(axis=0) == pytest.approx([0.1] * 3, rel=0.05)
    assert (simulate("lorenz63", 3000, noise=0.1) - a).std(axis=0) == pytest.approx(0.1 * a.std(axis=0), rel=0.05)


def test_a_schedule_changes_parameters_in_time() -> None:
    """dz/dt = speed(t) field(z) is the plain system in the time ``integral of speed``."""
    first = simulate("lorenz63", 1)[0]
    quick = simulate(
        "lorenz63", 21, 0.01, start=first, transient=0.0, substeps=4, schedule={"speed": lambda t: 1.0 + t / 0.2}
    )
    plain = simulate("lorenz63", 2, 0.3, start=first, transient=0.0, substeps=200)
    assert quick[-1] == pytest.approx(plain[-1], rel=1e-5)
    ramp = shift(28.0, 35.0, at=1.0, over=2.0)
    assert ramp(np.array([0.0, 1.0, 2.0, 3.0, 9.0])) == pytest.approx([28.0, 28.0, 31.5, 35.0, 35.0])
    assert shift(1.0, 2.0, at=1.0)(np.array([0.99, 1.0])) == pytest.approx([1.0, 2.0])


def test_lorenz63_with_shift_marks_the_rows_that_changed() -> None:
    plain = simulate("lorenz63", 2000, 0.01, seed=4)
    values, changed = lorenz63_with_shift(2000, {"rho": 40.0}, 1200, seed=4)
    expected = (plain - plain[:1200].mean(axis=0)) / plain[:1200].std(axis=0)
    assert values[:1200] == pytest.approx(expected[:1200], abs=1e-9)
    assert np.abs(values[1200] - expected[1200]).max() > 1e-3
    assert changed.tolist() == [False] * 1200 + [True] * 800
    noisy, _ = lorenz63_with_shift(2000, {"rho": 40.0}, 1200, seed=4, noise=0.2)
    assert (noisy - values).std() == pytest.approx(0.2, rel=0.05)


def test_a_change_of_speed_moves_the_spectrum_but_not_the_distribution() -> None:
    values, changed = lorenz63_with_shift(40_000, {"speed": 1.5}, 20_000)
    before, after = values[~changed], values[changed]
    same = lorenz63_with_shift(40_000, {"speed": 1.0}, 20_000)[0]
    assert d_stsp(before, after).value < 2.0 * d_stsp(before, same[20_000:]).value
    assert d_h(before, after).value > 2.0 * d_h(before, same[20_000:]).value


@pytest.mark.parametrize(("name", "file", "dt"), [("lorenz63", "lorenz63_test", 0.01), ("roessler", "roessler", 0.08)])
def test_simulations_have_the_dynamics_of_the_shared_files(name: str, file: str, dt: float, shared_data: Path) -> None:
    path = shared_data / "dynamics" / f"{file}.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the shared data")
    data = pl.read_parquet(path).drop("step").to_numpy()[:50_000]
    found = simulate(name, 50_000, dt)
    if name == "lorenz63":
        # the units of the file: its fixed points lie at (1.086, 0.956, 0.398), (-1.054, -0.927, 0.398)
        scale = np.array([2 * np.sqrt(72.0) / 2.140, 2 * np.sqrt(72.0) / 1.883, 27.0 / 3.143])
        found = found / scale + np.array([0.016, 0.0145, -2.745])
    else:
        data, found = ((series - series.mean(axis=0)) / series.std(axis=0) for series in (data, found))
    assert d_stsp(data, found).value < 0.35
    assert d_h(data, found).value < 0.1


def test_hindmarsh_rose_bursts() -> None:
    """Spikes come in groups: short gaps within, long gaps between."""
    x = simulate("hindmarsh_rose", 20_000)[:, 0]
    peaks = np.flatnonzero((x[1:-1] > 1.0) & (x[1:-1] >= x[:-2]) & (x[1:-1] > x[2:]))
    gaps = np.diff(peaks)
    assert len(gaps) > 20
    assert gaps.max() > 3 * np.median(gaps)


@pytest.mark.parametrize(("name", "first", "tolerance"), [("roessler", 0.0714, 0.012), ("lorenz96", 1.18, 0.1)])
def test_leading_exponents(name: str, first: float, tolerance: float) -> None:
    """Roessler 0.0714 (published); Lorenz-96 of 10 variates 1.18 (this integrator, 4000 time units at dt 0.02)."""
    dt = SYSTEMS[name]().dt
    flow = flow_map(name, dt)
    start = simulate(name, 4000, dt)[::200]
    found = lyapunov_spectrum(flow.step, flow.jacobian, start, steps=2000, align=300, transient=0, every=5, dt=dt)
    assert found.values[0] == pytest.approx(first, abs=tolerance)
    if name == "lorenz96":
        assert found.values.sum() == pytest.approx(-10.0, abs=0.01)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lorenz63'"):
        simulate("lorenz633", 10)
    with pytest.raises(ConfigError, match="noise=-1"):
        simulate("lorenz63", 10, noise=-1.0)
    with pytest.raises(ConfigError, match="no parameter 'roh'; did you mean 'rho'"):
        simulate("lorenz63", 10, schedule={"roh": lambda t: t})
    with pytest.raises(ConfigError, match="no parameter"):
        lorenz63_with_shift(100, {"speeed": 2.0}, 50)
    with pytest.raises(ConfigError, match="a row from 2"):
        lorenz63_with_shift(100, {"rho": 2.0}, 100)
    with pytest.raises(ConfigError, match="at least 4"):
        lorenz96(3)
    with pytest.raises(ConfigError, match="substeps"):
        flow_map("lorenz63", 0.0)
    with pytest.raises(DataError, match="start must be"):
        simulate("lorenz63", 10, start=[1.0])
    with pytest.raises(DataError, match="diverged with dt"):
        simulate("lorenz63", 100, 0.5)
