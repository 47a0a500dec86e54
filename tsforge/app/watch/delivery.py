"""From the outbox to the sinks: each has its own pace, order and patience; what nobody takes becomes a dead letter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tsforge.app.watch.incidents import Grouping
from tsforge.app.watch.settings import JsonlSink, StoreSink, TableSink, WebhookSink
from tsforge.app.watch.sinks import Sink, StoredEvents, open_sink
from tsforge.app.watch.webhook import DeliveryError
from tsforge.core.errors import ConfigError, listing, nearest
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.watch_state import Cursor, Outgoing, WatchState

_LOG = get_logger(__name__)
FAILURES_IN_A_ROW = 3  # after which the other dead letters of a sink are not tried


@dataclass(frozen=True)
class Patience:
    """How a sink is tried again: wait doubles from ``first`` to ``longest`` seconds; ``tries`` None = for ever."""

    first: float = 1.0
    longest: float = 60.0
    tries: int | None = None
    skips_suppressed: bool = False

    @classmethod
    def of(cls, settings: JsonlSink | TableSink | StoreSink | WebhookSink) -> Patience:
        """Return the patience for a sink."""
        if isinstance(settings, WebhookSink):
            return cls(settings.backoff_seconds, settings.max_backoff_seconds, settings.tries, skips_suppressed=True)
        return cls()

    def wait(self, attempts: int, asked: float) -> float:
        """Return seconds to wait after so many failed tries, at least what the receiver asks for."""
        return max(min(self.first * 2.0 ** min(attempts - 1, 60), self.longest), asked)

    def wanted(self, items: Sequence[Outgoing]) -> list[Outgoing]:
        """Return the transitions that the sink is to get."""
        return [item for item in items if not (self.skips_suppressed and _is_suppressed(item))]


class Delivery:
    """Feeds sinks from the outbox of a watch.

    Args:
        state: of the watch.
        sinks: settings by name.
        workspace: whose event store. watch: its name.
        clock: seconds since 1970, for tests.

    Attributes:
        refused: transitions that became dead letters since it was made, or stayed so when they were sent again.

    Raises:
        ConfigError: a sink's environment variable is not set, or its address is malformed.
    """

    def __init__(
        self,
        state: WatchState,
        sinks: Mapping[str, JsonlSink | TableSink | StoreSink | WebhookSink],
        workspace: Workspace,
        watch: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state = state
        self._clock = clock
        self._stack = ExitStack()
        self._sinks: dict[str, tuple[Sink, Patience]] = {}
        self.refused = 0
        for name, settings in sinks.items():
            sink = open_sink(settings, workspace, watch)
            self._stack.callback(sink.close)
            self._sinks[name] = (sink, Patience.of(settings))

    def begin(self) -> None:
        """Make these the sinks of the watch; what a sink no longer named had still to get becomes its dead letters."""
        for name, count in self._state.enlist(self._sinks).items():
            _LOG.warning(
                "sink '%s' is no longer named and had still to get %s transitions, which are dead letters now: name it "
                "again and run with --redeliver to send them",
                name,
                count,
            )

    def discard(self, names: Sequence[str]) -> int:
        """Remove the dead letters of some sinks, named or not; return how many.

        Raises:
            ConfigError: a sink has none; nothing was removed.
        """
        known = sorted({letter["sink"] for letter in self._state.dead_letters()})
        for name in names:
            if name not in known:
                held = f"there are some of {listing(known)}" if known else "there are none at all"
                raise ConfigError(f"sink '{name}' has no dead letters{nearest(name, known)}; {held}")
        removed = {name: self._state.discard(name) for name in dict.fromkeys(names)}
        for name, count in removed.items():
            log_event(_LOG, "dead letters discarded", sink=name, count=count)
        return sum(removed.values())

    def close(self) -> None:
        """Close every sink."""
        self._stack.close()

    def group(self, grouping: Grouping | None) -> None:
        """Let the event store name incidents from now on."""
        for sink, _ in self._sinks.values():
            if isinstance(sink, StoredEvents):
                sink.grouping = grouping

    def deliver(self) -> int:
        """Send every sink that is due its next batch; return how many transitions went out or were laid aside."""
        moved = 0
        cursors, depths = self._state.cursors(), self._state.depths()
        for name, (sink, patience) in self._sinks.items():
            if depths[name] and cursors[name].next_try <= self._clock():
                moved += self._send(name, sink, patience, cursors[name])
        return moved

    def due(self) -> float | None:
        """Return seconds until a sink with something to get may be tried; None where nothing is left to deliver."""
        cursors, depths = self._state.cursors(), self._state.depths()
        waits = [cursors[name].next_try - self._clock() for name, depth in depths.items() if depth]
        return max(0.0, min(waits)) if waits else None

    def revive(self, is_over: Callable[[], bool] = lambda: False) -> int:
        """Try every dead letter of the present sinks once more; return how many went out.

        A sink that fails several times in a row is left alone: thousands of letters that each wait for an answer in
        vain would hold up the rows.

        Args:
            is_over: asked before every try; true ends it, and what is left stays as it is.
        """
        letters: dict[str, list[Outgoing]] = {}
        for letter in self._state.dead_letters():
            fields = ("seq", "generation", "event_id", "transition", "record")
            item = Outgoing(**{name: letter[name] for name in fields})
            letters.setdefault(letter["sink"], []).append(item)
        for name in [name for name in letters if name not in self._sinks]:
            items = letters.pop(name)
            _LOG.warning(
                "%s dead letters belong to sink '%s', which is not named: name it again to send them, or remove them "
                "with --discard %s",
                len(items),
                name,
                name,
            )
        return sum(self._revive(name, items, is_over) for name, items in letters.items())

    def _revive(self, name: str, items: Sequence[Outgoing], is_over: Callable[[], bool]) -> int:
        """Try the dead letters of one sink; those that it does not want any more are removed."""
        sink, patience = self._sinks[name]
        sent = failures = 0
        for at in range(0, len(items), sink.batch):
            if is_over():
                break
            part = items[at : at + sink.batch]
            seqs = [item.seq for item in part]
            wanted = patience.wanted(part)
            try:
                if wanted:
                    sink.send(wanted, 0)
            except DeliveryError as error:
                _LOG.warning("dead letters of sink '%s' stay (number %s): %s", name, listing(seqs), error)
                self._state.keep_dead(name, seqs, str(error))
                self.refused += len(part)
                failures += 1
                left = len(items) - at - len(part)
                if failures == FAILURES_IN_A_ROW and left:
                    _LOG.warning("sink '%s' failed %s times in a row: %s more stay untried", name, failures, left)
                    self.refused += left
                    break
                continue
            failures = 0
            self._state.revive(name, seqs, delivered=len(wanted))
            sent += len(wanted)
        return sent

    def _send(self, name: str, sink: Sink, patience: Patience, cursor: Cursor) -> int:
        items = self._state.pending(name, sink.batch)
        wanted = patience.wanted(items)
        try:
            mark = sink.send(wanted, cursor.mark) if wanted else cursor.mark
        except DeliveryError as error:
            return self._failed(name, items[0], patience, cursor.attempts + 1, error)
        self._state.acknowledge(name, items[-1].seq, mark=mark, delivered=len(wanted))
        return len(items)

    def _failed(self, name: str, item: Outgoing, patience: Patience, attempts: int, error: DeliveryError) -> int:
        if patience.tries is not None and attempts >= patience.tries:
            _LOG.warning("sink '%s' refused number %s %s times, laid aside: %s", name, item.seq, attempts, error)
            self._state.bury(name, item, str(error))
            self.refused += 1
            return 1
        wait = patience.wait(attempts, error.wait)
        log_event(
            _LOG, "delivery failed", sink=name, tries=attempts, next_try_seconds=round(wait, 1), reason=str(error)
        )
        self._state.postpone(name, attempts=attempts, next_try=self._clock() + wait, error=str(error))
        return 0


def _is_suppressed(item: Outgoing) -> bool:
    return json.loads(item.record).get("suppressed_by") is not None
