"""A weighted mixture of fitted networks that behaves like one network.

Members may differ in model, look-back, scaling and in the covariates they read. Means are averaged. So are quantiles,
level by level (Vincentization; Lichtendahl, Grushka-Cockayne, Winkler 2013, Management Science 59(7), show that this
is at least as sharp and as well calibrated as averaging probabilities when members are). Where a member gives points
only, so does the mixture, and its intervals come from conformal calibration.

A member that runs away (an unregularised autoregression that meets an outlier) must not take the mixture along: of
three members or more, each is held within 2 units of scale of their weighted median, mean and quantiles alike.

``cdf`` inverts the averaged quantile function: it is tabulated at normal scores -4 to 4 and linear between and beyond
them, which is exact for normal members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.layers.scaling import Scaler
from tsforge.network import ForecastNetwork, NetworkConfig, Predictive

_SCORES = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)
_LOG2 = 0.6931471805599453
_REACH = 2.0  # units of scale around the weighted median within which members are held
_FEWEST_HELD = 3  # of fewer members none is more believable than the others


class EnsembleScaler(Scaler):
    """Scale of a mixture: the weighted mean of its members' scales, location 0. It has no statistics of its own."""

    def __init__(self, spec: DataSpec, owner: EnsembleNetwork) -> None:
        super().__init__("none", spec)
        object.__setattr__(self, "_owner", owner)  # not a submodule: the owner holds this one

    def take_covariates(self, members: Sequence[ForecastNetwork]) -> None:
        """Take the training mean and spread of every kind of covariate from a member that reads it."""
        for name in ("past", "known", "static"):
            for part in (f"{name}_loc", f"{name}_scale"):
                found = [getattr(member.scaler, part) for member in members if getattr(member.spec, f"num_{name}")]
                if found:
                    self._set(part, found[0])

    def stats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return 0 and the scale of every window, both [B, 1, V], in data units."""
        owner: EnsembleNetwork = self.__dict__["_owner"]
        weights = owner.weights_of(batch)
        scale = torch.zeros((len(batch.context), 1, self.spec.num_variates)).to(batch.context)
        for index, member in enumerate(owner.members):
            scale = scale + weights[:, index, :1] * member.scaler.stats(member_batch(batch, member.spec))[1]
        return torch.zeros_like(scale), scale


class EnsembleNetwork(ForecastNetwork):
    """Forecasts with several networks and averages them.

    Args:
        config: ``model`` auto; its likelihood must be the one the members share, or point.
        spec: sizes; ``context_length`` is the longest of the members, each reads the last part of the window.
        members: fitted networks for the same variates and horizon.
        weights: [G, M, H or 1, V or 1], non-negative, summing to 1 over the M members. G = 1, or one set a series in
            the order of the fit plus a last one for all others.

    Raises:
        ModelError: sizes, weights or output distributions do not go together.
    """

    weights: Tensor

    def __init__(
        self, config: NetworkConfig, spec: DataSpec, members: Sequence[ForecastNetwork], weights: Tensor
    ) -> None:
        super().__init__(config, spec)
        _check_members(self, members, weights)
        self.scaler = EnsembleScaler(self.spec, self)
        self.scaler.take_covariates(members)
        self.model.members = nn.ModuleList(members)
        self.register_buffer("weights", weights.float())
        can = [member.capabilities for member in members]
        self.capabilities = Capabilities(
            known_covariates=any(one.known_covariates for one in can),
            past_covariates=any(one.past_covariates for one in can),
            static_covariates=any(one.static_covariates for one in can),
            rows_coupled=any(one.rows_coupled for one in can),
            absolute_time=any(one.absolute_time for one in can),
            variate_coupling=any(one.variate_coupling for one in can),
            trainable=False,
            scaling=self.capabilities.scaling,
            probabilistic=self.likelihood.has_distribution,
        )

    @property
    def members(self) -> tuple[ForecastNetwork, ...]:
        """The networks that are averaged."""
        held = self.model.get_submodule("members").children()
        return tuple(member for member in held if isinstance(member, ForecastNetwork))

    @property
    def needs_known_series(self) -> bool:
        """True when a member cannot forecast a series that it was not fitted on."""
        return any(member.needs_known_series for member in self.members)

    def weights_of(self, batch: Batch) -> Tensor:
        """Return the weights of every window [B, M, H or 1, V or 1]."""
        weights = self.weights.to(batch.context.dtype)
        if len(weights) == 1:
            return weights.expand(len(batch.context), *weights.shape[1:])
        if batch.series_index is None:
            raise ModelError("weights differ by series, but the batch does not say which series its windows are of")
        index = batch.series_index
        other = len(weights) - 1
        return weights[torch.where((index >= 0) & (index < other), index, other)]

    def _mean(self, batch: Batch) -> Tensor:
        """Return the weighted mean forecast [B, H, V]."""
        return torch.stack(self._parts_of_mean(batch)).sum(0)

    def _parts_of_mean(self, batch: Batch) -> list[Tensor]:
        """Return what each member adds to the mean forecast, [B, H, V] each."""
        self._check_batch(batch)
        weights = self.weights_of(batch)
        means = torch.stack([one.location(member_batch(batch, one.spec)) for one in self.members], dim=1)
        return list((weights * self._held(batch, means, weights)).unbind(1))

    def _held(self, batch: Batch, means: Tensor, weights: Tensor) -> Tensor:
        """Return members' means [B, M, H, V] held near their weighted median."""
        if means.shape[1] < _FEWEST_HELD:
            return means
        middle = weighted_median(means, weights.expand_as(means)).unsqueeze(1)
        reach = _REACH * self.scaler.stats(batch)[1].unsqueeze(1)
        return torch.maximum(torch.minimum(means, middle + reach), middle - reach)

    def location(self, batch: Batch) -> Tensor:
        """Return the mean forecast [B, H, V] in data units, differentiable in every input of the batch."""
        return self._mean(batch)

    def forward(self, batch: Batch) -> Prediction:
        """Return the location as raw parameter [B, H, V, 1] in units of ``scaler.stats``."""
        loc, scale = self.scaler.stats(batch)
        return Prediction(((self._mean(batch) - loc) / scale).unsqueeze(-1))

    @torch.no_grad()
    def predict(self, batch: Batch, quantile_levels: Sequence[float] = ()) -> Predictive:
        """Return mean and quantiles in data units.

        Raises:
            ModelError: quantiles although a member gives points only, or levels that do not ascend within (0, 1).
        """
        if quantile_levels and not self.likelihood.has_distribution:
            raise ModelError("a member of the ensemble gives points only; ask for calibrated intervals instead")
        self._check_batch(batch)
        weights = self.weights_of(batch)
        found = [one.predict(member_batch(batch, one.spec), quantile_levels) for one in self.members]
        means = torch.stack([one.mean for one in found], dim=1)
        held = self._held(batch, means, weights)
        mean = (weights * held).sum(1)
        if not quantile_levels:
            return Predictive(mean, None)
        quantiles = torch.zeros((*mean.shape, len(quantile_levels))).to(mean)
        for index, one in enumerate(found):
            assert one.quantiles is not None  # every member has the likelihood of the ensemble
            moved = one.quantiles + (held - means)[:, index].unsqueeze(-1)
            quantiles = quantiles + weights[:, index].unsqueeze(-1) * moved
        return Predictive(mean, quantiles.cummax(dim=-1).values)

    def _normal_score(self, batch: Batch, y: Tensor) -> Tensor:
        """Return the normal score z [B, H, V] with Phi(z) = P(Y <= y)."""
        levels = torch.special.ndtr(_SCORES).tolist()
        table = self.predict(batch, levels).quantiles
        assert table is not None  # predict refused point networks
        scores = _SCORES.to(table)
        place = torch.searchsorted(table.contiguous(), y.unsqueeze(-1).contiguous()).clamp(1, len(levels) - 1)
        low, high = (table.gather(-1, place - shift).squeeze(-1) for shift in (1, 0))
        width = (high - low).clamp(min=torch.finfo(table.dtype).tiny)
        below = scores[place.squeeze(-1) - 1]
        return below + (y - low) / width * (scores[1] - scores[0])

    @torch.no_grad()
    def cdf(self, batch: Batch, y: Tensor) -> Tensor:
        """Return P(Y <= y) [B, H, V] for ``y`` [B, H, V] in data units."""
        probability: Tensor = torch.special.ndtr(self._normal_score(batch, y))
        return probability

    @torch.no_grad()
    def log_tail(self, batch: Batch, y: Tensor) -> Tensor:
        """Return log(2 min(F(y), 1 - F(y))) [B, H, V] for ``y`` in data units; it never saturates, unlike ``cdf``."""
        tail: Tensor = torch.special.log_ndtr(-self._normal_score(batch, y).abs()) + _LOG2
        return tail

    def log_density(self, batch: Batch, y: Tensor) -> Tensor:
        """Refuse: quantiles are averaged, which leaves no density.

        Raises:
            ModelError: always.
        """
        raise ModelError("an ensemble averages quantiles and has no density; use tail scores")

    @torch.no_grad()
    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return what each member adds to the mean forecast, [B, H, V] in data units; the parts sum to it."""
        return dict(zip(self.member_names, self._parts_of_mean(batch), strict=True))

    @property
    def member_names(self) -> tuple[str, ...]:
        """One name a member: model and look-back, numbered where that is not unique."""
        plain = [f"{member.config.model.name}, {member.spec.context_length} steps" for member in self.members]
        return tuple(
            name if plain.count(name) == 1 else f"{name} ({plain[: index + 1].count(name)})"
            for index, name in enumerate(plain)
        )

    def contributions(self, batch: Batch) -> Tensor | None:
        """Return None: members do not share a component ``network``."""
        return None

    def attention(self, batch: Batch) -> Tensor | None:
        """Return None: members do not share an attention."""
        return None

    def fit_scaler(self, data: TrainingSeries) -> None:
        """Refuse: members are fitted one by one.

        Raises:
            ModelError: always.
        """
        raise ModelError("an ensemble is not fitted as a whole; fit its members and put them together")

    def _predict_scaled(self, scaled: Batch) -> Prediction:
        raise ModelError("an ensemble has no loss of its own: its members were fitted one by one")


def member_batch(batch: Batch, spec: DataSpec) -> Batch:
    """Return what a network of these sizes reads of a longer window: the last rows, its kinds of covariates, no target.

    Raises:
        ModelError: the window is shorter than the network's context.
    """
    surplus = batch.context.shape[1] - spec.context_length
    if surplus < 0:
        raise ModelError(f"a member reads {spec.context_length} steps, the window has {batch.context.shape[1]}")
    return batch._replace(
        context=batch.context[:, surplus:],
        context_mask=batch.context_mask[:, surplus:],
        target=None,
        target_mask=None,
        past=None if not spec.num_past or batch.past is None else batch.past[:, surplus:],
        known=None if not spec.num_known or batch.known is None else batch.known[:, surplus:],
        static=batch.static if spec.num_static else None,
    )


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the smallest of values [B, M, ...] along M at which the weights up to it reach one half."""
    ordered, order = values.sort(dim=1)
    reached = weights.gather(1, order).cumsum(1) >= 0.5 - 1e-6
    return ordered.gather(1, reached.int().argmax(dim=1, keepdim=True)).squeeze(1)


