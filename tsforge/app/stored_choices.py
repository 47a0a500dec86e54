"""Ingested data sets as choices of a config: ``data=NAME`` means the settings that NAME was ingested with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore


class StoredData:
    """The data sets of a workspace's store as choices of the group ``data``; the store is read when one is needed.

    Args:
        home: folder of the workspace, as of ``Workspace.open``.
    """

    def __init__(self, home: Path | None = None) -> None:
        self._home = home

    @cached_property
    def _known(self) -> dict[str, dict[str, Any]]:
        with closing(SeriesStore(Workspace.open(self._home).database_url)) as store:
            found = {name: store.config(name) for name in store.datasets()["name"]}
        return {name: settings for name, settings in found.items() if settings}

    def names(self, group: str) -> Sequence[str]:
        """Return the data sets that were ingested with settings; no names for other groups.

        Raises:
            BackendError: the store cannot be read.
        """
        return list(self._known) if group == "data" else []

    def settings(self, group: str, name: str) -> Mapping[str, Any]:
        """Return the settings a data set was last ingested with."""
        return self._known[name]
