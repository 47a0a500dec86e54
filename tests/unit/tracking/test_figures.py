from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from tsforge.contracts.tables import Forecast
from tsforge.core.errors import DataError
from tsforge.core.workspace import Workspace
from tsforge.tracking.client import open_client
from tsforge.tracking.figures import forecast_figure, learning_curves
from tsforge.tracking.runs import Tracker

START = datetime(2026, 3, 1, tzinfo=UTC)


def hours(first: int, last: int) -> list[datetime]:
    return [START + timedelta(hours=step) for step in range(first, last)]


def make_forecast() -> Forecast:
    rows = [
        {
            "series_id": "a",
            "cutoff": hours(9, 10)[0],
            "step": step,
            "time": hours(9 + step, 10 + step)[0],
            "variate": variate,
            "mean": float(step),
            "q0.1": float(step) - 1,
            "q0.9": None if step == 3 else float(step) + 1,
        }
        for variate in ("load", "temp")
        for step in (1, 2, 3)
    ]
    return Forecast(table=pl.DataFrame(rows), quantile_levels=(0.1, 0.9))


def make_history() -> pl.DataFrame:
    values = [float(step) for step in range(11)]
    return pl.DataFrame({"series_id": "a", "time": hours(0, 11), "load": values, "temp": [None, *values[1:]]})


def test_losses_are_drawn_over_epochs_and_other_metrics_are_left_out() -> None:
    history = {"train_loss": [(0, 2.0), (1, 1.0)], "valid_loss": [(0, 3.0), (1, 2.5)], "seconds": [(0, 9.0), (1, 9.0)]}
    axis = learning_curves(history).axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert lines == {"train_loss": [2.0, 1.0], "valid_loss": [3.0, 2.5]}
    assert axis.get_yscale() == "log"
    (only,) = learning_curves({"score": [(0, -1.0), (1, 0.0)]}).axes
    assert only.get_yscale() == "linear"


def test_a_forecast_is_drawn_with_its_past_its_band_and_what_came_true() -> None:
    figure = forecast_figure(make_history(), make_forecast(), num_past=4)
    assert [axis.get_ylabel() for axis in figure.axes] == ["load", "temp"]
    observed, mean = figure.axes[0].get_lines()
    assert list(observed.get_ydata()) == [6.0, 7.0, 8.0, 9.0, 10.0], "four of the past, one that came true"
    assert list(mean.get_ydata()) == [1.0, 2.0, 3.0]
    assert len(figure.axes[0].collections) == 1
    with pytest.raises(DataError, match="no series 'b'"):
        forecast_figure(make_history(), make_forecast(), series_id="b")


def test_a_run_keeps_its_curves_and_figures_as_pictures(tracked_workspace: Workspace) -> None:
    tracker = Tracker.open(tracked_workspace)
    with tracker.start("fit") as run:
        run.log_epoch(0, {"train_loss": 2.0})
        run.log_epoch(1, {"train_loss": 1.0})
        run.log_figure("plots/forecast.png", forecast_figure(make_history(), make_forecast()))
        with tracker.start("trial", parent=run) as part:
            part.log_epoch(0, {"train_loss": 2.0})
            part.log_epoch(1, {"train_loss": 1.0})
    client = open_client(tracker.tracking_uri)
    assert {item.path for item in client.list_artifacts(run.id, "plots")} == {
        "plots/forecast.png",
        "plots/learning_curves.png",
    }
    assert client.list_artifacts(part.id, "plots") == [], "a study of many trials draws none of them"
    with open(client.download_artifacts(run.id, "plots/learning_curves.png"), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_page_is_stored_for_an_interactive_figure(tracked_workspace: Workspace) -> None:
    class Page:
        def write_html(self, path: str, *, include_plotlyjs: bool) -> None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"<html>{include_plotlyjs}</html>")

    with Tracker.open(tracked_workspace).start("fit") as run:
        run.log_figure("plots/fan.png", Page())
    client = open_client(tracked_workspace.tracking_uri)
    assert [item.path for item in client.list_artifacts(run.id, "plots")] == ["plots/fan.html"]
