"""Stream: one small state for an artifact and a data set, brought up to date with what the store has got since.

A stream is a folder ``streams/NAME``: ``state.safetensors`` (state and position in one file, so that they cannot part),
``scores-TIME/part-NNNNNNNN.parquet`` (one a run with new rows) and ``lock``. The part is written before the state that
counts it; a run that dies between leaves a part which the next run, starting from the same state, writes again.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field, field_validator

from tsforge.app.exclusive import alone
from tsforge.app.fitted_data import FittedData
from tsforge.app.forecast import LATEST, find_artifact
from tsforge.app.ingest import load_dataset, mask_invalid
from tsforge.app.stream_late import LeftOut, count_missing, find_lapsed, find_left_out, sum_members, warn_missing
from tsforge.artifact import Artifact, load_artifact, load_tensor_file, match_frame
from tsforge.contracts.tables import Forecast
from tsforge.core.atomic import atomic_file, remove_leftovers
from tsforge.core.config import Config, QuantileLevel
from tsforge.core.errors import ArtifactError, BackendError, ConfigError, DataError, EmptySpanError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.data.store import SeriesStore
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.stream import Mode, Stream, long_enough
from tsforge.forecasting.stream_scores import SCORE_COLUMNS

_LOG = get_logger(__name__)
FOLDER = "streams"
STATE = "state.safetensors"
_NO_ONLINE = "online_every is for online intervals, and the stream has static ones; add online=true"
SHOWN = 50  # scored values that a summary lists, strangest first
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class StreamConfig(Config):
    """Which stream to bring up to date, and how to start it when it is new."""

    artifact: str = LATEST
    """An artifact id, a folder, NAME@champion, NAME/VERSION, or ``latest``: the newest artifact of the workspace."""
    dataset: str | None = None
    """Stored data set; default the one the artifact was fitted on."""
    name: str | None = None
    """Name of the stream; default data set and artifact, so that a new artifact has a stream of its own."""
    mode: Mode = "auto"
    """``carried`` steps the state of a recurrent model, ``window`` keeps the last rows (any model); ``auto`` carries
    where it can. A stream keeps the mode it was started with."""
    restart_every: int | None = Field(None, ge=1)
    """Warm a carried state up again every so many rows; null keeps what the stream has, or never."""
    online: OnlineConfig | None = None
    """Let intervals learn from what comes; ``true`` takes the defaults, null keeps what the stream has, or static
    intervals. Other settings than the stream has begin anew."""
    online_every: int | None = Field(None, ge=1)
    """Grid rows between forecasts that online intervals learn from; null keeps what the stream has, or 1."""
    start: str | int | None = None
    """A new stream: last time that counts as seen, rows after it are scored; default the end of the stored data."""
    reset: bool = False
    """Start the stream anew from the stored data (after corrections of old rows, or for another artifact)."""
    quantile_levels: tuple[QuantileLevel, ...] | None = None
    """Of the forecast; default every level the artifact offers."""

    @field_validator("online", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if value is False:
            raise ValueError("leave it out to keep what the stream has; reset=true without it starts with static ones")
        return {} if value is True else value


@dataclass(frozen=True, kw_only=True)
class StreamResult:
    """A stream after one run.

    Attributes:
        name: of the stream. path: its folder. revision: runs that took rows.
        artifact_id, dataset, mode: what it is made of.
        is_new: it was started by this run.
        rows_taken: grid rows taken by this run. scores: see ``Stream.update``.
        forecast: from the end of every series that can be forecast.
        added, waiting, blind: series taken in, stored but not taken in (yet), without a value in their whole context.
        left_out: rows that came late and values that were revised since the last run.
        covariates_missing: by covariate, how many values the rows taken lack.
        online: of intervals that learn, how many were issued with which status, judged, given up and wait, and those of
            this forecast by status; None where they are static.
        seconds: wall time.
    """

    name: str
    path: Path
    revision: int
    artifact_id: str
    dataset: str
    mode: str
    is_new: bool
    rows_taken: int
    scores: pl.DataFrame
    forecast: Forecast
    added: tuple[str, ...]
    waiting: tuple[str, ...]
    blind: tuple[str, ...]
    left_out: LeftOut
    covariates_missing: Mapping[str, int]
    online: Mapping[str, int] | None
    seconds: float

    @property
    def num_scored(self) -> int:
        """Values that were compared with an expectation; after an outage longer than the context there is none."""
        return self.scores["expected"].count()

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        table = self.forecast.table
        return {
            "stream": self.name,
            "artifact": self.artifact_id,
            "dataset": self.dataset,
            "mode": self.mode,
            "new": self.is_new,
            "revision": self.revision,
            "rows_taken": self.rows_taken,
            "rows_late": self.left_out.rows_late,
            "values_scored": self.num_scored,
            "values_unscored": self.scores.height - self.num_scored,
            "values_outside": int(self.scores["outside"].sum() or 0),
            "values_revised": self.left_out.revised,
            "covariates_missing": sum(self.covariates_missing.values()),
            "series": table["series_id"].n_unique(),
            "last_row": table["cutoff"].max(),
            "forecast_until": table["time"].max(),
            "series_added": list(self.added),
            "series_waiting": list(self.waiting),
            "series_blind": list(self.blind),
            **{f"online_{name}": value for name, value in (self.online or {}).items()},
            "path": str(self.path),
            "seconds": round(self.seconds, 2),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the new values outside their interval, strangest first."""
        strange = self.scores.filter(pl.col("outside")).sort("score", descending=True, nulls_last=True)
        return strange.drop("outside").head(SHOWN).to_dicts()


