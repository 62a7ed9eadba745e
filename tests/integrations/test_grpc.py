"""grpc.aio, which can't be given a socket, behind a relay."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import PATIENCE, Programs

SERVER = Path(__file__).with_name("server.py")
CALLS = Path(__file__).with_name("grpc_calls.py")
MORE = 50  # calls that a generation answers before the next step


class Calls:
    """Calls in a process of their own; a context manager that ends them."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, str(CALLS), f"127.0.0.1:{port}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.outcomes: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.outcomes.update(self._process.communicate(timeout=2 * PATIENCE)[0].splitlines())

    def wait_for(self, generation: int) -> None:
        """Wait until that generation has answered some more calls."""
        assert self._process.stdout
        wanted = self.outcomes[str(generation)] + MORE
        while self.outcomes[str(generation)] < wanted:
            line = self._process.stdout.readline()
            assert line, "the calls have ended"
            self.outcomes[line.strip()] += 1


@pytest.mark.load
@pytest.mark.timeout(60)
def test_three_upgrades_and_a_rollback(programs: Programs) -> None:
    """No call fails over three upgrades and a rollback."""
    port = programs.serve(SERVER, "grpc")

    with Calls(port) as calls:
        calls.wait_for(1)
        for generation in (2, 3, 4):
            programs.upgrade("web", "--probation", "0.3")
            calls.wait_for(generation)
        done = programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60")
        assert done.returncode == 0, done.stderr
        calls.wait_for(5)
        assert programs.handoff("rollback", "web").returncode == 0
        calls.wait_for(4)

    assert set(calls.outcomes) == {"1", "2", "3", "4", "5"}
