"""Incidents of events that are told one by one: against a naive closure of what was told, delivered in any pieces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tsforge.app.watch.incidents import Grouping
from tsforge.app.watch.sinks import StoredEvents
from tsforge.app.watch.webhook import DeliveryError
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace
from tsforge.data import event_store
from tsforge.data.event_store import EventStore
from tsforge.data.grid import TimeGrid
from tsforge.data.watch_state import Outgoing

RULE = "quantile(alpha=0.001)"
START = datetime(2026, 3, 3, 5, tzinfo=UTC)


@dataclass(frozen=True)
class Told:
    """One transition: an event with the span that is known of it, at ``moment``."""

    moment: int
    event: str
    start: int
    end: int
    group: str | None
    transition: str

    def outgoing(self, dataset: str, *, generation: int = 1, artifact: str = "net", hourly: bool = False) -> Outgoing:
        """Return it as a watch sends it."""
        start, end = ((START + timedelta(hours=row)).isoformat() if hourly else row for row in (self.start, self.end))
        state = "closed" if self.transition == "closed" else "open"
        record = {
            "dataset": dataset,
            "watch": "plant",
            "artifact": artifact,
            "generation": generation,
            "event_id": self.event,
            "series_id": f"of {self.event}",
            "start": start,
            "end": end,
            "peak_time": start,
            "peak_score": 9.0,
            "rule": RULE,
            "state": state,
            "variates": [{"variate": "x"}],
        }
        key = {"generation": generation, "event_id": self.event, "transition": self.transition}
        return Outgoing(seq=0, record=json.dumps(record), **key)


def life(event: str, start: int, end: int, group: str | None = "g", *, known: int = 0, late: int = 1) -> list[Told]:
    """Return both transitions of an event: opened when ``known`` rows after its first are seen, closed ``late`` rows
    after its last."""
    seen = min(end, start + known)
    opened = Told(seen, event, start, seen, group, "opened")
    return [opened, Told(end + late, event, start, end, group, "closed")]


def grouping(told: Sequence[Told], gap: int, *, hourly: bool = False, group_by: str = "all") -> Grouping:
    groups = {f"of {item.event}": item.group for item in told if item.group is not None}
    grid = TimeGrid(START, "1h") if hourly else TimeGrid(0, "1i")
    return Grouping(artifact="net", grid=grid, groups=groups, group_by=group_by, gap=gap)


def naive(told: Sequence[Told], gap: int) -> dict[str, str | None]:
    """The incident of each event by what was told of it: all pairs are merged until nothing moves."""
    last = {item.event: item for item in sorted(told, key=lambda item: item.end)}
    sets = [{name} for name, item in last.items() if item.group is not None]
    moved = True
    while moved:
        moved = False
        for one in sets:
            for two in sets:
                pairs = [(last[a], last[b]) for a in one for b in two]
                near = any(a.group == b.group and max(a.start, b.start) - min(a.end, b.end) <= gap for a, b in pairs)
                if one is not two and near:
                    one |= two
                    sets.remove(two)
                    moved = True
                    break
            if moved:
                break
    found: dict[str, str | None] = dict.fromkeys(last)
    for members in sets:
        first = min((last[name] for name in members), key=lambda item: item.start)
        words = f"incident\n{first.group}\n{first.start}\n{RULE}"
        found |= dict.fromkeys(members, hashlib.sha256(words.encode()).hexdigest()[:16])
    return found


def incidents(store: EventStore, dataset: str) -> dict[str, str | None]:
    return dict(store.events(dataset).select("event_id", "incident_id").iter_rows())


def content(store: EventStore) -> list[list[Any]]:
    with store.engine.begin() as connection:
        return [
            connection.execute(text(f"SELECT * FROM {name} ORDER BY 1, 2, 3")).all()
            for name in ("tsf_events", "tsf_incident_members", "tsf_event_log")
        ]


@pytest.fixture
def sink(url: str, tmp_path: Path) -> Iterator[StoredEvents]:
    with closing(StoredEvents(Workspace(root=tmp_path, database_url=url, tracking_uri=""))) as opened:
        yield opened


@pytest.fixture
def store(url: str) -> Iterator[EventStore]:
    with closing(EventStore(url)) as opened:
        yield opened


@pytest.fixture(scope="module")
def in_one_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoredEvents, EventStore, Iterator[int]]]:
    folder = tmp_path_factory.mktemp("incidents")
    url = f"sqlite:///{folder / 'store.db'}"
    workspace = Workspace(root=folder, database_url=url, tracking_uri="")
    with closing(StoredEvents(workspace)) as sink, closing(EventStore(url)) as store:
        yield sink, store, count()


shape = st.tuples(st.integers(-20, 40), st.integers(0, 9), st.integers(-1, 1), st.integers(0, 3), st.integers(0, 4))


@settings(deadline=None, max_examples=30)
@given(st.lists(shape, min_size=2, max_size=9), st.integers(0, 4), st.data())
def test_at_any_moment_they_are_those_of_the_events_as_told(
    in_one_file: Any, shapes: list[tuple[int, int, int, int, int]], gap: int, data: st.DataObject
) -> None:
    """Deliveries of any size, and any part of what was delivered again: after a crash, or by a second such sink."""
    sink, store, numbers = in_one_file
    dataset = f"made{next(numbers)}"
    told: list[Told] = []
    for place, (start, length, group, known, late) in enumerate(shapes):
        label = None if group < 0 else f"g{group}"
        told += life(f"event{place}", start, start + length, label, known=known, late=late)
    told.sort(key=lambda item: item.moment)
    sink.grouping = grouping(told, gap)
    done = 0
    while done < len(told):
        size = data.draw(st.integers(1, 6), label="taken")
        sink.send([item.outgoing(dataset) for item in told[done : done + size]], 0)
        done = min(done + size, len(told))
        assert incidents(store, dataset) == naive(told[:done], gap)
        if data.draw(st.integers(0, 2), label="again") == 0:
            low = data.draw(st.integers(0, done - 1), label="from")
            high = data.draw(st.integers(low + 1, done), label="to")
            before = content(store)
            sink.send([item.outgoing(dataset) for item in told[low:high]], 0)
            assert content(store) == before, "not a byte is changed"


STORY = [*life("one", 0, 9), *life("two", 12, 15), *life("far", 40, 41), *life("odd", 3, 4, None)]
BRIDGE, LAST = life("bridge", 8, 13, known=5), life("last", 15, 16)


def send(sink: StoredEvents, told: Sequence[Told], **how: Any) -> None:
    sink.send([item.outgoing("plant", hourly=True, **how) for item in told], 0)


def test_a_late_event_moves_the_later_incident_into_the_earlier(sink: StoredEvents, store: EventStore) -> None:
    sink.grouping = grouping([*STORY, *BRIDGE], 0, hourly=True)
    send(sink, STORY)
    before = store.events("plant")
    version, trail = store.version(), store.log()
    names = incidents(store, "plant")
    assert len({names["one"], names["two"], names["far"], None}) == 4
    assert names["odd"] is None
    send(sink, BRIDGE)
    assert incidents(store, "plant") == names | {"two": names["one"], "bridge": names["one"]}
    assert store.version() != version, "cached reads are renewed"
    after = store.events("plant")
    moved = after.join(before, on="event_id", how="semi")
    same = [name for name in before.columns if name not in ("incident_id", "updated")]
    assert moved.select(same).equals(before.select(same)), "what is known and said of the moved event stays"
    assert store.log()[: trail.height].equals(trail)
    assert store.log()["event_id"][trail.height :].unique().to_list() == ["bridge"]


def test_events_and_incidents_are_one_transaction(
    sink: StoredEvents, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink.grouping = grouping([*STORY, *BRIDGE], 0, hourly=True)
    send(sink, STORY)
    before = content(store)

    def broken(*_: Any) -> None:
        raise BackendError("the server went away")

    with monkeypatch.context() as patch:
        patch.setattr(event_store, "move_events", broken)
        with pytest.raises(DeliveryError, match="the server went away"):
            send(sink, BRIDGE)
    assert content(store) == before
    send(sink, BRIDGE)
    assert content(store) != before


def test_generations_and_groupings_do_not_see_each_other(sink: StoredEvents, store: EventStore) -> None:
    """What is still on its way of an earlier generation goes on with its own incidents, or starts those of the new
    grouping; what another artifact found is left as it is."""
    sink.grouping = grouping([*STORY, *BRIDGE, *LAST], 0, hourly=True)
    send(sink, STORY)
    names = incidents(store, "plant")
    send(sink, BRIDGE, generation=2)
    alone = incidents(store, "plant")
    assert alone["two"] == names["two"], "the second generation has not told it"
    assert alone["bridge"] not in names.values()
    send(sink, LAST, generation=1)
    assert incidents(store, "plant")["last"] == names["two"]
    sink.grouping = replace(sink.grouping, gap=30)
    send(sink, life("far", 40, 42), generation=1)
    assert incidents(store, "plant")["far"] == names["far"], "a new incident, not the one of the first grouping"
    before = incidents(store, "plant")
    send(sink, life("two", 12, 19), generation=1, artifact="other")
    assert incidents(store, "plant") == before


def test_what_others_record_about_the_same_events_breaks_no_incident(sink: StoredEvents, store: EventStore) -> None:
    """``detect`` found the events first, or groups them otherwise; the next event of the watch still joins its own."""
    sink.grouping = grouping([*STORY, *BRIDGE], 0, hourly=True)
    found = [json.loads(item.outgoing("plant", hourly=True).record) for item in STORY if item.transition == "closed"]
    report = pl.DataFrame(found).with_columns(
        *(pl.col(name).str.to_datetime(time_unit="us", time_zone="UTC") for name in ("start", "end", "peak_time")),
        *(pl.lit(None, dtype=pl.Float64).alias(name) for name in ("p_value", "threshold")),
        incident_id=pl.lit("of detect"),
    )
    store.record("plant", report, source="detect:1", artifact="net")
    send(sink, STORY)
    mine = incidents(store, "plant")
    assert "of detect" not in {mine["one"], mine["two"]}
    store.record("plant", report, source="detect:2", artifact="net")
    assert set(incidents(store, "plant").values()) == {"of detect"}, "who records last names the incident"
    send(sink, BRIDGE)
    after = incidents(store, "plant")
    assert after["bridge"] == after["two"] == mine["one"]


def test_pruned_events_leave_nothing_behind(sink: StoredEvents, store: EventStore) -> None:
    sink.grouping = grouping(STORY, 0, hourly=True)
    send(sink, STORY)
    assert store.prune(START + timedelta(hours=20), actor="eva") == 3
    assert [row[2] for row in content(store)[1]] == ["far"]
    send(sink, STORY)
    assert store.events("plant")["event_id"].to_list() == ["far"]


def test_only_near_events_are_read(sink: StoredEvents, store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [item for place in range(0, 3000, 10) for item in life(f"event{place}", place, place + 2)]
    sink.grouping = grouping(told, 5, hourly=True)
    send(sink, told)
    seen: list[int] = []
    whole = type(sink.grouping.of("plant", 1, "net")).name

    def counting(self: Any, new: pl.DataFrame, near: pl.DataFrame) -> pl.DataFrame:
        seen.append(near.height)
        return whole(self, new, near)

    monkeypatch.setattr(type(sink.grouping.of("plant", 1, "net")), "name", counting)
    send(sink, told[-2:])
    sink.grouping = replace(sink.grouping, gap=10**9)  # a scope of its own, and a reach before the first year
    send(sink, told)
    assert seen == [1, 0]
    assert store.events("plant")["incident_id"].n_unique() == 1
