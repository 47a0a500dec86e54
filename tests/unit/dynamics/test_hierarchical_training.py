"""One map for several series: each window by the map of its series, shared weights, features that tell series apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.data.attractors import lorenz63, simulate
from tsforge.dynamics.config import ReconstructionConfig
from tsforge.dynamics.module import train_seeds
from tsforge.dynamics.network import Reconstruction
from tsforge.dynamics.windows import RandomWindows
from tsforge.layers.plrnn_hierarchical import HierarchicalMap, HierarchicalMaps
from tsforge.ops.plrnn import shallow_map
from tsforge.ops.plrnn_jacobian import jacobians

G, T, B, N = 2, 5, 4, 2
NAMES = ("a", "b", "c")


def settings(**plain: Any) -> ReconstructionConfig:
    base: dict[str, Any] = {
        "data": {"path": "x.parquet", "series": "run"},
        "model": {"hidden": 6, "features": 3},
        "train": {"noise": 0},
    }
    for name, value in plain.items():
        base[name] = {**base.get(name, {}), **value}
    return validate(ReconstructionConfig, base)


def network(config: ReconstructionConfig) -> Reconstruction:
    """Return maps of three series whose features differ."""
    found = Reconstruction(config.model, config.forcing, N, [0, 1], series=NAMES).double()
    assert isinstance(found.map, HierarchicalMaps)
    with torch.no_grad():
        for part in found.map.parameters():
            part.copy_(0.5 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())))
    return found


def windows(holes: bool) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(G, T + 1, B, N)))
    if holes:
        x[:, 2, :, 0] = x[:, 4, 1] = float("nan")
    return x


SERIES = torch.tensor([[2, 0, 0, 1], [1, 1, 2, 0]])


def expected(net: Reconstruction, x: torch.Tensor, alpha: list[float]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return loss and states (B, T, M) of each seed, a window after another by the weights written out."""
    maps, losses, visited = net.map, [], []
    assert isinstance(maps, HierarchicalMaps)
    latent = maps.latent
    for g in range(G):
        errors, seen_states = [], []
        for b in range(B):
            p = maps.vectors[g, SERIES[g, b]]
            A, h1, h2 = (sum(p[v] * part[g, v] for v in range(3)) for part in (maps.P_A, maps.P_h1, maps.P_h2))
            W1 = sum(p[v] * maps.P_W1[g, v].view(latent, 6) for v in range(3))
            W2 = sum(p[v] * maps.P_W2[g, v].view(6, latent) for v in range(3))
            z = net.observation.initial(x[:, 0])[g, b]
            states = []
            for k in range(T):
                z = A * z + W1 @ (torch.relu(W2 @ z + h2) - torch.relu(W2 @ z)) + h1
                target = x[g, k + 1, b]
                seen = ~target.isnan()
                errors.append((z[:N] - target)[seen] ** 2)
                strength = torch.zeros(latent, dtype=torch.float64)
                strength[:N] = alpha[g] * seen.double()
                pulled = torch.zeros(latent, dtype=torch.float64)
                pulled[:N] = torch.nan_to_num(target)
                z = (1 - strength) * z + strength * pulled
                states.append(z)
            seen_states.append(torch.stack(states))
        losses.append(torch.cat(errors).mean())
        visited.append(torch.stack(seen_states))
    return losses, visited


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("latent", [N, 4])
def test_each_window_runs_by_the_map_of_its_series(latent: int, holes: bool) -> None:
    """Value and gradient of the loss against the formula; the gradient reaches the features of the series drawn."""
    config = settings(model={"latent": latent}, forcing={"method": "constant", "start": 0.3}, train={"lambda_lat": 0})
    net, x = network(config), windows(holes)
    parameters = dict(net.named_parameters())
    loss = net.loss(x, x[:, 1:], config.train, 1, not holes, None, SERIES)
    mine = torch.autograd.grad(loss.sum(), list(parameters.values()))
    true, _ = expected(net, x, [0.3, 0.3])
    theirs = torch.autograd.grad(torch.stack(true).sum(), list(parameters.values()))
    torch.testing.assert_close(loss.detach(), torch.stack(true).detach(), rtol=1e-9, atol=1e-12)
    for name, one, other in zip(parameters, mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=name)
        if name == "map.vectors":
            assert bool((one.abs().amax(-1) > 1e-6).all())
    only = torch.autograd.grad(
        net.loss(x, x[:, 1:], config.train, 1, not holes, None, SERIES * 0).sum(), net.map.vectors
    )
    assert bool((only[0][:, 1:] == 0).all())


def test_the_penalty_is_the_mean_over_the_series() -> None:
    config = settings(train={"lambda_lat": 0.1}, forcing={"method": "constant", "start": 0.3})
    net, x = network(config), windows(False)
    bare = net.loss(x, x[:, 1:], settings(train={"lambda_lat": 0}).train, 1, True, None, SERIES)
    found = net.loss(x, x[:, 1:], config.train, 1, True, None, SERIES)
    assert isinstance(net.map, HierarchicalMaps)
    each = torch.stack([net.map.alone(series).penalty() for series in range(3)])
    torch.testing.assert_close(found - bare, 0.1 * each.mean(0))
    torch.testing.assert_close(net.map.A, torch.cat([net.map.alone(series).A for series in range(3)], dim=1))


