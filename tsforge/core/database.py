"""What a database says of a failure, in one line, and what to do about it; for every room that asks one."""

from __future__ import annotations

import sys

BUSY_SECONDS = 30
_ADVICE = (
    ("database or disk is full", "the disk is full; free space and run it again"),
    ("no space left", "the disk is full; free space and run it again"),
    ("readonly", "the file or its folder is read-only; make both writable"),
    ("read-only", "the database is read-only; use a writable one"),
    ("unable to open", "the file cannot be opened; check that its folder exists and is writable"),
    ("locked", f"another process held the database for {BUSY_SECONDS} s; run it again when that one has finished"),
    ("not a database", "the file is not a SQLite database; check the path"),
    ("malformed", "the file is damaged; restore it from a backup"),
    ("disk i/o error", "the disk refused to read or write; check free space and the disk"),
    # a refused login is a failed connection too, and said first
    ("password", "the server refused the login; check user and password"),
    ("does not exist", "create it, or check the name"),
    ("connection", "the server does not answer or ended the connection; check that it runs and the address is right"),
)


def database_error() -> tuple[type[Exception], ...]:
    """Return what SQLAlchemy raises, nothing where it is not loaded: for rooms whose library uses it by itself."""
    found = sys.modules.get("sqlalchemy.exc")
    return () if found is None else (found.SQLAlchemyError,)


def reason(error: Exception, otherwise: str | None = None) -> str:
    """Return the first line of what a driver said, with advice where the case is known.

    Args:
        error: of a driver, or of SQLAlchemy around it.
        otherwise: advice where the case is not known; None for none.
    """
    origin = getattr(error, "orig", None) or error
    text = str(origin).strip()
    first, lowered = text.splitlines()[0] if text else type(origin).__name__, text.lower()
    advice = next((advice for sign, advice in _ADVICE if sign in lowered), otherwise)
    return first if advice is None else f"{first} ({advice})"
