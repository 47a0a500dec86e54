"""Score of the Numenta Anomaly Benchmark: early alarms in a window earn more, each false alarm costs.

Only meaningful on NAB's data, whose windows are made for it. 100 is an alarm on the first row of every window and none
elsewhere, 0 no alarm at all; false alarms lead below 0.

Source: Lavin and Ahmad (ICMLA 2015), with the constants of the released code (numenta/NAB, ``sweeper.py``): position
counted from one row past the window, scaled so that the first row earns exactly the full weight, -1 from 3 window
widths on and before the first window.
Deviation: the released code divides by zero at a false alarm after a window of one row; here it costs the full weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.anomaly import label_pair, runs_of

PROBATION_SHARE, PROBATION_ROWS = 0.15, 750
FAR = 3.0
Profile = Literal["standard", "low_fp", "low_fn"]


@dataclass(frozen=True)
class Weights:
    """What a found window earns at most, what a false alarm costs at most, what a missed window costs."""

    found: float
    false_alarm: float
    missed: float


PROFILES: dict[str, Weights] = {
    "standard": Weights(1.0, 0.11, 1.0),
    "low_fp": Weights(1.0, 0.22, 1.0),
    "low_fn": Weights(1.0, 0.11, 2.0),
}


@dataclass(frozen=True)
class NabScore:
    """The score of a set of series.

    Attributes:
        score: ``100 (raw - null) / (perfect - null)``.
        raw, null, perfect: sums over series of this detector, of one without alarms, and of a perfect one.
        num_windows, found, false_alarms: windows, those with an alarm, and alarmed rows outside; after the probation.
        profile: name of the weights.
    """

    score: float
    raw: float
    null: float
    perfect: float
    num_windows: int
    found: int
    false_alarms: int
    profile: Profile


def probation(num_rows: int) -> int:
    """Return how many rows at the start of a series are not graded: 15 %, at most 750."""
    return min(int(PROBATION_SHARE * num_rows), PROBATION_ROWS)


def nab_score(series: Sequence[tuple[ArrayLike, ArrayLike]], profile: Profile = "standard") -> NabScore:
    """Return the score of predictions over all series together.

    Args:
        series: labels and predictions of each, [N] with its own N; a window is a maximal run of labelled rows.
        profile: ``standard``, ``low_fp`` (false alarms cost double) or ``low_fn`` (missed windows cost double).

    Raises:
        ConfigError: unknown profile.
        DataError: no window after the probation in any series, or labels and predictions that do not fit.
    """
    if profile not in PROFILES:
        raise ConfigError(f"there is no profile {profile!r}; there are {', '.join(PROFILES)}")
    weights = PROFILES[profile]
    raw, windows, found, false_alarms = 0.0, 0, 0, 0
    for labels, predictions in series:
        earned, counts = _graded(*label_pair(labels, predictions), weights)
        raw += earned
        windows, found, false_alarms = windows + counts[0], found + counts[1], false_alarms + counts[2]
    if not windows:
        raise DataError(f"none of {len(series)} series has a labelled window after its probation; nothing to score")
    null, perfect = -weights.missed * windows, weights.found * windows
    score = 100.0 * (raw - null) / (perfect - null)
    return NabScore(score, raw, null, perfect, windows, found, false_alarms, profile)


def _graded(y: NDArray[np.bool_], p: NDArray[np.bool_], weights: Weights) -> tuple[float, tuple[int, int, int]]:
    """Return the raw score of one series, and its windows, found ones and false alarms."""
    start = probation(y.size)
    windows = runs_of(y)
    graded = [(a, b) for a, b in windows if b > start]
    raw, found = 0.0, 0
    for a, b in graded:
        alarms = np.flatnonzero(p[max(a, start) : b]) + max(a, start)
        if alarms.size:  # the earliest earns most
            raw += weights.found * _sigmoid(-(b - float(alarms[0])) / (b - a)) / _sigmoid(-1.0)
            found += 1
        else:
            raw -= weights.missed
    false_alarms = np.flatnonzero(p & ~y)
    false_alarms = false_alarms[false_alarms >= start]
    # an alarm before the first window has none to be near to
    position = np.full(false_alarms.size, FAR)
    if windows:
        begins, ends = np.array(windows).T
        last = np.searchsorted(ends, false_alarms, side="right") - 1
        widths = np.where(last >= 0, ends[last] - begins[last] - 1, 0)
        np.divide(false_alarms - ends[last] + 1, widths, out=position, where=widths > 0)
    raw += weights.false_alarm * float(sum(_sigmoid(where) for where in position))
    return raw, (len(graded), found, int(false_alarms.size))


def _sigmoid(position: float) -> float:
    return -1.0 if position >= FAR else float(2.0 / (1.0 + np.exp(5.0 * position)) - 1.0)
