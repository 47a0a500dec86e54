"""Calibration methods, pooling, labels and weights: exact coverage of small samples, tails not swapped, fallbacks."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import load_artifact, save_artifact
from tsforge.core.errors import ConfigError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal import (
    CALIBRATION_SCHEMA,
    Buckets,
    Pool,
    apply_calibration,
    calibration_table,
    make_buckets,
)
from tsforge.forecasting.conformal_buckets import Origins
from tsforge.forecasting.conformal_calibration import Choices, calibrate, score_kind
from tsforge.forecasting.conformal_scores import bucket_margins, conformal_rank, interval_scores
from tsforge.forecasting.predict import predict

LEVELS = (0.1, 0.5, 0.9)
START = datetime(2024, 1, 1)


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Skewed targets around 0 with quantiles that are wrong on purpose: target, mean, quantiles, scale."""
    rng = np.random.default_rng(seed)
    target = rng.exponential(1.0, (count, 1, 1)) - 1.0
    mean = np.zeros_like(target)
    spread = rng.uniform(0.5, 1.5, target.shape)
    quantiles = np.stack([-0.4 * spread, mean, 0.8 * spread], axis=-1)
    return target, mean, quantiles, np.ones((count, 1))


def exact_coverage(score: str, count: int) -> float:
    """Expected coverage of an 80 % interval from ``count`` exchangeable scores without ties; 1 when it is infinite."""
    if score in ("asymmetric", "cqr_asymmetric"):
        rank = conformal_rank(count, 0.9)
        return 1.0 if rank > count else 1.0 - 2.0 * (1.0 - rank / (count + 1))
    rank = conformal_rank(count, 0.8)
    return 1.0 if rank > count else rank / (count + 1)


@pytest.mark.parametrize("count", [3, 4, 7, 9, 19, 24])
@pytest.mark.parametrize("score", ["absolute", "asymmetric", "cqr", "cqr_asymmetric", "scaled"])
def test_small_samples_cover_exactly_what_their_ranks_say(score: str, count: int) -> None:
    """One column a trial, by simulation; no method falls below nominal, none collapses when scores are too few."""
    trials = 6000
    target, mean, quantiles, scale = sample(count * trials, count)
    needs = score in ("cqr", "cqr_asymmetric", "scaled")
    scores = interval_scores(target, mean, quantiles if needs else None, LEVELS, scale, score=score)
    columns = scores.reshape(count, trials, 1, *scores.shape[3:]).transpose(0, 2, 1, *range(3, scores.ndim))
    variates = [str(number) for number in range(trials)]
    table = calibration_table(columns, np.ones((count, 1, trials), dtype=bool), LEVELS, variates, score)
    fresh, mean, quantiles, scale = sample(trials, 10_000 + count)
    shape = (1, 1, trials)
    found = apply_calibration(
        table,
        mean.reshape(shape),
        quantiles.reshape(*shape, 3) if needs else None,
        LEVELS,
        scale.reshape(1, -1),
        variates,
    )
    y = fresh.reshape(shape)
    covered = float(((found[..., 0] <= y) & (y <= found[..., 2])).mean())
    exact = exact_coverage(score, count)
    assert covered == pytest.approx(exact, abs=4 * math.sqrt(0.16 / trials) + 1e-12)
    assert exact >= 0.8
    assert (table["status"] == "too_few").all() == (exact == 1.0)


@pytest.mark.parametrize("points", [True, False])
def test_each_side_of_skewed_noise_gets_its_own_margin(points: bool) -> None:
    """Errors reach from -1 to far above 0: the lower side is short, the upper long, each tail misses 10 %."""
    target, mean, _, scale = sample(4000, 0)
    given = None if points else np.stack([mean - 0.1, mean, mean + 0.1], axis=-1)
    score = score_kind("cqr_asymmetric", has_distribution=not points)
    scores = interval_scores(target, mean, given, LEVELS, scale, score=score)
    table = calibration_table(scores, np.ones(target.shape, dtype=bool), LEVELS, ("y",), score)
    fresh = sample(20_000, 1)[0]
    base = np.zeros_like(fresh)
    given = None if points else np.stack([base - 0.1, base, base + 0.1], axis=-1)
    found = apply_calibration(table, base, given, LEVELS, np.ones((len(fresh), 1)), ("y",))
    assert found[0, 0, 0, 0] == pytest.approx(math.log(1 / 0.9) - 1.0, abs=0.05)  # quantiles of Exp(1) - 1
    assert found[0, 0, 0, 2] == pytest.approx(math.log(10.0) - 1.0, abs=0.15)
    assert (fresh < found[..., 0]).mean() == pytest.approx(0.1, abs=0.02)
    assert (fresh > found[..., 2]).mean() == pytest.approx(0.1, abs=0.02)


