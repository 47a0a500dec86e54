"""Retraining: fit a challenger on newer data, compare it with the champion on the weeks after it, promote if better.

The comparison is made as the batches are: at each of several past moments both models forecast from what was known
then, and both are graded on the same observed cells. The challenger never sees those weeks; a champion that has (it was
fitted later than they began) would be judged too kindly, so the comparison is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from tsforge.app.batch import BatchBusy, BatchInterrupted, changed_settings, data_seen_until, parse_as_of
from tsforge.app.fit import FitConfig, fit
from tsforge.app.fitted_data import FittedData
from tsforge.app.ingest import IngestConfig, ingest, load_history
from tsforge.artifact import Artifact, load_artifact, match_frame
from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, listing
from tsforge.core.logs import get_logger, log_event
from tsforge.core.signals import interrupts_held
from tsforge.core.workspace import Workspace
from tsforge.data.config import DataConfig
from tsforge.data.durations import Span, before
from tsforge.data.frame import SeriesFrame
from tsforge.data.splits import SplitConfig
from tsforge.data.vintages import Delays, History, VintageFrame, newest, published_by, seen_from
from tsforge.forecasting.predict import predict
from tsforge.metrics.significance import diebold_mariano
from tsforge.scheduling.ledger import Claim, Ledger
from tsforge.tracking.registry import CHAMPION, has_alias, promote, resolve

LOGGER = get_logger(__name__)
_SETTINGS = "settings"  # key of the ledger's details, beside the facts
_REASON = "reason"  # key of the note that goes before a promotion, beside the details


class CompareConfig(Config):
    """How champion and challenger are compared, and what the challenger must achieve."""

    span: Span = "28d"
    """The last so much before ``as_of``; kept from the challenger."""
    cutoffs: int = Field(28, ge=4)
    """Moments in the span from which both forecast, evenly spread."""
    margin: float = Field(0.01, ge=0, lt=1)
    """Share by which the challenger's error must be lower."""
    max_p_value: float = Field(0.1, gt=0, le=1)
    """Largest p-value of the difference (Diebold-Mariano over the cutoffs) at which it is promoted; 1 = no test."""


class RetrainConfig(Config):
    """A recurring retraining.

    Attributes:
        name: of the job in the ledger.
        fit: the challenger; ``fit.tracking.register_as`` names the registered model both belong to.
        ingest: read the source first.
        compare: the contest.
        promote: ``auto`` gives the challenger the alias ``champion`` when it wins (or when there is none yet);
            ``never`` only registers it as ``challenger`` and reports.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$")
    fit: FitConfig
    ingest: bool = True
    compare: CompareConfig = CompareConfig()
    promote: Literal["auto", "never"] = "auto"

    @model_validator(mode="after")
    def _is_registered(self) -> RetrainConfig:
        if self.fit.tracking.register_as is None or not self.fit.tracking.enabled:
            raise ValueError("fit.tracking.register_as must name the registered model that is retrained")
        if self.fit.tracking.alias != "challenger":
            raise ValueError("fit.tracking.alias must be 'challenger'; the comparison decides about 'champion'")
        return self

    @property
    def key(self) -> str:
        """The job's name in the ledger."""
        return f"retrain/{self.name}"

    @property
    def registered(self) -> str:
        """Name of the registered model."""
        return str(self.fit.tracking.register_as)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two models on the same cells.

    Attributes:
        champion_error, challenger_error: mean absolute error, each variate in units of its standard deviation.
        improvement: share by which the challenger's error is lower (negative = higher).
        p_value: that the difference is chance; NaN when it cannot be said.
        cutoffs, cells: how much was compared.
    """

    champion_error: float
    challenger_error: float
    improvement: float
    p_value: float
    cutoffs: int
    cells: int

    def is_won(self, config: CompareConfig) -> bool:
        """Return whether the challenger is better by enough, and surely enough."""
        if self.improvement <= 0 or self.improvement < config.margin:
            return False
        return config.max_p_value >= 1 or self.p_value <= config.max_p_value


@dataclass(frozen=True, kw_only=True)
class RetrainResult:
    """What a retraining came to.

    Attributes:
        status: ``done`` now, ``adopted`` (a killed run had promoted its challenger, the ledger now knows) or
            ``unchanged`` when this as_of had been done before.
        as_of: where it stood.
        promoted: whether the challenger is the champion now.
        reason: why, in words.
        facts: artifact ids and the figures of the contest.
        other_settings: those of the job that differ from the ones it was done with; None where it was done now, or
            where the ledger does not say with which.
    """

    status: Literal["done", "adopted", "unchanged"]
    as_of: datetime
    promoted: bool
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)
    other_settings: tuple[str, ...] | None = None

    def summary(self) -> dict[str, Any]:
        """Return what a person wants to know first."""
        return {
            "status": self.status,
            "as_of": self.as_of.isoformat(),
            "promoted": self.promoted,
            "reason": self.reason,
            **self.facts,
            **({} if self.other_settings is None else {"other_settings": list(self.other_settings)}),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return no table."""
        return []


