"""Runs: what was tried, with which settings, on which data, how it went, and how it ended.

Every run ends in a state that tells the truth: FINISHED, FAILED (an error), KILLED (Ctrl-C, SIGTERM, or a process that
vanished). The store failing in the middle never ends the work it records: one warning, what can be kept is sent later.
Numbers and files lie in different places, and the failure of one is not taken for that of the other.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from tsforge.core.errors import BackendError
from tsforge.core.logs import get_logger, log_event
from tsforge.core.owner import Owner
from tsforge.core.signals import interruption, termination_as_interrupt
from tsforge.core.workspace import Workspace
from tsforge.tracking.client import (
    brief,
    check_file_store,
    import_mlflow,
    is_database,
    is_store_error,
    normalise_uri,
    open_client,
)
from tsforge.tracking.config import TrackingConfig
from tsforge.tracking.environment import environment
from tsforge.tracking.redact import redact, redact_tree

_logger = get_logger(__name__)
_OWNER = "tsforge.owner"
_ERROR = "tsforge.error"
_PARENT = "mlflow.parentRunId"
_NOT_IN_A_KEY = re.compile(r"[^\w\-. :/]")
_VALUE_LIMIT = 500  # a longer setting is cut in the list of parameters; config.yaml holds all of it
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 500
_MOST_RUNS = 1000
_FLUSH_SECONDS = 2.0
_RETRY_SECONDS = 30.0

_Place = Literal["database", "files"]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as ``{dotted key: text}``; lists become JSON, long texts are cut with an ellipsis."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        flat[_key(name)] = text if len(text) <= _VALUE_LIMIT else text[: _VALUE_LIMIT - 1] + "…"
    return flat


def _key(name: str) -> str:
    """Return a name of a setting, number or label with what MLflow does not allow in it as ``_``."""
    return _NOT_IN_A_KEY.sub("_", name)[:250]


class Run:
    """One open run. Made by ``Tracker.start``; without a store every method does nothing.

    Attributes:
        id: MLflow run id, None when tracking is off.
        name: what a person reads.
    """

    def __init__(self, client: Any, run_id: str | None, name: str, *, is_drawn: bool = True) -> None:
        self.id = run_id
        self.name = name
        self._is_drawn = is_drawn
        self._client = client
        self._metrics: list[Any] = []
        self._flushed = time.monotonic()
        self._tags: dict[str, str] = {}  # not taken yet
        self._broken_since: dict[_Place, float] = {}
        self._warned: set[_Place] = set()
        self._curves: dict[str, list[tuple[int, float]]] = {}

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one epoch; they are sent in batches, and drawn at the end (not for a part of a run)."""
        self.log_metrics(metrics, step=epoch)
        for name, value in metrics.items():
            self._curves.setdefault(name, []).append((epoch, float(value)))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record numbers. Characters that MLflow does not allow in a name become ``_``."""
        if self.id is None:
            return
        mlflow = import_mlflow()
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            self._metrics.append(mlflow.entities.Metric(_key(key), float(value), now, step))
        if len(self._metrics) >= _METRICS_A_BATCH or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the metrics and labels gathered so far; on failure they are kept for the next attempt."""
        if self.id is None:
            return
        self._flushed = time.monotonic()
        while self._metrics:
            batch = self._metrics[:_METRICS_A_BATCH]
            if not self._send("metrics", partial(self._client.log_batch, self.id, metrics=batch)):
                return
            del self._metrics[: len(batch)]
        self._send_tags()

    def log_config(self, config: BaseModel | Mapping[str, Any]) -> None:
        """Record settings twice: flat parameters to filter and compare by, and ``config.yaml`` with all of them."""
        if self.id is None:
            return
        plain = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
        plain = redact_tree(plain)
        mlflow = import_mlflow()
        params = [mlflow.entities.Param(key, value) for key, value in flatten(plain).items()]
        for start in range(0, len(params), _PARAMS_A_BATCH):
            batch = params[start : start + _PARAMS_A_BATCH]
            self._send("parameters", partial(self._client.log_batch, self.id, params=batch))
        self.log_text("config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set labels, secrets in them hidden; on failure they are kept for the next attempt."""
        if self.id is None:
            return
        self._tags.update({_key(key): redact(str(value))[:5000] for key, value in tags.items()})
        self._send_tags()

    def _send_tags(self) -> None:
        if not self._tags:
            return
        made = import_mlflow().entities.RunTag
        entities = [made(key, value) for key, value in self._tags.items()]
        if self._send("tags", lambda: self._client.log_batch(self.id, tags=entities)):
            self._tags.clear()

    def log_data(self, name: str, digest: str, *, source: str = "", profile: Mapping[str, Any] | None = None) -> None:
        """Record which data the run saw.

        Args:
            name: of the data set.
            digest: its fingerprint; equal digests mean equal data.
            source: where it came from (passwords are hidden).
            profile: a few facts worth seeing beside it (rows, series, span).
        """
        if self.id is None:
            return
        entities = import_mlflow().entities
        dataset = entities.Dataset(
            name=name,
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": redact(source)}),
            profile=json.dumps(redact_tree(dict(profile or {})), default=str),
        )
        inputs = [entities.DatasetInput(dataset=dataset, tags=[entities.InputTag("mlflow.data.context", "training")])]
        self._send("the data set", lambda: self._client.log_inputs(self.id, datasets=inputs))
        self.set_tags({"tsforge.data": name, "tsforge.data_fingerprint": digest})

    def log_text(self, path: str, text: str) -> None:
        """Store ``text`` as the file ``path`` of the run, secrets hidden."""
        if self.id is not None:
            self._send(path, lambda: self._client.log_text(self.id, redact(text), path), "files")

    def log_folder(self, folder: Path, path: str) -> None:
        """Store a whole folder below ``path`` of the run."""
        if self.id is not None:
            self._send(path, lambda: self._client.log_artifacts(self.id, str(folder), path), "files")

    def log_artifact(self, artifact: Any) -> None:
        """Store a saved ``Artifact`` below ``artifact/`` and name its id.

        Raises:
            BackendError: the artifact was not saved to a folder yet.
        """
        if artifact.path is None:
            raise BackendError(f"artifact {artifact.id} has no folder yet; save_artifact() it before it is logged")
        self.log_folder(artifact.path, "artifact")
        self.set_tags({"tsforge.artifact_id": artifact.id})

    def log_figure(self, path: str, figure: Any) -> None:
        """Store a figure: a matplotlib one as ``path`` (``.png``, ``.svg``), a plotly one as a page (``.html``)."""
        if self.id is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            if hasattr(figure, "write_html"):
                file = file.with_suffix(".html")
                figure.write_html(str(file), include_plotlyjs=True)  # readable without a network
            else:
                figure.savefig(str(file), dpi=110)
            parent = None if "/" not in path else str(Path(path).parent)
            self._send(path, lambda: self._client.log_artifact(self.id, str(file), parent), "files")

    def _send(self, what: str, call: Callable[[], object], place: _Place = "database") -> bool:
        """Return whether the store took it. After a failure the place it goes to is left alone for a while."""
        if time.monotonic() - self._broken_since.get(place, -math.inf) < _RETRY_SECONDS:
            return False
        try:
            call()
        except Exception as error:
            if not is_store_error(error):
                raise
            if place not in self._warned:
                _logger.warning(
                    "run '%s': the tracking store did not take %s (%s); the work goes on, its record may lack parts",
                    self.name,
                    what,
                    brief(error),
                )
            self._warned.add(place)
            self._broken_since[place] = time.monotonic()
            return False
        self._broken_since.pop(place, None)
        self._warned.discard(place)
        return True

    def _finish(self, error: BaseException | None) -> None:
        """Close the run in the state that ``error`` stands for; numbers, labels and end each get their own attempt."""
        if self.id is None:
            return
        status, message = outcome(error)
        self._broken_since.clear()
        self.flush()
        if self._is_drawn and any(len(points) > 1 for points in self._curves.values()):
            from tsforge.tracking.figures import learning_curves

            self.log_figure("plots/learning_curves.png", learning_curves(self._curves))
        self._broken_since.clear()
        self.set_tags({_ERROR: message} if message else {})
        self._broken_since.clear()
        if not self._send("its end", lambda: self._client.set_terminated(self.id, status)):
            _logger.warning("run '%s' (%s) ended as %s, but its record still says RUNNING", self.name, self.id, status)


def outcome(error: BaseException | None) -> tuple[str, str]:
    """Return the MLflow status an ending stands for, and a one-line message without secrets ("" when it went well)."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0) and not interruption(error)):
        return "FINISHED", ""
    stopped = interruption(error)
    if stopped is not None:
        return "KILLED", str(stopped) or "interrupted by Ctrl-C"
    return "FAILED", f"{type(error).__name__}: {brief(error, 1000)}"


class Tracker:
    """Starts runs of one experiment in one MLflow store (any tracking address; an embedded SQLite file by default)."""

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        artifact_root: Path,
        *,
        enabled: bool = True,
    ) -> None:
        """Remember where to write; nothing is opened before the first run.

        Args:
            tracking_uri: SQLAlchemy address of a database, or the address of a tracking server.
            experiment: created when it is new.
            artifact_root: folder for the files of runs when the store is a database (a server decides for itself).
            enabled: False makes every run a no-op and never loads MLflow.
        """
        self.enabled = enabled
        self.tracking_uri = normalise_uri(tracking_uri) if enabled else tracking_uri
        self.experiment = experiment
        self.artifact_root = artifact_root
        self._client: Any = None
        self._experiment: Any = None

    @classmethod
    def open(cls, workspace: Workspace, config: TrackingConfig | None = None) -> Tracker:
        """Return the tracker of a workspace."""
        config = config or TrackingConfig()
        return cls(workspace.tracking_uri, config.experiment, workspace.mlflow_artifacts, enabled=config.enabled)

    @contextmanager
    def start(
        self,
        name: str,
        *,
        config: BaseModel | Mapping[str, Any] | None = None,
        tags: Mapping[str, object] | None = None,
        parent: Run | None = None,
        resume: str | None = None,
    ) -> Iterator[Run]:
        """Open a run for the length of the block and close it in the state it ended in.

        Args:
            name: what a person reads in the list of runs.
            config: settings to record as parameters and as ``config.yaml``.
            tags: labels.
            parent: the run this one is a part of (a trial of a study).
            resume: id of an earlier run to continue; when the store no longer has it, a new one is made.

        Raises:
            BackendError: the store does not answer, or lacks the driver of its files; nothing was started.
        """
        if not self.enabled:
            yield Run(None, None, name)
            return
        with termination_as_interrupt():
            run = self._begin(name, tags or {}, parent, resume)
            try:
                if run.id != resume:
                    if config is not None:
                        run.log_config(config)
                    run.log_text("environment.json", json.dumps(environment(), indent=2))
                yield run
            except BaseException as error:
                run._finish(error)
                raise
            run._finish(None)

    def _begin(self, name: str, tags: Mapping[str, object], parent: Run | None, resume: str | None) -> Run:
        experiment_id = self.experiment_id()
        exceptions = import_mlflow().exceptions
        labels = {"mlflow.source.name": "tsforge", "mlflow.source.type": "LOCAL", _OWNER: str(Owner.current())}
        if parent is not None and parent.id is not None:
            labels[_PARENT] = parent.id
        labels.update({_key(key): redact(str(value)) for key, value in tags.items()})
        try:
            if resume is not None and self._reopen(resume):
                run = Run(self._client, resume, name)
                run.set_tags({**labels, _ERROR: ""})
                return run
            created = self._client.create_run(experiment_id, tags=labels, run_name=name)
        except (exceptions.MlflowException, OSError) as error:
            raise BackendError(
                f"the tracking store {redact(self.tracking_uri)} took no new run: {brief(error)}; "
                "or switch tracking off (tracking.enabled=false)"
            ) from error
        return Run(self._client, created.info.run_id, name, is_drawn=parent is None)

    def _reopen(self, run_id: str) -> bool:
        exceptions = import_mlflow().exceptions
        try:
            known = self._client.get_run(run_id).info.lifecycle_stage == "active"
        except exceptions.MlflowException:
            return False
        if known:
            self._client.update_run(run_id, status="RUNNING")
        return bool(known)

    def _connect(self) -> str:
        """Return the id of the experiment; the first call opens the store and closes runs whose process vanished."""
        if self._experiment is None:
            self._client = open_client(self.tracking_uri)
            self._experiment = self._ensure_experiment()
            try:
                self.mark_stale_runs()
            except BackendError as error:
                _logger.warning("runs of vanished processes may have been left open: %s", error)
        return str(self._experiment.experiment_id)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turn what the store refuses into one line."""
        try:
            yield
        except (import_mlflow().exceptions.MlflowException, OSError) as error:
            raise BackendError(f"the tracking store {redact(self.tracking_uri)}: {brief(error)}") from error

    def _ensure_experiment(self) -> Any:
        exceptions = import_mlflow().exceptions
        location = None
        if is_database(self.tracking_uri):
            location = (self.artifact_root.resolve() / _NOT_IN_A_KEY.sub("_", self.experiment)).as_uri()
        try:
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                try:
                    made = self._client.create_experiment(self.experiment, artifact_location=location)
                    return self._client.get_experiment(made)
                except exceptions.MlflowException:
                    found = self._client.get_experiment_by_name(self.experiment)  # made by another process meanwhile
                    if found is None:
                        raise
        except (exceptions.MlflowException, OSError) as error:
            raise BackendError(
                f"the tracking store {redact(self.tracking_uri)} has no experiment '{self.experiment}' and makes none: "
                f"{brief(error)}"
            ) from error
        if found.lifecycle_stage != "active":
            raise BackendError(
                f"experiment '{self.experiment}' was deleted in {redact(self.tracking_uri)}; "
                "restore it there or choose another name (tracking.experiment=NAME)"
            )
        return found

    def experiment_id(self) -> str:
        """Return the id of the experiment to write to, created when it is new.

        Raises:
            BackendError: the store does not answer, or lacks the driver of its files.
        """
        known = self._connect()
        check_file_store(self._experiment.artifact_location, self.experiment)
        return known

    def mark_stale_runs(self) -> list[str]:
        """Close runs that say RUNNING although their process is gone (power cut, ``kill -9``); return their ids.

        Only runs of this host can be judged; those of other machines are left alone.

        Raises:
            BackendError: the store does not answer, or refuses.
        """
        if not self.enabled:
            return []
        experiment_id = self._connect()
        closed = []
        with self._answers():
            for run in self._client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
                owner = run.data.tags.get(_OWNER)
                if owner is None or not Owner.parse(owner).is_gone():
                    continue
                message = f"process {Owner.parse(owner).pid} ended without closing the run"
                self._client.set_tag(run.info.run_id, _ERROR, message)
                self._client.set_terminated(run.info.run_id, "KILLED")
                log_event(_logger, "closed a run that was left open", run=run.info.run_name, reason=message)
                closed.append(str(run.info.run_id))
        return closed

    def runs(
        self, limit: int = 100, *, every_experiment: bool = False, whole: bool = False, part_of: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the newest runs as plain records: id, name, status, start and end (ms since 1970), parameters,
        metrics, tags, error, parent.

        Args:
            limit: so many at most.
            every_experiment: also those of other experiments in the store.
            whole: without the parts of others (trials of a study).
            part_of: only the parts of the run with this id.

        Raises:
            BackendError: the store does not answer.
        """
        if not self.enabled:
            return []
        experiments = [self._connect()]
        wanted = f"tags.`{_PARENT}` IS NULL" if whole else ""
        if part_of is not None:
            wanted = f"tags.`{_PARENT}` = '{part_of.replace(chr(39), '')}'"
        newest = ["attributes.start_time DESC"]
        with self._answers():
            if every_experiment:
                experiments = [str(item.experiment_id) for item in self._client.search_experiments()]
            try:
                found = self._client.search_runs(experiments, wanted, max_results=limit, order_by=newest)
            except import_mlflow().exceptions.MlflowException:
                if not whole:
                    raise
                # a server older than the client knows no IS NULL: of its newest runs the parts are left out here
                found = self._client.search_runs(experiments, max_results=_MOST_RUNS, order_by=newest)
                found = [run for run in found if _PARENT not in run.data.tags][:limit]
        return [_record(run) for run in found]

    def find(self, tag: str, value: str) -> str | None:
        """Return the id of the newest run whose ``tag`` has this value, None when there is none or tracking is off.

        Raises:
            BackendError: the store does not answer.
        """
        if not self.enabled:
            return None
        experiment_id = self._connect()
        quoted = value.replace("'", "")
        with self._answers():
            found = self._client.search_runs(
                [experiment_id], f"tags.`{tag}` = '{quoted}'", max_results=1, order_by=["attributes.start_time DESC"]
            )
        return str(found[0].info.run_id) if found else None

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """Return every logged number of a run as records ``epoch, name, value``, by name, epoch and time.

        Raises:
            BackendError: the store does not answer, or has no such run.
        """
        if not self.enabled:
            return []
        self._connect()
        with self._answers():
            names = sorted(self._client.get_run(run_id).data.metrics)
            points = [point for name in names for point in self._client.get_metric_history(run_id, name)]
        points.sort(key=lambda point: (point.key, point.step, point.timestamp))
        return [{"epoch": point.step, "name": point.key, "value": point.value} for point in points]


def _record(run: Any) -> dict[str, Any]:
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "start": run.info.start_time,
        "end": run.info.end_time,
        "parameters": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        "error": run.data.tags.get(_ERROR) or None,
        "parent": run.data.tags.get(_PARENT),
    }
