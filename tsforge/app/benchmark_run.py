"""One benchmark setting: fit on the training rows, forecast every test window, measure errors, time and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsforge.app.benchmark_data import BenchmarkData
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.window_forecasts import error_sums
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import fit_network

_MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one row of a benchmark table is about.

    Attributes:
        label: the model entry as the user wrote it.
        network: model, likelihood and scaling.
        train: how gradient training runs (its seed is replaced).
        context_length, horizon, seed: the rest.
    """

    label: str
    network: NetworkConfig
    train: TrainConfig
    context_length: int
    horizon: int
    seed: int

    def plain(self) -> dict[str, Any]:
        """Return plain types, for the cache key and the log."""
        return {
            "network": self.network.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
            "context_length": self.context_length,
            "horizon": self.horizon,
            "seed": self.seed,
        }


def network_config(
    model: Mapping[str, Any], likelihood: Mapping[str, Any], scaling: Mapping[str, Any]
) -> NetworkConfig:
    """Return the validated network of a model entry; point forecasts by squared error unless it says otherwise."""
    values: dict[str, Any] = {"model": dict(model), "likelihood": {"name": "point", **likelihood}}
    return validate(NetworkConfig, {**values, "scaling": dict(scaling)})


def run_setting(data: BenchmarkData, setting: Setting, *, progress: bool = False) -> dict[str, Any]:
    """Return the measurements of one setting.

    Returns:
        ``mse, mae`` over all test windows, steps and variates in standardised units; ``mse_by_variate``,
        ``mse_by_step`` (lists); ``windows, cells, fit_seconds, eval_seconds``, ``cpu_seconds`` of all
        threads, ``peak_memory_mb`` (of the process, or of the GPU), ``parameters, epochs, closed_form, device``.

    Raises:
        DataError: too few rows for one window.
        ConfigError, ModelError: the model cannot be built or fitted so.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and setting.train.accelerator != "cpu" else "cpu")
    _reset_peak_memory(device)
    seed_everything(setting.seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    spec = WindowSpec(context_length=setting.context_length, horizon=setting.horizon)
    first, stop = data.splits.test
    if stop - first < setting.horizon:
        raise DataError(f"the test span of {data.name} has {stop - first} rows, fewer than horizon {setting.horizon}")
    network, epochs, closed_form = _fit(data, setting, spec, progress=progress)
    fitted = time.perf_counter()
    network.to(device)
    coupled = network.capabilities.rows_coupled
    windows = WindowDataset(_panel_for(setting, data), spec, first, stop, aligned=coupled, device=device)
    sums = error_sums(network, windows)
    finished = time.perf_counter()
    count = int(sums.count.sum())
    if not count:
        raise DataError(f"no observed cell in the test span of {data.name}")
    return {
        "mse": float(sums.mse().value),
        "mae": float(sums.mae().value),
        "mse_by_variate": sums.mse(axis=0).value.tolist(),
        "mse_by_step": sums.mse(axis=1).value.tolist(),
        "windows": len(windows),
        "cells": count,
        "fit_seconds": fitted - started,
        "eval_seconds": finished - fitted,
        "cpu_seconds": time.process_time() - cpu_started,
        "peak_memory_mb": _peak_memory(device),
        "parameters": sum(item.numel() for item in network.model.parameters() if item.requires_grad),
        "epochs": epochs,
        "closed_form": closed_form,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _panel_for(setting: Setting, data: BenchmarkData) -> Panel:
    """Return what the model is given: calendar features only where it takes known covariates."""
    takes = MODELS.get(setting.network.model.name).capabilities.known_covariates
    return data.with_calendar if takes else data.panel


def _fit(
    data: BenchmarkData, setting: Setting, spec: WindowSpec, *, progress: bool
) -> tuple[ForecastNetwork, int, bool]:
    """Return the fitted network, its epochs, and whether no random number took part."""
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
        if not network.capabilities.trainable or (report is not None and report.finished):
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
