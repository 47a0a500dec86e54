"""A linear state-space model of all variates (``state_space``) from training rows, in closed form.

From second moments of neighbouring rows alone: a ridge regression of y[t] on the p rows before; its weights
tell what the past says of each of the next rows while those are 0 between; the main directions of that, in units of
the noise, are the states; A, C, K by regressions on them; S from the filter's own deviations on the training rows,
correlations shrunk (Ledoit-Wolf). A and A - K C are scaled down until stable. Moments are those of complete stretches
of rows; where these are few, of all pairs of observed cells, made a covariance again, then twice of the rows with
missing cells told by the filter.

Sources: Jansson (2003), Subspace identification and ARX modeling, and Chiuso (2007), The role of vector autoregressive
modeling in predictor-based subspace identification, Automatica 43; Bauer (2001), Order estimation for subspace methods,
Automatica 37. Deviations: p is twice the order that Akaike's criterion takes (at most 32); states are those whose
canonical variate pays for its parameters by Schwarz's criterion and stands out of the noise; S comes last, from what
the filter really does. Of more than 10,000 rows with few complete stretches eight pieces are learnt from.

Legend: T training rows, V variates, U of them in the model, k states, p lags, n complete or paired rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from tsforge.anomaly.covariance import ROWS_PER_VARIATE, DenseCovariance, fit_covariance
from tsforge.anomaly.state_space import SHORTEST_WINDOW, StateSpace
from tsforge.anomaly.uncomparable import Uncomparable

FloatArray = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
FEWEST_PAIRS = 50  # neighbouring observed rows of a variate; and 5 a variate
MOST_STATES = 64
MOST_LAGS = 32
MOST_CELLS = 1_000  # cells of a past whose covariance is still decomposed in seconds
MOST_ROWS = 30_000  # whose moments are taken, spread evenly
LARGEST_RADIUS = 1.0 - 1e-6  # of a matrix that counts as stable
_FILLS = 2  # rounds of filling missing cells where stretches without any are few
_MOST_FILLED = 10_000  # rows that are filled: each is a filter step of its own
_PIECES = 8  # they are taken from
_FLOOR = 1e-9  # least variance of an innovation, as a share of the variate's
_BLOCK = 1 << 22  # numbers held at once


def fit_state_space(training: FloatArray, window: int | None = None, order: int | None = None) -> StateSpace:
    """Return the model of training rows [T, V], NaN where not observed.

    Args:
        training: in time order.
        window: fewest rows that tell a row; None chooses.
        order: states, fewer where the rows hold no more; None chooses.

    Raises:
        Uncomparable: no variate has enough neighbouring rows.
    """
    seen = ~np.isnan(training)
    center, scale, used = _standard(training, seen)
    if not used.any():
        nothing = np.zeros((0, 0))
        rows = window or SHORTEST_WINDOW
        return _model((center, scale, used), (nothing, nothing, nothing), nothing, rows)
    z = np.ascontiguousarray(((training - center) / scale)[:, used])
    whole, filled = False, None
    for _ in range(1 + _FILLS):
        moments, whole = _lag_moments(z, filled, order or 1)
        if not whole and filled is None:
            z = _thinned(z)
        *matrices, noise = _regressed(moments, _state_map(moments, order))
        model = _model((center, scale, used), stable(*matrices), noise, window or 1)
        model = replace(model, window=window or model.settled())
        unseen = np.full((model.reach, z.shape[1]), np.nan)
        _, apart, filled = (part[model.reach :] for part in model.filtered(np.concatenate([unseen, z]), 0))
        model = replace(model, noise=_noise(apart, noise))
        if whole:
            break
    return model if window else replace(model, window=model.settled())


def _model(
    standard: tuple[FloatArray, FloatArray, Bools],
    matrices: tuple[FloatArray, FloatArray, FloatArray],
    noise: FloatArray,
    window: int,
) -> StateSpace:
    # products round by the order in memory: that of what is stored and read again
    transition, loadings, gain = (np.ascontiguousarray(each) for each in matrices)
    return StateSpace(
        center=standard[0],
        scale=standard[1],
        used=standard[2],
        transition=transition,
        loadings=loadings,
        gain=gain,
        noise=np.ascontiguousarray(noise),
        window=window,
    )


def _standard(training: FloatArray, seen: Bools) -> tuple[FloatArray, FloatArray, Bools]:
    """Return center, scale and used [V] of rows [T, V].

    Raises:
        Uncomparable: no variate has enough neighbouring rows.
    """
    lowest = np.where(seen, training, np.inf).min(axis=0, initial=np.inf)
    highest = np.where(seen, training, -np.inf).max(axis=0, initial=-np.inf)
    pairs = (seen[1:] & seen[:-1]).sum(axis=0)
    fewest = max(FEWEST_PAIRS, ROWS_PER_VARIATE * int((highest > lowest).sum()))
    enough = pairs >= fewest
    if not enough.any():
        observed = int(seen.any(axis=1).sum())
        raise Uncomparable(
            f"{len(training)} training rows ({observed} of them observed) hold at most {int(pairs.max(initial=0))} "
            f"pairs of neighbouring rows of a variate, innovation needs {fewest}",
            observed=observed,
        )
    counts = np.where(enough, seen.sum(axis=0), np.nan)
    center = np.where(seen, training, 0.0).sum(axis=0) / counts
    still = enough & (lowest == highest)
    center = np.where(still, lowest, center)  # a mean rounds away from equal numbers, and the spread from 0
    spread = np.sqrt(np.square(np.where(seen, training - center, 0.0)).sum(axis=0) / counts)
    return center, np.where(spread > 0.0, spread, 1.0), enough & (spread > 0.0)


class _Moments(NamedTuple):
    """Second moments [(p + 1) U, (p + 1) U] of rows t, t - 1, .., t - p, and the rows n they rest on."""

    matrix: FloatArray
    rows: float
    width: int

    @property
    def lags(self) -> int:
        return len(self.matrix) // self.width - 1


def _lag_moments(z: FloatArray, filled: FloatArray | None, order: int) -> tuple[_Moments, bool]:
    """Return the moments of standardised rows [T, U] over as many lags as help to tell a row, at least ``order / U``.

    And whether they are those of stretches without missing cells; else of ``filled`` rows, without these of pairs.
    """
    width = z.shape[1]
    observed = int((~np.isnan(z)).any(axis=1).sum())
    most = max(min(MOST_LAGS, MOST_CELLS // width - 1, observed // (10 * width)), 1)
    ends, whole = _stretches(~np.isnan(z), most)
    if whole or filled is not None:
        moments = _summed(z if whole or filled is None else filled, ends, most)
    else:
        moments = _paired(z, ends, most)
    # residual covariances of regressions on 0, 1, .., p lags: one factor holds them all
    cells = np.roll(np.arange(len(moments.matrix)), -width)
    last = np.linalg.cholesky(moments.matrix[np.ix_(cells, cells)])[-width:]
    residual = last[:, -width:] @ last[:, -width:].T
    costs = np.empty(most + 1)
    for lags in range(most, -1, -1):
        costs[lags] = moments.rows * np.linalg.slogdet(residual)[1] + 2.0 * lags * width**2
        part = last[:, (lags - 1) * width : lags * width]
        residual = residual + part @ part.T
    kept = (min(max(2 * int(costs.argmin()), -(-order // width), 1), most) + 1) * width
    return moments._replace(matrix=moments.matrix[:kept, :kept]), whole


def _thinned(z: FloatArray) -> FloatArray:
    """Return pieces of many rows [T, U] with missing ones between, or all where a variate would have too few pairs."""
    if len(z) <= _MOST_FILLED:
        return z
    apart = np.full((MOST_LAGS, z.shape[1]), np.nan)
    pieces = [np.concatenate([apart, part[-_MOST_FILLED // _PIECES :]]) for part in np.array_split(z, _PIECES)]
    fewer = np.concatenate(pieces)
    seen = ~np.isnan(fewer)
    return fewer if int((seen[1:] & seen[:-1]).sum(axis=0).min()) >= FEWEST_PAIRS else z


def _stretches(seen: Bools, lags: int) -> tuple[Ints, bool]:
    """Return the last rows of stretches of ``lags + 1`` rows to learn from, and whether no cell is missing there."""
    ends = np.arange(lags, len(seen))
    complete, some = (
        np.convolve(rows, np.ones(lags + 1), mode="valid") > lags + 0.5 for rows in (seen.all(axis=1), seen.any(axis=1))
    )
    fewest = ROWS_PER_VARIATE * (lags + 1) * seen.shape[1]
    whole = bool(complete.all()) or int(complete.sum()) >= max(fewest, 0.5 * int(some.sum()))
    ends = ends[complete] if whole else ends[some] if int(some.sum()) >= fewest else ends
    return ends[np.unique(np.linspace(0, len(ends) - 1, MOST_ROWS).astype(np.int64))], whole


def _lagged(rows: FloatArray, ends: Ints, lags: int) -> Iterator[FloatArray]:
    """Yield stretches [n, (p + 1) U], newest row first, some at a time."""
    cells = (lags + 1) * rows.shape[1]
    size = max(_BLOCK // cells, 1)
    for low in range(0, len(ends), size):
        place = ends[low : low + size, None] - np.arange(lags + 1)
        yield rows[place].reshape(len(place), cells)


def _products(rows: FloatArray, ends: Ints, lags: int) -> FloatArray:
    cells = (lags + 1) * rows.shape[1]
    return sum((part.T @ part for part in _lagged(rows, ends, lags)), np.zeros((cells, cells)))


def _summed(rows: FloatArray, ends: Ints, lags: int) -> _Moments:
    matrix = _products(rows, ends, lags) / len(ends)
    return _Moments(matrix + _FLOOR * np.eye(len(matrix)), float(len(ends)), rows.shape[1])


def _paired(z: FloatArray, ends: Ints, lags: int) -> _Moments:
    """Return moments of each pair of cells over the rows that have both, made a covariance again."""
    seen = ~np.isnan(z)
    counts = _products(seen.astype(np.float64), ends, lags)
    values, directions = np.linalg.eigh(_products(np.where(seen, z, 0.0), ends, lags) / np.maximum(counts, 1.0))
    # pairs of different rows each err more than rows do: their errors do not cancel
    rows = max(float(np.median(counts)) ** 2 / len(ends), 1.0)
    return _Moments((directions * (np.maximum(values, 0.0) + 1.0 / rows)) @ directions.T, rows, z.shape[1])


def _state_map(moments: _Moments, order: int | None) -> FloatArray:
    """Return what makes the states of the p rows before, newest first: [k, p U]; of unit variance."""
    width, lags = moments.width, moments.lags
    past = moments.matrix[width:, width:]
    across = moments.matrix[:width, width:]
    root = np.linalg.cholesky(past)
    weights = cho_solve((root, True), across.T).T
    noise = moments.matrix[:width, :width] - weights @ across.T
    whiten = np.linalg.cholesky(0.5 * (noise + noise.T) + _FLOOR * np.eye(width))
    ahead = min(lags, max(4, -(-2 * MOST_STATES // width)))
    told = np.zeros((ahead, width, lags * width))
    scaled = solve_triangular(whiten, weights, lower=True)
    for row in range(ahead):  # of y[t + row], what rows before t say while the rows from t on are 0
        told[row, :, : (lags - row) * width] = scaled[:, row * width :]
    _, strength, directions = np.linalg.svd(told.reshape(ahead * width, -1) @ root, full_matrices=False)
    most = min(MOST_STATES, len(strength), max(int(moments.rows) // 20, 1))
    if order is None:
        price = 2.0 * width * np.log(moments.rows) / moments.rows
        edge = (np.sqrt(ahead * width) + np.sqrt(lags * width)) ** 2 / moments.rows
        order = int((np.square(strength) > max(np.expm1(price), edge)).sum())
    chosen = directions[: min(max(order, 1), most)]
    return np.asarray(solve_triangular(root, chosen.T, lower=True, trans=1).T)


def _regressed(moments: _Moments, states: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return A, C, K, S by regressions of y[t] and x[t+1] on x[t], and of what is left of the latter on e[t]."""
    width, matrix = moments.width, moments.matrix
    none = np.zeros((len(states), width))
    now, later = np.concatenate([none, states], axis=1), np.concatenate([states, none], axis=1)
    variance = now @ matrix @ now.T
    inverse = cho_factor(0.5 * (variance + variance.T) + _FLOOR * np.eye(len(states)), lower=True)
    loadings = cho_solve(inverse, now @ matrix[:, :width]).T
    transition = cho_solve(inverse, now @ matrix @ later.T).T
    error = np.concatenate([np.eye(width), np.zeros((width, matrix.shape[1] - width))], axis=1) - loadings @ now
    noise = error @ matrix @ error.T
    noise = 0.5 * (noise + noise.T) + _FLOOR * np.eye(width)
    gain = cho_solve(cho_factor(noise, lower=True), error @ matrix @ later.T).T
    return transition, loadings, gain, noise


