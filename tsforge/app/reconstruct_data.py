"""Trajectories from files: any table of one row a time step, one numeric column a variate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tsforge.app.reconstruct_times import (
    Clock,
    check_same_interval,
    clock_names,
    find_clock,
    is_row_index,
    read_clock,
    suspect_variates,
)
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.core.seeding import derive_seed
from tsforge.dynamics.config import SystemConfig, TrajectoryConfig

Array = NDArray[np.float64]
FEWEST = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """Training trajectories and the series to judge by, both standardised by the training rows.

    Attributes:
        name: of the training file.
        columns: variates.
        train: one or more series (R_i, N), NaN where missing.
        test: (T, N).
        loc, scale: (N,) what was subtracted and divided by.
        notes: what was left out or assumed.
        fingerprint: changes with any value.
        valid: (V, N) rows that validate, None if there are none.
        inputs: columns that drive the system, K of them; all that follows is None without.
        train_inputs: (R_i, K) of each training series, standardised by the training rows.
        test_inputs, valid_inputs: (T, K) and (V, K).
        input_mean: (K,) of the training rows, standardised as they are.
        input_loc, input_scale: (K,) what was subtracted and divided by.
        tests: of data read by series, the series to judge each by (T_j, N), by name; ``test`` is the first.
        train_series: of data read by series, the name of each training trajectory; None otherwise.
        spacing: time between two training rows, in seconds where ``is_date``; None where nothing says so.
    """

    name: str
    columns: tuple[str, ...]
    train: tuple[Array, ...]
    test: Array
    loc: Array
    scale: Array
    notes: tuple[str, ...]
    fingerprint: str
    valid: Array | None = None
    inputs: tuple[str, ...] = ()
    train_inputs: tuple[Array, ...] | None = None
    test_inputs: Array | None = None
    valid_inputs: Array | None = None
    input_mean: Array | None = None
    input_loc: Array | None = None
    input_scale: Array | None = None
    tests: dict[str, Array] = field(default_factory=dict)
    train_series: tuple[str, ...] | None = None
    spacing: float | None = None
    is_date: bool = False


def read_trajectories(config: TrajectoryConfig, *, by_series: bool = False) -> Trajectories:
    """Return the trajectories of a config.

    Args:
        by_series: keep the names of ``data.series`` and judge each series by rows of its own.

    Raises:
        ConfigError: a column that does not exist, another file type.
        DataError: a missing, unreadable or empty file, a column without numbers, values that are not finite, a constant
            variate or input, an input with missing values, too few rows; by series one that is not in both files.
    """
    if config.system is not None:
        return _simulated(config, config.system)
    assert config.path is not None
    notes: list[str] = []
    table, stamp = _read(config.path, config.rows, config)
    columns = config.columns or _variates(table, stamp, config, notes)
    _check_names(table, config.path, config)
    train, names, clock = _segments(table, stamp, columns, config, config.every, config.path, notes)
    tests: dict[str, Array] = {}
    if config.test is not None:
        other, stamp = _read(config.test, config.test_rows, config)
        absent = [name for name in (*columns, *config.inputs) if name not in other.columns]
        if absent:
            raise DataError(f"{config.test} lacks the column(s) {listing(absent)} of {config.path}")
        _check_names(other, config.test, config)
        parts, others, test_clock = _segments(other, stamp, columns, config, config.test_every, config.test, notes)
        if clock is not None and test_clock is not None:
            check_same_interval(clock, config.every, test_clock, config.test_every, config.test)
        if by_series:
            tests = _same_series(_longest_of_each(parts, others, notes), names, config)
        else:
            test = _longest(parts, config.test, notes)
    elif not config.in_sample:
        if config.split is None:
            notes.append(f"judged by the last {1 - config.share:.0%} of the rows; data.split or data.test change that")
        train, parts = _split(train, config)
        if by_series:
            tests = _longest_of_each(parts, names, notes)
        else:
            test = _longest(parts, config.path, notes)
    train, valid = _hold_back(train, config, notes)
    if config.in_sample:
        if by_series:
            tests = _longest_of_each(train, names, notes)
        else:
            test = _longest(train, config.path, notes)
        notes.append("in sample: the test series is the training series")
    if by_series:
        tests = {
            name: _from_complete(rows, len(columns), f"the test series of '{name}'", notes)
            for name, rows in tests.items()
        }
        test = next(iter(tests.values()))
    else:
        test = _from_complete(test, len(columns), "the test series", notes)
    if valid is not None:
        valid = _from_complete(valid, len(columns), "the series that validates", notes)
    found = _standardised(Path(config.path).stem, columns, train, test, valid, config, notes)
    if clock is not None and clock.spacing is not None and not clock.is_count:
        found = replace(found, spacing=config.every * clock.spacing, is_date=clock.is_date)
    return _with_series(found, tests, names) if by_series else found


def _check_names(table: pl.DataFrame, file: str, config: TrajectoryConfig) -> None:
    if config.series is None:
        return
    missing = table[config.series].null_count()
    if missing:
        raise DataError(f"{file}: {missing} row(s) have no name in '{config.series}'; name their series, or drop them")


def _longest_of_each(parts: Sequence[Array], names: Sequence[str], notes: list[str]) -> dict[str, Array]:
    """Return the longest trajectory of each series."""
    found: dict[str, Array] = {}
    for name, part in zip(names, parts, strict=True):
        if name not in found or len(part) > len(found[name]):
            found[name] = part
    if len(found) < len(parts):
        notes.append("a series in several pieces is judged by the longest")
    return found


def _same_series(tests: dict[str, Array], names: Sequence[str], config: TrajectoryConfig) -> dict[str, Array]:
    """Return the test series in the order in which the training series come."""
    known = dict.fromkeys(names)
    for file, there, wanted in ((config.test, tests, known), (config.path, known, tests)):
        absent = [name for name in wanted if name not in there]
        if absent:
            raise DataError(
                f"{file} lacks {len(absent)} series of the other file: {listing(absent)}; with model.features each "
                f"series trains and is judged (data.series={config.series})"
            )
    return {name: tests[name] for name in known}


def _with_series(found: Trajectories, tests: dict[str, Array], names: Sequence[str]) -> Trajectories:
    """Return the data with the names of their series and a standardised test series for each."""
    if len(tests) < 2:
        raise DataError(
            f"{found.name} holds one series only ({listing(list(tests))}); model.features tell several apart, so leave "
            "them out"
        )
    digest = hashlib.sha256(found.fingerprint.encode())
    digest.update("\0".join(names).encode())
    shown = {}
    for name, rows in tests.items():
        values = np.ascontiguousarray((rows - found.loc) / found.scale)
        _check_test(values, f"the test series of '{name}'")
        digest.update(values.tobytes())
        shown[name] = values
    return replace(found, tests=shown, train_series=tuple(names), fingerprint=digest.hexdigest()[:16])


def _simulated(config: TrajectoryConfig, system: SystemConfig) -> Trajectories:
    """Return a noisy trajectory to train on and a clean one from another start."""
    from tsforge.data.attractors import simulate

    seeds = (derive_seed(system.seed, "train"), derive_seed(system.seed, "test"))
    train, test = (
        simulate(system.system, system.steps, system.dt, seed=seed, noise=noise)
        for seed, noise in zip(seeds, (system.noise, 0.0), strict=True)
    )
    columns = tuple(f"x{index + 1:02d}" for index in range(train.shape[1]))
    notes: list[str] = []
    parts, valid = _hold_back((train[:: config.every],), config, notes)
    found = _standardised(system.system, columns, parts, test[:: config.every], valid, config, notes)
    return replace(found, spacing=config.every * system.dt)


def _standardised(
    name: str,
    columns: tuple[str, ...],
    train: tuple[Array, ...],
    test: Array,
    valid: Array | None,
    config: TrajectoryConfig,
    notes: list[str],
) -> Trajectories:
    """Return series (R, N + K), the inputs last, scaled and told apart."""
    rows = sum(len(part) for part in train)
    if rows < FEWEST:
        raise DataError(
            f"{name} has {rows} training rows; at least {FEWEST} are needed, and a window (train) in one piece"
        )
    count = len(columns)
    loc, scale = _scales(train, (*columns, *config.inputs), name, standardise=config.standardise)
    shown = tuple((part - loc) / scale for part in train)
    test = (test - loc) / scale
    _check_test(test[:, :count], "the test series")
    if valid is not None:
        valid = (valid - loc) / scale
        _check_valid(valid[:, :count])
    # where parts end, names and units belong to it: the same numbers cut elsewhere are other windows
    digest = hashlib.sha256(repr((tuple(columns), config.inputs, [part.shape for part in (*shown, test)])).encode())
    for part in (loc, scale, *shown, test):
        digest.update(np.ascontiguousarray(part).tobytes())
    further: dict[str, Any] = {}
    if valid is not None:
        digest.update(b"valid" + np.ascontiguousarray(valid).tobytes())
        further["valid"] = np.ascontiguousarray(valid[:, :count])
    if config.inputs:
        further |= {
            "inputs": config.inputs,
            "train_inputs": tuple(np.ascontiguousarray(part[:, count:]) for part in shown),
            "test_inputs": np.ascontiguousarray(test[:, count:]),
            "valid_inputs": None if valid is None else np.ascontiguousarray(valid[:, count:]),
            "input_mean": np.concatenate(shown)[:, count:].mean(axis=0),
            "input_loc": loc[count:],
            "input_scale": scale[count:],
        }
    return Trajectories(
        name=name,
        columns=tuple(columns),
        train=tuple(np.ascontiguousarray(part[:, :count]) for part in shown),
        test=np.ascontiguousarray(test[:, :count]),
        loc=loc[:count],
        scale=scale[:count],
        notes=tuple(dict.fromkeys(notes)),
        fingerprint=digest.hexdigest()[:16],
        **further,
    )


def _read(name: str, rows: int | None, config: TrajectoryConfig) -> tuple[pl.DataFrame, str | None]:
    """Return the table and its column of times."""
    place = Path(name).expanduser()
    if place.suffix.lower() not in (".parquet", ".csv"):
        raise ConfigError(f"{name}: trajectories come from a .parquet or .csv file")
    if not place.is_file():
        raise DataError(f"the file {name} does not exist")
    try:
        table = (
            pl.read_parquet(place) if place.suffix.lower() == ".parquet" else pl.read_csv(place, try_parse_dates=True)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{name} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if rows is not None:
        table = table.head(rows)
    if not table.height:
        raise DataError(f"{name} has no rows")
    for label, wanted in (("step", config.step), ("series", config.series)):
        if wanted is not None and wanted not in table.columns:
            raise ConfigError(f"data.{label}: {name} has no column '{wanted}'{nearest(wanted, table.columns)}")
    for role, names in (("columns", config.columns or ()), ("inputs", config.inputs)):
        for wanted in names:
            if wanted not in table.columns:
                raise ConfigError(
                    f"data.{role}: {name} has no column '{wanted}'{nearest(wanted, table.columns)} "
                    f"(it has {listing(table.columns, 20)})"
                )
            if not table[wanted].dtype.is_numeric():
                raise DataError(f"{name}: the column '{wanted}' holds no numbers but {table[wanted].dtype}")
    taken = (*(config.columns or ()), *config.inputs, config.series)
    return table, config.step or find_clock(table, taken)


def _variates(table: pl.DataFrame, stamp: str | None, config: TrajectoryConfig, notes: list[str]) -> tuple[str, ...]:
    """Return every numeric column that is nothing else, and note those that may be."""
    others = [name for name in table.columns if name not in (stamp, config.series, *config.inputs)]
    if stamp is not None:
        out = [name for name in others if is_row_index(name) or table[name].dtype.is_temporal()]
        others = [name for name in others if name not in out]
        if out:
            notes.append(f"left out, since '{stamp}' holds the times: {listing(out)}")
    numeric = tuple(name for name in others if table[name].dtype.is_numeric())
    dropped = [name for name in others if name not in numeric]
    if not numeric:
        raise DataError(f"{config.path} has no numeric column (it has {listing(table.columns, 20)})")
    if dropped:
        raise DataError(
            f"{config.path}: the column(s) {listing(dropped)} hold no numbers; mend them, or name the variates with "
            "data.columns (data.series for the name of a trajectory)"
        )
    clocks = clock_names(table, numeric)
    if clocks:
        notes.append(
            f"the column(s) {listing(clocks)} are taken as variates, since '{stamp}' holds the times; if they are "
            "times too, name the variates with data.columns"
        )
    notes += suspect_variates(table, [name for name in numeric if name not in clocks], has_clock=stamp is not None)
    return numeric


def _segments(
    table: pl.DataFrame,
    stamp: str | None,
    columns: tuple[str, ...],
    config: TrajectoryConfig,
    every: int,
    file: str,
    notes: list[str],
) -> tuple[tuple[Array, ...], tuple[str, ...], Clock | None]:
    """Return the trajectories of a table (R, N + K), subsampled, the name of each ("" without a column of names), and
    what the times say, None without.

    A break in the times or a new name ends one.
    """
    every_column = (*columns, *config.inputs)
    values = table.select(pl.col(name).cast(pl.Float64) for name in every_column).to_numpy()
    infinite = int(np.isinf(values).sum())
    if infinite:
        raise DataError(f"{infinite} value(s) of {listing(every_column)} are infinite; mark missing values as null")
    breaks = np.zeros(len(values), dtype=bool)
    if config.series is not None:
        names = table[config.series]
        breaks[1:] = (names != names.shift())[1:].fill_null(True).to_numpy()
        _check_order(names, breaks, config)
    clock = None if stamp is None else read_clock(table[stamp], breaks, Path(file).name, notes)
    breaks = breaks if clock is None else clock.breaks
    cuts = np.flatnonzero(breaks)
    parts = tuple(np.ascontiguousarray(part[::every]) for part in np.split(values, cuts))
    if len(parts) > 1:
        notes.append(f"{len(parts)} trajectories (a break in the times or a new name ends one)")
    _complete_inputs(np.concatenate(parts)[:, len(columns) :], config)
    missing = int(np.isnan(values[:, : len(columns)]).sum())
    if missing:
        notes.append(f"{missing} missing values: not forced there and not in the loss")
    if config.series is None:
        return parts, ("",) * len(parts), clock
    return parts, tuple(str(table[config.series][int(first)]) for first in (0, *cuts)), clock


def _check_order(names: pl.Series, breaks: NDArray[np.bool_], config: TrajectoryConfig) -> None:
    """Refuse rows that are sorted by time instead of by series: each would be a trajectory of its own."""
    pieces = np.diff(np.flatnonzero([True, *breaks[1:], True]))
    if len(pieces) > names.n_unique() and 2 * pieces[pieces < FEWEST].sum() > pieces.sum():
        raise DataError(
            f"the rows of {names.n_unique()} series lie in {len(pieces)} pieces, half of at most "
            f"{np.median(pieces):.0f} rows, since each new name ends a trajectory: sort the file by '{config.series}', "
            "then by time"
        )


def _complete_inputs(values: Array, config: TrajectoryConfig) -> None:
    absent = np.isnan(values).sum(axis=0)
    if absent.any():
        holes = [f"{name} ({count})" for name, count in zip(config.inputs, absent, strict=True) if count]
        raise DataError(
            f"data.inputs: missing values of {listing(holes)}; an input drives every step, so fill them or leave those "
            "rows out (a break in the times ends a trajectory)"
        )


def _longest(parts: tuple[Array, ...], name: str, notes: list[str]) -> Array:
    chosen = max(parts, key=len)
    if len(parts) > 1:
        notes.append(f"{Path(name).name}: judged by the longest of {len(parts)} trajectories ({len(chosen)} rows)")
    return chosen


def _split(parts: tuple[Array, ...], config: TrajectoryConfig) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the first share of each trajectory, and its rest."""
    cuts = [int(config.share * len(part)) for part in parts]
    train = tuple(part[:cut] for part, cut in zip(parts, cuts, strict=True))
    tests = tuple(part[cut + config.gap :] for part, cut in zip(parts, cuts, strict=True))
    return train, tests


