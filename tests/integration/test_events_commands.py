"""``tsforge events`` and ``tsforge maintenance``: the life of an event from the command line, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from sqlalchemy import update

from tsforge.app.detect import DetectJobConfig, detect
from tsforge.app.events import actor, open_events
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.event_tables import SUPPRESSIONS


@pytest.fixture
def tsforge(site: Any, command: Any, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in a workspace with a detection; returns its status, output and error line."""
    detect(DetectJobConfig(stop="2026-03-05"), Workspace.open(site.home))
    capfd.readouterr()
    return lambda *arguments: command("--log-level", "error", *arguments)


def answer(outcome: tuple[int, str, str]) -> Any:
    code, out, errors = outcome
    assert code == 0, errors
    return json.loads(out)


def jump(tsforge: Any) -> dict[str, Any]:
    """The sensor error of the site: a.x from 3 March 05:00."""
    rows = answer(tsforge("events", "list", "--series", "a", "--json"))["rows"]
    return max(rows, key=lambda row: row["peak_score"])


def test_the_life_of_an_event(tsforge: Any) -> None:
    event = jump(tsforge)
    assert event["start"].startswith("2026-03-03T05:00")
    assert (event["said"], event["variates"].split(", ")[0]) == ("new", "x")
    name = event["event_id"]
    done = answer(tsforge("events", "acknowledge", name[:8], "--by", "eva", "--comment", "calling the plant", "--json"))
    assert (done["changed"], done["refused"]) == (1, 0)
    again = answer(tsforge("events", "acknowledge", name, "--by", "bob", "--json"))
    assert again["changed"] == 0
    assert "already (by eva" in again["rows"][0]["note"]
    assert answer(tsforge("events", "comment", name, "valve was open", "--by", "eva", "--json"))["comments"] == 2
    answer(tsforge("events", "confirm", name, "--by", "eva", "--json"))
    code, _, errors = tsforge("events", "dismiss", name, "--by", "bob", "--comment", "I doubt it")
    assert code == 3
    assert "is confirmed (by eva" in errors
    assert "your comment was kept" in errors
    shown = answer(tsforge("events", "show", name, "--json"))
    assert [line["what"] for line in shown["log"]] == [
        "recorded",
        *(["closed"] if shown["log"][1]["what"] == "closed" else []),
        "acknowledged",
        "commented",
        "confirmed",
        "commented",
    ]
    assert shown["log"][-1]["comment"] == "I doubt it"
    answer(tsforge("events", "reopen", name, "--json"))
    assert jump(tsforge)["said"] == "new"
    assert jump(tsforge)["by"] == actor(), "without --by the user of the system acts"


def test_text_output_reads_well(tsforge: Any) -> None:
    name = jump(tsforge)["event_id"]
    for command in (("list",), ("show", name), ("log",), ("log", name)):
        code, out, _ = tsforge("events", *command)
        assert code == 0
        assert name in out
    code, out, _ = tsforge("events", "dismiss", name, "--by", "eva")
    assert code == 0
    assert "changed" in out
    assert tsforge("events", "list", "--state", "dismissed")[1].count(name) == 1


def test_several_at_once_and_those_refused(tsforge: Any) -> None:
    rows = answer(tsforge("events", "list", "--json"))["rows"]
    names = [row["event_id"] for row in rows][:3]
    assert len(names) == 3
    answer(tsforge("events", "confirm", names[0], "--by", "eva", "--json"))
    code, out, _ = tsforge("events", "dismiss", *names, "0000000000", "--by", "bob", "--json")
    found = json.loads(out)
    assert (code, found["changed"], found["refused"]) == (3, 2, 2)
    assert {row["event_id"] for row in found["rows"] if "before" not in row} == {names[0], "0000000000"}


