"""How events leave a watch: once a line, once a row, once an idempotency key; refusals, silence and secrets."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import re
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from watching import FIRST, NEW, SEEN, Watched, assert_told, keys, new_rows

from tsforge.app.watch.delivery import Delivery, Patience
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import JsonlSink, WebhookSink
from tsforge.app.watch.sinks import JsonlFile
from tsforge.app.watch.status import watch_status
from tsforge.app.watch.webhook import DeliveryError, Webhook, retry_after
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.event_store import EventStore
from tsforge.data.watch_state import Outgoing, SourceFile, WatchState


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    found = Watched(tmp_path, Workspace.open(site.home))
    found.write("0.parquet", new_rows())
    return found


class Receiver:
    """An HTTP server that keeps what it gets and answers as told (status and headers)."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer: Callable[[int], tuple[int, dict[str, str]]] = lambda number: (204, {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                status, headers = outer.answer(len(outer.got))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=t0ken"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.server.shutdown()
    found.server.server_close()


def hook(**changes: Any) -> dict[str, Any]:
    patience = {"tries": 3, "backoff_seconds": 0.01, "max_backoff_seconds": 0.02}
    return {"kind": "webhook", "url_env": "HOOK_URL", "secret_env": "HOOK_SECRET", **patience} | changes


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> str:
    monkeypatch.setenv("HOOK_URL", receiver.url)
    monkeypatch.setenv("HOOK_SECRET", "s3cret-of-the-hook")
    return "s3cret-of-the-hook"


def test_four_sinks_say_the_same(plant: Watched, receiver: Receiver, secrets: str) -> None:
    sinks = plant.plain()["sinks"] | {
        "table": {"kind": "sql", "path": str(plant.root / "events.db")},
        "store": {"kind": "store"},
        "hook": hook(),
    }
    facts = plant.watch(sinks=sinks).facts
    told = plant.told()
    assert_told(told, plant.truth(new_rows()))
    assert [record["seq"] for record in told] == list(range(1, len(told) + 1))
    assert {item["to_deliver"] for item in facts["sinks"].values()} == {0}
    with sqlite3.connect(plant.root / "events.db") as connection:
        query = 'SELECT event_id, transition, series_id, start, "end", peak_score FROM tsforge_events ORDER BY seq'
        rows = connection.execute(query).fetchall()
    connection.close()
    assert rows == [
        tuple(record[name] for name in ("event_id", "transition", "series_id", "start", "end", "peak_score"))
        for record in told
    ]
    for headers, body in receiver.got:
        signed = hmac.new(secrets.encode(), headers["X-Tsforge-Timestamp"].encode() + b"." + body, hashlib.sha256)
        assert headers["X-Tsforge-Signature"] == f"sha256={signed.hexdigest()}"
        assert abs(int(headers["X-Tsforge-Timestamp"]) - time.time()) < 60
    assert [json.loads(body) for _, body in receiver.got] == told
    names = [headers["Idempotency-Key"] for headers, _ in receiver.got]
    assert names == [f"plant:1:{event}:{transition}" for event, transition in keys(told)]
    store = EventStore(plant.workspace.database_url)
    stored = store.events("plant")
    assert set(stored["event_id"]) == {record["event_id"] for record in told}
    assert stored["source"].unique().to_list() == ["watch:plant"]
    assert stored.filter(state="closed").height == sum(record["transition"] == "closed" for record in told)
    store.close()


def test_a_silenced_event_is_recorded_but_not_notified(plant: Watched, receiver: Receiver, secrets: str) -> None:
    store = EventStore(plant.workspace.database_url)
    span = {"start": FIRST + timedelta(hours=SEEN), "end": FIRST + timedelta(hours=SEEN + 60)}
    rule = store.suppress({"reason": "maintenance", **span}, actor="op")
    sinks = plant.plain()["sinks"] | {"hook": hook(), "store": {"kind": "store"}}
    facts = plant.watch(sinks=sinks).facts
    told = plant.told()
    silent = [record for record in told if record["suppressed_by"] == rule]
    assert 0 < len(silent) < len(told)
    assert facts["suppressed"] == len(silent)
    assert [json.loads(body) for _, body in receiver.got] == [r for r in told if r["suppressed_by"] is None]
    stored = store.events("plant")
    marked = set(stored.filter(stored["suppressed_by"].is_not_null())["event_id"])
    assert marked == {record["event_id"] for record in silent}
    store.close()


