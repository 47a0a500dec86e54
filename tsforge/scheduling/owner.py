"""Who holds a claim: host, process id and process start, and whether that process is certainly gone."""

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
    """Return the start time of a live process in kernel ticks, "" where the system does not tell, None if it is gone.

    A zombie counts as gone: it can no longer do work, it only waits for its parent.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return "" if _answers_signal(pid) else None
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the command name before ")" may hold spaces
    return None if fields[0] in "ZX" else fields[19]


def _answers_signal(pid: int) -> bool:
    if os.name == "nt":  # there, signal 0 ends the process; leave the verdict to the heartbeat
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
    """A process somewhere. ``mark`` tells it from a later process that got the same id."""

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
            raise BackendError(f"the run ledger names the owner '{text}'; expected host:pid:mark, the row is damaged")
        return cls(parts[0], int(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}:{self.mark}"

    def is_gone(self) -> bool:
        """Return True only when the process certainly ended: same host, and its id is free or taken by another one."""
        if self.host != Owner.current().host:
            return False
        mark = _start_mark(self.pid)
        return mark is None or (mark != "" and self.mark != "" and mark != self.mark)
