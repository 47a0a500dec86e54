"""What a study found: every trial, the best one, and which settings mattered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

TrialState = Literal["complete", "pruned", "failed", "interrupted", "running", "waiting"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: 0-based, in the order of starting.
        state: ``interrupted`` trials are tried again under a new number and count for nothing.
        value: the metric, None unless complete (or pruned: the last report).
        values: dotted field -> value tried.
        seconds: wall time.
        num_reports: intermediate values seen.
        error: why it failed or was stopped.
        notes: whatever the objective noted (run id, artifact id).
    """

    number: int
    state: TrialState
    value: float | None
    values: dict[str, Any]
    seconds: float | None
    num_reports: int
    error: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Outcome of a study.

    Attributes:
        name, metric, direction: of the study.
        trials: in the order of starting, earlier sessions included.
        best: the best complete trial.
        importance: share of each field in the variation of the metric (functional ANOVA), largest first; empty with
            too few trials or no variation.
        storage: SQLite file of the study.
        best_config: YAML file with the best configuration, once written.
        was_timed_out: the time ran out before the wanted number of trials.
    """

    name: str
    metric: str
    direction: str
    trials: tuple[TrialRecord, ...]
    best: TrialRecord
    importance: dict[str, float]
    storage: Path
    best_config: Path | None = None
    was_timed_out: bool = False

    def summary(self) -> dict[str, Any]:
        """Return the facts a person wants first."""
        counts = Counter(trial.state for trial in self.trials)
        facts: dict[str, Any] = {
            "study": self.name,
            "trials": ", ".join(f"{count} {state}" for state, count in sorted(counts.items())),
            f"best {self.metric}": self.best.value,
            "best trial": self.best.number,
            **{f"best {name}": value for name, value in self.best.values.items()},
        }
        if self.importance:
            facts["importance"] = ", ".join(f"{name} {share:.2f}" for name, share in self.importance.items())
        if self.was_timed_out:
            facts["note"] = "stopped by the time limit; run it again to continue"
        facts["best config"] = str(self.best_config) if self.best_config else None
        facts["storage"] = str(self.storage)
        return facts

    def rows(self) -> list[dict[str, Any]]:
        """Return one record a trial for a table."""
        return [
            {
                "trial": trial.number,
                "state": trial.state,
                self.metric: trial.value,
                **trial.values,
                "seconds": trial.seconds,
                "error": trial.error,
            }
            for trial in self.trials
        ]

    def history(self) -> pl.DataFrame:
        """Return ``trial, state, value, best`` (best complete value so far), one row a trial, and the values tried."""
        best: float | None = None
        smaller = self.direction == "minimize"
        rows = []
        for trial in self.trials:
            if trial.state == "complete" and trial.value is not None:
                better = best is None or (trial.value < best if smaller else trial.value > best)
                best = trial.value if better else best
            shown = {
                name: value if isinstance(value, int | float | str) or value is None else str(value)
                for name, value in trial.values.items()
            }
            rows.append({"trial": trial.number, "state": trial.state, "value": trial.value, "best": best, **shown})
        return pl.DataFrame(rows, infer_schema_length=None, strict=False)
