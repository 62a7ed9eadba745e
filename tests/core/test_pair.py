"""Whatever happens to both generations, in whatever order: what is true in every world that can be reached.

`tests.core.pair` says what can happen: messages and notices arrive, applications get ready or fail, deadlines pass,
operators ask, processes die, sessions break, and either side speaks nonsense.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import pytest

from handoff.core import new, old
from tests.core.pair import (
    Cause,
    Edge,
    Explored,
    NewEffect,
    NewEvent,
    NewState,
    OldEffect,
    OldEvent,
    OldState,
    OldTable,
    Pair,
    World,
)


def nobody_accepts(world: World) -> bool:
    """Nothing is on its way any more that would make somebody accept, and nothing excuses that."""
    return world.began and world.quiet and not (world.somebody_accepts or world.excused or world.deaf)


def nobody_accepts_for_a_moment(world: World) -> bool:
    """Nobody accepts, though nothing went wrong."""
    return world.began and world.calm and not world.somebody_accepts


def two_are_in_charge(world: World) -> bool:
    """Both believe to be in charge, and nothing is on its way that tells one of them otherwise."""
    return world.in_charge > 1 and world.quiet and not (world.deaf and world.old is OldState.COMMITTING)


def accepts_after_stop(edge: Edge) -> bool:
    """A side accepts that was asked or told to stop."""
    return (edge.target.old_stopped and OldEffect.ACCEPT in edge.old_did) or (
        edge.target.new_stopped and (NewEffect.ACCEPT in edge.new_did or OldEffect.ACCEPT in edge.new_did)
    )


def kills_one_that_answered(edge: Edge) -> bool:
    """The old one kills a new one that has a session and has done, and answered, all that it was told."""
    return (
        OldEffect.KILL_NEW in edge.old_did
        and edge.cause is Cause.DEADLINE
        and edge.source.quiet
        and not edge.source.cut
    )


def stuck(explored: Explored) -> list[World]:
    """The worlds from which no deadline leads to one where each process serves or is gone."""
    before = collections.defaultdict(list)
    for edge in explored.every_edge():
        ready = edge.cause is Cause.WORK and edge.source.new is OldState.STARTING
        if edge.cause in (Cause.DELIVERY, Cause.DEADLINE) or ready:
            before[edge.target].append(edge.source)
    fine = {world for world in explored.worlds if world.settled or not world.began}
    waiting = list(fine)
    while waiting:
        for world in before[waiting.pop()]:
            if world not in fine:
                fine.add(world)
                waiting.append(world)
    return [world for world in explored.worlds if world not in fine]


@pytest.fixture(scope="module")
def explored() -> Explored:
    """Every world that can be reached."""
    return Explored(Pair())


def test_search_reaches_every_state(explored: Explored) -> None:
    """The search gets each role into each state, so that what follows says something about all of them."""
    olds = {world.old for world in explored.worlds}
    news = {world.new for world in explored.worlds}

    assert olds == {None, *OldState}
    # A new one in charge is an old one from then on.
    assert news >= {None, *NewState} - {NewState.IN_CHARGE, NewState.ALONE}
    assert news >= {OldState.STARTING, OldState.SERVING, OldState.STOPPING, OldState.ENDED}


def test_upgrade_is_possible(explored: Explored) -> None:
    """Without a fault the new one serves in the end, and the old one is gone."""
    ends = [world for world in explored.worlds if world.calm and world.settled and world.asked]

    assert World(old=None, new=OldState.SERVING, new_accepts=True, asked=True, began=True) in ends


def test_somebody_accepts_at_every_moment_without_faults(explored: Explored) -> None:
    """From its start on, while nothing goes wrong and even when it is rolled back, somebody accepts at every moment."""
    for world in explored.worlds:
        assert not nobody_accepts_for_a_moment(world), explored.trace(world)


def test_somebody_accepts_after_every_fault(explored: Explored) -> None:
    """Once all that is on its way has arrived, somebody accepts, unless none is left who could."""
    for world in explored.worlds:
        assert not nobody_accepts(world), explored.trace(world)


def test_somebody_accepts_in_the_end(explored: Explored) -> None:
    """Even when the old one does not notice that it has closed the session, its deadlines make it accept again."""
    for world in explored.worlds:
        assert not (world.began and world.settled) or world.somebody_accepts or world.excused, explored.trace(world)


def test_one_is_in_charge(explored: Explored) -> None:
    """Two generations never both believe to be in charge with nothing on its way that resolves it."""
    for world in explored.worlds:
        assert not two_are_in_charge(world), explored.trace(world)


def test_two_in_charge_are_resolved_by_deadlines(explored: Explored) -> None:
    """Two generations never both serve as the one in charge."""
    for world in explored.worlds:
        assert not (world.settled and world.in_charge > 1), explored.trace(world)


def test_nobody_accepts_after_stop(explored: Explored) -> None:
    """A side that was asked or told to stop never accepts again."""
    for edge in explored.every_edge():
        assert not accepts_after_stop(edge), explored.trace(edge.source) + f"\n    {edge}"


def test_nothing_is_stuck(explored: Explored) -> None:
    """From everywhere deadlines lead to where each process serves or is gone."""
    worlds = stuck(explored)

    assert not worlds, explored.trace(worlds[0])


def test_new_one_that_answers_is_not_killed(explored: Explored) -> None:
    """A new one that has answered what it was told is never killed for being late."""
    for edge in explored.every_edge():
        assert not kills_one_that_answered(edge), explored.trace(edge.source) + f"\n    {edge}"


def test_new_one_is_killed_for_few_reasons(explored: Explored) -> None:
    """The old one kills for a deadline, nonsense or a closed session, and for nothing else."""
    reasons = {edge.what for edge in explored.every_edge() if OldEffect.KILL_NEW in edge.old_did}

    assert reasons == {
        "old times out in rolling-back",
        "old times out in committing",
        "old gets nonsense",
        "old gets end of file",
    }


def test_stop_and_rollback_that_cross_kill_nobody() -> None:
    """A new one that was asked to stop and is told to roll back at once answers, and finishes in peace."""
    pair = Pair()
    world = _after(
        pair,
        "old application is ready",
        "upgrade",
        "old gets hello",
        "new gets dialling",
        "new gets descriptors",
        "old gets adopted",
        "new application is ready",
        "old gets ready",
        "new gets accept",
        "old gets accepting",
        "new gets released",
    )

    world = _after(pair, "new is asked to stop", "rollback", "new gets rollback", "old gets stopping", start=world)
    world = _after(pair, "old gets rolled-back", start=world)

    assert (world.old, world.new) == (OldState.SERVING, NewState.STOPPING)


def _after(pair: Pair, *happens: str, start: World | None = None) -> World:
    world = start or World()
    for what in happens:
        edges = {edge.what: edge for edge in pair.edges(world)}
        assert what in edges, f"{what!r} can't happen in {world}; possible: {sorted(edges)}"
        world = edges[what].target
    return world


# That the search finds holes is shown by holes that are put in.

_HOLES: dict[str, tuple[Callable[[Edge], bool], OldTable, dict[tuple[new.State, new.Event], new.Outcome]]] = {
    "death in probation does not make the old one accept": (
        lambda edge: nobody_accepts(edge.target),
        {(OldState.PROBATION, OldEvent.NEW_LOST): (OldState.SERVING, (OldEffect.REPORT,))},
        {},
    ),
    "failure in probation ends the new one before the old one accepts": (
        lambda edge: nobody_accepts(edge.target),
        {(OldState.PROBATION, OldEvent.NEW_FAILED): (OldState.ROLLING_BACK, (OldEffect.END_NEW,))},
        {},
    ),
    "the old one pauses when it sends accept": (
        lambda edge: nobody_accepts_for_a_moment(edge.target),
        {(OldState.PREPARING, OldEvent.NEW_READY): (OldState.CUTOVER, (OldEffect.PAUSE, OldEffect.SEND_ACCEPT))},
        {},
    ),
    "the new one gives up when the old one is dead": (
        lambda edge: nobody_accepts(edge.target),
        {},
        {(NewState.PROBATION, NewEvent.OLD_LOST): (NewState.ROLLED_BACK, (NewEffect.FAIL, NewEffect.DRAIN))},
    ),
    "the old one that waited for in-charge in vain kills nobody": (
        lambda edge: two_are_in_charge(edge.target),
        {(OldState.COMMITTING, OldEvent.TIMED_OUT): (OldState.SERVING, (OldEffect.ACCEPT, OldEffect.REPORT))},
        {},
    ),
    "the new one that stops obeys accept": (
        accepts_after_stop,
        {},
        {(NewState.STOPPING, NewEvent.ACCEPT): (NewState.CUTOVER, (NewEffect.ACCEPT,))},
    ),
    "the old one takes back what was stopped in probation": (
        accepts_after_stop,
        {(OldState.STOPPING, OldEvent.NEW_LOST): (OldState.SERVING, (OldEffect.ACCEPT, OldEffect.REPORT))},
        {},
    ),
    "the new one that stops does not answer rollback": (
        kills_one_that_answered,
        {},
        {(NewState.STOPPING, NewEvent.ROLLBACK): (NewState.STOPPING, ())},
    ),
}


@pytest.mark.parametrize("hole", _HOLES)
def test_search_finds_hole(hole: str) -> None:
    """A hole in a table is found."""
    violated, old_changes, new_changes = _HOLES[hole]
    pair = Pair({**old.TRANSITIONS, **old_changes}, {**new.TRANSITIONS, **new_changes})

    explored = Explored(pair, until=violated)

    assert explored.found


def test_search_finds_what_is_stuck() -> None:
    """A state without a way out is found."""
    pair = Pair(
        {**old.TRANSITIONS, (OldState.ROLLING_BACK, OldEvent.TIMED_OUT): (OldState.ROLLING_BACK, ())}, new.TRANSITIONS
    )

    worlds = stuck(Explored(pair, until=lambda edge: False))

    assert any(world.old is OldState.ROLLING_BACK for world in worlds)
