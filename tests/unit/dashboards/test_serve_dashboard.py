"""The command that serves the dashboard: where it listens, its colours, and a port that is taken."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tsforge.app.serve import dashboard_command, serve_dashboard
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace


def test_command_starts_the_router_here_without_telemetry() -> None:
    command = dashboard_command("127.0.0.1", 8765)
    assert command[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert Path(command[4]).name == "app.py"
    assert Path(command[4]).is_file()
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[5:])
    assert flags["server.address"] == "127.0.0.1"
    assert flags["server.port"] == "8765"
    assert flags["browser.gatherUsageStats"] == "false"
    assert {"theme.light.primaryColor", "theme.dark.primaryColor"} <= flags.keys()


def test_every_flag_is_known_to_streamlit() -> None:
    from streamlit import config

    known = config.get_config_options()
    unknown = [flag for flag in dashboard_command("localhost", 1)[5:] if flag[2:].split("=")[0] not in known]
    assert unknown == []


def test_a_taken_port_is_refused_with_what_to_do(workspace_root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=rf"127.0.0.1:{port}.*--port"):
            serve_dashboard(Workspace.open(), "127.0.0.1", port)
