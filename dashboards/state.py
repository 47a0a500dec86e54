"""What the pages share: the workspace, cached reads keyed by version, and selections that live in the URL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
import streamlit as st

from dashboards import address
from dashboards.text import code, plain
from tsforge.app import catalog, catalog_results, triage
from tsforge.core.errors import BackendError, TsforgeError, listing
from tsforge.core.workspace import Workspace

if TYPE_CHECKING:
    from tsforge.app.catalog_live import LiveForecast
    from tsforge.app.explain import Attribution, Importance

MINUTE = "%Y-%m-%d %H:%M"
_Answer = TypeVar("_Answer")
_LEAST_SHARE = 5e-5  # percentages have two decimals


def workspace() -> Workspace:
    """Return the workspace of this installation (``TSFORGE_HOME``)."""
    return Workspace.open()


def page(title: str, draw: Callable[[Workspace], None], *, lead: str = "") -> None:
    """Draw a page below its title; an error a user can cause becomes one message, never a traceback."""
    address.begin(title)
    st.title(title)
    if lead:
        st.caption(lead)
    try:
        draw(workspace())
    except TsforgeError as error:
        st.error(f"**This page cannot be shown.** {plain(error)}", icon=":material/error:")
        st.caption("Nothing was changed. `tsforge doctor` tells what is reachable.")
    address.end(title)


def section(title: str, draw: Callable[[Workspace], None]) -> None:
    """Draw a part of a page that asks a store of its own: where that fails, the other parts stay."""
    st.subheader(title)
    asked(title, draw, workspace())


def asked(title: str, ask: Callable[[Workspace], _Answer], workspace: Workspace) -> _Answer | None:
    """Return what a store answers, None where it fails: that is one message, and the other parts of the page stay."""
    try:
        return ask(workspace)
    except TsforgeError as error:
        st.error(f"**{title} cannot be shown.** {plain(error)}", icon=":material/error:")
        return None


def choose(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    names: Mapping[str, str] | None = None,
    where: Any = st,
    damaged: Container[str] = (),
    lasting: bool = False,
) -> str:
    """Return the chosen option of a select box; the choice is part of the URL, so that it can be sent as a link.

    Args:
        label: what is chosen.
        options: the values.
        key: name in the URL.
        names: shown text per option.
        where: the column or container to draw in.
        damaged: values that were left out of the options for that reason.
        lasting: options are stored results, which no other choice takes away: one that was shown until now and is gone
            was removed, and that is said.

    Raises:
        BackendError: there is no option.
    """
    if not options:  # an empty page is told before: here a stored result lacks what every one has
        raise BackendError(
            f"there is no {label.lower()} to choose: a table of what is chosen above is empty; choose another one, or "
            "make it again"
        )
    wanted, state, shown = address.get(key), f"choice-{key}", dict(names or {})
    if wanted and wanted not in options:
        if address.is_news():
            warn_of_link(label.lower(), wanted, where=where, why="is damaged" if wanted in damaged else "is not here")
        elif lasting:
            why = "was damaged" if wanted in damaged else "was removed"
            where.warning(f"The {label.lower()} '{plain(wanted)}', shown until now, {why}; showing another one.")
    first = wanted if wanted in options else options[0]
    address.adopt(state, first, valid=st.session_state.get(state) in options)
    value: str = where.selectbox(label, options, format_func=lambda item: shown.get(item, item), key=state)
    address.put(key, value)
    return value


def flag(label: str, key: str, *, help: str | None = None) -> bool:
    """Return whether a toggle is on; the choice is part of the URL."""
    address.adopt(f"choice-{key}", address.get(key) == "1")
    chosen = st.toggle(label, key=f"choice-{key}", help=help)
    address.put(key, "1" if chosen else "")
    return chosen


def warn_of_link(what: str, wanted: str, *, where: Any = st, why: str = "is not here") -> None:
    """Say that what a link names cannot be shown."""
    where.warning(f"The link names {what} '{plain(wanted)}', which {why}; showing another one.")


def left_out(damaged: Mapping[str, str], again: str) -> None:
    """Name the results that a list lacks because they are damaged, why, and what makes them anew."""
    if damaged:
        names = listing([f"{code(name)} ({plain(why)})" for name, why in damaged.items()])
        st.warning(f"Left out, because damaged: {names}. {again}", icon=":material/broken_image:")


def labels(records: Iterable[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """Return ``{id: text}`` of records; equal texts get a number, since people choose by what they read."""
    found = {str(record["id"]): text(record) for record in records}
    repeated = {name for name, count in Counter(found.values()).items() if count > 1}
    seen: Counter[str] = Counter()
    for key, name in found.items():
        if name in repeated:
            seen[name] += 1
            found[key] = f"{name} #{seen[name]}"
    return found


def empty(what: str, command: str) -> None:
    """Say that there is nothing yet and which command makes some."""
    st.info(f"**No {what} yet.** Make some with:", icon=":material/inbox:")
    st.code(command, language="bash")


def table(
    rows: Sequence[Mapping[str, Any]] | pl.DataFrame,
    columns: Mapping[str, str] | None = None,
    *,
    integers: Sequence[str] = (),
    percentages: Sequence[str] = (),
) -> None:
    """Draw a table with readable headings, times to the minute and numbers of four significant digits.

    Args:
        rows: records or a table.
        columns: column -> heading, in the order shown; default all, underscores as spaces.
        integers, percentages: columns to show with grouped digits, or as a share of one.
    """
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(list(rows), infer_schema_length=None)
    headings = {name: name.replace("_", " ") for name in frame.columns} if columns is None else dict(columns)
    frame = frame.select([name for name in headings if name in frame.columns])
    config: dict[str, Any] = {}
    for name, kind in frame.schema.items():
        heading = headings[name]
        if isinstance(kind, pl.Datetime):
            if kind.time_zone is not None:  # all times here are UTC; without the zone a table shows them as they are
                plain = pl.col(name).dt.convert_time_zone("UTC").dt.replace_time_zone(None)
                frame = frame.with_columns(plain)
            config[name] = st.column_config.DatetimeColumn(heading, format="YYYY-MM-DD HH:mm")
        elif isinstance(kind, pl.Duration):
            frame = frame.with_columns(pl.col(name).map_elements(catalog.in_words, return_dtype=pl.String))
            config[name] = heading
        elif name in percentages:
            tiny = pl.col(name).abs() < _LEAST_SHARE
            frame = frame.with_columns(pl.when(tiny).then(0.0).otherwise(name).alias(name))  # no "-0 %"
            config[name] = st.column_config.NumberColumn(heading, format="percent")
        elif name in integers:
            config[name] = st.column_config.NumberColumn(heading, format="localized")
        elif kind.is_float():
            config[name] = st.column_config.NumberColumn(heading, format="%.4g")
        else:
            config[name] = heading
        if kind == pl.String:
            frame = frame.with_columns(pl.col(name).fill_null(""))
    st.dataframe(frame, width="stretch", hide_index=True, column_config=config, placeholder="–")


def moment(value: object) -> str:
    """Return a time to the minute; other positions (integer time) as they are."""
    return value.strftime(MINUTE) if isinstance(value, datetime) else str(value)


def span(event: Mapping[str, Any]) -> str:
    """Return from when to when an event lasted; the day once where it ends on the one it began."""
    start, end = moment(event["start"]), moment(event["end"])
    if start == end:
        return start
    day, _, clock = end.partition(" ")
    return f"{start} to {clock if clock and start.startswith(day) else end}"


def series_table(name: str, series: str, *, artifact: str | None = None) -> pl.DataFrame:
    """Return the rows of one series, stored or a sum (as a model was fitted); cached until the data set changes."""
    home = workspace()
    return _series_table(str(home.root), name, series, artifact, catalog.dataset_version(home, name))


@st.cache_data(show_spinner="Reading the store ...", max_entries=32)
def _series_table(root: str, name: str, series: str, artifact: str | None, version: str) -> pl.DataFrame:
    return catalog.read_series(Workspace.open(root), name, series, artifact=artifact)


def made_series(name: str) -> list[str]:
    """Return the sums of a data set that are made when it is read; cached until it changes."""
    home = workspace()
    found: list[str] = _made_series(str(home.root), name, catalog.dataset_version(home, name))
    return found


@st.cache_data(show_spinner="Reading the store ...", max_entries=8)
def _made_series(root: str, name: str, version: str) -> list[str]:
    return catalog.made_series(Workspace.open(root), name)


def data_report(name: str) -> pl.DataFrame:
    """Return the data report of a data set; cached until the data set changes."""
    home = workspace()
    return _data_report(str(home.root), name, catalog.dataset_version(home, name))


@st.cache_data(show_spinner="Examining the data ...", max_entries=8, ttl=600)
def _data_report(root: str, name: str, version: str) -> pl.DataFrame:
    return catalog.dataset_report(Workspace.open(root), name)


def live_forecast(artifact: str, dataset: str, series: str, cutoff: object) -> LiveForecast:
    """Return the forecast of a stored artifact for one series made at ``cutoff``; cached per artifact and cutoff."""
    home = workspace()
    return _live_forecast(str(home.root), artifact, series, cutoff, catalog.dataset_version(home, dataset))


@st.cache_data(show_spinner="Forecasting ...", max_entries=64)
def _live_forecast(root: str, artifact: str, series: str, cutoff: Any, version: str) -> LiveForecast:
    from tsforge.app.catalog_live import live_forecast  # brings torch: no other page waits for it

    return live_forecast(Workspace.open(root), artifact, series, cutoff)


def live_paths(artifact: str, dataset: str, series: str, cutoff: object, number: int) -> pl.DataFrame:
    """Return sample paths of ``live_forecast``; cached like it."""
    home = workspace()
    return _live_paths(str(home.root), artifact, series, cutoff, number, catalog.dataset_version(home, dataset))


@st.cache_data(show_spinner="Drawing futures ...", max_entries=32)
def _live_paths(root: str, artifact: str, series: str, cutoff: Any, number: int, version: str) -> pl.DataFrame:
    from tsforge.app.catalog_live import live_paths as draw

    return draw(Workspace.open(root), artifact, series, cutoff, number)


def attribution(
    artifact: str,
    dataset: str,
    series: str,
    variate: str,
    cutoff: object,
    steps: tuple[int, ...] | None,
    method: str,
    block: int,
) -> Attribution:
    """Return the parts of a forecast of a stored artifact; cached per artifact, cutoff and way of dividing."""
    home = workspace()
    asked = {
        "artifact": artifact,
        "series": series,
        "variate": variate,
        "cutoff": cutoff.isoformat() if isinstance(cutoff, datetime) else cutoff,
        "steps": steps,
        "attribution": {"method": method, "block": block if method == "occlusion" else 1},
    }
    found: Attribution = _explained(str(home.root), asked, catalog.dataset_version(home, dataset))
    return found


def importance(artifact: str, dataset: str) -> Importance:
    """Return the importance of every input of a stored artifact; cached until the data set changes."""
    home = workspace()
    asked = {"artifact": artifact, "what": "importance"}
    found: Importance = _explained(str(home.root), asked, catalog.dataset_version(home, dataset))
    return found


@st.cache_data(show_spinner="Explaining ...", max_entries=32)
def _explained(root: str, asked: dict[str, Any], version: str) -> Any:
    from tsforge.app.explain import ExplainConfig, explain  # brings torch: no other page waits for it
    from tsforge.core.config import validate

    return explain(validate(ExplainConfig, asked), Workspace.open(root))


def detection(record: Mapping[str, Any]) -> catalog_results.StoredDetection:
    """Return the detection of a record of ``list_detections``; cached until it is published again."""
    return _detection(str(workspace().root), record["id"], record["created"])


@st.cache_data(show_spinner="Reading scores ...", max_entries=8)
def _detection(root: str, name: str, created: datetime) -> catalog_results.StoredDetection:
    return catalog_results.load_detection(Workspace.open(root), name)


def health(record: Mapping[str, Any]) -> pl.DataFrame:
    """Return the alarm rate of each series of a detection over time; cached like the detection."""
    return _health(str(workspace().root), record["id"], record["created"])


@st.cache_data(show_spinner="Counting alarms ...", max_entries=8)
def _health(root: str, name: str, created: datetime) -> pl.DataFrame:
    report = catalog_results.load_detection(Workspace.open(root), name)
    return triage.health_history(report.scores, report.metadata.get("alarm_rate_nominal"))


def stored_events(name: str | None, version: str) -> pl.DataFrame:
    """Return the events of a data set, None for those of all; cached until somebody or something says more of them."""
    return _stored_events(str(workspace().root), name, version)


@st.cache_data(show_spinner="Reading events ...", max_entries=8)
def _stored_events(root: str, name: str | None, version: str) -> pl.DataFrame:
    return triage.read_events(Workspace.open(root), name)


def backtest(name: str) -> catalog_results.StoredBacktest:
    """Return a stored backtest; cached, it never changes."""
    return _backtest(str(workspace().root), name)


@st.cache_data(show_spinner="Reading the backtest ...", max_entries=8)
def _backtest(root: str, name: str) -> catalog_results.StoredBacktest:
    return catalog_results.load_backtest(Workspace.open(root), name)
