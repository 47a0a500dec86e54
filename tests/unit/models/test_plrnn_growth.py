"""Error growth of a free run: against closed forms of linear maps and finite differences of every kind of map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.errors import ModelError
from tsforge.models.plrnn import PLRNN, PLRNNForecastConfig

KINDS = {
    "plrnn": {},
    "mean_centred": {},
    "dendritic": {"bases": 3},
    "clipped_dendritic": {"bases": 3},
    "shallow": {"hidden": 12},
    "clipped_shallow": {"hidden": 12},
    "almost_linear": {"rectified": 3},
}
STEPS = 5


def model(kind: str = "shallow", *, known: int = 0, variates: int = 3, ensemble: int = 2, **settings: object) -> PLRNN:
    torch.manual_seed(0)
    config = PLRNNForecastConfig.model_validate(
        {"kind": kind, "latent": 6, "ensemble": ensemble, **KINDS.get(kind, {}), **settings}
    )
    spec = DataSpec(context_length=9, horizon=6, num_variates=variates, num_known=known)
    made = PLRNN(config, spec).double().eval()
    with torch.no_grad():
        made.innovation.copy_(0.1 + torch.rand(made.innovation.shape, dtype=torch.float64))
        for weight in made.map.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made


def windows(one: PLRNN, count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (count, one.spec.context_length, one.spec.num_variates)
    known = None
    if one.spec.num_known:
        rows = one.spec.context_length + one.spec.horizon
        known = torch.randn(count, rows, one.spec.num_known, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) > 0.1
    context = torch.where(mask, torch.randn(shape, generator=generator, dtype=torch.float64), 0.0)
    return Batch(context, mask, known=known)


def numerical(one: PLRNN, batch: Batch, steps: int) -> Tensor:
    """Return the spread by central differences of the map's own formula, one window, variate and member at a time."""
    _, _, _, scale = one._context(batch)
    state = one.warm_up(batch)["z"].transpose(0, 1)
    ahead = None if batch.known is None else batch.known[:, one.spec.context_length :]
    pushes = one._pushes(ahead, None, slice(0, steps))
    sigma, size, total = one.innovation, 1e-6, torch.zeros(len(batch.context), steps, one.spec.num_variates)
    zeros = torch.zeros(len(sigma), 1, one.spec.num_variates, dtype=torch.float64)
    for member in range(len(sigma)):
        squares = sigma[member].square().expand_as(total).clone().double()
        for off in range(one.spec.num_variates):
            error = torch.zeros_like(state)
            if one.config.observation == "identity":
                error[member, :, off] = sigma[member, off]
            else:
                wrong = zeros.clone()
                wrong[member, 0, off] = sigma[member, off]
                error = (one.observation.initial(wrong) - one.observation.initial(zeros)).expand_as(state)
            runs = []
            for sign in (1.0, -1.0):
                z, seen = state + sign * size * error, []
                for step in range(steps):
                    z = one.map.step(z) if pushes is None else one.map.step(z) + pushes[:, step]
                    seen.append(one.observation.observe(z)[member])
                runs.append(torch.stack(seen, dim=1))
            squares += ((runs[0] - runs[1]) / (2 * size)).square()
        total = total + squares / len(sigma)
    return total.sqrt() * scale


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_spread_is_that_of_small_errors_carried_along_by_the_map_itself(kind: str) -> None:
    one = model(kind)
    batch = windows(one)
    told, spread = one.growth(batch, STEPS)
    torch.testing.assert_close(spread, numerical(one, batch, STEPS), rtol=1e-5, atol=1e-9)
    free = one.free_run(one.warm_up(batch)).raw[..., 0] if one.skip is None else one._ahead(one.warm_up(batch), None)
    free = free.mean(0) if free.ndim == 4 else free
    torch.testing.assert_close(told, free[:, :STEPS], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{"observation": "affine"}, {"normalisation": "none"}])
def test_read_outs_covariates_and_normalisation(settings: dict[str, object]) -> None:
    one = model(known=2, **settings)
    batch = windows(one)
    told, spread = one.growth(batch, STEPS)
    torch.testing.assert_close(spread, numerical(one, batch, STEPS), rtol=1e-5, atol=1e-9)
    known = batch.known
    assert known is not None
    free = one._ahead(one.warm_up(batch), known[:, one.spec.context_length :]).mean(0)
    torch.testing.assert_close(told, free[:, :STEPS], rtol=1e-9, atol=1e-9)


def test_a_linear_map_has_its_closed_form() -> None:
    """``s[n]^2 = sigma^2 (1 + a^(2 n))`` for a diagonal map: an error fades by a in every step."""
    one = model("plrnn", normalisation="none", ensemble=1)
    with torch.no_grad():
        for name, weight in one.map.named_parameters():
            if name != "raw_A":
                weight.zero_()
    a = one.map.A[0, :3]
    _, spread = one.growth(windows(one), STEPS)
    steps = torch.arange(1, STEPS + 1, dtype=torch.float64).unsqueeze(1)
    expected = one.innovation[0] * (1 + a ** (2 * steps)).sqrt()
    torch.testing.assert_close(spread, expected.expand_as(spread), rtol=1e-10, atol=0.0)


def test_what_cannot_be_told_is_refused() -> None:
    one = model()
    one.innovation.fill_(torch.inf)
    with pytest.raises(ModelError, match="fit again with one"):
        one.growth(windows(one), 2)
    deep = model("deep", hidden=[8], objective="horizon")
    with pytest.raises(ModelError, match="'deep'"):
        deep.growth(windows(deep), 2)
