"""VAR: each row from the last p rows of all variates, by one ridge regression; several steps ahead by recursion.

    y[t] = c + A_1 y[t-1] + ... + A_p y[t-p] + e[t]        (Luetkepohl 2005, eq. 2.1.1; forecasts: eq. 2.2.9)

What a lag of one variate tells of another is what this model has and ``linear`` and ``ar_net`` lack. It is the plain
scorer ``var1`` of the anomaly tables with more lags, as a forecaster.

Lags and penalty are chosen together by cross-validation over five stretches of the training span, exactly, from the
sums of products of each stretch: no window is seen twice.

Deviations from the textbook: a penalty (``ridge`` a row, none on c), since V p numbers a variate soon outgrow the rows;
the order by cross-validation, since criteria such as BIC count free parameters and a penalty leaves none to count. An
unstable fit is damped: A_k times (0.999 / r)^k brings the spectral radius r of the companion matrix to 0.999, so that
no forecast runs away. Gaps: inputs are filled by each variate's own autoregression; rows whose own values have gaps do
not count, unless fewer than half of the observed rows would be left, then filled values do.

Legend: N rows, V variates, p lags, F = p V features, H horizon, B windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Prediction, SolveReport, TrainingSeries, is_complete
from tsforge.core.config import tunable
from tsforge.core.errors import ModelError
from tsforge.models._ar_gaps import GapFiller
from tsforge.models._ar_windows import residual_scale, series_bounds
from tsforge.models.registry import register

ORDERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 168)
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
CHOSEN_FEATURES = 512  # orders with more features are not considered: a second of work at 30,000 rows
MOST_FEATURES = 2_048
RADIUS = 0.999
MOST_TOLD = 50_000  # coefficients in ``explain``
_GAP_ORDER, _GAP_ROWS = 24, 256  # lags of the filling autoregression, rows filled at once
_BLOCK = 1 << 23  # numbers of lagged rows held at once


class VarConfig(ModelConfig):
    """Settings of the vector autoregression."""

    name: Literal["var"] = "var"
    lags: int | None = tunable(None, choices=[None, 1, 2, 4, 8, 16], ge=1)
    """Rows that a row is told from; null chooses by cross-validation, as many as 512 features allow."""
    ridge: float | None = tunable(None, choices=[None, 1e-3, 1e-2, 1e-1, 1.0], ge=0.0)
    """Penalty on squared coefficients, a row of the training span, in scaled units; null chooses it with the lags."""


@dataclass(frozen=True)
class Sums:
    """Products of lagged rows with a constant [F + 1, F + 1], with the rows after them [F + 1, V], squares of these
    [V], and their count. The constant comes first, then lag 1 of all variates, lag 2 ..."""

    gram: Tensor
    cross: Tensor
    squares: Tensor
    rows: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram, self.cross + other.cross, self.squares + other.squares, self.rows + other.rows
        )

    def __sub__(self, other: Sums) -> Sums:
        return Sums(
            self.gram - other.gram, self.cross - other.cross, self.squares - other.squares, self.rows - other.rows
        )

    def upto(self, features: int) -> Sums:
        """Return the sums of the first features alone."""
        return Sums(self.gram[: features + 1, : features + 1], self.cross[: features + 1], self.squares, self.rows)

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients [F + 1, V] of the penalised least squares; of least norm where there are several."""
        penalty = torch.full((len(self.gram),), ridge * self.rows, dtype=self.gram.dtype)
        penalty[0] = 0.0
        matrix = self.gram + penalty.diag()
        factor, failed = torch.linalg.cholesky_ex(matrix)
        diagonal = factor.diagonal()
        if not bool(failed) and float(diagonal.min()) > 1e-7 * float(diagonal.max()):
            found: Tensor = torch.cholesky_solve(self.cross, factor)
            return found
        inverse: Tensor = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
        return inverse @ self.cross

    def error(self, coefficients: Tensor) -> float:
        """Return the summed squared error of these coefficients over the rows of the sums."""
        fitted = (coefficients * (self.gram @ coefficients - 2.0 * self.cross)).sum()
        return float(fitted + self.squares.sum())


def lagged(rows: Tensor, lags: int) -> tuple[Tensor, Tensor]:
    """Return features [n, F + 1] (a constant, lag 1 of all variates, lag 2 ...) of the n = N - lags rows [n, V]."""
    count = len(rows) - lags
    parts = [rows[lags - lag : lags - lag + count] for lag in range(1, lags + 1)]
    return torch.cat([rows.new_ones(count, 1), *parts], dim=1), rows[lags:]


