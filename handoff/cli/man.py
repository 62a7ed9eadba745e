"""`handoff man`: the manual page, made of the texts of `--help`."""

from __future__ import annotations

import click

from handoff.core.version import VERSION


@click.command(name="man")
@click.pass_context
def command(context: click.Context, /) -> None:
    """Print the manual page: handoff man | man -l -"""
    root = context.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    lines = [
        f'.TH HANDOFF 1 "" "handoff {VERSION}" "User Commands"',
        ".SH NAME",
        f"handoff \\- {_text(group.get_short_help_str(200))}",
        ".SH SYNOPSIS",
        ".B handoff",
        "[OPTIONS] COMMAND [ARGS]...",
        ".SH OPTIONS",
        *_options(group, root),
        ".SH COMMANDS",
    ]
    for name in group.list_commands(root):
        child = group.get_command(root, name)
        assert child is not None
        inner = click.Context(child, info_name=name, parent=root)
        lines += [f".SS handoff {name} {_text(' '.join(child.collect_usage_pieces(inner)))}"]
        for paragraph in (child.help or "").split("\n\n"):
            lines += [_text(" ".join(paragraph.split())), ".PP"]
        lines += _options(child, inner)
    lines += [".SH EXIT STATUS", *(_text(part.strip()) + "\n.br" for part in (group.epilog or "").split(";"))]
    click.echo("\n".join(lines))


def _options(command: click.Command, context: click.Context) -> list[str]:
    lines = []
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            lines += [".TP", rf"\fB{_text(record[0])}\fR", _text(record[1])]
    return lines


def _text(text: str) -> str:
    """Text as roff takes it: no line may begin as a request, and a hyphen is a minus."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped
