"""Published folders: whole or absent, recoverable, verified; events once each over all batches."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from tsforge.app import published
from tsforge.core.errors import ArtifactError, BackendError
from tsforge.core.workspace import Workspace

AS_OF = datetime(2026, 3, 1, 6, tzinfo=UTC)


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


def publish(
    workspace: Workspace, as_of: datetime = AS_OF, events: dict[str, int] | None = None, *, replace: bool = False
) -> published.Partition:
    """Publish a forecast and events ``{event_id: hours of its end after midnight}``."""
    rows = [
        {"event_id": name, "start": AS_OF, "end": AS_OF + timedelta(hours=end)} for name, end in (events or {}).items()
    ]
    schema = {"event_id": pl.String, "start": pl.Datetime("us", "UTC"), "end": pl.Datetime("us", "UTC")}
    tables = {"forecast": pl.DataFrame({"mean": [1.0, 2.0]}), "events": pl.DataFrame(rows, schema=schema)}
    path = published.partition_path(workspace, "demo", as_of)
    return published.write_partition(path, tables, {"job": "demo", "as_of": as_of.isoformat()}, replace=replace)


def test_what_is_published_is_read_back(workspace: Workspace) -> None:
    written = publish(workspace)
    assert written.path == workspace.published / "demo" / "as_of=2026-03-01T06-00-00Z"
    found = published.read_partition(written.path)
    assert found == written
    table = written.table("forecast")
    assert table is not None
    assert table["mean"].to_list() == [1.0, 2.0]
    assert written.table("scores") is None
    assert found.manifest["files"]["forecast.parquet"]["rows"] == 2
    published.verify_partition(found)


def test_a_published_folder_is_not_overwritten_by_accident(workspace: Workspace) -> None:
    publish(workspace)
    with pytest.raises(BackendError, match="exists already"):
        publish(workspace)
    publish(workspace, events={"e": 1}, replace=True)
    assert [path.name for path in (workspace.published / "demo").iterdir()] == ["as_of=2026-03-01T06-00-00Z"]


def test_changed_missing_and_newer_files_are_told_apart(workspace: Workspace) -> None:
    partition = publish(workspace)
    (partition.path / "forecast.parquet").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"forecast\.parquet was changed"):
        published.verify_partition(partition)
    (partition.path / "forecast.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"lacks forecast\.parquet"):
        published.read_partition(partition.path)
    manifest = partition.path / "manifest.json"
    manifest.write_text(json.dumps({**partition.manifest, "format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        published.read_partition(partition.path)
    for version in (0, True, "1", None):
        manifest.write_text(json.dumps({**partition.manifest, "format": version}))
        with pytest.raises(ArtifactError, match="is damaged: it states no valid format version"):
            published.read_partition(partition.path)
    manifest.write_text("{")
    with pytest.raises(ArtifactError, match="no readable manifest"):
        published.read_partition(partition.path)


def test_recover_removes_half_written_folders_of_this_batch_only(workspace: Workspace) -> None:
    path = publish(workspace).path
    mine, other = path.parent / f".{path.name}.abc.tmp", path.parent / ".as_of=2026-03-02T06-00-00Z.abc.tmp"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "forecast.parquet").write_bytes(b"half")
    assert published.recover(path) == 1
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("exchanged", [False, True])
def test_recover_brings_back_a_folder_set_aside(workspace: Workspace, exchanged: bool) -> None:
    """A kill between the two renames of an exchange, before or after the new folder got its name."""
    path = publish(workspace).path
    aside = path.with_name(f".{path.name}.4242.old")
    path.rename(aside)
    if exchanged:
        publish(workspace, events={"e": 1})
    published.recover(path)
    assert not aside.exists()
    found = published.read_partition(path)
    assert found is not None
    assert found.manifest["files"]["events.parquet"]["rows"] == int(exchanged)


def test_a_folder_set_aside_is_still_seen_and_gets_its_name_back(workspace: Workspace) -> None:
    """The batch of another as_of must not have to run again before what it had published counts."""
    publish(workspace, AS_OF, {"one": 1})
    path = publish(workspace, AS_OF + timedelta(days=1), {"two": 2}).path
    path.rename(path.with_name(f".{path.name}.4242.old"))
    assert published.jobs(workspace) == ["demo"]
    assert [partition.as_of.day for partition in published.partitions(workspace, "demo")] == [1, 2]
    newest = published.latest(workspace, "demo")
    assert newest is not None
    assert newest.as_of.day == 2
    before = published.newest_before(workspace, "demo", AS_OF + timedelta(days=2), "job")
    assert before == newest
    found = published.events(workspace, "demo")
    assert found is not None
    assert set(found["event_id"]) == {"one", "two"}
    assert published.recover_others(workspace, "demo", lambda as_of: False) == []
    assert not path.exists(), "a living process may be exchanging it"
    assert published.recover_others(workspace, "demo", lambda as_of: as_of.day == 2) == [path.name]
    assert sorted(item.name for item in path.parent.iterdir()) == ["as_of=2026-03-01T06-00-00Z", path.name]


def test_listing(workspace: Workspace) -> None:
    assert published.jobs(workspace) == []
    assert published.latest(workspace, "demo") is None
    assert published.events(workspace, "demo") is None
    for day in (2, 0, 1):
        publish(workspace, AS_OF + timedelta(days=day))
    (workspace.published / "demo" / ".as_of=2026-03-09T06-00-00Z.x.tmp").mkdir()
    assert published.jobs(workspace) == ["demo"]
    days = [partition.as_of.day for partition in published.partitions(workspace, "demo")]
    assert days == [1, 2, 3]
    assert len(published.partitions(workspace, "demo", until=AS_OF + timedelta(days=1))) == 2
    newest = published.latest(workspace, "demo")
    assert newest is not None
    assert newest.as_of.day == 3


def test_events_of_overlapping_batches_count_once_in_their_latest_version(workspace: Workspace) -> None:
    publish(workspace, AS_OF, {"one": 1, "two": 2})
    publish(workspace, AS_OF + timedelta(days=1), {"two": 9, "three": 3})
    publish(workspace, AS_OF + timedelta(days=2))
    table = published.events(workspace, "demo")
    assert table is not None
    found = {row["event_id"]: row for row in table.to_dicts()}
    assert len(table) == 3
    assert found["two"]["end"] == AS_OF + timedelta(hours=9)
    assert (found["two"]["first_as_of"], found["two"]["last_as_of"]) == (AS_OF, AS_OF + timedelta(days=1))
    assert found["one"]["last_as_of"] == AS_OF
    until = published.events(workspace, "demo", until=AS_OF)
    assert until is not None
    assert set(until["event_id"]) == {"one", "two"}


def test_events_that_cannot_be_read_are_named(workspace: Workspace) -> None:
    publish(workspace, AS_OF, {"e": 1})
    damaged = publish(workspace, AS_OF + timedelta(days=1), {"e": 2}).path / "events.parquet"
    content = damaged.read_bytes()
    for wrong in (b"PAR1xx", content[:-1], content[:40] + b"?" + content[41:]):
        damaged.write_bytes(wrong)
        with pytest.raises(ArtifactError, match=r"as_of=2026-03-02T06-00-00Z/events\.parquet was changed"):
            published.events(workspace, "demo")
    earlier = published.events(workspace, "demo", until=AS_OF)
    assert earlier is not None
    assert earlier["event_id"].to_list() == ["e"]


def test_a_file_beside_the_manifest_and_a_folder_in_place_of_a_file_are_told(workspace: Workspace) -> None:
    partition = publish(workspace)
    manifest = dict(partition.manifest) | {"files": {}}
    (partition.path / "manifest.json").write_text(json.dumps(manifest))
    (partition.path / "events.parquet").write_bytes(b"PAR1xx")
    with pytest.raises(ArtifactError, match=r"events\.parquet cannot be read"):
        published.events(workspace, "demo")
    (partition.path / "forecast.parquet").unlink()
    (partition.path / "forecast.parquet").mkdir()
    with pytest.raises(ArtifactError, match=r"forecast\.parquet cannot be read \(Is a directory\)"):
        published.verify_partition(partition, ["forecast.parquet"])
