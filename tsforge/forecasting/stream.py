"""Streaming: a small state a series that takes each new row once, scores it against what was expected, and forecasts.

Two ways to keep up. ``window`` (any model) keeps the last context rows and forecasts from them as batch prediction
does, so both agree to the last digit. ``carried`` (models that obey ``Recurrent``) steps the model's own state: time
and memory of a row depend neither on the context length nor on how long the stream has run; its forecasts equal those
of batch prediction right after warming up and from then on remember more than a window holds. ``restart_every`` warms
it up again from the kept rows every so many steps, which bounds the drift of normalisation frozen at the warm-up.

Intervals are those of the artifact, or go on learning from the rows that come (``online``, see ``stream_online``).

An update is all or nothing: it is computed beside the old state, which is replaced at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsforge.artifact import Artifact, load_tensor_file, match_frame, save_tensor_file
from tsforge.contracts.tables import Forecast, quantile_column
from tsforge.core.errors import ArtifactError, ConfigError, ModelError, listing
from tsforge.core.formats import check_version
from tsforge.core.logs import get_logger
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeLike
from tsforge.data.panel import Panel
from tsforge.forecasting import stream_carried
from tsforge.forecasting.conformal import needs_recent_errors, needs_windows
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.forecasting.predict import (
    artifact_panel,
    checked_levels,
    forecast_table,
    network_levels,
    offered_levels,
    published_quantiles,
    without_blind,
)
from tsforge.forecasting.recent_errors import rows_looked_back, rows_needed
from tsforge.forecasting.stream_buffer import Buffer
from tsforge.forecasting.stream_carried import Carried, Carrier, pick
from tsforge.forecasting.stream_online import FORMAT as ONLINE_FORMAT
from tsforge.forecasting.stream_online import Learner, OnlineIntervals
from tsforge.forecasting.stream_rows import Ints, NewRows, collect_rows, overlay_known
from tsforge.forecasting.stream_scores import asked_of_network, expectations, interval_levels, score_table
from tsforge.forecasting.window_forecasts import (
    FloatArray,
    WindowForecasts,
    concatenate,
    default_batch_size,
    evaluating,
    forecast_batch,
)

_LOG = get_logger(__name__)

Mode = Literal["auto", "carried", "window"]
FORMAT = "tsforge-stream"
FORMAT_VERSION = 3  # 2: online intervals; 3: rows before the context; files with neither are still written as 1
_STATE = "carried."
_ONLINE = "online."
Judge = Callable[[WindowForecasts, Ints, Ints], FloatArray]


@dataclass(eq=False)
class Stream:
    """The state of all series of a stream, plain tensors with series along the first axis.

    Made by ``Stream.start`` or ``Stream.load``. Not for several threads at once.

    Attributes:
        buffer: the last rows of every series.
        carried: state of a recurrent model, None in mode ``window``.
        restart_every: grid rows after which a carried state is warmed up again, None = never.
        about: plain facts of the owner, stored along.
        online: what the intervals have learned, None where they are those of the artifact.
    """

    buffer: Buffer
    carried: Carried | None = None
    restart_every: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    online: OnlineIntervals | None = None

    @classmethod
    def start(
        cls,
        artifact: Artifact,
        frame: SeriesFrame,
        *,
        mode: Mode = "auto",
        restart_every: int | None = None,
        cutoff: TimeLike | None = None,
        online: OnlineConfig | None = None,
        online_every: int = 1,
    ) -> Stream:
        """Return a stream that has seen the last ``context_length`` rows of every series of the frame.

        Args:
            artifact: what forecasts.
            frame: history, and known covariates of later rows where there are any.
            mode: ``auto`` carries the state of a recurrent model and keeps windows for any other; with ``online`` also
                for one that jumps over rows without values, and for any where intervals follow recent errors.
            restart_every: see the class; only for ``carried``.
            cutoff: last time that counts as seen; default each series' last row with an observed target.
            online, online_every: see ``set_online``; None keeps the intervals of the artifact.

        Raises:
            ArtifactError: the frame does not fit the artifact.
            DataError: too short a history, or nothing observed in it.
            ModelError: ``carried`` with a model that is not recurrent.
            ConfigError: ``restart_every`` below 1, or without a carried state; ``carried`` where intervals follow
                recent errors; see also ``set_online``.
        """
        network = artifact.network
        jumps = online is not None and stream_carried.takes_elapsed(network)
        jumps |= _kept_rows(artifact) is not None
        carry = network.model.recurrent and not jumps if mode == "auto" else mode == "carried"
        if carry:
            stream_carried.recurrent_model(network)
            if _kept_rows(artifact) is not None:
                raise ConfigError(
                    "intervals in units of recent errors (calibration.method=recent) rest on forecasts from windows of "
                    "earlier rows; start the stream with mode=window, or fit with another calibration.method"
                )
        stream = cls(buffer=Buffer.of_frame(artifact, frame, cutoff, _kept_rows(artifact)))
        stream._tell_short()
        if carry:
            with evaluating(network), torch.no_grad():
                stream.carried = stream_carried.warm_up(network, stream.buffer.contexts(stream.buffer.everyone))
        stream.set_restart(restart_every)
        if online is not None:
            stream.set_online(online, online_every)
        return stream

    def set_restart(self, restart_every: int | None) -> None:
        """Warm a carried state up again every so many rows from now on, None = never.

        Raises:
            ConfigError: below 1, or there is no carried state.
        """
        if restart_every is not None and restart_every < 1:
            raise ConfigError(f"restart_every is {restart_every}; it must be at least 1")
        if restart_every is not None and self.carried is None:
            raise ConfigError("restart_every is for mode 'carried'; mode 'window' starts afresh at every row")
        self.restart_every = restart_every

    def set_online(self, config: OnlineConfig, every: int = 1) -> None:
        """Let intervals learn from the rows that come from now on; what they learned before is forgotten.

        Args:
            config: how they learn.
            every: grid rows between forecasts that they learn from, counted on the artifact's grid.

        Raises:
            ConfigError: see ``OnlineIntervals.begin``; or the carried model jumps over rows without values.
        """
        if self.carried is not None and stream_carried.takes_elapsed(self.artifact.network):
            raise ConfigError(
                f"online intervals need a forecast at every row, and model '{self.artifact.model_name}' is carried in "
                "jumps over rows without values; start the stream with mode=window"
            )
        self.online = OnlineIntervals.begin(self.artifact, config, every)

    @property
    def artifact(self) -> Artifact:
        """What forecasts."""
        return self.buffer.artifact

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the series, by position."""
        return self.buffer.series

    @property
    def mode(self) -> Literal["carried", "window"]:
        """How it keeps up."""
        return "window" if self.carried is None else "carried"

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Quantile levels of the interval that new values are compared with, () where the artifact has none."""
        return interval_levels(self.artifact)

    def ends(self) -> pl.DataFrame:
        """Return ``series_id, time``: the last row that each series has taken."""
        return self.buffer.ends()

    def num_bytes(self) -> int:
        """Return the bytes of all tensors: the same however long the stream runs."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def update(
        self, rows: pl.DataFrame, *, known: pl.DataFrame | None = None, judged: pl.DataFrame | None = None
    ) -> pl.DataFrame:
        """Take new rows, any number of any series, and return how each observed value compares with its expectation.

        Rows must follow the last row of their series; grid rows between are taken as not observed. Nothing changes when
        anything is wrong.

        Args:
            rows: ``series_id, time`` and every column of the artifact's schema; null = not observed.
            known: ``series_id, time`` and the known covariates of rows after these, as far as they are known.
            judged: ``series_id, time`` and targets to score in place of those in ``rows``, for values that are masked
                for the model (outside a valid range) but must be judged all the same.

        Returns:
            ``series_id, time, variate, value, expected`` (forecast before the row was taken), ``low, high`` (interval
            at ``levels``), ``score`` (distance from ``expected`` in standard deviations of a normal law with
            that interval) and ``outside``; null where the artifact has no interval, and where nothing of the series was
            observed in the context before (but for a state carried series by series, which remembers more). With
            ``online`` the interval is adapted, and infinite (without a score) where it has to be.

        Raises:
            DataError: see ``collect_rows``; with ``online`` also known covariates missing over a horizon.
            ModelError: a forecast is not finite.
        """
        new = collect_rows(rows, self.buffer.place, known=known, judged=judged)
        levels = self.levels
        expected = np.full((len(new.judged), 3, new.judged.shape[1]), np.nan)
        learner = None
        if self.online is not None:
            learner = Learner(
                online=self.online.copy(),
                buffer=self.buffer,
                new=new,
                shown=levels,
                panel=self._panel(self.buffer, new),
            )
        carried = None
        with evaluating(self.artifact.network), torch.no_grad():
            if self.carried is None:
                self._expect(new, learner, expected)
            else:
                carried = self._carrier(new, learner).carry(self.carried, new, expected)
        online = None if learner is None else learner.finish()
        if self.carried is None or self.buffer.coupled:  # only a state of its own remembers more than a context
            expected[~self.buffer.seen_before(new)] = np.nan
        owner = new.owner
        times = self.buffer.last[owner] + 1 + new.done
        table = score_table(
            pl.Series(self.series, dtype=pl.String).gather(owner.numpy()),
            self.artifact.grid.time_at(times.numpy()),
            self.artifact.schema.targets,
            new.judged,
            expected,
            levels[1] - levels[0] if levels else 0.0,
        )
        self.buffer.take(new)
        self.carried, self.online = carried, online
        return table

    def _asked(self) -> tuple[float, ...]:
        """Return the levels to ask of the network for the intervals of the score table."""
        return asked_of_network(self.artifact, self.levels if self.online is None else self.online.levels)

    def _judging(self, new: NewRows, learner: Learner | None) -> tuple[NDArray[np.bool_], Judge]:
        """Return the new rows [N] to forecast before they are taken, and what makes bands of these forecasts."""
        if learner is not None:
            return learner.wanted, learner
        buffer, levels, owner = self.buffer, self.levels, new.owner.numpy()
        panel = self._panel(buffer, new) if levels else None

        def judge(found: WindowForecasts, rows: Ints, steps: Ints) -> FloatArray:
            return expectations(buffer.artifact, buffer.located(found, owner[rows]), levels, steps, panel)

        return np.asarray(~np.isnan(new.judged).all(axis=1)), judge

    def _panel(self, buffer: Buffer, new: NewRows | None = None) -> Panel | None:
        """Return the rows that intervals are looked up by, None where step and variate are enough."""
        table = self.artifact.calibration
        return buffer.panel(new) if table is not None and needs_windows(table) else None

    def _tell_short(self) -> None:
        """Warn of series whose history is too short for any forecast before the last row."""
        begins = self.buffer.begins
        if begins is None:
            return
        window, started = self.artifact.window, self.buffer.started
        short = started & (self.buffer.last + 1 - begins < rows_needed(window))
        if count := int(short.sum()):
            _LOG.warning(
                "%d of %d series have fewer than %d rows of history, so no recent errors are known; until then their "
                "intervals rest on the usual error of the held-out windows",
                count,
                int(started.sum()),
                rows_needed(window),
            )

    def _expect(self, new: NewRows, learner: Learner | None, result: FloatArray) -> None:
        """Put mean and interval [3, V] of every wanted row, from the window before it, into ``result`` [N, 3, V]."""
        network, levels = self.artifact.network, self._asked()
        owner, done = new.owner, new.done
        wanted, judge = self._judging(new, learner)
        chosen = torch.from_numpy(np.flatnonzero(wanted))
        chosen = chosen[torch.argsort(done[chosen], stable=True)]  # in the order of time within every series
        if self.buffer.coupled:  # one cutoff at a time, a window of every series
            parts = [chosen[done[chosen] == turn] for turn in np.unique(done[chosen].numpy())]
        else:
            parts = list(torch.split(chosen, default_batch_size(network))) if len(chosen) else []
        for rows in parts:
            who = self.buffer.everyone if self.buffer.coupled else owner[rows]
            batch = self.buffer.contexts(
                who, done[rows[:1]].expand(len(who)) if self.buffer.coupled else done[rows], new
            )
            found = forecast_batch(network, batch, levels)
            if self.buffer.coupled:
                found = pick(found, owner[rows].numpy())
            result[rows.numpy()] = judge(found, rows.numpy(), np.zeros(len(rows), dtype=np.int64))

    def _carrier(self, new: NewRows, learner: Learner | None) -> Carrier:
        wanted, judge = self._judging(new, learner)
        return Carrier(
            network=self.artifact.network,
            last=self.buffer.last,
            restart_every=self.restart_every,
            contexts=self.buffer.contexts,
            wanted=wanted,
            judge=judge,
            levels=self._asked(),
        )

    def forecast(
        self,
        quantile_levels: Sequence[float] | None = None,
        *,
        known: pl.DataFrame | None = None,
        series: Sequence[str] | None = None,
    ) -> Forecast:
        """Return the forecast of the H steps after the last row of every series; the state stays as it is.

        As in ``predict``, a model that couples series gives none for a series with nothing observed in its context; a
        warning says how many these are.

        Args:
            quantile_levels: default every level the artifact offers, as in ``predict``; () for none. With ``online``
                they are adapted by what is known now.
            known: ``series_id, time`` and known covariates of the steps, over what the stream was told before.
            series: only these; default all.

        Raises:
            DataError: unknown series, known covariates missing, or nothing observed in a context (mode ``window``; of a
                model that couples series in any mode, and in all contexts).
            ConfigError: levels that the artifact does not offer.
            ModelError: a forecast is not finite.
        """
        artifact, network = self.artifact, self.artifact.network
        levels = offered_levels(artifact) if quantile_levels is None else checked_levels(artifact, quantile_levels)
        chosen = self.buffer.chosen(series)
        if self.carried is None or self.buffer.coupled:
            self.buffer.check_sight(chosen)
        ahead = overlay_known(known, self.buffer.place)
        self.buffer.check_known(chosen, ahead)
        told = replace(self.buffer, ahead=ahead)
        parts = (
            [told.everyone] if told.coupled else list(torch.split(torch.tensor(chosen), default_batch_size(network)))
        )
        given = levels if self.online is None or not levels else self.online.levels
        if unknown := set(levels) - set(given):
            raise ConfigError(
                f"quantile level(s) {listing(sorted(unknown))} are not adapted online; choose among {listing(given)}"
            )
        asked = network_levels(artifact, given)
        with evaluating(network), torch.no_grad():
            found = concatenate([self._forecast(told, part, asked) for part in parts])
        places = found.series_index
        keep = without_blind(artifact, np.isin(places, chosen), self.buffer.seen()[places], places, self.series)
        quantiles = published_quantiles(artifact, told.located(found, places), given, self._panel(told))
        table = forecast_table(replace(found, quantiles=quantiles), told.names(), given, keep=keep)
        statuses = None
        if self.online is not None and given:
            table, statuses = self.online.adapted(table)
            table = table.drop(quantile_column(level) for level in given if level not in levels)
        metadata = {
            "model": artifact.model_name,
            "artifact_id": artifact.id,
            "freq": artifact.schema.freq,
            "horizon": artifact.window.horizon,
            "calibrated": artifact.calibration is not None and bool(levels),
            "rolled_from_step": None,
            "stream": self.mode,
            "online": statuses,
        }
        return Forecast(table=table, quantile_levels=levels, metadata=metadata)

    def blind(self) -> tuple[str, ...]:
        """Return the series that ``forecast`` refuses or leaves out: no observed target in the context.

        None of a model that is carried series by series: its state remembers what came before.
        """
        return () if self.carried is not None and not self.buffer.coupled else self.buffer.blind()

    def _forecast(self, buffer: Buffer, series: Tensor, levels: tuple[float, ...]) -> WindowForecasts:
        if self.carried is None:
            found = forecast_batch(self.artifact.network, buffer.contexts(series), levels)
        else:
            known = None if buffer.ahead is None else buffer.ahead[series]
            part, cutoff = self.carried.take(series), buffer.last[series] + 1
            found = stream_carried.forecast(self.artifact.network, part, known, levels, cutoff)
        return replace(found, series_index=series.numpy())

    def add(self, frame: SeriesFrame) -> tuple[str, ...]:
        """Take in series that are not in the stream yet and have enough history; return their names.

        Raises:
            ArtifactError: the frame does not fit the artifact.
            ModelError: the model couples series, so that none can come later.
        """
        if self.buffer.coupled:
            raise ModelError(f"model '{self.artifact.model_name}' couples series; start the stream anew to add some")
        names = [name for name in long_enough(self.artifact, frame) if name not in self.series]
        if not names:
            return ()
        other = Stream.start(self.artifact, frame.select_series(names), mode=self.mode)
        self.buffer, order = self.buffer.joined(other.buffer)
        if self.carried is not None and other.carried is not None:
            self.carried = self.carried.join(other.carried).take(torch.tensor(order))
        return tuple(names)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state by name, series along the first axis but for what the intervals have learned."""
        carried = {} if self.carried is None else self.carried.tensors()
        online = {} if self.online is None else self.online.tensors(self.series)
        return (
            self.buffer.tensors()
            | {_STATE + name: value for name, value in carried.items()}
            | {_ONLINE + name: value for name, value in online.items()}
        )

    def save(self, path: Path) -> None:
        """Write the state as one file, whole or not at all; an older one is replaced.

        Raises:
            BackendError: the disk is full or read-only; the older file stays.
        """
        facts = {
            "format": FORMAT,
            "format_version": 3 if self.buffer.begins is not None else 1 if self.online is None else 2,
            "artifact_id": self.artifact.id,
            "mode": self.mode,
            "restart_every": self.restart_every,
            "series": list(self.series),
            "about": self.about,
            **({} if self.online is None else {"online": self.online.facts()}),
        }
        save_tensor_file(path, self.tensors(), facts)

    @classmethod
    def load(cls, path: Path, artifact: Artifact) -> Stream:
        """Return the stream stored at ``path``; it goes on to the bit as if it had never been away.

        Raises:
            ArtifactError: missing, damaged, of a newer format, or the state of another artifact.
        """
        tensors, facts = load_tensor_file(path)
        if facts.get("format") != FORMAT:
            raise ArtifactError(f"{path} does not hold a stream")
        anew = "start the stream anew"
        check_version(facts.get("format_version"), FORMAT_VERSION, what=str(path), kind="stream format", remedy=anew)
        if "online" in facts:
            learned_as = facts["online"].get("format") if isinstance(facts["online"], dict) else None
            check_version(learned_as, ONLINE_FORMAT, what=str(path), kind="online format", remedy=anew)
        if facts["artifact_id"] != artifact.id:
            raise ArtifactError(
                f"{path} holds the stream of artifact {facts['artifact_id']}, not of {artifact.id}; a state fits only "
                "the weights that made it: name that artifact, or start the stream anew"
            )
        parts = {name: value for name, value in tensors.items() if not name.startswith((_STATE, _ONLINE))}
        state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
        learned = {name.removeprefix(_ONLINE): value for name, value in tensors.items() if name.startswith(_ONLINE)}
        online = None
        try:
            buffer = Buffer(artifact, tuple(facts["series"]), **parts)
            carried = Carried.of(state) if facts["mode"] == "carried" else None
            kept = _kept_rows(artifact)
            buffer.check(kept, begins=kept is not None)
            if carried is not None:
                stream_carried.check_state(artifact.network, carried, len(buffer.series))
            if "online" in facts:
                online = OnlineIntervals.of(artifact, buffer.series, learned, facts["online"])
        except (KeyError, TypeError, ModelError, ArtifactError) as error:
            raise ArtifactError(
                f"{path} does not fit artifact {artifact.id} ({error}); start the stream anew"
            ) from error
        return cls(buffer, carried, facts["restart_every"], dict(facts["about"]), online)


def _kept_rows(artifact: Artifact) -> int | None:
    """Return how many rows intervals need of each series, None where those of a context will do."""
    table = artifact.calibration
    return None if table is None or not needs_recent_errors(table) else rows_looked_back(artifact.window)


def long_enough(artifact: Artifact, frame: SeriesFrame, cutoff: TimeLike | None = None) -> list[str]:
    """Return the series that have a whole context up to their last observed target, or up to ``cutoff``.

    Raises:
        ArtifactError: the frame does not fit the artifact.
    """
    panel = artifact_panel(artifact, match_frame(artifact, frame))
    last = panel.last_observed() if cutoff is None else np.full(panel.num_series, artifact.grid.floor(cutoff))
    enough = (panel.lengths > 0) & (last - panel.offset + 1 >= artifact.window.context_length)
    return [name for name, is_long in zip(panel.series_ids, enough, strict=True) if is_long]
