"""Linear: one matrix from the context to the horizon, fitted in closed form from window moments.

The model class of Linear, NLinear and OLS/ridge forecasters: remove nothing, the window mean or the last value from
the context, multiply, add it back. Toner and Darlow (2024) show that the linear forecasters of the literature differ
only in such features, and that the closed form beats their SGD fits in most settings. ``offset: window_scale`` is their
OLS+IN, whose extra input is the standard deviation of the context in place of an intercept.

Deviations: the extra input is penalised like any other weight only where ``ridge`` is set; their fixed 1e-5 "for
stability" is replaced by resolving the one direction without variance exactly.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from pydantic import field_validator
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.models._ar_filled import MOST_LAGS
from tsforge.models._ar_gaps import GapFiller
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import MissingRule, lag_moments
from tsforge.models._ar_windows import residual_scale, series_bounds
from tsforge.models._linear_choice import RIDGES, USUAL_RIDGE, Span, choose, usual_ridge
from tsforge.models.registry import register
from tsforge.ops.moments import LeastSquares, WindowMoments, least_squares

Removal = Literal["none", "window_mean", "last"]
_MOST_WEIGHTS = 2**25  # of matrices for each variate that ``weights: auto`` considers, 128 MB
_CHOICES: tuple[Removal, ...] = ("window_mean", "last")
Offset = Literal["none", "constant", "window_scale"]


class LinearConfig(ModelConfig):
    """Settings of the linear forecaster."""

    name: Literal["linear"] = "linear"
    weights: Literal["auto", "shared", "per_variate"] = tunable("shared", choices=["shared", "per_variate"])
    """One matrix for all variates, or one for each; ``auto`` chooses with the ridge."""
    remove: Literal["auto"] | Removal = tunable("window_mean", choices=["none", "window_mean", "last"])
    """What is subtracted from each context and added back: ``last`` is NLinear. ``auto``: the mean or the last value,
    chosen with the ridge."""
    ridge: float | Literal["usual"] | None = tunable("usual", low=1e-2, high=1e6, log=True, stand_in=USUAL_RIDGE)
    """Added to the diagonal of X'X summed over all windows (and variates when shared), scikit-learn's alpha. Usual: 100
    or less, by generalised cross-validation where 100 exceeds a tenth of that diagonal; null chooses by blocked
    cross-validation of the training span."""
    offset: Literal["auto"] | Offset = "auto"
    """What a step adds besides the lags: nothing, a constant, or a multiple of the context's standard deviation.
    Auto: a constant where nothing is removed, else nothing (it would continue the mean drift of the training span)."""
    solver: Literal["closed_form", "sgd"] = "closed_form"
    missing: MissingRule = "auto"
    """Training gaps: whole windows only, or windows with filled gaps; auto bridges short gaps, then takes whole windows
    while there are enough."""

    @field_validator("ridge", mode="before")
    @classmethod
    def _penalty(cls, value: Any) -> Any:
        """Say in one message what a penalty may be; a union would say it once a member."""
        if value is None or value == "usual":
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 <= number < math.inf:
            raise ValueError("give a number from 0 on, usual, or null")
        return number

    @property
    def fitted_offset(self) -> Offset:
        """The offset in use."""
        if self.offset == "auto":
            return "constant" if self.remove == "none" else "none"
        return self.offset

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings without effect."""
        if self.solver == "sgd" and self.ridge != type(self).model_fields["ridge"].default:
            raise ConfigError("model.ridge has no effect with solver 'sgd'; use train.weight_decay")
        for name in ("remove", "weights"):
            if self.solver == "sgd" and getattr(self, name) == "auto":
                raise ConfigError(f"model.{name}: auto is a choice of the closed form; with solver 'sgd' say which")
        if (self.ridge is None or "auto" in (self.remove, self.weights)) and self.fitted_offset != "none":
            raise ConfigError("model.offset: ridge null and auto choose among forecasters without an offset")


