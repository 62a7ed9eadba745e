"""A real service under what nobody should send: it answers clearly, serves on, leaks nothing, can be upgraded."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from handoff.core.messages import MAX_PACKET, PROTOCOL, Kind, encode
from handoff.linux import descriptors
from handoff.runtime.control import MAX_CONNECTIONS
from handoff.runtime.directory import RuntimeDirectory
from tests.programs import PATIENCE, Programs, wait_for_end

SERVICE = """
import sys, handoff
with handoff.Service("web", probation=0.1, ready_timeout=30) as service:
    listener = service.listen(sys.argv[1])
    if len(sys.argv) > 2 and service.generation > 1:
        with open(sys.argv[2]) as fifo:  # until somebody lets it go on
            fifo.read()
    service.ready()
    if service.generation == 1:
        print(listener.address, flush=True)
    for connection, _ in listener:
        with connection:
            connection.sendall(b"%d" % service.generation)
"""
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


class Peer:
    """Somebody at a control socket, who may send whatever it likes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(PATIENCE)

    def say(self, packet: bytes, numbers: list[int] | None = None) -> None:
        """Send a packet as it is."""
        rights = b"".join(number.to_bytes(4, sys.byteorder) for number in numbers or [])
        self.connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [])

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Send a message and hear the answer."""
        self.say(json.dumps({"type": kind, **fields}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        answer = self.hear()
        assert answer is not None, "it was closed without an answer"
        return answer

    def hear(self) -> dict[str, Any] | None:
        """The next message; None at end of file."""
        packet = self.connection.recv(2 * MAX_PACKET)
        answer: dict[str, Any] | None = json.loads(packet) if packet else None
        return answer


class Web:
    """A running service, and everybody who talks to it."""

    def __init__(self, programs: Programs, *arguments: str) -> None:
        self.programs = programs
        self.port = programs.serve(programs.script(SERVICE), "tcp://127.0.0.1:0", *arguments)
        self.pid = programs.started[0].pid
        self.directory = RuntimeDirectory("web")
        self._peers = contextlib.ExitStack()
        self._has = self._descriptors()

    def call(self, generation: int | None = None) -> Peer:
        """Connect to a control socket, waiting for a place in its backlog."""
        connection = self.directory.connect(generation, timeout=PATIENCE)
        return Peer(self._peers.enter_context(connection))

    def greeting(self) -> int:
        """Be a client of the service; returns the generation that answers."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as client:
            return int(client.makefile("rb").read())

    def end_peers(self) -> None:
        """Close everybody's connection."""
        self._peers.close()

    def _descriptors(self) -> list[str]:
        """The kinds of descriptors that the service has; eventfds belong to threads that come and go."""
        with Peer(self.directory.connect(timeout=PATIENCE)).connection as connection:
            peer = Peer(connection)
            for _ in range(2):  # whatever was said before has been dealt with then
                assert peer.ask("status")["type"] == "state"
            found = []
            for name in os.listdir(f"/proc/{self.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    found.append(os.readlink(f"/proc/{self.pid}/fd/{name}").partition(":")[0])
        return sorted(kind for kind in found if kind != "anon_inode")

    def assert_unharmed(self) -> None:
        """Clients are served, nothing was leaked, and an upgrade succeeds."""
        self.end_peers()
        assert self.greeting() == 1, self.programs.shown()
        assert self._descriptors() == self._has
        assert "Traceback" not in self.programs.shown(), self.programs.shown()
        assert self.programs.upgrade("web")["result"] == "committed"
        assert self.greeting() == 2
        assert wait_for_end(self.pid)

    def close(self) -> None:
        """Close what this process has of it."""
        self.end_peers()
        self.directory.close()


@pytest.fixture
def web(programs: Programs) -> Iterator[Web]:
    """The service `web`, serving."""
    made = Web(programs)
    yield made
    made.close()


@pytest.fixture
def null() -> Iterator[int]:
    """A descriptor to send."""
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def hello(**changes: Any) -> dict[str, Any]:
    """The fields of a hello that is in order, but for the changes."""
    return {"protocol": list(PROTOCOL), "service": "web", "generation": 2, "version": "1", **changes}


BAD_PACKETS = {
    "garbage": (b"\x00\xff" * 100, "200 bytes that are no JSON"),
    "truncated": (encode(Kind.UPGRADE, command=["x"])[:-3], "31 bytes that are no JSON"),
    "nothing but a brace": (b"{", "1 bytes that are no JSON"),
    "not UTF-8": (b'{"type":"\xff"}', "12 bytes that are no JSON"),
    "too deep": (b"[" * 60_000, "60000 bytes that are no JSON"),
    "a long number": (b'{"type":' + b"1" * 60_000 + b"}", "60009 bytes that are no JSON"),
    "a list": (b"[]", "a JSON list instead of an object"),
    "a text": (b'"status"', "a JSON str instead of an object"),
    "null": (b"null", "a JSON NoneType instead of an object"),
    "no type": (b"{}", "type 'None' is not known"),
    "unknown type": (b'{"type":"nonsense"}', "type 'nonsense' is not known"),
    "type that is no text": (b'{"type":["status"]}', """type "['status']" is not known"""),
    "type of great length": (b'{"type":"' + b"x" * 60_000 + b'"}', f"type {'x' * 40!r} is not known"),
    "type with a lone surrogate": (b'{"type":"\\ud800"}', r"type '\ud800' is not known"),
    "missing field": (b'{"type":"hello"}', "hello without 'protocol'"),
    "text for a list": (b'{"type":"upgrade","command":"ls"}', "'command' of upgrade is a str"),
    "list for a text": (b'{"type":"upgrade","wait":[]}', "'wait' of upgrade is a list"),
    "truth for a number": (b'{"type":"upgrade","timeout":true}', "'timeout' of upgrade is a bool"),
    "too large": (b'{"type":"status"}'.ljust(MAX_PACKET + 1), f"a packet of more than {MAX_PACKET} bytes"),
    "largest": (b"x" * MAX_PACKET, f"{MAX_PACKET} bytes that are no JSON"),
}


@pytest.mark.parametrize("name", BAD_PACKETS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_bad_packet(web: Web, name: str, first: bool) -> None:
    """A packet that is no message is answered with what is wrong about it, and the connection is closed."""
    packet, reason = BAD_PACKETS[name]
    peer = web.call()
    if not first:
        assert peer.ask("status")["type"] == "state"

    peer.say(packet)

    answer = peer.hear()
    assert answer
    assert (answer["type"], answer["code"]) == ("error", "bad-message")
    assert answer["reason"] == f"bad message: {reason}"
    assert peer.hear() is None
    web.assert_unharmed()


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "unknown step to wait for": {"wait": "nonsense"},
    "long step to wait for": {"wait": "é" * 20_000},
    "negative time": {"timeout": -1},
    "time that is no number": {"probation": float("nan")},
    "endless time": {"drain_timeout": float("inf")},
    "command of numbers": {"command": [1, 2]},
    "command with a NUL": {"command": ["a\0b"]},
    "environment of numbers": {"environment": {"COLOUR": 1}},
    "environment without names": {"environment": {"": "green"}},
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(web: Web, name: str) -> None:
    """An upgrade that cannot be asked for in this way is refused with a reason, and none is begun."""
    answer = web.call().ask("upgrade", **BAD_REQUESTS[name])

    assert (answer["type"], answer["code"]) == ("error", "bad-message")
    assert len(answer["reason"]) > 10
    web.assert_unharmed()


@pytest.mark.parametrize("field", ["timeout", "probation", "drain_timeout"])
@pytest.mark.parametrize("seconds", [1e7, 1e300, 10**400], ids=["1e7", "1e300", "10**400"])
def test_endless_times(web: Web, field: str, seconds: float) -> None:
    """However long the times that an upgrade is asked for with, the service answers and lives on."""
    peer = web.call()

    answer: dict[str, Any] | None = peer.ask("upgrade", **{field: seconds}, command=["false"])

    while answer and answer["type"] == "step":
        answer = peer.hear()
    assert answer
    assert answer["type"] in ("error", "result")
    web.assert_unharmed()


@pytest.mark.parametrize(
    "word", ["a\udcff", "no-such-command", "/etc/passwd"], ids=["surrogate", "no such command", "no program"]
)
def test_command_that_cannot_be_started(web: Web, word: str) -> None:
    """A command that no program can be started by ends the upgrade with a reason, and only that."""
    peer = web.call()

    answer: dict[str, Any] | None = peer.ask("upgrade", command=[word])

    while answer and answer["type"] == "step":
        answer = peer.hear()
    assert answer
    assert answer["type"] == "result"
    assert answer["record"]["result"] == "rolled-back"
    assert "cannot start" in answer["record"]["reason"]
    web.assert_unharmed()


@pytest.mark.parametrize("value", ["a\0b", "\ud800"], ids=["NUL", "surrogate"])
def test_environment_that_cannot_be_given(web: Web, value: str) -> None:
    """An environment that no program can be given is refused, or ends the upgrade with a reason."""
    peer = web.call()

    answer: dict[str, Any] | None = peer.ask("upgrade", environment={"COLOUR": value})

    while answer and answer["type"] == "step":
        answer = peer.hear()
    assert answer
    assert answer["type"] in ("error", "result")
    assert web.greeting() == 1
    web.assert_unharmed()


@pytest.mark.parametrize(
    "cwd", ["/no/such/release", "a\0b", "\ud800", "é" * 20_000], ids=["gone", "NUL", "bad", "long"]
)
def test_directory_that_cannot_be_entered(web: Web, cwd: str) -> None:
    """A working directory that is none is refused, or ends the upgrade with a reason."""
    peer = web.call()

    answer: dict[str, Any] | None = peer.ask("upgrade", cwd=cwd)

    while answer and answer["type"] == "step":
        answer = peer.hear()
    assert answer
    assert answer["type"] in ("error", "result")
    assert web.greeting() == 1
    web.assert_unharmed()


def test_long_command(web: Web) -> None:
    """A command that is too long to be told again ends the upgrade, and whoever asks is told what it can be."""
    peer = web.call()

    answer: dict[str, Any] | None = peer.ask("upgrade", command=["é" * 20_000])

    while answer and answer["type"] == "step":
        answer = peer.hear()
    assert answer
    assert answer["type"] in ("result", "error")
    assert web.call().ask("status")["type"] == "state"
    web.assert_unharmed()


OUT_OF_PLACE: dict[Kind, dict[str, Any]] = {
    Kind.DIALLING: {"protocol": 1},
    Kind.REFUSED: {"code": "x", "reason": "x", "generation": 1},
    Kind.DESCRIPTORS: {"upgrade": "x", "generation": 1, "batch": 1, "batches": 1, "entries": []},
    Kind.ACCEPT: {},
    Kind.RELEASED: {},
    Kind.COMMITTED: {"record": {}},
    Kind.DRAINED: {"record": {}},
    Kind.ADOPTED: {"batch": 1},
    Kind.READY: {"added": 0, "unclaimed": [], "paths": []},
    Kind.ACCEPTING: {},
    Kind.IN_CHARGE: {},
    Kind.FAILED: {"reason": "x"},
    Kind.ROLLED_BACK: {},
    Kind.STOPPING: {},
    Kind.STEP: {"step": "x", "seconds": 1},
    Kind.STATE: {"state": {}},
    Kind.RESULT: {"record": {}},
    Kind.ERROR: {"code": "x", "reason": "x"},
}


@pytest.mark.parametrize("kind", OUT_OF_PLACE, ids=[kind.value for kind in OUT_OF_PLACE])
def test_message_out_of_place(web: Web, kind: Kind) -> None:
    """A message that is no request is answered with an error, whoever's it would have been to send."""
    answer = web.call().ask(kind.value, **OUT_OF_PLACE[kind])

    assert answer == {"type": "error", "code": "bad-message", "reason": f"{kind.value} is no request"}
    web.assert_unharmed()


@pytest.mark.parametrize("kind", ["abort", "rollback"])
def test_request_out_of_time(web: Web, kind: str) -> None:
    """Ending an upgrade while none runs is refused with a reason."""
    answer = web.call().ask(kind)

    assert (answer["type"], answer["code"]) == ("error", "no-upgrade")
    web.assert_unharmed()


def test_unknown_fields(web: Web) -> None:
    """Fields that a later version may have are ignored."""
    assert web.call().ask("status", colour="green", nested={"a": [1]})["type"] == "state"

    web.assert_unharmed()


@pytest.mark.parametrize(
    "packet",
    [encode(Kind.STATUS), b"garbage", b"", b"x" * (MAX_PACKET + 1), json.dumps({"type": "hello", **hello()}).encode()],
    ids=["request", "garbage", "empty", "oversized", "hello"],
)
def test_descriptors_where_none_belong(web: Web, null: int, packet: bytes) -> None:
    """Descriptors that come with a message to which none belong are closed."""
    peers = [web.call() for _ in range(5)]

    for peer in peers:
        peer.say(packet, [null] * 50)
        with contextlib.suppress(ConnectionResetError):
            peer.hear()

    web.assert_unharmed()


def test_descriptors_for_nobody(web: Web, null: int) -> None:
    """Descriptors pushed at a generation that waits for none are refused and closed."""
    packet = encode(
        Kind.DESCRIPTORS, upgrade="x", generation=7, batch=1, batches=1, entries=[{"address": "tcp://127.0.0.1:1"}]
    )
    peer = web.call(1)

    peer.say(packet, [null])

    answer = peer.hear()
    assert answer == {"type": "error", "code": "bad-message", "reason": "descriptors is no request"}
    web.assert_unharmed()


HELLOS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no upgrade": ({}, "running", "generation 1 is running, and did not start the one that called"),
    "unknown upgrade": ({"upgrade": uuid.uuid4().hex}, "running", "generation 1 is running"),
    "wrong service": ({"service": "mail"}, "wrong-service", "this is the service web"),
    "newer protocol": ({"protocol": [7, 9]}, "protocol", "speaks versions 1 to 1 of the protocol, and the new one [7"),
    "older protocol": ({"protocol": [-1, 0]}, "protocol", "none is common to both"),
    "protocol that is no range": ({"protocol": ["1"]}, "protocol", "none is common to both"),
    "long version": ({"protocol": [7, 7], "version": "é" * 20_000}, "protocol", "generation 1 speaks versions 1 to 1"),
    "great generation": ({"generation": 10**300}, "running", "generation 1 is running"),
    "negative generation": ({"generation": -1}, "running", "generation 1 is running"),
}


@pytest.mark.parametrize("name", HELLOS)
def test_wrong_hello(web: Web, name: str) -> None:
    """A generation that nobody waits for is refused with a reason, and the connection closed."""
    changes, code, reason = HELLOS[name]
    peer = web.call()

    answer = peer.ask("hello", **hello(**changes))

    assert (answer["type"], answer["code"], answer["generation"]) == ("refused", code, 1)
    assert reason in answer["reason"]
    assert peer.hear() is None
    web.assert_unharmed()


def test_many_requests_at_once(web: Web) -> None:
    """Requests that are sent without waiting for answers are answered in their order."""
    peer = web.call()

    for _ in range(20):
        peer.say(encode(Kind.STATUS))
        peer.say(encode(Kind.ABORT))

    answers = []
    for _ in range(40):
        answer = peer.hear()
        assert answer
        answers.append(answer["type"])
    assert answers == ["state", "error"] * 20
    web.assert_unharmed()


def test_error_after_more_was_sent(web: Web) -> None:
    """Who sends more after a packet that is refused still reads why: the answer is not lost by the close."""
    peer = web.call()

    peer.say(b"garbage")
    for _ in range(3):
        with contextlib.suppress(BrokenPipeError):
            peer.say(encode(Kind.STATUS))

    answer = peer.hear()
    assert answer
    assert answer["code"] == "bad-message"
    web.assert_unharmed()


def test_peer_that_never_reads(web: Web) -> None:
    """Who asks and asks and never reads the answers is given up, and everybody else is served."""
    peer = web.call()
    peer.connection.settimeout(1)

    with pytest.raises(OSError) as caught:
        for _ in range(100_000):
            peer.say(encode(Kind.STATUS))

    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET), caught.value
    web.assert_unharmed()


