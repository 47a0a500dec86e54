"""What to record of a run, and where it shows up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
