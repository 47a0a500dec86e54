"""Temporal hierarchy: one series is forecast at several bin widths at once, and the forecasts are made to agree.

A day of hourly values is also four bins of six hours and one bin of a day. Wide bins are smoother: their level and slow
seasons are easier to forecast, narrow ones show the shape of the day. One member forecasts each width k from means of
k steps, and the base forecasts y of all n bins become those of the H steps by the least change that makes them agree:

    steps = (S' W^-1 S)^-1 S' W^-1 y = G y

with S [n, H] the averages of steps over bins and W diagonal (Athanasopoulos, Hyndman, Kourentzes, Petropoulos 2017,
EJOR 262(1), section on reconciliation). ``variance``: W holds the mean squared training error of each bin and variate;
``structural``: W is 1 / k, what k independent errors of equal size leave of their mean (their k, for sums, says the
same).

Deviations: bins are means, not sums, so that all widths share one unit; they end with the last row of the context, and
a window starts at any row, so members are fitted on all k phases of the bins, not on one grid of calendar bins. A bin
is observed where all its steps are. Errors are those of training windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models._ar_windows import residual_scale, series_bounds, training_error
from tsforge.models.registry import MODELS, register, resolve_model_config

_FEWEST_BINS = 2  # of a context, for a width to be tried by default
_SMALLEST_ERROR = 1e-4  # in scaled units; a bin that was never missed must not decide everything


class TemporalConfig(ModelConfig):
    """Which model forecasts which bins."""

    name: Literal["temporal"] = "temporal"
    member: SerializeAsAny[ModelConfig] = Field(default="linear", validate_default=True)
    """Name of a model, or its settings; one of it for every width, with look-back and horizon counted in bins."""
    widths: tuple[int, ...] | None = Field(default=None, min_length=2)
    """Steps a bin, divisors of the horizon, 1 among them. Default: all that leave two bins of context; of a
    horizon of one step that is the member alone."""
    weights: Literal["variance", "structural"] | None = None
    """Default ``variance`` where members are fitted in closed form, else ``structural``: errors of members that are
    trained by gradient steps are not known while they are."""

    @field_validator("member", mode="before")
    @classmethod
    def _resolve_member(cls, value: Any) -> ModelConfig:
        member = resolve_model_config(value, where="model.member")
        if member.name in ("auto", "committee", "temporal"):
            raise ConfigError(f"model.member: '{member.name}' is itself made of several models; name one of them")
        can = MODELS.get(member.name).capabilities_of(member)
        if can.rows_coupled or can.absolute_time:
            what = "couples the series of a batch" if can.rows_coupled else "counts time in steps of the data"
            raise ConfigError(f"model.member: '{member.name}' {what}, which bins of several widths cannot give it")
        return member

    def check_member(self) -> None:
        """Refuse a member that bins cannot train whole; not where settings are read, so that stored fits still load.

        Raises:
            ConfigError: it is trained on its targets or the steps of its context as well.
        """
        can = MODELS.get(self.member.name).capabilities_of(self.member)
        if can.teacher_forced or can.context_outputs:
            what = "its targets" if can.teacher_forced else "the steps of its context"
            raise ConfigError(
                f"model.member: '{self.member.name}' is trained on {what} as well with these settings, which bins "
                "cannot give it; name another model or head"
            )

    @field_validator("widths")
    @classmethod
    def _check_widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (min(value) != 1 or len(set(value)) < len(value)):
            raise ValueError(f"widths {list(value)} must be different whole numbers from 1 on, 1 among them")
        return value


@register("temporal")
class Temporal(ForecastModel[TemporalConfig]):
    """One member for each bin width; their forecasts are reconciled.

    Attributes:
        widths: steps a bin, ascending, the first is 1.
        gather: G [V, H, n], from the bins of all widths in turn to the steps.
    """

    config_class = TemporalConfig
    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        closed_form=True,
        variate_coupling=True,
        probabilistic=False,
        scaling=("global", "series", "window", "window_mean", "last", "none"),
    )
    source = (
        "Athanasopoulos, Hyndman, Kourentzes, Petropoulos (2017), Forecasting with temporal hierarchies, EJOR 262(1)"
    )
    test_configs = (
        {"member": {"name": "linear", "ridge": 1.0}},
        {"member": {"name": "dlinear", "kernel": 3}},
    )

    gather: Tensor

    def __init__(self, config: TemporalConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.widths = _widths(config, spec)
        member_class = MODELS.get(config.member.name)
        self.members = nn.ModuleList(member_class(config.member, _binned_spec(spec, k)) for k in self.widths)
        structural = [torch.full((spec.num_variates, spec.horizon // k), 1.0 / k) for k in self.widths]
        self.register_buffer("gather", reconciler(self.widths, spec.horizon, structural))

    @classmethod
    def capabilities_of(cls, config: TemporalConfig) -> Capabilities:
        """Return what the members can do; the spread is not modelled but taken from residuals."""
        can = MODELS.get(config.member.name).capabilities_of(config.member)
        return replace(can, probabilistic=False, context_outputs=False)

    def _parts(self, batch: Batch) -> Iterator[tuple[int, Tensor, Prediction]]:
        """Yield each width with what its bins give to the steps, [B, H, V], and the forecast of its member."""
        gather, first = self.gather.to(batch.context.dtype), 0
        for width, member in zip(self.widths, self.members, strict=True):
            bins = self.spec.horizon // width
            found: Prediction = member(binned(batch, width, self.spec))  # [B, H / k, V, 1]
            yield width, torch.einsum("vhn,bnv->bhv", gather[..., first : first + bins], found.raw[..., 0]), found
            first += bins

    def forward(self, batch: Batch) -> Prediction:
        """Return the reconciled location [B, H, V, 1]; losses of the members' own are averaged over the widths."""
        parts = list(self._parts(batch))
        losses: dict[str, Tensor] = {}
        for _, _, found in parts:
            for name, loss in (found.aux_losses or {}).items():
                losses[name] = losses.get(name, 0.0) + loss / len(parts)
        return Prediction(torch.stack([part for _, part, _ in parts]).sum(0).unsqueeze(-1), aux_losses=losses or None)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the bins of each width give to the forecast."""
        return {f"bins of {width}" if width > 1 else "steps": part for width, part, _ in self._parts(batch)}

    def anneal(self, progress: float) -> None:
        """Pass the progress of training on."""
        for member in self.members:
            if isinstance(member, ForecastModel):
                member.anneal(progress)

    def prepare(self, data: TrainingSeries) -> None:
        """Show every member the training span in its bins."""
        for width, member in zip(self.widths, self.members, strict=True):
            if isinstance(member, ForecastModel) and type(member).prepare is not ForecastModel.prepare:
                member.prepare(binned_series(data, width))

    @torch.no_grad()
    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Fit every member on bins of its width, in all phases, and weigh the widths by their training errors.

        Raises:
            ModelError: no series is long enough, or weights by variance of members that are trained.
            ConfigError: a member that bins cannot train whole.
        """
        self.config.check_member()
        reports, errors = [], []
        for width, member in zip(self.widths, self.members, strict=True):
            assert isinstance(member, ForecastModel)
            series = binned_series(data, width)
            report = member.solve(series)
            reports.append(report)
            if report is not None and report.finished:
                errors.append(training_error(member, series))
        solved = [error.T.clamp(min=_SMALLEST_ERROR).square() for error in errors if error is not None]
        if len(solved) == len(self.widths) and self.config.weights != "structural":
            self.gather = reconciler(self.widths, self.spec.horizon, solved).to(self.gather)
        elif self.config.weights == "variance":
            raise ModelError(
                f"model.weights=variance needs members fitted in closed form with training errors; "
                f"'{self.config.member.name}' is not with these settings: use structural"
            )
        found = [report for report in reports if report is not None]
        if not found:
            return None
        finished = len(errors) == len(self.widths)
        return SolveReport(
            finished=finished,
            method=f"{found[0].method}, bins of {', '.join(map(str, self.widths))}",
            residual_scale=residual_scale(self, data) if finished else None,
            details=found[0].details,
        )

    def explain(self) -> dict[str, Any]:
        """Return, for every variate and width, the share of a step's forecast that rests on bins of that width."""
        records, first = [], 0
        for width in self.widths:
            bins = self.spec.horizon // width
            share = self.gather[..., first : first + bins].sum(-1).mean(-1)  # [V]
            records += [{"width": width, "variate": v, "share": float(value)} for v, value in enumerate(share)]
            first += bins
        return {"shares": records}


