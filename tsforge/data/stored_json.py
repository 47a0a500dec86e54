"""JSON that a database keeps in a text column, read back with a message that says which row is damaged."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from tsforge.core.errors import BackendError

T = TypeVar("T", dict[str, Any], list[Any])


def stored_json(text: Any, kind: type[T], what: str) -> T:
    """Return the object or list that a column keeps.

    Args:
        text: content of the column.
        kind: what it must hold, ``dict`` or ``list``.
        what: the row and the column in words, for the message.

    Raises:
        BackendError: it is no JSON, or holds something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise unreadable(what, str(error)) from error
    if not isinstance(found, kind):
        raise unreadable(what, f"it is no JSON {'object' if kind is dict else 'list'}")
    return found


def unreadable(what: str, why: str) -> BackendError:
    """Return the error about a row that cannot be read."""
    return BackendError(f"{what} cannot be read ({why}); restore that row from a backup of the database")
