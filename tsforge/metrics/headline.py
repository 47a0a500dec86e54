"""The numbers by which a detector is reported, each with what a random score gets on the same rows.

A number without its chance level says nothing: a random score has VUS-ROC 0.72 on one of the public families. All of
it is per series; average over series afterwards, and put the best baseline's row beside it the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tsforge.core.errors import ConfigError, DataError
from tsforge.metrics.affiliation import affiliation
from tsforge.metrics.anomaly import (
    BoolArray,
    FloatArray,
    Missing,
    auc_pr,
    best_f1,
    delay_summary,
    event_score,
    label_pair,
    scored_rows,
)
from tsforge.metrics.vus import Thresholds, Variant, vus

HEADLINE = ("auc_pr", "vus_pr", "event_precision", "event_recall", "false_events_per_day", "median_delay_rows")
SECONDARY = ("event_precision_penalised", "vus_roc", "affiliation_precision", "affiliation_recall", "best_f1")


@dataclass(frozen=True, kw_only=True)
class GradeSetting:
    """How a series is graded; every number depends on it, so a result carries it.

    Attributes:
        rows_per_day: rows of one series in a day; without it false events per day are NaN.
        width, variant, thresholds: of VUS.
        missing: what a missing score is, see ``scored_rows``. Alarms count in all rows, scored or not.
        lead: rows before an event in which an alarm is an early warning.
        seed, draws: of the random score, and over how many of them its numbers are averaged.
    """

    rows_per_day: float | None = None
    width: int = 100
    variant: Variant = "tsb"
    thresholds: Thresholds = "exact"
    missing: Missing = "refuse"
    lead: int = 0
    seed: int = 0
    draws: int = 5

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}; a random score needs at least one")
        if self.rows_per_day is not None and not self.rows_per_day > 0.0:
            raise ConfigError(f"rows_per_day is {self.rows_per_day}; it must be positive or left out")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One detector on one series.

    Attributes:
        values, random: by name, those of ``HEADLINE`` then those of ``SECONDARY``; ``random`` is the mean over draws of
            uniform scores, whose alarms are as many of their highest rows as the detector alarmed. NaN where nothing
            was there to be averaged (no alarm, no event found).
        num_rows, num_events, num_missing: graded rows, labelled events, rows without a score.
    """

    values: dict[str, float]
    random: dict[str, float]
    num_rows: int
    num_events: int
    num_missing: int
    setting: GradeSetting

    def row(self) -> dict[str, float]:
        """Return all numbers in one record: ``auc_pr``, ``auc_pr_random``, ..."""
        return {key: part for name in self.values for key, part in self._beside(name)}

    def _beside(self, name: str) -> tuple[tuple[str, float], tuple[str, float]]:
        return (name, self.values[name]), (f"{name}_random", self.random[name])

    def __str__(self) -> str:
        """Return a table, and under it what the numbers depend on."""
        lines = [f"{'':26}{'detector':>10}{'random':>10}"]
        lines += [f"{name:26}{self.values[name]:10.4g}{self.random[name]:10.4g}" for name in self.values]
        s = self.setting
        lines += [
            f"rows {self.num_rows}, events {self.num_events}, without a score {self.num_missing} ({s.missing})",
            f"VUS: W = {s.width}, variant {s.variant}, {s.thresholds} thresholds; delay: lead {s.lead} rows",
            f"random: {s.draws} uniform scores, seed {s.seed}, as many alarmed rows as the detector",
        ]
        return "\n".join(lines)


def headline(
    labels: ArrayLike, scores: ArrayLike, predictions: ArrayLike, setting: GradeSetting | None = None
) -> Headline:
    """Return the reported numbers of one series, with those of a random score beside them.

    Args:
        labels: [N] of 0 and 1. scores: [N], larger = stranger. predictions: [N] alarms at the deployed threshold.

    Raises:
        ConfigError: an impossible setting.
        DataError: different lengths, values other than 0 and 1, missing scores to be refused, no counted row of one
            kind.
    """
    setting = setting or GradeSetting()
    y, p = label_pair(labels, predictions)
    raw = np.asarray(scores, dtype=np.float64).ravel()
    absent = np.isnan(raw)
    scored_rows(y, raw, missing=setting.missing)
    generator = np.random.default_rng(setting.seed)
    chances = []
    for _ in range(setting.draws):
        drawn = generator.uniform(size=y.size)
        alarms = np.zeros(y.size, dtype=bool)
        alarms[np.argsort(-drawn)[: int(p.sum())]] = True
        chances.append(_numbers(y, np.where(absent, np.nan, drawn), alarms, setting))
    return Headline(
        values=_numbers(y, raw, p, setting),
        random=mean_of(chances),
        num_rows=y.size,
        num_events=event_score(y, p).num_events,
        num_missing=int(absent.sum()),
        setting=setting,
    )


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over records (draws, series), those that are NaN left out.

    Raises:
        DataError: no record, or records of different numbers.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise DataError(f"{len(rows)} records; a mean needs at least one, and the same numbers in all")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: float("nan") if np.isnan(column).all() else float(np.nanmean(column)) for name, column in columns.items()
    }


def _numbers(y: BoolArray, scores: FloatArray, p: BoolArray, setting: GradeSetting) -> dict[str, float]:
    """Return the numbers of ``HEADLINE`` and ``SECONDARY`` by name."""
    events = event_score(y, p)
    volume = vus(
        y,
        scores,
        width=setting.width,
        variant=setting.variant,
        thresholds=setting.thresholds,
        missing=setting.missing,
    )
    near = affiliation(y, p)
    days = float("nan") if setting.rows_per_day is None else y.size / setting.rows_per_day
    return {
        "auc_pr": auc_pr(y, scores, missing=setting.missing),
        "vus_pr": volume.pr,
        "event_precision": events.precision,
        "event_recall": events.recall,
        "false_events_per_day": events.false_segments / days,
        "median_delay_rows": delay_summary(y, p, lead=setting.lead).median,
        "event_precision_penalised": events.penalised_precision,
        "vus_roc": volume.roc,
        "affiliation_precision": near.precision,
        "affiliation_recall": near.recall,
        "best_f1": best_f1(y, scores, missing=setting.missing).f1,
    }
