"""Streams against batch prediction at many cutoffs, carried states against one long context, refusals, files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from streamed_data import BEGIN, Smoother, calibrated, hours, rows, streaming_models, untrained
from torch import Tensor

from tsforge.artifact import Artifact, load_tensor_file, save_tensor_file
from tsforge.contracts.tensors import Observation
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.predict import predict
from tsforge.forecasting.rolling import rolling_forecasts
from tsforge.forecasting.stream import Stream
from tsforge.forecasting.stream_rows import collect_rows
from tsforge.models.registry import MODELS
from tsforge.network import NetworkConfig


@pytest.fixture(autouse=True)
def _models() -> Iterator[None]:
    with streaming_models():
        yield


def same(stream: Stream, artifact: Artifact, frame: SeriesFrame, cutoff: int | None, *, exact: bool = True) -> None:
    """Check the stream's forecast against batch prediction."""
    mine = stream.forecast()
    theirs = predict(artifact, frame, cutoff=None if cutoff is None else hours(cutoff))
    assert mine.quantile_levels == theirs.quantile_levels
    assert mine.metadata.items() >= theirs.metadata.items()
    keys = ["series_id", "cutoff", "step", "time", "variate"]
    assert mine.table.select(keys).equals(theirs.table.select(keys))
    for name in mine.table.columns[5:]:
        a, b = mine.table[name].to_numpy(), theirs.table[name].to_numpy()
        assert np.allclose(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5), name


MODELS_IN_WINDOWS = [
    ({"name": "linear"}, "point"),
    ({"name": "linear"}, "normal"),
    ({"name": "linear"}, "quantiles"),
    ({"name": "ar_net", "lags": 12}, "student_t"),
    ({"name": "seasonal_naive", "season_length": 24}, "point"),
    ({"name": "last_value"}, "normal"),
]


