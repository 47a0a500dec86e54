"""Confirmed spans leave calibration and rolling windows; dismissed ones stay; no label reaches the rows it is about."""

from __future__ import annotations

import math
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines import batch_detect
from tsforge.anomaly import detector
from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.confirmed import ConfirmedRows, confirmed_rows, judge
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.thresholds import Fixed, RollingQuantile
from tsforge.app import published
from tsforge.app.batch import BatchConfig, parse_as_of, run_batch
from tsforge.app.detect import DetectJobConfig
from tsforge.app.detect import detect as detect_job
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.core.config import validate
from tsforge.core.errors import BackendError, DataError
from tsforge.core.workspace import Workspace
from tsforge.data.event_store import EventStore
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid

START = datetime(2024, 1, 1, tzinfo=UTC)
ROWS, TRAIN, SCORED = 1_300, 400, 1_000
IN_SCALE, IN_CALIBRATION = (430, 445), (800, 829)  # faults of series a, both ends included
CONFIG = {
    "calibration": {"min_scale_rows": 150, "max_scale_rows": 150},  # so scores do not depend on when scoring starts
    "rule": {"kind": "quantile", "alpha": 0.01},
}


def at(row: int) -> datetime:
    return START + timedelta(hours=row)


def spans(*pairs: tuple[int, int], series: str = "a", **more: Any) -> pl.DataFrame:
    rows = [{"series_id": series, "start": at(low), "end": at(high), **more} for low, high in pairs]
    return pl.DataFrame(rows).with_columns(pl.col("start", "end").cast(pl.Datetime("us", "UTC")))


@pytest.fixture(scope="module")
def frame() -> SeriesFrame:
    """Two series of two variates; faults of a in its scale and calibration rows, and one that is under way at 1,000."""
    parts = []
    generator = np.random.default_rng(3)
    for name in ("a", "b"):
        hour = np.arange(ROWS)
        x = 3 * np.sin(2 * np.pi * hour / 24) + generator.normal(0, 0.4, ROWS)
        y = 0.8 * x + generator.normal(0, 0.3, ROWS)
        if name == "a":
            for low, high in (IN_SCALE, IN_CALIBRATION, (990, 1_010)):
                y[low : high + 1] += generator.normal(12.0, 4.0, high + 1 - low)
        parts.append(pl.DataFrame({"series_id": [name] * ROWS, "time": [at(int(h)) for h in hour], "x": x, "y": y}))
    return SeriesFrame.from_long(pl.concat(parts), time="time", series_id="series_id", targets=["x", "y"])


@pytest.fixture(scope="module")
def artifact(frame: SeriesFrame) -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 6},
        "split": {"kind": "counts", "counts": [TRAIN, 100, ROWS - TRAIN - 100]},
    }
    return fit_frame(frame, validate(FitConfig, settings))[0]


def run(artifact: Artifact, frame: SeriesFrame, confirmed: pl.DataFrame | None = None, **more: Any) -> AnomalyReport:
    config = validate(DetectConfig, CONFIG | more.pop("config", {}))
    return detect(artifact, frame, config, **{"start": at(SCORED), **more}, confirmed=confirmed)


def joint(report: AnomalyReport, series: str = "a") -> pl.DataFrame:
    return report.scores.table.filter((pl.col("series_id") == series) & (pl.col("variate") == JOINT))


def without(frame: SeriesFrame, *pairs: tuple[int, int]) -> SeriesFrame:
    """The same frame with the values of some rows of series a missing."""
    table = frame.table
    for low, high in pairs:
        inside = (pl.col("series_id") == "a") & pl.col("time").is_between(at(low), at(high))
        table = table.with_columns(
            pl.when(inside).then(None).otherwise(pl.col(name)).alias(name) for name in ("x", "y")
        )
    return SeriesFrame(table, frame.schema, frame.static)


