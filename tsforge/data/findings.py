"""What reading a source did to its rows: counted, with examples, kept with every batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from tsforge.core.errors import listing
from tsforge.data.grid import show_time

ROW = "\x00row"  # column with the position in the source, from 1 below the header; a name no source uses
Kind = Literal["refused", "replaced", "merged", "sorted", "note"]


@dataclass(frozen=True)
class Finding:
    """One kind of flaw and what was done about it.

    Attributes:
        kind: ``refused`` rows were left out, ``replaced`` cells became null, ``merged`` rows were aggregated,
            ``sorted`` rows came in another order, ``note`` is worth knowing.
        what: the flaw in words, with its column.
        count: rows or cells.
        examples: first places, such as ``row 17: 'abc'``.
    """

    kind: Kind
    what: str
    count: int
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = f" ({listing(self.examples, 3)})" if self.examples else ""
        return f"{self.kind} {self.count}: {self.what}{shown}"


@dataclass
class IngestReport:
    """What happened between a source and its ``SeriesFrame``.

    Attributes:
        origin: where the rows came from, without secrets.
        rows_in: rows of the source (a wide row holds every series at one time).
        rows_out: rows of the frame, gaps left out.
        findings: flaws and what was done about them.
    """

    origin: str
    rows_in: int = 0
    rows_out: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: Kind, what: str, count: int, examples: tuple[str, ...] = ()) -> None:
        """Record a finding; a count of zero leaves no trace."""
        if count:
            self.findings.append(Finding(kind, what, count, examples))

    @property
    def rows_refused(self) -> int:
        """Source rows that were left out."""
        return sum(finding.count for finding in self.findings if finding.kind == "refused")

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for a record."""
        return {
            "origin": self.origin,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "rows_refused": self.rows_refused,
            "findings": [
                {"kind": item.kind, "what": item.what, "count": item.count, "examples": list(item.examples)}
                for item in self.findings
            ],
        }


def row_examples(rows: pl.Series, values: pl.Series, bad: pl.Series, limit: int = 3) -> tuple[str, ...]:
    """Return ``row 17: 'abc'`` for the first bad cells; rows count from 1 below the header."""
    where = bad.arg_true().head(limit)
    return tuple(f"row {rows[int(at)]}: {_shown(values[int(at)])}" for at in where)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else show_time(value)
