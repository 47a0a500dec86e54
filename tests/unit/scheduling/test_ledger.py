"""The run ledger on SQLite and PostgreSQL: one winner a slot, takeover of the dead, no late overwriting."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from tsforge.core.errors import BackendError, ConfigError
from tsforge.core.owner import Owner
from tsforge.scheduling.ledger import Claim, Ledger

SLOT = datetime(2026, 3, 1, 6, tzinfo=UTC)


class Clock:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.time = datetime(2026, 3, 1, 6, 0, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def pass_(self, **span: float) -> None:
        self.time += timedelta(**span)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(database_url: str, clock: Clock) -> Iterator[Ledger]:
    opened = Ledger(database_url, clock=clock)
    yield opened
    opened.close()


def claimed(ledger: Ledger, slot: datetime = SLOT, **options: bool) -> Claim:
    claim = ledger.claim("job", slot, **options)
    assert claim is not None
    return claim


@pytest.mark.parametrize("text", ["garbage", "[]", '{"failed_attempts": "two"}'])
def test_damaged_details_are_a_mark_on_their_run_only(ledger: Ledger, text: str) -> None:
    ledger.finish(claimed(ledger, SLOT + timedelta(hours=1)), details={"rows_in": 3})
    ledger.fail(claimed(ledger), "no")
    with ledger._transaction() as connection:
        connection.execute(sa.text("UPDATE ledger_runs SET details = :text WHERE status = 'failed'"), {"text": text})
    newest, torn = ledger.runs("job")
    assert (newest.details, newest.is_damaged) == ({"rows_in": 3}, False)
    assert (torn.status, torn.failures, dict(torn.details), torn.is_damaged) == ("failed", 1, {}, True)
    with pytest.raises(BackendError, match=r"details of job at 2026-03-01T06:00:00\+00:00 in the table ledger_runs"):
        ledger.find("job", SLOT)
    assert claimed(ledger).failures == 1, "the slot can be run again, and every attempt counts as failed"
    assert not ledger.runs("job")[1].is_damaged


def test_a_slot_is_claimed_once_and_done_for_good(ledger: Ledger, clock: Clock) -> None:
    claim = claimed(ledger)
    assert ledger.claim("job", SLOT) is None
    clock.pass_(seconds=3)
    ledger.finish(claim, rows=12, output="/published/x", message="fine", details={"events": 2})
    assert ledger.claim("job", SLOT) is None
    run = ledger.find("job", SLOT)
    assert run is not None
    assert (run.status, run.attempt, run.rows, run.output, run.message) == ("done", 1, 12, "/published/x", "fine")
    assert run.details == {"events": 2}
    assert run.seconds == 3.0
    assert run.started == datetime(2026, 3, 1, 6, 0, 5, tzinfo=UTC)


def test_the_same_instant_in_another_zone_is_the_same_slot(ledger: Ledger) -> None:
    claimed(ledger)
    assert ledger.claim("job", SLOT.astimezone(timezone(timedelta(hours=5, minutes=45)))) is None
    assert ledger.claim("job", SLOT + timedelta(microseconds=1)) is not None


def test_a_slot_without_time_zone_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="no time zone"):
        ledger.claim("job", datetime(2026, 3, 1))


@pytest.mark.parametrize("close", ["fail", "release"])
def test_failed_and_released_slots_can_be_claimed_again(ledger: Ledger, close: str) -> None:
    getattr(ledger, close)(claimed(ledger), "no space left")
    run = ledger.find("job", SLOT)
    assert run is not None
    assert run.message == "no space left"
    again = claimed(ledger)
    assert again.attempt == 2
    ledger.finish(again)
    run = ledger.find("job", SLOT)
    assert run is not None
    assert (run.status, run.message, run.attempt) == ("done", "", 2)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("no such model"), "failed", "ConfigError: no such model"),
        (KeyError("x"), "failed", "KeyError: 'x' (a bug in tsforge)"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
    ],
)
def test_work_that_fails_is_on_record(ledger: Ledger, error: BaseException, status: str, message: str) -> None:
    with pytest.raises(type(error)), ledger.on_record(claimed(ledger)):
        raise error
    run = ledger.find("job", SLOT)
    assert run is not None
    assert (run.status, run.message) == (status, message)
    with ledger.on_record(claimed(ledger)):
        pass
    run = ledger.find("job", SLOT)
    assert run is not None
    assert run.status == "claimed", "what comes through closes its slot by itself"


def test_only_failed_attempts_count_as_failures(ledger: Ledger, clock: Clock) -> None:
    def failures() -> int:
        run = ledger.find("job", SLOT)
        assert run is not None
        assert run.details == {}, "the count is no number of the maker"
        return run.failures

    found = []
    for close in ("release", "fail", "release", "fail"):
        getattr(ledger, close)(claimed(ledger), "why")
        found.append(failures())
    claimed(ledger)
    clock.pass_(minutes=5)  # abandoned
    last = claimed(ledger)
    assert (last.attempt, last.failures) == (6, 2)
    assert [*found, failures()] == [0, 1, 1, 2, 2]
    ledger.finish(last)
    assert failures() == 0


@pytest.mark.parametrize("close", ["fail", "release"])
def test_a_note_reaches_the_next_holder_however_the_attempts_ended(ledger: Ledger, close: str) -> None:
    first = ledger.claim("a", SLOT)
    assert first is not None
    assert first.note == {}
    ledger.note(first, {"made": "x"})
    for _ in range(2):
        getattr(ledger, close)(first, "broke")
        run = ledger.find("a", SLOT)
        assert run is not None
        assert (run.details, run.failures) == ({}, first.failures + (close == "fail"))
        first = ledger.claim("a", SLOT)
        assert first is not None
        assert first.note == {"made": "x"}
    ledger.finish(first, details={"rows": 1})
    again = ledger.claim("a", SLOT, again=True)
    assert again is not None
    assert again.note == {}, "done: nothing is left to tell"
    with pytest.raises(BackendError, match="taken over"):
        ledger.note(first, {"made": "late"})


def test_in_failed_rows_of_older_versions_every_attempt_counts(ledger: Ledger, database_url: str) -> None:
    for _ in range(3):
        ledger.fail(claimed(ledger), "why")
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_runs SET details = '{}'"))
    engine.dispose()
    run = ledger.find("job", SLOT)
    assert run is not None
    assert run.failures == 3
    assert claimed(ledger).failures == 3


def test_force_claims_a_settled_slot_but_never_a_living_one(ledger: Ledger) -> None:
    claim = claimed(ledger)
    assert ledger.claim("job", SLOT, again=True) is None
    ledger.finish(claim)
    assert claimed(ledger, again=True).attempt == 2


def test_skip_settles_only_what_nobody_works_on(ledger: Ledger) -> None:
    assert ledger.skip("job", SLOT, "too late")
    assert not ledger.skip("job", SLOT, "again")
    assert ledger.claim("job", SLOT) is None
    claimed(ledger, SLOT + timedelta(hours=1))
    assert not ledger.skip("job", SLOT + timedelta(hours=1), "too late")


def test_exclusive_claims_of_one_job_do_not_overlap(ledger: Ledger) -> None:
    first = claimed(ledger, exclusive=True)
    later = SLOT + timedelta(hours=1)
    assert ledger.claim("job", later, exclusive=True) is None
    assert ledger.claim("other", later, exclusive=True) is not None
    ledger.release(first, "stopped")
    assert claimed(ledger, later, exclusive=True).attempt == 1


def dead_owner() -> Owner:
    """A process of this host that has ended."""
    script = "from tsforge.core.owner import Owner; print(Owner.current())"
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return Owner.parse(text.strip())


def test_the_claim_of_a_dead_process_is_taken_over_at_once(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = dead_owner()
    assert owner.is_gone()
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "current", classmethod(lambda cls: owner))
        claimed(ledger)
    run = ledger.find("job", SLOT)
    assert run is not None
    assert run.claimed_by == str(owner)
    assert ledger.is_abandoned(run)
    assert claimed(ledger).attempt == 2


def test_the_claim_of_another_host_is_taken_over_when_silent(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "current", classmethod(lambda cls: Owner("elsewhere/1", 4242, "7")))
        claim = claimed(ledger)
    clock.pass_(seconds=80)
    assert ledger.claim("job", SLOT) is None
    assert ledger.beat(claim)
    clock.pass_(seconds=80)
    assert ledger.claim("job", SLOT) is None, "a sign of life was given 80 s ago"
    clock.pass_(seconds=11)
    assert claimed(ledger).attempt == 2
    assert not ledger.beat(claim)


@pytest.mark.parametrize("close", ["finish", "fail", "release"])
def test_a_holder_that_slept_too_long_cannot_close(ledger: Ledger, clock: Clock, close: str) -> None:
    slept = claimed(ledger)
    clock.pass_(minutes=5)
    successor = claimed(ledger)
    arguments = () if close == "finish" else ("late",)
    with pytest.raises(BackendError, match="taken over"):
        getattr(ledger, close)(slept, *arguments)
    run = ledger.find("job", SLOT)
    assert run is not None
    assert (run.status, run.attempt) == ("claimed", 2)
    ledger.finish(successor, rows=1)


def test_runs_are_filtered_and_newest_first(ledger: Ledger) -> None:
    for hour in range(4):
        claim = ledger.claim(f"batch/{'ab'[hour % 2]}", SLOT + timedelta(hours=hour))
        assert claim is not None
        if hour < 2:
            ledger.finish(claim)
    ledger.claim("batch_other", SLOT)
    hours = [(run.slot - SLOT).total_seconds() / 3600 for run in ledger.runs("batch/*")]
    assert hours == [3, 2, 1, 0]
    assert [run.job for run in ledger.runs("batch/a")] == ["batch/a", "batch/a"]
    assert len(ledger.runs(statuses=["done"])) == 2
    assert len(ledger.runs("batch/*", since=SLOT + timedelta(hours=1), until=SLOT + timedelta(hours=2))) == 2
    assert len(ledger.runs(limit=2)) == 2


def test_the_frontier_is_registered_once_and_never_moves_back(ledger: Ledger, clock: Clock) -> None:
    assert ledger.frontier("new", register=False) == clock.time
    registered = ledger.frontier("new")
    clock.pass_(hours=2)
    assert ledger.frontier("new", SLOT - timedelta(days=9)) == registered
    ledger.advance("new", registered + timedelta(hours=1))
    ledger.advance("new", registered)
    assert ledger.frontier("new") == registered + timedelta(hours=1)


def test_a_start_counts_itself_and_holds_for_known_jobs_too(ledger: Ledger) -> None:
    start, just_before = SLOT - timedelta(days=9), timedelta(microseconds=1)
    assert ledger.frontier("backfilled", start) == start - just_before
    later = SLOT + timedelta(days=9)
    assert ledger.frontier("backfilled", later) == later - just_before
    assert ledger.frontier("backfilled", later, register=False) == later - just_before
    assert ledger.frontier("backfilled", start) == start - just_before, "nothing was given up by looking"


def test_messages_keep_their_end(ledger: Ledger) -> None:
    ledger.fail(claimed(ledger), "x" * 100_000 + "the reason")
    run = ledger.find("job", SLOT)
    assert run is not None
    assert len(run.message) <= 16_000
    assert run.message.endswith("the reason")


def test_signs_that_no_database_keeps_do_not_leave_a_slot_open(ledger: Ledger) -> None:
    ledger.finish(claimed(ledger), message="half\x00way", output="logs/\udcff.log")
    run = ledger.find("job", SLOT)
    assert run is not None
    assert (run.status, run.message, run.output) == ("done", "half\ufffdway", "logs/\\udcff.log")


def test_keep_alive_gives_signs_of_life(database_url: str) -> None:
    ledger = Ledger(database_url, stale_after=timedelta(seconds=0.6))
    claim = claimed(ledger)
    with ledger.keep_alive(claim):
        time.sleep(1.0)
        run = ledger.find("job", SLOT)
        assert run is not None
        assert not ledger.is_abandoned(run)
    time.sleep(0.8)
    assert ledger.is_abandoned(run)
    ledger.close()


CLAIMER = """
import sys, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tsforge.scheduling.ledger import Ledger
url, gate, name = sys.argv[1:]
Path(gate, name).touch()
while not Path(gate, "go").exists():
    time.sleep(0.001)
