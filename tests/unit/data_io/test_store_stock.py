"""What a store holds up to some times, in numbers: any change of what was counted shows, no other one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Literal

import polars as pl
import pytest
from sqlalchemy import update

from tsforge.core.errors import DataError
from tsforge.data.findings import IngestReport
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore, Stock
from tsforge.data.store_tables import DATASETS
from tsforge.data.vintages import VintageFrame

SCHEMA = SeriesSchema(targets=("y",), past=("p",), known=("k",), freq="1h")
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
END = FIRST + timedelta(hours=9)


@pytest.fixture
def store(url: str) -> Iterator[SeriesStore]:
    with closing(SeriesStore(url)) as opened:
        yield opened


def rows(series: str, hours: list[int], **values: float | None) -> pl.DataFrame:
    cells = {name: values.get(name, 0.1 * len(name)) for name in ("y", "p", "k")}
    times = [FIRST + timedelta(hours=hour) for hour in hours]
    return pl.DataFrame(
        {"series_id": series, "time": times, **cells}, schema_overrides=dict.fromkeys("ypk", pl.Float64)
    )


def write(store: SeriesStore, *parts: pl.DataFrame, nulls: Literal["keep", "erase"] = "keep") -> int:
    frame = SeriesFrame(pl.concat(parts), SCHEMA, require_targets=False)
    return store.write("d", frame, nulls=nulls).id


def stock(store: SeriesStore, *, columns: tuple[str, ...] = ("y", "p"), after: int = 0, still: bool = False) -> Stock:
    ends = pl.DataFrame({"series_id": ["a", "b"], "time": [END, END]}).with_columns(pl.col("time").cast(pl.Int64))
    return store.stock("d", pl.concat([ends, ends]), columns, after=after, only_if_news=still)


def of(found: Stock, series: str) -> tuple[int, int, int]:
    return found.extents[series, round(END.timestamp() * 1e6)]


def test_what_changes_up_to_the_end_and_only_that_shows(store: SeriesStore) -> None:
    first = write(store, rows("a", list(range(14))), rows("b", [0, 1, 2], y=0.0))
    begun = stock(store)
    assert (begun.batch, begun.news) == (first, ((first, 17, 0),))
    assert of(begun, "a")[:2] == (10, 10)
    assert of(begun, "b")[:2] == (3, 3)
    again = write(store, rows("a", [1]))
    unchanged = stock(store, after=first, still=True)
    assert (unchanged.batch, unchanged.news, unchanged.extents) == (again, (), {})
    assert stock(store, after=first).extents == begun.extents
    write(store, rows("a", [10, 14], y=7.0), rows("a", [3], k=5.0))  # after the end; a column that is not watched
    later = stock(store, after=first, still=True)
    assert later.news == ((later.batch, 1, 2),)
    assert later.extents == begun.extents
    write(store, rows("b", [5]))
    late = stock(store)
    assert of(late, "b")[:2] == (4, 4)
    assert of(late, "a") == of(begun, "a")
    write(store, rows("b", [1], y=0.1 + 1e-12))
    revised = stock(store)
    assert of(revised, "b")[:2] == (4, 4)
    assert of(revised, "b")[2] != of(late, "b")[2]
    write(store, rows("b", [2], y=None), nulls="erase")  # 0 and missing are not the same
    assert of(stock(store), "b")[2] != of(revised, "b")[2]
    assert revised.made == begun.made
    with pytest.raises(DataError, match="no dataset 'other'"):
        store.stock("other", pl.DataFrame({"series_id": ["a"], "time": [0]}), ["y"])
    store.remove("d")
    write(store, rows("a", list(range(10))))
    anew = stock(store, columns=("sum",))  # nothing of that name is stored: all columns count
    assert anew.made != begun.made
    assert of(anew, "a")[:2] == (10, 10)
    assert len(anew.extents) == 1


def test_values_that_change_places_show(store: SeriesStore) -> None:
    write(store, rows("a", [1], y=1.0), rows("a", [2], y=2.0))
    before = stock(store)
    write(store, rows("a", [1], y=2.0), rows("a", [2], y=1.0))
    assert of(stock(store), "a")[2] != of(before, "a")[2]


def test_a_batch_that_is_still_at_work_is_counted_when_it_is_done(store: SeriesStore) -> None:
    first = write(store, rows("a", [1]))
    store._begin("d", IngestReport("killed", 1, 1))
    last = write(store, rows("a", [2]))  # which says of the one before that it was interrupted
    assert stock(store).batch == last
    store._begin("d", IngestReport("waits", 1, 1))
    found = stock(store)
    assert (found.batch, [batch for batch, *_ in found.news]) == (last, [first, last])


def test_publications_are_counted_beside_rows_and_only_the_last_values_are_watched(store: SeriesStore) -> None:
    schema = SeriesSchema(targets=("y",), past=("p",), freq="1h")
    cells = [(1.0, None), (1.0, 4.0), (None, 4.0), (1.0, None), (5.0, None), (5.0, 0.0)]
    digests = []
    for published, (y, p) in enumerate(cells, start=1):
        table = pl.DataFrame(
            {"series_id": ["a"], "time": [FIRST], "y": [y], "p": [p]},
            schema_overrides={"y": pl.Float64, "p": pl.Float64},
        ).with_columns(published=pl.lit(FIRST + timedelta(hours=published)))
        store.write("d", VintageFrame(table, schema, require_targets=False))
        rows, publications, digest = of(stock(store), "a")
        assert (rows, publications) == (1, published)
        digests.append(digest)
    assert digests[1] == digests[2] == digests[3], "published again"
    assert len(set(digests)) == 4


def test_whether_a_batch_has_come_is_asked_of_one_data_set_alone(store: SeriesStore) -> None:
    with pytest.raises(DataError, match="no dataset 'd'"):
        store.changed("d")
    write(store, rows("a", [1]))
    before = store.changed("d")
    store.write("other", SeriesFrame(rows("z", [1]), SCHEMA))
    with store.engine.begin() as connection:
        connection.execute(update(DATASETS).where(DATASETS.c.name == "other").values(columns="damaged"))
    assert store.changed("d") == before
    write(store, rows("a", [2]))
    assert store.changed("d") != before
    with pytest.raises(DataError, match="no dataset 'none'"):
        store.changed("none")
