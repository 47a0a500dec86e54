"""Warnings that are told once."""

from __future__ import annotations

import logging

import pytest

from tsforge.core.logs import get_logger, warned_once


def test_each_kind_of_warning_is_told_once_and_only_while_asked(caplog: pytest.LogCaptureFixture) -> None:
    named, other = get_logger("tsforge.made.one"), get_logger("tsforge.made.other")
    with caplog.at_level(logging.INFO, logger="tsforge"):
        with warned_once("tsforge.made.one"):
            for count in range(3):
                named.warning("%d of %d rows are odd", count, 9)
                named.info("fit %d", count)
                other.warning("%d of %d rows are odd", count, 9)
            named.warning("something else")
        named.warning("%d of %d rows are odd", 3, 9)
    told = [record.getMessage() for record in caplog.records if record.name == named.name]
    assert told == ["0 of 9 rows are odd", "fit 0", "fit 1", "fit 2", "something else", "3 of 9 rows are odd"]
    assert sum(record.name == other.name for record in caplog.records) == 3
