"""A generation that takes over: what it does at every event in every state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from handoff.core.new import ACCEPTING, PROMOTED, Effect, Event, NewRole, State
from tests.core.matrix import read

# Written down from design.md, not from the table.
EXPECTED = read(
    """
CALLING  # there is no session yet
    DIALLING -> ADOPTING: -
    REFUSED OLD_NONSENSE OLD_CLOSED TIMED_OUT APP_FAILED STOP_ASKED -> ENDED: FAIL, END
    OLD_LOST -> ALONE: TAKE_CHARGE, PROMOTE
    ignored: ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED ROLLBACK STOP APP_READY DRAINED

ADOPTING  # does not accept: whatever goes wrong, it just ends
    ADOPTED -> PREPARING: -
    OLD_CLOSED OLD_NONSENSE TIMED_OUT APP_FAILED -> ENDED: SEND_FAILED, FAIL, END
    DIALLING REFUSED ACCEPT RELEASED COMMITTED CHARGE_FAILED -> ENDED: SEND_FAILED, FAIL, END  # out of turn
    ROLLBACK -> ENDED: FAIL, END
    STOP -> STOPPING: DRAIN
    STOP_ASKED -> STOPPING: SEND_STOPPING, DRAIN
    OLD_LOST -> ALONE: TAKE_CHARGE, PROMOTE
    ignored: APP_READY DRAINED

PREPARING
    APP_READY -> READY: SEND_READY
    OLD_CLOSED OLD_NONSENSE TIMED_OUT APP_FAILED -> ENDED: SEND_FAILED, FAIL, END
    DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED -> ENDED: SEND_FAILED, FAIL, END  # out of turn
    ROLLBACK -> ENDED: FAIL, END
    STOP -> STOPPING: DRAIN
    STOP_ASKED -> STOPPING: SEND_STOPPING, DRAIN
    OLD_LOST -> ALONE: TAKE_CHARGE, PROMOTE
    ignored: DRAINED

READY
    ACCEPT -> CUTOVER: ACCEPT, SEND_ACCEPTING
    OLD_CLOSED OLD_NONSENSE TIMED_OUT APP_FAILED -> ENDED: SEND_FAILED, FAIL, END
    DIALLING REFUSED ADOPTED RELEASED COMMITTED CHARGE_FAILED -> ENDED: SEND_FAILED, FAIL, END  # out of turn
    ROLLBACK -> ENDED: FAIL, END
    STOP -> STOPPING: DRAIN
    STOP_ASKED -> STOPPING: SEND_STOPPING, DRAIN
    OLD_LOST -> IN_CHARGE: ACCEPT, READ_DATAGRAMS, TAKE_CHARGE, PROMOTE
    ignored: APP_READY DRAINED

CUTOVER  # accepts: what goes wrong makes it stop accepting and finish what it has
    RELEASED -> PROBATION: READ_DATAGRAMS
    OLD_CLOSED OLD_NONSENSE APP_FAILED -> ROLLED_BACK: SEND_FAILED, FAIL, DRAIN
    ADOPTED ACCEPT COMMITTED CHARGE_FAILED -> ROLLED_BACK: SEND_FAILED, FAIL, DRAIN  # out of turn
    ROLLBACK -> ROLLED_BACK: FAIL, DRAIN, SEND_ROLLED_BACK
    STOP -> STOPPING: DRAIN
    STOP_ASKED -> STOPPING: SEND_STOPPING, DRAIN
    OLD_LOST -> IN_CHARGE: READ_DATAGRAMS, TAKE_CHARGE, PROMOTE
    ignored: TIMED_OUT  # an old one that is silent, even hung, does not end one that serves
    ignored: DIALLING REFUSED  # the call is over and closed
    ignored: APP_READY DRAINED

PROBATION
    COMMITTED -> IN_CHARGE: TAKE_CHARGE, SEND_IN_CHARGE, PROMOTE
    OLD_CLOSED OLD_NONSENSE APP_FAILED CHARGE_FAILED -> ROLLED_BACK: SEND_FAILED, FAIL, DRAIN
    ADOPTED ACCEPT RELEASED -> ROLLED_BACK: SEND_FAILED, FAIL, DRAIN  # out of turn
    ROLLBACK -> ROLLED_BACK: FAIL, DRAIN, SEND_ROLLED_BACK
    STOP -> STOPPING: DRAIN
    STOP_ASKED -> STOPPING: SEND_STOPPING, DRAIN
    OLD_LOST -> IN_CHARGE: READ_DATAGRAMS, TAKE_CHARGE, PROMOTE
    ignored: TIMED_OUT
    ignored: DIALLING REFUSED
    ignored: APP_READY DRAINED

IN_CHARGE  # from here on it is an old one, whose table counts
    ignored: DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED ROLLBACK STOP
    ignored: OLD_NONSENSE OLD_CLOSED OLD_LOST APP_READY APP_FAILED STOP_ASKED TIMED_OUT DRAINED

