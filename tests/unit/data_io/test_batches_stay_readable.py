"""A batch after which nothing could read the data set is refused; a batch erases only what its source mentions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from sqlalchemy import event, text

from tsforge.core.errors import DataError
from tsforge.data import checks
from tsforge.data.findings import IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore
from tsforge.data.vintages import VintageFrame

START = datetime(2024, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def store(url: str) -> Iterator[SeriesStore]:
    with closing(SeriesStore(url)) as opened:
        yield opened


def rows(times: list[Any], freq: str, *, series: str = "s", values: list[float | None] | None = None) -> SeriesFrame:
    cells = pl.Series(values or [float(at) for at in range(len(times))], dtype=pl.Float64)
    table = pl.DataFrame({"series_id": series, "time": times, "x": cells})
    return SeriesFrame(table, SeriesSchema(targets=("x",), freq=freq), require_targets=False)


def hours(*numbers: int) -> list[datetime]:
    return [START + HOUR * number for number in numbers]


def days(*texts: str) -> list[date]:
    return [date.fromisoformat(text) for text in texts]


def sites(static: dict[str, dict[str, float]], *, start: datetime = START) -> SeriesFrame:
    """Return one row a series, with the static values of each."""
    names = tuple(next(iter(static.values())))
    table = pl.DataFrame({"series_id": list(static), "time": start, "x": 1.0})
    constants = pl.DataFrame({"series_id": list(static)} | {n: [static[s][n] for s in static] for n in names})
    return SeriesFrame(table, SeriesSchema(targets=("x",), static=names, freq="1h"), constants if names else None)


def refused(store: SeriesStore, batch: SeriesFrame | VintageFrame, *words: str) -> str:
    """Write a batch that has to be refused without a trace but its record; return the message."""
    before, listed = store.read("d"), store.datasets()
    with pytest.raises(DataError) as caught:
        store.write("d", batch)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert store.read("d").fingerprint() == before.fingerprint()
    assert store.datasets().equals(listed)
    record = store.batches("d").row(0, named=True)
    assert record["status"] == "refused"
    assert json.loads(record["reasons"])["error"] == message
    return message


MONTHS = [
    ("1mo", ("2024-01-31", "2024-02-29", "2024-03-31"), ("2024-04-01", "2024-05-01")),
    ("1mo", ("2024-01-29", "2024-02-29", "2024-03-29"), ("2024-04-30", "2024-05-31")),
    ("1mo", ("2024-04-30", "2024-05-31", "2024-06-30"), ("2024-07-30", "2024-08-30")),  # only a row between tells
    ("1mo", ("2024-04-30",), ("2024-05-29", "2024-06-29")),
    ("1q", ("2024-01-01", "2024-04-01"), ("2024-08-01",)),
    ("1y", ("2021-01-01", "2022-01-01", "2023-01-01"), ("2024-12-31",)),
]


@pytest.mark.parametrize(("freq", "stored", "new"), MONTHS)
def test_months_on_another_day_are_refused(
    store: SeriesStore, freq: str, stored: tuple[str, ...], new: tuple[str, ...]
) -> None:
    """They were taken, and then no command could read the data set any more."""
    store.write("d", rows(days(*stored), freq))
    refused(store, rows(days(*new), freq), f"from {new[0]} 00:00", f"from {stored[0]} 00:00", freq, "another name")
    refused(store, rows(days(*new), freq, series="other"), "another name")


def test_the_day_of_months_is_found_in_any_series(store: SeriesStore) -> None:
    store.write("d", rows(days("2024-04-30", "2024-06-30"), "1mo", series="b"))
    store.write("d", rows(days("2024-04-30"), "1mo", series="a"))
    store.write("d", rows(days("2024-05-30"), "1mo", series="b"))
    refused(store, rows(days("2024-07-31"), "1mo"), "another name")
    assert store.write("d", rows(days("2024-07-30"), "1mo")).rows_new == 1


@pytest.mark.parametrize(
    ("stored", "new"),
    [
        (("2024-01-31", "2024-02-29"), ("2024-03-31", "2024-04-30")),
        (("2024-04-30",), ("2024-05-31",)),  # month ends, as it turns out
        (("2024-04-30",), ("2024-05-30",)),  # day 30
        (("2024-01-30", "2024-02-29"), ("2024-03-30",)),
        (("2024-02-29",), ("2023-12-30",)),
        (("2024-01-30",), ("2024-02-29", "2024-04-30", "2024-06-30")),  # with gaps, filled as of month ends
        (("2024-06-30",), ("2024-02-29", "2024-01-31")),
    ],
)
def test_months_on_a_common_day_are_taken(store: SeriesStore, stored: tuple[str, ...], new: tuple[str, ...]) -> None:
    store.write("d", rows(days(*stored), "1mo"))
    assert store.write("d", rows(days(*new), "1mo")).rows_new == len(new)
    assert store.read("d").table["x"].count() == len(stored) + len(new)


def test_a_stray_time_far_from_the_stored_rows_is_refused(store: SeriesStore) -> None:
    store.write("d", rows(hours(*range(24)), "1h"))
    stray = rows([datetime(3024, 1, 2, tzinfo=UTC)], "1h")
    refused(store, stray, "8765833 rows for 25", "'s'", "3024-01-02", "2024-01-01", "repair the time", "another name")
    before = rows([datetime(1024, 1, 2, tzinfo=UTC)], "1h")
    refused(store, before, "1024-01-02")
    assert store.write("d", rows([datetime(3024, 1, 2, tzinfo=UTC)], "1h", series="other")).rows_new == 1
    assert store.read("d").num_rows == 25, "of a series of its own there is nothing to fill"


def test_the_limit_is_that_of_reading(store: SeriesStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_FILL_ROWS", 10)
    store.write("d", rows(hours(0, 1), "1h"))
    assert store.write("d", rows(hours(59), "1h")).rows_new == 1  # 60 rows for 3
    assert store.read("d").num_rows == 60
    refused(store, rows(hours(80), "1h"), "81 rows for 4")
    assert store.write("d", rows(hours(79), "1h")).rows_new == 1


def test_a_series_that_could_no_longer_be_read_alone_is_refused(
    store: SeriesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside many rows a stray time is within the limit for the whole data set."""
    monkeypatch.setattr(checks, "MAX_FILL_ROWS", 10)
    store.write("d", rows(hours(*range(100)), "1h", series="long"))
    store.write("d", rows(hours(0, 1), "1h", series="short"))
    refused(store, rows(hours(200), "1h", series="short"), "201 rows for 3", "'short'")
    both = [rows(hours(*range(100)), "1h", series="long"), rows(hours(0), "1h", series="thin")]
    both.append(rows(hours(200), "1h", series="thin"))
    parts = pl.concat([part.table for part in both])
    store.write("d", SeriesFrame(parts, both[0].schema))  # it never could be read alone
    assert store.write("d", rows(hours(201), "1h", series="thin")).rows_new == 1


