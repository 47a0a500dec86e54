"""The series store, on SQLite and on a real PostgreSQL: what goes in comes out, once, corrected, and never in part."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sqlalchemy import create_engine, event, text

from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.data.findings import IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.sql import safe_url
from tsforge.data.store import SeriesStore
from tsforge.scheduling.ledger import Ledger

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(url: str) -> Iterator[SeriesStore]:
    opened = SeriesStore(url)
    yield opened
    opened.close()


def frame(
    values: dict[str, list[tuple[float | None, ...]]],
    targets: tuple[str, ...] = ("x",),
    *,
    start: datetime = START,
    constants: pl.DataFrame | None = None,
    **roles: tuple[str, ...],
) -> SeriesFrame:
    """Build hourly series from rows of values."""
    schema = SeriesSchema(targets=targets, freq="1h", **roles)
    rows = [
        {"series_id": name, "time": start + timedelta(hours=at), **dict(zip(schema.columns, row, strict=True))}
        for name, series in values.items()
        for at, row in enumerate(series)
    ]
    types: dict[str, Any] = {"series_id": pl.String, "time": pl.Datetime("us", "UTC")}
    types |= dict.fromkeys(schema.columns, pl.Float64)
    return SeriesFrame(pl.DataFrame(rows, schema=types), schema, constants, require_targets=False)


def stored_rows(url: str) -> int:
    """Count the observations by the database itself, past the code under test."""
    engine = create_engine(url)
    with engine.connect() as connection:
        if url.startswith("sqlite"):
            tables = connection.execute(text("SELECT name FROM sqlite_master WHERE name LIKE 'tsf_obs_%'")).scalars()
        else:
            tables = connection.execute(
                text("SELECT table_name FROM information_schema.tables WHERE table_name LIKE 'tsf_obs_%'")
            ).scalars()
        total = sum(
            int(connection.execute(text(f'SELECT count(*) FROM "{name}"')).scalar_one()) for name in list(tables)
        )
    engine.dispose()
    return total


def test_a_frame_comes_back_as_it_was(store: SeriesStore) -> None:
    rng = np.random.default_rng(1)
    awkward = [1 / 3, 1e-308, -1.7976931348623157e308, 0.1 + 0.2, 5e-324]
    values = [(value, float(rng.normal())) for value in awkward] + [(None, 2.0), (None, None), (3.0, None)]
    static = pl.DataFrame({"series_id": ["b", "a"], "area": [2.5, 1.5]})
    given = frame({"a": values, "b": values[::-1]}, constants=static, past=("p",), static=("area",))
    store.write("data", given)
    back = store.read("data")
    assert back.schema == given.schema
    assert back.table.equals(given.table)
    assert back.static is not None
    assert back.static.equals(given.static)
    assert back.fingerprint() == given.fingerprint()


def test_static_values_are_corrected_and_kept(store: SeriesStore) -> None:
    def sites(**area: float) -> SeriesFrame:
        table = pl.DataFrame({"series_id": list(area), "area": list(area.values())})
        return frame({name: [(1.0,)] for name in area}, constants=table, static=("area",))

    store.write("data", sites(a=1.0, b=2.0))
    store.write("data", sites(b=3.0, c=4.0))
    static = store.read("data").static
    assert static is not None
    assert dict(static.rows()) == {"a": 1.0, "b": 3.0, "c": 4.0}


def test_integer_time_comes_back(store: SeriesStore) -> None:
    schema = SeriesSchema(targets=("x",), freq="1i")
    table = pl.DataFrame({"series_id": "s", "time": [0, 1, 3], "x": [1.0, 2.0, 4.0]})
    store.write("steps", SeriesFrame(table, schema))
    assert store.read("steps").table["time"].to_list() == [0, 1, 2, 3]
    assert store.read("steps", start=1, end=2).table["x"].to_list() == [2.0]
    assert store.datasets().row(0, named=True)["end"] == "3"


def test_writing_the_same_rows_again_changes_nothing(store: SeriesStore, url: str) -> None:
    given = frame({"a": [(1.0,), (2.0,), (None,)], "b": [(3.0,)]})
    first = store.write("data", given)
    again = store.write("data", given)
    assert (first.rows_new, first.rows_changed, first.rows_unchanged) == (3, 0, 0)
    assert (again.rows_new, again.rows_changed, again.rows_unchanged) == (0, 0, 3)
    assert first.fingerprint == again.fingerprint
    assert stored_rows(url) == 3


def test_overlap_adds_corrects_and_keeps(store: SeriesStore, url: str) -> None:
    store.write("data", frame({"a": [(1.0,), (2.0,), (3.0,), (4.0,)]}))
    later = frame({"a": [(3.0,), (40.0,), (5.0,)]}, start=START + timedelta(hours=2))
    record = store.write("data", later)
    assert (record.rows_new, record.rows_changed, record.rows_unchanged) == (1, 1, 1)
    assert store.read("data").table["x"].to_list() == [1.0, 2.0, 3.0, 40.0, 5.0]
    assert stored_rows(url) == 5


def test_a_null_keeps_the_older_value_unless_told_to_erase(store: SeriesStore, url: str) -> None:
    store.write("data", frame({"a": [(1.0, 5.0), (2.0, 6.0), (3.0, 7.0)]}, ("x", "y")))
    nulls = frame({"a": [(None, 50.0), (None, None), (3.5, 7.0)]}, ("x", "y"))
    kept = store.write("data", nulls)
    assert (kept.rows_new, kept.rows_changed, kept.rows_unchanged) == (0, 2, 0)
    assert store.read("data").table.select("x", "y").rows() == [(1.0, 50.0), (2.0, 6.0), (3.5, 7.0)]
    erased = store.write("data", nulls, nulls="erase")
    assert (erased.rows_new, erased.rows_changed, erased.rows_unchanged) == (0, 2, 1)
    back = store.read("data").table
    assert back["x"].to_list() == [None, None, 3.5]
    assert back["y"].to_list() == [50.0, None, 7.0]
    assert stored_rows(url) == 2, "a row without any value is not kept"
    assert store.datasets()["rows"].to_list() == [2]


def test_a_new_column_widens_the_table_and_a_missing_one_stays(store: SeriesStore) -> None:
    store.write("data", frame({"a": [(1.0,), (2.0,)]}))
    wider = frame({"a": [(20.0, 9.0), (3.0, 8.0)]}, ("x", "y"), start=START + timedelta(hours=1))
    record = store.write("data", wider)
    assert (record.rows_new, record.rows_changed) == (1, 1)
    back = store.read("data")
    assert back.schema.targets == ("x", "y")
    assert back.table["x"].to_list() == [1.0, 20.0, 3.0]
    assert back.table["y"].to_list() == [None, 9.0, 8.0]
    store.write("data", frame({"a": [(100.0,)]}))
    assert store.read("data").table.row(0) == ("a", START, 100.0, None)


def test_rows_between_the_stored_ones_are_refused(store: SeriesStore, url: str) -> None:
    """They were taken, and then nothing could read the data set any more."""
    store.write("d", frame({"a": [(1.0,), (2.0,)]}))
    late = frame({"a": [(3.0,)]}, start=START + timedelta(hours=7, minutes=30))
    with pytest.raises(DataError, match=r"from 2024-01-01 07:30.* lie between those that are stored \(from 2024-01-01"):
        store.write("d", late)
    assert stored_rows(url) == 2
    store.write("d", frame({"b": [(3.0,)]}, start=START - timedelta(days=3)))
    assert store.read("d").num_rows == 3


def test_another_role_or_frequency_is_refused_and_recorded(store: SeriesStore, url: str) -> None:
    store.write("data", frame({"a": [(1.0, 2.0)] * 2}, ("x", "y")))
    with pytest.raises(DataError, match=r"cannot change the role of 'y' from targets to past"):
        store.write("data", frame({"a": [(1.0, 2.0)] * 2}, ("x",), past=("y",)))
    daily = SeriesFrame(
        pl.DataFrame({"series_id": "a", "time": [START, START + timedelta(days=1)], "x": [1.0, 2.0]}),
        SeriesSchema(targets=("x",), freq="1d"),
    )
    with pytest.raises(DataError, match="has freq 1h, the new rows have 1d"):
        store.write("data", daily)
    records = store.batches("data")
    assert records["status"].to_list() == ["refused", "refused", "done"]
    assert "has freq 1h" in json.loads(records["reasons"][0])["error"]
    assert stored_rows(url) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("T", "t"),
        ('a"b', "x; DROP TABLE tsf_datasets", "%(y)s :z ?"),
        ("x" * 90, "x" * 90 + "y"),
        ("temp (°C)", "温度", " "),
    ],
    ids=["case", "sql", "long", "unicode"],
)
def test_any_column_name_is_safe(store: SeriesStore, names: tuple[str, ...]) -> None:
    row = tuple(float(at) for at in range(len(names)))
    given = frame({"it's": [row, row], 'x"; --': [row]}, names)
    store.write("data", given)
    store.write("data", given)
    assert store.read("data").table.equals(given.table)
    assert store.read("data", series=["it's"]).series_ids == ("it's",)


def test_datasets_whose_names_differ_in_case_are_two(store: SeriesStore) -> None:
    store.write("ETTh1", frame({"a": [(1.0,)]}))
    store.write("etth1", frame({"a": [(2.0,)]}))
    assert store.read("ETTh1").table["x"].to_list() == [1.0]
    assert store.read("etth1").table["x"].to_list() == [2.0]


def test_reading_some_series_and_a_span(store: SeriesStore) -> None:
    given = frame({name: [(float(at),) for at in range(10)] for name in ("a", "b", "c")})
    store.write("data", given)
    part = store.read("data", series=["a", "c"], start=START + timedelta(hours=2), end="2024-01-01T04:00")
    assert part.table.equals(given.select_series(["a", "c"]).between("2024-01-01T02:00", "2024-01-01T04:00").table)
    with pytest.raises(DataError, match=r"has no series d \(known: a, b, c\)"):
        store.read("data", series=["d"])
    with pytest.raises(DataError, match="has no rows between 2030-01-01"):
        store.read("data", start="2030-01-01")


def test_an_unknown_dataset_is_named_with_its_neighbours(store: SeriesStore) -> None:
    with pytest.raises(DataError, match="the store is empty"):
        store.read("weather")
    store.write("weather", frame({"a": [(1.0,)]}))
    with pytest.raises(DataError, match=r"no dataset 'wether' in the store; did you mean 'weather'\?"):
        store.read("wether")


def test_datasets_and_batches_are_listed(store: SeriesStore) -> None:
    assert store.datasets().height == 0
    assert store.batches().height == 0
    report = IngestReport("file.csv", rows_in=7)
    report.add("refused", "unreadable times", 2, ("row 3: 'x'",))
    store.write("data", frame({"a": [(1.0,), (2.0,)], "b": [(1.0,)]}), report=report, config={"max_age": "2h"})
    listed = store.datasets().row(0, named=True)
    assert (listed["name"], listed["freq"], listed["series"], listed["rows"], listed["columns"]) == (
        "data",
        "1h",
        2,
        3,
        1,
    )
    assert (listed["start"], listed["end"]) == ("2024-01-01 00:00", "2024-01-01 01:00")
    assert store.config("data") == {"max_age": "2h"}
    batch = store.batches("data").row(0, named=True)
    assert (batch["source"], batch["rows_in"], batch["rows_refused"], batch["status"]) == ("file.csv", 7, 2, "done")
    assert json.loads(batch["reasons"])["findings"][0]["examples"] == ["row 3: 'x'"]
    assert abs((batch["finished"] - datetime.now(UTC)).total_seconds()) < 60


def test_labels_are_kept_and_replaced(store: SeriesStore) -> None:
    labels = pl.DataFrame(
        {"series_id": ["a"], "start": [START], "end": [START], "kind": ["spike"], "variates": [["x"]]},
        schema_overrides={"start": pl.Datetime("us", "UTC"), "end": pl.Datetime("us", "UTC")},
    )
    given = frame({"a": [(1.0,), (2.0,)]})
    for _ in range(2):
        store.write("data", given, labels=labels)
    assert store.labels("data").equals(labels)


def test_removing_a_dataset_leaves_the_others_and_its_records(store: SeriesStore) -> None:
    for name in ("one", "two"):
        store.write(name, frame({"a": [(1.0,)]}))
    store.remove("one")
    assert store.datasets()["name"].to_list() == ["two"]
    assert store.batches("one").height == 1
    assert store.read("two").num_rows == 1


def test_a_failure_inside_the_transaction_leaves_nothing_behind(
    store: SeriesStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("data", frame({"a": [(1.0,), (2.0,)]}))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tsforge.data.store.write_series", stop)  # after the rows, before the record
    with pytest.raises(KeyboardInterrupt):
        store.write("data", frame({"a": [(10.0, 1.0), (20.0, 1.0)]}, ("x", "y")))
    monkeypatch.undo()
    assert store.read("data").table["x"].to_list() == [1.0, 2.0]
    assert store.read("data").schema.targets == ("x",), "the new column is rolled back too"
    assert store.batches("data")["status"].to_list() == ["interrupted", "done"]


def test_a_batch_left_running_by_a_killed_process_is_marked(store: SeriesStore, url: str) -> None:
    store.write("data", frame({"a": [(1.0,)]}))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE tsf_batches SET status = 'running', finished = NULL"))
    engine.dispose()
    store.write("data", frame({"a": [(1.0,)]}))
    assert store.batches("data")["status"].to_list() == ["done", "interrupted"]


def test_too_many_columns_are_refused(store: SeriesStore) -> None:
    names = tuple(f"c{at}" for at in range(801))
    with pytest.raises(DataError, match="801 columns are more than the 800"):
        store.write("data", frame({"a": [tuple(map(float, range(801)))]}, names))


def test_the_widest_dataset_can_be_written_and_corrected(store: SeriesStore) -> None:
    names = tuple(f"c{at}" for at in range(800))
    store.write("data", frame({"a": [tuple(map(float, range(800)))]}, names))
    record = store.write("data", frame({"a": [tuple(map(float, range(1, 801)))]}, names))
    assert (record.rows_new, record.rows_changed) == (0, 1)


def test_a_store_of_a_newer_format_is_left_alone(store: SeriesStore, url: str) -> None:
    store.write("data", frame({"a": [(1.0,)]}))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE tsf_info SET value = '99'"))
    uses: list[Callable[[], object]] = [
        lambda: store.write("data", frame({"a": [(2.0,)]})),
        lambda: store.read("data"),
        lambda: store.series_ids("data"),
        store.datasets,
        store.batches,
    ]
    for use in uses:
        with pytest.raises(BackendError, match=r"newer tsforge \(store format 99, this one reads up to 2\); upgrade"):
            use()
    for value in ("abc", "", "0", "-1"):
        with engine.begin() as connection:
            connection.execute(text("UPDATE tsf_info SET value = :value"), {"value": value})
        for use in uses:
            with pytest.raises(BackendError, match=r"the store at .* is damaged: it states no valid format version"):
                use()
    engine.dispose()


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = SeriesStore(f"sqlite:///{tmp_path / 'store.db'}")
    store.write("data", frame({"a": [(1.0,)]}))

    def few_pages(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count=40").close()

    event.listen(store.engine, "connect", few_pages)
    big = frame({"a": [(float(at),) for at in range(20_000)]})
    with pytest.raises(BackendError, match=r"cannot write dataset 'data' to .*full.*free space.*nothing was changed"):
        store.write("data", big)
    event.remove(store.engine, "connect", few_pages)
    assert store.read("data").table["x"].to_list() == [1.0]
    assert store.batches("data")["status"].to_list() == ["failed", "done"]
    assert store.write("data", big).rows_new == 19_999


def test_a_file_size_limit_of_the_system_loses_nothing(tmp_path: Path) -> None:
    store = SeriesStore(f"sqlite:///{tmp_path / 'store.db'}")
    store.write("data", frame({"a": [(1.0,)]}))
    code = """
