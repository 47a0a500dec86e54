"""Linear state space layers: H independent systems of N states, interchangeable behind one interface.

``DiagonalSSM`` is S4D (Gu et al. 2022, arXiv 2206.11893), ``LowRankSSM`` is S4 (Gu, Goel, Re 2022, arXiv 2111.00396),
``StructuredSSM`` is LSSL (Gu et al. 2021, arXiv 2110.13985), ``UnitarySSM`` the linear recurrent unit (Orvieto et al.
2023, arXiv 2303.06349). A system reads its input before it gives its output:
x_k = A x_{k-1} + B u_k, y_k = C x_k + D u_k. The same layer runs as a convolution (training), in chunks with state in
and out, or step by step with constant memory, and all three agree.

Deviations: C is stored, not the C~ = (I - A^L)* C of S4, so that a layer is not tied to one length; the step cache
holds dense matrices for S4 (its eigenvectors are too ill-conditioned to diagonalise); parameters are real everywhere.

Legend: B batch, M channels, H features, n modes (N = 2 n states), L steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tsforge.contracts.model import OptimRule
from tsforge.core.errors import ConfigError, ModelError
from tsforge.ops import _vandermonde_triton
from tsforge.ops.discretise import bilinear_diagonal, gbt, zoh_diagonal
from tsforge.ops.dplr import dplr_discretise
from tsforge.ops.fftconv import causal_convolution
from tsforge.ops.hippo import HippoKind, diagonal_plus_low_rank, structured_factors, structured_matrix
from tsforge.ops.krylov import dense_final_state, dense_free_response, dense_step, krylov_kernel
from tsforge.ops.vandermonde import (
    Complex,
    chunked_scan,
    diagonal_step,
    elapsed_scan,
    last_output,
    multiply,
    vandermonde_kernel,
)

Discretisation = Literal["zoh", "bilinear"]
DiagonalInit = Literal["lin", "inv", "legs", "real"]
SLOW = OptimRule(max_learning_rate=1e-3, weight_decay=0.0)
_LOG_DT = (math.log(1e-5), 0.0)  # clamps of the forward pass: exp stays finite whatever the optimiser does
_LOG_DECAY = (-12.0, 8.0)
_LARGEST = 1e3  # growth of a dense system over a context beyond which it counts as unstable


def timescales(features: int, low: float, high: float) -> Tensor:
    """Return log dt [H] drawn uniformly in the logarithm between ``low`` and ``high``.

    Raises:
        ConfigError: not 0 < low <= high <= 1.
    """
    if not 0.0 < low <= high <= 1.0:
        raise ConfigError(f"dt_min {low:g} and dt_max {high:g} must satisfy 0 < dt_min <= dt_max <= 1")
    return torch.empty(features).uniform_(math.log(low), math.log(high))


def diagonal_init(kind: DiagonalInit, states: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return decay rates, frequencies and input weights [n], [n], [n, 2] of S4D initialisations (float64).

    Source: arXiv 2206.11893, Sec. 4: ``lin`` pi m, ``inv`` (N / pi) (N / (2 m + 1) - 1), ``legs`` the normal part of
    HiPPO-LegS; ``real`` has decays m + 1 without oscillation.
    """
    modes = torch.arange(states // 2, dtype=torch.float64)
    half, still = torch.full_like(modes, 0.5), torch.zeros_like(modes)
    one = torch.stack([torch.ones_like(modes), still], dim=-1)
    if kind == "lin":
        return half, math.pi * modes, one
    if kind == "inv":
        return half, states / math.pi * (states / (2 * modes + 1) - 1), one
    if kind == "real":
        return modes + 1, still, one
    found = diagonal_plus_low_rank("legs", states)
    return -found.eigenvalues.real, found.eigenvalues.imag.clone(), torch.view_as_real(found.input).clone()


class SSM(nn.Module):
    """Base of the layers: convolution, chunks, steps, caches and checks; a subclass gives the discrete system.

    Shapes:
        log_dt [H], C [M, H, n, 2] or [M, H, N], D [M, H]; inputs u [B, H, L], outputs [B, M, H, L].
    """

    optim_rules: ClassVar[dict[str, OptimRule]] = {}
    takes_elapsed = False
    state_shape: tuple[int, ...]
    log_dt: Tensor
    D: Tensor

    def __init__(self, features: int, states: int, channels: int, *, name: str) -> None:
        super().__init__()
        if states < 2 or states % 2:
            raise ConfigError(f"d_state is {states}; it must be even and at least 2")
        if features < 1 or channels < 1:
            raise ConfigError(f"a state space layer needs features and channels, got {features} and {channels}")
        self.features, self.states, self.channels = features, states, channels
        self.name = name
        self.D = nn.Parameter(torch.randn(channels, features))
        self._cache: dict[Any, Any] = {}

    # ---- what a subclass says

    def make_kernel(self, length: int, rate: float) -> Tensor:
        """Return the impulse response [M, H, length] without D."""
        raise NotImplementedError

    def system(self, rate: float) -> Any:
        """Return the discrete system in the form that ``advance`` and ``scan`` read; cached while evaluating."""
        raise NotImplementedError

    def advance(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B, M, H] without D and state after one input [B, H]."""
        raise NotImplementedError

    def scan(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs [B, M, H, L] without D and the last state."""
        raise NotImplementedError

    def facts(self) -> str:
        """Return ranges of the parameters that decide stability, for messages."""
        dt = self.dt(1.0).detach()
        return f"dt {float(dt.min()):.3g} to {float(dt.max()):.3g}"

    # ---- shared

    def _warn_bilinear(self, rate: float) -> None:
        warnings.warn(
            f"layer {self.name}: a bilinear kernel at rate {rate:g} is only approximate; use kernel s4d with zoh",
            stacklevel=3,
        )

    def dt(self, rate: float) -> Tensor:
        """Return the step sizes [H] in float64, clamped, times ``rate``."""
        return self.log_dt.double().clamp(*_LOG_DT).exp() * rate

    def train(self, mode: bool = True) -> SSM:
        """Switch the mode; what was derived from the parameters is forgotten."""
        self._cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SSM:
        self._cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gives; evaluating without gradients it is made once per version of the parameters."""
        if self.training or torch.is_grad_enabled():
            return make()
        parts = (*self.parameters(), *self.buffers())
        version = tuple((id(part), part._version) for part in parts)
        if self._cache.get("version") != version:
            self._cache = {"version": version, "parts": parts}  # kept alive: no other tensor may take over an id
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """Return the impulse response [M, H, length], without D; ``rate`` 2 means data at half the trained frequency.

        Raises:
            ModelError: it is not finite; the message names the layer and its ranges.
        """
        return self._cached(("kernel", length, rate), lambda: self._checked(self.make_kernel(length, rate)))  # type: ignore[no-any-return]

    def _checked(self, kernel: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (kernel.is_cuda and self.training):  # a check would wait for the device
            return kernel
        if not bool(torch.isfinite(kernel).all()):
            raise ModelError(f"the kernel of layer {self.name} is not finite ({self.facts()}); lower the learning rate")
        return kernel

    def _system(self, rate: float) -> Any:
        """Return the discrete system; evaluating without gradients it is made and checked once."""

        def make() -> Any:
            system = self.system(rate)
            if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                parts = [tensor for part in system for tensor in (part if isinstance(part, tuple) else (part,))]
                if not all(bool(torch.isfinite(tensor).all()) for tensor in parts):
                    raise ModelError(f"the system of layer {self.name} is not finite ({self.facts()}); fit again")
            return system

        return self._cached(("system", rate), make)

    def default_state(self, batch: int) -> Tensor:
        """Return the zero state [B, ...]."""
        return self.D.new_zeros(batch, *self.state_shape)

    def forward(
        self, u: Tensor, state: Tensor | None = None, *, rate: float = 1.0, with_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return outputs [B, M, H, L] and, if a state was given or asked for, the state after the last input.

        Autocast is off inside: half precision has no place in powers and transforms.
        """
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype)
            if state is None and not with_state:
                kernel = self.kernel(u.shape[-1], rate)
                with_direct = torch.cat([kernel[..., :1] + self.D[..., None], kernel[..., 1:]], dim=-1)
                return causal_convolution(u, with_direct), None  # D at lag 0: no pass over the inputs of its own
            state = self.default_state(u.shape[0]) if state is None else state
            y, state = self.scan(self._system(rate), u, state)
            return y + self.D[..., None] * u.unsqueeze(1), state

    def last(self, u: Tensor, *, rate: float = 1.0) -> Tensor:
        """Return only the output [B, M, H] at the last of the inputs [B, H, L], without the others."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype)
            return last_output(self.kernel(u.shape[-1], rate), u) + self.D * u[:, None, :, -1]

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return output [B, M, H] and state after one input [B, H]."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype)
            y, state = self.advance(self._system(rate), u, state)
            return y + self.D * u.unsqueeze(1), state

    def irregular(self, u: Tensor, elapsed: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return outputs and last state when step k took ``elapsed[b, k]`` grid steps (0: no step at all).

        Raises:
            ModelError: this system has one fixed step.
        """
        raise ModelError(f"layer {self.name} has a fixed step; irregular steps need kernel s4d with zero-order hold")


