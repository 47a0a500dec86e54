"""Every registered model, in each of its test configurations, holds every conformance check."""

from __future__ import annotations

from typing import Any

import pytest

from tsforge.models.registry import MODELS
from tsforge.testing.generators import declared_spec, make_batch
from tsforge.testing.models import CHECKS, Check, Model, build_model, capabilities_of


def _cases() -> list[Any]:
    cases = []
    for name in MODELS.names():
        model_cls = MODELS.get(name)
        known = getattr(model_cls, "known_failures", {})
        for index, settings in enumerate(model_cls.test_configs):
            for check in CHECKS:
                reason = known.get(check.__name__)
                marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
                cases.append(
                    pytest.param(model_cls, settings, check, id=f"{name}-{index}-{check.__name__}", marks=marks)
                )
    return cases


@pytest.mark.parametrize(("model_cls", "settings", "check"), _cases())
def test_model(model_cls: Model, settings: dict[str, Any], check: Check) -> None:
    check(model_cls, settings)


@pytest.mark.parametrize("name", MODELS.names())
def test_declared_context_outputs_are_filled_with_some_settings(name: str) -> None:
    model_cls = MODELS.get(name)
    rollout = {"d_model": 16, "d_state": 8, "head": "rollout"}
    further = {"lssl": (rollout,), "committee": ({"member": {"name": "s4", **rollout}, "size": 2},)}  # not in their own
    settings_of = (*model_cls.test_configs, *further.get(name, ()))
    declared = [one for one in settings_of if capabilities_of(model_cls, one).context_outputs]
    filled = []
    for settings in declared:
        spec = declared_spec(capabilities_of(model_cls, settings))
        filled.append(build_model(model_cls, settings, spec).train()(make_batch(spec)).context_raw is not None)
    assert any(filled) or not declared


def test_known_failures_name_existing_checks() -> None:
    names = {check.__name__ for check in CHECKS}
    for name in MODELS.names():
        assert set(getattr(MODELS.get(name), "known_failures", {})) <= names
