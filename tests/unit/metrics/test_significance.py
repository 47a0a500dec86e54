"""Paired tests against statsmodels, scipy, loops, published critical values and simulated losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tsforge.core.errors import DataError
from tsforge.metrics.ranking import mean_ranks
from tsforge.metrics.significance import (
    _bartlett_moments,
    automatic_lags,
    diebold_mariano,
    holm,
    panel_diebold_mariano,
    wilcoxon,
)


def autoregression(rng: np.random.Generator, rows: int, number: int, phi: float) -> np.ndarray:
    noise = rng.normal(size=(rows, number + 50))
    for row in range(1, number + 50):
        noise[:, row] += phi * noise[:, row - 1]
    return noise[:, 50:]


def test_wilcoxon_by_exact_enumeration_and_equal_losses() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), np.array([0.9, 1.7, 2.5, 3.3, 4.1, 4.9])
    assert wilcoxon(first, second).p_value == pytest.approx(2 / 2**6)  # all six differences positive
    assert math.isnan(wilcoxon(first, first).p_value)
    assert wilcoxon([1.0, np.nan], [0.0, 1.0]).count == 1


@pytest.mark.parametrize("share", [1e-12, 1e-7])
def test_rounding_is_no_evidence_however_regular(share: float) -> None:
    """The same losses, summed in another order, say; ranks call them a tie too."""
    rng = np.random.default_rng(6)
    first = rng.random((12, 20)) + 0.5
    second = first * (1.0 - share)
    assert mean_ranks(np.stack([first[0], second[0]], axis=1)).tolist() == [1.5, 1.5]
    for one, other in ((first, second), (second, first)):
        assert math.isnan(wilcoxon(one[0], other[0]).p_value)
        for outcome in (diebold_mariano(one[0], other[0]), panel_diebold_mariano(one, other)):
            assert math.isnan(outcome.p_value)
            assert outcome.difference == 0.0
    apart = first * (1.0 - 1e-5)
    assert wilcoxon(first[0], apart[0]).p_value < 1e-4
    assert panel_diebold_mariano(first, apart).p_value < 1e-4
    for large in ([np.inf] * 6, [0.0] * 6):
        assert wilcoxon(large, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).p_value == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("jitter", [0.0, 1e-12, 5e-6])
def test_a_difference_that_varies_by_rounding_only_decides_nothing(jitter: float) -> None:
    """A straight line: drift beats the last value by the same amount at every cutoff, up to the last digits."""
    noise = jitter * np.array([0.0, 1.0, -1.0, 0.5, 0.0, -0.5])
    first, second = np.full(6, 2e-6), 2.0 + noise
    for outcome in (
        diebold_mariano(first, second),
        diebold_mariano(first, second, kernel="bartlett"),
        panel_diebold_mariano(first[None], second[None]),
    ):
        assert math.isnan(outcome.p_value)
        assert math.isnan(outcome.statistic)
        assert outcome.difference == pytest.approx(-2.0, rel=1e-5)
    assert diebold_mariano(first, 2.0 + 1e-3 * np.arange(6)).p_value < 1e-10


def test_diebold_mariano_one_step_is_a_t_test() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random(30), rng.random(30) + 0.2
    expected = stats.ttest_rel(first, second)
    for outcome in (diebold_mariano(first, second), diebold_mariano(first, second, kernel="bartlett", lags=0)):
        assert outcome.statistic == pytest.approx(expected.statistic)
        assert outcome.p_value == pytest.approx(expected.pvalue)
        assert outcome.dof == pytest.approx(29)
        assert outcome.difference == pytest.approx(first.mean() - second.mean())
    assert math.isnan(diebold_mariano(first, first).p_value)
    assert diebold_mariano(first[:1], second[:1]).count == 1


def test_rectangular_kernel_by_a_loop() -> None:
    rng = np.random.default_rng(2)
    loss = np.convolve(rng.normal(size=42), np.ones(3), mode="valid") + 0.3
    number, horizon = len(loss), 3
    total = 0.0
    for lag in range(-2, 3):
        for row in range(number):
            if 0 <= row + lag < number:
                total += (loss[row] - loss.mean()) * (loss[row + lag] - loss.mean()) / number
    factor = (number + 1 - 2 * horizon + horizon * (horizon - 1) / number) / number
    found = diebold_mariano(loss, np.zeros(number), horizon)
    assert found.statistic == pytest.approx(loss.mean() / math.sqrt(total / number) * math.sqrt(factor))
    assert (found.kernel, found.lags, found.dof) == ("rectangular", 2, number - 1)


@pytest.mark.parametrize("lags", [1, 4, 9])
def test_bartlett_variance_equals_statsmodels(lags: int) -> None:
    loss = autoregression(np.random.default_rng(5), 1, 60, 0.5)[0] + 0.4
    fit = sm.OLS(loss, np.ones(60)).fit(cov_type="HAC", cov_kwds={"maxlags": lags}, use_t=True)
    expected, dof = _bartlett_moments(60, lags)
    found = diebold_mariano(loss, np.zeros(60), kernel="bartlett", lags=lags)
    assert found.statistic == pytest.approx(float(fit.tvalues[0]) * math.sqrt(expected))
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(found.statistic), dof))


@pytest.mark.parametrize(("number", "lags"), [(7, 0), (12, 3), (20, 5), (50, 49)])
def test_moments_of_the_variance_estimate_equal_traces_of_matrices(number: int, lags: int) -> None:
    apart = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
    centre = np.eye(number) - 1.0 / number
    form = centre @ np.maximum(0.0, 1.0 - apart / (lags + 1)) @ centre
    expected = np.trace(form) / number, np.trace(form) ** 2 / np.trace(form @ form)
    assert _bartlett_moments(number, lags) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3])
def test_critical_values_follow_fixed_bandwidth_asymptotics(share: float) -> None:
    """Kiefer and Vogelsang (2005), Table 1, Bartlett, 97.5 %: 1.9600 + 2.9694 b + 0.4160 b^2 - 0.5324 b^3."""
    number = 4000
    expected, dof = _bartlett_moments(number, int(share * number) - 1)
    found = stats.t.ppf(0.975, dof) / math.sqrt(expected)
    assert found == pytest.approx(1.96 + 2.9694 * share + 0.416 * share**2 - 0.5324 * share**3, rel=0.06)


def test_automatic_lags_state_their_rule() -> None:
    assert [automatic_lags(number) for number in (20, 100, 400)] == [5, 12, 25]  # ceil(1.3 sqrt(n)) - 1
    assert automatic_lags(20, horizon=12) == 11
    assert automatic_lags(4, horizon=9) == 2


def test_a_variance_that_is_not_positive_falls_back_to_bartlett_and_says_so() -> None:
    loss = np.tile([1.0, -1.0], 10) + np.linspace(0.2, 0.21, 20)  # neighbours cancel: g0 + 2 g1 is about -g0
    found = diebold_mariano(loss, np.zeros(20), horizon=2)
    assert (found.kernel, found.lags) == ("bartlett", 5)
    assert found == diebold_mariano(loss, np.zeros(20), horizon=2, kernel="bartlett")
    assert 0 < found.p_value <= 1


def test_holm_equals_statsmodels_and_leaves_out_what_is_missing() -> None:
    p = np.random.default_rng(0).random(9) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    with_gap = holm([0.01, np.nan, 0.04])
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.04])
    assert math.isnan(with_gap[1])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_panel_averages_series_at_every_cutoff() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random((4, 12)), rng.random((4, 12)) + 0.1
    first[1, 3], second[2, 3], first[:, 7] = np.nan, np.nan, np.nan
    by_cutoff = []
    for cutoff in range(12):
        pairs = [first[s, cutoff] - second[s, cutoff] for s in range(4)]
        known = [pair for pair in pairs if not math.isnan(pair)]
        if known:
            by_cutoff.append(sum(known) / len(known))
    found = panel_diebold_mariano(first, second)
    assert found == diebold_mariano(by_cutoff, np.zeros(11), kernel="bartlett")
    assert found.count == 11
    with pytest.raises(DataError, match="one shape"):
        panel_diebold_mariano(first, second[:2])


def test_settings_without_meaning_are_refused() -> None:
    loss = np.arange(9.0)
    for settings in ({"horizon": 0}, {"kernel": "bartlett", "lags": -1}, {"lags": 3}):
        with pytest.raises(DataError, match=r"at least 1 and 0|Bartlett kernel"):
            diebold_mariano(loss, np.zeros(9), **settings)


def share_rejected(losses: np.ndarray, **settings: object) -> float:
    zeros = np.zeros(losses.shape[-1])
    return float(np.mean([diebold_mariano(loss, zeros, **settings).p_value < 0.05 for loss in losses]))


@pytest.mark.parametrize(
    ("number", "phi", "most"), [(20, 0.0, 0.07), (20, 0.5, 0.13), (60, 0.5, 0.11), (200, 0.7, 0.1)]
)
def test_size_under_autocorrelated_losses(number: int, phi: float, most: float) -> None:
    """Nominal 5 %: what the module promises is 2 to 13 % from 20 cutoffs on at an autocorrelation of 0.5."""
    losses = autoregression(np.random.default_rng(9), 1000, number, phi)
    found = share_rejected(losses, kernel="bartlett")
    assert 0.02 < found < most
    if phi:
        assert share_rejected(losses) > 2 * found  # no lags: far too many


def test_size_with_overlapping_forecasts() -> None:
    rng = np.random.default_rng(9)
    losses = np.apply_along_axis(np.convolve, 1, rng.normal(size=(400, 203)), np.ones(4), mode="valid")
    assert share_rejected(losses, horizon=4) < 0.1
    assert share_rejected(losses, horizon=4, kernel="bartlett") < 0.1
    assert share_rejected(losses) > 0.2


def test_panel_keeps_its_size_where_series_move_together_and_series_wise_ranks_do_not() -> None:
    """30 series share most of their noise at every cutoff: as independent units they reject far too often."""
    rng = np.random.default_rng(1)
    panel_hits, unit_hits, rounds = 0, 0, 300
    for _ in range(rounds):
        common = autoregression(rng, 1, 24, 0.3)
        losses = common + 0.3 * rng.normal(size=(30, 24))
        panel_hits += panel_diebold_mariano(losses, np.zeros_like(losses)).p_value < 0.05
        unit_hits += wilcoxon(losses.mean(axis=1), np.zeros(30)).p_value < 0.05
    assert 0.015 < panel_hits / rounds < 0.11
    assert unit_hits / rounds > 0.4


def test_power_grows_with_the_difference() -> None:
    losses = autoregression(np.random.default_rng(8), 300, 60, 0.3)
    assert share_rejected(losses + 1.0, kernel="bartlett") > 0.95
