"""Simulated chaotic systems: data with a known truth for reconstruction, and the truth itself.

Classical Runge-Kutta of order 4 with a fixed step, in float64. ``flow_map`` gives the same step as a map together with
its exact derivative, so that Lyapunov spectra and multipliers of the true system can be computed. ``schedule`` makes
parameters functions of time: changed dynamics for detectors.

Sources: Lorenz 1963 and 1996, Roessler 1976, Hindmarsh and Rose 1984 (a bursting neuron).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tsforge.core.errors import ConfigError, DataError, nearest

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Parameters: TypeAlias = Mapping[str, float]
Components: TypeAlias = Sequence[Any]  # one float, or one array over states, per variate
Schedule: TypeAlias = Mapping[str, Callable[[Floats], ArrayLike]]


@dataclass(frozen=True, kw_only=True)
class System:
    """An autonomous differential equation ``dz/dt = field(z)``.

    Attributes:
        name: what errors call it.
        parameters: of the field.
        field: components of z and parameters to the components of dz/dt; plain arithmetic, so that it works on floats
            and on arrays.
        jacobian: states [..., M] and parameters to the derivative of the field [..., M, M].
        start: [M], near the attractor; the seed moves it by ``spread`` times standard normal numbers.
        spread: see ``start``.
        dt: usual sampling interval.
        transient: time until a trajectory is on the attractor.
    """

    name: str
    parameters: Parameters
    field: Callable[[Components, Parameters], list[Any]]
    jacobian: Callable[[Floats, Parameters], Floats]
    start: tuple[float, ...]
    spread: float
    dt: float
    transient: float

    @property
    def dimension(self) -> int:
        """M."""
        return len(self.start)


def lorenz63(sigma: float = 10.0, rho: float = 28.0, beta: float = 8.0 / 3.0, speed: float = 1.0) -> System:
    """Return the Lorenz-63 system; ``speed`` multiplies the field: same attractor and distribution, other spectrum."""
    return System(
        name="lorenz63",
        parameters={"sigma": sigma, "rho": rho, "beta": beta, "speed": speed},
        field=_lorenz63,
        jacobian=_lorenz63_jacobian,
        start=(1.0, 1.0, 20.0),
        spread=4.0,
        dt=0.01,
        transient=50.0,
    )


def lorenz96(n: int = 10, forcing: float = 8.0) -> System:
    """Return the Lorenz-96 system of n >= 4 variates on a ring.

    Raises:
        ConfigError: n is below 4.
    """
    if n < 4:
        raise ConfigError(f"lorenz96 needs n of at least 4 variates, got {n}")
    return System(
        name="lorenz96",
        parameters={"forcing": forcing},
        field=_lorenz96,
        jacobian=_lorenz96_jacobian,
        start=(forcing,) * n,
        spread=1.0,
        dt=0.04,
        transient=50.0,
    )


def roessler(a: float = 0.2, b: float = 0.2, c: float = 5.7) -> System:
    """Return the Roessler system."""
    return System(
        name="roessler",
        parameters={"a": a, "b": b, "c": c},
        field=_roessler,
        jacobian=_roessler_jacobian,
        start=(-4.0, -4.0, 0.5),
        spread=0.3,
        dt=0.08,
        transient=500.0,
    )


def hindmarsh_rose(current: float = 3.25, r: float = 0.006, s: float = 4.0, rest: float = -1.6) -> System:
    """Return the Hindmarsh-Rose neuron (a=1, b=3, c=1, d=5): fast spikes in slow bursts, chaotic at these values."""
    return System(
        name="hindmarsh_rose",
        parameters={"current": current, "r": r, "s": s, "rest": rest},
        field=_hindmarsh_rose,
        jacobian=_hindmarsh_rose_jacobian,
        start=(-1.0, -3.0, 3.1),
        spread=0.1,
        dt=0.1,
        transient=1000.0,
    )


SYSTEMS: dict[str, Callable[..., System]] = {
    "lorenz63": lorenz63,
    "lorenz96": lorenz96,
    "roessler": roessler,
    "hindmarsh_rose": hindmarsh_rose,
}


class FlowMap(NamedTuple):
    """The map of one sampling interval: ``step`` states [..., M] to [..., M], ``jacobian`` states to [..., M, M]."""

    step: Callable[[Floats], Floats]
    jacobian: Callable[[Floats], Floats]


def simulate(
    system: str | System,
    steps: int,
    dt: float | None = None,
    *,
    seed: int = 0,
    noise: float = 0.0,
    transient: float | None = None,
    start: ArrayLike | None = None,
    standardise: bool = False,
    schedule: Schedule | None = None,
    substeps: int = 1,
) -> Floats:
    """Return a trajectory [steps, M].

    Args:
        system: a name of ``SYSTEMS`` (its usual parameters) or a system.
        steps: rows.
        dt: time between rows; None = the system's own.
        seed: of the start and of the noise.
        noise: standard deviation of Gaussian observation noise, in standard deviations of each variate.
        transient: time before the first row; None = the system's own.
        start: [M] state before the transient; None = random near the attractor.
        standardise: give each variate of the noise-free trajectory mean 0 and standard deviation 1.
        schedule: parameters as functions of an array of times, 0 at the first row (before it: the value at 0).
        substeps: integration steps per row.

    Raises:
        ConfigError: an unknown system or parameter, or a setting out of range.
        DataError: start has the wrong shape, or the trajectory diverged (dt too large).
    """
    chosen = find_system(system)
    interval = chosen.dt if dt is None else dt
    before = chosen.transient if transient is None else transient
    if steps < 1 or substeps < 1 or not interval > 0.0 or not noise >= 0.0 or not before >= 0.0:
        raise ConfigError(
            f"steps and substeps must be at least 1, dt above 0, noise and transient 0 or more; got steps={steps}, "
            f"substeps={substeps}, dt={interval}, noise={noise}, transient={before}"
        )
    rng = np.random.default_rng(seed)
    random = np.asarray(chosen.start) + chosen.spread * rng.standard_normal(chosen.dimension)
    first: Floats = random if start is None else np.asarray(start, dtype=np.float64)
    if first.shape != (chosen.dimension,):
        raise DataError(f"start must be [{chosen.dimension}] for {chosen.name}, got shape {first.shape}")
    states = _integrate(chosen, first, steps, interval, before, schedule or {}, substeps)
    if not np.isfinite(states).all():
        raise DataError(f"{chosen.name} diverged with dt {interval} and {substeps} substeps; take a smaller step")
    loc, scale = states.mean(axis=0), states.std(axis=0)
    observed: Floats = states + noise * scale * rng.standard_normal(states.shape) if noise else states
    if standardise:
        observed = (observed - loc) / np.where(scale > 0.0, scale, 1.0)
    return observed


def flow_map(system: str | System, dt: float | None = None, *, substeps: int = 1) -> FlowMap:
    """Return the Runge-Kutta map of one interval dt and its exact derivative (tangent equations of every stage).

    Raises:
        ConfigError: an unknown system, or a setting out of range.
    """
    chosen = find_system(system)
    interval = chosen.dt if dt is None else dt
    if substeps < 1 or not interval > 0.0:
        raise ConfigError(f"dt must be above 0 and substeps at least 1, got {interval} and {substeps}")
    h, p = interval / substeps, chosen.parameters

    def step(z: Floats) -> Floats:
        parts: list[Any] = z.tolist() if z.ndim == 1 else list(np.moveaxis(z, -1, 0))
        for _ in range(substeps):
            parts = _runge_kutta(chosen.field, parts, h, p, p, p)
        return np.stack(parts, axis=-1) if z.ndim > 1 else np.array(parts)

    def jacobian(z: Floats) -> Floats:
        parts: list[Any] = list(np.moveaxis(z, -1, 0))
        total: Floats = np.broadcast_to(np.eye(chosen.dimension), (*z.shape, chosen.dimension))
        for _ in range(substeps):
            total = _tangent(chosen, parts, h) @ total
            parts = _runge_kutta(chosen.field, parts, h, p, p, p)
        return total

    return FlowMap(step, jacobian)


def shift(before: float, after: float, at: float, over: float = 0.0) -> Callable[[Floats], Floats]:
    """Return a function of time for ``schedule``: ``before`` until time ``at``, a line to ``after`` for ``over``."""

    def value(times: Floats) -> Floats:
        risen = (times >= at).astype(np.float64) if over <= 0.0 else np.clip((times - at) / over, 0.0, 1.0)
        changed: Floats = before + (after - before) * risen
        return changed

    return value


def lorenz63_with_shift(
    steps: int,
    change: Mapping[str, float],
    at: int,
    *,
    over: int = 0,
    dt: float = 0.01,
    seed: int = 0,
    noise: float = 0.0,
) -> tuple[Floats, Bools]:
    """Return Lorenz-63 whose parameters change, [steps, 3], and the rows with changed dynamics [steps].

    Mean and standard deviation of the rows before the change are 0 and 1 (up to the noise): a detector trained there
    sees these units. A change of ``speed`` keeps the distribution of states exactly, of ``sigma`` nearly.

    Args:
        change: new values of sigma, rho, beta or speed.
        at: first row of the change.
        over: rows that the change takes; 0 = at once.
        noise: as in ``simulate``, relative to the rows before the change.

    Raises:
        ConfigError: an unknown parameter, no change, or ``at`` outside of 2 .. steps - 1.
    """
    if not 2 <= at < steps or not change or over < 0:
        raise ConfigError(
            f"a change needs parameters, a row from 2 to {steps - 1} and over >= 0; got {dict(change)}, {at} and {over}"
        )
    system = lorenz63()
    _check_parameters(system, change)
    schedule = {
        name: shift(system.parameters[name], value, (at - 0.5) * dt, over * dt) for name, value in change.items()
    }
    values = simulate(system, steps, dt, seed=seed, schedule=schedule)
    values = (values - values[:at].mean(axis=0)) / values[:at].std(axis=0)
    if noise:
        values = values + noise * np.random.default_rng([seed, 1]).standard_normal(values.shape)
    return values, np.arange(steps) >= at


def find_system(system: str | System) -> System:
    """Return the system of a name with its usual parameters.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(system, System):
        return system
    if system not in SYSTEMS:
        raise ConfigError(f"no system '{system}'{nearest(system, SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[system]()


def _check_parameters(system: System, names: Mapping[str, Any]) -> None:
    for name in names:
        if name not in system.parameters:
            hint = nearest(name, system.parameters)
            raise ConfigError(f"{system.name} has no parameter '{name}'{hint}; it has {', '.join(system.parameters)}")


def _integrate(
    system: System, first: Floats, steps: int, dt: float, transient: float, schedule: Schedule, substeps: int
) -> Floats:
    """Return the states at rows 0 .. steps - 1; infinite or NaN after divergence."""
    _check_parameters(system, schedule)
    h = dt / substeps
    halves = np.arange(2 * (steps - 1) * substeps + 1, dtype=np.float64) * (h / 2.0)
    tracks = {name: np.broadcast_to(np.asarray(f(halves), float), halves.shape) for name, f in schedule.items()}
    now = dict(system.parameters) | {name: float(track[0]) for name, track in tracks.items()}
    still = replace(system, parameters=now)
    state: list[Any] = first.tolist()
    rows = [state]
    try:
        for _ in range(math.ceil(transient / h)):
            state = _runge_kutta(still.field, state, h, now, now, now)
        rows = [state]
        middle = end = now
        for index in range((steps - 1) * substeps):
            if tracks:
                middle = now | {name: float(track[2 * index + 1]) for name, track in tracks.items()}
                end = now | {name: float(track[2 * index + 2]) for name, track in tracks.items()}
            state = _runge_kutta(system.field, state, h, now, middle, end)
            now = end
            if (index + 1) % substeps == 0:
                rows.append(state)
    except OverflowError:  # plain floats raise it for powers
        return np.full((steps, system.dimension), np.inf)
    return np.array(rows)


def _runge_kutta(
    field: Callable[[Components, Parameters], list[Any]],
    z: list[Any],
    h: float,
    now: Parameters,
    middle: Parameters,
    end: Parameters,
) -> list[Any]:
    """Return the components after one step, with the parameters at its start, middle and end."""
    half, sixth = h / 2.0, h / 6.0
    k1 = field(z, now)
    k2 = field([x + half * k for x, k in zip(z, k1, strict=True)], middle)
    k3 = field([x + half * k for x, k in zip(z, k2, strict=True)], middle)
    k4 = field([x + h * k for x, k in zip(z, k3, strict=True)], end)
    return [x + sixth * (a + 2.0 * (b + c) + d) for x, a, b, c, d in zip(z, k1, k2, k3, k4, strict=True)]


def _tangent(system: System, z: list[Any], h: float) -> Floats:
    """Return the derivative of one step by its start, [..., M, M]: the chain rule through the four stages."""
    p, eye = system.parameters, np.eye(system.dimension)

    def slope(at: list[Any]) -> Floats:
        return system.jacobian(np.stack(at, axis=-1), p)

    k1 = system.field(z, p)
    z2 = [x + h / 2.0 * k for x, k in zip(z, k1, strict=True)]
    k2 = system.field(z2, p)
    z3 = [x + h / 2.0 * k for x, k in zip(z, k2, strict=True)]
    z4 = [x + h * k for x, k in zip(z, system.field(z3, p), strict=True)]
    d1 = slope(z)
    d2 = slope(z2) @ (eye + h / 2.0 * d1)
    d3 = slope(z3) @ (eye + h / 2.0 * d2)
    d4 = slope(z4) @ (eye + h * d3)
    total: Floats = eye + h / 6.0 * (d1 + 2.0 * (d2 + d3) + d4)
    return total


def _lorenz63(z: Components, p: Parameters) -> list[Any]:
    x, y, w = z
    speed = p["speed"]
    return [
        speed * p["sigma"] * (y - x),
        speed * (x * (p["rho"] - w) - y),
        speed * (x * y - p["beta"] * w),
    ]


def _lorenz63_jacobian(z: Floats, p: Parameters) -> Floats:
    x, y, w = np.moveaxis(z, -1, 0)
    return p["speed"] * _matrix(
        [[-p["sigma"], p["sigma"], 0.0], [p["rho"] - w, -1.0, -x], [y, x, -p["beta"]]], z.shape[:-1]
    )


def _lorenz96(z: Components, p: Parameters) -> list[Any]:
    force, size = p["forcing"], len(z)
    return [(z[(i + 1) % size] - z[i - 2]) * z[i - 1] - z[i] + force for i in range(size)]


def _lorenz96_jacobian(z: Floats, p: Parameters) -> Floats:
    size = z.shape[-1]
    here = np.arange(size)
    ahead, back, far = (here + 1) % size, here - 1, here - 2
    result = np.zeros((*z.shape, size))
    result[..., here, here] = -1.0
    result[..., here, ahead] = z[..., back]
    result[..., here, far] = -z[..., back]
    result[..., here, back] = z[..., ahead] - z[..., far]
    return result


def _roessler(z: Components, p: Parameters) -> list[Any]:
    x, y, w = z
    return [-y - w, x + p["a"] * y, p["b"] + w * (x - p["c"])]


def _roessler_jacobian(z: Floats, p: Parameters) -> Floats:
    x, _, w = np.moveaxis(z, -1, 0)
    return _matrix([[0.0, -1.0, -1.0], [1.0, p["a"], 0.0], [w, 0.0, x - p["c"]]], z.shape[:-1])


def _hindmarsh_rose(z: Components, p: Parameters) -> list[Any]:
    x, y, w = z
    square = x * x
    return [
        y - x * square + 3.0 * square - w + p["current"],
        1.0 - 5.0 * square - y,
        p["r"] * (p["s"] * (x - p["rest"]) - w),
    ]


def _hindmarsh_rose_jacobian(z: Floats, p: Parameters) -> Floats:
    x = z[..., 0]
    return _matrix(
        [[-3.0 * x * x + 6.0 * x, 1.0, -1.0], [-10.0 * x, -1.0, 0.0], [p["r"] * p["s"], 0.0, -p["r"]]], z.shape[:-1]
    )


def _matrix(rows: list[list[Any]], shape: tuple[int, ...]) -> Floats:
    """Return [..., M, M] from entries that are numbers or arrays of ``shape``."""
    return np.stack([np.stack([np.broadcast_to(entry, shape) for entry in row], axis=-1) for row in rows], axis=-2)