import resource, signal, sys
import polars as pl
from datetime import UTC, datetime
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.sql import safe_url
from tsforge.data.store import SeriesStore
from tsforge.scheduling.ledger import Ledger
from tsforge.core.errors import BackendError
times = pl.select(pl.datetime_range(datetime(2024, 1, 1), datetime(2030, 1, 1), "1h", time_zone="UTC")).to_series()
table = pl.DataFrame({"series_id": ["a"] * len(times), "time": times, "x": [1.5] * len(times)})
frame = SeriesFrame(table, SeriesSchema(targets=("x",), freq="1h"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    SeriesStore(sys.argv[1]).write("data", frame)
except BackendError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path / 'store.db'}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "cannot write dataset 'data'" in result.stdout
    assert "nothing was changed" in result.stdout
    assert store.read("data").table["x"].to_list() == [1.0]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="cannot create the folder"):
        SeriesStore(f"sqlite:///{tmp_path / 'file' / 'deep' / 'store.db'}")


def test_a_file_that_is_no_database_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("this is plain text, and long enough to be looked at as a header" * 20)
    with pytest.raises(BackendError, match="not a SQLite database; check the path"):
        SeriesStore(f"sqlite:///{path}").write("data", frame({"a": [(1.0,)]}))
    assert path.read_text().startswith("this is plain text")


