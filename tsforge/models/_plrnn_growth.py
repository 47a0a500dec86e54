"""How far a free run is expected to be off: an error of one step carried along by the Jacobians of the map.

    P[0] = E,   P[n] = J(z[n-1]) P[n-1],   s[n]^2 = sigma^2 + diag(O P[n] P[n]' O')

E (M, N) is the state error of an observation that is off by its one-step error sigma in each variate by itself, O the
linear part of the observation; sigma^2 stays as the error of the observation that the run is compared with. On chaotic
data P grows, and a large error after n steps is normal; along a contracting direction it is not.

Source: own construction on the product of Jacobians along a trajectory, as in Hess et al. (2023), arXiv 2306.04406.

Legend: G members, b windows, M latent units, N variates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tsforge.layers.plrnn import PLRNNMap
from tsforge.layers.plrnn_observation import Observation
from tsforge.ops.plrnn_jacobian import jacobians

_MOST = 1 << 24  # numbers of Jacobians held at once


def error_growth(
    mapping: PLRNNMap, observation: Observation, state: Tensor, sigma: Tensor, steps: int, pushes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mean free run (b, steps, N) of all members and the deviation (b, steps, N) of its expected error.

    Args:
        mapping, observation: of all members.
        state: (G, b, M) after the context.
        sigma: (G, N) one-step errors.
        steps: how far to run.
        pushes: (G, steps, b, M) that covariates add, or None.
    """
    groups, windows, latent = state.shape
    size = max(_MOST // (groups * latent * latent), 1)
    told, spread = [], []
    for start in range(0, windows, size):
        part = slice(start, start + size)
        found = _run(mapping, observation, state[:, part], sigma, steps, None if pushes is None else pushes[:, :, part])
        told.append(found[0])
        spread.append(found[1])
    return torch.cat(told), torch.cat(spread)


def _run(
    mapping: PLRNNMap, observation: Observation, z: Tensor, sigma: Tensor, steps: int, pushes: Tensor | None
) -> tuple[Tensor, Tensor]:
    params, variates = mapping.shallow(), sigma.shape[1]
    zero = z.new_zeros(1, 1, z.shape[-1]).expand(z.shape[0], -1, -1)
    errors = torch.diag_embed(sigma)  # (G, N, N), a row for each variate that is off
    if observation.kind == "identity":
        carried = pad(errors, (0, z.shape[-1] - variates))
    else:
        carried = observation.initial(errors) - observation.initial(torch.zeros_like(errors))
    tangent = carried.mT.unsqueeze(1)  # (G, 1, M, N)
    told, variance = [], []
    for step in range(steps):
        tangent = jacobians(params, z, clipped=mapping.clipped) @ tangent
        z = mapping.step(z) if pushes is None else mapping.step(z) + pushes[:, step]
        told.append(observation.observe(z))
        columns = tangent.mT  # (G, b, N, M): errors as states
        seen = observation.observe(columns) - observation.observe(zero).unsqueeze(2)
        variance.append(seen.square().sum(2) + sigma.square().unsqueeze(1))
    return torch.stack(told, dim=2).mean(0), torch.stack(variance, dim=2).mean(0).sqrt()
