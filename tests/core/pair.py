"""Both roles joined in memory, and a search through everything that can happen to them.

Two queues carry what one process tells the other; at their ends come the notices of the kernel: the connection is
closed, the process is dead. A `World` is both processes and both queues at one moment. `explore` follows every event
that is possible in every world, so that what holds in all worlds holds whatever happens, in whatever order.
"""

from __future__ import annotations

import collections
import enum
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from handoff.core import new, old
from handoff.core.deadlines import Deadlines
from handoff.core.messages import Kind

OldState, OldEvent, OldEffect = old.State, old.Event, old.Effect
NewState, NewEvent, NewEffect = new.State, new.Event, new.Effect
OldTable = Mapping[tuple[old.State, old.Event], old.Outcome]
NewTable = Mapping[tuple[new.State, new.Event], new.Outcome]


class Notice(enum.Enum):
    """What a process learns of the other one that is no message."""

    CLOSED = "end of file"
    LOST = "death"
    TERM = "signal TERM"
    NONSENSE = "nonsense"


class Cause(enum.Enum):
    """What kind of thing has happened between two worlds."""

    DELIVERY = "delivery"  # of a message or a notice; the end of a process that has nothing left to do
    DEADLINE = "deadline"
    WORK = "work"  # the applications do theirs
    ASKED = "asked"  # an operator or a supervisor asks
    FAULT = "fault"


Item = Kind | Notice


class World(NamedTuple):
    """Both processes and what is on its way between them.

    The new one is an old one, too, once it is in charge: then `new` is an old.State.
    """

    old: old.State | None = OldState.STARTING  # None: dead
    new: old.State | new.State | None = None  # None: dead, or not there yet
    to_old: tuple[Item, ...] = ()
    to_new: tuple[Item, ...] = ()
    old_accepts: bool = False
    new_accepts: bool = False
    asked: bool = False  # the one upgrade was asked for
    known: bool = False  # the old one watches the new one, and can kill it
    session: bool = False  # there is a connection
    began: bool = False  # the first generation has served
    old_stopped: bool = False  # it was asked or told to stop
    new_stopped: bool = False
    calm: bool = True  # no fault, no late answer and no stop so far
    cut: bool = False  # a living process has lost the session
    deaf: bool = False  # it was the old one, which does not notice: its deadlines have to
    excused: bool = False  # whoever could accept was stopped, or failed with nobody left to take over

    @property
    def quiet(self) -> bool:
        """Nothing is on its way, and nobody is about to do something by itself."""
        return not (
            self.to_old
            or self.to_new
            or self.old is OldState.ENDED
            or self.new in (NewState.ENDED, OldState.ENDED)
            or self.new is OldState.STARTING
        )

    @property
    def settled(self) -> bool:
        """Each process serves, or is gone."""
        return self.quiet and self.old in (None, OldState.SERVING) and self.new in (None, OldState.SERVING)

    @property
    def somebody_accepts(self) -> bool:
        """A living process accepts."""
        return self.old_accepts or self.new_accepts

    @property
    def in_charge(self) -> int:
        """How many living processes believe to be in charge."""
        return sum(isinstance(state, old.State) and state not in _FINISHING for state in (self.old, self.new))

    @property
    def new_can_serve(self) -> bool:
        """The new one lives, has not given up, and nothing that makes it give up is on its way."""
        if self.new is None or self.new in _GIVEN_UP:
            return False
        return not any(item in self.to_new for item in _ENDS_NEW)

    @property
    def old_can_serve(self) -> bool:
        """The old one lives and has not given up, nor is it just about to learn that the new one is in charge."""
        committed = Kind.IN_CHARGE in self.to_old and self.old is OldState.COMMITTING
        return self.old is not None and self.old not in _FINISHING and not committed


_FINISHING: Final = (OldState.DRAINING, OldState.STOPPING, OldState.ENDED)
_GIVEN_UP: Final = (NewState.ROLLED_BACK, NewState.STOPPING, NewState.ENDED, OldState.STOPPING, OldState.ENDED)
_ENDS_NEW: Final = (Kind.ROLLBACK, Kind.STOP, Kind.REFUSED, Notice.TERM, Notice.NONSENSE)
_OLD_ACCEPTS_ALREADY: Final = (OldState.SERVING, *old.BEFORE_CUTOVER, OldState.ROLLING_BACK, OldState.KILLING)


