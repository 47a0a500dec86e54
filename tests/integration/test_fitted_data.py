"""What was stated of the data at the fit holds in every command: its calendar, its valid ranges, its roles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tsforge.app.batch import BatchConfig, run_batch
from tsforge.app.catalog_live import live_forecast
from tsforge.app.detect import DetectJobConfig, detect
from tsforge.app.explain import ExplainConfig, explain
from tsforge.app.fit import FitConfig, fit
from tsforge.app.fitted_data import FittedData
from tsforge.app.forecast import PredictConfig, predict
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.app.retrain import RetrainConfig, retrain
from tsforge.app.stream import StreamConfig, read_scores, stream
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import WatchConfig
from tsforge.artifact import Artifact, load_artifact
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, DataError, TsforgeError
from tsforge.core.workspace import Workspace
from tsforge.data.calendar import CalendarConfig, add_calendar

FIRST = datetime(2023, 1, 1, tzinfo=UTC)
DAYS = 420
CALENDAR = {"holidays": "US", "features": ["weekday"]}
RANGE = {"y": [0.0, 100.0]}
WILD = -1e6
RULE = {"rule": {"kind": "quantile", "alpha": 0.01}}


def rows(days: int = DAYS, wild: tuple[int, ...] = ()) -> pl.DataFrame:
    """Daily values of level 10 with a weekly wave; ``wild`` days hold a value that nobody means."""
    at = np.arange(days)
    y = 10 + np.sin(2 * np.pi * at / 7) + 0.1 * np.random.default_rng(0).standard_normal(days)
    y[list(wild)] = WILD
    times = [FIRST + timedelta(days=int(day)) for day in at]
    return pl.DataFrame({"ds": times, "y": y, "z": 5 + np.cos(2 * np.pi * at / 7)})


class Shop:
    """A workspace with data sets in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace = Workspace.open()

    def data(self, name: str, **settings: Any) -> dict[str, Any]:
        return {"name": name, "source": {"kind": "parquet", "path": str(self.root / f"{name}.parquet")}} | settings

    def ingest(self, name: str, table: pl.DataFrame, **settings: Any) -> None:
        table.write_parquet(self.root / f"{name}.parquet")
        ingest(validate(IngestConfig, {"data": self.data(name, **settings)}), self.workspace)

    def fit(self, name: str, model: str = "ar_net", **settings: Any) -> Artifact:
        config = {
            "data": self.data(name, **settings),
            "model": {"name": model} | ({"lags": 14} if model == "ar_net" else {}),
            "window": {"context_length": 28, "horizon": 7},
            "split": {"kind": "times", "ends": ["2023-08-15", "2023-10-01", "2023-12-01"]},
            "tracking": {"enabled": False},
        }
        return fit(validate(FitConfig, config), self.workspace).artifact

    def predict(self, artifact: Artifact, **settings: Any) -> pl.DataFrame:
        given = {"artifact": artifact.id, "quantile_levels": []} | settings
        return predict(validate(PredictConfig, given), self.workspace).table


