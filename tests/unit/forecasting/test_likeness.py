"""Likeness by static features: nearest neighbours against a loop, and forecasts and intervals made from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.cold_start import ColdStartConfig, likeness_margins, predict_cold
from tsforge.forecasting.likeness import nearest_series

START = datetime(2024, 1, 1, tzinfo=UTC)
LEVELS = (0.1, 0.5, 0.9)


def features_of(series: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "series_id": [f"s{k:02}" for k in range(series)],
            "size": 100.0 * rng.normal(size=series),
            "kind": rng.integers(0, 3, series).astype(float),
            "same": np.full(series, 7.0),
        }
    )


def naive_nearest(static: pl.DataFrame, donors: list[str], new: dict[str, float], count: int) -> list[str]:
    rows = [row for row in static.to_dicts() if row["series_id"] in donors]
    sizes = [row["size"] for row in rows]
    middle = sum(sizes) / len(sizes)
    spread = math.sqrt(sum((size - middle) ** 2 for size in sizes) / len(sizes))
    scored = []
    for row in rows:
        apart = ((row["size"] - new["size"]) / spread) ** 2 + (1.0 if row["kind"] != new["kind"] else 0.0)
        scored.append((math.sqrt(apart), row["series_id"]))
    return [name for _, name in sorted(scored)[:count]]


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_those_of_a_loop(seed: int) -> None:
    static = features_of(30, seed)
    donors = [f"s{k:02}" for k in range(0, 30, 2)]
    new = {"size": 20.0 * seed - 50.0, "kind": float(seed % 3), "same": -1e9}  # a constant ranks nobody
    found = nearest_series(static, donors, new, count=6, categories=("kind",))
    assert list(found) == naive_nearest(static, donors, new, 6)
    scaled = static.with_columns(pl.col("size") * 1e-3)
    assert nearest_series(scaled, donors, new | {"size": new["size"] * 1e-3}, count=6, categories=("kind",)) == found


def test_ties_go_by_name_and_codes_are_not_numbers() -> None:
    static = pl.DataFrame({"series_id": ["d", "b", "c", "a"], "code": [1.0, 2.0, 3.0, 9.0]})
    assert nearest_series(static, ["a", "b", "c", "d"], {"code": 2.0}, count=3) == ("b", "c", "d")
    assert nearest_series(static, ["a", "b", "c", "d"], {"code": 9.0}, count=3, categories=("code",)) == ("a", "b", "c")


@pytest.mark.parametrize("same", [0.1, 0.0, -3e9])
def test_a_constant_ranks_nobody_though_its_deviation_is_rounding(same: float) -> None:
    static = pl.DataFrame({"series_id": [f"s{k}" for k in range(7)], "size": np.arange(7.0), "same": np.full(7, same)})
    assert np.full(7, 0.1).std() > 0.0
    found = nearest_series(static, static["series_id"].to_list(), {"size": 6.0, "same": same + 0.1}, count=3)
    assert found == ("s6", "s5", "s4")
    summed = static.with_columns(same=pl.Series([0.1 + 0.2, *np.full(6, 0.3)]))  # 0.30000000000000004
    assert nearest_series(summed, static["series_id"].to_list(), {"size": 6.0, "same": 5.0}, count=3) == found


def test_the_new_series_moves_no_standard_deviation() -> None:
    """Only donors decide what is far: another old series, even an extreme one, changes nothing."""
    static = features_of(10)
    donors = [f"s{k:02}" for k in range(8)]
    extreme = static.with_columns(size=pl.when(pl.col("series_id").is_in(donors)).then("size").otherwise(1e12))
    new = {"size": 10.0, "kind": 1.0, "same": 7.0}
    assert nearest_series(static, donors, new, count=4) == nearest_series(extreme, donors, new, count=4)


@pytest.mark.parametrize(
    ("static", "new", "options", "message"),
    [
        (None, {"size": 1.0}, {}, "the data has none; declare data.static"),
        ("all", {"sise": 1.0, "kind": 0.0, "same": 7.0}, {}, "no static feature 'sise'.*size"),
        ("all", {"size": 1.0}, {}, r"2 of 3 static features of a new series are not given \(kind, same\)"),
        ("all", {"size": 1.0, "kind": 0.0, "same": 7.0}, {"categories": ("colour",)}, "no static feature 'colour'"),
        ("all", {"size": 1.0, "kind": 0.0, "same": 7.0}, {"count": 4}, "neighbours is 4, and only 3 fitted series"),
        ("few", {"size": 1.0, "kind": 0.0, "same": 7.0}, {}, r"1 of 3 series have no static features \(s02\)"),
    ],
)
def test_what_gives_no_neighbours_is_refused(static: Any, new: Any, options: Any, message: str) -> None:
    table = None if static is None else features_of(3 if static == "all" else 2)
    with pytest.raises((ConfigError, DataError), match=message):
        nearest_series(table, ["s00", "s01", "s02"], new, **{"count": 2, **options})


# forecasts


def panel(series: int = 10, rows: int = 300) -> SeriesFrame:
    """Hourly series whose level is their static size."""
    rng = np.random.default_rng(1)
    hour, static = np.arange(rows), features_of(series)
    times = [START + timedelta(hours=int(h)) for h in hour]
    parts = [
        pl.DataFrame({"id": row["series_id"], "t": times}).with_columns(
            y=pl.Series(row["size"] / 10 + 3 * np.sin(2 * np.pi * hour / 24) + rng.normal(0, 0.5, rows)),
            **{name: pl.lit(row[name]) for name in ("size", "kind", "same")},
        )
        for row in static.to_dicts()
    ]
    return SeriesFrame.from_long(
        pl.concat(parts), series_id="id", time="t", targets=["y"], static=["size", "kind", "same"]
    )


@pytest.fixture(scope="module")
def artifact(make_artifact: Callable[..., Artifact]) -> Artifact:
    """A model that does not read static features, fitted on all but the last two series."""
    data = panel().until(START + timedelta(hours=149)).select_series([f"s{k:02}" for k in range(8)])
    made = make_artifact(
        "linear", "normal", context_length=24, horizon=4, scaling="global", data=data.with_covariates()
    )
    made.provenance["span_rows"] = {"train": [0, 150]}
    return made


def test_a_new_series_is_the_mean_of_its_neighbours(artifact: Artifact) -> None:
    frame = panel()
    new = {"size": 55.0, "kind": 1.0, "same": 7.0}
    config = validate(ColdStartConfig, {"like": {"fresh": new}, "neighbours": 3, "categories": ["kind"]})
    found = predict_cold(artifact, frame, config, quantile_levels=LEVELS)
    near = naive_nearest(features_of(10), [f"s{k:02}" for k in range(8)], new, 3)  # never those that were not fitted
    assert found.metadata["cold_start"]["like"] == {"fresh": near}
    expected = found.table.filter(pl.col("series_id").is_in(near)).group_by("step", maintain_order=True)
    fresh = found.table.filter(series_id="fresh")
    assert np.allclose(fresh["mean"], expected.agg(pl.col("mean").mean())["mean"])
    assert (fresh["q0.1"] < fresh["mean"]).all()


def test_margins_are_errors_of_neighbours_for_each_other(artifact: Artifact) -> None:
    """Each calibrating series is forecast by the mean of its own neighbours, at every cutoff, in a loop."""
    frame, at = panel(), np.array([200, 230, 260])
    held = forecasts_at(artifact, frame, at, steps=4)
    static, fitted = features_of(10), [f"s{k:02}" for k in range(8)]
    others = {
        row["series_id"]: tuple(naive_nearest(static, [name for name in fitted if name != row["series_id"]], row, 2))
        for row in static.to_dicts()
    }
    found = likeness_margins(held, {0.8}, mean=False, others=others)
    for step in (1, 4):
        errors = []
        for (_,), part in held.filter(step=step).group_by("cutoff"):
            value = {row["series_id"]: row for row in part.to_dicts()}
            for name, near in others.items():
                errors.append(abs(value[name]["actual"] - sum(value[other]["mean"] for other in near) / 2))
        rank = math.ceil((len(errors) + 1) * 0.8)
        assert found.filter(step=step)["margin"].item() == pytest.approx(sorted(errors)[rank - 1])


def test_settings_without_effect_are_refused(artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match="neighbours and categories have no effect"):
        validate(ColdStartConfig, {"like": {"fresh": "s01"}, "neighbours": 3})
    config = validate(ColdStartConfig, {"like": {"fresh": {"size": 1.0}}})
    with pytest.raises(DataError, match="the data has none"):
        predict_cold(artifact, panel().with_covariates(), config)
