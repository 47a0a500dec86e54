"""Cold start: short and new series, intervals by length of history against loops, coverage, and no look ahead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting import cold_start
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.cold_start import (
    ColdStartConfig,
    history_rows,
    likeness_margins,
    predict_cold,
    short_margins,
)
from tsforge.forecasting.predict import predict
from tsforge.network import NetworkConfig

START = datetime(2024, 1, 1, tzinfo=UTC)
ROWS, CONTEXT, HORIZON = 300, 24, 4
LEVELS = (0.1, 0.5, 0.9)


def hours(count: int) -> datetime:
    return START + timedelta(hours=count)


def panel(seed: int = 0, series: int = 12, rows: int = ROWS, short: tuple[tuple[str, int], ...] = ()) -> SeriesFrame:
    """Hourly series with a common daily shape and levels of their own; short ones begin late."""
    rng = np.random.default_rng(seed)
    parts = []
    for name, count in (*((f"s{k:02}", rows) for k in range(series)), *short):
        hour = np.arange(rows - count, rows)
        values = rng.normal(20.0, 4.0) + 3.0 * np.sin(2 * np.pi * hour / 24) + rng.normal(0, 0.7, count)
        parts.append(pl.DataFrame({"id": [name] * count, "t": [hours(int(h)) for h in hour], "y": values}))
    return SeriesFrame.from_long(pl.concat(parts), series_id="id", time="t", targets=["y"])


@pytest.fixture(scope="module")
def artifact(make_artifact: Callable[..., Artifact]) -> Artifact:
    """A pooled closed-form model that has seen the first 150 rows of the long series."""
    data = panel().until(hours(149))
    made = make_artifact("linear", "normal", context_length=CONTEXT, horizon=HORIZON, scaling="global", data=data)
    made.provenance["span_rows"] = {"train": [0, 150]}
    return made


SHORT = (("new1", 1), ("new7", 7), ("new23", 23), ("old24", 24))


def test_short_series_are_forecast_and_on_record(artifact: Artifact) -> None:
    frame = panel(short=SHORT)
    with pytest.raises(DataError, match="new1"):
        predict(artifact, frame, quantile_levels=())
    found = predict_cold(artifact, frame, ColdStartConfig(), quantile_levels=LEVELS)
    facts = found.metadata["cold_start"]
    assert facts["history_rows"] == {"new1": 1, "new23": 23, "new7": 7}
    assert (facts["calibrated_on"], facts["held_out_series"], facts["in_sample"]) == (13, False, False)
    assert found.table.group_by("series_id").len()["len"].unique().to_list() == [HORIZON]
    long = frame.select_series([name for name in frame.series_ids if not name.startswith("new")])
    plain = predict(artifact, long, quantile_levels=()).table
    kept = found.table.filter(~pl.col("series_id").str.starts_with("new"))
    assert np.allclose(kept["mean"], plain["mean"], rtol=1e-5)
    new = found.table.filter(pl.col("series_id").str.starts_with("new"))
    assert new["mean"].is_between(0.0, 40.0).all()
    assert (new["q0.1"] < new["mean"]).all()
    width = {name: float((part["q0.9"] - part["q0.1"]).mean()) for (name,), part in new.group_by("series_id")}
    assert width["new1"] > width["new23"] > 0.0


def test_a_full_history_hidden_by_nothing_changes_nothing(artifact: Artifact) -> None:
    frame = panel()
    same = predict_cold(artifact, frame, ColdStartConfig(), quantile_levels=LEVELS)
    assert same.table.equals(predict(artifact, frame, quantile_levels=LEVELS).table)
    assert same.metadata["cold_start"]["history_rows"] == {}


def test_margins_are_those_of_series_cut_short_by_hand(artifact: Artifact) -> None:
    """Series that really begin k rows before each cutoff are forecast one by one; the ranks of errors agree."""
    frame, kept, at = panel(series=5), 4, np.array([200, 230, 260])
    found = short_margins(artifact, frame, at, kept + 3, {0.8}, stranger=True)[0.8]  # 7 rows count as 4
    errors = []
    for cutoff in at:
        for name in frame.series_ids:
            rows = frame.select_series([name]).between(hours(int(cutoff) - kept + 1), hours(int(cutoff)))
            other = frame.select_series(["s00" if name != "s00" else "s01"]).between(end=hours(int(cutoff)))
            both = SeriesFrame(pl.concat([rows.table, other.table]), frame.schema)
            cold = predict_cold(artifact, both, ColdStartConfig(), quantile_levels=(), cutoff=hours(int(cutoff)))
            ahead = frame.select_series([name]).between(hours(int(cutoff) + 1), hours(int(cutoff) + HORIZON)).table["y"]
            mean = cold.table.filter(series_id=name)["mean"]
            errors.append(np.abs(ahead.to_numpy() - mean.to_numpy()))
    rank = int(np.ceil((len(errors) + 1) * 0.8))
    expected = np.sort(np.array(errors), axis=0)[rank - 1]
    ratio = expected / found[:, 0]  # the one number by which a global scaler divides
    assert np.allclose(ratio, ratio[0], rtol=1e-4)


def coverage_of_strangers(artifact: Artifact, count: int) -> float:
    """Return the share of what follows that lies in the 80 % intervals of 60 new series with ``count`` rows."""
    strangers = panel(seed=5, series=60)
    short = tuple((f"new{k:02}", count) for k in range(60))
    inside = []
    for shift in (0, 40, 80):
        end = ROWS - 1 - HORIZON - shift
        rows = strangers.between(hours(end - count + 1), hours(end)).table
        named = rows.with_columns(pl.col("series_id").str.replace("s", "new"))
        both = SeriesFrame(pl.concat([panel().until(hours(end)).table, named]), strangers.schema)
        table = predict_cold(artifact, both, ColdStartConfig(), quantile_levels=LEVELS).table
        ahead = strangers.table.with_columns(pl.col("series_id").str.replace("s", "new"))
        joined = table.filter(pl.col("series_id").is_in([name for name, _ in short])).join(
            ahead, on=["series_id", "time"]
        )
        inside.append(joined.select(pl.col("y").is_between(pl.col("q0.1"), pl.col("q0.9"))).to_series().mean())
        assert joined.height == 60 * HORIZON
    return float(np.mean(inside))


@pytest.mark.parametrize("count", [2, 8])
def test_coverage_for_series_that_were_never_seen(artifact: Artifact, count: int) -> None:
    """80 % intervals of new series with a few rows hold about 80 % of what follows."""
    assert 0.72 < coverage_of_strangers(artifact, count) < 0.9


@pytest.fixture(scope="module")
def by_series() -> Artifact:
    """As ``artifact``, scaled by the training rows of each series, strangers by their context."""
    scaling = {"kind": "series", "unknown": "context"}
    plain = {"model": {"name": "linear"}, "likelihood": {"name": "normal"}, "scaling": scaling}
    window = WindowSpec(context_length=CONTEXT, horizon=HORIZON)
    made = fit_solved(panel().until(hours(149)), validate(NetworkConfig, plain), window)
    made.provenance["span_rows"] = {"train": [0, 150]}
    return made


@pytest.mark.parametrize("count", [1, 2, 8])
def test_coverage_where_a_stranger_has_its_level_from_a_few_rows(by_series: Artifact, count: int) -> None:
    """The series that calibrate must not be measured by training rows that a new series does not have."""
    assert 0.72 < coverage_of_strangers(by_series, count) < 0.9


def test_the_margins_of_series_with_training_rows_are_in_their_own_units(by_series: Artifact) -> None:
    """At an early cutoff a series of the fit is short too, but its level is known: it is no stranger."""
    cutoff = hours(240)
    history = panel(short=(("new8", 8),)).until(cutoff).table.filter(pl.col("series_id") != "new8")
    rows = pl.col("time") > cutoff - timedelta(hours=8)
    fresh = history.filter((pl.col("series_id") == "s03") & rows).with_columns(series_id=pl.lit("new8"))
    known = history.filter((pl.col("series_id") != "s03") | rows)
    frame = SeriesFrame(pl.concat([known, fresh]), panel().schema)
    table = predict_cold(by_series, frame, ColdStartConfig(), quantile_levels=LEVELS).table
    width = {
        name: float((part["q0.9"] - part["q0.1"]).mean())
        for name in ("s03", "new8")
        if (part := table.filter(series_id=name)).height
    }
    assert width["new8"] > 1.5 * width["s03"] > 0.0


def test_new_series_are_like_what_the_user_says(artifact: Artifact) -> None:
    frame = panel()
    config = validate(ColdStartConfig, {"like": {"fresh": "s03", "typical": "*"}})
    found = predict_cold(artifact, frame, config, quantile_levels=LEVELS)
    fresh, typical = (found.table.filter(series_id=name) for name in ("fresh", "typical"))
    assert np.array_equal(fresh["mean"], found.table.filter(series_id="s03")["mean"])
    old = found.table.filter(pl.col("series_id").str.starts_with("s"))
    mean = old.group_by("step", maintain_order=True).agg(pl.col("mean").mean())["mean"]
    assert np.allclose(typical["mean"], mean)
    one, every = (float((part["q0.9"] - part["q0.1"]).mean()) for part in (fresh, typical))
    levels = float(np.std([part["mean"].mean() for _, part in old.group_by("series_id")]))
    assert one > every > 2.0 * levels  # two strangers differ by more than one from the middle
    assert found.metadata["cold_start"]["like"] == {"fresh": "s03", "typical": "*"}


def test_likeness_margins_equal_a_loop_over_pairs(artifact: Artifact) -> None:
    held = forecasts_at(artifact, panel(series=5), np.array([200, 230, 260]), steps=HORIZON)
    series = sorted(held["series_id"].unique())
    for mean in (False, True):
        found = likeness_margins(held, {0.5}, mean=mean)
        for step in (1, HORIZON):
            errors = []
            for (_,), part in held.filter(step=step).group_by("cutoff"):
                value = {row["series_id"]: row for row in part.to_dicts()}
                for one in series:
                    others = [value[other]["mean"] for other in series if other != one]
                    for guess in [sum(others) / len(others)] if mean else others:
                        errors.append(abs(value[one]["actual"] - guess))
            rank = int(np.ceil((len(errors) + 1) * 0.5))
            assert found.filter(step=step)["margin"].item() == pytest.approx(sorted(errors)[rank - 1])


def test_nothing_after_the_cutoff_matters(artifact: Artifact) -> None:
    """Other values after the cutoff change neither means nor margins; margins of test errors would be caught."""
    frame, cutoff = panel(short=(("new40", 40),)), hours(ROWS - 30)
    noise = pl.Series("noise", np.random.default_rng(1).normal(0, 50, frame.num_rows))
    late = pl.col("time") > pl.lit(cutoff)
    moved = pl.when(late).then(pl.col("y") + pl.col("noise")).otherwise("y").alias("y")
    other = SeriesFrame(frame.table.with_columns(noise).with_columns(moved).drop("noise"), frame.schema)
    config = validate(ColdStartConfig, {"like": {"fresh": "*"}})
    tables = [
        predict_cold(artifact, one, config, quantile_levels=LEVELS, cutoff=cutoff).table for one in (frame, other)
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].filter(series_id="new40").height == HORIZON
    at = np.arange(ROWS - 60, ROWS - HORIZON)  # a saboteur calibrates beyond the cutoff
    leaky = [short_margins(artifact, one, at, 8, {0.8}, stranger=True)[0.8] for one in (frame, other)]
    assert not np.array_equal(*leaky)


def test_series_held_out_of_the_fit_calibrate(artifact: Artifact) -> None:
    artifact.provenance["entities"] = {"held_out": ["s01", "s02", "s03"]}
    try:
        found = predict_cold(artifact, panel(short=SHORT), ColdStartConfig(), quantile_levels=LEVELS)
    finally:
        del artifact.provenance["entities"]
    facts = found.metadata["cold_start"]
    assert (facts["calibrated_on"], facts["held_out_series"]) == (4, True)  # and old24, which the fit has not seen


def test_history_is_counted_from_the_first_row() -> None:
    frame = panel(series=1, short=(("new7", 7),))
    assert history_rows(frame) == {"new7": 7, "s00": ROWS}
    assert history_rows(frame, hours(ROWS - 3)) == {"new7": 5, "s00": ROWS - 2}


def with_leading_gap(frame: SeriesFrame, name: str) -> SeriesFrame:
    """Give a series rows without a value from the first time of the frame on."""
    first = frame.select_series([name]).table["time"].min()
    times = frame.table.filter(pl.col("time") < first)["time"].unique()
    return SeriesFrame(
        pl.concat([frame.table, pl.DataFrame({"series_id": name, "time": times})], how="diagonal"), frame.schema
    )


def test_leading_rows_without_a_value_are_no_history(artifact: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    """Two values are two values, whether or not empty rows come before them."""
    frame = panel(short=(("new2", 2),))
    gap = with_leading_gap(frame, "new2")
    assert (frame.num_rows, gap.num_rows) == (12 * ROWS + 2, 13 * ROWS)
    assert history_rows(gap) == history_rows(frame)
    assert history_rows(gap, hours(ROWS - 2))["new2"] == 1
    assert history_rows(gap.between(end=hours(ROWS - 3)))["new2"] == 0
    tables = [predict_cold(artifact, one, ColdStartConfig(), quantile_levels=LEVELS).table for one in (frame, gap)]
    assert tables[0].sort(pl.all()).equals(tables[1].sort(pl.all()))
    assert not caplog.messages
    with pytest.raises(DataError, match=r"1 of 13 series have fewer than 24 rows .*\(new2\)"):
        predict_cold(artifact, gap, ColdStartConfig(short="refuse", like={"fresh": "s01"}))
    predict(artifact, gap, quantile_levels=LEVELS)
    assert "1 of 13 series have no observed target in the first of the 24 rows up to the cutoff" in caplog.text
    assert "(new2); their intervals are as narrow" in caplog.text
    caplog.clear()
    first = (pl.col("series_id") == "s01") & (pl.col("time") == hours(ROWS - 24))
    last = panel().table.filter(pl.col("time") >= hours(ROWS - 24)).with_columns(y=pl.when(~first).then("y"))
    predict(artifact, SeriesFrame(last, frame.schema), quantile_levels=LEVELS)  # of the fit: it began before
    assert not caplog.messages


def test_pairs_of_very_many_series_are_drawn_evenly(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each series stands in for as many others; the draw is the same every time and depends on no order of rows."""
    held = forecasts_at(artifact, panel(series=12), np.array([200, 230, 260]), steps=HORIZON)
    every = likeness_margins(held, {0.5}, mean=False)
    asked: list[int] = []
    ranked = cold_start.conformal_margin

    def counted(errors: np.ndarray, mask: np.ndarray, coverage: float) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(errors))
        return ranked(errors, mask, coverage)

    monkeypatch.setattr(cold_start, "conformal_margin", counted)
    monkeypatch.setattr(cold_start, "_PAIRS", 12 * 3 * 7)
    some = likeness_margins(held, {0.5}, mean=False)
    assert asked == [12 * 3 * 7] * HORIZON
    assert (
        likeness_margins(held.sample(fraction=1.0, shuffle=True, seed=3), {0.5}, mean=False).sort("step").equals(some)
    )
    assert np.allclose(some["margin"], every["margin"], rtol=0.3)
    assert not some.equals(every)


def test_what_cannot_start_cold_is_refused(artifact: Artifact, make_artifact: Callable[..., Artifact]) -> None:
    frame = panel(short=SHORT)
    for settings, message in (
        ({"like": {"s01": "s02"}}, "s01 has rows"),
        ({"like": {"fresh": "s99"}}, "unknown series 's99'"),
        ({"like": {"fresh": "new7"}}, "itself too short"),
        ({"short": "refuse", "like": {"fresh": "s01"}}, "new1"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            predict_cold(artifact, frame, validate(ColdStartConfig, settings), quantile_levels=())
    with pytest.raises(DataError, match="all 3 series are shorter"):
        predict_cold(artifact, frame.select_series(["new1", "new7", "new23"]), ColdStartConfig())
    with pytest.raises(ConfigError, match="has no effect"):
        validate(ColdStartConfig, {"short": "refuse"})
    assert ColdStartConfig.model_validate("pad") == ColdStartConfig()
    lonely = panel(series=1)
    with pytest.raises(DataError, match="needs two series"):
        predict_cold(artifact, lonely, ColdStartConfig(like={"fresh": "*"}), quantile_levels=LEVELS)
