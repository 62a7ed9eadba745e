"""How a generation was started, and how its next version is: command, working directory, environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from handoff.core.errors import BadMessage


def _is_text(value: object) -> bool:
    """Whether execve(2) can be given it: no NUL bytes, and no surrogates but those that stand for a byte."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _words(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(words)


def _texts(instance: object, attribute: attrs.Attribute[Any], value: Sequence[str]) -> None:
    for word in value:
        if not _is_text(word):
            raise ValueError(f"{attribute.name}: {word!r} is no text without NUL bytes")


def _text(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
    if not _is_text(value):
        raise ValueError(f"{attribute.name}: {value!r} is no text without NUL bytes")


@attrs.frozen(kw_only=True)
class Launch:
    """What starts a program."""

    command: tuple[str, ...] = attrs.field(converter=_words, validator=_texts)
    cwd: str = attrs.field(validator=_text)  # as it is called, symbolic links unresolved
    environment: Mapping[str, str] = attrs.field(factory=dict, repr=False)  # it may hold secrets

    def changed(
        self, *, command: Sequence[str] | None = None, cwd: str | None = None, environment: Mapping[str, str]
    ) -> Launch:
        """The same with another command and directory, where given, and another environment.

        Raises ValueError for what no program can be started with.
        """
        for name, value in environment.items():
            if not _is_text(name) or not _is_text(value) or not name or "=" in name:
                raise ValueError(f"{name!r} is no name of an environment variable, or its value no text")
        return Launch(command=tuple(command or self.command), cwd=cwd or self.cwd, environment=environment)

    def to_json(self) -> str:
        """The text that is kept in the runtime directory."""
        return json.dumps({"command": self.command, "cwd": self.cwd, "environment": dict(self.environment)})

    @classmethod
    def from_json(cls, text: str) -> Launch:
        """Read what was kept. Raises BadMessage."""
        try:
            body = json.loads(text)
            command, cwd, environment = body["command"], body["cwd"], body["environment"]
            if not isinstance(command, list) or not isinstance(environment, dict):
                raise ValueError("its command is no list, or its environment no object")
            return cls(command=command, cwd=cwd).changed(environment=environment)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadMessage(f"a launch that can't be read ({error})") from None
