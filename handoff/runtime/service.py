"""`Service`: what a program with threads, or plain code, holds of handoff."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from handoff.core.address import parse
from handoff.core.deadlines import Deadlines
from handoff.core.drain import Drain
from handoff.core.errors import CannotListen, HandoffError
from handoff.core.plan import Entry, claim, plan
from handoff.core.record import Record, Step
from handoff.core.version import VERSION
from handoff.linux import processes, sockets
from handoff.runtime.connections import Connections
from handoff.runtime.control import Control
from handoff.runtime.directory import RuntimeDirectory
from handoff.runtime.hooks import Hook, Hooks
from handoff.runtime.listener import Gate, Listener
from handoff.runtime.loop import READ
from handoff.runtime.new import New
from handoff.runtime.old import Old
from handoff.runtime.successor import UPGRADE_VARIABLE
from handoff.runtime.watchers import Watchers

if TYPE_CHECKING:
    from handoff.linux.inotify import Inotify

_LOOK: Final = 0.1  # seconds between two looks for connections whose end nobody tells, while draining
_PAUSED_INTERVAL: Final = 0.0005  # seconds; CPython's own is 0.005
_log = logging.getLogger(__name__)
_services: weakref.WeakSet[Service] = weakref.WeakSet()


class Service:
    """One generation of a service: a context manager around the program's life.

    ::

        with handoff.Service("web") as service:
            listener = service.listen("tcp://127.0.0.1:8080")
            service.ready()
            for connection, peer in listener:
                threading.Thread(target=serve, args=(connection,)).start()

    Entering binds the control socket and, in an upgrade, waits for the old generation's sockets. Leaving waits until
    this generation is done: it has been replaced and its open connections have ended, or it has been stopped. One
    that is paused in probation waits there for commit or for being taken back.

    TERM and INT stop the service, a second one at once, if the application has no handler of its own for them and
    the context is entered in the main thread.
    """

    def __init__(
        self,
        name: str,
        *,
        runtime_dir: str | None = None,
        command: Sequence[str] | None = None,
        ready_timeout: float = 60.0,
        probation: float = 5.0,
        drain_timeout: float = 30.0,
        grace: float = 5.0,
        signals: bool = True,
    ) -> None:
        """Describe the service; nothing is done before it is entered.

        `command` starts the next version (else: what started this one). Times are in seconds: how long a new program
        may take to be ready, how long it is watched before it is committed, how long this one may take to finish its
        connections and, of that, for how long an idle one is kept. Raises ValueError for a time that is none.
        """
        self.name: Final = name
        self._runtime_dir = runtime_dir
        launch = processes.own_launch()
        self._launch = launch.changed(command=command, environment={}) if command else launch
        self._deadlines = Deadlines(ready=ready_timeout, probation=probation, drain=drain_timeout, grace=grace)
        self.leave_timeout: Final = self._deadlines.leave
        self._signals = signals
        self.hooks: Final = Hooks()
        self.finishing: Final = Watchers()  # told, from the control thread, when `wait` returns
        self.open: Final = Connections()
        self._inherited: list[sockets.Opened] = []  # until they are claimed, or `ready` closes them
        self._had: list[Entry] = []  # all that were inherited, in their order
        self._listeners: list[Listener] = []
        self._control: Control | None = None
        self._adopted = threading.Event()
        self._over = threading.Event()  # set when this generation does not accept any more, for good
        self._ended = threading.Event()
        self._error: HandoffError | None = None
        self._ready = False
        self._drain: Drain | None = None
        self._paths: Inotify | None = None  # owned
        self._switch_interval: float | None = None  # the application's own, while it is another
        self._wakeup: tuple[socket.socket, socket.socket] | None = None  # the control thread's end, Python's end
        self._previous_handlers: dict[int, Any] = {}
        self._pid = 0

    # What the application calls.

    def __enter__(self) -> Service:
        """Bind the control socket and take over, if this program was started for that.

        Blocks until the old generation's sockets are here. Raises AlreadyRunning, BadDirectory, NoAnswer, Refused or
        RolledBack; then nothing is left behind.
        """
        # Not before the application runs, and gone from its children's environment.
        upgrade = os.environ.pop(UPGRADE_VARIABLE, None)
        directory = RuntimeDirectory(self.name, self._runtime_dir, create=True)
        try:
            control = Control(self.name, directory, self, self._deadlines, self._launch, VERSION, upgrade)
        except BaseException:
            directory.close()
            raise
        self._control = control
        self._pid = os.getpid()
        _services.add(self)
        self._handle_signals()
        control.start()
        self._adopted.wait()
        if self._error:
            self._close()
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until this generation is done, and close everything. Raises RolledBack if it was."""
        reason = f"{kind.__name__}: {error}" if kind else "the application ended before it was ready"
        self._post(lambda role: role.leave(reason, failed=kind is not None))
        self._ended.wait()
        self.hooks.finish(self.leave_timeout)
        self._close()
        if self._error and kind is None:
            raise self._error

    @property
    def generation(self) -> int:
        """This generation's number, from 1 on; known once the context is entered."""
        return self._control.generation if self._control else 0

    @property
    def draining(self) -> bool:
        """Whether this generation has been replaced or stopped, and only finishes its connections.

        Tell the peers of kept connections then, with `Connection: close` in HTTP.
        """
        return self.open.idle_until is not None

    @property
    def idle_until(self) -> float | None:
        """Until when (time.monotonic()) a generation that drains keeps idle connections; None: it does not drain."""
        return self._drain.idle_until if self._drain else None

    @property
    def drain_until(self) -> float | None:
        """When (time.monotonic()) a generation that drains closes what is left; None: it does not drain."""
        return self._drain.until if self._drain else None

    @property
    def connections(self) -> int:
        """How many accepted connections are open."""
        return self.open.count()

    def listen(self, address: str) -> Listener:
        """Listen at an address such as ``tcp://127.0.0.1:8080`` or ``unix:///run/web.sock?mode=660``.

        An inherited listener with that address is taken over; with port 0 the one that asked for the same before.
        The Service owns the listener. Connections queue until this generation is to accept. May block on DNS. Raises
        BadAddress and CannotListen.
        """
        if self._ready:
            raise CannotListen(address, "listen() comes before ready()")
        wanted = sockets.resolve(parse(address))
        entry = claim(wanted, [opened.entry for opened in self._inherited])
        if entry:
            opened = next(opened for opened in self._inherited if opened.entry is entry)
            self._inherited.remove(opened)
        else:
            opened = sockets.open_listener(wanted)
        listener = Listener(opened, self.open, options=wanted if entry else None)
        self._listeners.append(listener)
        return listener

    def ready(self) -> None:
        """Say that the application can serve. Does not block.

        A first generation accepts from now on, one that takes over as soon as the old one says so. What was inherited
        and not claimed by `listen` is closed: the old generation goes on accepting there until commit.
        """
        self._ready = True
        had = self._had
        decided = plan(had, [listener.address for listener in self._listeners])
        unclaimed = [index for index, entry in enumerate(had) if entry.address in decided.removed]
        paths = [
            (listener.path, *listener.entry.inode)
            for listener in self._listeners
            if listener.entry.inode and listener.address in decided.added
        ]
        for opened in self._inherited:
            opened.socket.close()
        self._inherited.clear()
        self._post(lambda role: role.app_ready(added=len(decided.added), unclaimed=unclaimed, paths=paths))

    def wait(self) -> None:
        """Block until this generation accepts no more: another one is in charge, or it was stopped.

        For a main thread that has nothing else to do; leave the context then.
        """
        self._over.wait()

    def stop(self) -> None:
        """Finish and end, without a successor; the second call ends at once. Does not block; signal handlers may."""
        self._post(lambda role: role.stop())

    def upgrade(self, command: Sequence[str] | None = None) -> None:
        """Upgrade to `command` (else: what started this program). Does not block; signal handlers may call it.

        Hooks tell how it goes; a refusal (another upgrade is running, say) is logged.
        """
        self._post(lambda role: role.upgrade(command))

    def on(self, step: str, hook: Hook) -> None:
        """Call `hook(record)` at a step of an upgrade: spawn, adopt, ready, cutover, probation, commit, drain, exit.

        Each is called when the step is done, `drain` when it begins; and `rollback` when the old generation accepts
        again. Hooks run one after another in a thread of their own. Raises ValueError for an unknown step.
        """
        self.hooks.add(Step(step), hook)

    # What the control thread calls: see `Application`.

    def entries(self) -> Sequence[tuple[Entry, int]]:
        """The listeners to hand over."""
        return [(listener.entry, listener.fileno()) for listener in self._listeners]

    def inherit(self, entry: Entry, descriptor: int) -> None:
        """Keep a descriptor of the old generation until it is claimed."""
        self._inherited.append(sockets.Opened(sockets.adopt(descriptor, entry), entry))
        self._had.append(entry)

    def adopted(self) -> None:
        """Let `__enter__` return."""
        self._adopted.set()

    def accept(self) -> None:
        """Open every listener's gate."""
        self._hurry(False)
        for listener in self._listeners:
            listener.turn(Gate.OPEN)

    def pause(self, except_for: Collection[str]) -> None:
        """Shut the gates of those that the new generation has."""
        self._hurry(True)
        for listener in self._listeners:
            if listener.address not in except_for:
                listener.turn(Gate.SHUT)

    def in_charge(self) -> None:
        """Apply what has changed of the kept listeners' options, and see to their paths."""
        for listener in self._listeners:
            listener.apply_options()
        self._watch_paths()
        self.mend()

    def mend(self) -> None:
        """Put paths back that somebody unlinked."""
        if self._paths:
            self._paths.clear()
        for listener in self._listeners:
            if listener.entry.inode and sockets.restore(listener.path, listener.entry.inode):
                _log.warning("%s: %s was unlinked by somebody, and is back", self.name, listener.path)

    def drain(self, drain: Drain, *, gone: Collection[str]) -> None:
        """Close the listeners, wake who waits for a request, and look until nothing is open."""
        self._hurry(False)
        if self._paths and self._control:
            self._control.loop.forget(self._paths.descriptor)
        for listener in self._listeners:
            if listener.address in gone and listener.entry.inode:
                sockets.unlink_own(listener.path, listener.entry.inode)
            listener.close()
        self._drain = drain
        self.open.begin_drain(drain.idle_until)
        self._over.set()
        self.finishing.tell()
        self.open.fewer.add(lambda: self._post(lambda role: role.fewer_connections()))
        self._look()

    def left(self) -> int:
        """How many connections are open."""
        return self.open.count()

    def close_all(self) -> int:
        """Cut every connection."""
        return self.open.end_all()

    def fail(self, error: HandoffError) -> None:
        """Have `__enter__` or `__exit__` raise the error; accepting ends."""
        self._error = error
        for listener in self._listeners:
            listener.turn(Gate.ENDED)
        self._over.set()
        self.finishing.tell()

    def ended(self) -> None:
        """Let `__exit__` return; should the application not leave, end the process."""
        for listener in self._listeners:
            listener.turn(Gate.ENDED)
        self._adopted.set()
        self._ended.set()
        assert self._control
        self._control.loop.after(self._deadlines.leave, self._still_there)

    def told(self, step: Step, record: Record) -> None:
        """Have the hooks called."""
        self.hooks.tell(step, record)

    # What is left.

    def _post(self, call: Callable[[Old | New], None]) -> None:
        if self._control:
            self._control.post(call)

    def _look(self) -> None:
        """Have the role count again, for as long as it drains: nobody tells of a detached descriptor's end."""
        self._post(lambda role: role.fewer_connections())
        if self._control and not self._ended.is_set():
            self._control.loop.after(_LOOK, self._look)

    def _watch_paths(self) -> None:
        """Have paths put back at once: a server library of the old generation may unlink what it once bound."""
        directories = {os.path.dirname(listener.path) for listener in self._listeners if listener.path}
        if not directories or not self._control:
            return
        from handoff.linux.inotify import Inotify  # ctypes: needed for this only

        try:
            self._paths = Inotify(*directories)
        except OSError as error:
            _log.warning("%s: the paths of its sockets can't be watched: %s", self.name, error)
            return
        self._control.loop.watch(self._paths.descriptor, READ, self.mend)

    def _hurry(self, on: bool) -> None:
        """While paused, have busy threads give up the interpreter sooner: taking back takes three turns of it."""
        if on and self._switch_interval is None:
            self._switch_interval = sys.getswitchinterval()
            sys.setswitchinterval(_PAUSED_INTERVAL)
        elif not on and self._switch_interval is not None:
            sys.setswitchinterval(self._switch_interval)
            self._switch_interval = None

    def _still_there(self) -> None:
        _log.error(
            "%s: generation %d has ended; %g s later the application has not left its Service: ending the process",
            self.name,
            self.generation,
            self._deadlines.leave,
        )
        with contextlib.suppress(HandoffError):
            RuntimeDirectory(self.name, self._runtime_dir).leave(self.generation)
        os._exit(1 if self._error else 0)

    def _close(self) -> None:
        if self._control:
            self._control.close()
        for listener in self._listeners:
            listener.close()
        for opened in self._inherited:
            opened.socket.close()
        self._inherited.clear()
        if self._paths:
            self._paths.close()
        self.open.close()
        self._restore_signals()  # last: a TERM that comes meanwhile must not leave the control socket there
        _services.discard(self)

    def _handle_signals(self) -> None:
        if not self._signals or threading.current_thread() is not threading.main_thread():
            return
        for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) is default:
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        self._wake_on_signals()

    def _wake_on_signals(self) -> None:
        """Have the control thread told of every signal.

        Python runs handlers in the main thread only, and one that arrives just before that thread blocks, or in
        another thread, would wait until it wakes for another reason.
        """
        assert self._control
        reading, writing = socket.socketpair()
        for end in (reading, writing):
            end.setblocking(False)
        previous = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        if previous != -1:  # the application has one, and has to see to its signals itself
            signal.set_wakeup_fd(previous)
            reading.close()
            writing.close()
            return
        self._wakeup = reading, writing
        self._control.loop.watch(reading.fileno(), READ, self._signalled)

    def _signalled(self) -> None:
        """In the control thread: a signal has come."""
        assert self._wakeup
        if any(number in self._previous_handlers for number in self._wakeup[0].recv(4096)):
            self.stop()
        for listener in self._listeners:
            listener.changes.tell()  # whoever waits there looks again, and meanwhile Python runs the other handlers

    def _restore_signals(self) -> None:
        if self._wakeup:
            signal.set_wakeup_fd(-1)
            for end in self._wakeup:
                end.close()
            self._wakeup = None
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._pid and self._control and self._control.running:
            if not self._wakeup:
                self.stop()
        else:  # a forked child inherits the handler, but is not the service; nor is anybody without a control thread
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _abandon(self) -> None:
        self._restore_signals()
        if self._control:
            self._control.abandon()


def _in_forked_child() -> None:
    for service in list(_services):
        service._abandon()


os.register_at_fork(after_in_child=_in_forked_child)
