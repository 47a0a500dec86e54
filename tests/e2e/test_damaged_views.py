"""Pages of a workspace of which one artifact, report or row was damaged by other hands: told, and nothing else lost."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from streamlit.testing.v1 import AppTest

from tsforge.app.events import open_events
from tsforge.core.workspace import Workspace

WITHOUT_ADDRESSES = ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI")


def draw(view: str) -> Any:
    """Run one view as its page would and return what is on it; a traceback is none of that."""
    test = AppTest.from_string(f"from dashboards.views import {view}\n{view}.show()\n", default_timeout=240)
    page = test.run()
    assert not page.exception
    return page


def texts(notes: Any) -> list[str]:
    return [note.value for note in notes]


@pytest.fixture
def home(filled_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the filled workspace that a test may damage, set as TSFORGE_HOME."""
    root = tmp_path / "home"
    shutil.copytree(filled_workspace, root)
    monkeypatch.setenv("TSFORGE_HOME", str(root))
    for name in WITHOUT_ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    return root


def change(home: Path, statement: str) -> None:
    """Change the database behind the back of the stores."""
    with closing(sqlite3.connect(home / "store.db")) as database, database:
        assert database.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("provenance.json", "[1, 2]", "provenance.json holds no JSON object"),
        ("metrics.json", "[]", "metrics.json holds no JSON object"),
        ("manifest.json", None, "manifest.json is missing"),
    ],
)
def test_a_damaged_artifact_is_named_and_the_others_are_offered(
    home: Path, file: str, content: str | None, why: str
) -> None:
    folder = next(path for path in (home / "artifacts").iterdir() if path.name.startswith("dlinear"))
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    (home / "artifacts" / ".linear.x1y2.tmp").mkdir()
    for view in ("overview", "forecasts", "explanations"):
        page = draw(view)
        assert not page.error
        [said] = [text for text in texts(page.warning) if "Left out" in text]
        assert f"`{folder.name}` ({why})" in said
        assert "x1y2" not in said, "one that is being written is not damaged"


@pytest.mark.parametrize(
    ("view", "table", "why"),
    [
        (
            "backtests",
            "reports/backtests/*/leaderboard.parquet",
            "its leaderboard is empty; run tsforge backtest again",
        ),
        ("anomalies", "reports/detections/*/scores.parquet", "holds no score"),
    ],
)
def test_a_result_without_rows_is_one_message_below_the_choice(home: Path, view: str, table: str, why: str) -> None:
    for place in [*home.glob(table), *home.glob("published/*/*/scores.parquet")]:
        pl.read_parquet(place).clear().write_parquet(place)
    page = draw(view)
    [said] = texts(page.error)
    assert why in said
    assert page.selectbox, "another result can be chosen"


def test_a_box_without_options_is_a_message(workspace_root: Path) -> None:
    asked = "from dashboards.state import choose, page\npage('Pages', lambda home: choose('Series', [], 'series'))\n"
    page = AppTest.from_string(asked, default_timeout=60).run()
    assert not page.exception
    assert "there is no series to choose" in page.error[0].value


@pytest.mark.parametrize("damage", ["config = 'garbage'", "schema = '[]'"])
def test_a_damaged_record_of_a_dataset_hides_no_models_and_jobs(home: Path, damage: str) -> None:
    change(home, f"UPDATE tsf_datasets SET {damage} WHERE name = 'plant'")
    column = damage.partition(" ")[0]
    why = f"dataset 'plant': the column {column} of its row in the table tsf\\_datasets cannot be read"
    page = draw("overview")
    [said] = texts(page.error)
    assert said.startswith("**Data sets cannot be shown.**")
    assert page.metric[0].value == "unknown"
    assert any("dlinear" in set(frame.value.get("model", [])) for frame in page.dataframe)
    assert any("batch/nightly" in set(frame.value.get("job", [])) for frame in page.dataframe)
    for view in ("data", "forecasts"):
        said += " ".join(texts(draw(view).error))
    assert said.replace("tsf\\_", "tsf_").count(why.replace("tsf\\_", "tsf_")) == 3


def test_damaged_details_of_a_run_are_told_beside_it(home: Path) -> None:
    change(home, "UPDATE ledger_runs SET details = 'garbage'")
    for view in ("overview", "runs"):
        page = draw(view)
        assert not page.error
        [jobs] = [frame.value for frame in page.dataframe if "slot" in frame.value]
        assert all(text.endswith("(its details in the table ledger_runs cannot be read)") for text in jobs["message"])


def test_a_damaged_record_of_an_ingestion_is_told_beside_it(home: Path) -> None:
    change(home, "UPDATE tsf_batches SET reasons = 'garbage'")
    page = draw("data")
    assert not page.error
    assert set(page.dataframe[-1].value["error"]) == {"cannot be read: its row of the table tsf_batches is damaged"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("human_state = 'odd'", "human_state is 'odd'"),
        ("end = 900000000000000000", "end lies outside the years 2 to 9998"),
        ("end = 253402300799000000", "end lies outside the years 2 to 9998"),  # two hours more end the calendar
    ],
)
def test_an_event_that_cannot_be_shown_is_named_and_the_queue_goes_on(home: Path, damage: str, why: str) -> None:
    with open_events(Workspace.open(home)) as store:
        events = store.events("plant").height
    change(home, f"UPDATE tsf_events SET {damage} WHERE event_id = (SELECT min(event_id) FROM tsf_events)")
    page = draw("triage")
    [said] = [text for text in texts(page.warning) if "Left out" in text]
    assert said.startswith("Left out, because damaged: `plant/")
    assert f"({why})" in said.replace("\\", "")
    assert int(page.dataframe[0].value["events"].sum()) == events - 1


def test_an_event_whose_variates_cannot_be_read_is_shown_without(home: Path) -> None:
    change(home, "UPDATE tsf_events SET variates = 'garbage'")
    page = draw("triage")
    assert not page.error
    assert any("cannot be read" in text and "tsf_events" in text for text in texts(page.caption))
