"""Settings of a benchmark: data sets, model entries, look-backs, horizons, seeds, baselines, peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError
from tsforge.data.calendar import Feature
from tsforge.data.splits import SplitConfig
from tsforge.training.config import TrainConfig

_GROUPS = ("train", "likelihood", "scaling")
Baselines = Literal["auto", "naive"]


class ModelEntry(Config):
    """A model with what differs from its defaults. As text: ``name:key=value:key=value``, keys of the model, or with
    the prefix ``train.``, ``likelihood.`` or ``scaling.``; ``context_length=`` gives it a look-back of its own.
    ``library/Model`` is a peer, its keys are those of that library's model.
    """

    name: str
    label: str = ""
    """How the table calls it; default the text it was given as."""
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    likelihood: dict[str, Any] = Field(default_factory=dict)
    scaling: dict[str, Any] = Field(default_factory=dict)
    context_lengths: tuple[int, ...] | None = None
    """Look-backs of this model; default those of the benchmark."""
    data: tuple[str, ...] | None = None
    """Names of the data sets it is measured on; default all."""
    seeds: int | None = Field(None, ge=1)
    """Default those of the benchmark."""

    @property
    def title(self) -> str:
        """The label, else the name."""
        return self.label or self.name

    @property
    def is_peer(self) -> bool:
        """Whether another library makes the forecast."""
        return "/" in self.name


class PeersConfig(Config):
    """Where other libraries are installed, and how much they may compute."""

    python: str | None = None
    """Python interpreter of the environment they are installed in."""
    budget_seconds: float | None = Field(1800.0, gt=0)
    """Wall seconds of one setting (fit and forecasts); one that needs more is a failed row."""


class BenchmarkConfig(Config):
    """What to measure."""

    datasets: tuple[str, ...]
    """Wide Parquet or CSV files (times, one column a variate), names of known sets, or names in the store."""
    models: tuple[ModelEntry, ...]
    context_lengths: tuple[int, ...] | None = Field(None, min_length=1)
    """Default: that of a known set, else 336."""
    horizons: tuple[int, ...] | None = Field(None, min_length=1)
    """Default: those of a known set, else 96."""
    num_horizons: int | None = Field(None, ge=1)
    """Of the horizons of each data set only the first so many; 1 = the shortest of a known set."""
    seeds: int = Field(1, ge=1)
    """Runs of each setting with seeds 0, 1, ...; a fit without randomness is run once."""
    baselines: Baselines = "auto"
    """auto: last value, seasonal naive, drift where the training rows trend, OLS+IN and ridge+IN at every look-back
    and at their best one, chosen on validation. naive: last value and seasonal naive only."""
    time: str | None = None
    """Time column; default ``ds``, else the first column of dates."""
    columns: tuple[str, ...] | None = None
    """Variates; default those of a known set, else every numeric column."""
    calendar: tuple[Feature, ...] = ()
    """Features of the time stamp that models with known covariates are given; the others do without."""
    split: SplitConfig | None = None
    """Default: the literature's (ETT by months, others 7:1:2)."""
    season_length: int | None = Field(None, ge=1)
    """Of the seasonal naive row; default that of a known set, else from the frequency, else found in the training
    rows."""
    data_folder: str | None = None
    """Where known sets lie (or in its ``forecast/``); default TSFORGE_DATA."""
    train: TrainConfig = TrainConfig()
    peers: PeersConfig = PeersConfig()
    workers: int = Field(1, ge=1)
    """Settings measured at a time, each in a process of its own; 1 = in this process."""
    threads: int = Field(1, ge=1)
    """Threads of a worker process (with 1 worker the process keeps its own)."""
    budget_minutes: float | None = Field(None, gt=0)
    """No setting is begun after this time; those left out are reported as skipped."""
    refresh: bool = False
    """Measure again what is cached."""
    name: str = ""
    """Of the report; default the data set, or the number of data sets."""

    @field_validator("models", mode="before")
    @classmethod
    def _parse_models(cls, values: Any) -> Any:
        items = [values] if isinstance(values, str | Mapping) else values
        if not items:
            raise ConfigError("models: name at least one model; `tsforge models` lists them")
        return [parse_entry(item) if isinstance(item, str) else item for item in items]

    @field_validator("datasets", mode="before")
    @classmethod
    def _some_data(cls, values: Any) -> Any:
        items = [values] if isinstance(values, str) else values
        if not items:
            raise ConfigError("datasets: name at least one data set")
        return items

    @field_validator("context_lengths", "horizons")
    @classmethod
    def _positive(cls, values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if values is not None and min(values) < 1:
            raise ConfigError(f"context_lengths and horizons must be at least 1, given: {list(values)}")
        return values


def parse_entry(text: str) -> dict[str, Any]:
    """Return the plain form of ``name:key=value:...``; dots in a key lead into nested settings.

    Raises:
        ConfigError: a part without ``=``.
    """
    name, *parts = text.split(":")
    entry: dict[str, Any] = {"name": name.strip(), "label": text.strip()}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign:
            raise ConfigError(f"models: '{part}' in '{text}' is no key=value; write for example linear:ridge=5e4")
        group, dot, rest = key.strip().partition(".")
        if key.strip() == "context_length":
            entry["context_lengths"] = [yaml.safe_load(value)]
            continue
        if not dot or group not in _GROUPS:
            group, rest = "model", key.strip()
        *outer, last = rest.split(".")
        place = entry.setdefault(group, {})
        for step in outer:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"models: '{part}' in '{text}' leads into '{step}', which was given as a single value"
                )
        place[last] = yaml.safe_load(value)
    return entry
