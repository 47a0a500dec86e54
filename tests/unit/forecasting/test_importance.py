"""Permutation importance: what a model does not read is worth nothing, what it reads is worth what it explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from explained_data import changed, hours, with_covariates

from tsforge.artifact import Artifact
from tsforge.contracts.tensors import Batch
from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.frame import SeriesFrame
from tsforge.data.windows import WindowSpec
from tsforge.forecasting import importance as module
from tsforge.forecasting.baselines import fit_solved
from tsforge.forecasting.importance import EVERY, ImportanceConfig, permutation_importance
from tsforge.network import NetworkConfig

Make = Callable[..., Artifact]


def config(**settings: Any) -> ImportanceConfig:
    return validate(ImportanceConfig, {"cutoffs": 30, "repeats": 3, **settings})


def value(table: pl.DataFrame, **match: Any) -> float:
    rows = table.filter(**match)
    assert rows.height == 1
    return float(rows["importance"][0])


def test_a_seasonal_naive_reads_its_own_last_season_only(frame: SeriesFrame, make_artifact: Make) -> None:
    artifact = make_artifact({"name": "seasonal_naive", "season_length": 24}, context_length=48)
    table = permutation_importance(artifact, frame, config(lags=(24,)), start=250)
    assert value(table, source="y", lags="1-24", variate="y") > 0.5
    assert value(table, source="y", lags="25-48", variate="y") == 0.0
    assert value(table, source="z", lags="1-24", variate="y") == 0.0
    assert table.row(0, named=True)["variate"] in (EVERY, "y", "z")
    whole = table.filter(variate=EVERY, lags="1-24")["importance"]
    assert table["importance"][0] == pytest.approx(whole.max())


def test_a_covariate_that_explains_all_beats_one_that_is_noise() -> None:
    data = with_covariates()
    noise = np.random.default_rng(9).normal(size=data.num_rows)
    table = data.table.with_columns(noise=pl.Series(noise))
    both = SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"], known=["promo", "noise"])
    plain = {"model": {"name": "ar_net", "lags": 4}, "likelihood": {"name": "point"}}
    artifact = fit_solved(
        both.until(hours(299)), validate(NetworkConfig, plain), WindowSpec(context_length=8, horizon=3)
    )
    found = permutation_importance(artifact, both, config(), start=300, stop=400)
    assert value(found, source="promo", variate="y") > 10.0
    assert abs(value(found, source="noise", variate="y")) < 0.2
    assert found.row(0, named=True)["source"] == "promo"


def test_errors_equal_a_naive_loop(frame: SeriesFrame, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed exchange (every window takes its input from the one before) the error is worked out by hand."""
    artifact = make_artifact("linear", context_length=24, horizon=4)

    def previous(groups: list[Any], count: int, random: Any) -> Any:
        source = np.arange(count)
        for group in groups:
            source[group] = np.roll(group, 1)
        return source

    monkeypatch.setattr(module, "_order", previous)
    one = frame.select_series(["a"])
    found = permutation_importance(artifact, one, config(repeats=1, cutoffs=6), start=300, stop=360)
    values = one.table.select("y", "z").to_numpy()
    firsts = np.unique(np.linspace(300, 356, 6).round().astype(int))
    network, errors, base = artifact.network, [], []
    for index, first in enumerate(firsts):
        window, other = values[first - 24 : first].copy(), values[firsts[index - 1] - 24 : firsts[index - 1]]
        for store, change in ((base, False), (errors, True)):
            inputs = window.copy()
            if change:
                inputs[:, 1] = other[:, 1] - other[:, 1].mean() + window[:, 1].mean()
            context = torch.tensor(inputs, dtype=torch.float32)[None]
            batch = Batch(context=context, context_mask=torch.ones_like(context, dtype=torch.bool),
                          series_index=torch.tensor([0]), cutoff_index=torch.tensor([int(first)]))  # fmt: skip
            store.append(np.abs(network.predict(batch).mean[0].numpy() - values[first : first + 4]))
    row = found.filter(source="z", variate="z").row(0, named=True)
    assert row["windows"] == 6
    assert row["error"] == pytest.approx(np.mean(errors, axis=(0, 1))[1], rel=1e-4)
    assert row["base_error"] == pytest.approx(np.mean(base, axis=(0, 1))[1], rel=1e-4)
    assert row["importance"] == pytest.approx(row["error"] / row["base_error"] - 1, rel=1e-6)


def test_windows_take_from_their_own_series_and_never_from_themselves() -> None:
    groups = [np.arange(0, 5), np.arange(5, 12), np.array([12])]
    for seed in range(20):
        source = module._order(groups, 13, np.random.default_rng(seed))
        assert sorted(source) == list(range(13))
        assert (source[:12] != np.arange(12)).all()
        assert source[12] == 12
        assert set(source[:5]) == set(range(5))


