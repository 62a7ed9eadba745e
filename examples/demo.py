"""`make demo`: a server is upgraded under load, ten times, and twice to a version that fails.

Prints what each upgrade cost the clients, and ends with status 1 if a request failed that no killed process had
accepted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from load_process import Load

EXAMPLES = Path(__file__).parent
UPGRADES = 10
PROBATION = 0.5  # seconds
STEADY = 200  # requests before each upgrade, to compare with
LOAD = ("--rate", "300", "--keep-alive", "20", "--gap", "0.5", "--slow", "5", "--slow-lines", "10")
SHOWN = ("spawn", "ready", "cutover", "commit", "rollback")  # steps, with milliseconds since the request
BROKEN = ("reset", "closed", "cut")  # what a client sees of a process that is killed


class Demo:
    """One service under load, and what its upgrades cost."""

    def __init__(self, load: Load, port: int, environment: dict[str, str]) -> None:
        self.load = load
        self.options = ["--name", "demo", "--listen", f"tcp://127.0.0.1:{port}"]
        self.environment = environment
        self.excused = 0
        self.wrong: list[str] = []

    def upgrade(self, label: str, expected: int, *arguments: str) -> None:
        """Run `handoff upgrade`, and print a line."""
        self.load.mark(f"between {label}")
        self.load.wait_for_requests(self.load.ended + STEADY)
        before = self.load.mark(f"before {label}")
        failed_before = len(self.load.failures)
        done = subprocess.run(
            [sys.executable, "-m", "handoff", "upgrade", "demo", "--json", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        during = self.load.mark(f"during {label}")
        record = json.loads(done.stdout or "{}")
        failures = self.load.failures[failed_before:]
        excused = self._excused(record, failures)
        self.excused += excused
        if done.returncode != expected:
            self.wrong.append(f"{label}: exit status {done.returncode} instead of {expected}: {record.get('reason')}")
        if len(failures) > excused:
            self.wrong.append(f"{label}: {len(failures) - excused} requests failed: {failures[:3]}")
        click.echo(_line(label, record, before, during, len(failures)))

    def _excused(self, record: dict[str, Any], failures: Sequence[dict[str, Any]]) -> int:
        """How many failures are connections that the killed process had accepted: never more than it says it had."""
        found = re.search(r"crashing with (\d+) connections open", record.get("last_words", ""))
        broken = [failure for failure in failures if failure["kind"] in BROKEN and failure["connected_at"]]
        return min(len(broken), int(found[1])) if found else 0


def _line(label: str, record: dict[str, Any], before: dict[str, Any], during: dict[str, Any], failed: int) -> str:
    steps = record.get("steps", {})
    told = ", ".join(f"{step} {steps[step] * 1000:.0f}" for step in SHOWN if step in steps)
    slowest = f"slowest {during['slowest'] * 1000:.1f} ms, before {before['slowest'] * 1000:.1f} ms"
    counts = f"{during['finished']} served, {failed} failed"
    reason = f"\n{'':<20}({record['reason']})" if record.get("reason") else ""
    return f"{label:<20}{record.get('result', '?')}: {told} ms; {counts}; {slowest}{reason}"


def main() -> int:
    """Run the demonstration; returns the exit status."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "HANDOFF_RUNTIME_DIR": directory}
        program = [sys.executable, str(EXAMPLES / "asyncio_http.py")]
        options = ["--name", "demo", "--listen", "tcp://127.0.0.1:0", "--probation", str(PROBATION)]
        server = subprocess.Popen([*program, *options], env=environment, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        try:
            address = server.stdout.readline().split()[-1]  # "generation 1 serves tcp://127.0.0.1:PORT"
            return _run(int(address.rpartition(":")[2]), environment)
        finally:
            _end(environment)
            server.wait(60)
            server.stdout.close()


def _run(port: int, environment: dict[str, str]) -> int:
    click.echo(f"load: {' '.join(LOAD)}")
    with Load(f"http://127.0.0.1:{port}", *LOAD) as load:
        load.wait_until_served()
        demo = Demo(load, port, environment)
        for number in range(1, UPGRADES + 1):
            demo.upgrade(f"upgrade {number}", 0)
        bad = [sys.executable, str(EXAMPLES / "bad_version.py"), *demo.options]
        demo.upgrade("crashes after 1 s", 1, "--probation", "5", "--", *bad, "--crash-after", "1")
        demo.upgrade("never gets ready", 5, "--timeout", "2", "--", *bad)
        report = load.stop()
    unexcused = report["failures"] - demo.excused
    for sentence in demo.wrong:
        click.echo(f"demo: {sentence}", err=True)
    click.echo(
        f"total: {report['finished']} requests served, {unexcused} failed, "
        f"{demo.excused} lost with the process that crashed (it had accepted them)"
    )
    return 1 if unexcused or demo.wrong or report["skipped"] else 0


def _end(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "handoff", "status", "demo", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        pid = json.loads(done.stdout)["pid"]
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main())
