"""What a fit is refused for without its data: settings that do not go together; and held-out series it cannot forecast.

The first are checked before a fit reads data, by its ``--dry-run`` and when the config of a backtest is made. Not when
that of a fit is made: a study may search the setting that does not go with the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsforge.app.auto_candidates import check_wanted
from tsforge.core.errors import ConfigError
from tsforge.layers.scaling import SERIES_KINDS
from tsforge.models.auto import AutoConfig
from tsforge.models.registry import MODELS
from tsforge.models.temporal import TemporalConfig
from tsforge.network import ForecastNetwork

if TYPE_CHECKING:
    from tsforge.app.fit import FitConfig


def check_settings(config: FitConfig) -> None:
    """Refuse a scaling that the model does not support, and what has no meaning with it.

    Raises:
        ConfigError: as it says; candidates of ``model=auto`` that are no models; bins that do not fit the window
            or cannot train their model.
    """
    model, kind = config.model, config.scaling.kind
    allowed = MODELS.get(model.name).capabilities_of(model).scaling
    if kind not in ("auto", *allowed):
        raise ConfigError(f"model '{model.name}' does not support scaling '{kind}'; use one of {', '.join(allowed)}")
    if isinstance(model, AutoConfig):
        _check_auto(config, model)
    if isinstance(model, TemporalConfig):
        model.check_member()
        _check_widths(config, model)
    if config.log_graphs and not hasattr(MODELS.get(model.name), "evolution"):
        raise ConfigError(
            f"log_graphs={config.log_graphs} has no effect: model '{model.name}' with these settings learns no graph"
        )


def _check_auto(config: FitConfig, model: AutoConfig) -> None:
    check_wanted(model)
    if config.entities.watch != "seen_valid":
        raise ConfigError(f"entities.watch={config.entities.watch} has no effect with model=auto; leave it out")
    if config.log_graphs or config.warm_start.artifact is not None:
        name = "log_graphs" if config.log_graphs else "warm_start.artifact"
        raise ConfigError(f"{name} has no effect with model=auto, which tries many models; leave it out")


def _check_widths(config: FitConfig, model: TemporalConfig) -> None:
    length, horizon = config.window.context_length, config.window.horizon
    wrong = [width for width in model.widths or () if horizon % width or width > length]
    if wrong:
        raise ConfigError(
            f"model.widths: bins of {', '.join(map(str, wrong))} steps do not fill window.horizon={horizon} or exceed "
            f"window.context_length={length}; give divisors of the horizon, or leave widths out"
        )


def check_held_out(network: ForecastNetwork, held_out: tuple[str, ...]) -> None:
    """Refuse what cannot forecast a series that was not there in the fit.

    Raises:
        ConfigError: the model couples series, or its scaling knows those of the fit only.
    """
    if not held_out:
        return
    name, can = network.config.model.name, network.capabilities
    if can.rows_coupled:
        raise ConfigError(
            f"model '{name}' couples the series of a panel: its forecast of one depends on which others are there, so "
            f"leaving {len(held_out)} out of the fit would be another panel; set entities.held_out=0"
        )
    if network.needs_known_series:
        others = [kind for kind in can.scaling if kind not in SERIES_KINDS]
        raise ConfigError(
            f"scaling '{network.scaling}' rests on the training span of each series and knows none of the "
            f"{len(held_out)} held-out ones; choose scaling.kind={' or '.join(others) or 'of another model'}"
        )
