"""What `handoff abort` and `handoff rollback` have in common: ask for an upgrade's end, and tell how it went."""

from __future__ import annotations

import time

from handoff.cli.output import Exit, say, tell
from handoff.core.messages import Kind
from handoff.core.record import Record, Result
from handoff.runtime.client import PATIENCE, Client, Ended


def end(name: str, runtime_dir: str | None, kind: Kind, *, as_json: bool) -> int:
    """Ask for the end of the upgrade that runs and wait for it; returns the exit status: 0 when it was rolled back."""
    with Client(name, runtime_dir) as client:
        patience = 3 * client.state()["deadlines"]["answer"] + PATIENCE  # told, then killed, then reaped
        client.send(kind)
        until = time.monotonic() + patience
        try:
            while (message := client.receive(until - time.monotonic())) and message.kind is not Kind.RESULT:
                pass
        except Ended:
            message = None
    if message is None:
        say(f"{name}: no outcome in {patience:g} s; `handoff status {name}` tells how it goes on")
        return Exit.TIMED_OUT
    return tell(Record.from_json(message["record"]), as_json=as_json, wanted=Result.ROLLED_BACK)
