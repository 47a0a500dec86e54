"""Times as sources write them to times of a grid: ISO text, formats, epochs, local clocks, integers."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.data.config import EPOCH_FORMATS, DataConfig
from tsforge.data.findings import ROW, IngestReport, row_examples
from tsforge.data.grid import TIME_DTYPE, parse_freq

# Each form is unambiguous, so a column may mix them; day-first and month-first forms need a time_format.
_DATE_FORMS = ("%Y-%m-%d", "%Y/%m/%d", "%Y-%m")
_CLOCK_FORMS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")
_SLASH_FORMS = ("%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M")
_ZONED_FORMS = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z", "%Y-%m-%d %H:%M%#z")
_SAMPLE = 100
_EPOCH_UNITS = {"epoch:s": 1_000_000, "epoch:ms": 1_000, "epoch:us": 1}
_EPOCH_SECONDS = (500_000_000, 5_000_000_000)
_NO_STEPS = (  # ranges of integers that hardly count steps, what they look like, what to do
    (19_000_101, 21_001_231, "dates such as 20240131", "set time_format=%Y%m%d"),
    *(
        (_EPOCH_SECONDS[0] * unit, _EPOCH_SECONDS[1] * unit, f"{name}seconds since 1970", advice)
        for unit, name, advice in (
            (1, "", "set time_format=epoch:s"),
            (10**3, "milli", "set time_format=epoch:ms"),
            (10**6, "micro", "set time_format=epoch:us"),
            (10**9, "nano", "divide them by 1000 and set time_format=epoch:us"),
        )
    ),
)
_FULL_YEAR = r"%[YFGcv+]"  # parsers of these take one digit too
_SHORT_YEAR = 1000
# a parser of text takes a 60th second for the first one of the next minute: two rows would have one time
_SECOND_60 = r":\d{2}:60([^0-9]|$)"
_COMPACT_SECOND_60 = r"[0-2]\d[0-5]\d60([^0-9]|$)"


def read_times(
    table: pl.DataFrame, group: str | None, config: DataConfig, report: IngestReport
) -> tuple[pl.DataFrame, bool]:
    """Return the table with its time column in UTC (or integer), and whether these times are dates.

    Rows without a readable time are dealt with as configured. Dates are the ones that the source writes, and midnights
    of a local clock where no finer grid is meant: days of 23 or 25 hours would leave the daily grid.

    Args:
        table: source rows with ``ROW`` (position in the source) and the time column.
        group: the series column, for local times that occur twice; None when a row holds all series.
        config: names, formats, zone and policies.
        report: takes the findings.

    Raises:
        DataError: unreadable, missing, ambiguous or non-existent times under a policy of ``error``.
    """
    fine = _below_microsecond(table[config.time])
    what = "times with a fraction below one microsecond"
    table = _drop_bad(table, fine, what, config, report, advice="round them in the source")
    parsed = _parse(table[config.time], config)
    short = _has_short_year(table[config.time], parsed, config)
    what, advice = "times with a year of fewer than four digits", "write %y for years of two in time_format"
    table, parsed = _drop_bad(table, short, what, config, report, advice=advice), parsed.filter(~short)
    raw = table[config.time]
    parsed = _within_calendar(parsed, config)
    unreadable = parsed.is_null() & raw.is_not_null()
    table = _drop_bad(table, unreadable, "unreadable times", config, report)
    parsed = parsed.filter(~unreadable)
    table, parsed = _without_missing(table, parsed, config, report)
    if parsed.dtype.is_integer():
        if config.time_shift is not None:
            raise DataError(f"time_shift has no effect on the integer time column '{config.time}'; remove it")
        return table.with_columns(parsed.cast(pl.Int64).alias(config.time)), False
    if config.time_shift is not None:
        parsed = parsed.dt.offset_by(config.time_shift)
    midnights = _local_midnights(parsed, config)
    if midnights.any() and midnights.all():
        parsed = parsed.dt.date()
    if parsed.dtype == pl.Date:  # calendar days stay days: midnight in a zone with DST would leave the daily grid
        return table.with_columns(parsed.cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias(config.time)), True
    if parsed.dtype == TIME_DTYPE:
        return table.with_columns(parsed.alias(config.time)), False
    return _localise(table.with_columns(parsed.alias(config.time)), midnights, group, config, report), False


def _below_microsecond(raw: pl.Series) -> pl.Series:
    """Return which times have nanoseconds that microseconds cannot hold."""
    if not isinstance(raw.dtype, pl.Datetime) or raw.dtype.time_unit != "ns":
        return pl.repeat(False, len(raw), eager=True)
    return (raw.to_physical() % 1000 != 0).fill_null(False)


def _has_short_year(raw: pl.Series, parsed: pl.Series, config: DataConfig) -> pl.Series:
    """Return which cells were read with a year that they do not write out: 01.01.24 is no day of the year 24."""
    form = config.time_format
    if form is None or not re.search(_FULL_YEAR, form) or not parsed.dtype.is_temporal():
        return pl.repeat(False, len(raw), eager=True)
    year = parsed.dt.year().cast(pl.String).str.zfill(4)
    cells = pl.DataFrame({"cell": raw.cast(pl.String), "year": year, "is_early": parsed.dt.year() < _SHORT_YEAR})
    written = pl.col("cell").str.contains(pl.col("year"), literal=True)
    return cells.select((pl.col("is_early") & ~written).fill_null(False)).to_series()


def makes_local_days(config: DataConfig) -> bool:
    """Return whether rows become days, or longer steps, of another clock than UTC."""
    return config.timezone != "UTC" and config.resample is not None and parse_freq(config.resample.every).is_whole_days


def _local_midnights(times: pl.Series, config: DataConfig) -> pl.Series:
    """Return which times are midnights of a local clock that stand for dates; all or none unless ``freq`` is of days.

    With a stated ``freq`` of days other times among midnights are an error (some of them are midnights of UTC, which
    would pass for dates); without one a single other time says that midnights are times of a finer grid. Publication
    times keep the times beside them on their clock.

    Raises:
        DataError: times among the midnights of a grid of days; or there are publication times, and midnights lie 23 or
            25 hours apart.
    """
    none = pl.repeat(False, len(times), eager=True)
    if config.timezone == "UTC" or times.dtype != pl.Datetime("us") or config.time == config.published:
        return none
    asked = config.freq or (config.resample.every if config.resample else None)
    if asked is not None and not parse_freq(asked).is_whole_days:
        return none
    midnights = times.dt.time() == time(0)
    if not midnights.all():
        if config.freq is None or config.resample is not None or not midnights.any():
            return none
        raise DataError(
            f"column '{config.time}': {int((~midnights).sum())} of {len(times)} times of the {config.freq} grid are no "
            f"midnights of {config.timezone} (first: {times.filter(~midnights)[0]}); give resample, or a finer freq"
        )
    if config.published is None:
        return midnights
    zone = config.timezone
    utc = times.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null").dt.convert_time_zone("UTC")
    if midnights.all() and utc.dt.time().n_unique() > 1:
        raise DataError(
            f"column '{config.time}' holds midnights of {zone}, which are 23 or 25 hours apart where clocks change; "
            "write plain dates (2024-01-31), of publications at midnight too, or remove timezone if both share a clock"
        )
    return none


def _within_calendar(times: pl.Series, config: DataConfig) -> pl.Series:
    """Return times with null where the year is none of 1 to 9999, all that Python knows, in UTC too."""
    if times.dtype.is_integer():
        return times
    is_moved = config.timezone != "UTC" and times.dtype != pl.Date
    margin = timedelta(days=366 if config.time_shift is not None else int(is_moved))
    low, high = datetime(1, 1, 1) + margin, datetime(9999, 12, 31, 23, 59, 59, 999_999) - margin
    plain = times.cast(pl.Datetime("us")) if times.dtype == pl.Date else times.dt.replace_time_zone(None)
    inside = plain.is_between(low, high).fill_null(True)
    return times.set(~inside, None)


def read_published(table: pl.DataFrame, config: DataConfig, report: IngestReport) -> pl.DataFrame:
    """Return the table with its publication times in UTC (or integer), read like times; to be called before those.

    Raises:
        DataError: as for ``read_times``; also publication times on another clock than the times, as far as can be seen.
    """
    own = {"time": config.published, "time_format": config.published_format, "time_shift": None}
    as_time = config.model_copy(update=own)
    time, published = _carries_zone(table[config.time], config), _carries_zone(table[as_time.time], as_time)
    if published and time is False and "timezone" not in config.model_fields_set:
        raise DataError(
            f"publication times in '{as_time.time}' carry an offset, the times in '{config.time}' do not; say on which "
            "clock those are with timezone (for example UTC)"
        )
    if time and published is False:
        raise DataError(
            f"publication times in '{as_time.time}' carry no offset, the times in '{config.time}' do; give both with "
            "an offset, so that nobody has to guess when a value was out"
        )
    if published:
        as_time = as_time.model_copy(update={"timezone": "UTC"})  # their own offset counts
    return read_times(table, None, as_time, report)[0]


def _carries_zone(raw: pl.Series, config: DataConfig) -> bool | None:
    """Return whether times carry an offset; None for days, integers and what cannot be read."""
    sample = raw.drop_nulls().head(_SAMPLE)
    kind = _parse(sample, config.model_copy(update={"timezone": "UTC"})).dtype
    return kind == TIME_DTYPE if isinstance(kind, pl.Datetime) else None


def _parse(raw: pl.Series, config: DataConfig) -> pl.Series:
    """Return Date, naive or UTC datetimes in microseconds, or Int64; null where a value cannot be read."""
    kind = raw.dtype
    if kind == pl.String:
        cells = raw.str.strip_chars()
        compact = config.time_format is not None and "%H%M%S" in config.time_format
        bad = cells.str.contains(f"{_SECOND_60}|{_COMPACT_SECOND_60}" if compact else _SECOND_60)
        return _parse_text(cells.set((cells == "") | bad, None), config)
    if config.time_format is not None and config.time_format not in EPOCH_FORMATS:
        if not kind.is_integer():
            raise DataError(f"time column '{raw.name}' has type {kind}; time_format is for text, remove it")
        return _parse_text(raw.cast(pl.String), config)  # 20240131 with %Y%m%d
    if kind.is_numeric():
        return _parse_numbers(raw, config)
    if kind == pl.Date:
        return raw
    if isinstance(kind, pl.Datetime):
        plain = raw if kind.time_zone is None else _zoned(raw, config)
        return plain.dt.cast_time_unit("us")
    raise DataError(f"time column '{raw.name}' has type {kind}; give text, dates, datetimes or integers")


def _zoned(times: pl.Series, config: DataConfig) -> pl.Series:
    if config.timezone != "UTC" and not makes_local_days(config):
        raise DataError(
            f"time column '{times.name}' carries its own zone, so timezone={config.timezone} has no effect; remove "
            "it, or set resample.every=1d for days of that clock"
        )
    return times.dt.convert_time_zone("UTC")


def _parse_numbers(raw: pl.Series, config: DataConfig) -> pl.Series:
    """Return numbers as times or as they are; null where they are not finite, or too large for either."""
    numbers = raw.cast(pl.Int64, strict=False)
    if not raw.dtype.is_integer():
        torn = (numbers.cast(raw.dtype) != raw).fill_null(False)
        if torn.any():
            first = raw.filter(torn)[0]
            raise DataError(f"time column '{raw.name}' holds fractions (first: {first}); use integers or datetimes")
    if config.time_format in EPOCH_FORMATS:
        unit = _EPOCH_UNITS[config.time_format]
        most = (2**63 - 1) // unit
        return (numbers.set(~numbers.is_between(-most, most), None) * unit).cast(TIME_DTYPE)
    present = numbers.drop_nulls()
    if config.freq is None and len(present):
        low, high = int(present.to_numpy().min()), int(present.to_numpy().max())
        for first, last, name, advice in _NO_STEPS:
            if first <= low and high <= last:
                raise DataError(
                    f"the integers of time column '{raw.name}' ({low} .. {high}) look like {name}; {advice}, or "
                    "freq=1i if they count steps"
                )
    return numbers


def _parse_text(cells: pl.Series, config: DataConfig) -> pl.Series:
    form = config.time_format
    if form in EPOCH_FORMATS or (form is None and cells.drop_nulls().str.contains(r"^-?\d+$").all()):
        return _parse_numbers(cells.cast(pl.Int64, strict=False), config)
    if form is not None:
        parsed = _parse_form(cells, form)
        if "%z" in form or "%#z" in form or "%:z" in form or form == "%+":
            return _zoned(parsed, config)
        has_clock = any(sign in form for sign in ("%H", "%I", "%T", "%R", "%X", "%s"))
        return parsed if has_clock else parsed.dt.date()
    cells = cells.set(~cells.str.contains(r"^\+?[0-9]{4}[^0-9]"), None)  # 01/01/24 is no day of the year 1
    naive = _first_that_reads(cells, (*_CLOCK_FORMS, *_SLASH_FORMS))
    left = cells.set(naive.is_not_null(), None)
    days = _first_that_reads(left, _DATE_FORMS)
    if days.null_count() < len(days) and naive.null_count() == len(naive):
        return days.dt.date()
    naive = naive.zip_with(naive.is_not_null(), days)
    zoned = _first_that_reads(cells.set(naive.is_not_null(), None), _ZONED_FORMS, zone=True)
    if zoned.null_count() == len(zoned):
        return naive
    if naive.null_count() < len(naive):
        raise DataError(
            f"time column '{cells.name}' mixes times with an offset and without (first with: "
            f"{cells.filter(zoned.is_not_null())[0]!r}, without: {cells.filter(naive.is_not_null())[0]!r})"
        )
    return _zoned(zoned, config)


def _parse_form(cells: pl.Series, form: str) -> pl.Series:
    try:
        return cells.str.to_datetime(form, strict=False, time_unit="us")
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"time_format '{form}' cannot be used: {reason}") from error


def _first_that_reads(cells: pl.Series, forms: tuple[str, ...], *, zone: bool = False) -> pl.Series:
    """Return every cell read by the first form that fits it; the likeliest form is tried first."""
    kind = pl.Datetime("us", "UTC") if zone else pl.Datetime("us")
    result = pl.Series(cells.name, [None], dtype=kind).new_from_index(0, len(cells))
    sample = cells.drop_nulls().head(_SAMPLE)
    by_fit = sorted(forms, key=lambda form: _parse_form(sample, form).null_count())
    for form in by_fit:
        if cells.null_count() == len(cells):
            break
        parsed = _parse_form(cells, form).cast(kind)
        result = result.zip_with(result.is_not_null(), parsed)
        cells = cells.set(parsed.is_not_null(), None)
    return result


def _drop_bad(
    table: pl.DataFrame, bad: pl.Series, what: str, config: DataConfig, report: IngestReport, *, advice: str = ""
) -> pl.DataFrame:
    count = int(bad.sum())
    if not count:
        return table
    cells = table[config.time]
    if cells.dtype.is_temporal():  # what is wrong about a date is that Python cannot show it
        cells = cells.cast(pl.String)
    examples = row_examples(table[ROW], cells, bad)
    if config.bad_rows == "error" or count == table.height:
        if count < table.height:
            hint = f"{advice or 'repair them'}, or leave such rows out with bad_rows=drop"
        elif advice:
            hint = advice
        elif config.time_format:
            hint = f"time_format={config.time_format} fits none of them"
        else:
            hint = "set time_format, for example %d/%m/%Y %H:%M"
        raise DataError(f"{count} of {table.height} {what} in column '{config.time}' ({listing(examples)}); {hint}")
    report.add("refused", f"{what} in column '{config.time}'", count, examples)
    return table.filter(~bad)


def _without_missing(
    table: pl.DataFrame, parsed: pl.Series, config: DataConfig, report: IngestReport
) -> tuple[pl.DataFrame, pl.Series]:
    missing = parsed.is_null()
    count = int(missing.sum())
    if not count:
        return table, parsed
    examples = tuple(f"row {row}" for row in table[ROW].filter(missing).head(3))
    if config.bad_rows == "error" or count == table.height:
        raise DataError(
            f"{count} of {table.height} rows have no time in column '{config.time}' ({listing(examples)}); repair them "
            "or leave them out with bad_rows=drop"
        )
    report.add("refused", f"no time in column '{config.time}'", count, examples)
    return table.filter(~missing), parsed.filter(~missing)


def _localise(
    table: pl.DataFrame, dates: pl.Series, group: str | None, config: DataConfig, report: IngestReport
) -> pl.DataFrame:
    """Return local clock times in UTC, ``dates`` among them as they are; skipped and repeated ones follow policies."""
    local, zone = table[config.time], config.timezone
    if zone == "UTC":
        return table.with_columns(local.dt.replace_time_zone("UTC").alias(config.time))
    early = local.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
    late = local.dt.replace_time_zone(zone, ambiguous="latest", non_existent="null")
    twice = (early != late).fill_null(False) & ~dates
    skipped = early.is_null() & ~dates
    _decide(table, twice, config.ambiguous, "ambiguous", config, report)
    _decide(table, skipped, config.nonexistent, "nonexistent", config, report)
    use_late = twice if config.ambiguous == "latest" else pl.repeat(False, table.height, eager=True)
    if config.ambiguous == "infer" and twice.any():
        use_late = _second_times(table, (early, late, twice), group, config)
    times = early.dt.convert_time_zone("UTC").zip_with(~use_late, late.dt.convert_time_zone("UTC"))
    if config.nonexistent == "shift" and skipped.any():
        # the clock before the change: its offset is that of a few hours earlier
        before = local.dt.offset_by("-3h").dt.replace_time_zone(zone, ambiguous="earliest", non_existent="null")
        times = times.zip_with(~skipped, before.dt.convert_time_zone("UTC").dt.offset_by("3h"))
    times = times.zip_with(~dates, local.dt.replace_time_zone("UTC"))
    keep = pl.Series([True]).new_from_index(0, table.height)
    if config.ambiguous == "drop":
        keep &= ~twice
    if config.nonexistent == "drop":
        keep &= ~skipped
    return table.with_columns(times.alias(config.time)).filter(keep)


def _decide(
    table: pl.DataFrame, hit: pl.Series, policy: str, name: str, config: DataConfig, report: IngestReport
) -> None:
    count = int(hit.sum())
    if not count:
        return
    examples = row_examples(table[ROW], table[config.time], hit)
    event = "occur twice" if name == "ambiguous" else "do not exist"
    change = "go back" if name == "ambiguous" else "go forward"
    what = f"local times that {event} in {config.timezone} where clocks {change}"
    if policy == "error":
        choices = "infer, earliest, latest or drop" if name == "ambiguous" else "shift or drop"
        raise DataError(
            f"{count} of {table.height} {what} ({listing(examples)}); set {name} to {choices}, or timezone=UTC if "
            "column '" + config.time + "' is not local time"
        )
    report.add("refused" if policy == "drop" else "note", f"{what}: {policy}", count, examples)


def _second_times(
    table: pl.DataFrame, times: tuple[pl.Series, pl.Series, pl.Series], group: str | None, config: DataConfig
) -> pl.Series:
    """Return which local times are the second of their kind, as the order of the rows of each series tells.

    Rows may stand oldest first or newest first, by the instant or by the clock. Where both may be, as of two rows
    alone, the rest of the series decides. Rows of one publication are a series of their own.

    Args:
        table: rows in the order of the source.
        times: the earliest and the latest instant of each row, and whether they differ.
        group: the series column; None when a row holds all series.
        config: names and zone.

    Raises:
        DataError: around repeated times the rows of a series follow no order.
    """
    early, late, twice = times
    local = table[config.time]
    rows = pl.DataFrame(
        {
            "at": pl.int_range(table.height, eager=True),
            "series": table[group] if group is not None else pl.repeat("", table.height, eager=True),
            "autumn": local.dt.offset_by("-12h").dt.date(),  # clocks go back at night, perhaps across midnight
            "local": local.to_physical(),
            "early": early.to_physical(),
            "late": late.to_physical(),
            "twice": twice,
        }
    )
    keys = ["series", "autumn"]
    if config.published is not None and config.published != config.time:
        rows = rows.with_columns(issue=table[config.published])
        if rows.filter("twice").select(pl.struct("series", "issue").is_duplicated().any()).item():
            keys.append("issue")
    falls = (pl.col("local").diff().sign().sum() < 0).over("series")
    rows = rows.with_columns(falls=falls).filter(pl.col("twice").any().over(keys) & pl.col("early").is_not_null())
    up = _oldest_first(rows, keys, by_clock=config.published is None)
    down = _oldest_first(rows.reverse(), keys, by_clock=config.published is None).reverse()
    second = up.zip_with(up.is_not_null() & ~(rows["falls"] & down.is_not_null()), down)
    unclear = rows.filter(second.is_null() & rows["twice"])
    if unclear.height:
        hit = pl.int_range(table.height, eager=True).is_in(unclear["at"].implode())
        examples = row_examples(table[ROW], local, hit)
        raise DataError(
            f"{unclear.height} of {table.height} local times that occur twice in {config.timezone} where clocks go "
            f"back stand, in {unclear['series'].n_unique()} series, in no order of time ({listing(examples)}), so that "
            "ambiguous=infer cannot tell the first from the second; give the rows oldest or newest first, or set "
            "ambiguous to earliest, latest or drop"
        )
    return pl.int_range(table.height, eager=True).is_in(rows["at"].filter(second).implode())


def _oldest_first(rows: pl.DataFrame, keys: list[str], *, by_clock: bool) -> pl.Series:
    """Return which times are second ones if rows come oldest first; null where by this they would be out of order.

    A clock that does not move on has gone back. With ``by_clock`` rows may also be sorted by the clock, so that equal
    times take turns.
    """
    twice, step = pl.col("twice"), pl.col("local").diff().over(keys)
    rows = rows.with_columns(
        step=step,
        is_beside=(twice | twice.shift().over(keys)).fill_null(False),
        passed=twice & (((step <= 0) & twice).fill_null(False).cum_sum().over(keys) > 0),
        again=twice & ~pl.struct(*keys, "local").is_first_distinct(),
    )
    moves = pl.when("passed").then("late").otherwise("early").diff().over(keys)
    rows = rows.with_columns(
        is_told=((moves > 0) | ~pl.col("is_beside")).fill_null(True).all().over(keys),
        is_sorted=((pl.col("step") >= 0) | ~pl.col("is_beside")).fill_null(True).all().over(keys) & by_clock,
    )
    return rows.select(pl.when("is_told").then("passed").when("is_sorted").then("again").alias("second")).to_series()
