"""The drain: when what is closed, and what is counted."""

from __future__ import annotations

import pytest

from handoff.core.drain import Drain


def test_idle_connections_are_closed_first() -> None:
    """Idle connections are closed after the grace, everything else at the deadline."""
    drain = Drain(began=100.0, open=3, grace=5.0, timeout=30.0)

    assert (drain.idle_until, drain.until) == (105.0, 130.0)


def test_grace_ends_with_the_drain() -> None:
    """A grace above the deadline ends at the deadline."""
    drain = Drain(began=100.0, open=3, grace=60.0, timeout=30.0)

    assert drain.idle_until == drain.until == 130.0


@pytest.mark.parametrize(("left", "finished"), [(3, 0), (1, 2), (0, 3), (4, 0)])
def test_finished(left: int, finished: int) -> None:
    """What is no longer open has finished; one that was counted late does not make it less than nothing."""
    drain = Drain(began=0.0, open=3, grace=5.0, timeout=30.0)

    assert drain.finished(left) == finished
