"""The recurrent forecasters: settings, inputs, linear part, streaming and what they must not read.

Settings are spelled out, so that nothing here depends on a default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tsforge.artifact import create_artifact
from tsforge.contracts.tensors import Batch, DataSpec, Observation, TrainingSeries
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowSpec
from tsforge.forecasting.predict import predict
from tsforge.forecasting.stream import Stream
from tsforge.models._recurrent_forecaster import RecurrentForecaster
from tsforge.models.aaren import Aaren, AarenConfig
from tsforge.models.gru import GRU, GRUConfig
from tsforge.models.lstm import LSTM, LSTMConfig
from tsforge.models.slstm import SLSTM, SLSTMConfig
from tsforge.network import NetworkConfig, build_network
from tsforge.testing.generators import make_batch

Model = RecurrentForecaster[Any]
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "gru": (GRU, GRUConfig),
    "lstm": (LSTM, LSTMConfig),
    "slstm": (SLSTM, SLSTMConfig),
    "aaren": (Aaren, AarenConfig),
}
L, H = 24, 5
BASE: dict[str, Any] = {
    "d_model": 8,
    "num_layers": 2,
    "heads": 2,
    "dropout": 0.0,
    "mixing": "independent",
    "normalisation": "none",
    "patch_length": 1,
    "skip": "none",
}
COVARIATES = {"num_known": 2, "num_past": 1, "num_static": 2}


def spec_of(**sizes: int) -> DataSpec:
    return DataSpec(**{"context_length": L, "horizon": H, "num_variates": 2, **sizes})


def make(name: str, spec: DataSpec, *, shaken: bool = True, **settings: Any) -> Model:
    """Return a model in evaluation mode, by default with noise in the parts that start at zero."""
    torch.manual_seed(0)
    model_cls, config_cls = KINDS[name]
    model: Model = model_cls(validate(config_cls, BASE | settings, where="model"), spec)
    if shaken:
        with torch.no_grad():
            for key, part in model.named_parameters():
                if key.startswith(("head", "ahead", "spread")):
                    part.add_(0.3 * torch.randn_like(part))
    return model.eval()


@torch.no_grad()
def raw(model: Model, batch: Batch) -> Tensor:
    return model(batch).raw


def rows_of(batch: Batch) -> Iterator[Observation]:
    for t in range(batch.context.shape[1]):
        yield Observation(
            batch.context[:, t],
            batch.context_mask[:, t],
            None if batch.past is None else batch.past[:, t],
            None if batch.known is None else batch.known[:, t],
        )


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, r"model\.d_model: "),
        ({"num_layers": 0}, r"model\.num_layers: "),
        ({"dropout": 1.0}, r"model\.dropout: "),
        ({"heads": 3}, r"model\.heads: 3 does not divide model\.d_model 8"),
        ({"heads": 0}, r"model\.heads: "),
        ({"mixing": "some"}, r"model\.mixing: "),
        ({"patch_length": 0}, r"model\.patch_length: 0 must be at least 1"),
        ({"patch_length": None, "patch_stride": 2}, r"model\.patch_stride: give it together with patch_length"),
        ({"patch_length": 4, "patch_stride": 5}, r"model\.patch_stride: .*between 1 and that"),
        ({"skip": "none", "ridge": 3.0}, r"model\.ridge has no effect with skip 'none'"),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_settings_without_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, spec_of(), **settings)


def test_a_patch_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.patch_length: 25 exceeds context_length 24"):
        make("gru", spec_of(), patch_length=25)


@pytest.mark.parametrize(("length", "patch"), [(95, 1), (96, 16), (336, 16)])
def test_long_contexts_are_read_in_patches_by_default(length: int, patch: int) -> None:
    model = make("gru", spec_of(context_length=length), patch_length=None)
    assert (model.patch, model.stride) == (patch, patch)
    assert model.recurrent == (patch == 1)


def test_patched_models_say_that_they_cannot_stream() -> None:
    model = make("lstm", spec_of(), patch_length=4)
    for call in (
        lambda: model.initial_state(1),
        lambda: model.warm_up(make_batch(spec_of())),
        lambda: model.free_run({}),
    ):
        with pytest.raises(ModelError, match=r"patches of 4 steps .* model\.patch_length=1"):
            call()


# ---- inputs


@torch.no_grad()
def test_patches_end_at_the_last_step_and_hold_value_mask_and_covariates() -> None:
    spec = spec_of(context_length=9, num_past=1, num_known=1)
    model = make("gru", spec, patch_length=4, patch_stride=3, num_layers=1)
    seen: list[Tensor] = []
    model.embed.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    batch = make_batch(spec, size=2, gaps=0.3)
    model(batch)
    inputs = seen[0].view(2, 2, 3, 4, 4)  # [B, V, patch, value mask past known, step]
    assert batch.past is not None
    assert batch.known is not None
    values = torch.where(batch.context_mask, batch.context, 0.0)
    for variate in range(2):
        rows = [
            values[..., variate],
            batch.context_mask[..., variate].float(),
            batch.past[..., 0],
            batch.known[:, :9, 0],
        ]
        whole = pad(torch.stack(rows, dim=1), (1, 0))  # one empty step in front: 10 = 4 + 2 x 3
        for index, start in enumerate((0, 3, 6)):
            torch.testing.assert_close(inputs[:, variate, index], whole[..., start : start + 4], rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_hidden_values_change_nothing(name: str) -> None:
    spec = spec_of(**COVARIATES)
    for settings in ({}, {"mixing": "mixed", "normalisation": "window"}, {"patch_length": 5, "normalisation": "last"}):
        model, batch = make(name, spec, **settings), make_batch(spec, gaps=0.3)
        poisoned = batch._replace(context=torch.where(batch.context_mask, batch.context, 1e6))
        assert not bool(batch.context_mask.all())
        torch.testing.assert_close(raw(model, poisoned), raw(model, batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_independent_variates_do_not_see_each_other_and_mixed_ones_do(name: str) -> None:
    batch = make_batch(spec_of(), gaps=0.0)
    other = batch.context.clone()
    other[..., 1] += 1.0
    for mixing, moves in (("independent", False), ("mixed", True)):
        model = make(name, spec_of(), mixing=mixing)
        change = raw(model, batch._replace(context=other))[:, :, 0] - raw(model, batch)[:, :, 0]
        assert (float(change.abs().max()) > 1e-4) == moves, mixing


@pytest.mark.parametrize("name", KINDS)
def test_known_covariates_of_a_step_ahead_move_that_step_only(name: str) -> None:
    spec = spec_of(**COVARIATES)
    model, batch = make(name, spec), make_batch(spec)
    assert batch.known is not None
    known = batch.known.clone()
    known[:, L + 2] += 1.0
    moved = (raw(model, batch._replace(known=known)) - raw(model, batch)).abs().amax((0, 2, 3)) > 1e-5
    assert moved.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name", KINDS)
def test_level_and_scale_of_a_context_pass_through(name: str) -> None:
    spec = spec_of(num_params=2)
    batch = make_batch(spec, gaps=0.2)
    scaled = batch._replace(context=torch.where(batch.context_mask, 3.0 * batch.context + 7.0, 0.0))
    model = make(name, spec, normalisation="window")
    first, second = raw(model, batch), raw(model, scaled)
    torch.testing.assert_close(second[..., 0], 3.0 * first[..., 0] + 7.0, rtol=1e-4, atol=1e-4)
    difference = second[..., 1] - first[..., 1]  # the spread is told by the logarithm of the scale: linear in it
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-3, atol=1e-4)
    assert float(difference.abs().max()) > 0.05


# ---- linear part


def span(rows: int = 150) -> TrainingSeries:
    rng = np.random.default_rng(5)
    steps = np.arange(rows)[:, None]
    values = torch.from_numpy(np.sin(2 * np.pi * (steps / 8 + np.arange(2) / 5)) + 0.3 * rng.normal(size=(rows, 2)))
    return TrainingSeries(values, torch.ones_like(values, dtype=torch.bool), torch.tensor([0, rows]), torch.tensor([0]))


@pytest.mark.parametrize("name", KINDS)
def test_training_starts_at_the_linear_map_and_parts_add_up(name: str) -> None:
    model = make(name, spec_of(), shaken=False, skip="closed_form", normalisation="window")
    batch = make_batch(spec_of())
    report = model.solve(span())
    assert report is not None
    assert not report.finished
    assert model.skip is not None
    linear = model.skip(Batch(batch.context, batch.context_mask)).raw
    torch.testing.assert_close(raw(model, batch), linear, rtol=0, atol=1e-6)
    with torch.no_grad():
        model.head.weight.normal_()
        parts = model.components(batch)
    assert "recurrent" in parts
    assert float(parts["recurrent"].abs().max()) > 0.01
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), raw(model, batch)[..., 0], rtol=0, atol=1e-5)


def test_half_lives_are_told_in_grid_steps() -> None:
    model = make("aaren", spec_of(), patch_length=4, patch_stride=2)
    assert isinstance(model, Aaren)
    rows = model.explain()["half_lives"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert rows[0]["half_life"] == pytest.approx(2 * 2.0, rel=1e-4)
    assert rows[1]["half_life"] == pytest.approx(2 * 11.0, rel=1e-4)  # 11 patches in 24 steps
    sinusoid = make("aaren", spec_of(), position="sinusoid")
    assert sinusoid.explain() == {}


# ---- streaming


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "mixed", "skip": "learned"},
        {"skip": "learned", "normalisation": "window"},
        {"normalisation": "last", "mixing": "mixed"},
    ],
    ids=["plain", "mixed", "window", "last"],
)
@pytest.mark.parametrize("name", [*KINDS, "sinusoid"])
@torch.no_grad()
def test_carried_row_by_row_equals_the_whole_window(name: str, settings: dict[str, Any]) -> None:
    """After a warm-up on half of a window, whose normalisation is then fixed, as well as from the first row on."""
    if name == "sinusoid":
        name, settings = "aaren", {**settings, "position": "sinusoid"}
    spec = spec_of(num_params=2, **COVARIATES)
    model, batch = make(name, spec, **settings).double(), make_batch(spec, size=3, gaps=0.2)
    batch = Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)
    assert batch.known is not None
    ahead, whole = batch.known[:, L:], raw(model, batch)
    torch.testing.assert_close(model.free_run(model.warm_up(batch), ahead).raw, whole, rtol=0, atol=1e-10)
    state = model.initial_state(3, batch.static)
    if model.normalises:  # the statistics of the window, as a warm-up would have fixed them
        warm = model.warm_up(batch)
        state |= {"loc": warm["loc"], "scale": warm["scale"]}
    sizes = {key: part.shape for key, part in state.items()}
    for row in rows_of(batch):
        state = model.step(state, row)
    assert {key: part.shape for key, part in state.items()} == sizes
    torch.testing.assert_close(model.free_run(state, ahead).raw, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_free_run_leaves_the_state_and_series_can_be_taken_apart(name: str) -> None:
    spec = spec_of()
    model, batch = make(name, spec), make_batch(spec, size=4, gaps=0.2)
    state = model.warm_up(batch)
    before = {key: part.clone() for key, part in state.items()}
    whole = model.free_run(state).raw
    for key, part in state.items():
        assert torch.equal(part, before[key]), key
        assert len(part) == 4, key
    some = {key: part[[2, 0]] for key, part in state.items()}
    torch.testing.assert_close(model.free_run(some).raw, whole[[2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_stream_starts_at_the_forecast_and_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    steps = np.arange(80)
    flow = 5.0 + np.sin(2 * np.pi * steps / 8) + np.random.default_rng(0).normal(0, 0.2, 80)
    table = pl.DataFrame({"series_id": "pump", "time": steps, "flow": flow})
    frame = SeriesFrame.from_long(table, series_id="series_id", time="time", targets=["flow"], freq="1i")
    config = NetworkConfig.model_validate({"model": {"name": name, **BASE, "skip": "learned"}})
    network = build_network(config, spec_of(num_variates=1), seed=0).eval()
    panel = Panel.from_frame(frame)
    network.fit_scaler(panel.training_series(None, 60))
    with torch.no_grad():
        network.model.head.weight.normal_(std=0.3)
    artifact = create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=WindowSpec(context_length=L, horizon=H),
        provenance={},
    )
    stream = Stream.start(artifact, frame.until(59))
    assert stream.mode == "carried"
    expected = predict(artifact, frame.until(59)).table["mean"]
    np.testing.assert_allclose(stream.forecast().table["mean"], expected, atol=1e-5)
    stream.update(frame.table.filter(pl.col("time").is_between(60, 65)))
    stream.save(tmp_path / "stream.safetensors")
    other = Stream.load(tmp_path / "stream.safetensors", artifact)
    rest = frame.table.filter(pl.col("time") > 66)  # a row is missing
    for each in (stream, other):
        each.update(rest)
    assert stream.forecast().table.equals(other.forecast().table)