def test_the_threshold_is_the_quantile_of_the_rows_left(artifact: Artifact, frame: SeriesFrame) -> None:
    """Oracle: the scores of the calibration rows from an earlier start, those confirmed struck out by hand."""
    sizes = {"calibration": {"min_scale_rows": 100, "max_scale_rows": 100, "min_rows": 40, "max_rows": 300}}
    seen = joint(run(artifact, frame, start=at(545), config=sizes)).filter(pl.col("time") < at(SCORED))
    is_confirmed = pl.col("time").is_between(at(IN_CALIBRATION[0]), at(IN_CALIBRATION[1]))
    for sample, labels in ((seen.filter(~is_confirmed), spans(IN_CALIBRATION)), (seen, None)):
        report = run(artifact, frame, labels, config=sizes)
        ordered = np.sort(sample["score"].to_numpy()[-300:])
        expected = ordered[math.ceil(0.99 * (ordered.size + 1)) - 1]
        assert report.metadata["series"]["a"]["rows"] == 300
        assert joint(report)["threshold"].unique().to_list() == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize(
    "rule", [{"kind": "quantile", "alpha": 0.01}, {"kind": "rolling_quantile", "alpha": 0.01, "window": 400}]
)
def test_confirmed_rows_are_as_if_never_observed(artifact: Artifact, frame: SeriesFrame, rule: dict[str, Any]) -> None:
    """Oracle: the network sees the same, but the judge gets no value in those rows: scale, sample, window, p-values."""
    confirmed = spans(IN_SCALE, IN_CALIBRATION, (990, 1_010))
    report = run(artifact, frame, confirmed, config={"rule": rule})
    struck = run(
        artifact, frame, config={"rule": rule}, values=without(frame, IN_SCALE, IN_CALIBRATION, (990, SCORED - 1))
    )
    plain = run(artifact, frame, config={"rule": rule})
    for name in ("score", "threshold", "p_value"):
        both = joint(report)[name].to_numpy(), joint(struck)[name].to_numpy()
        np.testing.assert_allclose(*both, rtol=1e-12, err_msg=name)
        assert not np.allclose(joint(plain)[name].to_numpy(), both[0], equal_nan=True), (
            f"{name}: the labels did nothing"
        )
    variates = [r.scores.table.filter(pl.col("variate") == "y")["p_value"].to_numpy() for r in (report, struck)]
    np.testing.assert_allclose(*variates, rtol=1e-12)
    assert joint(report, "b").equals(joint(plain, "b")), "labels of one series are nothing to another"


def test_the_report_says_how_many_rows_were_left_out(artifact: Artifact, frame: SeriesFrame) -> None:
    facts = run(artifact, frame, spans(IN_SCALE, IN_CALIBRATION, (1_005, 1_100), (0, 10))).metadata
    assert facts["series"]["a"]["confirmed_rows_left_out"] == {"scale": 16, "calibration": 30}
    assert facts["series"]["b"]["confirmed_rows_left_out"] == {"scale": 0, "calibration": 0}
    assert facts["confirmed_rows_left_out"] == 46
    assert run(artifact, frame).metadata["confirmed_rows_left_out"] == 0
    clipped = run(artifact, frame, spans((990, 1_010)))
    assert clipped.metadata["confirmed_rows_left_out"] == 10, (
        "a span that reaches into the scored rows ends before them"
    )


def test_no_cap(artifact: Artifact, frame: SeriesFrame) -> None:
    """Spec 5.6: rows the user confirmed may be left out without a cap, here 250 in a row."""
    report = run(
        artifact, frame, spans((560, 809)), config={"calibration": {"min_scale_rows": 100, "max_scale_rows": 100}}
    )
    assert report.metadata["confirmed_rows_left_out"] == 250


def test_an_event_under_way_keeps_its_start_and_id(artifact: Artifact, frame: SeriesFrame) -> None:
    for rule in ({"kind": "quantile", "alpha": 0.05}, {"kind": "rolling_quantile", "alpha": 0.05, "window": 400}):
        plain = run(artifact, frame, spans(IN_CALIBRATION), config={"rule": rule}).events
        known = plain.filter((pl.col("series_id") == "a") & (pl.col("start") == at(990)))
        assert known.height == 1
        labelled = run(artifact, frame, spans(IN_CALIBRATION, (990, 999)), config={"rule": rule}).events
        assert known["event_id"].item() in labelled["event_id"].to_list()


