"""Roles of columns."""

from __future__ import annotations

from typing import Any

import pytest

from tsforge.core.errors import ConfigError
from tsforge.data.schema import SeriesSchema


def test_columns_come_in_the_order_of_dense_arrays() -> None:
    schema = SeriesSchema(targets=("b", "a"), past=("p",), known=("k",), static=("s",), freq="60m")
    assert schema.columns == ("b", "a", "p", "k")
    assert schema.freq == "1h"
    assert not schema.has_integer_time


def test_schemas_survive_plain_types() -> None:
    schema = SeriesSchema(targets=("a",), known=("k",), freq="2i")
    assert SeriesSchema.from_dict(schema.to_dict()) == schema
    assert schema.has_integer_time


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ()}, "no target"),
        ({"targets": "temp"}, "list of column names"),
        ({"targets": ("a",), "known": ("a",)}, "a have more than one role"),
        ({"targets": ("a",), "static": ("a",)}, "more than one role"),
        ({"targets": ("time",)}, "reserved"),
        ({"targets": ("a",), "freq": "often"}, "not a frequency"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeriesSchema(**{"freq": "1h", **values})


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="target"):
        SeriesSchema.from_dict({"target": ["a"], "freq": "1h"})
