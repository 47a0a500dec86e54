"""What a run ran on: versions, platform, processors; enough to set the same thing up again."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any


def package_versions() -> dict[str, str]:
    """Return the installed version of tsforge and of every package it requires without an extra."""
    versions: dict[str, str] = {}
    for name in ["tsforge", *_required()]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _required() -> list[str]:
    try:
        lines = metadata.requires("tsforge") or []
    except metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if "extra ==" not in line)
    return sorted({match.group() for match in names if match})


def environment() -> dict[str, Any]:
    """Return Python, platform, processor count, thread limit and package versions as plain types."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": package_versions(),
    }


def requirements(names: tuple[str, ...]) -> list[str]:
    """Return ``name==version`` of installed packages; a build suffix such as ``+cpu`` is dropped, it is no release."""
    versions = {name: metadata.version(name).partition("+")[0] for name in names}
    return [f"{name}=={version}" for name, version in versions.items()]
