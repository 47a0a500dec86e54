"""A progress bar over trials, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tsforge.tuning.config import TuneConfig


@contextmanager
def trial_progress(config: TuneConfig, is_shown: bool) -> Iterator[Callable[[int, float | None], None]]:
    """Yield ``show(finished, best_value)``; it does nothing unless ``is_shown``."""
    if not is_shown:
        yield lambda finished, best: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"tune {config.name}", total=config.num_trials, best="")

        def show(finished: int, best: float | None) -> None:
            bar.update(task, completed=finished, best="" if best is None else f"best {config.metric} {best:.5g}")

        yield show
