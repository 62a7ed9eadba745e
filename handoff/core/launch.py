"""How a generation was started, and how its next version is: command, working directory, environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from handoff.core.errors import BadMessage


def _words(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(words)


def _texts(instance: object, attribute: attrs.Attribute[Any], value: Sequence[str]) -> None:
    for word in value:
        if not isinstance(word, str) or "\0" in word:
            raise ValueError(f"{attribute.name}: {word!r} is no text without NUL bytes")


@attrs.frozen(kw_only=True)
class Launch:
    """What starts a program."""

    command: tuple[str, ...] = attrs.field(converter=_words, validator=_texts)
    cwd: str  # as it is called, symbolic links unresolved
    environment: Mapping[str, str] = attrs.field(factory=dict, repr=False)  # it may hold secrets

    def changed(
        self, *, command: Sequence[str] | None = None, cwd: str | None = None, environment: Mapping[str, str]
    ) -> Launch:
        """The same with another command and directory, where given, and another environment.

        Raises ValueError for what no program can be started with.
        """
        for name, value in environment.items():
            if not isinstance(name, str) or not isinstance(value, str) or not name or "=" in name:
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
            return cls(command=body["command"], cwd=body["cwd"], environment=body["environment"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadMessage(f"a launch that can't be read ({error})") from None
