"""`handoff rollback`: takes the service back in probation, or goes back to the version before."""

from __future__ import annotations

from typing import Any

import click

from handoff.cli.end import end
from handoff.cli.options import service_name, timing
from handoff.cli.upgrade import upgrade
from handoff.core.messages import Kind


@click.command(name="rollback")
@service_name
@click.option("--respawn", is_flag=True, help="Upgrade to the command of the generation before: after the commit too.")
@timing
@click.pass_obj
def command(runtime_dir: str | None, /, name: str, respawn: bool, **options: Any) -> int:
    """Take NAME back from a new generation in probation; the old one accepts again.

    With --respawn, start the version that was in charge before the present one, with its directory and its
    environment, and upgrade to it; the times are those of that upgrade.
    """
    if respawn:
        return upgrade(name, runtime_dir, {"respawn": 1}, **options)
    return end(name, runtime_dir, Kind.ROLLBACK, as_json=options["as_json"])
