"""From the outbox to the sinks: each has its own pace, order and patience; what nobody takes becomes a dead letter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from tsforge.app.watch.incidents import Grouping
from tsforge.app.watch.settings import JsonlSink, StoreSink, TableSink, WebhookSink
from tsforge.app.watch.sinks import Sink, StoredEvents, open_sink
from tsforge.app.watch.webhook import DeliveryError
from tsforge.core.logs import get_logger, log_event
from tsforge.core.workspace import Workspace
from tsforge.data.watch_state import Cursor, Outgoing, WatchState

_LOG = get_logger(__name__)


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
        """Make these the sinks of the watch; what a sink no longer named had still to get is given up."""
        self._state.enlist(self._sinks)

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

    def revive(self) -> int:
        """Try every dead letter of the present sinks once more; return how many went out."""
        sent = 0
        for letter in self._state.dead_letters():
            if letter["sink"] not in self._sinks:
                continue
            fields = ("seq", "generation", "event_id", "transition", "record")
            item = Outgoing(**{name: letter[name] for name in fields})
            try:
                self._sinks[letter["sink"]][0].send([item], 0)
            except DeliveryError as error:
                _LOG.warning("dead letter %s of sink '%s' stays: %s", item.seq, letter["sink"], error)
                self.refused += 1
                continue
            self._state.revive(letter["sink"], item.seq)
            sent += 1
        return sent

    def _send(self, name: str, sink: Sink, patience: Patience, cursor: Cursor) -> int:
        items = self._state.pending(name, sink.batch)
        wanted = [item for item in items if not (patience.skips_suppressed and _is_suppressed(item))]
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
