"""Promote: decide which version of a registered model forecasts from now on."""

from __future__ import annotations

from typing import Any

from tsforge.core.workspace import Workspace
from tsforge.tracking.registry import CHAMPION
from tsforge.tracking.registry import promote as give_alias


def promote(name: str, which: str, alias: str = CHAMPION, workspace: Workspace | None = None) -> dict[str, Any]:
    """Give a version of the model ``name`` an alias and return what changed.

    Args:
        name: registered model.
        which: version, artifact id or alias; ``previous`` takes the last promotion back.
        alias: ``champion`` (forecasts) or ``challenger`` (the next candidate).
        workspace: names the tracking store; default the one of the environment.

    Raises:
        ArtifactError: no such model or version; the message lists what there is.
        ConfigError: another alias.
        BackendError: the store does not answer.
    """
    return give_alias(name, which, workspace or Workspace.open(), alias=alias)
