"""Every command: its exit statuses, what it prints and where."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import click
import pytest

import handoff.cli
from handoff.core.deadlines import Deadlines
from handoff.core.record import Record, Step
from handoff.core.version import VERSION as VERSION_NUMBER
from tests.commands import HANDOFF, Command, freeze, read_soon, wait_until
from tests.programs import PATIENCE, Programs, wait_for_end
from tests.test_faults import ask

VERSION = Path(__file__).with_name("version.py")
JSON = Path(__file__).parent.parent / "docs" / "json.md"
NAMED = ("upgrade", "status", "rollback", "abort")
NEVER = ("--", sys.executable, "-c", "import handoff\nwith handoff.Service('web') as service: service.wait()")
NOBODY = 65534  # some user, and the one below another one
STEP_LINE = re.compile(r"  (spawn|adopt|ready|cutover|probation|commit|drain|rollback) +\d+\.\d{3} s")
ANSWER_DEADLINE = 5.0  # seconds that a command waits for a process that does not answer


def serve(programs: Programs, *options: str, name: str = "web") -> int:
    """Start a good version; returns its port."""
    return programs.serve(VERSION, "--name", name, "--listen", "tcp://127.0.0.1:0", *options)


def pid_of(programs: Programs, name: str = "web") -> int:
    """The process in charge."""
    return int(programs.status(name)["pid"])


def probation(programs: Programs, name: str = "web") -> None:
    """Upgrade as far as a probation that does not end by itself."""
    done = programs.handoff("upgrade", name, "--wait", "cutover", "--probation", "60")
    assert done.returncode == 0, done.stderr + programs.shown()


@contextlib.contextmanager
def preparing(programs: Programs, *options: str) -> Iterator[Command]:
    """An upgrade whose new program has its listeners and does not get ready."""
    with Command("upgrade", "web", "--timeout", "60", *options, *NEVER) as upgrade:
        upgrade.wait_for("adopt")
        yield upgrade


def one_line(text: str) -> str:
    """The only line of a text."""
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text[:-1]


# upgrade


@pytest.mark.parametrize(
    ("wait", "told"),
    [
        ("cutover", r"web: generation 2 accepts and is in probation; generation 1 takes the service back if it fails"),
        ("commit", r"web: generation 2 serves, in place of generation 1, after \d+\.\d\d s"),
        (
            "exit",
            r"web: generation 2 serves, in place of generation 1, after \d+\.\d\d s; "
            r"of 0 connections of generation 1, 0 had to be closed",
        ),
    ],
)
def test_upgrade_tells_how_it_went(programs: Programs, wait: str, told: str) -> None:
    """The answer is one line on standard output, the steps are lines on standard error, and the status is 0."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--wait", wait, "--probation", "0.1")

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(told, one_line(done.stdout))
    steps = [found[1] for line in done.stderr.splitlines() if (found := STEP_LINE.fullmatch(line))]
    expected = ["spawn", "adopt", "ready", "cutover"]
    expected += ["probation", "commit"] if wait != "cutover" else []
    expected += ["drain"] if wait == "exit" else []
    assert steps == expected
    assert len(done.stderr.splitlines()) == len(steps)


def test_upgrade_as_json(programs: Programs) -> None:
    """With --json standard output is one line with the record; the steps stay on standard error."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--json", "--probation", "0")

    assert json.loads(one_line(done.stdout))["result"] == "committed"
    assert all(STEP_LINE.fullmatch(line) for line in done.stderr.splitlines())


def test_upgrade_waits_until_the_old_process_is_gone(programs: Programs) -> None:
    """With --wait exit the old process has ended when the command does."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--wait", "exit", "--probation", "0")

    assert done.returncode == 0
    assert programs.started[0].poll() == 0


def test_upgrade_to_no_command(programs: Programs) -> None:
    """A command that is not there is told with the reason, exit status 1, and nothing on standard output."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--", "no-such-program", "--port", "1")

    assert (done.returncode, done.stdout) == (1, "")
    assert "handoff: web: rolled back: cannot start no-such-program: no such command" in done.stderr
    assert "; generation 1 serves on" in done.stderr


def test_upgrade_shows_the_last_words(programs: Programs) -> None:
    """What a failing program wrote last follows the reason, indented; all of it on standard error."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--", "/bin/sh", "-c", "echo one >&2; echo two >&2; exit 9")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "handoff: web: rolled back: the new program exited with status 9 before it called; generation 1 serves on\n"
        "  | one\n  | two\n"
    )


