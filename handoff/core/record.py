"""What is known of one upgrade: told to whoever asked, and kept by the generation in charge."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

import attrs

from handoff.core.errors import BadMessage


class Step(str, enum.Enum):
    """The steps of an upgrade, in their order. Each is recorded when it is done."""

    SPAWN = "spawn"
    ADOPT = "adopt"
    READY = "ready"
    CUTOVER = "cutover"
    PROBATION = "probation"
    COMMIT = "commit"
    DRAIN = "drain"
    EXIT = "exit"
    ROLLBACK = "rollback"  # not in the order: the old generation accepts again


class Result(str, enum.Enum):
    """How an upgrade ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    TIMED_OUT = "timed-out"  # rolled back because the new program was not ready in time
    STOPPED = "stopped"  # the service was stopped meanwhile


@attrs.define(kw_only=True)
class Record:
    """One upgrade. Times are seconds since the request arrived."""

    upgrade: str
    service: str
    old: int  # generation
    new: int | None = None  # generation; None until it has called
    started: float = 0.0  # time.time() of the request
    steps: dict[str, float] = attrs.Factory(dict)  # step -> when it was done
    result: str | None = None  # a Result; None while it runs
    seconds: float | None = None  # when the result was known
    reason: str | None = None  # why it was not committed
    last_words: str | None = None  # what the new program last wrote to its standard error
    kept: int | None = None  # listeners
    added: int | None = None
    removed: int | None = None
    open: int | None = None  # connections that the old generation had open when its drain began
    finished: int | None = None  # of those, how many ended by themselves
    closed: int | None = None  # of those, how many were closed at the deadline

    def to_json(self) -> dict[str, Any]:
        """All fields that are known."""
        return {name: value for name, value in attrs.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Record:
        """Read a record of this or a later version. Raises BadMessage."""
        known = {name: body[name] for name in attrs.fields_dict(cls) if name in body}
        for name, value in known.items():
            if type(value) not in _TYPES.get(name, (int, type(None))):
                raise BadMessage(f"a record whose {name!r} is a {type(value).__name__}")
        if not all(type(seconds) in (int, float) for seconds in known.get("steps", {}).values()):
            raise BadMessage("a record whose steps are no times")
        try:
            return cls(**known)
        except TypeError:
            raise BadMessage("a record that lacks the upgrade, the service or the old generation") from None


# What the fields of a record are in JSON; those that aren't listed are whole numbers or unknown.
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "upgrade": (str,),
    "service": (str,),
    "old": (int,),
    "started": (int, float),
    "steps": (dict,),
    "result": (str, type(None)),
    "seconds": (int, float, type(None)),
    "reason": (str, type(None)),
    "last_words": (str, type(None)),
}
