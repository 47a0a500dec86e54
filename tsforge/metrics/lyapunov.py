"""Lyapunov spectrum of a map by QR accumulation, and the Kaplan-Yorke dimension.

``Q R = J(z_t) Q``, ``lambda_i = mean ln |R_ii|``, in float64. Source: Benettin et al. 1980; Geist et al. 1990.

Jacobians of many states are asked for at once and multiplied in blocks of ``every`` as stacks of matrices, so that only
the orbit itself and one QR a block run one after another (LAPACK directly: about 3 us for a 3 x 3 matrix).

Legend: M states, B trajectories, k exponents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg.lapack import dgeqrf, dorgqr

from tsforge.core.errors import ConfigError, DataError

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_CHUNK_BYTES = 16_000_000  # of Jacobians held at once
_PARTS = 10  # of the run, for the standard error


@dataclass(frozen=True, kw_only=True, eq=False)
class LyapunovSpectrum:
    """Lyapunov exponents and how they were found; ``numpy.asarray(result)`` gives the exponents.

    Attributes:
        values: [k] falling, per unit of time (per step with dt 1); -inf where the map is singular, all NaN when the
            orbit diverged.
        standard_error: [k] from the spread between ten parts of the run; NaN where there are fewer blocks than that.
        steps: steps of each trajectory that entered.
        trajectories: B.
        every: steps between two orthogonalisations.
        align: steps before these, in which the directions turn into place.
        transient: steps dropped before that.
        dt: time of one step.
    """

    values: Floats
    standard_error: Floats
    steps: int
    trajectories: int
    every: int
    align: int
    transient: int
    dt: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        return np.array(self.values, dtype=dtype)

    @property
    def kaplan_yorke(self) -> float:
        """The Kaplan-Yorke dimension; of the whole spectrum only."""
        return kaplan_yorke(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return exponents and configuration as plain values."""
        arrays = {"values": self.values.tolist(), "standard_error": self.standard_error.tolist()}
        return dataclasses.asdict(self) | arrays


