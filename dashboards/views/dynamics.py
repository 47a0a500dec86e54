"""Reconstructed dynamics: what a model does on its own beside what the data do, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import streamlit as st

from dashboards import dynamics_charts as charts
from dashboards.state import MINUTE, choose, empty, labels, left_out, page, table
from dashboards.text import plain
from tsforge.app import catalog_dynamics
from tsforge.app.catalog_dynamics import StoredReconstruction, seed_rank
from tsforge.core.errors import TsforgeError, listing
from tsforge.core.workspace import Workspace

_METRICS = {
    "d_stsp": "D_stsp",
    "d_h": "D_H",
    "pe": "PE",
    "lambda_1": "largest exponent",
    "kaplan_yorke": "Kaplan-Yorke",
    "captured": "captured",
    "alpha": "alpha",
}
_SEEDS = {"seed": "seed", **_METRICS, "healthy": "healthy", "failed_steps": "failed steps", "failed": "failed because"}
_VALIDATED = {"kept_epoch": "epoch kept", "score": "validation score"}
_CYCLES = {
    "cycle": "no.",
    "what": "what",
    "kind": "stability",
    "modulus": "largest multiplier",
    "on_data": "in the range of the data",
    "distance": "distance to the data (sd)",
    "captured": "free runs that end there",
}
_TRACES = {  # column: what it is called, whether it spans several sizes
    "alpha": ("strength of the forcing", False),
    "kappa": ("growth that sets the forcing (kappa)", False),
    "loss": ("loss", True),
    "gradient_norm": ("gradient norm before clipping", True),
    "max_abs_A": ("largest |A|", False),
    "validation": ("validation score", True),
}
_SPECTRA = 4  # variates whose spectra are drawn beside the ones chosen


def show() -> None:
    """Draw the page."""
    page("Dynamics", _draw, lead="Reconstructed systems: what the models do on their own, beside the data.")


def _draw(workspace: Workspace) -> None:
    damaged = catalog_dynamics.damaged_reconstructions(workspace)
    left_out(dict.fromkeys(damaged, "result.json cannot be used"), "Run the same `tsforge reconstruct` again.")
    found = catalog_dynamics.list_reconstructions(workspace)
    if not found:
        empty("reconstruction", "tsforge reconstruct experiment/demo_lorenz")
        return
    names = labels(found, lambda item: f"{item['name']}, {item['seeds']} seed(s), {item['created']:{MINUTE}}")
    left, right = st.columns([2, 1])
    chosen = choose(
        "Reconstruction", list(names), "reconstruction", names=names, where=left, damaged=damaged, lasting=True
    )
    report = catalog_dynamics.load_reconstruction(workspace, chosen)
    usable = sorted(report.seeds, key=seed_rank)
    seed = int(choose("Seed (best first)", [str(row["seed"]) for row in usable], "seed", where=right))
    row = next(row for row in usable if row["seed"] == seed)
    for note in report.summary.get("notes", []):
        st.info(plain(note))
    if report.summary.get("in_sample"):
        st.info("Judged on the training series itself: the figures say nothing about new data.")
    if report.inputs:
        drivers = plain(listing(list(report.inputs)))
        st.caption(f"Driven by {drivers}: the free runs take the recorded inputs of the test series.")
    _verdict(row)
    _seed(workspace, report, seed)
    st.subheader("All seeds")
    validated = any(row.get("validation") for row in report.seeds)
    table(_rows(report), {**_SEEDS, **(_VALIDATED if validated else {})})
    st.caption(
        "Median and MAD (median absolute deviation) are over the seeds that did not fail. Captured: share of free runs "
        f"that {_captured(report)}. A good PE says little about the long run."
    )
    _training(workspace, report)
    with st.expander("How this was measured"):
        st.json(report.definition, expanded=1)


def _captured(report: StoredReconstruction) -> str:
    """Return what the ends of free runs were held against."""
    if report.expected is None:
        return "do not end as most moving ones do (nobody said how the data end)"
    return f"do not end in {plain(report.expected)}, as the data do"


def _verdict(row: dict[str, Any]) -> None:
    """Say in words what the check after the fit found."""
    if row.get("failed"):
        st.warning(f"Seed {row['seed']} failed: {plain(row['failed'])}.", icon=":material/error:")
    for warning in row["warnings"]:
        st.warning(plain(warning), icon=":material/warning:")
    if row.get("healthy"):
        st.success("No warning: the free runs keep to what the data do.", icon=":material/check_circle:")
    elif row.get("healthy") is None and not row.get("failed") and not row["findings"]:
        st.caption("Fixed points and free runs of this seed were not examined.")
    validation = row.get("validation") or {}
    if validation.get("epoch") is not None:
        st.caption(f"Weights of epoch {validation['epoch']}: the best on the validation rows.")
    for note in row["findings"].get("notes", []):
        st.caption(plain(note))


def _seed(workspace: Workspace, report: StoredReconstruction, seed: int) -> None:
    """Draw what is stored of one seed; damaged tables are one message, and the rest of the page stays."""
    try:
        stored = catalog_dynamics.load_seed(workspace, report.id, seed)
        cycles = catalog_dynamics.cycle_table(report, seed)
    except TsforgeError as error:
        st.error(f"**Seed {seed} cannot be drawn.** {plain(error)}", icon=":material/error:")
        return
    st.subheader("Trajectories")
    variates = _choose_variates(report.columns)
    st.plotly_chart(charts.phase_chart(stored.trajectory, cycles, variates=variates), width="stretch", key="phase")
    if cycles.height and not _is_placed(report, cycles):
        st.caption("The place of the fixed points in the units of the data is not stored; they are in the table below.")
    st.subheader("Fixed points and cycles")
    if cycles.is_empty():
        st.caption("None was found, or none was searched for.")
    else:
        _cycles(report, cycles)
    st.subheader("Power spectra")
    drawn = list(dict.fromkeys([*variates, *report.columns]))[: max(_SPECTRA, len(variates))]
    st.plotly_chart(charts.spectra_chart(stored.spectra, variates=drawn), width="stretch", key="spectra")
    st.caption(
        "Shares of all power. Less than a hundredth of the data's least lies below the axis: a run at rest has none."
    )
    if len(drawn) < len(report.columns):
        st.caption(f"{len(drawn)} of {len(report.columns)} variates; the ones chosen above come first.")


def _choose_variates(columns: Sequence[str]) -> list[str]:
    """Return the axes: two or three variates, or the only one."""
    if len(columns) == 1:
        return list(columns)
    views = ["3-D", "2-D"] if len(columns) > 2 else ["2-D"]
    places = st.columns(4)
    count = int(choose("View", views, "view", where=places[0])[0])
    return [
        choose(f"Axis {axis}", [*columns[index:], *columns[:index]], axis, where=places[index + 1])
        for index, axis in enumerate("xyz"[:count])
    ]


def _cycles(report: StoredReconstruction, cycles: pl.DataFrame) -> None:
    what = pl.when(pl.col("period") == 1).then(pl.lit("fixed point")).otherwise(pl.format("{}-cycle", "period"))
    shown = cycles.with_columns(what=what)
    placed = _is_placed(report, cycles)
    place = {name: name for name in report.columns[:6]} if placed else {"latent": "latent state"}
    table(shown, {**_CYCLES, **place}, percentages=("captured",))


def _is_placed(report: StoredReconstruction, cycles: pl.DataFrame) -> bool:
    """Return whether the cycles have their place in the units of the data."""
    return cycles[report.columns[0]].is_not_null().all()


def _rows(report: StoredReconstruction) -> list[dict[str, Any]]:
    """Return one row a seed, then the median and the median absolute deviation."""
    words = {True: "yes", False: "no", None: "not examined"}
    rows: list[dict[str, Any]] = [
        {
            **{name: row.get(name) for name in _SEEDS},
            "seed": str(row["seed"]),
            "healthy": words[row.get("healthy")],
            "kept_epoch": (row.get("validation") or {}).get("epoch"),
            "score": (row.get("validation") or {}).get("score"),
        }
        for row in report.seeds
    ]
    rows.append({"seed": "median", **{name: report.summary.get(name) for name in _METRICS}})
    rows.append({"seed": "MAD", **{name: report.summary.get(f"{name}_mad") for name in _METRICS}})
    return rows


def _training(workspace: Workspace, report: StoredReconstruction) -> None:
    left, right = st.columns(2)
    left.subheader("Lyapunov spectra")
    if any(row["lyapunov_spectrum"] for row in report.seeds):
        left.plotly_chart(charts.lyapunov_chart(report.seeds), width="stretch", key="lyapunov")
    else:
        left.caption("No seed has exponents: all failed before, or the map is a deep one.")
    right.subheader("Training")
    try:
        traces = catalog_dynamics.load_traces(workspace, report.id, [row["seed"] for row in report.seeds])
    except TsforgeError as error:
        right.error(f"**The training cannot be drawn.** {plain(error)}", icon=":material/error:")
        return
    there = [name for name in _TRACES if traces[name].is_not_null().any()]
    if not there:
        right.caption("Nothing of the training was stored.")
        return
    names = {name: _TRACES[name][0] for name in there}
    chosen = choose("Figure", there, "figure", names=names, where=right)
    title, logarithmic = _TRACES[chosen]
    drawn = charts.trace_chart(traces, figure_of=chosen, title=title, logarithmic=logarithmic)
    right.plotly_chart(drawn, width="stretch", key="trace")
