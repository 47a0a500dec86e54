"""What a fitted Chimera shows: how long its heads remember, how far they reach, and how variates move each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch
from tsforge.layers.chimera_block import ChimeraStack
from tsforge.layers.chimera_heads import ChimeraHead

if TYPE_CHECKING:
    from tsforge.models.chimera import Chimera

_MOST_VARIATES = 64  # of a coupling matrix that is computed and stored
_DIRECTIONS = ("forward", "backward")


def timescale_records(stack: ChimeraStack, patch: int) -> list[dict[str, Any]]:
    """Return one record for each layer, head and direction, at the steps of zero codes (softplus of the dt bias).

    ``memory`` is 1 / (dt1 |Re A1|) in grid steps and ``reach`` 1 / (dt2 |Re A4|) in variates, after which a state has
    decayed to 1 / e: 10, 50 and 90 % quantiles over channels and states. ``period`` is the median of
    2 pi / (dt1 |Im A1|) in grid steps over the states that turn. ``into_time`` and ``into_variates`` are mean shares
    of A2 and A3 in what stability allows (|A2 / Re A1| and |A3 / Re A4|). What a head does not have is None.
    """
    return [
        {"layer": layer, "head": name, "direction": _DIRECTIONS[group], **_record(head, group, patch)}
        for layer, block in enumerate(stack.each())
        for name, head in block.layer.each()
        for group in range(head.options.groups)
    ]


def _record(head: ChimeraHead, group: int, patch: int) -> dict[str, float | None]:
    scales = head.scales()
    found: dict[str, float | None] = _quantiles("memory", scales.memory[group] * patch)
    turning = None if scales.turn is None else scales.turn[group][scales.turn[group] > 0]
    found["period"] = float(2 * math.pi * patch / turning.median()) if turning is not None and len(turning) else None
    found |= _quantiles("reach", None if scales.reach is None else scales.reach[group])
    for name in ("into_time", "into_variates"):
        share = getattr(scales, name)
        found[name] = None if share is None else float(share[group].mean())
    return found


def _quantiles(name: str, values: Tensor | None) -> dict[str, float | None]:
    """Return the 10, 50 and 90 % quantiles under ``name`` with and without a suffix; None without values."""
    keys = (f"{name}_p10", name, f"{name}_p90")
    if values is None:
        return dict.fromkeys(keys)
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=values.device)
    return dict(zip(keys, torch.quantile(values.double().flatten(), levels).tolist(), strict=True))


def coupling_matrix(model: Chimera) -> Tensor:
    """Return [N, N]: how much the last value of variate i moves the forecast of variate j, in their deviations.

    Entry (i, j) is the root mean square over the horizon of the change of the network's forecast of j when the last
    observed value of i is raised from 0 to 1, in a window that is 0 otherwise (normalised units, covariates 0). The
    linear map, which is another's business only through shared weights, is left out.
    """
    spec, like = model.spec, model.embed.weight
    count, length = spec.num_variates, spec.context_length
    context = like.new_zeros(count + 1, length, count)
    index = torch.arange(count, device=like.device)
    context[index, -1, index] = 1.0

    def zeros(*shape: int) -> Tensor | None:
        return like.new_zeros(count + 1, *shape) if shape[-1] else None

    batch = Batch(
        context,
        torch.ones_like(context, dtype=torch.bool),
        past=zeros(length, spec.num_past),
        known=zeros(length + spec.horizon, spec.num_known),
        static=zeros(spec.num_static),
    )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        moved = model.residual(batch, context, torch.ones_like(context[:, :1]))[..., 0]  # [N + 1, H, N]
    model.train(was_training)
    return (moved[:-1] - moved[-1]).square().mean(1).sqrt()


def coupling_records(model: Chimera) -> list[dict[str, Any]]:
    """Return the coupling matrix as records ``source``, ``variate`` (the one moved), ``effect``; none beyond 64."""
    if not 1 < model.spec.num_variates <= _MOST_VARIATES:
        return []
    return [
        {"source": i, "variate": j, "effect": effect}
        for i, row in enumerate(coupling_matrix(model).tolist())
        for j, effect in enumerate(row)
    ]