def remove_level(moments: WindowMoments, columns: int, length: int, remove: Removal) -> WindowMoments:
    """Return the moments after subtracting the level of the context from the first ``columns`` columns.

    Subtracting a linear function of the context is linear in the window, so no window needs to be seen again. The
    centred context has one direction without variance; it gets the mean variance, which changes no forecast and makes
    the fit unique.
    """
    if remove == "none":
        return moments
    level, moved = torch.zeros_like(moments.sums), torch.zeros_like(moments.sums)
    moved[:columns] = 1.0
    if remove == "window_mean":
        level[:length] = 1.0 / length
    else:
        level[length - 1] = 1.0
    cross = moments.gram @ level  # [D]
    gram = moments.gram - torch.outer(moved, cross) - torch.outer(cross, moved)
    gram = gram + (level @ cross) * torch.outer(moved, moved)
    null = level / level.norm()
    gram = gram + gram.diagonal()[:length].mean() * torch.outer(null, null)
    return WindowMoments(gram, moments.sums - (level @ moments.sums) * moved, moments.rows)


def fit_moments(moments: WindowMoments, layout: LagLayout, config: LinearConfig) -> tuple[LeastSquares, Tensor]:
    """Return the forecaster that fits the windows best, and its offset weights [H] (of 1, or of the context's scale).

    ``weight`` of the fit has its columns oldest first. With ``offset: window_scale`` the moments hold one more column.

    Raises:
        ConfigError: ``remove`` or ``ridge`` is still to be chosen.
    """
    length, columns = layout.lags, layout.lags + layout.horizon
    if config.remove == "auto" or not isinstance(config.ridge, float):
        raise ConfigError("a fit needs to know what to remove and its ridge; `Linear.solve` chooses them first")
    centred = remove_level(moments, columns, length, config.remove)
    features = torch.arange(length)
    if config.fitted_offset == "window_scale":
        features = torch.cat([features, torch.tensor([columns])])
    fit = least_squares(
        centred, features, layout.targets, ridge=config.ridge, intercept=config.fitted_offset == "constant"
    )
    if config.fitted_offset != "window_scale":
        return fit, fit.bias
    return replace(fit, weight=fit.weight[:, :-1].contiguous()), fit.weight[:, -1]


def fit_windows_reference(context: Tensor, target: Tensor, config: LinearConfig) -> tuple[Tensor, Tensor]:
    """Return weight [H, L] and offset weights [H] fitted on explicit windows [m, L] and [m, H] (slow, for tests)."""
    if config.remove == "auto" or not isinstance(config.ridge, float):
        raise ConfigError("the reference takes a fixed level and ridge")
    level = {
        "none": torch.zeros_like(context[:, :1]),
        "window_mean": context.mean(1, keepdim=True),
        "last": context[:, -1:],
    }[config.remove]
    inputs, outputs = context - level, target - level
    penalty = torch.full((context.shape[1],), config.ridge, dtype=inputs.dtype)
    if config.fitted_offset == "constant":
        inputs, penalty = torch.cat([inputs, torch.ones_like(level)], 1), torch.cat([penalty, penalty.new_zeros(1)])
    elif config.fitted_offset == "window_scale":
        scale = context.std(1, keepdim=True, correction=0)
        inputs, penalty = torch.cat([inputs, scale], 1), torch.cat([penalty, penalty[:1]])
    stacked = torch.cat([inputs, penalty.sqrt().diag()])
    answer = torch.cat([outputs, outputs.new_zeros(len(penalty), outputs.shape[1])])
    weight = torch.linalg.lstsq(stacked, answer, driver="gelsd").solution.T
    if config.fitted_offset == "none":
        return weight, weight.new_zeros(len(weight))
    return weight[:, :-1], weight[:, -1]


