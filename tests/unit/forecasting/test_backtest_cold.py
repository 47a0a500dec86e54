"""What cold start is worth: forecasts of hidden series against series cut by hand, and nothing hidden is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting import backtest_cold as module
from tsforge.forecasting.backtest import BacktestConfig, backtest
from tsforge.forecasting.backtest_cold import ColdBacktest, naive_forecast, new_groups
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.cold_start import ColdStartConfig, predict_cold
from tsforge.forecasting.predict import predict
from tsforge.forecasting.report import BacktestReport, load_report
from tsforge.network import NetworkConfig
from tsforge.testing.leaks import assert_no_future_leak

ROWS, CONTEXT, HORIZON, SERIES = 150, 24, 4, 8
KEYS = ["series_id", "cutoff", "step", "variate"]
SMALL = {"num_cutoffs": 2, "refit_every": 1, "baselines": ("last_value",), "regimes": ()}


def table_of(seed: int = 0) -> pl.DataFrame:
    """Series of a common shape whose level is their static size, with a known covariate."""
    rng = np.random.default_rng(seed)
    time, parts = np.arange(ROWS), []
    for number in range(SERIES):
        plan = rng.normal(size=ROWS)
        wave = 5.0 * number + 3.0 * np.sin(2 * np.pi * time / 12) + plan + rng.normal(0, 0.3, ROWS)
        part = pl.DataFrame({"id": f"s{number}", "t": time, "y": wave, "plan": plan})
        parts.append(part.with_columns(size=pl.lit(float(number)), kind=pl.lit(float(number % 2))))
    return pl.concat(parts)


def frame_of(table: pl.DataFrame) -> SeriesFrame:
    return SeriesFrame.from_long(
        table, series_id="id", time="t", targets=["y"], known=["plan"], static=["size", "kind"], freq="1i"
    )


def solved(frame: SeriesFrame, cutoff: Any, likelihood: str = "point") -> Artifact:
    settings = {
        "model": {"name": "ar_net", "lags": 12},
        "likelihood": {"name": likelihood},
        "scaling": {"kind": "global"},
    }
    plain = frame.with_covariates(known=frame.schema.known)
    made = fit_solved(plain, validate(NetworkConfig, settings), WindowSpec(context_length=CONTEXT, horizon=HORIZON))
    made.provenance["span_rows"] = {"train": [0, 60]}
    return made


def config_of(**cold: Any) -> BacktestConfig:
    cold = {"rows": [0, 5], "groups": 4, "windows": 8, **cold}
    return validate(BacktestConfig, {"num_cutoffs": 4, "refit_every": 2, "season_length": 12, "cold_start": cold})


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    return frame_of(table_of())


@pytest.fixture(scope="module")
def report(frame: SeriesFrame) -> BacktestReport:
    return backtest({"ar": solved}, frame, config_of(), horizon=HORIZON)


def test_every_series_is_new_once_for_each_fit(report: BacktestReport) -> None:
    names = {"ar", "ar@all", "ar@0", "ar@5", "naive@0", "naive@5", "last_value", "seasonal_naive", "drift"}
    assert set(report.leaderboard["model"]) == names
    assert report.leaderboard["count"].unique().to_list() == [SERIES * 4 * HORIZON]  # all on the same cells
    fits = report.folds.filter(model="ar@5")
    assert fits.height == 2 * 4
    assert fits["artifact_id"].n_unique() >= 4
    groups = new_groups([f"s{k}" for k in range(SERIES)], ColdBacktest(groups=3))
    assert sorted(name for part in groups for name in part) == [f"s{k}" for k in range(SERIES)]
    assert sorted(len(part) for part in groups) == [2, 3, 3]
    assert groups != new_groups([f"s{k}" for k in range(SERIES)], ColdBacktest(groups=3, seed=1))


def by_hand(kept: int, number: int, cutoff: int, first: int, cold: ColdStartConfig | None) -> pl.DataFrame:
    """Return forecasts of a group whose rows were really deleted from the table before anything read it."""
    table, new = table_of(), new_groups([f"s{k}" for k in range(SERIES)], config_of().cold_start)[number]
    is_new = pl.col("id").is_in(new)
    artifact = solved(frame_of(table.filter(~is_new & (pl.col("t") <= first))), first)
    left = ~is_new | (pl.col("t") > cutoff - kept) if kept else ~is_new
    late = pl.col("t") > cutoff
    seen = table.filter(left).with_columns(y=pl.when(~late).then("y"))
    settings = cold or ColdStartConfig(windows=8)
    return predict_cold(artifact, frame_of(seen), settings, quantile_levels=(), cutoff=cutoff).table.filter(
        pl.col("series_id").is_in(new) if kept else pl.col("series_id").is_in(list(settings.like))
    )


@pytest.mark.parametrize("kept", [0, 5])
def test_forecasts_are_those_of_series_that_were_really_cut(report: BacktestReport, kept: int) -> None:
    cutoffs = report.forecasts["cutoff"].unique().sort().to_list()
    for place, first in ((1, cutoffs[0]), (2, cutoffs[2])):  # the second of a fit, the first of the next
        for number in (0, 3):
            new = new_groups([f"s{k}" for k in range(SERIES)], config_of().cold_start)[number]
            cold = validate(ColdStartConfig, {"like": dict.fromkeys(new, "*"), "windows": 8}) if kept == 0 else None
            expected = by_hand(kept, number, cutoffs[place], first, cold).sort(KEYS)
            found = report.forecasts.filter(pl.col("series_id").is_in(new), model=f"ar@{kept}", cutoff=cutoffs[place])
            assert found.sort(KEYS).select(*KEYS, "mean").equals(expected.select(*KEYS, "mean"))
            actual = found.join(table_of().rename({"id": "series_id", "t": "time"}), on=["series_id", "time"])
            assert actual["actual"].equals(actual["y"].rename("actual"))
            assert actual.height == len(new) * HORIZON


def test_with_all_rows_only_the_fit_knows_less(frame: SeriesFrame, report: BacktestReport) -> None:
    cutoff, new = report.forecasts["cutoff"].min(), new_groups(frame.series_ids, config_of().cold_start)[1]
    old = [name for name in frame.series_ids if name not in new]
    artifact = solved(frame.until(cutoff).select_series(old), cutoff)
    expected = predict(artifact, frame, quantile_levels=(), cutoff=cutoff).table
    found = report.forecasts.filter(pl.col("series_id").is_in(new), model="ar@all", cutoff=cutoff)
    expected = expected.filter(pl.col("series_id").is_in(new))
    np.testing.assert_allclose(found.sort(KEYS)["mean"], expected.sort(KEYS)["mean"], rtol=1e-6)


def test_new_series_that_begin_later_are_forecast_from_the_same_cutoffs() -> None:
    late = new_groups([f"s{k}" for k in range(SERIES)], config_of().cold_start)[2]
    table = table_of().filter(~pl.col("id").is_in(late) | (pl.col("t") >= 40))
    frame = frame_of(table)
    found = backtest({"ar": solved}, frame, config_of(), horizon=HORIZON).forecasts
    cutoffs = found.filter(model="ar@5")["cutoff"].unique().sort()
    mine = found.filter(pl.col("series_id").is_in(late), model="ar@all")
    assert mine["cutoff"].unique().sort().equals(cutoffs)
    truth = mine.join(table.rename({"id": "series_id", "t": "time"}), on=["series_id", "time"])
    assert truth.height == len(late) * len(cutoffs) * HORIZON
    assert truth["actual"].equals(truth["y"].rename("actual"))
    artifact = solved(frame.until(int(cutoffs[0])), int(cutoffs[0]))
    at = np.array([frame.grid.floor(int(time)) for time in cutoffs])
    whole = forecasts_at(artifact, frame, at, steps=HORIZON).filter(pl.col("series_id").is_in(late))
    few = forecasts_at(artifact, frame.select_series(late), at, steps=HORIZON, grid=frame.grid)
    assert few.sort(KEYS).equals(whole.sort(KEYS))


def test_the_naive_forecast_of_the_same_rows_is_that_of_a_loop(report: BacktestReport) -> None:
    values = {key[0]: part["y"].to_list() for key, part in table_of().group_by("id", maintain_order=True)}
    for row in report.forecasts.filter(model="naive@5").to_dicts():
        assert row["mean"] == values[row["series_id"]][row["cutoff"]]  # five rows hold no season of twelve
    groups = new_groups(list(values), config_of().cold_start)
    for row in report.forecasts.filter(model="naive@0", step=3).to_dicts():
        new = next(part for part in groups if row["series_id"] in part)
        others = [values[name][row["time"] - 12] for name in values if name not in new]
        assert row["mean"] == pytest.approx(sum(others) / len(others))


def test_naive_forecast_with_gaps() -> None:
    nan = float("nan")
    values = np.array([[1.0, 5.0], [2.0, nan], [nan, nan], [4.0, nan]])
    found = naive_forecast(values, 5, 3)
    np.testing.assert_array_equal(found[:, 0], [2.0, 4.0, 4.0, 2.0, 4.0])  # a gap takes the last value
    np.testing.assert_array_equal(found[:, 1], [5.0] * 5)
    np.testing.assert_array_equal(naive_forecast(values[2:, 1:], 2, 3), [[nan], [nan]])


# nothing hidden is seen


def spoiled(new: tuple[str, ...], cutoff: int, kept: int) -> SeriesFrame:
    """Return the data with other hidden rows of the new series, and another future of all; plans stay."""
    noise = pl.Series(np.random.default_rng(9).normal(0, 50, SERIES * ROWS))
    hidden = pl.col("id").is_in(new) & (pl.col("t") <= cutoff - kept)
    changed = hidden | (pl.col("t") > cutoff)
    return frame_of(table_of().with_columns(y=pl.when(changed).then(pl.col("y") + noise).otherwise("y")))


def leaks(fit: Callable[..., Artifact] = solved, likelihood: str = "point", **cold: Any) -> list[str]:
    """Return which cold models change when hidden rows and the future do, for a group and a cutoff."""
    config = config_of(groups=2, **cold).model_copy(update=SMALL)
    assert config.cold_start is not None

    def make(seen: SeriesFrame, cutoff: Any) -> Artifact:
        return fit(seen, cutoff, likelihood)

    found = []
    before = backtest({"ar": make}, frame_of(table_of()), config, horizon=HORIZON).forecasts
    new = new_groups([f"s{k}" for k in range(SERIES)], config.cold_start)[1]
    cutoff = before["cutoff"].max()
    assert isinstance(cutoff, int)
    for kept in config.cold_start.rows:
        after = backtest({"ar": make}, spoiled(new, cutoff, kept), config, horizon=HORIZON).forecasts
        for name in (f"ar@{kept}", f"naive@{kept}"):
            where = (pl.col("model") == name) & pl.col("series_id").is_in(new) & (pl.col("cutoff") == cutoff)
            one, other = (table.filter(where).drop("actual") for table in (before, after))
            assert one.height == len(new) * HORIZON
            if not one.equals(other):
                found.append(name)
    return found


@pytest.mark.parametrize(("likelihood", "cold"), [("normal", {}), ("point", {"like": "static", "neighbours": 2})])
def test_hidden_rows_and_the_future_change_no_forecast(likelihood: str, cold: dict[str, Any]) -> None:
    assert leaks(likelihood=likelihood, **cold) == []


def test_a_fit_on_all_series_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur holds the whole frame and fits on the past of the new series too."""

    def leaky(seen: SeriesFrame, cutoff: Any, likelihood: str) -> Artifact:
        return solved(whole[-1].until(cutoff), cutoff, likelihood)

    whole: list[SeriesFrame] = []
    honest = module._Data.__init__

    def remember(self: Any, frame: SeriesFrame) -> None:
        whole.append(frame)
        honest(self, frame)

    whole.append(frame_of(table_of()))  # for the fit before the first cold one
    monkeypatch.setattr(module._Data, "__init__", remember)
    assert "ar@5" in leaks(leaky)


