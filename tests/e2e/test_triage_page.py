"""The triage page, headless: queue, filters, links, actions, bulk, maintenance, health, and what can be missing."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from streamlit.testing.v1 import AppTest

from tsforge.app.events import act, audit_trail, list_events, list_maintenance, open_events
from tsforge.core.workspace import Workspace


@pytest.fixture
def home(detected_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it that a test may change, set as TSFORGE_HOME."""
    root = tmp_path / "home"
    shutil.copytree(detected_workspace, root)
    monkeypatch.setenv("TSFORGE_HOME", str(root))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Workspace.open(root)


def draw(view: str = "triage", **query: str) -> Any:
    test = AppTest.from_string(f"from dashboards.views import {view}\n{view}.show()\n", default_timeout=120)
    for name, value in query.items():
        test.query_params[name] = value
    return checked(test.run())


def checked(page: Any) -> Any:
    assert not page.exception
    return page


def button(page: Any, label: str) -> Any:
    return next(found for found in page.button if found.label.startswith(label))


def signed(page: Any, name: str = "Ada", words: str = "") -> Any:
    """Write a name, and a comment."""
    page.text_input(key="triage-author").set_value(name)
    return checked(page.text_input(key="triage-words").set_value(words).run())


def listed(page: Any) -> pl.DataFrame:
    return pl.DataFrame(page.dataframe[0].value)


def stored(home: Workspace) -> pl.DataFrame:
    return list_events(home).table


def single(home: Workspace) -> dict[str, Any]:
    """The newest event that is alone in its incident."""
    alone = stored(home).filter(pl.len().over("incident_id") == 1).sort("start")
    return alone.row(-1, named=True)


def link(event: dict[str, Any]) -> str:
    return f"{event['dataset']}/{event['event_id']}"


def test_the_queue_has_a_row_an_incident_and_the_first_one_is_open_below(home: Workspace) -> None:
    events = stored(home)
    incidents = events["incident_id"].n_unique()
    assert 1 < incidents < events.height, "the data has an incident of several events"
    page = draw()
    assert not page.error
    assert listed(page).height == incidents
    assert listed(page)["events"].sum() == events.height
    newest = events.sort("start")["incident_id"][-1]
    assert page.query_params["event"] == f"plant/{newest}"
    charts = [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]
    names = {trace.get("name") for trace in charts[0]["data"]}
    assert {"observed", "expected", "score", "threshold", "usual (99 % of quiet rows)"} <= names
    assert any(trace["type"] == "bar" for trace in charts[1]["data"])
    assert "recorded" in page.dataframe[-1].value["what"].tolist()


def test_nobody_acts_without_a_name(home: Workspace) -> None:
    page = draw()
    for label in ("Acknowledge", "Dismiss", "Confirm", "Comment"):
        assert button(page, label).disabled
    assert any("Write your name first" in note.value for note in page.caption)
    assert not button(signed(page), "Acknowledge").disabled


def test_acknowledged_events_stay_and_the_trail_knows_who_and_why(home: Workspace) -> None:
    event = single(home)
    page = signed(draw(event=link(event)), "Ada", "I look at the pump")
    rows = listed(page).height
    page = checked(button(page, "Acknowledge").click().run())
    assert any("1 event acknowledged" in note.value for note in page.success)
    assert listed(page).height == rows
    assert any("Acknowledged by Ada" in note.value for note in draw(event=link(event)).caption)
    assert page.text_input(key="triage-words").value == ""
    line = audit_trail(home, event["event_id"], "plant").row(-1, named=True)
    assert (line["actor"], line["what"], line["comment"]) == ("Ada", "acknowledged", "I look at the pump")
    assert not any("acknowledged." in note.value for note in checked(page.run()).success), "it is said once"


