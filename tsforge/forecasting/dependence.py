"""How the errors of the steps of a horizon hang together: estimated on held-out windows, stored with the artifact.

Quantiles say what each step may be, not how steps move together; a total over the horizon needs both. Each held-out
value becomes a PIT value of the published marginals and then a Normal score. Two structures:

- ``gaussian``: a Gaussian copula. Per variate a correlation matrix of the scores over the steps, R = L L'; the scores
  whitened by L have one correlation matrix C over the variates, so that variates v and w have L_v C_vw L_w' together.
  With equal R that is the Kronecker product of C and R, and it is positive definite always.
- ``empirical``: the ranks of whole held-out windows, the Schaake shuffle: any shape of dependence, tails too, but no
  pattern that did not occur.

Correlations are second moments about zero, not about the mean: under the published marginals the scores have mean zero,
and a bias that all steps share moves a total as dependence does. The sample matrix S is shrunk towards its own mean
along each diagonal T (the errors' correlation by lag), by w = min(1, sum Var(S_ij - T_ij) / sum (S_ij - T_ij)^2) over
i != j, which minimises the expected squared error, since T is a mean of S. The variance is that between blocks of
neighbouring windows (at least one horizon each), so that overlap, which makes windows repeat each other, is counted.

Source: Ledoit and Wolf (2004), J. Multivariate Analysis 88:365-411 and Schaefer and Strimmer (2005), SAGMB 4:32
(shrinking with an estimated weight; the target and the count of windows are ours); Clark et al. (2004),
J. Hydrometeorology 5:243-262 (Schaake shuffle).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr, ndtri
from torch import Tensor

from tsforge.artifact import Artifact
from tsforge.core.errors import ArtifactError, ConfigError, DataError, listing
from tsforge.core.logs import get_logger
from tsforge.core.seeding import derive_seed
from tsforge.data.windows import WindowDataset
from tsforge.forecasting.conformal import calibrated_levels
from tsforge.forecasting.predict import network_levels, published_quantiles
from tsforge.forecasting.window_forecasts import predict_windows
from tsforge.metrics.pit import pit_values

_LOG = get_logger(__name__)

FloatArray = NDArray[np.float64]
Bools = NDArray[np.bool_]
DependenceKind = Literal["gaussian", "empirical", "none"]

_LOWER = (0.0005, 0.0025, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
DENSE_LEVELS = (*_LOWER, 0.5, *(round(1.0 - level, 4) for level in reversed(_LOWER)))  # of an uncalibrated likelihood
MAX_WINDOWS = 600  # evenly spaced; what overlaps more adds time, not evidence
MAX_CELLS = 20_000_000  # steps x variates x windows looked at: 160 MB
MAX_STORED = 4_000_000  # numbers kept in an artifact: 16 MB in single precision
MIN_EFFECTIVE = 3.0  # windows that do not overlap: with fewer there is no dependence to estimate
MAX_BLOCKS = 12  # of windows, between which the noise of a correlation is seen
MIN_TEMPLATES = 20  # complete windows for the empirical structure
_RIDGE = 1e-3  # least eigenvalue of a correlation matrix, about
_EXTREME = 1e-4  # PIT values nearer to 0 or 1 count as this: their distance rests on the tail rule alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Dependence:
    """A copula over the steps of a horizon and the variates.

    Attributes:
        steps: lower Cholesky factors of the correlation over steps, one a variate or one for all; None if empirical.
        variates: lower Cholesky factor of the correlation of variates; None if empirical.
        ranks: from 1, of held-out windows among each other, in every cell; None if Gaussian.
        windows: held-out windows it rests on.
        effective: how many of them do not overlap.
        shrinkage: weight of the target, one a factor of ``steps``; empty if empirical.

    Shapes:
        steps [G, H, H] with G = V or 1, variates [V, V], ranks [M, H, V].
    """

    steps: FloatArray | None
    variates: FloatArray | None
    ranks: FloatArray | None
    windows: int
    effective: float
    shrinkage: FloatArray

    @property
    def kind(self) -> str:
        """``gaussian`` or ``empirical``."""
        return "gaussian" if self.ranks is None else "empirical"

    @property
    def horizon(self) -> int:
        """Number of steps."""
        part = self.steps if self.steps is not None else self.ranks
        return 0 if part is None else part.shape[1]

    def correlation(self, variate: int = 0) -> FloatArray:
        """Return the correlation [H, H] of the Normal scores of one variate over the steps."""
        if self.steps is not None:
            factor = self.steps[min(variate, len(self.steps) - 1)]
            return np.asarray(factor @ factor.T)
        if self.ranks is None:
            raise ArtifactError("this dependence structure is empty")
        score = ndtri((self.ranks[..., variate] - 0.5) / len(self.ranks))
        return np.asarray(np.corrcoef(score, rowvar=False).reshape(self.horizon, self.horizon))

    def uniforms(self, paths: int, steps: int, rng: np.random.Generator) -> FloatArray:
        """Return draws of the copula [paths, steps, V], each cell uniform on (0, 1)."""
        if self.ranks is not None:
            count = len(self.ranks)
            whole, rest = divmod(paths, count)  # no template twice before all were used once
            picks = [rng.permutation(count) for _ in range(whole)] + [rng.permutation(count)[:rest]]
            ranks = self.ranks[np.concatenate(picks), :steps]
            return np.asarray((ranks - rng.uniform(1e-9, 1.0, ranks.shape)) / count)
        if self.steps is None or self.variates is None:
            raise ArtifactError("this dependence structure is empty")
        innovations = rng.standard_normal((paths, steps, len(self.variates))) @ self.variates.T
        factors = self.steps[:, :steps, :steps]
        if len(factors) == 1:
            return np.asarray(ndtr(np.einsum("ij,pjv->piv", factors[0], innovations, optimize=True)))
        scores = np.matmul(factors, innovations.transpose(2, 1, 0))  # [V, steps, paths]
        return np.asarray(ndtr(scores.transpose(2, 1, 0)))

    def tensors(self) -> dict[str, Tensor]:
        """Return what an artifact stores."""
        parts = {"steps": self.steps, "variates": self.variates, "ranks": self.ranks, "shrinkage": self.shrinkage}
        stored = {name: torch.as_tensor(part, dtype=torch.float32) for name, part in parts.items() if part is not None}
        return stored | {"windows": torch.tensor(self.windows), "effective": torch.tensor(self.effective)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, horizon: int, num_variates: int) -> Dependence:
        """Return what ``tensors`` gave.

        Raises:
            ArtifactError: parts are missing, or of another horizon or number of variates.
        """
        parts = {name: value.detach().cpu().double().numpy() for name, value in tensors.items()}
        shapes: dict[str, list[tuple[int, ...]]] = {
            "steps": [(count, horizon, horizon) for count in (1, num_variates)],
            "variates": [(num_variates, num_variates)],
        }
        if "ranks" in parts:
            shapes = {"ranks": [(len(parts["ranks"]), horizon, num_variates)]}
        wrong = [name for name, fitting in shapes.items() if name not in parts or parts[name].shape not in fitting]
        wrong += [name for name in ("windows", "effective", "shrinkage") if name not in parts]
        if wrong:
            raise ArtifactError(
                f"the stored dependence does not fit {horizon} steps and {num_variates} variates ({listing(wrong)}); "
                "fit again"
            )
        return cls(
            steps=parts.get("steps"),
            variates=parts.get("variates"),
            ranks=parts.get("ranks"),
            windows=int(parts["windows"]),
            effective=float(parts["effective"]),
            shrinkage=parts["shrinkage"],
        )


def independent(horizon: int, num_variates: int) -> Dependence:
    """Return the structure of steps and variates that have nothing to do with each other, to compare with."""
    return Dependence(
        steps=np.eye(horizon)[None],
        variates=np.eye(num_variates),
        ranks=None,
        windows=0,
        effective=0.0,
        shrinkage=np.ones(1),
    )


def artifact_dependence(artifact: Artifact) -> Dependence:
    """Return the dependence structure of an artifact.

    Raises:
        ConfigError: it has none; the message says how to get one.
        ArtifactError: what is stored does not fit the artifact.
    """
    if artifact.dependence is None:
        raise ConfigError(
            f"artifact {artifact.id} does not know how the steps of its horizon depend on each other; fit with "
            "calibration.dependence=gaussian (or empirical) and a validation span of several horizons"
        )
    return Dependence.from_tensors(
        artifact.dependence, horizon=artifact.window.horizon, num_variates=len(artifact.schema.targets)
    )


def marginal_levels(artifact: Artifact) -> tuple[float, ...]:
    """Return the levels that paths are drawn from: the calibrated ones, or a dense grid of the likelihood.

    Raises:
        ConfigError: the artifact gives points only.
    """
    if artifact.calibration is not None:
        return calibrated_levels(artifact.calibration)
    if not artifact.network.likelihood.has_distribution:
        raise ConfigError(
            f"artifact {artifact.id} gives points only: its likelihood is 'point' and it has no calibration; fit with "
            "a validation span (it calibrates), or with likelihood normal, student_t or quantiles"
        )
    return DENSE_LEVELS


def finite_marginals(quantiles: FloatArray | None, levels: Sequence[float]) -> tuple[FloatArray, tuple[float, ...]]:
    """Return the published quantiles [N, H, V, Q] at the levels that are finite in every cell, and these levels.

    Raises:
        DataError: fewer than three levels are finite (too few held-out windows for the others).
    """
    if quantiles is None:
        raise DataError("the forecasts hold no quantiles")
    finite: Bools = np.asarray(np.isfinite(quantiles).all(axis=(0, 1, 2)))
    if int(finite.sum()) < 3:
        raise DataError(
            f"quantiles are finite at {int(finite.sum())} of {len(levels)} levels, a distribution needs three: too few "
            "held-out windows for their coverage; widen the valid span"
        )
    return quantiles[..., finite], tuple(level for level, kept in zip(levels, finite, strict=True) if kept)


def estimate_dependence(
    artifact: Artifact, windows: WindowDataset, kind: DependenceKind, *, max_windows: int = MAX_WINDOWS
) -> Dependence | None:
    """Return the dependence structure seen in held-out windows; None, with a warning, when they are too few.

    Args:
        artifact: fitted and calibrated; its marginals turn values into PIT values.
        windows: those of the calibration: later than the training, earlier than any cutoff to forecast from.
        kind: which structure; ``none`` gives None.
        max_windows: evenly spaced windows to use when there are more.

    Raises:
        ConfigError: the artifact gives points only.
        DataError: the windows have no target.
    """
    if kind == "none":
        return None
    horizon, number = artifact.window.horizon, len(artifact.schema.targets)
    most = min(max_windows, max(MIN_TEMPLATES, MAX_CELLS // (horizon * number)))
    items = min(len(windows), max(1, most // windows.rows_per_item))
    chosen = np.unique(np.linspace(0, len(windows) - 1, items).round().astype(np.int64))
    levels = marginal_levels(artifact)
    found = predict_windows(artifact.network, windows, network_levels(artifact, levels), indices=chosen)
    if found.target is None or found.mask is None:
        raise DataError("a dependence structure needs windows with targets; these are for prediction only")
    effective = effective_windows(found.series_index, found.cutoff_index, horizon)
    blocks = window_blocks(found.series_index, found.cutoff_index, horizon)
    try:
        published = published_quantiles(artifact, found, levels, windows.panel, tell=False)  # its grading tells
        quantiles, levels = finite_marginals(published, levels)
        rng = np.random.default_rng(derive_seed(0, "pit ties"))
        pit = pit_values(np.where(found.mask, found.target, np.nan), quantiles, levels, rng)
        return fit_dependence(pit, blocks, effective, kind)
    except DataError as error:
        _LOG.warning("no dependence over the horizon, so no sample paths and totals: %s", error)
        return None


def effective_windows(series: NDArray[np.int64], cutoff: NDArray[np.int64], horizon: int) -> float:
    """Return how many windows without overlap the given ones span: per series, rows over horizon."""
    total = 0.0
    for index in np.unique(series):
        mine = cutoff[series == index]
        total += min(len(mine), float(mine.max() - mine.min()) / horizon + 1.0)
    return total


def window_blocks(series: NDArray[np.int64], cutoff: NDArray[np.int64], horizon: int) -> NDArray[np.int64]:
    """Return the block number of each window: spans of time, or groups of series where the time is short."""
    spans = int(cutoff.max() - cutoff.min()) // horizon
    if spans >= MIN_EFFECTIVE:
        edges = np.linspace(cutoff.min(), cutoff.max() + 1, min(MAX_BLOCKS, spans) + 1)
        return np.asarray(np.searchsorted(edges, cutoff, side="right") - 1, dtype=np.int64)
    names, numbers = np.unique(series, return_inverse=True)
    return np.asarray(numbers * min(MAX_BLOCKS, len(names)) // len(names), dtype=np.int64)


def fit_dependence(pit: FloatArray, blocks: NDArray[np.int64], effective: float, kind: DependenceKind) -> Dependence:
    """Return the structure in PIT values [N, H, V] of held-out windows, NaN where not observed.

    Args:
        pit: under the marginals that paths will have.
        blocks: number of the block of each window [N], see ``window_blocks``.
        effective: windows among them that do not overlap.
        kind: ``gaussian`` or ``empirical``.

    Raises:
        DataError: fewer than three windows without overlap, or too few complete ones for ranks.
    """
    if effective < MIN_EFFECTIVE:
        raise DataError(
            f"the held-out windows span {effective:.1f} horizons, {MIN_EFFECTIVE:g} are needed; widen the valid span "
            "or shorten the horizon"
        )
    if kind == "empirical":
        return _empirical(pit, effective)
    seen = ~np.isnan(pit)
    scores = np.where(seen, ndtri(np.clip(np.where(seen, pit, 0.5), _EXTREME, 1.0 - _EXTREME)), 0.0)
    _, horizon, number = scores.shape
    pooled = horizon * horizon * number > MAX_STORED
    if pooled:  # one matrix for all variates: each is a window more
        parts = [(scores.transpose(0, 2, 1).reshape(-1, horizon), seen.transpose(0, 2, 1).reshape(-1, horizon))]
        blocks = np.repeat(blocks, number)
    else:
        parts = [(scores[..., v], seen[..., v]) for v in range(number)]
    found = [shrunk_correlation(score, mask, blocks) for score, mask in parts]
    factors = np.stack([cholesky(matrix) for matrix, _ in found])
    return Dependence(
        steps=factors,
        variates=_variate_factor(scores, seen, factors, effective * horizon),
        ranks=None,
        windows=len(pit),
        effective=effective,
        shrinkage=np.array([weight for _, weight in found]),
    )


def _empirical(pit: FloatArray, effective: float) -> Dependence:
    complete = np.flatnonzero(~np.isnan(pit).any(axis=(1, 2)))
    if len(complete) < MIN_TEMPLATES:
        raise DataError(
            f"{len(complete)} of {len(pit)} held-out windows are complete, ranks need {MIN_TEMPLATES}; choose "
            "calibration.dependence=gaussian or widen the valid span"
        )
    most = max(MIN_TEMPLATES, MAX_STORED // (pit.shape[1] * pit.shape[2]))
    chosen = complete[np.unique(np.linspace(0, len(complete) - 1, min(len(complete), most)).round().astype(np.int64))]
    order = pit[chosen].argsort(axis=0, kind="stable")
    return Dependence(
        steps=None,
        variates=None,
        ranks=order.argsort(axis=0, kind="stable").astype(np.float64) + 1.0,
        windows=len(pit),
        effective=effective,
        shrinkage=np.empty(0),
    )


def shrunk_correlation(scores: FloatArray, mask: Bools, blocks: NDArray[np.int64]) -> tuple[FloatArray, float]:
    """Return the correlation about zero of Normal scores over steps, shrunk to its mean by lag, and the weight of that.

    Shapes:
        scores [N, H] (0 where not observed), mask [N, H], blocks [N] -> [H, H] with unit diagonal, scalar in [0, 1].
    """
    seen = mask.astype(np.float64)
    members = [blocks == block for block in np.unique(blocks)]
    counts = np.stack([seen[rows].T @ seen[rows] for rows in members])
    moments = np.stack([scores[rows].T @ scores[rows] for rows in members])
    pairs = counts.sum(axis=0)
    moment = moments.sum(axis=0) / np.maximum(pairs, 1.0)
    unit = np.sqrt(np.maximum(np.diag(moment), 1e-12))
    sample = np.clip(moment / np.outer(unit, unit), -1.0, 1.0)
    target = _mean_by_lag(sample, pairs)
    sample = np.where(pairs > 0, sample, target)
    np.fill_diagonal(sample, 1.0)
    excess = sample - target
    distance = float(np.square(excess).sum())
    # the deviation of a block counts by its share of the windows; B / (B - 1) as for any variance of a mean
    noise = 0.0
    for count, part in zip(counts, moments, strict=True):
        own = part / np.maximum(count, 1.0) / np.outer(unit, unit)
        deviation = np.where(count > 0, own - _mean_by_lag(own, count) - excess, 0.0)
        np.fill_diagonal(deviation, 0.0)
        noise += float(np.square(deviation * count / np.maximum(pairs, 1.0)).sum())
    noise *= len(members) / max(len(members) - 1, 1)
    weight = 1.0 if len(members) < 2 or distance <= noise else noise / distance
    return (1.0 - weight) * sample + weight * target, weight


def _mean_by_lag(sample: FloatArray, pairs: FloatArray) -> FloatArray:
    """Return the matrix whose diagonals are constant: the mean of each over the cells that have pairs, 0 without."""
    size = len(sample)
    lag = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).ravel()
    known = (pairs > 0).ravel().astype(np.float64)
    total = np.bincount(lag, weights=sample.ravel() * known, minlength=size)
    mean = total / np.maximum(np.bincount(lag, weights=known, minlength=size), 1.0)
    mean[0] = 1.0
    return mean[lag].reshape(size, size)


def cholesky(correlation: FloatArray) -> FloatArray:
    """Return the lower Cholesky factor, rows of length 1, of the nearest well-conditioned correlation matrix.

    A little of the identity is mixed in; eigenvalues that are still too small are raised, then the diagonal set to 1.
    """
    size = len(correlation)
    matrix = (1.0 - _RIDGE) * correlation + _RIDGE * np.eye(size)
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        matrix = (vectors * np.maximum(values, _RIDGE)) @ vectors.T
        factor = np.linalg.cholesky(matrix)
    return np.asarray(factor / np.linalg.norm(factor, axis=1, keepdims=True))


def _variate_factor(scores: FloatArray, seen: Bools, factors: FloatArray, effective: float) -> FloatArray:
    """Return the Cholesky factor [V, V] of the correlation of innovations: scores whitened over the steps.

    A window counts for the variates that are complete in it.
    """
    count, horizon, number = scores.shape
    if number == 1:
        return np.ones((1, 1))
    most = max(MIN_TEMPLATES, MAX_CELLS // (10 * horizon * number))
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
    complete: Bools = np.asarray(seen[chosen].all(axis=1))  # [N, V]
    white = np.empty((number, horizon, len(chosen)))
    for variate in range(number):
        factor = factors[min(variate, len(factors) - 1)]
        white[variate] = solve_triangular(factor, scores[chosen, :, variate].T, lower=True) * complete[:, variate]
    rows = white.reshape(number, -1)
    pairs = complete.T.astype(np.float64) @ complete * horizon
    moment = rows @ rows.T / np.maximum(pairs, 1.0)
    unit = np.sqrt(np.maximum(np.diag(moment), 1e-12))
    sample = np.clip(moment / np.outer(unit, unit), -1.0, 1.0)
    off = ~np.eye(number, dtype=bool)
    noise = float(np.square(1.0 - np.square(sample[off])).sum()) / max(effective, 1.0)
    size = float(np.square(sample[off]).sum())
    weight = 1.0 if size <= noise else noise / size
    sample = np.where(off, (1.0 - weight) * sample, 1.0)
    return cholesky(sample)
