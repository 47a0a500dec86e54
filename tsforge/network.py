"""The forecaster: scaler, model and likelihood as one module. Trained by ``training``, stored by ``artifact``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import SerializeAsAny, field_validator
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig, ScalingKind
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries, is_known_complete
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.likelihoods import Likelihood, LikelihoodConfig, Point, build_likelihood, masked_mean
from tsforge.layers.scaling import SERIES_KINDS, WINDOW_KINDS, Scaler, ScalingConfig
from tsforge.models.registry import MODELS, resolve_model_config


class NetworkConfig(Config):
    """Which model, which output distribution, which scaling."""

    model: SerializeAsAny[ModelConfig]
    likelihood: LikelihoodConfig = Point()
    scaling: ScalingConfig = ScalingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _resolve_model(cls, value: Any) -> Any:
        return resolve_model_config(value)


class Predictive(NamedTuple):
    """Forecasts of a batch in data units: mean [B, H, V]; quantiles [B, H, V, Q], None when none were asked for."""

    mean: Tensor
    quantiles: Tensor | None


class ForecastNetwork(nn.Module):
    """Composes scaling, a registered model and a likelihood; takes and returns data units.

    What the model sees is scaled, holds 0 in every unobserved cell, and never the target. ``param_offset`` [H, V, K] is
    added to the model's raw output; it carries the residual spread of closed-form fits (location part 0).

    Raises:
        ConfigError: the model cannot take the covariates of the data or the scaling asked for.
    """

    param_offset: Tensor

    def __init__(self, config: NetworkConfig, spec: DataSpec) -> None:
        super().__init__()
        model_class = MODELS.get(config.model.name)
        self.capabilities = model_class.capabilities_of(config.model)
        _check_covariates(config.model.name, self.capabilities, spec)
        self.config = config
        self.likelihood: Likelihood = build_likelihood(config.likelihood)
        self.spec = replace(spec, num_params=self.likelihood.num_params)
        self.scaling = _choose_scaling(config, self.capabilities)
        self.scaler = Scaler(self.scaling, self.spec, robust=config.scaling.robust, unknown=config.scaling.unknown)
        self.model: ForecastModel[Any] = model_class(config.model, self.spec)
        ones = torch.ones(spec.horizon, spec.num_variates)
        self.register_buffer("param_offset", self.likelihood.initial_raw(ones))

    @property
    def needs_known_series(self) -> bool:
        """True when a series that was not trained on cannot be forecast (its statistics are part of the scaling)."""
        return self.scaling in SERIES_KINDS and self.config.scaling.unknown == "refuse"

    def fit_scaler(self, data: TrainingSeries) -> None:
        """Take scaling statistics from the training span in data units."""
        if data.values.shape[1] != self.spec.num_variates:
            raise ModelError(
                f"the training span has {data.values.shape[1]} variates, "
                f"the network was built for {self.spec.num_variates}"
            )
        self.scaler.fit(data)

    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Let the model fit itself in closed form on the training span in data units.

        Returns:
            The model's report, or None when it has nothing to solve. A residual scale in it becomes the spread of the
            forecast distribution.

        Raises:
            ConfigError: the model wants to solve, but the scaling differs from window to window.
        """
        if not self.capabilities.closed_form:
            return None
        if self.scaling in WINDOW_KINDS:
            raise ConfigError(
                f"model '{self.config.model.name}' is fitted in closed form and cannot use scaling '{self.scaling}'; "
                "choose none, global or series"
            )
        report = self.model.solve(self.scaler.scale_series(data))
        if report is not None and report.residual_scale is not None:
            self.set_residual_scale(report.residual_scale)
        return report

    @torch.no_grad()
    def set_residual_scale(self, residual_scale: Tensor) -> None:
        """Make constant zeros in the non-location outputs mean a spread of ``residual_scale`` [H, V] (scaled units)."""
        expected = (self.spec.horizon, self.spec.num_variates)
        if tuple(residual_scale.shape) != expected:
            raise ModelError(f"residual_scale has shape {tuple(residual_scale.shape)}; it must be {expected}")
        old = self.param_offset
        offset = self.likelihood.initial_raw(residual_scale.detach().double().cpu())
        self.param_offset = offset.to(dtype=old.dtype, device=old.device)

    @torch.no_grad()
    def fit_residual_scale(self, batches: Iterable[Batch]) -> None:
        """Set the spread from root mean squared location errors over ``batches`` (data units), per step and variate."""
        total = torch.zeros(self.spec.horizon, self.spec.num_variates, dtype=torch.float64)
        count = torch.zeros_like(total)
        for batch in batches:
            scaled, prediction = self._run(batch)
            if scaled.target is None:
                raise ModelError("residuals need windows with a target")
            error = (prediction.raw[..., 0] - scaled.target).double().square().cpu()
            seen = torch.ones_like(error, dtype=torch.bool) if scaled.target_mask is None else scaled.target_mask.cpu()
            total += torch.where(seen, error, 0.0).sum(0)
            count += seen.sum(0)
        if bool((count > 0).any()):
            pooled = (total.sum(0) / count.sum(0).clamp(min=1)).expand_as(total)  # steps never observed borrow the rest
            self.set_residual_scale(torch.where(count > 0, total / count.clamp(min=1), pooled).sqrt())

    def prepare(self, data: TrainingSeries) -> None:
        """Show the model the training span in data units.

        Raises:
            ModelError: the loss compares logarithms, and a training value is negative.
        """
        if self.likelihood.in_data_units:
            _check_not_negative(data, self.config.likelihood)
        self.model.prepare(data)

    @property
    def settles(self) -> bool:
        """True when the model chooses something on trained weights."""
        return type(self.model).settle is not ForecastModel.settle

    def settle(self, batches: Iterable[Batch]) -> None:
        """Let the model choose from windows (data units) held out of its training."""
        self.model.settle(self.scaler.scale(batch) for batch in batches)

    @property
    def anneals(self) -> bool:
        """True when the model follows a schedule over training."""
        return type(self.model).anneal is not ForecastModel.anneal

    def _run(self, batch: Batch, stats: tuple[Tensor, Tensor] | None = None) -> tuple[Batch, Prediction]:
        """Return the scaled batch and the model's prediction with the offset added; ``stats`` where they are known."""
        self._check_batch(batch)
        scaled = self.scaler.scale(batch, stats)
        return scaled, self._predict_scaled(scaled)

    def _predict_scaled(self, scaled: Batch) -> Prediction:
        prediction: Prediction = self.model(self._inputs(scaled))
        return prediction._replace(raw=self.parameters_of(prediction))

    def parameters_of(self, prediction: Prediction) -> Tensor:
        """Return the parameters [B, H, V, K] of the likelihood that a prediction of the model means: offset added."""
        return self._filled(prediction.raw) + self.param_offset

    def _filled(self, raw: Tensor) -> Tensor:
        """Return raw [..., K], zeros beside the location of a model that gives nothing else."""
        raw = raw.to(torch.promote_types(raw.dtype, self.param_offset.dtype))
        missing = self.spec.num_params - raw.shape[-1]
        return nn.functional.pad(raw, (0, missing)) if missing > 0 and not self.capabilities.probabilistic else raw

    def _inputs(self, scaled: Batch) -> Batch:
        forced = self.capabilities.teacher_forced and self.training
        inputs = scaled if forced else scaled._replace(target=None, target_mask=None)
        return inputs if self.capabilities.absolute_time else inputs._replace(cutoff_index=None)

    def _check_batch(self, batch: Batch) -> None:
        expected = (self.spec.context_length, self.spec.num_variates)
        if tuple(batch.context.shape[1:]) != expected:
            raise ModelError(
                f"the context has shape {tuple(batch.context.shape)}; this network reads (batch, {expected[0]}, "
                f"{expected[1]}) = (batch, context_length, variates)"
            )
        for name, size in (
            ("known", self.spec.num_known),
            ("past", self.spec.num_past),
            ("static", self.spec.num_static),
        ):
            if size and getattr(batch, name) is None:
                raise ModelError(f"the network was built for {size} {name} covariates, but the batch has none")

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters in scaled units for a batch in data units."""
        return self._run(batch)[1]

    def _parts(self, batch: Batch) -> tuple[Batch, Prediction, dict[str, Tensor]]:
        """Return the scaled batch, the prediction and the parts of the loss."""
        self._check_batch(batch)
        stats = self.scaler.stats(batch)
        scaled = self.scaler.scale(batch, stats)
        if scaled.target is None:
            raise ModelError("a loss needs windows with a target")
        prediction = self._predict_scaled(scaled)
        raw, target, unit = self._compared(batch, stats, prediction.raw, scaled.target, batch.target)
        parts = {"nll": self.likelihood.nll(raw, target, _gaps(scaled.target_mask), unit)}
        if prediction.context_raw is not None:
            if not self.capabilities.context_outputs:
                name = self.config.model.name
                raise ModelError(f"model '{name}' fills context_raw but does not declare context_outputs")
            context_raw = self._filled(prediction.context_raw) + self.param_offset[:1]
            last = slice(scaled.context.shape[1] - context_raw.shape[1], None)
            given = (scaled.context[:, last], batch.context[:, last])
            raw, target, unit = self._compared(batch, stats, context_raw, *given)
            loss = self.likelihood.nll(raw, target, scaled.context_mask[:, last], unit)
            parts["context_nll"] = loss * prediction.context_weight
        parts.update(prediction.aux_losses or {})
        wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts.values()]
        total = parts["nll"] if len(parts) == 1 else torch.stack(wide).sum()
        return scaled, prediction, {"loss": total, **parts}

    def _compared(
        self, batch: Batch, stats: tuple[Tensor, Tensor], raw: Tensor, scaled: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return parameters, values and their unit as the likelihood's loss takes them.

        Args:
            batch, stats: data units, and what they are scaled with.
            raw: parameters [B, T, V, K] in scaled units.
            scaled, given: values [B, T, V] in scaled and in data units.
        """
        loc, scale = stats
        if not self.likelihood.in_data_units:
            return raw, scaled, self.scaler.unit(batch, scale)
        assert given is not None  # scaled values come from them
        return raw * scale.unsqueeze(-1) + loc.unsqueeze(-1), given, None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` (the sum to minimise), ``nll`` and every part the model adds, for a batch in data units.

        Units: scaled, but for losses of logarithms, which take data units; with scaling ``window`` point and pinball
        losses are measured against the training spread of the series, so quiet windows do not dominate.

        Raises:
            ModelError: windows of another size or without a target, or a model that fills ``context_raw`` undeclared.
        """
        return self._parts(batch)[2]

    @torch.no_grad()
    def window_losses(self, batch: Batch) -> Tensor:
        """Return the likelihood's loss of every window [B] (its mean over observed cells), in the units of ``loss``."""
        self._check_batch(batch)
        stats = self.scaler.stats(batch)
        scaled = self.scaler.scale(batch, stats)
        if scaled.target is None:
            raise ModelError("a loss needs windows with a target")
        mask = torch.ones_like(scaled.target, dtype=torch.bool) if scaled.target_mask is None else scaled.target_mask
        found = self._predict_scaled(scaled).raw
        raw, target, unit = self._compared(batch, stats, found, scaled.target, batch.target)
        cells = self.likelihood.loss(raw, torch.where(mask, target, 0.0), unit)
        return torch.where(mask, cells, 0.0).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of ``loss``, ``mse`` and ``mae`` of the mean (scaled units), and ``cells``, their count."""
        scaled, prediction, parts = self._parts(batch)
        assert scaled.target is not None  # _parts refused batches without one
        mask = torch.ones_like(scaled.target, dtype=torch.bool) if scaled.target_mask is None else scaled.target_mask
        error = self.likelihood.mean(prediction.raw) - scaled.target
        return {
            **parts,
            "mse": masked_mean(error.square(), mask),
            "mae": masked_mean(error.abs(), mask),
            "cells": mask.sum(),
        }

    def location(self, batch: Batch) -> Tensor:
        """Return the mean forecast [B, H, V] in data units, differentiable in every input of the batch."""
        loc, scale = stats = self.scaler.stats(batch)
        return self.likelihood.mean(self._run(batch, stats)[1].raw) * scale + loc

    @torch.no_grad()
    def predict(self, batch: Batch, quantile_levels: Sequence[float] = ()) -> Predictive:
        """Return mean and quantiles in data units.

        Raises:
            ModelError: quantiles of a point likelihood, or levels that are not ascending inside (0, 1).
        """
        levels = list(quantile_levels)
        if any(not 0 < level < 1 for level in levels) or sorted(set(levels)) != levels:
            raise ModelError(f"quantile levels must ascend strictly between 0 and 1, got {levels}")
        loc, scale = stats = self.scaler.stats(batch)
        _, prediction = self._run(batch, stats)
        mean = self.likelihood.mean(prediction.raw) * scale + loc
        if not levels:
            return Predictive(mean, None)
        quantiles = self.likelihood.quantile(prediction.raw, levels)
        quantiles = quantiles * scale.unsqueeze(-1) + loc.unsqueeze(-1)
        return Predictive(mean, quantiles.cummax(dim=-1).values)  # parallel sums may round apart by one ulp

    @torch.no_grad()
    def cdf(self, batch: Batch, y: Tensor) -> Tensor:
        """Return P(Y <= y) [B, H, V] for ``y`` [B, H, V] in data units."""
        return self.likelihood.cdf(*self._scaled_at(batch, y))

    @torch.no_grad()
    def log_tail(self, batch: Batch, y: Tensor) -> Tensor:
        """Return log(2 min(F(y), 1 - F(y))) [B, H, V] for ``y`` in data units; it never saturates, unlike ``cdf``."""
        return self.likelihood.log_tail(*self._scaled_at(batch, y))

    @torch.no_grad()
    def log_density(self, batch: Batch, y: Tensor) -> Tensor:
        """Return log p(y) [B, H, V] for ``y`` in data units, a density per data unit.

        Raises:
            ModelError: the likelihood has no density.
        """
        _, scale = self.scaler.stats(batch)
        return self.likelihood.log_density(*self._scaled_at(batch, y)) - scale.log()

    def _scaled_at(self, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = stats = self.scaler.stats(batch)
        return self._run(batch, stats)[1].raw, (y - loc) / scale

    @torch.no_grad()
    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return additive parts [B, H, V] of the location forecast in data units; they sum to it.

        The scaling's location is the part ``level``. Empty when the model has no parts to show.
        """
        self._check_batch(batch)
        loc, scale = self.scaler.stats(batch)
        parts = self.model.components(self._inputs(self.scaler.scale(batch)))
        if not parts:
            return {}
        shape = (batch.context.shape[0], self.spec.horizon, self.spec.num_variates)
        return {"level": loc.expand(shape).clone(), **{name: part * scale for name, part in parts.items()}}

    @torch.no_grad()
    def contributions(self, batch: Batch) -> Tensor | None:
        """Return what each variate gives to the component ``network``, [B, H, V, V'] in data units of the receiver."""
        self._check_batch(batch)
        _, scale = self.scaler.stats(batch)
        found = self.model.contributions(self._inputs(self.scaler.scale(batch)))
        return None if found is None else found * scale.unsqueeze(-1)

    @torch.no_grad()
    def attention(self, batch: Batch) -> Tensor | None:
        """Return the shares [B, V, V'] of variates v' in what the model attends to for v, None if it does not."""
        self._check_batch(batch)
        return self.model.attention(self._inputs(self.scaler.scale(batch)))


def build_network(config: NetworkConfig, spec: DataSpec, *, seed: int = 0) -> ForecastNetwork:
    """Return a network whose initial weights depend on ``seed`` only; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ForecastNetwork(config, spec)


def _check_not_negative(data: TrainingSeries, likelihood: LikelihoodConfig) -> None:
    below = (data.values < 0) & data.mask
    if bool(below.any()):
        loss = getattr(likelihood, "loss", likelihood.name)
        where = ", ".join(str(int(number)) for number in below.any(0).nonzero())
        raise ModelError(
            f"likelihood.loss={loss} compares logarithms and needs values of at least 0; {int(below.sum())} of "
            f"{int(data.mask.sum())} training cells are negative (variate {where} from 0): use mse, mae or huber"
        )


def _check_covariates(name: str, capabilities: Capabilities, spec: DataSpec) -> None:
    for kind, size, allowed in (
        ("known", spec.num_known, capabilities.known_covariates),
        ("past", spec.num_past, capabilities.past_covariates),
        ("static", spec.num_static, capabilities.static_covariates),
    ):
        if size and not allowed:
            raise ConfigError(
                f"model '{name}' cannot use the {size} {kind} covariate(s) of the data; "
                f"drop them from data.{kind} or choose a model that uses them"
            )


def _choose_scaling(config: NetworkConfig, capabilities: Capabilities) -> ScalingKind:
    allowed = capabilities.scaling
    kind = config.scaling.kind
    if kind == "auto":
        return allowed[0]
    if kind not in allowed:
        raise ConfigError(
            f"model '{config.model.name}' does not support scaling '{kind}'; use one of {', '.join(allowed)}"
        )
    return kind


def _gaps(mask: Tensor | None) -> Tensor | None:
    """Return the mask where it hides a cell; a GPU is not made to wait for the answer."""
    return None if mask is None or is_known_complete(mask) else mask
