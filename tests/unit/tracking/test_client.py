from __future__ import annotations

import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsforge.core.errors import BackendError, ConfigError
from tsforge.tracking.client import brief, normalise_uri, open_client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("uri", ["/tmp/mlruns", "file:///tmp/mlruns", "mlruns"])
def test_a_folder_is_refused_with_the_way_out(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:////absolute/path/mlflow\.db"):
        normalise_uri(uri)


def test_a_relative_sqlite_file_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise_uri("sqlite:///runs.db?timeout=3") == f"sqlite:///{tmp_path}/runs.db?timeout=3"
    assert normalise_uri("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize("escaped", ["a%3Fb", "a%2541"])
def test_a_sqlite_file_that_would_lie_elsewhere_is_refused(escaped: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot hold a database"):
        open_client(f"sqlite:///{tmp_path}/{escaped}/m.db")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:{port}", "postgresql://ann:s3cr3t@127.0.0.1:{port}/x"])
def test_a_dead_server_is_reported_in_seconds_without_its_password(scheme: str) -> None:
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"does not answer.*tracking\.enabled=false") as caught:
        open_client(scheme.format(port=free_port()))
    assert time.monotonic() - start < 5
    assert "s3cr3t" not in str(caught.value)


@pytest.fixture
def other_service() -> Iterator[int]:
    """Port of a service that greets as SSH does and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def greet() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if ended.is_set():
                        return
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        yield int(server.getsockname()[1])
        ended.set()
        socket.create_connection(server.getsockname()).close()
        thread.join()


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:{port}", "postgresql+psycopg://ann:s3cr3t@127.0.0.1:{port}/x"])
def test_a_service_that_speaks_something_else_is_reported_in_seconds(scheme: str, other_service: int) -> None:
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"does not answer.*tracking\.enabled=false") as caught:
        open_client(scheme.format(port=other_service))
    assert time.monotonic() - start < 10
    assert "s3cr3t" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_database_that_says_nothing_is_reported_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsforge.tracking.client._CONNECT_SECONDS", 2.0)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BackendError, match="timeout"):
        open_client(f"postgresql+psycopg://ann:s3cr3t@127.0.0.1:{server.getsockname()[1]}/x")
    assert time.monotonic() - start < 10


def test_a_database_that_refuses_the_login_is_reported_in_seconds(postgres_server: str) -> None:
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"role .stranger. does not exist.*tracking\.enabled=false") as caught:
        open_client(postgres_server.replace("//postgres:@", "//stranger:s3cr3t@"))
    assert time.monotonic() - start < 10
    assert "s3cr3t" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:abc",
        "http://[::1",
        "http://ann:Sec/ret99@host:1",
        "http://ann:99/Secret@host:1",
        "postgresql://ann:s3cr3t@127.0.0.1:xx/db",
        "postgresql://ann:pa/ssw0rdX@127.0.0.1:1/db",
        "postgresql://ann:12?ssw0rdX@127.0.0.1:1/db",
    ],
)
def test_a_malformed_address_is_one_line_without_its_password(uri: str) -> None:
    with pytest.raises(ConfigError, match="malformed; correct MLFLOW_TRACKING_URI") as caught:
        open_client(uri)
    for part in ("Sec", "ret99", "s3cr3t", "pa/", "ssw0rdX", "\n"):
        assert part not in str(caught.value)


def test_a_database_without_its_driver_says_what_to_install(other_service: int) -> None:
    with pytest.raises(ConfigError, match=r"no driver for postgresql\+absent.*install it") as caught:
        open_client(f"postgresql+absent://ann:s3cr3t@127.0.0.1:{other_service}/x")
    assert "s3cr3t" not in str(caught.value)


@pytest.fixture
def broken_server() -> Iterator[str]:
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_answers_with_an_error_is_reported(broken_server: str) -> None:
    with pytest.raises(BackendError, match="503"):
        open_client(broken_server)


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("not a database, only some text that is long enough\n" * 20, encoding="utf-8")
    with pytest.raises(BackendError, match="not a database"):
        open_client(f"sqlite:///{tmp_path}/m.db")


def test_a_locked_database_is_reported_in_seconds(
    mlflow_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsforge.tracking.client._CONNECT_SECONDS", 0.2)
    copy = tmp_path / "m.db"
    copy.write_bytes(mlflow_template.read_bytes())
    holder = sqlite3.connect(copy)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BackendError, match="locked"):
        open_client(f"sqlite:///{copy}")
    holder.close()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BackendError, match="cannot create the tracking store"):
        open_client(f"sqlite:///{tmp_path}/file/m.db")


def test_two_processes_may_create_the_store_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from tsforge.tracking.client import open_client\n"
        "print(open_client(sys.argv[1]).create_experiment(sys.argv[2]))"
    )
    uri = f"sqlite:///{tmp_path}/deep/m.db"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(int(out) for out, _ in outputs) == [1, 2]
    assert [err for _, err in outputs] == [b"", b""], "MLflow chatter reached standard error"
    assert os.listdir(tmp_path / "deep") == ["m.db"]


def test_files_of_the_default_experiment_stay_beside_the_store(mlflow_template: Path) -> None:
    with sqlite3.connect(mlflow_template) as connection:
        (location,) = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
    connection.close()
    assert location == (mlflow_template.parent / "mlartifacts" / "default").as_uri()


DOWNLOAD = "The following failures occurred while downloading one or more artifacts from file:///srv/m-1:\n"


def test_files_of_a_version_that_are_gone_are_said_to_be_with_what_to_do() -> None:
    told = brief(RuntimeError(DOWNLOAD + "##### File artifacts #####\nNo such artifact: 'artifacts'"))
    assert told.startswith("files of that version are gone from file:///srv/m-1 (No such artifact: 'artifacts'); put ")
    assert "back from a backup" in told
    assert "tsforge fit with tracking.register_as" in told
    long = brief(RuntimeError(DOWNLOAD + f"##### File a #####\nNo such file: {'x' * 400}"))
    assert "…; put that folder back" in long, "what to do is never cut"


def test_an_error_keeps_the_cause_that_its_first_line_announces() -> None:
    denied = brief(RuntimeError(DOWNLOAD + "##### File a/b #####\n[Errno 13] Permission denied: '/srv/m-1'"))
    assert (
        denied
        == "files of that version cannot be fetched from file:///srv/m-1: [Errno 13] Permission denied: '/srv/m-1'"
    )
    assert brief(RuntimeError("it failed for:\n\n  a reason\nmore")) == "it failed for: a reason"
    assert brief(RuntimeError("it failed\nfor a reason")) == "it failed"
    assert brief(RuntimeError("it failed:")) == "it failed:"
    assert brief(RuntimeError("")) == "RuntimeError"
    assert brief(RuntimeError("get:\npostgresql://ann:s3cr3t@host/x")) == "get: postgresql://ann:***@host/x"
