"""Coverage of the stored intervals that a fit gives by default, model by model, and how long a held-out span they need.

    python benchmarks/coverage_default.py --out benchmarks/results/coverage_default_cpu2_2026-12-01

``default`` is ``calibration.method=auto``; ``absolute`` is what that meant for points before. **Models**: each is
fitted on the first 60 % of a set, calibrated once on the next 20 % (``auto`` of closed forms: on the second half of
that, the first half chooses) and forecast from every third row of the last 20 %. **Spans**: ``linear`` calibrated on
the rows right after its first 60 %, as many as the units of ``recent`` look back (eight horizons, 64 rows at least)
times 0.25 to 2, and forecast from the thousand rows after them. Variates that keep one value in more than half of
the rows (rain) are left out: no closed interval of theirs can cover 80 %. The interval score (Gneiting and Raftery
2007, JASA 102:359-378, Eq. 43) adds to the width what a miss costs, the lower the better; ratios are geometric means
over variates and sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, write
from coverage import LEVELS, NOMINAL, SETS, coverage, fit, read, without_atoms
from coverage_static import FRESH, interval_scores, score_ratio

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal_calibration import Choices, Method

MODELS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "ar_net": {"name": "ar_net"},
    "seasonal_naive": {"name": "seasonal_naive", "season_length": 24},
    "auto, closed forms": {"name": "auto", "minutes": 0},
}
RATIOS = (0.25, 0.5, 1.0, 2.0)
ASKED = {"absolute": "absolute", "default": "auto"}
STEP = 3


def fitted(frame: SeriesFrame, model: dict[str, Any], window: tuple[int, int], method: str) -> Artifact:
    """Return a model fitted and calibrated by ``fit`` with everything else at its default."""
    config = {
        "data": {
            "name": "benchmark",
            "layout": "wide",
            "time": "time",
            "targets": list(frame.schema.targets),
            "freq": frame.schema.freq,
            "source": {"kind": "parquet", "path": "unused"},
        },
        "model": model,
        "window": {"context_length": window[0], "horizon": window[1]},
        "split": {"train": 0.6, "valid": 0.2, "test": 0.2},
        "calibration": {"method": method, "quantile_levels": LEVELS},
        "tracking": {"enabled": False},
    }
    return fit_frame(frame, validate(FitConfig, config))[0]


def graded(make: Callable[[str], Artifact], frame: SeriesFrame, horizon: int, cutoffs: Any) -> dict[str, Any]:
    """Return coverage, width and interval score of both methods."""
    whole = without_atoms(frame)
    record: dict[str, Any] = {"cutoffs": len(cutoffs)}
    for label, method in ASKED.items():
        artifact = make(method)
        began = time.perf_counter()
        found = forecasts_at(artifact, frame, cutoffs, steps=horizon, levels=LEVELS)
        seconds = round(time.perf_counter() - began, 2)
        kept = found.filter(pl.col("variate").is_in(whole))
        record[label] = coverage(kept) | {"scores": interval_scores(kept), "seconds": seconds}
        assert artifact.calibration is not None
        record[label]["means"] = artifact.calibration["score"][0]
    return record


def models(name: str, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Return the records of a set, one a model."""
    window = (SETS | FRESH)[name]
    frame = read(name, folder, quick)
    cutoffs = np.arange(int(0.8 * frame.num_rows) - 1, frame.num_rows - window[1], STEP)
    records = []
    for label, model in MODELS.items():

        def make(method: str, model: dict[str, Any] = model) -> Artifact:
            return fitted(frame, model, window, method)

        records.append({"set": name, "model": label} | graded(make, frame, window[1], cutoffs))
        print(name, label, {kind: round(records[-1][kind]["cover_80"], 1) for kind in ASKED}, flush=True)
    return records


