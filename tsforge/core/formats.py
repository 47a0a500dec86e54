"""Versions of stored formats: one check for all of them, which tells damaged from newer."""

from __future__ import annotations

from tsforge.core.errors import ArtifactError, TsforgeError


def check_version(
    found: object,
    known: int,
    *,
    what: str,
    kind: str = "format",
    remedy: str = "restore a copy",
    error: type[TsforgeError] = ArtifactError,
) -> int:
    """Return the version that something stored states, after checking that this tsforge can read it.

    Args:
        found: as stored; only a whole number from 1 up is a version (``True`` and ``"1"`` are none).
        known: the newest version this tsforge reads.
        what: what states it, with its place.
        kind: name of the format in the message.
        remedy: what to do about a damaged one.
        error: what to raise.

    Raises:
        TsforgeError: (of class ``error``) no version at all, or a newer one; the message tells which.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise error(f"{what} is damaged: it states no valid format version ({found!r} as {kind}); {remedy}")
    if found > known:
        newer = f"{kind} {found}, this one reads up to {known}"
        raise error(f"{what} was made by a newer tsforge ({newer}); upgrade tsforge")
    return found


def version_in_text(found: str) -> int | str:
    """Return the number that a text column holds, or the text itself where it is none, for ``check_version``."""
    return int(found) if found.isdecimal() and len(found) < 10 else found
