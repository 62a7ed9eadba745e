"""`handoff wait`: until a service serves."""

from __future__ import annotations

import os
import select
import time

import click

from handoff.cli.options import SECONDS, service_name
from handoff.cli.output import Exit, say
from handoff.core.errors import NotRunning
from handoff.core.messages import Kind
from handoff.linux.inotify import Inotify
from handoff.runtime.client import Client
from handoff.runtime.directory import path_of


@click.command(name="wait")
@service_name
@click.option("--timeout", type=SECONDS, metavar="S", default=60.0, show_default=True, help="How long at most.")
@click.pass_obj
def command(runtime_dir: str | None, /, name: str, timeout: float) -> int:
    """Wait until NAME serves: it may be still starting, or not be started yet."""
    until = time.monotonic() + timeout
    while (left := until - time.monotonic()) > 0:
        # Watched before it is asked: what changes in between wakes us.
        changes = Inotify(_nearest(path_of(name, runtime_dir)))
        try:
            with Client(name, runtime_dir) as client:
                state = client.state(Kind.WAIT, left)
                click.echo(f"{name}: generation {state['generation']} (pid {state['pid']}) is {state['state']}")
                return Exit.DONE
        except NotRunning:
            select.select([changes.descriptor], [], [], max(0.0, until - time.monotonic()))
        finally:
            changes.close()
    say(f"{name}: it did not serve in {timeout:g} s; start it, or look why it does not get ready")
    return Exit.TIMED_OUT


def _nearest(path: str) -> str:
    """The directory itself or, while it is not there, the nearest one above it that is."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
