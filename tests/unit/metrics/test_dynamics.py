"""D_stsp, D_H and PE(n): definitions, calibration values on shared data, bad input."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.attractors import flow_map, simulate
from tsforge.metrics.dynamics import PRESETS, StateSpaceReference, d_h, d_stsp, prediction_error, smoothed_spectrum

Array = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def lorenz(shared_data: Path) -> Array:
    return read(shared_data, "lorenz63_test")


def read(folder: Path, name: str) -> Array:
    path = folder / "dynamics" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the shared data")
    return pl.read_parquet(path).drop("step").to_numpy().astype(np.float64)


def walk(seed: int, rows: int, variates: int) -> Array:
    """A smooth bounded series."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((rows, variates))
    for index in range(1, rows):
        steps[index] += 0.9 * steps[index - 1]
    return (steps - steps.mean(axis=0)) / steps.std(axis=0)


def dense(true: Array, generated: Array, low: Array, high: Array, bins: int, first: int = 0) -> float:
    """D_stsp over the dense histogram of all cells."""
    counts = []
    for series in (true, generated):
        table = np.zeros((bins,) * true.shape[1])
        for point in series:
            place = [int(np.floor((v - a) / (b - a) * bins)) for v, a, b in zip(point, low, high, strict=True)]
            if all(first <= cell < bins for cell in place):
                table[tuple(place)] += 1
        counts.append((table + 1e-5) / (table.sum() + 1e-5 * table.size))
    p, q = counts
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("variates", [1, 2, 3])
@pytest.mark.parametrize("preset", ["gtf", "dend", "python"])
def test_checklist_8_9_sparse_equals_the_dense_histogram(preset: str, variates: int) -> None:
    true, generated = walk(1, 600, variates), 1.2 * walk(2, 500, variates)
    spread = true.std(axis=0, ddof=1)
    low, high = {
        "gtf": (true.min(axis=0) - 0.1 * spread, true.max(axis=0) + 0.1 * spread),
        "dend": (-2 * spread, 2 * spread),
        "python": (true.min(axis=0), true.max(axis=0)),
    }[preset]
    expected = dense(true, generated, low, high, 7, first=0 if preset == "gtf" else 1)
    result = d_stsp(true, generated, preset, bins=7)
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert result.method == "binned"
    assert result.preset.bins == 7
    assert result.preset.name == preset
    inside = np.mean(np.all((generated >= low) & (generated < high), axis=1))
    if preset == "gtf":
        assert result.generated_dropped == pytest.approx(1 - inside)
        assert result.true_dropped == 0.0
    else:
        assert result.true_dropped > 0.0


def test_checklist_8_9_sparse_equals_the_dense_histogram_of_numpy() -> None:
    """All 30^3 cells, counted by ``np.histogramdd``: a trajectory of the Lorenz system, and another seen in noise."""
    true = simulate("lorenz63", 4000, 0.05, seed=1)
    generated = simulate("lorenz63", 3000, 0.05, seed=2)
    generated = generated + 0.3 * true.std(axis=0) * np.random.default_rng(0).standard_normal(generated.shape)
    spread = true.std(axis=0, ddof=1)
    edges = np.linspace(true.min(axis=0) - 0.1 * spread, true.max(axis=0) + 0.1 * spread, 31).T
    counts = [np.histogramdd(series, bins=edges)[0] for series in (true, generated)]
    p, q = ((table + 1e-5) / (table.sum() + 1e-5 * 30**3) for table in counts)
    result = d_stsp(true, generated)
    assert (result.method, result.preset.bins) == ("binned", 30)
    assert result.value == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-12)
    assert counts[0].sum() == 4000
    assert result.generated_dropped == pytest.approx(1 - counts[1].sum() / 3000, abs=1e-12)
    assert result.generated_dropped > 0.0  # noise leaves the box


def test_hierarchical_preset_standardises_both() -> None:
    true, generated = walk(1, 400, 2), walk(2, 300, 2)
    moved = 5.0 + 3.0 * generated
    a, b = d_stsp(true, generated, "hierarchical"), d_stsp(10 * true - 1, moved, "hierarchical")
    assert a.value == pytest.approx(b.value, rel=1e-9)
    assert d_stsp(true, moved).value > a.value


@pytest.mark.parametrize("variates", [2, 7])
def test_checklist_8_9_identical_series_have_distance_0(variates: int) -> None:
    series = walk(3, 300, variates)
    assert d_stsp(series, series).value == pytest.approx(0.0, abs=1e-12)
    assert d_h(series, series).value == 0.0


