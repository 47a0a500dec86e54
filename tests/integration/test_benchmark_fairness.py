"""What makes a benchmark number mean something: ranks, verdicts, choices, cache keys, exit status, cheating peers."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app import benchmark as module
from tsforge.app import benchmark_peers
from tsforge.app.benchmark import BenchmarkConfig, BenchmarkResult, benchmark
from tsforge.app.benchmark_html import page
from tsforge.app.benchmark_peers import RUNNER, PeerHost
from tsforge.app.benchmark_report import NOT_BETTER, build_report, markdown, rank_note
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.peers import runner
from tsforge.app.worker_pool import Job, JobQueue
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace
from tsforge.metrics.significance import holm, wilcoxon


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Hourly waves without gaps."""
    rng, hours = np.random.default_rng(0), np.arange(480)
    columns: dict[str, Any] = {"ds": [datetime(2024, 1, 1) + timedelta(hours=int(hour)) for hour in hours]}
    for name in ("a", "b"):
        columns[name] = np.sin(2 * np.pi * hours / 24) + 0.2 * rng.normal(size=len(hours))
    pl.DataFrame(columns).write_parquet(tmp_path / "one.parquet")
    return tmp_path / "one.parquet"


def run(workspace: Workspace, *datasets: Path | str, **settings: Any) -> BenchmarkResult:
    plain = {"datasets": [str(item) for item in datasets], "context_lengths": [24], "horizons": [6]}
    return benchmark(
        validate(BenchmarkConfig, {"models": ["linear"], "baselines": "naive", **plain, **settings}), workspace
    )


# ---- ranks and verdicts


def report_of(
    losses: dict[str, list[float | None]], *, skipped: tuple[str, int] | None = None, spread: float = 0.0
) -> Any:
    """Return the report about made-up losses of models over 8 data sets, seeds ``spread`` below and above."""
    roles = {"ridge+IN, best look-back": "baseline", "last_value": "baseline", "peer": "peer"}
    rows = [
        {
            "data": f"set{place}",
            "horizon": 6,
            "model": name,
            "context_length": 24,
            "lookback": "",
            "role": roles.get(name, "model"),
            "mse": mse,
            "mae": mse,
            "mse_sd": None,
            "mse_min": None if mse is None else mse - spread,
            "mse_max": None if mse is None else mse + spread,
            "runs": 1,
            "fit_seconds": 1.0,
            "status": "failed" if mse is None else "ok",
        }
        for name, values in losses.items()
        for place, mse in enumerate(values)
    ]
    if skipped is not None:
        row = next(row for row in rows if (row["model"], row["data"]) == (skipped[0], f"set{skipped[1]}"))
        row |= {"status": "skipped", "mse": None}
    kept = ("data", "model", "context_length", "horizon", "status")
    frame = pl.DataFrame([{name: row[name] for name in kept} | {"error": "x", "versions": None} for row in rows])
    frame = frame.with_columns(pl.col("versions").cast(pl.String))
    config = validate(BenchmarkConfig, {"datasets": ["x.csv"], "models": ["linear"]})
    return build_report(frame, rows, [], config, [])


RIDGE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
MADE_UP: dict[str, list[float | None]] = {
    "ridge+IN, best look-back": [*RIDGE],
    "better": [0.5 * value for value in RIDGE],
    "worse": [1.25 * value for value in RIDGE],
    "last_value": [2.0 * value for value in RIDGE],
}


def test_the_lowest_error_has_rank_one_and_only_it_beats_ridge() -> None:
    ranks = {rank.name: rank for rank in report_of(MADE_UP).ranks}
    assert [(name, rank.mean_rank) for name, rank in ranks.items()] == [
        ("better", 1.0),
        ("ridge+IN, best look-back", 2.0),
        ("worse", 3.0),
        ("last_value", 4.0),
    ]
    assert ranks["better"].verdict == "beats ridge+IN"
    assert ranks["worse"].verdict == NOT_BETTER
    assert ranks["last_value"].verdict == ""
    assert [rank.wins for rank in ranks.values()] == [8, 0, 0, 0]
    assert [round(rank.ratio, 6) for rank in ranks.values()] == [0.5, 1.0, 1.25, 2.0]