def test_peer_that_never_speaks(web: Web) -> None:
    """Who connects and says nothing is told so after the request deadline, and the connection closed."""
    peer = web.call()

    answer = peer.hear()

    assert answer == {"type": "error", "code": "slow", "reason": "no request came in 5 s"}
    assert peer.hear() is None
    web.assert_unharmed()


def test_peer_that_leaves_at_once(web: Web) -> None:
    """Who connects and leaves, or asks and leaves, does no harm."""
    for _ in range(50):
        web.directory.connect(timeout=PATIENCE).close()
        with web.directory.connect(timeout=PATIENCE) as connection:
            descriptors.send(connection, encode(Kind.STATUS))

    web.assert_unharmed()


def test_status_asked_by_many(web: Web) -> None:
    """As many as there are places may ask at once, again and again; one more is told that it is busy."""
    peers = [web.call() for _ in range(MAX_CONNECTIONS)]
    for _ in range(3):
        for peer in peers:
            peer.say(encode(Kind.STATUS))
        assert all((answer := peer.hear()) and answer["type"] == "state" for peer in peers)

    one_more = web.call().ask("status")

    assert (one_more["type"], one_more["code"]) == ("error", "busy")
    web.assert_unharmed()


def test_silent_connections_during_an_upgrade(web: Web) -> None:
    """Two hundred connections that say nothing do not keep an upgrade from being asked for, and from its end."""
    silent = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(200):
            silent.append(web.directory.connect())
    assert len(silent) > MAX_CONNECTIONS

    record = web.programs.upgrade("web")

    for connection in silent:
        connection.close()
    assert record["result"] == "committed"
    assert record["steps"]["spawn"] < 5
    assert web.greeting() == 2
    assert wait_for_end(web.pid)


