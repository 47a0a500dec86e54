"""Every registered model gives on a GPU what it gives on the CPU: forecasts, gradients and the carried state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsforge.contracts.model import Recurrent
from tsforge.contracts.tensors import Batch, Observation
from tsforge.core.errors import ModelError
from tsforge.models.registry import MODELS
from tsforge.testing.generators import declared_spec, make_batch
from tsforge.testing.models import Model, build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASES = [
    pytest.param(MODELS.get(name), settings, id=f"{name}-{index}")
    for name in MODELS.names()
    for index, settings in enumerate(MODELS.get(name).test_configs)
]


def on(batch: Batch, device: str) -> Batch:
    return Batch._make(None if part is None else part.to(device) for part in batch)


def close(there: Tensor, here: Tensor, what: str) -> None:
    torch.testing.assert_close(
        there.detach().cpu(), here.detach(), rtol=2e-3, atol=2e-3, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize(("model_cls", "settings"), CASES)
def test_gpu_agrees_with_cpu(model_cls: Model, settings: dict[str, Any]) -> None:
    spec = declared_spec(model_cls.capabilities)
    here, there = (build_model(model_cls, settings, spec).to(device) for device in ("cpu", "cuda"))
    for part in (*here.modules(), *there.modules()):
        if isinstance(part, nn.RNNBase):  # cuDNN gives no gradients in evaluation mode; these have no dropout
            part.train()
    batch = make_batch(spec, gaps=0.2)
    outputs = [model(on(batch, device)).raw for model, device in ((here, "cpu"), (there, "cuda"))]
    close(outputs[1], outputs[0], "forecast")
    for output in outputs:
        if output.requires_grad:
            output.square().mean().backward()
    for (name, first), second in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), name
        if first.grad is not None and second.grad is not None:
            close(second.grad, first.grad, f"gradient of {name}")


RECURRENT = [case for case in CASES if issubclass(case.values[0], Recurrent)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("model_cls", "settings"), RECURRENT)
def test_a_state_carried_on_a_gpu_agrees(model_cls: Model, settings: dict[str, Any]) -> None:
    spec = declared_spec(model_cls.capabilities)
    found = []
    for device in ("cpu", "cuda"):
        model = build_model(model_cls, settings, spec).to(device)
        if not model.recurrent:  # settings that carry a window of rows; the test above covers them
            with pytest.raises(ModelError):
                model.initial_state(1)  # type: ignore[operator]
            return
        batch = on(make_batch(spec, gaps=0.2), device)
        with torch.no_grad():
            row = Observation(
                values=batch.context[:, -1],
                mask=batch.context_mask[:, -1],
                past=None if batch.past is None else batch.past[:, -1],
                known=None if batch.known is None else batch.known[:, spec.context_length],
            )
            state = model.step(model.warm_up(batch), row)  # type: ignore[operator]
            known = None if batch.known is None else batch.known[:, spec.context_length :]
            found.append(model.free_run(state, known).raw)  # type: ignore[operator]
    close(found[1], found[0], "forecast from the carried state")