def test_upgrade_to_another_command_with_options(programs: Programs) -> None:
    """What follows -- is started, options included, and stays the command of later upgrades."""
    port = serve(programs)
    command = [sys.executable, str(VERSION), "--quiet", "--drain-timeout", "7", "--listen", f"tcp://127.0.0.1:{port}"]

    record = programs.upgrade("web", "--probation", "0", "--", *command)

    assert record["result"] == "committed"
    state = programs.status("web")
    assert state["command"] == command
    assert state["deadlines"]["drain"] == 7


def test_upgrade_times_out(programs: Programs) -> None:
    """A program that does not get ready within --timeout ends with exit status 5, and the text says after how long."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--timeout", "0.75", *NEVER)

    assert (done.returncode, done.stdout) == (5, "")
    assert "handoff: web: rolled back: it was not ready in 0.75 s; generation 1 serves on\n" in done.stderr


def test_upgrade_takes_its_times(programs: Programs) -> None:
    """--timeout, --probation and --drain-timeout are those of this upgrade; the next one has the service's again."""
    serve(programs, "--drain-timeout", "8")
    before = programs.status("web")["deadlines"]

    with Command(
        "upgrade", "web", "--timeout", "11", "--probation", "12", "--drain-timeout", "13", "--wait", "cutover"
    ) as upgrade:
        assert upgrade.end()[0] == 0
        during = programs.status("web")["deadlines"]
        assert programs.handoff("rollback", "web").returncode == 0

    assert (during["ready"], during["probation"], during["drain"]) == (11, 12, 13)
    assert programs.status("web")["deadlines"] == before


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_drain_timeout_closes(programs: Programs, as_json: bool) -> None:
    """The connection that outlasts --drain-timeout is counted in the answer."""
    port = serve(programs)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as stays:
        stays.sendall(b"hold")
        assert stays.recv(10) == b"held"

        done = programs.handoff(
            *("upgrade", "web", "--wait", "exit", "--probation", "0", "--drain-timeout", "0.2"),
            *(["--json"] if as_json else []),
        )

    assert done.returncode == 0, done.stderr
    if as_json:
        record = json.loads(done.stdout)
        assert (record["open"], record["finished"], record["closed"]) == (1, 0, 1)
    else:
        assert one_line(done.stdout).endswith("; of 1 connections of generation 1, 1 had to be closed")


# no such service


@pytest.mark.parametrize("command", NAMED)
def test_no_such_service(programs: Programs, command: str) -> None:
    """A name that nobody serves gives exit status 3 and a line with the directory and what to do."""
    done = programs.handoff(command, "web")

    assert (done.returncode, done.stdout) == (3, "")
    assert one_line(done.stderr) == (
        f"handoff: web: no such service is running in {programs.runtime_dir}/web; "
        f"start it, or name its runtime directory with --runtime-dir"
    )


@pytest.mark.kills
@pytest.mark.parametrize("command", NAMED)
def test_dead_service(programs: Programs, command: str) -> None:
    """A service that was killed and left its sockets there is not running: exit status 3."""
    serve(programs)
    programs.started[0].kill()
    programs.started[0].wait(PATIENCE)

    done = programs.handoff(command, "web")

    assert (done.returncode, done.stdout) == (3, "")
    assert "no such service is running" in one_line(done.stderr)


