"""The generation in charge: carries out what `core.old` decides, and answers those who ask."""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

import handoff.core.old as core
from handoff.core.deadlines import Deadlines
from handoff.core.drain import Drain
from handoff.core.errors import BadMessage, HandoffError, Refused
from handoff.core.launch import Launch
from handoff.core.messages import PROTOCOL, Kind, Message, meet
from handoff.core.old import Effect, Event, State
from handoff.core.record import Record, Result, Step
from handoff.core.refusal import refusal
from handoff.linux import descriptors, sockets
from handoff.runtime.application import Application
from handoff.runtime.directory import RuntimeDirectory
from handoff.runtime.loop import Loop
from handoff.runtime.machine import Machine
from handoff.runtime.session import Session
from handoff.runtime.successor import CLOSED, Successor

_log = logging.getLogger(__name__)
_WAITS: Final = ("cutover", "commit", "exit")
_MOST_LISTED: Final = 200  # listeners in a `state`, which has to fit into one packet


@attrs.define
class _Waiter:
    """A command that waits for an upgrade to get so far."""

    session: Session
    until: str  # one of _WAITS


class Old:
    """The generation in charge. Everything here belongs to the control thread."""

    def __init__(
        self,
        loop: Loop,
        directory: RuntimeDirectory,
        service: str,
        generation: int,
        application: Application,
        deadlines: Deadlines,
        launch: Launch,
        *,
        ready: bool,
        last: Record | None = None,
        predecessor: Session | None = None,
    ) -> None:
        self.last = last  # the upgrade that runs, or else the last one
        self._loop = loop
        self._directory = directory
        self._service = service
        self._generation = generation
        self._application = application
        self._defaults = deadlines
        self._deadlines = deadlines  # of the upgrade that runs
        self._launch = launch
        self._next = launch  # of the upgrade that runs
        self._predecessor = predecessor  # the session to the generation before, while that one drains; owned
        self._record: Record | None = None  # of the upgrade that runs
        self._new: Successor | None = None  # owned
        self._new_paths: Sequence[tuple[str, tuple[int, int]]] = ()  # Unix paths that the new one has added
        self._unclaimed: Sequence[str] = ()  # addresses that it does not listen on
        self._asked_at = 0.0
        self._spawned_at = 0.0
        self._waiters: list[_Waiter] = []
        self._until_serving: list[Session] = []
        self._asked: tuple[Session, Kind] | None = None  # the request that is just being decided
        self._drain: Drain | None = None
        self._last = False  # nobody follows
        self._stop_asked = False
        self._stop_when_serving = False
        self._machine: Machine[State, Event, Effect] = Machine(
            f"{service}: generation {generation}",
            loop,
            core.OldRole(State.SERVING if ready else State.STARTING),
            self._effects(),
            self._timeout,
            self._timed_out,
        )
        self._keep_launch()

    @property
    def state(self) -> State:
        """Where this generation is."""
        return self._machine.state

    # What the application and the operator want.

    def app_ready(self, *, added: int, unclaimed: Sequence[int], paths: Sequence[tuple[str, int, int]]) -> None:
        """The application of a generation that nobody precedes is ready; there is nobody to tell what it has."""
        self._machine.feed(Event.APP_READY)
        for session in self._until_serving:
            session.send(Kind.STATE, state=self.status())
        self._until_serving.clear()

    def leave(self, reason: str, *, failed: bool) -> None:
        """The application's main thread has left, by an error if `failed`.

        Where the new generation accepts already, that only waits for how the upgrade ends.
        """
        if self.state in (State.CUTOVER, State.PROBATION, State.COMMITTING):
            self._stop_when_serving = failed
        elif self.state not in (State.STOPPING, State.DRAINING):
            self.stop()

    def stop(self) -> None:
        """Finish and end, and the new generation with it, if there is one. The second call ends at once."""
        if self._stop_asked and self.state in (State.STOPPING, State.DRAINING):
            self._machine.feed(Event.TIMED_OUT)
        else:
            self._machine.feed(Event.STOP_ASKED, lambda: self._note("the service was stopped", Result.STOPPED))
        self._stop_asked = True

    def upgrade(self, command: Sequence[str] | None = None) -> None:
        """Upgrade, asked from inside the program; a refusal is logged."""
        self._machine.feed(Event.UPGRADE_ASKED, lambda: self._begin(self._changed(command), self._defaults))

    def fewer_connections(self) -> None:
        """A connection was closed, or the new generation has ended."""
        if self._drain is None or self._application.left():
            return
        if self.state is State.STOPPING and self._new and self._new.there:
            return  # the new one is still finishing; at the deadline it is ended
        self._machine.feed(Event.DRAINED)

    def on_request(self, session: Session, message: Message) -> None:
        """A command asks for something; what it is told goes to its session."""
        self._asked = session, message.kind
        match message.kind:
            case Kind.STATUS:
                session.send(Kind.STATE, state=self.status())
            case Kind.WAIT if self.state is State.STARTING:
                self._until_serving.append(session)
            case Kind.WAIT:
                session.send(Kind.STATE, state=self.status())
            case Kind.UPGRADE:
                self._on_upgrade(session, message)
            case Kind.ABORT | Kind.ROLLBACK:
                event = Event.ABORT_ASKED if message.kind is Kind.ABORT else Event.ROLLBACK_ASKED
                self._machine.feed(event, lambda: self._on_end_asked(session, message.kind))
            case Kind.STOP:
                session.send(Kind.STATE, state=self.status())
                self.stop()
            case _:
                session.send(Kind.ERROR, code="bad-message", reason=f"{message.kind.value} is no request")
        self._asked = None

    def on_hello(self, session: Session, message: Message) -> None:
        """A new generation calls: it is answered, and the connection closed."""
        self._asked = session, Kind.HELLO
        ours = self._record is not None and message.get("upgrade") == self._record.upgrade
        if message["service"] != self._service:
            self._refuse_hello("wrong-service", f"this is the service {self._service}")
        elif meet(PROTOCOL, message["protocol"]) is None:
            reason = (
                f"generation {self._generation} speaks versions {PROTOCOL[0]} to {PROTOCOL[1]} of the protocol, and "
                f"the new one {message['protocol']} (handoff {message['version']}): none is common to both"
            )
            self._refuse_hello("protocol", reason)
            if ours:
                self._machine.feed(Event.NEW_FAILED, lambda: self._note(reason))
        elif self.state is State.SPAWNING and not ours:
            self._refuse_hello("wrong-upgrade", "it was not started by the upgrade that is running")
        else:
            self._machine.feed(Event.HELLO, lambda: self._on_called(session, message))
        self._asked = None
        session.close()

    def health_failed(self, reason: str) -> None:
        """The new generation's health check failed."""
        self._machine.feed(Event.UNHEALTHY, lambda: self._note(f"its health check failed: {reason}"))

    def on_predecessor_message(self, message: Message, received: list[int]) -> None:
        """The generation before, which drains, speaks on the session that brought its listeners."""
        descriptors.close(received)
        if message.kind is Kind.STOP:
            self.stop()
        elif message.kind is Kind.DRAINED and self.last and message["record"].get("upgrade") == self.last.upgrade:
            try:
                self.last = Record.from_json(message["record"])
            except BadMessage as error:
                _log.warning("%s: the record of generation %d: %s", self._service, self.last.old, error)

    def leave_predecessor(self) -> None:
        """The generation before has ended, or does not want to speak any more."""
        if self._predecessor:
            self._predecessor.close()
            self._predecessor = None
            self._application.mend()
            if self.last and Step.EXIT.value not in self.last.steps:
                self.last.steps[Step.EXIT.value] = max(0.0, time.time() - self.last.started)
                self._application.told(Step.EXIT, self.last)

    def status(self) -> dict[str, Any]:
        """What `status` tells."""
        addresses = [entry.address for entry, _ in self._application.entries()]
        state: dict[str, Any] = {
            "service": self._service,
            "generation": self._generation,
            "pid": os.getpid(),
            "state": self.state.value,
            "listeners": addresses[:_MOST_LISTED],
            "listener_count": len(addresses),
            "connections": self._application.left(),
            "command": list(self._launch.command),
            "deadlines": attrs.asdict(self._deadlines),
        }
        if self.last:
            state["upgrade"] = self.last.to_json()
        if self._predecessor and self.last:
            state["draining"] = [{"generation": self.last.old, "pid": self._predecessor.pid}]
        return state

    def close(self) -> None:
        """Close everything that is owned here."""
        self._forget_new()
        self.leave_predecessor()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without a word to anybody."""
        if self._new:
            self._new.abandon()
        if self._predecessor:
            self._predecessor.abandon()

    # What the new generation does.

    def _on_called(self, session: Session, message: Message) -> None:
        if self.state is not State.ADOPTING:  # refused
            return
        assert self._record
        self._record.new = message["generation"]
        self._done(Step.SPAWN)
        session.send(Kind.DIALLING, protocol=meet(PROTOCOL, message["protocol"]))

    def _on_message(self, message: Message) -> None:
        match message.kind:
            case Kind.ADOPTED:
                self._on_adopted(message["batch"])
            case Kind.READY:
                self._on_ready(message)
            case Kind.ACCEPTING:
                self._machine.feed(Event.NEW_ACCEPTING, lambda: self._out_of_turn(message))
            case Kind.IN_CHARGE:
                self._machine.feed(Event.NEW_IN_CHARGE, lambda: self._out_of_turn(message))
            case Kind.ROLLED_BACK:
                self._machine.feed(Event.NEW_ROLLED_BACK, lambda: self._out_of_turn(message))
            case Kind.FAILED:
                self._machine.feed(Event.NEW_FAILED, lambda: self._note(message["reason"]))
            case Kind.STOPPING:
                self._machine.feed(
                    Event.NEW_STOPPING, lambda: self._note("the new generation was told to stop", Result.STOPPED)
                )
            case Kind.ERROR:
                self._on_fault(f"it answered: {message['reason']}", False)
            case _:
                self._on_fault(f"it sent {message.kind.value}, which is not its to send", False)

    def _on_adopted(self, batch: int) -> None:
        assert self._new
        if self.state is not State.ADOPTING:
            self._on_fault("it sent adopted out of turn", False)
            return
        try:
            if self._new.adopted(batch):
                self._machine.feed(Event.NEW_ADOPTED, lambda: self._done(Step.ADOPT))
        except BadMessage as error:
            self._on_fault(str(error), False)

    def _on_ready(self, message: Message) -> None:
        addresses = [entry.address for entry, _ in self._application.entries()]
        try:
            unclaimed = [addresses[operator.index(index)] for index in message["unclaimed"]]
            paths = [(str(path), (int(device), int(inode))) for path, device, inode in message["paths"]]
        except (IndexError, TypeError, ValueError):
            self._on_fault("its ready names listeners that it was not given", False)
            return
        self._machine.feed(Event.NEW_READY, lambda: self._note_ready(message, unclaimed, len(addresses), paths))

    def _note_ready(
        self, message: Message, unclaimed: Sequence[str], had: int, paths: Sequence[tuple[str, tuple[int, int]]]
    ) -> None:
        if self.state is not State.CUTOVER or not self._record:
            self._out_of_turn(message)
            return
        self._unclaimed, self._new_paths = unclaimed, paths
        self._record.kept = had - len(unclaimed)
        self._record.added = message["added"]
        self._record.removed = len(unclaimed)
        self._done(Step.READY)

    def _on_fault(self, reason: str, closed: bool) -> None:
        event = Event.NEW_CLOSED if closed else Event.NEW_NONSENSE
        self._machine.feed(event, lambda: self._note(reason))
        if self.state is State.STOPPING:
            self.fewer_connections()

    def _on_lost(self, reason: str) -> None:
        self._machine.feed(Event.NEW_LOST, lambda: self._note_lost(reason))
        if self.state is State.STOPPING and self._new:
            self._new.close()
            self.fewer_connections()

    def _out_of_turn(self, message: Message) -> None:
        """Note why, if the message has just made the upgrade fail."""
        if self.state in (State.ROLLING_BACK, State.KILLING):
            self._note(f"it sent {message.kind.value} out of turn")

    # What is done about it.

    def _effects(self) -> Mapping[Effect, Callable[[], None]]:
        return {
            Effect.ACCEPT: self._accept,
            Effect.PAUSE: self._pause,
            Effect.SPAWN: self._spawn,
            Effect.DIAL: self._dial,
            Effect.SEND_ACCEPT: lambda: self._send(Kind.ACCEPT),
            Effect.SEND_RELEASED: lambda: self._send(Kind.RELEASED),
            Effect.SEND_COMMITTED: self._send_committed,
            Effect.END_NEW: lambda: self._end_new(Kind.ROLLBACK),
            Effect.STOP_NEW: lambda: self._end_new(Kind.STOP),
            Effect.KILL_NEW: self._kill_new,
            Effect.COMMIT: self._commit,
            Effect.DRAIN: self._begin_drain,
            Effect.REPORT: self._report,
            Effect.REFUSE: self._refuse,
            Effect.END: self._end,
        }

    def _timeout(self, state: State) -> float | None:
        seconds = self._deadlines.of_old(state)
        if state is State.PREPARING:  # `ready` counts from the start of the program
            return max(0.0, self._deadlines.ready - (time.monotonic() - self._spawned_at))
        return seconds

    def _timed_out(self) -> None:
        state, seconds = self.state, self._deadlines.of_old(self.state)
        self._machine.feed(Event.TIMED_OUT, lambda: self._note_timeout(state, seconds))

    def _on_upgrade(self, session: Session, message: Message) -> None:
        until = message.get("wait") or "commit"
        changes = {
            option: message.get(field)
            for field, option in (("timeout", "ready"), ("probation", "probation"), ("drain_timeout", "drain"))
            if message.get(field) is not None
        }
        try:
            if until not in _WAITS:
                raise ValueError(f"wait is {until!r}; it takes {', '.join(_WAITS)}")
            launch = self._launch_of(message)
            deadlines = attrs.evolve(self._defaults, **changes)
        except ValueError as error:
            session.send(Kind.ERROR, code="bad-message", reason=str(error))
            return
        except HandoffError as error:
            session.send(Kind.ERROR, code="no-launch", reason=str(error))
            return
        self._machine.feed(Event.UPGRADE_ASKED, lambda: self._begin(launch, deadlines, _Waiter(session, until)))

    def _launch_of(self, message: Message) -> Launch:
        """What an upgrade is to start. Raises ValueError, BadDirectory and Refused."""
        if message.get("respawn"):
            launch = self._directory.launch_before(self._generation)
            if launch is None:
                raise Refused(self._service, f"generation {self._generation} is the first one that is known here")
            return launch
        return self._changed(message.get("command"), message.get("cwd"), message.get("environment"))

    def _changed(
        self,
        command: Sequence[str] | None = None,
        cwd: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Launch:
        """The launch of this generation with what is to be another; the environment is that of today."""
        return self._launch.changed(command=command, cwd=cwd, environment={**os.environ, **(environment or {})})

    def _begin(self, launch: Launch, deadlines: Deadlines, waiter: _Waiter | None = None) -> None:
        if self.state is not State.SPAWNING or self._new:  # refused
            return
        self._asked_at = self._spawned_at = time.monotonic()
        self._next, self._deadlines = launch, deadlines
        self._record = self.last = Record(
            upgrade=os.urandom(8).hex(), service=self._service, old=self._generation, started=time.time()
        )
        if waiter:
            self._waiters.append(waiter)

    def _on_end_asked(self, session: Session, kind: Kind) -> None:
        if self.state is State.ROLLING_BACK:  # not refused
            self._note("it was aborted" if kind is Kind.ABORT else "its rollback was asked for")
            self._waiters.append(_Waiter(session, "commit"))

    def _accept(self) -> None:
        self._application.accept()
        if self._record:
            self._done(Step.ROLLBACK)

    def _pause(self) -> None:
        self._application.pause(except_for=self._unclaimed)

    def _spawn(self) -> None:
        assert self._record
        self._new = Successor(
            self._loop,
            self._record.upgrade,
            on_message=self._on_message,
            on_fault=self._on_fault,
            on_lost=self._on_lost,
        )
        try:
            self._new.spawn(self._next)
        except (HandoffError, OSError) as error:
            reason = str(error)
            self._machine.feed(Event.CANNOT_SPAWN, lambda: self._note(reason))

    def _dial(self) -> None:
        assert self._new and self._record and self._record.new is not None
        try:
            self._new.dial(self._directory, self._record.new, self._generation, self._application.entries())
        except (HandoffError, OSError) as error:
            self._on_fault(f"its control socket does not answer: {error}", False)

    def _send(self, kind: Kind) -> None:
        if self._new:
            self._new.send(kind)
        if kind is Kind.RELEASED:
            self._done(Step.CUTOVER)

    def _send_committed(self) -> None:
        assert self._new and self._record
        self._done(Step.PROBATION)
        self._new.send(Kind.COMMITTED, record=self._record.to_json())

    def _end_new(self, kind: Kind) -> None:
        if self._new:
            reason = self._record.reason if self._record and kind is Kind.ROLLBACK else None
            self._new.end(kind, reason=reason)

    def _kill_new(self) -> None:
        if self._new:
            self._new.kill()

    def _commit(self) -> None:
        assert self._new and self._record
        self._record.open = self._application.left()  # before anybody is told, who may end some of them
        self._done(Step.COMMIT)
        self._settle(Result.COMMITTED)
        self._new.stop_reading()

    def _begin_drain(self) -> None:
        counted = self._record.open if self._record else None  # at commit, before anybody was told
        left = self._application.left() if counted is None else counted
        self._drain = Drain(
            began=time.monotonic(), open=left, grace=self._deadlines.grace, timeout=self._deadlines.drain
        )
        if self._record:
            self._record.open = left
        self._last = self.state is State.STOPPING
        everything = [entry.address for entry, _ in self._application.entries()]
        self._application.drain(self._drain, gone=everything if self._last else self._unclaimed)
        if self._record:
            self._application.told(Step.DRAIN, self._record)
        self.fewer_connections()

    def _report(self) -> None:
        assert self._new and self._record
        self._record.last_words = self._new.last_words
        if self._record.result is None:
            self._record.result = Result.ROLLED_BACK.value
        self._reclaim()
        for path, inode in self._new_paths:
            sockets.unlink_own(path, inode)
        self._settle(Result(self._record.result))
        self._forget_new()
        if self._stop_when_serving:
            self.stop()

    def _reclaim(self) -> None:
        """Be named by control.sock again, if the new one had moved it before it failed."""
        try:
            self._directory.take_over(self._generation)
        except HandoffError as error:
            _log.error("%s: generation %d: %s", self._service, self._generation, error)

    def _keep_launch(self) -> None:
        try:
            self._directory.keep_launch(self._generation, self._changed())
        except HandoffError as error:  # a later `rollback --respawn` has to do without
            _log.error("%s: generation %d: %s", self._service, self._generation, error)

    def _refuse(self) -> None:
        if self._asked is None:
            _log.warning("%s: %s", self._service, self._refusal(Kind.UPGRADE)[1])
            return
        session, kind = self._asked
        code, reason = self._refusal(kind)
        if kind is Kind.HELLO:
            self._refuse_hello(code, reason)
        else:
            session.send(Kind.ERROR, code=code, reason=reason)

    def _end(self) -> None:
        assert self._drain
        left = self._application.left()
        closed = self._application.close_all()
        if self._new and self._last:
            self._new.kill()
        if self._record:
            self._record.finished, self._record.closed = self._drain.finished(left), closed
            self._done(Step.DRAIN)
            if self._new:
                self._new.send(Kind.DRAINED, record=self._record.to_json())
            self._settle(Result(self._record.result or Result.STOPPED), final=True)
            self._application.told(Step.EXIT, self._record)
        self._application.ended()

    def _settle(self, result: Result, *, final: bool = False) -> None:
        """Write down how the upgrade ended, and tell those who wait for that."""
        assert self._record
        if self._record.result is None or self._record.seconds is None:
            self._record.result = result.value
            self._record.seconds = time.monotonic() - self._asked_at
        for waiter in list(self._waiters):
            if final or waiter.until != "exit" or result is not Result.COMMITTED:
                waiter.session.send(Kind.RESULT, record=self._record.to_json())
                self._waiters.remove(waiter)

    def _done(self, step: Step) -> None:
        """Write down that a step is done, and tell everybody."""
        assert self._record
        seconds = time.monotonic() - self._asked_at
        self._record.steps[step.value] = seconds
        for waiter in list(self._waiters):
            waiter.session.send(Kind.STEP, step=step.value, seconds=seconds)
            if step is Step.CUTOVER and waiter.until == "cutover":
                waiter.session.send(Kind.RESULT, record=self._record.to_json())
                self._waiters.remove(waiter)
        if step is not Step.DRAIN:  # of that the application was told when it began
            self._application.told(step, self._record)

    def _note(self, reason: str, result: Result = Result.ROLLED_BACK) -> None:
        """Write down why the upgrade fails; the first cause counts."""
        if self._record and self._record.reason is None:
            self._record.reason, self._record.result = reason, result.value

    def _note_lost(self, reason: str) -> None:
        # A process that dies closes its session first: its death is the cause.
        if self._record and self._record.reason == CLOSED:
            self._record.reason = reason
        self._note(reason)

    def _note_timeout(self, state: State, seconds: float | None) -> None:
        if self.state in (State.ROLLING_BACK, State.KILLING) and (reason := _LATE.get(state)):
            self._note(reason.format(seconds), Result.TIMED_OUT)

    def _refusal(self, kind: Kind) -> tuple[str, str]:
        return refusal(kind, self.state, self._service, self._generation)

    def _refuse_hello(self, code: str, reason: str) -> None:
        assert self._asked
        self._asked[0].send(Kind.REFUSED, code=code, reason=reason, generation=self._generation)

    def _forget_new(self) -> None:
        if self._new:
            self._new.close()
        self._new, self._new_paths, self._unclaimed = None, (), ()
        self._record, self._deadlines = None, self._defaults


_LATE: Final[Mapping[State, str]] = {
    State.SPAWNING: "it did not call in {:g} s: does the program use handoff.Service with this name?",
    State.ADOPTING: "it did not take its descriptors in {:g} s",
    State.PREPARING: "it was not ready in {:g} s",
    State.CUTOVER: "it did not accept in {:g} s",
    State.COMMITTING: "it did not take charge in {:g} s",
}
