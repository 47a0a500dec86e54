"""The ReGENN verification checklist: the future, windows, storage, learning and figures, on fitted networks.

Points 8, 9, 11 and 13 to 15; those of the network itself are in ``test_regenn_checklist.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from tsforge.artifact import create_artifact, load_artifact, save_artifact
from tsforge.contracts.tensors import DataSpec
from tsforge.core.config import validate
from tsforge.core.errors import DataError
from tsforge.core.seeding import derive_seed
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.splits import SplitConfig, make_splits
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.window_forecasts import forecast_batches
from tsforge.metrics.point import ErrorSums, mae, msle, rmse
from tsforge.models import regenn
from tsforge.models._regenn_fit import count_graph
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.training.config import TrainConfig
from tsforge.training.loop import evaluate_windows, fit_network

Array = NDArray[np.float64]


# 8: the future


def panel_of(values: Array, names: tuple[str, ...]) -> Panel:
    """Return the panel of values [series, time, variate]."""
    series, rows, variates = values.shape
    table = pl.DataFrame(
        {
            "id": np.repeat([f"s{k}" for k in range(series)], rows),
            "t": np.tile(np.arange(rows), series),
            **{name: values[..., k].reshape(-1) for k, name in enumerate(names[:variates])},
        }
    )
    return Panel.from_frame(SeriesFrame.from_long(table, time="t", series_id="id", targets=names[:variates], freq="1i"))


def fit(
    panel: Panel, window: WindowSpec, stop: int, *, valid: int | None = None, seed: int = 0, **parts: Any
) -> ForecastNetwork:
    """Return a fitted network; ``parts`` are settings of the model, of ``train`` and ``scaling``, and where to stop."""
    train_settings = parts.pop("train", {})
    options = {name: parts.pop(name) for name in ("checkpoint_dir", "resume", "on_epoch") if name in parts}
    scaling = parts.pop("scaling", "global")
    config = validate(
        NetworkConfig,
        {"model": {"name": "regenn", **parts}, "likelihood": {"name": "point", "loss": "mae"}}
        | {"scaling": {"kind": scaling}},
    )
    spec = DataSpec(context_length=window.context_length, horizon=window.horizon, num_variates=panel.num_targets)
    network = build_network(config, spec, seed=derive_seed(seed, "weights"))
    settings = {"max_epochs": 2, "batch_size": 64, "learning_rate": 5e-3, "accelerator": "cpu", "start_margin": 0.0}
    fit_network(
        network,
        WindowDataset(panel, window, None, stop),
        None if valid is None else WindowDataset(panel, window, stop, valid),
        validate(TrainConfig, {**settings, **train_settings}),
        series=panel.training_series(None, stop),
        progress=False,
        **options,
    )
    return network


@pytest.mark.parametrize("settings", [{}, {"scaling": "series_max", "normalisation": "none"}, {"attend": "entities"}])
def test_8_the_future_changes_nothing(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 60, 3)).cumsum(1)
    window, origin = WindowSpec(context_length=6, horizon=4), 45
    states, forecasts = [], []
    for push in (0.0, 1e6):
        moved = values.copy()
        moved[:, origin:] += push
        panel = panel_of(moved, ("a", "b", "c"))
        coupled = settings.get("attend") == "entities"
        network = _fit_until(panel, window, origin, coupled=coupled, **settings)
        last = WindowDataset(panel, window, origin, origin + 4, aligned=coupled)
        forecasts.append(np.concatenate([part.mean for part in forecast_batches(network, last)]))
        states.append(network.state_dict())
    np.testing.assert_array_equal(forecasts[0], forecasts[1])
    assert {"model.graph", "scaler.global_loc", "model.floor"} <= set(states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def _fit_until(panel: Panel, window: WindowSpec, stop: int, *, coupled: bool, **settings: Any) -> ForecastNetwork:
    scaling = settings.pop("scaling", "global")
    config = validate(NetworkConfig, {"model": {"name": "regenn", **settings}, "scaling": {"kind": scaling}})
    spec = DataSpec(context_length=window.context_length, horizon=window.horizon, num_variates=3)
    network = build_network(config, spec)
    fit_network(
        network,
        WindowDataset(panel, window, None, stop, aligned=coupled),
        None,
        validate(TrainConfig, {"max_epochs": 2, "accelerator": "cpu", "learning_rate": 1e-2}),
        series=panel.training_series(None, stop),
        progress=False,
    )
    return network


# 9: windows


def test_9_windows_of_the_example() -> None:
    """T 120, w 7, h 14, h_v 7: 79 training windows, dev targets 99-105, test targets 106-119."""
    panel = panel_of(np.arange(120.0).reshape(1, 120, 1), ("a",))
    spec = WindowSpec(context_length=7, horizon=14)
    train, test = WindowDataset(panel, spec, None, 99), WindowDataset(panel, spec, 106, 120)
    assert len(train) == 79
    assert (int(train.cutoff_index.min()), int(train.cutoff_index.max()) + 13) == (7, 98)
    assert (len(test), int(test.cutoff_index[0])) == (1, 106)
    table = pl.DataFrame({"t": np.arange(120), "a": np.arange(120.0)})
    frame = SeriesFrame.from_wide(table, time="t", freq="1i")
    known = frame.until(105).extend(14)  # the last 7 rows of a dev target are blank
    visible = Panel.from_frame(known, grid=frame.grid)
    dev = WindowDataset(visible, spec, 99, 113)
    assert (len(dev), int(dev.cutoff_index[0])) == (1, 99)
    batch = dev.__getitems__([0])
    assert batch.target is not None
    assert batch.target_mask is not None
    assert batch.target[0, batch.target_mask[0, :, 0], 0].tolist() == list(range(99, 106))


def test_9_too_short_a_panel_says_what_is_needed() -> None:
    panel = panel_of(np.arange(20.0).reshape(1, 20, 1), ("a",))
    with pytest.raises(DataError, match="context_length 7 and horizon 14 need 21 rows in a row"):
        WindowDataset(panel, WindowSpec(context_length=7, horizon=14))


@pytest.mark.parametrize(("rows", "fits"), [(42, True), (41, False)])
def test_9_a_panel_needs_w_and_h_v_and_twice_h(rows: int, fits: bool) -> None:
    """Section 4: w + h_v + 2 h = 7 + 7 + 28 rows leave one window to train on, one row less leaves none."""
    window, validation = WindowSpec(context_length=7, horizon=14), 7
    panel = panel_of(np.random.default_rng(0).normal(size=(2, rows, 2)), ("a", "b"))
    parts = make_splits(
        panel, SplitConfig(kind="counts", counts=(rows - 14 - validation, validation, 14))
    )  # test targets are the last h rows, dev targets the h_v before them
    assert (parts.train[1], parts.valid[1], parts.test[1]) == (rows - 21, rows - 14, rows)
    assert len(WindowDataset(panel, window, *parts.test)) == 2  # one of each series
    if not fits:
        with pytest.raises(DataError, match="context_length 7 and horizon 14 need 21 rows in a row"):
            WindowDataset(panel, window, *parts.train)
        return
    train = WindowDataset(panel, window, *parts.train)
    assert train.cutoff_index.tolist() == [7, 7]
    network = fit(panel, window, parts.train[1], ff_dim=8, train={"max_epochs": 1})
    found = np.concatenate([part.mean for part in forecast_batches(network, WindowDataset(panel, window, *parts.test))])
    assert found.shape == (2, 14, 2)
    assert np.isfinite(found).all()


# 11: storage


def test_11_round_trip_bit_for_bit_and_the_graph_is_not_counted_on_top(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.poisson(2.0, size=(3, 60, 3)).astype(float)
    panel, window = panel_of(values, ("a", "b", "c")), WindowSpec(context_length=6, horizon=4)
    network = fit(panel, window, 50)
    artifact = create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance={},
    )
    path = save_artifact(artifact, tmp_path).path
    assert path is not None
    loaded = load_artifact(path).network
    batch = WindowDataset(panel, window, 50, None).__getitems__([0, 1, 2])
    assert torch.equal(loaded.predict(batch).mean, network.predict(batch).mean)
    assert torch.equal(loaded.model.graph, network.model.graph)
    loaded.prepare(panel.training_series(None, 50))
    assert torch.equal(loaded.model.graph, network.model.graph)
    expected = count_graph(panel.training_series(None, 50), presence="observed", by_windows=False, sizes=(6, 4))
    torch.testing.assert_close(network.model.graph, expected.float())


class _Interrupted(Exception):
    """What ends the first of two runs."""


@pytest.mark.parametrize("settings", [{}, {"network_gate": 1.0, "presence": "positive", "count": "windows"}])
def test_11_a_resumed_run_keeps_its_graph(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after epoch 1 and resumed where counting gives something else: the graph of the first run stays."""
    values = np.random.default_rng(1).poisson(2.0, size=(3, 60, 3)).astype(float)
    panel, window = panel_of(values, ("a", "b", "c")), WindowSpec(context_length=6, horizon=4)
    straight = fit(panel, window, 50, valid=60, ff_dim=8, train={"max_epochs": 3}, **settings)

    def stop(epoch: int, _: dict[str, float]) -> None:
        if epoch == 1:
            raise _Interrupted

    kept: dict[str, Any] = {"checkpoint_dir": tmp_path, "train": {"max_epochs": 3}, "ff_dim": 8, **settings}
    with pytest.raises(_Interrupted):
        fit(panel, window, 50, valid=60, on_epoch=stop, **kept)
    monkeypatch.setattr(regenn, "count_graph", lambda *_, **__: torch.full((3, 3), 7.0))
    poisoned = fit(panel, window, 50, valid=60, ff_dim=8, train={"max_epochs": 1}, **settings)
    counted = straight.state_dict()["model.graph"]
    assert bool((poisoned.state_dict()["model.graph"] == 7.0).all())  # a run from the start takes it
    resumed = fit(panel, window, 50, valid=60, resume=True, **kept).state_dict()
    assert torch.equal(resumed["model.graph"], counted)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed[name], value), name


