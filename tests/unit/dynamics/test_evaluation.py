"""What a judgement is made of: the part of the free run that is compared, failures, shares of lost runs, medians."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.dynamics.config import EvaluationConfig, PLRNNConfig
from tsforge.dynamics.evaluation import METRICS, captured_share, evaluate, free_comparison, spectral_rows, summarise
from tsforge.dynamics.network import Model, Reconstruction
from tsforge.layers.teacher_forcing import ForcingConfig
from tsforge.metrics.dynamics import d_h, d_stsp

SMALL = validate(
    EvaluationConfig,
    {"lyapunov_steps": 200, "lyapunov_transient": 20, "capture_runs": 5, "capture_steps": 500, "sigma": 3.0},
)


def rotation(radius: float = 1.0, *, turn: float = 0.3) -> Model:
    """Return the linear map of two units that turns by ``turn`` and stretches by ``radius``."""
    plain = validate(PLRNNConfig, {"kind": "almost_linear", "rectified": 0})
    parts = Reconstruction(plain, ForcingConfig(), 2, [0])
    cosine, sine = math.cos(turn), math.sin(turn)
    with torch.no_grad():
        parts.map.raw_A.zero_()
        parts.map.get_parameter("W").copy_(radius * torch.tensor([[[cosine, -sine], [sine, cosine]]]))
        parts.map.get_parameter("h").zero_()
    return parts.group(0)


def circle(rows: int = 400, turn: float = 0.3) -> np.ndarray:
    angle = turn * np.arange(rows)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_the_first_quarter_of_the_free_run_is_dropped_and_the_rest_compared() -> None:
    run = free_comparison(rotation(), circle(40))
    assert run.shape == (40, 2)
    np.testing.assert_allclose(run, circle(51)[11:], atol=1e-5)  # 10 steps dropped; the first state kept is the 11th


def test_metrics_of_a_rotation() -> None:
    test = circle()
    judged = evaluate(rotation(0.999), test, SMALL, 0.5)
    assert judged.metrics["d_stsp"] == float(d_stsp(test, judged.free_run))
    assert judged.metrics["d_h"] == float(d_h(test, judged.free_run, sigma=3.0))
    np.testing.assert_allclose(judged.spectrum, [math.log(0.999) / 0.5] * 2, rtol=1e-3)  # per unit of time
    assert judged.metrics["pe"] == pytest.approx((1 - 0.999**20) ** 2 / 2, rel=1e-3)
    assert judged.metrics["lambda_1"] == judged.spectrum[0]
    assert judged.lyapunov_steps == 200
    assert judged.metrics["alpha"] == 1.0


def test_warnings_name_places_in_the_units_of_the_data() -> None:
    judged = evaluate(rotation(0.9), circle(), SMALL, 1.0, units=(np.array([10.0, 20.0]), np.array([2.0, 3.0])))
    assert any("fixed point at (10, 20) within" in warning for warning in judged.findings["warnings"])


def test_the_spectral_distance_compares_the_longest_stretch_without_missing_values() -> None:
    test = circle()
    test[7, 1] = np.nan
    judged = evaluate(rotation(0.999), test, SMALL, 1.0)
    assert judged.metrics["d_h"] == float(d_h(test[8:], judged.free_run[8:], sigma=3.0))
    test[::20, 0] = np.nan
    judged = evaluate(rotation(0.999), test, SMALL, 1.0)
    assert math.isnan(judged.metrics["d_h"])
    assert all(math.isfinite(judged.metrics[name]) for name in ("d_stsp", "pe", "lambda_1", "captured"))


@pytest.mark.parametrize(
    ("missing", "rows"),
    [
        ([], slice(0, 100)),
        ([0, 99], slice(1, 99)),
        ([30, 50], slice(51, 100)),  # 49 rows: 20 sigma are 40
        ([30, 65], None),  # 34
        (range(100), None),
    ],
)
def test_a_stretch_is_long_enough_by_the_smoothing_or_by_half_the_series(missing: Any, rows: slice | None) -> None:
    test = circle(100)
    test[list(missing), 0] = np.nan
    assert spectral_rows(test, 2.0) == rows
    if rows is not None:
        assert spectral_rows(test, 20.0) == (None if rows.start > 50 else rows)  # half the series: 50 rows


@pytest.mark.parametrize(
    ("metric", "reason", "change"),
    [
        ("pe", "PE\\(20\\) needs a series .* more than 20 rows", lambda test: test[:20]),
        ("pe", "no complete row", lambda test: np.where(np.arange(400)[:, None] % 20 < 2, test, np.nan)),
        ("d_stsp", "variate 1 of the true series is constant", lambda test: test * [1, 0] + [0, 0.1]),
    ],
)
def test_a_metric_that_the_test_rows_do_not_allow_is_nan_and_says_why(metric: str, reason: str, change: Any) -> None:
    judged = evaluate(rotation(0.999), change(circle()), SMALL, 1.0)
    assert math.isnan(judged.metrics[metric])
    assert re.search(reason, judged.missing[metric])
    assert judged.failed == "", "the model is not to blame"
    assert math.isfinite(judged.metrics["lambda_1"])
    assert np.isfinite(judged.free_run).all()


def test_the_size_of_a_free_run_is_told_and_a_dead_one_has_no_spectrum() -> None:
    test = circle()
    judged = evaluate(rotation(0.999), test, SMALL, 1.0)
    np.testing.assert_allclose(judged.spread, judged.free_run.std(0) / test.std(0))
    assert judged.metrics["d_h"] < 0.2
    dead = evaluate(rotation(0.95), test, SMALL, 1.0)  # 0.95^100 = 0.006
    assert dead.spread.max() < 0.01
    assert dead.metrics["d_h"] == 1.0
    test[10:20] = np.nan
    assert np.isfinite(evaluate(rotation(0.999), test, SMALL, 1.0).spread).all()


def test_a_run_that_diverges_has_no_metrics_and_says_why() -> None:
    judged = evaluate(rotation(9.0), circle(), SMALL, 1.0)
    assert judged.failed == "the free run diverged"
    assert all(math.isnan(judged.metrics[name]) for name in METRICS if name != "alpha")
    assert judged.findings == {}
    validated = evaluate(rotation(9.0), circle(), SMALL, 1.0, valid=circle(100))
    assert validated.findings["capture"]["diverged"] == 1.0  # found without the test series
    assert validated.failed == judged.failed
    broken = rotation(math.nan)
    assert evaluate(broken, circle(), SMALL, 1.0).failed == "parameters"


@pytest.mark.parametrize(("expected", "share"), [(None, 0.4), ("chaos", 0.7), ("rest", 0.9), ("oscillation", 0.4)])
def test_lost_runs_are_those_that_end_otherwise_than_the_data(expected: str | None, share: float) -> None:
    ends = {"fixed": 0.1, "contracting": 0.2, "near_zero": 0.4, "expanding": 0.3, "diverged": 0.0}
    assert captured_share({**ends, "kept": ends}, expected) == pytest.approx(share)
    lost = {**ends, "kept": ends | {"near_zero": 0.1, "expanding": 0.2}}  # 40 % of them far from the data
    assert captured_share(lost, expected) == pytest.approx(
        share + {None: 0.3, "chaos": 0.1, "rest": 0.0}.get(expected, 0.3)
    )


def test_medians_and_deviations_are_over_the_seeds_that_did_not_fail() -> None:
    def row(value: float | None, failed: str = "") -> dict[str, Any]:
        return {**dict.fromkeys(METRICS, None), "d_stsp": value, "alpha": 9.0 if failed else 0.5, "failed": failed}

    facts = summarise([row(1.0), row(2.0), row(9.0), row(4.0), row(None, "parameters"), row(math.nan, "diverged")])
    assert facts["seeds"] == 6
    assert facts["failed_share"] == pytest.approx(1 / 3)
    assert facts["d_stsp"] == 3.0
    assert facts["d_stsp_mad"] == 1.5
    assert (facts["pe"], facts["pe_mad"]) == (None, None)
    assert (facts["alpha"], facts["alpha_mad"]) == (0.5, 0.0), "a failed seed has an alpha, but no part in the median"
    lost = summarise([row(2.0, "no generated point lies in the range of the data")])
    assert (lost["failed_share"], lost["d_stsp"], lost["alpha"]) == (1.0, None, None)
