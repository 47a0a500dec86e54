"""Publications of rows that a stream has taken are a bound on revised values, beside changed rows."""

from __future__ import annotations

import polars as pl

from tsforge.app.stream_late import LeftOut, compared
from tsforge.data.store import Extent, Stock

OLD = pl.DataFrame({"series_id": ["a", "b"], "time": [10, 10]})


def left_out(then: Extent, now: Extent, *, changed: int = 0) -> LeftOut:
    noted = {"made": "once", "series": {"a": list(then)}}
    return compared(
        noted, OLD, Stock(made="once", batch=7, news=((6, 3, 0), (7, 1, changed)), extents={("a", 10): now})
    )


def test_new_publications_of_old_rows_are_a_bound() -> None:
    found = left_out(Extent(5, 5, 1), Extent(6, 9, 2))  # one late row, three publications of others
    assert (found.late, found.revised, found.batches) == ({"a": 1}, 3, (6, 7))
    assert left_out(Extent(5, 5, 1), Extent(5, 5, 1), changed=4).revised == 0  # of rows that were not taken
    assert left_out(Extent(5, 5, 1), Extent(5, 5, 2), changed=4).revised == 4
