"""Linear regions that an orbit visits: how many, how often, in which order, and the entropy of that code.

Inside a region every unit keeps its sign and the map is affine. The sequence of regions along an orbit is a symbolic
code of the dynamics; it is short and readable for an AL-RNN with few rectified units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ModelError
from tsforge.dynamics.piecewise import Array, Pattern, checked_states, piecewise_linear
from tsforge.ops.plrnn import Shallow

MAX_DENSE_REGIONS = 4000  # a transition matrix of 128 MB


@dataclass(frozen=True, eq=False)
class RegionVisits:
    """The regions along one orbit of T states; region 0 is the most visited one.

    Attributes:
        patterns: (R, H) sign of every unit in each region.
        counts: (R,) number of visits, falling.
        codes: (T,) region of each state, the symbolic code.
        sources, targets, moves: (E,) observed steps from one region to the next and how often.
    """

    patterns: Pattern
    counts: NDArray[np.int64]
    codes: NDArray[np.int64]
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    moves: NDArray[np.int64]

    @property
    def entropy(self) -> float:
        """Shannon entropy of the visits in nats: 0 for one region, ln R when all are visited alike."""
        return _entropy(self.counts)

    @property
    def entropy_rate(self) -> float:
        """Entropy of the next region given the present one, nats a step (a first-order Markov estimate)."""
        if not len(self.moves):
            return 0.0
        leaving = np.bincount(self.sources, weights=self.moves, minlength=len(self.counts))
        return max(_entropy(self.moves) - _entropy(leaving[leaving > 0]), 0.0)

    def transition_matrix(self) -> Array:
        """Return the shares (R, R) of steps from region i to region j; a row is zero where no step leaves.

        Raises:
            ModelError: more than 4000 regions; use ``sources``, ``targets`` and ``moves`` then.
        """
        regions = len(self.counts)
        if regions > MAX_DENSE_REGIONS:
            raise ModelError(
                f"a transition matrix of {regions} regions is too large (at most {MAX_DENSE_REGIONS}); "
                "use sources, targets and moves"
            )
        matrix = np.zeros((regions, regions))
        matrix[self.sources, self.targets] = self.moves
        matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1.0)
        return matrix

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures of the report, without the arrays."""
        return {
            "regions": len(self.counts),
            "largest_share": float(self.counts[0] / self.counts.sum()),
            "transitions": len(self.moves),
            "entropy": self.entropy,
            "entropy_rate": self.entropy_rate,
        }


def visited_regions(params: Shallow, states: Any, *, clipped: bool = False) -> RegionVisits:
    """Read the regions along one orbit.

    Args:
        params: shallow form of one group, see ``piecewise_linear``.
        states: (T, M) consecutive states, of the data or of a free run.
        clipped: the map is the clipped one.

    Raises:
        ModelError: shapes that do not fit or values that are not finite.
    """
    mapping = piecewise_linear(params, clipped=clipped)
    patterns = mapping.pattern(checked_states(states, mapping.latent))
    if mapping.kinks == 0:  # a linear map: one region
        first, codes = np.zeros(1, dtype=np.int64), np.zeros(len(patterns), dtype=np.int64)
    else:
        packed = np.packbits(patterns, axis=1)
        _, first, codes = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        codes = codes.reshape(-1).astype(np.int64)
    counts = np.bincount(codes, minlength=len(first)).astype(np.int64)
    order = np.lexsort((first, -counts))  # most visited first, ties by first visit
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    codes = rank[codes].astype(np.int64)
    pairs, moves = np.unique(codes[:-1] * len(order) + codes[1:], return_counts=True)
    return RegionVisits(
        patterns=patterns[first[order]],
        counts=counts[order],
        codes=codes,
        sources=pairs // len(order),
        targets=pairs % len(order),
        moves=moves.astype(np.int64),
    )


def _entropy(counts: NDArray[Any]) -> float:
    share = counts / counts.sum()
    return float(max(-(share * np.log(share)).sum(), 0.0))
