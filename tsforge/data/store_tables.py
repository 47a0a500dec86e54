"""Tables of the series store: what is kept about a dataset, and the table that holds its observations.

Names of people's columns never become SQL: a variate ``T (degC)`` is stored in a column such as ``v3_t_degc``, and the
dataset's record says which variate that is. So any name is safe, and names that differ only in case do not collide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Double,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Row,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine

from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.data.schema import SeriesSchema
from tsforge.data.stored_json import stored_json, unreadable

FORMAT = 2
PLAIN_FORMAT = 1  # of a store without publication times: older versions of tsforge go on writing it
MAX_COLUMNS = 800  # PostgreSQL joins at most 1,664 columns, SQLite nests at most 1,000 comparisons

_VINTAGES = "vintages"  # beside the schema of a dataset whose rows are publications

METADATA = MetaData()
_ID: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers only INTEGER keys by itself

# ids compare by their bytes, as polars sorts them; the collation of a language costs time and sorts otherwise
_BYTES: TypeEngine[str] = Text().with_variant(Text(collation="C"), "postgresql")

INFO = Table("tsf_info", METADATA, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False))

DATASETS = Table(
    "tsf_datasets",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("name", String(60), nullable=False, unique=True),
    Column("schema", Text, nullable=False),
    Column("columns", Text, nullable=False),  # variate -> column of the observation table
    Column("config", Text, nullable=False),
    Column("num_rows", BigInteger, nullable=False),
    Column("first_time", BigInteger),
    Column("last_time", BigInteger),
    Column("created", DateTime, nullable=False),
    Column("updated", DateTime, nullable=False),
)

SERIES = Table(
    "tsf_series",
    METADATA,
    Column("dataset_id", _ID, nullable=False),
    Column("series_id", _BYTES, nullable=False),
    Column("static", Text, nullable=False),  # JSON: static column -> number
    PrimaryKeyConstraint("dataset_id", "series_id"),
)

LABELS = Table(
    "tsf_labels",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("dataset_id", _ID, nullable=False, index=True),
    Column("series_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("end", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("variates", Text, nullable=False),
)

BATCHES = Table(
    "tsf_batches",
    METADATA,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("dataset", String(60), nullable=False, index=True),
    Column("status", String(12), nullable=False),  # running, done, refused, failed, interrupted
    Column("started", DateTime, nullable=False),
    Column("finished", DateTime),
    Column("source", Text, nullable=False),
    Column("fingerprint", String(16)),
    Column("rows_in", BigInteger),
    Column("rows_new", BigInteger),
    Column("rows_changed", BigInteger),
    Column("rows_unchanged", BigInteger),
    Column("rows_refused", BigInteger),
    Column("reasons", Text, nullable=False),
)


@dataclass(frozen=True)
class Definition:
    """A dataset as the store knows it.

    Attributes:
        id: key of its record.
        name: its name.
        schema: roles of every column it ever had.
        columns: variate -> column of the observation table.
        config: the settings of the last batch, plain types.
        has_vintages: whether a row is a publication, with its time, so that a series and time may have several.
        num_rows, first_time, last_time: extent of the stored rows (microseconds since 1970 or integer time).
    """

    id: int
    name: str
    schema: SeriesSchema
    columns: Mapping[str, str]
    config: Mapping[str, Any]
    has_vintages: bool
    num_rows: int
    first_time: int | None
    last_time: int | None

    @classmethod
    def from_row(cls, row: Row[Any]) -> Definition:
        """Return the definition in a row of ``DATASETS``.

        Raises:
            BackendError: a column of the row is no JSON object, or no schema.
        """
        schema, columns, config = (_object(row, name) for name in ("schema", "columns", "config"))
        has_vintages = bool(schema.pop(_VINTAGES, False))
        try:
            described = SeriesSchema.from_dict(schema)
        except (ConfigError, TypeError) as error:
            raise unreadable(_column(row, "schema"), str(error)) from error
        if any(not isinstance(columns.get(name), str) for name in described.columns):
            raise unreadable(_column(row, "columns"), "it does not say where every variate is kept")
        return cls(
            id=row.id,
            name=row.name,
            schema=described,
            columns=columns,
            config=config,
            has_vintages=has_vintages,
            num_rows=row.num_rows,
            first_time=row.first_time,
            last_time=row.last_time,
        )

    def table(self) -> Table:
        """Return the observation table: ``series_id, time`` (and ``published``) and one column a variate."""
        name = f"tsf_obs_{self.id}_{_slug(self.name, 30)}"
        return observation_table(name, list(self.columns.values()), has_vintages=self.has_vintages)


def _object(row: Row[Any], name: str) -> dict[str, Any]:
    return stored_json(getattr(row, name), dict, _column(row, name))


def _column(row: Row[Any], name: str) -> str:
    return f"dataset '{row.name}': the column {name} of its row in the table {DATASETS.name}"


def schema_text(schema: SeriesSchema, *, has_vintages: bool) -> str:
    """Return the schema as ``DATASETS`` keeps it."""
    return json.dumps(schema.to_dict() | ({_VINTAGES: True} if has_vintages else {}))


def observation_table(
    name: str, columns: list[str], *, has_vintages: bool = False, prefixes: tuple[str, ...] = ()
) -> Table:
    """Return a table of observations; the key is the table itself in SQLite, so a row is stored once."""
    keys = ["time", *(["published"] if has_vintages else [])]
    return Table(
        name,
        MetaData(),
        Column("series_id", _BYTES, nullable=False),
        *(Column(key, BigInteger, nullable=False) for key in keys),
        *(Column(column, Double) for column in columns),
        PrimaryKeyConstraint("series_id", *keys),
        prefixes=list(prefixes),
        sqlite_with_rowid=False,
    )


def _slug(text: str, length: int) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:length] or "x"


def place_columns(schema: SeriesSchema, known: Mapping[str, str]) -> dict[str, str]:
    """Return variate -> column, with columns for variates that are new to the dataset.

    Raises:
        DataError: more columns than a table can hold.
    """
    placed = dict(known)
    for name in schema.columns:
        if name not in placed:
            placed[name] = f"v{len(placed) + 1}_{_slug(name, 40)}"
    if len(placed) > MAX_COLUMNS:
        raise DataError(
            f"{len(placed)} columns are more than the {MAX_COLUMNS} a dataset can hold; make series of them (the long "
            "layout, or a separator in the wide one)"
        )
    return placed


def merge_schemas(name: str, old: SeriesSchema, new: SeriesSchema) -> SeriesSchema:
    """Return the schema that holds the columns of both.

    Raises:
        DataError: the frequency or the role of a column differs.
    """
    if old.freq != new.freq:
        raise DataError(
            f"dataset '{name}' has freq {old.freq}, the new rows have {new.freq}; resample them or ingest them "
            "under another name"
        )
    roles = ("targets", "past", "known", "static")
    before = {column: role for role in roles for column in getattr(old, role)}
    after = {column: role for role in roles for column in getattr(new, role)}
    moved = [
        f"'{column}' from {before[column]} to {role}"
        for column, role in after.items()
        if before.get(column, role) != role
    ]
    if moved:
        raise DataError(
            f"dataset '{name}': a new batch cannot change the role of {listing(moved)}; keep the role or ingest "
            "under another name"
        )
    merged = {
        role: (*getattr(old, role), *(column for column in getattr(new, role) if column not in before))
        for role in roles
    }
    return SeriesSchema(**merged, freq=old.freq)