def test_busy_connections_during_an_upgrade(programs: Programs) -> None:
    """While an upgrade runs all places may be taken: the new generation's call has one of its own."""
    os.mkfifo(programs.tmp_path / "fifo")
    web = Web(programs, str(programs.tmp_path / "fifo"))
    asking = web.call()
    asking.say(encode(Kind.UPGRADE))
    peers = [web.call() for _ in range(MAX_CONNECTIONS + 20)]
    for peer in peers:
        peer.say(encode(Kind.STATUS))
    with contextlib.suppress(BlockingIOError):
        while len(peers) < 250:
            peers.append(Peer(web.directory.connect()))

    (programs.tmp_path / "fifo").write_text("")  # waits until the new generation has got so far

    answer = asking.hear()
    while answer and answer["type"] == "step":
        answer = asking.hear()
    for peer in peers:
        peer.connection.close()
    assert answer
    assert answer["record"]["result"] == "committed", answer
    assert web.greeting() == 2
    assert wait_for_end(web.pid)
    web.close()


@pytest.mark.parametrize("kind", ["hello", "descriptors", "garbage", "accept", "status"])
def test_bad_input_to_a_new_generation(programs: Programs, null: int, kind: str) -> None:
    """While a new generation gets ready nobody but its old one can push anything at it."""
    os.mkfifo(programs.tmp_path / "fifo")
    web = Web(programs, str(programs.tmp_path / "fifo"))
    asking = web.call()
    asking.say(encode(Kind.UPGRADE))
    steps = [answer["step"] for _ in range(2) if (answer := asking.hear())]
    assert steps == ["spawn", "adopt"]
    packet = {
        "hello": json.dumps({"type": "hello", **hello()}).encode(),
        "descriptors": encode(
            Kind.DESCRIPTORS, upgrade="x", generation=1, batch=1, batches=1, entries=[{"address": "tcp://127.0.0.1:1"}]
        ),
        "garbage": b"garbage",
        "accept": encode(Kind.ACCEPT),
        "status": encode(Kind.STATUS),
    }[kind]
    peer = web.call(2)

    peer.say(packet, [null])

    if kind in ("hello", "descriptors", "garbage"):  # a request waits until somebody is in charge
        answer = peer.hear()
        assert answer
        assert (answer["type"], answer["code"]) == {
            "hello": ("refused", "not-in-charge"),
            "descriptors": ("error", "wrong-upgrade"),
            "garbage": ("error", "bad-message"),
        }[kind]
    (programs.tmp_path / "fifo").write_text("")
    answer = asking.hear()
    while answer and answer["type"] == "step":
        answer = asking.hear()
    assert answer
    assert answer["record"]["result"] == "committed", programs.shown()
    if kind in ("accept", "status"):
        answer = peer.hear()
        assert answer
        assert answer["type"] == {"accept": "error", "status": "state"}[kind]
    assert web.greeting() == 2
    assert wait_for_end(web.pid)
    web.close()


