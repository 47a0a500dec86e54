"""Scaling of targets and covariates; statistics come from the training span or the context, never from the target."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ScalingKind
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries, is_known_complete
from tsforge.core.config import Config
from tsforge.core.errors import ModelError, listing

SERIES_KINDS: tuple[ScalingKind, ...] = ("series", "series_max")  # forecast no series that they have not met
WINDOW_KINDS: tuple[ScalingKind, ...] = ("window", "window_mean", "last")
IQR_TO_SD = 1.3489795003921634  # interquartile range of a standard Normal
WINDOW_FLOOR = 1e-3  # smallest window scale, in standard deviations of the calmest training series
_ORDINARY = 2.0**40  # sizes up to this and down to its inverse have squares well within single precision
DIVERSE_LEVELS = 2.0  # spread of all series together, in those of the middle one, from which on levels count as apart
DIVERSE_SPREADS = 3.0  # the same for the spread of a lively series in those of a calm one (0.9 and 0.1 quantile)
_BLOCK_CELLS = 1 << 21  # of the training span, whose statistics are taken at once
_PRIOR_ROWS = 8.0  # of its context, that the usual relative spread weighs in the scale of a series not trained on


class ScalingConfig(Config):
    """How values reach the model. ``auto`` takes the first scaling the model allows; where a panel's series differ much
    in level or spread, ``series`` with ``unknown: context``, if the model can be scaled by series."""

    kind: Literal["auto", "none", "global", "series", "series_max", "window", "window_mean", "last"] = "auto"
    robust: bool = False
    """Median and interquartile range instead of mean and standard deviation."""
    unknown: Literal["refuse", "context"] = "refuse"
    """What ``series`` does with a series that was not trained on: refuse it, or take the statistics of its context."""

    @model_validator(mode="after")
    def _unknown_belongs_to_series(self) -> "ScalingConfig":
        if self.unknown != "refuse" and self.kind != "series":
            raise ValueError(f"unknown={self.unknown} has an effect with scaling.kind=series only, not {self.kind}")
        return self


def is_diverse(data: TrainingSeries) -> bool:
    """Return whether levels or spreads of the series of a panel differ so much that one scale cannot serve them all.

    For some variate the spread of all series together exceeds ``DIVERSE_LEVELS`` times the median spread of a series,
    or a lively series (0.9 quantile) spreads ``DIVERSE_SPREADS`` times as far as a calm one (0.1 quantile).
    """
    count = torch.diff(data.indptr)
    if len(count) < 2:
        return False
    owner = torch.repeat_interleave(count)
    values, mask = data.values.double(), data.mask & torch.isfinite(data.values)

    def by_series(part: Tensor) -> Tensor:
        return part.new_zeros(len(count), part.shape[1]).index_add(0, owner, part)

    seen = by_series(mask.double())
    filled = torch.where(mask, values, 0.0)
    mean = by_series(filled) / seen.clamp(min=1)
    own = (by_series(torch.where(mask, values - mean[owner], 0.0).square()) / seen.clamp(min=1)).sqrt()
    together = masked_moments(values, mask)[1]
    peak = torch.zeros_like(own).scatter_reduce(0, owner[:, None].expand_as(filled), filled.abs(), "amax")
    for variate in range(values.shape[1]):
        spreads = own[:, variate][(seen[:, variate] > 1) & (own[:, variate] > 1e-9 * peak[:, variate])]
        if len(spreads) < 2:
            continue
        calm, middle, lively = spreads.quantile(spreads.new_tensor([0.1, 0.5, 0.9])).tolist()
        if together[variate] > DIVERSE_LEVELS * middle or lively > DIVERSE_SPREADS * calm:
            return True
    return False


def scaling_for(scaling: ScalingConfig, can: Capabilities, *, diverse: bool) -> ScalingConfig:
    """Return the scaling of a fit: what ``auto`` means for a diverse panel, else as it is."""
    if not diverse or scaling.kind != "auto" or "series" not in can.scaling or can.rows_coupled or can.own_units:
        return scaling
    return ScalingConfig(kind="series", robust=scaling.robust, unknown="context")


def masked_quantile(
    values: Float[Tensor, "*lead rows column"], mask: Bool[Tensor, "*lead rows column"], level: float
) -> Float[Tensor, "*lead column"]:
    """Return the ``level`` quantile of observed values along the rows, linear between order statistics; 0 if none."""
    if not values.shape[-2]:
        return values.sum(dim=-2)  # of no rows
    ordered = torch.where(mask, values, torch.inf).sort(dim=-2).values
    last = (mask.sum(dim=-2, keepdim=True) - 1).clamp(min=0)
    place = last.to(values.dtype) * level
    low = place.floor().long()
    high = torch.minimum(low + 1, last)
    below, above = ordered.gather(-2, low), ordered.gather(-2, high)
    found = torch.lerp(below, above, place - low)
    return torch.where(mask.any(dim=-2, keepdim=True), found, 0.0).squeeze(-2)


def masked_moments(
    values: Float[Tensor, "*lead rows column"], mask: Bool[Tensor, "*lead rows column"], *, robust: bool = False
) -> tuple[Float[Tensor, "*lead column"], Float[Tensor, "*lead column"]]:
    """Return location and spread of observed values along the rows (two passes: no cancellation); 0, 0 if none."""
    if robust:
        spread = masked_quantile(values, mask, 0.75) - masked_quantile(values, mask, 0.25)
        return masked_quantile(values, mask, 0.5), spread / IQR_TO_SD
    count = mask.sum(dim=-2).clamp(min=1).to(values.dtype)
    if is_known_complete(mask):  # the same bits in fewer passes
        mean = values.sum(dim=-2) / count
        return mean, ((values - mean.unsqueeze(-2)).square().sum(dim=-2) / count).sqrt()
    values = torch.where(mask, values, 0.0)
    mean = values.sum(dim=-2) / count
    centred = torch.where(mask, values - mean.unsqueeze(-2), 0.0)
    return mean, (centred.square().sum(dim=-2) / count).sqrt()


def moments_of_any_unit(
    values: Float[Tensor, "*lead rows column"], mask: Bool[Tensor, "*lead rows column"], *, robust: bool = False
) -> tuple[Float[Tensor, "*lead column"], Float[Tensor, "*lead column"]]:
    """Return ``masked_moments`` also where squares would leave the range of single precision.

    Values are measured in a power of two near the largest of their window, which changes no digit of the result.
    """
    peak = torch.where(mask, values.abs(), 0.0).amax(dim=-2, keepdim=True)
    unit = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent.clamp(-120, 120))
    location, spread = masked_moments(values / unit, mask, robust=robust)
    return location * unit.squeeze(-2), spread * unit.squeeze(-2)


def _safe(spread: Tensor, size: Tensor) -> Tensor:
    """Return ``spread``, or ``_unit_of_constant`` where it is rounding noise of values of that ``size``."""
    return torch.where(spread > 1e-9 * size, spread, _unit_of_constant(size))


def _unit_of_constant(size: Tensor) -> Tensor:
    """Return the scale of a constant of that ``size``: 1, or more where neighbouring float32 numbers lie 1 apart, so
    that rounding would be a jump beside the other variates.
    """
    return torch.where(size > 1e7, 1e-6 * size, 1.0)


def _covariate_stats(values: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Return location and scale [size] of covariates; binary and constant columns keep location 0 and scale 1.

    A constant so large that it would drown everything else (a year is none) is centred.
    """
    loc, scale = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    if values is None or values.numel() == 0:
        return loc, scale
    values = values.double()
    mask = torch.isfinite(values)
    mean, spread = masked_moments(values, mask)
    binary = ((values == 0) | (values == 1) | ~mask).all(dim=0)
    constant = spread <= 1e-9 * mean.abs()
    unit = _unit_of_constant(mean.abs())
    keep = binary | (constant & (unit == 1.0))
    return torch.where(keep, loc, mean), torch.where(keep, scale, torch.where(constant, unit, spread))


