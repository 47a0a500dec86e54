"""Detection only: the batch without its forecast. ``python -m pipelines.batch_detect CONFIG --as-of T``.

It is a job of its own (``NAME-detect`` in the ledger and below ``published/``), so that both may run for one ``as_of``:
forecasts once a day, detection every hour. Its events go to the event store too. Exit status and log as in
``pipelines.batch_forecast``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime

from pipelines.batch_forecast import command_line
from tsforge.app.batch import BatchConfig, BatchResult, run_batch
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace


def run(config: BatchConfig, as_of: datetime, workspace: Workspace) -> BatchResult:
    """Run the detection of a batch and return what it came to (errors: ``tsforge.app.batch.run_batch``).

    Raises:
        ConfigError: the config has no detect stage.
    """
    if config.detect is None:
        raise ConfigError(f"job {config.name} has detect: null, so there is nothing to detect; give it a detect stage")
    return run_batch(config.model_copy(update={"name": f"{config.name}-detect", "forecast": None}), as_of, workspace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(arguments, BatchConfig, run, "Ingest, check, detect, publish.")


if __name__ == "__main__":
    sys.exit(main())
