"""Ensembles: averages against loops, look-backs, scalings, distributions, storage, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsforge.artifact import Artifact, collect_provenance, create_artifact, load_artifact, save_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ModelError
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.ensemble import EnsembleNetwork, ensemble_spec, member_batch, weighted_median
from tsforge.layers.scaling import ScalingConfig
from tsforge.network import ForecastNetwork, NetworkConfig, build_network

HORIZON = 6
MEMBERS: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"name": "linear"}, 24, "series"),
    ({"name": "ar_net", "lags": 5}, 12, "global"),
    ({"name": "dlinear"}, 20, "window"),
)


def sizes(length: int) -> DataSpec:
    return DataSpec(context_length=length, horizon=HORIZON, num_variates=2)


def fitted(panel: Panel, model: dict[str, Any], length: int, scaling: str, likelihood: str) -> ForecastNetwork:
    plain = {"model": model, "likelihood": {"name": likelihood}, "scaling": {"kind": scaling}}
    network = build_network(validate(NetworkConfig, plain), sizes(length), seed=3)
    series = panel.training_series(None, 200)
    network.fit_scaler(series)
    if scaling != "window":
        network.solve(series)
    else:  # untrained: the level of the window
        for parameter in network.model.parameters():
            torch.nn.init.zeros_(parameter)
    return network.eval()


def mixture(panel: Panel, weights: Any, likelihood: str = "normal", number: int = 3) -> EnsembleNetwork:
    members = [fitted(panel, *one, likelihood) for one in MEMBERS[:number]]
    config = validate(NetworkConfig, {"model": "auto", "likelihood": {"name": likelihood}})
    spec = ensemble_spec(members, sizes(1))
    return EnsembleNetwork(config, spec, members, torch.as_tensor(np.asarray(weights, dtype=np.float64))).eval()


def flat(*weights: float) -> Any:
    return np.asarray(weights)[None, :, None, None]


@pytest.fixture(scope="module")
def batch(panel: Panel) -> Any:
    return WindowDataset(panel, WindowSpec(context_length=24, horizon=HORIZON), 200, None).__getitems__([0, 30, 110])


def test_mean_and_quantiles_are_averages_of_members_that_read_the_end_of_the_window(panel: Panel, batch: Any) -> None:
    network = mixture(panel, flat(0.5, 0.3, 0.2))
    assert network.spec.context_length == 24
    levels = (0.1, 0.5, 0.9)
    found = network.predict(batch, levels)
    mean, quantiles = torch.zeros_like(found.mean), torch.zeros_like(found.quantiles)
    for weight, member in zip((0.5, 0.3, 0.2), network.members, strict=True):
        length = member.spec.context_length
        own = batch._replace(context=batch.context[:, -length:], context_mask=batch.context_mask[:, -length:])
        one = member.predict(own, levels)
        mean, quantiles = mean + weight * one.mean, quantiles + weight * one.quantiles
    assert torch.allclose(found.mean, mean, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.quantiles, quantiles, rtol=1e-5, atol=1e-5)
    assert torch.allclose(sum(network.components(batch).values()), found.mean, atol=1e-5)
    assert torch.allclose(network.location(batch), found.mean, atol=1e-5)


def test_scale_is_the_weighted_mean_and_raw_is_in_its_units(panel: Panel, batch: Any) -> None:
    network = mixture(panel, flat(0.5, 0.3, 0.2))
    loc, scale = network.scaler.stats(batch)
    parts = [member.scaler.stats(member_batch(batch, member.spec))[1] for member in network.members]
    assert torch.allclose(scale, 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2], atol=1e-6)
    assert not loc.any()
    assert torch.allclose(network(batch).raw[..., 0] * scale, network.predict(batch).mean, atol=1e-5)


def test_weights_by_series_and_for_strangers(panel: Panel, batch: Any) -> None:
    sets = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])[:, :, None, None]
    network = mixture(panel, sets, number=2)
    index = torch.tensor([0, 1, 7])
    found = network.predict(batch._replace(series_index=torch.tensor([0, 1, 0]))).mean
    first, second = (member.predict(member_batch(batch, member.spec)).mean for member in network.members[:2])
    asked = batch._replace(series_index=index)
    assert torch.allclose(network.weights_of(asked)[:, 0, 0, 0], torch.tensor([0.9, 0.2, 0.5]))
    other = fitted(panel, *MEMBERS[0], "normal").predict(batch._replace(series_index=torch.tensor([0, 1, 0]))).mean
    assert torch.allclose(found[0], 0.9 * other[0] + 0.1 * second[0], atol=1e-5)
    assert torch.allclose(found[1], 0.2 * other[1] + 0.8 * second[1], atol=1e-5)
    assert first.shape == second.shape
    with pytest.raises(ModelError, match="does not say"):
        network.weights_of(batch._replace(series_index=None))


def test_cdf_inverts_the_quantiles_and_is_exact_for_normal_members(panel: Panel, batch: Any) -> None:
    network = mixture(panel, flat(0.6, 0.4), number=2)
    levels = (0.03, 0.2, 0.5, 0.93)
    quantiles = network.predict(batch, levels).quantiles
    for place, level in enumerate(levels):
        assert torch.allclose(network.cdf(batch, quantiles[..., place]), torch.tensor(level), atol=2e-4)
    low, high = (network.predict(batch, (0.158655, 0.841345)).quantiles[..., side] for side in (0, 1))
    mean, spread = (low + high) / 2, (high - low) / 2
    far = mean + 9.0 * spread  # averaged quantiles of normal distributions are normal
    assert torch.allclose(
        network.log_tail(batch, far), torch.special.log_ndtr(torch.tensor(-9.0)) + np.log(2), rtol=2e-3
    )
    assert torch.allclose(network.log_tail(batch, mean), torch.zeros(()), atol=2e-3)


def test_a_member_that_runs_away_is_held_near_the_median(panel: Panel, batch: Any) -> None:
    network = mixture(panel, flat(0.45, 0.35, 0.2))
    honest = network.predict(batch, (0.1, 0.9))
    with torch.no_grad():
        network.members[2].model.trend.bias[0::2].fill_(1e3)  # the location
    shift = (network.predict(batch, (0.1, 0.9)).mean - honest.mean).abs()
    scale = network.scaler.stats(batch)[1]
    assert (shift <= 0.2 * 6.0 * scale).all()
    assert (shift > 0.05 * scale).all()
    moved = network.predict(batch, (0.1, 0.9)).quantiles - honest.quantiles
    assert torch.allclose(moved, (network.predict(batch).mean - honest.mean)[..., None], rtol=1e-3, atol=1e-2)


def test_weighted_median_against_a_loop() -> None:
    values, weights = torch.randn(4, 5, 3), torch.rand(4, 5, 3)
    weights = weights / weights.sum(1, keepdim=True)
    found = weighted_median(values, weights)
    for b in range(4):
        for v in range(3):
            pairs = sorted(zip(values[b, :, v].tolist(), weights[b, :, v].tolist(), strict=True))
            places = np.cumsum([weight for _, weight in pairs])
            assert found[b, v] == pytest.approx(pairs[int((places >= 0.5).argmax())][0])


def artifact_of(network: EnsembleNetwork, panel: Panel) -> Artifact:
    network.model.report = {"race": [{"candidate": "linear", "weight": 0.5, "error": None}]}
    return create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=WindowSpec(context_length=24, horizon=HORIZON),
        provenance=collect_provenance(data_fingerprint="", seeds={}),
    )


def test_round_trip_is_bitwise_and_keeps_the_report(panel: Panel, batch: Any, tmp_path: Path) -> None:
    network = mixture(panel, np.array([[[[0.5, 0.1]], [[0.25, 0.8]], [[0.25, 0.1]]]]))
    saved = save_artifact(artifact_of(network, panel), tmp_path)
    loaded = load_artifact(saved.path)
    assert isinstance(loaded.network, EnsembleNetwork)
    assert loaded.model_name == "auto"
    levels = (0.1, 0.5, 0.9)
    assert torch.equal(loaded.network.predict(batch, levels).mean, network.predict(batch, levels).mean)
    assert torch.equal(loaded.network.predict(batch, levels).quantiles, network.predict(batch, levels).quantiles)
    assert loaded.explanation["race"][0]["candidate"] == "linear"
    assert loaded.network.needs_known_series
    assert not loaded.network.model.recurrent
    assert not list(saved.path.glob("*.pkl"))


@pytest.mark.parametrize("damage", ["weight", "member", "byte"])
def test_damaged_artifacts_are_refused(panel: Panel, tmp_path: Path, damage: str) -> None:
    path = save_artifact(artifact_of(mixture(panel, flat(0.5, 0.5), number=2), panel), tmp_path).path
    assert path is not None
    if damage == "byte":
        content = bytearray((path / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "weights.safetensors").write_bytes(bytes(content))
    else:
        import hashlib

        name = "weights.safetensors" if damage == "weight" else "spec.json"
        if damage == "weight":
            tensors = load_file(path / name)
            tensors.pop("model.members.0.model.weight")
            save_file(tensors, path / name)
        else:
            spec = json.loads((path / name).read_text())
            spec["members"][1]["network"]["model"]["name"] = "nobody"
            (path / name).write_text(json.dumps(spec))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name]["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="damaged" if damage == "byte" else "cannot be rebuilt"):
        load_artifact(path)


def test_what_does_not_go_together_is_refused(panel: Panel, batch: Any) -> None:
    with pytest.raises(ModelError, match="sum to 1"):
        mixture(panel, flat(0.5, 0.6), number=2)
    with pytest.raises(ModelError, match="sum to 1"):
        mixture(panel, flat(1.5, -0.5), number=2)
    with pytest.raises(ModelError, match="weights have shape"):
        mixture(panel, flat(0.5, 0.5)[..., 0], number=2)
    member = fitted(panel, *MEMBERS[0], "point")
    config = validate(NetworkConfig, {"model": "auto", "likelihood": {"name": "normal"}})
    with pytest.raises(ModelError, match="likelihood"):
        EnsembleNetwork(config, sizes(24), [member], torch.ones(1, 1, 1, 1))
    with pytest.raises(ModelError, match="reads 24 steps"):
        EnsembleNetwork(validate(NetworkConfig, {"model": "auto"}), sizes(12), [member], torch.ones(1, 1, 1, 1))
    with pytest.raises(ModelError, match="at least one"):
        EnsembleNetwork(validate(NetworkConfig, {"model": "auto"}), sizes(12), [], torch.ones(1, 0, 1, 1))
    points = mixture(panel, flat(0.5, 0.5), "point", number=2)
    assert not points.likelihood.has_distribution
    with pytest.raises(ModelError, match="points only"):
        points.predict(batch, (0.1, 0.9))
    with pytest.raises(ModelError, match="no loss"):
        points.loss(batch)
    with pytest.raises(ModelError, match="not fitted as a whole"):
        points.fit_scaler(panel.training_series(None, 200))
    plain = build_network(validate(NetworkConfig, {"model": "auto", "scaling": ScalingConfig(kind="none")}), sizes(24))
    with pytest.raises(ModelError, match="fit it with"):
        plain(batch)
