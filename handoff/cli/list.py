"""`handoff list`: the services of a runtime directory."""

from __future__ import annotations

from typing import Any

import click

from handoff.cli.output import answer
from handoff.core.errors import HandoffError, NotRunning
from handoff.runtime.client import Client
from handoff.runtime.directory import services


@click.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print the services as JSON.")
@click.pass_obj
def command(runtime_dir: str | None, as_json: bool) -> None:
    """List the services that are running."""
    rows = [row for name in services(runtime_dir) if (row := _row(name, runtime_dir))]
    if as_json:
        answer({"services": rows})
        return
    width = max((len(row["service"]) for row in rows), default=0)
    for row in rows:
        what = row.get("error") or (
            f"generation {row['generation']} (pid {row['pid']}) {row['state']}, "
            f"{row['connections']} connections, {' '.join(row['listeners'][:3])}"
        )
        click.echo(f"{row['service']:<{width}}  {what}")


def _row(name: str, runtime_dir: str | None) -> dict[str, Any] | None:
    try:
        with Client(name, runtime_dir) as client:
            return client.state()
    except NotRunning:
        return None
    except HandoffError as error:
        return {"service": name, "error": str(error)}
