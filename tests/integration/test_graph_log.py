"""Graphs kept after epochs of a training: what they are, through an interruption, in artifact and tracking store."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app import catalog_graphs
from tsforge.app.fit import FitConfig, fit, fit_frame
from tsforge.app.graph_log import NAME, GraphLog
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.artifact import Artifact, load_artifact, save_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.network import NetworkConfig, build_network
from tsforge.tracking.client import open_client

REGENN = {"name": "regenn", "ff_dim": 8, "network_gate": 0.5}
PLANT: dict[str, Any] = {
    "name": "plant",
    "source": {"kind": "synthetic", "generator": {"num_series": 2, "num_rows": 150, "num_anomalies": 0, "seed": 3}},
}
STEPS = {"max_epochs": 5, "max_steps_per_epoch": 2, "batch_size": 32, "start_margin": 0.0, "accelerator": "cpu"}


def frame() -> SeriesFrame:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"t": np.arange(120), **{name: rng.normal(size=120).cumsum() for name in "xyz"}})
    return SeriesFrame.from_wide(table, time="t", targets=["x", "y", "z"], freq="1i")


def config(**changes: Any) -> FitConfig:
    settings = {
        "data": {"name": "walks", "source": {"kind": "parquet", "path": "walks.parquet"}},
        "model": REGENN,
        "window": {"context_length": 8, "horizon": 4},
        "split": {"kind": "counts", "counts": [120, 0, 0]},  # no validation span: the last epoch is kept
        "train": STEPS | changes.pop("train", {}),
        "tracking": {"enabled": False},
    }
    return validate(FitConfig, settings | changes)


@pytest.fixture(scope="module")
def logged() -> Artifact:
    return fit_frame(frame(), config(log_graphs=1))[0]


def test_the_last_epoch_is_what_the_model_is_and_the_others_led_there(logged: Artifact) -> None:
    table = logged.tables[NAME]
    assert table.columns == ["run", "epoch", "layer", "matrix", "row", "column", "value"]
    assert table["run"].unique().to_list() == [logged.id]
    assert table["epoch"].unique().sort().to_list() == [0, 1, 2, 3, 4]
    assert table.height == 5 * 4 * 9
    model = logged.network.model
    for (layer, matrix), values in model.evolution().items():
        part = table.filter(epoch=4, layer=layer, matrix=matrix)
        if matrix not in ("evolved", "evolution_weights"):
            assert part.is_empty()
            continue
        for place, (row, column) in enumerate((a, b) for a in "xyz" for b in "xyz"):
            assert part.row(place, named=True)["row"] == row
            assert part.row(place, named=True)["column"] == column
        assert part["value"].to_list() == pytest.approx(values.flatten().tolist())
    # A' = G W_A + b_A by a loop, from the weights kept
    graph, mixing = model.graph.tolist(), model.source_layer.W_A.tolist()
    bias = model.source_layer.b_A.tolist()
    expected = [sum(graph[a][k] * mixing[k][b] for k in range(3)) + bias[a][0] for a in range(3) for b in range(3)]
    assert table.filter(epoch=4, layer="source", matrix="evolved")["value"].to_list() == pytest.approx(
        expected, rel=1e-5
    )
    steps = [table.filter(epoch=epoch, layer="source", matrix="evolution_weights")["value"] for epoch in range(5)]
    assert all((a - b).abs().max() > 0 for a, b in pairwise(steps))


def test_it_changes_no_weight_and_is_off_by_default(logged: Artifact) -> None:
    plain = fit_frame(frame(), config())[0]
    assert plain.tables == {}
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, logged.network.state_dict()[name])


def test_every_so_many_epochs(logged: Artifact) -> None:
    table = fit_frame(frame(), config(log_graphs=2))[0].tables[NAME]
    assert table["epoch"].unique().sort().to_list() == [1, 3]
    same = logged.tables[NAME].filter(pl.col("epoch").is_in([1, 3]))
    assert table.drop("run").equals(same.drop("run"))
    late = fit_frame(frame(), config(log_graphs=50))[0].tables[NAME]
    assert late.height == 0
    assert late.schema == table.schema


def test_an_interrupted_training_keeps_one_table(logged: Artifact, tmp_path: Path) -> None:
    def die(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    settings = config(log_graphs=1)
    with pytest.raises(KeyboardInterrupt):
        fit_frame(frame(), settings, checkpoint_dir=tmp_path, on_epoch=die)
    resumed = fit_frame(frame(), settings, checkpoint_dir=tmp_path, resume=True)[0]
    assert resumed.tables[NAME].drop("run").equals(logged.tables[NAME].drop("run"))
    with pytest.raises(KeyboardInterrupt):  # a fresh fit in the same folder starts a table of its own
        fit_frame(frame(), settings, checkpoint_dir=tmp_path, on_epoch=die)
    assert sorted(place.name for place in (tmp_path / "graphs").iterdir()) == ["0.npy", "1.npy", "2.npy"]


def test_the_artifact_keeps_it(logged: Artifact, tmp_path: Path) -> None:
    saved = save_artifact(logged, tmp_path)
    loaded = load_artifact(tmp_path / saved.id)
    assert loaded.tables.keys() == {NAME}
    assert loaded.tables[NAME].equals(logged.tables[NAME])
    again = save_artifact(loaded, tmp_path / "again")
    assert load_artifact(again.path).tables[NAME].equals(logged.tables[NAME])
    place = saved.path / f"{NAME}.parquet"
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"evolution_epochs\.parquet is damaged"):
        load_artifact(saved.path)


def test_models_without_a_graph_and_tables_without_end_are_refused() -> None:
    for model in ({"name": "dlinear"}, {**REGENN, "ablate_gse": True}, {"name": "regenn", "paths": "autoregression"}):
        with pytest.raises(ConfigError, match=r"log_graphs=1 has no effect: model '.*' with these settings learns no"):
            fit_frame(frame(), config(log_graphs=1, model=model))
    with pytest.raises(ConfigError, match="has no effect with model=auto"):
        fit_frame(frame(), config(log_graphs=1, model={"name": "auto"}))
    spec = DataSpec(context_length=4, horizon=2, num_variates=40)
    network = build_network(validate(NetworkConfig, {"model": REGENN}), spec)
    with pytest.raises(ConfigError, match=r"could keep 1,280,000 cells of graphs \(6,400 an epoch\).*log_graphs=2"):
        GraphLog(network, every=1, epochs=200)
    GraphLog(network, every=2, epochs=200)


def test_a_tracked_fit_shows_it_to_tracking_store_and_dashboard(tracked_workspace: Workspace, tmp_path: Path) -> None:
    workspace = tracked_workspace
    ingest(validate(IngestConfig, {"data": PLANT}), workspace)
    settings = config(data=PLANT, log_graphs=2, split={}, train={"max_epochs": 2}, tracking={"enabled": True})
    result = fit(settings, workspace)
    client = open_client(workspace.tracking_uri)
    assert f"artifact/{NAME}.parquet" in {item.path for item in client.list_artifacts(result.run_id, "artifact")}
    table = catalog_graphs.graph_epochs(workspace, result.artifact.id)
    assert table.equals(result.artifact.tables[NAME])
    assert table["epoch"].unique().to_list() == [1]
    shutil.copytree(result.artifact.path, tmp_path / "artifacts" / result.artifact.id)
    other, place = Workspace.open(tmp_path), tmp_path / "artifacts" / result.artifact.id / catalog_graphs.EPOCHS
    table.drop("epoch").write_parquet(place)
    with pytest.raises(ArtifactError, match=r"lacks the column\(s\) epoch"):
        catalog_graphs.graph_epochs(other, result.artifact.id)
    place.unlink()
    none = catalog_graphs.graph_epochs(other, result.artifact.id)
    assert none.is_empty()
    assert set(none.columns) == set(table.columns)