def test_margins_of_many_buckets_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    scores, codes = rng.normal(size=(60, 5)), rng.integers(-1, 4, (60, 5))
    weights = rng.uniform(0.2, 1.0, 60)
    for given in (None, weights):
        margin, count = bucket_margins(scores, codes, 4, 0.7, given)
        for bucket in range(4):
            for column in range(5):
                kept = sorted((scores[row, column], weights[row]) for row in range(60) if codes[row, column] == bucket)
                assert count[bucket, column] == len(kept)
                mass = [1.0 if given is None else weight for _, weight in kept]
                reached = 0.0
                expected = math.inf
                for (score, _), part in zip(kept, mass, strict=True):
                    reached += part
                    if reached >= 0.7 * (sum(mass) + 1.0) - 1e-9:
                        expected = score
                        break
                assert margin[bucket, column] == expected


def test_weights_follow_the_newest_errors() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(400, 1, 1)) * np.where(np.arange(400) < 200, 1.0, 3.0)[:, None, None]
    scores = interval_scores(target, np.zeros_like(target), None, LEVELS, np.ones((400, 1)))
    mask = np.ones(target.shape, dtype=bool)
    even = calibration_table(scores, mask, LEVELS, ("y",), "absolute")["high"][0]
    recent = calibration_table(
        scores, mask, LEVELS, ("y",), "absolute", weights=np.exp2((np.arange(400) - 399) / 40.0)
    )["high"][0]
    assert even < 3.2 < recent
    assert recent == pytest.approx(3.0 * 1.2816, rel=0.25)


def test_pooling_over_steps_makes_few_windows_enough() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(3, 8, 2))
    scores = interval_scores(target, np.zeros_like(target), None, LEVELS, np.ones((3, 2)))
    mask = np.ones(target.shape, dtype=bool)
    mask[0, 0, 1] = False
    alone = calibration_table(scores, mask, LEVELS, ("a", "b"), "absolute")
    pooled = calibration_table(scores, mask, LEVELS, ("a", "b"), "absolute", pool="horizon")
    assert set(alone["status"]) == {"too_few"}
    assert set(pooled["status"]) == {"ok"}
    assert pooled.filter(variate="b")["n"].unique().to_list() == [23]
    expected = np.sort(np.abs(target[..., 0]).ravel())[conformal_rank(24, 0.8) - 1]
    assert pooled.filter(variate="a")["high"].unique().to_list() == [expected]


@pytest.mark.parametrize("score", ["absolute", "asymmetric"])
def test_all_steps_stand_in_where_one_has_too_few_scores(score: str) -> None:
    """11 windows of 4 steps: enough alone for 80 % (9 of ranks up to 11), not for 95 %; one cell has 3 scores only."""
    levels = (0.025, 0.1, 0.5, 0.9, 0.975)
    rng = np.random.default_rng(0)
    target = rng.normal(size=(11, 4, 2)) * np.array([1.0, 2.0, 3.0, 4.0])[:, None]
    mask = np.ones(target.shape, dtype=bool)
    mask[3:, 1, 1] = False
    scores = interval_scores(target, np.zeros_like(target), None, levels, np.ones((11, 2)), score=score)
    pools: tuple[Pool, ...] = ("step", "horizon", "auto")
    step, horizon, auto = (calibration_table(scores, mask, levels, ("a", "b"), score, pool=pool) for pool in pools)
    keys = ["step", "variate", "level"]
    assert auto.select(keys).equals(step.select(keys))
    kinds = set()
    for alone, pooled, found in zip(*(part.iter_rows(named=True) for part in (step, horizon, auto)), strict=True):
        kinds.add(found["status"])
        if alone["status"] == "ok":
            assert found == alone
        elif pooled["status"] == "ok":
            assert found == pooled | {"step": found["step"], "status": "pooled"}
        else:
            assert found == alone
    assert kinds == ({"ok", "pooled"} if score == "absolute" else {"ok", "pooled", "too_few"})
    fresh = apply_calibration(auto, np.zeros((1, 4, 2)), None, levels, np.ones((1, 2)), ("a", "b"))
    assert (np.diff(fresh, axis=-1) >= 0).all()


