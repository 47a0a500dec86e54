"""The score model of one series: everything fitted on its scale span, applied to any later row.

Legend: deviations [N, K, V] of K forecast steps (residuals, or normal deviates of the predictive tail), z [N, V].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.calibration import Calibration, fit_calibration
from tsforge.anomaly.config import ScoreConfig
from tsforge.anomaly.covariance import Covariance, fit_covariance
from tsforge.anomaly.ewma import Ewma, fit_ewma
from tsforge.anomaly.residuals import ResidualScale, TrainingRange, fit_residual_scale, reduce_horizon
from tsforge.anomaly.row_regression import RowRegression
from tsforge.anomaly.scorers import (
    balanced,
    consensus,
    fisher,
    mahalanobis,
    max_abs,
    mean_abs,
    product,
    top_k,
    winsorise,
)
from tsforge.anomaly.smoothing import build_smoother
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]
TAIL_FLOOR = 0.1  # smallest scale of normal deviates, whose scale is 1 for a calibrated forecast


@dataclass(frozen=True)
class Scores:
    """Scores of consecutive rows: z [N, V] not winsorised (for attribution), joint [N]; NaN = not scorable."""

    z: FloatArray
    joint: FloatArray


@dataclass(eq=False, kw_only=True)
class Memory:
    """What scores of later rows need of the rows before: moves with every row.

    Attributes:
        ewma: residuals that add up; None where they do not.
        row: [V] what was last observed, standardised, of ``consensus``; None of other scores.
    """

    ewma: Ewma | None = None
    row: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreModel:
    """Fitted scale, covariance and, for ``fisher``, one calibration a variate; never changed again.

    Attributes:
        used: [V] variates inside the covariance: neither constant in training nor without a scale.
        ewma: how far residuals add up over normal rows, with no row behind it; None where they do not.
        share: [V] of ``balanced``, scale of z in deviations of the variate in training.
        regression: of ``consensus``, a row on the one before.
    """

    config: ScoreConfig
    scale: ResidualScale
    used: NDArray[np.bool_]
    covariance: Covariance | None
    variate_calibrations: tuple[Calibration | None, ...] = ()
    ewma: Ewma | None = None
    share: FloatArray | None = None
    regression: RowRegression | None = None

    def score(self, deviations: ArrayLike, values: ArrayLike) -> Scores:
        """Return the scores of rows in time order, smoothed from the first row on; row t depends on rows up to t only.

        With ``smoothing.kind: two_sided`` on ``latency`` rows after it too, and so many last rows have no score.

        Shapes:
            deviations [N, K, V]; values [N, V], which judge variates that were constant in training.

        Raises:
            DataError: ``smoothing.kind: cusum``, which needs calibration scores: smooth the scores of ``raw``.
        """
        scores, smoother = self.raw(deviations, values, self.memory()), build_smoother(self.config)
        if smoother is None:
            return scores
        joint = smoother.run(scores.joint)
        return Scores(z=scores.z, joint=np.pad(joint, (0, len(scores.joint) - len(joint)), constant_values=np.nan))

    def memory(self) -> Memory:
        """Return what ``raw`` remembers from row to row, with no row behind it."""
        return Memory(
            ewma=None if self.ewma is None else self.ewma.fresh(),
            row=None if self.regression is None else self.regression.nothing_before(),
        )

    def raw(
        self, deviations: ArrayLike, values: ArrayLike, memory: Memory, impossible: NDArray[np.bool_] | None = None
    ) -> Scores:
        """Return the scores before smoothing; shapes as in ``score``.

        Args:
            memory: of the rows before these, moved on by them; from ``memory``.
            impossible: [N, V] values that say nothing of the rows after them.
        """
        z = _deviates(self.scale, deviations, values, self.config)
        if memory.ewma is not None:
            z = _added_up(memory.ewma, z, self.scale.constant, self.config)
        if self.regression is None:
            return Scores(z=z, joint=self._joint(z))
        before = self.regression.nothing_before() if memory.row is None else memory.row
        plain, memory.row = self.regression.residuals(values, before, impossible)
        cut = winsorise(z, self.config.winsor)
        return Scores(z=z, joint=consensus(cut, plain, self.covariance, self.constant))

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Which variates [V] stand outside the covariance on their own."""
        return ~self.used

    def _joint(self, deviates: FloatArray) -> FloatArray:
        name = self.config.joint
        if self.share is not None:
            return balanced(deviates, self.share, self.covariance, self.constant, limit=self.config.winsor)
        z = winsorise(deviates, self.config.winsor)
        if name == "mean_abs":
            return mean_abs(z)
        if name == "max_abs":
            return max_abs(z)
        if name == "top_k":
            return top_k(z, self.config.top_k or 1)
        if name == "mahalanobis":
            return mahalanobis(z, self.covariance, self.constant)
        if name == "product":
            return product(z, self.covariance, self.constant)
        columns = [
            np.full(len(z), np.nan) if calibration is None else calibration.p_values(np.abs(z[:, v]))
            for v, calibration in enumerate(self.variate_calibrations)
        ]
        return fisher(np.stack(columns, axis=1))

    def facts(self) -> dict[str, Any]:
        """Return how many variates are scored how, for a report."""
        return {
            "variates_scored": int(self.scale.scored.sum()),
            "variates_constant": int(self.scale.constant.sum()),
            "variates_without_scale": int((~self.scale.scored).sum()),
            **({} if self.regression is None else {"variates_in_regression": int(self.regression.used.sum())}),
        }


