"""What alarms of the anomaly benchmark are worth, pooled over series, for the deployed rule and for further ones.

Recall is found / labelled events, precision found / (found + false segments), delay the median over all found events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from tsforge.app.benchmark_report import number

PER_ROWS = 10_000.0
EVENT_FACTS = (
    *("event_precision", "event_recall", "event_f1", "false_events_per_day", "false_events_per_10k_rows"),
    *("median_delay_rows", "normal_alarm_rate"),
)
RULES_HEAD = (
    *("method", "rule", "event P", "R", "F", "false events / day", "delay (rows)", "normal rows in events", "aimed at"),
    "within 2x",
    "failed",
)
_WITHIN = 2.0


def event_facts(part: pl.DataFrame) -> dict[str, Any]:
    """Return what the rows of one method say of its events, ``EVENT_FACTS``; None where nothing can be said.

    Args:
        part: ``events, found, false_segments, rows, rows_per_day, delays, normal_rows, alarmed_normal_rows``.
    """
    facts: dict[str, Any] = dict.fromkeys(EVENT_FACTS)
    labelled = part.filter(pl.col("events") > 0)
    found, false = int(labelled["found"].sum()), int(part["false_segments"].sum())
    events, rows = int(labelled["events"].sum()), int(part["rows"].sum())
    precision = found / (found + false) if found + false else None
    recall = found / events if events else None
    facts |= {"event_precision": precision, "event_recall": recall}
    if recall is not None:
        total = (precision or 0.0) + recall
        facts["event_f1"] = 2.0 * (precision or 0.0) * recall / total if total else 0.0
    clocked = part.filter(pl.col("rows_per_day").is_not_null())
    days = float((clocked["rows"] / clocked["rows_per_day"]).sum())
    facts["false_events_per_day"] = int(clocked["false_segments"].sum()) / days if days else None
    facts["false_events_per_10k_rows"] = false / rows * PER_ROWS if rows else None
    delays = part["delays"].explode().drop_nulls().to_numpy()
    facts["median_delay_rows"] = float(np.median(delays)) if delays.size else None
    normal = int(part["normal_rows"].sum())
    facts["normal_alarm_rate"] = int(part["alarmed_normal_rows"].sum()) / normal if normal else None
    return facts


def rule_records(ruled: pl.DataFrame) -> list[dict[str, Any]]:
    """Return one record a family, method and further rule, in the order measured.

    Returns:
        Records of ``family, method, role, rule, series, failed, error`` (of the first that failed), ``EVENT_FACTS``,
        ``nominal`` (median share of rows that the rule aims at, None where it aims at something else) and ``within``
        (share of runs whose alarms on normal rows are at most twice that).
    """
    records = []
    for (family, method, rule), part in ruled.group_by("family", "method", "rule", maintain_order=True):
        ok, failed = part.filter(status="ok"), part.filter(status="failed")
        aimed = ok.filter((pl.col("nominal") > 0) & (pl.col("normal_rows") > 0))
        kept = aimed["alarmed_normal_rows"] / aimed["normal_rows"] <= _WITHIN * aimed["nominal"]
        records.append(
            {
                **{"family": family, "method": method, "role": part["role"][0], "rule": rule},
                **{"series": ok["series"].n_unique(), "failed": failed.height},
                "error": failed["error"][0] if failed.height else None,
                **event_facts(ok),
                "nominal": float(np.median(aimed["nominal"].to_numpy())) if aimed.height else None,
                "within": float(kept.to_numpy().mean()) if aimed.height else None,
            }
        )
    return records


def shown_rules(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[list[str]]:
    """Return the cells of the rules of some methods, a line a rule, under ``RULES_HEAD``."""
    return [
        [
            str(record["method"]),
            str(record["rule"]),
            *(number(record[name], 2) for name in ("event_precision", "event_recall", "event_f1")),
            false_events(record),
            number(record["median_delay_rows"], 0),
            number(record["normal_alarm_rate"], 4),
            "" if record["nominal"] is None else f"{record['nominal']:.2g}",
            "" if record["within"] is None else f"{record['within']:.0%}",
            f"{record['failed']}" if record["failed"] else "",
        ]
        for method in methods
        for record in records
        if record["method"] == method
    ]


def false_events(record: Mapping[str, Any]) -> str:
    """Return false events a day, or by rows where no clock is known."""
    per_day, per_rows = record["false_events_per_day"], record["false_events_per_10k_rows"]
    return f"{per_rows:.2f} / 10k rows" if per_day is None and per_rows is not None else number(per_day, 2)