def test_runtime_dir_option_comes_first(programs: Programs, tmp_path: Path) -> None:
    """--runtime-dir is used rather than the variable."""
    serve(programs)

    elsewhere = programs.handoff("--runtime-dir", str(tmp_path / "other"), "status", "web")
    here = subprocess.run(
        [*HANDOFF, "--runtime-dir", str(programs.runtime_dir), "status", "web"],
        env={**os.environ, "HANDOFF_RUNTIME_DIR": str(tmp_path / "other")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert elsewhere.returncode == 3
    assert str(tmp_path / "other") in elsewhere.stderr
    assert here.returncode == 0, here.stderr


# another upgrade runs


def test_upgrade_in_probation(programs: Programs) -> None:
    """An upgrade while one is in probation is refused with exit status 4, and the line names rollback."""
    serve(programs)
    probation(programs)

    done = programs.handoff("upgrade", "web")

    assert (done.returncode, done.stdout) == (4, "")
    assert one_line(done.stderr) == (
        "handoff: web: generation 1 is already being replaced (probation); "
        "wait for it, or end it with `handoff rollback web`"
    )


def test_upgrade_before_cutover(programs: Programs) -> None:
    """An upgrade while the new program of another one starts is refused with exit status 4; the line names abort."""
    serve(programs)
    with preparing(programs):
        done = programs.handoff("upgrade", "web")

    assert (done.returncode, done.stdout) == (4, "")
    assert one_line(done.stderr) == (
        "handoff: web: generation 1 is already being replaced (preparing); "
        "wait for it, or end it with `handoff abort web`"
    )


def test_twenty_upgrades_at_once(programs: Programs) -> None:
    """Of twenty commands at once exactly one upgrades; the others end at once, while that one still runs."""
    port = serve(programs)
    with contextlib.ExitStack() as stack:
        commands = [stack.enter_context(Command("upgrade", "web", "--probation", "60")) for _ in range(20)]
        pidfds = {os.pidfd_open(command.process.pid): command for command in commands}
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)

        refused = ended(pidfds, 19)

        (running,) = [command for command in commands if command not in refused]
        assert [command.end()[0] for command in refused] == [4] * 19
        assert all("already being replaced" in one_line(command.stderr) for command in refused)
        running.wait_for("cutover")
        assert running.process.poll() is None
        assert programs.handoff("rollback", "web").returncode == 0
        assert running.end()[0] == 1
        assert ask(port)[0] == 1


def ended(pidfds: dict[int, Command], count: int) -> list[Command]:
    """The first so many of the commands that end."""
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    found: list[Command] = []
    until = time.monotonic() + PATIENCE
    while len(found) < count:
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        assert ready, f"only {len(found)} of {count} commands have ended"
        for pidfd, _ in ready:
            poll.unregister(pidfd)
            found.append(pidfds[pidfd])
    return found


# rollback and abort


@pytest.mark.parametrize("command", ["rollback", "abort"])
def test_nothing_to_end(programs: Programs, command: str) -> None:
    """Without an upgrade there is nothing to end: exit status 1, and a line that says who serves."""
    serve(programs)

    done = programs.handoff(command, "web")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == "handoff: web: no upgrade is running that could be ended; generation 1 serves"


def test_nothing_to_end_after_commit(programs: Programs) -> None:
    """After the commit there is nothing to take back any more: exit status 1, and the new one serves."""
    serve(programs)
    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    done = programs.handoff("rollback", "web")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == "handoff: web: no upgrade is running that could be ended; generation 2 serves"


def test_rollback(programs: Programs) -> None:
    """In probation `rollback` ends with 0 and one line on standard output, and the upgrade with 1."""
    port = serve(programs)
    with Command("upgrade", "web", "--probation", "60") as upgrade:
        upgrade.wait_for("cutover")

        done = programs.handoff("rollback", "web")

        assert upgrade.end() == (1, "")
    assert (done.returncode, done.stderr) == (0, "")
    assert one_line(done.stdout) == "web: rolled back: its rollback was asked for; generation 1 serves on"
    assert "handoff: web: rolled back: its rollback was asked for; generation 1 serves on\n" in upgrade.stderr
    assert ask(port)[0] == 1


def test_abort(programs: Programs) -> None:
    """Before the cutover `abort` ends with 0 and one line on standard output, and the upgrade with 1."""
    port = serve(programs)
    with preparing(programs) as upgrade:
        done = programs.handoff("abort", "web")

        assert upgrade.end() == (1, "")
    assert (done.returncode, done.stderr) == (0, "")
    assert one_line(done.stdout) == "web: rolled back: it was aborted; generation 1 serves on"
    assert "handoff: web: rolled back: it was aborted; generation 1 serves on\n" in upgrade.stderr
    assert ask(port)[0] == 1


@pytest.mark.parametrize("command", ["rollback", "abort"])
def test_end_as_json(programs: Programs, command: str) -> None:
    """With --json the commands that end an upgrade print its record and nothing else."""
    serve(programs)
    if command == "rollback":
        probation(programs)
        done = programs.handoff(command, "web", "--json")
    else:
        with preparing(programs):
            done = programs.handoff(command, "web", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(one_line(done.stdout))["result"] == "rolled-back"


def test_abort_in_probation(programs: Programs) -> None:
    """After the cutover `abort` is too late: exit status 1, the line names rollback, and the upgrade goes on."""
    port = serve(programs)
    probation(programs)

    done = programs.handoff("abort", "web")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == (
        "handoff: web: the new generation accepts already; take it back with `handoff rollback web`"
    )
    assert programs.status("web")["state"] == "probation"
    assert ask(port)[0] == 2


def test_rollback_before_cutover(programs: Programs) -> None:
    """Before the cutover `rollback` is too early: exit status 1, the line names abort, and the upgrade goes on."""
    serve(programs)
    with preparing(programs):
        done = programs.handoff("rollback", "web")

        assert programs.status("web")["state"] == "preparing"
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == (
        "handoff: web: the new generation does not accept yet; end the upgrade with `handoff abort web`"
    )


# wrong usage


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--timeout", "-1"),
        ("--timeout", "soon"),
        ("--timeout", ""),
        ("--probation", "nan"),
        ("--probation", "inf"),
        ("--probation", "2000000000"),
        ("--drain-timeout", "-0.5"),
        ("--drain-timeout", "10s"),
        ("--wait", "forever"),
        ("--wait", ""),
        ("--env", "=x"),
        ("--env-file", "/no/such/file"),
    ],
)
def test_bad_option_value(programs: Programs, option: str, value: str) -> None:
    """A value that an option does not take gives exit status 2 and one line with option and value, at once."""
    done = programs.handoff("upgrade", "no-service-is-asked", option, value)

    assert (done.returncode, done.stdout) == (2, "")
    line = one_line(done.stderr)
    assert line.startswith("handoff: ")
    assert option in line and value in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "command"),
        (("upgrades",), "'upgrades'"),
        (("upgrade",), "'NAME'"),
        (("status", "web", "more"), "more"),
        (("status", "web", "--wait", "commit"), "--wait"),
        (("upgrade", "web", "--no-such-option"), "--no-such-option"),
        (("--runtime-dir",), "--runtime-dir"),
    ],
    ids=str,
)
def test_wrong_usage(programs: Programs, arguments: tuple[str, ...], named: str) -> None:
    """What is no command, or not how it is used, gives exit status 2 and one line that names it and the help."""
    done = programs.handoff(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    line = one_line(done.stderr)
    assert line.startswith("handoff: ")
    assert named in line
    assert "--help`" in line


# the runtime directory


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A runtime directory, with one of a service in it, that other users reach too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        (Path(directory) / "web").mkdir(mode=0o700)
        yield Path(directory)


def as_user(uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as another user, who need not be able to read the interpreter's files: all is imported before."""
    program = (
        f"import importlib, os, sys, handoff.cli, handoff.runtime.client\n"
        f"for name in handoff.cli.COMMANDS: importlib.import_module('handoff.cli.' + name)\n"
        f"os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
        f"handoff.cli.main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")


@root_only
@pytest.mark.parametrize("command", NAMED)
def test_unreadable_directory(public_dir: Path, command: str) -> None:
    """A runtime directory that may not be entered is told with its path and why: exit status 1."""
    done = as_user(NOBODY, "--runtime-dir", str(public_dir), command, "web")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr).startswith(f"handoff: runtime directory {public_dir}/web: ")
    assert f"no right to use it as uid {NOBODY}" in done.stderr


@root_only
def test_unreadable_base_directory(public_dir: Path) -> None:
    """`list` of a directory that may not be read is told with its path and why: exit status 1."""
    os.chmod(public_dir, 0o711)

    done = as_user(NOBODY, "--runtime-dir", str(public_dir), "list")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr).startswith(f"handoff: runtime directory {public_dir}: ")


