"""What a backtest says about its models: tests, regimes and worst series, against the forecasts they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.baselines import TrainingSpan, fit_baseline, fit_solved
from tsforge.forecasting.report import BacktestReport, load_report
from tsforge.metrics.significance import holm, panel_diebold_mariano
from tsforge.network import NetworkConfig

CONFIG = BacktestConfig(num_cutoffs=12, stride=4, regimes=("volatility", "hour"), regime_column="code")
HORIZON = 6


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    """Six daily waves of different size and a random walk."""
    rng = np.random.default_rng(0)
    hour = np.arange(260)
    parts = []
    for number in range(7):
        wave = (1 + number) * np.sin(2 * np.pi * hour / 24 + number) + 0.3 * rng.normal(size=260)
        if number == 6:
            wave = rng.normal(size=260).cumsum()
        times = [datetime(2024, 1, 1) + timedelta(hours=int(h)) for h in hour]
        columns = {"ds": times, "y": wave, "code": (hour // 100) % 2.0}
        parts.append(pl.DataFrame(columns).with_columns(pl.lit(f"s{number}").alias("id")))
    return SeriesFrame.from_long(pl.concat(parts), time="ds", series_id="id", targets=("y",), past=("code",), freq="1h")


@pytest.fixture(scope="module")
def report(frame: SeriesFrame) -> BacktestReport:
    def fit(seen: SeriesFrame, cutoff: Any) -> Artifact:
        network = validate(NetworkConfig, {"model": "linear"})
        return fit_solved(seen.with_covariates(), network, WindowSpec(context_length=24, horizon=HORIZON))

    return backtest({"linear": fit}, frame, CONFIG, horizon=HORIZON)


def losses(report: BacktestReport, frame: SeriesFrame) -> dict[str, np.ndarray]:
    """Return [series, cutoffs]: mean absolute errors over the mean seasonal step before the fit, by loops."""
    first = report.forecasts["cutoff"].min()
    units = {}
    for name in frame.series_ids:
        y = frame.table.filter(pl.col("series_id") == name, pl.col("time") <= pl.lit(first))["y"].to_numpy()
        units[name] = np.abs(y[24:] - y[:-24]).mean()
    found = {}
    for model in report.leaderboard["model"]:
        rows = report.forecasts.filter(model=model).sort("series_id", "cutoff", "step")
        error = (rows["mean"] - rows["actual"]).abs().to_numpy().reshape(7, 12, HORIZON).mean(axis=2)
        found[model] = error / np.array([units[name] for name in frame.series_ids])[:, None]
    return found


def test_leaderboard_p_values_are_tests_of_the_forecasts(report: BacktestReport, frame: SeriesFrame) -> None:
    by_model = losses(report, frame)
    others = [name for name in by_model if name != "seasonal_naive"]
    raw = {  # stride 4, horizon 6: two cutoffs in a row share rows
        name: panel_diebold_mariano(by_model[name], by_model["seasonal_naive"], horizon=2).p_value for name in others
    }
    expected = dict(zip(others, holm(list(raw.values())), strict=True))
    board = {row["model"]: row for row in report.leaderboard.to_dicts()}
    assert board["seasonal_naive"]["p_dm"] is None
    assert {name: board[name]["p_dm"] for name in others} == pytest.approx(expected, rel=1e-5)
    assert report.settings["comparison"]["unit"] == "series"
    assert report.settings["comparison"]["cutoffs_sharing_rows"] == 2
    assert report.tests["against"].unique(maintain_order=True).to_list() == ["seasonal_naive", board_first(report)]


def board_first(report: BacktestReport) -> str:
    return str(report.leaderboard["model"][0])


def test_regimes_divide_the_errors(report: BacktestReport) -> None:
    whole = {row["model"]: row for row in report.leaderboard.to_dicts()}
    for kind in ("volatility", "hour", "code"):
        for (model,), rows in report.regimes.filter(kind=kind).group_by("model"):
            assert rows["count"].sum() == whole[model]["count"]
            mean = (rows["mae"] * rows["count"]).sum() / rows["count"].sum()
            assert mean == pytest.approx(whole[model]["mae"])
    one = report.regimes.filter(kind="code", regime="0")
    skill = 1 - one.filter(model="linear")["mae"][0] / one.filter(model="seasonal_naive")["mae"][0]
    assert one.filter(model="linear")["skill_mae"][0] == pytest.approx(skill)
    hour = report.forecasts.filter(pl.col("model") == "linear", pl.col("time").dt.hour() == 7)
    expected = (hour["mean"] - hour["actual"]).abs().mean()
    assert report.regimes.filter(model="linear", kind="hour", regime="07")["mae"][0] == pytest.approx(expected)
    labels = report.regime_labels
    assert labels.filter(kind="volatility").height == 7 * 12
    assert set(labels["kind"]) == {"volatility", "code"}


def test_worst_series_come_first(report: BacktestReport) -> None:
    worst = report.worst_series()
    skills = {}
    for name in worst["series_id"]:
        rows = report.forecasts.filter(series_id=name).with_columns(e=(pl.col("mean") - pl.col("actual")).abs())
        mae = dict(rows.group_by("model").agg(pl.col("e").mean()).iter_rows())
        skills[name] = 1 - mae["linear"] / mae["seasonal_naive"]
    assert worst["series_id"].to_list() == sorted(skills, key=lambda name: skills[name])
    assert dict(worst.select("series_id", "skill_mae").iter_rows()) == pytest.approx(skills)
    assert worst["skill_mae"][0] < worst["skill_mae"][-1]
    assert worst["count"].to_list() == [12 * HORIZON] * 7
    assert report.worst_series("drift", most=2).height == 2
    assert report.summary()["worst_series"] == worst.head(3).to_dicts()
    with pytest.raises(DataError, match="no model 'magic'"):
        report.worst_series("magic")


def test_page_and_json_hold_all_of_it(report: BacktestReport, tmp_path: Path) -> None:
    saved = report.save(tmp_path / "report")
    assert saved.path is not None
    page = (saved.path / "report.md").read_text()
    for part in (
        "### Against seasonal_naive",
        "Friedman's test",
        "by regime: volatility",
        "by regime: code",
        "## Worst series of linear, by skill against seasonal_naive",
    ):
        assert part in page
    document = json.loads((saved.path / "report.json").read_text())
    assert document["worst_series"] == report.worst_series(most=10).to_dicts()
    assert len(document["tests"]) == report.tests.height
    back = load_report(saved.path)
    for name in ("tests", "regimes", "regime_labels"):
        assert getattr(back, name).equals(getattr(report, name))


def test_series_without_a_unit_are_left_out_of_the_tests_and_named(frame: SeriesFrame) -> None:
    flat = frame.table.with_columns(
        pl.when(pl.col("series_id") == "s1").then(3.0).otherwise(pl.col("y")).alias("y"), pl.col("code")
    )
    fit = {"mine": lambda seen, cutoff: fit_baseline("drift", seen, horizon=6, season=24, context_length=24)}
    found = backtest(fit, SeriesFrame(flat, frame.schema), BacktestConfig(num_cutoffs=4), horizon=6)
    assert found.settings["comparison"]["units"] == 6
    assert any("1 of 7 series-variates" in note and "the tests leave them out" in note for note in found.notes)
    assert found.worst_series()["series_id"][-1] == "s1", "no skill where the reference makes no error: last"
    assert found.worst_series()["skill_mae"][-1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regimes": ["hour"], "regime_rows": 24}, "regime_rows has no effect"),
        ({"regime_column": "volatility"}, "also the name of a regime"),
        ({"regimes": ["weather"]}, "regimes"),
        ({"regime_rows": 1}, "regime_rows"),
        ({"quantile_levels": [0.1, 80]}, r"quantile_levels\.1: Input should be less than 1 \(given: 80"),
        ({"quantile_levels": "0.1"}, r"quantile_levels: it is a list; write 'quantile_levels=\[0\.1\]'"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(BacktestConfig, settings)


def test_naive_forecasts_that_share_a_span_are_those_fitted_alone(frame: SeriesFrame) -> None:
    plain = frame.with_covariates()
    span = TrainingSpan(plain)
    for name in ("last_value", "seasonal_naive", "drift"):
        sizes: dict[str, Any] = {"horizon": 6, "season": 24, "context_length": 24, "per_series": True}
        together, alone = (fit_baseline(name, data, **sizes).network.state_dict() for data in (span, plain))
        assert together.keys() == alone.keys()
        assert all(together[key].equal(alone[key]) for key in together), name


def test_infinite_scores_leave_valid_json_behind(report: BacktestReport, tmp_path: Path) -> None:
    board = report.leaderboard.with_columns(rmse=pl.lit(np.inf), mae=pl.lit(np.nan))
    facts = report.settings["comparison"]
    facts = {**facts, "ranks": {**facts["ranks"], "friedman_p": np.nan}}
    settings = {**report.settings, "comparison": facts, "odd": (np.float32(np.inf), {"a": -np.inf}, np.int64(3))}
    broken = replace(report, leaderboard=board, settings=settings)
    saved = broken.save(tmp_path / "report")
    assert saved.path is not None

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    document = json.loads((saved.path / "report.json").read_text(), parse_constant=refuse)
    assert {row["rmse"] for row in document["leaderboard"]} == {None}
    assert {row["mae"] for row in document["leaderboard"]} == {None}
    assert document["settings"]["odd"] == [None, {"a": None}, 3]
    back = load_report(saved.path)
    assert back.leaderboard.equals(board), "the tables keep what JSON cannot say"
    assert back.settings["comparison"]["ranks"]["friedman_p"] is None
    assert "Friedman" not in back.markdown()


def test_cells_of_the_page_are_text_and_stay_in_their_row(report: BacktestReport, tmp_path: Path) -> None:
    names = {"linear": "a|b *bold*", "drift": "two\nlines"}
    changes: dict[str, Any] = {
        name: getattr(report, name).with_columns(pl.col("model").replace(names))
        for name in ("forecasts", "metrics", "leaderboard", "folds", "tests", "pit", "regimes")
    }
    changes["tests"] = changes["tests"].with_columns(pl.col("against").replace(names))
    changes["settings"] = {**report.settings, "model": names["linear"]}
    page = replace(report, **changes).markdown()
    assert "| a\\|b \\*bold\\* |" in page
    assert "| two lines |" in page
    lines = page.splitlines()
    for line, rule in pairwise(lines):
        if rule.startswith("| ---"):  # a heading and its rule have the same cells, names with bars or not
            assert line.replace("\\|", "").count("|") == rule.count("|")
    table = [line for line in lines if line.startswith("|")]
    assert all(line.endswith("|") for line in table)


def naive_fit(name: str, context: int = 24, **settings: Any) -> Any:
    network = validate(NetworkConfig, {"model": {"name": name, **settings}})
    window = WindowSpec(context_length=context, horizon=HORIZON)
    return lambda seen, cutoff: fit_solved(seen.with_covariates(), network, window)


def means(report: BacktestReport, model: str) -> list[float]:
    rows = report.forecasts.filter(model=model).sort("series_id", "cutoff", "step")
    return [float(value) for value in rows["mean"]]


@pytest.mark.parametrize("declared", [None, 12])
def test_a_fit_with_settings_of_its_own_does_not_take_the_place_of_a_baseline(
    frame: SeriesFrame, declared: int | None
) -> None:
    """Neither under its own name nor without one; skill and tests stay against the season of the report."""
    config = BacktestConfig(num_cutoffs=6, refit_every=3, season_length=declared, regimes=())
    linear = naive_fit("linear")
    plain = backtest({"linear": linear}, frame, config, horizon=HORIZON)
    fits = {
        "linear": linear,
        "seasonal_naive": naive_fit("seasonal_naive", season_length=5),
        "drift": naive_fit("drift", steps=3),
    }
    both = backtest(fits, frame, config, horizon=HORIZON)
    alone = backtest(naive_fit("seasonal_naive", season_length=5), frame, config, horizon=HORIZON)
    for found in (both, alone):
        assert found.settings["reference"] == "seasonal_naive@baseline"
        assert means(found, "seasonal_naive@baseline") == means(plain, "seasonal_naive")
        assert means(found, "seasonal_naive") != means(plain, "seasonal_naive")
        assert found.tests["against"][0] == "seasonal_naive@baseline"
        assert found.leaderboard.filter(model="seasonal_naive@baseline")["skill_mae"].to_list() == [0.0]
        assert found.leaderboard.filter(model="seasonal_naive@baseline")["crps"].item() > 0.0
    assert means(both, "drift@baseline") == means(plain, "drift")
    assert set(both.leaderboard["model"]) == {*plain.leaderboard["model"], "seasonal_naive@baseline", "drift@baseline"}
    skills = [found.leaderboard.filter(model="linear")["skill_mae"].item() for found in (plain, both)]
    assert skills[0] == skills[1]
    labels = ["last_value", "seasonal_naive@baseline", "drift@baseline"]
    assert sorted(both.settings["baselines"]) == sorted(labels)  # what pages hold a model against
    assert both.path is None
    assert "against seasonal_naive@baseline" in both.markdown()


def test_a_fit_that_is_a_baseline_is_in_the_report_once(frame: SeriesFrame) -> None:
    config = BacktestConfig(num_cutoffs=3, regimes=())
    fits = {name: naive_fit(name) for name in ("last_value", "seasonal_naive", "drift")}
    found = backtest(fits, frame, config, horizon=HORIZON)
    assert found.settings["reference"] == "seasonal_naive"
    assert set(found.leaderboard["model"]) == set(fits)
    short = backtest({"last_value": naive_fit("last_value", 1)}, frame, config, horizon=HORIZON)
    assert "last_value@baseline" in set(short.leaderboard["model"])  # one row may be a gap
    longer = backtest({name: naive_fit(name, 48) for name in fits}, frame, config, horizon=HORIZON)
    others = {"drift@baseline", "seasonal_naive@baseline"}  # the last value looks at no more of a longer context
    assert set(longer.leaderboard["model"]) == {*fits, *others}
    assert longer.settings["reference"] == "seasonal_naive@baseline"
    without = config.model_copy(update={"baselines": ("last_value",)})
    fits = {"seasonal_naive": naive_fit("seasonal_naive", season_length=5)}
    assert backtest(fits, frame, without, horizon=HORIZON).settings["reference"] == "last_value"
