"""Names of workspaces and databases: what works keeps its files inside, what cannot work is refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.config import SqlSource
from tsforge.data.io import read_source
from tsforge.data.store import SeriesStore
from tsforge.data.watch_state import WatchState
from tsforge.scheduling.ledger import Ledger
from tsforge.tracking.client import open_client
from tsforge.tuning.config import TuneConfig
from tsforge.tuning.space import Range
from tsforge.tuning.study import tune


def small_study(folder: Path) -> Any:
    config = TuneConfig(name="x", num_trials=1)
    return tune(lambda values, trial: values["x"], {"x": Range(0.0, 1.0)}, config, directory=folder)


def test_a_home_of_an_unusual_name_keeps_its_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    workspace = Workspace.open(tmp_path / "Wärme #2 & mehr" / "home")
    assert SeriesStore(workspace.database_url).datasets().is_empty()
    with closing(Ledger(workspace.database_url)) as ledger:
        ledger.now()
    open_client(workspace.tracking_uri)
    small_study(workspace.tuning)
    assert [path.name for path in tmp_path.iterdir()] == ["Wärme #2 & mehr"]
    assert [path.name for path in (tmp_path / "Wärme #2 & mehr").iterdir()] == ["home"]
    for found in ("store.db", "mlflow.db", "tuning/x.db"):
        assert (workspace.root / found).is_file(), found


def test_a_study_in_a_folder_that_optuna_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a folder without"):
        small_study(tmp_path / "what?")
    assert not (tmp_path / "what").exists()


@pytest.mark.parametrize("name", ["what?.db", "a%41.db"])
def test_paths_of_files_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    engine = create_engine(URL.create("sqlite", database=str(path)))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE readings (ds text, power real)"))
        connection.execute(text("INSERT INTO readings VALUES ('2026-01-01', 1.5)"))
    engine.dispose()
    raw = read_source(validate(SqlSource, {"path": str(path), "table": "readings"}))
    assert raw.frame.collect()["power"].to_list() == [1.5]
    watched = tmp_path / f"watch-{name}"
    with closing(WatchState(watched)):
        assert watched.is_file()
