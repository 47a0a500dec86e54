"""Forecast explorer: history, fan chart, what happened since, and the parts a forecast is made of."""

from __future__ import annotations

import polars as pl
import streamlit as st

from dashboards import charts
from dashboards.state import choose, empty, live_forecast, page, series_table
from tsforge.app import catalog
from tsforge.core.workspace import Workspace


def show() -> None:
    """Draw the page."""
    page(
        "Forecasts", _draw, lead="Any fitted model, from any cutoff: what it would have said with the data until then."
    )


def _draw(workspace: Workspace) -> None:
    artifacts = catalog.list_artifacts(workspace)
    if not artifacts:
        empty("fitted model", "tsforge ingest data=nyc_weather && tsforge fit data=nyc_weather model=ar_net")
        return
    names = {
        item["id"]: f"{item['model']} on {item['dataset']}, {item['created']:%Y-%m-%d %H:%M}" for item in artifacts
    }
    left, middle, right = st.columns([2, 1, 1])
    artifact = choose("Model", list(names), "artifact", names=names, where=left)
    facts = catalog.artifact_facts(workspace, artifact)
    series = choose("Series", list(facts["series"]), "series", where=middle)
    variate = choose("Variate", list(facts["variates"]), "variate", where=right)

    table = series_table(facts["dataset"], series)
    observed = table.filter(pl.col(variate).is_not_null())["time"]
    usable = observed[facts["context_length"] :]
    if usable.is_empty():
        st.warning(
            f"{series} has {observed.len()} observed rows of {variate}; this model reads {facts['context_length']}."
        )
        return
    cutoff = _choose_cutoff(usable)
    forecast = live_forecast(artifact, series, cutoff)
    shown = forecast.table.filter(pl.col("variate") == variate)
    history = _window(table, variate, cutoff, back=max(3 * facts["horizon"], 96), ahead=0)
    actual = _window(table, variate, cutoff, back=0, ahead=facts["horizon"])
    st.plotly_chart(charts.fan_chart(history, shown, actual=actual, variate=variate), width="stretch", key="fan")
    _errors(shown, actual)

    st.subheader("Parts of this forecast")
    parts = forecast.components.filter(pl.col("variate") == variate)
    if parts.is_empty():
        st.caption("This model has no additive parts to show.")
    else:
        st.plotly_chart(charts.components_chart(parts), width="stretch", key="parts")
    with st.expander("Table"):
        st.dataframe(shown, width="stretch", hide_index=True)
        st.download_button("Download CSV", shown.write_csv(), file_name=f"{artifact}-{series}-{variate}.csv")
    with st.expander("What the model learnt"):
        if not facts["explanation"]:
            st.caption("Nothing recorded for this model.")
        for name, records in facts["explanation"].items():
            st.markdown(f"**{name.replace('_', ' ')}**")
            st.dataframe(records, width="stretch", hide_index=True)


def _choose_cutoff(times: pl.Series) -> object:
    """Return the chosen cutoff; the position from the end is kept in the URL."""
    last = times.len() - 1
    wanted = st.query_params.get("back", "0")
    back = min(int(wanted), last) if wanted.isdigit() else 0
    choice = st.slider("Steps before the end of the data", 0, min(last, 24 * 60), min(back, 24 * 60), key="choice-back")
    if st.query_params.get("back") != str(choice):
        st.query_params["back"] = str(choice)
    cutoff = times[last - choice]
    st.caption(f"Cutoff: **{cutoff}**. The model sees nothing after it.")
    return cutoff


def _window(table: pl.DataFrame, variate: str, cutoff: object, *, back: int, ahead: int) -> pl.DataFrame:
    """Return ``time, value`` of the rows around the cutoff (``back`` up to it, or ``ahead`` after it)."""
    values = table.select("time", pl.col(variate).alias("value"))
    before = values.filter(pl.col("time") <= cutoff).tail(back) if back else values.clear()
    after = values.filter(pl.col("time") > cutoff).head(ahead) if ahead else values.clear()
    return pl.concat([before, after])


def _errors(forecast: pl.DataFrame, actual: pl.DataFrame) -> None:
    joined = forecast.join(actual.rename({"value": "actual"}), on="time", how="inner").drop_nulls("actual")
    if joined.is_empty():
        st.caption("Nothing has been observed after this cutoff yet.")
        return
    error = (joined["actual"] - joined["mean"]).abs()
    cells = [("Mean absolute error", f"{error.mean():.3g}"), ("Largest error", f"{error.max():.3g}")]
    for low, high, coverage in charts.quantile_pairs(forecast.columns):
        inside = ((joined["actual"] >= joined[low]) & (joined["actual"] <= joined[high])).mean()
        cells.append((f"Inside the {coverage:.0%} interval", f"{inside:.0%}"))
    for column, (label, value) in zip(st.columns(len(cells)), cells, strict=True):
        column.metric(label, value)
