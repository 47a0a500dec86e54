"""Worker processes of a benchmark or backtest: a job that kills its process is a failed one, and none is left over."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from tsforge.app.benchmark_peers import PeerHost
from tsforge.app.benchmark_run import Setting, run_setting
from tsforge.core.errors import TsforgeError
from tsforge.core.signals import termination_as_interrupt

FAILURES = (TsforgeError, ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_PATIENCE_SECONDS = 3.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class OwnSetting(Protocol):
    """A setting of another kind than a forecast: it measures itself."""

    def measure(self, data: Any, *, progress: bool) -> dict[str, Any]:
        """Return the measurements on the data of the job."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One setting on one data set; ``cost`` is a rough relative effort, a lower ``turn`` goes before any cost.

    ``data`` has a ``name`` and a ``fingerprint``, by which a worker knows it again; ``setting`` is a ``Setting`` or an
    ``OwnSetting``, and either says what it is by ``plain()``.
    """

    data: Any
    setting: Any
    cost: float
    turn: int = 0


@dataclass
class JobQueue:
    """Jobs not begun: by turn, within a turn the most expensive first."""

    _heap: list[tuple[int, float, int, Job]] = field(default_factory=list)
    _count: int = 0

    def push(self, job: Job) -> None:
        """Add a job; equal costs keep their order."""
        heapq.heappush(self._heap, (job.turn, -job.cost, self._count, job))
        self._count += 1

    def pop(self) -> Job | None:
        """Return the job whose turn it is, None when there is none."""
        return heapq.heappop(self._heap)[3] if self._heap else None

    def drain(self) -> list[Job]:
        """Return all jobs and forget them."""
        jobs = [item[3] for item in sorted(self._heap)]
        self._heap.clear()
        return jobs


def attempt(
    data: Any, setting: Setting | OwnSetting, peers: PeerHost | None, *, progress: bool = False
) -> dict[str, Any]:
    """Return the measurements of a setting, or its status ``failed`` with the reason."""
    try:
        if isinstance(setting, Setting):
            return {**run_setting(data, setting, peers=peers, progress=progress), "status": "ok"}
        return {**setting.measure(data, progress=progress), "status": "ok"}
    except FAILURES as error:
        reason = str(error) if isinstance(error, TsforgeError) else f"{type(error).__name__}: {error}"
        return {"status": "failed", "error": reason}


class WorkerPool:
    """Processes that measure settings side by side; leave the ``with`` block and every one of them is gone.

    Ctrl-C reaches the benchmark only: it ends the workers, and each worker ends the peer it waits for.
    """

    def __init__(self, workers: int, *, threads: int, peers: PeerHost | None) -> None:
        self._size, self._threads, self._peers = workers, threads, peers
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_PATIENCE_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def warm(self) -> None:
        """Start every process now, so that they load libraries while the caller is busy."""
        while len(self._workers) < self._size:
            self._start()

    def results(self, queue: JobQueue) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield every job of the queue with its outcome as it comes; the caller may push more meanwhile."""
        while True:
            self._hand_out(queue)
            busy = [worker for worker in self._workers if worker.job is not None]
            if not busy:
                return
            ready = wait([item for worker in busy for item in (worker.pipe, worker.process.sentinel)])
            for worker in busy:
                if worker.pipe in ready or worker.process.sentinel in ready:
                    yield self._collect(worker)

    def _hand_out(self, queue: JobQueue) -> None:
        idle = [worker for worker in self._workers if worker.job is None]
        while idle or len(self._workers) < self._size:
            job = queue.pop()
            if job is None:
                return
            worker = idle.pop() if idle else self._start()
            worker.give(job)

    def _collect(self, worker: _Worker) -> tuple[Job, dict[str, Any]]:
        """Return what a worker sent; one that died is replaced and its job failed."""
        job = worker.job
        if job is None:
            raise RuntimeError("a worker answered without a job")
        worker.job = None
        try:
            outcome: dict[str, Any] = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            self._workers.remove(worker)
            worker.pipe.close()
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            outcome = {
                "status": "failed",
                "error": f"its process died ({how}); SIGKILL usually means that memory ran out: use fewer workers",
            }
        return job, outcome

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(self._threads)))  # read by libraries as they load
        try:
            process = self._context.Process(target=_work, args=(theirs, self._threads, self._peers), daemon=False)
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()
        worker = _Worker(process=process, pipe=ours)
        self._workers.append(worker)
        return worker


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection[Any, Any]
    job: Job | None = None
    known: set[str] = field(default_factory=set)

    def give(self, job: Job) -> None:
        """Send a job, and its data where the worker has not seen them; a dead worker is noticed when collected."""
        self.job = job
        try:
            if job.data.fingerprint not in self.known:
                self.pipe.send(job.data)
                self.known.add(job.data.fingerprint)
            self.pipe.send((job.data.fingerprint, job.setting))
        except OSError:
            return


def _work(pipe: Connection[Any, Any], threads: int, peers: PeerHost | None) -> None:
    """Measure what arrives until the pipe closes."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's to handle
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    known: dict[str, Any] = {}
    try:
        with termination_as_interrupt():
            while True:
                message = pipe.recv()
                if not isinstance(message, tuple):
                    known[message.fingerprint] = message
                    continue
                fingerprint, setting = message
                pipe.send(attempt(known[fingerprint], setting, peers))
    except (EOFError, KeyboardInterrupt):
        return


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
