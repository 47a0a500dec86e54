"""What a watch tells of its turns, and the counts it keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tsforge.data.watch_state import now_text

SHOWN = 50  # words counted apart, transitions that a result lists
ROWS = (
    "rows_read",
    "rows_taken",
    "rows_ahead",
    "late",
    "rows_empty",
    "rows_refused",
)  # the first, and what became of it


@dataclass
class Tally:
    """Counts that a status shows, stored with every commit."""

    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls) -> Tally:
        """Return the counts of a watch that has seen nothing."""
        zeros = dict.fromkeys((*ROWS, "refused", "opened", "closed", "suppressed"), 0)
        empty: dict[str, Any] = {"strangers": {}, "notes": {}, "open": {}, "notices": [], "source_notices": []}
        return cls({**zeros, **empty, "last_row": None, "last_event": None, "started": now_text(), "waiting": None})

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Tally:
        """Return stored counts; those that an older version did not keep begin at zero."""
        return cls({**cls.new().facts, **facts})

    def add(self, **counts: int) -> None:
        """Count."""
        for name, count in counts.items():
            self.facts[name] += count

    def merge(self, name: str, counts: Mapping[str, int]) -> None:
        """Add counts by word; words beyond the first 50 are counted together."""
        total = Counter(self.facts[name])
        for word, count in counts.items():
            total[word if word in total or len(total) < SHOWN else "others"] += count
        self.facts[name] = dict(total)


def plain(value: Any) -> Any:
    """Return a cell in types that JSON knows; times as ISO text in UTC, what is not finite as null."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat() if value.tzinfo else value.replace(tzinfo=UTC).isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line about a transition says."""
    names = ("event_id", "series_id", "start", "end", "peak_score", "suppressed_by")
    variates = [item["variate"] for item in record.get("variates") or []][:3]
    return {**{name: record.get(name) for name in names}, "variates": ", ".join(variates)}


def lag(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last row and how many seconds it lies behind the clock."""
    last = facts["last_row"]
    if not isinstance(last, str):
        return {"last_row": last, "lag_seconds": None}
    behind = (datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds()
    return {"last_row": last, "lag_seconds": round(behind, 1)}


def counts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many rows and transitions there were."""
    names = ("rows_read", "rows_taken", "late", "refused", "rows_refused", "opened", "closed", "undelivered")
    return {name: facts.get(name) for name in names}
