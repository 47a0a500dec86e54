"""Whether Triton is used is found out by a trial; what fails there costs speed only."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tsforge.core.errors import BackendError
from tsforge.ops import compiled, triton_support
from tsforge.ops.triton_support import unavailable_reason

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("TSFORGE_COMPILED", raising=False)
    monkeypatch.setattr(compiled, "_told", set())
    triton_support._trial.cache_clear()
    yield
    triton_support._trial.cache_clear()


def test_a_cpu_is_no_place_for_triton(logged: list[logging.LogRecord]) -> None:
    assert unavailable_reason(torch.device("cpu")) == "the tensors are on cpu, Triton needs an NVIDIA GPU"
    assert not logged


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch would work")
def test_a_launch_that_fails_is_told_once_and_remembered(
    monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: object())
    found = unavailable_reason(CUDA)
    assert found is not None
    assert found.startswith("a trial kernel failed: ")
    assert "\n" not in found
    assert unavailable_reason(CUDA) == found
    assert [record.levelname for record in logged] == ["WARNING"]
    assert "the slower torch path is used" in logged[0].getMessage()


def test_errors_of_triton_itself_are_caught() -> None:
    if triton_support.importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (there is none for this system)")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    assert issubclass(CompilationError, triton_support._failures())
    assert issubclass(OutOfResources, triton_support._failures())
    assert issubclass(PTXASError, triton_support._failures())


def test_a_wrong_number_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch does nothing here, so the number stays 0."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: object())
    trial = type("Trial", (), {"set_one": {(1,): lambda number: None}})
    monkeypatch.setitem(__import__("sys").modules, "tsforge.ops._triton_trial", trial)
    assert unavailable_reason(torch.device("cpu")) == "a trial kernel gave a wrong number"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(unavailable_reason(CUDA))
    monkeypatch.setenv("TSFORGE_COMPILED", "require")
    with pytest.raises(BackendError, match="Triton on this GPU is not available: triton is not installed"):
        unavailable_reason(CUDA)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert unavailable_reason(CUDA) == "TSFORGE_COMPILED=off"
