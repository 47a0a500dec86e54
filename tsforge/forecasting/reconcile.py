"""Reconciliation: forecasts of all nodes of a hierarchy become forecasts that add up.

Linear methods map base forecasts y to S P y. ``bottom_up`` keeps the bottoms. The projections solve generalised least
squares, P = (S' W^-1 S)^-1 S' W^-1 (Wickramasuriya, Athanasopoulos, Hyndman 2019, JASA 114:804-819, Theorem 1), in the
equivalent form with the constraints C y = 0 (the same paper),

    S P y = y - W C' (C W C')^-1 C y,

whose one system has as many unknowns as there are aggregates, and is sparse for a diagonal W:

- ``ols``: W = I (Hyndman et al. 2011, CSDA 55:2579-2589);
- ``wls_structural``: W = diag(S o S 1): every bottom errs alike and by itself (Athanasopoulos et al. 2017, EJOR 262);
- ``wls_variance``: W = mean squared held-out errors (Hyndman, Lee, Wang 2016, CSDA 97:16-32);
- ``mint``: W = the shrunk covariance of ``error_covariance``: a diagonal and a factor of T rows (Woodbury), so that
  10,000 bottoms need no matrix of nodes by nodes.

``top_down`` and ``middle_out`` split the forecasts of one level: ``historical`` by the average of the bottoms' past
shares (Gross and Sohl 1990, J. Forecasting 9:233-254, their method A), ``forecast`` by the shares of the base
forecasts, level by level (Athanasopoulos, Ahmed, Hyndman 2009, IJF 25:146-166); where those sum to zero the split is
even. They are biased even where the base forecasts are not.

Non-negative: negative bottoms are set to zero and summed again (Di Fonzo and Girolimetto 2023, IJF 39:39-57, "set
negative to zero"); the quadratic program of Wickramasuriya et al. (2020) would stay a little closer to the base.

Sample paths are reconciled one by one (Panagiotelis et al. 2023, EJOR 306:693-706). The Gaussian spread takes the base
spread of each node and step and the correlations of past errors without gaps: var = diag(S P Sigma P' S').

Deviation: structural weights are sums of squares of S, which equals the paper's S 1 for sums and is right for means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy import linalg, sparse
from scipy.sparse.linalg import splu

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, ModelError, listing
from tsforge.data.grid import Ints
from tsforge.data.hierarchy import Hierarchy
from tsforge.forecasting.error_covariance import ErrorCovariance, Floats, error_variance, shrunk_covariance

Method = Literal["bottom_up", "top_down", "middle_out", "ols", "wls_structural", "wls_variance", "mint"]
NEEDS_ERRORS = ("wls_variance", "mint")
SPLITTING = ("top_down", "middle_out")
_BLOCK = 256


class ReconcileConfig(Config):
    """How forecasts are made to add up."""

    method: Method = "mint"
    proportions: Literal["forecast", "historical"] | None = None
    """Of ``top_down`` and ``middle_out``: shares of the base forecasts (default), or average shares of the past."""
    level: str | None = None
    """Of ``middle_out``: the level whose forecasts are kept."""
    nonnegative: bool = False
    """No forecast below zero."""
    intervals: Literal["conformal", "gaussian", "none"] = "conformal"
    """``conformal``: margins of the reconciled forecasts on held-out windows; ``gaussian``: from the base quantiles and
    the correlations of the errors; ``none``: points only."""
    windows: int = Field(200, ge=4)
    """Held-out cutoffs, evenly spaced, at most."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value  # reconcile=mint

    @model_validator(mode="after")
    def _consistent(self) -> ReconcileConfig:
        if (self.method == "middle_out") != (self.level is not None):
            raise ValueError("level goes with method middle_out: give both or neither")
        if self.proportions is not None and self.method not in SPLITTING:
            raise ValueError(f"proportions has no effect with method {self.method}; remove it")
        if self.intervals == "gaussian" and self.method in SPLITTING:
            raise ValueError(f"gaussian intervals need a linear method, {self.method} is none; use conformal")
        return self


