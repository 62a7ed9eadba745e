"""The library in asyncio programs, where it differs from that in programs with threads."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Command, wait_until
from tests.programs import PATIENCE, Programs, wait_for_end
from tests.scripts import ASYNCIO, Clients, Script, ask, certificate, connect, exit_status, finish, hold

TCP = "tcp://127.0.0.1:0"
KEEP = ("--wait", "cutover", "--probation", "60")
STEPS = ("spawn", "adopt", "ready", "cutover", "probation", "commit", "drain", "exit", "rollback")
PLAIN = f"""
async def main():
    async with handoff.aio.Service("web") as service:
        await serve(service, *(sys.argv[1:] or ["{TCP}"]))

asyncio.run(main())
say("left")
"""


def plain(programs: Programs, *addresses: str) -> tuple[Script, str]:
    """A service that just serves, and its first address."""
    script = Script(programs, ASYNCIO, PLAIN, *addresses)
    return script, script.serves()[0]


def new_generation(programs: Programs, address: str) -> int:
    """Upgrade as far as a probation that does not end by itself; the pid of the new generation."""
    done = programs.handoff("upgrade", "web", *KEEP)
    assert done.returncode == 0, done.stderr + programs.shown()
    generation, pid = finish(connect(address))
    assert generation == 2
    return pid


# servers


def test_clients_notice_nothing(programs: Programs, tmp_path: Path) -> None:
    """Clients that connect again and again, by TCP and by a Unix socket, never fail during an upgrade."""
    _, tcp = plain(programs, TCP, f"unix://{tmp_path}/web.sock")

    with Clients(tcp) as first, Clients(f"unix://{tmp_path}/web.sock") as second:
        programs.upgrade("web", "--probation", "0.2", "--wait", "exit")

    assert first.failures == second.failures == []
    assert set(first.generations) == set(second.generations) == {1, 2}


def test_create_server(programs: Programs) -> None:
    """`create_server` makes a protocol of each connection, counted until its transport is closed."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"held" if data == b"hold" else f"{{service.generation}} {{os.getpid()}}\\n".encode())
        if data != b"hold":
            self.transport.close()

async def main():
    global service
    async with handoff.aio.Service("web") as service:
        listener = await service.create_server(Echo, "{TCP}")
        service.on("drain", lambda record: say("drains", service.generation))
        service.ready()
        say("serves", service.generation, listener.address)
        await service.wait()

asyncio.run(main())
""",
    )
    (address,) = script.serves()
    held = hold(address)
    with Command("upgrade", "web", "--probation", "0", "--wait", "exit") as upgrade:
        script.wait_for("drains", "1")

        assert finish(held)[0] == 1

        status, told = upgrade.end()
    assert status == 0
    assert "; of 1 connections of generation 1, 0 had to be closed" in told
    assert ask(address) == 2


TLS = f"""
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    async with handoff.aio.Service("web") as service:
        await serve(service, "{TCP}", ssl=context)

asyncio.run(main())
"""


@contextlib.contextmanager
def encrypted(address: str, crt: Path) -> Iterator[ssl.SSLSocket]:
    """A TLS connection that is held."""
    context = ssl.create_default_context(cafile=str(crt))
    with context.wrap_socket(connect(address), server_hostname="localhost") as connection:
        connection.sendall(b"hold")
        assert connection.recv(10) == b"held"
        yield connection


def test_tls(programs: Programs, tmp_path: Path) -> None:
    """A TLS connection is counted and waited for, and the next generation speaks TLS too."""
    crt, key = certificate(tmp_path)
    script = Script(programs, ASYNCIO, TLS, str(crt), str(key))
    (address,) = script.serves()
    with contextlib.ExitStack() as client:
        held = client.enter_context(encrypted(address, crt))
        with Command("upgrade", "web", "--probation", "0", "--wait", "exit") as upgrade:
            script.wait_for("drains", "1")

            held.sendall(b"?")

            assert held.recv(100).startswith(b"1 ")
            client.close()  # an asyncio server waits for that, to close its side
            status, told = upgrade.end()
    assert status == 0, upgrade.stderr
    assert "; of 1 connections of generation 1, 0 had to be closed" in told
    with encrypted(address, crt) as held:
        held.sendall(b"?")
        assert held.recv(100).startswith(b"2 ")


def test_tls_that_is_none(programs: Programs, tmp_path: Path) -> None:
    """A client that speaks no TLS, or nothing and leaves, does no harm, and does not count afterwards."""
    crt, key = certificate(tmp_path)
    script = Script(programs, ASYNCIO, TLS, str(crt), str(key))
    (address,) = script.serves()

    connect(address).close()
    with connect(address) as rude:
        rude.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while rude.recv(1000):
                pass

    with encrypted(address, crt) as held:
        held.sendall(b"?")
        assert held.recv(100).startswith(b"1 ")
    wait_until(lambda: programs.status("web")["connections"] == 0, "no connection")


# hooks


def hooks(text: str) -> str:
    """A service with a hook for each step, `hook(record, step)`."""
    return f"""
{text}
async def main():
    global service
    service = handoff.aio.Service("web")
    for step in {STEPS}:
        service.on(step, hook_of(step))
    async with service:
        await serve(service, "{TCP}")