def lyapunov_spectrum(
    step: Callable[[Floats], ArrayLike],
    jacobian: Callable[[Floats], ArrayLike],
    z0: ArrayLike,
    *,
    steps: int = 20_000,
    transient: int = 1000,
    align: int = 100,
    every: int = 1,
    dt: float = 1.0,
    exponents: int | None = None,
) -> LyapunovSpectrum:
    """Return the spectrum along the orbit of z0.

    Args:
        step: the map, states of the shape of z0 to the same.
        jacobian: states [..., M] to Jacobians [..., M, M] with entry (i, j) the derivative of state i by state j;
            called with many states of the orbit at once.
        z0: start [M], or starts [B, M] of trajectories run side by side: the exponents are then means over all, and
            ``steps`` of each trajectory can be fewer.
        steps: of each trajectory; a multiple of ``every``.
        transient: steps dropped first.
        align: further steps in which only the directions turn into place; a multiple of ``every``.
        every: steps between two orthogonalisations; 1 where some directions contract fast.
        dt: sampling interval; exponents are per unit of it.
        exponents: only the first so many; None = all M.

    Raises:
        DataError: z0 or the Jacobians have the wrong shape.
        ConfigError: a setting is out of range.
    """
    z: Floats = np.asarray(z0, dtype=np.float64)
    if z.ndim not in (1, 2) or not z.size:
        raise DataError(f"z0 must be [M] or [B, M], got shape {z.shape}")
    accumulator = _Accumulator(every=every, align=align, dt=dt, exponents=exponents)
    if steps < every or steps % every or align % every or transient < 0:
        raise ConfigError(
            f"steps {steps} (at least 1) and align {align} must be multiples of every {every}, transient {transient} "
            "not negative"
        )
    size = z.shape[-1]
    chunk = max(1, _CHUNK_BYTES // (8 * size * z.size))
    with np.errstate(over="ignore", invalid="ignore"):  # a diverging map overflows: the result is then NaN
        for _ in range(transient):
            z = np.asarray(step(z), dtype=np.float64)
        for first in range(0, align + steps, chunk):
            orbit = np.empty((min(chunk, align + steps - first), *z.shape))
            for row in orbit:
                row[...] = z
                z = np.asarray(step(z), dtype=np.float64)
            if not np.isfinite(orbit).all():
                accumulator.fail(size, z.size // size)
                break
            matrices = np.asarray(jacobian(orbit), dtype=np.float64)
            if matrices.shape != (*orbit.shape, size):
                raise DataError(f"jacobian gave shape {matrices.shape} for states of shape {orbit.shape}")
            accumulator.push(matrices)
    return accumulator.result(transient)


def spectrum_of_jacobians(
    jacobians: ArrayLike | Iterable[ArrayLike],
    *,
    align: int = 0,
    every: int = 1,
    dt: float = 1.0,
    exponents: int | None = None,
) -> LyapunovSpectrum:
    """Return the spectrum from Jacobians along an orbit, first step first.

    Args:
        jacobians: [T, M, M], or [T, B, M, M] of trajectories side by side, or an iterable of such pieces in order. At
            the end up to ``every - 1`` steps that fill no block are left out.
        align, every, dt, exponents: as in ``lyapunov_spectrum``.

    Raises:
        DataError: wrong shapes, or no full block.
        ConfigError: a setting is out of range.
    """
    accumulator = _Accumulator(every=every, align=align, dt=dt, exponents=exponents)
    for piece in [jacobians] if isinstance(jacobians, np.ndarray) else jacobians:  # type: ignore[union-attr]
        accumulator.push(np.asarray(piece, dtype=np.float64))
    return accumulator.result(0)


def kaplan_yorke(spectrum: ArrayLike) -> float:
    """Return ``j + (lambda_1 + .. + lambda_j) / |lambda_(j+1)|``, j the most exponents with a sum not below 0.

    0 when all are negative, M when even the whole sum is not negative, NaN when an exponent is NaN.

    Raises:
        DataError: not a list of exponents.
    """
    values = np.sort(np.asarray(spectrum, dtype=np.float64).ravel())[::-1]
    if not values.size:
        raise DataError("the Kaplan-Yorke dimension needs at least one exponent")
    if np.isnan(values).any():
        return float("nan")
    total = 0.0
    for count, value in enumerate(values):
        if total + value < 0.0:
            return count + total / abs(float(value))
        total += float(value)
    return float(values.size)


class _Accumulator:
    """Products of ``every`` Jacobians, one QR each, and the logarithms of the diagonals."""

    def __init__(self, *, every: int, align: int, dt: float, exponents: int | None) -> None:
        if every < 1 or align < 0 or not dt > 0.0 or (exponents is not None and exponents < 1):
            raise ConfigError(
                f"every >= 1, align >= 0, dt > 0 and exponents >= 1 are needed; got every={every}, align={align}, "
                f"dt={dt}, exponents={exponents}"
            )
        self.every, self.align, self.dt, self.exponents = every, align, dt, exponents
        self.rest: Floats | None = None
        self.frame: Floats | None = None  # [B, M, k]
        self.logs: list[Floats] = []
        self.failed = False

    def fail(self, size: int, trajectories: int) -> None:
        """Note that the orbit left the finite numbers."""
        self.failed = True
        if self.frame is None:
            self._start(size, trajectories)

    def push(self, jacobians: Floats) -> None:
        """Take the next Jacobians, [T, M, M] or [T, B, M, M]."""
        stack = jacobians[:, None] if jacobians.ndim == 3 else jacobians
        if stack.ndim != 4 or stack.shape[-1] != stack.shape[-2]:
            raise DataError(f"Jacobians must be [T, M, M] or [T, B, M, M], got shape {jacobians.shape}")
        if self.frame is None:
            self._start(stack.shape[-1], stack.shape[1])
        assert self.frame is not None
        if stack.shape[1:3] != self.frame.shape[:2]:
            raise DataError(f"Jacobians of shape {stack.shape[1:]} follow some of shape {self.frame.shape[:2]}")
        if not np.isfinite(stack).all():
            self.failed = True
        if self.failed:
            return
        if self.rest is not None:
            stack = np.concatenate([self.rest, stack])
        blocks = len(stack) // self.every
        self.rest = stack[blocks * self.every :]
        stack = stack[: blocks * self.every].reshape(blocks, self.every, *stack.shape[1:])
        product = stack[:, 0]
        for index in range(1, self.every):
            product = stack[:, index] @ product
        for factor in product:
            self._turn(factor)

    def _start(self, size: int, trajectories: int) -> None:
        count = size if self.exponents is None else self.exponents
        if count > size:
            raise ConfigError(f"{count} exponents were asked for, the states have {size}")
        # random directions: unit vectors could span an invariant subspace and miss the leading ones
        start = np.linalg.qr(np.random.default_rng(0).standard_normal((size, count)))[0]
        self.frame = np.repeat(start[None], trajectories, axis=0)

    def _turn(self, factor: Floats) -> None:
        assert self.frame is not None
        moved = factor @ self.frame
        if len(moved) == 1:
            # the block size of 32 lets LAPACK skip the query of its work space
            width = 32 * moved.shape[-1]
            packed, tau, _, _ = dgeqrf(moved[0], lwork=width)
            diagonal = packed.diagonal()[None]
            self.frame = dorgqr(packed, tau, lwork=width)[0][None]
        else:
            self.frame, upper = np.linalg.qr(moved)
            diagonal = np.diagonal(upper, axis1=-2, axis2=-1)
        with np.errstate(divide="ignore"):
            self.logs.append(np.log(np.abs(diagonal)).mean(axis=0))

    def result(self, transient: int) -> LyapunovSpectrum:
        """Return the exponents of all that was pushed."""
        skipped = math.ceil(self.align / self.every)
        logs = self.logs[skipped:]
        if self.frame is None or not (logs or self.failed):
            raise DataError(f"no block of {self.every} steps is left after {self.align} steps of alignment")
        trajectories, _, count = self.frame.shape
        values, error = np.full(count, np.nan), np.full(count, np.nan)
        if not self.failed:
            rates = np.array(logs) / (self.every * self.dt)
            values = rates.mean(axis=0)
            order = np.argsort(-values)
            if len(rates) >= _PARTS and np.isfinite(rates).all():
                parts = np.array([part.mean(axis=0) for part in np.array_split(rates, _PARTS)])
                error = parts.std(axis=0, ddof=1)[order] / math.sqrt(_PARTS)
            values = values[order]
        return LyapunovSpectrum(
            values=values,
            standard_error=error,
            steps=0 if self.failed else len(logs) * self.every,
            trajectories=trajectories,
            every=self.every,
            align=self.align,
            transient=transient,
            dt=self.dt,
        )
