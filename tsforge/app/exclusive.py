"""One process at a time on a folder of state."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsforge.core.errors import BackendError
from tsforge.core.owner import Owner

LOCK = "lock"


@contextmanager
def alone(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made; the system lets go of it when the process ends, however it ends.

    Args:
        folder: of the state.
        busy: what to say when another process holds it: ``stream 'x' is being brought up to date``.

    Raises:
        BackendError: another process holds it, or the folder cannot be written (a full disk too).
    """
    place = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = place.open("a+", encoding="utf-8")
    except OSError as error:
        raise BackendError(f"cannot write {folder}: {error.strerror or error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise BackendError(f"{busy} by another process ({holder}); wait until it has ended") from error
        except OSError as error:
            raise BackendError(f"cannot lock {place}: {error.strerror or error}") from error
        try:
            handle.truncate(0)
            os.write(handle.fileno(), str(Owner.current()).encode())  # unbuffered: nothing is left to fail at the close
        except OSError as error:
            raise BackendError(f"cannot write {place}: {error.strerror or error}; free space") from error
        try:
            yield
        finally:
            handle.truncate(0)


def holder(folder: Path) -> Owner | None:
    """Return the process that holds the lock of a folder, None where none does (as far as this host can see)."""
    try:
        owner = Owner.parse((folder / LOCK).read_text(encoding="utf-8").strip())
    except (OSError, BackendError):
        return None
    return None if owner.is_gone() else owner
