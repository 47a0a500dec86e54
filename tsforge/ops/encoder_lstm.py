"""A transformer encoder layer and two LSTMs, chained as in ReGENN, in one C++ kernel for small sizes.

For rows x [V, D] of a window (V variates, D features), with one head, LN the layer norm, drop the dropout:

    (q, k, v) = x W_in' + b_in;   a = drop(softmax(q k' / sqrt(D))) v W_out' + b_out;   x1 = LN1(x + drop(a))
    x2 = LN2(x1 + drop(drop(relu(x1 W_up' + b_up)) W_down' + b_down))
    h = LSTM over the V rows of x2, H units;   s = drop(h');   y = drop(LSTM over the H steps of s, V units) + s

Vaswani et al. (2017), NeurIPS, arXiv 1706.03762, Eq. 1 and Sec. 3.1-3.3 (the norm after the sum); Hochreiter,
Schmidhuber (1997), Neural Computation 9(8), with the gates i, f, z, o of torch in this order. Encoder and second LSTM
may be left out: x2 = x, y = s.

A window has some ten thousand multiplications here, so torch spends its time between operations. The kernel
(``csrc/encoder_lstm.cpp``) takes a window a lane through all of them, and computes a block of windows again before it
walks it back: between the passes only the rows are kept. Beyond ``MOST_WEIGHTS`` torch's matrix products win.

Deviations: what dropout keeps comes from a hash of (a number drawn from torch's generator, window, place), so it has
the same rate as torch's and is repeated by the same seed, but drops other cells than torch would.

Legend: B windows, V variates, D features, F width of the feed-forward part, H horizon.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsforge.core.errors import ModelError
from tsforge.ops import compiled

_KERNEL = "encoder_lstm"
_WORK_PER_THREAD = 1 << 19  # weights times windows; with less a thread costs more than it brings
_SEEDS = 1 << 62
MOST_WEIGHTS = 1 << 18


class EncoderWeights(NamedTuple):
    """Of the encoder layer: in_w [3 D, D], in_b [3 D], out_w [D, D], up_w [F, D], down_w [D, F], norms and biases."""

    in_w: Tensor
    in_b: Tensor
    out_w: Tensor
    out_b: Tensor
    norm1_w: Tensor
    norm1_b: Tensor
    up_w: Tensor
    up_b: Tensor
    down_w: Tensor
    down_b: Tensor
    norm2_w: Tensor
    norm2_b: Tensor


class LSTMWeights(NamedTuple):
    """Of an LSTM with K units and I inputs: input_w [4 K, I], state_w [4 K, K], both biases [4 K]."""

    input_w: Tensor
    state_w: Tensor
    input_b: Tensor
    state_b: Tensor


def encoder_weights(layer: nn.TransformerEncoderLayer) -> EncoderWeights:
    """Return the weights of torch's layer with one head, ReLU and the norm after the sum."""
    attention = layer.self_attn
    return EncoderWeights(
        *(attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias),
        *(layer.norm1.weight, layer.norm1.bias, layer.linear1.weight, layer.linear1.bias),
        *(layer.linear2.weight, layer.linear2.bias, layer.norm2.weight, layer.norm2.bias),
    )


