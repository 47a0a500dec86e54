"""A committee is its members: gradients, averages, states and settings are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tsforge.app.fit import FitConfig, fit_frame
from tsforge.artifact import load_artifact, save_artifact
from tsforge.contracts.tensors import Batch, DataSpec
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.frame import SeriesFrame
from tsforge.forecasting.predict import predict
from tsforge.forecasting.stream import Stream
from tsforge.models.committee import Committee, CommitteeConfig
from tsforge.models.gru import GRUConfig
from tsforge.testing.generators import make_batch, make_series

MEMBER: dict[str, Any] = {"name": "gru", "d_model": 8, "dropout": 0.0, "normalisation": "none", "patch_length": 1}
SPEC = DataSpec(context_length=24, horizon=5, num_variates=2, num_known=1)


def make(size: int = 3, spec: DataSpec = SPEC, **member: Any) -> Committee:
    torch.manual_seed(3)
    config = validate(CommitteeConfig, {"member": {**MEMBER, **member}, "size": size})
    return Committee(config, spec).double()


def doubles(batch: Batch) -> Batch:
    return Batch._make(
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in batch
    )


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    return Batch._make(None if part is None else part[rows] for part in batch)


def test_a_training_step_gives_every_member_the_gradient_of_its_own_windows() -> None:
    model = make(skip="none").train()
    batch = doubles(make_batch(SPEC, size=10))
    assert batch.target is not None
    (model(batch).raw[..., 0] - batch.target).square().mean().backward()
    for index, rows in enumerate(([0, 3, 6, 9], [1, 4, 7], [2, 5, 8])):
        alone = make(skip="none").members[index]
        mine = rows_of(batch, rows)
        ((alone(mine).raw[..., 0] - mine.target).square().mean() * len(rows) / 10).backward()
        pairs = zip(model.members[index].named_parameters(), alone.parameters(), strict=True)
        for (name, found), expected in pairs:
            assert found.grad is not None, name
            torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_forecasts_are_the_mean_of_members_that_differ() -> None:
    model = make(skip="none").eval()
    with torch.no_grad():
        for part in model.parameters():  # heads start at zero
            part.add_(0.1 * torch.randn_like(part))
    batch = doubles(make_batch(SPEC))
    alone = torch.stack([member(batch).raw for member in model.members])
    torch.testing.assert_close(model(batch).raw, alone.mean(0))
    assert float((alone[0] - alone[1]).detach().abs().max()) > 1e-3


def test_extra_losses_count_by_the_windows_they_are_of() -> None:
    sparse = {"name": "ar_net", "solver": "sgd", "lags": 6, "density": 0.5}
    model = Committee(validate(CommitteeConfig, {"member": sparse, "size": 3}), SPEC).double().train()
    model.anneal(1.0)
    batch = doubles(make_batch(SPEC, size=8))
    with torch.no_grad():
        for index, member in enumerate(model.members):
            member.ar.weight.add_(0.1 * (index + 1))
        found, own = model(batch).aux_losses, [member(batch).aux_losses["sparsity"] for member in model.members]
        assert found is not None
        torch.testing.assert_close(found["sparsity"], (3 * own[0] + 3 * own[1] + 2 * own[2]) / 8)
        model.training = False  # not its members, whose penalty is for training only
        found = model(batch).aux_losses
        assert found is not None
        torch.testing.assert_close(found["sparsity"], (own[0] + own[1] + own[2]) / 3)


def test_each_member_carries_a_state_of_its_own() -> None:
    model = make(skip="none").eval()
    with torch.no_grad():
        for part in model.parameters():
            part.add_(0.1 * torch.randn_like(part))
        batch = doubles(make_batch(SPEC))._replace(target=None, target_mask=None)
        state = model.warm_up(batch)
        assert batch.known is not None
        torch.testing.assert_close(model.free_run(state, batch.known[:, 24:]).raw, model(batch).raw)


def test_a_batch_smaller_than_the_committee_trains_some_members_only() -> None:
    model = make(size=4, skip="none").train()
    batch = doubles(make_batch(SPEC, size=2))
    assert model(batch).raw.shape == (2, 5, 2, 1)
    model(batch).raw.sum().backward()
    reached = [any(part.grad is not None for part in member.parameters()) for member in model.members]
    assert reached == [True, True, False, False]


def test_members_start_at_the_same_closed_form_and_parts_add_up() -> None:
    model = make().eval()
    report = model.solve(make_series(SPEC))
    assert report is not None
    assert not report.finished
    batch = doubles(make_batch(SPEC))
    first, second = (member.skip.weight for member in model.members[:2])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    parts = model.components(batch)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(0), model(batch).raw[..., 0])


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("last_value", "has nothing to train"),
        ({"name": "regenn", "attend": "entities"}, "couples the series"),
        ("auto", "made of several models"),
        ("committee", "made of several models"),
        ({"d_model": 8}, "needs a 'name'"),
        ({"name": "gru", "d_modl": 8}, "model.member.d_modl"),
    ],
)
def test_members_that_make_no_committee_are_refused(member: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(CommitteeConfig, {"member": member})


@pytest.mark.parametrize("name", ["linear", "ar_net"])
def test_members_that_need_no_training_are_refused_before_it(name: str) -> None:
    model = Committee(
        validate(CommitteeConfig, {"member": name}), DataSpec(context_length=24, horizon=5, num_variates=2)
    )
    with pytest.raises(ModelError, match=f"'{name}' is finished by its closed form"):
        model.solve(make_series(model.spec))


def test_one_member_is_none() -> None:
    with pytest.raises(ConfigError, match="size"):
        validate(CommitteeConfig, {"member": "gru", "size": 1})


def test_what_cannot_be_carried_says_so() -> None:
    model = make(patch_length=4)
    assert not model.recurrent
    with pytest.raises(ModelError, match="cannot be carried forward"):
        model.warm_up(doubles(make_batch(SPEC)))


def frame() -> SeriesFrame:
    rng, time = np.random.default_rng(0), np.arange(260)
    parts = [
        pl.DataFrame({"series_id": name, "time": time, "y": np.sin(time / 4 + shift) + rng.normal(0, 0.1, 260)})
        for shift, name in enumerate("ab")
    ]
    return SeriesFrame.from_long(pl.concat(parts), series_id="series_id", time="time", targets=["y"], freq="1i")


def test_fitted_stored_and_carried_like_any_model(tmp_path: Path) -> None:
    overrides = ["model=committee", "model.size=2", "model.member.d_model=8", "model.member.normalisation=none"]
    overrides += ["model.member.patch_length=1", "window.context_length=24", "window.horizon=4", "data.name=x"]
    overrides += ["train.max_epochs=2", "train.batch_size=32", "tracking.enabled=false", "train.start_margin=0"]
    config = load(FitConfig, "fit", overrides)
    assert isinstance(config.model, CommitteeConfig)
    assert isinstance(config.model.member, GRUConfig)
    data = frame()
    artifact, training = fit_frame(data, config)
    assert training.epochs == 2
    stored = load_artifact(save_artifact(artifact, tmp_path).path)
    first, second = predict(artifact, data).table, predict(stored, data).table
    assert first.equals(second)
    weights = [member.state_dict() for member in stored.network.model.members]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    stream = Stream.start(stored, data.until(249))
    assert stream.mode == "carried"
    stream.update(data.table.filter(pl.col("time") > 249))
    carried = stream.forecast().table
    np.testing.assert_allclose(
        carried["mean"], first["mean"], atol=2e-2
    )  # a carried state remembers more than a window


def test_another_member_by_name_alone() -> None:
    config = load(FitConfig, "fit", ["model=committee", "model.member=s4", "data.name=x"])
    assert config.model.member.name == "s4"
