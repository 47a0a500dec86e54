"""What a benchmark measures: data sets resolved, model entries checked, baselines added, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tsforge.app.benchmark_config import BenchmarkConfig, ModelEntry, parse_entry
from tsforge.app.benchmark_data import BenchmarkData, drift_steps, read_benchmark_data, stored_benchmark_data
from tsforge.app.benchmark_run import FITTERS, Setting, network_config
from tsforge.app.benchmark_sets import KnownSet, known_sets, locate, unknown_set
from tsforge.app.catalog import list_datasets
from tsforge.app.ingest import load_dataset
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, listing
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.models.registry import MODELS
from tsforge.training.config import TrainConfig

_LOG = get_logger(__name__)
OLS_IN, RIDGE_IN = "OLS+IN", "ridge+IN"
LINEAR_BASELINES = {OLS_IN: "linear:ridge=1e-5:offset=window_scale", RIDGE_IN: "linear:ridge=null"}
HIDDEN = "candidate"  # look-back of a baseline that only its best row may show
_USUAL_LENGTH, _USUAL_HORIZON = 336, 96
_USUAL_CANDIDATES = (96, 336, 720)
_EFFORT = {"statsforecast": 2000.0, "neuralforecast": 300.0, "darts": 300.0, "plain": 1.0}
_TRAINED = 300.0  # rough cost of gradient training against a closed form, to begin the longest settings first


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set with what is measured on it.

    Attributes:
        data: the values.
        known: what the literature says about it, None for a file of the user's.
        horizons, context_lengths: as asked, else of the literature.
        candidates: look-backs the closed-form baselines choose from on validation.
    """

    data: BenchmarkData
    known: KnownSet | None
    horizons: tuple[int, ...]
    context_lengths: tuple[int, ...]
    candidates: tuple[int, ...]


def prepare(config: BenchmarkConfig, workspace: Workspace) -> list[Prepared]:
    """Return every data set read and ready.

    Raises:
        ConfigError, DataError: a name that means nothing, or data that cannot be used.
    """
    found = [_prepare(name, config, workspace) for name in dict.fromkeys(config.datasets)]
    names = [item.data.name for item in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"datasets: {', '.join(twice)} names two data sets; rename a file or measure them apart")
    contents = [item.data.fingerprint for item in found]  # by which rows are kept: one would take the place of another
    alike = [name for name, content in zip(names, contents, strict=True) if contents.count(content) > 1]
    if alike:
        raise ConfigError(f"datasets: {listing(alike)} hold the same values; give each data set once")
    for entry in config.models:
        elsewhere = [name for name in entry.data or () if name not in names]
        strange = [name for name in elsewhere if name not in known_sets()]
        if strange:
            raise ConfigError(
                f"models: '{entry.title}' is for {', '.join(strange)}, but measured are {', '.join(names)}"
            )
        if entry.data and len(elsewhere) == len(entry.data):  # part of a larger table
            _LOG.warning("'%s' is for %s only and left out", entry.title, ", ".join(elsewhere))
    return found


