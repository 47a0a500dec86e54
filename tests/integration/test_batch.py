"""Batches from end to end on real parts: idempotent, atomic, blind to the future, recoverable."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tsforge.app import published
from tsforge.app.batch import BatchBusy, BatchConfig, BatchInterrupted, BatchResult, backfill, parse_as_of, run_batch
from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, DataError, TsforgeError
from tsforge.core.signals import termination_as_interrupt
from tsforge.core.workspace import Workspace
from tsforge.scheduling.ledger import Ledger, LedgerRun

ROOT = Path(__file__).resolve().parents[2]
AS_OF = datetime(2026, 3, 4, 6, tzinfo=UTC)  # day 62: the jump of a.x on day 61 lies in the scored span


def run(site: Any, as_of: datetime = AS_OF, *, force: bool = False, **changes: Any) -> BatchResult:
    return run_batch(validate(BatchConfig, site.batch(**changes)), as_of, Workspace.open(), force=force)


def ledger_row(as_of: datetime = AS_OF, job: str = "batch/daily") -> LedgerRun | None:
    ledger = Ledger(Workspace.open().database_url)
    try:
        return ledger.find(job, as_of)
    finally:
        ledger.close()


def hashes(partition: published.Partition) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in partition.manifest["files"].items()}


def tree(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


class TestOneBatch:
    def test_what_is_published(self, site: Any) -> None:
        result = run(site)
        assert result.status == "published"
        partition = result.partition
        assert partition.path.name == "as_of=2026-03-04T06-00-00Z"
        forecast, scores, events = (partition.table(name) for name in ("forecast", "scores", "events"))
        assert forecast is not None
        assert scores is not None
        assert events is not None
        assert forecast.height == 2 * 2 * 12, "series x variates x steps"
        assert forecast["cutoff"].unique().to_list() == [AS_OF]
        assert forecast["time"].min() == AS_OF + timedelta(hours=1)
        assert scores["time"].min() >= AS_OF - timedelta(days=3)
        assert scores["time"].max() == AS_OF
        jump = events.filter(pl.col("series_id") == "a").row(0, named=True)
        assert jump["start"] == datetime(2026, 3, 3, 5, tzinfo=UTC)
        assert jump["variates"][0]["variate"] == "x"
        assert jump["is_new"]
        manifest = json.loads((partition.path / "manifest.json").read_text())
        assert manifest["artifact"] == site.artifact
        assert manifest["trained_until"].startswith("2026-02-19T23:00")
        assert manifest["counts"]["rows_known"] == 2 * (62 * 24 + 7)
        assert set(manifest["seconds"]) == {"ingest", "check", "forecast", "detect"}
        row = ledger_row()
        assert row is not None
        assert (row.status, row.attempt) == ("done", 1)
        assert row.output == str(partition.path / "manifest.json")
        assert row.rows == forecast.height + scores.height + events.height
        published.verify_partition(partition)

    def test_the_forecast_is_close_to_what_came(self, site: Any) -> None:
        calm = AS_OF + timedelta(days=4)  # the jump is out of the model's sight
        forecast = run(site, calm, detect=None).partition.table("forecast")
        truth = pl.read_parquet(site.source).unpivot(index="ds", variable_name="name", value_name="truth")
        assert forecast is not None
        named = forecast.with_columns(name=pl.concat_str("series_id", pl.lit("."), "variate"))
        both = named.join(truth, left_on=["name", "time"], right_on=["name", "ds"]).drop_nulls()
        error = (both["mean"] - both["truth"]).abs().mean()
        assert isinstance(error, float)
        assert error < 0.6, "noise has a standard deviation of 0.3, the daily wave an amplitude of 3"

    def test_a_second_run_changes_nothing(self, site: Any) -> None:
        first = run(site)
        before = tree(first.partition.path.parent)
        second = run(site)
        assert second.status == "unchanged"
        assert second.partition.manifest == first.partition.manifest
        assert tree(first.partition.path.parent) == before
        row = ledger_row()
        assert row is not None
        assert row.attempt == 1

    def test_a_second_run_with_other_settings_says_that_the_first_one_stands(
        self, site: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = run(site)
        assert "other_settings" not in first.summary()
        assert run(site).summary()["other_settings"] == []
        assert not [record for record in caplog.records if record.levelno == logging.WARNING]
        second = run(site, detect=None, allow_future_model=True)
        assert second.status == "unchanged"
        assert second.summary()["other_settings"] == ["allow_future_model", "detect"]
        assert "as it was published, with other settings than now (allow_future_model, detect); --force" in caplog.text
        again = run(site, detect=None, allow_future_model=True, force=True)
        assert set(again.partition.manifest["files"]) == {"forecast.parquet"}

    def test_force_publishes_again_the_same_content(self, site: Any) -> None:
        first = run(site)
        again = run(site, force=True)
        assert again.status == "published"
        assert hashes(again.partition) == hashes(first.partition)
        assert [path.name for path in again.partition.path.parent.iterdir()] == [first.partition.path.name]

    def test_one_structured_line_a_stage(self, site: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="tsforge"):
            run(site)
        lines = [record.fields for record in caplog.records if record.getMessage() == "batch stage"]  # type: ignore[attr-defined]
        assert [line["stage"] for line in lines] == ["ingest", "check", "forecast", "detect", "publish"]
        assert all(line["job"] == "daily" and line["status"] == "ok" and line["seconds"] >= 0 for line in lines)
        assert lines[2]["rows"] == 48

    def test_stages_can_be_left_out(self, site: Any) -> None:
        assert set(run(site, name="only-f", detect=None).partition.manifest["files"]) == {"forecast.parquet"}
        found = set(run(site, name="only-d", forecast=None).partition.manifest["files"])
        assert found == {"scores.parquet", "events.parquet"}


class TestNoFuture:
    @pytest.mark.parametrize("change", ["values", "more rows", "fewer rows"])
    def test_rows_after_as_of_change_nothing(self, site: Any, change: str) -> None:
        reference = hashes(run(site, name="reference").partition)
        table = pl.read_parquet(site.source)
        later = pl.col("ds") > AS_OF
        if change == "values":
            table = table.with_columns(
                pl.when(later).then(1e6).otherwise(pl.col(name)).alias(name) for name in ("a.x", "b.y")
            )
        elif change == "more rows":
            shifted = table.filter(later).with_columns(pl.col("ds") + pl.duration(days=8))
            table = pl.concat([table, shifted]).unique("ds", keep="first").sort("ds")
        else:
            table = table.filter(~later)
            shutil.rmtree(site.home / "published")
            (site.home / "store.db").unlink()
        table.write_parquet(site.source)
        assert hashes(run(site, name="changed").partition) == reference

    def test_rows_up_to_as_of_do_change_it(self, site: Any) -> None:
        reference = hashes(run(site, name="reference").partition)
        table = pl.read_parquet(site.source)
        table.with_columns(
            pl.when(pl.col("ds") == AS_OF).then(25.0).otherwise(pl.col("a.y")).alias("a.y")
        ).write_parquet(site.source)
        assert hashes(run(site, name="changed").partition) != reference

    def test_a_model_that_knows_the_future_is_refused(self, site: Any) -> None:
        early = datetime(2026, 2, 15, tzinfo=UTC)
        with pytest.raises(DataError, match="allow_future_model"):
            run(site, early, detect=None)
        allowed = run(site, early, detect=None, allow_future_model=True)
        assert allowed.partition.manifest["trained_until"] > early.isoformat()

    def test_rows_that_the_model_saw_count_from_their_publication(self, site: Any) -> None:
        """Its last row is of 2026-02-19T23:00; where targets come two days late, nobody had it then."""
        late = site.data() | {"name": "late", "publication_delay": "2d"}
        last = datetime(2026, 2, 19, 23, tzinfo=UTC)
        with pytest.raises(DataError, match=r"up to 2026-02-19T23:00:00\+00:00, published until 2026-02-21T23:00:00"):
            run(site, last + timedelta(hours=47), data=late, detect=None)
        result = run(site, last + timedelta(hours=48), data=late, detect=None)
        assert result.partition.manifest["trained_until"] == "2026-02-21T23:00:00+00:00"
        forecast = result.partition.table("forecast")
        assert forecast is not None
        assert forecast["cutoff"].unique().to_list() == [last]

    def test_the_delay_of_the_fit_counts_where_the_job_states_none(self, site: Any) -> None:
        late = site.data() | {"name": "late", "publication_delay": "2d"}
        settings = {
            "data": late,
            "model": {"name": "linear"},
            "window": {"context_length": 48, "horizon": 12},
            "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
            "tracking": {"enabled": False},
        }
        workspace = Workspace.open()
        ingest(validate(IngestConfig, {"data": late}), workspace)
        model = fit(validate(FitConfig, settings), workspace).artifact.id
        with pytest.raises(DataError, match="published until 2026-02-21T23:00"):
            run(site, datetime(2026, 2, 20, tzinfo=UTC), model=model, detect=None)

    def test_an_as_of_in_the_future_is_refused(self, site: Any) -> None:
        with pytest.raises(ConfigError, match="future"):
            run(site, datetime.now(UTC).replace(microsecond=0) + timedelta(days=1))


class TestFailure:
    def test_a_model_of_integer_time_is_refused_in_one_line(self, site: Any) -> None:
        workspace = Workspace.open()
        table = pl.read_parquet(site.source).select(pl.int_range(pl.len()).alias("ds"), "a.x", "a.y", "b.x", "b.y")
        path = site.home / "steps.parquet"
        table.write_parquet(path)
        data = site.data() | {"name": "steps", "freq": "1i", "source": {"kind": "parquet", "path": str(path)}}
        ingest(validate(IngestConfig, {"data": data}), workspace)
        settings = {
            "data": data,
            "model": {"name": "linear"},
            "window": {"context_length": 48, "horizon": 12},
            "tracking": {"enabled": False},
        }
        model = fit(validate(FitConfig, settings), workspace).artifact.id
        with pytest.raises(ArtifactError, match=f"artifact {model} was fitted on freq 1i, the data has 1h"):
            run(site, model=model)

    def test_a_blocking_check_publishes_nothing(self, site: Any) -> None:
        with pytest.raises(DataError, match=r"non_empty: 2 of 2 series") as caught:
            run(site, checks=[{"kind": "non_empty", "min_rows": 99_999}])
        assert caught.value.exit_code != 0
        assert not (site.home / "published").exists() or not any((site.home / "published").rglob("*"))
        row = ledger_row()
        assert row is not None
        assert row.status == "failed"
        assert "non_empty" in row.message
        assert run(site).status == "published", "once the check passes, the same as_of runs"
        row = ledger_row()
        assert row is not None
        assert (row.status, row.attempt) == ("done", 2)

    def test_a_warning_is_published_with_the_result(self, site: Any) -> None:
        result = run(site, checks=[{"kind": "non_empty", "min_rows": 99_999, "severity": "warn"}])
        assert result.summary()["warnings"] == 1
        assert result.partition.manifest["checks"][0]["passed"] is False

    def test_a_missing_source_fails_and_is_recorded(self, site: Any) -> None:
        site.source.unlink()
        with pytest.raises(TsforgeError):
            run(site)
        row = ledger_row()
        assert row is not None
        assert row.status == "failed"
        assert run(site, ingest=False).status == "published", "the store still has the rows"

    def test_an_unknown_model_is_named(self, site: Any) -> None:
        with pytest.raises(TsforgeError, match="no-such-model"):
            run(site, model="no-such-model")

    def test_a_full_disk_leaves_nothing_behind(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_space(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(pl.DataFrame, "write_parquet", no_space)
            with pytest.raises(BackendError, match="No space left"):
                run(site)
        assert list((site.home / "published" / "daily").iterdir()) == []
        assert run(site).status == "published"


class TestRecovery:
    def test_a_crash_between_rename_and_ledger_is_adopted(self, site: Any) -> None:
        script = (
            "import os, sys, json; from datetime import datetime; from tsforge.core.config import validate;"
            "from tsforge.app import batch; from tsforge.core.workspace import Workspace;"
            "batch.Ledger.finish = lambda *a, **k: os._exit(9);"
            "batch.run_batch(validate(batch.BatchConfig, json.loads(sys.argv[1])), datetime.fromisoformat(sys.argv[2]),"
            " Workspace.open())"
        )
        command = [sys.executable, "-c", script, json.dumps(site.batch()), AS_OF.isoformat()]
        assert subprocess.run(command, check=False, cwd=ROOT).returncode == 9
        row = ledger_row()
        assert row is not None
        assert row.status == "claimed"
        path = site.home / "published" / "daily"
        before = tree(path)
        assert len(list(path.iterdir())) == 1
        result = run(site)
        assert result.status == "adopted"
        assert tree(path) == before
        row = ledger_row()
        assert row is not None
        assert (row.status, row.attempt) == ("done", 2)

    def test_a_lost_folder_is_published_again(self, site: Any) -> None:
        first = run(site)
        shutil.rmtree(first.partition.path)
        again = run(site)
        assert again.status == "published"
        assert hashes(again.partition) == hashes(first.partition)

    @pytest.mark.parametrize("damage", ["a byte", "the end"])
    def test_a_damaged_file_is_told_until_force_repairs_it(self, site: Any, damage: str) -> None:
        first = run(site)
        path = first.partition.path / "forecast.parquet"
        content = path.read_bytes()
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes(flipped if damage == "a byte" else content[:100])
        message = r"forecast\.parquet was changed after it was published; publish it again \(batch run --force"
        with pytest.raises(ArtifactError, match=message):
            run(site)
        with pytest.raises(ArtifactError, match=message):
            backfill(validate(BatchConfig, site.batch()), AS_OF, AS_OF, "1h", Workspace.open())
        assert run(site, force=True).status == "published"
        assert path.read_bytes() == content
        assert run(site).status == "unchanged"

    def test_damaged_events_of_an_earlier_batch_are_named(self, site: Any) -> None:
        path = run(site).partition.path / "events.parquet"
        path.write_bytes(b"PAR1xx")
        later = AS_OF + timedelta(hours=12)
        with pytest.raises(ArtifactError, match=r"as_of=2026-03-04T06-00-00Z/events\.parquet was changed"):
            run(site, later)
        row = ledger_row(later)
        assert row is not None
        assert row.status == "failed"
        assert "batch run --force" in row.message
        assert "bug" not in row.message
        run(site, force=True)
        assert run(site, later).status == "published"

    def test_a_batch_that_is_running_is_not_run_twice(self, site: Any) -> None:
        ledger = Ledger(Workspace.open().database_url)
        assert ledger.claim("batch/daily", AS_OF) is not None
        ledger.close()
        with pytest.raises(BatchBusy) as caught:
            run(site)
        assert caught.value.exit_code == 75


class TestBackfill:
    def test_a_range_runs_in_order_and_goes_on_where_it_stopped(self, site: Any) -> None:
        config, workspace = validate(BatchConfig, site.batch(ingest=False)), Workspace.open()
        run(site, AS_OF + timedelta(days=1), ingest=False)
        result = backfill(config, AS_OF.isoformat(), (AS_OF + timedelta(days=2)).isoformat(), "1d", workspace)
        assert [item.status for item in result.results] == ["published", "unchanged", "published"]
        assert [item.partition.as_of.day for item in result.results] == [4, 5, 6]
        assert result.summary() == {"batches": 3, "published": 2, "unchanged": 1}
        again = backfill(config, AS_OF, AS_OF + timedelta(days=2), "1d", workspace)
        assert again.summary() == {"batches": 3, "unchanged": 3}

    def test_an_event_seen_by_several_batches_is_one_event(self, site: Any) -> None:
        config, workspace = validate(BatchConfig, site.batch(ingest=False)), Workspace.open()
        result = backfill(config, AS_OF, AS_OF + timedelta(days=1), "12h", workspace)
        new = [item.partition.manifest["counts"]["new_events"] for item in result.results]
        events = published.events(workspace, "daily")
        assert events is not None
        assert new[0] >= 1
        assert sum(new) == events.height == events["event_id"].n_unique()
        jump = events.filter((pl.col("series_id") == "a") & (pl.col("start") == datetime(2026, 3, 3, 5, tzinfo=UTC)))
        assert jump.height == 1
        assert jump["first_as_of"][0] == AS_OF
        assert jump["last_as_of"][0] == AS_OF + timedelta(days=1)

    def test_the_first_failure_stops_it(self, site: Any) -> None:
        table = pl.read_parquet(site.source)
        table.filter(pl.col("ds") <= AS_OF).write_parquet(site.source)
        shutil.rmtree(site.home / "published", ignore_errors=True)
        (site.home / "store.db").unlink()
        config = validate(BatchConfig, site.batch(checks=[{"kind": "fresh", "max_age": "1h"}]))
        with pytest.raises(DataError, match="fresh"):
            backfill(config, AS_OF, AS_OF + timedelta(hours=12), "6h", Workspace.open())
        assert [path.name for path in (site.home / "published" / "daily").iterdir()] == ["as_of=2026-03-04T06-00-00Z"]

    @pytest.mark.parametrize(
        ("start", "stop", "every", "message"),
        [
            ("2026-03-05", "2026-03-04", "1d", "empty"),
            ("2026-03-04", "2026-03-05", "daily", "not a step"),
            ("2026-03-04", "2026-03-05", "-1d", "not a step"),
            ("2026-03-04", "2026-03-04T01", "1ms", "step of 1ms .* about 3,600,001 batches, more than 100,000"),
            ("2026-03-04", "2026-03-05", "1500ms", "a step of 1500ms is no number of whole seconds"),
            ("yesterday", "2026-03-05", "1d", "as-of: time 'yesterday' is not an ISO date"),
            ("0001-01-01T00:00+05:00", "2026-03-05", "1d", "lies outside the years 1 to 9999"),
        ],
    )
    def test_bad_ranges(self, site: Any, start: str, stop: str, every: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            backfill(validate(BatchConfig, site.batch()), start, stop, every, Workspace.open())
        assert not (site.home / "published").exists()


class TestAsOf:
    def test_text_without_zone_is_utc(self) -> None:
        assert parse_as_of("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
        assert parse_as_of("2026-03-01T06:00:00+02:00") == datetime(2026, 3, 1, 4, tzinfo=UTC)
        assert parse_as_of(None).microsecond == 0

    def test_fractions_of_a_second_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="finer than a second"):
            parse_as_of("2026-03-01T06:00:00.5Z")


class TestPipelines:
    def call(self, site: Any, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        config = site.home.parent / "daily.yaml"
        import yaml

        config.write_text(yaml.safe_dump(site.batch()))
        command = [sys.executable, "-m", module, str(config), "--as-of", "2026-03-04T06:00:00Z", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)

    def test_the_batch_as_a_process(self, site: Any) -> None:
        done = self.call(site, "pipelines.batch_forecast")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "published"
        stages = [
            line["stage"] for line in map(json.loads, done.stderr.splitlines()) if line["message"] == "batch stage"
        ]
        assert stages == ["ingest", "check", "forecast", "detect", "publish"]
        failed = self.call(
            site, "pipelines.batch_forecast", "name=strict", "checks=[{kind: non_empty, min_rows: 99999}]"
        )
        assert failed.returncode == 3
        assert failed.stderr.splitlines()[-1].startswith("error: 1 check(s) of strict")

    def test_detection_alone_is_a_job_of_its_own(self, site: Any) -> None:
        done = self.call(site, "pipelines.batch_detect")
        assert done.returncode == 0, done.stderr
        partition = published.latest(Workspace.open(), "daily-detect")
        assert partition is not None
        assert set(partition.manifest["files"]) == {"scores.parquet", "events.parquet"}
        assert self.call(site, "pipelines.batch_detect", "detect=null").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_publishing_is_told_after_it(
    site: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What was stored before is not untouched then, so the message must not be that of other interruptions."""
    write = published.write_partition

    def interrupted(*arguments: Any, **options: Any) -> published.Partition:
        partition = write(*arguments, **options)
        signal.raise_signal(number)
        return partition

    run(site, detect=None)
    monkeypatch.setattr(published, "write_partition", interrupted)
    with termination_as_interrupt(), pytest.raises(BatchInterrupted, match="that batch is complete") as caught:
        run(site, detect=None, force=True)
    assert caught.value.exit_code == 130
    row = ledger_row()
    assert row is not None
    assert (row.status, row.message, row.attempt) == ("done", "published", 2)
    with termination_as_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)  # signals are heard again


def test_the_summary_leaves_room_for_the_table(site: Any) -> None:
    """The command line prints summary and table as one JSON document under the key ``rows``."""
    result = run(site, detect=None)
    assert "rows" not in result.summary()
    assert result.rows() == [{"file": "forecast.parquet", "rows": 48}]
