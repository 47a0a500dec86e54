"""``import tsforge`` and ``tsforge --help`` stay light: no heavy library, and fast."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = ("torch", "lightning", "mlflow", "optuna", "streamlit", "pandas", "polars", "plotly", "sqlalchemy", "hydra")
SECONDS = 0.5


def loaded_after(code: str) -> list[str]:
    script = f"import sys\n{code}\nprint('loaded:' + ','.join(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return [name for name in result.stdout.rsplit("loaded:", 1)[1].strip().split(",") if name]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import tsforge") == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io\nfrom tsforge.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    sys.argv = ['tsforge', '--help']\n    main()\n"
    )
    assert loaded_after(code) == []


def test_help_is_fast() -> None:
    # the best of several runs: the machine may be busy with other tests, the program's own work is the minimum
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "tsforge", "--help"], capture_output=True, text=True, check=True, timeout=60
        )
        times.append(time.perf_counter() - start)
        if times[-1] < SECONDS:
            break
    assert "forecast" in result.stdout
    assert min(times) < SECONDS * 2, f"tsforge --help took {min(times):.2f} s at best"


def test_public_names_resolve() -> None:
    code = "import tsforge\nassert all(getattr(tsforge, name) is not None for name in tsforge.__all__)"
    assert "torch" in loaded_after(code)
