"""What forecasters share that add a network to a linear map: own normalisation, the map itself, how both compose.

y[t + h] = linear(context)[h] + scale * network(normalised context)[h]. The linear map is model ``linear``, solved in
closed form before the first gradient step, so that training starts at that baseline.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from tsforge.contracts.model import ForecastModel, ModelConfig, State
from tsforge.contracts.tensors import Batch, SolveReport, TrainingSeries
from tsforge.core.errors import ConfigError, ModelError
from tsforge.models._window_statistics import Normalisation, window_statistics
from tsforge.models.linear import Linear, LinearConfig


class ResidualConfig(ModelConfig):
    """Settings of the normalisation and of the linear map."""

    normalisation: Normalisation = "window"
    """Mean and deviation of the observed context, its last value, or only the scaling of the training span."""
    skip: Literal["auto", "closed_form", "learned", "none"] = "auto"
    """The linear map beside the network: solved before training and kept, trained with the rest, or absent. ``auto``:
    closed form, absent where the network rolls out its own forecasts (head ``rollout``)."""
    ridge: float | None = Field(default=None, ge=0.0)
    """Penalty of the closed form, see model ``linear``; null chooses penalty, level and sharing among
    variates by blocked cross-validation."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse a penalty without a closed form."""
        if self.skip in ("learned", "none") and self.ridge is not None:
            raise ConfigError(f"model.ridge has no effect with skip '{self.skip}'")


C = TypeVar("C", bound=ResidualConfig)


class ResidualForecaster(ForecastModel[C]):
    """Base of forecasters beside a linear map; a subclass sets ``skip`` and adds its network.

    Attributes:
        skip: the linear map, or None.
        patch: steps read as one input.
        part_name: what the network adds, as named in ``components``.
    """

    skip: Linear | None
    patch: int
    part_name = "network"

    def make_skip(self, auto: Literal["closed_form", "none"] = "closed_form") -> Linear | None:
        """Return the linear map that the settings ask for; ``auto`` says what they mean by auto."""
        kind = auto if self.config.skip == "auto" else self.config.skip
        if kind == "none":
            return None
        if kind == "learned":
            return Linear(LinearConfig(solver="sgd"), self.spec)
        config = LinearConfig(ridge=self.config.ridge)
        if config.ridge is None:
            config = LinearConfig(ridge=None, remove="auto", weights="auto")
        skip = Linear(config, self.spec)
        skip.weight.requires_grad_(False)
        return skip

    @property
    def recurrent(self) -> bool:
        """True without patches."""
        return self.patch == 1

    def _need_recurrent(self) -> None:
        if not self.recurrent:
            raise ModelError(
                f"patches of {self.patch} steps cannot be carried forward step by step; fit with model.patch_length=1, "
                "or stream in window mode"
            )

    def _first_memories(self, batch_size: int, like: Tensor, static: Tensor | None) -> State:
        """Return what a state holds beside that of the network, before any observation."""
        variates = self.spec.num_variates
        found: State = {
            "loc": like.new_zeros(batch_size, 1, variates),
            "scale": like.new_ones(batch_size, 1, variates),
        }
        if self.skip is not None:
            shape = (batch_size, self.spec.context_length, variates)
            found["context"] = like.new_zeros(shape)
            found["context_mask"] = torch.zeros(shape, dtype=torch.bool, device=like.device)
        if self.spec.num_static:
            found["static"] = like.new_zeros(batch_size, self.spec.num_static) if static is None else static
        return found

    @property
    def normalises(self) -> bool:
        """True when the model takes statistics of its own from each context."""
        return self.config.normalisation != "none"

    def _statistics(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return location and scale [B, 1, V] of each context; 0 and 1 without normalisation or observation."""
        return window_statistics(batch, self.config.normalisation)

    def _compose(self, residual: Tensor, loc: Tensor, scale: Tensor, skip: Tensor | None) -> Tensor:
        """Return raw parameters in scaled units from residuals in normalised units and the linear part."""
        location = residual[..., :1] * scale.unsqueeze(-1)
        if skip is None:
            return torch.cat([location + loc.unsqueeze(-1), residual[..., 1:]], dim=-1)
        return skip + torch.cat([location, residual[..., 1:]], dim=-1)

    def _linear(self, batch: Batch) -> Tensor | None:
        """Return what the linear map alone forecasts [B, H, V, K]."""
        if self.skip is None:
            return None
        return self.skip(Batch(batch.context, batch.context_mask)).raw  # type: ignore[no-any-return]

    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Set the linear map from the training span; a start for training, not the end of it."""
        if self.skip is None:
            return None
        learned = self.config.skip == "learned"  # starts from weights of its own, by the seed: nothing to share
        report = self.skip.solve(data) if learned else _solve_once(self.skip, data)
        if report is None:
            return None
        return SolveReport(
            finished=False, method=report.method, residual_scale=report.residual_scale, details=report.details
        )

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the linear map and what the network adds, each [B, H, V]."""
        if self.skip is None:
            return {}
        parts = self.skip.components(Batch(batch.context, batch.context_mask))
        whole = self.forward(batch).raw[..., 0]
        return {**parts, self.part_name: whole - torch.stack(list(parts.values())).sum(0)}


class _Solved(NamedTuple):
    state: dict[str, Tensor]
    report: SolveReport | None


_solved: OrderedDict[str, _Solved] = OrderedDict()
_MOST_SOLVED = 4  # maps of 720 by 720 steps and 7 variates take 15 MB each


def _solve_once(skip: Linear, data: TrainingSeries) -> SolveReport | None:
    """Solve a linear map, or take over what the same map had from the same data: seeds and trials share it."""
    digest = hashlib.sha256(repr((skip.config, skip.spec)).encode())
    for part in (data.values, data.mask, data.indptr):
        digest.update(repr((part.dtype, tuple(part.shape))).encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    key = digest.hexdigest()
    found = _solved.pop(key, None)
    if found is None:
        report = skip.solve(data)
        found = _Solved({name: part.detach().cpu().clone() for name, part in skip.state_dict().items()}, report)
    else:
        skip.load_state_dict(found.state)
    _solved[key] = found
    while len(_solved) > _MOST_SOLVED:
        _solved.popitem(last=False)
    return found.report
