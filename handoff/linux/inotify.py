"""Waiting for names to come and go in a directory (inotify(7)); the standard library has no binding."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Final

_IN_CLOEXEC: Final = os.O_CLOEXEC
_IN_NONBLOCK: Final = os.O_NONBLOCK
_IN_CHANGES: Final = 0x00000040 | 0x00000080 | 0x00000100 | 0x00000200  # moved from, moved to, created, deleted
_ROOM: Final = 65536  # bytes; an event has 16 and its name, at most 255
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches directories for names that come or go; owns a descriptor, readable when something has changed."""

    def __init__(self, *directories: str) -> None:
        """Begin to watch. Raises OSError, also for a directory that isn't there."""
        self.descriptor = _checked(_libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK))
        try:
            for directory in directories:
                _checked(_libc.inotify_add_watch(self.descriptor, os.fsencode(directory), _IN_CHANGES))
        except BaseException:
            self.close()
            raise

    def clear(self) -> None:
        """Take note of what has changed: readable again at the next change. Does not block."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.descriptor, _ROOM):
                pass

    def close(self) -> None:
        """Close the descriptor. Harmless twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
