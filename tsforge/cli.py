"""The ``tsforge`` command: each subcommand composes a config, calls one use-case and prints what came back.

Results go to standard output (``--json`` for machines), logs and errors to standard error. Nothing heavy is imported
before a subcommand runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tsforge.console import print_error, print_facts, print_json, print_table
from tsforge.core.errors import ConfigError, TsforgeError

app = typer.Typer(
    name="tsforge",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Time-series forecasting and anomaly detection: ingest, fit, forecast, detect, schedule, explore.",
    epilog="Settings are key=value: a group choice (model=ar_net) or a dotted key (model.lags=48). "
    "--dry-run prints the resolved config of any command.",
)
batch_app = typer.Typer(no_args_is_help=True, help="Run the nightly job: ingest, check, forecast, detect, publish.")
schedule_app = typer.Typer(no_args_is_help=True, help="Keep cron-like jobs with persisted state.")
data_app = typer.Typer(no_args_is_help=True, help="Look at what is in the store.")
app.add_typer(batch_app, name="batch")
app.add_typer(schedule_app, name="schedule")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config settings.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="Name below configs/ or a YAML file.")]
INTERRUPTED = 130  # the shell's status of a process ended by Ctrl-C

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Home = Annotated[Path | None, typer.Option("--home", help="Workspace folder (default TSFORGE_HOME or .tsforge).")]


def main() -> None:
    """Run the command line; every error a user can cause is one line and a non-zero exit status."""
    try:
        # Typer returns the status of typer.Exit instead of raising it, and turns Ctrl-C into status 130
        code = app(standalone_mode=False) or 0
    except TsforgeError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        sys.exit(141)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print_error(f"{error.format_message()} (tsforge --help lists the commands and options)")
            sys.exit(2)
        raise
    if code == INTERRUPTED:
        print_error("interrupted; what was stored before is untouched, run the same command again to go on")
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log one JSON object a line.")] = False,
) -> None:
    from tsforge.core.logs import configure_logging

    if version:
        from tsforge import __version__

        print(__version__)
        raise typer.Exit
    if log_level.lower() not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"--log-level {log_level}: choose debug, info, warning or error")
    configure_logging(log_level, as_json=json_logs)


def _attribute(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _config(path: str, name: str, overrides: list[str] | None, dry_run: bool) -> Any:
    """Return the validated config of class ``path``; with ``dry_run`` print it and stop."""
    from tsforge.core.config import load, to_yaml

    config = load(_attribute(path), name, overrides or ())
    if dry_run:
        sys.stdout.write(to_yaml(config))
        raise typer.Exit
    return config


def _workspace(home: Path | None) -> Any:
    from tsforge.core.workspace import Workspace

    return Workspace.open(home)


def _show(result: Any, as_json: bool) -> None:
    """Print a use-case's result: it offers ``summary()`` (facts) and ``rows()`` (records of a table)."""
    summary = result.summary()
    rows = result.rows()
    if as_json:
        print_json({**summary, "rows": rows})
        return
    print_facts(summary)
    if rows:
        print_table(rows)


