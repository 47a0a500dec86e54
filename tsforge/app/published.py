"""Published batches: one folder per job and as_of, whole or absent, described by its manifest.

``published/JOB/as_of=2026-03-01T06-00-00Z/`` holds ``forecast.parquet``, ``scores.parquet``, ``events.parquet`` (those
the batch was asked for) and ``manifest.json``. The folder gets its name by one rename once everything in it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.core.atomic import atomic_directory
from tsforge.core.errors import ArtifactError
from tsforge.core.formats import check_version
from tsforge.core.workspace import Workspace

FORMAT = 1
_FORM = "as_of=%Y-%m-%dT%H-%M-%SZ"
_AGAIN = "publish it again (batch run --force --as-of its time), or remove that folder to go on without it"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One published batch.

    Attributes:
        job, as_of: its key.
        path: its folder.
        manifest: what it holds and where it comes from.
    """

    job: str
    as_of: datetime
    path: Path
    manifest: Mapping[str, Any]

    def table(self, name: str) -> pl.DataFrame | None:
        """Return ``forecast``, ``scores`` or ``events``, or None when the batch made none."""
        path = self.path / f"{name}.parquet"
        return pl.read_parquet(path) if path.exists() else None


def partition_path(workspace: Workspace, job: str, as_of: datetime) -> Path:
    """Return the folder of a batch, whether it exists or not."""
    return workspace.published / job / as_of.astimezone(UTC).strftime(_FORM)


def read_partition(path: Path) -> Partition | None:
    """Return the batch in a folder, or None when there is none.

    Raises:
        ArtifactError: the manifest is unreadable or of a newer format, or a file it names is missing.
    """
    if not path.is_dir():
        return None
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        as_of = datetime.fromisoformat(manifest["as_of"])
        missing = [name for name in manifest["files"] if not (path / name).is_file()]
        job, version = manifest["job"], manifest.get("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the batch in {path} has no readable manifest ({error}); {_AGAIN}") from error
    check_version(version, FORMAT, what=f"the batch in {path}", remedy=_AGAIN)
    if missing:
        raise ArtifactError(f"the batch in {path} lacks {', '.join(missing)}; {_AGAIN}")
    return Partition(job=job, as_of=as_of, path=path, manifest=manifest)


def verify_partition(partition: Partition, only: Sequence[str] | None = None) -> None:
    """Check every file of a batch (or only some) against the hash in its manifest.

    Raises:
        ArtifactError: a file was changed, or cannot be read.
    """
    for name, facts in partition.manifest["files"].items():
        if only is not None and name not in only:
            continue
        path = partition.path / name
        try:
            found = _sha256(path)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
        if found != facts["sha256"]:
            raise ArtifactError(f"{path} was changed after it was published; {_AGAIN}")


def write_partition(
    path: Path, tables: Mapping[str, pl.DataFrame], manifest: Mapping[str, Any], *, replace: bool = False
) -> Partition:
    """Publish tables and manifest as one folder and return it.

    Args:
        path: the folder (``partition_path``).
        tables: name -> table.
        manifest: ``job``, ``as_of`` and whatever else is worth knowing; format and hashes are added here.
        replace: exchange a published folder.

    Raises:
        BackendError: the folder exists, or cannot be written; nothing is changed then.
    """
    with atomic_directory(path, replace=replace) as folder:
        files: dict[str, Any] = {}
        for name, table in tables.items():
            target = folder / f"{name}.parquet"
            table.write_parquet(target)
            files[target.name] = {"rows": table.height, "bytes": target.stat().st_size, "sha256": _sha256(target)}
        full = {"format": FORMAT, **manifest, "files": files}
        (folder / "manifest.json").write_text(json.dumps(full, indent=2, default=str) + "\n", encoding="utf-8")
    return Partition(
        job=str(manifest["job"]), as_of=datetime.fromisoformat(str(manifest["as_of"])), path=path, manifest=full
    )


def recover(path: Path) -> int:
    """Tidy up after killed runs of this batch; return how many half-written folders went.

    A run killed while it exchanged a published folder leaves the old one aside: it gets its name back. The caller
    holds the claim on the batch, so no living process works in these folders.
    """
    for aside in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _give_back(aside, path)
    unfinished = list(path.parent.glob(f".{path.name}.*.tmp"))
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    return len(unfinished)


