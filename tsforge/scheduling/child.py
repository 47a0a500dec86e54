"""One child process: output to a file, a time limit, and an orderly end when the scheduler stops."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tsforge.core.errors import BackendError

_LOOK_SECONDS = 0.05
_TAIL_BYTES = 4000


@dataclass(frozen=True, kw_only=True)
class ChildLimits:
    """How long a child may run, and how long it may take to end once told to."""

    timeout_seconds: float
    stop_seconds: float


@dataclass(frozen=True, kw_only=True)
class ChildResult:
    """How a child ended.

    Attributes:
        reason: ``exited`` by itself, ended by us after a ``timeout`` or because the scheduler was ``stopped``.
        exit_code: of the process; negative = ended by that signal.
        seconds: wall time.
        tail: the last lines of its output.
        log: the file with all of its output.
    """

    reason: Literal["exited", "timeout", "stopped"]
    exit_code: int
    seconds: float
    tail: str
    log: Path


def run_child(
    command: Sequence[str],
    log: Path,
    limits: ChildLimits,
    *,
    stop: threading.Event,
    environment: Mapping[str, str] | None = None,
) -> ChildResult:
    """Run a command to its end and return how it ended.

    The child leads its own process group: Ctrl-C in the terminal reaches only the scheduler, which passes it on as
    SIGTERM to the whole group and kills what is left after ``stop_seconds``.

    Args:
        command: program and arguments.
        log: file for standard output and error.
        limits: time limits.
        stop: set by the scheduler when it shuts down.
        environment: variables on top of our own.

    Raises:
        BackendError: the program or the log cannot be opened.
    """
    started = time.monotonic()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
    except OSError as error:
        raise BackendError(f"cannot start {command[0]} with its log {log}: {error.strerror or error}") from error
    reason: Literal["exited", "timeout", "stopped"] = "exited"
    try:
        while process.poll() is None:
            if time.monotonic() - started > limits.timeout_seconds:
                reason = "timeout"
            elif stop.is_set():
                reason = "stopped"
            if reason != "exited":
                _end(process, limits.stop_seconds)
                break
            stop.wait(_LOOK_SECONDS)
    finally:
        if process.poll() is None:
            _end(process, limits.stop_seconds)
    return ChildResult(
        reason=reason,
        exit_code=process.returncode,
        seconds=time.monotonic() - started,
        tail=_tail(log),
        log=log,
    )


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ask the group to end, then kill what is left of it."""
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    _signal_group(process, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)  # the group outlives its leader while grandchildren live
        else:
            process.send_signal(number)
    except ProcessLookupError:
        return


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"(its output {log} cannot be read: {error.strerror})"
    return text.strip()
