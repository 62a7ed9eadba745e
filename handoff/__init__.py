"""Hot restart for network services: listening sockets move from a running server to its next version.

`Service` is for threads and plain code, `handoff.aio.Service` for asyncio.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform != "linux":
    raise ImportError(f"handoff works on Linux only (SCM_RIGHTS, pidfds, /proc); this is {sys.platform}")

from handoff.core.version import VERSION

if TYPE_CHECKING:
    from handoff.core.errors import (
        AlreadyRunning,
        BadAddress,
        BadDirectory,
        CannotListen,
        HandoffError,
        NoAnswer,
        Refused,
        RolledBack,
    )
    from handoff.core.record import Record, Step
    from handoff.runtime.connections import Connection
    from handoff.runtime.listener import Listener
    from handoff.runtime.service import Service

__version__ = VERSION

# Where each public name lives. They are imported when they are used: the command needs no Service, a service no
# command, and each pays for its own only.
_HOMES = {
    "AlreadyRunning": "handoff.core.errors",
    "BadAddress": "handoff.core.errors",
    "BadDirectory": "handoff.core.errors",
    "CannotListen": "handoff.core.errors",
    "Connection": "handoff.runtime.connections",
    "HandoffError": "handoff.core.errors",
    "Listener": "handoff.runtime.listener",
    "NoAnswer": "handoff.core.errors",
    "Record": "handoff.core.record",
    "Refused": "handoff.core.errors",
    "RolledBack": "handoff.core.errors",
    "Service": "handoff.runtime.service",
    "Step": "handoff.core.record",
}

__all__ = [
    "AlreadyRunning",
    "BadAddress",
    "BadDirectory",
    "CannotListen",
    "Connection",
    "HandoffError",
    "Listener",
    "NoAnswer",
    "Record",
    "Refused",
    "RolledBack",
    "Service",
    "Step",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
