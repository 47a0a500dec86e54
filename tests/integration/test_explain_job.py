"""Explaining stored models through the use-case and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

import tsforge.app.explain as explain_module
from tsforge.app.explain import ExplainConfig, explain
from tsforge.app.forecast import PredictConfig, predict
from tsforge.artifact import Artifact, load_artifact
from tsforge.cli import app
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, TsforgeError
from tsforge.core.workspace import Workspace


def job(**settings: Any) -> ExplainConfig:
    return validate(ExplainConfig, settings)


def test_parts_of_a_stored_forecast_add_up_to_what_predict_says(site: Any) -> None:
    workspace = Workspace.open(site.home)
    found = explain(job(series="b", variate="y", cutoff="2026-03-01T00:00"), workspace)
    said = predict(validate(PredictConfig, {"cutoff": "2026-03-01T00:00", "quantile_levels": []}), workspace).table
    said = said.filter(series_id="b", variate="y").sort("step")
    sums = found.table.filter(pl.col("method") == "exact").group_by("step").agg(pl.col("contribution").sum())
    assert sums.sort("step")["contribution"].to_list() == pytest.approx(said["mean"].to_list(), rel=1e-3)
    assert found.metadata["dataset"] == "plant"
    assert found.metadata["cutoff"].startswith("2026-03-01")


def test_importance_uses_the_rows_kept_for_grading(site: Any) -> None:
    workspace = Workspace.open(site.home)
    settings = {"what": "importance", "importance": {"cutoffs": 12, "repeats": 2}}
    found = explain(job(**settings), workspace)
    assert found.metadata["rows"] == "test"
    assert found.table["windows"][0] == 24  # two series
    own = found.table.filter(source="x", variate="x")["importance"][0]
    other = found.table.filter(source="y", variate="x")["importance"][0]
    assert own > 1.0
    assert other == pytest.approx(0.0, abs=1e-6)  # a pooled linear model keeps variates apart
    one = explain(job(**settings, series="a"), workspace)
    assert one.table["windows"][0] == 12


@pytest.mark.parametrize("setting", ["cutoff=2026-03-01T00:00", "variate=y", "steps=[1]"])
def test_settings_of_one_forecast_are_refused_for_many(site: Any, setting: str) -> None:
    name = setting.partition("=")[0]
    value: Any = [1] if name == "steps" else setting.partition("=")[2]
    with pytest.raises(ConfigError, match=f"{name} has no effect with what=importance"):
        explain(job(what="importance", **{name: value}), Workspace.open(site.home))


def test_settings_of_the_other_question_are_refused(site: Any) -> None:
    workspace = Workspace.open(site.home)
    with pytest.raises(ConfigError, match="attribution has no effect with what=importance"):
        explain(job(what="importance", attribution={"method": "occlusion"}), workspace)
    with pytest.raises(ConfigError, match="importance has no effect with what=forecast"):
        explain(job(series="a", importance={"repeats": 2}), workspace)


@pytest.mark.parametrize("series", ["a", "nobody"])
def test_importance_of_one_series_is_refused_where_a_model_couples_them(
    site: Any, series: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain_module, "load_artifact", coupled)
    with pytest.raises(ConfigError, match=r"^series=\w+ has no effect with what=importance: .* couples the series"):
        explain(job(what="importance", series=series), Workspace.open(site.home))


def coupled(path: Path) -> Artifact:
    """Load an artifact and say that its model couples the series of a panel."""
    artifact = load_artifact(path)
    artifact.network.capabilities = replace(artifact.network.capabilities, rows_coupled=True)
    return artifact


def test_command_writes_the_table_and_prints_sums(site: Any, tmp_path: Path) -> None:
    target = tmp_path / "why.parquet"
    outcome = CliRunner().invoke(app, ["explain", "series=a", "steps=[1]", "--json", "--output", str(target)])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert document["method"] == "exact"
    assert {row["source"] for row in document["rows"]} == {"x", "y"}
    assert sum(row["share"] for row in document["rows"]) == pytest.approx(1.0)
    table = pl.read_parquet(target)
    assert table.filter(kind="target").height == 2 * 48


def test_mistakes_are_one_message(site: Any) -> None:
    for arguments, message in (
        (["series=q"], "q"),
        (["steps=[99]"], "1..12"),
        (["artifact=none"], "none"),
        (["attribution.method=magic"], "method"),
    ):
        outcome = CliRunner().invoke(app, ["explain", *arguments])
        assert outcome.exit_code != 0
        assert isinstance(outcome.exception, TsforgeError)
        assert message in str(outcome.exception)
