"""PIT values and histograms: uniform when calibrated, counted by hand, atoms spread, summaries of the table."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm

from tsforge.core.errors import DataError
from tsforge.metrics.pit import pit_counts, pit_distance, pit_table, pit_values, reliability

LEVELS = (0.1, 0.5, 0.9)


def table(spread: float = 1.0, windows: int = 4000, steps: int = 6) -> pl.DataFrame:
    """Standard Normal values, forecasts with ``spread`` times the right width."""
    rng = np.random.default_rng(4)
    rows = windows * steps
    quantiles = {f"q{level:g}": np.full(rows, spread * norm.ppf(level)) for level in LEVELS}
    return pl.DataFrame(
        {
            "variate": ["y"] * rows,
            "step": pl.Series(np.tile(np.arange(1, steps + 1), windows), dtype=pl.Int32),
            "actual": rng.normal(size=rows),
            **quantiles,
        }
    )


def test_values_of_the_true_distribution_are_uniform() -> None:
    rng = np.random.default_rng(0)
    levels = np.linspace(0.01, 0.99, 99)
    quantiles = np.tile(norm.ppf(levels), (20_000, 1))
    found = np.sort(pit_values(rng.normal(size=20_000), quantiles, levels))
    assert np.abs(found - (np.arange(20_000) + 0.5) / 20_000).max() < 1.63 / np.sqrt(20_000)  # Kolmogorov, 1 %


def test_only_atoms_are_random() -> None:
    quantiles = np.tile([0.0, 0.0, 3.0], (1000, 1))
    y = np.where(np.arange(1000) % 2, 0.0, 1.5)
    drawn = pit_values(y, quantiles, LEVELS, np.random.default_rng(0))
    middle = pit_values(y, quantiles, LEVELS)
    np.testing.assert_array_equal(drawn[::2], middle[::2])
    np.testing.assert_allclose(middle[1::2], 0.25)  # the atom spans 0 to 0.5, the tail included
    assert drawn[1::2].min() < 0.02
    assert 0.48 < drawn[1::2].max() < 0.5


def test_counts_of_single_cells() -> None:
    quantiles = np.array([[0.0, 1.0, 2.0]] * 6 + [[0.0, 0.0, 2.0], [0.0, 1.0, 1.0], [0.0, np.nan, 1.0]])
    y = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 0.0, 1.0, 0.0])
    expected = [
        [1, 0, 0, 0],
        [1, 0, 0, 0],  # a bin includes its upper level
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
        [0.2, 0.8, 0, 0],  # an atom from 0 to 0.5
        [0, 0, 0.8, 0.2],  # from 0.5 to 1
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(pit_counts(y, quantiles, LEVELS), expected)


def test_counts_are_the_mean_of_randomised_values() -> None:
    rng = np.random.default_rng(9)
    quantiles = np.tile([0.0, 1.0, 1.0, 2.0, 2.0], (200_000, 1))
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    y = rng.choice([-0.5, 0.5, 1.0, 2.0, 2.5], 200_000)
    drawn = np.histogram(pit_values(y, quantiles, levels, rng), [0.0, *levels, 1.0])[0] / len(y)
    np.testing.assert_allclose(pit_counts(y, quantiles, levels).mean(axis=0), drawn, atol=0.005)


def test_table_has_groups_of_steps_and_densities_of_one_when_calibrated() -> None:
    found = pit_table(table(), LEVELS, buckets=2)
    groups = found.select("first_step", "last_step").unique(maintain_order=True).rows()
    assert groups == [(1, 3), (4, 6)]
    assert found["count"].sum() == pytest.approx(24_000)
    assert np.allclose(found["density"].to_numpy(), 1.0, atol=0.06)
    np.testing.assert_allclose(found["high"].unique().sort(), [*LEVELS, 1.0])


@pytest.mark.parametrize(("spread", "outer"), [(0.5, 1.5), (2.0, 0.5)])
def test_narrow_intervals_fill_the_outer_bins_and_wide_ones_empty_them(spread: float, outer: float) -> None:
    found = pit_table(table(spread), LEVELS, buckets=1)
    ends = found.filter(pl.col("bin").is_in([0, 3]))["density"].to_numpy()
    assert (ends > outer).all() if spread < 1 else (ends < outer).all()
    gap = pit_distance(found).row(0, named=True)
    assert gap["level"] in (0.1, 0.9)
    assert gap["distance"] == pytest.approx(abs(norm.cdf(spread * norm.ppf(0.1)) - 0.1), abs=0.01)
    assert pit_distance(pit_table(table(), LEVELS))["distance"][0] < 0.01


def test_reliability_is_the_share_at_or_below_each_level() -> None:
    data = table(0.7)
    found = reliability(pit_table(data, LEVELS))
    shares = [(data["actual"] <= data[f"q{level:g}"]).mean() for level in LEVELS]
    np.testing.assert_allclose(found["observed"], shares)
    assert found["level"].to_list() == list(LEVELS)
    by = reliability(pit_table(data, LEVELS, buckets=6), by=["first_step"])
    third = data.filter(step=3)
    assert by.filter(first_step=3)["observed"][0] == pytest.approx((third["actual"] <= third["q0.1"]).mean())
    assert pit_distance(pit_table(data, LEVELS), by=["first_step"]).height == 4


def test_rows_that_cannot_be_placed_do_not_count() -> None:
    data = table(windows=3).with_columns(actual=pl.when(pl.col("step") <= 2).then("actual"))
    found = pit_table(data, LEVELS, buckets=3)
    assert found["count"].sum() == pytest.approx(6)
    assert found.filter(pl.col("first_step") > 2)["density"].null_count() == 8
    assert pit_table(data.clear(), LEVELS).is_empty()
    with pytest.raises(DataError, match=r"q0\.1"):
        pit_table(data.drop("q0.1"), LEVELS)
