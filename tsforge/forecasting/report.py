"""What a backtest leaves behind: tables, a JSON summary and a page to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.core.atomic import atomic_directory
from tsforge.core.errors import BackendError, DataError, listing
from tsforge.metrics.summary import SCOPES

_TABLES = ("forecasts", "metrics", "leaderboard", "folds")
_SHOWN = ("model", "mean_rank", "mase", "mae", "rmse", "smape", "wql", "crps", "skill_mae", "win_share", "p_value")


@dataclass(frozen=True, kw_only=True)
class BacktestReport:
    """A finished backtest.

    Attributes:
        forecasts: long: ``model, series_id, cutoff, step, time, variate, mean, q..., actual``.
        metrics: long: ``model, scope, series_id, variate, step, cutoff, metric, value, count``; dimensions that a scope
            averages over are null.
        leaderboard: one row a model, best mean rank first: overall metrics, ``skill_*`` (1 - ours / reference), ranks
            and wins over series, variates and cutoffs, ``p_value`` (signed ranks, against the reference), seconds.
        folds: one row a fit: model, cutoff, artifact id, seconds.
        settings: the config with everything it left open filled in.
        notes: what was left out.
    """

    forecasts: pl.DataFrame
    metrics: pl.DataFrame
    leaderboard: pl.DataFrame
    folds: pl.DataFrame
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    path: Path | None = None

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        best = self.leaderboard.row(0, named=True)
        return {
            "best": best["model"],
            "cells": best["count"],
            "cutoffs": len(self.settings["cutoffs"]),
            "horizon": self.settings["horizon"],
            "season_length": self.settings["season_length"],
            "reference": self.settings["reference"],
            "notes": list(self.notes),
            "path": None if self.path is None else str(self.path),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one record a model, best first."""
        return self.leaderboard.select(self._columns()).to_dicts()

    def _columns(self) -> list[str]:
        covered = [name for name in self.leaderboard.columns if name.startswith("coverage_")]
        widest = sorted(covered, key=lambda name: -float(name.removeprefix("coverage_")))[:1]
        shown = [name for name in _SHOWN if name in self.leaderboard.columns]
        return [*shown, *widest, "fit_seconds", "predict_seconds"]

    def by(self, scope: str) -> pl.DataFrame:
        """Return the metrics of a scope (``step``, ``series``, ``variate`` ...) wide: model, dimensions, metrics.

        Raises:
            DataError: there is no such scope.
        """
        if scope not in SCOPES:
            raise DataError(f"a report has no scope '{scope}'; it has {listing(SCOPES, 10)}")
        index = ["model", *SCOPES[scope]]
        rows = self.metrics.filter(pl.col("scope") == scope)
        return rows.pivot(on="metric", index=index, values="value", maintain_order=True).sort(index)

    def markdown(self) -> str:
        """Return the report as a page: settings, leaderboard, errors by step and by variate."""
        settings = self.settings
        cutoffs = settings["cutoffs"]
        lines = [
            "# Backtest",
            "",
            f"{len(cutoffs)} cutoffs from {cutoffs[0]} to {cutoffs[-1]}, horizon {settings['horizon']}, season "
            f"{settings['season_length']}, refit every {settings['refit_every'] or len(cutoffs)} cutoffs. Skill is "
            f"1 - error / error of `{settings['reference']}`; ranks are over series, variates and cutoffs.",
            "",
            _markdown_table(self.leaderboard.select(self._columns())),
        ]
        for scope, column in (("step", "step"), ("variate", "variate")):
            lines += ["", f"## Mean absolute error by {column}", "", _markdown_table(self._pivot(scope, column))]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def _pivot(self, scope: str, column: str) -> pl.DataFrame:
        rows = self.metrics.filter(pl.col("scope") == scope, pl.col("metric") == "mae")
        return rows.pivot(on="model", index=column, values="value", maintain_order=True).sort(column)

    def save(self, directory: Path) -> BacktestReport:
        """Write the folder whole or not at all and return the report with its path.

        Raises:
            BackendError: the folder exists, is read-only, or the disk is full.
        """
        with atomic_directory(directory) as temporary:
            for name in _TABLES:
                getattr(self, name).write_parquet(temporary / f"{name}.parquet")
            document = {"settings": dict(self.settings), "notes": list(self.notes), "leaderboard": self.rows()}
            (temporary / "report.json").write_text(json.dumps(document, indent=1, default=str))
            (temporary / "report.md").write_text(self.markdown())
        return BacktestReport(**{**_fields(self), "path": Path(directory)})


def load_report(path: Path) -> BacktestReport:
    """Return the report stored in a folder.

    Raises:
        BackendError: it is no complete report.
    """
    path = Path(path)
    missing = [
        name for name in (*(f"{table}.parquet" for table in _TABLES), "report.json") if not (path / name).is_file()
    ]
    if missing:
        raise BackendError(f"{path} is no complete backtest report: {listing(missing)} missing; run the backtest again")
    try:
        document = json.loads((path / "report.json").read_text())
        tables = {name: pl.read_parquet(path / f"{name}.parquet") for name in _TABLES}
        return BacktestReport(**tables, settings=document["settings"], notes=tuple(document["notes"]), path=path)
    except (ValueError, KeyError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"{path} is a damaged backtest report ({error}); run the backtest again") from error


def _fields(report: BacktestReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in (*_TABLES, "settings", "notes")}


def _markdown_table(table: pl.DataFrame) -> str:
    """Return a table in Markdown, numbers with four significant digits."""
    rows = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    rows += [" | ".join(_cell(value) for value in row) for row in table.iter_rows()]
    return "\n".join(f"| {row} |" for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