class Edge(NamedTuple):
    """One thing that has happened: from which world to which, and what each side did."""

    source: World
    cause: Cause
    what: str
    old_did: tuple[old.Effect, ...]
    new_did: tuple[new.Effect | old.Effect, ...]
    target: World

    def __str__(self) -> str:
        done = [f"old: {effect.name}" for effect in self.old_did] + [f"new: {effect.name}" for effect in self.new_did]
        return f"{self.what} ({', '.join(done)})" if done else self.what


_AT_OLD: Final[Mapping[Item, old.Event]] = {
    Kind.HELLO: OldEvent.HELLO,
    Kind.ADOPTED: OldEvent.NEW_ADOPTED,
    Kind.READY: OldEvent.NEW_READY,
    Kind.ACCEPTING: OldEvent.NEW_ACCEPTING,
    Kind.IN_CHARGE: OldEvent.NEW_IN_CHARGE,
    Kind.FAILED: OldEvent.NEW_FAILED,
    Kind.ROLLED_BACK: OldEvent.NEW_ROLLED_BACK,
    Kind.STOPPING: OldEvent.NEW_STOPPING,
    Notice.NONSENSE: OldEvent.NEW_NONSENSE,
    Notice.CLOSED: OldEvent.NEW_CLOSED,
    Notice.LOST: OldEvent.NEW_LOST,
}
_AT_NEW: Final[Mapping[Item, new.Event]] = {
    Kind.DIALLING: NewEvent.DIALLING,
    Kind.REFUSED: NewEvent.REFUSED,
    Kind.ACCEPT: NewEvent.ACCEPT,
    Kind.RELEASED: NewEvent.RELEASED,
    Kind.COMMITTED: NewEvent.COMMITTED,
    Kind.ROLLBACK: NewEvent.ROLLBACK,
    Kind.STOP: NewEvent.STOP,
    Notice.NONSENSE: NewEvent.OLD_NONSENSE,
    Notice.CLOSED: NewEvent.OLD_CLOSED,
    Notice.LOST: NewEvent.OLD_LOST,
    Notice.TERM: NewEvent.STOP_ASKED,
}
_OLD_SENDS: Final[Mapping[old.Effect, Kind]] = {
    OldEffect.SEND_ACCEPT: Kind.ACCEPT,
    OldEffect.SEND_RELEASED: Kind.RELEASED,
    OldEffect.SEND_COMMITTED: Kind.COMMITTED,
}
_NEW_SENDS: Final[Mapping[new.Effect, Kind]] = {
    NewEffect.SEND_READY: Kind.READY,
    NewEffect.SEND_ACCEPTING: Kind.ACCEPTING,
    NewEffect.SEND_IN_CHARGE: Kind.IN_CHARGE,
    NewEffect.SEND_FAILED: Kind.FAILED,
    NewEffect.SEND_ROLLED_BACK: Kind.ROLLED_BACK,
    NewEffect.SEND_STOPPING: Kind.STOPPING,
}


