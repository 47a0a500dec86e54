"""Atomic writes: the old content or the new, never a mixture, never a leftover."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from tsforge.core import atomic
from tsforge.core.atomic import atomic_directory, atomic_file, remove_leftovers
from tsforge.core.errors import BackendError


def test_file_is_replaced_and_no_temporary_is_left(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        assert target.read_text(encoding="utf-8") == text
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_file_keeps_its_content_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="boom"), atomic_file(target) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("boom")
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.txt", ".hidden", "b.tmp"):
        (tmp_path / name).write_text("kept", encoding="utf-8")
    killed = atomic_file(tmp_path / "a.txt")
    killed.__enter__()  # and never ended
    assert len(list(tmp_path.iterdir())) == 4
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.txt", "b.tmp"]


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(BackendError, match="No space left"), atomic_file(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_clear_error_when_polars_writes(tmp_path: Path) -> None:
    """polars calls the system by its own means: its error is none of Python's."""
    rows = pl.DataFrame({"a": [1.0]})
    told = r"cannot write .*a\.parquet: No space left on device; nothing was changed"
    with pytest.raises(BackendError, match=told), atomic_file(tmp_path / "a.parquet"):
        rows.write_parquet("/dev/full")
    with pytest.raises(BackendError, match="No space left"), atomic_directory(tmp_path / "folder"):
        rows.write_csv("/dev/full")
    with pytest.raises(pl.exceptions.ColumnNotFoundError), atomic_file(tmp_path / "b.parquet"):
        rows.select("b")  # a mistake is not the disk's
    assert list(tmp_path.iterdir()) == []


def test_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file, not a folder", encoding="utf-8")
    with pytest.raises(BackendError, match="nothing was changed"), atomic_file(tmp_path / "blocked" / "a.txt"):
        pytest.fail("must not get here")


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert (target / "a").read_text(encoding="utf-8") == "1"
    with pytest.raises(BackendError, match="exists already"), atomic_directory(target):
        pytest.fail("must not get here")
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "b").write_text("2", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders change names in one step on Linux")
def test_an_existing_folder_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail("two renames leave a moment without the folder"))
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "b").write_text("2", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged in one step."""
    target, rename = tmp_path / "out", os.rename
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")

    def failing(source: Path, name: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, name)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BackendError, match="nothing was changed"), atomic_directory(target, replace=True) as temporary:
        (temporary / "b").write_text("2", encoding="utf-8")
    assert [path.name for path in target.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directory_disappears_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as temporary:
        (temporary / "a").write_text("1", encoding="utf-8")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old" * 1000, encoding="utf-8")
    script = (
        "import sys, pathlib\nfrom tsforge.core.atomic import atomic_file\n"
        "while True:\n"
        "    with atomic_file(pathlib.Path(sys.argv[1])) as temporary:\n"
        "        temporary.write_text('new' * 1000)\n"
    )
    for delay in (0.3, 0.35, 0.41):
        process = subprocess.Popen([sys.executable, "-c", script, str(target)])
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        assert target.read_text(encoding="utf-8") in ("old" * 1000, "new" * 1000)