class DiagonalSSM(SSM):
    """S4D: a diagonal system per feature, zero-order hold or bilinear.

    Args:
        features, states, channels: H, N, M.
        init: frequencies and decays to start from.
        dt_min, dt_max: range of the initial step sizes.
        discretisation: ``zoh`` is exact for held inputs and for changed sampling rates.
        copies: independent (A, B), shared by H / copies features each; default one.
        bandlimit: modes that turn by more than this share of half a cycle a step start at C = 0 (aliased); 0 keeps all.
    """

    optim_rules: ClassVar[dict[str, OptimRule]] = dict.fromkeys(("log_dt", "log_decay", "frequency", "B"), SLOW)

    def __init__(
        self,
        features: int,
        states: int,
        channels: int = 1,
        *,
        name: str = "s4d",
        init: DiagonalInit = "lin",
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        discretisation: Discretisation = "zoh",
        copies: int = 1,
        bandlimit: float = 1.0,
    ) -> None:
        super().__init__(features, states, channels, name=name)
        if copies < 1 or features % copies:
            raise ConfigError(f"n_ssm is {copies}; it must divide d_model, {features}")
        self.discretisation = discretisation
        self.copies = copies
        self.state_shape = (features, states // 2, 2)
        self.log_dt = nn.Parameter(timescales(features, *dt_range))
        decay, frequency, weight = diagonal_init(init, states)
        self.log_decay = nn.Parameter(decay.log().float().repeat(copies, 1))
        self.frequency = nn.Parameter(frequency.float().repeat(copies, 1))
        self.B = nn.Parameter(weight.float().repeat(copies, 1, 1))
        c = torch.randn(channels, features, states // 2, 2) * math.sqrt(0.5)
        if bandlimit > 0.0:
            turn = self.log_dt.detach().exp()[:, None] * self._shared(self.frequency.detach()).abs()
            c = c * (turn <= bandlimit * math.pi)[None, ..., None]
        self.C = nn.Parameter(c)
        self.takes_elapsed = discretisation == "zoh"

    def _shared(self, parameter: Tensor) -> Tensor:
        """Return a parameter of the copies [S, ...] for every feature [H, ...]."""
        size = (self.copies, self.features // self.copies, *parameter.shape[1:])
        return parameter.unsqueeze(1).expand(size).flatten(0, 1)

    def eigenvalues(self) -> Complex:
        """Return lambda [H, n] in float64; the real part is negative."""
        decay = self.log_decay.double().clamp(*_LOG_DECAY).exp()
        return -self._shared(decay), self._shared(self.frequency.double())

    def _discrete(self, rate: float) -> tuple[Complex, Complex]:
        """Return log A-bar and B-bar [H, n] in float64."""
        re, im = self.eigenvalues()
        dt = self.dt(rate)[:, None]
        weight: Complex = self._shared(self.B.double()).unbind(-1)  # type: ignore[assignment]
        if self.discretisation == "zoh":
            return (dt * re, dt * im), multiply(zoh_diagonal(re, im, dt), weight)
        if rate != 1.0:
            self._warn_bilinear(rate)
        (a_re, a_im), gain = bilinear_diagonal(re, im, dt)
        return (0.5 * torch.log(a_re.square() + a_im.square()), torch.atan2(a_im, a_re)), multiply(gain, weight)

    def make_kernel(self, length: int, rate: float) -> Tensor:
        """Return the Vandermonde kernel; powers come from float64 phases."""
        if self.discretisation == "zoh" and _vandermonde_triton.unavailable(self.C) is None:
            parameters = (self.log_dt, self.log_decay, self.frequency, self.B, self.C)
            return _vandermonde_triton.held_kernel(parameters, length, rate, (_LOG_DT, _LOG_DECAY))
        log_a, b = self._discrete(rate)
        dtype = self.C.dtype
        weight = multiply(self.C.unbind(-1), (b[0].to(dtype), b[1].to(dtype)))  # type: ignore[arg-type]
        return vandermonde_kernel(log_a, weight, length)

    def system(self, rate: float) -> tuple[Complex, Complex, Complex, Complex]:
        """Return log A-bar, A-bar, B-bar, C."""
        log_a, b = self._discrete(rate)
        dtype, size = self.C.dtype, log_a[0].exp()
        a = ((size * log_a[1].cos()).to(dtype), (size * log_a[1].sin()).to(dtype))
        return log_a, a, (b[0].to(dtype), b[1].to(dtype)), self.C.unbind(-1)  # type: ignore[return-value]

    def advance(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and state after one input, O(H n)."""
        _, a, b, c = system
        return diagonal_step(a, b, c, u, state)

    def scan(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and the last state, in chunks."""
        log_a, _, b, c = system
        return chunked_scan(log_a, b, c, u, state)

    def irregular(self, u: Tensor, elapsed: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return outputs and last state when step k took ``elapsed[b, k]`` grid steps (0: no step at all)."""
        if not self.takes_elapsed:
            return super().irregular(u, elapsed, state)
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(self.D.dtype)
            re, im = self.eigenvalues()
            dt = self.dt(1.0)[:, None]
            drive = (dt * part for part in self._shared(self.B.double()).unbind(-1))
            c: Complex = self.C.unbind(-1)  # type: ignore[assignment]
            continuous = ((dt * re, dt * im), tuple(drive))
            y, state = elapsed_scan(continuous, c, u, elapsed, state)  # type: ignore[arg-type]
            return y + self.D[..., None] * u.unsqueeze(1), state

    def facts(self) -> str:
        """Return the ranges of dt and of the decay rates."""
        re = self.eigenvalues()[0].detach()
        return f"{super().facts()}, Re A {float(re.min()):.3g} to {float(re.max()):.3g}"


class UnitarySSM(DiagonalSSM):
    """LRU: eigenvalues drawn in a ring inside the unit circle, inputs scaled to keep the state's variance.

    lambda = exp(-exp(nu) + i theta) is the discrete eigenvalue itself; there is no step size, so no change of rate.
    ``log_dt`` is a buffer of zeros here, ``log_decay`` is nu and ``frequency`` is theta.
    """

    optim_rules: ClassVar[dict[str, OptimRule]] = dict.fromkeys(("log_decay", "frequency", "B"), SLOW)

    def __init__(
        self,
        features: int,
        states: int,
        channels: int = 1,
        *,
        name: str = "lru",
        ring: tuple[float, float] = (0.5, 0.999),
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        if not 0.0 <= ring[0] < ring[1] < 1.0:
            raise ConfigError(f"the ring of eigenvalues must satisfy 0 <= r_min < r_max < 1, got {ring}")
        super().__init__(features, states, channels, name=name, dt_range=dt_range, copies=features, bandlimit=0.0)
        del self.log_dt
        self.register_buffer("log_dt", torch.zeros(features))
        shape = (features, states // 2)
        radius = (torch.rand(shape) * (ring[1] ** 2 - ring[0] ** 2) + ring[0] ** 2).sqrt()
        self.log_decay = nn.Parameter(torch.log(-torch.log(radius)))
        self.frequency = nn.Parameter(torch.rand(shape) * math.pi)
        gain = (1 - radius.square()).sqrt()
        self.B = nn.Parameter(torch.stack([gain, torch.zeros_like(gain)], dim=-1))
        self.takes_elapsed = False

    def _discrete(self, rate: float) -> tuple[Complex, Complex]:
        if rate != 1.0:
            raise ModelError(f"layer {self.name} has no step size, so it cannot run at rate {rate:g}; use kernel s4d")
        return self.eigenvalues(), self.B.double().unbind(-1)  # type: ignore[return-value]


class DenseSSM(SSM):
    """A dense real system per feature; subclasses give A, B and C in continuous time.

    Shapes:
        state [B, H, N].
    """

    alpha = 0.5

    def __init__(self, features: int, states: int, channels: int, *, name: str) -> None:
        super().__init__(features, states, channels, name=name)
        self.state_shape = (features, states)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A [H or 1, N, N], B [H or 1, N] in float64 and C [M, H, N]."""
        raise NotImplementedError

    def system(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return A-bar [H, N, N], B-bar [H, N] and C [M, H, N]; the discretisation is done in float64."""
        a, b, c = self.continuous()
        if rate != 1.0:
            self._warn_bilinear(rate)
        a_bar, b_bar = gbt(a, b, self.dt(rate), self.alpha)
        return a_bar.to(c.dtype), b_bar.to(c.dtype), c

    def make_kernel(self, length: int, rate: float) -> Tensor:
        """Return the two-level Krylov kernel."""
        return krylov_kernel(*self.system(rate), length)

    def advance(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and state after one input, O(H N^2)."""
        a, b, c = system
        return dense_step(a, b, c, u, state)

    def scan(self, system: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and the last state: convolution, plus what the given state still gives."""
        a, b, c = system
        length = u.shape[-1]
        y = causal_convolution(u, krylov_kernel(a, b, c, length)) + dense_free_response(a, c, state, length)
        return y, dense_final_state(a, b, u, state)


class LowRankSSM(DenseSSM):
    """S4: diagonal plus low rank from a HiPPO matrix, tied so that it stays stable, bilinear.

    Shapes:
        log_decay, frequency [S, n], P [r, S, n, 2], B [S, n, 2], C [M, H, n, 2].
    """

    optim_rules: ClassVar[dict[str, OptimRule]] = dict.fromkeys(("log_dt", "log_decay", "frequency", "P", "B"), SLOW)

    def __init__(
        self,
        features: int,
        states: int,
        channels: int = 1,
        *,
        name: str = "s4",
        init: HippoKind = "legs",
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        copies: int = 1,
    ) -> None:
        super().__init__(features, states, channels, name=name)
        if copies < 1 or features % copies:
            raise ConfigError(f"n_ssm is {copies}; it must divide d_model, {features}")
        self.copies = copies
        self.log_dt = nn.Parameter(timescales(features, *dt_range))
        found = diagonal_plus_low_rank(init, states)
        decay = (-found.eigenvalues.real).clamp(min=1e-4)
        self.log_decay = nn.Parameter(decay.log().float().repeat(copies, 1))
        self.frequency = nn.Parameter(found.eigenvalues.imag.float().repeat(copies, 1))
        self.P = nn.Parameter(torch.view_as_real(found.low_rank).float().unsqueeze(1).repeat(1, copies, 1, 1))
        self.B = nn.Parameter(torch.view_as_real(found.input).float().repeat(copies, 1, 1))
        self.C = nn.Parameter(torch.randn(channels, features, states // 2, 2) * math.sqrt(0.5))

    def system(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the discrete system in real dense form; the inverse is diagonal plus low rank, nothing is solved."""
        if rate != 1.0:
            self._warn_bilinear(rate)
        each = self.features // self.copies
        decay = self.log_decay.double().clamp(*_LOG_DECAY).exp()
        re, im, b = (part.repeat_interleave(each, dim=0) for part in (-decay, self.frequency.double(), self.B.double()))
        p = self.P.double().repeat_interleave(each, dim=1)
        return dplr_discretise(re, im, p, b, self.C, self.dt(rate))

    def facts(self) -> str:
        """Return the ranges of dt and of the decay rates."""
        decay = self.log_decay.detach().double().clamp(*_LOG_DECAY).exp()
        return f"{super().facts()}, Re A {-float(decay.max()):.3g} to {-float(decay.min()):.3g}"


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


class StructuredSSM(DenseSSM):
    """LSSL: A = -P (D + T^-1) Q with tridiagonal T and diagonal P, D, Q, all trained or all fixed; bilinear.

    P and Q stay positive. The family does not guarantee stability: when the layer is evaluated, a system that would
    grow beyond a factor of 1000 over the length is refused.

    Args:
        init: HiPPO matrix to start from.
        trains_a: train A, B and dt (LSSL), or keep them (LSSL-fixed).
        shares_a: one A for all features, or one each.
        alpha: of the generalised bilinear transform.
    """

    tri_diagonal: Tensor
    tri_upper: Tensor
    tri_lower: Tensor
    shift: Tensor
    left: Tensor
    right: Tensor
    b: Tensor
    optim_rules: ClassVar[dict[str, OptimRule]] = {
        "log_dt": SLOW,
        **dict.fromkeys(
            ("tri_diagonal", "tri_upper", "tri_lower", "shift", "left", "right", "b"),
            OptimRule(max_learning_rate=1e-4, weight_decay=0.0),
        ),
    }

    def __init__(
        self,
        features: int,
        states: int,
        channels: int = 1,
        *,
        name: str = "lssl",
        init: HippoKind = "legs",
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        trains_a: bool = True,
        shares_a: bool = True,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(features, states, channels, name=name)
        if not 0.5 <= alpha <= 1.0:
            raise ConfigError(f"alpha is {alpha:g}; stable transforms need 0.5 (bilinear) to 1 (backward Euler)")
        self.alpha = alpha
        copies = 1 if shares_a else features
        start = structured_factors(init, states)
        scale = _inverse_softplus(start.scale)
        values = {
            "log_dt": timescales(features, *dt_range),
            "tri_diagonal": start.diagonal.repeat(copies, 1),
            "tri_upper": start.upper.repeat(copies, 1),
            "tri_lower": start.lower.repeat(copies, 1),
            "shift": start.shift.repeat(copies, 1),
            "left": scale.repeat(copies, 1),
            "right": scale.repeat(copies, 1),
            "b": torch.ones(copies, states),
        }
        for key, value in values.items():
            if trains_a:
                self.register_parameter(key, nn.Parameter(value.float()))
            else:
                self.register_buffer(key, value.float())
        self.C = nn.Parameter(torch.randn(channels, features, states) / math.sqrt(states))

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B in float64 and C; A is [1, N, N] when shared."""
        left, right = (nn.functional.softplus(part.double()) for part in (self.left, self.right))
        a = structured_matrix(
            self.tri_diagonal.double(),
            self.tri_upper.double(),
            self.tri_lower.double(),
            self.shift.double(),
            left,
            right,
        )
        return a, left * self.b.double(), self.C

    def _checked(self, kernel: Tensor) -> Tensor:
        kernel = super()._checked(kernel)
        if not self.training and not torch.compiler.is_compiling():
            a, b, _ = (part.detach() for part in self.system(1.0))
            impulse = torch.zeros(1, self.features, kernel.shape[-1], dtype=b.dtype, device=b.device)
            impulse[..., 0] = 1.0
            growth = float(dense_final_state(a, b, impulse, None).abs().max())
            if not growth < _LARGEST:
                raise ModelError(
                    f"layer {self.name} has become unstable: its response grows to {growth:.3g} within "
                    f"{kernel.shape[-1]} steps ({self.facts()}); lower the learning rate, or use trains_a=false"
                )
        return kernel
