"""What every test gets: a runtime directory of its own, and the proof that nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import Programs

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans of a test become children of this process, which reaps them


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory above the services' runtime directories, also for the processes that a test starts."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("HANDOFF_RUNTIME_DIR", str(path))
    return path


@pytest.fixture
def programs(runtime_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Programs]:
    """Starts programs and commands; ends all of them, and their upgrades, when the test is over."""
    started = Programs(runtime_dir, tmp_path)
    yield started
    left = started.end()
    assert not left, f"processes that nothing ended: {left}"
    sockets = sorted(str(path) for path in runtime_dir.glob("*/*.sock*"))
    killed = request.node.get_closest_marker("kills")
    assert killed or not sockets, f"left in the runtime directory: {sockets}"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """This process ends every test with the descriptors that it had before."""
    before = _descriptors()
    yield
    after = _descriptors()
    new = {number: target for number, target in after.items() if before.get(number) != target}
    assert not new, f"descriptors that were left open: {new}"


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists them
            continue
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Register what marks tests."""
    config.addinivalue_line("markers", "kills: the test kills processes, which can't remove their sockets")
    config.addinivalue_line("markers", "load: long, under load; `make test ARGS='-m \"not load\"'` leaves these out")
    signal.signal(signal.SIGINT, signal.default_int_handler)
