"""Whether Triton kernels can run here: Triton, a device for it, and whatever its first launch needs.

Triton builds a launcher with the host's C compiler and Python's headers when a kernel first runs, and compiles the
kernel for the card; a machine may lack any of them. So the first question of a process launches a kernel of one number
and looks at it. In Triton's interpreter (``TRITON_INTERPRET=1``) tensors on the CPU are taken too; tests use it.
``TSFORGE_COMPILED`` counts here as for compiled kernels (:mod:`tsforge.ops.compiled`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
from functools import lru_cache

import torch

from tsforge.ops import compiled


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def unavailable_reason(device: torch.device) -> str | None:
    """Return why no Triton kernel can run on tensors of this device, or None.

    Raises:
        ConfigError: ``TSFORGE_COMPILED`` is none of its values.
        BackendError: it is ``require`` and a GPU cannot run Triton.
    """
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the tensors are on {device.type}, Triton needs an NVIDIA GPU"
    return compiled.settled("Triton on this GPU", lambda: _trial(device.type, device.index))


def _failures() -> tuple[type[Exception], ...]:
    """Return what a missing compiler, header or driver, or a card that is too old, is known to raise."""
    known = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    failures: tuple[type[Exception], ...] = (*known, TypeError, ValueError, subprocess.SubprocessError)
    with contextlib.suppress(ImportError):
        failures = (*failures, importlib.import_module("triton.errors").TritonError)
    return failures


@lru_cache
def _trial(kind: str, index: int | None) -> str | None:
    """Return what goes wrong in a first launch, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (it comes with the CUDA builds of torch on Linux)"
    try:
        from tsforge.ops._triton_trial import set_one

        number = torch.zeros(1, device=torch.device(kind, index) if index is not None else kind)
        set_one[(1,)](number)
        return None if float(number) == 1.0 else "a trial kernel gave a wrong number"
    except _failures() as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"a trial kernel failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"
