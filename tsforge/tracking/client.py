"""Open an MLflow store: checked in seconds, created whole or not at all, quiet, without telemetry."""

from __future__ import annotations

import http.client
import importlib
import importlib.util
import logging
import os
import re
import socket
import sqlite3
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from tsforge.core.errors import BackendError, ConfigError, TsforgeError
from tsforge.core.workspace import sqlite_url
from tsforge.data.sql import DATABASE_ERROR, check_login, parse_url
from tsforge.tracking.redact import redact

_IMPORT_LOCK = threading.Lock()
_CONNECT_SECONDS = 5.0
_DOWNLOAD = re.compile(r"The following failures occurred while downloading one or more artifacts from (?P<place>.+):$")
_GONE = re.compile(r"no ?such|not (exist|found)|\b404\b", re.IGNORECASE)
REGISTER_AGAIN = (
    "put that folder back from a backup, or make a new version (tsforge fit with tracking.register_as) and give it "
    "the alias (tsforge promote)"
)
# modules that MLflow imports for an address of files only when the first one is stored, and what installs them
_S3 = (("boto3", "boto3"),)
_DRIVERS = {
    "s3": _S3,
    "r2": _S3,
    "b2": _S3,
    "gs": (("google.cloud.storage", "google-cloud-storage"),),
    "wasbs": (("azure.storage.blob", "azure-storage-blob"),),
    "abfss": (("azure.storage.filedatalake", "azure-storage-file-datalake"),),
    "sftp": (("paramiko", "paramiko"), ("pysftp", "pysftp")),
}
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# MLflow's own defaults keep asking a dead server for minutes; a value set by the user wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def import_mlflow(*modules: str) -> ModuleType:
    """Return the ``mlflow`` module, and ``modules`` of it, imported without telemetry and chatter on standard error."""
    with _IMPORT_LOCK, warnings.catch_warnings():
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # MLflow's SQL models use a loader strategy that SQLAlchemy 2.1 deprecates; nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*``noload`` loader strategy", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType", category=UserWarning)
        logger = logging.getLogger("mlflow")
        wanted = max(logger.level, logging.WARNING)  # importing mlflow resets its loggers to "info"
        import mlflow

        for name in ("mlflow.store.tracking.sqlalchemy_store", *modules):
            importlib.import_module(name)
        logger.setLevel(wanted)
        # prints whole tracebacks of errors that are raised as well, and reach the user as one line
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def normalise_uri(uri: str) -> str:
    """Return ``uri`` with an absolute path where it names a SQLite file.

    Raises:
        ConfigError: it is malformed, a plain folder or ``file:`` address, which MLflow no longer stores runs in, or its
            path is none for a database (``sqlite_url``).
    """
    _check_form(uri)
    scheme = urlsplit(uri).scheme
    if not scheme or scheme == "file":
        raise ConfigError(
            f"tracking address '{uri}' is a folder; MLflow stores runs in a database: "
            "use sqlite:////absolute/path/mlflow.db or the address of a tracking server"
        )
    if not scheme.startswith("sqlite"):
        return uri
    head, _, tail = uri.partition(":///")
    path, mark, query = tail.partition("?")
    if not path:
        raise ConfigError(f"tracking address '{uri}' names no file; use sqlite:////absolute/path/mlflow.db")
    place = sqlite_url(Path(unquote(path)).expanduser().resolve()).removeprefix("sqlite:///")
    return f"{head}:///{place}{mark}{query}"


def _check_form(uri: str) -> None:
    """Refuse an address whose parts cannot be told apart; the message repeats nothing of it, it may hold a password."""
    try:
        parts = urlsplit(uri)
        is_clear = parts.port is None or parts.port > 0
    except ValueError:  # the port is no number, or a bracket is not closed
        is_clear = False
    else:
        # what follows a / ? or # in a password is taken for a path, and would be shown
        rest = f"{parts.path}{parts.query}{parts.fragment}"
        is_clear &= parts.scheme.split("+")[0] not in {"http", "https", *_PORTS} or "@" not in rest
    if not is_clear:
        raise ConfigError(
            "the tracking address is malformed; correct MLFLOW_TRACKING_URI to http://HOST:PORT or "
            "postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME: the port is a number, and a password is written with "
            "%2F for /, %3F for ?, %23 for # and %40 for @"
        )


def is_store_error(error: Exception) -> bool:
    """Return True for what a store, or the driver of its files, may raise inside a call of MLflow.

    Drivers have errors of their own kind (those of botocore are no OSErrors) and are imported late; what remains are
    faults of a program (``TypeError`` ...).
    """
    if isinstance(error, TsforgeError):
        return False
    return isinstance(error, OSError | ImportError | ValueError | RuntimeError) or type(error).__module__ != "builtins"


