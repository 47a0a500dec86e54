"""What forecasters beside a linear map share: the map is solved once for the same data and settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tsforge.contracts.tensors import DataSpec, TrainingSeries
from tsforge.models import _residual
from tsforge.models.linear import Linear
from tsforge.models.s4 import S4, S4Config

SPEC = DataSpec(context_length=12, horizon=3, num_variates=2)


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[Linear]:
    """The linear maps that were really solved, from an empty memory on."""
    monkeypatch.setattr(_residual, "_solved", type(_residual._solved)())
    found: list[Linear] = []
    real = Linear.solve

    def noted(self: Linear, data: TrainingSeries) -> Any:
        found.append(self)
        return real(self, data)

    monkeypatch.setattr(Linear, "solve", noted)
    return found


def series(rows: int = 200, seed: int = 0) -> TrainingSeries:
    values = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    ones = torch.ones_like(values, dtype=torch.bool)
    return TrainingSeries(values, ones, torch.tensor([0, rows]), torch.tensor([0]))


def model(seed: int = 0, **settings: Any) -> S4:
    torch.manual_seed(seed)
    return S4(S4Config(d_model=8, d_state=4, num_layers=1, **settings), SPEC)


def weights(found: S4) -> dict[str, torch.Tensor]:
    assert found.skip is not None
    return found.skip.state_dict()


def test_a_second_seed_takes_over_the_solution(solves: list[Linear]) -> None:
    first, second, alone = model(), model(1), model(1)
    reports = [part.solve(series()) for part in (first, second)]
    assert len(solves) == 1
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0].details == reports[1].details
    torch.testing.assert_close(reports[0].residual_scale, reports[1].residual_scale, rtol=0, atol=0)
    _residual._solved.clear()
    alone.solve(series())
    for name, part in weights(alone).items():
        assert torch.equal(part, weights(second)[name]), name
        assert torch.equal(part, weights(first)[name]), name


def test_later_training_does_not_reach_the_memory(solves: list[Linear]) -> None:
    first, second = model(), model()
    first.solve(series())
    expected = {name: part.clone() for name, part in weights(first).items()}
    assert first.skip is not None
    with torch.no_grad():
        first.skip.weight.add_(1.0)
    second.solve(series())
    assert all(torch.equal(part, expected[name]) for name, part in weights(second).items())


@pytest.mark.parametrize("change", ["value", "mask", "bounds", "setting", "horizon"])
def test_other_data_or_settings_are_solved_again(solves: list[Linear], change: str) -> None:
    data = series()
    model().solve(data)
    other = model(ridge=3.0) if change == "setting" else model()
    if change == "value":
        data = data._replace(values=data.values.index_add(0, torch.tensor([7]), torch.full((1, 2), 1e-3)))
    elif change == "mask":
        data = data._replace(mask=data.mask.index_fill(0, torch.tensor([7]), False))
    elif change == "bounds":
        data = data._replace(indptr=torch.tensor([0, 90, 200]), offset=torch.tensor([0, 0]))
    elif change == "horizon":
        other = S4(S4Config(d_model=8, d_state=4, num_layers=1), DataSpec(context_length=12, horizon=4, num_variates=2))
    other.solve(data)
    assert len(solves) == 2


def test_the_memory_is_small(solves: list[Linear]) -> None:
    for seed in range(_residual._MOST_SOLVED + 1):
        model().solve(series(seed=seed))
    assert len(_residual._solved) == _residual._MOST_SOLVED
    model().solve(series(seed=1))
    assert len(solves) == _residual._MOST_SOLVED + 1
    model().solve(series(seed=0))  # the oldest is forgotten
    assert len(solves) == _residual._MOST_SOLVED + 2


def test_a_learned_map_keeps_the_weights_of_its_seed(solves: list[Linear]) -> None:
    first, second = model(skip="learned"), model(1, skip="learned")
    assert second.skip is not None
    before = second.skip.weight.detach().clone()
    for part in (first, second):
        assert part.solve(series()) is None
    assert torch.equal(second.skip.weight.detach(), before)
    assert len(solves) == 2
