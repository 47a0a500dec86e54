"""How often Diebold-Mariano calls equal forecasters different at 5 %, and finds a real difference, by kernel.

Usage: python benchmarks/dm_size.py [--out PATH_WITHOUT_ENDING] [--quick] [--repetitions N]

Losses of two equal forecasters are simulated as their difference: independent; of h-step forecasts made at every step
(moving averages of h - 1 terms, h = 4 and 24); autoregressions with phi = 0.5 and 0.8, whose memory no horizon tells.
`rectangular` is told h, `bartlett` too; both are ours. Beside them on the same numbers: Student's t test, which takes
losses as independent, and statsmodels' Newey-West variance (same number of lags as `bartlett`) with a normal
distribution, the way the test is mostly coded. Power: a mean difference of 3 standard errors of the true mean.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from _measure import arguments, describe, heading, write
from numpy.typing import NDArray
from scipy import signal, stats
from statsmodels.stats.sandwich_covariance import S_hac_simple

from tsforge.metrics.significance import automatic_lags, diebold_mariano

Array = NDArray[np.float64]
LEVEL = 0.05
SHIFT = 3.0  # standard errors
NUMBERS = (25, 50, 100, 250, 1000)
# name: (horizon that the test is told, coefficients of the moving average or the autoregression)
PROCESSES: dict[str, tuple[int, str, float]] = {
    "independent": (1, "ma", 1),
    "overlap of 4 steps": (4, "ma", 4),
    "overlap of 24 steps": (24, "ma", 24),
    "autoregression 0.5": (1, "ar", 0.5),
    "autoregression 0.8": (1, "ar", 0.8),
}
Test = Callable[[Array, int], float]


def student(difference: Array, horizon: int) -> float:
    """Return the p-value of Student's t test."""
    return float(stats.ttest_1samp(difference, 0.0).pvalue)


def newey_west_normal(difference: Array, horizon: int) -> float:
    """Return the p-value with statsmodels' long-run variance and a normal distribution."""
    number = len(difference)
    centred = (difference - difference.mean())[:, None]
    variance = float(S_hac_simple(centred, nlags=automatic_lags(number, horizon))[0, 0]) / number**2
    return float(2 * stats.norm.sf(abs(difference.mean()) / np.sqrt(variance)))


def ours(kernel: Any) -> Test:
    """Return tsforge's test with one kernel."""
    return lambda difference, horizon: (
        diebold_mariano(difference, np.zeros_like(difference), horizon, kernel=kernel).p_value
    )


TESTS: dict[str, Test] = {
    "rectangular": ours("rectangular"),
    "bartlett": ours("bartlett"),
    "Newey-West, normal": newey_west_normal,
    "Student": student,
}


def simulate(name: str, number: int, repetitions: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Return loss differences (repetitions, number) with mean 0, and the standard error of their mean."""
    _, kind, value = PROCESSES[name]
    if kind == "ma":
        steps = int(value)
        noise = rng.normal(size=(repetitions, number + steps - 1))
        sums = np.cumsum(np.pad(noise, ((0, 0), (1, 0))), axis=1)
        found = sums[:, steps:] - sums[:, :-steps]
        weights = np.convolve(np.ones(number), np.ones(steps))  # how often each shock enters the sum
        return found, float(np.sqrt(np.sum(weights**2)) / number)
    noise = rng.normal(size=(repetitions, number + 500))
    found = signal.lfilter([1.0], [1.0, -value], noise, axis=1)[:, 500:]
    lag = np.arange(1, number)
    covariance = (1 + 2 * np.sum((1 - lag / number) * value**lag)) / (1 - value**2)
    return found, float(np.sqrt(covariance / number))


def measure(repetitions: int, numbers: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return one record for each process and number of cutoffs: shares rejected by every test."""
    records = []
    for name, (horizon, _, _) in PROCESSES.items():
        for number in numbers:
            if number <= 2 * horizon:
                continue
            rng = np.random.default_rng([number, list(PROCESSES).index(name)])
            losses, error = simulate(name, number, repetitions, rng)
            record: dict[str, Any] = {"process": name, "horizon": horizon, "number": number}
            for part, shift in (("size", 0.0), ("power", SHIFT * error)):
                for label, test in TESTS.items():
                    p_values = np.array([test(row + shift, horizon) for row in losses])
                    record[f"{part} {label}"] = float(np.mean(p_values < LEVEL))
            records.append(record)
            print(name, number, {label: record[f"size {label}"] for label in TESTS}, flush=True)
    return records


def page(result: dict[str, Any]) -> str:
    """Return both tables as a page."""
    lines = heading("Size and power of the Diebold-Mariano test", result["about"])
    lines += ["", *(__doc__ or "").strip().splitlines()[4:], ""]
    sampling = 100 * np.sqrt(LEVEL * (1 - LEVEL) / result["repetitions"])
    lines.append(
        f"{result['repetitions']:,} repetitions; at a true 5 % a share is uncertain by {sampling:.1f} points (1 sd). "
        f"{result['seconds']:.0f} s in all."
    )
    for part, title in (("size", "Equal forecasters called different, %"), ("power", "Real difference found, %")):
        lines += [
            "",
            f"## {title}",
            "",
            "| losses | h | n | " + " | ".join(TESTS) + " |",
            "|---" * (3 + len(TESTS)) + "|",
        ]
        for record in result["records"]:
            cells = [f"{100 * record[f'{part} {label}']:.1f}" for label in TESTS]
            lines.append(f"| {record['process']} | {record['horizon']} | {record['number']:,} | {' | '.join(cells)} |")
    worst = {label: max(record[f"size {label}"] for record in result["records"]) for label in TESTS}
    text = ", ".join(f"{label} {100 * value:.1f} %" for label, value in worst.items())
    return "\n".join([*lines, "", f"Largest share of false alarms: {text}."]) + "\n"


def main() -> None:
    """Run the simulation."""
    given = arguments(__doc__, numbers={"repetitions": 2000})
    before, began = os.getloadavg()[0], time.perf_counter()
    repetitions = 50 if given.quick else given.repetitions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = measure(repetitions, NUMBERS[:2] if given.quick else NUMBERS)
    about = describe(given, before)
    seconds = time.perf_counter() - began
    result = {"about": about, "repetitions": repetitions, "seconds": seconds, "records": records}
    write(given.out, result, page(result))


if __name__ == "__main__":
    sys.exit(main())
