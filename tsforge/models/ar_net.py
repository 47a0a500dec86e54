"""AR-Net: an autoregression whose layer is the coefficient vector; trend, seasons, events and covariates beside it.

    y[t + h] = g(t + h) + m + b_h + sum_i w_{h,i} (y[t - i] - g(t - i) - m) + sum_{j,i} v_{h,j,i} x_j[t - i]

with t the last observed row, i >= 0, m the mean, g the additive effects (trend, Fourier seasons, known covariates,
events) and x the past covariates. Direct: every step h has weights of its own. Recursive: only h = 1 has, later steps
follow exactly from powers of the companion matrix.

Deviations from the paper and from NeuralProphet, each for a measured or stated reason (``docs/models/ar_net.md``):
least squares and sparse fits are solved from lag moments instead of descended; hidden layers sit beside the linear
layer; effects multiply columns centred over the training span; event offsets that reach beyond the known span count as
no event.
Legend: p lags, q covariate lags, G weight groups (1 shared or V), T fitted steps (H direct, 1 recursive).
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries, is_complete
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models import _ar_explain as explaining
from tsforge.models._ar_additive import Additive, AdditivePlan
from tsforge.models._ar_gaps import GapFiller
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import MissingRule, lag_moments
from tsforge.models._ar_nets import LagMap, grouped
from tsforge.models._ar_solvers import LagFit, Span, fit_lags
from tsforge.models._ar_windows import residual_scale, series_bounds
from tsforge.models.registry import register
from tsforge.ops.moments import least_squares
from tsforge.ops.stability import forecast_scale, impulse_response, multi_step_weights

Solver = Literal["auto", "ols", "ridge", "sparse", "omp", "yule_walker", "burg", "irls", "sgd"]

DIRECT_UP_TO = 48  # steps: longer horizons default to the recursive form
_RAMP_SHARE = 0.5  # share of training over which the SGD penalty rises
_OUTPUTS_WITHOUT_HIDDEN = 1
_SETTLED = 1e-5  # relative fall of the one-step error below which effects and lags are not solved again


class ARNetConfig(ModelConfig):
    """Settings of AR-Net. An option without effect in the chosen mode is refused."""

    name: Literal["ar_net"] = "ar_net"
    lags: int | None = tunable(None, choices=[None, 12, 24, 48, 96, 168, 336], ge=0)
    """Own lags p, at most the context length; default all of it, 0 for none."""
    weights: Literal["per_variate", "shared"] = tunable("per_variate", choices=["per_variate", "shared"])
    """Coefficients for each variate, or one set for all of them."""
    mode: Literal["auto", "direct", "recursive"] = "auto"
    """Auto: direct up to 48 steps, with covariates or hidden layers; else recursive."""
    solver: Solver = "auto"
    """Auto: least squares, or ridge chosen by cross-validation when there are fewer than ten windows a coefficient."""
    ridge: float | None = tunable(None, choices=[None, 1e-4, 1e-3, 1e-2, 1e-1], ge=0.0)
    """Ridge a window (scaled units), solvers ridge and yule_walker; ridge alone chooses it by cross-validation."""
    expected_nonzero: int | None = None
    """Lags expected to matter, the paper's s = expected / all; for solvers sparse, sgd, and as a limit for omp."""
    density: float | None = None
    """The same as a share in (0, 1]; 1 means no penalty. Without either, solver sparse searches a path by EBIC."""
    c_lambda: float = 0.01
    """Strength of the paper's rule lambda = c_lambda (1 / s - 1), for data of unit variance."""
    group: bool = False
    """Sparse and omp: all steps share one set of lags."""
    refit: bool = True
    """Sparse: least squares on the chosen lags, which removes the shrinkage."""
    loss: Literal["huber", "quantile"] = "huber"
    """What solver irls minimises."""
    huber_delta: float = 1.345
    quantile: float = 0.5
    order_selection: Literal["none", "aic", "bic"] = "none"
    """Yule-Walker and Burg: the order, up to ``lags``, by an information criterion."""
    missing: MissingRule = "auto"
    """Training gaps: whole windows only, or windows with filled gaps; auto bridges short gaps, then takes whole windows
    while there are enough."""
    hidden: tuple[int, ...] = ()
    """Widths of ReLU layers beside the linear one; trained by gradient steps from the exact linear fit."""
    warm_start: bool = True
    """Start gradient training from least squares."""
    trend: Literal["off", "linear", "piecewise"] = tunable("off", choices=["off", "linear", "piecewise"])
    changepoints: int = 10
    changepoint_range: float = 0.8
    season_lengths: tuple[float, ...] = ()
    """Periods in steps, also fractional (365.25)."""
    season_orders: tuple[int, ...] | None = None
    """Sine-cosine pairs of each period; default 6, fewer for periods under 12 steps."""
    events: tuple[int, ...] = ()
    """Positions among the known covariates of 0/1 columns that mark events."""
    event_offsets: tuple[int, int] = (0, 0)
    """First and last step around an event that get an effect of their own, such as (-1, 2)."""
    covariate_lags: int | None = None
    """Lags q of every past covariate; default the context length."""
    covariate_hidden: tuple[int, ...] = ()
    """Widths of one ReLU net over the lags of all past covariates, beside the linear part."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse values out of range and options without effect."""
        self._check_ranges()
        given = self.model_fields_set
        needs = {
            "ridge": ("ridge", "yule_walker"),
            "expected_nonzero": ("sparse", "omp", "sgd"),
            "density": ("sparse", "sgd"),
            "c_lambda": ("sparse", "sgd"),
            "group": ("sparse", "omp"),
            "refit": ("sparse",),
            "loss": ("irls",),
            "huber_delta": ("irls",),
            "quantile": ("irls",),
            "order_selection": ("yule_walker", "burg"),
        }
        for option, solvers in needs.items():
            changed = option in given and getattr(self, option) != type(self).model_fields[option].default
            if changed and self.solver not in solvers:
                raise ConfigError(
                    f"model.{option} has no effect with solver '{self.solver}'; it needs {' or '.join(solvers)}"
                )
        if self.hidden and self.solver not in ("auto", "ols", "ridge", "sgd"):
            raise ConfigError(f"model.hidden needs gradient training; solver '{self.solver}' cannot train it, use auto")
        if self.hidden and self.mode == "recursive":
            raise ConfigError("model.mode 'recursive' is exact for linear models only; with model.hidden use direct")
        if self.solver == "burg" and self.mode == "direct":
            raise ConfigError("solver 'burg' fits one-step coefficients; use model.mode recursive or auto")
        if self.season_orders is not None and len(self.season_orders) != len(self.season_lengths):
            raise ConfigError(
                f"model.season_orders has {len(self.season_orders)} entries, "
                f"season_lengths has {len(self.season_lengths)}"
            )

    def _check_ranges(self) -> None:
        rules = {
            "expected_nonzero": self.expected_nonzero is None or self.expected_nonzero >= 1,
            "density": self.density is None or 0.0 < self.density <= 1.0,
            "c_lambda": self.c_lambda > 0.0,
            "huber_delta": self.huber_delta > 0.0,
            "quantile": 0.0 < self.quantile < 1.0,
            "hidden": all(width >= 1 for width in self.hidden),
            "covariate_hidden": all(width >= 1 for width in self.covariate_hidden),
            "changepoints": self.changepoints >= 1,
            "changepoint_range": 0.0 < self.changepoint_range <= 1.0,
            "season_lengths": all(length >= 2.0 for length in self.season_lengths)
            and len(set(self.season_lengths)) == len(self.season_lengths),
            "season_orders": all(order >= 1 for order in self.season_orders or ()),
            "events": all(column >= 0 for column in self.events) and len(set(self.events)) == len(self.events),
            "event_offsets": self.event_offsets[0] <= self.event_offsets[1],
            "covariate_lags": self.covariate_lags is None or self.covariate_lags >= 1,
        }
        wrong = [name for name, holds in rules.items() if not holds]
        if wrong:
            raise ConfigError(f"model.{wrong[0]}: {getattr(self, wrong[0])!r} is out of range")
        if self.expected_nonzero is not None and self.density is not None:
            raise ConfigError("give model.expected_nonzero or model.density, not both")

    def density_of(self, num_features: int) -> float | None:
        """Return the share of lags expected to matter, or None when the user did not say."""
        if self.expected_nonzero is not None:
            return min(self.expected_nonzero / max(num_features, 1), 1.0)
        return self.density

    def plan(self) -> AdditivePlan:
        """Return the additive part."""
        orders = self.season_orders or tuple(max(min(6, int(length // 2)), 1) for length in self.season_lengths)
        return AdditivePlan(
            trend=self.trend,
            changepoints=self.changepoints,
            changepoint_range=self.changepoint_range,
            season_lengths=self.season_lengths,
            season_orders=orders,
            events=self.events,
            event_offsets=self.event_offsets,
        )


@register("ar_net")
class ARNet(ForecastModel[ARNetConfig]):
    """Autoregression with additive parts; see the module docstring for the equation.

    Shapes:
        ar.weight [G, T, p] lag 1 first, bias [G, T], covariates.weight [G, T, P q], additive.weight [V, C],
        spread [H, V, K - 1] constants of the other outputs. Buffers keep what ``explain`` shows after loading.
    """

    config_class = ARNetConfig
    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        absolute_time=True,
        closed_form=True,
        scaling=("global", "series", "none"),
    )
    source = "Triebe, Laptev, Rajagopal (2019), AR-Net, arXiv 1911.12436; additive parts after arXiv 2111.15397"
    test_configs = (
        {},
        {"weights": "shared", "solver": "sparse"},
        {"hidden": (8,), "solver": "sgd", "warm_start": False, "trend": "piecewise", "season_lengths": (4,)},
        {"solver": "sgd", "density": 0.5, "covariate_lags": 1, "covariate_hidden": (4,)},
    )

    error: Tensor
    noise: Tensor
    pacf: Tensor
    health: Tensor
    ramp: Tensor

    def __init__(self, config: ARNetConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.lags = spec.context_length if config.lags is None else config.lags
        self.covariate_lags = config.covariate_lags or spec.context_length
        self._check_sizes()
        self.is_direct = self._choose_direct()
        groups = spec.num_variates if config.weights == "per_variate" else 1
        steps = spec.horizon if self.is_direct else 1
        self.ar = LagMap(groups, self.lags, steps, config.hidden, spec.num_params)
        self.bias = nn.Parameter(torch.zeros(groups, steps))
        self.covariates: LagMap | None = None
        if spec.num_past:
            inputs = spec.num_past * self.covariate_lags
            self.covariates = LagMap(groups, inputs, steps, config.covariate_hidden)
        self.additive = Additive(config.plan(), spec)
        if spec.num_params > 1:
            self.spread = nn.Parameter(torch.zeros(spec.horizon, spec.num_variates, spec.num_params - 1))
        self.gaps = GapFiller(groups, self.lags, spec.num_variates)
        self.register_buffer("error", torch.zeros_like(self.ar.weight))
        self.register_buffer("noise", torch.ones(groups, steps))
        self.register_buffer("pacf", torch.zeros(groups, self.lags))
        self.register_buffer("health", torch.zeros(groups, 3))
        self.register_buffer("ramp", torch.ones(()))

    def _check_sizes(self) -> None:
        config, spec = self.config, self.spec
        for name, value in (("lags", self.lags), ("covariate_lags", self.covariate_lags)):
            if value > spec.context_length:
                raise ModelError(
                    f"model.{name} is {value}, but context_length is {spec.context_length}; use a longer context"
                )
        if spec.num_past and config.solver in ("yule_walker", "burg"):
            raise ModelError(f"solver '{config.solver}' knows no covariates; drop data.past or use ols")
        if spec.num_past and config.mode == "recursive":
            raise ModelError("a recursive model would need future values of past covariates; use model.mode direct")

    def _choose_direct(self) -> bool:
        config, spec = self.config, self.spec
        if config.mode != "auto":
            return config.mode == "direct"
        if config.solver == "burg":
            return False
        return bool(config.hidden or spec.num_past or spec.num_known or spec.horizon <= DIRECT_UP_TO)

    def multi_step(self) -> tuple[Tensor, Tensor]:
        """Return the weights [G, H, p] and bias [G, H] of all steps."""
        if self.is_direct:
            return self.ar.weight, self.bias
        one = self.ar.weight[:, 0]
        response = impulse_response(one, self.spec.horizon)  # [G, H]
        return multi_step_weights(one, self.spec.horizon), self.bias * response.cumsum(-1)

    def _parts(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the additive parts [B, H, V] of the location, and what hidden layers say of other outputs."""
        context, mask = batch.context, batch.context_mask
        complete = is_complete(mask)
        rows = self.lags if complete else context.shape[1]  # gaps are filled from the whole context
        context, mask = context[:, context.shape[1] - rows :], mask[:, mask.shape[1] - rows :]
        parts: dict[str, Tensor] = {}
        shape = (len(context), self.spec.horizon, self.spec.num_variates)
        residual = context
        if self.additive.num_columns:
            columns = self.additive.window_columns(batch, rows).to(context.dtype)
            effects = self.additive.weight  # [V, C]
            residual = torch.where(mask, context - columns[:, :rows] @ effects.T, 0.0)
            for name, chosen in self.additive.groups().items():
                parts[name] = columns[:, rows:, chosen] @ effects[:, chosen].T
        filled = residual if complete else self.gaps(residual, mask)
        center = self.gaps.center.to(context.dtype)
        lagged = self._newest_first(filled[:, filled.shape[1] - self.lags :] - center)
        other = None
        if self.is_direct:
            mapped = self.ar(lagged)  # [B, H, V, 1 or K]
            parts["lags"] = mapped[..., 0]
            other = mapped[..., 1:] if mapped.shape[-1] > _OUTPUTS_WITHOUT_HIDDEN else None
            bias: Tensor = self.bias
        else:
            weight, bias = self.multi_step()
            parts["lags"] = grouped(weight, lagged).transpose(1, 2)
        if self.covariates is not None:
            parts["covariates"] = self.covariates(self._covariate_lags(batch))[..., 0]
        parts["mean"] = (center + bias.T.to(context.dtype)).expand(shape)
        return parts, other

    def _newest_first(self, rows: Tensor) -> Tensor:
        """Return lags [B, V, p], lag 1 first, from rows [B, p, V]; in memory as the product that follows reads them."""
        if len(self.ar.weight) == 1:
            return rows.flip(1).transpose(1, 2)
        order = torch.arange(self.lags - 1, -1, -1, device=rows.device)
        return rows.permute(2, 0, 1).index_select(2, order).transpose(0, 1)  # a matrix [B, p] for each variate

    def _covariate_lags(self, batch: Batch) -> Tensor:
        """Return the lags of all past covariates [B, V, P q], each covariate newest first."""
        if batch.past is None:
            raise ModelError("the model was built for past covariates, but the batch has none")
        past = batch.past[:, batch.past.shape[1] - self.covariate_lags :].flip(1)
        return past.transpose(1, 2).flatten(1).unsqueeze(1).expand(-1, self.spec.num_variates, -1)

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K]; while training, the penalty of solver sgd as loss ``sparsity``."""
        parts, other = self._parts(batch)
        raw = reduce(torch.add, parts.values()).unsqueeze(-1)
        if self.spec.num_params > 1:
            spread = self.spread.expand(len(raw), -1, -1, -1).to(raw.dtype)
            raw = torch.cat([raw, spread if other is None else spread + other], dim=-1)
        return Prediction(raw, aux_losses=self._penalty() if self.training else None)

    @property
    def _strength(self) -> float:
        """Full strength of the penalty; 0 for other solvers, without lags, and where every lag may matter."""
        density = self.config.density_of(self.lags) if self.config.solver == "sgd" and self.lags else None
        return 0.0 if density is None else self.config.c_lambda * (1.0 / density - 1.0)

    @property
    def annealed_at(self) -> float:
        """Share of the training after which the penalty has its full strength; 0 without one."""
        return _RAMP_SHARE if self._strength > 0 else 0.0

    def _penalty(self) -> dict[str, Tensor] | None:
        """Return the paper's penalty on the lags: mean over lags, sum over steps, mean over groups, times the ramp."""
        if not self._strength > 0:
            return None
        inner = (self.ar.weight.abs() + 1e-9) ** (1.0 / 3.0)
        sized = 2.0 * torch.sigmoid(3.0 * inner) - 1.0  # [G, T, p]
        return {"sparsity": self.ramp * self._strength * sized.mean(-1).sum(-1).mean()}

    def anneal(self, progress: float) -> None:
        """Let the penalty rise with the square of progress to its full strength at half of the training."""
        self.ramp.fill_(min(progress / _RAMP_SHARE, 1.0) ** 2)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the additive parts of the location: trend, season_*, known, events, lags, covariates, mean."""
        return self._parts(batch)[0]

    @torch.no_grad()
    def solve(self, data: TrainingSeries) -> SolveReport:
        """Fit additive effects and lags in closed form; a warm start where gradient training follows.

        Effects and lags multiply each other, so they are solved in turn, each exactly, until the one-step squared error
        settles; the plain regression on the additive columns is kept where it forecasts the whole horizon better.

        Raises:
            ModelError: the training span holds no window of lags plus horizon.
        """
        if data.values.shape[1] != self.spec.num_variates:
            raise ModelError(f"the training span has {data.values.shape[1]} variates, not {self.spec.num_variates}")
        self.additive.place(data)
        rounds = self._fit_additive(data) if self.additive.num_columns else 0
        residual = self._residual(data)
        self._fit_gaps(residual, data)
        trained = self.config.solver == "sgd" or bool(self.config.hidden or self.config.covariate_hidden)
        if trained and not self.config.warm_start:
            return SolveReport(finished=False, method="none", residual_scale=residual_scale(self, data))
        details = {"effects_rounds": float(rounds)}
        dof_share, method = 0.0, "none"
        whole = []
        for group, span in enumerate(self._spans(residual, data)):
            fit = fit_lags(self.config, self._layout(), span)
            self._keep(group, fit, span)
            method = fit.method if fit.rows else method
            whole.append(not fit.details.get("gaps_filled"))
            dof_share = max(dof_share, (fit.dof + self.additive.num_columns) / max(fit.rows, 1.0))
            details.update({f"{key}_{group}" if len(self.bias) > 1 else key: v for key, v in fit.details.items()})
        self.gaps.set(self.ar.weight[:, 0].detach(), whole)
        scale = self._residual_scale(data, dof_share)
        return SolveReport(finished=not trained, method=method, residual_scale=scale, details=details)

    def _layout(self, horizon: int | None = None) -> LagLayout:
        return LagLayout(
            self.lags,
            self.ar.weight.shape[1] if horizon is None else horizon,
            self.covariate_lags if self.spec.num_past else 0,
            self.spec.num_past,
        )

    def _residual(self, data: TrainingSeries) -> Tensor:
        """Return the training values [N, V] less the additive effects, 0 where not observed."""
        values = data.values.double()
        if self.additive.num_columns:
            values = values - self.additive.effects(data)
        return torch.where(data.mask, values, 0.0)

    def _fit_gaps(self, residual: Tensor, data: TrainingSeries) -> None:
        recursions = self.gaps.fit(residual, data.mask, series_bounds(data))
        for group, recursion in enumerate(recursions):
            self.pacf[group] = torch.from_numpy(recursion.pacf).to(self.pacf)

    def _spans(self, residual: Tensor, data: TrainingSeries) -> list[Span]:
        """Return what each group of variates is fitted on."""
        centred = torch.where(data.mask, residual - self.gaps.center.double(), 0.0)
        past = None if data.past is None else data.past.double()
        bounds = series_bounds(data)
        if self.config.weights == "shared":
            return [Span(centred, data.mask, bounds, past)]
        return [Span(centred[:, [v]], data.mask[:, [v]], bounds, past) for v in range(centred.shape[1])]

    def _fit_additive(self, data: TrainingSeries, max_rounds: int = 8) -> int:
        """Set the effects; return the rounds of the joint fit that were kept (0: the plain regression)."""
        self.additive.fit(data)
        if not self.lags:
            return 0
        plain = self.additive.weight.detach().clone()
        plain_error = self._lag_error(data, self._layout().horizon)[0]
        reached, filters = self._lag_error(data, 1)
        rounds = 0
        for _ in range(max_rounds):
            before = self.additive.weight.detach().clone()
            self.additive.fit(data, filters)
            error, proposed = self._lag_error(data, 1)
            if error >= reached:  # settled within rounding
                self.additive.weight.copy_(before)
                break
            rounds, filters, gain, reached = rounds + 1, proposed, reached - error, error
            if gain < _SETTLED * reached:
                break
        if rounds and self._lag_error(data, self._layout().horizon)[0] > plain_error:
            self.additive.weight.copy_(plain)
            return 0
        return rounds

    def _lag_error(self, data: TrainingSeries, horizon: int) -> tuple[float, list[Tensor]]:
        """Return the squared error of least squares on the lags, summed over steps, and one-step weights by variate."""
        residual = self._residual(data)
        count = data.mask.sum(0).clamp(min=1)
        self.gaps.center.copy_(residual.sum(0) / count)
        layout = LagLayout(self.lags, horizon)
        total, weights = 0.0, []
        for span in self._spans(residual, data):
            if not bool(span.mask.any()):
                weights.append(torch.zeros(self.lags, dtype=torch.float64))
                continue
            moments, _ = lag_moments(layout, span.values, span.mask, span.bounds, missing=self.config.missing)
            fit = least_squares(moments, layout.features, layout.targets)
            total += float(fit.rss.sum())
            weights.append(fit.weight[0].cpu())
        return total, weights if len(weights) > 1 else weights * self.spec.num_variates

    def _keep(self, group: int, fit: LagFit, span: Span) -> None:
        """Store a fitted group in parameters and in the buffers that ``explain`` reads."""
        lags = self.lags
        self.ar.weight[group] = fit.weight[:, :lags].to(self.ar.weight)
        self.bias[group] = fit.bias.to(self.bias)
        if self.covariates is not None:
            self.covariates.weight[group] = fit.weight[:, lags:].to(self.covariates.weight)
        self.error[group] = fit.error[:, :lags].to(self.error)
        self.noise[group] = fit.noise.to(self.noise)
        if not self.spec.num_past:
            statistic, p_value = explaining.whiteness(fit.weight[0, :lags], float(fit.bias[0]), span)
            self.health[group] = torch.tensor([fit.rows, statistic, p_value]).to(self.health)

    def _residual_scale(self, data: TrainingSeries, dof_share: float) -> Tensor | None:
        """Return residual deviations [H, V]: measured where direct, from the impulse response where recursive."""
        scale = residual_scale(self, data)
        if scale is None:
            return None
        if not self.is_direct:
            exact = forecast_scale(
                self.ar.weight[:, 0].double(), torch.ones(len(self.bias)).double(), self.spec.horizon
            )
            if bool(torch.isfinite(exact).all()) and float(exact.max()) < 1e6:
                return (exact * self.noise[:, :1].double()).T.expand_as(scale).contiguous().to(scale)
        return scale / math.sqrt(max(1.0 - dof_share, 0.1))

    def explain(self) -> dict[str, Any]:
        """Return coefficients with errors, lag selection, partial autocorrelations, roots, response and effects."""
        return explaining.explain(self)
