"""The recurrence of a piecewise-linear recurrent network (PLRNN) under generalized teacher forcing: Hess, Monfared,
Brenner, Durstewitz, ICML 2023, arXiv 2306.04406 (Algorithm 1), by several algorithms that compute the same numbers.

    z_k  = F(z~_{k-1}) + inputs_k            k = 0 .. T-1,  z~_{-1} = z1
    z~_k = (1 - alpha_k) z_k + alpha_k forcing_k

    F(z) = A z + W1 relu(W2 z + h2) + h1                          shallow PLRNN
    F(z) = A z + W1 [relu(W2 z + h2) - relu(W2 z)] + h1           clipped

The result is the unforced z_k, which the loss compares with the data. Strength alpha = 1 is classic teacher forcing,
alpha = 0 a free run, 0 and 1 by turns sparse teacher forcing. An entry with alpha = 0 never reads its forcing, which
may be NaN: so missing values are marked. Every variant of the PLRNN but the deep one has this form.

Algorithms (``backend``):
    reference   one step after another under plain autograd: the definition, slow, keeps every hidden activation
    function    one step after another with a backward pass of its own: two small products a step, torch only
    compiled    a C++ kernel on the CPU;  triton  a kernel on the GPU
    newton      all steps at once by Newton's iterations, where the forcing makes the map contract

Deviations: none from Algorithm 1. Its z_1 is ``z1`` and its z_{k+2} is entry k of the result. Inputs enter with the
step that is predicted.

Legend: G groups (models side by side), B batch, T steps, M latent units, H hidden units. A group never meets another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from tsforge.core.errors import ModelError, nearest

Backend: TypeAlias = Literal["auto", "reference", "function", "compiled", "triton", "newton"]

# Multiply-adds of one product of a step, M H B, above which matrix products of a library beat the compiled kernel.
# Measured in float32 on one core, forward and backward, speed of the kernel relative to backend "function": 1.4 at 2M
# (M = 64, H = 512, B = 64), 1.0 at 17M (256, 1024, 64), 0.7 at 67M (256, 1024, 256).
_LARGE_PRODUCT = 1 << 24
_CHUNK = 4096  # steps that a free run on the GPU holds at once


class Shallow(NamedTuple):
    """Parameters of a shallow PLRNN: A (M,), W1 (M, H), W2 (H, M), h1 (M,), h2 (H,); or each with a leading G."""

    A: Tensor
    W1: Tensor
    W2: Tensor
    h1: Tensor
    h2: Tensor


def shallow_map(z: Tensor, params: Shallow, clipped: bool = False) -> Tensor:
    """Return F(z) for z (..., M), or (G, B, M) with parameters of G groups; same shape."""
    A, W1, W2, h1, h2 = params
    if A.ndim == 2:
        A, h1, h2 = (part.unsqueeze(-2) for part in (A, h1, h2))
    drive = z @ W2.mT
    hidden = torch.relu(drive + h2)
    if clipped:
        hidden = hidden - torch.relu(drive)
    return A * z + hidden @ W1.mT + h1


def plain(params: Shallow, clipped: bool) -> Shallow:
    """Return the same map without clipping: 2H hidden units for a clipped one, ``params`` itself otherwise."""
    if not clipped:
        return params
    A, W1, W2, h1, h2 = params
    return Shallow(
        A,
        torch.cat([W1, -W1], dim=-1),
        torch.cat([W2, W2], dim=-2),
        h1,
        torch.cat([h2, torch.zeros_like(h2)], dim=-1),
    )


def gtf_sequence(
    z1: Tensor,
    forcing: Tensor | None,
    alpha: float | Tensor,
    params: Shallow,
    *,
    inputs: Tensor | None = None,
    clipped: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Run T forced steps; differentiable in z1, the parameters and the inputs, not in forcing and alpha.

    Shapes: z1 (B, M), forcing and inputs (T, B, M) or None, result (T, B, M). With parameters of G groups: z1
    (G, B, M), forcing, inputs and result (G, T, B, M). float32 or float64.

    Args:
        forcing: states inferred from the data; None is a free run, alpha is then 0. The last step is not used.
        alpha: forcing strength in [0, 1]: a number, 0-d, (M,), (T, M) or (T, B, M); with groups a number, 0-d, (G,),
            (G, M), (G, T, M) or (G, T, B, M). Its range is checked on the CPU only.
        inputs: what external inputs add to the predicted step. Without forcing and inputs an alpha of zeros with an
            axis of time gives the number of steps.
        backend: ``auto`` takes the fastest that can run here.

    Raises:
        ModelError: shapes, dtypes or devices do not fit, alpha is out of range, or the backend cannot run, with the
            reason.
    """
    if torch.compiler.is_compiling():
        # The steps stay outside the graph, which would hold every one of them as nodes of its own.
        eager = torch.compiler.disable(gtf_sequence)  # type: ignore[no-untyped-call]
        options = {"inputs": inputs, "clipped": clipped, "backend": backend}
        return eager(z1, forcing, alpha, params, **options)  # type: ignore[no-any-return]
    _check_params(z1, params)
    sequence = _sequence(z1, forcing, alpha, inputs)
    start, maps = _grouped(z1, params)
    chosen = _choose(backend, start, maps)
    if chosen == "reference":
        return _loop(lambda z: shallow_map(z, params, clipped), z1, sequence)
    signals, strength, pushes = sequence
    if z1.ndim == 3:
        return _kernel(chosen)(start, signals, strength, maps, pushes, clipped)
    signals, pushes = (None if part is None else part.unsqueeze(0) for part in (signals, pushes))
    return _kernel(chosen)(start, signals, strength.unsqueeze(0), maps, pushes, clipped).squeeze(0)


