"""False-discovery-rate procedures and the rule: definitions, empirical rates at known p-values, levels, warnings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from tsforge.anomaly.calibration import fit_calibration
from tsforge.anomaly.config import CalibrationConfig, DetectConfig, FdrRule
from tsforge.anomaly.fdr import (
    KEPT_REJECTIONS,
    Lond,
    LordDecay,
    LordPlusPlus,
    Procedure,
    TrailingBH,
    benjamini_hochberg,
    direct_e_values,
    e_benjamini_hochberg,
    kappa_e_values,
    lord_series,
)
from tsforge.anomaly.fdr_rule import FalseDiscoveryRate
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError


def rule_of(method: str = "auto", **settings: Any) -> FalseDiscoveryRate:
    config = validate(DetectConfig, {"rule": {"kind": "fdr", **settings}, "calibration": {"method": method}})
    assert isinstance(config.rule, FdrRule)
    return FalseDiscoveryRate(config.rule, config.calibration)


def test_the_series_of_levels_sums_to_about_one() -> None:
    assert lord_series(1) == pytest.approx(0.07720838 * np.log(2))
    # the rest is the integral of u exp(-sqrt u) from log n on
    rest = 2.0 * 0.07720838 * special.gamma(4) * special.gammaincc(4, np.sqrt(np.log(1e6)))
    assert 0.97 < lord_series(np.arange(1, 1_000_000)).sum() + rest <= 1.0


def test_benjamini_hochberg_equals_scipy_and_leaves_missing_values_out() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = np.concatenate([generator.uniform(size=80), generator.beta(0.1, 5, size=20)]).round(3)
        np.testing.assert_array_equal(benjamini_hochberg(p, 0.1), stats.false_discovery_control(p) <= 0.1 + 1e-12)
        gapped = np.insert(p, [0, 50], np.nan)
        np.testing.assert_array_equal(benjamini_hochberg(gapped, 0.1)[~np.isnan(gapped)], benjamini_hochberg(p, 0.1))
    assert not benjamini_hochberg([], 0.1).size


def test_e_values_have_mean_one_and_direct_ones_are_weak() -> None:
    generator = np.random.default_rng(1)
    assert kappa_e_values(generator.uniform(size=400_000), 0.6).mean() == pytest.approx(1.0, abs=0.02)
    draws = np.abs(generator.standard_t(8, size=(20_000, 201)))
    for power in (1.0, 4.0):
        found = [direct_e_values(row[:200], row[200:], power=power)[0] for row in draws]
        assert np.mean(found) == pytest.approx(1.0, abs=0.1)
        assert power > 1.0 or max(found) < 20.0  # what e-BH needs is in the thousands
    with pytest.raises(ConfigError, match="kappa 1 must lie between 0 and 1"):
        kappa_e_values([0.5], 1.0)


def mixtures(make: Callable[[], Procedure] | None, transform: Callable[[NDArray[Any]], NDArray[Any]]) -> float:
    """Return the mean share of false rejections over 30 draws of 2,000 values, a tenth of them not uniform."""
    shares = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        p, strange = generator.uniform(size=2000), generator.uniform(size=2000) < 0.1
        p[strange] = stats.norm.sf(generator.normal(3.5, 1.0, size=2000)[strange])
        rejected = benjamini_hochberg(transform(p), 0.1) if make is None else make().run(transform(p))
        shares.append((rejected & ~strange).sum() / max(rejected.sum(), 1))
        assert seed or rejected.sum() > 5
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("make", "is_e"),
    [
        (lambda: LordPlusPlus(0.1), False),
        (lambda: Lond(0.1), True),
        (None, False),
        (None, True),
        (lambda: TrailingBH(0.1, 500), False),
    ],
    ids=["lord", "e_lond", "bh", "e_bh", "trailing_bh"],
)
def test_known_p_values_give_no_more_false_discoveries_than_wanted(
    make: Callable[[], Procedure] | None, is_e: bool
) -> None:
    """Checklist 9."""

    def transform(p: NDArray[Any]) -> NDArray[Any]:
        return 1.0 / kappa_e_values(p, 0.1) if is_e else p

    assert mixtures(make, transform) < 0.1


def decayed_rate(power: float) -> float:
    """Return the mean false-discovery rate whose counts are sums of delta^(T - t), over every T of 10 draws."""
    delta, rates, found = 0.99, [], 0
    for seed in range(10):
        generator = np.random.default_rng(seed)
        p, strange = generator.uniform(size=2000), generator.uniform(size=2000) < 0.1
        p[strange] = stats.norm.sf(generator.normal(4.5, 1.0, size=2000)[strange])
        rejected = LordDecay(0.1, delta=delta).run(p**power)
        found += int(rejected.sum())
        false = all_of = 0.0
        for t in range(p.size):
            false, all_of = delta * false + (rejected[t] & ~strange[t]), delta * all_of + rejected[t]
            rates.append(false / max(all_of, 1.0))
    assert found > 10 * 20
    return float(np.mean(rates))


def test_known_p_values_give_no_more_decayed_false_discoveries_than_wanted() -> None:
    """Checklist 9 of the default procedure, whose rate forgets; wrong p-values show up."""
    assert decayed_rate(1.0) < 0.1 < decayed_rate(1.5)


def test_wrong_p_values_show_up_in_the_same_experiment() -> None:
    assert mixtures(lambda: LordPlusPlus(0.1), lambda p: p**1.5) > 0.15


def test_trailing_bh_rejects_the_newest_value_exactly_when_bh_over_its_block_does() -> None:
    generator = np.random.default_rng(2)
    for block in (10, 37, 200):
        p = np.where(generator.uniform(size=600) < 0.2, generator.beta(0.1, 5, size=600), generator.uniform(size=600))
        p = p.round(3)  # ties
        found = TrailingBH(0.2, block).run(p)
        padded = np.concatenate([np.ones(block - 1), p])
        naive = [benjamini_hochberg(padded[i : i + block], 0.2)[-1] for i in range(p.size)]
        np.testing.assert_array_equal(found, naive)


def test_e_bh_is_bh_of_reciprocals_over_a_block() -> None:
    e = kappa_e_values(np.random.default_rng(3).beta(0.2, 3, size=300))
    ordered = np.sort(e)[::-1]
    passed = np.flatnonzero(ordered >= 300 / (0.2 * np.arange(1, 301)))
    np.testing.assert_array_equal(e_benjamini_hochberg(e, 0.2), e >= ordered[passed[-1]])


def level_by_definition(kind: str, t: int, rejections: list[int]) -> float:
    """Source: the equations of the papers, one value at a time; alpha 0.1, decay 0.9, eta 0.5."""

    def g(j: int) -> float:
        return 0.07720838 * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))

    if kind == "lord":
        return 0.05 * g(t) + sum((0.1 if j else 0.05) * g(t - tau) for j, tau in enumerate(rejections))
    if kind == "lord_decay":
        return 0.1 * 0.5 * max(g(t), 0.1) + 0.1 * sum(0.9 ** (t - tau) * g(t - tau) for tau in rejections)
    return 0.1 * g(t) * (len(rejections) + 1)


@pytest.mark.parametrize("kind", ["lord", "lord_decay", "e_lond"])
def test_levels_equal_the_definition(kind: str) -> None:
    generator = np.random.default_rng(10)
    made: dict[str, Callable[[], Procedure]] = {
        "lord": lambda: LordPlusPlus(0.1),
        "lord_decay": lambda: LordDecay(0.1, 0.9),
        "e_lond": lambda: Lond(0.1),
    }
    procedure, rejections = made[kind](), []
    for t in range(1, 400):
        expected = level_by_definition(kind, t, rejections)
        assert procedure.level == pytest.approx(expected, rel=1e-11)
        value = generator.choice([0.0, expected * 0.999, expected * 1.001, 1.0], p=[0.05, 0.05, 0.1, 0.8])
        if procedure.step(float(value)):
            rejections.append(t)
        assert (t in rejections) == (value < expected)
        if t % 40 == 0:
            procedure = made[kind]().resume(procedure.state())
    assert 20 < len(rejections) < 70


@pytest.mark.parametrize("procedure", [LordPlusPlus(0.1), LordDecay(0.1, 0.9)], ids=["lord", "lord_decay"])
def test_memory_is_bounded_and_forgetting_only_lowers_levels(procedure: Procedure) -> None:
    decay = isinstance(procedure, LordDecay)
    procedure.run(np.zeros(3 * KEPT_REJECTIONS))
    kept = procedure.state()["rejections"]
    assert len(kept) <= (300 if decay else KEPT_REJECTIONS)
    lags = 3 * KEPT_REJECTIONS + 1 - np.arange(1, 3 * KEPT_REJECTIONS + 1)
    rewards = lord_series(lags) * (0.9**lags if decay else 1.0)
    whole = 0.1 * rewards.sum() + (0.1 * 0.5 * 0.1 if decay else 0.05 * lord_series(3 * KEPT_REJECTIONS + 1))
    assert 0.85 * whole < procedure.level <= whole * (1 + 1e-12)
    if not decay:  # the last ones only, the first of all no longer among them
        kept_rewards = 0.1 * lord_series(np.arange(1, KEPT_REJECTIONS + 1)).sum()
        assert procedure.level == pytest.approx(0.05 * lord_series(3 * KEPT_REJECTIONS + 1) + kept_rewards, rel=1e-12)


@pytest.mark.parametrize("method", ["gpd", "conformal"])
@pytest.mark.parametrize(
    "settings",
    [
        {"procedure": "lord_decay"},
        {"procedure": "bh", "block": 50},
        {"procedure": "e_lond", "kappa": 0.3},
        {"procedure": "e_bh", "e_values": "direct", "power": 12.0, "block": 20},
    ],
    ids=lambda s: s["procedure"],
)
def test_an_alarm_is_a_score_above_the_threshold(settings: dict[str, Any], method: str) -> None:
    generator = np.random.default_rng(4)
    calibration = np.abs(generator.standard_t(6, 6000))
    scores = np.abs(generator.standard_t(6, 3000))
    scores[generator.uniform(size=3000) < 0.05] *= 40
    rule = rule_of(method, level=0.3, **settings).fit(calibration)
    found = rule.run(scores)
    clear = np.abs(scores - found.threshold) > 1e-9 * scores
    np.testing.assert_array_equal(found.alarm[clear], (scores > found.threshold)[clear])
    assert (found.low <= found.threshold).all()
    assert method == "conformal" or found.alarm.any()


def test_p_values_are_those_of_the_calibration() -> None:
    generator = np.random.default_rng(5)
    calibration, scores = generator.standard_normal(4000), 2.0 * generator.standard_normal(500)
    for method in ("gpd", "conformal"):
        rule = rule_of(method).fit(calibration)
        expected = fit_calibration(calibration, method=method).p_values(scores)
        assert rule._evidence is not None
        np.testing.assert_allclose([rule._evidence.value(s) for s in scores.tolist()], expected, rtol=1e-12)


def test_missing_scores_spend_no_level() -> None:
    rule = rule_of(procedure="lord").fit(np.random.default_rng(6).standard_normal(3000))
    before = rule.facts()
    assert not rule.run(np.full(50, np.nan)).alarm.any()
    assert rule.facts() == before
    assert before["num_excesses"] == 60


def test_a_calibration_that_cannot_reach_the_level_is_named() -> None:
    """Spec 4.2: BH and LORD++ on conformal p-values find nothing, or only what comes in numbers."""
    calibration = np.random.default_rng(7).standard_normal(2000)
    starved = rule_of("conformal", procedure="bh", block=1000).fit(calibration)
    assert "its level is 0.0001, while 2000 calibration scores give no p below 0.0005" in starved.warning()
    assert "no lone row can alarm" in starved.warning()
    assert starved.run(np.full(10, 100.0)).alarm.tolist() == 4 * [False] + 6 * [True]
    exhausted = rule_of("conformal", procedure="lord").fit(calibration)
    assert exhausted.warning() == ""
    exhausted.run(np.zeros(500))
    assert "no row can alarm" in exhausted.warning()
    assert not exhausted.run(np.full(10, 100.0)).alarm.any()
    assert rule_of("conformal", procedure="lord_decay").fit(calibration).warning() == ""
    assert "or take procedure lord_decay" in exhausted.warning()
    assert "take procedure lord_decay" not in rule_of("conformal", procedure="bh").fit(calibration[:900]).warning()
    assert rule_of("auto", procedure="bh").fit(np.tile(calibration, 2)).warning() == ""
    weak = rule_of(procedure="e_lond", e_values="direct").fit(np.abs(calibration))
    weak.run(np.ones(1000))
    assert "give no 1/e below 0.0005" in weak.warning()


@pytest.mark.parametrize(
    ("method", "level", "scores", "words"),
    [
        (
            "conformal",
            0.1,
            1000,
            r"calibrate on at least 2999 rows \(1999 to fit on, .*\), or raise rule.level to 0.2$",
        ),
        ("conformal", 0.1, 300, r"calibrate on at least 2999 rows \(1999 to fit on, [^)]*\)$"),
        ("auto", 0.05, 1000, r"calibrate on at least 3550 rows \(2550 to fit on, .*\), or raise rule.level to 0.2$"),
    ],
)
def test_a_starved_default_is_told_what_helps(method: str, level: float, scores: int, words: str) -> None:
    """It once said to take procedure lord_decay, which it was."""
    calibration = np.random.default_rng(8).standard_normal(scores)
    starved = rule_of(method, level=level).fit(calibration)
    starved.run(np.zeros(200))
    assert re.search(words, starved.warning())
    assert not starved.run(np.full(10, 100.0)).alarm.any()
    enough = int(re.findall(r"(\d+) to fit on", starved.warning())[0])
    fed = rule_of(method, level=level).fit(np.random.default_rng(8).standard_normal(enough))
    fed.run(np.zeros(200))
    assert fed.warning() == ""
    assert fed.step(100.0).alarm
    if "raise" in words:
        raised = rule_of(method, level=float(starved.warning().rpartition(" ")[2])).fit(calibration)
        raised.run(np.zeros(200))
        assert raised.step(100.0).alarm


def test_a_tail_that_can_be_fitted_is_not_refused_for_the_rows_said_to_do() -> None:
    """2,550 scores always leave 50 above their 0.98 quantile; some fewer often do, and were once refused."""
    scores = np.random.default_rng(8).standard_normal(2600)
    assert rule_of("gpd").fit(scores[:2500]).facts()["num_excesses"] == 50
    with pytest.raises(
        DataError, match=r"of the 2400 scores that are left, 2550 scores will do; .* at least 3550 rows"
    ):
        rule_of("gpd").fit(scores[:2400])
    with pytest.raises(DataError, match="do not differ"):
        rule_of("gpd").fit(np.where(np.arange(2600) < 52, 5.0, np.minimum(scores, 0.0)))


def test_scores_that_are_late_are_rows_more_in_the_advice_of_a_restored_rule_too() -> None:
    starved = rule_of("conformal").fit(np.random.default_rng(8).standard_normal(300))
    starved.latency = 30
    starved.run(np.zeros(200))
    assert "on at least 3029 rows (1999 to fit on, 30 before the judged ones" in starved.warning()
    assert FalseDiscoveryRate.restore(json.loads(json.dumps(starved.state()))).warning() == starved.warning()


def test_a_level_shift_is_a_warning_since_no_rate_is_promised() -> None:
    generator = np.random.default_rng(9)
    rule = rule_of().fit(generator.standard_normal(4000))
    rule.run(generator.standard_normal(1000))
    assert rule.warning() == ""
    rule.run(generator.standard_normal(1000) + 9.0)
    assert "about 63% of recent rows are alarms" in rule.warning()


def test_a_procedure_refuses_settings_of_another() -> None:
    for settings, name in (
        ({"procedure": "lord", "decay": 0.9}, "decay"),
        ({"procedure": "lord", "eta": 0.9}, "eta"),
        ({"block": 100}, "block"),
        ({"procedure": "bh", "e_values": "kappa"}, "e_values"),
        ({"procedure": "e_bh", "power": 2.0}, "power"),
        ({"procedure": "e_bh", "e_values": "direct", "kappa": 0.5}, "kappa"),
    ):
        with pytest.raises(ConfigError, match=f"{name} has no effect with procedure"):
            rule_of(**settings)
    with pytest.raises(DataError, match="none negative and some positive"):
        rule_of(procedure="e_bh", e_values="direct").fit([-1.0, 2.0])
    with pytest.raises(DataError, match="not fitted"):
        rule_of().step(1.0)


def test_descriptions_name_what_has_an_effect() -> None:
    assert rule_of().describe() == "fdr(procedure=lord_decay,level=0.1,decay=0.99,eta=0.5)"
    assert rule_of(procedure="e_bh", block=50).describe() == "fdr(procedure=e_bh,level=0.1,block=50,kappa=0.5)"
    direct = rule_of(procedure="e_lond", e_values="direct", power=3)
    assert direct.describe() == "fdr(procedure=e_lond,level=0.1,direct^3)"
    assert rule_of().alpha is None


@pytest.mark.parametrize("shift", [0.0, 8.0])  # the second: every row is an alarm
@pytest.mark.parametrize("procedure", ["lord", "lord_decay", "e_lond", "bh", "e_bh"])
def test_what_a_row_is_judged_by_does_not_grow(procedure: str, shift: float) -> None:
    """The cost of a row follows the memory it is judged by."""
    generator = np.random.default_rng(8)
    rule = FalseDiscoveryRate(FdrRule(procedure=procedure), CalibrationConfig()).fit(generator.standard_normal(5000))
    sizes = []
    for _ in range(3):
        rule.run(generator.standard_normal(2000) + shift)
        memory = rule.state()["procedure"]
        sizes.append(max((len(part) for part in memory.values() if isinstance(part, list)), default=0))
    assert sizes[2] <= 2000
    assert sizes[2] <= 1.1 * sizes[1] + 10
