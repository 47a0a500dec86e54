"""What a fit says of training rows that it can use but people should look at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from tsforge.contracts.tensors import TrainingSeries
from tsforge.core.errors import listing
from tsforge.core.logs import get_logger
from tsforge.data.grid import show_time
from tsforge.data.panel import Panel

_LOG = get_logger(__name__)
_FEWEST_VALUES = 30
_SHARE = 0.5


def warn_of_rows(panel: Panel, series: TrainingSeries) -> None:
    """Warn of variates and covariates without a single value to learn from, and of values that rule what is learnt.

    A dead sensor should not stop the fit of the others, and only people know whether a wild value happened.
    """
    targets = panel.schema.targets
    seen = series.mask.any(dim=0).tolist()
    if unseen := [name for name, any_value in zip(targets, seen, strict=True) if not any_value]:
        _LOG.warning(
            "%d of %d variates have no observed value in the training span (%s); what is forecast of them rests on "
            "nothing: fit on rows that hold some, or leave the target out",
            len(unseen),
            len(targets),
            listing(unseen),
        )
    kinds = ((panel.schema.past, series.past), (panel.schema.known, series.known))
    if absent := [name for names, values in kinds if values is not None for name in _unseen(names, values)]:
        _LOG.warning(
            "%d covariate(s) have no value in the training span (%s), each row taken as it was known at its time "
            "(data.publication_delay): nothing is learnt from them; fit on more rows, or leave them out",
            len(absent),
            listing(absent),
        )
    if wild := list(_ruling_values(panel, series)):
        _LOG.warning(
            "%d value(s) hold most of the variance of their variate in training, so scale and coefficients follow "
            "them: %s; if they are wrong, hide them with data.valid_range",
            len(wild),
            listing(wild),
        )


def _unseen(names: tuple[str, ...], values: Tensor) -> list[str]:
    """Return the columns [N, C] without a value."""
    empty = values.isnan().all(dim=0).tolist()
    return [name for name, is_empty in zip(names, empty, strict=True) if is_empty]


def warn_of_shared_rows(rows: int, horizon: int) -> None:
    """Warn that the same rows chose the model and calibrated it."""
    _LOG.warning(
        "the valid span of %d rows is too short to choose by one half and calibrate on the other: the same rows do "
        "both, so intervals may be too narrow; two horizons (%d rows) are needed to keep them apart",
        rows,
        2 * horizon,
    )


def _ruling_values(panel: Panel, series: TrainingSeries) -> Iterator[str]:
    """Yield the values that alone are more than half of the squared deviations of their series and variate."""
    bounds, offsets = series.indptr.tolist(), series.offset.tolist()
    for place, (start, stop, offset) in enumerate(zip(bounds, bounds[1:], offsets, strict=False)):
        mask = series.mask[start:stop].numpy()
        count = mask.sum(axis=0)
        if not (count >= _FEWEST_VALUES).any():
            continue
        values = np.where(mask, series.values[start:stop].numpy(), 0.0)
        squares = np.where(mask, np.square(values - values.sum(axis=0) / np.maximum(count, 1)), 0.0)
        largest = squares.max(axis=0)
        for column in np.flatnonzero((count >= _FEWEST_VALUES) & (largest > _SHARE * squares.sum(axis=0))).tolist():
            row = int(squares[:, column].argmax())
            usual = float(np.median(values[mask[:, column], column]))
            yield (
                f"{panel.schema.targets[column]} of '{panel.series_ids[place]}' at "
                f"{show_time(panel.grid.time_at(offset + row))}: {values[row, column]:g}, median {usual:g}"
            )