def test_a_margin_that_stands_in_is_no_smaller_than_training_windows_ask_for(make_artifact: Any) -> None:
    """Held out is a calm part of a lively series: six windows of twelve steps."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=260) * np.where(np.arange(260) < 240, 3.0, 0.3)
    frame = SeriesFrame.from_wide(pl.DataFrame({"time": np.arange(260), "y": values}), time="time", freq="1i")
    artifact = make_artifact("linear", context_length=8, horizon=12, scaling="global", data=frame.until(239))
    panel, spec, network = Panel.from_frame(frame), artifact.window, artifact.network
    learnt, held_out = WindowDataset(panel, spec, None, 240), WindowDataset(panel, spec, 240, 257)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    alone = calibrate(network, held_out, levels)
    trained = calibrate(network, learnt, levels, choices=Choices(method="absolute", pool="step"))
    table = calibrate(network, held_out, levels, learnt=learnt)
    wide, inner = table.filter(level=0.9), table.filter(level=0.5)
    assert set(wide["status"]) == {"pooled"}
    assert set(inner["status"]) == {"ok"}
    assert wide["high"].to_list() == trained.filter(level=0.9)["high"].to_list()
    assert wide["low"].to_list() == trained.filter(level=0.9)["low"].to_list()
    assert inner.equals(alone.filter(level=0.5))
    assert (wide["high"] > 3 * alone.filter(level=0.9)["high"]).all()
    for choices in (Choices(pool="step"), Choices(pool="horizon")):
        expected = calibrate(network, held_out, levels, choices=choices)
        assert calibrate(network, held_out, levels, choices=choices, learnt=learnt).equals(expected)
    lively = WindowDataset(panel, spec, 100, 117)  # held out is the wilder part: its own margins stay
    calm = WindowDataset(panel, spec, 232, None)
    own = calibrate(network, lively, levels)
    assert calibrate(network, lively, levels, learnt=calm).equals(own)
    split = calibrate(network, held_out, levels, choices=Choices(bucket="volatility"), learnt=learnt)
    fallen = split.filter(pl.col("bucket").is_not_null(), level=0.9)
    assert set(fallen["status"]) == {"fallback"}
    assert fallen.join(wide, on="step")["high"].to_list() == fallen.join(wide, on="step")["high_right"].to_list()


def test_labels_fall_back_on_pooled_margins() -> None:
    rng = np.random.default_rng(1)
    target = rng.normal(size=(3, 5, 1))
    scores = interval_scores(target, np.zeros_like(target), None, LEVELS, np.ones((3, 1)))
    mask = np.ones(target.shape, dtype=bool)
    labels = Buckets(kind="hour", names=("0", "1"), codes=rng.integers(0, 2, target.shape), edges={})
    table = calibration_table(scores, mask, LEVELS, ("y",), "absolute", pool="auto", buckets=labels)
    assert set(table.filter(pl.col("bucket").is_null())["status"]) == {"pooled"}
    split = table.filter(pl.col("bucket").is_not_null())
    assert set(split["status"]) == {"fallback"}
    assert split["high"].is_finite().all()


def make_frame(rows: int = 24 * 60, seed: int = 0) -> SeriesFrame:
    """Two hourly series whose noise is 6 times larger between 12 and 18 o'clock; series b is 3 times larger."""
    rng = np.random.default_rng(seed)
    hour = np.arange(rows)
    loud = np.where((hour % 24 >= 12) & (hour % 24 < 18), 6.0, 1.0)
    parts = []
    for name, size in (("a", 1.0), ("b", 3.0)):
        y = size * loud * rng.normal(size=rows)
        times = [START + timedelta(hours=int(h)) for h in hour]
        parts.append(pl.DataFrame({"series_id": [name] * rows, "time": times, "y": y}))
    return SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["y"])


