"""The progress line: drawn on a terminal, removed at the end and before an error message."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from test_loop import QUICK, Parts

from tsforge.training import descent
from tsforge.training.callbacks import ProgressLine


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a user's terminal receives."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110)
    monkeypatch.setattr(descent, "ProgressLine", lambda: ProgressLine(console))
    return screen


def test_epochs_batches_and_losses_are_shown_and_the_line_is_removed(terminal: io.StringIO) -> None:
    parts = Parts()
    result = parts.fit(parts.network(), progress=True)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for epoch in range(1, 5):
        assert f"epoch {epoch}/4" in text
    assert f"valid {result.history[-1]['valid_loss']:.4f}" in text
    assert f"/{-(-len(parts.train) // QUICK.batch_size)}" in text
    assert terminal.getvalue().endswith("\x1b[2K")  # the last thing sent wipes the line


def test_the_line_is_removed_before_an_error(terminal: io.StringIO) -> None:
    parts = Parts()

    def hook(epoch: int, metrics: dict[str, float]) -> None:
        raise KeyError("pruned")

    with pytest.raises(KeyError):
        parts.fit(parts.network(), progress=True, on_epoch=hook)
    assert terminal.getvalue().endswith("\x1b[2K")


def test_progress_can_be_switched_off(terminal: io.StringIO) -> None:
    parts = Parts()
    parts.fit(parts.network(), progress=False)
    assert terminal.getvalue() == ""
