"""How a program is started: what is kept, changed and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handoff.core.errors import BadMessage
from handoff.core.launch import Launch

LAUNCH = Launch(command=("server", "--port", "80"), cwd="/srv/web", environment={"A": "1"})


def test_launch_comes_back() -> None:
    """What was kept is read as the same launch, also where a path is not UTF-8."""
    launch = Launch(command=("/srv/\udcff",), cwd="/srv/\udcff", environment={"A": "\udcff"})

    assert Launch.from_json(launch.to_json()) == launch


def test_environment_is_not_shown() -> None:
    """The environment may hold secrets: a launch in a log does not show it."""
    assert "environment" not in repr(LAUNCH)


def test_only_the_environment_changes() -> None:
    """Command and directory stay where no others are named."""
    changed = LAUNCH.changed(environment={"B": "2"})

    assert changed == Launch(command=LAUNCH.command, cwd=LAUNCH.cwd, environment={"B": "2"})


def test_all_changes() -> None:
    """Command and directory are replaced where others are named."""
    changed = LAUNCH.changed(command=["other"], cwd="/", environment={})

    assert changed == Launch(command=("other",), cwd="/")


@pytest.mark.parametrize("word", [1, None, "a\0b", "\ud800"], ids=repr)
def test_command_is_text(word: Any) -> None:
    """A command is of words that exec takes."""
    with pytest.raises(ValueError, match=r"^command: "):
        LAUNCH.changed(command=["server", word], environment={})


@pytest.mark.parametrize("cwd", [1, "a\0b", "\ud800"], ids=repr)
def test_directory_is_text(cwd: Any) -> None:
    """A directory is a text that the kernel takes."""
    with pytest.raises(ValueError, match=r"^cwd: "):
        LAUNCH.changed(cwd=cwd, environment={})


@pytest.mark.parametrize(
    "environment",
    [{"": "x"}, {"A=B": "x"}, {"A": 1}, {"A": None}, {1: "x"}, {"A": "a\0b"}, {"A\0": "x"}, {"A": "\ud800"}],
    ids=repr,
)
def test_environment_is_text(environment: Any) -> None:
    """Names and values are texts that exec takes: the upgrade is refused, not ended by an error of Python's."""
    with pytest.raises(ValueError, match="is no name of an environment variable, or its value no text"):
        LAUNCH.changed(environment=environment)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 60000,
        json.dumps({"command": "server", "cwd": "/", "environment": {}}),
        json.dumps({"command": [1], "cwd": "/", "environment": {}}),
        json.dumps({"command": ["server"], "cwd": 1, "environment": {}}),
        json.dumps({"command": ["server"], "cwd": "/", "environment": ["A"]}),
        json.dumps({"command": ["server"], "cwd": "/", "environment": {"A": 1}}),
    ],
    ids=lambda text: text[:60],
)
def test_unreadable(text: str) -> None:
    """A file that somebody has damaged is refused."""
    with pytest.raises(BadMessage, match="a launch that can't be read"):
        Launch.from_json(text)
