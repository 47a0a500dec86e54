"""Regime labels against loops over rows, and nothing in them from after the cutoff."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.forecasting.regimes import block_rows, check_regimes, regime_table, window_labels
from tsforge.metrics.summary import score_cells, summarise

START = datetime(2024, 1, 5, tzinfo=UTC)  # a Friday
ROWS = 12


@pytest.fixture
def frame() -> SeriesFrame:
    """Three series that begin and end at different rows, with gaps; the last one is constant."""
    rng = np.random.default_rng(7)
    parts = []
    for number, (name, first, last) in enumerate((("a", 0, 200), ("b", 37, 200), ("c", 120, 200), ("d", 0, 200))):
        rows = last - first
        growing = rng.normal(size=rows) * np.linspace(1, 3, rows) + 5 * number + rng.normal(size=rows).cumsum()
        y = np.where(rng.random(rows) < 0.2, np.nan, growing) if name != "d" else np.full(rows, 0.1)
        times = [START + timedelta(hours=first + row) for row in range(rows)]
        code = np.where(rng.random(rows) < 0.3, np.nan, rng.integers(0, 3, rows))
        part = pl.DataFrame({"time": times, "y": y, "z": rng.normal(size=rows), "code": code}).fill_nan(None)
        parts.append(part.with_columns(pl.lit(name).alias("series_id")))
    static = pl.DataFrame({"series_id": ["a", "b", "c", "d"], "kind": [1.0, 2.0, 1.0, 2.0]})
    schema = SeriesSchema(targets=("y", "z"), past=("code",), static=("kind",), freq="1h")
    return SeriesFrame(pl.concat(parts), schema, static)


def by_loop(frame: SeriesFrame, cutoff: datetime, statistic: str) -> dict[tuple[str, str], str]:
    """Return the labels by walking back from the cutoff."""
    found = {}
    for name in frame.series_ids:
        rows = frame.table.filter(series_id=name)
        values = {time: row for time, *row in rows.select("time", "y", "z").iter_rows()}
        for place, variate in enumerate(("y", "z")):
            blocks = []
            for block in range(20):
                times = [cutoff - timedelta(hours=ROWS * block + row) for row in range(ROWS)]
                seen = [values[time][place] for time in times if time in values and values[time][place] is not None]
                enough = len(seen) >= ROWS / 2
                blocks.append((np.std(seen) if statistic == "volatility" else np.mean(seen)) if enough else None)
            earlier = [value for value in blocks[1:] if value is not None]
            label = "unknown"
            if blocks[0] is not None and len(earlier) >= 3:
                low, high = np.quantile(earlier, [1 / 3, 2 / 3])
                slack = 1e-9 * (abs(low) + abs(high)) + 1e-12
                label = "low" if blocks[0] < low - slack else "high" if blocks[0] > high + slack else "middle"
            found[name, variate] = label
    return found


def as_dict(labels: pl.DataFrame, kind: str) -> dict[tuple[str, str], str]:
    rows = labels.filter(kind=kind).select("series_id", "variate", "regime")
    return {(series, variate): regime for series, variate, regime in rows.iter_rows()}


@pytest.mark.parametrize("kind", ["volatility", "level"])
def test_labels_equal_a_loop_over_rows(kind: str, frame: SeriesFrame) -> None:
    seen = set()
    for hour in (60, 100, 139, 171, 199):
        cutoff = START + timedelta(hours=hour)
        found = as_dict(window_labels(frame.until(cutoff), cutoff, (kind,), rows=ROWS), kind)
        expected = by_loop(frame.until(cutoff), cutoff, kind)
        assert found == {key: expected[key] for key in found}
        assert len(found) == 2 * len(frame.until(cutoff).series_ids)
        assert found["d", "y"] == "middle", "a constant is no regime"
        seen |= set(found.values())
    assert seen == {"low", "middle", "high", "unknown"}


def test_labels_use_nothing_after_the_cutoff(frame: SeriesFrame) -> None:
    cutoff = START + timedelta(hours=150)
    later = pl.col("time") > pl.lit(cutoff)
    changed = frame.table.with_columns(
        pl.when(later).then(1000.0).otherwise(pl.col(name)).alias(name) for name in ("y", "z", "code")
    )
    spoiled = SeriesFrame(changed, frame.schema, frame.static)
    one, other = (
        window_labels(part.until(cutoff), cutoff, ("volatility", "level"), rows=ROWS, column="code")
        for part in (frame, spoiled)
    )
    assert one.equals(other)


def test_a_column_gives_its_last_value_up_to_the_cutoff(frame: SeriesFrame) -> None:
    cutoff = START + timedelta(hours=150)
    visible = frame.until(cutoff)
    found = as_dict(window_labels(visible, cutoff, (), rows=ROWS, column="code"), "code")
    for name in visible.series_ids:
        last = visible.table.filter(series_id=name)["code"].drop_nulls()
        assert found[name, "y"] == found[name, "z"] == (f"{last[-1]:g}" if len(last) else "unknown")
    fixed = as_dict(window_labels(visible, cutoff, (), rows=ROWS, column="kind"), "kind")
    assert {name: fixed[name, "y"] for name in visible.series_ids} == {"a": "1", "b": "2", "c": "1", "d": "2"}


def test_codes_keep_all_their_digits() -> None:
    codes = [20240101.0, 20240102.0, 0.1234567, 0.1234568, -3.0, 2.0**60]
    parts = [
        pl.DataFrame({"series_id": f"s{number}", "time": range(3), "y": [1.0, 2.0, 3.0], "code": code})
        for number, code in enumerate(codes)
    ]
    frame = SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["y"], past=["code"])
    found = window_labels(frame, 2, (), rows=ROWS, column="code")["regime"].to_list()
    assert found == ["20240101", "20240102", "0.1234567", "0.1234568", "-3", "1152921504606846976"]


def test_a_series_that_ended_before_the_cutoff_is_unknown(frame: SeriesFrame) -> None:
    table = frame.table.filter((pl.col("series_id") != "a") | (pl.col("time") < pl.lit(START + timedelta(hours=100))))
    short = SeriesFrame(table, frame.schema, frame.static)
    cutoff = START + timedelta(hours=199)
    assert as_dict(window_labels(short, cutoff, ("level",), rows=ROWS), "level")["a", "y"] == "unknown"


def test_blocks_are_whole_seasons_that_cover_the_horizon() -> None:
    assert [block_rows(season, steps) for season, steps in ((24, 24), (24, 25), (7, 7), (1, 3), (12, 1))] == [
        24,
        48,
        14,
        8,
        12,
    ]


def test_settings_that_the_data_cannot_serve_are_refused(frame: SeriesFrame) -> None:
    with pytest.raises(ConfigError, match="regime_column 'cod' is no column of the data; did you mean 'code'"):
        check_regimes(frame, (), "cod")
    table = pl.DataFrame({"series_id": ["s"] * 5, "time": range(5), "y": [1.0] * 5})
    integers = SeriesFrame(table, SeriesSchema(targets=("y",), freq="1i"))
    with pytest.raises(ConfigError, match="regimes hour need dates"):
        check_regimes(integers, ("hour", "level"), None)


@pytest.fixture
def cells(frame: SeriesFrame) -> pl.DataFrame:
    rows = frame.table.filter(
        pl.col("series_id").is_in(["a", "b"]), pl.col("time") >= pl.lit(START + timedelta(hours=100))
    )
    long = rows.unpivot(index=["series_id", "time"], on=["y", "z"], variable_name="variate", value_name="actual")
    table = long.with_columns(
        pl.lit(START + timedelta(hours=99)).alias("cutoff"), pl.lit(1, pl.Int32).alias("step"), mean=pl.lit(1.0)
    )
    return score_cells(table)


def test_calendar_regimes_are_those_of_the_forecast_row(cells: pl.DataFrame, frame: SeriesFrame) -> None:
    labels = window_labels(frame, START + timedelta(hours=199), (), rows=ROWS).with_columns(cutoff=pl.lit(START))
    table = regime_table(cells, labels, ("hour", "weekday", "month"))
    for kind, code in (("hour", "%H"), ("weekday", "%a"), ("month", "%b")):
        expected = (
            cells.with_columns(name=pl.col("time").dt.strftime(code)).group_by("name").agg(pl.col("absolute").mean())
        )
        found = table.filter(kind=kind)
        assert dict(found.select("regime", "mae").iter_rows()) == pytest.approx(dict(expected.iter_rows()))
        assert found["count"].sum() == cells.height
    assert table.filter(kind="weekday")["regime"].to_list() == ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"][
        1:2
    ] or (
        table.filter(kind="weekday")["regime"].to_list() == ["Tue", "Wed", "Thu", "Fri", "Sat"]
        or table.filter(kind="weekday")["regime"].to_list()
        == sorted(table.filter(kind="weekday")["regime"], key=["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].index)
    )


def test_regimes_divide_the_cells(cells: pl.DataFrame) -> None:
    cutoff = cells["cutoff"][0]
    names = {"a": "low", "b": "high"}
    labels = pl.DataFrame(
        [
            {"series_id": series, "variate": variate, "cutoff": cutoff, "kind": "level", "regime": names[series]}
            for series in ("a", "b")
            for variate in ("y", "z")
            if (series, variate) != ("b", "z")
        ]
    )
    table = regime_table(cells, labels, ("level",))
    assert table["regime"].to_list() == ["low", "high", "unknown"]
    for regime, part in (
        ("low", cells.filter(series_id="a")),
        ("high", cells.filter(series_id="b", variate="y")),
        ("unknown", cells.filter(series_id="b", variate="z")),
    ):
        row = table.filter(regime=regime).row(0, named=True)
        whole = summarise(part).row(0, named=True)
        assert (row["count"], row["mse"]) == (part.height, pytest.approx(whole["mse"]))


def test_too_many_codes_are_refused(cells: pl.DataFrame) -> None:
    labels = cells.select("series_id", "variate", "cutoff").unique().with_columns(kind=pl.lit("code"))
    many = cells.with_row_index().with_columns(series_id=pl.format("{}", pl.col("index"))).drop("index")
    codes = many.select("series_id", "variate", "cutoff", pl.lit("code").alias("kind"), regime="series_id")
    assert labels.height
    with pytest.raises(ConfigError, match=r"regime_column 'code' has \d+ different values"):
        regime_table(many, codes, (), "code")
