"""`handoff completion`: what a shell needs to complete commands, options and names of services."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

VARIABLE = "_HANDOFF_COMPLETE"  # click's convention: the command answers the shell when it is set


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, /, shell: str) -> None:
    """Print the completion script for SHELL.

    bash: eval "$(handoff completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc; fish: handoff completion fish >
    ~/.config/fish/completions/handoff.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(context.find_root().command, {}, "handoff", VARIABLE).source())
