"""`handoff status`: who is in charge, what it does, how the last upgrade went."""

from __future__ import annotations

from typing import Any

import click

from handoff.cli.options import service_name
from handoff.cli.output import answer
from handoff.core.record import Record, Result
from handoff.runtime.client import Client


@click.command(name="status")
@service_name
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
@click.pass_obj
def command(runtime_dir: str | None, name: str, as_json: bool) -> None:
    """Tell which generation of NAME is in charge, and how its last upgrade went."""
    with Client(name, runtime_dir) as client:
        state = client.state()
    if as_json:
        answer(state)
        return
    click.echo(f"{state['service']}: generation {state['generation']} (pid {state['pid']}) is {state['state']}")
    for address in state["listeners"]:
        click.echo(f"  listens on {address}")
    if state["listener_count"] > len(state["listeners"]):
        click.echo(f"  and on {state['listener_count'] - len(state['listeners'])} more")
    click.echo(f"  has {state['connections']} connections open")
    for old in state.get("draining", ()):
        click.echo(f"  generation {old['generation']} (pid {old['pid']}) drains")
    if "upgrade" in state:
        click.echo(f"  {last_upgrade(state)}")


def last_upgrade(state: dict[str, Any]) -> str:
    """The last upgrade in one line."""
    record = Record.from_json(state["upgrade"])
    way = f"generation {record.old} to {record.new or '?'}"
    if record.result is None:
        done = list(record.steps)
        return f"upgrade from {way} is running; done: {', '.join(done) or 'nothing yet'}"
    reason = f": {record.reason}" if record.reason else ""
    verb = "last upgrade" if record.result == Result.COMMITTED else "last attempt"
    return f"{verb}, from {way}: {record.result} after {record.seconds or 0:.2f} s{reason}"
