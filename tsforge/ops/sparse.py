"""Sparse linear models from second moments: the AR-Net penalty solved by reweighted L1, and greedy selection.

Squared error is quadratic in the moments and the penalty is concave in |theta|, so its tangent bounds it from above.
Each round solves the weighted lasso of that tangent by coordinate descent; the true objective can only fall. No
learning rate, exact zeros, deterministic.

Legend: G [p, p] mean feature products, r [T, p] mean products with each target, theta [T, p], T targets (steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.special import gammaln

Array = NDArray[np.float64]

PENALTY_EPS = 1e-9  # keeps the slope of |theta|^(1/c2) finite at 0


@dataclass(frozen=True)
class Moments:
    """What a sparse solver needs, in units where the targets have about unit variance.

    Attributes:
        gram: [p, p] mean products of centred features.
        cross: [T, p] mean products of targets and features.
        power: [T] mean squares of the targets.
        rows: number of windows behind the means.
    """

    gram: Array
    cross: Array
    power: Array
    rows: float

    def mean_squared_error(self, theta: Array) -> Array:
        """Return the error [T] of coefficients [T, p] on the training windows."""
        error = self.power - 2.0 * (theta * self.cross).sum(1) + ((theta @ self.gram) * theta).sum(1)
        return np.asarray(np.maximum(error, 0.0), dtype=np.float64)


@dataclass(frozen=True)
class Penalty:
    """``R(x) = 2 / (1 + exp(-c1 x^(1/c2))) - 1``: steep at 0, flat far away; R(0) = 0 and R tends to 1.

    Source:
        Triebe et al. (2019), section 3.3.1, c1 = c2 = 3. Deviation: x + eps inside the root, and the constant this adds
        at 0 is subtracted and divided out, so that value and slope are finite everywhere.
    """

    c1: float = 3.0
    c2: float = 3.0

    def _inner(self, magnitude: Array) -> Array:
        shifted = (np.abs(magnitude) + PENALTY_EPS) ** (1.0 / self.c2)
        return np.asarray(2.0 / (1.0 + np.exp(-self.c1 * shifted)) - 1.0, dtype=np.float64)

    def value(self, magnitude: Array) -> Array:
        """Return R elementwise."""
        floor = self._inner(np.zeros(1))
        return (self._inner(magnitude) - floor) / (1.0 - floor)

    def slope(self, magnitude: Array) -> Array:
        """Return dR/dx elementwise, falling in x; about 1e6 at 0, so a zero coefficient stays zero."""
        shifted = np.abs(magnitude) + PENALTY_EPS
        logistic = 1.0 / (1.0 + np.exp(-self.c1 * shifted ** (1.0 / self.c2)))
        outer = 2.0 * logistic * (1.0 - logistic) * self.c1 / self.c2 * shifted ** (1.0 / self.c2 - 1.0)
        return np.asarray(outer / (1.0 - self._inner(np.zeros(1))), dtype=np.float64)


@dataclass(frozen=True)
class SparseFit:
    """Coefficients [T, p] with exact zeros, the objective after each round, and how the strength was chosen."""

    theta: Array
    objective: tuple[float, ...]
    strength: float
    criterion: float


def _magnitude(theta: Array, group: bool) -> Array:
    """Return |theta| [T, p], or the root mean square over targets repeated for each when they share a support."""
    if not group:
        return np.abs(theta)
    norm = np.sqrt((theta**2).mean(0, keepdims=True))
    return np.repeat(norm, theta.shape[0], axis=0)


def objective(moments: Moments, theta: Array, strength: float, penalty: Penalty, *, group: bool = False) -> float:
    """Return ``sum over targets of mse + strength * sum of R``; ``strength`` is lambda / p of the paper."""
    return float(moments.mean_squared_error(theta).sum() + strength * penalty.value(_magnitude(theta, group)).sum())


def _shrink(rho: Array, threshold: Array, group: bool) -> Array:
    if not group:
        return np.asarray(np.sign(rho) * np.maximum(np.abs(rho) - threshold, 0.0), dtype=np.float64)
    norm = np.linalg.norm(rho)
    limit = float(threshold[0]) * np.sqrt(len(rho))
    return rho * (max(norm - limit, 0.0) / norm) if norm > 0.0 else rho


def _descend(moments: Moments, theta: Array, threshold: Array, *, group: bool, max_sweeps: int = 40) -> Array:
    """Return the minimiser of ``mse + 2 sum threshold |theta|`` by coordinate descent with active sets.

    Every few sweeps the active coefficients are solved for exactly with their signs held, which replaces the slow tail
    of coordinate descent on correlated lags. Stopping early is harmless: every step lowers the bound.
    """
    theta = theta.copy()
    gram, diagonal = moments.gram, np.maximum(moments.gram.diagonal(), 1e-300)
    residual = moments.cross - theta @ gram  # [T, p]
    tolerance = 1e-6 * float(np.sqrt(moments.power.max(initial=1e-300)))
    scale = np.sqrt(diagonal)
    for sweep in range(max_sweeps):
        rho = residual + diagonal * theta
        touched = (theta != 0.0) | (np.abs(rho) > threshold)
        largest = 0.0
        for index in np.flatnonzero(touched.any(0)):
            old = theta[:, index].copy()
            new = _shrink(residual[:, index] + diagonal[index] * old, threshold[:, index], group) / diagonal[index]
            change = new - old
            biggest = float(np.abs(change).max())
            if biggest > 0.0:
                theta[:, index] = new
                residual -= change[:, None] * gram[index]
                largest = max(largest, biggest * float(scale[index]))
        if largest < tolerance:
            break
        if not group and sweep % 3 == 2:
            theta = _solve_active(moments, theta, threshold)
            residual = moments.cross - theta @ gram
    return theta


def _solve_active(moments: Moments, theta: Array, threshold: Array) -> Array:
    """Return the exact minimiser over each target's non-zero coefficients, where it keeps all their signs."""
    moved = theta.copy()
    for target in range(theta.shape[0]):
        support = np.flatnonzero(theta[target])
        if not len(support):
            continue
        signs = np.sign(theta[target, support])
        right = moments.cross[target, support] - threshold[target, support] * signs
        solution, _ = _solve(moments.gram[np.ix_(support, support)], right)
        if np.array_equal(np.sign(solution), signs):
            moved[target, support] = solution
    return moved


