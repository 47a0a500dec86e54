"""Kernels, states and steps of dense real linear systems ``x_k = A x_{k-1} + B u_k``, ``y_k = C x_k``.

Source: the Krylov function ``K = (C B, C A B, ..., C A^{L-1} B)`` of the Linear State-Space Layer (arXiv 2110.13985).
Deviation: the paper doubles a table of L columns; here powers are split into two levels, ``A^{j b + i}`` with
``b ~ sqrt(L)``, so that b columns ``A^i B`` and L / b rows ``C (A^b)^j`` meet in one batched matrix product:
O(N sqrt(L) + L) memory and about 2 sqrt(L) matrix-vector products a feature, where doubling needs L.
The paper's near-linear algorithm loses all digits in floating point and is left out.

Everything is differentiable (the tables once, with a backward pass of their own), keeps dtype and device, and loops
over powers or blocks, never over time.

Legend: H features, N state size, M outputs a feature, L time steps, S batch, b block size, q = ceil(L / b) blocks.
A matrix of shape [1, N, N] is shared by all features, which makes its powers H times cheaper.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.once import first_derivative_only

# A square of A costs as much as N vectors times A, so the last powers are reached by this many strides instead of by
# further squares. Where A is shared a square is next to nothing, and doubling goes on to the end.
_STRIDES = 16


class _Tables(torch.autograd.Function):
    """Columns ``A^i B`` as rows [H, b k, N], rows ``C (A^b)^j`` [H, q m, N] and ``A^b`` from every power of two of A.

    Autograd would keep a gradient of the size of A for each stride and each square; here there is one, walked down
    from the largest power to A itself, and all strides of one power share a single product.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, first_columns: Tensor, first_rows: Tensor, block: int, blocks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        powers, level = _powers(matrix, block, blocks), block.bit_length() - 1
        columns = _grow(first_columns, [power.mT for power in powers[: level + 1]], block)
        rows = _grow(first_rows, powers[level:], blocks)
        ctx.save_for_backward(columns, rows, *powers)
        ctx.sizes = (level, first_columns.shape[1], first_rows.shape[1])
        return columns, rows, powers[level].clone()

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, d_columns: Tensor, d_rows: Tensor, d_jump: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        columns, rows, *powers = ctx.saved_tensors
        level, wide, high = ctx.sizes
        wanted = ctx.needs_input_grad[0]
        d_columns, d_rows = d_columns.clone(), d_rows.clone()  # both become adjoints, updated in place
        d_power: Tensor | None = None
        for k in range(len(powers) - 1, -1, -1):
            power = powers[k]
            if wanted:
                d_power = torch.zeros_like(power) if d_power is None else _d_square(power, d_power)
                if k == level:
                    d_power += d_jump
            if k >= level:
                width = high << (k - level)
                total = rows.shape[1] if k == len(powers) - 1 else 2 * width
                if total == width:  # a single block, or no rows at all
                    continue
                _undo(d_rows, power, width, total)
                if d_power is not None:
                    d_power += _outer(rows[:, : total - width], d_rows[:, width:total], power.dim())
            else:
                width = wide << k
                _undo(d_columns, power.mT, width, 2 * width)
                if d_power is not None:
                    d_power += _outer(d_columns[:, width : 2 * width], columns[:, :width], power.dim())
        return d_power, d_columns[:, :wide], d_rows[:, :high], None, None


