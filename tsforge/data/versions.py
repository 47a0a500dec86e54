"""Cells of a panel that were published more than once, or late: what a window may see of them.

A window whose last context row is ``q`` sees of every cell the last version that was out at the moment of ``q``. Most
rows of a window are settled by then: their last version was out, so the panel's own value holds. Only the others are
looked up, by one binary search in the sorted list of all versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class PanelVersions:
    """Versions of the cells of a panel.

    Attributes:
        settled: int64 [N], of each panel row the absolute grid row from which on its last versions are visible.
        keys: int64 [M], ascending: ``cell * span + due - first`` of each version.
        values: [M], the value of each version; NaN where it says that the value is not to be seen.
        columns: columns of the panel that have versions; the cell of row r and the j-th of them is ``r * J + j``.
        first, span: lowest ``due`` and the number that tells cells apart in ``keys``.
    """

    settled: Tensor
    keys: Tensor
    values: Tensor
    columns: tuple[int, ...]
    first: int
    span: int

    @classmethod
    def build(
        cls,
        num_rows: int,
        parts: Sequence[tuple[int, Ints, Ints, Floats]],
        *,
        first: int,
        stop: int,
    ) -> PanelVersions:
        """Return the versions of a panel of ``num_rows`` rows.

        Args:
            num_rows: N.
            parts: for each column its number, and panel row, due and value of its versions; ``due`` is the first
                absolute grid row whose moment is not before the publication. Sorted by row, then by publication.
            first, stop: absolute grid rows between which every ``due`` lies, ``stop`` included.
        """
        span, width = stop - first + 1, len(parts)
        settled = np.full(num_rows, np.iinfo(np.int64).min)
        keys, values = [], []
        for place, (_, rows, due, value) in enumerate(parts):
            np.maximum.at(settled, rows, due)
            keys.append((rows * width + place) * span + due - first)
            values.append(value)
        key = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
        value = np.concatenate(values) if values else np.zeros(0)
        order = np.argsort(key, kind="stable")  # versions due at one row keep their order: the last one counts
        return cls(
            torch.from_numpy(settled),
            torch.from_numpy(key[order]),
            torch.from_numpy(value[order]),
            tuple(part[0] for part in parts),
            first,
            span,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> PanelVersions:
        """Return the same versions on a device, values in ``dtype``."""
        return PanelVersions(
            self.settled.to(device),
            self.keys.to(device),
            self.values.to(device, dtype),
            self.columns,
            self.first,
            self.span,
        )

    def lookup(self, rows: Tensor, last: Tensor) -> Tensor:
        """Return [M, J]: the cells of panel rows [M] as a window with last context row ``last`` [M] sees them."""
        width = len(self.columns)
        cell = rows[:, None] * width + torch.arange(width, device=rows.device)
        seen = (last - self.first).clamp(-1, self.span - 1)[:, None]  # -1: before anything was out
        place = torch.searchsorted(self.keys, cell * self.span + seen, right=True) - 1
        inside = (place >= 0) & (seen >= 0)
        place = place.clamp(min=0)
        found = inside & (self.keys[place] // self.span == cell)
        return torch.where(found, self.values[place], nan)

    def apply(self, batch: Batch, first: Tensor, low: Tensor, high: Tensor, sizes: tuple[int, int]) -> Batch:
        """Return the batch with every cell as it was known at the moment of its window's last context row.

        Targets of the horizon stay: they are what the forecast is graded against.

        Args:
            batch: as gathered from the panel; its tensors are changed in place.
            first: panel row where each context starts [B].
            low, high: rows [low, high) of each window's series [B].
            sizes: context length and horizon.
        """
        if batch.cutoff_index is None:
            return batch
        context = sizes[0]
        length = context + (sizes[1] if batch.known is not None else 0)
        rows = first[:, None] + torch.arange(length, device=first.device)  # [B, T]
        last = batch.cutoff_index - 1
        late = (rows >= low[:, None]) & (rows < high[:, None])
        late &= self.settled[rows.clamp(0, len(self.settled) - 1)] > last[:, None]
        window, step = late.nonzero(as_tuple=True)
        if not len(window):
            return batch
        values = self.lookup(rows[window, step], last[window])
        self._put(batch, values, window, step, context)
        return batch

    def _put(self, batch: Batch, values: Tensor, window: Tensor, step: Tensor, context: int) -> None:
        num_targets = batch.context.shape[-1]
        num_past = 0 if batch.past is None else batch.past.shape[-1]
        inside = step < context
        for place, column in enumerate(self.columns):
            value = values[:, place]
            if column >= num_targets + num_past:
                if batch.known is not None:
                    batch.known[window, step, column - num_targets - num_past] = value
                continue
            at = (window[inside], step[inside])
            value = value[inside]
            if column >= num_targets and batch.past is not None:
                batch.past[(*at, column - num_targets)] = value
            elif column < num_targets:
                batch.context[(*at, column)] = value.nan_to_num(nan=0.0)
                batch.context_mask[(*at, column)] = ~value.isnan()
