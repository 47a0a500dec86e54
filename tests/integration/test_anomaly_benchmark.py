"""The anomaly benchmark: families and their flaws, grades against written-out sums, cache, failures, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.config import BudgetRule, EventConfig, RollingQuantileRule
from tsforge.app.anomaly_benchmark import AnomalyBenchmarkConfig, AnomalyBenchmarkResult, anomaly_benchmark
from tsforge.app.anomaly_benchmark_data import LabelledSeries, known_families, read_family
from tsforge.app.anomaly_benchmark_report import FEWEST_SERIES, leaderboard
from tsforge.app.anomaly_benchmark_rules import rule_records
from tsforge.app.anomaly_benchmark_run import Judgement, ModelSetting, Scored, grade_scores, judge
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.metrics.anomaly import auc_pr
from tsforge.metrics.vus import vus

ROWS, VARIATES = 700, 3


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


def write_series(folder: Path, name: str, seed: int, *, train_labels: bool = False, train: bool = True) -> None:
    rng = np.random.default_rng(seed)
    values = np.zeros((2 * ROWS, VARIATES))
    for row in range(1, 2 * ROWS):
        values[row] = 0.7 * values[row - 1] + rng.normal(size=VARIATES)
    labels = np.zeros(2 * ROWS, dtype=int)
    for start in (ROWS + 200, ROWS + 450):
        values[start : start + 30] += 8.0
        labels[start : start + 30] = 1
    if train_labels:
        values[100:110], labels[100:110] = 500.0, 1
    table = pl.DataFrame({f"v{place}": values[:, place] for place in range(VARIATES)}).with_columns(
        ds=pl.Series([datetime(2026, 1, 1) + timedelta(minutes=10 * row) for row in range(2 * ROWS)]),
        label=pl.Series(labels),
    )
    if train:
        kept = table.head(ROWS) if train_labels else table.head(ROWS).drop("label")
        kept.write_parquet(folder / f"{name}_train.parquet")
    table.tail(ROWS).write_parquet(folder / f"{name}_test.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "plant"
    place.mkdir()
    for number, name in enumerate(("a", "b")):
        write_series(place, name, number)
    return place


def run(workspace: Workspace, *families: Path | str, **settings: Any) -> AnomalyBenchmarkResult:
    plain = {"families": [str(family) for family in families], "models": ["ar_net"], "context_length": 8}
    return anomaly_benchmark(validate(AnomalyBenchmarkConfig, plain | settings), workspace)


# ---- data


def test_a_folder_of_ones_own_is_read_with_its_clock(folder: Path) -> None:
    family = read_family(str(folder))
    assert [series.name for series in family.series] == ["a", "b"]
    series = family.series[0]
    assert series.columns == ("v0", "v1", "v2")
    assert series.rows_per_day == pytest.approx(144.0)
    assert series.labels.sum() == 60
    assert (series.train.min(axis=0) == 0.0).all()
    assert (series.train.max(axis=0) == 1.0).all()
    assert series.test.max() > 1.0


def test_labelled_training_rows_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    write_series(tmp_path, "x", 3, train_labels=True)
    family = read_family(str(tmp_path))
    train = family.series[0].train
    assert np.isnan(train[100:110]).all()
    assert not np.isnan(np.delete(train, slice(100, 110), axis=0)).any()
    assert any(note.startswith("10 training rows are labelled") for note in family.notes)
    assert (np.nanmax(train, axis=0) == 1.0).all()  # the range is that of the normal rows


def test_bad_folders_and_names_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSFORGE_DATA", raising=False)
    with pytest.raises(ConfigError, match="did you mean 'smd'"):
        read_family("smdd")
    with pytest.raises(ConfigError, match="TSFORGE_DATA"):
        read_family("smd")
    with pytest.raises(DataError, match="holds no"):
        read_family(str(tmp_path))
    write_series(tmp_path, "x", 0)
    with pytest.raises(DataError, match="no series y"):
        read_family(str(tmp_path), only=("y",))


def test_what_the_data_notes_say_of_each_family_holds(shared_data: Path) -> None:
    """Source: the notes that come with the data: sizes, constant sensors, left-out rows, lists of experts."""
    found = {name: read_family(name, str(shared_data)) for name in ("asd", "gecco", "tep", "msl", "skab", "3w")}
    assert len(found["asd"].series) == 9
    assert sum(len(series.test) for series in found["asd"].series) == 38_880
    assert all(series.rows_per_day == 288 for series in found["asd"].series)
    listed = [series.labels[first:last].all() for series in found["asd"].series for first, last, _ in series.experts]
    assert len(listed) > 50
    assert all(listed)
    gecco = found["gecco"].series[0]
    assert int(np.isnan(gecco.train).all(axis=1).sum()) >= 996
    assert all(len(series.train) == 500 for series in found["tep"].series)
    assert "anomaly_free" not in {series.name for series in found["skab"].series}
    assert all("changepoint" not in series.columns for series in found["skab"].series)
    assert found["3w"].unusable[0][1] == "no training rows"
    assert all(np.nanmax(np.abs(series.test)) < 1e30 for series in found["3w"].series)
    sensor = read_family("msl", str(shared_data), sensor_only=True, limit=2)
    assert all(series.columns == ("telemetry",) for series in sensor.series)
    assert known_families()["smd"].list_end == "exclusive"


# ---- grades


def made(labels: np.ndarray, train: int = 100) -> LabelledSeries:
    return LabelledSeries(
        family="f",
        name="s",
        columns=("x", "y"),
        train=np.zeros((train, 2)),
        test=np.zeros((len(labels), 2)),
        labels=labels.astype(bool),
        rows_per_day=10.0,
        experts=((20, 25, ("y",)), (40, 42, ("x",))),
    )


def test_grades_equal_what_can_be_counted_by_hand() -> None:
    labels = np.zeros(100, dtype=int)
    labels[20:25], labels[40:42] = 1, 1
    flagged = np.zeros(100, dtype=bool)
    flagged[[22, 23, 60, 70, 71]] = True
    scores = np.random.default_rng(0).random(100) + 0.4 * labels
    z = np.zeros((100, 2))
    z[21, 1], z[40, 1] = 5.0, -3.0
    found = grade_scores(Scored(scores=scores, flagged=flagged, z=z), made(labels), 10)
    assert found["auc_pr"] == auc_pr(labels, scores)
    assert (found["events"], found["found"], found["false_segments"]) == (2, 1, 2)
    assert found["delays"] == [2.0]
    assert (found["normal_rows"], found["alarmed_normal_rows"]) == (93, 3)
    assert (found["hits_100"], found["hit_events"], found["hit_chance"]) == (1.0, 2, 1.0)  # the first only
    missing = np.where(np.arange(100) == 21, np.nan, scores)
    graded = grade_scores(Scored(scores=missing, flagged=flagged), made(labels), 10)
    assert graded["unscored"] == 1
    seen = np.delete(labels, 21), np.delete(scores, 21)  # the row without a score is left out of the areas
    assert graded["auc_pr"] == auc_pr(*seen) != auc_pr(labels, np.nan_to_num(missing))
    assert graded["vus_pr"] == vus(*seen, width=10).pr
    assert graded["vus_pr_reference"] == vus(*seen, width=10, thresholds="reference").pr
    many = np.tile(labels, 5)
    drawn = np.random.default_rng(1).random(500) + 0.4 * many
    graded = grade_scores(Scored(scores=drawn, flagged=np.tile(flagged, 5)), made(many), 10)
    reference = vus(many, drawn, width=10, thresholds="reference").pr
    assert graded["vus_pr_reference"] == reference != graded["vus_pr"]
    alone = grade_scores(Scored(scores=scores, flagged=flagged), made(np.zeros(100)), 10)
    assert alone["auc_pr"] is None
    assert alone["false_segments"] == 3
    with pytest.raises(DataError, match="99 scores for 100"):
        grade_scores(Scored(scores=scores[1:], flagged=flagged[1:]), made(labels), 10)


def test_the_rule_sees_calibration_scores_first_and_never_what_comes() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random(300)
    judgement = Judgement(
        fit_share=0.5, rule=RollingQuantileRule(alpha=0.05, window=100), events=EventConfig(low_factor=1.0), width=10
    )
    data = made(np.zeros(200))
    before = judge(scores, 100, data, judgement).flagged
    changed = scores.copy()
    changed[250:] += 9.0
    after = judge(changed, 100, data, judgement).flagged
    assert np.array_equal(before[:150], after[:150])
    assert after[150]
    assert 0.01 < before.mean() < 0.12


def test_without_a_clock_ten_thousand_rows_stand_for_a_day() -> None:
    judgement = Judgement(fit_share=0.7, rule=BudgetRule(), events=EventConfig(), width=10)
    data = made(np.zeros(10))
    assert judgement.rule_for(data).points_per_day == 10.0
    assert judgement.rule_for(replace(data, rows_per_day=None)).points_per_day == 10_000.0


def test_changing_the_end_of_the_test_moves_no_earlier_score(folder: Path) -> None:
    """Checklist 5, through artifact and detection: the scaling of the family rests on training rows only."""
    data = read_family(str(folder)).series[0]
    changed = replace(data, test=np.vstack([data.test[:400], data.test[400:] + 3.0]))
    config = validate(AnomalyBenchmarkConfig, {"families": ["x"], "models": ["ar_net"], "context_length": 8})
    from tsforge.app.anomaly_benchmark import _setting
    from tsforge.app.anomaly_benchmark_run import fit_series, run_recipe

    setting: ModelSetting = _setting(config.models[0], config)
    for _, recipe in setting.recipes:
        scores = []
        for series in (data, changed):
            artifact, _ = fit_series(series, setting.fit, setting.judgement, seed=0)
            scores.append(run_recipe(artifact, series, recipe, setting.judgement).scores)
        assert np.array_equal(scores[0][:400], scores[1][:400])
        assert not np.array_equal(scores[0][400:], scores[1][400:])


@pytest.mark.parametrize(("rows", "name"), [(400, "135_Bleeding"), (505, "type1 x")])
def test_short_training_files_and_odd_names_are_no_failures(
    workspace: Workspace, tmp_path: Path, rows: int, name: str
) -> None:
    """As in skab (400 rows), tep (500) and ucr (names that begin with a digit)."""
    write_series(tmp_path, name, 1)
    place = tmp_path / f"{name}_train.parquet"
    pl.read_parquet(place).tail(rows).write_parquet(place)
    result = run(workspace, tmp_path)
    assert result.failed == 0
    assert result.table.filter(pl.col("method") == "ar_net, ensemble")["auc_pr"][0] > 0.1


# ---- the harness


def test_every_table_has_the_baselines_and_a_report(workspace: Workspace, folder: Path) -> None:
    result = run(workspace, folder)
    methods = set(result.table["method"])
    for name in ("random", "mean_abs", "max_abs", "mahalanobis", "pca_residual", "var1_mean_abs", "var1_mahalanobis"):
        assert name in methods
        assert name == "random" or f"{name}, smoothed" in methods
    assert {"seasonal_naive", "ar_net, residuals", "ar_net, ensemble", "plain ensemble"} <= methods
    records = {record["method"]: record for record in result.records()}
    assert records["ar_net, residuals"]["auc_pr"] > 3 * records["random"]["auc_pr"]
    assert records["random"]["verdict"] == ""
    assert records["ar_net, residuals"]["verdict"]
    best = max(r["vus_pr"] for r in records.values() if r["role"] == "baseline" and r["method"] != "random")
    ratio = records["ar_net, residuals"]["vus_pr_ratio"]
    assert ratio == pytest.approx(records["ar_net, residuals"]["vus_pr"] / best)
    assert records["ar_net, residuals"]["auc_pr_p"] is None  # two series
    text = (result.path / "report.md").read_text()
    assert "ar_net, ensemble" in text
    assert "No job failed" in text
    page = (result.path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page
    assert "`" not in page
    kept = (result.path / "summary.json").read_text()
    assert json.loads(kept)["rows"][0]["family"] == "plant"
    assert str(result.path) not in kept
    assert list(result.table["series"].unique(maintain_order=True)) == ["a", "b"]


def test_further_rules_judge_the_same_scores_and_one_that_cannot_be_fitted_fails_alone(
    workspace: Workspace, folder: Path
) -> None:
    quantile = {"kind": "quantile", "alpha": 0.05}
    rules = {"q": quantile, "never": {"kind": "fixed", "value": 1e9}, "tail": {"kind": "pot", "risk": 0.001}}
    plain = run(workspace, folder, rule=quantile, series=["a"])
    assert plain.ruled.is_empty()
    result = run(workspace, folder, rules=rules, series=["a"])
    counts = ["method", "events", "found", "false_segments", "alarmed_normal_rows", "delays"]
    asked = result.ruled.filter(rule="q", status="ok").select(counts)
    assert asked.equals(plain.table.select(counts))  # what a run with this rule alone finds
    deployed = result.ruled.filter(rule="deployed").select(counts)
    assert deployed.equals(result.table.select(counts))
    assert not deployed.equals(asked)
    assert plain.table["auc_pr"].equals(result.table["auc_pr"])
    assert result.ruled.filter(rule="never")["alarmed_normal_rows"].sum() == 0
    tail = result.ruled.filter(rule="tail")
    assert set(tail["status"]) == {"failed"}
    assert all("0.98" in error for error in tail["error"]), tail["error"].unique().to_list()
    assert set(result.table["status"]) == {"ok"}

    records = {record["rule"]: record for record in rule_records(result.ruled.filter(method="ar_net, residuals"))}
    row = result.ruled.filter(method="ar_net, residuals", rule="q").row(0, named=True)
    rate = row["alarmed_normal_rows"] / row["normal_rows"]
    assert records["q"]["normal_alarm_rate"] == pytest.approx(rate)
    assert (records["q"]["nominal"], records["q"]["within"]) == (0.05, float(rate <= 0.1))
    assert records["q"]["event_recall"] == row["found"] / row["events"]
    assert (records["tail"]["failed"], records["tail"]["event_recall"]) == (1, None)
    assert records["never"]["event_recall"] == 0.0
    assert (result.failed, result.summary()["failed_rules"]) == (0, tail.height)
    text = (result.path / "report.md").read_text()
    assert "### plant: further rules" in text
    assert "No job failed" not in text
    assert "- plant a ar_net, residuals, rule tail: " in text
    assert sum(line.startswith("| ar_net, residuals | ") and "| q |" in line for line in text.splitlines()) == 1
    assert "Further rules" in (result.path / "report.html").read_text()
    assert pl.read_parquet(result.path / "rules.parquet").equals(result.ruled)
    with pytest.raises(ConfigError, match="'deployed' is what"):
        run(workspace, folder, rules={"deployed": quantile})


def test_a_second_run_is_free_and_other_data_are_measured_again(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsforge.app.anomaly_benchmark._code", lambda name: "the code does not change meanwhile")
    first = run(workspace, folder)
    again = run(workspace, folder)
    assert again.table["cached"].all()
    assert again.table.drop("cached").equals(first.table.drop("cached"))
    write_series(folder, "b", 9)
    third = run(workspace, folder)
    assert dict(third.table.group_by("series").agg(pl.col("cached").all()).iter_rows()) == {"a": True, "b": False}
    monkeypatch.setattr("tsforge.app.anomaly_benchmark._code", lambda name: "changed code")
    assert not run(workspace, folder).table["cached"].any()


def test_a_failed_job_is_a_row_with_its_reason_and_never_a_zero(workspace: Workspace, folder: Path) -> None:
    write_series(folder, "c", 4, train=False)
    result = run(workspace, folder, models=["ar_net", "seasonal_naive:season_length=600"])
    failed = result.table.filter(status="failed")
    assert result.failed == failed.height == 3
    assert failed["auc_pr"].null_count() == 3
    assert "no training rows" in failed["error"].to_list()
    record = next(r for r in result.records() if r["method"].startswith("seasonal_naive:"))
    assert record["auc_pr"] is None
    assert record["failed"] == 2
    assert "2 series failed" in (result.path / "report.md").read_text()


def test_a_recipe_that_cannot_score_a_series_fails_alone(
    workspace: Workspace, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = pl.read_parquet(folder / "b_train.parquet")
    still = pl.int_range(pl.len()) < 500  # more than the rows that fit: nothing for plain members to learn
    train.with_columns(
        pl.when(still).then(1.0).otherwise(pl.col(f"v{v}")).alias(f"v{v}") for v in range(3)
    ).write_parquet(folder / "b_train.parquet")
    result = run(workspace, folder)
    failed = result.table.filter(status="failed")
    assert sorted(failed.select("series", "method").iter_rows()) == [("b", "ar_net, ensemble"), ("b", "plain ensemble")]
    assert all("constant over" in str(error) for error in failed["error"])
    assert "plant b ar_net, ensemble failed: every variate" in caplog.text
    scored = result.table.filter(status="ok", series="b")["method"].to_list()
    assert {"ar_net, residuals", "mean_abs", "var1_mahalanobis, smoothed"} <= set(scored)
    record = next(r for r in result.records() if r["method"] == "ar_net, ensemble")
    assert (record["series"], record["failed"]) == (1, 1)
    assert run(workspace, folder).table.filter(status="failed")["cached"].all()


def test_two_sided_scores_stand_beside_plain_scorers_that_know_as_much_and_their_delay_counts(
    workspace: Workspace, folder: Path
) -> None:
    scores = {
        "causal": {"joint": "product", "smoothing": 0.2},
        "late": {"joint": "product", "smoothing": {"kind": "two_sided", "weight": 0.2}},
    }
    rule = {"kind": "quantile", "alpha": 0.05}
    result = run(workspace, folder, scores=scores, two_sided=True, smoothing=0.2, ensemble=None, rule=rule)
    rows = {(row["series"], row["method"]): row for row in result.table.to_dicts()}
    assert {"mean_abs, two-sided", "var1_mahalanobis, two-sided"} <= {method for _, method in rows}
    assert "random, two-sided" not in {method for _, method in rows}
    for name in ("ar_net, late", "mean_abs, two-sided"):
        row = rows["a", name]
        assert row["unscored"] == 15  # 3 / 0.2 rows at the end
        assert row["found"] == 2
        assert len(row["delays"]) == 2
        assert min(row["delays"]) >= 15  # flagged at the first row of a fault, but known so much later
        assert max(row["delays"]) <= 25
    assert rows["a", "ar_net, causal"]["unscored"] == 0
    assert max(rows["a", "ar_net, causal"]["delays"]) <= 5
    assert rows["a", "ar_net, late"]["auc_pr"] > rows["a", "ar_net, causal"]["auc_pr"]
    assert "mean_abs, two-sided" not in set(run(workspace, folder).table["method"])
    # the calibration scores that read test rows calibrate nothing
    data = read_family(str(folder)).series[0]
    judgement = AnomalyBenchmarkConfig(families=("x",), rule=validate(AnomalyBenchmarkConfig, {"families": ["x"]}).rule)
    values = np.ones(100 + len(data.test))
    spoiled = values.copy()
    spoiled[85:100] = 50.0
    calm = replace(judgement.judgement, rule=validate(AnomalyBenchmarkConfig, {"families": ["x"], "rule": rule}).rule)
    assert not judge(spoiled, 100, data, calm, 15).flagged.any()
    np.testing.assert_array_equal(
        judge(spoiled * 1.0 + np.arange(spoiled.size) % 7, 100, data, calm, 15).flagged,
        judge(values + np.arange(values.size) % 7, 100, data, calm, 15).flagged,
    )


def test_a_series_too_short_to_calibrate_late_scores_keeps_its_other_rows(workspace: Workspace, folder: Path) -> None:
    place = folder / "b_train.parquet"
    pl.read_parquet(place).tail(160).write_parquet(place)
    result = run(workspace, folder, two_sided=True, models=[], rule={"kind": "quantile", "alpha": 0.05}, smoothing=0.05)
    failed = result.table.filter(status="failed")
    assert set(failed["series"]) == {"b"}
    assert "plain ensemble" in set(failed["method"])  # 48 rows calibrate, which places no score
    assert all(method.endswith(", two-sided") for method in failed["method"] if method != "plain ensemble")
    assert failed.height == 7
    assert result.table.filter(status="ok", series="b").height > 10


def test_seeds_of_a_trained_model_are_runs_and_of_a_closed_form_are_not(workspace: Workspace, folder: Path) -> None:
    train = {"max_epochs": 1, "max_steps_per_epoch": 2}
    models = ["ar_net", {"name": "gru", "model": {"d_model": 8}}]
    result = run(workspace, folder, models=models, seeds=2, train=train, series=["a"], ensemble=None)
    runs = {record["method"]: record["runs"] for record in result.records()}
    assert (runs["ar_net, residuals"], runs["gru, residuals"]) == (1, 2)
    assert next(r for r in result.records() if r["method"] == "gru, residuals")["auc_pr_sd"] is not None


def test_a_guard_changes_the_residuals_and_nothing_else(workspace: Workspace, folder: Path) -> None:
    rule = {"kind": "quantile", "alpha": 0.05}
    found = []
    for guard in (None, {"max_rows": 5}):
        records = run(workspace, folder, series=["a"], rule=rule, guard=guard).records()
        found.append({record["method"]: record["auc_pr"] for record in records})
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"ar_net, residuals"}


def test_further_scores_are_rows_of_the_same_model(workspace: Workspace, folder: Path) -> None:
    chart = {"joint": "mean_abs", "ewma": 0.1}
    both = run(workspace, folder, scores={"chart": chart}, series=["a"])
    alone = run(workspace, folder, score=chart, series=["a"])
    areas = [{record["method"]: record["auc_pr"] for record in each.records()} for each in (both, alone)]
    assert set(areas[0]) - set(areas[1]) == {"ar_net, chart"}
    assert areas[0]["ar_net, chart"] == areas[1]["ar_net, residuals"] != areas[0]["ar_net, residuals"]
    only = run(workspace, folder, score=None, ensemble=None, scores={"chart": chart}, series=["a"])
    assert [name for name in only.table["method"] if name.startswith("ar_net")] == ["ar_net, chart"]
    for name in ("residuals", "ensemble", "a, b"):
        with pytest.raises(ConfigError, match=f"scores: '{name}' cannot name a row"):
            run(workspace, folder, scores={name: chart})
    with pytest.raises(ConfigError, match=r"scores\.chart\.ewm: unknown key; did you mean 'ewma'\?"):
        run(workspace, folder, scores={"chart": {"ewm": 0.1}})


def test_settings_without_sense_are_refused_before_anything_runs(workspace: Workspace, folder: Path) -> None:
    for settings, text in (
        ({"models": ["nothing"]}, "nothing"),
        ({"models": ["ar_net", "ar_net"]}, "twice"),
        ({"models": ["neuralforecast/NHITS"]}, "peer"),
        ({"models": [{"name": "ar_net", "data": ["smd"]}]}, "is for smd"),
        ({"score": None, "ensemble": None}, "no model would be graded"),
        ({"guard": True}, "guard needs max_rows"),
        ({"guard": {"max_rows": 5}, "score": None}, "guard is for the residuals"),
        ({"models": [{"name": "ar_net", "context_lengths": [8, 16]}]}, "takes one"),
    ):
        with pytest.raises(ConfigError, match=text):
            run(workspace, folder, **settings)


def test_ratios_and_p_values_are_of_the_series_both_have() -> None:
    def row(method: str, series: int, value: float, role: str) -> dict[str, Any]:
        about = {"family": "f", "series": f"s{series}", "method": method, "role": role, "seed": 0, "status": "ok"}
        areas = {"auc_pr": value, "vus_pr": value, "vus_pr_reference": value}
        found, false = (2, 1) if series else (4, 12)
        counts = {"events": 4, "found": found, "segments": found + false, "false_segments": false}
        counts |= {"normal_rows": 90, "rows": 100}
        rest = {"alarmed_normal_rows": 9, "hit_events": 0, "unscored": 0, "rows_per_day": 50.0, "delays": [1.0, 5.0]}
        return {**about, **areas, **counts, **rest, "seconds": 1.0}

    from tsforge.app.anomaly_benchmark import SCHEMA

    rows = [row("mean_abs", k, 0.4 + 0.01 * k, "baseline") for k in range(FEWEST_SERIES + 2)]
    rows += [row("m, residuals", k, 0.6 + 0.01 * k, "model") for k in range(FEWEST_SERIES)]
    rows += [row("random", k, 0.9, "baseline") for k in range(FEWEST_SERIES + 2)]  # chance is no rival
    table = pl.DataFrame([{name: item.get(name) for name in SCHEMA} for item in rows], schema=SCHEMA)
    found = {record["method"]: record for record in leaderboard(table)}["m, residuals"]
    assert found["auc_pr_ratio"] == pytest.approx(0.645 / 0.445)
    assert found["auc_pr_p"] == pytest.approx(2 / 2**FEWEST_SERIES)  # all differences of one sign, exact
    assert (found["event_recall"], found["event_precision"]) == (22 / 40, pytest.approx(22 / 43))  # pooled
    assert found["false_events_per_day"] == pytest.approx(21 / 20)
    assert found["median_delay_rows"] == 3.0
    assert found["normal_alarm_rate"] == pytest.approx(0.1)


def test_the_command_measures_and_refuses_what_is_of_forecasts(
    workspace_root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tsforge.__main__ import main

    arguments = ["benchmark", "--task", "anomaly", "--data", str(folder), "--models", "ar_net", "--context-length", "8"]
    monkeypatch.setattr("sys.argv", ["tsforge", *arguments, "series=[a]", "--json"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code in (0, None)
    shown = json.loads(capsys.readouterr().out)
    assert shown["failed"] == 0
    assert {"family", "method", "auc_pr", "vus_pr", "event_f1", "verdict"} <= set(shown["rows"][0])
    monkeypatch.setattr("sys.argv", ["tsforge", *arguments, "--horizons", "24"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code not in (0, None)
    assert "--horizons" in capsys.readouterr().err


def test_the_configs_measure_what_they_say() -> None:
    full = load(AnomalyBenchmarkConfig, "benchmark/anomaly", ())
    assert set(full.families) == set(known_families())
    assert {"ar_net", "s4", "chimera", "regenn", "plrnn"} <= {entry.name for entry in full.models}
    quick = load(AnomalyBenchmarkConfig, "benchmark/anomaly_quick", ())
    assert quick.judgement == full.judgement
    assert quick.ensemble == full.ensemble
    assert quick.score == full.score
    scores = load(AnomalyBenchmarkConfig, "benchmark/anomaly_scores", ())
    assert scores.score is None
    assert not {"asd", "smd"} & set(scores.families)  # of which nothing may be chosen
    told = {(score.joint, score.ewma, score.smoothing is not None) for score in scores.scores.values()}
    assert len(told) == len(scores.scores) == 8
    late = load(AnomalyBenchmarkConfig, "benchmark/anomaly_two_sided", ())
    assert set(late.families) == set(known_families())
    assert late.two_sided
    assert {(score.joint, score.latency) for score in late.scores.values()} == {
        (joint, rows) for joint in ("mean_abs", "mahalanobis", "product", "balanced", "consensus") for rows in (0, 30)
    }
