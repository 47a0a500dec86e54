"""Windows against a double loop over rows, the two gathers against each other, and prediction windows."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.gather import take_by_index, take_padded, take_slices
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.windows import WindowDataset, WindowSpec, last_windows, windows_at

START = datetime(2023, 1, 1, tzinfo=UTC)
LENGTHS = {"a": (0, 40), "b": (7, 25), "c": (3, 9)}  # first hour, rows


def make_panel(
    missing: float = 0.2, future: int = 0, *, series_ids: tuple[str, ...] | None = None, seed: int = 0
) -> Panel:
    rng = np.random.default_rng(seed)
    parts = []
    for name, (first, rows) in LENGTHS.items():
        total = rows + future
        values = rng.normal(size=(total, 4)) + 10
        hidden = rng.random((total, 4)) < missing
        hidden[0] = False
        hidden[rows - 1, :2] = False
        hidden[rows:, :3] = True
        hidden[:, 3] = False
        columns = {key: pl.Series(np.where(hidden[:, i], np.nan, values[:, i])) for i, key in enumerate("yzpk")}
        times = [START + timedelta(hours=first + row) for row in range(total)]
        parts.append(pl.DataFrame({"series_id": [name] * total, "time": times, **columns}))
    schema = SeriesSchema(targets=("y", "z"), past=("p",), known=("k",), static=("s",), freq="1h")
    static = pl.DataFrame({"series_id": list(LENGTHS), "s": [1.0, 2.0, 3.0]})
    return Panel.from_frame(SeriesFrame(pl.concat(parts), schema, static), series_ids=series_ids)


def cell(panel: Panel, series: int, time: int, column: int) -> tuple[float, bool]:
    """Read one cell by absolute time, the slow way; outside the series a target is 0, a covariate NaN."""
    row = time - int(panel.offset[series])
    if not 0 <= row < int(panel.lengths[series]):
        return (0.0 if column < 2 else math.nan), False
    place = int(panel.indptr[series]) + row
    return float(np.float32(panel.values[place, column])), bool(panel.observed[place, column])


def expected(panel: Panel, spec: WindowSpec, series: int, cutoff: int) -> dict[str, Any]:
    context, horizon = range(cutoff - spec.context_length, cutoff), range(cutoff, cutoff + spec.horizon)
    both = [*context, *horizon]
    return {
        "context": [[cell(panel, series, t, v)[0] for v in (0, 1)] for t in context],
        "context_mask": [[cell(panel, series, t, v)[1] for v in (0, 1)] for t in context],
        "target": [[cell(panel, series, t, v)[0] for v in (0, 1)] for t in horizon],
        "target_mask": [[cell(panel, series, t, v)[1] for v in (0, 1)] for t in horizon],
        "past": [[cell(panel, series, t, 2)[0]] for t in context],
        "known": [[cell(panel, series, t, 3)[0]] for t in both],
    }


def check(panel: Panel, spec: WindowSpec, batch: Batch, windows: list[tuple[int, int]], *, target: bool = True) -> None:
    assert batch.series_index is not None
    assert batch.cutoff_index is not None
    assert list(zip(batch.series_index.tolist(), batch.cutoff_index.tolist(), strict=True)) == windows
    for position, (series, cutoff) in enumerate(windows):
        for name, value in expected(panel, spec, series, cutoff).items():
            tensor = getattr(batch, name)
            if name.startswith("target") and not target:
                assert tensor is None
            else:
                np.testing.assert_array_equal(tensor[position].numpy(), value, f"{name} {series} {cutoff}")
        assert batch.static is not None
        assert panel.static is not None
        assert batch.static[position].tolist() == panel.static[series].tolist()


def all_windows(panel: Panel, spec: WindowSpec, start: int, stop: int, need: int) -> list[tuple[int, int]]:
    firsts = [max(start, int(panel.offset[s]) + need) for s in range(panel.num_series) if panel.lengths[s]]
    return [
        (series, cutoff)
        for series in range(panel.num_series)
        for cutoff in range(start, stop)
        if cutoff - need >= panel.offset[series]
        and cutoff + spec.horizon <= min(stop, int(panel.offset[series] + panel.lengths[series]))
        and (cutoff - min(firsts)) % spec.stride == 0
    ]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("span", [(0, 100), (0, 20), (12, 31)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 1), (4, 2, 3), (12, 6, 2)])
def test_windows_equal_a_double_loop(sizes: tuple[int, int, int], span: tuple[int, int], pad: bool) -> None:
    panel = make_panel()
    spec = WindowSpec(context_length=sizes[0], horizon=sizes[1], stride=sizes[2])
    windows = WindowDataset(panel, spec, *span, pad_context=pad)
    listed = all_windows(panel, spec, *span, 1 if pad else sizes[0])
    assert len(listed) > 0
    assert list(zip(windows.series_index.tolist(), windows.cutoff_index.tolist(), strict=True)) == listed
    batches = list(windows.batches(7))
    assert len(batches) == windows.num_batches(7)
    for number, batch in enumerate(batches):
        check(panel, spec, batch, listed[7 * number : 7 * number + 7])
    check(panel, spec, windows.__getitems__([len(windows) - 1, 0]), [listed[-1], listed[0]])


def test_absent_series_have_no_windows() -> None:
    panel = make_panel(series_ids=("c", "x", "a", "b"))
    spec = WindowSpec(context_length=5, horizon=3)
    windows = WindowDataset(panel, spec)
    assert set(windows.series_index.tolist()) == {0, 2, 3}
    check(panel, spec, windows.__getitems__(range(len(windows))), all_windows(panel, spec, 0, 100, 5))


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_of_some_series_are_those_of_a_panel_without_the_others(stride: int) -> None:
    panel = make_panel()
    spec = WindowSpec(context_length=2, horizon=2, stride=stride, min_observed=0.5)
    only = np.array([False, True, True])  # a, which has the earliest cutoff of all, takes no part
    windows = WindowDataset(panel, spec, 3, 30, only=only)
    absent = np.where(only, panel.lengths, 0)
    rows = np.repeat(only, panel.lengths)
    alone = Panel(
        panel.values[rows],
        panel.observed[rows],
        np.concatenate([[0], np.cumsum(absent)]),
        panel.offset,
        panel.static,
        panel.series_ids,
        panel.schema,
        panel.grid,
    )
    other = WindowDataset(alone, spec, 3, 30)
    assert set(windows.series_index.tolist()) == {1, 2}
    assert windows.series_index.tolist() == other.series_index.tolist()
    assert windows.cutoff_index.tolist() == other.cutoff_index.tolist()
    for ours, theirs in zip(windows.batches(3), other.batches(3), strict=True):
        assert torch.equal(ours.context, theirs.context)
    with pytest.raises(ConfigError, match="aligned windows hold every series"):
        WindowDataset(panel, spec, only=only, aligned=True)
    with pytest.raises(DataError, match=r"longest of 1 series has 9, of which 1 in the span asked for"):
        WindowDataset(panel, spec, 11, 30, only=np.array([False, False, True]))


def test_aligned_items_hold_every_series_at_one_cutoff() -> None:
    panel = make_panel(series_ids=("c", "x", "a", "b"))
    spec = WindowSpec(context_length=6, horizon=4, stride=2)
    windows = WindowDataset(panel, spec, 0, 40, aligned=True)
    cutoffs = sorted({cutoff for _, cutoff in all_windows(panel, spec, 0, 40, 6)})
    assert len(windows) == len(cutoffs)
    assert windows.rows_per_item == 4
    for batch, pair in zip(windows.batches(2), [cutoffs[k : k + 2] for k in range(0, len(cutoffs), 2)], strict=True):
        check(panel, spec, batch, [(series, cutoff) for cutoff in pair for series in range(4)])


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("aligned", [False, True])
def test_min_observed_filters_by_the_share_of_target_cells(share: float, aligned: bool) -> None:
    panel = make_panel(missing=0.6)
    sizes = {"context_length": 3, "horizon": 4}
    everything = WindowDataset(panel, WindowSpec(**sizes), 0, 30, aligned=aligned)
    shares = [
        float(next(everything.select([item]).batches(1)).target_mask.float().mean())  # type: ignore[union-attr]
        for item in range(len(everything))
    ]
    kept = [item for item, value in enumerate(shares) if value >= share - 1e-6]
    if not kept:
        with pytest.raises(DataError, match=f"none of {len(everything)} windows"):
            WindowDataset(panel, WindowSpec(**sizes, min_observed=share), 0, 30, aligned=aligned)
        return
    assert len(kept) < len(everything)
    windows = WindowDataset(panel, WindowSpec(**sizes, min_observed=share), 0, 30, aligned=aligned)
    reference = everything.select(kept)
    assert windows.cutoff_index.tolist() == reference.cutoff_index.tolist()
    assert windows.series_index.tolist() == reference.series_index.tolist()


def test_shuffled_batches_hold_every_window_once_in_an_order_fixed_by_the_seed() -> None:
    windows = WindowDataset(make_panel(), WindowSpec(context_length=5, horizon=3))

    def order(seed: int, **options: Any) -> list[tuple[int, int]]:
        batches = windows.batches(8, shuffle=True, seed=seed, **options)
        return [pair for b in batches for pair in zip(b.series_index.tolist(), b.cutoff_index.tolist(), strict=True)]  # type: ignore[union-attr]

    plain = list(zip(windows.series_index.tolist(), windows.cutoff_index.tolist(), strict=True))
    assert order(1) != plain
    assert sorted(order(1)) == plain
    assert order(1) == order(1)
    assert order(1) != order(2)
    assert len(order(1, drop_last=True)) == len(windows) // 8 * 8 < len(windows)
    assert windows.num_batches(8, drop_last=True) == len(windows) // 8
    check(windows.panel, windows.spec, next(windows.batches(8, shuffle=True, seed=1)), order(1)[:8])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bool, torch.int64])
@pytest.mark.parametrize(("rows", "columns", "length"), [(50, 1, 1), (50, 3, 7), (50, 8, 50), (1, 2, 1)])
def test_the_two_gathers_agree(kind: torch.dtype, rows: int, columns: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 2 if kind == torch.bool else 100, (rows + 3, columns), generator=generator).to(kind)[3:]
    start = torch.randint(0, rows - length + 1, (33,), generator=generator)
    fast = take_slices(data, start, length)
    assert torch.equal(fast, take_by_index(data, start, length))
    assert torch.equal(fast, take_padded(data, start, length, torch.zeros_like(start), torch.full_like(start, rows)))
    assert torch.equal(fast[5], data[start[5] : start[5] + length])
    assert fast.is_contiguous()


def test_selected_items_keep_their_order() -> None:
    windows = WindowDataset(make_panel(), WindowSpec(context_length=5, horizon=3))
    part = windows.select([9, 2])
    assert part.cutoff_index.tolist() == windows.cutoff_index[[9, 2]].tolist()
    assert len(part) == 2
    assert windows.to("cpu") is windows
    with pytest.raises(IndexError):
        windows.select([len(windows)])
    with pytest.raises(IndexError):
        windows.__getitems__([-1])


def test_a_torch_data_loader_reads_whole_batches() -> None:
    windows = WindowDataset(make_panel(), WindowSpec(context_length=5, horizon=3))
    loader = torch.utils.data.DataLoader(windows, batch_size=16, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    for given, wanted in zip(loader, windows.batches(16), strict=True):
        assert torch.equal(given.context, wanted.context)


@pytest.mark.parametrize(
    "values", [{"context_length": 0}, {"horizon": -1}, {"stride": 0}, {"min_observed": 1.1}, {"min_observed": -0.1}]
)
def test_impossible_sizes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        WindowSpec(**{"context_length": 3, "horizon": 2, **values})


def test_a_horizon_longer_than_the_data_is_explained() -> None:
    with pytest.raises(DataError, match=r"context_length 30 and horizon 24 need 54 rows.*longest of 3 series has 40"):
        WindowDataset(make_panel(), WindowSpec(context_length=30, horizon=24))
    with pytest.raises(DataError, match=r"of which 5 in the span asked for"):
        WindowDataset(make_panel(), WindowSpec(context_length=3, horizon=8), 10, 15)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        next(WindowDataset(make_panel(), WindowSpec(context_length=3, horizon=2)).batches(0))


def test_windows_without_covariates_have_none() -> None:
    panel = Panel.from_frame(SeriesFrame.from_wide(pl.DataFrame({"ds": range(9), "y": np.arange(9.0)}), time="ds"))
    batch = next(WindowDataset(panel, WindowSpec(context_length=4, horizon=2)).batches(99))
    assert batch.past is None
    assert batch.known is None
    assert batch.static is None
    assert batch.target is not None
    assert batch.target[:, :, 0].tolist() == [[4, 5], [5, 6], [6, 7], [7, 8]]


# --- windows for prediction


def test_last_windows_end_at_the_last_observed_target() -> None:
    panel = make_panel(future=4)
    spec = WindowSpec(context_length=6, horizon=4)
    windows = last_windows(panel, spec)
    ends = [(series, first + rows) for series, (first, rows) in enumerate(LENGTHS.values())]
    check(panel, spec, next(windows.batches(10)), ends, target=False)


def test_last_windows_take_cutoffs_for_all_or_for_some() -> None:
    panel = make_panel(missing=0.0, future=4)
    spec = WindowSpec(context_length=4, horizon=3)
    at = START + timedelta(hours=10, minutes=30)
    everyone = next(last_windows(panel, spec, at).batches(9))
    check(panel, spec, everyone, [(0, 11), (1, 11), (2, 11)], target=False)
    some = next(last_windows(panel, spec, {"b": at + timedelta(hours=9), "a": at}).batches(9))
    check(panel, spec, some, [(0, 11), (1, 20)], target=False)
    with pytest.raises(DataError, match="unknown series bb; did you mean 'b'"):
        last_windows(panel, spec, {"bb": at})


def test_windows_end_wherever_the_caller_says_in_his_order() -> None:
    panel = make_panel(future=4)
    spec = WindowSpec(context_length=6, horizon=4)
    places = [(1, 20), (0, 30), (1, 9), (0, 30), (2, 12), (0, 5)]  # out of order, twice, beyond the front of the series
    series, cutoff = (np.array(part) for part in zip(*places, strict=True))
    windows = windows_at(panel, spec, series, cutoff)
    assert len(windows) == len(places)
    check(panel, spec, next(windows.batches(10)), places, target=False)
    aligned = windows_at(panel, spec, None, np.array([30, 11, 30]))
    assert (len(aligned), aligned.rows_per_item) == (3, 3)
    together = [(series, cutoff) for cutoff in (30, 11, 30) for series in range(3)]
    check(panel, spec, next(aligned.batches(3)), together, target=False)


def test_short_series_are_refused_or_padded() -> None:
    panel = make_panel(future=4)
    spec = WindowSpec(context_length=20, horizon=4)
    with pytest.raises(DataError, match=r"1 of 3 series have fewer than 20 rows up to the cutoff \(first: 'c' with 9"):
        last_windows(panel, spec)
    windows = last_windows(panel, spec, pad_context=True)
    check(panel, spec, next(windows.batches(10)), [(0, 40), (1, 32), (2, 12)], target=False)


def test_a_context_without_any_value_is_refused() -> None:
    panel = make_panel(future=4)
    with pytest.raises(DataError, match=r"1 of 3 series have no observed target in the 5 rows up to the cutoff \(c\)"):
        last_windows(panel, WindowSpec(context_length=5, horizon=1), START + timedelta(hours=20))
    with pytest.raises(DataError, match="3 of 3 series have no observed target"):
        last_windows(panel, WindowSpec(context_length=5, horizon=1), "2022-01-01")


def test_missing_known_covariates_are_named() -> None:
    panel = make_panel(future=2)
    message = (
        r"known covariate\(s\) k are missing in 6 of 12 forecast rows of 3 series \(first: 'a' at 2023-01-02 18:00\)"
    )
    with pytest.raises(DataError, match=message):
        last_windows(panel, WindowSpec(context_length=5, horizon=4))


def test_aligned_prediction_has_one_item_with_every_series() -> None:
    panel = make_panel(future=0)
    plain = Panel.from_frame(
        SeriesFrame(
            pl.DataFrame({"series_id": ["a"] * 6 + ["b"] * 3, "time": [*range(6), *range(3)], "y": np.arange(9.0)}),
            SeriesSchema(targets=("y",), freq="1i"),
        )
    )
    windows = last_windows(plain, WindowSpec(context_length=4, horizon=2), aligned=True)
    batch = next(windows.batches(1))
    assert len(windows) == 1
    assert batch.context[:, :, 0].tolist() == [[2, 3, 4, 5], [8, 0, 0, 0]]
    assert batch.context_mask[:, :, 0].tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.cutoff_index is not None
    assert batch.cutoff_index.tolist() == [6, 6]
    with pytest.raises(ConfigError, match="share one cutoff"):
        last_windows(panel, WindowSpec(context_length=4, horizon=2), {"a": START}, aligned=True)
