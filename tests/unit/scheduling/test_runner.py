"""The scheduler with real child processes; time is set by hand only where waiting would take hours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tsforge.app.schedule import run_scheduler
from tsforge.core.owner import Owner
from tsforge.core.workspace import Workspace
from tsforge.scheduling.child import ChildLimits, run_child
from tsforge.scheduling.jobs import JobConfig, ScheduleConfig
from tsforge.scheduling.ledger import Ledger
from tsforge.scheduling.runner import Scheduler, health_file, is_healthy

START = datetime(2026, 3, 1, 5, 30, tzinfo=UTC)


class ScriptJob(JobConfig):
    """A job whose child runs a Python script instead of a pipeline; argv[1] is the slot."""

    script: str

    def command(self, slot: datetime) -> list[str]:
        return [sys.executable, "-c", self.script, slot.isoformat()]


class Clock:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(workspace: Workspace, clock: Clock) -> Iterator[Callable[..., Scheduler]]:
    """Build a scheduler of one hourly script job on the clock set by hand."""
    opened: list[Ledger] = []

    def build(script: str, **settings: object) -> Scheduler:
        job = ScriptJob.model_validate(
            {"name": "demo", "cron": "0 * * * *", "run": "batch", "config": "x", "script": script} | settings
        )
        ledger = Ledger(workspace.database_url, clock=clock)
        opened.append(ledger)
        scheduler = Scheduler(ScheduleConfig(jobs=(job,), stop_seconds=5), workspace, ledger)
        scheduler.run_due()  # registers the job: slots count from here on
        return scheduler

    yield build
    for ledger in opened:
        ledger.close()


def statuses(scheduler: Scheduler) -> list[tuple[int, str]]:
    runs = scheduler.ledger.runs("schedule/demo", limit=None)
    return [(run.slot.hour, run.status) for run in reversed(runs)]


APPEND = "import os, sys; open(os.environ['TSFORGE_HOME'] + '/slots', 'a').write(sys.argv[1] + '\\n')"


def test_due_slots_run_once_each_after_downtime(make: Callable[..., Scheduler], clock: Clock) -> None:
    scheduler = make(APPEND, catch_up="all")
    assert statuses(scheduler) == []
    clock.time = START + timedelta(hours=3)
    results = scheduler.run_due()
    assert [(result.slot.hour, result.status) for result in results] == [(6, "done"), (7, "done"), (8, "done")]
    assert scheduler.run_due() == []
    again = make(APPEND, catch_up="all")  # a restart
    assert again.run_due() == []
    slots = (scheduler.workspace.root / "slots").read_text().split()
    assert [datetime.fromisoformat(slot).hour for slot in slots] == [6, 7, 8]


def test_latest_skips_the_rest(make: Callable[..., Scheduler], clock: Clock) -> None:
    scheduler = make(APPEND, catch_up="latest")
    clock.time = START + timedelta(hours=4)
    scheduler.run_due()
    assert statuses(scheduler) == [(6, "skipped"), (9, "done")]
    assert scheduler.run_due() == []


def test_a_failure_keeps_the_tail_and_the_exit_code(make: Callable[..., Scheduler], clock: Clock) -> None:
    scheduler = make("import sys; print('x' * 9000); print('the reason', file=sys.stderr); sys.exit(3)")
    clock.time = START + timedelta(hours=1)
    (result,) = scheduler.run_due()
    assert result.status == "failed"
    (run,) = scheduler.ledger.runs("schedule/demo")
    assert run.message.startswith("exit code 3; output in ")
    assert run.message.endswith("the reason")
    assert len(run.message) < 5000
    assert scheduler.run_due() == []


def test_retries_run_at_the_next_look_and_later_slots_wait(make: Callable[..., Scheduler], clock: Clock) -> None:
    script = (
        "import os, sys; p = os.environ['TSFORGE_HOME'] + '/tries'; open(p, 'a').write(sys.argv[1][11:13] + ' ');"
        "sys.exit(len(open(p).read().split()) < 3)"
    )
    scheduler = make(script, retries=2, catch_up="all")
    clock.time = START + timedelta(hours=2)
    assert [result.status for result in scheduler.run_due()] == ["failed"]
    assert [result.status for result in scheduler.run_due()] == ["failed"]
    assert [(result.slot.hour, result.status) for result in scheduler.run_due()] == [(6, "done"), (7, "done")]
    assert (scheduler.workspace.root / "tries").read_text().split() == ["06", "06", "06", "07"]


def test_a_busy_child_is_asked_again_later(make: Callable[..., Scheduler], clock: Clock) -> None:
    script = (
        "import os, sys; p = os.environ['TSFORGE_HOME'] + '/once';"
        "sys.exit(0) if os.path.exists(p) else (open(p, 'w'), sys.exit(75))"
    )
    scheduler = make(script)
    clock.time = START + timedelta(hours=1)
    assert [result.status for result in scheduler.run_due()] == ["interrupted"]
    assert [result.status for result in scheduler.run_due()] == ["done"]


def test_busy_attempts_use_up_no_retries(make: Callable[..., Scheduler], clock: Clock) -> None:
    script = (
        "import os, sys; p = os.environ['TSFORGE_HOME'] + '/tries'; open(p, 'a').write('x');"
        "sys.exit([75, 75, 3, 75, 0][len(open(p).read()) - 1])"
    )
    scheduler = make(script, retries=1)
    clock.time = START + timedelta(hours=1)
    found = [result.status for _ in range(6) for result in scheduler.run_due()]
    assert found == ["interrupted", "interrupted", "failed", "interrupted", "done"]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize(("script", "retries"), [("raise SystemExit(1)", 1), ("raise SystemExit(75)", 0)])
def test_a_look_every_five_minutes_runs_tried_slots_again_without_catch_up(
    make: Callable[..., Scheduler], clock: Clock, script: str, retries: int
) -> None:
    scheduler = make(script, catch_up="none", retries=retries)
    clock.time = START.replace(hour=6, minute=0, second=1)
    scheduler.run_due()
    clock.time += timedelta(minutes=5)
    assert [result.status for result in scheduler.run_due()] == ["failed" if retries else "interrupted"]
    assert scheduler.ledger.runs("schedule/demo")[0].attempt == 2


def test_the_newest_logs_stay_also_past_the_ninth_attempt(
    make: Callable[..., Scheduler], clock: Clock, workspace: Workspace
) -> None:
    scheduler = make("")
    folder = workspace.root / "logs/demo"
    folder.mkdir(parents=True)
    for attempt in range(1, 1000):
        (folder / f"2026-03-01T05-00-00Z.{attempt}.log").touch()
    (folder / "notes.log").touch()  # not of a slot
    clock.time = START.replace(hour=6, minute=1)
    scheduler.run_due()
    kept = [f"2026-03-01T05-00-00Z.{attempt}.log" for attempt in range(801, 1000)]
    assert {path.name for path in folder.iterdir()} == {*kept, "2026-03-01T06-00-00Z.1.log", "notes.log"}


GRANDCHILD = (
    "import os, subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "open(os.environ['TSFORGE_HOME'] + '/pids', 'w').write(f'{os.getpid()} {p.pid}'); time.sleep(600)"
)


def test_a_timeout_ends_the_child_and_its_children(make: Callable[..., Scheduler], clock: Clock) -> None:
    scheduler = make(GRANDCHILD, timeout_seconds=2.5)
    clock.time = START + timedelta(hours=1)
    began = time.monotonic()
    (result,) = scheduler.run_due()
    assert time.monotonic() - began < 30
    assert result.status == "failed"
    assert "timed out after 2.5 s" in result.message
    pids = [int(text) for text in (scheduler.workspace.root / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(600)"
    )
    limits = ChildLimits(timeout_seconds=1.5, stop_seconds=0.3)
    result = run_child([sys.executable, "-c", script], tmp_path / "log", limits, stop=threading.Event())
    assert result.reason == "timeout"
    assert result.exit_code == -signal.SIGKILL
    assert result.tail == "on"


def test_a_second_scheduler_does_not_overlap(make: Callable[..., Scheduler], clock: Clock) -> None:
    """Two schedulers, two due slots, children that take a while: the spans they note must be disjoint."""
    script = (
        "import os, sys, time; p = os.environ['TSFORGE_HOME'] + '/spans'; a = time.monotonic(); time.sleep(0.7);"
        "open(p, 'a').write(f'{a} {time.monotonic()}\\n')"
    )
    schedulers = [make(script, catch_up="all") for _ in range(2)]
    clock.time = START + timedelta(hours=2)

    def work(scheduler: Scheduler) -> None:
        deadline = time.monotonic() + 30
        while len(scheduler.ledger.runs(statuses=["done"])) < 2 and time.monotonic() < deadline:
            scheduler.run_due()

    threads = [threading.Thread(target=work, args=(scheduler,)) for scheduler in schedulers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = [
        tuple(map(float, line.split())) for line in (schedulers[0].workspace.root / "spans").read_text().splitlines()
    ]
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]


def told(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, object]]:
    """The fields of the lines logged with that message."""
    return [record.fields for record in caplog.records if record.getMessage() == message]  # type: ignore[attr-defined]


def test_who_works_on_a_slot_elsewhere_is_said_once(
    make: Callable[..., Scheduler], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    one, other = make(APPEND), make(APPEND, catch_up="all")
    clock.time = START + timedelta(hours=1)
    slot = START.replace(hour=6, minute=0)
    claim = one.ledger.claim("schedule/demo", slot)
    assert claim is not None
    for _ in range(3):
        other.run_due()
    [line] = told(caplog, "slot taken")
    assert line == {"job": "demo", "slot": slot.isoformat(), "by": str(claim.owner), "status": "claimed"}
    one.ledger.finish(claim)
    clock.time = START + timedelta(hours=2)
    assert one.ledger.claim("schedule/demo", slot.replace(hour=7)) is not None
    other.run_due()
    assert [line["slot"] for line in told(caplog, "slot taken")] == [
        slot.isoformat(),
        slot.replace(hour=7).isoformat(),
    ]


def test_a_slot_that_another_one_has_done_already_is_said_too(
    make: Callable[..., Scheduler], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    one, other = make(APPEND), make(APPEND)
    clock.time = START + timedelta(hours=1)
    job, slot = other.config.jobs[0], START.replace(hour=6, minute=0)
    assert [result.status for result in one.run_due()] == ["done"]
    caplog.clear()
    assert other._run_slot(job, slot) is None, "it had planned the slot before the first one was through"
    assert [line["status"] for line in told(caplog, "slot taken")] == ["done"]
    assert told(caplog, "slot started") == []


def test_the_line_of_a_slot_that_failed_says_why(
    make: Callable[..., Scheduler], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    slow = make("import time; print('on', flush=True); time.sleep(60)", timeout_seconds=1)
    clock.time = START + timedelta(hours=1)
    slow.run_due()
    [line] = told(caplog, "slot failed")
    assert str(line["reason"]).startswith("timed out after 1 s; output in ")
    assert "\n" not in str(line["reason"])
    assert line["exit_code"] == -signal.SIGTERM
    caplog.clear()
    fine = make("print('fine')", name="fine", start=START)
    assert fine.workspace is slow.workspace
    [done] = told(caplog, "slot done")
    assert "reason" not in done


def test_the_line_of_a_slot_that_could_not_start_says_why(
    make: Callable[..., Scheduler], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    scheduler = make(APPEND)
    scheduler.workspace.root.mkdir(parents=True, exist_ok=True)
    (scheduler.workspace.root / "logs").write_text("in the way", encoding="utf-8")
    clock.time = START + timedelta(hours=1)
    assert [result.status for result in scheduler.run_due()] == ["failed"]
    [line] = told(caplog, "slot failed")
    assert str(line["reason"]).startswith("cannot start ")


def test_a_scheduler_that_stops_leaves_the_sign_of_life_of_another_one(make: Callable[..., Scheduler]) -> None:
    scheduler = make(APPEND)
    path = health_file(scheduler.workspace)
    for owner, stays in (("elsewhere:1:2", True), (str(Owner.current()), False)):
        service = threading.Thread(target=scheduler.run)
        scheduler.stop.clear()
        service.start()
        wait_for(path.exists)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"owner": owner}), encoding="utf-8")
        scheduler.stop.set()
        service.join(timeout=30)
        assert path.exists() is stays


def test_a_slot_that_runs_elsewhere_is_busy(make: Callable[..., Scheduler], clock: Clock) -> None:
    one, other = make(APPEND), make(APPEND, catch_up="all")
    clock.time = START + timedelta(hours=1)
    claim = one.ledger.claim("schedule/demo", START.replace(hour=6, minute=0))
    assert claim is not None
    assert [(result.slot.hour, result.status) for result in other.run_due()] == [(6, "busy")]
    one.ledger.finish(claim)
    assert other.run_due() == []


def test_running_once_says_that_another_scheduler_runs_the_slot(workspace: Workspace) -> None:
    slot = datetime.now(UTC).replace(second=0, microsecond=0)
    job = ScriptJob(name="demo", cron="* * * * *", run="batch", config="x", script="pass", start=slot)
    ledger = Ledger(workspace.database_url)
    assert ledger.claim(job.key, slot) is not None
    assert run_scheduler(ScheduleConfig(jobs=(job,)), workspace, once=True) == 75
    ledger.close()


def test_the_slot_at_start_runs(make: Callable[..., Scheduler], clock: Clock) -> None:
    begin = START.replace(hour=4, minute=0)
    scheduler = make(APPEND, catch_up="all", start=begin)
    done = scheduler.ledger.runs(statuses=["done"])
    assert [run.slot.hour for run in reversed(done)] == [4, 5]


def test_a_later_start_of_a_known_job_holds(make: Callable[..., Scheduler], clock: Clock) -> None:
    make(APPEND)
    scheduler = make(APPEND, catch_up="all", start=START + timedelta(hours=3))
    clock.time = START + timedelta(hours=2)
    assert scheduler.run_due() == []
    (status,) = scheduler.status()
    assert [moment.hour for moment in status.upcoming] == [9, 10, 11]
    clock.time = START + timedelta(hours=4)
    assert [result.slot.hour for result in scheduler.run_due()] == [9]


def test_an_earlier_start_of_a_known_job_is_answered_once(
    make: Callable[..., Scheduler], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    begin = START - timedelta(hours=3)
    backfilled = make(APPEND, name="backfilled", catch_up="all", start=begin)
    assert len(backfilled.ledger.runs(statuses=["done"])) == 3
    make(APPEND, name="backfilled", start=begin)
    assert not any("give it another name" in message for message in caplog.messages)
    make(APPEND)
    clock.time = START + timedelta(hours=1)
    scheduler = make(APPEND, start=begin)
    scheduler.run_due()
    warned = [message for message in caplog.messages if "give it another name" in message]
    assert len(warned) == 1
    assert warned[0].startswith(f"job demo is settled up to {START.isoformat()}, so its start {begin.isoformat()}")


def test_status_shows_next_due_and_last_and_writes_nothing(make: Callable[..., Scheduler], clock: Clock) -> None:
    scheduler = make(APPEND, catch_up="all", timezone="Europe/Berlin")
    clock.time = START + timedelta(hours=1)
    scheduler.run_due()
    clock.time = START + timedelta(hours=2)
    (status,) = scheduler.status()
    assert status.timezone == "Europe/Berlin"
    assert [moment.hour for moment in status.upcoming] == [8, 9, 10]
    assert [moment.hour for moment in status.due] == [7]
    assert [(run.slot.hour, run.status) for run in status.last] == [(6, "done")]
    assert status.running is None
    fresh = Scheduler(
        ScheduleConfig(jobs=(scheduler.config.jobs[0].model_copy(update={"name": "new"}),)),
        scheduler.workspace,
        scheduler.ledger,
    )
    (status,) = fresh.status()
    assert status.due == ()
    clock.time += timedelta(hours=3)
    assert fresh.status()[0].due == (), "looking does not register the job"


SERVICE = """
import sys
from datetime import datetime
from tsforge.core.workspace import Workspace
from tsforge.core.logs import configure_logging
from tsforge.scheduling.jobs import JobConfig, ScheduleConfig
from tsforge.scheduling.runner import Scheduler, stopping_on_signals

