"""Whether series can be judged at all: asked before a training, whose hours would else be for nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tsforge.app.reconstruct_data import FEWEST, Trajectories
from tsforge.core.errors import DataError, listing
from tsforge.dynamics.config import EvaluationConfig
from tsforge.dynamics.evaluation import spectral_rows

Array = NDArray[np.float64]
_FLAT = 1e-9  # of a deviation of the training rows: below, a variate is constant
_WIDTHS = 20.0  # rows for each bin of smoothing below which D_H says little


def check_judging(data: Trajectories, config: EvaluationConfig) -> None:
    """Refuse series that free runs and predictions cannot be compared with.

    Raises:
        DataError: too few rows for PE(n) or complete ones for D_stsp, a variate that is constant in them, or no
            complete row with a value at each of the next n.
    """
    for name, test in _series(data).items():
        _check_states(test, data, name)
        _check_steps(test, config.prediction_steps, name)
    if data.valid is not None:
        _check_states(data.valid, data, "the rows that validate")


def _series(data: Trajectories) -> dict[str, Array]:
    """Return the test series by what messages call them."""
    if not data.tests:
        return {"the test series": data.test}
    return {f"the test series of '{name}'": rows for name, rows in data.tests.items()}


def _check_states(rows: Array, data: Trajectories, what: str) -> None:
    complete = rows[np.isfinite(rows).all(axis=1)]
    if len(complete) < FEWEST:
        raise DataError(
            f"{what} has {len(complete)} rows without missing values; judging needs at least {FEWEST}: leave the "
            "variates with most missing values out (data.columns), or give more rows"
        )
    unit = rows_unit(data)
    flat = [name for name, spread in zip(data.columns, complete.std(axis=0) / unit, strict=True) if spread <= _FLAT]
    if flat:
        raise DataError(
            f"the column(s) {listing(flat)} are constant in the complete rows of {what}, so states cannot be compared; "
            "leave them out (data.columns), or judge by other rows (data.split, data.test)"
        )


def rows_unit(data: Trajectories) -> Array:
    """Return (N,) the deviation of the training rows, in the units in which series are kept (1 if standardised)."""
    return np.asarray(np.nanstd(np.concatenate(data.train), axis=0))


def _check_steps(rows: Array, steps: int, what: str) -> None:
    if len(rows) <= steps:
        raise DataError(
            f"{what} has {len(rows)} rows, but PE({steps}) needs more than {steps}; lower evaluation.prediction_steps, "
            "or give it more rows (data.split, data.test)"
        )
    known = np.isfinite(rows)
    starts, seen = np.flatnonzero(known[:-steps].all(axis=1)), np.asarray(known.any(axis=1))
    if not len(starts) or not all(seen[starts + step].any() for step in range(1, steps + 1)):
        raise DataError(
            f"{what} has no complete row followed by a value at each of the next {steps}, which PE({steps}) needs; "
            "lower evaluation.prediction_steps, or judge by other rows"
        )


def spectral_notes(data: Trajectories, sigma: float) -> list[str]:
    """Return where the spectral distance says little: test rows too few for its smoothing, or with missing values."""
    short, lost, weak = [], [], []
    for name, test in (data.tests or {data.name: data.test}).items():
        rows = spectral_rows(test, sigma)
        if rows is None:
            lost.append(name)
            continue
        length = rows.stop - rows.start
        if length < len(test):
            short.append(f"{name}: {length} of {len(test)}")
        if length < _WIDTHS * sigma:
            weak.append(f"{name}: {length}")
    notes = []
    if weak:
        notes.append(
            f"D_H of fewer than {_WIDTHS * sigma:g} rows with evaluation.sigma={sigma:g} says little, since smoothing "
            f"leaves no peaks ({listing(weak)})"
        )
    if short:
        notes.append(f"D_H compares only the longest stretch of test rows without missing values ({listing(short)})")
    if lost:
        notes.append(f"no D_H of {listing(lost)}: missing values leave no stretch of test rows that is long enough")
    return notes
