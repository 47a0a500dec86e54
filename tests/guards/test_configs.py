"""Every file under configs/ composes and validates; every default that a shell names exists."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tsforge.core.config import load, to_yaml, validate

ROOT = Path(__file__).resolve().parents[2] / "configs"

# file (or folder/) -> config class
CLASSES = {
    "ingest": "tsforge.app.ingest:IngestConfig",
    "fit": "tsforge.app.fit:FitConfig",
    "predict": "tsforge.app.forecast:PredictConfig",
    "explain": "tsforge.app.explain:ExplainConfig",
    "backtest": "tsforge.app.backtest:BacktestJobConfig",
    "benchmark": "tsforge.app.benchmark:BenchmarkConfig",
    "detect": "tsforge.app.detect:DetectJobConfig",
    "stream": "tsforge.app.stream:StreamConfig",
    "stream_online": "tsforge.app.stream:StreamConfig",
    "watch": "tsforge.app.watch.settings:WatchConfig",
    "reconstruct": "tsforge.app.reconstruct:ReconstructConfig",
    "tune": "tsforge.app.tune:TuneJobConfig",
    "retrain": "tsforge.app.retrain:RetrainConfig",
    "schedule": "tsforge.app.schedule:ScheduleConfig",
    "benchmark/": "tsforge.app.benchmark:BenchmarkConfig",
    "benchmark/anomaly": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "benchmark/anomaly_quick": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "benchmark/anomaly_rules": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "benchmark/anomaly_scores": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "benchmark/anomaly_two_sided": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "benchmark/anomaly_networks": "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig",
    "tune/": "tsforge.app.tune:TuneJobConfig",
    "batch/": "tsforge.app.batch:BatchConfig",
    "experiment/": "tsforge.app.fit:FitConfig",
    "experiment/demo_backtest": "tsforge.app.backtest:BacktestJobConfig",
    "experiment/demo_batch": "tsforge.app.batch:BatchConfig",
    "experiment/demo_lorenz": "tsforge.app.reconstruct:ReconstructConfig",
    "experiment/demo_watch": "tsforge.app.detect:DetectJobConfig",
}
# groups are tried through a config that uses them: group -> (config, class, override)
GROUPS = {"data": "ingest", "model": "fit", "train": "fit"}
# templates state what a user must fill in
REQUIRED = {
    "benchmark": ["datasets=[data.parquet]"],
    "reconstruct": ["data.path=data.parquet"],
    "data/csv": ["data.name=x", "data.source.path=x.csv"],
    "data/parquet": ["data.name=x", "data.source.path=x.parquet"],
    "data/sql": ["data.name=x"],
}


def names() -> list[str]:
    return sorted(str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.yaml"))


def config_class(name: str) -> Any:
    folder = f"{name.split('/')[0]}/"
    module, attribute = (CLASSES.get(name) or CLASSES[folder]).split(":")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", names())
def test_config_loads_and_round_trips(name: str) -> None:
    folder, _, choice = name.partition("/")
    if choice and folder in GROUPS:
        host = GROUPS[folder]
        cls, file, overrides = config_class(host), host, [f"{folder}={choice}", *REQUIRED.get(name, [])]
    else:
        cls, file, overrides = config_class(name), name, REQUIRED.get(name, [])
    config = load(cls, file, overrides)
    import yaml

    assert validate(cls, yaml.safe_load(to_yaml(config))) == config


def test_every_model_has_a_config_and_every_config_a_model() -> None:
    from tsforge.models.registry import MODELS

    assert sorted(path.stem for path in (ROOT / "model").glob("*.yaml")) == MODELS.names()
