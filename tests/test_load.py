"""The load generator: what a server does to a request, and what is counted for it."""

import asyncio
import contextlib
import importlib.util
import json
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

LOAD: Final = Path(__file__).parent.parent / "examples" / "load.py"
TIMEOUT: Final = 15.0  # less than that of pytest, so what hangs is told by its own traceback

Event = dict[str, Any]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def token_of(reader: asyncio.StreamReader) -> str:
    """Read one request and return the last part of its path, or of /slow/TOKEN/... the token."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    return head.split()[1].split("/")[2]


def answer(token: str, *, status: str = "200 OK", fields: str = "") -> bytes:
    """Make the right answer for a token, unless told otherwise."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(token) + 1}\r\nX-Generation: 7\r\nX-Pid: 4711\r\n{fields}\r\n"
    return f"{head}{token}\n".encode()


async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer rightly until the client has gone."""
    while True:
        try:
            token = await token_of(reader)
        except asyncio.IncompleteReadError:
            return
        writer.write(answer(token))


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reset the connection: socket(7), a close with SO_LINGER and no time to linger."""
    await token_of(reader)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close without an answer; the request is read before, else the kernel makes a reset of it."""
    await token_of(reader)


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close after all but the last byte."""
    writer.write(answer(await token_of(reader))[:-1])