@root_only
@pytest.mark.parametrize("command", NAMED)
def test_foreign_directory(public_dir: Path, command: str) -> None:
    """A runtime directory of another user is told with both users: exit status 1."""
    os.chmod(public_dir / "web", 0o755)
    os.chown(public_dir / "web", NOBODY, NOBODY)

    done = as_user(NOBODY - 1, "--runtime-dir", str(public_dir), command, "web")

    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == (
        f"handoff: runtime directory {public_dir}/web: "
        f"it belongs to uid {NOBODY}, and this process has uid {NOBODY - 1}"
    )


@pytest.mark.parametrize(
    ("kind", "told"), [("writable", "others can write to it"), ("link", "link"), ("file", "no directory")]
)
def test_unsafe_directory(programs: Programs, kind: str, told: str) -> None:
    """A runtime directory that others may change, or that is none, is refused with its path: exit status 1."""
    path = programs.runtime_dir / "web"
    if kind == "writable":
        path.mkdir()
        path.chmod(0o777)
    elif kind == "link":
        path.symlink_to("/tmp")
    else:
        path.touch()

    done = programs.handoff("status", "web")

    assert (done.returncode, done.stdout) == (1, "")
    line = one_line(done.stderr)
    assert line.startswith(f"handoff: runtime directory {path}: ")
    assert told in line or kind == "link"