asyncio.run(main())
say("left", service.generation)
"""


COROUTINE = """
def hook_of(step):
    async def hook(record):
        await asyncio.sleep(0.01)
        say("hook", service.generation, step, asyncio.current_task() is not None)
    return hook
"""


def test_coroutine_functions_as_hooks(programs: Programs) -> None:
    """Hooks that are coroutine functions run in the loop, each to its end before the program leaves its Service."""
    script = Script(programs, ASYNCIO, hooks(COROUTINE))
    script.serves()

    programs.upgrade("web", "--probation", "0.1", "--wait", "exit")

    lines: list[list[str]] = []
    while ["left", "1"] not in lines or ["hook", "2", "exit", "True"] not in lines:
        lines.append(script.line())
    old = [words[2] for words in lines[: lines.index(["left", "1"])] if words[:2] == ["hook", "1"]]
    new = [words[2] for words in lines if words[:2] == ["hook", "2"]]
    assert old == ["spawn", "adopt", "ready", "cutover", "probation", "commit", "drain", "exit"]
    assert new == ["adopt", "ready", "cutover", "commit", "exit"]
    assert all(words[3] == "True" for words in lines if words[0] == "hook")


def test_plain_functions_as_hooks(programs: Programs) -> None:
    """Hooks that are plain functions are called in the loop's thread."""
    script = Script(
        programs,
        ASYNCIO,
        hooks("""
import threading

def hook_of(step):
    return lambda record: say("hook", service.generation, step, threading.current_thread() is threading.main_thread())
"""),
    )
    script.serves()

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert script.wait_for("hook", "1", "spawn") == ["True"]
    assert script.wait_for("hook", "1", "exit") == ["True"]


def test_hook_that_raises(programs: Programs) -> None:
    """A coroutine function that raises as a hook is logged, and changes nothing."""
    script = Script(
        programs,
        ASYNCIO,
        hooks("""
def hook_of(step):
    async def hook(record):
        await asyncio.sleep(0)
        raise ValueError("a bad hook")
    return hook
"""),
    )
    (address,) = script.serves()

    record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert record["result"] == "committed"
    assert ask(address) == 2
    assert "web: a hook failed" in programs.shown()
    assert "ValueError: a bad hook" in programs.shown()
    assert "never retrieved" not in programs.shown()


def test_hook_that_never_ends(programs: Programs) -> None:
    """A hook that hangs keeps neither the upgrade nor, for longer than the time to leave, the program's end."""
    script = Script(
        programs,
        ASYNCIO,
        hooks("""
def hook_of(step):
    async def hook(record):
        await asyncio.Event().wait()
    return hook
"""),
    )
    (address,) = script.serves()

    programs.upgrade("web", "--probation", "0")

    assert script.process.wait(PATIENCE) == 0
    assert ask(address) == 2


# idle

IDLE = f"""
async def answer(reader, writer):
    while True:
        data = b""
        with service.idle():
            data = await reader.read(100)
        if not data:
            break
        writer.write(f"{{service.generation}} {{service.draining}}\\n".encode())
        await writer.drain()
    say("closed", reader.at_eof())
    writer.close()

async def main():
    global service
    async with handoff.aio.Service("web", grace=float(sys.argv[1]), drain_timeout=60) as service:
        await serve(service, "{TCP}", answer=answer)

asyncio.run(main())
"""


