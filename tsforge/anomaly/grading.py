"""How good a detection was where labels exist: by kind of anomaly, with chance beside the numbers that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from tsforge.anomaly.preparation import points_per_day
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.core.errors import DataError, listing
from tsforge.data.grid import TimeGrid
from tsforge.metrics.anomaly import auc_pr, detection_delays, event_score

LABEL_COLUMNS = ("series_id", "start", "end", "kind", "variates")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """A detection graded against labels; rows are those of the report that have a score or lie inside a label.

    Attributes:
        kinds: one row a kind and one for ``all``: ``kind, labelled, found, recall, median_delay`` (rows from the
            start of the anomaly to the first reported row in it), ``scorable`` (those with at least one scored row),
            ``right_variate`` (share of found ones whose first-ranked variate is among the labelled).
        overall: event precision, plain and penalised, false events a day and series, share of anomalous rows, AUC-PR of
            the joint score and its chance level, right_variate_chance.
    """

    kinds: pl.DataFrame
    overall: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """Return one record a kind."""
        return self.kinds.to_dicts()


def grade(report: AnomalyReport, labels: pl.DataFrame, grid: TimeGrid) -> Grade:
    """Return the grade of a report against labelled anomalies of the same series; labels outside its rows are left out.

    Args:
        report: with the scored rows of every series.
        labels: ``series_id, start, end`` (included), ``kind, variates`` (list).
        grid: of the data, for the clock.

    Raises:
        DataError: a label column is missing, or no label lies in the scored rows.
    """
    missing = [name for name in LABEL_COLUMNS if name not in labels.columns]
    if missing:
        raise DataError(f"labels lack the column(s) {listing(missing)}; they need {listing(LABEL_COLUMNS)}")
    found: list[dict[str, Any]] = []
    masks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    joint = report.scores.table.filter(pl.col("variate") == JOINT)
    for (series,), scores in joint.group_by("series_id", maintain_order=True):
        mine = labels.filter(pl.col("series_id") == series)
        events = report.events.filter(pl.col("series_id") == series)
        found += _found(scores, mine, events)
        masks.append(_masks(scores, mine, events))
    if not found:
        raise DataError(f"none of {labels.height} labels lies in the scored rows; nothing can be graded")
    table = pl.DataFrame(found, infer_schema_length=None)
    kinds = [_summary(kind, table.filter(pl.col("kind") == kind)) for kind in sorted(set(table["kind"]))]
    summary = pl.DataFrame([*kinds, _summary("all", table)], infer_schema_length=None)
    return Grade(kinds=summary, overall=_overall(masks, table, report, points_per_day(grid)))


def _rows(times: pl.Series, start: Any, end: Any) -> tuple[int, int]:
    """Return [first, last + 1) of the rows from start to end, both included."""
    return int((times < start).sum()), int((times <= end).sum())


def _found(scores: pl.DataFrame, labels: pl.DataFrame, events: pl.DataFrame) -> list[dict[str, Any]]:
    """Return one record per label inside the scored rows."""
    times = scores["time"]
    records = []
    for label in labels.iter_rows(named=True):
        first, last = _rows(times, label["start"], label["end"])
        if last <= first:
            continue
        touching = events.filter((pl.col("end") >= label["start"]) & (pl.col("start") <= label["end"])).sort("start")
        delay, is_right = None, None
        if touching.height:
            delay = max(int((times < touching["start"][0]).sum()) - first, 0)
            strongest = touching.sort("peak_score", descending=True)["variates"][0]
            is_right = bool(len(strongest)) and strongest[0]["variate"] in label["variates"]
        records.append(
            {
                "kind": label["kind"],
                "found": bool(touching.height),
                "delay": delay,
                "scorable": scores["score"][first:last].null_count() < last - first,
                "right": is_right,
                "num_variates": len(label["variates"]),
            }
        )
    return records


def _masks(scores: pl.DataFrame, labels: pl.DataFrame, events: pl.DataFrame) -> tuple[Any, Any, Any]:
    """Return labels, predictions and scores [N] of one series' rows."""
    times = scores["time"]
    flags = [np.zeros(scores.height, dtype=bool), np.zeros(scores.height, dtype=bool)]
    for flag, table in zip(flags, (labels, events), strict=True):
        for start, end in table.select("start", "end").iter_rows():
            first, last = _rows(times, start, end)
            flag[first:last] = True
    return flags[0], flags[1], scores["score"].fill_null(np.nan).to_numpy()


def _summary(kind: str, table: pl.DataFrame) -> dict[str, Any]:
    hits = table.filter(pl.col("found"))
    return {
        "kind": kind,
        "labelled": table.height,
        "scorable": int(table["scorable"].sum()),
        "found": hits.height,
        "recall": hits.height / table.height,
        "median_delay": None if hits.is_empty() else float(np.median(hits["delay"].to_numpy())),
        "right_variate": None if hits.is_empty() else float(np.mean(hits["right"].to_numpy())),
    }


def _overall(
    masks: list[tuple[Any, Any, Any]], table: pl.DataFrame, report: AnomalyReport, per_day: float | None
) -> dict[str, Any]:
    """Return numbers over all series; a normal row between series keeps events apart."""
    gap = (np.zeros(1, dtype=bool), np.zeros(1, dtype=bool), np.full(1, np.nan))
    parts = [part for mask in masks for part in (mask, gap)]
    labels, predictions, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    events = event_score(labels, predictions)
    scored = ~np.isnan(scores)
    delays = detection_delays(labels, predictions)
    both = labels[scored].any() and not labels[scored].all()
    rows = len(labels) - len(masks)
    width = len(report.scores.table["variate"].unique()) - 1
    return {
        "event_recall": events.recall,
        "event_precision": events.precision,
        "event_precision_penalised": events.penalised_precision,
        "event_f1": events.f1,
        "median_delay_rows": float(np.nanmedian(delays)) if events.found else None,
        "false_events": events.false_segments,
        "false_events_per_day_and_series": None if per_day is None else events.false_segments / rows * per_day,
        "auc_pr": auc_pr(labels[scored], scores[scored]) if both else None,
        "auc_pr_chance": float(labels[scored].mean()),
        "right_variate_chance": float(np.mean(table["num_variates"].to_numpy()) / width) if width else None,
    }
