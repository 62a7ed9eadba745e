"""Hot restart for network services: listening sockets move from a running server to its next version.

`Service` is for threads and plain code, `handoff.aio.Service` for asyncio.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"handoff works on Linux only (SCM_RIGHTS, pidfds, /proc); this is {sys.platform}")

from handoff.core.errors import (
    AlreadyRunning,
    BadAddress,
    BadDirectory,
    CannotListen,
    HandoffError,
    RolledBack,
)
from handoff.core.record import Record, Step
from handoff.core.version import VERSION
from handoff.runtime.connections import Connection
from handoff.runtime.listener import Listener
from handoff.runtime.service import Service

__version__ = VERSION

__all__ = [
    "AlreadyRunning",
    "BadAddress",
    "BadDirectory",
    "CannotListen",
    "Connection",
    "HandoffError",
    "Listener",
    "Record",
    "RolledBack",
    "Service",
    "Step",
    "__version__",
]