@root_only
def test_root_commands_the_services_of_others(public_dir: Path, programs: Programs) -> None:
    """Root may look into a directory that belongs to another user."""
    os.chown(public_dir / "web", NOBODY, NOBODY)

    done = programs.handoff("--runtime-dir", str(public_dir), "status", "web")

    assert done.returncode == 3, done.stderr


# the command is not the upgrade


def test_command_is_killed(programs: Programs) -> None:
    """The upgrade outlives the command that asked for it, and `status` tells the outcome."""
    port = serve(programs)
    with Command("upgrade", "web", "--probation", "1") as upgrade:
        upgrade.wait_for("cutover")

        upgrade.process.kill()

        assert upgrade.process.wait(PATIENCE) == -signal.SIGKILL
    assert wait_for_end(programs.started[0].pid)
    assert ask(port)[0] == 2
    told = programs.handoff("status", "web").stdout
    assert re.search(r"^  last upgrade, from generation 1 to 2: committed after 1\.\d\d s$", told, re.MULTILINE)


def test_command_is_killed_and_the_upgrade_fails(programs: Programs) -> None:
    """Of an upgrade that failed after its command had died `status` tells the reason."""
    serve(programs)
    with Command("upgrade", "web", "--probation", "60") as upgrade:
        upgrade.wait_for("cutover")
        upgrade.process.kill()
        upgrade.process.wait(PATIENCE)

    assert programs.handoff("rollback", "web").returncode == 0

    told = programs.handoff("status", "web").stdout
    assert re.search(
        r"^  last attempt, from generation 1 to 2: rolled-back after \d+\.\d\d s: its rollback was asked for$",
        told,
        re.MULTILINE,
    )


# Ctrl-C


def test_interrupt_before_cutover(programs: Programs) -> None:
    """The first Ctrl-C before the cutover aborts: exit status 1, and the old generation serves on."""
    port = serve(programs)
    with preparing(programs) as upgrade:
        upgrade.interrupt()

        assert upgrade.end() == (1, "")
    assert "ending the upgrade; Ctrl-C again leaves it to itself\n" in upgrade.stderr
    assert "handoff: web: rolled back: it was aborted; generation 1 serves on\n" in upgrade.stderr
    assert ask(port)[0] == 1


def test_interrupt_in_probation(programs: Programs) -> None:
    """The first Ctrl-C in probation rolls back: exit status 1, and the old generation serves again."""
    port = serve(programs)
    with Command("upgrade", "web", "--probation", "60") as upgrade:
        upgrade.wait_for("cutover")

        upgrade.interrupt()

        assert upgrade.end() == (1, "")
    assert "ending the upgrade; Ctrl-C again leaves it to itself\n" in upgrade.stderr
    assert "handoff: web: rolled back: its rollback was asked for; generation 1 serves on\n" in upgrade.stderr
    assert ask(port)[0] == 1