def calibrated(make_artifact: Any, frame: SeriesFrame, **choices: Any) -> Any:
    artifact = make_artifact("linear", scaling="global", data=frame.until(START + timedelta(hours=399)))
    windows = WindowDataset(Panel.from_frame(frame), artifact.window, 400, 1200)
    table = calibrate(artifact.network, windows, LEVELS, choices=Choices(**choices))
    return replace(artifact, calibration=table)


def test_margins_by_hour_cover_every_hour(make_artifact: Any) -> None:
    frame = make_frame()
    cutoffs = np.arange(1199, 1430)

    def by_hour(**choices: Any) -> np.ndarray:
        table = forecasts_at(calibrated(make_artifact, frame, **choices), frame, cutoffs, steps=3, levels=LEVELS)
        known = table.drop_nulls("actual").with_columns(
            inside=pl.col("actual").is_between("q0.1", "q0.9"), loud=pl.col("time").dt.hour().is_between(12, 17)
        )
        return known.group_by("loud").agg(pl.col("inside").mean()).sort("loud")["inside"].to_numpy()

    plain, split = by_hour(), by_hour(bucket="hour")
    assert np.abs(split - 0.8).max() < 0.06
    assert np.abs(plain - 0.8).max() > 0.12


def test_margins_by_series_and_by_volatility_differ_as_the_noise_does(make_artifact: Any) -> None:
    frame = make_frame()
    by_series = calibrated(make_artifact, frame, method="absolute", bucket="series").calibration
    rows = by_series.filter(step=1).sort("bucket", nulls_last=True)
    assert rows["bucket"].to_list() == ["a", "b", None]
    assert rows["high"][1] / rows["high"][0] == pytest.approx(3.0, rel=0.3)
    for kind in ("volatility", "level"):
        artifact = calibrated(make_artifact, frame, method="absolute", bucket=kind)
        table = artifact.calibration
        assert table["by"].unique().to_list() == [kind]
        assert set(table["bucket"].drop_nulls()) == {"low", "middle", "high"}
        assert table.filter(bucket="low")["above"].null_count() == table.filter(bucket="low").height
        predict(artifact, frame)
    loud = calibrated(make_artifact, frame, method="absolute", bucket="volatility").calibration.filter(step=1)
    assert loud.filter(bucket="high")["high"][0] > 2.0 * loud.filter(bucket="low")["high"][0]


def test_small_buckets_fall_back_and_unseen_labels_get_the_margin_over_all(
    make_artifact: Any, caplog: pytest.LogCaptureFixture
) -> None:
    target = np.random.default_rng(0).normal(size=(30, 1, 1))
    scores = interval_scores(target, np.zeros_like(target), None, LEVELS, np.ones((30, 1)))
    codes = np.where(np.arange(30) < 27, 0, 1).reshape(30, 1, 1)
    buckets = Buckets(kind="series", names=("big", "small"), codes=codes, edges={})
    table = calibration_table(scores, np.ones((30, 1, 1), dtype=bool), LEVELS, ("y",), "absolute", buckets=buckets)
    whole = table.filter(pl.col("bucket").is_null())
    small = table.filter(bucket="small")
    assert small["status"].to_list() == ["fallback"]
    assert (small["high"][0], small["n"][0]) == (whole["high"][0], 30)
    assert table.filter(bucket="big")["n"].to_list() == [27]
    frame = make_frame()
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        artifact = calibrated(make_artifact, frame, method="absolute", bucket="month")
    assert "fall back" not in caplog.text
    later = make_frame(24 * 150)  # May: not among the months of the held-out rows
    found = predict(artifact, later, quantile_levels=(0.1, 0.9)).table
    unsplit = artifact.calibration.filter(pl.col("bucket").is_null()).select(list(CALIBRATION_SCHEMA))
    assert predict(replace(artifact, calibration=unsplit), later, quantile_levels=(0.1, 0.9)).table.equals(found)
    seen = START + timedelta(hours=1000)  # February is among them
    split = predict(artifact, frame, cutoff=seen).table
    assert not predict(replace(artifact, calibration=unsplit), frame, cutoff=seen).table.equals(split)


