"""What the subcommands of ``tsforge`` share: options, configs from the command line, and how results are shown."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tsforge.console import print_facts, print_json, print_table
from tsforge.core.errors import ConfigError

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config settings.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="Name below configs/ or a YAML file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Home = Annotated[Path | None, typer.Option("--home", help="Workspace folder (default TSFORGE_HOME or .tsforge).")]


def attribute(path: str) -> Any:
    """Return ``module:name``; nothing heavy is imported before a subcommand needs it."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def config(
    path: str,
    name: str,
    overrides: list[str] | None,
    dry_run: bool,
    home: Path | None = None,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """Return the validated config of class ``path``; with ``dry_run`` print it and stop.

    ``data=NAME`` may name a data set that was ingested into the workspace at ``home``. What the command would refuse
    without reading data, though the config is valid in itself, is refused by ``check`` before it is printed.
    """
    from tsforge.core.config import load, to_yaml

    stored = attribute("tsforge.app.stored_choices:StoredData")(home)
    config = load(attribute(path), name, overrides or (), stored=stored)
    if dry_run:
        if check is not None:
            check(config)
        sys.stdout.write(to_yaml(config))
        raise typer.Exit
    return config


def workspace(home: Path | None) -> Any:
    """Return the workspace a command works on."""
    from tsforge.core.workspace import Workspace

    return Workspace.open(home)


def show(result: Any, as_json: bool) -> None:
    """Print a use-case's result: it offers ``summary()`` (facts) and ``rows()`` (records of a table)."""
    summary = result.summary()
    rows = result.rows()
    if as_json:
        print_json({**summary, "rows": rows})
        return
    print_facts(summary)
    if rows:
        print_table(rows)


def check_table_name(output: Path | None) -> None:
    """Refuse a file name that says no format.

    Raises:
        ConfigError: it ends in neither .parquet nor .csv.
    """
    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--output {output}: use a name that ends in .parquet or .csv")


def write_table(table: Any, output: Path) -> None:
    """Write a polars table whole or not at all, by the ending of the name."""
    from tsforge.core.atomic import atomic_file

    check_table_name(output)
    with atomic_file(output) as temporary:
        table.write_parquet(temporary) if output.suffix == ".parquet" else table.write_csv(temporary)


def table_out(table: Any, output: Path | None, as_json: bool, metadata: dict[str, Any]) -> None:
    """Write a polars table to a file by its ending, or print it."""
    if output is not None:
        write_table(table, output)
        facts = {"written": str(output), "rows": table.height}
        print_json({**metadata, **facts}) if as_json else print_facts(facts)
    elif as_json:
        print_json({**metadata, "rows": table.to_dicts()})
    else:
        print_table(table.head(50).to_dicts(), title=f"{table.height} rows", limit=50)
