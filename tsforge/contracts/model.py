"""The one contract a model obeys: a frozen config, and a module whose ``forward(batch)`` returns raw parameters.

No optimiser, loss, batch size, device, logger, scaler or data path lives in a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor, nn

from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction, SolveReport, TrainingSeries
from tsforge.core.config import Config

ScalingKind = Literal["none", "global", "series", "series_max", "window", "window_mean", "last"]


class ModelConfig(Config):
    """Base of model configs; a subclass fixes ``name: Literal["..."]`` with the same default."""

    name: str


C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a model can take and give; anything undeclared is refused before training, never ignored.

    Attributes:
        known_covariates, past_covariates, static_covariates: may appear in a batch.
        context_outputs: fills ``Prediction.context_raw``.
        rows_coupled: rows of a batch influence each other (then aligned windows are fed, and the model must be
            equivariant to permuting rows).
        absolute_time: reads ``Batch.cutoff_index``.
        closed_form: ``solve`` can finish the fit without gradient steps (for at least one setting), or start it.
        starts_closed: what ``solve`` finds is a start at most; gradient steps follow.
        trainable: has parameters that gradient steps improve.
        variate_coupling: a forecast of one variate may depend on the context of another.
        scaling: scalings allowed, the first is the default used for ``scaling.kind: auto``.
        teacher_forced: sees the target while it is trained, and never otherwise.
        own_units: anchors each window itself: ``auto`` never means ``series`` for it.
        probabilistic: honours num_params > 1 by itself; False means only the location is modelled and the
            remaining parameters stay at the constants the network sets from residuals.
    """

    known_covariates: bool = False
    past_covariates: bool = False
    static_covariates: bool = False
    context_outputs: bool = False
    rows_coupled: bool = False
    absolute_time: bool = False
    closed_form: bool = False
    starts_closed: bool = False
    trainable: bool = True
    variate_coupling: bool = False
    teacher_forced: bool = False
    scaling: tuple[ScalingKind, ...] = ("global", "series", "window", "window_mean", "last", "none")
    own_units: bool = False
    probabilistic: bool = True


@dataclass(frozen=True, kw_only=True)
class OptimRule:
    """How the optimiser treats a parameter; ``optim_rules`` of any submodule maps its parameters' names to rules.

    Attributes:
        max_learning_rate: cap of the learning rate, None = that of the run.
        weight_decay: None = that of the run.
    """

    max_learning_rate: float | None = None
    weight_decay: float | None = None


class ForecastModel(nn.Module, Generic[C]):
    """Base of every model. Class attributes ``config_class``, ``capabilities``, ``source`` (paper or definition) and
    ``test_configs`` (what the conformance suite instantiates) are set by the subclass; ``config_class`` is a
    ``ModelConfig`` whose ``name`` equals the module's file name. ``long_tables`` names lists of ``explain`` that an
    artifact keeps as Parquet: cells of matrices, whose ``row`` and ``column`` are numbers of variates.
    """

    config_class: ClassVar[type[ModelConfig]]
    capabilities: ClassVar[Capabilities] = Capabilities()
    source: ClassVar[str] = ""
    test_configs: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    long_tables: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: C, spec: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    @property
    def recurrent(self) -> bool:
        """True when this configuration obeys ``Recurrent``: it can be carried forward one observation at a time."""
        return False

    def forward(self, batch: Batch) -> Prediction:
        """Return raw parameters [B, H, V, K] in scaled units; must not read ``batch.target`` (``teacher_forced``: may
        while training)."""
        raise NotImplementedError

    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Fit in closed form, or set a warm start, from the whole scaled training span; None = nothing to solve."""
        return None

    @classmethod
    def capabilities_of(cls, config: C) -> Capabilities:
        """Return what the model can do with these settings: ``capabilities``, unless they take something away."""
        return cls.capabilities

    def prepare(self, data: TrainingSeries) -> None:
        """See the whole training span in data units once, before ``solve`` (idempotent); for example to count a graph.

        Cells that are not observed hold anything and must not matter.
        """

    def anneal(self, progress: float) -> None:
        """Called before each step with progress in [0, 1]; changes schedules kept in buffers, never weights."""

    def settle(self, batches: Iterable[Batch]) -> None:
        """Choose what is best chosen on trained weights, from scaled windows with targets: those of the validation
        span, or of training without one. Called once, after gradient steps, with the weights that are kept."""

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return additive parts of the location forecast, name -> [B, H, V] in scaled units; empty if none."""
        return {}

    def contributions(self, batch: Batch) -> Tensor | None:
        """Return what each variate gives to the component ``network`` of every variate, [B, H, V, V'] in scaled units;
        the last axis, the giver, sums to that component. None where nothing of the kind is defined."""
        return None

    def attention(self, batch: Batch) -> Tensor | None:
        """Return [B, V, V']: the share of variate v' in what the model attends to for variate v, or None."""
        return None

    def explain(self) -> dict[str, Any]:
        """Return fitted quantities worth showing (coefficients, roots): name -> list of plain records."""
        return {}


State: TypeAlias = dict[
    str, Tensor
]  # plain tensors, series along the first axis: stored, split and stacked as they are


@runtime_checkable
class Recurrent(Protocol):
    """A model that can be carried forward one observation at a time, with constant memory and time a step.

    Everything is in scaled units. Whether a configuration can do it says ``ForecastModel.recurrent``; where it cannot,
    every method raises ``ModelError`` with the setting in the way. Carrying the state over L rows from
    ``initial_state`` and forecasting equals ``forward`` on these rows wherever the model's own normalisation is fixed;
    ``warm_up`` equals it always.
    """

    def initial_state(self, batch_size: int, static: Tensor | None = None) -> State:
        """Return the state of ``batch_size`` series before any observation, given their static covariates [B, S]; the
        model's own normalisation, if any, is the identity."""
        ...

    def warm_up(self, batch: Batch) -> State:
        """Return the state after the context of a batch, with the model's own normalisation fixed by it from now on."""
        ...

    def step(self, state: State, row: Observation) -> State:
        """Return the state after one more row."""
        ...

    def free_run(self, state: State, known: Tensor | None = None) -> Prediction:
        """Return the forecast [B, H, V, K] of the H steps after the last row; known covariates of them [B, H, F]."""
        ...
