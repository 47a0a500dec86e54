"""Nothing secret reaches a store: passwords in addresses, fields with telling names, secrets of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(passw(or)?d|passphrase|pwd|secret|token|api_?key|access_?key|private_?key|credentials?)$", re.IGNORECASE
)
# scheme://user:password@host; the user name stays readable. The password may hold '@': the last one before '/' counts.
_USER_INFO = re.compile(r"(?P<head>[a-z][a-z0-9+.\-]*://[^:/?#\s@]*):[^/?#\s]*@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<head>[?&;\s](?:[a-z_]*(?:password|passwd|secret|token|api_?key|access_?key))=)[^&;\s'\"]+", re.IGNORECASE
)
_FOLDERS = ("PWD", "OLDPWD")  # of a shell: "pwd" is no password in these
_SHORTEST = 6  # shorter values of the environment would hide ordinary words


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if name not in _FOLDERS and _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield value


def redact(text: str) -> str:
    """Return ``text`` with every recognisable secret replaced by ``***``.

    Hidden are passwords inside addresses, ``password=...``-like settings, and every value of an environment variable
    whose name ends like a secret (``..._PASSWORD``, ``..._TOKEN``, ``..._KEY`` of an interface).
    """
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(rf"\g<head>:{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<head>{HIDDEN}", text)


def redact_tree(value: Any, name: str = "") -> Any:
    """Return nested plain types with secrets replaced; a field with a telling name loses its whole value."""
    if isinstance(value, Mapping):
        return {str(key): redact_tree(item, str(key)) for key, item in value.items()}
    if name and _SECRET_NAME.search(name) and value not in (None, "", False, True):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value
