"""VAR: its fit against statsmodels, explicit windows and a loop of folds; damping, gaps, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.models.var import FOLDS, RADIUS, RIDGES, Var, VarConfig, companion_radius

VARIATES, HORIZON, CONTEXT = 3, 5, 12


def planted(rows: int = 900, seed: int = 0) -> np.ndarray:
    """A stable VAR(2) of three variates, the third told by the first of two rows ago."""
    generator = np.random.default_rng(seed)
    first = np.array([[0.5, 0.2, 0.0], [-0.3, 0.4, 0.1], [0.0, 0.0, 0.3]])
    second = np.array([[-0.2, 0.0, 0.0], [0.0, 0.1, 0.0], [0.6, 0.0, 0.0]])
    y = np.zeros((rows, VARIATES))
    for t in range(2, rows):
        y[t] = 0.3 + first @ y[t - 1] + second @ y[t - 2] + generator.normal(0, 1, VARIATES)
    return y


def series(*parts: np.ndarray, mask: np.ndarray | None = None) -> TrainingSeries:
    values = np.concatenate(parts)
    seen = np.ones(values.shape, dtype=bool) if mask is None else mask
    ends = np.cumsum([0, *(len(part) for part in parts)])
    return TrainingSeries(
        values=torch.from_numpy(np.where(seen, values, 0.0)),
        mask=torch.from_numpy(seen),
        indptr=torch.from_numpy(ends),
        offset=torch.zeros(len(parts), dtype=torch.int64),
    )


def model(variates: int = VARIATES, context: int = CONTEXT, **settings: Any) -> Var:
    spec = DataSpec(num_variates=variates, context_length=context, horizon=HORIZON)
    return Var(VarConfig(**settings), spec).double()


def forecast(fitted: Var, context: np.ndarray) -> Tensor:
    rows = torch.from_numpy(context)[None]
    return fitted(Batch(context=rows, context_mask=torch.ones_like(rows, dtype=torch.bool))).raw[0, ..., 0]


def explicit(values: np.ndarray, lags: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (a constant, then lag by lag) and targets, by a loop."""
    rows = [np.concatenate([[1.0], *(values[t - k] for k in range(1, lags + 1))]) for t in range(lags, len(values))]
    return np.array(rows), values[lags:]


def ridge(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    extra = np.sqrt(penalty * len(features)) * np.eye(features.shape[1])[1:]
    stacked = np.vstack([features, extra]), np.vstack([targets, np.zeros((len(extra), targets.shape[1]))])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


def test_without_a_penalty_it_is_the_var_of_statsmodels() -> None:
    api = pytest.importorskip("statsmodels.tsa.api", reason="needs the test extra (statsmodels)")
    y = planted()
    fitted = model(lags=2, ridge=0.0)
    report = fitted.solve(series(y))
    theirs = api.VAR(y).fit(2, trend="c")
    np.testing.assert_allclose(fitted.weight.numpy(), theirs.params[1:].T, atol=1e-9)
    np.testing.assert_allclose(fitted.bias.numpy(), theirs.params[0], atol=1e-9)
    np.testing.assert_allclose(forecast(fitted, y[-CONTEXT:]), theirs.forecast(y[-2:], HORIZON), atol=1e-8)
    assert report.finished
    assert report.details["radius"] == pytest.approx(1.0 / np.abs(theirs.roots).min(), rel=1e-8)


def test_with_a_penalty_it_is_the_regression_on_explicit_windows_of_all_series() -> None:
    parts = planted(300, 1), planted(2, 2), planted(200, 3)  # the second is too short for three lags
    fitted = model(lags=3, ridge=0.05)
    fitted.solve(series(*parts))
    pairs = [explicit(part, 3) for part in parts if len(part) > 3]
    wanted = ridge(np.vstack([x for x, _ in pairs]), np.vstack([y for _, y in pairs]), 0.05)
    np.testing.assert_allclose(fitted.weight.numpy(), wanted[1:].T, atol=1e-9)
    np.testing.assert_allclose(fitted.bias.numpy(), wanted[0], atol=1e-9)


def test_lags_and_penalty_are_those_of_a_loop_over_folds() -> None:
    y = planted(400, 4)
    fitted = model()
    report = fitted.solve(series(y))
    longest = fitted.orders[-1]
    assert longest == CONTEXT
    fold = np.arange(len(y))[longest:] // -(-len(y) // FOLDS)
    errors = {}
    for lags in fitted.orders:
        features, targets = (part[longest - lags :] for part in explicit(y, lags))
        for penalty in RIDGES:
            total = 0.0
            for held in range(FOLDS):
                weight = ridge(features[fold != held], targets[fold != held], penalty)
                total += np.square(targets[fold == held] - features[fold == held] @ weight).sum()
            errors[lags, penalty] = total
    assert (report.details["lags"], report.details["ridge"]) == min(errors, key=errors.__getitem__)
    assert report.details["lags"] == 2


def test_an_unstable_fit_is_damped_and_keeps_the_level() -> None:
    growth = np.exp(0.02 * np.arange(300.0))[:, None] * np.ones(2) + planted(300, 5)[:, :2] * 0.01
    wild = model(2, lags=2, ridge=0.0)
    report = wild.solve(series(growth))
    assert report.details["radius"] > 1.01
    lags = wild.weight.reshape(2, 2, 2).permute(1, 0, 2)
    assert companion_radius(lags) == pytest.approx(RADIUS, abs=1e-6)
    level = growth.mean(axis=0)
    features, targets = explicit(growth, 2)
    plain = np.linalg.lstsq(features, targets, rcond=None)[0]
    wanted = np.concatenate([[1.0], level, level]) @ plain
    np.testing.assert_allclose(forecast(wild, np.tile(level, (CONTEXT, 1)))[0], wanted, rtol=1e-6)


def test_rows_with_gaps_do_not_count_and_forecasts_are_finite() -> None:
    y = planted(1200, 6)
    mask = np.random.default_rng(7).random(y.shape) > 0.03
    mask[500:560] = False
    fitted = model(lags=2, ridge=1e-4)
    report = fitted.solve(series(y, mask=mask))
    assert report.details["rows"] == mask[2:].all(axis=1).sum()
    truth = model(lags=2, ridge=1e-4)
    truth.solve(series(y))
    assert float((fitted.weight - truth.weight).abs().max()) < 0.1
    rows, seen = torch.from_numpy(y[-CONTEXT:])[None], torch.from_numpy(mask[500 : 500 + CONTEXT])[None]
    found = fitted(Batch(context=torch.where(seen, rows, 0.0), context_mask=seen)).raw
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("rows", [4, 30, 256, 269, 600])
def test_series_of_any_length_have_their_gaps_filled(rows: int) -> None:
    """By what the same autoregression makes of the whole series, where one stretch holds it."""
    y = planted(rows, 10)
    mask = np.random.default_rng(11).random(y.shape) > 0.1
    mask[-1] = True
    fitted = model(lags=1, ridge=1e-2, context=40)
    data = series(planted(400, 12), y, mask=np.concatenate([np.ones((400, VARIATES), dtype=bool), mask]))
    fitted.solve(data)
    found = fitted._filled(data.values[400:], data.mask[400:])
    assert found.shape == y.shape
    assert bool(found.isfinite().all())
    np.testing.assert_array_equal(found.numpy()[mask], y[mask])
    if 24 <= rows <= 256:
        whole = fitted.gaps(data.values[400:][None], data.mask[400:][None])[0]
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=0.0)


