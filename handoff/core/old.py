"""The generation in charge, before and while it is replaced: its states, and what it does at each event.

It decides until commit. The rules, which the table spells out:

- It stops accepting only when the new generation has said that it accepts (CUTOVER to PROBATION), and keeps its
  listeners until the new one has said that it is in charge (COMMITTING to DRAINING).
- Whatever goes wrong before that, it accepts again *first*; then it ends the new generation.
- Once it has been asked to stop, nothing makes it accept again.
- Only a new generation that neither answers nor ends is killed (KILLING).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import attrs


class State(str, enum.Enum):
    """Where the generation in charge is."""

    STARTING = "starting"  # the application is not ready yet, and nobody was there before
    SERVING = "serving"
    SPAWNING = "spawning"  # the new program was started, and has not called yet
    ADOPTING = "adopting"  # descriptors are on their way
    PREPARING = "preparing"  # the new application starts, with all descriptors
    CUTOVER = "cutover"  # the new one was told to accept
    PROBATION = "probation"  # the new one accepts, this one is paused
    COMMITTING = "committing"  # the new one was told to take charge
    ROLLING_BACK = "rolling-back"  # this one accepts; the new one was told to end
    KILLING = "killing"  # this one accepts; the new one did not end, and was killed
    DRAINING = "draining"  # committed: finishes what it has
    STOPPING = "stopping"  # asked to stop: finishes what it has, nobody follows
    ENDED = "ended"


class Event(enum.Enum):
    """What happens to the generation in charge."""

    APP_READY = "application is ready"
    UPGRADE_ASKED = "upgrade asked"
    ABORT_ASKED = "abort asked"
    ROLLBACK_ASKED = "rollback asked"
    STOP_ASKED = "stop asked"
    CANNOT_SPAWN = "the new program can't be started"
    HELLO = "the new one calls"
    NEW_ADOPTED = "adopted: the last batch"
    NEW_READY = "ready"
    NEW_ACCEPTING = "accepting"
    NEW_IN_CHARGE = "in-charge"
    NEW_FAILED = "failed"
    NEW_ROLLED_BACK = "rolled-back"
    NEW_STOPPING = "stopping"
    NEW_NONSENSE = "the new one speaks nonsense"
    NEW_CLOSED = "the new one closed the session"
    NEW_LOST = "the new one is dead"
    UNHEALTHY = "the new one's health check failed"
    TIMED_OUT = "the state's time is over"
    DRAINED = "nothing is left to finish"


class Effect(enum.Enum):
    """What the runtime does then, in the order given."""

    ACCEPT = "accept connections (again)"
    PAUSE = "stop accepting on what the new one has"
    SPAWN = "start the new program"
    DIAL = "connect to the new one and send descriptors"
    SEND_ACCEPT = "send accept"
    SEND_RELEASED = "send released"
    SEND_COMMITTED = "send committed"
    END_NEW = "tell the new one to roll back; where there is no session, TERM to its group"
    STOP_NEW = "tell the new one to stop; where there is no session, TERM to its group"
    KILL_NEW = "kill the new one's process group"
    COMMIT = "another is in charge: tell so"
    DRAIN = "close the listeners, finish what is open"
    REPORT = "tell the outcome, forget the new one"
    REFUSE = "refuse what was asked, with the reason of this state"
    END = "close everything"


Outcome = tuple[State, tuple[Effect, ...]]

_FAULTS: Final = (
    Event.NEW_FAILED,
    Event.NEW_NONSENSE,
    Event.NEW_CLOSED,
    Event.UNHEALTHY,
)
_MESSAGES: Final = (
    Event.NEW_ADOPTED,
    Event.NEW_READY,
    Event.NEW_ACCEPTING,
    Event.NEW_IN_CHARGE,
    Event.NEW_ROLLED_BACK,
)
_ASKED: Final = (Event.UPGRADE_ASKED, Event.ABORT_ASKED, Event.ROLLBACK_ASKED, Event.HELLO)

_ROLL_BACK: Final[Outcome] = (State.ROLLING_BACK, (Effect.ACCEPT, Effect.END_NEW))
_KILL: Final[Outcome] = (State.KILLING, (Effect.ACCEPT, Effect.KILL_NEW))
_SERVE: Final[Outcome] = (State.SERVING, (Effect.ACCEPT, Effect.REPORT))
_STOP: Final[Outcome] = (State.STOPPING, (Effect.STOP_NEW, Effect.DRAIN))
_OVER: Final[Outcome] = (State.ENDED, (Effect.END,))


def _during_upgrade(
    state: State, steps: Mapping[Event, Outcome], *, late: Outcome
) -> dict[tuple[State, Event], Outcome]:
    """The rows of one state of an upgrade.

    `steps` is what is particular to it, `late` what its deadline does; a message that isn't among `steps` is nonsense.
    """
    rows: dict[Event, Outcome] = dict.fromkeys((*_FAULTS, *_MESSAGES), _ROLL_BACK)
    rows |= dict.fromkeys(_ASKED, (state, (Effect.REFUSE,)))
    rows |= {Event.NEW_LOST: _SERVE, Event.NEW_STOPPING: _ROLL_BACK, Event.STOP_ASKED: _STOP, Event.TIMED_OUT: late}
    rows |= {Event.ABORT_ASKED: _ROLL_BACK} if state in BEFORE_CUTOVER else {}
    return {(state, event): outcome for event, outcome in (rows | dict(steps)).items()}


def _ending_new(state: State, *, late: Outcome) -> dict[tuple[State, Event], Outcome]:
    """The rows of a state in which the new generation is being ended, and this one accepts."""
    return {
        **{(state, event): (state, (Effect.REFUSE,)) for event in _ASKED},
        (state, Event.NEW_LOST): (State.SERVING, (Effect.REPORT,)),
        (state, Event.TIMED_OUT): late,
        (state, Event.STOP_ASKED): _STOP,
    }


def _finishing(state: State) -> dict[tuple[State, Event], Outcome]:
    """The rows of a state in which this generation finishes what it has."""
    return {
        **{(state, event): (state, (Effect.REFUSE,)) for event in _ASKED},
        (state, Event.DRAINED): _OVER,
        (state, Event.TIMED_OUT): _OVER,
    }


BEFORE_CUTOVER: Final = frozenset({State.SPAWNING, State.ADOPTING, State.PREPARING})
UPGRADING: Final = BEFORE_CUTOVER | {
    State.CUTOVER,
    State.PROBATION,
    State.COMMITTING,
    State.ROLLING_BACK,
    State.KILLING,
}
ACCEPTING: Final = BEFORE_CUTOVER | {State.SERVING, State.CUTOVER, State.ROLLING_BACK, State.KILLING}

TRANSITIONS: Final[Mapping[tuple[State, Event], Outcome]] = {
    **{(State.STARTING, event): (State.STARTING, (Effect.REFUSE,)) for event in _ASKED},
    (State.STARTING, Event.APP_READY): (State.SERVING, (Effect.ACCEPT,)),
    (State.STARTING, Event.STOP_ASKED): (State.STOPPING, (Effect.DRAIN,)),
    **{(State.SERVING, event): (State.SERVING, (Effect.REFUSE,)) for event in _ASKED},
    (State.SERVING, Event.UPGRADE_ASKED): (State.SPAWNING, (Effect.SPAWN,)),
    (State.SERVING, Event.STOP_ASKED): (State.STOPPING, (Effect.DRAIN,)),
    **_during_upgrade(
        State.SPAWNING,
        {
            Event.CANNOT_SPAWN: (State.SERVING, (Effect.REPORT,)),
            Event.HELLO: (State.ADOPTING, (Effect.DIAL,)),
        },
        late=_ROLL_BACK,
    ),
    **_during_upgrade(State.ADOPTING, {Event.NEW_ADOPTED: (State.PREPARING, ())}, late=_ROLL_BACK),
    **_during_upgrade(State.PREPARING, {Event.NEW_READY: (State.CUTOVER, (Effect.SEND_ACCEPT,))}, late=_ROLL_BACK),
    **_during_upgrade(
        State.CUTOVER,
        {
            Event.NEW_ACCEPTING: (State.PROBATION, (Effect.PAUSE, Effect.SEND_RELEASED)),
            Event.NEW_STOPPING: _STOP,
            Event.ROLLBACK_ASKED: _ROLL_BACK,
        },
        late=_ROLL_BACK,
    ),
    **_during_upgrade(
        State.PROBATION,
        {Event.NEW_STOPPING: _STOP, Event.ROLLBACK_ASKED: _ROLL_BACK},
        late=(State.COMMITTING, (Effect.SEND_COMMITTED,)),
    ),
    # From here the new one may believe itself in charge: it is not told to roll back, it is killed.
    **{(State.COMMITTING, event): _KILL for event in (*_FAULTS, *_MESSAGES, Event.TIMED_OUT)},
    **{(State.COMMITTING, event): (State.COMMITTING, (Effect.REFUSE,)) for event in _ASKED},
    (State.COMMITTING, Event.NEW_IN_CHARGE): (State.DRAINING, (Effect.COMMIT, Effect.DRAIN)),
    (State.COMMITTING, Event.NEW_FAILED): _ROLL_BACK,
    (State.COMMITTING, Event.NEW_LOST): _SERVE,
    (State.COMMITTING, Event.NEW_STOPPING): _STOP,
    (State.COMMITTING, Event.STOP_ASKED): _STOP,
    **_ending_new(State.ROLLING_BACK, late=(State.KILLING, (Effect.KILL_NEW,))),
    (State.ROLLING_BACK, Event.NEW_ROLLED_BACK): (State.SERVING, (Effect.REPORT,)),
    (State.ROLLING_BACK, Event.CANNOT_SPAWN): (State.SERVING, (Effect.REPORT,)),
    **_ending_new(State.KILLING, late=(State.SERVING, (Effect.REPORT,))),
    **_finishing(State.DRAINING),
    **_finishing(State.STOPPING),
    **{(State.ENDED, event): (State.ENDED, (Effect.REFUSE,)) for event in _ASKED},
}


@attrs.define
class OldRole:
    """The state of the generation in charge. Owns nothing; not for two threads at once."""

    state: State = State.STARTING

    def handle(self, event: Event) -> tuple[Effect, ...]:
        """Take one event; returns what to do. An event that says nothing in this state changes nothing."""
        self.state, effects = TRANSITIONS.get((self.state, event), (self.state, ()))
        return effects
