"""Fit a challenger, compare it with the champion, promote it if better.

``python -m pipelines.retrain CONFIG --as-of T``

Exit status and log as in ``pipelines.batch_forecast``; 0 also when the champion stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime

from pipelines.batch_forecast import command_line
from tsforge.app.retrain import RetrainConfig, RetrainResult, retrain
from tsforge.core.workspace import Workspace


def run(config: RetrainConfig, as_of: datetime, workspace: Workspace) -> RetrainResult:
    """Retrain once and return what came of it (errors: ``tsforge.app.retrain.retrain``)."""
    return retrain(config, as_of, workspace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return command_line(arguments, RetrainConfig, run, "Fit a challenger, compare, promote if better.")


if __name__ == "__main__":
    sys.exit(main())
