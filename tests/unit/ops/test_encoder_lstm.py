"""The C++ kernel of encoder layer and LSTMs against plain loops, torch's own layers and autograd through them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from compiler import need_compiler
from torch import Tensor, nn

from tsforge.core.errors import ModelError
from tsforge.ops.encoder_lstm import MOST_WEIGHTS, encoder_lstm, encoder_weights, lstm_weights, unavailable

# windows, variates, features, feed-forward width, horizon, with encoder, with sequencer: blocks with rests, chunks of
# hidden units with rests, one of everything
SHAPES = [
    (1, 1, 1, 1, 1, True, True),
    (37, 3, 7, 128, 14, True, True),
    (5, 1, 4, 33, 3, True, True),
    (70, 4, 5, 9, 6, False, True),
    (33, 3, 6, 31, 5, True, False),
    (2, 2, 3, 5, 1, False, False),
    (65, 5, 9, 65, 2, True, True),
]
Shape = tuple[int, int, int, int, int, bool, bool]


@pytest.fixture(autouse=True)
def _available() -> None:
    need_compiler()
    assert unavailable(torch.zeros(1), 1) is None


class Case(NamedTuple):
    rows: Tensor
    encoder: nn.TransformerEncoderLayer | None
    gate: nn.LSTM
    sequencer: nn.LSTM | None

    @property
    def leaves(self) -> list[Tensor]:
        parts = [part for part in self[1:] if part is not None]
        return [self.rows, *(value for part in parts for value in part.parameters())]

    def kernel(self, dropout: float = 0.0) -> Tensor:
        encoder = None if self.encoder is None else encoder_weights(self.encoder)
        sequencer = None if self.sequencer is None else lstm_weights(self.sequencer)
        return encoder_lstm(self.rows, encoder, lstm_weights(self.gate), sequencer, dropout=dropout)

    def layers(self, dropout: float = 0.0) -> Tensor:
        """What the model does without the kernel, in training."""
        rows = self.rows if self.encoder is None else self.encoder(self.rows)
        ahead = nn.functional.dropout(self.gate(rows)[0].transpose(1, 2), dropout)
        if self.sequencer is None:
            return ahead
        return nn.functional.dropout(self.sequencer(ahead)[0], dropout) + ahead


def draw(shape: Shape, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Case:
    windows, variates, width, hidden, horizon, encoder, sequencer = shape
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(width, 1, hidden, dropout, batch_first=True) if encoder else None
    gate = nn.LSTM(width, horizon, batch_first=True)
    second = nn.LSTM(variates, variates, batch_first=True) if sequencer else None
    for part in (layer, gate, second):
        for value in [] if part is None else part.to(dtype).parameters():
            nn.init.normal_(value, std=0.5)
    return Case(torch.randn(windows, variates, width, dtype=dtype, requires_grad=True), layer, gate, second)


def in_loops(case: Case) -> np.ndarray:
    """The equations of the module's docstring for one window and one number after another."""
    return np.stack([_window(row, case) for row in case.rows.detach().double().numpy()])


def _window(x: np.ndarray, case: Case) -> np.ndarray:
    variates, width = x.shape
    if case.encoder is not None:
        w = {name: value.detach().double().numpy() for name, value in encoder_weights(case.encoder)._asdict().items()}
        queries, keys, values = (
            x @ w["in_w"][k * width : (k + 1) * width].T + w["in_b"][k * width : (k + 1) * width] for k in range(3)
        )
        attended = np.zeros_like(x)
        for a in range(variates):
            scores = np.array([queries[a] @ keys[b] / np.sqrt(width) for b in range(variates)])
            shares = np.exp(scores) / np.exp(scores).sum()
            for b in range(variates):
                attended[a] += shares[b] * values[b]
        first = _norm(x + attended @ w["out_w"].T + w["out_b"], w["norm1_w"], w["norm1_b"])
        wide = np.maximum(first @ w["up_w"].T + w["up_b"], 0.0)
        x = _norm(first + wide @ w["down_w"].T + w["down_b"], w["norm2_w"], w["norm2_b"])
    ahead = _lstm(x, case.gate).T
    return ahead if case.sequencer is None else _lstm(ahead, case.sequencer) + ahead


