"""Scaling against plain NumPy loops, the mask rule, constants, covariates, unknown series, storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.errors import ModelError
from tsforge.layers.scaling import WINDOW_FLOOR, Scaler, masked_moments, masked_quantile

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


def test_robust_scale_of_mostly_constant_data_falls_back_to_the_deviation() -> None:
    data = _series()
    values = torch.zeros_like(data.values)
    values[::10] = 5.0
    scaler = _fitted("global", True, data._replace(values=values, mask=torch.ones_like(data.mask)))
    np.testing.assert_allclose(scaler.global_scale.numpy(), values.numpy().std(axis=0), rtol=1e-12)


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


def test_masked_moments_and_quantiles_of_nothing_are_zero() -> None:
    values = torch.full((2, 4, 1), torch.nan)
    mask = torch.zeros(2, 4, 1, dtype=torch.bool)
    for robust in (False, True):
        assert [part.abs().max().item() for part in masked_moments(values, mask, robust=robust)] == [0.0, 0.0]
    one = torch.tensor([1.0, 9.0, 4.0, 2.0]).reshape(1, 4, 1)
    seen = torch.tensor([True, False, True, True]).reshape(1, 4, 1)
    assert masked_quantile(one, seen, 0.75).item() == pytest.approx(np.quantile([1.0, 4.0, 2.0], 0.75))
