"""Why a forecast is what it is: shares of its inputs, in data units, that add up to it.

A forecast is compared with the one for a *baseline*: every variate stays at its level in the window (its mean, or its
last value), covariates at their training mean; a hundredth of the moves about these levels is kept, because a model
that normalises windows knows no unit for a constant one. The difference is divided among the observed cells:

- **exact**: where the slope of the forecast is the same all along the straight path from baseline to observation, the
  product of slope and difference is the contribution. True for linear models, and for a linear map around window
  normalisation when the baseline is the mean: such a forecast is homogeneous of degree 1 about it (Euler's theorem).
- **integrated gradients** elsewhere: the mean slope along that path (Sundararajan, Taly, Yan 2017, ICML, Eq. 1),
  by Gauss-Legendre quadrature instead of a Riemann sum: nodes are doubled until the contributions add up.
- **occlusion**: a block of rows of one input is put at its baseline; the change of the forecast is its contribution. It
  needs no slope; blocks interact, so what does not add up is reported as ``remainder``.

Everything is read from one window, so nothing after the cutoff but known covariates takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field

from tsforge.artifact import Artifact, match_frame
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, ModelError, listing, nearest
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.attribution_path import Baseline, Inputs, Output, path_integral, read_inputs
from tsforge.forecasting.predict import prediction_windows
from tsforge.forecasting.window_forecasts import FloatArray, as_array, default_batch_size, evaluating, to_device
from tsforge.network import ForecastNetwork

_LOG = get_logger(__name__)
_MOST_CELLS = 5_000_000  # rows of a table
_MOST_PASSES = 200_000  # windows forecast for one occlusion
_EXACT = 1e-4  # relative difference of slopes that single precision explains
COLUMNS = (
    "series_id", "cutoff", "variate", "step", "time", "method", "kind", "source_series", "source", "lag", "rows",
    "source_time", "value", "contribution",
)  # fmt: skip
_NAMES = {"context": "target", "past": "past", "known": "known", "static": "static"}


class AttributionConfig(Config):
    """How a forecast is divided among its inputs."""

    method: Literal["auto", "integrated_gradients", "occlusion"] = "auto"
    """``auto`` is exact where the forecast is linear along the path, else integrated gradients."""
    baseline: Baseline = "mean"
    """What the history of a variate is compared with: its mean in the window, or its last observed value."""
    block: int = Field(1, ge=1)
    """Occlusion: neighbouring rows that are hidden together."""
    tolerance: float = Field(1e-3, gt=0, lt=1)
    """Integrated gradients: share of the moves that may be left over before nodes are doubled."""
    max_nodes: int = Field(64, ge=8)
    """Integrated gradients: most points on the path."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """A forecast divided among its inputs, and among the additive parts of the model where it has any.

    Attributes:
        table: long, ``COLUMNS``. One row an input cell and explained step. ``method`` names the division (``exact
            integrated_gradients occlusion components``); within one, ``contribution`` adds up over all rows of a step
            to the forecast. ``kind``: ``target`` (history of a variate), ``past known static`` (covariates),
            ``baseline`` (the forecast for the baseline), ``remainder`` (what does not add up), ``component``. ``lag``:
            rows before the first forecast step, 1 = the cutoff, 0 and below = known covariates ahead; ``rows``: rows
            from there back that the contribution belongs to; null for what has no place in time.
        metadata: artifact, method, baseline, nodes, largest remainder.
    """

    table: pl.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def by_source(self) -> pl.DataFrame:
        """Return ``kind, source_series, source, contribution, size, share`` over all lags and the mean over steps.

        ``size`` is the sum of absolute contributions of single rows, ``share`` its part of the total; largest first.
        Inputs only: baseline, remainder and components have no share.
        """
        inputs = self.table.filter(pl.col("kind").is_in(list(_NAMES.values())))
        steps = max(1, self.table["step"].n_unique())
        sums = inputs.group_by("kind", "source_series", "source", maintain_order=True).agg(
            pl.col("contribution").sum() / steps, (pl.col("contribution").abs().sum() / steps).alias("size")
        )
        total = float(sums["size"].sum())
        share = pl.col("size") / total if total > 0 else pl.lit(0.0)
        return sums.with_columns(share.alias("share")).sort("size", descending=True, maintain_order=True)

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        return dict(self.metadata)

    def rows(self) -> list[dict[str, Any]]:
        """Return one record an input, the weightiest first."""
        return self.by_source().to_dicts()


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is explained: the window(s), their panel, the place of the answer, names for the table."""

    artifact: Artifact
    panel: Panel
    windows: WindowDataset
    inputs: Inputs
    output: Output
    series: tuple[str, ...]

    @property
    def network(self) -> ForecastNetwork:
        return self.artifact.network


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Contributions by kind [steps, R, ...] of blocks of ``rows`` rows, the baseline's forecast [steps], the rest."""

    method: str
    cells: dict[str, FloatArray]
    base: FloatArray
    remainder: FloatArray
    nodes: int = 0
    rows: int = 1


