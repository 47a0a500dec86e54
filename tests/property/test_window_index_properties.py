"""Windows worked out by rule are those of a plain list: same windows, same order, same batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tsforge.contracts.tensors import Batch
from tsforge.core.errors import DataError
from tsforge.core.seeding import derive_seed
from tsforge.data import window_index
from tsforge.data.grid import TimeGrid
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.window_index import WindowIndex, WindowLocator
from tsforge.data.windows import WindowDataset, WindowSpec

SETTINGS = settings(max_examples=40, deadline=None)
Window = tuple[int, int]  # series and cutoff


@dataclass(frozen=True)
class Case:
    """A panel of ragged series (absent ones among them), and which windows are asked for."""

    panel: Panel
    spec: WindowSpec
    start: int | None
    stop: int | None
    pad: bool
    only: np.ndarray[Any, np.dtype[np.bool_]] | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Series of 0 to 40 rows that begin within 60 rows; targets and a known covariate with gaps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))  # sizes too: drawn ones are mostly too short
    lengths = rng.integers(0, 41, size=draw(st.sampled_from([4, 1, 2, 6])))
    offset = rng.integers(0, 41, size=len(lengths))
    total = int(lengths.sum())
    observed = rng.random((total, 3)) >= draw(st.sampled_from([0.4, 0.0, 0.7]))
    values = np.where(observed, rng.normal(size=(total, 3)), [0.0, 0.0, np.nan])
    panel = Panel(
        values,
        observed,
        np.concatenate([[0], np.cumsum(lengths)]),
        offset,
        rng.normal(size=(len(lengths), 1)),
        tuple(f"s{place}" for place in range(len(lengths))),
        SeriesSchema(targets=("y", "z"), known=("k",), static=("c",), freq="1i"),
        TimeGrid(0, "1i"),
    )
    spec = WindowSpec(
        context_length=draw(st.integers(1, 6)),
        horizon=draw(st.integers(1, 5)),
        stride=draw(st.integers(1, 4)),
        min_observed=draw(st.sampled_from([0.5, 0.0, 0.3])),
    )
    start, stop = draw(st.none() | st.integers(0, 40)), draw(st.none() | st.integers(50, 100))
    some = rng.random(len(lengths)) < 0.6 if rng.random() < 0.6 else None
    return Case(panel, spec, start, stop, draw(st.booleans()), some)


# --- the plain way


def observed_cells(panel: Panel, window: Window, horizon: int) -> int:
    """Count the observed target cells of one window, row by row."""
    series, cutoff = window
    count = 0
    for time in range(cutoff, cutoff + horizon):
        row = time - int(panel.offset[series])
        if 0 <= row < int(panel.lengths[series]):
            count += int(panel.observed[int(panel.indptr[series]) + row, :2].sum())
    return count


def listed(case: Case, *, aligned: bool) -> list[list[Window]]:
    """List the windows of every item by trying every row of every series."""
    panel, spec = case.panel, case.spec
    need = 1 if case.pad else spec.context_length
    start = -1000 if case.start is None else case.start
    stop = 1000 if case.stop is None else case.stop
    taking_part = [
        series
        for series in range(panel.num_series)
        if panel.lengths[series] and (case.only is None or aligned or case.only[series])
    ]
    if not taking_part:
        return []
    first = min(max(int(panel.offset[series]) + need, start) for series in taking_part)
    found = [
        (series, cutoff)
        for series in taking_part
        for cutoff in range(int(panel.offset[series]) + need, int(panel.offset[series] + panel.lengths[series]))
        if start <= cutoff
        and cutoff + spec.horizon <= min(stop, int(panel.offset[series] + panel.lengths[series]))
        and (cutoff - first) % spec.stride == 0
    ]
    items = [[window] for window in found]
    if aligned:
        items = [[(s, cutoff) for s in range(panel.num_series)] for cutoff in sorted({cutoff for _, cutoff in found})]
    cells = 2 * spec.horizon * (panel.num_series if aligned else 1)
    return [
        item
        for item in items
        if sum(observed_cells(panel, window, spec.horizon) for window in item) / cells >= spec.min_observed - 1e-9
    ]


def gathered(panel: Panel, spec: WindowSpec, windows: list[Window]) -> Batch:
    """Read every cell by its time."""
    length = spec.context_length

    def cells(source: np.ndarray[Any, Any], columns: slice, steps: range, fill: Any) -> torch.Tensor:
        rows = []
        for series, cutoff in windows:
            for step in steps:
                row = cutoff + step - int(panel.offset[series])
                inside = 0 <= row < int(panel.lengths[series])
                width = np.full_like(source[:1, columns][0], fill) if len(source) else None
                rows.append(source[int(panel.indptr[series]) + row, columns] if inside else width)
        stacked = np.array(rows).reshape(len(windows), len(steps), -1)
        return torch.from_numpy(stacked.astype(np.float32) if stacked.dtype != bool else stacked)

    context, horizon, both = range(-length, 0), range(spec.horizon), range(-length, spec.horizon)
    assert panel.static is not None
    return Batch(
        context=cells(panel.values, slice(0, 2), context, 0.0),
        context_mask=cells(panel.observed, slice(0, 2), context, False),
        target=cells(panel.values, slice(0, 2), horizon, 0.0),
        target_mask=cells(panel.observed, slice(0, 2), horizon, False),
        known=cells(panel.values, slice(2, 3), both, np.nan),
        static=torch.from_numpy(panel.static[[series for series, _ in windows]].astype(np.float32)),
        series_index=torch.tensor([series for series, _ in windows]),
        cutoff_index=torch.tensor([cutoff for _, cutoff in windows]),
    )


def same(ours: Batch, plain: Batch) -> bool:
    for name, part in plain._asdict().items():
        mine = getattr(ours, name)
        if (mine is None) != (part is None):
            return False
        if part is not None and not (
            mine.dtype == part.dtype and torch.equal(mine.nan_to_num(7.5), part.nan_to_num(7.5))
        ):
            return False
    return True


# --- the tests


@SETTINGS
@given(cases(), st.booleans(), st.integers(1, 9), st.integers(0, 99))
def test_windows_order_and_batches_are_those_of_a_list(case: Case, aligned: bool, size: int, seed: int) -> None:
    items = listed(case, aligned=aligned)
    options: dict[str, Any] = {"aligned": aligned, "pad_context": case.pad, "only": None if aligned else case.only}
    if not items:
        with pytest.raises(DataError):
            WindowDataset(case.panel, case.spec, case.start, case.stop, **options)
        return
    windows = WindowDataset(case.panel, case.spec, case.start, case.stop, **options)
    plain = [window for item in items for window in item]
    assert list(zip(windows.series_index.tolist(), windows.cutoff_index.tolist(), strict=True)) == plain
    assert len(windows) == len(items)

    def check(batches: list[Batch], order: list[int]) -> None:
        assert len(batches) == -(-len(order) // size)
        for place, batch in enumerate(batches):
            chosen = order[place * size : (place + 1) * size]
            assert same(batch, gathered(case.panel, case.spec, [w for item in chosen for w in items[item]]))

    check(list(windows.batches(size)), list(range(len(items))))
    # the order that an int64 permutation of all windows gives, as artifacts of earlier versions were trained with
    order = np.random.default_rng(derive_seed(seed, "windows")).permutation(np.arange(len(items))).tolist()
    check(list(windows.batches(size, shuffle=True, seed=seed)), order)
    picked = order[: len(order) // 2 + 1] + order[:1]
    part = windows.select(picked)
    check(list(part.batches(size)), picked)
    again = list(range(len(picked)))[::-1]
    check(list(part.select(again).batches(size)), [picked[place] for place in again])
    check([windows.__getitems__(order[place : place + size]) for place in range(0, len(order), size)], order)


@SETTINGS
@given(cases(), st.booleans())
def test_blocks_change_nothing(case: Case, aligned: bool) -> None:
    """The same with blocks of a few windows, as panels larger than a block have them."""
    case = replace(case, only=None)  # the first of all series decides where strides begin
    assume(listed(case, aligned=aligned))
    whole = WindowDataset(case.panel, case.spec, case.start, case.stop, aligned=aligned, pad_context=case.pad)
    expected = {shuffle: list(whole.batches(2, shuffle=shuffle, seed=1)) for shuffle in (False, True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_index, "BLOCK", 3)
        patch.setattr("tsforge.data.windows.BLOCK", 3)
        parts = WindowDataset(case.panel, case.spec, case.start, case.stop, aligned=aligned, pad_context=case.pad)
        assert parts.cutoff_index.tolist() == whole.cutoff_index.tolist()
        for shuffle, batches in expected.items():
            found = parts.batches(2, shuffle=shuffle, seed=1)
            assert all(same(ours, theirs) for ours, theirs in zip(found, batches, strict=True))


@SETTINGS
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 5, 400]), min_size=1, max_size=40).filter(any),
    st.integers(1, 3),
    st.sampled_from([0, 4, 10**9]),
)
def test_runs_of_any_lengths_are_found(counts: list[int], stride: int, most: int) -> None:
    """By guesses and by binary search."""
    first = np.arange(len(counts)) * 1000
    index = WindowIndex(first, np.cumsum(counts), stride, len(counts))
    plain = [(run, run * 1000 + k * stride) for run, count in enumerate(counts) for k in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_index, "_MAX_STEPS", most)
        series, cutoff = WindowLocator(index, torch.device("cpu")).locate(np.arange(len(plain)))
    assert list(zip(series.tolist(), cutoff.tolist(), strict=True)) == plain


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("min_observed", [0.0, 0.5])
def test_memory_does_not_grow_with_the_number_of_windows(min_observed: float, shuffle: bool) -> None:
    def dataset(rows: int, missing: bool) -> WindowDataset:
        observed = np.ones((10 * rows, 1), dtype=bool)
        observed[: rows // 2] = not missing
        panel = Panel(
            observed.astype(np.float64),
            observed,
            np.arange(11) * rows,
            np.zeros(10, dtype=np.int64),
            None,
            tuple("abcdefghij"),
            SeriesSchema(targets=("y",), freq="1i"),
            TimeGrid(0, "1i"),
        )
        return WindowDataset(panel, WindowSpec(context_length=3, horizon=2, min_observed=min_observed))

    assert dataset(50, False).index.nbytes == dataset(5000, False).index.nbytes
    some = dataset(5000, True)
    assert sum(len(batch.context) for batch in some.batches(999, shuffle=shuffle)) == len(some)
    kept = some.index.kept
    assert (kept is not None) == (min_observed > 0)
    assert kept is None or (kept.dtype == np.int32 and len(kept) == len(some) < some.index.num_counted)