def test_a_fault_that_outlasts_its_window_surfaces_however_rows_are_cut(
    plant: Watched, receiver: Receiver, secrets: str
) -> None:
    """Something grows for eleven hours; the window ends in its middle."""
    begin = FIRST + timedelta(hours=SEEN)
    age = (pl.col("ts") - begin).dt.total_hours()
    grown = pl.when(age.is_between(30, 40)).then(pl.col("x") + 50.0 * (age - 29)).otherwise(pl.col("x"))
    rows = new_rows().filter(machine="a").with_columns(x=grown)
    store = EventStore(plant.workspace.database_url)
    span = {"start": begin + timedelta(hours=25), "end": begin + timedelta(hours=34)}
    rule = store.suppress({"reason": "maintenance", "series": "a", **span}, actor="op")
    sinks = plant.plain()["sinks"] | {"hook": hook(), "store": {"kind": "store"}}
    (plant.incoming / "0.parquet").unlink()
    plant.write("0.csv", rows.filter(age < 32))
    plant.watch(sinks=sinks)
    plant.write("1.csv", rows.filter(age.is_between(32, 33)))  # it grows within the window
    plant.watch(sinks=sinks)
    (opened,) = plant.told()
    assert (opened["transition"], opened["suppressed_by"]) == ("opened", rule)
    assert opened["event_id"] not in {json.loads(body)["event_id"] for _, body in receiver.got}
    plant.write("2.csv", rows.filter(age.is_between(34, 35)))
    plant.watch(sinks=sinks)
    surfaced = plant.told()[-1]
    assert (surfaced["event_id"], surfaced["transition"]) == (opened["event_id"], "surfaced")
    assert surfaced["suppressed_by"] is None
    assert json.loads(receiver.got[-1][1]) == surfaced
    assert store.events("plant").filter(event_id=opened["event_id"])["suppressed_by"].to_list() == [None]
    plant.write("3.csv", rows.filter(age > 35))
    plant.watch(sinks=sinks)
    of_it = [record for record in plant.told() if record["event_id"] == opened["event_id"]]
    assert [record["transition"] for record in of_it] == ["opened", "surfaced", "closed"]
    assert [record["suppressed_by"] for record in of_it] == [rule, None, None]
    store.close()


