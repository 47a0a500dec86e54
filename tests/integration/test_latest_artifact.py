"""Which artifact ``latest`` is, whatever folders are called, and what a message names as the newest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tsforge.app.forecast import PredictConfig, find_artifact, predict
from tsforge.artifact import MANIFEST, load_artifact
from tsforge.core.errors import ArtifactError
from tsforge.core.workspace import Workspace
from tsforge.tracking.registry import resolve


def copied(original: Path, name: str, identity: str | None = None) -> Path:
    """Copy an artifact under another name, with another id if one is given."""
    place = original.with_name(name)
    shutil.copytree(original, place)
    if identity is not None:
        manifest = json.loads((place / MANIFEST).read_text())
        (place / MANIFEST).write_text(json.dumps(manifest | {"id": identity}))
    return place


@pytest.fixture
def workspace(site: Any) -> Workspace:
    return Workspace.open()


def test_copies_under_other_names_are_as_old_as_the_original(site: Any, workspace: Workspace) -> None:
    original = workspace.artifacts / site.artifact
    for name in ("linear-backup", "zz-9-z", f"{site.artifact}-old"):
        copied(original, name)
    assert find_artifact("latest", workspace) == original
    newer = "ar_net-20991231T235959000000Z-00000000"
    copied(original, newer, newer)
    assert find_artifact("latest", workspace).name == newer
    assert predict(PredictConfig(), workspace).metadata["artifact_id"] == newer
    assert find_artifact("linear-backup", workspace) == workspace.artifacts / "linear-backup"


def test_a_renamed_newest_one_is_still_the_newest(site: Any, workspace: Workspace) -> None:
    newer = "ar_net-20991231T235959000000Z-00000000"
    kept = copied(workspace.artifacts / site.artifact, "a", newer)
    assert find_artifact("latest", workspace) == kept
    assert load_artifact(find_artifact("latest", workspace)).id == newer


def test_ids_without_a_time_come_last_and_half_written_ones_not_at_all(site: Any, workspace: Workspace) -> None:
    original = workspace.artifacts / site.artifact
    copied(original, "zz", "zz-by-hand")
    copied(original, ".ar_net-20991231T235959000000Z-00000000.x.tmp", "ar_net-20991231T235959000000Z-00000000")
    assert find_artifact("latest", workspace) == original
    shutil.rmtree(original)
    assert find_artifact("latest", workspace).name == "zz"


def test_a_damaged_newest_one_is_reported_not_passed_over(site: Any, workspace: Workspace) -> None:
    newer = "ar_net-20991231T235959000000Z-00000000"
    manifest = copied(workspace.artifacts / site.artifact, newer, newer) / MANIFEST
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(ArtifactError, match=rf"{newer}/manifest.json is damaged"):
        predict(PredictConfig(), workspace)


def test_the_newest_are_named_by_time_not_by_model(site: Any, workspace: Workspace) -> None:
    names = [f"{model}-209{year}1231T235959000000Z-00000000" for year, model in enumerate(("var", "s4", "gru", "ar"))]
    for name in names:
        copied(workspace.artifacts / site.artifact, name, name)
    with pytest.raises(ArtifactError, match=rf"newest here: {names[3]}, {names[2]}, {names[1]}\)"):
        resolve("ar_net-20000101T000000Z-00000000", workspace)
