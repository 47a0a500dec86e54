"""Anomalies written into normal rows: exact labels, nothing else touched, sizes as asked, seeded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tsforge.anomaly.injection import (
    INJECTION_KINDS,
    InjectionConfig,
    WanderConfig,
    inject,
    injected_labels,
    wander,
)
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError


def normal(rows: int = 8000, variates: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    common = np.cumsum(rng.normal(size=(rows, 1)), axis=0) * 0.02
    return common + rng.normal(size=(rows, variates)) + np.arange(variates)


def test_only_the_labelled_cells_change_and_events_keep_their_distance() -> None:
    x = normal()
    y, events = inject(x, InjectionConfig(seed=3, gap=15, length=(10, 40)))
    expected = np.zeros(x.shape, dtype=bool)
    for event in events:
        expected[event.start : event.stop, list(event.variates)] = True
        assert event.stop > event.start
    changed = x != y
    assert not changed[~expected].any()
    assert (changed.any(axis=1) <= injected_labels(events, len(x))).all()
    for before, after in pairwise(events):
        assert after.start - before.stop >= 15
    assert {event.kind for event in events} == set(INJECTION_KINDS)
    share = injected_labels(events, len(x)).mean()
    assert 0.05 <= share <= 0.05 + 40 / len(x)


def test_the_seed_decides_everything_and_the_input_stays() -> None:
    x = normal()
    kept = x.copy()
    first, second, other = (inject(x, InjectionConfig(seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1] != other[1]
    assert np.array_equal(x, kept)


@pytest.mark.parametrize("kind", INJECTION_KINDS)
def test_what_each_kind_does(kind: str) -> None:
    """Checked against the definition of the kind, in units of the deviation of the given rows."""
    x = normal(seed=5)
    y, events = inject(x, validate(InjectionConfig, {"kinds": [kind], "size": [3.0, 3.0], "seed": 7}))
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    for event in events:
        rows, own = slice(event.start, event.stop), list(event.variates)
        was, now = x[rows, own], y[rows, own]
        moved = (now - was) / deviation[own]
        if kind == "level" or kind == "spike":
            np.testing.assert_allclose(np.abs(moved), 3.0)
            assert kind == "level" or event.stop - event.start <= 3
        elif kind == "noise":
            assert 1.5 < moved.std() < 4.5
        elif kind == "stuck":
            assert (now == was[:1]).all()
        elif kind == "drift":
            np.testing.assert_allclose(np.abs(moved[-1]), 3.0)
            assert (np.diff(np.abs(moved), axis=0) > 0).all()
        elif kind == "scale":
            np.testing.assert_allclose(now - mean[own], 4.0 * (was - mean[own]))
        elif kind == "flip":
            np.testing.assert_allclose(now - mean[own], mean[own] - was)
        elif kind == "common":
            assert len(own) == x.shape[1]
            np.testing.assert_allclose(moved, moved[:1].repeat(len(moved), axis=0), atol=1e-9)
            assert np.sqrt(np.mean(moved[0] ** 2)) == pytest.approx(3.0)
        elif kind == "surge":
            load = np.abs(moved) / 3.0
            np.testing.assert_allclose(load, load[:, :1].repeat(len(own), axis=1), atol=1e-9)
            assert load.min() >= -1e-12
            assert len(load) < 30 or 0.2 < load.mean() < 2.0
        else:  # swap: rows of another time, in the same order
            place = np.flatnonzero((x[:, own] == now[0]).all(axis=1))
            assert place.size == 1
            assert abs(place[0] - event.start) >= event.stop - event.start
            assert np.array_equal(now, x[(place[0] + np.arange(len(now))) % len(x)][:, own])


def test_wandering_moves_levels_for_good_and_nothing_else() -> None:
    x = normal(seed=2)
    moved = wander(x, WanderConfig(seed=4, size=(1.0, 1.0)))
    change = (moved - x) / x.std(axis=0)
    ends = np.abs(change[-1])
    assert set(np.round(ends, 9)) == {0.0, 1.0}
    assert np.abs(change[0]).max() <= 0.5  # the step may come with the first row
    steps = np.abs(np.diff(change, axis=0))
    assert ((steps > 0.4).sum(axis=0) <= 1).all()
    assert np.array_equal(moved, wander(x, WanderConfig(seed=4, size=(1.0, 1.0))))
    with pytest.raises(DataError, match="shape"):
        wander(np.arange(3.0))


def test_constant_variates_and_missing_cells_stay_as_they_are() -> None:
    x = normal()
    x[:, 2] = 5.0
    x[100:900, 0] = np.nan
    y, events = inject(x, InjectionConfig(seed=1, kinds=("level", "stuck", "common")))
    assert (y[:, 2] == 5.0).all()
    assert np.array_equal(np.isnan(x), np.isnan(y))
    assert all(2 not in event.variates for event in events)


def test_impossible_settings_say_what_to_do() -> None:
    with pytest.raises(DataError, match="none of 2 variates varies"):
        inject(np.ones((100, 2)))
    with pytest.raises(DataError, match="smaller length"):
        inject(normal(30), InjectionConfig(kinds=("level",)))
    with pytest.raises(DataError, match="shape"):
        inject(np.arange(5.0))
    with pytest.raises(ConfigError, match="least <= largest"):
        validate(InjectionConfig, {"size": [3.0, 1.0]})