class Reconciliation:
    """A map from base forecasts of all nodes to coherent ones.

    Attributes:
        hierarchy: the nodes and their sums.
        covariance: W of a projection, None otherwise.
        linear: whether it is one matrix for all rows.
        nonnegative: whether negative bottoms are set to zero.
    """

    def __init__(
        self,
        hierarchy: Hierarchy,
        bottoms: Callable[[Floats], Floats],
        *,
        covariance: ErrorCovariance | None = None,
        linear: bool = True,
        nonnegative: bool = False,
    ) -> None:
        self.hierarchy = hierarchy
        self.covariance = covariance
        self.linear = linear
        self.nonnegative = nonnegative
        self._bottoms = bottoms

    def apply(self, values: Floats) -> Floats:
        """Return coherent forecasts; the aggregates are sums of the returned bottoms. Shape [..., n] -> [..., n].

        Raises:
            DataError: another number of nodes, or a base forecast that is not finite.
        """
        plain = np.asarray(values, dtype=np.float64)
        number = len(self.hierarchy.nodes)
        if plain.ndim < 1 or plain.shape[-1] != number:
            raise DataError(f"base forecasts have shape {plain.shape}; the last axis must be the {number} nodes")
        flat = plain.reshape(-1, number)
        if not np.isfinite(flat).all():
            bad = [self.hierarchy.nodes[k] for k in np.flatnonzero(~np.isfinite(flat).all(axis=0))]
            raise DataError(f"{len(bad)} of {number} nodes have base forecasts that are not finite ({listing(bad)})")
        bottoms = self._bottoms(flat)
        if self.nonnegative:
            bottoms = np.maximum(bottoms, 0.0)
        return np.asarray((self.hierarchy.summing @ bottoms.T).T).reshape(plain.shape)

    def samples(self, paths: Floats) -> Floats:
        """Return coherent sample paths [paths, ..., n]: each is reconciled by itself, so they stay a joint sample."""
        return self.apply(paths)

    def matrix(self) -> Floats:
        """Return S P [n, n], dense; for few nodes.

        Raises:
            ModelError: the method is not linear.
        """
        if not self.linear:
            raise ModelError("forecast proportions depend on the forecasts: there is no one matrix")
        bottoms = self._bottoms(np.eye(len(self.hierarchy.nodes)))
        return np.asarray(self.hierarchy.summing @ bottoms.T)

    def spread(self, deviation: Floats, correlation: ErrorCovariance) -> Floats:
        """Return the standard deviation of Gaussian forecasts after reconciliation.

        Args:
            deviation: of the base forecasts [N, n], one row a step and variate.
            correlation: whose correlations the nodes have.

        Raises:
            ModelError: the method is not linear.
        """
        if not self.linear:
            raise ModelError("a Gaussian spread needs a linear method")
        summing, number = self.hierarchy.summing, len(self.hierarchy.nodes)
        variance = np.zeros(deviation.shape)
        for start in range(0, number, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, number))
            unit = np.zeros((len(block), number))
            unit[np.arange(len(block)), block] = 1.0
            columns = np.asarray((summing @ self._bottoms(unit).T).T)  # rows of (S P)'
            variance += (deviation[:, block] ** 2) @ (columns * columns)
        variance *= correlation.shrinkage
        scaled = correlation.standardised
        if scaled is not None:
            weight = (1.0 - correlation.shrinkage) / len(scaled)
            for row, own in enumerate(deviation):
                moved = np.asarray((summing @ self._bottoms(scaled * own).T).T)
                variance[row] += weight * (moved * moved).sum(axis=0)
        return np.asarray(np.sqrt(variance))


def make_reconciliation(
    config: ReconcileConfig, hierarchy: Hierarchy, *, errors: Floats | None = None, history: Floats | None = None
) -> Reconciliation:
    """Return the reconciliation of a hierarchy.

    Args:
        config: the method.
        hierarchy: what adds up to what.
        errors: [T, n] forecast errors that were known at the cutoff, NaN where missing; for ``wls_variance, mint``.
        history: [T, n] observed values up to the cutoff, NaN where missing; for historical proportions.

    Raises:
        ConfigError: the method does not fit the structure.
        DataError: too few errors, or no history.
    """
    if config.method == "bottom_up":
        first = hierarchy.num_aggregates
        return Reconciliation(hierarchy, lambda values: values[:, first:], nonnegative=config.nonnegative)
    if config.method in SPLITTING:
        return _splitting(config, hierarchy, history)
    covariance = _covariance(config.method, hierarchy, errors)
    bottoms = _projection(hierarchy, covariance)
    return Reconciliation(hierarchy, bottoms, covariance=covariance, nonnegative=config.nonnegative)


def structural_variance(hierarchy: Hierarchy) -> Floats:
    """Return diag(S o S 1) [n]: the variance of a node whose bottoms err alike and independently."""
    return np.asarray(hierarchy.summing.power(2).sum(axis=1)).ravel()


def _covariance(method: str, hierarchy: Hierarchy, errors: Floats | None) -> ErrorCovariance:
    if method == "ols":
        return ErrorCovariance(variance=np.ones(len(hierarchy.nodes)))
    if method == "wls_structural":
        return ErrorCovariance(variance=structural_variance(hierarchy))
    if errors is None:
        raise DataError(f"method {method} needs forecast errors from before the cutoff")
    return ErrorCovariance(variance=error_variance(errors)) if method == "wls_variance" else shrunk_covariance(errors)


def _projection(hierarchy: Hierarchy, covariance: ErrorCovariance) -> Callable[[Floats], Floats]:
    """Return base forecasts [N, n] -> bottoms [N, m] by y - W C' (C W C')^-1 C y."""
    constraints, first = hierarchy.constraints, hierarchy.num_aggregates
    own = covariance.shrinkage * covariance.variance
    if not first:
        return lambda values: values
    core = sparse.csc_array(constraints @ sparse.diags_array(own) @ constraints.T)
    factor = covariance.factor()
    thin = None if factor is None else np.asarray(constraints @ factor.T)  # U [n - m, T]
    solve = _solver(core, thin)
    down = sparse.csr_array(constraints[:, first:].T)

    def bottoms(values: Floats) -> Floats:
        weight = solve(np.asarray(constraints @ values.T))  # [n - m, N]
        change = own[first:, None] * (down @ weight)
        if factor is not None and thin is not None:
            change = change + factor[:, first:].T @ (thin.T @ weight)
        return np.asarray(values[:, first:] - change.T)

    return bottoms


