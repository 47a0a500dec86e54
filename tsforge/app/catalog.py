"""Read-only questions that the dashboard and the ``data`` and ``models`` commands ask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from tsforge.app.ingest import load_dataset, max_age, stored_hierarchy
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, listing
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import PREFIX
from tsforge.data.config import DataConfig
from tsforge.data.hierarchy import is_aggregate
from tsforge.data.report import data_report, vintage_report
from tsforge.data.store import SeriesStore
from tsforge.models.registry import MODELS
from tsforge.scheduling.ledger import Ledger
from tsforge.tracking.runs import Tracker
from tsforge.tracking.study import BEST_TRIAL, NOTE, OUTCOME, PRUNED, STUDY, TRIAL, TRIALS

if TYPE_CHECKING:
    from tsforge.contracts.model import ForecastModel


def list_models() -> list[dict[str, Any]]:
    """Return every registered model with its paper and what it can take; this imports all of them."""
    rows = []
    for name in MODELS.names():
        model = MODELS.get(name)
        can = model.capabilities
        takes = [kind for kind in ("known", "past", "static") if getattr(can, f"{kind}_covariates")]
        rows.append(
            {
                "model": name,
                "source": model.source,
                "fit": _fit_kind(model),
                "covariates": ", ".join(takes) or "none",
            }
        )
    return rows


def _fit_kind(model: type[ForecastModel[Any]]) -> str:
    from tsforge.contracts.tensors import DataSpec

    can = model.capabilities
    if not can.trainable:  # then it is cheap to make, and has something to fit where it has something to keep
        spec = DataSpec(context_length=16, horizon=1, num_variates=1, train_length=64)
        made = model(model.config_class(**model.test_configs[0]), spec)
        return "closed form" if made.state_dict() else "nothing to fit"
    if can.starts_closed:
        return "closed-form start, then gradient"
    return "closed form or gradient" if can.closed_form else "gradient"


def list_datasets(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a stored data set, with ``age`` of its newest row and whether that is ``stale``."""
    with _store(workspace) as store:
        records = store.datasets().to_dicts()
        for record in records:
            allowed = max_age(store.config(record["name"]))
            record["age"], record["stale"] = _age(record["end"], allowed)
    return records


