"""Whatever the new program does, the old one serves."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.programs import PATIENCE, Programs, wait_for_end

VERSION = Path(__file__).with_name("version.py")
UPGRADE = [sys.executable, "-m", "handoff", "upgrade", "web"]
TAKE_BACK = 0.010  # seconds from a death in probation to the old generation's accept


def ask(port: int) -> tuple[int, int]:
    """(generation, pid) that answers a new connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(b"?")
        generation, pid = connection.makefile().readline().split()
        return int(generation), int(pid)


def serve(programs: Programs, *options: str) -> int:
    """Start a good version; returns its port."""
    return programs.serve(VERSION, "--listen", "tcp://127.0.0.1:0", *options)


def fail(programs: Programs, port: int, *options: str, status: int = 1, **given: str) -> dict[str, Any]:
    """Upgrade to a version that fails; returns the record."""
    new = [sys.executable, str(VERSION), "--listen", f"tcp://127.0.0.1:{port}", "--quiet", *options]
    arguments = [f"--{name}={value}" for name, value in given.items()]
    done = programs.handoff("upgrade", "web", "--json", *arguments, "--", *new)
    assert done.returncode == status, f"exit status {done.returncode}: {done.stderr}{programs.shown()}"
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def still_well(programs: Programs, port: int) -> None:
    """The first generation serves, alone; and the next upgrade works."""
    assert ask(port)[0] == 1
    assert programs.status("web")["state"] == "serving"
    record = programs.upgrade("web", "--probation", "0.1", "--wait", "exit")
    assert ask(port)[0] == record["new"]


def test_exits_at_start(programs: Programs) -> None:
    """A program that ends at once is told with its status and its last words."""
    port = serve(programs)

    record = fail(programs, port, "--fail", "exit")

    assert record["result"] == "rolled-back"
    assert record["reason"] == "the new program exited with status 3 before it called"
    assert record["last_words"] == "no configuration found"
    still_well(programs, port)


def test_raises_before_ready(programs: Programs) -> None:
    """An error before `ready` is the reason, and its traceback the last words."""
    port = serve(programs)

    record = fail(programs, port, "--fail", "raise")

    assert record["reason"] == "ValueError: the new version is broken"
    assert "in main\n" in record["last_words"]
    still_well(programs, port)


def test_never_ready(programs: Programs) -> None:
    """A program that does not get ready in time is ended, with exit status 5."""
    port = serve(programs)

    record = fail(programs, port, "--fail", "never", status=5, timeout="0.5")

    assert record["reason"] == "it was not ready in 0.5 s"
    still_well(programs, port)


def test_never_calls(programs: Programs) -> None:
    """A program that does not call at all is ended in time, with exit status 5."""
    port = serve(programs)

    record = fail(programs, port, "--fail", "hang", status=5, timeout="0.5")

    assert record["result"] == "timed-out"
    assert "did not call in 0.5 s" in record["reason"]
    still_well(programs, port)


def test_leaves_in_probation(programs: Programs) -> None:
    """A program whose main function returns in probation gives the service back."""
    port = serve(programs)

    record = fail(programs, port, "--fail", "leave")

    assert record["reason"] == "the application ended before it was ready"
    still_well(programs, port)


@pytest.mark.kills
@pytest.mark.parametrize("step", ["adopt", "ready", "cutover"])
def test_is_killed(programs: Programs, step: str) -> None:
    """A program that is killed after it has adopted, got ready or taken over is told with its signal."""
    port = serve(programs)

    record = fail(programs, port, "--die-at", step)

    assert record["reason"] == "generation 2 was killed by SIGKILL"
    still_well(programs, port)


