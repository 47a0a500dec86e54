"""Retraining: the better model wins by a margin, the worse never does, a second run changes nothing."""

from __future__ import annotations

import logging
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

import tsforge.app.retrain as retrain_module
from tsforge.app.batch import BatchInterrupted
from tsforge.app.retrain import CompareConfig, Contest, RetrainConfig, compare, retrain
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.core.owner import Owner
from tsforge.core.signals import termination_as_interrupt
from tsforge.core.workspace import Workspace
from tsforge.scheduling.ledger import Ledger
from tsforge.tracking.registry import promote, resolve

AS_OF = datetime(2026, 3, 10, 12, tzinfo=UTC)


def config(site: Any, model: str, **changes: Any) -> RetrainConfig:
    fit = {
        "data": site.data(),
        "model": {"name": model},
        "window": {"context_length": 48, "horizon": 12},
        "split": {"train": 0.85, "valid": 0.15, "test": 0.0},
        "tracking": {"register_as": "plant", "alias": "challenger"},
    }
    compare = {"span": "6d", "cutoffs": 12, "margin": 0.05}
    return validate(RetrainConfig, {"name": "plant", "fit": fit, "compare": compare} | changes)


def test_the_story_of_a_champion(site: Any) -> None:
    """First of its name; beaten by a better model; a worse one does not take over; repeating changes nothing."""
    workspace = Workspace.open()
    first = retrain(config(site, "last_value"), AS_OF - timedelta(days=8), workspace)
    assert first.promoted
    assert "no champion" in first.reason
    better = retrain(config(site, "linear"), AS_OF, workspace)
    assert better.promoted, better.reason
    assert better.facts["improvement"] > 0.5
    assert resolve("plant@champion", workspace).name == better.facts["challenger"]
    again = retrain(config(site, "linear"), AS_OF, workspace)
    assert again.status == "unchanged"
    assert again.promoted
    assert again.facts["challenger"] == better.facts["challenger"]
    worse = retrain(config(site, "last_value", name="other"), AS_OF, workspace)
    assert not worse.promoted
    assert worse.facts["improvement"] < 0
    assert resolve("plant@champion", workspace).name == better.facts["challenger"]
    assert resolve("plant@challenger", workspace).name == worse.facts["challenger"]


