"""Where a tsforge installation keeps its things: one folder, overridable addresses for the shared services."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tsforge.core.errors import BackendError, ConfigError


def sqlite_url(path: Path) -> str:
    """Return the SQLAlchemy URL of a SQLite file.

    Raises:
        ConfigError: the path holds ``?`` or ``%``. In the text of a URL, which Optuna, MLflow and child processes are
            given, they begin options and escapes, and the file would lie elsewhere.
    """
    found = next((mark for mark in "?%" if mark in str(path)), None)
    if found is not None:
        raise ConfigError(f"{path} cannot hold a database: its path has a '{found}'; choose a folder without ? and %")
    return f"sqlite:///{path}"


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Paths and addresses of one installation; secrets arrive by environment, never by config file.

    Attributes:
        root: the folder that holds everything below (``TSFORGE_HOME``, default ``.tsforge``).
        database_url: SQLAlchemy URL of the series store and the run ledger (``TSFORGE_DATABASE_URL``).
        tracking_uri: MLflow tracking address (``MLFLOW_TRACKING_URI``).
    """

    root: Path
    database_url: str
    tracking_uri: str

    @classmethod
    def open(cls, root: str | Path | None = None) -> Workspace:
        """Return the workspace at ``root``, else at ``TSFORGE_HOME``, else ``./.tsforge``; the folder is created.

        Raises:
            BackendError: the folder cannot be created or written.
            ConfigError: its path holds ``?`` or ``%``.
        """
        path = Path(root or os.environ.get("TSFORGE_HOME") or ".tsforge").expanduser().resolve()
        store, runs = sqlite_url(path / "store.db"), sqlite_url(path / "mlflow.db")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"cannot create the workspace {path}: {error.strerror}; set TSFORGE_HOME to a writable folder"
            ) from error
        if not os.access(path, os.W_OK):
            raise BackendError(f"the workspace {path} is read-only; set TSFORGE_HOME to a writable folder")
        return cls(
            root=path,
            database_url=os.environ.get("TSFORGE_DATABASE_URL") or store,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or runs,
        )

    @property
    def artifacts(self) -> Path:
        """Fitted models, one folder each."""
        return self.root / "artifacts"

    @property
    def published(self) -> Path:
        """Output of scheduled batches: ``published/JOB/as_of=.../``."""
        return self.root / "published"

    @property
    def reports(self) -> Path:
        """Backtests, benchmarks, detection and data reports, one folder each."""
        return self.root / "reports"

    @property
    def tuning(self) -> Path:
        """Study journals and the best configs they found."""
        return self.root / "tuning"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifact root of the embedded tracking store."""
        return self.root / "mlartifacts"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of unfinished trainings, kept until the run ends well."""
        return self.root / "checkpoints"
