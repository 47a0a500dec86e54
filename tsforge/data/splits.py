"""Training, validation and test spans in absolute grid rows; a part owns the targets in it, contexts may look back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from pydantic import model_validator

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.grid import show_time
from tsforge.data.panel import Panel

_MONTH_DAYS = 30  # the literature's month for the ETT sets
_ETT_ROWS_PER_DAY = {"etth": 24, "ettm": 96}
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Splits:
    """Half-open spans ``[start, stop)`` of absolute grid rows, in order of time and without overlap."""

    train: tuple[int, int]
    valid: tuple[int, int]
    test: tuple[int, int]

    def to_dict(self) -> dict[str, list[int]]:
        """Return plain types."""
        return {"train": list(self.train), "valid": list(self.valid), "test": list(self.test)}


class SplitConfig(Config):
    """How to cut the data; the settings of one kind are errors under another."""

    kind: Literal["fractions", "counts", "times"] = "fractions"
    train: float = 0.7
    """Share of the rows for training (rounded down)."""
    valid: float = 0.1
    """Share for validation; the rest of the rows when the three shares sum to 1."""
    test: float = 0.2
    """Share for testing (rounded down), always the last rows used."""
    counts: tuple[int, int, int] | None = None
    """Rows of the three parts, from the first row on; rows after them stay unused."""
    ends: tuple[str | int, str | int, str | int | None] | None = None
    """Last time (included) of the three parts, ISO text or integer; None as the third = the last observed row."""

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        if (self.counts is not None) != (self.kind == "counts"):
            raise ValueError("counts must be given for kind 'counts' and only there")
        if (self.ends is not None) != (self.kind == "times"):
            raise ValueError("ends must be given for kind 'times' and only there")
        shares = (self.train, self.valid, self.test)
        if self.kind != "fractions" and shares != (0.7, 0.1, 0.2):
            raise ValueError(f"train, valid and test have no effect for kind '{self.kind}'")
        if self.train <= 0 or min(shares) < 0 or sum(shares) > 1 + _TOLERANCE:
            raise ValueError(f"shares {shares} must not be negative, sum to at most 1, and train must be above 0")
        if self.counts is not None and (self.counts[0] < 1 or min(self.counts) < 0):
            raise ValueError(f"counts {self.counts} must not be negative, and train at least 1")
        return self


def make_splits(panel: Panel, config: SplitConfig | None = None) -> Splits:
    """Return the spans of a panel; rows after the last observed target belong to no part.

    Raises:
        DataError: a part that was asked for gets no row, or the data is too short.
    """
    config = config or SplitConfig()
    start, stop = panel.span()
    if config.kind == "times":
        splits = _by_times(panel, config, start, stop)
    else:
        counts = config.counts if config.counts is not None else _fractions(config, stop - start)
        if sum(counts) > stop - start:
            raise DataError(f"the split asks for {sum(counts)} rows {counts}, the data has {stop - start}")
        splits = _from_counts(start, counts)
    wanted = (True, True, True) if config.kind == "times" else _wanted(config)
    first, last = (show_time(panel.grid.time_at(row)) for row in (start, stop - 1))
    for name, part, asked in zip(
        ("train", "valid", "test"), (splits.train, splits.valid, splits.test), wanted, strict=True
    ):
        if asked and part[1] <= part[0]:
            raise DataError(
                f"the {name} part of the split has no rows (the data has {stop - start}, from {first} to {last}); "
                "change the split or bring more data"
            )
    return splits


def literature_splits(name: str, num_rows: int) -> Splits:
    """Return the spans used in the long-horizon literature for a data set of ``num_rows`` rows starting at row 0.

    Args:
        name: data set or file name; ``ETTh*`` and ``ETTm*`` take 12, 4 and 4 months of 30 days, all others
            ``int(0.7 n)`` rows for training, ``int(0.2 n)`` for the test and the rest for validation.
        num_rows: rows of the data set.

    Raises:
        DataError: too few rows.

    Source: data loaders of TimeXer (thuml/TimeXer, data_provider/data_loader.py), as stated in the data README.
    """
    stem = PurePath(name).name.lower()
    per_day = next((rows for prefix, rows in _ETT_ROWS_PER_DAY.items() if stem.startswith(prefix)), None)
    if per_day is not None:
        month = _MONTH_DAYS * per_day
        counts = (12 * month, 4 * month, 4 * month)
        if num_rows < sum(counts):
            raise DataError(f"the split of {name} needs {sum(counts)} rows, the data has {num_rows}")
        return _from_counts(0, counts)
    train, test = int(num_rows * 0.7), int(num_rows * 0.2)
    if not train or not test:
        raise DataError(f"{num_rows} rows are too few to split 7:1:2; at least 5 are needed")
    return _from_counts(0, (train, num_rows - train - test, test))


def _wanted(config: SplitConfig) -> tuple[bool, bool, bool]:
    shares = config.counts if config.counts is not None else (config.train, config.valid, config.test)
    return shares[0] > 0, shares[1] > 0, shares[2] > 0


def _fractions(config: SplitConfig, num_rows: int) -> tuple[int, int, int]:
    train, test = int(num_rows * config.train), int(num_rows * config.test)
    everything = config.train + config.valid + config.test > 1 - _TOLERANCE
    valid = num_rows - train - test if everything else int(num_rows * config.valid)
    if not config.valid and valid:  # rounding left a row over: it belongs to training
        train, valid = train + valid, 0
    return train, valid, test


def _from_counts(start: int, counts: tuple[int, int, int]) -> Splits:
    first = start + counts[0]
    second = first + counts[1]
    return Splits((start, first), (first, second), (second, second + counts[2]))


def _by_times(panel: Panel, config: SplitConfig, start: int, stop: int) -> Splits:
    if config.ends is None:
        raise ConfigError("kind 'times' needs ends")
    train, valid, test = config.ends
    edges = [panel.grid.floor(end) + 1 for end in (train, valid)]
    edges.append(stop if test is None else min(panel.grid.floor(test) + 1, stop))
    return Splits((start, edges[0]), (edges[0], edges[1]), (edges[1], edges[2]))
