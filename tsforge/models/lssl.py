"""LSSL: linear state space layers with a structured dense matrix, as a forecaster.

Gu, Johnson, Goel, Saab, Dao, Rudra, Re (2021), Combining Recurrent, Convolutional, and Continuous-time Models with
Linear State-Space Layers, NeurIPS, arXiv 2110.13985 (Sec. 2-4, App. B, E.2).

Deviations: the Krylov function is a two-level matrix product, not the near-linear algorithm of Theorem 2, which breaks
down in floating point; the discretisation is one dense solve in float64 instead of a tridiagonal routine; P and Q are
kept positive, and a layer that has become unstable is refused when it is evaluated. The forecaster around the layers is
that of ``s4``.
"""

from __future__ import annotations

from typing import Literal

from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.ssm import SSM, StructuredSSM
from tsforge.models._ssm_forecaster import SSMForecaster, SSMForecasterConfig
from tsforge.models.registry import register


class LSSLConfig(SSMForecasterConfig):
    """Settings of LSSL."""

    name: Literal["lssl"] = "lssl"
    init: Literal["legs", "lagt", "legt"] = tunable("legs", choices=["legs", "lagt", "legt"])
    """HiPPO matrix to start from."""
    fixed: bool = False
    """LSSL-fixed: A, B and the step sizes keep their initial values."""
    shares_a: bool = True
    """One A for all features, or one each."""
    alpha: float = 0.5
    """Of the generalised bilinear transform: 0.5 bilinear, 1 backward Euler."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse what a dense system with one step size cannot do."""
        super().model_post_init(context)
        if self.missing == "skip":
            raise ConfigError("model.missing: irregular steps need model s4 with kernel s4d")


@register("lssl")
class LSSL(SSMForecaster[LSSLConfig]):
    """Dense state space layers from the HiPPO family, trained or fixed."""

    config_class = LSSLConfig
    source = (
        "Gu, Johnson, Goel, Saab, Dao, Rudra, Re (2021), Combining Recurrent, Convolutional, and Continuous-time "
        "Models with Linear State-Space Layers, NeurIPS, arXiv 2110.13985"
    )
    test_configs = (
        {"d_model": 16, "d_state": 16},
        {"d_model": 16, "d_state": 8, "init": "lagt", "shares_a": False, "normalisation": "none", "num_channels": 2},
        {"d_model": 16, "d_state": 8, "fixed": True, "init": "legt", "mixing": "mixed", "skip": "none", "alpha": 1.0},
    )

    def make_layer(self, index: int, dt_range: tuple[float, float]) -> SSM:
        """Return the layer of block ``index``."""
        config = self.config
        return StructuredSSM(
            config.d_model,
            config.d_state,
            config.num_channels,
            name=f"lssl.{index}",
            init=config.init,
            dt_range=dt_range,
            trains_a=not config.fixed,
            shares_a=config.shares_a,
            alpha=config.alpha,
        )
