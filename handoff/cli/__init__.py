"""The command line: a client of the control socket, one module a command."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

from handoff.core.version import VERSION

COMMANDS: Final = ("abort", "completion", "list", "man", "rollback", "status", "stop", "upgrade", "wait")


class _Commands(click.Group):
    """Imports a command's module when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"handoff.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.command(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done; 1 refused or rolled back (the old generation serves on); 2 wrong usage; "
    "3 no such service; 4 another upgrade is running; 5 timed out; 130 left with Ctrl-C.",
)
@click.option(
    "--runtime-dir",
    metavar="DIR",
    help="The directory above the services' runtime directories  [default: $HANDOFF_RUNTIME_DIR, else /run/handoff, "
    "$XDG_RUNTIME_DIR/handoff or /tmp/handoff-UID]",
)
@click.version_option(VERSION, prog_name="handoff")
@click.pass_context
def group(context: click.Context, runtime_dir: str | None) -> None:
    """Upgrade a running network service; its clients notice nothing."""
    context.obj = runtime_dir


def main() -> None:
    """Run the command line; the entry point of `handoff`."""
    if "_HANDOFF_COMPLETE" in os.environ:  # a shell asks for completions: click answers and exits
        group.main(prog_name="handoff")
    from handoff.cli.output import exit_status_of, say
    from handoff.core.errors import HandoffError

    try:
        status = group.main(prog_name="handoff", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "handoff"
        say(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        status = 2
    except click.exceptions.Exit as error:
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = 130
    except HandoffError as error:
        say(str(error))
        status = exit_status_of(error)
    except BrokenPipeError:
        # Nobody reads the answer any more; the interpreter would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        status = 1
    sys.exit(status)
