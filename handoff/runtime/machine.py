"""Runs a role of `core`: feeds it events one at a time, carries out the effects, keeps the state's deadline."""

from __future__ import annotations

import collections
import enum
import logging
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from handoff.runtime.loop import Loop, Timer

StateT = TypeVar("StateT", bound=enum.Enum)
EventT = TypeVar("EventT", bound=enum.Enum)
EffectT = TypeVar("EffectT", bound=enum.Enum)
_EventT = TypeVar("_EventT", contravariant=True)
_EffectT = TypeVar("_EffectT", covariant=True)
_log = logging.getLogger(__name__)


class Role(Protocol[StateT, _EventT, _EffectT]):
    """What OldRole and NewRole have in common."""

    state: StateT

    def handle(self, event: _EventT) -> tuple[_EffectT, ...]:
        """Take one event; returns what to do."""


class Machine(Generic[StateT, EventT, EffectT]):
    """A role and the means to carry out what it decides; belongs to the loop's thread.

    An event that an effect brings about waits until the effects of the present one are done. `timeout(state)` gives
    the seconds that a state may last; then `timed_out` is called.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        role: Role[StateT, EventT, EffectT],
        effects: Mapping[EffectT, Callable[[], None]],
        timeout: Callable[[StateT], float | None],
        timed_out: Callable[[], None],
    ) -> None:
        self._name = name
        self._loop = loop
        self._role = role
        self._effects = effects
        self._timeout = timeout
        self._timed_out = timed_out
        self._events: collections.deque[tuple[EventT, Callable[[], None] | None]] = collections.deque()
        self._busy = False
        self._timer: Timer | None = None

    @property
    def state(self) -> StateT:
        """The role's state."""
        return self._role.state

    def feed(self, event: EventT, note: Callable[[], None] | None = None) -> None:
        """Let an event happen. If it changes anything, `note` is called before the effects, in the new state."""
        self._events.append((event, note))
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                self._take(*self._events.popleft())
        finally:
            self._busy = False

    def arm(self) -> None:
        """Start the deadline of the present state, which a change of state does by itself."""
        if self._timer:
            self._timer.cancel()
        seconds = self._timeout(self.state)
        self._timer = None if seconds is None else self._loop.after(seconds, self._timed_out)

    def _take(self, event: EventT, note: Callable[[], None] | None) -> None:
        before = self.state
        effects = self._role.handle(event)
        if self.state is not before:
            _log.info("%s: %s -> %s: %s", self._name, before.value, self.state.value, event.value)
        if note and (effects or self.state is not before):
            note()
        if self.state is not before:
            self.arm()
        for effect in effects:
            self._effects[effect]()
