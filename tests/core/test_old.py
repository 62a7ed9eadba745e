"""The generation in charge: what it does at every event in every state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from handoff.core.old import ACCEPTING, BEFORE_CUTOVER, UPGRADING, Effect, Event, OldRole, State
from tests.core.matrix import read

# Written down from design.md, not from the table.
EXPECTED = read(
    """
STARTING
    APP_READY -> SERVING: ACCEPT
    STOP_ASKED -> STOPPING: DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING
    ignored: NEW_NONSENSE NEW_CLOSED NEW_LOST UNHEALTHY CANNOT_SPAWN TIMED_OUT DRAINED

SERVING
    UPGRADE_ASKED -> SPAWNING: SPAWN
    STOP_ASKED -> STOPPING: DRAIN
    refused: ABORT_ASKED ROLLBACK_ASKED
    refused: HELLO  # nobody asked for an upgrade: whoever calls was started beside this one
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING
    ignored: NEW_NONSENSE NEW_CLOSED NEW_LOST UNHEALTHY APP_READY CANNOT_SPAWN TIMED_OUT DRAINED

SPAWNING  # accepts; there is a program and no session yet
    HELLO -> ADOPTING: DIAL
    CANNOT_SPAWN -> SERVING: REPORT
    NEW_LOST -> SERVING: ACCEPT, REPORT
    ABORT_ASKED TIMED_OUT -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_FAILED NEW_STOPPING NEW_NONSENSE NEW_CLOSED UNHEALTHY -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_ROLLED_BACK -> ROLLING_BACK: ACCEPT, END_NEW  # out of turn
    STOP_ASKED -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ROLLBACK_ASKED
    ignored: APP_READY DRAINED

ADOPTING  # accepts
    NEW_ADOPTED -> PREPARING: -
    NEW_LOST -> SERVING: ACCEPT, REPORT
    ABORT_ASKED TIMED_OUT -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_FAILED NEW_STOPPING NEW_NONSENSE NEW_CLOSED UNHEALTHY -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_ROLLED_BACK -> ROLLING_BACK: ACCEPT, END_NEW  # out of turn
    STOP_ASKED -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ROLLBACK_ASKED HELLO
    ignored: APP_READY CANNOT_SPAWN DRAINED

PREPARING  # accepts
    NEW_READY -> CUTOVER: SEND_ACCEPT
    NEW_LOST -> SERVING: ACCEPT, REPORT
    ABORT_ASKED TIMED_OUT -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_FAILED NEW_STOPPING NEW_NONSENSE NEW_CLOSED UNHEALTHY -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_ADOPTED NEW_ACCEPTING NEW_IN_CHARGE NEW_ROLLED_BACK -> ROLLING_BACK: ACCEPT, END_NEW  # out of turn
    STOP_ASKED -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ROLLBACK_ASKED HELLO
    ignored: APP_READY CANNOT_SPAWN DRAINED

CUTOVER  # accepts until the new one says that it does
    NEW_ACCEPTING -> PROBATION: PAUSE, SEND_RELEASED
    NEW_LOST -> SERVING: ACCEPT, REPORT
    ROLLBACK_ASKED TIMED_OUT -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_FAILED NEW_NONSENSE NEW_CLOSED UNHEALTHY -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_ADOPTED NEW_READY NEW_IN_CHARGE NEW_ROLLED_BACK -> ROLLING_BACK: ACCEPT, END_NEW  # out of turn
    STOP_ASKED NEW_STOPPING -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED HELLO
    ignored: APP_READY CANNOT_SPAWN DRAINED

PROBATION  # paused: whatever ends it makes this one accept first, but for a stop
    TIMED_OUT -> COMMITTING: SEND_COMMITTED
    NEW_LOST -> SERVING: ACCEPT, REPORT
    ROLLBACK_ASKED -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_FAILED NEW_NONSENSE NEW_CLOSED UNHEALTHY -> ROLLING_BACK: ACCEPT, END_NEW
    NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_ROLLED_BACK -> ROLLING_BACK: ACCEPT, END_NEW  # out of turn
    STOP_ASKED NEW_STOPPING -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED HELLO
    ignored: APP_READY CANNOT_SPAWN DRAINED

COMMITTING  # paused; the new one may be in charge already, and then no word of this one makes it let go
    NEW_IN_CHARGE -> DRAINING: COMMIT, DRAIN
    NEW_LOST -> SERVING: ACCEPT, REPORT
    NEW_FAILED -> ROLLING_BACK: ACCEPT, END_NEW  # so it is not in charge
    TIMED_OUT NEW_CLOSED NEW_NONSENSE UNHEALTHY -> KILLING: ACCEPT, KILL_NEW
    NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_ROLLED_BACK -> KILLING: ACCEPT, KILL_NEW  # out of turn
    STOP_ASKED NEW_STOPPING -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: APP_READY CANNOT_SPAWN DRAINED

ROLLING_BACK  # accepts; what the new one said before it heard of this is of no interest
    NEW_ROLLED_BACK NEW_LOST CANNOT_SPAWN -> SERVING: REPORT
    TIMED_OUT -> KILLING: KILL_NEW
    STOP_ASKED -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_STOPPING NEW_NONSENSE NEW_CLOSED
    ignored: UNHEALTHY APP_READY DRAINED

