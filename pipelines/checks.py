"""Checks of stored data, without reading a source: ``python -m pipelines.checks data=NAME``, for a scheduler.

The checks are those of the ingest config. Exit status: 0 all passed (warnings allowed), 3 a blocking one failed or the
data is not there, 6 the database failed. The results are one JSON document on standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from tsforge.app.checks import CheckResult
from tsforge.app.ingest import IngestConfig, check_stored
from tsforge.app.stored_choices import StoredData
from tsforge.console import print_error, print_json
from tsforge.core.config import load
from tsforge.core.errors import DataError, TsforgeError
from tsforge.core.logs import configure_logging
from tsforge.core.signals import termination_as_interrupt
from tsforge.core.workspace import Workspace


def run(config: IngestConfig, workspace: Workspace) -> tuple[CheckResult, ...]:
    """Check what the store holds of a dataset (errors: ``tsforge.app.ingest.check_stored``)."""
    return check_stored(config, workspace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Check stored data.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the config")
    parser.add_argument("--config", default="ingest", help="name below configs/ or a YAML file")
    given = parser.parse_args(arguments)
    configure_logging(as_json=True)
    try:
        with termination_as_interrupt():
            results = run(load(IngestConfig, given.config, given.overrides, stored=StoredData()), Workspace.open())
    except TsforgeError as error:
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted; nothing was changed")
        return 130
    failed = [result for result in results if not result.passed and result.severity == "block"]
    print_json({"passed": not failed, "checks": [asdict(result) for result in results]})
    return DataError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
