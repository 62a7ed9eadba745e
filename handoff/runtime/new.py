"""A generation that takes over: carries out what `core.new` decides, until it is in charge or has ended."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import handoff.core.new as core
from handoff.core import plan
from handoff.core.deadlines import Deadlines
from handoff.core.drain import Drain
from handoff.core.errors import AlreadyRunning, BadDescriptors, BadMessage, HandoffError, NoAnswer, Refused, RolledBack
from handoff.core.messages import PROTOCOL, Kind, Message
from handoff.core.new import Effect, Event, State
from handoff.core.plan import Entry
from handoff.core.record import Record, Result, Step
from handoff.core.refusal import DRAINING
from handoff.linux import descriptors
from handoff.runtime.application import Application
from handoff.runtime.directory import RuntimeDirectory
from handoff.runtime.loop import Loop
from handoff.runtime.machine import Machine
from handoff.runtime.relay import Relay
from handoff.runtime.session import Session

_log = logging.getLogger(__name__)
_CLOSED: Final = "the old generation closed the session"


class New:
    """A generation that takes over. Everything here belongs to the control thread.

    Owns the call to the one in charge, the session that comes back, and what was passed for the standard error.
    `on_promoted(started, record, session)` follows when it is in charge: then the session is the receiver's, and
    `started` tells whether the application serves already.
    """

    def __init__(
        self,
        loop: Loop,
        directory: RuntimeDirectory,
        service: str,
        generation: int,
        application: Application,
        deadlines: Deadlines,
        version: str,
        upgrade: str | None,
        on_promoted: Callable[[bool, Record | None, Session | None], None],
    ) -> None:
        self._loop = loop
        self._directory = directory
        self._service = service
        self._generation = generation
        self._application = application
        self._deadlines = deadlines
        self._version = version
        self._upgrade = upgrade
        self._on_promoted = on_promoted
        self._call: Session | None = None
        self._session: Session | None = None
        self._old = 0  # generation
        self._old_pid: int | None = None
        self._batch = 0
        self._stop_asked = False
        self._stderr = -1
        self._pipe = -1
        self._record = Record(upgrade=upgrade or "", service=service, old=0, new=generation, started=time.time())
        self._committed: Record | None = None  # the old generation's record of this upgrade
        self._called_at = time.monotonic()
        self._error: HandoffError = RolledBack(service, generation, "it was ended")
        self._reason = ""
        self._ready: Mapping[str, Any] = {}
        self._drain: Drain | None = None
        self.relay: Relay | None = None  # owned; goes on after the promotion, until nobody writes any more
        self._machine: Machine[State, Event, Effect] = Machine(
            f"{service}: generation {generation}",
            loop,
            core.NewRole(),
            self._effects(),
            deadlines.of_new,
            self._timed_out,
        )

    @property
    def state(self) -> State:
        """Where this generation is."""
        return self._machine.state

    def call(self, in_charge: int) -> None:
        """Say hello to the generation in charge."""
        self._old = self._record.old = in_charge
        try:
            connection = self._directory.connect(in_charge)
        except BlockingIOError:
            self._refused(NoAnswer(self._service, None, 0))
            return
        except OSError:
            self._machine.feed(Event.OLD_LOST)
            return
        self._call = Session(
            self._loop,
            connection,
            on_message=self._on_answer,
            on_error=lambda reason: self._fail(Event.OLD_NONSENSE, f"the old generation's answer: {reason}"),
            on_closed=lambda: self._fail(Event.OLD_CLOSED, "the old generation did not answer the call"),
            on_lost=lambda: self._machine.feed(Event.OLD_LOST, self._hang_up),
            verdict=self._deadlines.verdict,
        )
        self._old_pid = self._call.pid or None
        self._call.send(
            Kind.HELLO,
            protocol=list(PROTOCOL),
            service=self._service,
            generation=self._generation,
            upgrade=self._upgrade,
            version=self._version,
        )
        self._machine.arm()

    def on_session(self, session: Session, message: Message, received: list[int]) -> None:
        """Somebody who has connected to our control socket pushes descriptors; takes the session if that is right."""
        if self.state is not State.ADOPTING or self._session or message["upgrade"] != self._upgrade:
            descriptors.close(received)
            session.send(Kind.ERROR, code="wrong-upgrade", reason="this generation does not wait for these descriptors")
            session.close()
            return
        self._session = session
        session.hand_over(
            on_message=self._on_message,
            on_error=lambda reason: self._fail(Event.OLD_NONSENSE, f"the old generation's message: {reason}"),
            on_closed=self._on_closed,
            on_lost=lambda: self._machine.feed(Event.OLD_LOST),
            verdict=self._deadlines.verdict,
        )
        self._on_message(message, received)

    def app_ready(self, *, added: int, unclaimed: Sequence[int], paths: Sequence[tuple[str, int, int]]) -> None:
        """The application is ready; what it listens on."""
        self._ready = {"added": added, "unclaimed": list(unclaimed), "paths": [list(path) for path in paths]}
        self._machine.feed(Event.APP_READY)

    def leave(self, reason: str, *, failed: bool) -> None:
        """The application's main thread has left: it will not get ready, or does not serve any more."""
        self._fail(Event.APP_FAILED, reason)

    def upgrade(self, command: Sequence[str] | None = None) -> None:
        """An upgrade asked from inside: not before this generation is in charge."""
        _log.warning("%s: generation %d is not in charge: no upgrade", self._service, self._generation)

    def stop(self) -> None:
        """Finish and end. The second call ends at once."""
        if self._stop_asked and self.state in (State.STOPPING, State.ROLLED_BACK):
            self._machine.feed(Event.TIMED_OUT)
        else:
            self._fail(Event.STOP_ASKED, "it was told to stop")
        self._stop_asked = True

    def fewer_connections(self) -> None:
        """A connection was closed."""
        if self._drain and not self._application.left():
            self._machine.feed(Event.DRAINED)

    def close(self) -> None:
        """Close everything that is owned here."""
        self._hang_up()
        if self._session:
            self._session.close()
            self._session = None
        if self.relay:
            self.relay.close()
        descriptors.close(number for number in (self._stderr, self._pipe) if number >= 0)
        self._stderr = self._pipe = -1

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without a word to anybody."""
        for session in (self._call, self._session):
            if session:
                session.abandon()

    # What the old generation says.

    def _on_answer(self, message: Message, received: list[int]) -> None:
        descriptors.close(received)
        self._hang_up()
        match message.kind:
            case Kind.DIALLING:
                self._machine.feed(Event.DIALLING)
            case Kind.REFUSED if message["code"] in (DRAINING, "stopping") and self._upgrade is None:
                # It only finishes its connections, and nobody follows, or not any more: the service is free.
                self._machine.feed(Event.OLD_LOST)
            case Kind.REFUSED if message["code"] == "running":
                self._refused(AlreadyRunning(self._service, message["generation"], self._old_pid))
            case Kind.REFUSED:
                self._refused(Refused(self._service, message["reason"], message["code"]))
            case _:
                self._fail(Event.OLD_NONSENSE, f"the old generation answered the call with {message.kind.value}")

    def _on_message(self, message: Message, received: list[int]) -> None:
        if message.kind is not Kind.DESCRIPTORS:
            descriptors.close(received)
        match message.kind:
            case Kind.DESCRIPTORS:
                self._on_descriptors(message, received)
            case Kind.ACCEPT:
                self._fail(Event.ACCEPT, "the old generation sent accept out of turn")
            case Kind.RELEASED:
                self._fail(Event.RELEASED, "the old generation sent released out of turn")
                if self.state is State.PROBATION:
                    self._done(Step.CUTOVER)
            case Kind.COMMITTED:
                self._on_committed(message)
            case Kind.ROLLBACK:
                self._fail(Event.ROLLBACK, message.get("reason") or "the old generation took the service back")
            case Kind.STOP:
                self._fail(Event.STOP, "the old generation was told to stop")
            case Kind.ERROR:
                self._fail(Event.OLD_NONSENSE, f"the old generation answered: {message['reason']}")
            case _:
                self._fail(Event.OLD_NONSENSE, f"the old generation sent {message.kind.value}")

    def _on_descriptors(self, message: Message, received: list[int]) -> None:
        if self.state is not State.ADOPTING:
            descriptors.close(received)
            self._fail(Event.OLD_NONSENSE, "the old generation sent descriptors out of turn")
            return
        try:
            self._adopt(message, received)
        except (BadDescriptors, BadMessage) as error:
            self._fail(Event.OLD_NONSENSE, str(error))
            return
        assert self._session
        self._session.send(Kind.ADOPTED, batch=self._batch)
        if self._batch == message["batches"]:
            self._machine.feed(Event.ADOPTED, lambda: self._done(Step.ADOPT))
            self._application.adopted()

    def _adopt(self, message: Message, received: list[int]) -> None:
        """Take a batch: each descriptor goes to its owner or is closed."""
        left = list(received)
        try:
            entries = [Entry.from_json(body) for body in message["entries"]]
            if len(entries) != len(received):
                raise BadDescriptors(f"{len(entries)} descriptors were announced, and {len(received)} came")
            if message["batch"] != self._batch + 1 or message["batches"] < message["batch"]:
                raise BadMessage(f"batch {message['batch']} of {message['batches']} came after batch {self._batch}")
            self._batch += 1
            for entry in entries:
                self._take(entry, left.pop(0))
        finally:
            descriptors.close(left)

    def _take(self, entry: Entry, descriptor: int) -> None:
        match entry.kind:
            case plan.LISTENER:
                self._application.inherit(entry, descriptor)
            case plan.STDERR if self._stderr < 0:
                self._stderr = descriptor
            case plan.LAST_WORDS if self._pipe < 0:
                self._pipe = descriptor
            case _:
                os.close(descriptor)

    def _on_committed(self, message: Message) -> None:
        try:
            record = Record.from_json(message["record"])
            moved = self.state is not State.PROBATION or self._directory.take_charge(
                self._generation, instead_of=self._old
            )
            reason = "another generation is in charge"
        except HandoffError as error:
            moved, reason = False, str(error)
        if moved:
            self._record = self._committed = record
            self._fail(Event.COMMITTED, "the old generation sent committed out of turn")
        else:
            self._fail(Event.CHARGE_FAILED, f"it cannot take charge: {reason}")

    def _on_closed(self) -> None:
        self._take_stderr()  # nobody reads our last words any more
        # Without a pidfd an end of file has to be told from a death in another way.
        if self._session and self._session.pidfd is None and not self._directory.alive(self._old):
            self._machine.feed(Event.OLD_LOST)
        else:
            self._fail(Event.OLD_CLOSED, _CLOSED)

    # What is done about it.

    def _effects(self) -> Mapping[Effect, Callable[[], None]]:
        return {
            Effect.SEND_READY: self._send_ready,
            Effect.ACCEPT: self._application.accept,
            Effect.SEND_ACCEPTING: lambda: self._send(Kind.ACCEPTING),
            Effect.READ_DATAGRAMS: lambda: None,
            Effect.TAKE_CHARGE: self._take_charge,
            Effect.SEND_IN_CHARGE: lambda: self._send(Kind.IN_CHARGE),
            Effect.SEND_FAILED: lambda: self._send(Kind.FAILED, reason=self._reason),
            Effect.SEND_ROLLED_BACK: lambda: self._send(Kind.ROLLED_BACK),
            Effect.SEND_STOPPING: lambda: self._send(Kind.STOPPING),
            Effect.PROMOTE: self._promote,
            Effect.FAIL: lambda: self._application.fail(self._error),
            Effect.DRAIN: self._begin_drain,
            Effect.END: self._end,
        }

    def _send_ready(self) -> None:
        self._send(Kind.READY, **self._ready)
        self._done(Step.READY)

    def _send(self, kind: Kind, **fields: Any) -> None:
        if self._session:
            self._session.send(kind, **fields)

    def _take_charge(self) -> None:
        try:
            self._directory.take_charge(self._generation, instead_of=self._old)
        except HandoffError as error:  # nobody else is there to serve: go on without
            _log.error("%s: generation %d: %s", self._service, self._generation, error)
        self._take_stderr()

    def _take_stderr(self) -> None:
        """Write errors where the old generation did; what children still write into the pipe is passed on."""
        if self._stderr < 0:
            return
        with contextlib.suppress(OSError):
            os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._stderr = -1
        if self._pipe >= 0:
            self.relay, self._pipe = Relay(self._loop, self._pipe, 2), -1

    def _promote(self) -> None:
        session, self._session = self._session, None
        record = self._committed
        if record is None and self._upgrade:
            record = self._record
            record.reason = (
                f"generation {self._old} ended before it committed; generation {self._generation} carries on"
            )
        if record:
            record.result, record.seconds = Result.COMMITTED.value, max(record.steps.values(), default=0.0)
            self._application.told(Step.COMMIT, record)
        self._on_promoted(self.state is State.IN_CHARGE, record, session)

    def _begin_drain(self) -> None:
        self._take_stderr()
        left = self._application.left()
        self._drain = Drain(
            began=time.monotonic(), open=left, grace=self._deadlines.grace, timeout=self._deadlines.drain
        )
        self._application.drain(self._drain, gone=[f"unix://{path}" for path, _, _ in self._ready.get("paths", ())])
        self._done(Step.DRAIN)
        self.fewer_connections()

    def _end(self) -> None:
        self._application.close_all()
        self._application.ended()

    def _done(self, step: Step) -> None:
        self._record.steps[step.value] = time.monotonic() - self._called_at
        self._application.told(step, self._record)

    def _refused(self, error: HandoffError) -> None:
        def note() -> None:
            self._error = error

        self._machine.feed(Event.REFUSED, note)

    def _fail(self, event: Event, reason: str) -> None:
        """Feed an event; if it ends this generation, `reason` is why."""

        def note() -> None:
            if self.state in (State.ENDED, State.ROLLED_BACK, State.STOPPING):
                self._reason = reason
                self._error = RolledBack(self._service, self._generation, reason)

        self._machine.feed(event, note)

    def _timed_out(self) -> None:
        state, seconds = self.state, self._deadlines.of_new(self.state)
        if state is State.CALLING:
            self._refused(NoAnswer(self._service, self._old_pid, seconds or 0))
        else:
            self._fail(Event.TIMED_OUT, f"the old generation said nothing for {seconds:g} s ({state.value})")

    def _hang_up(self) -> None:
        if self._call:
            self._call.close()
            self._call = None
