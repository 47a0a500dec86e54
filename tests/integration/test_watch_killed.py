"""A watch killed with SIGKILL at chosen moments loses no event and tells none twice; the harness of
``benchmarks/kill_watch.py``, with fewer kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a preloaded process")


def attack(*options: str, flawed: bool = False) -> dict[str, Any]:
    """Run the harness and return its record."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_watch.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == int(flawed), done.stdout + done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    assert bool(record["flaws"]) == flawed
    return record


def test_killed_at_chosen_moments() -> None:
    """File, table, webhook and event store with incidents at once, from a folder; truth is batch detection."""
    record = attack("--kills", "5", "--seed", "5")
    assert record["kills"] == 5
    seen = record["of_the_last_round"]
    assert seen["transitions"] > 50
    assert seen["events_in_them"] > seen["incidents_over"] > 5


@pytest.mark.slow
def test_killed_more_often_from_a_folder() -> None:
    record = attack("--kills", "40", "--seed", "6")
    assert len(record["killed"]) >= 9  # of the thirteen moments


@pytest.mark.slow
def test_killed_while_it_polls_a_table() -> None:
    assert attack("--kills", "15", "--seed", "7", "--source", "sql")["kills"] == 15


@pytest.mark.slow
def test_killed_while_it_writes_to_postgresql(postgres_url: str) -> None:
    assert attack("--kills", "12", "--seed", "8", "--sink-url", postgres_url)["kills"] == 12


@pytest.mark.slow
def test_killed_while_it_hides_alarms_from_later_forecasts() -> None:
    record = attack("--kills", "10", "--guard", "--seed", "10")
    assert record["kills"] == 10
    assert record["rows_guarded"] > 50


@pytest.mark.slow
def test_the_judge_sees_events_that_are_committed_apart_from_the_detector() -> None:
    """Break what makes it safe (one transaction) and the same harness must report lost events."""
    record = attack("--kills", "4", "--seed", "9", "--saboteur", "late_outbox", flawed=True)
    assert any("lost" in flaw for flaw in record["flaws"])
