"""Fixed points and k-cycles of a piecewise-linear map, with their stability (SCYFI; Eisenmann et al. 2023, 2310.17561).

Inside k consecutive regions F^k(z) = P z + q, so the only candidate is z* = (I - P)^-1 q. Either the orbit of z* visits
the assumed regions, which makes it a cycle with the eigenvalues of P as multipliers, or the search goes on from the
regions that it does visit. Many candidates are solved at once.

Deviations from the published algorithm, with the reason:

- The step from one pattern to the next is deterministic, so a chain ends at once where any chain has been before;
  the published search repeats such chains.
- Half of the start patterns are those of real orbits (from data states and from random points in a box around them),
  the others combine such regions freely; the published search draws uniformly and rarely meets a visited region.
- Every find adds the sequences that differ from its own in one unit.
- A cycle is accepted by its residual |F^k(z*) - z*|, told apart by the distance to every point of the known cycles, and
  rejected when a shorter period closes it; rounding to two decimals would merge points that are closer.
- Where few units bend the map (an AL-RNN), all regions are enumerated: the result is then complete.

Cycles that are not isolated (I - P singular, a line attractor) are not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ModelError
from tsforge.dynamics.piecewise import Array, Pattern, PiecewiseLinear, checked_states, piecewise_linear
from tsforge.ops.plrnn import Shallow

MAX_ENUMERATED = 12  # units that bend the map, times the period: at most 4096 candidates
RESIDUAL = 1e-8
SAME = 1e-6
_BATCH_ENTRIES = 4_000_000  # entries of the largest intermediate array, 32 MB
_BOX = 100.0  # random start points lie up to so many half-ranges of the data from their centre


@dataclass(frozen=True)
class SearchBudget:
    """When a search ends.

    Attributes:
        patience: start patterns in a row that lead to nothing new; every find starts the count again.
        starts: start patterns altogether.
        inner: candidates along one chain.
        batch: chains side by side (fewer for large maps).
    """

    patience: int = 4000
    starts: int = 40_000
    inner: int = 100
    batch: int = 250

    def __post_init__(self) -> None:
        """Refuse budgets that search nothing."""
        if min(self.patience, self.starts, self.inner, self.batch) < 1:
            raise ModelError(f"every part of a search budget must be at least 1, not {self}")


@dataclass(frozen=True, eq=False)
class Cycle:
    """A fixed point (period 1) or k-cycle.

    Attributes:
        points: (k, M), in the order of the orbit.
        multipliers: (M,) complex eigenvalues of the Jacobian of F^k, largest modulus first.
        residual: largest entry of |F^k(z) - z| at the first point.
    """

    points: Array
    multipliers: NDArray[np.complex128]
    residual: float

    @property
    def period(self) -> int:
        """Number of points k."""
        return len(self.points)

    @property
    def modulus(self) -> float:
        """Largest modulus of a multiplier: how much the cycle grows a deviation in one turn."""
        return float(abs(self.multipliers[0]))

    @property
    def kind(self) -> str:
        """``stable`` (attracts its surroundings), ``unstable`` (repels in every direction) or ``saddle``."""
        moduli = np.abs(self.multipliers)
        if moduli[0] < 1.0:
            return "stable"
        return "unstable" if moduli[-1] > 1.0 else "saddle"

    def to_dict(self) -> dict[str, Any]:
        """Return the cycle as plain numbers; multipliers as [real, imaginary] pairs."""
        return {
            "period": self.period,
            "kind": self.kind,
            "modulus": self.modulus,
            "multipliers": [[float(value.real), float(value.imag)] for value in self.multipliers],
            "points": self.points.tolist(),
            "residual": self.residual,
        }


def find_cycles(
    params: Shallow,
    states: Any,
    *,
    periods: Sequence[int] = (1,),
    clipped: bool = False,
    budget: SearchBudget | None = None,
    seed: int = 0,
) -> tuple[Cycle, ...]:
    """Find the fixed points (period 1) and cycles of a map: all of them where enumeration is possible, else by search.

    Args:
        params: shallow form of one group, see ``piecewise_linear``.
        states: (T, M) states of the data or of a free run, from which the search starts.
        periods: the lengths k to look for.
        clipped: the map is the clipped one.
        budget: of each period's search.
        seed: of the random start patterns.

    Returns:
        Cycles in the order of ``periods``, within one period by falling modulus. Each passes |F^k(z) - z| < 1e-8,
        relative to max(1, |z|).

    Raises:
        ModelError: shapes that do not fit, values that are not finite, or a period below 1.
    """
    mapping = piecewise_linear(params, clipped=clipped)
    starts = checked_states(states, mapping.latent)
    found: list[Cycle] = []
    for period in periods:
        if is_enumerable(mapping, period):
            found += enumerate_cycles(mapping, period)
        else:
            found += search_cycles(mapping, starts, period, budget=budget, seed=seed)
    return tuple(found)


def is_enumerable(mapping: PiecewiseLinear, period: int = 1) -> bool:
    """Return whether every sequence of ``period`` regions can be tried, so that no cycle is missed."""
    return mapping.kinks * period <= MAX_ENUMERATED


def enumerate_cycles(mapping: PiecewiseLinear, period: int = 1) -> tuple[Cycle, ...]:
    """Return all isolated cycles of one period by trying every sequence of regions.

    Raises:
        ModelError: a period below 1, or more than 12 units times steps (4096 sequences).
    """
    _check_period(period)
    units = mapping.kinks * period
    if units > MAX_ENUMERATED:
        raise ModelError(
            f"{mapping.kinks} units that bend the map over {period} steps are too many to enumerate "
            f"(at most {MAX_ENUMERATED} together); use search_cycles"
        )
    catalogue = _Catalogue(mapping, period)
    every = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
    catalogue.advance(every.astype(bool).reshape(2**units, period, mapping.kinks))
    return catalogue.sorted()


def search_cycles(
    mapping: PiecewiseLinear, states: Array, period: int = 1, *, budget: SearchBudget | None = None, seed: int = 0
) -> tuple[Cycle, ...]:
    """Search the cycles of one period from the regions around ``states`` (T, M); complete only with luck.

    Raises:
        ModelError: a period below 1.
    """
    _check_period(period)
    budget = budget or SearchBudget()
    catalogue = _Catalogue(mapping, period)
    size = mapping.latent * max(mapping.kinks, mapping.latent)
    batch = max(min(budget.batch, _BATCH_ENTRIES // size), 1)
    tried, idle = 0, 0
    for patterns in _start_patterns(mapping, states, period, batch, np.random.default_rng(seed)):
        known = len(catalogue.cycles)
        catalogue.chase(patterns, budget.inner)
        for cycle in catalogue.cycles[known:]:  # cycles are often born in pairs on both sides of a kink
            for neighbours in _across_one_kink(mapping, cycle.points, batch):
                catalogue.chase(neighbours, budget.inner)
        tried += batch
        idle = idle + batch if len(catalogue.cycles) == known else 0
        if idle >= budget.patience or tried >= budget.starts:
            break
    return catalogue.sorted()


@dataclass(eq=False)
class _Catalogue:
    """The cycles of one period found so far and the pattern sequences already tried."""

    mapping: PiecewiseLinear
    period: int
    cycles: list[Cycle] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)

    def sorted(self) -> tuple[Cycle, ...]:
        return tuple(sorted(self.cycles, key=lambda cycle: -cycle.modulus))

    def chase(self, patterns: Pattern, inner: int) -> None:
        """Follow chains from the sequences (C, k, H) until each finds a cycle, meets another chain or is too long."""
        for _ in range(inner):
            patterns = self.unseen(patterns)
            if not len(patterns):
                break
            patterns = self.advance(patterns)

    def unseen(self, patterns: Pattern) -> Pattern:
        """Return the sequences (C, k, H) that no chain has tried, once each, and remember them."""
        packed = np.packbits(patterns.reshape(len(patterns), self.period * self.mapping.kinks), axis=1)
        fresh = []
        for index, row in enumerate(packed):
            key = row.tobytes()
            if key not in self.seen:
                self.seen.add(key)
                fresh.append(index)
        return patterns[fresh]

    def advance(self, patterns: Pattern) -> Pattern:
        """Solve for the candidates of the sequences (C, k, H), keep real cycles, return the regions others visit."""
        with np.errstate(all="ignore"):  # a virtual candidate may lie anywhere, its orbit may overflow
            z, solved = _solve(*self.mapping.affine(patterns))
            orbit = self.mapping.orbit(z, self.period)
        usable = solved & np.isfinite(orbit).all(axis=(0, 2))
        orbit, patterns = orbit[:, usable], patterns[usable]
        visited = np.moveaxis(self.mapping.pattern(orbit[:-1]), 0, 1)
        # Rounding can spoil the residual of a long unstable cycle: those with the right regions are polished below.
        real = (visited == patterns).all(axis=(1, 2)) | (_residual(orbit) < RESIDUAL * _scale(orbit[0]))
        for start in orbit[0, real]:
            self._add(start)
        others: Pattern = visited[~real]
        return others

    def _add(self, z: Array) -> None:
        for _ in range(3):  # one Newton step is exact up to rounding
            orbit = self.mapping.orbit(z, self.period)
            product, _ = self.mapping.affine(self.mapping.pattern(orbit[:-1]))
            error = orbit[-1] - z
            correction, solved = _solve(product, error)
            if not solved or not error.any():
                break
            better = z + correction
            if _residual(self.mapping.orbit(better, self.period)) >= np.abs(error).max():
                break
            z = better
        orbit = self.mapping.orbit(z, self.period)
        points, residual = orbit[:-1], float(_residual(orbit))
        near = SAME * float(_scale(z))
        if residual >= RESIDUAL * _scale(z) or (np.abs(points[1:] - z).max(axis=1) < near).any():
            return
        if any((np.abs(cycle.points - z).max(axis=1) < near).any() for cycle in self.cycles):
            return
        product, _ = self.mapping.affine(self.mapping.pattern(points))
        values = np.linalg.eigvals(product).astype(np.complex128)
        self.cycles.append(Cycle(points, values[np.argsort(-np.abs(values), kind="stable")], residual))


def _solve(product: Array, shift: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return z = (I - P)^-1 q of each P (..., M, M), q (..., M), and whether I - P is regular."""
    identity = np.eye(product.shape[-1])
    matrix = identity - product
    sign, size = np.linalg.slogdet(matrix)
    regular = (sign != 0) & np.isfinite(size)
    matrix = np.where(regular[..., None, None], matrix, identity)
    z = np.linalg.solve(matrix, shift[..., None])[..., 0]
    return np.asarray(z, dtype=np.float64), np.asarray(regular)


