"""The C++ kernel of the forced PLRNN against a plain loop and autograd through it."""

from __future__ import annotations

import plrnn_cases
import pytest
import torch
from compiler import need_compiler
from plrnn_cases import Arguments, loop
from torch import Tensor

from tsforge.core.errors import ModelError
from tsforge.ops import _plrnn_compiled as module
from tsforge.ops._plrnn_compiled import free_compiled, gtf_compiled, unavailable
from tsforge.ops.plrnn import Shallow

# groups, batch, steps, latent, hidden: rests of every tile, one number, more blocks than one; latent units that fill
# vectors of float64, or of float32 too, and that do not
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 3, 50), (1, 16, 9, 5, 250), (3, 17, 6, 4, 17), (1, 70, 5, 7, 33), (2, 5, 40, 2, 9)]
SHAPES += [(2, 1, 9, 16, 21), (1, 3, 6, 13, 40), (1, 9, 5, 31, 35), (2, 13, 4, 33, 17), (1, 29, 4, 64, 70)]


@pytest.fixture(autouse=True)
def _available() -> None:
    need_compiler()
    assert unavailable(*draw(1, 1, 1, 1, 1)[::3]) is None  # one that fails to build is a failure


def draw(groups: int, batch: int, steps: int, latent: int, hidden: int) -> Arguments:
    """Return the arguments of a kernel in float64."""
    return plrnn_cases.draw(batch, steps, latent, hidden, groups=groups).arguments()


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["all", "free", "constant", "steps"])
def test_checklist_8_3_states_and_gradients_equal_the_loop(shape: tuple[int, ...], kind: str, clipped: bool) -> None:
    z1, forcing, alpha, params, inputs = draw(*shape)
    signals: Tensor | None = None if kind == "free" else forcing
    pushes: Tensor | None = None if kind == "constant" else inputs
    if kind == "free":
        alpha = torch.zeros((), dtype=alpha.dtype).expand_as(alpha)
    if kind == "constant":
        alpha = alpha[:, :1, :1, :1].expand_as(alpha)
    if kind == "steps":
        alpha = alpha[:1, :, :1, :].expand_as(alpha)
    leaves = [part.requires_grad_() for part in (z1, *params, *([] if pushes is None else [pushes]))]
    ours, theirs = (call(z1, signals, alpha, params, pushes, clipped) for call in (gtf_compiled, loop))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(theirs)
    for left, right in zip(
        torch.autograd.grad(ours, leaves, probe), torch.autograd.grad(theirs, leaves, probe), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)
    single = Shallow(*(part.float() for part in params))
    low = gtf_compiled(z1.float(), forcing.float(), alpha, single, None, clipped)
    torch.testing.assert_close(low.double(), loop(z1, forcing, alpha, params, None, clipped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [1, 3])
def test_the_free_run_keeps_the_last_of_every_few_states(every: int) -> None:
    z1, _, alpha, params, inputs = draw(2, 3, 11, 3, 20)
    whole = loop(z1, None, alpha, params, inputs, True)
    found = free_compiled(z1, params, 11, inputs, True, every)
    torch.testing.assert_close(found, whole[:, every - 1 :: every], rtol=1e-12, atol=1e-12)


def test_checklist_8_12_missing_signals_without_weight_do_not_count() -> None:
    z1, forcing, alpha, params, _ = draw(1, 5, 9, 3, 20)
    gone = torch.rand(alpha.shape) < 0.3
    alpha, forcing = alpha.masked_fill(gone, 0.0), forcing.masked_fill(gone, float("nan"))
    expected = loop(z1, forcing, alpha, params, None, True)
    torch.testing.assert_close(gtf_compiled(z1, forcing, alpha, params, None, True), expected, rtol=1e-12, atol=1e-12)


def test_a_state_that_is_no_number_stays_visible_and_in_its_sample() -> None:
    z1, forcing, alpha, params, _ = draw(1, 6, 4, 3, 20)
    clean = gtf_compiled(z1, forcing, alpha, params, None, True)
    z1[0, 2, 1] = float("nan")
    found = gtf_compiled(z1, forcing, alpha, params, None, True)
    assert found[0, 0, 2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[:, :, others], clean[:, :, others])


def test_infinite_values_make_no_nan_of_lanes_without_a_hidden_unit() -> None:
    z1, _, alpha, params, _ = draw(1, 1, 1, 1, 17)
    params, alpha = Shallow(*(part.abs().requires_grad_() for part in params)), torch.zeros_like(alpha)
    z1 = torch.full_like(z1, torch.inf).requires_grad_()
    found = gtf_compiled(z1, None, alpha, params, None, False)
    assert found.item() == torch.inf
    (debt,) = torch.autograd.grad(found, z1, torch.full_like(found, torch.inf))
    assert debt.item() == torch.inf


@pytest.mark.parametrize("latent", [5, 31])
def test_a_sample_alone_has_the_bits_that_it_has_in_a_batch(latent: int) -> None:
    z1, forcing, alpha, params, inputs = draw(1, 21, 6, latent, 35)
    whole = gtf_compiled(z1, forcing, alpha, params, inputs, True)
    for row in (0, 7, 20):
        one = slice(row, row + 1)
        alone = gtf_compiled(z1[:, one], forcing[:, :, one], alpha[:, :, one], params, inputs[:, :, one], True)
        assert torch.equal(alone, whole[:, :, one])


def test_threads_change_no_bit(two_threads: None) -> None:
    z1, forcing, alpha, params, _ = draw(2, 37, 6, 3, 40)
    leaves = [part.requires_grad_() for part in (z1, *params)]
    assert module._plan(z1, params.W1, 6, alpha, True, 1)[8] == 2

    def both() -> list[Tensor]:
        found = gtf_compiled(z1, forcing, alpha, params, None, True)
        return [found, *torch.autograd.grad(found.square().sum(), leaves)]

    several = both()
    torch.set_num_threads(1)
    assert all(torch.equal(left, right) for left, right in zip(several, both(), strict=True))


def test_inputs_need_not_be_contiguous() -> None:
    z1, forcing, alpha, params, _ = draw(2, 6, 5, 4, 12)
    loose = Shallow(*(part.transpose(-1, -2).contiguous().transpose(-1, -2) for part in params))
    spread = forcing.transpose(1, 2).contiguous().transpose(1, 2)
    assert not spread.is_contiguous()
    found = gtf_compiled(z1, spread, alpha.transpose(1, 2).contiguous().transpose(1, 2), loose, None, True)
    assert torch.equal(found, gtf_compiled(z1, forcing, alpha, params, None, True))


def test_a_second_derivative_is_refused() -> None:
    z1, forcing, alpha, params, _ = draw(1, 2, 3, 2, 4)
    found = gtf_compiled(z1.requires_grad_(), forcing, alpha, params, None, False)
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(found.sum(), z1, create_graph=True)


def test_reasons_name_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    z1, _, _, params, _ = draw(1, 1, 1, 1, 1)
    assert "z1 is on meta" in (unavailable(z1.to("meta"), params) or "")
    assert "float16" in (unavailable(z1.half(), params) or "")
    assert "the same everywhere" in (unavailable(z1.float(), params) or "")
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert unavailable(z1, params) == "TSFORGE_COMPILED=off"
