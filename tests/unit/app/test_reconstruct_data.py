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


def test_the_end_of_the_training_rows_validates_after_the_gap(table: Path) -> None:
    data = read(table, split=0.7, valid=0.4, gap=5, columns=["b"])
    assert data.valid is not None
    assert [len(data.train[0]), len(data.valid), len(data.test)] == [42, 23, 25]
    back = [rows[:, 0] * data.scale[0] + data.loc[0] for rows in (data.train[0], data.valid, data.test)]
    assert [(part[0], part[-1]) for part in back] == [
        pytest.approx((5, 5 + 2 * 41)),
        pytest.approx((5 + 2 * 47, 5 + 2 * 69)),
        pytest.approx((5 + 2 * 75, 5 + 2 * 99)),
    ]
    np.testing.assert_allclose(data.train[0].mean(0), 0, atol=1e-12)  # validation rows have no part in the scaling
    assert any("rows of the longest training trajectory validate" in note for note in data.notes)
    assert data.fingerprint != read(table, split=0.7, gap=5, columns=["b"]).fingerprint


def test_only_the_longest_trajectory_gives_validation_rows(tmp_path: Path) -> None:
    steps = np.concatenate([np.arange(40), np.arange(100, 160), np.arange(30)])
    place = tmp_path / "runs.parquet"
    pl.DataFrame({"step": steps, "x": np.sin(np.arange(130.0)), "u": np.arange(130.0)}).write_parquet(place)
    data = read(place, in_sample=True, valid=0.5, inputs=["u"], standardise=False)
    assert [len(part) for part in data.train] == [40, 30, 30]
    assert data.valid is not None
    assert data.valid_inputs is not None
    assert data.valid_inputs[:, 0].tolist() == list(range(70, 100))
    np.testing.assert_allclose(data.valid[:, 0], np.sin(np.arange(70.0, 100)))
    assert len(data.test) == 40  # judged in sample: on rows that train


def test_a_simulated_system_validates_too() -> None:
    plain = {"system": {"system": "lorenz63", "steps": 400}, "valid": 0.25}
    data = read_trajectories(validate(TrajectoryConfig, plain))
    assert data.valid is not None
    assert [len(data.train[0]), len(data.valid), len(data.test)] == [300, 100, 400]


def test_inputs_are_no_variates_and_scaled_by_their_training_rows(table: Path) -> None:
    pl.read_parquet(table).with_columns(u=pl.col("step") ** 2, time=pl.col("step")).write_parquet(table)
    data = read(table, split=0.6, gap=10, inputs=["u", "time"], step="step")
    assert data.columns == ("a", "b")
    assert data.inputs == ("u", "time")
    assert data.train_inputs is not None
    assert data.test_inputs is not None
    assert data.input_loc is not None
    assert data.input_scale is not None
    np.testing.assert_allclose(data.train_inputs[0].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(data.train_inputs[0].std(0), 1)
    np.testing.assert_allclose(
        data.test_inputs * data.input_scale + data.input_loc, [[t**2, t] for t in range(70, 100)]
    )
    np.testing.assert_allclose(data.input_mean, 0, atol=1e-12)
    np.testing.assert_array_equal(data.test, read(table, split=0.6, gap=10, columns=["a", "b"], step="step").test)
    assert data.fingerprint != read(table, split=0.6, gap=10, columns=["a", "b", "u", "time"], step="step").fingerprint
    raw = read(table, columns=["a"], inputs=["u"], standardise=False)
    np.testing.assert_allclose(raw.input_mean, [np.mean(np.arange(80.0) ** 2)])


def test_inputs_end_with_their_trajectory_and_follow_every(tmp_path: Path) -> None:
    steps = np.concatenate([np.arange(40), np.arange(100, 130)])
    place = tmp_path / "runs.parquet"
    pl.DataFrame({"step": steps, "x": np.sin(np.arange(70.0)), "u": np.arange(70.0)}).write_parquet(place)
    data = read(place, in_sample=True, inputs=["u"], standardise=False, every=2)
    assert data.train_inputs is not None
    assert data.test_inputs is not None
    assert [part[:2, 0].tolist() for part in data.train_inputs] == [[0, 2], [40, 42]]
    assert len(data.test_inputs) == len(data.test) == 20


@pytest.mark.parametrize("every", [1, 2])
def test_a_missing_input_is_refused_where_it_is_used(table: Path, every: int) -> None:
    holed = pl.read_parquet(table).with_columns(u=pl.when(pl.col("step") == 7).then(None).otherwise(pl.col("step")))
    holed.write_parquet(table)
    if every == 2:
        assert read(table, inputs=["u"], every=every, in_sample=True).inputs == ("u",)
        return
    with pytest.raises(DataError, match=r"missing values of u \(1\)"):
        read(table, inputs=["u"], every=every, in_sample=True)


def test_a_test_file_needs_the_inputs_too(table: Path) -> None:
    driven = table.with_name("driven.parquet")
    pl.read_parquet(table).with_columns(u=pl.col("step")).write_parquet(driven)
    with pytest.raises(ConfigError, match=r"data\.inputs: .*no column 'u'"):
        read(driven, inputs=["u"], test=str(table))


@pytest.mark.parametrize(
    ("settings", "error", "fragment"),
    [
        ({"valid": 0.05}, DataError, "rows validate; at least 20"),
        ({"in_sample": True, "gap": 3}, ConfigError, "gap has no part"),
        ({"path": None, "system": {"system": "lorenz63"}, "gap": 3}, ConfigError, "gap has no part"),
        ({"inputs": ["c"]}, ConfigError, r"data\.inputs: .* no column 'c'"),
        ({"inputs": ["a"], "columns": ["a", "b"]}, ConfigError, "inputs names columns twice"),
        ({"inputs": ["a", "a"]}, ConfigError, "inputs names columns twice"),
        ({"inputs": ["step"], "step": "step"}, ConfigError, "inputs names columns twice"),
        ({"inputs": ["b", "a"]}, DataError, "no numeric column"),
        ({"path": None, "system": {"system": "lorenz63"}, "inputs": ["a"]}, ConfigError, "simulated system"),
        ({"path": "/nowhere.parquet"}, DataError, "does not exist"),
        ({"path": "x.xlsx"}, ConfigError, "parquet or .csv"),
        ({"columns": ["aa"]}, ConfigError, "did you mean 'a'|no column 'aa'"),
        ({"step": "steps"}, ConfigError, "did you mean 'step'"),
        ({"split": 0.9}, DataError, "at least 20"),
        ({"step": "a"}, DataError, "does not rise"),
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
