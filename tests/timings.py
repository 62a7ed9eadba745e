"""What an upgrade costs beyond the new program's own start: medians, each beside its ratio to a bare Python.

`make timings`. The figures are never a test: machines differ, and are noisy. What is compared is measured in turn,
in one run.
"""

from __future__ import annotations

import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

RUNS = 20
VERSION = Path(__file__).with_name("version.py")
BARE = "pass"
IMPORT = "import handoff; handoff.Service"
# As far as the new program is its own affair: its interpreter, its imports, and handoff's among them.
START = "import argparse, logging, os, signal, sys, threading, handoff; handoff.Service; os.write(1, b'.')"


def wall(code: str) -> float:
    """Seconds of one run of a Python that executes `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def start() -> float:
    """Seconds from the start of a program to the end of its imports."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        return time.perf_counter() - began


def upgrade() -> tuple[float, float, float]:
    """Seconds of one upgrade without probation: from the request to the cutover, to the commit, and the command's."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "handoff", "upgrade", "web", "--json", "--probation", "0"]
    done = subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - began
    steps = json.loads(done.stdout)["steps"]
    return steps["cutover"], steps["commit"], took


def medians(*measures: Callable[[], float]) -> list[float]:
    """The median of each measure, in milliseconds, all of them taken in turn."""
    rows = [[measure() for measure in measures] for _ in range(RUNS)]
    return [statistics.median(column) * 1000 for column in zip(*rows, strict=True)]


def main() -> None:
    """Measure and print."""
    # As installed programs have it, whatever this shell says.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(VERSION.parent.parent / "handoff", quiet=1)
    bare, imported = medians(lambda: wall(BARE), lambda: wall(IMPORT))
    click.echo(
        f"bare Python: {bare:.1f} ms; import handoff: {imported - bare:.1f} ms more, {imported / bare:.1f} times that"
    )
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HANDOFF_RUNTIME_DIR"] = directory
        command = [sys.executable, str(VERSION), "--listen", "tcp://127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
            assert first.stdout
            first.stdout.readline()
            rows = [(start(), *upgrade()) for _ in range(RUNS)]
            state = subprocess.run(
                [sys.executable, "-m", "handoff", "status", "web", "--json"], check=True, capture_output=True
            )
            os.kill(json.loads(state.stdout)["pid"], 15)
    own, cutover, commit, took = (statistics.median(column) * 1000 for column in zip(*rows, strict=True))
    over_cutover = statistics.median(row[1] - row[0] for row in rows) * 1000
    over_command = statistics.median(row[3] - row[0] for row in rows) * 1000
    click.echo(f"the new program's own start, import handoff included: {own:.1f} ms")
    click.echo(f"request to released: {cutover:.1f} ms, {over_cutover:.1f} ms beyond that start")
    click.echo(f"request to committed, no probation: {commit:.1f} ms")
    click.echo(f"the whole command: {took:.1f} ms, {over_command:.1f} ms beyond that start")


if __name__ == "__main__":
    main()
