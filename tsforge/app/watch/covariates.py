"""Covariates that rows come without: a network takes the gap for an ordinary value, so somebody must be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl

from tsforge.core.errors import listing
from tsforge.core.logs import get_logger
from tsforge.forecasting.stream_rows import StreamPlace

_LOG = get_logger(__name__)


def missing_cells(rows: pl.DataFrame, place: StreamPlace) -> dict[str, int]:
    """Return covariate -> in how many rows it is missing; a known one may have been told before its row.

    Args:
        rows: ``series_id, time`` and covariates of rows to be taken.
        place: of the detector before it takes them.
    """
    found: dict[str, int] = {}
    if not rows.height:
        return found
    for name in rows.columns[2:]:
        missing = rows[name].is_null().to_numpy()
        if name in place.schema.known and place.ahead is not None:
            missing &= ~_was_told(rows, place, place.schema.known.index(name))
        if missing.any():
            found[name] = int(missing.sum())
    return found


def _was_told(rows: pl.DataFrame, place: StreamPlace, column: int) -> npt.NDArray[np.bool_]:
    """Return of which rows a known covariate was told with earlier ones."""
    assert place.ahead is not None
    told = ~np.isnan(place.ahead[:, :, column].numpy())
    series = np.array([place.series[name] for name in rows["series_id"]], dtype=np.int64)
    step = place.grid.index_of(rows["time"]) - place.last[series] - 1
    inside = step < told.shape[1]
    found: npt.NDArray[np.bool_] = inside & told[series, np.where(inside, step, 0)]
    return found


class MissingCovariates:
    """Counts of a turn; a covariate is warned of once a run."""

    def __init__(self) -> None:
        self._turn: Counter[str] = Counter()
        self._told: set[str] = set()

    def add(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Count; return the words for it."""
        self._turn.update(counts)
        return {f"missing in rows taken: covariate '{name}'": count for name, count in counts.items()}

    def clear(self) -> None:
        """Forget a turn that has to be taken again."""
        self._turn.clear()

    def tell(self, taken: int) -> None:
        """Warn of covariates that the rows of the turn lack."""
        fresh = {name: count for name, count in self._turn.items() if name not in self._told}
        self._turn.clear()
        if not fresh:
            return
        self._told.update(fresh)
        named = listing(f"covariate '{name}' was missing in {count}" for name, count in fresh.items())
        _LOG.warning("%s of %s rows taken: scores are less sure; see that the source sends it", named, taken)
