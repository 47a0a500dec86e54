"""Artifacts: bitwise round trip, hashes, formats, refusals of frames that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from tsforge.artifact import (
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    collect_provenance,
    create_artifact,
    load_artifact,
    match_frame,
    newest_first,
    save_artifact,
    stated_id,
    verify_artifact,
)
from tsforge.core.errors import ArtifactError, BackendError
from tsforge.data.frame import SeriesFrame

FILES = [
    "calibration.parquet",
    "config.yaml",
    "explanation.json",
    "metrics.json",
    "provenance.json",
    "schema.json",
    "spec.json",
    "weights.safetensors",
]


@pytest.fixture
def make_artifact(make_network, panel, window):
    def build(**settings) -> Artifact:
        return create_artifact(
            make_network(seed=4, **settings),
            config={"train": {"max_epochs": 3}, "name": "größe", "list": (1, 2)},
            schema=panel.schema,
            grid=panel.grid,
            series_ids=panel.series_ids,
            window=window,
            calibration=pl.DataFrame({"step": [1, 2], "low": [-1.5, -2.0], "high": [1.5, 2.0]}),
            metrics={"valid_mse": torch.tensor(0.25), "by_step": torch.tensor([1.0, 2.0])},
            provenance=collect_provenance(data_fingerprint="abc", seeds={"train": 4}),
        )

    return build


@pytest.fixture
def saved(make_artifact, tmp_path: Path) -> Path:
    path = save_artifact(make_artifact(likelihood={"name": "quantiles"}), tmp_path).path
    assert path is not None
    return path


@pytest.mark.parametrize("likelihood", ["point", "normal", "student_t", "quantiles"])
@pytest.mark.parametrize("kind", ["none", "global", "series", "window", "window_mean", "last"])
def test_round_trip_is_bitwise(kind: str, likelihood: str, make_artifact, windows, tmp_path: Path) -> None:
    artifact = make_artifact(likelihood={"name": likelihood}, scaling={"kind": kind, "robust": True})
    artifact.network.set_residual_scale(torch.rand(6, 2) + 0.1)
    saved = save_artifact(artifact, tmp_path)
    loaded = load_artifact(tmp_path / artifact.id)
    assert loaded.path == saved.path == tmp_path / artifact.id
    first, second = artifact.network.state_dict(), loaded.network.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    batch = windows.__getitems__([0, 5, 301])
    levels = [] if likelihood == "point" else [0.1, 0.5, 0.9]
    here, there = artifact.network.predict(batch, levels), loaded.network.predict(batch, levels)
    assert torch.equal(here.mean, there.mean)
    assert not levels or torch.equal(here.quantiles, there.quantiles)
    assert not loaded.network.training


def test_everything_else_comes_back(make_artifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    save_artifact(artifact, tmp_path)
    loaded = load_artifact(tmp_path / artifact.id)
    for name in ("id", "schema", "grid", "series_ids", "window", "provenance", "explanation"):
        assert getattr(loaded, name) == getattr(artifact, name), name
    assert loaded.config == {"train": {"max_epochs": 3}, "name": "größe", "list": [1, 2]}
    assert loaded.metrics == {"valid_mse": 0.25, "by_step": [1.0, 2.0]}
    assert loaded.calibration is not None
    assert loaded.calibration.equals(artifact.calibration)
    assert loaded.network.config == artifact.network.config
    assert loaded.network.spec == artifact.network.spec
    assert loaded.model_name == "dlinear"


def test_the_folder_holds_what_the_documentation_lists(saved: Path) -> None:
    assert sorted(item.name for item in saved.iterdir()) == sorted([*FILES, MANIFEST])
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert sorted(manifest["files"]) == FILES


def test_ids_sort_by_time_and_differ(make_artifact) -> None:
    first, second = make_artifact(), make_artifact()
    assert re.fullmatch(r"dlinear-\d{8}T\d{12}Z-[0-9a-f]{8}", first.id)
    assert first.id < second.id


def test_newest_first_goes_by_the_time_in_the_id(make_artifact, tmp_path: Path) -> None:
    network = make_artifact()
    for identity in ("var-20260101T000000000000Z-11111111", "ar_net-20270101T000000Z-22222222", "by-hand"):
        save_artifact(replace(network, id=identity), tmp_path)
    shutil.copytree(tmp_path / "var-20260101T000000000000Z-11111111", tmp_path / "zz-copy")
    shutil.copytree(tmp_path / "by-hand", tmp_path / ".by-hand.x.tmp")
    (tmp_path / "no-artifact").mkdir()
    names = ["ar_net-20270101T000000Z-22222222", "var-20260101T000000000000Z-11111111", "zz-copy", "by-hand"]
    assert [path.name for path in newest_first(tmp_path)] == names
    assert stated_id(tmp_path / "zz-copy") == names[1]
    assert newest_first(tmp_path / "nowhere") == []


def test_verifying_reads_no_network_and_names_what_is_damaged(saved: Path) -> None:
    assert verify_artifact(saved) == saved.name
    content = (saved / "metrics.json").read_bytes()
    (saved / "metrics.json").write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"metrics\.json is damaged"):
        verify_artifact(saved)


def test_provenance_names_versions_and_seeds(make_artifact) -> None:
    provenance = make_artifact().provenance
    assert provenance["packages"]["torch"] == torch.__version__
    assert provenance["data_fingerprint"] == "abc"
    assert provenance["seeds"] == {"train": 4}
    assert provenance["revision"] is None or re.fullmatch(r"[0-9a-f]+(-dirty)?", provenance["revision"])


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    load_artifact(saved)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found_and_named(name: str, saved: Path) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)} is damaged"):
        load_artifact(saved)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(name)):
        load_artifact(saved)


def _edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_a_newer_format_asks_for_an_upgrade(saved: Path) -> None:
    _edit_manifest(saved, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ArtifactError, match=r"newer tsforge .* upgrade"):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "does not describe"),
        ({"format_version": "one"}, "no valid format version"),
        ({"format_version": 0}, "no valid format version"),
        ({"format_version": True}, "no valid format version"),
        ({"files": []}, "lacks its id or its list"),
        ({"files": {}}, "does not list config.yaml"),
        ({"id": "../x"}, "states an id that no artifact has"),
        ({"id": ".."}, "states an id that no artifact has"),
        ({"id": ""}, "states an id that no artifact has"),
        ({"files": dict.fromkeys(FILES)}, r"states no SHA-256 of calibration\.parquet"),
        ({"files": dict.fromkeys(FILES, "x")}, r"states no SHA-256 of calibration\.parquet"),
        ({"files": {name: {} for name in ("a\0b", *FILES)}}, r"lists 'a\\x00b', which lies outside"),
    ],
)
def test_strange_manifests_are_refused(changes: dict, message: str, saved: Path) -> None:
    _edit_manifest(saved, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


def test_files_outside_the_folder_are_never_read(saved: Path) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    _edit_manifest(saved, files=manifest["files"])
    with pytest.raises(ArtifactError, match="outside the artifact"):
        load_artifact(saved)


def test_content_of_another_form_is_refused(saved: Path) -> None:
    for name, content in (("schema.json", b"[]"), ("config.yaml", b"a: ["), ("metrics.json", b"[" * 100_000)):
        before = (saved / name).read_bytes()
        (saved / name).write_bytes(content)
        _rehash(saved, name)
        with pytest.raises(ArtifactError, match="cannot be rebuilt"):
            load_artifact(saved)
        (saved / name).write_bytes(before)
        _rehash(saved, name)
    (saved / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="manifest.json is damaged"):
        load_artifact(saved)


def test_unreadable_manifest_and_missing_folder(saved: Path, tmp_path: Path) -> None:
    (saved / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="manifest.json is damaged"):
        load_artifact(saved)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_artifact(tmp_path / "nothing")


def _rehash(path: Path, name: str) -> None:
    import hashlib

    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    _edit_manifest(path, files=manifest["files"])


def test_a_model_that_is_not_installed_is_named(saved: Path) -> None:
    spec = json.loads((saved / "spec.json").read_text())
    spec["network"]["model"]["name"] = "from_elsewhere"
    (saved / "spec.json").write_text(json.dumps(spec))
    _rehash(saved, "spec.json")
    with pytest.raises(ArtifactError, match="unknown model 'from_elsewhere'"):
        load_artifact(saved)


def test_weights_of_another_shape_are_refused(saved: Path) -> None:
    spec = json.loads((saved / "spec.json").read_text())
    spec["data"]["horizon"] = 7
    (saved / "spec.json").write_text(json.dumps(spec))
    _rehash(saved, "spec.json")
    with pytest.raises(ArtifactError, match="weights do not fit the model"):
        load_artifact(saved)


def test_saving_twice_keeps_the_first(make_artifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    save_artifact(artifact, tmp_path)
    with pytest.raises(BackendError, match="exists already"):
        save_artifact(artifact, tmp_path)
    load_artifact(tmp_path / artifact.id)


def test_a_failed_save_leaves_nothing(make_artifact, tmp_path: Path) -> None:
    artifact = replace(make_artifact(), metrics={"bad": object()})
    with pytest.raises(ArtifactError, match="cannot store a object"):
        save_artifact(artifact, tmp_path)
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(BackendError, match="cannot write"):
        save_artifact(replace(artifact, metrics={}), place / "below")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file"]


def test_a_moved_artifact_still_loads(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(saved, target)
    assert load_artifact(target).id == saved.name


# frames


def _rebuilt(frame: SeriesFrame, table: pl.DataFrame, freq: str = "1h", **roles) -> SeriesFrame:
    settings = {"targets": ["load", "temp"], **roles}
    return SeriesFrame.from_long(table, series_id="series_id", time="time", freq=freq, **settings)


def test_the_training_frame_fits(make_artifact, frame) -> None:
    assert match_frame(make_artifact(), frame) is frame
    match_frame(make_artifact(), frame.select_series(["south"]))


def test_covariates_the_network_does_not_read_are_left_out(make_artifact, frame) -> None:
    wider = _rebuilt(frame, frame.table.with_columns(wind=pl.lit(1.0)), past=["wind"])
    assert match_frame(make_artifact(), wider).table.equals(frame.table)


def test_frames_that_differ_are_refused_by_name(make_artifact, frame) -> None:
    artifact, table = make_artifact(), frame.table
    slow = table.filter(pl.col("time").dt.hour() % 2 == 0)
    cases = {
        r"freq 1h, the data has 2h": _rebuilt(frame, slow, freq="2h"),
        r"needs the targets column\(s\) temp": _rebuilt(frame, table, targets=["load"]),
        r"does not know the target\(s\) wind": _rebuilt(
            frame, table.with_columns(wind=pl.lit(1.0)), targets=["load", "temp", "wind"]
        ),
        r"order load, temp, the data has temp, load": _rebuilt(frame, table, targets=["temp", "load"]),
        r"off the grid": _rebuilt(frame, table.with_columns(pl.col("time").dt.offset_by("30m"))),
    }
    for message, other in cases.items():
        with pytest.raises(ArtifactError, match=message):
            match_frame(artifact, other)


def test_unknown_series_matter_only_to_series_scaling(make_artifact, frame) -> None:
    stranger = _rebuilt(frame, frame.table.with_columns(pl.col("series_id").replace("south", "west")))
    match_frame(make_artifact(scaling={"kind": "window"}), stranger)
    with pytest.raises(ArtifactError, match=r"not fitted on 1 of 2 series \(west\)"):
        match_frame(make_artifact(scaling={"kind": "series"}), stranger)
