"""Why the generation in charge refuses a request: a code for programs, a sentence for people."""

from __future__ import annotations

from handoff.core.messages import Kind
from handoff.core.old import BEFORE_CUTOVER, State

UPGRADING = "upgrading"
DRAINING = "draining"


def refusal(asked: Kind, state: State, service: str, generation: int) -> tuple[str, str]:
    """(code, sentence) for a request that `state` does not allow.

    The codes: starting, running, upgrading, no-upgrade, too-early, too-late, draining, stopping.
    """
    me = f"generation {generation}"
    match state:
        case State.STARTING:
            return "starting", f"{me} is still starting; ask again once it serves"
        case State.DRAINING | State.ENDED:
            return DRAINING, f"{me} has handed the service over and only finishes its connections; ask again"
        case State.STOPPING:
            return "stopping", f"{me} was asked to stop and only finishes its connections; start the service anew"
        case State.SERVING if asked is Kind.HELLO:
            return "running", f"{me} is running, and did not start the one that called"
        case State.SERVING:
            return "no-upgrade", f"no upgrade is running that could be ended; {me} serves"
    ending = state in (State.COMMITTING, State.ROLLING_BACK, State.KILLING)
    if asked in (Kind.UPGRADE, Kind.HELLO):
        way_out = f"`handoff {'abort' if state in BEFORE_CUTOVER else 'rollback'} {service}`"
        return UPGRADING, (
            f"{me} is already being replaced ({state.value}); wait for it"
            + ("" if ending else f", or end it with {way_out}")
        )
    if ending:
        return "too-late", f"the upgrade is already ending ({state.value}); see `handoff status {service}`"
    if asked is Kind.ABORT:
        return "too-late", f"the new generation accepts already; take it back with `handoff rollback {service}`"
    return "too-early", f"the new generation does not accept yet; end the upgrade with `handoff abort {service}`"
