"""The model registry: versions of a named model, and the aliases that say which one is in use.

``champion`` forecasts, ``challenger`` is the next candidate, ``previous`` is what the last promotion replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tsforge.artifact import MANIFEST, Artifact, newest_first, stated_id, verify_artifact
from tsforge.core.atomic import atomic_directory
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, listing, nearest
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.tracking.client import REGISTER_AGAIN, brief, import_mlflow, is_store_error, open_client
from tsforge.tracking.environment import requirements
from tsforge.tracking.pyfunc import signature
from tsforge.tracking.redact import redact
from tsforge.tracking.runs import Run, Tracker

_logger = get_logger(__name__)
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}$")
_ARTIFACT_ID = "tsforge.artifact_id"
_HISTORY = "tsforge.history"
_HISTORY_LENGTH = 20
_LOADER = "tsforge.tracking.pyfunc"
_REQUIREMENTS = ("tsforge", "mlflow", "numpy", "pandas", "polars", "safetensors", "scipy", "torch")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: str
    artifact_id: str
    model: str
    aliases: tuple[str, ...]
    run_id: str | None
    created: datetime


@contextmanager
def _store(workspace: Workspace) -> Iterator[Any]:
    """Yield a client; whatever the store refuses becomes one readable line."""
    client = open_client(workspace.tracking_uri)
    try:
        yield client
    except Exception as error:
        if not is_store_error(error):
            raise
        raise BackendError(f"the model registry {redact(workspace.tracking_uri)}: {brief(error)}") from error


def _check_name(name: str) -> str:
    if not _NAME.match(name):
        raise ConfigError(
            f"'{name}' is no name for a registered model: letters, digits, '_', '-' and '.', at most 100, "
            "beginning with a letter or digit"
        )
    return name


def register(artifact: Artifact, name: str, alias: str | None, workspace: Workspace, *, run: Run | None = None) -> str:
    """Store a saved artifact as a new version of the model ``name`` and return the version.

    The version holds a copy of the artifact's folder that plain MLflow loads and serves, without pickle and without
    code; what it needs installed is listed from the versions at hand.

    Args:
        artifact: saved (it has a path).
        name: of the registered model; created when new.
        alias: given to the new version (``champion``, ``challenger``); None gives none.
        workspace: names the store.
        run: the run that made the artifact.

    Raises:
        ArtifactError: the artifact was not saved.
        ConfigError: the name is not usable.
        BackendError: the store does not take it.
    """
    _check_name(name)
    if artifact.path is None:
        raise ArtifactError(f"artifact {artifact.id} has no folder yet; save_artifact() it before registering")
    run_id = run.id if run is not None else None
    with _store(workspace) as client:
        version = _new_version(client, artifact, name, run_id, workspace)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
    log_event(_logger, "registered", model=name, version=version, alias=alias, artifact=artifact.id)
    return version


def _new_version(client: Any, artifact: Artifact, name: str, run_id: str | None, workspace: Workspace) -> str:
    mlflow = import_mlflow()
    if run_id is not None:
        experiment_id = client.get_run(run_id).info.experiment_id
    else:
        experiment_id = Tracker.open(workspace).experiment_id()
    tags = {_ARTIFACT_ID: artifact.id, "tsforge.model": artifact.model_name}
    logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, tags=tags)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "model"
            _write_bundle(artifact, bundle, logged, run_id)
            client.log_model_artifacts(logged.model_id, str(bundle))
    except Exception:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # without a run MLflow would look the logged model up in the store that is the process-wide default
    link = logged.model_id if run_id is not None else None
    made = client.create_model_version(name, source=logged.artifact_location, run_id=run_id, tags=tags, model_id=link)
    return str(made.version)


def _write_bundle(artifact: Artifact, folder: Path, logged: Any, run_id: str | None) -> None:
    mlflow = import_mlflow("mlflow.pyfunc", "mlflow.models")
    with warnings.catch_warnings():
        # MLflow asks for example rows to infer a signature from; ours is exact, it follows from the schema
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=_LOADER,
            data_path=str(artifact.path),
            signature=signature(artifact),
            pip_requirements=requirements(_REQUIREMENTS),
            metadata={"artifact_id": artifact.id, "model": artifact.model_name},
            mlflow_model=mlflow.models.Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
        )


def versions(name: str, workspace: Workspace) -> list[ModelVersion]:
    """Return every version of a registered model, newest first.

    Raises:
        ArtifactError: no model has that name.
        BackendError: the store does not answer.
    """
    _check_name(name)
    with _store(workspace) as client:
        aliases = _aliases(client, name)
        found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    records = [_version(item, aliases) for item in found]
    return sorted(records, key=lambda item: int(item.version), reverse=True)


def _aliases(client: Any, name: str) -> dict[str, str]:
    """Return ``{alias: version}`` of a model."""
    exceptions = import_mlflow().exceptions
    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [item.name for item in client.search_registered_models(max_results=1000)]
        raise ArtifactError(
            f"no registered model '{name}'{nearest(name, known)} (known: {listing(known, 20) or 'none'}); "
            f"fit with tracking.register_as={name} makes one"
        ) from error


def _version(item: Any, aliases: dict[str, str]) -> ModelVersion:
    version = str(item.version)
    return ModelVersion(
        name=item.name,
        version=version,
        artifact_id=item.tags.get(_ARTIFACT_ID, ""),
        model=item.tags.get("tsforge.model", ""),
        aliases=tuple(sorted(alias for alias, held in aliases.items() if held == version)),
        run_id=item.run_id or None,
        created=datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
    )


def _find(name: str, which: str, workspace: Workspace) -> ModelVersion:
    """Return the version meant by a number, an alias or an artifact id.

    Raises:
        ArtifactError: none fits; the message lists what there is.
    """
    found = versions(name, workspace)
    for item in found:
        if which in (item.version, f"v{item.version}", item.artifact_id, *item.aliases):
            return item
    shown = [" ".join([item.version, *(f"@{alias}" for alias in item.aliases)]) for item in found]
    raise ArtifactError(
        f"model '{name}' has no version, alias or artifact '{which}' (versions: {listing(shown, 10) or 'none'})"
    )


def promote(name: str, which: str, workspace: Workspace, *, alias: str = CHAMPION) -> dict[str, Any]:
    """Give a version an alias and return what changed.

    A new champion that was the challenger stops being it; the champion it replaces is kept as ``previous``, so that
    ``promote(name, "previous", ...)`` takes the step back. Every change is recorded with the model.

    Args:
        name: registered model.
        which: version, artifact id or alias.
        workspace: names the store.
        alias: the alias to give.

    Raises:
        ArtifactError: there is no such model or version.
        ConfigError: the alias is not one of ``champion``, ``challenger``.
        BackendError: the store does not answer.
    """
    if alias not in (CHAMPION, CHALLENGER):
        raise ConfigError(f"alias '{alias}' is not known; give {CHAMPION} or {CHALLENGER}")
    chosen = _find(name, which, workspace)
    with _store(workspace) as client:
        before = _aliases(client, name)
        replaced = before.get(alias)
        facts = {
            "model": name,
            "alias": alias,
            "version": chosen.version,
            "artifact": chosen.artifact_id,
            "replaces": replaced,
            "is_changed": replaced != chosen.version,
        }
        if not facts["is_changed"]:
            return facts
        client.set_registered_model_alias(name, alias, chosen.version)
        if alias == CHAMPION:
            if replaced is not None:
                client.set_registered_model_alias(name, PREVIOUS, replaced)
            if before.get(CHALLENGER) == chosen.version:
                client.delete_registered_model_alias(name, CHALLENGER)
        _remember(client, name, alias, replaced, chosen.version)
    log_event(_logger, "promoted", model=name, alias=alias, version=chosen.version, replaces=replaced)
    return facts


def _remember(client: Any, name: str, alias: str, old: str | None, new: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": now, "alias": alias, "from": old, "to": new, "by": os.environ.get("USER", "")}
    entries = [*_history(client, name), entry][-_HISTORY_LENGTH:]
    client.set_registered_model_tag(name, _HISTORY, json.dumps(entries))


def _history(client: Any, name: str) -> list[dict[str, Any]]:
    return list(json.loads(client.get_registered_model(name).tags.get(_HISTORY, "[]")))


def history(name: str, workspace: Workspace) -> list[dict[str, Any]]:
    """Return the last alias changes of a model, oldest first: time, alias, from, to, by."""
    _check_name(name)
    with _store(workspace) as client:
        _aliases(client, name)  # an unknown name is reported as such
        return _history(client, name)


def champion(name: str, workspace: Workspace) -> Path:
    """Return the local folder of the champion's artifact."""
    return resolve(f"{name}@{CHAMPION}", workspace)


