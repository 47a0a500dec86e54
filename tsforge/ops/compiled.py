"""C++ kernels compiled for this machine on first use: build, cache, load, call.

A kernel is one file ``csrc/NAME.cpp`` of plain C functions (``extern "C"``, raw pointers, no torch headers) that the
host compiler turns into a shared library and ctypes loads; calls release the interpreter's lock. Without a compiler,
or where it fails, only speed is lost: ``unavailable_reason`` says why and the caller takes its torch path.

Why not torch's C++ extension tooling: it compiles torch's headers each time, which takes several times as long as a
kernel here; it needs ninja; and what it builds belongs to one torch version.

The library is stored as ``NAME-KEY-DIGEST.so`` in a folder of this user alone (``$XDG_CACHE_HOME/tsforge/compiled``,
else ``~/.cache/...``). KEY covers the sources, flags, compiler, processor and tsforge version: ``-march=native`` code
must not travel to another processor through a shared home. DIGEST is the content's own, so that a file cut short by a
full disk or a crash is rebuilt, never loaded. A library appears under its name in one step (rename), so that several
processes may build at once and an interrupt leaves nothing behind. A folder or file of another user, or one that
others may write to, is refused: loading it would run their code.

``TSFORGE_COMPILED``: ``auto`` (default), ``off`` (torch paths only, on a GPU too) or ``require`` (a kernel that cannot
be had is a ``BackendError``). ``CXX`` names another compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsforge import __version__
from tsforge.core.errors import BackendError, ConfigError, nearest
from tsforge.core.logs import get_logger

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-std=c++17", "-pthread")
MODES = ("auto", "off", "require")
_COMPILERS = ("c++", "g++", "clang++")
_SOURCES = Path(__file__).with_name("csrc")
_SECONDS = 300  # of one compiler run; far beyond any of ours, so only a hanging one meets it

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Outcome:
    loaded: ctypes.CDLL | None
    reason: str | None


_outcomes: dict[str, _Outcome] = {}
_told: set[str] = set()
_lock = threading.Lock()


class _Unavailable(Exception):
    """The text is the reason."""


def unavailable_reason(name: str) -> str | None:
    """Return None when kernel ``name`` can be called, else why not; the first call in a process builds or loads it.

    Raises:
        ConfigError: ``TSFORGE_COMPILED`` is none of its values.
        BackendError: it is ``require`` and the kernel cannot be had.
    """
    return settled(f"compiled kernel {name}", lambda: _outcome(name).reason)


def settled(what: str, reason_of: Callable[[], str | None]) -> str | None:
    """Return why ``what`` cannot be used, or None, as ``TSFORGE_COMPILED`` has it; in mode auto a warning says so once.

    Raises:
        ConfigError, BackendError: see ``unavailable_reason``.
    """
    mode = _mode()
    if mode == "off":
        return "TSFORGE_COMPILED=off"
    reason = reason_of()
    if reason is not None and mode == "require":
        raise BackendError(f"TSFORGE_COMPILED=require, but {what} is not available: {reason}")
    if reason is not None and what not in _told:
        _told.add(what)
        logger.warning("no %s, the slower torch path is used: %s", what, reason)
    return reason


def _mode() -> str:
    mode = os.environ.get("TSFORGE_COMPILED") or "auto"
    if mode not in MODES:
        raise ConfigError(f"TSFORGE_COMPILED={mode} is none of {', '.join(MODES)}{nearest(mode, MODES)}")
    return mode


def outlook() -> str:
    """Return in words whether kernels can be built here and where they are kept; nothing is built.

    Raises:
        ConfigError, BackendError: see ``unavailable_reason``.
    """
    mode = _mode()
    if mode == "off":
        return "switched off (TSFORGE_COMPILED=off)"
    try:
        return f"{mode}: {shlex.join(_compiler())}, kept in {_cache_folder()}"
    except _Unavailable as error:
        if mode == "require":
            raise BackendError(f"TSFORGE_COMPILED=require, but no kernel can be built here: {error}") from error
        return f"{mode}: none, the slower torch paths are used: {error}"


def call(name: str, symbol: str, *arguments: Tensor | int | float | None) -> None:
    """Call C function ``symbol`` of kernel ``name``, which must be available.

    A tensor goes as the pointer to its data (CPU, contiguous; the caller answers for dtype and size), None as a null
    pointer, int as ``int64_t``, float as ``double``.

    Raises:
        BackendError: the kernel is not available.
        ValueError: a tensor has no plain memory to point to.
    """
    library = _outcome(name).loaded
    if library is None:
        raise BackendError(f"kernel {name} is not available: {_outcome(name).reason}")
    function = getattr(library, symbol)
    function.restype = None
    function(*[_c_value(argument) for argument in arguments])


def threads() -> int:
    """Return how many threads a kernel may use: as many as torch."""
    return torch.get_num_threads()


def _c_value(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or not argument.is_contiguous() or argument.is_conj() or argument.is_neg():
            raise ValueError(f"a kernel reads contiguous CPU memory, got {argument.device}, {argument.stride()}")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def _outcome(name: str) -> _Outcome:
    found = _outcomes.get(name)
    if found is None:
        with _lock:
            found = _outcomes.get(name)
            if found is None:
                found = _outcomes[name] = _make(name)
    return found


def _make(name: str) -> _Outcome:
    """Build or load once; a failure is remembered, so that it costs its time once."""
    try:
        return _Outcome(ctypes.CDLL(str(_library_path(name))), None)
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        return _Outcome(None, str(error))


def _library_path(name: str) -> Path:
    """Return the stored library, built now if there is none."""
    if os.name != "posix":
        raise _Unavailable(f"no build for {platform.system()}")
    source = _SOURCES / f"{name}.cpp"
    if not source.is_file():
        raise _Unavailable(f"{source} is missing from this installation")
    compiler = _compiler()
    folder = _cache_folder()
    stem = f"{name}-{_key(source, compiler)}"
    for stored in sorted(folder.glob(f"{stem}-*.so")):
        if _mine(stored) and stored.stem.rpartition("-")[2] == _digest(stored.read_bytes()):
            return stored
    logger.info("compiling %s for this machine, once", name)
    return _build(source, compiler, folder, stem)


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        command = shlex.split(given)
        if not command or shutil.which(command[0]) is None:
            raise _Unavailable(f"CXX={given} is not a program")
        return command
    for candidate in _COMPILERS:
        if shutil.which(candidate):
            return [candidate]
    raise _Unavailable(f"no C++ compiler (looked for CXX, {', '.join(_COMPILERS)}); install one, e.g. g++")


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")  # by its standard, a relative path counts as none
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    folder = base / "tsforge" / "compiled"
    try:
        base.mkdir(parents=True, exist_ok=True)
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
            if not _mine(place):
                raise _Unavailable(
                    f"{place} is a link, belongs to another user or others may write to it; chmod go-w it or set "
                    "XDG_CACHE_HOME"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise _Unavailable(f"cannot use the cache folder {folder}: {error}; set XDG_CACHE_HOME") from error
    return folder


def _mine(path: Path) -> bool:
    status = path.lstat()  # not through a link: it would answer for its target
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _key(source: Path, compiler: list[str]) -> str:
    asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS, check=False)
    if asked.returncode:
        raise _Unavailable(f"{shlex.join(compiler)} --version failed: {_last_line(asked.stderr)}")
    parts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts += [repr((FLAGS, compiler, __version__)).encode(), asked.stdout, _processor()]
    return _digest(b"\0".join(_digest(part).encode() for part in parts))


def _processor() -> bytes:
    """Return what tells processors apart: model and instruction sets."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux only
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        names = ("model", "flags", "Features", "CPU ", "isa")
        lines += [line for line in text.splitlines() if line.startswith(names)]
    return "\n".join(lines).encode()


def _build(source: Path, compiler: list[str], folder: Path, stem: str) -> Path:
    handle, temporary = tempfile.mkstemp(prefix=f"{stem}-", suffix=".part", dir=folder)
    os.close(handle)
    part = Path(temporary)
    try:
        failure = _compile([*compiler, *FLAGS, str(source), "-o", temporary])
        if failure is not None:  # some compilers know no native processor
            plain = [flag for flag in FLAGS if flag != "-march=native"]
            failure = _compile([*compiler, *plain, str(source), "-o", temporary])
        if failure is not None:
            raise _Unavailable(f"{shlex.join(compiler)} cannot compile {source.name}: {failure}")
        part.chmod(0o600)
        library = folder / f"{stem}-{_digest(part.read_bytes())}.so"
        os.replace(part, library)
        return library
    finally:
        part.unlink(missing_ok=True)


def _compile(command: list[str]) -> str | None:
    """Return why the command failed, or None."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no end after {_SECONDS} s"
    return _last_line(done.stderr) if done.returncode else None


def _last_line(output: bytes) -> str:
    """Return the first line with an error, else the last line."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:] or ["no message"])[0]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
