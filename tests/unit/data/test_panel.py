"""The dense panel: rows, absolute positions, fixed order of series, training spans, resident tensors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.core.errors import DataError
from tsforge.data import panel as panel_module
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema

START = datetime(2023, 1, 1, tzinfo=UTC)
SCHEMA = SeriesSchema(targets=("y", "z"), past=("p",), known=("k",), static=("s",), freq="1h")


def frame() -> SeriesFrame:
    """Series a: hours 2..5 (hour 3 missing), series b: hours 0..2 with a known covariate only in the last row."""
    rows = [
        ("a", 2, 1.0, 10.0, 5.0, 0.0), ("a", 4, 3.0, None, 6.0, 1.0), ("a", 5, 4.0, 40.0, None, 0.0),
        ("b", 0, 7.0, 70.0, 8.0, 1.0), ("b", 1, 8.0, 80.0, 9.0, 1.0), ("b", 2, None, None, None, 1.0),
    ]  # fmt: skip
    table = pl.DataFrame(rows, schema=["series_id", "hour", "y", "z", "p", "k"], orient="row")
    table = table.with_columns(time=pl.Series([START + timedelta(hours=hour) for hour in table["hour"]]))
    return SeriesFrame(table, SCHEMA, pl.DataFrame({"series_id": ["a", "b"], "s": [0.1, 0.2]}))


def test_rows_follow_each_other_with_placeholders_where_nothing_was_observed() -> None:
    panel = Panel.from_frame(frame())
    none = float("nan")  # of a covariate, which has no mask; targets have one and hold 0
    wanted = np.array([
        [1, 10, 5, 0], [0, 0, 0, 0], [3, 0, 6, 1], [4, 40, 0, 0], [7, 70, 8, 1], [8, 80, 9, 1], [0, 0, 0, 1],
    ], dtype=float)  # fmt: skip
    wanted[:, 2:][~panel.observed[:, 2:]] = none
    np.testing.assert_array_equal(panel.values, wanted)
    assert np.isnan(panel.values).sum() == 4
    assert panel.observed.sum() == 19
    assert panel.indptr.tolist() == [0, 4, 7]
    assert panel.offset.tolist() == [2, 0]
    assert panel.last_observed().tolist() == [5, 1]
    assert panel.span() == (0, 6)
    assert panel.num_targets == 2


def test_a_grid_of_a_fitted_model_gives_absolute_positions() -> None:
    panel = Panel.from_frame(frame(), TimeGrid(START - timedelta(days=1), "1h"))
    assert panel.offset.tolist() == [26, 24]
    with pytest.raises(DataError, match="freq '1h', the grid '1d'"):
        Panel.from_frame(frame(), TimeGrid(START, "1d"))
    with pytest.raises(DataError, match="lie off the grid"):
        Panel.from_frame(frame(), TimeGrid(START + timedelta(minutes=7), "1h"))


def test_series_keep_the_index_they_had_in_training() -> None:
    plain, panel = Panel.from_frame(frame()), Panel.from_frame(frame(), series_ids=("c", "b", "a"))
    assert panel.lengths.tolist() == [0, 3, 4]
    assert panel.offset.tolist() == [0, 0, 2]
    np.testing.assert_array_equal(panel.values, np.concatenate([plain.values[4:], plain.values[:4]]))
    np.testing.assert_array_equal(panel.observed, np.concatenate([plain.observed[4:], plain.observed[:4]]))
    assert panel.static is not None
    assert panel.static.tolist() == [[0.0], [0.2], [0.1]]
    assert panel.last_observed().tolist() == [-1, 1, 5]
    with pytest.raises(DataError, match=r"1 of 2 series are unknown to the model \(b"):
        Panel.from_frame(frame(), series_ids=("a",))


@pytest.mark.parametrize(("start", "stop"), [(None, 100), (0, 4), (1, 3), (3, 6), (None, 1)])
def test_training_series_hold_the_rows_of_the_span(start: int | None, stop: int) -> None:
    panel = Panel.from_frame(frame())
    data = panel.training_series(start, stop)
    rows: list[int] = []
    indptr, offsets = [0], []
    for series in range(2):
        inside = [
            row
            for row in range(panel.indptr[series], panel.indptr[series + 1])
            if (start is None or panel.offset[series] + row - panel.indptr[series] >= start)
            and panel.offset[series] + row - panel.indptr[series] < stop
        ]
        rows += inside
        indptr.append(len(rows))
        offsets.append(int(panel.offset[series] + inside[0] - panel.indptr[series]) if inside else None)
    assert data.values.dtype == torch.float64
    np.testing.assert_array_equal(data.values, panel.values[rows, :2])
    np.testing.assert_array_equal(data.mask, panel.observed[rows, :2])
    assert data.past is not None
    assert data.known is not None
    np.testing.assert_array_equal(data.past, panel.values[rows, 2:3])
    np.testing.assert_array_equal(data.known, panel.values[rows, 3:])
    assert data.indptr.tolist() == indptr
    for given, expected in zip(data.offset.tolist(), offsets, strict=True):
        assert expected is None or given == expected


def test_training_series_do_not_share_memory_with_the_panel() -> None:
    panel = Panel.from_frame(frame())
    data = panel.training_series(None, 100)
    data.values[:] = -1
    assert (panel.values[:, : panel.num_targets] >= 0).all()


def test_an_empty_span_is_refused() -> None:
    with pytest.raises(DataError, match="no series has rows between absolute rows 90 and 99"):
        Panel.from_frame(frame()).training_series(90, 99)


def test_float64_values_lose_nothing() -> None:
    exact = 16_777_217.123456789  # float32 would hold 16777217
    table = pl.DataFrame({"ds": [0, 1], "y": [exact, 1.0]})
    data = Panel.from_frame(SeriesFrame.from_wide(table, time="ds")).training_series(None, 2)
    assert data.values[0, 0].item() == exact


def test_values_beyond_float32_are_refused_with_their_place() -> None:
    table = pl.DataFrame({"ds": [START, START + timedelta(hours=1)], "y": [1.0, -1.18e42]})
    panel = Panel.from_frame(SeriesFrame.from_wide(table, time="ds", series_id="well"))
    with pytest.raises(
        DataError, match=r"column\(s\) y hold values beyond 3.4e\+38 .*-1.18e\+42 in 'well' at 2023-01-01 01"
    ):
        panel.resident()
    assert panel.resident(dtype=torch.float64).target[1, 0].item() == -1.18e42


@pytest.mark.parametrize(("level", "fine"), [(0.0, True), (1e6, True), (3e7, False), (1e12, False)])
def test_changes_that_float32_cannot_hold_are_refused(level: float, fine: bool) -> None:
    rng = np.random.default_rng(0)
    times = pl.datetime_range(START, START + timedelta(hours=199), "1h", eager=True)
    meter = level + rng.poisson(3, size=200).cumsum()  # changes by 3 a row
    rounded = 7e9 * (1.0 + 1e-15 * rng.normal(size=200))  # a constant that was computed
    table = pl.DataFrame({"ds": times, "y": rng.normal(size=200), "meter": meter, "constant": rounded})
    panel = Panel.from_frame(SeriesFrame.from_wide(table, time="ds"))
    assert panel.resident(dtype=torch.float64).target[-1, 1].item() == meter[-1]
    if fine:
        assert panel.resident().target[-1, 1].item() == pytest.approx(meter[-1], abs=0.5)
        return
    expected = r"column\(s\) meter lie so far from 0 that float32 numbers, .* of them in 'series', at values up to"
    with pytest.raises(DataError, match=expected):
        panel.resident()


ROUNDS = np.arange(200)


@pytest.mark.parametrize(
    "column",
    [
        1.8e18 + 40.0 * ROUNDS,  # an id: neighbours are equal, or one float64 number of 256 apart
        1e15 + 0.5 * ROUNDS,
        2.0**60 + 1000.0 * ROUNDS,
        1e13 + 0.01 * ROUNDS,
        np.where(ROUNDS == 100, np.nan, 1e15 + 0.5 * ROUNDS),  # in two stretches
        np.where(ROUNDS == 0, 0.0, 1e15 + 0.5 * ROUNDS),  # a meter that began at 0
    ],
)
def test_counters_so_far_from_0_that_even_float64_hardly_tells_them_apart_are_refused(column: np.ndarray) -> None:
    times = pl.datetime_range(START, START + timedelta(hours=199), "1h", eager=True)
    table = pl.DataFrame({"ds": times, "y": np.sin(ROUNDS), "meter": column}).fill_nan(None)
    panel = Panel.from_frame(SeriesFrame.from_wide(table, time="ds"))
    with pytest.raises(DataError, match=r"column\(s\) meter lie so far from 0 that float32 numbers"):
        panel.resident()
    assert panel.resident(dtype=torch.float64).target.shape == (200, 2)


@pytest.mark.parametrize(
    "column",
    [
        np.full(200, 1.8e18),
        1.8e18 + 256.0 * (ROUNDS % 2),  # one float64 number to and fro
        np.where(ROUNDS % 3 == 0, 0.1 + 0.2, 0.3),
        np.array([np.full(length + 1, 0.1).sum() / (length + 1) for length in ROUNDS]),
        1000.0 + np.cumsum(np.where(ROUNDS % 2, -1e-10, 1e-10)),  # real, but nothing that a sum could not leave behind
        np.where(ROUNDS < 100, 0.3, 0.7) + 6e-17 * (ROUNDS % 2),  # two levels
        np.cumsum(np.full(200, 33333.3)) / (ROUNDS + 1),  # a constant that sums carry away
        20.0 + 80.0 * np.exp(-ROUNDS / 2.0),  # its end is lost, and no loss
        3e8 * (1.0 + np.exp(-ROUNDS / 2.0)),
        np.tile(1e9 * (1.0 + np.exp(-np.arange(100) / 2.0)), 2),
        np.where(ROUNDS % 50 == 0, np.nan, 5.0),
    ],
)
def test_constants_up_to_rounding_stay(column: np.ndarray) -> None:
    times = pl.datetime_range(START, START + timedelta(hours=199), "1h", eager=True)
    table = pl.DataFrame({"ds": times, "y": np.sin(ROUNDS), "steady": column}).fill_nan(None)
    panel = Panel.from_frame(SeriesFrame.from_wide(table, time="ds"))
    assert panel.resident().target.shape == (200, 2)


def test_one_series_far_from_0_among_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_module, "_BLOCK", 7)  # several blocks

    def panel(level: float) -> Panel:
        rows = [
            {"series_id": name, "ds": START + timedelta(hours=hour), "y": base + float(hour % 5)}
            for name, base in (("a", 0.0), ("b", level), ("c", 1e3))
            for hour in range(40)
        ]
        frame = SeriesFrame.from_long(pl.DataFrame(rows), time="ds", series_id="series_id", targets=["y"])
        return Panel.from_frame(frame)

    assert panel(4e4).resident().target.shape == (120, 1)
    with pytest.raises(DataError, match=r"column\(s\) y lie so far .* of them in 'b', at values up to 4e\+09"):
        panel(4e9).resident()


def test_tensors_are_made_once_and_shared() -> None:
    panel = Panel.from_frame(frame())
    assert panel.resident("cpu") is panel.resident(torch.device("cpu"))
    rows = panel.resident()
    assert rows.target.dtype == torch.float32
    assert rows.mask.dtype == torch.bool
    assert rows.target.is_contiguous()
    assert rows.static is not None
    assert rows.static.tolist() == pytest.approx(np.array([[0.1], [0.2]]))


def test_the_last_observed_row_of_a_series_is_its_own() -> None:
    table = pl.DataFrame(
        {"series_id": list("aabbcc"), "time": [0, 1, 5, 6, 2, 3], "y": [1.0, None, None, None, 3.0, 4.0]}
    )
    panel = Panel.from_frame(SeriesFrame(table, SeriesSchema(targets=("y",), freq="1i")))
    assert panel.last_observed().tolist() == [0, 4, 3]  # b has none: the row before its first
    assert panel.span() == (0, 4)


def test_a_panel_without_observed_targets_has_no_span() -> None:
    table = pl.DataFrame({"series_id": ["a", "a"], "time": [0, 1], "y": [None, None]})
    empty = SeriesFrame(table, SeriesSchema(targets=("y",), freq="1i"), require_targets=False)
    with pytest.raises(DataError, match="no target is observed"):
        Panel.from_frame(empty).span()