def has_alias(name: str, alias: str, workspace: Workspace) -> bool:
    """Return whether a version of the model holds the alias; False too when no model has that name.

    Raises:
        BackendError: the store does not answer.
    """
    _check_name(name)
    with _store(workspace) as client:
        try:
            return alias in _aliases(client, name)
        except ArtifactError:  # no such model yet
            return False


def resolve(reference: str, workspace: Workspace) -> Path:
    """Return the local folder of the artifact that ``reference`` names.

    Args:
        reference: a folder; an artifact id of this workspace; ``NAME`` or ``NAME@champion``; ``NAME@ALIAS``;
            ``NAME/VERSION``; each of the last three also behind ``models:/``.
        workspace: holds artifacts, and a cache of those that had to be fetched from the registry.

    Raises:
        ArtifactError: nothing has that name; the message says what there is.
        BackendError: the registry does not answer.
    """
    given = Path(reference).expanduser()
    for folder in (given, workspace.artifacts / reference):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    if given.is_dir():
        raise ArtifactError(f"folder {reference} holds no artifact ({MANIFEST} is missing)")
    plain = reference.removeprefix("models:/")
    name, mark, which = plain.partition("@") if "@" in plain else plain.partition("/")
    if not _NAME.match(name) or (mark and not which):
        raise ArtifactError(
            f"'{reference}' is no artifact: give a folder, an artifact id, NAME@champion or NAME/VERSION"
        )
    try:
        found = _find(name, which or CHAMPION, workspace)
    except ArtifactError as error:
        if mark:
            raise
        known = [path.name for path in newest_first(workspace.artifacts)]
        if reference == "latest":
            raise ArtifactError(
                "'latest' is not taken here, it changes with every fit; give an artifact id (newest here: "
                f"{listing(known[:1]) or 'none'}) or NAME@champion"
            ) from error
        raise ArtifactError(
            f"'{reference}' is neither a folder nor an artifact id (newest here: {listing(known[:3]) or 'none'}); "
            f"asked as a registered model: {error}"
        ) from error
    local = workspace.artifacts / found.artifact_id
    is_here = found.artifact_id and (local / MANIFEST).is_file() and stated_id(local) == found.artifact_id
    return local.resolve() if is_here else _fetch(found, workspace)