@register("linear")
class Linear(ForecastModel[LinearConfig]):
    """A linear map of the whole context, one row a step.

    Shapes:
        weight [G, H, L] oldest value first (G = 1 shared, else V), bias [G, H], spread [H, V, K - 1]: constants of the
        other outputs, moved only by gradient training.
    """

    from_last: Tensor
    offset: Tensor
    config_class = LinearConfig
    capabilities = Capabilities(closed_form=True, scaling=("global", "series", "none"))
    source = "Toner, Darlow (2024), An Analysis of Linear Time Series Forecasting Models, ICML, arXiv 2403.14587"
    test_configs = (
        {},
        {"remove": "none", "weights": "per_variate"},
        {"remove": "last", "solver": "sgd"},
        {"remove": "auto", "ridge": None, "weights": "auto"},
    )

    def __init__(self, config: LinearConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        own = config.weights == "per_variate" or (
            config.weights == "auto" and spec.num_variates * spec.horizon * spec.context_length <= _MOST_WEIGHTS
        )
        groups = spec.num_variates if own else 1
        limit = 1.0 / math.sqrt(spec.context_length)
        self.weight = nn.Parameter(torch.empty(groups, spec.horizon, spec.context_length).uniform_(-limit, limit))
        if config.fitted_offset == "none":
            self.register_buffer("offset", torch.zeros(groups, spec.horizon))
        else:
            self.offset = nn.Parameter(torch.zeros(groups, spec.horizon))
        if spec.num_params > 1:
            self.spread = nn.Parameter(torch.zeros(spec.horizon, spec.num_variates, spec.num_params - 1))
        if config.remove == "auto":
            self.register_buffer("from_last", torch.zeros(groups, dtype=torch.bool))
        self.gaps = GapFiller(groups, min(MOST_LAGS, spec.context_length), spec.num_variates)

    def _level(self, context: Tensor) -> Tensor:
        if self.config.remove == "auto":
            return torch.where(self.from_last, context[:, -1:], context.mean(1, keepdim=True))
        if self.config.remove == "window_mean":
            return context.mean(1, keepdim=True)
        return context[:, -1:] if self.config.remove == "last" else torch.zeros_like(context[:, :1])

    def _parts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the level [B, 1, V], what the lags add to it and what the offset adds, both [B, H, V]."""
        context = self.gaps(batch.context, batch.context_mask)
        level = self._level(context)
        offset = self.offset.T  # [H, G]
        if self.config.fitted_offset == "window_scale":
            offset = offset * context.std(1, keepdim=True, correction=0)
        mapped = map_lags(self.weight, context - level)
        return level, mapped, offset.expand_as(mapped)

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]."""
        level, mapped, offset = self._parts(batch)
        location = (level + mapped + offset).unsqueeze(-1)
        if self.spec.num_params == 1:
            return Prediction(location)
        return Prediction(torch.cat([location, self.spread.expand(len(location), -1, -1, -1).to(location)], dim=-1))

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the removed level, what the lags add to it, and the offset."""
        level, mapped, offset = self._parts(batch)
        parts = {"lags": mapped, "offset": offset}
        if self.config.remove == "none":
            return parts
        name = "level_removed" if self.config.remove == "auto" else self.config.remove
        return {name: level.expand_as(mapped), **parts}

    @torch.no_grad()
    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Fit all weights by ridge regression on every window of the training span.

        Raises:
            ModelError: no series has context_length + horizon rows.
        """
        bounds = series_bounds(data)
        self.gaps.fit(data.values, data.mask, bounds)
        if self.config.solver == "sgd":
            return None
        layout = LagLayout(self.spec.context_length, self.spec.horizon)
        config, separate = self._chosen(data, bounds, layout)
        details = {"rows": 0.0, "dof": 0.0, "gaps_filled": 0.0, "ridge": 0.0, "groups": 0.0}
        if self.config.remove == "auto":
            self.from_last.fill_(config.remove == "last")
        groups = len(self.weight) if separate else 1
        for group in range(groups):
            variates = slice(group, group + 1) if separate else slice(None)
            place = variates if len(self.weight) > 1 else slice(0, 1)
            details["groups"] += 1.0
            self._solve_group(data, bounds, layout, config, variates, place, details)
        scale = residual_scale(self, data)
        if scale is not None:  # in-sample errors are too small by the coefficients they were fitted with
            scale = scale * math.sqrt(1.0 / max(1.0 - details["dof"] * groups / max(details["rows"], 1.0), 0.1))
        method = "ols" if self.config.ridge == 0.0 else "ridge"
        return SolveReport(finished=True, method=method, residual_scale=scale, details=details)

    def _solve_group(
        self,
        data: TrainingSeries,
        bounds: list[int],
        layout: LagLayout,
        config: LinearConfig,
        variates: slice,
        place: slice,
        details: dict[str, float],
    ) -> None:
        """Fit one matrix on some variates, write it to the groups ``place``, add to ``details``."""
        values, mask = data.values[:, variates].double(), data.mask[:, variates]
        if not bool(mask.any()):  # a variate that was never observed keeps the training mean, 0
            self.weight[place], self.offset[place] = 0.0, 0.0
            return
        center = torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)  # keeps sums of squares small
        if config.remove == "none" and config.fitted_offset != "constant":
            center = torch.zeros_like(center)  # nothing in this model could undo a shift
        moments, filled = lag_moments(
            layout,
            torch.where(mask, values - center, 0.0),
            mask,
            bounds,
            missing=config.missing,
            uses_scale=config.fitted_offset == "window_scale",
        )
        if config.ridge == "usual":
            level = cast(Removal, config.remove)  # auto was settled by `_chosen`
            free = remove_level(moments, layout.lags + layout.horizon, layout.lags, level)
            config = config.model_copy(update={"ridge": usual_ridge(free, layout.lags, layout.horizon)})
        details["ridge"] = max(details["ridge"], cast(float, config.ridge))
        fit, offset = fit_moments(moments, layout, config)
        if config.remove == "none" and config.fitted_offset == "constant":  # undo the centring
            offset = offset + center * (1.0 - fit.weight.sum(1))
        self.weight[place] = fit.weight.to(self.weight)
        self.offset[place] = offset.to(self.offset)
        details["rows"] += fit.rows
        details["dof"] = max(details["dof"], fit.dof)
        details["gaps_filled"] = max(details["gaps_filled"], float(filled))

    def _chosen(self, data: TrainingSeries, bounds: list[int], layout: LagLayout) -> tuple[LinearConfig, bool]:
        """Return the config with what was left to the data filled in, and whether variates get their own matrices."""
        config = self.config
        if config.ridge is not None and config.remove != "auto" and config.weights != "auto":
            return config, config.weights == "per_variate"
        removes = _CHOICES if config.remove == "auto" else (config.remove,)
        columns = layout.lags + layout.horizon
        count = data.mask.sum(0).clamp(min=1)
        center = torch.where(data.mask, data.values.double(), 0.0).sum(0) / count
        span = Span(
            values=torch.where(data.mask, data.values.double() - center, 0.0),
            mask=data.mask,
            bounds=bounds,
            layout=layout,
            missing=config.missing,
            fit=lambda moments, remove, ridge: (
                fit_moments(moments, layout, LinearConfig(remove=remove, ridge=ridge, missing=config.missing))[0].weight
            ),
            free=lambda moments, remove: remove_level(moments, columns, layout.lags, cast(Removal, remove)),
        )
        usual = USUAL_RIDGE
        if not isinstance(config.ridge, float):
            whole = span.moments(list(pairwise(bounds)), slice(None))
            if whole is not None:
                usual = usual_ridge(span.free(whole, removes[0]), layout.lags, layout.horizon)
        ridges = [usual if ridge == USUAL_RIDGE else ridge * usual / USUAL_RIDGE for ridge in RIDGES]
        chosen = choose(
            span,
            removes,
            ridges if config.ridge is None else (usual if config.ridge == "usual" else config.ridge,),
            default=usual,
            may_separate=config.weights == "auto" and len(self.weight) > 1,
        )
        update: dict[str, Any] = {"remove": chosen.remove, "ridge": chosen.ridge}
        return config.model_copy(update=update), chosen.separate or config.weights == "per_variate"


def map_lags(weight: Tensor, context: Tensor) -> Tensor:
    """Return [B, H, V] from weight [G, H, L] and context [B, L, V]; G is 1 or V."""
    rows = context.transpose(1, 2)  # [B, V, L]
    if weight.shape[0] == 1:
        return nn.functional.linear(rows, weight[0]).transpose(1, 2)
    return torch.einsum("bvl,vhl->bhv", rows, weight)
