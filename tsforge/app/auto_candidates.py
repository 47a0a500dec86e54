"""What ``model=auto`` chooses among: closed forms at several look-backs, and models trained by gradient steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.contracts.tensors import DataSpec, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError, TsforgeError, listing
from tsforge.core.seeding import derive_seed
from tsforge.data.grid import Bools
from tsforge.data.panel import Panel
from tsforge.data.schema import SeriesSchema
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.ensemble import member_batch
from tsforge.forecasting.seasons import season_length
from tsforge.layers.scaling import scaling_for
from tsforge.models.auto import AutoConfig
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import TrainResult, fit_network
from tsforge.tuning.halving import NotBegun

AUTO = "auto"
_MIXTURES = (AUTO, "committee")
_EXPERIMENTAL = ("pvrnn",)  # slow, and no forecaster first of all: tried where they are asked for by name
_KINDS = ("past", "known", "static")
_FEWEST_STEPS = 20  # gradient steps an epoch may be cut down to; with fewer a candidate is not begun
_FEWEST_EPOCHS = 3
_SHORTEST = 4
_MANY_VARIATES = 50  # more of them share their weights: one matrix each would cost more than it tells
_LINEAR: tuple[dict[str, Any], ...] = (
    {"remove": "auto", "ridge": None, "weights": "auto"},
    {"remove": "none"},
    {"remove": "last", "ridge": 1e6},
    {"weights": "per_variate"},
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model with its settings and look-back.

    Attributes:
        name: unique, for people.
        network: model, likelihood, scaling.
        context_length: look-back.
        trained: needs gradient steps.
    """

    name: str
    network: NetworkConfig
    context_length: int
    trained: bool

    @property
    def model(self) -> str:
        """Registered name of the model."""
        return self.network.model.name


@dataclass(frozen=True, kw_only=True)
class RaceData:
    """Everything candidates are fitted and compared on.

    Attributes:
        panel: the data, all covariates.
        train: rows that training may use.
        select: later rows that choose among candidates, None without any.
        final_stop: closed forms are fitted for good on the rows before it.
        window: the longest look-back and the horizon.
        network: the settings of auto, the likelihood and the scaling asked for.
        training: how gradient training runs.
        unit: size of an error of 1 in each variate [V], or of each series [S, V]: no large one then chooses for all.
        diverse: series differ so much in level or spread that models scale each by itself, unless asked otherwise.
        only: series that take part [num_series], None = all.
    """

    panel: Panel
    train: tuple[int, int]
    select: tuple[int, int] | None
    final_stop: int
    window: WindowSpec
    network: NetworkConfig
    training: TrainConfig
    unit: NDArray[np.float64]
    diverse: bool = False
    only: Bools | None = None

    @property
    def settings(self) -> AutoConfig:
        """The settings of the search."""
        assert isinstance(self.network.model, AutoConfig)
        return self.network.model

    @property
    def spec(self) -> DataSpec:
        """Sizes of the longest window."""
        schema = self.panel.schema
        return DataSpec(
            context_length=self.window.context_length,
            horizon=self.window.horizon,
            num_variates=self.panel.num_targets,
            num_known=len(schema.known),
            num_past=len(schema.past),
            num_static=len(schema.static),
            train_length=self.train[1] - self.train[0],
        )

    def windows(
        self, span: tuple[int, int], *, context_length: int | None = None, panel: Panel | None = None, stride: int = 1
    ) -> WindowDataset:
        """Return the windows whose targets lie in ``span``."""
        spec = replace(self.window, stride=stride, context_length=context_length or self.window.context_length)
        return WindowDataset(self.panel if panel is None else panel, spec, *span, only=self.only)


def reduced(panel: Panel, model: str) -> Panel:
    """Return the panel without the kinds of covariates that a model cannot take.

    Raises:
        ModelError: columns with several versions would have to be left out.
    """
    kept = _taken(panel.schema, model)
    if all(kept[kind] == getattr(panel.schema, kind) for kind in _KINDS):
        return panel
    if panel.versions is not None:
        raise ModelError("it cannot take all covariates of data with vintages")
    smaller = replace(panel.schema, past=kept["past"], known=kept["known"], static=kept["static"])
    columns = [panel.schema.columns.index(name) for name in smaller.columns]
    return replace(
        panel,
        values=np.ascontiguousarray(panel.values[:, columns]),
        observed=np.ascontiguousarray(panel.observed[:, columns]),
        static=panel.static if smaller.static else None,
        schema=smaller,
    )


def _taken(schema: SeriesSchema, model: str) -> dict[str, tuple[str, ...]]:
    """Return the covariates by kind that a model can take: all of a kind, or none."""
    can = MODELS.get(model).capabilities
    return {kind: getattr(schema, kind) if getattr(can, f"{kind}_covariates") else () for kind in _KINDS}