class ScriptJob(JobConfig):
    script: str
    def command(self, slot):
        return [sys.executable, "-c", self.script, slot.isoformat()]

configure_logging("info", as_json=True)
job = ScriptJob(name="demo", cron="* * * * *", run="batch", config="x", catch_up="all", script=sys.argv[1],
                start=datetime.fromisoformat(sys.argv[2]))
scheduler = Scheduler(ScheduleConfig(jobs=(job,), poll_seconds=0.3, stop_seconds=5), Workspace.open())
with stopping_on_signals(scheduler.stop):
    scheduler.run()
"""

SLOW = (
    "import os, sys, time; home = os.environ['TSFORGE_HOME'];"
    "open(home + '/started', 'a').write(sys.argv[1] + '\\n');"
    "time.sleep(600 if not os.path.exists(home + '/fast') else 0);"
    "open(home + '/ended', 'a').write(sys.argv[1] + '\\n')"
)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def start_service(script: str, begin: datetime) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, script, begin.isoformat()], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_scheduler_leaves_the_slot_to_be_run_again(workspace: Workspace, number: signal.Signals) -> None:
    """The real service in real time: one minute slot is due at once; stop it in the middle, start it again."""
    home, now = workspace.root, datetime.now(UTC)
    begin = now.replace(second=0, microsecond=0)  # exactly the current minute is due
    service = start_service(SLOW, begin)
    wait_for(lambda: (home / "started").exists() and (home / "started").read_text() != "")
    if number == signal.SIGTERM:
        wait_for(lambda: is_healthy(workspace))
        assert not is_healthy(workspace, datetime.now(UTC) + timedelta(minutes=2))
        assert json.loads(health_file(workspace).read_text())["pid"] == service.pid
    os.kill(service.pid, number)
    _, errors = service.communicate(timeout=30)
    ledger = Ledger(workspace.database_url)
    slot = datetime.fromisoformat((home / "started").read_text().split()[0])
    run = ledger.find("schedule/demo", slot)
    assert run is not None
    if number != signal.SIGKILL:
        assert service.returncode == 0, errors
        assert run.status == "interrupted"
        assert json.loads(errors.splitlines()[-1])["message"] == "scheduler stopped"
        assert not health_file(workspace).exists()
    else:
        assert run.status == "claimed"
        assert ledger.is_abandoned(run)
    (home / "fast").touch()
    service = start_service(SLOW, begin)

    def settled() -> bool:
        found = ledger.find("schedule/demo", slot)
        return found is not None and found.status == "done"

    wait_for(settled)
    service.terminate()
    service.communicate(timeout=30)
    run = ledger.find("schedule/demo", slot)
    assert run is not None
    assert run.attempt == 2
    ended = (home / "ended").read_text().split()
    assert ended.count(slot.isoformat()) == 1
    ledger.close()


def test_a_health_file_that_cannot_be_written_is_said_once_and_the_jobs_go_on(workspace: Workspace) -> None:
    home = workspace.root
    (home / "run").write_text("in the way", encoding="utf-8")  # where the folder of the file would be
    (home / "fast").touch()
    service = start_service(SLOW, datetime.now(UTC).replace(second=0, microsecond=0))
    wait_for((home / "ended").exists)
    time.sleep(1)  # three looks more
    service.terminate()
    _, errors = service.communicate(timeout=30)
    assert service.returncode == 0, errors
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["level"] for line in lines if "health" in line["message"]] == ["warning"], errors
    assert lines[-1]["message"] == "scheduler stopped"


ONCE = """
import sys
from datetime import datetime
from tsforge.app.schedule import run_scheduler
from tsforge.core.workspace import Workspace
from tsforge.scheduling.jobs import JobConfig, ScheduleConfig

class ScriptJob(JobConfig):
    script: str
    def command(self, slot):
        return [sys.executable, "-c", self.script, slot.isoformat()]

job = ScriptJob(name="demo", cron="* * * * *", run="batch", config="x", script=sys.argv[1],
                start=datetime.fromisoformat(sys.argv[2]))
sys.exit(run_scheduler(ScheduleConfig(jobs=(job,), stop_seconds=5), Workspace.open(), once=True))
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit(3)", 1),
        (SLOW, 130),
    ],
    ids=["done", "busy", "failed", "interrupted"],
)
def test_running_once_says_how_it_ended(workspace: Workspace, script: str, code: int) -> None:
    begin = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(seconds=1)
    process = subprocess.Popen([sys.executable, "-c", ONCE, script, begin.isoformat()])
    if code == 130:
        wait_for((workspace.root / "started").exists)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == code
