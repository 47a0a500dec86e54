"""Names, comments and what stands in an address, as plain text among the dashboard's Markdown."""

from __future__ import annotations

import re

# underscores inside words and colons before digits mean nothing; what would start a list only matters in front
_MARKUP = re.compile(r"[\\`*\[\]<>$~#&]|:(?=[A-Za-z+_-])|(?<![^\W_])_|_(?![^\W_])|^[-+]|(?<=^\d)[.)]|(?<=^\d\d)[.)]")
# looked for in text that is escaped, too: web and mail addresses and :emoji: have to be broken up
_LINKED = re.compile(r"(:(?=//|[\w+/-]+:)|www(?=\.)|@)", re.IGNORECASE)
_JOINER = "\u2060"  # without width


def plain(text: object) -> str:
    """Return Markdown that reads as ``text`` itself: no links, styles, formulas or tags; one line."""
    return _LINKED.sub(rf"\1{_JOINER}", _MARKUP.sub(r"\\\g<0>", _line(text)))


def code(text: object) -> str:
    """Return Markdown that shows ``text`` as code, whatever ticks it holds; one line."""
    line = _line(text)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _line(text: object) -> str:
    return " ".join(str(text).split())
