"""A version of a service that a test starts: it serves well, or fails in the way that its options say.

Each connection gets one line, `GENERATION PID`, and is closed; one that sends `hold` stays open until it sends more.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading

import handoff


def serve(connection: handoff.Connection, generation: int) -> None:
    """Answer one connection."""
    with connection:
        try:
            while connection.recv(100) == b"hold":
                connection.sendall(b"held")
            connection.sendall(f"{generation} {os.getpid()}\n".encode())
        except ConnectionError:
            pass


def burn() -> None:
    """Keep a thread busy, for ever."""
    while True:
        sum(range(1000))


def main() -> None:
    """Serve, or fail."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", action="append", default=[])
    parser.add_argument("--name", default="web")
    parser.add_argument("--fail", default="", help="import, exit, never, raise, hang, leave")
    parser.add_argument("--die-at", default="", help="a step at whose end the program kills itself")
    parser.add_argument("--busy", type=int, default=0, help="threads that never pause")
    parser.add_argument("--drain-timeout", type=float, default=10)
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    if arguments.fail == "exit":
        sys.stderr.write("no configuration found\n")
        sys.exit(3)
    if arguments.fail == "hang":
        threading.Event().wait()

    service = handoff.Service(arguments.name, drain_timeout=arguments.drain_timeout)
    if arguments.die_at:
        service.on(arguments.die_at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with service:
        listeners = [service.listen(address) for address in arguments.listen]
        if arguments.fail == "raise":
            raise ValueError("the new version is broken")
        if arguments.fail == "never":
            threading.Event().wait()
        for _ in range(arguments.busy):
            threading.Thread(target=burn, daemon=True).start()
        service.ready()
        if arguments.fail == "leave":
            return
        for listener in listeners[1:]:
            threading.Thread(target=accept, args=(service, listener), daemon=True).start()
        if not arguments.quiet:
            print(f"serves {listeners[0].address}", flush=True)
        accept(service, listeners[0])


def accept(service: handoff.Service, listener: handoff.Listener) -> None:
    """Serve a listener until another generation is in charge."""
    for connection, _ in listener:
        threading.Thread(target=serve, args=(connection, service.generation), daemon=True).start()


if __name__ == "__main__":
    main()
