"""Examine an installation: versions, device, stores, connectivity. Nothing is changed."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tsforge.core.errors import TsforgeError
from tsforge.core.workspace import Workspace

PACKAGES = ("torch", "lightning", "polars", "pandas", "mlflow", "optuna", "streamlit", "sqlalchemy", "pydantic")
MIN_FREE_GIB = 1.0


def examine(home: Workspace | str | Path | None = None) -> dict[str, Any]:
    """Return ``{"ok", "checks": [{"check", "ok", "detail"}]}``; ``ok`` is False when something needed is broken.

    Args:
        home: the workspace, or its folder (None: that of the environment); one that cannot be opened is a failed check.
    """
    checks = [
        _fact("tsforge", version("tsforge")),
        _fact("python", f"{platform.python_version()} on {platform.platform()}"),
        *(_package(name) for name in PACKAGES),
        _device(),
        _kernels(),
        *_places(home),
    ]
    return {"ok": all(check["ok"] for check in checks), "checks": checks}


def _fact(name: str, detail: str, ok: bool = True) -> dict[str, Any]:
    return {"check": name, "ok": ok, "detail": detail}


def _package(name: str) -> dict[str, Any]:
    try:
        return _fact(name, version(name))
    except PackageNotFoundError:
        return _fact(name, "not installed; run make setup", ok=False)


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
        return _fact("device", f"{torch.cuda.device_count()} GPU ({', '.join(sorted(names))}), {bf16} bfloat16")
    return _fact("device", f"CPU, {torch.get_num_threads()} thread(s); no CUDA device")


def _kernels() -> dict[str, Any]:
    """Say whether fast kernels can be had; without them everything runs, slower, unless they are required."""
    import torch

    from tsforge.ops import compiled, triton_support

    try:
        detail = f"CPU {compiled.outlook()}"
        if torch.cuda.is_available():
            reason = triton_support.unavailable_reason(torch.device("cuda"))
            detail += f"; GPU {'Triton' if reason is None else reason}"
    except TsforgeError as error:
        return _fact("kernels", str(error), ok=False)
    return _fact("kernels", detail)


def _places(home: Workspace | str | Path | None) -> list[dict[str, Any]]:
    try:
        workspace = home if isinstance(home, Workspace) else Workspace.open(home)
    except TsforgeError as error:  # stores lie in it, so there is nothing more to look at
        return [_fact("workspace", str(error), ok=False)]
    return [_disk(workspace), _store(workspace), _tracking(workspace)]


def _disk(workspace: Workspace) -> dict[str, Any]:
    free = shutil.disk_usage(workspace.root).free / 2**30
    detail = f"{workspace.root}, {free:.1f} GiB free"
    return _fact("workspace", detail, ok=free >= MIN_FREE_GIB)


def _store(workspace: Workspace) -> dict[str, Any]:
    from tsforge.data.store import SeriesStore

    try:
        datasets = SeriesStore(workspace.database_url).datasets()
    except TsforgeError as error:
        return _fact("series store", str(error), ok=False)
    kind = workspace.database_url.split(":", 1)[0]
    return _fact("series store", f"{kind}, {len(datasets)} data set(s)")


def _tracking(workspace: Workspace) -> dict[str, Any]:
    from tsforge.tracking.runs import Tracker

    kind = workspace.tracking_uri.split(":", 1)[0]
    try:
        newest = Tracker.open(workspace).runs(limit=1)
    except TsforgeError as error:
        return _fact("tracking", str(error), ok=False)
    return _fact("tracking", f"{kind}, newest run: {newest[0]['name'] if newest else 'none yet'}")
