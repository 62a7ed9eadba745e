"""The new program's standard error while it has yet to prove itself: passed on, and its last words kept."""

from __future__ import annotations

import collections
import contextlib
import os
import select
from typing import Final

from handoff.runtime.loop import READ, WRITE, Loop

LAST_WORDS: Final = 8192  # bytes kept
_PIECE: Final = select.PIPE_BUF  # a pipe that poll(2) calls writable takes that much without blocking
_MOST_PIECES: Final = 256  # a pipe's greatest size without privileges, 1 MiB (pipe(7)): more is written meanwhile


class Relay:
    """Reads a pipe in a loop's thread and passes on what comes to a borrowed descriptor.

    Takes the reading end. While the other side of `target` takes nothing, nothing is read either: no thread of this
    process ever blocks, and no line is lost. Ends by itself when no writer is left.
    """

    def __init__(self, loop: Loop, pipe: int, target: int) -> None:
        self._loop = loop
        self._pipe = pipe
        self._target = target
        self._kept: collections.deque[bytes] = collections.deque()
        self._size = 0
        loop.watch(pipe, READ, self._readable)

    @property
    def last_words(self) -> str:
        """The end of what was written, with what still lies in the pipe."""
        self._read_rest()
        return b"".join(self._kept)[-LAST_WORDS:].decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Pass on what lies in the pipe, as far as that goes without blocking, and close it. Harmless twice."""
        if self._pipe < 0:
            return
        self._read_rest()
        self._loop.forget(self._target)
        self._loop.forget(self._pipe)
        os.close(self._pipe)
        self._pipe = -1

    def _read_rest(self) -> None:
        for _ in range(_MOST_PIECES):
            if self._pipe < 0 or not (_ready(self._pipe, READ) and _ready(self._target, WRITE) and self._pass_on()):
                return

    def _readable(self) -> None:
        if not _ready(self._target, WRITE):
            self._loop.forget(self._pipe)
            self._loop.watch(self._target, WRITE, self._writable)
        elif not self._pass_on():
            self.close()

    def _writable(self) -> None:
        self._loop.forget(self._target)
        self._loop.watch(self._pipe, READ, self._readable)

    def _pass_on(self) -> bool:
        """Move one piece; False at end of file."""
        piece = os.read(self._pipe, _PIECE)
        if not piece:
            return False
        self._kept.append(piece)
        self._size += len(piece)
        while self._size - len(self._kept[0]) >= LAST_WORDS:
            self._size -= len(self._kept.popleft())
        with contextlib.suppress(OSError):  # nobody reads our standard error: no reason to fail an upgrade
            os.write(self._target, piece)
        return True


def _ready(descriptor: int, events: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(0))
