"""What the pages share: the workspace, cached reads keyed by version, and selections that live in the URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import polars as pl
import streamlit as st

from tsforge.app import catalog
from tsforge.core.errors import TsforgeError
from tsforge.core.workspace import Workspace


def workspace() -> Workspace:
    """Return the workspace of this installation (``TSFORGE_HOME``)."""
    return Workspace.open()


def page(title: str, draw: Callable[[Workspace], None], *, lead: str = "") -> None:
    """Draw a page below its title; an error a user can cause becomes one message, never a traceback."""
    st.title(title)
    if lead:
        st.caption(lead)
    try:
        draw(workspace())
    except TsforgeError as error:
        st.error(f"**This page cannot be shown.** {error}", icon=":material/error:")
        st.caption("Nothing was changed. `tsforge doctor` tells what is reachable.")


def choose(
    label: str, options: Sequence[str], key: str, *, names: dict[str, str] | None = None, where: Any = st
) -> str:
    """Return the chosen option of a select box; the choice is part of the URL, so that it can be sent as a link.

    Args:
        label: what is chosen.
        options: at least one value.
        key: name in the URL.
        names: shown text per option.
        where: the column or container to draw in.
    """
    wanted = st.query_params.get(key)
    if wanted is not None and wanted not in options:
        where.warning(f"The link names {label.lower()} '{wanted}', which is not here; showing '{options[0]}'.")
    index = options.index(wanted) if wanted in options else 0
    value: str = where.selectbox(
        label, options, index=index, format_func=lambda item: (names or {}).get(item, item), key=f"choice-{key}"
    )
    if st.query_params.get(key) != value:
        st.query_params[key] = value
    return value


def empty(what: str, command: str) -> None:
    """Say that there is nothing yet and which command makes some."""
    st.info(f"**No {what} yet.** Make some with:", icon=":material/inbox:")
    st.code(command, language="bash")


def series_table(name: str, series: str) -> pl.DataFrame:
    """Return the stored rows of one series; cached until the data set changes."""
    home = workspace()
    return _series_table(str(home.root), name, series, catalog.dataset_version(home, name))


@st.cache_data(show_spinner="Reading the store ...", max_entries=32)
def _series_table(root: str, name: str, series: str, version: str) -> pl.DataFrame:
    return catalog.read_series(Workspace.open(root), name, series)


def data_report(name: str) -> pl.DataFrame:
    """Return the data report of a data set; cached until the data set changes."""
    home = workspace()
    return _data_report(str(home.root), name, catalog.dataset_version(home, name))


@st.cache_data(show_spinner="Examining the data ...", max_entries=8)
def _data_report(root: str, name: str, version: str) -> pl.DataFrame:
    return catalog.dataset_report(Workspace.open(root), name)


def live_forecast(artifact: str, series: str, cutoff: object) -> catalog.LiveForecast:
    """Return the forecast of a stored artifact for one series made at ``cutoff``; cached per artifact and cutoff."""
    home = workspace()
    dataset = catalog.artifact_facts(home, artifact)["dataset"]
    return _live_forecast(str(home.root), artifact, series, cutoff, catalog.dataset_version(home, dataset))


@st.cache_data(show_spinner="Forecasting ...", max_entries=64)
def _live_forecast(root: str, artifact: str, series: str, cutoff: object, version: str) -> catalog.LiveForecast:
    return catalog.live_forecast(Workspace.open(root), artifact, series, cutoff)
