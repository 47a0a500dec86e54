"""Scaling against plain NumPy loops, the mask rule, constants, covariates, unknown series, storage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tsforge.contracts.model import Capabilities
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.scaling import (
    WINDOW_FLOOR,
    Scaler,
    ScalingConfig,
    is_diverse,
    masked_moments,
    masked_quantile,
    moments_of_any_unit,
    scaling_for,
)

SPEC = DataSpec(context_length=8, horizon=3, num_variates=3)
KINDS = ("none", "global", "series", "window", "window_mean", "last")


def _series(seed: int = 0, offset: float = 50.0, num: int = 90) -> TrainingSeries:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num, 3)) * [1.0, 5.0, 0.1] + [0.0, offset, -3.0]
    values[num // 3 :] += 7.0
    mask = rng.random((num, 3)) > 0.3
    return TrainingSeries(
        values=torch.from_numpy(values),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, num // 3, num]),
        offset=torch.tensor([0, 4]),
    )


def _batch(seed: int = 1, size: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        context=torch.randn(size, 8, 3, generator=generator, dtype=torch.float64) * 4 + 20,
        context_mask=torch.rand(size, 8, 3, generator=generator) > 0.3,
        target=torch.randn(size, 3, 3, generator=generator, dtype=torch.float64) * 4 + 20,
        target_mask=torch.rand(size, 3, 3, generator=generator) > 0.3,
        series_index=torch.arange(size) % 2,
    )


def _fitted(kind: str, robust: bool = False, data: TrainingSeries | None = None) -> Scaler:
    scaler = Scaler(kind, SPEC, robust=robust).double()
    scaler.fit(data or _series())
    return scaler


def _oracle(values: np.ndarray, robust: bool) -> tuple[float, float]:
    if robust:
        low, high = np.quantile(values, [0.25, 0.75])
        return float(np.median(values)), float((high - low) / 1.3489795003921634)
    return float(values.mean()), float(values.std())


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_equal_a_plain_loop(kind: str, robust: bool) -> None:
    data, batch = _series(), _batch()
    loc, scale = _fitted(kind, robust).stats(batch)
    assert loc.shape == scale.shape == (5, 1, 3)
    rows, seen = data.values.numpy(), data.mask.numpy()
    for window in range(5):
        for variate in range(3):
            overall = _oracle(rows[seen[:, variate], variate], robust)
            low, high = data.indptr[window % 2], data.indptr[window % 2 + 1]
            own = _oracle(rows[low:high, variate][seen[low:high, variate]], robust)
            here = batch.context[window, :, variate][batch.context_mask[window, :, variate]].numpy()
            inside = _oracle(here, robust)
            expected = {
                "none": (0.0, 1.0),
                "global": overall,
                "series": own,
                "window": inside,
                "window_mean": (inside[0], overall[1]),
                "last": (float(here[-1]), overall[1]),
            }[kind]
            found = (loc[window, 0, variate].item(), scale[window, 0, variate].item())
            assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_cells_influence_nothing(kind: str) -> None:
    data, batch = _series(), _batch()
    poisoned_data = data._replace(values=torch.where(data.mask, data.values, torch.nan))
    poisoned = batch._replace(
        context=torch.where(batch.context_mask, batch.context, torch.inf),
        target=torch.where(batch.target_mask, batch.target, torch.nan),
    )
    clean, dirty = _fitted(kind).scale(batch), _fitted(kind, data=poisoned_data).scale(poisoned)
    torch.testing.assert_close(clean.context, dirty.context, rtol=0, atol=0)
    torch.testing.assert_close(clean.target, dirty.target, rtol=0, atol=0)
    assert clean.context[~batch.context_mask].abs().max().item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_never_reads_the_target(kind: str) -> None:
    scaler, batch = _fitted(kind), _batch()
    loc, scale = scaler.stats(batch)
    other = scaler.stats(batch._replace(target=batch.target * 100 + 3))
    torch.testing.assert_close(loc, other[0], rtol=0, atol=0)
    torch.testing.assert_close(scale, other[1], rtol=0, atol=0)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize("level", [0.0, 7.0, 1e6 + 0.1])
def test_constant_variates_give_finite_values_and_scale_one(kind: str, robust: bool, level: float) -> None:
    data = _series()
    values = data.values.clone()
    values[:, 1] = level
    scaler = _fitted(kind, robust, data._replace(values=values))
    assert scaler.global_scale[1].item() == 1.0
    assert scaler.series_scale[:, 1].tolist() == [1.0, 1.0]
    batch = _batch()
    context = batch.context.clone()
    context[..., 1] = level
    scaled = scaler.scale(batch._replace(context=context))
    assert bool(torch.isfinite(scaled.context).all())
    assert scaled.context[..., 1].abs().max().item() < 1e-6


@pytest.mark.parametrize("kind", ["global", "series"])
@pytest.mark.parametrize("level", [3e9, 1e15, 1.8e18])
def test_huge_constants_stay_small_beside_the_other_variates(kind: str, level: float) -> None:
    """The float32 location of such a constant may be off by more than the whole range of another variate."""
    data = _series()
    values = data.values.double().clone()
    values[:, 1] = level * (1 + 2**-52 * (torch.arange(len(values)) % 2))
    data = data._replace(values=values)
    scaler = _fitted(kind, False, data)
    assert scaler.scale_series(data).values[:, 1].abs().max().item() < 0.1
    batch = _batch()
    context = batch.context.clone()
    context[..., 1] = torch.nextafter(torch.tensor(level), torch.tensor(torch.inf))
    assert scaler.scale(batch._replace(context=context)).context[..., 1].abs().max().item() < 0.3


@pytest.mark.parametrize("peak", [1e7, 3e9, 1e12])
@pytest.mark.parametrize("robust", [False, True])
def test_a_small_series_keeps_its_own_scale_beside_a_huge_one(peak: float, robust: bool) -> None:
    rows = torch.arange(200, dtype=torch.float64)
    small = 5.0 + 3.0 * torch.sin(rows)
    values = torch.cat([peak * (1.0 + 0.2 * torch.sin(rows)), small, torch.full((200,), 5.0)])[:, None]
    data = TrainingSeries(
        values=values,
        mask=torch.ones_like(values, dtype=torch.bool),
        indptr=torch.tensor([0, 200, 400, 600]),
        offset=torch.zeros(3, dtype=torch.int64),
    )
    spec = replace(SPEC, num_variates=1, num_past=0, num_known=0, num_static=0)
    scaler = Scaler("series", spec, robust=robust).double()
    scaler.fit(data)
    alone = _oracle(small.numpy(), robust=robust)[1]
    assert float(scaler.series_scale[1, 0]) == pytest.approx(float(alone), rel=1e-9)
    assert float(scaler.series_scale[2, 0]) == 1.0
    assert is_diverse(data)


@pytest.mark.parametrize("level", [2026.0, 1.8e18])
def test_huge_constant_covariates_are_centred(level: float) -> None:
    data = _series()
    past = torch.full((len(data.values), 1), level, dtype=torch.float64)
    scaler = Scaler("global", replace(SPEC, num_past=1))
    scaler.fit(data._replace(past=past))
    centred = level > 1e7
    assert scaler.past_loc.item() == pytest.approx(level if centred else 0.0)
    assert scaler.past_scale.item() == pytest.approx(1e-6 * level if centred else 1.0)


def test_robust_scale_of_mostly_constant_data_falls_back_to_the_deviation() -> None:
    data = _series()
    values = torch.zeros_like(data.values)
    values[::10] = 5.0
    scaler = _fitted("global", True, data._replace(values=values, mask=torch.ones_like(data.mask)))
    np.testing.assert_allclose(scaler.global_scale.numpy(), values.numpy().std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("power", [0, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 40.0])
def test_robust_scale_of_a_mostly_constant_window_falls_back_to_the_deviation(
    level: float, dtype: torch.dtype, power: int
) -> None:
    """Windows of demand that comes now and then; those with an interquartile range keep theirs to the bit."""
    unit = 2.0**power
    data, batch = _series(), _batch()
    rare = torch.full_like(batch.context, level)
    rare[:, 7:] += 5.0
    context = batch.context.clone()
    context[..., 1] = rare[..., 1]
    batch = batch._replace(context=(context * unit).to(dtype), context_mask=torch.ones_like(batch.context_mask))
    some = batch._replace(context_mask=batch.context_mask & (torch.arange(8) != 2)[:, None])
    scaler = Scaler("window", SPEC, robust=True)
    scaler.fit(data._replace(values=data.values * unit))
    for given, values in ((batch, [level] * 7 + [level + 5.0]), (some, [level] * 6 + [level + 5.0])):
        loc, scale = scaler.stats(given)
        assert loc[..., 1].unique().tolist() == [level * unit]
        expected = torch.full((5, 1), float(np.std(values)) * unit, dtype=dtype)
        torch.testing.assert_close(scale[..., 1], expected, rtol=1e-6, atol=0)
        plain = masked_moments(given.context, given.context_mask, robust=True)[1]
        assert torch.equal(scale[:, 0, [0, 2]], plain[:, [0, 2]])
    assert float(scaler.scale(batch).context[..., 1].abs().max()) < 3.1


def test_robust_scale_of_a_mostly_constant_context_of_an_unknown_series() -> None:
    """As for windows: the deviation is drawn to the usual share of the size, a zero interquartile range is not."""
    data, batch = _series(), _batch()
    context = torch.zeros_like(batch.context)
    context[:, 7:] = 5.0
    strangers = batch._replace(
        context=context, context_mask=torch.ones_like(batch.context_mask), series_index=torch.full((5,), -1)
    )
    scaler = Scaler("series", SPEC, robust=True, unknown="context").double()
    scaler.fit(data)
    spread = float(np.std([0.0] * 7 + [5.0]))
    share = scaler._relative_spread()
    expected = ((8 * spread**2 + 8 * (share * spread).square()) / 16).sqrt()
    torch.testing.assert_close(scaler.stats(strangers)[1], expected.expand(5, 1, 3), rtol=1e-9, atol=0)


def test_large_offsets_do_not_cancel() -> None:
    """Variance by two passes in float64: an offset of 1e9 leaves the standard deviation right to 1e-6."""
    data = _series(offset=1e9)
    rows = data.values[:, 1][data.mask[:, 1]] - 1e9
    scaler = Scaler("global", SPEC)
    scaler.fit(data)
    assert scaler.global_scale[1].item() == pytest.approx(rows.std(correction=0).item(), rel=1e-6)


def test_windows_without_observation_take_training_statistics() -> None:
    batch = _batch()
    blind = batch._replace(context_mask=torch.zeros_like(batch.context_mask))
    for kind in ("window", "window_mean", "last"):
        scaler = _fitted(kind)
        loc, scale = scaler.stats(blind)
        torch.testing.assert_close(loc, scaler.global_loc.expand_as(loc))
        torch.testing.assert_close(scale, scaler.global_scale.expand_as(scale))


def test_flat_windows_are_floored_and_weigh_little() -> None:
    scaler, batch = _fitted("window"), _batch()
    flat = batch._replace(context=torch.full_like(batch.context, 3.0))
    _, scale = scaler.stats(flat)
    torch.testing.assert_close(scale, scaler.floor.expand_as(scale))
    calmest = scaler.series_scale.amin(dim=0)
    torch.testing.assert_close(scaler.floor, WINDOW_FLOOR * calmest)
    unit = scaler.unit(flat, scale)
    torch.testing.assert_close(unit[0, 0], scaler.floor / scaler.series_scale[0])
    stranger = scaler.unit(flat._replace(series_index=torch.full((5,), -1)), scale)
    torch.testing.assert_close(stranger[0, 0], scaler.floor / scaler.global_scale)
    assert _fitted("global").unit(flat, scale) is None


def test_series_scaling_names_unknown_series() -> None:
    scaler, batch = _fitted("series"), _batch()
    with pytest.raises(ModelError, match=r"2 windows .* \(index -1, 7; trained series: 2"):
        scaler.stats(batch._replace(series_index=torch.tensor([0, 7, 1, -1, 0])))
    with pytest.raises(ModelError, match="does not say"):
        scaler.stats(batch._replace(series_index=None))


def test_a_series_without_observations_takes_the_global_statistics() -> None:
    data = _series()
    mask = data.mask.clone()
    mask[: int(data.indptr[1]), 2] = False
    scaler = _fitted("series", data=data._replace(mask=mask))
    assert scaler.series_loc[0, 2].item() == pytest.approx(scaler.global_loc[2].item())
    assert scaler.series_scale[0, 2].item() == pytest.approx(scaler.global_scale[2].item())


def test_unfitted_and_unusable_training_data_are_refused() -> None:
    scaler = Scaler("global", SPEC)
    with pytest.raises(ModelError, match="fit_scaler"):
        scaler.stats(_batch())
    data = _series()
    with pytest.raises(ModelError, match="no observed value"):
        scaler.fit(data._replace(mask=torch.zeros_like(data.mask)))
    broken = data.values.clone()
    broken[data.mask.nonzero()[0, 0], data.mask.nonzero()[0, 1]] = torch.inf
    with pytest.raises(ModelError, match="1 observed training values are not finite"):
        scaler.fit(data._replace(values=broken))
    with pytest.raises(ModelError, match="window to window"):
        _fitted("last").scale_series(data)


def test_series_max_divides_by_the_largest_size_of_each_series_and_moves_nothing() -> None:
    values = torch.tensor([[1.0, 0.0, 5.0], [-4.0, 0.0, 2.0], [2.0, 3.0, 9.0], [1.0, 6.0, 9.0]], dtype=torch.float64)
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[2:, 2] = False  # never observed in the second series: the largest of all series
    spec = DataSpec(context_length=2, horizon=1, num_variates=3)
    scaler = Scaler("series_max", spec)
    indptr = torch.tensor([0, 2, 4])
    scaler.fit(TrainingSeries(values, mask, indptr, torch.zeros(2, dtype=torch.int64)))
    assert scaler.series_loc.abs().max() == 0
    assert scaler.series_scale.tolist() == [[4.0, 1.0, 5.0], [2.0, 6.0, 5.0]]
    batch = Batch(values[None, :2].float(), mask[None, :2], series_index=torch.tensor([7]))
    with pytest.raises(ModelError, match="were not trained on"):
        scaler.stats(batch)
    with pytest.raises(ModelError, match="scaling 'series_max' needs the series of every window"):
        scaler.stats(batch._replace(series_index=None))


@pytest.mark.parametrize("kind", ["none", "global", "series", "series_max"])
def test_scaled_training_span_agrees_with_scaled_windows(kind: str) -> None:
    data, scaler = _series(), _fitted(kind)
    scaled = scaler.scale_series(data)
    for series, (low, high) in enumerate(zip(data.indptr[:-1].tolist(), data.indptr[1:].tolist(), strict=True)):
        window = Batch(
            context=data.values[low : low + 8].unsqueeze(0),
            context_mask=data.mask[low : low + 8].unsqueeze(0),
            series_index=torch.tensor([series]),
        )
        torch.testing.assert_close(scaler.scale(window).context[0], scaled.values[low : low + 8])
        assert high > low
    assert scaled.values[~data.mask].abs().max().item() == 0


def test_covariates_are_standardised_binary_and_constant_ones_stay() -> None:
    spec = DataSpec(context_length=8, horizon=3, num_variates=3, num_known=3, num_past=1, num_static=2)
    rng = np.random.default_rng(2)
    data = _series()
    known = np.column_stack([rng.normal(size=90) * 9 + 4, rng.integers(0, 2, 90), np.full(90, 12.0)])
    past = rng.normal(size=(90, 1)) * 2 - 6
    past[5] = np.nan
    static = np.array([[3.0, 0.0], [7.0, 1.0]])
    data = data._replace(known=torch.from_numpy(known), past=torch.from_numpy(past), static=torch.from_numpy(static))
    scaler = Scaler("window", spec).double()
    scaler.fit(data)
    batch = _batch()._replace(
        known=torch.from_numpy(known[:55]).reshape(5, 11, 3),
        past=torch.from_numpy(past[:40]).reshape(5, 8, 1),
        static=torch.from_numpy(static[[0, 1, 0, 1, 0]]),
    )
    scaled = scaler.scale(batch)
    expected = (known[:55, 0] - known[:, 0].mean()) / known[:, 0].std()
    np.testing.assert_allclose(scaled.known[..., 0].flatten().numpy(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.known[..., 1:], batch.known[..., 1:])
    assert scaled.past.flatten()[5].item() == 0.0
    seen = np.nanmean(past), np.nanstd(past)
    assert scaled.past.flatten()[6].item() == pytest.approx((past[6, 0] - seen[0]) / seen[1])
    np.testing.assert_allclose(scaled.static[:2].numpy(), [[-1.0, 0.0], [1.0, 1.0]], atol=1e-12)
    with pytest.raises(ModelError, match="2 known covariates, the network was built for 3"):
        scaler.scale(batch._replace(known=batch.known[..., :2]))


def test_statistics_travel_with_the_weights_whatever_the_number_of_series() -> None:
    source, target = _fitted("series"), Scaler("series", SPEC).double()
    target.load_state_dict(source.state_dict())
    batch = _batch()
    for old, new in zip(source.stats(batch), target.stats(batch), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.parametrize("robust", [False, True])
def test_a_series_without_rows_in_the_training_span_takes_the_global_statistics(robust: bool) -> None:
    data = _series()
    longer = data._replace(
        indptr=torch.cat([data.indptr, data.indptr[-1:]]), offset=torch.cat([data.offset, data.offset[-1:]])
    )
    scaler = _fitted("series", robust, longer)
    torch.testing.assert_close(scaler.series_scale[-1], scaler.global_scale)


def test_masked_moments_and_quantiles_of_nothing_are_zero() -> None:
    values = torch.full((2, 4, 1), torch.nan)
    mask = torch.zeros(2, 4, 1, dtype=torch.bool)
    for robust in (False, True):
        assert [part.abs().max().item() for part in masked_moments(values, mask, robust=robust)] == [0.0, 0.0]
    one = torch.tensor([1.0, 9.0, 4.0, 2.0]).reshape(1, 4, 1)
    seen = torch.tensor([True, False, True, True]).reshape(1, 4, 1)
    assert masked_quantile(one, seen, 0.75).item() == pytest.approx(np.quantile([1.0, 4.0, 2.0], 0.75))


def test_what_was_not_trained_on_takes_the_statistics_of_its_context() -> None:
    data = _series()
    mask = data.mask.clone()
    mask[30:, 1] = False  # the second series was never seen with variate 1
    scaler = Scaler("series", SPEC, unknown="context").double()
    scaler.fit(data._replace(mask=mask))
    batch = _batch()
    some = batch.context_mask.clone()
    some[4, :, 2] = False
    batch = batch._replace(series_index=torch.tensor([0, 1, 2, -1, 7]), context_mask=some)
    loc, scale = scaler.stats(batch)
    known = Scaler("series", SPEC).double()
    known.fit(data._replace(mask=mask))
    plain = known.stats(batch._replace(series_index=torch.tensor([0, 1, 0, 0, 0])))
    rows = data.values.numpy()
    for window in range(5):
        for variate in range(3):
            if window == 0 or (window == 1 and variate != 1):
                expected = plain[0][window, 0, variate], plain[1][window, 0, variate]
            elif window == 4 and variate == 2:  # nothing at all: the training span of all series
                expected = _oracle(rows[mask[:, 2].numpy(), 2], robust=False)
            else:
                here = batch.context[window, :, variate][some[window, :, variate]].numpy()
                shares = []
                for low, high in ((0, 30), (30, 90)):
                    own = rows[low:high, variate][mask[low:high, variate].numpy()]
                    if len(own):
                        shares.append(own.std() / np.sqrt(own.mean() ** 2 + own.var()))
                usual = sorted(shares)[(len(shares) - 1) // 2] * np.sqrt(np.mean(here**2))
                spread = np.sqrt((len(here) * here.var() + 8 * usual**2) / (len(here) + 8))
                expected = here.mean(), spread
            assert float(loc[window, 0, variate]) == pytest.approx(float(expected[0]), rel=1e-9)
            assert float(scale[window, 0, variate]) == pytest.approx(float(expected[1]), rel=1e-9)
    hidden = scaler.stats(batch._replace(context=torch.where(some, batch.context, 1e9), target=None))
    assert torch.equal(hidden[0], loc)
    assert torch.equal(hidden[1], scale)
    with pytest.raises(ModelError, match="needs the series of every window"):
        scaler.stats(batch._replace(series_index=None))
    again = Scaler("series", SPEC, unknown="context").double()
    again.load_state_dict(scaler.state_dict())
    assert torch.equal(again.stats(batch)[1], scale)


@pytest.mark.parametrize(
    ("levels", "spreads", "expected"),
    [
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
        ((0.0, 1.0, 2.0), (1.0, 1.2, 0.8), False),
        ((0.0, 10.0, 20.0), (1.0, 1.0, 1.0), True),  # levels apart
        ((1e6, 1e6 + 9.0, 1e6 + 20.0), (1.0, 1.0, 1.0), True),
        ((0.0, 0.0, 0.0), (1.0, 5.0, 1.0), True),  # a lively one
        ((5.0,), (1.0,), False),
        ((0.0, 50.0), (0.0, 0.0), False),  # constants have no spread to compare
    ],
)
def test_a_panel_is_diverse_where_levels_or_spreads_of_a_variate_are_apart(
    levels: tuple[float, ...], spreads: tuple[float, ...], expected: bool
) -> None:
    rng = np.random.default_rng(0)
    parts = [
        np.stack([rng.normal(size=200), level + spread * rng.normal(size=200)], axis=1)
        for level, spread in zip(levels, spreads, strict=True)
    ]
    values = np.concatenate([np.full((3, 2), 1e12), *parts])
    mask = np.ones(values.shape, dtype=bool)
    mask[:3] = False  # what is not observed says nothing
    data = TrainingSeries(
        values=torch.from_numpy(values),
        mask=torch.from_numpy(mask),
        indptr=torch.tensor([0, *(3 + 200 * (k + 1) for k in range(len(levels)))]),
        offset=torch.zeros(len(levels), dtype=torch.int64),
    )
    assert is_diverse(data) is expected


def test_auto_means_series_for_a_diverse_panel_where_the_model_can_be_scaled_so() -> None:
    can = Capabilities(scaling=("global", "series"))
    own = ScalingConfig(kind="series", unknown="context", robust=True)
    assert scaling_for(ScalingConfig(robust=True), can, diverse=True) == own
    assert scaling_for(ScalingConfig(robust=True), can, diverse=False) == ScalingConfig(robust=True)
    for given in ("global", "none", "series"):
        assert scaling_for(ScalingConfig(kind=given), can, diverse=True) == ScalingConfig(kind=given)
    for cannot in (
        Capabilities(scaling=("global", "none")),
        Capabilities(scaling=("global", "series"), rows_coupled=True),
        Capabilities(scaling=("global", "series"), own_units=True),
    ):
        assert scaling_for(ScalingConfig(), cannot, diverse=True) == ScalingConfig()
    with pytest.raises(ConfigError, match=r"unknown=context has an effect with scaling.kind=series only"):
        validate(ScalingConfig, {"kind": "global", "unknown": "context"})


@pytest.mark.parametrize("kind", ["window", "window_mean"])
@pytest.mark.parametrize("power", [-90, -30, 0, 30, 100])
@pytest.mark.parametrize("robust", [False, True])
def test_single_precision_scales_the_same_in_any_unit(kind: str, power: int, robust: bool) -> None:
    """Squares of 2^64 and more are infinite in single precision, those of 2^-75 are 0; powers of two cost no digit."""
    data, batch = _series(), _batch()
    batch = batch._replace(context=batch.context.float())
    plain = Scaler(kind, SPEC, robust=robust)
    plain.fit(data)
    loc, scale = plain.stats(batch)
    other = Scaler(kind, SPEC, robust=robust)
    other.fit(data._replace(values=data.values * 2.0**power))
    loaded = Scaler(kind, SPEC, robust=robust)
    loaded.load_state_dict(other.state_dict())
    for scaler in (other, loaded):
        found = scaler.stats(batch._replace(context=batch.context * 2.0**power))
        assert torch.equal(found[0], loc * 2.0**power)
        assert torch.equal(found[1], scale * 2.0**power)


def test_moments_of_any_unit_are_the_plain_ones_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 8, 3, generator=generator) * torch.tensor([1e-6, 1.0, 1e9]) + 3.0
    mask = torch.rand(values.shape, generator=generator) > 0.5
    mask[0] = False
    for found, plain in zip(moments_of_any_unit(values, mask), masked_moments(values, mask), strict=True):
        assert torch.equal(found, plain)
