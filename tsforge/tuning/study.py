"""A study: trials one after another, kept in SQLite, continued after any interruption.

Every trial has a seed derived from the number of finished ones, so a study that was stopped and continued makes the
same suggestions as one that ran through.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tsforge.core.atomic import atomic_file
from tsforge.core.config import fingerprint
from tsforge.core.database import database_error, reason
from tsforge.core.errors import BackendError, ConfigError, ModelError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.seeding import derive_seed
from tsforge.core.signals import interruption, termination_as_interrupt
from tsforge.core.workspace import sqlite_url
from tsforge.tuning.config import TuneConfig
from tsforge.tuning.progress import trial_progress
from tsforge.tuning.result import TrialRecord, TuneResult
from tsforge.tuning.space import Range, Space

_logger = get_logger(__name__)
_SETTINGS, _ERROR, _INTERRUPTED, _ATTEMPT, _RETRY_OF = "settings", "error", "interrupted", "attempt", "retry_of"
_OWN = frozenset({_ERROR, _INTERRUPTED, _ATTEMPT, _RETRY_OF})
_MAX_ATTEMPTS = 3
_BUSY_SECONDS = 20
_DAMAGE = ("malformed", "not a database", "no such table", "no such column")
_HARMLESS = ("locked", "is full", "no space left", "disk i/o error")  # what was committed before stays readable
# What one bad setting can cause; anything else is a fault of the program and ends the study.
TRIAL_ERRORS = (TsforgeError, ArithmeticError, RuntimeError, ValueError, MemoryError)


class Pruned(Exception):
    """Raised by ``Trial.report`` to end a hopeless trial; let it pass through the objective."""


class Trial:
    """The trial an objective is working on."""

    def __init__(self, trial: Any, config: TuneConfig, best_value: float | None) -> None:
        self.number: int = trial.number
        self.best_value = best_value
        self._trial = trial
        self._limit = config.trial_timeout_seconds
        self._start = time.monotonic()

    def report(self, step: int, value: float) -> None:
        """Record an intermediate value.

        Raises:
            Pruned: the trial is hopeless, or takes longer than ``trial_timeout_seconds``.
        """
        self._trial.report(float(value), step)
        if self._limit is not None and time.monotonic() - self._start > self._limit:
            raise Pruned(f"stopped after {self._limit:g} s")
        if self._trial.should_prune():
            raise Pruned(f"stopped at step {step}: {value:.6g} is worse than other trials were then")

    def note(self, **facts: str | int | float) -> None:
        """Keep facts beside the trial (run id, artifact id)."""
        for key, value in facts.items():
            self._trial.set_user_attr(key, value)


Objective = Callable[[dict[str, Any], Trial], float]


def tune(
    objective: Objective,
    space: Space,
    config: TuneConfig,
    *,
    directory: Path,
    defaults: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
    on_trial: Callable[[TrialRecord, TuneResult | None], None] | None = None,
    progress: bool = False,
) -> TuneResult:
    """Run trials until ``config.num_trials`` are finished or the time is up, and return what was found.

    Args:
        objective: takes dotted values and the trial, returns the metric; it may call ``trial.report`` on the way.
        space: what to search.
        config: budget, sampler, pruner.
        directory: holds ``NAME.db``; one process at a time works on a study.
        defaults: present values of the fields; tried first when they lie inside the space, and next where they
            changed since.
        context: whatever else must be equal for results to be comparable (data, split, seed).
        on_trial: called after every finished trial with its record and the result so far (None before a success).
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: a range without two finite ends; a study of that name searched another space, metric or context.
        BackendError: another process works on the study, or its file cannot be used.
        ModelError: no trial succeeded; the message quotes the most frequent reason.
        KeyboardInterrupt: Ctrl-C or SIGTERM; finished trials are kept and the unfinished one is tried again next time.
    """
    with opened(space, config, directory=directory, defaults=defaults, context=context) as session:
        return session.run(objective, on_trial, progress)


@contextmanager
def opened(
    space: Space,
    config: TuneConfig,
    *,
    directory: Path,
    defaults: Mapping[str, Any] | None = None,
    context: Mapping[str, Any] | None = None,
) -> Iterator[Session]:
    """Hold a study for the block, entered only when this process may work on it (arguments and errors: ``tune``)."""
    path = directory / f"{config.name}.db"
    for name, dimension in space.items():
        if isinstance(dimension, Range) and not -math.inf < dimension.low <= dimension.high < math.inf:
            raise ConfigError(
                f"space.{name}: a range has two finite ends, the lower first (given: {dimension.low:g}, "
                f"{dimension.high:g})"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"cannot make the folder of studies {directory}: {error.strerror}; move what is in its place, or choose a "
            "writable workspace (TSFORGE_HOME)"
        ) from error
    lock = directory / f".{config.name}.lock"
    with termination_as_interrupt(), _only_process(lock, config.name), _storage_errors(path):
        yield Session(path, space, config, context or {}, defaults or {})


@contextmanager
def _only_process(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock for the block; the operating system frees it however the process ends."""
    try:
        connection = sqlite3.connect(path, timeout=0.2, isolation_level=None)
    except sqlite3.Error as error:
        raise BackendError(f"cannot write {path}: {error}; choose a writable workspace (TSFORGE_HOME)") from error
    with closing(connection):
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            reason = "another process is working on it" if "locked" in str(error) else str(error)
            raise BackendError(
                f"study '{name}' cannot be run: {reason}; wait for it, or choose another name"
            ) from error
        yield


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Explain what Optuna raises about an open study; its own words tell little, their cause tells more."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        raise _lost(path, error.__cause__ if isinstance(error.__cause__, Exception) else error) from error


