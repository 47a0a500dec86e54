"""Linear models fitted on training rows with gaps: filled windows against interpolated rows and gap-free windows.

Usage: python benchmarks/gaps.py --data FOLDER --out benchmarks/results/gaps_HARDWARE_DATE
    [--sets ETTh1,vic_electricity,nyc_weather] [--context 96] [--horizon 24]

Cells of the training rows (the first 70 %) are hidden at random, one by one or in blocks; the test rows (the last 20 %)
stay as they are, so that every row of a table forecasts the same windows. Mean squared errors in deviations of the
observed training rows, over observed cells. ``interpolated`` fits on rows whose gaps were bridged by straight lines,
``gap-free windows`` on what is left of whole windows; nyc_weather has gaps of its own throughout. The set
``two_seasons`` is generated: 5,000 rows of waves of 24 and 12 rows with little noise, hidden in blocks as long.
Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from polars import selectors

from tsforge.artifact import collect_provenance
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.atomic import atomic_file
from tsforge.core.errors import ModelError
from tsforge.models.ar_net import ARNet, ARNetConfig
from tsforge.models.linear import Linear, LinearConfig
from tsforge.ops.toeplitz import bridged

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Hidden share of cells, rows of a gap.
SHARES = ((0.0, 1), (0.02, 1), (0.1, 1), (0.1, 6), (0.3, 1), (0.3, 24), (0.6, 4))
SEASONS = "two_seasons"
SEASON_SHARES = ((0.0, 1), (0.3, 24), (0.5, 15))
SKIP = ("wind_gust",)  # 80 % missing


def read(path: Path) -> tuple[Array, Mask]:
    """Return all numeric columns [N, V] and what was observed."""
    if path.stem == SEASONS:
        rows = np.arange(5_000)
        waves = 5.0 * np.sin(2 * np.pi * rows / 12) + 3.0 * np.sin(2 * np.pi * rows / 24)
        made = (50.0 + waves + 0.1 * np.random.default_rng(1).normal(size=len(rows)))[:, None]
        return made, np.ones(made.shape, dtype=bool)
    table = pl.read_parquet(path).select(selectors.numeric())
    values = table.select([c for c in table.columns if not c.endswith(SKIP)]).to_numpy().astype(np.float64)
    return values, np.isfinite(values)


def hide(shape: tuple[int, int], share: float, size: int) -> Mask:
    """Return True on about ``share`` of the cells, in gaps of ``size`` rows."""
    rng = np.random.default_rng(0)
    starts = rng.random(shape) < (1.0 - (1.0 - share) ** (1.0 / size))
    hidden: Mask = starts.copy()
    for step in range(1, size):
        hidden[step:] |= starts[:-step]
    return hidden


def error(model: Any, values: Array, mask: Mask, first: int, context: int, horizon: int) -> float:
    """Return the mean squared error of all windows whose targets begin at row ``first`` or later."""
    origins = np.arange(first, len(values) - horizon + 1)
    total, cells = 0.0, 0
    for part in np.array_split(origins, max(len(origins) // 256, 1)):
        past, future = part[:, None] + np.arange(-context, 0), part[:, None] + np.arange(horizon)
        batch = Batch(torch.from_numpy(np.where(mask, values, 0.0)[past]), torch.from_numpy(mask[past]))
        with torch.no_grad():
            found = model(batch).raw[..., 0].numpy()
        seen = mask[future]
        total += float(np.square(np.where(seen, found - values[future], 0.0)).sum())
        cells += int(seen.sum())
    return total / cells


def measure(path: Path, context: int, horizon: int) -> Iterator[dict[str, Any]]:
    """Yield a row a share of hidden cells, model and way to fit."""
    raw, observed = read(path)
    stop, first = int(0.7 * len(raw)), int(0.8 * len(raw))
    for share, size in SEASON_SHARES if path.stem == SEASONS else SHARES:
        mask = observed.copy()
        mask[:stop] &= ~hide((stop, raw.shape[1]), share, size)
        train = np.where(mask[:stop], raw[:stop], np.nan)
        values = np.where(observed, (raw - np.nanmean(train, 0)) / np.nanstd(train, 0), 0.0)
        columns = zip(values[:stop].T, mask[:stop].T, strict=True)
        lines = np.stack([bridged(column, seen, [0, stop]) for column, seen in columns], axis=1)
        for name in ("ar_net", "linear"):
            for way in ("auto", "filled", "interpolated", "windows"):
                rule = {"interpolated": "auto"}.get(way, way)
                shown, seen = (
                    (lines, np.ones_like(mask[:stop])) if way == "interpolated" else (values[:stop], mask[:stop])
                )
                spec = DataSpec(context_length=context, horizon=horizon, num_variates=raw.shape[1])
                model: Any = ARNet(ARNetConfig(missing=rule), spec) if name == "ar_net" else None
                model = (model or Linear(LinearConfig(missing=rule), spec)).double()
                data = TrainingSeries(
                    torch.from_numpy(np.where(seen, shown, 0.0)),
                    torch.from_numpy(seen),
                    torch.tensor([0, stop]),
                    torch.zeros(1, dtype=torch.int64),
                )
                row = {"set": path.stem, "missing": float((~mask[:stop]).mean()), "planted": share, "gap": size}
                began = time.perf_counter()
                try:
                    report = model.solve(data)
                except ModelError as problem:
                    yield {**row, "model": name, "way": way, "mse": None, "note": str(problem)}
                    continue
                seconds = time.perf_counter() - began
                filled = any(value and key.startswith("gaps_filled") for key, value in report.details.items())
                score = error(model, values, observed, first, context, horizon)
                yield {**row, "model": name, "way": way, "mse": score, "fit_seconds": seconds, "filled": filled}


def page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    lines = [
        f"# Linear models on training rows with gaps, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"Mean squared error of every test window, L = {args.context}, h = {args.horizon}, {platform.machine()}. "
        "`auto`: the default takes gap-free windows while there are enough, else filled ones. Seconds: a filled fit.",
        "",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        lines += [
            f"## {name}",
            "",
            "| missing in training | rows a gap | model | auto | filled | interpolated | gap-free windows | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        chosen = [row for row in rows if row["set"] == name]
        for key in dict.fromkeys((row["missing"], row["gap"], row["model"]) for row in chosen):
            found = {row["way"]: row for row in chosen if (row["missing"], row["gap"], row["model"]) == key}
            cells = ["-" if found[w]["mse"] is None else f"{found[w]['mse']:.4f}" for w in found]
            lines.append(
                f"| {key[0]:.1%} | {key[1]} | {key[2]} | {' | '.join(cells)} | {found['filled']['fit_seconds']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True, help="result files without ending")
    parser.add_argument("--sets", default="ETTh1,vic_electricity,nyc_weather")
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--horizon", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.sets.split(","):
        for row in measure(args.data / f"{name}.parquet", args.context, args.horizon):
            print(row, flush=True)
            rows.append(row)
    text = page(rows, args)
    plain = json.dumps(
        {"provenance": collect_provenance(data_fingerprint="", seeds={}), "rows": rows}, indent=1, default=str
    )
    for ending, content in ((".json", plain), (".md", text)):
        with atomic_file(args.out.with_name(args.out.name + ending)) as temporary:
            temporary.write_text(content)
    print(text)


if __name__ == "__main__":
    main()
