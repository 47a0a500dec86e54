"""Trend and season columns over panels: what is shared between series and windows equals what each has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.models._ar_additive import Additive, AdditivePlan

ROWS = 150
OFFSETS = (0, 40, 0, 40, 7)  # two pairs share their moments, one series has its own


def panel(known: int = 0, seed: int = 0) -> TrainingSeries:
    rng = np.random.default_rng(seed)
    size = ROWS * len(OFFSETS)
    return TrainingSeries(
        values=torch.from_numpy(rng.normal(size=(size, 2))),
        mask=torch.from_numpy(rng.random((size, 2)) > 0.05),
        indptr=torch.arange(0, size + 1, ROWS),
        offset=torch.tensor(OFFSETS),
        past=None,
        known=torch.from_numpy(rng.normal(size=(size, known))) if known else None,
    )


def additive(data: TrainingSeries) -> Additive:
    known = 0 if data.known is None else data.known.shape[1]
    spec = DataSpec(context_length=20, horizon=3, num_variates=2, num_known=known, train_length=200)
    plan = AdditivePlan(trend="piecewise", changepoints=2, season_lengths=(12.0,), season_orders=(2,))
    part = Additive(plan, spec).double()
    part.place(data)
    return part


@pytest.mark.parametrize("known", [0, 1])
def test_columns_of_a_panel_are_those_of_each_series(known: int) -> None:
    data = panel(known)
    part = additive(data)
    found = list(part.pieces(data))
    assert [(first, last) for first, last, _ in found] == [(k * ROWS, (k + 1) * ROWS) for k in range(len(OFFSETS))]
    for number, (first, last, columns) in enumerate(found):
        expected = part.time_columns(torch.arange(ROWS) + OFFSETS[number])
        if data.known is not None:
            expected = torch.cat([expected, part.known_columns(data.known[first:last])], dim=1)
        assert torch.equal(columns, expected - part.center)
    assert part.center.numpy() == pytest.approx(
        np.mean([(columns + part.center).mean(0).numpy() for _, _, columns in found], axis=0), abs=1e-12
    )


@pytest.mark.parametrize("filters", [None, "shared", "own"])
@pytest.mark.parametrize("known", [0, 1])
def test_effects_are_least_squares_over_all_series(known: int, filters: str | None) -> None:
    data = panel(known, seed=1)
    part = additive(data)
    weights = None
    if filters is not None:
        first, second = torch.tensor([0.5, -0.2]).double(), torch.tensor([0.1, 0.3]).double()
        weights = [first, first] if filters == "shared" else [first, second]
    part.fit(data, weights)
    for variate in range(2):
        inputs, targets = [], []
        kernel = [1.0] if weights is None else [1.0, *(-weights[variate].numpy())]
        for first_row, last_row, columns in part.pieces(data):
            design = np.hstack([columns.numpy(), np.ones((ROWS, 1))])
            seen = data.mask[first_row:last_row, variate].numpy()
            values = np.where(seen, data.values[first_row:last_row, variate].numpy(), 0.0)
            for row in range(len(kernel) - 1, ROWS):
                lags = np.arange(row, row - len(kernel), -1)
                if seen[lags].all():
                    inputs.append(kernel @ design[lags])
                    targets.append(kernel @ values[lags])
        expected = np.linalg.lstsq(np.array(inputs), np.array(targets), rcond=None)[0][:-1]
        assert part.weight[variate].detach().numpy() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_windows_that_overlap_have_the_columns_of_each_alone() -> None:
    part = additive(panel())
    cutoffs = torch.tensor([60, 61, 75, 60, 300])
    batch = Batch(
        context=torch.zeros(5, 20, 2),
        context_mask=torch.ones(5, 20, 2, dtype=torch.bool),
        cutoff_index=cutoffs,
    )
    for chosen in (slice(0, 4), slice(0, 5)):  # close together, and too far apart to share a table
        rows = cutoffs[chosen]
        together = part.window_columns(batch._replace(context=batch.context[chosen], cutoff_index=rows), past_rows=20)
        for number, cutoff in enumerate(rows.tolist()):
            alone = part.time_columns(torch.arange(cutoff - 20, cutoff + 3)) - part.center
            assert torch.equal(together[number], alone)
