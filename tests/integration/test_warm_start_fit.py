"""Fits that begin at the weights of an earlier one: dropout by a loop, what is taken, and no look at the future."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app import fit as fit_module
from tsforge.app.fit import FitConfig, fit, fit_frame
from tsforge.app.ingest import IngestConfig, ingest
from tsforge.app.warm_start import check_blind, starting_weights
from tsforge.artifact import Artifact
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError
from tsforge.core.workspace import Workspace
from tsforge.data.config import DataConfig
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.forecasting.predict import predict
from tsforge.network import build_network

ROWS, EARLY, LATE = 220, 120, 160  # rows; the earlier fit sees 0-119, the later trains on 0-159
REGENN = {"name": "regenn", "ff_dim": 8, "dropout": 0.1, "network_gate": 0.3}


def frame(spoilt_from: int | None = None) -> SeriesFrame:
    """Three entities of two growing counts; ``spoilt_from`` adds a million to every later value."""
    parts = []
    for number in range(3):
        rng = np.random.default_rng(number)
        values = rng.poisson(3 + number, size=(ROWS, 2)).cumsum(0).astype(float)
        if spoilt_from is not None:
            values[spoilt_from:] += 1e6
        parts.append(
            pl.DataFrame({"id": [f"e{number}"] * ROWS, "t": np.arange(ROWS), "a": values[:, 0], "b": values[:, 1]})
        )
    return SeriesFrame.from_long(pl.concat(parts), time="t", series_id="id", targets=["a", "b"], freq="1i")


def config(train: int, valid: int, test: int = 0, /, **changes: Any) -> FitConfig:
    steps = {"max_epochs": 2, "batch_size": 64, "accelerator": "cpu", "start_margin": 0.0} | changes.pop("train", {})
    settings = {
        "data": {"name": "counts", "source": {"kind": "parquet", "path": "counts.parquet"}},
        "model": REGENN,
        "window": {"context_length": 8, "horizon": 4},
        "likelihood": {"name": "point", "loss": "mae"},
        "split": {"kind": "counts", "counts": [train, valid, test]},
        "train": steps,
        "tracking": {"enabled": False},
    }
    return validate(FitConfig, settings | changes)


def warm(dropout: float = 0.0, **changes: Any) -> FitConfig:
    return config(LATE, 30, 30, warm_start={"artifact": "named", "dropout": dropout}, **changes)


def early(data: SeriesFrame, **changes: Any) -> Artifact:
    return fit_frame(data, config(EARLY - 20, 20, **changes))[0]


@pytest.fixture(scope="module")
def earlier() -> Artifact:
    return early(frame())


def parameters(artifact: Artifact) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in artifact.network.model.named_parameters()}


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_dropout_equals_a_loop_over_cells(earlier: Artifact, share: float) -> None:
    network = build_network(earlier.network.config, earlier.network.spec, seed=5)
    untouched = {name: value.clone() for name, value in earlier.network.state_dict().items()}
    found = starting_weights(network, earlier, share, seed=3)
    cells = zeros = 0
    for name, before in parameters(earlier).items():
        for old, new in zip(before.flatten().tolist(), found[f"model.{name}"].flatten().tolist(), strict=True):
            if old == 0.0:
                assert new == 0.0
                continue
            cells += 1
            zeros += new == 0.0
            assert new == 0.0 or new == pytest.approx(old / (1 - share), rel=1e-6)
    assert cells > 800
    assert abs(zeros / cells - share) < 4 * (share * (1 - share) / cells) ** 0.5
    again, other = (starting_weights(network, earlier, share, seed=seed) for seed in (3, 4))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not all(torch.equal(found[name], other[name]) for name in found)
    assert all(torch.equal(value, untouched[name]) for name, value in earlier.network.state_dict().items())


def test_without_dropout_the_weights_are_those_of_the_earlier_fit(earlier: Artifact) -> None:
    network = build_network(earlier.network.config, earlier.network.spec)
    found = starting_weights(network, earlier, 0.0, seed=0)
    assert found.keys() == {f"model.{name}" for name in parameters(earlier)} | {"param_offset"}
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in parameters(earlier).items())


def test_the_start_competes_and_statistics_are_those_of_the_new_span(earlier: Artifact) -> None:
    kept, training = fit_frame(frame(), warm(train={"start_margin": 1e9}), earlier=earlier)
    assert training.best_epoch == -1  # no epoch can be better by so much
    assert all(torch.equal(parameters(kept)[name], value) for name, value in parameters(earlier).items())
    fresh = fit_frame(frame(), config(LATE, 30, 30))[0].network
    assert torch.equal(kept.network.model.graph, fresh.model.graph)
    assert not torch.equal(kept.network.model.graph, earlier.network.model.graph)
    for name, value in fresh.scaler.state_dict().items():
        assert torch.equal(kept.network.scaler.state_dict()[name], value)
    facts = kept.provenance["training"]
    assert (facts["started_from"], facts["start_dropout"]) == (earlier.id, 0.0)


def test_training_begins_there(earlier: Artifact) -> None:
    still = {"learning_rate": 1e-9, "max_epochs": 1}
    found, training = fit_frame(frame(), warm(0.5, train=still), earlier=earlier)
    assert training.epochs == 1
    network = build_network(found.network.config, found.network.spec)
    begun = starting_weights(network, earlier, 0.5, seed=0)
    for name, value in parameters(found).items():
        torch.testing.assert_close(value, begun[f"model.{name}"], rtol=0, atol=1e-6)


def test_an_interrupted_warm_start_goes_on_to_the_bit(earlier: Artifact, tmp_path: Path) -> None:
    settings = warm(0.2, train={"max_epochs": 3})
    whole = fit_frame(frame(), settings, earlier=earlier)[0]

    def die(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    for _ in range(2):  # the second time with the first epoch done
        with pytest.raises(KeyboardInterrupt):
            fit_frame(frame(), settings, checkpoint_dir=tmp_path, resume=True, on_epoch=die, earlier=earlier)
    other = early(frame(), train={"seed": 1})
    with pytest.raises(ConfigError, match="checkpoint"):
        fit_frame(frame(), settings, checkpoint_dir=tmp_path, resume=True, earlier=other)
    resumed = fit_frame(frame(), settings, checkpoint_dir=tmp_path, resume=True, earlier=earlier)[0]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


# no look at the future


def forecast_after_two_fits(data: SeriesFrame, seen_by_earlier: int) -> list[float]:
    """Return what a warm-started fit forecasts at its end of training; the earlier fit sees that many rows."""
    first = fit_frame(data, config(seen_by_earlier - 20, 20))[0]
    later = fit_frame(data.until(LATE - 1), config(LATE, 0, warm_start={"artifact": "named"}), earlier=first)[0]
    return predict(later, data, cutoff=LATE - 1).table["mean"].to_list()


def test_what_comes_later_changes_no_forecast() -> None:
    assert forecast_after_two_fits(frame(), LATE) == forecast_after_two_fits(frame(spoilt_from=LATE), LATE)


def test_an_earlier_fit_that_knows_the_future_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data up to 160, the training span ends at 159: it knows rows"):
        forecast_after_two_fits(frame(), LATE + 1)
    monkeypatch.setattr(fit_module, "check_blind", lambda *given: None)  # what the check is for
    honest, spoilt = (forecast_after_two_fits(data, ROWS) for data in (frame(), frame(spoilt_from=LATE)))
    assert honest != spoilt


def test_series_held_out_now_must_have_been_held_out_then(earlier: Artifact) -> None:
    settings = warm(entities={"held_out": ["e1"]})
    with pytest.raises(ConfigError, match=r"fitted on 1 of 1 series that are held out now \(e1\)"):
        fit_frame(frame(), settings, earlier=earlier)
    before = early(frame(), entities={"held_out": ["e1", "e2"]})
    assert fit_frame(frame(), settings, earlier=before)[0].provenance["entities"]["held_out"] == ["e1"]


# settings that do not fit


def test_other_models_and_sizes_are_refused(earlier: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"is a 'regenn', not a 'dlinear'"):
        fit_frame(frame(), warm(model={"name": "dlinear"}), earlier=earlier)
    with pytest.raises(ConfigError, match=r"\d+ of \d+ tensors differ \(model\.encoder\.linear1\.bias \(8,\), wanted"):
        fit_frame(frame(), warm(model={**REGENN, "ff_dim": 16}), earlier=earlier)
    renamed = frame().table.rename({"b": "c"})
    data = SeriesFrame.from_long(renamed, time="time", series_id="series_id", targets=["a", "c"], freq="1i")
    with pytest.raises(ConfigError, match=r"was fitted on the targets columns a, b, this fit has a, c: weights belong"):
        fit_frame(data, warm(), earlier=earlier)
    nothing_said = replace(earlier, provenance={})
    with pytest.raises(ConfigError, match="does not say which rows it has seen"):
        fit_frame(frame(), warm(), earlier=nothing_said)


GRU = {"name": "gru", "d_model": 4, "num_layers": 1, "heads": 1, "patch_length": 2, "patch_stride": 2}
PAST, KNOWN = ("p", "q"), ("k", "l")


def led(past: tuple[str, ...] = PAST, known: tuple[str, ...] = KNOWN, **renamed: str) -> SeriesFrame:
    """One target with covariates, in the order given."""
    draw = np.random.default_rng(7).normal(size=(ROWS, 5))
    table = pl.DataFrame({"t": np.arange(ROWS), **dict(zip("apqkl", draw.T, strict=True))}).rename(renamed)
    return SeriesFrame.from_wide(table, time="t", targets=["a"], past=past, known=known, freq="1i")


@pytest.fixture(scope="module")
def led_earlier() -> Artifact:
    return early(led(), model=GRU, scaling={"kind": "global"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (led(past=("q", "p")), r"the past columns p, q, this fit has q, p: weights belong to places"),
        (led(known=("l", "k")), r"the known columns k, l, this fit has l, k"),
        (led(past=("p", "r"), q="r"), r"the past columns p, q, this fit has p, r"),
        (led(known=("k", "m"), l="m"), r"the known columns k, l, this fit has k, m"),
    ],
)
def test_covariates_in_other_places_are_refused(led_earlier: Artifact, data: SeriesFrame, message: str) -> None:
    settings = warm(model=GRU, scaling={"kind": "global"})
    with pytest.raises(ConfigError, match=message):
        fit_frame(data, settings, earlier=led_earlier)
    assert fit_frame(led(), settings, earlier=led_earlier)[1].epochs == 2


def test_static_features_in_other_places_are_refused(earlier: Artifact) -> None:
    before = replace(earlier, schema=replace(earlier.schema, static=("size", "region")))
    with pytest.raises(ConfigError, match=r"the static columns size, region, this fit has none"):
        fit_frame(frame(), warm(), earlier=before)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "none"}, r"scaling 'global', this fit has 'none': .*set scaling\.kind=global scaling\.robust=false"),
        ({"kind": "series"}, r"this fit has 'series': its weights are of other units"),
        ({"kind": "global", "robust": True}, r"scaling 'global', this fit has 'global' \(robust\)"),
    ],
)
def test_another_scaling_is_refused(led_earlier: Artifact, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_frame(led(), warm(model=GRU, scaling=scaling), earlier=led_earlier)


def test_auto_may_start_where_it_means_the_scaling_of_the_earlier_fit(led_earlier: Artifact) -> None:
    assert led_earlier.network.scaling == "global"
    assert fit_frame(led(), warm(model=GRU), earlier=led_earlier)[1].epochs == 2


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (None, {"q": "2i"}, r"past covariates 0 rows later than the targets, the data has q 2 \(publication_delay\)"),
        (
            {"q": "2i"},
            {"p": "1i", "q": "2i"},
            r"past covariates q 2 rows later than the targets, the data has p 1, q 2",
        ),
        ({"q": "2i"}, {"q": "2i", "else": "9i"}, ""),  # nothing that it reads
        ({"a": "1i", "q": "3i"}, {"q": "2i"}, ""),  # as many rows later than the target
    ],
)
def test_another_delay_of_what_it_reads_is_refused(
    led_earlier: Artifact, before: dict[str, str] | None, now: dict[str, str], message: str
) -> None:
    def stated(delay: dict[str, str] | None) -> dict[str, Any]:
        return config(LATE, 30).data.model_dump() | {"publication_delay": delay}

    fitted = replace(led_earlier, config={**led_earlier.config, "data": stated(before)})
    panel, data = Panel.from_frame(led()), validate(DataConfig, stated(now))
    if message:
        with pytest.raises(ConfigError, match=message):
            check_blind(fitted, panel, LATE, (), data)
    else:
        check_blind(fitted, panel, LATE, (), data)


def test_where_it_would_have_no_effect_it_is_refused(earlier: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"warm_start\.dropout has no effect without warm_start\.artifact"):
        config(LATE, 30, warm_start={"dropout": 0.2})
    with pytest.raises(ConfigError, match="works with tsforge fit and retrain only"):
        fit_frame(frame(), warm())
    with pytest.raises(ConfigError, match="has no effect with model=auto"):
        fit_frame(frame(), warm(model={"name": "auto"}))
    solved = early(frame(), model={"name": "linear"}, likelihood={"name": "point"})
    with pytest.raises(ConfigError, match="'linear' takes no gradient steps"):
        fit_frame(frame(), warm(model={"name": "linear"}, likelihood={"name": "point"}), earlier=solved)


def test_the_job_finds_the_artifact(tmp_path: Path) -> None:
    frame().table.write_parquet(tmp_path / "counts.parquet")
    data = {
        "name": "counts",
        "source": {"kind": "parquet", "path": str(tmp_path / "counts.parquet")},
        "layout": "long",
        "time": "time",
        "series": "series_id",
        "freq": "1i",
    }
    workspace = Workspace.open(tmp_path / "home")
    ingest(validate(IngestConfig, {"data": data}), workspace)
    first = fit(config(EARLY - 20, 20, data=data), workspace).artifact
    second = fit(config(LATE, 30, 30, data=data, warm_start={"artifact": "latest", "dropout": 0.2}), workspace).artifact
    assert second.provenance["training"]["started_from"] == first.id
    assert second.config["warm_start"] == {"artifact": "latest", "dropout": 0.2}
