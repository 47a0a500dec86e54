"""Range-based precision and recall: how much of each range is covered, where in it, and in how many pieces.

The numbers depend on every setting below, so a result carries its settings; compare only equal ones.

Source: Tatbul et al. (NeurIPS 2018), equations 4 to 7; ``tsb`` is what the TSB-AD leaderboard calls R-based-F1.
Legend: alpha weight of having been found at all, L length of a range, i = 1 .. L row in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import ConfigError
from tsforge.metrics.anomaly import BoolArray, harmonic_mean, label_pair, runs_of

FloatArray = NDArray[np.float64]
Bias = Literal["flat", "front", "middle", "back"]
Cardinality = Literal["one", "reciprocal"]
BIASES = ("flat", "front", "middle", "back")


@dataclass(frozen=True, kw_only=True)
class RangeSetting:
    """What a range earns.

    Attributes:
        alpha: weight in [0, 1] of an event being touched at all, in recall; precision has no such reward.
        bias: weight of row i of an event: ``flat`` 1, ``front`` L - i + 1, ``back`` i, ``middle`` i in its first half
            and L - i + 1 in the second. ``precision_bias``: the same for predicted ranges.
        cardinality: factor for a range that overlaps x > 1 ranges of the other kind: 1 or 1 / x.
    """

    alpha: float = 0.0
    bias: Bias = "flat"
    precision_bias: Bias = "flat"
    cardinality: Cardinality = "reciprocal"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is {self.alpha}; it must lie in [0, 1]")
        if self.bias not in BIASES or self.precision_bias not in BIASES:
            raise ConfigError(f"bias {self.bias!r}, precision_bias {self.precision_bias!r}; there are {BIASES}")
        if self.cardinality not in ("one", "reciprocal"):
            raise ConfigError(f"cardinality {self.cardinality!r}; there are 'one' and 'reciprocal'")


RANGE_PRESETS: dict[str, RangeSetting] = {
    "overlap": RangeSetting(),
    "early": RangeSetting(bias="front"),
    "tsb": RangeSetting(alpha=0.2),
}


@dataclass(frozen=True)
class RangeScore:
    """Mean over predicted ranges, mean over events, harmonic mean, and the setting they hold for.

    Precision is NaN without a predicted range, recall without an event, and f1 where either is.
    """

    precision: float
    recall: float
    f1: float
    setting: RangeSetting


def range_score(labels: ArrayLike, predictions: ArrayLike, setting: RangeSetting | str = "tsb") -> RangeScore:
    """Return range-based precision, recall and F1 of predictions [N].

    Args:
        setting: what a range earns, or the name of one of ``RANGE_PRESETS``.

    Raises:
        ConfigError: unknown preset.
        DataError: different lengths, or values other than 0 and 1.
    """
    if isinstance(setting, str):
        if setting not in RANGE_PRESETS:
            raise ConfigError(f"there is no range setting {setting!r}; there are {', '.join(RANGE_PRESETS)}")
        setting = RANGE_PRESETS[setting]
    y, p = label_pair(labels, predictions)
    precision = _rewards(p, y, setting.precision_bias, setting.cardinality)
    recall = _rewards(y, p, setting.bias, setting.cardinality)
    touched = np.array([p[a:b].any() for a, b in runs_of(y)])
    recall = setting.alpha * touched + (1.0 - setting.alpha) * recall
    found = float(precision.mean()) if precision.size else float("nan")
    covered = float(recall.mean()) if recall.size else float("nan")
    return RangeScore(found, covered, harmonic_mean(found, covered), setting)


def _rewards(ranges: BoolArray, other: BoolArray, bias: Bias, cardinality: Cardinality) -> FloatArray:
    """Return, for every range, its weighted covered share times its cardinality factor."""
    rewards = []
    for start, stop in runs_of(ranges):
        covered = other[start:stop]
        weights = _weights(stop - start, bias)
        pieces = len(runs_of(covered))
        factor = 1.0 / pieces if cardinality == "reciprocal" and pieces > 1 else 1.0
        rewards.append(factor * float(weights[covered].sum() / weights.sum()))
    return np.array(rewards, dtype=np.float64)


def _weights(length: int, bias: Bias) -> FloatArray:
    rising = np.arange(1, length + 1, dtype=np.float64)
    if bias == "flat":
        return np.ones(length)
    if bias == "back":
        return rising
    falling = rising[::-1]
    return falling if bias == "front" else np.where(rising <= length / 2.0, rising, falling)
