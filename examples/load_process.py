"""`load.py` as a process of its own, which a demonstration or a test steers and reads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ENDLESS = 3600.0  # seconds; the load ends when its standard input is closed


class Load:
    """Load on one URL, until `stop`; a context manager that ends the process on every path."""

    def __init__(self, url: str, *options: str) -> None:
        """Start it; `options` are those of load.py."""
        command = [sys.executable, str(Path(__file__).with_name("load.py")), url]
        self._process = subprocess.Popen(
            [*command, *options, "--until-eof", "--duration", str(ENDLESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.failures: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self.ended = 0  # requests, to the hundred
        self._events: dict[str, dict[str, Any]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_served(self, timeout: float = 15.0) -> None:
        """Wait for the first right answer. Raises TimeoutError."""
        self._wait_for("started", timeout)

    def mark(self, name: str, timeout: float = 15.0) -> dict[str, Any]:
        """The figures since the last mark: finished, failed, slowest, p50, p99 (seconds)."""
        assert self._process.stdin
        self._events.pop(f"interval {name}", None)
        self._process.stdin.write(f"mark {name}\n")
        self._process.stdin.flush()
        return self._wait_for(f"interval {name}", timeout)

    def wait_for_requests(self, count: int, timeout: float = 300.0) -> None:
        """Wait until so many requests (to the hundred) have ended since the start. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended >= count, timeout):
                raise TimeoutError(f"load.py: only {self.ended} of {count} requests in {timeout:g} s")

    def stop(self, timeout: float = 60.0) -> dict[str, Any]:
        """Let open requests finish; returns the report. Harmless twice."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()
        return self._events.get("report", {})

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            event = json.loads(line)
            key = f"interval {event['name']}" if event["event"] == "interval" else event["event"]
            with self._changed:
                self._events[key] = event
                self.ended = event.get("ended", self.ended)
                if key == "failure":
                    self.failures.append(event)
                self._changed.notify_all()

    def _wait_for(self, key: str, timeout: float) -> dict[str, Any]:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._events, timeout):
                raise TimeoutError(f"load.py: no {key} in {timeout:g} s")
            return self._events[key]
