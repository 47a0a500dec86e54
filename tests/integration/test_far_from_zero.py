"""Targets far from 0: refused where float32 loses their changes, harmless for the others where constant."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.predict import predict

ROWS = np.arange(400)
MODELS = ({"name": "linear"}, {"name": "linear", "remove": "none"}, {"name": "var"})


def forecast(model: dict[str, Any], level: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the forecast of a daily wave ``b`` and of the column beside it."""
    wave = np.sin(2 * np.pi * ROWS / 24) + 0.1 * np.random.default_rng(0).normal(size=len(ROWS))
    times = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=int(row)) for row in ROWS]
    frame = SeriesFrame.from_wide(pl.DataFrame({"ds": times, "b": wave, "level": level}), time="ds")
    plain = {
        "data": {"name": "made", "source": {"kind": "csv", "path": "made.csv"}, "targets": ["b", "level"]},
        "model": model,
        "window": {"context_length": 24, "horizon": 6},
        "tracking": {"enabled": False},
    }
    table = predict(fit_frame(frame, validate(FitConfig, plain))[0], frame, quantile_levels=()).table
    return {name: table.filter(variate=name).sort("step")["mean"].to_numpy() for name in ("b", "level")}


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_counter_far_from_0_is_refused(model: dict[str, Any]) -> None:
    for level in (1e15 + 0.5 * ROWS, 2.0**60 + 1000.0 * ROWS, 1.8e18 + 40.0 * ROWS):
        with pytest.raises(DataError, match=r"column\(s\) level lie so far from 0"):
            forecast(model, level)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_a_huge_constant_changes_no_other_forecast_more_than_a_small_one(model: dict[str, Any]) -> None:
    small = forecast(model, np.full(len(ROWS), 0.5))
    to_and_fro = 1.8e18 + 256.0 * (ROWS % 2)  # one float64 number
    for level in (np.full(len(ROWS), 1.8e18), to_and_fro, np.where(ROWS % 3, 1e15, 1e15 + 0.25)):
        found = forecast(model, level)
        np.testing.assert_allclose(found["b"], small["b"], atol=0.02)
        np.testing.assert_allclose(found["level"], level[-1], rtol=1e-6)