@app.command()
def ingest(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "ingest",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Read a source, check it and write it to the store (data=NAME chooses what)."""
    job = _config("tsforge.app.ingest:IngestConfig", config, overrides, dry_run)
    _show(_attribute("tsforge.app.ingest:ingest")(job, _workspace(home), progress=not as_json), as_json)


@app.command()
def fit(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "fit",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Train a model on a stored data set, track the run and register the artifact."""
    job = _config("tsforge.app.fit:FitConfig", config, overrides, dry_run)
    result = _attribute("tsforge.app.fit:fit")(job, _workspace(home), progress=not as_json, resume=resume)
    _show(result, as_json)


@app.command()
def predict(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "predict",
    output: Annotated[Path | None, typer.Option("--output", help="Write the table (.parquet or .csv).")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Forecast from the end of the stored data (artifact=ID, PATH or NAME@champion; paths=200 or aggregate=sum)."""
    job = _config("tsforge.app.forecast:PredictConfig", config, overrides, dry_run)
    result = _attribute("tsforge.app.forecast:predict")(job, _workspace(home))
    _table_out(result.answer, output, as_json, dict(result.metadata))


@app.command()
def backtest(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "backtest",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Forecast from rolling cutoffs of the past, refitting as asked, and grade against the naive forecasts."""
    job = _config("tsforge.app.backtest:BacktestJobConfig", config, overrides, dry_run)
    _show(_attribute("tsforge.app.backtest:backtest")(job, _workspace(home), progress=not as_json), as_json)


@app.command()
def benchmark(
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Wide parquet or CSV files, known sets or stored data, by commas or repeated."),
    ] = None,
    models: Annotated[str | None, typer.Option("--models", help="Comma-separated model names.")] = None,
    context_length: Annotated[str | None, typer.Option("--context-length", help="One or more, by commas.")] = None,
    horizons: Annotated[str | None, typer.Option("--horizons", help="One or more, by commas.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Seeds a setting.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Settings measured at a time.")] = None,
    peers: Annotated[Path | None, typer.Option("--peers", help="Python of the environment of other libraries.")] = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "benchmark",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Measure models on data sets with the literature's splits, every test window, beside baselines, resumable."""
    settings = list(overrides or [])
    if data:
        names = [name.strip() for given in data for name in given.split(",")]
        settings.append("datasets=[" + ",".join(f"'{name}'" for name in names) + "]")
    if models is not None:  # quoted, since an entry may hold its own settings (linear:ridge=5e4)
        settings.append("models=[" + ",".join(f"'{entry.strip()}'" for entry in models.split(",")) + "]")
    for key, value in (("context_lengths", context_length), ("horizons", horizons)):
        if value is not None:
            settings.append(f"{key}=[{value}]")
    settings += [f"{key}={value}" for key, value in (("seeds", seeds), ("workers", workers)) if value is not None]
    if peers is not None:
        settings.append(f"peers.python='{peers}'")
    job = _config("tsforge.app.benchmark:BenchmarkConfig", config, settings, dry_run)
    result = _attribute("tsforge.app.benchmark:benchmark")(job, _workspace(home), progress=not as_json)
    _show(result, as_json)
    if result.failed:
        raise typer.Exit(4)


@app.command()
def explain(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "explain",
    output: Annotated[Path | None, typer.Option("--output", help="Write the whole table (.parquet or .csv).")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Divide a forecast among its inputs, or measure which inputs a model needs (what=importance)."""
    job = _config("tsforge.app.explain:ExplainConfig", config, overrides, dry_run)
    _check_table_name(output)
    result = _attribute("tsforge.app.explain:explain")(job, _workspace(home))
    if output is not None:
        _write_table(result.table, output)
    _show(result, as_json)


@app.command()
def detect(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "detect",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Score stored data with a fitted artifact and list the anomalies."""
    job = _config("tsforge.app.detect:DetectJobConfig", config, overrides, dry_run)
    _show(_attribute("tsforge.app.detect:detect")(job, _workspace(home)), as_json)


@app.command()
def stream(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "stream",
    output: Annotated[Path | None, typer.Option("--output", help="Write the forecast (.parquet or .csv).")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Take the stored rows that a stream has not seen: score them, forecast from the end, keep its state."""
    job = _config("tsforge.app.stream:StreamConfig", config, overrides, dry_run)
    _check_table_name(output)
    result = _attribute("tsforge.app.stream:stream")(job, _workspace(home))
    if output is not None:
        _write_table(result.forecast.table, output)
    _show(result, as_json)


@app.command()
def tune(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "tune",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Search hyper-parameters; repeats resume the study, the best config is written for ``fit``."""
    job = _config("tsforge.app.tune:TuneJobConfig", config, overrides, dry_run)
    _show(_attribute("tsforge.app.tune:tune")(job, _workspace(home), progress=not as_json), as_json)


@app.command()
def reconstruct(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Name below configs/ or a YAML file.")
    ] = "reconstruct",
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Reconstruct the dynamics behind trajectories: several seeds side by side, judged by their free runs."""
    job = _config("tsforge.app.reconstruct:ReconstructConfig", config, overrides, dry_run)
    result = _attribute("tsforge.app.reconstruct:reconstruct")(job, _workspace(home), progress=not as_json)
    _show(result, as_json)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model name.")],
    which: Annotated[str, typer.Argument(help="Version, artifact id or alias.")] = "challenger",
    alias: Annotated[str, typer.Option("--alias", help="champion or challenger.")] = "champion",
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Give a registered model version an alias (by default: make the challenger the champion)."""
    facts = _attribute("tsforge.app.publish:promote")(name, which, alias, _workspace(home))
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List every registered model with its paper and what it can take."""
    rows = _attribute("tsforge.app.catalog:list_models")()
    print_json(rows) if as_json else print_table(rows)


@app.command()
def doctor(as_json: AsJson = False, home: Home = None) -> None:
    """Report versions, device, stores and connectivity; non-zero when something needed is broken."""
    report = _attribute("tsforge.app.doctor:examine")(_workspace(home))
    print_json(report) if as_json else print_table(report["checks"], title="tsforge doctor")
    if not report["ok"]:
        raise typer.Exit(6)


@app.command()
def demo(
    as_json: AsJson = False,
    home: Annotated[Path, typer.Option("--home", help="Workspace of the demo.")] = Path(".tsforge"),
) -> None:
    """Run the main job on the embedded data: weather forecasts, a real sensor error found, labels graded."""
    result = _attribute("tsforge.app.demo:run_demo")(_workspace(home), progress=not as_json)
    if as_json:
        print_json(result)


@app.command()
def dashboard(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8501,
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "localhost",
    home: Home = None,
) -> None:
    """Open the dashboard on this machine (Ctrl-C ends it)."""
    raise typer.Exit(_attribute("tsforge.app.serve:serve_dashboard")(_workspace(home), address, port))


@batch_app.command("run")
def batch_run(
    config: ConfigFile,
    overrides: Overrides = None,
    as_of: Annotated[str | None, typer.Option("--as-of", help="ISO time; only data up to it is used.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again although this as-of is published.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Run one batch; a second run of the same --as-of does nothing."""
    job = _config("tsforge.app.batch:BatchConfig", config, overrides, dry_run)
    moment = _attribute("tsforge.app.batch:parse_as_of")(as_of)
    _show(_attribute("tsforge.app.batch:run_batch")(job, moment, _workspace(home), force=force), as_json)


@batch_app.command("backfill")
def batch_backfill(
    config: ConfigFile,
    start: Annotated[str, typer.Option("--from", help="First as-of (ISO time).")],
    stop: Annotated[str, typer.Option("--to", help="Last as-of, included.")],
    every: Annotated[str, typer.Option("--every", help="Step, such as 1d or 6h.")] = "1d",
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Run a range of as-of times in order, skipping those already published."""
    job = _config("tsforge.app.batch:BatchConfig", config, overrides, dry_run)
    _show(_attribute("tsforge.app.batch:backfill")(job, start, stop, every, _workspace(home)), as_json)


@schedule_app.command("run")
def schedule_run(
    config: ConfigFile,
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Run what is due, then exit.")] = False,
    dry_run: DryRun = False,
    home: Home = None,
) -> None:
    """Keep running the jobs of CONFIG until stopped."""
    job = _config("tsforge.app.schedule:ScheduleConfig", config, overrides, dry_run)
    raise typer.Exit(_attribute("tsforge.app.schedule:run_scheduler")(job, _workspace(home), once=once))


@schedule_app.command("status")
def schedule_status(
    config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False, home: Home = None
) -> None:
    """Show the next slots and the last runs of every job of CONFIG."""
    job = _config("tsforge.app.schedule:ScheduleConfig", config, overrides, False)
    rows = _attribute("tsforge.app.schedule:status")(job, _workspace(home))
    print_json(rows) if as_json else print_table(rows)


@data_app.command("list")
def data_list(as_json: AsJson = False, home: Home = None) -> None:
    """List the stored data sets."""
    rows = _attribute("tsforge.app.catalog:list_datasets")(_workspace(home))
    print_json(rows) if as_json else print_table(rows, title="data sets")


@data_app.command("report")
def data_report(
    name: Annotated[str, typer.Argument(help="Data set in the store.")], as_json: AsJson = False, home: Home = None
) -> None:
    """Print span, gaps, nulls, constants, outliers and freshness per series and column."""
    rows = _attribute("tsforge.app.catalog:dataset_report")(_workspace(home), name).to_dicts()
    print_json(rows) if as_json else print_table(rows, title=name)


@data_app.command("vintages")
def data_vintages(
    name: Annotated[str, typer.Argument(help="Data set in the store.")], as_json: AsJson = False, home: Home = None
) -> None:
    """Print how often, how late and with what revisions each column of a data set was published."""
    rows = _attribute("tsforge.app.catalog:dataset_vintages")(_workspace(home), name).to_dicts()
    print_json(rows) if as_json else print_table(rows, title=name)


@data_app.command("batches")
def data_batches(
    name: Annotated[str, typer.Argument(help="Data set in the store.")], as_json: AsJson = False, home: Home = None
) -> None:
    """List what each ingestion of a data set added, changed and refused."""
    rows = _attribute("tsforge.app.catalog:dataset_batches")(_workspace(home), name).to_dicts()
    shown = [{key: row[key] for key in row if key not in ("dataset", "fingerprint", "reasons")} for row in rows]
    print_json(rows) if as_json else print_table(shown, title=name)


@data_app.command("export")
def data_export(
    name: Annotated[str, typer.Argument(help="Data set in the store.")],
    output: Annotated[Path, typer.Option("--output", help="Target file (.parquet or .csv).")],
    home: Home = None,
) -> None:
    """Write a stored data set to a file."""
    frame = _attribute("tsforge.app.ingest:load_dataset")(_workspace(home), name)
    _table_out(frame.table, output, False, {})


def _check_table_name(output: Path | None) -> None:
    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise ConfigError(f"--output {output}: use a name that ends in .parquet or .csv")


def _write_table(table: Any, output: Path) -> None:
    from tsforge.core.atomic import atomic_file

    _check_table_name(output)
    with atomic_file(output) as temporary:
        table.write_parquet(temporary) if output.suffix == ".parquet" else table.write_csv(temporary)


def _table_out(table: Any, output: Path | None, as_json: bool, metadata: dict[str, Any]) -> None:
    """Write a polars table to a file by its ending, or print it."""
    if output is not None:
        _write_table(table, output)
        facts = {"written": str(output), "rows": table.height}
        print_json({**metadata, **facts}) if as_json else print_facts(facts)
    elif as_json:
        print_json({**metadata, "rows": table.to_dicts()})
    else:
        print_table(table.head(50).to_dicts(), title=f"{table.height} rows", limit=50)
