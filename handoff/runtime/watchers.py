"""Calls that are told of a change, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Watchers:
    """A set of calls; once `remove` has returned, the removed one is not running and is never called again."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.RLock()  # a finaliser may tell while this very thread adds

    def add(self, call: Callable[[], None]) -> None:
        """Call at each change, in the thread that makes it; the call must not block."""
        with self._lock:
            self._calls.append(call)

    def remove(self, call: Callable[[], None]) -> None:
        """Stop calling; a call that is not there is an error of the caller's."""
        with self._lock:
            self._calls.remove(call)

    def tell(self) -> None:
        """Call all of them."""
        with self._lock:
            for call in list(self._calls):
                call()
