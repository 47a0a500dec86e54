"""The state of an online detector as one safetensors file: arrays as tensors, everything else as plain facts.

Nothing is pickled. What was fitted is stored as it is and never fitted again, so a detector goes on to the bit where it
stopped, in the middle of an event too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsforge.anomaly.attribution import Extremes
from tsforge.anomaly.buckets import BucketScale
from tsforge.anomaly.calibration import Calibration
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.covariance import Covariance, DenseCovariance, LowRankCovariance
from tsforge.anomaly.ewma import Ewma
from tsforge.anomaly.gpd import ParetoTail
from tsforge.anomaly.guard import Guard
from tsforge.anomaly.monitor import Ended, Monitor, Under, Waiting
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.online_rows import Recent, RecentRows, ring_size
from tsforge.anomaly.online_windows import KeptWindows, RecentWindows
from tsforge.anomaly.residuals import ResidualScale
from tsforge.anomaly.row_regression import RowRegression
from tsforge.anomaly.scoring import ScoreModel
from tsforge.anomaly.segments import SegmentTracker
from tsforge.anomaly.smoothing import restore_smoother
from tsforge.anomaly.thresholds import restore_rule
from tsforge.anomaly.windowed import WindowJudge
from tsforge.artifact import Artifact, load_tensor_file, read_tensor_bytes, save_tensor_file, tensor_file_bytes
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ModelError, TsforgeError
from tsforge.core.formats import check_version
from tsforge.forecasting.stream_buffer import Buffer

FORMAT = "tsforge-online-detector"
FORMAT_VERSION = 8
"""2: scores of windows and free runs; 3: guarded contexts; 4: residuals that add up; 5: event ids; 6: rows that wait
for a smoothed score; 7: spreads of variates; 8: regressions of a row on the one before."""
_ARRAY, _LIST = "$array", "$list"
_SHORT = 16  # lists up to this length stay among the facts


def save_detector(detector: OnlineDetector, path: Path) -> None:
    """Write the state as one file, whole or not at all.

    Raises:
        BackendError: the disk is full or read-only; an older file stays.
        ModelError: an update failed half-way.
    """
    save_tensor_file(path, *_packed(detector))


def detector_bytes(detector: OnlineDetector) -> bytes:
    """Return what ``save_detector`` writes."""
    return tensor_file_bytes(*_packed(detector))


def load_detector(stored: Path | bytes, artifact: Artifact) -> OnlineDetector:
    """Return the detector of a file or of its content.

    Raises:
        ArtifactError: missing, damaged, of a newer format, or the state of another artifact.
    """
    what = "the stored detector" if isinstance(stored, bytes) else str(stored)
    tensors, facts = read_tensor_bytes(stored, what) if isinstance(stored, bytes) else load_tensor_file(Path(stored))
    if facts.get("format") != FORMAT:
        raise ArtifactError(f"{what} does not hold an online detector")
    version, anew = facts.get("format_version"), "start the detector anew"
    check_version(version, FORMAT_VERSION, what=what, kind="detector format", remedy=anew)
    if facts.get("artifact_id") != artifact.id:
        raise ArtifactError(
            f"{what} holds the detector of artifact {facts.get('artifact_id')}, not of {artifact.id}; a state fits "
            "only the weights that made it: name that artifact, or start the detector anew"
        )
    try:
        return _restored(_unfold(facts["state"], tensors), artifact)
    except (KeyError, TypeError, ValueError, AttributeError, TsforgeError) as error:
        raise ArtifactError(f"{what} does not fit artifact {artifact.id} ({error}); start the detector anew") from error


def _packed(detector: OnlineDetector) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if detector.is_torn:
        raise ModelError("an earlier update failed half-way, so this state is torn and not worth storing")
    recent, tensors = detector.recent, dict[str, torch.Tensor]()
    state = {
        "config": detector.config.model_dump(mode="json"),
        "announced": detector.announced,
        "former": detector.former,
        "notices": list(detector.notices),
        "guard": None if detector.guard is None else detector.guard.state(),
        "series": list(recent.buffer.series),
        "buffer": {name: value.numpy() for name, value in recent.buffer.tensors().items()},
        "first": recent.first,
        "windows": _windows_state(recent) if isinstance(recent, RecentWindows) else None,
        "monitors": [_monitor_state(monitor) for monitor in detector.monitors.values()],
    }
    folded = _fold(state, "state", tensors)
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "artifact_id": detector.artifact.id, "state": folded}
    return tensors, facts


def _restored(state: dict[str, Any], artifact: Artifact) -> OnlineDetector:
    config = validate(DetectConfig, state["config"])
    parts = {name: torch.from_numpy(value) for name, value in state["buffer"].items()}
    buffer = Buffer(artifact, tuple(state["series"]), **parts)
    buffer.check(ring_size(artifact, config.score))
    recent: Recent
    if config.score.is_windowed:
        recent = _windows(buffer, state["first"], config, state["windows"])
    else:
        recent = RecentRows(buffer, state["first"], config.score)
    monitors = [_monitor(stored, config, artifact.schema.targets) for stored in state["monitors"]]
    guard = Guard.of(config, artifact)
    if guard is not None:
        guard.restore(state["guard"])
    return OnlineDetector(
        config,
        recent,
        {monitor.series_id: monitor for monitor in monitors},
        announced={name: int(row) for name, row in state["announced"].items()},
        former={name: int(row) for name, row in state.get("former", state["announced"]).items()},
        notices=tuple(state["notices"]),
        guard=guard,
    )


def _windows_state(recent: RecentWindows) -> dict[str, Any]:
    kept = {
        name: {"judge": one.judge.state(), "trail": one.trail, "values": one.values, "modes": one.modes}
        for name, one in recent.kept.items()
    }
    return {"begin": recent.begin, "names": list(kept), "kept": list(kept.values())}


def _windows(buffer: Buffer, first: Any, config: DetectConfig, state: dict[str, Any]) -> RecentWindows:
    kept = {
        name: KeptWindows(WindowJudge.restored(config.score, one["judge"]), one["trail"], one["values"], one["modes"])
        for name, one in zip(state["names"], state["kept"], strict=True)
    }
    return RecentWindows(buffer, first, config.score, state["begin"], kept)


def _monitor_state(monitor: Monitor) -> dict[str, Any]:
    ended = monitor.ended
    return {
        "series_id": monitor.series_id,
        "model": _model_state(monitor.model),
        "buckets": None if monitor.buckets is None else _bucket_state(monitor.buckets),
        "calibration": _calibration_state(monitor.calibration),
        "memory": None if monitor.memory.ewma is None else monitor.memory.ewma.level,
        "last_row": monitor.memory.row,
        "smoother": None if monitor.smoother is None else monitor.smoother.state(),
        "rule": monitor.rule.state(),
        "samples": None if monitor.samples is None else list(monitor.samples),
        "row": monitor.row,
        "start": monitor.start,
        "recent": monitor.recent,
        "tracker": monitor.tracker.state(),
        "settled": asdict(monitor.under.settled),
        "since": asdict(monitor.under.since),
        "ended": None
        if ended is None
        else {"end": ended.end, "leading": sorted(ended.leading), "origin": ended.origin},
        "alarms": monitor.alarms,
        "scored": monitor.scored,
        "waiting": None if monitor.waiting is None else _plain_fields(monitor.waiting),
    }


def _monitor(state: dict[str, Any], config: DetectConfig, names: tuple[str, ...]) -> Monitor:
    ended, smoother, samples = state["ended"], state["smoother"], state["samples"]
    waiting = state.get("waiting")
    model = _model(state["model"], config)
    memory = model.memory()
    if memory.ewma is not None:
        memory.ewma.level = state["memory"]
    if memory.row is not None:
        memory.row = state["last_row"]
    monitor = Monitor(
        series_id=state["series_id"],
        names=names,
        config=config.events,
        model=model,
        memory=memory,
        buckets=None if state["buckets"] is None else _buckets(state["buckets"]),
        calibration=_calibration(state["calibration"]),
        smoother=None if smoother is None else restore_smoother(smoother),
        rule=restore_rule(state["rule"]),
        samples=None if samples is None else tuple(samples),
        row=state["row"],
        start=state["start"],
        recent=state["recent"],
        ended=None if ended is None else Ended(ended["end"], frozenset(ended["leading"]), ended["origin"]),
        alarms=state["alarms"],
        scored=state["scored"],
        waiting=None if waiting is None else Waiting(**waiting),
    )
    monitor.tracker = SegmentTracker.restore(config.events, state["tracker"])
    monitor.under = Under(Extremes(**state["settled"]), Extremes(**state["since"]))
    return monitor


def _model_state(model: ScoreModel) -> dict[str, Any]:
    scale = _plain_fields(model.scale)
    calibrations = [None if one is None else _calibration_state(one) for one in model.variate_calibrations]
    return {
        "scale": scale,
        "used": model.used,
        "covariance": None if model.covariance is None else _covariance_state(model.covariance),
        "variate_calibrations": calibrations,
        "ewma": None if model.ewma is None else model.ewma.spread,
        "share": model.share,
        "regression": None if model.regression is None else _plain_fields(model.regression),
    }


def _model(state: dict[str, Any], config: DetectConfig) -> ScoreModel:
    weight, regression = config.score.ewma, state.get("regression")
    return ScoreModel(
        config=config.score,
        scale=ResidualScale(**state["scale"]),
        used=state["used"],
        covariance=None if state["covariance"] is None else _covariance(state["covariance"]),
        variate_calibrations=tuple(None if one is None else _calibration(one) for one in state["variate_calibrations"]),
        ewma=None if weight is None else Ewma(weight=weight, spread=state["ewma"]),
        share=state.get("share"),
        regression=None if regression is None else RowRegression(**regression),
    )


def _covariance_state(covariance: Covariance) -> dict[str, Any]:
    if isinstance(covariance, DenseCovariance):
        return {"matrix": covariance.matrix}
    if isinstance(covariance, LowRankCovariance):
        return {"noise": covariance.noise, "loadings": covariance.loadings}
    raise ModelError(f"a {type(covariance).__name__} has no stored form")


def _covariance(state: dict[str, Any]) -> Covariance:
    return DenseCovariance(**state) if "matrix" in state else LowRankCovariance(**state)


def _calibration_state(calibration: Calibration) -> dict[str, Any]:
    return _plain_fields(calibration) | {"tail": None if calibration.tail is None else asdict(calibration.tail)}


def _calibration(state: dict[str, Any]) -> Calibration:
    return Calibration(**state | {"tail": None if state["tail"] is None else ParetoTail(**state["tail"])})


def _plain_fields(value: Calibration | ResidualScale | RowRegression | Waiting) -> dict[str, Any]:
    """Return the fields of a dataclass as they are, arrays not copied."""
    return {item.name: getattr(value, item.name) for item in fields(value)}


def _bucket_state(buckets: BucketScale) -> dict[str, Any]:
    return {
        "pooled": buckets.pooled,
        "names": list(buckets.samples),
        "samples": list(buckets.samples.values()),
        "small": list(buckets.small),
    }


def _buckets(state: dict[str, Any]) -> BucketScale:
    samples = dict(zip(state["names"], state["samples"], strict=True))
    return BucketScale(state["pooled"], samples, (state["small"][0], state["small"][1]))


def _fold(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return ``value`` with arrays and long lists of numbers moved into ``tensors``."""
    if isinstance(value, dict):
        return {str(key): _fold(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(np.array(value))
        tensors[name] = tensor if value.size else tensor.new_zeros(value.shape)  # numpy's empty ones have odd strides
        return {_ARRAY: name}
    if isinstance(value, list | tuple):
        if len(value) > _SHORT and all(type(part) is float for part in value):
            tensors[name] = torch.tensor(value, dtype=torch.float64)
            return {_LIST: name}
        return [_fold(part, f"{name}.{place}", tensors) for place, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_ARRAY: None, "number": repr(value)}
    return value


def _unfold(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unfold(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return float(value["number"]) if value[_ARRAY] is None else tensors[value[_ARRAY]].numpy()
    if _LIST in value:
        return tensors[value[_LIST]].tolist()
    return {key: _unfold(part, tensors) for key, part in value.items()}
