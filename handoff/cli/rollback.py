"""`handoff rollback`."""

from __future__ import annotations

import click

from handoff.cli.end import end
from handoff.core.messages import Kind


@click.command(name="rollback")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the record of the upgrade as JSON.")
@click.pass_obj
def command(runtime_dir: str | None, name: str, as_json: bool) -> int:
    """Take NAME back from a new generation in probation; the old one accepts again."""
    return end(name, runtime_dir, Kind.ROLLBACK, as_json=as_json)