def test_idle_connection_is_closed_after_the_grace_time(programs: Programs) -> None:
    """A kept connection on which nothing comes leaves its block after the grace time, long before the deadline."""
    script = Script(programs, ASYNCIO, IDLE, "0.3")
    (address,) = script.serves()
    with connect(address) as kept, kept.makefile("rb") as reader:
        kept.sendall(b"?\n")
        assert reader.readline() == b"1 False\n"

        record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

        assert reader.readline() == b""
    assert script.wait_for("closed") == ["False"]
    assert (record["open"], record["finished"], record["closed"]) == (1, 1, 0)
    assert record["steps"]["drain"] - record["steps"]["commit"] >= 0.3


def test_request_in_the_grace_time_is_answered(programs: Programs) -> None:
    """What comes on a kept connection within the grace time is answered, though the generation drains."""
    script = Script(programs, ASYNCIO, IDLE, "60")
    (address,) = script.serves()
    with connect(address) as kept, kept.makefile("rb") as reader:
        kept.sendall(b"?\n")
        assert reader.readline() == b"1 False\n"
        programs.upgrade("web", "--probation", "0")

        kept.sendall(b"?\n")

        assert reader.readline() == b"1 True\n"
    assert script.wait_for("closed") == ["True"]
    assert script.process.wait(PATIENCE) == 0


def test_idle_ends_at_once_after_the_grace_time(programs: Programs) -> None:
    """A block that is entered after the grace time is left at once, but not before what has come is read."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
async def answer(reader, writer):
    await reader.readexactly(1)  # not within idle(): it is waited for
    data = b""
    with service.idle():
        data = await reader.read(100)
    say("read", data.decode() or "nothing")
    with service.idle():
        await asyncio.Event().wait()
    say("left")
    writer.close()

async def main():
    global service
    async with handoff.aio.Service("web", grace=0, drain_timeout=60) as service:
        await serve(service, "{TCP}", answer=answer)

asyncio.run(main())
""",
    )
    (address,) = script.serves()
    with connect(address) as kept:
        wait_until(lambda: programs.status("web")["connections"] == 1, "it accepted")
        programs.upgrade("web", "--probation", "0")
        script.wait_for("drains")

        kept.sendall(b"ab")

        assert script.wait_for("read") == ["b"]
        assert script.wait_for("left") == []
        assert kept.recv(10) == b""


CANCELLED = """
async def waits():
    with service.idle():
        await asyncio.Event().wait()
    return "went on"

async def cancelled(*, idle_first):
    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    if idle_first:
        for idle in list(service._idle):
            idle.end()
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return "cancelled"

async def timed_out():
    try:
        await asyncio.wait_for(waits(), 0.01)
    except asyncio.TimeoutError:
        return "timed out"

async def main():
    global service
    async with handoff.aio.Service("web", grace=0) as service:
        service.ready()
        say("outside", await cancelled(idle_first=False))
        say("both", await cancelled(idle_first=True))
        say("timeout", await timed_out())
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        service.stop()
        say("grace", await task)
        with service.idle():
            pass
        say("after", await asyncio.sleep(0, "undisturbed"))

asyncio.run(main())
"""


def test_cancellation_from_outside(programs: Programs) -> None:
    """A task that somebody else cancels within `idle` is cancelled; only what `idle` did itself is swallowed."""
    script = Script(programs, ASYNCIO, CANCELLED)

    assert script.wait_for("outside") == ["cancelled"]
    assert script.wait_for("both") in (["cancelled"], ["went", "on"])  # 3.10 can't tell them apart
    assert script.wait_for("timeout") == ["timed", "out"]
    assert script.wait_for("grace") == ["went", "on"]
    assert script.wait_for("after") == ["undisturbed"]
    assert script.process.wait(PATIENCE) == 0