KILLING  # accepts
    NEW_LOST TIMED_OUT -> SERVING: REPORT
    STOP_ASKED -> STOPPING: STOP_NEW, DRAIN
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING NEW_NONSENSE
    ignored: NEW_CLOSED UNHEALTHY APP_READY CANNOT_SPAWN DRAINED

DRAINING  # another is in charge
    DRAINED TIMED_OUT -> ENDED: END
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING NEW_NONSENSE
    ignored: NEW_CLOSED NEW_LOST UNHEALTHY STOP_ASKED APP_READY CANNOT_SPAWN

STOPPING  # nobody takes back
    DRAINED TIMED_OUT -> ENDED: END
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING NEW_NONSENSE
    ignored: NEW_CLOSED NEW_LOST UNHEALTHY STOP_ASKED APP_READY CANNOT_SPAWN

ENDED
    refused: UPGRADE_ASKED ABORT_ASKED ROLLBACK_ASKED HELLO
    ignored: NEW_ADOPTED NEW_READY NEW_ACCEPTING NEW_IN_CHARGE NEW_FAILED NEW_ROLLED_BACK NEW_STOPPING NEW_NONSENSE
    ignored: NEW_CLOSED NEW_LOST UNHEALTHY STOP_ASKED APP_READY CANNOT_SPAWN TIMED_OUT DRAINED
""",
    State,
    Event,
    Effect,
)
PAIRS = [(state, event) for state in State for event in Event]


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=[f"{state.name}-{event.name}" for state, event in PAIRS])
def test_outcome(state: State, event: Event) -> None:
    """Each event in each state leads where it should, with the right effects in the right order."""
    role = OldRole(state)

    effects = role.handle(event)

    assert (role.state, effects) == EXPECTED[state, event]


def test_first_generation_starts() -> None:
    """The first generation begins with its application not ready."""
    role = OldRole()

    assert role.state is State.STARTING


def outcomes(states: Iterable[State]) -> Iterator[tuple[State, Event, State, tuple[Effect, ...]]]:
    """(state, event, next state, effects) for every event in `states`."""
    for state in states:
        for event in Event:
            role = OldRole(state)
            effects = role.handle(event)
            yield state, event, role.state, effects


def test_every_pair_is_written_down() -> None:
    """No state and no event is without an expectation."""
    assert set(EXPECTED) == set(PAIRS)


def test_end_is_final() -> None:
    """Nothing leads out of the end, and nothing is done there but refuse."""
    for _, event, after, effects in outcomes([State.ENDED]):
        assert after is State.ENDED, event
        assert set(effects) <= {Effect.REFUSE}, event


def test_only_the_end_follows_a_drain() -> None:
    """Who finishes what it has never accepts again."""
    for state, event, after, effects in outcomes([State.DRAINING, State.STOPPING]):
        assert after in (state, State.ENDED), event
        assert Effect.ACCEPT not in effects, event


def test_accepts_before_anything_else() -> None:
    """Whatever gives an upgrade up makes the old generation accept first, unless nothing was ever started."""
    given_up = (State.SERVING, State.ROLLING_BACK, State.KILLING)

    for state, event, after, effects in outcomes(UPGRADING - set(given_up)):
        if after in given_up and event is not Event.CANNOT_SPAWN:
            assert effects[0] is Effect.ACCEPT, (state, event)


def test_accepts_where_it_should() -> None:
    """A state that accepts is entered from one that does, or by accepting; it is left by pausing or draining."""
    for state, event, after, effects in outcomes(State):
        if after in ACCEPTING and state not in ACCEPTING:
            assert Effect.ACCEPT in effects, (state, event)
        if state in ACCEPTING and after not in ACCEPTING:
            assert effects[0] is Effect.PAUSE or Effect.DRAIN in effects, (state, event)


@pytest.mark.parametrize("state", sorted(UPGRADING))
def test_new_one_is_told_to_stop_before_the_drain(state: State) -> None:
    """A stop is passed on before this generation closes its listeners, so that neither accepts for long."""
    role = OldRole(state)

    effects = role.handle(Event.STOP_ASKED)

    assert effects == (Effect.STOP_NEW, Effect.DRAIN)


def test_pauses_before_it_says_released() -> None:
    """The new one hears that the old one has let go only when it has."""
    role = OldRole(State.CUTOVER)

    effects = role.handle(Event.NEW_ACCEPTING)

    assert effects == (Effect.PAUSE, Effect.SEND_RELEASED)


def test_states_before_cutover() -> None:
    """Before cutover an upgrade is aborted, afterwards it is rolled back: no state takes both."""
    abortable = {state for state in State if OldRole(state).handle(Event.ABORT_ASKED) != (Effect.REFUSE,)}
    revocable = {state for state in State if OldRole(state).handle(Event.ROLLBACK_ASKED) != (Effect.REFUSE,)}

    assert abortable == BEFORE_CUTOVER
    assert revocable == {State.CUTOVER, State.PROBATION}
