"""Random cases of the forced PLRNN, an oracle of scalar loops and a tensor loop for gradients; none of it shares code
with the package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from compiler import need_compiler
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops.plrnn import Shallow, free_run, gtf_sequence

TRITON = pytest.param("triton", marks=pytest.mark.gpu)
FAST = ("function", "compiled", TRITON, "newton")
EVERY = ("reference", *FAST)
# batch, steps, latent, hidden: one of everything, odd batches, hidden units that are no multiple of 16
SIZES = [(1, 1, 1, 1), (3, 1, 2, 5), (5, 9, 3, 17), (16, 6, 5, 50), (7, 12, 1, 33), (4, 20, 6, 6)]


def backends(*, reference: bool = False, free: bool = False) -> Any:
    """Parametrise over every fast path; ``run`` skips those that no machine like this one can run."""
    names = [name for name in (EVERY if reference else FAST) if not (free and name == "newton")]
    return pytest.mark.parametrize("backend", names)


Arguments = tuple[Tensor, Tensor | None, Tensor, Shallow, Tensor | None]  # z1, forcing, alpha, params, inputs


@dataclass(frozen=True)
class Case:
    """Arguments of ``gtf_sequence``."""

    z1: Tensor
    forcing: Tensor | None
    alpha: float | Tensor
    params: Shallow
    inputs: Tensor | None
    clipped: bool

    def tensors(self) -> list[Tensor]:
        """Return what has a gradient: z1, A, W1, W2, h1, h2, inputs."""
        return [self.z1, *self.params, *([] if self.inputs is None else [self.inputs])]

    def rebuilt(self, parts: list[Tensor] | tuple[Tensor, ...]) -> Case:
        inputs = None if self.inputs is None else parts[6]
        return replace(self, z1=parts[0], params=Shallow(*parts[1:6]), inputs=inputs)

    def mapped(self, change: Any) -> Case:
        """Return the case with every tensor changed."""
        rest = {
            name: change(part) for name in ("forcing", "alpha") if isinstance(part := getattr(self, name), torch.Tensor)
        }
        return replace(self.rebuilt([change(part) for part in self.tensors()]), **rest)

    def leaves(self) -> Case:
        return self.rebuilt([part.detach().clone().requires_grad_() for part in self.tensors()])

    def lower(self) -> Case:
        """Return the case in single precision."""
        return self.mapped(lambda part: part.to(torch.float32))

    def arguments(self) -> Arguments:
        """Return the arguments of a kernel, of a case with groups and alpha of the shape of the states."""
        assert isinstance(self.alpha, torch.Tensor)
        assert self.alpha.ndim == 4
        return self.z1, self.forcing, self.alpha, self.params, self.inputs

    def group(self, index: int) -> Case:
        """Return one group alone, without the axis of groups."""
        return self.mapped(lambda part: part[index])


def draw(
    batch: int,
    steps: int,
    latent: int,
    hidden: int,
    *,
    groups: int | None = None,
    clipped: bool = False,
    inputs: bool = True,
    alpha: str = "batch",
    gain: float = 0.5,
    seed: int = 0,
) -> Case:
    """Return a random case in float64; ``alpha`` as of :func:`draw_alpha`. ``gain`` sizes W1: the default contracts."""
    rng = np.random.default_rng([seed, batch, steps, latent, hidden, groups or 0])
    lead = () if groups is None else (groups,)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=(*lead, *shape)))

    params = Shallow(
        torch.from_numpy(rng.uniform(-0.7, 0.7, (*lead, latent))),
        gain * normal(latent, hidden) / hidden**0.5,
        normal(hidden, latent) / latent**0.5,
        0.3 * normal(latent),
        0.7 * normal(hidden),
    )
    grid = (steps, batch, latent)
    z1, forcing = normal(batch, latent), normal(*grid)
    pushes = 0.3 * normal(*grid) if inputs else None
    return Case(z1, forcing, draw_alpha(alpha, lead, grid, seed), params, pushes, clipped)


# forms of alpha, by the axes that they have
ALPHAS = ("number", "scalar", "latent", "steps", "batch", "sparse")


def draw_alpha(form: str, lead: tuple[int, ...], grid: tuple[int, int, int], seed: int = 0) -> float | Tensor:
    """Return alpha of a form in ``ALPHAS``, or of "groups"; with some entries 0 and 1 where it has axes."""
    if form == "number":
        return 0.3
    rng = np.random.default_rng([seed, len(lead)])
    steps, batch, latent = grid
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "groups": lead,
        "latent": (*lead, latent),
        "steps": (*lead, steps, latent),
        "batch": (*lead, steps, batch, latent),
        "sparse": (*lead, steps, latent),
    }
    if form == "scalar":
        return torch.tensor(0.3, dtype=torch.float64)
    if form == "sparse":
        mask = torch.from_numpy((np.arange(steps) % 3 == 0).astype(float))
        return mask[:, None].expand(shapes[form]).clone()
    drawn = rng.uniform(0.0, 1.0, shapes[form])
    drawn = np.where(drawn < 0.15, 0.0, np.where(drawn > 0.85, 1.0, drawn))
    return torch.from_numpy(drawn)


def need(backend: str) -> None:
    """Skip where no machine like this one can run a backend."""
    if backend == "compiled":
        need_compiler()
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def run(backend: str, case: Case) -> Tensor:
    """Run a case by one backend, on the device it needs; the result is back on the CPU."""
    need(backend)
    if backend == "triton":
        case = case.mapped(lambda part: part.cuda())
    options: dict[str, Any] = {"inputs": case.inputs, "clipped": case.clipped, "backend": backend}
    return gtf_sequence(case.z1, case.forcing, case.alpha, case.params, **options).cpu()


def run_free(backend: str, case: Case, steps: int, every: int = 1) -> Tensor:
    """Run a case freely by one backend; the result is back on the CPU."""
    need(backend)
    if backend == "triton":
        case = case.mapped(lambda part: part.cuda())
    options: dict[str, Any] = {"inputs": case.inputs, "clipped": case.clipped, "backend": backend, "every": every}
    return free_run(case.z1, case.params, steps, **options).cpu()


def unforced(case: Case) -> bool:
    return case.forcing is None or not bool((torch.as_tensor(case.alpha) > 0).any())


def run_or_skip(backend: str, case: Case) -> Tensor:
    """Run a case; Newton's iterations refuse one without forcing, which is checked here."""
    if backend == "newton" and unforced(case):
        with pytest.raises(ModelError, match="newton"):
            run(backend, case)
        pytest.skip("Newton's iterations need forcing")
    return run(backend, case)