def _age(end: str | None, allowed: timedelta | None) -> tuple[str, bool | None]:
    """Return how old a time is in words, and whether it exceeds ``allowed`` (None = no limit stated)."""
    try:
        moment = datetime.fromisoformat(str(end))
    except ValueError:
        return "", None
    age = datetime.now(UTC) - (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return in_words(age), None if allowed is None else age > allowed


def in_words(span: timedelta) -> str:
    """Return a span of time in its two largest units, or one: ``3 h 20 min``, ``5 d``, ``12.9 years``."""
    minutes = max(int(span.total_seconds()) // 60, 0)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days = minutes // (24 * 60)
    if days < 14:
        return f"{days} d {minutes // 60 % 24} h"
    return f"{days} d" if days < 2 * 365 else f"{days / 365.25:.1f} years"


class _store:
    """A series store that is closed at the end of the block."""

    def __init__(self, workspace: Workspace) -> None:
        self._store = SeriesStore(workspace.database_url)

    def __enter__(self) -> SeriesStore:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def dataset_version(workspace: Workspace, name: str) -> str:
    """Return a text that changes whenever the data set does; the key of every cached read."""
    with _store(workspace) as store:
        batches = store.batches(name)
    newest = max(batches["id"].to_list(), default=0)
    return f"{name}-{newest}"


def dataset_batches(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return what each ingestion of a data set added, changed and refused, newest first."""
    with _store(workspace) as store:
        store.config(name)  # an unknown name is an error, not an empty table
        return store.batches(name)


def dataset_report(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return span, gaps, missing shares, constants, outliers and freshness per series and column."""
    with _store(workspace) as store:
        return data_report(store.read(name), max_age=max_age(store.config(name)))


def dataset_vintages(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return how often, how late and with what revisions each column of a data set was published.

    Raises:
        DataError: the data set is unknown or keeps one value a cell.
    """
    with _store(workspace) as store:
        return vintage_report(store.read_vintages(name))


def read_series(workspace: Workspace, name: str, series: str, *, artifact: str | None = None) -> pl.DataFrame:
    """Return the rows of one series: ``time`` and one column per variate and covariate.

    Stored rows are returned as they are; sums of a hierarchy are made of them, as for a fit.

    Args:
        workspace: whose store to read.
        name: of the data set.
        series: stored, or an aggregate.
        artifact: a fitted model, whose hierarchy then holds instead of the stored one.

    Raises:
        DataError: no such data set or series, or the hierarchy does not fit the data.
    """
    fitted = None if artifact is None else _fitted_data(workspace, artifact)
    structure = stored_hierarchy(workspace, name) if fitted is None else fitted.hierarchy
    if structure is not None and (structure.over == "variates" or is_aggregate(structure, series)):
        table = load_dataset(workspace, fitted or name, series=[series]).table
        return table.select(pl.exclude("series_id", f"^{re.escape(PREFIX)}.*$"))
    with _store(workspace) as store:
        return store.read(name, series=[series]).table.drop("series_id")


def _fitted_data(workspace: Workspace, artifact: str) -> DataConfig | None:
    """Return the data settings that a model was fitted with, None where it does not say."""
    try:
        config = yaml.safe_load((workspace.artifacts / artifact / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    plain = config.get("data") if isinstance(config, dict) else None
    return None if plain is None else validate(DataConfig, plain, where=f"artifact {artifact}, data")


def made_series(workspace: Workspace, name: str) -> list[str]:
    """Return the aggregates that the store lacks and that are made when the data set is read.

    Raises:
        DataError: no such data set, or its hierarchy does not fit it.
    """
    structure = stored_hierarchy(workspace, name)
    if structure is None or structure.over == "variates":
        return []
    with _store(workspace) as store:
        stored = store.series_ids(name)
    return [series for series in load_dataset(workspace, name).series_ids if series not in stored]


def list_artifacts(workspace: Workspace) -> list[dict[str, Any]]:
    """Return one record a fitted model, newest first; folders that are no complete artifact are left out."""
    records = []
    for path in _artifact_folders(workspace).values():
        with suppress(ArtifactError):
            facts = _facts(path)
            shown = ("id", "model", "dataset", "created", "horizon", "context_length")
            records.append({**facts["metrics"], **{name: facts[name] for name in shown}})
    return sorted(records, key=lambda record: record["created"], reverse=True)


def damaged_artifacts(workspace: Workspace) -> dict[str, str]:
    """Return the fitted models that ``list_artifacts`` leaves out, with what is wrong with each."""
    found = {}
    for name, path in sorted(_artifact_folders(workspace).items()):
        try:
            _facts(path)
        except ArtifactError as error:
            found[name] = str(error)
    return found


def _artifact_folders(workspace: Workspace) -> dict[str, Path]:
    """Return the folders of fitted models by name; one that is being written, or was set aside, begins with a dot.

    A folder with none of an artifact's files is somebody else's, such as the lost+found of a volume.
    """
    own = [f"{name}.json" for name in ("manifest", *_FACT_FILES)]
    folders = [path for path in workspace.artifacts.glob("[!.]*") if path.is_dir()]
    return {path.name: path for path in folders if any((path / name).exists() for name in own)}


def _facts(path: Path) -> dict[str, Any]:
    """Return what is shown of an artifact without loading its network.

    Raises:
        ArtifactError: the folder is incomplete or damaged; the message says what of it.
    """
    parts = {name: _object(path / f"{name}.json") for name in ("manifest", *_FACT_FILES)}
    del parts["manifest"]  # it only has to be there
    try:
        facts = _shown(path.name, **parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"its JSON files lack something: {error!r}") from error
    wrong = [name for name, is_fine in _CHECKS.items() if not is_fine(facts[name])]
    if wrong:
        raise ArtifactError(f"its JSON files have no usable {listing(wrong)}")
    return facts | {"paths": (path / "dependence.safetensors").is_file()}


def _object(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{place.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{place.name} cannot be read") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{place.name} holds no JSON object")
    return found


def _shown(
    name: str,
    *,
    spec: dict[str, Any],
    schema: dict[str, Any],
    metrics: dict[str, Any],
    explanation: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    columns = schema["schema"]
    return {
        "id": name,
        "model": spec["network"]["model"]["name"],
        "dataset": provenance.get("dataset") or "",
        "created": datetime.fromisoformat(provenance["created"]),
        "horizon": spec["window"]["horizon"],
        "context_length": spec["window"]["context_length"],
        "series": schema["series_ids"],
        "variates": columns["targets"],
        "freq": columns["freq"],
        "covariates": {kind: columns[kind] for kind in ("known", "past", "static")},
        "known": [column for column in columns["known"] if not column.startswith(PREFIX)],
        "metrics": metrics,
        "explanation": explanation,
        "provenance": provenance,
    }


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_FACT_FILES = ("spec", "schema", "metrics", "explanation", "provenance")
_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "dataset", "freq"), _is_text),
    **dict.fromkeys(("horizon", "context_length"), _is_size),
    **dict.fromkeys(("series", "variates"), _is_names),
    "created": lambda moment: moment.tzinfo is not None,  # the newest comes first, and only aware times compare
    "metrics": lambda found: all(isinstance(value, int | float | None) for value in found.values()),
}


def artifact_facts(workspace: Workspace, artifact: str) -> dict[str, Any]:
    """Return sizes, series, variates, metrics, explanation and provenance of a fitted model.

    ``covariates`` are all it reads by role, ``known`` the known ones that no calendar can supply; ``paths`` says
    whether it can draw sample paths.

    Raises:
        ArtifactError: it is not here, or damaged.
    """
    path = _artifact_folders(workspace).get(artifact)
    if path is None:
        known = [record["id"] for record in list_artifacts(workspace)]
        raise ArtifactError(f"no artifact '{artifact}' in {workspace.artifacts} (known: {listing(known) or 'none'})")
    try:
        return _facts(path)
    except ArtifactError as error:
        raise ArtifactError(f"artifact {path} is damaged ({error}); fit again") from error


_UNREADABLE = " (its details in the table ledger_runs cannot be read)"


def job_runs(workspace: Workspace, limit: int = 100) -> list[dict[str, Any]]:
    """Return runs of scheduled and batch jobs, latest slot first."""
    ledger = Ledger(workspace.database_url)
    try:
        runs = ledger.runs(limit=limit)
    finally:
        ledger.close()
    return [
        {
            "job": run.job,
            "slot": run.slot,
            "status": run.status,
            "attempt": run.attempt,
            "started": run.started,
            "seconds": run.seconds,
            "rows": run.rows,
            "message": f"{run.message}{_UNREADABLE}" if run.is_damaged else run.message,
        }
        for run in runs
    ]


def tracking_runs(workspace: Workspace, limit: int = 100) -> list[dict[str, Any]]:
    """Return tracked runs of all experiments, newest first: name, status, start, seconds, errors, message.

    Trials of a study are parts of its run (``trial_runs``): that has their errors, those of the best one,
    ``trials`` says how many there are, ``study`` is its name, ``metric`` what it searched by and ``best_trial`` the
    number of the best one. An embedded store that does not exist yet is not created by looking for it.
    """
    if not _has_tracking(workspace):
        return []
    records = []
    for run in Tracker.open(workspace).runs(limit, every_experiment=True, whole=True):
        metrics, tags = run["metrics"], run["tags"]
        records.append(
            {
                **_run_facts(run),
                "valid_mae": metrics.get("final_valid_mae", metrics.get("best_valid_mae")),
                "test_mae": metrics.get("final_test_mae"),
                "study": tags.get(STUDY),
                "trials": tags.get(TRIALS),
                "best_trial": tags.get(BEST_TRIAL),
                "metric": run["parameters"].get("study.metric"),
            }
        )
    return records


def _run_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    start, end = run["start"], run["end"]
    return {
        "id": run["id"],
        "name": run["name"],
        "status": run["status"],
        "started": datetime.fromtimestamp(start / 1000, UTC),
        "seconds": None if end is None else (end - start) / 1000,
        "error": run["error"],
    }


def trial_runs(workspace: Workspace, study: Mapping[str, Any], limit: int = 1000) -> list[dict[str, Any]]:
    """Return the trials of a study of ``tracking_runs``, by number: ``trial``, ``value`` of its metric, ``values``.

    ``values`` are the settings that differ between trials. A trial that was stopped early has the status ``PRUNED``,
    no value, and the reason as its error.
    """
    found = Tracker.open(workspace).runs(limit, every_experiment=True, part_of=study["id"])
    names = dict.fromkeys(name for run in found for name in run["parameters"])
    varied = [name for name in names if len({run["parameters"].get(name) for run in found}) > 1]
    records = []
    for run in found:
        facts, tags, metrics = _run_facts(run), run["tags"], run["metrics"]
        stopped = tags.get(OUTCOME) == PRUNED
        if stopped:
            facts |= {"status": "PRUNED", "error": tags.get(NOTE)}
        metric = str(study["metric"])
        value = metrics.get(f"final_{metric}", metrics.get(metric))  # older studies have it by the plain name
        values = {name: run["parameters"].get(name) for name in varied}
        done = facts["status"] == "FINISHED"
        number = tags.get(TRIAL, "")
        facts |= {"trial": int(number) if number.isdecimal() else None, "value": value if done else None}
        records.append({**facts, "values": values})
    return sorted(records, key=lambda record: (record["trial"] is None, record["trial"]))


def _has_tracking(workspace: Workspace) -> bool:
    file = workspace.tracking_uri.removeprefix("sqlite:///")
    return file == workspace.tracking_uri or Path(file).exists()


def run_history(workspace: Workspace, run_id: str) -> pl.DataFrame:
    """Return the curves of a tracked run: columns ``epoch, name, value``; numbers logged for one epoch are no curve."""
    schema = {"epoch": pl.Int64, "name": pl.String, "value": pl.Float64}
    table = pl.DataFrame(Tracker.open(workspace).history(run_id), schema=schema)
    return table.filter(pl.len().over("name") > 1)
