"""Every error of this package: one class for each thing that a caller can do about it.

The data is in fields, the sentence in ``__str__``: what, which value, what limit, what to do next. What attrs would
generate beyond that is left out: a service imports this at every start, and pays 0.3 ms for each such class.
"""

from __future__ import annotations

import attrs


class HandoffError(Exception):
    """Base of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[type[HandoffError], tuple[object, ...]]:
        # Exception's own sets the fields one by one in the copy, which is frozen.
        return type(self), self.args


@attrs.frozen(eq=False, repr=False, slots=False)
class BadAddress(HandoffError):
    """A listener's address can't be understood, or the system can't take it."""

    address: str
    reason: str

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class CannotListen(HandoffError):
    """The system refused to bind or to listen."""

    address: str
    reason: str

    def __str__(self) -> str:
        return f"cannot listen on {self.address}: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class BadDirectory(HandoffError):
    """The runtime directory can't be used: not ours, writable by others, a link, gone, full."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"runtime directory {self.path}: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class NotRunning(HandoffError):
    """Nobody is in charge of the service."""

    service: str
    path: str

    def __str__(self) -> str:
        return (
            f"{self.service}: no such service is running in {self.path}; "
            f"start it, or name its runtime directory with --runtime-dir"
        )


@attrs.frozen(eq=False, repr=False, slots=False)
class AlreadyRunning(HandoffError):
    """A generation is in charge, and this program was not started to take over from it."""

    service: str
    generation: int
    pid: int | None

    def __str__(self) -> str:
        who = f"generation {self.generation}" + (f" (pid {self.pid})" if self.pid else "")
        return (
            f"{self.service}: {who} is already running; "
            f"replace it with `handoff upgrade {self.service}`, or stop it first"
        )


@attrs.frozen(eq=False, repr=False, slots=False)
class NoAnswer(HandoffError):
    """A process holds the control socket and does not answer."""

    service: str
    pid: int | None
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.service}: no answer in {self.seconds:g} s from "
            f"{'pid ' + str(self.pid) if self.pid else 'the process'} at the control socket; "
            f"it may be stopped or hung: look at it, or end it"
        )


@attrs.frozen(eq=False, repr=False, slots=False)
class Refused(HandoffError):
    """The generation in charge refuses a request, and says why. Nothing was changed."""

    service: str
    reason: str
    code: str = ""  # see core.refusal

    def __str__(self) -> str:
        return f"{self.service}: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class RolledBack(HandoffError):
    """Raised in a new generation whose upgrade was ended: it has to finish and to exit."""

    service: str
    generation: int
    reason: str

    def __str__(self) -> str:
        return f"{self.service}: generation {self.generation} was rolled back: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class CannotSpawn(HandoffError):
    """The new program can't be started at all."""

    command: str
    reason: str

    def __str__(self) -> str:
        return f"cannot start {self.command}: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class BadMessage(HandoffError):
    """A peer sent what the protocol does not allow."""

    reason: str

    def __str__(self) -> str:
        return f"bad message: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class BadDescriptors(HandoffError):
    """Descriptors did not arrive whole, or are not what was announced. All of them have been closed."""

    reason: str

    def __str__(self) -> str:
        return f"bad descriptors: {self.reason}"


@attrs.frozen(eq=False, repr=False, slots=False)
class ControlLost(HandoffError):
    """The control thread ended by an error of its own, which is in the log."""

    service: str
    generation: int

    def __str__(self) -> str:
        return (
            f"{self.service}: the control thread of generation {self.generation} ended by an error; "
            f"the log has it: please report it"
        )
