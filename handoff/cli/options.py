"""Options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import click


class _Seconds(click.FloatRange):
    """A time; click's own range lets "nan" pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


SECONDS: Final = _Seconds(min=0, max=1e9)


def _names(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The services that a shell may complete."""
    from handoff.core.errors import HandoffError
    from handoff.runtime.directory import services

    try:
        return [name for name in services(context.find_root().params.get("runtime_dir")) if name.startswith(incomplete)]
    except HandoffError:
        return []


service_name: Final = click.argument("name", shell_complete=_names)


def timing(function: Callable[..., int]) -> Callable[..., int]:
    """The options of every command that upgrades."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the record of the upgrade as JSON."),
        click.option("--drain-timeout", type=SECONDS, metavar="S", help="How long the old one may take to finish."),
        click.option("--probation", type=SECONDS, metavar="S", help="How long the new one is watched."),
        click.option("--timeout", type=SECONDS, metavar="S", help="How long the new program may take to be ready."),
        click.option(
            "--wait",
            type=click.Choice(["cutover", "commit", "exit"]),
            default="commit",
            show_default=True,
            help="Return when the new generation accepts, when it is committed, or when the old one has drained.",
        ),
    ):
        function = option(function)
    return function
