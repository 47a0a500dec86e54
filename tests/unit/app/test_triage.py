"""Questions of the triage page: the queue, incidents in it, events alike, the window around one, bulk actions."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from tsforge.app import triage
from tsforge.app.catalog_results import StoredDetection
from tsforge.app.events import audit_trail, comment, list_maintenance, open_events
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)


def hour(number: int) -> datetime:
    return START + timedelta(hours=number)


def event(name: str, series: str, start: int, end: int, **changes: Any) -> dict[str, Any]:
    """An event as a detector reports it."""
    return {
        "event_id": name * 8,
        "series_id": series,
        "start": hour(start),
        "end": hour(end),
        "peak_time": hour(start),
        "peak_score": 6.0,
        "p_value": 0.001,
        "threshold": 3.0,
        "rule": "fixed",
        "state": "closed",
        "length": end - start + 1,
        "continues": None,
        "incident_id": None,
        "variates": [ranked("x", 5.0), ranked("y", 1.0)],
        **changes,
    }


def ranked(variate: str, contribution: float) -> dict[str, Any]:
    return {"variate": variate, "contribution": contribution, "conditional": 1.0, "additive": 1.0}


EVENTS = [
    event("a", "s1", 0, 3),
    event("b", "s1", 10, 12, incident_id="i1", peak_score=4.0),
    event("c", "s2", 11, 20, incident_id="i1", peak_score=9.0, state="open"),
    event("d", "s2", 30, 30, threshold=None, variates=[ranked("y", 2.0)]),
]


@pytest.fixture
def workspace(workspace_root: Any) -> Workspace:
    home = Workspace.open(workspace_root)
    with open_events(home) as store:
        store.record("plant", pl.DataFrame(EVENTS, infer_schema_length=None), source="detect:x", artifact="m")
    return home


def read(workspace: Workspace) -> pl.DataFrame:
    return triage.read_events(workspace, "plant")


def test_an_incident_is_one_row_of_the_queue(workspace: Workspace) -> None:
    rows = {row["key"]: row for row in triage.queue(read(workspace)).to_dicts()}
    assert list(rows) == ["plant/" + "d" * 8, "plant/i1", "plant/" + "a" * 8], "latest start first"
    incident = rows["plant/i1"]
    assert (incident["series"], incident["events"], incident["series_id"]) == (2, 2, "s2")
    assert (incident["start"], incident["end"]) == (hour(10), hour(20))
    assert incident["strength"] == 3.0
    assert incident["length"] is None, "rows of several events are not added"
    assert rows["plant/" + "a" * 8]["length"] == read(workspace).filter(event_id="a" * 8)["length"].item()
    assert incident["state"] == "open", "as long as one of its events is"
    assert rows["plant/" + "d" * 8]["strength"] is None, "without a threshold there is nothing to compare with"
    assert triage.members(read(workspace), "plant/i1")["event_id"].to_list() == ["b" * 8, "c" * 8]
    assert triage.queue(read(workspace).clear()).is_empty()


def test_events_that_cannot_be_shown_are_named_and_the_others_stay(workspace: Workspace) -> None:
    stored = read(workspace)
    whole, damaged = triage.apart(stored)
    assert whole.equals(stored)
    assert damaged == {}
    bad = stored.with_columns(
        end=pl.when(pl.col("event_id") == "a" * 8)
        .then(pl.lit(9 * 10**17).cast(pl.Datetime("us", "UTC")))
        .otherwise("end"),
        peak_time=pl.when(pl.col("event_id") != "d" * 8).then("peak_time"),
        human_state=pl.when(pl.col("event_id") == "b" * 8).then(pl.lit("odd")).otherwise("human_state"),
    )
    whole, damaged = triage.apart(bad)
    assert damaged == {
        "plant/" + "a" * 8: "end lies outside the years 2 to 9998",
        "plant/" + "b" * 8: "human_state is 'odd'",
    }
    assert triage.queue(whole)["event_id"].to_list() == ["d" * 8, "c" * 8], "a peak nobody dated is no damage"
    numbered = stored.with_columns(pl.col("start", "end", "peak_time").to_physical() * 10**6)
    assert triage.apart(numbered)[0].equals(numbered), "a position is no time"
    assert triage.apart(stored.clear())[0].is_empty()


def test_an_event_whose_variates_cannot_be_read_stays_in_the_queue(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(workspace.database_url.removeprefix("sqlite:///"))) as database, database:
        database.execute("UPDATE tsf_events SET variates = 'garbage' WHERE event_id = ?", ("a" * 8,))
    events = read(workspace)
    rows = {row["key"]: row for row in triage.queue(events).to_dicts()}
    assert rows["plant/" + "a" * 8]["variates"] == ""
    assert rows["plant/" + "d" * 8]["variates"] == "y"
    assert (
        f"1 of 4 events are shown without variates, which the table tsf_events holds damaged: '{'a' * 8}' of 'plant'"
        in (caplog.text)
    )
    asked = {"series": "s1", "start": "2026-01-01 00:00", "end": "2026-01-01 05:00", "reason": "valves are swapped"}
    number = triage.maintain(workspace, events.row(0, named=True), **asked, weekly=False, actor="Ada")
    assert read(workspace).filter(pl.col("suppressed_by") == number).height == 1, "other rules know what they look at"


def test_an_incident_waits_as_long_as_one_of_its_events_does(workspace: Workspace) -> None:
    triage.act_on_shown(workspace, read(workspace).filter(event_id="b" * 8), "confirmed", actor="Ada")
    rows = triage.queue(read(workspace))
    assert rows.filter(key="plant/i1")["human_state"].item() == "new"
    triage.act_on_shown(workspace, read(workspace), "acknowledged", actor="Ada")
    rows = triage.queue(read(workspace))
    assert rows["human_state"].to_list() == ["acknowledged"] * 3
    triage.act_on_shown(workspace, triage.members(read(workspace), "plant/i1"), "dismissed", actor="Ada")
    rows = triage.queue(read(workspace))
    assert rows.filter(key="plant/i1")["human_state"].item() == "confirmed", "what it was comes before what it was not"
    assert rows["key"][-1] == "plant/i1", "settled rows come last"


def test_actions_take_the_events_they_fit_and_tell_what_others_did(workspace: Workspace) -> None:
    seen = read(workspace)
    assert triage.act_on_shown(workspace, seen[:2], "acknowledged", actor="Ada", comment="on it") == (2, [])
    changed, refused = triage.act_on_shown(workspace, seen, "dismissed", actor="Noor")
    assert changed == 2
    assert len(refused) == 2
    assert "is acknowledged by now (by Ada" in refused[0], "the list on the screen was older"
    assert triage.act_on_shown(workspace, read(workspace).filter(human_state="dismissed"), "confirmed", actor="A") == (
        0,
        [],
    )
    assert triage.last_comments(workspace, read(workspace)) == {"a" * 8: "on it", "b" * 8: "on it"}
    comment(workspace, "a" * 8, "still on it", by="Ada", dataset="plant")
    assert triage.last_comments(workspace, read(workspace))["a" * 8] == "still on it"
    assert [line["what"] for line in audit_trail(workspace, "a" * 8, "plant").to_dicts()][:2] == [
        "recorded",
        "acknowledged",
    ]
    with pytest.raises(ConfigError, match="who acts"):
        triage.act_on_shown(workspace, read(workspace), "reopened", actor=" ")


def test_the_version_changes_with_every_word(workspace: Workspace) -> None:
    versions = [triage.events_version(workspace)]
    triage.act_on_shown(workspace, read(workspace)[:1], "acknowledged", actor="Ada")
    versions.append(triage.events_version(workspace))
    comment(workspace, "b" * 8, "a word", by="Ada")
    versions.append(triage.events_version(workspace))
    grown = event("c", "s2", 11, 25, incident_id="i1", peak_score=9.0, state="open")
    with open_events(workspace) as store:
        store.record("plant", pl.DataFrame([grown], infer_schema_length=None), source="detect:x", artifact="m")
    versions.append(triage.events_version(workspace))
    assert len(set(versions)) == 4
    assert triage.events_version(workspace) == versions[-1]


def test_events_alike_share_leading_variates_and_come_before(workspace: Workspace) -> None:
    events = read(workspace)
    assert events.select(triage.leading()).to_series().to_list() == [["x"], ["x"], ["x"], ["y"]], (
        "from half the strongest"
    )
    incident = events.filter(event_id="c" * 8).row(0, named=True)
    found = triage.similar_events(events, incident)
    assert found.select("event_id", "alike").rows() == [("a" * 8, 0.5)], "another series, and not of its own incident"
    same = triage.similar_events(events, {**incident, "series_id": "s1", "incident_id": None})
    assert same.select("event_id", "alike").rows() == [("b" * 8, 1.0), ("a" * 8, 1.0)]
    assert triage.similar_events(events, events.row(3, named=True)).is_empty(), "y never led before"
    assert triage.similar_events(events, events.row(0, named=True)).is_empty(), "nothing came before"


def test_many_leading_variates_are_counted(workspace: Workspace) -> None:
    many = read(workspace)[:1].with_columns(
        variates=pl.Series([[ranked(f"v{place}", 5.0) for place in range(5)]], dtype=read(workspace).schema["variates"])
    )
    assert triage.queue(many)["variates"].item() == "v0, v1, v2 and 2 more"
    nobody = many.with_columns(variates=pl.Series([[]], dtype=many.schema["variates"]))
    assert triage.queue(nobody)["variates"].item() == ""


def detection() -> StoredDetection:
    """Two variates over 100 hours; the error of x is -1, 0 or 1 outside the events, 50 inside."""
    rows = []
    for number in range(100):
        inside = 10 <= number <= 12
        time = hour(number)
        joint = {
            "time": time,
            "variate": "*",
            "score": float(number),
            "threshold": 90.0,
            "value": None,
            "expected": None,
        }
        x = {**joint, "variate": "x", "value": 7.0 + (50.0 if inside else number % 3 - 1.0), "expected": 7.0}
        rows += [joint, x, {**x, "variate": "y", "value": 1.0}]
    scores = pl.DataFrame(rows, infer_schema_length=None).with_columns(series_id=pl.lit("s1"))
    events = pl.DataFrame(EVENTS[:2], infer_schema_length=None)
    return StoredDetection(scores=scores, events=events, metadata={"series": {}})


def test_the_window_has_rows_on_both_sides_and_the_range_of_usual_errors() -> None:
    window = triage.event_window(detection(), EVENTS[1], ["y", "x"], around=5)
    assert window.values["variate"].unique(maintain_order=True).to_list() == ["y", "x"], "in the order asked for"
    assert window.scores["time"].to_list() == [hour(number) for number in range(5, 18)]
    mine = window.values.filter(variate="x")
    assert mine["time"].to_list() == window.scores["time"].to_list()
    assert set(mine["low"]) == {6.0}
    assert set(mine["high"]) == {8.0}, "rows of events do not widen it"
    late = triage.event_window(detection(), {**EVENTS[1], "start": hour(500), "end": hour(501)}, ["x"])
    assert late.values.is_empty(), "rows of another time would only mislead"
    assert late.scores.is_empty()


def test_a_detection_without_values_of_variates_still_has_its_score() -> None:
    kept = detection()
    joint = StoredDetection(scores=kept.scores.drop("value", "expected"), events=kept.events, metadata={})
    window = triage.event_window(joint, EVENTS[1], ["x"], around=2)
    assert window.values.is_empty()
    assert window.scores.height == 7


def test_stored_rows_stand_in_where_no_detection_looked() -> None:
    rows = pl.DataFrame({"time": [hour(number) for number in range(20)], "x": range(20), "y": range(20)})
    window = triage.stored_window(rows, EVENTS[1], ["x", "gone"], around=1)
    assert window.values["value"].to_list() == list(range(9, 14))
    assert window.scores.is_empty()


def test_stale_series_are_named_worst_first() -> None:
    def fact(ratio: float, stale: bool) -> dict[str, Any]:
        return {"alarm_rate_ratio": ratio, "is_stale": stale}

    facts = {"a": fact(6.0, True), "b": fact(9.0, True), "c": fact(50.0, False)}
    kept = detection()
    found = StoredDetection(scores=kept.scores, events=kept.events, metadata={"series": facts})
    assert list(triage.stale_series(found).items()) == [("b", 9.0), ("a", 6.0)]
    assert triage.stale_series(kept) == {}


def test_a_maintenance_window_silences_what_lies_in_it(workspace: Workspace) -> None:
    shown = read(workspace).row(0, named=True)
    asked = {"series": "s1", "start": "2026-01-01 00:00", "end": "2026-01-01 05:00", "reason": "valves are swapped"}
    number = triage.maintain(workspace, shown, **asked, weekly=False, actor="Ada")
    events = read(workspace)
    assert events.filter(pl.col("suppressed_by") == number)["event_id"].to_list() == ["a" * 8]
    rows = triage.queue(events)
    assert rows.filter(pl.col("suppressed"))["key"].to_list() == ["plant/" + "a" * 8]
    weekly = triage.maintain(workspace, shown, **{**asked, "end": "2026-01-01 06:30"}, weekly=True, actor="Ada")
    rule = list_maintenance(workspace).filter(id=weekly).row(0, named=True)
    assert (rule["weekdays"], rule["opens"], rule["closes"]) == ("thu", "00:00", "06:30")
    assert rule["dataset"] == "plant"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "soon", "weekly": True}, "'soon' is not an ISO date"),
        ({"start": "soon"}, "'soon' is not an ISO date"),
        ({"start": "9999-12-31T23:30-05:00", "weekly": True}, "lies outside the years 1 to 9999"),
        ({"start": "9999-12-31T23:30-05:00"}, "lies outside the years 1 to 9999"),
        ({"end": "2026-01-03 05:00", "weekly": True}, "lasts up to a day"),
        ({"start": "2026-01-01T06:00+02:00", "end": "2026-01-01 04:00", "weekly": True}, "lasts up to a day"),
        ({"end": "2026-01-01 05:00:30", "weekly": True}, "whole minutes"),
        ({"start": "2026-01-02 00:00"}, "lies before start"),
        ({"reason": " "}, "say why"),
        ({"actor": ""}, "who acts"),
    ],
)
def test_a_bad_window_is_refused(workspace: Workspace, changes: dict[str, Any], message: str) -> None:
    asked = {"series": "s1", "start": "2026-01-01 00:00", "end": "2026-01-01 05:00", "reason": "r", "actor": "Ada"}
    with pytest.raises(ConfigError, match=message):
        triage.maintain(workspace, read(workspace).row(0, named=True), **{"weekly": False, **asked, **changes})
    assert list_maintenance(workspace).is_empty()


@pytest.mark.parametrize(
    ("start", "end", "day", "opens", "closes"),
    [
        ("2026-03-01T06:00+02:00", "2026-03-01T08:00+02:00", "sun", "04:00", "06:00"),
        ("2026-03-01T01:00+02:00", "2026-03-01T08:00+02:00", "sat", "23:00", "06:00"),  # the day is that of UTC too
        ("2026-03-01T06:00+02:00", "2026-03-01 06:00", "sun", "04:00", "06:00"),  # without an offset it is UTC
        (" 2026-03-01 06:00", "2026-03-02 06:00 ", "sun", "06:00", "06:00"),
    ],
)
def test_a_weekly_window_opens_by_the_clock_of_its_rule(
    workspace: Workspace, start: str, end: str, day: str, opens: str, closes: str
) -> None:
    asked = {"series": "s1", "start": start, "end": end, "reason": "r", "actor": "Ada"}
    number = triage.maintain(workspace, read(workspace).row(0, named=True), weekly=True, **asked)
    rule = list_maintenance(workspace).filter(id=number).row(0, named=True)
    assert (rule["weekdays"], rule["opens"], rule["closes"]) == (day, opens, closes)


def test_an_event_is_shown_by_the_detection_that_found_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(source: str, *names: str) -> str | None:
        here = [{"id": name, "dataset": "other" if name == "elsewhere" else "plant"} for name in names]
        monkeypatch.setattr(triage, "list_detections", lambda _: here)
        record = triage.find_detection(workspace, {"dataset": "plant", "source": source})
        return None if record is None else str(record["id"])

    assert found("detect:b", "a", "b") == "b"
    assert found("detect:gone", "elsewhere", "a", "b") == "a", "else the newest of the data set"
    assert found("watch:live", "elsewhere") is None
    one, whole = "batch/nightly/2026-11-27T14-00-00Z", "batch/nightly"
    assert found("batch:nightly@2026-11-27T14:00:00Z", "a", one) == one
    assert found("batch:nightly@2026-11-27T14:00:00Z", "a", one, whole) == whole, "it also has what followed"