def test_a_stream_leaves_out_the_same_rows(artifact: Artifact, frame: SeriesFrame) -> None:
    """Started with the same labels, a stream judges every later row as the batch does (checklist 7)."""
    labels = spans(IN_SCALE, IN_CALIBRATION, (990, 1_020))
    config = validate(DetectConfig, CONFIG | {"rule": {"kind": "rolling_quantile", "alpha": 0.05, "window": 400}})
    batch = detect(artifact, frame, config, start=at(SCORED), confirmed=labels)
    stream = OnlineDetector.start(artifact, frame.until(at(SCORED - 1)), config, start=at(SCORED), confirmed=labels)
    parts = [stream.update(frame.between(at(low), at(low + 49)).table) for low in range(SCORED, ROWS, 50)]
    key = ["series_id", "variate", "time"]
    scores = pl.concat([part.scores for part in parts]).sort(key)
    for name in ("score", "threshold", "p_value"):
        expected = batch.scores.table.sort(key)[name].to_numpy()
        np.testing.assert_allclose(scores[name].to_numpy(), expected, rtol=1e-9, err_msg=name)
    closed = pl.concat([part.closed for part in parts])
    assert set(closed["event_id"]) == set(batch.events.filter(pl.col("state") == "closed")["event_id"])
    plain = OnlineDetector.start(artifact, frame.until(at(SCORED - 1)), config, start=at(SCORED))
    unlike = plain.update(frame.between(at(SCORED), at(SCORED + 49)).table).scores.sort(key)
    assert not unlike["threshold"].equals(parts[0].scores.sort(key)["threshold"]), "the labels did nothing"


# --- no leak ---


def labels_of_scored_rows_change_nothing(artifact: Artifact, frame: SeriesFrame) -> bool:
    """Label what is scored, in several ways, and compare everything that is judged."""
    plain = run(artifact, frame, spans(IN_CALIBRATION), config={"rule": {"kind": "rolling_quantile", "alpha": 0.01}})
    for later in ((1_000, 1_010), (1_050, 1_200)):
        again = run(
            artifact,
            frame,
            pl.concat([spans(IN_CALIBRATION), spans(later), spans(later, series="b")]),
            config={"rule": {"kind": "rolling_quantile", "alpha": 0.01}},
        )
        if not (again.scores.table.equals(plain.scores.table) and again.events.equals(plain.events)):
            return False
    return True


def test_labels_of_scored_rows_change_nothing(artifact: Artifact, frame: SeriesFrame) -> None:
    assert labels_of_scored_rows_change_nothing(artifact, frame)


