"""SIGTERM ends a command like Ctrl-C: one message, status 130, nothing on standard output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SMALL = [
    "data=synthetic",
    "data.source.generator.num_rows=600",
    "data.source.generator.num_series=2",
    "data.source.generator.num_anomalies=0",
]
TRAINING = [
    "window.context_length=48", "window.horizon=6", "train.max_epochs=100000", "train.patience=null",
    "train.batch_size=16",
]  # fmt: skip


def run(arguments: Sequence[str], *, kill_when: Path | None = None) -> tuple[int, str, str]:
    """Run Python to its end, with SIGTERM as soon as a file lies below ``kill_when``: status, output, errors."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while kill_when is not None and not any(kill_when.rglob("*.ckpt")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
    if kill_when is not None:
        process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def test_a_training_without_tracking_ends_with_130(workspace_root: Path) -> None:
    assert run(["-m", "tsforge", "ingest", *SMALL])[0] == 0
    fit = ["-m", "tsforge", "fit", *SMALL, "model=dlinear", *TRAINING, "tracking.enabled=false", "--json"]
    code, out, errors = run(fit, kill_when=workspace_root / "checkpoints")
    assert code == 130, errors
    assert out == ""
    assert "Traceback" not in errors
    assert errors.count("interrupted") == 1


COMMAND = """
import os, signal, sys
from tsforge import cli
cli._attribute = lambda name: lambda: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["tsforge", "models", "--json"]
cli.main()
"""


def test_any_command_ends_with_130() -> None:
    code, out, errors = run(["-c", COMMAND])
    assert (code, out) == (130, "")
    assert "Traceback" not in errors
    assert errors.count("interrupted") == 1


PIPELINE = """
import os, signal, sys
import pipelines.{name} as pipeline
def run(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
pipeline.run = run
sys.exit(pipeline.main({arguments}))
"""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ingest", SMALL),
        pytest.param("checks", SMALL, marks=pytest.mark.slow),
        ("retrain", ["retrain"]),
        pytest.param("batch_detect", ["batch/nyc_weather"], marks=pytest.mark.slow),
        ("batch_forecast", ["batch/nyc_weather"]),
    ],
)
def test_a_scheduled_job_ends_with_130(workspace_root: Path, name: str, arguments: list[str]) -> None:
    code, out, errors = run(["-c", PIPELINE.format(name=name, arguments=arguments)])
    assert code == 130, errors
    assert out == ""
    assert "Traceback" not in errors
    assert errors.count("interrupted") == 1
