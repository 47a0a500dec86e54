"""The Streamlit dashboard: a router, one view a page, charts from tables."""
