"""Forecast tables from artifacts: values against definitions, hidden future, levels, rollout, refusals."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact, collect_provenance, create_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal_calibration import Choices, calibrate
from tsforge.forecasting.predict import artifact_panel, offered_levels, padded_panel, predict, predict_windows
from tsforge.forecasting.window_forecasts import error_sums
from tsforge.metrics.point import mae, mse
from tsforge.network import NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

START = datetime(2024, 1, 1)


def hours(count: int) -> datetime:
    return START + timedelta(hours=count)


def values_of(frame: SeriesFrame, series: str, variate: str) -> dict[datetime, float]:
    rows = frame.table.filter(pl.col("series_id") == series)
    return {time.replace(tzinfo=None): value for time, value in rows.select("time", variate).iter_rows()}


def test_last_value_repeats_the_value_at_each_series_own_end(frame, make_artifact) -> None:
    forecast = predict(make_artifact("last_value"), frame)
    table = forecast.table
    assert table.columns[:6] == ["series_id", "cutoff", "step", "time", "variate", "mean"]
    assert table.height == 3 * 6 * 2
    ends = {"a": 399, "b": 359, "c": 379}
    for row in table.iter_rows(named=True):
        end = hours(ends[row["series_id"]])
        assert row["cutoff"].replace(tzinfo=None) == end
        assert row["time"].replace(tzinfo=None) == end + timedelta(hours=row["step"])
        assert row["mean"] == pytest.approx(values_of(frame, row["series_id"], row["variate"])[end], abs=1e-5)


def test_a_cutoff_hides_everything_after_it(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    cutoff = hours(299)
    honest = predict(artifact, frame, cutoff=cutoff).table
    assert honest["cutoff"].unique().dt.replace_time_zone(None).to_list() == [cutoff]
    assert honest["series_id"].unique().sort().to_list() == ["a", "b", "c"]
    late = pl.col("time") > pl.lit(cutoff).dt.replace_time_zone("UTC")
    spoiled = frame.table.with_columns(pl.when(late).then(1e6).otherwise(pl.col(n)).alias(n) for n in ("y", "z"))
    assert predict(artifact, SeriesFrame(spoiled, frame.schema), cutoff=cutoff).table.equals(honest)
    early = pl.col("time") == pl.lit(cutoff).dt.replace_time_zone("UTC")
    nudged = frame.table.with_columns(pl.when(early).then(pl.col("y") + 1).otherwise(pl.col("y")).alias("y"))
    assert not predict(artifact, SeriesFrame(nudged, frame.schema), cutoff=cutoff).table.equals(honest)


def test_series_that_begin_after_the_cutoff_are_unknown_then(frame, make_artifact) -> None:
    table = predict(make_artifact("last_value", context_length=20), frame, cutoff=hours(25)).table
    assert table["series_id"].unique().sort().to_list() == ["a", "c"]


def test_shorter_horizons_are_the_first_steps(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    full, cut = predict(artifact, frame).table, predict(artifact, frame, horizon=2).table
    assert cut.equals(full.filter(pl.col("step") <= 2))


def test_rows_of_one_series_do_not_depend_on_the_others(frame, make_artifact) -> None:
    artifact = make_artifact("linear", scaling="series")
    alone = predict(artifact, frame.select_series(["b"])).table
    together = predict(artifact, frame).table.filter(series_id="b")
    assert alone.drop("mean").equals(together.drop("mean"))
    assert np.allclose(alone["mean"], together["mean"], rtol=1e-6)


def test_unknown_series_are_forecast_unless_the_scaling_needs_them(frame, make_artifact) -> None:
    renamed = SeriesFrame(frame.table.with_columns(pl.col("series_id").replace("a", "new")), frame.schema)
    table = predict(make_artifact("linear"), renamed).table
    expected = predict(make_artifact("linear"), frame).table.filter(series_id="a")["mean"]
    assert np.allclose(table.filter(series_id="new")["mean"], expected, rtol=1e-6)
    with pytest.raises(ArtifactError, match="new"):
        predict(make_artifact("linear", scaling="series"), renamed)


@pytest.mark.parametrize("likelihood", ["normal", "student_t", "quantiles"])
def test_distributions_offer_levels_that_ascend(frame, make_artifact, likelihood: str) -> None:
    artifact = make_artifact("linear", likelihood)
    forecast = predict(artifact, frame)
    assert forecast.quantile_levels == offered_levels(artifact)
    columns = forecast.table.select(pl.col("^q.*$")).to_numpy()
    assert columns.shape[1] == 11
    assert (np.diff(columns, axis=1) > 0).all()
    few = predict(artifact, frame, quantile_levels=(0.9, 0.1))
    assert few.quantile_levels == (0.1, 0.9)
    assert np.allclose(few.table["q0.9"], forecast.table["q0.9"])
    assert predict(artifact, frame, quantile_levels=()).table.columns[-1] == "mean"


def test_normal_quantiles_have_their_closed_form(frame, make_artifact) -> None:
    table = predict(make_artifact("linear", "normal"), frame, quantile_levels=(0.1, 0.5, 0.9)).table
    assert np.allclose(table["q0.5"], table["mean"], atol=1e-5)
    assert np.allclose(table["q0.9"] - table["mean"], table["mean"] - table["q0.1"], rtol=1e-4)
    spread = (table["q0.9"] - table["q0.5"]) / 1.2815515655446004
    per_variate = table.with_columns(spread=spread).group_by("variate", "step").agg(pl.col("spread").std())
    assert per_variate["spread"].max() < 1e-3  # one spread per step and variate, from training residuals


@pytest.mark.parametrize("likelihood", ["point", "normal", "quantiles"])
def test_calibrated_levels_cover_and_are_the_only_ones(frame, make_artifact, likelihood: str) -> None:
    artifact = make_artifact("linear", likelihood)
    panel = Panel.from_frame(frame, grid=artifact.grid)
    held_out = WindowDataset(panel, artifact.window, 250, 330)
    calibrated = replace(artifact, calibration=calibrate(artifact.network, held_out, (0.05, 0.5, 0.95)))
    forecast = predict(calibrated, frame, cutoff=hours(340))
    assert forecast.quantile_levels == (0.05, 0.5, 0.95)
    assert forecast.metadata["calibrated"]
    hits, cells = 0, 0
    for cutoff in range(331, 372):
        table = predict(calibrated, frame.select_series(["a", "c"]), cutoff=hours(cutoff)).table
        actual = table.join(
            frame.table.unpivot(index=["series_id", "time"], variable_name="variate", value_name="actual"),
            on=["series_id", "time", "variate"],
        ).drop_nulls("actual")
        hits += actual.filter(pl.col("actual").is_between(pl.col("q0.05"), pl.col("q0.95"))).height
        cells += actual.height
    assert 0.85 < hits / cells < 0.96
    with pytest.raises(ConfigError, match=r"0\.2 are not calibrated"):
        predict(calibrated, frame, quantile_levels=(0.2,))


def test_one_sided_level_equals_its_column_of_the_pair(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    held_out = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), artifact.window, 250, 330)
    calibrated = replace(artifact, calibration=calibrate(artifact.network, held_out, (0.05, 0.5, 0.95)))
    alone = predict(calibrated, frame, quantile_levels=(0.95,)).table
    assert alone["q0.95"].equals(predict(calibrated, frame).table["q0.95"])


def test_too_short_a_calibration_says_so_and_covers_everything(frame, make_artifact, caplog) -> None:
    artifact = make_artifact("linear")
    panel = Panel.from_frame(frame.select_series(["a"]), grid=artifact.grid, series_ids=artifact.series_ids)
    few = WindowDataset(panel, artifact.window, 250, 260)  # 5 windows
    with caplog.at_level("WARNING", logger="tsforge"):
        strict = calibrate(artifact.network, few, (0.05, 0.25, 0.75, 0.95), choices=Choices(pool="step"))
        table = predict(replace(artifact, calibration=strict), frame).table
    assert "are infinite; widen the valid span" in caplog.text
    assert table["q0.95"].is_infinite().all()
    assert table["q0.75"].is_finite().all()
    caplog.clear()
    with caplog.at_level("WARNING", logger="tsforge"):
        pooled = calibrate(artifact.network, few, (0.05, 0.25, 0.75, 0.95))  # 30 scores over all steps
        table = predict(replace(artifact, calibration=pooled), frame).table
    assert "take one over all steps" in caplog.text
    assert "infinite" not in caplog.text
    assert table["q0.95"].is_finite().all()


def test_points_without_calibration_have_no_levels(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    assert predict(artifact, frame).quantile_levels == ()
    with pytest.raises(ConfigError, match="gives points only"):
        predict(artifact, frame, quantile_levels=(0.5,))


def test_longer_horizons_are_refused_or_rolled_and_flagged(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    with pytest.raises(ModelError, match="trained for 6 steps, asked for 15"):
        predict(artifact, frame, horizon=15)
    forecast = predict(artifact, frame, horizon=15, rollout=True)
    assert forecast.metadata["rolled_from_step"] == 7
    first = forecast.table.filter(pl.col("step") <= 6)
    assert first.equals(predict(artifact, frame).table)
    assert forecast.table.filter(pl.col("step") > 6)["q0.5"].null_count() == 3 * 9 * 2
    with pytest.raises(ConfigError, match="at least 1"):
        predict(artifact, frame, horizon=0)


def test_a_rolled_block_equals_a_forecast_after_appending_the_means(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    rolled = predict(artifact, frame.select_series(["a"]), horizon=12, rollout=True).table
    block = rolled.filter(pl.col("step") <= 6).pivot(on="variate", index=["series_id", "time"], values="mean")
    longer = pl.concat([frame.select_series(["a"]).table, block.select("series_id", "time", "y", "z")])
    second = predict(artifact, SeriesFrame(longer, frame.schema)).table
    assert np.allclose(rolled.filter(pl.col("step") > 6)["mean"], second["mean"], rtol=1e-5)


def test_histories_that_are_too_short_or_empty_are_named(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    with pytest.raises(DataError, match=r"'b' with 20"):
        predict(artifact, frame, cutoff=hours(49))
    hidden = frame.table.with_columns(
        pl.when((pl.col("series_id") != "b") | (pl.col("time") < pl.lit(hours(290)).dt.replace_time_zone("UTC")))
        .then(pl.col(name))
        .alias(name)
        for name in ("y", "z")
    )
    with pytest.raises(DataError, match="b"):
        predict(artifact, SeriesFrame(hidden, frame.schema), cutoff=hours(350))


def test_frames_of_another_shape_are_refused(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    narrow = SeriesFrame(frame.table.drop("z"), replace(frame.schema, targets=("y",)))
    with pytest.raises(ArtifactError, match="z"):
        predict(artifact, narrow)


def test_window_forecasts_follow_the_order_asked_for(frame, make_artifact) -> None:
    artifact = make_artifact("linear", "normal")
    windows = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), artifact.window, 250, 300)
    full = predict_windows(artifact.network, windows, (0.1, 0.9), batch_size=7)
    some = predict_windows(artifact.network, windows, (0.1, 0.9), indices=[40, 3, 17])
    assert np.allclose(some.mean, full.mean[[40, 3, 17]], rtol=1e-6)
    assert some.cutoff_index.tolist() == windows.cutoff_index[[40, 3, 17]].tolist()
    assert full.quantiles is not None
    assert full.quantiles.shape == (*full.mean.shape, 2)
    assert full.scale.shape == (len(windows), 2)
    with pytest.raises(DataError, match="no window"):
        predict_windows(artifact.network, windows, indices=[])


def test_error_sums_equal_the_metrics_of_all_windows(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    windows = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), artifact.window, 190, 300)
    found = predict_windows(artifact.network, windows)
    sums = error_sums(artifact.network, windows, batch_size=13)
    assert found.target is not None
    assert not found.mask.all()  # the hole of series c is in there
    assert sums.windows == len(windows)
    expected = mse(found.target, found.mean, found.mask)
    assert sums.mse().value == pytest.approx(expected.value, rel=1e-5)
    assert sums.mse().count == expected.count
    assert sums.mae(axis=0).value == pytest.approx(
        mae(found.target, found.mean, found.mask, axis=(0, 1)).value, rel=1e-5
    )


def test_forecasts_that_are_not_finite_are_an_error(frame, make_artifact) -> None:
    artifact = make_artifact("linear")
    artifact.network.model.weight.data[..., -1] = float("nan")
    with pytest.raises(ModelError, match="not finite for 3 of 3 windows"):
        predict(artifact, frame)
    windows = WindowDataset(Panel.from_frame(frame, grid=artifact.grid), artifact.window, 250, 300)
    with pytest.raises(ModelError, match="not finite"):
        error_sums(artifact.network, windows)


# --- a model that couples series; b ends at hour 359, so contexts of 24 hours hold nothing of it from hour 383 on


@pytest.fixture(scope="module")
def coupled(frame: SeriesFrame) -> Artifact:
    window = WindowSpec(context_length=24, horizon=6)
    panel = Panel.from_frame(frame.until(hours(249)))
    settings = {"model": {"name": "regenn", "attend": "entities", "ff_dim": 8}, "likelihood": {"name": "normal"}}
    spec = DataSpec(context_length=24, horizon=6, num_variates=2, train_length=250)
    network = build_network(validate(NetworkConfig, settings), spec)
    fit_network(
        network,
        WindowDataset(panel, window, aligned=True),
        None,
        TrainConfig(max_epochs=1, max_steps_per_epoch=3, accelerator="cpu"),
        series=panel.training_series(None, None),
        progress=False,
    )
    return create_artifact(
        network,
        config={},
        schema=frame.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance=collect_provenance(data_fingerprint="", seeds={}),
    )


@pytest.mark.parametrize(("steps", "rollout"), [(6, False), (9, True)])
def test_a_coupled_series_with_nothing_observed_gets_no_forecast(
    frame, coupled: Artifact, caplog, monkeypatch: pytest.MonkeyPatch, steps: int, rollout: bool
) -> None:
    there: list[list[bool]] = []
    forward = type(coupled.network.model).forward

    def spy(self: Any, batch: Any) -> Any:
        there.append(batch.context_mask.any(dim=(1, 2)).tolist())
        return forward(self, batch)

    monkeypatch.setattr(type(coupled.network.model), "forward", spy)
    with caplog.at_level("WARNING", logger="tsforge"):
        table = predict(coupled, frame, horizon=steps, rollout=rollout).table
    assert there[0] == [True, False, True]  # the model still gets every series
    assert table["series_id"].unique().sort().to_list() == ["a", "c"]
    assert table.height == 2 * steps * 2
    assert [record.getMessage() for record in caplog.records if "no forecast" in record.getMessage()] == [
        "no forecast for 1 of 3 windows (1 series: b): no observed target in the 24 rows up to the cutoff"
    ]
    caplog.clear()
    without = predict(coupled, frame.select_series(["a", "c"]), horizon=steps, rollout=rollout).table
    assert without.equals(table)
    assert not caplog.records  # a series that the frame does not hold is not missed


def test_coupled_series_with_something_observed_are_all_forecast(frame, coupled: Artifact, caplog) -> None:
    with caplog.at_level("WARNING", logger="tsforge"):
        table = predict(coupled, frame, cutoff=hours(382)).table  # the last row of b is the first of its context
    assert table["series_id"].unique().sort().to_list() == ["a", "b", "c"]
    assert not caplog.records
    with pytest.raises(
        DataError, match="3 of 3 series have no observed target in the 24 rows.*the last target up to it"
    ):
        predict(coupled, frame, cutoff=hours(500))


def test_a_backtest_leaves_out_coupled_windows_with_nothing_observed(frame, coupled: Artifact, caplog) -> None:
    with caplog.at_level("WARNING", logger="tsforge"):
        table = forecasts_at(coupled, frame, np.array([300, 383, 390]), steps=3, levels=(0.1, 0.9))
    given = table.group_by("cutoff", maintain_order=True).agg(pl.col("series_id").unique(maintain_order=True))
    assert given["series_id"].to_list() == [["a", "b", "c"], ["a", "c"], ["a", "c"]]
    assert "no forecast for 2 of 9 windows (1 series: b)" in caplog.text
    actual = {name: values_of(frame, name, "z") for name in ("a", "b", "c")}
    for row in table.filter(variate="z").iter_rows(named=True):
        assert row["actual"] == actual[row["series_id"]].get(row["time"].replace(tzinfo=None))
    dead = forecasts_at(coupled, frame, np.array([500]), steps=3, levels=(0.1, 0.9))
    assert dead.height == 0
    assert dead.columns == table.columns


def test_a_padded_panel_extends_each_series_only_as_far_as_it_must(frame, make_artifact) -> None:
    """One series that ended long ago, or that never showed a value, does not inflate the others."""
    artifact = make_artifact()
    ended, blind = (
        frame.table.filter(series_id="a", time=START.replace(tzinfo=UTC)).with_columns(
            pl.lit(name).alias("series_id"), y=value, z=value
        )
        for name, value in (("ended", pl.lit(1.0)), ("blind", pl.lit(None, pl.Float64)))
    )
    more = SeriesFrame(pl.concat([frame.table, ended, blind]), frame.schema)
    stop = 420
    panel = padded_panel(artifact, more, stop)
    rows = panel.offset + panel.lengths
    assert rows.tolist() == [stop] * 5
    plain = padded_panel(artifact, frame, stop)
    assert plain.num_rows == panel.num_rows - 2 * stop
    assert padded_panel(artifact, frame, 10).num_rows == frame.num_rows
    spec = replace(artifact.window, min_observed=0.0)
    for one, other in ((plain, artifact_panel(artifact, frame.extend(stop))),):  # as many rows more as one could want
        left, right = (
            predict_windows(artifact.network, WindowDataset(part, spec, 300, stop), ()) for part in (one, other)
        )
        assert np.array_equal(left.mean, right.mean)
        assert np.array_equal(left.cutoff_index, right.cutoff_index)
    later = frame.between(hours(200), None)  # a frame whose rows count from elsewhere
    assert (padded_panel(artifact, later, stop).offset + padded_panel(artifact, later, stop).lengths).tolist() == [
        stop
    ] * 3
