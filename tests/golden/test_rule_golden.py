"""Decisions of threshold rules beside those of other implementations, on numbers anybody can draw again.

Provenance: online-fdr 1.0.0 (LordPlusPlus(alpha=0.1, wealth=0.05), LORDMemoryDecay(alpha=0.1, delta=0.99, eta=0.5),
ELond(alpha=0.1), bh, e_bh) and libspot 3.1.0 (Spot(q=1e-3, level=0.98, max_excess=2000)), numpy 2.4.6, 2026-11-28.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tsforge.anomaly.extreme_rules import Pot, Spot
from tsforge.anomaly.fdr import (
    Lond,
    LordDecay,
    LordPlusPlus,
    Procedure,
    benjamini_hochberg,
    e_benjamini_hochberg,
    kappa_e_values,
)

# fmt: off
REJECTED = {
    "lord": [
        2, 22, 28, 37, 49, 92, 93, 95, 136, 143, 201, 228, 239, 242, 316, 321, 333, 335, 346, 355, 367, 368,
        369, 371, 379, 384, 387, 389, 401, 430, 455, 456, 523, 539, 658, 674, 706, 740, 746, 752, 759, 763, 779,
        806, 818, 824, 866, 893, 899, 908, 912, 913, 934, 941, 956, 958, 973, 992,
    ],
    "lord_decay": [
        2, 22, 28, 37, 49, 92, 93, 95, 136, 143, 201, 228, 239, 242, 316, 321, 333, 335, 346, 355, 367, 368,
        369, 371, 379, 384, 387, 389, 401, 430, 455, 456, 523, 539, 626, 658, 674, 706, 740, 746, 752, 759, 763,
        779, 806, 818, 824, 866, 893, 899, 908, 934, 941, 956, 958, 973, 992,
    ],
    "e_lond": [93, 523],
    "bh": [
        2, 8, 18, 19, 22, 28, 31, 36, 37, 49, 54, 57, 60, 92, 93, 95, 107, 116, 121, 126, 129, 136, 143, 145,
        165, 169, 181, 201, 228, 239, 242, 316, 321, 332, 333, 335, 343, 346, 355, 364, 367, 368, 369, 371, 379,
        384, 387, 389, 401, 430, 455, 456, 475, 485, 500, 515, 523, 525, 539, 550, 585, 620, 626, 643, 655, 658,
        674, 679, 686, 694, 706, 708, 712, 740, 746, 752, 759, 763, 776, 779, 782, 785, 797, 806, 816, 818, 824,
        845, 857, 866, 876, 893, 899, 908, 912, 913, 934, 941, 956, 957, 958, 973, 978, 992, 994,
    ],
    "e_bh": [22, 93, 143, 333, 369, 523, 759, 956],
}
LEVELS = {  # of values 1, 100, 500, 1000, and the sum of all
    "lord": [
        0.002675838545630043, 0.0022671054980635628, 0.0008725915179975418, 0.0016796319071868046,
        1.4886233964276256,
    ],
    "lord_decay": [
        0.002675838545630043, 0.002513585551862101, 0.000785623093614971, 0.0013996897911095116,
        1.5241012927342585,
    ],
    "e_lond": [
        0.005351677091260086, 8.31685091545498e-05, 1.586647453839286e-05, 1.1552698488810486e-05,
        0.04204057671933346,
    ],
}
LIBSPOT = {  # seed: start of the tail, first and last level, alarms
    0: (2.802584610571535, 5.051627951022516, 5.053517097220613, [150, 450, 550, 950]),
    1: (2.9078650534871118, 4.975046223052878, 4.895498895798992, [150, 650, 800, 900, 974]),
    2: (2.92744647073109, 4.722421537210057, 4.6479828900140765, [597, 600, 723, 750, 800]),
    3: (2.8369226824734985, 4.850321092962897, 4.807403473477555, [413, 650]),
    4: (2.9907471700454917, 4.85111446320017, 4.7715555585955265, [0, 550]),
    5: (2.8657081104836153, 5.453565143425842, 5.482570545642197, [121, 250, 271, 400, 450, 500, 571, 850]),
}
# fmt: on


def p_values() -> NDArray[np.float64]:
    """1,000 p-values, 15 % of them small."""
    generator = np.random.default_rng(8)
    p = generator.uniform(size=1000)
    strange = generator.uniform(size=1000) < 0.15
    p[strange] = generator.beta(0.2, 20.0, size=1000)[strange]
    return p


@pytest.mark.parametrize(
    ("name", "procedure"),
    [("lord", LordPlusPlus(0.1)), ("lord_decay", LordDecay(0.1, 0.99, 0.5)), ("e_lond", Lond(0.1))],
)
def test_online_procedures_equal_online_fdr(name: str, procedure: Procedure) -> None:
    """Checklist 9: the same 1,000 decisions at the same levels."""
    values = 1.0 / kappa_e_values(p_values()) if name == "e_lond" else p_values()
    levels, rejected = [], []
    for i, value in enumerate(values.tolist()):
        levels.append(procedure.level)
        if procedure.step(value):
            rejected.append(i)
    assert rejected == REJECTED[name]
    found = [levels[0], levels[99], levels[499], levels[999], sum(levels)]
    np.testing.assert_allclose(found, LEVELS[name], rtol=1e-12)


def test_whole_spans_equal_online_fdr() -> None:
    """Checklist 9."""
    p = p_values()
    assert np.flatnonzero(benjamini_hochberg(p, 0.1)).tolist() == REJECTED["bh"]
    assert np.flatnonzero(e_benjamini_hochberg(kappa_e_values(p), 0.1)).tolist() == REJECTED["e_bh"]


def spot_scores(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """5,000 calibration scores and 1,000 to judge, every fiftieth of them three times as large."""
    generator = np.random.default_rng(seed)
    calibration, scores = np.abs(generator.standard_t(8, 5000)), np.abs(generator.standard_t(8, 1000))
    scores[::50] *= 3
    return calibration, scores


@pytest.mark.parametrize("seed", LIBSPOT)
def test_spot_beside_libspot(seed: int) -> None:
    """The same alarms where both see the same tail: its start is approximated there and its fit another one.

    Four of six draws agree in all 1,000 decisions. In the others a score lies between the two levels, which differ by
    up to 3.4 %.
    """
    start, first, last, alarms = LIBSPOT[seed]
    calibration, scores = spot_scores(seed)
    rule = Spot(1e-3, shape="free", exclude_flagged=None, max_excesses=2000).fit(calibration)
    tail = rule.facts()
    assert tail["u"] == pytest.approx(start, rel=0.02)
    found = rule.run(scores)
    assert (found.threshold[0], found.threshold[-1]) == pytest.approx((first, last), rel=0.035)
    differ = sorted(set(np.flatnonzero(found.alarm).tolist()) ^ set(alarms))
    assert differ == {1: [650], 5: [121, 250, 450]}.get(seed, [])
    for row in differ:
        assert scores[row] == pytest.approx(found.threshold[row], rel=0.04)


def test_the_published_check_of_a_normal_sample() -> None:
    """Checklist 8: spec 5.2, z = 3.197 with a free shape where the truth is 3.719; 98 to 100 excesses say no more."""
    scores = np.random.default_rng(0).standard_normal(5000)
    for rule in (Pot(1e-4, shape="free").fit(scores), Spot(1e-4, shape="free").fit(scores)):
        assert rule.run([0.0]).threshold[0] == pytest.approx(3.197, abs=1e-3)
        assert rule.facts()["num_excesses"] == 100
    assert Pot(1e-4).fit(scores).threshold == pytest.approx(3.719, abs=0.05)