def retrain(config: RetrainConfig, as_of: datetime, workspace: Workspace) -> RetrainResult:
    """Fit and register a challenger for ``as_of``, compare, promote if it wins; a second run does nothing.

    Raises:
        BatchBusy: another living process retrains the same.
        BatchInterrupted: Ctrl-C or SIGTERM came while it was being promoted; it is done and recorded.
        ArtifactError: there is a champion, but it cannot be read.
        DataError: too little data after the challenger's training to compare.
        TsforgeError: of the fit, the registry or the store; the champion stays what it was.
    """
    as_of = parse_as_of(as_of)
    ledger = Ledger(workspace.database_url)
    try:
        claim = ledger.claim(config.key, as_of)
        if claim is None:
            run = ledger.find(config.key, as_of)
            if run is not None and run.status == "done":
                return _kept("unchanged", run.details, run.message, config, as_of)
            raise BatchBusy(f"another process retrains {config.name} as of {as_of.isoformat()}; ask again later")
        with ledger.keep_alive(claim):
            return _claimed(ledger, claim, config, as_of, workspace)
    finally:
        ledger.close()


def _kept(
    status: Literal["adopted", "unchanged"],
    details: Mapping[str, Any],
    reason: str,
    config: RetrainConfig,
    as_of: datetime,
) -> RetrainResult:
    """Return what was done before; told where the job has other settings now."""
    facts = dict(details)
    stored = facts.pop(_SETTINGS, None)  # rows of older versions lack it: nothing is claimed about them
    changed = None if stored is None else tuple(changed_settings(stored, config.model_dump(mode="json")))
    if changed:
        LOGGER.warning(
            "the retraining of %s as of %s stays as it was done, with other settings than now (%s); another as-of, or "
            "another name of the job, retrains with these",
            config.name,
            as_of.isoformat(),
            listing(changed),
        )
    return RetrainResult(
        status=status,
        as_of=as_of,
        promoted=bool(facts.pop("promoted", False)),
        reason=reason,
        facts=facts,
        other_settings=changed,
    )


def _claimed(
    ledger: Ledger, claim: Claim, config: RetrainConfig, as_of: datetime, workspace: Workspace
) -> RetrainResult:
    with ledger.on_record(claim):
        details = _promoted_before(claim, config, workspace)
        if details is not None:
            reason = str(details.pop(_REASON))
            result = _kept("adopted", details, reason, config, as_of)
        else:
            result = _retrain(config, as_of, workspace)
            details = {**result.facts, "promoted": result.promoted, _SETTINGS: config.model_dump(mode="json")}
        with interrupts_held() as came:  # who is promoted is recorded as promoted, and no message says otherwise
            if result.status == "done" and result.promoted:
                ledger.note(claim, {**details, _REASON: result.reason})
                promote(config.registered, result.facts["challenger"], workspace)
            ledger.finish(claim, message=result.reason, details=details)
    log_event(LOGGER, "retrained", job=config.name, promoted=result.promoted, reason=result.reason)
    if came:
        raise BatchInterrupted(
            f"interrupted when {config.name} as of {as_of.isoformat()} was being recorded: that retraining is complete "
            f"({result.reason}); the same command shows it again"
        )
    return result


