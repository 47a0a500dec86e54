"""Nothing published after a cutoff changes a forecast made at it: backtests, batches, predict; saboteurs are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.batch import BatchConfig, published_until, run_batch
from tsforge.app.fit import FitConfig, fit, fit_frame
from tsforge.app.forecast import PredictConfig, predict
from tsforge.app.ingest import IngestConfig, ingest, load_history
from tsforge.app.retrain import CompareConfig, compare
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.vintages import Delays, VintageFrame
from tsforge.forecasting.backtest import BacktestConfig, Fit, backtest
from tsforge.forecasting.predict import predict as predict_frame
from tsforge.metrics.point import seasonal_scale
from tsforge.testing.vintages import START, revised_table

SCHEMA = SeriesSchema(targets=("load",), past=("flow",), known=("wind",), freq="1h")
HOUR = timedelta(hours=1)
CUTOFFS = BacktestConfig(num_cutoffs=4, stride=12, refit_every=2)
DATA = {
    "name": "grid",
    "layout": "long",
    "series": "series_id",
    "time": "time",
    "published": "published",
    "targets": ["load"],
    "past": ["flow"],
    "known": ["wind"],
    "freq": "1h",
    "source": {"kind": "parquet", "path": "unused"},
}


def settings(model: dict[str, Any], **changes: Any) -> FitConfig:
    values = {
        "data": DATA,
        "model": model,
        "window": {"context_length": 24, "horizon": 6},
        "split": {"train": 0.8, "valid": 0.2, "test": 0.0},
        "train": {"max_epochs": 1, "max_steps_per_epoch": 4, "accelerator": "cpu"},
        "tracking": {"enabled": False},
    }
    return validate(FitConfig, values | changes)


def honest(model: dict[str, Any]) -> Callable[[VintageFrame], Fit]:
    config = settings(model)
    return lambda history: lambda given, cutoff: fit_frame(given, config)[0]


def disturbed(table: pl.DataFrame, moment: datetime, seed: int = 1) -> pl.DataFrame:
    """Return the publications with every value that came after ``moment`` changed."""
    noise = np.random.default_rng(seed).normal(0, 20, table.height)
    after = pl.col("published") > pl.lit(moment)
    return table.with_columns(
        pl.when(after).then(pl.col(name) + pl.Series(noise)).otherwise(pl.col(name)).alias(name)
        for name in SCHEMA.columns
    )


def assert_blind_to_the_future(make: Callable[[VintageFrame], Fit], delays: Delays | None = None) -> None:
    """Compare the forecasts of a backtest before and after all later publications changed, for two cutoffs."""
    table = revised_table(200)
    frame = VintageFrame(table, SCHEMA, delays=delays)
    before = backtest(make(frame), frame, CUTOFFS, horizon=6).forecasts
    cutoffs = before["cutoff"].unique().sort()
    for cutoff in (cutoffs[0], cutoffs[2]):
        other = VintageFrame(disturbed(table, frame.moment(cutoff)), SCHEMA, delays=delays)
        after = backtest(make(other), other, CUTOFFS, horizon=6).forecasts
        seen = pl.col("cutoff") <= pl.lit(cutoff)
        assert before.filter(seen).drop("actual").equals(after.filter(seen).drop("actual")), f"changed at {cutoff}"
        assert not before.filter(seen)["actual"].equals(after.filter(seen)["actual"])


MODELS = {
    "linear": {"name": "linear"},
    "ar_net": {"name": "ar_net"},
    "ar_net_trained": {"name": "ar_net", "hidden": [8]},
    "gru": {"name": "gru"},
    "regenn": {"name": "regenn"},
}


@pytest.mark.parametrize("name", MODELS)
def test_later_publications_change_no_forecast(name: str) -> None:
    assert_blind_to_the_future(honest(MODELS[name]))


def test_later_publications_change_no_forecast_of_late_data() -> None:
    """Targets two hours late, the covariate five: forecasts are made when the target of the last row is out."""
    assert_blind_to_the_future(honest(MODELS["ar_net_trained"]), Delays("2h", {"flow": 3}))


def _latest_rows(history: VintageFrame) -> Fit:
    """Cut the rows at the cutoff, as for data without publications, but take their last values."""
    config = settings(MODELS["linear"])
    return lambda given, cutoff: fit_frame(history.latest().until(cutoff), config)[0]


def _first_scale(history: VintageFrame) -> Fit:
    """Know the spread of the revised series: one number is enough."""
    config = settings(MODELS["linear"])

    def fit(given: VintageFrame, cutoff: Any) -> Artifact:
        spread = float(history.latest().table["load"].std())  # type: ignore[arg-type]
        plain = given.latest().mask_outside({"load": (-spread, spread * 3)})[0]
        return fit_frame(plain, config)[0]

    return fit


@pytest.mark.parametrize("saboteur", [_latest_rows, _first_scale])
def test_fits_that_look_at_later_publications_are_caught(saboteur: Callable[[VintageFrame], Fit]) -> None:
    with pytest.raises(AssertionError, match="changed at"):
        assert_blind_to_the_future(saboteur)


def test_a_forecast_from_the_latest_values_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VintageFrame, "as_of", lambda self, moment: self.latest())
    with pytest.raises(AssertionError, match="changed at"):
        assert_blind_to_the_future(honest(MODELS["linear"]))


def test_a_fit_gets_the_publications_of_its_moment_and_no_other() -> None:
    seen: list[tuple[datetime, VintageFrame]] = []
    config = settings(MODELS["linear"])

    def fit(given: VintageFrame, cutoff: datetime) -> Artifact:
        seen.append((cutoff, given))
        return fit_frame(given, config)[0]

    frame = VintageFrame(revised_table(200), SCHEMA, delays=Delays("1h"))
    backtest(fit, frame, CUTOFFS, horizon=6)
    assert len(seen) == 2
    for cutoff, given in seen:
        assert given.table["published"].max() <= cutoff + HOUR  # type: ignore[operator]
        assert given.latest().fingerprint() == frame.as_of(cutoff + HOUR).fingerprint()


def test_grades_are_against_the_last_or_the_first_value_and_scales_from_what_was_known() -> None:
    frame = VintageFrame(revised_table(200), SCHEMA)
    fit = honest(MODELS["linear"])(frame)
    last = backtest(fit, frame, CUTOFFS, horizon=6)
    first = backtest(fit, frame, CUTOFFS.model_copy(update={"truth": "first"}), horizon=6)
    assert last.forecasts.drop("actual").equals(first.forecasts.drop("actual"))
    for report, shown in ((last, frame.latest()), (first, frame.first())):
        truth = shown.table.select("series_id", "time", truth="load")
        both = report.forecasts.join(truth, on=["series_id", "time"])
        assert both.height == report.forecasts.height
        assert both["actual"].equals(both["truth"].alias("actual"))
    # MASE by hand: the unit is the seasonal step of the rows as they were known at the cutoff of the fit
    cutoffs, season = last.forecasts["cutoff"].unique().sort(), last.settings["season_length"]
    ratios = []
    for place, cutoff in enumerate(cutoffs):
        fitted = cutoffs[place - place % 2]
        for series in ("s0", "s1"):
            known = frame.as_of(fitted).until(fitted).select_series([series]).table["load"].to_numpy()[:, None]
            unit = seasonal_scale(known, season, ~np.isnan(known)).value[0]
            mine = pl.col("cutoff") == pl.lit(cutoff)
            rows = last.forecasts.filter(mine, series_id=series, model="linear")
            ratios += ((rows["mean"] - rows["actual"]).abs() / unit).to_list()
    value = last.metrics.filter(model="linear", scope="overall", metric="mase")["value"].item()
    assert value == pytest.approx(np.mean(ratios), rel=1e-9)


def test_known_covariates_that_were_not_out_yet_are_counted_and_noted() -> None:
    """Wind is published up to three hours ahead, forecasts go six hours."""
    frame = VintageFrame(revised_table(200, issue_every=1, lead=2), SCHEMA)
    fits = {name: honest(MODELS[name])(frame) for name in ("ar_net", "linear")}
    report = backtest(fits, frame, CUTOFFS, horizon=6)
    rows = report.forecasts.filter(model="ar_net").select("series_id", "cutoff", "time").unique()
    expected = 0
    for cutoff in report.forecasts["cutoff"].unique():
        known = frame.as_of(cutoff).table.filter(pl.col("wind").is_not_null())
        mine = rows.filter(cutoff=cutoff)
        expected += mine.join(known, on=["series_id", "time"], how="anti").height
    assert expected > 0
    assert expected < rows.height
    lacking = report.folds.group_by("model").agg(pl.col("known_missing").sum())
    assert dict(lacking.iter_rows()) == {"ar_net": expected} | dict.fromkeys(
        ("linear", "last_value", "seasonal_naive", "drift"), 0
    )
    told = [note for note in report.notes if "no value of a known covariate" in note]
    assert len(told) == 1
    assert told[0].startswith(f"ar_net: {expected} forecast rows")


def test_another_truth_needs_revisions() -> None:
    frame = VintageFrame(revised_table(120), SCHEMA).latest()
    with pytest.raises(ConfigError, match=r"backtest.truth=first has no effect"):
        backtest(lambda given, cutoff: given, frame, BacktestConfig(truth="first"), horizon=6)


def _moved_at(delays: Delays, changed: float) -> pl.DataFrame:
    """Return forecasts of a closed form with covariates, values that a declared delay hides from one cutoff changed."""
    table = VintageFrame(revised_table(160), SCHEMA).latest().table
    hidden = START + (160 - 1 - 6 - 2) * HOUR  # flow of the last two visible rows is not out at the last cutoff
    late = pl.when(pl.col("time") >= pl.lit(hidden)).then(pl.col("flow") + changed).otherwise(pl.col("flow"))
    frame = SeriesFrame(table.with_columns(late.alias("flow")), SCHEMA)
    config = BacktestConfig(num_cutoffs=2, stride=12, refit_every=1)
    return backtest(honest(MODELS["ar_net"])(frame), delays.shift(frame), config, horizon=6).forecasts  # type: ignore[arg-type]


def test_a_declared_delay_keeps_late_values_out_of_fit_and_forecast() -> None:
    delays = Delays(None, {"flow": 3})
    assert _moved_at(delays, 0.0).equals(_moved_at(delays, 50.0))
    assert not _moved_at(Delays(), 0.0).equals(_moved_at(Delays(), 50.0)), "without it they are seen"


def test_training_windows_see_the_forecasts_of_their_own_time() -> None:
    """Trained on the last values of wind, the model would trust a covariate that it never gets as good."""
    frame = VintageFrame(revised_table(240), SCHEMA)
    config = settings(MODELS["ar_net_trained"])
    own, last = fit_frame(frame, config)[0], fit_frame(frame.latest(), config)[0]
    assert own.metrics != last.metrics
    assert own.metrics["valid_mse"] > last.metrics["valid_mse"]  # honest: forecasts of wind, not wind


def test_a_contest_forecasts_every_moment_from_what_it_knew() -> None:
    history = VintageFrame(revised_table(200), SCHEMA)
    start, stop = START + 150 * HOUR, START + 199 * HOUR
    training = history.frozen(start)
    split = {"kind": "times", "ends": [str(START + 120 * HOUR), str(start), str(stop)]}
    old, new = (fit_frame(training, settings(MODELS[name], split=split))[0] for name in ("linear", "ar_net"))
    found = compare(old, new, history, start, stop, CompareConfig(cutoffs=4))
    latest = history.latest().table
    scale = float(latest.filter(pl.col("time") <= start)["load"].std())  # type: ignore[arg-type]
    times = latest.filter(pl.col("time").is_between(start, stop))["time"].unique().sort().to_list()[:-6]
    losses: dict[str, list[float]] = {"old": [], "new": []}
    for place in np.linspace(0, len(times) - 1, 4).round().astype(int):
        known = history.as_of(times[place])
        for name, artifact in (("old", old), ("new", new)):
            table = predict_frame(artifact, known, cutoff=times[place], quantile_levels=()).table
            both = table.join(latest.select("series_id", "time", "load"), on=["series_id", "time"])
            losses[name].append(float((both["mean"] - both["load"]).abs().mean()) / scale)  # type: ignore[arg-type]
    assert found.champion_error == pytest.approx(np.mean(losses["old"]))
    assert found.challenger_error == pytest.approx(np.mean(losses["new"]))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, database_url=f"sqlite:///{tmp_path / 'store.db'}", tracking_uri="")


def _stored(workspace: Workspace, table: pl.DataFrame, name: str) -> dict[str, Any]:
    path = workspace.root / f"{name}.parquet"
    table.write_parquet(path)
    data = DATA | {"name": name, "source": {"kind": "parquet", "path": str(path)}}
    ingest(validate(IngestConfig, {"data": data}), workspace)
    return data


def test_batches_and_forecasts_of_the_past_see_no_later_publication(workspace: Workspace) -> None:
    table, moment = revised_table(200), START + 180 * HOUR
    plain = _stored(workspace, table, "plain")
    spoiled = _stored(workspace, disturbed(table, moment), "spoiled")
    early = _stored(workspace, table.filter(pl.col("published") <= moment), "early")
    config = settings(
        MODELS["ar_net_trained"],
        data=plain,
        split={"kind": "times", "ends": [str(START + 130 * HOUR), str(START + 150 * HOUR), str(START + 190 * HOUR)]},
    )
    artifact = fit(config, workspace).artifact.id
    tables, forecasts = [], []
    for data in (plain, spoiled, early):
        job = validate(
            BatchConfig,
            {"name": data["name"], "data": data, "model": artifact, "detect": None, "forecast": {"horizon": 6}},
        )
        tables.append(run_batch(job, moment, workspace).partition.table("forecast"))
        asked = PredictConfig(artifact=artifact, dataset=data["name"], cutoff=moment.isoformat())
        forecasts.append(predict(asked, workspace).table)
    for found in (tables, forecasts):
        assert found[0].height == 2 * 6
        assert found[0].equals(found[1])
        assert found[0].equals(found[2])
    newest = predict(PredictConfig(artifact=artifact, dataset="spoiled"), workspace).table
    assert newest["cutoff"].unique().to_list() == [START + 199 * HOUR]
    # the last value of a row before the moment came after it, so a batch that read it would have shown it
    assert not predict(
        PredictConfig(artifact=artifact, dataset="spoiled", cutoff=(START + 199 * HOUR).isoformat()), workspace
    ).table.equals(
        predict(
            PredictConfig(artifact=artifact, dataset="plain", cutoff=(START + 199 * HOUR).isoformat()), workspace
        ).table
    )


def test_a_batch_refuses_a_model_that_saw_what_was_published_later(workspace: Workspace) -> None:
    """Rows up to the end of the valid span came out, or were revised last, after their time."""
    table, end = revised_table(200), START + 160 * HOUR
    data = _stored(workspace, table, "grid")
    ends = [str(START + 130 * HOUR), str(end), str(START + 190 * HOUR)]
    config = settings({"name": "linear"}, data=data, split={"kind": "times", "ends": ends}, covariates="usable")
    artifact = fit(config, workspace).artifact
    out = table.filter(pl.col("time") <= end, pl.col("load").is_not_null())["published"].max()
    assert isinstance(out, datetime)
    assert out > end + HOUR
    job = validate(BatchConfig, {"name": "grid", "data": data, "model": artifact.id, "detect": None})
    with pytest.raises(DataError, match="published until .* look better than they could have been"):
        run_batch(job, out - HOUR, workspace)
    assert run_batch(job, out, workspace).partition.manifest["trained_until"] == out.isoformat()
    assert artifact.provenance["published_until"] == str(out)
    silent = replace(artifact, provenance={**artifact.provenance, "published_until": None})  # of an earlier version
    history = load_history(workspace, config.data)
    assert published_until(silent, history, config.data) == out
    early = replace(silent, provenance={**silent.provenance, "created": (out - HOUR).isoformat()})
    found = published_until(early, history, config.data)
    assert found is not None
    assert end <= found < out
    assert isinstance(history, VintageFrame)
    old = fit(config, workspace, history=history.frozen(end)).artifact  # as a retraining fits, later than its as_of
    assert published_until(old, history, config.data) == end
    assert run_batch(job.model_copy(update={"model": old.id}), end, workspace).partition.manifest["trained_until"]
