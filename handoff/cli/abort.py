"""`handoff abort`."""

from __future__ import annotations

import click

from handoff.cli.end import end
from handoff.cli.options import service_name
from handoff.core.messages import Kind


@click.command(name="abort")
@service_name
@click.option("--json", "as_json", is_flag=True, help="Print the record of the upgrade as JSON.")
@click.pass_obj
def command(runtime_dir: str | None, name: str, as_json: bool) -> int:
    """End the upgrade of NAME that is running, before its new generation accepts."""
    return end(name, runtime_dir, Kind.ABORT, as_json=as_json)
