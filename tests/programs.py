"""Real programs for tests: services, commands and their ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 15.0  # seconds for what takes milliseconds on an idle machine


class Programs:
    """Starts programs in a runtime directory; `end` ends what is left of them, upgrades included."""

    def __init__(self, runtime_dir: Path, tmp_path: Path) -> None:
        self.runtime_dir = runtime_dir
        self.tmp_path = tmp_path
        self.started: list[subprocess.Popen[bytes]] = []
        self.errors = tmp_path / "stderr"

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python program; its errors, and those of its upgrades, go to `errors`."""
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )
        self.started.append(process)
        return process

    def serve(self, *command: str | Path, **environment: str) -> int:
        """Start a program that prints a line ending in its address when it serves; returns the port."""
        process = self.start(*command, **environment)
        assert process.stdout
        line = process.stdout.readline().decode()
        assert line, f"it ended with status {process.wait(PATIENCE)} before it served{self.shown()}"
        return int(line.rpartition(":")[2])

    def example(self, name: str, *options: str) -> int:
        """Start an example as the service `web` on a free port; returns the port."""
        return self.serve(EXAMPLES / f"{name}.py", "--name", "web", "--listen", "tcp://127.0.0.1:0", *options)

    def script(self, text: str, name: str = "program.py") -> Path:
        """Write a program."""
        path = self.tmp_path / name
        path.write_text(text)
        return path

    def handoff(self, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "handoff", *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )

    def upgrade(self, name: str, *arguments: str) -> dict[str, Any]:
        """Upgrade, which must succeed; returns the record."""
        done = self.handoff("upgrade", name, "--json", *arguments)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}{self.shown()}"
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    def status(self, name: str) -> dict[str, Any]:
        """What `handoff status` tells."""
        done = self.handoff("status", name, "--json")
        assert done.returncode == 0, done.stderr + self.shown()
        state: dict[str, Any] = json.loads(done.stdout)
        return state

    def shown(self) -> str:
        """What the programs wrote, for a failure's message."""
        return f"\n--- the programs wrote:\n{self.errors.read_text(errors='replace')}" if self.errors.exists() else ""

    def pids(self) -> list[int]:
        """Every living process that was started here, by whomever: its environment names our runtime directory."""
        mark = f"HANDOFF_RUNTIME_DIR={self.runtime_dir}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0") and int(name) != os.getpid():
                    found.append(int(name))
            except OSError:
                continue
        return found

    def end(self) -> list[str]:
        """End everything: TERM, and after a time KILL; returns the commands of those that had to be killed."""
        for pid in self.pids():
            _signal(pid, signal.SIGTERM)
            _signal(pid, signal.SIGCONT)
        stubborn = []
        for pid in self.pids():
            if not wait_for_end(pid, PATIENCE):
                stubborn.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
                _signal(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(PATIENCE)
            if process.stdout:
                process.stdout.close()
        reap()
        return stubborn


def wait_for_end(pid: int, seconds: float = PATIENCE) -> bool:
    """Wait until a process has ended; False if it still lives then."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def reap() -> None:
    """Reap orphans that have become ours."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def get(port: int, path: str = "/echo/hello") -> tuple[int, str, int]:
    """(status, body, generation) of one request on a new connection."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        client.request("GET", path, headers={"Connection": "close"})
        answer = client.getresponse()
        return answer.status, answer.read().decode(), int(answer.headers.get("X-Generation", "0"))
    finally:
        client.close()


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
