"""The verification checklist of anomaly detection: which test stands for which point, and that it is there.

What needs more than one module is here; the rest stands beside the code it checks.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tsforge.anomaly.baselines import BASELINES, build_baseline
from tsforge.metrics.anomaly import auc_pr, auc_roc, event_score
from tsforge.metrics.headline import GradeSetting, headline
from tsforge.metrics.vus import vus

ROOT = Path(__file__).resolve().parents[2]
HERE = "golden/test_anomaly_checklist.py"
METRICS = "unit/metrics/test_anomaly_metrics.py"
PROPERTIES = "property/test_anomaly_metric_properties.py"
RULES = "unit/anomaly/test_threshold_rules.py"
TAILS = "unit/anomaly/test_tail_and_calibration.py"
EVENTS = "unit/anomaly/test_events.py"
BLAME = "unit/anomaly/test_covariance_and_attribution.py"
ONLINE = "integration/test_online_detector.py"
ORACLES = "golden/test_anomaly_oracles.py"
POINTS: dict[str, list[str]] = {
    "1 golden values and oracles on 100 cases": [
        "golden/test_anomaly_golden.py::test_areas_under_curves",
        "golden/test_anomaly_golden.py::test_volume_under_the_surface",
        "golden/test_anomaly_golden.py::test_best_f1_and_point_adjusted",
        "golden/test_anomaly_golden.py::test_grades_of_predictions",
        "golden/test_anomaly_golden.py::test_affiliation",
        f"{ORACLES}::test_grades_equal_the_other_implementation",
        f"{ORACLES}::test_highest_scores_are_where_the_other_implementation_sees_them",
        f"{ORACLES}::test_all_anomalous_labels_are_refused_by_threshold_free_metrics",
    ],
    "2 invariances": [
        f"{PROPERTIES}::test_strictly_increasing_transforms_change_nothing",
        f"{PROPERTIES}::test_time_reversal_changes_nothing_that_has_no_direction",
        f"{PROPERTIES}::test_time_reversal_changes_the_variant_of_2022",
    ],
    "3 limits of VUS and of areas": [
        f"{PROPERTIES}::test_without_a_buffer_one_event_gives_the_area_under_precision_and_recall",
        f"{PROPERTIES}::test_without_a_buffer_several_events_hold_the_area_down",
        f"{PROPERTIES}::test_without_a_buffer_several_events_can_also_lift_it",
        f"{PROPERTIES}::test_perfect_and_constant_scores",
        "unit/metrics/test_vus.py::test_limits",
        f"{METRICS}::test_areas_of_perfect_and_constant_scores",
    ],
    "4 chance levels": [
        f"{HERE}::test_a_random_score_has_the_rate_as_area",
        f"{TAILS}::test_p_values_are_uniform_on_exchangeable_scores",
        f"{TAILS}::test_random_tie_breaks_make_p_values_uniform",
        f"{RULES}::test_alarm_rate_on_exchangeable_scores_is_nominal",
    ],
    "5 guards": [
        f"{HERE}::test_a_detector_that_always_alarms_wins_nothing_that_is_reported",
        f"{METRICS}::test_a_detector_that_always_alarms_is_penalised",
        "unit/anomaly/test_reconstruction_scores.py::test_the_identity_map_gets_a_bad_grade_and_ours_a_good_one",
        "unit/anomaly/test_smoothing.py::test_smoothed_scores_depend_on_no_later_row",
        f"{ONLINE}::test_later_rows_never_move_earlier_scores",
        f"{HERE}::test_no_baseline_reads_later_rows",
        f"{HERE}::test_a_scorer_that_peeks_is_caught",
    ],
    "6 rolling rule": [
        f"{RULES}::test_a_level_shift_is_learnt_within_one_window_while_leaving_flagged_rows_out_runs_away",
    ],
    "7 stream equals batch": [
        f"{ONLINE}::test_any_cutting_of_the_rows_equals_the_batch_run",
        f"{ONLINE}::test_row_after_row_equals_the_batch_run_with_a_file_between",
        f"{ONLINE}::test_every_rule_goes_on_where_it_stopped",
        f"{ONLINE}::test_every_score_smoothing_and_calibration_equals_the_batch_run",
        f"{ONLINE}::test_an_event_under_way_at_the_start_keeps_its_first_row_and_id",
        "unit/anomaly/test_smoothing.py::test_cutting_the_rows_and_storing_the_state_between_changes_no_bit",
        f"{RULES}::test_rolling_levels_equal_a_naive_loop_and_stream_equals_batch",
        f"{EVENTS}::test_row_by_row_with_saved_state_equals_one_pass",
    ],
    "8 tail model": [
        f"{TAILS}::test_shape_and_scale_are_recovered",
        f"{TAILS}::test_p_falls_with_the_score_and_does_not_jump_where_the_tail_takes_over",
        f"{TAILS}::test_the_published_check_of_a_normal_sample",
        "golden/test_rule_golden.py::test_spot_beside_libspot",
    ],
    "9 false discovery rate": [
        "golden/test_rule_golden.py::test_online_procedures_equal_online_fdr",
        "golden/test_rule_golden.py::test_whole_spans_equal_online_fdr",
        "unit/anomaly/test_fdr.py::test_known_p_values_give_no_more_false_discoveries_than_wanted",
    ],
    "10 attribution": [
        f"{BLAME}::test_additive_sums_to_the_distance_and_conditional_is_the_leave_one_out_difference",
        f"{BLAME}::test_an_injected_fault_is_ranked_first_and_missing_variates_are_left_out",
    ],
    "11 missing values": [
        "integration/test_detect_frame.py::test_a_missing_block_has_no_score_and_no_event_spans_it",
        f"{EVENTS}::test_a_missing_row_ends_an_event_unless_the_merge_gap_says_so",
    ],
}


@pytest.mark.parametrize("point", POINTS)
def test_every_test_of_a_point_exists(point: str) -> None:
    """A test that is renamed or deleted takes its point of the checklist with it."""
    for node in POINTS[point]:
        path, _, name = node.partition("::")
        tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
        assert name in {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}, node


def test_every_point_is_listed() -> None:
    assert [int(point.split()[0]) for point in POINTS] == list(range(1, 12))


LABELS = np.zeros(20_000, dtype=int)
for _start in range(500, 20_000, 1300):
    LABELS[_start : _start + 60] = 1


def test_a_random_score_has_the_rate_as_area() -> None:
    """Checklist 4: within three standard errors of a mean over 30 draws."""
    draws = [np.random.default_rng(seed).uniform(size=LABELS.size) for seed in range(30)]
    for metric, chance in ((auc_pr, LABELS.mean()), (auc_roc, 0.5)):
        found = [metric(LABELS, scores) for scores in draws]
        assert np.mean(found) == pytest.approx(chance, abs=3 * np.std(found) / np.sqrt(30) + 1e-3)
    assert vus(LABELS, draws[0]).pr > LABELS.mean() + 0.01  # the buffer lifts it: no VUS without its chance level


def test_a_detector_that_always_alarms_wins_nothing_that_is_reported() -> None:
    """Checklist 5: its plain event precision and recall are 1, the penalised precision says what it is worth."""
    always = headline(LABELS, np.ones(LABELS.size), np.ones(LABELS.size, dtype=int), GradeSetting(draws=1, width=10))
    assert (always.values["event_precision"], always.values["event_recall"]) == (1.0, 1.0)
    assert always.values["event_precision_penalised"] == 0.0
    assert always.values["auc_pr"] == pytest.approx(LABELS.mean())
    assert always.values["affiliation_precision"] < 0.6
    assert event_score(LABELS, np.ones(LABELS.size, dtype=int)).f1 == 0.0


Scorer = Callable[[np.ndarray], np.ndarray]


def rows_moved_by_the_future(score: Scorer, rows: np.ndarray, cuts: list[int]) -> int:
    """Return how many scores up to a cut move when everything after it is changed."""
    plain, moved = score(rows), 0
    for cut in cuts:
        other = rows.copy()
        other[cut:] = 100.0 - 3.0 * other[cut:]
        moved += int((score(other)[:cut] != plain[:cut]).sum())
    return moved


CUTS = [50, 137, 299]


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_reads_later_rows(name: str) -> None:
    """Checklist 5: change the data after t, scores up to t must not move."""
    train, rows = np.random.default_rng(4).normal(size=(400, 3)), np.random.default_rng(5).normal(size=(300, 3))
    scorer = build_baseline(name, season_length=24).fit(train)
    assert rows_moved_by_the_future(scorer.score, rows, CUTS) == 0


def test_a_scorer_that_peeks_is_caught() -> None:
    """Checklist 5: one that is shifted by one row, and one that is scaled by the rows it scores."""
    train, rows = np.random.default_rng(4).normal(size=(400, 3)), np.random.default_rng(5).normal(size=(300, 3))
    honest = build_baseline("mean_abs").fit(train).score

    def shifted(values: np.ndarray) -> np.ndarray:
        scores = honest(values)
        return np.append(scores[1:], scores[-1])

    def scaled(values: np.ndarray) -> np.ndarray:
        scores = honest(values)
        return scores / scores.max()

    assert rows_moved_by_the_future(shifted, rows, CUTS) == len(CUTS)
    assert rows_moved_by_the_future(scaled, rows, CUTS) > 100