def attribute(
    artifact: Artifact,
    frame: SeriesFrame,
    config: AttributionConfig | None = None,
    *,
    series: str | None = None,
    variate: str | None = None,
    cutoff: TimeLike | None = None,
    steps: Sequence[int] | None = None,
) -> Attribution:
    """Divide the forecast of one variate of one series among everything the model read.

    Args:
        artifact: the fitted network.
        frame: history, and known covariates over the horizon where the model uses any.
        config: method and baseline.
        series, variate: whose forecast; default the first of each.
        cutoff: last time that may be seen; default the last observed row.
        steps: of the horizon, from 1; default all.

    Raises:
        ArtifactError: the frame does not fit the artifact.
        DataError: unknown series, or a history too short or empty.
        ConfigError: unknown variate or step, or more cells than a table can hold.
        ModelError: the contributions are not finite.
    """
    config = config or AttributionConfig()
    question = _ask(artifact, frame, config, (series, variate), cutoff, steps)
    network = question.network
    with evaluating(network):
        answer = (_occlude if config.method == "occlusion" else _integrate)(question, config)
        components = network.components(question.inputs.batch)
    if not all(np.isfinite(part).all() for part in answer.cells.values()):
        raise ModelError(f"the contributions to the forecast of artifact {artifact.id} are not finite")
    names = {name: as_array(part)[question.output.row] for name, part in components.items()}
    moved = sum(np.abs(part).sum(axis=tuple(range(1, part.ndim))) for part in answer.cells.values())
    left = np.abs(answer.remainder) / np.maximum(moved, np.finfo(np.float64).tiny)
    if answer.method == "integrated_gradients" and left.max() > config.tolerance:
        _LOG.warning(
            "contributions miss the forecast by up to %.1f%% of their size after %d nodes: the model bends sharply "
            "along the path; raise max_nodes or use method=occlusion",
            100.0 * left.max(),
            answer.nodes,
        )
    metadata = {
        "model": artifact.model_name,
        "artifact_id": artifact.id,
        "series": question.series[question.output.row],
        "variate": artifact.schema.targets[question.output.variate],
        "cutoff": str(_cutoff(question)),
        "steps": len(question.output.steps),
        "method": answer.method,
        "baseline": config.baseline,
        "nodes": answer.nodes,
        "largest_remainder": float(left.max()),
    }
    return Attribution(table=_table(question, answer, names), metadata=metadata)


def _ask(
    artifact: Artifact,
    frame: SeriesFrame,
    config: AttributionConfig,
    whose: tuple[str | None, str | None],
    cutoff: TimeLike | None,
    steps: Sequence[int] | None,
) -> _Question:
    frame = match_frame(artifact, frame)
    wanted, variate = whose[0] or frame.series_ids[0], whose[1] or artifact.schema.targets[0]
    if wanted not in frame.series_ids:
        raise DataError(f"there is no series '{wanted}' in the data{nearest(wanted, frame.series_ids)}")
    if variate not in artifact.schema.targets:
        raise ConfigError(
            f"artifact {artifact.id} does not forecast '{variate}'{nearest(variate, artifact.schema.targets)} "
            f"(it forecasts {listing(artifact.schema.targets, 20)})"
        )
    horizon = artifact.window.horizon
    asked = tuple(range(1, horizon + 1)) if steps is None else tuple(dict.fromkeys(steps))
    if not asked or min(asked) < 1 or max(asked) > horizon:
        raise ConfigError(f"steps must lie in 1..{horizon}, given: {list(asked)}")
    coupled = artifact.network.capabilities.rows_coupled
    if not coupled:
        frame = frame.select_series([wanted])
    panel, windows = prediction_windows(artifact, frame, cutoff, horizon)
    names = tuple(panel.series_ids[number] for number in windows.series_index)
    batch = to_device(windows.__getitems__(range(len(windows))), artifact.network.param_offset.device)
    row = names.index(wanted)
    if not bool(batch.context_mask[row].any()):
        raise DataError(
            f"series '{wanted}' has no observed target in the {artifact.window.context_length} rows up to the cutoff"
        )
    inputs = read_inputs(artifact.network, batch, config.baseline)
    cells = sum(int(seen.sum()) for seen in inputs.seen.values())
    if cells * len(asked) > _MOST_CELLS:
        raise ConfigError(
            f"{cells:,} inputs of {len(asked)} steps are more than the {_MOST_CELLS:,} cells of one table; choose "
            f"steps, at most {_MOST_CELLS // cells}"
        )
    output = Output(row=row, steps=np.array(asked, dtype=np.int64) - 1, variate=artifact.schema.targets.index(variate))
    return _Question(artifact=artifact, panel=panel, windows=windows, inputs=inputs, output=output, series=names)


