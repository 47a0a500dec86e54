"""The built wheel carries everything: configs, dashboard, pipelines, embedded data; it runs far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_wheel_runs_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "wheel"), str(ROOT)]
    subprocess.run(command, check=True, timeout=280)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "TSFORGE_HOME": str(tmp_path / "home")}
    environment.pop("TSFORGE_CONFIGS", None)

    def run(*arguments: str) -> str:
        code = (
            "import tsforge; assert 'site' in tsforge.__file__, tsforge.__file__; from tsforge.cli import main; main()"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "name: linear" in run("fit", "model=linear", "--dry-run")
    assert '"rows_new": 26115' in run("ingest", "data=nyc_weather", "--json")
    assert (site / "dashboards" / "theme.toml").is_file()
    assert (site / "pipelines" / "batch_forecast.py").is_file()
