"""Which column of a table plays which part, and the step of its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tsforge.core.errors import ConfigError, listing
from tsforge.data.grid import canonical_freq, parse_freq

RESERVED = ("series_id", "time")


@dataclass(frozen=True, kw_only=True)
class SeriesSchema:
    """Roles of the columns of a ``SeriesFrame``.

    Attributes:
        targets: variates to forecast, all together.
        past: covariates observed up to the cutoff only.
        known: covariates also known over the horizon (calendar, plans, weather forecasts).
        static: constants of a series.
        freq: step of the grid (``15m 1h 1d 1w 1mo``; ``1i`` for integer time), stored in its shortest form.

    Raises:
        ConfigError: no target, a column with two roles, a reserved name, or an unknown frequency.
    """

    targets: tuple[str, ...]
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    freq: str

    def __post_init__(self) -> None:
        for role in ("targets", "past", "known", "static"):
            names = getattr(self, role)
            if isinstance(names, str):
                raise ConfigError(f"{role} is the text '{names}'; give a list of column names")
            object.__setattr__(self, role, tuple(names))
        if not self.targets:
            raise ConfigError("the schema names no target column; give at least one")
        counts = Counter((*self.columns, *self.static))
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ConfigError(f"column(s) {listing(twice)} have more than one role; each may have one")
        reserved = [name for name in counts if name in RESERVED]
        if reserved:
            raise ConfigError(f"column name(s) {listing(reserved)} are reserved; rename the data column")
        object.__setattr__(self, "freq", canonical_freq(self.freq))

    @property
    def columns(self) -> tuple[str, ...]:
        """Time-varying columns in the order of every dense array: targets, past, known."""
        return self.targets + self.past + self.known

    @property
    def has_integer_time(self) -> bool:
        """Whether time is a plain integer instead of a datetime."""
        return parse_freq(self.freq).kind == "integer"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types that ``from_dict`` reads back."""
        return {
            "targets": list(self.targets),
            "past": list(self.past),
            "known": list(self.known),
            "static": list(self.static),
            "freq": self.freq,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SeriesSchema:
        """Return the schema that ``to_dict`` described.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"not a series schema (keys {listing(values, 10)}): {error}") from error