def _norm(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    spread = np.sqrt(rows.var(1, keepdims=True) + 1e-5)
    return np.asarray((rows - rows.mean(1, keepdims=True)) / spread * weight + bias)


def _lstm(rows: np.ndarray, cell: nn.LSTM) -> np.ndarray:
    input_w, state_w, input_b, state_b = (value.detach().double().numpy() for value in lstm_weights(cell))
    units = cell.hidden_size
    state, memory, found = np.zeros(units), np.zeros(units), []
    for row in rows:
        i, f, z, o = np.split(input_w @ row + input_b + state_w @ state + state_b, 4)
        memory = memory / (1 + np.exp(-f)) + np.tanh(z) / (1 + np.exp(-i))
        state = np.tanh(memory) / (1 + np.exp(-o))
        found.append(state)
    return np.stack(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_plain_loops(shape: Shape) -> None:
    case = draw(shape)
    assert np.abs(case.kernel().detach().numpy() - in_loops(case)).max() <= 1e-12
    lower = draw(shape, torch.float32)
    assert np.abs(lower.kernel().detach().numpy() - in_loops(lower)).max() <= 3e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_autograd_through_the_layers(shape: Shape) -> None:
    for dtype, allowed in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        case = draw(shape, dtype)
        weights = torch.randn_like(case.layers())
        expected = torch.autograd.grad((case.layers() * weights).sum(), case.leaves)
        found = torch.autograd.grad((case.kernel() * weights).sum(), case.leaves)
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).abs().max()) <= allowed * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("shape", [(3, 2, 3, 35, 2, True, True), (2, 3, 2, 4, 3, True, False)])
def test_both_passes_drop_the_same(shape: Shape) -> None:
    case = draw(shape)

    def repeated(*leaves: Tensor) -> Tensor:
        torch.manual_seed(7)
        return case.kernel(dropout=0.3)

    assert torch.autograd.gradcheck(repeated, case.leaves, eps=1e-6, atol=1e-6)


def test_dropout_is_repeated_by_the_seed_and_differs_between_windows_and_calls() -> None:
    shape = (4000, 2, 3, 1, 5, False, False)  # y = drop(h')
    case = draw(shape)
    one = case.rows.detach()[:1].expand(4000, 2, 3)
    case = case._replace(rows=one)
    plain = case.kernel()
    torch.manual_seed(3)
    first, second = case.kernel(dropout=0.2), case.kernel(dropout=0.2)
    torch.manual_seed(3)
    assert torch.equal(case.kernel(dropout=0.2), first)
    assert not torch.equal(first, second)
    kept = first != 0
    torch.testing.assert_close(first[kept], plain[kept] / 0.8)
    for found in (kept, kept & (second != 0)):  # calls are independent of each other
        rate = 0.8 if found is kept else 0.64
        by_cell = found.double().mean(0)  # [H, V]: no cell is dropped more often
        assert float((by_cell - rate).abs().max()) < 5 * (rate * (1 - rate) / 4000) ** 0.5
    pairs = (kept[1:] & kept[:-1]).double().mean()  # nor do neighbours drop together
    assert abs(float(pairs) - 0.64) < 5 * (0.64 * 0.36 / kept[1:].numel()) ** 0.5
    cells = kept.flatten(1).double()
    shares = torch.corrcoef(cells.T).fill_diagonal_(0.0)
    assert float(shares.abs().max()) < 5 / 4000**0.5


