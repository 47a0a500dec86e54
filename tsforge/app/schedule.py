"""Use-cases of the scheduler: keep it running, run what is due once, show where every job stands."""

from __future__ import annotations

from typing import Any

from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.scheduling.jobs import BUSY_EXIT_CODE, INTERRUPTED_EXIT_CODE, JobConfig, ScheduleConfig
from tsforge.scheduling.runner import JobStatus, Scheduler, SlotResult, stopping_on_signals

__all__ = ["JobConfig", "JobStatus", "ScheduleConfig", "SlotResult", "job_status", "run_due", "run_scheduler", "status"]

LOGGER = get_logger(__name__)


def run_scheduler(config: ScheduleConfig, workspace: Workspace, *, once: bool = False) -> int:
    """Run the jobs until SIGTERM or Ctrl-C and return the exit status; must be called from the main thread.

    Args:
        config: the jobs.
        workspace: ledger, logs, and the addresses handed to the children.
        once: run what is due, then return: for cron, Kubernetes or another scheduler as the clock. The exit status is
            then 1 when a slot failed, 130 when it was stopped before it was through, 75 when a slot was busy, else 0.

    Raises:
        BackendError: the ledger cannot be opened.
    """
    scheduler = Scheduler(config, workspace)
    try:
        with stopping_on_signals(scheduler.stop):
            if once:
                statuses = {result.status for result in scheduler.run_due()}
                if "failed" in statuses:
                    return 1
                if scheduler.stop.is_set():
                    return INTERRUPTED_EXIT_CODE
                return BUSY_EXIT_CODE if statuses & {"interrupted", "busy"} else 0
            scheduler.run()
    finally:
        scheduler.ledger.close()
    return 0


def run_due(config: ScheduleConfig, workspace: Workspace) -> list[SlotResult]:
    """Run what is due of every job and return what became of each slot."""
    scheduler = Scheduler(config, workspace)
    try:
        return scheduler.run_due()
    finally:
        scheduler.ledger.close()


def job_status(config: ScheduleConfig, workspace: Workspace) -> list[JobStatus]:
    """Return every job's next slots, due slots and latest runs; writes nothing."""
    scheduler = Scheduler(config, workspace)
    try:
        return scheduler.status()
    finally:
        scheduler.ledger.close()


def status(config: ScheduleConfig, workspace: Workspace) -> list[dict[str, Any]]:
    """Return ``job_status`` as one record a job, for tables and JSON."""
    records = []
    for job in job_status(config, workspace):
        last = job.last[0] if job.last else None
        records.append(
            {
                "job": job.name,
                "cron": job.cron,
                "timezone": job.timezone,
                "next": job.upcoming[0].isoformat() if job.upcoming else None,
                "due": len(job.due),
                "running": job.running.isoformat() if job.running else None,
                "last_slot": last.slot.isoformat() if last else None,
                "last_status": last.status if last else None,
                "last_seconds": last.seconds if last else None,
                "last_message": last.message.splitlines()[0] if last and last.message else "",
            }
        )
    return records
