"""The end of a generation: what it had open, what ended by itself, what has to be closed."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Drain:
    """One drain, from its start on. Times are of one monotonic clock, in seconds."""

    began: float
    open: int  # connections when it began
    grace: float  # how long an idle connection is kept
    timeout: float  # after which what is left is closed

    @property
    def idle_until(self) -> float:
        """When connections that are idle are closed: not later than everything else."""
        return self.began + min(self.grace, self.timeout)

    @property
    def until(self) -> float:
        """When everything that is left is closed."""
        return self.began + self.timeout

    def finished(self, left: int) -> int:
        """How many connections have ended by themselves when `left` are still open.

        A connection that was accepted just before the drain may be counted late: never less than 0.
        """
        return max(0, self.open - left)
