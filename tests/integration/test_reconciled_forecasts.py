"""Coherent forecasts as predict, batch and backtest publish them: sums, intervals, refusals, and no look ahead."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import tsforge.forecasting.backtest as backtest_module
from tsforge.app.backtest import BacktestJobConfig
from tsforge.app.backtest import backtest as backtest_job
from tsforge.app.batch import BatchConfig, run_batch
from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import PredictConfig
from tsforge.app.forecast import predict as predict_job
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.artifact import load_artifact
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.aggregates import frame_hierarchy, with_aggregates
from tsforge.data.frame import SeriesFrame
from tsforge.data.hierarchy import HierarchyConfig
from tsforge.forecasting import backtest_folds
from tsforge.forecasting.coherent import Coherence, held_out_cutoffs, level_errors
from tsforge.forecasting.coherent_predict import predict_coherent
from tsforge.forecasting.reconcile import ReconcileConfig

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
IDS = ("n/a", "n/b", "n/c", "s/a", "s/b")
NESTED = HierarchyConfig(levels=("region", "shop"), separator="/")
NODES = ("total", "n", "s", *IDS)
WINDOW = {"context_length": 24, "horizon": 6}
LEVELS = [0.1, 0.5, 0.9]
# a pooled linear map of windows is coherent by itself; hidden layers are not
MODEL = {"model": {"name": "ar_net", "hidden": [8]}, "train": {"max_epochs": 3, "learning_rate": 0.01}}


def shop_table(days: int = 25, seed: int = 3) -> pl.DataFrame:
    """Hourly sales: a daily wave that all share, a common shock, own noise."""
    rng = np.random.default_rng(seed)
    hours = np.arange(days * 24)
    common = np.convolve(rng.normal(0, 1, len(hours) + 11), np.ones(12) / 3, "valid")
    parts = []
    for place, name in enumerate(IDS):
        wave = 10.0 * (place + 1) + 4.0 * np.sin(2 * np.pi * hours / 24)
        times = [FIRST + timedelta(hours=int(hour)) for hour in hours]
        values = wave + common + rng.normal(0, 1.5, len(hours))
        parts.append(pl.DataFrame({"shop": [name] * len(hours), "ds": times, "sales": values}))
    return pl.concat(parts)


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Any], str]:
    """A workspace with five shops whose sums are made on reading, and an artifact fitted on all eight series."""
    folder = tmp_path_factory.mktemp("shops")
    shop_table().write_parquet(folder / "shops.parquet")
    root = folder / "home"
    root.mkdir()
    workspace = Workspace(
        root=root, database_url=f"sqlite:///{root / 'store.db'}", tracking_uri=f"sqlite:///{root / 'mlflow.db'}"
    )
    data = {
        "name": "shops",
        "source": {"kind": "parquet", "path": str(folder / "shops.parquet")},
        "layout": "long",
        "series": "shop",
        "targets": ["sales"],
        "freq": "1h",
        "valid_range": {"sales": [0, 80]},
        "hierarchy": NESTED.model_dump(mode="json"),
    }
    ingest(validate(IngestConfig, {"data": data}), workspace)
    settings = {
        "data": data,
        **MODEL,
        "window": WINDOW,
        "split": {"kind": "fractions", "train": 0.6, "valid": 0.3, "test": 0.1},
        "calibration": {"quantile_levels": LEVELS},
        "tracking": {"enabled": False},
    }
    return workspace, data, fit(validate(FitConfig, settings), workspace).artifact.id


def gaps(table: pl.DataFrame, column: str = "mean") -> Any:
    """Return the forecast of total, n and s minus the sum of their shops."""
    wide = table.pivot(on="series_id", index=["time"], values=column)
    return np.array(
        [
            wide["total"] - wide.select(pl.sum_horizontal(IDS)).to_series(),
            wide["n"] - wide.select(pl.sum_horizontal(IDS[:3])).to_series(),
            wide["s"] - wide.select(pl.sum_horizontal(IDS[3:])).to_series(),
        ]
    )


def predict(shops: Any, **settings: Any) -> Any:
    return predict_job(validate(PredictConfig, {"artifact": shops[2], **settings}), shops[0])


def test_sums_are_made_on_reading_and_ranges_hold_for_the_shops(shops: Any) -> None:
    frame = load_dataset(shops[0], "shops", masked=True)
    assert frame.series_ids == tuple(sorted(NODES))
    total = frame.select_series(["total"]).table["sales"]
    assert total.null_count() == 0
    assert total.min() > 80.0  # beyond the range of a shop
    one = load_dataset(shops[0], "shops", series=["total"], masked=True)
    assert one.table.equals(frame.select_series(["total"]).table)


@pytest.mark.parametrize("method", ["bottom_up", "top_down", "ols", "wls_structural", "wls_variance", "mint"])
def test_predictions_add_up(shops: Any, method: str) -> None:
    plain = predict(shops)
    assert np.abs(gaps(plain.table)).max() > 1e-3
    found = predict(shops, reconcile=method)
    assert np.abs(gaps(found.table)).max() < 1e-9
    assert found.quantile_levels == plain.quantile_levels == (0.1, 0.5, 0.9)
    assert found.table.select("series_id", "step", "time").equals(plain.table.select("series_id", "step", "time"))
    assert (found.table["q0.1"] < found.table["mean"]).all()
    assert np.allclose(found.table["q0.5"], found.table["mean"])
    facts = found.metadata["reconcile"]
    assert facts["method"] == method
    assert set(facts["incoherence"]) == {"total", "region"}
    assert 0.0 < facts["incoherence"]["total"] < 1.0
    assert facts["held_out_windows"] >= 100
    assert not facts["in_sample"]
    assert ("shrinkage" in facts) == (method == "mint")


def test_other_ways_to_ask(shops: Any) -> None:
    points = predict(shops, reconcile={"method": "ols", "intervals": "none"}, horizon=3)
    assert points.quantile_levels == ()
    assert points.table["step"].max() == 3
    assert "held_out_windows" not in points.metadata["reconcile"]  # needs no errors
    some = predict(shops, reconcile="mint", series=["n", "n/a"])
    every = predict(shops, reconcile="mint")
    assert some.table.equals(every.table.filter(pl.col("series_id").is_in(["n", "n/a"])))
    assert some.table["series_id"].unique().sort().to_list() == ["n", "n/a"]
    wide = predict(shops, reconcile={"method": "mint", "intervals": "gaussian"})
    assert np.abs(gaps(wide.table)).max() < 1e-9
    width = (wide.table["q0.9"] - wide.table["q0.1"]).to_numpy()
    reference = (every.table["q0.9"] - every.table["q0.1"]).to_numpy()
    assert 0.6 < np.median(width / reference) < 1.6
    middle = predict(shops, reconcile={"method": "middle_out", "level": "region"})
    base = predict(shops).table.filter(series_id="n")["mean"]
    assert np.allclose(middle.table.filter(series_id="n")["mean"], base)
    split = predict(shops, reconcile={"method": "top_down", "proportions": "historical"})
    assert np.abs(gaps(split.table)).max() < 1e-9
    assert load(PredictConfig, "predict", ["reconcile=mint"]).reconcile == ReconcileConfig()
    for wrong, message in (
        ({"rollout": True}, "reconcile gives a table of the trained horizon"),
        ({"paths": 5}, "no paths"),
        ({"reconcile": "magic"}, "reconcile.method"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(PredictConfig, {"reconcile": "mint", **wrong})


def test_coverage_of_reconciled_intervals(shops: Any) -> None:
    """Over many cutoffs of the span that nothing was fitted on, 80 % intervals hold about 80 % of the values."""
    workspace, _, name = shops
    artifact, frame = load_artifact(workspace.artifacts / name), load_dataset(workspace, "shops")
    hierarchy = frame_hierarchy(frame, NESTED)
    rows = len(shop_table()) // len(IDS)
    start = int(0.8 * rows)
    visible = frame.until(FIRST + timedelta(hours=start))
    at = np.arange(start, rows - 6)
    base = backtest_folds.forecasts_at(artifact, frame, at, steps=6)
    cutoffs, _ = held_out_cutoffs(artifact, visible, 6, 200)
    held = backtest_folds.forecasts_at(artifact, visible, cutoffs, steps=6)
    config = ReconcileConfig(method="mint")
    table = Coherence(hierarchy, config, levels=(0.1, 0.9), visible=visible, held_out=held).apply(base)
    inside = table.select(pl.col("actual").is_between(pl.col("q0.1"), pl.col("q0.9"))).to_series().mean()
    assert 0.72 < inside < 0.92


def test_a_batch_publishes_sums_that_add_up(shops: Any) -> None:
    workspace, data, artifact = shops
    settings = {"name": "shops", "data": data, "model": artifact, "detect": None, "ingest": False}
    config = validate(BatchConfig, settings | {"forecast": {"reconcile": "mint"}})
    result = run_batch(config, FIRST + timedelta(days=24, hours=3), workspace)
    table = result.partition.table("forecast")
    assert table is not None
    assert table.height == 8 * 6
    assert np.abs(gaps(table)).max() < 1e-9
    assert result.partition.manifest["reconcile"]["method"] == "mint"
    assert table["cutoff"].unique().to_list() == [FIRST + timedelta(days=24, hours=3)]
    flat = {key: value for key, value in data.items() if key != "hierarchy"}
    with pytest.raises(ConfigError, match="data set 'shops' has no hierarchy"):
        validate(BatchConfig, settings | {"data": flat, "forecast": {"reconcile": "mint"}})


def job(data: Any, **changes: Any) -> BacktestJobConfig:
    settings: dict[str, Any] = {
        "data": data,
        **MODEL,
        "window": WINDOW,
        "valid": 0.3,
        "calibration": {"quantile_levels": LEVELS},
        "tracking": {"enabled": False},
    }
    backtest = {"num_cutoffs": 6, "refit_every": 3, "reconcile": "mint", "baselines": ["last_value"], **changes}
    return validate(BacktestJobConfig, settings | {"backtest": backtest})


def test_a_backtest_grades_before_and_after_by_level(shops: Any) -> None:
    workspace, data, _ = shops
    report = backtest_job(job(data), workspace)
    models = report.leaderboard["model"].to_list()
    assert set(models) == {"ar_net", "ar_net+mint", "last_value"}
    both = {name: report.forecasts.filter(model=name) for name in models}
    assert np.abs(gaps(both["ar_net+mint"])).max() < 1e-9
    assert np.abs(gaps(both["ar_net"])).max() > 1e-3
    assert both["ar_net+mint"].height == both["ar_net"].height
    records = {row["level"]: row for row in report.settings["reconciled_levels"]}
    assert list(records) == ["total", "region", "bottom"]
    for level, row in records.items():
        nodes = {"total": ["total"], "region": ["n", "s"], "bottom": list(IDS)}[level]
        for when, name in (("before", "ar_net"), ("after", "ar_net+mint")):
            rows = both[name].filter(pl.col("series_id").is_in(nodes))
            assert row[when] == pytest.approx((rows["mean"] - rows["actual"]).abs().mean())
        assert any(f"level {level}: mean absolute error" in note for note in report.notes)
    assert "coverage_80" in report.leaderboard.columns


def test_levels_are_graded_by_what_was_observed(shops: Any) -> None:
    """A sum over a missing part is missing: such cells are no cells, and a level of nothing else has no errors."""
    hierarchy = frame_hierarchy(load_dataset(shops[0], "shops"), NESTED)
    steps = range(1, 5)
    rows = [
        {"model": model, "series_id": node, "variate": "sales", "cutoff": 0, "step": step, "mean": off, "actual": 0.0}
        for model, off in (("m", 2.0), ("m+mint", 1.0))
        for node in NODES
        for step in steps
    ]
    lost = (pl.col("series_id") == "total") | ((pl.col("series_id") == "n") & (pl.col("step") > 1))
    table = pl.DataFrame(rows).with_columns(actual=pl.when(~lost).then("actual"))
    found = {row["level"]: row for row in level_errors(table, hierarchy, [("m", "m+mint")])}
    assert {level: row["cells"] for level, row in found.items()} == {"region": 1 + 4, "bottom": 4 * len(IDS)}
    assert [(row["before"], row["after"], row["gain"]) for row in found.values()] == [(2.0, 1.0, 0.5)] * 2


def perturbed(frame: SeriesFrame, after: datetime) -> SeriesFrame:
    """Return the frame with other shops, and their other sums, after a time."""
    rng = np.random.default_rng(9)
    noise = pl.Series("noise", rng.normal(0, 50, frame.num_rows))
    late = pl.col("time") > pl.lit(after)
    table = frame.table.with_columns(noise).with_columns(
        pl.when(late).then(pl.col("sales") + pl.col("noise")).otherwise("sales").alias("sales")
    )
    rebuild = NESTED.model_copy(update={"given": "rebuild"})
    return with_aggregates(SeriesFrame(table.drop("noise"), frame.schema), rebuild)


def predicted_from(frame: SeriesFrame, artifact: Any, cutoff: datetime, method: str) -> pl.DataFrame:
    config = validate(ReconcileConfig, {"method": method})
    return predict_coherent(artifact, frame, NESTED, config, cutoff=cutoff).table


@pytest.mark.parametrize("method", ["mint", "wls_variance"])
def test_the_future_changes_neither_weights_nor_forecasts(shops: Any, method: str) -> None:
    workspace, _, name = shops
    artifact, frame = load_artifact(workspace.artifacts / name), load_dataset(workspace, "shops")
    cutoff = FIRST + timedelta(days=22)
    other = perturbed(frame, cutoff)
    assert not other.table.equals(frame.table)
    before, after = (predicted_from(one, artifact, cutoff, method) for one in (frame, other))
    assert before.equals(after)


def spoiled_backtests(workspace: Any, data: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return reconciled forecasts of one cutoff with the true future and with another one."""
    from tsforge.app.fit import fit_frame

    frame = load_dataset(workspace, "shops")
    config = job(data, num_cutoffs=1, refit_every=1)
    last = frame.table["time"].max()
    assert isinstance(last, datetime)

    def make(visible: Any, cutoff: Any) -> Any:
        return fit_frame(visible, config.fit_config())[0]

    found = []
    for one in (frame, perturbed(frame, last - timedelta(hours=6))):
        report = backtest_module.backtest({"ar_net": make}, one, config.backtest, horizon=6, structure=NESTED)
        found.append(report.forecasts.filter(model="ar_net+mint").drop("actual"))
    return found[0], found[1]


