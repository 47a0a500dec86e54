from __future__ import annotations

import pytest

from tsforge.core.config import Config, search_space, tunable, validate
from tsforge.core.errors import ConfigError
from tsforge.tuning.config import SpaceOverride, TuneConfig
from tsforge.tuning.space import Choice, Range, Space, build_space


class ModelPart(Config):
    lags: int = tunable(24, low=2, high=96)
    ridge: float = tunable(1e-3, low=1e-6, high=1.0, log=True)
    kind: str = tunable("linear", choices=["linear", "mlp"])
    hidden: tuple[int, ...] = tunable((64,), choices=[[64], [64, 64]])


class Job(Config):
    model: ModelPart = ModelPart()
    learning_rate: float = 1e-3
    num_layers: int = 2
    optimizer: str = "adam"


CURRENT = {
    "model.lags": 24,
    "model.ridge": 1e-3,
    "model.kind": "linear",
    "model.hidden": [64],
    "learning_rate": 1e-3,
    "num_layers": 2,
    "optimizer": "adam",
}


def space_of(overrides: dict[str, object]) -> Space:
    config = validate(TuneConfig, {"name": "t", "space": overrides})
    return build_space(search_space(Job()), config.space, CURRENT)


def test_declared_spaces_are_used_as_they_stand() -> None:
    assert space_of({}) == {
        "model.lags": Range(2, 96, False, True),
        "model.ridge": Range(1e-6, 1.0, True, False),
        "model.kind": Choice(("linear", "mlp")),
        "model.hidden": Choice(([64], [64, 64])),
    }


def test_a_space_can_be_narrowed_replaced_left_out_and_added() -> None:
    space = space_of(
        {
            "model.lags": {"high": 48},
            "model.ridge": {"choices": [0.0, 0.1]},
            "model.kind": None,
            "model.hidden": False,
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "num_layers": {"low": 1, "high": 4},
            "optimizer": {"choices": ["adam", "sgd"]},
        }
    )
    assert space == {
        "model.lags": Range(2, 48, False, True),
        "model.ridge": Choice((0.0, 0.1)),
        "learning_rate": Range(1e-4, 1e-2, True, False),
        "num_layers": Range(1, 4, False, True),
        "optimizer": Choice(("adam", "sgd")),
    }


def test_nested_keys_as_overrides_make_them_mean_the_dotted_field() -> None:
    assert space_of({"model.lags": {"low": 4}, "model": {"lags": {"high": 8}}})["model.lags"] == Range(
        4, 8, False, True
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.lagz": {"low": 1}}, "model.lagz: the configuration has no such field; did you mean 'model.lags'"),
        ({"model": {"lagz": None}}, "model.lagz: the configuration has no such field"),
        ({"model.lags": {"low": 97}}, "low 97 is above high 96"),
        ({"model.lags": {"low": 2.5}}, "whole numbers"),
        ({"model.ridge": {"low": 0.0}}, "logarithmic range needs low above 0"),
        ({"learning_rate": {"low": 1e-4}}, "needs both low and high"),
        ({"optimizer": {"low": 1, "high": 2}}, "no number; give choices"),
        ({"model.lags": {"low": 1, "choices": [1]}}, "either choices, or low"),
        ({"model.lags": {"choices": [4, 4]}}, "listed twice"),
        ({"model.lags": {"lo": 1}}, "unknown key"),
        (dict.fromkeys(("model.lags", "model.ridge", "model.kind", "model.hidden")), "nothing to search"),
    ],
)
def test_a_wrong_space_is_refused_with_its_place(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(overrides)
    assert message in str(caught.value) or "lo" in overrides.get("model.lags", {})  # type: ignore[operator]


def test_ends_are_what_may_be_drawn() -> None:
    assert repr(Range(2, 96, False, True).ends) == "(2, 96)"
    assert repr(Range(1, 5, True).ends) == "(1.0, 5.0)"


def test_values_survive_the_store_and_outside_values_are_recognised() -> None:
    whole, real = Range(2, 96, False, True), Range(0.0, 1.0)
    assert (whole.encode(5), whole.encode(5.0), whole.encode(5.5), whole.encode(1), whole.encode(True)) == (
        5,
        5,
        None,
        None,
        None,
    )
    assert (real.encode(1), real.encode("1")) == (1.0, None)
    choice = Choice(([64], [64, 64], None, "a"))
    assert [choice.decode(choice.encode(value)) for value in ([64], (64, 64), None, "a")] == [[64], [64, 64], None, "a"]
    assert choice.encode([1]) is None


def test_a_default_that_is_no_number_begins_with_what_stands_for_it() -> None:
    class Shy(Config):
        ridge: float | str = tunable("usual", low=1.0, high=1e3, log=True, stand_in=100.0)

    space = build_space(search_space(Shy), {}, {"ridge": "usual"})["ridge"]
    assert isinstance(space, Range)
    assert (space.encode("usual"), space.encode(7.0), space.encode("other"), space.encode(1e4)) == (
        100.0,
        7.0,
        None,
        None,
    )
    assert space.describe() == Range(1.0, 1e3, True).describe()  # studies of before go on
    narrow = build_space(search_space(Shy), {"ridge": SpaceOverride(high=50.0)}, {"ridge": "usual"})["ridge"]
    assert narrow.encode("usual") is None
