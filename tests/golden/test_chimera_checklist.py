"""What Chimera learns: point 5.11 of its verification checklist.

Thresholds of (i) are the specification's, those of (ii) and (iii) its proposals, which hold. The other points stand
beside the code they check, in ``tests/unit/ops`` (the scan), ``tests/unit/layers`` (``test_chimera_recurrence.py``,
``test_chimera_causality.py``, ``test_chimera_layers.py``) and ``tests/unit/models`` (``test_chimera.py``,
``test_chimera_streaming.py``); each test there names its point.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.layers.chimera import Chimera2DSSM
from tsforge.layers.chimera_heads import ChimeraOptions
from tsforge.metrics.anomaly import auc_roc
from tsforge.models.chimera import Chimera, ChimeraConfig

VARIATES, STEPS, BATCH = 5, 64, 16


def planted(count: int, generator: torch.Generator) -> Tensor:
    """Return series (count, N, T) of x[v, t] = .6 x[v, t-1] + .3 x[v-1, t-1] + e, noise variance 1."""
    noise = torch.randn(count, VARIATES, STEPS + 20, generator=generator)
    x, columns = torch.zeros(count, VARIATES), []
    for t in range(STEPS + 20):
        above = torch.cat([torch.zeros(count, 1), x[:, :-1]], dim=1)
        x = 0.6 * x + 0.3 * above + noise[:, :, t]
        columns.append(x)
    return torch.stack(columns[20:], dim=-1)


class OneStep(nn.Module):
    """Value -> 8 channels -> one 2-D layer along one direction -> forecast of the next value."""

    def __init__(self, options: ChimeraOptions) -> None:
        super().__init__()
        self.into, self.layer, self.out = nn.Linear(1, 8), Chimera2DSSM(8, options), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layer(self.into(x.unsqueeze(-1))).y)
        return y.squeeze(-1)


def one_step_error(coupling: str) -> float:
    """Return the mean squared one-step error on the variates that have a neighbour, after 400 steps."""
    torch.manual_seed(0)
    options = ChimeraOptions(
        states=4, heads="trend", directions="forward", coupling=coupling, dt_trend=(1e-2, 1.0), dt_variate=(1e-1, 2.0)
    )
    model = OneStep(options)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(400):
        if step == 300:
            optimizer.param_groups[0]["lr"] = 2e-3
        x = planted(BATCH, generator)
        optimizer.zero_grad()
        (model(x)[..., :-1] - x[..., 1:]).square().mean().backward()
        optimizer.step()
    x = planted(512, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((model(x)[:, 1:, :-1] - x[:, 1:, 1:]).square().mean())


@pytest.mark.slow
def test_checklist_5_11_i_coupling_learns_a_planted_process() -> None:
    """Noise variance 1 is the floor; the best univariate linear predictor of 8 lags reaches 1.169."""
    assert one_step_error("scan") < 1.05
    assert one_step_error("none") > 1.10


# ---- (ii)


def observed(context: Tensor) -> Batch:
    return Batch(context, torch.ones_like(context, dtype=torch.bool))


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return contexts and continuations (count, 96, 1) of a sine of period 24 in any phase."""
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    x = torch.sin(2 * math.pi * torch.arange(192).view(1, -1, 1) / 24 + phase)
    return x[:, :96], x[:, 96:]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["direct", "closed_loop"])
def test_checklist_5_11_ii_a_sine_is_continued_for_96_steps(decoder: str) -> None:
    """The variance of the sine is 0.5; the closed loop runs over 12 patches."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_model": 16, "num_layers": 1, "dropout": 0.0, "skip": "none", "normalisation": "none"}
    config = ChimeraConfig(decoder=decoder, patch_length=8, **settings)
    model = Chimera(config, DataSpec(context_length=96, horizon=96, num_variates=1)).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=120)
    for _ in range(120):
        context, target = waves(32, generator)
        found = model(observed(context))
        loss = (found.raw[..., 0] - target).square().mean() + sum((found.aux_losses or {}).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    context, target = waves(256, torch.Generator().manual_seed(9))
    with torch.no_grad():
        error = float((model.eval()(observed(context)).raw[..., 0] - target).square().mean())
    assert error < 1e-2


# ---- (iii)


def followers(count: int, generator: torch.Generator, *, broken: bool = False) -> Tensor:
    """Return series (count, 33, 3): an AR(1) and two that repeat the one before a step later, with noise.

    Broken: the third follows another, unseen chain; by itself it looks as always.
    """
    noise = torch.randn(2, count, 3, 53, generator=generator)
    chains = []
    for e in noise:
        x, rows = torch.zeros(count, 3), []
        for t in range(53):
            x = torch.stack([0.8 * x[:, 0], x[:, 0], x[:, 1]], 1) + e[..., t] * torch.tensor([0.6, 0.3, 0.3])
            rows.append(x)
        chains.append(torch.stack(rows[20:], dim=1))
    if broken:
        chains[0][..., 2] = chains[1][..., 2]
    return chains[0]


def recognised(coupling: str) -> dict[str, float]:
    """Return the AUROC of windows in which the third variate stopped following, by forecast and by reconstruction."""
    torch.manual_seed(0)
    config = ChimeraConfig(
        d_model=16,
        d_state=4,
        num_layers=1,
        coupling=coupling,
        reconstruct=True,
        decoder="closed_loop",
        normalisation="none",
        dropout=0.0,
        patch_length=1,
        variate_embedding=True,
    )
    model = Chimera(config, DataSpec(context_length=32, horizon=1, num_variates=3)).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(250):
        x = followers(16, generator)
        found = model(observed(x[:, :32]))
        assert found.context_raw is not None
        loss = (found.raw[..., 0] - x[:, 32:]).square().mean() + (found.context_raw[..., 0] - x[:, :32]).square().mean()
        optimizer.zero_grad()
        (loss + sum((found.aux_losses or {}).values())).backward()
        optimizer.step()
    model.eval()
    scores: dict[str, list[Tensor]] = {"forecast": [], "reconstruction": []}
    for broken in (False, True):
        batch = observed(followers(256, torch.Generator().manual_seed(5 + broken), broken=broken)[:, :32])
        with torch.no_grad():
            passed, _ = model._pass(batch, batch.context)
            ahead = model.head(model.stack.norm(passed.x))[:, 2, :-1, 0]  # the next value, at every step
            scores["forecast"].append((ahead - batch.context[:, 1:, 2]).square().mean(1))
            scores["reconstruction"].append((model.reconstruct(batch) - batch.context)[..., 2].square().mean(1))
    labels = np.arange(512) >= 256
    return {name: auc_roc(labels, torch.cat(parts).double().numpy()) for name, parts in scores.items()}


@pytest.mark.slow
def test_checklist_5_11_iii_a_variate_that_stops_following_its_neighbour_is_found_by_the_coupling() -> None:
    coupled, uncoupled = recognised("scan"), recognised("none")
    assert min(coupled.values()) > 0.95
    assert max(uncoupled.values()) < 0.65
