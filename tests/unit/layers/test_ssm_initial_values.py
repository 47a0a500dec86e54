"""State space layers: initial values by hand, and the settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from ssm_layer_cases import build

from tsforge.core.errors import ConfigError
from tsforge.layers.ssm import diagonal_init, timescales

# ---- initial values


def test_timescales_are_uniform_in_the_logarithm() -> None:
    torch.manual_seed(0)
    drawn_values = timescales(20_000, 1e-3, 1e-1)
    assert drawn_values.shape == (20_000,)
    assert math.log(1e-3) <= float(drawn_values.min()) < float(drawn_values.max()) <= math.log(1e-1)
    expected = torch.linspace(math.log(1e-3), math.log(1e-1), 11)
    torch.testing.assert_close(torch.quantile(drawn_values, torch.linspace(0, 1, 11)), expected, atol=0.05, rtol=0)
    assert timescales(3, 0.5, 0.5).exp().tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("span", [(0.0, 0.1), (-1.0, 0.1), (0.2, 0.1), (0.1, 2.0)])
def test_time_scales_out_of_range_are_refused(span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match=r"dt_min .* and dt_max .* must satisfy 0 < dt_min <= dt_max <= 1"):
        timescales(4, *span)
    for kind in ("zoh", "s4", "lssl"):
        with pytest.raises(ConfigError, match="dt_min"):
            build(kind, dt_range=span)


def test_diagonal_starts_by_hand() -> None:
    """N = 4, two modes: Eq. 8 and 9 of arXiv 2206.11893."""
    for kind, decay, frequency in (
        ("lin", [0.5, 0.5], [0.0, math.pi]),
        ("inv", [0.5, 0.5], [4 / math.pi * 3, 4 / math.pi / 3]),
        ("real", [1.0, 2.0], [0.0, 0.0]),
    ):
        found = diagonal_init(kind, 4)  # type: ignore[arg-type]
        assert found[0].tolist() == pytest.approx(decay)
        assert found[1].tolist() == pytest.approx(frequency)
        assert found[2].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_the_legs_start_is_the_normal_part_of_the_matrix() -> None:
    """B' exp(t S) B with S = A + P P' has the modes as exponents and |B_n|^2 as their weights."""
    n = np.arange(16)
    root = np.sqrt(2 * n + 1.0)
    normal = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0) + np.outer(root, root) / 2
    decay, frequency, weight = (part.numpy() for part in diagonal_init("legs", 16))
    np.testing.assert_allclose(decay, 0.5, atol=1e-12)
    size = (weight**2).sum(-1)
    for t in (0.0, 0.1, 1.0):
        found = 2.0 * (size * np.exp(-decay * t) * np.cos(frequency * t)).sum()
        assert found == pytest.approx(root @ expm(t * normal) @ root, abs=1e-9)


def test_aliased_modes_start_at_zero() -> None:
    layer = build("zoh", features=8, states=64, dt_range=(0.01, 1.0))
    turn = layer.log_dt.exp()[:, None] * layer.frequency.abs()  # type: ignore[operator]
    silent = (layer.C[0] == 0.0).all(-1)  # type: ignore[index]
    assert torch.equal(silent, turn > math.pi)
    assert 0 < int(silent.sum()) < silent.numel()
    half = build("zoh", features=8, states=64, dt_range=(0.01, 1.0), bandlimit=0.5)
    assert torch.equal((half.C[0] == 0.0).all(-1), turn > 0.5 * math.pi)  # type: ignore[index]
    every = build("zoh", features=8, states=64, dt_range=(0.01, 1.0), bandlimit=0.0)
    assert bool(every.C.any(-1).all())  # type: ignore[operator]


def test_ring_of_the_linear_recurrent_unit() -> None:
    layer = build("lru", features=64, states=64, ring=(0.6, 0.9))
    log_re, log_im = (part.detach() for part in layer.eigenvalues())  # type: ignore[operator]
    radius = log_re.exp()
    assert 0.6 - 1e-6 <= float(radius.min()) < float(radius.max()) <= 0.9 + 1e-6
    # uniform over the area of the ring: the squared radius is uniform
    middle = radius.square().median()
    assert float(middle) == pytest.approx((0.6**2 + 0.9**2) / 2, abs=0.02)
    assert bool(((log_im >= 0.0) & (log_im <= math.pi)).all())
    gain = layer.B.detach()[..., 0].double()  # type: ignore[operator]
    torch.testing.assert_close(gain, (1 - radius.square()).sqrt(), atol=1e-6, rtol=1e-5)
    assert "log_dt" not in dict(layer.named_parameters())


def test_fixed_structured_layers_train_only_their_readout() -> None:
    layer = build("lssl", trains_a=False)
    assert set(dict(layer.named_parameters())) == {"C", "D"}
    assert {"log_dt", "tri_diagonal", "shift", "left", "right", "b"} <= set(dict(layer.named_buffers()))
    trained = build("lssl")
    torch.testing.assert_close(layer.kernel(30), trained.kernel(30))  # buffers hold what parameters would
    assert len(list(trained.parameters())) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("zoh", states=7), "d_state is 7; it must be even"),
        (lambda: build("s4", states=0), "d_state is 0"),
        (lambda: build("lssl", states=3), "d_state is 3"),
        (lambda: build("zoh", features=0), "needs features and channels, got 0 and 1"),
        (lambda: build("lssl", channels=0), "needs features and channels, got 4 and 0"),
        (lambda: build("zoh", copies=3), "n_ssm is 3; it must divide d_model, 4"),
        (lambda: build("s4", copies=0), "n_ssm is 0; it must divide d_model, 4"),
        (lambda: build("lru", ring=(0.9, 0.5)), "ring of eigenvalues"),
        (lambda: build("lru", ring=(0.5, 1.0)), "ring of eigenvalues"),
        (lambda: build("lru", ring=(-0.1, 0.5)), "ring of eigenvalues"),
        (lambda: build("lssl", alpha=0.4), "alpha is 0.4"),
        (lambda: build("lssl", alpha=1.1), "alpha is 1.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
