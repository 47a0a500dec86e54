"""The data report against counts taken by plain loops."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.data.frame import SeriesFrame
from tsforge.data.report import data_report
from tsforge.data.schema import SeriesSchema

START = datetime(2024, 1, 1, tzinfo=UTC)


def series(cells: dict[str, list[float | None]], column: str = "x") -> SeriesFrame:
    rows = [(name, START + timedelta(hours=at), value) for name, row in cells.items() for at, value in enumerate(row)]
    types = {"series_id": pl.String, "time": pl.Datetime("us", "UTC"), column: pl.Float64}
    table = pl.DataFrame(rows, schema=types, orient="row")
    return SeriesFrame(table, SeriesSchema(targets=(column,), freq="1h"), require_targets=False)


def runs_of_none(row: list[float | None]) -> list[int]:
    """Lengths of the runs of missing values between the first and the last value, by a plain loop."""
    seen = [at for at, value in enumerate(row) if value is not None]
    lengths, current = [], 0
    for value in row[seen[0] : seen[-1] + 1] if seen else []:
        if value is None:
            current += 1
        elif current:
            lengths.append(current)
            current = 0
    return lengths


def test_gaps_lie_between_the_first_and_the_last_value() -> None:
    cells: dict[str, list[float | None]] = {
        "a": [None, None, 1.0, None, 2.0, None, None, None, 3.0, None],
        "b": [1.0] * 4,
        "c": [None, None],
        "d": [None, 5.0, None],
        "e": [1.0, None, 2.0],
    }
    report = data_report(series(cells))
    for row in report.iter_rows(named=True):
        given = cells[row["series_id"]]
        runs = runs_of_none(given)
        assert (row["gaps"], row["longest_gap"]) == (len(runs), max(runs, default=0)), row["series_id"]
        assert row["rows"] == len(given)
        assert row["observed"] == sum(value is not None for value in given)
        assert row["null_share"] == pytest.approx(1 - row["observed"] / row["rows"])


def test_random_gaps_agree_with_a_loop() -> None:
    rng = np.random.default_rng(7)
    cells = {
        f"s{at}": [None if rng.random() < 0.4 else float(rng.normal()) for _ in range(int(rng.integers(1, 40)))]
        for at in range(60)
    }
    report = {row["series_id"]: row for row in data_report(series(cells)).iter_rows(named=True)}
    for name, row in cells.items():
        runs = runs_of_none(row)
        assert (report[name]["gaps"], report[name]["longest_gap"]) == (len(runs), max(runs, default=0))
        values = [value for value in row if value is not None]
        if values:
            assert report[name]["min"] == min(values)
            assert report[name]["max"] == max(values)
            assert report[name]["mean"] == pytest.approx(sum(values) / len(values))
            assert report[name]["start"] == START + timedelta(hours=row.index(values[0]))


def test_outliers_are_counted_from_the_median() -> None:
    rng = np.random.default_rng(3)
    values = list(map(float, rng.normal(size=1000)))
    values[10], values[20] = 40.0, -40.0
    center = float(np.median(values))
    sigma = 1.4826 * float(np.median(np.abs(np.array(values) - center)))
    expected = sum(abs(value - center) > 6 * sigma for value in values)
    assert expected == 2
    assert data_report(series({"a": values}))["outliers"].to_list() == [expected]


def test_values_that_are_mostly_equal_still_show_their_outlier() -> None:
    rain = [0.0] * 95 + [1.0, 1.0, 2.0, 1.0, 500.0]
    assert data_report(series({"a": rain}))["outliers"].to_list() == [1]
    assert data_report(series({"a": [3.0] * 9}))["outliers"].to_list() == [0]


def test_constant_and_empty_columns_are_flagged() -> None:
    report = data_report(series({"a": [2.0, None, 2.0], "b": [1.0, 2.0, 2.0], "c": [None, None, None]}))
    assert report["constant"].to_list() == [True, False, False]
    assert report["min"].to_list() == [2.0, 1.0, None]


def test_freshness_counts_from_the_last_value() -> None:
    frame = series({"a": [1.0, 2.0, None], "b": [1.0, 2.0, 3.0], "c": [None, None, None]})
    as_of = START + timedelta(hours=4)
    report = data_report(frame, max_age=timedelta(hours=2), as_of=as_of)
    assert report["age"].to_list() == [timedelta(hours=3), timedelta(hours=2), None]
    assert report["stale"].to_list() == [True, False, True]
    early = data_report(frame, max_age=timedelta(hours=2), as_of=START)
    assert early["age"].to_list()[:2] == [timedelta(0), timedelta(0)]
    assert data_report(frame, as_of=as_of)["stale"].null_count() == 3


def test_columns_keep_their_order_and_say_their_role() -> None:
    table = pl.DataFrame({"series_id": "s", "time": [0, 1], "z": [1.0, 2.0], "a": [1.0, 2.0], "k": [1.0, 2.0]})
    frame = SeriesFrame(table, SeriesSchema(targets=("z",), past=("a",), known=("k",), freq="1i"))
    report = data_report(frame)
    assert report.select("column", "role").rows() == [("z", "target"), ("a", "past"), ("k", "known")]
    assert report["age"].null_count() == 3
