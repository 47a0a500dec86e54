"""Names in Markdown reports."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"[\\`*\[\]<>#|~]|(?<!\w)_|_(?!\w)")  # an underscore inside a word marks nothing


def as_text(name: object) -> str:
    """Return Markdown that reads as ``name`` itself, in one line: no styles, links, tags or table cells."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(name).split()))
