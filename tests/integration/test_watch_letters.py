"""Transitions that a sink did not get: kept when it is dropped, sent once it is named again, told when they are not."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from watching import Watched, new_rows

from tsforge.app.watch import delivery
from tsforge.app.watch.delivery import FAILURES_IN_A_ROW, Delivery
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import JsonlSink, Sink, WebhookSink
from tsforge.app.watch.webhook import DeliveryError, Webhook
from tsforge.core.workspace import Workspace
from tsforge.data.watch_state import UNNAMED, Outgoing, WatchState

HOOK = WebhookSink(url="http://127.0.0.1:9/hook", tries=1)
OTHER = WebhookSink(url="http://127.0.0.1:9/other", tries=1)


class Receivers:
    """Stands in for every webhook: keeps what each gets, and fails as long as ``reason`` says why."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int]] = []
        self.tried = 0
        self.reason: str | None = None
        self.wait = 0.0
        self.busy = ""  # receiver that asks for patience
        self.react: Callable[[], None] = lambda: None

    def open(self, settings: WebhookSink | JsonlSink, workspace: Workspace, watch: str) -> object:
        outer, place = self, str(getattr(settings, "url", "file"))

        class Receiver:
            batch = 1

            def send(self, items: Sequence[Outgoing], mark: int) -> int:
                outer.tried += 1
                outer.react()
                if outer.reason is not None:
                    raise DeliveryError(outer.reason, outer.wait)
                if outer.busy and place.endswith(outer.busy):
                    raise DeliveryError("busy", 3600.0)
                outer.got += [(place.rpartition("/")[2], item.seq) for item in items]
                return mark

            def close(self) -> None:
                pass

        return Receiver()


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> Receivers:
    found = Receivers()
    monkeypatch.setattr(delivery, "open_sink", found.open)
    return found


@pytest.fixture
def state(tmp_path: Path) -> WatchState:
    found = WatchState(tmp_path / "state.db")
    found.begin({}, b"", {})
    return found


def tell(state: WatchState, *names: str, silenced: Sequence[str] = ()) -> None:
    """Commit an opened event of each name."""
    records = [(name, {"event_id": name, "suppressed_by": 7 if name in silenced else None}) for name in names]
    transitions = [(name, "opened", record) for name, record in records]
    state.commit(generation=1, position={}, facts={}, transitions=transitions)


def sinks(state: WatchState, tmp_path: Path, **named: Sink) -> Delivery:
    """Start with these sinks."""
    found = Delivery(state, named, Workspace.open(tmp_path / "home"), "plant")
    found.begin()
    return found


def drained(found: Delivery) -> Delivery:
    while found.deliver():
        pass
    return found


