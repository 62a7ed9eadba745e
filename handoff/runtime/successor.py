"""The new generation as the old one has it: its program, the session to it, what it writes, its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from handoff.core.errors import BadMessage
from handoff.core.launch import Launch
from handoff.core.messages import Kind, Message, batches
from handoff.core.plan import LAST_WORDS, STDERR, Entry
from handoff.linux import descriptors, processes
from handoff.runtime.directory import RuntimeDirectory
from handoff.runtime.loop import READ, Loop
from handoff.runtime.relay import Relay
from handoff.runtime.session import Session

UPGRADE_VARIABLE: Final = "HANDOFF_UPGRADE"  # the upgrade's id, in the new program's environment
CLOSED: Final = "it closed the session"


class Successor:
    """One new generation, from the start of its program or from its call on, until `close`.

    Belongs to the control thread. Owns the program until it has called, the session, the relay of its standard error
    and a copy of this process's own. `on_message`, `on_fault(reason, closed)` and `on_lost(reason)` tell what it does;
    `on_lost` comes once.
    """

    def __init__(
        self,
        loop: Loop,
        upgrade: str,
        *,
        on_message: Callable[[Message], None],
        on_fault: Callable[[str, bool], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.generation: int | None = None
        self._loop = loop
        self._upgrade = upgrade
        self._on_message = on_message
        self._on_fault = on_fault
        self._on_lost = on_lost
        self._program: processes.Program | None = None
        self._group: int | None = None
        self._relay: Relay | None = None
        self._pipe = -1  # another reading end, for the new generation
        self._stderr = -1  # what this process writes its errors to
        self._session: Session | None = None
        self._batches: list[tuple[Sequence[Mapping[str, Any]], Sequence[int]]] = []
        self._sent = 0
        self._own = 0

    @property
    def there(self) -> bool:
        """Whether something of it may still live."""
        return self._program is not None or self._session is not None

    @property
    def last_words(self) -> str | None:
        """What it wrote to its standard error, the end of it; None where that isn't read or nothing came."""
        return (self._relay.last_words or None) if self._relay else None

    def spawn(self, launch: Launch) -> None:
        """Start the program. Blocks for milliseconds. Raises CannotSpawn, or OSError without descriptors left."""
        self._stderr = _own_stderr()
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._pipe = os.dup(reading)
            self._relay = Relay(self._loop, reading, self._stderr)
            marked = launch.changed(environment={**launch.environment, UPGRADE_VARIABLE: self._upgrade})
            self._program = processes.spawn(marked, writing)
        finally:
            os.close(writing)
        self._group = self._program.group
        self._loop.watch(self._program.pidfd, READ, self._ended_early)

    def dial(
        self, directory: RuntimeDirectory, generation: int, own: int, entries: Sequence[tuple[Entry, int]]
    ) -> None:
        """Connect to the control socket of `generation` and begin to send descriptors, which are borrowed.

        `own` is the number of the generation that sends.
        Raises OSError when nobody is there.
        """
        self.generation = generation
        self._session = Session(
            self._loop,
            directory.connect(generation),
            on_message=self._message,
            on_error=lambda reason: self._on_fault(reason, False),
            on_closed=lambda: self._on_fault(CLOSED, True),
            on_lost=self._lost,
        )
        self._release_program()
        all_entries = list(entries)
        if self._relay:
            all_entries[:0] = [(Entry(kind=STDERR), self._stderr), (Entry(kind=LAST_WORDS), self._pipe)]
        numbers = [number for _, number in all_entries]
        for run in batches([entry.to_json() for entry, _ in all_entries]):
            self._batches.append((run, numbers[: len(run)]))
            del numbers[: len(run)]
        self._own = own
        self._send_batch()

    def adopted(self, batch: int) -> bool:
        """Take the answer to a batch and send the next one; True when it was the last. Raises BadMessage."""
        if batch != self._sent:
            raise BadMessage(f"batch {batch} was adopted, and {self._sent} was sent last")
        if self._sent == len(self._batches):
            return True
        self._send_batch()
        return False

    def send(self, kind: Kind, **fields: Any) -> None:
        """Send a message on the session."""
        if self._session:
            self._session.send(kind, **fields)

    def end(self, kind: Kind, **fields: Any) -> None:
        """Tell it to roll back or to stop: on the session or, where there is none, by TERM to its group."""
        if self._session:
            self._session.send(kind, **fields)
        elif self._program:
            self._program.terminate()

    def kill(self) -> None:
        """Kill it with its whole process group; `on_lost` follows."""
        if self._session and self._session.pidfd is not None:
            processes.kill_group(self._session.pidfd, self._session.pid, self._group)
        elif self._program:
            self._program.kill()

    def stop_reading(self) -> None:
        """From now on it reads its standard error itself."""
        if self._relay:
            self._relay.close()
            self._relay = None
        descriptors.close(number for number in (self._pipe, self._stderr) if number >= 0)
        self._pipe = self._stderr = -1

    def close(self) -> None:
        """Let go of it: a program that still runs goes on. Harmless twice."""
        self.stop_reading()
        self._release_program()
        if self._session:
            self._session.close()
            self._session = None

    def abandon(self) -> None:
        """In a forked child: close what was inherited."""
        if self._session:
            self._session.abandon()

    def _message(self, message: Message, received: list[int]) -> None:
        descriptors.close(received)  # it has nothing to give
        self._on_message(message)

    def _send_batch(self) -> None:
        entries, numbers = self._batches[self._sent]
        self._sent += 1
        assert self._session
        self._session.send(
            Kind.DESCRIPTORS,
            numbers,
            upgrade=self._upgrade,
            generation=self._own,
            batch=self._sent,
            batches=len(self._batches),
            entries=entries,
        )

    def _ended_early(self) -> None:
        assert self._program
        status = self._program.status()
        self._release_program()
        self._on_lost(f"the new program {processes.describe_exit(status)} before it called")

    def _lost(self) -> None:
        status = self._session.exit_status() if self._session else None
        self._on_lost(f"generation {self.generation} {processes.describe_exit(status)}")

    def _release_program(self) -> None:
        if self._program:
            self._loop.forget(self._program.pidfd)
            self._program.release()
            self._program = None


def _own_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
