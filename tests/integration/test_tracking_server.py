"""Tracking through a real server over HTTP: runs, registry, and fetching a model in another workspace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tsforge.artifact import create_artifact, load_artifact, save_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.predict import predict
from tsforge.models.registry import resolve_model_config
from tsforge.network import NetworkConfig, build_network
from tsforge.tracking.client import open_client
from tsforge.tracking.registry import promote, register, resolve
from tsforge.tracking.runs import Tracker

pytestmark = pytest.mark.slow


@pytest.fixture
def server(mlflow_template: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    store = tmp_path / "server"
    store.mkdir()
    shutil.copy(mlflow_template, store / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = tmp_path / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=store, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 200
        while True:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        yield address, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def test_runs_and_models_live_on_a_server_and_its_end_does_not_end_the_work(
    server: tuple[str, subprocess.Popen[bytes]],
    workspace_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, process = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    workspace = replace(Workspace.open(workspace_root), tracking_uri=address)
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"series_id": "a", "time": np.arange(200), "load": rng.normal(0, 1, 200).cumsum()})
    frame = SeriesFrame.from_long(table, series_id="series_id", time="time", targets=("load",))
    panel = Panel.from_frame(frame)
    window = WindowSpec(context_length=24, horizon=6)
    network = build_network(
        NetworkConfig(model=resolve_model_config({"name": "last_value"})),
        DataSpec(context_length=24, horizon=6, num_variates=1),
        seed=0,
    )
    network.fit_scaler(panel.training_series(None, 200))
    artifact = save_artifact(
        create_artifact(
            network,
            config={},
            schema=frame.schema,
            grid=panel.grid,
            series_ids=panel.series_ids,
            window=window,
            provenance={},
        ),
        workspace.artifacts,
    )
    with Tracker.open(workspace).start("fit", config={"lags": 3}) as run:
        run.log_epoch(0, {"loss": 1.0})
        run.log_artifact(artifact)
        register(artifact, "weather", "challenger", workspace, run=run)
    stored = open_client(address).get_run(run.id)
    assert (stored.info.status, stored.data.params["lags"]) == ("FINISHED", "3")
    assert promote("weather", "challenger", workspace)["version"] == "1"

    elsewhere = replace(Workspace.open(tmp_path / "other"), tracking_uri=address)
    fetched = resolve("weather@champion", elsewhere)
    assert fetched.is_relative_to(elsewhere.root)
    assert predict(load_artifact(fetched), frame).table.equals(predict(artifact, frame).table)

    with Tracker.open(workspace).start("outlives") as run:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        start = time.monotonic()
        for epoch in range(50):
            run.log_epoch(epoch, {"loss": float(epoch)})
            run.flush()
        assert time.monotonic() - start < 60, "a dead server is asked once in a while, not every epoch"
    assert sum("did not take" in record.getMessage() for record in caplog.records) == 2  # the loss, then the curves
    with pytest.raises(BackendError, match="does not answer"), Tracker.open(workspace).start("too late"):
        pass
