"""``tsforge events`` and ``tsforge maintenance``: what became of anomalies, and when not to report them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tsforge.cli_parts import AsJson, Home, attribute, check_table_name, show, table_out, workspace, write_table
from tsforge.console import print_facts, print_json, print_table
from tsforge.core.errors import ConfigError

_WEEK = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

events_app = typer.Typer(no_args_is_help=True, help="Look at anomalies, judge them, and see who judged what.")
maintenance_app = typer.Typer(no_args_is_help=True, help="Silence events: maintenance windows and suppression rules.")

By = Annotated[str | None, typer.Option("--by", help="Who acts (default: the user of the system).")]
Why = Annotated[str | None, typer.Option("--comment", help="Why.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Only of this data set.")]
EventId = Annotated[str, typer.Argument(metavar="EVENT", help="Its id, or the first signs of it (at least six).")]
EventIds = Annotated[list[str], typer.Argument(metavar="EVENT...", help="Ids, or the first signs (at least six).")]
Series = Annotated[list[str] | None, typer.Option("--series", help="Name or pattern (pump*), repeatable.")]
State = Annotated[
    list[str] | None,
    typer.Option("--state", help="open, closed, new, acknowledged, dismissed or confirmed; repeatable."),
]
Since = Annotated[str | None, typer.Option("--since", help="Only events that end at this time or later.")]
Output = Annotated[Path | None, typer.Option("--output", help="Write the table (.parquet or .csv).")]


def _use(name: str) -> Any:
    return attribute(f"tsforge.app.events:{name}")


def _facts(facts: dict[str, Any], as_json: bool) -> None:
    print_json(facts) if as_json else print_facts(facts)


@events_app.command("list")
def events_list(
    dataset: Dataset = None,
    state: State = None,
    since: Since = None,
    series: Series = None,
    shown: Annotated[
        bool, typer.Option("--suppressed/--no-suppressed", help="Also those that a rule silences.")
    ] = True,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """List stored events by start."""
    chosen = {"dataset": dataset, "states": state or (), "since": since, "series": series or (), "suppressed": shown}
    show(_use("list_events")(workspace(home), **chosen), as_json)


@events_app.command("show")
def events_show(event: EventId, dataset: Dataset = None, as_json: AsJson = False, home: Home = None) -> None:
    """Show one event: its facts, the variates behind it, and all that was said."""
    record = _use("show_event")(workspace(home), event, dataset)
    if as_json:
        print_json(record)
        return
    ranked, trail, facts = record.pop("variates"), record.pop("log"), record.pop("facts")
    print_facts({**record, **facts})
    if ranked:
        print_table(ranked, title="variates, strongest first")
    print_table(trail, title="audit trail")


def _act(state: str, events: list[str], by: str | None, text: str | None, **where: Any) -> None:
    result = _use("act")(workspace(where["home"]), events, state, by=by, text=text, dataset=where["dataset"])
    if len(events) == 1 and result.refused:
        raise result.refused[events[0]]
    show(result, where["as_json"])
    if result.refused:
        raise typer.Exit(3)


@events_app.command("acknowledge")
def events_acknowledge(
    events: EventIds,
    by: By = None,
    text: Why = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Say that somebody looks after it."""
    _act("acknowledged", events, by, text, dataset=dataset, as_json=as_json, home=home)