def reweighted_l1(
    moments: Moments,
    start: Array,
    strength: float,
    *,
    penalty: Penalty | None = None,
    group: bool = False,
    max_rounds: int = 8,
    max_sweeps: int = 40,
) -> SparseFit:
    """Return a stationary point of the AR-Net objective, reached from ``start`` (least squares) [T, p].

    Args:
        moments: see ``Moments``.
        start: coefficients to begin with; a coefficient that is 0 stays 0.
        strength: lambda / p, the price of one coefficient far from 0.
        penalty: default the paper's constants.
        group: targets share one support: the penalty acts on the root mean square of a lag over targets.
        max_rounds: tangent updates; stops earlier when the objective no longer falls.
        max_sweeps: of coordinate descent within a round.
    """
    rule = penalty or Penalty()
    theta = np.asarray(start, dtype=np.float64)
    history = [objective(moments, theta, strength, rule, group=group)]
    for _ in range(max_rounds):
        threshold = 0.5 * strength * rule.slope(_magnitude(theta, group))
        proposal = _descend(moments, theta, threshold, group=group, max_sweeps=max_sweeps)
        reached = objective(moments, proposal, strength, rule, group=group)
        theta = proposal if reached <= history[-1] else theta
        history.append(min(reached, history[-1]))
        if history[-2] - history[-1] <= 1e-10 * max(history[-2], 1e-300):
            break
    return SparseFit(theta, tuple(history), strength, float("nan"))


def refit(moments: Moments, theta: Array) -> tuple[Array, Array]:
    """Return least squares on each target's support, and the leverage [T, p] of its coefficients (0 off support)."""
    refitted, leverage = np.zeros_like(theta), np.zeros_like(theta)
    for target in range(theta.shape[0]):
        support = np.flatnonzero(theta[target])
        if len(support):
            solution, inverse = _solve(moments.gram[np.ix_(support, support)], moments.cross[target, support])
            refitted[target, support] = solution
            leverage[target, support] = inverse.diagonal() / moments.rows
    return refitted, leverage


def _solve(gram: Array, right: Array) -> tuple[Array, Array]:
    try:
        factor = cho_factor(gram, lower=True)
        inverse = cho_solve(factor, np.eye(len(gram)))
    except np.linalg.LinAlgError:  # repeated covariates: the minimum-norm solution
        inverse = np.linalg.pinv(gram, hermitian=True)
    return inverse @ right, inverse