# 13: learning


def _lagged(rows: int = 260, series: int = 6) -> Array:
    """Return values in which the second variate is the first one three steps ago, and noise."""
    rng = np.random.default_rng(5)
    first = rng.normal(size=(series, rows + 3))
    second = first[:, :-3] + 0.2 * rng.normal(size=(series, rows))
    return np.stack([first[:, 3:], second], axis=-1)


def test_13_learns_from_another_variate() -> None:
    panel, window = panel_of(_lagged(), ("a", "b")), WindowSpec(context_length=6, horizon=3)
    errors = {}
    for name, settings in {
        "whole": {},
        "without graph": {"ablate_gse": True},
        "without encoder": {"encoder": False},
        "autoregression": {"paths": "autoregression"},
    }.items():
        network = fit(
            panel,
            window,
            200,
            valid=260,
            normalisation="none",
            ar_init="ols",
            train={"max_epochs": 15, "schedule": "one_cycle", "learning_rate": 1e-2, "patience": None},
            **({"dropout": 0.0} if name != "autoregression" else {}),
            **settings,
        )
        errors[name] = evaluate_windows(network, WindowDataset(panel, window, 200, 260), 512)["valid_mae"]
    assert errors["whole"] < 0.85 * errors["autoregression"], errors
    assert len({round(value, 6) for value in errors.values()}) == 4, "a switch changes nothing"


