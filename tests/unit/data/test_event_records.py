"""Rows of the event store as a table: what was damaged by other hands is said and costs nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tsforge.data.event_records import event_table, facts_of

WHOLE = [{"variate": "flow", "contribution": 2.0, "conditional": None, "additive": float("inf")}]


def row(name: str, variates: str | None) -> dict[str, Any]:
    """A row as the database gives it."""
    texts = dict.fromkeys(("rule", "source", "artifact"), "x") | {"state": "open", "human_state": "new", "facts": "{}"}
    about = {"dataset": "plant", "event_id": name, "series_id": "pump", "has_integer_time": True, "peak_score": 1.0}
    return {**about, **texts, "start": 3, "end": 5, "variates": variates}


@pytest.mark.parametrize(
    "text",
    [
        "garbage",
        "",
        None,
        "3",
        "{}",
        "null",
        "[null]",
        "[3]",
        '[{"contribution": 1.0}]',
        '[{"variate": "a", "additive": "b"}]',
    ],
)
def test_variates_that_cannot_be_read_are_null_and_named(text: str | None, caplog: pytest.LogCaptureFixture) -> None:
    damaged = row("torn", text)
    table = event_table([damaged, row("whole", json.dumps(WHOLE))])
    assert dict(table.select("event_id", "variates").iter_rows()) == {"torn": None, "whole": WHOLE}
    [message] = caplog.messages
    assert message.startswith("1 of 2 events are shown without variates")
    assert "tsf_events" in message
    assert "'torn' of 'plant'" in message
    assert facts_of(damaged).variate is None, "no rule about a variate silences it"


def test_an_event_without_variates_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    assert event_table([row("label", "[]")])["variates"].to_list() == [[]]
    assert event_table([])["variates"].to_list() == []
    assert not caplog.messages