@pytest.fixture
def shop(workspace_root: Path, tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def means(table: pl.DataFrame, variate: str = "y") -> list[float]:
    return table.filter(variate=variate).sort("step")["mean"].to_list()


def test_a_range_of_the_fit_hides_cells_at_every_use(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A wild cell in the newest context is as good as missing, for forecasts as it was for the fit."""
    shop.ingest("wild", rows(wild=(100, DAYS - 3)))
    shop.ingest("hole", rows().with_columns(y=pl.when(pl.int_range(pl.len()) != DAYS - 3).then("y")))
    artifact = shop.fit("wild", valid_range=RANGE)
    with caplog.at_level(logging.INFO, logger="tsforge"):
        found = shop.predict(artifact)
    assert any("outside their valid range hidden" in record.getMessage() for record in caplog.records)
    assert means(found) == pytest.approx(means(shop.predict(artifact, dataset="hole")), abs=1e-5)
    assert all(5 < value < 15 for value in means(found))
    live = live_forecast(shop.workspace, artifact.id, "wild").table
    assert means(live) == pytest.approx(means(found), abs=1e-6)
    why = explain(validate(ExplainConfig, {"artifact": artifact.id, "variate": "y"}), shop.workspace)
    assert why.table["contribution"].abs().to_numpy().max() < 100
    newest = stream(StreamConfig(artifact=artifact.id), shop.workspace).forecast.table
    assert means(newest) == pytest.approx(means(found), abs=1e-5)
    batch = {"name": "b", "data": shop.data("wild"), "model": artifact.id, "forecast": {}, "detect": None}
    result = run_batch(validate(BatchConfig, batch), FIRST + timedelta(days=DAYS - 1), shop.workspace)
    published = result.partition.table("forecast")
    assert published is not None
    assert means(published) == pytest.approx(means(found), abs=1e-5)


def test_a_hidden_cell_is_still_judged(shop: Shop) -> None:
    shop.ingest("wild", rows(wild=(DAYS - 3,)))
    artifact = shop.fit("wild", valid_range=RANGE)
    job = {"artifact": artifact.id, "detector": RULE, "start": "2024-01-25"}
    report = detect(validate(DetectJobConfig, job), shop.workspace).report
    [event] = report.events.to_dicts()
    assert event["start"] == FIRST + timedelta(days=DAYS - 3)
    after = report.scores.table.filter(pl.col("time") > event["end"], variate="y")
    assert after.height == 2
    assert after["expected"].is_between(5.0, 15.0).all()  # no forecast of these days saw the wild one


def test_ranges_of_both_hold_and_contradictions_are_refused(shop: Shop) -> None:
    shop.ingest("wild", rows(wild=(DAYS - 3,)), valid_range={"y": [-5.0, 10.5], "z": [4.5, None]})
    artifact = shop.fit("wild", valid_range={"y": [0.0, 100.0]})
    fitted = FittedData.of(artifact, "wild")
    settings = fitted.settings({"valid_range": {"y": [-5.0, 10.5], "z": [4.5, None]}})
    assert settings["valid_range"] == {"y": (0.0, 10.5), "z": (4.5, None)}
    seen = load_dataset(shop.workspace, fitted, masked=True).table
    y, z = seen["y"].drop_nulls(), seen["z"].drop_nulls()
    assert y.is_between(0.0, 10.5).all()
    assert z.is_between(4.5, 9.0).all()
    shop.ingest("kelvin", rows(), valid_range={"y": [200.0, None]})
    message = r"valid_range of 'y': artifact .* was fitted with \[0, 100\], data set 'kelvin' has \[200, inf\]"
    with pytest.raises(DataError, match=message):
        shop.predict(artifact, dataset="kelvin")


COMMANDS: dict[str, Callable[[Shop, Artifact], Any]] = {
    "predict": lambda shop, artifact: shop.predict(artifact),
    "predict from a cutoff": lambda shop, artifact: shop.predict(artifact, cutoff="2024-01-10"),
    "explain": lambda shop, artifact: explain(ExplainConfig(artifact=artifact.id, variate="y"), shop.workspace).table,
    "importance": lambda shop, artifact: (
        explain(
            validate(
                ExplainConfig,
                {"artifact": artifact.id, "what": "importance", "importance": {"cutoffs": 6, "repeats": 1}},
            ),
            shop.workspace,
        ).table
    ),
    "detect": lambda shop, artifact: (
        detect(
            validate(DetectJobConfig, {"artifact": artifact.id, "detector": RULE, "start": "2024-01-25"}),
            shop.workspace,
        ).report.scores.table
    ),
    "dashboard": lambda shop, artifact: (
        live_forecast(shop.workspace, artifact.id, str(artifact.provenance["dataset"])).table
    ),
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_calendar_of_the_fit_is_made_at_every_use(shop: Shop, command: str) -> None:
    """The artifact fitted with an override does what the same one fitted on data stored with that calendar does."""
    shop.ingest("plain", rows())
    shop.ingest("dated", rows(), calendar=CALENDAR)
    found, wanted = (COMMANDS[command](shop, shop.fit(name, calendar=CALENDAR)) for name in ("plain", "dated"))
    wanted = wanted.with_columns(pl.col(pl.String).replace("dated", "plain"))
    assert found.height
    assert_frame_equal(found, wanted)


def test_new_rows_get_the_calendar_of_the_fit(shop: Shop) -> None:
    """A stream and a watch begin, take rows that come later, and are where one prediction from all rows is."""
    shop.ingest("plain", rows(DAYS - 20))
    artifact = shop.fit("plain", calendar=CALENDAR, valid_range=RANGE)
    stream(StreamConfig(artifact=artifact.id), shop.workspace)
    follow = {"artifact": artifact.id, "source": {"kind": "dataset"}, "detector": RULE, "sinks": {}}
    config = validate(WatchConfig, follow)
    watch(config, shop.workspace, once=True)
    shop.ingest("plain", rows(wild=(DAYS - 2,)))
    result = stream(StreamConfig(artifact=artifact.id), shop.workspace)
    assert result.rows_taken == 20
    scores = read_scores(shop.workspace, result.name).filter(variate="y", time=FIRST + timedelta(days=DAYS - 2))
    assert scores["value"].to_list() == [WILD]  # judged, though no model saw it
    assert means(result.forecast.table) == pytest.approx(means(shop.predict(artifact)), abs=1e-5)
    assert watch(config, shop.workspace, once=True).facts["rows_taken"] == 20


def test_files_that_are_watched_get_the_calendar_of_the_fit(shop: Shop) -> None:
    shop.ingest("plain", rows(DAYS - 20))
    artifact = shop.fit("plain", calendar=CALENDAR)
    folder = shop.root / "incoming"
    folder.mkdir()
    rows()[DAYS - 20 :].write_parquet(folder / "new.parquet")
    source = {"kind": "folder", "path": str(folder), "settle_seconds": 0, "rows": {"time": "ds", "series": None}}
    follow = {"artifact": artifact.id, "source": source, "detector": RULE, "sinks": {}}
    facts = watch(validate(WatchConfig, follow), shop.workspace, once=True).facts
    assert (facts["rows_taken"], facts["refused"]) == (20, 0)


def test_a_batch_makes_the_calendar_of_the_model(shop: Shop) -> None:
    shop.ingest("plain", rows())
    artifact = shop.fit("plain", calendar=CALENDAR)
    batch = {"name": "b", "data": shop.data("plain"), "model": artifact.id, "forecast": {}, "detect": None}
    result = run_batch(validate(BatchConfig, batch), FIRST + timedelta(days=DAYS - 1), shop.workspace)
    published = result.partition.table("forecast")
    assert published is not None
    assert means(published) == pytest.approx(means(shop.predict(artifact)), abs=1e-5)


def test_a_calendar_that_only_the_data_set_has_is_not_in_the_way(shop: Shop) -> None:
    shop.ingest("dated", rows(), calendar=CALENDAR)
    artifact = shop.fit("dated")
    assert artifact.schema.known == ()
    assert load_dataset(shop.workspace, FittedData.of(artifact, "dated")).schema.known == ()
    assert shop.predict(artifact).height == 14
    shop.ingest("other", rows(), calendar={"features": ["month"]})
    wanted = shop.fit("other", calendar=CALENDAR)
    assert shop.predict(wanted, dataset="dated").height == 14


def test_an_artifact_that_does_not_say_where_its_calendar_came_from_reads_the_stored_one(shop: Shop) -> None:
    shop.ingest("dated", rows(), calendar=CALENDAR)
    artifact = shop.fit("dated", calendar=CALENDAR)
    for own in ({}, {"name": "dated", "calendar": {}}):
        fitted = replace(FittedData.of(artifact, "dated"), own=own)
        assert load_dataset(shop.workspace, fitted).schema.known == artifact.schema.known


def test_a_frame_that_does_not_fit_is_said_of_the_artifact(shop: Shop) -> None:
    shop.ingest("plain", rows())
    artifact = shop.fit("plain", calendar=CALENDAR)
    shop.ingest("steps", rows().with_columns(ds=pl.int_range(pl.len())), freq="1i")
    with pytest.raises(ArtifactError, match="was fitted on freq 1d, the data has 1i"):
        shop.predict(artifact, dataset="steps")


def test_roles_of_the_fit_hold(shop: Shop) -> None:
    """``data.targets`` of the fit: the command line reads what the dashboard reads."""
    shop.ingest("plain", rows())
    artifact = shop.fit("plain", targets=["y"], past=["z"])
    found = shop.predict(artifact)
    assert found["variate"].unique().to_list() == ["y"]
    assert_frame_equal(found, live_forecast(shop.workspace, artifact.id, "plain").table.select(found.columns))
    shop.ingest("narrow", rows().select("ds", "y"))
    with pytest.raises(ArtifactError, match=r"needs the past column\(s\) z, which the data lacks"):
        shop.predict(artifact, dataset="narrow")


def test_a_hierarchy_keeps_its_sums(shop: Shop) -> None:
    """Values outside the range of the fit enter no sum, and sums are not held against the range of a part."""
    table = pl.concat(
        rows(wild=(DAYS - 2,) if name == "a" else ()).select("ds", "y", s=pl.lit(f"all/{name}")) for name in "ab"
    )
    structure = {"levels": ["top", "part"], "separator": "/"}
    shop.ingest("tree", table, layout="long", series="s", targets=["y"], hierarchy=structure)
    given: dict[str, Any] = {"layout": "long", "series": "s", "targets": ["y"], "hierarchy": structure}
    artifact = shop.fit("tree", valid_range={"y": [0.0, 15.0]}, **given)
    seen = load_dataset(shop.workspace, FittedData.of(artifact, "tree"), masked=True).table
    sums = seen.filter(pl.col("series_id") == "all")["y"]
    assert sums.drop_nulls().to_numpy().min() > 15
    assert sums.null_count() <= 1
    found = shop.predict(artifact, reconcile={"method": "ols"})
    assert found["series_id"].n_unique() == len(artifact.series_ids)
    assert found["mean"].to_numpy().min() > 0


def test_a_batch_makes_the_sums_that_predictions_make(shop: Shop) -> None:
    """Values that only the model takes for invalid enter no sum; sums are those that the job states."""
    table = pl.concat(
        rows(wild=(DAYS - 3,) if name == "a" else ()).select("ds", "y", s=pl.lit(f"all/{name}")) for name in "ab"
    )
    long: dict[str, Any] = {"layout": "long", "series": "s", "targets": ["y"]}
    structure = {"levels": ["top", "part"], "separator": "/"}
    shop.ingest("tree", table, hierarchy=structure, **long)
    artifact = shop.fit("tree", "linear", valid_range={"y": [0.0, 15.0]}, hierarchy=structure, **long)
    wanted = shop.predict(artifact).sort("series_id", "step")
    assert wanted.filter(series_id="all")["mean"].is_between(15.0, 25.0).all()

    def published(name: str, **settings: Any) -> pl.DataFrame:
        batch = {"name": name, "data": shop.data("tree", **settings), "model": artifact.id, "detect": None}
        result = run_batch(validate(BatchConfig, batch), FIRST + timedelta(days=DAYS - 1), shop.workspace)
        table = result.partition.table("forecast")
        assert table is not None
        return table.sort("series_id", "step").select(wanted.columns)

    assert_frame_equal(published("stated", hierarchy=structure, **long), wanted, abs_tol=1e-5)
    is_part = pl.col("series_id").str.contains("/")
    assert_frame_equal(published("parts", **long), wanted.filter(is_part), abs_tol=1e-5)
    found = published("mean", hierarchy=structure | {"aggregate": "mean"}, **long)
    assert found.filter(~is_part)["mean"].is_between(5.0, 15.0).all(), "the job's own, not that of the fit"


def test_a_champion_of_another_delay_is_met_in_the_contest_and_rows_are_kept_without_a_model(shop: Shop) -> None:
    """A champion that batches refuse must not hold up the one that replaces it; nor must a missing one lose rows."""
    data = rows().with_columns(z=pl.col("y").shift(1))
    shop.ingest("late", data, targets=["y"], past=["z"])

    def job(as_of: datetime, **settings: Any) -> Any:
        fit_config = {
            "data": shop.data("late", targets=["y"], past=["z"], **settings),
            "model": {"name": "ar_net", "lags": 7},
            "window": {"context_length": 14, "horizon": 7},
            "split": {"train": 0.85, "valid": 0.15, "test": 0.0},
            "tracking": {"register_as": "late", "alias": "challenger"},
        }
        config = {"name": "late", "fit": fit_config, "ingest": False, "compare": {"span": "30d", "cutoffs": 4}}
        return retrain(validate(RetrainConfig, config), as_of, shop.workspace)

    end = FIRST + timedelta(days=DAYS)
    assert job(end - timedelta(days=40)).promoted
    shop.ingest("late", data, targets=["y"], past=["z"], publication_delay={"z": "3d"})
    assert job(end, publication_delay={"z": "3d"}).status == "done"
    settings = shop.data("late", targets=["y"], past=["z"], publication_delay={"z": "3d"})
    more = rows(DAYS + 2).with_columns(z=pl.col("y").shift(1))
    more.write_parquet(settings["source"]["path"])
    batch = {"name": "gone", "data": settings, "model": "late@nobody", "detect": None}
    with pytest.raises(TsforgeError, match="nobody"):
        run_batch(validate(BatchConfig, batch), end + timedelta(days=2), shop.workspace)
    assert load_dataset(shop.workspace, "late").num_rows == more.height


def test_static_columns_beside_those_of_the_fit_group_events_and_make_sums(shop: Shop) -> None:
    """A fit without them takes them from nobody: groups and levels are read by columns no network need read."""
    regions = {"a1": 1, "a2": 1, "b1": 2}
    parts = [rows().select("ds", "y", s=pl.lit(name), region=pl.lit(code)) for name, code in regions.items()]
    long = {"layout": "long", "series": "s", "targets": ["y"]}
    shop.ingest("shops", pl.concat(parts), static=["region"], hierarchy={"levels": ["region"]}, **long)
    artifact = shop.fit("shops", **long)
    frame = load_dataset(shop.workspace, FittedData.of(artifact, "shops"), masked=True)
    assert frame.schema.static == ("region",)
    assert set(regions) < set(shop.predict(artifact)["series_id"])
    grouped = {**RULE, "events": {"group_by": "static:region"}}
    job = {"artifact": artifact.id, "detector": grouped, "start": "2024-01-25"}
    assert detect(validate(DetectJobConfig, job), shop.workspace).report.events.height >= 0


def test_a_stream_tells_of_ranges_without_a_common_value(shop: Shop) -> None:
    """Every error of reading once passed for "no new rows", so a stream ran on blind."""
    shop.ingest("wild", rows(DAYS - 30), valid_range={"y": [0.0, 50.0]})
    artifact = shop.fit("wild", valid_range={"y": [0.0, 50.0]})
    stream(StreamConfig(artifact=artifact.id), shop.workspace)
    assert stream(StreamConfig(artifact=artifact.id), shop.workspace).rows_taken == 0  # nothing new is no error
    shop.ingest("wild", rows(), valid_range={"y": [100.0, 200.0]})
    with pytest.raises(DataError, match=r"valid_range of 'y'.*no value would be left"):
        stream(StreamConfig(artifact=artifact.id), shop.workspace)


def test_champion_and_challenger_each_read_their_own_calendar(shop: Shop) -> None:
    shop.ingest("plain", rows())

    def job(as_of: datetime, **data: Any) -> Any:
        fit_config = {
            "data": shop.data("plain", **data),
            "model": {"name": "ar_net", "lags": 14},
            "window": {"context_length": 28, "horizon": 7},
            "split": {"train": 0.85, "valid": 0.15, "test": 0.0},
            "tracking": {"register_as": "shop", "alias": "challenger"},
        }
        config = {"name": "shop", "fit": fit_config, "ingest": False, "compare": {"span": "30d", "cutoffs": 8}}
        return retrain(validate(RetrainConfig, config), as_of, shop.workspace)

    first = job(FIRST + timedelta(days=DAYS - 40), calendar=CALENDAR)
    assert first.promoted
    second = job(FIRST + timedelta(days=DAYS - 1))
    assert second.facts["champion"] == first.facts["challenger"]
    assert second.facts["cells"] > 0
    champion = load_artifact(shop.workspace.artifacts / first.facts["challenger"])
    assert "calendar.holiday" in champion.schema.known


def test_the_calendar_of_an_artifact_is_that_of_its_times(shop: Shop) -> None:
    shop.ingest("plain", rows())
    artifact = shop.fit("plain", calendar=CALENDAR)
    found = load_dataset(shop.workspace, FittedData.of(artifact, "plain"), extend=7)
    by_hand = add_calendar(load_dataset(shop.workspace, "plain", extend=7), validate(CalendarConfig, CALENDAR))
    assert_frame_equal(found.table, by_hand.table)


def test_a_cutoff_before_the_data_is_told_its_last_row(shop: Shop) -> None:
    shop.ingest("plain", rows())
    artifact = shop.fit("plain", calendar=CALENDAR)
    with pytest.raises(
        DataError, match=r"no rows up to 1990-01-01; the data runs from 2023-01-01 .* to 2024-02-24 00:00$"
    ):
        shop.predict(artifact, cutoff="1990-01-01")


LATE: dict[str, Any] = {"targets": ["y"], "past": ["z"]}
LATE_USES: dict[str, Callable[[Shop, Artifact], Any]] = COMMANDS | {
    "batch": lambda shop, artifact: run_batch(
        validate(
            BatchConfig,
            {"name": "b", "data": shop.data("late", **LATE), "model": artifact.id, "ingest": False, "detect": None},
        ),
        FIRST + timedelta(days=DAYS - 1),
        shop.workspace,
    ),
    "stream": lambda shop, artifact: stream(StreamConfig(artifact=artifact.id), shop.workspace),
}


@pytest.mark.parametrize("use", sorted(LATE_USES))
def test_covariates_with_another_delay_than_those_of_the_fit_are_refused(shop: Shop, use: str) -> None:
    shop.ingest("late", rows(), publication_delay={"z": "3d"}, **LATE)
    artifact = shop.fit("late", publication_delay={"z": "3d"}, **LATE)
    shop.ingest("late", rows(), **LATE)
    message = (
        rf"artifact {artifact.id} was fitted with publication_delay \{{'z': '3d'\}}, data set 'late' has none: 1 of 1 "
        r"past covariates that the model reads \(z\)"
    )
    with pytest.raises(DataError, match=message):
        LATE_USES[use](shop, artifact)


def test_a_delay_of_the_job_that_the_model_was_not_fitted_with_leaves_the_store_alone(shop: Shop) -> None:
    shop.ingest("late", rows(), **LATE)
    artifact = shop.fit("late", **LATE)
    wanted = shop.predict(artifact)
    data = shop.data("late", **LATE, publication_delay={"z": "3d"})
    job = validate(BatchConfig, {"name": "b", "data": data, "model": artifact.id, "detect": None})
    with pytest.raises(DataError, match="was fitted with publication_delay none, data set 'late' has"):
        run_batch(job, FIRST + timedelta(days=DAYS - 1), shop.workspace)
    assert_frame_equal(shop.predict(artifact), wanted)


def test_delays_that_move_no_row_of_what_the_model_reads_are_no_matter(shop: Shop) -> None:
    """What counts is how much later than the targets a covariate comes, whatever words say so."""
    shop.ingest("late", rows(), publication_delay={"z": "3d"}, **LATE)
    artifact = shop.fit("late", publication_delay={"z": "3d"}, **LATE)
    alone = shop.fit("late", publication_delay={"z": "3d"}, targets=["y"])
    wanted = shop.predict(artifact), shop.predict(alone)
    shop.ingest("late", rows(), publication_delay={"y": "1d", "z": "96h"}, **LATE)
    assert_frame_equal(shop.predict(artifact), wanted[0])
    shop.ingest("late", rows(), **LATE)
    assert_frame_equal(shop.predict(alone), wanted[1])
