"""The runtime directory of a service: control sockets, who is in charge, the numbers of its generations.

It is 0700 and ours, which is the whole boundary: who may enter it may command the service. Every access goes through
one directory descriptor, so that neither a long path (a Unix socket's takes 107 bytes) nor a swap of the path matters.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from typing import Final

from handoff.core.errors import BadDirectory
from handoff.core.launch import Launch

LINK: Final = "control.sock"
BACKLOG: Final = 128
_COUNTER: Final = "generation"
_LOCK: Final = "lock"
_SOCKET: Final = re.compile(r"gen-([0-9]{1,15})\.sock")
_LAUNCH: Final = re.compile(r"launch-([0-9]{1,15})\.json")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_threads = threading.Lock()  # a record lock does not keep the threads of one process apart


def base(given: str | None = None) -> str:
    """The directory above those of the services.

    `given`, else HANDOFF_RUNTIME_DIR, else /run/handoff for root, else $XDG_RUNTIME_DIR/handoff, else
    /tmp/handoff-UID.
    """
    if given or (given := os.environ.get("HANDOFF_RUNTIME_DIR")):
        return os.path.abspath(given)
    if os.geteuid() == 0:
        return "/run/handoff"
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "handoff")
    return f"/tmp/handoff-{os.geteuid()}"  # its owner is checked, as tmux does


def path_of(service: str, given: str | None = None) -> str:
    """The path of a service's runtime directory, which need not exist. Raises BadDirectory for a name unfit for one."""
    if not _NAME.fullmatch(service):
        raise BadDirectory(
            service, "a service's name has 1 to 100 letters, digits and . _ @ -, and begins with a letter or digit"
        )
    if given is None and "HANDOFF_RUNTIME_DIR" not in os.environ and os.geteuid() != 0:
        # A unit with RuntimeDirectory=handoff/web has it ready.
        prepared = os.path.join("/run/handoff", service)
        with contextlib.suppress(OSError):
            if os.lstat(prepared).st_uid == os.geteuid():
                return prepared
    return os.path.join(base(given), service)


