"""Exit 0 when a service of docker-compose.yml is well, 1 with a reason when not. Standard library only: it runs often.

Usage: healthcheck.py http URL        a GET answers 2xx
       healthcheck.py scheduler       the scheduler of this container gave a sign of life in time (TSFORGE_HOME)
"""

import json
import os
import socket
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path


def check_http(url: str) -> str | None:
    """Return what is wrong with the server, or None."""
    if not url.startswith("http://"):
        return f"{url} is not an http:// address"
    try:
        with urllib.request.urlopen(url, timeout=5):
            return None
    except OSError as error:  # includes HTTP errors and refused connections
        return f"{url}: {error}"


def check_scheduler(home: str) -> str | None:
    """Return what is wrong with the scheduler, or None."""
    path = Path(home) / "run" / f"scheduler-{socket.gethostname()}.json"
    try:
        good_until = datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["good_until"])
    except (OSError, ValueError, KeyError) as error:
        return f"no sign of life in {path}: {error}"
    late = (datetime.now(UTC) - good_until).total_seconds()
    return f"last sign of life expired {late:.0f} s ago" if late > 0 else None


def main(arguments: list[str]) -> int:
    """Run the check named on the command line."""
    if len(arguments) == 2 and arguments[0] == "http":
        problem = check_http(arguments[1])
    elif arguments == ["scheduler"]:
        problem = check_scheduler(os.environ.get("TSFORGE_HOME", ".tsforge"))
    else:
        problem = "usage: healthcheck.py http URL | scheduler"
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
