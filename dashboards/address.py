"""What a page keeps in its address: choices are read from it, and written to it once a run.

Every write to the address is an entry of the browser's history. So all of a run are one write, and an address that
differs from the one last written (a link, the Back button) wins over what the widgets of this visit remember.
"""

from __future__ import annotations

import re
from typing import Any

import streamlit as st

_KEPT = "address"  # the parameters as the page wants them
_SEEN = "address-seen"  # page and parameters that the browser had at the end of the last run
_NEWS = "address-news"


def begin(page: str) -> None:
    """Take up the address at the beginning of a run."""
    shown = st.query_params.to_dict()
    st.session_state[_NEWS] = st.session_state.get(_SEEN) != (page, shown)
    if st.session_state[_NEWS]:
        st.session_state[_KEPT] = dict(shown)


def end(page: str) -> None:
    """Write what the run chose, in one step.

    An older address of the same page, come back to, is left as it is: what it does not name is as on a first visit, and
    a further entry would lead the Back button here for ever.
    """
    shown, kept = st.query_params.to_dict(), st.session_state[_KEPT]
    earlier = st.session_state.get(_SEEN)
    is_return = st.session_state[_NEWS] and earlier is not None and earlier[0] == page
    if kept != shown and not is_return:
        st.query_params.from_dict(kept)
        shown = kept
    st.session_state[_SEEN] = (page, dict(shown))


def get(name: str, default: str = "") -> str:
    """Return a parameter."""
    return str(st.session_state.get(_KEPT, {}).get(name, default))


def put(name: str, value: str) -> None:
    """Set a parameter, with nothing to have none."""
    kept = st.session_state.setdefault(_KEPT, {})
    if value:
        kept[name] = value
    else:
        kept.pop(name, None)


def adopt(key: str, value: Any, *, valid: bool = True) -> None:
    """Give a widget the value that the address means, where the address is new or the widget has no ``valid`` one."""
    if st.session_state.get(_NEWS, True) or key not in st.session_state or not valid:
        st.session_state[key] = value


def is_news() -> bool:
    """Return whether the address came from outside: a link, a first visit, the Back button."""
    return bool(st.session_state.get(_NEWS, True))


def whole_number(text: str, least: int, most: int) -> int | None:
    """Return a number between two others as an address has it, None where it is none or lies outside."""
    if not re.fullmatch("[0-9]{1,9}", text):  # isdigit would take a superscript two
        return None
    return number if least <= (number := int(text)) <= most else None
