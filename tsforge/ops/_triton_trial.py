"""A Triton kernel that writes one number; imported on demand by ``triton_support``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-not-found,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def set_one(number):
    """Write 1."""
    tl.store(number, 1.0)
