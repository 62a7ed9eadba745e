"""A `handoff` command that runs while a test does something else, and how a test waits for what it writes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from tests.programs import PATIENCE

HANDOFF = (sys.executable, "-m", "handoff")


class Command:
    """A started command; a context manager that leaves no process and no descriptor behind."""

    def __init__(self, *arguments: str, stderr: int | None = None, **environment: str) -> None:
        """Start `handoff` with arguments; `stderr`, borrowed, takes its errors instead of a pipe."""
        reading, writing = os.pipe() if stderr is None else (-1, stderr)
        self._reading = reading
        try:
            self.process = subprocess.Popen(
                [*HANDOFF, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=writing,
                env={**os.environ, **environment},
            )
        finally:
            if stderr is None:
                os.close(writing)
        self.stderr = ""

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        if self._reading >= 0:
            os.close(self._reading)

    def wait_for(self, text: str) -> None:
        """Wait until `text` stands in what it has written to its standard error."""
        while text not in self.stderr:
            assert self._read(), f"no {text!r} came; it wrote:\n{self.stderr}"

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Wait for its end; (exit status, standard output). The errors are in `stderr` then."""
        while self._reading >= 0 and self._read():
            pass
        output, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output.decode()

    def _read(self) -> bool:
        piece = read_soon(self._reading, self.stderr)
        self.stderr += piece
        return bool(piece)


def read_soon(descriptor: int, before: str = "") -> str:
    """What is written there next; "" at the end of file. Fails the test when nothing comes."""
    ready, _, _ = select.select([descriptor], [], [], PATIENCE)
    assert ready, f"nothing was written in {PATIENCE:g} s, after:\n{before}"
    return os.read(descriptor, 65536).decode(errors="replace")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Ask until it holds; only for what no descriptor tells of, as another process's memory or its control socket."""
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, f"{what}: not in {PATIENCE:g} s"
        select.select([], [], [], 0.01)


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until every thread has stopped: the first one has to run for that."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _states(pid) == {"T"}, f"pid {pid} stopped")


def _states(pid: int) -> set[str]:
    states = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/stat") as stat:
            states.add(stat.read().rpartition(")")[2].split()[0])
    return states
