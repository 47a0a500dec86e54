"""What a SeriesFrame guarantees, what it refuses and in which words, and its operations."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema

START = datetime(2023, 1, 1)


def hours(*numbers: int) -> list[datetime]:
    return [START + timedelta(hours=number) for number in numbers]


def table(**columns: Any) -> pl.DataFrame:
    return pl.DataFrame(
        {"series_id": ["b", "b", "b", "a", "a"], "time": hours(0, 1, 2, 1, 3), "y": [1.0, 2, 3, 4, 5], **columns}
    )


def schema(**roles: Any) -> SeriesSchema:
    return SeriesSchema(**{"targets": ("y",), "freq": "1h", **roles})


def test_rows_are_sorted_and_gaps_become_null_rows() -> None:
    frame = SeriesFrame(table(extra=["x"] * 5), schema())
    expected = pl.DataFrame(
        {"series_id": list("aaabbb"), "time": hours(1, 2, 3, 0, 1, 2), "y": [4.0, None, 5, 1, 2, 3]},
        schema_overrides={"time": pl.Datetime("us")},
    ).with_columns(pl.col("time").dt.replace_time_zone("UTC"))
    assert_frame_equal(frame.table, expected)
    assert frame.series_ids == ("a", "b")
    assert frame.indptr.tolist() == [0, 3, 6]
    assert frame.offset.tolist() == [1, 0]
    assert frame.num_rows == 6


def test_values_become_float64_and_nan_becomes_null() -> None:
    frame = SeriesFrame(
        table(i=[1, 2, 3, 4, 5], f=[float("nan"), 1, 2, 3, 4], flag=[True] * 5),
        schema(past=("i",), known=("f", "flag")),
    )
    assert set(frame.table.select(frame.schema.columns).dtypes) == {pl.Float64}
    assert frame.table.filter(series_id="b")["f"].to_list() == [None, 1, 2]


def test_constant_targets_and_one_row_are_allowed() -> None:
    assert SeriesFrame(table().with_columns(y=1.0), schema()).num_rows == 6
    assert SeriesFrame(table().head(1), schema()).num_rows == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("y").rename({"time": "Time"}), r"lacks column\(s\) time, y; did you mean 'Time'\?"),
        (lambda t: t.clear(), "no rows"),
        (lambda t: t.with_columns(y=pl.lit("1,5")), "column 'y' is not numeric .*first value '1,5'"),
        (lambda t: t.with_columns(y=pl.Series([1.0, 2, np.inf, -np.inf, 5])),
         r"2 infinite value.*y: 2; first: 'b' at 2023-01-01 02:00"),
        (lambda t: t.with_columns(y=pl.lit(None, pl.Float64)), r"target column\(s\) y hold no value in any of 5 rows"),
        (lambda t: t.with_columns(y=pl.lit(float("nan"))), "hold no value"),
        (lambda t: pl.concat([t, t[3:]]),
         r"1 of 2 series have duplicate times \(2 extra rows; first: 'a' at 2023-01-01 01:00"),
        (lambda t: t.with_columns(time=pl.Series([*hours(0, 1, 2, 1), START + timedelta(minutes=150)])),
         r"1 of 5 times in 1 series lie off the 1h grid .*'a' at 2023-01-01 02:30.*steps: 1h \(2 times\)"),
        (lambda t: t.with_columns(time=pl.lit("2023-01-01")), "has type String"),
        (lambda t: t.with_columns(time=pl.Series(range(5))), "time holds integers, but freq is '1h'"),
        (lambda t: t.with_columns(time=pl.Series([None, *hours(1, 2, 1, 3)])), "1 of 5 rows have no time"),
        (lambda t: t.with_columns(series_id=pl.Series([None, "b", "b", "a", "a"])), "1 of 5 rows have no series_id"),
        (lambda t: t.with_columns(series_id=pl.lit(1.5)), "series_id has type Float64"),
    ],
)  # fmt: skip
def test_violations_are_named(change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SeriesFrame(change(table()), schema())


def test_a_stray_time_does_not_fill_the_memory() -> None:
    stray = pl.DataFrame({"series_id": ["a"] * 3, "time": [datetime(1970, 1, 1), *hours(0, 1)], "y": [1.0, 2, 3]})
    with pytest.raises(DataError, match=r"widest gap has \d+ steps of 1s after 'a' at 1970-01-01 00:00"):
        SeriesFrame(stray, schema(freq="1s"))


def test_targets_may_be_empty_on_request() -> None:
    empty = table().with_columns(y=pl.lit(None, pl.Float64))
    frame = SeriesFrame(empty, schema(), require_targets=False)
    assert frame.last_observed()["time"].to_list() == [None, None]


def test_local_times_become_utc_over_the_change_of_clocks() -> None:
    instants = pl.datetime_range(datetime(2023, 3, 25), datetime(2023, 3, 27), "1h", time_zone="UTC", eager=True)
    local = instants.dt.convert_time_zone("Europe/Berlin")
    frame = SeriesFrame.from_wide(pl.DataFrame({"ds": local, "y": np.arange(49.0)}), time="ds")
    assert frame.table["time"].to_list() == instants.to_list()
    assert frame.schema.freq == "1h"


def test_a_frame_cannot_be_changed_from_outside() -> None:
    frame = SeriesFrame(table(), schema())
    before = frame.fingerprint()
    outside = frame.table
    outside[0, "y"] = 99.0
    frame.indptr[0] = 7
    assert frame.fingerprint() == before


def test_a_fingerprint_sees_values_nulls_keys_and_roles_but_not_row_order() -> None:
    base = SeriesFrame(table(k=[1.0] * 5), schema(known=("k",)))
    assert (
        SeriesFrame(table(k=[1.0] * 5).sample(fraction=1, shuffle=True, seed=1), base.schema).fingerprint()
        == base.fingerprint()
    )
    others = [
        SeriesFrame(table(k=[1.0] * 5), schema(past=("k",))),
        SeriesFrame(table(k=[1.0] * 4 + [2.0]), base.schema),
        SeriesFrame(table(k=[1.0] * 4 + [None]), base.schema),
        SeriesFrame(table(k=[1.0] * 5).with_columns(pl.col("time").dt.offset_by("1h")), base.schema),
        SeriesFrame(table(k=[1.0] * 5).with_columns(pl.col("series_id") + "x"), base.schema),
    ]
    zero_for_null = table(k=[1.0] * 4 + [0.0])
    null = SeriesFrame(table(k=[1.0] * 4 + [None]), base.schema)
    prints = [frame.fingerprint() for frame in [base, *others]]
    assert len(set(prints)) == len(prints)
    assert SeriesFrame(zero_for_null, base.schema).fingerprint() != null.fingerprint()


def test_long_tables_bring_roles_frequency_and_constants() -> None:
    long = pl.DataFrame(
        {
            "site": [2, 2, 1, 1],
            "t": [0, 5, 0, 5],
            "load": [1.0, 2, 3, 4],
            "plan": [0, 1, 0, 1],
            "area": [10.0, None, 20, 20],
        }
    )
    frame = SeriesFrame.from_long(
        long.lazy(), series_id="site", time="t", targets=["load"], known=["plan"], static=["area"]
    )
    assert frame.schema == SeriesSchema(targets=("load",), known=("plan",), static=("area",), freq="5i")
    assert frame.static is not None
    assert frame.static.rows() == [("1", 20.0), ("2", 10.0)]
    with pytest.raises(DataError, match="static column 'plan' changes within 2 of 2 series"):
        SeriesFrame.from_long(long, series_id="site", time="t", targets=["load"], static=["plan"])
    with pytest.raises(DataError, match="lacks column.* lod; did you mean 'load'"):
        SeriesFrame.from_long(long, series_id="site", time="t", targets=["lod"])


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (None, "no static table"),
        ({"series_id": ["a", "b"]}, "lacks column"),
        ({"series_id": ["a"], "s": [1.0]}, r"1 of 2 series are not in the static table \(b\)"),
        ({"series_id": ["a", "b", "b"], "s": [1.0, 2, 3]}, "occur more than once"),
        ({"series_id": ["a", "b"], "s": [1.0, None]}, r"missing or not finite for 1 series \(b\)"),
        ({"series_id": ["a", "b"], "s": ["x", "y"]}, "not numeric"),
    ],
)
def test_static_tables_are_checked(static: dict[str, Any] | None, message: str) -> None:
    given = None if static is None else pl.DataFrame(static)
    with pytest.raises(DataError, match=message):
        SeriesFrame(table(), schema(static=("s",)), given)


def test_one_row_without_a_frequency_is_refused_and_with_one_accepted() -> None:
    one = pl.DataFrame({"ds": hours(0), "y": [1.0]})
    with pytest.raises(DataError, match="give freq"):
        SeriesFrame.from_wide(one, time="ds")
    assert SeriesFrame.from_wide(one, time="ds", freq="1h").num_rows == 1


def test_wide_tables_without_separator_are_one_series() -> None:
    wide = pl.DataFrame({"ds": hours(0, 1), "a": [1, 2], "b": [3, 4], "k": [5, 6]})
    frame = SeriesFrame.from_wide(wide, time="ds", known=["k"], series_id="plant")
    assert frame.series_ids == ("plant",)
    assert frame.schema.targets == ("a", "b")


def test_wide_panels_split_at_the_first_separator_and_share_plain_columns() -> None:
    wide = pl.DataFrame(
        {
            "ds": hours(0, 1, 2),
            "N.PM2.5": [1.0, 2, 3],
            "S.PM2.5": [None, 5.0, None],
            "S.O3": [7.0, 8, 9],
            "holiday": [0, 0, 1],
        }
    )
    frame = SeriesFrame.from_wide(wide, time="ds", separator=".", known=["holiday"])
    assert frame.schema.targets == ("PM2.5", "O3")
    assert frame.table.drop("time").rows() == [
        ("N", 1.0, None, 0.0), ("N", 2.0, None, 0.0), ("N", 3.0, None, 1.0),
        ("S", None, 7.0, 0.0), ("S", 5.0, 8.0, 0.0), ("S", None, 9.0, 1.0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no column name contains the separator"):
        SeriesFrame.from_wide(wide, time="ds", separator="/")


def test_wide_panels_cut_the_empty_ends_of_each_series() -> None:
    wide = pl.DataFrame({"ds": hours(0, 1, 2, 3), "a.y": [1.0, 2, None, None], "b.y": [None, 5.0, None, 6.0]})
    frame = SeriesFrame.from_wide(wide, time="ds", separator=".")
    assert frame.table["y"].to_list() == [1, 2, 5, None, 6]


def test_selecting_series_keeps_their_constants() -> None:
    frame = SeriesFrame(table(), schema(static=("s",)), pl.DataFrame({"series_id": ["b", "a"], "s": [2.0, 1.0]}))
    part = frame.select_series(["b"])
    assert part.series_ids == ("b",)
    assert part.static is not None
    assert part.static.rows() == [("b", 2.0)]
    with pytest.raises(DataError, match="unknown series aa; did you mean 'a'"):
        frame.select_series(["b", "aa"])


def test_between_includes_both_ends() -> None:
    frame = SeriesFrame(table(), schema())
    part = frame.between("2023-01-01T01:00", START + timedelta(hours=2))
    assert part.table["y"].to_list() == [4.0, None, 2, 3]
    assert part.offset.tolist() == [0, 0]
    with pytest.raises(DataError, match="no rows between 2024-01-01 and None; the data runs from 2023-01-01 00:00"):
        frame.between("2024-01-01")


def test_an_empty_span_is_told_the_end_of_the_observations() -> None:
    """Not that of a horizon added for a forecast."""
    frame = SeriesFrame(table(), schema())
    for longer in (frame, frame.extend(6)):
        with pytest.raises(
            DataError, match="up to 1990-01-01; the data runs from 2023-01-01 00:00 to 2023-01-01 03:00"
        ):
            longer.until("1990-01-01", keep_known=True)
    steps = pl.DataFrame({"series_id": ["a", "a"], "time": [-1, 0], "y": [1.0, 2.0]})
    counted = SeriesFrame(steps, SeriesSchema(targets=("y",), freq="1i"))
    with pytest.raises(DataError, match="the data runs from -1 to 0$"):
        counted.extend(3).until(-9)
    nothing = SeriesFrame(table(y=[None] * 5), schema(), require_targets=False)
    with pytest.raises(DataError, match="to 2023-01-01 03:00$"):
        nothing.until("1990-01-01")


def test_until_hides_the_future_but_may_keep_known_covariates() -> None:
    frame = SeriesFrame(table(k=[1.0] * 5, p=[1.0] * 5), schema(known=("k",), past=("p",)))
    assert frame.until(START).series_ids == ("b",)
    shown = frame.until(START + timedelta(hours=1), keep_known=True).table
    assert shown["y"].to_list() == [4.0, None, None, 1, 2, None]
    assert shown["p"].to_list() == [1.0, None, None, 1, 1, None]
    assert shown["k"].to_list() == [1.0, None, 1, 1, 1, 1]
    with pytest.raises(DataError, match="no rows"):
        frame.until("2022-01-01")


def test_extend_counts_from_the_last_observed_target() -> None:
    data = table(k=[1.0] * 5).with_columns(y=pl.Series([1.0, None, None, 4, 5]))
    frame = SeriesFrame(data, schema(known=("k",)))
    longer = frame.extend(3)
    assert longer.last_observed().equals(frame.last_observed())
    lengths = dict(longer.table.group_by("series_id").len().rows())
    assert lengths == {"a": 6, "b": 4}  # a: rows 1..3 and 3 more; b: observed to 0, known to 2, one more
    assert longer.table.filter(series_id="b")["k"].to_list() == [1, 1, 1, None]
    assert frame.extend(0) is frame
    with pytest.raises(DataError, match="cannot extend"):
        frame.extend(-1)


def test_extend_to_gives_each_series_the_rows_that_it_lacks() -> None:
    frame = SeriesFrame(table(k=[1.0] * 5), schema(known=("k",)))  # a: rows 1..3, b: rows 0..2
    longer = frame.extend_to(5)
    assert (longer.offset + np.diff(longer.indptr)).tolist() == [5, 5]
    assert longer.table.filter(series_id="b")["k"].to_list() == [1, 1, 1, None, None]
    assert longer.table.filter(pl.col("y").is_not_null()).equals(frame.table.filter(pl.col("y").is_not_null()))
    assert frame.extend_to(3) is frame
    assert frame.extend_to(4).num_rows == frame.num_rows + 1


def test_first_and_last_observed_rows() -> None:
    times = pl.datetime_range(START, START + timedelta(hours=4), "1h", eager=True)
    values = {"a": [None, 2.0, None, 3.0, None], "b": [None] * 5}
    rows = [
        pl.DataFrame({"series_id": name, "time": times, "y": pl.Series(y, dtype=pl.Float64)})
        for name, y in values.items()
    ]
    frame = SeriesFrame(pl.concat(rows), schema(), require_targets=False)
    assert frame.first_observed()["time"].dt.hour().to_list() == [times[1].hour, None]
    assert frame.last_observed()["time"].dt.hour().to_list() == [times[3].hour, None]


def test_monthly_rows_keep_their_day_through_short_months() -> None:
    days = [datetime(2023, 1, 30), datetime(2023, 2, 28), datetime(2023, 3, 30)]
    frame = SeriesFrame.from_wide(pl.DataFrame({"ds": days, "y": [1.0, 2.0, 3.0]}), time="ds")
    assert frame.schema.freq == "1mo"
    part = frame.between(days[1], days[1]).extend(1)  # a lone 28 February, once a month on the 30th
    assert [time.day for time in part.table["time"]] == [28, 30]
    odd = pl.DataFrame({"ds": [*days, datetime(2023, 4, 12)], "y": [1.0, 2.0, 3.0, 4.0]})
    with pytest.raises(DataError, match="1 of 4 times .* 1mo grid .*first: 'series' at 2023-04-12 00:00"):
        SeriesFrame.from_wide(odd, time="ds", freq="1mo")


def test_extend_walks_months() -> None:
    monthly = pl.DataFrame({"ds": [datetime(2023, 1, 31), datetime(2023, 2, 28)], "y": [1.0, 2.0]})
    times = SeriesFrame.from_wide(monthly, time="ds").extend(2).table["time"].to_list()
    assert times[2:] == [datetime(2023, 3, 31, tzinfo=UTC), datetime(2023, 4, 30, tzinfo=UTC)]


def test_mask_outside_counts_what_it_removes() -> None:
    frame = SeriesFrame(table(), schema())
    masked, counts = frame.mask_outside({"y": (2, 4)})
    assert counts == {"y": 2}
    assert masked.table["y"].to_list() == [4.0, None, None, None, 2, 3]
    assert frame.mask_outside({"y": (None, None)})[1] == {"y": 0}
    with pytest.raises(DataError, match="unknown column 'z'"):
        frame.mask_outside({"z": (0, 1)})
    with pytest.raises(DataError, match="range of column 'y' is empty"):
        frame.mask_outside({"y": (2, 1)})


def test_known_columns_can_be_added_once() -> None:
    frame = SeriesFrame(table(), schema())
    more = frame.with_known([pl.Series("k", range(6))])
    assert more.schema.known == ("k",)
    assert more.table["k"].to_list() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="more than one role"):
        more.with_known([pl.Series("k", range(6))])
    with pytest.raises(DataError, match="has 2 values; give 6"):
        frame.with_known([pl.Series("k", [1, 2])])
    with pytest.raises(DataError, match="1 infinite"):
        frame.with_known([pl.Series("k", [1.0, 2, 3, 4, 5, np.inf])])


def test_covariates_can_be_left_out_by_role() -> None:
    static = pl.DataFrame({"series_id": ["a", "b"], "s": [1.0, 2.0], "r": [3.0, 4.0]})
    roles = schema(past=("p",), known=("k", "h"), static=("s", "r"))
    frame = SeriesFrame(table(p=[1.0] * 5, k=[2.0] * 5, h=[3.0] * 5), roles, static)
    part = frame.with_covariates(known=["h"], static=["r"])
    assert part.schema == schema(known=("h",), static=("r",))
    assert part.table.columns == ["series_id", "time", "y", "h"]
    assert part.static is not None
    assert part.static.rows() == [("a", 3.0), ("b", 4.0)]
    assert frame.with_covariates().static is None
    with pytest.raises(DataError, match=r"no past covariate h \(it has p\)"):
        frame.with_covariates(past=["h"])


def test_validating_two_million_rows_takes_seconds() -> None:

    rows = 2_000_000
    times = pl.datetime_range(START, START + timedelta(minutes=rows - 1), "1m", eager=True)
    values = np.random.default_rng(0).normal(size=(rows, 7))
    big = pl.DataFrame({"series_id": "a", "time": times, **{f"y{k}": values[:, k] for k in range(7)}})
    roles = SeriesSchema(targets=tuple(f"y{k}" for k in range(7)), freq="1m")
    start = time.perf_counter()
    SeriesFrame(big, roles)
    assert time.perf_counter() - start < 5  # 0.13 s on a quiet core
