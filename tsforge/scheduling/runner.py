"""The scheduler: wakes up at cron times and at every poll, asks the ledger what is due, runs it in child processes.

APScheduler only wakes us (in-memory job store); the ledger is the truth. So any number of schedulers may run on one
database, a restart forgets nothing, and ``run_due`` does the same work once for an outside scheduler.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Literal

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from tsforge.core.atomic import atomic_file
from tsforge.core.errors import BackendError
from tsforge.core.logs import get_logger, log_event
from tsforge.core.owner import Owner
from tsforge.core.workspace import Workspace
from tsforge.scheduling.child import ChildLimits, ChildResult, run_child
from tsforge.scheduling.cron import Cron
from tsforge.scheduling.jobs import BUSY_EXIT_CODE, JobConfig, Plan, ScheduleConfig, Seen, make_plan
from tsforge.scheduling.ledger import Claim, Ledger, LedgerRun

LOGGER = get_logger(__name__)
_KEPT_LOGS = 200  # newest log files kept of a job
_LOG_NAME = re.compile(r"(?P<slot>[0-9TZ-]+)\.(?P<attempt>[0-9]+)\.log")


@dataclass(frozen=True, kw_only=True)
class SlotResult:
    """What became of one slot in this process.

    Attributes:
        status: ``done``, ``failed``, ``interrupted`` (stopped, or its work was busy; will be run again), ``busy``
            (another scheduler runs it) or ``skipped``.
    """

    job: str
    slot: datetime
    status: Literal["done", "failed", "interrupted", "busy", "skipped"]
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as ``tsforge schedule status`` shows it.

    Attributes:
        name, cron, timezone: from the config.
        upcoming: the next slots.
        due: slots waiting to be run now.
        running: the slot being worked on, or None.
        last: the latest runs, newest first.
    """

    name: str
    cron: str
    timezone: str
    upcoming: tuple[datetime, ...]
    due: tuple[datetime, ...]
    running: datetime | None
    last: tuple[LedgerRun, ...] = field(default=())


class _WakeUp(BaseTrigger):  # type: ignore[misc]
    """Fires at the next cron time or after the poll interval, whichever is sooner."""

    def __init__(self, cron: Cron, poll_seconds: float) -> None:
        self._cron = cron
        self._poll = timedelta(seconds=poll_seconds)

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """Return when to look at the ledger next; called by APScheduler."""
        if previous_fire_time is None:
            return now
        upcoming = self._cron.next_after(previous_fire_time)
        polled = previous_fire_time + self._poll
        return polled if upcoming is None else min(polled, upcoming)


