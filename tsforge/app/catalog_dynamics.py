"""Read-only questions about stored reconstructions (``tsforge reconstruct``), without loading a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from tsforge.core.errors import BackendError, listing
from tsforge.core.workspace import Workspace

FOLDER = "reconstruct"
TRACES = ("loss", "alpha", "kappa", "gradient_norm", "max_abs_A", "validation")
_AGAIN = "run the same tsforge reconstruct again with refresh=true"


@dataclass(frozen=True, kw_only=True)
class StoredReconstruction:
    """All seeds of a reconstruction.

    Attributes:
        summary: medians (``d_stsp``), deviations (``d_stsp_mad``), shares and notes over the seeds.
        seeds: one record a seed: metrics, ``failed``, ``healthy``, ``warnings``, ``lyapunov_spectrum``, ``findings``.
        columns: the N variates.
        definition: how the metrics were computed.
        inputs: the K columns that drive the system.
        expected: what the data were said to do in the long run (``evaluation.expected``); None where nobody said.
        loc, scale: (N,) latent unit i of an identity read-out is (variate i - loc) / scale; None where the result does
            not say so or the read-out is another one. Needed for results whose cycles lack ``observed``.
    """

    id: str
    summary: dict[str, Any]
    seeds: list[dict[str, Any]]
    columns: tuple[str, ...]
    definition: dict[str, Any]
    inputs: tuple[str, ...]
    expected: str | None
    loc: tuple[float, ...] | None
    scale: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class StoredSeed:
    """Tables of one seed.

    Attributes:
        trajectory: ``kind`` (data, free_run), ``step`` and the variates in the units of the data.
        spectra: ``variate, frequency, data, free_run``; shares of power.
    """

    trajectory: pl.DataFrame
    spectra: pl.DataFrame


def seed_rank(row: dict[str, Any]) -> tuple[bool, bool, float, float]:
    """Return what seeds are sorted by, best first: not failed, healthy, least captured (in steps of 1 %), D_stsp.

    D_stsp alone would prefer a model that loses free runs to a spurious fixed point, which one long run may not meet.
    A seed that was validated is ranked without the test series: its score takes the place of D_stsp, none counts as
    failed, and what is healthy and captured was found from the validation rows.
    """
    captured, validation = row.get("captured"), row.get("validation")
    lost = round(1.0 if captured is None else float(captured), 2)
    if validation is not None:
        value, failed = validation["score"], False
    else:
        value, failed = row.get("d_stsp"), bool(row.get("failed"))
    return failed or value is None, not row.get("healthy"), lost, float(value or 0.0)


def list_reconstructions(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a reconstruction, newest first: ``id, name, data, seeds, created``; no damaged one."""
    records = [record for place in _places(workspace) if (record := _record(place)) is not None]
    return sorted(records, key=lambda record: (record["created"], record["id"]), reverse=True)


def damaged_reconstructions(workspace: Workspace) -> list[str]:
    """Return the folders whose ``result.json`` is there but cannot be used."""
    return sorted(place.parent.name for place in _places(workspace) if _record(place) is None)


def load_reconstruction(workspace: Workspace, name: str) -> StoredReconstruction:
    """Return a reconstruction of ``list_reconstructions`` by its id.

    Raises:
        BackendError: it is not here, or damaged.
    """
    place = workspace.reports / FOLDER / name / "result.json"
    if Path(name).name != name or not place.is_file():
        known = listing([record["id"] for record in list_reconstructions(workspace)])
        raise BackendError(
            f"no reconstruction '{name}' in this workspace (known: {known or 'none'}); it may have been removed"
        )
    try:
        document = json.loads(place.read_bytes())
        seeds = [
            {
                **row,
                "seed": int(row["seed"]),
                "warnings": list(row["warnings"]),
                "lyapunov_spectrum": [float(value) for value in row["lyapunov_spectrum"]],
                "findings": dict(row["findings"]),
            }
            for row in document["seeds"]
        ]
        columns = tuple(str(column) for column in document["columns"])
        loc, scale = _scaling(document.get("observation"), len(columns))
        return StoredReconstruction(
            id=name,
            summary=dict(document["summary"]),
            seeds=seeds,
            columns=columns,
            definition=dict(document["definition"]),
            inputs=tuple(str(item["name"]) for item in document.get("inputs", [])),
            expected=_expected(place.with_name("config.yaml")),
            loc=loc,
            scale=scale,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"reconstruction {place.parent} is damaged ({error!r}); {_AGAIN}") from error


