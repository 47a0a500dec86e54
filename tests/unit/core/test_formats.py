"""Versions of stored formats: known ones pass, damaged and newer ones are told apart."""

from __future__ import annotations

import pytest

from tsforge.core.errors import ArtifactError, BackendError
from tsforge.core.formats import check_version, version_in_text


@pytest.mark.parametrize("found", [1, 3])
def test_known_versions_pass(found: int) -> None:
    assert check_version(found, 3, what="x") == found


@pytest.mark.parametrize("found", [0, -5, True, "1", "x", "", 1.0, None, [1]])
def test_what_is_no_version_is_damaged_not_newer(found: object) -> None:
    with pytest.raises(ArtifactError, match=r"^the file is damaged: .*no valid format version.*; copy it again$"):
        check_version(found, 3, what="the file", remedy="copy it again")


def test_a_newer_version_asks_for_an_upgrade() -> None:
    with pytest.raises(
        BackendError, match=r"newer tsforge \(store format 4, this one reads up to 3\); upgrade tsforge"
    ):
        check_version(4, 3, what="the store", kind="store format", error=BackendError)


def test_versions_in_text() -> None:
    assert [version_in_text(text) for text in ("1", "12", "0")] == [1, 12, 0]
    for text in ("abc", "", "-1", "1.0", "9" * 20):
        assert version_in_text(text) == text
