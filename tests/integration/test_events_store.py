"""The event store, on SQLite and on a real PostgreSQL: stored once, only moving forward, judged by people, audited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.data.event_store import FROM, EventStore, Recorded
from tsforge.data.store import SeriesStore

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2026, 3, 3, 5, tzinfo=UTC)
ONE, TWO = "a1b2c3d4e5f60718", "ffeeddccbbaa9988"


@pytest.fixture
def store(url: str) -> Iterator[EventStore]:
    opened = EventStore(url)
    yield opened
    opened.close()


def event(event_id: str = ONE, *, hours: int = 2, begin: Any = START, **changes: Any) -> dict[str, Any]:
    """One row of an event table: ``hours`` after its start it ends."""
    step: Any = timedelta(hours=1) if isinstance(begin, datetime) else 1
    row = {
        "event_id": event_id,
        "series_id": "a",
        "start": begin,
        "end": begin + hours * step,
        "peak_time": begin + step,
        "peak_score": 9.0,
        "p_value": 1e-3,
        "threshold": 4.0,
        "rule": "quantile(alpha=0.001)",
        "state": "open",
        "length": hours + 1,
        "continues": None,
        "variates": [{"variate": "x", "contribution": 3.0, "conditional": 1.0, "additive": 2.0}],
    }
    return row | changes


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    made = pl.DataFrame(list(rows), schema_overrides={"continues": pl.String})
    times = ["start", "end", "peak_time"]
    return made if made.schema["start"] == pl.Int64 else made.with_columns(pl.col(times).cast(pl.Datetime("us", "UTC")))


def record(store: EventStore, *rows: dict[str, Any], dataset: str = "plant", source: str = "detect:1") -> Recorded:
    return store.record(dataset, table(*rows), source=source, artifact="linear-1")


def only(store: EventStore, dataset: str = "plant") -> dict[str, Any]:
    return store.events(dataset).row(0, named=True)


def content(store: EventStore) -> tuple[pl.DataFrame, pl.DataFrame]:
    return store.events(), store.log()


def test_an_empty_store_answers(store: EventStore) -> None:
    assert store.events().height == store.log().height == store.datasets().height == 0
    assert store.suppressions().height == store.confirmed("plant").height == 0
    assert store.events().schema["start"] == pl.Datetime("us", "UTC")
    with pytest.raises(DataError, match="no event was ever stored here"):
        store.event(ONE)
    with pytest.raises(DataError, match="no event"):
        store.set_state(ONE, "confirmed", actor="eva")


def test_what_goes_in_comes_out(store: EventStore) -> None:
    assert record(store, event(more=5)) == Recorded(new=1, notify=(ONE,))
    row = only(store)
    for name, value in event().items():
        assert row[name] == value, name
    assert (row["human_state"], row["source"], row["artifact"]) == ("new", "detect:1", "linear-1")
    assert json.loads(row["facts"]) == {"more": 5}
    assert row["suppressed_by"] is row["acted_by"] is row["acted_at"] is None
    assert store.event(ONE[:6])["facts"] == {"more": 5}


def test_numbers_that_json_does_not_know_come_back(store: EventStore) -> None:
    """A variate that was constant may contribute without bound; events beside it are read as ever."""
    endless = [{"variate": 'é "x"', "contribution": float("inf"), "conditional": None, "additive": 1e-300}]
    record(store, event(), event(TWO, variates=endless), event("00aa11bb22cc33dd", variates=[]))
    found = {row["event_id"]: row["variates"] for row in store.events("plant").iter_rows(named=True)}
    assert found == {ONE: event()["variates"], TWO: endless, "00aa11bb22cc33dd": []}


def test_the_same_report_again_changes_nothing(store: EventStore) -> None:
    record(store, event(), event(TWO, state="closed"))
    before = content(store)
    assert record(store, event(), event(TWO, state="closed"), source="detect:2") == Recorded(unchanged=2)
    after = content(store)
    assert before[0].equals(after[0])
    assert before[1].equals(after[1])


def test_an_event_only_moves_forward(store: EventStore) -> None:
    record(store, event())
    longer = event(hours=5, peak_score=12.0, p_value=1e-5, threshold=4.5, variates=[{"variate": "y"}])
    longer["peak_time"] = START + timedelta(hours=4)
    assert record(store, longer).updated == 1
    moved = only(store)
    assert (moved["end"], moved["length"], moved["peak_score"]) == (START + timedelta(hours=5), 6, 12.0)
    assert (moved["peak_time"], moved["threshold"], moved["p_value"]) == (START + timedelta(hours=4), 4.5, 1e-5)
    assert moved["variates"][0]["variate"] == "y"
    # an earlier, shorter or lower report, also one that calls the shorter event closed
    for stale in (event(), event(state="closed"), event(hours=5, peak_score=11.0, p_value=0.1)):
        assert record(store, stale) == Recorded(unchanged=1)
    assert record(store, {**longer, "state": "closed"}).updated == 1
    assert record(store, longer) == Recorded(unchanged=1), "closed is not opened again"
    assert only(store)["state"] == "closed"
    assert store.log(ONE)["what"].to_list() == ["recorded", "closed"], "growth alone is no line of the trail"
    assert record(store, {**longer, "end": START + timedelta(hours=6)}).updated == 1
    assert store.log(ONE)["what"].to_list()[-1] == "extended", "a closed event that grows is"


def test_last_digits_of_a_score_are_no_change(store: EventStore) -> None:
    record(store, event())
    assert record(store, event(peak_score=9.0 * (1 + 1e-12), p_value=1e-3 * (1 - 1e-12))) == Recorded(unchanged=1)


def test_opened_and_closed_in_one_table(store: EventStore) -> None:
    done = record(store, event(), event(hours=4, state="closed"))
    assert done == Recorded(new=1, updated=1, notify=(ONE,))
    assert (only(store)["state"], only(store)["length"]) == ("closed", 5)


def test_another_rule_is_another_event(store: EventStore) -> None:
    record(store, event())
    assert record(store, event(TWO, rule="fixed(value=3)")).new == 1
    assert store.events()["rule"].n_unique() == 2


def test_an_id_never_changes_its_series_start_or_rule(store: EventStore) -> None:
    record(store, event())
    for wrong in (event(series_id="b"), event(begin=START + timedelta(hours=1)), event(rule="fixed(value=3)")):
        with pytest.raises(DataError, match="never change their start"):
            record(store, event(TWO), wrong)
    assert store.events().height == 1, "a refused table leaves nothing behind"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (table(event()).drop("rule"), "lacks rule"),
        (table(event(hours=-2)), "end before they start"),
        (table(event(state="odd")), "neither open nor closed"),
        (table(event()).with_columns(pl.col("start").dt.replace_time_zone(None)), "UTC datetimes or Int64"),
        (table(event(event_id=None)), "has no event_id"),
    ],
)
def test_what_is_no_event_table_is_refused(store: EventStore, wrong: pl.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.record("plant", wrong, source="detect:1", artifact="a")
    assert store.record("plant", table(event()).clear(), source="detect:1", artifact="a") == Recorded()


def test_integer_time(store: EventStore) -> None:
    record(store, event(begin=400))
    row = only(store)
    assert (row["start"], row["end"], row["peak_time"]) == (400, 402, 401)
    assert store.events(since=402).height == 1
    assert store.events(since=403).height == 0
    assert store.confirmed("plant").height == 0
    record(store, event(TWO), dataset="other")
    assert store.events("other").schema["start"] == pl.Datetime("us", "UTC")
    assert store.datasets().rows() == [("other", 1, False), ("plant", 1, True)]
    with pytest.raises(DataError, match="plant have integer time"):
        store.events()


def test_filters(store: EventStore) -> None:
    record(store, event(), event(TWO, series_id="b", state="closed", begin=START + timedelta(days=1)))
    store.set_state(TWO, "dismissed", actor="eva")
    ids = lambda **chosen: store.events(**chosen)["event_id"].to_list()  # noqa: E731
    assert ids() == [ONE, TWO]
    assert ids(state="open") == ids(state="new") == ids(series="a") == ids(state=["open", "new"]) == [ONE]
    assert ids(state=["closed", "dismissed"]) == ids(series=["b*"]) == ids(since="2026-03-04") == [TWO]
    assert ids(state=["new", "dismissed"]) == [ONE, TWO]
    assert ids(state=["open", "dismissed"]) == ids(dataset="other") == []
    with pytest.raises(DataError, match="no event state odd"):
        store.events(state="odd")


def test_the_version_moves_with_every_change_and_with_nothing_else(store: EventStore) -> None:
    seen = [store.version()]
    record(store, event())
    seen.append(store.version())
    record(store, event())
    store.events()
    assert store.version() == seen[-1]
    record(store, event(hours=3))  # growth, which is no line of the trail
    seen.append(store.version())
    store.comment(ONE, "hm", actor="eva")
    seen.append(store.version())
    store.set_state(ONE, "dismissed", actor="eva")
    seen.append(store.version())
    record(store, event(state="closed", hours=3))
    store.prune("2027-01-01", actor="eva")
    seen.append(store.version())
    assert len(set(seen)) == len(seen)


# --- people ---


def test_every_transition(store: EventStore) -> None:
    cases = [(state, action) for state in ("new", "acknowledged", "dismissed", "confirmed") for action in FROM]
    names = [f"event-{number:02d}-0" for number in range(len(cases))]
    record(store, *(event(name) for name in names))
    for name, (state, action) in zip(names, cases, strict=True):
        if state != "new":
            store.set_state(name, state, actor="first")
        target = "new" if action == "reopened" else action
        act = partial(store.set_state, name, action, actor="second", comment="me too")
        if state == target:
            change = act()
            assert (change.before, change.after) == (state, state)
            assert "already" in change.note
            assert state == "new" or "first" in change.note
        elif state in FROM[action]:
            change = act()
            assert (change.before, change.after, change.note) == (state, target, "")
            assert store.event(name)["acted_by"] == "second"
        else:
            with pytest.raises(DataError, match=rf"is {state} \(by first.*reopen it first; your comment was kept"):
                act()
        is_done = state == target or state in FROM[action]
        assert store.event(name)["human_state"] == (target if is_done else state), (state, action)
        last = store.log(name).row(-1, named=True)
        assert (last["comment"], last["actor"]) == ("me too", "second"), "a comment is never lost"
    with pytest.raises(DataError, match="no action 'closed'"):
        store.set_state(names[0], "closed", actor="eva")


def test_what_people_say_survives_what_machines_report(store: EventStore) -> None:
    record(store, event())
    store.set_state(ONE, "dismissed", actor="eva", comment="cleaning")
    record(store, event(hours=7, state="closed", peak_score=99.0))
    row = only(store)
    assert (row["human_state"], row["state"], row["peak_score"]) == ("dismissed", "closed", 99.0)


def test_a_stale_page_is_told(store: EventStore) -> None:
    record(store, event())
    store.set_state(ONE, "acknowledged", actor="eva")
    with pytest.raises(DataError, match=r"is acknowledged by now \(by eva.*not new"):
        store.set_state(ONE, "dismissed", actor="bob", expected="new")
    assert store.set_state(ONE, "dismissed", actor="bob", expected="acknowledged").after == "dismissed"


def test_comments_are_counted(store: EventStore) -> None:
    record(store, event())
    store.comment(ONE, " pump was opened \n", actor="eva")
    store.set_state(ONE, "acknowledged", actor="bob", comment="on it")
    assert only(store)["comments"] == 2
    assert store.log(ONE)["comment"].drop_nulls().to_list() == ["pump was opened", "on it"]
    store.comment(ONE, "two lines\r\n\tof text \u2013 \U0001f527\u200d", actor="eva")
    assert store.log(ONE)["comment"].drop_nulls().to_list()[-1] == "two lines\n\tof text \u2013 \U0001f527\u200d"
    for words, message in (
        ("  ", "is empty"),
        ("x" * 20_001, "at most 20000"),
        ("a\x00b", "plain text"),
        ("a\x1b[31mred\x9b0m", r"holds 2 control signs \(first: '\\x1b'\): leave them out"),
        ("over\rwritten", "control signs"),
    ):
        with pytest.raises(DataError, match=message):
            store.comment(ONE, words, actor="eva")
    for who in ("", " \n", "x" * 201, "a\x1b[2J"):
        with pytest.raises(ConfigError, match="say who acts"):
            store.comment(ONE, "hello", actor=who)


def test_ids_may_be_short_but_not_ambiguous(store: EventStore) -> None:
    record(store, event(), event(ONE[:8] + "00000000", series_id="b"))
    record(store, event(), dataset="other")
    with pytest.raises(DataError, match="too short"):
        store.set_state("a1b2c", "confirmed", actor="eva")
    with pytest.raises(DataError, match="names 3 events"):
        store.set_state(ONE[:8], "confirmed", actor="eva")
    with pytest.raises(DataError, match="names 2 events.*other"):
        store.set_state(ONE, "confirmed", actor="eva")
    with pytest.raises(DataError, match="no event 'a1b2c3d5'"):
        store.set_state("a1b2c3d5", "confirmed", actor="eva")
    with pytest.raises(DataError, match="no event 'a1b2%%'"):
        store.comment("a1b2%%", "x", actor="eva")
    assert store.set_state(ONE, "confirmed", actor="eva", dataset="other").dataset == "other"
    assert store.events("plant")["human_state"].unique().to_list() == ["new"]


def test_missed_anomalies_are_labelled(store: EventStore) -> None:
    label = {"series": "a", "start": "2026-03-01T05:00", "end": "2026-03-01T07:00", "actor": "eva"}
    made = store.label("plant", **label, variates=["y", "x"], comment="valve stuck")
    assert made.after == "confirmed"
    row = only(store)
    assert (row["rule"], row["state"], row["human_state"], row["acted_by"]) == ("label", "closed", "confirmed", "eva")
    assert [item["variate"] for item in row["variates"]] == ["y", "x"]
    assert row["peak_score"] is None
    again = store.label("plant", **{**label, "actor": "bob"}, comment="saw it too")
    assert "labelled already by eva" in again.note
    assert store.events().height == 1
    assert store.log(made.event_id)["comment"].to_list() == ["valve stuck", "saw it too"]
    store.set_state(made.event_id, "reopened", actor="bob")
    store.set_state(made.event_id, "dismissed", actor="bob")
    assert store.confirmed("plant").height == 0
    with pytest.raises(DataError, match="before it starts"):
        store.label("plant", "a", "2026-03-02", "2026-03-01", actor="eva")


def test_confirmed_spans_now_and_as_they_were(store: EventStore) -> None:
    record(store, event(), event(TWO, series_id="b"))
    store.set_state(ONE, "confirmed", actor="eva")
    moments = store.log(ONE)["when"].to_list()
    store.set_state(ONE, "reopened", actor="bob")
    store.set_state(TWO, "confirmed", actor="bob")
    now = store.confirmed("plant")
    assert now.select("series_id", "event_id", "confirmed_by").rows() == [("b", TWO, "bob")]
    assert (now["start"][0], now["end"][0]) == (START, START + timedelta(hours=2))
    then = store.confirmed("plant", made_until=moments[-1])
    assert then["event_id"].to_list() == [ONE]
    assert then["confirmed_at"].to_list() == [moments[-1]]
    assert store.confirmed("plant", made_until=moments[0] - timedelta(seconds=1)).height == 0
    assert store.confirmed("other").height == 0


# --- rules and windows ---


def test_silenced_events_are_stored_and_counted(store: EventStore) -> None:
    number = store.suppress({"series": "a*", "reason": "being rebuilt"}, actor="eva")
    assert store.silenced("plant", table(event(), event(TWO, series_id="b"))) == {ONE: number}
    assert store.events().height == 0, "asking stores nothing"
    done = record(store, event(), event(TWO, series_id="b"))
    assert done == Recorded(new=2, suppressed=1, notify=(TWO,))
    assert store.events()["suppressed_by"].to_list() == [number, None]
    rules = store.suppressions()
    assert rules.select("id", "kind", "series", "reason", "author", "hits").rows() == [
        (number, "rule", "a*", "being rebuilt", "eva", 1)
    ]
    assert store.log(ONE).select("what", "suppression").rows()[-1] == ("suppressed", number)


def test_a_fault_that_outlasts_its_window_comes_to_the_surface(store: EventStore) -> None:
    window = {"reason": "filter change", "start": START, "end": START + timedelta(hours=3)}
    number = store.suppress(window, actor="eva")
    assert record(store, event()).suppressed == 1
    assert record(store, event(hours=3)).notify == (), "still inside"
    assert record(store, event(hours=4)).notify == (ONE,)
    assert only(store)["suppressed_by"] is None
    assert store.log(ONE)["what"].to_list() == ["recorded", "suppressed", "surfaced"]
    assert record(store, event(hours=4)) == Recorded(unchanged=1), "told once"
    assert store.suppressions()["hits"].to_list() == [1]
    assert number == 1


def test_a_new_rule_silences_what_nobody_judged_yet_and_a_lifted_one_nothing_more(store: EventStore) -> None:
    record(store, event(), event(TWO, series_id="ab"))
    store.set_state(TWO, "acknowledged", actor="bob")
    number = store.suppress({"series": "a*", "reason": "noise"}, actor="eva")
    assert store.events()["suppressed_by"].to_list() == [number, None]
    store.lift(number, actor="bob", comment="fixed")
    assert store.suppressions().height == 0
    lifted = store.suppressions(all=True).row(0, named=True)
    assert (lifted["lifted_by"], lifted["hits"]) == ("bob", 1)
    assert store.events()["suppressed_by"].to_list() == [number, None], "what was silenced stays so until it goes on"
    assert record(store, event(hours=3)).notify == (ONE,)
    with pytest.raises(DataError, match="lifted already by bob"):
        store.lift(number, actor="eva")
    with pytest.raises(DataError, match=r"no suppression rule 99 \(known: 1\)"):
        store.lift(99, actor="eva")
    trail = store.log()
    assert trail.filter(pl.col("what") == "rule lifted")["comment"].to_list() == ["fixed"]


def test_a_seen_event_is_never_hidden_again(store: EventStore) -> None:
    record(store, event(peak_score=20.0))
    store.suppress({"series": "zzz*", "reason": "other"}, actor="eva")
    number = store.suppress({"series": "a", "score_below": 10.0, "reason": "small ones"}, actor="eva")
    assert record(store, event(peak_score=20.0, hours=5)).notify == ()
    assert only(store)["suppressed_by"] is None
    assert record(store, event(TWO, peak_score=9.0)).suppressed == 1
    assert record(store, event(TWO, peak_score=11.0, hours=3)).notify == (TWO,), "it grew past the rule"
    assert store.suppressions(all=True).filter(pl.col("id") == number)["hits"].item() == 1


# --- the audit trail ---


def test_the_database_refuses_to_change_or_delete_a_line(store: EventStore) -> None:
    record(store, event())
    before = store.log()
    attempts = ["UPDATE tsf_event_log SET actor = 'mallory'", "DELETE FROM tsf_event_log"]
    if store.engine.dialect.name == "postgresql":
        attempts += ["TRUNCATE tsf_event_log"]
    else:
        attempts += [
            "INSERT OR REPLACE INTO tsf_event_log (id, moment, actor, what) VALUES (1, '2020-01-01', 'mallory', 'x')"
        ]
    for statement in attempts:
        with pytest.raises(DBAPIError, match="append-only"), store.engine.begin() as connection:
            connection.execute(text(statement))
    assert store.log().equals(before)


def test_no_code_of_ours_changes_or_deletes_a_line() -> None:
    """Every statement that names the trail's table is an insert or a select."""
    found = []
    for path in sorted((ROOT / "tsforge").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        found += [
            f"{path.name}: {hit}" for hit in re.findall(r"(?:update|delete)\(\s*(?:event_tables\.)?LOG\b", source)
        ]
        if path.name != "event_tables.py":
            found += [f"{path.name}: {hit}" for hit in re.findall(r"tsf_event_log", source)]
    assert found == []


def test_every_change_has_its_line(store: EventStore) -> None:
    record(store, event())
    store.set_state(ONE, "acknowledged", actor="eva")
    store.comment(ONE, "hm", actor="eva")
    store.set_state(ONE, "confirmed", actor="bob", comment="real")
    store.suppress({"series": "q", "reason": "why"}, actor="eva")
    trail = store.log()
    assert trail["id"].is_sorted()
    assert trail.select("actor", "what", "from", "to", "comment").rows() == [
        ("detect:1", "recorded", None, "open", None),
        ("eva", "acknowledged", "new", "acknowledged", None),
        ("eva", "commented", None, None, "hm"),
        ("bob", "confirmed", "acknowledged", "confirmed", "real"),
        ("eva", "rule added", None, None, "why"),
    ]
    assert store.log(dataset="plant").height == 4
    with pytest.raises(DataError, match="knows no event"):
        store.log("0123456789abcdef")


def test_a_change_without_its_line_is_no_change(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the trail in the middle of a change: the change goes too."""
    record(store, event())

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("tsforge.data.event_store.write_log", full)
    with pytest.raises(RuntimeError, match="disk full"):
        store.set_state(ONE, "confirmed", actor="eva")
    assert only(store)["human_state"] == "new"


def test_pruning_keeps_the_trail_and_what_calibrations_rest_on(store: EventStore) -> None:
    names = ["old-new-1", "old-open-1", "old-confirmed", "old-dismissed-open", "young-1"]
    old, young = START, START + timedelta(days=30)
    rows = [
        event(names[0], state="closed", begin=old),
        event(names[1], state="open", begin=old),
        event(names[2], state="closed", begin=old),
        event(names[3], state="open", begin=old),
        event(names[4], state="closed", begin=young),
    ]
    record(store, *rows)
    store.set_state(names[2], "confirmed", actor="eva")
    store.set_state(names[3], "dismissed", actor="eva", comment="noise")
    trail = store.log()
    assert store.prune(START + timedelta(days=1), actor="eva", dataset="other") == 0
    assert store.prune(START + timedelta(days=1), actor="eva") == 2
    assert sorted(store.events()["event_id"]) == sorted([names[1], names[2], names[4]])
    assert store.log().head(trail.height).equals(trail), "no line went"
    assert store.log(names[3])["what"].to_list() == ["recorded", "dismissed", "pruned"]
    assert store.log(names[3])["from"].to_list()[-1] == "dismissed"
    assert store.confirmed("plant")["event_id"].to_list() == [names[2]]
    # old rows judged again do not bring them back
    assert record(store, *rows) == Recorded(unchanged=3, pruned=2)
    with pytest.raises(DataError, match="was pruned"):
        store.set_state(names[0], "confirmed", actor="eva")


def test_events_and_observations_share_a_database(store: EventStore, url: str) -> None:
    record(store, event())
    series = SeriesStore(url)
    assert series.datasets().height == 0
    series.close()


def test_a_newer_format_is_refused(store: EventStore, url: str) -> None:
    record(store, event())
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE tsf_info SET value = '99' WHERE key = 'event_format'"))
    later = EventStore(url)
    for use in (lambda: later.events(), lambda: record(later, event(TWO))):
        with pytest.raises(BackendError, match="event format 99.*upgrade tsforge"):
            use()
    for value in ("abc", ""):
        with store.engine.begin() as connection:
            statement = text("UPDATE tsf_info SET value = :value WHERE key = 'event_format'")
            connection.execute(statement, {"value": value})
        for use in (lambda: later.events(), lambda: record(later, event(TWO))):
            with pytest.raises(BackendError, match="damaged"):
                use()
    later.close()


@pytest.mark.parametrize("content", ["torn", "[]"])
def test_facts_that_cannot_be_read_are_named_and_stop_no_new_event(store: EventStore, content: str) -> None:
    record(store, event())
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE tsf_events SET facts = :content"), {"content": content})
    with pytest.raises(BackendError, match=f"column facts of event '{ONE}' of 'plant'.*tsf_events.*backup"):
        store.event(ONE)
    assert store.events().height == 1, "what is known of it is shown"
    record(store, event(), event(TWO))
    assert sorted(store.events()["event_id"]) == sorted([ONE, TWO])


def test_reasons_are_plain_text_and_stored_ones_go_on_silencing(store: EventStore) -> None:
    with pytest.raises(
        ConfigError, match=r"reason: say why in plain text; it holds 1 control signs \(first: '\\x1b'\)"
    ):
        store.suppress({"reason": "pump\x1b[2J works", "series": "a"}, actor="anna")
    assert store.suppressions().height == 0
    rule = store.suppress({"reason": "pump works", "series": "a"}, actor="anna")
    with store.engine.begin() as connection:  # as an older version stored it
        stored = '{"reason": "bell \\u0007 here", "series": "a"}'
        connection.execute(text("UPDATE tsf_suppressions SET rule = :rule"), {"rule": stored})
    record(store, event())
    assert only(store)["suppressed_by"] == rule