@pytest.mark.parametrize("choices", [{"bucket": "hour"}, {"bucket": "volatility"}, {"method": "scaled"}])
def test_a_stored_calibration_forecasts_the_same_and_future_values_change_nothing(
    make_artifact: Any, tmp_path: Any, choices: dict[str, str]
) -> None:
    frame = make_frame()
    artifact = calibrated(make_artifact, frame, **choices)
    cutoff = START + timedelta(hours=1300)
    before = predict(artifact, frame, cutoff=cutoff).table
    loaded = load_artifact(save_artifact(artifact, tmp_path).path)
    assert predict(loaded, frame, cutoff=cutoff).table.equals(before)
    late = pl.col("time") > pl.lit(cutoff).dt.replace_time_zone("UTC")
    spoiled = SeriesFrame(
        frame.table.with_columns(pl.when(late).then(pl.col("y") * 90.0 + 7.0).otherwise("y").alias("y")), frame.schema
    )
    assert predict(artifact, spoiled, cutoff=cutoff).table.equals(before)
    table = forecasts_at(artifact, frame, np.array([1300]), steps=6, levels=LEVELS).drop("actual")
    assert forecasts_at(artifact, spoiled, np.array([1300]), steps=6, levels=LEVELS).drop("actual").equals(table)
    past = pl.col("time") == pl.lit(cutoff).dt.replace_time_zone("UTC")
    moved = SeriesFrame(
        frame.table.with_columns(pl.when(past).then(pl.col("y") + 500.0).otherwise("y").alias("y")), frame.schema
    )
    assert not predict(artifact, moved, cutoff=cutoff).table.equals(before)


class PeekingOrigins(Origins):
    """A saboteur: its context statistics look over the rows of the horizon."""

    def volatility(self) -> np.ndarray:
        later = Origins(
            panel=self.panel,
            series_index=self.series_index,
            cutoff_index=self.cutoff_index + 6,
            context_length=self.context_length,
        )
        return later.volatility()


def test_context_statistics_equal_a_loop_and_a_peeking_label_is_caught() -> None:
    frame = make_frame(200)
    hole = frame.table.with_columns(
        pl.when(pl.int_range(pl.len()).is_in([50, 51, 260])).then(None).otherwise("y").alias("y")
    )
    panel = Panel.from_frame(SeriesFrame(hole, frame.schema))
    about = {"series_index": np.array([0, 1, 0]), "cutoff_index": np.array([60, 70, 5]), "context_length": 20}
    origins = Origins(panel=panel, **about)
    for number, (series, cutoff) in enumerate(zip(about["series_index"], about["cutoff_index"], strict=True)):
        rows = range(max(0, cutoff - 20), cutoff)
        seen = {row: panel.values[series * 200 + row, 0] for row in rows if panel.observed[series * 200 + row, 0]}
        steps = [(seen[row] - seen[row - 1]) ** 2 for row in seen if row - 1 in seen]
        assert origins.level()[number, 0] == pytest.approx(np.mean(list(seen.values())))
        assert origins.volatility()[number, 0] == pytest.approx(math.sqrt(np.mean(steps)))
    values = panel.values.copy()
    values[60:200] += 1e6 * np.arange(140)[:, None]  # from the first forecast row of the first window on
    spoiled = replace(panel, values=values)
    for kind, leaks in ((Origins, False), (PeekingOrigins, True)):
        before, after = (kind(panel=given, **about).volatility()[0, 0] for given in (panel, spoiled))
        assert (before != after) == leaks


