"""Checks of the data a batch is about to use: each is data (kind, limits, severity), each says what it found.

Only rows up to ``as_of`` reach a check, so a check cannot know the future either.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

import polars as pl
from pydantic import AfterValidator, Field

from tsforge.core.config import Config
from tsforge.core.errors import DataError, listing, nearest
from tsforge.data.durations import Span, Step, before
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import canonical_freq

Severity = Literal["block", "warn"]


class _Check(Config):
    severity: Severity = "block"
    """``block`` stops the batch before anything is published, ``warn`` only reports."""


class _Spanned(_Check):
    span: Span = "7d"
    """Only rows of the last so much before ``as_of`` are looked at."""


class NonEmptyCheck(_Check):
    """Every series has at least so many rows with an observed target."""

    kind: Literal["non_empty"] = "non_empty"
    min_rows: int = Field(1, ge=1)


class FreshCheck(_Check):
    """The newest observed target of every series is not older than ``max_age`` at ``as_of``."""

    kind: Literal["fresh"] = "fresh"
    max_age: Span


class NullShareCheck(_Spanned):
    """No target of a series lacks more than a share of its recent values."""

    kind: Literal["null_share"] = "null_share"
    max_share: float = Field(0.5, ge=0, le=1)
    columns: tuple[str, ...] = ()
    """Targets to look at; empty = all of them."""


class RangeCheck(_Spanned):
    """At most a share of a series' recent values lies outside the limits of its column."""

    kind: Literal["range"] = "range"
    limits: dict[str, tuple[float | None, float | None]] = Field(min_length=1)
    max_share: float = Field(0.0, ge=0, le=1)


class SchemaCheck(_Check):
    """The data has these columns, and with ``exact`` no other."""

    kind: Literal["schema"] = "schema"
    columns: tuple[str, ...] = Field(min_length=1)
    exact: bool = False


class FrequencyCheck(_Check):
    """The data has this step (a source that silently changes from hourly to daily is caught here)."""

    kind: Literal["frequency"] = "frequency"
    freq: Annotated[Step, AfterValidator(canonical_freq)]


