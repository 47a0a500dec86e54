"""Which series of a panel a fit never sees: the hold-out of entities beside the hold-out in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from tsforge.core.config import Config
from tsforge.core.errors import DataError, listing, nearest
from tsforge.core.seeding import derive_seed

Watch = Literal["seen_valid", "unseen_valid", "seen_train", "unseen_train"]


class EntityConfig(Config):
    """Series kept from the fit. They are graded in every span beside the others, and the artifact forecasts them."""

    held_out: float | tuple[str, ...] = 0.0
    """A share of the series, drawn by ``seed`` and rounded to whole ones; or the ids themselves."""
    seed: int = 0
    """Seed of the draw, which depends on it and the ids only: series that join later leave most of it as it was."""
    watch: Watch = "seen_valid"
    """Whose loss, and in which span, stops the training and chooses the weights: series of the fit or held-out ones."""

    @field_validator("held_out", mode="before")
    @classmethod
    def _share_or_ids(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("give a share such as 0.2, or a list of series such as [north,south]")
        if isinstance(value, list | tuple):
            return tuple(str(item) if isinstance(item, int) else item for item in value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> EntityConfig:
        if isinstance(self.held_out, tuple):
            twice = [name for name in self.held_out if self.held_out.count(name) > 1]
            if twice:
                raise ValueError(f"held_out names {listing(dict.fromkeys(twice))} twice")
        elif not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; a share must be at least 0 and below 1")
        if self.seed and not (isinstance(self.held_out, float) and self.held_out):
            raise ValueError("seed has no effect unless held_out is a share")
        if self.watch.startswith("unseen") and not self.held_out:
            raise ValueError(f"watch '{self.watch}' needs series that are held out; set held_out")
        return self


def choose_held_out(config: EntityConfig, series_ids: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of the held-out series in the order of ``series_ids``.

    Raises:
        DataError: an unknown id, or no series left on one side.
    """
    if not config.held_out:
        return ()
    total = len(series_ids)
    if total < 2:
        raise DataError(f"the data has one series ({listing(series_ids)}), so none can be held out; drop held_out")
    if isinstance(config.held_out, tuple):
        known = set(series_ids)
        unknown = [name for name in config.held_out if name not in known]
        if unknown:
            raise DataError(
                f"held_out names {len(unknown)} series that the data lacks ({listing(unknown)}"
                f"{nearest(unknown[0], series_ids)}); it has {listing(series_ids)}"
            )
        chosen = set(config.held_out)
    else:
        count = int(config.held_out * total + 0.5)
        if not 0 < count < total:
            side = "none to hold out" if not count else "none to fit on"
            raise DataError(
                f"held_out {config.held_out:g} of {total} series leaves {side}; choose a share that is worth 1 to "
                f"{total - 1} of them"
            )
        chosen = set(sorted(series_ids, key=lambda name: derive_seed(config.seed, "entities", name))[:count])
    if len(chosen) == total:
        raise DataError(f"all {total} series are held out, so none is left to fit on; hold out fewer")
    return tuple(name for name in series_ids if name in chosen)
