"""Detection with a fitted artifact: causality, spans, missing data, ids over repeated runs, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.preparation import points_per_day
from tsforge.anomaly.spans import SeriesSpans, series_spans
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.grid import TimeGrid

START = datetime(2024, 1, 1)
ROWS = 1400
TRAIN, VALID = 500, 1000  # rows [0, 500) train, [500, 1000) valid, the rest is scored
SPIKE, BLOCK = 1100, slice(1200, 1230)


def table(rows: int = ROWS, seed: int = 0) -> pl.DataFrame:
    """Two series of three coupled variates; a spike in a.y at row 1100, a missing block in a at rows 1200 to 1229."""
    generator = np.random.default_rng(seed)
    parts = []
    for name in ("a", "b"):
        hour = np.arange(rows)
        x = 3 * np.sin(2 * np.pi * hour / 24) + generator.normal(0, 0.4, rows)
        y = 0.8 * x + generator.normal(0, 0.3, rows)
        z = generator.normal(0, 1.0, rows)
        if name == "a":
            y[SPIKE] += 12.0
        columns = {"x": x, "y": y, "z": z}
        if name == "a" and rows > BLOCK.stop:
            for values in columns.values():
                values[BLOCK] = np.nan
        parts.append(
            pl.DataFrame(
                {"series_id": [name] * rows, "time": [START + timedelta(hours=int(h)) for h in hour], **columns}
            ).fill_nan(None)
        )
    return pl.concat(parts)


def as_frame(data: pl.DataFrame) -> SeriesFrame:
    return SeriesFrame.from_long(data, time="time", series_id="series_id", targets=["x", "y", "z"])


def hours(row: int) -> datetime:
    return START + timedelta(hours=row)


def fitted(frame: SeriesFrame, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": 48, "horizon": 6},
        "split": {"kind": "counts", "counts": [TRAIN, VALID - TRAIN, ROWS - VALID]},
    }
    return fit_frame(frame, validate(FitConfig, settings | changes))[0]


@pytest.fixture(scope="module")
def data() -> pl.DataFrame:
    return table()


@pytest.fixture(scope="module")
def artifact(data: pl.DataFrame) -> Artifact:
    return fitted(as_frame(data))


@pytest.fixture(scope="module")
def report(artifact: Artifact, data: pl.DataFrame) -> AnomalyReport:
    return detect(artifact, as_frame(data))


def joint(report: AnomalyReport, series: str) -> pl.DataFrame:
    return report.scores.table.filter((pl.col("series_id") == series) & (pl.col("variate") == JOINT))


def config(**values: Any) -> DetectConfig:
    return validate(DetectConfig, values)


def changed(data: pl.DataFrame, series: str, name: str, rows: slice, by: float) -> pl.DataFrame:
    inside = (pl.col("series_id") == series) & pl.col("time").is_between(hours(rows.start), hours(rows.stop - 1))
    return data.with_columns(pl.when(inside).then(pl.col(name) + by).otherwise(pl.col(name)).alias(name))


def test_the_spike_is_an_event_of_its_variate(report: AnomalyReport) -> None:
    found = report.events.filter(pl.col("series_id") == "a").sort("peak_score", descending=True).to_dicts()[0]
    assert found["peak_time"].replace(tzinfo=None) == hours(SPIKE)
    assert found["start"] <= found["peak_time"] <= found["end"]
    assert found["variates"][0]["variate"] == "y"
    assert found["peak_score"] > found["threshold"]
    assert found["p_value"] < 0.01
    assert found["state"] == "closed"


def test_scoring_starts_after_the_validation_span_and_the_report_says_what_calibrated_it(
    report: AnomalyReport,
) -> None:
    assert report.scores.table["time"].min().replace(tzinfo=None) == hours(VALID)  # type: ignore[union-attr]
    facts = report.metadata["series"]["a"]
    assert facts["scale"][0].startswith(str(hours(TRAIN)))
    assert facts["scale"][1] < facts["calibration"][0] < facts["calibration"][1] < report.metadata["scored"][0]
    assert facts["rows"] + 250 == VALID - TRAIN
    assert 0 < facts["effective_rows"] <= facts["rows"]
    assert report.metadata["assumed_clean"] is True
    assert report.metadata["latency"] == 0
    assert report.metadata["artifact_id"]


def test_a_missing_block_has_no_score_and_no_event_spans_it(report: AnomalyReport, artifact: Artifact) -> None:
    """Checklist 11."""
    scores = joint(report, "a")
    assert scores["score"][BLOCK.start - VALID : BLOCK.stop - VALID].null_count() == BLOCK.stop - BLOCK.start
    assert scores["score"].null_count() == BLOCK.stop - BLOCK.start
    assert not scores["alarm"][BLOCK.start - VALID : BLOCK.stop - VALID].any()
    data = changed(table(), "a", "y", slice(1195, 1240), 12.0)
    for gap, expected in ((0, 0), (30, 1)):
        found = detect(artifact, as_frame(data), config(events={"merge_gap": gap})).events
        across = (pl.col("start").dt.replace_time_zone(None) < hours(1200)) & (
            pl.col("end").dt.replace_time_zone(None) >= hours(1230)
        )
        assert found.filter((pl.col("series_id") == "a") & across).height == expected


@pytest.mark.parametrize(
    "memory",
    [{"smoothing": 0.3}, {"ewma": 0.1}, {"smoothing": {"kind": "two_sided", "reach": 7}}],
    ids=["smoothing", "ewma", "two_sided"],
)
@pytest.mark.parametrize("name", ["mahalanobis", "mean_abs", "fisher", "product"])
def test_changing_the_future_changes_no_score_up_to_now(
    artifact: Artifact, data: pl.DataFrame, name: str, memory: dict[str, Any]
) -> None:
    settings = config(score={"joint": name, **memory})
    now = 1150
    after = changed(data, "a", "x", slice(now + 1, ROWS), 25.0)
    one, two = (joint(detect(artifact, as_frame(part), settings), "a") for part in (data, after))
    until = now + 1 - VALID - settings.score.latency  # what such a row is told rests on so many later ones, as it says
    for column in ("score", "p_value", "threshold", "alarm"):
        assert one[column][:until].equals(two[column][:until]), column
    assert one["score"][:until].drop_nulls().len() > 100
    assert not one["score"][until:].equals(two["score"][until:])


def test_series_do_not_influence_each_other(artifact: Artifact, data: pl.DataFrame, report: AnomalyReport) -> None:
    other = detect(artifact, as_frame(changed(data, "b", "x", slice(600, ROWS), 9.0)))
    assert joint(other, "a").equals(joint(report, "a"))
    alone = detect(artifact, as_frame(data.filter(pl.col("series_id") == "a")))
    assert joint(alone, "a")["score"].to_numpy() == pytest.approx(joint(report, "a")["score"].to_numpy(), nan_ok=True)


def test_repeated_runs_from_later_starts_keep_scores_ids_and_starts(artifact: Artifact, data: pl.DataFrame) -> None:
    shifted = as_frame(changed(data, "b", "x", slice(1090, 1120), 8.0))
    settings = config(rule={"kind": "rolling_quantile", "alpha": 0.01}, calibration={"max_scale_rows": 200})
    whole = detect(artifact, shifted, settings)
    later = detect(artifact, shifted, settings, start=hours(1110))  # in the middle of the event
    until = joint(whole, "b").filter(pl.col("time").dt.replace_time_zone(None) >= hours(1110))
    assert until["score"].to_numpy() == pytest.approx(joint(later, "b")["score"].to_numpy())
    seen = whole.events.filter(pl.col("end").dt.replace_time_zone(None) >= hours(1110))
    assert later.events["event_id"].to_list() == seen["event_id"].to_list()
    assert later.events["start"].to_list() == seen["start"].to_list()
    assert detect(artifact, shifted, settings).events.equals(whole.events)


def test_masked_for_the_network_raw_for_the_judge(artifact: Artifact, data: pl.DataFrame) -> None:
    raw = as_frame(changed(data, "b", "x", slice(1300, 1301), 1e4))
    seen, hidden = raw.mask_outside({"x": (-100.0, 100.0)})
    assert hidden == {"x": 1}
    report = detect(artifact, seen, values=raw)
    found = report.events.filter(pl.col("series_id") == "b").sort("peak_score", descending=True).to_dicts()[0]
    assert found["peak_time"].replace(tzinfo=None) == hours(1300)
    assert found["variates"][0]["variate"] == "x"
    # what follows is judged by forecasts that never saw the nonsense
    after = joint(report, "b")["score"][1301 - VALID : 1310 - VALID]
    assert after.max() < 100  # type: ignore[operator]
    assert joint(detect(artifact, seen), "b")["alarm"][1300 - VALID] in (False, None)


def test_tail_scores_need_a_distribution(artifact: Artifact, data: pl.DataFrame) -> None:
    settings = config(score={"kind": "tail"})
    with pytest.raises(ModelError, match="tail probabilities"):
        detect(artifact, as_frame(data), settings)
    likely = fitted(as_frame(data), likelihood={"name": "normal"})
    raw = as_frame(changed(data, "b", "x", slice(1300, 1301), 1e4))
    seen, _ = raw.mask_outside({"x": (-100.0, 100.0)})
    report = detect(likely, seen, settings, values=raw)
    strongest = report.events.sort("peak_score", descending=True).group_by("series_id", maintain_order=True).first()
    peaks = {row["series_id"]: row["peak_time"].replace(tzinfo=None) for row in strongest.to_dicts()}
    assert peaks == {"a": hours(SPIKE), "b": hours(1300)}


def test_a_channel_that_leaves_its_training_constant_is_reported() -> None:
    data = table().with_columns(z=pl.lit(5.0))
    artifact = fitted(as_frame(data))
    clean = detect(artifact, as_frame(data))
    assert clean.metadata["series"]["a"]["variates_constant"] == 1
    moved = detect(artifact, as_frame(changed(data, "b", "z", slice(1350, 1352), 1e-3)))
    found = moved.events.filter(pl.col("series_id") == "b").sort("peak_score", descending=True).to_dicts()[0]
    assert found["start"].replace(tzinfo=None) == hours(1350)
    assert found["variates"][0]["variate"] == "z"


def test_a_series_without_enough_rows_is_left_out_and_named(artifact: Artifact, data: pl.DataFrame) -> None:
    short = data.filter((pl.col("series_id") == "a") | (pl.col("time") >= hours(VALID - 60)))
    report = detect(artifact, as_frame(short))
    assert set(report.scores.table["series_id"]) == {"a"}
    assert any(
        "1 of 2 series cannot be calibrated" in notice and "'b' has" in notice for notice in report.metadata["notices"]
    )


def test_a_series_that_does_not_suit_the_rule_leaves_the_others_be(artifact: Artifact, data: pl.DataFrame) -> None:
    """A sensor that stood still while calibrating stopped the detection of all series."""
    still = (pl.col("series_id") == "b") & (pl.col("time") >= hours(TRAIN - 100)) & (pl.col("time") < hours(VALID))
    stuck = data.with_columns(pl.when(still).then(1.0).otherwise(name).alias(name) for name in ("x", "y", "z"))
    settings = config(score={"smoothing": {"kind": "cusum"}})
    report = detect(artifact, as_frame(stuck), settings)
    alone = detect(artifact, as_frame(stuck.filter(pl.col("series_id") == "a")), settings)
    assert report.scores.table.equals(alone.scores.table)
    (notice,) = (text for text in report.metadata["notices"] if "1 of 2 series are not scored: 'b': " in text)
    stream = OnlineDetector.start(artifact, as_frame(stuck), settings, start=hours(VALID))
    assert stream.series == ("a",)
    assert notice in stream.notices
    with pytest.raises(DataError, match="scores are equal") as said:
        detect(artifact, as_frame(stuck.filter(pl.col("series_id") == "b")), settings)
    assert str(said.value) in notice
    twice = stuck.filter(pl.col("series_id") == "b")
    both = pl.concat([twice, twice.with_columns(series_id=pl.lit("a"))])
    with pytest.raises(DataError, match="no series can be scored: 'a', 'b': "):
        detect(artifact, as_frame(both), settings)


def test_too_few_rows_before_the_start_is_an_error_with_the_number(artifact: Artifact, data: pl.DataFrame) -> None:
    with pytest.raises(DataError, match=r"at least 100 rows with a forecast and a value are needed, 'a' has 80"):
        detect(artifact, as_frame(data), start=hours(TRAIN + 80))
    late = config(score={"smoothing": {"kind": "two_sided"}})  # the last 30 of 120 read scored rows
    with pytest.raises(DataError, match=r"at least 100 rows with a forecast and a value are needed, 'a' has 90"):
        detect(artifact, as_frame(data), late, start=hours(TRAIN + 120))
    assert detect(artifact, as_frame(data), config(), start=hours(TRAIN + 120)).scores.table.height
    with pytest.raises(DataError, match="no row lies between training"):
        detect(artifact, as_frame(data), start=hours(TRAIN))
    with pytest.raises(DataError, match="would reach into the rows that fitted artifact"):
        detect(artifact, as_frame(data), start=hours(TRAIN - 1))
    with pytest.raises(DataError, match="no row to score from"):
        detect(artifact, as_frame(data), start=hours(ROWS + 5))


@pytest.mark.parametrize("kind", ["normalised", "latent"])
def test_a_value_beyond_single_precision_is_refused_by_its_place_and_not_as_a_lack_of_rows(
    artifact: Artifact, data: pl.DataFrame, kind: str
) -> None:
    broken, model = changed(data, "b", "z", slice(1300, 1301), 1e39), artifact
    if kind == "latent":
        settings = {"model": {"name": "gru", "d_model": 4}, "train": {"max_epochs": 1, "max_steps_per_epoch": 2}}
        model = fitted(as_frame(data), **settings)
    with pytest.raises(DataError, match=r"beyond 3\.4e\+38.*'b'"):
        detect(model, as_frame(broken), config(score={"kind": kind}), start=hours(VALID + 200))


def test_confirmed_rows_teach_nothing_where_a_series_has_no_training_rows(
    artifact: Artifact, data: pl.DataFrame
) -> None:
    """Such a series is compared with the rows before scoring; nothing of that may rest on confirmed ones."""
    late = data.filter((pl.col("series_id") != "a") | (pl.col("time") >= hours(TRAIN)))
    wild = changed(late, "a", "x", slice(600, 620), 40.0)
    spans = pl.DataFrame({"series_id": ["a"], "start": [hours(560)], "end": [hours(700)]})
    settings = config(score={"joint": "consensus", "steps": [1]})
    one, other = (
        detect(artifact, as_frame(rows), settings, start=hours(VALID + 60), confirmed=spans) for rows in (late, wild)
    )
    assert joint(one, "a")["score"].drop_nulls().len() > 300
    assert joint(one, "a").equals(joint(other, "a"))


def test_a_long_memory_gets_the_rows_it_needs_or_the_series_is_left_out(artifact: Artifact, data: pl.DataFrame) -> None:
    """160 rows set the scale for ``ewma: 0.0125``, though half of those at hand would be fewer."""
    settings = config(score={"ewma": 0.0125})
    assert settings.score.remembered_rows == 160
    spans = series_spans(np.ones(270, dtype=bool), 0, 3, settings.calibration, remembered=160)
    assert isinstance(spans, SeriesSpans)
    assert (spans.scale, spans.calibration, spans.is_shared) == ((0, 160), (160, 270), False)
    assert detect(artifact, as_frame(data), settings, start=hours(TRAIN + 270)).scores.table["score"].drop_nulls().len()
    with pytest.raises(DataError, match=r"at least 160 rows with a forecast and a value are needed, 'a' has 150"):
        detect(artifact, as_frame(data), settings, start=hours(TRAIN + 150))
    assert detect(artifact, as_frame(data), config(), start=hours(TRAIN + 150)).scores.table.height
    short = data.filter((pl.col("series_id") == "a") | (pl.col("time") >= hours(TRAIN + 270 - 130)))
    report = detect(artifact, as_frame(short), settings, start=hours(TRAIN + 270))
    assert any("1 of 2 series cannot be calibrated" in notice for notice in report.metadata["notices"])


def test_one_span_for_scale_and_calibration_is_said(artifact: Artifact, data: pl.DataFrame) -> None:
    report = detect(artifact, as_frame(data), start=hours(TRAIN + 120))
    assert report.metadata["series"]["a"]["scale_and_calibration_shared"] is True
    assert any("share their rows" in notice for notice in report.metadata["notices"])


def test_a_rate_the_calibration_cannot_resolve_is_said(artifact: Artifact, data: pl.DataFrame) -> None:
    report = detect(artifact, as_frame(data), config(rule={"kind": "quantile", "alpha": 0.001}))
    assert any("calibrated on fewer rows than the alarm rate needs" in notice for notice in report.metadata["notices"])


def test_drift_raises_the_health_notice(artifact: Artifact, data: pl.DataFrame) -> None:
    drifting = data.with_columns(
        y=pl.col("y") + 0.1 * (pl.int_range(pl.len()).over("series_id") - VALID).clip(lower_bound=0)
    )
    report = detect(artifact, as_frame(drifting), config(rule={"kind": "quantile", "alpha": 0.01}))
    assert report.metadata["series"]["b"]["alarm_rate_ratio"] > 5
    assert any(notice.startswith("model health: b ") for notice in report.metadata["notices"])


def test_steps_beyond_the_horizon_and_an_artifact_without_spans_are_refused(
    artifact: Artifact, data: pl.DataFrame
) -> None:
    with pytest.raises(ConfigError, match=r"score\.steps: 7 is beyond the artifact's horizon of 6"):
        detect(artifact, as_frame(data), config(score={"steps": [1, 7]}))
    with pytest.raises(ArtifactError, match="does not say which rows it was fitted on"):
        detect(replace(artifact, provenance={}), as_frame(data))


def test_stop_is_included(artifact: Artifact, data: pl.DataFrame) -> None:
    report = detect(artifact, as_frame(data), start=hours(1050), stop=hours(1060))
    assert joint(report, "b").height == 11


def test_integer_time_needs_rows_a_day() -> None:
    data = table().with_columns(time=pl.int_range(pl.len()).over("series_id"))
    artifact = fitted(as_frame(data))
    with pytest.raises(ConfigError, match="points_per_day"):
        detect(artifact, as_frame(data))
    report = detect(artifact, as_frame(data), config(rule={"points_per_day": 24}), start=VALID + 10, stop=VALID + 19)
    assert joint(report, "a")["time"].to_list() == list(range(VALID + 10, VALID + 20))


def test_rows_a_day_of_grids() -> None:
    found = {freq: points_per_day(TimeGrid(START, freq)) for freq in ("15m", "1d", "1w", "1mo")}
    assert found == pytest.approx({"15m": 96.0, "1d": 1.0, "1w": 1 / 7, "1mo": 12 / 365.2425})
    assert points_per_day(TimeGrid(0, "1i")) is None