@pytest.mark.parametrize(("model", "likelihood"), MODELS_IN_WINDOWS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("has_calibration", [False, True])
def test_windows_forecast_what_batch_prediction_does(
    frame, make_artifact, model: dict[str, Any], likelihood: str, has_calibration: bool
) -> None:
    artifact = make_artifact(model, likelihood)
    if has_calibration:
        artifact = calibrated(artifact, frame, method="absolute" if likelihood == "point" else "auto")
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    assert stream.mode == "window"
    same(stream, artifact, frame, BEGIN - 1)
    place = BEGIN
    for count in (1, 1, 5, 30, 60, 2, 71):  # over the hole of series c, and once more than a context at once
        stream.update(rows(frame, place, place + count))
        place += count
        same(stream, artifact, frame, place - 1)
    stream.update(rows(frame, place, 400))  # series end at hours 399, 359 and 379
    same(stream, artifact, frame, None)


@pytest.mark.parametrize("scaling", ["window", "last", "series"])
def test_scaling_of_a_window_follows_the_window(frame, scaling: str) -> None:
    artifact = calibrated(untrained(frame, {"name": "dlinear"}, scaling={"kind": scaling}), frame, method="absolute")
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    for place in range(BEGIN, BEGIN + 120, 40):
        stream.update(rows(frame, place, place + 40))
        same(stream, artifact, frame, place + 39)


def test_expectations_were_made_before_the_row_and_in_the_interval_of_predict(frame, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear", "normal"), frame)
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    scores = stream.update(rows(frame, BEGIN, BEGIN + 60))
    observed = rows(frame, BEGIN, BEGIN + 60).select(pl.sum_horizontal(pl.col("y", "z").count())).item()
    assert scores.height == observed < 3 * 60 * 2  # the hole of c is not scored
    for ahead in (0, 17, 59):
        truth = predict(artifact, frame, cutoff=hours(BEGIN + ahead - 1), quantile_levels=(0.05, 0.95)).table
        both = scores.filter(time=hours(BEGIN + ahead)).join(truth.filter(step=1), on=["series_id", "time", "variate"])
        assert both.height == scores.filter(time=hours(BEGIN + ahead)).height > 0
        for mine, theirs in (("expected", "mean"), ("low", "q0.05"), ("high", "q0.95")):
            assert np.allclose(both[mine], both[theirs], atol=1e-5)
    value = scores["value"].to_numpy()
    half = (scores["high"] - scores["low"]).to_numpy() / 2 / NormalDist().inv_cdf(0.95)
    assert np.allclose(scores["score"], np.abs(value - scores["expected"].to_numpy()) / half)
    outside = (value < scores["low"].to_numpy()) | (value > scores["high"].to_numpy())
    assert scores["outside"].to_list() == outside.tolist()
    assert 0.02 < outside.mean() < 0.25  # 10 % by construction


def test_expectations_equal_the_rolling_forecasts_of_detection(frame, make_artifact) -> None:
    artifact = make_artifact({"name": "ar_net", "lags": 12})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    scores = stream.update(rows(frame, BEGIN, 330))
    rolled = rolling_forecasts(artifact, frame, BEGIN, 330)
    for place, name in enumerate(rolled.series_ids):
        for v, variate in enumerate(rolled.variates):
            part = scores.filter(series_id=name, variate=variate)
            seen = ~np.isnan(rolled.target[place, :, v])
            assert np.allclose(part["expected"], rolled.mean[place, seen, 0, v], atol=1e-5)
            assert np.allclose(part["value"], rolled.target[place, seen, v], rtol=1e-6)
    assert scores["low"].null_count() == scores["score"].null_count() == scores["outside"].null_count() == scores.height


def test_a_changed_value_changes_no_expectation_up_to_it(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    new = rows(frame, BEGIN, BEGIN + 30)
    late = (pl.col("time") >= hours(BEGIN + 10)) & pl.col("y").is_not_null()
    spoiled = new.with_columns(pl.when(late).then(1e4).otherwise(pl.col("y")).alias("y"))
    honest, other = (Stream.start(artifact, frame, cutoff=hours(BEGIN - 1)).update(part) for part in (new, spoiled))
    changed = honest.filter(pl.col("expected") != other.select("expected").to_series())
    assert changed["time"].min() == hours(BEGIN + 11)


def test_gaps_missing_cells_and_series_that_lag(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    rng = np.random.default_rng(0)
    table = frame.table.with_columns(
        pl.when(pl.Series(rng.random(frame.num_rows) > 0.2)).then(pl.col(name)).alias(name) for name in ("y", "z")
    )
    holed = SeriesFrame(table, frame.schema)
    given = table.filter(pl.Series(rng.random(frame.num_rows) > 0.3) | (pl.col("time") == hours(329)))
    given = given.filter(pl.col("time").is_between(hours(BEGIN), hours(329)))
    dropped = holed.table.filter(pl.col("time") < hours(330)).join(given, on=["series_id", "time"], how="anti")
    dropped = dropped.filter(pl.col("time") >= hours(BEGIN)).select("series_id", "time", gone=True)
    expected = holed.table.join(dropped, on=["series_id", "time"], how="left").with_columns(
        pl.when(pl.col("gone").is_null()).then(pl.col(name)).alias(name) for name in ("y", "z")
    )
    stream = Stream.start(artifact, holed, cutoff=hours(BEGIN - 1))
    a, rest = given.filter(series_id="a"), given.filter(pl.col("series_id") != "a")
    stream.update(a.sample(fraction=1.0, shuffle=True, seed=1))  # any order of rows
    for part in (rest.filter(pl.col("time") < hours(250)), rest.filter(pl.col("time") >= hours(250))):
        stream.update(part)
    same(stream, artifact, SeriesFrame(expected, frame.schema), 329)


@pytest.mark.parametrize("elapsed", [False, True])
@pytest.mark.parametrize("every", [4, 7])
def test_a_gap_is_unobserved_rows_whether_stepped_or_jumped(frame, elapsed: bool, every: int) -> None:
    artifact = calibrated(untrained(frame, {"name": "smoother", "elapsed": elapsed}), frame)
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    stepwise = Stream.start(untrained(frame, {"name": "smoother"}), frame, cutoff=hours(BEGIN - 1))
    given = rows(frame, BEGIN, 320).gather_every(every).filter(pl.col("y").is_not_null() & pl.col("z").is_not_null())
    scores = pl.concat([stream.update(part) for part in (given[:20], given[20:])])
    found = []
    for series in ("a", "b", "c"):
        last = given.filter(series_id=series)["time"][-1]
        full = frame.table.filter((pl.col("series_id") == series) & pl.col("time").is_between(hours(BEGIN), last))
        found.append(
            stepwise.update(full.select("series_id", "time").join(given, on=["series_id", "time"], how="left"))
        )
    mine, theirs = stream.forecast(quantile_levels=()).table, stepwise.forecast(quantile_levels=()).table
    assert np.allclose(mine["mean"], theirs["mean"], atol=1e-4)
    assert scores.height == 2 * given.height
    both = scores.join(pl.concat(found), on=["series_id", "time", "variate"])
    judged = both.drop_nulls("expected")
    assert np.allclose(judged["expected"], judged["expected_right"], atol=1e-4)
    assert (judged.height < both.height) == elapsed  # beyond the horizon of six (the hole of c) nothing was expected
    assert judged.height > 0
    assert stream.carried.since.tolist() == stepwise.carried.since.tolist()


def test_a_carried_state_remembers_everything_since_it_was_warmed_up(frame) -> None:
    artifact = calibrated(untrained(frame, {"name": "smoother"}), frame)
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    assert stream.mode == "carried"
    same(stream, artifact, frame, BEGIN - 1, exact=False)
    scores = stream.update(rows(frame, BEGIN, BEGIN + 50))
    long = untrained(frame, {"name": "smoother"}, context_length=48 + 50)  # one context over all rows seen
    truth = predict(long, frame, cutoff=hours(BEGIN + 49)).table
    assert np.allclose(stream.forecast(quantile_levels=()).table["mean"], truth["mean"], atol=1e-4)
    first = predict(artifact, frame, cutoff=hours(BEGIN - 1), quantile_levels=(0.05, 0.95)).table.filter(step=1)
    both = scores.join(first, on=["series_id", "time", "variate"])
    assert both.height == 6
    assert np.allclose(both["expected"], both["mean"], atol=1e-5)
    assert np.allclose(both["low"], both["q0.05"], atol=1e-5)


@pytest.mark.parametrize("likelihood", ["normal", "student_t"])
@pytest.mark.parametrize("scaling", ["global", "window"])
def test_a_carried_distribution_has_the_quantiles_of_predict(frame, likelihood: str, scaling: str) -> None:
    parts = {"likelihood": {"name": likelihood}, "scaling": {"kind": scaling}}
    artifact = untrained(frame, {"name": "smoother"}, **parts)
    artifact.network.set_residual_scale(torch.linspace(0.1, 0.6, 12).view(6, 2))
    for part in (artifact, calibrated(artifact, frame)):
        stream = Stream.start(part, frame, cutoff=hours(BEGIN - 1))
        same(stream, part, frame, BEGIN - 1, exact=False)
        scores = stream.update(rows(frame, BEGIN, BEGIN + 1))
        truth = predict(part, frame, cutoff=hours(BEGIN - 1), quantile_levels=stream.levels).table.filter(step=1)
        assert np.allclose(scores["low"], truth[f"q{stream.levels[0]:g}"], atol=1e-4)
        assert np.allclose(scores["high"], truth[f"q{stream.levels[1]:g}"], atol=1e-4)


class InPlace(Smoother):
    """Writes into the state it was given."""

    def step(self, state: dict[str, Tensor], row: Observation) -> dict[str, Tensor]:
        state["level"].copy_(super().step(state, row)["level"])
        return state


def test_a_model_that_steps_in_place_still_leaves_the_stream_as_it_was(frame) -> None:
    with MODELS.borrowed("smoother", InPlace):
        artifact = untrained(frame, {"name": "smoother", "weight": 1e20, "fade": 0.5}, scaling={"kind": "none"})
    stream = Stream.start(artifact, frame.until(hours(BEGIN - 1)))
    stream.carried = replace(stream.carried, model={"level": torch.ones_like(stream.carried.model["level"])})
    before = stream.tensors()["carried.model.level"].clone()
    with pytest.raises(ModelError, match="not finite"):
        stream.update(rows(frame, BEGIN, BEGIN + 5))
    assert torch.equal(stream.carried.model["level"], before)


def test_rows_at_once_or_one_by_one_carry_to_the_same_state(frame) -> None:
    artifact = untrained(frame, {"name": "smoother"}, scaling={"kind": "window"})
    whole, single = (Stream.start(artifact, frame, cutoff=hours(BEGIN - 1)) for _ in range(2))
    at_once = whole.update(rows(frame, BEGIN, BEGIN + 60))
    parts = [single.update(rows(frame, place, place + 1)) for place in range(BEGIN, BEGIN + 60)]
    assert whole.forecast().table.equals(single.forecast().table)
    assert at_once.equals(pl.concat(parts).sort("series_id", "time", "variate"))


def test_statistics_stay_as_they_were_at_the_warm_up_until_the_next(frame) -> None:
    artifact = untrained(frame, {"name": "smoother"}, scaling={"kind": "window"})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    before = stream.carried.scale.clone()
    stream.update(rows(frame, BEGIN, BEGIN + 40))
    assert torch.equal(stream.carried.scale, before)
    stream.set_restart(1)
    place = BEGIN + 40
    for count in (1, 3, 30):
        stream.update(rows(frame, place, place + count))
        place += count
        same(stream, artifact, frame, place - 1, exact=False)  # restarted at every row: batch prediction
    assert not torch.equal(stream.carried.scale, before)


def test_restarts_come_every_so_many_rows_of_each_series(frame) -> None:
    artifact = untrained(frame, {"name": "smoother", "fade": 0.999})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1), restart_every=10)
    stream.update(rows(frame, BEGIN, BEGIN + 14).filter(pl.col("series_id") != "b"))
    stream.update(rows(frame, BEGIN, BEGIN + 9).filter(series_id="b"))
    assert dict(zip(stream.series, stream.carried.since.tolist(), strict=True)) == {"a": 4, "b": 9, "c": 4}


@pytest.mark.parametrize("settings", [{"missing": "mask"}, {"missing": "skip"}, {"head": "rollout"}])
def test_a_state_space_model_streams(frame, settings: dict[str, Any]) -> None:
    small = {"name": "s4", "d_model": 8, "d_state": 8, "num_layers": 1, "normalisation": "none", **settings}
    artifact = untrained(frame, small)
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    assert stream.mode == "carried"
    same(stream, artifact, frame, BEGIN - 1, exact=False)
    given = rows(frame, BEGIN, BEGIN + 30).filter((pl.col("time").dt.hour() % 5 != 2) & pl.col("y").is_not_null())
    stream.update(given)
    stream.set_restart(1)
    stream.update(rows(frame, BEGIN + 30, BEGIN + 31))
    gone = pl.col("time").is_between(hours(BEGIN), hours(BEGIN + 29)) & (pl.col("time").dt.hour() % 5 == 2)
    holed = frame.table.with_columns(pl.when(~gone).then(pl.col(name)).alias(name) for name in ("y", "z"))
    same(stream, artifact, SeriesFrame(holed, frame.schema), BEGIN + 30, exact=False)


@pytest.fixture(scope="module")
def covaried(frame) -> SeriesFrame:
    """The frame with a past and two known covariates; the known ones go on for 12 hours after each end."""
    rng = np.random.default_rng(5)
    table = frame.table.with_columns(load=pl.Series(rng.normal(size=frame.num_rows)))
    table = SeriesFrame(table, replace(frame.schema, past=("load",))).extend(12).table
    hour = pl.col("time").dt.hour() / 24 * 2 * np.pi
    table = table.with_columns(s=hour.sin(), c=hour.cos())
    table = table.with_columns(pl.when(pl.int_range(pl.len()) % 50 != 3).then(pl.col("s")).alias("s"))
    table = table.with_columns(pl.col("s").fill_null(strategy="forward"))
    return SeriesFrame(table, replace(frame.schema, past=("load",), known=("s", "c")))


@pytest.mark.parametrize(
    "settings", [{"name": "ar_net", "lags": 12, "events": (), "season_lengths": (24,)}, {"name": "smoother"}]
)
def test_covariates_of_the_past_and_the_future(covaried, settings: dict[str, Any]) -> None:
    solved = settings["name"] == "ar_net"
    window = WindowSpec(context_length=48, horizon=6)
    fitted = covaried.until(hours(249))
    network = validate(NetworkConfig, {"model": settings})
    artifact = fit_solved(fitted, network, window) if solved else untrained(covaried, settings)
    stream = Stream.start(artifact, covaried.until(hours(BEGIN - 1)), restart_every=None if solved else 1)
    with pytest.raises(DataError, match=r"s, c are missing in 18 of 18 forecast rows of 3 series \(first: 'a'"):
        stream.forecast()
    known = ["series_id", "time", "s", "c"]
    later = covaried.table.select(known)
    told = stream.forecast(known=rows(covaried, BEGIN, BEGIN + 6).select(known)).table
    assert np.allclose(told["mean"], predict(artifact, covaried, cutoff=hours(BEGIN - 1)).table["mean"], atol=1e-4)
    with pytest.raises(DataError, match="missing"):
        stream.forecast()  # told for that one forecast only
    scores = []
    for place in range(BEGIN, BEGIN + 40, 8):
        scores.append(stream.update(rows(covaried, place, place + 8), known=later))
        same(stream, artifact, covaried, place + 7, exact=False)
    truth = predict(artifact, covaried, cutoff=hours(BEGIN + 10)).table.filter(step=1)
    both = pl.concat(scores).join(truth, on=["series_id", "time", "variate"])
    assert both.height == 6
    assert np.allclose(both["expected"], both["mean"], atol=1e-4)
    stream.update(rows(covaried, BEGIN + 40, BEGIN + 41).head(0), known=later)  # news about the future alone
    stream.update(rows(covaried, BEGIN + 40, BEGIN + 46))
    with pytest.raises(DataError, match="18 of 18"):
        stream.forecast()


@pytest.mark.parametrize("name", ["ar_net", "smoother"])
def test_covariates_told_ahead_stand_in_for_those_a_row_lacks(covaried, name: str) -> None:
    if name == "ar_net":
        network = validate(NetworkConfig, {"model": {"name": "ar_net", "lags": 12}})
        artifact = fit_solved(covaried.until(hours(249)), network, WindowSpec(context_length=48, horizon=6))
    else:
        artifact = untrained(covaried, {"name": name})
    told, full = (Stream.start(artifact, covaried.until(hours(BEGIN - 1))) for _ in range(2))
    later = rows(covaried, BEGIN, BEGIN + 20).select("series_id", "time", "s", "c")
    new = rows(covaried, BEGIN, BEGIN + 5)
    told.update(new.head(0), known=later)  # six rows ahead are kept
    nothing = pl.lit(None, dtype=pl.Float64)
    bare = told.update(new.with_columns(s=nothing, c=nothing), known=later.filter(pl.col("time") >= hours(BEGIN + 5)))
    assert bare.equals(full.update(new, known=later))
    assert told.forecast().table.equals(full.forecast().table)
    assert torch.equal(told.buffer.rows.nan_to_num(7e7), full.buffer.rows.nan_to_num(7e7))


def test_static_covariates_come_along(frame) -> None:
    static = pl.DataFrame({"series_id": ["a", "b", "c"], "size": [1.0, -2.0, 5.0]})
    sized = SeriesFrame(frame.table, replace(frame.schema, static=("size",)), static)
    small = {"name": "s4", "d_model": 8, "d_state": 8, "num_layers": 1}
    artifact = untrained(sized, small)
    for mode in ("window", "carried"):
        stream = Stream.start(artifact, sized, cutoff=hours(BEGIN - 1), mode=mode)
        same(stream, artifact, sized, BEGIN - 1, exact=False)
    stream = Stream.start(artifact, sized, cutoff=hours(BEGIN - 1), mode="window")
    stream.update(rows(sized, BEGIN, BEGIN + 9))
    same(stream, artifact, sized, BEGIN + 8)


def test_coupled_series_share_one_clock(frame) -> None:
    artifact = untrained(frame, {"name": "coupled"})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    same(stream, artifact, frame, BEGIN - 1)
    holed = frame.table.with_columns(
        pl.when((pl.col("series_id") != "b") | (pl.col("time") != hours(BEGIN + 1))).then(pl.col(n)).alias(n)
        for n in ("y", "z")
    )
    late = rows(frame, BEGIN + 1, BEGIN + 2)
    stream.update(rows(frame, BEGIN, BEGIN + 1))
    stream.update(late.filter(pl.col("series_id") != "b"))
    same(stream, artifact, SeriesFrame(holed, frame.schema), BEGIN + 1)
    with pytest.raises(DataError, match="1 of 1 new rows do not come after the last row of the stream"):
        stream.update(late.filter(series_id="b"))
    scores = stream.update(rows(frame, BEGIN + 2, BEGIN + 5))
    truth = predict(artifact, SeriesFrame(holed, frame.schema), cutoff=hours(BEGIN + 3)).table.filter(step=1)
    both = scores.join(truth, on=["series_id", "time", "variate"])
    assert np.allclose(both["expected"], both["mean"], atol=1e-5)
    with pytest.raises(ModelError, match="couples series"):
        stream.add(frame)


def silenced(frame: SeriesFrame, series: str, start: int, stop: int) -> SeriesFrame:
    """Return the frame with a series that shows nothing in hours [start, stop)."""
    there = (pl.col("series_id") != series) | ~pl.col("time").is_between(hours(start), hours(stop - 1))
    return SeriesFrame(
        frame.table.with_columns(pl.when(there).then(pl.col(n)).alias(n) for n in ("y", "z")), frame.schema
    )


@pytest.mark.parametrize("model", ["coupled", "coupled_smoother"])
def test_a_coupled_series_with_nothing_observed_gets_no_forecast(frame, caplog, model: str) -> None:
    artifact = untrained(frame, {"name": model})
    silent = silenced(frame, "b", BEGIN - 48, BEGIN + 60)
    stream = Stream.start(artifact, silent, cutoff=hours(BEGIN - 1))
    assert stream.blind() == ("b",)
    caplog.clear()
    with caplog.at_level("WARNING", logger="tsforge"):
        found = stream.forecast().table
    assert found["series_id"].unique().sort().to_list() == ["a", "c"]
    message = "no forecast for 1 of 3 windows (1 series: b): no observed target in the 48 rows up to the cutoff"
    assert caplog.messages == [message]
    same(stream, artifact, silent, BEGIN - 1)
    assert stream.forecast(series=["b", "c"]).table["series_id"].unique().to_list() == ["c"]
    with pytest.raises(DataError, match=r"1 of 1 series have no observed target in the last 48 rows \(b\)"):
        stream.forecast(series=["b"])
    parts = [stream.update(rows(silent, BEGIN + at, BEGIN + at + count)) for at, count in ((0, 1), (1, 59), (60, 20))]
    scores = pl.concat(parts).filter(series_id="b")
    assert scores["time"].min() == hours(BEGIN + 60)
    first = scores.filter(time=hours(BEGIN + 60))
    assert first["expected"].null_count() == first.height == 2  # the row that ends the silence is not judged by others
    assert scores.filter(pl.col("time") > hours(BEGIN + 60))["expected"].null_count() == 0
    assert pl.concat(parts).filter(pl.col("series_id") != "b")["expected"].null_count() == 0
    assert stream.blind() == ()
    assert stream.forecast().table["series_id"].n_unique() == 3


def test_what_was_seen_before_a_row_by_a_loop(frame) -> None:
    artifact = untrained(frame, {"name": "coupled"})
    holed = silenced(silenced(frame, "b", BEGIN - 30, BEGIN + 40), "c", BEGIN - 90, BEGIN - 2)
    stream = Stream.start(artifact, holed, cutoff=hours(BEGIN - 1))
    new = rows(silenced(holed, "c", BEGIN + 5, BEGIN + 80), BEGIN, BEGIN + 70)
    taken = collect_rows(new, stream.buffer.place)
    found = stream.buffer.seen_before(taken)
    both = pl.concat([rows(holed, BEGIN - 60, BEGIN), new])
    expected = []
    for owner, done in zip(taken.owner.tolist(), taken.done.tolist(), strict=True):
        mine = both.filter(series_id=stream.series[owner])
        span = mine.filter(pl.col("time").is_between(hours(BEGIN + done - 48), hours(BEGIN + done - 1)))
        expected.append(span["y"].count() + span["z"].count() > 0)
    assert found.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_judged_values_are_scored_though_the_model_does_not_see_them(frame, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    stream, blind = (Stream.start(artifact, frame, cutoff=hours(BEGIN - 1)) for _ in range(2))
    raw = rows(frame, BEGIN, BEGIN + 5).with_columns(
        pl.when((pl.col("series_id") == "a") & (pl.col("time") == hours(BEGIN + 2)))
        .then(1e40)
        .otherwise("y")
        .alias("y")
    )
    masked = raw.with_columns(pl.when(pl.col("y") < 100).then(pl.col("y")).alias("y"))
    scores, plain = stream.update(masked, judged=raw), blind.update(masked)
    assert scores.height == plain.height + 1
    top = scores.sort("score").row(-1, named=True)
    assert (top["series_id"], top["variate"], top["time"], top["outside"]) == ("a", "y", hours(BEGIN + 2), True)
    assert stream.forecast().table.equals(blind.forecast().table)
    with pytest.raises(DataError, match="beyond"):
        stream.update(rows(frame, BEGIN + 5, BEGIN + 6).with_columns(y=1e40))


def test_new_series_join_when_they_have_enough_rows(frame, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    for model in (artifact, untrained(frame, {"name": "smoother"})):
        stream = Stream.start(model, frame.select_series(["a", "c"]), cutoff=hours(BEGIN - 1))
        stream.update(rows(frame, BEGIN, 300).filter(pl.col("series_id").is_in(["a", "c"])))
        before = stream.forecast().table
        table = frame.table.filter(pl.col("time") < hours(300)).with_columns(
            pl.col("series_id").replace({"a": "new", "c": "short"})
        )
        few = table.filter((pl.col("series_id") != "short") | (pl.col("time") >= hours(290)))
        assert set(stream.add(SeriesFrame(few, frame.schema))) == {"b", "new"}
        assert stream.series == ("a", "b", "c", "new")
        assert stream.add(SeriesFrame(few, frame.schema)) == ()
        for name in ("b", "new"):
            alone = predict(model, SeriesFrame(few.filter(series_id=name), frame.schema), cutoff=hours(299)).table
            assert np.allclose(stream.forecast().table.filter(series_id=name)["mean"], alone["mean"], atol=1e-4)
        known_before = stream.forecast().table.filter(pl.col("series_id").is_in(["a", "c"]))
        assert known_before.equals(before)
        stream.update(rows(frame, 300, 310).filter(pl.col("series_id").is_in(["a", "b", "c"])))
        assert stream.ends().filter(series_id="new")["time"].item() == hours(299)


BAD = [
    (lambda t: t.drop("z"), r"the new rows lack column\(s\) z"),
    (
        lambda t: t.with_columns(series_id=pl.lit("zz")),
        r"15 of 15 new rows belong to 1 series that are not in the stream",
    ),
    (lambda t: t.with_columns(pl.col("time") - timedelta(hours=3)), r"9 of 15 new rows do not come after"),
    (lambda t: t.with_columns(pl.col("time") + timedelta(minutes=30)), r"15 of 15 times lie off the grid"),
    (lambda t: pl.concat([t, t.head(2)]), r"duplicate times \(2 extra rows"),
    (lambda t: t.with_columns(y=pl.when(pl.col("series_id") == "b").then(np.inf).otherwise("y")), r"5 infinite value"),
    (lambda t: t.with_columns(y=pl.lit(1e39)), r"beyond"),
    (lambda t: t.with_columns(y=pl.lit("warm")), r"not numeric"),
    (lambda t: t.with_columns(pl.col("time") + timedelta(days=50_000)), r"wrong time"),
    (lambda t: t.with_columns(time=pl.int_range(pl.len())), r"does not fit freq"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("model", ["linear", "smoother"])
def test_bad_rows_leave_the_stream_as_it_was(frame, make_artifact, model: str, spoil: Any, message: str) -> None:
    artifact = make_artifact("linear") if model == "linear" else untrained(frame, {"name": "smoother"})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    before = {name: tensor.clone() for name, tensor in stream.tensors().items()}
    with pytest.raises(DataError, match=message):
        stream.update(spoil(rows(frame, BEGIN, BEGIN + 5)))
    for name, tensor in stream.tensors().items():
        assert torch.equal(tensor.nan_to_num(7e7), before[name].nan_to_num(7e7)), name


def test_a_forecast_that_is_not_finite_leaves_the_stream_as_it_was(frame) -> None:
    artifact = untrained(frame, {"name": "smoother", "weight": 1e30}, scaling={"kind": "none"})
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1), mode="window")
    stream.carried = None
    before = stream.ends()
    with pytest.raises(ModelError, match="not finite"):
        stream.update(rows(frame, BEGIN, BEGIN + 5))
    assert stream.ends().equals(before)


def test_settings_that_do_not_fit_are_refused(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    with pytest.raises(ModelError, match="cannot be carried"):
        Stream.start(artifact, frame, mode="carried")
    with pytest.raises(ConfigError, match="mode 'carried'"):
        Stream.start(artifact, frame, restart_every=5)
    with pytest.raises(ConfigError, match="at least 1"):
        Stream.start(untrained(frame, {"name": "smoother"}), frame, restart_every=0)
    with pytest.raises(DataError, match="fewer than 48 rows"):
        Stream.start(artifact, frame, cutoff=hours(40))
    with pytest.raises(ConfigError, match="points only"):
        Stream.start(artifact, frame).forecast((0.1, 0.9))
    with pytest.raises(DataError, match="unknown series"):
        Stream.start(artifact, frame).forecast(series=["d"])


def test_a_blind_window_is_named_and_can_be_left_out(frame, make_artifact) -> None:
    stream = Stream.start(make_artifact("linear"), frame, cutoff=hours(BEGIN - 1))
    silent = pl.DataFrame({"series_id": ["b"], "time": [hours(BEGIN + 60)], "y": [None], "z": [None]})
    stream.update(silent.with_columns(pl.col("y", "z").cast(pl.Float64)))
    assert stream.buffer.blind() == ("b",)
    with pytest.raises(DataError, match=r"1 of 3 series have no observed target in the last 48 rows \(b\)"):
        stream.forecast()
    assert stream.forecast(series=["a", "c"]).table["series_id"].unique().sort().to_list() == ["a", "c"]
    scores = stream.update(rows(frame, BEGIN + 61, BEGIN + 63)).filter(series_id="b", variate="y")
    assert scores["expected"].is_not_null().to_list() == [False, True]  # the first after it compares with nothing
    assert scores["score"].null_count() == 2  # no calibration, no interval
    assert scores["value"].null_count() == 0


@pytest.mark.parametrize("model", ["linear", "smoother"])
def test_memory_is_constant(frame, make_artifact, model: str) -> None:
    artifact = make_artifact("linear") if model == "linear" else untrained(frame, {"name": "smoother"})
    stream = Stream.start(artifact, frame)
    size = stream.num_bytes()
    ends = dict(stream.ends().iter_rows())
    base = pl.DataFrame(
        {"series_id": list(ends), "time": list(ends.values()), "y": [1.0, 2.0, 3.0], "z": [0.0, 1.0, 2.0]}
    )
    for count in range(1, 1001):
        if count % 10:
            continue
        moved = [base.with_columns(pl.col("time") + timedelta(hours=count - 9 + k)) for k in range(10)]
        stream.update(pl.concat(moved))
    assert stream.num_bytes() == size
    assert stream.ends()["time"].to_list() == [end + timedelta(hours=1000) for end in ends.values()]


@pytest.mark.parametrize("settings", [{"name": "linear"}, {"name": "smoother"}])
def test_a_stored_stream_goes_on_bit_for_bit(frame, make_artifact, tmp_path: Path, settings: dict[str, Any]) -> None:
    artifact = make_artifact(settings) if settings["name"] == "linear" else untrained(frame, settings)
    artifact = calibrated(artifact, frame)
    restart = 7 if settings["name"] == "smoother" else None
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1), restart_every=restart)
    stream.about = {"revision": 3}
    stream.update(rows(frame, BEGIN, BEGIN + 20))
    stream.save(tmp_path / "state.safetensors")
    other = Stream.load(tmp_path / "state.safetensors", artifact)
    assert (other.about, other.mode, other.restart_every) == ({"revision": 3}, stream.mode, restart)
    for place in (BEGIN + 20, BEGIN + 21):
        assert stream.update(rows(frame, place, place + 1)).equals(other.update(rows(frame, place, place + 1)))
    assert stream.forecast().table.equals(other.forecast().table)


def test_foreign_damaged_and_newer_states_are_refused(frame, make_artifact, tmp_path: Path) -> None:
    artifact = make_artifact("linear")
    path = tmp_path / "state.safetensors"
    Stream.start(artifact, frame).save(path)
    with pytest.raises(ArtifactError, match="holds the stream of artifact"):
        Stream.load(path, replace(artifact, id="other"))
    with pytest.raises(ArtifactError, match=r"does not fit artifact .* start the stream anew"):
        Stream.load(path, replace(make_artifact("linear", context_length=24), id=artifact.id))
    content = path.read_bytes()
    for spoiled in (content[:-9], content[:-30] + b"\x01" + content[-29:], b"nothing"):
        path.write_bytes(spoiled)
        with pytest.raises(ArtifactError, match="damaged"):
            Stream.load(path, artifact)
    with pytest.raises(ArtifactError, match="there is no"):
        Stream.load(tmp_path / "none", artifact)


def test_a_newer_format_is_refused(frame, make_artifact, tmp_path: Path) -> None:
    artifact = make_artifact("linear")
    Stream.start(artifact, frame).save(tmp_path / "state")
    tensors, facts = load_tensor_file(tmp_path / "state")
    save_tensor_file(tmp_path / "state", tensors, {**facts, "format_version": 4})
    with pytest.raises(ArtifactError, match=r"newer tsforge \(stream format 4, this one reads up to 3\)"):
        Stream.load(tmp_path / "state", artifact)
    for version in (0, -5, True, "1", None):
        save_tensor_file(tmp_path / "state", tensors, {**facts, "format_version": version})
        with pytest.raises(ArtifactError, match=r"is damaged: it states no valid format version .*; start the stream"):
            Stream.load(tmp_path / "state", artifact)
