"""Settings of a reconstruction that would have no effect are refused, their defaults never."""

from __future__ import annotations

from typing import Any

import pytest

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.dynamics.config import ReconstructionConfig

DEEP = {"kind": "deep"}


def config(**parts: dict[str, Any]) -> ReconstructionConfig:
    return validate(ReconstructionConfig, {**parts, "data": {"path": "x.parquet", **parts.get("data", {})}})


@pytest.mark.parametrize(
    ("parts", "fragment"),
    [
        ({"train": {"lambda_obs": 0.1}}, "lambda_obs is for model.observation=affine"),
        ({"train": {"mar_ratio": 0.3}}, "mar_ratio has no part without train.lambda_mar"),
        ({"train": {"noise": 0, "noise_on": "inputs"}}, "noise_on has no part with train.noise=0"),
        ({"train": {"estimate_every": 4}, "forcing": {"method": "none"}}, "estimate_every is for .*adaptive, not none"),
        (
            {"train": {"estimate_every": 4}, "forcing": {"method": "constant", "start": 0.1}},
            "estimate_every is for .*adaptive, not constant",
        ),
        ({"train": {"epochs": 2, "batches_per_epoch": 3}, "forcing": {"interval": 7}}, "the training has 6 steps"),
        ({"train": {"sequence_length": 9}, "forcing": {"method": "sparse", "tau": 9}}, "nothing would be forced"),
        ({"evaluation": {"findings": False, "periods": [1, 2]}}, "periods have no part with findings=false"),
        ({"evaluation": {"findings": False, "expected": "chaos"}}, "expected have no part with findings=false"),
        ({"model": DEEP, "evaluation": {"periods": [2]}}, "a deep map has no .* evaluation.periods has no part"),
        ({"model": DEEP, "evaluation": {"expected": "chaos"}}, "a deep map has no .* evaluation.expected"),
        ({"data": {"inputs": ["u"]}, "evaluation": {"expected": "chaos"}}, "data.inputs has no capture test"),
        ({"evaluation": {"periods": [0, 1]}}, "distinct numbers of steps from 1 on"),
        ({"evaluation": {"periods": [2, 2]}}, "distinct numbers of steps from 1 on"),
        ({"evaluation": {"periods": []}}, "at least 1 item"),
        ({"evaluation": {"near_zero": -1e-3}}, "near_zero"),
    ],
)
def test_settings_without_effect_are_refused(parts: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        config(**parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"train": {"lambda_obs": 0.1}, "model": {"observation": "affine"}},
        {"train": {"mar_ratio": 0.3, "lambda_mar": 0.1}},
        {"train": {"noise_on": "inputs"}},
        {"train": {"estimate_every": 4}},
        {"train": {"sequence_length": 10}, "forcing": {"method": "sparse", "tau": 9}},
        {"data": {"inputs": ["u"]}, "evaluation": {"periods": [1, 2]}},
        {"train": {"epochs": 1, "batches_per_epoch": 2}},
        {"model": DEEP},
        {"evaluation": {"findings": False}},
        {"data": {"inputs": ["u"]}},
    ],
)
def test_settings_with_effect_and_written_defaults_pass(parts: dict[str, Any]) -> None:
    found = config(**parts)
    assert validate(ReconstructionConfig, found.model_dump(mode="json")) == found  # a stored config names them all
