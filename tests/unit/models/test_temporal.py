"""A temporal hierarchy: bins, phases, reconciliation and weights against plain loops and dense formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tsforge.app.fit import FitConfig
from tsforge.app.fit_checks import check_settings
from tsforge.contracts.tensors import Batch, DataSpec, TrainingSeries
from tsforge.core.config import load, validate
from tsforge.core.errors import ConfigError, ModelError
from tsforge.data.hierarchy import HierarchyConfig, build_hierarchy
from tsforge.forecasting.reconcile import ReconcileConfig, make_reconciliation
from tsforge.models._ar_windows import training_error
from tsforge.models.linear import Linear
from tsforge.models.temporal import Temporal, TemporalConfig, binned, binned_series, reconciler
from tsforge.testing.generators import make_batch, make_series

SPEC = DataSpec(context_length=14, horizon=6, num_variates=2)
RIDGE = {"name": "linear", "ridge": 1.0}


def make(spec: DataSpec = SPEC, member: Any = RIDGE, **settings: Any) -> Temporal:
    torch.manual_seed(0)
    return Temporal(validate(TemporalConfig, {"member": member, **settings}), spec).double().eval()


def doubles(batch: Batch) -> Batch:
    return Batch._make(
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in batch
    )


def test_reconciled_steps_are_those_of_the_dense_formula() -> None:
    rng, widths, horizon = np.random.default_rng(0), (1, 2, 3, 6), 6
    variances = [rng.uniform(0.1, 3.0, (2, horizon // k)) for k in widths]
    found = reconciler(widths, horizon, [torch.from_numpy(part) for part in variances]).double().numpy()
    rows = [[float(step // k == place) / k for step in range(horizon)] for k in widths for place in range(horizon // k)]
    average = np.array(rows)
    for variate in range(2):
        inverse = np.diag(1.0 / np.concatenate([part[variate] for part in variances]))
        expected = np.linalg.inv(average.T @ inverse @ average) @ average.T @ inverse
        np.testing.assert_allclose(found[variate], expected, atol=1e-6)
        np.testing.assert_allclose(found[variate] @ average, np.eye(horizon), atol=1e-6)  # agreeing forecasts stay


def test_structural_weights_are_those_of_a_tree_of_sums() -> None:
    """The same forecasts as sums over a tree, by the code for hierarchies of series."""
    tree = {"all": ["first", "second"], "first": ["0", "1", "2"], "second": ["3", "4", "5"]}
    hierarchy = build_hierarchy(HierarchyConfig(children=tree), tuple("012345"))
    size = {"all": 6, "first": 3, "second": 3}
    base = {name: np.random.default_rng(place).normal() for place, name in enumerate(hierarchy.nodes)}
    sums = np.array([base[name] * size.get(name, 1) for name in hierarchy.nodes])
    expected = make_reconciliation(ReconcileConfig(method="wls_structural"), hierarchy).samples(sums[None, None])[0, 0]
    variances = [torch.full((1, 6 // k), 1.0 / k, dtype=torch.float64) for k in (1, 3, 6)]
    bins = np.array([base[name] for name in (*"012345", "first", "second", "all")])
    found = reconciler((1, 3, 6), 6, variances)[0].double().numpy() @ bins
    np.testing.assert_allclose(found, [expected[hierarchy.nodes.index(name)] for name in "012345"], atol=1e-6)


def test_forecast_is_the_weighted_agreement_of_the_members() -> None:
    model = make(widths=[1, 3])
    model.solve(make_series(SPEC))
    batch = doubles(make_batch(SPEC, gaps=0.1))
    steps = model.members[0](batch._replace(target=None, target_mask=None)).raw[..., 0]
    context, mask = [], []
    for place in range(4):  # 14 steps hold four bins of three; the first two steps are left out
        rows = slice(2 + 3 * place, 5 + 3 * place)
        seen = batch.context_mask[:, rows].all(1)
        context.append(torch.where(seen, batch.context[:, rows].mean(1), 0.0))
        mask.append(seen)
    wide = model.members[1](Batch(torch.stack(context, 1), torch.stack(mask, 1))).raw[..., 0]
    both = torch.cat([steps, wide], dim=1)
    expected = torch.stack([both[..., v] @ model.gather[v].double().T for v in range(2)], dim=-1)
    torch.testing.assert_close(model(batch).raw[..., 0], expected)
    torch.testing.assert_close(torch.stack(list(model.components(batch).values())).sum(0), expected)


def test_every_phase_of_every_series_becomes_a_series_of_bins() -> None:
    values = torch.arange(16.0, dtype=torch.float64).view(16, 1)
    mask = torch.ones(16, 1, dtype=torch.bool)
    mask[4] = False
    data = TrainingSeries(
        values, mask, torch.tensor([0, 9, 16]), torch.tensor([5, 2]), known=values, static=torch.tensor([[7.0], [8.0]])
    )
    found = binned_series(data, 4)
    parts = []
    for first, last in ((0, 9), (9, 16)):
        for phase in range(4):
            starts = range(first + phase, last - 3, 4)
            parts.append([(sum(range(s, s + 4)) / 4, all(row != 4 for row in range(s, s + 4))) for s in starts])
    assert found.indptr.tolist() == np.cumsum([0, *map(len, parts)]).tolist()
    flat = [cell for part in parts for cell in part]
    assert found.mask[:, 0].tolist() == [seen for _, seen in flat]
    assert found.values[:, 0].tolist() == [mean if seen else 0.0 for mean, seen in flat]
    assert found.known is not None
    assert found.known[:, 0].tolist() == [mean for mean, _ in flat]
    assert found.static is not None
    assert found.static[:, 0].tolist() == [7.0] * 4 + [8.0] * 4


def test_weights_are_training_errors_of_each_bin_and_variate() -> None:
    model, data = make(widths=[1, 3]), make_series(SPEC)
    report = model.solve(data)
    assert report is not None
    assert report.finished
    errors = []
    for width, member in zip((1, 3), model.members, strict=True):
        assert isinstance(member, Linear)
        error = training_error(member, binned_series(data, width))
        assert error is not None
        errors.append(error.T.square())
    torch.testing.assert_close(model.gather, reconciler((1, 3), 6, errors).double())
    flat = make(widths=[1, 3], weights="structural")
    flat.solve(data)
    structural = [torch.ones(2, 6), torch.full((2, 2), 1 / 3)]
    torch.testing.assert_close(flat.gather, reconciler((1, 3), 6, structural).double())


def test_shares_of_the_widths_sum_to_one() -> None:
    model = make()
    model.solve(make_series(SPEC))
    shares = model.explain()["shares"]
    assert [record["width"] for record in shares if record["variate"] == 0] == [1, 2, 3, 6]
    for variate in range(2):
        assert sum(record["share"] for record in shares if record["variate"] == variate) == pytest.approx(1, abs=1e-5)


def test_trained_members_keep_structural_weights_and_cannot_have_others() -> None:
    model = make(member={"name": "dlinear", "kernel": 3})
    before = model.gather.clone()
    assert model.solve(make_series(SPEC)) is None
    assert torch.equal(model.gather, before)
    with pytest.raises(ModelError, match="needs members fitted in closed form"):
        make(member={"name": "dlinear", "kernel": 3}, weights="variance").solve(make_series(SPEC))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": [2, 3]}, "1 among them"),
        ({"widths": [1, 1]}, "different"),
        ({"member": "ar_net"}, "counts time in steps"),
        ({"member": {"name": "regenn", "attend": "entities"}}, "couples the series"),
        ({"member": "committee"}, "made of several models"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TemporalConfig, settings)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("plrnn", "trained on its targets"),
        ({"name": "s4", "head": "rollout"}, "trained on the steps of its context"),
        ({"name": "chimera", "reconstruct": True, "skip": "none"}, "trained on the steps of its context"),
    ],
)
def test_members_that_bins_cannot_train_whole_forecast_where_they_are_stored_and_are_not_fitted(
    member: Any, message: str
) -> None:
    model = make(member=member, widths=[1, 2])
    assert model(doubles(make_batch(SPEC))).raw.shape == (*make_batch(SPEC).context.shape[:1], 6, 2, 1)
    with pytest.raises(ConfigError, match=message):
        model.solve(make_series(SPEC))
    with pytest.raises(ConfigError, match=message):
        check_settings(load(FitConfig, "fit", ["data.name=x"]).model_copy(update={"model": model.config}))


def test_losses_of_members_count_on_average() -> None:
    """A member that is trained on more than its forecast is trained on that in its bins as well."""
    loop = {"name": "chimera", "d_model": 8, "d_state": 4, "decoder": "closed_loop", "directions": "forward"}
    model = make(member={**loop, "num_layers": 1, "normalisation": "none", "skip": "none"}, widths=[1, 2]).train()
    batch = doubles(make_batch(SPEC))
    torch.manual_seed(0)
    found = model(batch).aux_losses
    torch.manual_seed(0)
    own = [member(binned(batch, k, SPEC)).aux_losses for k, member in zip((1, 2), model.members, strict=True)]
    assert found is not None
    assert found.keys() == own[0].keys() == {"open_loop", "next_input"}
    for name, loss in found.items():
        torch.testing.assert_close(loss, (own[0][name] + own[1][name]) / 2)
    assert model.eval()(batch).aux_losses is None


def test_members_hear_of_the_progress_of_training() -> None:
    model, heard = make(), []
    for member in model.members:
        member.anneal = heard.append
    model.anneal(0.25)
    assert heard == [0.25] * len(model.members)


@pytest.mark.parametrize(("context", "width"), [(14, 4), (14, 30), (4, 6)])
def test_bins_that_do_not_fit_are_refused(context: int, width: int) -> None:
    spec = DataSpec(context_length=context, horizon=6, num_variates=1)
    with pytest.raises(ModelError, match=f"bins of {width} steps do not fill a horizon of 6 or exceed the context of"):
        make(spec, widths=[1, width])


def test_composes_from_the_command_line() -> None:
    config = load(FitConfig, "fit", ["model=temporal", "model.widths=[1,4]", "model.member.ridge=3", "data.name=x"])
    assert isinstance(config.model, TemporalConfig)
    assert (config.model.widths, config.model.member.ridge) == ((1, 4), 3.0)
