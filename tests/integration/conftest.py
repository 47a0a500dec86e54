"""A small fitted workspace that batch tests copy: two series of two variates, 70 days of hours, a closed-form model."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 70


def weather_like(seed: int = 7, days: int = DAYS) -> pl.DataFrame:
    """Daily and weekly waves plus noise in a wide table ``ds, a.x, a.y, b.x, b.y``; a.x jumps for 5 hours on day 61."""
    rows = days * 24
    hours = np.arange(rows)
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {"ds": [FIRST + timedelta(hours=int(hour)) for hour in hours]}
    for place, name in enumerate(("a.x", "a.y", "b.x", "b.y")):
        wave = np.sin(2 * np.pi * (hours + 3 * place) / 24) + 0.5 * np.sin(2 * np.pi * hours / 168 + place)
        columns[name] = 10 * (place + 1) + 3 * wave + 0.3 * generator.standard_normal(rows)
    columns["a.x"][61 * 24 + 5 : 61 * 24 + 10] += 15.0
    table = pl.DataFrame(columns)
    return table.with_columns(pl.when(pl.int_range(pl.len()) % 97 != 5).then(pl.col("b.y")).alias("b.y"))


@dataclass(frozen=True)
class Site:
    """A workspace folder, its source file, and the id of the fitted model."""

    home: Path
    source: Path
    artifact: str

    def data(self) -> dict[str, Any]:
        """Settings of the data set, as in YAML."""
        source = {"kind": "parquet", "path": str(self.source)}
        return {"name": "plant", "source": source, "separator": ".", "freq": "1h", "valid_range": {"y": [0, 100]}}

    def batch(self, **changes: Any) -> dict[str, Any]:
        """Settings of a batch, as in YAML."""
        return {"name": "daily", "data": self.data(), "model": self.artifact, "detect": {"span": "3d"}} | changes


@pytest.fixture
def workspace_root(workspace_root: Path, mlflow_template: Path) -> Path:
    """A fresh workspace folder whose tracking store exists already: making it takes seconds."""
    workspace_root.mkdir()
    shutil.copy(mlflow_template, workspace_root / "mlflow.db")
    return workspace_root


@pytest.fixture(scope="session")
def fitted_site(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Site:
    """The original; tests take a copy (``site``)."""
    from tsforge.app.fit import FitConfig, fit
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate
    from tsforge.core.workspace import Workspace

    folder = tmp_path_factory.mktemp("site")
    source = folder / "plant.parquet"
    weather_like().write_parquet(source)
    root = folder / "home"
    root.mkdir()
    shutil.copy(mlflow_template, root / "mlflow.db")
    workspace = Workspace(
        root=root, database_url=f"sqlite:///{root / 'store.db'}", tracking_uri=f"sqlite:///{root / 'mlflow.db'}"
    )
    site = Site(home=root, source=source, artifact="")
    settings = {
        "data": site.data(),
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 12},
        "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
        "tracking": {"enabled": False},
    }
    config = validate(FitConfig, settings)
    ingest(validate(IngestConfig, {"data": site.data()}), workspace)
    return Site(home=root, source=source, artifact=fit(config, workspace).artifact.id)


@pytest.fixture
def site(fitted_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A private copy of the fitted workspace, set as TSFORGE_HOME."""
    shutil.copytree(fitted_site.home, tmp_path / "home")
    shutil.copy(fitted_site.source, tmp_path / "plant.parquet")
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "home"))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Site(home=tmp_path / "home", source=tmp_path / "plant.parquet", artifact=fitted_site.artifact)


@pytest.fixture(scope="session")
def kill_ingest() -> ModuleType:
    """The benchmark that kills ingestions; tests do the same with fewer kills."""
    place = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_ingest.py"
    spec = importlib.util.spec_from_file_location("kill_ingest", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``tsforge`` in the workspace at hand; returns status, output and errors, of which none is a traceback."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from tsforge.cli import main

        monkeypatch.setattr(sys, "argv", ["tsforge", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err, captured.err
        return code, captured.out, captured.err

    return run
