"""What a terminal shows."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from tsforge.console import cell, plain, print_error, print_facts, print_json, print_table


def test_json_is_valid_whatever_comes(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "when": datetime(2024, 1, 2, tzinfo=UTC),
            "bad": math.nan,
            "inf": math.inf,
            "np": np.float64(1.5),
            "list": (1, None, True),
            3: "key",
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "when": "2024-01-02T00:00:00+00:00",
        "bad": None,
        "inf": None,
        "np": 1.5,
        "list": [1, None, True],
        "3": "key",
    }


def test_numpy_nan_is_null() -> None:
    assert plain(np.float32("nan")) is None


def test_table_counts_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"name": f"row{index}", "value": index / 3} for index in range(5)], title="numbers", limit=2)
    out = capsys.readouterr().out
    assert "numbers" in out
    assert "row1" in out
    assert "row2" not in out
    assert "3 more rows" in out


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"source": "y[t+h] = y[t]"}])
    assert "y[t+h] = y[t]" in capsys.readouterr().out


def test_sentences_have_a_line_each_and_records_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    worst = [{"series_id": "a", "skill": 0.24724709, "count": None}, {"series_id": "b", "skill": 0.5}]
    print_facts({"notes": ["one thing", "another thing, too"], "worst": worst, "names": ["a", "b"]})
    assert capsys.readouterr().out.splitlines() == [
        "notes  one thing",
        "       another thing, too",
        "worst  series_id=a skill=0.2472; series_id=b skill=0.5",
        "names  a, b",
    ]


def test_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([], title="runs")
    assert capsys.readouterr().out == "runs: nothing yet\n"


def test_cells() -> None:
    assert [cell(value) for value in (None, True, 1.23456, math.inf, ["a", 2.0], datetime(2024, 1, 2, 3, 4))] == [
        "",
        "yes",
        "1.235",
        "n/a",
        "a, 2",
        "2024-01-02 03:04",
    ]


def test_durations_read_well() -> None:
    spans = (timedelta(days=4710, hours=3), timedelta(hours=3, minutes=12), timedelta(seconds=90))
    assert [cell(span) for span in spans] == ["4710 d", "3 h 12 min", "0 h 2 min"]
    assert plain(spans[2]) == 90.0


def test_facts_are_aligned_and_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"a": 1, "long": 2.5})
    print_error("no such file")
    captured = capsys.readouterr()
    assert captured.out == "a     1\nlong  2.5\n"
    assert captured.err == "error: no such file\n"