def gtf_loop(
    step: Callable[[Tensor], Tensor],
    z1: Tensor,
    forcing: Tensor | None,
    alpha: float | Tensor,
    inputs: Tensor | None = None,
) -> Tensor:
    """Return the same recurrence for any map ``step(z)`` of states shaped like z1, by plain autograd.

    Shapes, arguments and errors as in :func:`gtf_sequence`.
    """
    _check_states(z1)
    return _loop(step, z1, _sequence(z1, forcing, alpha, inputs))


def free_run(
    z1: Tensor,
    params: Shallow,
    steps: int,
    *,
    inputs: Tensor | None = None,
    clipped: bool = False,
    backend: Backend = "auto",
    every: int = 1,
) -> Tensor:
    """Iterate the map without forcing and without gradient; keep the state after each ``every`` steps.

    Shapes: z1 (B, M), inputs (steps, B, M) or None, result (steps // every, B, M); with groups z1 (G, B, M), inputs
    (G, steps, B, M), result (G, steps // every, B, M). Other arguments as in :func:`gtf_sequence`.

    Raises:
        ModelError: as :func:`gtf_sequence`; or steps or every is below 1, or steps below every.
    """
    _check_params(z1, params)
    if not 1 <= every <= steps:
        raise ModelError(f"a free run needs 1 <= every <= steps, got every = {every} and steps = {steps}")
    grouped = z1.ndim == 3
    if inputs is not None:
        _check_part("inputs", inputs, z1, (*z1.shape[:-2], steps, *z1.shape[-2:]))
    with torch.no_grad():
        start, maps = _grouped(z1, params)
        pushes = inputs if inputs is None or grouped else inputs.unsqueeze(0)
        found = _free(_choose(backend, start, maps, free=True), start, maps, steps, pushes, clipped, every)
    return found if grouped else found.squeeze(0)


# ---- the definition


class _Sequence(NamedTuple):
    """forcing (..., T, B, M) or None, alpha of that shape (a view without copies), inputs of that shape or None."""

    forcing: Tensor | None
    alpha: Tensor
    inputs: Tensor | None


def _loop(step: Callable[[Tensor], Tensor], z1: Tensor, sequence: _Sequence) -> Tensor:
    steps = sequence.alpha.shape[-3]
    forcing, alpha, inputs = (None if part is None else part.unbind(-3) for part in sequence)
    assert alpha is not None
    forced, found = z1, []
    for k in range(steps):
        z = step(forced)
        if inputs is not None:
            z = z + inputs[k]
        found.append(z)
        # where, not only the sum: 0 times a missing value is no number
        forced = z if forcing is None else torch.where(alpha[k] == 0, z, (1 - alpha[k]) * z + alpha[k] * forcing[k])
    return torch.stack(found, dim=-3)


