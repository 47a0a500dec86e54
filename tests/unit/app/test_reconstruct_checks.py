"""What is asked of series before hours of training: enough rows, complete ones, values ahead, nothing constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app import reconstruct as use_case
from tsforge.app.reconstruct import ReconstructConfig, reconstruct
from tsforge.app.reconstruct_checks import check_judging, spectral_notes
from tsforge.app.reconstruct_data import Trajectories, read_trajectories
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace
from tsforge.dynamics.config import EvaluationConfig, TrajectoryConfig

WAVES = np.random.default_rng(0).normal(size=(300, 3))
PLAIN = EvaluationConfig()


def data(tmp_path: Path, test: np.ndarray, **settings: Any) -> Trajectories:
    for name, values in (("train", WAVES), ("test", test)):
        pl.DataFrame(values, schema=["x", "y", "z"]).write_parquet(tmp_path / f"{name}.parquet")
    plain = {"path": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet"), **settings}
    return read_trajectories(validate(TrajectoryConfig, plain))


def holed(kept: int) -> np.ndarray:
    """Return rows of which only the first ``kept`` are complete."""
    rows = WAVES.copy()
    rows[np.arange(kept, 300), np.arange(kept, 300) % 3] = np.nan
    return rows


def sparse() -> np.ndarray:
    """Return complete rows of which none has a value 10 steps later."""
    rows = np.full((300, 3), np.nan)
    for first in range(0, 300, 20):
        rows[first : first + 2] = WAVES[first : first + 2]
    return rows


@pytest.mark.parametrize(
    ("test", "evaluation", "fragment"),
    [
        (WAVES[:20], {}, r"test series has 20 rows, but PE\(20\) needs more than 20"),
        (WAVES[:50], {"prediction_steps": 60}, r"has 50 rows, but PE\(60\)"),
        (holed(1), {}, "has 1 rows without missing values; judging needs at least 20"),
        (sparse(), {}, r"no complete row followed by a value at each of the next 20, which PE\(20\)"),
        (WAVES * [1, 0, 1] + [0, 0.3, 0], {}, r"column\(s\) y are constant in the complete rows of the test series"),
        (WAVES * [1, 1e-11, 0], {}, r"column\(s\) y, z are constant"),
    ],
)
@pytest.mark.parametrize("standardise", [True, False])
def test_series_that_cannot_be_judged_are_refused(
    tmp_path: Path, test: np.ndarray, evaluation: dict[str, Any], fragment: str, standardise: bool
) -> None:
    found = data(tmp_path, test, standardise=standardise)
    with pytest.raises(DataError, match=fragment):
        check_judging(found, validate(EvaluationConfig, evaluation))


def test_what_can_be_judged_passes(tmp_path: Path) -> None:
    check_judging(data(tmp_path, WAVES[:21]), PLAIN)
    check_judging(data(tmp_path, holed(25)), PLAIN)


def test_rows_that_validate_are_asked_too(tmp_path: Path) -> None:
    rows = WAVES.copy()
    rows[240:, 2] = 4.0
    pl.DataFrame(rows, schema=["x", "y", "z"]).write_parquet(tmp_path / "flat.parquet")
    plain = {"path": str(tmp_path / "flat.parquet"), "test": str(tmp_path / "test.parquet"), "valid": 0.2}
    data(tmp_path, WAVES)
    with pytest.raises(DataError, match=r"column\(s\) z are constant in the complete rows of the rows that validate"):
        check_judging(read_trajectories(validate(TrajectoryConfig, plain)), PLAIN)


def test_a_spectral_distance_of_few_rows_is_said_to_say_little(tmp_path: Path) -> None:
    found = data(tmp_path, WAVES)
    assert spectral_notes(found, 20.0) == [
        "D_H of fewer than 400 rows with evaluation.sigma=20 says little, since smoothing leaves no peaks (train: 300)"
    ]
    assert spectral_notes(found, 15.0) == []


def test_nothing_is_trained_that_cannot_be_judged(
    tmp_path: Path, workspace_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(tmp_path, WAVES[:20])
    monkeypatch.setattr(use_case, "train_seeds", lambda *args, **options: pytest.fail("trained"))
    plain = {
        "data": {"path": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet")},
        "tracking": {"enabled": False},
    }
    with pytest.raises(DataError, match=r"PE\(20\)"):
        reconstruct(validate(ReconstructConfig, plain), Workspace.open(workspace_root))
