"""Generated multivariate series with labelled anomalies: known truth for tests, demos and grading detectors.

A series is ``scale * (level + trend + seasons + coupling + noise)``: seasons of several periods, an exogenous driver
(known ahead) and the noise of the variate before, some rows earlier, as coupling; noise is autocorrelated and its
spread varies. Blocks of cells are missing and the regime changes once, all of that normal. Anomalies are then written
over the finished values, so that a twin without them exists and labels are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from tsforge.core.config import Config, Seed
from tsforge.core.errors import ConfigError
from tsforge.core.seeding import derive_seed
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Bools, TimeGrid, parse_freq, parse_time
from tsforge.data.schema import SeriesSchema

AnomalyKind = Literal["spike", "level_shift", "drift", "frozen_sensor", "broken_correlation", "missing_burst"]
ANOMALY_KINDS: tuple[AnomalyKind, ...] = (
    "spike",
    "level_shift",
    "drift",
    "frozen_sensor",
    "broken_correlation",
    "missing_burst",
)
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# rows an anomaly lasts, shortest and longest
_DURATIONS: dict[AnomalyKind, tuple[int, int]] = {
    "spike": (1, 3),
    "level_shift": (24, 72),
    "drift": (48, 120),
    "frozen_sensor": (12, 48),
    "broken_correlation": (24, 72),
    "missing_burst": (6, 36),
}
_NOISE_MEMORY = 0.7
_DRIVER_MEMORY = 0.98
_BURN_IN = 512
_REGIME_LEVEL = 0.8
_REGIME_AMPLITUDE = 1.4


class SyntheticConfig(Config):
    """What to generate; strengths are in units of the seasonal signal's standard deviation unless stated."""

    num_series: int = Field(4, ge=1)
    num_rows: int = Field(4000, ge=2)
    """Rows of each series with targets."""
    num_variates: int = Field(3, ge=1)
    future_rows: int = Field(0, ge=0)
    """Rows after the last target in which only the driver is given."""
    freq: str = "1h"
    start: str | int = "2023-01-01"
    """Time of the first row, ISO text (or an integer with an integer ``freq``)."""
    seasonalities: tuple[float, ...] = (24.0, 168.0)
    """Periods in rows."""
    trend: float = 1.0
    """Change over the whole span."""
    driver: float = 0.6
    """Strength of the exogenous driver."""
    cross_lag: int = Field(3, ge=1)
    """Rows by which a variate follows the one before."""
    cross: float = 0.4
    """Strength of that following."""
    noise: float = Field(0.25, gt=0)
    heteroskedasticity: float = Field(0.4, ge=0)
    """Standard deviation of the logarithm of the noise spread."""
    missing_share: float = Field(0.01, ge=0, lt=1)
    """Expected share of missing cells, in blocks, before anomalies."""
    missing_block: float = Field(6.0, ge=1)
    """Mean rows of a missing block."""
    regime_change: float | None = Field(0.35, gt=0, lt=1)
    """Where level and amplitude change for good, as a fraction of the span; None = nowhere."""
    anomalies: tuple[AnomalyKind, ...] = ANOMALY_KINDS
    num_anomalies: int = Field(12, ge=0)
    """Anomalies in each series; kinds come in turn."""
    anomaly_start: float = Field(0.6, ge=0, lt=1)
    """Fraction of the span before which there is no anomaly."""
    anomaly_strength: float = Field(8.0, gt=0)
    """Size of spikes and drifts in standard deviations of the noise; level shifts have 3/4 of it."""
    seed: Seed = 0

    @field_validator("freq")
    @classmethod
    def _known_freq(cls, value: str) -> str:
        try:
            return parse_freq(value).text
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _consistent(self) -> SyntheticConfig:
        if any(period < 2 for period in self.seasonalities):
            raise ValueError(f"seasonalities {self.seasonalities} must be at least 2 rows each")
        if self.num_anomalies and not self.anomalies:
            raise ValueError("num_anomalies needs kinds in anomalies; set it to 0 for clean series")
        if "broken_correlation" in self.anomalies and self.num_anomalies and not self.driver:
            raise ValueError("broken_correlation needs a driver above 0")
        if self.num_anomalies:
            room = self._slot_rows()
            longest = max(_DURATIONS[kind][1] for kind in self.anomalies)
            if room < longest + 2:
                raise ValueError(
                    f"{self.num_anomalies} anomalies of up to {longest} rows do not fit into the last "
                    f"{1 - self.anomaly_start:.0%} of {self.num_rows} rows; take fewer, longer series or shorter kinds"
                )
        return self

    def _slot_rows(self) -> int:
        return (self.num_rows - self._first_anomaly_row()) // self.num_anomalies

    def _first_anomaly_row(self) -> int:
        return max(int(self.num_rows * self.anomaly_start), 1)