CheckConfig = Annotated[
    NonEmptyCheck | FreshCheck | NullShareCheck | RangeCheck | SchemaCheck | FrequencyCheck,
    Field(discriminator="kind"),
]
TIMELESS = ("non_empty", "schema", "frequency")
"""Kinds that need no clock, so that integer time passes them too."""
OF_TARGETS = ("non_empty", "fresh", "null_share")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found.

    Attributes:
        kind, severity: of the check.
        passed: whether the data is as demanded.
        message: counts, in either case; what to do when it failed.
    """

    kind: str
    severity: Severity
    passed: bool
    message: str


def run_checks(
    frame: SeriesFrame, checks: Sequence[CheckConfig], as_of: datetime, ahead: Collection[str] = ()
) -> list[CheckResult]:
    """Return the result of every check, in order.

    Args:
        frame: what is known at ``as_of``.
        checks: what to demand.
        as_of: the moment ages and spans count back from.
        ahead: series of the frame that bring no targets but known covariates; checks of targets do not ask for any.

    Raises:
        DataError: a check names a column that the data lacks.
    """
    rest = [name for name in frame.series_ids if name not in ahead]
    results = []
    for check in checks:
        if not ahead or check.kind not in OF_TARGETS:
            results.append(_run(frame, check, as_of))
        elif rest:
            results.append(_run(frame.select_series(rest), check, as_of))
        else:
            message = f"0 of {len(ahead)} series bring targets; they hold known covariates of rows to come"
            results.append(CheckResult(kind=check.kind, severity=check.severity, passed=True, message=message))
    return results


def _run(frame: SeriesFrame, check: CheckConfig, as_of: datetime) -> CheckResult:
    if isinstance(check, NonEmptyCheck):
        failures, what = _short_series(frame, check)
    elif isinstance(check, FreshCheck):
        failures, what = _stale_series(frame, check, as_of)
    elif isinstance(check, NullShareCheck):
        failures, what = _sparse_columns(frame, check, as_of)
    elif isinstance(check, RangeCheck):
        failures, what = _outlying_columns(frame, check, as_of)
    elif isinstance(check, SchemaCheck):
        failures, what = _other_columns(frame, check)
    else:
        failures = [] if frame.schema.freq == check.freq else [f"the data has {frame.schema.freq}"]
        what = f"frequency other than {check.freq}"
    message = f"{len(failures)} {what}" + (f": {listing(failures, 3)}" if failures else "")
    return CheckResult(kind=check.kind, severity=check.severity, passed=not failures, message=message)


def _short_series(frame: SeriesFrame, check: NonEmptyCheck) -> tuple[list[str], str]:
    seen = pl.any_horizontal(pl.col(frame.schema.targets).is_not_null())
    counts = frame.table.group_by("series_id", maintain_order=True).agg(seen.sum().alias("rows"))
    short = counts.filter(pl.col("rows") < check.min_rows)
    failures = [f"'{name}' has {rows}" for name, rows in short.iter_rows()]
    return failures, f"of {counts.height} series have fewer than {check.min_rows} observed row(s)"


def _stale_series(frame: SeriesFrame, check: FreshCheck, as_of: datetime) -> tuple[list[str], str]:
    oldest = before(as_of, check.max_age)
    last = frame.last_observed()
    stale = last.filter(pl.col("time").is_null() | (pl.col("time") < oldest))
    failures = [f"'{name}' ends at {time or 'no time at all'}" for name, time in stale.iter_rows()]
    return failures, f"of {last.height} series have no target newer than {check.max_age} before {as_of:%Y-%m-%d %H:%M}"


def _other_columns(frame: SeriesFrame, check: SchemaCheck) -> tuple[list[str], str]:
    present = (*frame.schema.columns, *frame.schema.static)
    failures = [f"no '{name}'{nearest(name, present)}" for name in check.columns if name not in present]
    if check.exact:
        failures += [f"'{name}' is new" for name in present if name not in check.columns]
    return failures, f"column(s) differ from the {len(check.columns)} expected"


def _recent(frame: SeriesFrame, span: str, as_of: datetime) -> pl.DataFrame:
    return frame.table.filter((pl.col("time") > before(as_of, span)) & (pl.col("time") <= as_of))


def _require_columns(frame: SeriesFrame, names: Sequence[str], kind: str) -> None:
    unknown = [name for name in names if name not in frame.schema.columns]
    if unknown:
        hint = nearest(unknown[0], frame.schema.columns)
        raise DataError(f"the {kind} check names {listing(unknown)}, which the data lacks{hint}")


def _sparse_columns(frame: SeriesFrame, check: NullShareCheck, as_of: datetime) -> tuple[list[str], str]:
    columns = check.columns or frame.schema.targets
    _require_columns(frame, columns, check.kind)
    shares = _recent(frame, check.span, as_of).group_by("series_id", maintain_order=True)
    table = shares.agg(pl.col(columns).is_null().mean()).unpivot(index="series_id")
    bad = table.filter(pl.col("value") > check.max_share)
    failures = [f"{name}.{column} {share:.0%}" for name, column, share in bad.iter_rows()]
    there = set(table["series_id"])
    missing = [name for name in frame.series_ids if name not in there]
    failures += [f"{name} has no row at all" for name in missing]
    return failures, f"target(s) lack more than {check.max_share:.0%} of their values in the last {check.span}"


def _outlying_columns(frame: SeriesFrame, check: RangeCheck, as_of: datetime) -> tuple[list[str], str]:
    _require_columns(frame, tuple(check.limits), check.kind)
    outside = []
    for name, (low, high) in check.limits.items():
        beyond = pl.lit(False)
        if low is not None:
            beyond |= pl.col(name) < low
        if high is not None:
            beyond |= pl.col(name) > high
        outside.append(beyond.mean().alias(name))  # a missing value is neither inside nor outside
    table = _recent(frame, check.span, as_of).group_by("series_id", maintain_order=True).agg(outside)
    bad = table.unpivot(index="series_id").filter(pl.col("value") > check.max_share)
    failures = [f"{name}.{column} {share:.1%}" for name, column, share in bad.iter_rows()]
    return failures, f"column(s) have more than {check.max_share:.1%} of their values outside their limits"
