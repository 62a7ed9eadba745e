"""The protocol's messages: one JSON object a packet, with the descriptors that it announces beside it.

`FIELDS` is the whole vocabulary. A field that isn't listed is ignored, so that a later version may add some; a type
that isn't listed is answered with `error`. Nothing here reads or writes a socket: `encode` gives the bytes of one
SOCK_SEQPACKET packet, `decode` takes them.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from handoff.core.errors import BadMessage

PROTOCOL: Final = (1, 1)  # oldest and newest version of the protocol that this code speaks
MAX_PACKET: Final = 65536  # bytes; below SO_SNDBUF's default of 212,992, so that a packet always fits
MAX_DESCRIPTORS: Final = 253  # SCM_MAX_FD in the kernel: one more is EINVAL
_ROOM: Final = 1024  # bytes of a `descriptors` packet kept for what is not an entry


class Kind(str, enum.Enum):
    """The type of a message."""

    # a new generation calls the one in charge, and is answered
    HELLO = "hello"
    DIALLING = "dialling"
    REFUSED = "refused"
    # the session: old to new
    DESCRIPTORS = "descriptors"
    ACCEPT = "accept"
    RELEASED = "released"
    COMMITTED = "committed"
    DRAINED = "drained"
    ROLLBACK = "rollback"
    STOP = "stop"
    # the session: new to old
    ADOPTED = "adopted"
    READY = "ready"
    ACCEPTING = "accepting"
    IN_CHARGE = "in-charge"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"
    STOPPING = "stopping"
    # a command asks the generation in charge, and is answered; `rollback` is one of them too
    UPGRADE = "upgrade"
    STATUS = "status"
    WAIT = "wait"  # answered with `state` once it serves
    ABORT = "abort"
    STEP = "step"
    STATE = "state"
    RESULT = "result"
    ERROR = "error"


@attrs.frozen
class Message:
    """One message: its type and its fields, checked against `FIELDS`."""

    kind: Kind
    fields: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def get(self, name: str) -> Any:
        """A field that may be missing: then None."""
        return self.fields.get(name)


# For each type its fields: the Python types of the JSON value, and whether it must be there.
_TEXT: Final = (str,)
_NUMBER: Final = (int,)
_SECONDS: Final = (int, float)
_LIST: Final = (list,)
_OBJECT: Final = (dict,)
FIELDS: Final[Mapping[Kind, Mapping[str, tuple[tuple[type, ...], bool]]]] = {
    Kind.HELLO: {
        "protocol": (_LIST, True),
        "service": (_TEXT, True),
        "generation": (_NUMBER, True),
        "upgrade": (_TEXT, False),
        "version": (_TEXT, True),
    },
    Kind.DIALLING: {"protocol": (_NUMBER, True)},
    Kind.REFUSED: {"code": (_TEXT, True), "reason": (_TEXT, True), "generation": (_NUMBER, True)},
    Kind.DESCRIPTORS: {
        "upgrade": (_TEXT, True),
        "generation": (_NUMBER, True),
        "batch": (_NUMBER, True),
        "batches": (_NUMBER, True),
        "entries": (_LIST, True),
    },
    Kind.ADOPTED: {"batch": (_NUMBER, True)},
    # `unclaimed`: indices of listeners, in the order of their entries; `paths`: [path, device, inode] of those added
    Kind.READY: {"added": (_NUMBER, True), "unclaimed": (_LIST, True), "paths": (_LIST, True)},
    Kind.ACCEPT: {},
    Kind.ACCEPTING: {},
    Kind.RELEASED: {},
    Kind.COMMITTED: {"record": (_OBJECT, True)},
    Kind.IN_CHARGE: {},
    Kind.DRAINED: {"record": (_OBJECT, True)},
    Kind.ROLLBACK: {"reason": (_TEXT, False)},
    Kind.ROLLED_BACK: {},
    Kind.FAILED: {"reason": (_TEXT, True)},
    Kind.STOP: {},
    Kind.STOPPING: {},
    Kind.UPGRADE: {
        "command": (_LIST, False),
        "cwd": (_TEXT, False),
        "environment": (_OBJECT, False),
        "respawn": (_NUMBER, False),
        "wait": (_TEXT, False),
        "timeout": (_SECONDS, False),
        "probation": (_SECONDS, False),
        "drain_timeout": (_SECONDS, False),
    },
    Kind.STATUS: {},
    Kind.WAIT: {},
    Kind.ABORT: {},
    Kind.STEP: {"step": (_TEXT, True), "seconds": (_SECONDS, True)},
    Kind.STATE: {"state": (_OBJECT, True)},
    Kind.RESULT: {"record": (_OBJECT, True)},
    Kind.ERROR: {"code": (_TEXT, True), "reason": (_TEXT, True)},
}


def encode(kind: Kind, **fields: Any) -> bytes:
    """The packet of one message. Fields that are None are left out.

    Raises BadMessage when it would not fit into MAX_PACKET bytes.
    """
    packet = json.dumps(
        {"type": kind.value, **{name: value for name, value in fields.items() if value is not None}},
        separators=(",", ":"),
    ).encode("ascii")
    if len(packet) > MAX_PACKET:
        raise BadMessage(f"{kind.value} has {len(packet)} bytes, and a packet takes at most {MAX_PACKET}")
    return packet


def decode(packet: bytes) -> Message:
    """Read one packet.

    Raises BadMessage, which says what is wrong; the text is safe to send back and to log: nothing of the packet is
    quoted at length.
    """
    try:
        body = json.loads(packet)
    except (ValueError, RecursionError):
        raise BadMessage(f"{len(packet)} bytes that are no JSON") from None
    if not isinstance(body, dict):
        raise BadMessage(f"a JSON {type(body).__name__} instead of an object")
    name = body.pop("type", None)
    try:
        kind = Kind(name)
    except ValueError:
        raise BadMessage(f"type {str(name)[:40]!r} is not known") from None
    for field, (types, needed) in FIELDS[kind].items():
        value = body.get(field)
        if value is None:
            if needed:
                raise BadMessage(f"{kind.value} without {field!r}")
        elif not isinstance(value, types) or isinstance(value, bool):
            raise BadMessage(f"{field!r} of {kind.value} is a {type(value).__name__}")
    return Message(kind, {field: body[field] for field in FIELDS[kind] if body.get(field) is not None})


def meet(ours: tuple[int, int], theirs: Sequence[Any]) -> int | None:
    """The newest protocol version in both ranges; None where they don't meet, or where `theirs` is no range."""
    if len(theirs) != 2 or not all(type(bound) is int for bound in theirs):
        return None
    newest = min(ours[1], theirs[1])
    return int(newest) if newest >= max(ours[0], theirs[0]) else None


def batches(entries: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Cut entries (one a descriptor) into runs that fit one packet by bytes and by count; at least one run.

    Raises BadMessage when a single entry doesn't fit.
    """
    run: list[Mapping[str, Any]] = []
    size = _ROOM
    for entry in entries:
        length = len(json.dumps(entry, separators=(",", ":"))) + 1
        if length + _ROOM > MAX_PACKET:
            raise BadMessage(f"an entry has {length} bytes, and a packet takes at most {MAX_PACKET}")
        if run and (len(run) == MAX_DESCRIPTORS or size + length > MAX_PACKET):
            yield run
            run, size = [], _ROOM
        run.append(entry)
        size += length
    yield run
