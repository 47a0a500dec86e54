"""The registry with real artifacts: what is loaded forecasts exactly what was registered."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from tsforge.artifact import MANIFEST, Artifact, create_artifact, save_artifact, verify_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.errors import ArtifactError, BackendError, ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import CalendarConfig, add_calendar
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.conformal_calibration import calibrate
from tsforge.forecasting.predict import predict
from tsforge.models.registry import resolve_model_config
from tsforge.network import NetworkConfig, build_network
from tsforge.tracking.client import open_client
from tsforge.tracking.pyfunc import naive_times
from tsforge.tracking.registry import champion, history, promote, register, resolve, versions
from tsforge.tracking.runs import Tracker
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

SPEC = WindowSpec(context_length=48, horizon=12)
CALENDAR = CalendarConfig(features=("hour",), timezone="Europe/Berlin")


def make_frame(seed: int = 0, rows: int = 600) -> SeriesFrame:
    """Two series of two variates, hourly, with gaps."""
    rng = np.random.default_rng(seed)
    steps = np.arange(rows)
    tables = []
    for name, phase in (("a", 0.0), ("b", 1.0)):
        daily = np.sin(2 * np.pi * steps / 24 + phase)
        load, temp = 10 + 3 * daily + rng.normal(0, 0.2, rows), 20 - daily + rng.normal(0, 0.2, rows)
        load[100:105] = np.nan
        times = [datetime(2026, 3, 1, tzinfo=UTC) + timedelta(hours=int(step)) for step in steps]
        tables.append(pl.DataFrame({"series_id": name, "time": times, "load": load, "temp": temp}).fill_nan(None))
    return SeriesFrame.from_long(pl.concat(tables), series_id="series_id", time="time", targets=("load", "temp"))


def fitted(
    frame: SeriesFrame, *, ridge: float = 1.0, model: str = "linear", data: dict[str, Any] | None = None
) -> Artifact:
    panel = Panel.from_frame(frame)
    schema = frame.schema
    spec = DataSpec(
        context_length=SPEC.context_length,
        horizon=SPEC.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        train_length=400,
    )
    settings = {"name": model, "ridge": ridge} if model == "linear" else {"name": model}
    network = build_network(NetworkConfig(model=resolve_model_config(settings)), spec, seed=1)
    config = TrainConfig(max_epochs=1, accelerator="cpu")
    fit_network(
        network,
        WindowDataset(panel, SPEC, 0, 400),
        None,
        config,
        series=panel.training_series(None, 400),
        progress=False,
    )
    return create_artifact(
        network,
        config={"data": {"name": "made", **(data or {})}},
        schema=schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=SPEC,
        provenance={},
        calibration=calibrate(network, WindowDataset(panel, SPEC, 400, 600), (0.1, 0.5, 0.9)),
    )


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    return make_frame()


@pytest.fixture(scope="module")
def fits(frame: SeriesFrame) -> tuple[Artifact, Artifact]:
    return fitted(frame), fitted(frame, ridge=100.0)


@pytest.fixture
def saved(fits: tuple[Artifact, Artifact], tracked_workspace: Workspace) -> tuple[Artifact, Artifact]:
    first, second = (save_artifact(artifact, tracked_workspace.artifacts) for artifact in fits)
    return first, second


def table_in(frame: SeriesFrame) -> pd.DataFrame:
    return naive_times(frame.table).to_pandas()


def loaded(reference: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workspace.tracking_uri)
    mlflow.set_tracking_uri(workspace.tracking_uri)
    try:
        return mlflow.pyfunc.load_model(reference)
    finally:
        mlflow.set_tracking_uri(None)


def test_the_registered_model_forecasts_bitwise_what_predict_does(
    saved: tuple[Artifact, Artifact], frame: SeriesFrame, tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker.open(tracked_workspace).start("fit") as run:
        run.log_artifact(saved[0])
        assert register(saved[0], "weather", "champion", tracked_workspace, run=run) == "1"
    model = loaded("models:/weather@champion", tracked_workspace, monkeypatch)
    expected = naive_times(predict(saved[0], frame).table)
    got = pl.from_pandas(model.predict(table_in(frame)))
    assert got.height == 2 * 12 * 2
    assert {"q0.1", "q0.5", "q0.9"} <= set(got.columns)
    assert got.equals(expected.with_columns(pl.col("cutoff", "time").cast(got["time"].dtype)))
    short = pl.from_pandas(model.predict(table_in(frame), params={"horizon": 5, "quantile_levels": [0.5]}))
    expected = naive_times(predict(saved[0], frame, horizon=5, quantile_levels=(0.5,)).table)
    assert short.equals(expected.with_columns(pl.col("cutoff", "time").cast(short["time"].dtype)))
    stored = open_client(tracked_workspace.tracking_uri).get_run(run.id)
    assert stored.data.tags["tsforge.artifact_id"] == saved[0].id
    assert [item.model_id for item in stored.outputs.model_outputs] == [model.metadata.model_id]


def test_the_bundle_holds_no_pickle_and_names_what_it_needs(
    saved: tuple[Artifact, Artifact], tracked_workspace: Workspace
) -> None:
    register(saved[0], "weather", None, tracked_workspace)
    files = [path for path in tracked_workspace.mlflow_artifacts.rglob("*") if path.is_file()]
    assert any(path.name == "MLmodel" for path in files)
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    (needed,) = [path for path in files if path.name == "requirements.txt"]
    lines = needed.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("tsforge==") for line in lines)
    assert any(line.startswith("torch==") and "+" not in line for line in lines)


def test_wrong_tables_are_refused_with_the_reason(
    saved: tuple[Artifact, Artifact], frame: SeriesFrame, tracked_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    register(saved[0], "weather", "champion", tracked_workspace)
    model = loaded("models:/weather@champion", tracked_workspace, monkeypatch)
    table = table_in(frame)
    for wrong, message in (
        (table.drop(columns="temp"), "temp"),
        (table.head(0), "no rows"),
        (table.head(10), "48|context"),
        (pd.concat([table, table.head(1)]), "duplicate"),
    ):
        with pytest.raises(MlflowException, match=message):
            model.predict(wrong)
    with pytest.raises(MlflowException, match="trained for 12 steps, asked for 99"):
        model.predict(table, params={"horizon": 99})


def test_calendar_features_and_limits_need_not_be_in_the_table(tmp_path: Path, frame: SeriesFrame) -> None:
    from tsforge.tracking.pyfunc import _load_pyfunc, source_columns

    masked, counts = frame.mask_outside({"load": (None, 15.0)})
    assert counts == {"load": 0}
    data = {"calendar": CALENDAR.model_dump(mode="json"), "valid_range": {"load": [None, 15.0]}}
    artifact = save_artifact(fitted(add_calendar(masked, CALENDAR), model="ar_net", data=data), tmp_path)
    assert source_columns(artifact) == {"targets": ("load", "temp"), "past": (), "known": (), "static": ()}
    model = _load_pyfunc(str(artifact.path))
    expected = naive_times(predict(artifact, add_calendar(frame.extend(12), CALENDAR)).table)
    assert pl.from_pandas(model.predict(table_in(frame))).equals(
        expected.with_columns(pl.col("cutoff", "time").cast(pl.Datetime("us")))
    )
    broken = table_in(frame)
    broken.loc[broken.index[-20], "load"] = 1048.0  # a sensor error, outside the physical limits
    hidden = table_in(frame)
    hidden.loc[hidden.index[-20], "load"] = np.nan
    assert pl.from_pandas(model.predict(broken)).equals(pl.from_pandas(model.predict(hidden)))


def test_promotion_moves_aliases_keeps_history_and_can_be_taken_back(
    saved: tuple[Artifact, Artifact], tracked_workspace: Workspace
) -> None:
    first, second = saved
    assert register(first, "weather", "champion", tracked_workspace) == "1"
    assert register(second, "weather", "challenger", tracked_workspace) == "2"
    assert champion("weather", tracked_workspace) == first.path
    facts = promote("weather", "challenger", tracked_workspace)
    assert (facts["version"], facts["replaces"], facts["is_changed"]) == ("2", "1", True)
    assert {item.version: item.aliases for item in versions("weather", tracked_workspace)} == {
        "2": ("champion",),
        "1": ("previous",),
    }
    assert champion("weather", tracked_workspace) == second.path
    assert promote("weather", second.id, tracked_workspace)["is_changed"] is False
    assert promote("weather", "previous", tracked_workspace)["version"] == "1"
    promote("weather", "2", tracked_workspace, alias="challenger")
    changes = [(item["alias"], item["from"], item["to"]) for item in history("weather", tracked_workspace)]
    assert changes == [("champion", "1", "2"), ("champion", "2", "1"), ("challenger", None, "2")]
    assert [item.artifact_id for item in versions("weather", tracked_workspace)] == [second.id, first.id]


def test_a_reference_is_a_folder_an_id_a_name_or_a_version(
    saved: tuple[Artifact, Artifact], tracked_workspace: Workspace
) -> None:
    first, second = saved
    register(first, "weather", "champion", tracked_workspace)
    register(second, "weather", "challenger", tracked_workspace)
    wanted = {
        str(first.path): first,
        first.id: first,
        "weather": first,
        "weather@challenger": second,
        "weather/1": first,
        "models:/weather@champion": first,
        "models:/weather/2": second,
    }
    assert {reference: resolve(reference, tracked_workspace) for reference in wanted} == {
        reference: artifact.path for reference, artifact in wanted.items()
    }


def test_an_artifact_that_is_not_here_is_fetched_once_and_whole(
    saved: tuple[Artifact, Artifact], frame: SeriesFrame, tracked_workspace: Workspace
) -> None:
    from tsforge.artifact import load_artifact

    artifact = saved[0]
    assert artifact.path is not None
    register(artifact, "weather", "champion", tracked_workspace)
    shutil.rmtree(artifact.path)
    fetched = resolve("weather@champion", tracked_workspace)
    assert fetched.is_relative_to(tracked_workspace.root / "cache")
    assert predict(load_artifact(fetched), frame).table.equals(predict(artifact, frame).table)
    shutil.rmtree(tracked_workspace.mlflow_artifacts)
    assert resolve("weather@champion", tracked_workspace) == fetched, "the cache answers"
    shutil.rmtree(fetched)
    with pytest.raises(
        BackendError, match=r"model registry .*files of that version are gone from .*backup.*register_as"
    ):
        resolve("weather@champion", tracked_workspace)
    assert not fetched.exists()


@pytest.fixture
def stored(saved: tuple[Artifact, Artifact], tracked_workspace: Workspace) -> Path:
    """The folder of a champion's artifact in the store; the workspace has none of its own."""
    artifact = saved[0]
    assert artifact.path is not None
    register(artifact, "weather", "champion", tracked_workspace)
    shutil.rmtree(artifact.path)
    (manifest,) = tracked_workspace.mlflow_artifacts.rglob(MANIFEST)
    return manifest.parent