def lstm_weights(cell: nn.Module) -> LSTMWeights:
    """Return the weights of torch's LSTM with one layer and one direction."""
    return LSTMWeights(*(getattr(cell, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))


def unavailable(rows: Tensor, weights: int) -> str | None:
    """Return why rows [B, V, D] are better not given to the kernel, or None; builds it on first use.

    Args:
        weights: how many numbers encoder and LSTMs have together.
    """
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export trace torch operations"
    if rows.device.type != "cpu":
        return f"it runs on the CPU, the rows are on {rows.device}"
    if rows.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return f"it takes float32 or float64 without autocast, got {rows.dtype}"
    if weights > MOST_WEIGHTS:
        return f"beyond {MOST_WEIGHTS:,} weights torch is faster, there are {weights:,}"
    return compiled.unavailable_reason(_KERNEL)


def encoder_lstm(
    rows: Tensor,
    encoder: EncoderWeights | None,
    gate: LSTMWeights,
    sequencer: LSTMWeights | None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return y [B, H, V] of rows [B, V, D]; differentiable once in rows and weights.

    Args:
        dropout: the rate; 0 outside training.

    Raises:
        ModelError: rows and weights do not fit; or in the backward pass, when it is asked for a graph of its own.
    """
    variates, width = rows.shape[1:]
    horizon = gate.state_w.shape[1]
    hidden = 0 if encoder is None else len(encoder.up_b)
    _check("gate", gate, horizon, width, rows)
    if sequencer is not None:
        _check("sequencer", sequencer, variates, variates, rows)
    if encoder is not None:
        wide, square, one = (hidden, width), (width, width), (width,)
        wanted = (
            (3 * width, width),
            (3 * width,),
            square,
            one,
            one,
            one,
            wide,
            (hidden,),
            (width, hidden),
            one,
            one,
            one,
        )
        _check_shapes("encoder", encoder, wanted, rows)
    seed = int(torch.randint(_SEEDS, ())) if dropout else 0
    sizes = (len(rows), variates, width, hidden, horizon, int(encoder is not None), int(sequencer is not None))
    weights = [*(encoder or ()), *gate, *(sequencer or ())]
    found: Tensor = _EncoderLSTM.apply((*sizes, seed), dropout, rows, *weights)  # type: ignore[no-untyped-call]
    return found


def _check(name: str, cell: LSTMWeights, units: int, inputs: int, rows: Tensor) -> None:
    _check_shapes(name, cell, ((4 * units, inputs), (4 * units, units), (4 * units,), (4 * units,)), rows)


def _check_shapes(name: str, given: tuple[Tensor, ...], wanted: tuple[tuple[int, ...], ...], rows: Tensor) -> None:
    shapes = tuple(tuple(part.shape) for part in given)
    if shapes != wanted:
        raise ModelError(f"{name}: rows {tuple(rows.shape)} need weights {wanted}, got {shapes}")
    if any(part.dtype != rows.dtype or part.device != rows.device for part in given):
        raise ModelError(f"{name}: weights must be {rows.dtype} on {rows.device} like the rows")


class _EncoderLSTM(torch.autograd.Function):
    """Arguments: sizes with the seed last, dropout, rows, all weights."""

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], dropout: float, rows: Tensor, *weights: Tensor) -> Tensor:
        plain = rows.resolve_neg().contiguous()
        flat = torch.cat([part.reshape(-1) for part in weights])
        threads = max(1, min(compiled.threads(), flat.numel() * sizes[0] * sizes[1] // _WORK_PER_THREAD))
        numbers = torch.tensor([*sizes[:-1], threads, sizes[-1], rows.element_size()], dtype=torch.int64)
        batch, variates, horizon = sizes[0], sizes[1], sizes[4]
        found = rows.new_empty(batch, horizon, variates)
        compiled.call(_KERNEL, "encoder_lstm_forward", numbers, float(dropout), flat, plain, found)
        ctx.save_for_backward(plain, flat)
        ctx.numbers, ctx.dropout, ctx.shapes = numbers, float(dropout), [part.shape for part in weights]
        return found

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph
            raise ModelError(
                "the compiled encoder and LSTMs have no second derivative; set TSFORGE_COMPILED=off where create_graph "
                "is needed"
            )
        rows, flat = ctx.saved_tensors
        d_rows, d_flat = torch.empty_like(rows), torch.empty_like(flat)
        given = d_found.resolve_neg().contiguous()
        compiled.call(_KERNEL, "encoder_lstm_backward", ctx.numbers, ctx.dropout, flat, rows, given, d_rows, d_flat)
        parts = torch.split(d_flat, [shape.numel() for shape in ctx.shapes])
        return None, None, d_rows, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
