"""What README and docs tell people to type is what the program understands; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tsforge.app.ingest import IngestConfig, ingest
from tsforge.cli import app, main
from tsforge.core.config import load
from tsforge.core.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DRY = {"ingest", "fit", "predict", "backtest", "benchmark", "detect", "stream", "tune"}
PLACEHOLDER = re.compile(r"\b(ID|NAME|PATH|FILE|CONFIG|JOB|TIME)\b|[<>…]|\.\.\.")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """Return (page, command line) of every tsforge call in a shell block."""
    found = []
    for page in PAGES:
        for language in ("sh", "bash", "console"):
            for block in blocks(page, language):
                for line in block.replace("\\\n", " ").splitlines():
                    text = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
                    if text.startswith("tsforge "):
                        found.append((page.name, text))
    return found


def test_there_is_something_to_check() -> None:
    assert len(commands()) >= 10


def ingest_sales(root: Path) -> None:
    """Bring the data set that pages speak of into the store, as they say."""
    root.mkdir(parents=True, exist_ok=True)
    place = root / "sales.csv"
    place.write_text("date,store,units,promo\n2024-01-01,a,1,0\n2024-01-02,a,2,1\n2024-01-03,a,3,0\n", encoding="utf-8")
    settings = ["data=csv", "data.name=sales", f"data.source.path={place}", "data.time=date", "data.layout=long"]
    config = load(IngestConfig, "ingest", [*settings, "data.series=store", "data.targets=[units]"])
    ingest(config, Workspace.open(root))


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_command_is_understood(
    page: str, line: str, workspace_root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line.split(" | ")[0].split(" && ")[0].split(" > ")[0], comments=True)[1:]
    command = next((word for word in words if not word.startswith("-")), "")
    known = {item.name or item.callback.__name__ for item in app.registered_commands if item.callback}  # type: ignore[attr-defined]
    known |= {group.name for group in app.registered_groups}
    assert not command or command in known, f"{page}: {line}"
    if command in DRY and not PLACEHOLDER.search(line):
        if "data=sales" in words:
            ingest_sales(workspace_root)
        monkeypatch.setattr(sys, "argv", ["tsforge", *words, "--dry-run"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0, f"{page}: {line}\n{capfd.readouterr().err}"


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if page.name != "architecture.md" and blocks(page, "python")]


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, workspace_root: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_nothing_committed_names_this_machine() -> None:
    suspicious = re.compile(r"/work/|/opt/wheels|/root/|\.library\b")
    folders = ("tsforge", "pipelines", "dashboards", "configs", "docs", "benchmarks", "deploy", "scripts")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".yaml", ".json", ".toml"}
    ]
    files += [
        ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt", "docker-compose.yml")
    ]
    places = re.compile(suspicious.pattern + r"|\"/(tmp|home)/")  # also where results were written
    hits = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        if path.is_file()
        for match in (places if path.parent.name == "results" else suspicious).finditer(
            path.read_text(encoding="utf-8")
        )
    ]
    assert hits == []
