"""Packets with descriptors over SOCK_SEQPACKET: what the kernel does, and what is made of it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from handoff.core.errors import BadMessage
from handoff.core.messages import MAX_DESCRIPTORS, MAX_PACKET
from handoff.linux import descriptors


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def null() -> Iterator[int]:
    """A descriptor to send."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def open_count() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def test_packet_arrives_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    """A packet of the greatest size arrives in one piece, and the next one apart from it."""
    descriptors.send(pair[0], b"x" * MAX_PACKET)
    descriptors.send(pair[0], b"next")

    assert descriptors.receive(pair[1]) == (b"x" * MAX_PACKET, [])
    assert descriptors.receive(pair[1]) == (b"next", [])


def test_descriptors_are_closed_on_exec_from_birth(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """What is received is not inheritable, though socket.recv_fds would have made it so."""
    os.set_inheritable(null, True)
    descriptors.send(pair[0], b"take", [null])

    packet, received = descriptors.receive(pair[1])

    flags = [fcntl.fcntl(number, fcntl.F_GETFD) for number in received]
    same = [os.path.samestat(os.fstat(number), os.fstat(null)) for number in received]
    descriptors.close(received)
    assert (packet, flags, same) == (b"take", [fcntl.FD_CLOEXEC], [True])


def test_greatest_number_of_descriptors(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """As many descriptors as the kernel takes in one message arrive."""
    descriptors.send(pair[0], b"many", [null] * MAX_DESCRIPTORS)

    packet, received = descriptors.receive(pair[1])

    descriptors.close(received)
    assert (packet, len(received)) == (b"many", MAX_DESCRIPTORS)


def test_one_descriptor_too_many(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """One more than the kernel takes is EINVAL, and nothing is sent."""
    with pytest.raises(OSError) as caught:
        descriptors.send(pair[0], b"too many", [null] * (MAX_DESCRIPTORS + 1))

    assert caught.value.errno == errno.EINVAL
    with pytest.raises(BlockingIOError):
        descriptors.receive(pair[1])


@pytest.mark.parametrize("free", [0, 1, 5])
def test_receiver_without_descriptors_left(free: int) -> None:
    """Near RLIMIT_NOFILE what came is closed, and the error names the limit."""
    program = f"""
import os, resource, socket
from handoff.core.errors import BadDescriptors
from handoff.linux import descriptors
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
filling = []
while True:
    try:
        filling.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        break
descriptors.send(ours, b"take", filling[:10])
descriptors.close(filling[len(filling) - {free}:])
del filling[len(filling) - {free}:]
try:
    descriptors.receive(theirs)
except BadDescriptors as error:
    print(error)
descriptors.close(filling[-2:])  # a directory's listing needs one
del filling[-2:]
print(len(os.listdir("/proc/self/fd")) - 1 == 3 + 2 + len(filling))
descriptors.send(ours, b"next")
print(descriptors.receive(theirs))
"""

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == [
        f"bad descriptors: only {free} descriptors of a batch could be received; "
        "this process may have 64 open (RLIMIT_NOFILE): raise that limit",
        "True",
        "(b'next', [])",
    ], done.stderr


def test_oversized_packet(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """A packet above the size is refused, the descriptors with it are closed, and the next packet is read."""
    descriptors.send(pair[0], b"x" * (MAX_PACKET + 1), [null])
    descriptors.send(pair[0], b"next")
    before = open_count()

    with pytest.raises(BadMessage, match=f"more than {MAX_PACKET} bytes"):
        descriptors.receive(pair[1])

    assert open_count() == before
    assert descriptors.receive(pair[1]) == (b"next", [])


def test_end_of_file(pair: tuple[socket.socket, socket.socket]) -> None:
    """A closed peer is told by an empty packet, once what it had sent was read."""
    descriptors.send(pair[0], b"last")
    pair[0].close()

    assert descriptors.receive(pair[1]) == (b"last", [])
    assert descriptors.receive(pair[1]) == (b"", [])


def test_nothing_there(pair: tuple[socket.socket, socket.socket]) -> None:
    """Receiving does not wait, also on a socket that blocks."""
    with pytest.raises(BlockingIOError):
        descriptors.receive(pair[1])


def test_empty_packet_brings_descriptors(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """Descriptors with a packet that announces nothing are the caller's: nothing is dropped unseen."""
    pair[0].sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.to_bytes(4, sys.byteorder) * 2)])

    packet, received = descriptors.receive(pair[1])

    descriptors.close(received)
    assert (packet, len(received)) == (b"", 2)


def test_full_buffer(pair: tuple[socket.socket, socket.socket], null: int) -> None:
    """A peer that does not read makes send raise instead of wait, and the descriptors stay the caller's."""
    sent = 0

    with pytest.raises(BlockingIOError):
        while True:
            descriptors.send(pair[0], b"x" * MAX_PACKET, [null])
            sent += 1

    assert os.fstat(null)
    for _ in range(sent):
        packet, received = descriptors.receive(pair[1])
        descriptors.close(received)
        assert (len(packet), len(received)) == (MAX_PACKET, 1)
    with pytest.raises(BlockingIOError):
        descriptors.receive(pair[1])


def test_sending_to_a_closed_peer(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer that is gone is an OSError, not a signal."""
    pair[1].close()

    with pytest.raises(BrokenPipeError):
        descriptors.send(pair[0], b"hello")


def test_close_of_what_is_closed(null: int) -> None:
    """Closing goes on after a descriptor that is closed already."""
    first, second = os.dup(null), os.dup(null)
    os.close(first)

    descriptors.close([first, second])

    with pytest.raises(OSError):
        os.fstat(second)
