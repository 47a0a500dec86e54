"""A data set as a fitted artifact reads it: what was stated at the fit holds beside what the data set says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsforge.core.config import validate
from tsforge.core.errors import DataError, listing
from tsforge.data.calendar import PREFIX, CalendarConfig, calendar_columns
from tsforge.data.config import DataConfig
from tsforge.data.grid import TimeGrid
from tsforge.data.schema import SeriesSchema
from tsforge.data.vintages import Delays

if TYPE_CHECKING:
    from tsforge.artifact import Artifact  # brings torch, which reading data does without

Range = tuple[float | None, float | None]
_ROLES = ("targets", "past", "known", "static")


@dataclass(frozen=True, kw_only=True)
class FittedData:
    """A data set to be read for an artifact.

    The calendar follows from the times alone, so the artifact's is made whatever the data set was ingested with. A
    value outside the valid range of either is none for the model. Roles are those of the fit, as far as the data set
    has the columns; static columns that it has beside them stay readable, for groups and levels. A hierarchy that the
    fit stated holds where it is the data set of the fit. Late covariates of the past must come as late as in the fit:
    that they come later now, or sooner, is a fact of the data, and the network was fitted on other rows of them.

    Attributes:
        name: of the data set; it need not be the one of the fit.
        artifact: its id, for messages.
        own: data settings of the fit, plain types; empty where the artifact does not say.
        reads: columns that the network reads.
        grid: of the fit.
    """

    name: str
    artifact: str
    own: Mapping[str, Any]
    reads: SeriesSchema
    grid: TimeGrid

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> FittedData:
        """Return the data set ``name`` as ``artifact`` reads it."""
        own = artifact.config.get("data") or {}
        return cls(name=name, artifact=artifact.id, own=own, reads=artifact.schema, grid=artifact.grid)

    def settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the data set, plain types, with what holds for the artifact.

        Raises:
            DataError: valid ranges of the data set and of the artifact that have nothing in common, or covariates that
                come with another delay.
        """
        self.check_delay(stored.get("publication_delay"))
        merged = self._merged(stored)
        if self.own.get("name") == self.name and self.own.get("hierarchy") is not None:
            merged["hierarchy"] = self.own["hierarchy"]
        return merged

    def applied_to(self, data: DataConfig) -> DataConfig:
        """Return a config of the data set with the calendar and the valid ranges that hold for the artifact.

        A hierarchy stays the one that is stated: it may have grown since the fit.

        Raises:
            DataError: valid ranges of the data set and of the artifact that have nothing in common.
        """
        merged = self._merged(data.model_dump(mode="json"))
        calendar = validate(CalendarConfig, merged["calendar"], where=f"artifact {self.artifact}, data.calendar")
        return data.model_copy(update={"calendar": calendar, "valid_range": merged["valid_range"]})

    def _merged(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return {**stored, "calendar": self._calendar(stored), "valid_range": self._ranges(stored)}

    def schema(self, stored: SeriesSchema) -> SeriesSchema:
        """Return the roles of the fit where it stated any and the data set has their columns, else the stored ones."""
        roles = {name: tuple(self.own.get(name) or ()) for name in _ROLES}
        wanted = {column for names in roles.values() for column in names}
        if not roles["targets"] or not wanted <= {*stored.columns, *stored.static}:
            return stored
        roles["static"] += tuple(name for name in stored.static if name not in wanted)
        return SeriesSchema(**roles, freq=stored.freq)

    def _calendar(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the calendar of the fit; the stored one where the fit does not say where its columns came from."""
        own = self.own.get("calendar") or {}
        made = calendar_columns(validate(CalendarConfig, own, where=f"artifact {self.artifact}, data.calendar"))
        wanted = {name for name in self.reads.known if name.startswith(PREFIX)}
        return own if self.own and wanted <= set(made) else stored.get("calendar") or {}

    def check_delay(self, stored: str | Mapping[str, str] | None) -> None:
        """Refuse covariates of the past that come later than the targets by other numbers of rows than in the fit.

        Raises:
            DataError: the model reads one whose delay is another now.
        """
        if not self.own or not self.reads.past:  # the artifact does not say, or reads none
            return
        own = self.own.get("publication_delay")
        mine, theirs = self._rows_late(own), self._rows_late(stored)
        differ = [name for name in self.reads.past if mine.get(name) != theirs.get(name)]
        if differ:
            raise DataError(
                f"artifact {self.artifact} was fitted with publication_delay {own or 'none'}, data set '{self.name}' "
                f"has {stored or 'none'}: {len(differ)} of {len(self.reads.past)} past covariates that the model reads "
                f"({listing(differ)}) would be those of other rows; fit again, or ingest with the delay that holds"
            )

    def _rows_late(self, delay: str | Mapping[str, str] | None) -> Mapping[str, int]:
        """Return by how many rows each covariate of the past that is read comes later than the targets."""
        named = [name for name in self.reads.targets if delay and (isinstance(delay, str) or name in delay)]
        schema = replace(self.reads, targets=tuple(named) or self.reads.targets[:1])  # a sum of variates has no delay
        return Delays.of(delay, schema, self.grid, strict=False).past or {}

    def _ranges(self, stored: Mapping[str, Any]) -> dict[str, Range]:
        theirs = {column: (low, high) for column, (low, high) in (stored.get("valid_range") or {}).items()}
        merged: dict[str, Range] = dict(theirs)
        for column, (low, high) in (self.own.get("valid_range") or {}).items():
            other_low, other_high = theirs.get(column, (None, None))
            lows = [end for end in (low, other_low) if end is not None]
            highs = [end for end in (high, other_high) if end is not None]
            if lows and highs and max(lows) > min(highs):
                raise DataError(
                    f"valid_range of '{column}': artifact {self.artifact} was fitted with {_shown(low, high)}, "
                    f"data set '{self.name}' has {_shown(other_low, other_high)}, so that no value would be left; "
                    "fit again, or ingest with the range that holds"
                )
            merged[column] = (max(lows, default=None), min(highs, default=None))
        return merged


def _shown(low: float | None, high: float | None) -> str:
    return f"[{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}]"
