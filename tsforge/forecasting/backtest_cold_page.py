"""Page of a backtest report about cold start: errors by rows of history, beside those of models that know more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tsforge.forecasting.report_quality import Section

FULL = "all"
NAIVE = "naive"
_SHOWN = ("mae", "mase", "crps")
_TEXT = (
    "New series: the model was fitted on other series and sees as many rows of them. `of_known` is the mean absolute "
    "error in multiples of that of the model that was fitted on these series too and has their whole history, "
    "`of_full` of that of the model that has the history but was fitted without them, `of_naive` of a naive forecast "
    "from the same rows (without rows: the mean of the naive forecasts of the other series)."
)


def cold_name(model: str, rows: int | str) -> str:
    """Return the name under which a model stands in a report that has so many rows of a new series."""
    return f"{model}@{rows}"


def cold_records(leaderboard: pl.DataFrame, models: Sequence[str], rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return one record a model and K, ``rows`` "all" last: errors and their ratios ``of_known, of_full, of_naive``.

    Args:
        leaderboard: of the report; all its numbers rest on the same cells.
        models: names of the fits.
        rows: rows of history K.
    """
    found = {row["model"]: row for row in leaderboard.to_dicts()}
    widest = max(
        (name for name in leaderboard.columns if name.startswith("coverage_")),
        key=lambda name: float(name.removeprefix("coverage_")),
        default=None,
    )
    records = []
    for model in models:
        known, full = found[model], found[cold_name(model, FULL)]
        for kept in (*(str(one) for one in rows), FULL):
            ours, naive = found[cold_name(model, kept)], found.get(cold_name(NAIVE, kept))
            record = {"model": model, "rows": kept, "cells": ours["count"]}
            record |= {name: ours[name] for name in (*_SHOWN, widest) if name in ours}
            record |= {"of_known": _ratio(ours, known), "of_full": _ratio(ours, full), "of_naive": _ratio(ours, naive)}
            records.append(record)
    return records


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> float | None:
    return None if theirs is None or not theirs["mae"] else ours["mae"] / theirs["mae"]


def cold_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line for each model and K."""
    notes = []
    for row in records:
        if row["rows"] == FULL:
            continue
        parts = [
            f"{row[name]:.3g} times that of {whose}"
            for name, whose in (
                ("of_known", "the model that knows the series"),
                ("of_full", "the model with all rows"),
                ("of_naive", f"{cold_name(NAIVE, row['rows'])}"),
            )
            if row[name] is not None
        ]
        notes.append(
            f"cold start, {row['model']} with {row['rows']} rows of a new series: mean absolute error "
            f"{row['mae']:.4g}, {', '.join(parts)} ({row['cells']} cells)"
        )
    return notes


def cold_sections(settings: Mapping[str, Any]) -> list[Section]:
    """Return the section about cold start, none for a backtest without it."""
    records = settings.get("cold_start_rows")
    if not records:
        return []
    return [("Cold start", _TEXT, pl.DataFrame(records, infer_schema_length=None))]
