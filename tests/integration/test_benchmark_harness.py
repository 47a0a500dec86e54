"""The benchmark harness: literature numbers, any table, cache, interruption, failures, budget."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app import benchmark as module
from tsforge.app import worker_pool
from tsforge.app.benchmark import BenchmarkConfig, benchmark, code_version, parse_entry
from tsforge.app.benchmark_data import read_benchmark_data
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.workspace import Workspace

OLS = "linear:ridge=0:remove=none:offset=constant"
NORMALISED = "linear:ridge=0:offset=window_scale"


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


def run(workspace: Workspace, path: Path, **settings: Any) -> module.BenchmarkResult:
    plain = {
        "datasets": [str(path)],
        "models": ["linear"],
        "context_lengths": [24],
        "horizons": [6],
        "baselines": "naive",
    }
    return benchmark(validate(BenchmarkConfig, plain | settings), workspace)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """An hourly table nobody has seen: a wave, a walk, a constant, a text, a flag, holes, an infinity."""
    rng = np.random.default_rng(0)
    rows = 600
    wave = np.sin(2 * np.pi * np.arange(rows) / 24) + 0.1 * rng.normal(size=rows)
    wave[rng.random(rows) < 0.02] = np.nan
    wave[100] = np.inf
    data = pl.DataFrame(
        {
            "when": [datetime(2024, 1, 1) + timedelta(hours=h) for h in range(rows)],
            "wave": wave,
            "walk": rng.normal(size=rows).cumsum(),
            "flat": np.full(rows, 3.0),
            "text": ["x"] * rows,
            "flag": np.arange(rows) % 7 == 0,
        }
    )
    path = tmp_path / "unseen.parquet"
    data.write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("name", "label", "length", "horizon", "mse", "mae"),
    [
        ("ETTh1", "last_value", 336, 96, 1.294, 0.713),
        ("ETTh2", "last_value", 336, 96, 0.432, 0.422),
        ("ETTh1", "seasonal_naive:season_length=24", 336, 96, 0.512, 0.433),
        ("ETTh1", OLS, 336, 96, 0.370, 0.392),
        ("ETTh2", OLS, 336, 96, 0.302, 0.365),
        ("ETTh1", NORMALISED, 336, 96, 0.371, 0.392),
        ("ETTh2", NORMALISED, 336, 96, 0.273, 0.335),
    ],
)
def test_literature_numbers(
    shared_data: Path, workspace: Workspace, name: str, label: str, length: int, horizon: int, mse: float, mae: float
) -> None:
    """Source: table of baselines measured on explicit windows, three decimals; every test window counts."""
    path = shared_data / "forecast" / f"{name}.parquet"
    result = run(workspace, path, models=[label], context_lengths=[length], horizons=[horizon])
    row = result.table.filter(model=label).row(0, named=True)
    assert row["windows"] == 2880 - horizon + 1
    assert row["cells"] == row["windows"] * horizon * 7
    assert row["mse"] == pytest.approx(mse, abs=0.001)
    assert row["mae"] == pytest.approx(mae, abs=0.001)


def test_a_loss_that_a_closed_form_does_not_minimise_is_a_failure_not_another_row(
    workspace: Workspace, table: Path
) -> None:
    result = run(workspace, table, models=["linear:likelihood.loss=mae", "linear"], context_lengths=[24], horizons=[5])
    rows = {row["model"]: row for row in result.table.iter_rows(named=True)}
    assert rows["linear"]["status"] == "ok"
    assert rows["linear:likelihood.loss=mae"]["status"] == "failed"
    assert "likelihood.loss=mae has no effect" in rows["linear:likelihood.loss=mae"]["error"]


def test_errors_of_an_unseen_table_equal_a_loop(workspace: Workspace, table: Path) -> None:
    result = run(workspace, table, models=["last_value"], context_lengths=[24], horizons=[5])
    data = pl.read_parquet(table)
    train, valid = int(0.7 * 600), 600 - int(0.7 * 600) - int(0.2 * 600)
    squared, count = 0.0, 0
    for name in ("wave", "walk", "flat", "flag"):
        values = data[name].cast(pl.Float64).to_numpy().copy()
        values[~np.isfinite(values)] = np.nan
        seen = values[:train][~np.isnan(values[:train])]
        values = (values - seen.mean()) / (seen.std() if seen.std() > 0 else 1.0)
        for start in range(train + valid, 600 - 5 + 1):
            past = values[start - 24 : start]
            last = past[~np.isnan(past)][-1]
            for actual in values[start : start + 5]:
                if not np.isnan(actual):
                    squared += (actual - last) ** 2
                    count += 1
    row = result.table.filter(model="last_value").row(0, named=True)
    assert row["cells"] == count
    assert row["mse"] == pytest.approx(squared / count, rel=1e-5)
    notes = " ".join(result.notes)
    for part in ("not numeric: text", "1 infinite cells", "constant over the training rows", "cells are missing"):
        assert part in notes


def test_naive_rows_are_always_there_and_rows_are_ranked(workspace: Workspace, table: Path) -> None:
    result = run(workspace, table, models=["linear"], horizons=[6, 12])
    assert result.table["model"].to_list() == ["last_value", "seasonal_naive:season_length=24", "linear"] * 2
    rows = result.rows()
    assert [row["horizon"] for row in rows] == [6] * 3 + [12] * 3
    assert rows[0]["mse"] <= rows[1]["mse"] <= rows[2]["mse"]
    last = next(row for row in rows if row["model"] == "last_value")
    assert last["skill"] == 0.0
    assert all(row["parameters"] is not None and row["peak_memory_mb"] > 1 for row in rows)
    kept = (result.path / "summary.json").read_text()
    assert json.loads(kept)["rows"] == rows
    assert str(result.path) not in kept
    assert pl.read_parquet(result.path / "table.parquet").equals(result.table)


def test_a_second_run_measures_nothing_and_refresh_does(workspace: Workspace, table: Path, monkeypatch) -> None:
    first = run(workspace, table)
    calls: list[str] = []
    real = worker_pool.run_setting

    def counted(data: Any, setting: Any, **options: Any) -> dict[str, Any]:
        calls.append(setting.label)
        return real(data, setting, **options)

    monkeypatch.setattr(worker_pool, "run_setting", counted)
    second = run(workspace, table)
    assert calls == []
    assert second.summary()["from_cache"] == 3
    assert second.table.drop("cached").equals(first.table.drop("cached"))
    run(workspace, table, models=["linear:ridge=7"])
    assert calls == ["linear:ridge=7"]  # only what changed
    run(workspace, table, refresh=True)
    assert len(calls) == 4
    changed = pl.read_parquet(table).with_columns(walk=pl.col("walk") * 2.0 + pl.int_range(pl.len()).cast(pl.Float64))
    changed.write_parquet(table)
    run(workspace, table)
    assert len(calls) == 7


def test_changed_source_code_makes_the_cache_stale(workspace: Workspace, table: Path, monkeypatch) -> None:
    assert code_version("linear") == code_version("linear")
    assert code_version("linear") != code_version("drift")
    run(workspace, table)
    monkeypatch.setattr(module, "code_version", lambda name: "other")
    assert run(workspace, table).summary()["from_cache"] == 0


def test_an_interrupted_run_keeps_what_it_measured(workspace: Workspace, table: Path, monkeypatch) -> None:
    real = worker_pool.run_setting

    def interrupted(data: Any, setting: Any, **options: Any) -> dict[str, Any]:
        if setting.label == "linear":
            raise KeyboardInterrupt
        return real(data, setting, **options)

    monkeypatch.setattr(worker_pool, "run_setting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(workspace, table)
    monkeypatch.setattr(worker_pool, "run_setting", real)
    assert run(workspace, table).summary()["from_cache"] == 2


def test_a_damaged_cache_file_is_measured_again(workspace: Workspace, table: Path, caplog) -> None:
    run(workspace, table)
    for place in workspace.reports.rglob("cache/linear-*.json"):
        place.write_text("{")
    with caplog.at_level("WARNING", logger="tsforge"):
        again = run(workspace, table)
    assert again.summary()["from_cache"] == 2
    assert "cannot be read" in caplog.text
    assert again.failed == 0


def test_a_failing_setting_is_a_row_and_stops_nothing(workspace: Workspace, table: Path) -> None:
    result = run(workspace, table, models=["drift:steps=99", "linear"], seeds=2, horizons=[6, 500])
    failed = result.table.filter(status="failed")
    assert result.failed == failed.height
    by_model = failed.filter(horizon=6)
    assert by_model["model"].to_list() == ["drift:steps=99"]
    assert "needs a context of 100 rows" in by_model["error"][0]
    assert "fewer than horizon 500" in failed.filter(horizon=500)["error"][0]
    assert result.table.filter(model="linear", horizon=6)["status"].to_list() == ["ok"]
    shown = {(row["model"], row["horizon"]): row["status"] for row in result.rows()}
    assert shown["drift:steps=99", 6] == "failed"
    assert shown["linear", 6] == "ok"


def test_a_run_in_which_nothing_came_out_leaves_the_earlier_report_alone(workspace: Workspace, table: Path) -> None:
    good = run(workspace, table)
    before = {place.name: place.read_bytes() for place in good.path.iterdir()}
    failed = run(workspace, table, horizons=[6000])
    assert failed.failed == failed.table.height
    assert failed.path != good.path
    assert "fewer than horizon 6000" in (failed.path / "report.md").read_text()
    assert {place.name: place.read_bytes() for place in good.path.iterdir()} == before


def test_seeds_run_where_chance_plays_a_part(workspace: Workspace, table: Path) -> None:
    result = run(workspace, table, models=["linear", "dlinear:train.max_epochs=1"], seeds=3)
    seeds = result.table.group_by("model").agg("seed").sort("model")
    counts = {row["model"]: sorted(row["seed"]) for row in seeds.iter_rows(named=True)}
    assert counts["linear"] == [0]
    assert counts["dlinear:train.max_epochs=1"] == [0, 1, 2]
    assert result.table.filter(pl.col("model").str.starts_with("dlinear"))["mse"].n_unique() == 3
    row = next(row for row in result.rows() if row["model"].startswith("dlinear"))
    assert row["runs"] == 3
    assert row["mse_sd"] > 0
    assert any("one run stands for all seeds" in note for note in result.notes)


def test_a_spent_budget_skips_the_rest(workspace: Workspace, table: Path) -> None:
    result = run(workspace, table, budget_minutes=1e-9)
    assert set(result.table["status"]) == {"skipped"}
    assert result.failed == 0
    assert result.summary()["skipped"] == 3
    assert all(row["mse"] is None for row in result.rows())


def test_tables_without_usable_times_are_numbered(workspace: Workspace, table: Path, tmp_path: Path) -> None:
    data = pl.read_parquet(table)
    data.drop("when").write_csv(tmp_path / "plain.csv")
    plain = read_benchmark_data(tmp_path / "plain.csv", columns=["wave"])
    assert any("no time column" in note for note in plain.notes)
    assert plain.season == 24  # found in the training rows
    twice = pl.concat([data[:300], data[299:]])
    twice.write_parquet(tmp_path / "twice.parquet")
    doubled = read_benchmark_data(tmp_path / "twice.parquet")
    assert doubled.panel.num_rows == 601
    assert any("no regular grid" in note for note in doubled.notes)
    gap = data.filter(pl.int_range(pl.len()) != 50)
    gap.write_parquet(tmp_path / "gap.parquet")
    gapped = read_benchmark_data(tmp_path / "gap.parquet")
    assert gapped.panel.num_rows == 600
    assert any("1 missing time stamps" in note for note in gapped.notes)
    assert gapped.panel.grid.freq == "1h"


def test_training_rows_are_standardised_with_the_population_deviation(table: Path) -> None:
    data = read_benchmark_data(table, columns=["walk"], split=None)
    rows = slice(*data.splits.train)
    walk = pl.read_parquet(table)["walk"].to_numpy()[rows]
    expected = (walk - walk.mean()) / walk.std(ddof=0)
    np.testing.assert_allclose(data.panel.values[rows, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "gone.parquet", "gone"),
        (b"", "empty.csv", "empty"),
        (b"a,b\n", "header.csv", "no rows"),
        (b"not parquet", "bad.parquet", "Parquet"),
        (b"a,b\nx,y\nz,w\n", "text.csv", "no numeric column to forecast: a, b hold text"),
        (
            b"day,shop,sold\n" + b"".join(b"2026-01-0%d,%c,1\n" % (n, shop) for shop in b"xyz" for n in range(1, 9)),
            "long.csv",
            r"16 of 24 rows repeat a time in 'day': the table holds several series",
        ),
        (b"x", "data.xlsx", r"\.parquet or \.csv"),
    ],
)
def test_unusable_files_are_one_clear_error(tmp_path: Path, content: bytes | None, name: str, message: str) -> None:
    place = tmp_path / name
    if content is not None:
        place.write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        read_benchmark_data(place)


def test_unknown_columns_and_models_stop_before_anything_is_measured(workspace: Workspace, table: Path) -> None:
    with pytest.raises(ConfigError, match="waves"):
        run(workspace, table, columns=["waves"])
    with pytest.raises(DataError, match="text are not numeric"):
        run(workspace, table, columns=["text"])
    with pytest.raises(ConfigError, match="unknown model 'linnear'"):
        run(workspace, table, models=["linear", "linnear"])
    with pytest.raises(ConfigError, match=r"model\.rigde: unknown key; did you mean 'ridge'"):
        run(workspace, table, models=["linear:rigde=1"])
    with pytest.raises(ConfigError, match="no key=value"):
        run(workspace, table, models=["linear:ridge"])
    with pytest.raises(ConfigError, match="at least 1"):
        run(workspace, table, horizons=[0])
    assert not list(workspace.reports.rglob("*.json"))


def test_the_same_data_by_two_names_stop_before_anything_is_measured(workspace: Workspace, table: Path) -> None:
    copy = table.with_name("copy.parquet")
    shutil.copy(table, copy)
    with pytest.raises(ConfigError, match="unseen, copy hold the same values"):
        run(workspace, table, datasets=[str(table), str(copy)])
    assert not list(workspace.root.rglob("report.html"))


def test_an_entry_for_another_known_set_is_left_out_and_said(workspace: Workspace, table: Path, caplog) -> None:
    """Parts of a larger table can be measured; a name that means nothing stays an error."""
    other = {"name": "last_value", "label": "elsewhere", "data": ["national_illness"]}
    with caplog.at_level("WARNING", logger="tsforge"):
        result = run(workspace, table, models=["linear", other])
    assert "'elsewhere' is for national_illness only and left out" in caplog.text
    assert "elsewhere" not in result.table["model"].to_list()
    assert result.failed == 0
    both = {**other, "data": ["national_illness", table.stem]}
    assert "elsewhere" in run(workspace, table, models=["linear", both]).table["model"].to_list()
    with pytest.raises(ConfigError, match="'elsewhere' is for national_ilness, but measured are unseen"):
        run(workspace, table, models=["linear", {**other, "data": ["national_ilness"]}])


def test_model_entries_parse_to_their_groups() -> None:
    entry = parse_entry("dlinear:kernel=5:train.max_epochs=2:scaling.kind=window")
    assert entry == {
        "name": "dlinear",
        "label": "dlinear:kernel=5:train.max_epochs=2:scaling.kind=window",
        "model": {"kernel": 5},
        "train": {"max_epochs": 2},
        "scaling": {"kind": "window"},
    }
    assert parse_entry("committee:size=2:member.name=gru:member.d_model=8")["model"] == {
        "size": 2,
        "member": {"name": "gru", "d_model": 8},
    }
    with pytest.raises(ConfigError, match="leads into 'member', which was given as a single value"):
        parse_entry("committee:member=gru:member.d_model=8")
    config = load(
        BenchmarkConfig, "benchmark", ["datasets=[x.csv]", "models=['linear:ridge=5e4',drift]", "horizons=[1,2]"]
    )
    assert [item.title for item in config.models] == ["linear:ridge=5e4", "drift"]


def test_calendar_features_reach_the_models_that_take_them(
    workspace: Workspace, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tsforge.app.benchmark_run as module

    given: dict[str, int] = {}
    real = module.fit_network

    def spy(network: Any, *args: Any, **options: Any) -> Any:
        given[network.config.model.name] = network.spec.num_known
        return real(network, *args, **options)

    monkeypatch.setattr(module, "fit_network", spy)
    models = ["dlinear", "plrnn:latent=6:hidden=8:ensemble=1"]
    settings = {"models": models, "calendar": ["hour"], "train": {"max_epochs": 1, "max_steps_per_epoch": 2}}
    result = run(workspace, table, **settings)
    assert set(result.table["status"]) == {"ok"}
    assert given == {"dlinear": 0, "plrnn": 2}


def test_calendar_features_follow_the_clock_and_change_the_fingerprint(table: Path, tmp_path: Path) -> None:
    plain, full = read_benchmark_data(table), read_benchmark_data(table, calendar=("hour",))
    assert plain.with_calendar is plain.panel
    assert plain.fingerprint != full.fingerprint
    panel = full.with_calendar
    assert panel.schema.known == ("calendar.hour.sin", "calendar.hour.cos")
    np.testing.assert_array_equal(panel.values[:, : panel.num_targets], full.panel.values)
    hours = pl.read_parquet(table)["when"].dt.hour().to_numpy()
    np.testing.assert_allclose(panel.values[:, -2], np.sin(2 * np.pi * hours / 24), atol=1e-12)
    pl.read_parquet(table).drop("when").write_csv(tmp_path / "plain.csv")
    with pytest.raises(DataError, match="calendar"):
        read_benchmark_data(tmp_path / "plain.csv", columns=["wave"], calendar=("hour",))