@pytest.mark.skipif("sys.version_info < (3, 11)", reason="a task does not count its cancellations before 3.11")
def test_cancellation_from_outside_and_by_idle(programs: Programs) -> None:
    """A task that is cancelled from outside in the same turn as by `idle` is cancelled."""
    script = Script(programs, ASYNCIO, CANCELLED)

    assert script.wait_for("both") == ["cancelled"]
    assert script.process.wait(PATIENCE) == 0


# a loop that is blocked

BLOCKS = f"""
async def answer(reader, writer):
    if await reader.read(100) == b"block":
        say("blocks", service.generation)
        with open(os.environ["FIFO"]) as fifo:  # blocks the loop, until the test lets go
            fifo.read()
    writer.write(f"{{service.generation}} {{os.getpid()}}\\n".encode())
    writer.close()

async def main():
    global service
    async with handoff.aio.Service("web") as service:
        await serve(service, "{TCP}", answer=answer)

asyncio.run(main())
"""


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What a blocked program reads, until somebody has written there."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@contextlib.contextmanager
def blocked(script: Script, address: str, fifo: Path) -> Iterator[None]:
    """The loop of the generation that accepts now is blocked; its client is answered afterwards."""
    with connect(address) as client, client.makefile() as reader:
        client.sendall(b"block")
        (generation,) = script.wait_for("blocks")
        yield
        with fifo.open("w"):
            pass
        assert reader.readline().startswith(f"{generation} ")


def test_blocked_loop_is_upgraded(programs: Programs, fifo: Path) -> None:
    """While a callback blocks the old generation's loop it is upgraded all the same, and clients are served."""
    script = Script(programs, ASYNCIO, BLOCKS, FIFO=str(fifo))
    (address,) = script.serves()

    with blocked(script, address, fifo):
        programs.upgrade("web", "--probation", "0")
        assert ask(address) == 2

    assert script.process.wait(PATIENCE) == 0


def test_rollback_to_a_blocked_loop(programs: Programs, fifo: Path) -> None:
    """Paused and told to accept again while its loop is blocked, the old generation answers who came meanwhile."""
    script = Script(programs, ASYNCIO, BLOCKS, FIFO=str(fifo))
    (address,) = script.serves()
    with blocked(script, address, fifo):
        new_generation(programs, address)
        assert programs.handoff("rollback", "web").returncode == 0
        waiting = connect(address)

    assert finish(waiting)[0] == 1
    assert ask(address) == 1


def test_pause_of_a_blocked_loop(programs: Programs, fifo: Path) -> None:
    """Paused while its loop is blocked, the old generation accepts nothing once the loop goes on, until it is to."""
    script = Script(programs, ASYNCIO, BLOCKS, FIFO=str(fifo))
    (address,) = script.serves()
    with blocked(script, address, fifo):
        new = new_generation(programs, address)
        os.kill(new, signal.SIGSTOP)  # so that what comes is queued
        waiting = [connect(address) for _ in range(5)]
    os.kill(new, signal.SIGCONT)

    assert [finish(connection)[0] for connection in waiting] == [2] * 5


def test_new_generation_blocks(programs: Programs, fifo: Path) -> None:
    """A new generation whose loop is blocked is rolled back nevertheless, and its client answered."""
    script = Script(programs, ASYNCIO, BLOCKS, FIFO=str(fifo))
    (address,) = script.serves()
    new = new_generation(programs, address)

    with blocked(script, address, fifo):
        assert programs.handoff("rollback", "web").returncode == 0
        assert ask(address) == 1

    assert wait_for_end(new)


def test_callbacks_that_block_for_a_while(programs: Programs) -> None:
    """In a loop whose every callback takes 30 ms no client fails, and every upgrade is committed."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
import time

async def main():
    async with handoff.aio.Service("web") as service:
        def block():
            until = time.monotonic() + 0.03
            while time.monotonic() < until:
                pass
            blocking[0] = loop.call_soon(block)
        loop = asyncio.get_running_loop()
        blocking = [loop.call_soon(block)]
        await serve(service, "{TCP}")
        blocking[0].cancel()

asyncio.run(main())
""",
    )
    (address,) = script.serves()

    with Clients(address) as clients:
        for _ in range(2):
            programs.upgrade("web", "--probation", "0.2")

    assert clients.failures == []
    assert set(clients.generations) == {1, 2, 3}


