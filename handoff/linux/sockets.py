"""Listening sockets: opening, naming and checking them; and who is at the other end of a Unix connection.

Every listener is O_NONBLOCK for life: the flag belongs to the open file description, which two generations share.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from typing import Final

import attrs

from handoff.core.address import Address
from handoff.core.errors import BadAddress, BadDescriptors, CannotListen
from handoff.core.plan import Entry

SO_COOKIE: Final = 57  # asm-generic/socket.h; equals sock_diag's idiag_cookie
SO_PEERPIDFD: Final = 77  # since Linux 6.5


@attrs.frozen
class Opened:
    """A listening socket, which the holder owns, and what it became."""

    socket: socket.socket
    entry: Entry


def resolve(address: Address) -> Address:
    """The address with its host as the number that the system's resolver gives first; may block on DNS.

    Raises BadAddress.
    """
    if address.kind == "unix":
        return address
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise BadAddress(str(address), f"host {address.host!r} is not known ({error})") from None
    return attrs.evolve(address, host=_literal(found[0][4]))


def open_listener(address: Address) -> Opened:
    """Bind and listen at a resolved address.

    The socket file of a Unix address that nobody listens on is replaced. Raises CannotListen.
    """
    try:
        if address.kind == "unix":
            return _open_unix(address)
        return _open_tcp(address)
    except OSError as error:
        raise CannotListen(str(address), _why(error, address)) from None


def bound_address(listener: socket.socket) -> str:
    """The address of a bound socket, as `str(Address)` prints it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix://{os.fsdecode(name).removesuffix('~')}"  # bytes for an abstract one, which is never ours
    return str(Address(kind="tcp", host=_literal(name), port=name[1]))


def cookie(connection: socket.socket) -> int:
    """The number that names this socket in every process of the machine."""
    (value,) = struct.unpack("Q", connection.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(value)


def adopt(descriptor: int, entry: Entry) -> socket.socket:
    """Check a received descriptor against its entry; takes the descriptor.

    Raises BadDescriptors when it is anything but the listening stream socket that the entry tells of; then it has
    been closed.
    """
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise BadDescriptors(f"what came for {entry.address} is no socket") from None
    try:
        if listener.type != socket.SOCK_STREAM:
            raise BadDescriptors(f"what came for {entry.address} is no stream socket")
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BadDescriptors(f"what came for {entry.address} does not listen")
        if bound_address(listener) != entry.address:
            raise BadDescriptors(f"what came for {entry.address} listens on {bound_address(listener)}")
        if cookie(listener) != entry.cookie:
            raise BadDescriptors(f"what came for {entry.address} is another socket than announced")
    except BaseException:
        listener.close()
        raise
    # The flag is on already, for every listener of ours; the Python object has to learn of it.
    listener.setblocking(False)
    return listener


def inode(path: str) -> tuple[int, int] | None:
    """Device and inode of a path, not following a link; None where there is nothing."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def unlink_own(path: str, own: tuple[int, int]) -> None:
    """Remove a socket's path, under both of its names, if what is there is our own device and inode."""
    for name in (path, path + "~"):
        if inode(name) == own:
            with contextlib.suppress(OSError):
                os.unlink(name)


def restore(path: str, own: tuple[int, int]) -> bool:
    """Give a socket its path back if somebody unlinked it. Returns whether that was needed and done.

    The socket was bound under a second name; that one is still there when a server library unlinked the first.
    """
    if inode(path) == own or inode(path + "~") != own:
        return False
    try:
        os.link(path + "~", path)
    except OSError:
        return False
    return True


def apply_options(listener: socket.socket, address: Address, own: tuple[int, int] | None) -> None:
    """Give a kept listener the options that can be changed while it listens: backlog, a Unix path's mode."""
    listener.listen(address.backlog)
    if address.kind == "unix" and address.mode is not None and own is not None and inode(address.path) == own:
        os.chmod(address.path, address.mode)


def peer_credentials(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of who connected, or of who called listen(2) where this side connected; pid 0 is out of sight."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)


def peer_pidfd(connection: socket.socket) -> int | None:
    """A pidfd of the peer, which the caller owns (CLOEXEC: every pidfd is); None where the kernel can't tell."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return None
    pid, _ = peer_credentials(connection)
    try:
        return os.pidfd_open(pid) if pid else None
    except OSError:
        return None


def _literal(name: object) -> str:
    assert isinstance(name, tuple)
    host = str(name[0])
    scope = name[3] if len(name) == 4 else 0
    if "%" not in host and scope:
        host += f"%{socket.if_indextoname(scope)}"
    return host


def _open_tcp(address: Address) -> Opened:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.reuseport:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.v6only is not None and family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.v6only)
        host, _, scope = address.host.partition("%")
        where = (host, address.port, 0, socket.if_nametoindex(scope)) if scope else (host, address.port)
        listener.bind(where)
        listener.listen(address.backlog)
    except BaseException:
        listener.close()
        raise
    return Opened(listener, Entry(address=bound_address(listener), requested=str(address), cookie=cookie(listener)))


def _open_unix(address: Address) -> Opened:
    # Bound under a name of its own and then linked to the public one: the change is atomic, the mode is right from
    # the first moment, and a server library that unlinks what getsockname(2) tells it does not take the path away.
    path, bound = address.path, address.path + "~"
    _refuse_if_served(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bound)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    own = None
    try:
        listener.bind(bound)
        own = inode(bound)
        if address.mode is not None:
            os.chmod(bound, address.mode)
        listener.listen(address.backlog)
        spare = path + "~~"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(spare)
        os.link(bound, spare)
        os.rename(spare, path)
    except BaseException:
        listener.close()
        if own:
            unlink_own(path, own)
        raise
    return Opened(listener, Entry(address=str(address), requested=str(address), cookie=cookie(listener), inode=own))


def _refuse_if_served(path: str) -> None:
    """Raise an OSError if the path is no socket, or if somebody listens on it."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "it is there, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # its backlog is full: somebody listens
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _why(error: OSError, address: Address) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another process listens there"
        case errno.EADDRNOTAVAIL:
            return f"{address.host} is no address of this machine"
        case errno.EACCES | errno.EPERM if address.kind == "tcp":
            return f"no right to bind port {address.port}; ports below 1024 need CAP_NET_BIND_SERVICE"
        case errno.EMFILE | errno.ENFILE:
            return f"{error.strerror}: raise RLIMIT_NOFILE"
        case _:
            return error.strerror or str(error)