class Pair:
    """The rules by which one world becomes another, for one pair of state tables."""

    def __init__(self, old_table: OldTable = old.TRANSITIONS, new_table: NewTable = new.TRANSITIONS) -> None:
        self._old_table = old_table
        self._new_table = new_table
        self._deadlines = Deadlines()
        self._old_did: list[old.Effect] = []
        self._new_did: list[new.Effect | old.Effect] = []

    def edges(self, world: World) -> Iterator[Edge]:
        """Everything that can happen next."""
        for cause, what, happen in self._possible(world):
            self._old_did, self._new_did = [], []
            target = happen(world)
            if target != world or self._old_did or self._new_did:
                yield Edge(world, cause, what, tuple(self._old_did), tuple(self._new_did), target)

    # What can happen.

    def _possible(self, world: World) -> Iterator[tuple[Cause, str, Callable[[World], World]]]:
        if world.old is not None:
            yield from self._possible_at_old(world)
        if world.new is not None:
            yield from self._possible_at_new(world)
        if world.session and world.old is not None and world.new is not None:
            yield Cause.FAULT, "the session breaks, and both see it", _cut_for_both
            yield Cause.FAULT, "the new one closes the session and does not notice", _cut_by_new
            yield Cause.FAULT, "the old one closes the session and does not notice", _cut_by_old

    def _possible_at_old(self, world: World) -> Iterator[tuple[Cause, str, Callable[[World], World]]]:
        assert world.old is not None
        if world.to_old:
            yield Cause.DELIVERY, f"old gets {_text(world.to_old[0])}", self._deliver_to_old
        if world.old is OldState.ENDED:
            yield Cause.DELIVERY, "old exits", _old_dies
            return
        if world.old is OldState.STARTING:
            yield Cause.WORK, "old application is ready", lambda w: self._old(w, OldEvent.APP_READY)
        if self._deadlines.of_old(world.old) is not None:
            yield Cause.DEADLINE, f"old times out in {world.old.value}", self._old_times_out
        if world.old in (OldState.DRAINING, OldState.STOPPING) and not (
            world.old is OldState.STOPPING and world.known and world.new is not None
        ):
            yield Cause.WORK, "old has finished", lambda w: self._old(w, OldEvent.DRAINED)
        if world.old is OldState.SERVING and not world.asked:
            yield Cause.ASKED, "upgrade", lambda w: self._old(w._replace(asked=True), OldEvent.UPGRADE_ASKED)
            yield Cause.FAULT, "upgrade, which can't be spawned", self._cannot_spawn
        yield Cause.ASKED, "abort", lambda w: self._old(w, OldEvent.ABORT_ASKED)
        yield Cause.ASKED, "rollback", lambda w: self._old(w, OldEvent.ROLLBACK_ASKED)
        yield Cause.ASKED, "old is asked to stop", self._old_is_stopped
        if world.old is OldState.PROBATION:  # the runtime asks for the health of the new one then
            yield Cause.FAULT, "the health check fails", lambda w: self._old(w._replace(calm=False), OldEvent.UNHEALTHY)
        if world.session and Notice.NONSENSE not in world.to_new:
            yield (
                Cause.FAULT,
                "old speaks nonsense",
                lambda w: w._replace(calm=False, to_new=(*w.to_new, Notice.NONSENSE)),
            )
        yield Cause.FAULT, "old dies", _old_is_killed

    def _possible_at_new(self, world: World) -> Iterator[tuple[Cause, str, Callable[[World], World]]]:
        if world.to_new:
            yield Cause.DELIVERY, f"new gets {_text(world.to_new[0])}", self._deliver_to_new
            if world.to_new[0] is Kind.COMMITTED and isinstance(world.new, new.State):
                yield Cause.FAULT, "new gets committed, and can't take charge", self._charge_fails
        if world.new in (NewState.ENDED, OldState.ENDED):
            yield Cause.DELIVERY, "new exits", lambda w: _new_dies(w, noticed=True)
            return
        if world.new in (NewState.PREPARING, OldState.STARTING):
            yield Cause.WORK, "new application is ready", self._new_app_ready
        if isinstance(world.new, new.State) and self._deadlines.of_new(world.new) is not None:
            yield Cause.DEADLINE, f"new times out in {world.new.value}", self._new_times_out
        if isinstance(world.new, old.State) and self._deadlines.of_old(world.new) is not None:
            yield Cause.DEADLINE, f"new times out in {world.new.value}", self._new_times_out
        if world.new in (NewState.ROLLED_BACK, NewState.STOPPING, OldState.STOPPING):
            yield Cause.WORK, "new has finished", self._new_drained
        if isinstance(world.new, new.State):
            yield Cause.FAULT, "new application fails", self._new_app_fails
        yield Cause.ASKED, "new is asked to stop", self._new_is_stopped
        if world.session and world.known and Notice.NONSENSE not in world.to_old:
            yield (
                Cause.FAULT,
                "new speaks nonsense",
                lambda w: w._replace(calm=False, to_old=(*w.to_old, Notice.NONSENSE)),
            )
        yield Cause.FAULT, "new dies", lambda w: _new_is_killed(w, noticed=True)
        yield Cause.FAULT, "new dies, and that is all old sees", lambda w: _new_is_killed(w, noticed=False)

    def _old_times_out(self, world: World) -> World:
        expected = world.old in (OldState.PROBATION, OldState.DRAINING, OldState.STOPPING)
        return self._old(world._replace(calm=world.calm and expected), OldEvent.TIMED_OUT)

    def _cannot_spawn(self, world: World) -> World:
        state, effects = self._old_table[OldState.SERVING, OldEvent.UPGRADE_ASKED]
        self._old_did.extend(effects)
        return self._old(world._replace(asked=True, calm=False, old=state), OldEvent.CANNOT_SPAWN)

    def _old_is_stopped(self, world: World) -> World:
        after = self._old(world, OldEvent.STOP_ASKED)
        if after.old is world.old:  # it finishes already
            return after
        return after._replace(old_stopped=True, excused=True, calm=False)

    def _new_is_stopped(self, world: World) -> World:
        safe = world.old in _OLD_ACCEPTS_ALREADY and isinstance(world.new, new.State)
        return self._new_event(
            world._replace(new_stopped=True, excused=world.excused or not safe, calm=False),
            NewEvent.STOP_ASKED,
            OldEvent.STOP_ASKED,
        )

    def _new_app_ready(self, world: World) -> World:
        return self._new_event(world, NewEvent.APP_READY, OldEvent.APP_READY)

    def _new_app_fails(self, world: World) -> World:
        alone = not world.old_can_serve and world.new not in _GIVEN_UP
        return self._new_event(world._replace(excused=world.excused or alone, calm=False), NewEvent.APP_FAILED, None)

    def _charge_fails(self, world: World) -> World:
        world = world._replace(to_new=world.to_new[1:], excused=world.excused or not world.old_can_serve, calm=False)
        return self._new_event(world, NewEvent.CHARGE_FAILED, None)

    def _new_times_out(self, world: World) -> World:
        alone = not world.old_can_serve and isinstance(world.new, new.State)
        return self._new_event(
            world._replace(excused=world.excused or alone, calm=False), NewEvent.TIMED_OUT, OldEvent.TIMED_OUT
        )

    def _new_drained(self, world: World) -> World:
        return self._new_event(world, NewEvent.DRAINED, OldEvent.DRAINED)

    # What arrives.

    def _deliver_to_old(self, world: World) -> World:
        item = world.to_old[0]
        world = world._replace(to_old=world.to_old[1:])
        if item is Notice.LOST and world.old is OldState.STOPPING:
            world = world._replace(known=False)
        if item is Kind.STOPPING and world.old in (OldState.CUTOVER, OldState.PROBATION, OldState.COMMITTING):
            world = world._replace(old_stopped=True, excused=True)
        return self._old(world, _AT_OLD[item])

    def _deliver_to_new(self, world: World) -> World:
        item = world.to_new[0]
        world = world._replace(to_new=world.to_new[1:])
        if item is Notice.CLOSED and world.old is None:  # the death counts, of which the pidfd will tell
            return world
        if item in (Kind.STOP, Notice.TERM):
            world = world._replace(new_stopped=True)
        if item is Kind.DESCRIPTORS:
            if world.new is not NewState.ADOPTING:
                return self._new_event(world, NewEvent.OLD_NONSENSE, None)
            return self._new_event(_send_to_old(world, Kind.ADOPTED), NewEvent.ADOPTED, None)
        # The generation before may tell the one in charge to stop, and nothing else.
        stop = OldEvent.STOP_ASKED if item in (Kind.STOP, Notice.TERM) else None
        return self._new_event(world, _AT_NEW[item], stop)

    # What is done about it.

    def _old(self, world: World, event: old.Event) -> World:
        if world.old is None:
            return world
        before = world.old
        state, effects = self._old_table.get((before, event), (before, ()))
        self._old_did.extend(effects)
        world = world._replace(old=state)
        for effect in effects:
            world = self._old_does(world, effect, event, before)
        return world

    def _old_does(self, world: World, effect: old.Effect, event: old.Event, before: old.State) -> World:
        match effect:
            case OldEffect.ACCEPT:
                return world._replace(old_accepts=True, began=True)
            case OldEffect.PAUSE | OldEffect.DRAIN:
                return world._replace(old_accepts=False)
            case OldEffect.SPAWN:
                return world._replace(new=NewState.CALLING, known=True, to_old=(Kind.HELLO,))
            case OldEffect.DIAL:
                if world.new is None or world.new in (NewState.ENDED, NewState.STOPPING):  # nobody listens there
                    return self._old(world, OldEvent.NEW_NONSENSE)
                return world._replace(session=True, to_new=(*world.to_new, Kind.DIALLING, Kind.DESCRIPTORS))
            case OldEffect.END_NEW | OldEffect.STOP_NEW:
                if world.session:
                    kind = Kind.ROLLBACK if effect is OldEffect.END_NEW else Kind.STOP
                    return world._replace(to_new=(*world.to_new, kind))
                if world.known and world.new is NewState.CALLING:  # afterwards the session is the only way
                    return world._replace(to_new=(*world.to_new, Notice.TERM))
                return world
            case OldEffect.KILL_NEW:
                return _new_dies(world, noticed=True) if world.known and world.new is not None else world
            case OldEffect.REPORT:
                to_new = (*world.to_new, Notice.CLOSED) if world.session and world.new is not None else world.to_new
                hello = tuple(item for item in world.to_old if item is Kind.HELLO)  # comes over a connection of its own
                return world._replace(known=False, session=False, to_old=hello, to_new=to_new)
            case OldEffect.REFUSE:
                if event is OldEvent.HELLO and world.new is not None:
                    return world._replace(to_new=(*world.to_new, Kind.REFUSED))
                return world
            case OldEffect.END:
                if before is OldState.STOPPING and world.known and world.new is not None:
                    world = _new_dies(world, noticed=False)
                unread = world.session or Kind.HELLO in world.to_old
                to_new = (*world.to_new, Notice.CLOSED) if unread and world.new is not None else world.to_new
                return world._replace(old_accepts=False, session=False, to_old=(), to_new=to_new)
            case OldEffect.COMMIT:
                return world
            case _:
                return world._replace(to_new=(*world.to_new, _OLD_SENDS[effect])) if world.session else world

    def _new_event(self, world: World, as_new: new.Event, in_charge: old.Event | None) -> World:
        """An event of the new one: `as_new` while it takes over, `in_charge` once it has."""
        if isinstance(world.new, old.State):
            return world if in_charge is None else self._promoted(world, in_charge)
        if world.new is None:
            return world
        state, effects = self._new_table.get((world.new, as_new), (world.new, ()))
        self._new_did.extend(effects)
        world = world._replace(new=state)
        for effect in effects:
            world = _new_does(world, effect)
        return world

    def _promoted(self, world: World, event: old.Event) -> World:
        """An event of the new one, which is in charge; it has no new one of its own here."""
        assert isinstance(world.new, old.State)
        state, effects = self._old_table.get((world.new, event), (world.new, ()))
        self._new_did.extend(effects)
        world = world._replace(new=state)
        for effect in effects:
            match effect:
                case OldEffect.ACCEPT:
                    world = world._replace(new_accepts=True)
                case OldEffect.DRAIN:
                    world = world._replace(new_accepts=False)
                case OldEffect.END:
                    world = world._replace(new_accepts=False, session=False, to_new=())
        return world


