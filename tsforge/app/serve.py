"""Start the dashboard as a child process: theme, address and workspace set, no telemetry."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace


def dashboard_command(address: str, port: int) -> list[str]:
    """Return the command line that serves the dashboard.

    Raises:
        BackendError: the dashboard's files are not installed.
    """
    found = importlib.util.find_spec("dashboards")
    if found is None or not found.submodule_search_locations:
        raise BackendError("the dashboard is not installed; reinstall tsforge with its dashboards folder")
    folder = Path(next(iter(found.submodule_search_locations)))
    theme = tomllib.loads((folder / "theme.toml").read_text(encoding="utf-8"))["theme"]
    colours = {f"theme.{mode}.{name}": value for mode, chosen in theme.items() for name, value in chosen.items()}
    settings = {
        "server.address": address,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        **colours,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "streamlit", "run", str(folder / "app.py"), *flags]


def serve_dashboard(workspace: Workspace, address: str, port: int) -> int:
    """Serve until the process is stopped; return its exit status (0 after Ctrl-C).

    Raises:
        BackendError: the port is taken, or the dashboard is not installed.
    """
    command = dashboard_command(address, port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise BackendError(
                f"cannot listen on {address}:{port} ({error.strerror}); choose another with --port"
            ) from error
    environment = {**os.environ, "TSFORGE_HOME": str(workspace.root)}
    process = subprocess.Popen(command, env=environment)

    def forward(number: int, _frame: object) -> None:
        process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            process.kill()