def seasons_of(panel: Panel, stop: int, longest: int) -> list[int]:
    """Return season lengths up to ``longest`` steps, the shortest first: from the step, else found before row ``stop``,
    and seven of them where a season is a day.
    """
    rows = slice(int(panel.indptr[0]), int(panel.indptr[1]))
    values = np.where(panel.target_observed[rows], panel.values[rows, : panel.num_targets], np.nan)
    short = season_length(panel.schema.freq, values[: max(stop - int(panel.offset[0]), 0)])
    daily = panel.schema.freq.endswith(("h", "m", "s")) and not panel.schema.has_integer_time
    return [season for season in ((short, 7 * short) if daily else (short,)) if 1 < season <= longest]


def look_backs(longest: int, seasons: Sequence[int]) -> list[int]:
    """Return the look-backs to try, longest first: all, a half, a quarter, two seasons."""
    wanted = {longest, longest // 2, longest // 4, *(2 * season for season in seasons[:1])}
    return sorted({length for length in wanted if _SHORTEST <= length <= longest} or {longest}, reverse=True)


def closed_forms(data: RaceData) -> list[Candidate]:
    """Return candidates without gradient steps, quick ones first."""
    longest = data.window.context_length
    seasons = seasons_of(data.panel, data.train[1], longest)
    lengths = look_backs(longest, seasons)
    wanted: list[tuple[dict[str, Any], int]] = [({"name": "last_value"}, lengths[-1])]
    wanted += [({"name": "seasonal_naive", "season_length": season}, season) for season in seasons]
    wanted += [({"name": "drift"}, length) for length in lengths]
    for length in reversed(lengths):
        variants = _LINEAR if 1 < data.panel.num_targets <= _MANY_VARIATES else _LINEAR[:3]
        wanted += [({"name": "linear", **settings}, length) for settings in variants]
        wanted.append(({"name": "ar_net"}, length))
        if seasons:
            wanted.append(({"name": "ar_net", "season_lengths": [float(season) for season in seasons]}, length))
    if 1 < data.panel.num_targets <= _MANY_VARIATES:  # once: its lags are far fewer than a look-back
        wanted.append(({"name": "var"}, longest))
    return [found for settings, length in wanted if (found := _candidate(data, settings, length, trained=False))]


def anchor_name(data: RaceData) -> str | None:
    """Return the closed form that the mixture leans on: ``linear`` that chooses level, penalty and weights by itself,
    at the longest look-back. None where it takes no part.
    """
    if not data.settings.anchor:
        return None
    found = _candidate(data, {"name": "linear", **_LINEAR[0]}, data.window.context_length, trained=False)
    return None if found is None else found.name


def trained_models(data: RaceData) -> list[Candidate]:
    """Return candidates that need gradient steps: every such model that takes one series at a time, with its defaults,
    at the longest look-back, then at half of it; ``model.max_trials`` at most, none with ``model.minutes=0``.

    A committee is another mixture, not a candidate; experimental models are tried where they are named.
    """
    if data.settings.minutes == 0:
        return []
    longest = data.window.context_length
    found = []
    for length in dict.fromkeys((longest, max(longest // 2, 1))):
        for name in MODELS.names():
            can = MODELS.get(name).capabilities
            if name in _MIXTURES or not can.trainable or can.rows_coupled:
                continue
            if name in _EXPERIMENTAL and data.settings.candidates is None:
                continue
            if can.starts_closed or not can.closed_form:
                candidate = _candidate(data, {"name": name}, length, trained=True)
                if candidate is not None:
                    found.append(candidate)
    return found[: data.settings.max_trials]


def _candidate(data: RaceData, settings: dict[str, Any], length: int, *, trained: bool) -> Candidate | None:
    """Return the candidate, None where the settings of the fit exclude it."""
    name, wanted = settings["name"], data.settings.candidates
    if wanted is not None and name not in wanted:
        return None
    can = MODELS.get(name).capabilities
    scaling = scaling_for(data.network.scaling, can, diverse=data.diverse)
    if scaling.kind != "auto" and scaling.kind not in can.scaling:
        return None
    plain = {"model": settings, "likelihood": data.network.likelihood, "scaling": scaling}
    extra = [f"{key}={value}" for key, value in settings.items() if key != "name"]
    title = " ".join([name, f"L={length}", *extra])
    return Candidate(name=title, network=validate(NetworkConfig, plain), context_length=length, trained=trained)


def check_wanted(settings: AutoConfig) -> None:
    """Refuse names of candidates that are no models.

    Raises:
        ConfigError: unknown names, or auto itself.
    """
    for name in settings.candidates or ():
        try:
            MODELS.get(name)
        except ConfigError as error:
            raise ConfigError(f"model.candidates: {error}") from error
        if name in _MIXTURES:
            raise ConfigError(f"model.candidates: {name} is itself a mixture; name the models it may be made of")


def check_readers(data: RaceData) -> None:
    """Refuse covariates that no candidate can take, before the first of them is fitted.

    Raises:
        ConfigError: there are some, though they were asked for (``covariates=all``).
    """
    schema, runs = data.panel.schema, [one.model for one in (*closed_forms(data), *trained_models(data))]
    read = {name for model in runs for names in _taken(schema, model).values() for name in names}
    unread = [name for kind in _KINDS for name in getattr(schema, kind) if name not in read]
    if runs and unread:  # without any candidate the race says why
        raise ConfigError(
            f"covariates=all: none of the {len(set(runs))} models that model=auto would try takes the covariate(s) "
            f"{listing(unread, 10)}; name models that take them in model.candidates (tsforge models lists them), or "
            "set covariates=usable"
        )


def build(data: RaceData, candidate: Candidate) -> ForecastNetwork:
    """Return the unfitted network of a candidate."""
    taken = _taken(data.panel.schema, candidate.model)
    spec = replace(
        data.spec,
        context_length=candidate.context_length,
        num_known=len(taken["known"]),
        num_past=len(taken["past"]),
        num_static=len(taken["static"]),
    )
    return build_network(candidate.network, spec, seed=derive_seed(data.training.seed, candidate.name))


def num_parameters(data: RaceData, candidate: Candidate) -> int:
    """Return how many numbers training moves: small models go first."""
    return sum(value.numel() for value in build(data, candidate).parameters() if value.requires_grad)


def _series(data: RaceData, network: ForecastNetwork, stop: int) -> TrainingSeries:
    """Return every row before ``stop`` with the covariates that the network reads."""
    series, spec = data.panel.training_series(None, stop, data.only), network.spec
    return series._replace(
        past=series.past if spec.num_past else None,
        known=series.known if spec.num_known else None,
        static=series.static if spec.num_static else None,
    )


def solve(data: RaceData, candidate: Candidate, stop: int) -> ForecastNetwork:
    """Return a closed form fitted on every row before ``stop``.

    Raises:
        ModelError: it needs gradient steps with these settings, or too few rows.
    """
    network = build(data, candidate)
    series = _series(data, network, stop)
    network.fit_scaler(series)
    network.prepare(series)
    report = network.solve(series)
    if report is None or not report.finished:
        raise ModelError("it is not finished by its closed form")
    if network.spec.num_params > 1 and report.residual_scale is None:
        windows = data.windows((data.train[0], stop), context_length=candidate.context_length)
        network.fit_residual_scale(
            member_batch(batch, network.spec)._replace(target=batch.target, target_mask=batch.target_mask)
            for batch in windows.batches(data.training.eval_batch_size)
        )
    return network.eval()


def train(
    data: RaceData,
    candidate: Candidate,
    stop_span: tuple[int, int],
    *,
    each: float,
    seconds: float,
    on_epoch: Callable[[ForecastNetwork, int], None],
) -> tuple[ForecastNetwork, TrainResult]:
    """Return a network trained on the training span, stopped by the windows of ``stop_span``.

    Args:
        data: spans and settings.
        candidate: a trained one.
        stop_span: rows that stop the training.
        each: seconds of a step, from ``step_seconds``.
        seconds: time for it; epochs are cut short so that a few of them fit.
        on_epoch: called with the network after each epoch; may raise.

    Raises:
        NotBegun: not even a few short epochs fit into the time.
    """
    panel, length = reduced(data.panel, candidate.model), candidate.context_length
    network = build(data, candidate)
    windows = data.windows(data.train, context_length=length, panel=panel, stride=data.window.stride)
    series = _series(data, network, data.train[1])
    steps = -(-len(windows) // data.training.batch_size)
    affordable = int(seconds / (_FEWEST_EPOCHS * each))
    if affordable < min(_FEWEST_STEPS, steps):
        raise NotBegun(
            f"not begun: a step takes {each:.2g} s, {_FEWEST_EPOCHS} short epochs do not fit into its {seconds:.2g} s"
        )
    limits = [limit for limit in (data.training.max_steps_per_epoch, affordable) if limit is not None]
    config = data.training.model_copy(update={"max_steps_per_epoch": min(limits) if min(limits) < steps else None})
    result = fit_network(
        network,
        windows,
        data.windows(stop_span, context_length=length, panel=panel),
        config,
        series=series,
        on_epoch=lambda epoch, metrics: on_epoch(network, epoch),
        progress=False,
    )
    return network.eval(), result


def step_seconds(data: RaceData, candidate: Candidate) -> float:
    """Return the time of one gradient step, the quickest of three after a first one that warms up."""
    panel = reduced(data.panel, candidate.model)
    network = build(data, candidate)
    windows = data.windows(data.train, context_length=candidate.context_length, panel=panel)
    series = _series(data, network, data.train[1])
    network.fit_scaler(series)
    network.prepare(series)
    best, batch_size = np.inf, data.training.batch_size
    for number, batch in enumerate(windows.batches(batch_size, shuffle=True, seed=0)):
        started = time.perf_counter()
        network.train()
        network.loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)
        if number:
            best = min(best, time.perf_counter() - started)
        if number == 3:
            break
    return float(best) if np.isfinite(best) else 1e-3


def unusable(names: Sequence[str]) -> TsforgeError:
    """Return the error of a race that nobody finished."""
    return ModelError(f"model=auto: none of the candidates could be fitted; first reasons: {listing(names, 5)}")