def _new_does(world: World, effect: new.Effect) -> World:
    match effect:
        case NewEffect.ACCEPT:
            return world._replace(new_accepts=True)
        case NewEffect.DRAIN:
            return world._replace(new_accepts=False)
        case NewEffect.PROMOTE:
            return world._replace(new=OldState.SERVING if world.new is NewState.IN_CHARGE else OldState.STARTING)
        case NewEffect.END:
            to_old = (*world.to_old, Notice.CLOSED) if world.session and world.old is not None else world.to_old
            return world._replace(new_accepts=False, session=False, to_new=(), to_old=to_old)
        case NewEffect.READ_DATAGRAMS | NewEffect.TAKE_CHARGE | NewEffect.FAIL:
            return world
        case _:
            return _send_to_old(world, _NEW_SENDS[effect])


def _send_to_old(world: World, kind: Kind) -> World:
    return world._replace(to_old=(*world.to_old, kind)) if world.session and world.old is not None else world


def _old_dies(world: World) -> World:
    to_new = (*world.to_new, Notice.LOST) if world.new is not None else ()
    return world._replace(old=None, old_accepts=False, session=False, known=False, to_old=(), to_new=to_new)


def _old_is_killed(world: World) -> World:
    return _old_dies(world._replace(excused=world.excused or not world.new_can_serve, calm=False))


