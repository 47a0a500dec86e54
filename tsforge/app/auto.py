"""``model=auto``: race closed forms on rolling origins, spend what is left of the time on trained models, mix the best.

1. Every closed form is fitted before the last fold and forecasts it; the better half does so on the earlier folds too.
2. Greedy selection on these held-out errors gives the mixture of closed forms (``forecasting.combination``). It leans
   on one of them that follows a level that moves, the more the less clearly the folds speak against it.
3. Trained models run in successive halving until the time is spent. They stop on the first half of the last fold and
   are compared on its second half, where they must improve the mixture by more than one standard error over stretches
   of time to be let in; the new mixture leans on the old one in the same way.
4. Closed forms are fitted again on every row that is not needed for calibration.

No row after the selection span is looked at: neither by a fit, nor by a scaling, nor by a weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsforge.app.auto_candidates import (
    AUTO,
    Candidate,
    RaceData,
    anchor_name,
    check_wanted,
    closed_forms,
    num_parameters,
    solve,
    step_seconds,
    train,
    trained_models,
    unusable,
)
from tsforge.core.config import validate
from tsforge.core.errors import DataError, ModelError, TsforgeError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.data.panel import Panel
from tsforge.data.splits import Splits
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.ensemble import EnsembleNetwork, ensemble_spec, member_batch
from tsforge.forecasting.combination import (
    HeldOutErrors,
    block_losses,
    clear_gain,
    greedy_weights,
    leaning_weights,
    mixture_weights,
)
from tsforge.forecasting.window_forecasts import as_array, check_finite, evaluating, window_batches
from tsforge.models.auto import Auto, AutoConfig
from tsforge.network import ForecastNetwork, NetworkConfig
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import StopTraining
from tsforge.training.loop import TrainResult
from tsforge.tuning.halving import Contestant, ContestRecord, NotBegun, halve

__all__ = ["AUTO", "RaceData", "fit_for_benchmark", "race"]

_LOG = get_logger(__name__)
_CELLS = 400_000  # of a candidate's errors in a fold; more windows overlap more than they tell
_FEWEST_WINDOWS = 12
_BLOCKS = 4  # stretches of a fold
_SPENT = "not begun: the time is spent"
_KEPT = 12  # closed forms that are tried on the earlier folds
_ERRORS = (TsforgeError, ArithmeticError, RuntimeError, ValueError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Targets in rows ``[start, stop)``, forecast by fits on the rows before ``start``."""

    start: int
    stop: int
    windows: WindowDataset
    chosen: NDArray[np.int64]

    def cutoffs(self) -> NDArray[np.int64]:
        return self.windows.cutoff_index[self.chosen]


@dataclass
class _Line:
    """One candidate in the report."""

    candidate: Candidate
    stage: str
    folds: int = 0
    error: float | None = None
    spread: float | None = None
    seconds: float = 0.0
    weight: float = 0.0
    why: str = ""

    def record(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate.name,
            "stage": self.stage,
            "folds": self.folds,
            "error": self.error,
            "spread": self.spread,
            "seconds": round(self.seconds, 2),
            "weight": round(self.weight, 4),
            "why": self.why,
        }


@dataclass
class _Race:
    """What is known so far."""

    data: RaceData
    started: float
    progress: bool
    folds: list[_Fold]
    lines: dict[str, _Line] = field(default_factory=dict)
    errors: dict[str, dict[int, NDArray[np.float32]]] = field(default_factory=dict)
    trained: dict[str, tuple[ForecastNetwork, TrainResult]] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return 60.0 * self.data.settings.minutes - (time.monotonic() - self.started)

    def tell(self, line: _Line) -> None:
        if self.progress:
            known = {name: value for name, value in line.record().items() if name != "weight"}  # decided at the end
            log_event(_LOG, "candidate", **{name: value for name, value in known.items() if value not in (None, "")})