@pytest.mark.parametrize("damage", ["missing", "truncated", "other bytes", "no list"])
def test_a_version_that_is_damaged_in_the_store_is_not_kept(
    stored: Path, tracked_workspace: Workspace, damage: str
) -> None:
    place = stored / (MANIFEST if damage == "no list" else "weights.safetensors")
    whole = place.read_bytes()
    if damage == "missing":
        place.unlink()
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        place.write_bytes({"truncated": whole[:50], "other bytes": flipped, "no list": b"{"}[damage])
    with pytest.raises(ArtifactError, match=rf"version 1 of model 'weather' cannot be used .*{place.name}") as caught:
        resolve("weather@champion", tracked_workspace)
    assert str(stored.parent) in str(caught.value), "the place in the store is named, not that of the download"
    assert "\n" not in str(caught.value)
    assert not list((tracked_workspace.root / "cache").rglob("*.safetensors"))
    place.write_bytes(whole)
    assert verify_artifact(resolve("weather@champion", tracked_workspace)) == stored.name


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_a_cached_copy_that_rots_is_fetched_again(stored: Path, tracked_workspace: Workspace, damage: str) -> None:
    cached = resolve("weather@champion", tracked_workspace)
    place = cached / (MANIFEST if damage == "no manifest" else "weights.safetensors")
    if damage == "truncated":
        place.write_bytes(b"x")
    else:
        place.unlink()
    assert resolve("weather@champion", tracked_workspace) == cached
    assert verify_artifact(cached) == stored.name
    assert [item.name for item in cached.parent.iterdir()] == [cached.name], "nothing is left beside it"


