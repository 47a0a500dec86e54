"""Every page, headless: with content, without any, and with a store that does not answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from streamlit.testing.v1 import AppTest

from tsforge.core.workspace import Workspace
from tsforge.tracking.runs import Tracker

VIEWS = (
    "overview",
    "forecasts",
    "anomalies",
    "backtests",
    "dynamics",
    "explanations",
    "graphs",
    "data",
    "runs",
    "triage",
)


def draw(view: str, **query: str) -> Any:
    """Run one view as its page would and return what is on it."""
    test = AppTest.from_string(f"from dashboards.views import {view}\n{view}.show()\n", default_timeout=240)
    for name, value in query.items():
        test.query_params[name] = value
    return test.run()


def box(page: Any, label: str) -> Any:
    return next(found for found in page.selectbox if found.label.startswith(label))


@pytest.fixture
def filled(filled_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The filled workspace, set as TSFORGE_HOME."""
    monkeypatch.setenv("TSFORGE_HOME", str(filled_workspace))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return filled_workspace


@pytest.mark.parametrize("view", VIEWS)
def test_empty_page_says_what_to_run(view: str, workspace_root: Path) -> None:
    page = draw(view)
    assert not page.exception
    assert page.title[0].value
    assert page.info, "no empty state"
    assert any("tsforge " in block.value for block in page.code)
    assert not (workspace_root / "mlflow.db").exists(), "looking at a page made a tracking store"


@pytest.mark.parametrize("view", VIEWS)
def test_broken_store_is_one_message(view: str, workspace_root: Path) -> None:
    workspace_root.mkdir(parents=True)
    (workspace_root / "store.db").write_bytes(b"this is no database" * 100)
    (workspace_root / "mlflow.db").write_bytes(b"nor is this" * 100)
    page = draw(view)
    assert not page.exception
    if view in ("overview", "data", "runs", "triage"):
        assert len(page.error) == (2 if view in ("overview", "runs") else 1), "these ask two stores"
        assert all("cannot be shown" in error.value for error in page.error)