def _new_dies(world: World, *, noticed: bool) -> World:
    """The new one is dead; `noticed`: the end of file is seen before the death is."""
    to_old = world.to_old
    if world.old is not None and world.known:
        to_old = (*to_old, Notice.CLOSED, Notice.LOST) if noticed and world.session else (*to_old, Notice.LOST)
    return world._replace(new=None, new_accepts=False, session=False, to_new=(), to_old=to_old)


def _new_is_killed(world: World, *, noticed: bool) -> World:
    in_charge = isinstance(world.new, old.State)
    alone = (in_charge or world.new not in _GIVEN_UP) and not world.old_can_serve
    return _new_dies(world._replace(excused=world.excused or alone, calm=False), noticed=noticed)


def _cut_for_both(world: World) -> World:
    return world._replace(
        calm=False,
        cut=True,
        session=False,
        to_old=(*world.to_old, Notice.CLOSED),
        to_new=(*world.to_new, Notice.CLOSED),
    )


def _cut_by_new(world: World) -> World:
    told = tuple(item for item in world.to_new if isinstance(item, Notice))
    return world._replace(calm=False, cut=True, session=False, to_old=(*world.to_old, Notice.CLOSED), to_new=told)


def _cut_by_old(world: World) -> World:
    hello = tuple(item for item in world.to_old if item is Kind.HELLO)
    return world._replace(
        calm=False, cut=True, deaf=True, session=False, to_old=hello, to_new=(*world.to_new, Notice.CLOSED)
    )


