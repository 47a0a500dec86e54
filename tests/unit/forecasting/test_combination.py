"""Weights from held-out errors: greedy selection against brute force, limits, scopes, degenerate cases."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest

from tsforge.core.errors import ConfigError, DataError
from tsforge.forecasting.combination import (
    ROUNDS,
    HeldOutErrors,
    anchor_share,
    block_losses,
    clear_gain,
    greedy_weights,
    mixture_weights,
)

BLOCKS, WINDOWS, HORIZON, VARIATES = 4, 80, 3, 2


def held(errors: Any, mask: Any = None, series: Any = None) -> HeldOutErrors:
    errors = np.asarray(errors, dtype=np.float32)
    number = errors.shape[1]
    return HeldOutErrors(
        errors=errors,
        mask=np.ones(errors.shape[1:], dtype=bool) if mask is None else mask,
        series=np.zeros(number, dtype=np.int64) if series is None else series,
        block=np.arange(number) * BLOCKS // number,
    )


def noise(number: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(number, WINDOWS, HORIZON, VARIATES))


def loop_loss(errors: Any, block: Any, weights: Any, loss: str) -> float:
    """Mean log loss over blocks, by plain loops."""
    total = 0.0
    for name in range(BLOCKS):
        cells = []
        for window in np.flatnonzero(block == name):
            for step in range(HORIZON):
                for variate in range(VARIATES):
                    error = sum(w * float(errors[i, window, step, variate]) for i, w in enumerate(weights))
                    cells.append(error**2 if loss == "mse" else abs(error))
        total += np.log(np.mean(cells))
    return total / BLOCKS


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_block_losses_against_loops(loss: Any) -> None:
    data = held(noise(3))
    weights = np.array([0.2, 0.5, 0.3])
    found = np.log(block_losses(data, weights, loss)).mean()
    assert found == pytest.approx(loop_loss(data.errors, data.block, weights, loss), rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_greedy_comes_close_to_the_best_mixture_of_a_grid(loss: Any) -> None:
    base = noise(1, seed=9)[0]
    errors = np.stack([base + noise(1, 1)[0], base + 1.2 * noise(1, 2)[0], 3.0 * base])
    data = held(errors)
    weights = greedy_weights(data, loss=loss)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0)

    def value(one: Any) -> float:
        return float(np.log(block_losses(data, one, loss)).mean())

    grid = [np.bincount(picks, minlength=3) / 10 for picks in combinations_with_replacement(range(3), 10)]
    best = min(value(one) for one in grid)
    assert value(weights) < best + 0.005
    assert value(weights) < min(value(row) for row in np.eye(3)) - 0.05  # errors that cancel are used


def test_a_candidate_that_is_clearly_best_stays_alone_and_ties_are_settled_by_order() -> None:
    base = noise(1)[0]
    assert greedy_weights(held(np.stack([2.0 * base, base, 3.0 * base]))).tolist() == [0.0, 1.0, 0.0]
    assert greedy_weights(held(np.stack([base, base]))).tolist() == [1.0, 0.0]
    assert greedy_weights(held(base[None])).tolist() == [1.0]


def test_no_more_members_than_allowed() -> None:
    weights = greedy_weights(held(noise(9)), max_members=3)
    assert (weights > 0).sum() == 3
    with pytest.raises(ConfigError, match="at least one"):
        greedy_weights(held(noise(2)), max_members=0)


def test_one_wild_stretch_does_not_decide_alone() -> None:
    steady, other = noise(2)
    wild = other.copy()
    steady = 0.5 * steady
    steady[:20] *= 200.0  # the first stretch: huge errors, slightly larger than those of the other
    wild[:20] = steady[:20] * 0.98
    weights = greedy_weights(held(np.stack([steady, wild])))
    assert weights[0] > 0.75  # pooled squared errors would take the other one


def test_unobserved_cells_do_not_count() -> None:
    base = noise(2)
    mask = np.random.default_rng(1).random(base.shape[1:]) > 0.3
    spoiled = np.where(mask, base, 50.0)
    found = greedy_weights(held(spoiled, mask=mask))
    assert found == pytest.approx(greedy_weights(held(np.where(mask, base, 0.0), mask=mask)))
    with pytest.raises(DataError, match="no observed cell"):
        held(base, mask=np.zeros_like(mask))
    with pytest.raises(DataError, match="not finite"):
        held(np.full_like(base, np.nan))


def test_weights_of_variates_and_series_move_at_most_half_of_the_way() -> None:
    first, second = noise(2)
    errors = np.stack([first, second])
    errors[0, ..., 0] *= 0.1  # the first is much better for variate 0, the second for variate 1
    errors[1, ..., 1] *= 0.1
    data = held(errors)
    common = greedy_weights(data)
    by_variate = mixture_weights(data, scope="variate")
    assert by_variate.shape == (1, 2, 1, VARIATES)
    assert by_variate.sum(1) == pytest.approx(1.0)
    own = by_variate[0, :, 0]
    assert own[0, 0] > common[0] + 0.15
    assert own[1, 1] > common[1] + 0.15
    assert own[0, 0] <= common[0] * 0.5 + 0.5 + 1e-9
    assert ROUNDS >= 20  # a share of a half is resolved

    series = np.tile([0, 1], WINDOWS // 2)
    errors = np.stack(noise(2, seed=3))
    errors[0, series == 0] *= 0.1
    errors[1, series == 1] *= 0.1
    sets = mixture_weights(held(errors, series=series), scope="series", num_series=3)
    assert sets.shape == (4, 2, 1, 1)
    assert sets[0, 0, 0, 0] > sets[3, 0, 0, 0] > sets[1, 0, 0, 0]
    assert np.array_equal(sets[2], sets[3])  # a series without windows, and strangers, take the global weights
    assert np.array_equal(mixture_weights(held(errors)), mixture_weights(held(errors), scope="global"))


def test_gain_and_its_standard_error() -> None:
    old, new = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.5, 1.0, 4.0, 8.0])
    gain, error = clear_gain(old, new)
    gains = np.array([np.log(2), np.log(2), 0.0, 0.0])
    assert gain == pytest.approx(gains.mean())
    assert error == pytest.approx(gains.std(ddof=1) / 2)
    assert clear_gain(old[:1], new[:1])[1] == np.inf


def test_the_share_of_an_anchor_falls_with_the_evidence_against_it() -> None:
    alone = np.array([1.0, 1.0, 1.0, 1.0])
    gains = np.array([0.1, 0.3, 0.1, 0.3])  # in log loss: mean 0.2, standard error 0.0577
    error = gains.std(ddof=1) / 2
    for shift in (0.0, 0.3, -0.15, -0.19):
        z = (0.2 + shift) / error
        share = min(4 / (4 + z**2), 0.95)
        assert anchor_share(alone, alone * np.exp(-(gains + shift))) == pytest.approx(share)
    assert anchor_share(alone, np.full(4, 0.9)) == pytest.approx(0.0)  # every stretch says the same
    assert anchor_share(alone, 1.1 * alone) == 0.95  # no better at all
    assert anchor_share(alone, alone) == 0.95
    assert anchor_share(alone[:1], 0.5 * alone[:1]) == 0.5  # one stretch: nothing is known of the noise


@pytest.mark.parametrize("scope", ["global", "variate", "series"])
def test_a_mixture_leans_on_its_anchor_unless_the_stretches_agree_against_it(scope: Any) -> None:
    first = noise(1)[0]
    scale = np.repeat([0.4, 1.0, 1.2, 1.2], WINDOWS // BLOCKS)[:, None, None]
    doubtful = np.stack([first, first * scale])  # the other wins one stretch by a lot and loses two of the rest
    free = mixture_weights(held(doubtful), scope=scope, num_series=1)
    leaning = mixture_weights(held(doubtful), scope=scope, num_series=1, anchor=0)
    assert leaning.shape == free.shape
    assert leaning.sum(1) == pytest.approx(1.0)
    assert leaning[:, 0].min() > free[:, 0].max() + 0.1
    clear = np.stack([first, 0.3 * first + 0.05 * noise(1, seed=1)[0]])  # the other wins every stretch
    assert mixture_weights(held(clear), scope=scope, num_series=1, anchor=0)[:, 1].min() > 0.9
    few = mixture_weights(held(noise(4)), scope=scope, num_series=1, anchor=3, max_members=2)
    assert ((few > 0).sum(axis=1) <= 2).all()
    assert few.sum(1) == pytest.approx(1.0)


def test_an_anchor_takes_no_place_from_the_best_member() -> None:
    """With room for one the best candidate is taken, whether or not the selection began at another one."""
    data = held(np.stack([size * one for size, one in zip((3.0, 0.3, 0.32), noise(3), strict=True)]))
    free, leaning = (mixture_weights(data, max_members=1, anchor=anchor).ravel() for anchor in (None, 0))
    assert free.tolist() == leaning.tolist() == [0.0, 1.0, 0.0]
    two = mixture_weights(data, max_members=2, anchor=0).ravel()
    assert two[0] == 0.0
    assert (two[1:] > 0.3).all()
    equal = held(np.stack([noise(1)[0], noise(1)[0] * 1.001]))
    assert mixture_weights(equal, max_members=1, anchor=0).ravel().tolist() == [1.0, 0.0]
