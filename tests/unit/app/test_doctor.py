"""The examination of an installation reports whatever is broken; it never ends without its report."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tsforge.app.doctor import examine
from tsforge.core.workspace import Workspace


def test_a_folder_that_cannot_be_written_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    found = examine(tmp_path / "file" / "home")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for report, message in (
        (found, "cannot create the workspace"),
        (examine(tmp_path), "is read-only; set TSFORGE_HOME"),
    ):
        assert not report["ok"]
        (failed,) = (check for check in report["checks"] if not check["ok"])
        assert failed["check"] == "workspace"
        assert message in failed["detail"]
        assert {"tsforge", "python", "torch", "device"} <= {check["check"] for check in report["checks"]}


def test_a_folder_and_its_workspace_are_examined_alike(tmp_path: Path) -> None:
    by_folder, by_workspace = examine(tmp_path), examine(Workspace.open(tmp_path))
    names = [check["check"] for check in by_folder["checks"]]
    assert names == [check["check"] for check in by_workspace["checks"]]
    assert names[-3:] == ["workspace", "series store", "tracking"]


def test_a_tracking_database_that_speaks_something_else_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsforge.tracking.client._CONNECT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://ann@127.0.0.1:{server.getsockname()[1]}/x")
        report = examine(tmp_path)
    (failed,) = (check for check in report["checks"] if not check["ok"])
    assert failed["check"] == "tracking"
    assert "cannot log in" in failed["detail"]
