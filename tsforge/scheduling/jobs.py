"""Scheduled jobs as configuration, and the plan: which slots to run now and which to skip, by the ledger."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, field_validator, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, listing
from tsforge.core.zones import ZoneName
from tsforge.scheduling.cron import Cron
from tsforge.scheduling.ledger import SETTLED, LedgerRun

_MODULES = {"batch": "pipelines.batch_forecast", "retrain": "pipelines.retrain", "ingest": "pipelines.ingest"}
BUSY_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: somebody else works on it, ask again later
INTERRUPTED_EXIT_CODE = 130  # the shell's status of a process ended by Ctrl-C
# a hundred years: longer than anybody means, and clocks can still be moved by it
Seconds = Annotated[float, Field(gt=0, le=100 * 366 * 86400)]


class JobConfig(Config):
    """One scheduled job.

    Attributes:
        name: lower-case letters, digits, ``-`` and ``_``; the key in the ledger, so renaming starts a new history.
        cron: minute hour day month weekday, or ``@hourly`` and the like; a slot is each instant it names.
        timezone: zone of ``cron``; None takes the schedule's.
        run: what the child process does: a batch, a retraining or an ingestion.
        config: its config: a name below the config tree or a path.
        overrides: dotted settings on top, as on the command line.
        timeout_seconds: the child is ended after so long and the slot fails.
        catch_up: slots missed while no scheduler ran: run ``all`` in order, the ``latest`` only, or ``none``. With
            ``latest`` the newest due slot is the only one that counts: an older one that failed with retries left, or
            was interrupted, is given up for it.
        max_delay_seconds: a slot missed by more is never run, nor run again.
        grace_seconds: with ``catch_up: none``, how late a slot still counts as on time when it is first looked at; its
            later attempts are never late.
        retries: a failed slot is run again at most so often, each time at the next look; attempts that were interrupted
            or found the work busy do not count.
        start: slots count from here on, one at it included; None = from the first time a scheduler sees the job. Slots
            that are settled stay so: an earlier ``start`` for a job seen before takes another ``name``.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$")
    cron: str
    timezone: ZoneName | None = None
    run: Literal["batch", "retrain", "ingest"]
    config: str = Field(min_length=1)
    overrides: tuple[str, ...] = ()
    timeout_seconds: Seconds = 3600.0
    catch_up: Literal["all", "latest", "none"] = "latest"
    max_delay_seconds: Seconds = 7 * 86400.0
    grace_seconds: Seconds = 60.0
    retries: int = Field(0, ge=0, le=100)
    start: AwareDatetime | None = Field(None, ge=datetime(1970, 1, 1, tzinfo=UTC), le=datetime(2200, 1, 1, tzinfo=UTC))

    @field_validator("cron")
    @classmethod
    def _cron_parses(cls, value: str) -> str:
        try:
            Cron(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def key(self) -> str:
        """The job's name in the ledger."""
        return f"schedule/{self.name}"

    def command(self, slot: datetime) -> list[str]:
        """Return the command line of the child process for a slot."""
        as_of = slot.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        what = ["--config", self.config] if self.run == "ingest" else [self.config, "--as-of", as_of]
        # -P: a folder ``pipelines`` in the current directory must not be taken for ours
        return [sys.executable, "-P", "-m", _MODULES[self.run], *what, *self.overrides]


class ScheduleConfig(Config):
    """All jobs of one scheduler.

    Attributes:
        timezone: zone of every cron that names none.
        jobs: at least one, names unique.
        poll_seconds: how often the ledger is looked at between cron times (retries, runs left by a dead scheduler).
        stop_seconds: on shutdown or timeout, how long a child may take to end before it is killed.
        stale_seconds: a run on another machine without a sign of life for so long is taken over.
    """

    timezone: ZoneName = "UTC"
    jobs: tuple[JobConfig, ...]
    poll_seconds: Seconds = 30.0
    stop_seconds: Seconds = 30.0
    stale_seconds: Seconds = 90.0

    @model_validator(mode="after")
    def _jobs_are_named_once(self) -> ScheduleConfig:
        names = [job.name for job in self.jobs]
        if not names:
            raise ValueError("jobs: the list is empty; a schedule needs at least one job")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"jobs: {listing(twice)} named more than once; a name is the key in the ledger")
        return self

    def cron_of(self, job: JobConfig) -> Cron:
        """Return the job's cron in its zone."""
        return Cron(job.cron, job.timezone or self.timezone)


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A span of slots that will not run: the ``slots`` to record, and why."""

    slots: Sequence[datetime]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do about a job now.

    Attributes:
        run: slots to run, in this order, one after the other.
        skips: spans to record as skipped.
        settled_until: every slot up to here is settled once ``skips`` are recorded; None = no change.
    """

    run: tuple[datetime, ...] = ()
    skips: tuple[Skip, ...] = ()
    settled_until: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the ledger says about a job: rows by slot, and the slots whose holder is gone."""

    runs: Mapping[datetime, LedgerRun] = field(default_factory=dict)
    abandoned: frozenset[datetime] = frozenset()

    def is_settled(self, slot: datetime, retries: int) -> bool:
        """Return whether nothing is left to do for the slot."""
        run = self.runs.get(slot)
        return run is not None and (run.status in SETTLED or (run.status == "failed" and run.failures > retries))

    def is_running(self, slot: datetime) -> bool:
        """Return whether a living process works on the slot."""
        run = self.runs.get(slot)
        return run is not None and run.status == "claimed" and slot not in self.abandoned


def make_plan(job: JobConfig, cron: Cron, frontier: datetime, now: datetime, seen: Seen) -> Plan:
    """Return what to do about a job now; reads no clock and no database.

    Args:
        job, cron: the job and its slots.
        frontier: every slot up to here is settled.
        now: the present.
        seen: rows of the ledger after the frontier.
    """
    oldest = now - timedelta(seconds=job.max_delay_seconds)
    skips: list[Skip] = []
    first = cron.next_after(frontier) if frontier < oldest else None
    if first is not None and first <= oldest:
        stuck = [slot for slot in seen.runs if first < slot <= oldest and not seen.is_settled(slot, job.retries)]
        reason = f"missed by more than max_delay_seconds={job.max_delay_seconds:g}, like every slot up to {oldest}"
        skips.append(Skip(slots=(first, *stuck), reason=reason))
    open_slots: list[datetime] = []
    settled_until = oldest if skips else None
    for slot in cron.between(max(frontier, oldest), now):
        if not seen.is_settled(slot, job.retries):
            open_slots.append(slot)
        elif not open_slots:
            settled_until = slot
    late = _late(job, open_slots, now, seen)
    if late:
        reason = f"missed with {len(late) - 1} more until {late[-1]}; catch_up is '{job.catch_up}'"
        known = [slot for slot in late[1:] if slot in seen.runs]
        skips.append(Skip(slots=(late[0], *known), reason=reason))
        if late == open_slots[: len(late)]:
            settled_until = late[-1]
    run = [slot for slot in open_slots if slot not in late and not seen.is_running(slot)]
    return Plan(run=tuple(run), skips=tuple(skips), settled_until=settled_until)


def _late(job: JobConfig, open_slots: Sequence[datetime], now: datetime, seen: Seen) -> list[datetime]:
    """Return the open slots that the catch-up policy gives up; a slot being worked on is never among them.

    ``none`` gives up what nobody has tried: a slot that came on time and failed with retries left, or was cut short, is
    not late, however long after its time the next look is. ``latest`` gives up those too once a newer slot is due.
    """
    if job.catch_up == "all":
        return []
    if job.catch_up == "latest":
        late = open_slots[:-1]
    else:
        grace = timedelta(seconds=job.grace_seconds)
        late = [slot for slot in open_slots if slot not in seen.runs and now - slot > grace]
    return [slot for slot in late if not seen.is_running(slot)]
