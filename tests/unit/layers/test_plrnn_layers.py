"""Maps of piecewise-linear recurrent networks against scalar loops, their shallow form, initial values, penalties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsforge.core.errors import ConfigError, ModelError
from tsforge.layers.plrnn import A_MAX, PLRNNMap, make_map
from tsforge.layers.plrnn_hierarchical import HierarchicalMap
from tsforge.layers.plrnn_observation import make_observation
from tsforge.layers.teacher_forcing import AlphaSchedule, ForcingConfig
from tsforge.ops.plrnn import Shallow, gtf_loop, gtf_sequence, shallow_map
from tsforge.ops.plrnn_jacobian import kappa

LATENT = 5
KINDS: dict[str, dict[str, Any]] = {
    "plrnn": {},
    "mean_centred": {},
    "dendritic": {"bases": 4},
    "clipped_dendritic": {"bases": 4},
    "shallow": {"hidden": 7},
    "clipped_shallow": {"hidden": 7},
    "almost_linear": {"rectified": 2},
    "deep": {"hidden": (6, 4)},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def random_map(kind: str, seed: int = 0, **more: Any) -> PLRNNMap:
    """A map in float64 whose every parameter is drawn anew, so that no term is 0 by its start."""
    built = make_map(kind, LATENT, seeds=[seed, seed + 1], inputs=2, **KINDS[kind], **more).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return built


def states(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relu(x: float) -> float:
    return x if x > 0 else 0.0


def scalar_step(kind: str, p: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """One step of one sample by scalar loops over units, from the stored parameters of one group."""
    M = len(z)
    out = np.zeros(M)
    if kind == "deep":
        y = list(z)
        for layer in range(3):
            weight, bias = p[f"weight{layer}"], p[f"bias{layer}"]
            source = [relu(v) for v in y] if layer else y
            y = [bias[i] + sum(weight[i, j] * source[j] for j in range(len(source))) for i in range(len(bias))]
        return np.array([p["raw_A"][i] * z[i] + y[i] for i in range(M)])
    if kind.endswith("shallow"):
        for i in range(M):
            out[i] = p["raw_A"][i] * z[i] + p["h1"][i]
            for h in range(len(p["h2"])):
                seen = sum(p["W2"][h, j] * z[j] for j in range(M))
                clip = relu(seen) if kind == "clipped_shallow" else 0.0
                out[i] += p["W1"][i, h] * (relu(seen + p["h2"][h]) - clip)
        return out
    phi = np.zeros(M)
    for j in range(M):
        if kind == "plrnn":
            phi[j] = relu(z[j])
        elif kind == "mean_centred":
            phi[j] = relu(z[j] - sum(z) / M)
        elif kind == "almost_linear":
            phi[j] = relu(z[j]) if j >= M - 2 else z[j]
        else:
            for b in range(len(p["a"])):
                clip = relu(z[j]) if kind == "clipped_dendritic" else 0.0
                phi[j] += p["a"][b] * (relu(z[j] - p["theta"][j, b]) - clip)
    for i in range(M):
        out[i] = p["raw_A"][i] * z[i] + p["h"][i]
        out[i] += sum(p["W"][i, j] * phi[j] for j in range(M) if kind == "almost_linear" or i != j)
    return out


def of_group(built: PLRNNMap, g: int) -> dict[str, np.ndarray]:
    return {name: value[g].detach().numpy() for name, value in built.named_parameters()}


@each_kind
def test_checklist_8_1_step_equals_a_scalar_loop(kind: str) -> None:
    built, z = random_map(kind), states(2, 3, 4, LATENT)
    found = built.step(z).detach().numpy()
    for g, t, b in np.ndindex(2, 3, 4):
        np.testing.assert_allclose(
            found[g, t, b], scalar_step(kind, of_group(built, g), z[g, t, b].numpy()), rtol=1e-12, atol=1e-12
        )


@each_kind
def test_shallow_form_equals_the_step(kind: str) -> None:
    built, z = random_map(kind), states(2, 30, LATENT)
    if kind == "deep":
        with pytest.raises(ModelError, match="gtf_loop"):
            built.shallow()
        return
    form = built.shallow()
    torch.testing.assert_close(shallow_map(z, form, built.clipped), built.step(z), rtol=1e-12, atol=1e-12)
    parameters = [parameter for name, parameter in built.named_parameters() if name != "C"]
    weigh = states(2, 30, LATENT, seed=9)
    by_form = torch.autograd.grad((shallow_map(z, form, built.clipped) * weigh).sum(), parameters)
    by_step = torch.autograd.grad((built.step(z) * weigh).sum(), parameters)
    for one, other in zip(by_form, by_step, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def formula_jacobian(built: PLRNNMap, z: Tensor, g: int) -> Tensor:
    """diag(A) + W1 diag(d) W2 with the indicators of the shallow form."""
    A, W1, W2, _, h2 = (part[g] for part in built.shallow())
    d = (W2 @ z + h2 > 0).to(z.dtype)
    if built.clipped:
        d = d - (W2 @ z > 0).to(z.dtype)
    return torch.diag(A) + W1 @ (d[:, None] * W2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deep"])
def test_checklist_8_1_jacobian_of_the_shallow_form_equals_autograd(kind: str) -> None:
    built = random_map(kind)
    for z in states(20, LATENT):
        whole = torch.autograd.functional.jacobian(
            lambda one: built.step(torch.stack([one, one]).unsqueeze(1)).squeeze(1), z
        )
        for g in range(2):
            torch.testing.assert_close(formula_jacobian(built, z, g), whole[g], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deep"])
def test_checklist_8_5_the_parameter_bound_holds_the_gradient_of_every_kind(kind: str) -> None:
    """Three seeds side by side, maps that grow; with the bound's alpha d z_T / d z_1 has at most norm 1 after any T."""
    built = make_map(kind, LATENT, seeds=[11, 12, 13], **KINDS[kind]).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.7 * states(*parameter.shape, seed=parameter.numel()))
    form = Shallow(*(part.detach() for part in built.shallow()))
    A, W1, W2 = (part.numpy() for part in form[:3])
    bound = [abs(A[g]).max() + np.linalg.norm(W1[g], 2) * np.linalg.norm(W2[g], 2) for g in range(3)]
    assert min(bound) > 1.2
    forcing = states(3, 1500, 1, LATENT, seed=5)
    kappas = kappa(form, forcing, "jacobian_upper_bound", clipped=built.clipped)
    np.testing.assert_allclose(kappas.numpy(), bound, rtol=1e-9)
    schedule = AlphaSchedule(ForcingConfig(start=0.0), groups=3)
    schedule.update(5, kappas)
    np.testing.assert_allclose(schedule.alpha.numpy(), 1 - 1 / np.array(bound), rtol=1e-9)
    alpha = schedule.alpha

    def through(steps: int, strength: Tensor) -> tuple[list[float], Tensor]:
        """Return |d z_T / d z_1| of each group, and the states."""
        moved = torch.zeros(3, steps, 1, LATENT, dtype=torch.float64).requires_grad_()  # an input of step 0 moves z_1
        z = gtf_sequence(forcing[:, 0], forcing[:, :steps], strength, form, inputs=moved, clipped=built.clipped)
        rows = [torch.autograd.grad(z[:, -1, 0, m].sum(), moved, retain_graph=True)[0][:, 0, 0] for m in range(LATENT)]
        return np.linalg.norm(torch.stack(rows, dim=1).numpy(), 2, axis=(1, 2)).tolist(), z.detach()

    for steps in (2, 30, 1500):
        assert max(through(steps, alpha)[0]) <= 1.0 + 1e-6, steps
    assert max(through(100, torch.zeros_like(alpha))[0]) > 1e3  # what the forcing holds
    found, z = through(8, alpha)
    for g in range(3):  # the gradient is the product of the Jacobians at the forced states
        product, share = torch.eye(LATENT, dtype=torch.float64), alpha[g]
        for t in range(7):
            forced = (1 - share) * z[g, t, 0] + share * forcing[g, t, 0]
            product = (1 - share) * formula_jacobian(built, forced, g).detach() @ product
        assert found[g] == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-9)
        assert found[g] > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deep"])
