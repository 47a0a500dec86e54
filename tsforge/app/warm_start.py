"""Warm start: a training that begins at the weights of an earlier fit, passed through dropout if asked.

Source: the released training of ReGENN (Spadon et al. 2022, IEEE TPAMI 44(9), arXiv 2008.12833) goes from a shorter to
a longer span of an epidemic this way, with dropout of 0.2. Deviation: trained weights only. Statistics, graphs and what
else is read off the data are those of the new training span, so nothing is scaled by what it was long ago.

Weights know inputs by their place and in the units of their scaling, so an earlier fit of other or differently ordered
columns, another scaling or another publication delay is refused: shapes may agree, and the start would be a wrong one.

Weights know the data they were fitted on. An earlier fit that has seen anything at or after the end of the new training
span, or a series that is held out now, is refused: errors on the later spans would look better than they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from tsforge.app.forecast import find_artifact
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, listing
from tsforge.core.seeding import derive_seed
from tsforge.core.workspace import Workspace
from tsforge.data.config import DataConfig
from tsforge.data.grid import show_time
from tsforge.data.panel import Panel
from tsforge.data.vintages import Delays
from tsforge.network import ForecastNetwork

_ROLES = ("targets", "past", "known", "static")


class WarmStartConfig(Config):
    """Which weights a training begins at."""

    artifact: str | None = None
    """An earlier fit: an artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``; null = fresh weights."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of its weights, of every tensor, that is set to 0; the others are divided by 1 - dropout."""

    def model_post_init(self, context: object, /) -> None:
        """Refuse dropout of nothing."""
        if self.dropout and self.artifact is None:
            raise ConfigError("warm_start.dropout has no effect without warm_start.artifact, the fit to start from")


def earlier_fit(config: WarmStartConfig, workspace: Workspace) -> Artifact | None:
    """Return the artifact whose weights a fit begins at, None for fresh ones.

    Raises:
        ArtifactError: there is no such artifact. BackendError: the registry does not answer.
    """
    return None if config.artifact is None else load_artifact(find_artifact(config.artifact, workspace))


def starting_weights(network: ForecastNetwork, earlier: Artifact, dropout: float, *, seed: int) -> dict[str, Tensor]:
    """Return what a training of ``network`` begins at, named as in its ``state_dict``: parameters of the model of
    ``earlier`` after dropout, and the offset of the likelihood's parameters as it is.

    Args:
        network: to be trained; only names and shapes are read.
        earlier: fitted with the same model and sizes.
        dropout: share of the cells of every tensor that becomes 0; the others are divided by 1 - dropout.
        seed: of the choice of cells.

    Raises:
        ConfigError: another model or scaling, or tensors of other names or shapes.
    """
    model = network.config.model.name
    if earlier.model_name != model:
        raise ConfigError(f"warm_start.artifact {earlier.id} is a '{earlier.model_name}', not a '{model}'")
    if _scaled(earlier.network) != _scaled(network):
        kind, robust = earlier.network.scaling, str(earlier.network.config.scaling.robust).lower()
        raise ConfigError(
            f"warm_start.artifact {earlier.id} was fitted with scaling {_scaled(earlier.network)}, this fit has "
            f"{_scaled(network)}: its weights are of other units; set scaling.kind={kind} scaling.robust={robust}, or "
            "start from another fit"
        )
    found = {f"model.{name}": value.detach() for name, value in earlier.network.model.named_parameters()}
    wanted = {f"model.{name}": value for name, value in network.model.named_parameters()}
    odd = [
        f"{name} {_shape(found.get(name))}, wanted {_shape(wanted.get(name))}"
        for name in sorted(found.keys() | wanted.keys())
        if _shape(found.get(name)) != _shape(wanted.get(name))
    ]
    if odd or earlier.network.param_offset.shape != network.param_offset.shape:
        raise ConfigError(
            f"warm_start.artifact {earlier.id} was fitted with other sizes or settings: {len(odd)} of {len(wanted)} "
            f"tensors differ ({listing(odd) or 'parameters of the likelihood'}); use the settings of its config.yaml"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "warm_start"))
    result = {name: _dropped(value, dropout, generator) for name, value in found.items()}
    return {**result, "param_offset": earlier.network.param_offset.clone()}


