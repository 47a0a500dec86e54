"""Spans of training, validation and test."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.splits import SplitConfig, Splits, literature_splits, make_splits


def panel(rows: int, future: int = 0) -> Panel:
    times = [datetime(2023, 1, 1) + timedelta(hours=hour) for hour in range(rows + future)]
    values = pl.Series([*np.arange(float(rows)), *[None] * future])
    table = pl.DataFrame({"ds": times, "y": values, "k": np.zeros(rows + future)})
    return Panel.from_frame(SeriesFrame.from_wide(table, time="ds", known=["k"]))


@pytest.mark.parametrize(
    ("name", "rows", "parts"),
    [
        # rows of each part as listed in the data README
        ("ETTh1", 17_420, (8640, 2880, 2880)),
        ("data/ETTh2.parquet", 17_420, (8640, 2880, 2880)),
        ("ETTm1", 69_680, (34_560, 11_520, 11_520)),
        ("exchange_rate", 7_588, (5311, 760, 1517)),
        ("national_illness", 966, (676, 97, 193)),
        ("epf_np", 52_416, (36_691, 5_242, 10_483)),
    ],
)
def test_literature_splits_equal_the_published_counts(name: str, rows: int, parts: tuple[int, int, int]) -> None:
    splits = literature_splits(name, rows)
    assert splits.train == (0, parts[0])
    assert splits.valid == (parts[0], parts[0] + parts[1])
    assert splits.test == (parts[0] + parts[1], sum(parts))


def test_literature_splits_need_enough_rows() -> None:
    with pytest.raises(DataError, match="needs 14400 rows, the data has 100"):
        literature_splits("ETTh1", 100)
    with pytest.raises(DataError, match="too few"):
        literature_splits("other", 4)


def test_fractions_use_every_row_and_no_future_row() -> None:
    assert make_splits(panel(101, future=24)) == Splits((0, 70), (70, 81), (81, 101))


def test_fractions_below_one_leave_rows_unused_at_the_end() -> None:
    splits = make_splits(panel(100), SplitConfig(train=0.5, valid=0.2, test=0.1))
    assert splits == Splits((0, 50), (50, 70), (70, 80))


def test_a_part_of_share_zero_is_empty() -> None:
    assert make_splits(panel(101), SplitConfig(train=0.8, valid=0.0, test=0.2)) == Splits((0, 81), (81, 81), (81, 101))


def test_counts_run_from_the_first_row() -> None:
    assert make_splits(panel(100), SplitConfig(kind="counts", counts=(50, 20, 10))).test == (70, 80)
    with pytest.raises(DataError, match="asks for 101 rows"):
        make_splits(panel(100), SplitConfig(kind="counts", counts=(50, 20, 31)))


def test_times_are_included_ends() -> None:
    config = SplitConfig(kind="times", ends=("2023-01-03T23:00", "2023-01-04T05:30", None))
    assert make_splits(panel(100, future=5), config) == Splits((0, 72), (72, 78), (78, 100))


@pytest.mark.parametrize(
    "config",
    [
        SplitConfig(kind="times", ends=("2022-01-01", "2023-01-02", None)),
        SplitConfig(kind="times", ends=("2023-01-02", "2023-01-01", None)),
        SplitConfig(kind="times", ends=("2023-01-02", "2024-01-01", None)),
    ],
)
def test_an_empty_part_is_refused(config: SplitConfig) -> None:
    with pytest.raises(DataError, match=r"part of the split has no rows \(the data has 100, from 2023-01-01 00:00"):
        make_splits(panel(100), config)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "counts"},
        {"counts": (1, 2, 3)},
        {"kind": "times"},
        {"kind": "counts", "counts": (1, 2, 3), "train": 0.5},
        {"train": 0.9},
        {"train": 0.0},
        {"valid": -0.1},
        {"kind": "counts", "counts": (0, 2, 3)},
    ],
)
def test_settings_without_effect_or_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SplitConfig(**values)


def test_a_config_survives_plain_types() -> None:
    for config in (SplitConfig(), SplitConfig(kind="counts", counts=(5, 1, 1))):
        assert SplitConfig.model_validate(config.model_dump(mode="json")) == config
