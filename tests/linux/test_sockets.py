"""Listening sockets: how they are opened, named, checked and removed; and who is at the other end."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from handoff.core.address import parse
from handoff.core.errors import BadAddress, BadDescriptors, CannotListen
from handoff.core.plan import Entry
from handoff.linux import sockets
from handoff.linux.sockets import Opened

PATIENCE = 10.0
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


class Listeners:
    """Opens listeners; `close` closes all of them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def open(self, address: str) -> Opened:
        """Open one."""
        opened = sockets.open_listener(sockets.resolve(parse(address)))
        self._stack.callback(opened.socket.close)
        return opened

    def close(self) -> None:
        """Close all."""
        self._stack.close()


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    """Opens listeners and closes them when the test is over."""
    made = Listeners()
    yield made
    made.close()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a path that is short enough for Unix sockets, gone afterwards."""
    short = Path(f"/tmp/handoff-test-{os.getpid()}")
    short.symlink_to(tmp_path)
    yield short
    short.unlink()


def descriptor_flags(opened: Opened) -> tuple[bool, bool]:
    """(closed on exec, non-blocking) of the descriptor itself."""
    number = opened.socket.fileno()
    return (
        bool(fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC),
        bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_NONBLOCK),
    )


def ask(address: str, listener: socket.socket) -> bytes:
    """Connect to an address as a client does, and greet through the listener."""
    parsed = parse(address)
    where: str | tuple[str, int] = parsed.path if parsed.kind == "unix" else (parsed.host, parsed.port)
    with socket.socket(listener.family) as client:
        client.settimeout(PATIENCE)
        client.connect(where)
        assert select.select([listener], [], [], PATIENCE)[0]
        served, _ = listener.accept()
        with served:
            served.sendall(b"hello")
        return client.recv(10)


def run(program: str, *arguments: str) -> str:
    """Run a Python program to its end; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Opening


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://localhost:0", "unix://{}/web.sock"])
def test_open(listeners: Listeners, directory: Path, address: str) -> None:
    """A listener is non-blocking and not inherited, and a client that connects to its address is served."""
    opened = listeners.open(address.format(directory))

    assert descriptor_flags(opened) == (True, True)
    assert ask(opened.entry.address, opened.socket) == b"hello"


def test_port_0(listeners: Listeners) -> None:
    """With port 0 the entry tells the real port, and what was asked for."""
    opened = listeners.open("tcp://127.0.0.1:0")

    port = opened.socket.getsockname()[1]
    assert (opened.entry.address, opened.entry.requested) == (f"tcp://127.0.0.1:{port}", "tcp://127.0.0.1:0")


def test_reuseport(listeners: Listeners) -> None:
    """With reuseport two sockets listen at one address."""
    first = listeners.open("tcp://127.0.0.1:0?reuseport")

    second = listeners.open(first.entry.address + "?reuseport")

    assert (second.entry.address, second.entry.cookie != first.entry.cookie) == (first.entry.address, True)


