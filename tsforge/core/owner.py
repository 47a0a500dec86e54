"""Which process holds a piece of work, and whether that process is certainly gone."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from tsforge.core.errors import BackendError


def _process_namespace() -> str:
    """Return the process-id namespace: two containers may share a host name but not their process ids."""
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""


def _start_mark(pid: int) -> str | None:
    """Return when a live process started (kernel ticks since boot), "" where that is unknown, None if it is gone."""
    if not Path("/proc/self/stat").exists():
        return "" if _answers_signal(pid) else None
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the command name before ")" may hold spaces
    return None if fields[0] in "ZX" else fields[19]  # a zombie can do no more work


def _answers_signal(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True)
class Owner:
    """A process somewhere; ``mark`` (its start time) tells it from a later process that was given the same id."""

    host: str
    pid: int
    mark: str

    @classmethod
    def current(cls) -> Owner:
        """Return the running process."""
        return cls(f"{socket.gethostname()}/{_process_namespace()}", os.getpid(), _start_mark(os.getpid()) or "")

    @classmethod
    def parse(cls, text: str) -> Owner:
        """Return the owner written by ``str(owner)``.

        Raises:
            BackendError: the text does not name an owner.
        """
        parts = text.rsplit(":", 2)
        if len(parts) != 3 or not parts[1].isdigit():
            raise BackendError(f"a stored record names the owner '{text}'; expected host:pid:mark, it is damaged")
        return cls(parts[0], int(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.mark}"

    def is_gone(self) -> bool:
        """Return True only when the process certainly ended: same host, and its id is free or taken by another one."""
        if self.host != Owner.current().host:
            return False
        mark = _start_mark(self.pid)
        return mark is None or (mark != "" and self.mark != "" and mark != self.mark)
