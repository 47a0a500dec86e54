"""Rooms import only downwards; each heavy library lives in its own rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Room -> rooms of ours it may import. A single module at the top of tsforge/ is a room of its own.
LOW = {"core"}
FLOOR1 = {"core", "contracts", "ops", "metrics"}
FLOOR3 = FLOOR1 | {"data", "layers", "models"}
FLOOR4 = FLOOR3 | {"network", "ensemble", "artifact"}
BELOW_APP = FLOOR4 | {"training", "forecasting", "anomaly", "dynamics", "tracking", "tuning", "scheduling"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "contracts": LOW,
    "ops": LOW,
    "metrics": LOW,
    "data": {"core", "contracts"},
    "layers": {"core", "contracts", "ops"},
    "models": {"core", "contracts", "ops", "layers"},
    "network": FLOOR3,
    "ensemble": FLOOR3 | {"network"},
    "artifact": FLOOR3 | {"network", "ensemble"},
    "training": FLOOR4,
    "forecasting": FLOOR4,
    "anomaly": FLOOR4 | {"forecasting"},
    "dynamics": FLOOR4 | {"training"},
    "tracking": {"core", "contracts", "artifact", "forecasting", "data"},
    "tuning": {"core"},
    "scheduling": {"core", "data"},  # data for sql.py alone: the ledger lies in the database of the series store
    "app": BELOW_APP,
    "testing": FLOOR4 | {"training", "forecasting", "anomaly"},
    "console": LOW,
    "cli": {"core", "app", "console", "contracts", "cli_events", "cli_parts"},
    "cli_events": {"core", "app", "console", "cli_parts"},
    "cli_parts": {"core", "console"},
    "pipelines": {"core", "app", "contracts", "console"},
    "dashboards": {"core", "app", "contracts"},
}

# Library -> rooms that may import it (anywhere, also inside functions).
TORCH_ROOMS = {"contracts", "ops", "data", "layers", "models", "network", "artifact", "training", "forecasting"}
TORCH_ROOMS |= {"ensemble"}
HEAVY: dict[str, set[str]] = {
    "torch": TORCH_ROOMS | {"anomaly", "dynamics", "testing", "app"},
    "lightning": {"training", "dynamics"},
    "pytorch_lightning": set(),
    "mlflow": {"tracking"},
    "optuna": {"tuning"},
    "optuna_integration": {"tuning"},
    "streamlit": {"dashboards"},
    "plotly": {"dashboards"},
    "pandas": {"data", "tracking"},
    "sqlalchemy": {"data", "scheduling"},
    "apscheduler": {"scheduling"},
    "safetensors": {"artifact"},
    "hydra": {"core"},
    "omegaconf": {"core"},
    "typer": {"cli", "cli_events", "cli_parts"},
    "rich": {"cli", "console", "training", "dynamics", "app", "tuning", "forecasting"},
    "holidays": {"data"},
    "matplotlib": {"tracking"},
    "pickle": set(),
    "cloudpickle": set(),
    "joblib": set(),
}


def sources() -> list[Path]:
    return sorted(path for room in ("tsforge", "pipelines", "dashboards") for path in (ROOT / room).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "tsforge" else parts[1]


def imports(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            module = node.module or ""
            if module == "tsforge":
                found += [(node.lineno, f"tsforge.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def violations(path: Path) -> list[str]:
    room = room_of(path)
    if room in {"__init__", "__main__"}:
        return []
    problems = []
    for line, module in imports(path):
        parts = module.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if parts[0] == "tsforge" and len(parts) > 1:
            target = parts[1]
            if target != room and target in ALLOWED and target not in ALLOWED[room]:
                problems.append(f"{where} {room} imports {target}")
        elif parts[0] in ("pipelines", "dashboards"):
            if parts[0] != room:
                problems.append(f"{where} {room} imports {parts[0]}")
        elif parts[0] in HEAVY and room not in HEAVY[parts[0]]:
            problems.append(f"{where} {room} imports {parts[0]}")
    return problems


def test_every_room_is_on_a_floor() -> None:
    rooms = {room_of(path) for path in sources()} - {"__init__", "__main__"}
    assert rooms <= set(ALLOWED), f"rooms without a floor: {rooms - set(ALLOWED)}"


def test_rooms_import_only_downwards() -> None:
    problems = [problem for path in sources() for problem in violations(path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("room", "line", "expected"),
    [
        ("core", "from tsforge.models.registry import MODELS", "core imports models"),
        ("models", "import lightning.pytorch as pl", "models imports lightning"),
        ("tuning", "def f():\n    import mlflow", "tuning imports mlflow"),
        ("data", "import pickle", "data imports pickle"),
    ],
)
def test_the_guard_sees_a_violation(
    room: str, line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tsforge" / room
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text(line, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [problem.split(" ", 1)[1] for problem in violations(folder / "bad.py")] == [expected]