@torch.no_grad()
def _ends(question: _Question) -> tuple[FloatArray, FloatArray]:
    """Return the explained numbers [steps] for what was observed and for the baseline, each in a pass of its own."""
    inputs, found = question.inputs, []
    for alpha in (1.0, 0.0):
        leaves = {kind: part.detach() for kind, part in inputs.at(torch.tensor([alpha])).items()}
        found.append(as_array(question.output.of(question.network, inputs.batch_of(leaves), inputs.rows))[0])
    return found[0], found[1]


def _integrate(question: _Question, config: AttributionConfig) -> _Answer:
    network, inputs, output = question.network, question.inputs, question.output
    chunk = max(1, default_batch_size(network) // (2 * inputs.rows))
    full, base = _ends(question)

    def integral(nodes: FloatArray, weights: FloatArray) -> dict[str, FloatArray]:
        return path_integral(network, inputs, output, nodes, weights, chunk=chunk)

    if config.method == "auto":
        here, there = (integral(np.array([alpha]), np.ones(1)) for alpha in (1.0, 0.3))
        size = max(float(np.abs(part).max(initial=0.0)) for part in here.values())
        straight = all(np.allclose(here[kind], there[kind], rtol=0.0, atol=_EXACT * size) for kind in here)
        if straight and np.abs(rest := full - base - _sum(here)).max() <= _EXACT * max(
            float(np.abs(full - base).max()), size
        ):
            return _Answer(method="exact", cells=here, base=base, remainder=rest, nodes=1)
    number = 8
    while True:
        points, weights = np.polynomial.legendre.leggauss(number)
        cells = integral((points + 1.0) / 2.0, weights / 2.0)
        rest = full - base - _sum(cells)
        moved = sum(np.abs(part).sum(axis=tuple(range(1, part.ndim))) for part in cells.values())
        if (np.abs(rest) <= config.tolerance * moved).all() or 2 * number > config.max_nodes:
            return _Answer(method="integrated_gradients", cells=cells, base=base, remainder=rest, nodes=number)
        number *= 2


def _sum(cells: dict[str, FloatArray]) -> FloatArray:
    """Return the sum over all inputs [steps]."""
    return np.asarray(sum(part.sum(axis=tuple(range(1, part.ndim))) for part in cells.values()))


def _blocks(length: int, block: int) -> list[slice]:
    """Return spans of ``block`` rows counted from the last row back; the first one may be shorter."""
    ends = range(length, 0, -block)
    return [slice(max(end - block, 0), end) for end in ends][::-1]


@torch.no_grad()
def _occlude(question: _Question, config: AttributionConfig) -> _Answer:
    network, inputs, output = question.network, question.inputs, question.output
    hidden = [
        (kind, row, place, span)
        for kind, value in inputs.values.items()
        for row in range(inputs.rows)
        for place in range(value.shape[-1])
        for span in ([slice(0, 1)] if kind == "static" else _blocks(value.shape[1], config.block))
        if bool(inputs.seen[kind][(row, place) if kind == "static" else (row, span, place)].any())
    ]
    if len(hidden) * inputs.rows > _MOST_PASSES:
        raise ConfigError(
            f"{len(hidden):,} blocks would have to be hidden one by one ({inputs.rows} windows each); choose a larger "
            "block, or method=integrated_gradients"
        )
    full, base = _ends(question)
    cells = {kind: np.zeros((len(output.steps), *part.shape)) for kind, part in inputs.values.items()}
    chunk = 1 if network.capabilities.rows_coupled else max(1, default_batch_size(network) // inputs.rows)
    for kind in inputs.values:
        mine = [item for item in hidden if item[0] == kind]
        for first in range(0, len(mine), chunk):
            part = mine[first : first + chunk]
            variants = torch.cat([inputs.hidden(kind, row, place, span) for _, row, place, span in part])
            changed = as_array(output.of(network, inputs.batch_of({kind: variants}), inputs.rows))
            for (_, row, place, span), forecast in zip(part, changed, strict=True):
                where = (row, place) if kind == "static" else (row, span.stop - 1, place)
                cells[kind][(slice(None), *where)] = full - forecast
    return _Answer(method="occlusion", cells=cells, base=base, remainder=full - base - _sum(cells), rows=config.block)


def _cutoff(question: _Question) -> Any:
    return question.panel.grid.time_at(int(question.windows.cutoff_index[question.output.row]) - 1)


def _table(question: _Question, answer: _Answer, components: dict[str, FloatArray]) -> pl.DataFrame:
    """Return every contribution as a long table; blocks stand at their last row."""
    parts = [_kind_table(question, answer, kind) for kind in answer.cells]
    extra: list[tuple[str, str, str, FloatArray]] = [(answer.method, "baseline", "baseline", answer.base)]
    if answer.method != "exact" or np.abs(answer.remainder).max() > 0:
        extra.append((answer.method, "remainder", "remainder", answer.remainder))
    steps, variate = question.output.steps, question.output.variate
    extra += [("components", "component", name, part[steps, variate]) for name, part in components.items()]
    time_type = parts[0].schema["source_time"]
    for method, kind, source, values in extra:
        parts.append(
            pl.DataFrame({"place": np.arange(len(steps)), "contribution": values}).with_columns(
                pl.lit(method).alias("method"),
                pl.lit(kind).alias("kind"),
                pl.lit(source).alias("source"),
                pl.lit(None, pl.String).alias("source_series"),
                pl.lit(None, pl.Int32).alias("lag"),
                pl.lit(None, pl.Int32).alias("rows"),
                pl.lit(None, time_type).alias("source_time"),
                pl.lit(None, pl.Float64).alias("value"),
            )
        )
    names = list(parts[0].columns)
    table = pl.concat([part.select(names) for part in parts])
    first = int(question.windows.cutoff_index[question.output.row])
    times = question.panel.grid.time_at(first + steps)
    return table.with_columns(
        pl.lit(question.series[question.output.row]).alias("series_id"),
        pl.lit(_cutoff(question)).cast(time_type).alias("cutoff"),
        pl.lit(question.artifact.schema.targets[variate]).alias("variate"),
        pl.Series("step", steps + 1, dtype=pl.Int32).gather(table["place"]).alias("step"),
        times.gather(table["place"]).alias("time"),
    ).select(COLUMNS)


def _kind_table(question: _Question, answer: _Answer, kind: str) -> pl.DataFrame:
    """Return the contributions of one kind of input, observed cells only."""
    schema, inputs = question.artifact.schema, question.inputs
    names = {"context": schema.targets, "past": schema.past, "known": schema.known, "static": schema.static}[kind]
    seen = inputs.seen[kind].cpu().numpy()
    cells, values = answer.cells[kind], as_array(inputs.values[kind])
    first = int(question.windows.cutoff_index[question.output.row])
    if kind == "static":
        seen, cells, values = seen[:, None], cells[:, :, None], values[:, None]
        lags = times = None
    else:
        length = question.artifact.window.context_length
        lags = length - np.arange(seen.shape[1])
        times = question.panel.grid.time_at(first - lags)
        if answer.rows > 1:  # blocks stand at their last row, whether that was observed or not
            ends = np.zeros(seen.shape[1], dtype=bool)
            ends[[span.stop - 1 for span in _blocks(seen.shape[1], answer.rows)]] = True
            seen = np.broadcast_to(ends[None, :, None], seen.shape) & seen.any(axis=1, keepdims=True)
            values = np.full_like(values, np.nan)
    row, position, place = np.nonzero(seen)
    count, steps = len(row), cells.shape[0]
    columns = {
        "place": np.repeat(np.arange(steps), count),
        "contribution": cells[:, row, position, place].ravel(),
        "source": pl.Series(names, dtype=pl.String).gather(np.tile(place, steps)),
        "source_series": pl.Series(question.series, dtype=pl.String).gather(np.tile(row, steps)),
        "value": pl.Series(np.tile(values[row, position, place], steps)).fill_nan(None),
    }
    table = pl.DataFrame(columns).with_columns(
        pl.lit(answer.method).alias("method"), pl.lit(_NAMES[kind]).alias("kind")
    )
    if lags is None or times is None:
        time_type = question.panel.grid.time_at(np.array([first])).dtype
        return table.with_columns(
            pl.lit(None, pl.Int32).alias("lag"),
            pl.lit(None, pl.Int32).alias("rows"),
            pl.lit(None, time_type).alias("source_time"),
        )
    sizes = np.array([span.stop - span.start for span in _blocks(seen.shape[1], answer.rows)])
    by_row = np.ones(seen.shape[1], dtype=np.int64)
    by_row[[span.stop - 1 for span in _blocks(seen.shape[1], answer.rows)]] = sizes
    return table.with_columns(
        pl.Series("lag", np.tile(lags[position], steps), dtype=pl.Int32),
        pl.Series("rows", np.tile(by_row[position], steps), dtype=pl.Int32),
        times.gather(np.tile(position, steps)).alias("source_time"),
    )
