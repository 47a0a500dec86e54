"""The 2-D scan as composition of blocks: a second oracle, which shares no recurrence with the first.

A block of m x n cells maps the states on its left edge (m cells) and upper edge (n cells) to those on its right and
lower edge. Blocks compose side by side and on top of each other; both compositions are associative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np


@dataclass(frozen=True)
class Block:
    """(right, lower) = M (left, upper) + c, with both states of a cell next to each other; M (2m + 2n, 2m + 2n)."""

    rows: int
    columns: int
    M: np.ndarray
    c: np.ndarray


def cell(a1: complex, a2: complex, a3: complex, a4: complex, f1: complex, f2: complex) -> Block:
    """One cell with forcings f1, f2: both edges get the same states."""
    one = np.array([[a1, a2, 0, 0], [0, 0, a3, a4]])
    return Block(1, 1, np.vstack([one, one]), np.array([f1, f2, f1, f2]))


def _eliminate(first: Block, second: Block, passed: str) -> tuple[np.ndarray, np.ndarray]:
    """Return map and offset from (left, upper) of both to (right, lower) of both, after passing on the common edge."""
    size1, size2 = len(first.c), len(second.c)
    M = np.zeros((size1 + size2, size1 + size2), dtype=np.result_type(first.M, second.M))
    c = np.concatenate([first.c, second.c])
    M[:size1, :size1] = first.M
    split1, split2 = 2 * first.rows, 2 * second.rows
    out = slice(0, split1) if passed == "right" else slice(split1, size1)
    into = slice(0, split2) if passed == "right" else slice(split2, size2)
    M[size1:, size1:] = second.M
    M[size1:, size1 + into.start : size1 + into.stop] = 0.0
    M[size1:, :size1] = second.M[:, into] @ first.M[out]
    c[size1:] = second.c + second.M[:, into] @ first.c[out]
    return M, c


def beside(first: Block, second: Block) -> Block:
    """Return ``second`` to the right of ``first``."""
    M, c = _eliminate(first, second, "right")
    size, m, n1, n2 = len(first.c), 2 * first.rows, 2 * first.columns, 2 * second.columns
    inputs = [*range(m + n1), *range(size + m, size + m + n2)]  # left of the first, both upper edges
    outputs = [*range(size, size + m), *range(m, m + n1), *range(size + m, size + m + n2)]
    return Block(first.rows, first.columns + second.columns, M[np.ix_(outputs, inputs)], c[outputs])


def below(first: Block, second: Block) -> Block:
    """Return ``second`` below ``first``."""
    M, c = _eliminate(first, second, "lower")
    size, n, m1, m2 = len(first.c), 2 * first.columns, 2 * first.rows, 2 * second.rows
    inputs = [*range(m1), *range(size, size + m2), *range(m1, m1 + n)]  # both left edges, upper of the first
    outputs = [*range(m1), *range(size, size + m2), *range(size + m2, size + m2 + n)]
    return Block(first.rows + second.rows, first.columns, M[np.ix_(outputs, inputs)], c[outputs])


Grid = list[list[Block]]


def rows_first(grid: Grid) -> Block:
    return reduce(below, [reduce(beside, row) for row in grid])


def columns_first(grid: Grid) -> Block:
    """One column after another: the order of a stream."""
    return reduce(beside, [reduce(below, list(column)) for column in zip(*grid, strict=True)])


def balanced(grid: Grid) -> Block:
    """Halve the longer axis until single cells are left."""
    rows, columns = len(grid), len(grid[0])
    if rows == columns == 1:
        return grid[0][0]
    if rows >= columns:
        return below(balanced(grid[: rows // 2]), balanced(grid[rows // 2 :]))
    half = columns // 2
    return beside(balanced([row[:half] for row in grid]), balanced([row[half:] for row in grid]))


TREES: dict[str, Callable[[Grid], Block]] = {
    "balanced": balanced,
    "rows first": rows_first,
    "columns first": columns_first,
}
