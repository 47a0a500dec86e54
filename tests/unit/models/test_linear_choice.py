"""Ridge and level chosen by blocked cross-validation: exact errors, sound choices, no choice without evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_cases import windows_of
from torch import Tensor

from tsforge.contracts.tensors import DataSpec, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.models._ar_layout import LagLayout
from tsforge.models._ar_moments import lag_moments
from tsforge.models._linear_choice import BLOCKS, RIDGES, USUAL_RIDGE, Span, _clear_best, choose, cut, held_out_error
from tsforge.models.linear import Linear, LinearConfig, fit_moments, remove_level

LENGTH, HORIZON = 24, 6


def span(values: np.ndarray, parts: int = 1) -> TrainingSeries:
    tensor = torch.from_numpy(values).reshape(len(values), -1)
    edges = torch.linspace(0, len(values), parts + 1).long()
    return TrainingSeries(tensor, torch.ones_like(tensor, dtype=torch.bool), edges, torch.zeros(parts).long())


def walk(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=rows).cumsum()


def seasonal(rows: int, seed: int = 0) -> np.ndarray:
    steps = np.arange(rows)
    return np.sin(2 * np.pi * steps / 12) + 0.5 * np.random.default_rng(seed).normal(size=rows)


def solved(data: TrainingSeries, **settings: object) -> tuple[Linear, dict[str, float]]:
    spec = DataSpec(context_length=LENGTH, horizon=HORIZON, num_variates=data.values.shape[1])
    model = Linear(LinearConfig.model_validate(settings), spec).double()
    report = model.solve(data)
    assert report is not None
    assert report.details is not None
    return model, report.details


@pytest.mark.parametrize("remove", ["window_mean", "last"])
def test_held_out_error_is_that_of_explicit_windows(remove: str) -> None:
    data = span(seasonal(150))
    layout = LagLayout(LENGTH, HORIZON)
    moments, _ = lag_moments(layout, data.values, data.mask, [0, 150])
    weight = fit_moments(moments, layout, LinearConfig(remove=remove, ridge=3.0))[0].weight  # type: ignore[arg-type]
    free = remove_level(moments, LENGTH + HORIZON, LENGTH, remove)  # type: ignore[arg-type]
    context, target = windows_of(data, LENGTH, HORIZON)
    level = context.mean(1, keepdim=True) if remove == "window_mean" else context[:, -1:]
    expected = (target - level - (context - level) @ weight.T).square().mean()
    assert held_out_error(weight, free, layout) == pytest.approx(float(expected), rel=1e-9)


def test_a_random_walk_is_forecast_from_its_last_value() -> None:
    model, details = solved(span(walk(600)), remove="auto", ridge=None)
    assert bool(model.from_last.all())
    assert details["ridge"] >= 1e4
    usual, _ = solved(span(walk(600)))
    later = span(walk(4000, seed=1))
    context, target = windows_of(later, LENGTH, HORIZON)

    def error(found: Linear) -> Tensor:
        level = context[:, -1:] if found.config.remove == "auto" else context.mean(1, keepdim=True)
        return (target - level - (context - level) @ found.weight[0].T).square().mean()

    naive = (target - context[:, -1:]).square().mean()
    assert error(model) < 0.98 * error(usual)
    assert error(model) < 1.01 * naive


def test_long_clean_data_keeps_the_usual_choice() -> None:
    """With 20,000 rows every small ridge is as good; the gain of the best is within its error or the ridge is small."""
    _, details = solved(span(seasonal(20_000)), ridge=None)
    assert details["ridge"] <= 1e3


def test_short_noisy_data_gets_a_larger_ridge_and_a_better_forecast() -> None:
    rng = np.random.default_rng(3)
    data, later = span(3 * rng.normal(size=200)), span(3 * rng.normal(size=4000))
    chosen, details = solved(data, ridge=None)
    assert details["ridge"] > USUAL_RIDGE
    usual, _ = solved(data)
    context, target = windows_of(later, LENGTH, HORIZON)
    level = context.mean(1, keepdim=True)
    errors = [
        (target - level - (context - level) @ model.weight[0].T).square().mean().item() for model in (chosen, usual)
    ]
    assert errors[0] < 0.97 * errors[1]


def test_variates_of_another_kind_get_matrices_of_their_own() -> None:
    both = np.stack([walk(1500) / 10, seasonal(1500)], axis=1)
    model, details = solved(span(both), remove="auto", ridge=None, weights="auto")
    assert details["groups"] == 2
    assert not torch.equal(model.weight[0], model.weight[1])
    alone, _ = solved(
        span(both[:, 1]), remove=("last" if bool(model.from_last[0]) else "window_mean"), ridge=details["ridge"]
    )
    assert torch.allclose(model.weight[1], alone.weight[0], atol=1e-12)


def test_variates_of_one_kind_share_a_matrix() -> None:
    rng = np.random.default_rng(8)
    both = np.stack([seasonal(400, seed) for seed in range(4)], axis=1) + 0.5 * rng.normal(size=(400, 4))
    model, details = solved(span(both), ridge=None, weights="auto")
    assert details["groups"] == 1
    assert all(torch.equal(model.weight[0], model.weight[group]) for group in range(4))
    pooled, _ = solved(span(both), ridge=details["ridge"])
    assert torch.allclose(model.weight[0], pooled.weight[0], atol=1e-12)


def test_too_few_blocks_choose_nothing() -> None:
    data = span(walk(40))
    model, details = solved(data, remove="auto", ridge=None)
    assert details["ridge"] == solved(data)[1]["ridge"]  # the usual one
    assert not bool(model.from_last.any())


def test_blocks_hold_out_every_target_once_and_train_on_the_rest() -> None:
    bounds, reach = [0, 103, 150], 7
    for first, last in ((0, 103), (103, 150)):
        targets: list[int] = []
        for block in range(BLOCKS):
            held, rest = cut(bounds, block, reach)
            start, stop = next(part for part in held if first <= part[0] < last)
            context = reach if start > first else 0
            targets += range(start + context, stop)
            used = {row for part in rest for row in range(*part) if first <= row < last}
            assert used.isdisjoint(range(start + context, stop))
        own = [row for row in targets if first <= row < last]
        assert len(set(own)) == len(own)
        assert len(own) >= last - first - reach


def test_moments_of_stretches_are_those_of_their_windows() -> None:
    rng = np.random.default_rng(5)
    values = torch.from_numpy(rng.normal(size=(120, 3)))
    layout = LagLayout(4, 2)
    unused = {"fit": lambda *_: values, "free": lambda moments, _: moments}
    data = Span(values=values, mask=torch.ones(120, 3).bool(), bounds=[0, 120], layout=layout, missing="auto", **unused)
    spans = [(0, 17), (17, 22), (30, 30), (41, 47), (47, 120)]  # two hold no window
    windows = torch.cat(
        [values[first:last, v].unfold(0, 6, 1) for v in (1, 2) for first, last in spans if last - first >= 6]
    )
    found = data.moments(spans, slice(1, 3))
    assert found is not None
    assert found.rows == len(windows)
    torch.testing.assert_close(found.gram, windows.T @ windows, atol=1e-11, rtol=0)
    assert data.moments(spans[1:3], slice(0, 1)) is None


def test_gaps_do_not_stop_the_choice() -> None:
    data = span(walk(600))
    mask = data.mask.clone()
    mask[100:130] = False
    mask[400] = False
    model, _ = solved(data._replace(values=torch.where(mask, data.values, 0.0), mask=mask), remove="auto", ridge=None)
    assert bool(model.from_last.all())
    assert bool(torch.isfinite(model.weight).all())


def test_the_first_candidate_wins_where_evidence_is_unclear() -> None:
    """Two forecasters that are equally good: the gain of either is within its standard error."""
    data = span(np.random.default_rng(0).normal(size=400))
    layout = LagLayout(4, 2)

    def fit(moments: object, remove: str, ridge: float) -> Tensor:
        return torch.full((2, 4), 0.01 if ridge == USUAL_RIDGE else -0.01, dtype=torch.float64)

    choice = choose(
        Span(
            values=data.values,
            mask=data.mask,
            bounds=[0, 400],
            layout=layout,
            missing="auto",
            fit=fit,
            free=lambda moments, _: moments,
        ),
        ("none",),
        (USUAL_RIDGE, 1e4),
    )
    assert (choice.remove, choice.ridge, choice.gain) == ("none", USUAL_RIDGE, 0.0)
    assert USUAL_RIDGE in RIDGES


@pytest.mark.parametrize(
    ("gains", "best"),
    [
        ([0.3, 0.2, 0.4], 1),  # every block agrees
        ([1.0, -0.9, 0.2], 0),  # mean 0.1, standard error 0.55
        ([-0.1, -0.2, -0.1], 0),
    ],
)
def test_a_gain_must_exceed_its_standard_error(gains: list[float], best: int) -> None:
    column, gain = _clear_best(torch.tensor([[0.0, value] for value in gains], dtype=torch.float64))
    assert column == best
    assert gain == pytest.approx(np.mean(gains) if best else 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "sgd", "remove": "auto"}, "model.remove"),
        ({"remove": "none", "ridge": None}, "model.offset"),
        ({"remove": "auto", "offset": "constant"}, "model.offset"),
        ({"solver": "sgd", "ridge": None}, "model.ridge"),
        ({"solver": "sgd", "weights": "auto"}, "model.weights"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearConfig.model_validate(settings)


def by_hand(context: np.ndarray, target: np.ndarray) -> float:
    """Return what generalised cross-validation picks from explicit level-free windows, with hat matrices."""
    inputs = context - context.mean(1, keepdims=True)
    outputs = target - context.mean(1, keepdims=True)
    mean = np.mean(np.diag(inputs.T @ inputs))
    inputs = np.vstack(
        [inputs, np.sqrt(mean) * np.full(inputs.shape[1], inputs.shape[1] ** -0.5)]
    )  # the null direction
    outputs = np.vstack([outputs, np.zeros(outputs.shape[1])])
    rows, mean = len(context), np.mean(np.diag(inputs.T @ inputs))
    errors = {}
    for alpha in np.logspace(-6, 2, 33) * mean:
        hat = inputs @ np.linalg.solve(inputs.T @ inputs + alpha * np.eye(inputs.shape[1]), inputs.T)
        share = np.trace(hat) / rows
        if share <= 0.5:
            errors[alpha] = np.square(outputs - hat @ outputs).sum() / (1 - share) ** 2
    return float(min(errors, key=lambda alpha: errors[alpha]))


@pytest.mark.parametrize("kind", ["seasonal", "walk", "noise"])
def test_the_usual_penalty_of_a_short_span_is_what_cross_validation_of_its_windows_says(kind: str) -> None:
    rng = np.random.default_rng(4)
    wave = np.sin(2 * np.pi * np.arange(90) / 12) + 0.05 * rng.normal(size=90)
    values = {"seasonal": wave, "walk": walk(90), "noise": rng.normal(size=90)}[kind]
    values = (values - values.mean()) / values.std()
    data = span(values)
    _, details = solved(data)
    context, target = windows_of(data, LENGTH, HORIZON)
    assert details["ridge"] == pytest.approx(min(by_hand(context.numpy(), target.numpy()), USUAL_RIDGE), rel=1e-6)
    assert details["ridge"] < USUAL_RIDGE or kind == "noise"
    _, long = solved(span(rng.normal(size=9_000)))
    assert long["ridge"] == USUAL_RIDGE  # a small part of what the windows hold: as it always was


def test_a_trend_and_a_short_seasonal_series_are_forecast_not_averaged() -> None:
    steps = np.arange(600.0)
    model, _ = solved(span((steps - steps.mean()) / steps.std()))
    context, target = windows_of(span((steps - steps.mean()) / steps.std()), LENGTH, HORIZON)
    level = context.mean(1, keepdim=True)
    error = (target - level - (context - level) @ model.weight[0].T).abs().mean()
    assert error < 0.01 * (target - level).abs().mean()
    chosen, _ = solved(span((steps - steps.mean()) / steps.std()), remove="auto", ridge=None)
    assert (chosen.weight[0] @ context[0] - chosen.weight[0].sum(1) * context[0].mean()).abs().sum() > 0


@pytest.mark.parametrize("wrong", ["usually", -1, "nan", [1.0]])
def test_a_penalty_that_is_none_is_one_message(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"^ridge: give a number from 0 on, usual, or null") as caught:
        validate(LinearConfig, {"ridge": wrong})
    assert str(caught.value).count("ridge") == 1
    assert validate(LinearConfig, {"ridge": "3"}).ridge == 3.0
    assert validate(LinearConfig, {"ridge": 0}).ridge == 0.0
