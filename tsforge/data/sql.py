"""Databases by one SQLAlchemy URL: SQLite set up to survive a crash, PostgreSQL, and errors without secrets."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, CursorResult, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from tsforge.core.database import BUSY_SECONDS, reason
from tsforge.core.errors import BackendError, ConfigError

_WRITE = "tsforge_write"
_HIDDEN = "***"
_SECRET_KEY = re.compile(  # of a query; odbc_connect holds a whole connection string
    r"passw|passphrase|pwd|secret|token|(api|access|account|private)_?key(?!_?(id|path|file))|odbc_connect",
    re.IGNORECASE,
)

DATABASE_ERROR = SQLAlchemyError  # for rooms that do not import SQLAlchemy
_TIMEOUT_OF = {"psycopg": "connect_timeout", "psycopg2": "connect_timeout", "pymysql": "connect_timeout"}  # by driver
_TIMEOUT_OF |= {"mysqldb": "connect_timeout", "pyodbc": "timeout"}


def safe_url(url: str | URL) -> str:
    """Return the URL with its secrets masked, those of its query too, for messages and records."""
    parsed = make_url(url)
    hidden = {key: _HIDDEN if _SECRET_KEY.search(key) else value for key, value in parsed.query.items()}
    shown = parsed.set(query=hidden).render_as_string(hide_password=True)
    return shown.replace(quote(_HIDDEN), _HIDDEN)


def holds_secret(url: str | URL) -> bool:
    """Return True for a URL with a password, in front of its host or in its query."""
    parsed = make_url(url)
    return bool(parsed.password) or any(_SECRET_KEY.search(key) for key in parsed.query)


def parse_url(url: str | URL) -> URL:
    """Return a database address in its parts.

    Raises:
        ConfigError: it is malformed. The message repeats nothing of it: with its parts unknown, a password is too.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError("the database address is no URL such as sqlite:///store.db") from error
    except ValueError as error:
        raise ConfigError(
            "the database address has a port that is no number; write postgresql+psycopg://USER:PASSWORD@HOST:5432/NAME"
        ) from error
    if "@" in (parsed.host or ""):
        raise ConfigError("the database address has several @ before its host; write %40 for one in a password")
    return parsed


def check_login(url: str, seconds: float) -> None:
    """Connect to a database server once and log in.

    Raises:
        ConfigError: the address is malformed or its driver is not installed.
        BackendError: the server refuses, speaks another protocol or says nothing for ``seconds``.
    """
    parsed = parse_url(url)
    with _driver_of(parsed):
        name = _TIMEOUT_OF.get(parsed.get_dialect().driver)
        limit = {name: max(round(seconds), 1)} if name is not None and name not in parsed.query else {}
        engine = create_engine(parsed, poolclass=NullPool, connect_args=limit)
    with explained(engine, "log in at"), engine.connect():
        return


@contextmanager
def explained(engine: Engine, action: str) -> Iterator[None]:
    """Turn every database error inside into one ``BackendError``: what was tried, where, why, what to do."""
    of_driver: type[Exception] = engine.dialect.loaded_dbapi.Error  # COPY and executemany run past SQLAlchemy
    try:
        yield
    except (SQLAlchemyError, of_driver) as error:
        raise BackendError(f"cannot {action} {safe_url(engine.url)}: {reason(error)}; nothing was changed") from error


def open_engine(url: str | URL, *, read_only: bool = False) -> Engine:
    """Return an engine for ``url``; nothing is connected yet.

    SQLite: write-ahead log, ``synchronous=FULL`` (a finished batch survives a power cut), explicit transactions so that
    changes of tables roll back too. PostgreSQL: connections are checked before use.

    Args:
        url: SQLAlchemy URL.
        read_only: for somebody else's database: nothing is created and no setting of the file is changed.

    Raises:
        ConfigError: the URL is malformed or its driver is not installed.
        BackendError: the folder of the SQLite file cannot be made, or with ``read_only`` the file is missing.
    """
    parsed = parse_url(url)
    dialect = parsed.get_backend_name()
    if dialect == "sqlite":
        return _sqlite_engine(parsed, read_only=read_only)
    if dialect != "postgresql":
        raise ConfigError(f"database '{dialect}' is not supported; use sqlite or postgresql")
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    with _driver_of(parsed):
        return create_engine(parsed, pool_pre_ping=True, pool_size=2)


@contextmanager
def _driver_of(url: URL) -> Iterator[None]:
    """Turn a driver that is not installed, or that nobody knows, into one ``ConfigError``."""
    try:
        yield
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        way = "install it (for postgresql+psycopg: pip install 'tsforge[postgres]')"
        if url.get_backend_name() == "sqlite":
            way = "write sqlite:///FILE"
        raise ConfigError(f"no driver for {safe_url(url)}; {way}") from error


def _sqlite_engine(url: URL, *, read_only: bool) -> Engine:
    if not url.database or url.database == ":memory:":
        raise ConfigError("an in-memory SQLite database holds nothing; give a file, such as sqlite:///store.db")
    path = Path(url.database).resolve()
    # no pool: a connection closed at once lets SQLite fold its log into the file, and forks stay safe
    if read_only:
        if not path.is_file():
            raise BackendError(f"the SQLite file {path} does not exist; check the path")
        with _driver_of(url):
            return create_engine(url, poolclass=NullPool, creator=lambda: _connect_to_read(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"cannot create the folder {path.parent}: {error.strerror}; choose another one") from error
    with _driver_of(url):
        engine = create_engine(url, poolclass=NullPool, creator=lambda: _connect(path))
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect(path: Path) -> sqlite3.Connection:
    if path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        return _connect_to_read(path)
    return sqlite3.connect(path, timeout=BUSY_SECONDS)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file that is not to be changed; a write fails as on a read-only disk.

    Reading in write-ahead mode needs two files beside the database. Where they are absent and cannot be made, nobody
    writes the database either, and SQLite may be told so.
    """
    is_still = not Path(f"{path}-wal").exists() and not os.access(path.parent, os.W_OK)
    options = "mode=ro&immutable=1" if is_still else "mode=ro"
    return sqlite3.connect(f"file:{quote(str(path))}?{options}", uri=True, timeout=BUSY_SECONDS)


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # BEGIN is ours, see _begin_sqlite
    with closing(connection.cursor()) as cursor:
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA cache_size=-65536")  # 64 MiB: a large batch touches many pages


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to a write-ahead log; SQLite does not wait by itself where another process is about to do the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):  # a store that can only be read is still worth reading
                return
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextmanager
def transaction(engine: Engine, action: str, *, write: bool = True) -> Iterator[Connection]:
    """Yield a connection in one transaction: committed at the end, rolled back whole on any error.

    Args:
        engine: from ``open_engine``.
        action: what is done, for messages: ``"write dataset 'x' to"``.
        write: take the write lock at once (SQLite), so that two writers queue up and none of them fails half-way.

    Raises:
        BackendError: the database refused or is gone.
    """
    with explained(engine, action):
        options: dict[str, object] = {_WRITE: True}
        if not write:  # one snapshot for all queries of a reader; SQLite gives that by itself
            options = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
        prepared = engine.execution_options(**options)
        with prepared.begin() as connection:
            yield connection


def inserted_key(result: CursorResult[Any]) -> int:
    """Return the number that the database gave to the one row just inserted."""
    key = result.inserted_primary_key
    assert key is not None  # a single-row INSERT into a table with a numbered key
    return int(key[0])
