"""What the clients of each framework notice of three upgrades and of a rollback: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from load_process import Load

from tests.programs import Programs

SERVER = Path(__file__).with_name("server.py")
LOAD = ("--rate", "200", "--keep-alive", "20", "--gap", "0.5", "--slow", "3")
BETWEEN = 400  # requests from one upgrade to the next
pytestmark = [
    pytest.mark.load,
    pytest.mark.timeout(120),
    pytest.mark.parametrize(
        "options",
        [
            ("aiohttp",),
            ("hypercorn",),
            ("uvicorn", "--http", "h11"),
            ("uvicorn", "--http", "httptools"),
            ("uvicorn-django",),
            ("waitress",),
            ("wsgiref",),
        ],
        ids=" ".join,
    ),
]


def test_three_upgrades(programs: Programs, options: tuple[str, ...]) -> None:
    """0 requests fail over three upgrades, with kept connections and slow answers beside the new ones."""
    port = programs.serve(SERVER, *options)

    with Load(f"http://127.0.0.1:{port}", *LOAD) as load:
        load.wait_until_served()
        for _ in range(3):
            record = programs.upgrade("web", "--probation", "0.3", "--wait", "exit")
            assert record.get("closed", 0) == 0
            load.wait_for_requests(load.ended + BETWEEN)
        report = load.stop()

    assert report["failures"] == 0, f"{load.failures[:5]}{programs.shown()}"
    assert report["skipped"] == 0
    assert len(report["by_generation"]) == 4


def test_rollback(programs: Programs, options: tuple[str, ...]) -> None:
    """0 requests fail when the old generation takes back in probation, and the next upgrade works."""
    port = programs.serve(SERVER, *options)

    with Load(f"http://127.0.0.1:{port}", *LOAD) as load:
        load.wait_until_served()
        assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0
        load.wait_for_requests(load.ended + BETWEEN)
        assert programs.handoff("rollback", "web").returncode == 0
        load.wait_for_requests(load.ended + BETWEEN)
        record = programs.upgrade("web", "--probation", "0.3")
        load.wait_for_requests(load.ended + BETWEEN)
        report = load.stop()

    assert record["old"] == 1
    assert report["failures"] == 0, f"{load.failures[:5]}{programs.shown()}"
    assert report["skipped"] == 0
