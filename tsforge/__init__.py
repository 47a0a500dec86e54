"""tsforge: time-series forecasting and anomaly detection, from ingestion to dashboard.

Importing the package is cheap; every public name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AnomalyReport": "tsforge.contracts.tables",
    "Artifact": "tsforge.artifact",
    "DataConfig": "tsforge.data.config",
    "FitConfig": "tsforge.app.fit",
    "Forecast": "tsforge.contracts.tables",
    "SeriesFrame": "tsforge.data.frame",
    "SeriesSchema": "tsforge.data.schema",
    "TsforgeError": "tsforge.core.errors",
    "Workspace": "tsforge.core.workspace",
    "load_artifact": "tsforge.artifact",
    "predict": "tsforge.forecasting.predict",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tsforge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
