"""Sample paths on the forecast page and calibration on the backtest page, headless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest


@pytest.fixture
def filled(filled_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The filled workspace, set as TSFORGE_HOME."""
    monkeypatch.setenv("TSFORGE_HOME", str(filled_workspace))
    for name in ("TSFORGE_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return filled_workspace


def draw(view: str, **query: str) -> Any:
    """Run one view as its page would and return what is on it."""
    test = AppTest.from_string(f"from dashboards.views import {view}\n{view}.show()\n", default_timeout=240)
    for name, value in query.items():
        test.query_params[name] = value
    return test.run()


def test_sample_paths_are_drawn_when_asked_for(filled: Path) -> None:
    model = next(path.name for path in (filled / "artifacts").iterdir() if path.name.startswith("ar_net"))
    page = draw("forecasts", artifact=model, back="48")
    assert not page.exception
    assert not any("possible futures" in caption.value for caption in page.caption)
    page = page.toggle[0].set_value(True).run()
    assert not page.exception
    told = next(caption.value for caption in page.caption if "possible futures" in caption.value)
    assert "Mean of the 24 steps" in told
    assert page.query_params["paths"] == "1"


def test_a_backtest_shows_how_well_it_was_calibrated(filled: Path) -> None:
    page = draw("backtests")
    assert not page.exception
    assert "Calibration" in [header.value for header in page.subheader]
    chosen = next(found for found in page.selectbox if found.label == "Forecasts of")
    assert "seasonal_naive" in chosen.options
    assert any("Energy score of its sample paths" in caption.value for caption in page.caption)
    page = chosen.set_value("seasonal_naive").run()
    assert not page.exception
    assert not any("Energy score" in caption.value for caption in page.caption)