def test_the_backtest_reconciles_from_the_past_only(shops: Any) -> None:
    before, after = spoiled_backtests(shops[0], shops[1])
    assert before.equals(after)


def test_a_covariance_of_test_errors_is_caught(shops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur estimates W from the errors of the very forecasts it reconciles."""
    honest = backtest_folds.make_coherence

    def leaky(artifact: Any, visible: Any, joint: Any, wanted: Any, forecasts: Any) -> Any:
        class Peeking(Coherence):
            def apply(self, table: pl.DataFrame, **settings: Any) -> pl.DataFrame:
                late = Coherence(
                    joint[0], ReconcileConfig(intervals="none"), levels=(), visible=visible, held_out=table
                )
                return late.apply(table, **settings)

        made = honest(artifact, visible, joint, wanted, forecasts)
        made.__class__ = Peeking
        return made

    monkeypatch.setattr(backtest_folds, "make_coherence", leaky)
    before, after = spoiled_backtests(shops[0], shops[1])
    assert not before.equals(after)


def test_what_cannot_be_reconciled_is_named(shops: Any) -> None:
    workspace, _, name = shops
    artifact, frame = load_artifact(workspace.artifacts / name), load_dataset(workspace, "shops")
    early = FIRST + timedelta(hours=29)
    with pytest.raises(DataError, match=r"reconciliation from past errors needs 4 windows of 24 \+ 6 rows"):
        predicted_from(frame, artifact, early, "mint")
    with pytest.raises(DataError, match=r"1 of 5 bottoms are not in the data|are neither a bottom"):
        ids = [one for one in frame.series_ids if one != "n/a"]
        structure = HierarchyConfig(children={"n": IDS[:3], "s": IDS[3:], "total": ("n", "s")})
        predict_coherent(artifact, frame.select_series(ids), structure, ReconcileConfig())
    base = predict(shops).table.filter(~((pl.col("series_id") == "n") & (pl.col("step") == 2)))
    hierarchy = frame_hierarchy(frame, NESTED)
    points = Coherence(hierarchy, ReconcileConfig(method="ols", intervals="none"), levels=(), visible=frame)
    with pytest.raises(DataError, match=r"1 of 6 forecast times lack some node \(n\)"):
        points.apply(base)
    assert points.apply(base, drop_incomplete=True)["step"].unique().sort().to_list() == [1, 3, 4, 5, 6]
    with pytest.raises(DataError, match="1 of 8 nodes of the hierarchy have no forecast"):
        points.apply(base.filter(pl.col("series_id") != "n"))


def test_rows_of_the_training_are_a_last_resort(shops: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Before the end of the training span there is nothing held out: said aloud, and on record."""
    workspace, _, name = shops
    artifact, frame = load_artifact(workspace.artifacts / name), load_dataset(workspace, "shops")
    found = predict_coherent(artifact, frame, NESTED, ReconcileConfig(), cutoff=FIRST + timedelta(days=10))
    assert found.metadata["reconcile"]["in_sample"]
    assert "rows it was trained on" in caplog.text


def test_predict_starts_new_series_cold(shops: Any) -> None:
    found = predict(shops, cold_start={"like": {"n/d": "n/a"}})
    new, old = (found.table.filter(series_id=name) for name in ("n/d", "n/a"))
    assert new.select("step", "time", "mean").equals(old.select("step", "time", "mean"))
    assert (new["q0.9"] - new["q0.1"]).min() > (old["q0.9"] - old["q0.1"]).max()
    assert found.metadata["cold_start"]["like"] == {"n/d": "n/a"}
    config = load(PredictConfig, "predict", ["cold_start=pad"])
    assert config.cold_start is not None
    assert load(PredictConfig, "predict", ["cold_start.like.fresh=old"]).cold_start is not None
    with pytest.raises(ConfigError, match="cold_start gives a table of the trained horizon"):
        validate(PredictConfig, {"cold_start": "pad", "reconcile": "mint"})


def test_new_series_can_be_selected_beside_stored_ones(shops: Any) -> None:
    every = predict(shops, cold_start={"like": {"n/d": "*", "n/e": "n/b"}}).table

    def names(series: list[str]) -> set[str]:
        found = predict(shops, cold_start={"like": {"n/d": "*", "n/e": "n/b"}}, series=series).table
        assert found.equals(every.filter(pl.col("series_id").is_in(found["series_id"].unique().to_list())))
        return set(found["series_id"])

    assert names(["n/a", "n/d"]) == {"n/a", "n/d"}
    assert names(["n/e"]) == {"n/e"}
    assert names(["n/a"]) == {"n/a", "n/d", "n/e"}  # as ever: the command asks for them
    with pytest.raises(DataError, match="unknown series n/f"):
        names(["n/a", "n/f", "n/d"])
    with pytest.raises(ConfigError, match="n/a has rows"):
        predict(shops, cold_start={"like": {"n/a": "n/b"}}, series=["n/a"])


def test_variates_of_one_series(tmp_path: Path) -> None:
    """The nodes may be the targets of one series: the same machinery, series by series."""
    from tsforge.app.fit import fit_frame

    wide = shop_table().pivot(on="shop", index="ds", values="sales").rename({"n/a": "x", "n/b": "y"})
    structure = validate(HierarchyConfig, {"children": {"both": ["x", "y"]}, "over": "variates"})
    frame = with_aggregates(SeriesFrame.from_wide(wide, time="ds", targets=["x", "y"]), structure)
    settings = {
        "data": {"name": "v", "source": {"kind": "parquet", "path": str(tmp_path / "v.parquet")}},
        "model": {"name": "linear"},
        "window": WINDOW,
        "calibration": {"quantile_levels": LEVELS},
    }
    artifact = fit_frame(frame, validate(FitConfig, settings))[0]
    table = predict_coherent(artifact, frame, structure, ReconcileConfig()).table
    found = table.pivot(on="variate", index="time", values="mean")
    assert np.allclose(found["both"], found["x"] + found["y"], atol=1e-9)