def _promoted_before(claim: Claim, config: RetrainConfig, workspace: Workspace) -> dict[str, Any] | None:
    """Return what an earlier attempt wrote down if it came to promote its challenger but not to record that."""
    if not claim.note:
        return None
    champion = _champion(config, workspace)
    return dict(claim.note) if champion is not None and champion.id == claim.note.get("challenger") else None


def _retrain(config: RetrainConfig, as_of: datetime, workspace: Workspace) -> RetrainResult:
    """Fit and compare; return what is to become of the challenger, which is not promoted yet."""
    if config.ingest:
        ingest(IngestConfig(data=config.fit.data), workspace)
    history = _known_at(config.fit.data, as_of, workspace)
    start = before(as_of, config.compare.span)
    frame = newest(history)
    # what was revised during the contest is not for the challenger's training
    training = history.frozen(start) if isinstance(history, VintageFrame) else None
    champion = _champion(config, workspace)
    seen_by_champion = history
    if champion is not None:
        seen_by_champion = _as_champion_reads(champion, config.fit.data, history, as_of, workspace)
        match_frame(champion, newest(seen_by_champion))
        seen = data_seen_until(champion)
        if seen is not None and seen > start:
            raise DataError(
                f"champion {champion.id} was fitted on data up to {seen.isoformat()}, into the span of the "
                f"comparison (from {start.isoformat()}); retrain later, or shorten compare.span"
            )
    fitted = fit(_before_contest(config.fit, frame, start, as_of), workspace, history=training)
    facts: dict[str, Any] = {"challenger": fitted.artifact.id, "version": fitted.version}
    if champion is None:
        promoted = config.promote == "auto"
        reason = "there was no champion to beat"
    else:
        contest = compare(champion, fitted.artifact, history, start, as_of, config.compare, seen_by_champion)
        facts |= {"champion": champion.id, **vars(contest)}
        won = contest.is_won(config.compare)
        promoted = won and config.promote == "auto"
        reason = (
            f"error {contest.challenger_error:.4g} against {contest.champion_error:.4g} of the champion "
            f"({contest.improvement:+.1%}, p = {contest.p_value:.2g}, {contest.cutoffs} cutoffs): "
            + ("better" if won else "not better by enough")
        )
    return RetrainResult(status="done", as_of=as_of, promoted=promoted, reason=reason, facts=facts)


def _known_at(data: DataConfig, as_of: datetime, workspace: Workspace) -> History:
    """Return the stored data as the config says, masked, up to what was out at ``as_of``."""
    history = load_history(workspace, data, masked=True)
    delays = Delays.of(data.publication_delay, history.schema, history.grid, strict=False)
    return published_by(history, as_of, delays)


def _as_champion_reads(
    champion: Artifact, data: DataConfig, history: History, as_of: datetime, workspace: Workspace
) -> History:
    """Return ``history`` with the champion's own calendar and valid ranges, which need not be the challenger's."""
    own = FittedData.of(champion, data.name).applied_to(data)
    return history if own == data else _known_at(own, as_of, workspace)


def _before_contest(config: FitConfig, frame: SeriesFrame, start: datetime, as_of: datetime) -> FitConfig:
    """Return the fit with its training and validation before ``start`` and the span of the contest as its test part."""
    split = config.split
    if split.kind != "fractions":
        raise ConfigError("fit.split.kind must be 'fractions': a retraining moves its spans with as_of")
    times = frame.until(start).table["time"].unique().sort()
    cut = int(times.len() * split.train / (split.train + split.valid)) if split.valid else times.len()
    if not 0 < cut <= times.len():
        raise DataError(f"{times.len()} rows before {start.isoformat()} are too few to train on")
    ends = (times[cut - 1].isoformat(), times[-1].isoformat(), as_of.isoformat())
    return config.model_copy(update={"split": SplitConfig(kind="times", ends=ends)})


