"""Rows of the store that a watch does not take, and covariates that rows come without: counted and told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sqlalchemy import update
from test_stream_late import AHEAD, Plant, forecast_of_weather, grow, hours
from watching import FIRST, Watched, new_rows

from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.watch import stored
from tsforge.app.watch.covariates import missing_cells
from tsforge.app.watch.records import ROWS
from tsforge.app.watch.run import watch
from tsforge.app.watch.settings import WatchConfig
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace
from tsforge.data.grid import TimeGrid
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore
from tsforge.data.store_tables import DATASETS
from tsforge.data.watch_state import WatchState
from tsforge.forecasting.stream_rows import StreamPlace

REVISED = "revised: rows of the store changed by a batch, up to"


@pytest.fixture
def plant(site: Any, tmp_path: Path) -> Watched:
    return Watched(tmp_path, Workspace.open(site.home))


def wide(rows: pl.DataFrame, like: pl.DataFrame) -> pl.DataFrame:
    """Return long rows as the source of the site has them."""
    names = {f"{variate}_{machine}": f"{machine}.{variate}" for machine in "ab" for variate in "xy"}
    table = rows.pivot(on="machine", index="ts", values=["x", "y"]).rename(names | {"ts": "ds"})
    return table.select(like.columns).with_columns(pl.col("ds").cast(like["ds"].dtype))


def put(workspace: Workspace, position: dict[str, Any]) -> None:
    """Let the watch ``plant`` stand at another position."""
    with closing(WatchState(workspace.root / "watch/plant/state.db")) as state:
        snapshot = state.snapshot()
        assert snapshot is not None
        state.commit(generation=1, position=position, facts=snapshot.facts)


class Store:
    """The source of the site, and a watch of the data set that it is ingested into."""

    def __init__(self, plant: Watched, site: Any) -> None:
        self._plant, self._site = plant, site
        self.history = pl.read_parquet(site.source)
        self.new = wide(new_rows(), self.history)

    def ingest(self, *parts: pl.DataFrame) -> None:
        pl.concat([self.history, *parts], how="diagonal").write_parquet(self._site.source)
        ingest(validate(IngestConfig, {"data": self._site.data()}), self._plant.workspace)

    def watch(self, **changes: Any) -> dict[str, Any]:
        config = self._plant.config(source={"kind": "dataset"}, **changes)
        facts = watch(config, self._plant.workspace, once=True).facts
        assert facts["rows_read"] == sum(facts[name] for name in ROWS[1:]) + sum(facts["series_left_out"].values())
        return facts


@pytest.fixture
def store(plant: Watched, site: Any) -> Store:
    return Store(plant, site)


def counted(facts: dict[str, Any]) -> tuple[int, int, int, dict[str, int]]:
    return facts["rows_taken"], facts["late"], facts["cleaning"].get(REVISED, 0), facts["series_left_out"]


def test_late_changed_and_foreign_rows_of_the_store_are_told(
    plant: Watched, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    new = store.new
    assert counted(store.watch()) == (0, 0, 0, {})
    store.ingest(new[:30], new[40:90])
    assert counted(store.watch()) == (160, 0, 0, {})
    told = plant.told()
    place = pl.int_range(new.height)
    changed = new.with_columns(pl.when(place == 50).then(pl.col("a.x") + 1.0).otherwise("a.x").alias("a.x"))
    stranger = changed.with_columns(pl.when(place >= 65).then(pl.col("a.x")).alias("c.x"), pl.lit(1.0).alias("c.y"))
    stranger = stranger.with_columns(pl.when(place >= 65).then("c.y").alias("c.y"))
    store.ingest(stranger[:90])
    assert counted(store.watch()) == (160, 20, 1, {"c": 25})
    assert "20 rows came late" in caplog.text
    assert "up to 1 rows" in caplog.text
    assert "25 rows of 1 series that the detector does not know were left out (c)" in caplog.text
    assert counted(store.watch()) == (160, 20, 1, {"c": 25}), "once"
    assert plant.told() == told
    store.ingest(stranger[:100])
    assert counted(store.watch(chunk_rows=7)) == (180, 20, 1, {"c": 35})


def test_only_late_rows_are_told_without_rows_that_are_taken(store: Store) -> None:
    new = store.new
    store.ingest(new[5:40])
    assert counted(store.watch(chunk_rows=11)) == (0, 0, 0, {}), "the watch begins after the rows stored by then"
    store.ingest(new[:40])
    assert counted(store.watch()) == (0, 10, 0, {})
    assert counted(store.watch()) == (0, 10, 0, {})


def test_a_batch_that_comes_while_the_store_is_read_is_counted_with_the_next_look(
    plant: Watched, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows wait already, and must not be late when the records of batches have them."""
    after = stored.StoredRows._after
    waiting = [store.new[:60]]

    def meanwhile(self: stored.StoredRows, ends: pl.DataFrame) -> pl.DataFrame:
        if waiting:
            store.ingest(waiting.pop())
        return after(self, ends)

    monkeypatch.setattr(stored.StoredRows, "_after", meanwhile)
    assert counted(store.watch()) == (120, 0, 0, {})
    store.ingest(store.new[:70])
    assert counted(store.watch()) == (140, 0, 0, {})


