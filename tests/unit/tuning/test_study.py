from __future__ import annotations

import math
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ridge_study
from ridge_study import DEFAULTS, SPACE, objective, valid_error

from tsforge.core.errors import BackendError, ConfigError, ModelError
from tsforge.tuning import study as module
from tsforge.tuning.config import TuneConfig
from tsforge.tuning.result import TrialRecord, TuneResult
from tsforge.tuning.space import Choice, Range
from tsforge.tuning.study import Trial, tune


def study(folder: Path, trials: int = 12, **settings: Any) -> TuneResult:
    config = TuneConfig(name="ridge", num_trials=trials, num_startup_trials=5, **settings)
    return tune(objective, SPACE, config, directory=folder, defaults=DEFAULTS)


def tried(result: TuneResult) -> list[tuple[dict[str, Any], float | None]]:
    return [(trial.values, trial.value) for trial in result.trials if trial.state not in ("interrupted", "running")]


def test_the_search_comes_close_to_the_best_of_an_exhaustive_one(tmp_path: Path) -> None:
    result = study(tmp_path, 30)
    exhaustive = min(valid_error(lags, ridge) for lags in range(1, 41) for ridge in np.logspace(-4, 4, 33))
    assert result.best.value is not None
    assert result.best.value < exhaustive * 1.01
    assert result.best.value == valid_error(**result.best.values)
    assert result.trials[0].values == DEFAULTS, "the configured values are tried first"
    assert result.trials[0].value is not None
    assert result.best.value < 0.8 * result.trials[0].value
    assert len({tuple(trial.values.values()) for trial in result.trials[:6]}) == 6, "the random start repeats itself"
    assert set(result.importance) == set(SPACE)
    assert sum(result.importance.values()) == pytest.approx(1.0)
    history = result.history()
    assert history["best"].to_list() == np.minimum.accumulate(history["value"].to_numpy()).tolist()
    assert result.summary()["trials"] == "30 complete"
    assert len(result.rows()) == 30