def recover_others(workspace: Workspace, job: str, is_free: Callable[[datetime], bool]) -> list[str]:
    """Give batches of a job that killed runs had set aside their names back; return those names.

    Args:
        workspace, job: whose batches.
        is_free: whether no living process works on the batch of an as_of, so that its folders may be touched.
    """
    back = []
    for name, path in batch_folders(workspace, job).items():
        if path.name != name and is_free(datetime.strptime(name, _FORM).replace(tzinfo=UTC)):
            _give_back(path, path.with_name(name))
            back.append(name)
    return back


def _give_back(aside: Path, path: Path) -> None:
    with suppress(FileNotFoundError):  # another process did it first
        aside.rename(path)


def batch_folders(workspace: Workspace, job: str) -> dict[str, Path]:
    """Return the folder of every batch of a job under its name, oldest first.

    Where a run was killed while it exchanged a published folder, that is the old one, still aside.
    """
    folder = workspace.published / job
    found = {path.name.split(".")[1]: path for path in sorted(folder.glob(".as_of=*.old"))}
    return dict(sorted((found | {path.name: path for path in folder.glob("as_of=*")}).items()))


def jobs(workspace: Workspace) -> list[str]:
    """Return the names of all jobs that published something."""
    if not workspace.published.is_dir():
        return []
    return sorted(folder.name for folder in workspace.published.iterdir() if batch_folders(workspace, folder.name))


def partitions(workspace: Workspace, job: str, *, until: datetime | None = None) -> list[Partition]:
    """Return the published batches of a job, oldest first, up to and including ``until`` (None = all).

    Raises:
        ArtifactError: see ``read_partition``.
    """
    last = None if until is None else until.astimezone(UTC).strftime(_FORM)
    paths = [path for name, path in batch_folders(workspace, job).items() if last is None or name <= last]
    return [found for found in map(read_partition, paths) if found is not None]


def latest(workspace: Workspace, job: str) -> Partition | None:
    """Return the newest published batch of a job, or None."""
    paths = list(batch_folders(workspace, job).values())
    return read_partition(paths[-1]) if paths else None


def newest_before(workspace: Workspace, job: str, moment: datetime, fact: str) -> Partition | None:
    """Return the newest batch of a job before ``moment`` whose manifest states ``fact``, or None.

    Raises:
        ArtifactError: see ``read_partition``.
    """
    before = moment.astimezone(UTC).strftime(_FORM)
    for name, path in reversed(batch_folders(workspace, job).items()):
        partition = read_partition(path) if name < before else None
        if partition is not None and fact in partition.manifest:
            return partition
    return None


def events(workspace: Workspace, job: str, *, until: datetime | None = None) -> pl.DataFrame | None:
    """Return every published event of a job once, in its latest version, by start; None when there is none.

    Batches score overlapping spans, so a long event is published several times; ``event_id`` tells that it is the same.
    ``first_as_of`` and ``last_as_of`` say which batches saw it.

    Raises:
        ArtifactError: the events of a batch were changed after they were published, or see ``read_partition``.
    """
    found = []
    for partition in partitions(workspace, job, until=until):
        table = _events_of(partition)
        if table is not None and table.height:
            found.append(table.with_columns(as_of=pl.lit(partition.as_of)))
    if not found:
        return None
    history = pl.concat(found, how="diagonal_relaxed").sort("as_of", maintain_order=True)
    seen = history.group_by("event_id").agg(first_as_of=pl.col("as_of").min(), last_as_of=pl.col("as_of").max())
    newest = history.unique("event_id", keep="last", maintain_order=True).drop("as_of")
    return newest.join(seen, on="event_id", how="left", maintain_order="left").sort("start", "event_id")


def _events_of(partition: Partition) -> pl.DataFrame | None:
    verify_partition(partition, ["events.parquet"])
    try:
        return partition.table("events")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{partition.path / 'events.parquet'} cannot be read ({error}); {_AGAIN}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