async def answer_unavailable(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with an error."""
    writer.write(answer(await token_of(reader), status="503 Service Unavailable"))


async def answer_other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the token of somebody else."""
    writer.write(answer((await token_of(reader))[::-1]))


async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Wait until the client gives up."""
    await reader.read()


async def close_when_asked_again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the first request of a connection, and close at the second."""
    writer.write(answer(await token_of(reader)))
    await token_of(reader)


async def close_when_idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as if the connection were kept, and close it.

    With the cork the end of file travels in the segment of the answer, so the client can't ask again in between.
    """
    token = await token_of(reader)
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    writer.write(answer(token))


async def close_announced(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer, say that the connection ends with that, and close it."""
    writer.write(answer(await token_of(reader), fields="Connection: close\r\n"))


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with three chunks."""
    token = await token_of(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for i in range(3):
        line = f"{token} {i}\n"
        writer.write(f"{len(line):x}\r\n{line}\r\n".encode())
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def start(url: str, *options: str) -> asyncio.subprocess.Process:
    """Start the load generator with pipes."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(LOAD),
        url,
        *options,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def events_of(load: asyncio.subprocess.Process) -> list[Event]:
    """End the input of a load generator, wait for its own end without a complaint, and return what it told."""
    out, err = await load.communicate(b"")  # None would leave the pipe open before Python 3.12
    assert (load.returncode, err.decode()) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


async def serve(
    handler: Handler, scenario: Callable[[str], Coroutine[None, None, list[Event]]], path: Path | None = None
) -> list[Event]:
    """Run a scenario, which is given the URL of a server that treats each connection as the handler does.

    The server is at the path of a Unix socket, or else at a free port.
    """
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the load generator has finished
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    if path is None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(connected, path)
        url = f"http+unix://{path}"
    async with server:
        events = await scenario(url)
        await asyncio.gather(*connections)
    return events


def run(handler: Handler, *options: str, path: Path | None = None) -> list[Event]:
    """Load a server that treats each connection as the handler does; returns what the load generator told."""

    async def scenario(url: str) -> list[Event]:
        return await events_of(await start(url, *options))

    return asyncio.run(asyncio.wait_for(serve(handler, scenario, path), TIMEOUT))


def failed(report: Event) -> dict[str, int]:
    """Return how many requests failed of each kind that occurred."""
    assert report["event"] == "report"
    assert sum(report["failed"].values()) == report["failures"]
    return {kind: n for kind, n in report["failed"].items() if n}


@pytest.fixture(scope="module")
def load_module() -> ModuleType:
    """The load generator as a module."""
    spec = importlib.util.spec_from_file_location("load", LOAD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("load", ["--rate=1000", "--keep-alive=4", "--saturate=4"])
def test_right_answers(load: str) -> None:
    """Each request to a server that behaves well is finished, and none fails."""
    *events, report = run(behave, load, "--gap=0.01", "--requests=40")

    assert [each["event"] for each in events] == ["started", "generation"]
    assert (events[1]["generation"], events[1]["pid"]) == (7, 4711)
    assert (report["finished"], failed(report), report["skipped"]) == (40, {}, 0)
    assert report["by_generation"] == {"7": 40}
    assert 0 < report["latency"]["p50"] <= report["latency"]["p999"] <= report["latency"]["max"]


def test_slow_answers() -> None:
    """A chunked answer is finished when its last chunk has come, and its latency isn't counted."""
    *_, report = run(stream, "--slow=2", "--slow-lines=3", "--slow-interval=0", "--requests=6")

    assert report["by_load"]["slow"] == {"finished": 6, "failed": 0}
    assert report["latency"]["max"] is None


@pytest.mark.parametrize(
    ("handler", "kind", "generation"),
    [
        (reset, "reset", None),
        (close, "closed", None),
        (cut, "cut", 7),
        (answer_unavailable, "wrong", 7),
        (answer_other, "wrong", 7),
        (never_answer, "timeout", None),
    ],
)
@pytest.mark.parametrize("load", ["new", "keep-alive"])
def test_each_kind_of_failure(load: str, handler: Handler, kind: str, generation: int | None) -> None:
    """What a server does to a request is counted as exactly one failure of its kind, with what is known of it."""
    option = {"new": "--rate=100", "keep-alive": "--keep-alive=1"}[load]

    *events, report = run(
        handler, option, "--gap=0", "--requests=3", "--timeout=0.3" if kind == "timeout" else "--timeout=9"
    )

    failures = [each for each in events if each["event"] == "failure"]
    assert (report["finished"], failed(report)) == (0, {kind: 3})
    assert report["by_load"][load] == {"finished": 0, "failed": 3}
    assert {(each["kind"], each["load"], each["generation"]) for each in failures} == {(kind, load, generation)}
    assert all(each["sent_at"] <= each["connected_at"] <= each["at"] and each["local_port"] for each in failures)


def test_refused() -> None:
    """A port where nobody listens gives refused connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))

        *events, report = asyncio.run(refused(f"http://127.0.0.1:{bound.getsockname()[1]}"))

    assert failed(report) == {"refused": 3}
    assert all(each["connected_at"] is None for each in events)


def test_refused_by_absent_unix_socket(tmp_path: Path) -> None:
    """The path of a Unix socket that isn't there gives refused connections."""
    *_, report = asyncio.run(refused(f"http+unix://{tmp_path}/absent.sock"))

    assert failed(report) == {"refused": 3}


async def refused(url: str) -> list[Event]:
    """Send three requests to a server that isn't there."""
    return await asyncio.wait_for(events_of(await start(url, "--saturate=1", "--requests=3")), TIMEOUT)


def test_unix_socket(tmp_path: Path) -> None:
    """A server on a Unix socket is loaded as one on a port is."""
    *_, report = run(behave, "--keep-alive=1", "--gap=0", "--requests=5", path=tmp_path / "web.sock")

    assert (report["finished"], failed(report)) == (5, {})


def test_kept_connection_closed_under_a_request() -> None:
    """A kept connection closed after a request was sent on it is a failure, because the client may not retry."""
    *_, report = run(close_when_asked_again, "--keep-alive=1", "--gap=0", "--requests=4")

    assert (report["finished"], failed(report), report["idle_closes"]) == (2, {"closed": 2}, 0)


def test_kept_connection_closed_while_idle() -> None:
    """A kept connection closed while no request is on it is no failure; the client connects again."""
    *_, report = run(close_when_idle, "--keep-alive=1", "--gap=0", "--requests=4")

    # After the last answer the client closes, whether or not the server has.
    assert (report["finished"], failed(report), report["idle_closes"]) == (4, {}, 3)


def test_close_announced() -> None:
    """A kept connection that ends with an announced close is neither a failure nor an idle close."""
    *_, report = run(close_announced, "--keep-alive=1", "--gap=0", "--requests=4")

    assert (report["finished"], failed(report), report["idle_closes"]) == (4, {}, 0)


def test_no_room_is_skipped() -> None:
    """A scheduled request that finds no free connection is counted as skipped."""
    *_, report = run(never_answer, "--rate=100", "--most-open=1", "--duration=0.2", "--timeout=1")

    assert failed(report) == {"timeout": 1}
    assert report["skipped"] > 0


def test_mark_and_end_of_input() -> None:
    """A mark tells the figures since the last one, and the end of standard input ends the run."""

    async def scenario(url: str) -> list[Event]:
        load = await start(url, "--keep-alive=2", "--gap=0.01", "--duration=60", "--until-eof")
        assert load.stdin is not None and load.stdout is not None
        events = [json.loads(await load.stdout.readline())]
        load.stdin.write(b"mark before\nmark after\n")
        return events + await events_of(load)

    events = asyncio.run(asyncio.wait_for(serve(behave, scenario), TIMEOUT))

    before, after = (each for each in events if each["event"] == "interval")
    assert (before["name"], after["name"]) == ("before", "after")
    assert before["finished"] > 0 and before["failed"] == 0 and before["slowest"] >= before["p50"] > 0
    assert before["from"] < before["to"] == after["from"] <= after["to"]
    assert failed(events[-1]) == {}


def test_wrong_command_line() -> None:
    """A command line without a load is refused in one line."""

    async def scenario() -> tuple[int | None, bytes]:
        load = await start("http://127.0.0.1:1")
        _, err = await load.communicate()
        return load.returncode, err

    status, err = asyncio.run(asyncio.wait_for(scenario(), TIMEOUT))

    assert status == 2
    assert err.startswith(b"load: nothing to do") and err.count(b"\n") == 1


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Content-Length: 6", "hello\n"),
        ("Transfer-Encoding: chunked", "3;x=y\r\nhel\r\n3\r\nlo\n\r\n0\r\nA: b\r\n\r\n"),
    ],
)
def test_answer_in_any_pieces(load_module: ModuleType, head: str, body: str, size: int) -> None:
    """An answer in pieces of any size is whole exactly at its last byte; an interim one before it is skipped."""
    data = f"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nX-Pid: 5\r\n{head}\r\n\r\n{body}".encode()
    parsed = load_module.Answer(100)

    for i in range(0, len(data), size):
        assert not parsed.whole
        parsed.feed(data[i : i + size])

    assert (parsed.whole, parsed.status, parsed.pid, parsed.body) == (True, 200, 5, b"hello\n")


def test_percentiles(load_module: ModuleType) -> None:
    """Percentiles are right to 1 %, and never more than the slowest."""
    latencies = load_module.Latencies()

    for i in range(1, 1001):
        latencies.record(i / 1000)

    assert latencies.quantile(0.5) == pytest.approx(0.5, rel=0.011)
    assert latencies.quantile(0.99) == pytest.approx(0.99, rel=0.011)
    assert latencies.quantile(1.0) == latencies.slowest == 1.0