ledger = Ledger(url)
first = datetime(2026, 3, 1, tzinfo=UTC)
for number in range(25):
    claim = ledger.claim("job", first + timedelta(hours=number))
    if claim is not None:
        print(number, claim.attempt, flush=True)
        ledger.finish(claim, message=name)
"""


@pytest.mark.parametrize("before", ["empty", "failed"])
def test_of_several_processes_exactly_one_wins_each_slot(database_url: str, tmp_path: Path, before: str) -> None:
    """With an empty database they also race for creating the tables; slots that failed are raced for by update."""
    if before == "failed":
        with closing(Ledger(database_url)) as ledger:
            for number in range(25):
                ledger.fail(claimed(ledger, datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=number)), "x")
    gate = tmp_path / "gate"
    gate.mkdir()
    names = [f"p{number}" for number in range(5)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, database_url, str(gate), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    deadline = time.monotonic() + 120
    while len(list(gate.iterdir())) < len(names) and time.monotonic() < deadline:
        time.sleep(0.01)
    (gate / "go").touch()
    won: list[str] = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        won += output.splitlines()
    attempt = 1 if before == "empty" else 2
    assert sorted(won, key=lambda line: int(line.split()[0])) == [f"{number} {attempt}" for number in range(25)]
    with closing(Ledger(database_url)) as ledger:
        runs = ledger.runs("job")
    assert len(runs) == 25
    assert {run.status for run in runs} == {"done"}


HOLDER = """
import sys, time
from datetime import UTC, datetime
from tsforge.scheduling.ledger import Ledger
claim = Ledger(sys.argv[1]).claim("job", datetime(2026, 3, 1, 6, tzinfo=UTC))
print(claim.owner, flush=True)
time.sleep(600)
"""


def test_kill_9_of_the_holder_frees_the_slot(database_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, database_url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        owner = Owner.parse(holder.stdout.readline().strip())
        ledger = Ledger(database_url)
        assert not owner.is_gone()
        assert ledger.claim("job", SLOT) is None
        os.kill(holder.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not owner.is_gone() and time.monotonic() < deadline:  # a zombie already counts as gone
            time.sleep(0.01)
        assert claimed(ledger).attempt == 2
    ledger.close()


def test_a_recycled_process_id_is_another_process() -> None:
    me = Owner.current()
    assert not me.is_gone()
    if me.mark:
        assert Owner(me.host, me.pid, str(int(me.mark) + 1)).is_gone()
    assert not Owner("another-host/1", me.pid, "1").is_gone(), "nothing is certain about another machine"
    assert Owner.parse(str(me)) == me


def test_bad_addresses_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sqlite:///"):
        Ledger("not a url")
    with pytest.raises(ConfigError, match="a port that is no number") as caught:
        Ledger("postgresql+psycopg://ann:s3cr3t@127.0.0.1:xx/db")
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(ConfigError, match="'mysql' is not supported"):
        Ledger("mysql://u:p@h/db")
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"cannot create the folder .*file"):
        Ledger(f"sqlite:///{tmp_path / 'file' / 'x.db'}")
    (tmp_path / "notes.db").write_text("no database at all" * 100, encoding="utf-8")
    with pytest.raises(BackendError, match=r"cannot make the tables of the run ledger in .* is not a SQLite database"):
        Ledger(f"sqlite:///{tmp_path / 'notes.db'}")
    with pytest.raises(BackendError) as refused:
        Ledger("postgresql://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_ledger_in_memory_is_refused_since_it_would_forget_its_claims(url: str) -> None:
    with pytest.raises(ConfigError, match="in-memory SQLite database holds nothing"):
        Ledger(url)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+nosuch", "sqlite+nosuch"])
def test_a_driver_that_is_not_here_is_one_message(driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    place = f"/{tmp_path / 'x.db'}" if driver.startswith("sqlite") else "ann:s3cr3t@127.0.0.1:1/db"
    with pytest.raises(ConfigError, match=r"no driver for .*; (install|write)") as caught:
        Ledger(f"{driver}://{place}")
    assert "s3cr3t" not in str(caught.value)


def test_claims_take_the_write_lock_at_once_and_looks_do_not(database_url: str, ledger: Ledger) -> None:
    claim = claimed(ledger)
    if not database_url.startswith("sqlite"):
        return
    with closing(sqlite3.connect(sa.make_url(database_url).database or "", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert [run.slot for run in ledger.runs()] == [SLOT], "a look does not wait for a writer"
        seconds: list[float] = []
        started = time.monotonic()
        thread = threading.Thread(target=lambda: (ledger.beat(claim), seconds.append(time.monotonic() - started)))
        thread.start()
        time.sleep(0.4)
        other.execute("COMMIT")
        thread.join(timeout=30)
    assert seconds, "the writer never had its turn"
    assert seconds[0] >= 0.3, "a writer waits before it reads, so that nothing changes between its look and its word"


def test_details_survive_any_value(ledger: Ledger) -> None:
    ledger.finish(claimed(ledger), details={"when": SLOT, "path": Path("a/b"), "n": 3})
    run = ledger.find("job", SLOT)
    assert run is not None
    assert json.loads(json.dumps(run.details)) == {"when": str(SLOT), "path": "a/b", "n": 3}
