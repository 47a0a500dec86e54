"""The registry of models: names without imports, classes on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsforge.core.registry import Registry

if TYPE_CHECKING:
    from tsforge.contracts.model import ForecastModel

MODELS: Registry[ForecastModel[Any]] = Registry("model", "tsforge.models", "tsforge.models")
register = MODELS.register
