"""Many listeners at once, and many upgrades in a row."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import attrs
import pytest

from tests.commands import wait_until
from tests.programs import Programs
from tests.scripts import ASYNCIO, Script, ask, descriptors, finish, hold

LISTENERS = 1000
UPGRADES = 200
VERSION = Path(__file__).with_name("version.py")
MANY = """
import resource

resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

class Answer(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"held" if data == b"hold" else f"{service.generation} {os.getpid()}\\n".encode())
        if data != b"hold":
            self.transport.close()

async def main():
    global service
    count, directory = int(sys.argv[1]), sys.argv[2]
    async with handoff.aio.Service("web", probation=0) as service:
        listeners = []
        for number in range(count // 2):
            listeners.append(await service.create_server(Answer, "tcp://127.0.0.1:0"))
            listeners.append(await service.create_server(Answer, f"unix://{directory}/{number}.sock"))
        service.ready()
        say("serves", service.generation, *(listener.address for listener in listeners))
        await service.wait()

asyncio.run(main())
"""


@pytest.mark.timeout(300)
def test_a_thousand_listeners(programs: Programs, tmp_path: Path) -> None:
    """A thousand listeners, TCP and Unix, are all handed over, each once, and no descriptor is left over."""
    script = Script(programs, ASYNCIO, MANY, str(LISTENERS), str(tmp_path))
    addresses = script.serves()
    assert len(set(addresses)) == LISTENERS
    before = descriptors(script.process.pid) + 1  # from the second generation on one watches the paths

    for generation in (2, 3):
        record = programs.upgrade("web", "--wait", "exit")

        assert (record["kept"], record["added"], record["removed"]) == (LISTENERS, 0, 0)
        assert script.serves(generation) == addresses
        assert {ask(address) for address in addresses} == {generation}
        state = programs.status("web")
        assert state["listener_count"] == LISTENERS
        pid = int(state["pid"])
        wait_until(functools.partial(has_descriptors, pid, before), f"{before} descriptors")


@pytest.mark.timeout(300)
def test_a_thousand_listeners_are_taken_back(programs: Programs, tmp_path: Path) -> None:
    """After a rollback the old generation answers at each of a thousand listeners, with the descriptors it had."""
    script = Script(programs, ASYNCIO, MANY, str(LISTENERS), str(tmp_path))
    addresses = script.serves()
    before = descriptors(script.process.pid)
    assert programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "60").returncode == 0
    assert {ask(address) for address in addresses} == {2}

    assert programs.handoff("rollback", "web").returncode == 0

    assert {ask(address) for address in addresses} == {1}
    wait_until(functools.partial(has_descriptors, script.process.pid, before), f"{before} descriptors")


@pytest.mark.kills
def test_too_few_descriptors_for_the_new_generation(programs: Programs, tmp_path: Path) -> None:
    """A new program that may not have as many descriptors as there are is rolled back, and the reason is the limit."""
    script = Script(programs, ASYNCIO, MANY, "200", str(tmp_path))
    addresses = script.serves()
    limited = f"ulimit -n 100; exec {' '.join(script.command('200', str(tmp_path)))}"

    done = programs.handoff("upgrade", "web", "--", "/bin/sh", "-c", limited)

    assert done.returncode == 1
    assert "RLIMIT_NOFILE" in done.stderr, done.stderr + programs.shown()
    assert {ask(address) for address in addresses} == {1}


def has_descriptors(pid: int, count: int) -> bool:
    """Whether a process has so many open now."""
    return descriptors(pid) == count


IDLE = 10  # descriptors: 0, 1, 2, listener, control socket, directory, two eventfds, a socket pair for signals


@attrs.frozen
class Size:
    """What a process has."""

    descriptors: int
    threads: int
    memory: int = attrs.field(eq=False)  # KiB, VmRSS


def size(pid: int) -> Size:
    """What a process has now."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Size(descriptors(pid), int(status["Threads"]), int(status["VmRSS"].split()[0]))


def settled(pid: int, address: str) -> Size:
    """What a generation has when it has served, is idle and is alone: its main thread and the control thread are left.

    It learns a moment after the command that the one before has ended, and only then closes the session to it.
    """
    finish(hold(address))
    wait_until(lambda: size(pid).threads == 2, "two threads")
    wait_until(lambda: descriptors(pid) == IDLE, f"{IDLE} descriptors")
    return size(pid)


@pytest.mark.timeout(300)
def test_two_hundred_upgrades(programs: Programs) -> None:
    """The last of many generations has the descriptors, the threads and the memory of the second one.

    The memory of two processes of one program differs by a few hundred KiB from run to run: the median of the last
    three is compared with that of the second to fourth, and may be 2 % or 512 KiB above it, whichever is more.
    """
    port = programs.serve(VERSION, "--listen", "tcp://127.0.0.1:0")
    address = f"tcp://127.0.0.1:{port}"
    pid = 0
    sizes = []
    for generation in range(2, UPGRADES + 2):
        record = programs.upgrade("web", "--probation", "0", "--wait", "exit")
        assert (record["old"], record["new"]) == (generation - 1, generation)
        if generation < 5 or generation > UPGRADES - 2:
            pid = programs.status("web")["pid"]
            sizes.append(settled(pid, address))

    assert ask(address) == UPGRADES + 1
    assert set(sizes) == {sizes[0]}
    early, late = (sorted(one.memory for one in some)[1] for some in (sizes[:3], sizes[-3:]))
    assert late <= early + max(512, early * 0.02)
    assert os.readlink(f"/proc/{pid}/fd/2") == str(programs.errors)
    assert sorted(path.name for path in (programs.runtime_dir / "web").glob("*.sock")) == [
        "control.sock",
        f"gen-{UPGRADES + 1}.sock",
    ]
    assert len(programs.pids()) == 1