def test_equal_seeds_make_equal_studies_and_other_seeds_other_ones(tmp_path: Path) -> None:
    first, again, other = (study(tmp_path / name, 9, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert tried(first) == tried(again)
    assert tried(first) != tried(other)


def test_a_study_continues_and_counts_earlier_trials(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole", 14)
    study(tmp_path / "parts", 4)
    calls = []

    def counted(values: dict[str, Any], trial: Trial) -> float:
        calls.append(trial.number)
        return objective(values, trial)

    config = TuneConfig(name="ridge", num_trials=14, num_startup_trials=5)
    parts = tune(counted, SPACE, config, directory=tmp_path / "parts", defaults=DEFAULTS)
    assert len(calls) == 10
    assert tried(parts) == tried(whole), "a continued study makes the suggestions of one that ran through"
    again = tune(counted, SPACE, config, directory=tmp_path / "parts", defaults=DEFAULTS)
    assert len(calls) == 10, "nothing is left to do"
    assert again.best == whole.best or again.best.value == whole.best.value


def test_changed_starting_values_are_tried_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def started_from(trials: int, **values: Any) -> TuneResult:
        config = TuneConfig(name="ridge", num_trials=trials, num_startup_trials=5)
        return tune(objective, SPACE, config, directory=tmp_path, defaults=DEFAULTS | values)

    def told() -> list[str]:
        found = [message for message in caplog.messages if "configured values" in message]
        caplog.clear()
        return found

    caplog.set_level("INFO")
    started_from(3)
    started_from(4)
    assert told() == []
    result = started_from(6, lags=24, ridge=2.0)
    assert result.trials[4].values == {"lags": 24, "ridge": 2.0}
    assert result.trials[5].values != result.trials[4].values, "tried once"
    (message,) = told()
    assert message.startswith("the configured values are new to the study and tried next")
    assert "num_trials" not in message
    assert len(started_from(6, lags=25).trials) == 6
    (message,) = told()
    assert "raise study.num_trials" in message
    assert started_from(7, lags=25).trials[6].values == DEFAULTS | {"lags": 25}
    started_from(8)
    assert told() == []


@contextmanager
def started(folder: Path, trials: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, ridge_study.__file__, str(folder), str(trials), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def interrupt_after(folder: Path, number: int, after: int) -> int:
    """Start the study in a process, send it a signal in the middle of a trial, return its exit code."""
    with started(folder, 14, 0.3) as process:
        assert process.stdout is not None
        for _ in range(after):
            assert process.stdout.readline()
        time.sleep(0.05)  # inside the objective
        process.send_signal(number)
        return process.wait(timeout=30)


@pytest.mark.parametrize(
    "endings", [[signal.SIGINT, signal.SIGTERM], [signal.SIGKILL, signal.SIGKILL]], ids=["interrupted", "killed"]
)
def test_no_trial_is_lost_when_a_process_ends_in_the_middle(tmp_path: Path, endings: list[int]) -> None:
    whole = study(tmp_path / "whole", 14)
    # first in the trial of the configured values, then in one the sampler suggested
    codes = [interrupt_after(tmp_path / "cut", ending, after) for ending, after in zip(endings, (1, 3), strict=True)]
    assert all(
        code == 130 if ending != signal.SIGKILL else code == -9 for code, ending in zip(codes, endings, strict=True)
    )
    resumed = study(tmp_path / "cut", 14)
    states = [trial.state for trial in resumed.trials]
    assert states.count("complete") == 14
    assert states.count("interrupted") == 2
    assert tried(resumed) == tried(whole)
    for trial in resumed.trials:
        if trial.state == "interrupted":
            assert any(other.values == trial.values for other in resumed.trials if other.state == "complete")


def test_a_trial_that_ends_its_process_every_time_is_given_up(tmp_path: Path) -> None:
    for _ in range(3):
        interrupt_after(tmp_path, signal.SIGKILL, after=1)
    result = study(tmp_path, 6)
    assert [trial.state for trial in result.trials].count("interrupted") == 2
    (failed,) = [trial for trial in result.trials if trial.state == "failed"]
    assert failed.error == "the process ended during this trial 3 times"
    assert failed.values == DEFAULTS
    assert [trial.state for trial in result.trials].count("complete") == 5


def test_removing_the_file_of_a_killed_study_starts_afresh(tmp_path: Path) -> None:
    interrupt_after(tmp_path, signal.SIGKILL, after=3)
    assert (tmp_path / "ridge.db-wal").stat().st_size > 0, "nothing to replay"
    (tmp_path / "ridge.db").unlink()
    config = TuneConfig(name="ridge", num_trials=1)
    result = tune(objective, {**SPACE, "lags": Range(1, 30, False, True)}, config, directory=tmp_path)
    assert [trial.state for trial in result.trials] == ["complete"]


def test_only_one_process_works_on_a_study(tmp_path: Path) -> None:
    with started(tmp_path, 3, 20) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(BackendError, match="another process is working on it"):
            study(tmp_path)


def test_failed_trials_are_recorded_and_do_not_end_the_study(tmp_path: Path) -> None:
    def fragile(values: dict[str, Any], trial: Trial) -> float:
        if values["lags"] > 20:
            raise ValueError(f"lags {values['lags']} exceed the context")
        if values["lags"] > 15:
            return math.nan
        return objective(values, trial)

    result = tune(fragile, SPACE, TuneConfig(name="x", num_trials=20), directory=tmp_path, defaults=DEFAULTS)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert {trial.values["lags"] > 15 for trial in failed} == {True}
    assert any("exceed the context" in (trial.error or "") for trial in failed)
    assert any("valid_mae is nan" in (trial.error or "") for trial in failed)
    assert result.best.values["lags"] <= 15
    assert len(result.trials) == 20


def test_when_every_trial_fails_the_reason_is_told_early(tmp_path: Path) -> None:
    calls = []

    def broken(values: dict[str, Any], trial: Trial) -> float:
        calls.append(1)
        raise ModelError("the horizon is longer than the data")

    with pytest.raises(ModelError, match="none of 3 trials succeeded.*horizon is longer"):
        tune(broken, SPACE, TuneConfig(name="x", max_first_failures=3), directory=tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [TypeError("bug"), BackendError("disk full")])
def test_a_bug_or_a_lost_backend_ends_the_study_at_once(tmp_path: Path, error: Exception) -> None:
    def broken(values: dict[str, Any], trial: Trial) -> float:
        raise error

    with pytest.raises(type(error), match=str(error)):
        tune(broken, SPACE, TuneConfig(name="ridge", num_trials=3), directory=tmp_path)
    result = study(tmp_path, 3)
    lost = "interrupted" if isinstance(error, BackendError) else "failed"
    assert [trial.state for trial in result.trials].count(lost) == 1


def curve(values: dict[str, Any], trial: Trial) -> float:
    """A learning curve that is ordered by x from the first step on."""
    for step in range(8):
        trial.report(step, values["x"] + 1.0 / (step + 1))
    return float(values["x"])


@pytest.mark.parametrize(("pruner", "is_pruning"), [("median", True), ("hyperband", True), ("none", False)])
def test_hopeless_trials_are_stopped(tmp_path: Path, pruner: str, is_pruning: bool) -> None:
    config = TuneConfig.model_validate({"name": "p", "num_trials": 16, "pruner": pruner, "sampler": "random"})
    result = tune(curve, {"x": Range(0.0, 1.0)}, config, directory=tmp_path)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert bool(pruned) is is_pruning
    assert all(trial.num_reports < 8 and "worse than" in (trial.error or "") for trial in pruned)
    assert result.best.value == min(trial.values["x"] for trial in result.trials if trial.state == "complete")
    if pruner == "median":
        assert min(trial.values["x"] for trial in pruned) > result.best.value
        assert all(trial.num_reports >= 2 for trial in pruned), "the warm-up report is never the last"


def test_time_limits_stop_the_study_and_a_long_trial(tmp_path: Path) -> None:
    def slow(values: dict[str, Any], trial: Trial) -> float:
        for step in range(3 if values["x"] < 0.5 else 200):
            time.sleep(0.01)
            trial.report(step, 0.0)
        return float(values["x"])

    config = TuneConfig(name="t", num_trials=500, timeout_seconds=1.0, trial_timeout_seconds=0.1, pruner="none")
    start = time.monotonic()
    result = tune(slow, {"x": Range(0.0, 1.0)}, config, directory=tmp_path)
    assert time.monotonic() - start < 10
    assert result.was_timed_out
    assert "time limit" in result.summary()["note"]
    assert {trial.state for trial in result.trials if trial.values["x"] >= 0.5} == {"pruned"}
    assert any("stopped after 0.1 s" in (trial.error or "") for trial in result.trials)


def test_the_largest_value_wins_when_asked(tmp_path: Path) -> None:
    config = TuneConfig(name="m", num_trials=8, direction="maximize")
    result = tune(lambda values, trial: float(values["x"]), {"x": Range(0.0, 1.0)}, config, directory=tmp_path)
    assert result.best.value == max(trial.value or 0 for trial in result.trials)
    assert result.history()["best"].is_sorted()


def test_choices_of_any_plain_type_come_back_as_they_are(tmp_path: Path) -> None:
    seen = []

    def remember(values: dict[str, Any], trial: Trial) -> float:
        seen.append(values["hidden"])
        return float(len(values["hidden"] or []))

    space = {"hidden": Choice(([64], [64, 32], None))}
    tune(remember, space, TuneConfig(name="c", num_trials=15), directory=tmp_path, defaults={"hidden": (64, 32)})
    assert seen[0] == [64, 32]
    assert [64] in seen
    assert None in seen


def test_notes_and_results_so_far_reach_the_caller(tmp_path: Path) -> None:
    records: list[tuple[TrialRecord, TuneResult | None]] = []

    def noted(values: dict[str, Any], trial: Trial) -> float:
        trial.note(run_id=f"run{trial.number}")
        if trial.number == 0:
            raise ValueError("first fails")
        return objective(values, trial)

    config = TuneConfig(name="n", num_trials=3)
    tune(noted, SPACE, config, directory=tmp_path, on_trial=lambda record, result: records.append((record, result)))
    assert [record.notes for record, _ in records] == [{"run_id": f"run{number}"} for number in range(3)]
    assert records[0][1] is None
    assert all(result is not None and result.best.value is not None for _, result in records[1:])


def test_results_that_cannot_be_compared_are_not_mixed(tmp_path: Path) -> None:
    def run(space: dict[str, Any], context: dict[str, Any], **settings: Any) -> TuneResult:
        config = TuneConfig(name="x", **{"num_trials": 2, **settings})
        return tune(objective, space, config, directory=tmp_path, context=context)

    run(SPACE, {"data": "a"})
    assert len(run(SPACE, {"data": "a"}, num_trials=3, seed=5, pruner="none").trials) == 3
    for space, context, settings, changed in (
        (SPACE, {"data": "b"}, {}, "data"),
        ({**SPACE, "lags": Range(1, 30, False, True)}, {"data": "a"}, {}, "space.lags"),
        (SPACE, {"data": "a"}, {"metric": "valid_mse"}, "metric"),
    ):
        with pytest.raises(ConfigError, match=rf"started with other settings \({changed}\)"):
            run(space, context, **settings)


def test_a_damaged_study_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "ridge.db").write_text("no database at all, but long enough to look like one\n" * 50, encoding="utf-8")
    with pytest.raises(BackendError, match="no study file"):
        study(tmp_path)
    (tmp_path / "ridge.db").unlink()
    connection = sqlite3.connect(tmp_path / "ridge.db")
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(BackendError, match="no such table"):
        study(tmp_path)


def test_a_study_damaged_behind_its_first_pages_is_not_called_safe(tmp_path: Path) -> None:
    study(tmp_path, 2)
    connection = sqlite3.connect(tmp_path / "ridge.db", isolation_level=None)
    pages = [row[0] for row in connection.execute("SELECT rootpage FROM sqlite_master WHERE name LIKE 'trial_%'")]
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = (tmp_path / "ridge.db").read_bytes()
    damaged = bytearray(whole)
    for page in pages:
        if page:
            damaged[(page - 1) * size : page * size] = b"\xa5" * size
    (tmp_path / "ridge.db").write_bytes(damaged)
    with pytest.raises(
        BackendError, match=r"ridge\.db is no study file \(.*malformed.*restore it from a backup"
    ) as caught:
        study(tmp_path, 4)
    assert "safe" not in str(caught.value)
    (tmp_path / "ridge.db").write_bytes(whole)
    connection = sqlite3.connect(tmp_path / "ridge.db")
    connection.execute("ALTER TABLE trials RENAME COLUMN state TO gone")
    connection.close()
    with pytest.raises(BackendError, match=r"ridge\.db is no study file \(.*no such column") as caught:
        study(tmp_path, 4)
    assert "safe" not in str(caught.value)


def test_a_study_that_another_program_holds_keeps_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path, 2)
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(tmp_path / "ridge.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(BackendError, match=r"locked.*finished trials are safe"):
        study(tmp_path, 4)
    holder.execute("ROLLBACK")
    holder.close()
    assert len(study(tmp_path, 4).trials) == 4


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (-math.inf, 1.0), (0.0, math.nan), (2.0, 1.0)])
def test_a_range_that_cannot_be_searched_is_refused(tmp_path: Path, low: float, high: float) -> None:
    config = TuneConfig(name="x", num_trials=2)
    with pytest.raises(ConfigError, match="space.x: a range has two finite ends, the lower first"):
        tune(lambda values, trial: 0.0, {"x": Range(low, high)}, config, directory=tmp_path)
    assert not (tmp_path / "x.db").exists()


def test_a_full_disk_is_one_line_and_leaves_no_study(tmp_path: Path) -> None:
    """Here a limit on the size of files, which SQLite meets as it meets the end of a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(BackendError, match=r"the study file .*ridge\.db could not be written or read: .*space"):
            study(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "ridge.db").exists()
    assert study(tmp_path, 6).best.value is not None


def test_results_that_differ_by_rounding_alone_have_no_importance(tmp_path: Path) -> None:
    config = TuneConfig(name="flat", num_trials=6)
    result = tune(
        lambda values, trial: 1.0 + 2e-16 * (trial.number % 2), SPACE, config, directory=tmp_path, defaults=DEFAULTS
    )
    assert len({trial.value for trial in result.trials}) > 1
    assert result.importance == {}


def test_progress_goes_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = TuneConfig(name="shown", num_trials=2)
    tune(objective, SPACE, config, directory=tmp_path, defaults=DEFAULTS, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "best valid_mae" in err


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tuning").write_text("in the way", encoding="utf-8")
    with pytest.raises(BackendError, match="cannot make the folder of studies .*tuning"):
        study(tmp_path / "tuning")
