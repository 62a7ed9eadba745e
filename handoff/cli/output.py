"""What commands print: answers on stdout, progress and errors on stderr; and their exit statuses."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

import click

from handoff.core.errors import HandoffError, NoAnswer, NotRunning, Refused
from handoff.core.record import Record, Result
from handoff.core.refusal import UPGRADING


class Exit(enum.IntEnum):
    """What a command's exit status says."""

    DONE = 0
    REFUSED = 1  # or rolled back: the old generation serves on
    USAGE = 2
    NOT_RUNNING = 3
    UPGRADING = 4
    TIMED_OUT = 5
    LEFT = 130  # with Ctrl-C, as shells have it


def exit_status_of(error: HandoffError) -> int:
    """The exit status for an error."""
    match error:
        case NotRunning():
            return Exit.NOT_RUNNING
        case Refused(code=code) if code == UPGRADING:
            return Exit.UPGRADING
        case NoAnswer():
            return Exit.TIMED_OUT
        case _:
            return Exit.REFUSED


def say(sentence: str) -> None:
    """One line for an error, on stderr."""
    click.echo(f"handoff: {sentence}", err=True)


def answer(body: Mapping[str, Any]) -> None:
    """One JSON object, on stdout."""
    click.echo(json.dumps(body))


def tell(record: Record, *, as_json: bool, wanted: Result = Result.COMMITTED) -> int:
    """Print how an upgrade ended, or how far it is; returns the exit status, 0 where it ended as `wanted`."""
    if as_json:
        answer(record.to_json())
    if record.result == wanted or record.result is None:
        if not as_json:
            click.echo(f"{record.service}: {_outcome(record)}")
        return Exit.DONE
    say(f"{record.service}: {_outcome(record)}")
    for line in (record.last_words or "").splitlines()[-20:]:
        click.echo(f"  | {line}", err=True)
    return Exit.TIMED_OUT if record.result == Result.TIMED_OUT else Exit.REFUSED


def _outcome(record: Record) -> str:
    new = f"generation {record.new}" if record.new else "the new generation"
    match record.result:
        case Result.COMMITTED:
            drained = ""
            if record.finished is not None and record.open is not None:
                drained = f"; of {record.open} connections of generation {record.old}, {record.closed} had to be closed"
            reason = f" ({record.reason})" if record.reason else ""
            return (
                f"{new} serves, in place of generation {record.old}, after {record.seconds or 0:.2f} s{reason}{drained}"
            )
        case Result.STOPPED:
            return f"the upgrade ended with the service: {record.reason}"
        case None:
            return f"{new} accepts and is in probation; generation {record.old} takes the service back if it fails"
        case _:
            return f"rolled back: {record.reason or 'no reason is known'}; generation {record.old} serves on"
