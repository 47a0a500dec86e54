"""Reconciliation against the dense textbook formulas in double precision, and the properties each method must have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import nnls

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError, ModelError
from tsforge.data.hierarchy import Hierarchy, HierarchyConfig, build_hierarchy
from tsforge.forecasting.error_covariance import (
    ErrorCovariance,
    error_correlation,
    shrinkage_intensity,
    shrunk_covariance,
)
from tsforge.forecasting.reconcile import ReconcileConfig, Reconciliation, make_reconciliation

PROJECTIONS = ("ols", "wls_structural", "wls_variance", "mint")
IDS = tuple(f"{region}/{shop}" for region, shops in (("n", 4), ("s", 3), ("w", 1)) for shop in range(shops))
NESTED = {"levels": ["region", "shop"], "separator": "/"}
CROSSED = {"levels": ["region", "kind"], "separator": "/", "groups": [["region"], ["kind"]]}
GRID = tuple(f"{region}/{kind}" for region in "nsw" for kind in "ab")


def hierarchy(settings: dict[str, Any] = NESTED, ids: tuple[str, ...] = IDS, **more: Any) -> Hierarchy:
    return build_hierarchy(validate(HierarchyConfig, settings | more), ids)


PAIRS = tuple(f"{pair}/{one}" for pair in range(9) for one in range(2))
STRUCTURES = {
    "nested": hierarchy(),
    "pairs": hierarchy(ids=PAIRS),
    "crossed": hierarchy(CROSSED, GRID),
    "means": hierarchy(aggregate="mean"),
    "table": build_hierarchy(
        validate(HierarchyConfig, {"children": {"all": ["left", "x"], "left": ["y", "z"], "pair": ["x", "y"]}}),
        ("x", "y", "z"),
    ),
}


def made(method: str, structure: Hierarchy, errors: Any = None, **more: Any) -> Reconciliation:
    return make_reconciliation(validate(ReconcileConfig, {"method": method, **more}), structure, errors=errors)


def some_errors(structure: Hierarchy, rows: int = 30, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Errors that are not coherent and differ in size between nodes."""
    rng = np.random.default_rng(seed)
    number = len(structure.nodes)
    common = rng.normal(size=(rows, 2)) @ rng.normal(size=(2, number))
    return np.asarray((common + rng.normal(size=(rows, number))) * rng.uniform(0.5, 5.0, number))


def slow_covariance(errors: Any) -> tuple[Any, float]:
    """Return W and lambda by a loop over pairs, from the equations."""
    number, nodes = errors.shape
    variance = [sum(e * e for e in errors[:, i]) / number for i in range(nodes)]
    above = below = 0.0
    for i in range(nodes):
        for j in range(nodes):
            if i == j:
                continue
            w = [errors[k, i] * errors[k, j] / np.sqrt(variance[i] * variance[j]) for k in range(number)]
            r = sum(w) / number
            above += sum((value - r) ** 2 for value in w) / (number * (number - 1))
            below += r * r
    share = min(max(above / below, 0.0), 1.0)
    sample = errors.T @ errors / number
    return share * np.diag(np.diag(sample)) + (1 - share) * sample, share


