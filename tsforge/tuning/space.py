"""Search spaces: declared beside the defaults, narrowed, replaced or left out by a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tsforge.core.errors import ConfigError, listing, nearest
from tsforge.tuning.config import SpaceOverride


class Suggester(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw a whole number."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        ...

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """Draw one of the choices."""
        ...


@dataclass(frozen=True)
class Range:
    """An inclusive range of numbers; ``stand_in``: a value that is none of them, and the number tried in its place."""

    low: float
    high: float
    log: bool = False
    is_integer: bool = False
    stand_in: tuple[Any, float] | None = None

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """The smallest and the largest value that may be drawn."""
        kind = int if self.is_integer else float
        return kind(self.low), kind(self.high)

    def suggest(self, trial: Suggester, name: str) -> int | float:
        """Draw a value of the field ``name``."""
        if self.is_integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, float(self.low), float(self.high), log=self.log)

    def encode(self, value: Any) -> Any:
        """Return ``value`` as the store keeps it, or None when it lies outside."""
        if self.stand_in is not None and value == self.stand_in[0]:
            value = self.stand_in[1]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high or (self.is_integer and value != int(value)):
            return None
        return int(value) if self.is_integer else float(value)

    def decode(self, stored: Any) -> Any:
        """Return the value behind what the store keeps."""
        return stored

    def describe(self) -> str:
        """Return the space as text, equal for equal spaces."""
        kind = "int" if self.is_integer else "float"
        return f"{kind} {self.low:g}..{self.high:g}{' log' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """A list of values of any plain type; they are stored by their JSON text, so lists are possible too."""

    choices: tuple[Any, ...]

    @property
    def _texts(self) -> list[str]:
        return [json.dumps(choice, sort_keys=True) for choice in self.choices]

    def suggest(self, trial: Suggester, name: str) -> Any:
        """Draw a value of the field ``name``."""
        return self.decode(trial.suggest_categorical(name, self._texts))

    def encode(self, value: Any) -> Any:
        """Return ``value`` as the store keeps it, or None when it is no choice."""
        text = json.dumps(value, sort_keys=True, default=str)
        return text if text in self._texts else None

    def decode(self, stored: Any) -> Any:
        """Return the value behind what the store keeps."""
        return json.loads(stored)

    def describe(self) -> str:
        """Return the space as text, equal for equal spaces."""
        return f"one of {', '.join(self._texts)}"


Dimension = Range | Choice
Space = dict[str, Dimension]


def build_space(
    declared: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, SpaceOverride | None],
    current: Mapping[str, Any],
) -> Space:
    """Return what to search.

    Args:
        declared: ``core.config.search_space`` of the configuration to tune.
        overrides: per dotted field: a narrower or other space, or None to leave the field alone. A field without a
            declared space may be given one.
        current: every field of the configuration with its present value, dotted.

    Raises:
        ConfigError: an override names no field, a range is empty or unusable, or nothing is left to search.
    """
    for name in overrides:
        if name not in current:
            raise ConfigError(
                f"space.{name}: the configuration has no such field{nearest(name, current)} "
                f"(searched by default: {listing(declared, 20) or 'nothing'})"
            )
    space: Space = {}
    for name in [*declared, *(name for name in overrides if name not in declared)]:
        if name in overrides and overrides[name] is None:
            continue
        space[name] = _dimension(name, declared.get(name), overrides.get(name), current.get(name))
    if not space:
        raise ConfigError(
            "nothing to search: the configuration declares no search space for its model and none is given; "
            "add one, for example space.train.learning_rate.low=1e-4 space.train.learning_rate.high=1e-2"
        )
    return space


def _dimension(name: str, declared: Mapping[str, Any] | None, override: SpaceOverride | None, value: Any) -> Dimension:
    if override is not None and override.choices is not None:
        return _choice(name, override.choices)
    base = dict(declared or {})
    if override is None and "choices" in base:
        return _choice(name, tuple(base["choices"]))
    given = override.model_dump(exclude_none=True) if override is not None else {}
    low, high = (given.get(key, base.get(key)) for key in ("low", "high"))
    if low is None or high is None:
        raise ConfigError(f"space.{name}: needs both low and high, it declares no range of its own to narrow")
    kind = base.get("type") or _kind(name, value)
    beside = base.get("stand_in")
    stand_in = None if beside is None else (beside["value"], float(beside["number"]))
    dimension = Range(low, high, bool(given.get("log", base.get("log", False))), kind == "int", stand_in)
    _check(name, dimension)
    return dimension


def _kind(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"space.{name}: the field holds {value!r}, no number; give choices instead of a range")
    return "int" if isinstance(value, int) else "float"


def _choice(name: str, choices: tuple[Any, ...]) -> Choice:
    choice = Choice(choices)
    if len(set(choice._texts)) < len(choices):
        raise ConfigError(f"space.{name}: a choice is listed twice in {list(choices)}")
    return choice


def _check(name: str, space: Range) -> None:
    if not space.low <= space.high:
        raise ConfigError(f"space.{name}: low {space.low:g} is above high {space.high:g}")
    if space.log and space.low <= 0:
        raise ConfigError(f"space.{name}: a logarithmic range needs low above 0 (given: {space.low:g})")
    if space.is_integer and (space.low != int(space.low) or space.high != int(space.high)):
        raise ConfigError(f"space.{name}: the field takes whole numbers, the range is {space.low:g}..{space.high:g}")
