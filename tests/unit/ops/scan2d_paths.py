"""The loop of the 2-D scan, and its wavefront with a chosen spacing of kept states, on a case."""

from __future__ import annotations

from typing import Any

from scan2d_cases import Case

from tsforge.ops._scan2d_wavefront import scan2d_wavefront
from tsforge.ops.scan2d import Scan2D, scan2d_reference


def reference(case: Case, **options: Any) -> Scan2D:
    return scan2d_reference(case.x, case.dt, case.A, case.B, case.C, left=case.left, top=case.top, **options)


def wavefront(case: Case, every: int | None = None) -> Scan2D:
    y, h1, h2 = scan2d_wavefront(case.x, case.dt, case.A, case.B, case.C, case.left, case.top, every=every)
    return Scan2D(y, (h1, h2))