def test_gaps_move_with_the_values_and_the_level_stays() -> None:
    context = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [0.0, 5.0]], [[20.0, 6.0], [0.0, 6.0], [26.0, 6.0]]])
    mask = context != 0
    batch = Batch(context=context, context_mask=mask)
    item = module._Input(kind="target", name="y", places=(0,), lags="1-3", span=slice(None))
    found = module._exchange(batch, item, np.array([1, 0]))
    assert found.context_mask[:, :, 0].tolist() == mask.flip(0)[:, :, 0].tolist()
    assert found.context[:, :, 0].tolist() == [[-1.0, 0.0, 5.0], [22.0, 24.0, 0.0]]  # means 2 and 23 stay
    assert found.context[:, :, 1].equal(context[:, :, 1])
    half = module._exchange(
        batch, module._Input(kind="target", name="y", places=(0,), lags="1", span=slice(2, 3)), np.array([1, 0])
    )
    assert half.context[0, :, 0].tolist() == [1.0, 3.0, 5.0]
    assert half.context_mask[0, :, 0].tolist() == [True, True, True]


def test_coupled_series_change_together() -> None:
    rows = module._groups(np.array([0, 1, 2] * 4), np.arange(4), 3, coupled=True)
    source = module._order(rows, 12, np.random.default_rng(1)).reshape(4, 3)
    assert (source % 3 == np.arange(3)).all(), "a series took from another one"
    assert (source // 3 == (source // 3)[:, :1]).all(), "series of one cutoff took from different ones"


def test_rows_outside_the_span_do_not_matter(frame: SeriesFrame, make_artifact: Make) -> None:
    artifact = make_artifact("linear")
    before = permutation_importance(artifact, frame.select_series(["a"]), config(), start=250, stop=330)
    later = changed(frame, "a", "y", 330, 399, 1e6).select_series(["a"])
    assert before.equals(permutation_importance(artifact, later, config(), start=250, stop=330))
    inside = changed(frame, "a", "y", 320, 320, 1e6).select_series(["a"])
    assert not before.equals(permutation_importance(artifact, inside, config(), start=250, stop=330))


def test_the_same_seed_gives_the_same_table(frame: SeriesFrame, make_artifact: Make) -> None:
    artifact = make_artifact("linear")
    first, again, other = (permutation_importance(artifact, frame, config(seed=seed), start=250) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize("lags", [(0,), (5, 5), (9, 3), (48,)])
def test_borders_must_ascend_inside_the_context(frame: SeriesFrame, make_artifact: Make, lags: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending borders between 1 and 47"):
        permutation_importance(make_artifact("linear"), frame, config(lags=lags), start=250)


def test_one_window_cannot_be_exchanged(frame: SeriesFrame, make_artifact: Make) -> None:
    one = frame.select_series(["a"])
    with pytest.raises(DataError, match="two windows"):
        permutation_importance(make_artifact("linear"), one, config(), start=394, stop=400)


def test_too_many_cells_are_refused(frame: SeriesFrame, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CELLS", 10)
    with pytest.raises(ConfigError, match="choose fewer cutoffs"):
        permutation_importance(make_artifact("linear"), frame, config(), start=250)


def gappy(level: float) -> tuple[SeriesFrame, Artifact]:
    """One series about ``level``, observed in 30 of every 60 rows, and a linear model that was fitted without gaps."""
    noise = np.random.default_rng(4).normal(size=600)
    values = np.zeros(600)
    for row in range(1, 600):
        values[row] = 0.9 * values[row - 1] + noise[row]
    table = pl.DataFrame({"series_id": "a", "time": [hours(row) for row in range(600)], "y": level + values})
    whole = SeriesFrame.from_long(table, time="time", series_id="series_id", targets=["y"])
    plain = {"model": {"name": "linear"}, "likelihood": {"name": "point"}}
    artifact = fit_solved(
        whole.until(hours(299)), validate(NetworkConfig, plain), WindowSpec(context_length=12, horizon=3)
    )
    seen = pl.int_range(pl.len()) % 60 < 30
    holes = table.with_columns(y=pl.when(seen).then(pl.col("y")))
    return SeriesFrame.from_long(holes, time="time", series_id="series_id", targets=["y"]), artifact


def test_windows_without_a_history_of_their_own_neither_exchange_nor_are_graded() -> None:
    def own(level: float) -> dict[str, Any]:
        frame, artifact = gappy(level)
        found = permutation_importance(artifact, frame, config(cutoffs=200), start=300)
        return found.filter(kind="target", variate="y").row(0, named=True)

    found, about_zero = own(1000.0), own(0.0)
    assert found["error"] < 10.0, "a window was moved to the level 0"
    assert found["base_error"] < 10.0, "a window that has seen nothing is graded"
    assert 100 < found["windows"] < 200
    assert found["windows"] == about_zero["windows"]
    assert found["importance"] == pytest.approx(about_zero["importance"], rel=0.05)


def test_an_input_without_any_history_has_no_importance_and_others_keep_theirs() -> None:
    data = with_covariates()
    plain = {"model": {"name": "ar_net", "lags": 4}, "likelihood": {"name": "point"}}
    artifact = fit_solved(
        data.until(hours(299)), validate(NetworkConfig, plain), WindowSpec(context_length=8, horizon=3)
    )
    seen = pl.col("time") >= pl.lit(hours(320)).dt.replace_time_zone("UTC")
    blind = SeriesFrame(data.table.with_columns(y=pl.when(seen).then(pl.col("y"))), data.schema)
    found = permutation_importance(artifact, blind, config(), start=317, stop=323)
    own = found.filter(kind="target", variate="y").row(0, named=True)
    assert (own["importance"], own["error"], own["base_error"], own["windows"]) == (None, None, None, 0)
    assert value(found, source="promo", variate="y") > 1.0
