"""Who is first on each pair of data set and horizon of a benchmark, and who cannot be told from the first by seeds.

A model is level with the first if the ranges of their seeds meet: its lowest seed is not above the highest seed of the
first. A model that was run once has a range of one point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model on one pair: name, role (model, peer, baseline), mean MSE, the least and largest of its seeds."""

    name: str
    role: str
    mse: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """One pair of data set and horizon.

    Attributes:
        entries: every model measured, lowest mean MSE first.
    """

    data: str
    horizon: int
    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        """The model with the lowest mean."""
        return self.entries[0]

    def best(self, role: str) -> Entry | None:
        """Return the first of one role, None where there is none."""
        return next((entry for entry in self.entries if entry.role == role), None)

    @property
    def level(self) -> tuple[str, ...]:
        """The names of the first and of those that the seeds do not tell from it."""
        return tuple(entry.name for entry in self.entries if entry.low <= self.first.high)


def places(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Place, ...]:
    """Return every pair that no model was left out of, in the order of the rows.

    Args:
        rows: records with data, horizon, role, status, mse, mse_min and mse_max, seeds averaged.
        names: what to call the model of each row.
    """
    late = {(row["data"], row["horizon"]) for row in rows if row["status"] == "skipped"}
    pairs: dict[tuple[str, int], list[Entry]] = {}
    for row, name in zip(rows, names, strict=True):
        if row["status"] != "ok" or row["mse"] is None or (row["data"], row["horizon"]) in late:
            continue
        entry = Entry(name=name, role=row["role"], mse=row["mse"], low=row["mse_min"], high=row["mse_max"])
        pairs.setdefault((row["data"], row["horizon"]), []).append(entry)
    return tuple(
        Place(data=data, horizon=horizon, entries=tuple(sorted(found, key=lambda entry: entry.mse)))
        for (data, horizon), found in pairs.items()
    )
