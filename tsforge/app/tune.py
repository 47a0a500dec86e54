"""Tune: search the hyper-parameters of a fit, every trial a tracked run, the best one a config that ``fit`` accepts.

The objective sees the training span and the valid span only; the test span stays out of every decision.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from tsforge.app.auto import AUTO, RaceData
from tsforge.app.auto_candidates import check_readers
from tsforge.app.fit import FitConfig, WindowConfig, fit_frame
from tsforge.app.ingest import load_history
from tsforge.core.atomic import atomic_file
from tsforge.core.config import Config, search_space, to_yaml, validate
from tsforge.core.errors import ConfigError, ModelError, listing, nearest
from tsforge.core.workspace import Workspace
from tsforge.data.entities import choose_held_out
from tsforge.data.panel import Panel
from tsforge.data.splits import make_splits
from tsforge.data.vintages import History, newest
from tsforge.data.window_index import count_windows
from tsforge.models.registry import MODELS
from tsforge.tracking.runs import Run, Tracker
from tsforge.tracking.study import BEST_TRIAL, NOTE, OUTCOME, PRUNED, STUDY, TRIAL, TRIALS
from tsforge.tuning.config import TuneConfig
from tsforge.tuning.result import TrialRecord, TuneResult
from tsforge.tuning.space import Choice, Space, build_space
from tsforge.tuning.study import Pruned, Trial, opened

_CONTEXT = "window.context_length"
_READERS = {  # what decides which candidates of model=auto can take which covariates
    "covariates",
    "model.candidates",
    "model.minutes",
    "model.max_trials",
    "scaling.kind",
}
_GRADED = "what is graded of the valid span depends on it, and errors on different values cannot be compared"
_ONE_EACH = "run a study for each setting, under a study.name of its own"
_UNSEARCHED = {  # a field, or a section with a dot behind it: why it cannot be searched, and what to do
    "data.": (
        "all trials share the data as fit.data states it, and errors on different data cannot be compared",
        "tune each data set by itself, under a study.name of its own",
    ),
    "window.horizon": (_GRADED, _ONE_EACH),
    "window.min_observed": (_GRADED, _ONE_EACH),
    "split.": (_GRADED, _ONE_EACH),
    "entities.held_out": (_GRADED, _ONE_EACH),
    "entities.seed": (_GRADED, _ONE_EACH),
    "model.name": (
        "each model has settings and a search space of its own",
        "run a study for each model, under a study.name of its own, or fit model=auto, which tries them all",
    ),
    "warm_start.": ("trials begin at fresh weights", "leave it out"),
    "calibration.": ("no error of a trial depends on it", "set it in fit, the best config keeps it"),
    "log_graphs": ("no error of a trial depends on it", "set it in fit, the best config keeps it"),
    "tracking.": ("no error of a trial depends on it", "set it in fit, the best config keeps it"),
}


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
        ConfigError: see ``checked_space``; covariates that no model would take, or the study of that name searched
            something else.
        ModelError: no trial succeeded.
        BackendError: another process works on the study, or a store does not answer.
        KeyboardInterrupt: finished trials and the best config so far are kept.
    """
    space = checked_space(config)
    frame = load_history(workspace, config.fit.data, masked=True)
    _check_contexts(config, space, frame)
    _check_readers(config.fit, space, frame)
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


def checked_space(config: TuneJobConfig) -> Space:
    """Return the space of a job after every check that needs no data.

    Raises:
        ConfigError: no fit has the metric, its largest value is asked for, weights to start from, or see
            ``trial_space``.
    """
    _check_metric(config)
    start = config.fit.warm_start.artifact
    if start is not None:
        raise ConfigError(f"fit.warm_start.artifact={start} has no effect: trials begin at fresh weights; leave it out")
    return trial_space(config)


def _check_metric(config: TuneJobConfig) -> None:
    """Refuse a metric that no fit reports, and the search for a large error, before the first trial is trained."""
    parts = ["valid", *(["valid_unseen"] if config.fit.entities.held_out else [])]
    known = [f"{part}_{error}" for part in parts for error in ("mae", "mse")]
    metric = config.study.metric
    if metric not in known:
        raise ConfigError(
            f"study.metric={metric}: no fit reports it{nearest(metric, known)} (known: {', '.join(known)})"
        )
    if config.study.direction == "maximize":
        raise ConfigError(
            f"study.direction=maximize looks for the worst configuration: {metric} is an error, as all that a fit "
            "reports; leave study.direction out"
        )


def trial_space(config: TuneJobConfig) -> Space:
    """Return the space of a job.

    Settings of gradient training are left out for models that are solved in closed form, unless ``study.space`` names
    them.

    Raises:
        ConfigError: see ``build_space``; a field that cannot be searched, or a value that its field does not take.
    """
    declared = search_space(config.fit)
    can = MODELS.get(config.fit.model.name).capabilities_of(config.fit.model)
    if can.closed_form and not can.starts_closed:
        declared = {
            name: space
            for name, space in declared.items()
            if not name.startswith("train.") or name in config.study.space
        }
    space = build_space(declared, config.study.space, leaves(config.fit.model_dump(mode="json")))
    _check_fields(config.fit, space)
    _check_values(config.fit, space)
    return space


