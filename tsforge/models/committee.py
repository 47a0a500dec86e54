"""Committee: several networks of one model, averaged; each from a start of its own, or snapshots of one training.

With ``size`` the members lie side by side in one module. While training, each member takes its own part of every batch,
so that one step costs what a step of a single model on that batch costs, and the loss, being a mean over windows, is
the mean of the members' losses: no gradient of one member reaches another. Each shuffle deals the windows out anew. In
evaluation every member sees every window and their raw outputs are averaged.

What follows from that:

- A member sees 1 / ``size`` of the windows in an epoch. For the training that a single model would have, multiply
  ``train.batch_size`` by ``size`` (members then take batches as large as before) and ``train.max_epochs`` too.
- ``train.gradient_clip`` bounds the norm over all members together; it is the one thing that couples them.
- Early stopping watches the average, not a member, and keeps the weights of one epoch for all.
- Averaged are raw parameters: locations exactly, spreads before their softplus, quantile steps likewise. This is an
  average of quantiles (Vincentization) up to that link, not a mixture of densities, and stays sharp.

With ``snapshots`` one network is trained by a learning rate that falls to zero and starts anew, in ``train.cycles``
equal parts (``train.schedule=cyclic_cosine``). Its weights at the ends of the last ``snapshots`` cycles are the
members; the network itself is the last of them. It takes the very steps that it would take alone. While it is trained,
validation shows the network as it is; the mean of the snapshots is what is stored and graded. They are kept whatever
their validation loss, and nothing stops the training early: patience and stopping hooks are refused.

Source: Hansen, Salamon (1990), IEEE TPAMI 12(10), Sec. II (networks that differ in their start err differently);
Lakshminarayanan, Pritzel, Blundell (2017), Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles,
NeurIPS, Sec. 2.4; Huang, Li, Pleiss, Liu, Hopcroft, Weinberger (2017), Snapshot Ensembles, ICLR, Sec. 3. Deviations:
members see parts of each batch instead of whole epochs, and raw parameters are averaged where both papers average
probabilities; the optimiser is AdamW, whose moments live on from cycle to cycle, where the paper has SGD.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig, Recurrent, State
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, SolveReport, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models.registry import MODELS, register, resolve_model_config

SIZE = 4


class CommitteeConfig(ModelConfig):
    """Which model, and how many of it: ``size`` side by side (the default), or ``snapshots`` of one."""

    name: Literal["committee"] = "committee"
    member: SerializeAsAny[ModelConfig] = Field(default="gru", validate_default=True)
    """Name of a model that is trained by gradient steps, or its settings."""
    size: int | None = Field(None, ge=2)
    """Members, with other initial weights each; default 4."""
    snapshots: int | None = Field(None, ge=1)
    """Instead of ``size``: weights of one network at the ends of its last cycles of the learning rate."""

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if value.get("size") is not None and value.get("snapshots") is not None:
            raise ConfigError("model.size and model.snapshots exclude each other: several networks, or several of one")
        return value if value.get("snapshots") is not None else {**value, "size": value.get("size") or SIZE}

    @property
    def count(self) -> int:
        """Members, of whichever kind."""
        return self.snapshots or self.size or SIZE

    @field_validator("member", mode="before")
    @classmethod
    def _resolve_member(cls, value: Any) -> ModelConfig:
        member = resolve_model_config(value, where="model.member")
        can = MODELS.get(member.name).capabilities_of(member)
        if member.name in ("auto", "committee"):
            raise ConfigError(f"model.member: '{member.name}' is itself made of several models; name one of them")
        if not can.trainable:
            raise ConfigError(
                f"model.member: '{member.name}' has nothing to train, so all members would be alike; choose a model "
                "that takes gradient steps"
            )
        if can.rows_coupled:
            raise ConfigError(
                f"model.member: '{member.name}' couples the series of a batch, which cannot be dealt out to members"
            )
        return member


@register("committee")
class Committee(ForecastModel[CommitteeConfig]):
    """Averages ``size`` members, or ``snapshots`` of one network; see the module for how they are trained."""

    config_class = CommitteeConfig
    capabilities = Capabilities(
        known_covariates=True,
        past_covariates=True,
        static_covariates=True,
        closed_form=True,
        starts_closed=True,
        variate_coupling=True,
        scaling=("global", "series", "window", "window_mean", "last", "none"),
    )
    source = (
        "Hansen, Salamon (1990), IEEE TPAMI 12(10); Lakshminarayanan, Pritzel, Blundell (2017), NeurIPS, Sec. 2.4 "
        "(deep ensembles); Huang et al. (2017), ICLR (snapshot ensembles)"
    )
    test_configs = (
        {"member": {"name": "gru", "d_model": 16, "dropout": 0.0, "normalisation": "none", "skip": "none"}, "size": 2},
        {"member": {"name": "s4", "d_model": 16, "d_state": 16}, "size": 3},
    )

    def __init__(self, config: CommitteeConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        member_class = MODELS.get(config.member.name)
        if config.snapshots is None:
            self.members = nn.ModuleList(member_class(config.member, spec) for _ in range(config.count))
        else:
            trained = member_class(config.member, spec)
            taken = [deepcopy(trained).requires_grad_(False) for _ in range(config.snapshots - 1)]
            self.members = nn.ModuleList([*taken, trained])
        self._alone = False

    @classmethod
    def capabilities_of(cls, config: CommitteeConfig) -> Capabilities:
        """Return what the members can do."""
        return MODELS.get(config.member.name).capabilities_of(config.member)

    @property
    def _each(self) -> list[ForecastModel[Any]]:
        return [member for member in self.members if isinstance(member, ForecastModel)]

    @property
    def snapshots(self) -> int | None:
        """How many snapshots training has to take; None for members side by side."""
        return self.config.snapshots

    def train_alone(self, alone: bool) -> None:
        """Let the network that is trained forecast alone (during training), or the mean of its snapshots (after it)."""
        self._alone = alone

    def take_snapshot(self, index: int) -> None:
        """Keep the weights and buffers of the trained network as snapshot ``index`` (from 0; the last is itself)."""
        if index < len(self.members) - 1:
            self.members[index].load_state_dict(self.members[-1].state_dict())

    def forward(self, batch: Batch) -> Prediction:
        """Return the members' mean; while training, of each window what its own member forecasts."""
        count = len(self.members)
        if self.config.snapshots is not None and (self.training or self._alone):
            found: Prediction = self._each[-1](batch)
            return found
        if not self.training:
            return _joined([member(batch) for member in self._each], [1.0 / count] * count)
        rows = len(batch.context)
        parts, owners, shares = [], [], []
        for index, member in enumerate(self._each[:rows]):  # a last batch may hold fewer windows than there are members
            mine = torch.arange(index, rows, count, device=batch.context.device)
            parts.append(member(Batch._make(None if part is None else part[mine] for part in batch)))
            owners.append(mine)
            shares.append(len(mine) / rows)
        place = torch.cat(owners).argsort()
        context = [part.context_raw for part in parts if part.context_raw is not None]
        if len(context) not in (0, len(parts)):
            raise ModelError(f"only {len(context)} of {len(parts)} members of the committee fill context_raw")
        return Prediction(
            torch.cat([part.raw for part in parts])[place],
            torch.cat(context)[place] if context else None,
            _mean_losses(parts, shares),
            parts[0].context_weight,
        )

    def prepare(self, data: TrainingSeries) -> None:
        """Show every member the training span."""
        for member in self._each:
            member.prepare(data)

    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Let every member set its start from the training span.

        Raises:
            ModelError: these settings leave nothing to train, so that all members would be alike.
        """
        if self.config.snapshots is None:
            reports = [member.solve(data) for member in self._each]
        else:  # they are alike until the first is taken
            reports = [self._each[-1].solve(data)]
            for index in range(len(self.members) - 1):
                self.take_snapshot(index)
        if reports[0] is not None and reports[0].finished:
            raise ModelError(
                f"model.member '{self.config.member.name}' is finished by its closed form with these settings: "
                f"{self.config.count} members would be alike; fit it alone"
            )
        return reports[0]

    def anneal(self, progress: float) -> None:
        """Pass the progress of training on; snapshots that were taken stay as they are."""
        for member in self._each if self.config.snapshots is None else self._each[-1:]:
            member.anneal(progress)

    def settle(self, batches: Iterable[Batch]) -> None:
        """Let every member that wants to choose from held-out windows."""
        if type(self._each[0]).settle is ForecastModel.settle:
            return
        held = list(batches)
        for member in self._each:
            member.settle(held)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean of the members' parts."""
        found = [member.components(batch) for member in self._each]
        return {name: torch.stack([parts[name] for parts in found]).mean(0) for name in found[0]}

    def contributions(self, batch: Batch) -> Tensor | None:
        """Return the mean of the members' contributions, None where they have none."""
        return _mean([member.contributions(batch) for member in self._each])

    def attention(self, batch: Batch) -> Tensor | None:
        """Return the mean of the members' attention, None where they have none."""
        return _mean([member.attention(batch) for member in self._each])

    def explain(self) -> dict[str, Any]:
        """Return what the members say of themselves, with the number of the ``member`` in each record."""
        found: dict[str, list[dict[str, Any]]] = {}
        for index, member in enumerate(self._each):
            for name, records in member.explain().items():
                found.setdefault(name, []).extend({"member": index, **record} for record in records)
        return found

    @property
    def recurrent(self) -> bool:
        """True when the members can be carried forward."""
        return self._each[0].recurrent

    @property
    def normalises(self) -> bool:
        """True when the members take statistics of their own from each context."""
        return bool(getattr(self._each[0], "normalises", False))

    @property
    def _carried(self) -> list[Recurrent]:
        return [member for member in self._each if isinstance(member, Recurrent)]

    def _need_recurrent(self) -> list[Recurrent]:
        if not self.recurrent:
            raise ModelError(f"members '{self.config.member.name}' cannot be carried forward with these settings")
        return self._carried

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the states of all members before any observation."""
        return _packed([member.initial_state(batch_size, static) for member in self._need_recurrent()])

    def warm_up(self, batch: Batch) -> State:
        """Return the states of all members after the context of a batch."""
        return _packed([member.warm_up(batch) for member in self._need_recurrent()])

    def step(self, state: State, row: Observation) -> State:
        """Return the states after one more row."""
        members = self._need_recurrent()
        return _packed([member.step(_unpacked(state, index), row) for index, member in enumerate(members)])

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the mean forecast of the horizon after the last row."""
        members = self._need_recurrent()
        found = [member.free_run(_unpacked(state, index), known) for index, member in enumerate(members)]
        return _joined(found, [1.0 / len(found)] * len(found))


def _joined(parts: Sequence[Prediction], shares: Sequence[float]) -> Prediction:
    """Return the mean of predictions of the same windows."""
    raw, context = _mean([part.raw for part in parts]), _mean([part.context_raw for part in parts])
    assert raw is not None  # every prediction has raw parameters
    return Prediction(raw, context, _mean_losses(parts, shares), parts[0].context_weight)


def _mean(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.stack(found).mean(0) if found else None


def _mean_losses(parts: Sequence[Prediction], shares: Sequence[float]) -> dict[str, Tensor] | None:
    """Return the extra losses of the members, weighted by their share of the windows."""
    found: dict[str, Tensor] = {}
    for part, share in zip(parts, shares, strict=True):
        for name, loss in (part.aux_losses or {}).items():
            found[name] = found[name] + share * loss if name in found else share * loss
    return found or None


def _packed(states: Sequence[State]) -> State:
    return {f"{index}.{name}": value for index, state in enumerate(states) for name, value in state.items()}


def _unpacked(state: State, index: int) -> State:
    prefix = f"{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