def _expected(settings: Path) -> str | None:
    """Return what a config file says that the data do in the long run, None where it does not, or is gone."""
    try:
        expected = yaml.safe_load(settings.read_text(encoding="utf-8"))["evaluation"]["expected"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return None if expected is None else str(expected)


def load_seed(workspace: Workspace, name: str, seed: int) -> StoredSeed:
    """Return the tables of one seed of a reconstruction.

    Raises:
        BackendError: they are not here, or damaged.
    """
    columns = load_reconstruction(workspace, name).columns
    folder = workspace.reports / FOLDER / name / "seeds" / str(seed)
    return StoredSeed(
        trajectory=_table(folder / "trajectory.parquet", ("kind", "step", *columns)),
        spectra=_table(folder / "spectra.parquet", ("variate", "frequency", "data", "free_run")),
    )


def load_traces(workspace: Workspace, name: str, seeds: Sequence[int]) -> pl.DataFrame:
    """Return ``epoch``, ``TRACES`` and ``seed`` of the training of several seeds; null where a figure was not traced.

    Raises:
        BackendError: one is not here, or damaged.
    """
    folder = workspace.reports / FOLDER / name / "seeds"
    schema: dict[str, Any] = {"epoch": pl.Int64, **dict.fromkeys(TRACES, pl.Float64), "seed": pl.Int64}
    tables = []
    for seed in seeds:
        table = _table(folder / str(seed) / "trace.parquet", ("epoch", "loss", "alpha"), TRACES)
        place = folder / str(seed) / "validation.parquet"
        if place.exists():
            looked = _table(place, ("epoch", "score")).rename({"score": "validation"})
            table = table.join(looked, on="epoch", how="full", coalesce=True).sort("epoch")
        tables.append(table.with_columns(seed=pl.lit(seed)))
    return pl.concat([pl.DataFrame(schema=schema), *tables], how="diagonal_relaxed")


def cycle_table(report: StoredReconstruction, seed: int) -> pl.DataFrame:
    """Return one row a point of each fixed point and cycle found for a seed.

    Columns: ``cycle`` (number), ``period, kind, modulus, on_data, distance, captured, latent`` (the point as text) and
    the variates in the units of the data, as the read-out shows the point; null in an older result of an affine one.

    Raises:
        BackendError: the findings of the seed are damaged.
    """
    row = next(row for row in report.seeds if row["seed"] == seed)
    schema: dict[str, Any] = {"cycle": pl.Int64, "period": pl.Int64, "kind": pl.String}
    schema |= dict.fromkeys(("modulus", "distance", "captured"), pl.Float64)
    schema |= {"on_data": pl.Boolean, "latent": pl.String, **dict.fromkeys(report.columns, pl.Float64)}
    rows = []
    try:
        for number, cycle in enumerate(row["findings"].get("cycles", []), start=1):
            shown = {name: cycle[name] for name in ("period", "kind", "modulus", "on_data", "distance", "captured")}
            points = cycle["points"]
            seen = cycle.get("observed")
            places = (
                [_observed(report, point) for point in points]
                if seen is None
                else [dict(zip(report.columns, place, strict=True)) for place in seen]
            )
            rows += [
                {"cycle": number, **shown, "latent": _text(point), **place}
                for point, place in zip(points, places, strict=True)
            ]
        return pl.DataFrame(rows, schema=schema)
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"the findings of seed {seed} of {report.id} are damaged ({error!r}); {_AGAIN}") from error


def _text(point: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in point[:6]) + (", ..." if len(point) > 6 else "")


def _observed(report: StoredReconstruction, point: Sequence[float]) -> dict[str, float | None]:
    if report.loc is None or report.scale is None:
        return dict.fromkeys(report.columns)
    parts = zip(report.columns, point, report.loc, report.scale, strict=False)  # further units are not observed
    return {name: value * scale + loc for name, value, loc, scale in parts}


def _scaling(facts: Any, variates: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if facts is None or facts["kind"] != "identity":
        return None, None
    loc, scale = (tuple(float(value) for value in facts[name]) for name in ("loc", "scale"))
    if len(loc) != variates or len(scale) != variates:
        raise ValueError(f"loc and scale of {len(loc)} and {len(scale)} values for {variates} variates")
    return loc, scale


def _table(place: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pl.DataFrame:
    """Return these columns, and those of the optional ones that are there."""
    try:
        table = pl.read_parquet(place)
        return table.select(*columns, *(name for name in optional if name in table.columns and name not in columns))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BackendError(f"{place} is damaged ({error}); {_AGAIN}") from error


def _places(workspace: Workspace) -> list[Path]:
    return list((workspace.reports / FOLDER).glob("*/result.json"))


def _record(place: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(place.read_bytes())
        facts = document["summary"]
        return {
            "id": place.parent.name,
            **{name: facts[name] for name in ("name", "data", "seeds")},
            "created": datetime.fromisoformat(document["created"]),
        }
    except (OSError, KeyError, TypeError, ValueError):
        return None
