"""Batches, training spans and panels for the conformance checks: seeded, small, with gaps."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tsforge.contracts.model import Capabilities
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel

SEASON = 8
TRAIN_ROWS = 200


def declared_spec(capabilities: Capabilities, *, context_length: int = 16, horizon: int = 4, **sizes: int) -> DataSpec:
    """Return a spec with covariates of every kind the model declares (none in ``bare`` tests: pass 0)."""
    given = {
        "num_variates": 2,
        "num_known": 2 * capabilities.known_covariates,
        "num_past": 1 * capabilities.past_covariates,
        "num_static": 2 * capabilities.static_covariates,
        "train_length": TRAIN_ROWS,
        **sizes,
    }
    return DataSpec(context_length=context_length, horizon=horizon, **given)


def make_batch(spec: DataSpec, *, size: int = 5, seed: int = 0, gaps: float = 0.2) -> Batch:
    """Return a batch of scaled noise, a share of ``gaps`` masked (cells 0), with every covariate of the spec."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    length, horizon, variates = spec.context_length, spec.horizon, spec.num_variates
    context_mask = torch.rand(size, length, variates, generator=generator) >= gaps
    target_mask = torch.rand(size, horizon, variates, generator=generator) >= gaps
    known = normal(size, length + horizon, spec.num_known) if spec.num_known else None
    if known is not None:
        known[..., 0] = (known[..., 0] > 1).float()  # the first known covariate marks events
    return Batch(
        context=normal(size, length, variates) * context_mask,
        context_mask=context_mask,
        target=normal(size, horizon, variates) * target_mask,
        target_mask=target_mask,
        past=normal(size, length, spec.num_past) if spec.num_past else None,
        known=known,
        static=normal(size, spec.num_static) if spec.num_static else None,
        series_index=torch.arange(size) % 2,
        cutoff_index=torch.arange(size) * 3 + length,
    )


def make_series(spec: DataSpec, *, seed: int = 0, gaps: float = 0.05) -> TrainingSeries:
    """Return an unscaled training span of two series: seasons, noise, different levels, gaps, the spec's covariates."""
    rng = np.random.default_rng(seed)
    steps = np.arange(TRAIN_ROWS)
    blocks = []
    for series in range(2):
        phase = 2 * np.pi * (steps[:, None] / SEASON + np.arange(spec.num_variates) / 5)
        noise = rng.normal(size=(TRAIN_ROWS, spec.num_variates)) * 0.3
        blocks.append(20 * series + (3 + series) * np.sin(phase) + noise)
    values = np.concatenate(blocks)
    mask = rng.random(values.shape) >= gaps

    def columns(count: int, rows: int) -> Tensor | None:
        return torch.from_numpy(rng.normal(size=(rows, count))) if count else None

    known = columns(spec.num_known, len(values))
    if known is not None:
        known[:, 0] = (known[:, 0] > 1).double()
    return TrainingSeries(
        values=torch.from_numpy(np.where(mask, values, 0.0)),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, TRAIN_ROWS, 2 * TRAIN_ROWS]),
        offset=torch.tensor([0, 0]),
        past=columns(spec.num_past, len(values)),
        known=known,
        static=columns(spec.num_static, 2),
    )


def series_batch(spec: DataSpec, data: TrainingSeries, cutoffs: tuple[int, ...] = (40, 90, 130, 190)) -> Batch:
    """Return windows of a training span in data units, alternating between its two series."""
    rows, parts = [], {"past": [], "known": [], "static": []}  # type: ignore[var-annotated]
    length = spec.context_length
    for index, cutoff in enumerate(cutoffs):
        start = int(data.indptr[index % 2]) + cutoff - length
        stop = start + length + spec.horizon
        rows.append((data.values[start:stop].float(), data.mask[start:stop]))
        if data.past is not None:
            parts["past"].append(data.past[start : start + length].float())
        if data.known is not None:
            parts["known"].append(data.known[start:stop].float())
        if data.static is not None:
            parts["static"].append(data.static[index % 2].float())
    values, mask = (torch.stack(part) for part in zip(*rows, strict=True))
    return Batch(
        context=values[:, :length],
        context_mask=mask[:, :length],
        target=values[:, length:],
        target_mask=mask[:, length:],
        series_index=torch.arange(len(cutoffs)) % 2,
        cutoff_index=torch.tensor(cutoffs),
        **{name: torch.stack(part) if part else None for name, part in parts.items()},
    )


def seasonal_panel(*, num_rows: int = 700, noise: float = 0.5, seed: int = 0) -> Panel:
    """Return one series of two variates with a clear season of ``SEASON`` steps and independent noise."""
    rng = np.random.default_rng(seed)
    steps = np.arange(num_rows)
    phase = 2 * np.pi * steps / SEASON
    table = pl.DataFrame(
        {
            "time": steps,
            "a": 10 + np.sin(phase) + 0.5 * np.cos(2 * phase) + noise * rng.normal(size=num_rows),
            "b": -3 + 2 * np.cos(phase) + 2 * noise * rng.normal(size=num_rows),
        }
    )
    return Panel.from_frame(SeriesFrame.from_wide(table, time="time", freq="1i"))
