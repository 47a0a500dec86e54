"""Datasets that ship with tsforge; where each comes from stands in PROVENANCE.md beside it."""

from __future__ import annotations

from pathlib import Path

from tsforge.core.errors import BackendError, ConfigError, listing, nearest

_FOLDER = Path(__file__).resolve().parent


def embedded_datasets() -> list[str]:
    """Return the names of the embedded datasets."""
    return sorted(path.stem for path in _FOLDER.glob("*.parquet"))


def load_embedded(name: str) -> Path:
    """Return the path of a packaged Parquet file.

    Raises:
        ConfigError: no dataset of that name ships with tsforge.
        BackendError: the installation lacks its data files.
    """
    names = embedded_datasets()
    if not names:
        raise BackendError(f"the installation lacks its data files below {_FOLDER}; install tsforge again")
    if name not in names:
        raise ConfigError(f"no embedded dataset '{name}'{nearest(name, names)} (known: {listing(names)})")
    return _FOLDER / f"{name}.parquet"