def _residual(orbit: Array) -> Any:
    return np.abs(orbit[-1] - orbit[0]).max(axis=-1)


def _scale(z: Array) -> Any:
    return np.maximum(np.abs(z).max(axis=-1), 1.0)


def _start_patterns(
    mapping: PiecewiseLinear, states: Array, period: int, batch: int, rng: np.random.Generator
) -> Iterator[Pattern]:
    """Yield start patterns (batch, k, H) without end."""
    low, high = states.min(axis=0), states.max(axis=0)
    centre, half = (low + high) / 2, np.maximum((high - low) / 2, 1e-3)
    while True:
        reach = _BOX ** rng.uniform(0.0, 1.0, size=(batch, 1))
        points = centre + half * reach * rng.uniform(-1.0, 1.0, size=(batch, mapping.latent))
        from_data = rng.random(batch) < 0.5
        points[from_data] = states[rng.integers(len(states), size=int(from_data.sum()))]
        with np.errstate(all="ignore"):
            orbit = mapping.orbit(points, period - 1)
            patterns = np.moveaxis(mapping.pattern(orbit), 0, 1)
        if period > 1:  # half of the sequences: the same regions in any order, also orders that no orbit shows
            free = rng.random(batch) < 0.5
            pool = patterns.reshape(-1, mapping.kinks)
            patterns[free] = pool[rng.integers(len(pool), size=(int(free.sum()), period))]
        yield patterns


def _across_one_kink(mapping: PiecewiseLinear, points: Array, batch: int) -> Iterator[Pattern]:
    """Yield the sequences (C, k, H) that differ in one unit of one step from that of a cycle (k, M)."""
    pattern = mapping.pattern(points)
    for first in range(0, pattern.size, batch):
        which = np.arange(first, min(first + batch, pattern.size))
        flipped = np.repeat(pattern.reshape(1, -1), len(which), axis=0)
        flipped[np.arange(len(which)), which] ^= True
        yield flipped.reshape(len(which), *pattern.shape)


def _check_period(period: int) -> None:
    if period < 1:
        raise ModelError(f"a cycle has a period of at least 1, not {period}")
