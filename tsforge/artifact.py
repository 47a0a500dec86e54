"""A fitted forecaster on disk: one folder, no pickle, every file hashed.

``config.yaml`` the run's resolved config, ``spec.json`` network config, sizes and window (of an ensemble also those of
its members), ``schema.json`` columns, grid and series, ``weights.safetensors``, ``calibration.parquet`` (if
calibrated), ``dependence.safetensors`` (if there is a structure over the horizon, for sample paths), ``metrics.json``,
``explanation.json``, ``provenance.json``, long tables of the model (``evolution.parquet``, if it has some) and of its
training (``evolution_epochs.parquet``, if asked for) and ``manifest.json`` (format version, SHA-256 of every file),
which is written last.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as _save_tensors

from tsforge.contracts.tensors import DataSpec
from tsforge.core.atomic import atomic_directory, atomic_file
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, DataError, TsforgeError, listing
from tsforge.core.formats import check_version
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid
from tsforge.data.schema import SeriesSchema
from tsforge.data.windows import WindowSpec
from tsforge.ensemble import EnsembleNetwork
from tsforge.network import ForecastNetwork, NetworkConfig

FORMAT = "tsforge-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")  # the name of one folder, as ``create_artifact`` makes them
_MADE = re.compile(r"-(\d{8}T\d{6,12})Z-[0-9a-f]{8}")  # how an id ends: UTC time and hash
_TRAINING_TABLES = ("evolution_epochs",)
_PACKAGES = ("tsforge", "torch", "lightning", "numpy", "polars", "safetensors")
_DAMAGE = (  # what content of the wrong form raises
    TsforgeError,
    SafetensorError,
    pl.exceptions.PolarsError,
    yaml.YAMLError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
)
_REQUIRED = (
    "config.yaml",
    "spec.json",
    "schema.json",
    "weights.safetensors",
    "metrics.json",
    "explanation.json",
    "provenance.json",
)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A fitted network with everything needed to apply, judge and reproduce it.

    Attributes:
        id: ``MODEL-UTCTIME-HASH``, unique and sortable.
        network: on the CPU, in evaluation mode.
        config: the resolved config of the run that made it.
        schema, grid, series_ids: columns, time grid and series of the training data, in the order of the network.
        window: context length, horizon and stride.
        calibration: split-conformal table, None when not calibrated.
        dependence: named tensors of ``forecasting.dependence``, None when it was not estimated.
        metrics: name -> number, on validation data.
        provenance: versions, git revision, data fingerprint, seeds, time of making.
        explanation: fitted quantities worth showing, from ``ForecastModel.explain``.
        tables: long tables of the training, by name; in the folder as Parquet.
        path: folder it was saved to or loaded from.
    """

    id: str
    network: ForecastNetwork
    config: dict[str, Any]
    schema: SeriesSchema
    grid: TimeGrid
    series_ids: tuple[str, ...]
    window: WindowSpec
    calibration: pl.DataFrame | None = None
    dependence: dict[str, torch.Tensor] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    explanation: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    path: Path | None = None

    @property
    def model_name(self) -> str:
        """Registered name of the model."""
        return self.network.config.model.name


def create_artifact(
    network: ForecastNetwork,
    *,
    config: Mapping[str, Any],
    schema: SeriesSchema,
    grid: TimeGrid,
    series_ids: tuple[str, ...],
    window: WindowSpec,
    provenance: Mapping[str, Any],
    calibration: pl.DataFrame | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Artifact:
    """Return an unsaved artifact with a fresh id and the model's explanation; the network goes to the CPU, evaluating.

    Args:
        network: fitted.
        config: resolved config of the run, plain types.
        schema, grid, series_ids, window: what the training data looked like.
        provenance: usually ``collect_provenance(...)``.
        calibration: split-conformal table.
        metrics: plain numbers.
    """
    network = network.cpu().eval()
    weights = hashlib.sha256(tensor_bytes(_state(network)))
    weights.update(json.dumps(dict(config), sort_keys=True, default=str).encode())
    made = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    return Artifact(
        id=f"{network.config.model.name}-{made}-{weights.hexdigest()[:8]}",
        network=network,
        config=dict(config),
        schema=schema,
        grid=grid,
        series_ids=tuple(series_ids),
        window=window,
        calibration=calibration,
        metrics=dict(metrics or {}),
        provenance=dict(provenance),
        explanation=network.model.explain(),
    )


def collect_provenance(*, data_fingerprint: str, seeds: Mapping[str, int]) -> dict[str, Any]:
    """Return versions, git revision (None outside a checkout), platform, data fingerprint, seeds and the time now."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "revision": _revision(),
        "data_fingerprint": data_fingerprint,
        "seeds": dict(seeds),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the commit of the checkout this package runs from, with ``-dirty`` for uncommitted changes."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Return named tensors as the bytes of a safetensors file."""
    return bytes(_save_tensors(tensors))


def _state(network: ForecastNetwork) -> dict[str, torch.Tensor]:
    """Return weights and buffers as separate contiguous tensors (tied ones are stored once for each name)."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """Return a JSON form of the NumPy and torch scalars and arrays that reports may hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, datetime):
        return value.isoformat()
    raise ArtifactError(f"cannot store a {type(value).__name__} in an artifact: {value!r}")


