"""Lines of standard input: taken as they come, a row a line, until the input ends."""

from __future__ import annotations

import csv
import math
import os
import select
import sys
from typing import Any

import polars as pl

from tsforge.app.watch.intake import Intake, csv_table, json_table
from tsforge.app.watch.screening import Refusal
from tsforge.app.watch.settings import StdinSource
from tsforge.app.watch.sources import Offer, salvage, without_rows
from tsforge.core.errors import BackendError, DataError, listing

_BLOCK = 1 << 20
_LONGEST_LINE = 1 << 24


class Lines:
    """Standard input. A position counts rows; what was sent before is known by its times, not by its number.

    Args:
        settings: the source. intake: cleans its rows.
        handle: file descriptor to read, default that of standard input.
    """

    def __init__(self, settings: StdinSource, intake: Intake, handle: int | None = None) -> None:
        self._settings = settings
        self._intake = intake
        self._handle = sys.stdin.fileno() if handle is None else handle
        self._buffer = b""
        self._lines: list[str] = []
        self._header: list[str] | None = None
        self.has_ended = False

    @property
    def handle(self) -> int:
        """File descriptor that can be waited for."""
        return self._handle

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return the rows that have come, at most ``limit``."""
        self._fill(limit)
        if self._settings.format == "csv" and self._header is None and self._lines:
            self._header = self._read_header(self._lines.pop(0))
        lines, self._lines = self._lines[:limit], self._lines[limit:]
        if not lines:
            return None
        first = int(position.get("rows", 0)) + 1
        wanted = list(self._intake.wanted)
        if self._settings.format == "csv":
            table, kept, wrong = csv_table(lines, self._header or [], self._intake.marks)
        else:
            table, kept, wrong = json_table(lines, wanted)
        rows = self._intake.mapping
        if wrong and rows is not None and rows.bad_rows == "error":
            raise DataError(
                f"standard input from row {first} on: {listing(wrong, 3)}; or set source.rows.bad_rows=drop"
            )
        is_text = self._settings.format == "csv"
        numbers = [first - 1 + line for line in kept]
        portions, refused = salvage(self._intake, table, "standard input", ends, is_text=is_text, numbers=numbers)
        return Offer(
            portions=tuple(portions),
            position={"rows": first - 1 + len(lines)},
            what=f"standard input up to row {first - 1 + len(lines)}",
            refusals=(*(Refusal(f"standard input from row {first} on", reason, 1) for reason in wrong), *refused),
        )

    def _fill(self, limit: int) -> None:
        """Read what is there without waiting for more, up to a portion."""
        while not self.has_ended and len(self._lines) <= limit and select.select([self._handle], [], [], 0)[0]:
            try:
                block = os.read(self._handle, _BLOCK)
            except OSError as error:
                raise BackendError(f"cannot read standard input: {error.strerror or error}") from error
            self.has_ended = not block
            *whole, self._buffer = (self._buffer + block).split(b"\n")
            if self.has_ended and self._buffer:
                whole.append(self._buffer)
                self._buffer = b""
            if len(self._buffer) > _LONGEST_LINE:
                raise DataError(f"standard input: a line has more than {_LONGEST_LINE} bytes; write one row a line")
            try:
                # what cannot be decoded is told apart from characters, and costs its line
                texts = [line.decode(self._intake.marks.encoding, "surrogateescape").rstrip("\r") for line in whole]
            except UnicodeError as error:
                raise DataError(f"standard input is not {self._intake.marks.encoding} text ({error})") from error
            self._lines += [text for text in texts if text.strip()]

    def _read_header(self, line: str) -> list[str]:
        try:
            names = next(csv.reader([line.removeprefix("\ufeff")], delimiter=self._intake.marks.separator), [])
        except csv.Error as error:
            raise DataError(f"the header of standard input cannot be read ({error})") from error
        missing = [name for name in self._intake.wanted if name not in names]
        if missing:
            raise DataError(
                f"the header of standard input lacks {listing(missing)} (it has {listing(names, 20)}); the first line "
                "must name the columns, and source.rows says what they are called"
            )
        repeated = [name for name in self._intake.wanted if names.count(name) > 1]
        if repeated:
            raise DataError(
                f"the header of standard input has repeated column name(s): {listing(repeated)}; rename them"
            )
        return names

    def rest(self) -> float | None:
        """Return 0 while lines are left that were read already; the input may go on for ever, until it ends."""
        if self._lines:
            return 0.0
        return None if self.has_ended else math.inf

    def refuse(self, offer: Offer) -> Offer:
        """Return the same place without rows."""
        return without_rows(offer)

    def waiting(self) -> int | None:
        """Tell nothing."""
        return None

    def notices(self) -> tuple[str, ...]:
        """Tell nothing."""
        return ()

    def close(self) -> None:
        """Leave standard input to its owner."""
