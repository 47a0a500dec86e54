"""Models that are broken on purpose, one for each way a check must catch, and the honest one they derive from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, SolveReport, TrainingSeries


class SaboteurConfig(ModelConfig):
    """Settings shared by the honest model and its broken versions."""

    name: Literal["saboteur"] = "saboteur"
    hidden: int = 24


class Honest(ForecastModel[SaboteurConfig]):
    """A small network over context, mask and every kind of covariate; holds every check."""

    config_class: ClassVar[type[ModelConfig]] = SaboteurConfig
    capabilities = Capabilities(known_covariates=True, past_covariates=True, static_covariates=True)
    source = "Nobody (2026), made for these tests"

    def __init__(self, config: SaboteurConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        inputs = 2 * spec.context_length + spec.context_length * spec.num_past + spec.num_static
        inputs += (spec.context_length + spec.horizon) * spec.num_known
        self.first = nn.Linear(inputs, config.hidden)
        self.second = nn.Linear(config.hidden, spec.horizon * spec.num_params)
        self.direct = nn.Linear(spec.context_length, spec.horizon * spec.num_params)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("strength", torch.zeros(()))

    def features(self, batch: Batch) -> Tensor:
        """Return [B, V, inputs]."""
        rows = [batch.context.transpose(1, 2), batch.context_mask.transpose(1, 2).to(batch.context.dtype)]
        for part in (batch.past, batch.known, batch.static):
            if part is not None:
                rows.append(part.flatten(1).unsqueeze(1).expand(-1, self.spec.num_variates, -1))
        return torch.cat(rows, dim=-1)

    def raw(self, batch: Batch) -> Tensor:
        """Return [B, H, V, K]."""
        out = self.second(torch.tanh(self.first(self.features(batch)))) + self.direct(batch.context.transpose(1, 2))
        return out.unflatten(-1, (self.spec.horizon, self.spec.num_params)).transpose(1, 2)

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.raw(batch))

    def prepare(self, data: TrainingSeries) -> None:
        self.seen.fill_(len(data.values))

    def anneal(self, progress: float) -> None:
        self.strength.fill_(progress)


class StatefulConfig(SaboteurConfig):
    """A config that changes when it is read back."""

    hidden: int = 24

    def model_post_init(self, context: Any, /) -> None:
        if "hidden" in self.model_fields_set:
            object.__setattr__(self, "hidden", self.hidden + 1)


class ForgetfulConfig(Honest):
    """check_config: its config does not round-trip."""

    config_class = StatefulConfig


class LooseConfig(ModelConfig, extra="allow"):
    """Takes any key."""

    name: Literal["saboteur"] = "saboteur"
    hidden: int = 24


class AcceptsAnything(Honest):
    """check_config: a typing mistake in a setting goes unnoticed."""

    config_class = LooseConfig


class FlatOutput(Honest):
    """check_shapes: drops the parameter axis for one parameter."""

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw.squeeze(-1) if raw.shape[-1] == 1 else raw)


class BlindDivision(Honest):
    """check_shapes: divides by the number of observed cells, which may be 0."""

    def forward(self, batch: Batch) -> Prediction:
        mean = batch.context.sum(1, keepdim=True) / batch.context_mask.sum(1, keepdim=True)
        return Prediction(self.raw(batch) + mean.unsqueeze(-1))


class Peeks(Honest):
    """check_target_unused: reads the target when there is one."""

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw if batch.target is None else raw + 0.01 * batch.target.unsqueeze(-1))


class BatchMean(Honest):
    """check_rows: centres over the batch."""

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw - raw.mean(0, keepdim=True))


class FirstRow(Honest):
    """check_rows: declares coupled rows, but the first one is special."""

    capabilities = Capabilities(known_covariates=True, past_covariates=True, static_covariates=True, rows_coupled=True)

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw + raw[:1])


class SolvesOnGaps(Honest):
    """check_mask: its closed form forgets the mask, and what lies under it is not wiped."""

    capabilities = Capabilities(
        known_covariates=True, past_covariates=True, static_covariates=True, closed_form=True, scaling=("none",)
    )

    def solve(self, data: TrainingSeries) -> SolveReport:
        leaked = SolvesOnGaps.unmasked
        with torch.no_grad():
            self.second.bias.fill_(float(leaked.values[~leaked.mask].nan_to_num(3.0).mean()) * 1e-3)
        return SolveReport(finished=True, method="leak")

    unmasked: ClassVar[TrainingSeries]


class IgnoresCovariates(Honest):
    """check_covariates: declares covariates, but uses none."""

    def features(self, batch: Batch) -> Tensor:
        empty = batch._replace(
            past=None if batch.past is None else batch.past * 0,
            known=None if batch.known is None else batch.known * 0,
            static=None if batch.static is None else batch.static * 0,
        )
        return super().features(empty)


class IgnoresOneCovariate(Honest):
    """check_covariates: reads only the first of two known covariates."""

    def features(self, batch: Batch) -> Tensor:
        if batch.known is None or batch.known.shape[-1] < 2:
            return super().features(batch)
        known = torch.cat([batch.known[..., :1], batch.known[..., 1:].detach() * 0], dim=-1)
        return super().features(batch._replace(known=known))


class DeadWeight(Honest):
    """check_gradients: a parameter that takes no part."""

    def __init__(self, config: SaboteurConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.unused = nn.Parameter(torch.zeros(3))


class InfiniteGradient(Honest):
    """check_gradients: a square root at exactly zero."""

    def __init__(self, config: SaboteurConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.raw(batch) + torch.sqrt((self.gate - self.gate.detach()).abs()))


class SaysUntrainable(Honest):
    """check_gradients: declares itself untrainable and has parameters."""

    capabilities = Capabilities(known_covariates=True, past_covariates=True, static_covariates=True, trainable=False)


class CutGraph(Honest):
    """check_overfit: only the last bias learns."""

    def forward(self, batch: Batch) -> Prediction:
        out = self.raw(batch).detach() * 0
        bias = self.second.bias.unflatten(0, (self.spec.horizon, 1, self.spec.num_params))
        return Prediction(out + bias)


class CutInputs(Honest):
    """check_explained: half of the forecast does not follow from its inputs by any slope."""

    def forward(self, batch: Batch) -> Prediction:
        out = self.raw(batch)
        return Prediction((out + out.detach()) / 2)


class OwnSeed(Honest):
    """check_seeds: starts from the same weights whatever the seed."""

    def __init__(self, config: SaboteurConfig, spec: DataSpec) -> None:
        torch.manual_seed(0)
        super().__init__(config, spec)


class Clockwork(Honest):
    """check_seeds: starts somewhere else each time."""

    count: ClassVar[Iterator[int]] = iter(range(10**9))

    def __init__(self, config: SaboteurConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        with torch.no_grad():
            self.first.bias.add_(next(Clockwork.count) * 1e-3)


class HiddenState(Honest):
    """check_artifact: keeps a fitted number where the weights do not carry it."""

    level = 0.0

    def forward(self, batch: Batch) -> Prediction:
        if self.training:
            self.level = float(batch.context.detach().abs().mean())
        return Prediction(self.raw(batch) + self.level)


class AlwaysSingle(Honest):
    """check_dtypes: computes in float32 whatever comes in."""

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.raw(batch).float())


class RoundsOff(Honest):
    """check_dtypes: loses precision on the way, in float32 only."""

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw if raw.dtype == torch.float64 else raw.bfloat16().float())


class WrongStep(Honest):
    """check_recurrent: its step keeps a row less than ``forward`` reads."""

    capabilities = Capabilities()
    forgets: ClassVar[int] = 1

    @property
    def recurrent(self) -> bool:
        return True

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> dict[str, Tensor]:
        shape = (batch_size, self.spec.context_length, self.spec.num_variates)
        return {"context": torch.zeros(shape), "mask": torch.zeros(shape, dtype=torch.bool)}

    def warm_up(self, batch: Batch) -> dict[str, Tensor]:
        return {"context": batch.context, "mask": batch.context_mask}

    def step(self, state: dict[str, Tensor], row: Observation) -> dict[str, Tensor]:
        context = torch.cat([state["context"][:, 1:], row.values.unsqueeze(1)], dim=1)
        mask = torch.cat([state["mask"][:, 1:], row.mask.unsqueeze(1)], dim=1)
        context[:, : self.forgets] = 0
        return {"context": context, "mask": mask}

    def free_run(self, state: dict[str, Tensor], known: Tensor | None = None) -> Prediction:
        return Prediction(self.raw(Batch(state["context"], state["mask"])))


class WrongWarmUp(WrongStep):
    """check_recurrent: warms up from a context shifted by a row."""

    def warm_up(self, batch: Batch) -> dict[str, Tensor]:
        return {"context": batch.context.roll(1, 1), "mask": batch.context_mask}


class FixedLevel(Honest):
    """check_units: refuses to follow a change of units because it scales by itself with a constant."""

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.raw(batch))

    def solve(self, data: TrainingSeries) -> SolveReport:
        with torch.no_grad():
            self.second.bias.fill_(float(FixedLevel.raw_level))
        return SolveReport(finished=True, method="constant")

    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        closed_form=True,
        scaling=("global", "series"),
    )
    raw_level: ClassVar[float] = 0.0


class PartsMissing(Honest):
    """check_units: components that do not sum to the forecast."""

    def components(self, batch: Batch) -> dict[str, Tensor]:
        return {"half": self.raw(batch)[..., 0] / 2}


class CountsTwice(Honest):
    """check_hooks: preparing adds up over calls."""

    def prepare(self, data: TrainingSeries) -> None:
        self.seen.add_(len(data.values))


class AnnealsWeights(Honest):
    """check_hooks: its schedule shrinks weights."""

    def anneal(self, progress: float) -> None:
        with torch.no_grad():
            self.first.weight.mul_(1 - 0.1 * progress)


class UndeclaredContext(Honest):
    """check_context_outputs: rebuilds the context without saying so."""

    def forward(self, batch: Batch) -> Prediction:
        raw = self.raw(batch)
        return Prediction(raw, context_raw=batch.context.unsqueeze(-1).expand(-1, -1, -1, raw.shape[-1]))


class LongContext(UndeclaredContext):
    """check_context_outputs: declares it, but returns more steps than the context has."""

    capabilities = Capabilities(
        known_covariates=True, past_covariates=True, static_covariates=True, context_outputs=True
    )

    def forward(self, batch: Batch) -> Prediction:
        found = super().forward(batch)
        assert found.context_raw is not None
        return found._replace(context_raw=torch.cat([found.context_raw, found.raw], dim=1))


class LastValueOnly(Honest):
    """check_skill: learns, but only a constant per step."""

    def forward(self, batch: Batch) -> Prediction:
        return Prediction(self.raw(batch) * 1e-6 + batch.context[:, -1:].unsqueeze(-1))


class NoPaper(Honest):
    """check_source: does not say where it comes from."""

    source = "somewhere"