def test_one_row_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.visible_rows
    monkeypatch.setattr(
        module, "visible_rows", lambda frame, old, new, at, kept: honest(frame, old, new, at, kept + 1 if kept else 0)
    )
    assert leaks() == ["ar@5"]


def test_likeness_by_level_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur shows predict the new series themselves and calls one its own nearest neighbour."""
    honest = module.predict_cold

    def leaky(artifact: Artifact, shown: SeriesFrame, config: ColdStartConfig, **options: Any) -> Any:
        found = honest(artifact, shown, config, **options)
        if not config.like:
            return found
        peek = whole[-1].table.filter(pl.col("time") <= options["cutoff"]).group_by("series_id").agg(pl.col("y").mean())
        table = found.table.join(peek, on="series_id", how="left").with_columns(pl.col("mean") + 0.01 * pl.col("y"))
        return type(found)(table=table.drop("y"), quantile_levels=found.quantile_levels, metadata=found.metadata)

    whole: list[SeriesFrame] = []
    plain = module._Data.__init__

    def remember(self: Any, frame: SeriesFrame) -> None:
        whole.append(frame)
        plain(self, frame)

    monkeypatch.setattr(module._Data, "__init__", remember)
    monkeypatch.setattr(module, "predict_cold", leaky)
    assert leaks(like="static", neighbours=2) == ["ar@0"]


def test_the_public_leak_check_passes(frame: SeriesFrame) -> None:
    config = config_of(groups=2, rows=5).model_copy(update=SMALL)
    assert_no_future_leak({"ar": solved}, frame, config, horizon=HORIZON)


# likeness, page, refusals


def test_features_that_say_the_level_beat_the_mean(frame: SeriesFrame, report: BacktestReport) -> None:
    near = backtest(
        {"ar": solved}, frame, config_of(rows=0, like="static", neighbours=2, categories=["kind"]), horizon=HORIZON
    )
    error = {
        name: part.filter(model="ar@0")["mae"].item()
        for name, part in (("near", near.leaderboard), ("mean", report.leaderboard))
    }
    assert error["near"] < 0.6 * error["mean"]


def test_the_page_says_what_it_is_worth(report: BacktestReport, tmp_path: Path) -> None:
    records = {row["rows"]: row for row in report.settings["cold_start_rows"]}
    assert list(records) == ["0", "5", "all"]
    graded = {
        name: float((part["mean"] - part["actual"]).abs().mean())
        for (name,), part in report.forecasts.group_by("model")
    }
    for kept in ("0", "5"):
        assert records[kept]["mae"] == pytest.approx(graded[f"ar@{kept}"])
        assert records[kept]["of_known"] == pytest.approx(graded[f"ar@{kept}"] / graded["ar"])
        assert records[kept]["of_full"] == pytest.approx(graded[f"ar@{kept}"] / graded["ar@all"])
        assert records[kept]["of_naive"] == pytest.approx(graded[f"ar@{kept}"] / graded[f"naive@{kept}"])
    assert records["all"]["of_naive"] is None
    assert records["0"]["mae"] > 2.0 * records["5"]["mae"]
    assert any("cold start, ar with 5 rows of a new series" in note for note in report.notes)
    stored = load_report(report.save(tmp_path / "report").path)
    page = (tmp_path / "report" / "report.md").read_text()
    assert "## Cold start" in page
    assert "| ar | 5 | 128 |" in page
    assert stored.settings["cold_start_rows"] == json.loads(json.dumps(report.settings["cold_start_rows"]))
    assert (
        "## Cold start"
        not in backtest({"ar": solved}, frame_of(table_of()), BacktestConfig(num_cutoffs=2), horizon=HORIZON).markdown()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cold_start": {"rows": []}}, "at least one number of rows"),
        ({"cold_start": {"rows": [-1]}}, "0 or more"),
        ({"cold_start": {"rows": [0, 0, 8]}}, "names a number of rows twice"),
        ({"cold_start": {"neighbours": 3}}, "no effect with like=mean"),
        ({"cold_start": {"like": "static", "rows": [8]}}, "rows has no 0"),
        ({"cold_start": True, "online": True}, "no online, no reconcile"),
        ({"cold_start": True, "reconcile": {"method": "ols"}}, "no online, no reconcile"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(BacktestConfig, settings)


def test_data_and_models_without_a_cold_start_are_refused(frame: SeriesFrame) -> None:
    assert validate(BacktestConfig, {"cold_start": {"rows": 8}}).cold_start == ColdBacktest(rows=(8,))
    assert validate(BacktestConfig, {"cold_start": False}).cold_start is None
    for config, data, message in (
        (config_of(groups=9), frame, "groups is 9, the data has 8 series"),
        (config_of(like="static"), frame.with_covariates(known=["plan"]), "needs static features"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            backtest({"ar": solved}, data, config, horizon=HORIZON)

    def by_series(seen: SeriesFrame, cutoff: Any) -> Artifact:
        settings = {"model": "linear", "scaling": {"kind": "series"}}
        window = WindowSpec(context_length=CONTEXT, horizon=HORIZON)
        return fit_solved(seen.with_covariates(), validate(NetworkConfig, settings), window)

    with pytest.raises(ArtifactError, match="was not fitted on 2 of 2 series"):
        backtest({"linear": by_series}, frame.with_covariates(), config_of(rows=5), horizon=HORIZON)


def test_more_rows_or_neighbours_than_there_are_is_told_before_the_first_fit(frame: SeriesFrame) -> None:
    def unfitted(seen: SeriesFrame, cutoff: Any) -> Artifact:
        pytest.fail("fitted")

    def told(data: SeriesFrame, message: str, **cold: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            backtest({"ar": unfitted}, data, config_of(**cold), horizon=HORIZON)

    # four cutoffs a horizon apart, two a fit: the last row a fit sees is 137 or 145
    told(frame, r"rows has 500, and at the cutoffs of some fit no new series has more than 138 rows", rows=[0, 500])
    late = new_groups(frame.series_ids, config_of().cold_start)[1]
    told(
        frame_of(table_of().filter(~pl.col("id").is_in(late) | (pl.col("t") >= 100))),
        "no new series has more than 38 rows",
        rows=[39],
    )
    told(frame, "neighbours is 5, and only 4 of 8 series are not new at a time", like="static", groups=2)
    told(frame, "neighbours is 7, and only 6 of 8 series", like="static", neighbours=7)
    with pytest.raises(pytest.fail.Exception, match="fitted"):
        backtest({"ar": unfitted}, frame, config_of(rows=[138], like="mean"), horizon=HORIZON)
