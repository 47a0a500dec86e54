"""Parts of online detection, each against something that shares no code with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.anomaly.attribution import Extremes, contributions, leading_variates, rank_extremes
from tsforge.anomaly.calibration import fit_calibration
from tsforge.anomaly.config import EventConfig, ScoreConfig
from tsforge.anomaly.confirmed import judge as judge_confirmed
from tsforge.anomaly.covariance import DenseCovariance, LowRankCovariance
from tsforge.anomaly.monitor import EventRow, Judged, Monitor
from tsforge.anomaly.online_intake import plain_rows
from tsforge.anomaly.residuals import TrainingRange, reduce_horizon
from tsforge.anomaly.scoring import Memory, fit_score_model
from tsforge.anomaly.segments import Segment, find_segments
from tsforge.anomaly.smoothing import TwoSided
from tsforge.anomaly.thresholds import Quantile, RollingQuantile
from tsforge.data.grid import TimeGrid
from tsforge.data.schema import SeriesSchema
from tsforge.forecasting.fixed_blocks import Block, is_steady, padded
from tsforge.forecasting.stream_rows import NewRows, StreamPlace, collect_rows

NAMES = ("p", "q", "r", "s")


def rough(rows: int, seed: int) -> np.ndarray:
    """Return deviations [N, 1, 4]: noise, bursts on neighbouring variates, missing cells and missing rows."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 1, (rows, 4))
    for _ in range(rows // 12):
        at, length = int(generator.integers(rows)), int(generator.integers(1, 7))
        values[at : at + length, int(generator.integers(3)) :][:, :2] += generator.normal(6, 2)
    values[generator.random(values.shape) < 0.04] = np.nan
    values[generator.random(rows) < 0.03] = np.nan
    return values[:, None, :]


def monitor_of(deviations: np.ndarray, config: EventConfig, start: int) -> Monitor:
    values = np.zeros((len(deviations), 4))
    training = TrainingRange(low=np.zeros(4), high=np.ones(4), deviation=np.full(4, 0.3))
    model = fit_score_model(deviations[:200], values[:200], training, ScoreConfig())
    scores = model.raw(deviations[:200], values[:200], Memory()).joint
    return Monitor(
        series_id="one",
        names=NAMES,
        config=config,
        model=model,
        buckets=None,
        calibration=fit_calibration(scores, method="conformal"),
        smoother=None,
        rule=Quantile(0.15, low_factor=2.0).fit(scores),
        samples=None,
        row=200,
        start=start,
        recent=50,
    )


def chained(segments: list[Segment], leading: list[frozenset[str]], cooldown: int) -> list[int | None]:
    """Return the position of the first event of the chain that each one continues, None where it begins one."""
    origin: list[int | None] = []
    for here, one in enumerate(segments):
        goes_on = here > 0 and one.start - segments[here - 1].end <= cooldown and leading[here] & leading[here - 1]
        before = origin[here - 1] if goes_on else None
        origin.append(before if before is not None else here - 1 if goes_on else None)
    return origin


def expected_events(monitor: Monitor, deviations: np.ndarray, skipped: int) -> list[EventRow]:
    """Return the events of all rows at once: segments of the whole span, contributions of their rows, chains."""
    found = monitor.model.raw(deviations, np.zeros((len(deviations), 4)), Memory())
    decisions, p = monitor.rule.run(found.joint), monitor.calibration.p_values(found.joint)
    segments = [one for one in find_segments(found.joint, decisions, monitor.config) if one.end >= skipped]
    ranked = []
    for one in segments:
        parts = contributions(found.z[one.start : one.end + 1], monitor.model.covariance, monitor.model.constant)
        kept = Extremes.nothing(len(NAMES))
        for row in range(one.start, one.end + 1):
            kept.add(parts, row - one.start, score=float(row == one.peak))
        ranked.append(rank_extremes(NAMES, kept, limit=monitor.config.ranked_variates))
    chains = chained(segments, [leading_variates(each) for each in ranked], monitor.config.cooldown)
    return [
        EventRow(
            segment=type(one)(one.start + 200, one.end + 200, one.peak + 200, one.is_open),
            peak_score=float(found.joint[one.peak]),
            p_value=float(np.nanmin(p[one.start : one.end + 1])),
            threshold=float(decisions.threshold[one.peak]),
            variates=variates,
            continues=None if origin is None else segments[origin].start + 200,
        )
        for one, variates, origin in zip(segments, ranked, chains, strict=True)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_monitor_finds_the_events_of_the_whole_span_whatever_the_cuts(seed: int) -> None:
    """Checklist 7: segments, peaks, p-values, ranked variates, chains; against one pass over stored rows."""
    generator = np.random.default_rng(100 + seed)
    config = EventConfig(
        patience=int(generator.integers(1, 4)),
        merge_gap=int(generator.integers(0, 5)),
        min_length=int(generator.integers(1, 4)),
        cooldown=int(generator.integers(0, 25)),
        ranked_variates=3,
    )
    deviations = rough(700, seed)
    skipped = int(generator.integers(0, 60))
    calm = monitor_of(deviations, config, 200 + skipped)
    expected = expected_events(calm, deviations[200:], skipped)
    assert expected
    edges = [200, *sorted(generator.choice(np.arange(201, 700), 40, replace=False).tolist()), 700]
    found: list[EventRow] = []
    for start, stop in pairwise(edges):
        found += calm.run(deviations[start:stop], np.zeros((stop - start, 4))).closed
    current = calm.current()
    assert [*found, *([] if current is None else [current])] == expected


def late_monitor(deviations: np.ndarray, reach: int) -> Monitor:
    """Return a monitor whose scores wait, with a rule that learns from the rows it judges."""
    calm = monitor_of(deviations, EventConfig(merge_gap=2), 200)
    rule = RollingQuantile(0.2, 100).fit(calm.model.raw(deviations[:200], np.zeros((200, 4)), Memory()).joint)
    return replace(calm, smoother=TwoSided(0.3, reach), rule=rule)


def test_rows_wait_for_their_score_with_all_that_belongs_to_them_whatever_the_cuts() -> None:
    reach, deviations = 9, rough(700, 3)
    generator = np.random.default_rng(5)
    values, expected = generator.normal(size=(2, 700, 4))
    confirmed = generator.random(700) < 0.1
    confirmed[300:330] = True

    def told(edges: list[int]) -> tuple[Judged, Monitor]:
        monitor, parts = late_monitor(deviations, reach), []
        for start, stop in pairwise(edges):
            rows = slice(start, stop)
            assert monitor.next_row == start
            parts.append(
                monitor.run(deviations[rows], values[rows], confirmed=confirmed[rows], expected=expected[rows])
            )
            assert monitor.row == max(stop - reach, 200)
        return Judged.join(parts), monitor

    whole, monitor = told([200, 700])
    size = 500 - reach
    raw = monitor.model.raw(deviations[200:], values[200:], Memory())
    smoothed = TwoSided(0.3, reach).run(raw.joint)
    np.testing.assert_array_equal(whole.joint, smoothed)
    np.testing.assert_array_equal(whole.z, raw.z[:size])
    np.testing.assert_array_equal(whole.values, values[200 : 700 - reach])
    np.testing.assert_array_equal(whole.expected, expected[200 : 700 - reach])
    rule = late_monitor(deviations, reach).rule
    by_hand = judge_confirmed(rule, smoothed, confirmed[200 : 700 - reach])  # the flag of a row goes with its own score
    np.testing.assert_array_equal(whole.decisions.alarm, by_hand.alarm)
    np.testing.assert_array_equal(whole.decisions.threshold, by_hand.threshold)
    shifted = judge_confirmed(late_monitor(deviations, reach).rule, smoothed, confirmed[200 + reach :])
    assert not np.array_equal(whole.decisions.threshold, shifted.threshold)
    segments = find_segments(smoothed, by_hand, monitor.config)
    closed = [event.segment for event in whole.closed]
    assert len(closed) > 5
    assert (
        closed
        == [type(one)(one.start + 200, one.end + 200, one.peak + 200, one.is_open) for one in segments][: len(closed)]
    )
    for edges in (list(range(200, 701)), [200, 203, 209, 210, 211, 400, 700]):
        found, _ = told(edges)
        for name in ("joint", "z", "p_values", "values", "expected"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        for one, other in zip(found.decisions, whole.decisions, strict=True):
            np.testing.assert_array_equal(one, other)
        assert found.closed == whole.closed


def test_the_cases_above_cover_chains_gaps_and_open_events() -> None:
    events = [
        event
        for seed in range(12)
        for event in expected_events(
            monitor_of(rough(700, seed), EventConfig(cooldown=20, merge_gap=2), 200), rough(700, seed)[200:], 0
        )
    ]
    assert any(event.continues is not None for event in events)
    assert any(event.segment.length > 5 for event in events)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_a_covariance_solves_every_row_alike_in_any_company(kind: str) -> None:
    generator = np.random.default_rng(0)
    factor = generator.normal(0, 1, (17, 5))
    matrix = factor @ factor.T + np.diag(generator.uniform(0.5, 2, 17))
    noise = np.diag(matrix - factor @ factor.T)
    covariance = DenseCovariance(matrix) if kind == "dense" else LowRankCovariance(noise, factor)
    rows = generator.normal(0, 3, (101, 17))
    together = covariance.solve(rows)
    assert np.allclose(together, np.linalg.solve(matrix, rows.T).T, rtol=1e-9)
    for size in (1, 2, 7, 50):
        apart = np.concatenate([covariance.solve(rows[at : at + size]) for at in range(0, 101, size)])
        assert np.array_equal(apart, together)
    keep = generator.random(17) < 0.6
    part = covariance.subset(keep)
    assert np.allclose(part.solve(rows[:, keep]), np.linalg.solve(matrix[np.ix_(keep, keep)], rows[:, keep].T).T)


def test_the_median_over_steps_is_that_of_the_steps_observed() -> None:
    z = np.random.default_rng(1).normal(0, 1, (300, 6, 4))
    z[np.random.default_rng(2).random(z.shape) < 0.4] = np.nan
    z[7] = np.nan
    seen = ~np.isnan(z).all(axis=1)
    assert (~seen).any()
    expected = np.full((300, 4), np.nan)
    for row, variate in zip(*np.nonzero(seen), strict=True):
        column = z[row, :, variate]
        expected[row, variate] = np.median(column[~np.isnan(column)])
    assert np.array_equal(reduce_horizon(z, "median"), expected, equal_nan=True)


# ---- rows that come in

FIRST = datetime(2024, 1, 1, tzinfo=UTC)


def place_of(last: list[int]) -> StreamPlace:
    return StreamPlace(
        schema=SeriesSchema(targets=("x", "y"), past=("p",), freq="1h"),
        grid=TimeGrid(FIRST, "1h"),
        series={f"s{place}": place for place in range(len(last))},
        last=np.array(last),
        ahead=None,
        shared_clock=False,
    )


def rows_of(cells: list[tuple[str, int]], **changes: Any) -> pl.DataFrame:
    generator = np.random.default_rng(len(cells))
    numbers = {name: generator.normal(0, 1, len(cells)) for name in ("x", "y", "p")}
    table = pl.DataFrame(
        {
            "series_id": [name for name, _ in cells],
            "time": pl.Series([FIRST + timedelta(hours=row) for _, row in cells], dtype=pl.Datetime("us", "UTC")),
            **numbers,
        }
    )
    holes = pl.when(pl.int_range(pl.len()) % 3 != 1).then(pl.col("x")).alias("x")
    return table.with_columns(holes).with_columns(**changes)


def same(a: NewRows, b: NewRows) -> bool:
    parts = ("count", "start", "values")
    equal = all(torch.equal(torch.nan_to_num(getattr(a, n), 7e7), torch.nan_to_num(getattr(b, n), 7e7)) for n in parts)
    return equal and np.array_equal(a.judged, b.judged, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 60])
def test_plain_rows_are_those_of_the_full_check(rows: int) -> None:
    place = place_of([10, 4, 20])
    cells = [("s0", 11 + row) for row in range(rows)] + [("s2", 21 + 3 * row) for row in range(rows)]
    table = rows_of(cells)
    judged = table.select("series_id", "time", "x", pl.lit(1e9).alias("y"))
    zoned = table.with_columns(pl.col("time").dt.convert_time_zone("Asia/Tokyo"))
    bare = table.with_columns(pl.col("time").dt.replace_time_zone(None).cast(pl.Datetime("ms")))
    single = table.cast({"x": pl.Float32, "y": pl.Float32})
    for given, judge in ((table, None), (table, judged), (zoned, None), (bare, None), (single, None)):
        quick = plain_rows(given, place, judge)
        assert quick is not None
        assert same(quick, collect_rows(given, place, judged=judge))


@pytest.mark.parametrize(
    "table",
    [
        rows_of([("s0", 10)]),
        rows_of([("s0", 12), ("s0", 11)]),
        rows_of([("s0", 11), ("s0", 11)]),
        rows_of([("s9", 11)]),
        rows_of([("s2", 21), ("s0", 11)]),
        rows_of([("s0", 11)], x=pl.lit(np.inf)),
        rows_of([("s0", 11)], x=pl.lit(1e39)),
        rows_of([("s0", 11)], x=pl.lit("warm")),
        rows_of([("s0", 11)], time=pl.col("time") + pl.duration(minutes=1)),
        rows_of([("s0", 11)], time=pl.lit(None, dtype=pl.Datetime("us", "UTC"))),
        rows_of([("s0", 11)], series_id=pl.lit(None, dtype=pl.String)),
        rows_of([("s0", 2_000_000)]),
        rows_of([("s0", 11)]).drop("p"),
        rows_of([("s0", 11)]).clear(),
    ],
    ids=lambda table: f"{table.height} rows",
)
def test_anything_out_of_the_ordinary_is_left_to_the_full_check(table: pl.DataFrame) -> None:
    assert plain_rows(table, place_of([10, 4, 20]), None) is None


# ---- passes of one shape


@dataclass
class Crooked:
    """A network whose forecast shows the place of a window in its batch (``tilt``), or its company (``lean``)."""

    tilt: float = 0.0
    lean: float = 0.0

    def __call__(self, context: torch.Tensor) -> torch.Tensor:
        place = torch.arange(len(context))[:, None, None] * self.tilt
        return context[:, -1:] + place + self.lean * context.mean()


@pytest.mark.parametrize(("tilt", "lean", "steady"), [(0.0, 0.0, True), (1e-6, 0.0, False), (0.0, 1e-6, False)])
def test_a_network_that_tells_windows_by_their_company_gets_one_window_a_pass(
    tilt: float, lean: float, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsforge.contracts.tensors import DataSpec
    from tsforge.core.config import validate
    from tsforge.forecasting.fixed_blocks import block_size
    from tsforge.network import NetworkConfig, Predictive, build_network

    spec = DataSpec(context_length=12, horizon=1, num_variates=2)
    config = {"model": {"name": "last_value"}, "scaling": {"kind": "none"}}
    network = build_network(validate(NetworkConfig, config), spec)
    crooked = Crooked(tilt, lean)
    monkeypatch.setattr(network, "predict", lambda batch, levels=(): Predictive(crooked(batch.context), None))
    assert is_steady(network, 8) is steady
    assert block_size(network) == (64 if steady else 1)


def test_padding_repeats_the_last_item_at_cutoffs_of_its_own() -> None:
    from tsforge.contracts.tensors import Batch

    context = torch.arange(12.0).reshape(6, 2, 1)
    batch = Batch(context, torch.ones_like(context, dtype=torch.bool), cutoff_index=torch.tensor([5, 5, 6, 6, 9, 9]))
    filled = padded(batch, 5, together=2)
    assert filled.cutoff_index is not None
    assert filled.cutoff_index.tolist() == [5, 5, 6, 6, 9, 9, 10, 10, 11, 11]
    assert torch.equal(filled.context[:6], context)
    assert torch.equal(filled.context[6:8], context[4:6])
    assert padded(batch, 3, together=2) is batch


def test_a_block_filled_again_begins_with_the_new_windows_and_keeps_older_ones_behind() -> None:
    from tsforge.contracts.tensors import Batch

    def batch(*numbers: float) -> Batch:
        context = torch.tensor(numbers).reshape(-1, 1, 1)
        return Batch(context, context > 2.0, series_index=context.flatten().long())

    block, full = Block(), batch(1.0, 2.0, 3.0, 4.0)
    assert block.filled(full, 4) is full
    assert block.filled(batch(1.0, 2.0), 4).context.flatten().tolist() == [1.0, 2.0, 2.0, 2.0]
    again = block.filled(batch(7.0), 4)
    assert again.context.flatten().tolist() == [7.0, 2.0, 2.0, 2.0]
    assert again.context_mask.flatten().tolist() == [True, False, False, False]
    assert again.series_index is not None
    assert again.series_index.tolist() == [7, 2, 2, 2]