def test_a_rotten_copy_stays_while_the_store_has_no_better(stored: Path, tracked_workspace: Workspace) -> None:
    cached = resolve("weather@champion", tracked_workspace)
    (cached / "weights.safetensors").write_bytes(b"x")
    whole = (stored / "weights.safetensors").read_bytes()
    (stored / "weights.safetensors").write_bytes(b"y")
    with pytest.raises(ArtifactError, match="as the store holds it"):
        resolve("weather@champion", tracked_workspace)
    (stored / "weights.safetensors").write_bytes(whole)
    assert verify_artifact(resolve("weather@champion", tracked_workspace)) == stored.name


@pytest.mark.parametrize("level", ["artifact", "data", "model"])
def test_folders_of_the_store_that_were_emptied_are_gone(
    stored: Path, tracked_workspace: Workspace, level: str
) -> None:
    emptied = {"artifact": stored, "data": stored.parent, "model": stored.parent.parent}[level]
    shutil.rmtree(emptied)
    emptied.mkdir()
    with pytest.raises(
        (ArtifactError, BackendError), match=r"files of .*version.* are gone from .*backup.*register_as"
    ):
        resolve("weather@champion", tracked_workspace)
    assert not (tracked_workspace.root / "cache").exists()


def test_another_artifact_in_the_place_of_a_version_is_not_taken_for_it(
    stored: Path, saved: tuple[Artifact, Artifact], tracked_workspace: Workspace
) -> None:
    first, second = saved
    assert first.path is not None
    assert second.path is not None
    shutil.copytree(second.path, first.path)  # a folder of that name, with the content of another
    assert verify_artifact(resolve("weather@champion", tracked_workspace)) == first.id
    shutil.rmtree(tracked_workspace.root / "cache")
    shutil.rmtree(stored)
    shutil.copytree(second.path, stored)
    with pytest.raises(ArtifactError, match=rf"is artifact {first.id}, but .* holds {second.id}"):
        resolve("weather@champion", tracked_workspace)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("weathr", "did you mean 'weather'"),
        ("weather@chalenger", "no version, alias or artifact 'chalenger'"),
        ("weather/9", r"versions: 1 @champion"),
        ("a b@c", "is no artifact"),
        ("weather@", "is no artifact"),
        ("linear-20260101T000000Z-00000000", "neither a folder nor an artifact id"),
        ("latest", "'latest' is not taken here, it changes with every fit"),
    ],
)
def test_a_wrong_reference_says_what_there_is(
    saved: tuple[Artifact, Artifact], tracked_workspace: Workspace, reference: str, message: str
) -> None:
    register(saved[0], "weather", "champion", tracked_workspace)
    with pytest.raises(ArtifactError, match=message):
        resolve(reference, tracked_workspace)