def dense_matrix(method: str, structure: Hierarchy, errors: Any) -> Any:
    """Return S (S' W^-1 S)^-1 S' W^-1."""
    s = structure.summing.toarray()
    if method == "ols":
        w = np.eye(len(s))
    elif method == "wls_structural":
        w = np.diag((s**2).sum(axis=1))
    elif method == "wls_variance":
        w = np.diag((errors**2).mean(axis=0))
    else:
        w = slow_covariance(errors)[0]
    inverse = np.linalg.inv(w)
    return s @ np.linalg.inv(s.T @ inverse @ s) @ s.T @ inverse


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("method", PROJECTIONS)
@pytest.mark.parametrize("rows", [4, 30])  # fewer and more errors than aggregates
def test_projections_equal_the_dense_formula(method: str, name: str, rows: int) -> None:
    structure = STRUCTURES[name]
    errors = some_errors(structure, rows=rows)
    base = np.random.default_rng(1).normal(10.0, 5.0, size=(2, 3, len(structure.nodes)))
    found = made(method, structure, errors)
    expected = dense_matrix(method, structure, errors)
    assert np.allclose(found.matrix(), expected, rtol=0, atol=1e-9)
    assert np.allclose(found.apply(base), base @ expected.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("method", ["bottom_up", *PROJECTIONS])
def test_coherent_unbiased_and_idempotent(method: str, name: str) -> None:
    structure = STRUCTURES[name]
    found = made(method, structure, some_errors(structure))
    s, g = structure.summing.toarray(), found.matrix()
    assert np.abs(g @ s - s).max() < 1e-9  # S P S = S
    base = np.random.default_rng(2).normal(100.0, 30.0, size=(50, len(structure.nodes)))
    once = found.apply(base)
    assert np.abs(structure.incoherence(base)).max() > 1.0
    assert np.abs(structure.incoherence(once)).max() < 1e-9
    assert np.allclose(found.apply(once), once, atol=1e-9)


def test_ols_is_the_orthogonal_projection() -> None:
    for structure in STRUCTURES.values():
        g = made("ols", structure).matrix()
        assert np.allclose(g, g.T, atol=1e-12)
        assert np.allclose(g @ g, g, atol=1e-12)
        assert round(float(np.trace(g)), 9) == structure.num_bottoms


def test_the_shrinkage_intensity_equals_a_loop_over_pairs() -> None:
    for rows in (5, 40):
        errors = some_errors(STRUCTURES["crossed"], rows=rows, seed=rows)
        expected, share = slow_covariance(errors)
        found = shrunk_covariance(errors)
        assert 0.0 < share < 1.0
        assert found.shrinkage == pytest.approx(share, rel=1e-9)
        assert np.allclose(found.dense(), expected, rtol=1e-9, atol=1e-12)
    alone = np.eye(6)[:, :2] * 3.0  # never in the same row: nothing to shrink from
    assert shrinkage_intensity(alone) == 1.0


def test_shrinkage_falls_as_windows_grow_and_gaps_count_as_nothing() -> None:
    structure = STRUCTURES["nested"]
    few, many = (shrunk_covariance(some_errors(structure, rows=rows)).shrinkage for rows in (8, 800))
    assert many < 0.1 < few
    errors = some_errors(structure, rows=40)
    errors[::3, 2] = np.nan
    found = shrunk_covariance(errors)
    assert found.variance[2] == pytest.approx(np.nanmean(errors[:, 2] ** 2))
    assert np.linalg.eigvalsh(found.dense()).min() > 0.0
    errors[:, 4] = np.nan
    with pytest.raises(DataError, match="1 of 12 nodes have no held-out forecast error"):
        shrunk_covariance(errors)
    with pytest.raises(DataError, match="at least 4"):
        shrunk_covariance(errors[:3])


def test_mint_never_increases_the_trace_of_the_error_covariance() -> None:
    """With the true W, G W G' has the least trace of all unbiased methods; from many errors it comes close."""
    structure = STRUCTURES["nested"]
    number = len(structure.nodes)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(number, number)) * rng.uniform(0.3, 3.0, number)
        errors = rng.normal(size=(5_000, number)) @ root
        w = root.T @ root
        traces = {}
        for method in ("bottom_up", *PROJECTIONS):
            g = made(method, structure, errors).matrix()
            traces[method] = float(np.trace(g @ w @ g.T))
        assert traces["mint"] <= np.trace(w) * (1 + 1e-9)
        assert traces["mint"] <= min(traces.values()) * 1.01


def test_a_node_that_was_always_right_is_kept() -> None:
    structure = STRUCTURES["nested"]
    errors = some_errors(structure)
    errors[:, 0] = 0.0
    base = np.random.default_rng(3).normal(50.0, 5.0, size=(4, len(structure.nodes)))
    for method in ("wls_variance", "mint"):
        found = made(method, structure, errors).apply(base)
        assert np.allclose(found[:, 0], base[:, 0], rtol=1e-4)