@events_app.command("dismiss")
def events_dismiss(
    events: EventIds,
    by: By = None,
    text: Why = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Say that it was a false alarm; its rows go on calibrating."""
    _act("dismissed", events, by, text, dataset=dataset, as_json=as_json, home=home)


@events_app.command("confirm")
def events_confirm(
    events: EventIds,
    by: By = None,
    text: Why = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Say that it was an anomaly; its rows leave calibration."""
    _act("confirmed", events, by, text, dataset=dataset, as_json=as_json, home=home)


@events_app.command("reopen")
def events_reopen(
    events: EventIds,
    by: By = None,
    text: Why = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Take back what was said; the event is new again."""
    _act("reopened", events, by, text, dataset=dataset, as_json=as_json, home=home)


@events_app.command("comment")
def events_comment(
    event: EventId,
    text: Annotated[str, typer.Argument(help="What the next person should know.")],
    by: By = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Add a comment to an event."""
    _facts(_use("comment")(workspace(home), event, text, by=by, dataset=dataset), as_json)


@events_app.command("label")
def events_label(
    dataset: Annotated[str, typer.Argument(help="Data set in the store.")],
    series: Annotated[str, typer.Argument(help="Its series.")],
    start: Annotated[str, typer.Argument(help="First time of the anomaly.")],
    end: Annotated[str, typer.Argument(help="Last time, included.")],
    variate: Annotated[list[str] | None, typer.Option("--variate", help="To blame, worst first; repeatable.")] = None,
    by: By = None,
    text: Why = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Store an anomaly that no detector reported, as a confirmed event."""
    span = (start, end)
    change = _use("label")(workspace(home), dataset, series, span, variates=variate or (), by=by, text=text)
    _facts(vars(change), as_json)


@events_app.command("export")
def events_export(
    output: Annotated[Path, typer.Option("--output", help="Target file (.parquet or .csv).")],
    dataset: Dataset = None,
    state: State = None,
    since: Since = None,
    series: Series = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Write stored events to a file, one row an event."""
    check_table_name(output)
    chosen = {"dataset": dataset, "states": state or (), "since": since, "series": series or ()}
    found = _use("list_events")(workspace(home), **chosen)
    table_out(_use("export_table")(found, flat=output.suffix == ".csv"), output, as_json, {})


@events_app.command("log")
def events_log(
    event: Annotated[
        str | None, typer.Argument(metavar="[EVENT]", help="Only of this event, also a pruned one.")
    ] = None,
    dataset: Dataset = None,
    output: Output = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Print the audit trail: who did what and when; nothing of it is ever changed or removed."""
    trail = _use("audit_trail")(workspace(home), event, dataset)
    is_read = output is None and not as_json  # by a person, who looks for the newest line
    table_out(trail.reverse() if is_read else trail, output, as_json, {})


@events_app.command("prune")
def events_prune(
    before: Annotated[str, typer.Option("--before", help="Remove events that ended before this time.")],
    by: By = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Remove old events (not confirmed, not open); the audit trail stays whole."""
    _facts(_use("prune")(workspace(home), before, by=by, dataset=dataset), as_json)


@maintenance_app.command("add")
def maintenance_add(
    reason: Annotated[str, typer.Option("--reason", help="Why events are silenced.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Only of this data set.")] = None,
    series: Annotated[str, typer.Option("--series", help="Pattern of series, such as pump*.")] = "*",
    variate: Annotated[str | None, typer.Option("--variate", help="Pattern of the variate ranked first.")] = None,
    below: Annotated[float | None, typer.Option("--score-below", help="Only peaks below this score.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="First time, by the clock of the data (UTC).")] = None,
    end: Annotated[str | None, typer.Option("--to", help="Last time, included.")] = None,
    weekly: Annotated[
        str | None, typer.Option("--weekly", help="Days and hours of a window that returns: 'sat,sun 22:00-02:00'.")
    ] = None,
    timezone: Annotated[
        str | None, typer.Option("--timezone", help="Of --weekly, such as Europe/Berlin (UTC).")
    ] = None,
    by: By = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """Silence events that lie in a maintenance window, or that fit a pattern; they are stored, not reported."""
    rule: dict[str, Any] = {
        "reason": reason,
        "dataset": dataset,
        "series": series,
        "variate": variate,
        "score_below": below,
    }
    rule |= {"start": start, "end": end, "weekly": _weekly(weekly, timezone)}
    _facts(_use("add_maintenance")(workspace(home), rule, by=by), as_json)


def _weekly(text: str | None, timezone: str | None) -> dict[str, Any] | None:
    """Return the settings of a weekly window written as ``sat,sun 22:00-02:00`` or ``mon-fri 22:00-02:00``."""
    if text is None:
        if timezone is not None:
            raise ConfigError("--timezone is the clock of --weekly; without it, give times with their offset")
        return None
    days, _, hours = text.strip().partition(" ")
    opens, dash, closes = hours.strip().partition("-")
    if not dash:
        raise ConfigError(f"--weekly '{text}': write days and hours, such as 'sat,sun 22:00-02:00'")
    names = [name for part in days.split(",") if part.strip() for name in _days(part)]
    return {
        "weekdays": list(dict.fromkeys(names)),
        "opens": opens.strip(),
        "closes": closes.strip(),
        "timezone": timezone or "UTC",
    }


def _days(part: str) -> list[str]:
    """Return the days that ``fri``, ``friday`` or ``fri-mon`` means."""
    known = {name: place for place, day in enumerate(_WEEK) for name in (day, day[:3])}
    ends = [end.strip().lower() for end in part.split("-")]
    if len(ends) > 2 or not set(ends) <= set(known):
        raise ConfigError(f"--weekly: '{part.strip()}' is no day; write mon, tue, ... or mon-fri, by commas")
    first, last = known[ends[0]], known[ends[-1]]
    return [_WEEK[(first + step) % 7][:3] for step in range((last - first) % 7 + 1)]


@maintenance_app.command("list")
def maintenance_list(
    lifted: Annotated[bool, typer.Option("--all", help="Also those that were lifted.")] = False,
    output: Output = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """List rules and windows, and how many events each has silenced."""
    table = _use("list_maintenance")(workspace(home), lifted=lifted)
    if output is not None:
        write_table(table, output)
    rows = table.to_dicts()
    print_json(rows) if as_json else print_table(rows, title="maintenance")


@maintenance_app.command("lift")
def maintenance_lift(
    number: Annotated[int, typer.Argument(help="Number of the rule (tsforge maintenance list).")],
    by: By = None,
    text: Why = None,
    as_json: AsJson = False,
    home: Home = None,
) -> None:
    """End a rule; events that go on after that come to the surface."""
    _facts(_use("lift_maintenance")(workspace(home), number, by=by, text=text), as_json)
