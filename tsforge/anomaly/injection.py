"""Anomalies written into rows that are assumed normal, to choose settings of a detector without any label.

Ten kinds, each in some of the variates: ``level`` (a shift), ``spike`` (a few rows), ``noise`` (white noise on top),
``stuck`` (the value freezes), ``swap`` (rows of another time: every value is usual by itself, the relation to the other
variates and to the past is broken), ``drift`` (a ramp that ends abruptly), ``scale`` (the distance from the mean is
multiplied), ``flip`` (it is negated), ``common`` (all variates shift together, in a direction that normal rows have),
``surge`` (a fluctuating load that the variates share). ``wander`` moves the level of normal rows: no anomaly.

Sizes are in standard deviations of a variate over the given rows. Everything follows from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
InjectionKind = Literal["level", "spike", "noise", "stuck", "swap", "drift", "scale", "flip", "common", "surge"]
INJECTION_KINDS: tuple[InjectionKind, ...] = (
    "level",
    "spike",
    "noise",
    "stuck",
    "swap",
    "drift",
    "scale",
    "flip",
    "common",
)
_TRIES = 200  # places drawn for an event before it is given up
_LONGEST_SPIKE = 3
_LOAD_MEMORY, _LOAD_SHOCK = 0.8, 0.4  # of a surge: it wanders around its size by two thirds of it


class InjectionConfig(Config):
    """How many anomalies of which kinds, how long, how large, in how many variates."""

    kinds: tuple[InjectionKind, ...] = Field(INJECTION_KINDS, min_length=1)
    """Used in turn, so that each is as frequent as the others."""
    share: float = Field(0.05, gt=0.0, lt=0.5)
    """Rows that are to be anomalous, about."""
    length: tuple[int, int] = (10, 300)
    """Shortest and longest event in rows, log-uniform; spikes last 1 to 3 rows."""
    size: tuple[float, float] = (0.5, 4.0)
    """Least and largest shift, spike, noise or end of a ramp in standard deviations, log-uniform."""
    variates: tuple[float, float] = (0.05, 0.5)
    """Least and largest share of the variates that an event touches (at least one), log-uniform."""
    gap: int = Field(20, ge=0)
    """Fewest untouched rows before, between and after events."""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> InjectionConfig:
        for name in ("length", "size", "variates"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} needs 0 < least <= largest, given {low} and {high}")
        if self.variates[1] > 1.0:
            raise ValueError(f"variates is a share; {self.variates[1]} is above 1")
        return self


@dataclass(frozen=True)
class Injected:
    """One anomaly: rows [start, stop) of some variates; ``size`` 0 where the kind has none."""

    kind: InjectionKind
    start: int
    stop: int
    variates: tuple[int, ...]
    size: float


def inject(values: ArrayLike, config: InjectionConfig | None = None) -> tuple[FloatArray, list[Injected]]:
    """Return rows with anomalies written into a copy, and what was written, in time order.

    Variates without variation are left alone. Events neither touch nor overlap. Missing values stay missing.

    Args:
        values: [N, V] rows in time order, NaN where missing.
        config: what to write.

    Raises:
        DataError: no variate varies, or the rows are too few for a single event.
    """
    settings = config or InjectionConfig()
    x = np.array(values, dtype=np.float64)
    if x.ndim != 2:
        raise DataError(f"anomalies are written into rows [N, V]; given is the shape {x.shape}")
    seen = ~np.isnan(x)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, x, 0.0).sum(axis=0) / count
    deviation = np.sqrt(np.where(seen, (x - mean) ** 2, 0.0).sum(axis=0) / count)
    varying = np.flatnonzero(deviation > 1e-9 * np.maximum(np.abs(mean), 1.0))
    if not varying.size:
        raise DataError(f"none of {x.shape[1]} variates varies over the {len(x)} rows; nothing can be injected")
    rng = np.random.default_rng(settings.seed)
    written = [_Plan(*item) for item in _places(len(x), settings, rng)]
    if not written:
        raise DataError(
            f"{len(x)} rows hold no anomaly of {settings.length[0]} rows with {settings.gap} rows around it; give more "
            "rows or a smaller length"
        )
    out, events = x.copy(), []
    for plan in sorted(written, key=lambda item: item.start):
        share = 1.0 if plan.kind == "common" else _log_uniform(rng, *settings.variates)
        number = min(max(round(share * x.shape[1]), 1), varying.size)
        chosen = np.sort(rng.choice(varying, number, replace=False))
        size = _log_uniform(rng, *settings.size) if plan.kind not in ("stuck", "swap", "flip") else 0.0
        rows = slice(plan.start, plan.stop)
        out[rows, chosen] = _anomalous(x, plan, chosen, mean[chosen], size * deviation[chosen], size, rng)
        events.append(Injected(plan.kind, plan.start, plan.stop, tuple(int(v) for v in chosen), size))
    return out, events


class WanderConfig(Config):
    """How normal rows change for good after the training: no anomaly, but a detector has to live with it."""

    share: float = Field(0.5, gt=0.0, le=1.0)
    """Of the variates."""
    size: tuple[float, float] = (0.3, 1.5)
    """Least and largest change of the level in standard deviations, log-uniform."""
    seed: int = Field(0, ge=0)


def wander(values: ArrayLike, config: WanderConfig | None = None) -> FloatArray:
    """Return rows whose level in some variates has moved by their end: half of it slowly, half in one step.

    Args:
        values: [N, V] rows in time order, NaN where missing. config: how much.

    Raises:
        DataError: not a table of rows.
    """
    settings = config or WanderConfig()
    x = np.array(values, dtype=np.float64)
    if x.ndim != 2 or not len(x):
        raise DataError(f"rows [N, V] are needed; given is the shape {x.shape}")
    rng = np.random.default_rng(settings.seed)
    deviation = np.nan_to_num(np.nanstd(x, axis=0))
    moved = rng.random(x.shape[1]) < settings.share
    low, high = np.log(settings.size)
    size = np.exp(rng.uniform(low, high, x.shape[1])) * rng.choice((-1.0, 1.0), x.shape[1])
    step = np.arange(len(x))[:, None] >= rng.integers(0, len(x), x.shape[1])
    ramp = np.linspace(0.0, 1.0, len(x))[:, None]
    return np.asarray(x + np.where(moved, 0.5 * size * deviation, 0.0) * (step + ramp))


def injected_labels(events: list[Injected], num_rows: int) -> NDArray[np.bool_]:
    """Return the label [N] of every row."""
    labels = np.zeros(num_rows, dtype=bool)
    for event in events:
        labels[event.start : event.stop] = True
    return labels


@dataclass(frozen=True)
class _Plan:
    kind: InjectionKind
    start: int
    stop: int


def _places(num_rows: int, config: InjectionConfig, rng: np.random.Generator) -> list[tuple[InjectionKind, int, int]]:
    """Return kind, start and stop of events until the share of rows is reached, or no more fit."""
    taken = np.zeros(num_rows, dtype=bool)
    found: list[tuple[InjectionKind, int, int]] = []
    order = [config.kinds[place] for place in rng.permutation(len(config.kinds))]
    covered, tries = 0, 0
    while covered < config.share * num_rows and tries < _TRIES:
        kind = order[len(found) % len(order)]
        length = (
            int(rng.integers(1, _LONGEST_SPIKE + 1))
            if kind == "spike"
            else round(_log_uniform(rng, *map(float, config.length)))
        )
        last = num_rows - length - config.gap
        tries += 1
        if last < config.gap:
            continue
        start = int(rng.integers(config.gap, last + 1))
        if taken[start - config.gap : start + length + config.gap].any():
            continue
        taken[start : start + length] = True
        found.append((kind, start, start + length))
        covered, tries = covered + length, 0
    return found


def _anomalous(
    x: FloatArray,
    plan: _Plan,
    chosen: NDArray[np.intp],
    mean: FloatArray,
    shift: FloatArray,
    size: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Return what replaces rows [start, stop) of the chosen variates; ``shift`` [C] is the size in data units."""
    own = x[plan.start : plan.stop, chosen]
    length = len(own)
    sign = rng.choice((-1.0, 1.0), chosen.size)
    if plan.kind in ("level", "spike"):
        return np.asarray(own + sign * shift)
    if plan.kind == "noise":
        return np.asarray(own + shift * rng.normal(size=own.shape))
    if plan.kind == "drift":
        return np.asarray(own + np.linspace(1.0 / length, 1.0, length)[:, None] * sign * shift)
    if plan.kind == "common":
        direction = np.nan_to_num(x[int(rng.integers(len(x))), chosen] - mean)
        reach = float(np.sqrt(np.mean((direction / shift) ** 2)))  # root mean square, in units of the wanted size
        return np.asarray(own + direction / (reach or 1.0))
    if plan.kind == "surge":
        load, level = np.empty((length, 1)), 1.0
        for row, shock in enumerate(rng.normal(size=length)):
            level = 1.0 + _LOAD_MEMORY * (level - 1.0) + _LOAD_SHOCK * shock
            load[row] = max(level, 0.0)
        return np.asarray(own + load * sign * shift)
    if plan.kind == "stuck":
        return np.where(np.isnan(own), np.nan, own[:1])
    if plan.kind == "scale":
        return np.asarray(mean + (1.0 + size) * (own - mean))
    if plan.kind == "flip":
        return np.asarray(2.0 * mean - own)
    away = int(rng.integers(length, max(len(x) - length, length + 1)))  # swap: rows of another time, wrapped around
    return x[(np.arange(plan.start, plan.stop) + away) % len(x)][:, chosen]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
