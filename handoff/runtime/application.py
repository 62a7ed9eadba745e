"""What an upgrade asks of the program that is upgraded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from handoff.core.drain import Drain
from handoff.core.errors import HandoffError
from handoff.core.plan import Entry
from handoff.core.record import Record, Step


class Application(Protocol):
    """The program's side; every method is called in the control thread and must not block."""

    def entries(self) -> Sequence[tuple[Entry, int]]:
        """The listeners to hand over, each with its descriptor, which stays the program's."""

    def inherit(self, entry: Entry, descriptor: int) -> None:
        """Check and keep a descriptor of the old generation; takes it. Raises BadDescriptors."""

    def adopted(self) -> None:
        """All inherited descriptors are there, or there are none: the program may claim and bind its listeners."""

    def accept(self) -> None:
        """Accept (again) on every listener."""

    def pause(self, except_for: Collection[str]) -> None:
        """Stop accepting, but for these addresses, which the new generation does not have; no listener is closed."""

    def in_charge(self) -> None:
        """This generation has taken charge of the service."""

    def mend(self) -> None:
        """Another generation has ended: what it may have taken away (a socket's path) is put back."""

    def drain(self, drain: Drain, *, gone: Collection[str]) -> None:
        """Close every listener and finish what is open; `gone`: the addresses that no other generation has."""

    def left(self) -> int:
        """How many connections are open."""

    def close_all(self) -> int:
        """Cut every connection that is still open; returns how many."""

    def fail(self, error: HandoffError) -> None:
        """This generation does not come to serve, or has to stop: the application is to be told so."""

    def ended(self) -> None:
        """Nothing is left to do."""

    def told(self, step: Step, record: Record) -> None:
        """A step of an upgrade was done."""