def test_forced_sequence_of_the_map_equals_the_loop_of_its_step(kind: str) -> None:
    built = random_map(kind)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(0.3)
        s, z1, forcing = states(2, 6, 3, 2), states(2, 3, LATENT), states(2, 6, 3, LATENT, seed=5)
        pushed = built.input_term(s)
        torch.testing.assert_close(pushed[1, 2, 0], built.C[1] @ s[1, 2, 0])
        options = {"inputs": pushed, "clipped": built.clipped, "backend": "reference"}
        by_form = gtf_sequence(z1, forcing, 0.3, built.shallow(), **options)
        torch.testing.assert_close(by_form, gtf_loop(built.step, z1, forcing, 0.3, pushed), rtol=1e-10, atol=1e-10)


@each_kind
def test_a_group_starts_from_the_values_of_its_seed_alone(kind: str) -> None:
    grouped = make_map(kind, LATENT, inputs=3, seeds=[0, 1, 2], **KINDS[kind])
    for g in range(3):
        alone = dict(make_map(kind, LATENT, inputs=3, seeds=[g], **KINDS[kind]).named_parameters())
        for name, value in grouped.named_parameters():
            assert torch.equal(value[g], alone[name][0]), name
    assert not torch.equal(grouped.A[0], grouped.A[1])


