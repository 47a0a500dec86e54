"""How a benchmark tells that it goes on: a bar on a terminal, a log line a setting elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tsforge.core.logs import get_logger, log_event

_LOG = get_logger(__name__)
_SHOWN = ("data", "model", "context_length", "horizon", "seed", "status", "mse", "mae")


class Progress:
    """Counts of finished, failed and cached settings, and the time that is left by the mean of those done.

    Args:
        total: settings planned; fewer are run when fits turn out to have no random part.
        show: whether to say anything.
        bar: a rich progress bar, None for log lines.
    """

    def __init__(self, total: int, *, show: bool, bar: Any = None) -> None:
        self._show, self._bar, self._total = show, bar, total
        self._done = self._failed = self._cached = 0
        self._began = time.monotonic()
        self._task = None if bar is None else bar.add_task("benchmark", total=total, note="")

    @property
    def shows_training(self) -> bool:
        """Whether a fit in this process may draw its own progress."""
        return self._show and self._bar is None

    def advance(self, row: dict[str, Any]) -> None:
        """Take one finished, failed, skipped or cached setting into account."""
        self._done += 1
        self._failed += row["status"] == "failed"
        self._cached += bool(row.get("cached"))
        if not self._show:
            return
        if self._bar is None:
            fields = {key: row[key] for key in _SHOWN if row.get(key) is not None}
            log_event(_LOG, f"setting {self._done} of {self._total}", **fields, left=self.text_left())
        else:
            note = f"{self._failed} failed, {self._cached} cached, {self.text_left()}"
            self._bar.update(self._task, completed=self._done, note=f"{note}  {row['data']} {row['model'][:40]}")

    def drop(self, count: int) -> None:
        """Take settings out of the plan."""
        self._total -= count
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def text_left(self) -> str:
        """Return the time left in words, by the mean time of a measured setting."""
        measured = self._done - self._cached
        if not measured:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / measured * max(self._total - self._done, 0)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours} h {rest // 60} min left" if hours else f"{rest // 60} min {rest % 60} s left"


@contextmanager
def open_progress(total: int, *, show: bool) -> Iterator[Progress]:
    """Yield the progress of ``total`` settings; a bar where standard error is a terminal."""
    if not show or not sys.stderr.isatty():
        yield Progress(total, show=show)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        yield Progress(total, show=True, bar=bar)
