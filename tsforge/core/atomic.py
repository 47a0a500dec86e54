"""Writes that are whole or absent: a temporary sibling, flushed to disk, then one rename."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsforge.core.errors import BackendError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
# an older kernel, another file system, layers of a container, a sandbox
_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")  # how polars ends what the system told it
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a disk that refuses into one message, whoever wrote: Python, or polars by its own means."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error.strerror or str(error)) from error
    except _polars_error() as error:
        found = _OF_SYSTEM.search(str(error))
        if found is None:
            raise
        raise _explain(path, os.strerror(int(found.group(1)))) from error


def _polars_error() -> tuple[type[Exception], ...]:
    """Return what polars raises, nothing where it is not loaded; asked only when something was raised."""
    polars = sys.modules.get("polars")
    return () if polars is None else (polars.exceptions.PolarsError,)


def _explain(path: Path, why: str) -> BackendError:
    return BackendError(f"cannot write {path}: {why}; nothing was changed, free space or choose another folder")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on any error it is removed.

    Raises:
        BackendError: the folder is read-only or the disk is full; ``path`` keeps its old content.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _explained(path):
            yield temporary
            sync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed writers of ``atomic_file`` left in a folder.

    For one who holds the lock of the folder: those of a writer at work look the same.

    Raises:
        BackendError: the folder is read-only.
    """
    for leftover in folder.glob(".*.tmp"):
        with _explained(leftover):
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; on success it is renamed to ``path``, on any error it is removed whole.

    Args:
        path: the final folder.
        replace: exchange an existing folder in one step, where system and file system can; elsewhere it is moved
            aside (``.NAME.PID.old``) first, and a process killed in between leaves it there. Otherwise an existing
            ``path`` is an error.

    Raises:
        BackendError: ``path`` exists and ``replace`` is False, the place is read-only or the disk is full.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise BackendError(f"{path} exists already; remove it or choose another name")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _explained(path):
            yield temporary
            for item in temporary.rglob("*"):
                sync(item)
            sync(temporary)
            os.chmod(temporary, 0o755)
            if path.exists():
                _take_over(temporary, path)
            else:
                os.rename(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_over(temporary: Path, path: Path) -> None:
    """Give the new folder the name of an existing one; the old one is gone then, or lies at ``temporary``."""
    if _exchange(temporary, path):
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        if not path.exists():
            os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders take each other's name in one step; False where that cannot be done, nothing is changed then."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # an older C library
        return False
    if renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code))
