"""Data report: spans, gaps, missing shares, constants, outliers, freshness, and what every ingestion changed."""

from __future__ import annotations

import json

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import choose, data_report, empty, made_series, page, series_table, table
from dashboards.text import plain
from tsforge.app import catalog
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace

_REPORT = {
    "series_id": "series",
    "column": "column",
    "null_share": "missing",
    "gaps": "gaps",
    "longest_gap": "longest gap (steps)",
    "outliers": "outliers",
    "constant": "constant",
    "age": "age",
    "stale": "stale",
    "min": "min",
    "mean": "mean",
    "max": "max",
    "start": "from",
    "end": "to",
    "rows": "rows",
    "role": "role",
}
_BATCHES = {
    "started": "started (UTC)",
    "status": "status",
    "source": "source",
    "rows_in": "rows in",
    "rows_new": "new",
    "rows_changed": "changed",
    "rows_unchanged": "unchanged",
    "rows_refused": "refused",
    "error": "why refused",
}


def show() -> None:
    """Draw the page."""
    page("Data", _draw, lead="What is in the store, and what is wrong with it.")


def _draw(workspace: Workspace) -> None:
    datasets = [item["name"] for item in catalog.list_datasets(workspace)]
    if not datasets:
        empty("data", "tsforge ingest data=nyc_weather")
        return
    left, right = st.columns([2, 1])
    name = choose("Data set", datasets, "dataset", where=left, lasting=True)
    report = data_report(name)
    stored = report["series_id"].unique(maintain_order=True).to_list()
    try:
        made = made_series(name)
    except DataError as error:  # the stored rows are all the more worth a look then
        made = []
        st.warning(f"Sums cannot be made. {plain(error)}", icon=":material/error:")
    series = choose("Series", [*stored, *made], "series", where=right)
    st.subheader("Missing cells")
    _missing(report, len(stored))
    st.subheader(f"Values of {plain(series)}")
    if series in made:
        st.caption("An aggregate of other series, made when the data is read; the report holds what is stored.")
    rows = series_table(name, series)
    columns = [column for column in rows.columns if column not in ("series_id", "time")]
    chosen = st.multiselect("Columns", columns, default=columns[:3], key=f"columns-{name}")
    if chosen:
        st.plotly_chart(charts.series_chart(thinned(rows), columns=chosen), width="stretch", key="values")
    else:
        st.caption("Choose at least one column.")
    st.subheader("Report")
    table(
        report,
        {key: heading for key, heading in _REPORT.items() if key != "stale" or report["stale"].count()},
        integers=("rows", "gaps", "longest_gap", "outliers"),
        percentages=("null_share",),
    )
    st.caption("Outliers lie more than 6 robust standard deviations from the median.")
    st.subheader("Ingestions")
    batches = catalog.dataset_batches(workspace, name)
    errors = [_why(reasons) for reasons in batches["reasons"]]
    batches = batches.with_columns(pl.Series("error", errors, dtype=pl.String))
    table(batches, _BATCHES, integers=tuple(column for column in _BATCHES if column.startswith("rows_")))


def _why(reasons: str) -> str | None:
    """Return why an ingestion was refused."""
    try:
        error = json.loads(reasons).get("error")
    except (ValueError, AttributeError):
        return "cannot be read: its row of the table tsf_batches is damaged"
    return None if error is None else str(error)


def _missing(report: pl.DataFrame, series: int) -> None:
    """Draw missing cells, of many series only those that lack most."""
    drawn = charts.with_gaps(report)
    count = drawn["series_id"].n_unique()
    if count:
        st.plotly_chart(charts.null_share_chart(drawn), width="stretch", key="missing")
    if count < series:
        lacking = report.filter(pl.col("null_share") > 0)["series_id"].n_unique()
        told = f"{lacking} of {series} series lack cells" if lacking else f"None of the {series} series lacks a cell"
        st.caption(told + (f"; the {count} that lack most are drawn." if count < lacking else "."))


def thinned(rows: pl.DataFrame, limit: int = 20_000) -> pl.DataFrame:
    """Return at most ``limit`` evenly spaced rows and say so; a browser gains nothing from more."""
    if rows.height <= limit:
        return rows
    every = -(-rows.height // limit)
    st.caption(f"Showing every {every}th of {rows.height:,} rows.")
    return rows.gather_every(every)
