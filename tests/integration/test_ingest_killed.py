"""An ingestion killed at random moments loses nothing, doubles nothing, and the next run completes it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def test_killed_at_any_moment_on_sqlite(kill_ingest: ModuleType, tmp_path: Path) -> None:
    result = kill_ingest.attack(tmp_path, kills=8, rows=30_000, seed=1)
    assert result["kills"] == 8
    assert result["failures"] == []


def test_killed_at_any_moment_on_postgresql(kill_ingest: ModuleType, tmp_path: Path, postgres_url: str) -> None:
    result = kill_ingest.attack(tmp_path, kills=3, rows=30_000, seed=2, database_url=postgres_url)
    assert result["kills"] == 3
    assert result["failures"] == []


def test_the_judge_sees_a_half_written_batch(
    kill_ingest: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same judge, shown a store that lost a row, must say so."""
    harness = kill_ingest.Harness(tmp_path, rows=500, seed=3)
    harness.undisturbed_seconds()
    honest = harness.stored

    def short() -> object:
        table, statuses, health = honest()
        return table.head(table.height - 1), statuses, health

    monkeypatch.setattr(harness, "stored", short)
    seen = harness.attack(1, 0.01)
    assert not seen["whole"]
    assert not seen["completed"]
    assert kill_ingest.summarise([seen], 0.1)["failures"] == [seen]