def test_interrupt_while_draining(programs: Programs) -> None:
    """A Ctrl-C after the commit ends nothing: the command says so, goes on waiting, and ends as the upgrade does."""
    port = serve(programs)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as held,
        Command("upgrade", "web", "--probation", "0", "--wait", "exit", "--drain-timeout", "60") as upgrade,
    ):
        held.sendall(b"hold")
        assert held.recv(10) == b"held"
        upgrade.wait_for("commit")

        upgrade.interrupt()
        upgrade.wait_for("it is committed, too late")
        held.sendall(b"?")

        status, told = upgrade.end()
    assert status == 0, upgrade.stderr
    assert "generation 2 serves, in place of generation 1" in told
    assert ask(port)[0] == 2


def test_second_interrupt_leaves(programs: Programs) -> None:
    """The second Ctrl-C leaves with 130, says how to learn more, and the upgrade goes on to its end without it."""
    port = serve(programs)
    with Command("upgrade", "web", "--probation", "60") as upgrade:
        upgrade.wait_for("cutover")
        new = ask(port)[1]
        freeze(new)  # so that it does not answer the rollback
        upgrade.interrupt()
        upgrade.wait_for("ending the upgrade")

        upgrade.interrupt()

        assert upgrade.end() == (130, "")
    assert upgrade.stderr.endswith(
        "handoff: web: left; the upgrade goes on, and `handoff status web` tells how it went\n"
    )
    assert programs.status("web")["state"] == "rolling-back", programs.shown()
    os.kill(new, signal.SIGCONT)
    assert wait_for_end(new)
    state = programs.status("web")
    assert (state["state"], state["upgrade"]["result"]) == ("serving", "rolled-back")


# status and list


def test_status_of_a_first_generation(programs: Programs) -> None:
    """Without an upgrade `status` tells generation, process, state, listeners and connections."""
    port = serve(programs)

    done = programs.handoff("status", "web")

    pid = programs.started[0].pid
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"web: generation 1 (pid {pid}) is serving\n  listens on tcp://127.0.0.1:{port}\n  has 0 connections open\n"
    )


def test_status_while_an_upgrade_runs(programs: Programs) -> None:
    """During an upgrade `status` tells the state and the steps that are done."""
    serve(programs)
    probation(programs)

    told = programs.handoff("status", "web").stdout

    assert "generation 1 (pid" in told and ") is probation\n" in told
    assert told.endswith("  upgrade from generation 1 to 2 is running; done: spawn, adopt, ready, cutover\n")


def test_status_while_the_old_one_drains(programs: Programs) -> None:
    """While the old generation finishes its connections `status` names it."""
    port = serve(programs)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as held:
        held.sendall(b"hold")
        assert held.recv(10) == b"held"
        programs.upgrade("web", "--probation", "0")

        told = programs.handoff("status", "web").stdout

        assert told.startswith("web: generation 2 (pid")
        assert f"\n  generation 1 (pid {programs.started[0].pid}) drains\n" in told
        held.sendall(b"?")
        assert held.recv(100).startswith(b"1 ")


def test_list_of_nothing(programs: Programs) -> None:
    """Without a service `list` prints nothing, and with --json an empty list; exit status 0."""
    text = programs.handoff("list")
    as_json = programs.handoff("list", "--json")

    assert (text.returncode, text.stdout, text.stderr) == (0, "", "")
    assert json.loads(one_line(as_json.stdout)) == {"services": []}


def test_list_without_a_directory(programs: Programs, tmp_path: Path) -> None:
    """A runtime directory that is not there has no services: exit status 0."""
    done = programs.handoff("--runtime-dir", str(tmp_path / "none"), "list")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_list_of_one(programs: Programs) -> None:
    """One service is one line: name, generation, process, state, connections, listeners."""
    port = serve(programs)

    done = programs.handoff("list")

    pid = programs.started[0].pid
    assert (done.returncode, done.stderr) == (0, "")
    assert one_line(done.stdout) == f"web  generation 1 (pid {pid}) serving, 0 connections, tcp://127.0.0.1:{port}"


