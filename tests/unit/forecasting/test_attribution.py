"""Contributions of inputs to a forecast: against finite differences, a closed form, and by what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from explained_data import changed, hours, with_covariates

from tsforge.artifact import Artifact
from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, Prediction
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.attribution import COLUMNS, Attribution, AttributionConfig, attribute
from tsforge.forecasting.attribution_path import SHRUNK
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.predict import predict
from tsforge.models.registry import MODELS
from tsforge.network import NetworkConfig

Make = Callable[..., Artifact]


def config(**settings: Any) -> AttributionConfig:
    return validate(AttributionConfig, settings)


def total(found: Attribution, method: str) -> np.ndarray[Any, Any]:
    """Sum of all contributions of a method by step."""
    rows = found.table.filter(method=method)
    return rows.group_by("step").agg(pl.col("contribution").sum()).sort("step")["contribution"].to_numpy()


def forecast(artifact: Artifact, frame: SeriesFrame, series: str, variate: str, cutoff: Any) -> np.ndarray[Any, Any]:
    table = predict(artifact, frame, cutoff=cutoff, quantile_levels=()).table
    return table.filter(series_id=series, variate=variate).sort("step")["mean"].to_numpy()


@pytest.mark.parametrize("scaling", ["global", "none", "series"])
def test_linear_contributions_are_finite_differences(frame: SeriesFrame, make_artifact: Make, scaling: str) -> None:
    artifact = make_artifact("linear", scaling=scaling)
    found = attribute(artifact, frame, series="b", variate="z", cutoff=hours(299))
    assert found.metadata["method"] == "exact"
    assert tuple(found.table.columns) == COLUMNS
    before = forecast(artifact, frame, "b", "z", hours(299))
    np.testing.assert_allclose(total(found, "exact"), before, rtol=1e-4, atol=1e-3)
    cells = found.table.filter(method="exact", kind="target", source="z")
    level = frame.table.filter(series_id="b")["z"][299 - 30 - 47 : 299 - 30 + 1].mean()
    for lag in (1, 7, 24, 48):
        cell = cells.filter(lag=lag).sort("step")
        value = cell["value"][0]
        assert cell["source_time"][0] == pl.Series([hours(300 - lag)]).dt.replace_time_zone("UTC")[0]
        after = forecast(artifact, changed(frame, "b", "z", 300 - lag, 300 - lag, value + 100.0), "b", "z", hours(299))
        slope = (after - before) / 100.0
        expected = slope * (value - level) * (1.0 - SHRUNK)
        np.testing.assert_allclose(cell["contribution"].to_numpy(), expected, rtol=2e-2, atol=2e-3)


def test_window_normalisation_around_a_linear_map_is_exact(frame: SeriesFrame, make_artifact: Make) -> None:
    """Homogeneous of degree 1 about the mean of the window: one slope tells all, though the map itself bends."""
    network = {"model": {"name": "dlinear", "kernel": 5}, "scaling": {"kind": "window"}}
    from tsforge.app.fit import FitConfig, fit_frame

    settings = {
        "data": {"name": "x", "source": {"kind": "parquet", "path": "x"}},
        "window": {"context_length": 24, "horizon": 4},
        "train": {"max_epochs": 1, "accelerator": "cpu"},
        "tracking": {"enabled": False},
    }
    artifact, _ = fit_frame(frame, validate(FitConfig, {**settings, **network}))
    found = attribute(artifact, frame, series="a", cutoff=hours(320), steps=[1, 4])
    assert found.metadata["method"] == "exact"
    expected = forecast(artifact, frame, "a", "y", hours(320))[[0, 3]]
    np.testing.assert_allclose(total(found, "exact"), expected, rtol=1e-4, atol=1e-3)
    parts = found.table.filter(method="components")
    assert parts.height, "dlinear has parts"
    np.testing.assert_allclose(total(found, "components"), expected, rtol=1e-4, atol=1e-3)


class _ProductConfig(ModelConfig):
    name: Literal["product_of_two"] = "product_of_two"


class _Product(ForecastModel[_ProductConfig]):
    """Forecasts the product of the last two rows: its integrated gradients are known."""

    config_class = _ProductConfig
    capabilities = Capabilities(trainable=False, probabilistic=False, scaling=("none",))
    source = "Definition"

    def forward(self, batch: Batch) -> Prediction:
        raw = (batch.context[:, -1:] * batch.context[:, -2:-1]).expand(-1, self.spec.horizon, -1)
        return Prediction(raw.unsqueeze(-1))


@pytest.fixture
def product(frame: SeriesFrame) -> Any:
    with MODELS.borrowed("product_of_two", _Product):
        plain = {"model": {"name": "product_of_two"}, "likelihood": {"name": "point"}, "scaling": {"kind": "none"}}
        window = WindowSpec(context_length=8, horizon=2)
        yield fit_solved(frame.until(hours(249)), validate(NetworkConfig, plain), window)


def test_integrated_gradients_of_a_product(frame: SeriesFrame, product: Artifact) -> None:
    found = attribute(product, frame, series="a", cutoff=hours(300))
    assert found.metadata["method"] == "integrated_gradients"
    window = frame.table.filter(series_id="a")["y"].to_numpy()[293:301]
    level = window.mean()
    start = level + SHRUNK * (window - level)
    d = window - start
    expected = {1: d[-1] * (start[-2] + d[-2] / 2), 2: d[-2] * (start[-1] + d[-1] / 2)}  # of x y along a line
    cells = found.table.filter(kind="target", step=1, source="y")
    for lag, value in expected.items():
        assert cells.filter(lag=lag)["contribution"][0] == pytest.approx(value, rel=1e-3)
    assert cells.filter(pl.col("lag") > 2)["contribution"].abs().max() == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(total(found, "integrated_gradients"), window[-1] * window[-2], rtol=1e-5)


class _Squares(_Product):
    """Forecasts the difference of two squares: at equal sizes one slope adds up although it tells nothing."""

    def forward(self, batch: Batch) -> Prediction:
        raw = batch.context[:, -1:].square() - batch.context[:, -2:-1].square()
        return Prediction(raw.expand(-1, self.spec.horizon, -1).unsqueeze(-1))


def test_slopes_that_happen_to_add_up_are_not_taken_for_exact() -> None:
    values = np.tile([1.0, -1.0], 40)
    table = pl.DataFrame({"series_id": "a", "time": [hours(h) for h in range(80)], "y": values})
    data = SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"])
    plain = {"model": {"name": "product_of_two"}, "likelihood": {"name": "point"}, "scaling": {"kind": "none"}}
    with MODELS.borrowed("product_of_two", _Squares):
        artifact = fit_solved(data, validate(NetworkConfig, plain), WindowSpec(context_length=8, horizon=1))
    found = attribute(artifact, data)
    assert found.metadata["method"] == "integrated_gradients"
    cells = found.table.filter(kind="target").sort("lag")["contribution"].to_list()
    assert cells[:2] == pytest.approx([1.0 - SHRUNK**2, -1.0 + SHRUNK**2], rel=1e-4)


def test_occlusion_is_the_change_of_the_forecast(frame: SeriesFrame, product: Artifact) -> None:
    found = attribute(product, frame, config(method="occlusion", block=3), series="a", cutoff=hours(300), steps=[1])
    window = frame.table.filter(series_id="a")["y"].to_numpy()[293:301]
    level = window.mean()
    start = level + SHRUNK * (window - level)
    cells = found.table.filter(kind="target", source="y").sort("lag")
    assert cells["lag"].to_list() == [1, 4, 7]
    assert cells["rows"].to_list() == [3, 3, 2]
    assert cells["value"].null_count() == 3
    whole = window[-1] * window[-2]
    expected = [whole - start[-1] * start[-2], 0.0, 0.0]
    np.testing.assert_allclose(cells["contribution"].to_numpy(), expected, rtol=1e-4, atol=1e-3)
    rest = found.table.filter(kind="remainder")["contribution"][0]
    assert rest == pytest.approx(0.0, abs=1e-2)  # one block holds both factors
    single = attribute(product, frame, config(method="occlusion"), series="a", cutoff=hours(300), steps=[1])
    rest = single.table.filter(kind="remainder")["contribution"][0]
    assert rest == pytest.approx(-(window - start)[-1] * (window - start)[-2], rel=1e-3)  # they interact otherwise
    np.testing.assert_allclose(total(single, "occlusion"), whole, rtol=1e-5)


def test_last_value_as_baseline(frame: SeriesFrame, make_artifact: Make) -> None:
    artifact = make_artifact("last_value")
    mean = attribute(artifact, frame, series="a", cutoff=hours(300))
    last = attribute(artifact, frame, config(baseline="last"), series="a", cutoff=hours(300))
    cells = frame.table.filter(series_id="a")["y"].to_numpy()
    assert last.table.filter(kind="baseline")["contribution"][0] == pytest.approx(cells[300], rel=1e-5)
    moved = mean.table.filter(kind="target", source="y", lag=1, step=1)["contribution"][0]
    assert moved == pytest.approx((1 - SHRUNK) * (cells[300] - cells[253:301].mean()), rel=1e-3)
    assert last.by_source()["size"].sum() == pytest.approx(0.0, abs=1e-4)


def test_sources_are_summed_and_ordered(frame: SeriesFrame, make_artifact: Make) -> None:
    found = attribute(make_artifact("last_value"), frame, series="a", cutoff=hours(300))
    table = found.by_source()
    assert table["source"].to_list() == ["y", "z"]
    assert table["share"].to_list() == pytest.approx([1.0, 0.0])
    assert found.rows()[0]["source"] == "y"
    assert found.summary()["series"] == "a"


def test_known_covariates_of_the_horizon() -> None:
    data = with_covariates()
    plain = {"model": {"name": "ar_net", "lags": 4}, "likelihood": {"name": "point"}}
    artifact = fit_solved(
        data.until(hours(299)), validate(NetworkConfig, plain), WindowSpec(context_length=8, horizon=3)
    )
    found = attribute(artifact, data, cutoff=hours(350))
    known = found.table.filter(kind="known")
    assert sorted(known["lag"].unique()) == list(range(-2, 9))
    ahead = known.filter(step=2, lag=-1)
    assert ahead["source_time"][0] == ahead["time"][0]
    mean = float(artifact.network.scaler.known_loc[0])
    expected = 2.0 * (ahead["value"][0] - mean) * (1 - SHRUNK)
    assert ahead["contribution"][0] == pytest.approx(expected, rel=0.05)
    np.testing.assert_allclose(
        total(found, found.metadata["method"]), forecast(artifact, data, "a", "y", hours(350)), rtol=1e-3, atol=1e-3
    )


def test_coupled_series_are_sources_of_each_other(frame: SeriesFrame) -> None:
    model = {"name": "regenn", "attend": "entities", "dropout": 0.0, "ff_dim": 16, "graph": "identity"}
    from tsforge.artifact import create_artifact
    from tsforge.contracts.tensors import DataSpec
    from tsforge.data.panel import Panel
    from tsforge.network import build_network

    panel = Panel.from_frame(frame)
    window = WindowSpec(context_length=12, horizon=2)
    network = build_network(
        validate(NetworkConfig, {"model": model}),
        DataSpec(context_length=12, horizon=2, num_variates=2, train_length=250),
    )
    series = panel.training_series(None, 250)
    network.fit_scaler(series)
    network.prepare(series)
    network.solve(series)
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    artifact = create_artifact(
        network, config={}, schema=frame.schema, grid=panel.grid, series_ids=panel.series_ids, window=window,
        calibration=None, metrics={}, provenance={},
    )  # fmt: skip
    found = attribute(artifact, frame, series="b", cutoff=hours(300), steps=[1])
    weights = found.by_source().group_by("source_series").agg(pl.col("size").sum())
    sizes = dict(weights.iter_rows())
    assert set(sizes) == {"a", "b", "c"}
    assert min(sizes.values()) > 0
    np.testing.assert_allclose(
        total(found, found.metadata["method"]), forecast(artifact, frame, "b", "y", hours(300))[:1], rtol=1e-2
    )


@pytest.mark.parametrize("method", ["auto", "occlusion"])
def test_nothing_after_the_cutoff_matters(frame: SeriesFrame, make_artifact: Make, method: str) -> None:
    artifact = make_artifact("linear")
    before = attribute(artifact, frame, config(method=method, block=8), series="a", cutoff=hours(300), steps=[2])
    later = changed(frame, "a", "y", 301, 399, 1e6)
    after = attribute(artifact, later, config(method=method, block=8), series="a", cutoff=hours(300), steps=[2])
    assert before.table.equals(after.table)
    seen = attribute(artifact, changed(frame, "a", "y", 300, 300, 1e3), config(method=method, block=8), series="a",
                     cutoff=hours(300), steps=[2])  # fmt: skip
    assert not before.table.equals(seen.table)


def test_cells_that_were_not_observed_have_no_row(frame: SeriesFrame, make_artifact: Make) -> None:
    found = attribute(make_artifact("linear"), frame, series="c", cutoff=hours(215), steps=[1])
    lags = found.table.filter(kind="target", source="y")["lag"]
    hidden = set(range(6, 17))  # rows 200 to 210 are missing
    assert not hidden & set(lags)
    assert set(lags) == set(range(1, 49)) - hidden


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"series": "q"}, DataError, "no series 'q'"),
        ({"variate": "w"}, ConfigError, "does not forecast 'w'"),
        ({"steps": [0]}, ConfigError, r"must lie in 1..6"),
        ({"steps": [7]}, ConfigError, r"must lie in 1..6"),
        ({"steps": []}, ConfigError, r"must lie in 1..6"),
        ({"cutoff": hours(10)}, DataError, "48 rows"),
    ],
)
def test_what_cannot_be_explained_says_why(
    frame: SeriesFrame, make_artifact: Make, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attribute(make_artifact("linear"), frame, **arguments)


def test_too_many_cells_are_refused(frame: SeriesFrame, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsforge.forecasting.attribution._MOST_CELLS", 100)
    with pytest.raises(ConfigError, match="more than the 100 cells of one table"):
        attribute(make_artifact("linear"), frame, series="a")
    monkeypatch.undo()
    monkeypatch.setattr("tsforge.forecasting.attribution._MOST_PASSES", 10)
    with pytest.raises(ConfigError, match="choose a larger block"):
        attribute(make_artifact("linear"), frame, config(method="occlusion"), series="a")