class Scaler(nn.Module):
    """Maps data units to scaled units and back; holds its statistics as buffers, so they travel with the weights.

    Kinds: ``none`` leaves everything as it is. ``global``: mean and standard deviation of each variate over all series
    of the training span. ``series``: the same for each series; with ``unknown="context"`` what was not observed there
    takes those of the observed context, its spread drawn to the usual share of its size (as if ``_PRIOR_ROWS`` rows had
    shown that). ``series_max``: 0 and the largest size of each variate of a series in the training span. ``window``:
    mean and standard deviation of the observed context. ``window_mean`` and ``last``: subtract the context's mean or
    last observed value, divide by the global standard deviation.
    Covariates are standardised over the training span, binary ones (0/1) are left alone.

    Shapes:
        global_loc, global_scale [V] over the whole span; series_loc, series_scale [num_series, V];
        floor [V] least window scale; past_*, known_*, static_* [P], [F], [S].
    """

    global_loc: Tensor
    global_scale: Tensor
    series_loc: Tensor
    series_scale: Tensor
    floor: Tensor

    def __init__(
        self,
        kind: ScalingKind,
        spec: DataSpec,
        *,
        robust: bool = False,
        unknown: Literal["refuse", "context"] = "refuse",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.robust = robust
        self.unknown = unknown
        self.spec = spec
        self.is_fitted = kind == "none"
        self._is_extreme = False
        variates = spec.num_variates
        self.register_buffer("global_loc", torch.zeros(variates))
        self.register_buffer("global_scale", torch.ones(variates))
        self.register_buffer("series_loc", torch.zeros(0, variates))
        self.register_buffer("series_scale", torch.ones(0, variates))
        self.register_buffer("floor", torch.full((variates,), WINDOW_FLOOR))
        for name, size in self._covariates().items():
            self.register_buffer(f"{name}_loc", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))

    def _covariates(self) -> dict[str, int]:
        return {"past": self.spec.num_past, "known": self.spec.num_known, "static": self.spec.num_static}

    @torch.no_grad()
    def fit(self, data: TrainingSeries) -> None:
        """Take every statistic from the training span (unscaled), in float64; constant variates get scale 1.

        A series without a single observation of a variate takes the global statistics of that variate, or with
        ``unknown="context"`` a scale of 0, which stands for those of the context.

        Raises:
            ModelError: no observed value at all, or values that are not finite.
        """
        if self.kind == "none":
            return
        values, mask = data.values.double(), data.mask
        bad = int((~torch.isfinite(values) & mask).sum())
        if bad:
            raise ModelError(f"{bad} observed training values are not finite; mark them as missing before training")
        if not bool(mask.any()):
            raise ModelError("the training span holds no observed value; widen it or check the target columns")
        mean, spread = masked_moments(values, mask, robust=self.robust)
        size = _peak(values, mask)
        scale = self._fall_back(spread, size, values, mask)
        series_loc, series_spread, seen, peaks = self._series_stats(data, values)
        constant = series_spread <= 1e-9 * peaks
        self._set("global_loc", mean)
        self._set("global_scale", scale)
        self._set("series_loc", torch.where(seen, series_loc, mean))
        unseen_scale = torch.zeros_like(scale) if self.unknown == "context" else scale
        unit = torch.where(seen, _unit_of_constant(peaks), unseen_scale)
        self._set("series_scale", torch.where(seen & ~constant, series_spread, unit))
        if self.kind == "series_max":
            unseen = torch.where(size > 0, size, 1.0)
            self._set("series_loc", torch.zeros_like(peaks))
            self._set("series_scale", torch.where(peaks > 0, peaks, torch.where(seen, 1.0, unseen)))
        calmest = torch.where(constant, torch.inf, series_spread).amin(dim=0)
        self._set("floor", WINDOW_FLOOR * torch.where(torch.isfinite(calmest), calmest, scale))
        for name, count in self._covariates().items():
            loc, width = _covariate_stats(getattr(data, name), count)
            self._set(f"{name}_loc", loc)
            self._set(f"{name}_scale", width)
        self._settle()

    def _fall_back(self, spread: Tensor, size: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return a usable scale: a zero interquartile range (mostly constant data) falls back to the deviation."""
        if self.robust:
            spread = torch.where(spread > 1e-9 * size, spread, masked_moments(values, mask)[1])
        return _safe(spread, size)

    def _series_stats(self, data: TrainingSeries, values: Tensor) -> tuple[Tensor, ...]:
        """Return location, spread, whether anything is observed, and largest size of every series, each [S, V]."""
        width = values.shape[1]
        blocks = (
            self._stats_of(values[rows].reshape(*shape, width), data.mask[rows].reshape(*shape, width))
            for rows, shape in _blocks(data.indptr, width)
        )
        return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))

    def _stats_of(self, values: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loc, spread = masked_moments(values, mask, robust=self.robust)
        peak = _peak(values, mask)
        if self.robust:
            spread = torch.where(spread > 1e-9 * peak, spread, masked_moments(values, mask)[1])
        return loc, spread, mask.any(dim=-2), peak

    def _set(self, name: str, value: Tensor) -> None:
        old = getattr(self, name)
        setattr(self, name, value.to(dtype=old.dtype, device=old.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("series_loc", "series_scale"):  # the number of series is known only to the stored weights
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.ndim == 2:
                old = getattr(self, name)
                setattr(self, name, old.new_ones((stored.shape[0], old.shape[1])))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._settle()

    def _settle(self) -> None:
        """Note what the statistics say once and for all: a look at them for every batch would cost the usual unit."""
        sizes = torch.cat([self.global_scale, self.series_scale.flatten(), self.floor]).double()
        sizes = sizes[sizes > 0]
        self._is_extreme = bool(((sizes > _ORDINARY) | (sizes < 1.0 / _ORDINARY)).any())
        self.is_fitted = True

    def stats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return location and scale of every window, both [B, 1, V], in data units.

        Raises:
            ModelError: ``fit`` was not called, or a series was not in the training span (kind ``series``).
        """
        context = batch.context
        if not self.is_fitted:
            raise ModelError("the scaler knows no training data yet; call fit_scaler(series) first")
        loc, scale = self.global_loc.to(context.dtype), self.global_scale.to(context.dtype)
        if self.unknown == "context":
            return self._own_or_context(batch)
        if self.kind in SERIES_KINDS:
            rows = self._known_series(batch)
            return self.series_loc[rows].to(context.dtype).unsqueeze(1), self.series_scale[rows].to(
                context.dtype
            ).unsqueeze(1)
        if self.kind not in WINDOW_KINDS:
            shape = (context.shape[0], 1, context.shape[2])
            return loc.expand(shape), scale.expand(shape)
        seen = batch.context_mask.any(dim=1, keepdim=True)
        if self.kind == "last":
            return torch.where(seen, _last_observed(context, batch.context_mask), loc), scale.expand(seen.shape)
        centre, spread = self._moments(context, batch.context_mask)
        centre = torch.where(seen, centre.unsqueeze(1), loc)
        if self.kind == "window_mean":
            return centre, scale.expand(seen.shape)
        return centre, torch.where(seen, torch.maximum(spread.unsqueeze(1), self.floor.to(context.dtype)), scale)

    def _moments(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and spread [B, V] of every window; a zero interquartile range falls back to the deviation."""
        moments = moments_of_any_unit if self._is_extreme else masked_moments
        centre, spread = moments(context, mask, robust=self.robust)
        if self.robust:
            peak = torch.where(mask, context.abs(), 0.0).amax(dim=1)
            spread = torch.where(spread > 1e-9 * peak, spread, moments(context, mask)[1])
        return centre, spread

    def unit(self, batch: Batch, scale: Tensor) -> Tensor | None:
        """Return the size [B, 1, V] of one scaled unit against the training spread of its series; None when it is 1.

        Losses that are not scale-free are measured in these units: a window that hardly moved does not weigh more than
        a lively one.
        """
        if self.kind != "window":
            return None
        reference = self.global_scale.to(scale.dtype).expand(scale.shape)
        index = batch.series_index
        if index is not None and self.series_scale.shape[0]:
            known = (index >= 0) & (index < self.series_scale.shape[0])
            own = self.series_scale[torch.where(known, index, 0)].to(scale.dtype).unsqueeze(1)
            reference = torch.where(known[:, None, None], own, reference)
        return scale / reference

    def _own_or_context(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the statistics of each series, of its context where the training span has none of it."""
        context, mask, index = batch.context, batch.context_mask, batch.series_index
        if index is None:
            raise ModelError(f"scaling '{self.kind}' needs the series of every window, but the batch does not say it")
        known = (index >= 0) & (index < len(self.series_loc))
        row = torch.where(known, index, 0)
        own_loc, own_scale = self.series_loc.double()[row], self.series_scale.double()[row]  # [B, V]
        trained = known.unsqueeze(1) & (own_scale > 0)
        if is_known_complete(trained):  # no window needs its context
            return own_loc.to(context.dtype).unsqueeze(1), own_scale.to(context.dtype).unsqueeze(1)
        centre, spread = self._moments(context.double(), mask)
        rows = mask.sum(dim=1)
        usual = self._relative_spread() * (centre.square() + spread.square()).sqrt()
        drawn = ((rows * spread.square() + _PRIOR_ROWS * usual.square()) / (rows + _PRIOR_ROWS)).sqrt()
        drawn = torch.maximum(drawn, self.floor.double())
        loc = torch.where(trained, own_loc, torch.where(rows > 0, centre, self.global_loc.double()))
        scale = torch.where(trained, own_scale, torch.where(rows > 0, drawn, self.global_scale.double()))
        return loc.to(context.dtype).unsqueeze(1), scale.to(context.dtype).unsqueeze(1)

    def _relative_spread(self) -> Tensor:
        """Return what share of its size (root mean square) the spread of a series usually is [V]: 1 without a level."""
        loc, scale = self.series_loc.double(), self.series_scale.double()
        share = torch.where(scale > 0, scale / (loc.square() + scale.square()).sqrt(), torch.nan)
        return torch.nan_to_num(share.nanmedian(dim=0).values, nan=1.0)

    def _known_series(self, batch: Batch) -> Tensor:
        index = batch.series_index
        if index is None:
            raise ModelError(f"scaling '{self.kind}' needs the series of every window, but the batch does not say it")
        count = self.series_loc.shape[0]
        outside = (index < 0) | (index >= count)
        if not torch.compiler.is_compiling() and bool(outside.any()):
            strangers = listing(sorted(set(index[outside].tolist())))
            raise ModelError(
                f"{int(outside.sum())} windows belong to series that were not trained on (index {strangers}; "
                f"trained series: {count}); refit with them, or use scaling 'window', or scaling.unknown=context"
            )
        return index

    def scale(self, batch: Batch, stats: tuple[Tensor, Tensor] | None = None) -> Batch:
        """Return the batch in scaled units; cells that are not observed become 0 whatever they held.

        Args:
            batch: windows in data units.
            stats: what ``stats(batch)`` returned, if it is at hand.
        """
        loc, scale = stats if stats is not None else self.stats(batch)
        context = _standardise(batch.context, loc, scale)
        if not is_known_complete(batch.context_mask):
            context = torch.where(batch.context_mask, context, 0.0)
        target = batch.target
        if target is not None:
            target = _standardise(target, loc, scale)
            if batch.target_mask is not None:
                target = torch.where(batch.target_mask, target, 0.0)
        return batch._replace(
            context=context,
            target=target,
            past=self._covariate(batch.past, "past"),
            known=self._covariate(batch.known, "known"),
            static=self._covariate(batch.static, "static"),
        )

    def _covariate(self, values: Tensor | None, name: str) -> Tensor | None:
        """Return standardised covariates; missing ones (NaN) become 0, the training mean."""
        if values is None:
            return None
        loc, scale = getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")
        if values.shape[-1] != loc.shape[0]:
            raise ModelError(
                f"the batch has {values.shape[-1]} {name} covariates, the network was built for {loc.shape[0]}"
            )
        scaled = (values - loc.to(values.dtype)) / scale.to(values.dtype)
        return torch.where(torch.isnan(scaled), 0.0, scaled)

    def scale_series(self, data: TrainingSeries) -> TrainingSeries:
        """Return the training span in scaled units, for closed-form fits (kinds that do not look at windows).

        Raises:
            ModelError: the scaling differs from window to window, so a span has no scaled form.
        """
        if self.kind in WINDOW_KINDS:
            raise ModelError(
                f"scaling '{self.kind}' differs from window to window; a closed-form fit needs a fixed one"
            )
        values = data.values.double()
        loc, scale = self.global_loc.double(), self.global_scale.double()
        if self.kind in SERIES_KINDS:
            rows = torch.repeat_interleave(torch.diff(data.indptr))
            loc, scale = self.series_loc.double()[rows], self.series_scale.double()[rows]
        return data._replace(
            values=torch.where(data.mask, (values - loc) / scale, 0.0),
            past=self._covariate(data.past, "past"),
            known=self._covariate(data.known, "known"),
            static=self._covariate(data.static, "static"),
        )


def _standardise(values: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Return (values - loc) / scale; statistics shared by the batch are laid out along time first (faster)."""
    if loc.stride(0) == 0 and loc.shape[0] > 1:
        shape = (1, *values.shape[1:])
        loc, scale = loc[:1].expand(shape).contiguous(), scale[:1].expand(shape).contiguous()
    return (values - loc) / scale


def _peak(values: Tensor, mask: Tensor) -> Tensor:
    """Return the largest size [*, V] of observed values [*, T, V], 0 where there is none."""
    if not values.shape[-2]:
        return values.sum(dim=-2)  # of no rows
    return torch.where(mask, values.abs(), 0.0).amax(dim=-2)


def _blocks(indptr: Tensor, width: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Yield the rows of neighbouring series of one length, and (series, length) of them: few passes, little memory."""
    place = int(indptr[0])
    for length, run in groupby(torch.diff(indptr).tolist()):
        left, most = len(list(run)), max(_BLOCK_CELLS // max(length * width, 1), 1)
        while left:
            number = min(left, most)
            yield slice(place, place + number * length), (number, length)
            place, left = place + number * length, left - number


def _last_observed(values: Tensor, mask: Tensor) -> Tensor:
    """Return the last observed value of each window and variate [B, 1, V] (the first cell's where none is)."""
    steps = torch.arange(values.shape[1], device=values.device).view(1, -1, 1)
    last = torch.where(mask, steps, 0).amax(dim=1, keepdim=True)
    return values.gather(1, last)