# the end


def test_rolled_back_generation_ends_with_status_one(programs: Programs) -> None:
    """Leaving the context raises RolledBack in a generation that was rolled back: exit status 1."""
    script, address = plain(programs)
    new = new_generation(programs, address)

    assert programs.handoff("rollback", "web").returncode == 0

    assert wait_for_end(new)
    assert exit_status(new) == 1
    assert "RolledBack: web: generation 2 was rolled back: its rollback was asked for" in programs.shown()
    script.process.terminate()
    assert script.rest().count(["left"]) == 1  # of the first generation


def test_rolled_back_generation_finishes_its_connections(programs: Programs) -> None:
    """What the new generation had accepted in probation is answered by it after the rollback."""
    _, address = plain(programs)
    new = new_generation(programs, address)
    held = hold(address)

    assert programs.handoff("rollback", "web").returncode == 0

    assert ask(address) == 1
    assert finish(held) == (2, new)
    assert wait_for_end(new)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(programs: Programs, number: signal.Signals) -> None:
    """The first TERM or INT finishes connections, the second ends at once and closes them; status 0."""
    script, address = plain(programs)
    with hold(address) as held:
        script.process.send_signal(number)
        wait_until(lambda: programs.status("web")["state"] == "stopping", "stopping")

        script.process.send_signal(number)

        assert script.process.wait(PATIENCE) == 0, programs.shown()
        assert held.recv(10) == b""


def test_error_in_the_context(programs: Programs) -> None:
    """An error in the application's main task ends the service, and is what the program ends with."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
async def main():
    async with handoff.aio.Service("web") as service:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asyncio.current_task().cancel)
        try:
            await serve(service, "{TCP}")
        except asyncio.CancelledError:
            raise ValueError("the application's own error") from None

asyncio.run(main())
""",
    )
    (address,) = script.serves()

    script.process.send_signal(signal.SIGHUP)

    assert script.process.wait(PATIENCE) == 1
    assert "ValueError: the application's own error" in programs.shown()
    with pytest.raises(ConnectionRefusedError):
        connect(address)


def test_upgrade_by_signal(programs: Programs) -> None:
    """A signal handler of the loop that calls `upgrade` starts one."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
async def main():
    async with handoff.aio.Service("web", probation=0) as service:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.upgrade)
        await serve(service, "{TCP}")

asyncio.run(main())
""",
    )
    (address,) = script.serves()

    script.process.send_signal(signal.SIGHUP)

    assert script.serves(2) == [address]
    assert script.process.wait(PATIENCE) == 0


# descriptors


def test_out_of_descriptors(programs: Programs) -> None:
    """Without descriptors left clients wait, the log says why, and they are served when a connection is closed."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
import resource

async def main():
    async with handoff.aio.Service("web") as service:
        spare = os.open("/dev/null", os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.close(spare)
        await serve(service, "{TCP}")

asyncio.run(main())
""",
    )
    (address,) = script.serves()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(10)]
        for client in clients:
            client.sendall(b"hold")
        wait_until(lambda: "out of descriptors; clients wait" in programs.shown(), "out of descriptors")
        wait_until(lambda: any(map(has_answer, clients)), "a client that is served")
        assert not all(map(has_answer, clients))

        for client in clients:
            assert client.recv(10) == b"held"
            assert finish(client)[0] == 1

    assert ask(address) == 1


def has_answer(client: socket.socket) -> bool:
    """Whether something can be read there now."""
    return bool(select.select([client], [], [], 0)[0])


def test_accept_is_not_tried_all_the_time_without_descriptors(programs: Programs) -> None:
    """A service that is out of descriptors uses no processor time over that."""
    script = Script(
        programs,
        ASYNCIO,
        f"""
import resource

async def main():
    async with handoff.aio.Service("web") as service:
        spare = os.open("/dev/null", os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.close(spare)
        await serve(service, "{TCP}")

asyncio.run(main())
""",
    )
    (address,) = script.serves()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(address)).sendall(b"hold")

        wait_until(lambda: programs.shown().count("out of descriptors") >= 3, "three trials, about a second apart")

    assert programs.shown().count("out of descriptors") <= 6