def race(data: RaceData, *, progress: bool = False) -> tuple[EnsembleNetwork, TrainResult]:
    """Return the fitted mixture and the record of its making.

    Args:
        data: spans, window and settings.
        progress: log a line for each candidate.

    Raises:
        ConfigError: ``model.candidates`` names no model.
        DataError: too few rows for one fold.
        ModelError: no candidate could be fitted.
    """
    check_wanted(data.settings)
    work = _Race(data, time.monotonic(), progress, _folds(data))
    members = _race_closed(work)
    weights = _closed_weights(work, members)
    members, weights = _race_trained(work, members, weights)
    network = _assemble(work, members, weights)
    ended = sum(result.epochs for _, result in work.trained.values())
    history = tuple(row for name in members if name in work.trained for row in work.trained[name][1].history)
    return network, TrainResult(
        epochs=ended,
        history=history,
        best_epoch=ended - 1,
        metrics={},
        solve=None,
        stopped_by="raced",
        seconds=time.monotonic() - work.started,
        windows_per_second=0.0,
    )


def fit_for_benchmark(
    panel: Panel,
    splits: Splits,
    window: WindowSpec,
    options: Mapping[str, Any],
    *,
    train: TrainConfig,
    seed: int,
    progress: bool,
) -> EnsembleNetwork:
    """Return the mixture as a benchmark asks for it: standardised panel, all of the validation span to choose by.

    Args:
        panel: one series, ending where the test begins.
        splits: spans of rows.
        window: look-back and horizon.
        options: settings of ``AutoConfig``.
        train: how gradient training runs.
        seed: of initial weights and shuffling.
        progress: log a line for each candidate.

    Raises:
        ConfigError: an option that ``AutoConfig`` does not have.
        DataError, ModelError: see ``race``.
    """
    settings = validate(AutoConfig, {**options, "name": AUTO}, where=AUTO)
    data = RaceData(
        panel=panel,
        train=splits.train,
        select=splits.valid if splits.valid[1] - splits.valid[0] >= window.horizon else None,
        final_stop=splits.valid[1] if settings.refit == "all" else splits.train[1],
        window=window,
        network=NetworkConfig(model=settings),
        training=train.model_copy(update={"seed": seed}),
        unit=np.ones(panel.num_targets),
    )
    return race(data, progress=progress)[0]


