"""One poll loop for one thread: descriptors, deadlines, and calls that other threads post."""

from __future__ import annotations

import collections
import os
import select
import time
from collections.abc import Callable
from typing import Final

READ: Final = select.POLLIN
WRITE: Final = select.POLLOUT
_NEVER: Final = 1e9  # seconds, 30 years
_LONGEST: Final = 3600.0  # seconds in one poll(2), which counts milliseconds in an int; then it is called again


class Timer:
    """A call at a moment; `cancel` takes it back."""

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Make it never happen; harmless afterwards."""
        self.call = None


class Loop:
    """Waits for borrowed descriptors and deadlines, and calls what was registered for them.

    Everything but `post` belongs to the thread that runs the loop. Owns an eventfd, closed when `run` returns.
    Times are those of time.monotonic().
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._fresh: set[int] = set()  # watched since the last poll(2): it can't have told anything of them
        self._timers: list[Timer] = []
        self._posted: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._running = True
        self.watch(self._wake, READ, self._take_posted)

    def watch(self, descriptor: int, events: int, call: Callable[[], None]) -> None:
        """Call whenever one of `events`, an error or a hang-up is there; replaces an earlier call."""
        self._poll.register(descriptor, events)
        if descriptor not in self._calls:
            self._fresh.add(descriptor)
        self._calls[descriptor] = call

    def forget(self, descriptor: int) -> None:
        """Stop watching; must come before the descriptor is closed. Harmless for one that isn't watched."""
        if self._calls.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once in `seconds`."""
        timer = Timer(time.monotonic() + min(seconds, _NEVER), call)  # an int may be too large for a float
        self._timers.append(timer)
        return timer

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop's thread call; from any thread and from signal handlers (it takes no lock)."""
        self._posted.append(call)
        try:
            os.eventfd_write(self._wake, 1)
        except (OSError, ValueError):  # the loop has ended (ValueError: -1): nobody is there to care
            self._posted.clear()

    def end(self) -> None:
        """Let `run` return once the present round is done."""
        self._running = False

    def run(self) -> None:
        """Run until `end`."""
        try:
            while self._running:
                self._round()
        finally:
            descriptor, self._wake = self._wake, -1
            os.close(descriptor)

    def abandon(self) -> None:
        """In a forked child: what it posts must not wake the parent."""
        descriptor, self._wake = self._wake, -1
        os.close(descriptor)

    def _round(self) -> None:
        self._timers = [timer for timer in self._timers if timer.call]
        first = min((timer.at for timer in self._timers), default=None)
        # poll(2) counts in whole milliseconds: one more, so that the deadline is over when it returns.
        left = None if first is None else min(first - time.monotonic(), _LONGEST)
        timeout = None if left is None else max(0, int(left * 1000) + 1)
        self._fresh.clear()
        for descriptor, _ in self._poll.poll(timeout):
            # A call of this round may have closed a descriptor whose number another one then got.
            if descriptor not in self._fresh and (call := self._calls.get(descriptor)):
                call()
        now = time.monotonic()
        for timer in self._timers:
            if timer.at <= now and (due := timer.call):
                timer.cancel()
                due()

    def _take_posted(self) -> None:
        os.eventfd_read(self._wake)
        while self._posted:
            self._posted.popleft()()
