"""Naive forecasts against loops over plain lists, with and without gaps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.models._ar_windows import series_error, training_error
from tsforge.models.drift import Drift, DriftConfig
from tsforge.models.last_value import LastValue, LastValueConfig
from tsforge.models.seasonal_naive import SeasonalNaive, SeasonalNaiveConfig

RNG = np.random.default_rng(0)
CONTEXT = RNG.normal(size=(6, 10, 2))
MASK = RNG.random((6, 10, 2)) > 0.35
MASK[0], MASK[1] = True, False
SPEC = DataSpec(context_length=10, horizon=7, num_variates=2)


def batch(mask: np.ndarray = MASK) -> Batch:
    values = torch.from_numpy(np.where(mask, CONTEXT, 0.0))
    return Batch(context=values, context_mask=torch.from_numpy(mask))


def rows() -> list[tuple[int, int, list[float | None]]]:
    return [
        (b, v, [CONTEXT[b, t, v] if MASK[b, t, v] else None for t in range(10)]) for b in range(6) for v in range(2)
    ]


def test_last_value_repeats_the_last_observed_value() -> None:
    found = LastValue(LastValueConfig(), SPEC)(batch()).raw
    assert found.shape == (6, 7, 2, 1)
    for b, v, values in rows():
        expected = next((value for value in reversed(values) if value is not None), 0.0)
        assert found[b, :, v, 0].tolist() == [expected] * 7


@pytest.mark.parametrize("season", [1, 3, 4, 10])
def test_seasonal_naive_takes_the_newest_observed_value_of_the_phase(season: int) -> None:
    found = SeasonalNaive(SeasonalNaiveConfig(season_length=season), SPEC)(batch()).raw[..., 0]
    for b, v, values in rows():
        last = next((value for value in reversed(values) if value is not None), 0.0)
        for step in range(7):
            place = 10 + step - season
            while place >= 10 or (place >= 0 and values[place] is None):
                place -= season
            expected = values[place] if place >= 0 else last
            assert found[b, step, v].item() == expected


def test_seasonal_naive_refuses_a_season_longer_than_the_context() -> None:
    with pytest.raises(ModelError, match="season_length 11 does not fit into context_length 10"):
        SeasonalNaive(SeasonalNaiveConfig(season_length=11), SPEC)


@pytest.mark.parametrize("steps", [None, 1, 4])
def test_drift_continues_the_line(steps: int | None) -> None:
    model = Drift(DriftConfig(steps=steps), SPEC)
    found = model(batch()).raw[..., 0]
    reach = 9 if steps is None else steps
    for b, v, values in rows():
        seen = [t for t in range(10) if values[t] is not None]
        if not seen:
            assert found[b, :, v].tolist() == [0.0] * 7
            continue
        last = seen[-1]
        before = [t for t in seen if t <= last - reach]
        start = before[-1] if before else seen[0]
        slope = (values[last] - values[start]) / (last - start) if last > start else 0.0
        expected = [values[last] + slope * (9 - last + step) for step in range(1, 8)]
        np.testing.assert_allclose(found[b, :, v].numpy(), expected, atol=1e-12)
    parts = model.components(batch())
    torch.testing.assert_close(parts["last_value"] + parts["drift"], found)


def test_drift_refuses_more_steps_than_the_context_has() -> None:
    with pytest.raises(ModelError, match="needs a context of 11 rows"):
        Drift(DriftConfig(steps=10), SPEC)


def test_residual_scale_is_the_error_of_every_training_window() -> None:
    values = RNG.normal(size=(60, 2)).cumsum(0)
    mask = RNG.random((60, 2)) > 0.1
    data = TrainingSeries(
        values=torch.from_numpy(np.where(mask, values, 0.0)),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, 25, 60]),
        offset=torch.tensor([3, 0]),
    )
    report = LastValue(LastValueConfig(), replace(SPEC, num_params=2)).solve(data)
    errors: list[list[list[float]]] = [[[] for _ in range(2)] for _ in range(7)]
    for first, last in ((0, 25), (25, 60)):
        for origin in range(first + 10, last - 7 + 1):
            for v in range(2):
                seen = [t for t in range(origin - 10, origin) if mask[t, v]]
                for step in range(7):
                    if mask[origin + step, v]:
                        errors[step][v].append(values[origin + step, v] - (values[seen[-1], v] if seen else 0.0))
    expected = [[np.sqrt(np.mean(np.square(cell))) for cell in row] for row in errors]
    assert report.finished
    assert report.residual_scale is not None
    np.testing.assert_allclose(report.residual_scale.numpy(), expected, rtol=1e-10)


def test_residual_scale_is_none_without_a_window() -> None:
    short = TrainingSeries(
        torch.zeros(5, 2), torch.ones(5, 2, dtype=torch.bool), torch.tensor([0, 5]), torch.tensor([0])
    )
    assert LastValue(LastValueConfig(), replace(SPEC, num_params=2)).solve(short).residual_scale is None


def test_point_forecasts_need_no_residual_scale() -> None:
    data = TrainingSeries(
        torch.randn(90, 2), torch.ones(90, 2, dtype=torch.bool), torch.tensor([0, 90]), torch.tensor([0])
    )
    assert LastValue(LastValueConfig(), SPEC).solve(data).residual_scale is None
    assert LastValue(LastValueConfig(), replace(SPEC, num_params=2)).solve(data).residual_scale is not None


def test_errors_of_each_series_are_those_of_that_series_alone() -> None:
    values = torch.from_numpy(RNG.normal(size=(80, 2)).cumsum(0))
    mask = torch.ones(80, 2, dtype=torch.bool)
    mask[60:, 1] = False  # of the third series nothing of one variate
    bounds = [0, 30, 60, 80, 80]
    indptr = torch.tensor(bounds)
    data = TrainingSeries(values, mask, indptr, torch.zeros(4, dtype=torch.int64))
    model = LastValue(LastValueConfig(), replace(SPEC, num_params=2))
    found = series_error(model, data)
    assert found is not None
    assert found.shape == (4, 7, 2)
    for index, (first, last) in enumerate(pairwise(bounds)):
        rows = slice(first, last)
        part = TrainingSeries(values[rows], mask[rows], torch.tensor([0, last - first]), torch.tensor([0]))
        alone = training_error(model, part)
        if alone is None:
            assert found[index].isnan().all()
        elif index == 2:
            torch.testing.assert_close(found[index, :, 0], alone[:, 0])
            assert found[index, :, 1].isnan().all()
        else:
            torch.testing.assert_close(found[index], alone)
    assert series_error(model, TrainingSeries(values[:5], mask[:5], torch.tensor([0, 5]), torch.tensor([0]))) is None


def test_many_windows_are_thinned_series_by_series() -> None:
    values = torch.from_numpy(RNG.normal(size=(600, 2)))
    mask = torch.ones(600, 2, dtype=torch.bool)
    model = LastValue(LastValueConfig(), replace(SPEC, num_params=2))
    data = TrainingSeries(values, mask, torch.tensor([0, 580, 600]), torch.zeros(2, dtype=torch.int64))
    full, some = (series_error(model, data, max_windows=most) for most in (2048, 2))
    assert full is not None
    assert some is not None
    torch.testing.assert_close(some[1], full[1], msg="the short one keeps all its windows")
    assert not torch.equal(some[0], full[0])
    torch.testing.assert_close(some[0], full[0], rtol=0.3, atol=0.0)
