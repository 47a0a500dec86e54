"""Which inputs a model needs: how much its errors grow when an input of past windows is exchanged between them.

Permutation importance (Breiman 2001, Machine Learning 45:5-32; Fisher, Rudin, Dominici 2019, JMLR 20(177), Eq. 3.1 for
a fitted model) over the windows of a backtest. Exchanged is the whole track of an input in a window, so that its own
course in time stays plausible. Of a target's history only the deviations from its mean in the window move: levels
drift, and a window at a level of another year would say more about the drift than about the input. A window that has
seen nothing of a target has no level: it takes no part in the exchange of that history. An input that the model ignores
has importance 0; one that others can replace has little.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tensors import Batch
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.seeding import derive_seed
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.predict import artifact_panel
from tsforge.forecasting.window_forecasts import as_array, default_batch_size, evaluating, to_device
from tsforge.network import ForecastNetwork

EVERY = "*"  # all targets together, each in its own unit
_MOST_CELLS = 200_000_000  # of the windows held at once


class ImportanceConfig(Config):
    """Windows and repeats of a permutation importance."""

    cutoffs: int = Field(200, ge=2)
    """Cutoffs, evenly spread over the span; every series is forecast from each of them."""
    repeats: int = Field(5, ge=1)
    """Random exchanges of each input."""
    lags: tuple[int, ...] = ()
    """Borders that cut the history: (1, 24) asks for the cutoff row, the next 23 and the rest apart; () takes all."""
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, kw_only=True)
class _Input:
    """What is exchanged together: a kind, its columns, a span of rows of the batch."""

    kind: str
    name: str
    places: tuple[int, ...]
    lags: str
    span: slice


def permutation_importance(
    artifact: Artifact,
    frame: SeriesFrame,
    config: ImportanceConfig | None = None,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> pl.DataFrame:
    """Return how much the mean absolute error grows when one input is exchanged between windows.

    Args:
        artifact: the fitted network.
        frame: the data.
        config: windows and repeats.
        start, stop: absolute rows on the artifact's grid that hold the targets; default all rows of the frame. Give a
            span that the fit has not seen, else the importance is that for what was learnt by heart.

    Returns:
        ``kind, source, lags, variate`` (``*``: all, each in units of its error), ``error`` and ``base_error`` (mean
        absolute, data units), ``importance`` (error / base_error - 1, mean over repeats), ``sd`` over repeats,
        ``windows`` (those exchanged, which both errors are of). The weightiest input for ``*`` comes first.

    Raises:
        DataError: fewer than two windows, or nothing observed in their targets.
        ConfigError: borders that do not ascend within the context, or more windows than memory should hold.
    """
    config = config or ImportanceConfig()
    network = artifact.network
    frame = match_frame(artifact, frame)
    panel = artifact_panel(artifact, frame)
    low, high = panel.span()
    spec = replace(artifact.window, stride=1, min_observed=0.0)
    coupled = network.capabilities.rows_coupled
    windows = WindowDataset(
        panel, spec, low if start is None else start, high if stop is None else stop, aligned=coupled
    )
    firsts = windows.cutoff_index[:: windows.rows_per_item]
    times = np.unique(firsts)
    chosen = times[np.unique(np.linspace(0, len(times) - 1, min(config.cutoffs, len(times))).round().astype(np.int64))]
    items = np.flatnonzero(np.isin(firsts, chosen))
    cells = len(items) * windows.rows_per_item * spec.length * len(panel.schema.columns)
    if cells > _MOST_CELLS:
        raise ConfigError(
            f"{len(chosen)} cutoffs of {panel.num_series} series hold {cells:,} cells, more than {_MOST_CELLS:,}; "
            "choose fewer cutoffs or series"
        )
    batch = windows.__getitems__(items)
    groups = _groups(windows.series_index, items, windows.rows_per_item, coupled=coupled)
    if max(len(group) for group in groups) < 2:
        raise DataError("importance needs two windows of a series to exchange between them; widen the span")
    with evaluating(network):
        base = _errors(network, batch)
        if not base[1].any():
            raise DataError("nothing is observed in the targets of these windows; choose another span")
        records: list[dict[str, Any]] = []
        for item in _inputs(artifact, panel.schema, config):
            able = _able(groups, batch, item)
            rows = np.concatenate(able)
            found = []
            for repeat in range(config.repeats):
                random = np.random.default_rng(
                    derive_seed(config.seed, f"{item.kind} {item.name} {item.lags} {repeat}")
                )
                moved = _exchange(batch, item, _order(able, len(batch.context), random))
                found.append(_mean_error(_errors(network, moved), rows))
            count = len(np.unique(rows // windows.rows_per_item))
            records += _records(item, _mean_error(base, rows), np.array(found), artifact.schema.targets, count)
    table = pl.DataFrame(records)
    rank = table.filter(variate=EVERY).select("kind", "source", "lags", rank=pl.col("importance"))
    return (
        table.join(rank, on=["kind", "source", "lags"])
        .sort("rank", descending=True, maintain_order=True, nulls_last=True)
        .drop("rank")
    )


def _groups(
    series: NDArray[np.int64], items: NDArray[np.int64], rows: int, *, coupled: bool
) -> list[NDArray[np.int64]]:
    """Return batch rows among which windows may be exchanged: those of a series; for coupled series the same row."""
    if coupled:
        return [np.arange(row, len(items) * rows, rows) for row in range(rows)]
    mine = series[items]
    return [np.flatnonzero(mine == name) for name in np.unique(mine)]


def _able(groups: list[NDArray[np.int64]], batch: Batch, item: _Input) -> list[NDArray[np.int64]]:
    """Return the groups without windows that have no history of their own to exchange; those have no level either."""
    if item.kind != "target":
        return groups
    has = batch.context_mask[:, :, item.places[0]].any(1).numpy()
    return [group[has[group]] for group in groups]


def _order(groups: list[NDArray[np.int64]], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return for every batch row the row it takes an input from: never itself where its group has another.

    The series of a coupled model share one exchange of cutoffs (their groups are equally long unless one has windows
    without a history): their rows belong together.
    """
    source = np.arange(count)
    shuffled: dict[int, tuple[NDArray[np.int64], int]] = {}
    for group in groups:
        if len(group) < 2:
            continue
        if len(group) not in shuffled:
            shuffled[len(group)] = (random.permutation(len(group)), int(random.integers(1, len(group))))
        order, shift = shuffled[len(group)]
        source[group[order]] = group[np.roll(order, shift)]
    return source


