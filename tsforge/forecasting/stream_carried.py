"""A recurrent model carried forward row by row: warm-up, step, forecast, in data units from outside.

Scaling statistics that follow a window (kinds ``window``, ``window_mean``, ``last``) are those of the warm-up window
until the next warm-up: nothing is ever taken from rows that come later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tsforge.contracts.model import Recurrent, State
from tsforge.contracts.tensors import Batch, Observation
from tsforge.core.errors import ArtifactError, ModelError
from tsforge.forecasting.stream_rows import Ints, NewRows
from tsforge.forecasting.window_forecasts import FloatArray, WindowForecasts, as_array, check_finite
from tsforge.network import ForecastNetwork

_MODEL = "model."


@dataclass(frozen=True, kw_only=True)
class Carried:
    """State of a recurrent model.

    Shapes:
        model: name -> [S, ...]. loc, scale [S, 1, V], what values are scaled with. since [S] int64, grid rows since the
        warm-up.
    """

    model: State
    loc: Tensor
    scale: Tensor
    since: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name; ``Carried.of`` reads it back."""
        own = {"loc": self.loc, "scale": self.scale, "since": self.since}
        return own | {_MODEL + name: value for name, value in self.model.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Carried:
        """Return the state whose ``tensors`` these are; others are left out."""
        model = {name.removeprefix(_MODEL): value for name, value in tensors.items() if name.startswith(_MODEL)}
        return cls(model=model, loc=tensors["loc"], scale=tensors["scale"], since=tensors["since"])

    def take(self, series: Tensor) -> Carried:
        """Return the state of some series, in the given order (a copy)."""
        return Carried.of({name: value[series] for name, value in self.tensors().items()})

    def put(self, series: Tensor, part: Carried) -> Carried:
        """Return the state with that of some series replaced."""
        new = part.tensors()
        return Carried.of({name: value.index_copy(0, series, new[name]) for name, value in self.tensors().items()})

    def join(self, other: Carried) -> Carried:
        """Return the state of these series followed by those of ``other``."""
        more = other.tensors()
        return Carried.of({name: torch.cat([value, more[name]]) for name, value in self.tensors().items()})


def recurrent_model(network: ForecastNetwork) -> Recurrent:
    """Return the model as one that can be carried.

    Raises:
        ModelError: it cannot.
    """
    model: nn.Module = network.model
    if not network.model.recurrent or not isinstance(model, Recurrent):
        raise ModelError(
            f"model '{network.config.model.name}' with these settings cannot be carried from row to row; use mode "
            "'window' (its forecasts equal those of batch prediction)"
        )
    return model


def warm_up(network: ForecastNetwork, batch: Batch) -> Carried:
    """Return the state after the context of windows in data units; scaling statistics stay as they are here."""
    loc, scale = network.scaler.stats(batch)
    scaled = network.scaler.scale(batch, (loc, scale))
    if not network.capabilities.absolute_time:
        scaled = scaled._replace(cutoff_index=None)
    model = recurrent_model(network).warm_up(scaled)
    for name, value in model.items():
        if not len(value) == len(batch.context):
            raise ModelError(f"state '{name}' of model '{network.config.model.name}' does not hold one entry a series")
    since = torch.zeros(len(loc), dtype=torch.int64)
    return Carried(model=model, loc=loc.clone(), scale=scale.clone(), since=since)


def step(network: ForecastNetwork, carried: Carried, rows: Tensor, elapsed: Tensor) -> Carried:
    """Return the state after one more row of every series.

    Args:
        network, carried: of B series.
        rows: [B, C] in data units, NaN = not observed, columns targets, past, known.
        elapsed: [B] grid steps since the row before; only told to models that take it, 1 for all others.
    """
    spec = network.spec
    target, past, known = torch.split(rows, [spec.num_variates, spec.num_past, spec.num_known], dim=1)
    mask = ~torch.isnan(target)
    one = Batch(
        context=torch.where(mask, target, 0.0).unsqueeze(1),
        context_mask=mask.unsqueeze(1),
        past=past.unsqueeze(1) if spec.num_past else None,
        known=known.unsqueeze(1) if spec.num_known else None,
    )
    scaled = network.scaler.scale(one, (carried.loc, carried.scale))
    observation = Observation(
        values=scaled.context[:, 0],
        mask=mask,
        past=None if scaled.past is None else scaled.past[:, 0],
        known=None if scaled.known is None else scaled.known[:, 0],
        elapsed=elapsed if takes_elapsed(network) else None,
    )
    model = recurrent_model(network).step(carried.model, observation)
    return Carried(model=model, loc=carried.loc, scale=carried.scale, since=carried.since + elapsed)


def takes_elapsed(network: ForecastNetwork) -> bool:
    """Return whether the model steps over any stretch of time at once instead of through unobserved rows."""
    return bool(getattr(network.model, "takes_elapsed", False)) and not network.capabilities.rows_coupled


def forecast(
    network: ForecastNetwork, carried: Carried, known: Tensor | None, levels: tuple[float, ...], cutoff: Tensor
) -> WindowForecasts:
    """Return the forecasts of B series in data units.

    Args:
        network, carried: of the series.
        known: [B, H, F] in data units, or None.
        levels: quantiles wanted of the network, ascending.
        cutoff: [B] absolute row of the first step.

    Raises:
        ModelError: a forecast is not finite.
    """
    if known is not None:
        empty = torch.zeros(len(known), 1, network.spec.num_variates)
        blank = Batch(context=empty, context_mask=empty.bool(), known=known)
        known = network.scaler.scale(blank, (carried.loc, carried.scale)).known
    raw = network.parameters_of(recurrent_model(network).free_run(carried.model, known))
    mean = as_array(network.likelihood.mean(raw) * carried.scale + carried.loc)
    check_finite(network, mean)
    quantiles = None
    if levels:
        found = network.likelihood.quantile(raw, list(levels)) * carried.scale[..., None] + carried.loc[..., None]
        quantiles = as_array(found.cummax(dim=-1).values)
    return WindowForecasts(
        mean=mean,
        quantiles=quantiles,
        target=None,
        mask=None,
        scale=as_array(carried.scale[:, 0]),
        series_index=np.arange(len(mean)),
        cutoff_index=cutoff.numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """What carrying needs besides the state.

    Attributes:
        last: [S] absolute row of each series before the new ones.
        restart_every: grid rows after which a series is warmed up again, None = never.
        contexts: (series, rows done, new rows) -> their windows, for warming up.
        wanted: [N] new rows to forecast before they are taken.
        judge: (forecasts, new row that each is for, step of each) -> what is kept of them [B, ...].
        levels: quantiles to ask of the network.
    """

    network: ForecastNetwork
    last: Tensor
    restart_every: int | None
    contexts: Callable[[Tensor, Tensor, NewRows], Batch]
    wanted: NDArray[np.bool_]
    judge: Callable[[WindowForecasts, Ints, Ints], FloatArray]
    levels: tuple[float, ...]

    def carry(self, carried: Carried, new: NewRows, result: FloatArray) -> Carried:
        """Return the state after all new rows, taken in grid order, all series with a k-th row at once.

        What ``judge`` makes of the forecast before each wanted row goes into ``result`` [N, ...].
        """
        rows, series, elapsed, turns = self._turns(new)
        carried = carried.take(torch.arange(len(self.last)))  # a model may step in place
        wanted = torch.from_numpy(self.wanted)
        for turn in turns:
            place, who, steps = rows[turn], series[turn], elapsed[turn]
            done = place - new.start[who]
            everyone = len(who) == len(self.last)
            part = carried if everyone else carried.take(who)
            if bool((asked := wanted[place]).any()):
                found = self._expect(part, who, done + 1 - steps, new, asked)
                here = place[asked].numpy()
                result[here] = self.judge(found, here, (steps[asked] - 1).numpy())
            part = step(self.network, part, new.values[place], steps)
            if self.restart_every is not None and bool((due := part.since >= self.restart_every).any()):
                fresh = warm_up(self.network, self.contexts(who[due], done[due] + 1, new))
                part = part.put(due.nonzero()[:, 0], fresh)
            carried = part if everyone else carried.put(who, part)
        return carried

    def _expect(self, part: Carried, who: Tensor, before: Tensor, new: NewRows, wanted: Tensor) -> WindowForecasts:
        """Return the forecasts of the wanted series after the first ``before`` of their new rows."""
        if not self.network.capabilities.rows_coupled and not bool(wanted.all()):
            part, who, before = part.take(wanted.nonzero()[:, 0]), who[wanted], before[wanted]
        known = new.known_from(who, before, self.network.spec.horizon)
        found = forecast(self.network, part, known, self.levels, self.last[who] + before + 1)
        return found if len(found.mean) == int(wanted.sum()) else pick(found, wanted.nonzero()[:, 0].numpy())

    def _turns(self, new: NewRows) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return rows to step, their series, the grid steps each takes, and the turns in which they are taken."""
        owner = new.owner
        rows = torch.arange(len(owner))
        if takes_elapsed(self.network):
            known = self.network.spec.num_known
            told = ~torch.isnan(new.values[:, : new.values.shape[1] - known]).all(dim=1)
            told |= torch.from_numpy(~np.isnan(new.judged).all(axis=1))
            told |= rows == (new.start + new.count - 1)[owner]
            rows = rows[told]
        series = owner[rows]
        done = rows - new.start[series] + 1
        previous = torch.where(series[1:] == series[:-1], done[:-1], 0)
        elapsed = done - torch.cat([done.new_zeros(min(1, len(done))), previous])
        sizes = torch.bincount(series, minlength=len(self.last))
        rank = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[series]
        order = rank.argsort(stable=True)
        return rows, series, elapsed, list(torch.split(order, torch.bincount(rank).tolist())) if len(rows) else []


def pick(found: WindowForecasts, rows: Ints) -> WindowForecasts:
    """Return some windows without a future, in the given order."""
    quantiles = None if found.quantiles is None else found.quantiles[rows]
    return WindowForecasts(
        mean=found.mean[rows],
        quantiles=quantiles,
        target=None,
        mask=None,
        scale=found.scale[rows],
        series_index=found.series_index[rows],
        cutoff_index=found.cutoff_index[rows],
    )


def check_state(network: ForecastNetwork, carried: Carried, size: int) -> None:
    """Check that a stored state is one of this network for ``size`` series.

    Raises:
        ArtifactError: a tensor is missing, too many or of another shape.
    """
    expected = recurrent_model(network).initial_state(size)
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    found = {name: tuple(value.shape) for name, value in carried.model.items()}
    row = (size, 1, network.spec.num_variates)
    if shapes != found or tuple(carried.loc.shape) != row or tuple(carried.scale.shape) != row:
        raise ArtifactError("the stored state of the model has other tensors than the model; start the stream anew")
