"""Online detection by scores that judge windows, contexts and free runs, against batch detection over the same rows.

The oracle is ``detect`` (the scores themselves are checked by hand elsewhere): to the last bit, however rows are cut
and however often the state went through a file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_online_detector import (
    BEGIN,
    ROWS,
    TRAIN,
    Log,
    artifact_of,
    as_frame,
    between,
    check_equal,
    cuts,
    hours,
    made,
    settings,
    streamed,
)

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.anomaly.online import OnlineDetector
from tsforge.anomaly.online_windows import KeptWindows
from tsforge.anomaly.windowed import WindowJudge
from tsforge.artifact import Artifact
from tsforge.core.errors import DataError, ModelError

NETWORKS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "s4": {"name": "s4", "d_model": 16, "d_state": 16},
    "gru": {"name": "gru", "d_model": 16, "dropout": 0.0},
    "chimera": {"name": "chimera", "d_model": 16, "d_state": 4, "num_layers": 1},
    "masked": {"name": "chimera", "d_model": 16, "d_state": 4, "num_layers": 1, "reconstruct": True},
    "plrnn": {"name": "plrnn", "latent": 8, "hidden": 16, "ensemble": 2},
    "almost_linear": {
        **{"name": "plrnn", "kind": "almost_linear", "latent": 8, "rectified": 3, "ensemble": 1},
        "normalisation": "none",
    },
    "pvrnn": {
        **{"name": "pvrnn", "units": [16], "latents": [2], "time_constants": [1.5], "window": 5},
        **{"training_steps": 2, "inference_steps": 4},
    },
}
SCORES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"kind": "spectrum", "window": 24, "stride": 5, "joint": "mean_abs"}),
    ("linear", {"kind": "spectrum", "window": 17, "stride": 1}),
    ("linear", {"kind": "states", "window": 24, "stride": 3, "bins": 4}),
    ("linear", {"kind": "states", "window": 20, "lag": 2, "joint": "max_abs", "smoothing": 0.2}),
    ("linear", {"kind": "reconstruction", "window": 6}),
    ("linear", {"kind": "reconstruction", "window": 9, "overlap_reduction": "mean"}),
    ("linear", {"kind": "reconstruction", "window": 5, "overlap_reduction": "median", "smoothing": 0.3}),
    (
        "linear",
        {
            **{"kind": "reconstruction", "window": 5, "overlap_reduction": "mean", "joint": "balanced"},
            "smoothing": {"kind": "two_sided", "reach": 6},
        },
    ),
    ("s4", {"kind": "latent", "joint": "mean_abs"}),
    ("gru", {"kind": "latent", "explained": 0.8}),
    ("chimera", {"kind": "latent", "joint": "max_abs"}),
    ("almost_linear", {"kind": "regions", "window": 24, "stride": 4, "joint": "mean_abs"}),
    ("plrnn", {"kind": "growth", "steps": [1, 3, 5]}),
    ("pvrnn", {"kind": "free_energy", "joint": "mean_abs"}),
    ("pvrnn", {"kind": "free_energy", "part": "divergence", "joint": "mean_abs"}),
    ("linear", {"kind": "reconstruction", "window": 5, "overlap_reduction": "mean", "ewma": 0.2}),
    ("plrnn", {"kind": "growth", "steps": [1, 3], "ewma": 0.1}),
    ("masked", {"kind": "masked"}),
    ("masked", {"kind": "masked", "joint": "max_abs", "ewma": 0.2}),
    ("linear", {"kind": "innovation"}),
    ("linear", {"kind": "innovation", "window": 5, "order": 2, "joint": "balanced", "ewma": 0.2}),
]
IDS = [f"{kind['kind']} of {name} {number}" for number, (name, kind) in enumerate(SCORES)]


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return made()


@pytest.fixture(scope="module")
def artifacts(table: pl.DataFrame) -> dict[str, Artifact]:
    found = {name: artifact_of(as_frame(table), model) for name, model in NETWORKS.items()}
    found["plrnn"].network.model.innovation.fill_(0.3)
    return found


def watched(score: dict[str, Any], **changes: Any) -> DetectConfig:
    return settings(score=score, rule={"kind": "rolling_quantile", "alpha": 0.05, "window": 150}, **changes)


def check_any_cut(artifact: Artifact, table: pl.DataFrame, config: DetectConfig) -> None:
    report = detect(artifact, as_frame(table), config, start=hours(BEGIN))
    assert report.scores.table["score"].drop_nulls().n_unique() > 10
    assert report.events.height
    late = config.score.latency
    check_equal(report, streamed(artifact, table, config, cuts("random"), reload=True), late)
    edges = [BEGIN, *range(BEGIN + 25, BEGIN + 38), *range(BEGIN + 94, BEGIN + 100), ROWS]
    check_equal(report, streamed(artifact, table, config, edges), late)


@pytest.mark.parametrize(("name", "score"), SCORES, ids=IDS)
def test_any_cutting_of_the_rows_equals_the_batch_run(
    artifacts: dict[str, Artifact], table: pl.DataFrame, name: str, score: dict[str, Any]
) -> None:
    """Checklist 7: scores bit for bit, events once each, over missing cells, blocks and rows, with files between."""
    check_any_cut(artifacts[name], table, watched(score))


def with_odd_series(table: pl.DataFrame) -> pl.DataFrame:
    """Add series that begin after training and in it, lack a variate, had a constant one, or nothing else."""
    like, time = table.filter(series_id="a"), pl.col("time")
    broken = pl.when(time == hours(BEGIN + 50)).then(9.0).otherwise(5.0)
    odd = {
        "begun": like.filter(time >= hours(BEGIN - 20)),
        "no_z": like.with_columns(z=pl.lit(None, dtype=pl.Float64)),
        "short": like.filter(time >= hours(TRAIN - 8)),
        "steady": like.with_columns(z=broken),
        "z_came": like.with_columns(z=pl.when(time >= hours(TRAIN)).then("z")),
    }
    return pl.concat([table, *(part.with_columns(series_id=pl.lit(name)) for name, part in odd.items())])


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(number, id=IDS[number]) for number in (0, 3, 5, 11)),
        *(pytest.param(number, id=IDS[number], marks=pytest.mark.slow) for number in (4, 8, 19)),
    ],
)
def test_series_and_variates_that_nothing_compares_with_are_left_out_and_named(
    artifacts: dict[str, Artifact], table: pl.DataFrame, number: int
) -> None:
    """One series that began after training must not stop the others, in ``detect`` and in a stream."""
    name, score = SCORES[number]
    odd, config = with_odd_series(table), watched(score)
    check_any_cut(artifacts[name], odd, config)
    report = detect(artifacts[name], as_frame(odd), config, start=hours(BEGIN))
    detector = OnlineDetector.start(artifacts[name], as_frame(odd), config, start=hours(BEGIN))
    assert sorted(report.metadata["series"]) == sorted(detector.series) == ["a", "b", "no_z", "steady", "z_came"]
    for notices in (report.metadata["notices"], detector.notices):
        told = "\n".join(notices)
        assert "2 of 7 series cannot be compared with the rows that trained the artifact (2024-01-01 00:00 to" in told
        assert "not scored: begun, short" in told
        assert "'begun': 150 training rows (0 of" in told or "'begun', 'short'" in told
        assert ("'z' of 'z_came'" in told) == (score["kind"] != "regions")  # states of all variates are one
    facts = report.metadata["series"]
    assert {facts[each]["variates_scored"] for each in ("a", "b", "steady")} == {3}
    assert {facts[each]["variates_scored"] for each in ("no_z", "z_came")} == (
        {3} if score["kind"] == "regions" else {2}
    )
    steady = report.scores.table.filter(series_id="steady", variate="z").sort("time")
    apart = steady.filter(pl.col("score").abs() > 5)
    assert apart["time"].to_list() == [hours(BEGIN + 50)]  # judged by "differs from the constant"


def test_when_nothing_compares_with_any_series_the_error_says_what_helps(
    artifacts: dict[str, Artifact], table: pl.DataFrame
) -> None:
    begun = as_frame(table.filter(pl.col("time") >= hours(TRAIN + 10)))
    for artifact, score, message in (
        (
            "linear",
            {"kind": "reconstruction"},
            "150 training rows .0 of them observed. .*; no score.window helps: give the",
        ),
        ("linear", {"kind": "spectrum", "window": 24}, "2 of 2 series cannot be compared .* no score.window helps"),
        ("linear", {"kind": "innovation"}, "150 training rows .0 of them observed. .*needs 50; give the detector all"),
        ("s4", {"kind": "latent"}, "50 training rows .*, 0 have one; give the detector all rows that trained the"),
    ):
        with pytest.raises(DataError, match=message):
            detect(artifacts[artifact], begun, watched(score), start=hours(BEGIN))
        with pytest.raises(DataError, match=message):
            OnlineDetector.start(artifacts[artifact], begun, watched(score), start=hours(BEGIN))
    frame = as_frame(table)
    with pytest.raises(DataError, match="no window of 200 rows .* lower score.window, to 100 for example"):
        detect(artifacts["linear"], frame, watched({"kind": "spectrum", "window": 200}), start=hours(BEGIN))
    late = table.filter((pl.col("series_id") == "b") | (pl.col("time") >= hours(BEGIN - 20)))
    with pytest.raises(DataError, match="2 of 2 .*'a': 150 .*0 of them.*'b': 150 .*150 of them.* to 100 for example"):
        detect(artifacts["linear"], as_frame(late), watched({"kind": "spectrum", "window": 200}), start=hours(BEGIN))
    some = table.filter((pl.col("series_id") == "a") | (pl.col("time") >= hours(BEGIN - 20)))
    recent = some.filter((pl.col("series_id") == "b") | (pl.col("time") < hours(TRAIN + 30)))
    with pytest.raises(DataError, match="1 of 2 series cannot be compared .*1 of 2 series cannot be calibrated"):
        detect(artifacts["linear"], as_frame(recent), watched({"kind": "states", "window": 16}), start=hours(BEGIN))


LATE = {"kind": "reconstruction", "window": 5, "overlap_reduction": "median"}


def test_a_detector_that_forgets_the_rows_before_is_caught(
    artifacts: dict[str, Artifact], table: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saboteur: nothing of the last rows goes from one update to the next."""
    honest = KeptWindows.take

    def forgetful(self: KeptWindows, *rows: Any) -> Any:
        self.trail = np.full_like(self.trail, np.nan)
        return honest(self, *rows)

    monkeypatch.setattr(KeptWindows, "take", forgetful)
    with pytest.raises(AssertionError):
        check_any_cut(artifacts["linear"], table, watched({"kind": "reconstruction", "window": 6}))