def test_unusable_names_aliases_and_unsaved_artifacts_are_refused(
    fits: tuple[Artifact, Artifact], saved: tuple[Artifact, Artifact], tracked_workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        register(saved[0], "a/b", None, tracked_workspace)
    with pytest.raises(ArtifactError, match="no folder yet"):
        register(fits[0], "weather", None, tracked_workspace)
    register(saved[0], "weather", None, tracked_workspace)
    with pytest.raises(ConfigError, match="alias 'best'"):
        promote("weather", "1", tracked_workspace, alias="best")
    with pytest.raises(ArtifactError, match="no version"):
        promote("weather", "challenger", tracked_workspace)
    with pytest.raises(ArtifactError, match="holds no artifact"):
        resolve(str(tmp_path), tracked_workspace)


@contextmanager
def served(reference: str, workspace: Workspace) -> Iterator[str]:
    """Run ``mlflow models serve`` in a child process until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": workspace.tracking_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", reference, "--env-manager", "local"]
    log = workspace.root / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "-p", str(port)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while True:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_the_model_is_served_from_a_table_to_a_table(
    saved: tuple[Artifact, Artifact], frame: SeriesFrame, tracked_workspace: Workspace
) -> None:
    register(saved[0], "weather", "champion", tracked_workspace)
    table = table_in(frame)
    table["time"] = table["time"].dt.strftime("%Y-%m-%dT%H:%M:%S")
    split = {
        "columns": list(table.columns),
        "data": table.astype(object).where(table.notna(), None).to_numpy().tolist(),
    }
    with served("models:/weather@champion", tracked_workspace) as address:
        answer = post(address, {"dataframe_split": split, "params": {"horizon": 6}})
        expected = naive_times(predict(saved[0], frame, horizon=6).table)
        rows = pl.DataFrame(answer["predictions"])
        assert rows["mean"].to_list() == expected["mean"].to_list()
        assert rows["q0.9"].to_list() == expected["q0.9"].to_list()
        assert rows["time"].str.to_datetime(time_unit="us").to_list() == expected["time"].to_list()
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, {"dataframe_split": split, "params": {"horizon": 99}})
        assert refused.value.code == 400
        assert "trained for 12 steps" in refused.value.read().decode()
        refused.value.close()