def test_groups_without_seeds_follow_the_global_generator() -> None:
    torch.manual_seed(5)
    first = make_map("shallow", 3, 8, groups=2)
    torch.manual_seed(5)
    second = make_map("shallow", 3, 8, groups=2)
    assert torch.equal(first.A, second.A)
    assert not torch.equal(first.A[0], first.A[1])


def test_initial_values_have_the_published_ranges() -> None:
    built = make_map("clipped_shallow", 4, 100, inputs=2, seeds=range(40))
    parts = dict(built.named_parameters())
    for name, bound in {"W1": 0.1, "W2": 0.5, "h2": 0.1, "C": 1.0}.items():
        assert 0.95 * bound < parts[name].abs().max() <= bound, name
    assert not parts["h1"].any()
    assert not make_map("shallow", 4, 100, seeds=[0]).shallow().h2.any()
    square = make_map("plrnn", 6, seeds=[3])
    K = torch.diag(square.A[0]) + square.shallow().W1[0]
    values = torch.linalg.eigvalsh(K)
    torch.testing.assert_close(K, K.T)
    assert values[0] > 0
    assert values[-1].item() == pytest.approx(1.0, abs=1e-5)
    assert make_map("almost_linear", 30, rectified=2, seeds=[0]).W.std().item() == pytest.approx(0.01, rel=0.1)
    theta = make_map("dendritic", 4, bases=50, theta_range=(2.0, 3.0), seeds=[0]).theta
    assert theta.min() > 2.0
    assert theta.max() < 3.0


@pytest.mark.parametrize(
    ("count", "kind", "options", "observed", "readout"),
    [
        (2785, "clipped_shallow", {"latent": 5, "hidden": 250}, 5, "affine"),
        (17952, "clipped_shallow", {"latent": 16, "hidden": 512}, 64, "affine"),
        (3245, "dendritic", {"latent": 35, "bases": 50}, 5, "identity"),
        (18099, "dendritic", {"latent": 105, "bases": 40}, 64, "identity"),
    ],
)
def test_parameter_counts_of_table_1(count: int, kind: str, options: Any, observed: int, readout: str) -> None:
    built = make_map(kind, seeds=[0, 1], **options)
    read = make_observation(readout, observed, options["latent"], seeds=[0, 1])
    each = [*built.parameters(), *read.parameters()]  # a masked diagonal is counted, as in published tables
    assert sum(part[0].numel() for part in each) == count


def test_bounded_keeps_the_diagonal_below_one_and_free_runs_within_the_bound() -> None:
    built = random_map("clipped_shallow", bounded=True)
    with torch.no_grad():
        built.raw_A.mul_(10)
    A, W1, _, h1, h2 = (part.detach() for part in built.shallow())
    assert A.abs().max() < 1
    limit = ((W1.abs() @ h2.abs().unsqueeze(-1)).squeeze(-1) + h1.abs()) / (1 - A.abs())
    z = 1e3 * states(2, 4, LATENT)
    with torch.no_grad():
        for _ in range(10_000):
            z = built.step(z)
    assert (z.abs() <= limit.unsqueeze(1) + 1.0).all()  # 0.999^10000 of the start is left
    start = make_map("clipped_shallow", LATENT, 7, seeds=[0], bounded=True).A
    torch.testing.assert_close(start, make_map("clipped_shallow", LATENT, 7, seeds=[0]).A, rtol=1e-5, atol=1e-5)
    assert make_map("plrnn", 1, seeds=[0], bounded=True).A < A_MAX


def test_the_diagonal_of_w_has_no_effect_and_gets_no_gradient() -> None:
    built = random_map("dendritic")
    built.step(states(2, 8, LATENT)).sum().backward()
    assert not built.W.grad.diagonal(dim1=1, dim2=2).any()
    assert built.W.grad.abs().sum() > 0