def test_checklist_8_9_mixtures_of_one_point() -> None:
    """The Kullback-Leibler divergence of two Gaussians is |d|^2 / (2 variance)."""
    a, b = np.zeros((1, 8)), np.linspace(0.1, 0.8, 8)[None]
    many = dataclasses.replace(PRESETS["gtf"], samples=200_000, variance=0.5)
    result = d_stsp(a, b, many)
    distance = float(np.sum(b**2))
    assert result.value == pytest.approx(distance / (2 * 0.5), abs=5 * np.sqrt(distance / 0.5 / 200_000))
    assert d_stsp(a, b, variance=0.5, seed=1).value == pytest.approx(result.value, abs=0.3)
    assert result.seed == 0
    assert result.method == "mixture"


def test_mixture_equals_a_direct_sum_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    true, generated = walk(1, 50, 6) + 100.0, walk(2, 40, 6) + 100.5
    monkeypatch.setattr("tsforge.metrics.state_space_divergence._CHUNK_CELLS", 333)
    found = d_stsp(true, generated, seed=5).value
    rng = np.random.default_rng(5)
    samples = true[rng.integers(50, size=1000)] + rng.standard_normal((1000, 6))
    p, q = (
        np.exp(-0.5 * ((samples[:, None] - series[None]) ** 2).sum(axis=-1)).mean(axis=1)
        for series in (true, generated)
    )
    assert found == pytest.approx(float(np.mean(np.log(p / q))), rel=1e-9)


def test_far_points_are_not_dropped_but_compat_drops_them() -> None:
    true = np.random.default_rng(0).standard_normal((200, 64))
    far = true + 5.0
    exact, reference = d_stsp(true, far), d_stsp(true, far, compat="reference")
    # 64 variates, each 5 away: the divergence is near |d|^2 / 2 less the gain of the nearest of 200 points
    assert 600 < exact.value < 900
    assert reference.samples_dropped == exact.samples_dropped > 0.9
    assert not reference.value > 110  # all that float32 can tell apart


def test_auto_takes_the_mixture_from_the_presets_number_of_variates() -> None:
    five, six = walk(0, 60, 5), walk(0, 60, 6)
    assert d_stsp(five, five).method == "binned"
    assert d_stsp(six, six).method == "mixture"
    assert d_stsp(six, six, "al").method == "binned"
    assert d_stsp(six, six, method="binned").method == "binned"


def test_a_prepared_reference_gives_the_same_and_results_are_plain() -> None:
    true, generated = walk(1, 300, 3), walk(2, 300, 3)
    result = StateSpaceReference(true).compare(generated)
    assert result == d_stsp(true, generated)
    assert float(result) == result.value
    record = result.to_dict()
    assert record["preset"]["range_rule"] == "padded"
    assert record["true_length"] == 300
    assert record["seed"] is None


def test_a_permutation_of_variates_changes_nothing() -> None:
    true, generated, order = walk(1, 400, 3), walk(2, 400, 3), [2, 0, 1]
    assert d_stsp(true, generated).value == pytest.approx(d_stsp(true[:, order], generated[:, order]).value, rel=1e-12)
    assert d_h(true, generated).value == pytest.approx(d_h(true[:, order], generated[:, order]).value, rel=1e-12)


class _Turned:
    """A generator whose normal numbers come with their columns in another order."""

    def __init__(self, seed: int, order: list[int]) -> None:
        self.rng, self.order = np.random.Generator(np.random.PCG64(seed)), order  # what default_rng(seed) is

    def integers(self, high: int, size: int) -> Any:
        return self.rng.integers(high, size=size)

    def standard_normal(self, size: tuple[int, int]) -> Array:
        return self.rng.standard_normal(size)[:, self.order]


