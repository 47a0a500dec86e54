"""The conformance checks are worth something: each catches models that were broken for it; the honest one passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import saboteurs as broken

from tsforge.contracts.tensors import TrainingSeries
from tsforge.testing import models as suite

CAUGHT: list[tuple[suite.Check, type[broken.Honest], str]] = [
    (suite.check_config, broken.ForgetfulConfig, "changes when it is written"),
    (suite.check_config, broken.AcceptsAnything, "unknown setting is accepted"),
    (suite.check_shapes, broken.FlatOutput, "raw has shape"),
    (suite.check_shapes, broken.BlindDivision, "not finite with a share of 100%"),
    (suite.check_target_unused, broken.Peeks, "reads the target"),
    (suite.check_rows, broken.BatchMean, "differently alone"),
    (suite.check_rows, broken.FirstRow, "order of rows"),
    (suite.check_covariates, broken.IgnoresCovariates, "covariates are ignored"),
    (suite.check_covariates, broken.IgnoresOneCovariate, "some declared known"),
    (suite.check_gradients, broken.DeadWeight, "unused receives no gradient"),
    (suite.check_gradients, broken.InfiniteGradient, "gradient of gate is not finite"),
    (suite.check_gradients, broken.SaysUntrainable, "declared untrainable"),
    (suite.check_overfit, broken.CutGraph, "of the variance"),
    (suite.check_seeds, broken.OwnSeed, "another seed gives the same"),
    (suite.check_seeds, broken.Clockwork, "same seed gives other"),
    (suite.check_artifact, broken.HiddenState, "the loaded model"),
    (suite.check_dtypes, broken.AlwaysSingle, "float64 in"),
    (suite.check_dtypes, broken.RoundsOff, "float32 and float64"),
    (suite.check_recurrent, broken.WrongStep, "step by step"),
    (suite.check_recurrent, broken.WrongWarmUp, "warmed up"),
    (suite.check_units, broken.PartsMissing, "do not sum"),
    (suite.check_hooks, broken.CountsTwice, "preparing twice"),
    (suite.check_hooks, broken.AnnealsWeights, "changes weights"),
    (suite.check_context_outputs, broken.UndeclaredContext, "context_outputs undeclared"),
    (suite.check_context_outputs, broken.LongContext, "covers 20 of 16 steps"),
    (suite.check_skill, broken.LastValueOnly, "seasonal naive"),
    (suite.check_source, broken.NoPaper, "names no paper"),
    (suite.check_explained, broken.CutInputs, "contributions miss the forecast"),
]


@pytest.mark.parametrize(
    ("check", "saboteur", "message"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1].__name__}") for case in CAUGHT],
)
def test_check_catches_its_saboteur(check: suite.Check, saboteur: type[broken.Honest], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(saboteur, {})


@pytest.mark.parametrize("check", [pytest.param(check, id=check.__name__) for check in suite.CHECKS])
def test_the_honest_model_passes(check: suite.Check) -> None:
    check(broken.Honest, {})


def test_mask_check_catches_a_closed_form_that_reads_hidden_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network wipes hidden cells, so the leak needs a side door: the saboteur gets the span as it was given."""
    original: Callable[..., object] = suite.ForecastNetwork.solve

    def solve(self: suite.ForecastNetwork, data: TrainingSeries) -> object:
        broken.SolvesOnGaps.unmasked = data
        return original(self, data)

    monkeypatch.setattr(suite.ForecastNetwork, "solve", solve)
    with pytest.raises(AssertionError, match="hidden values change"):
        suite.check_mask(broken.SolvesOnGaps, {})


def test_unit_check_catches_a_level_in_data_units(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., object] = suite.ForecastNetwork.solve

    def solve(self: suite.ForecastNetwork, data: TrainingSeries) -> object:
        broken.FixedLevel.raw_level = float(data.values.mean())
        return original(self, data)

    monkeypatch.setattr(suite.ForecastNetwork, "solve", solve)
    with pytest.raises(AssertionError, match="another unit"):
        suite.check_units(broken.FixedLevel, {})


def test_every_check_has_a_saboteur() -> None:
    covered = {check for check, _, _ in CAUGHT} | {suite.check_mask, suite.check_units}
    assert covered == set(suite.CHECKS)


def test_saboteurs_leave_no_trace_in_the_registry() -> None:
    suite.check_artifact(broken.Honest, {})
    assert "saboteur" not in suite.MODELS.names()
