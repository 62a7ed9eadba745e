"""Packets with descriptors over SOCK_SEQPACKET (unix(7), SCM_RIGHTS). Nothing here blocks."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterable, Sequence

from handoff.core.errors import BadDescriptors, BadMessage
from handoff.core.messages import MAX_DESCRIPTORS, MAX_PACKET

_ROOM = socket.CMSG_LEN(MAX_DESCRIPTORS * array.array("i").itemsize)  # CMSG_SPACE would let one more in


def send(connection: socket.socket, packet: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one packet and, with it, borrowed descriptors: they stay the caller's.

    Raises BlockingIOError when the peer's buffer is full, and OSError when the peer is gone.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([packet], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and the descriptors that came with it: those are the caller's to close, CLOEXEC from birth.

    b"" means end of file. Raises BlockingIOError when nothing is there, OSError when the connection is broken,
    BadMessage for a packet above MAX_PACKET, BadDescriptors when the kernel could not deliver every descriptor; then
    those that it did deliver have been closed.
    """
    packet, ancillary, flags, _ = connection.recvmsg(MAX_PACKET, _ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    if flags & socket.MSG_CTRUNC:
        close(received)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise BadDescriptors(
            f"only {len(received)} descriptors of a batch could be received; "
            f"this process may have {limit} open (RLIMIT_NOFILE): raise that limit"
        )
    if flags & socket.MSG_TRUNC:
        close(received)
        raise BadMessage(f"a packet of more than {MAX_PACKET} bytes")
    return packet, received.tolist()


def close(descriptors: Iterable[int]) -> None:
    """Close raw descriptors that the caller owns, whatever state they are in."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