def _fetch(found: ModelVersion, workspace: Workspace) -> Path:
    """Return the cached copy of a version's artifact, verified; one that is not whole is fetched again.

    Raises:
        ArtifactError: the store holds no whole artifact. BackendError: it does not answer, or the disk refuses.
    """
    target = workspace.root / "cache" / "models" / f"{found.name}-{found.version}-{found.artifact_id or 'model'}"
    if _is_whole(target):
        return target.resolve()
    is_damaged = target.exists()
    mlflow = import_mlflow("mlflow.artifacts")
    with _store(workspace) as client, tempfile.TemporaryDirectory() as folder:
        place = client.get_model_version_download_uri(found.name, found.version)
        # by its address: a ``models:/`` reference would be looked up in the store that is the process-wide default
        local = mlflow.artifacts.download_artifacts(
            artifact_uri=place, dst_path=folder, tracking_uri=workspace.tracking_uri
        )
        fetched = _only_artifact(Path(local), found, redact(place))
        try:
            with atomic_directory(target, replace=is_damaged) as temporary:
                shutil.copytree(fetched, temporary, dirs_exist_ok=True)
        except BackendError:
            if not _is_whole(target):  # else another process fetched it meanwhile
                raise
    return target.resolve()


def _is_whole(folder: Path) -> bool:
    try:
        verify_artifact(folder)
    except ArtifactError:
        return False
    return True


def _only_artifact(folder: Path, found: ModelVersion, place: str) -> Path:
    """Return the folder of the one artifact in what was downloaded from ``place``, after it was verified."""
    name = f"version {found.version} of model '{found.name}'"
    manifests = list(folder.rglob(MANIFEST))
    if not manifests and found.artifact_id:
        raise ArtifactError(f"files of {name} are gone from {place} (no {MANIFEST} there); {REGISTER_AGAIN}")
    if len(manifests) != 1:
        raise ArtifactError(f"{name} holds {len(manifests) or 'no'} tsforge artifact{'s' if manifests else ''}")
    try:
        stated = verify_artifact(manifests[0].parent)
    except ArtifactError as error:
        why = str(error).replace(str(folder), place)
        raise ArtifactError(f"{name} cannot be used as the store holds it: {why}") from error
    if found.artifact_id and stated != found.artifact_id:
        raise ArtifactError(f"{name} is artifact {found.artifact_id}, but {place} holds {stated}; {REGISTER_AGAIN}")
    return manifests[0].parent
