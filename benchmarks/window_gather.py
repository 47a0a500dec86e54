"""Which gather is fastest: an overlapping view, index arithmetic, or stacking slices? Windows a second, one thread.

    python benchmarks/window_gather.py [--device cuda] [--output FOLDER]

Each figure is the best of seven batches of 256 random windows from 100,000 rows.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from tsforge.data.gather import take_by_index, take_slices

ROWS, BATCH, REPEATS = 100_000, 256, 7
LENGTHS, COLUMNS = (32, 96, 336, 720), (1, 7, 27)


def stack_slices(rows: Tensor, start: Tensor, length: int) -> Tensor:
    """Return the slices one by one in Python."""
    return torch.stack([rows[first : first + length] for first in start.tolist()])


def rate(gather: Callable[[Tensor, Tensor, int], Tensor], rows: Tensor, start: Tensor, length: int) -> float:
    """Return windows a second of the best repeat."""
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        gather(rows, start, length)
        if rows.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return BATCH / best


def main() -> None:
    """Measure, check that all three agree, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.device}, one thread, batch {BATCH}, "
        f"{ROWS} rows; thousand windows a second, best of {REPEATS}",
        "",
        "| columns | length | type | overlapping view (used) | index arithmetic | stacked slices |",
        "|---|---|---|---|---|---|",
    ]
    for columns in COLUMNS:
        for length in LENGTHS:
            for kind in (torch.float32, torch.bool):
                rows = torch.randn(ROWS, columns, generator=generator).to(kind).to(options.device)
                start = torch.randint(0, ROWS - length, (BATCH,), generator=generator).to(options.device)
                gathers = (take_slices, take_by_index, stack_slices)
                first, *others = [gather(rows, start, length) for gather in gathers]
                if not all(torch.equal(first, other) for other in others):
                    raise SystemExit(f"the gathers differ at {columns} columns, length {length}")
                rates = " | ".join(f"{rate(gather, rows, start, length) / 1e3:,.0f}" for gather in gathers)
                lines.append(f"| {columns} | {length} | {str(kind).removeprefix('torch.')} | {rates} |")
    text = "\n".join(lines)
    print(text)
    if options.output:
        day = datetime.now(UTC).date().isoformat()
        name = f"window_gather_{options.device}_{day}.md"
        (options.output / name).write_text(
            f"# Window gather\n\n`benchmarks/window_gather.py`: {text}\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
