"""A data set can be taken out of the store by the command line; and what used to leave one unreadable is refused."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore

DAYS = "s,ds,x\n" + "".join(f"{name},2024-01-0{day},{day}\n" for name in "ab" for day in range(1, 5))
LONG = ("data.layout=long", "data.series=s")


@pytest.fixture
def ingest(workspace_root: Path, command: Any, tmp_path: Path) -> Any:
    def run(content: str, *settings: str) -> tuple[int, str, str]:
        path = tmp_path / "data.csv"
        path.write_text(content)
        outcome: tuple[int, str, str] = command(
            "ingest", "data=csv", "data.name=d", f"data.source.path={path}", *settings, "--json"
        )
        return outcome

    return run


def test_removing_needs_a_yes_and_says_what_goes(ingest: Any, command: Any, workspace_root: Path) -> None:
    assert ingest(DAYS, *LONG)[0] == 0
    code, out, err = command("data", "remove", "d")
    assert (code, out) == (2, "")
    for words in ("8 rows", "2 series", "events", "batch records", "stay", "--yes"):
        assert words in err
    assert json.loads(command("data", "list", "--json")[1])[0]["rows"] == 8
    code, out, err = command("data", "remove", "d", "--yes", "--json")
    assert code == 0, err
    assert json.loads(out) == {"removed": "d", "rows": 8, "series": 2}
    assert json.loads(command("data", "list", "--json")[1]) == []
    assert command("data", "report", "d")[0] == 3
    with closing(SeriesStore(Workspace.open(workspace_root).database_url)) as store:
        assert store.batches("d")["status"].to_list() == ["done"]
    assert ingest("ds,x\n2024-01-01 00:00,1\n2024-01-01 01:00,2\n")[0] == 0, "anything may come under the name now"


@pytest.mark.parametrize("confirmed", [(), ("--yes",)])
def test_an_unknown_data_set_is_named_with_its_neighbours(ingest: Any, command: Any, confirmed: tuple[str]) -> None:
    code, _, err = command("data", "remove", "d", *confirmed)
    assert code == 3
    assert "the store is empty" in err
    assert ingest(DAYS, *LONG)[0] == 0
    code, _, err = command("data", "remove", "dd", *confirmed)
    assert code == 3
    assert "no dataset 'dd' in the store; did you mean 'd'?" in err


def test_a_data_set_that_cannot_be_read_can_be_removed(
    ingest: Any, command: Any, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that an older tsforge let a stray month into."""
    assert ingest("ds,x\n2024-01-31,1\n2024-02-29,2\n2024-03-31,3\n", "data.freq=1mo")[0] == 0
    with monkeypatch.context() as older:
        older.setattr("tsforge.data.store_limits._check_months", lambda *_: None)
        assert ingest("ds,x\n2024-04-01,1\n2024-05-01,2\n", "data.freq=1mo")[0] == 0
    assert command("data", "report", "d")[0] == 3
    code, _, err = ingest("ds,x\n2024-04-30,1\n2024-05-31,2\n", "data.freq=1mo")
    assert code == 3
    assert "tsforge data remove d" in err
    assert command("data", "remove", "d", "--yes")[0] == 0
    assert ingest("ds,x\n2024-04-30,1\n2024-05-31,2\n", "data.freq=1mo")[0] == 0


def test_what_made_a_data_set_unreadable_is_refused(ingest: Any, command: Any) -> None:
    hours = "ds,x\n" + "".join(f"2024-01-01 {hour:02}:00,{hour}\n" for hour in range(24))
    assert ingest(hours)[0] == 0
    code, _, err = ingest("ds,x\n3024-01-02 00:00,1\n", "data.freq=1h")
    assert code == 3
    assert "dataset 'd'" in err
    assert "3024-01-02" in err
    records = json.loads(command("data", "batches", "d", "--json")[1])
    assert [record["status"] for record in records] == ["refused", "done"]
    assert command("data", "report", "d")[0] == 0


def test_erasing_leaves_the_rows_that_the_file_does_not_mention(ingest: Any, command: Any) -> None:
    hours = "ds,x\n" + "".join(f"2024-01-01 {hour:02}:00,{hour}\n" for hour in range(24))
    assert ingest(hours)[0] == 0
    code, out, err = ingest("ds,x\n2024-01-01 00:00,5\n2024-01-01 23:00,\n", "data.nulls=erase", "data.freq=1h")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["rows_new"], facts["rows_changed"], facts["rows_unchanged"]) == (0, 2, 0)
    assert [(row["done"], row["count"]) for row in facts["rows"] if "stored" in row["what"]] == [
        ("replaced", 1),
        ("note", 1),
    ]
    assert json.loads(command("data", "list", "--json")[1])[0]["rows"] == 23
