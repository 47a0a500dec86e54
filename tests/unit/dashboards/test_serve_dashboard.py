"""The command that serves the dashboard: where it listens, its colours, and a port that is taken."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tsforge.app.serve import dashboard_command, serve_dashboard
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace


def test_command_starts_the_router_here_without_telemetry() -> None:
    command = dashboard_command("127.0.0.1", 8765)
    assert command[:5] == [sys.executable, "-P", "-m", "streamlit", "run"]
    assert Path(command[5]).name == "app.py"
    assert Path(command[5]).is_file()
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in command[6:])
    assert flags["server.address"] == "127.0.0.1"
    assert flags["server.port"] == "8765"
    assert flags["browser.gatherUsageStats"] == "false"
    assert {"theme.light.primaryColor", "theme.dark.primaryColor"} <= flags.keys()


def test_every_flag_is_known_to_streamlit() -> None:
    from streamlit import config

    known = config.get_config_options()
    unknown = [flag for flag in dashboard_command("localhost", 1)[6:] if flag[2:].split("=")[0] not in known]
    assert unknown == []


def listening(address: str) -> socket.socket:
    """Return a socket on a free port; skips on a machine without IPv6 only."""
    if ":" not in address:
        return socket.create_server((address, 0))
    try:
        return socket.create_server((address, 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


ADDRESSES = pytest.mark.parametrize(("address", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])


@ADDRESSES
def test_a_taken_port_is_refused_with_what_to_do(workspace_root: Path, address: str, shown: str) -> None:
    with listening(address) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=rf"{re.escape(shown)}:{port} .*--port"):
            serve_dashboard(Workspace.open(), address, port)


@pytest.mark.parametrize("address", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_of_this_machine_is_refused(workspace_root: Path, address: str) -> None:
    with pytest.raises(BackendError, match=rf"{address}:8765 .*--address"):
        serve_dashboard(Workspace.open(), address, 8765)


@ADDRESSES
def test_it_answers_whatever_lies_in_the_current_directory(
    workspace_root: Path, tmp_path: Path, address: str, shown: str
) -> None:
    """A folder ``dashboards`` or a file ``streamlit.py`` there is not ours."""
    with listening(address) as free:
        port = free.getsockname()[1]
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards" / "__init__.py").touch()
    (tmp_path / "streamlit.py").write_text("raise SystemExit('not ours')\n")
    script = (
        "import sys; from tsforge.app.serve import serve_dashboard; from tsforge.core.workspace import Workspace;"
        "sys.exit(serve_dashboard(Workspace.open(), sys.argv[1], int(sys.argv[2])))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, address, str(port)], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not answers(f"http://{shown}:{port}/_stcore/health"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False