def _solver(core: sparse.csc_array, thin: Floats | None) -> Callable[[Floats], Floats]:
    """Return x -> (K + U U')^-1 x for sparse K and U [k, T], by the smaller of the systems of k and of T unknowns."""
    if thin is not None and thin.shape[1] >= thin.shape[0]:
        whole = linalg.cho_factor(core.toarray() + thin @ thin.T)
        return lambda right: np.asarray(linalg.cho_solve(whole, right))
    sparse_core = splu(core, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    if thin is None:
        return lambda right: np.asarray(sparse_core.solve(right))
    solved = sparse_core.solve(thin)
    inner = linalg.cho_factor(np.eye(thin.shape[1]) + thin.T @ solved)

    def solve(right: Floats) -> Floats:  # Woodbury
        first = sparse_core.solve(right)
        return np.asarray(first - solved @ linalg.cho_solve(inner, thin.T @ first))

    return solve


def _splitting(config: ReconcileConfig, hierarchy: Hierarchy, history: Floats | None) -> Reconciliation:
    kept = _kept_level(config, hierarchy)
    aggregates = hierarchy.num_aggregates
    inside = hierarchy.summing[kept]
    covered = np.asarray((inside != 0).sum(axis=0)).ravel()
    if (covered != 1).any():
        bad = [hierarchy.bottoms[k] for k in np.flatnonzero(covered != 1)]
        raise ConfigError(
            f"{config.method}: {len(bad)} bottoms do not lie below exactly one node of the level that is split "
            f"({listing(bad)}); choose a level that covers every bottom once, or a projection such as mint"
        )
    owner = np.asarray(kept[inside.tocsc().indices], dtype=np.int64)  # one node a bottom
    weights = inside.tocsc().data
    if config.proportions == "historical":
        if history is None:
            raise DataError(f"method {config.method} with historical proportions needs the history of all nodes")
        shares = _historical_shares(hierarchy, history, owner, weights) / weights
        return Reconciliation(hierarchy, lambda values: values[:, owner] * shares, nonnegative=config.nonnegative)
    if hierarchy.parents is None:
        raise ConfigError(
            f"{config.method}: forecast proportions need one parent a node, and this structure is crossed; set "
            "proportions=historical or choose a projection such as mint"
        )
    parents = hierarchy.parents
    steps = _generations(parents, kept)
    rows = hierarchy.summing
    unit = rows.data[rows.indptr[:-1]]  # weight of a bottom in each node: 1, or 1 / size

    def bottoms(values: Floats) -> Floats:
        totals = values / unit  # of means, the sums
        result = np.array(totals)
        for children in steps:
            above = parents[children]
            _, group = np.unique(above, return_inverse=True)
            sums = np.zeros((len(values), int(group.max()) + 1))
            np.add.at(sums.T, group, totals[:, children].T)
            number = np.bincount(group)[group]
            base = sums[:, group]
            share = np.where(base != 0.0, totals[:, children] / np.where(base != 0.0, base, 1.0), 1.0 / number)
            result[:, children] = result[:, above] * share
        return result[:, aggregates:]

    return Reconciliation(hierarchy, bottoms, linear=False, nonnegative=config.nonnegative)


def _kept_level(config: ReconcileConfig, hierarchy: Hierarchy) -> Ints:
    if config.level is not None:
        return hierarchy.at_level(config.level)
    if hierarchy.parents is not None:
        return np.flatnonzero(hierarchy.parents < 0).astype(np.int64)
    return hierarchy.at_level(hierarchy.level_names[0])


def _generations(parents: Ints, kept: Ints) -> list[Ints]:
    """Return the nodes below ``kept``, one array a generation."""
    found: list[Ints] = []
    current = kept
    while True:
        current = np.flatnonzero(np.isin(parents, current)).astype(np.int64)
        if not len(current):
            return found
        found.append(current)


def _historical_shares(hierarchy: Hierarchy, history: Floats, owner: Ints, weights: Floats) -> Floats:
    """Return the mean over time of each bottom's value over its owner's [m]."""
    first = hierarchy.num_aggregates
    above = history[:, owner]
    usable = np.isfinite(history[:, first:]) & np.isfinite(above) & (above != 0.0)
    count = usable.sum(axis=0)
    if not count.all():
        bad = [hierarchy.bottoms[k] for k in np.flatnonzero(count == 0)]
        raise DataError(f"no row with observed bottom and non-zero aggregate for {listing(bad)}: no historical share")
    ratio = np.where(usable, history[:, first:], 0.0) / np.where(usable, above, 1.0)
    shares = weights * ratio.sum(axis=0) / count
    total = np.zeros(len(hierarchy.nodes))
    np.add.at(total, owner, shares)
    return np.asarray(shares / total[owner])  # gaps differ between bottoms: the shares of a node must sum to one
