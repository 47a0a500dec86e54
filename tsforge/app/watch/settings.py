"""Settings of a watch: what is followed, what judges it, where events go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tsforge.anomaly.config import DetectConfig
from tsforge.app.forecast import LATEST
from tsforge.core.config import Config
from tsforge.core.zones import ZoneName
from tsforge.data.config import CsvSource, DataConfig, ParquetSource, SqlSource, TextMarks
from tsforge.data.schema import SeriesSchema
from tsforge.forecasting.stream_rows import MAX_GAP

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SQL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class RowsConfig(Config):
    """How rows of the long format are read: one row a series and time, one column a variate."""

    time: str = "time"
    series: str | None = "series_id"
    """Column of series ids; null where the artifact knows one series only."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Variate -> column of the source, where they are called differently."""
    time_format: str | None = None
    """As ``data.time_format``: strptime format, or epoch:s / epoch:ms / epoch:us; null tries ISO 8601 forms."""
    timezone: ZoneName = "UTC"
    """Zone of times that carry no offset."""
    ambiguous: Literal["error", "infer", "earliest", "latest", "drop"] = "error"
    nonexistent: Literal["error", "shift", "drop"] = "error"
    bad_rows: Literal["drop", "error"] = "drop"
    """Rows without a readable time or series id: left out and counted, or an error (a file is then refused whole; a
    table or standard input stops the watch before them)."""
    bad_cells: Literal["null", "error"] = "null"
    """Cells that are no number or infinite: null and counted, or an error as above."""
    sentinels: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Codes for "missing" per variate, for example ``{temp: [-9999]}``; ``"*"`` = every variate."""

    def as_data(self, name: str, schema: SeriesSchema, source: CsvSource | ParquetSource) -> DataConfig:
        """Return the settings that the cleaning of ingested data understands, with an artifact's columns as roles.

        Args:
            name: of the data set, for messages.
            schema: what the artifact reads; calendar columns and constants of series are no columns of a source.
            source: where the rows come from, with its marks of CSV.
        """
        return DataConfig(
            name=name,
            source=source,
            layout="long",
            time=self.time,
            series=self.series or "series_id",
            time_format=self.time_format,
            timezone=self.timezone,
            ambiguous=self.ambiguous,
            nonexistent=self.nonexistent,
            targets=schema.targets,
            past=schema.past,
            known=schema.known,
            freq=schema.freq,
            duplicates="first",  # rows that come again later are left out too, so the first one counts
            bad_rows=self.bad_rows,
            bad_cells=self.bad_cells,
            empty_targets="keep",
            sentinels=self.sentinels,
        )


class FolderSource(Config):
    """New files of a folder, each read once, in the order of their names."""

    kind: Literal["folder"] = "folder"
    path: str
    pattern: str = "*"
    """Shell pattern of the names; only .csv, .parquet, .jsonl and .ndjson are looked at, never names that begin with a
    dot."""
    settle_seconds: float = Field(1.0, ge=0.0)
    """A file is read once size and time of change stayed as they are for so long; 0 where files are renamed into
    place."""
    rows: RowsConfig = RowsConfig()
    csv: TextMarks = TextMarks()


class TableSource(SqlSource):
    """Rows of a SQL table (SQLite or PostgreSQL), polled by a key that only grows."""

    kind: Literal["sql"] = "sql"
    key: str
    """Column that grows with every row inserted: a serial number, or a time of insertion."""
    settle_seconds: float = Field(1.0, ge=0.0)
    """Rows wait so long after their key was first seen: a transaction that took an earlier key may commit later. 0
    where keys appear in order (one writer, SQLite)."""
    rows: RowsConfig = RowsConfig()

    @model_validator(mode="after")
    def _table_only(self) -> TableSource:
        if self.query is not None:
            raise ValueError("a watch polls a table or view; put the query into a view and give table")
        return self


class StdinSource(Config):
    """Lines of standard input until it ends."""

    kind: Literal["stdin"] = "stdin"
    format: Literal["csv", "jsonl"] = "csv"
    """``csv``: the first line of every run is the header. ``jsonl``: one object a line, with a key for every column."""
    rows: RowsConfig = RowsConfig()
    csv: TextMarks = TextMarks()

    @model_validator(mode="after")
    def _plain_line_ends(self) -> StdinSource:
        encoding = self.csv.encoding
        try:
            is_plain = b"\n".decode(encoding) == "\n"
        except UnicodeError:
            is_plain = False
        if not is_plain:  # lines are told apart before they are decoded
            raise ValueError(
                f"csv.encoding {encoding} does not end lines with the byte 0A, by which standard input is cut; send it "
                f"as utf-8 (iconv -f {encoding} -t utf-8), or give files (source.kind=folder)"
            )
        return self


class DatasetSource(Config):
    """Rows that land in the store by ``tsforge ingest``."""

    kind: Literal["dataset"] = "dataset"


Source = Annotated[FolderSource | TableSource | StdinSource | DatasetSource, Field(discriminator="kind")]


class JsonlSink(Config):
    """Append one JSON object a line to a file."""

    kind: Literal["jsonl"] = "jsonl"
    path: str


class TableSink(SqlSource):
    """Write to a table of a database, one row an event and transition; the table is made where it is missing."""

    kind: Literal["sql"] = "sql"
    table: str | None = "tsforge_events"

    @model_validator(mode="after")
    def _plain_table(self) -> TableSink:
        if self.query is not None or self.table is None:
            raise ValueError("give table; a query cannot be written to")
        if not all(_SQL_NAME.fullmatch(part) for part in self.table.split(".")) or self.table.count(".") > 1:
            raise ValueError(f"'{self.table}' is no table name such as tsforge_events or ops.tsforge_events")
        return self


class StoreSink(Config):
    """Record events in the event store, where people acknowledge, dismiss and confirm them."""

    kind: Literal["store"] = "store"


class WebhookSink(Config):
    """POST every transition as JSON. A receiver may get one twice after a crash: its Idempotency-Key stays the same."""

    kind: Literal["webhook"] = "webhook"
    url: str | None = None
    """http:// or https:// address, if it holds no secret."""
    url_env: str | None = None
    """Name of the environment variable that holds the address."""
    secret_env: str | None = None
    """Name of the environment variable that holds the key of the HMAC-SHA256 signature; null = not signed."""
    timeout_seconds: float = Field(10.0, gt=0.0, le=120.0)
    tries: int = Field(8, ge=1, le=100)
    """Failed tries after which a transition becomes a dead letter and the next one is sent."""
    backoff_seconds: float = Field(1.0, gt=0.0)
    """Wait after the first failed try; doubled after each further one, or longer if the receiver says Retry-After."""
    max_backoff_seconds: float = Field(300.0, gt=0.0)

    @model_validator(mode="after")
    def _one_address(self) -> WebhookSink:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give either url or url_env")
        if self.url is not None:
            check_address(self.url, "url")
        return self


