"""What a backtest leaves behind: tables, a JSON summary and a page to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tsforge.core.atomic import atomic_directory
from tsforge.core.errors import BackendError, DataError, listing
from tsforge.core.markdown import as_text
from tsforge.forecasting.backtest_cold_page import cold_sections
from tsforge.forecasting.report_quality import quality_sections
from tsforge.metrics.summary import SCOPES

_TABLES = ("forecasts", "metrics", "leaderboard", "folds", "tests", "pit", "regimes", "regime_labels")
_ERRORS = ("mase", "mae", "rmse", "smape", "wql", "crps")
_SHOWN = ("model", "mean_rank", *_ERRORS, "skill_mae", "win_share", "p_dm", "p_wilcoxon")
_PAIRS = (
    "model",
    "difference",
    "dm_statistic",
    "dm_p",
    "dm_p_holm",
    "cutoffs",
    "wilcoxon_p",
    "wilcoxon_p_holm",
    "units",
)
_WORST = 10  # series on the page


@dataclass(frozen=True, kw_only=True)
class BacktestReport:
    """A finished backtest.

    Attributes:
        forecasts: long: ``model, series_id, cutoff, step, time, variate, mean, q..., actual``.
        metrics: long: ``model, scope, series_id, variate, step, cutoff, metric, value, count``; dimensions that a scope
            averages over are null.
        leaderboard: one row a model, best mean rank first: overall metrics, ``skill_*`` (1 - ours / reference), ranks
            and wins over series, variates and cutoffs, ``p_dm`` and ``p_wilcoxon`` (against the reference, adjusted
            over models), seconds.
        folds: one row a fit: model, cutoff, artifact id, seconds, ``energy, variogram`` of the joint forecast and, with
            independent steps, ``*_apart`` (see ``sample_paths.joint_scores``).
        tests: one row a pair of models, see ``comparison.Comparison``.
        pit: ``model`` and the columns of ``metrics.pit.pit_table``.
        regimes: ``model, kind, regime``, the metrics there and ``skill_*`` against the reference there.
        regime_labels: ``series_id, variate, cutoff, kind, regime`` of the regimes that history decides.
        settings: the config with everything it left open filled in.
        notes: what was left out.
    """

    forecasts: pl.DataFrame
    metrics: pl.DataFrame
    leaderboard: pl.DataFrame
    folds: pl.DataFrame
    tests: pl.DataFrame
    pit: pl.DataFrame
    regimes: pl.DataFrame
    regime_labels: pl.DataFrame
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
            "worst_series": self.worst_series(most=3).to_dicts(),
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

    def worst_series(self, model: str | None = None, *, most: int | None = None) -> pl.DataFrame:
        """Return ``series_id, count, mae, reference_mae, skill_mae``, the series with least skill first.

        Args:
            model: default the model of the backtest.
            most: rows; default all. Series whose skill is undefined (the reference makes no error) come last.

        Raises:
            DataError: no such model.
        """
        name = model or self.settings["model"]
        if name not in self.leaderboard["model"]:
            raise DataError(f"no model '{name}' in this report; it has {listing(self.leaderboard['model'], 20)}")
        return worst_first(self.metrics, name, self.settings["reference"], most=most)

    def markdown(self) -> str:
        """Return the report as a page: settings, leaderboard, tests, errors by step, variate, regime; worst series."""
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
            *self._tests_page(),
        ]
        for title, text, table in (*cold_sections(settings), *quality_sections(self.pit, self.leaderboard)):
            lines += ["", f"## {title}", "", text, "", _markdown_table(table)]
        for scope, column in (("step", "step"), ("variate", "variate")):
            lines += ["", f"## Mean absolute error by {column}", "", _markdown_table(self._pivot(scope, column))]
        for (kind,), rows in self.regimes.group_by("kind", maintain_order=True):
            wide = rows.pivot(on="model", index="regime", values="mae", maintain_order=True)
            cells = rows.filter(model=settings["model"]).select("regime", cells="count")
            joined = _markdown_table(cells.join(wide, on="regime", maintain_order="left"))
            lines += ["", f"## Mean absolute error by regime: {kind}", "", joined]
        worst = self.worst_series(most=_WORST)
        model, reference = as_text(settings["model"]), as_text(settings["reference"])
        title = f"## Worst series of {model}, by skill against {reference}"
        if model == reference:
            title = f"## Series of {model}"
        lines += ["", title, "", _markdown_table(worst)]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def _tests_page(self) -> list[str]:
        facts = self.settings["comparison"]
        lines = ["", "## Are the differences more than chance?", ""]
        lines += [
            f"Loss: {facts['loss']}. Diebold-Mariano over cutoffs (differences averaged over series, Bartlett kernel); "
            f"signed ranks over {facts['units']} units ({facts['unit']}). The p-values marked Holm, and those of the "
            "leaderboard, are adjusted for the number of models. The best model was chosen by the same data."
        ]
        ranks = facts["ranks"]
        if ranks["friedman_p"] is not None:
            lines += [
                "",
                f"Friedman's test that all models rank alike: p = {_cell(ranks['friedman_p'])}; mean ranks differ when "
                f"they are {_cell(ranks['critical_difference'])} apart (Nemenyi, 5 %).",
            ]
        for (other,), rows in self.tests.group_by("against", maintain_order=True):
            lines += ["", f"### Against {as_text(other)}", "", _markdown_table(rows.select(_PAIRS))]
        return lines

    def _pivot(self, scope: str, column: str) -> pl.DataFrame:
        rows = self.metrics.filter(pl.col("scope") == scope, pl.col("metric") == "mae")
        return rows.pivot(on="model", index=column, values="value", maintain_order=True).sort(column)

    def save(self, directory: Path) -> BacktestReport:
        """Write the folder whole or not at all and return the report with its path.

        ``report.json`` holds null for numbers that JSON has not (infinite, undefined); the tables keep them.

        Raises:
            BackendError: the folder exists, is read-only, or the disk is full.
        """
        with atomic_directory(directory) as temporary:
            for name in _TABLES:
                getattr(self, name).write_parquet(temporary / f"{name}.parquet")
            document = {
                "settings": dict(self.settings),
                "notes": list(self.notes),
                "leaderboard": self.rows(),
                "tests": self.tests.to_dicts(),
                "worst_series": self.worst_series(most=_WORST).to_dicts(),
            }
            text = json.dumps(_finite(document), indent=1, default=str, allow_nan=False)
            (temporary / "report.json").write_text(text)
            (temporary / "report.md").write_text(self.markdown())
        return BacktestReport(**{**_fields(self), "path": Path(directory)})


def worst_first(
    metrics: pl.DataFrame, model: str, reference: str, *, metric: str = "mae", most: int | None = None
) -> pl.DataFrame:
    """Return ``series_id, count``, the metric of both models and their skill, the series with least skill first.

    Args:
        metrics: of a report.
        model, reference: what is measured, and against what.
        metric: an error of ``metrics``; names the columns.
        most: rows; default all. Series whose skill is undefined come last.
    """
    rows = metrics.filter(scope="series", metric=metric)
    ours = rows.filter(model=model).select("series_id", "count", pl.col("value").alias(metric))
    theirs = rows.filter(model=reference).select("series_id", pl.col("value").alias(f"reference_{metric}"))
    base = pl.col(f"reference_{metric}")
    skill = pl.when(base > 0).then(1.0 - pl.col(metric) / base).alias(f"skill_{metric}")
    table = ours.join(theirs, on="series_id").with_columns(skill)
    order = [f"skill_{metric}", metric, "series_id"]
    ordered = table.sort(order, descending=[False, True, False], nulls_last=True)
    return ordered if most is None else ordered.head(most)


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


def _finite(value: Any) -> Any:
    """Return mappings and lists as they are, with None for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown_table(table: pl.DataFrame) -> str:
    """Return a table in Markdown, numbers with four significant digits, names as they are whatever they hold."""
    rows = [" | ".join(map(as_text, table.columns)), " | ".join("---" for _ in table.columns)]
    rows += [" | ".join(_cell(value) for value in row) for row in table.iter_rows()]
    return "\n".join(f"| {row} |" for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
