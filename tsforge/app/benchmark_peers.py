"""Other libraries in the same benchmark: their own environment makes the forecasts, the errors are taken here.

A peer gets a folder with the training and validation rows and the look-back of every test window, never a window's
horizon (``peers/runner.py`` says how it looks), and writes back one forecast a window. It runs as a child process that
ends with us, whatever ends us.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tsforge.app.benchmark_data import BenchmarkData
from tsforge.core.errors import BackendError, ConfigError, DataError, ModelError
from tsforge.data.windows import WindowDataset

if TYPE_CHECKING:
    from tsforge.app.benchmark_config import PeersConfig

RUNNER = Path(__file__).parent / "peers" / "runner.py"
_REFUSED = 3
_GRACE_SECONDS = 300.0  # a fit that does not look at its budget is ended this long after it
_WINDOWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class PeerHost:
    """The environment of the peers.

    Attributes:
        python: its interpreter.
        versions: packages there.
        budget_seconds: wall seconds of one setting.
        threads: threads of a peer.
    """

    python: str
    versions: Mapping[str, str]
    budget_seconds: float | None
    threads: int

    def code(self, library: str) -> str:
        """Return a hash of what decides a peer's forecasts: the runner, the library and what it computes with.

        The budget is no part of it: it decides whether there is a forecast, and a failure is not cached.
        """
        parts = {name: self.versions.get(name, "") for name in (library, "torch", "scikit-learn", "numpy")}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(RUNNER.read_bytes() + Path(__file__).read_bytes() + text.encode()).hexdigest()[:16]


class PeerSetting(Protocol):
    """What a peer needs to know of a setting."""

    @property
    def name(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def seed(self) -> int: ...


def open_peers(config: PeersConfig, threads: int) -> PeerHost:
    """Return the environment of the peers after asking it for its versions.

    Raises:
        ConfigError: no interpreter is named, or it does not run.
    """
    if config.python is None:
        raise ConfigError(
            "models: a name with '/' is a peer; name the Python of its environment: --peers PYTHON "
            "(docs/benchmark.md says how to make one)"
        )
    versions = json.loads(_versions(config.python))
    return PeerHost(python=config.python, versions=versions, budget_seconds=config.budget_seconds, threads=threads)


@cache
def _versions(python: str) -> str:
    try:
        found = subprocess.run(
            [python, str(RUNNER), "versions"], capture_output=True, text=True, timeout=120, check=True
        )
    except OSError as error:
        raise ConfigError(f"--peers {python}: {error.strerror or error}; give a Python interpreter") from error
    except subprocess.SubprocessError as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise ConfigError(
            f"--peers {python} cannot run the peers: {detail}; docs/benchmark.md says how to make their environment"
        ) from error
    return found.stdout.strip().splitlines()[-1]


def peer_forecasts(
    data: BenchmarkData, setting: PeerSetting, windows: WindowDataset, host: PeerHost
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return a peer's forecast of every window [N, H, V] and the facts of its run.

    Raises:
        ModelError: the peer refused (its message), or returned something else than one finite forecast a window.
        BackendError: it failed or ran out of time; the message holds the end of its output.
    """
    library, _, model = setting.name.partition("/")
    with tempfile.TemporaryDirectory(prefix="tsforge-peer-") as place:
        folder = Path(place)
        _write(folder, data, setting, windows, host, library, model)
        _run(folder, host, setting.name)
        forecast = np.load(folder / "forecast.npy", allow_pickle=False)
        facts = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    expected = (len(windows), setting.horizon, data.panel.num_targets)
    if forecast.shape != expected:
        raise ModelError(f"{setting.name} returned forecasts of shape {forecast.shape}, expected {expected}")
    bad = int((~np.isfinite(forecast)).any(axis=(1, 2)).sum())
    if bad:
        raise ModelError(f"{setting.name} returned forecasts that are not finite for {bad} of {len(forecast)} windows")
    about = {name: facts["versions"][name] for name in (library, "torch", "python") if name in facts["versions"]}
    found = {
        "fit_seconds": float(facts["fit_seconds"]),
        "eval_seconds": float(facts["eval_seconds"]),
        "peak_memory_mb": facts.get("peak_memory_mb"),
        "closed_form": library in ("statsforecast", "plain"),
        "device": "cpu",
        "versions": ", ".join(f"{name} {version}" for name, version in about.items()),
    }
    return forecast, found


def _write(
    folder: Path,
    data: BenchmarkData,
    setting: PeerSetting,
    windows: WindowDataset,
    host: PeerHost,
    library: str,
    model: str,
) -> None:
    """Write what the peer may see: rows before the test, and the look-back of every window."""
    panel, splits = data.panel, data.splits
    values = np.where(panel.observed, panel.values, np.nan).astype(np.float32)
    np.save(folder / "train.npy", values[splits.train[0] : splits.valid[1]])
    shape = (len(windows), setting.context_length, panel.num_targets)
    contexts = np.lib.format.open_memmap(folder / "context.npy", mode="w+", dtype=np.float32, shape=shape)
    first = 0
    for batch in windows.batches(_WINDOWS_AT_ONCE):
        seen = batch.context_mask.numpy()
        rows = np.where(seen, batch.context.numpy(), np.nan)
        contexts[first : first + len(rows)] = rows
        first += len(rows)
    if first != len(windows):
        raise DataError(f"{first} of {len(windows)} windows were written for the peer")
    contexts.flush()
    spec = {
        "library": library,
        "model": model,
        "settings": dict(setting.options),
        "context_length": setting.context_length,
        "horizon": setting.horizon,
        "seed": setting.seed,
        "season": data.season,
        "train_rows": splits.train[1] - splits.train[0],
        "valid_rows": splits.valid[1] - splits.valid[0],
        "budget_seconds": host.budget_seconds,
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")


def _run(folder: Path, host: PeerHost, name: str) -> None:
    """Run the peer to its end; it leads its own process group and reads our end from a pipe."""
    log = folder / "output.txt"
    threads = {key: str(host.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"NIXTLA_ID_AS_COL": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""}
    limit = None if host.budget_seconds is None else host.budget_seconds + _GRACE_SECONDS
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [host.python, str(RUNNER), "run", str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **threads, **quiet},
                start_new_session=True,
            )
    except OSError as error:
        raise BackendError(f"cannot start {host.python}: {error.strerror or error}") from error
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{name} was ended {_GRACE_SECONDS:.0f} s after its budget of {host.budget_seconds:.0f} s"
        ) from error
    finally:
        _end(process)
    if code == 0:
        return
    tail = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == _REFUSED:
        raise ModelError(tail[-1] if tail else f"{name} refused without a message")
    raise BackendError(f"{name} ended with exit code {code}: {' | '.join(tail[-3:]) or 'no output'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group if it still lives and close the pipe."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