def test_mostly_incomplete_rows_count_filled() -> None:
    y = planted(900, 8)
    mask = np.random.default_rng(9).random(y.shape) > 0.4  # 22 % of the rows are complete
    fitted = model(lags=1, ridge=1e-3)
    report = fitted.solve(series(y, mask=mask))
    assert report.details["rows"] == mask[1:].any(axis=1).sum()
    assert bool(fitted.weight.isfinite().all())


def test_what_is_told_adds_up() -> None:
    y = planted()
    fitted = model(lags=2, ridge=1e-3)
    fitted.solve(series(y))
    rows = torch.from_numpy(y[-CONTEXT:])[None]
    batch = Batch(context=rows, context_mask=torch.ones_like(rows, dtype=torch.bool))
    parts = fitted.components(batch)
    torch.testing.assert_close(parts["lags"] + parts["constant"], fitted(batch).raw[..., 0])
    told = fitted.explain()
    assert told["fit"][0]["lags"] == 2
    strongest = told["coefficients"][0]
    assert (strongest["lag"], strongest["row"], strongest["column"]) == (2, 2, 0)  # planted
    rebuilt = np.zeros((VARIATES, 2, VARIATES))
    for cell in told["coefficients"]:
        rebuilt[cell["row"], cell["lag"] - 1, cell["column"]] = cell["value"]
    np.testing.assert_allclose(rebuilt.reshape(VARIATES, -1), fitted.weight.numpy())


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ModelError, match="lags is 13, but context_length is 12"):
        model(lags=13)
    with pytest.raises(ModelError, match=r"4 lags of 1200 variates are 4800 features.* at most 2048"):
        model(1200, lags=4)
    with pytest.raises(ModelError, match="longest series has 4 training rows; model.lags 6 needs more"):
        model(lags=6).solve(series(planted(4), planted(3)))
    with pytest.raises(ModelError, match="no row of the training span"):
        model(lags=2).solve(series(planted(40), mask=np.zeros((40, VARIATES), dtype=bool)))
    assert model(600).orders == [1]


def test_a_variate_that_was_never_observed_does_no_harm() -> None:
    y = planted()
    mask = np.ones(y.shape, dtype=bool)
    mask[:, 1] = False
    fitted = model(lags=2, ridge=0.0)
    fitted.solve(series(y, mask=mask))
    pair = model(2, lags=2, ridge=0.0)
    pair.solve(series(y[:, [0, 2]]))
    kept = fitted.weight.reshape(3, 2, 3)[[0, 2]][:, :, [0, 2]]
    np.testing.assert_allclose(kept, pair.weight.reshape(2, 2, 2), atol=1e-8)
    np.testing.assert_allclose(fitted.weight.reshape(3, 2, 3)[1], 0.0, atol=1e-8)
