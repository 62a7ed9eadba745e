"""What an application wants to be told of: calls for each step, run one after another outside the control thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from handoff.core.record import Record, Step

Hook = Callable[[Record], object]
_log = logging.getLogger(__name__)


class Hooks:
    """Calls by step. They run in a thread of their own, which exists once there is one; `run_in` changes that."""

    def __init__(self) -> None:
        self._hooks: dict[Step, list[Hook]] = {}
        self._queue: queue.SimpleQueue[tuple[Hook, Record] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._post: Callable[[Hook, Record], None] = self._enqueue

    def run_in(self, post: Callable[[Hook, Record], None]) -> None:
        """Have `post` run the hooks from now on, an event loop's, say; it must not block."""
        self._post = post

    def add(self, step: Step, hook: Hook) -> None:
        """Call `hook(record)` at `step`."""
        self._hooks.setdefault(step, []).append(hook)

    def tell(self, step: Step, record: Record) -> None:
        """Have the step's hooks called, soon; does not block."""
        for hook in self._hooks.get(step, ()):
            self._post(hook, record)

    def finish(self, timeout: float) -> None:
        """Wait until everything that was told has been called; not longer than `timeout` seconds."""
        if self._thread and self._thread is not threading.current_thread():
            self._queue.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _enqueue(self, hook: Hook, record: Record) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="handoff hooks", daemon=True)
            self._thread.start()
        self._queue.put((hook, record))

    def _run(self) -> None:
        while item := self._queue.get():
            call(*item)


def call(hook: Hook, record: Record) -> object:
    """Call one hook, and return what it does; what it raises is logged, it must not end an upgrade."""
    try:
        return hook(record)
    except Exception:  # noqa: BLE001  # the application's code
        _log.exception("%s: a hook failed", record.service)
        return None
