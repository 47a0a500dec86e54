"""Online intervals of a recurring batch: state handed from one published folder to the next.

A batch at T starts from the state published with the newest earlier batch of the job, judges the intervals that wait in
it by what is known at T, adapts its own, and publishes forecasts and state in one rename. A killed run leaves the older
state alone, so nothing is lost or counted twice; a repeated T starts from the same earlier state.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import polars as pl

from tsforge.app import published
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.core.formats import check_version
from tsforge.core.logs import get_logger
from tsforge.core.workspace import Workspace
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.online_conformal import FORMAT, OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig, stored_settings

LOGGER = get_logger(__name__)
FACT = "online"
_STATE = {"cells": "online_cells", "pending": "online_pending"}


def adapt(
    forecast: pl.DataFrame, known: SeriesFrame, config: OnlineConfig, workspace: Workspace, job: str, as_of: datetime
) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    """Return the tables to publish and what the manifest says about them.

    Args:
        forecast: of this batch, with quantiles.
        known: what is known at ``as_of``, nothing later.
        config: how intervals learn.
        workspace, job, as_of: where the earlier state lies.

    Returns:
        ``forecast`` with adapted quantiles, ``online`` with those it had and the status of every interval, and the
        state (``online_cells``, ``online_pending``).

    Raises:
        DataError: the forecasts have no interval.
        ArtifactError: the earlier state was changed after it was published, is damaged or of a newer format.
    """
    columns = [name for name in forecast.columns if name.startswith("q")]
    if len(columns) < 2:
        raise DataError("forecast.online adapts intervals, but the forecasts hold none; calibrate the model")
    state, source = _earlier(config, workspace, job, as_of)
    targets = known.schema.targets
    actuals = known.table.filter(pl.col("time") <= as_of).unpivot(
        on=targets, index=["series_id", "time"], variable_name="variate", value_name="actual"
    )
    judged = state.update(actuals, as_of)
    adapted, status = state.issue(forecast)
    keys = ["series_id", "cutoff", "step", "time", "variate"]
    tables = {
        "forecast": adapted,
        "online": forecast.select(*keys, *columns).join(status, on=keys, maintain_order="left"),
        **{_STATE[name]: table for name, table in state.tables().items()},
    }
    facts = {
        "format": FORMAT,
        "settings": config.model_dump(mode="json"),
        "from": source,
        "judged": judged,
        "waiting": 0 if state.pending is None else state.pending.height,
        **state.tally,
    }
    return tables, facts


def _same_settings(stored: object, config: OnlineConfig) -> bool:
    try:
        return validate(OnlineConfig, stored_settings(stored)) == config
    except ConfigError:  # of a version with other settings
        return False


def _earlier(
    config: OnlineConfig, workspace: Workspace, job: str, as_of: datetime
) -> tuple[OnlineConformal, str | None]:
    """Return the state to go on from, and the batch it was published with; a fresh one when there is none."""
    partition = published.newest_before(workspace, job, as_of, FACT)
    if partition is None:
        return OnlineConformal(config), None
    facts = partition.manifest[FACT]
    about = facts if isinstance(facts, dict) else {}
    what, remedy = f"the online state of the batch in {partition.path}", "publish that batch again with --force"
    check_version(about.get("format"), FORMAT, what=what, kind="online format", remedy=remedy)
    if not _same_settings(about.get("settings"), config):
        LOGGER.warning(
            "the online intervals of %s start anew: the batch of %s was made with other settings",
            job,
            partition.as_of.isoformat(),
        )
        return OnlineConformal(config), None
    files = [f"{name}.parquet" for name in _STATE.values()]
    published.verify_partition(partition, files)
    tables = {name: pl.read_parquet(partition.path / f"{file}.parquet") for name, file in _STATE.items()}
    return OnlineConformal.from_tables(config, tables), partition.as_of.isoformat()