def test_a_detector_that_uses_labels_of_scored_rows_is_caught(
    artifact: Artifact, frame: SeriesFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saboteur takes labels of scored rows and lets them lower the scale of everything."""

    def leaky(confirmed: pl.DataFrame | None, grid: TimeGrid, start: int) -> ConfirmedRows:
        found = confirmed_rows(confirmed, grid, start + 10_000)
        moved = {
            name: tuple((low - 300, high - 300) if low >= start else (low, high) for low, high in pairs)
            for name, pairs in found.spans.items()
        }
        return ConfirmedRows(moved)

    monkeypatch.setattr(detector, "confirmed_rows", leaky)
    assert not labels_of_scored_rows_change_nothing(artifact, frame)


def test_labels_made_in_hindsight_are_used_and_named(artifact: Artifact, frame: SeriesFrame) -> None:
    early = spans(IN_SCALE, event_id="early", confirmed_at=at(900))
    late = spans(IN_CALIBRATION, event_id="late", confirmed_at=at(1_200))
    report = run(artifact, frame, pl.concat([early, late]))
    assert report.metadata["confirmed_in_hindsight"] == ["late"]
    assert report.metadata["confirmed_rows_left_out"] == 46
    assert [text for text in report.metadata["notices"] if "confirmed after the first scored row (late)" in text]
    quiet = run(artifact, frame, early)
    assert not [text for text in quiet.metadata["notices"] if "confirmed" in text]


# --- rows and rules ---


def test_spans_become_rows(frame: SeriesFrame) -> None:
    grid = TimeGrid(origin=START, freq="1h")
    between = pl.DataFrame(
        {
            "series_id": ["a", "a", "b"],
            "start": [at(3) - timedelta(minutes=20), at(6), at(9) + timedelta(minutes=1)],
            "end": [at(4) + timedelta(minutes=59), at(99), at(9) + timedelta(minutes=2)],
        }
    )
    rows = confirmed_rows(between, grid, 10)
    assert rows.spans == {"a": ((3, 5), (6, 10))}, "off the grid, into the scored rows, between two rows"
    assert rows.mask("a", 2, 9).tolist() == [False, True, True, False, True, True, True, True, False]
    assert not rows.mask("z", 0, 5).any()
    assert not rows.mask("a", 50, 5).any()
    with pytest.raises(DataError, match="lack end"):
        confirmed_rows(between.drop("end"), grid, 10)
    with pytest.raises(DataError, match="not an integer"):
        confirmed_rows(between, TimeGrid(origin=0, freq="1i"), 10)


def test_a_rule_judges_confirmed_rows_and_does_not_learn_them() -> None:
    """Against a plain loop over a list."""
    generator = np.random.default_rng(0)
    scores = generator.exponential(size=400)
    scores[150:180] += 20.0
    scores[generator.choice(400, 20, replace=False)] = np.nan
    confirmed = np.zeros(400, dtype=bool)
    confirmed[150:180] = True
    start = generator.exponential(size=60).tolist()
    found = judge(RollingQuantile(0.05, 50).fit(start), scores, confirmed)
    window = start[-50:]
    for row, score in enumerate(scores.tolist()):
        ordered = sorted(window)
        level = ordered[min(math.ceil(0.95 * (len(ordered) + 1)), len(ordered)) - 1]
        assert found.threshold[row] == level, row
        assert bool(found.alarm[row]) == (score > level), row
        if not confirmed[row] and not math.isnan(score):
            window = [*window, score][-50:]
    assert found.alarm[150:180][~np.isnan(scores[150:180])].all()
    assert judge(Fixed(3.0), scores, confirmed).alarm.tolist() == (scores > 3.0).tolist()


# --- with the store ---


def stored(workspace: Workspace) -> EventStore:
    return EventStore(workspace.database_url)


def test_a_detection_records_its_events_once(site: Any) -> None:
    workspace = Workspace.open(site.home)
    first = detect_job(DetectJobConfig(stop="2026-03-05"), workspace)
    assert first.recorded is not None
    assert first.recorded.new == first.report.events.height == first.summary()["new_events"]
    with closing(stored(workspace)) as store:
        events, trail = store.events("plant"), store.log()
        assert events["event_id"].to_list() == first.report.events.sort("start", "series_id")["event_id"].to_list()
        assert set(events["source"]) == {f"detect:{first.id}"}
        assert set(events["artifact"]) == {site.artifact}
        facts = store.event(events["event_id"][0])["facts"]
        assert facts["calibration"] == " to ".join(first.report.metadata["series"]["a"]["calibration"])
        again = detect_job(DetectJobConfig(stop="2026-03-05"), workspace)
        assert again.recorded is not None
        assert (again.recorded.new, again.recorded.updated) == (0, 0)
        assert store.events("plant").equals(events)
        assert store.log().equals(trail)
        other = {"rule": {"kind": "quantile", "alpha": 0.001}}
        detect_job(DetectJobConfig(stop="2026-03-05", detector=validate(DetectConfig, other)), workspace)
        assert store.events("plant")["rule"].n_unique() == 2
        assert not set(store.events("plant").filter(pl.col("rule").str.starts_with("quantile"))["event_id"]) & set(
            events["event_id"]
        )
        quiet = detect_job(DetectJobConfig(stop="2026-03-06", save=False), workspace)
        assert quiet.recorded is None


def test_confirmed_events_are_left_out_of_the_next_detection_and_dismissed_ones_are_not(site: Any) -> None:
    workspace = Workspace.open(site.home)
    done = detect_job(DetectJobConfig(stop="2026-03-05"), workspace)
    jump = done.report.events.filter(pl.col("series_id") == "a").sort("peak_score")[-1]
    later = DetectJobConfig(start="2026-03-05", save=False)
    before = detect_job(later, workspace).report
    with closing(stored(workspace)) as store:
        store.set_state(jump["event_id"].item(), "dismissed", actor="eva")
        dismissed = detect_job(later, workspace).report
        assert dismissed.scores.table.equals(before.scores.table)
        assert dismissed.metadata["confirmed_rows_left_out"] == 0
        store.set_state(jump["event_id"].item(), "reopened", actor="eva")
        store.set_state(jump["event_id"].item(), "confirmed", actor="eva")
        after = detect_job(later, workspace)
    assert after.report.metadata["confirmed_rows_left_out"] == jump["length"].item()
    assert after.summary()["confirmed_rows_left_out"] == jump["length"].item()
    assert after.report.metadata["confirmed_in_hindsight"] == jump["event_id"].to_list()
    assert joint(after.report)["threshold"][0] < joint(before)["threshold"][0]
    ignored = detect_job(later.model_copy(update={"confirmed": False}), workspace).report
    assert ignored.scores.table.equals(before.scores.table)


def test_a_batch_records_and_uses_what_was_confirmed_by_its_moment(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.open(site.home)
    config = validate(BatchConfig, site.batch())
    run_batch(config, parse_as_of("2026-03-04"), workspace)
    with closing(stored(workspace)) as store:
        events, trail = store.events("plant"), store.log()
        assert events.height
        assert set(events["source"]) == {"batch:daily@2026-03-04T00:00:00Z"}
        assert run_batch(config, parse_as_of("2026-03-04"), workspace, force=True).status == "published"
        assert store.log().equals(trail), "published again, recorded once"
        store.set_state(events.sort("peak_score")["event_id"][-1], "confirmed", actor="eva")
        forced = run_batch(config, parse_as_of("2026-03-09"), workspace)
        # the confirmation was made long after that as_of: a backfill must not know it
        assert forced.partition.manifest["confirmed_rows_left_out"] == 0
        assert store.confirmed("plant").height == 1
        # the same, had it been made the day after the event: the fault of 3 March lies before the 3 days to 9 March
        known = partial(confirmed_by, store.confirmed("plant"))
        monkeypatch.setattr("tsforge.app.batch.confirmed_spans", known)
        informed = run_batch(config, parse_as_of("2026-03-09"), workspace, force=True)
        assert informed.partition.manifest["confirmed_rows_left_out"] > 0


def test_a_batch_that_fails_after_recording_is_completed_by_the_next(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are stored before a batch is published: a run that dies in between told nobody, and repeats nothing."""
    workspace = Workspace.open(site.home)
    config = validate(BatchConfig, site.batch())
    publish = published.write_partition

    def full(*_: Any, **__: Any) -> None:
        raise BackendError("cannot write: the disk is full")

    monkeypatch.setattr(published, "write_partition", full)
    with pytest.raises(BackendError, match="disk is full"):
        run_batch(config, parse_as_of("2026-03-04"), workspace)
    monkeypatch.setattr(published, "write_partition", publish)
    with closing(stored(workspace)) as store:
        trail = store.log()
        assert trail.height
        done = run_batch(config, parse_as_of("2026-03-04"), workspace)
        table = done.partition.table("events")
        assert table is not None
        assert table["is_new"].all(), "nothing was published before"
        assert set(store.events("plant")["event_id"]) == set(table["event_id"])
        batch_detect.run(config, parse_as_of("2026-03-04"), workspace)  # a job of its own over the same rows
        assert store.log().equals(trail)


def confirmed_by(table: pl.DataFrame, *_: Any, made_until: datetime) -> pl.DataFrame:
    """Answer as if everything had been confirmed on 5 March."""
    made = parse_as_of("2026-03-05")
    return table.with_columns(confirmed_at=pl.lit(made)) if made <= made_until else table.clear()
