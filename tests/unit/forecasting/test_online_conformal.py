"""Online intervals: a naive loop as oracle, delay, the long-run bound, restarts, and what they must not know."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from online_cases import START, forecasts, times

from tsforge.core.config import validate
from tsforge.core.errors import ArtifactError, ConfigError, DataError
from tsforge.forecasting.online_backtest import online_forecasts
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig


def naive(
    values: np.ndarray, horizon: int, stride: int, coverage: float, rate: float, window: int, start: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """Plain ACI with delay, one step and one row at a time; intervals by (cutoff, step)."""
    result: dict[tuple[int, int], tuple[float, float]] = {}
    for step in range(1, horizon + 1):
        alpha, scores, waiting = 1.0 - coverage, [], []
        for cutoff in range(0, len(values) - horizon, stride):
            for issued in [item for item in waiting if item["due"] <= cutoff]:
                waiting.remove(issued)
                y = values[issued["due"]]
                if math.isnan(y):
                    continue
                if issued["adapted"]:
                    low, high = issued["interval"]
                    alpha += rate * ((1.0 - coverage) - float(not low <= y <= high))
                scores.append(max(-1.0 - y, y - 1.0) / 2.0)
            sample = sorted(scores[-window:])
            adapted = len(sample) >= start
            interval = (-1.0, 1.0)
            if adapted:
                rank = math.ceil(round((len(sample) + 1) * (1.0 - alpha), 9))
                margin = -0.5 if rank <= 0 else math.inf if rank > len(sample) else sample[rank - 1]
                interval = (-1.0 - 2.0 * margin, 1.0 + 2.0 * margin)
            waiting.append({"due": cutoff + step, "interval": interval, "adapted": adapted})
            result[cutoff, step] = interval
    return result


@pytest.mark.parametrize(("stride", "horizon"), [(1, 1), (1, 4), (3, 7)])
def test_plain_aci_equals_a_loop_that_waits_for_each_target(stride: int, horizon: int) -> None:
    rng = np.random.default_rng(horizon)
    values = rng.standard_t(3, 150) * np.where(np.arange(150) > 80, 3.0, 1.0)
    values[rng.random(150) < 0.1] = np.nan
    settings = {"rate": 0.06, "window": 20, "start": 9}
    table = forecasts(values, horizon, stride)
    config = OnlineConfig(method="aci", rates=(settings["rate"],), window=20, start=9)
    found, _ = online_forecasts(table, OnlineConformal(config))
    expected = naive(values, horizon, stride, 0.8, **settings)
    assert found.height == len(expected)
    infinite = 0
    for row in found.iter_rows(named=True):
        cutoff = int((row["cutoff"] - START).total_seconds() // 3600)
        low, high = expected[cutoff, row["step"]]
        assert row["q0.1"] == pytest.approx(low, abs=1e-12)
        assert row["q0.9"] == pytest.approx(high, abs=1e-12)
        infinite += math.isinf(low)
    assert infinite > 0, "the case of an exhausted alpha is not in the data"


def oracle_weights(state: OnlineConformal, table: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """DtACI of one cell with horizon 1, from the equations of Gibbs & Candes (2024), in plain loops."""
    config = state.config
    miss, span, rates = 0.2, config.memory, config.steps
    eta = math.sqrt(3 / span) * math.sqrt(
        (math.log(len(rates) * span) + 2) / ((1 - miss) ** 2 * miss**3 + miss**2 * (1 - miss) ** 3)
    )
    alphas, weights, scores = [miss] * len(rates), [1 / len(rates)] * len(rates), []
    for y in table["actual"].to_list()[:-1]:
        score = max(-1.0 - y, y - 1.0) / 2.0
        sample = scores[-config.window :]
        if len(sample) >= config.start:
            beta = (1 + sum(other >= score for other in sample)) / (len(sample) + 1)
            losses = [miss * (beta - alpha) - min(0.0, beta - alpha) for alpha in alphas]
            weights = [weight * math.exp(-eta * loss) for weight, loss in zip(weights, losses, strict=True)]
            total = sum(weights)
            weights = [(1 - 1 / (2 * span)) * weight / total + 1 / (2 * span * len(rates)) for weight in weights]
            alphas = [alpha + rate * (miss - float(alpha >= beta)) for alpha, rate in zip(alphas, rates, strict=True)]
        scores.append(score)
    return np.array(alphas), np.array(weights)


def test_rates_are_weighted_as_in_the_paper() -> None:
    values = np.random.default_rng(3).normal(size=200) * np.where(np.arange(200) > 100, 2.0, 1.0)
    table = forecasts(values, 1)
    state = OnlineConformal(OnlineConfig(method="aci", rates=(0.01, 0.05, 0.2), window=40, start=10))
    online_forecasts(table, state)
    alphas, weights = oracle_weights(state, table)
    assert state.alpha[0] == pytest.approx(alphas, abs=1e-12)
    assert state.weight[0] == pytest.approx(weights, abs=1e-12)
    assert weights.max() > 0.4, "the weights hardly moved"


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_long_run_coverage_is_within_the_bound_for_an_adversary(rate: float, delay: int) -> None:
    """Prop. 4.1 of Gibbs & Candes (2021): in blocks the adversary leaves any finite interval, or takes its middle."""
    coverage, rounds = 0.8, 400
    state = OnlineConformal(OnlineConfig(method="aci", rates=(rate,), window=50, start=10))
    waiting: list[tuple[pl.DataFrame, float, bool]] = []
    missed, judged = [], 0
    blank = forecasts(np.zeros(rounds + delay + 2), delay + 1).filter(pl.col("step") == delay + 1)
    rng = np.random.default_rng(0)
    for number, part in enumerate(blank.partition_by("cutoff", maintain_order=True)[:rounds]):
        now = part["cutoff"][0]
        due = [item for item in waiting if item[0]["time"][0] <= now]
        waiting = [item for item in waiting if item[0]["time"][0] > now]
        for row, value, adapted in due:
            actuals = row.select("series_id", "variate", "time").with_columns(actual=pl.lit(value))
            state.update(actuals, now)
            if adapted:
                low, high = row["q0.1"][0], row["q0.9"][0]
                missed.append(not low <= value <= high)
                judged += 1
        adapted, status = state.issue(part.drop("actual"))
        high = adapted["q0.9"][0]
        hostile = (number // 25) % 2 == 0
        value = high * 2.0 + 1.0 if hostile and math.isfinite(high) else rng.normal() * 1e-3
        waiting.append((adapted, value, status["status_80"][0] != "static"))
    alpha = 1.0 - coverage
    bound = (max(alpha, 1.0 - alpha) + (1 + delay) * rate) / (rate * judged)
    assert judged > 350
    assert abs(np.mean(missed) - alpha) <= bound + 1e-9
    assert state.tally["infinite"] > 0


def test_an_exhausted_alpha_is_reported_or_capped_by_the_largest_score() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=40) * 0.5, 3.0 * 1.3 ** np.arange(20.0)])
    table = forecasts(values, 1)
    _, status = online_forecasts(table, OnlineConformal(OnlineConfig(method="aci", rates=(0.1,), start=10)))
    assert status["status_80"].to_list()[:10] == ["static"] * 10
    assert "infinite" in status["status_80"].to_list()
    capped, status = online_forecasts(
        table, OnlineConformal(OnlineConfig(method="aci", rates=(0.1,), start=10, cap=True))
    )
    assert np.isfinite(capped["q0.9"].to_numpy()).all()
    rows = (status["status_80"] == "capped").arg_true()
    assert len(rows) > 0
    for row in rows.to_list():
        largest = max(max(-1.0 - y, y - 1.0) / 2.0 for y in values[1 : row + 1])
        assert capped["q0.9"][row] == pytest.approx(1.0 + 2.0 * largest)


def test_fewer_scores_than_the_coverage_needs_leave_the_interval_alone() -> None:
    table = forecasts(np.random.default_rng(0).normal(size=60), 1, coverage=0.95)
    _, status = online_forecasts(table, OnlineConformal(OnlineConfig(start=1)))
    assert status["status_95"].to_list()[:20] == ["static"] * 19 + ["adapted"]


@pytest.mark.parametrize("pool", ["own", "series"])
def test_a_restart_at_any_moment_changes_nothing(tmp_path: Path, pool: Any) -> None:
    rng = np.random.default_rng(5)
    parts = [forecasts(rng.standard_t(3, 70) * scale, 3, series=name) for name, scale in (("a", 1.0), ("b", 4.0))]
    table = pl.concat(parts).with_columns(**{"q0.25": pl.lit(-0.3), "q0.75": pl.lit(0.4)})
    config = OnlineConfig(method="aci", rates=(0.02, 0.1), window=12, start=10, pool=pool)
    straight, status = online_forecasts(table, OnlineConformal(config))
    known = table.select("series_id", "variate", "time", "actual").unique(maintain_order=True)
    state, rows, seen = OnlineConformal(config), [], None
    for part in table.sort("cutoff", maintain_order=True).partition_by("cutoff", maintain_order=True):
        state.save(tmp_path / "state")
        state = OnlineConformal.load(tmp_path / "state")
        now = part["cutoff"][0]
        state.update(known.filter(pl.col("time") <= now), now)
        state.save(tmp_path / "state")
        state = OnlineConformal.load(tmp_path / "state")
        rows.append(state.issue(part)[0])
        seen = state.tables()
    assert pl.concat(rows).equals(straight)
    assert seen is not None
    assert (status["status_80"] == "adapted").any()


def test_pooled_series_move_one_alpha_by_the_mean_of_their_misses() -> None:
    values = np.random.default_rng(1).normal(size=(2, 40))
    values[1] *= 5.0
    table = pl.concat([forecasts(values[number], 1, series=name) for number, name in enumerate("ab")])
    state = OnlineConformal(OnlineConfig(method="aci", rates=(0.05,), window=30, start=12, pool="series"))
    online_forecasts(table, state)
    alpha, scores = 0.2, []
    for row in range(1, 39):
        new = [max(-1.0 - y, y - 1.0) / 2.0 for y in values[:, row]]
        sample = scores[-30:]
        if len(sample) >= 12:
            betas = [(1 + sum(other >= score for other in sample)) / (len(sample) + 1) for score in new]
            alpha += 0.05 * (0.2 - np.mean([alpha >= beta for beta in betas]))
        scores += new
    assert state.cells.height == 1
    assert state.alpha[0, 0] == pytest.approx(alpha, abs=1e-12)


def test_a_forecast_issued_twice_is_counted_once() -> None:
    part = forecasts(np.zeros(4), 1).head(1).drop("actual")
    state = OnlineConformal()
    state.issue(part)
    state.issue(part)
    assert state.pending is not None
    assert state.pending.height == 1
    actuals = part.select("series_id", "variate", "time").with_columns(actual=pl.lit(0.0))
    assert state.update(actuals, part["time"][0]) == 1
    assert state.update(actuals, part["time"][0]) == 0
    assert state.count.tolist() == [1]


def test_a_late_actual_is_waited_for_and_given_up_after_a_horizon() -> None:
    part = forecasts(np.zeros(8), 2).head(2).drop("actual")  # rows 1 and 2 from cutoff 0
    actuals = part.select("series_id", "variate", "time").with_columns(actual=pl.lit(0.0))
    nothing = actuals.clear()
    state = OnlineConformal()
    state.issue(part)
    assert state.update(nothing, times([3])[0]) == 0
    assert state.update(actuals.head(1), times([3])[0]) == 1, "one row late, within a horizon"
    assert state.update(nothing, times([5])[0]) == 0
    assert state.tally["given_up"] == 1
    assert state.update(actuals, times([5])[0]) == 0, "given up is given up"


def test_an_infinite_base_starts_from_the_widest_finite_interval() -> None:
    table = forecasts(np.random.default_rng(0).normal(size=60), 1).with_columns(
        **{"q0.05": pl.lit(-math.inf), "q0.95": pl.lit(math.inf)}
    )
    found, status = online_forecasts(table, OnlineConformal(OnlineConfig(start=19)))
    assert status["status_90"][-1] == "adapted"
    assert math.isfinite(found["q0.95"][-1])
    assert (found["q0.95"] >= found["q0.9"]).all()
    bare = table.select(pl.exclude("q0.1", "q0.9"))
    assert set(online_forecasts(bare, OnlineConformal())[1]["status_90"]) == {"none"}


class Impatient(OnlineConformal):
    """A saboteur: judges every waiting interval at the next cutoff with whatever the table holds."""

    everything: pl.DataFrame

    def update(self, actuals: pl.DataFrame, now: Any) -> int:
        return super().update(self.everything, self.everything["time"].max())


def changed_before_the_perturbation(make: Any) -> bool:
    """Whether intervals issued up to row 60 change when every value after row 60 does."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=100)
    other = np.where(np.arange(100) > 60, values * 50.0 + 9.0, values)
    found = []
    for given in (values, other):
        table = forecasts(given, 5)
        result, _ = online_forecasts(table, make(table))
        found.append(result.filter(pl.col("cutoff") <= times([60])[0]).drop("actual"))
    return not found[0].equals(found[1])


