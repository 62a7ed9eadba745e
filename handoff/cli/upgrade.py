"""`handoff upgrade`: asks for an upgrade, shows its steps, tells how it went."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

import click

from handoff.cli.options import service_name, timing
from handoff.cli.output import Exit, say, tell
from handoff.core.errors import HandoffError, NotRunning, Refused
from handoff.core.messages import Kind, Message
from handoff.core.record import Record, Step
from handoff.core.refusal import UPGRADING
from handoff.runtime.client import PATIENCE, Client, Ended, successors

_TICK: Final = 0.1  # seconds between two redraws of the moving line
_ORDER: Final = (Step.SPAWN, Step.ADOPT, Step.READY, Step.CUTOVER, Step.PROBATION, Step.COMMIT, Step.DRAIN)


@click.command(name="upgrade")
@service_name
@click.argument("new_command", nargs=-1, type=click.UNPROCESSED, metavar="[-- NEW COMMAND ...]")
@click.option("--env", "variables", multiple=True, metavar="K=V", help="A variable of the new program's environment.")
@click.option("--env-file", type=click.Path(dir_okay=False), help="A file of such variables, K=V on each line.")
@click.option("--cwd", type=click.Path(), help="The new program's working directory.")
@timing
@click.pass_obj
def command(
    runtime_dir: str | None,
    /,
    name: str,
    new_command: tuple[str, ...],
    variables: tuple[str, ...],
    env_file: str | None,
    cwd: str | None,
    **options: Any,
) -> int:
    """Replace the running generation of NAME by a new one, and tell how it went.

    Without NEW COMMAND the new generation is started as the running one was. The times default to those of the
    service. Ctrl-C ends the upgrade, a second one leaves it to itself.
    """
    changes = {
        "command": list(new_command) or None,
        "cwd": os.path.abspath(cwd) if cwd else None,
        "environment": environment(variables, env_file) or None,
    }
    return upgrade(name, runtime_dir, changes, **options)


def environment(variables: Sequence[str], env_file: str | None) -> dict[str, str]:
    """The variables of a file and, above them, those given one by one. Raises UsageError."""
    found: dict[str, str] = {}
    if env_file:
        import dotenv  # needed for this only

        try:
            with open(env_file, encoding="utf-8") as file:
                values = dotenv.dotenv_values(stream=file, interpolate=False)
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--env-file {env_file}: {getattr(error, 'strerror', None) or error}") from None
        found = {variable: value or "" for variable, value in values.items()}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--env {variable}: a variable is given as NAME=VALUE")
        found[name] = value
    return found


def upgrade(name: str, runtime_dir: str | None, changes: dict[str, Any], **options: Any) -> int:
    """Ask for an upgrade, show its steps, tell how it went; returns the exit status."""
    as_json, wait = options.pop("as_json"), options["wait"]
    with Client(name, runtime_dir) as client:
        state = client.state()
        client.send(Kind.UPGRADE, **changes, **options)
        patience = _patience(state["deadlines"], options, wait)
        waiting = _Waiting(client, patience)
        try:
            record = waiting.record()
        except Ended:
            record = _who_carries_on(name, runtime_dir, state["generation"])
        except KeyboardInterrupt:
            say(f"{name}: left; the upgrade goes on, and `handoff status {name}` tells how it went")
            return Exit.LEFT
        else:
            if wait == "exit":
                client.wait_for_end(PATIENCE)  # it has finished its connections; what is left is the interpreter's end
        finally:
            waiting.close()
    if record is None:
        say(f"{name}: no outcome in {patience:g} s; `handoff status {name}` tells how it goes on")
        return Exit.TIMED_OUT
    return tell(record, as_json=as_json)


def _patience(deadlines: dict[str, float], options: dict[str, float | None], wait: str) -> float:
    """How long the service itself takes at most, by its own deadlines, before it tells an outcome."""
    given = {"ready": options["timeout"], "probation": options["probation"], "drain": options["drain_timeout"]}
    limits = deadlines | {key: value for key, value in given.items() if value is not None}
    steps = limits["ready"] + limits["adopt"] + limits["probation"] + 4 * limits["answer"]
    return steps + (limits["drain"] if wait == "exit" else 0.0) + PATIENCE


class _Waiting:
    """Shows the steps as they happen, and turns the first Ctrl-C into a request to end the upgrade."""

    def __init__(self, client: Client, patience: float) -> None:
        self._client = client
        self._until = time.monotonic() + patience
        self._began = time.monotonic()
        self._last: Step | None = None
        self._moving = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._asked: Kind | None = None  # how it was asked to end
        # A handler, since KeyboardInterrupt would strike between a message and what is made of it.
        self._previous = signal.getsignal(signal.SIGINT)
        if self._previous is signal.default_int_handler:  # else it is ignored: a shell started this in its background
            signal.signal(signal.SIGINT, self._interrupted)

    def record(self) -> Record | None:
        """Wait for the outcome; None when none comes in time."""
        while (left := self._until - time.monotonic()) > 0:
            self._draw()
            try:
                message = self._client.receive(min(left, _TICK) if self._moving else left)
            except Refused as error:
                self._refused(error)
                continue
            if message and message.kind is Kind.RESULT:
                return Record.from_json(message["record"])
            if message:
                self._show(message)
        return None

    def close(self) -> None:
        """Remove the moving line, and give Ctrl-C its usual meaning again."""
        signal.signal(signal.SIGINT, self._previous)
        self._clear()

    def _clear(self) -> None:
        if self._moving:
            click.echo("\r\x1b[K", nl=False, err=True)

    def _interrupted(self, _: int, __: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = Kind.ROLLBACK if self._last in (Step.CUTOVER, Step.PROBATION) else Kind.ABORT
        committed = self._last in (Step.COMMIT, Step.DRAIN)
        if not committed:
            with contextlib.suppress(Ended):  # who waits for the outcome sees it too
                self._client.send(self._asked)
        self._clear()
        what = "it is committed, too late to end it" if committed else "ending the upgrade"
        click.echo(f"{what}; Ctrl-C again leaves it to itself", err=True)

    def _refused(self, error: Refused) -> None:
        """A refusal is of the upgrade itself, or of its end, for which a step came in between: then it goes on."""
        if self._asked is None or error.code == UPGRADING:
            raise error
        if self._asked is Kind.ABORT and error.code == "too-late":
            self._asked = Kind.ROLLBACK
            self._client.send(self._asked)
            return
        self._clear()
        click.echo(f"it can't be ended any more: {error.reason}", err=True)

    def _show(self, message: Message) -> None:
        if message.kind is not Kind.STEP:
            return
        self._last = Step(message["step"]) if message["step"] in set(Step) else self._last
        self._clear()
        click.echo(f"  {message['step']:<10}{message['seconds']:8.3f} s", err=True)

    def _draw(self) -> None:
        if self._moving:
            following = _ORDER[_ORDER.index(self._last) + 1 :] if self._last in _ORDER else _ORDER
            step = following[0].value if following else "exit"
            click.echo(f"\r\x1b[K  {step:<10}{time.monotonic() - self._began:8.1f} s ...", nl=False, err=True)


def _who_carries_on(name: str, runtime_dir: str | None, old: int) -> Record | None:
    """The old generation has ended in the middle: the new one answers as soon as it is in charge."""
    for generation in successors(name, runtime_dir, old):
        try:
            with Client(name, runtime_dir, generation=generation) as client:
                return Record.from_json(client.state()["upgrade"])
        except (HandoffError, KeyError):
            continue
    raise NotRunning(name, f"its runtime directory: generation {old} ended during the upgrade, and no other one serves")
