"""S4 and S4D: structured state space layers as a forecaster.

Gu, Goel, Re (2022), Efficiently Modeling Long Sequences with Structured State Spaces, ICLR, arXiv 2111.00396 (Eq. 3-6,
App. C); Gu, Gupta, Goel, Re (2022), On the Parameterization and Initialization of Diagonal State Space Models, NeurIPS,
arXiv 2206.11893 (Sec. 3-4); linear recurrent unit: Orvieto et al. (2023), ICML, arXiv 2303.06349 (Sec. 3).

Deviations: the forecaster is a direct head on the last feature beside a closed-form linear map, not the masked sequence
of the paper's experiments (``head: masked``); kernels by two-level products instead of Cauchy sums; C is stored instead
of C~; the low-rank term is tied (P = Q), so A stays stable; LayerNorm, no bidirectional layers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tsforge.core.config import tunable
from tsforge.core.errors import ConfigError
from tsforge.layers.ssm import SSM, DiagonalSSM, LowRankSSM, UnitarySSM
from tsforge.models._ssm_forecaster import SSMForecaster, SSMForecasterConfig
from tsforge.models.registry import register


class S4Config(SSMForecasterConfig):
    """Settings of S4."""

    name: Literal["s4"] = "s4"
    kernel: Literal["s4d", "s4", "lru"] = tunable("s4d", choices=["s4d", "s4", "lru"])
    """Diagonal, diagonal plus low rank, or the linear recurrent unit."""
    init: Literal["auto", "lin", "inv", "legs", "lagt", "legt"] = "auto"
    """Matrix to start from: lin, inv, legs for s4d (auto: lin); legs, lagt, legt for s4 (auto: legs)."""
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    """Of s4d; s4 is bilinear."""
    n_ssm: int = 1
    """Independent (A, B), each shared by d_model / n_ssm features."""
    bandlimit: float = Field(1.0, ge=0)
    """Modes of s4d that turn by more than this share of half a cycle a step start at 0; 0 keeps aliased ones."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse settings that the kernel does not have."""
        super().model_post_init(context)
        allowed = {"s4d": ("auto", "lin", "inv", "legs"), "s4": ("auto", "legs", "lagt", "legt"), "lru": ("auto",)}
        if self.init not in allowed[self.kernel]:
            raise ConfigError(f"model.init: kernel {self.kernel} starts from {', '.join(allowed[self.kernel])}")
        fields = type(self).model_fields
        idle: dict[str, tuple[str, ...]] = {
            "s4d": (),
            "s4": ("discretisation", "bandlimit"),
            "lru": ("discretisation", "bandlimit", "n_ssm", "dt_min", "dt_max"),
        }
        for name in idle[self.kernel]:
            if getattr(self, name) != fields[name].default:
                raise ConfigError(f"model.{name} has no effect with kernel {self.kernel}")
        if self.missing == "skip" and (self.kernel != "s4d" or self.discretisation != "zoh"):
            raise ConfigError("model.missing: irregular steps need kernel s4d with discretisation zoh")


@register("s4")
class S4(SSMForecaster[S4Config]):
    """Diagonal or low-rank state space layers."""

    config_class = S4Config
    source = (
        "Gu, Goel, Re (2022), Efficiently Modeling Long Sequences with Structured State Spaces, ICLR, arXiv 2111.00396"
    )
    test_configs = (
        {"d_model": 16, "d_state": 16},
        {"d_model": 16, "d_state": 8, "kernel": "s4", "mixing": "mixed", "head": "direct", "num_channels": 2},
        {"d_model": 16, "d_state": 8, "normalisation": "none", "head": "rollout", "num_layers": 1, "n_ssm": 4},
        {"d_model": 16, "d_state": 8, "missing": "skip", "normalisation": "none", "init": "legs"},
        {"d_model": 16, "d_state": 8, "patch_length": 4, "kernel": "lru", "normalisation": "last", "skip": "learned"},
    )

    def make_layer(self, index: int, dt_range: tuple[float, float]) -> SSM:
        """Return the layer of block ``index``."""
        config, name = self.config, f"s4.{index}"
        size = (config.d_model, config.d_state, config.num_channels)
        if config.kernel == "lru":
            return UnitarySSM(*size, name=name)
        if config.kernel == "s4":
            init = "legs" if config.init == "auto" else config.init
            return LowRankSSM(*size, name=name, init=init, dt_range=dt_range, copies=config.n_ssm)  # type: ignore[arg-type]
        return DiagonalSSM(
            *size,
            name=name,
            init="lin" if config.init == "auto" else config.init,  # type: ignore[arg-type]
            dt_range=dt_range,
            discretisation=config.discretisation,
            copies=config.n_ssm,
            bandlimit=config.bandlimit,
        )
