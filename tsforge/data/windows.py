"""Windows of a panel, gathered a whole batch at a time from tensors that stay on the device.

A window is a number until it is gathered: its series and cutoff follow from a table with one line a series
(``window_index``), so memory does not grow with the number of windows. Two things cost 4 bytes an item: the order of
the epoch at hand when it is shuffled, and a list of the items that ``select`` or ``min_observed`` left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.core.seeding import derive_seed
from tsforge.data.gather import take_padded, take_slices
from tsforge.data.grid import Bools, Ints, TimeLike, show_time
from tsforge.data.panel import Panel
from tsforge.data.window_index import (
    BLOCK,
    Numbers,
    WindowIndex,
    WindowLocator,
    count_windows,
    keep_observed,
    smallest_type,
)

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """Sizes of a window.

    Attributes:
        context_length: rows a model sees.
        horizon: rows it forecasts.
        stride: rows between neighbouring windows of a series.
        min_observed: least share of observed target cells a window needs; 0 keeps every window.

    Raises:
        ConfigError: a size below 1, or a share outside [0, 1].
    """

    context_length: int
    horizon: int
    stride: int = 1
    min_observed: float = 0.0

    def __post_init__(self) -> None:
        for name in ("context_length", "horizon", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.min_observed <= 1:
            raise ConfigError(f"min_observed is {self.min_observed}; it must lie between 0 and 1")

    @property
    def length(self) -> int:
        """Rows of context and horizon together."""
        return self.context_length + self.horizon

    def to_dict(self) -> dict[str, Any]:
        """Return plain types; ``WindowSpec(**values)`` reads them back."""
        return {
            "context_length": self.context_length,
            "horizon": self.horizon,
            "stride": self.stride,
            "min_observed": self.min_observed,
        }


class WindowDataset:
    """Windows whose whole target lies in absolute rows ``[start, stop)``; the context may look back before ``start``.

    Windows never cross from one series into another. Within a series they follow in time, ``spec.stride`` rows apart,
    on cutoffs shared by all series and counted from the first possible one.

    Args:
        panel: the data.
        spec: sizes.
        start, stop: span of the targets, None = open.
        aligned: an item is one cutoff with a window of every series (in order of ``series_index``), for models that
            couple rows; series without data there are masked. ``batches`` then counts items, a batch has items x series
            rows.
        pad_context: also give windows with fewer past rows than ``context_length`` (at least one), masked at the front.
        only: bool [num_series], take the windows of these series as if there were no others; None = all.
        device, dtype: where and how the tensors live.

    Attributes:
        index: which windows there are.
        rows_per_item: 1, or the number of series when aligned.

    Raises:
        DataError: no window fits, or too few values are observed.
        ConfigError: ``only`` for aligned windows.
    """

    def __init__(
        self,
        panel: Panel,
        spec: WindowSpec,
        start: int | None = None,
        stop: int | None = None,
        *,
        aligned: bool = False,
        pad_context: bool = False,
        only: Bools | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if aligned and only is not None:
            raise ConfigError("aligned windows hold every series of the panel; give a panel of the series wanted")
        need = 1 if pad_context else spec.context_length
        index = count_windows(panel, spec.horizon, spec.stride, (start, stop), need=need, only=only, aligned=aligned)
        if not len(index):
            raise _nothing_fits(panel, spec, (start, stop), only)
        if spec.min_observed > 0:
            kept = keep_observed(panel, index, spec.horizon, spec.min_observed - _ROUNDING)
            if not len(kept):
                raise DataError(
                    f"none of {len(index)} windows has {spec.min_observed:.0%} of its target cells observed; lower "
                    "min_observed or shorten the horizon"
                )
            index = kept
        self._set(panel, spec, index, has_target=True, device=device, dtype=dtype)

    def _set(
        self,
        panel: Panel,
        spec: WindowSpec,
        index: WindowIndex,
        *,
        has_target: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.panel = panel
        self.spec = spec
        self.index = index
        self.rows_per_item = panel.num_series if index.aligned else 1
        self.has_target = has_target
        self.device = torch.device(device)
        self.dtype = dtype
        self._locator = WindowLocator(index, self.device)
        self._low, self._high = (
            torch.from_numpy(part).to(self.device) for part in (panel.indptr[:-1], panel.indptr[1:])
        )
        # the row of the panel where a context starts, less the cutoff
        self._shift = torch.from_numpy(panel.indptr[:-1] - panel.offset - spec.context_length).to(self.device)
        self._reach = spec.length if has_target or panel.schema.known else spec.context_length
        self._leaves_series = _leaves_series(panel, index, spec.context_length, self._reach)
        self._rows = panel.resident(self.device, dtype)
        self._versions = None if panel.versions is None else panel.versions.to(self.device, dtype)

    @classmethod
    def _of(cls, panel: Panel, spec: WindowSpec, index: WindowIndex, **options: Any) -> WindowDataset:
        windows = object.__new__(cls)
        windows._set(panel, spec, index, **options)
        return windows

    def __len__(self) -> int:
        """Return the number of items (windows, or cutoffs when aligned)."""
        return len(self.index)

    @property
    def series_index(self) -> Ints:
        """int64 [num_windows]: series of every window, item after item; worked out anew each time."""
        series: Ints = self._locator.locate(np.arange(len(self)))[0].cpu().numpy()
        return series

    @property
    def cutoff_index(self) -> Ints:
        """int64 [num_windows]: absolute row of every window's first forecast step; worked out anew each time."""
        cutoff: Ints = self._locator.locate(np.arange(len(self)))[1].cpu().numpy()
        return cutoff

    def select(self, items: Sequence[int] | Ints) -> WindowDataset:
        """Return the dataset of some items, in the given order."""
        return self._with(self.index.select(self._checked(items)), self.device)

    def to(self, device: torch.device | str) -> WindowDataset:
        """Return the same windows with their tensors on another device."""
        return self if torch.device(device) == self.device else self._with(self.index, device)

    def _with(self, index: WindowIndex, device: torch.device | str) -> WindowDataset:
        return WindowDataset._of(
            self.panel, self.spec, index, has_target=self.has_target, device=device, dtype=self.dtype
        )

    def _checked(self, items: Sequence[int] | Ints) -> Ints:
        chosen = np.asarray(items, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"items {chosen.min()} to {chosen.max()} asked of {len(self)}")
        return chosen

    def __getitems__(self, indices: Sequence[int] | Ints) -> Batch:
        """Return one batch with the windows of some items, gathered in one go.

        Shapes: see ``contracts.tensors.Batch``; B = items x ``rows_per_item``. Data units; unobserved targets are 0,
        unobserved covariates NaN.
        """
        first, series, cutoff = self._located(self._checked(indices))
        padded = self._leaves_series and bool(self._is_padded(first, series).any())
        return self._gather(first, series, cutoff, padded=padded)

    def _located(self, items: Numbers) -> tuple[Tensor, Tensor, Tensor]:
        """Return the panel row where each context starts, series and cutoff of the windows of some items."""
        series, cutoff = self._locator.locate(items)
        return cutoff + self._shift.index_select(0, series), series, cutoff

    def _is_padded(self, first: Tensor, series: Tensor) -> Tensor:
        """Return bool [B]: the window reaches beyond the rows of its series."""
        return (first < self._low.index_select(0, series)) | (first + self._reach > self._high.index_select(0, series))

    def _gather(self, first: Tensor, series: Tensor, cutoff: Tensor, *, padded: bool) -> Batch:
        low, high = (part.index_select(0, series) for part in (self._low, self._high)) if padded else (first, first)
        context, horizon = self.spec.context_length, self.spec.horizon
        data = self._rows

        def take(rows: Tensor, start: Tensor, length: int, fill: float = 0.0) -> Tensor:
            return take_padded(rows, start, length, low, high, fill) if padded else take_slices(rows, start, length)

        batch = Batch(
            context=take(data.target, first, context),
            context_mask=take(data.mask, first, context),
            target=take(data.target, first + context, horizon) if self.has_target else None,
            target_mask=take(data.mask, first + context, horizon) if self.has_target else None,
            past=None if data.past is None else take(data.past, first, context, nan),
            known=None if data.known is None else take(data.known, first, context + horizon, nan),
            static=None if data.static is None else data.static.index_select(0, series),
            series_index=series,
            cutoff_index=cutoff,
        )
        if self._versions is None:
            return batch
        low, high = self._low.index_select(0, series), self._high.index_select(0, series)
        return self._versions.apply(batch, first, low, high, (context, horizon))

    def batches(
        self, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield all items once in batches of ``batch_size`` items.

        Args:
            batch_size: items a batch; the last one may be smaller.
            shuffle: random order, fixed by ``seed`` (give another seed each epoch); 4 bytes an item.
            seed: seed of the order.
            drop_last: leave out a smaller last batch.

        Raises:
            ConfigError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        order: Numbers | None = None
        if shuffle:
            order = np.arange(len(self), dtype=smallest_type(len(self)))
            np.random.default_rng(derive_seed(seed, "windows")).shuffle(order)
        total = len(self) // batch_size * batch_size if drop_last else len(self)
        block = max(BLOCK // (batch_size * self.rows_per_item), 1) * batch_size  # located together: a step costs less
        for begin in range(0, total, block):
            end = min(begin + block, total)
            yield from self._block(np.arange(begin, end) if order is None else order[begin:end], batch_size)

    def _block(self, items: Numbers, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of some items that were not gathered yet."""
        first, series, cutoff = self._located(items)
        padded = self._is_padded(first, series).cpu().numpy() if self._leaves_series else None
        step = batch_size * self.rows_per_item
        for begin in range(0, len(series), step):
            part = slice(begin, begin + step)
            reaches_out = padded is not None and bool(padded[part].any())
            yield self._gather(first[part], series[part], cutoff[part], padded=reaches_out)

    def num_batches(self, batch_size: int, *, drop_last: bool = False) -> int:
        """Return how many batches ``batches`` yields."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)


def _leaves_series(panel: Panel, index: WindowIndex, before: int, reach: int) -> bool:
    """Return False when every window surely lies inside the rows of its series."""
    run, first, last = index.edges()
    start, stop = panel.offset, panel.offset + panel.lengths
    if index.aligned:
        return bool(first.min() - before < start.max() or last.max() - before + reach > stop.min())
    return bool((first - before < start[run]).any() or (last - before + reach > stop[run]).any())


def _context_rows(panel: Panel, spec: WindowSpec, series: Ints, cutoff: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the panel row where each context starts, and the rows [low, high) of its series."""
    low = panel.indptr[series]
    return low + cutoff - panel.offset[series] - spec.context_length, low, panel.indptr[series + 1]


class NoWindowError(DataError):
    """No series has rows enough for a window."""


def _nothing_fits(
    panel: Panel, spec: WindowSpec, span: tuple[int | None, int | None], only: Bools | None
) -> NoWindowError:
    lengths, inside = panel.lengths, np.diff(panel.rows(*span)[1])
    if only is not None:
        lengths, inside = lengths[only], inside[only]
    place = "" if span == (None, None) else f", of which {int(inside.max(initial=0))} in the span asked for"
    return NoWindowError(
        f"no window fits: context_length {spec.context_length} and horizon {spec.horizon} need {spec.length} rows in a "
        f"row ({spec.horizon} of them in the span), the longest of {len(lengths)} series has "
        f"{int(lengths.max(initial=0))}{place}; shorten them or bring more data"
    )


def last_windows(
    panel: Panel,
    spec: WindowSpec,
    cutoffs: TimeLike | Mapping[str, TimeLike] | None = None,
    *,
    aligned: bool = False,
    pad_context: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WindowDataset:
    """Return one window a series for prediction: the context ends at the cutoff, the batch has no target.

    Args:
        panel: the data, with known covariates over the horizon where the schema has any.
        spec: sizes; stride and min_observed play no part.
        cutoffs: last time that may be seen, one for all series or by series (then only those are given); default: each
            series' last row with an observed target (aligned: the latest of them for all).
        aligned: one item with a window of every series, see ``WindowDataset``.
        pad_context: mask the missing front of a series shorter than the context instead of refusing it.
        device, dtype: where and how the tensors live.

    Raises:
        DataError: an unknown series; nothing observed in a context, or too short a series; known covariates missing
            over the horizon.
    """
    series, cutoff = _cutoffs(panel, cutoffs, aligned=aligned)
    _check_contexts(panel, spec, series, cutoff, pad_context=pad_context, aligned=aligned)
    _check_known(panel, spec, series, cutoff)
    if aligned:  # one run of one cutoff
        index = WindowIndex(cutoff[:1], np.ones(1, dtype=np.int64), 1, panel.num_series, aligned=True)
    else:
        first, counts = np.zeros((2, panel.num_series), dtype=np.int64)
        first[series], counts[series] = cutoff, 1
        index = WindowIndex(first, np.cumsum(counts), 1, panel.num_series)
    return WindowDataset._of(panel, spec, index, has_target=False, device=device, dtype=dtype)


def windows_at(
    panel: Panel,
    spec: WindowSpec,
    series: Ints | None,
    cutoff: Ints,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WindowDataset:
    """Return windows without target that end where the caller says, in his order, masked where there are no rows.

    Args:
        panel: the data.
        spec: sizes; stride and min_observed play no part.
        series: [N] series of each window; None: aligned, every cutoff gives a window of every series.
        cutoff: [N] absolute row of the first forecast step.
        device, dtype: where and how the tensors live.
    """
    owner = np.zeros(len(cutoff), dtype=np.int64) if series is None else series
    runs = 1 if series is None else panel.num_series
    first = np.full(runs, np.iinfo(np.int64).max)
    last = np.full(runs, np.iinfo(np.int64).min)
    np.minimum.at(first, owner, cutoff)
    np.maximum.at(last, owner, cutoff)
    used = first <= last
    first, counts = np.where(used, first, 0), np.where(used, last - np.where(used, first, 0) + 1, 0)
    ends = np.cumsum(counts)
    index = WindowIndex(first, ends, 1, panel.num_series, aligned=series is None)
    index = index.select((ends - counts)[owner] + cutoff - first[owner])
    return WindowDataset._of(panel, spec, index, has_target=False, device=device, dtype=dtype)


def _cutoffs(panel: Panel, cutoffs: TimeLike | Mapping[str, TimeLike] | None, *, aligned: bool) -> tuple[Ints, Ints]:
    """Return series and absolute index of the first forecast row."""
    present = np.arange(panel.num_series) if aligned else np.flatnonzero(panel.lengths)
    if isinstance(cutoffs, Mapping):
        there = set(panel.series_ids)
        unknown = [name for name in cutoffs if name not in there]
        if unknown:
            raise DataError(
                f"unknown series {listing(unknown)}{nearest(str(unknown[0]), panel.series_ids)} in the cutoffs"
            )
        if aligned:
            raise ConfigError("aligned windows share one cutoff; give one time instead of one per series")
        present = np.array([index for index, name in enumerate(panel.series_ids) if name in cutoffs], dtype=np.int64)
        last = np.array([panel.grid.floor(cutoffs[panel.series_ids[index]]) for index in present], dtype=np.int64)
    elif cutoffs is not None:
        last = np.full(len(present), panel.grid.floor(cutoffs), dtype=np.int64)
    else:
        last = panel.last_observed()[present]
        if aligned:
            last = np.full(len(present), panel.span()[1] - 1, dtype=np.int64)
    return present, last + 1


def _check_contexts(
    panel: Panel, spec: WindowSpec, series: Ints, cutoff: Ints, *, pad_context: bool, aligned: bool
) -> None:
    running = np.concatenate([[0], np.cumsum(panel.target_observed.any(axis=1))])
    first, low, high = _context_rows(panel, spec, series, cutoff)
    seen = running[np.clip(first + spec.context_length, low, high)] - running[np.clip(first, low, high)]
    if not len(series) or (aligned and not seen.any()) or (not aligned and (seen == 0).any()):
        blind = [panel.series_ids[index] for index in series[seen == 0]]
        last = int(panel.last_observed()[series].max(initial=-1))
        late = 0 <= last < cutoff.min() - 1
        past = f"; the last target up to it is at {show_time(panel.grid.time_at(last))}" if late else ""
        raise DataError(
            f"{len(blind)} of {len(series)} series have no observed target in the {spec.context_length} rows up to the "
            f"cutoff ({listing(blind)}){past}; leave them out, move the cutoff or lengthen the context"
        )
    short = (first < low) & (not (pad_context or aligned))
    if short.any():
        index = int(np.flatnonzero(short)[0])
        rows = int(first[index] + spec.context_length - low[index])
        raise DataError(
            f"{int(short.sum())} of {len(series)} series have fewer than {spec.context_length} rows up to the cutoff "
            f"(first: '{panel.series_ids[series[index]]}' with {rows}); bring more history or "
            "allow padded contexts (cold_start=pad; of a batch forecast.cold_start=pad)"
        )


def _check_known(panel: Panel, spec: WindowSpec, series: Ints, cutoff: Ints) -> None:
    known = panel.observed[:, len(panel.schema.columns) - len(panel.schema.known) :]
    if not known.shape[1]:
        return
    first, low, high = _context_rows(panel, spec, series, cutoff)
    rows = (first + spec.context_length)[:, None] + np.arange(spec.horizon)  # [B, H]
    inside = (rows >= low[:, None]) & (rows < high[:, None])
    there = known[np.clip(rows, 0, panel.num_rows - 1)] & inside[..., None]  # [B, H, F]
    if there.all():
        return
    names = [name for name, full in zip(panel.schema.known, there.all(axis=(0, 1)), strict=True) if not full]
    row_missing = ~there.all(axis=2)
    window, step = (int(part[0]) for part in np.nonzero(row_missing))
    time = panel.grid.time_at(int(cutoff[window]) + step)
    raise DataError(
        f"known covariate(s) {listing(names)} are missing in {int(row_missing.sum())} of {row_missing.size} forecast "
        f"rows of {int(row_missing.any(axis=1).sum())} series (first: '{panel.series_ids[series[window]]}' at "
        f"{show_time(time)}); give their values for {spec.horizon} rows after the cutoff "
        "(tsforge ingest takes rows with these columns and empty targets)"
    )
