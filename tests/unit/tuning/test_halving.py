"""Successive halving: who is stopped when, failures, order, interruption, repetition."""

from __future__ import annotations

import pytest

from tsforge.core.errors import ModelError
from tsforge.tuning.halving import Contestant, ContestRecord, NotBegun, halve

CURVES = {  # error after each epoch
    "good": [1.0, 0.5, 0.4, 0.3, 0.25, 0.2, 0.2, 0.2, 0.2],
    "bad": [3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2],
    "worse": [4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3, 3.2],
    "late": [0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7],
}


def learn(name: str, contestant: Contestant) -> float:
    for value in CURVES[name]:
        contestant.report(value)
    return CURVES[name][-1]


def test_hopeless_candidates_are_stopped_at_the_first_rung_and_good_ones_end() -> None:
    seen: list[ContestRecord] = []
    found = halve(list(CURVES), learn, on_record=seen.append)
    assert seen == found
    by_name = {record.name: record for record in found}
    assert [record.name for record in found] == list(CURVES)
    assert by_name["good"].state == "complete"
    assert by_name["good"].value == 0.2
    for name in ("bad", "worse"):
        assert by_name[name].state == "stopped"
        assert by_name[name].steps == 1
        assert "stopped after 1 epochs" in str(by_name[name].error)
    assert by_name["late"].steps == 3  # passed the first rung, fell behind at the second
    assert by_name["late"].state == "stopped"


def test_repetition_gives_the_same() -> None:
    first, second = (halve(list(CURVES), learn) for _ in range(2))
    assert [(r.name, r.state, r.value, r.steps) for r in first] == [(r.name, r.state, r.value, r.steps) for r in second]


def test_a_failure_is_a_record_and_others_go_on() -> None:
    def objective(name: str, contestant: Contestant) -> float:
        if name == "broken":
            raise ModelError("it cannot be built")
        if name == "nan":
            return float("nan")
        return learn(name, contestant)

    found = halve(["broken", "nan", "good"], objective)
    assert [record.state for record in found] == ["failed", "failed", "complete"]
    assert found[0].error == "it cannot be built"
    assert "its error is nan" in str(found[1].error)
    assert halve([], objective) == []


def test_what_is_left_out_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    def objective(name: str, contestant: Contestant) -> float:
        if name == "late":
            raise NotBegun("not begun: the time is spent")
        return learn(name, contestant)

    found = halve(["good", "late"], objective)
    assert [record.state for record in found] == ["complete", "left_out"]
    assert found[1].error == "not begun: the time is spent"
    assert not caplog.records


def test_interruption_passes_and_bugs_are_not_hidden() -> None:
    def interrupted(name: str, contestant: Contestant) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halve(["good"], interrupted)

    def mistaken(name: str, contestant: Contestant) -> float:
        return {}["absent"]

    with pytest.raises(KeyError):
        halve(["good"], mistaken)
