"""What a dataset is: where its rows come from, which column plays which role, and how flaws are dealt with.

Every policy that could change or lose data defaults to ``error``; the message names the setting that allows it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from sqlalchemy.exc import ArgumentError

from tsforge.core.config import Config
from tsforge.core.errors import listing
from tsforge.core.zones import ZoneName
from tsforge.data.calendar import CalendarConfig
from tsforge.data.durations import Shift, Span, Step, check_delay
from tsforge.data.hierarchy import HierarchyConfig
from tsforge.data.sql import holds_secret
from tsforge.data.synthetic import SyntheticConfig

Aggregation = Literal["mean", "sum", "min", "max", "first", "last", "median"]
EPOCH_FORMATS = ("epoch:s", "epoch:ms", "epoch:us")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")


class TextMarks(Config):
    """Marks of delimited text."""

    separator: str = Field(",", min_length=1, max_length=1)
    encoding: str = "utf-8"
    decimal: Literal[".", ","] = "."
    """Decimal mark of numbers; with ``,`` the separator must be another character."""
    null_values: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
    """Cells that mean "no value"; a numeric code such as -9999 belongs in ``sentinels``."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError as error:
            raise ValueError(f"unknown encoding '{value}' (common: utf-8, latin-1, cp1252, utf-16)") from error
        return value

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        if self.separator == self.decimal:
            raise ValueError(f"separator and decimal are both '{self.decimal}'; they must differ")
        return self


class CsvSource(TextMarks):
    """Delimited text: a file, a folder (its ``*.csv``) or a glob pattern; all files share one header."""

    kind: Literal["csv"] = "csv"
    path: str
    skip_lines: int = Field(0, ge=0)
    """Lines of free text above the header."""


class ParquetSource(Config):
    """Parquet: a file, a glob pattern, or a folder that may be partitioned as ``key=value/``."""

    kind: Literal["parquet"] = "parquet"
    path: str


