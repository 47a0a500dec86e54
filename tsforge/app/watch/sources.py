"""Where rows come from: what every source offers, a SQL table; and rows that cannot be read, set apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from tsforge.app.watch.intake import Intake, Portion, noted
from tsforge.app.watch.screening import Refusal
from tsforge.app.watch.settings import TableSource
from tsforge.core.errors import DataError
from tsforge.data.io import RawTable
from tsforge.data.sql_poll import Key, KeyedTable, read_key, write_key
from tsforge.data.watch_state import SourceFile


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a source has next.

    Attributes:
        portions: rows, in order; none where all of them were refused.
        position: where the source goes on once they are taken; plain JSON types.
        what: the place in words, for messages.
        refusals: what was refused, why, and how many rows it has.
        files, forgotten: names to remember as read or refused, and names gone from a folder.
        rows_left: rows of it that nobody has judged, where it stands for an offer that the detector refused.
        divisible: rows that a detector refuses may be set apart one by one; else the whole of ``what`` is refused.
    """

    portions: tuple[Portion, ...]
    position: dict[str, Any]
    what: str
    refusals: tuple[Refusal, ...] = ()
    files: tuple[SourceFile, ...] = ()
    forgotten: tuple[str, ...] = ()
    rows_left: int = 0
    divisible: bool = True


class Source(Protocol):
    """Offers rows from a position on; nothing is remembered but what ``position`` says."""

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return the next rows, about ``limit`` at most, or None where there are none now."""
        ...

    def rest(self) -> float | None:
        """Return seconds after which rows that are there already can be read; None: there are none."""
        ...

    def refuse(self, offer: Offer) -> Offer:
        """Return the offer that stands for one whose rows the detector refused."""
        ...

    def waiting(self) -> int | None:
        """Return how many files wait to be read, None for other sources."""
        ...

    def notices(self) -> tuple[str, ...]:
        """Return what is wrong with the source itself, as of the last look."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


def salvage(
    intake: Intake,
    raw: pl.DataFrame,
    origin: str,
    ends: pl.DataFrame,
    *,
    is_text: bool,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Portion], list[Refusal]]:
    """Return clean portions of raw rows in order, and the rows that would have spoilt the reading.

    Args:
        intake: cleans. raw: rows as the source holds them. origin: for messages.
        ends: ``series_id, time`` of the last row that each series has taken.
        is_text: every cell is text. numbers: of the rows, for messages; default from 1 on.

    Raises:
        DataError: rows are refused, and the settings say that this is an error.
    """
    assert intake.mapping is not None
    if not raw.height:
        return [], []
    decimal = intake.marks.decimal if is_text else "."
    numbers = range(1, raw.height + 1) if numbers is None else numbers
    span = f"rows {numbers[0]} to {numbers[-1]}"
    if "error" in (intake.mapping.bad_rows, intake.mapping.bad_cells):
        where = f"{origin}, {span}"
        return [intake.clean(RawTable(raw.lazy(), where, decimal=decimal))], []
    screened = intake.screen(raw, ends, origin, numbers, is_text=is_text)
    left_out = sum(finding.count for finding in screened.notes if finding.kind == "refused")
    notes = noted(screened.notes)
    table = intake.nothing()
    portions = [
        Portion(table=table, rows_read=left_out + screened.late, refused=left_out, late=screened.late, notes=notes)
    ]
    refusals = list(screened.refusals)
    parts = [screened.table] if screened.table.height else []
    while parts:
        part = parts.pop()
        where = f"{origin}, {part.height} of {span}"
        try:
            portions.append(intake.clean_screened(RawTable(part.lazy(), where, decimal=decimal)))
        except DataError as error:  # of a kind that looking at rows does not find: halves tell where
            if part.height == 1:
                refusals.append(Refusal(where, str(error), 1))
            else:
                middle = part.height // 2
                parts += [part.slice(middle), part.head(middle)]
    return portions if notes or screened.late else portions[1:], refusals


class TablePoll:
    """Rows of a SQL table after a key. A position is the key of the last row taken, and their number.

    Args:
        settings: the source. intake: cleans its rows. clock: seconds, for tests.
    """

    def __init__(self, settings: TableSource, intake: Intake, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle = settings.settle_seconds
        self._intake = intake
        self._clock = clock
        self._table = KeyedTable(settings, settings.key, list(intake.wanted))
        self._seen: list[tuple[float, Key]] = []  # newest keys that were not known before, and when they were seen
        self._rest: float | None = None
        self._said: tuple[str, ...] = ()

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return the rows after the position whose key is known for long enough."""
        last = read_key(position)
        newest = self._look(last)
        now = self._clock()
        if newest is not None and newest != last and (not self._seen or self._seen[-1][1] != newest):
            self._seen.append((now, newest))
        settled = [at for at, (moment, _) in enumerate(self._seen) if now - moment >= self._settle]
        self._rest = None
        if not settled:
            self._rest = self._seen[0][0] + self._settle - now if self._seen else None
            return None
        upto = self._seen[settled[-1]][1]
        rows, key = self._table.after(last, upto, limit)
        if key is None or key == upto:
            self._seen = self._seen[settled[-1] + 1 :]
        if key is None:
            self._rest = self._seen[0][0] + self._settle - now if self._seen else None
            return None
        first = int(position.get("rows", 0)) + 1
        numbers = range(first, first + rows.height)
        portions, refused = salvage(self._intake, rows, self._table.origin, ends, is_text=False, numbers=numbers)
        return Offer(
            portions=tuple(portions),
            position={**write_key(key), "rows": first - 1 + rows.height},
            what=f"{self._table.origin} up to key {key}",
            refusals=tuple(refused),
        )

    def _look(self, last: Key | None) -> Key | None:
        """Return the greatest key where rows may follow; note what keeps rows from ever being read."""
        seen = self._table.look(last)
        said = []
        if seen.has_fallen:
            said.append(
                f"{self._table.origin}: the greatest key is {seen.newest}, below the last one taken ({last}): the "
                f"table was emptied, or its numbering began again. Rows up to key {last} are not read: let keys go on "
                "from there, or start the watch anew (reset=true; ingest what was judged first)"
            )
        if seen.keyless:
            said.append(
                f"{self._table.origin}: {seen.keyless} rows have no key ('{self._table.key}' is NULL) and are not "
                "read: give them one that is greater than all before"
            )
        self._said = tuple(said)
        return None if seen.has_fallen else seen.newest

    def notices(self) -> tuple[str, ...]:
        """Return that keys have fallen or are missing."""
        return self._said

    def check(self) -> None:
        """Raise what a first look raises: no such table or column, no answer."""
        self._table.newest()

    def rest(self) -> float | None:
        """Return seconds until keys seen already have settled."""
        return self._rest

    def refuse(self, offer: Offer) -> Offer:
        """Return the same place without rows."""
        return without_rows(offer)

    def waiting(self) -> int | None:
        """Tell nothing: counting rows would read them."""
        return None

    def close(self) -> None:
        """Close the database."""
        self._table.close()


def without_rows(offer: Offer) -> Offer:
    """Return the same place without rows."""
    return Offer(
        portions=(),
        position=offer.position,
        what=offer.what,
        refusals=offer.refusals,
        files=offer.files,
        forgotten=offer.forgotten,
    )
