"""What the benchmark knows beforehand: data sets by name, and published results to show beside its own."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from tsforge.core.config import Config, validate
from tsforge.core.errors import ConfigError, DataError, nearest

_HERE = Path(__file__).parent
ENDINGS = (".parquet", ".pq", ".csv", ".txt")


class KnownSet(Config):
    """A data set of the literature: where it lies and by which rules it is used."""

    file: str = ""
    """File name without ending; default the name of the set."""
    columns: tuple[str, ...] | None = None
    """Variates; default every numeric column."""
    frequency: str
    season: int = Field(ge=1)
    """Rows of the known season."""
    context_length: int = Field(ge=1)
    """Look-back where the command names none."""
    horizons: tuple[int, ...]
    """Horizons where the command names none."""
    look_backs: tuple[int, ...]
    """Candidates of the closed-form baselines, chosen on validation."""
    split: str
    source: str
    flaws: str


class PublishedRow(Config):
    """Errors of one model in a publication, at its own look-back."""

    model: str
    look_back: int | None
    """Steps; None where the source does not say."""
    source: str
    memory: bool = False
    """Nobody has read the source again for this table."""
    defects: tuple[str, ...] = ()
    horizons: tuple[int, ...] = ()
    mse: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    mae: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    mean_mse: dict[str, float] = Field(default_factory=dict)
    """Data set -> mean over the usual horizons, where a source gives nothing else."""

    @property
    def title(self) -> str:
        """The model with its look-back and what limits its use."""
        parts = ["published", "look-back not stated" if self.look_back is None else f"L={self.look_back}"]
        return f"{self.model} ({', '.join([*parts, *(['from memory'] if self.memory else [])])})"


class Published(Config):
    """Every published row, and what the names of the defects mean."""

    defects: dict[str, str]
    rows: tuple[PublishedRow, ...]

    def of(self, data: str) -> list[PublishedRow]:
        """Return the rows about one data set; names are compared without case."""
        wanted = data.lower()
        found = []
        for row in self.rows:
            parts = {}
            for part in ("mse", "mae", "mean_mse"):
                about = [values for name, values in getattr(row, part).items() if name.lower() == wanted]
                parts[part] = {data: about[0]} if about else {}
            if any(parts.values()):
                found.append(row.model_copy(update=parts))
        return found


@cache
def known_sets() -> dict[str, KnownSet]:
    """Return the data sets known by name."""
    plain = _read("benchmark_sets.yaml")
    return {name: validate(KnownSet, values, where=name) for name, values in plain.items()}


@cache
def published_results() -> Published:
    """Return the published rows.

    Raises:
        ConfigError: a row names a defect that is not explained, or has not one value a horizon.
    """
    table = validate(Published, _read("published_results.yaml"), where="published_results")
    for row in table.rows:
        unknown = [name for name in row.defects if name not in table.defects]
        uneven = [
            name for part in (row.mse, row.mae) for name, values in part.items() if len(values) != len(row.horizons)
        ]
        if unknown or uneven:
            raise ConfigError(f"published_results: {row.title}: {unknown or uneven} do not fit")
    return table


def locate(name: str, folder: str | None) -> tuple[Path, KnownSet | None] | None:
    """Return the file that a text means, with what is known about it; None = neither a file nor a known set.

    Args:
        name: a path that ends in .parquet, .pq, .csv or .txt, or the name of a known set.
        folder: where known sets lie (or in its ``forecast/``); default ``TSFORGE_DATA``.

    Raises:
        ConfigError: a known set, but no folder is given.
        DataError: a known set whose file is not there.
    """
    if "/" in name or "." in name:
        return Path(name).expanduser(), None
    sets = known_sets()
    if name not in sets:
        return None
    given = folder or os.environ.get("TSFORGE_DATA")
    if not given:
        raise ConfigError(f"'{name}' is a known data set; say where it lies: data_folder=PATH or TSFORGE_DATA")
    file = f"{sets[name].file or name}.parquet"
    places = [Path(given).expanduser() / part / file for part in ("", "forecast")]
    place = next((item for item in places if item.is_file()), None)
    if place is None:
        raise DataError(f"data set '{name}': no {places[0]} and no {places[1]}")
    return place, sets[name]


def unknown_set(name: str, stored: list[str]) -> ConfigError:
    """Return the error about a text that names nothing."""
    names = [*known_sets(), *stored]
    hint = nearest(name, names)
    return ConfigError(
        f"no data set '{name}'{hint}: give a file ({', '.join(ENDINGS)}), one of {', '.join(known_sets())}"
        + (f", or a data set in the store ({', '.join(stored[:20])})" if stored else "; the store is empty")
    )


def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / name).read_text(encoding="utf-8"))