def test_a_missed_anomaly_is_labelled(tsforge: Any) -> None:
    where = ("plant", "b", "2026-03-02T05:00", "2026-03-02T08:00")
    made = answer(tsforge("events", "label", *where, "--variate", "y", "--by", "eva", "--comment", "seen", "--json"))
    assert made["after"] == "confirmed"
    rows = answer(tsforge("events", "list", "--state", "confirmed", "--json"))["rows"]
    assert [(row["event_id"], row["variates"]) for row in rows] == [(made["event_id"], "y")]
    assert "labelled already" in answer(tsforge("events", "label", *where, "--json"))["note"]
    refused = [
        (("plnt", *where[1:]), "did you mean 'plant'"),
        (("plant", "z", *where[2:]), "no series z"),
        ((*where[:2], "2030-01-01", "2030-01-02"), "no rows"),
        ((*where[:2], where[3], where[2]), "end 2026-03-02T05:00 lies before start 2026-03-02T08:00"),
        ((*where[:2], "soon", where[3]), "not an ISO date"),
        ((*where, "--variate", "q"), "no target q"),
    ]
    for arguments, message in refused:
        code, _, errors = tsforge("events", "label", *arguments)
        assert code == 3
        assert message in errors


def test_tables_open_in_pandas_and_polars(tsforge: Any, tmp_path: Path) -> None:
    count = answer(tsforge("events", "list", "--json"))["events"]
    for ending in ("parquet", "csv"):
        path = tmp_path / f"events.{ending}"
        assert answer(tsforge("events", "export", "--output", str(path), "--json"))["rows"] == count
    parquet, csv = pl.read_parquet(tmp_path / "events.parquet"), pl.read_csv(tmp_path / "events.csv")
    assert parquet.height == csv.height == count
    assert parquet["variates"][0][0]["variate"] == csv["variates"][0].split(", ")[0]
    assert pd.read_parquet(tmp_path / "events.parquet")["start"].dt.tz is not None
    assert len(pd.read_csv(tmp_path / "events.csv", parse_dates=["start", "end"])) == count
    assert answer(tsforge("events", "log", "--output", str(tmp_path / "log.csv"), "--json"))["rows"] >= count
    assert pl.read_csv(tmp_path / "log.csv")["what"][0] == "recorded"
    code, _, errors = tsforge("events", "export", "--output", str(tmp_path / "events.xlsx"))
    assert code == 2
    assert "ends in .parquet or .csv" in errors


def test_filters_and_refusals(tsforge: Any) -> None:
    late = answer(tsforge("events", "list", "--since", "2026-03-03T05:00", "--series", "a", "--json"))["rows"]
    assert late
    assert all(row["end"] >= "2026-03-03T05:00" and row["series_id"] == "a" for row in late)
    refused = [
        (("list", "--since", "soon"), 3, "not an ISO date"),
        (("list", "--since", "10000-01-01"), 3, "not an ISO date"),
        (("list", "--since", "9999-12-31T23:30-05:00"), 3, "lies outside the years 1 to 9999"),
        (("export", "--since", "0001-01-01T00:00+05:00", "--output", "x.csv"), 3, "lies outside the years 1 to 9999"),
        (("prune", "--before", "9999-12-31T23:30-05:00"), 3, "lies outside the years 1 to 9999"),
        (("list", "--dataset", "plnt"), 3, "did you mean 'plant'"),
        (("list", "--state", "odd"), 3, "no event state odd"),
        (("show", "0000000000"), 3, "no event '0000000000'"),
        (("show", "00"), 3, "too short"),
        (("confirm", "0000000000", "--by", " "), 2, "say who acts"),
        (("confirm",), 2, "Missing argument"),
    ]
    for arguments, status, message in refused:
        code, _, errors = tsforge("events", *arguments)
        assert code == status, arguments
        assert message in errors
        assert errors.count("\n") == 1, "one line"


