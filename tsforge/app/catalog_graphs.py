"""Graphs that fitted models learnt among variates, and how much of them other seeds learnt too; for the dashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from tsforge.app.catalog import list_artifacts
from tsforge.core.errors import ArtifactError, listing
from tsforge.core.workspace import Workspace

TABLE = "evolution.parquet"
EPOCHS = "evolution_epochs.parquet"
WEIGHTS = "evolution_weights"
_APART = ("tracking", "calibration", "log_graphs")  # parts of a config that do not decide the weights
_COLUMNS = {"run", "layer", "matrix", "row", "column", "value"}


def list_graphs(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a fitted model with a stored graph, newest first."""
    return [record for record in list_artifacts(workspace) if (workspace.artifacts / record["id"] / TABLE).is_file()]


def graph_table(workspace: Workspace, artifact: str) -> pl.DataFrame:
    """Return every cell of a model's graphs: ``run, layer, matrix, row, column, value``; rows and columns are variates.

    Raises:
        ArtifactError: the model has no graph, or its table cannot be read.
    """
    place = workspace.artifacts / artifact / TABLE
    if not place.is_file():
        known = [record["id"] for record in list_graphs(workspace)]
        raise ArtifactError(f"artifact '{artifact}' has no graph (with one: {listing(known) or 'none'})")
    return _read(place, _COLUMNS)


def graph_epochs(workspace: Workspace, artifact: str) -> pl.DataFrame:
    """Return the graphs of a model as they were after epochs of its training, ``run, epoch, layer, matrix, row, column,
    value``; empty where the fit kept none (``log_graphs``).

    Raises:
        ArtifactError: the table cannot be read.
    """
    place = workspace.artifacts / artifact / EPOCHS
    columns = {**dict.fromkeys(("run", "layer", "matrix", "row", "column"), pl.String), "epoch": pl.Int64}
    if not place.is_file():
        return pl.DataFrame(schema={**columns, "value": pl.Float64})
    return _read(place, _COLUMNS | {"epoch"})


def _read(place: Path, columns: set[str]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(place)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{place} cannot be read ({error}); fit again") from error
    lacking = columns - set(table.columns)
    if lacking:
        raise ArtifactError(f"{place} lacks the column(s) {listing(sorted(lacking))}; fit again")
    return table


def sibling_graphs(workspace: Workspace, artifact: str) -> pl.DataFrame:
    """Return the graphs of all models that differ from this one in their seed only, itself among them."""
    mine = _identity(workspace.artifacts / artifact)
    alike = [
        record["id"]
        for record in list_graphs(workspace)
        if record["id"] == artifact or (mine is not None and _identity(workspace.artifacts / record["id"]) == mine)
    ]
    newest: dict[Any, str] = {}  # a seed that was fitted twice gave the same weights twice
    for name in [artifact, *alike]:
        newest.setdefault(_seed(workspace.artifacts / name), name)
    return pl.concat([graph_table(workspace, name) for name in newest.values()])


def graph_stability(tables: pl.DataFrame) -> pl.DataFrame:
    """Return ``layer, matrix, row, column, mean, sd, same_sign, seeds`` over the runs of ``sibling_graphs``.

    ``same_sign`` is the share of runs with the sign of the mean; ``sd`` is null for a single run.
    """
    keys = ["layer", "matrix", "row", "column"]
    with_mean = tables.with_columns(pl.col("value").mean().over(keys).alias("mean"))
    return with_mean.group_by(keys, maintain_order=True).agg(
        pl.col("mean").first(),
        pl.col("value").std().alias("sd"),
        (pl.col("value").sign() == pl.col("mean").sign()).mean().alias("same_sign"),
        pl.len().alias("seeds"),
    )


def _identity(path: Path) -> dict[str, Any] | None:
    """Return what decides the weights but the seed; None where it cannot be read."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_bytes())
        provenance = json.loads((path / "provenance.json").read_bytes())
        kept = {name: part for name, part in config.items() if name not in _APART}
        kept["train"] = {name: value for name, value in config["train"].items() if name != "seed"}
        return {**kept, "data_fingerprint": provenance.get("data_fingerprint")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _seed(path: Path) -> Any:
    try:
        return yaml.safe_load((path / "config.yaml").read_bytes())["train"]["seed"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return path.name
