"""Bring long and wide tables into the column names of a ``SeriesFrame``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.grid import infer_freq
from tsforge.data.schema import RESERVED, SeriesSchema


def _collect(table: pl.DataFrame | pl.LazyFrame, columns: list[str] | None) -> pl.DataFrame:
    names = table.collect_schema().names()
    missing = [name for name in columns or () if name not in names]
    if missing:
        hint = nearest(missing[0], names)
        raise DataError(f"the table lacks column(s) {listing(missing)}{hint} (it has {listing(names, 20)})")
    chosen = table.select(columns) if columns is not None else table
    return chosen.collect() if isinstance(chosen, pl.LazyFrame) else chosen


def _freq(given: str | None, times: pl.Series, groups: pl.Series | None) -> str:
    if given is not None:
        return given
    if not times.len():
        raise DataError("the table has no rows; nothing can be learnt or forecast from it")
    return infer_freq(times, groups)


def long_table(
    table: pl.DataFrame | pl.LazyFrame,
    *,
    series_id: str | None,
    time: str,
    roles: Mapping[str, tuple[str, ...]],
    freq: str | None,
    published: str | None = None,
) -> tuple[pl.DataFrame, SeriesSchema, pl.DataFrame | None]:
    """Return a long table with canonical names, its schema, and the static table if there are static columns.

    A column of publication times comes along as ``published``.

    Raises:
        DataError: a column is missing or has a reserved name, the frequency cannot be inferred, or a static column
            varies within a series.
    """
    values = [name for names in roles.values() for name in names]
    _check_names(values)
    keys = [name for name in (series_id, time, published) if name is not None]
    plain = _collect(table, list(dict.fromkeys([*keys, *values])))
    ids = pl.lit("series") if series_id is None else pl.col(series_id)
    named = plain.select(ids.alias("series_id"), *_clocks(time, published), *(pl.col(name) for name in values))
    groups = None if series_id is None else named["series_id"]
    schema = SeriesSchema(**_plain(roles), freq=_freq(freq, named["time"], groups))
    return named, schema, _constants(named, schema)


def _clocks(time: str, published: str | None) -> list[pl.Expr]:
    """Return the time, and the publication time where there is one, under canonical names."""
    return [pl.col(time).alias("time"), *([] if published is None else [pl.col(published).alias("published")])]


def _plain(roles: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    return dict(roles)


def _check_names(values: Iterable[str]) -> None:
    taken = [name for name in dict.fromkeys(values) if name in RESERVED]
    if taken:
        raise DataError(
            f"column name {listing(map(repr, taken))} is reserved and cannot be that of a value; rename the column in "
            "the query or file, or leave it out by naming the others (targets)"
        )


def _constants(table: pl.DataFrame, schema: SeriesSchema) -> pl.DataFrame | None:
    if not schema.static:
        return None
    check_constant(table, "series_id", schema.static)
    return table.group_by("series_id", maintain_order=True).agg(pl.col(schema.static).drop_nulls().first())


def check_constant(table: pl.DataFrame, series_id: str, static: Sequence[str]) -> None:
    """Refuse static columns that change within a series; missing values say nothing.

    Raises:
        DataError: with the first such column, and its series.
    """
    counts = table.group_by(series_id, maintain_order=True).agg(pl.col(static).drop_nulls().n_unique())
    for name in static:
        varying = counts.filter(pl.col(name) > 1)[series_id]
        if varying.len():
            raise DataError(
                f"static column '{name}' changes within {varying.len()} of {counts.height} series "
                f"({listing(varying)}); declare it as past or known"
            )


def wide_table(
    table: pl.DataFrame | pl.LazyFrame,
    *,
    time: str,
    roles: Mapping[str, tuple[str, ...] | None],
    freq: str | None,
    separator: str | None,
    series_id: str,
    published: str | None = None,
) -> tuple[pl.DataFrame, SeriesSchema]:
    """Return a wide table in long form with canonical names, and its schema.

    A column of publication times comes along as ``published``.

    Raises:
        DataError: a column is missing, has a reserved name, or belongs to every series while one has it itself; the
            separator occurs in no column; or the frequency cannot be inferred.
    """
    names = table.collect_schema().names()
    if time not in names:
        raise DataError(f"the table lacks column(s) {time}{nearest(time, names)} (it has {listing(names, 20)})")
    values = [name for name in names if name not in (time, published)]
    if separator is None:
        owners: dict[str, dict[str, str]] = {series_id: {name: name for name in values}}
    else:
        owners = _owners(values, separator)
    variates = list(dict.fromkeys(variate for columns in owners.values() for variate in columns))
    chosen = _roles(roles, variates)
    wanted = {variate for names in chosen.values() for variate in names}
    _check_names(variate for variate in variates if variate in wanted)
    if separator is not None:
        _check_shared(owners, [name for name in values if separator not in name and name in wanted])
    used = [column for columns in owners.values() for variate, column in columns.items() if variate in wanted]
    clocks = [name for name in (time, published) if name is not None]
    plain = _collect(table, list(dict.fromkeys([*clocks, *used])))
    keys = _clocks(time, published)
    parts = [
        _one_series(plain, keys, owner, {variate: columns[variate] for variate in columns if variate in wanted})
        for owner, columns in owners.items()
    ]
    long = pl.concat(parts, how="diagonal_relaxed")
    schema = SeriesSchema(**chosen, freq=_freq(freq, plain[time].alias("time"), None))
    return long, schema


def _owners(values: list[str], separator: str) -> dict[str, dict[str, str]]:
    """Return ``{series: {variate: column}}``; columns without the separator belong to every series."""
    shared = {name: name for name in values if separator not in name}
    owners: dict[str, dict[str, str]] = {}
    for name in values:
        owner, found, variate = name.partition(separator)
        if found:
            owners.setdefault(owner, dict(shared))[variate] = name
    if not owners:
        raise DataError(f"no column name contains the separator '{separator}' (columns: {listing(values, 10)})")
    return owners


def _check_shared(owners: Mapping[str, Mapping[str, str]], shared: list[str]) -> None:
    """Refuse columns of every series that a series also has itself: one of both would be lost."""
    for name in shared:
        own = [columns[name] for columns in owners.values() if columns[name] != name]
        if own:
            raise DataError(
                f"column '{name}' belongs to every series, and {len(own)} of {len(owners)} series have their own: "
                f"{listing(own)}; rename one of them in the query or file, or leave it out"
            )


def _roles(roles: Mapping[str, tuple[str, ...] | None], variates: list[str]) -> dict[str, Any]:
    named = [name for names in roles.values() for name in names or ()]
    missing = [name for name in named if name not in variates]
    if missing:
        hint = nearest(missing[0], variates)
        raise DataError(f"the table lacks column(s) {listing(missing)}{hint} (it has {listing(variates, 20)})")
    targets = roles["targets"]
    rest = tuple(name for name in variates if name not in named)
    return {**roles, "targets": rest if targets is None else targets}


def _one_series(table: pl.DataFrame, keys: list[pl.Expr], owner: str, columns: Mapping[str, str]) -> pl.DataFrame:
    """Return one series' rows, without the empty ones before its first and after its last value."""
    part = table.select(
        pl.lit(owner).alias("series_id"),
        *keys,
        *(pl.col(column).alias(variate) for variate, column in columns.items()),
    )
    seen = part.filter(pl.any_horizontal(pl.col(list(columns)).is_not_null()))["time"] if columns else pl.Series([])
    return part.filter(pl.col("time").is_between(seen.min(), seen.max())) if seen.len() else part
