"""Building kernels on first use: cached, safe against half-written and foreign files, and never more than a loss of
speed where it fails."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tsforge.core.errors import BackendError, ConfigError
from tsforge.ops import compiled

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in compiled._COMPILERS), reason="no C++ compiler here"
)

SOURCE = """
#include <cstdint>
#include "factor.h"
extern "C" void scale(float *x, int64_t count, double by, const float *shift) {
  for (int64_t i = 0; i < count; ++i) x[i] = FACTOR * by * x[i] + (shift ? *shift : 0.0f);
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the one kernel ``scale`` and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "scale.cpp").write_text(SOURCE)
    (folder / "factor.h").write_text("#define FACTOR 2\n")
    monkeypatch.setattr(compiled, "_SOURCES", folder)
    monkeypatch.setattr(compiled, "_outcomes", {})
    monkeypatch.setattr(compiled, "_told", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TSFORGE_COMPILED", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tsforge" / "compiled"


def stored(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in cache(tmp_path).iterdir())


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process loaded, as a new one would."""
    monkeypatch.setattr(compiled, "_outcomes", {})


def tripled() -> list[float]:
    x = torch.arange(3.0)
    compiled.call("scale", "scale", x, 3, 1.5, None)
    return x.tolist()


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake; exit 0; fi\n{script}\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_kernel_is_built_loaded_and_called(
    sources: Path, tmp_path: Path, logged: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.unavailable_reason("scale") is None
    x, shift = torch.arange(4.0), torch.tensor(0.5)
    compiled.call("scale", "scale", x[:3], 3, 1.5, shift)
    assert x.tolist() == [0.5, 3.5, 6.5, 3.0]
    assert tripled() == [0.0, 3.0, 6.0]
    (name,) = stored(tmp_path)
    assert name.startswith("scale-")
    assert name.endswith(".so")
    assert stat.S_IMODE(cache(tmp_path).stat().st_mode) == 0o700
    assert [record.getMessage() for record in logged] == ["compiling scale for this machine, once"]
    new_process(monkeypatch)
    assert compiled.unavailable_reason("scale") is None
    assert len(logged) == 1


@needs_compiler
def test_a_stored_kernel_is_not_compiled_again(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("built although it was there")

    assert compiled.unavailable_reason("scale") is None
    monkeypatch.setattr(compiled, "_build", never)
    new_process(monkeypatch)
    assert compiled.unavailable_reason("scale") is None
    assert tripled() == [0.0, 3.0, 6.0]
    monkeypatch.setattr(compiled, "_make", never)  # in one process not even the folder is looked at again
    assert compiled.unavailable_reason("scale") is None


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags", "compiler", "processor", "version"])
def test_whatever_shapes_the_code_makes_another_kernel(
    sources: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, command = sources / "scale.cpp", compiled._compiler()
    before = compiled._key(source, command)
    assert compiled._key(source, command) == before
    if change == "source":
        source.write_text(SOURCE + "// another\n")
    elif change == "header":
        (sources / "factor.h").write_text("#define FACTOR 3\n")
    elif change == "flags":
        monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DX"))
    elif change == "compiler":
        command = [fake_compiler(sources, "exit 1")]
    elif change == "processor":
        monkeypatch.setattr(compiled, "_processor", lambda: b"another")
    else:
        monkeypatch.setattr(compiled, "__version__", "0.0.0")
    assert compiled._key(source, command) != before


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; echo tail >&2; exit 1", "error: no such thing"),
        ("exit 1", "no message"),
        ("exec sleep 60", "no end after 0.3 s"),
        ('for last; do :; done; echo garbage > "$last"', "invalid ELF|too short|not a mach-o|slice"),
    ],
)
def test_a_broken_compiler_costs_one_warning(
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[logging.LogRecord],
    compiler: str,
    reason: str,
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, compiler))
    monkeypatch.setattr(compiled, "_SECONDS", 0.3)
    found = compiled.unavailable_reason("scale")
    assert found is not None
    assert re.search(reason, found)
    assert compiled.unavailable_reason("scale") == found
    warnings = [record for record in logged if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert found in warnings[0].getMessage()
    assert not [name for name in stored(tmp_path) if name.endswith(".part")]
    with pytest.raises(BackendError, match="kernel scale is not available"):
        tripled()


def test_a_machine_without_a_compiler_says_so(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in (compiled.unavailable_reason("scale") or "")
    new_process(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert compiled.unavailable_reason("scale") == "CXX=no-such-compiler -m64 is not a program"


def test_an_unknown_kernel_is_unavailable(sources: Path) -> None:
    assert "is missing from this installation" in (compiled.unavailable_reason("no_such_kernel") or "")


@needs_compiler
def test_a_compiler_that_knows_no_native_processor_builds_portable_code(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'for word; do if [ "$word" = -march=native ]; then echo "error: unknown" >&2; exit 1; fi; done'
    real = shutil.which(compiled._compiler()[0])
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'{refuse}\nexec {real} "$@"'))
    assert compiled.unavailable_reason("scale") is None
    assert tripled() == [0.0, 3.0, 6.0]


def test_off_builds_nothing(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert compiled.unavailable_reason("scale") == "TSFORGE_COMPILED=off"
    assert not cache(tmp_path).exists()


def test_require_refuses_to_go_on_without_a_kernel(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "require")
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit 1"))
    for _ in range(2):
        with pytest.raises(BackendError, match="TSFORGE_COMPILED=require, but compiled kernel scale .* cannot compile"):
            compiled.unavailable_reason("scale")
    assert not [record for record in logged if record.levelno >= logging.WARNING]  # no slower path is taken


def test_the_outlook_builds_nothing(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled.outlook()
    assert found.startswith("auto: ")
    assert str(tmp_path / "cache") in found
    assert not list((tmp_path / "cache").rglob("*.so"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "slower torch paths are used: CXX=no-such-compiler is not a program" in compiled.outlook()
    monkeypatch.setenv("TSFORGE_COMPILED", "off")
    assert compiled.outlook() == "switched off (TSFORGE_COMPILED=off)"
    monkeypatch.setenv("TSFORGE_COMPILED", "require")
    with pytest.raises(BackendError, match="no kernel can be built here: CXX=no-such-compiler is not a program"):
        compiled.outlook()
    monkeypatch.setenv("TSFORGE_COMPILED", "bogus")
    with pytest.raises(ConfigError, match="TSFORGE_COMPILED=bogus is none of"):
        compiled.outlook()


def test_an_unknown_setting_is_refused(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_COMPILED", "requires")
    with pytest.raises(ConfigError, match="TSFORGE_COMPILED=requires is none of .* did you mean 'require'"):
        compiled.unavailable_reason("scale")


@needs_compiler
def test_processes_may_build_at_once(sources: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom tsforge.ops import compiled\n"
        "compiled._SOURCES = Path(sys.argv[1])\nreason = compiled.unavailable_reason('scale')\n"
        "x = torch.ones(1)\ncompiled.call('scale', 'scale', x, 1, 1.0, None)\nprint(reason, x.item())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(sources)], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].decode().strip() for process in running] == ["None 2.0"] * 2
    assert all(name.endswith(".so") for name in stored(tmp_path))


@needs_compiler
def test_builds_at_the_same_moment_all_end_in_a_whole_library(sources: Path, tmp_path: Path) -> None:
    start, found = threading.Barrier(4), []

    def build() -> None:
        start.wait()
        found.append(compiled._library_path("scale"))

    workers = [threading.Thread(target=build) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for path in set(found):
        assert path.stem.rpartition("-")[2] == compiled._digest(path.read_bytes())
    assert all(name.endswith(".so") for name in stored(tmp_path))


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "part"])
def test_a_half_written_library_is_never_loaded(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = compiled._library_path("scale")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:  # an interrupted build
        path.rename(path.with_suffix(".part"))
    builds = []
    monkeypatch.setattr(compiled, "_build", lambda *given: builds.append(given) or path)
    compiled._library_path("scale")
    assert len(builds) == 1


@needs_compiler
def test_an_interrupt_leaves_nothing_behind(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str]) -> None:
        Path(command[-1]).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compiled, "_compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled.unavailable_reason("scale")
    assert stored(tmp_path) == []
    assert compiled.unavailable_reason("scale") is None


@needs_compiler
def test_a_folder_of_another_user_is_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._library_path("scale")
    monkeypatch.setattr(os, "geteuid", lambda: cache(tmp_path).stat().st_uid + 1)
    assert "belongs to another user" in (compiled.unavailable_reason("scale") or "")


@pytest.mark.parametrize("which", ["tsforge", "compiled"])
def test_a_folder_that_others_may_write_to_or_that_is_a_link_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    place = cache(tmp_path) if which == "compiled" else cache(tmp_path).parent
    place.mkdir(parents=True, mode=0o700)
    place.chmod(0o770)
    assert "others may write to it" in (compiled.unavailable_reason("scale") or "")
    new_process(monkeypatch)
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in (compiled.unavailable_reason("scale") or "")


@needs_compiler
def test_a_library_that_others_may_write_to_is_built_anew(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiled._library_path("scale")
    path.chmod(0o666)
    builds = []
    monkeypatch.setattr(compiled, "_build", lambda *given: builds.append(given) or path)
    compiled._library_path("scale")
    assert len(builds) == 1


def test_a_cache_that_cannot_be_written_is_a_reason(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot use the cache folder" in (compiled.unavailable_reason("scale") or "")


def test_a_relative_cache_home_counts_as_none(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiled._cache_folder() == tmp_path / ".cache" / "tsforge" / "compiled"


@needs_compiler
def test_only_plain_memory_is_handed_to_a_kernel(sources: Path) -> None:
    assert compiled.unavailable_reason("scale") is None
    for tensor in (torch.ones(4)[::2], torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match="contiguous CPU memory"):
            compiled.call("scale", "scale", tensor, 1, 1.0, None)


def test_kernels_use_the_threads_of_torch() -> None:
    assert compiled.threads() == torch.get_num_threads()


@needs_compiler
@pytest.mark.parametrize("kernel", sorted(path.stem for path in compiled._SOURCES.glob("*.cpp")))
def test_every_kernel_of_the_package_compiles_without_a_warning(kernel: str, tmp_path: Path) -> None:
    command = [*compiled._compiler(), *compiled.FLAGS, "-O0", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*command, str(compiled._SOURCES / f"{kernel}.cpp")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
