"""Which rows fit, scale, calibrate and are scored: four stretches in time order, none reaching into the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import CalibrationConfig
from tsforge.artifact import Artifact
from tsforge.core.errors import ArtifactError, DataError
from tsforge.data.grid import TimeGrid, TimeLike, parse_time, show_time

ROWS_PER_VARIATE_SHARED = 20  # rows a variate from which one span may both scale and calibrate


@dataclass(frozen=True)
class ScoredSpan:
    """Absolute rows: the weights saw rows before ``train_stop``; rows ``[start, stop)`` are scored."""

    train_start: int
    train_stop: int
    start: int
    stop: int


@dataclass(frozen=True)
class SeriesSpans:
    """Scale rows and calibration rows of one series, absolute and half-open; shared = both are the same rows."""

    scale: tuple[int, int]
    calibration: tuple[int, int]
    is_shared: bool


def training_rows(artifact: Artifact) -> tuple[int, int]:
    """Return the absolute rows [start, stop) that the artifact's weights were fitted on.

    Raises:
        ArtifactError: its provenance does not say.
    """
    span = artifact.provenance.get("span_rows", {}).get("train")
    if span is None:
        raise ArtifactError(
            f"artifact {artifact.id} does not say which rows it was fitted on, so no row is known to be out of its "
            "sample; fit again with tsforge fit"
        )
    return int(span[0]), int(span[1])


def choose_span(artifact: Artifact, first: int, last: int, start: TimeLike | None, stop: TimeLike | None) -> ScoredSpan:
    """Return the rows to score.

    Args:
        artifact: its provenance says which rows trained and validated it.
        first, last: absolute rows of the frame's first row and last observed row.
        start: first time to score; default: the row after the artifact's validation span (so that it calibrates), or,
            without one, the middle of the rows after training.
        stop: last time to score, default the last observed row.

    Raises:
        DataError: nothing to score, or scoring would start inside the training span.
    """
    grid = artifact.grid
    if start is not None and stop is not None and grid.floor(stop) < grid.floor(start):
        raise DataError(f"stop {stop} lies before start {start}")
    train_start, train_stop = training_rows(artifact)
    end = last + 1 if stop is None else min(grid.floor(stop), last) + 1
    if start is not None:
        begin = first_row_from(grid, start)
    else:
        valid = artifact.provenance["span_rows"].get("valid")
        has_valid = valid is not None and valid[1] > valid[0] and valid[1] < end
        begin = int(valid[1]) if has_valid else (train_stop + end) // 2
    if begin < train_stop:
        raise DataError(
            f"scoring from {_shown(grid, begin)} would reach into the rows that fitted artifact {artifact.id} (up to "
            f"{_shown(grid, train_stop - 1)}); start later or fit on earlier rows"
        )
    if begin >= end or begin > last or end <= first:
        raise DataError(
            f"no row to score from {_shown(grid, begin)} to {_shown(grid, end - 1)}; the data runs from "
            f"{_shown(grid, first)} to {_shown(grid, last)}"
        )
    return ScoredSpan(train_start, train_stop, begin, end)


def series_spans(
    usable: NDArray[np.bool_],
    first_row: int,
    num_variates: int,
    config: CalibrationConfig,
    *,
    remembered: int = 0,
) -> SeriesSpans | int:
    """Return the scale and calibration rows of one series, or the number of usable rows that would be needed.

    The scale span is the first stretch after training, the calibration span the most recent one before scoring. Where
    rows do not suffice for both, one span may do both jobs if it has at least 20 rows a variate.

    Args:
        usable: for every row from ``first_row`` (the first after training) to the last before scoring: has a score.
        first_row: absolute.
        num_variates: V.
        config: sizes.
        remembered: rows that the memory of a score needs to set its scale, whatever the sizes say.
    """
    rows = np.flatnonzero(usable)
    end = first_row + usable.size
    least = max(config.min_scale_rows, remembered)
    needed = least + config.min_rows
    if rows.size >= needed:
        count = min(max(int(config.scale_share * rows.size), least), max(config.max_scale_rows, remembered))
        count = min(count, rows.size - config.min_rows)
        cut = int(rows[count])
        recent = int(rows[max(count, rows.size - config.max_rows)])
        return SeriesSpans((first_row + int(rows[0]), first_row + cut), (first_row + recent, end), False)
    shared = max(ROWS_PER_VARIATE_SHARED * num_variates, config.min_rows, remembered)
    if rows.size >= shared:
        both = (first_row + int(rows[0]), end)
        return SeriesSpans(both, both, True)
    return min(needed, shared)


def first_row_from(grid: TimeGrid, time: TimeLike) -> int:
    """Return the first row at or after a time."""
    row = grid.floor(time)
    return row if grid.time_at(row) == parse_time(time, integer=grid.is_integer) else row + 1


def _shown(grid: TimeGrid, row: int) -> str:
    return show_time(grid.time_at(row))
