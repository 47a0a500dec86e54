"""Trajectories from files: columns, breaks, splits, scaling, and one readable line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.reconstruct_data import Trajectories, read_trajectories
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.dynamics.config import TrajectoryConfig


def read(path: Path, **settings: Any) -> Trajectories:
    return read_trajectories(validate(TrajectoryConfig, {"path": str(path), **settings}))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = np.arange(100)
    place = tmp_path / "run.parquet"
    columns = {"step": rows, "a": np.sin(rows * 0.7), "b": rows * 2.0 + 5}
    pl.DataFrame(columns).write_parquet(place)
    return place


def test_every_numeric_column_but_the_steps_is_a_variate(table: Path) -> None:
    data = read(table, split=0.6, gap=10)
    assert data.columns == ("a", "b")
    assert [part.shape for part in data.train] == [(60, 2)]
    assert data.test.shape == (30, 2)
    np.testing.assert_allclose(data.train[0].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(data.train[0].std(0), 1)
    np.testing.assert_allclose(data.test[0] * data.scale + data.loc, [np.sin(70 * 0.7), 145.0])


def test_csv_equals_parquet(table: Path) -> None:
    other = table.with_suffix(".csv")
    pl.read_parquet(table).write_csv(other)
    np.testing.assert_allclose(read(other).test, read(table).test)


def test_rows_are_taken_by_their_own_interval(table: Path) -> None:
    data = read(table, test=str(table), every=4, test_every=2, test_rows=50, columns=["b"], standardise=False)
    np.testing.assert_allclose(data.train[0][:3, 0], [5, 13, 21])
    np.testing.assert_allclose(data.test[[0, 1, -1], 0], [5, 9, 101])


def test_a_break_in_the_steps_ends_a_trajectory(tmp_path: Path) -> None:
    steps = np.concatenate([np.arange(40), np.arange(100, 130), np.arange(30)])
    place = tmp_path / "runs.parquet"
    pl.DataFrame({"time": steps, "x": np.sin(np.arange(100.0))}).write_parquet(place)
    data = read(place, in_sample=True)
    assert [len(part) for part in data.train] == [40, 30, 30]
    assert len(data.test) == 40
    assert any("in sample" in note for note in data.notes)


def test_a_column_can_name_the_trajectories(tmp_path: Path) -> None:
    place = tmp_path / "runs.csv"
    pl.DataFrame({"run": ["a"] * 30 + ["b"] * 25, "x": np.sin(np.arange(55.0))}).write_csv(place)
    assert [len(part) for part in read(place, series="run", in_sample=True).train] == [30, 25]


def test_the_default_split_is_said(table: Path) -> None:
    data = read(table)
    assert (len(data.train[0]), len(data.test)) == (80, 20)
    assert any("last 20%" in note for note in data.notes)


def test_the_fingerprint_follows_the_values(table: Path) -> None:
    before = read(table).fingerprint
    pl.read_parquet(table).with_columns(pl.col("a") * 2 + pl.col("step").cos()).write_parquet(table)
    assert read(table).fingerprint != before


@pytest.mark.parametrize(
    ("settings", "error", "fragment"),
    [
        ({"path": "/nowhere.parquet"}, DataError, "does not exist"),
        ({"path": "x.xlsx"}, ConfigError, "parquet or .csv"),
        ({"columns": ["aa"]}, ConfigError, "did you mean 'a'|no column 'aa'"),
        ({"step": "steps"}, ConfigError, "did you mean 'step'"),
        ({"split": 0.9}, DataError, "at least 20"),
        ({"step": "a"}, DataError, "does not rise|judging"),
    ],
)
def test_mistakes(table: Path, settings: dict[str, Any], error: type[Exception], fragment: str) -> None:
    with pytest.raises(error, match=fragment):
        read_trajectories(validate(TrajectoryConfig, {"path": str(table), **settings}))


@pytest.mark.parametrize(
    ("column", "fragment"),
    [([1.0] * 100, "constant"), ([None] * 100, "no training value"), ([float("inf")] + [1.0] * 99, "infinite")],
)
def test_values_that_cannot_be_used(tmp_path: Path, column: list[Any], fragment: str) -> None:
    place = tmp_path / "bad.parquet"
    pl.DataFrame({"x": np.sin(np.arange(100.0)), "y": pl.Series(column, dtype=pl.Float64)}).write_parquet(place)
    with pytest.raises(DataError, match=fragment):
        read(place)


def test_a_column_without_numbers_is_refused_unless_the_variates_are_named(table: Path) -> None:
    labelled = pl.read_parquet(table).with_columns(label=pl.lit("x"))
    labelled.write_parquet(table)
    with pytest.raises(DataError, match=r"label hold no numbers.*data\.columns"):
        read(table)
    with pytest.raises(DataError, match="'label' holds no numbers"):
        read(table, columns=["label"])
    assert read(table, columns=["a", "b"]).columns == ("a", "b")


def test_too_few_rows_are_counted(tmp_path: Path) -> None:
    place = tmp_path / "short.csv"
    pl.DataFrame({"x": [1.0, 2.0, 3.0]}).write_csv(place)
    with pytest.raises(DataError, match="2 training rows; at least 20"):
        read(place)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    place = tmp_path / "broken.parquet"
    place.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read"):
        read(place)