def stream(config: StreamConfig, workspace: Workspace) -> StreamResult:
    """Take every stored row that the stream has not seen, score it, forecast from the end, and keep the state.

    A run without new rows changes nothing and forecasts again. Rows are taken up to the last one with a stored target;
    values outside the data set's valid range are hidden from the model but scored. Rows that came late, values revised
    after they were taken and missing covariates are counted, with a warning each.

    Raises:
        ArtifactError: no such artifact, one that does not fit the data, or a damaged state.
        DataError: no such data set; a new stream: too short a history; known covariates of the horizon missing.
        ConfigError, ModelError: settings that artifact or stream do not allow.
        BackendError: another process is at work on the stream, or disk or database failed; the stream is as before.
    """
    started = time.monotonic()
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    name = config.name or f"{dataset}-{artifact.id}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: '{name}' must be letters, digits, '_', '-' and '.', and not begin with '.' or '-'")
    folder = workspace.root / FOLDER / name
    data = FittedData.of(artifact, dataset)
    with alone(folder, f"stream '{name}' is being brought up to date"):
        _sweep(folder)
        is_new = config.reset or not (folder / STATE).exists()
        if is_new:
            live, changed = _begin(config, artifact, dataset, workspace), True
        else:
            live, changed = _resume(config, artifact, dataset, folder)
            _drop_older(folder, live)
        stored = _stored_series(data, workspace)
        lapsed = find_lapsed(live, stored, sum_members(data, workspace), name)
        before = None if is_new else live.ends()
        caught = _catch_up(live, data, workspace, stored, lapsed.names)
        blind = live.blind()
        awake = [name for name in live.ends()["series_id"] if name not in blind]
        if not awake:
            raise DataError(f"none of the {len(blind)} series of stream '{name}' has a value in its whole context")
        forecast = live.forecast(config.quantile_levels, series=awake if blind else None)
        left_out = find_left_out(live, before, data, workspace)
        left_out.warn(name)
        warn_missing(caught.missing, name)
        _warn_strangers(live, caught.waiting, name)
        if changed or lapsed.is_noted or caught.taken or caught.added or left_out.is_noted:
            _keep(live, caught.scores, folder, took_rows=caught.taken > 0)
    facts = {"dataset": dataset, "stream": name}
    result = StreamResult(
        name=name,
        path=folder,
        revision=live.about["revision"],
        artifact_id=artifact.id,
        dataset=dataset,
        mode=live.mode,
        is_new=is_new,
        rows_taken=caught.taken,
        scores=caught.scores,
        forecast=Forecast(
            table=forecast.table, quantile_levels=forecast.quantile_levels, metadata={**forecast.metadata, **facts}
        ),
        added=caught.added,
        waiting=caught.waiting,
        blind=blind,
        left_out=left_out,
        covariates_missing=caught.missing,
        online=_online_facts(live, forecast),
        seconds=time.monotonic() - started,
    )
    log_event(_LOG, "streamed", stream=name, rows=caught.taken, scored=result.num_scored, revision=result.revision)
    return result


