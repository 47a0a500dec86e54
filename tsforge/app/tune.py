"""Tune: search the hyper-parameters of a fit, every trial a tracked run, the best one a config that ``fit`` accepts.

The objective sees the training span and the valid span only; the test span stays out of every decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.app.ingest import load_history
from tsforge.core.atomic import atomic_file
from tsforge.core.config import Config, search_space, to_yaml, validate
from tsforge.core.errors import ConfigError, ModelError, nearest
from tsforge.core.workspace import Workspace
from tsforge.data.vintages import History
from tsforge.models.registry import MODELS
from tsforge.tracking.runs import Run, Tracker
from tsforge.tracking.study import BEST_TRIAL, NOTE, OUTCOME, PRUNED, STUDY, TRIAL, TRIALS
from tsforge.tuning.config import TuneConfig
from tsforge.tuning.result import TrialRecord, TuneResult
from tsforge.tuning.space import Space, build_space
from tsforge.tuning.study import Pruned, Trial, opened


class TuneJobConfig(Config):
    """A search: the fit to vary, and how."""

    fit: FitConfig
    study: TuneConfig


def tune(config: TuneJobConfig, workspace: Workspace, *, progress: bool = False) -> TuneResult:
    """Search on a stored data set and write the best configuration to ``workspace.tuning / NAME-best.yaml``.

    Running it again with the same name goes on until ``study.num_trials`` are finished.

    Args:
        config: what to fit and what to vary.
        workspace: where data, studies and runs live.
        progress: show a bar over the trials.

    Raises:
        DataError: the data set is not in the store.
        ConfigError: a space names no field, no fit has the metric, or the study of that name searched something else.
        ModelError: no trial succeeded.
        BackendError: another process works on the study, or a store does not answer.
        KeyboardInterrupt: finished trials and the best config so far are kept.
    """
    _check_metric(config)
    frame = load_history(workspace, config.fit.data, masked=True)
    space = trial_space(config)
    current = leaves(config.fit.model_dump(mode="json"))
    storage = workspace.tuning / f"{config.study.name}.db"
    tracker = Tracker.open(workspace, config.fit.tracking)
    known = tracker.find(STUDY, config.study.name)  # asked always: a store that is away must not leave a study behind
    earlier = known if storage.exists() else None
    tags = {STUDY: config.study.name, "tsforge.model": config.fit.model.name, "tsforge.dataset": config.fit.data.name}
    context = _context(config, space, frame)
    # the study first: when it is refused, its earlier run stays as it was
    with (
        opened(space, config.study, directory=workspace.tuning, defaults=current, context=context) as study,
        tracker.start(f"tune {config.study.name}", config=config, tags=tags, resume=earlier) as run,
    ):
        run.log_data(config.fit.data.name, frame.fingerprint(), profile={"rows": frame.num_rows})
        work = _Objective(config, frame, tracker, run)
        result = study.run(work.score, lambda record, so_far: _keep(record, so_far, config, run), progress)
        result = replace(result, best_config=_write_best(result, config))
        _log_result(result, run)
    return result


def _check_metric(config: TuneJobConfig) -> None:
    """Refuse a metric that no fit reports before the first trial is trained for it."""
    parts = ["valid", *(["valid_unseen"] if config.fit.entities.held_out else [])]
    known = [f"{part}_{error}" for part in parts for error in ("mae", "mse")]
    metric = config.study.metric
    if metric not in known:
        raise ConfigError(
            f"study.metric={metric}: no fit reports it{nearest(metric, known)} (known: {', '.join(known)})"
        )


def trial_space(config: TuneJobConfig) -> Space:
    """Return the space of a job.

    Settings of gradient training are left out for models that are solved in closed form, unless ``study.space`` names
    them.

    Raises:
        ConfigError: see ``build_space``.
    """
    declared = search_space(config.fit)
    can = MODELS.get(config.fit.model.name).capabilities_of(config.fit.model)
    if can.closed_form and not can.starts_closed:
        declared = {
            name: space
            for name, space in declared.items()
            if not name.startswith("train.") or name in config.study.space
        }
    return build_space(declared, config.study.space, leaves(config.fit.model_dump(mode="json")))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{dotted name: value}`` of nested settings; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(leaves(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_values(fit: FitConfig, values: Mapping[str, Any]) -> FitConfig:
    """Return the fit config with dotted values exchanged.

    Raises:
        ConfigError: a value is not allowed in its field.
    """
    plain = fit.model_dump(mode="json")
    for name, value in values.items():
        *path, last = name.split(".")
        place = plain
        for part in path:
            place = place[part]
        place[last] = value
    return validate(FitConfig, plain)


def _context(config: TuneJobConfig, space: Space, frame: History) -> dict[str, Any]:
    """Return everything that must be equal for two trials to be comparable, by section."""
    plain = leaves(config.fit.model_dump(mode="json", exclude={"tracking", "calibration"}))
    sections: dict[str, Any] = {"data": frame.fingerprint()}
    if config.study.seed:  # older versions did not record it; their studies with the default go on
        sections["study.seed"] = config.study.seed
    for name, value in plain.items():
        if name not in space and not name.startswith("data."):
            sections.setdefault(f"fit.{name.partition('.')[0]}", {})[name] = value
    return sections


@dataclass(frozen=True)
class _Objective:
    """Fits one configuration and returns its error on the valid span."""

    config: TuneJobConfig
    frame: History
    tracker: Tracker
    parent: Run

    def score(self, values: dict[str, Any], trial: Trial) -> float:
        """Run one trial as a part of the study's run."""
        # intervals play no part in the comparison, and nothing of a trial is stored but its record
        without = {"calibration": {"enabled": False, "dependence": "none"}}
        fit = with_values(self.config.fit, {**values, **without})
        name = f"{self.config.study.name} {trial.number}"
        tags = {TRIAL: trial.number}
        pruned: Pruned | None = None
        value = math.nan
        with self.tracker.start(name, config=fit, tags=tags, parent=self.parent) as run:
            if run.id is not None:
                trial.note(run_id=run.id)
            try:
                value = self._fit(fit, trial, run)
            except Pruned as stop:  # not a failure of the run
                pruned = stop
                run.set_tags({OUTCOME: PRUNED, NOTE: stop})
        if pruned is not None:
            raise pruned
        return value

    def _fit(self, fit: FitConfig, trial: Trial, run: Run) -> float:
        metric = self.config.study.metric

        def after_epoch(epoch: int, metrics: dict[str, float]) -> None:
            run.log_epoch(epoch, metrics)
            value = metrics.get(metric, metrics.get("valid_loss"))
            if value is not None:
                trial.report(epoch, value)

        artifact, _ = fit_frame(self.frame, fit, on_epoch=after_epoch)
        valid = {key: value for key, value in artifact.metrics.items() if key.startswith("valid_")}
        run.log_metrics({f"final_{key}": value for key, value in valid.items()})  # the plain names are curves
        if metric not in valid:
            raise ModelError(f"the fit reports no metric '{metric}' (it has {', '.join(valid) or 'none'})")
        return float(valid[metric])


def _keep(record: TrialRecord, so_far: TuneResult | None, config: TuneJobConfig, run: Run) -> None:
    """Write the best config whenever it changes, so that an interrupted study leaves one."""
    if so_far is not None and so_far.best.number == record.number:
        _write_best(so_far, config)
        if so_far.best.value is not None:
            run.log_metrics({f"best_{config.study.metric}": so_far.best.value}, step=record.number)


def _write_best(result: TuneResult, config: TuneJobConfig) -> Path:
    path = result.storage.with_name(f"{result.name}-best.yaml")
    best = with_values(config.fit, result.best.values)
    header = (
        f"# Best of study {result.name}: trial {result.best.number}, {result.metric} = {result.best.value!r}.\n"
        f"# tsforge fit --config {path}\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(header + to_yaml(best), encoding="utf-8")
    return path


def _log_result(result: TuneResult, run: Run) -> None:
    if result.best_config is not None:
        run.log_text("best.yaml", result.best_config.read_text(encoding="utf-8"))
    run.log_text("trials.csv", result.history().write_csv())
    run.log_metrics({f"importance/{name}": share for name, share in result.importance.items()})
    run.set_tags({BEST_TRIAL: result.best.number, TRIALS: result.summary()["trials"]})
