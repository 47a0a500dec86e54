"""A workspace with something on every page, built once a session by the use-cases themselves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace

ROWS = 1000
HIDDEN = ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI", "TSFORGE_HOME")
_LATEST = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
LAST_ROW = _LATEST.strftime("%Y-%m-%dT%H:%MZ")


@contextmanager
def _own_services(root: Path) -> Iterator[Workspace]:
    """Open a workspace that no shared service of this machine reaches into."""
    kept = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        yield Workspace.open(root)
    finally:
        os.environ.update(kept)


def plant() -> dict[str, Any]:
    """Settings of two generated series with labelled anomalies in the last third, ending an hour ago."""
    generator = {
        "num_series": 2,
        "num_rows": ROWS,
        "anomalies": ["spike", "level_shift", "frozen_sensor"],
        "num_anomalies": 4,
        "anomaly_start": 0.68,
        "start": (_LATEST - timedelta(hours=ROWS - 1)).strftime("%Y-%m-%d %H:%M"),
        "seed": 3,
    }
    return {"name": "plant", "source": {"kind": "synthetic", "generator": generator}, "max_age": "2d"}


def fit_settings(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a fit that has seen two thirds of the rows."""
    return {
        "data": plant(),
        "model": model,
        "window": {"context_length": 72, "horizon": 24},
        "split": {"kind": "fractions", "train": 0.4, "valid": 0.25, "test": 0.35},
    } | changes


def fill(workspace: Workspace) -> None:
    """Ingest, fit (with curves, with kernels, without), fail once, backtest, detect, publish, reconstruct."""
    from tsforge.app.backtest import BacktestJobConfig, backtest
    from tsforge.app.batch import BatchConfig, run_batch
    from tsforge.app.detect import DetectJobConfig, detect
    from tsforge.app.fit import FitConfig, fit
    from tsforge.app.ingest import IngestConfig, ingest
    from tsforge.core.config import validate

    weather = {"name": "nyc_weather", "source": {"kind": "embedded", "dataset": "nyc_weather"}, "separator": "."}
    weather |= {"layout": "wide", "time": "ds", "freq": "1h", "targets": ["temp", "humid", "wind_speed"]}
    for data in (plant(), weather):
        ingest(validate(IngestConfig, {"data": data}), workspace)
    with suppress(DataError):  # a source that is gone: a refused ingestion
        gone = plant() | {"source": {"kind": "parquet", "path": str(workspace.root / "gone.parquet")}}
        ingest(validate(IngestConfig, {"data": gone}), workspace)
    from tsforge.app.reconstruct import ReconstructConfig, reconstruct

    system = {"system": "lorenz63", "steps": 1000}
    quick = {"epochs": 3, "batches_per_epoch": 5, "batch_size": 4, "sequence_length": 20, "accelerator": "cpu"}
    looks = {"lyapunov_steps": 200, "lyapunov_transient": 20, "findings": False, "sigma": 5.0}  # few rows
    settings = {"data": {"system": system}, "dt": 0.01, "model": {"hidden": 8}, "train": quick, "evaluation": looks}
    reconstruct(validate(ReconstructConfig, settings | {"seeds": [0, 1], "tracking": {"enabled": False}}), workspace)
    short = {"max_epochs": 3, "max_steps_per_epoch": 12, "patience": None}
    layers = {"name": "s4", "d_model": 8, "d_state": 8, "num_layers": 2, "patch_length": 1, "ridge": 100.0}
    once = {"max_epochs": 1, "max_steps_per_epoch": 4, "start_margin": 0}
    fit(validate(FitConfig, fit_settings(layers, train=once)), workspace)
    coupled = {"name": "chimera", "d_model": 8, "d_state": 4, "skip": "learned"}  # no closed-form start to fall back to
    fit(validate(FitConfig, fit_settings(coupled, train=once)), workspace)
    evolving = {"name": "regenn", "ff_dim": 8, "network_gate": 0.5}
    for seed in range(3):  # as many as the page asks for
        fit(validate(FitConfig, fit_settings(evolving, train=once | {"seed": seed})), workspace)
    fit(validate(FitConfig, fit_settings({"name": "dlinear"}, train=short)), workspace)
    with suppress(DataError):  # a context longer than the data: a run that failed
        fit(validate(FitConfig, fit_settings({"name": "linear"}, window={"context_length": 5000})), workspace)
    made = fit(validate(FitConfig, fit_settings({"name": "ar_net", "lags": 24})), workspace)
    graded = {"backtest": {"num_cutoffs": 4}, "compare": ["linear"]}
    settings = fit_settings({"name": "ar_net", "lags": 24}, **graded)
    del settings["split"]
    backtest(validate(BacktestJobConfig, settings), workspace)
    detect(validate(DetectJobConfig, {"artifact": made.artifact.id}), workspace)
    job = {"name": "nightly", "data": plant(), "model": made.artifact.id, "ingest": False, "detect": {"span": "8d"}}
    for days in (2, 1):
        run_batch(validate(BatchConfig, job), _LATEST - timedelta(days=days), workspace)


@pytest.fixture(scope="session")
def filled_workspace(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """Root of the filled workspace; tests only read it."""
    root = tmp_path_factory.mktemp("filled") / "home"
    root.mkdir()
    shutil.copy(mlflow_template, root / "mlflow.db")
    with _own_services(root) as workspace:
        fill(workspace)
    return root


@pytest.fixture(scope="session")
def detected_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a workspace whose detection found several events, some of them at once; tests copy it."""
    from tsforge.app.detect import DetectJobConfig, detect
    from tsforge.app.fit import FitConfig, fit_frame
    from tsforge.app.ingest import IngestConfig, ingest, load_dataset
    from tsforge.artifact import save_artifact
    from tsforge.core.config import validate

    with _own_services(tmp_path_factory.mktemp("detected") / "home") as workspace:
        ingest(validate(IngestConfig, {"data": plant()}), workspace)
        config = validate(FitConfig, fit_settings({"name": "linear"}))
        frame = load_dataset(workspace, config.data, masked=True)
        artifact = save_artifact(fit_frame(frame, config)[0], workspace.artifacts)
        settings = {"rule": {"alarms_per_day": 0.5}, "events": {"group_by": "all", "group_gap": 6, "patience": 3}}
        detect(validate(DetectJobConfig, {"artifact": artifact.id, "detector": settings}), workspace)
    return workspace.root