def test_a_dismissed_event_leaves_the_list_and_the_next_one_comes_up(home: Workspace) -> None:
    page = draw()
    before, shown = listed(page).height, page.query_params["event"]
    page = checked(button(signed(page), "Dismiss").click().run())
    assert listed(page).height == before - 1
    assert page.query_params["event"] != shown
    gone = draw(show="dismissed")
    assert listed(gone)["state"].to_list() == ["dismissed"]
    page = checked(button(signed(gone), "Reopen").click().run())
    assert any("Nothing to do" in note.value for note in page.success), "nothing is dismissed any more"
    assert listed(draw()).height == before


def test_acknowledging_keeps_the_place_so_that_one_key_walks_the_queue(home: Workspace) -> None:
    page = signed(draw())
    queued = list(listed(page).iter_rows(named=True))
    assert len(queued) > 2
    page = checked(button(page, "Next").click().run())
    seen = [page.query_params["event"]]
    for _ in range(len(queued) - 2):
        page = checked(button(page, "Acknowledge").click().run())
        assert any(note.value.startswith("2 of") for note in page.caption), "not thrown to the end"
        seen.append(page.query_params["event"])
    assert len(set(seen)) == len(queued) - 1, "a new row each time"


def test_the_address_of_the_browser_wins_over_what_the_page_remembers(home: Workspace) -> None:
    page = draw()
    first = dict(page.query_params)
    page = checked(button(page, "Next").click().run())
    page = checked(page.selectbox(key="choice-show").set_value("all").run())
    assert page.query_params["event"] != first["event"]
    page.query_params.clear()
    for name, value in first.items():  # the Back button
        page.query_params[name] = value
    page = checked(page.run())
    assert page.selectbox(key="choice-show").value == "todo"
    assert dict(page.query_params) == first
    assert any(note.value.startswith("1 of") for note in page.caption)


def test_names_and_addresses_are_no_markup(home: Workspace) -> None:
    page = draw(event="[press here](http://evil.example)", series="[a](http://evil.example)")
    shown = [note.value for note in (*page.warning, *page.info, *page.caption, *page.markdown)]
    assert any("press here" in text for text in shown)
    assert not any("](http" in text.replace(r"\](", "") and "`" not in text for text in shown)
    page = signed(draw(), "*Ada* [x](y)")
    page = checked(button(page, "Acknowledge").click().run())
    acted = next(name for name, by in stored(home).select("event_id", "acted_by").iter_rows() if by)
    told = draw(event=f"plant/{acted}")
    assert any(r"\*Ada\* \[x\](y)" in note.value for note in told.caption)


def test_keys_walk_through_the_queue(home: Workspace) -> None:
    page = draw()
    first = page.query_params["event"]
    assert button(page, "Previous").disabled
    page = checked(button(page, "Next").click().run())
    assert page.query_params["event"] != first
    assert any(note.value.startswith("2 of") for note in page.caption)
    page = checked(button(page, "Previous").click().run())
    assert page.query_params["event"] == first


def test_a_link_to_an_event_that_the_filters_hide_still_shows_it(home: Workspace) -> None:
    event = single(home)
    act(home, [event["event_id"]], "dismissed", by="Noor", text="sensor test")
    page = draw(event=link(event))
    assert any("filters above hide this event" in note.value for note in page.caption)
    assert any("Dismissed by Noor" in note.value for note in page.caption)
    gone = draw(event="plant/0123456789abcdef")
    assert any("0123456789abcdef" in note.value for note in gone.warning)
    assert gone.dataframe, "the queue is there all the same"


def test_a_link_to_one_event_of_an_incident_opens_that_one(home: Workspace) -> None:
    several = stored(home).filter(pl.len().over("incident_id") > 1)
    weakest = several.filter(incident_id=several["incident_id"][0]).sort("peak_score").row(0, named=True)
    page = draw(event=link(weakest))
    assert any(weakest["series_id"] in text.value and text.value.startswith("#####") for text in page.markdown)
    assert any(f"event `{weakest['event_id']}`" in note.value for note in page.caption)
    assert page.query_params["event"] == link(weakest)


