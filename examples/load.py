#!/usr/bin/env python3
"""Load an HTTP server and count every kind of failure.

A hot restart is right when no client notices it, so what matters here is not how many answers came but what became of
each request that got none: whether it was refused, reset, closed or cut, on which connection, and at which moment.

That is why nothing between the socket and the figures is borrowed. An HTTP library hides retries and reconnects, and an
asyncio transport whose send meets a reset throws away the answer that still waits in the receive queue. This file works
on plain sockets with the loop's readiness callbacks and reads answers with a small incremental parser, so what it does
at each byte can be read here. It also costs less: one core drives several thousand new connections a second.

What the figures mean:

* A request ends exactly once: `finished` (the right answer came, whole) or failed with one kind. The two are disjoint.
* A request of `--rate` is sent at its scheduled moment whether or not earlier ones were answered, and its latency
  counts from that moment: a server that stalls is charged for everybody who would have come meanwhile. The loop wakes
  in steps of 1 ms (epoll_wait(2)), so such a latency has up to 1 ms of its own; `lag` is the worst delay of a send. If
  that is large, this process was short of time, and the latencies tell more about it than about the server.
* Latencies are those of finished requests, without the slow ones. Percentiles are exact to 1 %; the largest is exact.
* Times are seconds of time.monotonic(), the same clock for all processes of a machine.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import enum
import errno
import ipaddress
import itertools
import json
import math
import os
import random
import resource
import secrets
import signal
import socket
import stat
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NoReturn, get_args

Load = Literal["new", "keep-alive", "slow", "saturate"]
Kind = Literal["refused", "reset", "closed", "timeout", "cut", "wrong", "connect"]
Emit = Callable[[Mapping[str, object]], None]

IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; the socket module of Python 3.10 doesn't know it
PROGRESS = 100  # requests from one `progress` event to the next
LOOPBACK_SOURCES: Final = 20  # each has its own 28,000 ephemeral ports (ip_local_port_range) to leave in TIME_WAIT
SUN_PATH_MOST: Final = 107  # unix(7): sun_path has 108 bytes, one of them the final NUL
READ_SIZE: Final = 16384
HEAD_MOST: Final = 65536
BODY_SPARE: Final = 65536  # how much longer than the right body a wrong one, an error page, is still read
SWEEP_INTERVAL: Final = 0.05  # how late a timeout may be noticed
LINGER_TIMEOUT: Final = 1.0
BACKLOG_RETRY: Final = 0.005
FAILURE_PAUSE: Final = 0.01  # a closed loop would else turn a refusing server into 20,000 failures a second
START_STEP: Final = 0.001  # clients that all connect at once overflow a backlog: a SYN dropped comes again after 1 s
SPARE_DESCRIPTORS: Final = 64

DESCRIPTION: Final = """\
Load an HTTP server and count every kind of failure. Give at least one load; all of them may run together.
The server has to answer GET /echo/TOKEN with `TOKEN` and a newline, and, for --slow, GET /slow/TOKEN/LINES/SECONDS with
LINES lines `TOKEN i`, one each SECONDS. Its headers X-Generation and X-Pid, if there are any, say who answered.
"""

EPILOG: Final = """\
output: JSON, one object a line, flushed; `at` and other moments are seconds of CLOCK_MONOTONIC.
  started     the first right answer arrived
  generation  the first answer by a generation and pid not seen before
  failure     a request failed, as it happens; `kind` is one of
                refused   nobody listens (ECONNREFUSED, or ENOENT for a Unix socket)
                connect   another error at connect
                reset     ECONNRESET or EPIPE before the first byte of the answer
                closed    end of file before the first byte of the answer
                cut       the answer began, but ended short
                timeout   no whole answer within --timeout
                wrong     a whole answer, but not the right one
  interval    the figures since the last mark, for each line `mark NAME` on standard input (with --until-eof)
  report      the last line: all figures
A kept connection that the server closes while no request is on it is no failure (`idle_closes`), but a reset of it is.

examples:
  load.py http://127.0.0.1:8000 --rate 500 --keep-alive 50 --slow 5 --duration 60
  load.py http+unix:///run/web.sock --saturate 32 --requests 100000

exit status: 0 whether or not requests failed (the report tells), 2 for a wrong command line, 1 if the output was closed
"""


class Malformed(Exception):
    """What the server sends isn't an HTTP/1 answer; the sentence says why."""


class Part(enum.Enum):
    """Which part of an answer the next byte belongs to."""

    HEAD = enum.auto()
    SIZED_BODY = enum.auto()
    CHUNK_SIZE = enum.auto()
    CHUNK = enum.auto()
    CHUNK_END = enum.auto()
    TRAILER = enum.auto()
    UNTIL_EOF = enum.auto()
    DONE = enum.auto()


