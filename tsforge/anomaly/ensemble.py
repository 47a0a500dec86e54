"""Several scores as one: each member in a unit of its own on normal rows, their mean, then smoothed.

    ratio     S = smooth(mean_k s_k / median of s_k on calibration rows)
    surprise  S = smooth(mean_k -log p_k(s_k)),   p_k the tail probability of score k on calibration rows (Fisher)

Members see different faults: distances of levels a broken relation between variates, residuals of a model a broken
course in time, their mean a broad load. ``ratio`` keeps the size of a score: a strong fault counts long. ``surprise``
grows with its logarithm, so that one wild row does not rule a smoothed level, but neither does a strong fault.

``recentre`` subtracts what the joined score (of ``ratio`` its logarithm) has been lately, an exponential mean of the
rows before: where normal rows drift, their scores would rank whole weeks above a fault. The price: a fault much
longer than the half-life fades.

Of ``surprise``: above the 0.98 quantile u of the calibration scores p follows a Pareto tail fitted by Hill's estimator
(the logarithm of the excess is exponential), which needs few rows; a smallest rate keeps the tail from ending abruptly.
Members share their calibration rows with whatever judges the sum: each map is monotone with one or two free numbers.

Source: Fisher (1932), Statistical Methods for Research Workers, Sec. 21.1, for sums of -log p; variates and members are
dependent, so the sum is a score to calibrate, not a chi-square statistic. Hill (1975), Annals of Statistics
3:1163-1174, for the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator

from tsforge.anomaly.baselines import BaselineScorer, PcaResidual, build_baseline
from tsforge.anomaly.config import CalibrationConfig, DetectConfig, QuantileRule, ScoreConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.row_regression import hold
from tsforge.anomaly.scorers import mean_abs
from tsforge.anomaly.smoothing import Exponential
from tsforge.anomaly.spans import training_rows
from tsforge.artifact import Artifact, match_frame
from tsforge.contracts.tables import JOINT
from tsforge.core.config import Config
from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike

FloatArray = NDArray[np.float64]
PlainName = Literal[
    "mean_abs", "max_abs", "mahalanobis", "pca_residual", "pca_mahalanobis", "var1_mean_abs", "var1_mahalanobis"
]
ResidualName = Literal["residual_mahalanobis", "residual_mean_abs"]
Join = Literal["ratio", "surprise"]
MemberName = PlainName | ResidualName
RESIDUAL_NAMES: tuple[ResidualName, ...] = ("residual_mahalanobis", "residual_mean_abs")
TAIL_LEVEL = 0.98
SMALLEST_RATE = 0.02  # of the logarithm of an excess: below it scores beyond the sample would all count as impossible
MIN_ROWS = 50


class EnsembleConfig(Config):
    """Which scores are joined, and how long the sum remembers."""

    members: tuple[MemberName, ...] = Field(
        ("mahalanobis", "pca_mahalanobis", "var1_mahalanobis", "residual_mahalanobis"), min_length=1
    )
    """``residual_*``: of an artifact, by ``detect``; the others are plain scorers of the training rows."""
    join: Join = "surprise"
    """How a member's score becomes comparable with the others."""
    smoothing: float | None = Field(0.1, gt=0.0, le=1.0)
    """Weight of the newest row in the exponential mean of the sum; null: each row by itself."""
    recentre: float | None = Field(4_000.0, gt=0.0)
    """Half-life in rows of the level that is subtracted; null: none is."""
    score: ScoreConfig = ScoreConfig(joint="mahalanobis")
    """How residuals become normalised; its joint and smoothing stay as they are."""

    @field_validator("members")
    @classmethod
    def _different(cls, values: tuple[MemberName, ...]) -> tuple[MemberName, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"members {list(values)} name one score twice")
        return values

    @field_validator("score")
    @classmethod
    def _plain_residuals(cls, value: ScoreConfig) -> ScoreConfig:
        if value.joint != "mahalanobis" or value.smoothing is not None or value.kind not in ("normalised", "tail"):
            raise ValueError("score of an ensemble needs joint mahalanobis, no smoothing, and a kind of residuals")
        return value

    @property
    def plain(self) -> tuple[str, ...]:
        """Members that need no artifact."""
        return tuple(name for name in self.members if name not in RESIDUAL_NAMES)

    @property
    def residual(self) -> tuple[str, ...]:
        """Members that come from an artifact."""
        return tuple(name for name in self.members if name in RESIDUAL_NAMES)