def extended_bic(mean_squared_error: float, rows: float, chosen: int, candidates: int) -> float:
    """Return BIC plus twice the log of the number of supports of that size, which keeps false picks out at large p.

    Source:
        Chen and Chen (2008), Biometrika 95(3), with gamma = 1.
    """
    choices = gammaln(candidates + 1) - gammaln(chosen + 1) - gammaln(candidates - chosen + 1)
    fit = rows * float(np.log(max(mean_squared_error, 1e-300)))
    return fit + chosen * float(np.log(rows)) + 2.0 * float(choices)


def _criterion(moments: Moments, theta: Array, group: bool) -> tuple[Array, Array]:
    """Return the refit of a support and its extended BIC by target [T] (one shared value when grouped)."""
    refitted, _ = refit(moments, theta)
    errors, candidates = moments.mean_squared_error(refitted), theta.shape[1]
    counts = (theta != 0.0).sum(1)
    scores = np.array([extended_bic(e, moments.rows, int(k), candidates) for e, k in zip(errors, counts, strict=True)])
    return refitted, np.full_like(scores, scores.sum()) if group else scores


def information_path(
    moments: Moments,
    start: Array,
    *,
    strengths: Array | None = None,
    penalty: Penalty | None = None,
    group: bool = False,
) -> SparseFit:
    """Return the support with the least extended BIC along a path of rising strengths, refitted by least squares.

    Each target keeps its own best point (one for all when grouped). The default path spans 0.001 to 0.35 a coefficient
    in 20 steps, each started from the one before. Needs no guess of how many lags matter.
    """
    path = np.geomspace(0.001, 0.35, 20) if strengths is None else strengths
    theta = np.asarray(start, dtype=np.float64)
    best, best_theta = np.full(theta.shape[0], np.inf), np.zeros_like(theta)
    chosen, seen, history = np.zeros(theta.shape[0]), None, []
    for strength in path:
        fit = reweighted_l1(
            moments, theta, float(strength), penalty=penalty, group=group, max_rounds=3, max_sweeps=8
        )  # only the support matters here: every candidate is refitted
        theta = fit.theta
        history.append(fit.objective[-1])
        support = theta != 0.0
        if seen is not None and np.array_equal(seen, support):
            continue
        seen = support
        refitted, scores = _criterion(moments, theta, group)
        better = scores < best
        best[better], best_theta[better], chosen[better] = scores[better], refitted[better], strength
        if not support.any():
            break
    return SparseFit(best_theta, tuple(history), float(chosen.mean()), float(best.sum()))


def matching_pursuit(
    moments: Moments, *, max_lags: int | None = None, patience: int = 5, group: bool = False
) -> SparseFit:
    """Return the support that orthogonal matching pursuit reaches with the least extended BIC.

    Each round adds the feature that explains most of what is left and refits; it stops after ``patience`` rounds
    without a better criterion.
    """
    targets, candidates = moments.cross.shape
    limit = min(max_lags or candidates, candidates, max(int(moments.rows) // 2, 1))
    theta = np.zeros((targets, candidates))
    total = 0.0
    for members in [list(range(targets))] if group else [[target] for target in range(targets)]:
        theta[members], score = _pursue(moments, members, limit, patience)
        total += score
    return SparseFit(theta, (), 0.0, total)


def _pursue(moments: Moments, members: list[int], limit: int, patience: int) -> tuple[Array, float]:
    gram, cross, power = moments.gram, moments.cross[members], moments.power[members]
    candidates = gram.shape[0]
    diagonal = np.maximum(gram.diagonal(), 1e-300)
    score: Callable[[Array, int], float] = lambda errors, size: sum(  # noqa: E731
        extended_bic(float(error), moments.rows, size, candidates) for error in errors
    )
    best_theta, best = np.zeros_like(cross), score(power, 0)
    support: list[int] = []
    residual, worse = cross.copy(), 0
    while len(support) < limit and worse < patience:
        gain = (residual**2).sum(0) / diagonal
        gain[support] = -1.0
        support.append(int(gain.argmax()))
        solution = np.linalg.lstsq(gram[np.ix_(support, support)], cross[:, support].T, rcond=1e-12)[0]  # [k, T]
        residual = cross - solution.T @ gram[support]
        errors = np.maximum(power - (solution.T * cross[:, support]).sum(1), 0.0)
        reached = score(errors, len(support))
        if reached < best:
            best, best_theta, worse = reached, np.zeros_like(cross), 0
            best_theta[:, support] = solution.T
        else:
            worse += 1
    return best_theta, best


def paper_strength(density: float, num_features: int, c_lambda: float) -> float:
    """Return lambda / p of the paper's rule ``lambda = c_lambda (1 / s - 1)`` with density s in (0, 1]."""
    return c_lambda * (1.0 / density - 1.0) / num_features
