"""Registry, errors, seeds, logs and workspace."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from tsforge.core.errors import BackendError, ConfigError, listing, nearest
from tsforge.core.logs import configure_logging, get_logger, log_event
from tsforge.core.registry import Registry
from tsforge.core.seeding import derive_seed, seed_everything
from tsforge.core.workspace import Workspace


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    package = tmp_path / "plugs"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "good.py").write_text(
        "from plugs_registry import R\n@R.register('good')\nclass Good: pass\n", encoding="utf-8"
    )
    (package / "silent.py").write_text("X = 1\n", encoding="utf-8")
    (package / "_private.py").write_text("", encoding="utf-8")
    (tmp_path / "plugs_registry.py").write_text(
        "from tsforge.core.registry import Registry\nR = Registry('plug', 'plugs', 'no.such.group')\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] in {"plugs", "plugs_registry"}]:
        monkeypatch.delitem(sys.modules, name)
    found: Registry[object] = importlib.import_module("plugs_registry").R
    return found


def test_names_come_without_imports_and_get_imports(registry: Registry[object]) -> None:
    import sys

    assert registry.names() == ["good", "silent"]
    assert "plugs.good" not in sys.modules
    assert registry.get("good").__name__ == "Good"


def test_unknown_name_names_the_nearest(registry: Registry[object]) -> None:
    with pytest.raises(ConfigError, match="unknown plug 'goood'; did you mean 'good'"):
        registry.get("goood")


def test_module_without_registration_and_duplicates(registry: Registry[object]) -> None:
    with pytest.raises(ConfigError, match="registers no plug"):
        registry.get("silent")
    registry.get("good")
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("good")(type("Other", (), {}))


def test_messages() -> None:
    assert nearest("lagz", ["lags", "depth"]) == "; did you mean 'lags'?"
    assert nearest("zzz", ["lags"]) == ""
    assert listing(range(7), limit=3) == "0, 1, 2 and 4 more"


def test_seeds_repeat_and_derive() -> None:
    draws = []
    for _ in range(2):
        seed_everything(7)
        draws.append((random.random(), float(np.random.rand())))
    assert draws[0] == draws[1]
    assert derive_seed(7, "a") == derive_seed(7, "a") != derive_seed(7, "b")
    assert derive_seed(7, "a") == 1746844977  # the first four bytes of sha256(b'7/a')


def test_log_lines_are_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", as_json=True)
    log_event(get_logger("stage"), "checked", rows=3, dataset="x")
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["rows"], line["dataset"], line["level"]) == ("checked", 3, "x", "info")
    logging.getLogger("tsforge").handlers.clear()
    logging.getLogger("tsforge").propagate = True


def test_a_line_for_people_has_short_numbers_and_no_empty_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json, expected in ((False, "info    graded mse=0.414214 rows=3\n"), (True, 0.41421356237)):
        configure_logging("info", as_json=as_json)
        log_event(get_logger("stage"), "graded", mse=0.41421356237, energy=None, rows=3)
        told = capsys.readouterr().err
        assert (json.loads(told)["mse"] if as_json else told) == expected
    logging.getLogger("tsforge").handlers.clear()
    logging.getLogger("tsforge").propagate = True


def test_a_warning_is_one_line_without_our_source(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("info")
        warnings.warn("this setting\nis for study", stacklevel=1)
    assert capsys.readouterr().err == "warning this setting is for study\n"
    logging.getLogger("tsforge").handlers.clear()
    logging.getLogger("tsforge").propagate = True


def test_workspace_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TSFORGE_DATABASE_URL", "postgresql+psycopg://u@h/db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace.open()
    assert workspace.root == tmp_path / "home"
    assert workspace.database_url == "postgresql+psycopg://u@h/db"
    assert workspace.tracking_uri == f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"


def test_workspace_in_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BackendError, match="cannot create the workspace"):
        Workspace.open(tmp_path / "file" / "home")


@pytest.mark.parametrize("name", ["what?", "a?timeout=3", "100%", "a%41b"])
def test_a_workspace_whose_databases_would_lie_elsewhere_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSFORGE_DATABASE_URL", "postgresql+psycopg://u@h/db")  # studies lie in the folder all the same
    with pytest.raises(ConfigError, match=r"its path has a '[?%]'; choose a folder without \? and %"):
        Workspace.open(tmp_path / name / "home")
    assert not list(tmp_path.iterdir())
