"""Data report: spans, gaps, missing shares, constants, outliers, freshness, and what every ingestion changed."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import choose, data_report, empty, page, series_table
from tsforge.app import catalog
from tsforge.core.workspace import Workspace


def show() -> None:
    """Draw the page."""
    page("Data", _draw, lead="What is in the store, and what is wrong with it.")


def _draw(workspace: Workspace) -> None:
    datasets = [item["name"] for item in catalog.list_datasets(workspace)]
    if not datasets:
        empty("data", "tsforge ingest data=nyc_weather")
        return
    left, right = st.columns([2, 1])
    name = choose("Data set", datasets, "dataset", where=left)
    report = data_report(name)
    series = choose("Series", report["series_id"].unique(maintain_order=True).to_list(), "series", where=right)
    st.subheader("Missing cells")
    st.plotly_chart(charts.null_share_chart(report), width="stretch", key="missing")
    st.subheader(f"Values of {series}")
    table = series_table(name, series)
    columns = [column for column in table.columns if column not in ("series_id", "time")]
    default = columns[: min(2, len(columns))]
    chosen = st.multiselect("Columns", columns, default=default, key="columns")
    if chosen:
        st.plotly_chart(charts.series_chart(thinned(table), columns=chosen), width="stretch", key="values")
    else:
        st.caption("Choose at least one column.")
    st.subheader("Report")
    st.dataframe(report, width="stretch", hide_index=True)
    st.subheader("Ingestions")
    st.dataframe(catalog.dataset_batches(workspace, name), width="stretch", hide_index=True)


def thinned(table: pl.DataFrame, limit: int = 20_000) -> pl.DataFrame:
    """Return at most ``limit`` evenly spaced rows and say so; a browser gains nothing from more."""
    if table.height <= limit:
        return table
    every = -(-table.height // limit)
    st.caption(f"Showing every {every}th of {table.height:,} rows.")
    return table.gather_every(every)