@dataclass(frozen=True, kw_only=True)
class Surprise:
    """``-log p`` of a score: ranks in ``sample`` (sorted) up to ``level``, above it a Pareto tail of ``rate``."""

    sample: FloatArray
    level: float
    rate: float

    def of(self, scores: ArrayLike) -> FloatArray:
        """Return -log p >= 0 of every score, never falling as the score grows; NaN stays NaN."""
        s = np.asarray(scores, dtype=np.float64)
        above = self.sample.size - np.searchsorted(self.sample, s, side="left")
        ranks = -np.log((1.0 + above) / (self.sample.size + 1.0))
        tail = -np.log(1.0 - TAIL_LEVEL) + (_log(s) - _log(self.level)) / self.rate
        with np.errstate(invalid="ignore"):
            found = np.where(s > self.level, np.maximum(tail, -np.log(1.0 - TAIL_LEVEL)), ranks)
        limit = -np.log(1.0 - TAIL_LEVEL)
        return np.where(np.isnan(s), np.nan, np.where(s > self.level, found, np.minimum(found, limit)))


def fit_surprise(calibration: ArrayLike) -> Surprise:
    """Return the map of a score from its values on normal rows (NaN is left out).

    Raises:
        DataError: fewer than 50 calibration scores.
    """
    sample = np.asarray(calibration, dtype=np.float64).ravel()
    sample = np.sort(sample[~np.isnan(sample)])
    if sample.size < MIN_ROWS:
        raise DataError(f"{sample.size} calibration scores cannot place a score; give at least {MIN_ROWS} rows")
    level = float(np.quantile(sample, TAIL_LEVEL))
    excess = _log(sample[sample > level]) - _log(level)
    return Surprise(sample=sample, level=level, rate=max(float(excess.mean()) if excess.size else 0.0, SMALLEST_RATE))


def combine(
    members: Mapping[str, ArrayLike],
    known: int,
    *,
    join: Join = "ratio",
    smoothing: float | None,
    recentre: float | None = None,
) -> FloatArray:
    """Return the joined score [N] of members [N]; larger = stranger, row t depends on members up to t only.

    A member without a score in a row is left out there; a row without any has no score.

    Args:
        members: scores of the same rows in time order.
        known: the first so many rows are normal and calibrate.
        join: how members become comparable.
        smoothing: weight of the newest row, None for none.
        recentre: half-life in rows of the level that is subtracted, None for none.

    Raises:
        DataError: no member, members of different lengths, too few calibration rows, or with ``ratio`` a member that is
            0 on half of them.
    """
    if not members:
        raise DataError("an ensemble needs at least one member")
    arrays = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in members.items()}
    if len({values.size for values in arrays.values()}) > 1:
        sizes = {name: values.size for name, values in arrays.items()}
        raise DataError(f"members score different rows: {sizes}")
    if join == "surprise":
        columns = [fit_surprise(values[:known]).of(values) for values in arrays.values()]
    else:
        columns = [values / _usual(name, values[:known]) for name, values in arrays.items()]
    joined = mean_abs(np.stack(columns, axis=1))
    joined = joined if smoothing is None else Exponential(smoothing).run(joined)
    if recentre is None:
        return joined
    return recentred(_log(joined) if join == "ratio" else joined, recentre)


def recentred(scores: ArrayLike, half_life: float) -> FloatArray:
    """Return ``s[t]`` less the exponential mean of the observed scores before t; 0 at the first one. NaN stays NaN."""
    s = np.asarray(scores, dtype=np.float64).ravel()
    weight = 1.0 - 0.5 ** (1.0 / half_life)
    out = np.full_like(s, np.nan)
    seen = np.flatnonzero(~np.isnan(s))
    if seen.size:
        level = Exponential(weight).run(s[seen])
        out[seen] = s[seen] - np.concatenate([level[:1], level[:-1]])
    return out


def _usual(name: str, calibration: FloatArray) -> float:
    sample = calibration[~np.isnan(calibration)]
    if sample.size < MIN_ROWS:
        raise DataError(f"{sample.size} calibration scores cannot place a score; give at least {MIN_ROWS} rows")
    middle = float(np.median(sample))
    if middle <= 0.0:
        raise DataError(
            f"member {name} is 0 on half of the {sample.size} calibration rows; leave it out of the ensemble"
        )
    return middle


def plain_scorer(name: str) -> BaselineScorer:
    """Return an unfitted plain member."""
    return PcaResidual(joint="mahalanobis") if name == "pca_mahalanobis" else build_baseline(name)


def plain_members(names: tuple[str, ...], fit_rows: ArrayLike, rows: ArrayLike) -> dict[str, FloatArray]:
    """Return the scores of ``rows`` [N, V] by plain scorers fitted on ``fit_rows`` [M, V]; none may be missing."""
    return {name: plain_scorer(name).fit(fit_rows).score(rows) for name in names}