def _folds(data: RaceData) -> list[_Fold]:
    """Return the folds in time order; the last one is the selection span, or the end of the training span."""
    first, stop = data.train
    number, horizon = data.settings.folds, data.window.horizon
    spans = [] if data.select is None else [data.select]
    rows, needed = stop - first, data.window.context_length + horizon
    while number > 1 and (rows // (number + 2) < horizon or rows - number * (rows // (number + 2)) < needed):
        number -= 1
    if number < data.settings.folds:
        told = (data.settings.folds, rows, number)
        _LOG.warning("model.folds is %d; %d training rows hold %d with a window before them", *told)
    size = rows // (number + 2)  # the first fold still leaves two parts of its size or more to fit on
    if data.select is not None:
        size = min(size, data.select[1] - data.select[0])
    while len(spans) < number and size >= horizon:
        spans.insert(0, (stop - size, stop))
        stop -= size
    folds = []
    for span in spans:
        try:
            folds.append(_fold(data, *span))
        except DataError:  # the earliest one may leave nobody enough history
            continue
    if not folds:
        raise DataError(
            f"model=auto: {data.train[1] - first} training rows leave no fold of {horizon} steps to compare candidates "
            "on; shorten the horizon or the look-back, or choose a model"
        )
    return folds


def _fold(data: RaceData, start: int, stop: int) -> _Fold:
    windows = data.windows((start, stop))
    cells = data.window.horizon * data.panel.num_targets
    count = min(len(windows), max(_FEWEST_WINDOWS, _CELLS // cells))
    chosen = np.unique(np.linspace(0, len(windows) - 1, count).round().astype(np.int64))
    return _Fold(start=start, stop=stop, windows=windows, chosen=chosen)


@torch.no_grad()
def _errors_in(network: ForecastNetwork, fold: _Fold, unit: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return forecast minus target [N, H, V] in units [V], or [S, V] of each series; 0 where not observed."""
    parts = []
    with evaluating(network):
        for batch in window_batches(network, fold.windows, indices=fold.chosen):
            mean = as_array(network.predict(member_batch(batch, network.spec)).mean)
            check_finite(network, mean)
            if batch.target is None or batch.target_mask is None or batch.series_index is None:
                raise DataError("held-out windows lost their targets")
            size = unit if unit.ndim == 1 else unit[batch.series_index.cpu().numpy()][:, None]
            error = (mean - as_array(batch.target)) / size
            parts.append(np.where(batch.target_mask.cpu().numpy(), error, 0.0).astype(np.float32))
    return np.concatenate(parts)


def _targets_of(fold: _Fold) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    batch = fold.windows.__getitems__(fold.chosen)
    if batch.target_mask is None or batch.series_index is None:
        raise DataError("held-out windows lost their targets")
    return batch.target_mask.numpy(), batch.series_index.numpy()


def _held_out(work: _Race, names: Sequence[str], folds: Sequence[int], *, after: int | None = None) -> HeldOutErrors:
    """Return the errors of candidates on some folds, in windows that begin at row ``after`` or later."""
    errors, masks, series, blocks = [], [], [], []
    for number in folds:
        fold = work.folds[number]
        mask, whose = _targets_of(fold)
        cutoff = fold.cutoffs()
        begin = fold.start if after is None else max(after, fold.start)
        keep = cutoff >= begin
        place = (cutoff[keep] - begin) * _BLOCKS // max(int(cutoff.max()) - begin + 1, 1)
        errors.append(np.stack([work.errors[name][number][keep] for name in names]))
        masks.append(mask[keep])
        series.append(whose[keep])
        blocks.append(place + _BLOCKS * number)
    return HeldOutErrors(
        errors=np.concatenate(errors, axis=1),
        mask=np.concatenate(masks),
        series=np.concatenate(series),
        block=np.concatenate(blocks),
    )


def _race_closed(work: _Race) -> list[str]:
    """Fit closed forms fold by fold, the last one first; return the names that went through all folds."""
    data, last = work.data, len(work.folds) - 1
    candidates = {one.name: one for one in closed_forms(data)}
    loss = getattr(data.network.likelihood, "loss", "mse")
    if candidates and loss != "mse":
        _LOG.warning(
            "the %d closed forms of the race minimise the squared error; likelihood.loss=%s is that of trained models",
            len(candidates),
            loss,
        )
    work.lines = {name: _Line(candidate=one, stage="closed form") for name, one in candidates.items()}
    alive = [name for name in candidates if _try_fold(work, name, last)]
    if not alive:
        return []
    ranked = sorted(alive, key=lambda name: _score(work, name, [last])[0])
    anchor = anchor_name(data)
    kept = [name for place, name in enumerate(ranked) if place < _KEPT or name == anchor]
    for name in [name for name in ranked if name not in kept]:
        work.lines[name].why = f"not among the best {_KEPT} on the last fold"
    for number in range(last):
        kept = [name for name in kept if _try_fold(work, name, number)]
    for name in alive:
        line = work.lines[name]
        numbers = sorted(work.errors[name])
        line.folds = len(numbers)
        line.error, line.spread = _score(work, name, numbers)
        work.tell(line)
    return sorted(kept, key=lambda name: work.lines[name].error or 0.0)


def _try_fold(work: _Race, name: str, number: int) -> bool:
    """Forecast one fold by a fit on what came before; a failure is kept as the candidate's reason."""
    line, fold = work.lines[name], work.folds[number]
    started = time.monotonic()
    try:
        network = solve(work.data, line.candidate, fold.start)
        found = _errors_in(network, fold, work.data.unit)
    except _ERRORS as error:
        line.why = f"failed: {error}"
        _LOG.warning("candidate %s failed: %s", name, error)
        return False
    finally:
        line.seconds += time.monotonic() - started
    work.errors.setdefault(name, {})[number] = found
    return True


def _score(work: _Race, name: str, folds: Sequence[int], *, after: int | None = None) -> tuple[float, float]:
    """Return mean error of a candidate over stretches of time and its standard error."""
    losses = block_losses(_held_out(work, [name], folds, after=after), [1.0], work.data.settings.loss)
    spread = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else float("nan")
    return float(losses.mean()), spread


def _closed_weights(work: _Race, members: Sequence[str]) -> NDArray[np.float64]:
    """Return weights [G, M, 1, V or 1] of the closed forms."""
    if not members:
        return np.zeros((1, 0, 1, 1))
    settings = work.data.settings
    held = _held_out(work, members, range(len(work.folds)))
    return mixture_weights(
        held,
        scope=settings.weights,
        loss=settings.loss,
        max_members=settings.max_members,
        num_series=work.data.panel.num_series,
        anchor=members.index(anchor) if (anchor := anchor_name(work.data)) in members else None,
    )


def _race_trained(
    work: _Race, members: list[str], weights: NDArray[np.float64]
) -> tuple[list[str], NDArray[np.float64]]:
    """Train in the time that is left and let in what clearly helps; return all members and their weights."""
    data = work.data
    candidates = {one.name: one for one in trained_models(data)}
    work.lines |= {name: _Line(candidate=one, stage="trained") for name, one in candidates.items()}
    last = work.folds[-1]
    middle = _middle(last, data.window.horizon)

    def finished(record: ContestRecord) -> None:
        line = work.lines[record.name]
        line.seconds, line.why = line.seconds + record.seconds, record.error or "trained"
        if record.name in work.trained:
            line.folds = 1
            line.error, line.spread = _score(work, record.name, [len(work.folds) - 1], after=middle)
        work.tell(line)

    costs = _step_costs(work, list(candidates))
    sizes = {name: num_parameters(data, one) for name, one in candidates.items() if name in costs}
    order = sorted(costs, key=lambda name: sizes[name])  # not by the clock: the outcome depends on the order
    halve(order, lambda name, contestant: _train(work, name, contestant, costs[name], middle), on_record=finished)
    _tell_left_out(work, list(candidates))
    names = [name for name in candidates if name in work.trained]
    if not names:
        return members, weights
    return _let_in(work, members, weights, names, middle)


def _tell_left_out(work: _Race, names: Sequence[str]) -> None:
    """Say once how many candidates the time did not reach; the leaderboard says why of each."""
    left_out = [name for name in names if work.lines[name].why.startswith("not begun")]
    if left_out:
        _LOG.warning(
            "%d of %d candidates that need training were not begun within model.minutes=%g: %s",
            len(left_out),
            len(names),
            work.data.settings.minutes,
            listing(left_out, 5),
        )


def _step_costs(work: _Race, names: Sequence[str]) -> dict[str, float]:
    """Return seconds a gradient step of every candidate that can take one; others keep their reason."""
    costs = {}
    for name in names:
        line, started = work.lines[name], time.monotonic()
        if work.seconds_left <= 0:
            line.why = _SPENT
            continue
        try:
            costs[name] = step_seconds(_before(work.data, work.folds[-1]), line.candidate)
        except _ERRORS as error:
            line.why = f"failed: {error}"
            _LOG.warning("candidate %s failed: %s", name, error)
        line.seconds = time.monotonic() - started
    return costs


def _before(data: RaceData, fold: _Fold) -> RaceData:
    """Return the data with a training span that ends where a fold begins."""
    return replace(data, train=(data.train[0], min(data.train[1], fold.start)))


def _middle(fold: _Fold, horizon: int) -> int:
    """Return the row that parts what stops the training from what compares; the start of a fold too short for both."""
    half = fold.start + (fold.stop - fold.start) // 2
    return half if fold.stop - half >= horizon and half - fold.start >= horizon else fold.start


def _train(work: _Race, name: str, contestant: Contestant, each: float, middle: int) -> float:
    """Train one candidate within the time left and return its error on the windows that stop it."""
    data, fold = work.data, work.folds[-1]
    candidate = work.lines[name].candidate
    waiting = [other for other, line in work.lines.items() if line.stage == "trained" and not line.why]
    left = work.seconds_left
    if left <= 0:
        raise NotBegun(_SPENT)
    share = left / max(len(waiting), 1)
    stop = (fold.start, middle if middle > fold.start else fold.stop)
    watched = _fold(data, *stop)
    last = time.monotonic()

    def after_epoch(network: ForecastNetwork, epoch: int) -> None:
        nonlocal last
        contestant.report(_loss(_errors_in(network, watched, data.unit), data.settings.loss))
        now = time.monotonic()
        epoch_seconds, last = now - last, now
        if work.seconds_left < 1.5 * epoch_seconds:
            raise StopTraining

    inside = _before(data, fold)
    network, result = train(inside, candidate, stop, each=each, seconds=share, on_epoch=after_epoch)
    work.errors[name] = {len(work.folds) - 1: _errors_in(network, fold, data.unit)}
    work.trained[name] = (network, result)
    return _loss(_errors_in(network, watched, data.unit), data.settings.loss)


def _loss(errors: NDArray[np.float32], loss: str) -> float:
    return float(np.mean(errors.astype(np.float64) ** 2 if loss == "mse" else np.abs(errors)))


def _let_in(
    work: _Race, members: list[str], weights: NDArray[np.float64], names: list[str], middle: int
) -> tuple[list[str], NDArray[np.float64]]:
    """Mix trained candidates with the mixture of closed forms, if that is clearly better."""
    settings, number = work.data.settings, len(work.folds) - 1
    held = _held_out(work, [*members, *names], [number], after=middle)
    if not members:
        return names, greedy_weights(held, loss=settings.loss, max_members=settings.max_members)[None, :, None, None]
    common = weights.mean(axis=(0, 2, 3))
    closed = held.take(candidates=slice(0, len(members))).mixed(common / common.sum())
    both = replace(held, errors=np.concatenate([closed[None], held.errors[len(members) :]]))
    mixed = greedy_weights(both, loss=settings.loss, max_members=settings.max_members)
    alone = np.eye(len(mixed))[0]
    losses = (block_losses(both, alone, settings.loss), block_losses(both, mixed, settings.loss))
    gain, error = clear_gain(*losses)
    if mixed[0] == 1.0 or not gain > error:
        for name in names:
            work.lines[name].why = f"adds nothing clear to the closed forms ({100 * gain:.1f} +- {100 * error:.1f} %)"
        return members, weights
    mixed = leaning_weights(both, 0, losses, loss=settings.loss, max_members=settings.max_members)
    extra = np.broadcast_to(mixed[1:, None, None], (len(weights), len(names), 1, weights.shape[-1]))
    every = np.concatenate([weights * mixed[0], extra], axis=1)
    weakest = np.argsort(-every.mean(axis=(0, 2, 3)), kind="stable")[settings.max_members :]
    every[:, weakest] = 0.0
    return [*members, *names], every / every.sum(axis=1, keepdims=True)


def _assemble(work: _Race, names: list[str], weights: NDArray[np.float64]) -> EnsembleNetwork:
    """Fit the members for good and put them together."""
    data = work.data
    used = [index for index in range(len(names)) if weights[:, index].max() > 0]
    if not work.lines:
        raise ModelError(
            f"model=auto: nothing to choose from: {listing(data.settings.candidates or (), 10)} must be trained, and "
            f"model.minutes={data.settings.minutes:g} leaves no time for it; give minutes, or name a closed form"
        )
    if not used:
        raise unusable([f"{name}: {line.why}" for name, line in work.lines.items()])
    members = []
    for index in used:
        name = names[index]
        line = work.lines[name]
        members.append(work.trained[name][0] if name in work.trained else solve(data, line.candidate, data.final_stop))
        line.weight, line.why = float(weights[:, index].mean()), "in the mixture"
    for line in work.lines.values():
        if line.why in ("", "trained"):
            line.why = "adds nothing to the mixture"
    spec = replace(ensemble_spec(members, data.spec), context_length=data.window.context_length)
    network = EnsembleNetwork(data.network, spec, members, torch.as_tensor(weights[:, used]))
    assert isinstance(network.model, Auto)
    network.model.report = {"race": _report(work)}
    return network


def _report(work: _Race) -> list[dict[str, Any]]:
    """Return the leaderboard: members by weight, then the others by folds seen and error."""
    lines = sorted(work.lines.values(), key=lambda line: (-line.weight, -line.folds, line.error or 0.0))
    return [line.record() for line in lines]
