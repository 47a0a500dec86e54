"""The registry of models: names without imports, classes on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tsforge.core.config import Config, validate
from tsforge.core.errors import ConfigError
from tsforge.core.registry import Registry

if TYPE_CHECKING:
    from tsforge.contracts.model import ForecastModel, ModelConfig

MODELS: Registry[ForecastModel[Any]] = Registry("model", "tsforge.models", "tsforge.models")
register = MODELS.register


def resolve_model_config(value: Any, where: str = "model") -> ModelConfig:
    """Return the validated config of the model that ``value`` names.

    Args:
        value: a model's config, its plain values with ``name``, or just the name.
        where: dotted path of the setting, for messages.

    Raises:
        ConfigError: no or unknown name, or a mistake in the model's own settings, with its dotted path.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Config):  # a ModelConfig: its class needs torch, which names and messages do not
        name = getattr(value, "name", None)
        if isinstance(name, str) and type(value) is MODELS.get(name).config_class:
            return value
        value = value.model_dump()
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(f"{where}: needs a 'name'; `tsforge models` lists the models")
    return validate(MODELS.get(value["name"]).config_class, value, where=where)
