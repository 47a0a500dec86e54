"""Writes that are whole or absent: a temporary sibling, flushed to disk, then one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsforge.core.errors import BackendError


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(path: Path, error: OSError) -> BackendError:
    return BackendError(
        f"cannot write {path}: {error.strerror or error}; nothing was changed, free space or choose another folder"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on any error it is removed.

    Raises:
        BackendError: the folder is read-only or the disk is full; ``path`` keeps its old content.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise _explain(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; on success it is renamed to ``path``, on any error it is removed whole.

    Args:
        path: the final folder.
        replace: exchange an existing folder (it is moved aside first and removed after the rename); otherwise an
            existing ``path`` is an error.

    Raises:
        BackendError: ``path`` exists and ``replace`` is False, the place is read-only or the disk is full.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise BackendError(f"{path} exists already; remove it or choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise _explain(path, error) from error
    try:
        yield temporary
        for item in temporary.rglob("*"):
            _sync(item)
        _sync(temporary)
        os.chmod(temporary, 0o755)
        if path.exists():
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _explain(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
