"""The relay of a new program's standard error: passed on whole, last words kept, nobody blocked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import socket
import threading
import tty
from collections.abc import Iterator

import pytest

from handoff.runtime.loop import Loop
from handoff.runtime.relay import LAST_WORDS, Relay

PATIENCE = 10.0


class Stage:
    """A relay from a pipe to a target, in a loop that the test drives."""

    def __init__(self, target: int, reading: int, result: int) -> None:
        self.loop = Loop()
        pipe, self.writing = os.pipe2(os.O_CLOEXEC)
        self.relay = Relay(self.loop, pipe, target)
        self.target = target
        self.result = result  # where what was passed on is read
        self._owned = {target, reading, result}

    def write(self, text: bytes) -> None:
        """Write as the new program does; must fit into the pipe."""
        assert os.write(self.writing, text) == len(text)

    def hang_up(self) -> None:
        """Close the last writing end."""
        os.close(self.writing)
        self.writing = -1

    def turn(self, seconds: float = 0.0) -> None:
        """Let the loop run for as long as something happens, and `seconds` longer."""
        while self.loop._poll.poll(0):
            self.loop._round()
        if seconds:
            self.loop.after(seconds, lambda: None)
            self.loop._round()

    def read(self) -> bytes:
        """Everything that has been passed on."""
        pieces = []
        while select.select([self.result], [], [], 0)[0]:
            try:
                piece = os.read(self.result, 65536)
            except OSError:  # a terminal whose other side is closed
                break
            if not piece:
                break
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close everything."""
        self.relay.close()
        self.loop.end()
        self.loop.run()
        if self.writing >= 0:
            os.close(self.writing)
        for descriptor in self._owned:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A relay to a pipe."""
    result, target = os.pipe2(os.O_CLOEXEC)
    made = Stage(target, result, result)
    yield made
    made.close()


def fill(target: int) -> int:
    """Fill a target until it takes nothing any more; returns how many bytes that took."""
    size = 0
    os.set_blocking(target, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(target, b"." * 1024)
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(target, b".")
    os.set_blocking(target, True)
    return size


def lines(number: int) -> bytes:
    """That many numbered lines."""
    return b"".join(b"line %06d\n" % count for count in range(number))


def test_passed_on(stage: Stage) -> None:
    """What the new program writes comes out at the target, as it was."""
    stage.write(b"hello\xff\n")

    stage.turn()

    assert stage.read() == b"hello\xff\n"


def test_last_words(stage: Stage) -> None:
    """What the new program wrote last is kept, also what still lies in the pipe."""
    stage.write(b"first\n")
    stage.turn()
    stage.write(b"last\n")

    assert stage.relay.last_words == "first\nlast"


def test_no_last_words(stage: Stage) -> None:
    """A program that wrote nothing has no last words."""
    assert stage.relay.last_words == ""


@pytest.mark.parametrize("piece", [1, 11, 4096, 5000])
def test_last_words_are_bounded(stage: Stage, piece: int) -> None:
    """However much is written, in whatever pieces, only the end is kept."""
    text = lines(3000)
    passed = b""

    for start in range(0, len(text), piece):
        stage.write(text[start : start + piece])
        stage.turn()
        passed += stage.read()

    assert stage.relay.last_words == text[-LAST_WORDS:].decode().strip()
    assert stage.relay._size < LAST_WORDS + select.PIPE_BUF
    assert passed == text


def test_last_words_that_are_no_text(stage: Stage) -> None:
    """Bytes that are no UTF-8, or half a character at the cut, do no harm."""
    stage.write("ü".encode() * LAST_WORDS + b"\xff")

    words = stage.relay.last_words

    assert words.endswith("ü\N{REPLACEMENT CHARACTER}")


def test_target_that_takes_nothing(stage: Stage) -> None:
    """While the target takes nothing the relay waits without blocking, and afterwards no line is lost."""
    filled = fill(stage.target)
    text = lines(3000)
    stage.write(text)

    stage.turn()
    stage.turn()

    passed = b""
    while len(passed) < filled + len(text) and (piece := stage.read()):
        passed += piece
        stage.turn()
    assert passed == b"." * filled + text


def test_waiting_for_a_target_costs_nothing(stage: Stage) -> None:
    """A target that takes nothing does not make the loop turn."""
    fill(stage.target)
    stage.write(lines(10))
    stage.turn()

    ready = stage.loop._poll.poll(20)

    assert ready == []


def test_last_words_of_a_stuck_target(stage: Stage) -> None:
    """Asking for last words does not block while the target takes nothing."""
    stage.write(b"first\n")
    stage.turn()
    fill(stage.target)
    stage.write(b"last\n")

    assert stage.relay.last_words == "first"


def test_writer_is_not_cut_off(stage: Stage) -> None:
    """A program that writes more than the pipe holds waits for the target, and goes on with it."""
    text = lines(20_000)
    passed = b""

    def write() -> None:
        os.write(stage.writing, text)
        stage.hang_up()

    writer = threading.Thread(target=write)
    writer.start()
    while len(passed) < len(text):
        stage.turn(0.001)
        passed += stage.read()
    writer.join(PATIENCE)

    assert passed == text


def test_end_of_file(stage: Stage) -> None:
    """When nobody writes any more the relay ends by itself, and the last words stay."""
    stage.write(b"last\n")
    stage.hang_up()

    stage.turn()

    assert stage.relay._pipe == -1
    assert stage.relay.last_words == "last"
    assert stage.read() == b"last\n"


def test_close_passes_the_rest_on(stage: Stage) -> None:
    """Closing passes on what still lies in the pipe; closing twice is harmless."""
    stage.write(lines(3000))

    stage.relay.close()
    stage.relay.close()

    assert stage.read() == lines(3000)


def test_close_with_a_stuck_target(stage: Stage) -> None:
    """Closing does not block while the target takes nothing."""
    fill(stage.target)
    stage.write(b"lost\n")
    stage.turn()

    stage.relay.close()

    assert stage.loop._poll.poll(0) == []


def test_target_that_nobody_reads(stage: Stage) -> None:
    """A target whose reader is gone fails nothing: the program's writes go on, and its last words are kept."""
    os.close(stage.result)
    stage.write(b"hello\n")

    stage.turn()

    assert stage.relay.last_words == "hello"