@dataclass(frozen=True, kw_only=True)
class EnsembleScores:
    """Scores of one series: rows from the first calibration row on, of which ``known`` lie before the scored ones.

    Attributes:
        scores: [N]. z: {variate: [N]} absolute normalised residuals, empty without an artifact's members.
        times: [N] of the grid. members: {name: [N]} before they were joined.
    """

    series_id: str
    times: pl.Series
    known: int
    scores: FloatArray
    z: dict[str, FloatArray]
    members: dict[str, FloatArray]


def ensemble_scores(
    artifact: Artifact,
    frame: SeriesFrame,
    config: EnsembleConfig | None = None,
    *,
    start: TimeLike,
    calibration: CalibrationConfig | None = None,
) -> list[EnsembleScores]:
    """Return the ensemble scores of every series of a frame, from the first calibration row on.

    Rows between the artifact's training rows and ``start`` are halved: the first half scales residuals, the second
    calibrates every member. Plain members are fitted on the artifact's training rows; a missing value is the last one
    before it there. Variates that were constant in training are scored by the residuals alone.

    Args:
        artifact: the fitted network.
        frame: from the training rows to the last row to score.
        config: members and smoothing.
        start: first row to judge.
        calibration: of ``detect``, which scales the residuals; default with small least sizes (30 rows to scale).

    Raises:
        DataError: too few rows, or a series without training rows.
        ConfigError, ArtifactError: see ``detect``.
    """
    settings = config or EnsembleConfig()
    frame = match_frame(artifact, frame)
    grid, targets = artifact.grid, artifact.schema.targets
    first, stop = training_rows(artifact)
    begin = grid.floor(start)
    middle = stop + (begin - stop) // 2
    detection = DetectConfig(
        score=settings.score,
        calibration=calibration or CalibrationConfig(min_scale_rows=30, min_rows=20),
        rule=QuantileRule(alpha=0.01),  # judged elsewhere
    )
    report = detect(artifact, frame, detection, start=grid.time_at(middle))
    found = []
    for series in report.metadata["series"]:
        table = report.scores.table.filter(pl.col("series_id") == series)
        joint = table.filter(pl.col("variate") == JOINT)
        z = {name: table.filter(pl.col("variate") == name)["score"].fill_null(np.nan).to_numpy() for name in targets}
        size = np.minimum(np.stack(list(z.values()), axis=1), settings.score.winsor)
        members = {
            "residual_mahalanobis": joint["score"].fill_null(np.nan).to_numpy(),
            "residual_mean_abs": mean_abs(size),
        }
        members = {name: members[name] for name in settings.residual}
        if settings.plain:
            own = frame.select_series([series]).table
            rows = grid.index_of(own["time"])
            values = filled(own.select(targets).to_numpy().astype(np.float64))
            training = (rows >= first) & (rows < stop)
            if not training.any():
                raise DataError(f"series '{series}' has no training rows, on which plain members are fitted")
            varying = np.ptp(values[training], axis=0) > 0.0
            if not varying.any():
                raise DataError(
                    f"every variate of series '{series}' is constant over its {int(training.sum())} training rows, "
                    f"which plain members cannot score; keep to the members {', '.join(RESIDUAL_NAMES)}"
                )
            scored = rows >= middle
            plain = plain_members(settings.plain, values[training][:, varying], values[:, varying])
            members |= {name: scores[scored][: joint.height] for name, scores in plain.items()}
        members = {name: members[name] for name in settings.members}
        known = int((grid.index_of(joint["time"]) < begin).sum())
        scores = combine(members, known, join=settings.join, smoothing=settings.smoothing, recentre=settings.recentre)
        found.append(
            EnsembleScores(series_id=series, times=joint["time"], known=known, scores=scores, z=z, members=members)
        )
    return found


def filled(values: ArrayLike) -> FloatArray:
    """Return rows [N, V] where a missing value is the last one before it, at the start the first one after, else 0."""
    x = np.array(values, dtype=np.float64)
    if not len(x):
        return x
    first = np.take_along_axis(x, (~np.isnan(x)).argmax(axis=0)[None], axis=0)[0]
    return np.nan_to_num(hold(x, first), nan=0.0, posinf=np.inf, neginf=-np.inf)


def _log(values: ArrayLike) -> FloatArray:
    return np.asarray(np.log(np.maximum(np.asarray(values, dtype=np.float64), np.finfo(np.float64).tiny)))
