"""How to search: budget, sampler, pruner, and what differs from the search spaces that stand beside the defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tsforge.core.config import Config, Seed

_KEYS = frozenset({"low", "high", "log", "choices"})


class SpaceOverride(Config):
    """A range or a list of choices that narrows or replaces a declared search space."""

    low: float | None = None
    high: float | None = None
    log: bool | None = None
    choices: tuple[Any, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_kind(self) -> SpaceOverride:
        ranged = any(value is not None for value in (self.low, self.high, self.log))
        if ranged == (self.choices is not None):
            raise ValueError("give either choices, or low, high and log")
        return self


class TuneConfig(Config):
    """Settings of a study; running it again with the same name continues it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$", max_length=80)
    """Name of the study and of its files."""
    num_trials: int = Field(default=30, ge=1)
    """Finished trials wanted in all, those of earlier sessions included."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """No new trial starts after this time in one session; None sets no limit."""
    trial_timeout_seconds: float | None = Field(default=None, gt=0)
    """A trial is stopped at its next report after this time; None sets no limit."""
    metric: str = "valid_mae"
    """Metric of the objective that decides; also read from every epoch to stop hopeless trials."""
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: Literal["tpe", "random"] = "tpe"
    num_startup_trials: int = Field(default=10, ge=1)
    """Random trials before the sampler learns from results."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    num_warmup_reports: int = Field(default=1, ge=0)
    """Reports of a trial before the median pruner may stop it."""
    seed: Seed = 0
    starts_from_defaults: bool = True
    """The first trial is the configuration as it stands, so the result is never worse than it."""
    max_first_failures: int = Field(default=5, ge=1)
    """Give up when this many trials fail and none has succeeded."""
    space: dict[str, SpaceOverride | None] = Field(default_factory=dict)
    """Dotted field name -> what differs; ``null`` keeps that field at its configured value."""

    @model_validator(mode="after")
    def _has_effect(self) -> TuneConfig:
        without = {"num_startup_trials": self.sampler == "random", "num_warmup_reports": self.pruner != "median"}
        for name, is_idle in without.items():
            if is_idle and getattr(self, name) != type(self).model_fields[name].default:
                chosen = f"sampler={self.sampler}" if name == "num_startup_trials" else f"pruner={self.pruner}"
                raise ValueError(f"{name} has no effect with {chosen}; leave it out")
        return self

    @field_validator("space", mode="before")
    @classmethod
    def _accept_nested_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        flat: dict[str, Any] = {}
        for name, override in _flatten(value):
            known = flat.get(name)
            both = isinstance(known, Mapping) and isinstance(override, Mapping)
            flat[name] = {**known, **override} if both else override  # type: ignore[dict-item]
        return flat


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names: ``{model: {lags: {low: 1}}}`` (as a dotted override makes it) means ``model.lags``."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not _KEYS & set(value):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, None if value is False else value
