"""Where compiled kernels cannot be tested: only where there is no compiler. One that fails to build is a failure."""

from __future__ import annotations

import os
import shutil

import pytest


def need_compiler() -> None:
    """Skip a test on a machine without a C++ compiler."""
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler on this machine")
