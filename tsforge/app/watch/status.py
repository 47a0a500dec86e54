"""What a watch is doing, from its state alone: also while it runs, and after it died."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tsforge.app.exclusive import holder
from tsforge.app.watch.records import ROWS, Tally
from tsforge.core.errors import BackendError, listing
from tsforge.core.workspace import Workspace
from tsforge.data.watch_state import WatchState

FOLDER = "watch"
STATE = "state.db"
_COUNTS = (*ROWS, "refused", "opened", "closed", "suppressed", "started")


def watch_names(workspace: Workspace) -> list[str]:
    """Return the watches of a workspace."""
    return sorted(place.parent.name for place in (workspace.root / FOLDER).glob(f"*/{STATE}") if _is_begun(place))


def _is_begun(place: Path) -> bool:
    with closing(WatchState(place, read_only=True)) as state:
        return state.snapshot() is not None


def watch_status(name: str, workspace: Workspace) -> dict[str, Any]:
    """Return what a watch is doing.

    ``running`` (process, or null), artifact, data set, source, counts of rows (those read are the sum of those taken,
    ahead, late, empty, refused, and left out by series), of refusals (a file, or rows with one reason), of transitions
    (opened, closed, suppressed) and open events; ``last_row`` and ``lag_seconds`` behind the clock; ``last_event``;
    ``notices`` of the start, the source and the model's health; ``files_waiting``; per sink ``to_deliver, delivered,
    error``; ``undelivered``, ``dead_letters``; series left out; newest refusals; ``last_sign`` of life.

    Raises:
        BackendError: no watch of that name, or its state cannot be read.
    """
    folder = workspace.root / FOLDER / name
    if name not in watch_names(workspace):
        raise BackendError(
            f"no watch '{name}' in {workspace.root} (known: {listing(watch_names(workspace)) or 'none'})"
        )
    with closing(WatchState(folder / STATE, read_only=True)) as state:
        owner = holder(folder)
        return describe(name, state, running=None if owner is None else str(owner))


def describe(name: str, state: WatchState, *, running: str | None) -> dict[str, Any]:
    """Return the status of a watch from its open state."""
    snapshot = state.snapshot()
    assert snapshot is not None  # callers look at watches that were begun
    facts, identity = Tally.of(snapshot.facts).facts, snapshot.identity
    cursors, depths = state.cursors(), state.depths()
    last = facts["last_row"]
    lag = None
    if isinstance(last, str):
        lag = round((datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds(), 1)
    letters = state.dead_letters()
    sinks = {
        sink: {"to_deliver": depths[sink], "delivered": cursor.delivered, "error": cursor.error}
        for sink, cursor in cursors.items()
    }
    return {
        "watch": name,
        "running": running,
        "artifact": identity["artifact"],
        "dataset": identity["dataset"],
        "source": identity["source"]["kind"],
        "generation": snapshot.generation,
        **{key: facts[key] for key in _COUNTS},
        "open_events": len(facts["open"]),
        "last_row": last,
        "lag_seconds": lag,
        "last_event": facts["last_event"],
        "notices": [*facts["start_notices"], *facts["source_notices"], *facts["notices"]],
        "files_waiting": facts["waiting"],
        "sinks": sinks,
        "undelivered": max(depths.values(), default=0),
        "dead_letters": len(letters),
        "dead_letter_reasons": sorted({f"{letter['sink']}: {letter['reason']}" for letter in letters})[:5],
        "series_left_out": facts["strangers"],
        "cleaning": facts["notes"],
        "refusals": state.refusals(5),
        "last_sign": snapshot.committed,
    }