# 14, 15: numbers


def test_14_drift_of_seven_days_on_the_panel(shared_data: Path) -> None:
    """Section 9 of the specification: 559.5 / 2903.1 / 0.0736 over all cells, 848.3 / 54.5 / 775.8 by variate."""
    table = pl.read_parquet(shared_data / "regenn" / "sars_cov2_188x120.parquet")
    frame = SeriesFrame.from_long(
        table, time="date", series_id="country", targets=("confirmed", "deaths", "recovered"), freq="1d"
    )
    panel, window = Panel.from_frame(frame), WindowSpec(context_length=8, horizon=14)
    config = validate(
        NetworkConfig, {"model": {"name": "regenn", "paths": "autoregression"}, "scaling": {"kind": "none"}}
    )
    start = build_network(config, DataSpec(context_length=8, horizon=14, num_variates=3))
    start.fit_scaler(panel.training_series(None, 106))
    assert start.solve(panel.training_series(None, 106)) is not None
    for model in (build_drift(panel), start):  # ReGENN starts there
        parts = list(forecast_batches(model, WindowDataset(panel, window, 106, 120)))
        target = np.concatenate([part.target for part in parts if part.target is not None])
        mean = np.maximum(np.concatenate([part.mean for part in parts]), 0.0)
        assert target.shape == (188, 14, 3)
        found = [round(float(value), digits) for value, digits in (
            (mae(target, mean).value, 1), (rmse(target, mean).value, 1), (msle(target, mean).value, 4))]  # fmt: skip
        assert found == [559.5, 2903.1, 0.0736]
        by_variate = mae(target, mean, axis=(0, 1)).value
        assert [round(float(value), 1) for value in by_variate] == [848.3, 54.5, 775.8]


