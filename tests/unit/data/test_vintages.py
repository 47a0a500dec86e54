"""Vintages: what was known at a moment, in frames and in windows, against loops that look at every publication."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.core.errors import DataError
from tsforge.data.calendar import CalendarConfig
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.vintage_panel import attach
from tsforge.data.vintages import Delays, VintageFrame
from tsforge.data.windows import WindowDataset, WindowSpec, last_windows
from tsforge.testing.vintages import START, revised_table

SCHEMA = SeriesSchema(targets=("load",), past=("flow",), known=("wind",), freq="1h")
HOUR = timedelta(hours=1)


def at(hour: float) -> datetime:
    return START + hour * HOUR


def published(rows: list[tuple[Any, ...]], schema: SeriesSchema = SCHEMA, **options: Any) -> VintageFrame:
    """Build a frame of series "a" from rows (hour, hour of publication, value of each column)."""
    table = pl.DataFrame(
        [("a", at(row[0]), at(row[1]), *row[2:]) for row in rows],
        schema={"series_id": pl.String, "time": pl.Datetime("us", "UTC"), "published": pl.Datetime("us", "UTC")}
        | dict.fromkeys(schema.columns, pl.Float64),
        orient="row",
    )
    return VintageFrame(table, schema, **options)


def slow_value(rows: list[dict[str, Any]], series: str, time: datetime, name: str, moment: datetime) -> float | None:
    """Look at every publication of a cell and return the last one by ``moment``."""
    best, value = None, None
    for row in rows:
        if row["series_id"] != series or row["time"] != time or row[name] is None or row["published"] > moment:
            continue
        if best is None or row["published"] > best:
            best, value = row["published"], row[name]
    return value


def by_cell(table: pl.DataFrame) -> dict[tuple[str, datetime], list[dict[str, Any]]]:
    cells: dict[tuple[str, datetime], list[dict[str, Any]]] = {}
    for row in table.iter_rows(named=True):
        cells.setdefault((row["series_id"], row["time"]), []).append(row)
    return cells


def test_as_of_is_the_last_value_published_by_then() -> None:
    table = revised_table(60)
    frame, cells = VintageFrame(table.sample(fraction=1, shuffle=True, seed=1), SCHEMA), by_cell(table)
    for hour in (0, 7, 30.5, 59, 200):
        shown = frame.as_of(at(hour)).table
        assert {*shown["series_id"]} == {"s0", "s1"}
        for row in shown.iter_rows(named=True):
            cell = cells[row["series_id"], row["time"]]
            for name in SCHEMA.columns:
                assert row[name] == slow_value(cell, row["series_id"], row["time"], name, at(hour))
        # nothing that was out is left out
        keys = set(zip(shown["series_id"], shown["time"], strict=True))
        out = {(r["series_id"], r["time"]) for r in table.iter_rows(named=True) if r["published"] <= at(hour)}
        assert out <= keys


def test_latest_and_first_are_the_ends_of_every_cell() -> None:
    frame = published([(0, 0, 1.0, None, 5.0), (0, 9, 2.0, None, None), (1, 1, 3.0, 7.0, 6.0), (1, 3, None, 8.0, None)])
    assert frame.latest().table["load"].to_list() == [2.0, 3.0]
    assert frame.first().table["load"].to_list() == [1.0, 3.0]
    assert frame.latest().table["flow"].to_list() == [None, 8.0]
    assert frame.first().table["flow"].to_list() == [None, 7.0]
    assert frame.latest().table["wind"].to_list() == [5.0, 6.0]  # a publication that says nothing changes nothing


def test_until_knows_nothing_later() -> None:
    table = revised_table(60)
    frame = VintageFrame(table, SCHEMA).until(at(30))
    early = VintageFrame(table.filter(pl.col("published") <= at(30)), SCHEMA)
    assert frame.latest().fingerprint() == early.latest().fingerprint()
    assert frame.as_of(at(50)).fingerprint() == early.as_of(at(50)).fingerprint()
    assert frame.table.equals(early.table)
    assert frame.table["published"].max() == at(30)
    assert frame.latest().fingerprint() == VintageFrame(table, SCHEMA).as_of(at(30)).fingerprint()


def test_until_has_no_series_that_only_lies_ahead() -> None:
    late = revised_table(60).filter((pl.col("series_id") == "s0") | (pl.col("time") >= at(32)))
    frame = VintageFrame(late, SCHEMA).until(at(30))
    assert {*frame.table["series_id"]} == {"s0", "s1"}  # forecasts of wind of s1 are out
    assert frame.latest().series_ids == ("s0",)


def test_frozen_rows_keep_what_was_known_and_later_ones_are_complete() -> None:
    vintages = VintageFrame(revised_table(60), SCHEMA)
    shown, then, now = vintages.frozen(at(30)).latest().table, vintages.as_of(at(30)).table, vintages.latest().table
    assert shown.filter(pl.col("time") <= at(30)).equals(then.filter(pl.col("time") <= at(30)))
    assert shown.filter(pl.col("time") > at(30)).equals(now.filter(pl.col("time") > at(30)))


def test_known_values_of_the_future_are_there_when_published_and_series_wait_for_their_first_row() -> None:
    frame = published([(0, 0, 1.0, None, 4.0), (1, 0, None, None, 5.0), (2, 1, None, None, 6.0)])
    shown = frame.as_of(at(0)).table
    assert shown["wind"].to_list() == [4.0, 5.0]
    assert shown["load"].to_list() == [1.0, None]
    later = published([(0, -3, None, None, 4.0), (0, 0, 1.0, None, None)])
    with pytest.raises(DataError, match="nothing was published by"):
        later.as_of(at(-1))


def test_a_value_out_of_range_hides_its_cell_until_it_is_corrected() -> None:
    frame, counts = published([(0, 0, 1.0, 0.0, 3.0), (1, 1, 999.0, 0.0, 3.0), (1, 5, 2.0, None, None)]).mask_outside(
        {"load": (0, 100)}
    )
    assert counts == {"load": 1}
    assert frame.as_of(at(2)).table["load"].to_list() == [1.0, None]
    assert frame.as_of(at(5)).table["load"].to_list() == [1.0, 2.0]


def test_calendar_and_extra_rows_come_with_every_moment() -> None:
    frame = VintageFrame(revised_table(40, lead=2), SCHEMA).with_calendar(CalendarConfig(features=("hour",)), extend=9)
    shown = frame.as_of(at(20))
    assert shown.table["time"].max() == at(29)
    assert shown.table["calendar.hour.sin"].null_count() == 0
    assert shown.schema.known[0] == "wind"


@pytest.mark.parametrize("delay", [None, "3h"])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_see_what_a_frame_as_of_their_moment_holds(delay: str | None, padded: bool) -> None:
    """Two ways that share no code: the lookup in the gather, and a frame of the moment cut by hand."""
    vintages = VintageFrame(revised_table(60), SCHEMA, delays=Delays(delay))
    panel = attach(vintages, Panel.from_frame(vintages.latest()))
    spec = WindowSpec(context_length=30, horizon=5)
    windows = WindowDataset(panel, spec, pad_context=padded, dtype=torch.float64)
    batch = windows.__getitems__(range(len(windows)))
    assert batch.past is not None
    assert batch.known is not None
    assert batch.target is not None
    checked = 0
    for place in range(0, len(windows), 3):
        series, cutoff = int(batch.series_index[place]), int(batch.cutoff_index[place])  # type: ignore[index]
        time = panel.grid.time_at(cutoff - 1)
        shown = vintages.as_of(vintages.moment(time)).select_series([panel.series_ids[series]]).table
        wanted = pl.DataFrame({"time": panel.grid.time_at(np.arange(cutoff - 30, cutoff + 5))})
        rows = wanted.join(shown, on="time", how="left", maintain_order="left")
        load = rows["load"].to_numpy()[:30]
        np.testing.assert_array_equal(batch.context_mask[place, :, 0].numpy(), ~np.isnan(load))
        np.testing.assert_array_equal(batch.context[place, :, 0].numpy(), np.nan_to_num(load))
        np.testing.assert_array_equal(batch.past[place, :, 0].numpy(), rows["flow"].to_numpy()[:30])
        np.testing.assert_array_equal(batch.known[place, :, 0].numpy(), rows["wind"].to_numpy())
        truth = vintages.latest().select_series([panel.series_ids[series]]).table
        target = wanted.join(truth, on="time", how="left", maintain_order="left")["load"].to_numpy()[30:]
        np.testing.assert_array_equal(batch.target[place, :, 0].numpy(), np.nan_to_num(target))
        checked += 1
    assert checked > 15


def test_windows_of_coupled_models_too() -> None:
    table = revised_table(50).filter((pl.col("series_id") == "s0") | (pl.col("time") >= at(20)))
    vintages = VintageFrame(table, SCHEMA)
    panel = attach(vintages, Panel.from_frame(vintages.latest()))
    spec = WindowSpec(context_length=8, horizon=5)
    together = WindowDataset(panel, spec, aligned=True)
    alone = WindowDataset(panel, spec)
    want = {(int(s), int(c)): n for n, (s, c) in enumerate(zip(alone.series_index, alone.cutoff_index, strict=True))}
    batch, single = together.__getitems__(range(len(together))), alone.__getitems__(range(len(alone)))
    compared = 0
    for place, key in enumerate(zip(together.series_index.tolist(), together.cutoff_index.tolist(), strict=True)):
        if key in want:
            for name in ("context", "context_mask", "past", "known"):
                mine, other = getattr(batch, name)[place], getattr(single, name)[want[key]]
                np.testing.assert_array_equal(mine.numpy(), other.numpy())
            compared += 1
    assert compared == len(alone)


def test_last_windows_read_the_frame_of_their_moment() -> None:
    vintages = VintageFrame(revised_table(60), SCHEMA)
    spec = WindowSpec(context_length=8, horizon=5)
    moment = at(40)
    plain = last_windows(Panel.from_frame(vintages.as_of(moment)), spec, moment)
    seen = last_windows(attach(vintages, Panel.from_frame(vintages.latest())), spec, moment)
    ours, theirs = plain.__getitems__([0, 1]), seen.__getitems__([0, 1])
    for name in ("context", "context_mask", "past", "known"):
        np.testing.assert_array_equal(getattr(ours, name).numpy(), getattr(theirs, name).numpy())


def test_a_late_covariate_holds_the_newest_value_known_at_each_row() -> None:
    hours = np.arange(40)
    table = pl.DataFrame({"time": [at(int(h)) for h in hours], "load": hours * 1.0, "flow": hours * 10.0})
    frame = SeriesFrame.from_long(table, time="time", targets=["load"], past=["flow"], freq="1h")
    delays = Delays.of({"flow": "150m"}, frame.schema, frame.grid)
    assert delays == Delays(None, {"flow": 3})
    moved = delays.shift(frame).table
    for hour, value in zip(hours, moved["flow"], strict=True):
        out = [h for h in hours if at(int(h)) + timedelta(minutes=150) <= at(int(hour))]
        assert value == (out[-1] * 10.0 if out else None)
    assert moved["load"].equals(frame.table["load"])


def test_the_delay_of_targets_is_when_forecasts_are_made() -> None:
    grid = SeriesFrame.from_long(
        pl.DataFrame({"time": [at(0), at(1)], "y": [1.0, 2.0], "x": [1.0, 2.0]}),
        time="time",
        targets=["y"],
        past=["x"],
    )
    assert Delays.of("2h", grid.schema, grid.grid) == Delays("2h", {})
    assert Delays.of({"y": "2h", "x": "5h"}, grid.schema, grid.grid) == Delays("2h", {"x": 3})
    assert Delays.of({"y": "5h", "x": "2h"}, grid.schema, grid.grid) == Delays("5h", {})
    frame = published([(0, 3, 1.0, None, None), (1, 4, 2.0, None, None)], delays=Delays("3h"))
    assert frame.moment(at(1)) == at(4)
    assert frame.as_of(frame.moment(at(1))).table["load"].to_list() == [1.0, 2.0]


def test_months_are_late_by_whole_rows() -> None:
    months = [datetime(2020 + k // 12, k % 12 + 1, 1, tzinfo=UTC) for k in range(60)]
    frame = SeriesFrame.from_long(
        pl.DataFrame({"time": months, "y": np.arange(60.0), "x": np.arange(60.0)}),
        time="time",
        targets=["y"],
        past=["x"],
        freq="1mo",
    )
    for delay, rows in (("1mo", 1), ("45d", 2), ("30d", 2), ("2mo", 2), ("28d", 1)):
        assert Delays.of({"x": delay}, frame.schema, frame.grid).past == {"x": rows}
    # February of a common year is the reason why 30 days are two rows: a value of 1 February is not out on 1 March


def test_integer_time() -> None:
    schema = SeriesSchema(targets=("y",), past=("x",), freq="1i")
    table = pl.DataFrame({"series_id": "a", "time": [0, 1, 1], "published": [0, 1, 3], "y": [1.0, 2.0, 9.0], "x": 0.0})
    frame = VintageFrame(table, schema)
    assert frame.as_of(2).table["y"].to_list() == [1.0, 2.0]
    assert frame.as_of(3).table["y"].to_list() == [1.0, 9.0]
    assert Delays.of({"x": "2i"}, schema, frame.grid).past == {"x": 2}
    with pytest.raises(DataError, match="give rows such as 2i"):
        Delays.of({"x": "2h"}, schema, frame.grid)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"wind": "2h"}, "wind is known ahead by its role"),
        ({"winds": "2h"}, "no target or past covariate winds"),
        ({"flow": "2i"}, "give a span such as 2h"),
    ],
)
def test_delays_that_make_no_sense(setting: dict[str, str], message: str) -> None:
    frame = published([(0, 0, 1.0, 1.0, 1.0)])
    with pytest.raises(DataError, match=message):
        Delays.of(setting, SCHEMA, frame.grid)


def test_targets_of_several_delays() -> None:
    schema = SeriesSchema(targets=("y", "z"), freq="1h")
    frame = published([(0, 0, 1.0, 2.0)], schema)
    with pytest.raises(DataError, match=r"all need one delay \(y: 2h, z: none\)"):
        Delays.of({"y": "2h"}, schema, frame.grid)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 1.0, 1.0, 1.0), (0, 0, 2.0, 1.0, 1.0)], r"2 of 2 rows share series, time and publication time .*'a'"),
        ([(0, 0, 1.0, 1.0, 1.0), (2, 1, 2.0, None, 1.0)], "1 of 2 rows hold targets .* published before their time"),
        (
            [(0, 0, float("inf"), 1.0, 1.0), (0, 1, float("inf"), 1.0, 1.0)],
            "infinite value.s. .* replace them by missing",
        ),
        ([(0, 0, None, 1.0, 1.0)], "load hold no value in any of 1 rows"),
    ],
)
def test_publications_that_cannot_be(rows: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        published(rows)


def test_publication_times_that_are_missing_or_of_another_kind() -> None:
    table = pl.DataFrame({"series_id": ["a", "a"], "time": [date(2024, 1, 1), date(2024, 1, 2)], "y": [1.0, 2.0]})
    schema = SeriesSchema(targets=("y",), freq="1d")
    with pytest.raises(DataError, match="lacks the column published"):
        VintageFrame(table, schema)
    with pytest.raises(DataError, match="1 of 2 rows have no publication time"):
        VintageFrame(table.with_columns(published=pl.Series([date(2024, 1, 1), None])), schema)
    with pytest.raises(DataError, match="publication times are integers"):
        VintageFrame(table.with_columns(published=1), schema)


def test_fingerprint_follows_every_publication() -> None:
    rows = [(0, 0, 1.0, 1.0, 1.0), (0, 2, 2.0, None, None), (1, 1, 3.0, 1.0, 1.0)]
    base = published(rows).fingerprint()
    assert published(rows[::-1]).fingerprint() == base
    assert published([rows[0], (0, 3, 2.0, None, None), rows[2]]).fingerprint() != base
    assert published([(0, 0, 1.5, 1.0, 1.0), *rows[1:]]).fingerprint() != base


def test_a_hundred_moments_of_a_million_publications_take_seconds() -> None:
    import time

    rows, versions = 50_000, 20
    hours = np.repeat(np.arange(rows), versions)
    out = hours + np.tile(np.arange(versions), rows)
    start = pl.lit(START).cast(pl.Datetime("us", "UTC"))
    table = pl.DataFrame({"hour": hours, "out": out, "y": np.random.default_rng(0).normal(size=rows * versions)})
    table = table.select(
        pl.lit("a").alias("series_id"),
        (start + pl.duration(hours=pl.col("hour"))).alias("time"),
        (start + pl.duration(hours=pl.col("out"))).alias("published"),
        "y",
    )
    frame = VintageFrame(table, SeriesSchema(targets=("y",), freq="1h"))
    began = time.perf_counter()
    for hour in np.linspace(100, rows, 100):
        frame.as_of(at(int(hour)))
    assert time.perf_counter() - began < 20  # 1.5 s where nothing else runs
