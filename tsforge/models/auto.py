"""Auto: not a forecaster of its own but the best mixture of the others, found on held-out folds (``tsforge.app.auto``).

The entry carries the settings of that search; a fitted one is an ``EnsembleNetwork`` of other models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction
from tsforge.core.errors import ModelError
from tsforge.models.registry import register


class AutoConfig(ModelConfig):
    """Settings of the search. The window of the fit is the longest look-back tried."""

    name: Literal["auto"] = "auto"
    minutes: float = Field(1.0, ge=0)
    """Time for models that need gradient training, counted from the start of the fit; 0 tries closed forms only. What
    cannot be done in time is not begun."""
    candidates: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of models to try; default all that are registered."""
    max_trials: int = Field(12, ge=0)
    """Trained candidates at most, those that are stopped early included."""
    folds: int = Field(3, ge=1)
    """Rolling origins on which candidates are compared; the last one is the span that stops training."""
    loss: Literal["mse", "mae"] = "mse"
    """What the mixture minimises, in standard deviations of each variate."""
    weights: Literal["global", "variate", "series"] = "global"
    """One set of weights, or one for each variate or series, drawn towards the global one."""
    max_members: int = Field(8, ge=1)
    """Models in the mixture at most."""
    anchor: bool = True
    """Lean on the linear model that removes the level of its window, the more the less clearly the folds speak against
    it; false lets the folds alone decide."""
    refit: Literal["all", "train"] = "all"
    """Closed forms are fitted once more on every row before the calibration span, or keep to the training span."""


@register("auto")
class Auto(ForecastModel[AutoConfig]):
    """What an ensemble calls its model: holds the members and the report of how they were chosen.

    Attributes:
        members: the fitted networks, set by ``EnsembleNetwork``.
        report: name -> records, shown as the explanation.
    """

    members: nn.ModuleList
    config_class = AutoConfig
    capabilities = Capabilities(
        closed_form=True,
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        scaling=("global", "series", "series_max", "window", "window_mean", "last", "none"),
    )
    source = (
        "Caruana, Niculescu-Mizil, Crew, Ksikes (2004), Ensemble Selection from Libraries of Models, ICML; "
        "Jamieson, Talwalkar (2016), Non-stochastic Best Arm Identification, AISTATS (successive halving)"
    )
    test_configs = ()

    def __init__(self, config: AutoConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.report: dict[str, Any] = {}

    def forward(self, batch: Batch) -> Prediction:
        """Refuse: only the ensemble around it forecasts.

        Raises:
            ModelError: always.
        """
        raise ModelError("model 'auto' is a choice among others: fit it with `tsforge fit model=auto`")

    def explain(self) -> dict[str, Any]:
        """Return the leaderboard of the search."""
        return self.report
