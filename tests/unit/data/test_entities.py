"""Which series are held out: by share, by name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tsforge.core.config import validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.entities import EntityConfig, choose_held_out

IDS = tuple(f"station{number:02d}" for number in range(20))


def chosen(ids: tuple[str, ...] = IDS, **settings: Any) -> tuple[str, ...]:
    return choose_held_out(validate(EntityConfig, settings), ids)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 4), (0.24, 5), (0.025, 1), (0.97, 19)])
def test_a_share_is_rounded_to_whole_series(share: float, count: int) -> None:
    found = chosen(held_out=share)
    assert len(found) == len(set(found)) == count
    assert list(found) == sorted(found)
    assert set(found) <= set(IDS)


def test_the_draw_depends_on_seed_and_ids_only() -> None:
    assert chosen(held_out=0.3, seed=1) == chosen(held_out=0.3, seed=1)
    assert len({chosen(held_out=0.3, seed=seed) for seed in range(5)}) > 1
    assert set(chosen(IDS[::-1], held_out=0.3)) == set(chosen(held_out=0.3))
    # of twice the series about twice as many are drawn; none of the first draw comes back into the fit by the new ones
    more = tuple(f"other{number}" for number in range(20))
    drawn, before = set(chosen(IDS + more, held_out=0.5)), set(chosen(held_out=0.5))
    old = drawn & set(IDS)
    assert old <= before or before <= old


def test_series_can_be_named() -> None:
    assert chosen(held_out=["station07", "station03"]) == ("station03", "station07")
    assert chosen(("1", "2", "3"), held_out=[2]) == ("2",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 1.0}, "share must be at least 0 and below 1"),
        ({"held_out": -0.1}, "share must be at least 0 and below 1"),
        ({"held_out": "north"}, r"list of series such as \[north,south\]"),
        ({"held_out": True}, "held_out: it is a number, not true or false"),
        ({"held_out": ["a", "b", "a"]}, "names a twice"),
        ({"seed": 3}, "seed has no effect unless held_out is a share"),
        ({"seed": 3, "held_out": ["a"]}, "seed has no effect"),
        ({"watch": "unseen_valid"}, "watch 'unseen_valid' needs series that are held out"),
        ({"watch": "unseen_train", "held_out": []}, "needs series that are held out"),
        ({"watch": "unseen"}, "watch"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(EntityConfig, settings)


@pytest.mark.parametrize(
    ("ids", "held_out", "message"),
    [
        (IDS, ["station3", "x"], r"2 series that the data lacks \(station3, x; did you mean 'station\d+'\?\)"),
        (IDS, list(IDS), "all 20 series are held out"),
        (IDS, 0.01, "0.01 of 20 series leaves none to hold out; choose a share that is worth 1 to 19 of them"),
        (IDS, 0.99, "0.99 of 20 series leaves none to fit on"),
        (("only",), 0.5, r"one series \(only\), so none can be held out"),
        (("only",), ["only"], r"one series \(only\)"),
    ],
)
def test_what_the_data_cannot_give_is_refused(ids: tuple[str, ...], held_out: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chosen(ids, held_out=held_out)