def _champion(config: RetrainConfig, workspace: Workspace) -> Artifact | None:
    """Return the champion, None when the alias does not exist yet; one that cannot be read is an error, not absent."""
    if not has_alias(config.registered, CHAMPION, workspace):
        log_event(LOGGER, "no champion yet", model=config.registered)
        return None
    return load_artifact(resolve(f"{config.registered}@{CHAMPION}", workspace))


def compare(
    champion: Artifact,
    challenger: Artifact,
    history: History,
    start: datetime,
    stop: datetime,
    config: CompareConfig,
    seen_by_champion: History | None = None,
) -> Contest:
    """Return how both models fared from the same moments between ``start`` and ``stop``, on the same observed cells.

    Args:
        champion, challenger: both fitted on rows before ``start``.
        history: data up to ``stop``; of all publications each moment sees those it had, the last ones are the truth.
        start, stop: the span of the contest.
        config: number of cutoffs.
        seen_by_champion: the same data as the champion reads it (its calendar and valid ranges); default ``history``.

    Raises:
        DataError: fewer than four moments whose whole forecast lies in the span.
    """
    horizon = min(champion.window.horizon, challenger.window.horizon)
    frame = newest(history)
    times = frame.between(start, stop).table["time"].unique().sort().to_list()
    usable = times[: len(times) - horizon]
    chosen = sorted({round(place) for place in np.linspace(0, len(usable) - 1, config.cutoffs)}) if usable else []
    if len(chosen) < 4:
        raise DataError(
            f"only {len(chosen)} moments between {start.isoformat()} and {stop.isoformat()} have {horizon} rows after "
            "them; lengthen compare.span"
        )
    scales = frame.until(start).table.select(pl.col(frame.schema.targets).std()).row(0, named=True)
    truth = frame.table.unpivot(
        on=frame.schema.targets, index=["series_id", "time"], variable_name="variate", value_name="truth"
    ).drop_nulls()
    losses, cells = [], 0
    for place in chosen:
        theirs, ours = (
            seen_from(known, usable[place])
            for known in (history if seen_by_champion is None else seen_by_champion, history)
        )
        table = _forecasts({"champion": (champion, theirs), "challenger": (challenger, ours)}, usable[place], horizon)
        table = table.join(truth, on=["series_id", "time", "variate"])
        scale = pl.col("variate").replace_strict(scales, return_dtype=pl.Float64)
        scored = table.filter(scale > 0).select(
            (pl.col(name) - pl.col("truth")).abs() / scale for name in ("champion", "challenger")
        )
        cells += scored.height
        if scored.height:
            losses.append((scored["champion"].mean(), scored["challenger"].mean()))
    if len(losses) < 4:
        raise DataError(
            f"only {len(losses)} of {len(chosen)} moments have observed targets after them; too few to compare"
        )
    pairs = np.asarray(losses, dtype=np.float64)
    old, new = pairs.mean(axis=0).tolist()
    step = max(1, chosen[1] - chosen[0])
    overlap = max(1, -(-horizon // step))  # forecasts from neighbouring moments share rows
    p_value = diebold_mariano(pairs[:, 0], pairs[:, 1], horizon=min(overlap, len(pairs) - 1)).p_value
    return Contest(
        champion_error=old,
        challenger_error=new,
        improvement=1 - new / old if old > 0 else 0.0,
        p_value=p_value,
        cutoffs=len(losses),
        cells=cells,
    )


def _forecasts(models: Mapping[str, tuple[Artifact, SeriesFrame]], cutoff: datetime, horizon: int) -> pl.DataFrame:
    """Return both forecasts from one moment side by side, each model's in a column of its name."""
    tables = [
        predict(artifact, frame, cutoff=cutoff.astimezone(UTC), horizon=horizon, quantile_levels=())
        .table.select("series_id", "time", "variate", "mean")
        .rename({"mean": name})
        for name, (artifact, frame) in models.items()
    ]
    return tables[0].join(tables[1], on=["series_id", "time", "variate"])