def _hold_back(
    parts: tuple[Array, ...], config: TrajectoryConfig, notes: list[str]
) -> tuple[tuple[Array, ...], Array | None]:
    """Return what trains, and the end of the longest training trajectory, which validates."""
    if config.valid is None:
        return parts, None
    place = max(range(len(parts)), key=lambda index: len(parts[index]))
    whole = parts[place]
    cut = int((1 - config.valid) * len(whole))
    valid = whole[cut + config.gap :]
    notes.append(f"the last {len(valid)} of {len(whole)} rows of the longest training trajectory validate")
    return (*parts[:place], whole[:cut], *parts[place + 1 :]), valid


def _from_complete(values: Array, count: int, what: str, notes: list[str]) -> Array:
    """Return rows (T, N + K) from the first on that has all ``count`` variates, where a free run can start; all rows
    if none has.
    """
    complete = np.flatnonzero(np.isfinite(values[:, :count]).all(axis=1))
    first = int(complete[0]) if len(complete) else 0
    if first:
        notes.append(f"{what} begins at its first complete row: {first} of {len(values)} rows before it are left out")
    return values[first:]


def _check_test(values: Array, what: str) -> None:
    if len(values) < FEWEST:
        raise DataError(f"{what} has {len(values)} rows; judging needs at least {FEWEST}")
    if not np.isfinite(values[0]).all():
        raise DataError(
            f"no row of {what} has a value of every variate, so a free run has nowhere to start; leave the variates "
            "with most missing values out (data.columns)"
        )


def _check_valid(values: Array) -> None:
    if len(values) < FEWEST:
        raise DataError(
            f"{len(values)} rows validate; at least {FEWEST} are needed: raise data.valid, or lower data.gap"
        )
    if not np.isfinite(values[0]).all():
        raise DataError(
            "no row that validates has a value of every variate, so a free run has nowhere to start; change data.valid"
        )


def _scales(parts: tuple[Array, ...], columns: tuple[str, ...], name: str, *, standardise: bool) -> tuple[Array, Array]:
    rows = np.concatenate(parts)
    missing: list[bool] = np.all(np.isnan(rows), axis=0).tolist()
    empty = [column for index, column in enumerate(columns) if missing[index]]
    if empty:
        raise DataError(f"{name}: the column(s) {listing(empty)} have no training value; leave them out (data.columns)")
    loc, scale = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    flat = [column for column, spread in zip(columns, scale, strict=True) if not spread > 0]
    if flat:
        raise DataError(
            f"{name}: the column(s) {listing(flat)} are constant in the training rows; leave them out (data.columns, "
            "data.inputs)"
        )
    return (loc, scale) if standardise else (np.zeros_like(loc), np.ones_like(scale))
