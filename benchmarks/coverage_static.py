"""Coverage of stored intervals over the whole test part, method by method and set by set.

    python benchmarks/coverage_static.py --out benchmarks/results/coverage_static_cpu2_2026-11-29

``linear`` is fitted on the first 60 % of each set, calibrated once on the next 20 % and forecast from every row of the
last 20 %; nothing is adapted there. Methods are those of ``calibration.method`` for points, and ``absolute`` with
labels by volatility. A variate that keeps one value in more than half of the rows (rain) has no central interval of
80 %: the closed interval covers more than asked. Means without such variates stand in brackets. Reach, half-life and
prior weight of ``recent`` were chosen on the twelve sets of the first tables; the sets of the second ones chose
nothing, though they had been read once with half the reach.

The interval score (Gneiting and Raftery 2007, JASA 102:359-378, Eq. 43) adds to the width what a miss costs: the lower
the better. Its ratio to that of ``absolute`` is a geometric mean over variates.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, write
from coverage import LEVELS, NOMINAL, SETS, coverage, fit, read, without_atoms

from tsforge.data.windows import WindowSpec
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal_calibration import Choices

METHODS = {
    "absolute": Choices(method="absolute"),
    "by volatility": Choices(method="absolute", bucket="volatility"),
    "scaled": Choices(method="scaled"),
    "recent": Choices(method="recent"),
}

# name: context, horizon
FRESH: dict[str, tuple[int, int]] = {
    "air_quality_valencia": (336, 24),
    "bdg2_hourly_sample": (336, 24),
    "electricity_mean": (336, 24),
    "energy_appliance": (432, 24),
    "household_power": (360, 30),
    "los_speed": (288, 12),
    "traffic_mean": (336, 24),
    "traffic_volume": (336, 24),
}


def measure(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Return coverage and width of a set by method."""
    context, horizon = (SETS | FRESH)[name]
    frame = read(name, folder, quick)
    rows = frame.num_rows
    spans = (int(0.6 * rows), int(0.8 * rows))
    cutoffs = np.arange(spans[1] - 1, rows - horizon)
    whole = without_atoms(frame)
    record: dict[str, Any] = {
        "set": name,
        "cutoffs": len(cutoffs),
        "atoms": sorted(set(frame.schema.targets) - set(whole)),
    }
    for label, choices in METHODS.items():
        artifact = fit(frame, spans, WindowSpec(context_length=context, horizon=horizon), choices)
        began = time.perf_counter()
        found = forecasts_at(artifact, frame, cutoffs, steps=horizon, levels=LEVELS)
        record[label] = coverage(found) | {"seconds": round(time.perf_counter() - began, 2)}
        record[label]["scores"] = interval_scores(found)
        record[f"{label}, whole"] = coverage(found.filter(pl.col("variate").is_in(whole)))
    print(name, {label: round(record[label]["cover_80"], 1) for label in METHODS}, flush=True)
    return record


def interval_scores(table: pl.DataFrame) -> dict[str, dict[str, float]]:
    """Return the mean interval score by nominal coverage and variate."""
    known = table.drop_nulls("actual")
    found = {}
    for nominal, low, high in NOMINAL:
        below, above = (pl.col(low) - pl.col("actual")).clip(0.0), (pl.col("actual") - pl.col(high)).clip(0.0)
        score = pl.col(high) - pl.col(low) + 2.0 / (1.0 - nominal / 100.0) * (below + above)
        found[str(nominal)] = dict(known.group_by("variate").agg(score.mean()).iter_rows())
    return found


def score_ratio(record: dict[str, Any], label: str, nominal: int) -> float:
    """Return the interval score of a method over that of ``absolute``."""
    mine, other = (record[name]["scores"][str(nominal)] for name in (label, "absolute"))
    return float(np.exp(np.mean([np.log(mine[name] / other[name]) for name in other if other[name] > 0])))


def table_lines(records: list[dict[str, Any]], nominal: int) -> list[str]:
    """Return the table of a nominal coverage and how far off each method is."""
    title = [
        "set",
        "cutoffs",
        *METHODS,
        "median width recent/absolute",
        "interval score by volatility",
        "scaled",
        "recent",
    ]
    lines = ["| " + " | ".join(title) + " |", "|---" * len(title) + "|"]
    for record in records:
        cells = [record["set"], str(record["cutoffs"])]
        for label in METHODS:
            text = f"{record[label][f'cover_{nominal}']:.1f}"
            if record["atoms"]:
                text += f" ({record[f'{label}, whole'][f'cover_{nominal}']:.1f})"
            cells.append(text)
        width = record["recent"][f"width_{nominal}"] / record["absolute"][f"width_{nominal}"]
        ratios = [score_ratio(record, label, nominal) for label in list(METHODS)[1:]]
        lines.append("| " + " | ".join([*cells, f"{width:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]) + " |")
    lines.append("")
    means = {
        label: np.exp(np.mean([np.log(score_ratio(record, label, nominal)) for record in records])) for label in METHODS
    }
    texts = [f"{label} {mean:.3f}" for label, mean in means.items()]
    lines.append(f"Interval score over that of absolute, geometric mean over sets: {', '.join(texts)}.")
    lines.append("")
    for label in METHODS:
        for kind in ("", ", whole"):
            off = [abs(record[label + kind][f"cover_{nominal}"] - nominal) for record in records]
            lines.append(
                f"- {label}{' (without atoms)' if kind else ''}: median {np.median(off):.2f} points off, worst "
                f"{max(off):.1f}, within 2 on {sum(x <= 2 for x in off)} of {len(off)}"
            )
    return lines


def page(result: dict[str, Any]) -> str:
    """Return the tables as a page."""
    lines = heading("Coverage of stored intervals over the whole test part", result["about"])
    lines += ["", *(__doc__ or "").strip().splitlines()[4:]]
    for title, names in (("Twelve sets", SETS), ("Sets not looked at before", FRESH)):
        records = [record for record in result["records"] if record["set"] in names]
        for nominal, _, _ in NOMINAL:
            lines += ["", f"## {title}, nominal {nominal} %", "", *table_lines(records, nominal)]
    seconds = {label: sum(record[label]["seconds"] for record in result["records"]) for label in METHODS}
    lines += ["", "Seconds of all forecasts: " + ", ".join(f"{label} {s:.0f}" for label, s in seconds.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    folder = Path(os.environ.get("TSFORGE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "forecast"
    if not folder.is_dir():
        raise SystemExit("real data sets not found: set TSFORGE_DATA to the folder that holds forecast/")
    records = [measure(name, folder, given.quick) for name in (*SETS, *FRESH)]
    result = {"about": describe(given, before), "records": records}
    write(given.out, result, page(result))


if __name__ == "__main__":
    sys.exit(main())
