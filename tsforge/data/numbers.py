"""Cells as sources write them to float columns: text, sentinels, NaN and infinities; each change is counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from tsforge.core.errors import DataError, listing
from tsforge.data.config import DataConfig
from tsforge.data.findings import ROW, IngestReport, row_examples
from tsforge.data.io import RawTable

_EXACT = 2**53  # a Float64 holds every whole number up to here, and only some beyond


class NumberReader:
    """Turns raw columns into Float64, collecting flaws over all columns before it speaks.

    Args:
        raw: the source, for the decimal mark of its text.
        config: sentinels and the policy for bad cells.
        report: takes the findings.
    """

    def __init__(self, raw: RawTable, config: DataConfig, report: IngestReport) -> None:
        self._raw = raw
        self._config = config
        self._report = report
        self._flaws: list[tuple[str, str, int, tuple[str, ...]]] = []

    def read(self, table: pl.DataFrame, columns: Mapping[str, str], optional: Iterable[str]) -> pl.DataFrame:
        """Return the table with its value columns as Float64.

        Args:
            table: raw rows with the column ``ROW``.
            columns: source column -> variate name.
            optional: source columns nobody asked for by name; they are left out when they hold no number at all.

        Raises:
            DataError: cells are no numbers or infinite and ``bad_cells`` is ``error``, or a column has no number type.
        """
        may_go = set(optional)
        left_out, read = [], []
        for name, variate in columns.items():
            column = self._column(table, name, variate, optional=name in may_go)
            if column is None:
                left_out.append(name)
            else:
                read.append(column)
        self._settle()
        if left_out:
            self._report.add("note", "columns without numbers left out", len(left_out), tuple(left_out))
        return table.drop(left_out).with_columns(read)

    def _column(self, table: pl.DataFrame, name: str, variate: str, *, optional: bool) -> pl.Series | None:
        cells = table[name]
        kind = cells.dtype
        sentinels = (*self._config.sentinels.get(variate, ()), *self._config.sentinels.get("*", ()))
        if kind in (pl.String, pl.Categorical, pl.Enum):
            numbers = self._from_text(table, cells, optional=optional)
            if numbers is None:
                return None
        elif kind.is_numeric() or kind in (pl.Boolean, pl.Null):
            numbers = cells
        elif optional:
            return None
        else:
            raise DataError(f"column '{name}' has type {kind}; give numbers or leave it out")
        if numbers.dtype.is_float():
            self._report.add("replaced", f"not-a-number cells in column '{name}'", int(numbers.is_nan().sum()))
            numbers = numbers.fill_nan(None)
        # before the cast: -9999.9 stored in four bytes is not the -9999.9 of eight
        known = codes_as(sentinels, numbers.dtype)
        if len(known) and numbers.dtype.is_numeric():
            coded = numbers.is_in(known.implode()).fill_null(False)
            self._report.add("replaced", f"sentinel values in column '{name}'", int(coded.sum()))
            numbers = numbers.set(coded, None)
        numbers = numbers.cast(pl.Float64) + 0.0  # one zero: SQLite keeps no sign of -0.0
        infinite = numbers.is_infinite().fill_null(False)
        if infinite.any():
            self._flaws.append(("infinite", name, int(infinite.sum()), row_examples(table[ROW], cells, infinite)))
            numbers = numbers.set(infinite, None)
        self._note_rounded(table[ROW], cells, numbers)
        return numbers

    def _note_rounded(self, rows: pl.Series, cells: pl.Series, numbers: pl.Series) -> None:
        """Say where a whole number is none that a Float64 holds, as long identifiers and nanoseconds are."""
        large = (numbers.abs() >= _EXACT).fill_null(False)
        if cells.dtype.is_float() or not large.any():
            return
        given, got = cells.filter(large), numbers.filter(large)
        if cells.dtype.is_numeric():
            whole, is_whole = given.cast(pl.Int128, strict=False), pl.Series([True]).new_from_index(0, len(given))
        else:
            text = given.cast(pl.String).str.strip_chars().str.replace(self._raw.decimal, ".", literal=True)
            digits = text.str.extract(r"^\+?(-?\d+)(?:\.0*)?$")
            whole, is_whole = digits.cast(pl.Int128, strict=False), digits.is_not_null()
        same = whole.eq_missing(got.cast(pl.Int128, strict=False))
        changed = is_whole & ~(same & whole.is_not_null())  # null: of more digits than even 128 bits hold
        self._report.add(
            "note",
            f"whole numbers in column '{cells.name}' with more digits than a Float64 holds, rounded",
            int(changed.sum()),
            row_examples(rows.filter(large), given, changed),
        )

    def _from_text(self, table: pl.DataFrame, cells: pl.Series, *, optional: bool) -> pl.Series | None:
        text = cells.cast(pl.String).str.strip_chars()
        text = text.set(text == "", None)
        numbers = from_text(text, self._raw.decimal).cast(pl.Float64, strict=False)
        bad = numbers.is_null() & text.is_not_null()
        count = int(bad.sum())
        if not count:
            return numbers
        if count == len(text) - text.null_count():
            by_point = text.drop_nulls().cast(pl.Float64, strict=False)
            if optional and self._raw.decimal == "," and not by_point.null_count():
                told = listing(row_examples(table[ROW], cells, bad, 2))
                raise DataError(
                    f"column '{cells.name}' holds numbers with a point ({told}), and source.decimal is ','; mend it, "
                    "or name data.targets without it"
                )
            if optional:
                return None
            examples = listing(row_examples(table[ROW], cells, bad, 2))
            mark = f"; the decimal mark is '{self._raw.decimal}'" if text.str.contains(r"\d[.,]\d").any() else ""
            raise DataError(
                f"column '{cells.name}' holds text, no cell is a number ({examples}{mark}); encode it as numbers "
                "or leave it out"
            )
        self._flaws.append(("unreadable", cells.name, count, row_examples(table[ROW], cells, bad)))
        return numbers

    def _settle(self) -> None:
        """Refuse or record the bad cells of all columns together."""
        if not self._flaws:
            return
        if self._config.bad_cells == "null":
            for kind, name, count, examples in self._flaws:
                self._report.add("replaced", f"{kind} cells in column '{name}'", count, examples)
            return
        kinds = {"unreadable": "are no numbers", "infinite": "are infinite"}
        parts = []
        for kind, words in kinds.items():
            flaws = [flaw for flaw in self._flaws if flaw[0] == kind]
            if flaws:
                places = listing((f"'{name}' {count} times: {listing(where, 2)}" for _, name, count, where in flaws), 3)
                parts.append(f"{sum(flaw[2] for flaw in flaws)} cells in {len(flaws)} column(s) {words} ({places})")
        raise DataError(
            f"{'; '.join(parts)}; repair them, name their code for missing values in null_values or sentinels, or "
            "set bad_cells=null"
        )


def from_text(text: pl.Series, decimal: str) -> pl.Series:
    """Return cells with a point as decimal mark; null where a point can only part thousands: 1.234 is no 1,234."""
    if decimal != ",":
        return text
    return text.set(text.str.contains(".", literal=True), None).str.replace(",", ".", literal=True)


def codes_as(sentinels: Sequence[float], kind: pl.DataType) -> pl.Series:
    """Return codes in the type of a column; those that it cannot hold are none of its codes: -999.9 is not -999."""
    given = pl.Series(sentinels, dtype=pl.Float64)
    codes = given.cast(kind, strict=False)
    if not kind.is_float():
        codes = codes.filter(codes.cast(pl.Float64) == given)
    return codes.drop_nulls()
