"""AR-Net: exact and sparse solvers against statsmodels AutoReg and gradient descent, in one run on one thread.

    python benchmarks/arnet.py --out benchmarks/results/arnet_MACHINE_DATE [--parts comparison recovery panels]

Writes ``OUT.json`` and ``OUT.md``. Three questions: how long does an order-p fit of n rows take, how well are the
coefficients [0.2, 0.3, -0.5] recovered when the order is not known (sTPE, Triebe et al. 2019, figure 4), and how much
faster are autocovariances of a panel in batches than by a transform for every series and variate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _measure
import numpy as np
import torch
from scipy.fft import irfft, next_fast_len, rfft

from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.metrics.recovery import stpe
from tsforge.models.ar_net import ARNet, ARNetConfig
from tsforge.ops.ar_process import simulate
from tsforge.ops.toeplitz import autocovariance

TRUTH = np.array([0.2, 0.3, -0.5])
ROWS = 100_000
ORDERS = (10, 100, 1000)
TABLE_ORDERS = (3, 10, 25, 100, 200, 500, 1000)
PARTS = ("comparison", "recovery", "panels")
PANELS = ((2000, 500, 8, 48), (300, 5000, 4, 168), (20, 50_000, 3, 200))  # series, rows, variates, lags
AUTOREG_LIMIT_GB = 2.0  # it holds the n x p matrix about four times, and its pseudo-inverse takes minutes at p = 1000
SGD = {"epochs": 4, "batch": 128, "rate": 1e-3, "decay": 0.5}


def as_series(values: np.ndarray[Any, Any]) -> TrainingSeries:
    """Return one univariate training span."""
    table = torch.from_numpy(values[:, None])
    seen = torch.ones_like(table, dtype=torch.bool)
    return TrainingSeries(table, seen, torch.tensor([0, len(values)]), torch.tensor([0]))


def fit(values: np.ndarray[Any, Any], lags: int, **settings: Any) -> tuple[np.ndarray[Any, Any], float]:
    """Return the coefficients of our model and the seconds of building and solving it, explanations included."""
    start = time.process_time()
    spec = DataSpec(context_length=lags, horizon=1, num_variates=1)
    model = ARNet(ARNetConfig(lags=lags, **settings), spec).double()
    model.solve(as_series(values))
    seconds = time.process_time() - start
    return model.ar.weight[0, 0].detach().numpy(), seconds


def autoreg(values: np.ndarray[Any, Any], lags: int) -> tuple[np.ndarray[Any, Any], float] | None:
    """Return coefficients and seconds of statsmodels, or None where its matrices would not fit."""
    from statsmodels.tsa.ar_model import AutoReg

    if 4 * len(values) * lags * 8 / 1e9 > AUTOREG_LIMIT_GB:
        return None
    start = time.process_time()
    found = AutoReg(values, lags, trend="c").fit()
    return np.asarray(found.params[1:]), time.process_time() - start


def dense(values: np.ndarray[Any, Any], lags: int) -> tuple[np.ndarray[Any, Any], float]:
    """Return coefficients and seconds of normal equations on explicit windows, built 5000 rows at a time."""
    start = time.process_time()
    windows = np.lib.stride_tricks.sliding_window_view(values - values.mean(), lags + 1)
    gram = np.zeros((lags + 2, lags + 2))
    for first in range(0, len(windows), 5000):
        part = np.column_stack([windows[first : first + 5000], np.ones(len(windows[first : first + 5000]))])
        gram += part.T @ part
    inputs = [*range(lags - 1, -1, -1), lags + 1]
    weight = np.linalg.solve(gram[np.ix_(inputs, inputs)], gram[inputs, lags])
    return weight[:-1], time.process_time() - start


def descend(values: np.ndarray[Any, Any], lags: int) -> tuple[np.ndarray[Any, Any], float]:
    """Return coefficients and seconds of Adam on the penalised loss."""
    torch.manual_seed(0)
    start = time.process_time()
    spec = DataSpec(context_length=lags, horizon=1, num_variates=1)
    model = ARNet(ARNetConfig(lags=lags, solver="sgd", warm_start=False, expected_nonzero=3), spec)
    windows = torch.from_numpy(values).float().unfold(0, lags + 1, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=SGD["rate"])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, SGD["decay"])
    batch, epochs = int(SGD["batch"]), int(SGD["epochs"])
    mask = torch.ones(batch, lags, 1, dtype=torch.bool)
    for epoch in range(epochs):
        order = torch.randperm(len(windows))
        model.anneal(epoch / epochs)
        for first in range(0, len(windows) - batch + 1, batch):
            chosen = windows[order[first : first + batch]]
            prediction = model(Batch(chosen[:, :lags, None], mask))
            loss = (prediction.raw[:, 0, 0, 0] - chosen[:, lags]).square().mean()
            loss = loss + sum((prediction.aux_losses or {}).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return model.ar.weight[0, 0].detach().double().numpy(), time.process_time() - start


def best(run: Callable[[], tuple[np.ndarray[Any, Any], float]], repeats: int = 3) -> tuple[np.ndarray[Any, Any], float]:
    """Return the coefficients and the least seconds of a few runs."""
    found = [run() for _ in range(repeats)]
    return found[0][0], min(seconds for _, seconds in found)


def compare(values: np.ndarray[Any, Any], lags: int, *, with_sgd: bool) -> dict[str, Any]:
    """Return times, errors and agreement of all solvers for one order."""
    exact, exact_seconds = best(lambda: fit(values, lags))
    sparse, sparse_seconds = best(lambda: fit(values, lags, solver="sparse", expected_nonzero=3))
    path, path_seconds = best(lambda: fit(values, lags, solver="sparse"))
    row: dict[str, Any] = {
        "order": lags,
        "ols": {"seconds": exact_seconds, "stpe": stpe(exact, TRUTH)},
        "sparse": {"seconds": sparse_seconds, "stpe": stpe(sparse, TRUTH), "nonzero": int(np.count_nonzero(sparse))},
        "sparse_ebic": {"seconds": path_seconds, "stpe": stpe(path, TRUTH), "nonzero": int(np.count_nonzero(path))},
    }
    plain, seconds = dense(values, lags)
    row["explicit"] = {"seconds": seconds, "largest_difference_to_ols": float(np.abs(plain - exact).max())}
    row["explicit"]["stpe"] = stpe(plain, TRUTH)
    reference = autoreg(values, lags)
    if reference is None:
        row["autoreg"] = {"skipped": f"its matrices need more than {AUTOREG_LIMIT_GB:g} GB"}
    else:
        row["autoreg"] = {
            "seconds": reference[1],
            "stpe": stpe(reference[0], TRUTH),
            "largest_difference_to_ols": float(np.abs(reference[0] - exact).max()),
        }
    if with_sgd:
        weight, seconds = descend(values, lags)
        row["sgd"] = {"seconds": seconds, "stpe": stpe(weight, TRUTH), "nonzero": int(np.count_nonzero(weight))}
    return row


def recovery(seeds: int) -> list[dict[str, Any]]:
    """Return mean sTPE and non-zeros over ``seeds`` series for every order and solver."""
    solvers: dict[str, dict[str, Any]] = {
        "ols": {},
        "sparse_paper_rule": {"solver": "sparse", "expected_nonzero": 3, "refit": False},
        "sparse_paper_rule_refit": {"solver": "sparse", "expected_nonzero": 3},
        "sparse_ebic": {"solver": "sparse"},
        "omp_ebic": {"solver": "omp"},
    }
    table = []
    series = [simulate(TRUTH, ROWS, np.random.default_rng(seed)) for seed in range(seeds)]
    for lags in TABLE_ORDERS:
        row: dict[str, Any] = {"order": lags}
        for name, settings in solvers.items():
            found = [fit(values, lags, **settings) for values in series]
            counts = sorted({int(np.count_nonzero(weight)) for weight, _ in found})
            row[name] = {
                "stpe": float(np.mean([stpe(weight, TRUTH) for weight, _ in found])),
                "nonzero": counts,
                "seconds": float(np.median([seconds for _, seconds in found])),
            }
        table.append(row)
        print(json.dumps(row), flush=True)
    return table


def one_transform_each(
    values: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], bounds: list[int], max_lag: int
) -> np.ndarray[Any, Any]:
    """Return what ``autocovariance`` does, by a transform and its inverse for every series and variate."""
    lags, found = np.arange(max_lag + 1), []
    for variate in range(values.shape[1]):
        products, counts, full = (np.zeros(max_lag + 1) for _ in range(3))
        column, seen = np.where(mask[:, variate], values[:, variate], 0.0), mask[:, variate].astype(float)
        for start, stop in pairwise(bounds):
            size = next_fast_len(stop - start + max_lag + 1, real=True)
            pairs = np.maximum(stop - start - lags, 0)
            products += irfft(np.abs(rfft(column[start:stop], size)) ** 2, size)[: max_lag + 1]
            whole = seen[start:stop].all()
            counts += (
                pairs if whole else np.round(irfft(np.abs(rfft(seen[start:stop], size)) ** 2, size)[: max_lag + 1])
            )
            full += pairs
        found.append(products / np.maximum(counts, 1.0) * full / full[0])
    return np.stack(found)


def panels() -> list[dict[str, Any]]:
    """Return times of the autocovariances of whole panels, with 5 % of the cells missing and without."""
    table = []
    for series, rows, variates, lags in PANELS:
        for missing in (0.0, 0.05):
            rng = np.random.default_rng(0)
            sizes = rng.integers(rows // 2, rows + 1, series)
            bounds = np.cumsum([0, *sizes]).tolist()
            values = rng.normal(size=(bounds[-1], variates))
            mask = rng.random(values.shape) >= missing
            given: Any = (values, mask, bounds, lags)
            calls = {
                "one_each": partial(one_transform_each, *given),
                "batched": partial(autocovariance, *given),
            }
            difference = np.abs(calls["batched"]() - calls["one_each"]()).max()
            row = {"series": series, "rows": rows, "variates": variates, "lags": lags, "missing": missing}
            row |= {"largest_difference": float(difference)}
            row |= _measure.summarise(_measure.in_turns(calls, Pace(torch.device("cpu"))), "one_each")
            _measure.tell(row)
            table.append(row)
    return table


@dataclass(frozen=True)
class Pace:
    """How the panels are timed."""

    device: torch.device
    rounds: int = 7
    least_seconds: float = 0.0


def panel_lines(table: list[dict[str, Any]]) -> list[str]:
    """Return the part of the report on panels."""
    lines = [
        "## Autocovariances of a panel: batches of transforms against one for every series and variate",
        "",
        "Series of half to all of the rows given; wall milliseconds, medians of 7 rounds in turns, the ratio with its "
        "extremes in a round.",
        "",
        "| series | rows | variates | lags | missing | one each | in batches | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        sizes = [f"{row[name]:,}" for name in ("series", "rows", "variates", "lags")]
        times = [f"{row[name]['ms']:.1f}" for name in ("one_each", "batched")]
        ratio = _measure.ratio_cell(row["batched"])
        lines.append(f"| {' | '.join(sizes)} | {row['missing']:.0%} | {' | '.join(times)} | {ratio} |")
    largest = max(row["largest_difference"] for row in table)
    return [*lines, "", f"Largest difference of an autocovariance: {largest:.1e} (variance 1).", ""]


def cell(entry: dict[str, Any]) -> str:
    """Return one table cell: seconds, sTPE, non-zeros."""
    if "skipped" in entry:
        return "skipped: " + str(entry["skipped"])
    counts = entry.get("nonzero")
    shown = ", ".join(map(str, counts)) if isinstance(counts, list) else counts
    return f"{entry['seconds']:.3f} s, {entry['stpe']:.2f}" + (f" ({shown})" if counts is not None else "")


def report(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [f"# AR-Net solvers, {result['date']}", ""]
    if "panels" in result:
        lines += [f"One thread ({result['machine']}).", "", *panel_lines(result["panels"])]
    if "comparison" in result:
        lines += comparison_lines(result)
    if "recovery" in result:
        lines += recovery_lines(result)
    return "\n".join([*lines, f"Peak memory of the whole run: {result['peak_gb']:.2f} GB.", ""])


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """Return the part of the report on one series."""
    lines = [
        f"AR(3) = {TRUTH.tolist()}, noise 1, n = {ROWS:,}, one thread ({result['machine']}). "
        "Seconds are CPU seconds of the process, for all solvers alike, since the machine was shared. "
        "Times include building the model, standard errors, partial autocorrelations and the residual test. "
        "Cells: CPU seconds, sTPE, non-zero coefficients in brackets.",
        "",
        "## One series: our solvers, statsmodels, gradient descent (best of 3 runs; SGD once)",
        "",
        "| p | least squares | sparse, paper's rule | sparse, EBIC path | explicit windows | AutoReg | Adam |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["comparison"]:
        names = ("ols", "sparse", "sparse_ebic", "explicit", "autoreg", "sgd")
        cells = [cell(row[name]) if name in row else "-" for name in names]
        lines.append(f"| {row['order']} | " + " | ".join(cells) + " |")
    differences = [
        f"{label}, p = {row['order']}: {row[name]['largest_difference_to_ols']:.1e}"
        for name, label in (("autoreg", "AutoReg"), ("explicit", "explicit windows"))
        for row in result["comparison"]
        if "largest_difference_to_ols" in row[name]
    ]
    return [
        *lines,
        "",
        "Largest difference of a coefficient to our least squares: " + "; ".join(differences) + ".",
        f"Adam: {SGD['epochs']} epochs, rate {SGD['rate']:g}, halved each epoch, batch {SGD['batch']}, the paper's "
        "penalty for 3 of p lags.",
        "",
    ]


def recovery_lines(result: dict[str, Any]) -> list[str]:
    """Return the part of the report on recovery."""
    lines = [
        f"## Recovery, mean of {result['seeds']} series",
        "",
        "| p | least squares | sparse, paper's rule | the same, refitted | sparse, EBIC path | OMP, EBIC |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["recovery"]:
        lines.append(f"| {row['order']} | " + " | ".join(cell(row[name]) for name in list(row)[1:]) + " |")
    return [
        *lines,
        "",
        "Where all solvers agree (the first row) the error is that of the samples: with the true lags given, the "
        "expected sTPE at this n is 0.34.",
        "",
    ]


def main() -> None:
    """Run the parts asked for and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result path without ending")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sgd-orders", type=int, nargs="*", default=list(ORDERS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, shared; torch {torch.__version__}",
        "seeds": given.seeds,
    }
    values = simulate(TRUTH, ROWS, np.random.default_rng(0))
    fit(values, 10)  # first-call costs of the libraries are not the solver's
    if "panels" in given.parts:
        result["panels"] = panels()
    if "comparison" in given.parts:
        result["comparison"] = []
        for lags in ORDERS:
            result["comparison"].append(compare(values, lags, with_sgd=lags in given.sgd_orders))
            print(json.dumps(result["comparison"][-1]), flush=True)
    if "recovery" in given.parts:
        result["recovery"] = recovery(given.seeds)
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(report(result), encoding="utf-8")


if __name__ == "__main__":
    main()
