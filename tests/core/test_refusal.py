"""Refusals: each state says why it does not do what was asked, and what can be done instead."""

from __future__ import annotations

import pytest

from handoff.core.messages import Kind
from handoff.core.old import Effect, Event, OldRole, State
from handoff.core.refusal import refusal

REQUESTS = {
    Kind.UPGRADE: Event.UPGRADE_ASKED,
    Kind.ABORT: Event.ABORT_ASKED,
    Kind.ROLLBACK: Event.ROLLBACK_ASKED,
    Kind.HELLO: Event.HELLO,
}
REFUSED = [
    (state, asked)
    for state in State
    for asked, event in REQUESTS.items()
    if OldRole(state).handle(event) == (Effect.REFUSE,)
]
# By state: the code for upgrade, abort, rollback and hello; None where it is not refused.
CODES = {
    State.STARTING: ("starting", "starting", "starting", "starting"),
    State.SERVING: (None, "no-upgrade", "no-upgrade", "running"),
    State.SPAWNING: ("upgrading", None, "too-early", None),
    State.ADOPTING: ("upgrading", None, "too-early", "upgrading"),
    State.PREPARING: ("upgrading", None, "too-early", "upgrading"),
    State.CUTOVER: ("upgrading", "too-late", None, "upgrading"),
    State.PROBATION: ("upgrading", "too-late", None, "upgrading"),
    State.COMMITTING: ("upgrading", "too-late", "too-late", "upgrading"),
    State.ROLLING_BACK: ("upgrading", "too-late", "too-late", "upgrading"),
    State.KILLING: ("upgrading", "too-late", "too-late", "upgrading"),
    State.DRAINING: ("draining", "draining", "draining", "draining"),
    State.STOPPING: ("stopping", "stopping", "stopping", "stopping"),
    State.ENDED: ("draining", "draining", "draining", "draining"),
}
# What each sentence tells to do; a request to end what isn't there leaves nothing to do, and says who serves.
NEXT_STEPS = ("ask again", "start the service anew", "wait for it", "`handoff ", "generation 7 serves", "is running")


def test_what_is_refused() -> None:
    """What the table refuses is what has a code here."""
    expected = {
        (state, asked) for state, codes in CODES.items() for asked, code in zip(REQUESTS, codes, strict=True) if code
    }

    assert set(REFUSED) == expected


@pytest.mark.parametrize(("state", "asked"), REFUSED)
def test_refusal(state: State, asked: Kind) -> None:
    """Each refusal has a code for programs and a sentence with the next step for people."""
    code, sentence = refusal(asked, state, "web", 7)

    assert code == CODES[state][list(REQUESTS).index(asked)]
    assert any(step in sentence for step in NEXT_STEPS), sentence
    assert sentence[0].islower() and not sentence.endswith(".")


@pytest.mark.parametrize(("state", "asked"), REFUSED)
def test_advice_is_not_refused(state: State, asked: Kind) -> None:
    """A command that a refusal recommends is one that this state allows."""
    _, sentence = refusal(asked, state, "web", 7)

    for command, event in (("abort", Event.ABORT_ASKED), ("rollback", Event.ROLLBACK_ASKED)):
        if f"`handoff {command} web`" in sentence:
            assert OldRole(state).handle(event) != (Effect.REFUSE,)