@dataclass(frozen=True)
class Generated:
    """A generated data set.

    Attributes:
        frame: the series with anomalies.
        clean: the same series without them.
        labels: ``series_id, start, end`` (included), ``kind, variates`` (list), in order of series and time.
    """

    frame: SeriesFrame
    clean: SeriesFrame
    labels: pl.DataFrame


def generate(config: SyntheticConfig) -> tuple[SeriesFrame, pl.DataFrame]:
    """Return the series and the labels of their anomalies (see ``Generated``)."""
    made = generate_with_twin(config)
    return made.frame, made.labels


def generate_with_twin(config: SyntheticConfig) -> Generated:
    """Return the series with and without anomalies, and the labels; equal seeds give equal bytes.

    The twin does not depend on the anomaly settings, except that cells inside anomalies are never missing in it.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "values"))
    values, coupling, driver, noise_scale = _normal_values(config, rng)
    missing = _missing_blocks(config, rng)
    events = _place_anomalies(config, np.random.default_rng(derive_seed(config.seed, "anomalies")))
    changed = values.copy()
    for event in events:
        cells = (slice(event.start, event.stop), list(event.variates))
        missing[event.series][cells] = False
        changed[event.series][cells] = _anomalous(event, values, coupling, noise_scale, config.anomaly_strength)
    start = parse_time(config.start, integer=parse_freq(config.freq).kind == "integer")
    grid = TimeGrid(start, config.freq)
    labels = _labels(events, config, grid)
    frame, clean = (_as_frame(config, np.where(missing, np.nan, array), driver, grid) for array in (changed, values))
    return Generated(frame, clean, labels)


def _memory(white: Floats, memory: float) -> Floats:
    """Return a first-order autoregression along axis 1 with unit variance, without its burn-in.

    Doubling sums the geometric series: after j passes the last 2^j shocks count.
    """
    state, weight, lag = white.copy(), memory, 1
    while lag < _BURN_IN:
        shifted = np.zeros_like(state)
        shifted[:, lag:] = state[:, :-lag]
        state = state + weight * shifted
        weight, lag = weight * weight, 2 * lag
    result: Floats = state[:, _BURN_IN:] * math.sqrt(1 - memory * memory)
    return result


def _season(rng: np.random.Generator, time: Floats, period: float, shape: tuple[int, int]) -> Floats:
    """Return a periodic signal [S, T, V] of three harmonics with random phases and unit variance."""
    signal = np.zeros((shape[0], len(time), shape[1]))
    power = np.zeros((shape[0], 1, shape[1]))
    for harmonic in range(1, 1 + min(3, int(period // 2))):
        amplitude = rng.uniform(0.5, 1.0, (shape[0], 1, shape[1])) / harmonic
        phase = rng.uniform(0, 2 * math.pi, (shape[0], 1, shape[1]))
        signal += amplitude * np.sin(2 * math.pi * harmonic / period * time[None, :, None] + phase)
        power += amplitude**2 / 2
    return signal / np.sqrt(power)


def _normal_values(config: SyntheticConfig, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Return values [S, T, V], the coupled part of them [S, T, V], driver [S, T + future], noise scale [S, V]."""
    series, rows, variates = config.num_series, config.num_rows, config.num_variates
    everything = rows + config.future_rows
    time = np.arange(everything, dtype=np.float64)
    shape = (series, variates)
    scale = 10 ** rng.uniform(-0.5, 1.5, (series, 1, variates))
    level = rng.normal(0, 3, (series, 1, variates))
    periods = config.seasonalities
    seasons = np.zeros((series, rows, variates))
    for period in periods:
        seasons += _season(rng, time[:rows], period, shape) / math.sqrt(len(periods))
    driver = _memory(rng.standard_normal((series, everything + _BURN_IN, 1)), _DRIVER_MEMORY)
    if periods:
        driver = (driver + 0.7 * _season(rng, time, periods[0], (series, 1))) / math.sqrt(1.49)
    shocks = _memory(rng.standard_normal((series, rows + config.cross_lag + _BURN_IN, variates)), _NOISE_MEMORY)
    spread = _memory(rng.standard_normal((series, rows + config.cross_lag + _BURN_IN, variates)), _DRIVER_MEMORY)
    noise = config.noise * np.exp(config.heteroskedasticity * spread) * shocks
    sign = rng.choice([-1.0, 1.0], (series, 1, variates))
    coupling = config.driver * sign * driver[:, :rows]
    coupling[:, :, 1:] += config.cross / config.noise * noise[:, :rows, :-1]  # the variate before, cross_lag rows ago
    slope = rng.uniform(0.5, 1.5, (series, 1, variates)) * rng.choice([-1.0, 1.0], (series, 1, variates))
    trend = config.trend * slope * (time[None, :rows, None] / rows)
    if config.regime_change is not None:
        later = time[None, :rows, None] >= int(config.regime_change * rows)
        trend = trend + _REGIME_LEVEL * later
        seasons *= np.where(later, _REGIME_AMPLITUDE, 1.0)
    values = scale * (level + trend + seasons + coupling + noise[:, config.cross_lag :])
    return values, scale * coupling, driver[:, :, 0], config.noise * scale[:, 0]