ALONE
    ignored: DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED ROLLBACK STOP
    ignored: OLD_NONSENSE OLD_CLOSED OLD_LOST APP_READY APP_FAILED STOP_ASKED TIMED_OUT DRAINED

ROLLED_BACK  # its listeners are closed: nothing makes it accept again
    ROLLBACK -> ROLLED_BACK: SEND_ROLLED_BACK  # it had failed by itself: it answers, so that it is not killed
    DRAINED TIMED_OUT -> ENDED: END
    ignored: DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED STOP
    ignored: OLD_NONSENSE OLD_CLOSED OLD_LOST APP_READY APP_FAILED STOP_ASKED

STOPPING
    ROLLBACK -> STOPPING: SEND_ROLLED_BACK  # both were asked at once: it answers, so that it is not killed
    DRAINED TIMED_OUT -> ENDED: END
    ignored: DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED STOP
    ignored: OLD_NONSENSE OLD_CLOSED OLD_LOST APP_READY APP_FAILED STOP_ASKED

ENDED
    ignored: DIALLING REFUSED ADOPTED ACCEPT RELEASED COMMITTED CHARGE_FAILED ROLLBACK STOP
    ignored: OLD_NONSENSE OLD_CLOSED OLD_LOST APP_READY APP_FAILED STOP_ASKED TIMED_OUT DRAINED
""",
    State,
    Event,
    Effect,
)
PAIRS = [(state, event) for state in State for event in Event]
FINISHING = (State.ROLLED_BACK, State.STOPPING, State.ENDED)


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=[f"{state.name}-{event.name}" for state, event in PAIRS])
def test_outcome(state: State, event: Event) -> None:
    """Each event in each state leads where it should, with the right effects in the right order."""
    role = NewRole(state)

    effects = role.handle(event)

    assert (role.state, effects) == EXPECTED[state, event]


def test_begins_with_a_call() -> None:
    """A generation that takes over begins by calling the one in charge."""
    role = NewRole()

    assert role.state is State.CALLING


def outcomes(states: Iterable[State]) -> Iterator[tuple[State, Event, State, tuple[Effect, ...]]]:
    """(state, event, next state, effects) for every event in `states`."""
    for state in states:
        for event in Event:
            role = NewRole(state)
            effects = role.handle(event)
            yield state, event, role.state, effects


def test_every_pair_is_written_down() -> None:
    """No state and no event is without an expectation."""
    assert set(EXPECTED) == set(PAIRS)


def test_end_is_final() -> None:
    """Nothing leads out of the end, nor out of having become the one in charge."""
    for state, event, after, effects in outcomes([State.ENDED, *PROMOTED]):
        assert (after, effects) == (state, ()), event


def test_never_accepts_again() -> None:
    """Who has given the service back, or was stopped, neither accepts again nor takes charge."""
    for state, event, after, effects in outcomes(FINISHING):
        assert after in FINISHING, (state, event)
        assert not {Effect.ACCEPT, Effect.TAKE_CHARGE, Effect.PROMOTE} & set(effects), (state, event)


@pytest.mark.parametrize("state", [state for state in State if state not in PROMOTED and state not in FINISHING])
def test_carries_on_when_the_old_one_is_dead(state: State) -> None:
    """In every state before the end, the death of the old one makes this one take charge."""
    role = NewRole(state)

    effects = role.handle(Event.OLD_LOST)

    assert role.state in PROMOTED
    assert effects[-2:] == (Effect.TAKE_CHARGE, Effect.PROMOTE)


def test_accepts_where_it_should() -> None:
    """A state that accepts is entered by accepting first; it is left by draining."""
    for state, event, after, effects in outcomes(State):
        if after in ACCEPTING and state not in ACCEPTING:
            assert effects[0] is Effect.ACCEPT, (state, event)
        if state in ACCEPTING and after not in ACCEPTING:
            assert Effect.DRAIN in effects, (state, event)


def test_stops_accepting_before_it_answers_a_rollback() -> None:
    """The old one hears that this one has rolled back only when it accepts no more."""
    role = NewRole(State.PROBATION)

    effects = role.handle(Event.ROLLBACK)

    assert effects.index(Effect.DRAIN) < effects.index(Effect.SEND_ROLLED_BACK)


def test_says_that_it_failed_before_it_stops_accepting() -> None:
    """The old one hears of a failure first, so that the time in which nobody accepts is as short as can be."""
    role = NewRole(State.PROBATION)

    effects = role.handle(Event.APP_FAILED)

    assert effects.index(Effect.SEND_FAILED) < effects.index(Effect.DRAIN)


def test_takes_charge_before_it_says_so() -> None:
    """The old one closes its listeners only when control.sock names this generation."""
    role = NewRole(State.PROBATION)

    effects = role.handle(Event.COMMITTED)

    assert effects == (Effect.TAKE_CHARGE, Effect.SEND_IN_CHARGE, Effect.PROMOTE)
