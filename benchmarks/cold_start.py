"""What cold start is worth on real series: errors by rows of history, beside models that know more.

Usage: python benchmarks/cold_start.py --data FOLDER [--out benchmarks/results/cold_start_HARDWARE_DATE] [--quick]

FOLDER holds ``forecast/beijing_air.parquet`` (PM2.5 of twelve stations of one city, hourly; the last 4,000 rows) and
``forecast/los_speed.parquet`` (speeds at the first 60 detectors of motorways, every 5 minutes). The series are dealt
into four groups; each group is new in turn, and models are fitted on the other three, once, before the first of ten
cutoffs 29 rows apart (other hours of the day). Intervals of 80 % are conformal. Closed forms only: ``linear`` and
``ar_net`` with their defaults. Look-back 96, horizon 24. No series has static features, so that without a row the
forecast is the mean over the others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import _measure
import polars as pl

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.backtest import BacktestConfig, Fit, backtest

CONTEXT, HORIZON = 96, 24
MODELS = ("linear", "ar_net")
ROWS = (0, 1, 4, 16, 48)


def beijing(folder: Path) -> SeriesFrame:
    """Return PM2.5 of twelve stations."""
    table = pl.read_parquet(folder / "forecast" / "beijing_air.parquet").tail(4000)
    names = [name for name in table.columns if name.endswith(".PM2.5")]
    long = table.unpivot(on=names, index="ds", variable_name="id", value_name="y")
    return SeriesFrame.from_long(long, series_id="id", time="ds", targets=["y"])


def speeds(folder: Path) -> SeriesFrame:
    """Return the speeds at 60 detectors."""
    table = pl.read_parquet(folder / "forecast" / "los_speed.parquet")
    first = table.columns[0]
    long = table.unpivot(on=table.columns[1:61], index=first, variable_name="id", value_name="y")
    return SeriesFrame.from_long(long, series_id="id", time=first, targets=["y"])


def fitter(name: str) -> Fit:
    """Return the fit of one model: the last 15 % of the rows before a cutoff calibrate its intervals."""
    settings = {
        "data": {"name": "benchmark", "source": {"kind": "parquet", "path": "unused.parquet"}},
        "model": name,
        "window": {"context_length": CONTEXT, "horizon": HORIZON},
        "split": {"train": 0.85, "valid": 0.15, "test": 0.0},
        "calibration": {"quantile_levels": [0.1, 0.5, 0.9]},
        "tracking": {"enabled": False},
    }
    config = validate(FitConfig, settings)

    def fit(seen: Any, cutoff: Any) -> Artifact:
        return fit_frame(seen, config)[0]

    return fit


def measure(name: str, frame: SeriesFrame, quick: bool) -> list[dict[str, Any]]:
    """Return one record a model and K."""
    config = validate(
        BacktestConfig,
        {
            "num_cutoffs": 2 if quick else 10,
            "stride": 29,
            "baselines": ["last_value"],
            "cold_start": {"rows": (0, 4) if quick else ROWS, "windows": 20},
        },
    )
    if quick:
        frame = frame.select_series(frame.series_ids[:8])
    report = backtest({model: fitter(model) for model in MODELS}, frame, config, horizon=HORIZON)
    facts = {"data": name, "series": len(frame.series_ids)}
    records = [{**facts, **row} for row in report.settings["cold_start_rows"]]
    for row in records:
        _measure.tell(row)
    return records


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        *_measure.heading("Cold start: errors by rows of history", about),
        "",
        f"Look-back {CONTEXT}, horizon {HORIZON}, ten cutoffs, four groups of new series. `of known`: mean absolute "
        "error in multiples of that of the model that was fitted on these series too and has their whole history; "
        "`of full`: of that of the model that has it but was fitted on the others; `of naive`: of the (seasonal) naive "
        "forecast from the same rows. Coverage of nominal 80 %.",
        "",
        "| data | series | model | rows | cells | mae | of known | of full | of naive | coverage |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = " | ".join(
            "" if row[key] is None else f"{row[key]:.2f}" for key in ("of_known", "of_full", "of_naive")
        )
        lines.append(
            f"| {row['data']} | {row['series']} | {row['model']} | {row['rows']} | {row['cells']:,} | "
            f"{row['mae']:.4g} | {ratios} | {row['coverage_80']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print."""
    given = _measure.arguments(__doc__, data=True)
    load = os.getloadavg()[0]
    rows = []
    for name, read in (("beijing", beijing), ("los_speed", speeds)):
        rows += measure(name, read(given.data), given.quick)
    about = _measure.describe(given, load)
    _measure.write(given.out, {**about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