def _widths(config: TemporalConfig, spec: DataSpec) -> tuple[int, ...]:
    length, horizon = spec.context_length, spec.horizon
    if config.widths is None:
        return tuple(k for k in range(1, horizon + 1) if horizon % k == 0 and (k == 1 or length // k >= _FEWEST_BINS))
    for width in config.widths:
        if horizon % width or length < width:
            raise ModelError(
                f"model.widths: bins of {width} steps do not fill a horizon of {horizon} or exceed the context of "
                f"{length} steps"
            )
    return tuple(sorted(config.widths))


def _binned_spec(spec: DataSpec, width: int) -> DataSpec:
    return replace(
        spec,
        context_length=spec.context_length // width,
        horizon=spec.horizon // width,
        num_params=1,
        train_length=spec.train_length and spec.train_length // width,
    )


def reconciler(widths: tuple[int, ...], horizon: int, variances: list[Tensor]) -> Tensor:
    """Return G [V, H, n] = (S' W^-1 S)^-1 S' W^-1 for every variate, in float32.

    Args:
        widths: steps a bin. horizon: H. variances: for each width the diagonal of W, [V, H / width].
    """
    rows = [torch.eye(horizon // k, dtype=torch.float64).repeat_interleave(k, dim=1) / k for k in widths]
    average = torch.cat(rows)  # S [n, H]
    weight = 1.0 / torch.cat(variances, dim=1).double()  # [V, n]
    left = average.T @ (weight.unsqueeze(-1) * average)  # [V, H, H]
    gather: Tensor = torch.linalg.solve(left, average.T.unsqueeze(0) * weight.unsqueeze(1))
    return gather.float()


def _mean(values: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return means over ``width`` steps [B, L / width, V] and where all of them were observed."""
    shape = (values.shape[0], values.shape[1] // width, width, values.shape[2])
    seen = mask.reshape(shape).all(dim=2)
    return torch.where(seen, values.reshape(shape).mean(dim=2), 0.0), seen


def _average(values: Tensor | None, front: int, width: int) -> Tensor | None:
    """Return covariates [B, L, F] without the first ``front`` steps, averaged over ``width`` steps."""
    if values is None:
        return None
    kept = values[:, front:]
    return kept.reshape(kept.shape[0], -1, width, kept.shape[2]).mean(dim=2)


def binned(batch: Batch, width: int, spec: DataSpec) -> Batch:
    """Return what a member sees of scaled windows: means over ``width`` steps, counted from the end of the context."""
    if width == 1:
        return batch._replace(target=None, target_mask=None)
    front = spec.context_length % width
    context, mask = _mean(batch.context[:, front:], batch.context_mask[:, front:], width)
    return batch._replace(
        context=context,
        context_mask=mask,
        target=None,
        target_mask=None,
        past=_average(batch.past, front, width),
        known=_average(batch.known, front, width),
        cutoff_index=None,
    )


def binned_series(data: TrainingSeries, width: int) -> TrainingSeries:
    """Return every series as ``width`` series of bins, one for each phase of the first bin."""
    if width == 1:
        return data
    parts: list[TrainingSeries] = []
    lengths, owners = [0], []
    for index, (first, last) in enumerate(pairwise(series_bounds(data))):
        for phase in range(min(width, last - first)):
            start = first + phase
            bins = (last - start) // width
            rows = slice(start, start + bins * width)
            values, mask = _mean(data.values[rows].unsqueeze(0), data.mask[rows].unsqueeze(0), width)
            past, known = (
                _average(None if part is None else part[rows].unsqueeze(0), 0, width)
                for part in (data.past, data.known)
            )
            parts.append(TrainingSeries(values[0], mask[0], data.indptr, data.offset, past, known))
            lengths.append(bins)
            owners.append(index)
    owner = torch.tensor(owners, device=data.offset.device, dtype=torch.int64)
    return TrainingSeries(
        values=torch.cat([part.values for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        indptr=torch.tensor(lengths).cumsum(0).to(data.indptr),
        offset=torch.zeros_like(owner),
        past=None if data.past is None else torch.cat([part.past[0] for part in parts if part.past is not None]),
        known=None if data.known is None else torch.cat([part.known[0] for part in parts if part.known is not None]),
        static=None if data.static is None else data.static[owner],
    )