class Answer:
    """An answer, parsed as its bytes arrive (RFC 9112).

    Bytes after its end stay in `excess`. A body that ends only with the connection never makes it whole, because a
    cut one looks the same.
    """

    __slots__ = (
        "_body_most",
        "_left",
        "_rest",
        "body",
        "excess",
        "generation",
        "part",
        "pid",
        "size",
        "status",
        "stays",
    )

    def __init__(self, body_most: int) -> None:
        self.part = Part.HEAD
        self.size = 0
        self.status: int | None = None
        self.stays = False
        self.generation: int | None = None
        self.pid: int | None = None
        self.body = b""
        self.excess = b""
        self._body_most = body_most
        self._rest = b""
        self._left = 0

    @property
    def whole(self) -> bool:
        """Whether its last byte has arrived."""
        return self.part is Part.DONE

    def feed(self, data: bytes) -> None:
        """Take the bytes that arrived next; raises Malformed."""
        self.size += len(data)
        self._rest += data
        while self.part is not Part.DONE and STEPS[self.part](self):
            pass
        if self.part is Part.DONE:
            self.excess = self._rest

    # Each of these takes its part off the rest and moves on, or returns False: not enough bytes yet.

    def _take_head(self) -> bool:
        if not b"HTTP/1.".startswith(self._rest[:7]):
            raise Malformed(f"it begins with {self._rest[:20]!r}, not with HTTP/1")
        end = self._rest.find(b"\r\n\r\n")
        if end < 0:
            if len(self._rest) > HEAD_MOST:
                raise Malformed(f"its head has more than {HEAD_MOST} bytes")
            return False
        status_line, *lines = self._rest[:end].decode("latin-1").split("\r\n")
        self._rest = self._rest[end + 4 :]
        version, _, status_and_reason = status_line.partition(" ")
        status = status_and_reason[:3]
        if not (len(status) == 3 and status.isdecimal()):
            raise Malformed(f"its status line is {status_line!r}")
        self.status = int(status)
        if 100 <= self.status < 200:  # interim: the answer proper follows
            return True
        fields = {}
        for line in lines:
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        self.generation = integer(fields.get("x-generation"))
        self.pid = integer(fields.get("x-pid"))
        connection = fields.get("connection", "").lower()
        self.stays = "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection
        if self.status in (204, 304):
            self.part = Part.DONE
        elif fields.get("transfer-encoding", "").lower() == "chunked":
            self.part = Part.CHUNK_SIZE
        elif "content-length" in fields:
            self._expect(integer(fields["content-length"]), f"Content-Length: {fields['content-length']}")
            self.part = Part.SIZED_BODY
        else:
            self.part = Part.UNTIL_EOF
        return True

    def _take_sized_body(self) -> bool:
        if not self._take_left():
            return False
        self.part = Part.DONE
        return True

    def _take_chunk_size(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        size = line.partition(b";")[0].strip()
        try:
            self._expect(int(size, 16), f"a chunk size of {size!r}")
        except ValueError:
            raise Malformed(f"its chunk size is {size!r}") from None
        self.part = Part.CHUNK if self._left else Part.TRAILER
        return True

    def _take_chunk(self) -> bool:
        if not self._take_left():
            return False
        self.part = Part.CHUNK_END
        return True

    def _take_chunk_end(self) -> bool:
        if len(self._rest) < 2:
            return False
        if self._rest[:2] != b"\r\n":
            raise Malformed(f"a chunk is followed by {self._rest[:2]!r}")
        self._rest = self._rest[2:]
        self.part = Part.CHUNK_SIZE
        return True

    def _take_trailer(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        if not line:
            self.part = Part.DONE
        return True

    def _take_until_eof(self) -> bool:
        if len(self.body) < self._body_most:
            self.body += self._rest
        self._rest = b""
        return False

    def _expect(self, size: int | None, told: str) -> None:
        if size is None or size < 0:
            raise Malformed(f"it has {told}")
        if len(self.body) + size > self._body_most:
            raise Malformed(f"it has {told}, far more than the right answer")
        self._left = size

    def _take_left(self) -> bool:
        if len(self._rest) < self._left:
            return False
        self.body += self._rest[: self._left]
        self._rest = self._rest[self._left :]
        return True

    def _take_line(self) -> bytes | None:
        end = self._rest.find(b"\r\n")
        if end < 0:
            if len(self._rest) > HEAD_MOST:
                raise Malformed(f"a line in its body has more than {HEAD_MOST} bytes")
            return None
        line, self._rest = self._rest[:end], self._rest[end + 2 :]
        return line


STEPS: Final[Mapping[Part, Callable[[Answer], bool]]] = {
    Part.HEAD: Answer._take_head,
    Part.SIZED_BODY: Answer._take_sized_body,
    Part.CHUNK_SIZE: Answer._take_chunk_size,
    Part.CHUNK: Answer._take_chunk,
    Part.CHUNK_END: Answer._take_chunk_end,
    Part.TRAILER: Answer._take_trailer,
    Part.UNTIL_EOF: Answer._take_until_eof,
}


def integer(text: str | None) -> int | None:
    """Read a decimal number that isn't negative; None if it's absent or something else."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else None


class Latencies:
    """Counts of latencies in buckets 1 % wide.

    Sorting all samples at a mark would stop the load for some 10 ms just when an upgrade begins, and keeping them
    would take memory without bound.
    """

    _SHORTEST: Final = 1e-6
    _SCALE: Final = 1 / math.log(1.01)
    _BUCKETS: Final = 2100  # up to about 1,100 s

    def __init__(self) -> None:
        self.slowest: float | None = None
        self._counts = [0] * self._BUCKETS
        self._total = 0

    def record(self, latency: float) -> None:
        """Count one latency."""
        if self.slowest is None or latency > self.slowest:
            self.slowest = latency
        bucket = int(math.log(latency / self._SHORTEST) * self._SCALE) if latency > self._SHORTEST else 0
        self._counts[min(bucket, self._BUCKETS - 1)] += 1
        self._total += 1

    def add(self, other: "Latencies") -> None:
        """Count all that the other has counted."""
        if other.slowest is not None:
            self.slowest = max(other.slowest, self.slowest or 0.0)
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._total += other._total

    def quantile(self, share: float) -> float | None:
        """Return the latency that this share (0 to 1) of the requests did not exceed; None if there were none."""
        if self.slowest is None:
            return None
        rank = max(1, math.ceil(share * self._total))
        for bucket, reached in enumerate(itertools.accumulate(self._counts)):
            if reached >= rank:
                return rounded(min(self.slowest, self._SHORTEST * math.exp((bucket + 1) / self._SCALE)))
        return rounded(self.slowest)


def rounded(moment: float | None) -> float | None:
    """Round to microseconds; more digits would be noise."""
    return None if moment is None else round(moment, 6)


class Interval:
    """The figures between two marks."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.finished = 0
        self.failed = 0
        self.lag = 0.0
        self.latencies = Latencies()


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where and when a request was sent, for relating a failure to what the server did then."""

    load: Load
    sent_at: float
    connected_at: float | None
    local_port: int | None
    answer: Answer | None


class Tally:
    """All figures of a run; emits an event for each thing that a parent may want to know at once."""

    def __init__(self, emit: Emit) -> None:
        self.skipped = 0
        self.idle_closes = 0
        self._emit = emit
        self._start = self._last_end = time.monotonic()
        self._finished: collections.Counter[Load] = collections.Counter()
        self._failed: collections.Counter[Load] = collections.Counter()
        self._kinds: collections.Counter[Kind] = collections.Counter()
        self._generations: collections.Counter[int] = collections.Counter()
        self._seen: set[tuple[int | None, int | None]] = set()
        self._started = False
        self._before_start: list[Mapping[str, object]] = []
        self._ended = 0
        self._interval = Interval(self._start)
        self._latencies = Latencies()
        self._lag = 0.0

    def sent(self, due: float, now: float) -> None:
        """Note that a request due at one moment was sent at another."""
        self._interval.lag = max(self._interval.lag, now - due)

    def met(self, answer: Answer) -> None:
        """Note who answers, as soon as the head of the answer tells."""
        server = (answer.generation, answer.pid)
        if server in self._seen or server == (None, None):
            return
        self._seen.add(server)
        event = {"event": "generation", "generation": answer.generation, "pid": answer.pid, "at": moment()}
        if self._started:
            self._emit(event)
        else:  # `started` is promised to come first
            self._before_start.append(event)

    def finished(self, load: Load, due: float, now: float, generation: int | None) -> None:
        """Count a right answer to a request due at `due`."""
        if not self._started:
            self._started = True
            self._emit({"event": "started", "at": rounded(now)})
            for event in self._before_start:
                self._emit(event)
        self._last_end = now
        self._finished[load] += 1
        self._interval.finished += 1
        self._progress()
        if generation is not None:
            self._generations[generation] += 1
        if load != "slow":
            self._interval.latencies.record(now - due)

    def failed(self, kind: Kind, origin: Origin, detail: str) -> None:
        """Count a failure and tell it."""
        now = self._last_end = time.monotonic()
        self._failed[origin.load] += 1
        self._kinds[kind] += 1
        self._interval.failed += 1
        self._progress()
        self._emit(
            {
                "event": "failure",
                "kind": kind,
                "load": origin.load,
                "at": rounded(now),
                "sent_at": rounded(origin.sent_at),
                "connected_at": rounded(origin.connected_at),
                "local_port": origin.local_port,
                "pid": origin.answer.pid if origin.answer else None,
                "generation": origin.answer.generation if origin.answer else None,
                "detail": detail,
            }
        )

    def _progress(self) -> None:
        self._ended += 1
        if self._ended % PROGRESS == 0:
            self._emit({"event": "progress", "ended": self._ended})

    def mark(self, name: str) -> None:
        """Tell the figures since the last mark and begin a new interval."""
        now = time.monotonic()
        ended = self._next_interval(now)
        self._emit(
            {
                "event": "interval",
                "name": name,
                "from": rounded(ended.start),
                "to": rounded(now),
                "finished": ended.finished,
                "failed": ended.failed,
                "slowest": rounded(ended.latencies.slowest),
                "p50": ended.latencies.quantile(0.5),
                "p99": ended.latencies.quantile(0.99),
                "lag": rounded(ended.lag),
            }
        )

    def report(self, sending_until: float) -> None:
        """Tell all figures; `sending_until` is the moment after which nothing was sent any more."""
        self._next_interval(time.monotonic())
        seconds = max(self._last_end, sending_until) - self._start
        finished = sum(self._finished.values())
        for event in () if self._started else self._before_start:
            self._emit(event)
        self._emit(
            {
                "event": "report",
                "finished": finished,
                "failed": {kind: self._kinds[kind] for kind in get_args(Kind)},
                "failures": sum(self._kinds.values()),
                "skipped": self.skipped,
                "idle_closes": self.idle_closes,
                "seconds": rounded(seconds),
                "rate": round(finished / seconds, 1) if seconds > 0 else 0.0,
                "latency": {
                    "p50": self._latencies.quantile(0.5),
                    "p99": self._latencies.quantile(0.99),
                    "p999": self._latencies.quantile(0.999),
                    "max": rounded(self._latencies.slowest),
                },
                "lag": rounded(self._lag),
                "by_load": {
                    load: {"finished": self._finished[load], "failed": self._failed[load]} for load in get_args(Load)
                },
                "by_generation": {str(generation): n for generation, n in sorted(self._generations.items())},
            }
        )

    def _next_interval(self, now: float) -> Interval:
        ended, self._interval = self._interval, Interval(now)
        self._latencies.add(ended.latencies)
        self._lag = max(self._lag, ended.lag)
        return ended


def moment() -> float:
    """Return the time in the form in which events tell it."""
    return round(time.monotonic(), 6)


@dataclasses.dataclass(frozen=True)
class Target:
    """The server to load: where to connect to, and from which addresses in turn (none: the kernel chooses)."""

    family: socket.AddressFamily
    address: Any  # what socket.connect takes: a path, or a tuple that depends on the family
    host: str
    sources: tuple[tuple[str, int], ...]


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One request and whom to tell, with True if the right answer came, that it has ended."""

    load: Load
    path: str
    bodies: tuple[bytes, ...]
    bound: float
    due: float
    ended: Callable[[bool], None]
    sent_at: float = 0.0


class State(enum.Enum):
    """What a connection is there for at the moment."""

    FRESH = enum.auto()
    CONNECTING = enum.auto()
    ASKED = enum.auto()
    IDLE = enum.auto()
    LINGERING = enum.auto()
    CLOSED = enum.auto()


class Connection:
    """One connection with at most one request on it; owns its socket.

    A connection whose answer was its last one lingers until the server closes it, because who closes first keeps the
    port in TIME_WAIT, and a client that does so at thousands of connections a second runs out of ports.
    """

    __slots__ = (
        "_answer",
        "_connected_at",
        "_keep",
        "_load",
        "_local_port",
        "_request",
        "_run",
        "_send_error",
        "_sent_at",
        "_socket",
        "_unsent",
        "deadline",
        "state",
    )

    def __init__(self, run: "Run", *, keep: bool) -> None:
        self.state = State.FRESH
        self.deadline = math.inf
        self._run = run
        self._keep = keep
        self._request: Request | None = None
        self._load: Load = "new"
        self._sent_at = 0.0
        self._socket: socket.socket | None = None
        self._connected_at: float | None = None
        self._local_port: int | None = None
        self._answer: Answer | None = None
        self._unsent = b""
        self._send_error: OSError | None = None

    def still_open(self) -> bool:
        """Tell whether an idle connection can take a request, from what the kernel knows now.

        As careful clients do (urllib3 polls before it uses a connection again); else a busy loop here would count an
        end of file that had arrived in time as a failure of the server.
        """
        if self.state is State.IDLE:
            self._readable()
        return self.state is State.IDLE

    def send(self, request: Request) -> None:
        """Send a request, first connecting if fresh; how it ends is told to the request, maybe before this returns."""
        assert self.state in (State.FRESH, State.IDLE)
        self._request = request
        self._load = request.load
        self._sent_at = request.sent_at
        self.deadline = request.sent_at + request.bound
        self._answer = None
        connection = "" if self._keep else "Connection: close\r\n"
        self._unsent = f"GET {request.path} HTTP/1.1\r\nHost: {self._run.target.host}\r\n{connection}\r\n".encode()
        if self.state is State.IDLE:
            self.state = State.ASKED
            self._write()
        else:
            self.state = State.CONNECTING
            self._run.opened(self)
            self._connect()

    def linger(self) -> None:
        """Wait for the server to close, but not for long."""
        self.state = State.LINGERING
        self.deadline = time.monotonic() + LINGER_TIMEOUT
        self._run.lingers(self)

    def overdue(self) -> None:
        """End what took longer than it may."""
        if self._request is None:
            self.close()
        elif self.state is State.CONNECTING:
            self._fail("timeout", f"no connection within {self._request.bound:g} s")
        elif self._answer is None:
            self._fail("timeout", f"no answer within {self._request.bound:g} s")
        else:
            self._fail(
                "timeout", f"{self._answer.size} bytes of the answer, but no end within {self._request.bound:g} s"
            )

    def close(self) -> None:
        """Close the socket; nothing is told to anybody."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._socket is not None:
            self._run.loop.remove_reader(self._socket.fileno())
            self._run.loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self._run.closed(self)

    def _connect(self) -> None:
        if self.state is not State.CONNECTING:
            return  # timed out before this retry
        target = self._run.target
        try:
            if self._socket is None:
                self._socket = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                if target.sources:
                    # Without this flag bind() takes a port that no other connection from the address may have,
                    # whatever its peer.
                    self._socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                    self._socket.bind(self._run.next_source())
            error = self._socket.connect_ex(target.address)
        except OSError as unready:
            self._fail("connect", str(unready))
            return
        if error == errno.EAGAIN and target.family == socket.AF_UNIX:
            # The backlog is full. A blocking connect() would wait for room, but nothing tells a nonblocking one when
            # there is some: connect(2).
            self._run.loop.call_later(BACKLOG_RETRY, self._connect)
        elif error in (0, errno.EINPROGRESS):
            # On the loopback the handshake is over when connect() returns, even if that says EINPROGRESS; where it
            # isn't, the send says EAGAIN and is repeated.
            self._write()
        else:
            self._refused(OSError(error, os.strerror(error)))

    def _refused(self, error: OSError) -> None:
        refused = error.errno in (errno.ECONNREFUSED, errno.ENOENT)
        self._fail("refused" if refused else "connect", str(error))

    def _write(self) -> None:
        assert self._socket is not None
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            self._run.loop.add_writer(self._socket.fileno(), self._write)
            return
        except OSError as error:
            # These two can only be met by a connection that existed: a reset that answers a SYN is ECONNREFUSED.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE) and self.state is State.CONNECTING:
                self._refused(error)
                return
            # An answer sent before the reset may still be there to read, and the request can't be completed now.
            self._send_error = error
            sent = len(self._unsent)
        if self.state is State.CONNECTING:
            self._is_connected()
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._run.loop.add_writer(self._socket.fileno(), self._write)
            return
        self._run.loop.remove_writer(self._socket.fileno())
        if self._send_error is not None:
            self._readable()

    def _is_connected(self) -> None:
        assert self._socket is not None
        self.state = State.ASKED
        self._connected_at = time.monotonic()
        if self._run.target.family != socket.AF_UNIX:
            self._local_port = self._socket.getsockname()[1]
        self._run.loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._ended(error)
            return
        if not data:
            self._ended(self._send_error)
        elif self.state is State.ASKED:
            self._answered(data)
        else:
            self._run.tally.failed("wrong", self._origin(), f"bytes that no request asked for: {data[:80]!r}")
            self.close()

    def _answered(self, data: bytes) -> None:
        request = self._request
        assert request is not None
        answer = self._answer
        if answer is None:
            answer = self._answer = Answer(max(map(len, request.bodies)) + BODY_SPARE)
        headless = answer.part is Part.HEAD
        try:
            answer.feed(data)
        except Malformed as why:
            self._fail("wrong", f"not an answer: {why}")
            return
        if headless and answer.part is not Part.HEAD:
            self._run.tally.met(answer)
        if not answer.whole:
            return
        if answer.excess:
            self._fail("wrong", f"the answer is followed by {answer.excess[:80]!r}")
        elif answer.status != 200:
            self._fail("wrong", f"status {answer.status}, body {answer.body[:80]!r}")
        elif answer.body not in request.bodies:
            self._fail("wrong", f"body {answer.body[:80]!r}, not {request.bodies[0][:80]!r}")
        else:
            self._finish(request, answer)

    def _finish(self, request: Request, answer: Answer) -> None:
        self._request = None
        if self._keep and answer.stays:
            self.state = State.IDLE
            self.deadline = math.inf
        else:
            self.linger()
        self._run.finished(request, answer)

    def _ended(self, error: OSError | None) -> None:
        """End of file (None) or an error, whatever the connection was there for."""
        if self._request is not None:
            self._fail(*self._why(error))
        elif self.state is State.IDLE and error is None:
            self._run.tally.idle_closes += 1
            self.close()
        elif self.state is State.IDLE:
            self._run.tally.failed("reset", self._origin(), f"no request was on the connection: {error}")
            self.close()
        else:
            self.close()

    def _why(self, error: OSError | None) -> tuple[Kind, str]:
        how = "end of file" if error is None else str(error)
        answer = self._answer
        if answer is None:
            return ("closed" if error is None else "reset"), f"{how} before the answer"
        if error is None and answer.part is Part.UNTIL_EOF:
            return "wrong", "neither Content-Length nor chunked: the end of the answer can't be told from a cut"
        return "cut", f"{how} after {answer.size} bytes of the answer"

    def _fail(self, kind: Kind, detail: str) -> None:
        request, self._request = self._request, None
        assert request is not None
        self.close()
        self._run.failed(request, kind, self._origin(), detail)

    def _origin(self) -> Origin:
        return Origin(self._load, self._sent_at, self._connected_at, self._local_port, self._answer)


class OpenLoop:
    """Sends by a schedule, whatever becomes of the requests before."""

    def __init__(self, run: "Run", rate: float, room: int) -> None:
        self._run = run
        self._rate = rate
        self._room = room
        self._open = 0
        self._count = 0
        self._start = self._due = run.loop.time()
        self._timer = run.loop.call_soon(self._send_due)

    def stop(self) -> None:
        """Send no more."""
        self._timer.cancel()

    def _send_due(self) -> None:
        now = self._run.loop.time()
        while self._due <= now:
            if not self._run.may_send():
                return
            if self._open < self._room:
                self._open += 1
                request = self._run.echo("new", self._due, self._ended)
                Connection(self._run, keep=False).send(request)
            else:
                self._run.tally.skipped += 1
            self._count += 1
            self._due = self._start + self._count / self._rate  # a sum of periods would drift
        self._timer = self._run.loop.call_at(self._due, self._send_due)

    def _ended(self, right: bool) -> None:
        self._open -= 1


class Client:
    """A closed loop: asks again when it was answered, after a random gap."""

    def __init__(self, run: "Run", load: Load, *, keep: bool, gap: float, delay: float) -> None:
        self._run = run
        self._load = load
        self._keep = keep
        self._gap = gap
        self._connection: Connection | None = None
        self._timer: asyncio.TimerHandle = run.loop.call_later(delay, self._ask)

    def stop(self) -> None:
        """Ask no more; an open request goes on."""
        self._timer.cancel()
        if self._connection is not None and self._connection.state is State.IDLE:
            self._connection.close()

    def _ask(self) -> None:
        if not self._run.may_send():
            return
        if self._connection is None or not self._connection.still_open():
            self._connection = Connection(self._run, keep=self._keep)
        ask = self._run.slow if self._load == "slow" else self._run.echo
        self._connection.send(ask(self._load, self._run.loop.time(), self._ended))

    def _ended(self, right: bool) -> None:
        if not self._run.may_send():
            self.stop()
        elif self._gap or not right:
            pause = random.uniform(0, self._gap)
            self._timer = self._run.loop.call_later(pause if right else max(pause, FAILURE_PAUSE), self._ask)
        else:
            self._ask()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do, as the command line says."""

    target: Target
    rate: float | None
    keep_alive: int
    gap: float
    slow: int
    slow_lines: int
    slow_interval: float
    saturate: int
    duration: float
    requests: int | None
    timeout: float
    most_open: int
    until_eof: bool

    @property
    def clients(self) -> int:
        """How many connections the closed loops may need at once; the open loop has the rest."""
        return self.keep_alive + self.slow + self.saturate


class Run:
    """One run from the first request to the report; owns all connections."""

    def __init__(self, plan: Plan, tally: Tally, loop: asyncio.AbstractEventLoop) -> None:
        self.target = plan.target
        self.tally = tally
        self.loop = loop
        self._plan = plan
        self._sources: Iterator[tuple[str, int]] = itertools.cycle(plan.target.sources)
        self._tokens = (f"{secrets.token_hex(4)}-{i}" for i in itertools.count())
        self._connections: dict[Connection, None] = {}
        self._lingering: dict[Connection, None] = {}
        self._loads: list[OpenLoop | Client] = []
        self._sent = 0
        self._waiting = 0
        self._stopped_at: float | None = None
        self._done: asyncio.Future[None] = loop.create_future()
        self._input = b""

    async def complete(self) -> None:
        """Send until a limit is reached or somebody says so, wait for the open requests, and report."""
        # An exception in a callback is a bug of this file; if the loop merely logged it, the figures would be wrong.
        self.loop.set_exception_handler(self._crash)
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.stop)
        if self._plan.until_eof:
            self.loop.add_reader(sys.stdin.fileno(), self._read_input)
        self.loop.call_later(self._plan.duration, self.stop)
        self.loop.call_later(SWEEP_INTERVAL, self._sweep)
        self._begin()
        try:
            await self._done
        finally:
            for connection in list(self._connections):
                connection.close()
        self.tally.report(self._stopped_at or time.monotonic())

    def stop(self) -> None:
        """Send no more; the run is over when the open requests have ended, which --timeout bounds."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            for load in self._loads:
                load.stop()
            self._settle()

    def may_send(self) -> bool:
        """Tell whether another request may be sent."""
        return self._stopped_at is None and (self._plan.requests is None or self._sent < self._plan.requests)

    def echo(self, load: Load, due: float, ended: Callable[[bool], None]) -> Request:
        """Make a plain request, to be sent at once."""
        token = next(self._tokens)
        body = f"{token}\n".encode()
        return self._sending(Request(load, f"/echo/{token}", (body,), self._plan.timeout, due, ended))

    def slow(self, load: Load, due: float, ended: Callable[[bool], None]) -> Request:
        """Make a request for a slow answer, to be sent at once."""
        token, lines, interval = next(self._tokens), self._plan.slow_lines, self._plan.slow_interval
        # Where counting starts is up to the server.
        bodies = tuple("".join(f"{token} {first + i}\n" for i in range(lines)).encode() for first in (0, 1))
        bound = self._plan.timeout + lines * interval
        return self._sending(Request(load, f"/slow/{token}/{lines}/{interval:g}", bodies, bound, due, ended))

    def next_source(self) -> tuple[str, int]:
        """Return the address to connect from."""
        return next(self._sources)

    def opened(self, connection: Connection) -> None:
        """Count a connection in; what lingers makes room, so there are never more than allowed."""
        if len(self._connections) >= self._plan.most_open and self._lingering:
            next(iter(self._lingering)).close()
        self._connections[connection] = None

    def lingers(self, connection: Connection) -> None:
        """Note that a connection waits for the server to close it."""
        self._lingering[connection] = None

    def closed(self, connection: Connection) -> None:
        """Count a connection out."""
        self._connections.pop(connection, None)
        self._lingering.pop(connection, None)

    def finished(self, request: Request, answer: Answer) -> None:
        """Count a right answer."""
        self._waiting -= 1
        self.tally.finished(request.load, request.due, time.monotonic(), answer.generation)
        request.ended(True)
        self._settle()

    def failed(self, request: Request, kind: Kind, origin: Origin, detail: str) -> None:
        """Count a request that failed."""
        self._waiting -= 1
        self.tally.failed(kind, origin, detail)
        request.ended(False)
        self._settle()

    def _begin(self) -> None:
        plan, delays = self._plan, (START_STEP * i for i in itertools.count())
        if plan.rate is not None:
            self._loads.append(OpenLoop(self, plan.rate, plan.most_open - plan.clients))
        for _ in range(plan.keep_alive):
            delay = random.uniform(0, plan.gap) if plan.gap else next(delays)
            self._loads.append(Client(self, "keep-alive", keep=True, gap=plan.gap, delay=delay))
        for _ in range(plan.slow):
            self._loads.append(Client(self, "slow", keep=False, gap=0, delay=next(delays)))
        for i in range(plan.saturate):
            self._loads.append(Client(self, "saturate", keep=i % 2 == 1, gap=0, delay=next(delays)))

    def _sending(self, request: Request) -> Request:
        request.sent_at = self.loop.time()
        self._sent += 1
        self._waiting += 1
        self.tally.sent(request.due, request.sent_at)
        if self._sent == self._plan.requests:
            self.loop.call_soon(self.stop)  # after the sender has put this one on its connection
        return request

    def _settle(self) -> None:
        if self._stopped_at is not None and self._waiting == 0 and not self._done.done():
            self._done.set_result(None)

    def _sweep(self) -> None:
        # One look at all of them costs less than a timer set and cancelled for each request.
        now = time.monotonic()
        for connection in [each for each in self._connections if each.deadline <= now]:
            connection.overdue()
        self.loop.call_later(SWEEP_INTERVAL, self._sweep)

    def _read_input(self) -> None:
        data = os.read(sys.stdin.fileno(), READ_SIZE)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            self._obey(line.decode(errors="replace"))
        if not data:
            self.loop.remove_reader(sys.stdin.fileno())
            self.stop()

    def _obey(self, line: str) -> None:
        command, _, name = line.strip().partition(" ")
        if command == "mark" and name:
            self.tally.mark(name)
        else:
            sys.stderr.write(f"load: standard input: only `mark NAME` is understood, not {line!r}\n")

    def _crash(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._done.done():
            self._done.set_exception(context.get("exception") or RuntimeError(context["message"]))


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"load: {message}; see `load.py --help`\n")


def count(text: str) -> int:
    """Read how many."""
    number = integer(text)
    if not number:
        raise argparse.ArgumentTypeError(f"must be a whole number over 0, not {text!r}")
    return number


def positive(text: str) -> float:
    """Read a number over 0."""
    number = span(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"must be a number over 0, not {text!r}")
    return number


def span(text: str) -> float:
    """Read a number that may be 0."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if 0 <= number < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number and not negative, not {text!r}")


