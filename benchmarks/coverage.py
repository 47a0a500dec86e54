"""Coverage of nominal 80 % and 95 % intervals of the closed-form ``linear``, static and online, set by set.

    python benchmarks/coverage.py --out benchmarks/results/coverage_cpu2_2026-11-29
    python benchmarks/coverage.py --cutoffs 1000 --out ...   # a forecast every second row instead of every eleventh
    python benchmarks/coverage.py --sets bike_sharing,vic_electricity --out ...

Each set is fitted once on its first 80 % (the last quarter of that calibrates) and forecast from cutoffs over its last
20 %. ``static`` are fixed margins (``absolute``), ``recent`` static ones in units of recent errors
(``calibration.method=recent``); ``online`` and ``aci`` are the former adapted in time order by the two methods with
their default rates, ``recent online`` and ``recent aci`` the latter. Then the same with a drift planted into the second
half of the test part, in standard deviations of the one-step errors of each variate before it: noise that doubles the
variance of the errors, a level shift of two errors, and a growth to three errors. The drifted values are in the
contexts too, as they would be. Figures are means over all series, variates, steps and cutoffs; static and online alike
leave out the first ``START`` scores of a cell, for which the static interval stands. A variate that keeps one value in
more than half of the rows (rain) has no central interval of 80 %: its closed interval covers more; means without such
variates stand in brackets. Score: the interval score (Gneiting and Raftery 2007, JASA 102:359-378, Eq. 43) over that of
``static`` on the same rows, a geometric mean over variates and sets, the lower the better; an infinite interval has
none, so the score of a method that gives some is infinite and is also shown with its largest finite width instead
(``aci, capped``: ``online.cap``).
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from _measure import arguments, describe, heading, write

from tsforge.artifact import Artifact, create_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.backtest_forecasts import forecasts_at
from tsforge.forecasting.conformal_calibration import Choices, calibrate
from tsforge.forecasting.online_backtest import online_forecasts
from tsforge.forecasting.online_conformal import OnlineConformal
from tsforge.forecasting.online_rules import OnlineConfig
from tsforge.network import NetworkConfig, build_network

LEVELS = (0.025, 0.1, 0.5, 0.9, 0.975)
NOMINAL = ((80, "q0.1", "q0.9"), (95, "q0.025", "q0.975"))
START = 20
VARIATES = 4
# name: context, horizon
SETS: dict[str, tuple[int, int]] = {
    "ETTh1": (336, 24),
    "ETTh2": (336, 24),
    "ETTm1": (336, 24),
    "exchange_rate": (60, 12),
    "national_illness": (52, 12),
    "epf_np": (336, 24),
    "epf_pjm": (336, 24),
    "epf_de": (336, 24),
    "nyc_weather": (336, 24),
    "beijing_air": (168, 24),
    "bike_sharing": (336, 24),
    "vic_electricity": (336, 48),
}
DRIFTS = ("variance x2", "level shift", "slow growth")
METHODS = {
    "online": OnlineConfig(start=START),
    "aci": OnlineConfig(method="aci", start=START),
    "aci, capped": OnlineConfig(method="aci", start=START, cap=True),
}
RELATIVE = {
    "recent online": OnlineConfig(start=START),
    "recent aci": OnlineConfig(method="aci", start=START),
}
KINDS = ("static", "recent", *METHODS, *RELATIVE)


def read(name: str, folder: Path, quick: bool) -> SeriesFrame:
    """Return a set as one series of at most ``VARIATES`` variates, its newest 12,000 rows."""
    table = pl.read_parquet(folder / f"{name}.parquet")
    stamp = next(column for column, kind in table.schema.items() if kind.is_temporal())
    table = table.sort(stamp).unique(stamp, keep="first", maintain_order=True)
    numeric = [column for column, kind in table.schema.items() if kind.is_numeric()]
    kept = [name for name in numeric if table[name].n_unique() > 20][-VARIATES:]
    rows = table.select(pl.col(stamp).cast(pl.Datetime("us")).alias("time"), pl.col(kept).cast(pl.Float64))
    rows = rows.with_columns(pl.lit(name).alias("series_id")).tail(2000 if quick else 12_000)
    return SeriesFrame.from_long(rows, time="time", series_id="series_id", targets=kept)


def fit(frame: SeriesFrame, spans: tuple[int, int], window: WindowSpec, choices: Choices) -> Artifact:
    """Return ``linear`` fitted on rows before ``spans[0]`` and calibrated on the rows up to ``spans[1]``."""
    panel = Panel.from_frame(frame)
    series = panel.training_series(None, spans[0])
    spec = DataSpec(
        context_length=window.context_length,
        horizon=window.horizon,
        num_variates=panel.num_targets,
        train_length=spans[0],
    )
    network = build_network(validate(NetworkConfig, {"model": {"name": "linear"}}), spec)
    network.fit_scaler(series)
    network.solve(series)
    held_out = WindowDataset(panel, replace(window, min_observed=0.0), *spans)
    return create_artifact(
        network,
        config={},
        schema=frame.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance={},
        calibration=calibrate(network, held_out, LEVELS, choices=choices),
    )


def without_atoms(frame: SeriesFrame) -> list[str]:
    """Return the variates that keep no value in more than half of the rows."""
    values = frame.table
    return [
        name
        for name in frame.schema.targets
        if values[name].value_counts()["count"].to_numpy().max() <= values.height / 2
    ]


def planted(frame: SeriesFrame, kind: str, first: int, stop: int, errors: dict[str, float]) -> SeriesFrame:
    """Return the frame with a drift from row ``first`` on; ``errors``: standard deviation of one-step errors."""
    rows = frame.num_rows
    at = np.arange(rows)
    late = at >= first
    rng = np.random.default_rng(0)
    columns = []
    for name in frame.schema.targets:
        unit = errors[name]
        if kind == "variance x2":
            change = unit * rng.normal(size=rows)
        elif kind == "level shift":
            change = np.full(rows, 2.0 * unit)
        else:
            change = 3.0 * unit * (at - first) / max(1, stop - first)
        columns.append((pl.col(name) + pl.Series(np.where(late, change, 0.0))).alias(name))
    return SeriesFrame(frame.table.with_columns(columns), frame.schema)


def coverage(table: pl.DataFrame) -> dict[str, Any]:
    """Return coverage and infinite share in percent, median width and mean score by variate, by nominal coverage."""
    known = table.drop_nulls("actual")
    found: dict[str, Any] = {}
    for nominal, low, high in NOMINAL:
        inside = known["actual"].is_between(known[low], known[high])
        found[f"cover_{nominal}"] = 100.0 * float(inside.mean())  # type: ignore[arg-type]
        width = known[high] - known[low]
        found[f"width_{nominal}"] = float(width.median())  # type: ignore[arg-type]
        found[f"infinite_{nominal}"] = 100.0 * float(width.is_infinite().mean())  # type: ignore[arg-type]
        cost = 2.0 / (1.0 - nominal / 100.0)
        below, above = (pl.col(low) - pl.col("actual")).clip(0.0), (pl.col("actual") - pl.col(high)).clip(0.0)
        score = known.group_by("variate").agg(
            (pl.col(high) - pl.col(low) + cost * (below + above)).mean().alias("score")
        )
        # None where an interval is infinite
        found[f"score_{nominal}"] = {name: x if np.isfinite(x) else None for name, x in score.iter_rows()}
    return found


def measure(name: str, folder: Path, quick: bool, most: int) -> list[dict[str, Any]]:
    """Return one record for the set as it is and for each drift, from at least ``most`` cutoffs if there are."""
    context, horizon = SETS[name]
    frame = read(name, folder, quick)
    rows = frame.num_rows
    window = WindowSpec(context_length=context, horizon=horizon)
    spans = (int(0.6 * rows), int(0.8 * rows))
    began = time.perf_counter()
    artifact, relative = (fit(frame, spans, window, Choices(method=method)) for method in ("absolute", "recent"))
    whole = without_atoms(frame)
    stride = max(1, (rows - spans[1] - horizon) // (50 if quick else most))
    cutoffs = np.arange(spans[1] - 1, rows - horizon, stride)
    middle = (spans[1] + rows) // 2
    plain = forecasts_at(artifact, frame, cutoffs, steps=horizon, levels=LEVELS)
    first = plain.filter(pl.col("step") == 1, pl.col("time") < frame.grid.time_at(middle)).drop_nulls("actual")
    spread = first.group_by("variate").agg((pl.col("actual") - pl.col("mean")).std())
    errors = dict(zip(spread["variate"], spread["actual"], strict=True))
    records = []
    for kind in ("none", *DRIFTS):
        data = frame if kind == "none" else planted(frame, kind, middle, rows, errors)
        table = plain if kind == "none" else forecasts_at(artifact, data, cutoffs, steps=horizon, levels=LEVELS)
        warm = data.grid.time_at(int(cutoffs[min(START + horizon // stride + 1, len(cutoffs) - 2)]))
        judged = pl.col("cutoff") >= (warm if kind == "none" else data.grid.time_at(middle - horizon))
        if kind != "none":
            judged &= pl.col("time") >= data.grid.time_at(middle)
        record: dict[str, Any] = {
            "set": name,
            "drift": kind,
            "variates": len(frame.schema.targets),
            "cutoffs": len(cutoffs),
            "stride": stride,
            "static_all": coverage(table),
            "static": coverage(table.filter(judged)),
        }
        relative_table = forecasts_at(relative, data, cutoffs, steps=horizon, levels=LEVELS)
        for label, config in RELATIVE.items():
            adapted, _ = online_forecasts(relative_table, OnlineConformal(config))
            record[label] = coverage(adapted.filter(judged))
        scaled = relative_table.filter(judged)
        record["recent"] = coverage(scaled)
        record["recent_whole"] = coverage(scaled.filter(pl.col("variate").is_in(whole)))
        record["atoms"] = sorted(set(frame.schema.targets) - set(whole))
        for label, config in METHODS.items():
            adapted, _ = online_forecasts(table, OnlineConformal(config))
            record[label] = coverage(adapted.filter(judged))
        record["seconds"] = round(time.perf_counter() - began, 1)
        records.append(record)
        print(name, kind, {key: round(record[key]["cover_80"], 1) for key in KINDS}, flush=True)
    return records


def relative_score(rows: list[dict[str, Any]], label: str, nominal: int) -> float:
    """Return the interval score of a method over that of ``static``, geometric mean over variates, then over sets."""
    sets = []
    for row in rows:
        ours, theirs = row[label][f"score_{nominal}"], row["static"][f"score_{nominal}"]
        if None in ours.values():
            return np.inf
        sets.append(np.mean([np.log(ours[name] / theirs[name]) for name in ours]))
    return float(np.exp(np.mean(sets)))


def page(result: dict[str, Any]) -> str:
    """Return the tables as a page."""
    lines = heading("Coverage of conformal intervals, static and online", result["about"])
    lines += ["", *(__doc__ or "").strip().splitlines()[6:], ""]
    for kind in ("none", *DRIFTS):
        lines += ["", f"## {'As the data is' if kind == 'none' else 'Planted: ' + kind}", ""]
        title = [
            "set",
            "cutoffs",
            *(f"{label} {n} %" for label in KINDS if "capped" not in label for n, _, _ in NOMINAL),
        ]
        title += [f"infinite 95 %, {label}" for label in ("aci", "recent aci")]
        lines += ["| " + " | ".join(title) + " |", "|---" * len(title) + "|"]
        rows = [record for record in result["records"] if record["drift"] == kind]
        for record in rows:
            cells = [record["set"], str(record["cutoffs"])]
            for label in KINDS:
                if "capped" in label:
                    continue
                found = [f"{record[label][f'cover_{n}']:.1f}" for n, _, _ in NOMINAL]
                if label == "recent" and record["atoms"]:
                    found = [
                        f"{text} ({record['recent_whole'][f'cover_{n}']:.1f})"
                        for text, (n, _, _) in zip(found, NOMINAL, strict=True)
                    ]
                cells += found
            cells += [f"{record[label]['infinite_95']:.1f}" for label in ("aci", "recent aci")]
            lines.append("| " + " | ".join(cells) + " |")
        title = ["points off, within 1, within 2", *(f"{n} %" for n, _, _ in NOMINAL)]
        title += [f"infinite {n} %" for n, _, _ in NOMINAL] + [f"score {n} %" for n, _, _ in NOMINAL]
        lines += ["", "| " + " | ".join(title) + " |", "|---" * len(title) + "|"]
        for label in KINDS:
            cells = [label]
            for nominal, _, _ in NOMINAL:
                off = [abs(row[label][f"cover_{nominal}"] - nominal) for row in rows]
                near = [sum(x <= limit for x in off) for limit in (1, 2)]
                cells.append(f"{np.median(off):.2f}, {near[0]}, {near[1]} of {len(off)}; worst {max(off):.1f}")
            cells += [f"{np.mean([row[label][f'infinite_{n}'] for row in rows]):.1f}" for n, _, _ in NOMINAL]
            cells += [f"{relative_score(rows, label, n):.3f}" for n, _, _ in NOMINAL]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    given = arguments(__doc__, numbers={"cutoffs": 200}, parts={"sets": SETS})
    before = os.getloadavg()[0]
    folder = Path(os.environ.get("TSFORGE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "forecast"
    if not folder.is_dir():
        raise SystemExit("real data sets not found: set TSFORGE_DATA to the folder that holds forecast/")
    records: list[dict[str, Any]] = []
    for name in given.sets:  # written after every set: a run of hours that is stopped leaves what it has
        records += measure(name, folder, given.quick, given.cutoffs)
        result = {"about": describe(given, before), "records": records}
        write(given.out, result, page(result))


if __name__ == "__main__":
    sys.exit(main())