def _check_members(network: ForecastNetwork, members: Sequence[ForecastNetwork], weights: Tensor) -> None:
    spec = network.spec
    if not members:
        raise ModelError("an ensemble needs at least one member")
    for member in members:
        sizes = (member.spec.horizon, member.spec.num_variates)
        if sizes != (spec.horizon, spec.num_variates) or member.spec.context_length > spec.context_length:
            raise ModelError(
                f"member '{member.config.model.name}' reads {member.spec.context_length} steps and forecasts "
                f"{sizes[0]} of {sizes[1]} variates; the ensemble has {spec.context_length}, {spec.horizon} and "
                f"{spec.num_variates}"
            )
        for kind in ("known", "past", "static"):
            size = getattr(member.spec, f"num_{kind}")
            if size not in (0, getattr(spec, f"num_{kind}")):
                raise ModelError(f"member '{member.config.model.name}' reads {size} {kind} covariates, not all or none")
        if network.likelihood.has_distribution and member.config.likelihood != network.config.likelihood:
            raise ModelError(
                f"the ensemble has likelihood '{network.config.likelihood.name}', member '{member.config.model.name}' "
                f"'{member.config.likelihood.name}'; use likelihood point for a mixture of several"
            )
    allowed = ((len(members),), (1, spec.horizon), (1, spec.num_variates))
    if weights.ndim != 4 or any(size not in good for size, good in zip(weights.shape[1:], allowed, strict=True)):
        raise ModelError(
            f"weights have shape {tuple(weights.shape)}; they must be (sets, {len(members)}, 1 or {spec.horizon}, "
            f"1 or {spec.num_variates})"
        )
    if not bool((weights >= 0).all()) or not torch.allclose(weights.sum(1), torch.ones(()).to(weights), atol=1e-5):
        raise ModelError("weights must not be negative and must sum to 1 over the members")


def ensemble_spec(members: Sequence[ForecastNetwork], spec: DataSpec) -> DataSpec:
    """Return ``spec`` with the longest look-back of the members and the covariates that any of them reads."""
    return replace(
        spec,
        context_length=max(member.spec.context_length for member in members),
        **{f"num_{kind}": max(getattr(m.spec, f"num_{kind}") for m in members) for kind in ("known", "past", "static")},
    )
