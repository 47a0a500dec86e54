"""Windows of a fit by span: what trains, what stops the training, what calibrates and what is graded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tsforge.core.errors import ConfigError, DataError
from tsforge.core.logs import get_logger
from tsforge.data.entities import Watch
from tsforge.data.grid import Bools
from tsforge.data.panel import Panel
from tsforge.data.splits import Splits
from tsforge.data.windows import WindowDataset, WindowSpec

_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Windows by span. None = no rows, or too few.

    Attributes:
        graded: by name of the metrics: ``train``, ``valid`` and ``test`` of the series of the fit, ``train_unseen`` ...
            of those held out.
        watched: what stops the training; the first half of the valid span, unless ``entities.watch`` says otherwise.
        calibration: what is left of the valid span for that; all of it where it is too short to be halved.
        is_shared: whether the rows that stop the training also calibrate, for want of others.
    """

    train: WindowDataset
    graded: dict[str, WindowDataset | None]
    watched: WindowDataset | None
    calibration: WindowDataset | None
    is_shared: bool = False


def make_spans(
    panel: Panel, spec: WindowSpec, watch: Watch, splits: Splits, held_out: Bools, *, aligned: bool
) -> Spans:
    """Return the windows of every span.

    Args:
        panel: all series.
        spec: of the training windows; graded windows have stride 1.
        watch: whose loss stops the training.
        splits: rows of the spans.
        held_out: [num_series], series that the fit does not rest on.
        aligned: windows of one cutoff come together.

    Raises:
        DataError: a span with rows, but none with a whole window of the series of the fit.
        ConfigError: nothing to watch of the kind asked for.
    """
    dense = replace(spec, stride=1)
    seen, unseen = (~held_out, held_out) if held_out.any() else (None, None)

    def part(span: tuple[int, int], name: str, only: Bools | None, spec: WindowSpec = dense) -> WindowDataset | None:
        if span[1] <= span[0]:
            return None
        try:
            return WindowDataset(panel, spec, *span, aligned=aligned, only=only)
        except DataError as error:
            whose = "" if only is None or only is seen else " of the held-out series"
            raise DataError(f"the {name} span{whose}: {error}") from error

    def unseen_part(span: tuple[int, int], name: str, spec: WindowSpec = dense) -> WindowDataset | None:
        try:
            return part(span, name, unseen, spec)
        except DataError as error:  # they may begin late or end early; the fit does not rest on them
            _LOG.warning("not graded: %s", error)
            return None

    train = WindowDataset(panel, spec, *splits.train, aligned=aligned, only=seen)
    graded = {"valid": part(splits.valid, "valid", seen), "test": part(splits.test, "test", seen)}
    if unseen is not None:
        graded |= {"train": train, "train_unseen": unseen_part(splits.train, "train", spec)}
        graded |= {f"{name}_unseen": unseen_part(getattr(splits, name), name) for name in ("valid", "test")}
    half = choosing_span(splits, spec.horizon)
    middle, last = half[1], splits.valid[1]
    halves = middle < last
    if watch in ("seen_train", "unseen_train"):
        watched = train if watch == "seen_train" else graded["train_unseen"]
        calibration = graded["valid"]
    else:
        watched = part(half, "valid", seen if watch == "seen_valid" else unseen)
        calibration = part((middle, last), "valid", seen) if halves else graded["valid"]
    if watched is None and watch != "seen_valid":
        raise ConfigError(
            f"entities.watch is '{watch}', but there is no window of that kind; change watch or the split"
        )
    shared = calibration is not None and watch == "seen_valid" and not halves
    return Spans(train=train, graded=graded, watched=watched, calibration=calibration, is_shared=shared)


def choosing_span(splits: Splits, horizon: int) -> tuple[int, int]:
    """Return the rows that stop a training: the first half of the valid span, all of it where that is too short."""
    first, last = splits.valid
    return (first, first + (last - first) // 2) if last - first >= 2 * horizon else splits.valid


def span_times(panel: Panel, span: list[int]) -> list[str] | None:
    """Return first and last time of a span of rows as text, None when it is empty."""
    if span[1] <= span[0]:
        return None
    return [str(panel.grid.time_at(row)) for row in (span[0], span[1] - 1)]