@contextmanager
def _making_errors(path: Path) -> Iterator[None]:
    """Explain what comes through Optuna as it is while the tables of a study are made or looked up."""
    try:
        yield
    except database_error() as error:
        raise _lost(path, error) from error


def _lost(path: Path, error: Exception) -> BackendError:
    said = str(getattr(error, "orig", None) or error)
    if any(sign in said.lower() for sign in _DAMAGE):
        return _no_study(path, said.splitlines()[0])
    why = reason(error, "free space and run it again")
    if any(sign in said.lower() for sign in _HARMLESS):
        why += "; finished trials are safe"
    return BackendError(f"the study file {path} could not be written or read: {why}")


def _no_study(path: Path, why: object) -> BackendError:
    return BackendError(
        f"{path} is no study file ({why}); restore it from a backup, first removing {path.name}-wal and "
        f"{path.name}-shm if they are there, or move it away to start afresh"
    )


class _Connection(sqlite3.Connection):
    """Commits without waiting for the disk: a killed process loses nothing, a power cut at most the last seconds."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")


def _open(path: Path) -> Any:
    """Return the Optuna storage in ``path``, made whole or not at all."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not path.exists():
        for suffix in ("-wal", "-shm", "-journal"):  # of a study that was removed: SQLite would replay them into ours
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        with atomic_file(path) as temporary:
            with _making_errors(path):
                storage = optuna.storages.RDBStorage(sqlite_url(temporary))
            storage.remove_session()
            storage.engine.dispose()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("SELECT count(*) FROM trials")
    except sqlite3.Error as error:
        raise _no_study(path, error) from error
    try:
        with _making_errors(path):
            return optuna.storages.RDBStorage(
                sqlite_url(path.resolve()),
                engine_kwargs={"connect_args": {"factory": _Connection, "timeout": _BUSY_SECONDS}},
            )
    except RuntimeError as error:
        raise BackendError(f"{path} was written by another version of Optuna: {error}") from error


