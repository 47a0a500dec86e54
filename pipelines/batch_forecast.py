"""The whole batch: ingest, check, forecast, detect, publish. ``python -m pipelines.batch_forecast CONFIG --as-of T``.

Exit status: 0 published or nothing to do, 75 another process works on it (ask again later), 130 interrupted (where it
was published already, the message says so), anything else failed and nothing was published. One JSON line a stage on
standard error, the result as one JSON document on standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from tsforge.app.batch import BatchConfig, BatchResult, parse_as_of, run_batch
from tsforge.app.stored_choices import StoredData
from tsforge.console import print_error, print_json
from tsforge.core.config import Config, load
from tsforge.core.errors import TsforgeError
from tsforge.core.logs import configure_logging
from tsforge.core.signals import termination_as_interrupt
from tsforge.core.workspace import Workspace

C = TypeVar("C", bound=Config)


def run(config: BatchConfig, as_of: datetime, workspace: Workspace) -> BatchResult:
    """Run one batch and return what it came to (errors: ``tsforge.app.batch.run_batch``)."""
    return run_batch(config, as_of, workspace)


def command_line(
    arguments: Sequence[str] | None, cls: type[C], job: Callable[[C, datetime, Workspace], Any], about: str
) -> int:
    """Parse ``CONFIG [--as-of T] [key=value ...]``, run the job, print its summary; return the exit status."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("config", help="name below configs/ or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config")
    parser.add_argument("--as-of", help="ISO time; nothing after it is used (default: now)")
    given = parser.parse_intermixed_args(arguments)
    configure_logging(as_json=True)
    try:
        with termination_as_interrupt():
            config = load(cls, given.config, given.overrides, stored=StoredData())
            result = job(config, parse_as_of(given.as_of), Workspace.open())
    except TsforgeError as error:
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; run the same command again to go on")
        return 130
    print_json(result.summary())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(arguments, BatchConfig, run, "Ingest, check, forecast, detect, publish.")


if __name__ == "__main__":
    sys.exit(main())