def _tables(
    A: Tensor, first_columns: Tensor, first_rows: Tensor, block: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return columns [H, b k, N], rows [H, q m, N] and the jump from their first k columns and m rows a feature."""
    made: tuple[Tensor, Tensor, Tensor] = _Tables.apply(  # type: ignore[no-untyped-call]
        _matrix(A), first_columns, first_rows, block, blocks
    )
    return made


class KrylovTables(NamedTuple):
    """The two levels of a kernel; ``rows[m, h, j] . columns[h, :, i]`` is its value at ``j b + i``.

    Shapes:
        columns [H, N, b] ``A^i B``, rows [M, H, q, N] ``C (A^b)^j``, jump [H, N, N] ``A^b`` ([1, N, N] for a shared A).
    """

    columns: Tensor
    rows: Tensor
    jump: Tensor


def block_size(length: int) -> int:
    """Return b, the power of two nearest to sqrt(length).

    Raises:
        ModelError: ``length`` is below 1.
    """
    return _block(length, 1.0)


def krylov_tables(A: Tensor, B: Tensor, C: Tensor, length: int) -> KrylovTables:
    """Return the tables of the two-level kernel.

    Args:
        A: [H, N, N] or [1, N, N], one matrix for all features.
        B: [H, N].
        C: [M, H, N].
        length: L, at least 1.

    Raises:
        ModelError: shapes contradict each other or ``length`` is below 1.
    """
    features = _checked(A, B.shape, C)
    block = block_size(length)
    blocks = math.ceil(length / block)
    columns, rows, jump = _tables(A, B.unsqueeze(1), C.movedim(0, 1), block, blocks)
    rows = rows.view(features, blocks, len(C), -1).permute(2, 0, 1, 3)
    return KrylovTables(columns.mT, rows, jump.view(A.shape))


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return ``C A^k B`` for k = 0 .. L - 1, [M, H, L]; arguments and errors as ``krylov_tables``."""
    columns, rows, _ = krylov_tables(A, B, C, length)
    outputs, features, blocks, order = rows.shape
    product = rows.permute(1, 2, 0, 3).reshape(features, blocks * outputs, order) @ columns  # [H, q M, b]
    kernel = product.view(features, blocks, outputs, -1).permute(2, 0, 1, 3)
    return kernel.reshape(outputs, features, -1)[..., :length]


def krylov_kernel_reference(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return what ``krylov_kernel`` returns, one power after another (slow, for tests)."""
    state, values = B, []
    for _ in range(length):
        values.append((C * state).sum(-1))
        state = (A @ state.unsqueeze(-1)).squeeze(-1)
    return torch.stack(values, dim=-1)


def dense_free_response(A: Tensor, C: Tensor, state: Tensor, length: int) -> Tensor:
    """Return what a state still contributes without input: ``y[k] = C A^{k+1} x0``, [S, M, H, L].

    Args:
        A: [H, N, N] or [1, N, N].
        C: [M, H, N].
        state: x0 [S, H, N].
        length: L, at least 1.

    Raises:
        ModelError: shapes contradict each other or ``length`` is below 1.
    """
    features = _checked(A, state.shape[1:], C)
    outputs, batch = len(C), len(state)
    block = _block(length, outputs / max(batch, 1))
    blocks = math.ceil(length / block)
    first = state.movedim(0, 1) @ _matrix(A).mT  # [H, S, N]
    columns, rows, _ = _tables(A, first, C.movedim(0, 1), block, blocks)  # [H, b S, N], [H, q M, N]
    product = (rows @ columns.mT).view(features, blocks, outputs, block, batch)
    return product.permute(4, 2, 0, 1, 3).reshape(batch, outputs, features, -1)[..., :length]


def dense_final_state(A: Tensor, B: Tensor, u: Tensor, state: Tensor | None) -> Tensor:
    """Return the state after a whole input, ``A^L x0 + sum_j A^{L-1-j} B u_j``, [S, H, N].

    Args:
        A: [H, N, N] or [1, N, N].
        B: [H, N].
        u: [S, H, L].
        state: x0 [S, H, N]; None is 0.

    Raises:
        ModelError: shapes of A and B contradict each other or the input has no step.
    """
    features = _checked(A, B.shape, None)
    batch, _, length = u.shape
    block = _block(length, max(batch, 1))
    blocks = math.ceil(length / block)
    padding = blocks * block - length
    columns, _, jump = _tables(A, B.unsqueeze(1), B[:, None][:, :0], block, 1)
    columns = columns.flip(1)  # [H, b, N], oldest input first
    padded = torch.nn.functional.pad(u, (padding, 0)).view(batch, features, blocks, block)
    ends = (padded.transpose(0, 1).reshape(features, batch * blocks, block) @ columns).view(features, batch, blocks, -1)
    if state is None:
        return _fold(ends, jump.mT).transpose(0, 1)
    # The first block holds only block - padding real steps, and the state ages by no more than those.
    carried = _apply_power(_matrix(A).mT, state.transpose(0, 1), block - padding)
    first, rest = ends[:, :, :1], ends[:, :, 1:]
    return _fold(torch.cat([first + carried.unsqueeze(2), rest], dim=2), jump.mT).transpose(0, 1)


def dense_step(A: Tensor, B: Tensor, C: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs [S, M, H] and the new state [S, H, N] of one time step.

    Args:
        A: [H, N, N] or [1, N, N].
        B: [H, N].
        C: [M, H, N].
        u: [S, H].
        state: [S, H, N].
    """
    moved = (state.transpose(0, 1) @ _matrix(A).mT).transpose(0, 1)
    state = torch.addcmul(moved, u.unsqueeze(-1), B)
    return torch.einsum("mhn,shn->smh", C, state), state


def dense_scan_reference(
    A: Tensor, B: Tensor, C: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs [S, M, H, L] and the final state [S, H, N] by a plain loop over time (slow, for tests).

    Shapes:
        A [H, N, N] or [1, N, N], B [H, N], C [M, H, N], u [S, H, L], state [S, H, N] or None for 0.
    """
    x = torch.zeros_like(u[:, :, :1] * B) if state is None else state
    outputs = []
    for k in range(u.shape[-1]):
        x = (A @ x.unsqueeze(-1)).squeeze(-1) + B * u[:, :, k, None]
        outputs.append((C * x.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, dim=-1), x


def _block(length: int, ratio: float) -> int:
    """Return the power of two nearest to sqrt(length * ratio), between 1 and the first one that covers ``length``."""
    if length < 1:
        raise ModelError(f"a sequence of {length} steps has no kernel; use a length of at least 1")
    exponent = round(0.5 * math.log2(length * ratio))
    return int(2 ** min(max(exponent, 0), (length - 1).bit_length()))


def _checked(A: Tensor, vectors: torch.Size, C: Tensor | None) -> int:
    """Return H after comparing A with the [H, N] of the vectors it multiplies and with C."""
    features, order = vectors
    fits = A.shape[1:] == (order, order) and A.shape[0] in (1, features)
    if not fits or (C is not None and C.shape[1:] != vectors):
        read = "" if C is None else f" and C is {list(C.shape)}"
        raise ModelError(
            f"A is {list(A.shape)}{read}, but the vectors are [{features}, {order}] (features, state size): "
            f"A must be [{features} or 1, {order}, {order}] and C [outputs, {features}, {order}]"
        )
    return int(features)


def _matrix(A: Tensor) -> Tensor:
    """Return a shared A as [N, N], for which ``rows @ A`` is one large product; any other A as it is."""
    return A[0] if A.shape[0] == 1 else A


def _apply_power(matrix: Tensor, rows: Tensor, exponent: int) -> Tensor:
    """Return ``rows matrix^exponent``, [H, k, N], for a positive exponent."""
    serial = 1 if matrix.dim() == 2 else _STRIDES
    while exponent > serial:
        if exponent % 2:
            rows = rows @ matrix
        exponent //= 2
        matrix = matrix @ matrix
    for _ in range(exponent):
        rows = rows @ matrix
    return rows


def _powers(matrix: Tensor, block: int, blocks: int) -> list[Tensor]:
    """Return ``A^(2^k)`` up to the largest that columns (A^b) and rows (``_grow`` of ``blocks``) need."""
    strides = 1 if matrix.dim() == 2 else _STRIDES
    groups = max(math.ceil(blocks / (strides + 1)), 1)  # of blocks, each reached from the one before by a stride
    powers = [matrix]
    for _ in range(block.bit_length() - 1 + (groups - 1).bit_length()):
        powers.append(powers[-1] @ powers[-1])
    return powers


def _grow(start: Tensor, powers: list[Tensor], count: int) -> Tensor:
    """Return ``start A^i`` for i < count, [H, count k, N] with i before k.

    Args:
        start: [H, k, N].
        powers: ``A^(2^j)``, j = 0, 1, ...; all but the last double the table, the last one is the stride to the end.
    """
    width = start.shape[1]
    rows = start
    for power in powers[:-1]:
        rows = torch.cat([rows, rows @ power], dim=1)
    pieces = [rows]
    reached = rows.shape[1]
    while reached < count * width:
        pieces.append(pieces[-1][:, : count * width - reached] @ powers[-1])
        reached += pieces[-1].shape[1]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else rows


def _undo(adjoint: Tensor, power: Tensor, width: int, total: int) -> None:
    """Carry an adjoint back through the strides of ``width`` rows by ``power`` that led to ``total`` rows."""
    last = (total - 1) // width * width
    for start in range(last, 0, -width):
        stop = min(start + width, total)
        adjoint[:, start - width : stop - width] += adjoint[:, start:stop] @ power.mT


def _outer(left: Tensor, right: Tensor, dims: int) -> Tensor:
    """Return ``left^T right`` a feature, [H, N, N], or summed over features, [N, N], when the matrix is shared."""
    if dims == 2:
        return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
    return left.mT @ right


def _d_square(power: Tensor, d_square: Tensor) -> Tensor:
    """Return the gradient of a matrix from that of its square."""
    total = power.mT @ d_square
    total += d_square @ power.mT
    return total


def _fold(ends: Tensor, matrix: Tensor) -> Tensor:
    """Return ``sum_j ends[:, :, j] matrix^(q-1-j)``, [H, S, N], from ends [H, S, q, N]."""
    serial = 1 if matrix.dim() == 2 else _STRIDES
    while ends.shape[2] > serial:
        if ends.shape[2] % 2:
            ends = torch.nn.functional.pad(ends, (0, 0, 1, 0))  # an empty oldest block
        older, newer = ends[:, :, 0::2], ends[:, :, 1::2]
        features, batch, blocks, order = older.shape
        moved = older.reshape(features, batch * blocks, order) @ matrix
        ends = moved.view(features, batch, blocks, order) + newer
        matrix = matrix @ matrix
    total = ends[:, :, 0]
    for j in range(1, ends.shape[2]):
        total = total @ matrix + ends[:, :, j]
    return total