def test_historical_shares_split_one_level() -> None:
    structure = STRUCTURES["nested"]
    rng = np.random.default_rng(0)
    bottoms = rng.uniform(1.0, 3.0, size=(25, structure.num_bottoms))
    bottoms[3, 1] = np.nan
    history = np.asarray((structure.summing @ np.nan_to_num(bottoms).T).T)
    history[3, [0, 1]] = np.nan
    history[3, 1 + structure.num_aggregates] = np.nan
    base = rng.normal(100.0, 5.0, size=(3, len(structure.nodes)))
    config = validate(ReconcileConfig, {"method": "top_down", "proportions": "historical"})
    found = make_reconciliation(config, structure, history=history)
    kept = [row for row in range(25) if row != 3]
    share = np.array([np.mean([history[t, 4 + j] / history[t, 0] for t in kept]) for j in range(8)])
    assert np.allclose(found.apply(base)[:, 4:], base[:, :1] * share / share.sum(), rtol=1e-9)
    assert np.allclose(found.apply(base)[:, 0], base[:, 0])
    config = validate(ReconcileConfig, {"method": "middle_out", "level": "region", "proportions": "historical"})
    split = make_reconciliation(config, structure, history=history).apply(base)
    assert np.allclose(split[:, 1:4], base[:, 1:4])
    assert np.allclose(split[:, 0], base[:, 1:4].sum(axis=1))
    assert np.abs(structure.incoherence(split)).max() < 1e-9
    with pytest.raises(DataError, match="needs the history"):
        make_reconciliation(config, structure)


def test_forecast_shares_go_down_level_by_level() -> None:
    structure = STRUCTURES["nested"]
    assert structure.nodes[:4] == ("total", "n", "s", "w")
    base = np.array([100.0, 30.0, 10.0, 10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 10.0, 7.0])
    found = made("top_down", structure).apply(base)
    assert np.allclose(found[:4], [100.0, 60.0, 20.0, 20.0])
    assert np.allclose(found[4:], [6.0, 12.0, 18.0, 24.0, 5.0, 5.0, 10.0, 20.0])
    middle = made("middle_out", structure, level="region").apply(base)
    assert np.allclose(middle, [50.0, 30.0, 10.0, 10.0, 3.0, 6.0, 9.0, 12.0, 2.5, 2.5, 5.0, 10.0])
    base[8:11] = 0.0  # nothing to go by: an even split
    assert np.allclose(made("top_down", structure).apply(base)[8:11], 20.0 / 3)
    means = made("top_down", STRUCTURES["means"])
    flat = means.apply(np.full(12, 7.0))
    assert np.allclose(flat, 7.0)  # a mean of equal values is that value, at every level