@pytest.mark.parametrize("position", [{}, {"new": 3360, "waiting": 0, "changed": 0, "strangers": {"c": 5}}])
def test_a_watch_of_an_older_version_counts_from_its_next_look_on(
    plant: Watched, store: Store, position: dict[str, Any]
) -> None:
    store.watch()
    store.ingest(store.new[10:40])
    put(plant.workspace, position)
    assert counted(store.watch()) == (60, 0, 0, {})
    store.ingest(store.new[:45])
    assert counted(store.watch()) == (70, 20, 0, {})


# --- data sets whose batches change rows that are there

BEGUN = 400  # hours that a watch begins with


class Weather(Plant):
    """Two series that are watched in the store, with a past and a known covariate."""

    def begin(self, *history: pl.DataFrame, **changes: Any) -> None:
        """Bring the history and fit a model."""
        self.bring(*history, **changes)
        settings = {
            "data": self.data(history[0], **changes),
            "model": {"name": "ar_net", "lags": 12},
            "window": {"context_length": 24, "horizon": AHEAD},
            "tracking": {"enabled": False},
            "train": {"max_epochs": 1},
        }
        fit(validate(FitConfig, settings), self.workspace)

    def watch(self, **changes: Any) -> tuple[int, int, int, dict[str, int]]:
        config = {
            "source": {"kind": "dataset"},
            "detector": {"rule": {"kind": "quantile", "alpha": 0.01}},
            "sinks": {"log": {"kind": "jsonl", "path": str(self.folder / "events.jsonl")}},
            **changes,
        }
        return counted(watch(validate(WatchConfig, config), self.workspace, once=True).facts)

    def history(self) -> list[pl.DataFrame]:
        """Return rows to begin with."""
        return [part for name in "ab" for part in (hours(name, 0, BEGUN), forecast_of_weather(name, BEGUN))]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = Weather(tmp_path_factory.mktemp("weather"))
    found.begin(*found.history())
    return found.folder


