"""Reads the expected outcomes of a role as they are written down in its test.

A block a state: its name, then lines `EVENT ... -> STATE: EFFECT, EFFECT` (no effects: `-`), `refused: EVENT ...`
(nothing but REFUSE) and `ignored: EVENT ...` (nothing at all). `#` begins a comment.
"""

from __future__ import annotations

import enum
from typing import TypeVar

StateT = TypeVar("StateT", bound=enum.Enum)
EventT = TypeVar("EventT", bound=enum.Enum)
EffectT = TypeVar("EffectT", bound=enum.Enum)


def read(
    text: str, states: type[StateT], events: type[EventT], effects: type[EffectT]
) -> dict[tuple[StateT, EventT], tuple[StateT, tuple[EffectT, ...]]]:
    """Outcomes by state and event; an outcome that is written down twice is an error of the test's."""
    outcomes: dict[tuple[StateT, EventT], tuple[StateT, tuple[EffectT, ...]]] = {}
    state: StateT | None = None
    for line in text.splitlines():
        line = line.partition("#")[0].rstrip()
        if not line:
            continue
        if not line.startswith(" "):
            state = states[line]
            continue
        assert state is not None, f"no state for {line!r}"
        names, target, done = _row(line.strip(), state.name)
        for name in names:
            pair = state, events[name]
            assert pair not in outcomes, f"{state.name} x {name} is there twice"
            outcomes[pair] = states[target], tuple(effects[effect] for effect in done)
    return outcomes


def _row(line: str, state: str) -> tuple[list[str], str, list[str]]:
    """(events, next state, effects) of one line."""
    word, colon, rest = line.partition(": ")
    match word:
        case "ignored":
            return rest.split(), state, []
        case "refused":
            return rest.split(), state, ["REFUSE"]
    names, arrow, target = word.partition(" -> ")
    assert colon and arrow, f"not understood: {line!r}"
    return names.split(), target, [] if rest == "-" else rest.split(", ")