def _check_fields(fit: FitConfig, space: Space) -> None:
    """Refuse fields whose errors cannot be compared, and those that a trial does not read."""
    refused: dict[tuple[str, str], list[str]] = {}
    for name in space:
        keys = [key for key in _UNSEARCHED if name == key or (key.endswith(".") and name.startswith(key))]
        if keys:
            refused.setdefault(_UNSEARCHED[keys[0]], []).append(name)
        elif name == "model.refit" and fit.model.name == AUTO:  # rows that members are fitted on are not graded
            refused.setdefault((_GRADED, _ONE_EACH), []).append(name)
    if refused:
        parts = [f"{listing(names, 20)} cannot be searched: {why}; {way}" for (why, way), names in refused.items()]
        raise ConfigError("study.space: " + ". ".join(parts))


def _check_values(fit: FitConfig, space: Space) -> None:
    """Refuse a choice, or an end of a range, with which every trial would fail before it is fitted."""
    faults = []
    for name, dimension in space.items():
        beside = [other for other in space if other != name and other.split(".")[0] == name.split(".")[0]]
        for value in dimension.choices if isinstance(dimension, Choice) else dimension.ends:
            try:
                with_values(fit, {name: value})
            except ConfigError as error:
                whose = _whose_fault(fit, name, value)
                # between the ends of a range, or with other values of other searched fields, it may go
                if whose == "field" or (whose == "section" and isinstance(dimension, Choice) and not beside):
                    faults.append(f"{name} cannot be {value!r} ({error})")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        told = "; ".join(faults[:5])
        raise ConfigError(f"study.space: {told}{more}; correct the space, or leave these values out")


def _whose_fault(fit: FitConfig, name: str, value: Any) -> Literal["field", "section", "fit"]:
    """Return why a value is refused: its own type and bounds, other fields of its section, or those of another one."""
    section, *path = name.split(".")
    holder = getattr(fit, section)
    if not path or not isinstance(holder, BaseModel):
        holder, path = fit, [section]
    plain = holder.model_dump(mode="json")
    place = plain
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    try:
        type(holder).model_validate(plain)
    except ValidationError as error:
        own = any(list(item["loc"][: len(path)]) == path for item in error.errors())
        return "field" if own else "section"
    except ConfigError:  # of settings that do not go together
        return "section" if holder is not fit else "fit"
    return "fit"


def _check_readers(fit: FitConfig, space: Space, history: History) -> None:
    """Refuse ``covariates=all`` where no candidate of ``model=auto`` takes some of them: each trial would."""
    if fit.model.name != AUTO or fit.covariates != "all" or _READERS & set(space):
        return
    panel = Panel.from_frame(newest(history))
    train = make_splits(panel, fit.split).train
    check_readers(
        RaceData(
            panel=panel,
            train=train,
            select=None,
            final_stop=train[1],
            window=fit.window_spec,
            network=fit.network,
            training=fit.train,
            unit=np.ones(panel.num_targets),
        )
    )


def _check_contexts(config: TuneJobConfig, space: Space, history: History) -> None:
    """Refuse context lengths with which other windows of the valid span are graded: a series may begin too late."""
    dimension, fit = space.get(_CONTEXT), config.fit
    if dimension is None:
        return
    panel = Panel.from_frame(newest(history))
    splits, names = make_splits(panel, fit.split), choose_held_out(fit.entities, panel.series_ids)
    chosen = np.isin(panel.series_ids, names)
    trained = ~chosen if names else None
    graded = chosen if names and config.study.metric.startswith("valid_unseen") else trained
    aligned = MODELS.get(fit.model.name).capabilities_of(fit.model).rows_coupled

    def windows(span: tuple[int, int], context: int) -> int:
        only = trained if span is splits.train else graded
        return len(count_windows(panel, fit.window.horizon, 1, span, need=context, only=only, aligned=aligned))

    values = dimension.choices if isinstance(dimension, Choice) else dimension.ends
    window = fit.window.model_dump()
    lengths = sorted(validate(WindowConfig, window | {"context_length": value}).context_length for value in values)
    low, wide = lengths[0], range(lengths[0], lengths[-1] + 1)
    # a context that leaves no window to train on gives no error
    top = low + bisect_left(wide, True, key=lambda length: not windows(splits.train, length)) - 1
    if top < low:
        return
    longest = max(length for length in lengths if length <= top) if isinstance(dimension, Choice) else top
    most, fewest = windows(splits.valid, low), windows(splits.valid, longest)
    if fewest < most:
        limit = low + bisect_left(wide, True, key=lambda length: windows(splits.valid, length) < most) - 1
        raise ConfigError(
            f"study.space: {_CONTEXT} cannot be searched from {low} to {longest}: some series begin so late that the "
            f"valid span has {most} windows with the first and {fewest} with the last, and errors on different windows "
            f"cannot be compared; search up to {limit}, or leave those series out of the data set"
        )


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