def test_target_that_is_full() -> None:
    """A target that refuses what is written, as a full disk does, fails nothing."""
    target = os.open("/dev/full", os.O_WRONLY)
    stage = Stage(target, target, target)
    stage.write(b"hello\n")

    stage.turn()

    words = stage.relay.last_words
    stage.close()
    assert words == "hello"


def test_target_that_is_a_socket() -> None:
    """A stream socket, as the journal's is, takes everything once it is read, and never blocks the relay."""
    target, result = socket.socketpair()
    stage = Stage(target.detach(), -1, result.detach())
    filled = fill(stage.target)
    text = lines(3000)
    stage.write(text)
    stage.turn()

    passed = b""
    while len(passed) < filled + len(text) and (piece := stage.read()):
        passed += piece
        stage.turn()
    stage.close()

    assert passed == b"." * filled + text


def test_target_that_is_a_terminal() -> None:
    """A terminal whose other side reads slowly never blocks the relay, and gets every line."""
    result, target = pty.openpty()
    tty.setraw(target)
    stage = Stage(target, -1, result)
    fill(target)
    stage.read()
    os.set_blocking(target, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(target, b"." * 100)
    os.set_blocking(target, True)
    text = lines(3000)
    stage.write(text)
    os.read(result, 300)  # room for a little, and not for a whole piece
    turned = threading.Event()

    def turn() -> None:
        stage.turn()
        turned.set()

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    in_time = turned.wait(2)
    passed = b""
    while not passed.endswith(text[-100:]) and select.select([result], [], [], PATIENCE)[0]:
        passed += os.read(result, 65536)
        if turned.is_set():
            stage.turn()
    thread.join(PATIENCE)
    stage.close()

    assert in_time, "the relay was blocked"
    assert passed.lstrip(b".") == text


def test_status_flags_are_left_alone(stage: Stage) -> None:
    """The target's status flags, which other processes share, stay as they are."""
    before = fcntl.fcntl(stage.target, fcntl.F_GETFL)
    stage.write(b"hello\n")

    stage.turn()

    assert fcntl.fcntl(stage.target, fcntl.F_GETFL) == before
