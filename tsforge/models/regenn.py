"""ReGENN: a recurrent network between two layers of graph soft evolution, for panels of multivariate series.

Spadon, Hong, Brandoli, Matwin, Rodrigues-Jr, Sun (2022), Pay Attention to Evolution: Time Series Forecasting with Deep
Graph-Evolution Learning, IEEE TPAMI 44(9), arXiv 2008.12833. The full text could not be had: layers and order follow
from the behaviour of the authors' released network, and tables of the paper are no target.

    o = GSE_source(x, G)    mixes variates by weights that a counted graph G gives, then times among themselves
    t = gate(encoder(o))    attention, then a recurrent net whose steps are the variates: L inputs, H outputs
    v = sequencer(t) + t    recurrent net along the horizon
    y = phi(g GSE_target(v, A') + AR(x))    A' is the graph that the source layer evolved, without its gradient

Deviations, each with its reason.
- Every window is anchored (``normalisation``): its last value is subtracted and its mean absolute step divides it. The
  released scaling divides by maxima over all time and so leaks the future; ``none`` with scaling ``series_max`` is its
  form without the leak.
- ``AR`` starts as the drift of the window and the network behind a factor g = 0 (``ar_init``, ``network_gate``): a
  panel then starts from the drift, which random weights do not reach.
- The graph layers start as the identity (``evolution_init``): the fit then begins at the model without its graph and
  learns what to mix; random weights hide the variates from each other's own past first.
- Attention runs among variates (``attend``). The released one runs among the entities that happen to share a batch;
  ``entities`` is that with all entities of one cutoff, and entities without an observation are not attended to.
- The graph is counted before training (layers/regenn.py), each row once (``count``), from observed cells
  (``presence``); it is a buffer, so nothing is counted again on resumption.
- In evaluation the target layer uses the present A', not that of the last training step.
- Gaps are filled with the last value before them, and the network is told where (``mask_channel``).
- Encoder and LSTMs run in one compiled kernel where there is one (ops/encoder_lstm.py): the same function, but dropout
  keeps other cells than torch's would.
- The output is not clipped at 0 (``output_activation``), and the feed-forward part of the encoder is 128 wide, not
  2048: times are few. One variate has no graph and goes without the evolution layers.

Legend: B batch, L context, H horizon, V variates.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries, is_known_complete
from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError, ModelError
from tsforge.core.logs import get_logger
from tsforge.layers.recurrent import run_torch_cell
from tsforge.layers.regenn import Activation, GraphEvolution, Start
from tsforge.models._ar_windows import residual_scale
from tsforge.models._regenn_explain import evolution_matrices, evolution_records, kernel_records
from tsforge.models._regenn_fit import count_graph, drift_weights, least_squares_weights
from tsforge.models.registry import register
from tsforge.ops.encoder_lstm import encoder_lstm, encoder_weights, lstm_weights, unavailable

_LOG = get_logger(__name__)
_FLOOR = 1e-6  # least size of a window's step, in deviations of the training span
_RNN: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_KEEPS_ZERO = ("none", "series_max")
_MOST_LOG = 80.0  # expm1 stays finite in float32
_NETWORK = (  # settings of the network alone
    *("gate", "bidirectional_gate", "sequencer", "bidirectional_sequencer", "encoder", "d_model", "ff_dim", "attend"),
    *("ablate_gse", "dropout", "mask_channel", "network_gate"),
)


class ReGENNConfig(ModelConfig):
    """Settings of ReGENN; ``configs/experiment/regenn_faithful.yaml`` sets them to the released behaviour."""

    name: Literal["regenn"] = "regenn"
    gate: Literal["lstm", "gru", "rnn"] = tunable("lstm", choices=["lstm", "gru", "rnn"])
    """Recurrent net that turns L past into H future steps; it runs along the variates, so their order matters."""
    bidirectional_gate: bool = False
    sequencer: Literal["lstm", "gru", "rnn", "none"] = tunable("lstm", choices=["lstm", "gru", "none"])
    """Recurrent net along the horizon."""
    bidirectional_sequencer: bool = False
    encoder: bool = True
    """A transformer encoder layer before the gate."""
    d_model: int | None = Field(default=None, ge=1)
    """Width of encoder and gate input; default L, larger L is projected onto it."""
    ff_dim: int = tunable(128, choices=[32, 128, 512], ge=1)
    """Width of the feed-forward part of the encoder."""
    attend: Literal["variables", "entities"] = "variables"
    """What the encoder attends to; ``entities`` couples the series of a cutoff and forecasts them together."""
    paths: Literal["both", "network", "autoregression"] = "both"
    """The sum of network and autoregression, or one of them."""
    ablate_gse: bool = False
    """Leave both graph layers out."""
    bias: bool = True
    """Biases of the graph layers and of the autoregression."""
    evolution_activation: Activation = "none"
    evolution_init: Start = "identity"
    """Graph layers at the start: they change nothing, or mix at random."""
    output_activation: Literal["identity", "relu"] = "identity"
    """``relu`` for counts: no forecast below 0."""
    dropout: float = tunable(0.1, low=0.0, high=0.4, ge=0.0, lt=1.0)
    graph: Literal["counted", "preset", "identity"] = "counted"
    """Counted in the training span, given by ``graph_matrix``, or none."""
    graph_matrix: tuple[tuple[float, ...], ...] | None = None
    """Rows of the preset graph, in the order of the variates."""
    presence: Literal["observed", "positive"] = "observed"
    """When a variate counts as present: wherever it is observed, or where it is above 0."""
    count: Literal["steps", "windows"] = "steps"
    """Count a row once, or once for each training window that shows it."""
    normalisation: Literal["anchor", "log1p", "none"] = tunable("anchor", choices=["anchor", "none"])
    """Of each window: distance from its last value in mean absolute steps; log1p over its largest training value;
    or only the scaling of the run."""
    mask_channel: bool = True
    """Tell the network which cells of a window were missing."""
    ar_init: Literal["drift", "ols", "xavier"] = "drift"
    """Autoregression at the start: drift of the window, least squares, or random."""
    network_gate: float | None = 0.0
    """Start of the trained factor of the network's part; null = no factor."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that contradict each other or have no effect."""
        if (self.graph_matrix is not None) != (self.graph == "preset"):
            raise ConfigError("model.graph_matrix must be given for graph 'preset' and only there")
        fields = type(self).model_fields
        idle: list[tuple[bool, str, tuple[str, ...]]] = [
            (
                self.paths == "autoregression",
                "paths 'autoregression'",
                _NETWORK,
            ),
            (
                self.paths == "autoregression" or self.ablate_gse,
                "no graph layer",
                ("evolution_activation", "evolution_init", "graph", "graph_matrix", "presence", "count"),
            ),
            (self.paths == "network", "paths 'network'", ("ar_init",)),
            (not self.encoder, "encoder false", ("ff_dim", "attend")),
            (self.sequencer == "none", "sequencer 'none'", ("bidirectional_sequencer",)),
            (self.graph != "counted", f"graph '{self.graph}'", ("presence", "count")),
        ]
        for applies, where, names in idle:
            for name in names:
                if applies and getattr(self, name) != fields[name].default:
                    raise ConfigError(f"model.{name} has no effect with {where}")
        if self.normalisation == "log1p" and self.paths != "network" and self.ar_init == "drift":
            raise ConfigError("model.ar_init: the drift of logarithms is no drift; use ols or xavier with log1p")


