"""`handoff stop`: ends a service in order."""

from __future__ import annotations

import click

from handoff.cli.options import SECONDS, service_name
from handoff.cli.output import Exit, say
from handoff.core.messages import Kind
from handoff.runtime.client import PATIENCE, Client


@click.command(name="stop")
@service_name
@click.option(
    "--timeout", type=SECONDS, metavar="S", help="How long to wait for its end  [default: its drain timeout]."
)
@click.pass_obj
def command(runtime_dir: str | None, /, name: str, timeout: float | None) -> int:
    """End NAME: it accepts no more, finishes its connections and exits; so does a new generation that is on its way.

    Returns when the process has ended.
    """
    with Client(name, runtime_dir) as client:
        state = client.state()
        limits = state["deadlines"]
        patience = timeout if timeout is not None else limits["drain"] + limits["leave"] + PATIENCE
        client.send(Kind.STOP)
        if not client.wait_for_end(patience):
            say(f"{name}: pid {state['pid']} still runs after {patience:g} s; it goes on finishing its connections")
            return Exit.TIMED_OUT
    click.echo(f"{name}: generation {state['generation']} has ended")
    return Exit.DONE
