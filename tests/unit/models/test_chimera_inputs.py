"""Chimera as a forecaster: the order of variates, missing values and reconstruction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chimera_cases import BASE, CLOSED, COVARIATES, H, L, V, make, raw, shorter, span, spec_of, wide
from torch import Tensor

from tsforge.artifact import create_artifact, load_artifact, match_frame, save_artifact
from tsforge.core.errors import ArtifactError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.models._variate_order import correlation_order
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.testing.generators import make_batch

# ---- order of variates


def test_correlated_variates_come_beside_each_other() -> None:
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(400, 1))
    noise = rng.normal(size=(400, 5))
    values = np.empty((400, 5))
    for place, variate in enumerate((2, 0, 4, 1, 3)):  # a chain: each its predecessor with noise
        walk = walk + (0.6 * noise[:, place : place + 1] if place else 0)
        values[:, variate] = (walk if variate != 4 else -walk)[:, 0]
    mask = rng.random(values.shape) > 0.1
    found = correlation_order(torch.from_numpy(np.where(mask, values, 1e6)), torch.from_numpy(mask)).tolist()
    assert found == [2, 0, 4, 1, 3]
    assert correlation_order(torch.zeros(5, 1), torch.ones(5, 1, dtype=torch.bool)).tolist() == [0]
    flat = correlation_order(torch.zeros(5, 4), torch.ones(5, 4, dtype=torch.bool)).tolist()
    assert sorted(flat) == [0, 1, 2, 3]


@torch.no_grad()
def test_an_order_of_the_data_equals_permuted_data() -> None:
    """With the order kept in the weights the forecast is that of the reordered data, put back."""
    spec = spec_of(num_variates=4, **COVARIATES)
    for settings in ({}, CLOSED):
        model = make(spec, variate_order="corr", normalisation="window", **settings).double()
        order = torch.tensor([2, 0, 3, 1])
        model.order.copy_(order)
        plain = make(spec, normalisation="window", **settings).double()
        plain.load_state_dict({name: part for name, part in model.state_dict().items() if name != "order"})
        batch = wide(make_batch(spec))
        moved = batch._replace(context=batch.context[..., order], context_mask=batch.context_mask[..., order])
        torch.testing.assert_close(raw(model, batch)[:, :, order], raw(plain, moved), atol=1e-12, rtol=0)
        if model.closed:
            losses, other = model.train()(batch).aux_losses, plain.train()(moved).aux_losses
            for name, value in losses.items():
                torch.testing.assert_close(value, other[name], atol=1e-12, rtol=0)


def test_the_order_comes_from_the_training_span_and_stays_with_the_weights() -> None:
    spec = spec_of(num_variates=4)
    data = span(spec)
    values = data.values.clone()
    values[:, 3] = values[:, 0] + 0.01 * values[:, 1]
    data = data._replace(values=values)
    model = make(spec, variate_order="corr", skip="none")
    assert model.solve(data) is None
    found = model.order.tolist()
    assert found == correlation_order(data.values, data.mask).tolist()
    assert abs(found.index(0) - found.index(3)) == 1
    other = make(spec, variate_order="corr", seed=4)
    other.load_state_dict(model.state_dict())
    assert other.order.tolist() == found
    assert other.explain()["order"] == [{"position": i, "variate": variate} for i, variate in enumerate(found)]


def frame_of(targets: tuple[str, ...]) -> SeriesFrame:
    import polars as pl

    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=60) for name in ("a", "b", "c")}
    table = pl.DataFrame({"time": np.arange(60), **{name: columns[name] for name in targets}})
    return SeriesFrame.from_wide(table, time="time", targets=targets, freq="1i")


def test_another_order_of_variates_is_refused_by_the_artifact(tmp_path: Any) -> None:
    frame = frame_of(("a", "b", "c"))
    panel = Panel.from_frame(frame)
    window = WindowSpec(context_length=L, horizon=H)
    network: ForecastNetwork = build_network(
        NetworkConfig.model_validate({"model": {"name": "chimera", **BASE}}), spec_of()
    )
    network.fit_scaler(panel.training_series(None, 50))
    artifact = create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance={},
    )
    loaded = load_artifact(save_artifact(artifact, tmp_path).path)
    assert match_frame(loaded, frame).schema.targets == ("a", "b", "c")
    with pytest.raises(ArtifactError, match="reads targets in the order a, b, c, the data has c, a, b"):
        match_frame(loaded, frame_of(("c", "a", "b")))


# ---- missing values and reconstruction


@torch.no_grad()
def test_values_under_a_mask_change_nothing() -> None:
    spec = spec_of()
    for settings in ({"patch_length": 4}, {"reconstruct": True}, CLOSED):
        model, batch = make(spec, normalisation="window", **settings), make_batch(spec, gaps=0.3)
        dirty = batch._replace(context=torch.where(batch.context_mask, batch.context, 1e6))
        assert torch.equal(raw(model, batch), raw(model, dirty))


@torch.no_grad()
def test_a_cell_with_any_observation_counts_as_observed() -> None:
    spec = spec_of(context_length=8)
    model = make(spec, patch_length=4)
    mask = torch.zeros(1, 8, V, dtype=torch.bool)
    mask[0, 5, 1] = True
    _, observed = model._tokens(torch.zeros(1, 8, V), mask, None, None, None)
    assert observed.tolist() == [[[False, False], [False, True], [False, False]]]


@torch.no_grad()
def test_a_reconstructed_cell_is_told_from_the_others() -> None:
    """By hand: each cell from a pass without it and its fold, in scaled units; its own value cannot enter."""
    spec = spec_of()
    settings = {"reconstruct": True, "normalisation": "window", "patch_length": 3, "variate_order": "corr"}
    model, batch = make(spec, **settings), make_batch(spec)
    model.order.copy_(torch.tensor([2, 0, 1]))
    loc, scale = model._statistics(batch)
    z = torch.where(batch.context_mask, (batch.context - loc) / scale, 0.0)
    found = model.reconstruct(batch)
    for t, v in ((0, 0), (6, 1), (L - 1, 2)):
        cell = (t + 2) // 3  # the first patch holds one step
        blind = batch.context_mask.clone()
        for step in range(L):
            for variate in range(V):
                if ((step + 2) // 3 + variate) % 4 == (cell + v) % 4:
                    blind[:, step, variate] = False
        tokens, observed = model._tokens(torch.where(blind, z, 0.0), blind, None, None, None)
        column = model.rebuild(model.stack(tokens, observed).x)[:, [1, 2, 0][v], cell]
        expected = column[:, (t + 2) % 3] * scale[:, 0, v] + loc[:, 0, v]
        torch.testing.assert_close(found[:, t, v], expected, atol=1e-6, rtol=1e-5)
    frozen = shorter(model, settings={"normalisation": "none"})
    changed = batch.context.clone()
    changed[:, 6, 1] += 5.0
    gap = (frozen.reconstruct(batch._replace(context=changed)) - frozen.reconstruct(batch)).abs().amax(0)
    seen = batch.context_mask[:, 6, 1].any()
    assert bool(seen)
    assert float(gap[6, 1]) == 0.0
    assert float(gap[7:].max()) > 1e-3
    with pytest.raises(ModelError, match=r"fit with model\.reconstruct=true"):
        make(spec).reconstruct(batch)


def test_training_hides_a_quarter_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    model, batch = make(spec, reconstruct=True, patch_length=4), make_batch(spec, size=64, gaps=0.0)
    seen: list[Tensor] = []
    original = model._tokens

    def tokens(z: Tensor, mask: Tensor, *rest: Any) -> Any:
        seen.append(mask)
        assert not z[~mask].any()
        return original(z, mask, *rest)

    monkeypatch.setattr(model, "_tokens", tokens)
    assert model.train()(batch).context_raw is not None
    assert bool(seen[0].all())  # the forecast itself sees everything
    share = float((~seen[1]).double().mean())
    assert 0.2 < share < 0.3
    whole = seen[1].view(64, 4, 4, V)
    assert torch.equal(whole.any(2), whole.all(2))  # patches are hidden whole
    assert model.eval()(batch).context_raw is None