FOREIGN = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.settimeout(10)
    connection.connect("gen-1.sock")
    if sys.argv[2] == "ask":
        try:
            connection.send(b'{"type":"stop"}')
        except BrokenPipeError:  # it has been refused already
            pass
    print(connection.recv(65536).decode())
    print(connection.recv(65536).decode())
"""


@AS_ROOT
@pytest.mark.parametrize("way", ["ask", "wait"])
def test_foreign_user(web: Web, way: str) -> None:
    """Another user, for whom somebody has opened the directory, is refused by uid, whatever it asks for."""
    path = web.directory.path
    os.chmod(path, 0o755)
    os.chmod(f"{path}/gen-1.sock", 0o666)

    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, path, way], capture_output=True, text=True, check=False, timeout=PATIENCE
    )

    os.chmod(path, 0o700)
    assert done.stdout.strip(), done.stderr
    assert json.loads(done.stdout) == {
        "type": "error",
        "code": "foreign-uid",
        "reason": "uid 65534 may not command a service of uid 0",
    }
    web.assert_unharmed()


def test_descriptors_used_up_by_the_service(programs: Programs) -> None:
    """A service without descriptors left tells so, and answers once it has some again."""
    program = SERVICE.replace(
        "import sys, handoff",
        "import os, resource, sys, handoff\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
    ).replace(
        "            connection.sendall",
        """            filling = []
            try:
                while True:
                    filling.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            connection.sendall(b"full ")
            connection.recv(1)
            for number in filling:
                os.close(number)
            connection.sendall""",
    )
    port = programs.serve(programs.script(program), "tcp://127.0.0.1:0")
    directory = RuntimeDirectory("web")
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        assert client.recv(5) == b"full "
        with directory.connect(timeout=PATIENCE) as connection:
            peer = Peer(connection)
            peer.say(encode(Kind.STATUS))
            unanswered = not select.select([connection], [], [], 0.1)[0]

            client.sendall(b"x")

            answer = peer.hear()
    directory.close()
    assert unanswered
    assert answer
    assert answer["type"] == "state"
    assert "Too many open files" in programs.shown()
