"""What to record of a run, and where it shows up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tsforge.core.config import Config


class TrackingConfig(Config):
    """How a use-case is tracked; the address of the store is a matter of the installation (``MLFLOW_TRACKING_URI``)."""

    enabled: bool = True
    """False records nothing and never loads MLflow."""
    experiment: str = Field(default="tsforge", min_length=1)
    """MLflow experiment the runs belong to."""
    register_as: str | None = Field(default=None, min_length=1)
    """Registered model name that receives a new version with the fitted artifact; None registers nothing."""
    alias: Literal["champion", "challenger"] | None = "challenger"
    """Alias the new version gets; used only with ``register_as``."""

    @model_validator(mode="after")
    def _has_effect(self) -> TrackingConfig:
        if self.register_as is not None and not self.enabled:
            raise ValueError("register_as has no effect with enabled=false; leave it out, or switch tracking on")
        if self.register_as is None and self.alias != type(self).model_fields["alias"].default:
            raise ValueError("alias has no effect without register_as, the name of the registered model")
        return self