class SqlSource(Config):
    """A table or a query of a database. Passwords never stand in a config: name an environment variable instead."""

    kind: Literal["sql"] = "sql"
    url_env: str | None = None
    """Name of the environment variable that holds the SQLAlchemy URL."""
    url: str | None = None
    """The URL itself, only if it holds no password."""
    path: str | None = None
    """A SQLite file."""
    table: str | None = None
    """``table`` or ``schema.table``."""
    query: str | None = None
    """A SELECT statement; it is run as it stands."""

    @model_validator(mode="after")
    def _one_address_one_selection(self) -> SqlSource:
        given = [name for name in ("url_env", "url", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of url_env, url, path (given: {listing(given) or 'none'})")
        if (self.table is None) == (self.query is None):
            raise ValueError("give either table or query")
        if self.url is not None:
            try:
                has_password = holds_secret(self.url)
            except (ArgumentError, ValueError):  # the latter: a port that is no number
                raise ValueError("url is not a database URL such as postgresql+psycopg://user@host/name") from None
            if has_password:
                raise ValueError("url holds a password; put the URL in an environment variable and give url_env")
        return self


class EmbeddedSource(Config):
    """A dataset that ships with tsforge."""

    kind: Literal["embedded"] = "embedded"
    dataset: Literal["nyc_weather"] = "nyc_weather"


class SyntheticSource(Config):
    """Generated series; roles and frequency come from the generator."""

    kind: Literal["synthetic"] = "synthetic"
    generator: SyntheticConfig = SyntheticConfig()


Source = Annotated[
    CsvSource | ParquetSource | SqlSource | EmbeddedSource | SyntheticSource,
    Field(discriminator="kind"),
]


class ResampleConfig(Config):
    """Rows brought onto a regular grid: times are floored to ``every``, rows of one cell are aggregated.

    Steps of whole days, weeks, months, quarters or years are cut at midnight of ``timezone`` and stored under the local
    date, 23 and 25 hours where clocks change included; shorter steps are cut on the UTC clock.
    """

    every: Step
    """Step of the grid, such as ``1h``."""
    default: Aggregation = "mean"
    columns: dict[str, Aggregation] = Field(default_factory=dict)
    """Aggregation of single columns, for example ``{rain: sum}``."""


class DataConfig(Config):
    """One dataset, from source to roles.

    Long layout: one row a series and time, ``series`` names the column of series ids (without it the whole table is one
    series called like the dataset). Wide layout: one row a time; with ``separator`` the columns named
    series-separator-variate become several series, without it the table is one series with one variate a column.
    """

    name: str
    source: Source
    layout: Literal["long", "wide"] = "wide"
    time: str = "ds"
    time_format: str | None = None
    """strptime format, or epoch:s / epoch:ms / epoch:us; None tries ISO 8601 forms."""
    timezone: ZoneName = "UTC"
    """Zone of times that carry no offset; they are stored in UTC, as dates where all are midnights of that zone. Times
    with an offset take none, unless ``resample`` makes days of them."""
    time_shift: Shift | None = None
    """Duration added to local times first, such as ``-1h`` where a stamp marks the end of its hour."""
    ambiguous: Literal["error", "infer", "earliest", "latest", "drop"] = "error"
    """Local times that occur twice when clocks go back; ``infer`` takes them in the order of the rows, oldest or
    newest first, and refuses any other order."""
    nonexistent: Literal["error", "shift", "drop"] = "error"
    """Local times skipped when clocks go forward; ``shift`` reads them on the clock before the change."""
    series: str | None = None
    separator: str | None = None
    targets: tuple[str, ...] = ()
    """Variates to forecast; empty = every numeric column without another role."""
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    """Columns constant within a series (long layout only)."""
    freq: Step | None = None
    """Step of the grid (``15m``, ``1h``, ``1d``, ``1mo``; ``1i`` for integer time); None = inferred and reported."""
    duplicates: Literal["error", "mean", "first", "last"] = "error"
    bad_rows: Literal["error", "drop"] = "error"
    """Rows without a readable time or series id: refuse the batch, or leave the rows out and record them."""
    bad_cells: Literal["error", "null"] = "error"
    """Cells that are no number or infinite: refuse the batch, or make them null and record them."""
    empty_targets: Literal["error", "keep"] = "error"
    """A target without a single value in the batch."""
    sentinels: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Codes for "missing" per column, for example ``{temp: [-9999]}``; ``"*"`` = every column."""
    resample: ResampleConfig | None = None
    valid_range: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)
    """Physical limits per column; values outside stay in the store and are hidden from training."""
    calendar: CalendarConfig = CalendarConfig()
    hierarchy: HierarchyConfig | None = None
    """Which series (or targets) are sums of which others. Sums that the source lacks are made when the data is read;
    ``valid_range`` holds for the bottoms."""
    nulls: Literal["keep", "erase"] = "keep"
    """A null in a later batch: ``keep`` leaves the older value, ``erase`` removes it."""
    published: str | None = None
    """Column of publication times. Rows may then repeat a series and time, one row a publication; all are kept."""
    published_format: str | None = None
    """As ``time_format``, of the publication times."""
    publication_delay: str | dict[str, str] | None = None
    """How long after its time a value is published: one duration for all targets and past covariates, or by column
    (``{visitors: 2d}``). Of targets: when a forecast can be made; covariates that come later than the targets are moved
    down by as many rows, in training as in forecasting."""
    max_age: Span | None = None
    """Age from which the newest row counts as stale (data report and list; checks have limits of their own)."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("a dataset name is a letter, then up to 59 letters, digits, '_' or '-'")
        return value

    @field_validator("publication_delay")
    @classmethod
    def _delays(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for delay in (value,) if isinstance(value, str) else (value or {}).values():
            check_delay(delay)
        return value

    @field_validator("valid_range")
    @classmethod
    def _ordered(
        cls, value: dict[str, tuple[float | None, float | None]]
    ) -> dict[str, tuple[float | None, float | None]]:
        for column, (low, high) in value.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"the range of '{column}' is [{low:g}, {high:g}]; its low end lies above its high end")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        roles = [*self.targets, *self.past, *self.known, *self.static]
        repeated = sorted({name for name in roles if roles.count(name) > 1})
        if repeated:
            raise ValueError(f"column(s) with more than one role: {listing(repeated)}")
        if self.source.kind == "synthetic":
            self._refuse_without_effect("a synthetic source", "targets", "past", "known", "static", "separator", "freq")
            self._refuse_without_effect("a synthetic source", "published", "published_format")
            return self
        if self.hierarchy is not None and self.published is not None:
            raise ValueError("hierarchy and published exclude each other: sums of publications are not kept")
        if self.published is None:
            self._refuse_without_effect("no column of publication times (published)", "published_format")
        elif self.resample is not None:
            raise ValueError("resample would mix publications; bring the source onto the grid before, or leave it out")
        elif self.nulls == "erase":
            raise ValueError("nulls=erase has no meaning with published: a missing value says nothing about its cell")
        if self.layout == "long":
            self._refuse_without_effect("the long layout", "separator")
        else:
            self._refuse_without_effect("the wide layout", "series", "static")
        keys = [name for name in (self.time, self.series, self.published) if name]
        if len(set(keys)) < len(keys):
            raise ValueError(f"time, series and published must be different columns (given: {listing(keys)})")
        taken = set(keys) & set(roles)
        if taken:
            raise ValueError(f"'{listing(taken)}' is the time, series or published column and cannot have a role")
        return self

    def _refuse_without_effect(self, where: str, *names: str) -> None:
        useless = [name for name in names if getattr(self, name)]
        if useless:
            raise ValueError(f"{listing(useless)} has no effect with {where}; remove it")