def save_artifact(artifact: Artifact, directory: Path) -> Artifact:
    """Write ``directory / artifact.id`` whole or not at all and return the artifact with its path.

    Raises:
        BackendError: the folder exists already, is read-only, or the disk is full.
        ArtifactError: a value has no plain form.
    """
    network = artifact.network
    tables = long_tables(artifact)
    files: dict[str, bytes] = {
        "config.yaml": yaml.safe_dump(json.loads(_json(artifact.config)), sort_keys=False, allow_unicode=True).encode(),
        "spec.json": _json(
            {
                "network": network.config.model_dump(mode="json"),
                "data": asdict(network.spec),
                "window": asdict(artifact.window),
                **_members(network),
            }
        ),
        "schema.json": _json(
            {
                "schema": artifact.schema.to_dict(),
                "grid": artifact.grid.to_dict(),
                "series_ids": list(artifact.series_ids),
            }
        ),
        "weights.safetensors": tensor_bytes(_state(network)),
        "metrics.json": _json(artifact.metrics),
        "explanation.json": _json({name: part for name, part in artifact.explanation.items() if name not in tables}),
        "provenance.json": _json(artifact.provenance),
    }
    if artifact.dependence is not None:
        files["dependence.safetensors"] = tensor_bytes(artifact.dependence)
    path = Path(directory) / artifact.id
    with atomic_directory(path) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if artifact.calibration is not None:
            artifact.calibration.write_parquet(temporary / "calibration.parquet")
        for name, table in {**tables, **artifact.tables}.items():
            table.write_parquet(temporary / f"{name}.parquet")
        listed = {
            item.name: {"sha256": hashlib.sha256(item.read_bytes()).hexdigest(), "bytes": item.stat().st_size}
            for item in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "id": artifact.id, "files": listed}
        (temporary / MANIFEST).write_bytes(_json(manifest))
    return replace(artifact, path=path)


def _members(network: ForecastNetwork) -> dict[str, Any]:
    """Return what an ensemble is made of, nothing of a plain network."""
    if not isinstance(network, EnsembleNetwork):
        return {}
    members = [{"network": one.config.model_dump(mode="json"), "data": asdict(one.spec)} for one in network.members]
    return {"members": members, "weights": list(network.weights.shape)}


def long_tables(artifact: Artifact) -> dict[str, pl.DataFrame]:
    """Return the parts of the explanation that are kept as Parquet, with the names of variates and the artifact's id.

    Columns: ``run`` (id of the artifact), then those of the records.
    """
    variates = dict(enumerate(artifact.schema.targets))
    tables = {}
    for name in artifact.network.model.long_tables:
        records = artifact.explanation.get(name)
        if records:
            table = pl.DataFrame(records, infer_schema_length=None)
            named = pl.col("row", "column").replace_strict(variates, return_dtype=pl.String)
            tables[name] = table.with_columns(named).select(pl.lit(artifact.id).alias("run"), pl.all())
    return tables