def build_drift(panel: Panel) -> ForecastNetwork:
    config = validate(NetworkConfig, {"model": {"name": "drift", "steps": 7}, "scaling": {"kind": "none"}})
    network = build_network(config, DataSpec(context_length=8, horizon=14, num_variates=3))
    network.fit_scaler(panel.training_series(None, 106))
    network.solve(panel.training_series(None, 106))
    return network


def test_15_root_mean_squared_error_is_global() -> None:
    rng = np.random.default_rng(0)
    target, forecast = np.zeros((10, 3, 2)), rng.normal(size=(10, 3, 2)) * np.linspace(0.1, 5, 10)[:, None, None]
    sums = ErrorSums(3, 2)
    batches = [slice(0, 7), slice(7, 10)]
    for part in batches:
        sums.add(target[part], forecast[part])
    whole = math.sqrt((forecast**2).mean())
    assert math.sqrt(float(sums.mse().value)) == pytest.approx(whole, rel=1e-12)
    assert float(rmse(target, forecast).value) == pytest.approx(whole, rel=1e-12)
    of_batches = np.mean([math.sqrt((forecast[part] ** 2).mean()) for part in batches])
    assert abs(of_batches - whole) > 0.1


def test_15_evaluation_does_not_depend_on_the_batch() -> None:
    """Batches of 7, whose last is smaller, and one of 512: the same root mean squared error, that of all cells."""
    values = np.random.default_rng(2).normal(size=(3, 60, 2)).cumsum(1) * [1.0, 10.0]
    panel, window = panel_of(values, ("a", "b")), WindowSpec(context_length=6, horizon=4)
    network = fit(panel, window, 40, ff_dim=8)
    valid = WindowDataset(panel, window, 40, 60)
    assert len(valid) % 7
    found = [math.sqrt(evaluate_windows(network, valid, size)["valid_mse"]) for size in (7, 512)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    scale = np.sqrt(values[:, :40].reshape(-1, 2).var(0))  # errors are in scaled units
    parts = list(forecast_batches(network, valid))
    assert all(part.target is not None for part in parts)
    errors = np.concatenate([(part.mean - np.asarray(part.target)) / scale for part in parts])
    assert found[0] == pytest.approx(math.sqrt((errors**2).mean()), rel=1e-5)
    by_batch = [math.sqrt((errors[k : k + 7] ** 2).mean()) for k in range(0, len(errors), 7)]
    assert abs(np.mean(by_batch) - found[0]) > 1e-2 * found[0]