@pytest.mark.parametrize("v6only", [False, True])
def test_v6only(listeners: Listeners, v6only: bool) -> None:
    """A listener at [::] takes clients over IPv4 too, unless it is v6only."""
    opened = listeners.open(f"tcp://[::]:0?v6only={'yes' if v6only else 'no'}")
    port = opened.socket.getsockname()[1]

    with socket.socket(socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        refused = client.connect_ex(("127.0.0.1", port)) != 0

    assert refused is v6only


def test_backlog(listeners: Listeners) -> None:
    """The backlog is what the address says: TCP_INFO of a listener tells it."""
    opened = listeners.open("tcp://127.0.0.1:0?backlog=17")

    info = array.array("I", opened.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[8:])
    assert info[5] == 17  # tcpi_sacked: the backlog of a listener


def test_address_in_use(listeners: Listeners) -> None:
    """Where another process listens, the error says so."""
    first = listeners.open("tcp://127.0.0.1:0")

    with pytest.raises(CannotListen) as caught:
        listeners.open(first.entry.address)

    assert str(caught.value) == f"cannot listen on {first.entry.address}: another process listens there"


def test_address_of_another_machine(listeners: Listeners) -> None:
    """An address that this machine does not have is named."""
    with pytest.raises(CannotListen) as caught:
        listeners.open("tcp://192.0.2.1:0")

    assert str(caught.value) == "cannot listen on tcp://192.0.2.1:0: 192.0.2.1 is no address of this machine"


def test_unknown_host() -> None:
    """A host name that nobody knows is named."""
    with pytest.raises(BadAddress, match=r"host 'no-such-host\.invalid' is not known"):
        sockets.resolve(parse("tcp://no-such-host.invalid:80"))


@AS_ROOT
def test_privileged_port() -> None:
    """A port that takes a privilege is told to be one."""
    program = """
import os
from handoff.core.address import parse
from handoff.linux import sockets
os.setuid(65534)
try:
    sockets.open_listener(parse("tcp://127.0.0.1:81"))
except Exception as error:
    print(error)
"""
    assert run(program) == (
        "cannot listen on tcp://127.0.0.1:81: no right to bind port 81; ports below 1024 need CAP_NET_BIND_SERVICE"
    )


def test_descriptors_used_up() -> None:
    """Without descriptors left the limit is named."""
    program = """
import os, resource
from handoff.core.address import parse
from handoff.linux import sockets
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    sockets.open_listener(parse("tcp://127.0.0.1:0"))
except Exception as error:
    print(error)
"""
    assert run(program) == "cannot listen on tcp://127.0.0.1:0: Too many open files: raise RLIMIT_NOFILE"


# Unix sockets


def test_unix_names(listeners: Listeners, directory: Path) -> None:
    """A Unix socket is bound under a name of its own, and the public one is a link to it."""
    path = directory / "web.sock"

    opened = listeners.open(f"unix://{path}")

    assert opened.socket.getsockname() == f"{path}~"
    assert sockets.inode(f"{path}~") == sockets.inode(str(path)) == opened.entry.inode
    assert sorted(os.listdir(directory)) == ["web.sock", "web.sock~"]
    assert opened.entry.address == f"unix://{path}"


def test_unix_mode(listeners: Listeners, directory: Path) -> None:
    """A Unix socket's public path has its mode from the first moment: whoever sees it sees that mode."""
    path = directory / "web.sock"
    program = """
import os, sys
print("watching", flush=True)
while True:
    try:
        print(oct(os.stat(sys.argv[1]).st_mode & 0o777))
        break
    except FileNotFoundError:
        pass
"""
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        assert watching.stdout.readline() == "watching\n"

        listeners.open(f"unix://{path}?mode=640")

        assert watching.communicate(timeout=PATIENCE)[0] == "0o640\n"


def test_stale_path_is_replaced(listeners: Listeners, directory: Path) -> None:
    """A socket file that nobody listens on is replaced."""
    address = f"unix://{directory}/web.sock"
    dead = listeners.open(address)
    listeners.close()

    opened = listeners.open(address)

    assert opened.entry.inode != dead.entry.inode
    assert ask(address, opened.socket) == b"hello"


def test_replacing_is_atomic(listeners: Listeners, directory: Path) -> None:
    """While a stale path is replaced it is there at every moment."""
    path = directory / "web.sock"
    listeners.open(f"unix://{path}")
    program = """
import os, sys
print("watching", flush=True)
while not os.path.exists(sys.argv[2]):
    os.stat(sys.argv[1])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, path, directory / "end"], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout
        watching.stdout.readline()

        for _ in range(200):
            listeners.close()
            listeners.open(f"unix://{path}")
        (directory / "end").touch()

        assert watching.wait(PATIENCE) == 0


@pytest.mark.parametrize("backlog", [1, 100])
def test_path_in_use(listeners: Listeners, directory: Path, backlog: int) -> None:
    """A path that somebody listens on is not taken away, also when that one's backlog is full."""
    address = f"unix://{directory}/web.sock?backlog={backlog}"
    first = listeners.open(address)

    for _ in range(4):
        with pytest.raises(CannotListen) as caught:
            listeners.open(address)

    assert str(caught.value) == f"cannot listen on {first.entry.address}: another process listens there"
    assert sockets.inode(f"{directory}/web.sock") == first.entry.inode


def test_path_of_a_file(listeners: Listeners, directory: Path) -> None:
    """A file that is no socket is left alone."""
    path = directory / "web.sock"
    path.write_text("precious")

    with pytest.raises(CannotListen, match="it is there, and is no socket"):
        listeners.open(f"unix://{path}")

    assert path.read_text() == "precious"
    assert os.listdir(directory) == ["web.sock"]


def test_path_of_a_datagram_socket(listeners: Listeners, directory: Path) -> None:
    """A path where somebody else's datagram socket is bound is left alone."""
    path = directory / "web.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        own = sockets.inode(str(path))

        with pytest.raises(CannotListen):
            listeners.open(f"unix://{path}")

        assert sockets.inode(str(path)) == own


def test_directory_that_is_missing(listeners: Listeners, directory: Path) -> None:
    """A Unix path in a directory that is not there is refused with the system's words."""
    with pytest.raises(CannotListen, match="No such file or directory"):
        listeners.open(f"unix://{directory}/nowhere/web.sock")


def test_longest_path(listeners: Listeners, directory: Path) -> None:
    """The longest path that an address takes can be bound; one byte more is refused by name."""
    path = f"{directory}/".ljust(106, "x")

    opened = listeners.open(f"unix://{path}")

    assert ask(opened.entry.address, opened.socket) == b"hello"
    with pytest.raises(BadAddress, match="the path has 107 bytes, and a Unix socket's takes at most 106"):
        parse(f"unix://{path}x")


def test_failure_leaves_nothing(listeners: Listeners, directory: Path) -> None:
    """When the public name cannot be made, the name that was bound first is removed again."""
    (directory / "web.sock~~").mkdir()

    with pytest.raises(CannotListen):
        listeners.open(f"unix://{directory}/web.sock")

    assert os.listdir(directory) == ["web.sock~~"]


def test_unlink_own(listeners: Listeners, directory: Path) -> None:
    """A socket's path goes under both of its names."""
    opened = listeners.open(f"unix://{directory}/web.sock")
    assert opened.entry.inode

    sockets.unlink_own(f"{directory}/web.sock", opened.entry.inode)

    assert os.listdir(directory) == []


def test_unlink_of_somebody_elses(listeners: Listeners, directory: Path) -> None:
    """A path that is another socket's by now stays."""
    path = directory / "web.sock"
    first = listeners.open(f"unix://{path}")
    path.unlink()
    (directory / "web.sock~").unlink()
    second = listeners.open(f"unix://{path}")
    assert first.entry.inode

    sockets.unlink_own(str(path), first.entry.inode)

    assert sockets.inode(str(path)) == second.entry.inode


def test_unlink_twice(listeners: Listeners, directory: Path) -> None:
    """Removing what is gone is harmless."""
    opened = listeners.open(f"unix://{directory}/web.sock")
    assert opened.entry.inode
    sockets.unlink_own(f"{directory}/web.sock", opened.entry.inode)

    sockets.unlink_own(f"{directory}/web.sock", opened.entry.inode)

    assert os.listdir(directory) == []


def test_restore(listeners: Listeners, directory: Path) -> None:
    """A path that a server library has unlinked is given back, and clients reach the same socket."""
    opened = listeners.open(f"unix://{directory}/web.sock")
    assert opened.entry.inode
    os.unlink(directory / "web.sock")

    restored = sockets.restore(f"{directory}/web.sock", opened.entry.inode)

    assert restored
    assert ask(opened.entry.address, opened.socket) == b"hello"


def test_unlinking_what_getsockname_tells(listeners: Listeners, directory: Path) -> None:
    """A library that unlinks what getsockname tells does not take the path away."""
    opened = listeners.open(f"unix://{directory}/web.sock")

    os.unlink(opened.socket.getsockname())

    assert ask(opened.entry.address, opened.socket) == b"hello"


def test_restore_of_what_is_there(listeners: Listeners, directory: Path) -> None:
    """Where the path is in its place there is nothing to restore."""
    opened = listeners.open(f"unix://{directory}/web.sock")
    assert opened.entry.inode

    assert not sockets.restore(f"{directory}/web.sock", opened.entry.inode)


def test_restore_takes_nothing_away(listeners: Listeners, directory: Path) -> None:
    """A path that is somebody else's by now is not taken back."""
    path = directory / "web.sock"
    opened = listeners.open(f"unix://{path}")
    assert opened.entry.inode
    path.unlink()
    path.write_text("somebody else's")

    restored = sockets.restore(str(path), opened.entry.inode)

    assert (restored, path.read_text()) == (False, "somebody else's")


def test_options_of_a_kept_listener(listeners: Listeners, directory: Path) -> None:
    """Mode and backlog can be changed while a socket listens."""
    path = directory / "web.sock"
    opened = listeners.open(f"unix://{path}?mode=600")

    sockets.apply_options(opened.socket, parse(f"unix://{path}?mode=660&backlog=7"), opened.entry.inode)

    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert ask(opened.entry.address, opened.socket) == b"hello"


# Taking over


def adopt_a_copy(listener: socket.socket, entry: Entry) -> socket.socket:
    """Adopt a copy of a socket's descriptor."""
    return sockets.adopt(os.dup(listener.fileno()), entry)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix://{}/web.sock"])
def test_adopt(listeners: Listeners, directory: Path, address: str) -> None:
    """A descriptor that is what its entry tells becomes a listener that does not block."""
    opened = listeners.open(address.format(directory))

    with adopt_a_copy(opened.socket, opened.entry) as adopted:
        assert adopted.gettimeout() == 0
        assert ask(opened.entry.address, adopted) == b"hello"


def assert_refused(descriptor: int, entry: Entry, reason: str) -> None:
    """Adopting is refused for a reason, and the descriptor has been closed."""
    with pytest.raises(BadDescriptors) as caught:
        sockets.adopt(descriptor, entry)

    assert str(caught.value) == f"bad descriptors: what came for {entry.address} {reason}"
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_adopt_a_file(listeners: Listeners) -> None:
    """What is no socket is refused and closed."""
    entry = listeners.open("tcp://127.0.0.1:0").entry

    assert_refused(os.open(os.devnull, os.O_RDONLY), entry, "is no socket")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_adopt_a_datagram_socket(listeners: Listeners, family: socket.AddressFamily) -> None:
    """A datagram socket is refused and closed."""
    entry = listeners.open("tcp://127.0.0.1:0").entry

    assert_refused(socket.socket(family, socket.SOCK_DGRAM).detach(), entry, "is no stream socket")


def test_adopt_what_does_not_listen(listeners: Listeners) -> None:
    """A bound socket that does not listen is refused and closed."""
    entry = listeners.open("tcp://127.0.0.1:0").entry

    assert_refused(socket.socket(socket.AF_INET).detach(), entry, "does not listen")


def test_adopt_another_address(listeners: Listeners) -> None:
    """A listener at another address is refused and closed."""
    entry = listeners.open("tcp://127.0.0.1:0").entry
    other = listeners.open("tcp://127.0.0.1:0")

    assert_refused(os.dup(other.socket.fileno()), entry, f"listens on {other.entry.address}")


def test_adopt_another_socket(listeners: Listeners) -> None:
    """Another socket at the very same address is told by its cookie."""
    first = listeners.open("tcp://127.0.0.1:0?reuseport")
    second = listeners.open(f"{first.entry.address}?reuseport")

    assert_refused(os.dup(second.socket.fileno()), first.entry, "is another socket than announced")


def test_adopt_another_path(listeners: Listeners, directory: Path) -> None:
    """A Unix listener at another path is refused and closed."""
    entry = listeners.open(f"unix://{directory}/web.sock").entry
    other = listeners.open(f"unix://{directory}/other.sock")

    assert_refused(os.dup(other.socket.fileno()), entry, f"listens on unix://{directory}/other.sock")


def test_adopt_another_kind(listeners: Listeners, directory: Path) -> None:
    """A TCP listener that came for a Unix path is refused and closed."""
    entry = listeners.open(f"unix://{directory}/web.sock").entry
    other = listeners.open("tcp://127.0.0.1:0")

    assert_refused(os.dup(other.socket.fileno()), entry, f"listens on {other.entry.address}")


def test_adopt_an_abstract_socket(listeners: Listeners) -> None:
    """A listener at an abstract Unix address, which no path names, is refused and closed."""
    entry = listeners.open("tcp://127.0.0.1:0").entry
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0handoff-test-{os.getpid()}")
        other.listen()

        assert_refused(os.dup(other.fileno()), entry, f"listens on unix://\0handoff-test-{os.getpid()}")


def test_adopt_a_shut_listener(listeners: Listeners) -> None:
    """A listener that was shut down, by whichever process that shares it, does not listen any more."""
    opened = listeners.open("tcp://127.0.0.1:0")
    copy = os.dup(opened.socket.fileno())

    opened.socket.shutdown(socket.SHUT_RDWR)

    assert_refused(copy, opened.entry, "does not listen")


# What the kernel does with shared sockets


def test_cookie_is_the_same_everywhere(listeners: Listeners) -> None:
    """A socket has one cookie, whichever process asks and through whichever descriptor."""
    opened = listeners.open("tcp://127.0.0.1:0")
    program = """
import socket, sys
from handoff.linux import sockets
print(sockets.cookie(socket.socket(fileno=int(sys.argv[1]))))
"""
    number = opened.socket.fileno()

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(number)],
        pass_fds=[number],
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) == opened.entry.cookie


