"""One benchmark setting: fit on the training rows, forecast every test window, measure errors, time and memory."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tsforge.app.benchmark_data import BenchmarkData
from tsforge.app.benchmark_peers import PeerHost, peer_forecasts
from tsforge.artifact import Artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.window_forecasts import error_sums
from tsforge.metrics.point import ErrorSums
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import done_without_steps, fit_network

_MEBIBYTE = 2**20
_WINDOWS_AT_ONCE = 256

# Entries that are no registered model: name -> "module:function" with the signature
#     fit(panel, splits, spec, options, *, train, seed, progress) -> Artifact, ForecastNetwork or another object whose
#     predict(batch).mean is [B, H, V]
# ``panel`` ends where the test begins; ``options`` are the settings of the entry (``auto:minutes=5``).
FITTERS: dict[str, str] = {"auto": "tsforge.app.auto:fit_for_benchmark"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one row of a benchmark table is about.

    Attributes:
        kind: who forecasts: a registered model, a peer (``library/Model``), or an entry of ``FITTERS``.
        name: of the model.
        label: the model entry as the user wrote it.
        role: baseline, model or peer, for the report.
        lookback: how the report groups rows over data sets: the look-back where it was stated, else empty.
        network: model, likelihood and scaling of a registered model.
        train: how gradient training runs (its seed is replaced); None for a peer.
        options: settings of a peer or of an entry of ``FITTERS``.
        context_length, horizon, seed: the rest.
        graded: spans measured; ``valid`` is asked of the baselines that choose their look-back.
    """

    kind: Literal["network", "peer", "fitter"] = "network"
    name: str
    label: str
    role: Literal["baseline", "model", "peer"] = "model"
    lookback: str = ""
    network: NetworkConfig | None = None
    train: TrainConfig | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    context_length: int
    horizon: int
    seed: int
    graded: tuple[Literal["valid", "test"], ...] = ("test",)

    def plain(self) -> dict[str, Any]:
        """Return plain types, for the cache key and the log."""
        return {
            "kind": self.kind,
            "name": self.name,
            "network": None if self.network is None else self.network.model_dump(mode="json"),
            "train": None if self.train is None else self.train.model_dump(mode="json"),
            "options": dict(self.options),
            "context_length": self.context_length,
            "horizon": self.horizon,
            "seed": self.seed,
            "graded": list(self.graded),
        }


def network_config(
    model: Mapping[str, Any], likelihood: Mapping[str, Any], scaling: Mapping[str, Any]
) -> NetworkConfig:
    """Return the validated network of a model entry; point forecasts by squared error unless it says otherwise."""
    values: dict[str, Any] = {"model": dict(model), "likelihood": {"name": "point", **likelihood}}
    return validate(NetworkConfig, {**values, "scaling": dict(scaling)})


def run_setting(
    data: BenchmarkData, setting: Setting, *, peers: PeerHost | None = None, progress: bool = False
) -> dict[str, Any]:
    """Return the measurements of one setting.

    Returns:
        ``mse, mae`` over all test windows, steps and variates in standardised units; ``mse_by_variate``,
        ``mse_by_step`` (lists); ``windows, cells, fit_seconds, eval_seconds``, ``cpu_seconds`` of all
        threads, ``peak_memory_mb`` (of the process, or of the GPU), ``parameters, epochs, closed_form, device``;
        ``valid_mse`` where the setting asks for it; ``versions`` of a peer.

    Raises:
        DataError: the test span is shorter than the horizon, or holds no value.
        ModelError, BackendError: the model or the peer failed.
    """
    spec = WindowSpec(context_length=setting.context_length, horizon=setting.horizon)
    first, stop = data.splits.test
    if stop - first < setting.horizon:
        raise DataError(f"the test span of {data.name} has {stop - first} rows, fewer than horizon {setting.horizon}")
    if setting.kind == "peer":
        found, sums = _run_peer(data, setting, spec, peers)
    elif setting.kind == "fitter":
        found, sums = _run_fitter(data, setting, spec, progress=progress)
    else:
        found, sums = _run_network(data, setting, spec, progress=progress)
    count = int(sums.count.sum())
    if not count:
        raise DataError(f"no observed cell in the test span of {data.name}")
    return {
        "mse": float(sums.mse().value),
        "mae": float(sums.mae().value),
        "mse_by_variate": sums.mse(axis=0).value.tolist(),
        "mse_by_step": sums.mse(axis=1).value.tolist(),
        "windows": sums.windows,
        "cells": count,
        **found,
    }