@pytest.mark.kills
@pytest.mark.parametrize("busy", [0, 2])
def test_take_back_is_fast(programs: Programs, busy: int) -> None:
    """After a death in probation the old generation accepts within 10 ms, and answers what was queued."""
    port = serve(programs, "--busy", str(busy))
    assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0
    generation, pid = ask(port)
    assert generation == 2
    pidfd = os.pidfd_open(pid)

    os.kill(pid, signal.SIGSTOP)  # so that the connection is queued, and who answers it is known
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(b"?")
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [], PATIENCE)
        died = time.monotonic()
        answer = connection.makefile().readline().split()
        took = time.monotonic() - died

    os.close(pidfd)
    assert answer[0] == "1"
    if not busy:
        assert took < TAKE_BACK * 10  # never a timed test: `make timings` measures it
    assert programs.status("web")["upgrade"]["reason"] == "generation 2 was killed by SIGKILL"


@pytest.mark.kills
def test_old_generation_is_killed_in_probation(programs: Programs) -> None:
    """The new generation carries on alone and takes charge, and the command says so."""
    port = serve(programs)
    first = ask(port)[1]
    upgrade = subprocess.Popen(
        [*UPGRADE, "--probation", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert upgrade.stderr and upgrade.stdout
    while "cutover" not in upgrade.stderr.readline():
        pass

    os.kill(first, signal.SIGKILL)

    told, _ = upgrade.communicate(timeout=PATIENCE)
    assert upgrade.returncode == 0
    assert "generation 1 ended before it committed; generation 2 carries on" in told
    assert ask(port)[0] == 2
    assert programs.status("web")["generation"] == 2
    programs.upgrade("web", "--probation", "0.1")


@pytest.mark.kills
def test_both_generations_are_killed(programs: Programs) -> None:
    """The next start removes what is stale, and serves."""
    port = serve(programs)
    done = programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60")
    assert done.returncode == 0
    for pid in programs.pids():
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid)

    programs.serve(VERSION, "--listen", f"tcp://127.0.0.1:{port}")

    assert ask(port)[0] == 3
    assert sorted(path.name for path in (programs.runtime_dir / "web").glob("*.sock")) == ["control.sock", "gen-3.sock"]


def test_open_connections_outlive_a_rollback(programs: Programs) -> None:
    """What the old generation had open is answered after it has taken it back, and what the new one had too."""
    port = serve(programs)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as old:
        old.sendall(b"hold")
        assert old.recv(10) == b"held"
        assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as new:
            new.sendall(b"hold")
            assert new.recv(10) == b"held"

            assert programs.handoff("rollback", "web").returncode == 0

            assert ask(port)[0] == 1
            old.sendall(b"?")
            new.sendall(b"?")
            assert old.makefile().readline().startswith("1 ")
            assert new.makefile().readline().startswith("2 ")
    still_well(programs, port)


def test_drain_has_a_deadline(programs: Programs) -> None:
    """A connection that does not end is closed at the drain's deadline, and counted."""
    port = serve(programs)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as stays,
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as ends,
    ):
        for connection in (stays, ends):
            connection.sendall(b"hold")
            assert connection.recv(10) == b"held"
        with subprocess.Popen(
            [*UPGRADE, "--json", "--wait", "exit", "--probation", "0", "--drain-timeout", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as upgrade:
            assert upgrade.stderr
            while "commit" not in upgrade.stderr.readline():
                pass
            ends.sendall(b"?")
            record = json.loads(upgrade.communicate(timeout=PATIENCE)[0])

        assert stays.recv(10) == b""
        assert ends.makefile().readline().startswith("1 ")
    assert (record["open"], record["finished"], record["closed"]) == (2, 1, 1)


@pytest.mark.parametrize("state", ["serving", "probation"])
def test_stop_ends_both(programs: Programs, state: str) -> None:
    """TERM to the generation in charge ends the new one too, and nobody takes back."""
    port = serve(programs)
    first = ask(port)[1]
    if state == "probation":
        assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0

    os.kill(first, signal.SIGTERM)

    for pid in programs.pids():
        assert wait_for_end(pid)
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_stop_of_the_new_one_in_probation_ends_both(programs: Programs) -> None:
    """TERM to a new generation that serves is a stop of the service."""
    port = serve(programs)
    assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0

    os.kill(ask(port)[1], signal.SIGTERM)

    for pid in programs.pids():
        assert wait_for_end(pid)
