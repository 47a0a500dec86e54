"""Stored graphs: as the model made them, with names, over seeds; damaged tables are one message."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tsforge.app import catalog, catalog_graphs
from tsforge.app.catalog_live import live_forecast
from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.artifact import load_artifact
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError
from tsforge.core.workspace import Workspace

PLANT: dict[str, Any] = {
    "name": "plant",
    "source": {"kind": "synthetic", "generator": {"num_series": 2, "num_rows": 300, "num_anomalies": 0, "seed": 3}},
}


def settings(**changes: Any) -> dict[str, Any]:
    train = {"max_epochs": 1, "max_steps_per_epoch": 3, "start_margin": 0.0, "accelerator": "cpu"}
    return {
        "data": PLANT,
        "model": {"name": "regenn", "ff_dim": 8, "network_gate": 0.5},
        "window": {"context_length": 24, "horizon": 6},
        "train": train | changes.pop("train", {}),
        "tracking": {"enabled": False},
    } | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[str]]:
    workspace = Workspace.open(tmp_path_factory.mktemp("graphs"))
    ingest(validate(IngestConfig, {"data": PLANT}), workspace)
    names = [
        fit(validate(FitConfig, settings(train={"seed": seed}, **more)), workspace).artifact.id
        for seed, more in ((0, {}), (1, {}), (2, {"tracking": {"enabled": False, "experiment": "other"}}))
    ]
    others = (
        settings(train={"learning_rate": 1e-4}),
        settings(model={"name": "regenn", "paths": "autoregression"}),
        settings(model={"name": "dlinear"}),
    )
    return workspace, [*names, *(fit(validate(FitConfig, part), workspace).artifact.id for part in others)]


def test_the_stored_table_is_what_the_model_made(made: tuple[Workspace, list[str]]) -> None:
    workspace, names = made
    table = catalog_graphs.graph_table(workspace, names[0])
    assert table.columns == ["run", "layer", "matrix", "row", "column", "value"]
    assert table["run"].unique().to_list() == [names[0]]
    loaded = load_artifact(workspace.artifacts / names[0])
    variates = loaded.schema.targets
    layer = loaded.network.model.source_layer
    weights = layer.evolve(loaded.network.model.graph)[1]
    picked = table.filter(layer="source", matrix="evolution_weights", row=variates[1], column=variates[0])
    assert picked["value"].to_list() == pytest.approx([float(weights[1, 0].detach())])
    assert loaded.explanation["evolution"] == loaded.network.model.explain()["evolution"]
    assert "evolution" not in catalog.artifact_facts(workspace, names[0])["explanation"]


def test_only_models_with_a_graph_are_listed(made: tuple[Workspace, list[str]]) -> None:
    workspace, names = made
    assert {record["id"] for record in catalog_graphs.list_graphs(workspace)} == set(names[:4])
    with pytest.raises(ArtifactError, match=r"artifact 'dlinear.*' has no graph \(with one: regenn"):
        catalog_graphs.graph_table(workspace, names[-1])


def test_siblings_differ_in_their_seed_only(made: tuple[Workspace, list[str]]) -> None:
    workspace, names = made
    runs = catalog_graphs.sibling_graphs(workspace, names[1])
    assert set(runs["run"]) == set(names[:3])
    assert set(catalog_graphs.sibling_graphs(workspace, names[3])["run"]) == {names[3]}


def test_stability_by_hand() -> None:
    cell = {"layer": "source", "matrix": "evolution_weights", "row": "a", "column": "b"}
    other = cell | {"row": "b"}
    runs = pl.DataFrame(
        [{"run": str(run), **cell, "value": value} for run, value in enumerate((1.0, 3.0, -1.0))]
        + [{"run": str(run), **other, "value": -2.0} for run in range(3)]
    )
    first, second = catalog_graphs.graph_stability(runs).to_dicts()
    assert (first["mean"], first["sd"], first["seeds"]) == (1.0, 2.0, 3)
    assert first["same_sign"] == pytest.approx(2 / 3)
    assert (second["mean"], second["sd"], second["same_sign"]) == (-2.0, 0.0, 1.0)


def test_a_live_forecast_says_who_gives_what(made: tuple[Workspace, list[str]]) -> None:
    workspace, names = made
    series = catalog.artifact_facts(workspace, names[0])["series"][1]
    found = live_forecast(workspace, names[0], series)
    keys = ["time", "variate"]
    given = found.contributions.group_by(keys, maintain_order=True).agg(pl.col("value").sum())
    part = found.components.filter(component="network")
    joined = part.join(given, on=keys, suffix="_given")
    assert joined.height == part.height == given.height
    assert joined["value"].to_list() == pytest.approx(joined["value_given"].to_list(), abs=1e-4)
    assert found.attention.group_by("variate").agg(pl.col("share").sum())["share"].to_list() == pytest.approx(
        [1.0] * 3, abs=1e-5
    )
    plain = live_forecast(workspace, names[-1], series)
    assert plain.contributions.is_empty()
    assert plain.attention.is_empty()


@pytest.mark.parametrize("damage", ["text", "columns"])
def test_a_damaged_table_is_one_message(made: tuple[Workspace, list[str]], tmp_path: Path, damage: str) -> None:
    workspace, names = made
    shutil.copytree(workspace.artifacts / names[0], tmp_path / "artifacts" / names[0])
    place = tmp_path / "artifacts" / names[0] / catalog_graphs.TABLE
    if damage == "text":
        place.write_bytes(b"no parquet")
    else:
        pl.read_parquet(place).drop("matrix").write_parquet(place)
    with pytest.raises(ArtifactError, match="cannot be read" if damage == "text" else r"lacks the column\(s\) matrix"):
        catalog_graphs.graph_table(Workspace.open(tmp_path), names[0])