def services(given: str | None = None) -> list[str]:
    """The names of the services that have a runtime directory, running or not."""
    try:
        return sorted(name for name in os.listdir(base(given)) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadDirectory(base(given), _why(error)) from None


class RuntimeDirectory:
    """A checked runtime directory; owns a descriptor of it until `close`.

    Each method may block for milliseconds, on the lock, and raises BadDirectory with the cause when the file system
    refuses.
    """

    def __init__(self, service: str, given: str | None = None, *, create: bool = False) -> None:
        self.path = path_of(service, given)
        try:
            if create:
                _make(os.path.dirname(self.path))
                _make(self.path)
            self._descriptor = os.open(self.path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadDirectory(self.path, _why(error)) from error
        try:
            _check(self.path, os.fstat(self._descriptor), root_may=not create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. Harmless twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def bind(self) -> tuple[int, socket.socket]:
        """Take the next generation's number and bind its control socket, which the caller owns.

        Numbers are never given twice. What dead generations left behind is removed.
        """
        with self._locked():
            generation = self._next_number()
            self._remove_stale()
            control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                control.bind(self._through(_name(generation)))
                os.chmod(_name(generation), 0o600, dir_fd=self._descriptor)
                control.listen(BACKLOG)
            except BaseException:
                control.close()
                raise
        return generation, control

    def in_charge(self) -> int | None:
        """The generation that control.sock names, alive or not; None where there is none."""
        try:
            target = os.readlink(LINK, dir_fd=self._descriptor)
        except OSError:
            return None
        return _number(target)

    def generations(self) -> list[int]:
        """The generations that have a control socket here, in their order; they need not live."""
        return sorted(number for name in os.listdir(self._descriptor) if (number := _number(name)) is not None)

    def take_charge(self, generation: int, *, instead_of: int | None) -> bool:
        """Point control.sock to `generation`, atomically; only if it now names `instead_of`, or somebody dead.

        Returns whether that was so.
        """
        with self._locked():
            now = self.in_charge()
            if now not in (instead_of, generation, None) and self.alive(now):
                return False
            self._point(generation)
            return True

    def take_over(self, generation: int) -> None:
        """Point control.sock to `generation`, whoever it names."""
        with self._locked():
            self._point(generation)

    def alive(self, generation: int | None) -> bool:
        """Whether somebody listens at a generation's control socket."""
        if generation is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(self._through(_name(generation)))
            except BlockingIOError:  # its backlog is full
                return True
            except OSError:
                return False
            return True

    def connect(self, generation: int | None = None, *, timeout: float | None = None) -> socket.socket:
        """Connect to a generation's control socket, else to the one in charge; the caller owns the socket.

        Waits `timeout` seconds for a place in its backlog, then TimeoutError (None: not at all, then BlockingIOError).
        Raises the OSError of connect(2): FileNotFoundError and ConnectionRefusedError mean that nobody is there.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if timeout is None:
                connection.setblocking(False)
            else:
                # Only a blocking connect waits for a place (unix(7)), and for no longer than this (socket(7)).
                seconds, rest = divmod(timeout, 1)
                patience = struct.pack("ll", int(seconds), max(1, int(rest * 1e6)))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            connection.connect(self._through(_name(generation) if generation is not None else LINK))
            connection.settimeout(timeout or 0)
        except BlockingIOError:
            connection.close()
            if timeout is None:
                raise
            raise TimeoutError(f"no place in the backlog in {timeout:g} s") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def keep_launch(self, generation: int, launch: Launch) -> None:
        """Write down how a generation that is in charge was started; of those before, only the last one's is kept."""
        with self._locked():
            with self._open(_launch(generation) + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
                os.write(file, launch.to_json().encode())
            os.rename(
                _launch(generation) + ".new",
                _launch(generation),
                src_dir_fd=self._descriptor,
                dst_dir_fd=self._descriptor,
            )
            for number in self._launches()[:-2]:
                self._unlink(_launch(number))

    def launch_before(self, generation: int) -> Launch | None:
        """How the generation that was in charge before `generation` was started; None where that is not known."""
        earlier = [number for number in self._launches() if number < generation]
        if not earlier:
            return None
        try:
            with self._open(_launch(earlier[-1]), os.O_RDONLY) as file:
                return Launch.from_json(os.read(file, os.fstat(file).st_size).decode())
        except OSError as error:
            raise BadDirectory(self.path, _why(error)) from None

    def _launches(self) -> list[int]:
        names = os.listdir(self._descriptor)
        return sorted(int(found[1]) for name in names if (found := _LAUNCH.fullmatch(name)))

    def leave(self, generation: int) -> None:
        """Remove a generation's control socket, and control.sock if it still names it."""
        with contextlib.suppress(BadDirectory), self._locked():
            if self.in_charge() == generation:
                self._unlink(LINK)
            self._unlink(_name(generation))

    def _point(self, generation: int) -> None:
        self._unlink(LINK + ".new")
        os.symlink(_name(generation), LINK + ".new", dir_fd=self._descriptor)
        os.rename(LINK + ".new", LINK, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def _next_number(self) -> int:
        last = max(self.generations(), default=0)
        with contextlib.suppress(FileNotFoundError, ValueError), self._open(_COUNTER, os.O_RDONLY) as counter:
            last = max(last, int(os.read(counter, 20)))
        with self._open(_COUNTER + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as counter:
            os.write(counter, b"%d\n" % (last + 1))
        os.rename(_COUNTER + ".new", _COUNTER, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        return last + 1

    def _remove_stale(self) -> None:
        for number in self.generations():
            if not self.alive(number):
                self._unlink(_name(number))

    def _through(self, name: str) -> str:
        return f"/proc/self/fd/{self._descriptor}/{name}"

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    @contextlib.contextmanager
    def _open(self, name: str, flags: int) -> Iterator[int]:
        descriptor = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A record lock, not flock(2): a forked child of a dead owner would still hold that one.
        try:
            with _threads, self._open(_LOCK, os.O_RDWR | os.O_CREAT) as lock:
                fcntl.lockf(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise BadDirectory(self.path, _why(error)) from None


def _name(generation: int) -> str:
    return f"gen-{generation}.sock"


def _launch(generation: int) -> str:
    return f"launch-{generation}.json"


def _number(name: str) -> int | None:
    found = _SOCKET.fullmatch(name)
    return int(found[1]) if found else None


def _make(path: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _check(path, os.lstat(path), root_may=False)


def _check(path: str, found: os.stat_result, *, root_may: bool) -> None:
    """Refuse a directory that isn't ours alone to change; `root_may`: root may look into and command anybody's."""
    if stat.S_ISLNK(found.st_mode):
        raise BadDirectory(path, "it is a symbolic link; name the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise BadDirectory(path, "it is no directory")
    if found.st_uid not in (os.geteuid(), 0) and not (root_may and os.geteuid() == 0):
        raise BadDirectory(path, f"it belongs to uid {found.st_uid}, and this process has uid {os.geteuid()}")
    if found.st_mode & 0o022:
        raise BadDirectory(
            path, f"others can write to it (mode {stat.S_IMODE(found.st_mode):o}); mend it with `chmod go-w {path}`"
        )


def _why(error: OSError) -> str:
    match error.errno:
        case errno.ELOOP | errno.ENOTDIR:
            return "it is no directory, or it is a symbolic link; name the directory itself"
        case errno.ENOENT:
            return "it does not exist"
        case errno.EACCES | errno.EPERM:
            return f"no right to use it as uid {os.geteuid()}; name another one with HANDOFF_RUNTIME_DIR"
        case errno.ENOSPC | errno.EDQUOT:
            return "its file system is full; make room there, a few KiB are enough"
        case errno.EROFS:
            return "its file system is read-only; name another one with HANDOFF_RUNTIME_DIR"
        case _:
            return error.strerror or str(error)