def _text(item: Item) -> str:
    return str(item.value)


_ONE_FAULT: Final = (Cause.DELIVERY, Cause.DEADLINE, Cause.WORK)


class Explored:
    """Everything that can be reached from the start, with the shortest way there.

    With `until` the search looks only for an edge for which that is true: it ends at the first one, which is `found`
    then. It follows one fault, and not what comes of two.
    """

    def __init__(self, pair: Pair, until: Callable[[Edge], bool] | None = None) -> None:
        collects = gc.isenabled()
        gc.disable()  # half of the time would go into looking for cycles, and there are none
        try:
            self._search(pair, until)
        finally:
            if collects:
                gc.enable()

    def _search(self, pair: Pair, until: Callable[[Edge], bool] | None) -> None:
        start = World()
        self._first: dict[World, Edge | None] = {start: None}
        self.edges: dict[World, Sequence[Edge]] = {}
        self.found: Edge | None = None
        waiting = collections.deque([start])
        while waiting and not self.found:
            world = waiting.popleft()
            self.edges[world] = edges = tuple(
                edge for edge in pair.edges(world) if not until or world.calm or edge.cause in _ONE_FAULT
            )
            for edge in edges:
                if edge.target not in self._first:
                    self._first[edge.target] = edge
                    waiting.append(edge.target)
                if until and until(edge):
                    self.found = edge
                    break

    @property
    def worlds(self) -> Sequence[World]:
        """All worlds, those first that are reached with the fewest events."""
        return list(self._first)

    def every_edge(self) -> Iterator[Edge]:
        """All edges, in the order of the worlds they start from."""
        for edges in self.edges.values():
            yield from edges

    def trace(self, world: World) -> str:
        """How a world is reached, for a failure's message."""
        lines = [str(world)]
        edge = self._first[world]
        while edge:
            lines.append(str(edge))
            edge = self._first[edge.source]
        return "\n" + "\n".join(f"{number:2}. {line}" for number, line in enumerate(reversed(lines), 1))