def test_a_tracking_store_that_fails_hides_no_jobs(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    home = tmp_path / "damaged"
    shutil.copytree(filled, home)
    monkeypatch.setenv("TSFORGE_HOME", str(home))
    (home / "mlflow.db").write_bytes(b"this is no database" * 100)
    page = draw("runs")
    assert not page.exception
    assert [error.value.split("**")[1] for error in page.error] == ["Trainings cannot be shown."]
    assert "batch/nightly" in set(page.dataframe[0].value["job"])


@pytest.mark.parametrize("view", VIEWS)
def test_page_with_content(view: str, filled: Path) -> None:
    page = draw(view)
    assert not page.exception
    assert not page.error
    assert not page.info, "an empty state beside content"
    assert page.dataframe or page.metric


def test_damaged_results_are_one_message_or_left_out(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    home = tmp_path / "damaged"
    shutil.copytree(filled, home)
    monkeypatch.setenv("TSFORGE_HOME", str(home))
    for name in ("published", "reports/detections"):
        for table in (home / name).rglob("scores.parquet"):
            table.write_bytes(b"PAR1 and then nothing")
    for place in (home / "reports/backtests").rglob("report.json"):
        place.write_text("{")
    page = draw("anomalies")
    assert not page.exception
    assert len(page.error) == 1
    assert "damaged" in page.error[0].value
    assert draw("backtests").info, "a damaged backtest is not offered"


def test_what_is_left_out_is_named_and_a_link_to_it_says_why(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "damaged"
    shutil.copytree(filled, home)
    monkeypatch.setenv("TSFORGE_HOME", str(home))
    broken = next(path for path in (home / "artifacts").iterdir() if path.name.startswith("dlinear"))
    (broken / "metrics.json").write_text("{")
    report = next((home / "reports/backtests").rglob("report.json"))
    report.write_text("{")
    said = draw("overview").warning[0].value
    assert f"`{broken.name}` (metrics.json cannot be read)" in said
    assert report.parent.name in said
    page = draw("forecasts", artifact=broken.name)
    assert not page.exception
    assert any("which is damaged" in note.value for note in page.warning)
    assert any(report.parent.name in note.value for note in draw("backtests").warning)


@pytest.mark.parametrize("view", ["forecasts", "explanations", "graphs"])
@pytest.mark.parametrize("back", ["\u00b2", "\u2463", "99999999", "-1"])
def test_a_cutoff_that_is_no_number_or_out_of_range_is_told(filled: Path, view: str, back: str) -> None:
    page = draw(view, back=back)
    assert not page.exception
    assert any("steps back" in note.value and "is not here" in note.value for note in page.warning)
    assert page.slider(key="choice-back").value == 0


@pytest.mark.parametrize(
    ("status", "why"), [("RUNNING", "still running"), ("FINISHED", "closed form"), ("FAILED", "ended before")]
)
def test_a_run_without_curves_says_why(workspace_root: Path, monkeypatch: Any, status: str, why: str) -> None:
    from tsforge.app import catalog

    run = {"id": "r", "name": "run", "status": status, "started": datetime(2026, 1, 1, tzinfo=UTC), "error": None}
    empty = pl.DataFrame(schema={"epoch": pl.Int64, "name": pl.String, "value": pl.Float64})
    monkeypatch.setattr(catalog, "tracking_runs", lambda workspace, limit: [run])
    monkeypatch.setattr(catalog, "run_history", lambda workspace, name: empty)
    page = draw("runs")
    assert not page.exception
    assert [note.value for note in page.caption if "no curves" in note.value and why in note.value]


def test_a_share_that_rounds_to_nothing_has_no_sign() -> None:
    test = AppTest.from_string(
        "from dashboards.state import table\ntable([{'a': -1e-12}, {'a': -0.25}, {'a': None}], percentages=('a',))"
    )
    shown = test.run().dataframe[0].value["a"].tolist()
    assert [str(value) for value in shown] == ["0.0", "-0.25", "nan"]


def test_a_gain_that_rounds_to_nothing_has_no_sign() -> None:
    from dashboards.views.backtests import _gain

    assert [_gain(error, 1.0) for error in (1.0001, 0.9, 1.002)] == [
        "the same as with",
        "10.0 % better than with",
        "0.2 % worse than with",
    ]


def test_aggregates_are_shown_wherever_series_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsforge.app.batch import BatchConfig, run_batch
    from tsforge.app.fit import FitConfig, fit
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate

    times = pl.datetime_range(datetime(2026, 1, 1), datetime(2026, 1, 9), "1h", eager=True, closed="left")
    wave = (pl.Series(range(len(times)), dtype=pl.Float64) * 0.26).sin()
    pl.DataFrame({"ds": times, "N/1.x": wave, "N/2.x": 2 * wave, "S/1.x": wave + 1}).write_parquet(
        tmp_path / "s.parquet"
    )
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "home"))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    data = {"name": "shops", "source": {"kind": "parquet", "path": str(tmp_path / "s.parquet")}, "freq": "1h"}
    data |= {"separator": ".", "targets": ["x"], "hierarchy": {"levels": ["region", "shop"], "separator": "/"}}
    workspace = Workspace.open()
    ingest(validate(IngestConfig, {"data": data}), workspace)
    settings = {"data": data, "model": {"name": "linear"}, "window": {"context_length": 24, "horizon": 6}}
    settings |= {
        "split": {"kind": "fractions", "train": 0.5, "valid": 0.3, "test": 0.2},
        "tracking": {"enabled": False},
    }
    artifact = fit(validate(FitConfig, settings), workspace).artifact.id
    job = {"name": "nightly", "data": data, "model": artifact, "ingest": False, "detect": None}
    run_batch(validate(BatchConfig, job), times[-7].replace(tzinfo=UTC), workspace)
    for view, query in (
        ("forecasts", {}),
        ("forecasts", {"source": "published"}),
        ("explanations", {}),
        ("data", {}),
    ):
        page = draw(view, series="total", **query)
        assert not page.exception
        assert not page.error, (view, query)
        assert box(page, "Series").value == "total"
        assert page.get("plotly_chart")
    assert any("An aggregate of other series" in note.value for note in page.caption)


def test_overview_tells_freshness_in_words(filled: Path) -> None:
    page = draw("overview")
    rows = {row["name"]: row for row in page.dataframe[0].value.to_dict("records")}
    assert rows["plant"]["freshness"] == "fresh"
    assert rows["nyc_weather"]["freshness"] == "no limit stated"
    assert rows["plant"]["rows"] == 2000
    assert {metric.label: metric.value for metric in page.metric}["Failed of the last jobs"] == "0 of 2"


def test_forecast_page_grades_an_earlier_cutoff(filled: Path) -> None:
    page = draw("forecasts", back="48")
    assert not page.exception
    labels = [metric.label for metric in page.metric]
    assert "Mean absolute error" in labels
    assert any(label.startswith("Inside the") for label in labels)


def test_forecast_from_the_end_of_the_data_has_no_errors_yet(filled: Path) -> None:
    model = next(path.name for path in (filled / "artifacts").iterdir() if path.name.startswith("dlinear"))
    page = draw("forecasts", artifact=model)
    assert not page.exception
    assert not page.metric
    assert any("Nothing has been observed" in caption.value for caption in page.caption)


def test_known_covariates_bound_the_newest_cutoff(filled: Path) -> None:
    model = next(path.name for path in (filled / "artifacts").iterdir() if path.name.startswith("ar_net"))
    page = draw("forecasts", artifact=model)  # reads the driver, which ends with the data
    assert not page.error
    assert page.metric, "the forecast ends where the driver does, so all of it has been observed"


def test_state_space_model_shows_kernels_and_memory(filled: Path) -> None:
    model = next(path.name for path in (filled / "artifacts").iterdir() if path.name.startswith("s4"))
    page = draw("forecasts", artifact=model)
    assert not page.exception
    assert not page.error
    assert [tab.label for tab in page.tabs] == ["kernels", "memory", "timescales"]
    notes = [caption.value for caption in page.caption]
    assert any("Impulse responses" in note for note in notes)
    assert any("95 %" in note for note in notes)
    memory = next(frame.value for frame in page.dataframe if "median" in frame.value.columns)
    assert memory["layer"].tolist() == [0, 1]
    assert ((memory["longest"] >= 1) & (memory["longest"] <= 72)).all()


def chimera(home: Path) -> str:
    return next(path.name for path in (home / "artifacts").iterdir() if path.name.startswith("chimera"))


def test_chimera_shows_time_scales_coupling_and_parts(filled: Path) -> None:
    page = draw("forecasts", artifact=chimera(filled))
    assert not page.exception
    assert not page.error
    assert not page.info, "weights that were trained need no warning"
    assert [tab.label for tab in page.tabs] == ["coupling", "time scales"]
    matrix = json.loads(page.get("plotly_chart")[-2].proto.spec)
    assert matrix["layout"]["yaxis"]["ticktext"] == ["x1", "x2", "x3"]
    scales = next(frame.value for frame in page.dataframe if "memory" in frame.value.columns)
    assert len(scales) == 8  # two layers, heads and directions
    parts = json.loads(page.get("plotly_chart")[1].proto.spec)
    named = [item["text"] for item in parts["layout"]["annotations"]]
    assert named[-3:] == ["trend", "seasonal", "rest"]
    assert any("not drawn: offset" in note.value for note in page.caption)


def explained(home: Path, tmp_path: Path, monkeypatch: Any, change: Any, **training: Any) -> Any:
    """The forecast page of the chimera after ``change`` of its explanation."""
    copy = tmp_path / "changed"
    shutil.copytree(home, copy)
    monkeypatch.setenv("TSFORGE_HOME", str(copy))
    folder = copy / "artifacts" / chimera(copy)
    found = json.loads((folder / "explanation.json").read_text())
    change(found)
    (folder / "explanation.json").write_text(json.dumps(found))
    facts = json.loads((folder / "provenance.json").read_text())
    facts["training"] |= training
    (folder / "provenance.json").write_text(json.dumps(facts))
    test = AppTest.from_string(
        "from dashboards.state import workspace\nfrom dashboards.views import forecasts\n"
        "from tsforge.app import catalog\n"
        f"forecasts._explanation(catalog.artifact_facts(workspace(), {folder.name!r}), 'x1')\n",
        default_timeout=240,
    )
    return test.run()


def regenn(home: Path) -> str:
    return next(path.name for path in (home / "artifacts").iterdir() if path.name.startswith("regenn"))


def test_graphs_page_shows_both_layers_seeds_and_a_forecast(filled: Path) -> None:
    page = draw("graphs", layer="target", back="30")
    assert not page.exception
    assert not page.error
    assert "not causes" in page.warning[0].value
    drawn = [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]
    heat = [figure["data"][0] for figure in drawn if figure["data"][0]["type"] == "heatmap"]
    assert len(heat) == 9  # graph, three comparisons, weights, three of seeds, attention
    assert any("3 seeds" in note.value for note in page.caption)
    bars = next(figure for figure in drawn if figure["data"][0]["type"] == "bar")
    assert [trace["name"] for trace in bars["data"]] == ["x1 (itself)", "x2", "x3", "network, whole"]
    assert {metric.label for metric in page.metric} == {"Share of the autoregression", "Share of the network"}
    table = page.dataframe[-1].value
    assert set(table["layer"]) == {"source", "target"}


def test_graphs_page_with_too_few_seeds_says_how_to_get_more(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(filled, home)
    kept = regenn(home)
    for path in (home / "artifacts").iterdir():
        if path.name.startswith("regenn") and path.name != kept:
            shutil.rmtree(path)
    monkeypatch.setenv("TSFORGE_HOME", str(home))
    page = draw("graphs", artifact=kept)
    assert not page.exception
    assert any("1 seed(s)" in note.value and "train.seed=1" in note.value for note in page.caption)
    # graphs over epochs: none stored, then a table of three epochs
    assert any("log_graphs=1" in note.value for note in page.caption)
    charts = len(page.get("plotly_chart"))
    final = pl.read_parquet(home / "artifacts" / kept / "evolution.parquet")
    steps = [final.with_columns(pl.lit(epoch).alias("epoch"), pl.col("value") * epoch) for epoch in (0, 1, 2)]
    pl.concat(steps).write_parquet(home / "artifacts" / kept / "evolution_epochs.parquet")
    page = draw("graphs", artifact=kept)
    assert not page.exception
    assert len(page.get("plotly_chart")) == charts + 1
    assert any("after 3 epochs" in note.value for note in page.caption)


def test_kernel_of_the_autoregression_is_drawn_on_the_forecast_page(filled: Path) -> None:
    page = draw("forecasts", artifact=regenn(filled))
    assert not page.exception
    assert [tab.label for tab in page.tabs] == ["autoregressive kernel"]
    assert json.loads(page.get("plotly_chart")[-1].proto.spec)["data"][0]["type"] == "heatmap"


def test_variates_kept_apart_are_said_to_be(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    page = explained(filled, tmp_path, monkeypatch, lambda found: found["coupling"].clear())
    assert not page.exception
    assert any("No coupling matrix" in note.value for note in page.caption)


def test_the_order_of_variates_is_named(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    order = [{"position": place, "variate": number} for place, number in enumerate((2, 0, 1))]
    page = explained(filled, tmp_path, monkeypatch, lambda found: found.update(order=order[::-1]))
    assert not page.exception
    assert any(text.value == "x3, x1, x2" for text in page.markdown)


def test_the_gain_of_an_observer_is_drawn_for_every_variate(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    observer = [{"variate": number, "gain": gain, "one_step_error": 0.1} for number, gain in enumerate((0.2, 1.0, 0.5))]
    page = explained(filled, tmp_path, monkeypatch, lambda found: found.update(observer=observer))
    assert not page.exception
    shown = next(frame.value for frame in page.dataframe if "gain" in frame.value.columns)
    assert shown["variate"].tolist() == ["x1", "x2", "x3"]
    drawn = [json.loads(item.proto.spec) for item in page.get("plotly_chart")]
    assert any(trace["type"] == "bar" and trace["y"] == ["x1", "x2", "x3"] for item in drawn for trace in item["data"])


def test_a_network_that_was_taken_back_is_said_to_be(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def still(found: dict[str, Any]) -> None:
        for record in found["coupling"]:
            record["effect"] = 0.0

    page = explained(filled, tmp_path, monkeypatch, still, best_epoch=-1)
    assert not page.exception
    assert any("closed-form start" in note.value for note in page.info)
    assert any("No variate moves another" in note.value for note in page.caption)


def test_a_warm_start_that_was_kept_is_named(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    page = explained(filled, tmp_path, monkeypatch, lambda found: None, best_epoch=-1, started_from="chimera-earlier")
    assert not page.exception
    assert any("the weights of chimera-earlier" in note.value for note in page.info)
    assert not any("closed-form start" in note.value for note in page.info)


def test_published_forecast_is_shown_as_it_was_published(filled: Path) -> None:
    import polars as pl

    page = draw("forecasts", source="published")
    assert not page.exception
    assert len(box(page, "Batch").options) == 2
    newest = sorted((filled / "published/nightly").iterdir())[-1]
    stored = pl.read_parquet(newest / "forecast.parquet").filter(series_id="series_0", variate="x1")
    shown = next(frame.value for frame in page.dataframe if "mean" in frame.value.columns)
    assert shown["mean"].tolist() == stored.sort("step")["mean"].to_list()


def test_anomaly_page_shows_the_strongest_event_first(filled: Path) -> None:
    report = next((filled / "reports/detections").iterdir()).name
    page = draw("anomalies", detection=report)
    events = box(page, "Event")
    peaks = [float(option.split("peak ")[1].split(",")[0]) for option in events.options]
    assert len(peaks) > 1
    assert peaks == sorted(peaks, reverse=True)
    facts = next(frame.value for frame in page.dataframe if "fact" in frame.value.columns)
    listed = next(frame.value for frame in page.dataframe if "state" in frame.value.columns)
    said = facts.set_index("fact").loc["state", "value"].partition(":")[0]
    assert said in set(listed["state"]), "one word for one state"


def test_anomaly_page_grades_against_known_anomalies(filled: Path) -> None:
    report = next((filled / "reports/detections").iterdir()).name
    page = draw("anomalies", detection=report)
    assert any("Graded" in head.value for head in page.subheader)


def test_every_batch_of_a_job_can_be_read_as_one(filled: Path) -> None:
    page = draw("anomalies", detection="batch/nightly")
    assert not page.exception
    assert not page.error
    assert any("the last 2" in option for option in box(page, "Detection").options)


def test_batches_keep_the_alarm_rate_that_normal_data_should_have(filled: Path) -> None:
    page = draw("anomalies", detection="batch/nightly")
    assert any("of normal rows should alarm" in note.value for note in page.caption)


def test_backtest_page_says_when_a_model_loses(filled: Path) -> None:
    import polars as pl

    folder = next((filled / "reports/backtests").iterdir())
    board = {row["model"]: row for row in pl.read_parquet(folder / "leaderboard.parquet").to_dicts()}
    for metric in ("mase", "mae"):
        naive = min(board[name][metric] for name in ("last_value", "seasonal_naive", "drift"))
        page = draw("backtests", metric=metric)
        warned = any("does not beat" in warning.value for warning in page.warning)
        assert warned == (board["ar_net"][metric] >= naive)


def test_backtest_page_shows_tests_regimes_and_the_worst_series_first(filled: Path) -> None:
    import polars as pl

    from tsforge.forecasting.report import load_report

    report = load_report(next((filled / "reports/backtests").iterdir()))
    page = draw("backtests", metric="mae")
    assert not page.exception
    assert any(text.value == "Against seasonal_naive, the reference" for text in page.markdown)
    worst = page.dataframe[-1].value
    expected = report.worst_series()
    assert worst["series_id"].tolist() == expected["series_id"].to_list()
    assert worst["skill_mae"].tolist() == pytest.approx(expected["skill_mae"].to_list())
    bars = json.loads(page.get("plotly_chart")[-1].proto.spec)["data"][0]
    assert bars["y"] == expected["series_id"].to_list()[::-1], "the first bar is at the bottom"
    lost = int((expected["skill_mae"] < 0).sum())
    assert any(f"worse than seasonal_naive on {lost} of {expected.height}" in text.value for text in page.caption)
    regimes = page.dataframe[-2].value
    assert regimes["count"].sum() == report.leaderboard["count"][0]
    own = report.regimes.filter(pl.col("model") == "ar_net", pl.col("kind") == "volatility")
    assert regimes["ar_net"].tolist() == pytest.approx(own["mae"].to_list())


def test_backtest_of_the_reference_alone_has_nothing_to_compare(workspace_root: Path) -> None:
    """A report without regimes and a model that is the reference: the page says so instead of drawing empty charts."""
    import polars as pl

    from tsforge.data.frame import SeriesFrame
    from tsforge.forecasting.backtest import BacktestConfig, backtest
    from tsforge.forecasting.baselines import fit_baseline

    rows = pl.DataFrame({"time": range(60), "y": [float(row * row % 7) for row in range(60)]})
    frame = SeriesFrame.from_long(rows, time="time", targets=("y",), freq="1i")
    report = backtest(
        lambda seen, cutoff: fit_baseline("last_value", seen, horizon=4, season=1, context_length=4),
        frame,
        BacktestConfig(num_cutoffs=3, season_length=1, baselines=(), regimes=()),
        horizon=4,
    )
    assert report.tests.is_empty()
    assert report.regimes.is_empty()
    about = {"dataset": "made", "model": "last_value", "created": "2026-01-01T00:00:00+00:00"}
    replace(report, settings={**report.settings, **about}).save(workspace_root / "reports/backtests/alone")
    page = draw("backtests")
    assert not page.exception
    said = " ".join(text.value for text in page.info)
    assert "nothing to hold it against" in said
    assert "not broken down by regimes" in said
    assert "it is the reference itself" in said


def test_run_page_tells_why_a_run_failed(filled: Path) -> None:
    page = draw("runs")
    runs = page.dataframe[0].value
    failed = runs[runs["state"] == "failed"]
    assert len(failed) == 1
    assert "context_length 5000" in failed.iloc[0]["error"]


def test_trials_stand_below_their_study_with_why_they_were_stopped(
    tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dashboards.views import runs as view

    tracker = Tracker.open(tracked_workspace)
    with tracker.start("a fit"):
        pass
    settings, tags = {"study": {"metric": "valid_mae"}}, {"tsforge.study": "small", "tsforge.best_trial": 1}
    with tracker.start("tune small", config=settings, tags=tags) as study:
        for number in range(3):
            config, tags = {"ridge": number}, {"tsforge.study.trial": number}
            with tracker.start(f"small {number}", config=config, tags=tags, parent=study) as run:
                for epoch in range(3):
                    run.log_epoch(epoch, {"valid_mae": 1.0 / (1 + epoch)})
                run.log_metrics({"final_valid_mae": 0.25})
                if number == 2:
                    run.set_tags({"tsforge.outcome": "pruned", "tsforge.note": "stopped at step 1"})
    page = draw("runs", run=str(study.id))
    assert not page.exception
    listed, trials = (frame.value for frame in page.dataframe[:2])
    assert listed["name"].tolist() == ["tune small", "a fit"]
    assert trials["state"].tolist() == ["finished", "finished", "pruned"]
    assert trials["error"].tolist()[-1] == "stopped at step 1"
    assert "trial 1 with valid_mae 0.25" in page.success[0].value
    assert "ridge = 1" in page.success[0].value
    assert box(page, "Curves of").value == run_id(tracker, "small 1"), "the best one first"
    assert page.get("plotly_chart")
    assert not any("older ones" in note.value for note in page.caption)
    monkeypatch.setattr(view, "_MOST", 1)
    page = draw("runs")
    assert len(page.dataframe[0].value) == 1
    assert any("older ones" in note.value for note in page.caption)


def run_id(tracker: Tracker, name: str) -> str:
    return next(run["id"] for run in tracker.runs() if run["name"] == name)


def test_data_page_tells_why_an_ingestion_was_refused(filled: Path) -> None:
    batches = draw("data", dataset="plant").dataframe[-1].value
    assert batches["status"].tolist() == ["refused", "done"]
    assert "gone.parquet" in batches["error"].iloc[0]


@pytest.mark.parametrize(
    ("lacking", "said", "charts"),
    [
        (0, "None of the 60 series lacks a cell.", 0),
        (3, "3 of 60 series lack cells.", 1),
        (50, "50 of 60 series lack cells; the 40 that lack most are drawn.", 1),
    ],
)
def test_missing_cells_of_many_series(lacking: int, said: str, charts: int) -> None:
    def draw_missing(lacking: int) -> None:
        import polars as pl

        from dashboards.views.data import _missing

        report = {"series_id": list(map(str, range(60))), "column": "x"}
        _missing(pl.DataFrame(report | {"null_share": [0.1 * (number < lacking) for number in range(60)]}), 60)

    page = AppTest.from_function(draw_missing, kwargs={"lacking": lacking}, default_timeout=60).run()
    assert not page.exception
    assert [note.value for note in page.caption] == [said]
    assert len(page.get("plotly_chart")) == charts


def test_link_to_something_gone_says_so(filled: Path) -> None:
    page = draw("data", dataset="vanished")
    assert not page.exception
    assert any("vanished" in warning.value for warning in page.warning)


def test_chosen_option_becomes_part_of_the_address(filled: Path) -> None:
    page = draw("data", dataset="plant", series="series_1")
    assert not page.warning
    assert page.query_params["series"] == "series_1"
    page = box(page, "Series").set_value("series_0").run()
    assert page.query_params["series"] == "series_0"


def test_explanations_divide_a_forecast_and_measure_inputs(filled: Path) -> None:
    model = next(path.name for path in (filled / "artifacts").iterdir() if path.name.startswith("ar_net"))
    page = draw("explanations", artifact=model, step="3")
    assert not page.exception
    assert not page.error
    assert any("so the parts are exact" in caption.value for caption in page.caption)
    waterfall = json.loads(page.get("plotly_chart")[0].proto.spec)
    steps, ends = waterfall["data"]
    assert steps["base"] + sum(steps["y"]) == pytest.approx(ends["y"][1], rel=1e-3)
    assert "driver" in waterfall["layout"]["xaxis"]["ticktext"], "the covariate takes part"
    measured = next(button for button in page.button if button.label == "Measure").click().run()
    assert not measured.exception
    assert not measured.error
    bars = json.loads(measured.get("plotly_chart")[-1].proto.spec)["data"][0]
    assert set(bars["y"]) >= {"driver"}
    hidden = box(measured, "Parts by").set_value("occlusion").run()
    assert not hidden.exception
    assert any("put at its level" in caption.value for caption in hidden.caption)
