"""The ``tsforge`` command: each subcommand composes a config, calls one use-case and prints what came back.

Results go to standard output (``--json`` for machines), logs and errors to standard error. Nothing heavy is imported
before a subcommand runs.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tsforge.cli_events import events_app, maintenance_app
from tsforge.cli_parts import (
    AsJson,
    ConfigFile,
    DryRun,
    Home,
    Overrides,
)
from tsforge.cli_parts import attribute as _attribute
from tsforge.cli_parts import check_table_name as _check_table_name
from tsforge.cli_parts import config as _config
from tsforge.cli_parts import show as _show
from tsforge.cli_parts import table_out as _table_out
from tsforge.cli_parts import workspace as _workspace
from tsforge.cli_parts import write_table as _write_table
from tsforge.console import print_error, print_facts, print_json, print_table
from tsforge.core.errors import BackendError, ConfigError, TsforgeError
from tsforge.core.signals import termination_as_interrupt

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
data_app = typer.Typer(no_args_is_help=True, help="Look at what is in the store, or take it out.")
app.add_typer(batch_app, name="batch")
app.add_typer(schedule_app, name="schedule")
app.add_typer(data_app, name="data")
app.add_typer(events_app, name="events")
app.add_typer(maintenance_app, name="maintenance")

INTERRUPTED = 130  # the shell's status of a process ended by Ctrl-C
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> None:
    """Run the command line; every error a user can cause is one line and a non-zero exit status."""
    try:
        # Typer returns the status of typer.Exit instead of raising it, and turns Ctrl-C into status 130
        with termination_as_interrupt():
            code = app(standalone_mode=False) or 0
        sys.stdout.flush()  # what the interpreter would do last, too late to say a word
    except TsforgeError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        _give_up_output()
        sys.exit(141)
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:  # files have words of their own
            raise
        _give_up_output()
        with suppress(OSError):  # both may lie on one disk
            print_error(f"the output cannot be written ({error.strerror}); what the command stored is whole")
        sys.exit(BackendError.exit_code)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print_error(f"{error.format_message()} (tsforge --help lists the commands and options)")
            sys.exit(2)
        raise
    if code == INTERRUPTED:
        print_error("interrupted; what was stored before is untouched, run the same command again to go on")
    sys.exit(code)


def _give_up_output() -> None:
    """Let standard output lead nowhere: the interpreter flushes once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