def test_a_read_only_database_is_one_message(postgres_url: str, tmp_path: Path) -> None:
    store = SeriesStore(postgres_url)
    store.write("data", frame({"a": [(1.0,)]}))
    store.close()
    locked = SeriesStore(f"{postgres_url}&options=-cdefault_transaction_read_only%3Don")
    with pytest.raises(BackendError, match=r"read-only"):
        locked.write("data", frame({"a": [(2.0,)]}))
    assert locked.read("data").table["x"].to_list() == [1.0]
    locked.close()


def test_a_server_that_is_gone_is_one_message_without_the_password() -> None:
    store = SeriesStore("postgresql+psycopg://user:s3cret@127.0.0.1:1/none?connect_timeout=2")
    with pytest.raises(BackendError, match="the server does not answer") as caught:
        store.read("data")
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host/db?user=me&password=s3cret", "postgresql://host/db?password=***&user=me"),
        (
            "postgresql://host/db?PASSWORD=s3cret&sslpassword=s3cret",
            "postgresql://host/db?PASSWORD=***&sslpassword=***",
        ),
        ("postgresql://host/db?password=s3cret&password=s3cret", "postgresql://host/db?password=***"),
        ("mysql+x://host/db?passwd=s3cret&ssl_key=/k", "mysql+x://host/db?passwd=***&ssl_key=%2Fk"),
        ("snowflake://u@acc/db?token=s3cret", "snowflake://u@acc/db?token=***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("sqlite:////tmp/a.db?timeout=5", "sqlite:////tmp/a.db?timeout=5"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address: str, shown: str) -> None:
    assert safe_url(address) == shown


def test_a_password_in_the_query_of_an_address_is_in_no_message() -> None:
    address = "postgresql+psycopg://127.0.0.1:1/none?user=me&password=s3cret&connect_timeout=2"
    for ask in (lambda: SeriesStore(address).read("data"), lambda: Ledger(address)):
        with pytest.raises(BackendError, match=r"password=\*\*\*") as caught:
            ask()
        assert "s3cret" not in str(caught.value)


def test_connections_that_the_server_ended_are_replaced(postgres_url: str) -> None:
    store = SeriesStore(postgres_url)
    store.write("data", frame({"a": [(1.0,)]}))
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()
    assert store.read("data").num_rows == 1
    store.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "no URL such as sqlite:///store.db"),
        ("postgresql+psycopg://user:s3cret@127.0.0.1:xx/none", "has a port that is no number"),
        ("postgresql+psycopg://user:s3@cret@127.0.0.1/none", "write %40 for one in a password"),
        ("mysql://user@host/name", "'mysql' is not supported; use sqlite or postgresql"),
        ("sqlite://", "in-memory SQLite database holds nothing"),
    ],
)
def test_unusable_addresses_are_refused(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeriesStore(address)


def test_sqlite_is_set_up_to_survive(tmp_path: Path) -> None:
    store = SeriesStore(f"sqlite:///{tmp_path / 'store.db'}")
    store.write("data", frame({"a": [(1.0,)]}))
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000


def test_two_processes_writing_at_once_lose_nothing(store: SeriesStore, url: str) -> None:
    code = """
import sys
from datetime import UTC, datetime
import polars as pl
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.sql import safe_url
from tsforge.data.store import SeriesStore
from tsforge.scheduling.ledger import Ledger
times = pl.select(pl.datetime_range(datetime(2024, 1, 1), datetime(2024, 1, 8), "1h", time_zone="UTC")).to_series()
for name in sys.argv[2].split(","):
    table = pl.DataFrame({"series_id": [name] * len(times), "time": times, "x": [1.5] * len(times)})
    SeriesStore(sys.argv[1]).write("data", SeriesFrame(table, SeriesSchema(targets=("x",), freq="1h")))
"""
    halves = ["a,b,c,d,e", "c,d,e,f,g"]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, url, half], stderr=subprocess.PIPE, text=True) for half in halves
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert stored_rows(url) == 7 * 169
    assert store.datasets()["rows"].to_list() == [7 * 169]
    assert set(store.batches("data")["status"]) == {"done"}