def _free(
    backend: Backend, z1: Tensor, params: Shallow, steps: int, inputs: Tensor | None, clipped: bool, every: int
) -> Tensor:
    """Run freely in the grouped layout with a backend that is available."""
    if backend == "compiled":
        from tsforge.ops._plrnn_compiled import free_compiled

        return free_compiled(z1, params, steps, inputs, clipped, every)
    if backend == "triton":
        return _free_by_chunks(_kernel("triton"), z1, params, steps, inputs, clipped, every)
    if backend == "function":
        from tsforge.ops._plrnn_function import free_function

        return free_function(z1, params, steps, inputs, clipped, every)
    z, found = z1, []
    for k in range(steps // every * every):
        z = shallow_map(z, params, clipped)
        if inputs is not None:
            z = z + inputs[:, k]
        if (k + 1) % every == 0:
            found.append(z)
    return torch.stack(found, dim=1)


def _free_by_chunks(
    kernel: _Kernel, z1: Tensor, params: Shallow, steps: int, inputs: Tensor | None, clipped: bool, every: int
) -> Tensor:
    """Run freely with a kernel for forced steps, a part at a time: only what is kept is held throughout."""
    groups, batch, latent = z1.shape
    size, total = max(1, _CHUNK // every) * every, steps // every * every
    found = z1.new_empty(groups, total // every, batch, latent)
    for start in range(0, total, size):
        stop = min(start + size, total)
        zero = z1.new_zeros(()).expand(groups, stop - start, batch, latent)
        part = kernel(z1, None, zero, params, None if inputs is None else inputs[:, start:stop], clipped)
        found[:, start // every : stop // every] = part[:, every - 1 :: every]
        z1 = part[:, -1]
    return found


# ---- choice of the algorithm

_Kernel: TypeAlias = Callable[[Tensor, "Tensor | None", Tensor, Shallow, "Tensor | None", bool], Tensor]


def _choose(backend: Backend, z1: Tensor, params: Shallow, *, free: bool = False) -> Backend:
    """Return the backend to run on the grouped layout, or say why the one asked for cannot."""
    choices = get_args(Backend)
    if backend not in choices:
        raise ModelError(
            f"backend of the PLRNN is {backend!r}; choose one of {', '.join(choices)}{nearest(backend, choices)}"
        )
    if backend == "auto":
        kernel: Backend = "triton" if z1.is_cuda else "compiled"
        large = not z1.is_cuda and params.W1[0].numel() * z1.shape[1] > _LARGE_PRODUCT
        return "function" if large or _unavailable(kernel, z1, params) is not None else kernel
    if backend == "newton" and free:
        raise ModelError("backend 'newton' of the PLRNN needs forcing to converge; run freely with backend 'auto'")
    reason = _unavailable(backend, z1, params)
    if reason is not None:
        raise ModelError(f"backend {backend!r} of the PLRNN cannot run here: {reason}; use backend 'auto'")
    return backend


def _unavailable(backend: Backend, z1: Tensor, params: Shallow) -> str | None:
    """Return why a backend cannot run on these tensors, or None."""
    if backend == "compiled":
        from tsforge.ops._plrnn_compiled import unavailable as compiled_unavailable  # builds on first use

        return compiled_unavailable(z1, params)
    if backend == "triton":
        from tsforge.ops._plrnn_triton import unavailable as triton_unavailable  # triton is optional

        return triton_unavailable(z1, params)
    return None


def _kernel(backend: Backend) -> _Kernel:
    """Return the function of a backend that is available."""
    if backend == "compiled":
        from tsforge.ops._plrnn_compiled import gtf_compiled

        return gtf_compiled
    if backend == "triton":
        from tsforge.ops._plrnn_triton import gtf_triton

        return gtf_triton
    if backend == "newton":
        from tsforge.ops._plrnn_newton import gtf_newton

        return gtf_newton
    from tsforge.ops._plrnn_function import gtf_function

    return gtf_function


# ---- validation


def _grouped(z1: Tensor, params: Shallow) -> tuple[Tensor, Shallow]:
    """Return both with an axis of groups."""
    return (z1, params) if z1.ndim == 3 else (z1.unsqueeze(0), Shallow(*(part.unsqueeze(0) for part in params)))


def _check_states(z1: Tensor) -> None:
    if z1.ndim not in (2, 3) or 0 in z1.shape:
        raise ModelError(f"z1 of the PLRNN needs shape (B, M) or (G, B, M) without empty axes, got {tuple(z1.shape)}")
    if z1.dtype not in (torch.float32, torch.float64):
        raise ModelError(f"the PLRNN computes in float32 or float64, z1 is {z1.dtype}; cast it first")


def _check_params(z1: Tensor, params: Shallow) -> None:
    _check_states(z1)
    groups, latent = z1.shape[:-2], z1.shape[-1]
    hidden = params.h2.shape[-1] if params.h2.ndim else 0
    if hidden < 1:
        raise ModelError(f"h2 of the PLRNN needs at least one hidden unit, got shape {tuple(params.h2.shape)}")
    shapes = {"A": (latent,), "W1": (latent, hidden), "W2": (hidden, latent), "h1": (latent,), "h2": (hidden,)}
    for (name, shape), part in zip(shapes.items(), params, strict=True):
        _check_part(name, part, z1, (*groups, *shape))


def _check_part(name: str, part: Tensor, z1: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(part.shape) != shape or part.dtype != z1.dtype or part.device != z1.device:
        raise ModelError(
            f"{name} of the PLRNN needs shape {shape}, {z1.dtype}, on {z1.device}, to fit z1 {tuple(z1.shape)}; "
            f"got {tuple(part.shape)}, {part.dtype}, on {part.device}"
        )


def _sequence(z1: Tensor, forcing: Tensor | None, alpha: float | Tensor, inputs: Tensor | None) -> _Sequence:
    """Return forcing, alpha and inputs checked and of one shape; forcing and alpha without gradient."""
    groups, (batch, latent) = z1.shape[:-2], z1.shape[-2:]
    strength = torch.as_tensor(alpha, dtype=z1.dtype, device=z1.device).detach()
    timed = [part for part in (forcing, inputs) if part is not None]
    if strength.ndim - len(groups) >= 2:
        timed.append(strength)
    if not timed:
        raise ModelError("the PLRNN got neither forcing nor inputs, so the number of steps is open; use free_run")
    axis = len(groups)
    steps = timed[0].shape[axis] if timed[0].ndim > axis else 0
    shape = (*groups, steps, batch, latent)
    if steps < 1:
        raise ModelError(f"the PLRNN needs at least one step, got a sequence of shape {tuple(timed[0].shape)}")
    for name, part in (("forcing", forcing), ("inputs", inputs)):
        if part is not None:
            _check_part(name, part, z1, shape)
    expanded = _expand_alpha(strength, shape, len(groups))
    if forcing is None:
        if bool((strength != 0).any()):
            raise ModelError("the PLRNN got a forcing strength alpha other than 0 but no forcing")
    elif strength.device.type == "cpu" and strength.numel():
        low, high = (float(part) for part in strength.aminmax())
        if not (low >= 0.0 and high <= 1.0):
            raise ModelError(f"alpha of the PLRNN lies in [0, 1], got values from {low} to {high}")
    return _Sequence(None if forcing is None else forcing.detach(), expanded, inputs)


def _expand_alpha(alpha: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """Return alpha as a view of ``shape`` (..., T, B, M); ``groups`` is 1 with an axis of groups, else 0."""
    steps, batch, latent = shape[groups:]
    lead = shape[:groups]
    # position of the axes of alpha in (G, T, B, M) or (T, B, M), by its number of axes
    forms: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
        0: ((), (1,) * len(shape)),
        1 + groups: ((*lead, latent), (*lead, 1, 1, latent)),
        2 + groups: ((*lead, steps, latent), (*lead, steps, 1, latent)),
        3 + groups: (shape, (*lead, steps, batch, latent)),
    }
    if groups:
        forms[1] = (lead, (*lead, 1, 1, 1))
    expected = forms.get(alpha.ndim)
    if expected is None or tuple(alpha.shape) != expected[0]:
        allowed = ", ".join(str(form) for form, _ in forms.values())
        raise ModelError(f"alpha of the PLRNN needs one of the shapes {allowed}, got {tuple(alpha.shape)}")
    return alpha.reshape(expected[1]).expand(shape)
