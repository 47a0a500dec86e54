"""Hierarchies: structure from ids, static columns and tables; what is refused; sums that are made and checked."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.aggregates import check_sums, frame_hierarchy, with_aggregates
from tsforge.data.config import DataConfig
from tsforge.data.frame import SeriesFrame
from tsforge.data.hierarchy import Hierarchy, HierarchyConfig, build_hierarchy

IDS = ("n/a", "n/b", "s/a")


def build(settings: dict[str, Any], names: tuple[str, ...] = IDS, static: pl.DataFrame | None = None) -> Hierarchy:
    return build_hierarchy(validate(HierarchyConfig, settings), names, static)


def as_sums(found: Hierarchy) -> dict[str, str]:
    """Return every aggregate as text, from the dense summing matrix."""
    dense = found.summing.toarray()
    return {
        name: "+".join(b if w == 1 else f"{w:g}{b}" for b, w in zip(found.bottoms, dense[k], strict=True) if w)
        for k, name in enumerate(found.nodes[: found.num_aggregates])
    }


def test_parts_of_ids_nest() -> None:
    found = build({"levels": ["region", "shop"], "separator": "/"})
    assert as_sums(found) == {"total": "n/a+n/b+s/a", "n": "n/a+n/b", "s": "s/a"}
    assert found.levels == ("total", "region", "region", "bottom", "bottom", "bottom")
    assert found.parents is not None
    assert found.parents.tolist() == [-1, 0, 0, 1, 1, 2]
    assert np.array_equal(found.summing.toarray()[3:], np.eye(3))
    assert np.array_equal(found.constraints.toarray() @ found.summing.toarray(), np.zeros((3, 3)))
    headless = build({"levels": ["region", "shop"], "separator": "/", "total": None})
    assert as_sums(headless) == {"n": "n/a+n/b", "s": "s/a"}
    given = build({"levels": ["region", "shop"], "separator": "/"}, (*IDS, "n", "total"))
    assert given.nodes == found.nodes


def test_crossed_groups_and_means() -> None:
    found = build({"levels": ["region", "kind"], "separator": "/", "groups": [["region"], ["kind"]]})
    assert as_sums(found) == {
        "total": "n/a+n/b+s/a",
        "n/*": "n/a+n/b",
        "s/*": "s/a",
        "*/a": "n/a+s/a",
        "*/b": "n/b",
    }
    assert found.parents is None
    means = build({"levels": ["region", "shop"], "separator": "/", "aggregate": "mean"})
    assert as_sums(means)["n"] == "0.5n/a+0.5n/b"
    assert np.allclose(means.summing.sum(axis=1), 1.0)


def test_static_columns_are_levels() -> None:
    static = pl.DataFrame({"series_id": ["x", "y", "z"], "region": [1.0, 1.0, 2.0], "kind": [7.0, 8.0, 8.0]})
    found = build({"levels": ["region", "kind"]}, ("x", "y", "z"), static)
    assert as_sums(found) == {
        "total": "x+y+z",
        "region=1": "x+y",
        "region=2": "z",
        "region=1/kind=7": "x",
        "region=1/kind=8": "y",
        "region=2/kind=8": "z",
    }
    crossed = build({"levels": ["region", "kind"], "groups": [["kind"]], "total": None}, ("x", "y", "z"), static)
    assert as_sums(crossed) == {"kind=7": "x", "kind=8": "y+z"}
    with pytest.raises(DataError, match=r"level\(s\) area are no static column \(the data has region, kind\)"):
        build({"levels": ["area"]}, ("x", "y", "z"), static)


def test_a_table_of_children() -> None:
    found = build({"children": {"all": ["left", "x"], "left": ["y", "z"]}}, ("x", "y", "z", "all"))
    assert as_sums(found) == {"all": "x+y+z", "left": "y+z"}
    assert found.levels[:2] == ("level0", "level1")
    assert found.parents is not None
    diamond = build({"children": {"p": ["x", "y"], "q": ["y", "z"]}}, ("x", "y", "z"))
    assert diamond.parents is None  # y has two parents


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({"children": {"a": ["b"], "b": ["c", "a"]}}, ("c",), "nodes go round in a circle"),
        ({"children": {"a": ["b", "b"]}}, ("b",), "'a' lists b twice"),
        ({"children": {"a": []}}, ("b",), "'a' has no children"),
        ({"children": {"a": ["b", "c"]}}, ("b",), r"1 of 2 bottoms are not in the data \(c"),
        ({"children": {"a": ["b", "c"]}}, ("b", "c", "d"), "1 of 3 series belong nowhere"),
        ({"children": {"t": ["p", "x"], "p": ["x", "y"]}}, ("x", "y"), "the sum 't' counts x more than once"),
        ({"levels": ["region", "shop"], "separator": "-"}, IDS, "no id has 2 parts split by '-'"),
        ({"levels": ["region", "shop"], "separator": "/"}, (*IDS, "w"), "1 of 4 series are neither a bottom"),
        ({"levels": ["region", "shop"], "separator": "/", "total": "n"}, IDS, "n occur twice"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(settings, names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either levels or children"),
        ({"levels": ["a"], "children": {"p": ["x"]}}, "either levels or children"),
        ({"children": {"p": ["x"]}, "separator": "/"}, "no effect with children"),
        ({"children": {"p": ["x"]}, "total": None}, "no effect with children"),
        ({"levels": ["a", "b"], "over": "variates"}, "give a separator"),
        ({"levels": ["a", "a"], "separator": "/"}, "names a twice"),
        ({"levels": ["a", "b"], "separator": "/", "groups": [["c"]]}, "unknown level"),
        ({"levels": ["a", "b"], "separator": "/", "groups": [["a", "b"]]}, "leave them out of groups"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(HierarchyConfig, settings)


def long_frame(**columns: Any) -> SeriesFrame:
    """Three hourly series of four rows; n/b begins a row later and lacks one cell."""
    start = datetime(2024, 1, 1)
    rows = [(name, start + timedelta(hours=h)) for name in IDS for h in range(4) if (name, h) != ("n/b", 0)]
    y = [1.0, 2.0, 3.0, 4.0, 20.0, None, 40.0, 100.0, 200.0, 300.0, 400.0]
    table = pl.DataFrame(rows, schema=["series_id", "time"], orient="row").with_columns(
        y=pl.Series(y), holiday=pl.Series([0.1 * (t.hour % 2) for _, t in rows]), **columns
    )
    return SeriesFrame.from_long(table, series_id="series_id", time="time", targets=["y"], known=["holiday"])


NESTED = HierarchyConfig(levels=("region", "shop"), separator="/")


def test_sums_are_missing_where_a_part_is() -> None:
    frame = with_aggregates(long_frame(), NESTED)
    assert frame.series_ids == ("n", "n/a", "n/b", "s", "s/a", "total")
    values = {name: frame.select_series([name]).table["y"].to_list() for name in ("n", "s", "total")}
    assert values == {"n": [22.0, None, 44.0], "s": [100.0, 200.0, 300.0, 400.0], "total": [222.0, None, 444.0]}
    assert frame.select_series(["n"]).table["time"][0] == frame.select_series(["n/b"]).table["time"][0]
    # what the parts agree on is kept bit by bit
    own = frame.select_series(["total"]).table["holiday"].to_list()
    assert own == frame.select_series(["n/b"]).table["holiday"].to_list()
    again = with_aggregates(frame, NESTED)
    assert again.table.equals(frame.table)
    means = with_aggregates(long_frame(), HierarchyConfig(levels=("region", "shop"), separator="/", aggregate="mean"))
    assert means.select_series(["n"]).table["y"].to_list() == [11.0, None, 22.0]


def test_rows_of_the_future_carry_known_covariates() -> None:
    frame = with_aggregates(long_frame().extend(2), NESTED)
    assert frame.select_series(["total"]).num_rows == 5  # three sums and two rows ahead
    assert frame.select_series(["total"]).table["y"].to_list()[-2:] == [None, None]


def test_given_sums_are_checked_counted_and_can_be_replaced() -> None:
    frame = with_aggregates(long_frame(), NESTED)
    wrong = frame.table.with_columns(
        pl.when((pl.col("series_id") == "n") & (pl.col("y") > 30)).then(45.5).otherwise("y").alias("y")
    )
    broken = SeriesFrame(wrong, frame.schema)
    checks = {check.node: check for check in check_sums(broken, frame_hierarchy(broken, NESTED), 1e-6)}
    assert (checks["n"].cells, checks["n"].violations, checks["n"].worst) == (2, 1, 1.5)
    assert checks["total"].violations == checks["s"].violations == 0
    with pytest.raises(DataError, match=r"n: 1 of 2 cells; worst 1.5 at y, 2024-01-01"):
        with_aggregates(broken, NESTED)
    assert with_aggregates(broken, NESTED.model_copy(update={"tolerance": 0.05})).table.equals(broken.table)
    assert with_aggregates(broken, NESTED.model_copy(update={"given": "warn"})).table.equals(broken.table)
    assert with_aggregates(broken, NESTED.model_copy(update={"given": "rebuild"})).table.equals(frame.table)


def test_variates_of_one_series_add_up_too() -> None:
    times = [datetime(2024, 1, 1) + timedelta(hours=h) for h in range(3)]
    table = pl.DataFrame({"ds": times, "x": [1.0, 2.0, 3.0], "y": [10.0, None, 30.0]})
    config = validate(HierarchyConfig, {"children": {"both": ["x", "y"]}, "over": "variates"})
    frame = with_aggregates(SeriesFrame.from_wide(table, time="ds"), config)
    assert frame.schema.targets == ("both", "x", "y")
    assert frame.table["both"].to_list() == [11.0, None, 33.0]
    (check,) = check_sums(frame, frame_hierarchy(frame, config), 1e-6)
    assert (check.cells, check.violations) == (2, 0)
    broken = SeriesFrame(frame.table.with_columns(both=pl.col("both") + 1.0), frame.schema)
    with pytest.raises(DataError, match="both: 2 of 2 cells"):
        with_aggregates(broken, config)


def test_a_sum_that_is_never_whole_is_refused() -> None:
    table = long_frame().table
    apart = table.filter(~((pl.col("series_id") == "n/a") & (pl.col("time").dt.hour() > 0)))
    frame = SeriesFrame(apart, long_frame().schema)
    with pytest.raises(DataError, match=r"2 aggregate\(s\) have no row at which all their bottoms are observed"):
        with_aggregates(frame, NESTED)


def test_static_of_a_sum_is_what_its_parts_share() -> None:
    frame = long_frame()
    static = pl.DataFrame({"series_id": list(IDS), "region": [0.1, 0.1, 2.0]})
    schema = type(frame.schema)(targets=("y",), known=("holiday",), static=("region",), freq=frame.schema.freq)
    made = with_aggregates(SeriesFrame(frame.table, schema, static), HierarchyConfig(levels=("region",)))
    assert made.static is not None
    assert dict(made.static.iter_rows())["region=0.1"] == 0.1


def test_publications_cannot_be_summed() -> None:
    plain = {"name": "d", "source": {"kind": "csv", "path": "d.csv"}, "layout": "long", "published": "seen"}
    with pytest.raises(ConfigError, match="hierarchy and published exclude each other"):
        validate(DataConfig, plain | {"hierarchy": {"children": {"a": ["b"]}}})
