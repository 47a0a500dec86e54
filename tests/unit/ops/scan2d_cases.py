"""Random cases of the 2-D scan and an oracle in NumPy that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from compiler import need_compiler
from torch import Tensor

from tsforge.ops.scan2d import Scan2D, scan2d

TRITON = pytest.param("triton", marks=pytest.mark.gpu)
FAST = ("rows", "wavefront", "compiled", TRITON)


def backends() -> Any:
    """Parametrise over every fast path; ``run`` skips those that no machine like this one can run."""
    return pytest.mark.parametrize("backend", FAST)


@dataclass(frozen=True)
class Case:
    """Arguments of one scan."""

    x: Tensor
    dt: tuple[Tensor, Tensor]
    A: tuple[Tensor, Tensor, Tensor, Tensor]
    B: tuple[Tensor, Tensor]
    C: tuple[Tensor, Tensor]
    left: tuple[Tensor, Tensor] | None = None
    top: tuple[Tensor, Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.dt, *self.A, *self.B, *self.C, *(self.left or ()), *(self.top or ())]

    def rebuilt(self, parts: list[Tensor]) -> Case:
        """Return the case with these tensors, in the order of ``tensors``."""
        rest = iter(parts)
        names = {"dt": 2, "A": 4, "B": 2, "C": 2, "left": 2, "top": 2}
        found: dict[str, Any] = {"x": next(rest)}
        for name, count in names.items():
            if getattr(self, name) is not None:
                found[name] = tuple(next(rest) for _ in range(count))
        return replace(self, **found)

    def mapped(self, change: Any) -> Case:
        return self.rebuilt([change(part) for part in self.tensors()])

    def leaves(self) -> Case:
        return self.mapped(lambda part: part.detach().clone().requires_grad_())

    def lower(self) -> Case:
        """Return the case in single precision."""
        return self.mapped(lambda part: part.to(torch.complex64 if part.is_complex() else torch.float32))

    def columns(self, start: int, stop: int, left: tuple[Tensor, Tensor] | None) -> Case:
        """Return steps start to stop, from the states ``left``."""
        top = None if self.top is None else tuple(part[:, start:stop] for part in self.top)
        dt, B, C = (tuple(part[:, :, start:stop] for part in pair) for pair in (self.dt, self.B, self.C))
        return Case(self.x[:, :, start:stop], dt, self.A, B, C, left, top)  # type: ignore[arg-type]

    def uncoupled(self) -> Case:
        none = torch.zeros_like(self.A[1])
        return replace(self, A=(self.A[0], none, none, self.A[3]))


def draw(
    batch: int,
    variates: int,
    steps: int,
    channels: int = 4,
    states: int = 3,
    *,
    groups: int = 1,
    complex_states: bool = False,
    edges: bool = True,
    dt: tuple[float, float] = (1e-4, 10.0),
    seed: int = 0,
) -> Case:
    """Return a random stable case in float64: couplings of both signs with |A2 A3| < 0.81 |Re A1 Re A4|."""
    rng = np.random.default_rng([seed, batch, variates, steps, channels, states, groups])

    def normal(*shape: int) -> Tensor:
        real = rng.normal(size=shape)
        return torch.from_numpy(real + 1j * rng.normal(size=shape) if complex_states else real)

    def own() -> Tensor:
        rate = -rng.uniform(0.2, 3.0, (channels, states))
        return torch.from_numpy(rate + 1j * rng.uniform(-4.0, 4.0, rate.shape) if complex_states else rate)

    def coupling(rate: Tensor) -> Tensor:
        drawn = torch.from_numpy(rng.uniform(-0.9, 0.9, rate.shape)) * rate.real.abs()
        return drawn * torch.exp(1j * torch.from_numpy(rng.uniform(0, 6, rate.shape))) if complex_states else drawn

    def spread() -> Tensor:
        return torch.from_numpy(np.exp(rng.uniform(*np.log(dt), (batch, variates, steps, channels))))

    A1, A4 = own(), own()
    maps = [normal(batch, variates, steps, groups, states) for _ in range(4)]
    left = (normal(batch, variates, channels, states), normal(batch, variates, channels, states))
    top = (normal(batch, steps, channels, states), normal(batch, steps, channels, states))
    return Case(
        torch.from_numpy(rng.normal(size=(batch, variates, steps, channels))),
        (spread(), spread()),
        (A1, coupling(A1), coupling(A4), A4),
        (maps[0], maps[1]),
        (maps[2], maps[3]),
        left if edges else None,
        top if edges else None,
    )


def run(backend: str, case: Case, **options: Any) -> Scan2D:
    """Scan with one backend, on the device it needs; the result is back on the CPU."""
    if backend == "triton" and torch.cuda.is_available():
        case = case.mapped(lambda part: part.cuda())
    if backend == "compiled":
        need_compiler()
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = scan2d(
        case.x,
        case.dt,
        case.A,
        case.B,
        case.C,
        left=case.left,
        top=case.top,
        backend=backend,  # type: ignore[arg-type]
        **options,
    )
    return Scan2D(found.y.cpu(), (found.right[0].cpu(), found.right[1].cpu()))


def numpy_factors(dt1: Any, dt2: Any, A: Any, discretisation: str, input_disc: str) -> tuple[Any, ...]:
    """Return a1, a2, b1, a3, a4, b2 of one cell, in bar form and by plain exponentials."""
    A1, A2, A3, A4 = A
    e1, e4 = np.exp(dt1[..., None] * A1), np.exp(dt2[..., None] * A4)
    phi1, phi4 = np.expm1(dt1[..., None] * A1) / A1, np.expm1(dt2[..., None] * A4) / A4
    b1, b2 = (phi1, phi4) if input_disc == "zoh" else (dt1[..., None] + 0 * phi1, dt2[..., None] + 0 * phi4)
    if discretisation == "exact":
        return e1, phi1 * A2, b1, phi4 * A3, e4, b2
    share = 0.5 if discretisation == "separate_avg" else 1.0
    e2, e3 = np.exp(dt1[..., None] * A2), np.exp(dt2[..., None] * A3)
    return share * e1, share * e2, b1, share * e3, share * e4, b2


def oracle(case: Case, discretisation: str = "exact", input_disc: str = "zoh") -> tuple[np.ndarray, ...]:
    """Return y, the last h1 and the last h2, one cell after another."""
    parts = case.mapped(lambda part: part.detach().cpu())
    x, A = parts.x.double().numpy(), [part.numpy().astype(np.result_type(part.numpy(), np.float64)) for part in parts.A]
    batch, variates, steps, channels = x.shape
    states, groups = A[0].shape[1], parts.B[0].shape[3]
    group = np.arange(channels) // (channels // groups)
    h1 = np.zeros((batch, variates + 1, steps + 1, channels, states), dtype=A[0].dtype)  # index 0 lies outside
    h2 = np.zeros_like(h1)
    for h, left, top in zip((h1, h2), parts.left or (0.0, 0.0), parts.top or (0.0, 0.0), strict=True):
        h[:, 1:, 0] = left
        h[:, 0, 1:] = top
    y = np.zeros(x.shape)
    for v in range(variates):
        for t in range(steps):
            dt1, dt2 = (part[:, v, t].double().numpy() for part in parts.dt)
            a1, a2, b1, a3, a4, b2 = numpy_factors(dt1, dt2, A, discretisation, input_disc)
            B1, B2, C1, C2 = (part[:, v, t].numpy()[:, group] for part in (*parts.B, *parts.C))
            u = x[:, v, t, :, None]
            h1[:, v + 1, t + 1] = a1 * h1[:, v + 1, t] + a2 * h2[:, v + 1, t] + b1 * B1 * u
            h2[:, v + 1, t + 1] = a3 * h1[:, v, t + 1] + a4 * h2[:, v, t + 1] + b2 * B2 * u
            y[:, v, t] = (C1 * h1[:, v + 1, t + 1] + C2 * h2[:, v + 1, t + 1]).sum(-1).real
    return y, h1[:, 1:, -1], h2[:, 1:, -1]


def difference(found: Scan2D, expected: Any) -> float:
    """Return the largest deviation of y and last states, relative to the largest value where that is above 1."""
    expected = (expected.y, *expected.right) if isinstance(expected, Scan2D) else expected
    worst = 0.0
    for ours, theirs in zip((found.y, *found.right), expected, strict=True):
        theirs = theirs.detach().numpy() if isinstance(theirs, Tensor) else theirs
        gap = np.abs(ours.detach().numpy() - theirs).max()
        worst = max(worst, float(gap / max(1.0, np.abs(theirs).max())))
    return worst


def gradients(found: Scan2D, leaves: Case, seed: int = 0) -> list[Tensor]:
    """Return the gradients of a random linear function of y and both last states."""
    rng = np.random.default_rng(seed)
    outputs = [found.y, *found.right]
    probes = [torch.from_numpy(rng.normal(size=part.shape) + 1j * rng.normal(size=part.shape)) for part in outputs]
    probes = [
        probe.to(part.dtype) if part.is_complex() else probe.real.to(part.dtype)
        for probe, part in zip(probes, outputs, strict=True)
    ]
    return list(torch.autograd.grad(outputs, leaves.tensors(), probes))


def worst_gradient(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest deviation, relative to the largest value of that gradient where it is above 1."""
    return max(
        float((ours.cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1.0))
        for ours, theirs in zip(found, expected, strict=True)
    )