def test_filters_are_part_of_the_address(home: Workspace) -> None:
    event = single(home)
    act(home, [event["event_id"]], "confirmed", by="Noor")
    assert listed(draw(show="confirmed")).height == 1
    mine = draw(series=event["series_id"][-3:], show="all")
    wanted = stored(home).filter(series_id=event["series_id"])["incident_id"].n_unique()
    assert listed(mine).height == wanted
    nothing = draw(series="no such")
    assert not nothing.success, "a filter that matches nothing is no good news"
    assert any("no such" in note.value for note in nothing.info)
    page = draw()
    page = checked(page.text_input(key="triage-series").set_value("series_1").run())
    assert page.query_params["series"] == "series_1"
    recent = stored(home).filter(pl.col("end") >= pl.col("end").max().dt.offset_by("-100d"))
    assert recent.height == stored(home).height
    assert listed(draw(since="30d")).height > 0


def test_several_rows_are_settled_at_once(home: Workspace) -> None:
    page = draw(several="1")
    rows = listed(page).height
    assert any("Tick rows" in note.value for note in page.caption)
    key = page.session_state["triage-table"]
    page.session_state[key] = {"selection": {"rows": list(range(rows)), "columns": [], "cells": []}}
    page = signed(page, "Noor", "all of it the storm")
    events = stored(home).height
    assert any(f"{events} events selected" in note.value for note in page.caption)
    page = checked(button(page, f"Dismiss {events}").click().run())
    assert set(stored(home)["human_state"]) == {"dismissed"}
    assert set(stored(home)["comments"]) == {1}
    assert any("Nothing to do" in note.value for note in page.success)


def test_somebody_else_was_faster(home: Workspace) -> None:
    event = single(home)
    page = signed(draw(event=link(event)))
    act(home, [event["event_id"]], "dismissed", by="Noor")
    page = checked(button(page, "Confirm").click().run())
    assert any("dismissed by now (by Noor" in note.value for note in page.error)
    assert stored(home).filter(event_id=event["event_id"])["human_state"].item() == "dismissed"


def test_a_comment_changes_nothing_but_the_trail(home: Workspace) -> None:
    event = single(home)
    page = signed(draw(event=link(event)), words="same as last week")
    page = checked(button(page, "Comment").click().run())
    after = stored(home).filter(event_id=event["event_id"])
    assert (after["human_state"].item(), after["comments"].item()) == ("new", 1)
    assert "same as last week" in page.dataframe[-1].value["comment"].tolist()


def test_a_maintenance_window_is_set_up_from_an_event(home: Workspace) -> None:
    event = single(home)
    page = signed(draw(event=link(event)))
    assert next(box for box in page.text_input if box.label.startswith("From")).value.endswith(":00")
    page = checked(button(page, "Set up").click().run())
    assert any("reason" in note.value for note in page.error), "a window without a reason"
    next(box for box in page.text_input if box.label == "Reason").set_value("new bearings")
    page = checked(button(page, "Set up").click().run())
    assert any("is in force" in note.value for note in page.success)
    rule = list_maintenance(home).row(0, named=True)
    assert (rule["series"], rule["reason"], rule["author"]) == (event["series_id"], "new bearings", "Ada")
    assert stored(home).filter(event_id=event["event_id"])["suppressed_by"].item() == rule["id"]
    assert any("filters above hide this event" in note.value for note in page.caption)
    assert any("Rule 1 by Ada: new bearings" in note.value for note in page.caption)
    assert any(found.label.startswith("Silenced") for found in page.toggle)
    everything = draw(silenced="1")
    assert listed(everything).height == listed(page).height + 1


def test_earlier_events_tell_what_people_said_of_them(home: Workspace) -> None:
    events = stored(home).sort("start")
    last = events.row(-1, named=True)
    act(home, events["event_id"][:-1].to_list(), "dismissed", by="Noor", text="wind")
    page = draw(event=link(last))
    told = [note.value for note in page.caption if note.value.startswith("Of ")]
    assert told, "nothing alike"
    assert "dismissed" in told[0]
    alike = page.dataframe[-2].value
    assert set(alike["comment"]) <= {"wind", ""}
    assert "wind" in set(alike["comment"])


