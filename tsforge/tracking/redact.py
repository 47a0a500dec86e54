"""Nothing secret reaches a store: passwords in addresses, fields with telling names, secrets of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"((passw(or)?d|passphrase|pwd|secret|api_?key|access_?key|private_?key|(access|auth|api|session)_?token)s?|token"
    r"|credentials?|authorization|(^|[_.-])pass)$",
    re.IGNORECASE,
)
# scheme://user:password@host; the user name stays readable. The password may hold '@': the last one before '/' counts.
_USER_INFO = re.compile(r"(?P<head>[a-z][a-z0-9+.\-]{0,40}://[^:/?#\s@]*):[^/?#\s]*@", re.IGNORECASE)
# https://token@host: a user name of a person is shorter
_LONE_USER = re.compile(r"(?P<head>\bhttps?://)[^:/?#\s@]{16,}(?=@)", re.IGNORECASE)
# addresses that are secrets themselves: whoever has one may post
_HOOK = re.compile(
    r"(?P<head>\bhttps?://(?:hooks\.slack\.com/(?:services|workflows|triggers)"
    r"|(?:\w+\.)?discord(?:app)?\.com/api(?:/v\d+)?/webhooks|[\w.-]+\.webhook\.office\.com)/)[^\s'\"]+",
    re.IGNORECASE,
)
# name=value, also percent-encoded; a value in quotes or braces may hold blanks and semicolons
_SETTING = re.compile(
    r"(?P<head>(?<![\w-])(?:[\w-]*?(?:passw(?:or)?d|passphrase|pwd|secret|token"
    r"|(?:api|access|account|private|secret)[-_]?key)"
    r"|(?<=[?&])(?:[\w-]*signature|sig|pass))[ \t]*(?:=(?!=)|%3D)[ \t]*)"
    r"(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|\{[^}]*\}|%7B(?:(?!%7D).)*%7D|['\"]?(?:(?!%3B|%26)[^&;\s'\"])+)",
    re.IGNORECASE,
)
_ODBC = re.compile(r"(?P<head>\bodbc_connect=)[^&\s'\"]+", re.IGNORECASE)  # a whole connection string
_SCHEME = r"(?:bearer|basic|token|digest|negotiate|aws4-hmac-sha256)\s+"
_BEGINS = r"\bauthorization['\"]?\s*[:=]\s*['\"]?"
_HEADER = re.compile(rf"(?P<head>{_BEGINS}{_SCHEME})[^\r\n'\"]+", re.IGNORECASE)
# without a scheme one long word: "authorization: ask Ann" is prose
_BARE_HEADER = re.compile(rf"(?P<head>{_BEGINS})(?!{_SCHEME})[^\s'\",]{{12,}}", re.IGNORECASE)
_FIELD = re.compile(  # of JSON
    r"(?P<head>\"(?:[\w-]*(?:passw(?:or)?d|passphrase|secret|api[-_]?key)|token)\"\s*:\s*)\"(?:\\.|[^\"\\])+\"",
    re.IGNORECASE,
)
_FOLDERS = ("PWD", "OLDPWD")  # of a shell: "pwd" is no password in these
_SHORTEST = 6  # shorter values of the environment would hide ordinary words


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if name not in _FOLDERS and _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield value


def redact(text: str) -> str:
    """Return ``text`` with every recognisable secret replaced by ``***``.

    Hidden are passwords and tokens inside addresses, the paths of well-known webhooks, ``password=...``-like settings
    (also inside an ODBC connection string), signatures of addresses, ``Authorization`` headers, and every value of an
    environment variable whose name ends like a secret (``..._PASSWORD``, ``..._TOKEN``, ``..._KEY`` of an interface).
    """
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(rf"\g<head>:{HIDDEN}@", text)
    for pattern in (_LONE_USER, _HOOK, _ODBC, _SETTING, _FIELD, _HEADER, _BARE_HEADER):
        text = pattern.sub(rf"\g<head>{HIDDEN}", text)
    return text


def redact_tree(value: Any, name: str = "") -> Any:
    """Return nested plain types with secrets replaced; a field with a telling name loses its whole value.

    A group of fields is judged by their own names, unless its name is a plural (``passwords``).
    """
    if isinstance(value, Mapping):
        above = name if name.endswith("s") and _SECRET_NAME.search(name) else ""
        return {str(key): redact_tree(item, above or str(key)) for key, item in value.items()}
    if name and _SECRET_NAME.search(name) and not (value is None or value == "" or isinstance(value, bool)):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value