def gradients(backend: str, case: Case, seed: int = 0) -> list[Tensor]:
    """Return the gradients of a random linear function of the result, in the order of ``Case.tensors``."""
    leaves = case.leaves()
    found = run_or_skip(backend, leaves)
    probe = torch.from_numpy(np.random.default_rng(seed).normal(size=found.shape)).to(found.dtype)
    return list(torch.autograd.grad(found, leaves.tensors(), probe))


def alpha_at(alpha: float | Tensor, grouped: bool, group: int, k: int, b: int, m: int) -> float:
    """Return one entry of alpha in any of its forms."""
    values = np.asarray(alpha, dtype=np.float64)
    if grouped and values.ndim:
        values = values[group]
    if values.ndim == 3:
        return float(values[k, b, m])
    if values.ndim == 2:
        return float(values[k, m])
    return float(values[m]) if values.ndim else float(values)


def oracle(case: Case) -> np.ndarray:
    """Return the result by scalar loops in double precision."""
    grouped = case.z1.ndim == 3
    arrays = [part.detach().double().numpy() for part in case.tensors()]
    if not grouped:
        arrays = [part[None] for part in arrays]
    z1, A, W1, W2, h1, h2, *rest = arrays
    forcing = None
    if case.forcing is not None:
        forcing = case.forcing.double().numpy()
        forcing = forcing if grouped else forcing[None]
    groups, batch, latent = z1.shape
    hidden = h2.shape[-1]
    sequence = forcing if forcing is not None else rest[0]
    steps = sequence.shape[1]
    found = np.zeros((groups, steps, batch, latent))
    for g in range(groups):
        for b in range(batch):
            state = [float(value) for value in z1[g, b]]
            for k in range(steps):
                active = []
                for j in range(hidden):
                    drive = 0.0
                    for m in range(latent):
                        drive += W2[g, j, m] * state[m]
                    value = max(drive + h2[g, j], 0.0)
                    active.append(value - max(drive, 0.0) if case.clipped else value)
                after = []
                for m in range(latent):
                    value = A[g, m] * state[m] + h1[g, m]
                    for j in range(hidden):
                        value += W1[g, m, j] * active[j]
                    if rest:
                        value += rest[0][g, k, b, m]
                    found[g, k, b, m] = value
                    share = alpha_at(case.alpha, grouped, g, k, b, m)
                    if share != 0.0 and forcing is not None:
                        value = (1.0 - share) * value + share * forcing[g, k, b, m]
                    after.append(value)
                state = after
    return found if grouped else found[0]


def loop(
    z1: Tensor, forcing: Tensor | None, alpha: Tensor, params: Shallow, inputs: Tensor | None, clipped: bool
) -> Tensor:
    """Return the result of a case with groups, differentiable: one step after another by tensors under autograd."""
    A, W1, W2, h1, h2 = params
    before, found = z1, []
    for k in range(alpha.shape[1]):
        drive = torch.einsum("ghm,gbm->gbh", W2, before)
        active = torch.relu(drive + h2[:, None])
        if clipped:
            active = active - torch.relu(drive)
        z = A[:, None] * before + torch.einsum("gmh,gbh->gbm", W1, active) + h1[:, None]
        z = z if inputs is None else z + inputs[:, k]
        found.append(z)
        share = alpha[:, k]
        if forcing is None:
            before = z
        else:  # an entry of no weight may be missing
            before = torch.where(share == 0, z, (1 - share) * z + share * forcing[:, k].nan_to_num())
    return torch.stack(found, dim=1)


def difference(found: Tensor, expected: Any) -> float:
    """Return the largest deviation, relative to the largest value where that is above 1."""
    theirs = torch.as_tensor(expected).detach().double()
    assert found.shape == theirs.shape
    gap = (found.detach().double() - theirs).abs().max()
    return float(gap / theirs.abs().max().clamp_min(1.0))


def worst_gradient(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest deviation over all gradients, relative as in :func:`difference`."""
    return max(difference(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))
