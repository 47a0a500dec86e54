"""The address of a page: read first, written once, and stronger than what the visit remembers."""

from __future__ import annotations

from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboards.address import whole_number

SCRIPT = """
import streamlit as st
from dashboards import address
from dashboards.state import choose, flag
written = []
plainly = type(st.query_params).from_dict
type(st.query_params).from_dict = lambda self, given: (written.append(dict(given)), plainly(self, given))[1]
address.begin("P")
choose("One", ["a", "b"], "one")
choose("Two", ["c", "d"], "two")
flag("Three", "three")
address.end("P")
type(st.query_params).from_dict = plainly
st.text(str(len(written)))
"""


def draw(**query: str) -> Any:
    test = AppTest.from_string(SCRIPT, default_timeout=60)
    for name, value in query.items():
        test.query_params[name] = value
    test.run()
    assert not test.exception
    return test


@pytest.mark.parametrize("text", ["²", "④", "-1", "+1", "1.0", "", " 1", "11", "9" * 30, "١"])
def test_only_plain_digits_in_range_are_a_number(text: str) -> None:
    assert whole_number(text, 0, 10) is None


def test_numbers_in_range_are_taken() -> None:
    assert [whole_number(text, 0, 10) for text in ("0", "07", "10")] == [0, 7, 10]


def test_all_choices_are_one_entry_of_the_history() -> None:
    page = draw()
    assert set(page.query_params) == {"one", "two"}
    assert page.text[0].value == "1"
    page.run()
    assert page.text[0].value == "0", "nothing new, no entry"
    page.selectbox(key="choice-two").set_value("d")
    page.toggle(key="choice-three").set_value(True).run()
    assert page.text[0].value == "1"
    assert set(page.query_params) == {"one", "two", "three"}


def test_an_address_come_back_to_wins_and_is_left_as_it_is() -> None:
    page = draw(two="d")
    page.selectbox(key="choice-one").set_value("b").run()
    page.query_params.clear()
    page.query_params["two"] = "d"
    page.run()
    assert [box.value for box in page.selectbox] == ["a", "d"]
    assert set(page.query_params) == {"two"}, "an entry more would lead the Back button here for ever"
    page.selectbox(key="choice-two").set_value("c").run()
    assert set(page.query_params) == {"one", "two"}
    assert [box.value for box in page.selectbox] == ["a", "c"]


def test_what_a_link_names_wrongly_is_told_once() -> None:
    page = draw(one="[x](http://evil.example)")
    assert "is not here" in page.warning[0].value
    assert "](http://" not in page.warning[0].value.replace("\\]", "")
    assert not page.run().warning


GONE = """
import streamlit as st
from dashboards import address
from dashboards.state import choose
address.begin("P")
results = st.session_state.get("results", ["a", "b"])
choose("Result", results, "result", lasting=True, damaged=st.session_state.get("damaged", ()))
choose("Part", [f"{results[0]} {number}" for number in range(2)], "part")
address.end("P")
"""


@pytest.mark.parametrize(("damaged", "why"), [((), "was removed"), (("a",), "was damaged")])
def test_a_result_that_was_shown_and_is_gone_is_told_once(damaged: tuple[str, ...], why: str) -> None:
    page = AppTest.from_string(GONE, default_timeout=60).run()
    assert not page.warning
    page.session_state["results"] = ["b"]
    page.session_state["damaged"] = damaged
    page.run()
    assert [note.value for note in page.warning] == [f"The result 'a', shown until now, {why}; showing another one."]
    assert page.query_params["result"] == "b"
    assert not page.run().warning
