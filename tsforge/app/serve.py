"""Start the dashboard as a child process: theme, address and workspace set, no telemetry."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import tsforge
from tsforge.core.errors import BackendError
from tsforge.core.workspace import Workspace


def dashboard_command(address: str, port: int) -> list[str]:
    """Return the command line that serves the dashboard.

    Raises:
        BackendError: the dashboard's files are not installed.
    """
    # beside our own package, wherever that is: a folder ``dashboards`` in the current directory is not ours
    folder = Path(tsforge.__file__).parents[1] / "dashboards"
    if not (folder / "app.py").is_file():
        raise BackendError("the dashboard is not installed; reinstall tsforge with its dashboards folder")
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
    return [sys.executable, "-P", "-m", "streamlit", "run", str(folder / "app.py"), *flags]


def _check_free(address: str, port: int) -> None:
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        wrong_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        shown = f"[{address}]" if ":" in address else address
        raise BackendError(
            f"cannot listen on {shown}:{port} ({error.strerror}); choose another with "
            + ("--address" if wrong_address else "--port")
        ) from error


def serve_dashboard(workspace: Workspace, address: str, port: int) -> int:
    """Serve until the process is stopped; return its exit status (0 after Ctrl-C).

    Raises:
        BackendError: the port is taken, the address is none of this machine, or the dashboard is not installed.
    """
    command = dashboard_command(address, port)
    _check_free(address, port)
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