def resolve(url: str) -> Target:
    """Read the URL; a name is looked up here, once."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{url!r}: {error}") from None
    if parts.scheme == "http+unix" and not parts.netloc and len(parts.path) > 1:
        path = urllib.parse.unquote(parts.path)
        if len(os.fsencode(path)) > SUN_PATH_MOST:
            raise argparse.ArgumentTypeError(f"{path!r} is longer than the {SUN_PATH_MOST} bytes of a socket's path")
        return Target(socket.AF_UNIX, path, "localhost", ())
    if parts.scheme != "http" or not host or parts.path not in ("", "/") or parts.query:
        raise argparse.ArgumentTypeError(f"must be http://HOST:PORT or http+unix:///PATH, not {url!r}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{host!r}: {error.strerror}") from None
    # `localhost` is often ::1 first, while a server told to listen on it is at 127.0.0.1 only.
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    sources: tuple[tuple[str, int], ...] = ()
    if family == socket.AF_INET and ipaddress.ip_address(address[0]).is_loopback:
        # Never the server's own address: while its port is free, a connection from there may get that very port,
        # connect to itself (RFC 9293, 3.5: simultaneous open), and keep the server from binding it again.
        hosts = (f"127.0.0.{i}" for i in range(2, LOOPBACK_SOURCES + 3))
        sources = tuple((each, 0) for each in hosts if each != address[0])[:LOOPBACK_SOURCES]
    return Target(family, address, parts.netloc, sources)


def make_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(
        prog="load.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="URL", type=resolve, help="http://HOST:PORT or http+unix:///PATH")
    loads = parser.add_argument_group("loads")
    loads.add_argument(
        "--rate",
        metavar="N",
        type=positive,
        help="N new connections a second with one request each, by a schedule that waits for no answer",
    )
    loads.add_argument(
        "--keep-alive",
        metavar="N",
        type=count,
        default=0,
        help="N clients that send request after request over a kept connection",
    )
    loads.add_argument(
        "--gap",
        metavar="S",
        type=span,
        default=0.5,
        help="a kept client waits between 0 and S seconds before its next request (default: 0.5)",
    )
    loads.add_argument(
        "--slow",
        metavar="N",
        type=count,
        default=0,
        help="N clients that ask for slow answers one after another, each on a new connection",
    )
    loads.add_argument("--slow-lines", metavar="N", type=count, default=20, help="lines of a slow answer (default: 20)")
    loads.add_argument(
        "--slow-interval",
        metavar="S",
        type=span,
        default=0.1,
        help="seconds between the lines of a slow answer (default: 0.1)",
    )
    loads.add_argument(
        "--saturate",
        metavar="N",
        type=count,
        default=0,
        help="N clients as fast as they can: one half on new connections, the other half on kept ones",
    )
    limits = parser.add_argument_group("limits", "After the first limit reached nothing is sent; open requests finish.")
    limits.add_argument(
        "--duration",
        metavar="S",
        type=positive,
        default=10.0,
        help="send for at most S seconds, with --until-eof too (default: 10)",
    )
    limits.add_argument("--requests", metavar="N", type=count, help="send N requests at most (default: no such limit)")
    limits.add_argument(
        "--until-eof",
        action="store_true",
        help="stop when standard input ends too, and obey `mark NAME` lines on it; SIGINT and SIGTERM always stop",
    )
    limits.add_argument(
        "--timeout",
        metavar="S",
        type=positive,
        default=10.0,
        help="seconds for a request with its connect; a slow answer has the time it needs in addition (default: 10)",
    )
    limits.add_argument(
        "--most-open",
        metavar="N",
        type=count,
        default=2000,
        help="connections at once; a request of --rate that finds no room is counted as skipped (default: 2000)",
    )
    return parser


def read_plan(arguments: list[str]) -> Plan:
    """Read the command line and check what depends on more than one option; exits with status 2 if it's wrong."""
    parser = make_parser()
    plan = Plan(**vars(parser.parse_args(arguments)))
    if plan.rate is None and not plan.clients:
        parser.error("nothing to do: give at least one of --rate, --keep-alive, --slow and --saturate")
    if plan.clients + (plan.rate is not None) > plan.most_open:
        parser.error(f"{plan.clients} clients (and 1 for --rate) don't fit in --most-open {plan.most_open}; raise it")
    if plan.until_eof and not can_wait_for_input():
        parser.error("--until-eof needs a pipe, a socket or a terminal as standard input")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = plan.most_open + SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and need > hard:
        parser.error(
            f"--most-open {plan.most_open} needs {need} descriptors, the limit is {hard}; lower one or raise it"
        )
    if soft != resource.RLIM_INFINITY and need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    return plan


def can_wait_for_input() -> bool:
    """Tell whether epoll takes standard input; a file is EPERM: epoll_ctl(2)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, AttributeError):  # closed: sys.stdin is None
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or sys.stdin.isatty()


def emit(event: Mapping[str, object]) -> None:
    """Print one event as a line, now."""
    sys.stdout.write(f"{json.dumps(event)}\n")
    sys.stdout.flush()


async def load(plan: Plan) -> None:
    """Carry out a plan and print its events."""
    await Run(plan, Tally(emit), asyncio.get_running_loop()).complete()


def main() -> int:
    """Run the command line; returns the exit status."""
    plan = read_plan(sys.argv[1:])
    try:
        asyncio.run(load(plan))
    except BrokenPipeError:
        sys.stderr.write("load: standard output was closed by its reader\n")
        # Else the interpreter meets the same error when it flushes at its exit, and complains again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