def spans(name: str, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Return the records of a set, one a length of the held-out span."""
    context, horizon = (SETS | FRESH)[name]
    frame = read(name, folder, quick)
    first, reach = int(0.6 * frame.num_rows), max(8 * horizon, 64)
    records = []
    for ratio in RATIOS:
        stop = first + int(ratio * reach) + horizon
        cutoffs = np.arange(stop - 1, min(frame.num_rows - horizon, stop + 1000), STEP)
        if len(cutoffs) < 50:
            continue

        def make(method: str, stop: int = stop) -> Artifact:
            kind: Method = "recent" if method == "auto" else "absolute"  # whatever the span, to see where it turns
            window = WindowSpec(context_length=context, horizon=horizon)
            return fit(frame, (first, stop), window, Choices(method=kind))

        records.append({"set": name, "ratio": ratio} | graded(make, frame, horizon, cutoffs))
    return records


def line(title: str, records: Sequence[dict[str, Any]]) -> str:
    """Return one row of a table: how far off, within 2 points, interval score."""
    cells = [title, str(len(records))]
    for nominal, _, _ in NOMINAL:
        for label in ASKED:
            off = np.array([abs(record[label][f"cover_{nominal}"] - nominal) for record in records])
            cells.append(f"{np.median(off):.1f} ({(off <= 2).sum()}), worst {off.max():.1f}")
        ratios = [score_ratio(record, "default", nominal) for record in records]
        cells.append(f"{np.exp(np.mean(np.log([ratio for ratio in ratios if np.isfinite(ratio)]))):.2f}")
    return "| " + " | ".join(cells) + " |"


def table(title: str, groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a table: points off nominal, median over sets (sets within 2)."""
    head = [title, "sets"]
    for nominal, _, _ in NOMINAL:
        head += [f"absolute, {nominal} %", f"recent, {nominal} %", "interval score, recent / absolute"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *(line(name, records) for name, records in groups.items() if records)]


def page(result: dict[str, Any]) -> str:
    """Return the tables as a page."""
    lines = heading("Coverage of the stored intervals that a fit gives by default", result["about"])
    lines += ["", *(__doc__ or "").strip().splitlines()[4:]]
    lines += ["", "Points away from nominal: median over sets (sets within 2), worst set."]
    for title, names in (("Twelve sets", SETS), ("Eight other sets", FRESH)):
        mine = [record for record in result["models"] if record["set"] in names]
        groups = {label: [record for record in mine if record["model"] == label] for label in MODELS}
        lines += ["", f"## Models: {title.lower()}", "", *table("model", groups)]
    groups = {f"{ratio:g}": [record for record in result["spans"] if record["ratio"] == ratio] for ratio in RATIOS}
    lines += ["", "## Held-out rows over those that units look back, `linear`, all sets", "", *table("ratio", groups)]
    lines += [
        "",
        "## Every set",
        "",
        "| set | model | default is | 80 %: absolute | default | 95 %: absolute | default |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for record in result["models"]:
        cells = [record["set"], record["model"], record["default"]["means"]]
        cells += [f"{record[label][f'cover_{nominal}']:.1f}" for nominal, _, _ in NOMINAL for label in ASKED]
        lines.append("| " + " | ".join(cells) + " |")
    cost = {label: sum(record[label]["seconds"] for record in result["models"]) for label in ASKED}
    lines += [
        "",
        "Seconds of all forecasts of models: " + ", ".join(f"{name} {s:.0f}" for name, s in cost.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    folder = Path(os.environ.get("TSFORGE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "forecast"
    if not folder.is_dir():
        raise SystemExit("real data sets not found: set TSFORGE_DATA to the folder that holds forecast/")
    sets = (*SETS, *FRESH)
    result: dict[str, Any] = {
        "models": [record for name in sets for record in models(name, folder, given.quick)],
        "spans": [record for name in sets for record in spans(name, folder, given.quick)],
    }
    result = {"about": describe(given, before), **result}
    write(given.out, result, page(result))


if __name__ == "__main__":
    main()