def test_integer_time_and_months_are_counted_too(store: SeriesStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_FILL_ROWS", 10)
    store.write("d", rows([0, 2, 4], "2i"))
    refused(store, rows([200], "2i"), "101 rows for 4")
    store.remove("d")
    store.write("d", rows(days("2024-01-31", "2024-02-29"), "1mo"))
    refused(store, rows(days("2044-02-29"), "1mo"), "242 rows for 3")


def test_integers_further_apart_than_an_int64_holds_are_refused(store: SeriesStore) -> None:
    store.write("d", rows([-(2**63), -(2**63) + 1], "1i"))
    refused(store, rows([2**63 - 1], "1i"), f"{2**64} rows for 3")


def test_publications_are_counted_by_the_rows_they_are_about(
    store: SeriesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "MAX_FILL_ROWS", 10)
    schema = SeriesSchema(targets=("x",), freq="1h")

    def published(*numbers: int) -> VintageFrame:
        times = [time for time in hours(*numbers) for _ in range(3)]
        out = [time + HOUR * at for at, time in enumerate(times, 1)]
        return VintageFrame(pl.DataFrame({"series_id": "s", "time": times, "published": out, "x": 1.0}), schema)

    store.write("d", published(0, 1))
    refused(store, published(70), "71 rows for 3")
    assert store.write("d", published(50)).rows_new == 3


def test_a_static_column_that_some_series_lack_is_refused(store: SeriesStore) -> None:
    store.write("d", sites({"a": {"size": 1.0}, "b": {"size": 2.0}}))
    wider = sites({"a": {"size": 1.0, "area": 5.0}}, start=START + HOUR)
    refused(store, wider, "static column 'area'", "1 of 2 series (b)", "data.static", "another name")
    refused(store, sites({"c": {}}), "static column 'size'", "1 of 3 series (c)")
    refused(store, rows(hours(1), "1h", series="c"), "static column 'size'")
    whole = {"a": {"size": 1.0, "area": 5.0}, "b": {"size": 2.0, "area": 6.0}, "c": {"size": 3.0, "area": 7.0}}
    assert store.write("d", sites(whole)).rows_new == 1
    assert store.write("d", rows(hours(2), "1h", series="a")).rows_new == 1, "what is known need not be repeated"
    static = store.read("d").static
    assert static is not None
    assert static["area"].to_list() == [5.0, 6.0, 7.0]


def test_an_ordinary_batch_scans_no_rows(store: SeriesStore) -> None:
    """What the checks ask is answered by the extent of the data set: they send no statement of their own."""
    store.write("d", rows(hours(*range(100)), "1h"))
    store.write("m", rows(days("2024-01-31", "2024-02-29"), "1mo"))
    sent: list[str] = []
    event.listen(store.engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    store.write("d", rows(hours(100), "1h"))
    store.write("m", rows(days("2024-03-31"), "1mo"))
    asked = [text for text in sent if "tsf_obs" in text and text.lstrip().upper().startswith("SELECT")]
    assert len(asked) == 2, "the comparison with the stage of each batch"
    assert all("tsf_stage" in text for text in asked)


# --- erasing ---


def keys(*numbers: int, series: str = "s") -> pl.DataFrame:
    return pl.DataFrame({"series_id": series, "time": hours(*numbers)})


def test_gaps_of_the_source_erase_nothing(store: SeriesStore) -> None:
    store.write("d", rows(hours(*range(24)), "1h"))
    report = IngestReport("file", 2, 2)
    record = store.write("d", rows(hours(0, 23), "1h"), nulls="erase", present=keys(0, 23), report=report)
    assert (record.rows_new, record.rows_changed, record.rows_unchanged) == (0, 1, 1)
    assert store.read("d").table["x"].to_list() == [0.0, *map(float, range(1, 23)), 1.0]
    assert report.findings == []


def test_what_is_erased_is_counted(store: SeriesStore) -> None:
    store.write("d", rows(hours(*range(6)), "1h"))
    report = IngestReport("file", 3, 1)
    batch = rows(hours(1, 2, 9), "1h", values=[None, 2.0, None])  # the row of 04:00 was cut, it has no value
    record = store.write("d", batch, nulls="erase", present=keys(1, 2, 4, 9), report=report)
    assert (record.rows_new, record.rows_changed, record.rows_unchanged) == (0, 2, 1)
    assert store.read("d").table["x"].to_list() == [0.0, None, 2.0, 3.0, None, 5.0]
    assert store.datasets().select("rows", "end").row(0) == (4, "2024-01-01 05:00")
    found = {item["what"]: item["count"] for item in record.reasons["findings"]}
    assert found == {"stored values erased by missing ones (nulls=erase)": 2, "stored rows left without a value": 2}
    assert json.loads(store.batches("d")["reasons"][0]) == record.reasons
    assert [item.count for item in report.findings] == [2, 2]


def test_the_extent_follows_what_is_erased(store: SeriesStore) -> None:
    store.write("d", rows(hours(*range(6)), "1h"))
    store.write("d", rows(hours(4, 5), "1h", values=[None, None]), nulls="erase")
    assert store.datasets().row(0, named=True)["end"] == "2024-01-01 03:00"
    store.write("d", rows(hours(*range(4)), "1h", values=[None] * 4), nulls="erase")
    assert store.datasets().row(0, named=True)["end"] is None
    half = rows([time + HOUR / 2 for time in hours(0, 1)], "1h")
    assert store.write("d", half).rows_new == 2, "of no rows none are between"


def test_what_a_stored_series_lacks_stops_no_batch_of_others(store: SeriesStore) -> None:
    """As an older version left it: d without the static value of the others."""
    store.write("d", sites({"a": {"size": 1.0}, "d": {"size": 2.0}}))
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE tsf_series SET static = '{}' WHERE series_id = 'd'"))
    store.write("d", sites({"a": {"size": 1.0}}, start=START + timedelta(hours=1)))
    with pytest.raises(DataError, match=r"static column 'size' would be missing for 1 of 2 series \(d\)"):
        store.write("d", sites({"d": {}}, start=START + timedelta(hours=1)))
    store.write("d", sites({"d": {"size": 2.0}}, start=START + timedelta(hours=1)))
    assert store.read("d").num_rows == 4
