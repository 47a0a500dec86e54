"""Moments of lag windows whose gaps are filled: least squares on data with hardly a window without a gap.

A context is filled as a forecast fills it, by its expectation given what was observed in it. A step is fitted on the
windows that observed it: unobserved targets are replaced by the regression's own forecast until they stand still, where
they pull at nothing, so that one set of moments serves all steps.

Moments of observed pairs, the usual way out, need no window, but no data have them: where neighbouring rows are nearly
equal, what forecasts is smaller than the disagreement between pairs (measured in ``docs/models/ar_net.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.models._ar_layout import LagLayout
from tsforge.ops.kalman import conditional_fill, precision_matrix
from tsforge.ops.moments import WindowMoments
from tsforge.ops.toeplitz import levinson, sound_autocovariance

MOST_LAGS = 168  # of the autoregression that fills: a week of hours, cheap at any context length
MOST_VALUES = 8_000_000  # of the windows taken: 64 MB, and enough of them for any number of columns
_ROUNDS = 10
_SETTLED = 1e-3  # largest move of an unobserved target in a round, in deviations
_STEADY = 1e-6  # ridge of the forecasts put for unobserved targets, relative to the mean square of an input


def filled_moments(
    layout: LagLayout,
    values: Tensor,
    mask: Tensor,
    bounds: Sequence[int],
    *,
    past: Tensor | None = None,
    uses_scale: bool = False,
    most_values: int | None = None,
) -> WindowMoments:
    """Return moments of all windows with an observed value among lags and targets.

    Beyond ``most_values`` values (``MOST_VALUES``) a random choice of windows stands for all. ``rows`` and sums are
    those of all windows times the observed share of their targets.

    Shapes:
        values [N, V] centred, mask [N, V], bounds [num_series + 1] rows, past [N, P]; columns as in ``lag_moments``.

    Raises:
        ModelError: no series has the rows of a window, or none observed both a lag and a target.
    """
    most_values = MOST_VALUES if most_values is None else most_values
    rows, variates = _usable(layout, mask.cpu(), bounds)
    possible = len(rows)
    if possible * layout.span > most_values:
        chosen = np.random.default_rng(0).choice(possible, max(most_values // layout.span, 1), replace=False)
        kept = torch.from_numpy(np.sort(chosen))
        rows, variates = rows[kept], variates[kept]
    place = rows[:, None] + layout.reach - layout.lags + torch.arange(layout.lags + layout.horizon)
    seen = mask.cpu()[place, variates[:, None]]
    windows = torch.where(seen, values.double().cpu()[place, variates[:, None]], 0.0)
    weight = fill_weights(values, mask, bounds, min(layout.lags, MOST_LAGS))
    lags, inputs = layout.lags, windows[:, : layout.lags]
    if lags:
        inputs = conditional_fill(precision_matrix(weight, lags), inputs, seen[:, :lags])
    parts = [inputs]
    if past is not None and layout.num_past:
        first = rows[:, None] + layout.reach - layout.covariate_lags + torch.arange(layout.covariate_lags)
        parts += [past[:, column].double()[first] for column in range(layout.num_past)]
    if uses_scale:
        parts.append(inputs.std(1, keepdim=True, correction=0))
    features = torch.cat(parts, dim=1)
    targets, observed = windows[:, lags:], seen[:, lags:]
    targets, excess = _settle(features, targets, observed)
    return _moments(layout, features, targets, observed, excess, possible / len(rows))


def fill_weights(values: Tensor, mask: Tensor, bounds: Sequence[int], order: int) -> Tensor:
    """Return the stationary autoregression [order] that all variates share, as it is fitted for gaps elsewhere."""
    seen = mask.any(0)
    found = sound_autocovariance(values[:, seen].double().cpu().numpy(), mask[:, seen].cpu().numpy(), bounds, order)
    return torch.from_numpy(levinson(found.sum(axis=0)).weight)


def _usable(layout: LagLayout, mask: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the first row and the variate, both [R], of every window with an observed lag (if any) and target."""
    starts = torch.cat([torch.arange(first, max(last - layout.span + 1, first)) for first, last in pairwise(bounds)])
    if not len(starts):
        raise ModelError(
            f"no series of the training span has {layout.span} rows (context plus horizon); use shorter windows"
        )
    seen = torch.nn.functional.pad(mask.to(torch.int32).cumsum(0), (0, 0, 1, 0))  # [N + 1, V]
    origin = starts + layout.reach
    usable = seen[origin + layout.horizon] > seen[origin]
    if layout.lags:
        usable &= seen[origin] > seen[origin - layout.lags]
    place, variates = usable.nonzero(as_tuple=True)
    if not len(place):
        raise ModelError(
            f"no window of {layout.lags} lags and {layout.horizon} steps of the training span observed a value of each"
        )
    return starts[place], variates


def _settle(features: Tensor, targets: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets [R, H] with forecasts where unobserved, and the squared error [H] to add for those."""
    count = observed.sum(0).double()
    if bool(observed.all()):
        return targets, torch.zeros_like(count)
    design = torch.cat([features, torch.ones_like(targets[:, :1])], dim=1)
    gram = design.T @ design
    ridge = _STEADY * float(gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    mean = targets.sum(0) / count.clamp(min=1.0)
    targets = torch.where(observed, targets, mean)
    scale = float(targets.std(correction=0)) or 1.0
    for _ in range(_ROUNDS):
        forecast = design @ torch.cholesky_solve(design.T @ targets, factor)
        moved = torch.where(observed, 0.0, forecast - targets).abs().max()
        targets = torch.where(observed, targets, forecast)
        if float(moved) < _SETTLED * scale:
            break
    error = torch.where(observed, targets - forecast, 0.0).square().sum(0)
    return targets, error * (len(targets) / count.clamp(min=1.0) - 1.0)


def _moments(
    layout: LagLayout, features: Tensor, targets: Tensor, observed: Tensor, excess: Tensor, factor: float
) -> WindowMoments:
    """Return the moments with columns in the order of a window, for as many windows as there are observed targets."""
    lags = layout.lags
    table = torch.cat([features[:, :lags], targets, features[:, lags:]], dim=1)
    gram, sums = table.T @ table, table.sum(0)
    gram.diagonal()[lags : lags + layout.horizon] += excess  # an unobserved step is forecast no better than others
    share = float(observed.double().mean()) * factor
    return WindowMoments(gram * share, sums * share, len(table) * share)
