"""Forward passes of one constant shape, so that a forecast does not depend on which windows share its batch.

Matrix products round differently for batches of different sizes: a window forecast alone, among ten others or among
thousands differs in its last digits, and a stream could never equal a batch run. Here every pass holds the same number
of windows, missing ones filled up. That number is tried out on the network at hand: the same windows in other places
must give the same bits, else each window gets a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.forecasting.window_forecasts import evaluating, to_device
from tsforge.network import ForecastNetwork

CELLS = 65_536  # context and horizon cells of a pass: fast for many rows and still quick for one
SMALLEST, LARGEST = 8, 64
FORECAST = "forecast"
Compute: TypeAlias = Callable[[Batch], Sequence[Tensor]]
_SIZES: WeakKeyDictionary[ForecastNetwork, dict[tuple[str, int], int]] = WeakKeyDictionary()


def block_size(
    network: ForecastNetwork, together: int = 1, *, of: str = FORECAST, compute: Compute | None = None
) -> int:
    """Return the items of one pass: windows, or cutoffs with a window of every series where a model couples series.

    A power of two, 8 to 64 (from 1 on where series are coupled), by the cells of an item; 1 where the place of an item
    in its block shows in its forecast.

    Args:
        network: in any mode.
        together: windows an item, the number of series for models that couple them.
        of: name of what a pass computes.
        compute: what it computes of a batch, windows along the first axis; default: forecasts.
    """
    sizes, key = _SIZES.setdefault(network, {}), (of, together)
    if key not in sizes:
        sizes[key] = _found_size(network, together, compute)
    return sizes[key]


def _found_size(network: ForecastNetwork, together: int, compute: Compute | None) -> int:
    spec = network.spec
    fitting = CELLS // ((spec.context_length + spec.horizon) * spec.num_variates * together)
    smallest = SMALLEST if together == 1 else 1
    first = min(max(1 << max(fitting.bit_length() - 1, 0), smallest), LARGEST)
    sizes = dict.fromkeys((first, LARGEST) if together == 1 else (first,))
    return next((size for size in sizes if is_steady(network, size, together, compute)), 1)


@torch.no_grad()
def is_steady(network: ForecastNetwork, size: int, together: int = 1, compute: Compute | None = None) -> bool:
    """Return whether items keep every bit of what is computed of them (default: forecasts) wherever in a block and
    beside whatever they stand."""
    batch = to_device(_random_windows(network, size, together), network.param_offset.device)
    places = torch.arange(size)

    def forecast(one: Batch) -> list[Tensor]:
        found = [network.predict(one).mean]
        if network.likelihood.has_distribution and one.target is not None:
            found.append(network.log_tail(one, one.target))
        return found

    def of_items(one: Batch) -> list[Tensor]:
        found = (compute or forecast)(one)
        return [part.reshape(size, together, *part.shape[1:]) for part in found]

    with evaluating(network):
        first = of_items(batch)
        for order in (places.roll(1), places.roll(size // 2), places.flip(0)):
            moved = of_items(_taken(batch, order, together))
            if not all(_same(a, b[order]) for a, b in zip(moved, first, strict=True)):
                return False
        last = of_items(padded(_taken(batch, places[-1:], together), size, together))
        return all(_same(a[0], b[-1]) for a, b in zip(last, first, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether numbers are equal; what is missing on both sides is."""
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def _random_windows(network: ForecastNetwork, size: int, together: int) -> Batch:
    """Return items about the training level, every third with gaps; the caller's random state is not touched."""
    spec, scaler, generator = network.spec, network.scaler, torch.Generator().manual_seed(0)
    rows = size * together

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def values(steps: int) -> Tensor:
        return draw(rows, steps, spec.num_variates) * scaler.global_scale.cpu() + scaler.global_loc.cpu()

    context = values(spec.context_length)
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[::3] = draw(*mask[::3].shape) > -1.0
    return Batch(
        context=torch.where(mask, context, 0.0),
        context_mask=mask,
        target=values(spec.horizon),
        past=draw(rows, spec.context_length, spec.num_past) if spec.num_past else None,
        known=draw(rows, spec.context_length + spec.horizon, spec.num_known) if spec.num_known else None,
        static=draw(rows, spec.num_static) if spec.num_static else None,
        series_index=torch.zeros(rows, dtype=torch.int64),
        cutoff_index=torch.arange(size).repeat_interleave(together) + spec.context_length,
    )


def padded(batch: Batch, items: int, together: int = 1) -> Batch:
    """Return the batch filled up to so many items with copies of its last one at later cutoffs."""
    more = items - len(batch.context) // together
    if more <= 0:
        return batch
    parts = {
        name: torch.cat([part, *[part[-together:]] * more])
        for name, part in batch._asdict().items()
        if isinstance(part, Tensor)
    }
    if "cutoff_index" in parts:
        later = torch.arange(1, more + 1, device=batch.context.device)
        parts["cutoff_index"][-more * together :] += later if together == 1 else later.repeat_interleave(together)
    return batch._replace(**parts)


class Block:
    """One full block that is filled again and again: a stream that brings a window at a time copies only that one.

    What stands in the other places, windows from before, shows in no forecast (see ``is_steady``).
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def filled(self, batch: Batch, items: int) -> Batch:
        """Return ``items`` windows that begin with those of ``batch``, as many or fewer; valid until the next call.

        Batches of one ``Block`` have the same parts. For models that take windows one by one.
        """
        count = len(batch.context)
        if count >= items:
            return batch
        if self._batch is None or len(self._batch.context) != items:
            self._batch = padded(batch, items)
            return self._batch
        for whole, part in zip(self._batch, batch, strict=True):
            if isinstance(whole, Tensor) and isinstance(part, Tensor):
                whole[:count] = part
        return self._batch


def _taken(batch: Batch, items: Tensor, together: int) -> Batch:
    rows = (items[:, None] * together + torch.arange(together)).flatten().to(batch.context.device)
    parts = {name: part.index_select(0, rows) for name, part in batch._asdict().items() if isinstance(part, Tensor)}
    return batch._replace(**parts)