@pytest.fixture
def weather(begun: Path, tmp_path: Path) -> Weather:
    shutil.copytree(begun, tmp_path / "weather")
    return Weather(tmp_path / "weather")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is told of rows left out."""
    yield
    assert "late" not in caplog.text
    assert "left out" not in caplog.text
    assert "changed up to" not in caplog.text


@pytest.mark.usefixtures("quiet")
def test_ordinary_nights_tell_nothing_though_their_batches_change_stored_rows(weather: Weather) -> None:
    assert weather.watch() == (0, 0, 0, {})
    for night in range(3):
        grow(weather, BEGUN + 3 * night, BEGUN + 3 * night + 3)
        assert weather.watch(chunk_rows=2) == (6 * night + 6, 0, 0, {})
    end = BEGUN + 9
    withdrawn = [hours(name, end + 3, end + 9, y=None, p=None, k=None) for name in "ab"]
    weather.bring(*withdrawn, *(hours(name, end - 1, end) for name in "ab"), nulls="erase")
    assert weather.watch() == (18, 0, 0, {}), "they were not taken yet"


@pytest.mark.usefixtures("quiet")
def test_covariates_with_a_declared_delay_are_neither_late_nor_changed(tmp_path: Path) -> None:
    weather = Weather(tmp_path)
    plan: dict[str, Any] = {"known": [], "publication_delay": {"p": "3h"}}

    def night(begin: int, end: int, seen: int) -> list[pl.DataFrame]:
        later = {"k": None, "p": None}
        return [part for name in "ab" for part in (hours(name, begin, seen, k=None), hours(name, seen, end, **later))]

    weather.begin(*night(0, BEGUN, BEGUN - 3), **plan)
    weather.watch()
    for end in (BEGUN + 6, BEGUN + 12):
        weather.bring(*night(end - 9, end, end - 3), **plan)
        assert weather.watch() == (2 * (end - BEGUN), 0, 0, {})


@pytest.mark.usefixtures("quiet")
def test_a_data_set_that_was_removed_and_ingested_again_begins_anew(weather: Weather) -> None:
    weather.watch()
    with closing(SeriesStore(weather.workspace.database_url)) as opened:
        opened.remove("plant")
    weather.bring(*weather.history(), hours("c", 0, 30))
    grow(weather, BEGUN, BEGUN + 6)
    assert weather.watch() == (12, 0, 0, {})


def test_only_rows_after_those_of_the_first_look_of_a_foreign_series_count(weather: Weather) -> None:
    weather.watch()
    weather.bring(hours("c", 100, BEGUN), forecast_of_weather("c", BEGUN))
    put(weather.workspace, {})
    assert weather.watch() == (0, 0, 0, {})
    grow(weather, BEGUN, BEGUN + 3, "abc")
    weather.bring(hours("a", -10, 0), hours("d", 20, 40))
    taken, late, _, left_out = weather.watch()
    assert (taken, late, left_out) == (6, 10, {"c": 3, "d": 20})


def test_rows_that_come_late_within_a_backlog_are_counted_with_the_next_look(
    weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes while pieces are taken; where a watch ends between two, no row that it takes later is late."""
    weather.watch()
    weather.bring(hours("a", BEGUN, BEGUN + 40), hours("b", BEGUN, BEGUN + 12), hours("b", BEGUN + 20, BEGUN + 40))
    cut, pieces = stored.StoredRows._cut, []

    def interrupted(self: stored.StoredRows, left: Any, limit: int) -> Any:
        pieces.append(limit)
        if len(pieces) == 3:
            weather.bring(hours("b", BEGUN + 13, BEGUN + 17), hours("a", BEGUN + 40, BEGUN + 42))
            raise KeyboardInterrupt
        return cut(self, left, limit)

    monkeypatch.setattr(stored.StoredRows, "_cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weather.watch(chunk_rows=10)
    monkeypatch.undo()
    assert weather.watch(chunk_rows=10)[:3] == (72 + 6, 0, 0), "no series had come so far"

    begin = BEGUN + 42
    weather.bring(hours("a", begin, begin + 40), hours("b", begin - 2, begin + 40))

    def crossed(self: stored.StoredRows, left: Any, limit: int) -> Any:
        pieces.append(limit)
        if len(pieces) == 6:
            weather.bring(hours("a", -4, 0), hours("b", begin + 10, begin + 11, y=50.0))
        return cut(self, left, limit)

    monkeypatch.setattr(stored.StoredRows, "_cut", crossed)
    assert weather.watch(chunk_rows=10)[:3] == (78 + 82, 4, 1)
    assert weather.watch()[:3] == (78 + 82, 4, 1), "once"


def test_another_data_set_and_what_is_wrong_with_it_are_not_looked_at(
    weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    weather.watch()
    ingest(validate(IngestConfig, {"data": {**weather.data(hours("z", 0, 30)), "name": "other"}}), weather.workspace)
    with closing(SeriesStore(weather.workspace.database_url)) as opened, opened.engine.begin() as connection:
        connection.execute(update(DATASETS).where(DATASETS.c.name == "other").values(columns="damaged"))
    grow(weather, BEGUN, BEGUN + 3)
    looks: list[int] = []
    look = stored.StoredRows._look

    def seen(self: stored.StoredRows, position: dict[str, Any], ends: pl.DataFrame) -> Any:
        looks.append(ends.height)
        return look(self, position, ends)

    monkeypatch.setattr(stored.StoredRows, "_look", seen)
    assert weather.watch() == (6, 0, 0, {})
    assert len(looks) == 1, "without a batch, nothing is read"


# --- covariates


def test_known_covariates_told_before_their_row_are_not_missing() -> None:
    schema = SeriesSchema(targets=("x",), past=("p",), known=("k",), freq="1h")
    grid = TimeGrid(FIRST, "1h")
    import torch

    ahead = torch.tensor([[[1.0], [torch.nan], [3.0]], [[torch.nan]] * 3])
    place = StreamPlace(
        schema=schema, grid=grid, series={"a": 0, "b": 1}, last=np.array([9, 7]), ahead=ahead, shared_clock=False
    )
    cells = [("a", 10, 1.0, None), ("a", 11, None, None), ("a", 13, None, 2.0), ("b", 8, 1.0, None), ("a", 12, 1, None)]
    rows = pl.DataFrame(
        {
            "series_id": [name for name, *_ in cells],
            "time": grid.time_at(np.array([index for _, index, *_ in cells])),
            "p": pl.Series([past for *_, past, _ in cells], dtype=pl.Float64),
            "k": pl.Series([known for *_, known in cells], dtype=pl.Float64),
        }
    )
    assert missing_cells(rows, place) == {"p": 2, "k": 2}
    assert missing_cells(rows.clear(), place) == {}


def test_rows_without_a_covariate_are_counted_and_told_once(
    plant: Watched, site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    history = pl.read_parquet(site.source)
    waves = [pl.col(f"{name}.x").shift(1).fill_null(0.0).alias(f"{name}.k") for name in "ab"]
    history.with_columns(waves).write_parquet(site.source)
    data = {**site.data(), "name": "cov", "targets": ["x"], "past": ["y"], "known": ["k"], "valid_range": {}}
    settings = {
        "data": data,
        "model": {"name": "ar_net", "lags": 24},
        "window": {"context_length": 48, "horizon": 6},
        "split": {"kind": "times", "ends": ["2026-02-09T23:00", "2026-02-19T23:00", "2026-02-22T23:00"]},
        "tracking": {"enabled": False},
        "train": {"max_epochs": 1},
    }
    ingest(validate(IngestConfig, {"data": data}), plant.workspace)
    artifact = fit(validate(FitConfig, settings), plant.workspace).artifact
    assert (artifact.schema.past, artifact.schema.known) == (("y",), ("k",))
    rows = new_rows(60).with_columns(k=1.0, y=pl.when(pl.int_range(120) >= 100).then("y"))
    plant.write("0.csv", rows.with_columns(k=pl.when(pl.int_range(120) % 40 != 3).then("k")))
    plant.write("1.csv", new_rows(4, start=60).with_columns(k=1.0, y=pl.lit(None, pl.Float64)))
    facts = plant.watch(chunk_rows=1000).facts
    assert facts["rows_taken"] == 128
    missing = {name: facts["cleaning"][f"missing in rows taken: covariate '{name}'"] for name in "yk"}
    assert missing == {"y": 108, "k": 3}
    words = "covariate 'y' was missing in 100, covariate 'k' was missing in 3 of 120 rows taken: scores are less sure"
    assert words in caplog.text
    assert caplog.text.count("was missing in") == 2, "a covariate is told once a run"
