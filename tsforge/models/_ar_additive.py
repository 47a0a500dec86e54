"""The parts of AR-Net that depend on absolute time and known covariates: trend, Fourier seasons, known effects, events.

``g(t) = sum_c beta_c x_c(t)`` with columns x_c centred over the training span, so every effect is a deviation from the
average and the level stays with the autoregression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.models._ar_windows import series_bounds
from tsforge.ops.moments import solve_gram

_PIECE_ROWS = 100_000
_MEMO = 8  # stretches whose columns are kept while series are walked through


@dataclass(frozen=True, kw_only=True)
class AdditivePlan:
    """What the additive part holds.

    Attributes:
        trend: ``off``, ``linear`` or ``piecewise``.
        changepoints: breaks of a piecewise trend, evenly spread over the first ``changepoint_range`` of training.
        season_lengths, season_orders: periods in steps and the number of sine-cosine pairs of each.
        events: columns of the known covariates that mark events; each gets one effect an offset.
        event_offsets: first and last step, relative to the event, at which it acts.
    """

    trend: str = "off"
    changepoints: int = 10
    changepoint_range: float = 0.8
    season_lengths: tuple[float, ...] = ()
    season_orders: tuple[int, ...] = ()
    events: tuple[int, ...] = ()
    event_offsets: tuple[int, int] = (0, 0)

    @property
    def needs_time(self) -> bool:
        """Whether any column is a function of absolute time."""
        return self.trend != "off" or bool(self.season_lengths)

    def breaks(self) -> list[float]:
        """Return the positions of the change points as shares of the training span."""
        count = self.changepoints if self.trend == "piecewise" else 0
        return [self.changepoint_range * (j + 1) / (count + 1) for j in range(count)]

    def waves(self) -> list[tuple[int, float, str]]:
        """Return (season, frequency, ``sin`` or ``cos``) of every column that is neither zero nor a repetition."""
        found: list[tuple[int, float, str]] = []
        used: list[float] = []
        for season, (length, order) in enumerate(zip(self.season_lengths, self.season_orders, strict=True)):
            for harmonic in range(1, order + 1):
                frequency = harmonic / length
                if frequency > 0.5 + 1e-9 or any(abs(frequency - other) < 1e-9 for other in used):
                    continue
                used.append(frequency)
                found.append((season, frequency, "cos"))
                if frequency < 0.5 - 1e-9:  # at two steps a turn the sine is zero on the grid
                    found.append((season, frequency, "sin"))
        return found


class Additive(nn.Module):
    """Linear effects [V, C] of the columns of an ``AdditivePlan``.

    ``origin`` and ``length`` place the training span on the absolute grid; they are integers so that a change of
    floating type cannot move time.
    """

    weight: Tensor
    center: Tensor
    origin: Tensor
    length: Tensor

    def __init__(self, plan: AdditivePlan, spec: DataSpec) -> None:
        super().__init__()
        self.plan = plan
        self.horizon = spec.horizon
        outside = [column for column in plan.events if column >= spec.num_known]
        if outside:
            raise ModelError(
                f"model.events names known covariate(s) {outside}, but the data has {spec.num_known} (counted from 0)"
            )
        self.plain = [column for column in range(spec.num_known) if column not in plan.events]
        self.labels = self._labels()
        effects = torch.zeros(spec.num_variates, len(self.labels))
        if self.labels:
            self.weight = nn.Parameter(effects)
        else:  # nothing to train: a parameter without a gradient would look like a mistake
            self.register_buffer("weight", effects)
        self.register_buffer("center", torch.zeros(len(self.labels), dtype=torch.float64))
        self.register_buffer("origin", torch.zeros((), dtype=torch.int64))
        self.register_buffer("length", torch.tensor(max(spec.train_length, 1), dtype=torch.int64))

    def _labels(self) -> list[tuple[str, str]]:
        """Return (component, column) names in column order."""
        plan = self.plan
        labels = [("trend", "slope")] if plan.trend != "off" else []
        labels += [("trend", f"change at {position:.3f}") for position in plan.breaks()]
        for season, frequency, kind in plan.waves():
            length = plan.season_lengths[season]
            labels.append((f"season_{length:g}", f"{kind} {frequency * length:g}"))
        labels += [("known", f"known {column}") for column in self.plain]
        first, last = plan.event_offsets
        labels += [
            ("events", f"event {column} at {offset:+d}") for column in plan.events for offset in range(first, last + 1)
        ]
        return labels

    @property
    def num_columns(self) -> int:
        """C, the number of effects a variate has."""
        return len(self.labels)

    def groups(self) -> dict[str, list[int]]:
        """Return component name -> its columns."""
        found: dict[str, list[int]] = {}
        for column, (component, _) in enumerate(self.labels):
            found.setdefault(component, []).append(column)
        return found

    def time_columns(self, index: Tensor) -> Tensor:
        """Return the trend and season columns [..., T, C'] float64 at absolute rows [..., T], not centred."""
        if index.dim() > 1 and len(index):  # windows overlap: every moment once
            first = int(index.min())
            rows = int(index.max()) + 1 - first
            if rows < index.numel() // 2:
                return self.time_columns(torch.arange(first, first + rows, device=index.device))[index - first]
        parts = []
        if self.plan.trend != "off":
            share = (index - self.origin).double() / self.length.double()
            parts += [share, *((share - position).clamp(min=0.0) for position in self.plan.breaks())]
        for _, frequency, kind in self.plan.waves():
            angle = 2.0 * math.pi * torch.remainder(index.double() * frequency, 1.0)
            parts.append(torch.cos(angle) if kind == "cos" else torch.sin(angle))
        return torch.stack(parts, dim=-1) if parts else index.new_zeros(*index.shape, 0, dtype=torch.float64)

    def known_columns(self, known: Tensor) -> Tensor:
        """Return the known and event columns [..., T, C''] float64 of known covariates [..., T, F], not centred."""
        first, last = self.plan.event_offsets
        moved = [
            _shifted(known[..., column].double(), offset).unsqueeze(-1)
            for column in self.plan.events
            for offset in range(first, last + 1)
        ]
        return torch.cat([known[..., self.plain].double(), *moved], dim=-1)

    @property
    def uses_known(self) -> bool:
        """Whether any column comes from known covariates."""
        return bool(self.plain) or bool(self.plan.events)

    def window_columns(self, batch: Batch, past_rows: int) -> Tensor:
        """Return centred columns [B, past_rows + H, C] of the last context rows and the horizon.

        Raises:
            ModelError: the batch lacks known covariates, or does not say where in time its windows lie.
        """
        rows, length = batch.context.shape[:2]
        span = torch.arange(-past_rows, self.horizon, device=batch.context.device)
        if batch.cutoff_index is not None:
            index = batch.cutoff_index[:, None] + span
        elif self.plan.needs_time:
            raise ModelError("trend and seasons need Batch.cutoff_index, the absolute row of the first forecast step")
        else:
            index = span.expand(rows, -1)
        columns = self.time_columns(index)
        if self.uses_known:
            if batch.known is None:
                raise ModelError("the model was built for known covariates, but the batch has none")
            columns = torch.cat([columns, self.known_columns(batch.known)[:, length - past_rows :]], dim=-1)
        return columns - self.center

    def pieces(self, data: TrainingSeries, before: int = 0) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first row, last row, centred columns) of stretches within a series.

        Columns (and first row) begin ``before`` rows early where the series allows it. Stretches of other series over
        the same moments get the same tensor where no column is known ahead.
        """
        memo: dict[tuple[int, int], Tensor] = {}  # panels often share their moments
        for series, (start, stop) in enumerate(pairwise(series_bounds(data))):
            shift = int(data.offset[series]) - start
            known = None
            if self.uses_known and data.known is not None:
                known = self.known_columns(data.known[start:stop])  # whole series: event offsets see across pieces
            for begin in range(start, stop, _PIECE_ROWS):
                first, last = max(begin - before, start), min(begin + _PIECE_ROWS, stop)
                key = (first + shift, last + shift)
                if key not in memo:
                    if len(memo) == _MEMO:
                        memo.clear()
                    columns = self.time_columns(torch.arange(*key, device=data.values.device))
                    memo[key] = columns if known is not None else columns - self.center
                columns = memo[key]
                if known is not None:
                    columns = torch.cat([columns, known[first - start : last - start]], dim=1) - self.center
                yield first, last, columns

    @torch.no_grad()
    def place(self, data: TrainingSeries) -> None:
        """Take the position of the training span and the column means from it."""
        lengths = torch.diff(data.indptr)
        first, last = data.offset[lengths > 0], (data.offset + lengths)[lengths > 0]  # absent series have no place
        if len(first):
            self.origin.fill_(int(first.min()))
            self.length.fill_(max(int(last.max()) - int(first.min()), 1))
        self.center.zero_()
        total = torch.zeros_like(self.center)
        for _, _, columns in self.pieces(data):
            total += columns.sum(0)
        self.center.copy_(total / max(len(data.values), 1))

    def effects(self, data: TrainingSeries) -> Tensor:
        """Return g [N, V] float64 of every training row."""
        weight = self.weight.detach().double()
        return torch.cat([columns @ weight.T for _, _, columns in self.pieces(data)])

    @torch.no_grad()
    def fit(self, data: TrainingSeries, filters: Sequence[Tensor] | None = None) -> None:
        """Set the effects by least squares, on the values or on their one-step innovations.

        Args:
            data: the training span.
            filters: AR coefficients [p] of each variate. With them, values and columns pass through ``1 - w(B)`` first:
                the exact minimiser over the effects of the one-step squared error given the autoregression.
        """
        variates = data.values.shape[1]
        width = self.num_columns + 1
        gram = torch.zeros(variates, width, width, dtype=torch.float64)
        right = torch.zeros(variates, width, dtype=torch.float64)
        lags = 0 if filters is None else max(len(row) for row in filters)
        latest: tuple[Tensor | None, Tensor | None] = (None, None)
        for first, last, columns in self.pieces(data, before=lags):
            if last - first <= lags:
                continue
            if latest[0] is not columns:
                inputs = design = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
            for variate in range(variates):
                used = None if filters is None else filters[variate]
                seen = data.mask[first:last, variate]
                values = torch.where(seen, data.values[first:last, variate].double(), 0.0)
                if used is not None:
                    if latest[0] is not columns or latest[1] is not used:  # coefficients and moments may be shared
                        inputs = _filtered(used, design)
                    values = _filtered(used, values[:, None])[:, 0]
                    seen = _complete(seen, lags + 1)
                latest = (columns, used)
                rows, values = inputs[seen], values[seen]
                gram[variate] += (rows.T @ rows).cpu()
                right[variate] += (rows.T @ values).cpu()
        for variate in range(variates):
            solution, _ = solve_gram(gram[variate], right[variate][:, None])
            self.weight[variate] = solution[:-1, 0].to(self.weight)


def _shifted(column: Tensor, offset: int) -> Tensor:
    """Return the column [..., T] moved ``offset`` steps later, 0 where it would reach outside."""
    if offset == 0:
        return column
    size = min(abs(offset), column.shape[-1])
    blank = torch.zeros_like(column[..., :size])
    if offset > 0:
        return torch.cat([blank, column[..., : column.shape[-1] - size]], dim=-1)
    return torch.cat([column[..., size:], blank], dim=-1)


def _filtered(weight: Tensor, columns: Tensor) -> Tensor:
    """Return ``(1 - w(B)) columns`` [T - p, C] from columns [T, C], from the first row with all its lags."""
    from scipy.signal import oaconvolve

    kernel = torch.cat([weight.new_ones(1), -weight]).double().cpu().numpy()
    found = oaconvolve(columns.cpu().numpy(), kernel[:, None], mode="valid", axes=0)
    return torch.from_numpy(found).to(columns.device)


def _complete(seen: Tensor, width: int) -> Tensor:
    """Return [T - width + 1] whether each run of ``width`` rows is observed throughout."""
    count = torch.cat([seen.new_zeros(1, dtype=torch.int64), seen.long().cumsum(0)])
    return count[width:] - count[:-width] == width
