"""Deadlines: each state that waits for somebody has one."""

from __future__ import annotations

import math

import attrs
import pytest

from handoff.core import new, old
from handoff.core.deadlines import Deadlines

# Each deadline another number, so that a mistaken one is seen.
DEADLINES = Deadlines(ready=1, probation=2, drain=3, grace=4, answer=5, adopt=6, verdict=7, request=8, leave=9)
OF_OLD = {
    old.State.STARTING: None,
    old.State.SERVING: None,
    old.State.SPAWNING: 1,
    old.State.ADOPTING: 6,
    old.State.PREPARING: 1,
    old.State.CUTOVER: 5,
    old.State.PROBATION: 2,
    old.State.COMMITTING: 5,
    old.State.ROLLING_BACK: 5,
    old.State.KILLING: 5,
    old.State.DRAINING: 3,
    old.State.STOPPING: 3,
    old.State.ENDED: None,
}
OF_NEW = {
    new.State.CALLING: 5,
    new.State.ADOPTING: 6,
    new.State.PREPARING: None,  # the old one's `ready` bounds it
    new.State.READY: 5,
    new.State.CUTOVER: None,  # who accepts does not stop because the old one is silent
    new.State.PROBATION: None,
    new.State.IN_CHARGE: None,
    new.State.ALONE: None,
    new.State.ROLLED_BACK: 3,
    new.State.STOPPING: 3,
    new.State.ENDED: None,
}


@pytest.mark.parametrize("state", old.State)
def test_of_old(state: old.State) -> None:
    """Each state of the generation in charge has the deadline of its step."""
    assert DEADLINES.of_old(state) == OF_OLD[state]


@pytest.mark.parametrize("state", new.State)
def test_of_new(state: new.State) -> None:
    """Each state of a new generation has the deadline of its step."""
    assert DEADLINES.of_new(state) == OF_NEW[state]


@pytest.mark.parametrize("state", sorted(old.UPGRADING))
def test_deadline_leads_out_of_every_step(state: old.State) -> None:
    """No state of an upgrade outlasts its deadline."""
    role = old.OldRole(state)

    role.handle(old.Event.TIMED_OUT)

    assert role.state is not state


@pytest.mark.parametrize("state", [state for state, seconds in OF_NEW.items() if seconds is not None])
def test_deadline_ends_a_new_one(state: new.State) -> None:
    """A new generation whose deadline passes ends."""
    role = new.NewRole(state)

    role.handle(new.Event.TIMED_OUT)

    assert role.state is new.State.ENDED


@pytest.mark.parametrize("name", list(attrs.fields_dict(Deadlines)))
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, "5", None, 10**20])
def test_refused(name: str, value: object) -> None:
    """What is no time is refused by name."""
    with pytest.raises(ValueError, match=f"^{name} is {value}; it takes seconds, from 0 to 1e\\+09$"):
        Deadlines(**{name: value})  # type: ignore[arg-type]  # what a caller without types may do


def test_zero_is_a_time() -> None:
    """Probation may be left out, and a drain may close everything at once."""
    deadlines = Deadlines(probation=0, drain=0)

    assert (deadlines.probation, deadlines.drain) == (0, 0)
