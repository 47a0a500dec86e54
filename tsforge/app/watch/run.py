"""Watch: a detector kept running over new rows; every event is told once, whatever happens to the process.

A turn takes rows from the source, judges them, and commits detector, place in the source and transitions of events in
one transaction (``data.watch_state``). Sinks are fed from what is committed. A process that dies takes the turn again
from where the last commit left it: same rows, same detector, same transitions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from tsforge.anomaly.incidents import group_labels, ungrouped_notice
from tsforge.anomaly.online import OnlineDetector, OnlineResult
from tsforge.app.events import confirmed_spans
from tsforge.app.exclusive import alone
from tsforge.app.fitted_data import FittedData
from tsforge.app.forecast import LATEST, find_artifact
from tsforge.app.ingest import load_dataset, mask_invalid
from tsforge.app.watch.covariates import MissingCovariates, missing_cells
from tsforge.app.watch.delivery import Delivery
from tsforge.app.watch.files import Folder
from tsforge.app.watch.incidents import Grouping
from tsforge.app.watch.intake import Intake, Portion
from tsforge.app.watch.records import SHOWN, Tally, counts, lag, plain, shown
from tsforge.app.watch.screening import Bounds, Refusal
from tsforge.app.watch.settings import (
    DatasetSource,
    FolderSource,
    StdinSource,
    TableSource,
    WatchConfig,
)
from tsforge.app.watch.sources import Offer, Source, TablePoll
from tsforge.app.watch.status import FOLDER, STATE, describe
from tsforge.app.watch.stdin import Lines
from tsforge.app.watch.stopping import Stop
from tsforge.app.watch.stored import StoredRows
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.errors import BackendError, ConfigError, DataError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.config import TextMarks
from tsforge.data.event_store import EventStore
from tsforge.data.store import SeriesStore
from tsforge.data.watch_state import Snapshot, WatchState, now_text

_LOG = get_logger(__name__)
RETRY_SECONDS = (1.0, 60.0)  # first and longest wait after a database or disk failed
SIGN_OF_LIFE_SECONDS = 30.0  # the state says at least so often that the process looks
_GROUPS = "groups"  # of an identity: the group of every series that has one
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class WatchResult:
    """A watch when its run ended.

    Attributes:
        facts: what ``watch_status`` says. signal: what ended it, None where it ended by itself.
        undelivered: transitions that sinks did not take in time. refused: transitions that this run laid aside as dead
            letters, or sent again in vain.
    """

    facts: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    signal: int | None
    undelivered: int
    refused: int = 0

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        return self.facts

    def rows(self) -> list[dict[str, Any]]:
        """Return the newest transitions of this run."""
        return list(self.events)


def watch(
    config: WatchConfig,
    workspace: Workspace,
    *,
    once: bool = False,
    redeliver: bool = False,
    discard: Sequence[str] = (),
    tell: Tell | None = None,
) -> WatchResult:
    """Follow a source until a signal comes, its end is reached, or (with ``once``) nothing is left to read.

    Args:
        config: what to follow. workspace: whose store and artifacts.
        once: take what is there, deliver it, return.
        redeliver: send every dead letter once more first.
        discard: before that, remove the dead letters of these sinks.
        tell: gets a record of every turn that took rows, and of the end.

    Raises:
        ConfigError: a setting contradicts the artifact, the source, or what the watch was started with; a sink of
            ``discard`` has no dead letters.
        DataError: no such data set, folder or table; rows refused where the settings say so; too short a history.
        ArtifactError: no such artifact, or a damaged state.
        BackendError: another process is at work on the watch; with ``once``, a database or disk failed.
    """
    artifact, dataset = _subject(config, workspace)
    name = config.name or dataset
    folder = workspace.root / FOLDER / name
    with ExitStack() as stack:
        stack.enter_context(alone(folder, f"watch '{name}' is being run"))
        state = stack.enter_context(closing(WatchState(folder / STATE)))
        stop = stack.enter_context(Stop().listening())
        delivery = stack.enter_context(closing(Delivery(state, config.sinks, workspace, name)))
        watcher = Watcher(config, workspace, artifact, dataset, state, tell or (lambda record: None))
        stack.callback(watcher.close)
        delivery.begin()  # only now: a start that is refused changes nothing
        delivery.group(watcher.grouping)
        if discard:
            delivery.discard(discard)
        if redeliver:
            sent = delivery.revive(lambda: stop.signal is not None)
            log_event(_LOG, "dead letters delivered", watch=name, count=sent)
        undelivered = _run(watcher, delivery, stop, once=once)
        facts = watcher.status(state)
        watcher.tell({"watch": name, "ended": True, "signal": stop.signal, **counts(facts)})
        return WatchResult(
            facts=facts,
            events=tuple(watcher.recent),
            signal=stop.signal,
            undelivered=undelivered,
            refused=delivery.refused,
        )


def _run(watcher: Watcher, delivery: Delivery, stop: Stop, *, once: bool) -> int:
    """Take turns until the end; return how many transitions are left undelivered."""
    config = watcher.config
    failures = 0
    while stop.signal is None:
        try:
            if failures:
                watcher.resume()
            took = watcher.turn()
            moved = delivery.deliver()
            failures = 0
        except BackendError as error:
            if once or isinstance(config.source, StdinSource):  # lines that were read cannot be read again
                raise
            failures += 1
            wait = min(RETRY_SECONDS[0] * 2.0 ** min(failures - 1, 20), RETRY_SECONDS[1])
            _LOG.warning("%s; trying again in %.0f s", error, wait)
            stop.wait(wait)
            continue
        if took or moved:
            continue
        rest, due = watcher.source.rest(), delivery.due()
        if watcher.has_ended or (once and rest is None):
            break
        waits = [config.poll_seconds if rest is None else min(rest, config.poll_seconds), due]
        stop.wait(min(seconds for seconds in waits if seconds is not None), watcher.handle)
    return _drain(delivery, stop, config.drain_seconds if once or watcher.has_ended else 0.0, watcher.state)


def _drain(delivery: Delivery, stop: Stop, patience: float, state: WatchState) -> int:
    """Deliver what is left for so many seconds at most (at least what goes at once); return what stays."""
    until = time.monotonic() + patience
    while True:
        if delivery.deliver():
            continue
        due = delivery.due()
        if due is None or stop.signal is not None or time.monotonic() + due > until:
            break
        stop.wait(due)
    return max(state.depths().values(), default=0)


def _subject(config: WatchConfig, workspace: Workspace) -> tuple[Artifact, str]:
    """Return the artifact that the config names, and the data set of its history."""
    artifact = load_artifact(find_artifact(config.artifact, workspace))
    dataset = config.dataset or artifact.provenance.get("dataset")
    if not dataset:
        raise ConfigError(f"artifact {artifact.id} does not say which data set it belongs to; give dataset=NAME")
    return artifact, str(dataset)


class Watcher:
    """Detector and source of one watch, in step with its state.

    Args:
        config, workspace: see ``watch``.
        artifact: that the config names now; a running watch keeps its own.
        dataset: whose history calibrates.
        state: open, and locked by this process.
        tell: gets a record of every turn.
    """

    def __init__(
        self, config: WatchConfig, workspace: Workspace, artifact: Artifact, dataset: str, state: WatchState, tell: Tell
    ) -> None:
        self.config, self.workspace, self.dataset = config, workspace, dataset
        self.name = config.name or dataset
        self.state = state
        self.tell = tell
        self.recent: list[dict[str, Any]] = []
        self._refusals: list[Refusal] = []
        self._missing = MissingCovariates()
        self._source: Source | None = None
        self._looked = time.monotonic()
        self._events = EventStore(workspace.database_url)
        with closing(SeriesStore(workspace.database_url)) as store:
            stored = store.config(dataset)
        snapshot = state.snapshot()
        self.artifact = artifact if snapshot is None or config.reset else self._own_artifact(snapshot, artifact)
        self._newer = None if self.artifact.id == artifact.id else artifact.id
        self._intake = _intake(config, self.artifact, stored, dataset)
        if snapshot is None or config.reset:
            self._probe()
            detector, groups, notices = _start(config, workspace, artifact, dataset)
            facts = {**Tally.new().facts, "start_notices": list(notices)}
            snapshot = state.begin({**self._identity(artifact), _GROUPS: groups}, detector.to_bytes(), facts)
        self.grouping = self._grouping(snapshot)
        self._take_up(snapshot)

    def close(self) -> None:
        """Close source and event store."""
        if self._source is not None:
            self._source.close()
        self._events.close()

    @property
    def source(self) -> Source:
        """Where rows come from."""
        assert self._source is not None
        return self._source

    @property
    def has_ended(self) -> bool:
        """Whether the source can have no more rows, ever."""
        return isinstance(self._source, Lines) and self._source.has_ended and self._source.rest() is None

    @property
    def handle(self) -> int | None:
        """File descriptor whose rows need not be waited for in full polls."""
        return self._source.handle if isinstance(self._source, Lines) and not self._source.has_ended else None

    def resume(self) -> None:
        """Go back to what was committed last, after a failure."""
        snapshot = self.state.snapshot()
        assert snapshot is not None
        self._take_up(snapshot)

    def _take_up(self, snapshot: Snapshot) -> None:
        if self._source is not None and not isinstance(self._source, Lines):
            self._source.close()
            self._source = None
        self._refusals.clear()
        self._missing.clear()
        self._generation = snapshot.generation
        self._position = snapshot.position
        self._tally = Tally.of(snapshot.facts)
        self._detector = OnlineDetector.load(snapshot.detector, self.artifact)
        self._known = self._detector.ends()
        if self._source is None:
            self._source = self._open_source()

    def _probe(self) -> None:
        """Look whether the source is there before a watch is made of it."""
        source = self._open_source()
        try:
            if isinstance(source, TablePoll):
                source.check()
        finally:
            source.close()

    def _open_source(self) -> Source:
        match self.config.source:
            case FolderSource() as settings:
                return Folder(settings, self._intake, self.state.files())
            case TableSource() as settings:
                return TablePoll(settings, self._intake)
            case StdinSource() as settings:
                return Lines(settings, self._intake)
            case DatasetSource():
                return StoredRows(self.workspace, self.dataset, self._intake)

    def _identity(self, artifact: Artifact) -> dict[str, Any]:
        source = self.config.source
        where = {"table": source.table, "key": source.key} if isinstance(source, TableSource) else {}
        return {
            "artifact": artifact.id,
            "artifact_path": str(artifact.path or artifact.id),
            "dataset": self.dataset,
            "start": self.config.start,
            "detector": self.config.detector.model_dump(mode="json"),
            "confirmed": self.config.confirmed,
            "source": {"kind": source.kind, **where},
        }

    def _own_artifact(self, snapshot: Snapshot, named: Artifact) -> Artifact:
        """Return the artifact that the watch was started with, after the check that nothing else has changed.

        Raises:
            ConfigError: a setting that makes the detector what it is differs from the one it was started with.
        """
        before, now = snapshot.identity, self._identity(named)
        changed = list(_differences(before, now))
        moved = before["artifact"] != now["artifact"]
        if moved and self.config.artifact != LATEST and "@" not in self.config.artifact:
            changed.insert(0, f"artifact is {now['artifact']}, was {before['artifact']}")
        if changed:
            raise ConfigError(
                f"watch '{self.name}' was started with other settings ({listing(changed)}); go back to those, give "
                "another name, or start it anew from the stored data with reset=true"
            )
        if not moved:
            return named
        _LOG.warning(
            "watch '%s' goes on with artifact %s; %s is newer: take it over with reset=true",
            self.name,
            before["artifact"],
            now["artifact"],
        )
        path = Path(before["artifact_path"])
        return load_artifact(path if path.is_dir() else find_artifact(before["artifact"], self.workspace))

    def _grouping(self, snapshot: Snapshot) -> Grouping | None:
        """Return how events are grouped: by the labels that the series had when the watch was started."""
        events = self.config.detector.events
        if events.group_by is None:
            return None
        return Grouping(
            artifact=self.artifact.id,
            grid=self.artifact.grid,
            groups=snapshot.identity[_GROUPS],
            group_by=events.group_by,
            gap=events.group_gap,
        )

    # --- a turn ---

    def turn(self) -> bool:
        """Take the next rows of the source, judge and commit them; return whether there were any."""
        started = time.monotonic()
        offer = self.source.next(self._position, self._known, self.config.chunk_rows)
        is_told = self._note_source()
        if offer is None:
            if is_told or time.monotonic() - self._looked > SIGN_OF_LIFE_SECONDS:
                self._commit(Offer(portions=(), position=self._position, what=""), [], is_changed=False)
            return False
        before = dict(self._tally.facts)
        results: list[OnlineResult] = []
        for portion in offer.portions:
            try:
                results += self._judge(portion, offer.divisible)
            except DataError as error:
                offer = self.source.refuse(offer)
                self._refuse(Refusal(offer.what, str(error), offer.rows_left))
        for refusal in offer.refusals:
            self._refuse(refusal)
        transitions = self._transitions(results)
        self._commit(offer, transitions, is_changed=bool(results))
        self._report(before, transitions, time.monotonic() - started)
        return True

    def _judge(self, portion: Portion, divisible: bool) -> list[OnlineResult]:
        """Return what the detector makes of a portion; rows that spoil it are set apart where that is allowed."""
        found: list[OnlineResult] = []
        try:
            new = self._intake.split(portion, self._known)
            missing = missing_cells(new.blank, self._detector.recent.buffer.place)
            if new.rows.height:
                found.append(self._detector.update(new.rows, judged=new.judged, known=new.known))
        except DataError as error:
            if not divisible:
                raise
            return self._divide(portion, error)
        if found:
            self._known = self._detector.ends()
            last = plain(new.rows["time"].max())
            self._tally.facts["last_row"] = max(last, self._tally.facts["last_row"] or last)
        self._tally.add(
            rows_read=portion.rows_read,
            rows_taken=new.taken,
            rows_ahead=new.ahead,
            rows_refused=portion.refused,
            rows_empty=portion.empty,
            late=portion.late + new.late,
        )
        self._tally.merge("strangers", new.strangers)
        self._tally.merge("notes", portion.notes)
        self._tally.merge("notes", self._missing.add(missing))
        return found

    def _divide(self, portion: Portion, error: DataError) -> list[OnlineResult]:
        """Judge halves of a portion, to tell the rows that the detector refuses from the others."""
        height = portion.table.height
        if height == 1:
            row = portion.table.row(0, named=True)
            counts_apart = replace(portion, table=portion.table.clear(), rows_read=portion.rows_read - 1)
            self._refuse(Refusal(f"a row of '{row['series_id']}' at {row['time']}", str(error), 1))
            return self._judge(counts_apart, divisible=True)
        half = height // 2
        parts = [
            replace(portion, table=portion.table.head(half), rows_read=portion.rows_read - (height - half)),
            Portion(table=portion.table.slice(half), rows_read=height - half, ahead=portion.ahead),
        ]
        return [result for part in parts for result in self._judge(part, divisible=True)]

    def _refuse(self, refusal: Refusal) -> None:
        _LOG.warning("refused %s: %s", refusal.what, refusal.reason)
        self._tally.add(refused=1, rows_read=refusal.rows, rows_refused=refusal.rows)
        self._refusals.append(refusal)

    def _note_source(self) -> bool:
        """Tell what is wrong with the source itself, once; return whether that has changed."""
        said, before = list(self.source.notices()), self._tally.facts["source_notices"]
        if said == before:
            return False
        for notice in said:
            if notice not in before:
                _LOG.warning("%s", notice)
        self._tally.facts["source_notices"] = said
        self.tell({"watch": self.name, "notices": said})
        return True

    def _transitions(self, results: list[OnlineResult]) -> list[tuple[str, str, dict[str, Any]]]:
        """Return id, name and record of every transition, openings first; those of silenced events are marked.

        An open event that no rule covers any more, since it has outlasted a window, has surfaced.
        """
        found: list[tuple[str, str, dict[str, Any]]] = []
        opened = self._tally.facts["open"]
        for result in results:
            hidden = [event_id for event_id, rule in opened.items() if rule is not None]
            changed = result.changed.filter(pl.col("event_id").is_in(hidden)) if hidden else result.changed.clear()
            for name, table in (("opened", result.opened), ("surfaced", changed), ("closed", result.closed)):
                if not table.height:
                    continue
                silenced = self._events.silenced(self.dataset, table)
                for row in table.sort("end" if name == "closed" else "start").iter_rows(named=True):
                    event_id = row["event_id"]
                    if name == "surfaced" and event_id in silenced:
                        continue
                    rule = self._silence(name, event_id, silenced.get(event_id))
                    found.append((event_id, name, self._record(name, row, rule)))
            self._tally.facts["notices"] = [str(notice) for notice in result.health]
        return found

    def _silence(self, transition: str, event_id: str, rule: int | None) -> int | None:
        """Return the rule that silences a transition: an event whose opening was told is told to be over too."""
        opened = self._tally.facts["open"]
        if transition != "closed":
            opened[event_id] = rule
            return rule
        was = opened.pop(event_id, None)
        return rule if was is not None else None

    def _record(self, transition: str, row: dict[str, Any], rule: int | None) -> dict[str, Any]:
        record = {
            "watch": self.name,
            "generation": self._generation,
            "transition": transition,
            "dataset": self.dataset,
            "artifact": self.artifact.id,
            "emitted_at": now_text(),
            "suppressed_by": rule,
            **{name: plain(value) for name, value in row.items()},
        }
        told = {transition: 1} if transition in self._tally.facts else {}
        self._tally.add(**told, suppressed=int(rule is not None))
        self._tally.facts["last_event"] = {
            name: record[name] for name in ("transition", "event_id", "series_id", "start", "end", "peak_score")
        }
        return record

    def _commit(self, offer: Offer, transitions: list[tuple[str, str, dict[str, Any]]], *, is_changed: bool) -> None:
        self._tally.facts["waiting"] = self.source.waiting()
        self.state.commit(
            generation=self._generation,
            position=offer.position,
            facts=self._tally.facts,
            detector=self._detector.to_bytes() if is_changed else None,
            transitions=transitions,
            files=offer.files,
            forgotten=offer.forgotten,
            refusals=[(refusal.what, refusal.reason) for refusal in self._refusals],
        )
        self._refusals.clear()
        self._position = offer.position
        self._looked = time.monotonic()
        if isinstance(self._source, Folder):
            self._source.settle(offer)

    def _report(
        self, before: dict[str, Any], transitions: list[tuple[str, str, dict[str, Any]]], seconds: float
    ) -> None:
        facts = self._tally.facts
        names = ("rows_read", "rows_taken", "late", "refused", "rows_refused", "opened", "closed")
        turn = {name: facts[name] - before[name] for name in names}
        fresh = {name: count - before["strangers"].get(name, 0) for name, count in facts["strangers"].items()}
        unknown = {name: count for name, count in fresh.items() if count}
        if unknown:
            _LOG.warning(
                "%s rows of %s series that the detector does not know were left out (%s); start the watch anew to take "
                "them in",
                sum(unknown.values()),
                len(unknown),
                listing(unknown),
            )
        for notice in set(facts["notices"]) - set(before["notices"]):
            _LOG.warning("%s", notice)
        self._missing.tell(turn["rows_taken"])
        if not any(turn.values()):  # only the place in the source has changed
            return
        lines = [{"transition": name, **shown(record)} for _, name, record in transitions]
        self.recent = [*self.recent, *lines][-SHOWN:]
        log_event(_LOG, "rows taken", watch=self.name, seconds=round(seconds, 3), **turn)
        self.tell({"watch": self.name, "seconds": round(seconds, 4), **turn, **lag(facts), "events": lines})

    def status(self, state: WatchState) -> dict[str, Any]:
        """Return what ``watch_status`` says of this watch."""
        return {**describe(self.name, state, running=None), "newer_artifact": self._newer}


def _start(
    config: WatchConfig, workspace: Workspace, artifact: Artifact, dataset: str
) -> tuple[OnlineDetector, dict[str, str], tuple[str, ...]]:
    """Return a detector calibrated on the stored rows before ``start``, the groups of series, and notices."""
    fitted = FittedData.of(artifact, dataset)
    raw = load_dataset(workspace, fitted, extend=artifact.window.horizon)  # the first forecasts look into new rows
    if not raw.last_observed()["time"].drop_nulls().len():
        raise DataError(f"data set '{dataset}' holds no observed row to calibrate on; ingest its history first")
    group_by = config.detector.events.group_by
    groups = group_labels(raw.series_ids, raw.static, group_by)
    detector = OnlineDetector.start(
        artifact,
        mask_invalid(raw, fitted, workspace),
        config.detector,
        start=config.start,
        values=raw,
        confirmed=confirmed_spans(workspace, dataset) if config.confirmed else None,
    )
    notices = (*detector.notices, *ungrouped_notice(detector.series, groups, group_by))
    for notice in notices:
        _LOG.warning("%s", notice)
    return detector, groups, notices


def _intake(config: WatchConfig, artifact: Artifact, stored: Mapping[str, Any], dataset: str) -> Intake:
    source = config.source
    rows = None if isinstance(source, DatasetSource) else source.rows
    marks = source.csv if isinstance(source, FolderSource | StdinSource) else TextMarks()
    settings = FittedData.of(artifact, dataset).settings(stored)
    bounds = Bounds(max_gap=config.max_gap, max_ahead_seconds=config.max_ahead_seconds)
    return Intake(artifact, settings, rows, marks, dataset, bounds=bounds)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield what differs between two identities, apart from the artifact and what follows from the data."""
    for key in dict.fromkeys([*before, *now]):
        if not path and key in ("artifact", "artifact_path", _GROUPS):
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{path}{key}.")
        elif json.dumps(old) != json.dumps(new):
            yield f"{path}{key} is {new}, was {old}"