def test_maintenance(tsforge: Any, site: Any) -> None:
    event = jump(tsforge)
    added = answer(
        tsforge(
            *("maintenance", "add", "--series", "a", "--from", "2026-03-03", "--to", "2026-03-04", "--by", "eva"),
            *("--reason", "sensor change", "--json"),
        )
    )
    assert (added["kind"], added["author"]) == ("maintenance", "eva")
    assert added["hits"] >= 1, "what nobody judged yet is silenced too"
    assert jump(tsforge)["suppressed_by"] == added["id"]
    shown = answer(tsforge("events", "list", "--no-suppressed", "--json"))["rows"]
    assert event["event_id"] not in {row["event_id"] for row in shown}
    days = ("--weekly", "Sat,sunday 22:00-2:00", "--timezone", "Europe/Berlin")
    weekly = answer(tsforge("maintenance", "add", *days, "--reason", "backup", "--json"))
    assert (weekly["weekdays"], weekly["opens"], weekly["closes"]) == ("sat,sun", "22:00", "02:00")
    nights = answer(tsforge("maintenance", "add", "--weekly", "fri-mon,Wed 22:00-02:00", "--reason", "x", "--json"))
    assert nights["weekdays"] == "fri,sat,sun,mon,wed"
    assert tsforge("maintenance", "lift", str(nights["id"]))[0] == 0
    for name in ("--series", "--variate", "--dataset"):
        code, _, told = tsforge("maintenance", "add", name, " ", "--from", "2026-03-03", "--reason", "x")
        assert code == 2
        assert f"{name[2:]} is empty and would match no event" in told
    for day in ("satan", "mon-tue-wed", "mon-x"):
        code, _, told = tsforge("maintenance", "add", "--weekly", f"{day} 22:00-02:00", "--reason", "x")
        assert code == 2
        assert f"'{day}' is no day" in told
    assert len(answer(tsforge("maintenance", "list", "--json"))) == 2
    lifted = answer(tsforge("maintenance", "lift", str(added["id"]), "--by", "bob", "--comment", "done", "--json"))
    assert lifted["lifted_by"] == "bob"
    assert [row["id"] for row in answer(tsforge("maintenance", "list", "--json"))] == [weekly["id"]]
    assert len(answer(tsforge("maintenance", "list", "--all", "--json"))) == 3
    assert "backup" in tsforge("maintenance", "list")[1]
    refused = [
        (("add", "--reason", "all of it"), 2, "hide every event for ever"),
        (("add", "--reason", "x", "--score-below", "inf"), 2, "score_below: Input should be a finite number"),
        (("add", "--reason", "x", "--series", "zz", "--score-below", "nan"), 2, "score_below"),
        (("add", "--reason", "x", "--weekly", "sat"), 2, "write days and hours"),
        (("add", "--reason", "x", "--weekly", "odd 1-2"), 2, "'odd' is no day"),
        (("add", "--reason", "x", "--timezone", "UTC", "--series", "a"), 2, "clock of --weekly"),
        (("add", "--series", "a"), 2, "--reason"),
        (("lift", "99"), 3, "no suppression rule 99"),
        (("lift", str(added["id"])), 3, "lifted already by bob"),
    ]
    for arguments, status, message in refused:
        code, _, errors = tsforge("maintenance", *arguments)
        assert code == status, (arguments, errors)
        assert message in errors


def test_a_stored_rule_that_cannot_be_read_is_named_and_can_be_ended(tsforge: Any, site: Any) -> None:
    """Stored by an older version, whose limit was no number."""
    rule = answer(tsforge("maintenance", "add", "--score-below", "0.5", "--reason", "small ones", "--json"))["id"]
    with open_events(Workspace.open(site.home)) as store, store.engine.begin() as connection:
        text = {"rule": '{"reason":"small ones","score_below":null}'}
        connection.execute(update(SUPPRESSIONS).where(SUPPRESSIONS.c.id == rule).values(text))
    code, _, errors = tsforge("detect", "stop=2026-03-05")
    assert code == 6
    assert f"suppression rule {rule} of the store cannot be read (this would hide every event" in errors
    assert f"`tsforge maintenance lift {rule}`" in errors
    assert [row["kind"] for row in answer(tsforge("maintenance", "list", "--json"))] == ["unreadable"]
    assert answer(tsforge("maintenance", "lift", str(rule), "--json"))["kind"] == "unreadable"
    assert tsforge("detect", "stop=2026-03-05")[0] == 0


def test_pruning(tsforge: Any) -> None:
    rows = answer(tsforge("events", "list", "--json"))["rows"]
    answer(tsforge("events", "confirm", rows[0]["event_id"], "--json"))
    lines = answer(tsforge("events", "log", "--json"))["rows"]
    gone = answer(tsforge("events", "prune", "--before", "2026-03-03", "--by", "eva", "--json"))["removed"]
    left = answer(tsforge("events", "list", "--json"))["rows"]
    assert gone == len(rows) - len(left) > 0
    assert rows[0]["event_id"] in {row["event_id"] for row in left}
    assert answer(tsforge("events", "log", "--json"))["rows"][: len(lines)] == lines
    assert tsforge("events", "prune", "--before", "soon")[0] == 3


def test_nobody_acts_anonymously(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("no such user")

    monkeypatch.setattr("getpass.getuser", unknown)
    assert actor("eva") == "eva"
    with pytest.raises(ConfigError, match="--by NAME"):
        actor()