def _missing_blocks(config: SyntheticConfig, rng: np.random.Generator) -> Bools:
    """Return which cells [S, T, V] are missing: blocks of geometric length at random starts."""
    shape = (config.num_series, config.num_rows, config.num_variates)
    if not config.missing_share:
        return np.zeros(shape, dtype=np.bool_)
    rate = -math.log1p(-config.missing_share) / config.missing_block
    series, row, variate = np.nonzero(rng.random(shape) < rate)
    length = rng.geometric(1 / config.missing_block, len(row))
    edges = np.zeros((shape[0], shape[1] + 1, shape[2]), dtype=np.int64)
    np.add.at(edges, (series, row, variate), 1)
    np.add.at(edges, (series, np.minimum(row + length, shape[1]), variate), -1)
    missing: Bools = np.cumsum(edges, axis=1)[:, :-1] > 0
    return missing


@dataclass(frozen=True)
class _Event:
    kind: AnomalyKind
    series: int
    start: int
    stop: int
    variates: tuple[int, ...]
    sign: float


def _place_anomalies(config: SyntheticConfig, rng: np.random.Generator) -> list[_Event]:
    """Return events in order of series and time: one a slot, never touching, kinds in shuffled turns."""
    if not config.num_anomalies:
        return []
    slot, first = config._slot_rows(), config._first_anomaly_row()
    turns = -(-config.num_anomalies // len(config.anomalies))
    events = []
    for series in range(config.num_series):
        kinds = rng.permutation(np.repeat(np.arange(len(config.anomalies)), turns)[: config.num_anomalies])
        for position, number in enumerate(kinds):
            kind = config.anomalies[number]
            shortest, longest = _DURATIONS[kind]
            duration = int(rng.integers(shortest, longest + 1))
            start = first + position * slot + int(rng.integers(1, slot - duration))
            count = int(rng.integers(1, (config.num_variates + 1) // 2 + 1))
            chosen = tuple(sorted(int(index) for index in rng.choice(config.num_variates, count, replace=False)))
            sign = float(rng.choice([-1.0, 1.0]))
            events.append(_Event(kind, series, start, start + duration, chosen, sign))
    return events


def _anomalous(event: _Event, values: Floats, coupling: Floats, noise_scale: Floats, strength: float) -> Floats:
    """Return what the cells [rows, variates] of an event hold instead."""
    columns = list(event.variates)
    rows = slice(event.start, event.stop)
    normal = values[event.series, rows][:, columns]
    size = event.sign * strength * noise_scale[event.series, columns]
    ramp = np.arange(1, len(normal) + 1)[:, None] / len(normal)
    if event.kind == "spike":
        return normal + size
    if event.kind == "level_shift":
        return normal + 0.75 * size
    if event.kind == "drift":
        return normal + ramp * size
    if event.kind == "frozen_sensor":
        return np.broadcast_to(values[event.series, event.start - 1, columns], normal.shape)
    if event.kind == "broken_correlation":
        return normal - 2 * coupling[event.series, rows][:, columns]
    return np.full_like(normal, np.nan)


def _names(config: SyntheticConfig) -> tuple[list[str], list[str]]:
    width = len(str(config.num_series - 1))
    ids = [f"series_{index:0{width}d}" for index in range(config.num_series)]
    return ids, [f"x{index + 1}" for index in range(config.num_variates)]


def _labels(events: list[_Event], config: SyntheticConfig, grid: TimeGrid) -> pl.DataFrame:
    ids, variates = _names(config)
    bounds = np.array([(event.start, event.stop - 1) for event in events], dtype=np.int64).reshape(-1, 2)
    return pl.DataFrame(
        {
            "series_id": pl.Series([ids[event.series] for event in events], dtype=pl.String),
            "start": grid.time_at(bounds[:, 0]),
            "end": grid.time_at(bounds[:, 1]),
            "kind": pl.Series([event.kind for event in events], dtype=pl.String),
            "variates": pl.Series(
                [[variates[v] for v in event.variates] for event in events], dtype=pl.List(pl.String)
            ),
        }
    )


def _as_frame(config: SyntheticConfig, values: Floats, driver: Floats, grid: TimeGrid) -> SeriesFrame:
    ids, names = _names(config)
    everything = driver.shape[1]
    padded = np.full((config.num_series, everything, config.num_variates), np.nan)
    padded[:, : config.num_rows] = values
    times = grid.time_at(np.tile(np.arange(everything), config.num_series))
    keys = pl.Series("series_id", ids).gather(np.repeat(np.arange(config.num_series), everything))
    columns = [pl.Series(name, padded[:, :, index].reshape(-1)) for index, name in enumerate(names)]
    table = pl.DataFrame([keys, times, *columns, pl.Series("driver", driver.reshape(-1))])
    schema = SeriesSchema(targets=tuple(names), known=("driver",), freq=config.freq)
    return SeriesFrame(table, schema)