def test_what_a_structure_cannot_do_is_refused() -> None:
    crossed = STRUCTURES["crossed"]
    with pytest.raises(ConfigError, match="structure is crossed"):
        made("top_down", crossed)
    with pytest.raises(ConfigError, match="3 bottoms do not lie below exactly one node"):
        made(
            "middle_out",
            build_hierarchy(HierarchyConfig(children={"t": ("u", "c", "d", "e"), "u": ("a", "b")}), tuple("abcde")),
            level="level1",
        )
    with pytest.raises(ConfigError, match="unknown level 'regoin'"):
        made("middle_out", STRUCTURES["nested"], level="regoin")
    for wrong, message in (
        ({"method": "mint", "level": "region"}, "level goes with method middle_out"),
        ({"method": "middle_out"}, "level goes with method middle_out"),
        ({"method": "ols", "proportions": "historical"}, "no effect with method ols"),
        ({"method": "top_down", "intervals": "gaussian"}, "need a linear method"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(ReconcileConfig, wrong)
    with pytest.raises(ModelError, match="no one matrix"):
        made("top_down", STRUCTURES["nested"]).matrix()
    with pytest.raises(DataError, match="needs forecast errors"):
        made("mint", crossed)
    base = np.ones(len(crossed.nodes))
    base[5] = np.nan
    with pytest.raises(DataError, match="1 of 12 nodes have base forecasts that are not finite"):
        made("ols", crossed).apply(base)
    with pytest.raises(DataError, match="last axis must be the 12 nodes"):
        made("ols", crossed).apply(np.ones(7))


def test_nonnegative_bottoms_are_summed_again_and_stay_near_the_optimum() -> None:
    structure = STRUCTURES["crossed"]
    rng = np.random.default_rng(4)
    base = rng.normal(2.0, 2.0, size=(200, len(structure.nodes)))
    plain, clipped = made("ols", structure).apply(base), made("ols", structure, nonnegative=True).apply(base)
    assert plain.min() < 0.0 <= clipped.min()
    assert np.abs(structure.incoherence(clipped)).max() < 1e-9
    s = structure.summing.toarray()
    best = np.array([nnls(s, row)[0] for row in base]) @ s.T  # the quadratic program of the same W
    ours, least = ((clipped - base) ** 2).sum(), ((best - base) ** 2).sum()
    assert least <= ours <= 1.25 * least
    positive = np.abs(base) @ np.eye(len(structure.nodes)) + 50.0
    coherent = np.asarray((structure.summing @ positive[:, structure.num_aggregates :].T).T)
    assert np.allclose(made("ols", structure, nonnegative=True).apply(coherent), coherent)


@pytest.mark.parametrize("method", ["bottom_up", "ols", "mint"])
def test_gaussian_spread_equals_the_dense_formula_and_the_sample_paths(method: str) -> None:
    structure = STRUCTURES["crossed"]
    errors = some_errors(structure)
    correlation = shrunk_covariance(errors)
    found = made(method, structure, errors)
    deviation = np.random.default_rng(5).uniform(0.5, 2.0, size=(3, len(structure.nodes)))
    w = correlation.dense()
    r = w / np.sqrt(np.outer(np.diag(w), np.diag(w)))
    g = found.matrix()
    for row, own in enumerate(deviation):
        sigma = r * np.outer(own, own)
        expected = np.sqrt(np.diag(g @ sigma @ g.T))
        assert np.allclose(found.spread(deviation, correlation)[row], expected, rtol=1e-9)
        paths = np.random.default_rng(6).multivariate_normal(np.zeros(len(own)), sigma, size=40_000)
        coherent = found.samples(paths)
        assert np.abs(structure.incoherence(coherent)).max() < 1e-9
        assert np.allclose(coherent.std(axis=0), expected, rtol=0.03)


@pytest.mark.parametrize("method", ["bottom_up", "mint"])
def test_gaps_leave_the_spread_as_wide_as_it_is_without_them(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """A missing error tells nothing of a correlation; counted as zero it would take variance away."""
    structure = STRUCTURES["crossed"]
    errors = some_errors(structure, rows=4000)
    holed = errors.copy()
    holed[np.ix_(np.random.default_rng(1).random(4000) < 0.75, [0, 4, 8])] = np.nan  # a part and its sums begin late
    whole = holed[np.isfinite(holed).all(axis=1)]
    assert 800 < len(whole) < 1200
    found = made(method, structure, errors)
    deviation = np.random.default_rng(5).uniform(0.5, 2.0, size=(3, len(structure.nodes)))
    truth = found.spread(deviation, shrunk_covariance(errors))
    assert np.allclose(found.spread(deviation, error_correlation(holed)), truth, rtol=0.1)
    as_zeros = found.spread(deviation, shrunk_covariance(holed))
    assert (as_zeros / truth)[:, [0, 4, 8]].mean() < 0.9
    assert np.array_equal(error_correlation(holed).dense(), shrunk_covariance(whole).dense())
    assert np.array_equal(error_correlation(errors).dense(), shrunk_covariance(errors).dense())
    assert not caplog.messages
    rare = np.where(np.eye(len(structure.nodes), dtype=bool)[np.arange(60) % 12], np.nan, errors[:60])
    rare[:3] = errors[:3]
    assert np.array_equal(error_correlation(rare).dense(), shrunk_covariance(rare).dense())
    assert "3 of 60 held-out errors are there for all 12 nodes" in caplog.text


def test_ten_thousand_bottoms_need_no_square_matrix() -> None:
    import time
    import tracemalloc

    ids = tuple(f"r{k % 20}/d{k % 200}/s{k}" for k in range(10_000))
    structure = build_hierarchy(HierarchyConfig(levels=("region", "district", "shop"), separator="/"), ids)
    assert (structure.num_bottoms, structure.num_aggregates) == (10_000, 221)
    rng = np.random.default_rng(0)
    errors = rng.normal(size=(50, len(structure.nodes)))
    base = rng.normal(size=(24, len(structure.nodes)))
    tracemalloc.start()
    started = time.perf_counter()
    for method in ("bottom_up", *PROJECTIONS):
        assert np.abs(structure.incoherence(made(method, structure, errors).apply(base))).max() < 1e-8
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6  # one square matrix of doubles is 836 MB
    assert seconds < 20.0


def test_a_diagonal_covariance_is_itself() -> None:
    variance = np.array([1.0, 4.0])
    assert np.array_equal(ErrorCovariance(variance=variance).dense(), np.diag(variance))