def test_integer_time_streams_and_points_are_refused_where_they_cannot_work(make_artifact: Any) -> None:
    panel = Panel.from_frame(
        SeriesFrame.from_long(
            pl.DataFrame({"series_id": ["a"] * 30, "time": range(30), "y": np.arange(30.0)}),
            time="time",
            series_id="series_id",
            targets=["y"],
        )
    )
    origins = Origins(panel=panel, series_index=np.array([0]), cutoff_index=np.array([10]), context_length=5)
    with pytest.raises(ConfigError, match="has integer time"):
        make_buckets("hour", origins, 2)
    with pytest.raises(ConfigError, match="needs forecast quantiles"):
        score_kind("cqr", has_distribution=False)
    artifact = calibrated(make_artifact, make_frame(), bucket="hour")
    with pytest.raises(ConfigError, match="bucket=hour looks at the windows themselves"):
        apply_calibration(artifact.calibration, np.zeros((1, 6, 1)), None, LEVELS, np.ones((1, 1)), ("y",))


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([0.0, 10.0, 10.0, 10.0], (10.0, 10.0)),  # ties: both edges are one number
        ([0.0, 0.0, 10.0, 10.0, 10.0], (0.0, 10.0)),  # nothing is low
        ([0.0, 0.0, 0.0, 10.0], (0.0, 0.0)),
        ([0.0, 5.0, 5.0, 10.0, 10.0], (5.0, 10.0)),
    ],
)
def test_windows_get_the_margins_of_their_own_third(values: list[float], edges: tuple[float, float]) -> None:
    """The lower the level, the larger the errors, so that a margin says whose it is; a context has one row."""
    level = np.tile(values, 60)
    rows = pl.DataFrame({"time": range(len(level) + 1), "y": [*level, 0.0]})
    panel = Panel.from_frame(SeriesFrame.from_long(rows, time="time", targets=["y"], freq="1i"))
    cutoffs = np.arange(1, len(level) + 1)
    origins = Origins(panel=panel, series_index=np.zeros_like(cutoffs), cutoff_index=cutoffs, context_length=1)
    buckets = make_buckets("level", origins, 1)
    assert buckets is not None
    assert buckets.edges == {"y": pytest.approx(edges)}
    scores = (101.0 - level)[:, None, None, None]
    mask = np.ones((len(level), 1, 1), dtype=bool)
    table = calibration_table(scores, mask, (0.1, 0.9), ["y"], "absolute", buckets=buckets)
    found = apply_calibration(
        table, np.zeros(mask.shape), None, (0.1, 0.9), np.ones((len(level), 1)), ["y"], origins=origins
    )
    split = table.filter(pl.col("bucket").is_not_null())
    margins = dict(split.select("bucket", "high").iter_rows())
    own = [margins[buckets.names[code]] for code in buckets.codes[:, 0, 0]]
    assert found[:, 0, 0, 1].tolist() == own


def test_an_empty_middle_third_keeps_both_edges() -> None:
    """No held-out window lay between the edges; a later one that does is not high."""
    rows = pl.DataFrame({"time": range(4), "y": [1.0, 5.0, 9.0, 0.0]})
    panel = Panel.from_frame(SeriesFrame.from_long(rows, time="time", targets=["y"], freq="1i"))
    cutoffs = np.array([1, 3])
    held_out = Origins(panel=panel, series_index=np.zeros(2, dtype=np.int64), cutoff_index=cutoffs, context_length=1)
    buckets = Buckets(kind="level", names=("high", "low"), codes=np.array([1, 0]).reshape(2, 1, 1), edges={"y": (4, 6)})
    scores = np.array([1.0, 9.0]).reshape(2, 1, 1, 1)
    mask = np.ones((2, 1, 1), dtype=bool)
    table = calibration_table(scores, mask, (0.4, 0.6), ["y"], "absolute", buckets=buckets)
    both = replace(held_out, series_index=np.zeros(3, dtype=np.int64), cutoff_index=np.array([1, 2, 3]))
    found = apply_calibration(table, np.zeros((3, 1, 1)), None, (0.4, 0.6), np.ones((3, 1)), ["y"], origins=both)
    assert found[:, 0, 0, 1].tolist() == [1.0, 1.0, 9.0]