def _run_network(
    data: BenchmarkData, setting: Setting, spec: WindowSpec, *, progress: bool
) -> tuple[dict[str, Any], ErrorSums]:
    on_gpu = torch.cuda.is_available() and setting.train is not None and setting.train.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    seed_everything(setting.seed)
    _reset_peak_memory(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    network, epochs, closed_form = _fit(data, setting, spec, progress=progress)
    fitted = time.perf_counter()
    network.to(device)
    sums = error_sums(network, _windows(data, setting, network, spec, data.splits.test, device))
    finished = time.perf_counter()
    found = {
        "fit_seconds": fitted - started,
        "eval_seconds": finished - fitted,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_memory_mb": _peak_memory(device),
        "parameters": sum(item.numel() for item in network.model.parameters() if item.requires_grad),
        "epochs": epochs,
        "closed_form": closed_form,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    span = data.splits.valid
    if "valid" in setting.graded and span[1] - span[0] >= spec.horizon:
        valid = error_sums(network, _windows(data, setting, network, spec, span, device))
        found["valid_mse"] = float(valid.mse().value)
    return found, sums


def _windows(
    data: BenchmarkData,
    setting: Setting,
    network: ForecastNetwork,
    spec: WindowSpec,
    span: tuple[int, int],
    device: torch.device,
) -> WindowDataset:
    coupled = network.capabilities.rows_coupled
    return WindowDataset(_panel_for(setting, data), spec, *span, aligned=coupled, device=device)


def _run_fitter(
    data: BenchmarkData, setting: Setting, spec: WindowSpec, *, progress: bool
) -> tuple[dict[str, Any], ErrorSums]:
    """Fit what ``FITTERS`` names on the rows before the test and grade its forecasts."""
    module, name = FITTERS[setting.name].split(":")
    fit = getattr(importlib.import_module(module), name)
    seed_everything(setting.seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    fitted = fit(
        rows_before(data.panel, data.splits.test[0]),
        data.splits,
        spec,
        dict(setting.options),
        train=setting.train,
        seed=setting.seed,
        progress=progress,
    )
    forecaster = fitted.network if isinstance(fitted, Artifact) else fitted
    middle = time.perf_counter()
    windows = WindowDataset(data.panel, spec, *data.splits.test)
    if isinstance(forecaster, ForecastNetwork):
        sums = error_sums(forecaster, windows)
    else:
        sums = ErrorSums(spec.horizon, data.panel.num_targets)
        for batch in windows.batches(_WINDOWS_AT_ONCE):
            with torch.no_grad():
                mean = forecaster.predict(batch._replace(target=None, target_mask=None)).mean
            sums.add(_array(batch.target), _array(mean), _array(batch.target_mask))
    finished = time.perf_counter()
    found = {
        "fit_seconds": middle - started,
        "eval_seconds": finished - middle,
        "cpu_seconds": time.process_time() - cpu_started,
        "closed_form": False,
        "device": "cpu",
    }
    return found, sums


def rows_before(panel: Panel, stop: int) -> Panel:
    """Return the first ``stop`` rows of a panel of one series: whoever gets it cannot see what comes after."""
    return replace(
        panel,
        values=panel.values[:stop].copy(),
        observed=panel.observed[:stop].copy(),
        indptr=np.array([0, stop], dtype=np.int64),
    )


def _run_peer(
    data: BenchmarkData, setting: Setting, spec: WindowSpec, peers: PeerHost | None
) -> tuple[dict[str, Any], ErrorSums]:
    """Have a peer forecast every test window and grade it here: same cells, same sums as any model of ours."""
    if peers is None:
        raise DataError(f"{setting.name} is a peer, and no environment of peers was named (peers.python)")
    windows = WindowDataset(data.panel, spec, *data.splits.test)
    forecasts, found = peer_forecasts(data, setting, windows, peers)
    sums = ErrorSums(spec.horizon, data.panel.num_targets)
    first = 0
    for batch in windows.batches(_WINDOWS_AT_ONCE):
        target, mask = _array(batch.target), _array(batch.target_mask)
        sums.add(target, forecasts[first : first + len(target)], mask)
        first += len(target)
    return found, sums


def _array(values: torch.Tensor | None) -> np.ndarray[Any, Any]:
    if values is None:
        raise DataError("errors need windows with targets; these are for prediction only")
    return values.detach().cpu().numpy()


def _panel_for(setting: Setting, data: BenchmarkData) -> Panel:
    """Return what the model is given: calendar features only where it takes known covariates."""
    assert setting.network is not None
    can = MODELS.get(setting.name).capabilities_of(setting.network.model)
    return data.with_calendar if can.known_covariates else data.panel


def _fit(
    data: BenchmarkData, setting: Setting, spec: WindowSpec, *, progress: bool
) -> tuple[ForecastNetwork, int, bool]:
    """Return the fitted network, its epochs, and whether no random number took part."""
    if setting.network is None or setting.train is None:
        raise DataError(f"{setting.label} has no network to fit")
    panel, splits = _panel_for(setting, data), data.splits
    size = DataSpec(
        context_length=spec.context_length,
        horizon=spec.horizon,
        num_variates=panel.num_targets,
        num_known=len(panel.schema.known),
        train_length=splits.train[1] - splits.train[0],
    )
    network = build_network(setting.network, size, seed=derive_seed(setting.seed, "weights"))
    series = panel.training_series(*splits.train)
    if network.capabilities.closed_form:  # a finished solve needs no validation pass
        network.fit_scaler(series)
        report = network.solve(series)
        if done_without_steps(network, report) is not None:
            return network, 0, True
    aligned = network.capabilities.rows_coupled
    result = fit_network(
        network,
        WindowDataset(panel, spec, *splits.train, aligned=aligned),
        WindowDataset(panel, spec, *splits.valid, aligned=aligned),
        setting.train.model_copy(update={"seed": setting.seed}),
        series=series,
        progress=progress,
    )
    return network, result.epochs, result.epochs == 0


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # only Linux can forget the peak; elsewhere it is that of the whole process life
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float:
    """Return MiB: of the GPU, or the largest resident size of this process since the reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEBIBYTE
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MEBIBYTE
