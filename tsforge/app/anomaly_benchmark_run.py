"""One job of the anomaly benchmark: fit on the training rows of a series, score its test rows, grade by the labels.

The training rows are cut in time order: the first ``fit_share`` fits, the rest scales and calibrates. Models go the way
of a user, artifact -> ``detect`` (or ``ensemble_scores``); plain scorers get the same rows and the same rule.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.anomaly.baselines import BASELINES, build_baseline
from tsforge.anomaly.config import BudgetRule, DetectConfig, EventConfig, RuleConfig, TwoSidedSmoothing
from tsforge.anomaly.detector import detect
from tsforge.anomaly.ensemble import EnsembleConfig, combine, ensemble_scores, filled, plain_members
from tsforge.anomaly.segments import find_segments
from tsforge.anomaly.smoothing import Exponential, TwoSided
from tsforge.anomaly.thresholds import build_rule
from tsforge.app.anomaly_benchmark_data import LabelledSeries
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.fit_warnings import warn_of_rows
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.metrics.anomaly import auc_pr, detection_delays, event_score, hit_share
from tsforge.metrics.vus import vus

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
ROWS_WITHOUT_CLOCK = 10_000.0  # stands for a day where a source gives no clock
SMOOTHED = ", smoothed"
TWO_SIDED = ", two-sided"
BASELINES_LABEL = "baselines"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What all methods share: rows that fit, the rule, how events are made, the width of VUS, further rules by name."""

    fit_share: float
    rule: RuleConfig
    events: EventConfig
    width: int
    rules: tuple[tuple[str, RuleConfig], ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            "fit_share": self.fit_share,
            "rule": self.rule.model_dump(mode="json"),
            "events": self.events.model_dump(mode="json"),
            "width": self.width,
            "rules": {name: rule.model_dump(mode="json") for name, rule in self.rules},
        }

    def with_rule(self, rule: RuleConfig) -> Judgement:
        """Return the same with one of the further rules in place of its own."""
        return replace(self, rule=rule, rules=())

    def rule_for(self, data: LabelledSeries) -> RuleConfig:
        """Return the rule with the clock of the series; without one 10,000 rows stand for a day."""
        if not isinstance(self.rule, BudgetRule) or self.rule.points_per_day is not None:
            return self.rule
        return self.rule.model_copy(update={"points_per_day": data.rows_per_day or ROWS_WITHOUT_CLOCK})

    def fit_rows(self, data: LabelledSeries) -> int:
        """Return how many of the training rows fit."""
        return int(self.fit_share * len(data.train))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a method says of the test rows: scores [M], rows inside events [M], z [M, V] for ranking, if it has any.

    Attributes:
        latency: rows after a row until its score is known.
    """

    scores: FloatArray
    flagged: BoolArray
    z: FloatArray | None = None
    nominal: float | None = None
    latency: int = 0


@dataclass(frozen=True, kw_only=True)
class BaselineSetting:
    """All plain scorers of a series, raw, smoothed and if asked for to both sides, and ensembles of them alone.

    Variates that are constant over the training rows are left out; a missing value is the last one before it.
    """

    judgement: Judgement
    smoothing: float
    two_sided: bool = False
    seed: int = 0
    ensembles: tuple[tuple[str, EnsembleConfig], ...] = ()
    label: str = BASELINES_LABEL
    name: str = BASELINES_LABEL

    def plain(self) -> dict[str, Any]:
        """Return plain types, for the cache key and the log."""
        return {
            "kind": "baselines",
            "smoothing": self.smoothing,
            "two_sided": self.two_sided,
            "seed": self.seed,
            "ensembles": {name: config.model_dump(mode="json") for name, config in self.ensembles},
            **self.judgement.plain(),
        }

    def measure(self, data: LabelledSeries, *, progress: bool) -> dict[str, Any]:
        """Return one row a scorer, and one a scorer and further rule."""
        cut, known = self.judgement.fit_rows(data), len(data.train)
        kept = np.asarray(~np.isnan(data.train).all(axis=1))
        rows = filled(np.vstack([data.train, data.test]))
        varying = np.ptp(rows[:known][kept], axis=0) > 0.0
        rows = rows[:, varying]
        if not varying.any():
            raise DataError(f"{data.name}: every variate is constant over the training rows")
        fit, later = rows[:cut][kept[:cut]], np.vstack([rows[cut:known][kept[cut:]], rows[known:]])
        calibrating = int(kept[cut:].sum())
        found: list[dict[str, Any]] = []
        ruled: list[dict[str, Any]] = []

        def take(label: str, values: FloatArray, seconds: float, role: str, latency: int = 0) -> None:
            about = {"method": label, "role": role}

            def judged(part: Judgement) -> Scored:
                return judge(values, calibrating, data, part, latency)

            try:
                graded = grade_scores(judged(self.judgement), data, self.judgement.width)
            except DataError as error:  # too few calibration rows for one that knows later rows; others can be judged
                if not latency:
                    raise
                found.append({**about, "status": "failed", "error": str(error)})
                return
            found.append({**about, "seconds": seconds, "closed_form": True, **graded})
            ruled.extend(by_rule(about, data, self.judgement, judged))

        for name in BASELINES:
            season = data.season if name == "seasonal_naive" else None
            if name == "seasonal_naive" and (season is None or 2 * season > len(fit)):
                continue
            started = time.perf_counter()
            scorer = build_baseline(name, seed=self.seed, season_length=season).fit(fit)
            scores = scorer.score(later)
            seconds = time.perf_counter() - started
            take(name, scores, seconds, "baseline")
            if name == "random":
                continue
            take(name + SMOOTHED, Exponential(self.smoothing).run(scores), seconds, "baseline")
            if self.two_sided:
                reach = TwoSidedSmoothing(weight=self.smoothing).rows
                values = TwoSided(self.smoothing, reach).run(scores)
                values = np.pad(values, (0, len(scores) - len(values)), constant_values=np.nan)
                take(name + TWO_SIDED, values, seconds, "baseline", reach)
        for label, config in self.ensembles:
            started = time.perf_counter()
            try:
                scores = plain_ensemble(config, fit, later, calibrating, data.name)
            except DataError as error:  # the scorers alone can be judged all the same
                found.append({"method": label, "role": "model", "status": "failed", "error": str(error)})
                continue
            take(label, scores, time.perf_counter() - started, "model")
        return {"rows": found, "rules": ruled}


@dataclass(frozen=True, kw_only=True)
class ModelSetting:
    """A model on a series, judged by every recipe.

    Attributes:
        label: of the model. fit: settings of the fit but data and split. seed: of the training.
        recipes: name -> detector of a single residual score, or an ensemble.
    """

    name: str
    label: str
    fit: dict[str, Any]
    seed: int
    judgement: Judgement
    recipes: tuple[tuple[str, DetectConfig | EnsembleConfig], ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        """Return plain types, for the cache key and the log."""
        return {
            "kind": "model",
            "fit": self.fit,
            "seed": self.seed,
            "recipes": {name: config.model_dump(mode="json") for name, config in self.recipes},
            **self.judgement.plain(),
        }

    def measure(self, data: LabelledSeries, *, progress: bool) -> dict[str, Any]:
        """Return one row a recipe, which may say why it failed, and one a recipe and further rule."""
        started = time.perf_counter()
        artifact, closed_form = fit_series(data, self.fit, self.judgement, seed=self.seed, progress=progress)
        fitted = time.perf_counter() - started
        found: list[dict[str, Any]] = []
        ruled: list[dict[str, Any]] = []
        for recipe, config in self.recipes:
            started = time.perf_counter()
            about = {"method": f"{self.label}, {recipe}", "role": "model"}
            try:
                scored = run_recipe(artifact, data, config, self.judgement)
            except DataError as error:  # this recipe cannot score the series; the others can
                found.append({**about, "status": "failed", "error": str(error)})
                continue
            seconds = fitted + time.perf_counter() - started
            graded = grade_scores(scored, data, self.judgement.width)
            found.append({**about, "seconds": seconds, "closed_form": closed_form, **graded})
            judged = partial(run_recipe, artifact, data, config)
            ruled += by_rule(about, data, self.judgement, judged)
        return {"rows": found, "rules": ruled, "closed_form": closed_form}


def plain_ensemble(
    config: EnsembleConfig, fit: FloatArray, later: FloatArray, calibrating: int, series: str
) -> FloatArray:
    """Return the joined score of ``later`` rows by plain scorers of ``fit`` rows.

    Raises:
        DataError: nothing varies over the rows that fit, or too few rows calibrate.
    """
    moving = np.ptp(fit, axis=0) > 0.0
    if not moving.any():
        raise DataError(f"every variate of series '{series}' is constant over its {len(fit)} rows that fit")
    members = plain_members(config.plain, fit[:, moving], later[:, moving])
    return combine(members, calibrating, join=config.join, smoothing=config.smoothing, recentre=config.recentre)


def fit_series(
    data: LabelledSeries, settings: dict[str, Any], judgement: Judgement, *, seed: int, progress: bool = False
) -> tuple[Artifact, bool]:
    """Return the artifact fitted on the first rows of a series, and whether chance played no part."""
    cut, known = judgement.fit_rows(data), len(data.train)
    plain = {
        "data": {"name": "series", "source": {"kind": "parquet", "path": "in_memory.parquet"}},
        "split": {"kind": "counts", "counts": [cut, known - cut, 0]},
        "calibration": {"enabled": False, "dependence": "none"},
        "tracking": {"enabled": False},
        **settings,
    }
    plain["train"] = {**plain.get("train", {}), "seed": seed}
    with _without_notices(warn_of_rows.__module__):
        artifact, training = fit_frame(data.frame(test=False), validate(FitConfig, plain), progress=progress)
    return artifact, training.epochs == 0


def run_recipe(
    artifact: Artifact, data: LabelledSeries, config: DetectConfig | EnsembleConfig, judgement: Judgement
) -> Scored:
    """Return what a user would get of the test rows."""
    with _without_notices(detect.__module__):
        return _run_recipe(artifact, data, config, judgement)


@contextmanager
def _without_notices(module: str) -> Iterator[None]:
    """Keep what a fit or ``detect`` tells a user of one series out of a table of hundreds."""
    logger = logging.getLogger(module)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run_recipe(
    artifact: Artifact, data: LabelledSeries, config: DetectConfig | EnsembleConfig, judgement: Judgement
) -> Scored:
    frame, start = data.frame(test=True), len(data.train)
    if isinstance(config, EnsembleConfig):
        found = ensemble_scores(artifact, frame, config, start=start)[0]
        scored = judge(found.scores, found.known, data, judgement)
        z = np.stack([found.z[name] for name in data.columns], axis=1)[found.known :]
        return replace(scored, z=z)
    settings = config.model_copy(update={"rule": judgement.rule_for(data), "events": judgement.events})
    report = detect(artifact, frame, settings, start=start)
    table = report.scores.table
    scores = table.filter(pl.col("variate") == JOINT)["score"].fill_null(np.nan).to_numpy()
    z = np.stack(
        [table.filter(pl.col("variate") == name)["score"].fill_null(np.nan).to_numpy() for name in data.columns], axis=1
    )
    flagged = np.zeros(len(scores), dtype=bool)
    for first, last in report.events.select("start", "end").iter_rows():
        flagged[max(int(first) - start, 0) : int(last) - start + 1] = True
    nominal, latency = report.metadata["alarm_rate_nominal"], report.metadata["latency"]
    return Scored(scores=scores, flagged=flagged, z=z, nominal=nominal, latency=latency)


def judge(scores: FloatArray, known: int, data: LabelledSeries, judgement: Judgement, latency: int = 0) -> Scored:
    """Return the test rows of a score with its alarms.

    The rule is fitted on the first ``known`` scores but the last ``latency`` of them, which read test rows.
    """
    rule = build_rule(
        judgement.rule_for(data), low_factor=judgement.events.low_factor, season_length=data.season, num_series=1
    ).fit(scores[: max(known - latency, 0)])
    judged = scores[known:]
    flagged = np.zeros(len(judged), dtype=bool)
    for segment in find_segments(judged, rule.run(judged), judgement.events):
        flagged[segment.start : segment.end + 1] = True
    return Scored(scores=judged, flagged=flagged, nominal=rule.alpha, latency=latency)


def by_rule(
    about: dict[str, Any], data: LabelledSeries, judgement: Judgement, judged: Callable[[Judgement], Scored]
) -> list[dict[str, Any]]:
    """Return one row a further rule: what its alarms are worth, or why it cannot be fitted on this series."""
    rows = []
    for name, rule in judgement.rules:
        try:
            row = {"status": "ok", **grade_events(judged(judgement.with_rule(rule)), data)}
        except DataError as error:
            row = {"status": "failed", "error": str(error)}
        rows.append({**about, "rule": name, **row})
    return rows


def grade_scores(scored: Scored, data: LabelledSeries, width: int) -> dict[str, Any]:
    """Return every grade of one method on one series; rows without a score are left out of areas and counted.

    Returns:
        ``auc_pr, vus_pr`` (tsb, exact thresholds), ``vus_pr_reference``, ``chance`` (share of anomalous rows), None
        where all rows are of one kind; what ``grade_events`` returns; ``hits_100, hits_150, hit_events, hit_chance``
        (sums over listed events), ``unscored``.
    """
    labels, scores = data.labels, scored.scores
    if len(scores) != len(labels):
        raise DataError(f"{data.name}: {len(scores)} scores for {len(labels)} test rows; the last rows are unobserved")
    seen = ~np.isnan(scores)
    both = bool(labels[seen].any() and not labels[seen].all())
    found: dict[str, Any] = {
        "auc_pr": auc_pr(labels[seen], scores[seen]) if both else None,
        "vus_pr": vus(labels[seen], scores[seen], width=width).pr if both else None,
        "vus_pr_reference": vus(labels[seen], scores[seen], width=width, thresholds="reference").pr if both else None,
        "chance": float(labels[seen].mean()) if both else None,
        "unscored": int((~seen).sum()),
        **grade_events(scored, data),
    }
    return {**found, **_hits(scored.z, data.experts, data.columns)}


def grade_events(scored: Scored, data: LabelledSeries) -> dict[str, Any]:
    """Return what the alarms of a method are worth on one series.

    Returns:
        ``events, found, segments, false_segments, normal_rows, alarmed_normal_rows``, ``delays`` (list, rows,
        to when the alarm is known), ``rows``, ``rows_per_day``, ``nominal``.
    """
    labels = data.labels
    events = event_score(labels, scored.flagged)
    delays = detection_delays(labels, scored.flagged) if labels.any() else np.empty(0)
    return {
        "events": events.num_events,
        "found": events.found,
        "segments": events.num_segments,
        "false_segments": events.false_segments,
        "normal_rows": int((~labels).sum()),
        "alarmed_normal_rows": int((scored.flagged & ~labels).sum()),
        "delays": [float(delay) + scored.latency for delay in delays if np.isfinite(delay)],
        "rows": len(labels),
        "rows_per_day": data.rows_per_day,
        "nominal": scored.nominal,
    }


def _hits(
    z: FloatArray | None, experts: Sequence[tuple[int, int, tuple[str, ...]]], columns: Sequence[str]
) -> dict[str, Any]:
    """Return sums over all listed events of HitRate@100 % and @150 %, variates ranked by their largest |z| in it."""
    if z is None or not experts:
        return {"hits_100": None, "hits_150": None, "hit_events": 0, "hit_chance": None}
    hits_100, hits_150, chance = 0.0, 0.0, 0.0
    size = np.where(np.isnan(z), -1.0, np.abs(z))
    for first, last, wanted in experts:
        order = [columns[place] for place in np.argsort(-size[first:last].max(axis=0), kind="stable")]
        hits_100 += hit_share(order, wanted)
        hits_150 += hit_share(order, wanted, percent=150)
        chance += len(wanted) / len(columns)
    return {"hits_100": hits_100, "hits_150": hits_150, "hit_events": len(experts), "hit_chance": chance}
