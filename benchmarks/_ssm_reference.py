"""What the state space kernels and blocks are measured against, written plainly.

The block around the naive complex Vandermonde product with FFTs under plain autograd, the doubling of the Krylov matrix
(LSSL, arXiv 2110.13985, Sec. 4), and the Cauchy form of S4 (arXiv 2111.00396, Lemma C.3) in complex64, which is given
its parameter C (I - A^L) ready-made and angles without powers of a root.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu

from tsforge.layers.ssm import DiagonalSSM
from tsforge.layers.ssm_block import SSMBlock


def slices(total: int, size: int) -> list[slice]:
    """Return runs of features small enough for the float64 tables of an oracle."""
    return [slice(first, first + size) for first in range(0, total, size)]


def doubling_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return C A^k B [M, H, L] from the whole matrix of A^k B, whose columns are doubled until there are L."""
    columns, power = B.unsqueeze(-1), A
    while columns.shape[-1] < length:
        more = power @ columns[..., : length - columns.shape[-1]]
        columns = torch.cat([columns, more], dim=-1)
        if columns.shape[-1] < length:
            power = power @ power
    return torch.einsum("mhn,hnl->mhl", C, columns)


def dense_truth(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return the kernel of dense float64 systems, a few features at a time."""
    parts = [doubling_kernel(A[part], B[part], C[:, part], length) for part in slices(len(B), 8)]
    return torch.cat(parts, dim=1)


def cauchy_kernel(modes: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return the kernel [1, H, L] of a system of rank 1 by the published Cauchy form at the roots of unity.

    Shapes:
        modes, P, B, C [H, n] complex, one of each conjugate pair; C is that of C (I - A^L); dt [H].
    """
    angle = torch.arange(length // 2 + 1, device=dt.device) * (-2.0 * math.pi / length)
    z = torch.polar(torch.ones_like(angle), angle)
    nodes = 2.0 / dt[:, None] * (1.0 - z) / (1.0 + z)  # [H, K]; rounding keeps the last one off the pole
    inverse = 1.0 / (nodes[:, None] - torch.cat([modes, modes.conj()], dim=-1)[..., None])  # [H, N, K]
    products = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=1)  # [H, 4, n]
    q = torch.cat([products, products.conj()], dim=-1) @ inverse  # [H, 4, K]
    values = 2.0 / (1.0 + z) * (q[:, 0] - q[:, 1] * q[:, 2] / (1.0 + q[:, 3]))
    kernel: Tensor = torch.fft.irfft(values, n=length)
    return kernel.unsqueeze(0)


def truncated(re: Tensor, im: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return C (I - A_bar^L) [H, n] complex64 of the stored modes, by powers of the dense complex matrix."""
    modes = re.shape[-1]
    low, out = (torch.view_as_complex(part[0].double().contiguous()) for part in (P, C))
    low, out = (torch.cat([part, part.conj()], dim=-1) for part in (low, out))
    values = torch.complex(re.double(), im.double())
    A = torch.diag_embed(torch.cat([values, values.conj()], dim=-1)) - low[..., None] * low.conj()[:, None]
    identity = torch.eye(2 * modes, dtype=A.dtype)
    half = 0.5 * dt.double()[:, None, None] * A
    power = torch.linalg.matrix_power(torch.linalg.solve(identity - half, identity + half), length)
    kept = out - (out[:, None] @ power)[:, 0]
    stored: Tensor = kept[:, :modes].to(torch.complex64)
    return stored


class PlainBlock(nn.Module):
    """The block of ``SSMBlock`` around S4D as reference code writes it; starts from the weights of the one given.

    All powers of all modes as one complex64 table, FFTs of 2 L points under plain autograd, B fixed at 1.
    """

    def __init__(self, block: SSMBlock) -> None:
        super().__init__()
        layer = block.ssm
        assert isinstance(layer, DiagonalSSM)
        self.norm, self.out = copy.deepcopy(block.norm), copy.deepcopy(block.out)
        self.log_dt, self.log_decay, self.frequency, self.C, self.D = (
            nn.Parameter(value.detach().clone())
            for value in (layer.log_dt, layer.log_decay, layer.frequency, layer.C[0], layer.D[0])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [B, L, D] of x [B, L, D]."""
        u, length = self.norm(x).transpose(1, 2), x.shape[1]
        values = torch.complex(-self.log_decay.exp(), self.frequency)  # [1, n]
        turn = self.log_dt.exp()[:, None] * values  # [H, n]
        weight = torch.view_as_complex(self.C) * (torch.exp(turn) - 1.0) / values
        table = torch.exp(turn.unsqueeze(-1) * torch.arange(length, device=x.device))  # [H, n, L]
        kernel = 2.0 * torch.einsum("hn,hnl->hl", weight, table).real
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + self.D[:, None] * u
        gated: Tensor = x + glu(self.out(gelu(y).transpose(1, 2)), dim=-1)
        return gated


def plain_convolution(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Return the causal convolution [B, H, L] by FFTs of ``size`` points."""
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(kernel, n=size)
    y: Tensor = torch.fft.irfft(spectrum, n=size)[..., : u.shape[-1]]
    return y
