"""Tests between the models of a backtest, against the same tests by hand on made-up losses."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy import stats

from tsforge.forecasting.comparison import compare, window_losses
from tsforge.metrics.significance import diebold_mariano, holm, panel_diebold_mariano

START = datetime(2024, 1, 1)
MODELS = ("ours", "naive", "last", "drift")


def made_up(series: int, cutoffs: int, variates: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Return losses [series, cutoffs, variates] of each model: ours is best, drift is worst."""
    rng = np.random.default_rng(seed)
    shape = (series, cutoffs, variates)
    base = rng.random(shape) + 1.0
    shifts = (-0.15, 0.0, 0.05, 0.4)
    return {name: base + shift + 0.2 * rng.random(shape) for name, shift in zip(MODELS, shifts, strict=True)}


def as_tables(losses: dict[str, np.ndarray]) -> dict[str, pl.DataFrame]:
    tables = {}
    for name, values in losses.items():
        rows = [
            {"series_id": f"s{s}", "variate": f"v{v}", "cutoff": START + timedelta(days=c), "loss": values[s, c, v]}
            for s, c, v in np.ndindex(values.shape)
        ]
        tables[name] = pl.DataFrame(rows).sample(fraction=1.0, shuffle=True, seed=len(name))
    return tables


def test_many_series_are_the_units() -> None:
    losses = made_up(9, 12)
    found = compare(as_tables(losses), "naive", "ours", loss="x", overlap=1)
    assert (found.facts["unit"], found.facts["units"]) == ("series", 9)
    means = {name: values.mean(axis=2) for name, values in losses.items()}
    for other in ("naive", "ours"):
        rows = {row["model"]: row for row in found.tests.filter(against=other).to_dicts()}
        assert set(rows) == set(MODELS) - {other}
        wilcoxon = []
        for name, row in rows.items():
            panel = panel_diebold_mariano(means[name], means[other])
            assert row["difference"] == pytest.approx(means[name].mean() - means[other].mean())
            assert row["dm_p"] == pytest.approx(panel.p_value)
            assert (row["dm_kernel"], row["cutoffs"], row["units"]) == ("bartlett", 12, 9)
            expected = stats.wilcoxon(means[name].mean(axis=1), means[other].mean(axis=1))
            assert row["wilcoxon_p"] == pytest.approx(expected.pvalue)
            wilcoxon.append(row["wilcoxon_p"])
        assert [row["wilcoxon_p_holm"] for row in rows.values()] == pytest.approx(holm(wilcoxon))
        assert all(row["dm_p_holm"] >= row["dm_p"] for row in rows.values())
    by_series = np.column_stack([means[name].mean(axis=1) for name in MODELS])
    ranks = found.facts["ranks"]
    assert list(ranks["mean_rank"].values()) == pytest.approx(stats.rankdata(by_series, axis=1).mean(axis=0))
    assert ranks["friedman_p"] == pytest.approx(stats.friedmanchisquare(*by_series.T).pvalue)
    assert ranks["critical_difference"] == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 9)), rel=1e-3)


def test_few_series_leave_blocks_of_cutoffs_as_units() -> None:
    losses = made_up(2, 21)
    found = compare(as_tables(losses), "naive", "ours", loss="x", overlap=2)
    assert (found.facts["unit"], found.facts["units"], found.facts["cutoffs_sharing_rows"]) == ("cutoff", 11, 2)
    by_cutoff = {name: values.mean(axis=(0, 2)) for name, values in losses.items()}
    blocks = {
        name: np.array([values[start : start + 2].mean() for start in range(0, 21, 2)])
        for name, values in by_cutoff.items()
    }
    row = found.tests.filter(against="naive", model="drift").row(0, named=True)
    assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(blocks["drift"], blocks["naive"]).pvalue)
    assert row["units"] == 11
    dm = diebold_mariano(by_cutoff["drift"], by_cutoff["naive"], horizon=2, kernel="bartlett")
    assert row["dm_statistic"] == pytest.approx(dm.statistic)


def test_a_window_counts_for_all_models_or_for_none() -> None:
    losses = made_up(8, 10, variates=1)
    losses["drift"][3, 4, 0] = np.nan
    losses["ours"][3, 4, 0] = 50.0  # would turn the series around, but drift has no forecast there
    found = compare(as_tables(losses), "naive", "ours", loss="x", overlap=1)
    kept = np.where(np.isnan(losses["drift"][..., 0]), np.nan, losses["ours"][..., 0])
    other = np.where(np.isnan(losses["drift"][..., 0]), np.nan, losses["naive"][..., 0])
    expected = stats.wilcoxon(np.nanmean(kept, axis=1), np.nanmean(other, axis=1)).pvalue
    assert found.tests.filter(against="naive", model="ours")["wilcoxon_p"][0] == pytest.approx(expected)


def test_what_cannot_be_decided_is_null() -> None:
    losses = made_up(2, 1)
    found = compare(as_tables(losses), "naive", "naive", loss="x", overlap=1)
    assert found.tests["against"].unique().to_list() == ["naive"]
    assert found.tests["dm_p"].null_count() == found.tests["dm_p_holm"].null_count() == 3
    assert found.facts["ranks"]["friedman_p"] is None
    alone = compare({"ours": as_tables(losses)["ours"]}, "ours", "ours", loss="x", overlap=1)
    assert alone.tests.is_empty()
    same = dict.fromkeys(("ours", "naive"), losses["ours"])
    assert compare(as_tables(same), "naive", "ours", loss="x", overlap=1).tests["wilcoxon_p"].null_count() == 2


def test_window_losses_leave_out_what_has_no_unit() -> None:
    keys = {"variate": "v", "cutoff": START, "step": 1}
    cells = pl.DataFrame(
        [
            {"series_id": "a", **keys, "absolute": 1.0, "scaled": 2.0},
            {"series_id": "a", **keys, "absolute": 3.0, "scaled": 6.0},
            {"series_id": "b", **keys, "absolute": 5.0, "scaled": None},
        ]
    )
    assert window_losses(cells, scaled=True).select("series_id", "loss").rows() == [("a", 4.0)]
    assert sorted(window_losses(cells, scaled=False).select("series_id", "loss").rows()) == [("a", 2.0), ("b", 5.0)]
