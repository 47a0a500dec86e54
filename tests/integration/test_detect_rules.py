"""Every threshold rule through detect and the command line: what the report says of it, the notice of a runaway."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.anomaly.config import DetectConfig
from tsforge.anomaly.detector import detect
from tsforge.app.detect import DetectJobConfig
from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.cli import main
from tsforge.contracts.tables import JOINT, AnomalyReport
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame

ROWS, TRAIN, START, SHIFT = 9_500, 500, 6_500, 7_500

RULES: dict[str, dict[str, Any]] = {
    "rolling_quantile(alpha=0.01,window=5000,exclude_flagged=20)": {
        "kind": "rolling_quantile",
        "alpha": 0.01,
        "exclude_flagged": 20,
    },
    "pot(risk=0.001,level=0.98,tail_shape=nonnegative)": {"kind": "pot", "risk": 0.001},
    "spot(risk=0.001,level=0.98,tail_shape=free,exclude_flagged=120,max_excesses=1000)": {
        "kind": "spot",
        "risk": 0.001,
        "tail_shape": "free",
    },
    "dspot(risk=0.0001,level=0.98,tail_shape=nonnegative,exclude_flagged=all,max_excesses=1000,depth=50)": {
        "kind": "dspot",
        "depth": 50,
        "exclude_flagged": None,
    },
    "adaptive(alpha=0.01,gain=0.005,window=5000)": {"kind": "adaptive", "alpha": 0.01},
    "ew_normalised(alpha=0.001,half_life=720)": {"kind": "ew_normalised"},
    "fdr(procedure=lord_decay,level=0.1,decay=0.99,eta=0.5)": {"kind": "fdr"},
    "fdr(procedure=bh,level=0.1,block=1000)": {"kind": "fdr", "procedure": "bh"},
}


def made(*, spike: float = 0.0, shift: float = 1.0) -> SeriesFrame:
    """One noisy oscillation; a spike at row 7,000, noise of another size from row 7,500 on."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.3, ROWS)
    noise[SHIFT:] *= shift
    noise[7_000] += spike
    table = pl.DataFrame(
        {"series_id": "pump", "time": np.arange(ROWS), "flow": np.sin(2 * np.pi * np.arange(ROWS) / 24) + noise}
    )
    return SeriesFrame.from_long(table, series_id="series_id", time="time", targets=["flow"], freq="1i")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    settings = {
        "data": {"name": "made", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": {"name": "linear"},
        "window": {"context_length": 24, "horizon": 2},
        "split": {"kind": "counts", "counts": [TRAIN, START - TRAIN, ROWS - START]},
    }
    return fit_frame(made(), validate(FitConfig, settings))[0]


def reported(artifact: Artifact, frame: SeriesFrame, rule: dict[str, Any], **more: Any) -> AnomalyReport:
    return detect(artifact, frame, validate(DetectConfig, {"rule": rule, **more}))


@pytest.mark.parametrize("name", RULES)
def test_a_spike_is_an_event_of_every_rule_and_normal_rows_mostly_are_not(artifact: Artifact, name: str) -> None:
    report = reported(artifact, made(spike=6.0), RULES[name])
    assert report.metadata["rule"] == name
    assert report.metadata["rule_learns_from_scored_rows"] is not name.startswith("pot")
    assert 7_000 in report.events["peak_time"].to_list()
    assert set(report.events["rule"]) == {name}
    joint = report.scores.table.filter(pl.col("variate") == JOINT)
    assert joint["alarm"].to_numpy().mean() < 0.03
    assert joint["threshold"].null_count() == 0
    json.dumps(report.metadata)


def test_the_report_states_the_number_of_excesses_and_the_level(artifact: Artifact) -> None:
    facts = reported(artifact, made(), {"kind": "spot"}).metadata["series"]["pump"]["rule"]
    assert facts["num_excesses"] >= 50
    assert {"u", "gamma", "sigma", "excesses_fitted"} <= set(facts)
    assert "level_now" in reported(artifact, made(), {"kind": "fdr"}).metadata["series"]["pump"]["rule"]


def test_leaving_flagged_rows_out_without_end_is_a_model_health_notice(artifact: Artifact) -> None:
    """Checklist 6: the runaway is kept as a test of the warning; a cap or keeping all rows ends it."""

    def outcome(excluded: int) -> tuple[float, bool]:
        rule = {"kind": "rolling_quantile", "alpha": 0.01, "window": 500, "exclude_flagged": excluded}
        report = reported(artifact, made(shift=5.0), rule)
        joint = report.scores.table.filter((pl.col("variate") == JOINT) & (pl.col("time") >= SHIFT + 500))
        notices = [text for text in report.metadata["notices"] if text.startswith("model health: pump raised alarms")]
        return float(joint["alarm"].to_numpy().mean()), bool(notices)

    rate, noticed = outcome(100_000)
    assert rate > 0.2
    assert noticed
    kept, _ = outcome(0)
    assert kept < 0.03
    capped, _ = outcome(5)
    assert kept <= capped < 0.6 * rate


def test_a_calibration_that_cannot_reach_the_level_is_a_notice(artifact: Artifact) -> None:
    rule = {"kind": "fdr", "procedure": "bh", "block": 5000}
    notices = reported(artifact, made(), rule, calibration={"method": "conformal"}).metadata["notices"]
    assert any("1 of 1 series, the first 'pump': rule fdr: its level is 2e-05" in text for text in notices)
    assert not any("no lone row" in text for text in reported(artifact, made(), rule).metadata["notices"])


def test_a_tail_needs_no_notice_about_few_rows_but_enough_excesses(artifact: Artifact) -> None:
    notices = reported(artifact, made(), {"kind": "pot", "risk": 1e-5}).metadata["notices"]
    assert not any("fewer rows than the alarm rate needs" in text for text in notices)
    for rows in (2000, 900):
        few = {"max_rows": rows}
        for rule, more in (({"kind": "spot"}, {}), ({"kind": "dspot"}, {}), ({"kind": "fdr"}, {"method": "gpd"})):
            with pytest.raises(DataError, match=r"calibrate on at least \d+ rows") as said:
                reported(artifact, made(), rule, calibration=few | more)
            needed = re.search(r"at least (\d+) rows", str(said.value))
            assert needed is not None
            assert int(needed[1]) == 3550 + 100 * (rule["kind"] == "dspot")
            reported(artifact, made(), rule, calibration=more | {"max_rows": int(needed[1])})


@pytest.mark.parametrize("level", [0.98, 0.9])  # 2,550 and 510 scores: the judged rows are 1,000 or half of all
def test_rows_that_wait_for_their_smoothed_score_are_among_those_asked_for(artifact: Artifact, level: float) -> None:
    """The stated rows were too few by those whose score is not known when the rule is fitted."""
    score = {"smoothing": {"kind": "two_sided", "weight": 0.9, "reach": 120}}
    rule = {"kind": "spot", "level": level, "risk": 1e-4}
    with pytest.raises(DataError, match=r"120 before the judged ones, whose smoothed scores are late") as said:
        reported(artifact, made(), rule, calibration={"max_rows": 800}, score=score)
    needed = re.search(r"at least (\d+) rows", str(said.value))
    assert needed is not None
    reported(artifact, made(), rule, calibration={"max_rows": int(needed[1])}, score=score)


def test_a_joint_score_of_more_variates_than_there_are_is_a_wrong_setting(artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"detector.score.top_k is 9, and there are 1 variates \(flow\); give 1 to 1"):
        reported(artifact, made(), {"kind": "quantile"}, score={"joint": "top_k", "top_k": 9})


def test_rules_are_settings_of_the_job_and_of_the_command_line(
    site: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def tsforge(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tsforge", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    changed = load(DetectJobConfig, "detect", ["detector.rule.kind=dspot", "detector.rule.depth=20"])
    assert changed.detector.rule.kind == "dspot"
    code, text = tsforge("detect", "detector.rule.kind=ew_normalised", "detector.rule.half_life=100", "save=false")
    assert code == 0, text
    code, text = tsforge("detect", "detector.rule.kind=fdr", "detector.rule.block=10")
    assert code == 2
    assert "block has no effect with procedure 'lord_decay'" in text