def _begin(config: StreamConfig, artifact: Artifact, dataset: str, workspace: Workspace) -> Stream:
    fitted = FittedData.of(artifact, dataset)
    frame = load_dataset(workspace, fitted, masked=True, extend=artifact.window.horizon)
    if config.start is not None:
        _check_start(config.start, artifact, frame)
    names = long_enough(artifact, frame, config.start)
    if names and not artifact.network.capabilities.rows_coupled:
        frame = frame.select_series(names)
    if config.online is None and config.online_every is not None:
        raise ConfigError(_NO_ONLINE)
    live = Stream.start(
        artifact,
        frame,
        mode=config.mode,
        restart_every=config.restart_every,
        cutoff=config.start,
        online=config.online,
        online_every=config.online_every or 1,
    )
    begun = None if config.start is None else str(config.start)
    live.about = {
        "dataset": dataset,
        "start": begun,
        "revision": 0,
        "parts": 0,
        "scores": f"scores-{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z",
    }
    return live


def _check_start(start: str | int, artifact: Artifact, frame: SeriesFrame) -> None:
    """Refuse a start that no stored row reaches."""
    ends = frame.last_observed()["time"].drop_nulls().sort().tail(1)
    if len(ends) and artifact.grid.floor(start) > int(artifact.grid.locate(ends)[0][0]):
        raise ConfigError(
            f"start={start} is later than the last stored row ({ends.item()}); leave start out to begin there"
        )


def _resume(config: StreamConfig, artifact: Artifact, dataset: str, folder: Path) -> tuple[Stream, bool]:
    """Return the stored stream, and whether settings of its own were changed."""
    try:
        live = Stream.load(folder / STATE, artifact)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; reset=true begins stream '{folder.name}' anew from the stored data") from error
    if live.about.get("dataset") != dataset:
        raise ConfigError(
            f"stream '{folder.name}' follows data set '{live.about.get('dataset')}', not '{dataset}'; give another "
            "name, or reset=true"
        )
    if config.mode not in ("auto", live.mode):
        raise ConfigError(f"stream '{folder.name}' was started in mode '{live.mode}'; change it with reset=true")
    if config.start is not None and not _is_begun_at(config.start, live):
        begun = live.about["start"] or "the end of the data"
        raise ConfigError(
            f"stream '{folder.name}' was begun with start={begun}, not {config.start}: leave start out, or begin again "
            "with reset=true"
        )
    changed = _set_online(live, config, folder.name)
    if config.restart_every not in (None, live.restart_every):
        live.set_restart(config.restart_every)
        changed = True
    return live, changed


def _is_begun_at(start: str | int, live: Stream) -> bool:
    """Return whether ``start`` is the row of the grid that the stream was begun with, or the state does not say."""
    begun = live.about.get("start", str(start))
    grid = live.artifact.grid
    return begun is not None and grid.floor(start) == grid.floor(begun)


def _set_online(live: Stream, config: StreamConfig, name: str) -> bool:
    """Bring the online intervals to what the config asks for; return whether that changed anything."""
    has = live.online
    if config.online is None or (has is not None and has.state.config == config.online):
        if config.online_every is None or (has is not None and has.every == config.online_every):
            return False
        if has is None:
            raise ConfigError(_NO_ONLINE)
        has.every = config.online_every
        return True
    live.set_online(config.online, config.online_every or (1 if has is None else has.every))
    if has is not None:
        _LOG.warning("the online intervals of stream '%s' start anew: they were made with other settings", name)
    return True


def _online_facts(live: Stream, forecast: Forecast) -> dict[str, int] | None:
    if live.online is None:
        return None
    shown = {f"forecast_{status}": count for status, count in (forecast.metadata["online"] or {}).items()}
    return {"every": live.online.every, **live.online.summary(), **shown}