def test_perturbing_the_future_changes_no_interval_and_a_saboteur_is_caught() -> None:
    def honest(table: pl.DataFrame) -> OnlineConformal:
        return OnlineConformal(OnlineConfig(start=10))

    def impatient(table: pl.DataFrame) -> OnlineConformal:
        state = Impatient(OnlineConfig(start=10))
        state.everything = table.select("series_id", "variate", "time", "actual").unique()
        return state

    assert not changed_before_the_perturbation(honest)
    assert changed_before_the_perturbation(impatient)


def test_values_later_than_now_are_refused() -> None:
    part = forecasts(np.zeros(4), 1).head(1)
    state = OnlineConformal()
    state.issue(part)
    with pytest.raises(DataError, match="1 of 1 actual values are later"):
        state.update(part.select("series_id", "variate", "time", "actual"), part["cutoff"][0])


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no interval to adapt"):
        OnlineConformal().issue(forecasts(np.zeros(4), 1).drop("q0.1"))
    with pytest.raises(ConfigError, match="rates must be different numbers"):
        validate(OnlineConfig, {"method": "aci", "rates": [0.1, 0.1]})
    with pytest.raises(ArtifactError, match="no readable online state"):
        OnlineConformal.load(tmp_path / "nothing")
    state = OnlineConformal()
    state.issue(forecasts(np.zeros(4), 1))
    state.save(tmp_path / "state")
    content = bytearray((tmp_path / "state" / "cells.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "state" / "cells.parquet").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cells\.parquet is damaged"):
        OnlineConformal.load(tmp_path / "state")
    with pytest.raises(ArtifactError, match="holds 1 rates, the settings 2"):
        OnlineConformal.from_tables(OnlineConfig(method="aci", rates=(0.1, 0.2)), state.tables())