class Session:
    """One process working on one study; made by ``opened``."""

    def __init__(
        self, path: Path, space: Space, config: TuneConfig, context: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        import optuna

        self.path, self.space, self.config = path, space, config
        self.states = optuna.trial.TrialState
        self.storage = _open(path)
        self.study = optuna.create_study(
            study_name=config.name,
            storage=self.storage,
            direction=config.direction,
            load_if_exists=True,
            pruner=_pruner(config),
        )
        self.was_timed_out = False
        self._check_identity(context)
        if config.starts_from_defaults:
            self._enqueue_defaults(defaults)

    def _check_identity(self, context: Mapping[str, Any]) -> None:
        """Refuse to mix results that cannot be compared."""
        settings = {
            "metric": self.config.metric,
            "direction": self.config.direction,
            **{f"space.{name}": dimension.describe() for name, dimension in self.space.items()},
            **{name: fingerprint({"value": value}) for name, value in context.items()},
        }
        known = self.study.user_attrs.get(_SETTINGS)
        if known is None:
            self.study.set_user_attr(_SETTINGS, settings)
            return
        changed = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if changed:
            raise ConfigError(
                f"study '{self.config.name}' was started with other settings ({listing(changed)}), its results cannot "
                f"be mixed with new ones; choose another name, or remove {self.path} to start afresh"
            )

    def _enqueue_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Queue the configured values unless the study tried or queued them before."""
        encoded = {name: dimension.encode(defaults.get(name)) for name, dimension in self.space.items()}
        outside = [name for name, value in encoded.items() if value is None]
        if outside:
            log_event(_logger, "the configured values lie outside the search space, not tried", fields=outside)
            return
        known = len(self.study.get_trials(deepcopy=False))
        self.study.enqueue_trial(encoded, skip_if_exists=True)
        if known and len(self.study.get_trials(deepcopy=False)) > known:
            message = "the configured values are new to the study and tried next"
            if self._num_finished() >= self.config.num_trials:
                message += "; its trials are used up, raise study.num_trials"
            log_event(_logger, message, fields=list(encoded))

    def _recover(self) -> None:
        """Queue again what a vanished process left unfinished."""
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            self._put_back(trial, attempt=trial.user_attrs.get(_ATTEMPT, 1) + 1)

    def _put_back(self, trial: Any, attempt: int) -> None:
        """Mark a trial as interrupted and queue its values; in this order nothing is lost at any moment."""
        if attempt > _MAX_ATTEMPTS:
            message = f"the process ended during this trial {_MAX_ATTEMPTS} times"
            self.storage.set_trial_user_attr(trial._trial_id, _ERROR, message)
        else:
            queued = self.study.get_trials(deepcopy=False, states=(self.states.WAITING,))
            if all(item.user_attrs.get(_RETRY_OF) != trial.number for item in queued):
                values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                self.study.enqueue_trial(values, user_attrs={_RETRY_OF: trial.number, _ATTEMPT: attempt})
            self.storage.set_trial_user_attr(trial._trial_id, _INTERRUPTED, True)
        self.storage.set_trial_state_values(trial._trial_id, self.states.FAIL)

    def run(
        self,
        objective: Objective,
        on_trial: Callable[[TrialRecord, TuneResult | None], None] | None = None,
        progress: bool = False,
    ) -> TuneResult:
        """Work until enough trials are finished and return what was found (arguments and errors: ``tune``)."""
        self._recover()
        self._work(objective, on_trial, progress)
        return self.result(with_importance=True)

    def _work(
        self, objective: Objective, on_trial: Callable[[TrialRecord, TuneResult | None], None] | None, progress: bool
    ) -> None:
        start = time.monotonic()
        limit = self.config.timeout_seconds
        with trial_progress(self.config, progress) as show:
            while (finished := self._num_finished()) < self.config.num_trials:
                show(finished, self._best_value())
                if limit is not None and time.monotonic() - start > limit:
                    self.was_timed_out = True
                    return
                self.study.sampler = _sampler(self.config, finished)
                record = self._one(objective)
                if on_trial is not None:
                    on_trial(record, None if self._best_value() is None else self.result())
                self._give_up_if_hopeless()
            show(self.config.num_trials, self._best_value())

    def _one(self, objective: Objective) -> TrialRecord:
        """Run one trial to its end, whatever that is."""
        trial = self.study.ask()
        values: dict[str, Any] = {}
        try:
            values = {name: dimension.suggest(trial, name) for name, dimension in self.space.items()}
            value = float(objective(values, Trial(trial, self.config, self._best_value())))
            if not math.isfinite(value):
                raise ArithmeticError(f"{self.config.metric} is {value}")
            self.study.tell(trial, value)
        except Pruned as stop:
            trial.set_user_attr(_ERROR, str(stop))
            self.study.tell(trial, state=self.states.PRUNED)
        except BaseException as error:
            if interruption(error) is not None or isinstance(error, BackendError):
                self._put_back(self._frozen(trial), attempt=trial.user_attrs.get(_ATTEMPT, 1))
                raise
            trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}"[:1000])
            self.study.tell(trial, state=self.states.FAIL)
            if not isinstance(error, TRIAL_ERRORS):
                raise
            _logger.warning("trial %d failed: %s", trial.number, error)
        return self._record(self._frozen(trial))

    def _frozen(self, trial: Any) -> Any:
        return self.storage.get_trial(trial._trial_id)

    def _num_finished(self) -> int:
        ended = (self.states.COMPLETE, self.states.PRUNED, self.states.FAIL)
        trials = self.study.get_trials(deepcopy=False, states=ended)
        return sum(not trial.user_attrs.get(_INTERRUPTED, False) for trial in trials)

    def _complete(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False, states=(self.states.COMPLETE,)))

    def _best_value(self) -> float | None:
        values = [trial.value for trial in self._complete()]
        if not values:
            return None
        return float(min(values) if self.config.direction == "minimize" else max(values))

    def _give_up_if_hopeless(self) -> None:
        finished = self._num_finished()
        if finished >= self.config.max_first_failures and all(
            record.state in ("failed", "interrupted") for record in self._records()
        ):
            raise ModelError(self._no_success())

    def _no_success(self) -> str:
        errors = [record.error for record in self._records() if record.error]
        reason = max(set(errors), key=errors.count) if errors else "no trial finished in time"
        return (
            f"study '{self.config.name}': none of {self._num_finished()} trials succeeded; "
            f"most frequent reason: {reason}"
        )

    def _records(self) -> tuple[TrialRecord, ...]:
        trials = self.study.get_trials(deepcopy=False)
        return tuple(self._record(trial) for trial in trials if trial.state != self.states.WAITING)

    def _record(self, trial: Any) -> TrialRecord:
        names = {
            self.states.COMPLETE: "complete",
            self.states.PRUNED: "pruned",
            self.states.FAIL: "interrupted" if trial.user_attrs.get(_INTERRUPTED) else "failed",
            self.states.RUNNING: "running",
        }
        known = {name: value for name, value in trial.params.items() if name in self.space}
        return TrialRecord(
            number=trial.number,
            state=names[trial.state],  # type: ignore[arg-type]
            value=trial.value,
            values={name: self.space[name].decode(value) for name, value in known.items()},
            seconds=trial.duration.total_seconds() if trial.duration else None,
            num_reports=len(trial.intermediate_values),
            error=trial.user_attrs.get(_ERROR),
            notes={key: value for key, value in trial.user_attrs.items() if key not in _OWN},
        )

    def result(self, *, with_importance: bool = False) -> TuneResult:
        """Return what was found so far.

        Raises:
            ModelError: no trial succeeded yet.
        """
        complete = self._complete()
        if not complete:
            raise ModelError(self._no_success())
        sign = 1 if self.config.direction == "minimize" else -1
        best = min(complete, key=lambda trial: (sign * trial.value, trial.number))
        return TuneResult(
            name=self.config.name,
            metric=self.config.metric,
            direction=self.config.direction,
            trials=self._records(),
            best=self._record(best),
            importance=self._importance(complete) if with_importance else {},
            storage=self.path,
            was_timed_out=self.was_timed_out,
        )

    def _importance(self, complete: list[Any]) -> dict[str, float]:
        """Return the share of each field in the variation of the metric; needs a few different results."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        evaluator = FanovaImportanceEvaluator(seed=self.config.seed % 2**32)
        try:
            shares = get_param_importances(self.study, evaluator=evaluator)
        except RuntimeError as error:
            if "zero total variance" not in str(error):
                raise
            return {}  # results that differ by rounding
        return dict(sorted(((name, float(share)) for name, share in shares.items()), key=lambda item: -item[1]))


def _sampler(config: TuneConfig, finished: int) -> Any:
    import optuna

    seed = derive_seed(config.seed, "tune", finished)
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.num_startup_trials)


def _pruner(config: TuneConfig) -> Any:
    import optuna

    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=config.num_warmup_reports)
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    return optuna.pruners.NopPruner()