def check_later_rows_move_nothing(artifact: Artifact, table: pl.DataFrame, score: dict[str, Any]) -> None:
    """Checklist 5: in one update, what is said of rows whose window is complete does not move when later rows do."""
    config = watched(score)
    changed = BEGIN + 50  # rows before it are there: their windows have scores
    told_until = hours(changed - config.score.latency)
    later = pl.col("time") >= hours(changed)
    spoiled = table.with_columns(pl.when(later).then(pl.col(name) * 3 + 40).otherwise(pl.col(name)) for name in "xyz")
    told = [pl.concat(streamed(artifact, each, config, [BEGIN, ROWS]).scores) for each in (table, spoiled)]
    before, after = (part.filter(pl.col("time") < told_until) for part in told)
    assert before["score"].drop_nulls().len() > 100
    assert before.equals(after)
    assert not told[0].equals(told[1])


@pytest.mark.parametrize("number", [0, 2, 4, 5, 7, 8, 11, 12, 13, 17, 19, 20], ids=lambda number: IDS[number])
def test_later_rows_never_move_earlier_scores(artifacts: dict[str, Artifact], table: pl.DataFrame, number: int) -> None:
    name, score = SCORES[number]
    check_later_rows_move_nothing(artifacts[name], table, score)


def test_a_score_that_peeks_one_row_ahead_is_caught(
    artifacts: dict[str, Artifact], table: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = WindowJudge.judge

    def peeking(self: WindowJudge, traces: Any, values: Any, first: int) -> Any:
        return honest(self, np.roll(traces, -1, axis=0), values, first)

    monkeypatch.setattr(WindowJudge, "judge", peeking)
    with pytest.raises(AssertionError):
        check_later_rows_move_nothing(artifacts["linear"], table, {"kind": "spectrum", "window": 17, "stride": 1})


def test_a_late_score_comes_when_its_window_is_complete_and_what_waits_never_grows(
    artifacts: dict[str, Artifact], table: pl.DataFrame
) -> None:
    config = watched(LATE)
    assert config.score.latency == 4
    log = Log(OnlineDetector.start(artifacts["linear"], as_frame(table), config, start=hours(BEGIN)))
    kept = [len(log.detector.to_bytes())]
    for row in range(BEGIN, BEGIN + 30):
        log.take(between(table, row, row + 1))
        assert log.detector.ends()["time"].to_list() == [hours(row)] * 2
        times = log.scores[-1]["time"].unique().to_list()
        assert times == ([] if row < BEGIN + 4 else [hours(row - 4)])
        shapes = {one.trail.shape + one.values.shape + one.modes.shape for one in log.detector.recent.kept.values()}
        assert shapes == {(8, 3, 4, 3, 4)}
        kept.append(len(log.detector.to_bytes()))
    assert max(kept) - min(kept) < 4_000  # alarm flags of recent rows, digits of numbers


def test_modes_and_masked_values_wait_with_their_rows(table: pl.DataFrame) -> None:
    spoken = table.with_columns(p=(pl.col("time").dt.hour() < 12).cast(pl.Float64) * 0.1)
    raw = spoken.with_columns(pl.when(pl.col("time") == hours(BEGIN + 110)).then(1e6).otherwise(pl.col("x")).alias("x"))
    masked = raw.with_columns(pl.when(pl.col("x") < 1e5).then(pl.col("x")).alias("x"))
    artifact = artifact_of(as_frame(spoken, past=["p"]), {"name": "ar_net"})
    for by in ("p", "x", "hour_of_week"):
        config = settings(
            score=LATE,
            calibration={"min_rows": 60, "min_scale_rows": 50, "by": by},
            rule={"kind": "quantile", "alpha": 0.2},
        )
        seen = as_frame(masked, past=["p"])
        report = detect(artifact, seen, config, start=hours(BEGIN), values=as_frame(raw, past=["p"]))
        log = Log(OnlineDetector.start(artifact, seen, config, start=hours(BEGIN), values=as_frame(raw, past=["p"])))
        for start, stop in pairwise(cuts("random")):
            log.detector = OnlineDetector.load(log.detector.to_bytes(), artifact)
            log.take(between(masked, start, stop), judged=between(raw, start, stop))
        check_equal(report, log, 4)
        large = pl.concat(log.scores).filter(pl.col("time") == hours(BEGIN + 110), variate="x")
        assert (large["value"] == 1e6).all()


def test_values_that_the_model_never_saw_cost_as_much_as_in_the_batch_run(
    artifacts: dict[str, Artifact], table: pl.DataFrame
) -> None:
    raw = table.with_columns(pl.when(pl.col("time") == hours(BEGIN + 110)).then(1e6).otherwise(pl.col("x")).alias("x"))
    masked = raw.with_columns(pl.when(pl.col("x") < 1e5).then(pl.col("x")).alias("x"))
    for number in (11, 12):  # growth, free energy
        name, score = SCORES[number]
        config = watched(score)
        report = detect(artifacts[name], as_frame(masked), config, start=hours(BEGIN), values=as_frame(raw))
        check_equal(report, streamed(artifacts[name], masked, config, [BEGIN, BEGIN + 105, ROWS], judged=raw))


def test_a_covariate_told_ahead_gives_the_states_of_the_batch_run() -> None:
    full = made(covariates=True)
    frame = as_frame(full, past=["p"], known=["k"])
    artifact = artifact_of(frame, NETWORKS["gru"])
    config = watched({"kind": "latent", "joint": "mean_abs"})
    report = detect(artifact, frame, config, start=hours(BEGIN))
    check_equal(report, streamed(artifact, full, config, cuts("random"), frame=frame))


def test_what_a_model_cannot_give_is_refused_at_the_start(artifacts: dict[str, Artifact], table: pl.DataFrame) -> None:
    coupled = artifact_of(as_frame(table), {"name": "regenn", "ff_dim": 8, "attend": "entities", "graph": "identity"})
    for artifact, kind, message in (
        (artifacts["linear"], "latent", "has no hidden state"),
        (artifacts["linear"], "growth", "does not tell how errors grow"),
        (artifacts["plrnn"], "regions", "almost_linear"),
        (artifacts["linear"], "free_energy", "has no free energy"),
        (artifacts["chimera"], "masked", "was not fitted to tell hidden cells.*reconstruct=true"),
        (artifacts["linear"], "masked", "was not fitted to tell hidden cells"),
    ):
        with pytest.raises(ModelError, match=message):
            OnlineDetector.start(artifact, as_frame(table), watched({"kind": kind}), start=hours(BEGIN))
    # values need no network: a model that reads several series at once does not matter
    config = watched({"kind": "reconstruction", "window": 4})
    report = detect(coupled, as_frame(table), config, start=hours(BEGIN))
    check_equal(report, streamed(coupled, table, config, [BEGIN, BEGIN + 3, ROWS], reload=True))
