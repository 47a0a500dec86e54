"""Size and texture: modules and functions stay small, nothing unsafe, nothing swallowed."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 10  # of a function outside shells; Typer commands list their options as parameters


@cache
def sources() -> list[Path]:
    return sorted(path for room in ("tsforge", "pipelines", "dashboards") for path in (ROOT / room).rglob("*.py"))


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in sources()]


@cache
def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [
        (path, node)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_modules_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: size for name, size in sizes.items() if size > MAX_MODULE_LINES} == {}


def test_functions_are_small() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, node in functions()
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters; compile-time constants of a Triton kernel are settings of its build."""
    given = [*node.args.args, *node.args.kwonlyargs]
    return sum(ast.unparse(arg.annotation) != "tl.constexpr" if arg.annotation else True for arg in given)


def test_functions_take_few_parameters() -> None:
    wide = [
        f"{path}:{node.lineno} {node.name}: {parameters(node)} parameters"
        for path, node in functions()
        if parameters(node) > MAX_PARAMETERS and not path.name.startswith("cli")
    ]
    assert not wide, "\n".join(wide)


def test_every_module_and_public_function_has_a_docstring() -> None:
    missing = [str(path) for path, tree in trees() if not ast.get_docstring(tree) and path.name != "__init__.py"]
    for path, tree in trees():
        for node in tree.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_no_bare_or_broad_handler_and_no_unsafe_call() -> None:
    bad = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = [node.type] if not isinstance(node.type, ast.Tuple) else list(node.type.elts)
                broad = node.type is None or any(
                    isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in names
                )
                reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if broad and not reraises:
                    bad.append(f"{path}:{node.lineno} swallows every exception")
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}:
                    bad.append(f"{path}:{node.lineno} calls {name}")
                if name == "torch.load" and "weights_only=True" not in ast.unparse(node):
                    bad.append(f"{path}:{node.lineno} loads a checkpoint without weights_only=True")
    assert not bad, "\n".join(bad)


def test_no_set_is_made_anew_for_every_element() -> None:
    """``x in set(...)`` as the condition of a comprehension is a square of the number of series."""
    slow = [
        f"{path}:{test.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.comprehension)
        for test in (part for condition in node.ifs for part in ast.walk(condition))
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.In | ast.NotIn)
        if isinstance(made := test.comparators[0], ast.Call) and ast.unparse(made.func) in ("set", "frozenset")
    ]
    assert slow == []


def test_no_module_is_called_utils() -> None:
    assert [str(path) for path, _ in trees() if path.stem in {"utils", "helpers", "misc", "common"}] == []