def test_firsts_are_counted_and_level_are_those_whose_seeds_reach_the_first() -> None:
    """Losses 0.5, 1 and 1.25 times 1, 2, ... 8; seeds 0.2 to each side: only on the first set do two ranges meet."""
    exact = {rank.name: (rank.firsts, rank.level) for rank in report_of(MADE_UP).ranks}
    assert exact == {"better": (8, 8), "ridge+IN, best look-back": (0, 0), "worse": (0, 0), "last_value": (0, 0)}
    close = {rank.name: (rank.firsts, rank.level) for rank in report_of(MADE_UP, spread=0.26).ranks}
    assert close == {"better": (8, 8), "ridge+IN, best look-back": (0, 1), "worse": (0, 0), "last_value": (0, 0)}
    late = {rank.name: (rank.firsts, rank.level) for rank in report_of(MADE_UP, skipped=("worse", 3)).ranks}
    assert late["better"] == (7, 7)


def test_peers_stand_beside_the_best_model_of_each_pair() -> None:
    report = report_of({**MADE_UP, "peer": [0.25, *RIDGE[1:]]}, spread=0.1)
    text = markdown(report)
    assert "| set0, h=6 | peer | better 0.5000 (0.4000 to 0.6000) | peer 0.2500 (0.1500 to 0.3500) | 2.000 |  |" in text
    assert (
        "| set1, h=6 | better | better 1.0000 (0.9000 to 1.1000) | peer 2.0000 (1.9000 to 2.1000) | 0.500 |  |" in text
    )
    assert text.count("| peer 2.0000") == 1
    assert page(report).count("<td>set") == 8
    alone = markdown(report_of(MADE_UP))
    assert "Against peers" not in alone
    assert "| better | 1.00 | 8 / 8 |" in alone


def test_as_good_as_ridge_is_not_better() -> None:
    ranks = {rank.name: rank for rank in report_of({**MADE_UP, "worse": [*RIDGE]}).ranks}
    assert ranks["worse"].verdict == NOT_BETTER
    assert ranks["worse"].wins == 0


def test_p_values_are_adjusted_for_the_number_of_models() -> None:
    mixed = {**MADE_UP, "mixed": [0.9 * v if k % 2 else 1.1 * v for k, v in enumerate(RIDGE)]}
    ranks = {rank.name: rank for rank in report_of(mixed).ranks}
    names = ["better", "worse", "last_value", "mixed"]
    raw = [wilcoxon(np.array(mixed[name], dtype=float), np.array(RIDGE)).p_value for name in names]
    np.testing.assert_allclose([ranks[name].p_value for name in names], holm(raw))
    assert ranks["better"].p_value > raw[0]
    assert np.isnan(ranks["ridge+IN, best look-back"].p_value)


def test_a_model_with_a_failure_is_ranked_on_what_it_has_and_not_among_the_complete() -> None:
    ranks = {rank.name: rank for rank in report_of({**MADE_UP, "better": [None, *MADE_UP["better"][1:]]}).ranks}
    assert (ranks["better"].cells, ranks["better"].complete, ranks["better"].mean_rank) == (7, False, 1.0)
    assert ranks["ridge+IN, best look-back"].mean_rank == 1.0  # among the complete ones


def test_pairs_that_the_budget_left_out_are_not_ranked() -> None:
    report = report_of(MADE_UP, skipped=("worse", 7))
    assert report.num_cells == 7
    assert all(rank.complete and rank.cells == 7 for rank in report.ranks)
    assert "not ranked" in rank_note(report)


def test_the_best_look_back_is_the_best_on_validation_even_where_the_test_disagrees() -> None:
    rows = [
        {"model": "ridge+IN", "context_length": length, "valid_mse": valid, "mse": mse, "lookback": "", "status": "ok"}
        for length, valid, mse in ((24, 0.3, 0.1), (48, 0.2, 0.9), (96, 0.4, 0.05))
    ]
    about = {"data": "x", "horizon": 6, "role": "baseline", "note": None}
    best = module._with_best(pl.DataFrame([{**row, **about} for row in rows], schema_overrides={"note": pl.String}))
    chosen = best.filter(model="ridge+IN, best look-back").row(0, named=True)
    assert (chosen["context_length"], chosen["mse"]) == (48, 0.9)
    assert chosen["note"] == "L=48 of 24, 48, 96, chosen on validation"


# ---- what runs first, and how it ends