def _scaled(network: ForecastNetwork) -> str:
    """Return the scaling that a network's weights are of; ``auto`` has become what it stands for."""
    is_robust = network.config.scaling.robust and network.scaling != "none"
    return f"'{network.scaling}'{' (robust)' if is_robust else ''}"


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _dropped(value: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return a copy with a share of the cells at 0 and the others divided by the share kept."""
    kept = torch.rand(value.shape, generator=generator) >= share
    return torch.where(kept, value / (1.0 - share), 0.0)


def _check_columns(name: str, earlier: Artifact, panel: Panel, data: DataConfig) -> None:
    """Refuse weights that were fitted on other inputs, or on the same in other places."""
    before, now = earlier.schema, panel.schema
    if before.freq != now.freq:
        raise ConfigError(f"{name} was fitted at freq {before.freq}, the data has {now.freq}; start from another fit")
    for role in _ROLES:
        theirs, ours = getattr(before, role), getattr(now, role)
        if theirs != ours:
            raise ConfigError(
                f"{name} was fitted on the {role} columns {listing(theirs, 10) or 'none'}, this fit has "
                f"{listing(ours, 10) or 'none'}: weights belong to places; give the same in the same order, or start "
                "from another fit"
            )
    own = (earlier.config.get("data") or {}).get("publication_delay")
    late, late_now = (
        Delays.of(delay, now, panel.grid, strict=False).past or {} for delay in (own, data.publication_delay)
    )
    if late != late_now:
        raise ConfigError(
            f"{name} was fitted with past covariates {_shown(late)} rows later than the targets, the data has "
            f"{_shown(late_now)} (publication_delay); start from a fit with the same"
        )


def _shown(late: Mapping[str, int]) -> str:
    return listing((f"{name} {rows}" for name, rows in late.items()), 10) or "0"


def check_blind(earlier: Artifact, panel: Panel, train_stop: int, held_out: tuple[str, ...], data: DataConfig) -> None:
    """Refuse weights that know what the new fit is graded on, or that belong to other inputs.

    Args:
        earlier: the fit to start from.
        panel: the data of the new fit.
        train_stop: row after its training span.
        held_out: series it does not train on.
        data: settings of that data.

    Raises:
        ConfigError: other columns or another order of them, another frequency or delay, another grid, rows at or after
            ``train_stop`` seen, a held-out series seen, or an artifact that does not say what it has seen.
    """
    name = f"warm_start.artifact {earlier.id}"
    _check_columns(name, earlier, panel, data)
    spans = earlier.provenance.get("span_rows")
    if not spans:
        raise ConfigError(
            f"{name} does not say which rows it has seen, and might know the future; use one of tsforge fit"
        )
    seen = earlier.grid.time_at(max(int(stop) for start, stop in (spans["train"], spans["valid"]) if stop > start) - 1)
    end = panel.grid.time_at(train_stop - 1)
    if panel.grid.floor(seen) >= train_stop:
        raise ConfigError(
            f"{name} was fitted and stopped on data up to {show_time(seen)}, the training span ends at "
            f"{show_time(end)}: it knows rows that this fit is graded on. Start from a fit whose validation span "
            "ends by then, or lengthen split.train"
        )
    known = set(earlier.series_ids) - set(earlier.provenance.get("entities", {}).get("held_out", ()))
    told = sorted(known & set(held_out))
    if told:
        raise ConfigError(
            f"{name} was fitted on {len(told)} of {len(held_out)} series that are held out now ({listing(told)}); hold "
            "them out of it too"
        )