def test_a_dropped_sink_keeps_what_it_had_still_to_get(
    state: WatchState, receivers: Receivers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = drained(sinks(state, tmp_path, oncall=HOOK))
    tell(state, "a")
    drained(first)
    receivers.reason, receivers.wait = "busy", 3600.0
    tell(state, "b", "c", "d", silenced=["c"])
    patient = sinks(state, tmp_path, oncall=HOOK.model_copy(update={"tries": 9}))
    assert patient.deliver() == 0
    assert state.depths() == {"oncall": 3}
    sinks(state, tmp_path)
    assert "'oncall' is no longer named and had still to get 3 transitions, which are dead letters now" in caplog.text
    assert {letter["reason"] for letter in state.dead_letters()} == {UNNAMED}
    tell(state, "lost on purpose: no sink was named")
    receivers.reason = None
    again = drained(sinks(state, tmp_path, oncall=HOOK))
    assert [seq for _, seq in receivers.got] == [1]
    assert again.revive() == 2
    assert [seq for _, seq in receivers.got] == [1, 2, 4], "what is silenced is not sent to webhooks later either"
    assert (state.dead_letters(), state.cursors()["oncall"].delivered) == ([], 2)
    tell(state, "f")
    drained(again)
    assert [seq for _, seq in receivers.got] == [1, 2, 4, 6]


def test_a_renamed_sink_and_one_named_again_get_every_transition_once(
    state: WatchState, receivers: Receivers, tmp_path: Path
) -> None:
    """The outbox still holds, for another sink, what has become dead letters of the dropped one."""
    receivers.reason, receivers.wait = "busy", 3600.0
    patient = {"tries": 9}
    both = {"hook": HOOK.model_copy(update=patient), "other": OTHER.model_copy(update=patient)}
    found = sinks(state, tmp_path, **both)
    tell(state, "a", "b")
    found.deliver()
    tell(state, "c")
    sinks(state, tmp_path, other=both["other"]).close()
    tell(state, "d")
    back = sinks(state, tmp_path, hook=HOOK, pager=OTHER)
    assert state.depths() == {"hook": 1, "pager": 4}
    receivers.reason = None
    drained(back)
    assert back.revive() == 3
    assert sorted(seq for place, seq in receivers.got if place == "hook") == [1, 2, 3, 4]
    assert [seq for place, seq in receivers.got if place == "other"] == [1, 2, 3, 4]
    assert {letter["sink"] for letter in state.dead_letters()} == {"other"}


def test_a_sink_named_again_beside_a_slower_one_gets_nothing_twice(
    state: WatchState, receivers: Receivers, tmp_path: Path
) -> None:
    """The outbox still holds, for the slower one, what it has got, and what it got from its dead letters."""
    slow = {"slow": OTHER.model_copy(update={"tries": 9})}
    receivers.busy = "other"
    drained(sinks(state, tmp_path, hook=HOOK, **slow))
    tell(state, "a", "b")
    drained(sinks(state, tmp_path, hook=HOOK, **slow))
    tell(state, "c")
    sinks(state, tmp_path, **slow)
    assert [letter["seq"] for letter in state.dead_letters()] == [3]
    again = drained(sinks(state, tmp_path, hook=HOOK, **slow))
    assert again.revive() == 1
    sinks(state, tmp_path, **slow)
    tell(state, "d")
    drained(sinks(state, tmp_path, hook=HOOK, **slow))
    assert receivers.got == [("hook", seq) for seq in (1, 2, 3, 4)]
    assert state.depths() == {"hook": 0, "slow": 4}
    receivers.busy, receivers.wait = "", 0.0
    sinks(state, tmp_path, hook=HOOK)
    drained(sinks(state, tmp_path, hook=HOOK, **slow)).revive()
    assert sorted(seq for place, seq in receivers.got if place == "other") == [1, 2, 3, 4]
    assert [seq for place, seq in receivers.got if place == "hook"] == [1, 2, 3, 4]


def buried(state: WatchState, receivers: Receivers, tmp_path: Path, count: int) -> None:
    """Make so many dead letters of the sink ``hook``."""
    receivers.reason = "answered 500"
    found = sinks(state, tmp_path, hook=HOOK)
    tell(state, *(f"e{number}" for number in range(count)))
    drained(found)
    assert len(state.dead_letters()) == count
    receivers.tried = 0


def test_a_receiver_that_goes_on_failing_is_left_alone(
    state: WatchState, receivers: Receivers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buried(state, receivers, tmp_path, 9)
    receivers.reason = "answered 418"
    found = sinks(state, tmp_path, hook=HOOK)
    assert found.revive() == 0
    assert receivers.tried == FAILURES_IN_A_ROW
    assert found.refused == 9
    assert "sink 'hook' failed 3 times in a row: 6 more stay untried" in caplog.text
    reasons = [letter["reason"] for letter in state.dead_letters()]
    assert reasons == ["answered 418"] * 3 + ["answered 500"] * 6, "why it failed is what the last try said"


def test_a_signal_ends_the_sending_of_dead_letters(state: WatchState, receivers: Receivers, tmp_path: Path) -> None:
    buried(state, receivers, tmp_path, 9)
    receivers.reason = None
    found = sinks(state, tmp_path, hook=HOOK)
    assert found.revive(lambda: receivers.tried == 2) == 2
    assert [letter["seq"] for letter in state.dead_letters()] == list(range(3, 10))
    assert found.refused == 0
    assert found.revive() == 7


def test_sigterm_ends_a_watch_that_sends_dead_letters(site: Any, receivers: Receivers, tmp_path: Path) -> None:
    """Before it takes rows, and after the letter at work."""
    plant = Watched(tmp_path, Workspace.open(site.home))
    plant.write("0.parquet", new_rows()[:200])
    hook = {"hook": HOOK.model_dump(exclude_none=True)}
    receivers.reason = "answered 500"
    count = plant.watch(sinks=hook).facts["dead_letters"]
    assert count > 3
    plant.write("1.parquet", new_rows()[200:])
    receivers.reason, receivers.tried = None, 0
    receivers.react = lambda: os.kill(os.getpid(), signal.SIGTERM) if receivers.tried == 2 else None
    result = watch(plant.config(sinks=hook), plant.workspace, once=True, redeliver=True)
    assert (result.signal, result.facts["rows_taken"]) == (signal.SIGTERM, 200)
    assert (receivers.tried, result.facts["dead_letters"]) == (2, count - 2)


def test_dead_letters_of_a_sink_that_is_not_named_are_told(
    state: WatchState, receivers: Receivers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buried(state, receivers, tmp_path, 4)
    found = sinks(state, tmp_path, pager=OTHER)
    assert found.revive() == 0
    assert "4 dead letters belong to sink 'hook', which is not named: name it again to send them" in caplog.text
    assert (found.refused, receivers.tried) == (0, 0), "the warning says it; nothing of this run was refused"


def test_dead_letters_of_a_file_go_out_together(state: WatchState, tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    file = JsonlSink(path=str(path))
    sinks(state, tmp_path, log=file).close()
    tell(state, "a", "b")
    sinks(state, tmp_path).close()
    found = sinks(state, tmp_path, log=file)
    tell(state, "c")
    drained(found)
    assert found.revive() == 2
    tell(state, "d")
    drained(found)
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == [
        f'{{"seq": {number}' for number in (3, 1, 2, 4)
    ]


@pytest.mark.parametrize("answer", [b"hello\r\n\r\n", b"HTTP/1.1 500 \x1b[31mred\tand more\r\n\r\n"])
def test_words_of_a_receiver_are_one_line(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    hook = Webhook(WebhookSink(url=f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_seconds=5), "plant")
    item = Outgoing(seq=1, generation=1, event_id="e", transition="opened", record="{}")
    with listener, pytest.raises(DeliveryError) as caught:
        hook.send([item], 0)
    assert str(caught.value).isprintable()
    assert ("BadStatusLine: hello" in str(caught.value)) == (answer[:1] == b"h")