def _read_tables(contents: Mapping[str, bytes], names: tuple[str, ...], variates: tuple[str, ...]) -> dict[str, Any]:
    """Return stored long tables as the records they were made from."""
    numbers = {name: number for number, name in enumerate(variates)}
    found = {}
    for name in names:
        content = contents.get(f"{name}.parquet")
        if content is not None:
            table = pl.read_parquet(content).drop("run")
            named = pl.col("row", "column").replace_strict(numbers, return_dtype=pl.Int64)
            found[name] = table.with_columns(named).to_dicts()
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ArtifactError(f"no artifact at {path}: the folder does not exist")
    place = path / MANIFEST
    if not place.is_file():
        raise ArtifactError(f"{path} is no complete artifact: {MANIFEST} is missing; fit again or restore a copy")
    try:
        manifest = json.loads(place.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{place} cannot be read ({error.strerror}); restore a copy or fit again") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{place} is damaged ({error}); restore a copy or fit again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{place} does not describe a tsforge artifact")
    version, remedy = manifest.get("format_version"), "restore a copy or fit again"
    check_version(version, FORMAT_VERSION, what=str(place), kind="artifact format", remedy=remedy)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("id"), str):
        raise ArtifactError(f"{place} lacks its id or its list of files; restore a copy or fit again")
    if not _ID.fullmatch(manifest["id"]):
        raise ArtifactError(
            f"{place} states an id that no artifact has ({manifest['id']!r}); restore a copy or fit again"
        )
    return manifest


