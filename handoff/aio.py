"""`Service` for asyncio: its own accept loop, in the event loop's thread.

::

    async with handoff.aio.Service("web") as service:
        await service.start_server(handle, "tcp://127.0.0.1:8080")
        service.ready()
        await service.wait()

Each accepted socket goes to ``loop.connect_accepted_socket``. No ``asyncio.Server`` is involved: those can't pause, and
lose a connection that is accepted in the turn in which they are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final

from handoff.core.record import Record
from handoff.runtime import hooks, service
from handoff.runtime.connections import Connection, Connections
from handoff.runtime.listener import EXHAUSTED, RELIEF, Gate, Listener

_log = logging.getLogger(__name__)
_AT_ONCE: Final = 64  # connections accepted in one turn of the loop

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


class Service:
    """One generation of a service: an asynchronous context manager around the program's life.

    The same as `handoff.Service`, which has the options; everything here belongs to the event loop's thread. TERM and
    INT stop the service, a second one at once, unless `signals` is False.
    """

    def __init__(self, name: str, *, signals: bool = True, **options: Any) -> None:
        """Describe the service; nothing is done before it is entered."""
        self._service = service.Service(name, signals=False, **options)
        self._signals = signals
        self._acceptors: list[_Acceptor] = []
        self._last_hook: asyncio.Task[None] | None = None
        self._goodbyes: list[Callable[[], Awaitable[object]]] = []
        self._saying: set[asyncio.Task[None]] = set()
        self._idle: set[_Idle] = set()
        self._over = asyncio.Event()
        self._drain_began = False
        self._grace_over = asyncio.Event()

    async def __aenter__(self) -> Service:
        """Take over, if this program was started for that. Raises as `handoff.Service.__enter__` does."""
        self._loop = asyncio.get_running_loop()
        self._service.hooks.run_in(lambda hook, record: self._threadsafe(self._run_hook, hook, record))
        self._service.finishing.add(lambda: self._threadsafe(self._finish))
        await asyncio.to_thread(self._service.__enter__)
        if self._signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
                    self._loop.add_signal_handler(number, self.stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait until this generation is done, and close everything. Raises RolledBack if it was."""
        try:
            await asyncio.to_thread(self._service.__exit__, kind, error, traceback)
        finally:
            for acceptor in self._acceptors:
                acceptor.close()
            if self._last_hook:
                await asyncio.wait([self._last_hook], timeout=self._service.leave_timeout)
            for task in self._saying:
                task.cancel()
            await asyncio.gather(*self._saying, return_exceptions=True)

    @property
    def generation(self) -> int:
        """This generation's number, from 1 on."""
        return self._service.generation

    @property
    def draining(self) -> bool:
        """Whether this generation only finishes its connections: tell their peers, `Connection: close` in HTTP."""
        return self._service.draining

    @property
    def drain_until(self) -> float | None:
        """When (time.monotonic()) a generation that drains closes what is left; None: it does not drain."""
        return self._service.drain_until

    @property
    def connections(self) -> int:
        """How many accepted connections are open."""
        return self._service.connections

    def listen(self, address: str) -> Listener:
        """Listen at an address; see `handoff.Service.listen`. May block on DNS."""
        return self._service.listen(address)

    async def start_server(self, client_connected: ClientConnected, address: str, **options: Any) -> Listener:
        """Listen, and call `client_connected(reader, writer)` for each connection, as asyncio.start_server does.

        `options` go to loop.connect_accepted_socket (`ssl`, say).
        """

        def factory() -> asyncio.StreamReaderProtocol:
            reader = asyncio.StreamReader(loop=self._loop)
            return asyncio.StreamReaderProtocol(reader, client_connected, loop=self._loop)

        return await self.create_server(factory, address, **options)

    async def create_server(
        self, factory: Callable[[], asyncio.BaseProtocol], address: str, **options: Any
    ) -> Listener:
        """Listen, and make a protocol for each connection, as loop.create_server does; see `start_server`."""
        listener = self.listen(address)
        self._acceptors.append(_Acceptor(self._loop, listener, self._service.open, factory, options))
        return listener

    def ready(self) -> None:
        """Say that the application can serve; see `handoff.Service.ready`."""
        self._service.ready()

    async def wait(self) -> None:
        """Wait until this generation accepts no more: another one is in charge, or it was stopped."""
        await self._over.wait()

    def idle(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for a kept connection's next request: left when draining outlasts the grace time.

        ::

            data = b""
            with service.idle():
                data = await reader.read(65536)
            if not data:
                return  # the peer has closed, or sent nothing for the grace time
        """
        return _Idle(self._idle, self._grace_over.is_set())

    def goodbye(self, say: Callable[[], Awaitable[object]]) -> None:
        """Run `await say()` when this generation begins to finish its connections: replaced, rolled back or stopped.

        For what a protocol tells its peers then, a close frame or GOAWAY; never run in probation, in which the
        connections may still be this generation's to keep. Cancelled when no connection is left.
        """
        self._goodbyes.append(say)

    async def grace_over(self) -> None:
        """Wait until draining outlasts the grace time: connections that are idle may be closed from then on.

        For protocols that have no task in which to wait within `idle()`.
        """
        await self._grace_over.wait()

    def stop(self) -> None:
        """Finish and end, without a successor; the second call ends at once."""
        self._service.stop()

    def upgrade(self, command: Sequence[str] | None = None) -> None:
        """Upgrade, asked from inside; see `handoff.Service.upgrade`."""
        self._service.upgrade(command)

    def on(self, step: str, hook: Callable[[Record], Awaitable[object] | object]) -> None:
        """Call `hook(record)` in the loop at a step; it may be a coroutine function. See `handoff.Service.on`."""
        self._service.on(step, hook)

    def _threadsafe(self, call: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _run_hook(self, hook: hooks.Hook, record: Record) -> None:
        self._last_hook = self._loop.create_task(_call(hook, record, self._last_hook))

    def _finish(self) -> None:
        self._over.set()
        until = self._service.idle_until
        if until is None or self._drain_began:  # one that was rolled back is told of that first, then of its drain
            return
        self._drain_began = True
        for say in self._goodbyes:
            self._saying.add(self._loop.create_task(_say(say)))
        self._loop.call_later(max(0.0, until - time.monotonic()), self._end_idle)

    def _end_idle(self) -> None:
        self._grace_over.set()
        for idle in list(self._idle):
            idle.end()


async def _say(say: Callable[[], Awaitable[object]]) -> None:
    try:
        await say()
    except Exception:  # noqa: BLE001  # the application's code
        _log.exception("a goodbye failed")


async def _call(hook: hooks.Hook, record: Record, before: asyncio.Task[None] | None) -> None:
    if before:  # hooks run one after another
        await asyncio.wait([before])
    result = hooks.call(hook, record)
    if asyncio.iscoroutine(result):
        try:
            await result
        except Exception:  # noqa: BLE001  # the application's code
            _log.exception("%s: a hook failed", record.service)


class _Acceptor:
    """Accepts from one listener while its gate is open; holds the listener until `close`, or until it has ended."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: Listener,
        connections: Connections,
        factory: Callable[[], asyncio.BaseProtocol],
        options: dict[str, Any],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._connections = connections
        self._factory = factory
        self._options = options
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = False
        self._held = True
        listener.hold()
        listener.changes.add(self._changed)
        self._apply()

    def close(self) -> None:
        """Let go of the listener. Harmless twice."""
        if self._held:
            self._held = False
            self._listener.changes.remove(self._changed)
            self._stop_reading()
            self._listener.release()

    def _changed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._apply)

    def _apply(self) -> None:
        if self._listener.gate is Gate.ENDED:
            self.close()
        elif self._listener.gate is Gate.SHUT:
            self._stop_reading()
        elif self._held and not self._reading:
            self._reading = True
            self._loop.add_reader(self._listener.fileno(), self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._listener.fileno())

    def _readable(self) -> None:
        try:
            for _ in range(_AT_ONCE):
                accepted = self._listener.accept_now()
                if not accepted:
                    return
                task = self._loop.create_task(self._connect(accepted[0]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            _log.warning("%s: out of descriptors; clients wait until a connection is closed", self._listener.address)
            self._stop_reading()
            self._connections.fewer.add(self._relieved)
            self._loop.call_later(RELIEF, self._relieved)

    def _relieved(self) -> None:
        with contextlib.suppress(ValueError):  # the other of the two calls came first
            self._connections.fewer.remove(self._relieved)
            self._changed()

    async def _connect(self, connection: Connection) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._factory, connection, **self._options)
        except OSError:  # the peer has gone already
            connection.close()


class _Idle:
    """Leaves a block by cancelling what its task waits for; the block's end swallows that cancellation."""

    def __init__(self, all_idle: set[_Idle], ended: bool) -> None:
        self._all = all_idle
        self._ended = ended
        self._cancelled = False
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._all.add(self)
        if self._ended:
            asyncio.get_running_loop().call_soon(self.end)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._all.discard(self)
        if not self._cancelled or kind is not asyncio.CancelledError:
            return False
        return sys.version_info < (3, 11) or not (self._task and self._task.uncancel())

    def end(self) -> None:
        """Leave the block."""
        if self in self._all and self._task:
            self._cancelled = True
            self._task.cancel()
