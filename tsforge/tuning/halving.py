"""Successive halving among candidates that learn in steps: hopeless ones are stopped early.

Asynchronous successive halving as in Optuna (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning,
MLSys, Alg. 2), run one candidate at a time and in memory: after 1, k, k^2, ... steps a candidate goes on only if its
value is among the best 1/k of those that came so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tsforge.core.errors import TsforgeError
from tsforge.core.logs import get_logger
from tsforge.core.signals import interruption
from tsforge.tuning.study import TRIAL_ERRORS, Pruned

_LOG = get_logger(__name__)
State = Literal["complete", "stopped", "left_out", "failed"]


class NotBegun(TsforgeError):
    """Raised by an objective about a candidate that it leaves out, which is no failure of the candidate."""


@dataclass(frozen=True, kw_only=True)
class ContestRecord:
    """How one candidate did.

    Attributes:
        name: of the candidate.
        state: ``complete``, ``stopped`` by a rung, ``left_out`` before its first step, or ``failed``.
        value: what the objective returned, None unless complete.
        steps: reports made.
        seconds: wall time.
        error: why it was stopped or left out, or failed.
    """

    name: str
    state: State
    value: float | None
    steps: int
    seconds: float
    error: str | None = None


class Contestant:
    """The candidate an objective is working on."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial
        self.steps = 0

    def report(self, value: float) -> None:
        """Record the value after one more step.

        Raises:
            Pruned: others did better with as many steps.
        """
        self.steps += 1
        self._trial.report(float(value), self.steps)
        if self._trial.should_prune():
            raise Pruned(f"stopped after {self.steps} epochs: {value:.4g} was not among the best then")


def halve(
    names: Sequence[str],
    objective: Callable[[str, Contestant], float],
    *,
    factor: int = 3,
    on_record: Callable[[ContestRecord], None] | None = None,
) -> list[ContestRecord]:
    """Run the candidates in order and return how each of them did; less is better.

    Args:
        names: unique, those expected to be quick first: rungs fill early.
        objective: takes a name and the contestant, to which it reports after every step; returns the final value.
        factor: k; a rung lets one in k pass.
        on_record: called after each candidate.

    Raises:
        KeyboardInterrupt: passed on.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    study = optuna.create_study(direction="minimize", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    space: dict[str, Any] = {"name": optuna.distributions.CategoricalDistribution(list(names))} if names else {}
    records = []
    for name in names:
        study.enqueue_trial({"name": name})
        trial = study.ask(space)
        record = _one(study, trial, name, objective)
        records.append(record)
        if on_record is not None:
            on_record(record)
    return records


def _one(study: Any, trial: Any, name: str, objective: Callable[[str, Contestant], float]) -> ContestRecord:
    from optuna.trial import TrialState

    contestant, started = Contestant(trial), time.monotonic()

    def record(state: State, value: float | None, why: str | None) -> ContestRecord:
        seconds = time.monotonic() - started
        return ContestRecord(name=name, state=state, value=value, steps=contestant.steps, seconds=seconds, error=why)

    try:
        value = float(objective(name, contestant))
        if not math.isfinite(value):
            raise ArithmeticError(f"its error is {value}")
        study.tell(trial, value)
        return record("complete", value, None)
    except Pruned as stop:
        study.tell(trial, state=TrialState.PRUNED)
        return record("stopped", None, str(stop))
    except NotBegun as reason:
        study.tell(trial, state=TrialState.FAIL)  # Optuna has no other word for it
        return record("left_out", None, str(reason))
    except TRIAL_ERRORS as error:
        study.tell(trial, state=TrialState.FAIL)
        if interruption(error) is not None:
            raise
        why = str(error) if isinstance(error, TsforgeError) else f"{type(error).__name__}: {error}"
        _LOG.warning("candidate %s failed: %s", name, why)
        return record("failed", None, why)
