"""Range-based precision and recall worked by hand, their settings, and the presets."""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.range_based import RANGE_PRESETS, RangeSetting, range_score

LABELS = np.array([0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0])
ALARMS = np.array([0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1])


def recall(**settings: object) -> float:
    return range_score(LABELS, ALARMS, RangeSetting(**settings)).recall


def test_by_hand() -> None:
    """Two ranges hit event 1 (4 rows) in its rows 1 and 3, none hits event 2; 2 of 3 predicted ranges are right."""
    assert recall(cardinality="one") == pytest.approx(0.5 * (2 / 4))
    assert recall() == pytest.approx(0.5 * (2 / 4) / 2)
    assert recall(alpha=1.0) == pytest.approx(0.5)
    assert recall(alpha=0.2) == pytest.approx(0.5 * (0.2 + 0.8 * 0.25))
    assert recall(cardinality="one", bias="front") == pytest.approx(0.5 * (4 + 2) / 10)
    assert recall(cardinality="one", bias="back") == pytest.approx(0.5 * (1 + 3) / 10)
    assert recall(cardinality="one", bias="middle") == pytest.approx(0.5 * (1 + 2) / 6)
    found = range_score(LABELS, ALARMS)
    assert found.precision == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 * (2 / 3) * 0.2 / (2 / 3 + 0.2))
    assert found.setting == RANGE_PRESETS["tsb"] == RangeSetting(alpha=0.2)


def test_precision_has_its_own_bias_and_no_reward_for_existence() -> None:
    labels, alarms = np.array([0, 0, 1, 1, 0]), np.array([0, 1, 1, 1, 0])
    assert range_score(labels, alarms, RangeSetting(alpha=1.0)).precision == pytest.approx(2 / 3)
    assert range_score(labels, alarms, RangeSetting(precision_bias="front")).precision == pytest.approx(3 / 6)
    assert range_score(labels, alarms, RangeSetting(bias="front")).precision == pytest.approx(2 / 3)


def test_a_share_of_nothing_is_missing() -> None:
    silent = range_score(LABELS, 0 * LABELS)
    assert np.isnan(silent.precision)
    assert np.isnan(silent.f1)
    assert silent.recall == 0.0
    assert np.isnan(range_score(0 * LABELS, ALARMS).recall)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no range setting 'best'; there are overlap, early, tsb"):
        range_score(LABELS, ALARMS, "best")
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        RangeSetting(alpha=1.5)
    with pytest.raises(ConfigError, match="bias 'left'"):
        RangeSetting(bias="left")
    with pytest.raises(ConfigError, match="cardinality 'two'"):
        RangeSetting(cardinality="two")
    with pytest.raises(DataError, match="11 labels but 2 predictions"):
        range_score(LABELS, [0, 1])