def damage(store: SeriesStore, statement: str) -> None:
    with store.engine.begin() as connection:
        assert connection.execute(text(statement)).rowcount == 1


@pytest.mark.parametrize("content", ["torn", "[]", "3", ""])
def test_static_values_that_cannot_be_read_are_named(store: SeriesStore, content: str) -> None:
    constants = pl.DataFrame({"series_id": ["a", "b"], "area": [2.5, 1.5]})
    given = frame({"a": [(1.0,)], "b": [(1.0,)]}, constants=constants, static=("area",))
    store.write("data", given)
    damage(store, f"UPDATE tsf_series SET static = '{content}' WHERE series_id = 'b'")
    for use in (lambda: store.read("data"), lambda: store.write("data", given)):
        with pytest.raises(BackendError, match=r"'data': the column static of series 'b'.*tsf_series.*backup"):
            use()
    assert store.batches("data")["status"].to_list() == ["failed", "done"]


@pytest.mark.parametrize("content", ["torn", "{}"])
def test_labels_that_cannot_be_read_are_named(store: SeriesStore, content: str) -> None:
    row = {"series_id": "a", "start": START, "end": START, "kind": "spike", "variates": ["x"]}
    labels = pl.DataFrame([row], schema_overrides={"start": pl.Datetime("us", "UTC"), "end": pl.Datetime("us", "UTC")})
    store.write("data", frame({"a": [(1.0,)]}), labels=labels)
    damage(store, f"UPDATE tsf_labels SET variates = '{content}'")
    with pytest.raises(BackendError, match=r"'data': the column variates of a label of series 'a'.*tsf_labels.*backup"):
        store.labels("data")
    assert store.read("data").num_rows == 1, "the data itself is whole"