def test_a_receiver_that_refuses_is_tried_again_as_it_asks_and_then_left_out(
    plant: Watched, receiver: Receiver, secrets: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The third one is refused for good: it is laid aside, the others go out in order; redelivery sends it."""
    caplog.set_level(logging.DEBUG)
    refused: list[str] = []

    def answer(number: int) -> tuple[int, dict[str, str]]:
        key = receiver.got[-1][0]["Idempotency-Key"]
        first = next(name["Idempotency-Key"] for name, _ in receiver.got)
        if number in (1, 2):
            return 429, {"Retry-After": "0.2"}
        if not refused and key != first and len({name["Idempotency-Key"] for name, _ in receiver.got}) == 3:
            refused.append(key)
        return (500, {}) if key in refused else (200, {})

    receiver.answer = answer
    started = time.monotonic()
    facts = plant.watch(sinks=plant.plain()["sinks"] | {"hook": hook()}).facts
    assert time.monotonic() - started > 0.4
    told = plant.told()
    got = [headers["Idempotency-Key"] for headers, _ in receiver.got]
    wanted = [f"plant:1:{event}:{transition}" for event, transition in keys(told)]
    assert got == [wanted[0]] * 3 + [wanted[1]] + [wanted[2]] * 3 + wanted[3:]
    assert refused == [wanted[2]]
    assert (facts["dead_letters"], facts["undelivered"]) == (1, 0)
    assert facts["dead_letter_reasons"] == ["hook: 127.0.0.1 answered 500 Internal Server Error"]
    receiver.answer = lambda number: (200, {})
    config = plant.config(sinks=plant.plain()["sinks"] | {"hook": hook()})
    again = watch(config, plant.workspace, once=True, redeliver=True).facts
    assert receiver.got[-1][0]["Idempotency-Key"] == wanted[2]
    assert (again["dead_letters"], again["sinks"]["hook"]["delivered"]) == (0, len(told))
    said = (
        caplog.text + json.dumps(again) + (plant.workspace.root / "watch/plant/state.db").read_bytes().decode("latin1")
    )
    assert "s3cret" not in said
    assert "t0ken" not in said


class Dripping:
    """A server that sends ``first`` and then a byte now and then, never coming to an end."""

    def __init__(self, first: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/hook"
        self.asked = 0
        self._first, self._over = first, threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.asked += 1
            threading.Thread(target=self._drip, args=(connection,), daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            connection.sendall(self._first)
            while not self._over.wait(0.1):
                connection.sendall(b"x")

    def close(self) -> None:
        self._over.set()
        self._listener.close()


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", None),  # it has been taken, whatever else is said
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", "does not answer (TimeoutError: nothing within 0.5 s)"),
        (b"", "does not answer (TimeoutError: nothing within 0.5 s)"),
    ],
    ids=["body", "headers", "status"],
)
def test_an_answer_in_drips_holds_up_nothing(first: bytes, reason: str | None) -> None:
    server = Dripping(first)
    settings = validate(WebhookSink, {"kind": "webhook", "url": server.url, "timeout_seconds": 0.5})
    item = Outgoing(seq=1, generation=1, event_id="e", transition="opened", record="{}")
    started = time.monotonic()
    if reason is None:
        assert Webhook(settings, "plant").send([item], 7) == 7
    else:
        with pytest.raises(DeliveryError, match=re.escape(reason)):
            Webhook(settings, "plant").send([item], 7)
    assert time.monotonic() - started < 20  # drips go on for ever
    assert server.asked == 1
    server.close()


@pytest.mark.parametrize(
    "address",
    [
        "https://host/s3 cret",
        "https://host/s3cret\tx",
        "https://host/s3cret\x7f",
        "https://host/stra\u00dfe-s3cret",
        "https://a..b/s3cret",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_before_anything_is_sent(
    plant: Watched, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("HOOK_URL", address)
    monkeypatch.setenv("HOOK_SECRET", "key")
    with pytest.raises(ConfigError, match="environment variable HOOK_URL (is no address|holds blanks)") as caught:
        plant.watch(sinks={"hook": hook()})
    assert "s3cret" not in str(caught.value)


def test_a_certificate_that_nobody_signed_is_told_as_such(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2090, 1, 1))
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "own.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://localhost:{listener.getsockname()[1]}/hook"
        settings = validate(WebhookSink, {"kind": "webhook", "url": url, "timeout_seconds": 20})
        item = Outgoing(seq=1, generation=1, event_id="e", transition="opened", record="{}")
        with pytest.raises(DeliveryError, match=r"localhost does not answer \(SSLCertVerificationError: .*self-signed"):
            Webhook(settings, "plant").send([item], 1)


def test_a_header_that_cannot_be_sent_is_told_at_once() -> None:

    item = Outgoing(seq=1, generation=1, event_id="e", transition="opened", record="{}")
    server = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
    settings = validate(WebhookSink, {"kind": "webhook", "url": url, "timeout_seconds": 30})
    started = time.monotonic()
    with pytest.raises(DeliveryError, match=r"127.0.0.1 cannot be asked \(UnicodeEncodeError\)"):
        Webhook(settings, "\u0416").send([item], 1)
    assert time.monotonic() - started < 20
    server.close()


def test_redirects_are_not_followed(plant: Watched, receiver: Receiver, secrets: str) -> None:
    receiver.answer = lambda number: (307, {"Location": "http://elsewhere.example/steal?x=1"})
    facts = plant.watch(sinks={"hook": hook(tries=2)}).facts
    assert facts["dead_letters"] == facts["opened"] + facts["closed"]
    assert len(receiver.got) == 2 * facts["dead_letters"]  # each one has all its tries
    words = "hook: 127.0.0.1 redirects (307) to elsewhere.example; redirects are not followed"
    assert facts["dead_letter_reasons"] == [words]
    assert "redirects (307)" in facts["sinks"]["hook"]["error"]
    receiver.answer = lambda number: (200, {})
    config = plant.config(sinks={"hook": hook(tries=2)})
    again = watch(config, plant.workspace, once=True, redeliver=True).facts
    assert (again["dead_letters"], again["sinks"]["hook"]["error"]) == (0, None), "it works again"


def test_what_cannot_be_delivered_in_time_goes_out_with_the_next_run(
    plant: Watched, receiver: Receiver, secrets: str
) -> None:
    receiver.answer = lambda number: (503, {"Retry-After": "3600"})
    sinks = plant.plain()["sinks"] | {"hook": hook(tries=9)}
    result = plant.watch(sinks=sinks, drain_seconds=0.1)
    assert result.undelivered == len(plant.told()) > 0  # the file did not wait for the webhook
    assert len(receiver.got) == 1
    receiver.answer = lambda number: (200, {})
    folder = plant.workspace.root / "watch/plant/state.db"
    with sqlite3.connect(folder) as connection:
        waits = connection.execute("SELECT next_try FROM sinks WHERE name = 'hook'").fetchone()[0] - time.time()
        connection.execute("UPDATE sinks SET next_try = 0")
    connection.close()
    assert 3500 < waits <= 3600
    assert plant.watch(sinks=sinks).undelivered == 0
    assert len(receiver.got) == 1 + len(plant.told())
    with sqlite3.connect(folder) as connection:
        assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (0,)  # what all have is gone
    connection.close()


def test_a_start_that_is_refused_gives_up_nothing(plant: Watched, receiver: Receiver, secrets: str) -> None:
    receiver.answer = lambda number: (503, {"Retry-After": "3600"})
    sinks = plant.plain()["sinks"] | {"hook": hook(tries=9)}
    waiting = plant.watch(sinks=sinks, drain_seconds=0.0).undelivered
    assert waiting == len(plant.told()) > 0
    with pytest.raises(DataError, match="there is no folder"):
        plant.watch(source={**plant.plain()["source"], "path": str(plant.root / "elsewhere")})  # and without the hook
    receiver.answer = lambda number: (200, {})
    receiver.got.clear()
    with sqlite3.connect(plant.workspace.root / "watch/plant/state.db") as connection:
        connection.execute("UPDATE sinks SET next_try = 0")
    connection.close()
    assert plant.watch(sinks=sinks).undelivered == 0
    assert len(receiver.got) == waiting


def test_patience_doubles_up_to_its_end_and_heeds_the_receiver() -> None:
    patience = Patience.of(WebhookSink(url="https://host", backoff_seconds=2.0, max_backoff_seconds=10.0))
    assert [patience.wait(attempts, 0.0) for attempts in (1, 2, 3, 4, 900)] == [2, 4, 8, 10, 10]
    assert patience.wait(1, 30.0) == 30
    assert (Patience.of(JsonlSink(path="x")).tries, patience.tries) == (None, 8)
    assert [retry_after(value, 0.0) for value in (None, "7", "soon", "-3", "1e99", "nan")] == [0, 7, 0, 0, 86400, 0]
    assert retry_after(formatdate(120, usegmt=True), 100.0) == 20


def test_a_missing_secret_is_an_error_before_anything_is_taken(plant: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK_URL", raising=False)
    with pytest.raises(ConfigError, match="HOOK_URL is not set; it should hold the address of a webhook"):
        plant.watch(sinks={"hook": hook()})
    monkeypatch.setenv("HOOK_URL", "not an address")
    with pytest.raises(ConfigError, match="HOOK_URL is no address") as caught:
        plant.watch(sinks={"hook": hook()})
    assert "not an address" not in str(caught.value)


def outgoing(count: int) -> list[Outgoing]:
    records = [json.dumps({"seq": n, "event": "x" * 30}) for n in range(1, count + 1)]
    return [
        Outgoing(seq=n, generation=1, event_id=str(n), transition="opened", record=text)
        for n, text in enumerate(records, start=1)
    ]


@pytest.mark.parametrize("written", range(0, 150, 7))
def test_a_file_cut_at_any_byte_is_completed(tmp_path: Path, written: int) -> None:
    """A kill during the write leaves any part of it; the file then holds every line once, those before it untouched."""
    items, sink, path = (
        outgoing(3),
        JsonlFile(JsonlSink(path=str(tmp_path / "out" / "e.jsonl"))),
        tmp_path / "out/e.jsonl",
    )
    mark = sink.send(items[:1], 0)
    whole = b"".join(item.record.encode() + b"\n" for item in items)
    path.write_bytes(whole[: max(mark, written)])
    assert sink.send(items[1:], mark) == len(whole)
    assert path.read_bytes() == whole


def test_a_file_that_was_rotated_or_shared_loses_nothing(tmp_path: Path) -> None:
    items, path = outgoing(3), tmp_path / "e.jsonl"
    sink = JsonlFile(JsonlSink(path=str(path)))
    mark = sink.send(items[:2], 0)
    path.rename(tmp_path / "e.jsonl.1")
    old, mark = mark, sink.send(items[2:], mark)
    assert sink.send(items[2:], old) == mark  # killed before it acknowledged, and the new file is still shorter
    assert path.read_text() == items[2].record + "\n"
    with path.open("a") as handle:
        handle.write("a note without an end")
    sink.send(items[:1], mark)
    assert path.read_text() == f"{items[2].record}\na note without an end\n{items[0].record}\n"


def test_a_new_sink_gets_what_follows_and_a_dropped_one_holds_nothing_back(plant: Watched) -> None:
    plant.watch()
    state = WatchState(plant.workspace.root / "watch/plant/state.db")
    assert state.depths() == {"log": 0}
    snapshot = state.snapshot()
    assert snapshot is not None
    transitions = [("e", "opened", {"event_id": "e", "transition": "opened"})]
    facts = snapshot.facts
    state.commit(generation=1, position={}, facts=facts, transitions=transitions)
    sinks = {"other": JsonlSink(path=str(plant.root / "other.jsonl"))}
    delivery = Delivery(state, sinks, plant.workspace, "plant")
    assert set(state.cursors()) == {"log"}
    delivery.begin()
    assert delivery.due() == 0
    assert delivery.deliver() == 1
    assert delivery.due() is None
    assert json.loads((plant.root / "other.jsonl").read_text())["event_id"] == "e"
    assert set(state.cursors()) == {"other"}
    delivery.close()
    state.close()
    assert watch_status("plant", plant.workspace)["rows_taken"] == 2 * NEW


def test_a_chunk_is_stored_whole_or_not_and_starting_anew_keeps_what_is_on_its_way(tmp_path: Path) -> None:
    state = WatchState(tmp_path / "state.db")
    state.begin({"by": "first"}, b"fresh", {"rows": 0})
    state.enlist(["log"])
    told = [("e", "opened", {"event_id": "e"})]
    file = SourceFile(name="0.csv", stamp="1", refused=False)
    state.commit(generation=1, position={"at": 1}, facts={"rows": 1}, detector=b"one", transitions=told, files=[file])
    before = state.snapshot()
    with pytest.raises(BackendError):  # the same transition twice can only be a mistake
        state.commit(
            generation=1,
            position={"at": 2},
            facts={"rows": 2},
            detector=b"two",
            transitions=[("f", "opened", {"event_id": "f"}), *told],
            files=[SourceFile(name="1.csv", stamp="1", refused=False)],
            refusals=[("1.csv", "why")],
        )
    assert state.snapshot() == before
    assert (list(state.files()), state.refusals(), state.depths()) == (["0.csv"], [], {"log": 1})
    anew = state.begin({"by": "second"}, b"fresh", {"rows": 0})
    assert (anew.generation, anew.position, anew.detector, state.files()) == (2, {}, b"fresh", {})
    state.commit(generation=2, position={}, facts={}, transitions=told)
    assert [(item.generation, item.event_id) for item in state.pending("log", 9)] == [(1, "e"), (2, "e")]
    state.close()
