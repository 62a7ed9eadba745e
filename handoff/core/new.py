"""A generation that takes over from one in charge: its states, and what it does at each event.

It serves when it is told to and stops when it is told to. It decides by itself in two cases only: when the old
generation is dead it carries on alone and takes charge, and when the old one lives but has closed the session it rolls
itself back. Once it accepts it never stops because the old one is silent: a hung old generation must not take the
service with it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import attrs


class State(str, enum.Enum):
    """Where the new generation is."""

    CALLING = "calling"  # hello was sent to the one in charge
    ADOPTING = "adopting"  # waits for the session and its descriptors
    PREPARING = "preparing"  # the application starts
    READY = "ready"  # waits to be told to accept
    CUTOVER = "cutover"  # accepts; the old one has not let go yet
    PROBATION = "probation"  # accepts
    IN_CHARGE = "in-charge"  # goes on as the generation in charge
    ALONE = "alone"  # in charge, and the application still starts
    ROLLED_BACK = "rolled-back"  # does not accept, finishes what it has
    STOPPING = "stopping"  # asked to stop: finishes what it has
    ENDED = "ended"


class Event(enum.Enum):
    """What happens to the new generation."""

    DIALLING = "dialling"
    REFUSED = "refused"
    ADOPTED = "all descriptors are here and right"
    ACCEPT = "accept"
    RELEASED = "released"
    COMMITTED = "committed, and control.sock was moved"
    CHARGE_FAILED = "committed, but control.sock can't be moved"
    ROLLBACK = "rollback"
    STOP = "stop"
    OLD_NONSENSE = "the old one speaks nonsense"
    OLD_CLOSED = "the old one lives, and closed the session"
    OLD_LOST = "the old one is dead"
    APP_READY = "application is ready"
    APP_FAILED = "application failed"
    STOP_ASKED = "stop asked"
    TIMED_OUT = "the state's time is over"
    DRAINED = "nothing is left to finish"


class Effect(enum.Enum):
    """What the runtime does then, in the order given."""

    SEND_READY = "send ready"
    ACCEPT = "accept connections"
    SEND_ACCEPTING = "send accepting"
    READ_DATAGRAMS = "begin with what only one generation may have"
    TAKE_CHARGE = "move control.sock, if that is not done yet; take the standard error"
    SEND_IN_CHARGE = "send in-charge"
    PROMOTE = "go on as the generation in charge"
    SEND_FAILED = "send failed, with the reason"
    SEND_ROLLED_BACK = "send rolled-back"
    SEND_STOPPING = "send stopping"
    FAIL = "raise the reason in the application"
    DRAIN = "close the listeners, finish what is open"
    END = "close everything"


Outcome = tuple[State, tuple[Effect, ...]]

_FAIL: Final[Outcome] = (State.ENDED, (Effect.SEND_FAILED, Effect.FAIL, Effect.END))
_TOLD: Final[Outcome] = (State.ENDED, (Effect.FAIL, Effect.END))
_GIVE_BACK: Final[Outcome] = (State.ROLLED_BACK, (Effect.SEND_FAILED, Effect.FAIL, Effect.DRAIN))
_STOP: Final[Outcome] = (State.STOPPING, (Effect.SEND_STOPPING, Effect.DRAIN))
_TOLD_STOP: Final[Outcome] = (State.STOPPING, (Effect.DRAIN,))
_CARRY_ON: Final[Outcome] = (State.ALONE, (Effect.TAKE_CHARGE, Effect.PROMOTE))
_OVER: Final[Outcome] = (State.ENDED, (Effect.END,))


def _before_accept(state: State, steps: Mapping[Event, Outcome]) -> dict[tuple[State, Event], Outcome]:
    """The rows of a state in which this generation has a session and does not accept yet."""
    rows: dict[Event, Outcome] = {
        Event.DIALLING: _FAIL,
        Event.REFUSED: _FAIL,
        Event.ACCEPT: _FAIL,
        Event.RELEASED: _FAIL,
        Event.COMMITTED: _FAIL,
        Event.CHARGE_FAILED: _FAIL,
        Event.OLD_NONSENSE: _FAIL,
        Event.OLD_CLOSED: _FAIL,
        Event.TIMED_OUT: _FAIL,
        Event.APP_FAILED: _FAIL,
        Event.ROLLBACK: _TOLD,
        Event.STOP: _TOLD_STOP,
        Event.STOP_ASKED: _STOP,
        Event.OLD_LOST: _CARRY_ON,
    }
    return {(state, event): outcome for event, outcome in (rows | dict(steps)).items()}


def _accepting(state: State, steps: Mapping[Event, Outcome]) -> dict[tuple[State, Event], Outcome]:
    """The rows of a state in which this generation accepts, and the old one decides."""
    rows: dict[Event, Outcome] = {
        Event.ADOPTED: _GIVE_BACK,
        Event.ACCEPT: _GIVE_BACK,
        Event.RELEASED: _GIVE_BACK,
        Event.COMMITTED: _GIVE_BACK,
        Event.CHARGE_FAILED: _GIVE_BACK,
        Event.OLD_NONSENSE: _GIVE_BACK,
        Event.OLD_CLOSED: _GIVE_BACK,
        Event.APP_FAILED: _GIVE_BACK,
        Event.ROLLBACK: (State.ROLLED_BACK, (Effect.FAIL, Effect.DRAIN, Effect.SEND_ROLLED_BACK)),
        Event.STOP: _TOLD_STOP,
        Event.STOP_ASKED: _STOP,
        Event.OLD_LOST: (State.IN_CHARGE, (Effect.READ_DATAGRAMS, Effect.TAKE_CHARGE, Effect.PROMOTE)),
    }
    return {(state, event): outcome for event, outcome in (rows | dict(steps)).items()}


ACCEPTING: Final = frozenset({State.CUTOVER, State.PROBATION, State.IN_CHARGE})
PROMOTED: Final = frozenset({State.IN_CHARGE, State.ALONE})

TRANSITIONS: Final[Mapping[tuple[State, Event], Outcome]] = {
    (State.CALLING, Event.DIALLING): (State.ADOPTING, ()),
    **{
        (State.CALLING, event): _TOLD
        for event in (Event.REFUSED, Event.OLD_NONSENSE, Event.OLD_CLOSED, Event.TIMED_OUT, Event.APP_FAILED)
    },
    (State.CALLING, Event.OLD_LOST): _CARRY_ON,
    (State.CALLING, Event.STOP_ASKED): _TOLD,
    **_before_accept(State.ADOPTING, {Event.ADOPTED: (State.PREPARING, ())}),
    **_before_accept(State.PREPARING, {Event.APP_READY: (State.READY, (Effect.SEND_READY,)), Event.ADOPTED: _FAIL}),
    **_before_accept(
        State.READY,
        {
            Event.ACCEPT: (State.CUTOVER, (Effect.ACCEPT, Effect.SEND_ACCEPTING)),
            Event.ADOPTED: _FAIL,
            Event.OLD_LOST: (
                State.IN_CHARGE,
                (Effect.ACCEPT, Effect.READ_DATAGRAMS, Effect.TAKE_CHARGE, Effect.PROMOTE),
            ),
        },
    ),
    **_accepting(State.CUTOVER, {Event.RELEASED: (State.PROBATION, (Effect.READ_DATAGRAMS,))}),
    **_accepting(
        State.PROBATION,
        {Event.COMMITTED: (State.IN_CHARGE, (Effect.TAKE_CHARGE, Effect.SEND_IN_CHARGE, Effect.PROMOTE))},
    ),
    (State.ROLLED_BACK, Event.ROLLBACK): (State.ROLLED_BACK, (Effect.SEND_ROLLED_BACK,)),
    (State.ROLLED_BACK, Event.DRAINED): _OVER,
    (State.ROLLED_BACK, Event.TIMED_OUT): _OVER,
    # Asked to stop and told to roll back at once: an answer says that it finishes, and need not be killed.
    (State.STOPPING, Event.ROLLBACK): (State.STOPPING, (Effect.SEND_ROLLED_BACK,)),
    (State.STOPPING, Event.DRAINED): _OVER,
    (State.STOPPING, Event.TIMED_OUT): _OVER,
}


@attrs.define
class NewRole:
    """The state of a generation that takes over. Owns nothing; not for two threads at once."""

    state: State = State.CALLING

    def handle(self, event: Event) -> tuple[Effect, ...]:
        """Take one event; returns what to do. An event that says nothing in this state changes nothing."""
        self.state, effects = TRANSITIONS.get((self.state, event), (self.state, ()))
        return effects
