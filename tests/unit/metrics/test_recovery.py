"""The coefficient error of AR-Net."""

from __future__ import annotations

import pytest

from tsforge.metrics.recovery import stpe


def test_stpe_by_hand() -> None:
    assert stpe([0.5, 0.0], [0.3, 0.2]) == pytest.approx(100 * 0.4 / 1.0)
    assert stpe([], []) == 0.0
    assert stpe([1.0], []) == 100.0