def _inputs(artifact: Artifact, schema: Any, config: ImportanceConfig) -> Iterator[_Input]:
    """Yield everything that is exchanged; features of one moment (sine and cosine of the hour) belong together."""
    length = artifact.window.context_length
    if sorted(set(config.lags)) != list(config.lags) or any(not 0 < lag < length for lag in config.lags):
        raise ConfigError(f"lags {list(config.lags)}: give ascending borders between 1 and {length - 1}")
    edges = [0, *config.lags, length] if config.lags else [0, length]
    spans = [
        (f"{low + 1}-{high}" if high > low + 1 else str(high), slice(length - high, length - low))
        for low, high in itertools.pairwise(edges)
    ]
    for place, name in enumerate(schema.targets):
        for lags, span in spans:
            yield _Input(kind="target", name=name, places=(place,), lags=lags, span=span)
    for place, name in enumerate(schema.past):
        yield _Input(kind="past", name=name, places=(place,), lags=f"1-{length}", span=slice(None))
    grouped: dict[str, list[int]] = {}
    for place, name in enumerate(schema.known):
        grouped.setdefault(name.removesuffix(".sin").removesuffix(".cos"), []).append(place)
    for name, places in grouped.items():
        yield _Input(kind="known", name=name, places=tuple(places), lags="all", span=slice(None))


def _exchange(batch: Batch, item: _Input, source: NDArray[np.int64]) -> Batch:
    """Return the batch with one input of every window taken from window ``source``."""
    rows = torch.as_tensor(source)
    if item.kind != "target":
        values: Tensor = getattr(batch, item.kind).clone()
        places = list(item.places)
        values[:, :, places] = values[rows][:, :, places]
        return batch._replace(**{item.kind: values})
    place = item.places[0]
    context, mask = batch.context.clone(), batch.context_mask.clone()
    own, seen = batch.context[:, :, place], batch.context_mask[:, :, place]
    mean = torch.where(seen, own, 0.0).double().sum(1) / seen.sum(1).clamp(min=1)
    moved = (own[rows].double() - mean[rows, None] + mean[:, None]).to(own.dtype)
    context[:, item.span, place] = moved[:, item.span]
    mask[:, item.span, place] = seen[rows][:, item.span]
    return batch._replace(context=torch.where(mask, context, 0.0), context_mask=mask)


@torch.no_grad()
def _errors(network: ForecastNetwork, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the absolute errors of every window [B, V], summed over its observed steps, and the number of these."""
    if batch.target is None or batch.target_mask is None:
        raise DataError("importance needs windows with targets")
    target, observed = batch.target, batch.target_mask
    shape = (target.shape[0], target.shape[2])
    total, count = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    device = network.param_offset.device
    rows = len(batch.context)
    per_item = rows if network.capabilities.rows_coupled else 1
    if network.capabilities.rows_coupled and batch.cutoff_index is not None:
        per_item = int((batch.cutoff_index == batch.cutoff_index[0]).sum())
    step = max(1, default_batch_size(network) // per_item) * per_item
    for first in range(0, rows, step):
        span = slice(first, first + step)
        inputs = batch._replace(target=None, target_mask=None)
        part = Batch(**{name: value[span] for name, value in inputs._asdict().items() if value is not None})
        forecast = as_array(network.predict(to_device(part, device)).mean)
        seen = observed[span].numpy()
        total[span] = np.where(seen, np.abs(forecast - as_array(target[span])), 0.0).sum(axis=1)
        count[span] = seen.sum(axis=1)
    return total, count


def _mean_error(errors: tuple[NDArray[np.float64], NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean [V] of ``_errors`` over some windows, NaN where nothing was observed."""
    total, count = (part[rows].sum(axis=0) for part in errors)
    mean: NDArray[np.float64] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return mean


def _records(
    item: _Input,
    base: NDArray[np.float64],
    found: NDArray[np.float64],
    targets: Sequence[str],
    windows: int,
) -> list[dict[str, Any]]:
    """Return one record a target and one for all, from errors [V] and [repeats, V]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.where(base > 0, found / base - 1.0, np.nan)
    about = {"kind": item.kind, "source": item.name, "lags": item.lags}
    every = np.nanmean(growth, axis=1) if np.isfinite(growth).any() else np.full(len(found), np.nan)
    rows = [(EVERY, every, np.full(len(found), np.nan), np.nan)]
    rows += [(name, growth[:, place], found[:, place], base[place]) for place, name in enumerate(targets)]
    return [
        {
            **about,
            "variate": name,
            "error": _mean(errors),
            "base_error": None if np.isnan(before) else float(before),
            "importance": _mean(growths),
            "sd": float(np.std(growths, ddof=1)) if len(growths) > 1 and np.isfinite(growths).all() else None,
            "windows": windows,
        }
        for name, growths, errors, before in rows
    ]


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if np.isfinite(values).all() else None