@app.command()
def ingest(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "ingest",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Read a source, check it and write it to the store (data=NAME chooses what)."""
    job = _config("tsforge.app.ingest:IngestConfig", config, overrides, dry_run, home)
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
    check = _attribute("tsforge.app.fit_checks:check_settings")
    job = _config("tsforge.app.fit:FitConfig", config, overrides, dry_run, home, check)
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
    job = _config("tsforge.app.backtest:BacktestJobConfig", config, overrides, dry_run, home)
    _show(_attribute("tsforge.app.backtest:backtest")(job, _workspace(home), progress=not as_json), as_json)


@app.command()
def benchmark(
    overrides: Overrides = None,
    task: Annotated[str, typer.Option("--task", help="forecast, or anomaly: --data then names families.")] = "forecast",
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
    config: Annotated[str | None, typer.Option("--config", help="Name below configs/ or a YAML file.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Measure models beside baselines, resumable: forecasts by the literature's splits, or anomaly scores by labels."""
    settings = list(overrides or [])
    anomaly = _is_anomaly_task(task, {"--horizons": horizons, "--peers": peers})
    if data:
        names = [name.strip() for given in data for name in given.split(",")]
        what = "families" if anomaly else "datasets"
        settings.append(f"{what}=[" + ",".join(f"'{name}'" for name in names) + "]")
    if models is not None:  # quoted, since an entry may hold its own settings (linear:ridge=5e4)
        settings.append("models=[" + ",".join(f"'{entry.strip()}'" for entry in models.split(",")) + "]")
    for key, value in (("context_lengths", context_length), ("horizons", horizons)):
        if value is not None:
            settings.append(f"context_length={value}" if anomaly else f"{key}=[{value}]")
    settings += [f"{key}={value}" for key, value in (("seeds", seeds), ("workers", workers)) if value is not None]
    if peers is not None:
        settings.append(f"peers.python='{peers}'")
    if anomaly:
        job = _config(
            "tsforge.app.anomaly_benchmark:AnomalyBenchmarkConfig", config or "benchmark/anomaly", settings, dry_run
        )
        run = _attribute("tsforge.app.anomaly_benchmark:anomaly_benchmark")
    else:
        job = _config("tsforge.app.benchmark:BenchmarkConfig", config or "benchmark", settings, dry_run)
        run = _attribute("tsforge.app.benchmark:benchmark")
    result = run(job, _workspace(home), progress=not as_json)
    _show(result, as_json)
    if result.failed:
        raise typer.Exit(4)


def _is_anomaly_task(task: str, forecast_only: dict[str, object]) -> bool:
    """Return whether anomaly scores are measured; options without a meaning there are refused."""
    if task not in ("forecast", "anomaly"):
        raise ConfigError(f"--task {task}: give forecast or anomaly")
    given = [name for name, value in forecast_only.items() if value is not None]
    if task == "anomaly" and given:
        raise ConfigError(f"{' and '.join(given)}: no effect with --task anomaly; leave it out")
    return task == "anomaly"


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
def watch(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Name below configs/ or a YAML file.")] = "watch",
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Take what is there, deliver it, then exit.")] = False,
    redeliver: Annotated[bool, typer.Option("--redeliver", help="First send every dead letter once more.")] = False,
    discard: Annotated[
        list[str] | None,
        typer.Option("--discard", metavar="SINK", help="First remove the dead letters of this sink; may be repeated."),
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", metavar="NAME", help="Show what the watch NAME is doing and stop.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, as it happens.")] = False,
    home: Home = None,
) -> None:
    """Follow new rows (a folder, a SQL table, standard input, the store) and tell every anomaly once."""
    if status is not None:
        facts = _attribute("tsforge.app.watch.status:watch_status")(status, _workspace(home))
        print_json(facts) if as_json else print_facts(facts)
        return
    job = _config("tsforge.app.watch.settings:WatchConfig", config, overrides, dry_run)
    tell = _Outliving(_print_line if as_json else _print_transitions)
    result = _attribute("tsforge.app.watch.run:watch")(
        job, _workspace(home), once=once, redeliver=redeliver, discard=discard or (), tell=tell
    )
    if not as_json:
        print_facts(result.summary())
    if result.signal == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)
    if tell.lost:
        raise BackendError(f"{tell.lost} records could not be written to the output; sinks and state have them all")
    if result.undelivered and result.signal is None:
        raise BackendError(
            f"{result.undelivered} transitions could not be delivered in time; they go out with the next run"
        )
    if result.refused and result.signal is None:
        raise BackendError(
            f"{result.refused} transitions were refused and are dead letters (--status says why); send them again with "
            "--redeliver, or remove them with --discard"
        )


class _Outliving:
    """Shows the turns of a watch, whose alarms must go out whatever is wrong with the terminal or the log behind it.

    Attributes:
        lost: records that could not be written.
    """

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self._show = show
        self.lost = 0

    def __call__(self, turn: dict[str, Any]) -> None:
        """Show a turn if that is possible."""
        try:
            self._show(turn)
        except BrokenPipeError:
            raise
        except OSError as error:
            from tsforge.core.logs import get_logger

            if not self.lost:
                get_logger(__name__).warning("the output cannot be written (%s); the watch goes on", error.strerror)
            self.lost += 1


def _print_line(turn: dict[str, Any]) -> None:
    """Print a turn of a watch as one JSON object, at once also where the output is a file."""
    print_json(turn)
    sys.stdout.flush()


def _print_transitions(turn: dict[str, Any]) -> None:
    """Print one line an event that opened or ended in a turn of a watch."""
    for event in turn.get("events", ()):
        silenced = "" if event["suppressed_by"] is None else f"  silenced by rule {event['suppressed_by']}"
        span = event["start"] if event["start"] == event["end"] else f"{event['start']} .. {event['end']}"
        names = [event[name] for name in ("transition", "event_id", "series_id")]
        print(*names, span, f"peak {event['peak_score']:.4g}", f"{event['variates']}{silenced}", sep="  ", flush=True)


@app.command()
def tune(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option("--config", help="Name below configs/ or a YAML file.")] = "tune",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Search hyper-parameters; repeats resume the study, the best config is written for ``fit``."""
    check = _attribute("tsforge.app.tune:checked_space")
    job = _config("tsforge.app.tune:TuneJobConfig", config, overrides, dry_run, home, check)
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
    if result.failed:
        raise typer.Exit(4)


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
    report = _attribute("tsforge.app.doctor:examine")(home)
    print_json(report) if as_json else print_table(report["checks"], title="tsforge doctor")
    if not report["ok"]:
        raise typer.Exit(6)


@app.command()
def demo(as_json: AsJson = False, home: Home = None) -> None:
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
    job = _config("tsforge.app.batch:BatchConfig", config, overrides, dry_run, home)
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
    job = _config("tsforge.app.batch:BatchConfig", config, overrides, dry_run, home)
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
    check = partial(_check_job_configs, home=home)
    job = _config("tsforge.app.schedule:ScheduleConfig", config, overrides, dry_run, home, check)
    raise typer.Exit(_attribute("tsforge.app.schedule:run_scheduler")(job, _workspace(home), once=once))


def _check_job_configs(schedule: Any, home: Path | None) -> None:
    """Refuse jobs whose config does not exist or does not take its overrides; its values are read by the job itself."""
    from tsforge.core.config import compose

    stored = _attribute("tsforge.app.stored_choices:StoredData")(home)
    for job in schedule.jobs:
        try:
            compose(job.config, job.overrides, stored=stored)
        except ConfigError as error:
            raise ConfigError(f"job {job.name}: {error}") from error


@schedule_app.command("status")
def schedule_status(
    config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False, home: Home = None
) -> None:
    """Show the next slots and the last runs of every job of CONFIG."""
    job = _config("tsforge.app.schedule:ScheduleConfig", config, overrides, False, home)
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


@data_app.command("remove")
def data_remove(
    name: Annotated[str, typer.Argument(help="Data set in the store.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, say what would go.")] = False,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Remove a data set with all its rows; events, batch records and artifacts stay."""
    facts = _attribute("tsforge.app.ingest:remove_dataset")(_workspace(home), name, confirmed=yes)
    print_json(facts) if as_json else print_facts(facts)
