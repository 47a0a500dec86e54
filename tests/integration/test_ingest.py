"""Ingestion end to end: use-case, command line, pipeline; clean data, flawed real data, broken places."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tsforge.app.ingest import IngestConfig, IngestResult, ingest, load_dataset, mask_invalid, max_age
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, ConfigError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.store import SeriesStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workspace(workspace_root: Path) -> Workspace:
    return Workspace.open(workspace_root)


def run(workspace: Workspace, data: dict[str, Any], **settings: Any) -> IngestResult:
    return ingest(validate(IngestConfig, {"data": {"name": "d", **data}, **settings}), workspace)


def csv(tmp_path: Path, content: str, name: str = "data.csv") -> dict[str, Any]:
    path = tmp_path / name
    path.write_text(content)
    return {"source": {"kind": "csv", "path": str(path)}}


def command(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


GOOD = "ds,x\n" + "".join(f"2024-01-0{day},{day}\n" for day in range(1, 8))


def test_the_embedded_data_comes_with_calendar_and_masked_on_request(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    from tsforge.core.config import load

    config = load(IngestConfig, "ingest", ["data=nyc_weather"])
    result = ingest(config, workspace)
    assert result.summary()["rows_new"] == 26115
    frame = load_dataset(workspace, "nyc_weather")
    assert [name for name in frame.schema.known if name.startswith("calendar.")]
    assert frame.table["wind_speed"].max() == pytest.approx(1048.36, abs=0.01)
    with caplog.at_level(logging.INFO, logger="tsforge"):
        logging.getLogger("tsforge").propagate = True
        masked = load_dataset(workspace, "nyc_weather", masked=True)
    assert float(masked.table["wind_speed"].max()) < 60  # type: ignore[arg-type]
    assert any(getattr(record, "fields", {}).get("wind_speed") == 1 for record in caplog.records)
    for again in (mask_invalid(frame, config.data), mask_invalid(frame, "nyc_weather", workspace)):
        assert again.fingerprint() == masked.fingerprint()


def test_generated_data_comes_with_its_labels(workspace: Workspace) -> None:
    data = {
        "source": {"kind": "synthetic", "generator": {"num_rows": 2000, "num_series": 2, "num_anomalies": 3, "seed": 5}}
    }
    result = run(workspace, data)
    store = SeriesStore(workspace.database_url)
    labels = store.labels("d")
    assert labels.height > 0
    assert set(labels["series_id"]) <= set(load_dataset(workspace, "d").series_ids)
    assert run(workspace, data).record.rows_unchanged == result.record.rows_new
    assert store.labels("d").equals(labels)


def test_ingesting_twice_and_correcting(workspace: Workspace, tmp_path: Path) -> None:
    data = csv(tmp_path, GOOD)
    assert run(workspace, data).record.rows_new == 7
    assert run(workspace, data).record.rows_unchanged == 7
    csv(tmp_path, "ds,x\n2024-01-06,60\n2024-01-07,7\n2024-01-08,8\n")
    record = run(workspace, data).record
    assert (record.rows_new, record.rows_changed, record.rows_unchanged) == (1, 1, 1)
    assert load_dataset(workspace, "d").table["x"].to_list() == [1.0, 2.0, 3.0, 4.0, 5.0, 60.0, 7.0, 8.0]


KNOWN = {"known": ["k"], "targets": ["x", "z"], "freq": "1d"}
LONG = {**KNOWN, "layout": "long", "series": "s"}
PAST = "ds,x,z,k\n" + "".join(f"2024-01-0{day},{day},1,{day}\n" for day in range(1, 8))
AHEAD = "ds,x,z,k\n2024-01-08,,,8\n2024-01-09,,,9\n"


def test_future_values_of_known_covariates_come_alone(workspace: Workspace, tmp_path: Path) -> None:
    limits = [{"kind": "fresh", "max_age": "3d"}, {"kind": "null_share"}]
    checks = [{"kind": "non_empty"}, *limits, {"kind": "schema", "columns": ["k"]}]
    run(workspace, csv(tmp_path, PAST) | KNOWN)
    result = run(workspace, csv(tmp_path, AHEAD) | KNOWN, checks=checks, as_of=datetime(2024, 1, 8, tzinfo=UTC))
    assert result.record.rows_new == 2
    assert [check.passed for check in result.checks] == [True] * 4
    frame = load_dataset(workspace, "d")
    assert frame.table["k"].to_list() == [float(day) for day in range(1, 10)]
    assert frame.last_observed()["time"].to_list() == [datetime(2024, 1, 7, tzinfo=UTC)]
    revised = run(workspace, csv(tmp_path, AHEAD.replace(",9", ",9.5")) | KNOWN)
    assert (revised.record.rows_changed, revised.record.rows_unchanged) == (1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (AHEAD.replace("09,,", "09,1,"), r"column\(s\) z hold no value in any of 2 rows"),  # a column that has gone
        (AHEAD.replace(",8", ",").replace(",9", ","), r"column\(s\) x, z hold no value"),
    ],
)
def test_a_lost_target_is_no_news_of_the_future(
    workspace: Workspace, tmp_path: Path, content: str, message: str
) -> None:
    run(workspace, csv(tmp_path, PAST) | KNOWN)
    with pytest.raises(DataError, match=message):
        run(workspace, csv(tmp_path, content) | KNOWN)


def test_covariates_of_unknown_series_name_the_way_out(workspace: Workspace, tmp_path: Path) -> None:
    data = csv(tmp_path, AHEAD) | KNOWN
    with pytest.raises(DataError, match=r"are taken for series that are stored already.*data\.empty_targets=keep"):
        run(workspace, data)
    checks = [{"kind": "schema", "columns": ["k"]}, {"kind": "non_empty"}]
    with pytest.raises(DataError, match=r"non_empty: 1 of 1 series.*\(checks\.1\.severity=warn\)"):
        run(workspace, data | {"empty_targets": "keep"}, checks=checks)
    checks[1] |= {"severity": "warn"}
    assert run(workspace, data | {"empty_targets": "keep"}, checks=checks).record.rows_new == 2


def test_some_series_may_bring_covariates_only(workspace: Workspace, tmp_path: Path) -> None:
    head = "s,ds,x,z,k\n"
    both = head + "".join(f"{s},2024-01-0{day},1,1,2\n" for s in "ab" for day in range(1, 4))
    run(workspace, csv(tmp_path, both) | LONG)
    news = head + "a,2024-01-04,1,1,2\nb,2024-01-04,,,2\n"
    assert run(workspace, csv(tmp_path, news) | LONG).record.rows_new == 2
    with pytest.raises(DataError, match="non_empty: 1 of 2 series have fewer than 1 observed row"):
        run(workspace, csv(tmp_path, news + "c,2024-01-04,,,2\n") | LONG)


def test_issued_forecasts_of_a_covariate_come_alone_too(workspace: Workspace, tmp_path: Path) -> None:
    data = KNOWN | {"published": "out"}
    run(workspace, csv(tmp_path, "ds,out,x,z,k\n2024-01-01,2024-01-01,1,1,2\n2024-01-02,2024-01-02,1,1,2\n") | data)
    issued = csv(tmp_path, "ds,out,x,z,k\n2024-01-03,2024-01-02,,,3\n2024-01-03,2024-01-03,,,4\n") | data
    assert run(workspace, issued).record.rows_new == 2
    assert load_dataset(workspace, "d").table["k"].to_list() == [2.0, 2.0, 4.0]


WITH_PAST = {**KNOWN, "past": ["p"], "targets": ["x"]}


def test_covariates_that_come_alone_need_no_column_of_the_past_and_leave_its_values(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = WITH_PAST | {"publication_delay": {"p": "1d"}, "valid_range": {"p": [0, 100]}}
    past = "ds,x,p,k\n" + "".join(f"2024-01-0{day},{day},1{day},{day}\n" for day in range(1, 8))
    run(workspace, csv(tmp_path, past) | data)
    ahead = "ds,x,k\n2024-01-06,,60\n2024-01-07,,7\n2024-01-08,,8\n"
    result = run(workspace, csv(tmp_path, ahead) | data)
    assert (result.record.rows_new, result.record.rows_changed, result.record.rows_unchanged) == (1, 1, 1)
    assert [(item.count, item.examples) for item in result.report.findings if "without a column" in item.what] == [
        (1, ("p",))
    ]
    stored = SeriesStore(workspace.database_url).read("d").table
    assert stored["p"].to_list() == [*(10.0 + day for day in range(1, 8)), None]
    assert stored["x"].to_list() == [*(float(day) for day in range(1, 8)), None]
    assert stored["k"].to_list() == [1.0, 2.0, 3.0, 4.0, 5.0, 60.0, 7.0, 8.0]


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ("ds,x,k\n2024-01-08,,8\n2024-01-09,9,9\n", {}),  # a target is there: the column has gone
        ("ds,x,k\n2024-01-08,,8\n", {"nulls": "erase"}),  # it would erase what is stored
        ("ds,x,k\n2024-01-08,,8\n", {"known": [], "targets": ["x", "k"]}),  # nothing is known ahead
    ],
)
def test_elsewhere_a_column_of_the_past_that_is_not_there_is_refused(
    workspace: Workspace, tmp_path: Path, content: str, settings: dict[str, Any]
) -> None:
    data = WITH_PAST | settings
    past = "ds,x,p,k\n" + "".join(f"2024-01-0{day},{day},1{day},{day}\n" for day in range(1, 8))
    run(workspace, csv(tmp_path, past) | data)
    with pytest.raises(DataError, match=r"roles: no column 'p'.*\(it has x, k\)"):
        run(workspace, csv(tmp_path, content) | data)


@pytest.mark.parametrize("resample", [None, {"every": "1d"}])
def test_covariates_of_a_wide_source_come_alone_without_the_past_too(
    workspace: Workspace, tmp_path: Path, resample: dict[str, str] | None
) -> None:
    data = {"separator": ".", "targets": ["x"], "past": ["p.q"], "known": ["k"], "freq": "1d", "resample": resample}
    past = "ds,a.x,a.p.q,b.x,b.p.q,k\n" + "".join(f"2024-01-0{day},1,2,3,4,{day}\n" for day in range(1, 8))
    run(workspace, csv(tmp_path, past) | data)
    assert run(workspace, csv(tmp_path, "ds,a.x,b.x,k\n2024-01-08,,,8\n") | data).record.rows_new == 2
    frame = SeriesStore(workspace.database_url).read("d")
    assert frame.series_ids == ("a", "b")
    assert frame.table.filter(series_id="b")["p.q"].to_list() == [*[4.0] * 7, None]


def test_issued_forecasts_need_no_column_of_the_past(workspace: Workspace, tmp_path: Path) -> None:
    data = WITH_PAST | {"published": "out"}
    run(workspace, csv(tmp_path, "ds,out,x,p,k\n2024-01-01,2024-01-01,1,5,2\n2024-01-02,2024-01-02,1,6,2\n") | data)
    issued = csv(tmp_path, "ds,out,x,k\n2024-01-02,2024-01-02,,3\n2024-01-03,2024-01-02,,4\n") | data
    assert run(workspace, issued).record.rows_new == 1
    table = load_dataset(workspace, "d").table
    assert (table["p"].to_list(), table["k"].to_list()) == ([5.0, 6.0, None], [2.0, 3.0, 4.0])


def test_a_calendar_that_no_fit_could_read_is_not_stored(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.calendar\.holidays: no holidays are known for country 'XX'"):
        run(workspace, csv(tmp_path, GOOD) | {"calendar": {"holidays": "XX"}})
    steps = csv(tmp_path, "ds,x\n1,1\n2,2\n3,3\n") | {"freq": "1i", "calendar": {"features": ["hour"]}}
    with pytest.raises(DataError, match="integer time has no calendar"):
        run(workspace, steps)
    assert not SeriesStore(workspace.database_url).datasets().height


def test_a_refused_batch_changes_nothing_and_leaves_a_record(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, csv(tmp_path, GOOD))
    bad = csv(tmp_path, "ds,x\n2024-01-08,8\n2024-01-09,what\n", "bad.csv")
    with pytest.raises(DataError, match="row 2: 'what'"):
        run(workspace, bad)
    batches = SeriesStore(workspace.database_url).batches("d")
    assert batches["status"].to_list() == ["refused", "done"]
    assert "row 2: 'what'" in json.loads(batches["reasons"][0])["error"]
    assert load_dataset(workspace, "d").num_rows == 7
    with pytest.raises(DataError, match="row 1: '0000-01-08'"):  # a year that Python does not know
        run(workspace, csv(tmp_path, "ds,x\n0000-01-08,8\n2024-01-09,9\n", "bad.csv"))
    assert SeriesStore(workspace.database_url).batches("d")["status"].to_list() == ["refused", "refused", "done"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "non_empty", "min_rows": 100}, r"non_empty: 1 of 1 series.*'d' has 7"),
        ({"kind": "fresh", "max_age": "1d"}, "fresh: 1 of 1 series have no target newer"),
        ({"kind": "schema", "columns": ["x", "y"]}, "no 'y'"),
        ({"kind": "schema", "columns": ["z"], "exact": True}, "'x' is new"),
        ({"kind": "frequency", "freq": "1h"}, "frequency: 1 frequency other than 1h: the data has 1d"),
        ({"kind": "range", "limits": {"x": [0, 5]}, "span": "30d"}, "range: 1 column"),
        ({"kind": "null_share", "span": "30d", "max_share": 0.0}, None),
    ],
)
def test_a_blocking_check_stores_nothing_and_a_warning_does_not_block(
    workspace: Workspace, tmp_path: Path, check: dict[str, Any], message: str | None
) -> None:
    data = csv(tmp_path, GOOD)
    as_of = "2024-01-20T00:00:00Z"
    if message is None:
        assert run(workspace, data, checks=[check], as_of=as_of).checks[0].passed
        return
    with pytest.raises(DataError, match=message):
        run(workspace, data, checks=[check], as_of=as_of)
    store = SeriesStore(workspace.database_url)
    assert store.datasets().height == 0
    assert store.batches()["status"].to_list() == ["refused"]
    result = run(workspace, data, checks=[{**check, "severity": "warn"}], as_of=as_of)
    assert result.record.rows_new == 7
    assert len(result.summary()["warnings"]) == 1


def test_checks_that_pass_let_the_batch_in(workspace: Workspace, tmp_path: Path) -> None:
    checks = [
        {"kind": "fresh", "max_age": "14d"},
        {"kind": "schema", "columns": ["x"], "exact": True},
        {"kind": "frequency", "freq": "24h"},
    ]
    result = run(workspace, csv(tmp_path, GOOD), checks=checks, as_of="2024-01-20T00:00:00Z")
    assert all(check.passed for check in result.checks)


def test_roles_of_a_config_hold_when_data_is_read_back(workspace: Workspace, tmp_path: Path) -> None:
    data = csv(tmp_path, "ds,x,y\n2024-01-01,1,5\n2024-01-02,2,6\n")
    run(workspace, data)
    config = validate(IngestConfig, {"data": {"name": "d", **data, "targets": ["y"], "past": ["x"]}}).data
    frame = load_dataset(workspace, config)
    assert (frame.schema.targets, frame.schema.past) == (("y",), ("x",))
    unknown = config.model_copy(update={"targets": ("z",)})
    with pytest.raises(DataError, match="holds no column 'z'"):
        load_dataset(workspace, unknown)


def test_max_age_is_a_duration() -> None:
    assert max_age({}) is None
    assert max_age({"max_age": None}) is None
    assert max_age({"max_age": "2h30m"}) == timedelta(hours=2, minutes=30)


# --- flawed real data ---


def real(shared_data: Path, name: str, **settings: Any) -> dict[str, Any]:
    return {"source": {"kind": "parquet", "path": str(shared_data / "forecast" / f"{name}.parquet")}, **settings}


def test_repeated_hours_of_traffic_volume(workspace: Workspace, shared_data: Path) -> None:
    with pytest.raises(
        DataError, match=r"7629 of 48204 rows repeat the time of an earlier row.*7550 of them with equal"
    ):
        run(workspace, real(shared_data, "traffic_volume"))
    with pytest.raises(DataError, match="'weather_main' holds text, no cell is a number"):
        run(workspace, real(shared_data, "traffic_volume", targets=["traffic_volume"], past=["weather_main"]))
    settings = {
        "targets": ["traffic_volume"],
        "past": ["temp", "rain_1h"],
        "duplicates": "first",
        "sentinels": {"temp": [0]},
        "valid_range": {"rain_1h": [0, 300]},
    }
    result = run(workspace, real(shared_data, "traffic_volume", **settings))
    assert result.record.rows_new == 48204 - 7629
    assert ("replaced", 10) in {(row["done"], row["count"]) for row in result.rows()}
    frame = load_dataset(workspace, "d", masked=True)
    assert float(frame.table["temp"].min()) > 200  # type: ignore[arg-type]
    assert float(frame.table["rain_1h"].max()) < 300  # type: ignore[arg-type]
    assert float(load_dataset(workspace, "d").table["rain_1h"].max()) > 9000  # type: ignore[arg-type]
    hours = (datetime(2018, 9, 30, 23) - datetime(2012, 10, 2, 9)) // timedelta(hours=1) + 1
    assert frame.num_rows == hours == 52551


def test_daylight_saving_of_pjm_hourly(workspace: Workspace, shared_data: Path) -> None:
    """Stamps name the end of an hour on the clock of New York: shifted and localised, every clock change fits."""
    with pytest.raises(DataError, match="4 of 178262 rows repeat the time of an earlier row"):
        run(workspace, real(shared_data, "pjm_hourly"))
    local = {"timezone": "America/New_York", "time_shift": "-1h", "ambiguous": "infer"}
    result = run(workspace, real(shared_data, "pjm_hourly", **local))
    assert result.record.rows_refused == 0
    table = load_dataset(workspace, "d").table
    value = pl.any_horizontal(pl.exclude("series_id", "time").is_not_null())
    missing = table.filter(~value)["time"].dt.convert_time_zone("America/New_York")
    # in the 16 autumns until 2013 the source lacks both readings of the repeated hour; one more hour is missing
    assert len(missing) == 33
    assert missing.dt.hour().value_counts().sort("count", descending=True).row(0) == (1, 32)
    spring = table.filter(pl.col("time") == datetime(2016, 3, 13, 7, tzinfo=UTC))
    assert spring.select(value).item(), "03:00 EDT directly follows 01:00 EST"


@pytest.mark.slow
def test_two_million_rows_of_household_power(workspace: Workspace, shared_data: Path) -> None:
    result = run(workspace, real(shared_data, "household_power"))
    assert result.record.rows_new == 2_075_259 - 25_979
    assert result.seconds < 60
    frame = load_dataset(workspace, "d")
    assert frame.num_rows == 2_075_259
    assert frame.table.select(pl.exclude("series_id", "time")).null_count().row(0) == (25_979,) * 7


# --- broken places ---


def test_a_read_only_folder_is_one_message_and_loses_nothing() -> None:
    """In a child that gives up root (which may write anywhere), after everything is imported."""
    code = """