@dataclass(kw_only=True)
class _Caught:
    """What a run took: grid rows, their scores, series taken in and series that wait, covariates missing."""

    taken: int = 0
    scores: pl.DataFrame
    added: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)


def _catch_up(
    live: Stream, data: FittedData, workspace: Workspace, stored_series: Set[str], lapsed: Set[str]
) -> _Caught:
    """Take the stored rows after the stream's, none of ``lapsed`` series."""
    ends, before = live.ends(), int(live.buffer.last.sum())
    schema = live.artifact.schema
    strangers = set(stored_series) - set(live.series)
    tables, taken_rows = [live.update(_nothing(live))], [_nothing(live)]
    for names, start, is_front in _queries(live, lapsed):
        raw = _read(workspace, data, names, start, live.artifact.window.horizon, is_front=is_front)
        if raw is None:
            continue
        if is_front:
            strangers |= set(raw.series_ids) - set(live.series)  # sums of a hierarchy are not stored
        stored = set(raw.series_ids)
        present = [name for name in names if name in stored]
        if present:
            mine = raw.select_series(present)
            seen = match_frame(live.artifact, mask_invalid(mine, data, workspace))
            rows, known, judged = _split(seen, mine, ends)
            tables.append(live.update(rows, known=known, judged=judged))
            taken_rows.append(rows.select(taken_rows[0].columns))
    taken = int(live.buffer.last.sum()) - before
    added = _admit(live, data, sorted(strangers), workspace) if strangers else ()
    return _Caught(
        taken=taken,
        scores=pl.concat(tables).sort("series_id", "time", maintain_order=True),
        added=added,
        waiting=tuple(sorted(strangers - set(added))),
        missing=count_missing(pl.concat(taken_rows), schema.targets, schema.past + schema.known),
    )


def _stored_series(data: FittedData, workspace: Workspace) -> set[str]:
    with closing(SeriesStore(workspace.database_url)) as store:
        return set(store.series_ids(data.name))


def _nothing(live: Stream) -> pl.DataFrame:
    columns = {"time": live.ends()["time"].dtype} | dict.fromkeys(live.artifact.schema.columns, pl.Float64)
    return pl.DataFrame(schema={"series_id": pl.String, **columns})


def _queries(live: Stream, lapsed: Set[str]) -> list[tuple[list[str], Any, bool]]:
    """Return series and the time to read them from: those near the front, and apart those that stopped long ago.

    The last row taken is read again: it is in the store, so that an empty answer is news. Of ``lapsed`` series nothing
    is to be read, but all others near the front are looked at even where no series of the stream is left there.
    """
    last = live.buffer.last
    is_front = last > int(last.max()) - live.artifact.window.context_length
    found = []
    for part, front in ((is_front, True), (~is_front, False)):
        names = [name for name, chosen in zip(live.series, part.tolist(), strict=True) if chosen and name not in lapsed]
        if names or front:
            found.append((names, live.artifact.grid.time_at(int(last[part].min())), front))
    return found


def _read(
    workspace: Workspace, fitted: FittedData, names: list[str], start: Any, horizon: int, *, is_front: bool
) -> SeriesFrame | None:
    """Return stored rows from ``start`` on, unmasked, with a horizon to forecast; None where there are none.

    At the front every series is read, those that are not in the stream among them.
    """
    try:
        return load_dataset(workspace, fitted, series=None if is_front else names, start=start, extend=horizon)
    except EmptySpanError:
        with closing(SeriesStore(workspace.database_url)) as store:
            store.config(fitted.name)  # an unknown data set is an error, an empty span is not
            if store.datasets().filter(name=fitted.name)["rows"].item():
                return None
        raise


