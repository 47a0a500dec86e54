"""Publications from source to store and back: kept, counted, written once, never in part; refused with the setting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from tsforge.app.ingest import IngestConfig, ingest, load_dataset, load_history
from tsforge.cli import app
from tsforge.core.config import to_yaml, validate
from tsforge.core.errors import DataError, TsforgeError
from tsforge.core.workspace import Workspace
from tsforge.data.report import vintage_report
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore
from tsforge.data.vintages import VintageFrame
from tsforge.testing.vintages import START, revised_table

SCHEMA = SeriesSchema(targets=("load",), past=("flow",), known=("wind",), freq="1h")
ROLES = {"targets": ["load"], "past": ["flow"], "known": ["wind"], "freq": "1h"}
HOUR = timedelta(hours=1)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SeriesStore]:
    postgres = request.param == "postgresql"
    url = str(request.getfixturevalue("postgres_url")) if postgres else f"sqlite:///{tmp_path / 'store.db'}"
    opened = SeriesStore(url)
    yield opened
    opened.close()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, database_url=f"sqlite:///{tmp_path / 'store.db'}", tracking_uri="")


def source(folder: Path, table: pl.DataFrame, **changes: Any) -> IngestConfig:
    path = folder / "source.parquet"
    table.write_parquet(path)
    data = {
        "name": "grid",
        "source": {"kind": "parquet", "path": str(path)},
        "layout": "long",
        "series": "series_id",
        "time": "time",
        "published": "published",
        **ROLES,
    }
    kept = {name: value for name, value in (data | changes).items() if value is not None}
    return validate(IngestConfig, {"data": kept})


def test_the_store_keeps_every_publication_once(store: SeriesStore) -> None:
    frame = VintageFrame(revised_table(40), SCHEMA)
    first = store.write("grid", frame)
    assert (first.rows_new, first.rows_changed, first.rows_unchanged) == (frame.num_rows, 0, 0)
    again = store.write("grid", frame)
    assert (again.rows_new, again.rows_changed, again.rows_unchanged) == (0, 0, frame.num_rows)
    assert first.fingerprint == again.fingerprint
    back = store.read_vintages("grid")
    assert back.table.equals(frame.table)
    assert back.fingerprint() == frame.fingerprint()
    assert store.read("grid").fingerprint() == frame.latest().fingerprint()
    assert store.datasets()["rows"].to_list() == [frame.num_rows]
    part = store.read_vintages("grid", series=["s1"])
    assert part.table.equals(frame.table.filter(series_id="s1"))


def test_a_later_batch_adds_publications_in_any_order(store: SeriesStore) -> None:
    table = revised_table(40)
    late = table.filter(pl.col("published") > START + 20 * HOUR)
    early = table.filter(pl.col("published") <= START + 20 * HOUR)
    store.write("grid", VintageFrame(late, SCHEMA))
    record = store.write("grid", VintageFrame(early, SCHEMA))
    assert (record.rows_new, record.rows_changed) == (early.height, 0)
    assert store.read_vintages("grid").table.equals(VintageFrame(table, SCHEMA).table)
    wrong = early.head(5).with_columns(pl.col("wind") + 1.0)
    record = store.write("grid", VintageFrame(wrong, SCHEMA, require_targets=False))
    assert (record.rows_new, record.rows_changed) == (0, 5)  # the same publication, read again with other values


def test_publications_and_single_values_do_not_mix(store: SeriesStore) -> None:
    frame = VintageFrame(revised_table(40), SCHEMA)
    store.write("plain", frame.latest())
    with pytest.raises(
        DataError, match=r"'plain' is stored with one value a cell, the new rows have them \(setting pub"
    ):
        store.write("plain", frame)
    store.write("grid", frame)
    with pytest.raises(DataError, match="'grid' is stored with publication times, the new rows come without"):
        store.write("grid", frame.latest())
    with pytest.raises(DataError, match="'plain' keeps one value a cell; ingest it with the column of publication"):
        store.read_vintages("plain")
    assert store.read("plain").fingerprint() == frame.latest().fingerprint()


def test_a_store_says_which_version_may_write_it(store: SeriesStore) -> None:
    """A store without publications stays open to versions that know of none; one with them does not."""
    frame = VintageFrame(revised_table(40), SCHEMA)

    def written() -> str:
        with store.engine.connect() as connection:
            return str(connection.execute(text("SELECT value FROM tsf_info WHERE key = 'format'")).scalar())

    store.write("plain", frame.latest())
    assert written() == "1"
    store.write("grid", frame)
    assert written() == "2"


def test_ingest_counts_revisions_and_reads_them_back(workspace: Workspace) -> None:
    table = revised_table(60)
    config = source(workspace.root, table.sample(fraction=1, shuffle=True, seed=0))
    result = ingest(config, workspace)
    found = {(item["what"], item["count"]) for item in result.rows()}
    cells = table.n_unique(["series_id", "time"])
    assert (f"publications of {cells} rows (series and times)", table.height) in found
    revisions = next(item for item in result.rows() if item["what"].startswith("revisions:"))
    assert "load: 120 over 120 cells" in revisions["examples"]
    assert ingest(config, workspace).record.rows_unchanged == table.height
    history = load_history(workspace, "grid", masked=True)
    assert isinstance(history, VintageFrame)
    assert history.latest().fingerprint() == load_dataset(workspace, "grid").fingerprint()
    moment = START + 30 * HOUR
    want = VintageFrame(table, SCHEMA).as_of(moment)
    assert load_dataset(workspace, "grid", cutoff=moment).fingerprint() == want.fingerprint()


def test_settings_hold_for_every_moment(workspace: Workspace) -> None:
    """Roles, valid range, calendar and delays reach the frames of all moments."""
    config = source(
        workspace.root,
        revised_table(60),
        valid_range={"load": [0, 15]},
        calendar={"features": ["hour"]},
        publication_delay={"load": "1h", "flow": "3h"},
    )
    ingest(config, workspace)
    for data in ("grid", config.data):
        history = load_history(workspace, data, masked=True, extend=30)
        assert isinstance(history, VintageFrame)
        assert history.moment(START) == START + HOUR
        shown = history.as_of(START + 20 * HOUR)
        assert shown.schema.known == ("wind", "calendar.hour.sin", "calendar.hour.cos")
        one = shown.table.filter(series_id="s1")  # around 20: out of range
        assert one["load"].null_count() == one.height
        flow = shown.table.filter(series_id="s0").filter(pl.col("time") <= START + 20 * HOUR)["flow"]
        raw = VintageFrame(revised_table(60), SCHEMA).as_of(START + 20 * HOUR).table.filter(series_id="s0")["flow"]
        assert flow[2:20].to_list() == raw[:18].to_list()  # three hours after its time is two after the target's
        assert np.nanmax(load_dataset(workspace, data, masked=True, extend=30).table["load"].to_numpy()) <= 15
    fewer = config.data.model_copy(update={"past": ()})
    assert load_history(workspace, fewer).schema.past == ()
    for read in (load_history, load_dataset):
        with pytest.raises(
            DataError, match=r"ingested with publication_delay \{.*\}, the config says 2h; ingest it again"
        ):
            read(workspace, config.data.model_copy(update={"publication_delay": "2h"}))


def test_a_late_covariate_without_publications(workspace: Workspace) -> None:
    table = VintageFrame(revised_table(60), SCHEMA).latest().table
    config = source(workspace.root, table, published=None, publication_delay={"flow": "2h"})
    ingest(config, workspace)
    moved = load_dataset(workspace, "grid")
    assert load_history(workspace, "grid").fingerprint() == moved.fingerprint()
    assert moved.table.filter(series_id="s0")["flow"][2:].to_list() == (
        table.filter(series_id="s0")["flow"][:-2].to_list()
    )
    later = load_dataset(workspace, "grid", start=START + 30 * HOUR)  # a cut must not lose what moves in
    assert later.table.equals(moved.table.filter(pl.col("time") >= START + 30 * HOUR))


def test_a_batch_hides_targets_that_were_not_out(workspace: Workspace) -> None:
    from tsforge.data.vintages import Delays, newest, published_by

    frame = VintageFrame(revised_table(60), SCHEMA).latest()
    shown = newest(published_by(frame, START + 30 * HOUR, Delays("2h")))
    assert shown.last_observed()["time"].to_list() == [START + 28 * HOUR] * 2
    assert shown.table["time"].max() == frame.table["time"].max()  # known covariates stay


def test_the_report_of_revisions_against_a_loop() -> None:
    table = revised_table(30)
    found = {row["column"]: row for row in vintage_report(VintageFrame(table, SCHEMA)).to_dicts()}
    for name in SCHEMA.columns:
        cells: dict[Any, list[tuple[datetime, float]]] = {}
        for row in table.sort("published").iter_rows(named=True):
            if row[name] is not None:
                cells.setdefault((row["series_id"], row["time"]), []).append((row["published"], row[name]))
        changes = {key: sum(a[1] != b[1] for a, b in pairwise(c)) for key, c in cells.items()}
        delays = [(c[0][0] - key[1]).total_seconds() for key, c in cells.items()]
        row = found[name]
        assert row["values"] == len(cells)
        assert row["publications"] == sum(len(c) for c in cells.values())
        assert row["revised"] == sum(count > 0 for count in changes.values())
        assert row["revisions"] == sum(changes.values())
        assert row["revised_share"] == pytest.approx(row["revised"] / len(cells))
        assert row["mean_delay"].total_seconds() == pytest.approx(sum(delays) / len(delays))
    assert found["flow"]["median_delay"] == 2 * HOUR
    assert found["flow"]["revised_share"] == 0.0


def test_the_command_line_prints_it(workspace: Workspace) -> None:
    ingest(source(workspace.root, revised_table(40)), workspace)
    ran = CliRunner().invoke(app, ["data", "vintages", "grid", "--json", "--home", str(workspace.root)])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(ran.stdout)
    assert [row["column"] for row in rows] == ["load", "flow", "wind"]


def test_wide_tables_too(workspace: Workspace) -> None:
    table = pl.DataFrame(
        {
            "ds": ["2024-01-01", "2024-01-01", "2024-01-02"],
            "out": ["2024-01-01", "2024-02-01", "2024-01-02"],
            "a.y": [1.0, 1.5, 2.0],
            "b.y": [5.0, None, 6.0],
        }
    )
    changes = {"layout": "wide", "series": None, "separator": ".", "time": "ds", "published": "out", "targets": ["y"]}
    ingest(source(workspace.root, table, **changes, past=[], known=[], freq="1d"), workspace)
    history = load_history(workspace, "grid")
    assert isinstance(history, VintageFrame)
    assert history.as_of("2024-01-15").table["y"].to_list() == [1.0, 2.0, 5.0, 6.0]
    assert history.latest().table["y"].to_list() == [1.5, 2.0, 5.0, 6.0]


def _texts(**columns: list[str | None]) -> pl.DataFrame:
    rows = {"series_id": ["a", "a"], "time": ["2024-01-01T00:00", "2024-01-01T01:00"]}
    values = {"published": ["2024-01-01T02:00", "2024-01-01T03:00"], "load": ["1", "2"], "flow": ["1", "2"]}
    return pl.DataFrame(rows | values | {"wind": ["1", "2"]} | columns)


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (_texts(), {"published": "release"}, "no column 'release'.*set published"),
        (_texts(published=["2024-01-01T02:00", None]), {}, "1 of 2 rows have no time in column 'published' .*bad_rows"),
        (_texts(published=["2024-01-01T02:00", "soon"]), {}, "unreadable times in column 'published'"),
        (
            _texts(published=["2024-01-01T02:00Z", "2024-01-01T03:00Z"]),
            {},
            "'published' carry an offset, the times in 'time' do not; say .* with timezone",
        ),
        (
            _texts(time=["2024-01-01T00:00Z", "2024-01-01T01:00Z"]),
            {},
            "'published' carry no offset, the times in 'time' do",
        ),
        (
            _texts(published=["2023-12-31T23:00", "2024-01-01T03:00"]),
            {},
            "1 of 2 rows hold targets .* before their time",
        ),
        (
            _texts(time=["2024-01-01T00:00"] * 2, published=["2024-01-01T02:00"] * 2),
            {},
            "repeat the time and publication time of an earlier row.*set duplicates=mean, first or last$",
        ),
        (
            _texts(time=["2024-01-01T00:00"] * 2),
            {"published": None},
            "or name the column of publication times .published",
        ),
        (_texts(), {"publication_delay": {"wind": "2h"}}, "wind is known ahead by its role"),
        (_texts(), {"nulls": "erase"}, "nulls=erase has no meaning with published"),
        (_texts(), {"resample": {"every": "1h"}}, "resample would mix publications"),
        (_texts(), {"published": "time"}, "time, series and published must be different columns"),
        (_texts(), {"published": None, "published_format": "%Y"}, "published_format has no effect"),
        (_texts(), {"publication_delay": "soon"}, "'soon' is not a duration"),
    ],
)
def test_refused_with_what_to_do(
    table: pl.DataFrame, changes: dict[str, Any], message: str, workspace: Workspace
) -> None:
    with pytest.raises(TsforgeError, match=message):
        ingest(source(workspace.root, table, **changes), workspace)


def test_clocks_that_are_stated_are_believed(workspace: Workspace) -> None:
    table = _texts(published=["2024-01-01T02:00Z", "2024-01-01T03:00Z"])
    ingest(source(workspace.root, table, timezone="Europe/Berlin"), workspace)
    rows = load_history(workspace, "grid").table
    assert rows["time"][0] == datetime(2023, 12, 31, 23, tzinfo=UTC)
    assert rows["published"][0] == datetime(2024, 1, 1, 2, tzinfo=UTC)


def test_publication_times_have_a_format_of_their_own(workspace: Workspace) -> None:
    table = _texts(published=["02/01/2024", "03/01/2024"])
    ingest(source(workspace.root, table, published_format="%d/%m/%Y"), workspace)
    assert load_history(workspace, "grid").table["published"][1] == datetime(2024, 1, 3, tzinfo=UTC)


def test_killed_at_any_moment_loses_no_publication(kill_ingest: ModuleType, tmp_path: Path) -> None:
    """Each batch publishes new rows, revises older ones and corrects some of the publication before."""

    class Harness(kill_ingest.Harness):  # type: ignore[name-defined, misc]
        def __init__(self, folder: Path, **options: Any) -> None:
            super().__init__(folder, **options)
            data = self.config.data.model_copy(update={"published": "published"})
            self.config = self.config.model_copy(update={"data": data})
            (folder / "ingest.yaml").write_text(to_yaml(self.config), encoding="utf-8")

        def write_batch(self, number: int) -> pl.DataFrame:
            length = self.rows // kill_ingest.NUM_SERIES
            first = int(number * length * kill_ingest.SHIFT)
            row = pl.int_range(first, first + length, eager=True).alias("row")
            start = pl.lit(kill_ingest.START).cast(pl.Datetime("us", "UTC"))

            def part(publication: int, every: int) -> pl.DataFrame:
                out = int(publication * length * kill_ingest.SHIFT) + 3 * length
                return pl.concat(
                    pl.DataFrame({"row": row})
                    .filter(pl.col("row") % every == 0)
                    .select(
                        pl.lit(f"s{at}").alias("series"),
                        (start + pl.duration(minutes=pl.col("row"))).alias("time"),
                        (start + pl.duration(minutes=out)).alias("published"),
                        (pl.col("row") + number * 1.0).alias("x"),
                        pl.when(pl.col("row") % 7 > 0).then(pl.col("row") / 3).alias("y"),
                    )
                    for at in range(kill_ingest.NUM_SERIES)
                )

            batch = pl.concat([part(number, 1), *([part(number - 1, 9)] if number else [])])
            batch.write_parquet(self.folder / "batch.parquet")
            plain = batch.select(
                pl.format("{}@{}", "series", pl.col("published").cast(pl.Int64)).alias("series_id"),
                pl.col("time").cast(pl.Int64),
                "x",
                "y",
            )
            both = pl.concat([self.expected, plain])
            return both.unique(["series_id", "time"], keep="last", maintain_order=True).sort("series_id", "time")

        def stored(self) -> tuple[pl.DataFrame, list[str], str]:
            engine = create_engine(self.workspace.database_url)
            with engine.connect() as connection:
                health = str(connection.execute(text("PRAGMA integrity_check")).scalar())
                names = [str(n) for n in connection.execute(text("SELECT name FROM sqlite_master")).scalars()]
                tables = [name for name in names if name.startswith("tsf_obs_") and "autoindex" not in name]
                statuses = [
                    str(s) for s in connection.execute(text("SELECT status FROM tsf_batches ORDER BY id")).scalars()
                ]
                rows = connection.execute(
                    text(f"SELECT series_id || '@' || published, time, v1_x, v2_y FROM {tables[0]}")
                ).all()
            engine.dispose()
            table = pl.DataFrame([tuple(row) for row in rows], schema=self.expected.schema, orient="row")
            return table.sort("series_id", "time"), statuses, health

    harness = Harness(tmp_path, rows=20_000, seed=4)
    seconds = harness.undisturbed_seconds()
    assert harness.stored()[0].equals(harness.expected)
    rounds = [harness.attack(number, seconds * 1.3) for number in range(1, 5)]
    assert kill_ingest.summarise(rounds, seconds)["failures"] == []
    assert load_history(harness.workspace, "attacked").num_rows == harness.expected.height
