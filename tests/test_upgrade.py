"""Upgrades of the examples: real processes, real sockets, the real command."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.programs import Programs, get, wait_for_end

EXAMPLE = pytest.mark.parametrize("example", ["threaded", "asyncio_http"])


@EXAMPLE
def test_upgrade(programs: Programs, example: str) -> None:
    """After an upgrade the next generation answers, and the one before has ended."""
    port = programs.example(example, "--probation", "0.2")
    assert get(port) == (200, "hello\n", 1)

    record = programs.upgrade("web", "--wait", "exit")

    assert get(port) == (200, "hello\n", 2)
    assert record["result"] == "committed"
    assert list(record["steps"]) == ["spawn", "adopt", "ready", "cutover", "probation", "commit", "drain"]
    assert wait_for_end(programs.started[0].pid)
    assert programs.status("web")["generation"] == 2


@EXAMPLE
def test_stop(programs: Programs, example: str, runtime_dir: Path) -> None:
    """TERM ends the service with status 0; only its number and its command stay in the runtime directory."""
    programs.example(example)

    os.kill(programs.started[0].pid, signal.SIGTERM)

    assert programs.started[0].wait(10) == 0, programs.shown()
    assert sorted(path.name for path in (runtime_dir / "web").iterdir()) == ["generation", "launch-1.json", "lock"]