def test_cookies_differ(listeners: Listeners) -> None:
    """Two sockets never have the same cookie."""
    cookies = {listeners.open("tcp://127.0.0.1:0").entry.cookie for _ in range(20)}

    assert len(cookies) == 20


def test_close_keeps_the_queue(listeners: Listeners) -> None:
    """A connection that is queued when one holder closes is accepted by the other one."""
    opened = listeners.open("tcp://127.0.0.1:0")
    twin = adopt_a_copy(opened.socket, opened.entry)
    with twin, socket.create_connection(opened.socket.getsockname(), timeout=PATIENCE) as client:
        opened.socket.close()

        served, _ = twin.accept()
        with served:
            served.sendall(b"hello")
        assert client.recv(10) == b"hello"


def test_non_blocking_is_shared(listeners: Listeners) -> None:
    """O_NONBLOCK belongs to the socket and not to the descriptor: what one holder sets, all have."""
    opened = listeners.open("tcp://127.0.0.1:0")
    copy = os.dup(opened.socket.fileno())

    os.set_blocking(copy, True)

    shared = os.get_blocking(opened.socket.fileno())
    os.close(copy)
    assert shared


# The other end


@pytest.fixture
def dialled(directory: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection that another process has made, and that process; it ends when its input does."""
    program = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
    client.connect(sys.argv[1])
    sys.stdin.read()
"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"{directory}/control.sock")
        listening.listen()
        listening.settimeout(PATIENCE)
        with subprocess.Popen([sys.executable, "-c", program, listening.getsockname()], stdin=subprocess.PIPE) as peer:
            connection, _ = listening.accept()
            with connection:
                yield connection, peer


def test_peer_credentials(dialled: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    """The pid and the uid of who connected."""
    connection, peer = dialled

    assert sockets.peer_credentials(connection) == (peer.pid, os.geteuid())


def test_peer_pidfd(dialled: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    """The pidfd of who connected is not inherited, and readable once that process has ended."""
    connection, peer = dialled

    pidfd = sockets.peer_pidfd(connection)

    assert pidfd is not None
    lived = not select.select([pidfd], [], [], 0)[0]
    inherited = os.get_inheritable(pidfd)
    assert peer.stdin
    peer.stdin.close()
    ended = bool(select.select([pidfd], [], [], PATIENCE)[0])
    os.close(pidfd)
    assert (lived, inherited, ended) == (True, False, True)


def test_pidfd_of_a_dead_peer(dialled: tuple[socket.socket, subprocess.Popen[bytes]]) -> None:
    """A peer that has ended and was reaped is dead to whoever asks: there is no pidfd, or one that is readable."""
    connection, peer = dialled
    assert peer.stdin
    peer.stdin.close()
    peer.wait(PATIENCE)

    pidfd = sockets.peer_pidfd(connection)

    if pidfd is not None:
        ended = select.select([pidfd], [], [], 0)[0]
        os.close(pidfd)
        assert ended


def test_bound_address_of_v4_mapped(listeners: Listeners) -> None:
    """The same address has the same words, whatever way it was written in."""
    opened = listeners.open("tcp://[0:0:0:0:0:0:0:1]:0")

    assert opened.entry.address == f"tcp://[::1]:{opened.socket.getsockname()[1]}"


def test_entry_survives_the_wire(listeners: Listeners, directory: Path) -> None:
    """An entry that was sent and read again still fits its socket."""
    opened = listeners.open(f"unix://{directory}/web.sock")

    sent = Entry.from_json(attrs.asdict(opened.entry) | {"inode": list(opened.entry.inode or ())})

    adopt_a_copy(opened.socket, sent).close()