class Scheduler:
    """Runs the jobs of a schedule; ``stop`` may be set from any thread or signal handler.

    Args:
        config: the jobs.
        workspace: where logs go; its addresses are handed to the children by environment.
        ledger: the ledger, by default the one of the workspace's database.
    """

    def __init__(self, config: ScheduleConfig, workspace: Workspace, ledger: Ledger | None = None) -> None:
        self.config = config
        self.workspace = workspace
        stale = timedelta(seconds=config.stale_seconds)
        self.ledger = ledger or Ledger(workspace.database_url, stale_after=stale)
        self.stop = threading.Event()
        self._crons = {job.name: config.cron_of(job) for job in config.jobs}
        self._locks = {job.name: threading.Lock() for job in config.jobs}
        self._starts_checked: set[str] = set()
        self._told: dict[str, tuple[datetime, int]] = {}  # job -> slot and attempt of another scheduler told last
        self._is_health_untold = False

    def run_due(self) -> list[SlotResult]:
        """Run everything that is due, job after job, and return what became of it."""
        return [result for job in self.config.jobs for result in self.tick(job)]

    def tick(self, job: JobConfig) -> list[SlotResult]:
        """Run what is due of one job until nothing is left; slots of a job never overlap.

        A slot is tried once in a tick; if it has to run again, the next tick does it, and later slots wait for it. A
        slot that another scheduler works on is reported as ``busy``.
        """
        results: list[SlotResult] = []
        if not self._locks[job.name].acquire(blocking=False):
            return results
        try:
            tried: set[datetime] = set()
            while not self.stop.is_set():
                plan = self._plan(job)
                results += self._record_skips(job, plan)
                result = None
                if plan.run and plan.run[0] not in tried:
                    tried.add(plan.run[0])
                    result = self._run_slot(job, plan.run[0])
                if result is None:
                    results += self._busy(job)
                    break
                results.append(result)
        finally:
            self._locks[job.name].release()
        return results

    def _busy(self, job: JobConfig) -> list[SlotResult]:
        results = []
        for run in self._running(job, self.ledger.now()):
            self._tell_taken(job, run)
            results.append(
                SlotResult(job=job.name, slot=run.slot, status="busy", message=f"{run.claimed_by} works on it")
            )
        return results

    def _tell_taken(self, job: JobConfig, run: LedgerRun) -> None:
        """Say once that another scheduler has a slot: else this one seems to do nothing."""
        if self._told.get(job.name) != (run.slot, run.attempt):
            self._told[job.name] = (run.slot, run.attempt)
            slot = run.slot.isoformat()
            log_event(LOGGER, "slot taken", job=job.name, slot=slot, by=run.claimed_by, status=run.status)

    def _running(self, job: JobConfig, now: datetime) -> list[LedgerRun]:
        """Return the slots of the job that a living process works on."""
        claimed = self.ledger.runs(job.key, statuses=["claimed"])
        return [run for run in claimed if not self.ledger.is_abandoned(run, now)]

    def _check_start(self, job: JobConfig, frontier: datetime) -> None:
        """Say, once, that slots from ``start`` on were settled before the job had that start."""
        if job.start is None or job.name in self._starts_checked:
            return
        self._starts_checked.add(job.name)
        first = self._crons[job.name].next_after(job.start - timedelta(microseconds=1))
        if first is None or first > frontier or self.ledger.runs(job.key, until=first, limit=1):
            return
        LOGGER.warning(
            "job %s is settled up to %s, so its start %s runs nothing before; give it another name to backfill",
            job.name,
            frontier.isoformat(),
            job.start.isoformat(),
        )

    def _plan(self, job: JobConfig, *, register: bool = True) -> Plan:
        now = self.ledger.now()
        frontier = self.ledger.frontier(job.key, job.start, register=register)
        if register:
            self._check_start(job, frontier)
        runs = {run.slot: run for run in self.ledger.runs(job.key, since=frontier, limit=None)}
        abandoned = frozenset(slot for slot, run in runs.items() if self.ledger.is_abandoned(run, now))
        return make_plan(job, self._crons[job.name], frontier, now, Seen(runs=runs, abandoned=abandoned))

    def _record_skips(self, job: JobConfig, plan: Plan) -> list[SlotResult]:
        results = []
        for skip in plan.skips:
            for slot in skip.slots:
                if self.ledger.skip(job.key, slot, skip.reason):
                    log_event(LOGGER, "slot skipped", job=job.name, slot=slot.isoformat(), reason=skip.reason)
                    results.append(SlotResult(job=job.name, slot=slot, status="skipped", message=skip.reason))
        if plan.settled_until is not None:
            self.ledger.advance(job.key, plan.settled_until)
        return results

    def _run_slot(self, job: JobConfig, slot: datetime) -> SlotResult | None:
        claim = self.ledger.claim(job.key, slot, exclusive=True)
        if claim is None:  # another scheduler was faster; where it still works on it, ``_busy`` tells
            for run in self.ledger.runs(job.key, statuses=["done"], since=slot, until=slot):
                self._tell_taken(job, run)
            return None
        log_event(LOGGER, "slot started", job=job.name, slot=slot.isoformat(), attempt=claim.attempt)
        folder = self.workspace.root / "logs" / job.name
        log = folder / f"{slot:%Y-%m-%dT%H-%M-%SZ}.{claim.attempt}.log"
        limits = ChildLimits(timeout_seconds=job.timeout_seconds, stop_seconds=self.config.stop_seconds)
        with self.ledger.keep_alive(claim):
            try:
                child = run_child(job.command(slot), log, limits, stop=self.stop, environment=self._environment())
            except BackendError as error:
                self.ledger.fail(claim, str(error))
                result = SlotResult(job=job.name, slot=slot, status="failed", message=str(error))
                _tell_end(result)
                return result
        _prune(folder)
        result = self._close(job, claim, child)
        _tell_end(result, exit_code=child.exit_code, seconds=round(child.seconds, 3))
        return result

    def _environment(self) -> Mapping[str, str]:
        return {
            "TSFORGE_HOME": str(self.workspace.root),
            "TSFORGE_DATABASE_URL": self.workspace.database_url,
            "MLFLOW_TRACKING_URI": self.workspace.tracking_uri,
        }

    def _close(self, job: JobConfig, claim: Claim, child: ChildResult) -> SlotResult:
        """Record how the child ended; one that ended well counts as done even when we were stopping."""
        status: Literal["done", "failed", "interrupted"] = "done"
        if child.exit_code == 0:
            message = child.tail
            self.ledger.finish(claim, output=str(child.log), message=message, details={"seconds": child.seconds})
        elif child.reason == "stopped":
            status, message = "interrupted", f"the scheduler was stopped\n{child.tail}"
            self.ledger.release(claim, message)
        elif child.reason == "exited" and child.exit_code == BUSY_EXIT_CODE:
            status, message = "interrupted", f"another process works on it, asked again later\n{child.tail}"
            self.ledger.release(claim, message)
        else:
            status = "failed"
            how = f"ended by signal {-child.exit_code}" if child.exit_code < 0 else f"exit code {child.exit_code}"
            cause = f"timed out after {job.timeout_seconds:g} s" if child.reason == "timeout" else how
            message = f"{cause}; output in {child.log}\n{child.tail}"
            self.ledger.fail(claim, message)
        return SlotResult(job=job.name, slot=claim.slot, status=status, message=message)

    def _safe_tick(self, job: JobConfig) -> None:
        """Run a tick; a database that is away is reported and asked again at the next wake-up."""
        try:
            self.tick(job)
        except BackendError as error:
            LOGGER.error("job %s could not be looked at, trying again: %s", job.name, error)

    def _tell_health(self, path: Path) -> None:
        """Refresh the health file; where that cannot be done it is said once, and the jobs go on."""
        try:
            _write_health(path, self.config)
        except (BackendError, OSError) as error:
            if not self._is_health_untold:
                LOGGER.warning("health checks of this scheduler fail, the jobs go on: %s", error)
            self._is_health_untold = True
        else:
            self._is_health_untold = False

    def run(self) -> None:
        """Run until ``stop`` is set: a thread a job, woken by APScheduler."""
        scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(len(self.config.jobs))},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        for job in self.config.jobs:
            self.ledger.frontier(job.key, job.start)
            trigger = _WakeUp(self._crons[job.name], self.config.poll_seconds)
            scheduler.add_job(self._safe_tick, trigger, args=[job], id=job.name)
        health = health_file(self.workspace)
        scheduler.start()
        log_event(LOGGER, "scheduler started", jobs=len(self.config.jobs), pid=os.getpid())
        try:
            while not self.stop.is_set():
                self._tell_health(health)
                self.stop.wait(min(self.config.poll_seconds, 10.0))
        finally:
            self.stop.set()
            scheduler.shutdown(wait=True)  # children have been told to end by now
            _remove_health(health)
            log_event(LOGGER, "scheduler stopped", pid=os.getpid())

    def status(self, *, upcoming: int = 3, last: int = 5) -> list[JobStatus]:
        """Return every job's next slots, due slots and latest runs; writes nothing."""
        found = []
        for job in self.config.jobs:
            now = self.ledger.now()
            cron, moments = self._crons[job.name], []
            moment = max(now, self.ledger.frontier(job.key, job.start, register=False))  # a start may lie ahead
            for _ in range(upcoming):
                following = cron.next_after(moment)
                if following is None:
                    break
                moments.append(following)
                moment = following
            runs = self.ledger.runs(job.key, limit=last)
            running = [run.slot for run in self._running(job, now)]
            found.append(
                JobStatus(
                    name=job.name,
                    cron=job.cron,
                    timezone=job.timezone or self.config.timezone,
                    upcoming=tuple(moments),
                    due=self._plan(job, register=False).run,
                    running=running[0] if running else None,
                    last=tuple(runs),
                )
            )
        return found


@contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` on SIGTERM and Ctrl-C while the block runs; a second Ctrl-C interrupts at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def health_file(workspace: Workspace) -> Path:
    """Return the file a running scheduler on this host refreshes, for health checks from outside."""
    return workspace.root / "run" / f"scheduler-{socket.gethostname()}.json"


def is_healthy(workspace: Workspace, now: datetime | None = None) -> bool:
    """Return whether a scheduler on this host gave a sign of life within the time it promised."""
    try:
        record = json.loads(health_file(workspace).read_text(encoding="utf-8"))
        return (now or datetime.now(UTC)) <= datetime.fromisoformat(record["good_until"])
    except (OSError, ValueError, KeyError):
        return False


def _write_health(path: Path, config: ScheduleConfig) -> None:
    now = datetime.now(UTC)
    good_until = now + timedelta(seconds=3 * min(config.poll_seconds, 10.0) + 10.0)
    record = {"time": now.isoformat(), "good_until": good_until.isoformat(), "pid": os.getpid()}
    record["owner"] = str(Owner.current())
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def _remove_health(path: Path) -> None:
    """Remove the health file unless another scheduler of this host renewed it last: its sign of life stays."""
    try:
        if json.loads(path.read_text(encoding="utf-8"))["owner"] == str(Owner.current()):
            path.unlink(missing_ok=True)
    except (OSError, ValueError, KeyError, TypeError):  # gone or unreadable: nothing of ours is left to remove
        return


def _tell_end(result: SlotResult, **facts: object) -> None:
    """Log what became of a slot; of one that did not end well also why, in one line."""
    why = {} if result.status == "done" else {"reason": result.message.partition("\n")[0]}
    log_event(LOGGER, f"slot {result.status}", job=result.job, slot=result.slot.isoformat(), **facts, **why)


def _prune(folder: Path) -> None:
    """Remove the oldest logs of a job, by slot and then attempt; other files in the folder stay."""
    found = ((_LOG_NAME.fullmatch(path.name), path) for path in folder.glob("*.log"))
    logs = sorted((name["slot"], int(name["attempt"]), path) for name, path in found if name is not None)
    for *_, old in logs[:-_KEPT_LOGS]:
        old.unlink(missing_ok=True)
