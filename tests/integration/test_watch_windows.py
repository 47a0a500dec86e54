"""A watch that judges windows: stopped between two rows of one window, and the same as batch detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from watching import Watched, assert_told, new_rows

from tsforge.core.workspace import Workspace

RECONSTRUCTION = {"kind": "reconstruction", "window": 6, "joint": "max_abs"}


@pytest.mark.parametrize(
    "score",
    [
        RECONSTRUCTION | {"overlap_reduction": "last"},
        RECONSTRUCTION | {"overlap_reduction": "median"},
        {"kind": "innovation", "joint": "max_abs"},
        {"joint": "balanced", "smoothing": {"kind": "two_sided", "weight": 0.6}},
    ],
    ids=["last", "median", "innovation", "two_sided"],
)
def test_a_watch_whose_scores_read_several_rows_goes_on_where_it_was_stopped(
    site: Any, tmp_path: Path, score: dict[str, Any]
) -> None:
    (tmp_path / "incoming").mkdir()
    plant = Watched(tmp_path, Workspace.open(site.home))
    detector = {"rule": {"kind": "quantile", "alpha": 0.002}, "score": score}
    rows = new_rows()
    for number, (start, stop) in enumerate(((0, 41), (41, 43), (43, 202), (202, rows.height))):
        plant.write(f"{number}.csv", rows[start:stop])
        plant.watch(detector=detector)  # a process of its own each time: all it knows is the stored state
    truth = plant.truth(rows, detector)
    assert truth.height > 3
    assert_told(plant.told(), truth)