class _Normalised(NamedTuple):
    """Rows x [B, L, V] in the model's own units without gaps; y = loc + scale * (own units), each [B, 1, V]."""

    x: Tensor
    loc: Tensor
    scale: Tensor


@register("regenn")
class ReGENN(ForecastModel[ReGENNConfig]):
    """Graph soft evolution around recurrent nets, beside an autoregression that all variates share."""

    config_class = ReGENNConfig
    capabilities = Capabilities(
        closed_form=True,
        starts_closed=True,
        variate_coupling=True,
        probabilistic=False,
        scaling=("global", "series", "series_max", "none"),
        own_units=True,
    )
    source = (
        "Spadon et al. (2022), Pay Attention to Evolution: Time Series Forecasting with Deep Graph-Evolution Learning, "
        "IEEE TPAMI 44(9), arXiv 2008.12833"
    )
    test_configs = (
        {"dropout": 0.0, "ff_dim": 16},
        {"dropout": 0.0, "gate": "gru", "sequencer": "gru", "bidirectional_gate": True, "ar_init": "ols"}
        | {"bidirectional_sequencer": True, "ff_dim": 16, "d_model": 6, "evolution_activation": "tanh"},
        {"dropout": 0.0, "normalisation": "none", "ar_init": "xavier", "network_gate": None, "ff_dim": 16}
        | {"sequencer": "none", "gate": "rnn", "count": "windows", "evolution_init": "xavier"},
        {"dropout": 0.0, "attend": "entities", "ff_dim": 16, "graph": "identity", "mask_channel": False},
        {"paths": "autoregression"},
        {"dropout": 0.0, "ablate_gse": True, "encoder": False},
    )
    long_tables = ("evolution",)
    graph: Tensor
    floor: Tensor
    log_peak: Tensor

    @classmethod
    def capabilities_of(cls, config: ReGENNConfig) -> Capabilities:
        """Return what these settings leave: coupled rows, and only scalings that keep 0 where 0 has a meaning."""
        found = cls.capabilities
        if config.attend == "entities":  # which rows share a cutoff, and may see each other, says absolute time
            found = replace(found, rows_coupled=True, absolute_time=True)
        if config.normalisation == "log1p":
            found = replace(found, scaling=("none",))
        elif config.output_activation == "relu":
            found = replace(found, scaling=tuple(kind for kind in _KEEPS_ZERO if kind in found.scaling))
        return found

    def __init__(self, config: ReGENNConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        length, horizon, variates = spec.context_length, spec.horizon, spec.num_variates
        self.register_buffer("graph", self._first_graph(config, variates))
        self.register_buffer("floor", torch.full((variates,), _FLOOR))
        self.register_buffer("log_peak", torch.ones(variates))
        self.ar_weight: nn.Parameter | None = None
        self.ar_bias: nn.Parameter | None = None
        self.source_layer: GraphEvolution | None = None
        self.target_layer: GraphEvolution | None = None
        if config.paths != "network":
            start = drift_weights(length, horizon).float()
            self.ar_weight = nn.Parameter(start if config.ar_init == "drift" else nn.init.xavier_uniform_(start))
            self.ar_bias = nn.Parameter(torch.zeros(horizon)) if config.bias else None
        if config.paths != "autoregression":
            self._build_network(config, length, horizon, variates)

    def _build_network(self, config: ReGENNConfig, length: int, horizon: int, variates: int) -> None:
        width = config.d_model or length
        if self.has_graph:
            self.source_layer = GraphEvolution(
                variates,
                steps=length,
                activation=config.evolution_activation,
                dropout=config.dropout,
                bias=config.bias,
                start=config.evolution_init,
            )
            self.target_layer = GraphEvolution(variates, steps=None, bias=config.bias, start=config.evolution_init)
        self.where_missing = nn.Linear(length, length, bias=False) if config.mask_channel else None
        if self.where_missing is not None:
            nn.init.zeros_(self.where_missing.weight)
        self.project = nn.Linear(length, width) if width != length else None
        self.encoder = None
        if config.encoder:
            self.encoder = nn.TransformerEncoderLayer(width, 1, config.ff_dim, config.dropout, batch_first=True)
        self.gate = _RNN[config.gate](width, horizon, batch_first=True, bidirectional=config.bidirectional_gate)
        self.sequencer = None
        if config.sequencer != "none":
            kind = _RNN[config.sequencer]
            self.sequencer = kind(variates, variates, batch_first=True, bidirectional=config.bidirectional_sequencer)
        chained = [part for part in (self.encoder, self.gate, self.sequencer) if part is not None]
        self._chained_weights = sum(value.numel() for part in chained for value in part.parameters())
        self.drop = nn.Dropout(config.dropout)
        self.strength = None if config.network_gate is None else nn.Parameter(torch.tensor(config.network_gate))

    @staticmethod
    def _first_graph(config: ReGENNConfig, variates: int) -> Tensor:
        if config.graph_matrix is None:
            return torch.eye(variates)
        if {len(config.graph_matrix), *map(len, config.graph_matrix)} != {variates}:
            raise ModelError(f"model.graph_matrix must be {variates} rows of {variates} numbers, one for each variate")
        return torch.tensor(config.graph_matrix)

    @property
    def has_graph(self) -> bool:
        """True when variates are mixed by evolution weights; a single variate has nothing to mix."""
        return self.config.paths != "autoregression" and not self.config.ablate_gse and self.spec.num_variates > 1

    @property
    def anchors(self) -> bool:
        """True when each window is taken relative to its last value."""
        return self.config.normalisation == "anchor"

    # ---- before training

    def prepare(self, data: TrainingSeries) -> None:
        """Count the graph of the training span, in data units."""
        config = self.config
        if self.spec.num_variates == 1 and not config.ablate_gse and config.paths != "autoregression":
            _LOG.warning("regenn: one variate has no graph; fitted without the graph layers, as with ablate_gse")
        if config.graph != "counted" or not self.has_graph:
            return
        sizes = (self.spec.context_length, self.spec.horizon)
        found = count_graph(data, presence=config.presence, by_windows=config.count == "windows", sizes=sizes)
        self.graph = found.to(self.graph)

    def solve(self, data: TrainingSeries) -> SolveReport | None:
        """Take the least step and set the autoregression; a start for training where the network begins silent.

        Raises:
            ModelError: ``normalisation: log1p`` and a negative value.
        """
        config, mask = self.config, data.mask
        values = torch.where(mask, data.values.double(), 0.0)
        if config.normalisation == "log1p":
            below = int((values < 0).sum())
            if below:
                raise ModelError(
                    f"model.normalisation=log1p needs values of at least 0, and {below} training cells are negative; "
                    "use normalisation anchor"
                )
            peak = values.log1p().amax(0)
            self.log_peak = torch.where(peak > 0, peak, 1.0).to(self.log_peak)
        count = mask.sum(0).clamp(min=1)
        centred = torch.where(mask, values - values.sum(0) / count, 0.0)
        deviation = (centred.square().sum(0) / count).sqrt()
        self.floor = (_FLOOR * torch.where(deviation > 0, deviation, 1.0)).to(self.floor)
        if self.ar_weight is None or config.ar_init == "xavier":
            return None
        with torch.no_grad():
            if config.ar_init == "ols":
                weight, bias = least_squares_weights(self, data)
                self.ar_weight.copy_(weight)
                if self.ar_bias is not None:
                    self.ar_bias.copy_(bias)
        silent = config.paths == "autoregression" or config.network_gate == 0.0
        if not silent:
            return None
        return SolveReport(finished=False, method=config.ar_init, residual_scale=residual_scale(self, data))

    # ---- units of a window

    def transform(self, values: Tensor) -> Tensor:
        """Return values in the units that the network computes in, but for the anchor."""
        return values.clamp(min=0).log1p() / self.log_peak.to(values) if self._logs else values

    @property
    def _logs(self) -> bool:
        return self.config.normalisation == "log1p"

    def normalise(self, batch: Batch) -> _Normalised:
        """Return the context of a batch in the model's own units, gaps filled."""
        filled, first, last = _fill(batch.context, batch.context_mask)
        zero = torch.zeros_like(filled[:, :1])
        if not self.anchors:
            return _Normalised(self.transform(filled), zero, torch.ones_like(zero))
        loc = filled[:, -1:]
        moved = filled.diff(dim=1).abs().sum(1, keepdim=True) / (last - first).clamp(min=1).to(filled.dtype)
        scale = torch.maximum(moved, self.floor.to(filled.dtype))
        return _Normalised((filled - loc) / scale, loc, scale)

    # ---- the forecast

    def forward(self, batch: Batch) -> Prediction:
        """Return raw locations [B, H, V, 1]."""
        seen, parts = self._parts(batch)
        found = reduce(torch.add, parts.values())
        return Prediction(self._to_units(found, seen).unsqueeze(-1))

    def _to_units(self, own: Tensor, seen: _Normalised) -> Tensor:
        y = torch.addcmul(seen.loc, own, seen.scale)
        if self._logs:
            y = (own * self.log_peak.to(own)).clamp(max=_MOST_LOG).expm1()
        return y.relu() if self.config.output_activation == "relu" else y

    def _parts(self, batch: Batch) -> tuple[_Normalised, dict[str, Tensor]]:
        """Return the window and the paths' forecasts [B, H, V] in the model's own units."""
        seen = self.normalise(batch)
        parts: dict[str, Tensor] = {}
        if self.ar_weight is not None:
            straight = torch.einsum("btv,td->bdv", seen.x, self.ar_weight)
            parts["autoregression"] = straight if self.ar_bias is None else straight + self.ar_bias.unsqueeze(1)
        if self.config.paths != "autoregression":
            values, evolved = self._sequence(batch, seen.x)
            mixed = values if self.target_layer is None or evolved is None else self.target_layer(values, evolved)[0]
            parts["network"] = mixed if self.strength is None else self.strength * mixed
        return seen, parts

    def _encoder_input(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return rows [B, V, D], the times of each variate as features, and the graph that the source layer evolved."""
        evolved = None
        if self.source_layer is not None:
            mixed, evolved = self.source_layer(x, self.graph)
        else:
            mixed = x
        rows = mixed.transpose(1, 2)  # [B, V, L]
        if self.where_missing is not None:
            missing = (~batch.context_mask).transpose(1, 2).to(rows.dtype)
            rows = rows + self.where_missing(missing)
        if self.project is not None:
            rows = self.project(rows)
        return rows, evolved

    def _sequence(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the target layer mixes [B, H, V], and the graph that the source layer evolved."""
        rows, evolved = self._encoder_input(batch, x)
        if self._chained and unavailable(rows, self._chained_weights) is None:
            return self._in_one_kernel(rows), evolved
        if self.encoder is not None:
            rows = self.encoder(rows) if self.config.attend == "variables" else self._across_entities(batch, rows)
        gated = _directions(run_torch_cell(self.gate, rows)[0], self.spec.horizon)  # [B, V, H]
        ahead = self.drop(gated.transpose(1, 2))
        if self.sequencer is None:
            return ahead, evolved
        mixed = _directions(run_torch_cell(self.sequencer, ahead)[0], self.spec.num_variates)
        return self.drop(mixed) + ahead, evolved

    @property
    def _chained(self) -> bool:
        """True when the compiled kernel has what these settings ask for."""
        config = self.config
        plain = config.gate == "lstm" and config.sequencer in ("lstm", "none")
        one_way = not config.bidirectional_gate and not config.bidirectional_sequencer
        return plain and one_way and (self.encoder is None or config.attend == "variables")

    def _in_one_kernel(self, rows: Tensor) -> Tensor:
        return encoder_lstm(
            rows,
            None if self.encoder is None else encoder_weights(self.encoder),
            lstm_weights(self.gate),
            None if self.sequencer is None else lstm_weights(self.sequencer),
            dropout=self.config.dropout if self.training else 0.0,
        )

    def _across_entities(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return rows [B, V, D] after attention among the entities of each cutoff, for every variate apart."""
        assert self.encoder is not None  # the caller has one
        count = len(rows)
        cutoffs = torch.zeros(count, dtype=torch.int64, device=rows.device)
        if batch.cutoff_index is not None:
            cutoffs = batch.cutoff_index
        group = torch.unique(cutoffs, return_inverse=True)[1]
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group)
        place = torch.arange(count, device=rows.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        present = batch.context_mask.any(dim=(1, 2))
        shape = (len(sizes), int(sizes.max()))
        table = rows.new_zeros(*shape, *rows.shape[1:])
        absent = torch.ones(shape, dtype=torch.bool, device=rows.device)
        index = (group[order], place)
        table = table.index_put(index, rows[order])
        absent = absent.index_put(index, ~present[order])
        absent = absent & ~absent.all(1, keepdim=True)  # a softmax over nothing is not a number
        variates = rows.shape[1]
        flat = table.permute(0, 2, 1, 3).flatten(0, 1)  # [G V, S, D]
        found = self.encoder(flat, src_key_padding_mask=absent.repeat_interleave(variates, 0))
        back = found.unflatten(0, (-1, variates)).permute(0, 2, 1, 3)[index]
        return torch.empty_like(back).index_copy(0, order, back)

    # ---- what it shows

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return the anchor, the parts of both paths and what the output activation cut, [B, H, V] each.

        Empty for ``log1p``, under which the paths do not add up.
        """
        if self._logs:
            return {}
        seen, parts = self._parts(batch)
        found = {name: part * seen.scale for name, part in parts.items()}
        shape = next(iter(found.values())).shape
        if self.anchors:
            found = {"anchor": seen.loc.expand(shape).clone(), **found}
        if self.config.output_activation == "relu":
            total = torch.stack(list(found.values())).sum(0)
            found["output_activation"] = total.relu() - total
        return found

    def contributions(self, batch: Batch) -> Tensor | None:
        """Return [B, H, V, V']: what variate v' gives through the target layer to the network's part of variate v."""
        if self.target_layer is None or self._logs:
            return None
        seen = self.normalise(batch)
        values, evolved = self._sequence(batch, seen.x)
        assert evolved is not None  # source and target come together
        weights = self.target_layer.evolve(evolved)[1]
        found = values.unsqueeze(2) * weights * seen.scale.unsqueeze(-1)  # [B, H, V, V']
        return found if self.strength is None else self.strength * found

    def attention(self, batch: Batch) -> Tensor | None:
        """Return [B, V, V']: the share of variate v' in what the encoder takes in for variate v; None without one."""
        if self.config.paths == "autoregression" or self.encoder is None or self.config.attend != "variables":
            return None
        rows = self._encoder_input(batch, self.normalise(batch).x)[0]
        shares: Tensor = self.encoder.self_attn(rows, rows, rows, need_weights=True)[1]
        return shares

    def evolution(self) -> dict[tuple[str, str], Tensor]:
        """Return (layer, matrix) -> [V, V], as ``evolution_matrices`` names them."""
        return evolution_matrices(self)

    def explain(self) -> dict[str, Any]:
        """Return every cell of the graphs and evolution weights, and the kernel of the autoregression."""
        return {"evolution": evolution_records(self), "autoregressive_kernel": kernel_records(self)}


def _directions(out: Tensor, size: int) -> Tensor:
    """Return the sum of the directions [B, N, size] of a recurrent net's output."""
    return out if out.shape[-1] == size else out[..., :size] + out[..., size:]


def _fill(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values [B, L, V] with gaps filled, and the places [B, 1, V] of the first and last observation.

    A gap repeats the value before it, one at the start the value after it; 0 where nothing was observed.
    """
    length = values.shape[1]
    if is_known_complete(mask):  # no gap, as mostly
        ends = torch.zeros_like(mask[:, :1], dtype=torch.int64)
        return values, ends, ends + (length - 1)
    steps = torch.arange(length, device=values.device).view(1, -1, 1)
    before = torch.where(mask, steps, -1).cummax(dim=1).values
    first = torch.where(mask, steps, length).amin(1, keepdim=True)
    last = before[:, -1:]
    place = torch.where(before >= 0, before, first.clamp(max=length - 1))
    filled = torch.where(mask, values, 0.0).gather(1, place)
    return filled, first.clamp(max=length - 1), last.clamp(min=0)
