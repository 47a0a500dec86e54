"""Windows never leave their series, never see their own target, and mask every gap."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tsforge.contracts.tensors import Batch
from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.windows import WindowDataset, WindowSpec, last_windows

SCHEMA = SeriesSchema(targets=("y", "z"), past=("p",), known=("k",), freq="1i")
SETTINGS = settings(max_examples=40, deadline=None)


@st.composite
def panels(draw: st.DrawFn) -> Panel:
    """Series of 1 to 30 rows whose values encode (series, time, column), with random gaps; z may be empty."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    share = draw(st.sampled_from([0.0, 0.3, 0.9]))
    empty = draw(st.booleans())
    parts = []
    for series in range(draw(st.integers(1, 4))):
        first, rows = draw(st.integers(0, 10)), draw(st.integers(1, 30))
        time = np.arange(first, first + rows)
        values = 10_000.0 * series + 100.0 * time[:, None] + np.arange(4)
        hidden = rng.random((rows, 4)) < share
        hidden[:, 1] |= empty
        columns = {name: np.where(hidden[:, i], np.nan, values[:, i]) for i, name in enumerate("yzpk")}
        parts.append(pl.DataFrame({"series_id": [f"s{series}"] * rows, "time": time, **columns}))
    return Panel.from_frame(SeriesFrame(pl.concat(parts), SCHEMA, require_targets=False))


specs = st.builds(
    WindowSpec,
    context_length=st.integers(1, 8),
    horizon=st.integers(1, 5),
    stride=st.integers(1, 3),
    min_observed=st.sampled_from([0.0, 0.5]),
)


def build(panel: Panel, spec: WindowSpec, start: int, stop: int, **options: Any) -> WindowDataset:
    try:
        return WindowDataset(panel, spec, start, stop, **options)
    except DataError:
        assume(False)
        raise


def everything(windows: WindowDataset) -> Batch:
    return windows.__getitems__(range(len(windows)))


@SETTINGS
@given(panels(), specs, st.integers(0, 15), st.integers(5, 45), st.booleans(), st.booleans())
def test_observed_cells_hold_their_own_series_time_and_column(
    panel: Panel, spec: WindowSpec, start: int, stop: int, aligned: bool, pad: bool
) -> None:
    windows = build(panel, spec, start, stop, aligned=aligned, pad_context=pad)
    batch = everything(windows)
    assert batch.target is not None
    assert batch.target_mask is not None
    assert batch.cutoff_index is not None
    assert batch.series_index is not None
    origin = panel.grid.origin
    assert isinstance(origin, int)
    assert int(batch.cutoff_index.min()) >= start
    assert int(batch.cutoff_index.max()) + spec.horizon <= stop
    time = batch.cutoff_index[:, None] + torch.arange(-spec.context_length, spec.horizon) + origin  # [B, L + H]
    code = 10_000.0 * batch.series_index[:, None, None] + 100.0 * time[..., None] + torch.arange(2)
    context, target = code[:, : spec.context_length].float(), code[:, spec.context_length :].float()
    assert torch.equal(batch.context, torch.where(batch.context_mask, context, torch.zeros(())))
    assert torch.equal(batch.target, torch.where(batch.target_mask, target, torch.zeros(())))
    # the masks count every observed cell of the panel that a window reaches, none besides
    for position in range(0, len(batch.context), 7):
        series, cutoff = int(batch.series_index[position]), int(batch.cutoff_index[position])
        low, high = int(panel.indptr[series]), int(panel.indptr[series + 1])
        rows = np.arange(low, high)
        absolute = rows - low + panel.offset[series]
        seen = panel.target_observed[low:high][(absolute < cutoff) & (absolute >= cutoff - spec.context_length)].sum()
        assert int(batch.context_mask[position].sum()) == seen


