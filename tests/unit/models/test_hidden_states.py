"""The hidden state that models offer to latent scores is what enters their output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.models.registry import MODELS

SMALL = {"d_model": 8, "num_layers": 1, "dropout": 0.0}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("s4", {"d_state": 4}, 3),
    ("s4", {"d_state": 4, "mixing": "mixed"}, 1),
    ("s4", {"d_state": 4, "missing": "skip"}, 3),
    ("s4", {"d_state": 4, "patch_length": 4}, 3),
    ("lssl", {"d_state": 4}, 3),
    ("chimera", {"d_state": 2}, 3),
    ("chimera", {"d_state": 2, "variate_order": "corr"}, 3),
    ("gru", {}, 3),
]


@pytest.mark.parametrize(("name", "settings", "rows"), CASES)
def test_hidden_is_what_the_head_reads(name: str, settings: dict[str, Any], rows: int) -> None:
    torch.manual_seed(0)
    kind = MODELS.get(name)
    spec = DataSpec(context_length=12, horizon=3, num_variates=3)
    model = kind(kind.config_class.model_validate({"name": name, **SMALL, **settings}), spec).eval()
    if "variate_order" in settings:
        model.order.copy_(torch.tensor([2, 0, 1]))
    mask = torch.rand(5, 12, 3) > 0.2
    batch = Batch(torch.where(mask, torch.randn(5, 12, 3), 0.0), mask)
    read: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(batch)
        found = model.hidden(batch)
    assert found.shape == (5, rows, 8)
    entered = read[0].reshape(5, rows, 8)
    if "variate_order" in settings:
        entered = entered[:, model.order.argsort()]  # the head reads cells in the order of the coupling
    torch.testing.assert_close(found, entered)
