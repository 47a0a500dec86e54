"""Running a test file of Triton kernels a second time in Triton's interpreter, on the CPU.

The interpreter is chosen when triton is first imported, so a file runs itself again in a process with
``TRITON_INTERPRET=1``; there its tests that take a device get the CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    *(["cpu"] if INTERPRETING else []),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def no_interpreter() -> str | None:
    """Return why Triton's interpreter cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (there is none for this system)"
    triton = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    numpy = tuple(int(part) for part in np.__version__.split(".")[:2])
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton below 3.7 fails with numpy 2.4 and later"
    return None


PORTIONS = ["not slow", pytest.param("slow", marks=pytest.mark.slow)]


def run_in_interpreter(file: str, portion: str) -> None:
    """Run a portion of the tests of a file in the interpreter; skips where there is none.

    Raises:
        AssertionError: a test failed there, or none ran.
    """
    reason = no_interpreter()
    if reason:
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        f"not gpu and {portion}",
        file,
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
