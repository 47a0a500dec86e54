"""Any table that should pass becomes the same canonical frame, whatever order, zone or gaps it arrives with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid, infer_freq
from tsforge.data.schema import SeriesSchema

FREQS = ("1s", "15m", "1h", "1d", "1w", "1mo", "1q", "1y", "1i", "7i")
ZONES = ("UTC", "America/New_York", "Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe")
SETTINGS = settings(max_examples=40, deadline=None)


@st.composite
def grids(draw: st.DrawFn) -> TimeGrid:
    freq = draw(st.sampled_from(FREQS))
    if freq.endswith("i"):
        return TimeGrid(draw(st.integers(-1000, 1000)), freq)
    origin = draw(st.datetimes(datetime(1950, 1, 1), datetime(2060, 1, 1)))
    return TimeGrid(origin.replace(tzinfo=UTC), freq)


@st.composite
def tables(draw: st.DrawFn) -> tuple[TimeGrid, dict[str, dict[int, list[float | None]]]]:
    """A grid, and for each series the rows it has: grid index -> values of two columns, some of them missing."""
    grid = draw(grids())
    cell = st.one_of(st.none(), st.just(float("nan")), st.floats(-1e9, 1e9), st.just(5.0))
    kind = draw(st.sampled_from(["any", "constant", "one column empty", "one row"]))
    data: dict[str, dict[int, list[float | None]]] = {}
    for name in draw(st.lists(st.text("abcß→ ", min_size=1, max_size=3), min_size=1, max_size=4, unique=True)):
        indices = draw(st.sets(st.integers(0, 40), min_size=1, max_size=1 if kind == "one row" else 15))
        data[name] = {index: [draw(cell), draw(cell)] for index in indices}
        for row in data[name].values():
            if kind == "constant":
                row[:] = [5.0, 5.0]
            elif kind == "one column empty":
                row[1] = None
    return grid, data


def as_table(grid: TimeGrid, data: dict[str, dict[int, list[float | None]]]) -> pl.DataFrame:
    rows = [(name, index, *values) for name, part in data.items() for index, values in part.items()]
    plain = pl.DataFrame(
        rows, schema={"series_id": pl.String, "i": pl.Int64, "y": pl.Float64, "z": pl.Float64}, orient="row"
    )
    return plain.select("series_id", grid.time_at(plain["i"].to_numpy()), "y", "z")


def clean(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


@SETTINGS
@given(tables(), st.randoms(use_true_random=False), st.sampled_from(ZONES))
def test_gaps_order_zones_and_nan_lead_to_one_canonical_frame(made: Any, random: Any, zone: str) -> None:
    grid, data = made
    table = as_table(grid, data)
    order = list(range(table.height))
    random.shuffle(order)
    shuffled = table[order]
    if not grid.is_integer:
        shuffled = shuffled.with_columns(pl.col("time").dt.convert_time_zone(zone))
    schema = SeriesSchema(targets=("y",), past=("z",), freq=grid.freq)
    frame = SeriesFrame(shuffled, schema, require_targets=False)
    result = frame.table
    expected = []
    for name in sorted(data):
        for index in range(min(data[name]), max(data[name]) + 1):
            values = [clean(value) for value in data[name].get(index, [None, None])]
            expected.append((name, grid.time_at(index), *values))
    assert result.rows() == expected
    assert result.columns == ["series_id", "time", "y", "z"]
    assert result["y"].dtype == result["z"].dtype == pl.Float64
    assert frame.grid.index_of(result["time"]).min() == 0
    # validating once more changes nothing, and equal content has an equal fingerprint
    again = SeriesFrame(result, schema, require_targets=False)
    assert again.table.equals(result)
    assert again.fingerprint() == frame.fingerprint() == SeriesFrame(table, schema, require_targets=False).fingerprint()


@SETTINGS
@given(tables())
def test_operations_keep_the_guarantees(made: Any) -> None:
    grid, data = made
    schema = SeriesSchema(targets=("y",), past=("z",), freq=grid.freq)
    frame = SeriesFrame(as_table(grid, data), schema, require_targets=False)
    middle = frame.table["time"][frame.num_rows // 2]
    first = frame.series_ids[0]
    for made_frame in (
        frame.until(middle),
        frame.between(start=middle),
        frame.select_series([first]),
        frame.extend(3),
        frame.until(middle, keep_known=True),
        frame.mask_outside({"y": (0, None)})[0],
    ):
        again = SeriesFrame(made_frame.table, schema, require_targets=False)
        assert again.table.equals(made_frame.table)
        assert again.indptr.tolist() == made_frame.indptr.tolist()
        assert again.offset.tolist() == made_frame.offset.tolist()
    assert frame.until(middle).table["time"].max() <= middle


@SETTINGS
@given(grids(), st.lists(st.integers(-1500, 1500), min_size=1, max_size=50))
def test_time_and_index_are_inverse_and_ordered(grid: TimeGrid, indices: list[int]) -> None:
    ordered = np.unique(indices)
    times = grid.time_at(ordered)
    assert grid.index_of(times).tolist() == ordered.tolist()
    assert times.is_sorted()
    assert times.n_unique() == len(ordered)
    for index, time in zip(ordered[:3].tolist(), times[:3], strict=True):
        assert grid.floor(time) == index
        assert grid.time_at(index) == time
        before = time - 1 if grid.is_integer else time - timedelta(microseconds=1)
        assert grid.floor(before) == index - 1


@SETTINGS
@given(grids(), st.sets(st.integers(0, 300), max_size=8))
def test_the_frequency_of_a_grid_with_few_gaps_is_found(grid: TimeGrid, gaps: set[int]) -> None:
    kept = np.array([index for index in range(300) if index not in gaps])
    times = grid.time_at(kept)
    assert infer_freq(times) == grid.freq


@SETTINGS
@given(
    st.sampled_from(ZONES),
    st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1)),
    st.sampled_from(["15m", "1h", "7h"]),
)
def test_calendar_features_depend_on_the_row_alone(zone: str, origin: datetime, freq: str) -> None:
    grid = TimeGrid(origin.replace(tzinfo=UTC), freq)
    times = grid.time_at(np.arange(50))
    config = CalendarConfig(features=("hour", "weekday"), timezone=zone)
    table = pl.DataFrame({"series_id": "a", "time": times, "y": np.arange(50.0)})
    schema = SeriesSchema(targets=("y",), freq=freq)
    whole = add_calendar(SeriesFrame(table, schema), config).table
    part = add_calendar(SeriesFrame(table[20:], schema), config).table
    assert whole[20:].equals(part)
    radius = whole["calendar.hour.sin"] ** 2 + whole["calendar.hour.cos"] ** 2
    assert ((radius - 1).abs() < 1e-12).all()
