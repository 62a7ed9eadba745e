"""The poll loop: descriptors, deadlines, calls from other threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from handoff.runtime.loop import READ, WRITE, Loop, Timer

PATIENCE = 10.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that a test runs; ends by itself at the latest after some seconds."""
    made = Loop()
    made.after(PATIENCE, made.end)
    yield made
    made.end()
    made.run()


def run(loop: Loop) -> None:
    """Run a loop to its end, in a way that lets the fixture do the same again."""
    while loop._running:
        loop._round()


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    """Two pipes, with a byte to read in each."""
    made = [os.pipe(), os.pipe()]
    for _, writing in made:
        os.write(writing, b"x")
    yield made
    for pipe in made:
        for end in pipe:
            os.close(end)


def test_readable(loop: Loop, pipes: list[tuple[int, int]]) -> None:
    """What was registered for a descriptor is called when it is readable."""
    called = []
    (reading, _), _ = pipes

    def read() -> None:
        called.append(os.read(reading, 10))
        loop.end()

    loop.watch(reading, READ, read)
    run(loop)
    loop.forget(reading)

    assert called == [b"x"]


def test_hang_up(loop: Loop) -> None:
    """A hang-up is told too, whatever was asked for."""
    reading, writing = os.pipe()
    os.close(reading)
    called = []

    def hung_up() -> None:
        called.append(1)
        loop.forget(writing)
        loop.end()

    loop.watch(writing, 0, hung_up)
    run(loop)
    os.close(writing)

    assert called == [1]


def test_watching_again_replaces(loop: Loop, pipes: list[tuple[int, int]]) -> None:
    """Watching a descriptor again replaces both its events and its call."""
    called = []
    (reading, _), _ = pipes
    loop.watch(reading, READ, lambda: called.append("first"))

    loop.watch(reading, WRITE, lambda: called.append("second"))
    loop.after(0.01, loop.end)
    run(loop)
    loop.forget(reading)

    assert called == []


def test_forgotten(loop: Loop, pipes: list[tuple[int, int]]) -> None:
    """A descriptor that was forgotten is not watched; forgetting it again is harmless."""
    called = []
    (reading, _), _ = pipes
    loop.watch(reading, READ, lambda: called.append(1))

    loop.forget(reading)
    loop.forget(reading)
    loop.after(0.01, loop.end)
    run(loop)

    assert called == []


def test_forgotten_in_the_same_round(loop: Loop, pipes: list[tuple[int, int]]) -> None:
    """Of two descriptors that are ready at once, the one that the other's call forgets is not called."""
    called = []
    readings = [reading for reading, _ in pipes]

    def read(own: int, other: int) -> None:
        called.append(own)
        loop.forget(other)
        loop.end()

    loop.watch(readings[0], READ, lambda: read(*readings))
    loop.watch(readings[1], READ, lambda: read(*readings[::-1]))
    run(loop)
    for reading in readings:
        loop.forget(reading)

    assert len(called) == 1


def test_number_given_anew_in_the_same_round(loop: Loop, pipes: list[tuple[int, int]]) -> None:
    """What was ready is not told of another descriptor that got the same number within the round."""
    (first, _), (second, _) = pipes
    copies = [os.dup(first), os.dup(second)]
    called = []

    def swap(own: int, other: int) -> None:
        called.append("swapped")
        loop.forget(own)
        loop.forget(other)
        empty, writing = os.pipe()
        os.dup2(empty, other)  # nothing is there to read
        os.close(empty)
        loop.watch(other, READ, lambda: called.append("readable"))
        loop.after(0.01, loop.end)
        copies.append(writing)

    loop.watch(copies[0], READ, lambda: swap(*copies[:2]))
    loop.watch(copies[1], READ, lambda: swap(*copies[1::-1]))
    run(loop)
    for descriptor in copies:
        loop.forget(descriptor)
        os.close(descriptor)

    assert called == ["swapped"]


def test_deadlines_in_their_order(loop: Loop) -> None:
    """Deadlines come in the order of their moments, and not before."""
    began = time.monotonic()
    called: list[float] = []
    loop.after(0.02, lambda: called.append(time.monotonic() - began))
    loop.after(0.01, lambda: called.append(time.monotonic() - began))

    while len(called) < 2:
        loop._round()

    assert [seconds >= least for seconds, least in zip(called, (0.01, 0.02), strict=True)] == [True, True]


def test_cancelled_deadline(loop: Loop) -> None:
    """A deadline that was taken back does not come; taking it back again is harmless."""
    called = []
    timer = loop.after(0, lambda: called.append(1))
    loop.after(0.01, loop.end)

    timer.cancel()
    timer.cancel()
    run(loop)

    assert called == []


def test_deadline_cancelled_by_another_one(loop: Loop) -> None:
    """Of two deadlines that are over at once, the one that the other's call takes back does not come."""
    called = []
    timers: list[Timer] = []

    def call(own: int) -> None:
        called.append(own)
        timers[1 - own].cancel()
        loop.end()

    timers += [loop.after(0, lambda: call(0)), loop.after(0, lambda: call(1))]
    run(loop)

    assert len(called) == 1


def test_deadline_set_by_a_deadline(loop: Loop) -> None:
    """A deadline may set another one."""

    def first() -> None:
        loop.after(0, loop.end)

    loop.after(0, first)
    run(loop)

    assert not loop._running


@pytest.mark.parametrize("seconds", [3e6, 1e9, 1e300, 10**400])
def test_deadline_beyond_poll(seconds: float) -> None:
    """A deadline that is further away than poll(2) can count, 24 days, is no error."""
    loop = Loop()
    loop.after(seconds, lambda: None)
    reading, writing = os.pipe()
    os.close(writing)
    loop.watch(reading, READ, loop.end)

    loop.run()

    os.close(reading)


def test_posted_calls(loop: Loop) -> None:
    """Calls of other threads are made in the loop's, in their order."""
    called: list[tuple[int, int]] = []

    def post() -> None:
        for number in range(100):
            loop.post(lambda number=number: called.append((number, threading.get_ident())))  # type: ignore[misc]
        loop.post(loop.end)

    thread = threading.Thread(target=post)
    thread.start()
    run(loop)
    thread.join()

    assert called == [(number, threading.get_ident()) for number in range(100)]


def test_posting_from_a_signal_handler(loop: Loop) -> None:
    """A signal handler may post, at whatever moment it interrupts the loop."""
    called = []
    previous = signal.signal(signal.SIGALRM, lambda *_: loop.post(lambda: called.append(1)))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while len(called) < 20:
            loop._round()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

    assert len(called) >= 20


def test_posting_by_a_posted_call(loop: Loop) -> None:
    """A posted call may post."""
    loop.post(lambda: loop.post(loop.end))

    run(loop)

    assert not loop._running


def test_posting_after_the_end() -> None:
    """Posting to a loop that has ended is harmless."""
    loop = Loop()
    loop.end()
    loop.run()

    loop.post(lambda: None)


def test_posting_in_a_forked_child() -> None:
    """What a forked child posts does not wake the parent's loop."""
    loop = Loop()
    loop.after(0.05, loop.end)
    woken = []
    child = os.fork()
    if not child:
        try:
            loop.abandon()
            loop.post(lambda: None)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

    loop._take_posted = lambda: woken.append(1)  # type: ignore[method-assign]  # called by nobody else
    loop.run()

    assert woken == []