def test_list_of_two(programs: Programs) -> None:
    """Two services are two lines in the order of their names, in columns; one that has ended is not listed."""
    serve(programs, name="web")
    serve(programs, name="api-server")
    serve(programs, name="gone")
    programs.status("gone")
    ended = programs.started[2]
    ended.terminate()
    assert ended.wait(PATIENCE) == 0

    text = programs.handoff("list")
    rows = json.loads(programs.handoff("list", "--json").stdout)["services"]

    first, second = text.stdout.splitlines()
    assert first.startswith("api-server  generation 1 (pid ")
    assert second.startswith("web         generation 1 (pid ")
    assert [row["service"] for row in rows] == ["api-server", "web"]


# a service that does not answer


def test_stopped_service(programs: Programs) -> None:
    """One that is stopped gives exit status 5, its pid and the deadline, within it; `list` still lists the others."""
    serve(programs)
    serve(programs, name="api")
    pid = programs.started[0].pid
    freeze(pid)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        commands = [stack.enter_context(Command(command, "web")) for command in NAMED]
        listed = stack.enter_context(Command("list"))

        ends = [command.end() for command in commands]
        rows = listed.end()[1].splitlines()

    took = time.monotonic() - began
    os.kill(pid, signal.SIGCONT)
    assert programs.status("web")["state"] == "serving"
    assert ends == [(5, "")] * len(NAMED)
    for command in commands:
        assert one_line(command.stderr) == (
            f"handoff: web: no answer in 5 s from pid {pid} at the control socket; "
            f"it may be stopped or hung: look at it, or end it"
        )
    assert ANSWER_DEADLINE <= took < 2 * ANSWER_DEADLINE
    assert rows[0].startswith("api  generation 1")
    assert rows[1] == f"web  {commands[0].stderr.removeprefix('handoff: ').strip()}"


# terminals


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a command writes to its standard error when that is a terminal."""
    ours, theirs = pty.openpty()
    written = ""
    try:
        with Command(*arguments, stderr=theirs, **environment) as command:
            os.close(theirs)
            theirs = -1
            with contextlib.suppress(OSError) as _:  # EIO: nobody has the terminal any more
                while piece := read_soon(ours):
                    written += piece
            assert command.end()[0] == 0, written
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    return written


def test_terminal_gets_moving_lines(programs: Programs) -> None:
    """On a terminal the step that is waited for moves on in its own line, which is cleared at the end."""
    serve(programs)

    written = on_terminal("upgrade", "web", "--probation", "0.5", NO_COLOR="")

    moving = re.findall(r"\r\x1b\[K  probation +\d+\.\d s \.\.\.", written)
    assert len(moving) >= 2
    assert written.endswith("\r\x1b[K")


def test_no_color(programs: Programs) -> None:
    """With NO_COLOR a terminal gets neither colours nor moving lines."""
    serve(programs)

    written = on_terminal("upgrade", "web", "--probation", "0.3", NO_COLOR="1")

    assert "\x1b" not in written
    assert all(STEP_LINE.fullmatch(line) for line in written.splitlines())


def test_pipe_gets_plain_lines(programs: Programs) -> None:
    """Into a pipe nothing moves and nothing is coloured, whatever the terminal is."""
    serve(programs)

    done = programs.handoff("upgrade", "web", "--probation", "0.3")

    assert "\x1b" not in done.stderr + done.stdout
    assert "\r" not in done.stderr + done.stdout


# help, version


def test_version(programs: Programs) -> None:
    """`python -m handoff --version` names the package and its version."""
    done = programs.handoff("--version")

    assert (done.returncode, done.stderr) == (0, "")
    assert one_line(done.stdout) == f"handoff, version {VERSION_NUMBER}"


@pytest.mark.parametrize("command", handoff.cli.COMMANDS)
def test_help_names_the_options(programs: Programs, command: str) -> None:
    """`--help` says what the command does and names each of its options with a text."""
    context = click.Context(handoff.cli.group)
    described = handoff.cli.group.get_command(context, command)
    assert described is not None

    done = programs.handoff(command, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: handoff {command} ")
    options = [parameter for parameter in described.params if isinstance(parameter, click.Option)]
    for option in options:
        assert all(name in done.stdout for name in option.opts), option.name
        assert option.help, option.name
    assert described.help


def test_help_names_the_commands(programs: Programs) -> None:
    """`handoff --help` names each command, and the exit statuses."""
    done = programs.handoff("--help")

    assert done.returncode == 0
    for command in handoff.cli.COMMANDS:
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
    for status in ("0 done", "1 refused or rolled", "2 wrong usage", "4 another upgrade", "5 timed", "130 left"):
        assert status in " ".join(done.stdout.split())


def test_nobody_reads_the_answer(programs: Programs) -> None:
    """A closed pipe behind the command gives no traceback."""
    serve(programs)
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [*HANDOFF, "status", "web"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
    )

    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


# docs/json.md


def documented() -> dict[str, set[str]]:
    """The keys that docs/json.md documents, by the title of their section: each is the first cell of a table's row."""
    found: dict[str, set[str]] = {}
    title = ""
    for line in JSON.read_text().splitlines():
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif key := re.match(r"\| `([a-z_-]+)` \|", line):
            found.setdefault(title, set()).add(key[1])
    return found


