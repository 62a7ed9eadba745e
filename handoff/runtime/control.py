"""The control thread of a generation: its control socket, its role, and whoever talks to it.

It answers however busy the application is; it costs nothing while nobody talks.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from typing import Final

import handoff.core.old as core
from handoff.core.deadlines import Deadlines
from handoff.core.errors import ControlLost, HandoffError
from handoff.core.launch import Launch
from handoff.core.messages import Kind, Message
from handoff.core.record import Record
from handoff.linux import descriptors
from handoff.runtime.application import Application
from handoff.runtime.directory import RuntimeDirectory
from handoff.runtime.loop import READ, Loop, Timer
from handoff.runtime.new import New
from handoff.runtime.old import Old
from handoff.runtime.session import Session

MAX_CONNECTIONS: Final = 64  # that have asked something, and as many that have not yet
_log = logging.getLogger(__name__)


class Control:
    """Owns the control socket, the runtime directory's descriptor and the thread; ended by `close`."""

    def __init__(
        self,
        service: str,
        directory: RuntimeDirectory,
        application: Application,
        deadlines: Deadlines,
        launch: Launch,
        version: str,
        upgrade: str | None,
    ) -> None:
        """Bind the control socket; nothing runs yet. Raises BadDirectory."""
        self.loop: Final = Loop()
        self._service = service
        self._directory = directory
        self._application = application
        self._deadlines = deadlines
        self._launch = launch
        self._version = version
        self._upgrade = upgrade
        self._waiting: dict[Session, Timer] = {}  # for their first request
        self._served: set[Session] = set()  # commands that may ask more, or wait for an outcome
        self._early: list[tuple[Session, Message]] = []  # requests until this generation is in charge
        self._role: Old | New | None = None
        self._new: New | None = None  # kept after its promotion, for what it still relays
        self._thread = threading.Thread(target=self._run, name=f"handoff {service}", daemon=True)
        self.generation, self._socket = directory.bind()

    def start(self) -> None:
        """Start the thread: from now on the application is called."""
        self._thread.start()

    def post(self, call: Callable[[Old | New], None]) -> None:
        """Call with the present role, in the control thread; from any thread and from signal handlers."""
        self.loop.post(lambda: call(self._role) if self._role else None)

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread, close everything and leave the runtime directory. Blocks until that is done."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self.loop.post(self.loop.end)
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child, which has no such thread: close what must not outlive the parent."""
        self.loop.abandon()
        self._socket.close()
        for session in (*self._waiting, *self._served):
            session.abandon()
        if self._role:
            self._role.abandon()

    def _run(self) -> None:
        self.loop.watch(self._socket.fileno(), READ, self._accept)
        self.loop.post(self._begin)
        try:
            self.loop.run()
        except Exception:  # noqa: BLE001  # whatever it is, clients are served first
            _log.critical("%s: generation %d: the control thread ends", self._service, self.generation, exc_info=True)
            if isinstance(self._role, Old) and self._role.state in core.UPGRADING | {core.State.SERVING}:
                self._application.accept()
            else:
                self._fail(ControlLost(self._service, self.generation))
        finally:
            self._close()

    def _fail(self, error: HandoffError) -> None:
        self._application.fail(error)
        self._application.ended()

    def _begin(self) -> None:
        try:
            self._choose_role()
        except HandoffError as error:
            self._fail(error)

    def _choose_role(self) -> None:
        if self._directory.take_charge(self.generation, instead_of=None):
            self._become_old(ready=False)
            self._application.adopted()
            return
        self._role = self._new = New(
            self.loop,
            self._directory,
            self._service,
            self.generation,
            self._application,
            self._deadlines,
            self._version,
            self._upgrade,
            self._promoted,
        )
        self._role.call(self._directory.in_charge() or 0)

    def _become_old(self, *, ready: bool, last: Record | None = None, predecessor: Session | None = None) -> None:
        self._role = Old(
            self.loop,
            self._directory,
            self._service,
            self.generation,
            self._application,
            self._deadlines,
            self._launch,
            ready=ready,
            last=last,
            predecessor=predecessor,
        )

    def _promoted(self, started: bool, record: Record | None, session: Session | None) -> None:
        self._become_old(ready=started, last=record, predecessor=session)
        role = self._role
        assert isinstance(role, Old)
        if session:
            session.hand_over(
                on_message=role.on_predecessor_message,
                on_error=lambda reason: role.leave_predecessor(),
                on_closed=role.leave_predecessor,
                on_lost=role.leave_predecessor,
                verdict=self._deadlines.verdict,
            )
        if not started:
            self._application.adopted()
        self._application.in_charge()
        early, self._early = self._early, []
        for asker, message in early:
            role.on_request(asker, message)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _log.warning("%s: %s: no control connection can be accepted", self._service, error.strerror)
                self.loop.forget(self._socket.fileno())
                self.loop.after(1.0, self._listen)
            return
        session = Session(
            self.loop,
            connection,
            on_message=lambda message, received: self._first(session, message, received),
            on_error=lambda reason: self._refuse(session, "bad-message", reason),
            on_closed=lambda: self._drop(session),
        )
        if session.uid not in (os.geteuid(), 0):
            self._refuse(session, "foreign-uid", f"uid {session.uid} may not command a service of uid {os.geteuid()}")
            return
        if len(self._waiting) == MAX_CONNECTIONS:
            # Whoever has said nothing for longest makes room: so an upgrade's own call always finds a place.
            self._refuse(next(iter(self._waiting)), "busy", f"{MAX_CONNECTIONS} connections have asked nothing yet")
        self._waiting[session] = self.loop.after(
            self._deadlines.request,
            lambda: self._refuse(session, "slow", f"no request came in {self._deadlines.request:g} s"),
        )

    def _listen(self) -> None:
        self.loop.watch(self._socket.fileno(), READ, self._accept)

    def _first(self, session: Session, message: Message, received: list[int]) -> None:
        """The first message of a connection decides what it is."""
        self._waiting.pop(session).cancel()
        match message.kind, self._role:
            case Kind.HELLO, Old() as old:
                descriptors.close(received)
                old.on_hello(session, message)
            case Kind.HELLO, _:
                descriptors.close(received)
                reason = "it is not in charge of the service"
                session.send(Kind.REFUSED, code="not-in-charge", reason=reason, generation=self.generation)
                session.close()
            case Kind.DESCRIPTORS, New() as new:
                new.on_session(session, message, received)
            case _ if len(self._served) >= MAX_CONNECTIONS:
                descriptors.close(received)
                self._refuse(session, "busy", f"{MAX_CONNECTIONS} connections are open; try again")
            case _:
                self._served.add(session)
                session.hand_over(
                    on_message=lambda message, received: self._request(session, message, received),
                    on_error=lambda reason: self._refuse(session, "bad-message", reason),
                    on_closed=lambda: self._drop(session),
                )
                self._request(session, message, received)
        self._listen()

    def _request(self, session: Session, message: Message, received: list[int]) -> None:
        descriptors.close(received)
        if isinstance(self._role, Old):
            self._role.on_request(session, message)
        elif len(self._early) < MAX_CONNECTIONS:
            self._early.append((session, message))
        else:
            self._refuse(session, "busy", f"{MAX_CONNECTIONS} requests wait; try again")

    def _refuse(self, session: Session, code: str, reason: str) -> None:
        session.send(Kind.ERROR, code=code, reason=reason)
        self._drop(session)

    def _drop(self, session: Session) -> None:
        if timer := self._waiting.pop(session, None):
            timer.cancel()
        self._served.discard(session)
        session.close()
        self._listen()

    def _close(self) -> None:
        for session in (*self._waiting, *self._served):
            session.close()
        for role in (self._role, self._new):
            if role:
                role.close()
        self._directory.leave(self.generation)
        self._socket.close()
        self._directory.close()
