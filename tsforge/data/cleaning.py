"""From a raw table to a ``SeriesFrame``: roles, numbers, times, repeated keys, resampling; every change is counted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.calendar import check_calendar
from tsforge.data.config import DataConfig, ResampleConfig, SyntheticSource
from tsforge.data.findings import ROW, IngestReport, row_examples
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import Frequency, normalise_time, parse_freq
from tsforge.data.io import RawTable, collect, column_types, read_source
from tsforge.data.layout import check_constant, long_table, wide_table
from tsforge.data.numbers import NumberReader
from tsforge.data.report import vintage_report
from tsforge.data.synthetic import generate
from tsforge.data.timestamps import makes_local_days, read_published, read_times
from tsforge.data.vintages import Delays, History, VintageFrame, newest

_MIN_ROWS_FOR_STEP = 5  # fewer rows say little about a frequency
_ONE_SERIES = "\x00series"  # stands in for the series column where the whole table is one series


@dataclass(frozen=True)
class Dataset:
    """What reading a source gives.

    Attributes:
        frame: the validated series, with the last value of every cell.
        report: what was done to the rows.
        labels: known anomalies (``series_id, start, end, kind, variates``) of generated data, else None.
        vintages: all publications, where the source has publication times.
        present: ``series_id, time`` of the rows of the source, where a missing value of them erases, else None.
    """

    frame: SeriesFrame
    report: IngestReport
    labels: pl.DataFrame | None = None
    vintages: VintageFrame | None = None
    present: pl.DataFrame | None = None


def read_dataset(config: DataConfig, stored: Collection[str] = ()) -> Dataset:
    """Return the series of a configured source.

    Args:
        config: of the data set.
        stored: series that are known already: of these a batch may hold nothing but known covariates.

    Raises:
        DataError: the source or its rows do not satisfy the config; the message names the dataset, the place, the count
            and the setting that helps.
        BackendError: a database or disk did not answer.
        ConfigError: an environment variable or a driver is missing.
    """
    if isinstance(config.source, SyntheticSource):
        frame, labels = generate(config.source.generator)
        seed = config.source.generator.seed
        report = IngestReport(f"synthetic, seed {seed}", rows_in=frame.num_rows, rows_out=_filled(frame))
        return Dataset(frame, report, labels)
    try:
        raw = read_source(config.source)
    except DataError as error:
        raise DataError(f"dataset '{config.name}': {error}") from error
    return clean(raw, config, stored)


def clean(raw: RawTable, config: DataConfig, stored: Collection[str] = ()) -> Dataset:
    """Return the series of a raw table, by the settings of ``config`` for everything but its source.

    ``stored`` as for ``read_dataset``.

    Raises:
        DataError: as for ``read_dataset``.
    """
    report = IngestReport(raw.origin)
    try:
        history, present = _clean(raw, config, report)
        frame = newest(history)
        if config.empty_targets == "error":
            _check_targets(frame, stored)
        # what does not fit is refused before it is stored, since reading would fail
        Delays.of(config.publication_delay, frame.schema, frame.grid)
        check_calendar(config.calendar, frame.schema)
    except DataError as error:
        raise DataError(f"dataset '{config.name}': {error}") from error
    report.rows_out = _filled(history)
    _note_constants(frame, report)
    if isinstance(history, SeriesFrame):
        return Dataset(frame, report, present=present)
    _note_revisions(history, report)
    return Dataset(frame, report, vintages=history)


def covariates_alone(frame: SeriesFrame) -> set[str]:
    """Return the series of a batch that hold values of known covariates and of no target: news of the future."""
    if not frame.schema.known:
        return set()
    has_target, has_known = (
        pl.any_horizontal(pl.col(names).is_not_null()).any() for names in (frame.schema.targets, frame.schema.known)
    )
    found = frame.table.group_by("series_id").agg(alone=has_known & ~has_target)
    return set(found.filter("alone")["series_id"])


def _check_targets(frame: SeriesFrame, stored: Collection[str]) -> None:
    targets = frame.schema.targets
    empty = [name for name in targets if frame.table[name].null_count() == frame.num_rows]
    known = covariates_alone(frame) & set(stored)
    if not empty or known == set(frame.series_ids):
        return
    more = "; known covariates alone are taken for series that are stored already" if frame.schema.known else ""
    raise DataError(
        f"target column(s) {listing(empty)} hold no value in any of {frame.num_rows} rows{more}; check the column, "
        "leave it out, or keep it with data.empty_targets=keep and a non_empty check that warns "
        "(checks.0.severity=warn)"
    )


def _filled(frame: History) -> int:
    return int(frame.table.select(pl.any_horizontal(pl.col(frame.schema.columns).is_not_null()).sum()).item())


def _note_revisions(vintages: VintageFrame, report: IngestReport) -> None:
    """Say how many publications there are, and how many values were revised by a later one."""
    facts = vintage_report(vintages)
    cells = vintages.table.n_unique(["series_id", "time"])
    report.add("note", f"publications of {cells} rows (series and times)", vintages.num_rows)
    shown = tuple(
        f"{row['column']}: {row['revisions']} over {row['values']} cells"
        for row in facts.to_dicts()
        if row["revisions"]
    )
    report.add(
        "note", "revisions: values that differ from those published before", int(facts["revisions"].sum()), shown
    )


def _note_constants(frame: SeriesFrame, report: IngestReport) -> None:
    targets = frame.table.select(pl.col(frame.schema.targets).drop_nulls().n_unique())
    constant = tuple(name for name in frame.schema.targets if targets[name][0] == 1)
    report.add("note", "constant targets", len(constant), constant)


def _clean(raw: RawTable, config: DataConfig, report: IngestReport) -> tuple[History, pl.DataFrame | None]:
    """Return the series and, where missing values erase, ``series_id, time`` of the rows they came in."""
    types = column_types(raw)
    named = {"time": config.time, "series": config.series, "published": config.published}
    keys = [name for name in named.values() if name]
    for setting, name in named.items():
        if name and name not in types:
            raise DataError(f"no column '{name}'{nearest(name, types)} (it has {listing(types, 20)}); set {setting}")
    columns, optional = _value_columns(list(types), keys, config)
    table = collect(raw, [*keys, *columns]).with_row_index(ROW, offset=1)
    report.rows_in = table.height
    if not table.height:
        raise DataError(f"{raw.origin} has columns ({listing(types)}) and no rows")
    table = _without_short(table, raw, config, report)
    report.add("note", "columns without a name left out", sum(not name for name in types))
    table = NumberReader(raw, config, report).read(table, columns, optional)
    roles = _roles(table, columns, config)
    absent = _absent_past(table, columns, roles, report)
    if config.published is not None and any("published" in names for names in roles.values()):
        raise DataError("'published' is what publication times are called; rename the value column of that name")
    group = config.series
    if config.layout == "long" and group is None:
        group = _ONE_SERIES
        table = table.with_columns(pl.lit(config.name).alias(group))
    if group is not None:
        table = _with_series_ids(table, group, config, report)
    if config.published is not None:
        table = read_published(table, config, report)
    table, are_dates = read_times(table, group, config, report)
    if are_dates and config.timezone != "UTC":
        report.add("note", f"times that are dates: local days of {config.timezone}", table.height)
    if not table.height:
        raise DataError(f"no row of {raw.origin} is left after {report.rows_refused} were refused")
    keys = [config.time] if group is None else [group, config.time]
    if config.published is None:
        _note_order(table, keys, report)
    table = _without_duplicates(table, group, config, report)
    if config.resample is not None:
        clock = config.timezone if makes_local_days(config) and not are_dates else None
        if config.static:
            check_constant(table, keys[0], config.static)
        table = _resampled(table, keys, columns, config.resample, report, clock=clock, static=config.static)
    return _frame(_with_empty(table.drop(ROW, strict=False), absent, columns, config), group, roles, config)


def _without_short(table: pl.DataFrame, raw: RawTable, config: DataConfig, report: IngestReport) -> pl.DataFrame:
    """Leave out rows with fewer cells than the header, or refuse them."""
    if not raw.short:
        return table
    examples = tuple(f"row {row}: {cells}" for row, cells in list(raw.short.items())[:3])
    what, count = "rows have fewer cells than the header", len(raw.short)
    if config.bad_rows == "error" or count == table.height:
        raise DataError(
            f"{count} of {table.height} {what} ({listing(examples)}), so that a number may be cut off; repair them or "
            "leave them out with bad_rows=drop"
        )
    report.add("refused", what, count, examples)
    return table.filter(~pl.col(ROW).is_in(list(raw.short)))


def _variate(column: str, separator: str | None) -> str:
    if separator is None:
        return column
    return column.partition(separator)[2] or column


def _value_columns(names: list[str], keys: list[str], config: DataConfig) -> tuple[dict[str, str], list[str]]:
    """Return source column -> variate for every column to read, and which of them nobody named.

    A column without a name (an index that a tool wrote along) is left out.
    """
    named = (*config.targets, *config.past, *config.known, *config.static)
    # what is known ahead may come alone; nulls=erase would take a column that is not there for one without values
    may_lack = config.past if config.known and config.nulls == "keep" else ()
    values = {name: _variate(name, config.separator) for name in names if name and name not in keys}
    split = config.separator
    if split is not None and not any(split in name for name in values):
        raise DataError(f"no column name contains the separator '{split}' (it has {listing(names, 20)})")
    variates = dict.fromkeys(values.values())
    for what, wanted in (
        ("roles", named),
        ("sentinels", [name for name in config.sentinels if name != "*"]),
        ("valid_range", list(config.valid_range)),
        ("resample.columns", list(config.resample.columns) if config.resample else []),
    ):
        missing = [name for name in wanted if name not in variates and name not in may_lack]
        if missing:
            raise _no_column(what, missing, variates)
    if config.targets:
        return {name: variate for name, variate in values.items() if variate in named}, []
    return values, [name for name, variate in values.items() if variate not in named]


def _no_column(what: str, missing: Sequence[str], variates: Iterable[str]) -> DataError:
    have = list(variates)
    hint = nearest(missing[0], have)
    return DataError(f"{what}: no column {listing(map(repr, missing))}{hint} (it has {listing(have, 20)})")


def _absent_past(
    table: pl.DataFrame, columns: dict[str, str], roles: dict[str, tuple[str, ...]], report: IngestReport
) -> list[str]:
    """Return the past covariates that the source lacks: none are due in rows without any target, news of the future.

    Raises:
        DataError: there is a target, so that the column has gone, or its name is wrong.
    """
    variates = dict.fromkeys(columns.values())
    absent = [name for name in roles["past"] if name not in variates]
    targets = [name for name, variate in columns.items() if name in table.columns and variate in roles["targets"]]
    if absent and any(table[name].null_count() < table.height for name in targets):
        raise _no_column("roles", absent, variates)
    report.add("note", "past covariates without a column, beside targets without a value", len(absent), tuple(absent))
    return absent


def _with_empty(table: pl.DataFrame, absent: list[str], columns: dict[str, str], config: DataConfig) -> pl.DataFrame:
    """Return the table with a column without values for each absent variate."""
    mark = config.separator
    owners = [name.partition(mark)[0] for name in columns if mark is not None and mark in name]
    prefix = f"{owners[0]}{mark}" if owners else ""
    return table.with_columns(pl.lit(None, pl.Float64).alias(f"{prefix}{name}") for name in absent)


def _roles(table: pl.DataFrame, columns: dict[str, str], config: DataConfig) -> dict[str, tuple[str, ...]]:
    """Return role -> variates; without named targets every numeric column that has no other role is one."""
    others = {"past": config.past, "known": config.known, "static": config.static}
    targets = config.targets
    if not targets:
        taken = {name for names in others.values() for name in names}
        present = [variate for name, variate in columns.items() if name in table.columns and variate not in taken]
        targets = tuple(dict.fromkeys(present))
    if not targets:
        raise DataError(f"no numeric column is left to be a target (columns: {listing(columns, 20)})")
    return {"targets": targets, **others}


def _with_series_ids(table: pl.DataFrame, group: str, config: DataConfig, report: IngestReport) -> pl.DataFrame:
    ids = table[group]
    if ids.dtype == pl.String:
        ids = ids.set(ids.str.strip_chars() == "", None)
    count = ids.null_count()
    if not count:
        return table
    examples = tuple(f"row {row}" for row in table[ROW].filter(ids.is_null()).head(3))
    if config.bad_rows == "error" or count == table.height:
        raise DataError(
            f"{count} of {table.height} rows have no series id in column '{group}' ({listing(examples)}); repair them "
            "or leave them out with bad_rows=drop"
        )
    report.add("refused", f"no series id in column '{group}'", count, examples)
    return table.filter(ids.is_not_null())


def _note_order(table: pl.DataFrame, keys: list[str], report: IngestReport) -> None:
    *group, time = keys
    before = pl.col(time).shift().over(group) if group else pl.col(time).shift()
    back = table.select((pl.col(time) < before).fill_null(False)).to_series()
    if back.any():
        examples = row_examples(table[ROW], table[time], back, 2)
        report.add("sorted", "rows whose time lies before the row above", int(back.sum()), examples)


def _without_duplicates(
    table: pl.DataFrame, group: str | None, config: DataConfig, report: IngestReport
) -> pl.DataFrame:
    keys = [name for name in (group, config.time, config.published) if name is not None]
    key = pl.struct(keys) if len(keys) > 1 else pl.col(keys[0])
    extra = ~table.select(key.is_first_distinct()).to_series()
    count = int(extra.sum())
    if not count:
        return table
    values = [name for name in table.columns if name not in (ROW, *keys)]
    examples = row_examples(table[ROW], table[config.time], extra)
    what = "the time" if config.published is None else "the time and publication time"
    if config.duplicates == "error":
        same = count - (table.n_unique([*keys, *values]) - table.n_unique(keys))
        where = f" in {table.filter(extra)[group].n_unique()} of {table[group].n_unique()} series" if group else ""
        revised = ", or name the column of publication times (published) if these are revisions"
        raise DataError(
            f"{count} of {table.height} rows repeat {what} of an earlier row{where} ({listing(examples)}; {same} of "
            f"them with equal values); set duplicates=mean, first or last{'' if config.published else revised}"
        )
    report.add("merged", f"rows that repeat {what}: {config.duplicates}", count, examples)
    if config.duplicates == "mean":
        if config.static and group is not None:
            check_constant(table, group, config.static)
        static, others = ([name for name in values if (name in config.static) is yes] for yes in (True, False))
        merged = (pl.col(static).drop_nulls().first(), pl.col(others).mean(), pl.col(ROW).first())
        return table.group_by(keys, maintain_order=True).agg(*merged).select(table.columns)
    return table.unique(keys, keep=config.duplicates, maintain_order=True)


def _resampled(
    table: pl.DataFrame,
    keys: list[str],
    columns: dict[str, str],
    resample: ResampleConfig,
    report: IngestReport,
    *,
    clock: str | None,
    static: tuple[str, ...],
) -> pl.DataFrame:
    """Return one row a cell of the grid; with a ``clock`` cells are days of that zone, and their times its dates.

    ``static`` columns are constant within a series; a mean would round them.
    """
    *group, time = keys
    step = parse_freq(resample.every)
    integer = table[time].dtype.is_integer()
    if integer != (step.kind == "integer"):
        raise DataError(
            f"resample.every={resample.every} does not fit the {'integer' if integer else 'datetime'} times"
        )
    if integer:
        floored = pl.col(time) // step.count * step.count
    elif clock is None:
        floored = pl.col(time).dt.truncate(resample.every)
    else:  # off the zone before cutting: a day of 23 or 25 hours is one row, on the grid of dates
        local = pl.col(time).dt.convert_time_zone(clock).dt.replace_time_zone(None)
        floored = local.dt.truncate(resample.every).dt.replace_time_zone("UTC")
    present = {name: variate for name, variate in columns.items() if name in table.columns}
    aggregated = [
        _aggregate(name, "first" if variate in static else resample.columns.get(variate, resample.default))
        for name, variate in present.items()
    ]
    result = table.sort(time, maintain_order=True).group_by([*group, floored.alias(time)], maintain_order=True)
    after = result.agg(aggregated)
    report.add("merged", f"rows resampled to {after.height} of {resample.every}", table.height)
    return after


def _aggregate(name: str, how: str) -> pl.Expr:
    values = pl.col(name).drop_nulls()
    if how == "sum":  # the sum of no values is no value, not zero
        return pl.when(values.len() > 0).then(values.sum()).alias(name)
    by_name = {
        "mean": values.mean(),
        "min": values.min(),
        "max": values.max(),
        "first": values.first(),
        "last": values.last(),
        "median": values.median(),
    }
    return by_name[how].alias(name)


def _frame(
    table: pl.DataFrame, group: str | None, roles: dict[str, tuple[str, ...]], config: DataConfig
) -> tuple[History, pl.DataFrame | None]:
    freq = config.freq or (config.resample.every if config.resample else None)
    static = None
    if group is None:
        plain, schema = wide_table(
            table,
            time=config.time,
            roles={name: value for name, value in roles.items() if name != "static"},
            freq=freq,
            separator=config.separator,
            series_id=config.name,
            published=config.published,
        )
    else:
        plain, schema, static = long_table(
            table, series_id=group, time=config.time, roles=roles, freq=freq, published=config.published
        )
        if freq is None:
            _check_one_frequency(plain.unique(["series_id", "time"]), schema.freq)
    if config.published is not None:
        return VintageFrame(plain, schema, static, require_targets=False), None
    present = None
    if config.nulls == "erase":  # before the gaps are filled: what the source does not mention stays
        keys = plain.select("series_id", "time")
        if group is None:  # empty ends of a series were cut
            keys = keys.select(pl.col("series_id").unique(maintain_order=True)).join(
                table.select(pl.col(config.time).alias("time")), how="cross"
            )
        present = keys.select(pl.col("series_id").cast(pl.String), normalise_time(keys["time"]))
    return SeriesFrame(plain, schema, static, require_targets=False), present


def _check_one_frequency(table: pl.DataFrame, freq: str) -> None:
    """Refuse series whose most frequent step differs from the inferred one; months have steps of many lengths."""
    step = parse_freq(freq)
    if step.kind == "month":
        return
    steps = (
        table.lazy()
        .select("series_id", pl.col("time").cast(pl.Int64))
        .sort("series_id", "time")
        .group_by("series_id", maintain_order=True)
        .agg(pl.col("time").diff().drop_nulls().mode().min().alias("step"), pl.len().alias("rows"))
        .filter((pl.col("rows") >= _MIN_ROWS_FOR_STEP) & (pl.col("step") != step.count))
        .collect()
    )
    if steps.height:
        odd = Frequency(int(steps["step"][0]), step.kind).text
        raise DataError(
            f"{steps.height} of {table['series_id'].n_unique()} series have another frequency than {freq} (first: "
            f"'{steps['series_id'][0]}' with {odd}); ingest them under another name, resample, or state freq={freq} to "
            "keep them as gappy series"
        )
