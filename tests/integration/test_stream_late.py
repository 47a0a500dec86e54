"""What a stream leaves out is counted and said: late rows, revised values, missing covariates, unscored, strangers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.fit import FitConfig, fit
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.stream import StreamConfig, StreamResult, read_scores, stream
from tsforge.artifact import load_artifact
from tsforge.core.config import validate
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore
from tsforge.forecasting.stream import Stream

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
HISTORY = 200
AHEAD = 12  # hours of the known covariate after the targets


class Plant:
    """A workspace with two series, a past and a known covariate, and a model; rows come in by hours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workspace = Workspace(root=folder, database_url=f"sqlite:///{folder / 'store.db'}", tracking_uri="")

    def data(self, table: pl.DataFrame, **changes: Any) -> dict[str, Any]:
        table.write_parquet(self.folder / "rows.parquet")
        source = {"kind": "parquet", "path": str(self.folder / "rows.parquet")}
        roles = {"targets": ["y"], "past": ["p"], "known": ["k"], "series": "series_id", "time": "time"}
        return {"name": "plant", "source": source, "layout": "long", "freq": "1h", **roles, **changes}

    def bring(self, *tables: pl.DataFrame, **changes: Any) -> int:
        """Ingest rows and return the number of the batch."""
        config = {"data": self.data(pl.concat(tables), **changes)}
        return ingest(validate(IngestConfig, config), self.workspace).record.id

    def run(self, **settings: Any) -> StreamResult:
        return stream(StreamConfig(name="s", **settings), self.workspace)


def hours(series: str, begin: int, end: int, **values: Any) -> pl.DataFrame:
    """Rows of some hours; ``y``, ``p`` and ``k`` can be given, None leaves a column without values."""
    place = np.arange(begin, end)
    own = {"y": 10 + np.sin(place / 4), "p": np.cos(place / 5), "k": place % 24.0} | values
    columns = {name: np.broadcast_to(own[name], place.shape).tolist() for name in ("y", "p", "k")}
    times = [FIRST + timedelta(hours=int(hour)) for hour in place]
    types = dict.fromkeys(("y", "p", "k"), pl.Float64)
    return pl.DataFrame({"series_id": [series] * len(place), "time": times, **columns}, schema_overrides=types)


def forecast_of_weather(series: str, begin: int) -> pl.DataFrame:
    return hours(series, begin, begin + AHEAD, y=None, p=None)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plant = Plant(tmp_path_factory.mktemp("plant"))
    history = pl.concat([hours(name, 0, HISTORY) for name in "ab"])
    plant.bring(history, *(forecast_of_weather(name, HISTORY) for name in "ab"))
    settings = {
        "data": plant.data(history),
        "model": {"name": "ar_net", "lags": 12},
        "window": {"context_length": 24, "horizon": AHEAD},
        "tracking": {"enabled": False},
    }
    fit(validate(FitConfig, settings), plant.workspace)
    return plant.folder


@pytest.fixture
def plant(fitted: Path, tmp_path: Path) -> Plant:
    shutil.copytree(fitted, tmp_path / "home")
    return Plant(tmp_path / "home")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return told


def counts(result: StreamResult) -> tuple[int, int, int]:
    facts = result.summary()
    return facts["rows_taken"], facts["rows_late"], facts["values_revised"]


def grow(plant: Plant, begin: int, end: int, series: str = "ab") -> int:
    """Bring hours as an application does: targets for rows whose known covariate came before, and more of that."""
    parts = [part for name in series for part in (hours(name, begin, end), forecast_of_weather(name, end))]
    return plant.bring(*parts)