def _prepare(name: str, config: BenchmarkConfig, workspace: Workspace) -> Prepared:
    place = locate(name, config.data_folder)
    path, known = place if place is not None else (None, None)
    columns = config.columns or (known.columns if known else None)
    season = config.season_length or (known.season if known else None)
    if path is None:
        stored = [str(row["name"]) for row in list_datasets(workspace)]
        if name not in stored:
            raise unknown_set(name, stored)
        frame = load_dataset(workspace, name, masked=True)
        data = stored_benchmark_data(
            frame, name, columns=columns, split=config.split, season=season, calendar=config.calendar
        )
    else:
        data = read_benchmark_data(
            Path(path),
            time=config.time,
            columns=columns,
            split=config.split,
            season=season,
            calendar=config.calendar,
            name=name if known else None,
        )
    lengths = config.context_lengths or ((known.context_length,) if known else (_USUAL_LENGTH,))
    horizons = (config.horizons or (known.horizons if known else (_USUAL_HORIZON,)))[: config.num_horizons]
    rows = data.splits.train[1] - data.splits.train[0]
    wanted = known.look_backs if known else _USUAL_CANDIDATES
    candidates = tuple(length for length in wanted if length + max(horizons) <= rows // 2)
    return Prepared(data=data, known=known, horizons=horizons, context_lengths=lengths, candidates=candidates)


def plan(config: BenchmarkConfig, prepared: Prepared) -> list[Setting]:
    """Return every setting of one data set, baselines first, seeds of a setting one after the other.

    Raises:
        ConfigError: an unknown model, or a setting it does not have.
    """
    name = prepared.data.name
    entries = [entry for entry in config.models if entry.data is None or name in entry.data]
    settings: list[Setting] = []
    for horizon in prepared.horizons:
        baselines = _baselines(config, prepared, entries, horizon)
        for entry in entries:
            stated = entry.context_lengths or config.context_lengths
            for length in stated or prepared.context_lengths:
                lookback = str(length) if stated else ""
                base = _setting(entry, config, length, horizon, lookback, "peer" if entry.is_peer else "model")
                settings += [replace(base, seed=seed) for seed in range(entry.seeds or config.seeds)]
        settings = [*settings, *baselines]
    order = {"baseline": 0, "model": 1, "peer": 2}
    return sorted(settings, key=lambda item: (prepared.horizons.index(item.horizon), order[item.role]))


def check_entries(entries: Sequence[ModelEntry], config: BenchmarkConfig) -> None:
    """Check every entry once, whether or not a data set uses it.

    Raises:
        ConfigError: an unknown model, or a setting it does not have.
    """
    for entry in entries:
        _setting(entry, config, 1, 1, "", "model")


def cost(setting: Setting, data: BenchmarkData) -> float:
    """Return a rough relative effort of a setting: good enough to begin the longest ones first."""
    rows = data.splits.train[1] - data.splits.train[0]
    size = float(rows * data.panel.num_targets * (setting.context_length + setting.horizon))
    if setting.kind == "peer":
        return size * _EFFORT.get(setting.name.partition("/")[0], _TRAINED)
    if setting.kind == "fitter":
        return size * 10.0 * _TRAINED
    return size * (1.0 if MODELS.get(setting.name).capabilities.closed_form else _TRAINED)


def _baselines(
    config: BenchmarkConfig, prepared: Prepared, entries: Sequence[ModelEntry], horizon: int
) -> list[Setting]:
    data = prepared.data
    named = {entry.title for entry in config.models}
    shortest = min(prepared.context_lengths)
    wanted = [("last_value", shortest)]
    if data.season > 1:
        wanted.append((f"seasonal_naive:season_length={data.season}", max(data.season, shortest)))
    trend = drift_steps(data, horizon, max(prepared.context_lengths)) if config.baselines == "auto" else None
    if trend is not None:
        wanted.append((f"drift:steps={trend}", max(trend + 1, shortest)))
    found = [
        _setting(validate(ModelEntry, parse_entry(text)), config, length, horizon, "", "baseline")
        for text, length in wanted
        if text not in named
    ]
    if config.baselines != "auto":
        return found
    lookbacks: dict[tuple[int, str], None] = {}
    for entry in entries:
        stated = entry.context_lengths or config.context_lengths
        for length in stated or prepared.context_lengths:
            lookbacks[length, str(length) if stated else ""] = None
    shown = {length for length, _ in lookbacks}
    lookbacks |= {(length, HIDDEN): None for length in prepared.candidates if length not in shown}
    for label, text in LINEAR_BASELINES.items():
        entry = validate(ModelEntry, {**parse_entry(text), "label": label})
        found += [
            _setting(entry, config, length, horizon, lookback, "baseline", graded=("valid", "test"))
            for length, lookback in lookbacks
        ]
    return found


def _setting(
    entry: ModelEntry,
    config: BenchmarkConfig,
    length: int,
    horizon: int,
    lookback: str,
    role: Literal["baseline", "model", "peer"],
    *,
    graded: tuple[Literal["valid", "test"], ...] = ("test",),
) -> Setting:
    train = validate(TrainConfig, {**config.train.model_dump(), **entry.train}, where="train")
    if entry.is_peer or entry.name in FITTERS:
        extra = [name for name in ("likelihood", "scaling") if getattr(entry, name)]
        if extra or (entry.is_peer and entry.train):
            raise ConfigError(f"models: '{entry.title}' takes no {', '.join(extra) or 'train'} settings")
        return Setting(
            kind="peer" if entry.is_peer else "fitter",
            name=entry.name,
            label=entry.title,
            role=role,
            lookback=lookback,
            train=None if entry.is_peer else train,
            options=entry.model,
            context_length=length,
            horizon=horizon,
            seed=0,
        )
    network = network_config({"name": entry.name, **entry.model}, entry.likelihood, entry.scaling)
    return Setting(
        name=entry.name,
        label=entry.title,
        role=role,
        lookback=lookback,
        network=network,
        train=train,
        context_length=length,
        horizon=horizon,
        seed=0,
        graded=graded,
    )
