"""A stream over a hierarchy: a sum whose members change is another series, and waits for a whole context of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.fit import FitConfig, fit
from tsforge.app.forecast import PredictConfig, predict
from tsforge.app.ingest import IngestConfig, ingest, load_dataset
from tsforge.app.stream import StreamConfig, StreamResult, stream
from tsforge.artifact import load_artifact
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace
from tsforge.forecasting.stream import Stream

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
HISTORY, CONTEXT = 200, 24
SUMS = ("n", "total")
BY_NAME = {"levels": ["region", "shop"], "separator": "_"}
BY_REGION = {"levels": ["region"]}


class Shops:
    """A workspace with shops whose sums are made on reading; ``static`` takes the regions from a column."""

    def __init__(self, folder: Path, *, static: bool = False) -> None:
        self.folder = folder
        self.static = static
        self.sums = ("region=1", "total") if static else SUMS
        self.workspace = Workspace(root=folder, database_url=f"sqlite:///{folder / 'store.db'}", tracking_uri="")

    def data(self, table: pl.DataFrame) -> dict[str, Any]:
        table.write_parquet(self.folder / "rows.parquet")
        source = {"kind": "parquet", "path": str(self.folder / "rows.parquet")}
        roles = {"targets": ["y"], "series": "shop", "time": "time", "static": ["region"] if self.static else []}
        tree = BY_REGION if self.static else BY_NAME
        return {"name": "shops", "source": source, "layout": "long", "freq": "1h", "hierarchy": tree, **roles}

    def bring(self, *tables: pl.DataFrame) -> None:
        ingest(validate(IngestConfig, {"data": self.data(pl.concat(tables))}), self.workspace)

    def fit(self, **changes: Any) -> None:
        history = pl.concat([self.hours(name, 0, HISTORY) for name in ("n_a", "n_b")])
        self.bring(history)
        settings = {
            "data": self.data(history),
            "model": {"name": "linear"},
            "window": {"context_length": CONTEXT, "horizon": 6},
            "tracking": {"enabled": False},
        }
        fit(validate(FitConfig, settings | changes), self.workspace)

    def hours(self, shop: str, begin: int, end: int) -> pl.DataFrame:
        place = np.arange(begin, end)
        noise = np.random.default_rng(sum(map(ord, shop))).normal(0, 0.2, 2000)[place]
        times = [FIRST + timedelta(hours=int(hour)) for hour in place]
        level = 10.0 * (ord(shop[-1]) - ord("a") + 1)
        table = pl.DataFrame({"shop": [shop] * len(place), "time": times, "y": level + np.sin(place / 4) + noise})
        return table.with_columns(region=pl.lit(1)) if self.static else table

    def run(self, **settings: Any) -> StreamResult:
        return stream(StreamConfig(name="s", **settings), self.workspace)


@pytest.fixture(params=[False, True], ids=["by_name", "by_column"])
def shops(request: pytest.FixtureRequest, tmp_path: Path) -> Shops:
    made = Shops(tmp_path, static=request.param)
    made.fit()
    return made


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def series(result: StreamResult) -> list[str]:
    return list(result.forecast.table["series_id"].unique().sort())


def test_a_sum_with_a_new_member_waits_for_a_whole_context_of_its_own(
    shops: Shops, caplog: pytest.LogCaptureFixture
) -> None:
    assert series(shops.run()) == sorted(("n_a", "n_b", *shops.sums))
    told(caplog)
    stop = HISTORY + 10
    shops.bring(*(shops.hours(name, HISTORY, stop) for name in ("n_a", "n_b", "n_c")))
    joined = shops.run()
    assert set(joined.scores["series_id"]) == {"n_a", "n_b"}, "no value of the new sum is judged by the old one"
    assert series(joined) == ["n_a", "n_b"]
    assert joined.waiting == tuple(sorted(("n_c", *shops.sums)))
    fresh = stream(StreamConfig(name="fresh"), shops.workspace)
    assert series(joined) == series(fresh)
    (warning,) = told(caplog)
    assert warning.startswith("2 sums that stream 's' follows are made of other series than before (")
    assert f"{shops.sums[0]}: with n_c" in warning
    shops.bring(*(shops.hours(name, stop, HISTORY + CONTEXT) for name in ("n_a", "n_b", "n_c")))
    whole = shops.run()
    assert set(whole.added) == {"n_c", *shops.sums}
    assert told(caplog) == []
    theirs = predict(PredictConfig(), shops.workspace).table.sort("series_id", "step")
    mine = whole.forecast.table.sort("series_id", "step")
    assert mine["series_id"].to_list() == theirs["series_id"].to_list()
    assert np.allclose(mine["mean"], theirs["mean"])
    shops.bring(*(shops.hours(name, HISTORY + CONTEXT, HISTORY + CONTEXT + 3) for name in ("n_a", "n_b", "n_c")))
    after = shops.run()
    assert set(after.scores["series_id"]) == {"n_a", "n_b", "n_c", *shops.sums}
    assert after.scores.filter(~pl.col("expected").is_between(pl.col("value") - 5, pl.col("value") + 5)).is_empty()


def test_a_new_member_with_a_whole_history_brings_the_sum_back_at_once(tmp_path: Path) -> None:
    shops = Shops(tmp_path)
    shops.fit()
    first = shops.run(online=True, start=(FIRST + timedelta(hours=HISTORY - 40)).isoformat())
    assert first.rows_taken == 4 * 39
    shops.bring(shops.hours("n_c", 0, HISTORY))
    done = shops.run()
    assert set(done.added) == {"n", "n_c", "total"}
    again = shops.run()  # reads back what was kept of the intervals that learn
    assert again.added == ()
    table = again.forecast.table.filter(step=1).select("series_id", "mean")
    assert table.filter(series_id="total")["mean"].item() == pytest.approx(60, abs=5)
    shops.bring(*(shops.hours(name, HISTORY, HISTORY + 10) for name in ("n_a", "n_b", "n_c")))
    assert shops.run().num_scored == 5 * 10


def test_a_state_that_does_not_know_its_sums_goes_on_and_knows_them_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shops = Shops(tmp_path)
    shops.fit()
    path = shops.run().path / "state.safetensors"
    old = Stream.load(path, load_artifact(next((tmp_path / "artifacts").iterdir())))
    for key in ("sums", "gone", "parts"):
        old.about.pop(key, None)
    old.save(path)
    shops.bring(*(shops.hours(name, HISTORY, HISTORY + 5) for name in ("n_a", "n_b")))
    assert shops.run().num_scored == 20
    shops.bring(*(shops.hours(name, HISTORY + 5, HISTORY + 9) for name in ("n_a", "n_b", "n_c")))
    assert set(shops.run().scores["series_id"]) == {"n_a", "n_b"}
    assert any("made of other series than before" in line for line in told(caplog))


def test_a_model_that_couples_series_gets_no_value_of_the_new_sum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shops = Shops(tmp_path)
    model = {"name": "regenn", "attend": "entities", "dropout": 0.0, "ff_dim": 8, "graph": "identity"}
    shops.fit(model=model, train={"max_epochs": 1, "max_steps_per_epoch": 2, "accelerator": "cpu"})
    first = shops.run()
    told(caplog)
    for begin in (HISTORY, HISTORY + 5):
        shops.bring(*(shops.hours(name, begin, begin + 5) for name in ("n_a", "n_b", "n_c")))
        done = shops.run()
        assert set(done.scores["series_id"]) == {"n_a", "n_b"}
        assert done.blind == ("n", "total")
        assert series(done) == ["n_a", "n_b"]
        assert [line for line in told(caplog) if "made of other series than before" in line and "fit again" in line]
    assert first.mode == "window"


@pytest.mark.parametrize("tree", [BY_NAME, {"children": {"total": ["n_a", "n_b"]}}], ids=["by_name", "children"])
def test_a_member_that_ended_long_ago_stays_a_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: dict[str, Any]
) -> None:
    """Rows read from a late start held no row of it: a declared tree was refused, a tree of names lacked it."""
    shops = Shops(tmp_path)
    plain = shops.data
    monkeypatch.setattr(shops, "data", lambda table: plain(table) | {"hierarchy": tree})
    shops.fit()
    shops.bring(shops.hours("n_a", HISTORY, 2 * HISTORY))
    begin = (FIRST + timedelta(hours=HISTORY + 50)).isoformat()
    late, whole = (load_dataset(shops.workspace, "shops", start=start).table for start in (begin, None))
    assert late.equals(whole.filter(pl.col("time") >= FIRST + timedelta(hours=HISTORY + 50)))
    assert late.filter(series_id="total")["y"].drop_nulls().is_empty()
    shops.run()
    shops.bring(shops.hours("n_a", 2 * HISTORY, 2 * HISTORY + 5))
    assert set(shops.run().scores["series_id"]) == {"n_a"}
