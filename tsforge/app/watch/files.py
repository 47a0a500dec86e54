"""New files of a folder, each read once in the order of names; half-written ones are left alone, bad ones refused."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.app.watch.intake import FILE_KINDS, Intake, Portion
from tsforge.app.watch.screening import Refusal, RowsRefused
from tsforge.app.watch.settings import FolderSource
from tsforge.app.watch.sources import Offer, without_rows
from tsforge.core.errors import BackendError, DataError
from tsforge.core.logs import get_logger
from tsforge.data.io import is_ended
from tsforge.data.watch_state import SourceFile

_LOG = get_logger(__name__)
UNENDED_SECONDS = 60.0  # a CSV file that ends within a line is taken as it is once it stayed so for so long


@dataclass(frozen=True)
class _Look:
    """A file as seen: what changes when it changes, and seconds since its last change by the clock of the disk."""

    stamp: str
    age: float


class Folder:
    """Files of a folder. A position is the file at work, its stamp and the rows of it that are taken.

    Args:
        settings: the source. intake: reads its files.
        done: files read or refused before, by name; kept up to date by ``settle``.
        clock: seconds, for tests.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(
        self,
        settings: FolderSource,
        intake: Intake,
        done: dict[str, SourceFile],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._path = Path(settings.path).expanduser()
        self._intake = intake
        self._done = done
        self._clock = clock
        self._seen: dict[str, tuple[str, float]] = {}  # stamps of files not settled yet, and since when
        self._rest: float | None = None
        self._waiting = 0
        self._absent: set[str] = set()  # files read before that are gone, until that is stored
        self._told: set[tuple[str, str]] = set()
        self._open: tuple[str, str, Portion] | None = None
        self._start = 0  # row of that file with which the last offer begins
        if not self._path.is_dir():
            raise DataError(f"there is no folder {self._path}; make it, or set source.path")

    def next(self, position: dict[str, Any], ends: pl.DataFrame, limit: int) -> Offer | None:
        """Return rows of the file at work, or of the next one; files are never overtaken by later names."""
        del ends
        looks = self._look()
        self._note(looks)
        gone = tuple(sorted(self._absent - set(looks)))
        fresh = sorted(name for name, look in looks.items() if self._is_new(name, look.stamp))
        if position.get("file") in fresh:  # it was begun; names that came meanwhile must wait
            fresh.remove(position["file"])
            fresh.insert(0, position["file"])
        self._waiting = len(fresh)
        self._rest = None
        if not fresh:
            return None
        name = fresh[0]
        look = looks[name]
        left = self._unsettled(name, look)
        if left > 0:
            self._rest = left
            return None
        begun = position if position.get("file") == name and position.get("stamp") == look.stamp else {}
        return self._offer(name, look.stamp, int(begun.get("rows", 0)), limit, gone)

    def _offer(self, name: str, stamp: str, start: int, limit: int, gone: tuple[str, ...]) -> Offer | None:
        if self._open is None or self._open[:2] != (name, stamp):
            try:
                self._open = (name, stamp, self._intake.read_file(self._path / name))
            except DataError as error:
                if not (self._path / name).exists():
                    return None
                rows = error.rows if isinstance(error, RowsRefused) else 0
                return self._refused(name, stamp, Refusal(name, str(error), rows), gone)
        portion, self._start = self._open[2], start
        table = portion.table.slice(start, limit)
        is_last = start + table.height >= portion.table.height
        self._waiting -= int(is_last)
        part = Portion(table=table, rows_read=table.height)
        if start == 0:  # what is not in the table counts once
            left_out = portion.refused + portion.late + portion.empty
            part = replace(portion, table=table, rows_read=table.height + left_out)
        return Offer(
            portions=(part,),
            position={} if is_last else {"file": name, "stamp": stamp, "rows": start + table.height},
            what=name,
            files=(SourceFile(name=name, stamp=stamp, refused=False),) if is_last else (),
            forgotten=gone,
            divisible=False,
        )

    def _refused(self, name: str, stamp: str, refusal: Refusal, gone: tuple[str, ...]) -> Offer:
        self._waiting -= 1
        return Offer(
            portions=(),
            position={},
            what=name,
            refusals=(refusal,),
            files=(SourceFile(name=name, stamp=stamp, refused=True),),
            forgotten=gone,
            divisible=False,
        )

    def settle(self, offer: Offer) -> None:
        """Take note of a committed offer."""
        for item in offer.files:
            self._done[item.name] = item
            self._seen.pop(item.name, None)
            self._absent.discard(item.name)
            self._open = None
        self._absent.difference_update(offer.forgotten)

    def _note(self, looks: dict[str, _Look]) -> None:
        """Forget files that are gone, so that a new one of that name is read, and tell of files changed since."""
        for name in [name for name in self._done if name not in looks]:
            del self._done[name]
            self._absent.add(name)
        for name, look in looks.items():
            known = self._done.get(name)
            if known is None or known.refused or known.stamp == look.stamp or (name, look.stamp) in self._told:
                continue
            self._told.add((name, look.stamp))
            _LOG.warning(
                "%s has changed since it was read, and is not read again: put new rows into a file of another name",
                name,
            )

    def _is_new(self, name: str, stamp: str) -> bool:
        """Return whether a file is to be read: unknown, or refused and changed since."""
        known = self._done.get(name)
        return known is None or (known.refused and known.stamp != stamp)

    def _unsettled(self, name: str, look: _Look) -> float:
        """Return seconds that a file has still to stay as it is before it is read."""
        now = self._clock()
        wait = self._settings.settle_seconds
        stamp, since = self._seen.get(name, ("", now))
        if stamp != look.stamp:
            self._seen[name] = (look.stamp, since := now)
        quiet = max(now - since, look.age)
        if quiet >= wait > 0.0 and not self._is_ended(name):  # its last number may be half a number
            wait = max(wait, UNENDED_SECONDS)
        return max(0.0, wait - quiet)

    def _is_ended(self, name: str) -> bool:
        """Return whether a file ends with the end of a line, as far as that tells anything."""
        if not name.lower().endswith(".csv"):
            return True
        try:
            return is_ended(self._path / name, self._intake.marks.encoding)
        except (DataError, OSError):  # reading it will say what is wrong
            return True

    def _look(self) -> dict[str, _Look]:
        """Return the files that could be read.

        Raises:
            BackendError: the folder cannot be listed.
        """
        found = {}
        present = time.time()
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(".") or not name.lower().endswith(FILE_KINDS):
                        continue
                    if not fnmatch.fnmatchcase(name, self._settings.pattern):
                        continue
                    try:
                        if not entry.is_file():
                            continue
                        facts = entry.stat()
                    except FileNotFoundError:
                        continue
                    stamp = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
                    found[name] = _Look(stamp, present - max(facts.st_mtime, facts.st_ctime))
        except OSError as error:
            raise BackendError(f"cannot look into {self._path}: {error.strerror or error}") from error
        self._seen = {name: value for name, value in self._seen.items() if name in found}
        return found

    def rest(self) -> float | None:
        """Return seconds until the next file can be read, if it stays as it is."""
        return self._rest

    def refuse(self, offer: Offer) -> Offer:
        """Return the offer that lays the rest of a file aside whose rows the detector refused."""
        assert self._open is not None
        name, stamp, whole = self._open
        files = (SourceFile(name=name, stamp=stamp, refused=True),)
        left = whole.table.height - self._start if self._start else whole.rows_read
        return replace(without_rows(offer), position={}, files=files, rows_left=left)

    def waiting(self) -> int | None:
        """Return how many files were not read at the last look."""
        return self._waiting

    def notices(self) -> tuple[str, ...]:
        """Tell nothing."""
        return ()

    def close(self) -> None:
        """Hold nothing."""
        self._open = None