@pytest.mark.parametrize("latent", [N, 4])
def test_adaptive_forcing_follows_the_window_that_grows_most(latent: int) -> None:
    """kappa is the geometric mean of the norms along a window by the map of its series, the largest of the batch."""
    config = settings(model={"latent": latent}, forcing={"interval": 2})
    net, x = network(config), windows(False)
    net.schedule.alpha.fill_(0.4)
    net.loss(x, x[:, 1:], config.train, 1, True, None, SERIES)
    _, visited = expected(net, x, [0.4, 0.4])
    # the second batch has other series: units that are not forced are looked at where the last windows were
    later = SERIES.flip(1)
    net.loss(x, x[:, 1:], config.train, 2, True, None, later)
    for g in range(G):
        means = []
        for b in range(B):
            series = int((SERIES if latent > N else later)[g, b])
            states = visited[g][b].detach() if latent > N else x[g, 1:, b]
            plain = net.group(g, NAMES[series])
            assert plain.params is not None
            norms = torch.linalg.matrix_norm(jacobians(plain.params, states, clipped=True), 2)
            means.append(float(norms.log().mean().exp()))
        assert float(net.last_kappa[g]) == pytest.approx(max(means), rel=1e-6)


def test_a_seed_starts_as_the_single_hierarchical_map_does() -> None:
    config = settings()
    net = Reconstruction(config.model, config.forcing, N, [5, 9], series=NAMES)
    one = HierarchicalMap(3, N, N, 6, features=3, seed=9)
    z = torch.randn(1, 7, N)
    plain = net.group(1, "b")
    expected = one.step(z, torch.tensor([1]))[0].double()
    torch.testing.assert_close(plain.step(z[0].double()), expected, rtol=1e-5, atol=1e-6)
    assert plain.params is not None
    torch.testing.assert_close(shallow_map(z[0].double(), plain.params, clipped=True), expected, rtol=1e-5, atol=1e-6)
    assert net.features(1) == {name: one.vectors[0].tolist() for name in NAMES}
    assert net.weights(1)["map.P_W1"].shape == (3, 2 * 6)


def test_windows_know_their_series() -> None:
    parts = [torch.full((rows, 1), value) for rows, value in ((8, 0.0), (9, 1.0), (7, 0.0))]
    found = RandomWindows(parts, 4, [0, 1], series=["x", "y", "x"])
    assert found.names == ("x", "y")
    starts = found.draw(3, 50)[2]
    series = found.gather_series(starts)
    assert series is not None
    assert series.shape == (2, 50)
    assert torch.equal(found.gather(starts)[:, 0, :, 0].long(), series)
    assert RandomWindows(parts, 4, [0]).gather_series(starts[:1]) is None
    with pytest.raises(DataError, match="1 of 2 series hold no window.*y"):
        RandomWindows([parts[1], parts[2]], 7, [0], series=["x", "y"])


def test_two_lorenz_systems_of_different_speed_need_a_map_each() -> None:
    """They visit the same states, so that no single map can foretell both; features do, and tell them apart."""
    speeds, split = {"slow": 1.0, "fast": 1.6}, 3000
    runs = [simulate(lorenz63(speed=speed), split + 500, 0.02, seed=4) for speed in speeds.values()]
    loc, scale = np.concatenate(runs).mean(0), np.concatenate(runs).std(0)
    runs = [(rows - loc) / scale for rows in runs]
    size = {"epochs": 60, "batches_per_epoch": 20, "sequence_length": 15}
    plain: dict[str, Any] = {
        "forcing": {"method": "constant", "start": 0.2},
        "train": size | {"learning_rate": 1e-2, "learning_rate_end": 1e-3, "accelerator": "cpu"},
    }
    errors = {}
    for features in (0, 4):
        config = settings(model={"kind": "shallow", "hidden": 50, "features": features}, **plain)
        names = list(speeds) if features else None
        net = train_seeds([rows[:split] for rows in runs], config, [0], series=names).network
        for name, rows in zip(speeds, runs, strict=True):
            model = net.group(0, name if features else None)
            test = torch.from_numpy(rows[split:])
            z = model.run(model.initial(test[:-5]), 5)[-1]
            errors[features, name] = float((model.observe(z) - test[5:]).square().mean())
    for name in speeds:
        assert errors[4, name] < 0.25 * errors[0, name]
    found = torch.tensor([net.features(0)[name] for name in speeds])
    assert float((found[0] - found[1]).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"data": {"series": None}}, "data.series"),
        ({"model": {"kind": "almost_linear", "hidden": None, "rectified": 1}}, "shallow or clipped_shallow"),
        ({"model": {"kind": "deep"}}, "shallow or clipped_shallow"),
        ({"model": {"bounded": True}}, "model.bounded"),
        ({"model": {"hidden": [6]}}, "several widths"),
        ({"data": {"inputs": ["u"]}}, "data.inputs"),
        ({"data": {"valid": 0.2}, "train": {"validate_every": 2}}, "data.valid"),
        ({"train": {"lambda_mar": 0.1}}, "train.lambda_mar"),
        ({"model": {"bases": 3, "rectified": 1}}, "model.bases, model.rectified"),
    ],
)
def test_what_features_do_not_go_with_is_refused(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        settings(**changes)


def test_series_and_features_belong_together() -> None:
    rows = [np.random.default_rng(0).normal(size=(60, 2)) for _ in range(2)]
    small = {"epochs": 1, "batches_per_epoch": 1, "sequence_length": 5}
    with pytest.raises(ConfigError, match="give both"):
        train_seeds(rows, settings(train=small), [0])
    with pytest.raises(ConfigError, match="give both"):
        train_seeds(rows, settings(model={"features": 0}, train=small), [0], series=["a", "b"])
    net = network(settings())
    for index in (None, "d"):
        with pytest.raises(ModelError, match="a, b, c"):
            net.group(0, index)
    x = windows(False)
    with pytest.raises(ModelError, match="series of each window"):
        net.loss(x, x[:, 1:], settings().train, 1, True)