@SETTINGS
@given(panels(), specs, st.integers(0, 2**32 - 1))
def test_rows_after_the_cutoff_change_no_context(panel: Panel, spec: WindowSpec, seed: int) -> None:
    windows = build(panel, spec, 0, 60, pad_context=True)
    item = seed % len(windows)
    series, cutoff = int(windows.series_index[item]), int(windows.cutoff_index[item])
    first = int(panel.indptr[series] + cutoff - panel.offset[series])
    rng = np.random.default_rng(seed)
    values, observed = panel.values.copy(), panel.observed.copy()
    later = np.arange(len(values)) >= first
    elsewhere = np.ones(len(values), dtype=bool)
    elsewhere[panel.indptr[series] : panel.indptr[series + 1]] = False
    changed = later | elsewhere  # the future of this series, and every row of the others
    observed[changed] = rng.random((int(changed.sum()), 4)) < 0.5
    values[changed] = np.where(observed[changed], rng.normal(size=(int(changed.sum()), 4)), 0.0)
    other = Panel(values, observed, panel.indptr, panel.offset, None, panel.series_ids, panel.schema, panel.grid)
    before = windows.__getitems__([item])
    keep = WindowSpec(context_length=spec.context_length, horizon=spec.horizon)
    after_all = WindowDataset(other, keep, 0, 60, pad_context=True)
    place = np.flatnonzero((after_all.series_index == series) & (after_all.cutoff_index == cutoff))
    after = after_all.__getitems__(place)
    assert torch.equal(before.context, after.context)
    assert torch.equal(before.context_mask, after.context_mask)
    assert before.past is not None
    assert after.past is not None
    assert torch.equal(before.past.nan_to_num(-9.0), after.past.nan_to_num(-9.0))
    assert before.known is not None
    assert after.known is not None
    assert torch.equal(
        before.known[:, : spec.context_length].nan_to_num(-9.0), after.known[:, : spec.context_length].nan_to_num(-9.0)
    )


@SETTINGS
@given(panels(), st.integers(1, 8), st.integers(1, 5), st.integers(0, 35))
def test_prediction_windows_hide_everything_after_the_cutoff(
    panel: Panel, length: int, horizon: int, cutoff: int
) -> None:
    """The same window, from a panel in which targets and past covariates after the cutoff do not exist."""
    spec = WindowSpec(context_length=length, horizon=horizon)
    blind = panel.observed.copy()
    origin = panel.grid.origin
    assert isinstance(origin, int)
    absolute = np.concatenate([np.arange(n) + o for n, o in zip(panel.lengths, panel.offset, strict=True)])
    blind[absolute > cutoff - origin, :3] = False
    missing = np.array([0.0] * panel.num_targets + [np.nan] * (panel.values.shape[1] - panel.num_targets))
    values = np.where(blind, panel.values, missing)
    other = Panel(values, blind, panel.indptr, panel.offset, None, panel.series_ids, panel.schema, panel.grid)
    try:
        seen = everything(last_windows(panel, spec, cutoff, pad_context=True))
    except DataError as error:
        assume("known covariate" in str(error) or "no observed target" in str(error))
        return
    hidden = everything(last_windows(other, spec, cutoff, pad_context=True))
    assert seen.target is None
    for one, two in zip(seen, hidden, strict=True):
        if one is None or two is None:
            assert one is two
        elif one.is_floating_point():
            assert torch.equal(one.nan_to_num(-9.0), two.nan_to_num(-9.0))
        else:
            assert torch.equal(one, two)


@SETTINGS
@given(panels(), specs, st.integers(1, 9), st.integers(0, 5))
def test_batches_partition_the_items(panel: Panel, spec: WindowSpec, batch_size: int, seed: int) -> None:
    windows = build(panel, spec, 0, 60)
    whole = everything(windows)
    for shuffle in (False, True):
        batches = list(windows.batches(batch_size, shuffle=shuffle, seed=seed))
        assert all(len(batch.context) == batch_size for batch in batches[:-1])
        context = torch.cat([batch.context for batch in batches])
        keys = torch.cat([torch.stack([batch.series_index, batch.cutoff_index], 1) for batch in batches])  # type: ignore[list-item]
        order = np.lexsort((keys[:, 1].numpy(), keys[:, 0].numpy()))
        assert torch.equal(context[order], whole.context)