def sums_of(rows: Tensor, counts: Tensor, lags: int) -> Sums:
    """Return the sums over the rows [N, V] of a series that have ``lags`` rows before them and count [N]."""
    variates = rows.shape[1]
    size = lags * variates + 1
    total = Sums(rows.new_zeros(size, size), rows.new_zeros(size, variates), rows.new_zeros(variates), 0.0)
    step = max(_BLOCK // size, 1)
    for start in range(lags, len(rows), step):
        stop = min(start + step, len(rows))
        features, after = lagged(rows[start - lags : stop], lags)
        kept = counts[start:stop]
        if not bool(kept.all()):
            features, after = features[kept], after[kept]
        total += Sums(features.T @ features, features.T @ after, after.square().sum(0), float(len(after)))
    return total


def companion_radius(coefficients: Tensor) -> float:
    """Return the spectral radius of the companion matrix of coefficients [p, V, V]: below 1, forecasts settle."""
    lags, variates = coefficients.shape[:2]
    size = lags * variates
    matrix = np.zeros((size, size))
    matrix[:variates] = coefficients.double().permute(1, 0, 2).reshape(variates, size).numpy()
    matrix[variates:, :-variates] = np.eye(size - variates)
    return float(np.abs(np.linalg.eigvals(matrix)).max())


@register("var")
class Var(ForecastModel[VarConfig]):
    """A vector autoregression.

    Shapes:
        weight [V, F] (lag 1 of all variates, lag 2 ...; zeros beyond the chosen order), bias [V].
    """

    weight: Tensor
    bias: Tensor
    chosen: Tensor
    config_class = VarConfig
    capabilities = Capabilities(
        closed_form=True,
        trainable=False,
        probabilistic=False,
        variate_coupling=True,
        scaling=("global", "series", "none"),
    )
    source = "Luetkepohl (2005), New Introduction to Multiple Time Series Analysis, Springer, ch. 2 and 4"
    test_configs = ({}, {"lags": 2, "ridge": 1e-3})
    long_tables = ("coefficients",)

    def __init__(self, config: VarConfig, spec: DataSpec) -> None:
        super().__init__(config, spec)
        variates = spec.num_variates
        if config.lags is not None and config.lags > spec.context_length:
            raise ModelError(
                f"model.lags is {config.lags}, but context_length is {spec.context_length}; use a longer context"
            )
        self.orders = self._orders()
        features = self.orders[-1] * variates
        if features > MOST_FEATURES:
            raise ModelError(
                f"{self.orders[-1]} lags of {variates} variates are {features} features of each variate, at most "
                f"{MOST_FEATURES} can be fitted; use fewer lags or variates, or a model that does not couple them"
            )
        self.register_buffer("weight", torch.zeros(variates, features))
        self.register_buffer("bias", torch.zeros(variates))
        self.register_buffer("chosen", torch.zeros(3, dtype=torch.float64))  # lags, ridge, radius before damping
        self.gaps = GapFiller(variates, min(_GAP_ORDER, spec.context_length), variates)

    def _orders(self) -> list[int]:
        """Return the orders that may be chosen, ascending; the first is always among them."""
        if self.config.lags is not None:
            return [self.config.lags]
        most = max(CHOSEN_FEATURES // self.spec.num_variates, 1)
        return [order for order in ORDERS if order <= min(most, self.spec.context_length)]

    def forward(self, batch: Batch) -> Prediction:
        """Return the location [B, H, V, 1]."""
        context = self.gaps(batch.context, batch.context_mask)
        return Prediction(self._continued(context, self.bias).unsqueeze(-1))

    def _continued(self, context: Tensor, bias: Tensor) -> Tensor:
        """Return H more rows [B, H, V] after a context [B, L, V]."""
        weight, bias = self.weight.to(context.dtype), bias.to(context.dtype)
        lags = weight.shape[1] // weight.shape[0]
        rows = list(context[:, context.shape[1] - lags :].flip(1).unbind(1))  # newest first
        found = []
        for _ in range(self.spec.horizon):
            row = torch.nn.functional.linear(torch.cat(rows[:lags], dim=1), weight, bias)
            rows.insert(0, row)
            found.append(row)
        return torch.stack(found, dim=1)

    def components(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the lags give and what the constant adds to it."""
        context = self.gaps(batch.context, batch.context_mask)
        lags = self._continued(context, torch.zeros_like(self.bias))
        return {"lags": lags, "constant": self._continued(torch.zeros_like(context[:1]), self.bias).expand_as(lags)}

    @torch.no_grad()
    def solve(self, data: TrainingSeries) -> SolveReport:
        """Choose lags and penalty, fit, and damp the fit if it is unstable.

        Raises:
            ModelError: no series has a row with one row more before it than lags may be chosen.
        """
        bounds = series_bounds(data)
        self.gaps.fit(data.values, data.mask, bounds)
        orders = self._within(bounds)
        folds = self._folds(data, bounds, orders[-1])
        total = folds[0]
        for fold in folds[1:]:
            total = total + fold
        if total.rows < 1:
            raise ModelError("no row of the training span has observed values after observed rows; use more data")
        order, ridge = self._chosen(folds, total, orders)
        variates = self.spec.num_variates
        solution = total.upto(order * variates).solve(ridge)
        lags = solution[1:].T.reshape(variates, order, variates).permute(1, 0, 2)  # [p, V, V]
        radius = companion_radius(lags)
        bias = solution[0]
        if radius > RADIUS:
            level = data.values.double().sum(0) / data.mask.sum(0).clamp(min=1)
            damped = lags * (RADIUS / radius) ** torch.arange(1, order + 1, dtype=lags.dtype)[:, None, None]
            bias = bias + (lags - damped).sum(0) @ level  # the mean row is still followed by the same one
            lags = damped
        self.weight.zero_()
        self.weight[:, : order * variates] = lags.permute(1, 0, 2).reshape(variates, -1).to(self.weight)
        self.bias.copy_(bias)
        self.chosen.copy_(torch.tensor([float(order), ridge, radius], dtype=torch.float64))
        details = {"lags": float(order), "ridge": ridge, "radius": radius, "rows": total.rows}
        return SolveReport(finished=True, method="ridge", residual_scale=residual_scale(self, data), details=details)

    def _within(self, bounds: list[int]) -> list[int]:
        longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
        fitting = [order for order in self.orders if order < longest]
        if not fitting:
            raise ModelError(
                f"the longest series has {longest} training rows; model.lags {self.orders[0]} needs more than that"
            )
        return fitting

    def _folds(self, data: TrainingSeries, bounds: list[int], lags: int) -> list[Sums]:
        """Return the sums of five stretches of rows, in time order; every row has ``lags`` rows before it."""
        whole = data.mask.all(1)
        seen = data.mask.any(1)
        counts = whole if 2 * int(whole.sum()) >= int(seen.sum()) else seen
        size = max(-(-len(counts) // FOLDS), 1)
        folds: list[Sums | None] = [None] * FOLDS
        for start, stop in pairwise(bounds):
            if stop - start <= lags:
                continue
            rows = self._filled(data.values[start:stop], data.mask[start:stop])
            for number in range(start // size, (stop - 1) // size + 1):
                first, last = max(start, number * size), min(stop, (number + 1) * size)
                begin = max(first - lags, start)
                part = sums_of(rows[begin - start : last - start], counts[begin:last], lags)
                before = folds[number]
                folds[number] = part if before is None else before + part
        return [fold for fold in folds if fold is not None]

    def _filled(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return rows [N, V] in float64 with gaps filled, in stretches of some hundred rows; the first one begins with
        rows that nobody observed, which are dropped again."""
        if is_complete(mask):
            return values.double()
        more = -len(values) % _GAP_ROWS
        rows = torch.cat([values.new_zeros(more, values.shape[1], dtype=torch.float64), values.double()])
        seen = torch.cat([mask.new_zeros(more, mask.shape[1]), mask])
        shape = (-1, _GAP_ROWS, rows.shape[1])
        filled: Tensor = self.gaps(rows.view(shape), seen.view(shape))
        return filled.reshape(-1, rows.shape[1])[more:]

    def _chosen(self, folds: list[Sums], total: Sums, orders: list[int]) -> tuple[int, float]:
        """Return the order and penalty of the least error on stretches that did not take part in the fit."""
        ridges = RIDGES if self.config.ridge is None else (self.config.ridge,)
        if len(orders) * len(ridges) == 1 or len(folds) == 1:
            return orders[0], ridges[-1] if self.config.ridge is None else ridges[0]
        found = {}
        for order in orders:
            features = order * self.spec.num_variates
            parts = [fold.upto(features) for fold in folds]
            every = total.upto(features)
            for ridge in ridges:
                found[order, ridge] = sum(part.error((every - part).solve(ridge)) for part in parts)
        return min(found, key=lambda choice: found[choice])

    def explain(self) -> dict[str, Any]:
        """Return how the model was fitted, and its coefficients in scaled units: what ``column`` of ``lag`` rows ago
        adds to ``row``, largest first; the smallest are left out beyond 50,000."""
        order, ridge, radius = self.chosen.tolist()
        weight = self.weight.cpu().double().reshape(self.spec.num_variates, -1, self.spec.num_variates)
        weight = weight[:, : int(order)]
        places = weight.abs().flatten().argsort(descending=True, stable=True)[:MOST_TOLD]
        row, lag, column = (index.tolist() for index in torch.unravel_index(places, weight.shape))
        values = weight.flatten()[places].tolist()
        coefficients = [
            {"lag": k + 1, "row": i, "column": j, "value": value}
            for i, k, j, value in zip(row, lag, column, values, strict=True)
        ]
        left_out = weight.numel() - len(coefficients)
        fit = {"lags": int(order), "ridge": ridge, "radius": radius, "coefficients_left_out": left_out}
        return {"coefficients": coefficients, "fit": [fit]}
