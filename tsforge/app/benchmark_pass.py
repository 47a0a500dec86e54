"""One pass of a benchmark over its jobs: what is cached is read, what is not is measured and kept, alone or by workers.

A measurement is a file, written whole or not at all: an interrupted pass goes on where it stopped. A job that fails
becomes a row with its error and does not stop the others.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.benchmark_peers import PeerHost
from tsforge.app.benchmark_progress import Progress
from tsforge.app.worker_pool import Job, JobQueue, WorkerPool, attempt
from tsforge.core.atomic import atomic_file
from tsforge.core.logs import get_logger

_LOG = get_logger(__name__)


class PassResult:
    """What the results of all benchmarks say of their jobs; ``table`` has a ``status`` and ``cached`` a row."""

    table: pl.DataFrame
    notes: tuple[str, ...]
    path: Path

    @property
    def failed(self) -> int:
        """Number of jobs that failed."""
        return self.table.filter(status="failed").height

    def facts(self, *, places: bool = True) -> dict[str, Any]:
        """Return how the jobs ended and, with ``places``, where the report lies: its own files go with the folder."""
        found = {"path": str(self.path), "report": str(self.path / "report.html")}
        return {
            "failed": self.failed,
            "skipped": self.table.filter(status="skipped").height,
            "from_cache": int(self.table["cached"].sum()),
            "notes": list(self.notes),
            **(found if places else {}),
        }


class Pass(ABC):
    """Runs jobs; a benchmark says what they are, where their files lie and what is kept of them.

    Args:
        workers: 1 = in this process.
        threads: of a worker process.
        peers: where other libraries are.
        minutes: no job is begun after this time.
        refresh: measure again what is cached.
        key: a field that every cached row of this benchmark has.
    """

    def __init__(
        self,
        *,
        workers: int,
        threads: int,
        peers: PeerHost | None,
        minutes: float | None,
        refresh: bool,
        key: str,
    ) -> None:
        self._workers, self._threads, self._peers = workers, threads, peers
        self._refresh, self._key = refresh, key
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes

    @abstractmethod
    def first_jobs(self) -> Iterable[Job]:
        """Return the jobs to begin with."""

    @abstractmethod
    def place(self, job: Job) -> Path:
        """Return the file of a job's measurement."""

    @abstractmethod
    def keep(self, job: Job, row: dict[str, Any], progress: Progress) -> None:
        """Take a measured, cached, failed or skipped row into the result."""

    @abstractmethod
    def describe(self, job: Job) -> str:
        """Return what a job is about, for a message."""

    def follow(self, job: Job, row: dict[str, Any], progress: Progress) -> Iterable[Job]:
        """Return the jobs that a finished one makes necessary."""
        return ()

    def measure(self, progress: Progress) -> None:
        """Run what is not cached; a full pass over the queue, and the jobs that it turns out to need."""
        queue = JobQueue()
        for first in self.first_jobs():
            self._admit(first, queue, progress)
        if self._workers == 1:
            while (job := self._next(queue, progress)) is not None:
                outcome = attempt(job.data, job.setting, self._peers, progress=progress.shows_training)
                self._finish(job, outcome, queue, progress)
            return
        with WorkerPool(self._workers, threads=self._threads, peers=self._peers) as pool:
            self._skip_late(queue, progress)
            for job, outcome in pool.results(queue):
                self._finish(job, outcome, queue, progress)
                self._skip_late(queue, progress)

    def _next(self, queue: JobQueue, progress: Progress) -> Job | None:
        self._skip_late(queue, progress)
        return queue.pop()

    def _skip_late(self, queue: JobQueue, progress: Progress) -> None:
        if self._deadline is None or time.monotonic() <= self._deadline:
            return
        for job in queue.drain():
            self.keep(job, {"status": "skipped", "error": "the time budget is spent", "cached": False}, progress)

    def _admit(self, job: Job, queue: JobQueue, progress: Progress) -> None:
        """Take a job's row from the cache, else put it into the queue."""
        known = None if self._refresh else cached_row(self.place(job), self._key)
        if known is None:
            queue.push(job if self._workers > 1 else replace(job, cost=0.0))
            return
        self._end(job, {**known, "cached": True}, queue, progress)

    def _finish(self, job: Job, outcome: dict[str, Any], queue: JobQueue, progress: Progress) -> None:
        if outcome["status"] == "ok":
            outcome |= {"setting": job.setting.plain(), "made": datetime.now(UTC).isoformat()}
            with atomic_file(self.place(job)) as temporary:
                temporary.write_text(json.dumps(outcome, indent=1))
        else:
            _LOG.warning("%s failed: %s", self.describe(job), outcome["error"])
        self._end(job, {**outcome, "cached": False}, queue, progress)

    def _end(self, job: Job, row: dict[str, Any], queue: JobQueue, progress: Progress) -> None:
        self.keep(job, row, progress)
        for more in self.follow(job, row, progress):
            self._admit(more, queue, progress)


def cached_row(place: Path, key: str) -> dict[str, Any] | None:
    """Return a stored row, or None where there is none that can be read and has the field."""
    try:
        row = json.loads(place.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _LOG.warning("cached setting %s cannot be read (%s) and is measured again", place, error)
        return None
    return row if isinstance(row, dict) and key in row else None