def check_file_store(location: str, experiment: str) -> None:
    """Refuse an experiment whose files go to a place that this environment has no driver for.

    Raises:
        BackendError: a package is missing; the message names it.
    """
    scheme = urlsplit(location).scheme
    missing = [package for module, package in _DRIVERS.get(scheme, ()) if not _is_installed(module)]
    if missing:
        raise BackendError(
            f"experiment '{experiment}' keeps its files at {redact(location)}, and {scheme}:// needs a driver; pip "
            f"install {' '.join(missing)}, choose another experiment (tracking.experiment=NAME), or switch tracking "
            "off (tracking.enabled=false)"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def is_database(uri: str) -> bool:
    """Return True when this process talks to the database itself, not to a tracking server."""
    return urlsplit(uri).scheme.split("+")[0] in {"sqlite", *_PORTS}


def open_client(uri: str) -> Any:
    """Return an ``MlflowClient`` of the store at ``uri``; an absent SQLite file is created with its schema.

    Raises:
        ConfigError: the address is not usable.
        BackendError: the store does not answer within seconds, cannot be written, or has another schema version.
    """
    uri = normalise_uri(uri)
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme == "sqlite":
        path = sqlite_path(uri)
        if not path.exists():
            _create_sqlite(path)
        _check_sqlite(path)
    elif scheme in ("http", "https"):
        _check_http(uri)
    elif scheme in _PORTS:
        _check_database(uri, _PORTS[scheme])
    return _client(uri)


def _client(uri: str) -> Any:
    mlflow = import_mlflow()
    try:
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except mlflow.exceptions.MlflowException as error:
        hint = " (mlflow db upgrade ADDRESS brings an older schema up to date)" if "schema" in str(error) else ""
        raise BackendError(f"the tracking store {redact(uri)} cannot be opened: {brief(error)}{hint}") from error
    except (OSError, DATABASE_ERROR) as error:
        raise BackendError(f"the tracking store {redact(uri)} cannot be opened: {brief(error)}") from error


def brief(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message, without secrets, cut to ``limit`` characters.

    A line that only announces what follows takes the next one along. Files of a registered version that are gone are
    said to be, with what to do, which is never cut.
    """
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    text, advice = lines[0] if lines else type(error).__name__, ""
    if text.endswith(":"):
        told = next((line for line in lines[1:] if not line.startswith("#####")), "")  # MLflow's "##### File X #####"
        download = _DOWNLOAD.match(text)
        if download is None:
            text = f"{text} {told}".rstrip()
        elif _GONE.search(told):
            text = f"files of that version are gone from {download['place']} ({told})"
            advice = f"; {REGISTER_AGAIN}"
        else:
            text = (
                f"files of that version cannot be fetched from {download['place']}: {told or 'MLflow names no reason'}"
            )
    return (text if len(text) <= limit else text[: limit - 1] + "…") + advice


def sqlite_path(uri: str) -> Path:
    """Return the file of a normalised SQLite address."""
    return Path(uri.partition(":///")[2].partition("?")[0])


def _create_sqlite(path: Path) -> None:
    """Create the schema in a temporary file and give it its name at the end.

    A process killed meanwhile, or two starting at once, never leave a half-made store behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            fresh = Path(folder) / "new.db"
            _client(sqlite_url(fresh))
            with sqlite3.connect(fresh) as connection:
                # the default experiment points into whatever folder the process started in; runs never go there
                location = (path.parent / "mlartifacts" / "default").as_uri()
                connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (location,))
            connection.close()
            try:
                os.link(fresh, path)
            except FileExistsError:
                return  # another process was faster, its store is as good
            except OSError:  # a file system without hard links
                os.replace(fresh, path)
    except OSError as error:
        raise BackendError(
            f"cannot create the tracking store {path}: {error.strerror or error}; free space, set TSFORGE_HOME to a "
            "writable folder, or switch tracking off (tracking.enabled=false)"
        ) from error


def _check_sqlite(path: Path) -> None:
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=_CONNECT_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BackendError(
            f"the tracking store {path} cannot be written: {error}; close what holds it, restore it from a backup or "
            "move it away (a new one is created), or switch tracking off (tracking.enabled=false)"
        ) from error


def _check_http(uri: str) -> None:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    address = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=_CONNECT_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:  # it answers; permissions and paths show up with the first real request
            return
        problem = f"it answers {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last: it speaks something else
        problem = " ".join(str(getattr(error, "reason", None) or error).split())
    raise BackendError(
        f"the tracking server {redact(uri)} does not answer: {problem}; start it, correct MLFLOW_TRACKING_URI, or "
        "switch tracking off (tracking.enabled=false)"
    )


def _check_database(uri: str, default_port: int) -> None:
    """Log in once: MLflow would try a server that refuses again and again, for minutes."""
    url = parse_url(uri)
    if url.host:  # else a socket in the file system: the driver itself fails at once
        _check_port(url.host, url.port or default_port)
    try:
        check_login(uri, _CONNECT_SECONDS)
    except BackendError as error:
        raise BackendError(
            f"tracking: {error}; correct MLFLOW_TRACKING_URI, or switch tracking off (tracking.enabled=false)"
        ) from error


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise BackendError(
            f"the tracking database at {host}:{port} does not answer: {error.strerror or error}; start it, "
            "correct MLFLOW_TRACKING_URI, or switch tracking off (tracking.enabled=false)"
        ) from error
