"""The router, started by ``tsforge dashboard``, which also sets the theme and the workspace."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboards.views import (
    anomalies,
    backtests,
    data,
    dynamics,
    explanations,
    forecasts,
    graphs,
    overview,
    runs,
    triage,
)

PAGES = {
    "": [
        st.Page(overview.show, title="Overview", icon=":material/dashboard:", default=True),
        # the default page has no path of its own, but links name one
        st.Page(overview.show, title="Overview", url_path="overview", visibility="hidden"),
    ],
    "Results": [
        st.Page(forecasts.show, title="Forecasts", icon=":material/show_chart:", url_path="forecasts"),
        st.Page(triage.show, title="Triage", icon=":material/assignment_late:", url_path="triage"),
        st.Page(anomalies.show, title="Anomalies", icon=":material/notification_important:", url_path="anomalies"),
        st.Page(backtests.show, title="Backtests", icon=":material/leaderboard:", url_path="backtests"),
        st.Page(explanations.show, title="Explanations", icon=":material/help:", url_path="explanations"),
        st.Page(graphs.show, title="Graphs", icon=":material/hub:", url_path="graphs"),
        st.Page(dynamics.show, title="Dynamics", icon=":material/all_inclusive:", url_path="dynamics"),
    ],
    "Inputs": [
        st.Page(data.show, title="Data", icon=":material/table_chart:", url_path="data"),
        st.Page(runs.show, title="Runs", icon=":material/history:", url_path="runs"),
    ],
}

ICON = Path(__file__).with_name("icon.svg")  # a named icon would be fetched from the internet

st.set_page_config(page_title="tsforge", page_icon=str(ICON), layout="wide")
st.navigation(PAGES).run()
