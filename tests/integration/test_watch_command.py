"""``tsforge watch`` as people run it: settings, status, signals, one process at a time, another artifact."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from watching import NEW, Watched, assert_told, keys, new_rows

from tsforge.app.exclusive import alone
from tsforge.app.fit import FitConfig, fit
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import WatchConfig
from tsforge.app.watch.status import watch_status
from tsforge.cli import main
from tsforge.core.config import load, to_yaml, validate
from tsforge.core.errors import BackendError, ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.watch_state import WatchState


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    (tmp_path / "incoming").mkdir()
    return Watched(tmp_path, Workspace.open(site.home))


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return status, output and errors."""
    before = sys.argv
    sys.argv = ["tsforge", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def settings_file(plant: Watched, **changes: Any) -> str:
    path = plant.root / "plant.yaml"
    path.write_text(to_yaml(plant.config(**changes)))
    return str(path)


def test_the_shipped_config_is_all_defaults() -> None:
    assert load(WatchConfig, "watch") == WatchConfig()


def test_lines_of_json_status_and_errors(plant: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    for number, start in enumerate(range(0, 2 * NEW, 128)):
        plant.write(f"{number}.parquet", new_rows()[start : start + 128])
    name = settings_file(plant, chunk_rows=128)
    status, out, _ = command(capsys, "watch", name, "--once", "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [turn.get("rows_taken") for turn in turns] == [128, 128, 128, 2 * NEW]
    assert turns[-1]["ended"]
    assert sum(len(turn.get("events", ())) for turn in turns) == len(plant.told()) > 10
    assert all(turn["lag_seconds"] is not None for turn in turns[:-1])
    status, out, _ = command(capsys, "watch", "--status", "plant", "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["rows_taken"], facts["running"], facts["undelivered"]) == (2 * NEW, None, 0)
    assert facts["sinks"]["log"]["delivered"] == len(plant.told())
    assert facts["last_event"]["event_id"] in {record["event_id"] for record in plant.told()}
    assert command(capsys, "watch", "--status", "plant")[1].startswith("watch")
    status, _, errors = command(capsys, "watch", "--status", "plan")
    assert (status, errors.count("\n")) == (6, 1)
    assert "known: plant" in errors
    status, _, errors = command(capsys, "watch", name, "--once", "source.kind=sql")
    assert (status, errors.count("\n")) == (2, 1)
    status, out, _ = command(capsys, "watch", name, "--dry-run", "poll_seconds=9")
    assert (status, "poll_seconds: 9" in out) == (0, True)


def test_events_are_printed_and_undelivered_ones_are_an_error(
    plant: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    plant.write("0.parquet", new_rows())
    dead = {"kind": "webhook", "url": "http://127.0.0.1:9/", "backoff_seconds": 60.0}
    name = settings_file(plant, sinks=plant.plain()["sinks"] | {"hook": dead}, drain_seconds=0.0)
    status, out, errors = command(capsys, "watch", name, "--once")
    assert status == 6
    assert "transitions could not be delivered in time; they go out with the next run" in errors
    lines = re.findall(r"^(opened|closed)  ([0-9a-f]{16})  [ab]  ", out, flags=re.MULTILINE)
    assert [(event, transition) for transition, event in lines] == keys(plant.told())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_alarms_go_out_though_nobody_can_read_the_output(plant: Watched) -> None:
    plant.write("0.parquet", new_rows()[:128])
    plant.write("1.parquet", new_rows()[128:])
    name = settings_file(plant, chunk_rows=64)
    with Path("/dev/full").open("w") as full:
        watching = [sys.executable, "-m", "tsforge", "watch", name, "--once", "--json"]
        ended = subprocess.run(watching, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        listing = [sys.executable, "-m", "tsforge", "data", "list"]
        listed = subprocess.run(listing, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert_told(plant.told(), plant.truth(new_rows()))
    assert ended.stderr.count("the output cannot be written (No space left on device); the watch goes on") == 1
    assert ended.returncode == listed.returncode == 6
    assert "records could not be written to the output; sinks and state have them all" in ended.stderr
    reason = "error: the output cannot be written (No space left on device); what the command stored is whole\n"
    assert listed.stderr == reason


def test_dead_letters_of_the_run_are_an_error_too(plant: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    plant.write("0.parquet", new_rows(40))
    dead = {"kind": "webhook", "url": "http://127.0.0.1:9/", "backoff_seconds": 0.01, "tries": 1}
    name = settings_file(plant, sinks=plant.plain()["sinks"] | {"hook": dead})
    count = None
    for more in ([], ["--redeliver"]):
        status, _, errors = command(capsys, "watch", name, "--once", *more)
        count = count or len(plant.told())
        assert status == 6
        assert f"{count} transitions were refused and are dead letters (--status says why)" in errors
    status, out, _ = command(capsys, "watch", name, "--once")
    assert (status, "dead_letters" in out) == (0, True), "those of earlier runs are shown and end nothing"
    status, _, errors = command(capsys, "watch", name, "--once", "--discard", "hok")
    assert (status, "sink 'hok' has no dead letters; did you mean 'hook'?" in errors) == (2, True)
    other = settings_file(plant, sinks=plant.plain()["sinks"])  # its letters outlive the sink
    status, out, _ = command(capsys, "watch", other, "--once", "--redeliver", "--discard", "hook")
    assert status == 0
    assert json.loads(command(capsys, "watch", "--status", "plant", "--json")[1])["dead_letters"] == 0
    assert len(plant.told()) == count, "what other sinks got stays"
    assert command(capsys, "watch", other, "--once", "--discard", "hook")[0] == 2


def test_another_detector_is_refused_until_it_is_started_anew(plant: Watched) -> None:
    rows = new_rows()
    plant.write("0.parquet", rows)
    plant.watch()
    first = plant.told()
    other = {"rule": {"kind": "quantile", "alpha": 0.02}}
    with pytest.raises(ConfigError, match=r"detector\.rule\.alpha is 0\.02, was 0\.002.*reset=true"):
        plant.watch(detector=other)
    with pytest.raises(ConfigError, match="start is 2026-03-12, was None"):
        plant.watch(start="2026-03-12")
    with pytest.raises(ConfigError, match=r"source\.kind is dataset, was folder"):
        plant.watch(source={"kind": "dataset"})
    assert plant.watch(poll_seconds=1.0, chunk_rows=9).facts["generation"] == 1  # these may change
    facts = plant.watch(detector=other, reset=True).facts
    assert (facts["generation"], facts["rows_taken"]) == (2, rows.height)
    anew = plant.told()[len(first) :]
    assert {record["generation"] for record in anew} == {2}
    assert anew[0]["seq"] == first[-1]["seq"] + 1
    assert_told(anew, plant.truth(rows, other))


def test_a_watch_keeps_its_artifact_when_a_newer_one_comes(plant: Watched, site: Any) -> None:
    rows = new_rows()
    plant.write("0.parquet", rows[:NEW])
    own = plant.watch().facts["artifact"]
    events = plant.truth(rows)
    settings = {
        "data": site.data(),
        "model": {"name": "linear", "ridge": 50.0},
        "window": {"context_length": 24, "horizon": 12},
        "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
        "tracking": {"enabled": False},
    }
    newer = fit(validate(FitConfig, settings), plant.workspace).artifact.id
    plant.write("1.parquet", rows[NEW:])
    facts = plant.watch().facts
    assert (facts["artifact"], facts["newer_artifact"]) == (own, newer)
    assert_told(plant.told(), events)
    with pytest.raises(ConfigError, match=f"artifact is {newer}, was {own}"):
        plant.watch(artifact=newer)
    assert plant.watch(reset=True).facts["artifact"] == newer


def test_one_process_at_a_time(plant: Watched) -> None:
    with (
        alone(plant.workspace.root / "watch" / "plant", "watch 'plant' is being run"),
        pytest.raises(BackendError, match="watch 'plant' is being run by another process"),
    ):
        plant.watch()


def test_the_state_of_a_newer_format_and_a_damaged_detector_are_refused(plant: Watched) -> None:
    import sqlite3

    from tsforge.core.errors import ArtifactError

    plant.watch()
    place = plant.workspace.root / "watch/plant/state.db"
    with sqlite3.connect(place) as connection:
        blob = bytearray(connection.execute("SELECT detector FROM watch").fetchone()[0])
        blob[len(blob) // 2] ^= 1
        connection.execute("UPDATE watch SET detector = ?", (bytes(blob),))
    with pytest.raises(ArtifactError, match="damaged"):
        plant.watch()
    with sqlite3.connect(place) as connection:
        kept = connection.execute("SELECT position FROM watch").fetchone()
        connection.execute("UPDATE watch SET position = 'torn'")
    with pytest.raises(BackendError, match=r"state.db: the column position of the table watch cannot be read"):
        plant.watch()
    with sqlite3.connect(place) as connection:
        connection.execute("UPDATE watch SET position = ?", kept)
        connection.execute("UPDATE watch SET format = 99")
    with pytest.raises(BackendError, match=r"made by a newer tsforge \(watch format 99"):
        plant.watch()
    with sqlite3.connect(place) as connection:
        connection.execute("UPDATE watch SET format = 'x'")
    connection.close()
    with pytest.raises(BackendError, match="damaged"):
        plant.watch()


def test_a_failed_commit_takes_the_rows_again(plant: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a while: the watch goes back to what was committed and goes on, in the same process."""
    rows = new_rows()
    plant.write("0.parquet", rows)
    whole, calls = WatchState.commit, []

    def failing(self: WatchState, **named: Any) -> None:
        calls.append(1)
        if len(calls) in (2, 5, 6):
            raise BackendError("disk is full")
        whole(self, **named)
        if len(calls) > 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(WatchState, "commit", failing)
    monkeypatch.setattr("tsforge.app.watch.run.RETRY_SECONDS", (0.01, 0.01))
    result = watch(plant.config(poll_seconds=0.01), plant.workspace)
    assert result.signal == signal.SIGTERM
    monkeypatch.undo()
    assert plant.watch().facts["rows_taken"] == rows.height
    assert_told(plant.told(), plant.truth(rows))


def test_signals_end_a_running_watch_between_chunks(plant: Watched) -> None:
    """SIGTERM ends with 0, Ctrl-C with 130; what came meanwhile is committed, and the status sees the process."""
    rows = new_rows()
    name = settings_file(plant, poll_seconds=0.2)
    statuses = []
    for number, sign in enumerate((signal.SIGTERM, signal.SIGINT)):
        child = subprocess.Popen(
            [sys.executable, "-m", "tsforge", "watch", name, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
        assert child.stdout is not None
        plant.write(f"{number}.csv", rows[number * NEW : (number + 1) * NEW])
        taken = 0
        while taken < NEW:
            taken += json.loads(child.stdout.readline())["rows_taken"]
        assert f":{child.pid}:" in watch_status("plant", plant.workspace)["running"]
        time.sleep(0.3)
        child.send_signal(sign)
        _, errors = child.communicate(timeout=60)
        statuses.append(child.returncode)
        assert "Traceback" not in errors
    assert statuses == [0, 130]
    assert_told(plant.told(), plant.truth(rows))


def test_standard_input_sent_again_counts_once(plant: Watched) -> None:
    rows = new_rows()
    name = settings_file(plant, source={"kind": "stdin", "rows": {"time": "ts", "series": "machine"}})
    for count in (200, rows.height):  # the second time everything is sent from the start
        done = subprocess.run(
            [sys.executable, "-m", "tsforge", "watch", name, "--json"],
            input=rows[:count].write_csv(),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["rows_taken"], last["late"]) == (rows.height, 200)
    assert_told(plant.told(), plant.truth(rows))


def test_standard_input_that_is_killed_goes_on_when_its_rows_are_sent_again(plant: Watched) -> None:
    """kill -9 in the middle of chunks; the producer begins at its first row each time."""
    rows = new_rows()
    source = {"kind": "stdin", "rows": {"time": "ts", "series": "machine"}}
    name = settings_file(plant, source=source, chunk_rows=20)
    for turns in (1, 4, 9):
        child = subprocess.Popen(
            [sys.executable, "-m", "tsforge", "watch", name, "--json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(rows.write_csv())
        child.stdin.flush()
        for _ in range(turns):
            child.stdout.readline()
        child.kill()
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
    text = rows.write_csv()
    done = subprocess.run(
        [sys.executable, "-m", "tsforge", "watch", name], input=text, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert watch_status("plant", plant.workspace)["rows_taken"] == rows.height
    assert_told(plant.told(), plant.truth(rows))
