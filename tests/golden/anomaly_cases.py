"""Random labelled series for the comparison of anomaly metrics with other implementations; NumPy only.

``write_anomaly_oracles.py`` grades them in an environment with the other packages, the tests with ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_CASES = 125  # a fifth of them all anomalous, which only grades of alarms can have
KINDS = ("borders", "neighbours", "single rows", "all", "mixed")
PERCENTS = (0, 20, 50, 100)
RANGE_SETTINGS = [(0.0, "flat", "one"), (0.2, "flat", "reciprocal"), (0.3, "front", "reciprocal")]
RANGE_SETTINGS += [(0.0, "back", "one"), (0.5, "middle", "reciprocal")]


@dataclass(frozen=True)
class Case:
    """Labels [N] and scores [N], alarms [N] at a quantile of the scores, and the buffer width for VUS.

    ``checksum`` tells whether the same numbers were drawn where the other packages graded them.
    """

    kind: str
    labels: np.ndarray
    scores: np.ndarray
    alarms: np.ndarray
    width: int

    @property
    def checksum(self) -> float:
        places = np.arange(1, self.labels.size + 1)
        return float(places @ self.labels + places @ self.scores + places @ self.alarms)


def case(number: int) -> Case:
    """Return one of the cases; every second one has ties, every fourth more rows than the reference has thresholds."""
    generator = np.random.default_rng(1000 + number)
    kind = KINDS[number % len(KINDS)]
    n = int(generator.integers(270, 330)) if number % 4 == 3 else int(generator.integers(25, 110))
    labels = np.zeros(n, dtype=int)
    if kind == "all":
        labels[:] = 1
    elif kind == "borders":
        labels[: int(generator.integers(1, 7))] = 1
        labels[-int(generator.integers(1, 7)) :] = 1
    elif kind == "neighbours":  # one normal row between events
        start = int(generator.integers(2, n - 15))
        for _ in range(3):
            length = int(generator.integers(1, 4))
            labels[start : start + length] = 1
            start += length + 1
    elif kind == "single rows":
        labels[generator.choice(n, size=int(generator.integers(1, 4)), replace=False)] = 1
    else:
        for _ in range(int(generator.integers(1, 6))):
            start = int(generator.integers(0, n))
            labels[start : start + int(generator.integers(1, 12))] = 1
        labels[int(generator.integers(0, n))] = 0  # never all
    if not labels.any():
        labels[n // 2] = 1
    scores = generator.uniform(size=n) + 0.4 * labels * generator.uniform(size=n)
    if number % 2:
        scores = np.round(scores, 1)
    alarms = scores >= np.quantile(scores, float(generator.uniform(0.6, 0.97)))
    return Case(kind, labels, scores, alarms.astype(int), int(generator.integers(1, 17)))


def cases() -> list[Case]:
    return [case(number) for number in range(NUM_CASES)]


def one_event(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with one event, and scores whose highest row lies in it, near it or far away."""
    generator = np.random.default_rng(5000 + number)
    labels = np.zeros(900, dtype=int)
    start = int(generator.integers(0, 895))
    labels[start : start + int(generator.integers(1, 160))] = 1
    scores = generator.uniform(size=900)
    scores[int(np.clip(start + generator.integers(-250, 350), 0, 899))] = 2.0
    return labels, scores


def periodic(number: int) -> np.ndarray:
    """Return a series with a period of 2 to 380 rows, in noise of different size, some too short to show it."""
    generator = np.random.default_rng(9000 + number)
    rows = np.arange(int(generator.integers(20, 3000)))
    period = float(generator.uniform(2, 60) if number % 2 else generator.uniform(60, 380))
    noise = generator.normal(size=rows.size) * float(generator.uniform(0.0, 1.5))
    return np.sin(2 * np.pi * rows / period) + noise + 0.002 * rows * (number % 3 == 0)


def lowered(scores: np.ndarray) -> list[float]:
    """Return thresholds t for which ``scores > t`` gives the alarms of every distinct threshold of ``scores >= s``."""
    return [-np.inf, *np.unique(scores)[:-1].tolist()]