def test_a_second_run_with_other_settings_says_that_the_first_one_stands(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Workspace.open()
    first = retrain(config(site, "last_value"), AS_OF, workspace)
    assert "other_settings" not in first.summary()
    same = retrain(config(site, "last_value"), AS_OF, workspace)
    assert same.summary()["other_settings"] == []
    assert {**first.facts, "promoted": True} == {**same.facts, "promoted": same.promoted}
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    other = config(site, "last_value", promote="never", compare={"span": "5d", "cutoffs": 12, "margin": 0.05})
    second = retrain(other, AS_OF, workspace)
    assert (second.status, second.promoted, second.facts) == ("unchanged", True, same.facts)
    assert second.summary()["other_settings"] == ["compare.span", "promote"]
    assert "plant as of 2026-03-10T12:00:00+00:00 stays as it was done, with other settings than now" in caplog.text
    assert "(compare.span, promote); another as-of" in caplog.text


def test_nothing_is_claimed_about_a_retraining_whose_settings_the_ledger_does_not_know(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Workspace.open()
    ledger = Ledger(workspace.database_url)
    claim = ledger.claim("retrain/plant", AS_OF)
    assert claim is not None
    ledger.finish(claim, message="better", details={"challenger": "old", "promoted": True})  # as an older version did
    ledger.close()
    again = retrain(config(site, "last_value", promote="never"), AS_OF, workspace)
    assert (again.status, again.promoted, again.facts) == ("unchanged", True, {"challenger": "old"})
    assert "other_settings" not in again.summary()
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


class Killed(BaseException):
    """Ends a test process the way ``kill -9`` would: nothing is written any more."""


@pytest.mark.parametrize("then", ["killed", "failed"])
def test_a_promotion_that_a_killed_run_made_is_adopted(site: Any, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    """Else the next run would compare the new champion with itself and record that it was not promoted."""
    workspace = Workspace.open()
    retrain(config(site, "last_value"), AS_OF - timedelta(days=8), workspace)

    def die(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "finish", die)
        if then == "killed":
            patch.setattr(Ledger, "fail", die)
        with pytest.raises(Killed):
            retrain(config(site, "linear"), AS_OF, workspace)
    monkeypatch.setattr(Owner, "is_gone", lambda self: True)
    champion = resolve("plant@champion", workspace).name
    made = sorted(path.name for path in workspace.artifacts.iterdir())
    with monkeypatch.context() as patch:  # a run between them that fails early forgets nothing
        patch.setattr(retrain_module, "has_alias", lambda *arguments: die())
        with pytest.raises(Killed):
            retrain(config(site, "linear"), AS_OF, workspace)
    other = config(site, "linear", compare={"span": "5d", "cutoffs": 12, "margin": 0.05})
    result = retrain(other, AS_OF, workspace)
    assert (result.status, result.promoted, result.facts["challenger"]) == ("adopted", True, champion)
    assert "better" in result.reason
    assert result.facts["improvement"] > 0.5
    assert result.other_settings == ("compare.span",)
    assert sorted(path.name for path in workspace.artifacts.iterdir()) == made, "nothing was fitted"
    again = retrain(config(site, "linear"), AS_OF, workspace)
    assert (again.status, again.promoted, again.facts) == ("unchanged", True, result.facts)
    assert again.other_settings == ()


def test_a_run_that_was_killed_before_the_promotion_does_its_work_again(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.open()

    def die(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(retrain_module, "promote", die)
        with pytest.raises(Killed):
            retrain(config(site, "last_value"), AS_OF, workspace)
    result = retrain(config(site, "last_value"), AS_OF, workspace)
    assert (result.status, result.promoted) == ("done", True)
    assert resolve("plant@champion", workspace).name == result.facts["challenger"]


def test_a_signal_that_comes_while_promoting_is_told_after_it(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return promote(*arguments, **options)

    workspace = Workspace.open()
    monkeypatch.setattr(retrain_module, "promote", interrupted)
    with termination_as_interrupt(), pytest.raises(BatchInterrupted, match="that retraining is complete"):
        retrain(config(site, "last_value"), AS_OF, workspace)
    assert retrain(config(site, "last_value"), AS_OF, workspace).status == "unchanged"


def test_a_damaged_champion_is_an_error_and_stays(site: Any) -> None:
    """Only an alias that does not exist yet means that there is nothing to beat."""
    workspace = Workspace.open()
    first = retrain(config(site, "last_value"), AS_OF - timedelta(days=8), workspace)
    (workspace.artifacts / first.facts["challenger"] / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="weights.safetensors"):
        retrain(config(site, "linear"), AS_OF, workspace)
    assert resolve("plant@champion", workspace).name == first.facts["challenger"]
    ledger = Ledger(workspace.database_url)
    run = ledger.find("retrain/plant", AS_OF)
    ledger.close()
    assert run is not None
    assert run.status == "failed"


def test_the_challenger_never_sees_the_span_of_the_contest(site: Any) -> None:
    from tsforge.app.batch import data_seen_until
    from tsforge.artifact import load_artifact

    workspace = Workspace.open()
    result = retrain(config(site, "last_value", promote="never"), AS_OF, workspace)
    assert not result.promoted
    seen = data_seen_until(load_artifact(workspace.artifacts / result.facts["challenger"]))
    assert seen is not None
    assert seen <= AS_OF - timedelta(days=6)


def test_a_champion_that_saw_the_span_is_refused(site: Any) -> None:
    workspace = Workspace.open()
    assert retrain(config(site, "last_value"), AS_OF, workspace).promoted
    with pytest.raises(DataError, match="into the span of the comparison"):
        retrain(config(site, "linear"), AS_OF - timedelta(days=2), workspace)
    ledger = Ledger(workspace.database_url)
    run = ledger.find("retrain/plant", AS_OF - timedelta(days=2))
    ledger.close()
    assert run is not None
    assert run.status == "failed"


def test_the_errors_equal_a_plain_loop(site: Any) -> None:
    """Recomputed cell by cell: forecasts from the published function, everything else by hand."""
    from tsforge.app.ingest import load_dataset
    from tsforge.artifact import load_artifact
    from tsforge.forecasting.predict import predict

    workspace = Workspace.open()
    artifact = load_artifact(workspace.artifacts / site.artifact)
    frame = load_dataset(workspace, "plant", masked=True).until(AS_OF)
    start = AS_OF - timedelta(days=2)
    contest = compare(artifact, artifact, frame, start, AS_OF, CompareConfig(span="2d", cutoffs=4))
    assert contest.champion_error == contest.challenger_error
    assert contest.improvement == 0.0
    moments = [start + timedelta(hours=hours) for hours in range(49)][: 49 - 12]
    chosen = sorted({round(place) for place in np.linspace(0, len(moments) - 1, 4)})
    table = {(row["series_id"], row["time"]): row for row in frame.table.to_dicts()}
    history = frame.table.filter(pl.col("time") <= start)
    deviation = {name: float(np.std(history[name].drop_nulls().to_numpy(), ddof=1)) for name in ("x", "y")}
    means, cells = [], 0
    for place in chosen:
        errors = []
        for row in predict(artifact, frame, cutoff=moments[place], quantile_levels=()).table.to_dicts():
            truth = table[(row["series_id"], row["time"])][row["variate"]]
            if truth is not None:
                errors.append(abs(row["mean"] - truth) / deviation[row["variate"]])
        means.append(sum(errors) / len(errors))
        cells += len(errors)
    assert contest.cells == cells
    assert contest.champion_error == pytest.approx(sum(means) / len(means), rel=1e-9)


@pytest.mark.parametrize(
    ("improvement", "p_value", "won"),
    [(0.2, 0.01, True), (0.2, 0.5, False), (0.005, 0.01, False), (-0.2, 0.01, False), (0.2, float("nan"), False)],
)
def test_winning_takes_margin_and_certainty(improvement: float, p_value: float, won: bool) -> None:
    contest = Contest(
        champion_error=1.0,
        challenger_error=1.0 - improvement,
        improvement=improvement,
        p_value=p_value,
        cutoffs=9,
        cells=9,
    )
    assert contest.is_won(CompareConfig(margin=0.01, max_p_value=0.1)) is won


def test_without_a_test_the_margin_decides() -> None:
    contest = Contest(
        champion_error=1.0, challenger_error=0.8, improvement=0.2, p_value=float("nan"), cutoffs=4, cells=4
    )
    assert contest.is_won(CompareConfig(margin=0.1, max_p_value=1.0))


def test_a_model_without_registered_name_is_refused(site: Any) -> None:
    with pytest.raises(ConfigError, match="register_as"):
        config(site, "linear", fit=config(site, "linear").fit.model_dump() | {"tracking": {"register_as": None}})
