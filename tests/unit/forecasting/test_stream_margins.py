"""Streams whose margins depend on the window: recent errors, volatility, labels; against batch prediction."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from streamed_data import BEGIN, hours, rows, streaming_models, untrained

from tsforge.artifact import Artifact, load_tensor_file, save_tensor_file
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal_calibration import Choices, calibrate
from tsforge.forecasting.online_backtest import online_forecasts
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.predict import predict
from tsforge.forecasting.stream import Stream
from tsforge.forecasting.stream_buffer import Buffer

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
CHOICES: list[dict[str, Any]] = [
    {"method": "recent"},
    {"method": "recent", "bucket": "hour"},
    {"method": "scaled"},
    {"method": "absolute", "bucket": "volatility"},
    {"method": "absolute", "bucket": "weekday"},
    {"method": "absolute", "bucket": "series"},
]
DEEP = 48 + 64  # rows that the oldest of the earlier forecasts reads


@pytest.fixture(autouse=True)
def _models() -> Iterator[None]:
    with streaming_models():
        yield


def fitted(artifact: Artifact, frame: SeriesFrame, **choices: Any) -> Artifact:
    windows = WindowDataset(
        Panel.from_frame(frame, grid=artifact.grid),
        artifact.window,
        100,
        240,
        aligned=artifact.network.capabilities.rows_coupled,
    )
    return replace(artifact, calibration=calibrate(artifact.network, windows, LEVELS, choices=Choices(**choices)))


def spoken(frame: SeriesFrame) -> SeriesFrame:
    """Return the frame with a covariate known ahead that moves the first target, and one known afterwards."""
    hour = pl.col("time").dt.epoch("s") // 3600
    table = frame.table.with_columns(((hour * 7) % 11).cast(pl.Float64).alias("k"), (hour % 5 + 0.5).alias("p"))
    table = table.with_columns(pl.col("y") + pl.col("k"))
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y", "z"], known=["k"], past=["p"])


def equal_to_batch(stream: Stream, frame: SeriesFrame, cutoff: int) -> None:
    given = None
    if frame.schema.known:
        given = rows(frame, cutoff + 1, cutoff + 7).select("series_id", "time", *frame.schema.known)
    mine, theirs = stream.forecast(known=given), predict(stream.artifact, frame, cutoff=hours(cutoff))
    keys = ["series_id", "cutoff", "step", "time", "variate"]
    assert mine.table.select(keys).equals(theirs.table.select(keys))
    for name in mine.table.columns[5:]:
        assert np.allclose(mine.table[name], theirs.table[name], rtol=2e-5, atol=1e-5), name


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("covariates", [False, True])
def test_a_stream_forecasts_what_batch_prediction_does(
    frame, make_artifact, choices: dict[str, Any], covariates: bool
) -> None:
    data = spoken(frame) if covariates else frame
    model = {"name": "ar_net", "lags": 12} if covariates else {"name": "linear"}
    artifact = fitted(make_artifact(model, data=data.until(hours(249))), data, **choices)
    stream = Stream.start(artifact, data, cutoff=hours(BEGIN - 1))
    equal_to_batch(stream, data, BEGIN - 1)
    place = BEGIN
    for count in (1, 2, 5, 40, DEEP + 5):  # over the hole of series c, and once more than it keeps
        if place + count > 353:
            break
        stream.update(rows(data, place, place + count))
        place += count
        equal_to_batch(stream, data, place - 1)
    assert place > BEGIN + 40


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_scores_have_the_interval_of_the_forecast_before_the_row_however_rows_come(
    frame, make_artifact, choices: dict[str, Any]
) -> None:
    artifact = fitted(make_artifact("linear"), frame, **choices)
    whole = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    found = whole.update(rows(frame, BEGIN, BEGIN + 30))
    single = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    parts = [single.update(rows(frame, place, place + 1)) for place in range(BEGIN, BEGIN + 30)]
    both = pl.concat(parts).join(found, on=["series_id", "time", "variate"], suffix="_whole")
    assert both.height == found.height > 100
    for name in ("expected", "low", "high", "score"):
        assert np.allclose(both[name], both[name + "_whole"], rtol=1e-4, atol=1e-4)
    for place in (BEGIN, BEGIN + 17, BEGIN + 29):
        batch = predict(artifact, frame, cutoff=hours(place - 1)).table.filter(step=1)
        shared = found.filter(time=hours(place)).join(batch, on=["series_id", "variate"])
        assert shared.height >= 4
        assert np.allclose(shared["low"], shared["q0.05"], rtol=2e-5, atol=1e-5)
        assert np.allclose(shared["high"], shared["q0.95"], rtol=2e-5, atol=1e-5)


def test_later_rows_change_no_interval_before_them(frame, make_artifact) -> None:
    artifact = fitted(make_artifact("linear"), frame, method="recent")
    new = rows(frame, BEGIN, BEGIN + 30)
    late = (pl.col("time") >= hours(BEGIN + 10)) & pl.col("y").is_not_null()
    spoiled = new.with_columns(pl.when(late).then(1e3).otherwise(pl.col("y")).alias("y"))
    honest, other = (Stream.start(artifact, frame, cutoff=hours(BEGIN - 1)).update(part) for part in (new, spoiled))
    assert honest.height == other.height
    for name in ("low", "high"):
        changed = honest.filter(honest[name] != other[name])
        assert changed["time"].min() == hours(BEGIN + 11)


def test_coupled_series_and_one_that_begins_later(frame) -> None:
    artifact = fitted(untrained(frame, {"name": "regenn", "attend": "entities", "ff_dim": 8}), frame, method="recent")
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    stream.update(rows(frame, BEGIN, BEGIN + 20))
    equal_to_batch(stream, frame, BEGIN + 19)
    late = SeriesFrame(
        frame.table.filter((pl.col("series_id") != "b") | (pl.col("time") >= hours(BEGIN + 5))), frame.schema
    )
    stream = Stream.start(artifact, late, cutoff=hours(BEGIN - 1))
    stream.update(rows(late, BEGIN, BEGIN + 70))
    equal_to_batch(stream, late, BEGIN + 69)


def test_sight_is_that_of_the_context_though_more_rows_are_kept(frame, make_artifact) -> None:
    artifact = fitted(make_artifact("linear"), frame, method="recent")
    dark = (pl.col("series_id") == "a") & (pl.col("time") >= hours(BEGIN))
    hidden = SeriesFrame(
        frame.table.with_columns(pl.when(~dark).then(pl.col(name)).alias(name) for name in ("y", "z")), frame.schema
    )
    stream = Stream.start(artifact, hidden, cutoff=hours(BEGIN - 1))
    stream.update(rows(hidden, BEGIN, BEGIN + 47))
    equal_to_batch(stream, hidden, BEGIN + 46)
    stream.update(rows(hidden, BEGIN + 47, BEGIN + 48))
    assert stream.blind() == ("a",)
    with pytest.raises(DataError, match=r"1 of 3 series have no observed target in the last 48 rows \(a\)"):
        stream.forecast()
    assert set(stream.forecast(series=["b", "c"]).table["series_id"]) == {"b", "c"}


@pytest.mark.parametrize("bucket", ["hour", "volatility"])
def test_a_carried_state_takes_labels(frame, bucket: str) -> None:
    artifact = fitted(untrained(frame, {"name": "smoother"}), frame, bucket=bucket)
    stream = Stream.start(artifact, frame, restart_every=1, cutoff=hours(BEGIN - 1))
    assert stream.mode == "carried"
    scores = stream.update(rows(frame, BEGIN, BEGIN + 25))
    equal_to_batch(stream, frame, BEGIN + 24)
    batch = predict(artifact, frame, cutoff=hours(BEGIN + 11)).table.filter(step=1)
    shared = scores.filter(time=hours(BEGIN + 12)).join(batch, on=["series_id", "variate"])
    assert np.allclose(shared["high"], shared["q0.95"], rtol=1e-4)


def test_recent_errors_are_for_windows(frame) -> None:
    artifact = fitted(untrained(frame, {"name": "smoother"}), frame, method="recent")
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    assert stream.mode == "window"
    stream.update(rows(frame, BEGIN, BEGIN + 3))
    equal_to_batch(stream, frame, BEGIN + 2)
    with pytest.raises(ConfigError, match=r"rest on forecasts from windows of earlier rows; .* mode=window"):
        Stream.start(artifact, frame, mode="carried")


@pytest.mark.parametrize("choices", [{"method": "recent"}, {"bucket": "volatility"}], ids=str)
def test_online_intervals_start_from_them_as_in_a_backtest(frame, make_artifact, choices: dict[str, Any]) -> None:
    artifact = fitted(make_artifact("linear"), frame, **choices)
    config = OnlineConfig(window=25, start=10)
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1), online=config)
    for place in range(BEGIN, BEGIN + 72, 24):
        stream.update(rows(frame, place, place + 24))
    last = BEGIN + 71
    table = forecasts_at(artifact, frame.until(hours(last)), np.arange(BEGIN - 1, last + 1), steps=6, levels=LEVELS)
    adapted, _ = online_forecasts(table, OnlineConformal(config))
    theirs = adapted.filter(cutoff=hours(last)).sort("series_id", "step", "variate")
    mine = stream.forecast().table.sort("series_id", "step", "variate")
    static = table.filter(cutoff=hours(last)).sort("series_id", "step", "variate")
    assert mine.select("series_id", "step", "variate").equals(theirs.select("series_id", "step", "variate"))
    assert not np.allclose(theirs["q0.95"], static["q0.95"], rtol=1e-2)
    for name in ("q0.05", "q0.25", "q0.75", "q0.95"):
        assert np.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_a_short_history_grows_and_a_warning_says_what_holds_until_then(
    frame, make_artifact, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = fitted(make_artifact("linear"), frame, method="recent")
    first = BEGIN - 48
    short = SeriesFrame(frame.table.filter(pl.col("time") >= hours(first)), frame.schema)
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        stream = Stream.start(artifact, short, cutoff=hours(BEGIN - 1))
    assert "3 of 3 series have fewer than 50 rows of history" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tsforge"):
        place = BEGIN
        for count in (1, 1, 1, 20, 50, 40):
            stream.update(rows(short, place, place + count))
            place += count
        assert caplog.text == ""  # once is enough
    equal_to_batch(stream, short, place - 1)
    stream = Stream.start(artifact, short, cutoff=hours(BEGIN + 20))
    equal_to_batch(stream, short, BEGIN + 20)


def test_series_join_and_a_file_goes_on_to_the_bit(frame, make_artifact, tmp_path: Path) -> None:
    artifact = fitted(make_artifact("linear"), frame, method="recent")
    two = frame.select_series(["a", "c"])
    stream = Stream.start(artifact, two, cutoff=hours(BEGIN - 1))
    equal_to_batch(stream, two, BEGIN - 1)
    assert stream.add(frame.until(hours(BEGIN - 1))) == ("b",)
    stream.update(rows(frame, BEGIN, BEGIN + 30))
    equal_to_batch(stream, frame, BEGIN + 29)
    path = tmp_path / "stream.safetensors"
    stream.save(path)
    _, facts = load_tensor_file(path)
    assert facts["format_version"] == 3
    again = Stream.load(path, artifact)
    size = stream.num_bytes()
    for place in range(BEGIN + 30, BEGIN + 90, 30):
        assert again.update(rows(frame, place, place + 30)).equals(stream.update(rows(frame, place, place + 30)))
        assert again.forecast().table.equals(stream.forecast().table)
    assert stream.num_bytes() == size
    tensors, facts = load_tensor_file(path)
    for broken in ({"begins"}, {"rows"}):
        kept = {name: value for name, value in tensors.items() if name not in broken}
        if "rows" in broken:
            kept["rows"] = tensors["rows"][:, :48].clone()
        save_tensor_file(path, kept, facts)
        with pytest.raises(ArtifactError, match="start the stream anew"):
            Stream.load(path, artifact)


def test_labels_need_no_more_rows_and_no_new_format(frame, make_artifact, tmp_path: Path) -> None:
    artifact = fitted(make_artifact("linear"), frame, method="absolute", bucket="volatility")
    stream = Stream.start(artifact, frame, cutoff=hours(BEGIN - 1))
    stream.save(tmp_path / "stream.safetensors")
    tensors, facts = load_tensor_file(tmp_path / "stream.safetensors")
    assert facts["format_version"] == 1
    assert set(tensors) == {"rows", "last", "started"}
    assert tensors["rows"].shape[1] == 48


def test_the_panel_of_a_buffer_has_the_rows_of_the_frame(frame) -> None:
    data = spoken(frame)
    artifact = untrained(data, {"name": "smoother"})
    buffer = Buffer.of_frame(artifact, data, hours(BEGIN + 4), DEEP)
    panel = buffer.panel()
    assert panel.series_ids == ("a", "b", "c")
    for number, name in enumerate(panel.series_ids):
        low = max(30 if name == "b" else 0, BEGIN + 5 - DEEP)
        mine = data.table.filter(series_id=name).filter(pl.col("time").is_between(hours(low), hours(BEGIN + 4 + 6)))
        assert int(panel.offset[number]) == low
        part = slice(panel.indptr[number], panel.indptr[number + 1])
        values, seen = panel.values[part], panel.observed[part]
        assert len(values) == mine.height == BEGIN + 11 - low
        truth = torch.from_numpy(mine.select(data.schema.columns).to_numpy(writable=True)).to(torch.float32).numpy()
        ahead = len(truth) - 6
        assert np.array_equal(seen[:ahead], ~np.isnan(truth[:ahead]))
        assert np.array_equal(values[:ahead][seen[:ahead]], truth[:ahead][seen[:ahead]])
        assert not seen[ahead:, :3].any()  # targets and what is known afterwards only
        assert np.array_equal(values[ahead:, 3], truth[ahead:, 3])