def test_events_that_no_detection_shows_have_their_stored_values(home: Workspace) -> None:
    shutil.rmtree(home.reports)
    page = draw()
    assert not page.error
    assert any("Stored values only" in note.value for note in page.caption)
    assert page.get("plotly_chart")


def test_a_damaged_detection_does_not_hide_the_event(home: Workspace) -> None:
    for table in home.reports.rglob("scores.parquet"):
        table.write_bytes(b"PAR1 and then nothing")
    page = draw()
    assert not page.error
    assert any("damaged" in note.value for note in page.warning)
    assert any("Stored values only" in note.value for note in page.caption)


def test_a_stale_model_is_named_above_the_queue(home: Workspace) -> None:
    place = next(home.reports.rglob("report.json"))
    facts = json.loads(place.read_text())
    facts["series"]["series_1"] |= {"is_stale": True, "alarm_rate_ratio": 11.6}
    place.write_text(json.dumps(facts))
    page = draw()
    assert any("series_1 alarmed 12 times as often" in note.value for note in page.warning)
    assert f"detection={place.parent.name}" in page.warning[0].value


def test_the_link_of_a_stale_series_is_quoted(home: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from dashboards.views import triage as view

    monkeypatch.setattr(view.triage, "stale_series", lambda report: {"a b&c=[1](d)": 12.0})
    assert "&series=a%20b%26c%3D%5B1%5D%28d%29)" in draw().warning[0].value


def test_the_anomaly_page_shows_how_the_alarm_rate_moved(home: Workspace) -> None:
    page = draw("anomalies")
    assert "Model health" in [head.value for head in page.subheader]
    assert any("of normal rows should alarm" in note.value for note in page.caption)
    figure = json.loads(page.get("plotly_chart")[-1].proto.spec)
    assert {trace["name"] for trace in figure["data"]} == {"series_0", "series_1"}
    assert len(figure["layout"]["shapes"]) == 2


def test_data_sets_with_and_without_a_clock_are_shown_one_at_a_time(home: Workspace) -> None:
    def record(dataset: str, moment: Any) -> None:
        columns = {"event_id": "e" * 16, "series_id": "s", "start": moment, "end": moment, "peak_time": moment}
        numbers = {"peak_score": 2.0, "p_value": None, "threshold": 1.0, "rule": "r", "state": "open", "variates": []}
        with open_events(home) as store:
            store.record(dataset, pl.DataFrame([columns | numbers]), source="other", artifact="m")

    record("clocked", datetime(2026, 1, 1, 3, tzinfo=UTC))
    both = draw()
    assert both.query_params["dataset"] == "*"
    assert listed(both).height == stored(home)["incident_id"].n_unique(), "one of them in no incident"
    record("counted", 7)
    page = draw()
    assert page.query_params["dataset"] == "clocked"
    assert not page.error
    assert any("No row of this series" in note.value for note in page.info), "the series store does not know it"
    counted = draw(dataset="counted")
    assert not counted.error
    assert any("still going on" in text.value for text in counted.markdown)


@pytest.mark.parametrize(
    ("hours", "length", "state", "said"),
    [
        (0, 1, "closed", "1 row"),
        (2, 3, "closed", "3 rows, 2 h 0 min"),
        (2, None, "open", "2 h 0 min, going on"),
        (0, None, "closed", "1 row"),
    ],
)
def test_how_long_an_event_lasted_in_rows_and_time(hours: int, length: int | None, state: str, said: str) -> None:
    from dashboards.views.triage import _lasted

    start = datetime(2026, 1, 1, tzinfo=UTC)
    row = {"start": start, "end": start + timedelta(hours=hours), "length": length, "state": state}
    assert _lasted(row) == said
    counted = {"start": 5, "end": 5 + hours, "length": length, "state": "closed"}
    assert _lasted(counted) == f"{hours + 1} row{'s' if hours else ''}"
