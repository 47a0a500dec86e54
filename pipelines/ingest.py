"""One ingestion: read, check, store. ``python -m pipelines.ingest data=csv`` (``--config NAME`` for another config).

Exit status: 0 stored (or nothing new), 3 the data was refused, 6 the database or disk failed; then nothing was stored.
One JSON line an event on standard error, the result as one JSON document on standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tsforge.app.ingest import IngestConfig, IngestResult, ingest
from tsforge.app.stored_choices import StoredData
from tsforge.console import print_error, print_json
from tsforge.core.config import load
from tsforge.core.errors import TsforgeError
from tsforge.core.logs import configure_logging
from tsforge.core.signals import termination_as_interrupt
from tsforge.core.workspace import Workspace


def run(config: IngestConfig, workspace: Workspace) -> IngestResult:
    """Ingest one batch and return what it did (errors: ``tsforge.app.ingest.ingest``)."""
    return ingest(config, workspace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Read a source, check it, store it.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config")
    parser.add_argument("--config", default="ingest", help="name below configs/ or a YAML file")
    given = parser.parse_args(arguments)
    configure_logging(as_json=True)
    try:
        with termination_as_interrupt():
            result = run(load(IngestConfig, given.config, given.overrides, stored=StoredData()), Workspace.open())
    except TsforgeError as error:
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; the batch was stored whole or not at all, run the same command again")
        return 130
    print_json({**result.summary(), "findings": result.rows()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