@pytest.fixture
def printed(programs: Programs) -> dict[str, set[str]]:
    """The keys that commands print in all the situations that bring about one of their own."""
    port = serve(programs)
    serve(programs, name="api")
    records: list[dict[str, Any]] = []
    states = [programs.status("web")]
    records.append(
        json.loads(programs.handoff("upgrade", "web", "--json", "--", "/bin/sh", "-c", "echo no >&2").stdout)
    )
    probation(programs)
    records.append(json.loads(programs.handoff("rollback", "web", "--json").stdout))
    states.append(programs.status("web"))
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as held:
        held.sendall(b"hold")
        assert held.recv(10) == b"held"
        with Command("upgrade", "web", "--json", "--probation", "0", "--wait", "exit") as upgrade:
            upgrade.wait_for("commit")
            states.append(programs.status("web"))
            held.sendall(b"?")
            records.append(json.loads(upgrade.end()[1]))
    wait_until(lambda: "draining" not in programs.status("web"), "the old generation's end")
    states.append(programs.status("web"))
    freeze(programs.started[1].pid)
    listed = json.loads(programs.handoff("list", "--json").stdout)
    os.kill(programs.started[1].pid, signal.SIGCONT)
    programs.status("api")
    records += [state["upgrade"] for state in states if "upgrade" in state]
    draining = [old for state in states for old in state.get("draining", ())]
    (silent,) = [row for row in listed["services"] if row["service"] == "api"]
    return {
        "The record": {key for record in records for key in record},
        "steps": {step for record in records for step in record["steps"]},
        "status": {key for state in states for key in state},
        "deadlines": {key for state in states for key in state["deadlines"]},
        "draining": {key for old in draining for key in old},
        "list": set(listed),
        "A service that gives no answer": set(silent),
    }


def test_documented_keys(printed: dict[str, set[str]]) -> None:
    """docs/json.md names every key that commands print, and no other."""
    assert documented() == printed


def test_documented_fields() -> None:
    """docs/json.md names every field of the record, every step and every deadline that the code knows."""
    found = documented()

    assert found["The record"] == set(attrs.fields_dict(Record))
    assert found["steps"] == {step.value for step in Step}
    assert found["deadlines"] == set(attrs.fields_dict(Deadlines))


def test_types_are_as_documented(programs: Programs) -> None:
    """Times are seconds as numbers, generations and counts integers, and the state is a word."""
    serve(programs)

    record = programs.upgrade("web", "--probation", "0.1", "--wait", "exit")
    state = programs.status("web")

    assert all(isinstance(seconds, float) for seconds in record["steps"].values())
    assert list(record["steps"].values()) == sorted(record["steps"].values())
    assert record["steps"]["commit"] <= record["seconds"] <= record["steps"]["drain"]
    assert abs(record["started"] - time.time()) < 3600
    assert [type(record[key]) for key in ("old", "new", "kept", "added", "removed")] == [int] * 5
    assert (record["old"], record["new"], record["kept"], record["added"], record["removed"]) == (1, 2, 1, 0, 0)
    assert state["upgrade"]["upgrade"] == record["upgrade"]
    assert state["listener_count"] == len(state["listeners"]) == 1
