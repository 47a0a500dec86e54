"""Accuracy of the UCR archive: the tolerance, ties, chance, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tsforge.core.errors import DataError
from tsforge.metrics.ucr import ucr_accuracy, ucr_correct


def at(row: int, *, size: int = 2000) -> np.ndarray:
    scores = np.linspace(0.0, 0.5, size)
    scores[row] = 1.0
    return scores


@pytest.mark.parametrize(("length", "margin"), [(1, 100), (60, 100), (300, 300)])
def test_the_event_is_widened_by_its_length_or_100_rows(length: int, margin: int) -> None:
    labels = np.zeros(2000, dtype=int)
    labels[800 : 800 + length] = 1
    last = 800 + length - 1
    right = {
        row: ucr_correct(labels, at(row)) for row in (799 - margin, 800 - margin, last + margin, last + margin + 1)
    }
    assert list(right.values()) == [False, True, True, False]
    assert ucr_accuracy([(labels, at(0))]).chance == pytest.approx((length + 2 * margin) / 2000)


def test_accuracy_is_the_share_of_series() -> None:
    labels = np.zeros(2000, dtype=int)
    labels[800:820] = 1
    found = ucr_accuracy([(labels, at(810)), (labels, at(5)), (labels, at(700)), (labels, at(1999))])
    assert (found.accuracy, found.num_series) == (0.5, 4)
    assert found.chance == pytest.approx(220 / 2000)


def test_a_random_score_is_right_as_often_as_chance_says() -> None:
    generator = np.random.default_rng(0)
    labels = np.zeros(1000, dtype=int)
    labels[500:520] = 1
    found = ucr_accuracy([(labels, generator.uniform(size=1000)) for _ in range(1000)])
    assert found.accuracy == pytest.approx(found.chance, abs=4 * np.sqrt(0.22 * 0.78 / 1000))


def test_rows_that_share_the_highest_score_must_all_be_right() -> None:
    labels = np.zeros(1000, dtype=int)
    labels[:20] = 1
    assert not ucr_correct(labels, np.zeros(1000))  # the first of all rows would be right by its place alone
    both = at(5, size=1000)
    both[90] = 1.0
    assert ucr_correct(labels, both)


def test_impossible_input_is_refused() -> None:
    labels = np.zeros(1000, dtype=int)
    labels[[10, 500]] = 1
    with pytest.raises(DataError, match="this one has 2"):
        ucr_correct(labels, np.zeros(1000))
    with pytest.raises(DataError, match="no series"):
        ucr_accuracy([])
    scores = at(10, size=1000)
    scores[3] = np.nan
    labels[500] = 0
    with pytest.raises(DataError, match="1 of 1000 scores are missing"):
        ucr_correct(labels, scores)
    assert ucr_correct(labels, scores, missing="drop")