def test_penalties_follow_their_formulas() -> None:
    built = random_map("clipped_shallow")
    p = of_group(built, 1)
    expected = np.sum((1 - p["raw_A"]) ** 2) + sum(np.sum(p[k] ** 2) for k in ("W1", "W2", "h1", "h2", "C"))
    assert built.penalty()[1].item() == pytest.approx(expected, rel=1e-12)
    square = random_map("plrnn")
    p = of_group(square, 0)
    W = p["W"] - np.diag(np.diag(p["W"]))
    mar = np.linalg.norm(1 - p["raw_A"][3:]) + np.linalg.norm(W[3:]) + np.linalg.norm(p["h"][3:])
    assert square.mar_penalty(0.4)[0].item() == pytest.approx(mar, rel=1e-12)
    assert square.penalty()[0].item() == pytest.approx(
        np.sum((1 - p["raw_A"]) ** 2) + np.sum(W**2) + np.sum(p["h"] ** 2) + np.sum(p["C"] ** 2)
    )
    fresh = make_map("plrnn", 4, seeds=[0])
    fresh.mar_penalty(0.5).sum().backward()  # h starts at 0, where a norm has no slope
    assert torch.isfinite(fresh.h.grad).all()
    with pytest.raises(ConfigError, match="ratio"):
        square.mar_penalty(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "shalow", "latent": 3}, "did you mean 'shallow'"),
        ({"kind": "shallow", "latent": 3}, "needs model.hidden"),
        ({"kind": "plrnn", "latent": 3, "hidden": 5}, "hidden does not belong"),
        ({"kind": "dendritic", "latent": 3}, "needs model.bases"),
        ({"kind": "almost_linear", "latent": 3, "rectified": 4}, "model.rectified is 4"),
        ({"kind": "almost_linear", "latent": 3}, r"needs model\.rectified \(for example model\.rectified=3\)"),
        ({"kind": "plrnn", "latent": 3, "theta_range": (0.0, 1.0)}, "theta_range does not belong"),
        ({"kind": "plrnn", "latent": 0}, "latent >= 1"),
        ({"kind": "plrnn", "latent": 3, "groups": 2, "seeds": [1]}, "leave groups out"),
        ({"kind": "plrnn", "latent": 3, "seeds": [-1]}, "negative"),
        ({"kind": "shallow", "latent": 3, "hidden": (3, 3)}, "one number"),
    ],
)
def test_bad_settings_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_map(**options)


def test_inputs_of_the_wrong_shape_are_told() -> None:
    with pytest.raises(ModelError, match="without external inputs"):
        make_map("plrnn", 3, seeds=[0]).input_term(torch.zeros(1, 2, 1))
    with pytest.raises(ModelError, match=r"\(1, ..., 2\)"):
        make_map("plrnn", 3, inputs=2, seeds=[0]).input_term(torch.zeros(1, 2, 1))


@pytest.mark.parametrize("clipped", [True, False])
def test_hierarchical_maps_are_linear_in_the_vectors(clipped: bool) -> None:
    model = HierarchicalMap(4, 2, 3, 6, features=5, clipped=clipped, seed=1).double()
    assert torch.equal(model.vectors[0], model.vectors[3])  # all equal at the start
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    chosen, z = torch.tensor([2, 0, 2]), states(3, 7, 3)
    form = model.shallow(chosen)
    assert form.W1.shape == (3, 3, 6)
    torch.testing.assert_close(shallow_map(z, form, clipped), model.step(z, chosen), rtol=1e-10, atol=1e-10)
    p = model.vectors[2].detach().numpy()
    W1 = sum(p[v] * model.P_W1[v].detach().numpy() for v in range(5)).reshape(3, 6)
    np.testing.assert_allclose(form.W1[0].detach().numpy(), W1, rtol=1e-12)
    everything = list(model.shared_parameters()) + list(model.individual_parameters())
    assert {id(part) for part in everything} == {id(part) for part in model.parameters()}
    with pytest.raises(ModelError, match="indices"):
        model.shallow(torch.tensor([0.5]))


def test_new_series_fit_only_their_own_numbers() -> None:
    model = HierarchicalMap(4, 2, 3, 6, seed=1)
    new = model.adapted(2)
    assert [name for name, part in new.named_parameters() if part.requires_grad] == ["vectors", "log_variance"]
    z = torch.randn(1, 5, 3)
    torch.testing.assert_close(new.step(z, torch.tensor([1])), model.step(z, torch.tensor([0])))


def test_likelihood_of_the_hierarchical_map_skips_missing_entries() -> None:
    model = HierarchicalMap(3, 2, 3, 6, seed=1)
    with torch.no_grad():
        model.log_variance[1] = torch.tensor([0.5, -1.0])
    x = torch.tensor([[[[1.0, math.nan]]], [[[math.nan, math.nan]]]], requires_grad=False)
    predicted = torch.full_like(x, 0.25).requires_grad_()
    found = model.nll(x, predicted, torch.tensor([1, 2]))
    normal = torch.distributions.Normal(0.25, math.exp(0.25))
    assert found[0].item() == pytest.approx(-normal.log_prob(torch.tensor(1.0)).item(), rel=1e-5)
    assert found[1].item() == 0.0
    found.sum().backward()
    assert torch.isfinite(predicted.grad).all()
