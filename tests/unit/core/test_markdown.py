"""Names in Markdown read as they are."""

from __future__ import annotations

import pytest

from tsforge.core.markdown import as_text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nyc_weather", "nyc_weather"),
        ("linear:ridge=1e-5, best look-back", "linear:ridge=1e-5, best look-back"),
        ("na|me <b>x*", "na\\|me \\<b\\>x\\*"),
        ("_a_ [b](c)\n# d", "\\_a\\_ \\[b\\](c) \\# d"),
    ],
)
def test_a_name_is_no_markup(name: str, text: str) -> None:
    assert as_text(name) == text