def _split(
    seen: SeriesFrame, raw: SeriesFrame, ends: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame | None, pl.DataFrame]:
    """Return rows to take, known covariates after the stream's rows, and the values to judge.

    Taken are rows after the stream's up to the last one with a stored target, be it hidden from the model or not.
    """
    schema = seen.schema
    reached = raw.last_observed().rename({"time": "reached"})
    bounds = ends.rename({"time": "end"}).join(reached, on="series_id", how="inner")
    later = pl.col("time") > pl.col("end")
    table = seen.table.join(bounds, on="series_id").filter(later)
    rows = table.filter(pl.col("time") <= pl.col("reached")).drop("end", "reached")
    judged = raw.table.join(rows.select("series_id", "time"), on=["series_id", "time"], how="semi")
    known = table.select("series_id", "time", *schema.known) if schema.known else None
    return rows, known, judged.select("series_id", "time", *schema.targets)


def _admit(live: Stream, fitted: FittedData, names: list[str], workspace: Workspace) -> tuple[str, ...]:
    """Take in series that the stream does not have yet, those with enough rows; none where the artifact cannot."""
    if _is_closed(live):
        return ()
    try:
        frame = load_dataset(workspace, fitted, series=names, masked=True, extend=live.artifact.window.horizon)
    except EmptySpanError:  # series without any row
        return ()
    return live.add(frame)


def _is_closed(live: Stream) -> bool:
    """Return whether the artifact takes in no series that the stream did not begin with."""
    return live.buffer.coupled or live.artifact.network.needs_known_series


def _warn_strangers(live: Stream, waiting: tuple[str, ...], name: str) -> None:
    if waiting and _is_closed(live):
        _LOG.warning(
            "%d stored series are not in stream '%s' (%s), and its artifact takes none in later; their rows are left "
            "out: fit again with them",
            len(waiting),
            name,
            listing(waiting),
        )


def _keep(live: Stream, scores: pl.DataFrame, folder: Path, *, took_rows: bool) -> None:
    """Store the scores of this run and then the state that counts them."""
    if took_rows:
        live.about["revision"] += 1
    if scores.height:
        with atomic_file(_part(folder, live.about)) as temporary:
            scores.write_parquet(temporary)
        if "parts" in live.about:  # states of earlier versions do not count them
            live.about["parts"] += 1
    live.save(folder / STATE)
    _drop_older(folder, live)


def _drop_older(folder: Path, live: Stream) -> None:
    """Remove scores of no stream: of one that was started anew, or of such a start that was killed."""
    for other in folder.glob("scores-*"):
        if other.name != live.about["scores"]:
            shutil.rmtree(other, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed run was writing; nobody else writes while the lock is held."""
    for place in (folder, *folder.glob("scores-*")):
        remove_leftovers(place)


def _part(folder: Path, about: Mapping[str, Any]) -> Path:
    return folder / str(about["scores"]) / f"part-{about['revision']:08d}.parquet"


def read_scores(workspace: Workspace, name: str) -> pl.DataFrame:
    """Return every score that a stream has given, by series and time; the columns of ``Stream.update``.

    Raises:
        BackendError: there is no such stream, or a part of its scores is missing or damaged.
        ArtifactError: its state is damaged.
    """
    folder = workspace.root / FOLDER / name
    if Path(name).name != name or not (folder / STATE).is_file():
        known = sorted(place.parent.name for place in (workspace.root / FOLDER).glob(f"*/{STATE}"))
        raise BackendError(f"no stream '{name}' (known: {listing(known) or 'none'})")
    about = load_tensor_file(folder / STATE)[1]["about"]
    last = _part(folder, about)
    parts = [place for place in sorted(last.parent.glob("part-*.parquet")) if place.name <= last.name]
    written = about.get("parts", 0)  # earlier versions did not count them
    if len(parts) < written:
        raise BackendError(
            f"{written - len(parts)} of {written} parts of the scores of stream '{name}' are missing; restore a copy "
            f"of {last.parent}, or begin the stream anew with reset=true"
        )
    if not parts:
        return pl.DataFrame(schema=dict.fromkeys(SCORE_COLUMNS, pl.Null))
    try:
        return pl.concat([pl.read_parquet(place) for place in parts]).sort("series_id", "time", maintain_order=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BackendError(
            f"scores of stream '{name}' are damaged ({error}); restore a copy of {last.parent}"
        ) from error