def test_ordinary_runs_say_nothing_though_their_rows_change_stored_ones(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    assert counts(plant.run()) == (0, 0, 0)
    for begin in (HISTORY, HISTORY + 3, HISTORY + 6):
        batch = grow(plant, begin, begin + 3)
        with closing(SeriesStore(plant.workspace.database_url)) as store:
            record = store.batches("plant").filter(id=batch).row(0, named=True)
        assert record["rows_changed"] == 6  # the known covariate was there
        assert counts(plant.run()) == (6, 0, 0)
    state = plant.folder / "streams/s/state.safetensors"
    written = state.stat().st_mtime_ns
    grow(plant, HISTORY + 6, HISTORY + 9)  # the same once more
    assert counts(plant.run()) == (0, 0, 0)
    assert state.stat().st_mtime_ns == written
    grow(plant, HISTORY + 9, HISTORY + 12, series="a")  # b stays behind
    assert counts(plant.run()) == (3, 0, 0)
    assert warnings(caplog) == []


def test_late_rows_and_revised_values_are_said_once(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    plant.run()
    end = HISTORY + AHEAD  # the known covariate of the rows up to here is stored already
    grow(plant, end + 10, end + 20)
    plant.run()
    warnings(caplog)
    late = plant.bring(hours("b", end, end + 10), hours("a", end, end + 1), hours("a", HISTORY - 5, HISTORY, y=99.0))
    result = plant.run()
    assert counts(result) == (0, 11, 5)
    assert warnings(caplog) == [
        "11 stored rows lie before the end of their series in stream 's' (b: 10, a: 1) and values of up to 5 rows that "
        f"it has taken were revised or filled in (batch {late}); they are left out: reset=true takes them"
    ]
    assert counts(plant.run()) == (0, 0, 0)
    assert warnings(caplog) == []
    first = plant.bring(hours("a", 0, 2, p=7.0))
    last = plant.bring(hours("b", HISTORY, HISTORY + 1, p=None))  # a target that was missing when its row was taken
    grow(plant, end + 20, end + 22)
    assert counts(plant.run()) == (4, 0, 7)
    (told,) = warnings(caplog)
    assert told.startswith(
        "values of up to 7 rows that stream 's' has taken were revised or filled in "
        f"(batches {first}-{last + 1}); they are left out"
    )
    again = plant.run(reset=True)
    assert counts(again) == (0, 0, 0)
    assert warnings(caplog) == []
    artifact = load_artifact(next((plant.folder / "artifacts").iterdir()))
    held = Stream.load(again.path / "state.safetensors", artifact)
    assert held.buffer.rows[1, :, 0].isnan().sum() == 2  # of b, whose context had twelve gaps before


def test_a_state_of_an_earlier_version_goes_on_and_counts_from_then_on(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    path = plant.run().path / "state.safetensors"
    artifact = load_artifact(next((plant.folder / "artifacts").iterdir()))
    old = Stream.load(path, artifact)
    del old.about["taken"]
    old.save(path)
    plant.bring(hours("a", 3, 5, y=50.0))
    assert counts(plant.run()) == (0, 0, 0)
    plant.bring(hours("a", 3, 5, y=51.0))
    assert counts(plant.run()) == (0, 0, 2)
    assert len(warnings(caplog)) == 1


def test_a_store_restored_from_a_copy_has_no_batch_to_name(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(plant.folder / "store.db", plant.folder / "copy.db")
    plant.bring(hours("a", 0, 1, y=1.0))
    plant.run()
    for name in ("store.db-wal", "store.db-shm"):
        (plant.folder / name).unlink(missing_ok=True)
    shutil.copy(plant.folder / "copy.db", plant.folder / "store.db")
    more = [hours("a", HISTORY, HISTORY + 1), forecast_of_weather("a", HISTORY + 1)]
    plant.bring(hours("a", -2, 0), *more)  # under the number of the batch that was lost
    warnings(caplog)
    assert counts(plant.run()) == (1, 2, 0)
    (told,) = warnings(caplog)
    assert told.startswith("2 stored rows lie before the end of their series in stream 's' (a: 2); they are left out")


def test_a_data_set_that_was_made_anew_is_no_old_acquaintance(plant: Plant) -> None:
    plant.run()
    with closing(SeriesStore(plant.workspace.database_url)) as store:
        store.remove("plant")
    same = [part for name in "ab" for part in (hours(name, 0, HISTORY), forecast_of_weather(name, HISTORY))]
    plant.bring(*same)
    assert counts(plant.run()) == (0, 0, 0)
    with closing(SeriesStore(plant.workspace.database_url)) as store:
        store.remove("plant")
    plant.bring(*same, hours("b", -5, 0))
    plant.bring(hours("a", 0, 1, y=0.0))
    assert counts(plant.run())[1:] == (5, 2 * HISTORY)


def test_erased_values_count_as_revised(plant: Plant) -> None:
    plant.run()
    plant.bring(hours("a", 10, 12, y=None, p=None, k=None), hours("a", 12, 13), nulls="erase")
    assert counts(plant.run()) == (0, 0, 2)


def test_missing_covariates_are_counted_where_a_target_was_observed(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    plant.run()
    begin = HISTORY + AHEAD
    plant.bring(
        hours("a", begin, begin + 4, p=None),
        hours("b", begin, begin + 2, k=None),
        hours("b", begin + 2, begin + 4),
        *(forecast_of_weather(name, begin + 4) for name in "ab"),
    )
    result = plant.run()
    assert result.covariates_missing == {"p": 4, "k": 2}
    assert result.summary()["covariates_missing"] == 6
    (told,) = warnings(caplog)
    assert told.startswith("6 covariate values are missing in the rows that stream 's' has just taken (p: 4, k: 2)")
    plant.bring(hours("a", begin, begin + 4))
    assert counts(plant.run()) == (0, 0, 4)


def test_covariates_with_a_declared_delay_are_no_revision(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    delay = {"publication_delay": {"p": "2h"}}
    settings = {
        "data": plant.data(hours("a", 0, 1), **delay),
        "model": {"name": "ar_net", "lags": 12},
        "window": {"context_length": 24, "horizon": AHEAD},
        "tracking": {"enabled": False},
    }
    plant.bring(hours("a", HISTORY - 1, HISTORY), **delay)
    fit(validate(FitConfig, settings), plant.workspace)
    plant.run()
    warnings(caplog)
    plant.bring(hours("a", HISTORY, HISTORY + 2, p=None), forecast_of_weather("a", HISTORY + 2), **delay)
    assert counts(plant.run()) == (2, 0, 0)
    plant.bring(hours("a", HISTORY, HISTORY + 2), **delay)
    result = plant.run()
    assert (*counts(result), result.covariates_missing) == (0, 0, 0, {})
    assert warnings(caplog) == []


def test_values_that_are_published_again_are_no_revision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plant = Plant(tmp_path)
    roles: dict[str, Any] = {"known": [], "past": [], "published": "published"}

    def published(begin: int, end: int, **values: Any) -> list[pl.DataFrame]:
        moment = pl.lit(FIRST + timedelta(hours=end)).alias("published")
        return [hours(name, begin, end, **values).with_columns(moment) for name in "ab"]

    history = published(0, HISTORY)
    plant.bring(*history, **roles)
    settings = {
        "data": plant.data(pl.concat(history), **roles),
        "model": {"name": "ar_net", "lags": 12},
        "window": {"context_length": 24, "horizon": AHEAD},
        "tracking": {"enabled": False},
    }
    fit(validate(FitConfig, settings), plant.workspace)
    plant.run()
    for end in (HISTORY + 3, HISTORY + 6):
        plant.bring(*published(end - 27, end), **roles)
        assert counts(plant.run()) == (6, 0, 0)
    assert warnings(caplog) == []
    plant.bring(*published(HISTORY - 2, HISTORY + 7, y=3.0), **roles)
    assert counts(plant.run()) == (2, 0, 16)


def test_values_without_an_expectation_are_not_called_scored(plant: Plant) -> None:
    plant.run()
    grow(plant, HISTORY + 100, HISTORY + 110)
    facts = plant.run().summary()
    assert (facts["values_scored"], facts["values_unscored"]) == (18, 2)
    assert read_scores(plant.workspace, "s").height == 20


def test_series_that_ended_long_ago_are_taken_in_or_wait(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    plant.run()
    plant.bring(hours("c", 20, 30), hours("d", 20, 120), forecast_of_weather("d", 120))
    facts = plant.run().summary()
    assert (facts["series_added"], facts["series_waiting"]) == (["d"], ["c"])
    plant.bring(hours("d", 10, 12))
    assert counts(plant.run()) == (0, 2, 0)
    assert warnings(caplog)[0].startswith("2 stored rows lie before the end of their series in stream 's' (d: 2)")


@pytest.mark.parametrize("rows", [3, 100], ids=["near the front", "long ago"])
def test_a_stream_goes_on_when_a_series_is_gone_from_the_store(
    plant: Plant, caplog: pytest.LogCaptureFixture, rows: int
) -> None:
    plant.run()
    grow(plant, HISTORY, HISTORY + rows, series="a")
    plant.run()
    with closing(SeriesStore(plant.workspace.database_url)) as store:
        store.remove("plant")
    grow(plant, 0, HISTORY + rows, series="a")
    warnings(caplog)
    plant.run()
    gone = [line for line in warnings(caplog) if "no longer stored" in line]
    assert len(gone) == 1
    assert gone[0].startswith("1 series of stream 's' are no longer stored (b)")
    grow(plant, HISTORY + rows, HISTORY + rows + 2, series="a")
    done = plant.run()
    assert (done.rows_taken, done.summary()["last_row"]) == (2, FIRST + timedelta(hours=HISTORY + rows + 1))
    assert warnings(caplog) == [], "said once"
    plant.bring(*(part for part in (hours("b", 0, HISTORY + 5), forecast_of_weather("b", HISTORY + 5))))
    assert plant.run().rows_taken == 5, "it is back and goes on where it was"


def test_an_artifact_that_takes_in_no_series_says_so(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    settings = {
        "data": plant.data(hours("a", 0, 1)),
        "model": {"name": "ar_net", "lags": 12},
        "window": {"context_length": 24, "horizon": AHEAD},
        "scaling": {"kind": "series"},
        "tracking": {"enabled": False},
    }
    fit(validate(FitConfig, settings), plant.workspace)
    plant.run()
    warnings(caplog)
    plant.bring(hours("c", HISTORY - 60, HISTORY))
    assert plant.run().waiting == ("c",)
    (told,) = warnings(caplog)
    assert told.startswith("1 stored series are not in stream 's' (c), and its artifact takes none in later")


def test_what_killed_runs_left_is_removed(plant: Plant) -> None:
    folder = plant.run().path
    grow(plant, HISTORY, HISTORY + 2)
    plant.run()
    (scores,) = folder.glob("scores-*")
    orphan = folder / "scores-20260101T000000000000Z"
    orphan.mkdir()
    (orphan / "part-00000000.parquet").write_bytes(b"of a reset that was killed")
    for place in (folder / ".state.safetensors.abc.tmp", scores / ".part-00000002.parquet.xyz.tmp"):
        place.write_bytes(b"half")
    kept = sorted(path.name for path in (*folder.iterdir(), *scores.iterdir()) if path.suffix != ".tmp")
    plant.run()
    assert sorted(path.name for path in (*folder.iterdir(), *scores.iterdir())) == sorted({*kept} - {orphan.name})
    assert read_scores(plant.workspace, "s").height == 4


def test_the_command_line_tells(
    plant: Plant, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSFORGE_HOME", str(plant.folder))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    command("stream", "name=s")
    plant.bring(hours("a", -3, 0))
    status, output, errors = command("stream", "name=s", "--json")
    facts = json.loads(output)
    assert (status, facts["rows_late"], facts["values_revised"]) == (0, 3, 0)
    assert "3 stored rows lie before the end of their series in stream 's' (a: 3)" in errors
