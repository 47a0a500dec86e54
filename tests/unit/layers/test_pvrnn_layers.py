"""PV-RNN: recurrence, free energy and error regression against loops over single numbers and against torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from tsforge.layers.pvrnn import Gaussians, LevelState, PredictiveCodingNetwork, divergence

V, T, B = 3, 5, 2
SHAPES: dict[str, dict[str, Any]] = {
    "one": {"units": [4], "latents": [2], "time_constants": [3.0], "meta_prior": [0.3]},
    "two": {"units": [4, 3], "latents": [2, 1], "time_constants": [2.0, 8.0], "meta_prior": [0.3, 0.05]},
    "both ways": {"units": [4, 3, 2], "latents": [2, 1, 2], "time_constants": [1.0, 2.5, 9.0], "bottom_up": True}
    | {"meta_prior": [0.3, 0.0, 1.7]},
}


def fresh(shape: str, *, variates: int = V, **changes: Any) -> PredictiveCodingNetwork:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"first_weight": 0.02, **SHAPES[shape], **changes}
    return PredictiveCodingNetwork(variates, **settings).double()


def network(shape: str = "two", *, variates: int = V, **changes: Any) -> PredictiveCodingNetwork:
    """Return a network whose every weight matters."""
    found = fresh(shape, variates=variates, **changes)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return found


def windows(seed: int = 1, *, size: int = B, steps: int = T, variates: int = V) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, steps, variates, dtype=torch.float64, generator=generator)
    return x, torch.rand(size, steps, variates, generator=generator) > 0.25


def free_of(net: PredictiveCodingNetwork, seed: int = 2, *, size: int = B, steps: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    like = net.free_vectors(size, steps)
    return torch.randn(like.shape, dtype=like.dtype, generator=generator)


# ---- the oracle: numpy, one window, one step, one level at a time


def weights(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return linear.weight.detach().numpy(), linear.bias.detach().numpy()


class Naive:
    """The recurrence of one window in plain numpy."""

    def __init__(self, net: PredictiveCodingNetwork, shape: str) -> None:
        self.net, self.levels, self.taus = net, list(net.levels), SHAPES[shape]["time_constants"]
        self.h = [np.zeros(level.units) for level in self.levels]
        self.d = [np.zeros(level.units) for level in self.levels]

    def advance(self, z: list[np.ndarray]) -> None:
        old = [d.copy() for d in self.d]
        for place in range(len(self.levels) - 1, -1, -1):
            level = self.levels[place]
            heard = [old[place], z[place]]
            if place + 1 < len(self.levels):
                heard.append(self.d[place + 1])  # of this step
            if self.net.bottom_up and place > 0:
                heard.append(old[place - 1])
            weight, bias = weights(level.drive)
            tau = self.taus[place]
            self.h[place] = (1 - 1 / tau) * self.h[place] + (weight @ np.concatenate(heard) + bias) / tau
            self.d[place] = np.tanh(self.h[place])

    def moments(self, place: int, which: str, added: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = weights(getattr(self.levels[place], which))
        raw = weight @ self.d[place] + bias + added
        count = self.levels[place].latents
        return np.tanh(raw[:count]), np.exp(raw[count:])

    def told(self) -> np.ndarray:
        weight, bias = weights(self.net.read)
        return (weight @ self.d[0] + bias).reshape(self.net.variates, self.net.params)[:, 0]


def naive_energy(
    net: PredictiveCodingNetwork,
    shape: str,
    free: np.ndarray,
    x: np.ndarray,
    mask: np.ndarray,
    noise: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, Naive]:
    """Return reconstruction [T, V] and weighted divergence [T] of one window, and the state after it."""
    run, s = Naive(net, shape), 0.01 + np.exp(net.log_sigma.detach().numpy())
    reconstruction, told = np.zeros(x.shape), np.zeros(len(x))
    for t in range(len(x)):
        at, drawn, drawn_z = 0, 0, []
        for place, level in enumerate(run.levels):
            count = level.latents
            mean, sigma = run.moments(place, "posterior", free[t, at : at + 2 * count])
            p_mean, p_sigma = run.moments(place, "prior") if t else (np.zeros(count), np.ones(count))
            weight = SHAPES[shape]["meta_prior"][place] if t else net.first_weight
            for i in range(count):
                kl = math.log(p_sigma[i] / sigma[i]) - 0.5
                kl += (sigma[i] ** 2 + (mean[i] - p_mean[i]) ** 2) / (2 * p_sigma[i] ** 2)
                told[t] += weight / count * kl
            drawn_z.append(mean if noise is None else mean + sigma * noise[t, drawn : drawn + count])
            at, drawn = at + 2 * count, drawn + count
        run.advance(drawn_z)
        for v in range(x.shape[1]):
            if mask[t, v]:
                z = (x[t, v] - run.told()[v]) / s[v]
                reconstruction[t, v] = 0.5 * z**2 + math.log(s[v] * math.sqrt(2 * math.pi))
    return reconstruction, told, run


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pass_and_its_free_energy_are_those_of_a_loop_over_numbers(shape: str, sample: bool) -> None:
    net, (x, mask) = network(shape), windows()
    free = free_of(net)
    torch.manual_seed(5)
    path = net.follow(free, sample=sample)
    found = net.energy(path, torch.where(mask, x, torch.nan), mask)  # hidden values are not read
    ahead = net.roll(path.states, 4)
    torch.manual_seed(5)
    count = sum(SHAPES[shape]["latents"])
    noise = torch.randn(B, T, count, dtype=torch.float64).numpy() if sample else None
    totals = []
    for row in range(B):
        own = None if noise is None else noise[row]
        reconstruction, told, run = naive_energy(net, shape, free[row].numpy(), x[row].numpy(), mask[row].numpy(), own)
        np.testing.assert_allclose(found.reconstruction[row].detach(), reconstruction, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(found.divergence[row].detach(), told, rtol=1e-11, atol=1e-11)
        totals.append(sum(reconstruction[t].sum() / V + told[t] for t in range(T)))
        for step in range(4):  # the prior's mean from there on
            run.advance([run.moments(place, "prior")[0] for place in range(len(run.levels))])
            np.testing.assert_allclose(ahead[row, step].detach(), run.d[0], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found.total().detach(), totals, rtol=1e-11)


def test_divergence_is_that_of_torch_and_of_draws_and_zero_between_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 6, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    q, p = Gaussians(parts[0], parts[1]), Gaussians(parts[2], parts[3])
    first, second = (Independent(Normal(g.mean, g.log_sigma.exp()), 1) for g in (q, p))
    torch.testing.assert_close(divergence(q, p), kl_divergence(first, second), rtol=1e-12, atol=1e-12)
    assert float(divergence(q, q).abs().max()) < 1e-14
    near = (
        Gaussians(0.2 * q.mean[0, 0], 0.2 * q.log_sigma[0, 0]),
        Gaussians(0.2 * p.mean[0, 0], 0.2 * p.log_sigma[0, 0]),
    )
    one, other = (Independent(Normal(g.mean, g.log_sigma.exp()), 1) for g in near)
    torch.manual_seed(1)
    draws = one.sample((200_000,))
    told = one.log_prob(draws) - other.log_prob(draws)
    assert float(divergence(*near)) == pytest.approx(float(told.mean()), abs=4 * float(told.std()) / 200_000**0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_free_vectors_is_that_of_finite_differences(shape: str) -> None:
    net, (x, mask) = network(shape), windows()
    free = free_of(net).requires_grad_()
    (slope,) = torch.autograd.grad(net.energy(net.follow(free), x, mask).total().sum(), free)
    for row in range(B):
        numeric = slopes(net, shape, free[row].detach().numpy(), x[row].numpy(), mask[row].numpy())
        np.testing.assert_allclose(slope[row], numeric, rtol=1e-5, atol=1e-8)


def slopes(
    net: PredictiveCodingNetwork, shape: str, free: np.ndarray, x: np.ndarray, mask: np.ndarray, size: float = 1e-6
) -> np.ndarray:
    """Return the gradient of F of one window by central differences of the loop over numbers."""
    found = np.zeros_like(free)
    for place in np.ndindex(*free.shape):
        ends = []
        for sign in (1, -1):
            moved = free.copy()
            moved[place] += sign * size
            reconstruction, told, _ = naive_energy(net, shape, moved, x, mask)
            ends.append(reconstruction.sum() / V + told.sum())
        found[place] = (ends[0] - ends[1]) / (2 * size)
    return found


def test_error_regression_is_adam_on_the_free_vectors() -> None:
    net, (x, mask) = network("one"), windows(size=1, steps=3)
    found = net.infer(x, mask, steps=4, rate=0.2)[0].numpy()
    free = np.zeros_like(found)
    mean, square = np.zeros_like(free), np.zeros_like(free)
    for step in range(1, 5):
        slope = slopes(net, "one", free, x[0].numpy(), mask[0].numpy())
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        size = np.sqrt(square / (1 - 0.999**step) + 1e-8)
        free = free - 0.2 * mean / (1 - 0.9**step) / size
    np.testing.assert_allclose(found, free, rtol=1e-4, atol=1e-5)


def test_error_regression_lowers_the_free_energy_and_leaves_the_weights() -> None:
    net, (x, mask) = network(), windows(size=20)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    told = [net.energy(net.follow(net.free_vectors(20, T)), x, mask).total()]
    for steps in (5, 20, 80):
        told.append(net.energy(net.follow(net.infer(x, mask, steps=steps, rate=0.1)), x, mask).total())
    for earlier, later in pairwise(told):
        assert bool((later < earlier).all())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_is_inferred_does_not_depend_on_neighbours_or_on_the_mode_of_gradients() -> None:
    net, (x, mask) = network(), windows(size=6)
    whole = net.infer(x, mask, steps=10, rate=0.1)
    for row in range(6):
        alone = net.infer(x[row : row + 1], mask[row : row + 1], steps=10, rate=0.1)
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(net.infer(x, mask, steps=10, rate=0.1), whole)
    with torch.inference_mode():
        again = net.infer(x * 1.0, mask & True, steps=10, rate=0.1)
    assert torch.equal(again, whole)
    assert not whole.requires_grad


def test_gradients_through_inference_are_those_of_finite_differences() -> None:
    net, (x, _) = network("one"), windows(size=1, steps=3)
    mask = torch.ones_like(x, dtype=torch.bool)

    def inferred(rows: Tensor) -> Tensor:
        return net.infer(rows, mask, steps=3, rate=0.1, through=rows.requires_grad)

    assert torch.autograd.gradcheck(inferred, (x.clone().requires_grad_(),), eps=1e-6, atol=1e-4)


def test_a_time_constant_of_one_is_a_plain_recurrent_network() -> None:
    net = network("one", time_constants=[1.0])
    path = net.follow(free_of(net))
    level = net.levels[0]
    plain = nn.RNN(level.latents, level.units, batch_first=True).double()
    with torch.no_grad():
        plain.weight_hh_l0.copy_(level.drive.weight[:, : level.units])
        plain.weight_ih_l0.copy_(level.drive.weight[:, level.units :])
        plain.bias_ih_l0.copy_(level.drive.bias)
        plain.bias_hh_l0.zero_()
    torch.testing.assert_close(path.fast, plain(path.posteriors[0].mean)[0], rtol=1e-12, atol=1e-12)
    state = LevelState(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64))
    slow = network("one", time_constants=[1e9]).levels[0]  # and one that never leaks never moves
    assert float(slow.advance(state, [torch.ones(1, 2, dtype=torch.float64)]).h.detach().abs().max()) < 1e-7


def test_without_a_divergence_noise_is_learnt_by_heart() -> None:
    x, _ = windows(size=2, variates=1)
    mask = torch.ones_like(x, dtype=torch.bool)
    net = fresh("one", variates=1, meta_prior=[0.0], first_weight=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(60):
        free = net.infer(x, mask, steps=4, rate=0.3, through=True)
        optimizer.zero_grad()
        net.energy(net.follow(free), x, mask).total().mean().backward()
        optimizer.step()
    told = net.read_out(net.follow(net.infer(x, mask, steps=100, rate=0.1)).fast)[..., 0].detach()
    assert float((told - x).square().mean() / x.var()) < 0.01


def test_a_large_meta_prior_keeps_the_posterior_at_the_prior() -> None:
    x, mask = windows(size=3)
    told = {}
    for w in (0.01, 100.0):
        net = fresh("two", meta_prior=[w, w], first_weight=w)
        path = net.follow(net.infer(x, mask, steps=150, rate=0.1))
        parts = [divergence(q, p) for q, p in zip(path.posteriors, path.priors, strict=True)]
        told[w] = float(torch.stack(parts).detach().max())
    assert told[100.0] < 1e-3
    assert told[0.01] > 1.0
