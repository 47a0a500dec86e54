"""Times of trajectories: their column, breaks and uneven gaps, intervals of files, variates that look like times."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.reconstruct_data import Trajectories, read_trajectories
from tsforge.app.reconstruct_times import interval_note
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.dynamics.config import TrajectoryConfig

ROWS = 300
WAVES = np.random.default_rng(0).normal(size=(ROWS, 2)).round(3)
EVEN = np.arange(ROWS) * 0.02
START = datetime(2024, 1, 1, tzinfo=UTC)


def stored(place: Path, values: np.ndarray = WAVES, **columns: Any) -> Path:
    names = {f"x{index}": values[:, index] for index in range(values.shape[1])}
    pl.DataFrame({**columns, **names}).write_parquet(place)
    return place


def read(place: Path, **settings: Any) -> Trajectories:
    return read_trajectories(validate(TrajectoryConfig, {"path": str(place), "in_sample": True, **settings}))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run.parquet"


@pytest.mark.parametrize(
    "name", ["Time", "STEP", "timestamp", "Date", "datetime", "index", "T", "__index_level_0__", "__index_level_1__"]
)
def test_a_column_of_times_is_known_by_its_name(place: Path, name: str) -> None:
    data = read(stored(place, **{name: EVEN}))
    assert data.columns == ("x0", "x1")
    assert data.spacing == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["T", "index"])
def test_a_name_that_may_be_a_quantity_is_one_unless_it_rises(place: Path, name: str) -> None:
    assert read(stored(place, **{name: WAVES[::-1, 0]})).columns == (name, "x0", "x1")


def test_plain_names_come_first_and_an_index_of_rows_is_no_variate(place: Path) -> None:
    data = read(stored(place, __index_level_0__=np.arange(ROWS)[::-1], Date=EVEN, time=EVEN + 7))
    assert data.columns == ("Date", "x0", "x1")
    assert "left out, since 'time' holds the times: __index_level_0__" in data.notes
    assert any("Date are taken as variates, since 'time'" in note for note in data.notes)


def test_the_only_column_of_dates_holds_the_times(place: Path) -> None:
    dates = [START + timedelta(milliseconds=20 * row) for row in range(ROWS)]
    data = read(stored(place, when=dates))
    assert data.columns == ("x0", "x1")
    assert (data.spacing, data.is_date) == (pytest.approx(0.02), True)
    assert read(stored(place, when=dates, step=np.arange(ROWS))).columns == ("x0", "x1")


def test_dates_as_text_are_times(place: Path) -> None:
    text = [(START + timedelta(hours=row)).strftime("%Y-%m-%d %H:%M:%S") for row in range(ROWS)]
    assert read(stored(place, timestamp=text)).spacing == 3600.0


@pytest.mark.parametrize("kind", [pl.Int64, pl.Int32, pl.String])
def test_dates_written_as_eight_digits_are_dates(place: Path, kind: Any) -> None:
    digits = pl.Series([int((START + timedelta(days=row)).strftime("%Y%m%d")) for row in range(ROWS)]).cast(kind)
    data = read(stored(place, date=digits))
    assert [len(part) for part in data.train] == [ROWS]  # no month of its own
    assert (data.spacing, data.is_date, data.columns) == (86_400.0, True, ("x0", "x1"))


def test_eight_digits_that_are_no_dates_count(place: Path) -> None:
    data = read(stored(place, time=np.arange(ROWS) + 20_240_131))
    assert [len(part) for part in data.train] == [ROWS]
    assert not data.is_date


@pytest.mark.parametrize(
    ("times", "spacing"),
    [
        (np.round(np.arange(ROWS) * 1000 / 30).astype(np.int64), 1000 / 30),
        ([date(1820 + row // 12, row % 12 + 1, 1) for row in range(ROWS)], 86_400 * 365.25 / 12),
        (EVEN + np.random.default_rng(1).uniform(-1e-4, 1e-4, ROWS), 0.02),
        ((EVEN + 1000).astype(np.float32), 0.02),
        (np.arange(ROWS, dtype=np.int64) * 10 + 1_700_000_000_000_000_000, 10.0),  # float64 would round to 256
        (pl.Series(np.arange(ROWS) * 10 + 1_700_000_000_000_000_000).cast(pl.Datetime("ns")), 1e-8),
        (np.arange(ROWS, dtype=np.uint16) * 7, 7.0),
    ],
)
def test_rounded_regular_times_make_one_trajectory(place: Path, times: Any, spacing: float) -> None:
    data = read(stored(place, time=times))
    assert [len(part) for part in data.train] == [ROWS]
    assert data.spacing == pytest.approx(spacing, rel=2e-3)


def test_uneven_times_are_told_with_share_and_range(place: Path) -> None:
    data = read(stored(place, time=np.round(np.arange(ROWS) * 1000 / 30).astype(np.int64)))
    assert "33.4% of the gaps are not the usual 33 (33 to 34)" in data.notes[0]
    assert not any("uneven" in note for note in read(stored(place, time=EVEN)).notes)


@pytest.mark.parametrize("gap", [1.6, -50.0, 0.0])
def test_a_long_gap_or_a_time_that_does_not_rise_is_a_break(place: Path, gap: float) -> None:
    gaps = np.full(ROWS, 1.0)
    gaps[100] = gap
    assert [len(part) for part in read(stored(place, time=gaps.cumsum())).train] == [100, ROWS - 100]
    gaps[100] = 1.4
    assert len(read(stored(place, time=gaps.cumsum())).train) == 1


@pytest.mark.parametrize(
    ("times", "fragment"),
    [
        (np.random.default_rng(2).permutation(EVEN), r"'time' does not rise in \d+% of the rows; sort the file"),
        (EVEN[::-1], "'time' does not rise in 100% of the rows; sort the file"),
        (
            np.random.default_rng(3).exponential(size=ROWS).cumsum(),
            r"'time' are uneven or not sorted: \d+% of the gaps are longer than 1.5 times",
        ),
        (pl.Series(EVEN).scatter(7, None), r"'time' has 1 missing value\(s\)"),
        (pl.Series(EVEN).scatter(7, np.nan), "'time' has values that are not finite"),
        (["soon"] * ROWS, "'time' holds String, not numbers or dates"),
        (np.arange(ROWS, dtype=np.uint64) + 2**63, "beyond the range of whole numbers"),
    ],
)
def test_times_that_cannot_be_used_are_named(place: Path, times: Any, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        read(stored(place, time=times))


def test_trajectories_that_start_again_at_0_are_no_disorder(place: Path) -> None:
    data = read(stored(place, time=np.tile(np.arange(30) * 0.5, 10)))
    assert [len(part) for part in data.train] == [30] * 10


def test_rows_without_a_name_are_refused(place: Path) -> None:
    names = pl.Series(["a"] * 150 + ["b"] * 150).scatter([3, 4], None)
    with pytest.raises(DataError, match=r"2 row\(s\) have no name in 'run'"):
        read(stored(place, run=names), series="run")


def test_files_of_different_intervals_are_refused(tmp_path: Path) -> None:
    train = stored(tmp_path / "train.parquet", time=EVEN)
    test = stored(tmp_path / "test.parquet", time=EVEN * 2)
    settings = {"test": str(test), "in_sample": False}
    with pytest.raises(DataError, match=r"0\.02 apart \(data\.every=1\), those of .* 0\.04 \(data\.test_every=1\)"):
        read(train, **settings)
    assert read(train, **settings, every=2).spacing == pytest.approx(0.04)
    stored(tmp_path / "test.parquet", time=EVEN * 1.04)
    assert read(train, **settings).spacing == pytest.approx(0.02)
    stored(tmp_path / "test.parquet")
    assert read(train, **settings).spacing == pytest.approx(0.02)


def test_columns_that_count_rows_say_nothing_of_the_interval(tmp_path: Path) -> None:
    train = stored(tmp_path / "train.parquet", step=np.arange(ROWS))
    test = stored(tmp_path / "test.parquet", step=np.arange(ROWS))
    assert read(train, test=str(test), in_sample=False, every=4).spacing is None
    stored(tmp_path / "test.parquet", step=np.arange(ROWS) * 4)
    assert len(read(train, test=str(test), in_sample=False, every=4).test) == ROWS
    with pytest.raises(DataError, match="a model steps one interval"):
        read(train, test=str(test), in_sample=False)


@pytest.mark.parametrize(
    ("spacing", "is_date", "dt", "fragment"),
    [
        (0.02, False, None, "dt=0.02 makes them per unit of time"),
        (0.02, True, None, "0.02 s apart.*per second"),
        (0.02, False, 0.5, "dt=0.5, but rows are 0.02 apart"),
        (0.02, False, 0.0204, None),
        (0.02, True, 0.5, None),  # an hour, a day: any unit will do
        (None, False, None, None),
    ],
)
def test_dt_is_held_against_the_times(spacing: float | None, is_date: bool, dt: float | None, fragment: Any) -> None:
    note = interval_note(spacing, is_date, dt)
    assert (note is None) == (fragment is None)
    assert note is None or re.search(fragment, note)


def test_variates_that_look_like_times_or_names_are_told(place: Path) -> None:
    columns = {"clock": EVEN + 5, "unit": np.repeat([3, 1, 2], 100), "flag": np.arange(ROWS) % 2}
    notes = read(stored(place, **columns)).notes
    assert any("run on from row to row as times do: clock; data.step=clock" in note for note in notes)
    assert any("rarely change: unit; data.series=unit" in note for note in notes)
    assert not any("flag" in note or "x0" in note for note in notes)
    columns["clock"] = np.tile(np.arange(30) * 0.1, 10)  # starts again with each trajectory
    assert any("as times do: clock" in note for note in read(stored(place, **columns)).notes)
    named = read(stored(place, **columns), columns=["clock", "unit", "x0"]).notes
    assert not any("look" in note or "taken as variates" in note for note in named)


@pytest.mark.parametrize("lost", [1, 30])
def test_judged_rows_begin_at_their_first_complete_one(place: Path, lost: int) -> None:
    holed = WAVES.copy()
    holed[200 : 200 + lost, 1] = np.nan
    data = read(stored(place, holed), in_sample=False, split=200 / ROWS)
    np.testing.assert_allclose(data.test * data.scale + data.loc, WAVES[200 + lost :])
    assert f"the test series begins at its first complete row: {lost} of 100 rows before it are left out" in data.notes
    validated = read(stored(place, np.roll(holed, -60, axis=0)), in_sample=False, split=2 / 3, valid=0.3)
    assert validated.valid is not None
    assert len(validated.valid) == 60 - lost
    assert any(f"validates begins at its first complete row: {lost} of 60" in note for note in validated.notes)


@pytest.mark.parametrize(
    ("stop", "fragment"), [(285, "has 15 rows; judging needs"), (300, "no row of the test series")]
)
def test_too_few_rows_after_the_first_complete_one_are_refused(place: Path, stop: int, fragment: str) -> None:
    holed = WAVES.copy()
    holed[200:stop, 0] = np.nan
    with pytest.raises(DataError, match=fragment):
        read(stored(place, holed), in_sample=False, split=200 / ROWS)


def test_driven_rows_are_left_out_with_their_inputs(place: Path) -> None:
    holed = WAVES.copy()
    holed[200:203, 1] = np.nan
    data = read(stored(place, holed, u=np.arange(ROWS) ** 2.0), inputs=["u"], in_sample=False, split=200 / ROWS)
    assert data.test_inputs is not None
    assert data.input_loc is not None
    assert data.input_scale is not None
    assert len(data.test_inputs) == len(data.test) == 97
    assert data.test_inputs[0] * data.input_scale + data.input_loc == pytest.approx(203.0**2)


@pytest.mark.parametrize("name", ["index", "T", "Time", "Date"])
@pytest.mark.parametrize("kind", ["drifting", "sizes", "years"])
def test_data_called_like_times_stays_data(place: Path, name: str, kind: str) -> None:
    """A price index or temperature that mostly rises, magnitudes, the year of each month."""
    noise = np.random.default_rng(1).normal(size=ROWS)
    values = {"drifting": np.cumsum(1 + 0.8 * noise), "sizes": np.abs(noise), "years": 1990 + np.arange(ROWS) // 12}
    found = read(stored(place, **{name: values[kind]}))
    assert found.columns == (name, "x0", "x1")
    assert [len(part) for part in found.train] == [ROWS]


def test_dates_come_before_a_number_called_t(place: Path) -> None:
    days = [START + timedelta(days=day) for day in range(ROWS)]
    found = read(stored(place, Date=pl.Series(days), t=np.sin(EVEN * 50)))
    assert found.columns == ("t", "x0", "x1")
    assert any("'Date' holds the times" in note for note in found.notes)


def test_working_days_are_evenly_spaced_rows(place: Path) -> None:
    days = [day for day in (date(2024, 1, 1) + timedelta(days=more) for more in range(500)) if day.weekday() < 5]
    found = read(stored(place, Date=pl.Series(days[:ROWS])))
    assert [len(part) for part in found.train] == [ROWS]
    assert any("leave out up to 2 of 86400 s at 20% of the rows, as working days do" in note for note in found.notes)


def test_times_that_repeat_are_not_said_to_be_unsorted(place: Path) -> None:
    days = pl.Series([date(2024, 1, 1) + timedelta(days=hour // 24) for hour in range(ROWS)])
    with pytest.raises(DataError, match="it repeats where the rows go on, name another column with data.step, or the"):
        read(stored(place, Date=days))


def test_a_column_that_counts_rows_says_nothing_beside_times_of_another_name(tmp_path: Path) -> None:
    stored(tmp_path / "a.parquet", step=np.arange(ROWS))
    stored(tmp_path / "b.parquet", time=EVEN)
    settings = {"path": str(tmp_path / "a.parquet"), "test": str(tmp_path / "b.parquet")}
    assert read_trajectories(validate(TrajectoryConfig, settings)).columns == ("x0", "x1")


def test_beside_a_clock_no_other_is_proposed(place: Path) -> None:
    [note] = [one for one in read(stored(place, time=EVEN, level=EVEN * 3)).notes if "run on from row" in one]
    assert "data.step" not in note
    assert "data.columns to leave it out" in note