def test_dropout_has_the_distribution_of_torchs_layers() -> None:
    shape = (20_000, 3, 4, 40, 3, True, True)
    case = draw(shape, torch.float32, dropout=0.25)
    case = case._replace(rows=case.rows.detach()[:1].expand(shape[0], 3, 4))
    ours, theirs = (found.detach().double().flatten(1) for found in (case.kernel(dropout=0.25), case.layers(0.25)))
    error = ((ours.var(0) + theirs.var(0)) / shape[0]).sqrt()
    assert float(((ours.mean(0) - theirs.mean(0)) / error).abs().max()) < 5
    fourth = [((found - found.mean(0)) ** 4).mean(0) for found in (ours, theirs)]
    spread = ((sum(fourth) - ours.var(0) ** 2 - theirs.var(0) ** 2) / shape[0]).sqrt()
    assert float(((ours.var(0) - theirs.var(0)) / spread).abs().max()) < 5


def test_threads_change_nothing(two_threads: None) -> None:
    case = draw((130, 3, 7, 40, 5, True, True), torch.float32)
    torch.manual_seed(2)
    found = case.kernel(dropout=0.1)
    gradients = torch.autograd.grad(found.sum(), case.leaves)
    torch.set_num_threads(1)
    torch.manual_seed(2)
    alone = case.kernel(dropout=0.1)
    assert torch.equal(found, alone)
    for ours, theirs in zip(gradients, torch.autograd.grad(alone.sum(), case.leaves), strict=True):
        assert torch.equal(ours, theirs)


def test_windows_do_not_meet() -> None:
    case = draw((40, 3, 4, 8, 2, True, True))
    whole = case.kernel()
    assert torch.equal(case._replace(rows=case.rows[17:18]).kernel(), whole[17:18])
    broken = case.rows.detach().clone()
    broken[5, 1, 2] = torch.nan
    found = case._replace(rows=broken).kernel()
    assert found[5].isnan().any()
    assert torch.equal(found[torch.arange(40) != 5], whole[torch.arange(40) != 5])


def test_no_windows_give_no_forecasts_and_no_gradient() -> None:
    case = draw((3, 2, 3, 4, 2, True, True))
    case = case._replace(rows=case.rows.detach()[:0].requires_grad_())
    found = case.kernel()
    assert found.shape == (0, 2, 2)
    for gradient in torch.autograd.grad(found.sum(), case.leaves):
        assert not gradient.any()


def test_large_numbers_stay_finite() -> None:
    case = draw((3, 2, 3, 4, 2, True, True), torch.float32)
    for value in case.leaves[1:]:
        value.data.mul_(200.0)
    found = case._replace(rows=case.rows.detach() * 1e6).kernel()
    assert found.isfinite().all()
    torch.testing.assert_close(found, case._replace(rows=case.rows.detach() * 1e6).layers(), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    case = draw((3, 2, 3, 4, 2, True, True))
    with pytest.raises(ModelError, match=r"gate: rows \(3, 2, 4\) need weights"):
        case._replace(rows=torch.zeros(3, 2, 4, dtype=torch.float64)).kernel()
    with pytest.raises(ModelError, match="gate: weights must be torch.float32"):
        case._replace(rows=torch.zeros(3, 2, 3)).kernel()
    with pytest.raises(ModelError, match="sequencer: rows"):
        case._replace(sequencer=case.gate).kernel()
    with pytest.raises(ModelError, match="encoder: rows"):
        assert case.encoder is not None
        weights = encoder_weights(case.encoder)._replace(norm2_b=torch.zeros(2, dtype=torch.float64))
        encoder_lstm(case.rows, weights, lstm_weights(case.gate), None)
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(case.kernel().sum(), case.rows, create_graph=True)


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "meta" in str(unavailable(torch.zeros(1, device="meta"), 1))
    assert "bfloat16" in str(unavailable(torch.zeros(1, dtype=torch.bfloat16), 1))
    assert "torch is faster" in str(unavailable(torch.zeros(1), MOST_WEIGHTS + 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in str(unavailable(torch.zeros(1), 1))
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert unavailable(torch.zeros(1), 1) == "TSFORGE_COMPILED=off"