import os, sys
from datetime import UTC, datetime
import polars as pl
from tsforge.core.errors import BackendError
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.store import SeriesStore
table = pl.DataFrame({"series_id": "a", "time": [datetime(2024, 1, 1, tzinfo=UTC)], "x": [float(sys.argv[2])]})
frame = SeriesFrame(table, SeriesSchema(targets=("x",), freq="1h"))
SeriesStore(sys.argv[1] + "/../warm.db").write("d", frame)
if os.getuid() == 0:
    os.setuid(65534)
try:
    SeriesStore(sys.argv[1] + "/store.db").write("d", frame)
except BackendError as error:
    print(error)
print(SeriesStore(sys.argv[1] + "/store.db").read("d").table["x"].to_list())
"""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        folder.mkdir()
        Path(place).chmod(0o755)
        workspace = Workspace(root=folder, database_url=f"sqlite:///{folder / 'store.db'}", tracking_uri="")
        (Path(place) / "data.csv").write_text("ds,x\n2024-01-01,1\n")
        run(
            workspace, {"source": {"kind": "csv", "path": f"{place}/data.csv"}, "freq": "1h", "time_format": "%Y-%m-%d"}
        )
        (folder / "store.db").chmod(0o444)
        folder.chmod(0o555)
        result = command(["-c", code, f"sqlite:///{folder}", "2"])
        folder.chmod(0o755)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert len(lines) == 2
        assert "read-only; make both writable" in lines[0]
        assert "nothing was changed" in lines[0]
        assert lines[1] == "[1.0]"


def test_a_store_that_is_gone_is_heard_before_the_record_of_it(workspace_root: Path, tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/none?connect_timeout=2"
    workspace = Workspace(root=workspace_root, database_url=url, tracking_uri="")
    with pytest.raises(BackendError, match="does not answer") as caught:
        run(workspace, csv(tmp_path, GOOD))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError, match="there is no file"):
        run(workspace, {"source": {"kind": "csv", "path": str(tmp_path / "absent.csv")}})


# --- shells ---


def test_the_pipeline_speaks_json_and_exit_codes(tmp_path: Path) -> None:
    home = {"TSFORGE_HOME": str(tmp_path / "home")}
    path = tmp_path / "data.csv"
    path.write_text(GOOD)
    arguments = ["-m", "pipelines.ingest", "data=csv", "data.name=days", f"data.source.path={path}"]
    good = command(arguments, **home)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["rows_new"] == 7
    lines = [json.loads(line) for line in good.stderr.splitlines()]
    assert lines[-1]["message"] == "ingested"
    assert lines[-1]["rows_new"] == 7
    path.write_text(GOOD + "2024-01-08,eight\n")
    bad = command(arguments, **home)
    assert bad.returncode == 3
    assert bad.stdout == ""
    assert "row 8: 'eight'" in bad.stderr
    assert "Traceback" not in bad.stderr
    checked = command(["-m", "pipelines.checks", "data=csv", "data.name=days"], **home)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["passed"] is True
    stale = command(
        ["-m", "pipelines.checks", "data=csv", "data.name=days", "checks=[{kind: fresh, max_age: 1d}]"], **home
    )
    assert stale.returncode == 3
    assert json.loads(stale.stdout)["checks"][0]["passed"] is False


def test_the_command_line_ingests_and_shows_what_it_did(tmp_path: Path) -> None:
    home = {"TSFORGE_HOME": str(tmp_path / "home")}
    path = tmp_path / "data.csv"
    path.write_text(GOOD + "2024-01-08,-9999\n")
    arguments = ["-m", "tsforge", "ingest", "data=csv", f"data.source.path={path}", "data.sentinels={x: [-9999]}"]
    result = command([*arguments, "--json"], **home)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["rows_new"] == 7
    assert document["rows"][0]["what"] == "sentinel values in column 'x'"
    wrong = command([*arguments, "data.layuot=long"], **home)
    assert wrong.returncode == 2
    assert "did you mean 'layout'" in wrong.stderr


def test_every_data_config_composes_and_validates() -> None:
    from tsforge.core.config import load

    names = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))
    assert {"csv", "nyc_weather", "parquet", "sql", "synthetic"} <= set(names)
    for name in names:
        assert load(IngestConfig, "ingest", [f"data={name}"]).data.name
