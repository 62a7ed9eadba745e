"""Which listeners are kept, added and removed by an upgrade."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from handoff.core.address import Address
from handoff.core.errors import BadMessage

LISTENER: Final = "listener"
STDERR: Final = "stderr"  # what the old generation writes its errors to
LAST_WORDS: Final = "last-words"  # the reading end of the pipe that the new program was started with


@attrs.frozen(kw_only=True)
class Entry:
    """What a passed descriptor is: sent beside it, and checked against it on arrival."""

    kind: str = LISTENER
    address: str = ""  # as bound
    requested: str = ""  # as asked for, where that was another: port 0, a name
    cookie: int = 0  # SO_COOKIE: the socket's identity in every process
    inode: tuple[int, int] | None = None  # device and inode of a Unix socket's path

    def to_json(self) -> dict[str, Any]:
        """The entry as it goes into a `descriptors` message."""
        return {name: value for name, value in attrs.asdict(self, recurse=False).items() if value}

    @classmethod
    def from_json(cls, body: object) -> Entry:
        """Read one entry; unknown fields are ignored. Raises BadMessage."""
        if not isinstance(body, Mapping):
            raise BadMessage("an entry that is no object")
        kind, address = body.get("kind", LISTENER), body.get("address", "")
        requested, cookie = body.get("requested", ""), body.get("cookie", 0)
        inode = body.get("inode")
        if not (
            all(isinstance(text, str) for text in (kind, address, requested))
            and type(cookie) is int
            and (inode is None or (isinstance(inode, list) and [type(part) for part in inode] == [int, int]))
        ):
            raise BadMessage("an entry with a field of the wrong type")
        return cls(
            kind=kind,
            address=address,
            requested=requested,
            cookie=cookie,
            inode=None if inode is None else (inode[0], inode[1]),
        )


@attrs.frozen
class Plan:
    """What becomes of the listeners, each by its address."""

    kept: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def claim(wanted: Address, inherited: Iterable[Entry]) -> Entry | None:
    """The inherited listener that `wanted` asks for: bound there, or asked for by the same words (port 0, a name)."""
    text = str(wanted)
    candidates = list(inherited)
    for entry in candidates:
        if entry.address == text:
            return entry
    for entry in candidates:
        if entry.requested == text:
            return entry
    return None


def plan(inherited: Sequence[Entry], listening: Sequence[str]) -> Plan:
    """Compare what was inherited with the addresses that the new generation listens on."""
    had = [entry.address for entry in inherited]
    return Plan(
        kept=tuple(address for address in had if address in listening),
        added=tuple(address for address in listening if address not in had),
        removed=tuple(address for address in had if address not in listening),
    )
