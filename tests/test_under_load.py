"""What the clients notice of ten upgrades: nothing."""

from __future__ import annotations

import pytest
from load_process import Load

from tests.programs import Programs

pytestmark = [pytest.mark.load, pytest.mark.timeout(300)]
EXAMPLE = pytest.mark.parametrize("example", ["threaded", "asyncio_http"])


def upgrade_under(programs: Programs, port: int, requests: int, *options: str) -> dict[str, int]:
    """Upgrade ten times, spread over so many requests; returns the report of the load."""
    with Load(f"http://127.0.0.1:{port}", *options) as load:
        load.wait_until_served()
        for number in range(1, 11):
            programs.upgrade("web", "--probation", "0.3")
            load.wait_for_requests(requests * number // 10)
        report = load.stop()
    assert report["failures"] == 0, f"{load.failures[:5]}{programs.shown()}"
    assert report["skipped"] == 0
    assert report["finished"] >= requests
    assert len(report["by_generation"]) == 11
    return report


@EXAMPLE
def test_ten_upgrades_at_500_a_second(programs: Programs, example: str) -> None:
    """0 of 20,000 requests fail at 500 new connections a second, with kept connections and slow answers beside them."""
    port = programs.example(example)

    upgrade_under(programs, port, 20_000, "--rate", "500", "--keep-alive", "30", "--gap", "0.5", "--slow", "5")


@EXAMPLE
def test_ten_upgrades_at_the_highest_rate(programs: Programs, example: str) -> None:
    """0 of 100,000 requests fail at the highest rate that the example sustains, with kept connections beside it."""
    port = programs.example(example)

    upgrade_under(programs, port, 100_000, "--saturate", "16", "--keep-alive", "30", "--gap", "0.5", "--slow", "2")
