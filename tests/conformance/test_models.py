"""Every registered model, in each of its test configurations, holds every conformance check."""

from __future__ import annotations

from typing import Any

import pytest

from tsforge.models.registry import MODELS
from tsforge.testing.models import CHECKS, Check, Model


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


def test_known_failures_name_existing_checks() -> None:
    names = {check.__name__ for check in CHECKS}
    for name in MODELS.names():
        assert set(getattr(MODELS.get(name), "known_failures", {})) <= names