def test_checklist_8_9_a_permutation_of_variates_changes_no_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven variates: exactly, where the noise of the samples is permuted too; else up to the error of sampling."""
    true, generated, order = walk(1, 120, 7), walk(2, 100, 7), [3, 0, 6, 1, 5, 2, 4]
    seeds = range(12)
    straight = np.array([d_stsp(true, generated, seed=seed).value for seed in seeds])
    permuted = np.array([d_stsp(true[:, order], generated[:, order], seed=seed).value for seed in seeds])
    error = np.sqrt((straight.var(ddof=1) + permuted.var(ddof=1)) / len(seeds))
    assert abs(straight.mean() - permuted.mean()) < 4 * error
    assert 4 * error < 0.2 * straight.mean()  # it would tell
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: _Turned(seed, order))
    turned = [d_stsp(true[:, order], generated[:, order], seed=seed).value for seed in (0, 1)]
    assert turned == pytest.approx(straight[:2].tolist(), rel=1e-11)


def test_checklist_8_9_diverged_models() -> None:
    true = walk(1, 200, 3)
    nan = true.copy()
    nan[150:] = np.nan
    assert np.isnan(d_stsp(true, nan).value)
    assert np.isnan(d_h(true, nan).value)
    assert np.isnan(d_stsp(true, true + 100.0).value)  # nothing in the box
    infinite = true.copy()
    infinite[1:] = np.inf
    result = d_stsp(true, infinite)
    assert result.generated_dropped == pytest.approx(199 / 200)
    assert result.value > 5.0
    wide, lost = walk(1, 200, 6), walk(1, 200, 6)
    lost[1:] = -np.inf
    # points at infinity keep their weight: the density of the one left is 1/200 of a mixture of one
    assert d_stsp(wide, lost).value == pytest.approx(d_stsp(wide, wide[:1]).value + np.log(200))
    lost[0] = np.inf
    assert np.isnan(d_stsp(wide, lost).value)


def test_bad_input_of_d_stsp() -> None:
    true = walk(1, 100, 3)
    gap = true.copy()
    gap[3, 1] = np.nan
    still = true.copy()
    still[:, 1] = 2.0
    with pytest.raises(DataError, match="not finite"):
        d_stsp(gap, true)
    with pytest.raises(DataError, match="variate 1 .* constant"):
        d_stsp(still, true)
    with pytest.raises(DataError, match="2 variates, the true series 3"):
        d_stsp(true, true[:, :2])
    with pytest.raises(ConfigError, match="did you mean 'gtf'"):
        d_stsp(true, true, "gft")
    with pytest.raises(ConfigError, match="bins has no effect"):
        d_stsp(true, true, method="mixture", bins=8)
    with pytest.raises(ConfigError, match="variance has no effect"):
        d_stsp(true, true, variance=2.0)
    with pytest.raises(ConfigError, match="concerns the mixture"):
        d_stsp(true, true, compat="reference")
    with pytest.raises(ConfigError, match="too many cells"):
        d_stsp(walk(0, 50, 20), walk(0, 50, 20), method="binned")
    with pytest.raises(ConfigError, match="bins >= 2"):
        d_stsp(true, true, bins=1)


def test_d_stsp_of_many_variates_needs_little_memory() -> None:
    """10,000 points, 1000 samples, 64 variates: the full table of distances alone would be 80 MB."""
    rng = np.random.default_rng(0)
    true, generated = rng.standard_normal((10_000, 64)), rng.standard_normal((10_000, 64))
    tracemalloc.start()
    d_stsp(true, generated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_d_stsp_of_five_variates_does_not_build_the_histogram() -> None:
    """30^5 cells are 194 MB."""
    true, generated = walk(0, 2000, 5), walk(1, 2000, 5)
    tracemalloc.start()
    assert d_stsp(true, generated).value > 0.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_checklist_8_9_d_h_is_symmetric_bounded_and_by_hand() -> None:
    true, generated = walk(1, 501, 2), np.random.default_rng(3).standard_normal((501, 2))
    forward, backward = d_h(true, generated), d_h(generated, true)
    assert forward.value == pytest.approx(backward.value, rel=1e-12)
    assert 0.0 < forward.value < 1.0
    expected = []
    for x, y in zip(true.T, generated.T, strict=True):
        spectra = []
        for series in (x, y):
            power = np.abs(np.fft.rfft((series - series.mean()) / series.std())) ** 2
            offsets = np.arange(-12, 13)
            weights = np.exp(-(offsets**2) / 18.0)
            smooth = np.convolve(np.pad(power, 12, mode="symmetric"), weights / weights.sum(), mode="valid")
            spectra.append(smooth / smooth.sum())
        expected.append(np.sqrt(1.0 - np.sum(np.sqrt(spectra[0] * spectra[1]))))
    result = d_h(true, generated, sigma=3.0)
    assert result.per_variate == pytest.approx(expected, rel=1e-6)
    assert (result.sigma, result.length, result.frequencies) == (3.0, 501, None)
    assert smoothed_spectrum(true).sum(axis=0) == pytest.approx([1.0, 1.0])


def test_checklist_8_9_a_sine_against_white_noise_is_near_1() -> None:
    time = np.arange(20_000)
    sine = np.sin(2 * np.pi * time / 50.0)[:, None]
    noise = np.random.default_rng(0).standard_normal((20_000, 1))
    assert d_h(sine, noise).value > 0.9
    assert d_h(sine, 3.0 + 7.0 * np.cos(2 * np.pi * time / 50.0)[:, None]).value < 1e-3
    assert d_h(sine, noise, sigma=1.0).value > d_h(sine, noise).value


def test_checklist_8_9_a_constant_series_has_distance_1() -> None:
    series = walk(1, 400, 2)
    half = series.copy()
    half[:, 1] = 0.1
    result = d_h(series, half)
    assert result.per_variate == pytest.approx((0.0, 1.0))
    assert result.value == pytest.approx(0.5)
    rounding = np.float32(0.7) * (1 + np.float32(1e-7) * np.random.default_rng(0).integers(0, 2, (400, 2)))
    assert d_h(series.astype(np.float32), rounding.astype(np.float32)).value == 1.0
    assert d_h(half, half).per_variate == (0.0, 1.0)


def test_the_tremor_of_a_dead_model_has_no_spectrum() -> None:
    """Of 100 rows nothing but the z-score of a tremor would be left to compare, and it would look like the data."""
    data = walk(3, 100, 2)
    tremor = np.random.default_rng(0).standard_normal((100, 2)) * data.std(axis=0)
    assert d_h(data, 0.02 * tremor).value < 0.5
    result = d_h(data, np.column_stack([0.009 * tremor[:, 0], 0.02 * tremor[:, 1]]))
    assert result.per_variate[0] == 1.0
    assert result.per_variate[1] < 0.5
    assert d_h(data, 1e6 * tremor).value == pytest.approx(d_h(data, tremor).value)
    assert d_h(1e200 * data, 1e200 * tremor).value == pytest.approx(d_h(data, tremor).value)


@pytest.mark.parametrize("level", [0.0, 1e-3, 0.1, 3.0, 1e12])
def test_a_variate_constant_up_to_rounding_has_no_bins(level: float) -> None:
    data = walk(3, 200, 2)
    data[:, 1] = level * (1 + 2e-16 * np.random.default_rng(0).integers(0, 2, 200))
    with pytest.raises(DataError, match="variate 1 of the true series is constant"):
        d_stsp(data, data)
    data[:, 1] += max(level, 1.0) * 1e-12 * np.arange(200)
    assert d_stsp(data, data).value == 0.0


def test_frequencies_cut_the_spectrum() -> None:
    time = np.arange(1000)[:, None]
    slow = np.sin(2 * np.pi * time / 100.0)
    both = slow + np.sin(2 * np.pi * time / 4.0)
    assert d_h(slow, both, sigma=1.0).value > 0.5
    assert d_h(slow, both, sigma=1.0, frequencies=100).value < 1e-3


def test_bad_input_of_d_h() -> None:
    series = walk(1, 50, 2)
    gap = series.copy()
    gap[0, 0] = np.nan
    with pytest.raises(DataError, match="one shape"):
        d_h(series, series[:40])
    with pytest.raises(DataError, match="not finite"):
        d_h(gap, series)
    with pytest.raises(ConfigError, match="sigma"):
        d_h(series, series, sigma=-1.0)
    with pytest.raises(ConfigError, match="frequencies"):
        d_h(series, series, frequencies=0)


def test_checklist_8_9_lorenz_calibration(lorenz: Array, shared_data: Path) -> None:
    reference = StateSpaceReference(lorenz)
    noises = [reference.compare(np.random.default_rng(seed).standard_normal(lorenz.shape)).value for seed in range(4)]
    assert min(noises) > 3.33
    assert max(noises) < 3.51
    assert reference.compare(np.repeat(lorenz[:1], len(lorenz), axis=0)).value == pytest.approx(16.44, abs=0.005)
    noisy = read(shared_data, "lorenz63_noise05_train")
    assert reference.compare(noisy).value == pytest.approx(0.1187, abs=5e-5)
    assert d_stsp(lorenz[:50_000], lorenz[50_000:]).value == pytest.approx(0.23, abs=0.005)
    assert 0.05 <= d_h(lorenz, noisy).value <= 0.07
    white = np.random.default_rng(0).standard_normal(lorenz.shape)
    assert d_h(lorenz, white).value == pytest.approx(0.88, abs=0.01)


def test_calibration_of_ecg_and_lorenz96(shared_data: Path) -> None:
    train, test = read(shared_data, "ecg_train"), read(shared_data, "ecg_test")
    assert d_stsp(test, train).value == pytest.approx(0.29, abs=0.005)
    assert d_stsp(test[:50_000], test[50_000:]).value == pytest.approx(0.20, abs=0.005)
    assert d_h(test, train).value == pytest.approx(0.060, abs=0.001)
    assert d_h(test[:50_000], test[50_000:]).value == pytest.approx(0.022, abs=0.001)
    rows = read(shared_data, "lorenz96_n10_dt004_test")
    assert d_stsp(rows[:50_000], rows[50_000:]).value == pytest.approx(0.05, abs=0.01)


def test_checklist_8_9_underflow_of_the_reference_on_eeg(shared_data: Path) -> None:
    eeg = read(shared_data, "eeg")
    half = len(eeg) // 2
    between = d_stsp(eeg[:half], eeg[half:])
    assert between.value == pytest.approx(2.68, abs=0.2)
    assert between.samples_dropped == 0.0
    assert d_h(eeg[:half], eeg[half:]).value == pytest.approx(0.075, abs=0.001)
    exact, reference = StateSpaceReference(eeg), StateSpaceReference(eeg, compat="reference")
    for series, right, wrong, share in (
        (np.zeros_like(eeg), 25.8, 13.4, 0.09),
        (np.random.default_rng(0).standard_normal(eeg.shape), 26.1, 17.8, 0.07),
        (eeg + 5.0, 174.0, 44.0, 0.90),
    ):
        assert exact.compare(series).value == pytest.approx(right, abs=0.5)
        assert reference.compare(series).value == pytest.approx(wrong, abs=1.5)
        assert reference.compare(series).samples_dropped == pytest.approx(share, abs=0.02)


def test_checklist_8_10_the_exact_map_has_no_prediction_error() -> None:
    series = simulate("lorenz63", 500, transient=10.0)
    result = prediction_error(flow_map("lorenz63", 0.01).step, lambda x: x, series, 20)
    assert result.value < 1e-20
    assert result.starts == 480
    assert result.steps == 20


def test_checklist_8_10_random_walk_with_the_identity_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsforge.metrics.dynamics._STARTS", 777)
    series = np.cumsum(0.1 * np.random.default_rng(0).standard_normal((20_000, 3)), axis=0)
    result = prediction_error(lambda z: z, lambda x: x, series, 5)
    assert result.value == pytest.approx(5 * 0.01, rel=0.03)
    assert result.per_step == pytest.approx([k * 0.01 for k in range(1, 6)], rel=0.03)
    assert result.per_step[-1] == result.value == float(result)


def test_prediction_error_reads_out_latent_states_and_inputs_of_the_target_step() -> None:
    drive = np.random.default_rng(0).standard_normal((60, 2))
    series = np.cumsum(drive, axis=0)

    def step(z: Array, s: Array) -> Array:
        return np.concatenate([z[:, :1], z[:, 1:] + s], axis=1)

    result = prediction_error(
        step, lambda x: np.pad(x, ((0, 0), (1, 0))), series, 4, observe=lambda z: z[:, 1:], inputs=drive
    )
    assert result.value < 1e-24
    late = prediction_error(
        step, lambda x: np.pad(x, ((0, 0), (1, 0))), series, 4, observe=lambda z: z[:, 1:], inputs=np.roll(drive, 1)
    )
    assert late.value > 0.1


def test_prediction_error_leaves_gaps_out() -> None:
    series = np.arange(20.0)[:, None] * np.ones((1, 2))
    series[4, 1] = np.nan
    result = prediction_error(lambda z: z + 2.0, lambda x: x, series, 1)
    assert result.value == 1.0
    assert result.starts == 18
    with pytest.raises(DataError, match="no complete row"):
        prediction_error(lambda z: z, lambda x: x, np.full((9, 1), np.nan), 2)


def test_prediction_error_of_a_diverging_map_is_nan() -> None:
    assert np.isnan(prediction_error(lambda z: 1e300 * z, lambda x: x, walk(0, 30, 2), 3).value)


def test_bad_input_of_prediction_error() -> None:
    series = walk(0, 30, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        prediction_error(lambda z: z, lambda x: x, series, 0)
    with pytest.raises(DataError, match="more than 30 rows"):
        prediction_error(lambda z: z, lambda x: x, series, 30)
    with pytest.raises(DataError, match="infinite"):
        prediction_error(lambda z: z, lambda x: x, np.full((30, 2), np.inf), 3)
    with pytest.raises(DataError, match="check observe"):
        prediction_error(lambda z: z, lambda x: x, series, 3, observe=lambda z: z[:, :1])
    with pytest.raises(DataError, match="inputs"):
        prediction_error(lambda z, s: z, lambda x: x, series, 3, inputs=np.zeros((29, 1)))