def _read_files(path: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of every listed file after its hash was verified."""
    listed = manifest["files"]
    absent = [name for name in _REQUIRED if name not in listed]
    if absent:
        raise ArtifactError(f"{path / MANIFEST} does not list {listing(absent)}; restore a copy or fit again")
    contents: dict[str, bytes] = {}
    for name, entry in listed.items():
        if Path(name).name != name or "\0" in name:
            raise ArtifactError(f"{path / MANIFEST} lists {name!r}, which lies outside the artifact; do not use it")
        if not isinstance(entry, dict):
            raise ArtifactError(f"{path / MANIFEST} states no SHA-256 of {name}; restore a copy or fit again")
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"artifact {path} lacks {name} ({error.strerror}); restore a copy or fit again"
            ) from error
        if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
            raise ArtifactError(
                f"{path / name} is damaged: its SHA-256 differs from the manifest; restore a copy or fit again"
            )
        contents[name] = content
    return contents


def stated_id(path: Path) -> str:
    """Return the id in the manifest of the folder ``path``; its name where the manifest cannot be read."""
    try:
        return str(_read_manifest(path)["id"])
    except ArtifactError:
        return path.name


def newest_first(folder: Path) -> list[Path]:
    """Return the artifacts below ``folder`` by the time in their ids, newest first; ids without a time come last.

    A copy under another name is as old as its original, which goes before it. A damaged artifact keeps its place by
    its name: whoever asks for the newest is told of the damage, not given an older one.
    """

    def age(path: Path) -> tuple[str, bool, str]:
        found = _MADE.search(name := stated_id(path))
        return (found[1] if found else "", path.name == name, path.name)

    places = [manifest.parent for manifest in folder.glob(f"*/{MANIFEST}")]
    return sorted((path for path in places if not path.name.startswith(".")), key=age, reverse=True)


def verify_artifact(path: Path) -> str:
    """Return the id of the artifact in the folder ``path`` after every file was compared with its SHA-256.

    Raises:
        ArtifactError: missing or damaged; the message names the file.
    """
    manifest = _read_manifest(path)
    _read_files(path, manifest)
    return str(manifest["id"])


def load_artifact(path: Path) -> Artifact:
    """Return the artifact stored in the folder ``path``, its network on the CPU in evaluation mode.

    Raises:
        ArtifactError: missing, damaged (the message names the file), of a newer format, or its model is not installed.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    contents = _read_files(path, manifest)
    try:
        spec, schema = json.loads(contents["spec.json"]), json.loads(contents["schema.json"])
        network = _rebuild(spec, contents["weights.safetensors"])
        calibration, dependence = contents.get("calibration.parquet"), contents.get("dependence.safetensors")
        return Artifact(
            id=manifest["id"],
            network=network,
            config=yaml.safe_load(contents["config.yaml"]),
            schema=SeriesSchema.from_dict(schema["schema"]),
            grid=TimeGrid.from_dict(schema["grid"]),
            series_ids=tuple(schema["series_ids"]),
            window=WindowSpec(**spec["window"]),
            calibration=None if calibration is None else pl.read_parquet(calibration),
            dependence=None if dependence is None else load_tensors(dependence),
            metrics=json.loads(contents["metrics.json"]),
            provenance=json.loads(contents["provenance.json"]),
            explanation=json.loads(contents["explanation.json"])
            | _read_tables(contents, network.model.long_tables, tuple(schema["schema"]["targets"])),
            tables={
                name: pl.read_parquet(contents[f"{name}.parquet"])
                for name in _TRAINING_TABLES
                if f"{name}.parquet" in contents
            },
            path=path,
        )
    except _DAMAGE as error:
        raise ArtifactError(f"artifact {path} cannot be rebuilt: {error}") from error


def _rebuild(spec: Mapping[str, Any], weights: bytes) -> ForecastNetwork:
    """Return the stored network; initial weights drawn on the way do not touch the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        network = _network(spec)
        if "members" in spec:
            members = [_network(one) for one in spec["members"]]
            sets, number, *rest = spec["weights"]
            equal = torch.full((sets, number, *rest), 1.0 / number)  # the stored ones follow
            network = EnsembleNetwork(network.config, network.spec, members, equal)
    try:
        network.load_state_dict(load_tensors(weights), strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"weights do not fit the model: {' '.join(str(error).split())}") from error
    return network.eval()


def _network(spec: Mapping[str, Any]) -> ForecastNetwork:
    return ForecastNetwork(validate(NetworkConfig, spec["network"]), DataSpec(**spec["data"]))


def match_frame(artifact: Artifact, frame: SeriesFrame) -> SeriesFrame:
    """Return the frame with exactly the columns that the artifact's network reads; other covariates are left out.

    Raises:
        ArtifactError: frequency, grid, targets or series differ, or a covariate is missing; the message says which.
    """
    mine, theirs = artifact.schema, frame.schema
    name = f"artifact {artifact.id}"
    if mine.freq != theirs.freq:
        raise ArtifactError(
            f"{name} was fitted on freq {mine.freq}, the data has {theirs.freq}; resample the data or refit"
        )
    for role in ("targets", "past", "known", "static"):
        missing = [column for column in getattr(mine, role) if column not in getattr(theirs, role)]
        if missing:
            raise ArtifactError(f"{name} needs the {role} column(s) {listing(missing)}, which the data lacks")
    extra = [column for column in theirs.targets if column not in mine.targets]
    if extra:
        raise ArtifactError(f"{name} does not know the target(s) {listing(extra)}; drop them or refit")
    if mine.targets != theirs.targets:
        raise ArtifactError(
            f"{name} reads targets in the order {listing(mine.targets, 20)}, the data has {listing(theirs.targets, 20)}"
        )
    try:
        artifact.grid.index_of(frame.table["time"].head(1))
    except DataError as error:
        raise ArtifactError(f"{name}: {error}") from error
    strangers = sorted(set(frame.series_ids) - set(artifact.series_ids))
    if strangers and artifact.network.needs_known_series:
        raise ArtifactError(
            f"{name} was not fitted on {len(strangers)} of {len(frame.series_ids)} series ({listing(strangers)}) and "
            "its scaling 'series' needs them; refit with them, or fit with scaling 'window' or scaling.unknown=context"
        )
    if mine == theirs:
        return frame
    return frame.with_covariates(past=mine.past, known=mine.known, static=mine.static)


_FACTS = "facts"
_DIGEST = "sha256"


def _digest(tensors: Mapping[str, torch.Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensor_file_bytes(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> bytes:
    """Return named tensors and plain facts as the content of one safetensors file, with a digest of both.

    Raises:
        ArtifactError: a fact has no plain form.
    """
    text = _json(dict(facts)).decode()
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return bytes(_save_tensors(stored, metadata={_FACTS: text, _DIGEST: _digest(stored, text)}))


def save_tensor_file(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``tensor_file_bytes``, whole or not at all; an older file is replaced.

    Raises:
        BackendError: the folder is read-only or the disk is full; the older file stays.
        ArtifactError: a fact has no plain form.
    """
    content = tensor_file_bytes(tensors, facts)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def load_tensor_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the facts of a file that ``save_tensor_file`` wrote.

    Raises:
        ArtifactError: it is missing, or a single byte of it changed.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no {path}; it was never written, or moved away")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); restore a copy or make it anew") from error
    return read_tensor_bytes(content, str(path))


def read_tensor_bytes(content: bytes, what: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the facts that ``tensor_file_bytes`` packed.

    Args:
        content: the bytes. what: names them in errors.

    Raises:
        ArtifactError: a single byte changed.
    """
    try:
        size = int.from_bytes(content[:8], "little")  # a safetensors file: length of the header, header, tensors
        about = json.loads(content[8 : 8 + size])["__metadata__"]
        tensors, facts = load_tensors(content), json.loads(about[_FACTS])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{what} is damaged ({error}); restore a copy or make it anew") from error
    if not isinstance(facts, dict) or about.get(_DIGEST) != _digest(tensors, about[_FACTS]):
        raise ArtifactError(f"{what} is damaged: its content differs from its SHA-256; restore a copy or make it anew")
    return tensors, facts