Sink = Annotated[JsonlSink | TableSink | StoreSink | WebhookSink, Field(discriminator="kind")]


def check_address(address: str, where: str) -> None:
    """Refuse what is no plain HTTP address; the message does not repeat it, since it may hold a secret.

    Raises:
        ValueError: another scheme, no host, signs that no request can hold, or a user and password inside.
    """
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - reading it checks it
        (parts.hostname or "").encode("idna")
    except ValueError:
        raise ValueError(f"{where} is no address such as https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{where} is no address such as https://host/path")
    if not f"{parts.path}{parts.query}".isascii() or any(sign <= " " or sign == "\x7f" for sign in address):
        raise ValueError(f"{where} holds blanks or other signs that an address must spell as %20, %C3%9F and so on")
    if parts.username or parts.password:
        raise ValueError(f"{where} holds a user or password; sign with secret_env instead")


class WatchConfig(Config):
    """Which rows to follow, with which artifact, and where its events go."""

    name: str | None = None
    """Name of the watch, of its folder and of its records; default the data set's."""
    artifact: str = LATEST
    """As for ``tsforge detect``. A watch keeps the artifact it was started with: a newer one is told, and taken over
    with ``reset=true``."""
    dataset: str | None = None
    """Stored data set whose rows before ``start`` scale and calibrate; default the one the artifact was fitted on."""
    start: str | int | None = None
    """First time to judge; default the row after the last stored one."""
    confirmed: bool = True
    """Leave spans that people confirmed as anomalous out of calibration, as of the start of the watch."""
    detector: DetectConfig = DetectConfig()
    source: Source = DatasetSource()
    sinks: dict[str, Sink] = Field(default_factory=lambda: dict[str, Sink](store=StoreSink()))
    """By a name of your choice, under which deliveries are counted."""
    chunk_rows: int = Field(50_000, ge=1, le=10_000_000)
    """Most rows judged and committed at a time."""
    max_gap: int = Field(100_000, ge=1, le=MAX_GAP)
    """A row more grid steps after the one before of its series is taken for a wrong time and refused."""
    max_ahead_seconds: float | None = Field(86_400.0, ge=0.0, le=1e9)
    """A row with a target that lies further ahead of the clock, and a grid step more, is taken for a wrong time and
    refused: true rows that follow it would be late. null = any; of no effect on integer times, rows of the store, and
    rows of a simulated clock (those taken lie ahead already)."""
    poll_seconds: float = Field(5.0, gt=0.0)
    """Wait between looks at a source that had nothing new."""
    drain_seconds: float = Field(60.0, ge=0.0)
    """With --once: longest wait for sinks that refuse; what is left goes out with the next run."""
    reset: bool = False
    """Start anew from the stored data: after other settings of the detector, or another artifact. By hand, not in a
    file: every start would be a new one."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("a name is letters, digits, '_', '-' and '.', and does not begin with '.' or '-'")
        return value

    @field_validator("sinks")
    @classmethod
    def _plain_sinks(cls, value: dict[str, Sink]) -> dict[str, Sink]:
        wrong = [name for name in value if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is no name of a sink; use letters, digits, '_', '-' and '.'")
        paths = [str(Path(sink.path).expanduser().resolve()) for sink in value.values() if isinstance(sink, JsonlSink)]
        if len(set(paths)) < len(paths):
            raise ValueError("two sinks write to the same file; give each its own path")
        return value

    @model_validator(mode="after")
    def _kept_incidents(self) -> WatchConfig:
        if self.detector.events.group_by is not None and not any(
            isinstance(sink, StoreSink) for sink in self.sinks.values()
        ):
            raise ValueError(
                "detector.events.group_by names incidents in the event store, and none of the sinks is one: add "
                "sinks.store.kind=store, or remove group_by"
            )
        return self
