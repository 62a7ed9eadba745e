"""How long each step may take: one table, in seconds."""

from __future__ import annotations

from typing import Final

import attrs

from handoff.core import new, old

LONGEST: Final = 1e9  # seconds: 30 years, which every clock and every float takes


def _positive(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 <= value <= LONGEST):
        raise ValueError(f"{attribute.name} is {str(value)[:40]}; it takes seconds, from 0 to {LONGEST:g}")


@attrs.frozen(kw_only=True)
class Deadlines:
    """Seconds for each step of an upgrade. Those that depend on the application are options of `Service` too."""

    ready: float = attrs.field(default=60.0, validator=_positive)  # from the new program's start to its `ready`
    probation: float = attrs.field(default=5.0, validator=_positive)  # how long the new one has to prove itself
    drain: float = attrs.field(default=30.0, validator=_positive)  # to finish open connections
    grace: float = attrs.field(default=5.0, validator=_positive)  # of it, how long an idle connection is kept open
    answer: float = attrs.field(default=5.0, validator=_positive)  # to answer what takes no work: hello, accept, ...
    adopt: float = attrs.field(default=10.0, validator=_positive)  # for all descriptors
    verdict: float = attrs.field(default=1.0, validator=_positive)  # from EOF to the peer's death; later: it lives
    request: float = attrs.field(default=5.0, validator=_positive)  # from a connection to its first request
    leave: float = attrs.field(default=5.0, validator=_positive)  # to leave the Service's context once all is closed

    def of_old(self, state: old.State) -> float | None:
        """Seconds that the generation in charge may spend in `state`; None: as long as it takes."""
        match state:
            case old.State.SPAWNING | old.State.PREPARING:
                return self.ready
            case old.State.ADOPTING:
                return self.adopt
            case old.State.PROBATION:
                return self.probation
            case old.State.CUTOVER | old.State.COMMITTING | old.State.ROLLING_BACK | old.State.KILLING:
                return self.answer
            case old.State.DRAINING | old.State.STOPPING:
                return self.drain
            case _:
                return None

    def of_new(self, state: new.State) -> float | None:
        """Seconds that a new generation may spend in `state`; None: as long as the old one says nothing."""
        match state:
            case new.State.CALLING | new.State.READY:
                return self.answer
            case new.State.ADOPTING:
                return self.adopt
            case new.State.ROLLED_BACK | new.State.STOPPING:
                return self.drain
            case _:
                return None
