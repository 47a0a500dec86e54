"""The command line as a newcomer meets it: right exit status, one line a mistake, never a traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

SMALL = [
    "data=synthetic",
    "data.source.generator.num_rows=600",
    "data.source.generator.num_series=2",
    "data.source.generator.num_variates=2",
    "data.source.generator.num_anomalies=0",
]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def tsforge(workspace_root: Path, command: Any) -> Any:
    return lambda *arguments: Outcome(*command(*arguments))


def test_version_and_help(tsforge: Any) -> None:
    assert tsforge("--version").out.strip() == "0.1.0"
    help_text = tsforge("--help").out
    for command in ("ingest", "fit", "predict", "backtest", "detect", "tune", "batch", "schedule", "promote", "doctor"):
        assert command in help_text


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["fitt"], 2, "No such command"),
        (["fit", "--nonsense"], 2, "No such option"),
        (["fit", "model.lagz=3"], 2, "did you mean 'lags'"),
        (["fit", "model=ar_nett"], 2, "did you mean 'ar_net'"),
        (["fit", "window.horizon=-3"], 2, "window.horizon"),
        (["fit", "window.horizon=soon"], 2, "window.horizon"),
        (["fit", "--config", "nowhere.yaml"], 2, "does not exist"),
        (["fit", "model.lags"], 2, "not an override"),
        (["fit", "data=nyc_weather"], 3, "ingest"),
        (["ingest", "data=csv", "data.name=x", "data.source.path=/nowhere.csv"], 3, "/nowhere.csv"),
        (["predict", "artifact=ghost"], 5, "ghost"),
        (["data", "report", "ghost"], 3, "ghost"),
        (["benchmark", "--data", "/nowhere.parquet", "--models", "linear"], 3, "/nowhere.parquet"),
        (["--log-level", "loud", "models"], 2, "loud"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_status(tsforge: Any, arguments: list[str], code: int, fragment: str) -> None:
    outcome = tsforge(*arguments)
    assert fragment in outcome.err
    assert outcome.code == code
    assert sum(line.startswith("error: ") for line in outcome.err.splitlines()) == 1
    assert outcome.out == ""


def test_dry_run_prints_a_config_that_loads_back(tsforge: Any, tmp_path: Path) -> None:
    first = tsforge("fit", "data=nyc_weather", "model=linear", "--dry-run")
    assert first.code == 0
    assert yaml.safe_load(first.out)["model"]["name"] == "linear"
    own = tmp_path / "own.yaml"
    own.write_text(first.out, encoding="utf-8")
    again = tsforge("fit", "--config", str(own), "--dry-run")
    assert again.out == first.out


def test_read_only_workspace(tsforge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "file" / "home"))
    outcome = tsforge("data", "list")
    assert outcome.code == 6
    assert "cannot create the workspace" in outcome.err


def test_the_demo_lands_where_every_other_command_looks(tsforge: Any, workspace_root: Path, monkeypatch: Any) -> None:
    from tsforge.app import demo

    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda workspace, progress: seen.append(workspace) or {})
    assert tsforge("demo", "--json").code == 0
    assert tsforge("demo", "--json", "--home", str(workspace_root / "other one")).code == 0
    usual, other = seen
    assert usual.root == workspace_root
    assert demo._home_option(usual) == ""
    assert demo._home_option(other) == f" --home '{other.root}'"


def test_closed_pipe_is_no_error(workspace_root: Path) -> None:
    command = f"{sys.executable} -m tsforge models --json | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_main_journey_through_the_command_line(tsforge: Any, tmp_path: Path) -> None:
    assert tsforge("ingest", *SMALL).code == 0
    again = json.loads(tsforge("ingest", *SMALL, "--json").out)
    assert (again["rows_new"], again["rows_changed"]) == (0, 0)
    fitted = json.loads(
        tsforge(
            "fit",
            *SMALL,
            "model=linear",
            "window.context_length=48",
            "window.horizon=6",
            "tracking.enabled=false",
            "--json",
        ).out
    )
    assert fitted["test_mae"] < 1.5
    target = tmp_path / "forecast.parquet"
    assert tsforge("predict", f"artifact={fitted['artifact']}", "--output", str(target)).code == 0
    import polars as pl

    table = pl.read_parquet(target)
    assert table.height == 2 * 2 * 6  # series, variates, steps
    assert table["step"].max() == 6
    latest = json.loads(tsforge("predict", "artifact=latest", "--json").out)
    assert len(latest["rows"]) == table.height
    assert tsforge("predict", "artifact=latest", "--output", str(tmp_path / "forecast.xlsx")).code == 2


def test_forecast_past_the_end_of_the_data_knows_its_calendar(tsforge: Any) -> None:
    assert tsforge("ingest", "data=nyc_weather").code == 0
    small = ["model.lags=12", "window.context_length=24", "window.horizon=6", "tracking.enabled=false"]
    fitted = tsforge("fit", "data=nyc_weather", "model=ar_net", *small)
    assert fitted.code == 0, fitted.err
    forecast = tsforge("predict", "artifact=latest", "--json")
    assert forecast.code == 0, forecast.err
    rows = json.loads(forecast.out)["rows"]
    assert len(rows) == 3 * 4 * 6
    assert min(row["time"] for row in rows) > max(row["cutoff"] for row in rows)


def test_interrupted_training_resumes_to_the_same_result(tsforge: Any, workspace_root: Path) -> None:
    assert tsforge("ingest", *SMALL).code == 0
    command = [
        "fit", *SMALL, "model=dlinear", "window.context_length=48", "window.horizon=6", "tracking.enabled=false",
        "train.max_epochs=60", "train.patience=null", "train.batch_size=64", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tsforge", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoints = workspace_root / "checkpoints"
    deadline = time.monotonic() + 90
    while not list(checkpoints.rglob("*.ckpt")):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted" in err
    resumed, fresh = tsforge(*command, "--resume"), tsforge(*command)
    assert "starting afresh" not in resumed.err
    one, other = json.loads(resumed.out), json.loads(fresh.out)
    assert one["epochs"] == other["epochs"] == 60
    assert one["test_mse"] == other["test_mse"]
    assert not list(checkpoints.rglob("*.ckpt"))


def test_resume_without_an_interrupted_training_says_that_it_starts_afresh(tsforge: Any) -> None:
    assert tsforge("ingest", *SMALL).code == 0
    command = ["fit", *SMALL, "model=linear", "window.context_length=48", "window.horizon=6", "tracking.enabled=false"]
    fitted = tsforge(*command, "--resume")
    assert fitted.code == 0, fitted.err
    assert "no interrupted training of exactly these settings; starting afresh" in fitted.err + fitted.out
    again = tsforge(*command)
    assert "starting afresh" not in again.err + again.out


@pytest.mark.parametrize(
    ("setting", "message"),
    [("bogus", "TSFORGE_COMPILED=bogus is none of"), ("require", "no kernel can be built here: CXX=no-such-compiler")],
)
def test_doctor_fails_where_required_kernels_cannot_be_had(
    tsforge: Any, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tsforge("doctor").code == 0, "only speed is lost"
    monkeypatch.setenv("TSFORGE_COMPILED", setting)
    found = tsforge("doctor", "--json")
    assert found.code == 6
    (failed,) = [check for check in json.loads(found.out)["checks"] if not check["ok"]]
    assert failed["check"] == "kernels"
    assert message in failed["detail"]