def stable(transition: FloatArray, loadings: FloatArray, gain: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return A, C, K with A scaled down to a spectral radius below 1 - 1e-6, and K until A - K C has one, too."""
    radius = _radius(transition)
    if radius >= LARGEST_RADIUS:
        transition = transition * (LARGEST_RADIUS * (1.0 - 1e-9) / radius)
    for share in np.linspace(1.0, 0.0, 41):
        if _radius(transition - share * gain @ loadings) < LARGEST_RADIUS:
            break
    return transition, loadings, share * gain


def _radius(matrix: FloatArray) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max(initial=0.0))


def _noise(apart: FloatArray, otherwise: FloatArray) -> FloatArray:
    """Return the covariance [U, U] of deviations [T, U] about 0: their own sizes, correlations shrunk."""
    seen = ~np.isnan(apart)
    sizes = np.sqrt(np.square(np.where(seen, apart, 0.0)).sum(axis=0) / np.maximum(seen.sum(axis=0), 1))
    sizes = np.maximum(np.where(seen.sum(axis=0) >= FEWEST_PAIRS, sizes, np.sqrt(np.diag(otherwise))), _FLOOR**0.5)
    found = fit_covariance(apart / sizes)
    matrix = found.matrix if isinstance(found, DenseCovariance) else np.linalg.inv(found.solve(np.eye(len(sizes))))
    return np.asarray(0.5 * (matrix + matrix.T) * np.outer(sizes, sizes))
