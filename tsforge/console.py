"""What a person sees in a terminal: tables, JSON for machines, one line for an error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any


def plain(value: Any) -> Any:
    """Return ``value`` in types that JSON knows; times become ISO text, non-finite numbers null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str | int | bool) or value is None:
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    return str(value)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str = "", limit: int = 50) -> None:
    """Print records as a table on standard output; rows past ``limit`` are counted, not shown."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    if not rows:
        console.print(f"{title}: nothing yet" if title else "nothing yet")
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float) or row.get(name) is None for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text(cell(row.get(name))) for name in columns))  # no markup: [t] is text
    console.print(table)
    if len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more rows (--json prints all)")


def cell(value: Any) -> str:
    """Return one table cell: numbers to four significant digits, times without fractions, empty for missing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "n/a"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, timedelta):
        hours, minutes = divmod(round(value.total_seconds() / 60), 60)
        return f"{value.days} d" if value.days else f"{hours} h {minutes} min"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={cell(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(item, Mapping) for item in value) else ", "
        return between.join(cell(item) for item in value)
    return str(value)


def print_facts(facts: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
    """Print ``name  value`` lines on standard output, aligned; sentences of a list have a line each."""
    pairs = list(facts.items() if isinstance(facts, Mapping) else facts)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        many = isinstance(value, list | tuple) and any(isinstance(item, str) and " " in item for item in value)
        lines = [cell(item) for item in value] if many else [cell(value)]
        for number, line in enumerate(lines):
            sys.stdout.write(f"{'' if number else name:<{width}}  {line}\n")


def print_error(message: str) -> None:
    """Print one error line on standard error."""
    sys.stderr.write(f"error: {message}\n")