def test_with_a_budget_data_sets_are_measured_whole_in_their_order(
    workspace: Workspace, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pl.concat([pl.read_parquet(table).drop("ds")] * 2).write_csv(tmp_path / "two.csv")  # longer: costs more
    pushed: list[tuple[str, int]] = []

    class Recorded(JobQueue):
        def push(self, job: Job) -> None:
            pushed.append((job.data.name, job.turn))
            super().push(job)

    monkeypatch.setattr("tsforge.app.benchmark_pass.JobQueue", Recorded)
    settings: dict[str, Any] = {"horizons": [6, 12], "num_horizons": 1}
    result = run(workspace, table, tmp_path / "two.csv", **settings, budget_minutes=5.0)
    assert pushed == [("one", 0)] * 3 + [("two", 1)] * 3
    assert result.table["horizon"].unique().to_list() == [6]
    pushed.clear()
    run(workspace, table, tmp_path / "two.csv", **settings, refresh=True)
    assert {turn for _, turn in pushed} == {0}


def test_a_lower_turn_goes_before_a_higher_cost() -> None:
    queue = JobQueue()
    for turn, cost in ((1, 9.0), (0, 1.0), (0, 2.0), (1, 8.0)):
        queue.push(Job(data=None, setting=None, cost=cost, turn=turn))
    popped = list(iter(queue.pop, None))
    assert [(job.turn, job.cost) for job in popped] == [(0, 2.0), (0, 1.0), (1, 9.0), (1, 8.0)]


@pytest.mark.parametrize(("model", "status"), [("linear", 0), ("drift:steps=99", 4)])
def test_a_failed_row_is_in_the_exit_status(
    workspace_root: Path, table: Path, model: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from tsforge.__main__ import main

    arguments = ["tsforge", "benchmark", "--data", str(table), "--models", model, "--context-length", "24"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--horizons", "6", "baselines=naive"])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == status, capsys.readouterr().err


def test_the_report_says_what_failed_and_what_was_left_out(workspace: Workspace, table: Path) -> None:
    failed = (run(workspace, table, models=["drift:steps=99", "linear"]).path / "report.md").read_text()
    assert "| drift:steps=99, L=24 | 24 |  |  | failed, see below |" in failed
    assert "mean MSE" not in failed  # one horizon
    result = run(workspace, table, models=["linear:ridge=3"], budget_minutes=1e-9, refresh=True)
    for name in ("report.md", "report.html"):
        assert "Nothing was measured here" in (result.path / name).read_text()
    known = run(workspace, table, models=["linear:ridge=4"], budget_minutes=1e-9)
    for name in ("report.md", "report.html"):
        page = (known.path / name).read_text()
        assert "Left out, since the time budget was spent: linear:ridge=4, L=24." in page
        assert page.count("linear:ridge=4") == 1


def test_a_stored_data_set_is_measured_by_its_name(workspace: Workspace, tmp_path: Path) -> None:
    rng, hours = np.random.default_rng(1), np.arange(240)
    columns: dict[str, Any] = {"ds": [datetime(2024, 1, 1) + timedelta(hours=int(hour)) for hour in hours]}
    columns |= {name: rng.normal(size=240).cumsum() for name in ("a.x", "a.y", "b.x", "b.y")}
    pl.DataFrame(columns).write_parquet(tmp_path / "plant.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "plant.parquet")}
    ingest(
        validate(IngestConfig, {"data": {"name": "plant", "source": source, "separator": ".", "freq": "1h"}}), workspace
    )
    stored = run(workspace, "plant")
    as_file = run(workspace, tmp_path / "plant.parquet")
    for name in ("mse", "mae", "cells"):
        np.testing.assert_allclose(stored.table[name], as_file.table[name], rtol=1e-9)
    assert stored.data == "plant"
    with pytest.raises(ConfigError, match="did you mean 'plant'"):
        run(workspace, "plamt")


# ---- peers


def test_a_peer_without_library_equals_our_rows(workspace: Workspace, table: Path) -> None:
    models = ["plain/last_value", "plain/seasonal_naive"]
    mse = run(workspace, table, models=models, peers={"python": sys.executable}).table
    found = dict(zip(mse["model"], mse["mse"], strict=True))
    assert found["plain/last_value"] == pytest.approx(found["last_value"], rel=1e-6)
    assert found["plain/seasonal_naive"] == pytest.approx(found["seasonal_naive:season_length=24"], rel=1e-6)


def test_peers_that_cannot_run_or_have_no_part_are_one_line(workspace: Workspace, table: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'Traceback (most recent call last):' >&2\necho 'no numpy' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"cannot run the peers: no numpy; docs/benchmark\.md says how"):
        run(workspace, table, models=["plain/last_value"], peers={"python": str(broken)})
    with pytest.raises(ConfigError, match="--peers has no effect: none of the models is a peer"):
        run(workspace, table, models=["linear"], peers={"python": sys.executable})


def test_another_version_of_a_library_is_measured_anew(
    workspace: Workspace, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = PeerHost(python=sys.executable, versions={"numpy": "1", "darts": "1"}, budget_seconds=None, threads=1)
    assert host.code("darts") != replace(host, versions={"numpy": "1", "darts": "2"}).code("darts")
    assert host.code("plain") == replace(host, versions={"numpy": "1", "darts": "2"}).code("plain")
    assert host.code("darts") == replace(host, budget_seconds=9.0).code("darts")  # decides only whether there is a row
    settings = {"models": ["plain/last_value"], "peers": {"python": sys.executable}}
    run(workspace, table, **settings)
    assert run(workspace, table, **settings).summary()["from_cache"] == 3
    monkeypatch.setattr(benchmark_peers, "_versions", lambda python: '{"numpy": "0"}')
    assert run(workspace, table, **settings).summary()["from_cache"] == 2


SABOTEURS = '''
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import runner

def reads_targets(spec, train, deadline):
    """Looks for what it is to forecast."""
    target = np.load("target.npy")
    return lambda rows: target[: len(rows)], 4096

def reads_on(spec, train, deadline):
    """Takes the rows after the look-back, from whatever it was given."""
    length, horizon = spec["context_length"], spec["horizon"]
    def forecast(rows):
        more = np.concatenate([rows, np.full((len(rows), horizon), np.nan, dtype=np.float32)], axis=1)
        return more[:, length:length + horizon]
    return forecast, 4096

runner.LIBRARIES |= {{"targets": reads_targets, "on": reads_on}}
sys.exit(runner.main())
'''


def test_a_peer_that_needs_target_rows_fails(
    workspace: Workspace, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "saboteurs.py"
    place.write_text(SABOTEURS.format(folder=str(RUNNER.parent)))
    monkeypatch.setattr(benchmark_peers, "RUNNER", place)
    models = ["targets/x", "on/x", "plain/last_value"]
    result = run(workspace, table, models=models, peers={"python": sys.executable})
    rows = {row["model"]: row for row in result.table.iter_rows(named=True)}
    assert "target.npy" in rows["targets/x"]["error"]
    assert "not finite" in rows["on/x"]["error"]
    assert rows["plain/last_value"]["status"] == "ok"
    assert result.failed == 2


def depends_on_other_windows(forecast: Any, at_once: int) -> bool:
    """Whether the forecast of a window changes with the windows that stand beside it."""
    context = np.random.default_rng(0).normal(size=(9, 12, 2)).cumsum(axis=1).astype(np.float32)
    deadline = runner.Deadline(None)
    together = runner.by_series(context, 4, deadline, forecast, at_once)
    alone = [runner.by_series(context[k : k + 1], 4, deadline, forecast, at_once)[0] for k in range(9)]
    return not np.allclose(together, np.stack(alone), equal_nan=True)


def test_a_window_is_forecast_from_its_own_look_back() -> None:
    """Later look-backs hold the targets of earlier windows: a forecast must not depend on which stand beside it."""
    spec = {"model": "seasonal_naive", "horizon": 4, "settings": {}, "season": 6, "context_length": 12}
    assert not depends_on_other_windows(*runner.plain(spec, None, runner.Deadline(None)))

    def peeks(rows: Any) -> Any:
        return np.roll(rows, -8, axis=0)[:, -4:]  # the end of the look-back 4 windows later: the window's own targets

    assert depends_on_other_windows(peeks, 4096)
    assert depends_on_other_windows(peeks, 6)


@pytest.mark.parametrize("at_once", [1, 3, 4, 4096])
def test_blocks_keep_windows_and_variates_in_place(at_once: int) -> None:
    context = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    context[2, 3:, 1] = np.nan
    context[3, :, 0] = np.nan  # never observed: the training mean
    answer = runner.by_series(context, 2, runner.Deadline(None), lambda rows: rows[:, -2:], at_once)
    expected = context[:, -2:].copy()
    expected[2, :, 1] = context[2, 2, 1]
    expected[3, :, 0] = 0.0
    np.testing.assert_array_equal(answer, expected)
