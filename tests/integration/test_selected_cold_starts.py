"""A forecast with ``cold_start`` is the same whichever series are selected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import PredictConfig, predict
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace

ROWS, END = 240, datetime(2026, 1, 11, tzinfo=UTC)
SHORT = {"n1": 5, "n2": 1}


def rows_of(name: str, count: int, seed: int) -> pl.DataFrame:
    hours = np.arange(ROWS - count, ROWS)
    noise = np.random.default_rng(seed).normal(0, 0.5, count)
    times = [END - timedelta(hours=int(ROWS - hour)) for hour in hours]
    return pl.DataFrame({"id": name, "ds": times, "y": 10 + 3 * np.sin(2 * np.pi * hours / 24) + noise})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A model fitted on six series, to which two that have just begun came later."""
    folder = tmp_path_factory.mktemp("cold")
    data = {"name": "cold", "layout": "long", "series": "id", "time": "ds", "targets": ["y"], "freq": "1h"}
    data["source"] = {"kind": "parquet", "path": str(folder / "cold.parquet")}
    root = folder / "home"
    root.mkdir()
    workspace = Workspace(
        root=root, database_url=f"sqlite:///{root / 'store.db'}", tracking_uri=f"sqlite:///{root / 'mlflow.db'}"
    )
    long = [rows_of(f"s{number}", ROWS, number) for number in range(6)]
    pl.concat(long).write_parquet(folder / "cold.parquet")
    ingest(validate(IngestConfig, {"data": data}), workspace)
    settings = {
        "data": data,
        "model": {"name": "linear"},
        "scaling": {"kind": "global"},
        "window": {"context_length": 24, "horizon": 4},
        "split": {"kind": "fractions", "train": 0.5, "valid": 0.3, "test": 0.2},
        "tracking": {"enabled": False},
    }
    fit(validate(FitConfig, settings), workspace)
    late = [rows_of(name, count, 9) for name, count in SHORT.items()]
    pl.concat([*long, *late]).write_parquet(folder / "cold.parquet")
    ingest(validate(IngestConfig, {"data": data}), workspace)
    return workspace


def cold(workspace: Workspace, **settings: Any) -> Any:
    return predict(validate(PredictConfig, {"cold_start": "pad", **settings}), workspace)


@pytest.mark.parametrize("chosen", [["s0", "n1"], ["n1", "n2"], ["n2"], ["s3"]])
@pytest.mark.parametrize("asked", [{}, {"cutoff": (END - timedelta(hours=2)).isoformat()}])
def test_a_selection_changes_no_forecast(workspace: Workspace, chosen: list[str], asked: dict[str, Any]) -> None:
    if asked and "n2" in chosen:
        with pytest.raises(DataError, match=r"no forecast of n2: they begin after the cutoff; give a later one"):
            cold(workspace, series=chosen, **asked)
        return
    every, some = cold(workspace, **asked), cold(workspace, series=chosen, **asked)
    assert some.table.equals(every.table.filter(pl.col("series_id").is_in(chosen)))
    assert set(some.table["series_id"]) == set(chosen)
    assert some.metadata["cold_start"] == every.metadata["cold_start"]
    assert some.metadata["cold_start"]["calibrated_on"] == 6


def test_unknown_series_are_refused_by_name(workspace: Workspace) -> None:
    with pytest.raises(DataError, match="unknown series n9"):
        cold(workspace, series=["n9"])
