"""Findings in plain language: a healthy map gives no warning, each fault gives its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tsforge.core.errors import ModelError
from tsforge.dynamics.capture import CaptureSettings
from tsforge.dynamics.findings import examine
from tsforge.ops.plrnn import Shallow

SMALL = CaptureSettings(runs=40, steps=2000, tangent_steps=1000)
SLOPE = 1.9
PLAIN_TENT = Shallow(np.array([SLOPE]), np.array([[-2 * SLOPE]]), np.ones((1, 1)), np.zeros(1), np.array([-0.5]))
TENT = Shallow(
    np.array([SLOPE]), np.array([[-2 * SLOPE, 1.4]]), np.array([[1.0], [-1.0]]), np.zeros(1), np.array([-0.5, -1.0])
)
INSIDE = np.linspace(0.05, 0.95, 200)[:, None]
CYCLING = Shallow(
    np.array([0.8377689, 0.96461297]),
    np.array([[0.0, -0.64375], [0.52505308, 0.0]]),
    np.eye(2),
    np.array([0.37298253, -0.97931491]),
    np.zeros(2),
)


def text(findings) -> str:
    return " ".join(findings.warnings)


@pytest.mark.parametrize("expected", [None, "chaos"])
def test_a_healthy_chaotic_map_gives_no_warning(expected) -> None:
    findings = examine(PLAIN_TENT, INSIDE, expected=expected, settings=SMALL)
    assert findings.warnings == ()
    assert findings.healthy
    assert findings.complete
    assert [finding.cycle.kind for finding in findings.cycles] == ["unstable", "unstable"]
    assert "chaos: 100 %" in findings.notes[0]


def test_an_attractor_off_the_data_is_named_even_if_no_run_reaches_it() -> None:
    findings = examine(TENT, INSIDE, settings=SMALL)
    assert len(findings.warnings) == 1
    assert "An attracting fixed point at (-2.8) outside the range of the data" in text(findings)
    assert "takes none of the free runs" in text(findings)
    spurious = next(finding for finding in findings.cycles if finding.cycle.kind == "stable")
    assert not spurious.on_data
    assert spurious.distance == pytest.approx((0.05 + 2.8) / INSIDE.std())


def test_a_place_is_named_in_the_units_of_the_data() -> None:
    findings = examine(TENT, INSIDE, settings=SMALL, observe=lambda points: 10.0 * points + 100.0)
    assert "at (72) outside" in text(findings)


def test_captured_and_lost_shares_are_named() -> None:
    states = np.concatenate([INSIDE[:160], np.full((40, 1), -0.1)])
    findings = examine(TENT, states, settings=SMALL)
    assert "20 % of the free runs from the data are lost" in text(findings)
    assert "takes 20 % of the free runs" in text(findings)
    assert "come to rest" not in text(findings), "of a lost run it is said that it is lost"
    assert findings.notes[0] == "The free runs that are not lost show chaos: 100 % of them."


def test_where_all_runs_are_lost_nothing_else_is_said_of_them() -> None:
    findings = examine(
        PLAIN_TENT, INSIDE / 1e6, expected="oscillation", settings=SMALL
    )  # chaos, a million times as far
    assert findings.warnings[0] == ("100 % of the free runs from the data are lost: they end far outside its range.")
    assert not any("chaotic" in said or "show" in said for said in (*findings.warnings, *findings.notes))


def test_divergence_is_named() -> None:
    findings = examine(PLAIN_TENT, np.concatenate([INSIDE[:160], np.full((40, 1), -0.1)]), settings=SMALL)
    assert "20 % of the free runs from the data grow without bound" in text(findings)
    assert "far outside" not in text(findings)  # each run is counted once


def test_an_attracting_point_on_the_data_is_wrong_unless_the_data_come_to_rest() -> None:
    shrinking = Shallow(np.full(2, 0.9), np.zeros((2, 1)), np.ones((1, 2)), np.zeros(2), np.zeros(1))
    states = np.random.default_rng(0).normal(size=(100, 2))
    findings = examine(shrinking, states, settings=SMALL)
    assert "100 % of the free runs from the data come to rest" in text(findings)
    assert "within the range of the data" in text(findings)
    at_rest = examine(shrinking, states, expected="rest", settings=SMALL)
    assert at_rest.healthy
    assert any("attracting fixed point" in note for note in at_rest.notes)


def test_a_cycle_is_right_for_an_oscillation_and_wrong_for_chaos() -> None:
    start = np.array([2.16, 0.136])
    states = [start]
    for _ in range(64):
        z = states[-1]
        states.append(CYCLING.A * z + CYCLING.W1 @ np.maximum(z, 0) + CYCLING.h1)
    right = examine(CYCLING, np.array(states), periods=(1, 16), settings=SMALL)
    assert right.healthy
    assert not right.complete
    stable = next(finding for finding in right.cycles if finding.cycle.kind == "stable")
    assert stable.captured == 1.0
    wrong = examine(CYCLING, np.array(states), expected="chaos", periods=(1, 16), settings=SMALL)
    assert "regular motion (cycles of 16 steps), while the data show chaos" in text(wrong)
    assert "An attracting cycle of 16 steps" in text(wrong)


def test_chaos_is_wrong_where_the_data_oscillate() -> None:
    findings = examine(PLAIN_TENT, INSIDE, expected="oscillation", settings=SMALL)
    assert "100 % of the free runs from the data are chaotic, while the data show oscillation" in text(findings)


def test_report_is_json_and_wrong_input_is_refused() -> None:
    record = json.loads(json.dumps(examine(TENT, INSIDE, settings=SMALL).to_dict(), allow_nan=False))
    assert set(record) == {"healthy", "warnings", "notes", "complete", "cycles", "capture", "regions"}
    assert record["cycles"][0]["on_data"] in (True, False)
    with pytest.raises(ModelError, match="states must be"):
        examine(TENT, np.zeros((5, 2)), settings=SMALL)
