"""Intervals of a stream that go on learning: a naive loop over batch predictions as oracle, the backtest, any cutting
of the rows, restarts, a planted drift, and what they must not know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from streamed_data import BEGIN, START, calibrated, hours, rows, streaming_models, untrained

from tsforge.artifact import Artifact, load_tensor_file, save_tensor_file
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.conformal_calibration import Choices, calibrate
from tsforge.forecasting.online_backtest import online_forecasts
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.predict import predict
from tsforge.forecasting.stream import Stream
from tsforge.forecasting.stream_online import Learner, OnlineIntervals
from tsforge.network import NetworkConfig

END = 270  # hours streamed up to
ONLINE = OnlineConfig(method="aci", rates=(0.08,), window=25, start=10)
KEYS = ["series_id", "cutoff", "step", "time", "variate"]


@pytest.fixture(autouse=True)
def _models() -> Iterator[None]:
    with streaming_models():
        yield


@pytest.fixture(scope="module")
def drifting(frame) -> SeriesFrame:
    """The frame with missing cells, and with a level that runs away from hour 230 on, so that alpha is exhausted."""
    rng = np.random.default_rng(11)
    hour = (pl.col("time").dt.epoch("s") - int(START.timestamp())) // 3600
    away = pl.when(hour > 230).then(0.4 * (hour - 230)).otherwise(0.0)
    gone = pl.Series(rng.random(frame.num_rows) < 0.06)
    table = frame.table.with_columns(
        pl.when(~gone).then(pl.col("y") + away * rng.choice([-1.0, 1.0])).alias("y"), pl.col("z") + away
    )
    return SeriesFrame(table.filter(hour < 330), frame.schema)


def nested(low: list[float], high: list[float], median: float) -> tuple[list[float], list[float]]:
    """Push bounds outwards from the median; widest first."""
    low, high = list(low), list(high)
    inner_low = inner_high = median
    for place in reversed(range(len(low))):
        low[place] = inner_low = min(low[place], inner_low)
        high[place] = inner_high = max(high[place], inner_high)
    return low, high


def naive(
    artifact: Artifact, frame: SeriesFrame, start: int, stop: int, *, every: int = 1, config: OnlineConfig = ONLINE
) -> dict[tuple[str, str, int, int], tuple[list[float], list[float]]]:
    """Plain ACI over batch predictions from every hour in [start, stop), one cell and one hour at a time.

    Returns low and high bounds (90 %, 50 %) by series, variate, cutoff and step.
    """
    base: dict[tuple[str, str, int, int], Mapping[str, float]] = {}
    for cutoff in range(start, stop):
        for row in predict(artifact, frame, cutoff=hours(cutoff)).table.iter_rows(named=True):
            base[row["series_id"], row["variate"], cutoff, row["step"]] = row
    truth = {}
    for row in frame.table.iter_rows(named=True):
        at = int((row["time"] - START).total_seconds()) // 3600
        truth.update({(row["series_id"], name, at): row[name] for name in ("y", "z")})
    result: dict[tuple[str, str, int, int], tuple[list[float], list[float]]] = {}
    for series, variate, step in sorted({(key[0], key[1], key[3]) for key in base}):
        cells = [{"alpha": 0.1, "scores": [], "names": ("q0.05", "q0.95"), "miss": 0.1}]
        cells += [{"alpha": 0.5, "scores": [], "names": ("q0.25", "q0.75"), "miss": 0.5}]
        waiting: list[dict[str, Any]] = []
        for cutoff in range(start, stop):
            for issued in [item for item in waiting if item["due"] <= cutoff]:
                waiting.remove(issued)
                y, cell = truth.get((series, variate, issued["due"])), issued["cell"]
                if y is None:
                    continue
                low, high = issued["base"]
                if issued["used"]:
                    missed = not issued["low"] <= y <= issued["high"]
                    cell["alpha"] += config.steps[0] * (cell["miss"] - missed)
                cell["scores"].append(max(low - y, y - high) / (high - low))
            row = base[series, variate, cutoff, step]
            lows, highs = [], []
            for cell in cells:
                low, high = (row[name] for name in cell["names"])
                sample = sorted(cell["scores"][-config.window :])
                used = len(sample) >= config.start
                margin = 0.0
                if used:
                    rank = math.ceil(round((len(sample) + 1) * (1.0 - cell["alpha"]), 9))
                    margin = -0.5 if rank <= 0 else math.inf if rank > len(sample) else sample[rank - 1]
                lows.append(low - margin * (high - low))
                highs.append(high + margin * (high - low))
                facts = {"due": cutoff + step, "cell": cell, "base": (low, high), "used": used}
                if cutoff % every == 0:
                    waiting.append({**facts, "low": lows[-1], "high": highs[-1]})
            result[series, variate, cutoff, step] = nested(lows, highs, row["q0.5"])
    return result


def check_scores(scores: pl.DataFrame, truth: Mapping[Any, Any], *, least: int) -> None:
    """Check the intervals of the score table, the 90 % ones one step ahead."""
    infinite = 0
    for row in scores.iter_rows(named=True):
        at = int((row["time"] - START).total_seconds()) // 3600
        low, high = truth[row["series_id"], row["variate"], at - 1, 1]
        assert row["low"] == pytest.approx(low[0], abs=1e-4), row
        assert row["high"] == pytest.approx(high[0], abs=1e-4), row
        assert row["outside"] == (not low[0] <= row["value"] <= high[0])
        assert (row["score"] is None) == math.isinf(high[0])
        infinite += math.isinf(high[0])
    assert infinite >= least, "the case of an exhausted alpha is not in the data"


def check_forecast(table: pl.DataFrame, truth: Mapping[Any, Any], cutoff: int) -> None:
    for row in table.iter_rows(named=True):
        low, high = truth[row["series_id"], row["variate"], cutoff, row["step"]]
        assert [row["q0.05"], row["q0.25"]] == pytest.approx(low, abs=1e-4), row
        assert [row["q0.95"], row["q0.75"]] == pytest.approx(high, abs=1e-4), row


MODELS = {
    "window": ({"name": "linear"}, {}),
    "window_normal": ({"name": "linear"}, {"likelihood": "normal"}),
    "carried": ({"name": "smoother"}, {"restart_every": 1}),
    "coupled": ({"name": "coupled"}, {}),
}


def artifact_of(name: str, frame: SeriesFrame, make_artifact: Any) -> tuple[Artifact, dict[str, Any]]:
    settings, extra = MODELS[name]
    if settings["name"] == "linear":
        return calibrated(make_artifact("linear", extra.get("likelihood", "point")), frame), {}
    return calibrated(untrained(frame, settings), frame), extra


@pytest.mark.parametrize(("name", "every"), [("window", 1), ("window_normal", 3), ("carried", 3), ("coupled", 1)])
def test_intervals_are_those_of_a_loop_over_batch_predictions(
    frame, drifting, make_artifact, name: str, every: int
) -> None:
    artifact, settings = artifact_of(name, frame, make_artifact)
    config = ONLINE if every == 1 else ONLINE.model_copy(update={"start": 9, "window": 12, "rates": (0.3,)})
    truth = naive(artifact, drifting, BEGIN - 1, END, every=every, config=config)
    stream = Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=config, online_every=every, **settings)
    scores = [stream.update(rows(drifting, at, min(at + 40, END))) for at in range(BEGIN, END, 40)]
    check_scores(pl.concat(scores), truth, least=1)
    forecast = stream.forecast()
    check_forecast(forecast.table, truth, END - 1)
    statuses = forecast.metadata["online"]
    assert statuses["adapted"] > 0
    assert sum(statuses.values()) == 3 * 2 * 6 * 2
    assert np.isinf(forecast.table.select("q0.95", "q0.75").to_numpy()).sum() >= statuses["infinite"] > 0


def test_they_are_those_of_the_backtest_at_the_same_cutoffs(frame, drifting, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear", "normal"), frame)
    settings = {"num_cutoffs": 70, "stride": 1, "baselines": [], "regimes": [], "online": ONLINE.model_dump()}
    report = backtest(lambda *_: artifact, drifting, validate(BacktestConfig, settings), horizon=6)
    graded = report.forecasts.filter(model="linear+online")
    first, last = graded["cutoff"].min(), graded["cutoff"].max()
    stream = Stream.start(artifact, drifting, cutoff=first, online=ONLINE)
    scores = stream.update(drifting.table.filter(pl.col("time").is_between(first, last, closed="right")))
    both = scores.join(graded.filter(step=1), on=["series_id", "time", "variate"])
    assert both.height == scores.height > 350
    assert both["low"].equals(both["q0.05"].alias("low"))
    assert both["high"].equals(both["q0.95"].alias("high"))
    assert scores["high"].is_infinite().any()
    mine = stream.forecast().table
    theirs = graded.filter(cutoff=last)
    for column in ("mean", "q0.05", "q0.25", "q0.5", "q0.75", "q0.95"):
        assert mine[column].equals(theirs[column]), column


def cut(table: pl.DataFrame, kind: str) -> list[pl.DataFrame]:
    """Cut rows into updates: one by one, in uneven portions, or one series after the other."""
    if kind == "series":
        return table.sort("series_id", "time").partition_by("series_id", maintain_order=True)
    sizes = [1] * 60 if kind == "single" else [7, 1, 30, 2, 20]
    parts, at = [], BEGIN
    for size in sizes:
        parts.append(rows_of(table, at, at + size))
        at += size
    return parts


def rows_of(table: pl.DataFrame, start: int, stop: int) -> pl.DataFrame:
    return table.filter(pl.col("time").is_between(hours(start), hours(stop - 1)))


def assert_same_state(one: Stream, other: Stream) -> None:
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.double().nan_to_num(7e7), theirs[name].double().nan_to_num(7e7)), name
    assert one.online is not None
    assert other.online is not None
    assert one.online.facts() == other.online.facts()


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *((model, kind) for model in ("seasonal_naive", "smoother") for kind in ("single", "portions", "series")),
        *(("coupled", kind) for kind in ("single", "portions")),  # one clock: rows of one series alone blind the others
    ],
)
def test_any_cutting_and_a_restart_after_every_update_change_nothing(
    frame, drifting, make_artifact, tmp_path: Path, model: str, kind: str
) -> None:
    naive_model = {"name": "seasonal_naive", "season_length": 24}
    artifact = make_artifact(naive_model) if model == "seasonal_naive" else untrained(frame, {"name": model})
    artifact = calibrated(artifact, frame)
    settings: dict[str, Any] = {"restart_every": 7} if model == "smoother" else {}
    tracking = OnlineConfig(window=25, start=10)
    config = ONLINE.model_copy(update={"rates": (0.02, 0.1)}) if model == "smoother" else tracking
    whole, parts = (
        Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=config, online_every=2, **settings)
        for _ in range(2)
    )
    new = rows(drifting, BEGIN, BEGIN + 60)
    at_once = whole.update(new)
    scores = []
    for number, part in enumerate(cut(new, kind)):
        scores.append(parts.update(part))
        if kind != "single" or number % 10 == 0:
            parts.save(tmp_path / "state")
            parts = Stream.load(tmp_path / "state", artifact)
    order = ["series_id", "time", "variate"]
    assert at_once.sort(order).equals(pl.concat(scores).sort(order))
    assert_same_state(whole, parts)
    assert whole.forecast().table.equals(parts.forecast().table)
    assert (
        at_once["low"] != Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), **settings).update(new)["low"]
    ).any(), "nothing was adapted"


class Early(Learner):
    """A saboteur: looks at a row before it issues the intervals from the row before."""

    def _learn(self, rows: Any) -> None:
        self._take(self.new.owner.numpy()[rows], self.new.done.numpy()[rows] + 1, int(self.cutoff[rows[0]]) + 1)


class Peeking(Learner):
    """A saboteur: shows the interval of a row as it is once the row was looked at."""

    def _issue(self, found: Any, rows: Any, waits: bool) -> Any:
        super()._issue(found, rows, waits)
        self._take(self.new.owner.numpy()[rows], self.new.done.numpy()[rows] + 1, int(self.cutoff[rows[0]]) + 1)
        return super()._issue(found, rows, False)


def changed_by_the_future(frame: SeriesFrame, artifact: Artifact) -> tuple[bool, bool]:
    """Whether intervals change when every value from hour 250 on does: those shown up to then, those that wait."""
    late = pl.col("time") >= hours(250)
    other = frame.table.with_columns(pl.when(late).then(pl.col(n) * 9.0 + 50.0).otherwise(n).alias(n) for n in "yz")
    shown, waiting = [], []
    for data in (frame, SeriesFrame(other, frame.schema)):
        stream = Stream.start(artifact, data, cutoff=hours(210), online=ONLINE)
        scores = stream.update(rows(data, 211, 253)).filter(pl.col("time") <= hours(250))
        shown.append(scores.select("series_id", "time", "variate", "expected", "low", "high"))
        assert stream.online is not None
        assert stream.online.state.pending is not None
        waiting.append(stream.online.state.pending.filter(pl.col("cutoff") < hours(250)))
        assert waiting[-1]["adapted"].any()
    return not shown[0].equals(shown[1]), not waiting[0].equals(waiting[1])


@pytest.mark.parametrize("model", ["linear", "smoother"])
def test_the_future_changes_no_interval_and_saboteurs_are_caught(
    frame, make_artifact, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    artifact = make_artifact("linear") if model == "linear" else untrained(frame, {"name": "smoother"})
    artifact = calibrated(artifact, frame)
    assert changed_by_the_future(frame, artifact) == (False, False)
    for saboteur, caught in ((Early, (False, True)), (Peeking, (True, False))):
        monkeypatch.setattr("tsforge.forecasting.stream.Learner", saboteur)
        assert changed_by_the_future(frame, artifact) == caught


def drift(seed: int, count: int = 8, size: int = 860) -> SeriesFrame:
    """Series of a daily wave and noise, which is 2.5 times as large from hour 560 on."""
    rng = np.random.default_rng(seed)
    hour = np.arange(size)
    parts = []
    for number in range(count):
        noise = rng.normal(0, 0.3, size) * np.where(hour >= 560, 2.5, 1.0)
        stamps = [START + timedelta(hours=int(item)) for item in hour]
        values = 10.0 * number + 2.0 * np.sin(2 * np.pi * hour / 24) + noise
        parts.append(pl.DataFrame({"series_id": [f"s{number}"] * size, "time": stamps, "y": values}))
    return SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["y"])


def test_coverage_comes_back_after_a_planted_drift_and_the_static_one_does_not() -> None:
    frame = drift(5)
    early = frame.until(hours(399))
    window = WindowSpec(context_length=24, horizon=2)
    artifact = fit_solved(early, validate(NetworkConfig, {"model": {"name": "linear"}}), window)
    held_out = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), window, 400, 500)
    table = calibrate(artifact.network, held_out, (0.1, 0.5, 0.9), choices=Choices(method="absolute"))
    artifact = replace(artifact, calibration=table)
    new = rows(frame, 500, 860)
    missed = {}
    for name, online in (("static", None), ("online", OnlineConfig())):
        stream = Stream.start(artifact, frame, cutoff=hours(499), online=online)
        scores = stream.update(new)
        after = scores.filter(pl.col("time") >= hours(660))  # a hundred rows to forget the calm
        missed[name] = after["outside"].mean()
    spread = 3.0 * math.sqrt(0.2 * 0.8 / after.height)  # three standard errors of a binomial share
    assert abs(missed["online"] - 0.2) <= spread
    assert missed["static"] > 0.2 + 5 * spread


def test_missing_and_hidden_values_teach_nothing(frame, drifting, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    new = rows(drifting, BEGIN, BEGIN + 30)
    wild = pl.col("time") == hours(BEGIN + 10)
    hidden = new.with_columns(pl.when(~wild).then(pl.col("y")).alias("y"))
    streams = [Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=ONLINE) for _ in range(2)]
    raw = new.with_columns(pl.when(wild).then(9e9).otherwise("y").alias("y"))
    scores = streams[0].update(hidden, judged=raw)
    streams[1].update(hidden)
    assert_same_state(*streams)
    assert scores.filter(value=9e9)["outside"].all()
    online = streams[0].online
    assert online is not None
    counts = online.state.cells.with_columns(count=pl.Series(online.state.count)).filter(step=1, level=0.9)
    observed = (
        hidden.group_by("series_id")
        .agg(pl.col("y", "z").count())
        .unpivot(index="series_id", variable_name="variate", value_name="observed")
    )
    both = counts.join(observed, on=["series_id", "variate"])
    assert both.height == 6
    assert both["count"].cast(pl.Int64).equals(both["observed"].cast(pl.Int64).alias("count"))


def test_memory_is_bounded_also_where_nothing_is_observed(frame, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    stream = Stream.start(artifact, frame.until(hours(299)), online=ONLINE)
    base = pl.DataFrame({"series_id": ["a", "b", "c"], "y": [1.0, 2.0, 3.0], "z": [0.0, 1.0, 2.0]})

    def run(first: int, count: int, *, observed: bool = True) -> int:
        table = base if observed else base.with_columns(pl.lit(None, dtype=pl.Float64).alias(n) for n in "yz")
        stream.update(pl.concat([table.with_columns(time=hours(first + k)) for k in range(count)]))
        assert stream.online is not None
        return stream.online.summary()["waiting"]

    # from the six cutoffs up to the row before the last: what lies after the last row
    outstanding = 3 * 2 * 2 * sum(range(1, 6))
    assert run(300, 45) == outstanding
    size = stream.num_bytes()
    assert run(345, 30) == outstanding
    assert stream.num_bytes() == size
    blind = run(375, 20, observed=False)
    assert outstanding < blind <= 3 * 2 * 2 * 6 * 13, "they wait for a horizon more, then they are given up"
    assert stream.online is not None
    given_up = stream.online.summary()["given_up"]
    assert given_up > 0
    run(395, 300, observed=False)  # nothing seen in a whole context: no forecast to learn from
    assert stream.online.summary()["waiting"] == 0
    assert stream.num_bytes() < size


def test_a_series_that_joins_learns_for_itself(frame, drifting, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    two = drifting.select_series(["b", "c"])
    stream = Stream.start(artifact, two, cutoff=hours(BEGIN - 1), online=ONLINE)
    alone = Stream.start(artifact, two, cutoff=hours(BEGIN - 1), online=ONLINE)
    early = rows(two, BEGIN, BEGIN + 30)
    stream.update(early)
    alone.update(early)
    assert stream.add(drifting.select_series(["a"]).until(hours(BEGIN + 29))) == ("a",)
    scores = stream.update(rows(drifting, BEGIN + 30, BEGIN + 60))
    expected = alone.update(rows(two, BEGIN + 30, BEGIN + 60))
    assert scores.filter(pl.col("series_id") != "a").equals(expected)
    assert scores.filter(series_id="a").height > 0
    fresh = Stream.start(artifact, drifting.select_series(["a"]), cutoff=hours(BEGIN + 29), online=ONLINE)
    assert scores.filter(series_id="a").equals(
        fresh.update(rows(drifting, BEGIN + 30, BEGIN + 60).filter(series_id="a"))
    )


def test_coupled_series_may_share_cells(frame, drifting) -> None:
    artifact = calibrated(untrained(frame, {"name": "coupled"}), frame)
    stop = BEGIN + 50
    config = ONLINE.model_copy(update={"pool": "series"})
    stream = Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=config)
    for at in range(BEGIN, stop, 33):
        stream.update(rows(drifting, at, min(at + 33, stop)))
    actual = drifting.table.unpivot(
        ["y", "z"], index=["series_id", "time"], variable_name="variate", value_name="actual"
    )
    tables = [predict(artifact, drifting, cutoff=hours(at)).table for at in range(BEGIN - 1, stop)]
    table = pl.concat(tables).join(actual, on=["series_id", "time", "variate"], how="left", maintain_order="left")
    expected, _ = online_forecasts(table, OnlineConformal(config))
    expected = expected.filter(cutoff=hours(stop - 1))
    mine = stream.forecast().table
    for column in ("q0.05", "q0.25", "q0.75", "q0.95"):
        assert np.allclose(mine[column], expected[column], rtol=1e-5, atol=1e-4), column


def test_known_covariates_must_reach_over_the_horizon(frame) -> None:
    hour = pl.col("time").dt.hour() / 24 * 2 * np.pi
    table = frame.table.with_columns(s=hour.sin())
    known = SeriesFrame(table, replace(frame.schema, known=("s",)))
    artifact = calibrated(untrained(known, {"name": "smoother"}), known)
    later = known.table.select("series_id", "time", "s")

    def start() -> Stream:
        return Stream.start(artifact, known.until(hours(BEGIN - 1)), online=ONLINE, mode="window")

    stream, whole = start(), start()
    message = r"missing over the horizon of 15 of 30 of them \(first: 'a' at 2024-01-08 22:00"
    with pytest.raises(DataError, match=message):
        stream.update(rows(known, BEGIN, BEGIN + 10))
    assert_same_state(stream, start())
    for at in range(BEGIN, BEGIN + 40):
        stream.update(rows(known, at, at + 1), known=rows_of(later, at + 1, at + 7))
    whole.update(rows(known, BEGIN, BEGIN + 40), known=later)
    assert_same_state(stream, whole)
    assert whole.online is not None
    assert whole.online.summary()["adapted"] > 0


BAD = {
    "late": lambda t: t.with_columns(pl.col("time") - timedelta(hours=3)),
    "not finite": lambda t: t.with_columns(y=pl.when(pl.col("series_id") == "b").then(np.inf).otherwise("y")),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused_rows_leave_what_was_learned_as_it_was(frame, drifting, make_artifact, kind: str) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    streams = [Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=ONLINE) for _ in range(2)]
    for stream in streams:
        stream.update(rows(drifting, BEGIN, BEGIN + 20))
    with pytest.raises(DataError):
        streams[0].update(BAD[kind](rows(drifting, BEGIN + 20, BEGIN + 25)))
    assert_same_state(*streams)


def test_a_failure_on_the_way_leaves_what_was_learned_as_it_was(
    frame, drifting, make_artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    streams = [Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=ONLINE) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streams[0].update(rows(drifting, BEGIN, BEGIN + 20))
    assert_same_state(*streams)


def test_a_forecast_shows_the_levels_asked_for_and_learns_nothing(frame, drifting, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    streams = [Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=ONLINE) for _ in range(2)]
    for stream in streams:
        stream.update(rows(drifting, BEGIN, BEGIN + 30))
    every = streams[0].forecast().table
    some = streams[0].forecast((0.05, 0.95), series=["c"])
    assert some.quantile_levels == (0.05, 0.95)
    assert some.table.columns == [*KEYS, "mean", "q0.05", "q0.95"]
    alone = every.filter(series_id="c")
    assert some.table.select(KEYS).equals(alone.select(KEYS))
    for name in ("mean", "q0.05", "q0.95"):
        assert np.allclose(some.table[name], alone[name], atol=1e-5), name
    assert streams[0].forecast(()).metadata["online"] is None
    assert_same_state(*streams)
    free = make_artifact("linear", "normal")
    stream = Stream.start(free, drifting, cutoff=hours(BEGIN - 1), online=ONLINE)
    with pytest.raises(ConfigError, match=r"quantile level\(s\) 0.01 are not adapted online; choose among"):
        stream.forecast((0.01, 0.5))


def test_settings_that_cannot_learn_are_refused(frame, make_artifact) -> None:
    point, fitted = make_artifact("linear"), calibrated(make_artifact("linear"), frame)
    with pytest.raises(ConfigError, match=r"has none one step ahead \(it offers the levels none\); calibrate"):
        Stream.start(point, frame, online=ONLINE)
    with pytest.raises(ConfigError, match="online_every is 0"):
        Stream.start(fitted, frame, online=ONLINE, online_every=0)
    with pytest.raises(ConfigError, match=r"pool=series needs one clock"):
        Stream.start(fitted, frame, online=OnlineConfig(pool="series"))
    jumping = calibrated(untrained(frame, {"name": "smoother", "elapsed": True}), frame)
    assert Stream.start(jumping, frame).mode == "carried"
    assert Stream.start(jumping, frame, online=ONLINE).mode == "window"
    with pytest.raises(
        ConfigError, match="carried in jumps over rows without values; start the stream with mode=window"
    ):
        Stream.start(jumping, frame, online=ONLINE, mode="carried")


def test_states_with_and_without_are_told_apart(frame, drifting, make_artifact, tmp_path: Path) -> None:
    artifact, path = calibrated(make_artifact("linear"), frame, method="absolute"), tmp_path / "state"
    Stream.start(artifact, drifting).save(path)
    facts = load_tensor_file(path)[1]
    assert facts["format_version"] == 1, "files without online intervals stay readable by older versions"
    assert "online" not in facts
    assert Stream.load(path, artifact).online is None
    stream = Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1), online=ONLINE, online_every=2)
    stream.save(path)  # nothing learned yet
    assert_same_state(stream, Stream.load(path, artifact))
    stream.update(rows(drifting, BEGIN, BEGIN + 30))
    stream.save(path)
    tensors, facts = load_tensor_file(path)
    assert facts["format_version"] == 2
    again = Stream.load(path, artifact)
    assert_same_state(stream, again)
    assert again.online is not None
    assert (again.online.every, again.online.state.config) == (2, ONLINE)
    about = facts["online"]
    spoiled: Sequence[tuple[dict[str, Any], dict[str, Any], str]] = (
        ({}, {"settings": {**about["settings"], "rates": [0.1, 0.2]}}, "online intervals cannot be read"),
        ({"online.cells.alpha": None}, {}, "online intervals cannot be read"),
        ({"online.cells.series_id": tensors["online.cells.series_id"] + 5}, {}, "online intervals cannot be read"),
    )
    for parts, changes, message in spoiled:
        kept = {name: value for name, value in {**tensors, **parts}.items() if value is not None}
        save_tensor_file(path, kept, {**facts, "online": {**about, **changes}})
        with pytest.raises(ArtifactError, match=rf"does not fit artifact .*{message}.*; start the stream anew"):
            Stream.load(path, artifact)
    for version, message in (
        (3, r"newer tsforge \(online format 3"),
        (0, "damaged"),
        ("x", "damaged"),
        (None, "damaged"),
    ):
        save_tensor_file(path, tensors, {**facts, "online": {**about, "format": version}})
        with pytest.raises(ArtifactError, match=message):
            Stream.load(path, artifact)


def test_intervals_may_begin_to_learn_later_and_begin_anew(frame, drifting, make_artifact) -> None:
    artifact = calibrated(make_artifact("linear"), frame)
    stream = Stream.start(artifact, drifting, cutoff=hours(BEGIN - 1))
    stream.update(rows(drifting, BEGIN, BEGIN + 10))
    stream.set_online(ONLINE)
    first = stream.update(rows(drifting, BEGIN + 10, BEGIN + 40))
    late = Stream.start(artifact, drifting, cutoff=hours(BEGIN + 9), online=ONLINE)
    assert late.update(rows(drifting, BEGIN + 10, BEGIN + 40)).equals(first)
    stream.set_online(ONLINE)
    assert stream.online is not None
    assert isinstance(stream.online, OnlineIntervals)
    assert stream.online.state.cells.height == 0


@pytest.mark.parametrize("low", [0.1, 1 / 6, 1 / 12])
def test_levels_of_more_digits_than_a_column_name_are_streamed(frame, make_artifact, low: float) -> None:
    """Columns say q0.166667 and q0.833333, which are 0.666666 apart, or q0.0833333 and q0.916667: no exact mirror."""
    artifact = calibrated(make_artifact("linear"), frame, (low, 0.5, 1.0 - low))
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1), online=ONLINE)
    scores = stream.update(rows(frame, BEGIN, BEGIN + 3))
    assert scores.height == 3 * len(frame.schema.targets) * len(frame.series_ids)
    assert (scores["high"] > scores["low"]).all()
    judged = stream.forecast().metadata["online"]
    assert judged == {"static": len(frame.series_ids) * len(frame.schema.targets) * artifact.window.horizon}
