"""Volume under the surface: seconds of ours and of the published implementations, and that they agree.

Usage: python benchmarks/vus_speed.py --peers PYTHON [--out benchmarks/results/vus_speed_HARDWARE_DATE] [--quick]

PYTHON is the interpreter of an environment with tsb-ad 1.5 and vus 0.0.6 (installed ``--no-deps``), scikit-learn,
pandas and tqdm. It stays up for the whole run and is asked in turns with ours, so that a busy spell of the machine hits
both. The published code knows only its 250 thresholds: that is also what our exact thresholds are measured against.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import arguments, describe, heading, tell, write

from tsforge.metrics.vus import Thresholds, Variant, vus

# rows, events, rows an event: the label geometry of SMD machine-1-1; 1 % in ten events; that of PSM
SHAPES = {
    "28,479 rows, 8 events, 9.5 %": (28_479, 8, 337),
    "100,000 rows, 10 events, 1 %": (100_000, 10, 100),
    "100,000 rows, 72 events, 27.8 %": (100_000, 72, 386),
}
WIDTH = 100
PEERS = ("TSB_AD opt", "TSB_AD opt_mem", "vus opt")
OURS: dict[str, tuple[Variant, Thresholds]] = {
    "tsb, reference": ("tsb", "reference"),
    "tsb, exact": ("tsb", "exact"),
    "2022, reference": ("2022", "reference"),
    "2022, exact": ("2022", "exact"),
}
WORKER = """
import sys, time, json
import numpy as np
from TSB_AD.evaluation.basic_metrics import basic_metricor
from vus.utils.metrics import metricor
calls = {
    "TSB_AD opt": lambda *a: basic_metricor().RangeAUC_volume_opt(*a),
    "TSB_AD opt_mem": lambda *a: basic_metricor().RangeAUC_volume_opt_mem(*a),
    "vus opt": lambda *a: metricor().RangeAUC_volume_opt(*a),
}
for line in sys.stdin:
    name, path, width = json.loads(line)
    labels, scores = np.load(path)
    labels = labels.astype(int)
    start = time.perf_counter()
    *_, roc, pr = calls[name](labels, scores, width)
    print(json.dumps([time.perf_counter() - start, float(roc), float(pr)]), flush=True)
"""


class Peers:
    """The other interpreter, asked for one call at a time."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, name: str, path: Path, width: int) -> tuple[float, float, float]:
        """Return seconds, VUS-ROC and VUS-PR of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, str(path), width]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the other interpreter ended at {name}; does its environment have tsb-ad and vus?")
        seconds, roc, pr = json.loads(answer)
        return seconds, roc, pr

    def close(self) -> None:
        """End the other interpreter."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def draw(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels with events at even distances, and scores that lean towards them."""
    n, events, length = shape
    labels = np.zeros(n, dtype=np.int64)
    for start in np.linspace(n // 50, n - n // 50 - length, events).astype(int):
        labels[start : start + length] = 1
    return labels, np.random.default_rng(0).uniform(size=n) + 0.3 * labels


def measure(shape: tuple[int, int, int], peers: Peers, rounds: int, width: int) -> dict[str, Any]:
    """Return median seconds of every method, its ratio to the slowest and fastest peer, and the largest difference."""
    labels, scores = draw(shape)
    seconds: dict[str, list[float]] = {name: [] for name in (*PEERS, *OURS)}
    values: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.npy"
        np.save(path, np.stack([labels.astype(np.float64), scores]))
        for _ in range(rounds):
            for name in PEERS:
                spent, roc, pr = peers.run(name, path, width)
                seconds[name].append(spent)
                values[name] = (roc, pr)
                for ours, (variant, thresholds) in OURS.items():  # between any two calls of the peers
                    start = time.perf_counter()
                    found = vus(labels, scores, width=width, variant=variant, thresholds=thresholds)
                    seconds[ours].append(time.perf_counter() - start)
                    values[ours] = (found.roc, found.pr)
    middle = {name: statistics.median(spent) for name, spent in seconds.items()}
    fastest = min(middle[name] for name in PEERS)
    rows = {}
    for name in seconds:
        least = min(min(seconds[peer]) for peer in PEERS) / max(seconds[name])
        rows[name] = {
            "seconds": middle[name],
            "samples": seconds[name],
            "times_faster": fastest / middle[name],
            "times_faster_at_worst": least,
            "roc": values[name][0],
            "pr": values[name][1],
        }
    gap = max(abs(a - b) for peer in PEERS for a, b in zip(values["tsb, reference"], values[peer], strict=True))
    return {"methods": rows, "largest_difference": gap}


def page(results: dict[str, Any], about: dict[str, Any]) -> str:
    """Return the result page."""
    lines = heading("Volume under the surface: speed", about)
    lines += [
        "",
        f"W = {results['width']}, median of {results['rounds']} calls of each peer and {3 * results['rounds']} of each "
        "of ours, in turns. Times faster: than the fastest peer; in brackets the fastest single call of any peer over "
        "our slowest. The peers have 250 thresholds; ours exact has every distinct score.",
    ]
    for name, row in results["shapes"].items():
        lines += ["", f"## {name}", "", "| method | ms | times faster | VUS-ROC | VUS-PR |", "|---|---|---|---|---|"]
        for method, stat in row["methods"].items():
            ratio = f"{stat['times_faster']:.0f} ({stat['times_faster_at_worst']:.0f})" if method in OURS else "peer"
            lines.append(
                f"| {method} | {1e3 * stat['seconds']:,.1f} | {ratio} | {stat['roc']:.6f} | {stat['pr']:.6f} |"
            )
        lines += ["", f"Largest difference of `tsb, reference` to a peer: {row['largest_difference']:.1e}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--peers", required=True)
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    given = arguments(__doc__)
    before = os.getloadavg()[0]
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    shapes = {"600 rows": (600, 3, 10)} if given.quick else SHAPES
    results: dict[str, Any] = {"width": 10 if given.quick else WIDTH, "rounds": 1 if given.quick else 3, "shapes": {}}
    peers = Peers(mine.peers)
    for name, shape in shapes.items():
        results["shapes"][name] = measure(shape, peers, results["rounds"], results["width"])
        tell({"shape": name} | results["shapes"][name]["methods"])
    peers.close()
    about = describe(given, before)
    write(given.out, {"about": about} | results, page(results, about))


if __name__ == "__main__":
    main()
