"""The stream use-case on a real store: new rows once each, forecasts as ``tsforge predict``, crashes, two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import PredictConfig, predict
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.stream import StreamConfig, StreamResult, read_scores, stream
from tsforge.artifact import load_artifact, load_tensor_file
from tsforge.cli import main
from tsforge.core.config import load, validate
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.stream import Stream

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
HOURS = 70 * 24  # rows of the fixture


def grow(site: Any, hours: int, **changes: pl.Expr) -> Workspace:
    """Add hours after the stored ones and ingest them."""
    table = pl.read_parquet(site.source)
    last, phase = table["ds"].max(), table.height % 168
    new = table[phase : phase + hours].with_columns(ds=pl.Series([last + timedelta(hours=k + 1) for k in range(hours)]))
    noise = 0.3 * np.random.default_rng(table.height).standard_normal(hours)
    new = new.with_columns(pl.col("a.x", "a.y", "b.x", "b.y") + pl.Series(noise))
    pl.concat([table, new.with_columns(**changes)], how="diagonal").write_parquet(site.source)
    workspace = Workspace.open(site.home)
    ingest(validate(IngestConfig, {"data": site.data()}), workspace)
    return workspace


def same_as_predict(result: StreamResult, workspace: Workspace, **settings: Any) -> None:
    mine, theirs = (
        result.forecast.table,
        predict(PredictConfig(artifact=result.artifact_id, **settings), workspace).table,
    )
    keys = ["series_id", "cutoff", "step", "time", "variate"]
    assert mine.select(keys).equals(theirs.select(keys))
    for name in mine.columns[5:]:
        assert np.allclose(mine[name], theirs[name], rtol=1e-6, atol=1e-6), name


def test_the_shipped_config_is_all_defaults() -> None:
    assert load(StreamConfig, "stream") == StreamConfig()


def test_new_rows_are_scored_once_and_the_forecast_is_that_of_predict(site: Any) -> None:
    workspace = Workspace.open(site.home)
    first = stream(StreamConfig(), workspace)
    assert (first.is_new, first.rows_taken, first.revision, first.mode) == (True, 0, 0, "window")
    assert first.scores.height == read_scores(workspace, first.name).height == 0
    same_as_predict(first, workspace)
    written = (first.path / "state.safetensors").stat().st_mtime_ns  # the time of the last read changes
    again = stream(StreamConfig(), workspace)
    assert (again.is_new, again.rows_taken) == (False, 0)
    assert (first.path / "state.safetensors").stat().st_mtime_ns == written
    assert again.forecast.table.equals(first.forecast.table)
    grow(site, 30)
    second = stream(StreamConfig(), workspace)
    assert (second.rows_taken, second.revision) == (60, 1)
    table = pl.read_parquet(site.source)[HOURS:]
    assert second.scores.height == sum(table[name].count() for name in ("a.x", "a.y", "b.x", "b.y"))
    value = second.scores.filter(series_id="b", variate="x")
    assert value["time"].to_list() == table["ds"].to_list()
    assert value["value"].to_list() == table["b.x"].to_list()
    same_as_predict(second, workspace)
    grow(site, 5)
    third = stream(StreamConfig(), workspace)
    same_as_predict(third, workspace)
    whole = read_scores(workspace, first.name)
    assert whole.equals(pl.concat([second.scores, third.scores]).sort("series_id", "time", maintain_order=True))
    assert not whole.select(pl.struct("series_id", "time", "variate").is_duplicated().any()).item()
    json.dumps(third.summary(), default=str)


def test_a_stream_started_in_the_past_scores_everything_since(site: Any) -> None:
    workspace = Workspace.open(site.home)
    since = "2026-02-23T00:00"
    whole = stream(StreamConfig(name="whole", start=since), workspace)
    assert whole.rows_taken == 2 * (17 * 24 - 1)
    best = whole.rows()[0]  # a.x jumps for five hours on day 61
    assert (best["series_id"], best["variate"], best["time"]) == ("a", "x", FIRST + timedelta(hours=61 * 24 + 5))
    before = predict(PredictConfig(cutoff="2026-03-01T00:00", quantile_levels=(0.05, 0.95)), workspace).table
    both = before.filter(step=1).join(whole.scores, on=["series_id", "time", "variate"])
    assert both.height == 4
    assert np.allclose(both["mean"], both["expected"], atol=1e-5)
    assert np.allclose(both["q0.95"], both["high"], atol=1e-5)
    same_as_predict(whole, workspace)


def test_a_run_that_dies_between_scores_and_state_repeats_and_skips_nothing(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.open(site.home)
    name = stream(StreamConfig(), workspace).name
    grow(site, 10)

    def die(self: Stream, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "save", die)
        with pytest.raises(KeyboardInterrupt):
            stream(StreamConfig(), workspace)
    assert len(list((workspace.root / "streams" / name).glob("scores-*/part-*"))) == 1
    assert read_scores(workspace, name).height == 0  # not counted by any state
    grow(site, 3)
    done = stream(StreamConfig(), workspace)
    assert (done.rows_taken, done.revision) == (26, 1)
    assert read_scores(workspace, name).equals(done.scores)


FULL = """
import resource, signal, sys, tempfile
import tsforge.app.stream
from tsforge.cli import main
tempfile.gettempdir()  # it is found by writing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is then an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.parametrize(("room", "what"), [(0, "write"), (2048, "read")], ids=["lock", "store"])
def test_a_full_disk_is_one_message(site: Any, room: int, what: str) -> None:
    command = [sys.executable, "-c", FULL, str(room), "stream", "name=plant", "artifact=latest"]
    full = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert full.returncode == 6, full.stderr
    assert "Traceback" not in full.stderr
    (message,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert message.startswith(f"error: cannot {what}")
    assert stream(StreamConfig(name="plant"), Workspace.open(site.home)).revision == 0, "the lock is free"


HOLD = """
import sys
from pathlib import Path
from tsforge.app.exclusive import alone
with alone(Path(sys.argv[1]), "stream 'x' is being brought up to date"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(site: Any) -> None:
    workspace = Workspace.open(site.home)
    folder = stream(StreamConfig(), workspace).path
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BackendError, match=rf"another process \(.*:{holder.pid}:.*\); wait"):
            stream(StreamConfig(), workspace)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert stream(StreamConfig(), workspace).rows_taken == 0


def test_impossible_values_are_scored_at_once_but_hidden_from_the_model(site: Any) -> None:
    workspace = Workspace.open(site.home)
    stream(StreamConfig(), workspace)
    last = pl.col("ds") == pl.col("ds").max()
    spoilt = {
        name: pl.when(last).then(1e6 if name == "a.y" else None).otherwise(name).alias(name) for name in ("a.x", "a.y")
    }
    grow(site, 4, **spoilt)
    done = stream(StreamConfig(), workspace)
    top = done.rows()[0]
    assert (top["series_id"], top["variate"], top["value"]) == ("a", "y", 1e6)
    assert done.rows_taken == 8
    end = pl.read_parquet(site.source)["ds"].max()
    assert done.forecast.table.filter(series_id="a")["cutoff"].max() == end
    same_as_predict(done, workspace, cutoff=end.isoformat())


def test_series_that_stop_come_back_or_are_new(site: Any) -> None:
    workspace = Workspace.open(site.home)
    stream(StreamConfig(), workspace)
    nothing = pl.lit(None, dtype=pl.Float64)
    grow(site, 60, **{"b.x": nothing, "b.y": nothing, "c.x": pl.lit(1.0), "c.y": pl.lit(2.0), "d.x": pl.lit(0.0)})
    done = stream(StreamConfig(), workspace)
    assert done.rows_taken == 60
    assert (done.added, done.waiting) == (("c", "d"), ())
    same_as_predict(done, workspace)
    grow(site, 2, **{"c.x": nothing, "c.y": nothing, "e.x": pl.lit(1.0)})
    done = stream(StreamConfig(), workspace)  # b: 60 rows of nothing, then two
    assert done.rows_taken == 2 + 62 + 0
    assert done.waiting == ("e",)
    assert done.blind == ()
    assert set(done.scores["series_id"]) == {"a", "b"}
    assert done.forecast.table["series_id"].unique().sort().to_list() == ["a", "b", "c", "d"]


def test_what_does_not_belong_to_the_stream_is_refused_and_reset_starts_anew(site: Any) -> None:
    workspace = Workspace.open(site.home)
    stream(StreamConfig(name="mine", start="2026-03-01"), workspace)
    old = read_scores(workspace, "mine").height
    settings = {
        "data": site.data(),
        "model": {"name": "seasonal_naive", "season_length": 24},
        "window": {"context_length": 48, "horizon": 12},
        "tracking": {"enabled": False},
    }
    other = fit(validate(FitConfig, settings), workspace).artifact.id
    with pytest.raises(ArtifactError, match=f"of artifact {site.artifact}, not of {other}"):
        stream(StreamConfig(name="mine"), workspace)
    with pytest.raises(ConfigError, match="started in mode 'window'"):
        stream(StreamConfig(name="mine", artifact=site.artifact, mode="carried"), workspace)
    with pytest.raises(ConfigError, match="name: '../x'"):
        stream(StreamConfig(name="../x"), workspace)
    with pytest.raises(DataError, match="elsewhere"):
        stream(StreamConfig(dataset="elsewhere"), workspace)
    with pytest.raises(BackendError, match=r"no stream 'none' \(known: mine\)"):
        read_scores(workspace, "none")
    assert read_scores(workspace, "mine").height == old
    anew = stream(StreamConfig(name="mine", reset=True, start="2026-03-10"), workspace)
    assert (anew.artifact_id, anew.is_new) == (other, True)
    assert 0 < read_scores(workspace, "mine").height == anew.scores.height < old
    assert len(list(anew.path.glob("scores-*"))) == 1
    (anew.path / "state.safetensors").write_bytes(b"spoilt")
    with pytest.raises(ArtifactError, match=r"is damaged.*; reset=true begins stream 'mine' anew from the stored data"):
        stream(StreamConfig(name="mine"), workspace)
    with pytest.raises(ConfigError, match=r"start=2050-01-01 is later than the last stored row \(2026-"):
        stream(StreamConfig(name="late", start="2050-01-01"), workspace)
    assert stream(StreamConfig(name="mine", reset=True), workspace).rows_taken == 0


def test_a_start_is_an_instant_however_it_is_written(site: Any) -> None:
    workspace = Workspace.open(site.home)
    stream(StreamConfig(name="mine", start="2026-03-01"), workspace)
    for same in ("2026-03-01", "2026-03-01T00:00", "2026-03-01T02:00+02:00", "2026-03-01T00:30"):
        assert not stream(StreamConfig(name="mine", start=same), workspace).is_new, same
    with pytest.raises(ConfigError, match="was begun with start=2026-03-01, not 2026-03-01T01:00"):
        stream(StreamConfig(name="mine", start="2026-03-01T01:00"), workspace)


def test_scores_with_a_part_missing_are_refused(site: Any) -> None:
    workspace = Workspace.open(site.home)
    first = stream(StreamConfig(start="2026-03-08"), workspace)
    grow(site, 3)
    stream(StreamConfig(), workspace)
    whole = read_scores(workspace, first.name)
    parts = sorted(first.path.glob("scores-*/part-*"))
    assert len(parts) == 2
    parts[0].unlink()
    with pytest.raises(BackendError, match=r"1 of 2 parts of the scores of stream '.*' are missing; restore a copy of"):
        read_scores(workspace, first.name)
    state = first.path / "state.safetensors"
    old = Stream.load(state, load_artifact(workspace.artifacts / site.artifact))
    del old.about["parts"]  # as an earlier version left it
    old.save(state)
    rest = read_scores(workspace, first.name)
    assert 0 < rest.height < whole.height
    grow(site, 2)
    stream(StreamConfig(), workspace)
    assert read_scores(workspace, first.name).height > rest.height


def test_calendar_of_the_horizon_comes_with_the_rows(site: Any) -> None:
    workspace = Workspace.open(site.home)
    data = {**site.data(), "calendar": {"features": ["hour", "weekday"]}}
    settings = {
        "data": data,
        "model": {"name": "ar_net", "lags": 24},
        "window": {"context_length": 48, "horizon": 12},
        "tracking": {"enabled": False},
    }
    ingest(validate(IngestConfig, {"data": data}), workspace)
    fitted = fit(validate(FitConfig, settings), workspace).artifact
    assert fitted.schema.known
    first = stream(StreamConfig(start="2026-03-05"), workspace)
    same_as_predict(first, workspace)
    before = predict(PredictConfig(cutoff="2026-03-08T00:00"), workspace).table.filter(step=1)
    both = before.join(first.scores, on=["series_id", "time", "variate"])
    assert np.allclose(both["mean"], both["expected"], atol=1e-4)
    site_data = site.data
    object.__setattr__(site, "data", lambda: {**site_data(), "calendar": data["calendar"]})
    grow(site, 7)
    same_as_predict(stream(StreamConfig(), workspace), workspace)


ONLINE = {"window": 40, "start": 10}


def adapting(**settings: Any) -> StreamConfig:
    return validate(StreamConfig, {"name": "learns", "online": ONLINE, **settings})


def learned(result: StreamResult) -> dict[str, torch.Tensor]:
    tensors = load_tensor_file(result.path / "state.safetensors")[0]
    return {name: value for name, value in tensors.items() if name.startswith("online.")}


def test_intervals_that_learn_go_on_from_run_to_run_as_in_one(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.open(site.home)
    first = stream(adapting(start="2026-03-08", online_every=2), workspace)
    assert first.online is not None
    assert first.online["judged"] > 0
    static = stream(StreamConfig(name="static", start="2026-03-08"), workspace)
    assert static.online is None
    both = first.scores.join(static.scores, on=["series_id", "time", "variate"])
    assert both["expected"].equals(both["expected_right"].alias("expected"))
    assert (both["high"] != both["high_right"]).any()
    grow(site, 20)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "save", lambda self, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream(adapting(), workspace)
    second = stream(StreamConfig(name="learns"), workspace)  # settings stay with the stream
    grow(site, 7)
    third = stream(adapting(online_every=2), workspace)
    assert (second.rows_taken, third.rows_taken) == (40, 14)
    assert third.online is not None
    assert third.online["every"] == 2
    whole = stream(adapting(name="whole", start="2026-03-08", online_every=2), workspace)
    assert whole.online == third.online
    with pytest.raises(ConfigError, match=r"was begun with start=2026-03-08, not 2026-03-01: leave start out"):
        stream(StreamConfig(name="whole", start="2026-03-01"), workspace)
    assert not stream(StreamConfig(name="whole", start="2026-03-08"), workspace).is_new  # the same command again
    assert whole.scores.equals(read_scores(workspace, "learns"))
    assert whole.forecast.table.equals(third.forecast.table)
    mine, theirs = learned(whole), learned(third)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    statuses = {name: count for name, count in third.online.items() if name.startswith("forecast_")}
    assert sum(statuses.values()) == 2 * 2 * 12 * (len(third.forecast.quantile_levels) // 2)


def test_settings_of_intervals_that_learn(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    workspace = Workspace.open(site.home)
    config = load(StreamConfig, "stream_online")
    assert config.online == OnlineConfig()
    assert stream(StreamConfig(name="learns"), workspace).online is None
    with pytest.raises(ConfigError, match="online_every is for online intervals, and the stream has static ones"):
        stream(StreamConfig(name="learns", online_every=3), workspace)
    with pytest.raises(ConfigError, match="online_every is for online intervals"):
        stream(StreamConfig(name="fresh", online_every=3), workspace)
    with pytest.raises(ConfigError, match=r"online: leave it out to keep what the stream has; reset=true"):
        validate(StreamConfig, {"online": False})
    assert validate(StreamConfig, {"online": True}).online == OnlineConfig()
    begun = stream(adapting(), workspace)  # no new rows: the choice is kept all the same
    assert (begun.is_new, begun.rows_taken) == (False, 0)
    grow(site, 30)
    later = stream(StreamConfig(name="learns"), workspace)
    assert later.online is not None
    assert later.online["judged"] > 0
    assert stream(StreamConfig(name="learns", online_every=3), workspace).online == {**later.online, "every": 3}
    assert stream(StreamConfig(name="learns"), workspace).online == {**later.online, "every": 3}
    caplog.clear()
    with caplog.at_level("WARNING", logger="tsforge"):
        anew = stream(adapting(online={**ONLINE, "rate": 0.2}), workspace)
    assert "the online intervals of stream 'learns' start anew: they were made with other settings" in caplog.text
    assert anew.online is not None
    assert (anew.online["judged"], anew.online["every"]) == (0, 3)
    assert stream(StreamConfig(name="learns", reset=True), workspace).online is None


def test_the_command_line(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tsforge", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capfd.readouterr()
        assert "Traceback" not in out.err, out.err
        return int(stop.value.code or 0), out.out, out.err

    target = tmp_path / "forecast.parquet"
    code, text, _ = run("stream", "start=2026-03-08", "--output", str(target), "--json")
    facts = json.loads(text)
    assert (code, facts["new"], facts["rows_taken"]) == (0, True, 2 * (4 * 24 - 1))
    assert len(facts["rows"]) == min(facts["values_outside"], 50) > 0
    code, text, _ = run("predict", "--json")
    truth = json.loads(text)["rows"]
    assert np.allclose(pl.read_parquet(target)["mean"], [row["mean"] for row in truth], atol=1e-6)
    code, text, _ = run("stream")
    assert code == 0
    assert "rows_taken" in text
    code, text, _ = run("stream", "name=learns", "start=2026-03-10", "online=true", "online_every=4", "--json")
    assert code == 0
    told = json.loads(text)
    assert (told["online_every"], told["online_forecast_static"]) == (4, 2 * 2 * 12 * 3)
    assert told["online_judged"] > 0
    assert "online_judged" not in facts
    state = (Path(facts["path"]) / "state.safetensors").read_bytes()
    grow(site, 3)
    for arguments, status, fragment in (
        (["stream", "--output", "x.xlsx"], 2, ".parquet or .csv"),
        (["stream", "moode=window"], 2, "did you mean 'mode'"),
        (["stream", "restart_every=5"], 2, "for mode 'carried'"),
        (["stream", "online_every=5"], 2, "add online=true"),
        (["stream", "online.method=aci", "online.rates=[2]"], 2, "rates must be different numbers between 0 and 1"),
        (["stream", "online.rates=[0.1]"], 2, "only method aci has rates; add method: aci, or remove rates"),
        (["stream", "artifact=ghost"], 5, "ghost"),
    ):
        code, text, error = run(*arguments)
        assert (code, text) == (status, "")
        assert fragment in error
    assert (Path(facts["path"]) / "state.safetensors").read_bytes() == state
