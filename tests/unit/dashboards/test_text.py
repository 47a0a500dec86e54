"""Names and comments read as they are, whatever they hold."""

from __future__ import annotations

import pytest

from dashboards.style import label, short_name
from dashboards.text import code, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("temp", "temp"),
        ("wind_speed", "wind_speed"),
        ("12:30", "12:30"),
        ("[link](http://evil.example) :red[red]", "\\[link\\](http:\u2060//evil.example) \\:red\\[red\\]"),
        ("$x$ costs $5", r"\$x\$ costs \$5"),
        ("<b>bold</b>", r"\<b\>bold\</b\>"),
        ("a|b", "a|b"),
        ("a_b*c", r"a_b\*c"),
        ("__init__", r"\_\_init\_\_"),
        (":smile:", "\\:\u2060smile:"),
        ("a@b.c", "a@\u2060b.c"),
        ("www.evil.example", "www\u2060.evil.example"),
        ("1. first", r"1\. first"),
        ("- item", r"\- item"),
        ("`tick` \\", r"\`tick\` \\"),
        ("two\n\n# lines", r"two \# lines"),
    ],
)
def test_markdown_shows_a_name_as_it_is(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_code_holds_ticks() -> None:
    assert code("a_b") == "`a_b`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"


def test_labels_of_figures_are_escaped_after_they_are_cut() -> None:
    assert label("<i>a</i> & b") == "&lt;i&gt;a&lt;/i&gt; &amp; b"
    long = "x" * 10 + "<&>" * 8
    assert label(long, most=22) == label(short_name(long, 22))
    assert len(short_name(long, 22)) == 22
