"""Online detection against batch detection over the same rows: models, rules, scores; files; every refusal.

The oracle is ``detect`` itself (its own tests are elsewhere) and, for events, ``tests/unit/anomaly``: a stream must
give its scores to the last bit and its events once each, however the rows are cut (checklist 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.online_state import FORMAT_VERSION
from tsforge.artifact import Artifact, collect_provenance, create_artifact, read_tensor_bytes, tensor_file_bytes
from tsforge.contracts.tables import AnomalyReport
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, DataError, ModelError
from tsforge.data.event_records import event_id
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.network import NetworkConfig, build_network

START = datetime(2024, 1, 1, tzinfo=UTC)
TRAIN, BEGIN, ROWS = 150, 620, 760
KEY = ["series_id", "variate", "time"]


def hours(row: int) -> datetime:
    return START + timedelta(hours=row)


def made(covariates: bool = False) -> pl.DataFrame:
    """Two series of three variates: faults after row BEGIN, one across it, missing cells, a missing block, a gap."""
    generator = np.random.default_rng(3)
    parts = []
    for name in ("a", "b"):
        hour = np.arange(ROWS)
        x = 3 * np.sin(2 * np.pi * hour / 24) + generator.normal(0, 0.4, ROWS)
        y = 0.8 * x + generator.normal(0, 0.3, ROWS)
        z = generator.normal(0, 1.0, ROWS)
        values = np.stack([x, y, z], axis=1)
        values[BEGIN - 3 : BEGIN + 4, 0] += 9.0
        for row in (30, 32, 33, 50, 80, 81, 86, 120, 126):
            values[BEGIN + row, row % 3] += 8.0 + 4.0 * generator.random()
        values[BEGIN + 60 : BEGIN + 68] = np.nan
        values[generator.random(values.shape) < 0.02] = np.nan
        columns = {"x": values[:, 0], "y": values[:, 1], "z": values[:, 2]}
        if covariates:
            columns |= {"p": generator.normal(0, 1, ROWS), "k": np.cos(2 * np.pi * hour / 24)}
        times = [hours(int(h)) for h in hour]
        parts.append(pl.DataFrame({"series_id": [name] * ROWS, "time": times, **columns}).fill_nan(None))
    table = pl.concat(parts)
    return table.filter(
        ~((pl.col("series_id") == "b") & pl.col("time").is_between(hours(BEGIN + 95), hours(BEGIN + 97)))
    )


def as_frame(table: pl.DataFrame, **roles: Any) -> SeriesFrame:
    return SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["x", "y", "z"], **roles)


def artifact_of(frame: SeriesFrame, model: dict[str, Any], likelihood: str = "point", **parts: Any) -> Artifact:
    """Return the artifact of a network that was solved where it can be, else of one with random weights."""
    window = WindowSpec(context_length=parts.pop("context_length", 24), horizon=parts.pop("horizon", 6))
    config = validate(NetworkConfig, {"model": model, "likelihood": {"name": likelihood}, **parts})
    schema, panel = frame.schema, Panel.from_frame(frame)
    spec = DataSpec(
        context_length=window.context_length,
        horizon=window.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        num_past=len(schema.past),
        train_length=TRAIN,
    )
    torch.manual_seed(0)
    network = build_network(config, spec)
    training = panel.training_series(None, TRAIN)
    network.fit_scaler(training)
    network.prepare(training)
    if network.solve(training) is None:
        with torch.no_grad():
            for parameter in network.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    provenance = collect_provenance(data_fingerprint="", seeds={}) | {"span_rows": {"train": [0, TRAIN]}}
    return create_artifact(
        network,
        config={},
        schema=schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance=provenance,
    )


def settings(**changes: Any) -> DetectConfig:
    plain: dict[str, Any] = {
        "rule": {"kind": "budget", "alarms_per_day": 1.0, "window": 200},
        "calibration": {"min_rows": 60, "min_scale_rows": 50},
        "events": {"merge_gap": 2, "patience": 2, "cooldown": 30},
    }
    return validate(DetectConfig, plain | changes)


def cuts(how: str) -> list[int]:
    """Return rows at which the updates of [BEGIN, ROWS) begin, and the end."""
    if how == "rows":
        return list(range(BEGIN, ROWS + 1))
    if how == "one":
        return [BEGIN, ROWS]
    inner = np.random.default_rng(len(how)).choice(np.arange(BEGIN + 1, ROWS), 12, replace=False)
    return [BEGIN, *sorted(inner.tolist()), ROWS]


def between(table: pl.DataFrame, start: int, stop: int) -> pl.DataFrame:
    return table.filter(pl.col("time").is_between(hours(start), hours(stop - 1)))


class Log:
    """Everything a stream said, and its detector at the end."""

    def __init__(self, detector: OnlineDetector) -> None:
        self.detector = detector
        self.scores: list[pl.DataFrame] = []
        self.opened: list[pl.DataFrame] = []
        self.closed: list[pl.DataFrame] = []
        self.changed: list[pl.DataFrame] = []

    def take(self, rows: pl.DataFrame, **more: Any) -> None:
        found = self.detector.update(rows, **more)
        for name in ("scores", "opened", "closed", "changed"):
            getattr(self, name).append(getattr(found, name))

    def events(self) -> pl.DataFrame:
        """Return each event as it was last told of."""
        told = pl.concat([part for parts in zip(self.opened, self.changed, self.closed) for part in parts])  # noqa: B905
        return told.unique("event_id", keep="last", maintain_order=True).sort("series_id", "start")


def streamed(
    artifact: Artifact,
    table: pl.DataFrame,
    config: DetectConfig,
    edges: Sequence[int],
    *,
    reload: bool = False,
    frame: SeriesFrame | None = None,
    **more: pl.DataFrame,
) -> Log:
    log = Log(OnlineDetector.start(artifact, frame or as_frame(table), config, start=hours(BEGIN)))
    for start, stop in pairwise(edges):
        if reload:
            log.detector = OnlineDetector.load(log.detector.to_bytes(), artifact)
        log.take(between(table, start, stop), **{name: between(part, start, stop) for name, part in more.items()})
    return log


def check_equal(report: AnomalyReport, log: Log, late: int = 0) -> None:
    """Check scores bit for bit, and events: one opening, one end, the same final facts.

    The last ``late`` rows have no score yet: the batch run shows them empty, the stream not at all.
    """
    table, waiting = pl.concat(log.scores).sort(KEY), pl.col("time") >= hours(ROWS - late)
    # the batch run also shows rows that a series lacks at its end; here all series end together
    assert table.equals(report.scores.table.filter(~waiting).sort(KEY))
    assert report.scores.table.filter(waiting)["score"].null_count() == report.scores.table.filter(waiting).height
    expected = report.events.drop("incident_id", strict=False).sort("series_id", "start")
    assert log.events().equals(expected)
    opened, closed = pl.concat(log.opened), pl.concat(log.closed)
    assert opened["event_id"].is_unique().all()
    assert closed["event_id"].is_unique().all()
    assert set(opened["event_id"]) == set(expected["event_id"])
    assert set(closed["event_id"]) == set(expected.filter(state="closed")["event_id"])


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return made()


@pytest.fixture(scope="module")
def linear(table: pl.DataFrame) -> Artifact:
    return artifact_of(as_frame(table), {"name": "linear"}, "normal")


MODELS: dict[str, dict[str, Any]] = {
    "ar_net": {"name": "ar_net"},
    "ar_net_hidden": {"name": "ar_net", "hidden": [8], "solver": "sgd", "warm_start": False, "season_lengths": [24]},
    "dlinear": {"name": "dlinear", "kernel": 5},
    "seasonal_naive": {"name": "seasonal_naive", "season_length": 12},
    "s4": {"name": "s4", "d_model": 16, "d_state": 16},
    "gru": {"name": "gru", "d_model": 16, "dropout": 0.0},
    "plrnn": {"name": "plrnn", "latent": 12, "hidden": 24, "ensemble": 2},
    "chimera": {"name": "chimera", "d_model": 16, "d_state": 4, "num_layers": 1},
    "regenn": {"name": "regenn", "dropout": 0.0, "ff_dim": 16},
    "regenn_coupled": {"name": "regenn", "dropout": 0.0, "ff_dim": 16, "attend": "entities", "graph": "identity"},
}


@pytest.mark.parametrize("name", MODELS)
def test_any_cutting_of_the_rows_equals_the_batch_run(table: pl.DataFrame, name: str) -> None:
    """Checklist 7: scores bit for bit, events once each, for a model of every family."""
    artifact, config = artifact_of(as_frame(table), MODELS[name]), settings()
    report = detect(artifact, as_frame(table), config, start=hours(BEGIN))
    assert report.events.height > 3
    for how in ("one", "random"):
        check_equal(report, streamed(artifact, table, config, cuts(how)))


@pytest.mark.parametrize(
    ("name", "score"), [("seasonal_naive", {}), ("plrnn", {"kind": "growth", "steps": [2]}), ("regenn_coupled", {})]
)
def test_nothing_is_judged_by_a_context_in_which_its_series_was_not_seen(
    table: pl.DataFrame, name: str, score: dict[str, Any]
) -> None:
    """After an outage longer than the context (24 rows), rows have no score until a forecast has seen one again."""
    dark = (pl.col("series_id") == "a") & pl.col("time").is_between(hours(BEGIN + 40), hours(BEGIN + 69))
    silent = table.with_columns(pl.when(~dark).then(pl.col(name)).alias(name) for name in ("x", "y", "z"))
    artifact, config = artifact_of(as_frame(silent), MODELS[name]), settings(score=score)
    if name == "plrnn":
        artifact.network.model.innovation.fill_(0.3)  # what a fit measures
    report = detect(artifact, as_frame(silent), config, start=hours(BEGIN))
    ahead = score.get("steps", [1])[0]
    first = silent.filter(pl.col("series_id") == "a", pl.col("time") >= hours(BEGIN + 70))
    back = first.filter(pl.any_horizontal(pl.col("x", "y", "z").is_not_null()))["time"][0]
    scores = report.scores.table.filter(series_id="a", variate="x").select("time", "score")
    after = scores.filter(pl.col("time") >= back)
    assert after["score"][:ahead].null_count() == ahead
    assert after["score"][ahead : ahead + 10].null_count() < 10
    other = report.scores.table.filter(series_id="b", variate="x", time=back)
    assert other["score"].null_count() == 0
    for how in ("one", "random"):
        check_equal(report, streamed(artifact, silent, config, cuts(how)))


def test_row_after_row_equals_the_batch_run_with_a_file_between(linear: Artifact, table: pl.DataFrame) -> None:
    """Checklist 7, 11: the state survives a file after every row, in the middle of events and of missing blocks."""
    report = detect(linear, as_frame(table), settings(), start=hours(BEGIN))
    log = streamed(linear, table, settings(), cuts("rows"), reload=True)
    check_equal(report, log)
    assert sum(part.height for part in log.changed) > 5
    assert (report.events["continues"].is_not_null()).any()


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "rolling_quantile", "alpha": 0.02, "window": 150},
        {"kind": "quantile", "alpha": 0.02},
        {"kind": "fixed", "value": 12.0},
        {"kind": "pot"},
        {"kind": "spot"},
        {"kind": "dspot"},
        {"kind": "adaptive"},
        {"kind": "ew_normalised"},
        {"kind": "fdr"},
        {"kind": "fdr", "procedure": "lord"},
        {"kind": "fdr", "procedure": "e_lond"},
        {"kind": "fdr", "procedure": "bh", "block": 50},
    ],
    ids=lambda rule: "_".join(str(part) for part in rule.values()),
)
def test_every_rule_goes_on_where_it_stopped(linear: Artifact, table: pl.DataFrame, rule: dict[str, Any]) -> None:
    if rule["kind"] in ("pot", "spot", "dspot"):  # few calibration rows: begin the tail early
        rule = rule | {"level": 0.51, "risk": 0.02} | ({"depth": 5} if rule["kind"] == "dspot" else {})
    config = settings(rule=rule, keep_variate_scores=False)
    report = detect(linear, as_frame(table), config, start=hours(BEGIN))
    check_equal(report, streamed(linear, table, config, cuts("random"), reload=True))
    check_equal(report, streamed(linear, table, config, [BEGIN, *range(BEGIN + 75, BEGIN + 90), ROWS]))


@pytest.mark.parametrize(
    "changes",
    [
        {"score": {"kind": "tail", "joint": "mean_abs"}},
        {"score": {"kind": "interval", "joint": "max_abs", "horizon_reduction": "max"}},
        {"score": {"kind": "nll", "steps": [1, 2, 5], "horizon_reduction": "last"}},
        {"score": {"joint": "fisher", "steps": [1]}},
        {"score": {"joint": "top_k", "top_k": 2, "horizon_reduction": "first", "smoothing": 0.2}},
        {"score": {"ewma": 0.1}},
        {"score": {"ewma": 0.3, "kind": "tail", "joint": "fisher", "smoothing": 0.2}},
        {"score": {"smoothing": {"kind": "exponential", "weight": 0.3, "gaps": "decay"}}},
        {"score": {"smoothing": {"kind": "median", "window": 5}}},
        {"score": {"smoothing": {"kind": "cusum", "shift": 2.0}}},
        {"score": {"joint": "product"}},
        {"score": {"joint": "balanced", "steps": [1, 4], "ewma": 0.3}},
        {"score": {"joint": "consensus", "smoothing": 0.3, "ewma": 0.3}},
        {"score": {"joint": "consensus", "kind": "tail", "smoothing": {"kind": "two_sided", "weight": 0.2}}},
        {"score": {"joint": "balanced", "smoothing": {"kind": "two_sided", "weight": 0.2}}},
        {"score": {"joint": "product", "smoothing": {"kind": "two_sided", "weight": 0.2}}},
        {"score": {"smoothing": {"kind": "two_sided", "reach": 4}}, "keep_variate_scores": False},
        {"score": {"smoothing": {"kind": "two_sided"}, "ewma": 0.2}, "rule": {"kind": "rolling_quantile"}},
        {"calibration": {"min_rows": 60, "min_scale_rows": 50, "ties": "random", "seed": 3, "method": "conformal"}},
    ],
    ids=lambda changes: str(next(iter(changes.values())))[:60],
)
def test_every_score_smoothing_and_calibration_equals_the_batch_run(
    linear: Artifact, table: pl.DataFrame, changes: dict[str, Any]
) -> None:
    config = settings(**changes)
    late = config.score.latency
    report = detect(linear, as_frame(table), config, start=hours(BEGIN))
    assert report.events.height
    check_equal(report, streamed(linear, table, config, cuts("random"), reload=True), late)
    check_equal(report, streamed(linear, table, config, [BEGIN, *range(BEGIN + 56, BEGIN + 70), ROWS]), late)


def test_scores_by_bucket_equal_the_batch_run(table: pl.DataFrame) -> None:
    spoken = table.with_columns(p=(pl.col("time").dt.hour() < 12).cast(pl.Float64) * 0.1)
    frame = as_frame(spoken, past=["p"])
    artifact = artifact_of(frame, {"name": "ar_net"})
    for by, smoothing in product(("p", "hour_of_week"), (None, {"kind": "two_sided", "reach": 5})):
        config = settings(
            calibration={"min_rows": 60, "min_scale_rows": 50, "by": by},
            rule={"kind": "quantile", "alpha": 0.2},
            score={"smoothing": smoothing},
        )
        report = detect(artifact, frame, config, start=hours(BEGIN))
        log = streamed(artifact, spoken, config, cuts("random"), frame=frame, reload=True)
        check_equal(report, log, config.score.latency)
        small = [notice for notice in report.metadata["notices"] if notice.startswith("calibration.by")]
        assert [notice for notice in log.detector.notices if notice.startswith("calibration.by")] == small
        assert bool(small) == (by == "hour_of_week")


def test_covariates_known_ahead_give_the_scores_of_the_batch_run(table: pl.DataFrame) -> None:
    full = made(covariates=True)
    frame = as_frame(full, past=["p"], known=["k"])
    artifact = artifact_of(frame, {"name": "ar_net"})
    report = detect(artifact, frame, settings(), start=hours(BEGIN))
    check_equal(report, streamed(artifact, full, settings(), cuts("random"), frame=frame))


def test_masked_values_are_judged_though_the_network_never_sees_them(linear: Artifact, table: pl.DataFrame) -> None:
    wild = pl.when(pl.col("time") == hours(BEGIN + 110)).then(1e6).otherwise(pl.col("x")).alias("x")
    raw = table.with_columns(wild)
    masked = raw.with_columns(pl.when(pl.col("x") < 1e5).then(pl.col("x")).alias("x"))
    for kind in ("normalised", "tail"):
        config = settings(score={"kind": kind})
        report = detect(linear, as_frame(masked), config, start=hours(BEGIN), values=as_frame(raw))
        log = streamed(linear, masked, config, cuts("random"), judged=raw)
        check_equal(report, log)
        assert (
            log.events().filter(pl.col("start") <= hours(BEGIN + 110), pl.col("end") >= hours(BEGIN + 110)).height == 2
        )


def test_series_may_come_one_at_a_time_and_rows_between_count_as_missing(linear: Artifact, table: pl.DataFrame) -> None:
    report = detect(linear, as_frame(table), settings(), start=hours(BEGIN))
    log = Log(OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN)))
    for name in ("b", "a"):
        log.take(between(table, BEGIN, ROWS).filter(series_id=name))
    check_equal(report, log)
    assert log.detector.ends()["time"].to_list() == [hours(ROWS - 1)] * 2


def test_an_event_under_way_at_the_start_keeps_its_first_row_and_id(linear: Artifact, table: pl.DataFrame) -> None:
    log = streamed(linear, table, settings(), [BEGIN, BEGIN + 1])
    first = log.opened[0].filter(series_id="a").to_dicts()[0]
    assert first["start"] < hours(BEGIN)
    whole = detect(linear, as_frame(table), settings(), start=hours(BEGIN))
    assert first["event_id"] in set(whole.events["event_id"])
    assert log.closed[0].height == 0


def spoiled_later(table: pl.DataFrame) -> pl.DataFrame:
    later = pl.col("time") >= hours(BEGIN)
    return table.with_columns(pl.when(later).then(pl.col(name) * 9 - 70).otherwise(pl.col(name)) for name in "xyz")


def leaky(artifact: Artifact, table: pl.DataFrame) -> OnlineDetector:
    """A saboteur: its scores are calibrated on rows after the start too."""
    detector = OnlineDetector.start(artifact, as_frame(table), settings(), start=hours(BEGIN))
    ahead = OnlineDetector.start(artifact, as_frame(table), settings(), start=hours(BEGIN + 60))
    for name, monitor in detector.monitors.items():
        monitor.calibration = ahead.monitors[name].calibration
    return detector


def test_nothing_after_the_start_reaches_the_fits(linear: Artifact, table: pl.DataFrame) -> None:
    """Perturb the future: the state at the start, and all that follows, is the same whatever the frame holds later."""
    spoiled, rows = spoiled_later(table), between(table, BEGIN, BEGIN + 60)
    calm = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    wild = OnlineDetector.start(linear, as_frame(spoiled), settings(), start=hours(BEGIN))
    cut = OnlineDetector.start(linear, as_frame(table.filter(pl.col("time") < hours(BEGIN))), settings())
    found = [detector.update(rows).scores for detector in (calm, wild, cut)]
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    sabotaged = [leaky(linear, each).update(rows).scores for each in (table, spoiled)]
    assert not sabotaged[0].equals(sabotaged[1])


def test_later_rows_never_move_earlier_scores(linear: Artifact, table: pl.DataFrame) -> None:
    """Checklist 5: change y after t, scores up to t must not move, in one update too."""
    later = pl.col("time") >= hours(BEGIN + 80)
    spoiled = table.with_columns(pl.when(later).then(pl.col(name) + 40).otherwise(pl.col(name)) for name in "xyz")
    told = [
        pl.concat(streamed(linear, each, settings(), [BEGIN, ROWS]).scores).filter(pl.col("time") < hours(BEGIN + 80))
        for each in (table, spoiled)
    ]
    assert told[0].height > 400
    assert told[0].equals(told[1])


def test_rows_that_do_not_fit_are_refused_and_nothing_changes(linear: Artifact, table: pl.DataFrame) -> None:
    detector = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    detector.update(between(table, BEGIN, BEGIN + 5))
    good = between(table, BEGIN + 5, BEGIN + 9)
    bad = {
        "do not come after": between(table, BEGIN + 3, BEGIN + 9),
        "not in the stream": good.with_columns(series_id=pl.lit("c")),
        "off the grid": good.with_columns(time=pl.col("time") + pl.duration(minutes=7)),
        "duplicate": pl.concat([good, good]),
        "infinite": good.with_columns(x=pl.lit(np.inf)),
        "lack column": good.drop("y"),
        "not numeric": good.with_columns(x=pl.lit("warm")),
    }
    for words, rows in bad.items():
        with pytest.raises(DataError, match=words):
            detector.update(rows)
    fresh = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    fresh.update(between(table, BEGIN, BEGIN + 5))
    assert detector.update(good).scores.equals(fresh.update(good).scores)
    assert detector.update(good.clear()).scores.columns == fresh.update(good.clear()).scores.columns


def test_a_start_within_the_training_rows_is_refused(linear: Artifact, table: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="reach into the rows"):
        OnlineDetector.start(linear, as_frame(table), settings(), start=hours(TRAIN - 10))


def test_a_series_that_cannot_be_calibrated_is_taken_without_being_scored(
    linear: Artifact, table: pl.DataFrame
) -> None:
    late = table.filter((pl.col("series_id") == "a") | (pl.col("time") >= hours(BEGIN - 40)))
    detector = OnlineDetector.start(linear, as_frame(late), settings(), start=hours(BEGIN))
    assert detector.series == ("a",)
    assert "cannot be calibrated" in detector.notices[0]
    assert set(detector.update(between(table, BEGIN, BEGIN + 5)).scores["series_id"]) == {"a"}
    assert detector.ends().height == 2


def test_a_damaged_foreign_or_newer_state_is_one_clear_error(
    linear: Artifact, table: pl.DataFrame, tmp_path: Path
) -> None:
    detector = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    path = tmp_path / "state" / "detector.safetensors"
    detector.save(path)
    assert OnlineDetector.load(path, linear).series == ("a", "b")
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged"):
            OnlineDetector.load(path, linear)
    with pytest.raises(ArtifactError, match="there is no"):
        OnlineDetector.load(tmp_path / "nothing", linear)
    with pytest.raises(ArtifactError, match="not of other"):
        OnlineDetector.load(whole, replace(linear, id="other"))
    tensors, facts = read_tensor_bytes(whole, "the state")
    with pytest.raises(ArtifactError, match="newer tsforge"):
        OnlineDetector.load(tensor_file_bytes(tensors, {**facts, "format_version": FORMAT_VERSION + 1}), linear)
    for version in (0, True, "1", None):
        with pytest.raises(ArtifactError, match="no valid format version"):
            OnlineDetector.load(tensor_file_bytes(tensors, {**facts, "format_version": version}), linear)


def test_a_state_from_before_scores_of_windows_goes_on(linear: Artifact, table: pl.DataFrame) -> None:
    """Format 1 had no entry for the traces of windows."""
    detector = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    tensors, facts = read_tensor_bytes(detector.to_bytes(), "the state")
    state = {name: value for name, value in facts["state"].items() if name != "windows"}
    old = OnlineDetector.load(tensor_file_bytes(tensors, {**facts, "format_version": 1, "state": state}), linear)
    rows = between(table, BEGIN, BEGIN + 30)
    assert old.update(rows).scores.equals(detector.update(rows).scores)


def test_an_event_under_way_in_an_older_state_keeps_its_id(linear: Artifact, table: pl.DataFrame) -> None:
    """Before format 5 no id named the measure."""
    config = settings(score={"joint": "max_abs"}, rule={"kind": "quantile", "alpha": 0.02})
    detector = OnlineDetector.start(linear, as_frame(table), config, start=hours(BEGIN))
    row = BEGIN
    while not detector.announced:
        row += 1
        detector.update(between(table, row - 1, row))
    tensors, facts = read_tensor_bytes(detector.to_bytes(), "the state")
    state = {name: value for name, value in facts["state"].items() if name != "former"}
    old = OnlineDetector.load(tensor_file_bytes(tensors, {**facts, "format_version": 4, "state": state}), linear)
    under_way = {(series, hours(first)) for series, first in detector.announced.items()}
    told: dict[str, dict[tuple[str, datetime], str]] = {"new": {}, "old": {}}
    for name, one in (("new", detector), ("old", old)):
        for first, last in ((row, row + 60), (row + 60, ROWS)):
            found = one.update(between(table, first, last))
            told[name] |= {(item["series_id"], item["start"]): item["event_id"] for item in found.closed.to_dicts()}
            one = OnlineDetector.load(one.to_bytes(), linear)  # its ids last beyond the next state
    assert under_way <= set(told["old"])
    assert len(told["old"]) > len(under_way)
    for (series, start), name in told["old"].items():
        former = event_id(series, start, "quantile(alpha=0.02)")
        assert told["new"][series, start] != former
        assert name == (former if (series, start) in under_way else told["new"][series, start])


def test_a_failure_half_way_leaves_a_state_that_refuses_to_go_on(
    linear: Artifact, table: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = OnlineDetector.start(linear, as_frame(table), settings(), start=hours(BEGIN))
    broken = replace(detector.monitors["b"].model, scale=replace(detector.monitors["b"].model.scale, location=None))
    detector.monitors["b"].model = broken
    with pytest.raises(TypeError):
        detector.update(between(table, BEGIN, BEGIN + 2))
    with pytest.raises(ModelError, match="half-way"):
        detector.update(between(table, BEGIN + 2, BEGIN + 4))
    with pytest.raises(ModelError, match="half-way"):
        detector.to_bytes()


def test_the_state_does_not_grow_in_an_event_without_end(linear: Artifact, table: pl.DataFrame) -> None:
    config = settings(rule={"kind": "fixed", "value": -1.0}, keep_variate_scores=False)
    detector = OnlineDetector.start(linear, as_frame(table), config, start=hours(BEGIN))
    rows = table.filter(pl.col("time").is_between(hours(BEGIN), hours(BEGIN + 59)))
    sizes = []
    for turn in range(8):
        detector.update(rows.with_columns(time=pl.col("time") + pl.duration(hours=60 * turn)))
        sizes.append(len(detector.to_bytes()))
    flags = 2 * 2 * 60 * 8  # the most recent alarm flags fill up to a week
    assert max(sizes) - min(sizes) < flags + 400
    assert all(monitor.current() is not None for monitor in detector.monitors.values())


def test_health_names_the_series_that_alarms_far_too_often(linear: Artifact, table: pl.DataFrame) -> None:
    detector = OnlineDetector.start(
        linear, as_frame(table), settings(rule={"kind": "quantile", "alpha": 0.02}), start=hours(BEGIN)
    )
    assert detector.update(between(table, BEGIN, BEGIN + 2)).health == ()
    wild = pl.when(pl.col("series_id") == "a").then(pl.col("z") * 9).otherwise(pl.col("z")).alias("z")
    shifted = between(table, BEGIN + 2, BEGIN + 60).with_columns(wild)
    found = detector.update(shifted).health
    assert "model health: a raised alarms" in found[0]
    assert detector.health() == found
