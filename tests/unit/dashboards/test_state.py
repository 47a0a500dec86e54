"""How pages write times."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from dashboards.state import span


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        (datetime(2026, 3, 1, 6), datetime(2026, 3, 1, 6), "2026-03-01 06:00"),
        (datetime(2026, 3, 1, 6), datetime(2026, 3, 1, 8), "2026-03-01 06:00 to 08:00"),
        (datetime(2026, 3, 1, 6), datetime(2026, 3, 2, 6), "2026-03-01 06:00 to 2026-03-02 06:00"),
        (5, 5, "5"),
        (5, 51, "5 to 51"),
    ],
)
def test_a_span_names_its_day_once(start: Any, end: Any, text: str) -> None:
    assert span({"start": start, "end": end}) == text
