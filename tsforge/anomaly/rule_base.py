"""What every threshold rule offers: fit, step, run, a JSON-ready state, and how decisions look."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
LONGEST_ALPHA = 0.5  # an event's low level is never below the median score
LEAD_ROWS = 1_000  # rows before the scored ones that are judged too, so that an event under way keeps its start and id


class Decision(NamedTuple):
    """One row judged: alarm if ``score > threshold``; an open event stays open while ``score > low``."""

    alarm: bool
    threshold: float
    low: float


class Decisions(NamedTuple):
    """Many rows judged; all arrays [N]."""

    alarm: NDArray[np.bool_]
    threshold: FloatArray
    low: FloatArray


class ThresholdRule(ABC):
    """A causal rule with serialisable state."""

    kind: str
    learns = False
    """Whether judged scores change later judgements."""
    extrapolates = False
    """Whether levels beyond the calibration sample come from a tail model, so that few rows do not limit them."""
    latency = 0
    """Rows that a score is late by: a rule that learns has none to be fitted on for so many before the judged ones."""

    @abstractmethod
    def fit(self, calibration: ArrayLike) -> Self:
        """Start from calibration scores in time order (NaN is left out); returns the rule itself."""

    @abstractmethod
    def step(self, score: float) -> Decision:
        """Judge one score, then learn from it where the rule learns."""

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order: the same as repeated ``step``, from the state as it is."""
        s = np.asarray(scores, dtype=np.float64).ravel()
        alarm, threshold, low = np.zeros(s.size, dtype=bool), np.empty(s.size), np.empty(s.size)
        step = self.step
        for i, score in enumerate(s.tolist()):
            alarm[i], threshold[i], low[i] = step(score)
        return Decisions(alarm, threshold, low)

    @property
    @abstractmethod
    def alpha(self) -> float | None:
        """Return the nominal share of alarms on normal rows, None where none is promised."""

    @abstractmethod
    def describe(self) -> str:
        """Return the rule and its settings in one canonical string, part of event ids."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return settings and memory as plain JSON types; ``restore_rule`` reads them back."""

    @classmethod
    @abstractmethod
    def restore(cls, state: dict[str, Any]) -> Self:
        """Return the rule whose ``state()`` this is; a missing field is a KeyError."""

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the report should know of the rule as it stands, plain JSON types."""
        return {}

    def warning(self) -> str:
        """Return why the rule cannot work as it stands, empty where it can."""
        return ""


class StaticRule(ThresholdRule):
    """A rule whose two levels stay what they were made.

    Attributes:
        threshold, low: NaN before ``fit``.
    """

    threshold = math.nan
    low = math.nan

    def step(self, score: float) -> Decision:
        """Judge one score."""
        return Decision(score > self.threshold, self.threshold, self.low)

    def run(self, scores: ArrayLike) -> Decisions:
        """Judge scores in time order."""
        s = np.asarray(scores, dtype=np.float64).ravel()
        with np.errstate(invalid="ignore"):
            return Decisions(s > self.threshold, np.full(s.size, self.threshold), np.full(s.size, self.low))


def upper_rank(alpha: float, size: int) -> int:
    """Return k such that the k-th largest of ``size`` scores is the ``ceil((1 - alpha)(size + 1))``-th smallest.

    Where that rank lies beyond the sample (alpha < 1 / (size + 1)) the largest score is taken: k = 1.
    """
    return max(1, min(size, math.floor(alpha * (size + 1) + 1e-9)))


def low_alpha(alpha: float, factor: float) -> float:
    """Return the share of rows above the level down to which an open event lasts."""
    return min(max(alpha, LONGEST_ALPHA), alpha * factor)


def calibration_sample(calibration: ArrayLike, kind: str) -> FloatArray:
    """Return the calibration scores that are numbers, in time order.

    Raises:
        DataError: there is none.
    """
    s = np.asarray(calibration, dtype=np.float64).ravel()
    s = s[~np.isnan(s)]
    if not s.size:
        raise DataError(f"rule {kind} needs calibration scores and got none that is a number")
    return s


def rows_that_leave(scores: int, latency: int = 0) -> str:
    """Return words for the calibration rows of which a rule that learns is fitted on so many scores.

    The newest ones, at most half of the rows, are judged together with the scored rows; so are ``latency`` rows before
    them, whose scores are late.
    """
    lead = min(LEAD_ROWS, scores + latency)
    waiting = f", {latency} before the judged ones, whose smoothed scores are late" if latency else ""
    return f"{scores + latency + lead} rows ({scores} to fit on{waiting}, and the newest {lead}, which are judged)"


def not_fitted(kind: str) -> DataError:
    """Return the error of a rule that judges before it was fitted."""
    return DataError(f"rule {kind} was not fitted; call fit(calibration) before step or run")