def _deviates(scale: ResidualScale, deviations: ArrayLike, values: ArrayLike, config: ScoreConfig) -> FloatArray:
    """Return z [N, V]; nearer to what is usual than usual is not strange."""
    z = reduce_horizon(scale.normalise(deviations, values), config.horizon_reduction)
    return np.where(scale.constant, z, np.maximum(z, 0.0)) if config.is_one_sided else z


def _added_up(ewma: Ewma, z: FloatArray, constant: NDArray[np.bool_], config: ScoreConfig) -> FloatArray:
    """Return z [N, V] after the memory; variates that were constant in training stay as they are."""
    return np.where(constant, z, ewma.run(winsorise(z, config.winsor)))


def fit_score_model(
    deviations: ArrayLike,
    values: ArrayLike,
    training: TrainingRange,
    config: ScoreConfig,
) -> ScoreModel:
    """Return the score model of one series from its scale span.

    Args:
        deviations: [N, K, V] out of sample. values: [N, V] of the same rows.
        training: range of the variates in training.
        config: which scores.

    Raises:
        DataError: too few residuals to set any scale, or for the memory of ``ewma``; ``consensus`` without the
            regression of the training rows.
    """
    if (config.joint == "consensus") != (training.regression is not None):
        raise DataError("joint: consensus, and no other, needs the regression of the training rows")
    unit = training.high - training.low if config.has_data_units else 1.0
    floor = TAIL_FLOOR if config.kind in ("tail", "growth") else config.scale_floor * unit
    scale = fit_residual_scale(deviations, training, smallest=floor, constant_score=config.constant_score)
    z = winsorise(_deviates(scale, deviations, values, config), config.winsor)
    ewma = None if config.ewma is None else fit_ewma(config.ewma, z)
    if ewma is not None:
        z = winsorise(_added_up(ewma.fresh(), z, scale.constant, config), config.winsor)
    used = ~scale.constant & ((~np.isnan(z)).sum(axis=0) >= 2)
    covariance = fit_covariance(z[:, used]) if used.any() else None
    calibrations: tuple[Calibration | None, ...] = ()
    if config.joint == "fisher":
        calibrations = tuple(
            fit_calibration(np.abs(z[:, v])) if (~np.isnan(z[:, v])).any() else None for v in range(z.shape[1])
        )
    return ScoreModel(
        config=config,
        scale=scale,
        used=used,
        covariance=covariance,
        variate_calibrations=calibrations,
        ewma=ewma,
        share=_share(scale, ewma, training, config) if config.joint == "balanced" else None,
        regression=training.regression,
    )


def _share(scale: ResidualScale, ewma: Ewma | None, training: TrainingRange, config: ScoreConfig) -> FloatArray:
    """Return the scale of z [V] in deviations of the variate in training, with the same floor; of steps the median.

    A variate that was constant there has neither, and keeps the score it is given for leaving its constant.
    """
    unit = np.full(len(scale.constant), np.nan)
    seen = ~np.isnan(scale.scale).all(axis=0)
    unit[seen] = np.nanmedian(scale.scale[:, seen], axis=0)
    if ewma is not None:
        unit = unit * ewma.spread
    spread = np.maximum(training.deviation, config.scale_floor * (training.high - training.low))
    return np.asarray(np.divide(unit, spread, out=np.ones_like(unit), where=~scale.constant))
