"""Calls the test's gRPC service from four threads, two of them each time on a new channel, until standard input ends.

Prints the outcome of each call: the generation that answered, or the error.
"""

from __future__ import annotations

import sys
import threading

import grpc  # type: ignore[import-untyped]  # grpcio has no types

CALLERS = 4
TIMEOUT = 15.0
over = threading.Event()


def open_channel(target: str) -> grpc.Channel:
    """A channel with a connection of its own; else all channels of a process share one."""
    return grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])


def call(channel: grpc.Channel) -> None:
    """One call, its outcome in a line."""
    try:
        answer: bytes = channel.unary_unary("/Test/Who")(b"?", timeout=TIMEOUT)
        outcome = answer.split()[0].decode()
    except grpc.RpcError as error:
        outcome = f"{error.code().name}: {error.details()}".replace("\n", " ")  # a Call too, at run time
    sys.stdout.write(f"{outcome}\n")
    sys.stdout.flush()


def call_on_new_channels(target: str) -> None:
    """Call again and again, each time on a new channel."""
    while not over.is_set():
        with open_channel(target) as channel:
            call(channel)


def call_on_one_channel(target: str) -> None:
    """Call again and again on the same channel."""
    with open_channel(target) as channel:
        while not over.wait(0.002):
            call(channel)


if __name__ == "__main__":
    runs = [call_on_new_channels, call_on_one_channel] * (CALLERS // 2)
    threads = [threading.Thread(target=run, args=(sys.argv[1],)) for run in runs]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
