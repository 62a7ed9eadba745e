"""The library in programs with threads: what an application sees, and what becomes of what it does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Command, wait_until
from tests.programs import EXAMPLES, PATIENCE, Programs, wait_for_end
from tests.scripts import (
    THREADS,
    Clients,
    Script,
    ask,
    certificate,
    connect,
    exit_status,
    finish,
    hold,
)

STEPS = ("spawn", "adopt", "ready", "cutover", "probation", "commit", "drain", "exit", "rollback")
PLAIN = """
with handoff.Service("web", drain_timeout=float(os.environ.get("DRAIN", "30"))) as service:
    serve(service, *sys.argv[1:])
"""
TCP = "tcp://127.0.0.1:0"
KEEP = ("--wait", "cutover", "--probation", "60")


def plain(programs: Programs, *addresses: str, **environment: str) -> tuple[Script, list[str]]:
    """A service that just serves, and its addresses."""
    script = Script(programs, THREADS, PLAIN, *(addresses or (TCP,)), **environment)
    return script, script.serves()


def logged(programs: Programs, text: str) -> None:
    """Wait until the programs have written it to their standard error."""
    wait_until(lambda: text in programs.shown(), f"{text!r} on the standard error{programs.shown()}")


def stop(script: Script) -> None:
    """End a first generation in order."""
    script.process.terminate()
    assert script.process.wait(PATIENCE) == 0, script.programs.shown()


# Unix sockets


def test_unix_path_is_there_all_the_time(programs: Programs, tmp_path: Path) -> None:
    """A client that connects to a Unix socket again and again never fails during an upgrade; mode and file stay."""
    path = tmp_path / "web.sock"
    _, (address,) = plain(programs, f"unix://{path}?mode=660")
    before = path.stat()

    with Clients(address) as clients:
        programs.upgrade("web", "--probation", "0.2", "--wait", "exit")

    after = path.stat()
    assert clients.failures == []
    assert {1, 2} == set(clients.generations)
    assert stat.S_IMODE(after.st_mode) == 0o660
    assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino)


def test_unix_path_that_the_old_program_unlinks(programs: Programs, tmp_path: Path) -> None:
    """A path that the old program removes at its end is back at once, and the log says so."""
    path = tmp_path / "web.sock"
    _, (address,) = plain_that_unlinks(programs, path)

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    logged(programs, f"{path} was unlinked by somebody, and is back")
    assert ask(address) == 2


def plain_that_unlinks(programs: Programs, path: Path) -> tuple[Script, list[str]]:
    """A service whose program removes its path at its end, as many do."""
    script = Script(
        programs,
        THREADS,
        "import atexit\natexit.register(lambda: (os.unlink(sys.argv[1][7:]), say('unlinked')))" + PLAIN,
        f"unix://{path}",
    )
    return script, script.serves()


def test_unix_path_is_unlinked_again_and_again(programs: Programs, tmp_path: Path) -> None:
    """A path is put back after each of several upgrades whose old program removes it."""
    path = tmp_path / "web.sock"
    script, (address,) = plain_that_unlinks(programs, path)

    for generation in (1, 2, 3):
        programs.upgrade("web", "--probation", "0", "--wait", "exit")
        script.wait_for("unlinked")
        wait_until(path.exists, "the path back")
        assert ask(address) == generation + 1


def test_added_unix_path_goes_with_a_rollback(programs: Programs, tmp_path: Path) -> None:
    """A path that only the new generation listens on is there in probation, and gone after the rollback."""
    script, (address,) = plain(programs)
    added = tmp_path / "added.sock"
    programs.handoff("upgrade", "web", *KEEP, "--", *script.command(address, f"unix://{added}"))
    assert ask(f"unix://{added}") == 2

    assert programs.handoff("rollback", "web").returncode == 0

    assert list(tmp_path.glob("added*")) == []
    assert ask(address) == 1


def test_removed_unix_path_goes_with_the_commit(programs: Programs, tmp_path: Path) -> None:
    """A path that the new generation does not listen on is there until the commit, and gone afterwards."""
    path = tmp_path / "removed.sock"
    script, (tcp, unix) = plain(programs, TCP, f"unix://{path}")
    programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "0.5", "--", *script.command(tcp))
    assert ask(unix) == 1

    assert wait_for_end(script.process.pid)

    assert list(tmp_path.glob("removed*")) == []
    assert ask(tcp) == 2


def test_unix_path_goes_with_the_service(programs: Programs, tmp_path: Path) -> None:
    """When the service is stopped nothing is left of its path."""
    script, _ = plain(programs, f"unix://{tmp_path}/web.sock")

    stop(script)

    assert list(tmp_path.glob("web.sock*")) == []


def test_unix_path_of_somebody_else_stays(programs: Programs, tmp_path: Path) -> None:
    """A path at which another socket was put meanwhile is not the service's to remove."""
    path = tmp_path / "web.sock"
    script, _ = plain(programs, f"unix://{path}")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other.sock"))
        os.rename(tmp_path / "other.sock", path)
        theirs = path.stat().st_ino

        stop(script)

        assert path.stat().st_ino == theirs


def test_stale_unix_path_is_replaced(programs: Programs, tmp_path: Path) -> None:
    """The path that a killed service left there does not keep the next one from starting."""
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    _, (address,) = plain(programs, f"unix://{path}")

    assert ask(address) == 1


# ports


def test_port_zero_keeps_its_port(programs: Programs) -> None:
    """What asked for port 0 has the same port after the upgrade, asking for port 0 again."""
    script, before = plain(programs, TCP)

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert script.serves(2) == before
    assert ask(before[0]) == 2


def test_two_listeners_with_port_zero(programs: Programs) -> None:
    """Two that ask for port 0 keep their ports, each its own."""
    script, before = plain(programs, TCP, TCP)

    record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert before[0] != before[1]
    assert script.serves(2) == before
    assert [ask(address) for address in before] == [2, 2]
    assert (record["kept"], record["added"], record["removed"]) == (2, 0, 0)


def test_ipv6(programs: Programs) -> None:
    """A listener on an IPv6 address is upgraded like any other."""
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 here")
    script, (address,) = plain(programs, "tcp://[::1]:0")

    with Clients(address) as clients:
        programs.upgrade("web", "--probation", "0.1", "--wait", "exit")

    assert address.startswith("tcp://[::1]:")
    assert script.serves(2) == [address]
    assert clients.failures == []


# listeners that are added and removed


def test_listeners_are_added_and_removed(programs: Programs) -> None:
    """In probation the old generation goes on accepting where the new one does not listen, and nowhere else."""
    script, (kept, removed) = plain(programs, TCP, "tcp://127.0.0.2:0")

    done = programs.handoff("upgrade", "web", *KEEP, "--", *script.command(kept, "tcp://127.0.0.3:0"))

    assert done.returncode == 0, done.stderr
    _, added = script.serves(2)
    assert [ask(address) for address in (kept, removed, added)] == [2, 1, 2]
    record = programs.status("web")["upgrade"]
    assert (record["kept"], record["added"], record["removed"]) == (1, 1, 1)


def test_removed_listener_is_refused_after_commit(programs: Programs) -> None:
    """After the commit nobody listens any more where the new generation does not."""
    script, (kept, removed) = plain(programs, TCP, "tcp://127.0.0.2:0")

    programs.upgrade("web", "--probation", "0", "--", *script.command(kept))

    assert wait_for_end(script.process.pid)
    with pytest.raises(ConnectionRefusedError):
        connect(removed)
    assert ask(kept) == 2


def test_listeners_after_a_rollback(programs: Programs) -> None:
    """After a rollback the old generation accepts on all that it had, and what was added is refused."""
    script, (kept, removed) = plain(programs, TCP, "tcp://127.0.0.2:0")
    programs.handoff("upgrade", "web", *KEEP, "--", *script.command(kept, "tcp://127.0.0.3:0"))
    _, added = script.serves(2)

    assert programs.handoff("rollback", "web").returncode == 0

    assert [ask(address) for address in (kept, removed)] == [1, 1]
    with pytest.raises(ConnectionRefusedError):
        connect(added)


def test_new_listener_that_cannot_be_bound(programs: Programs) -> None:
    """When the new generation can't bind what is new, the upgrade is rolled back with the reason."""
    script, (address,) = plain(programs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"

        done = programs.handoff("upgrade", "web", "--", *script.command(address, taken))

    assert done.returncode == 1
    assert (
        f"handoff: web: rolled back: CannotListen: cannot listen on {taken}: another process listens there; "
        f"generation 1 serves on\n"
    ) in done.stderr
    assert ask(address) == 1


def test_changed_options_are_applied_at_commit(programs: Programs, tmp_path: Path) -> None:
    """Backlog and mode of a kept listener are those of the old version until the commit, then those of the new one."""
    path = tmp_path / "web.sock"
    script = Script(programs, THREADS, BACKLOG, f"{TCP}?backlog=5", f"unix://{path}?mode=600")
    tcp, _ = script.serves()
    new = script.command(f"{tcp}?backlog=50", f"unix://{path}?mode=666")

    programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "0.5", "--", *new)

    assert (backlog(tcp), stat.S_IMODE(path.stat().st_mode)) == (5, 0o600)
    assert wait_for_end(script.process.pid)
    wait_until(lambda: (backlog(tcp), stat.S_IMODE(path.stat().st_mode)) == (50, 0o666), "the new options")


BACKLOG = """
import struct

def tell_backlog(connection, service):
    # TCP_INFO of a listening socket: tcpi_sacked is its backlog (tcp_get_info in the kernel)
    with connection, socket.socket(fileno=os.dup(listeners[0].fileno())) as listener:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        connection.sendall(b"%d 0\\n" % struct.unpack_from("I", info, 28))

listeners = []
with handoff.Service("web") as service:
    listen = service.listen
    service.listen = lambda address: listeners.append(listen(address)) or listeners[-1]
    serve(service, *sys.argv[1:], answer=tell_backlog)
"""


def backlog(address: str) -> int:
    """The backlog of a service's first listener."""
    with connect(address) as connection, connection.makefile() as reader:
        return int(reader.readline().split()[0])


def test_listen_after_ready(programs: Programs) -> None:
    """A listener that comes after `ready` is refused with a sentence that says so."""
    script = Script(
        programs,
        THREADS,
        """
with handoff.Service("web") as service:
    service.ready()
    try:
        service.listen("tcp://127.0.0.1:0")
    except handoff.HandoffError as error:
        say("refused", error)
    service.stop()
""",
    )

    told = script.wait_for("refused")

    assert " ".join(told) == f"cannot listen on {TCP}: listen() comes before ready()"
    assert script.process.wait(PATIENCE) == 0


# hooks

HOOKS = f"""
service = handoff.Service("web")
for step in {STEPS}:
    service.on(step, lambda record, step=step: say("hook", service.generation, step, record.old, record.new))
with service:
    serve(service, "{TCP}")
"""


def test_hooks_are_called_in_order(programs: Programs) -> None:
    """Each step's hook is called once, in the order of the steps, in both generations, where it is theirs."""
    script = Script(programs, THREADS, HOOKS)
    script.serves()

    programs.upgrade("web", "--probation", "0.1", "--wait", "exit")

    lines: list[list[str]] = []
    while ["2", "exit"] not in [line[:2] for line in lines]:
        lines.append(script.wait_for("hook"))
    old = [line[1] for line in lines if line[0] == "1"]
    new = [line[1] for line in lines if line[0] == "2"]
    assert old == ["spawn", "adopt", "ready", "cutover", "probation", "commit", "drain", "exit"]
    assert new == ["adopt", "ready", "cutover", "commit", "exit"]
    assert all(line[2:] == ["1", "2"] for line in lines)


def test_hooks_of_a_rollback(programs: Programs) -> None:
    """In a rollback the old generation's `rollback` hook follows the steps that were done."""
    script = Script(programs, THREADS, HOOKS)
    script.serves()
    programs.handoff("upgrade", "web", *KEEP)

    assert programs.handoff("rollback", "web").returncode == 0

    stop(script)
    old = [line[2] for line in script.rest() if line[:2] == ["hook", "1"]]
    assert old == ["spawn", "adopt", "ready", "cutover", "rollback"]


def test_hook_that_raises(programs: Programs) -> None:
    """A hook that raises is logged, and neither the upgrade nor another hook suffers."""
    script = Script(
        programs,
        THREADS,
        f"""
def fail(record):
    raise ValueError("a bad hook")

with handoff.Service("web") as service:
    for step in {STEPS}:
        service.on(step, fail)
        service.on(step, lambda record, step=step: say("hook", service.generation, step))
    serve(service, "{TCP}")
""",
    )
    (address,) = script.serves()

    record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert record["result"] == "committed"
    assert script.wait_for("hook", "1", "exit") == []
    assert ask(address) == 2
    assert programs.shown().count("ValueError: a bad hook") >= 8


def test_hook_of_no_step(programs: Programs) -> None:
    """A hook for a step that there is not is an error at once."""
    script = Script(programs, THREADS, "handoff.Service('web').on('coffee', print)")

    assert script.process.wait(PATIENCE) == 1
    assert "ValueError: 'coffee' is not a valid Step" in programs.shown()


def test_service_that_is_never_entered(programs: Programs) -> None:
    """Describing a service does nothing yet: no descriptor is open, and no directory is made."""
    script = Script(
        programs,
        THREADS,
        """
handoff.Service
before = len(os.listdir("/proc/self/fd"))
service = handoff.Service("web")
say("generation", service.generation, len(os.listdir("/proc/self/fd")) - before)
""",
    )

    assert script.wait_for("generation") == ["0", "0"]
    assert list(programs.runtime_dir.iterdir()) == []


# asked from inside

SIGHUP = f"""
with handoff.Service("web", probation=float(sys.argv[1])) as service:
    signal.signal(signal.SIGHUP, lambda number, frame: service.upgrade())
    serve(service, "{TCP}")
"""


def test_upgrade_by_signal(programs: Programs) -> None:
    """A handler of SIGHUP that calls `upgrade` starts one, and the next generation serves."""
    script = Script(programs, THREADS, SIGHUP, "0")
    (address,) = script.serves()

    script.process.send_signal(signal.SIGHUP)

    assert script.serves(2) == [address]
    assert script.process.wait(PATIENCE) == 0
    assert ask(address) == 2


def test_upgrade_by_signal_while_another_runs(programs: Programs) -> None:
    """A second one from inside is refused in the log, and changes nothing."""
    script = Script(programs, THREADS, SIGHUP, "60")
    (address,) = script.serves()
    script.process.send_signal(signal.SIGHUP)
    script.serves(2)
    wait_until(lambda: programs.status("web")["state"] == "probation", "probation")

    script.process.send_signal(signal.SIGHUP)

    logged(programs, "web: generation 1 is already being replaced (probation)")
    assert programs.status("web")["state"] == "probation"
    assert ask(address) == 2


def test_upgrade_asked_of_a_generation_in_probation(programs: Programs) -> None:
    """In the new generation `upgrade` is refused in the log until it is in charge."""
    script = Script(programs, THREADS, SIGHUP, "60")
    (address,) = script.serves()
    programs.handoff("upgrade", "web", *KEEP)
    new = finish(connect(address))[1]

    os.kill(new, signal.SIGHUP)

    logged(programs, "web: generation 2 is not in charge: no upgrade")


def test_upgrade_with_another_command(programs: Programs) -> None:
    """`upgrade(command)` starts that command."""
    script = Script(
        programs,
        THREADS,
        f"""
with handoff.Service("web", probation=0) as service:
    command = [sys.executable, sys.argv[0], "other"]
    signal.signal(signal.SIGHUP, lambda number, frame: service.upgrade(command))
    say("arguments", service.generation, *sys.argv[1:])
    serve(service, "{TCP}")
""",
    )
    script.serves()

    script.process.send_signal(signal.SIGHUP)

    assert script.wait_for("arguments", "2") == ["other"]
    assert script.process.wait(PATIENCE) == 0


# the end


def test_stop_from_inside(programs: Programs) -> None:
    """`stop` finishes what is open, and the program ends with status 0."""
    script = Script(
        programs,
        THREADS,
        f"""
with handoff.Service("web") as service:
    signal.signal(signal.SIGHUP, lambda number, frame: threading.Thread(target=service.stop).start())
    serve(service, "{TCP}")
say("left")
""",
    )
    (address,) = script.serves()
    held = hold(address)

    script.process.send_signal(signal.SIGHUP)

    wait_until(lambda: programs.status("web")["state"] == "stopping", "stopping")
    assert finish(held)[0] == 1
    assert script.wait_for("left") == []
    assert script.process.wait(PATIENCE) == 0
    with pytest.raises(ConnectionRefusedError):
        connect(address)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(programs: Programs, number: signal.Signals) -> None:
    """The first TERM or INT finishes connections, the second ends at once and closes them; status 0."""
    script, (address,) = plain(programs, DRAIN="3600")
    with hold(address) as held:
        script.process.send_signal(number)
        wait_until(lambda: programs.status("web")["state"] == "stopping", "stopping")

        script.process.send_signal(number)

        assert script.process.wait(PATIENCE) == 0
        assert held.recv(10) == b""


def test_handler_of_the_application_stays(programs: Programs) -> None:
    """A signal for which the application has a handler of its own is not the Service's."""
    script = Script(
        programs,
        THREADS,
        f"""
signal.signal(signal.SIGTERM, lambda number, frame: say("own"))
with handoff.Service("web") as service:
    signal.signal(signal.SIGHUP, lambda number, frame: service.stop())
    serve(service, "{TCP}")
""",
    )
    (address,) = script.serves()

    script.process.terminate()

    assert script.wait_for("own") == []
    assert ask(address) == 1
    assert programs.status("web")["state"] == "serving"
    script.process.send_signal(signal.SIGHUP)
    assert script.process.wait(PATIENCE) == 0


def test_handlers_are_put_back(programs: Programs) -> None:
    """After the context TERM and INT mean what they meant before it."""
    script = Script(
        programs,
        THREADS,
        """
with handoff.Service("web") as service:
    service.ready()
    service.stop()
say("after", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
    signal.getsignal(signal.SIGINT) is signal.default_int_handler)
""",
    )

    assert script.wait_for("after") == ["True", "True"]
    assert script.process.wait(PATIENCE) == 0


def test_application_that_never_leaves(programs: Programs) -> None:
    """A program whose main thread never leaves its Service is ended after the drain: status 0, a line in the log."""
    script = Script(
        programs,
        THREADS,
        f"""
with handoff.Service("web") as service:
    listener = service.listen("{TCP}")
    threading.Thread(target=accept, args=(service, listener), daemon=True).start()
    service.ready()
    say("serves", service.generation, listener.address)
    threading.Event().wait()
""",
    )
    (address,) = script.serves()

    programs.upgrade("web", "--probation", "0")

    assert script.process.wait(PATIENCE) == 0
    assert "generation 1 has ended; 5 s later the application has not left its Service" in programs.shown()
    assert not (programs.runtime_dir / "web" / "gen-1.sock").exists()
    assert ask(address) == 2
    for pid in programs.pids():
        os.kill(pid, signal.SIGTERM)
        assert wait_for_end(pid)
    assert not list((programs.runtime_dir / "web").glob("*.sock"))


def test_rolled_back_generation_ends_with_status_one(programs: Programs) -> None:
    """Leaving its context raises RolledBack in a generation that was rolled back: exit status 1."""
    _, (address,) = plain(programs)
    programs.handoff("upgrade", "web", *KEEP)
    new = finish(connect(address))[1]

    assert programs.handoff("rollback", "web").returncode == 0

    assert wait_for_end(new)
    assert exit_status(new) == 1
    assert "RolledBack: web: generation 2 was rolled back: its rollback was asked for" in programs.shown()


# forks

FORK = f"""
with handoff.Service("web") as service:
    listener = service.listen("{TCP}")
    service.ready()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b".")
        while True:
            signal.pause()
    os.read(ready, 1)  # a signal that comes before the child runs is lost in CPython's own fork handler
    say("child", child)
    say("serves", service.generation, listener.address)
    accept(service, listener)
"""


@pytest.mark.kills
def test_forked_child_is_not_the_service(programs: Programs) -> None:
    """When a service is killed its forked child does not make it look alive, and the next start takes over."""
    script = Script(programs, THREADS, FORK)
    (child,) = script.wait_for("child")
    (address,) = script.serves()

    script.process.kill()
    script.process.wait(PATIENCE)

    assert not wait_for_end(int(child), 0)
    assert programs.handoff("status", "web").returncode == 3
    assert programs.handoff("list").stdout == ""
    second, (other,) = plain_as(programs, 2)
    assert ask(other) == 2
    os.kill(int(child), signal.SIGTERM)
    assert wait_for_end(int(child))
    stop(second)
    assert address != other


def plain_as(programs: Programs, generation: int, *addresses: str) -> tuple[Script, list[str]]:
    """A service that is not the first that was started here, and its addresses."""
    script = Script(programs, THREADS, PLAIN, *(addresses or (TCP,)))
    return script, script.serves(generation)


def test_forked_child_and_signals(programs: Programs) -> None:
    """TERM to a forked child ends the child as it would any program, and the service serves on."""
    script = Script(programs, THREADS, FORK)
    child = int(script.wait_for("child")[0])
    (address,) = script.serves()

    os.kill(child, signal.SIGTERM)

    wait_until(lambda: _state(child) in ("Z", "X"), "the child's end")
    assert ask(address) == 1
    assert programs.status("web")["state"] == "serving"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_forked_child_does_not_hold_up_an_upgrade(programs: Programs) -> None:
    """A forked child that lives on keeps neither the upgrade nor the next one from its end."""
    script = Script(programs, THREADS, FORK)
    (address,) = script.serves()

    for generation in (2, 3):
        programs.upgrade("web", "--probation", "0", "--wait", "exit")
        assert ask(address) == generation


# a second start


def test_second_start_is_refused(programs: Programs) -> None:
    """A program that is just started again ends with one clear line, and the running one serves undisturbed."""
    script, (address,) = plain(programs)
    with Clients(address) as clients:
        second = programs.start(script.path, TCP)

        assert second.wait(PATIENCE) == 1

    assert (
        programs.shown()
        .rstrip()
        .endswith(
            f"AlreadyRunning: web: generation 1 (pid {script.process.pid}) is already running; "
            f"replace it with `handoff upgrade web`, or stop it first"
        )
    )
    assert (clients.failures, set(clients.generations)) == ([], {1})
    state = programs.status("web")
    assert state["state"] == "serving" and "upgrade" not in state
    assert list((programs.runtime_dir / "web").glob("gen-*.sock")) == [programs.runtime_dir / "web" / "gen-1.sock"]


def test_second_start_in_probation(programs: Programs) -> None:
    """A program that is just started while an upgrade runs is refused, and the upgrade goes on."""
    script, (address,) = plain(programs)
    programs.handoff("upgrade", "web", *KEEP)

    second = programs.start(script.path, TCP)

    assert second.wait(PATIENCE) == 1
    assert "generation 1 is already being replaced (probation)" in programs.shown()
    assert ask(address) == 2
    assert programs.status("web")["state"] == "probation"


def test_second_start_while_the_first_is_stopping(programs: Programs) -> None:
    """A program that is started while the one before finishes its connections takes the service over at once."""
    script, (address,) = plain(programs)
    held = hold(address)
    script.process.terminate()
    wait_until(lambda: programs.status("web")["state"] == "stopping", "stopping")

    _, (again,) = plain_as(programs, 2, address)

    assert (again, ask(again)) == (address, 2)
    assert finish(held)[0] == 1
    assert script.process.wait(PATIENCE) == 0
    assert programs.status("web")["generation"] == 2


@pytest.mark.kills
def test_second_start_after_the_first_was_killed(programs: Programs) -> None:
    """A program that is started after the one before was killed serves, with the next number."""
    script, (address,) = plain(programs)
    script.process.kill()
    script.process.wait(PATIENCE)

    second, (again,) = plain_as(programs, 2, address)

    assert ask(again) == 2
    stop(second)
    assert not list((programs.runtime_dir / "web").glob("*.sock"))


# what the new program inherits

INHERITS = """
found = {}
for name in os.listdir("/proc/self/fd"):
    try:
        found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:  # the one that lists them
        pass
say("descriptors", *sorted(found))
parent = os.getppid()
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
for end in os.pipe():
    os.set_inheritable(end, True)
named = "HANDOFF_UPGRADE" in os.environ
with handoff.Service("web") as service:
    import subprocess
    say("environment", service.generation, named, "HANDOFF_UPGRADE" in os.environ,
        subprocess.run(["printenv", "HANDOFF_UPGRADE"]).returncode)
    say("parent", service.generation, parent, os.getppid(), os.getpid())
    serve(service, "tcp://127.0.0.1:0")
"""


def test_new_program_inherits_nothing(programs: Programs) -> None:
    """The new program begins with 0, 1 and 2 open, whatever inheritable descriptors the old one has."""
    script = Script(programs, THREADS, INHERITS)
    script.wait_for("descriptors")
    script.serves()

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert script.wait_for("descriptors") == ["0", "1", "2"]


def test_upgrade_variable_is_gone(programs: Programs) -> None:
    """HANDOFF_UPGRADE is there when the new program starts, and neither in its environment nor in a child's later."""
    script = Script(programs, THREADS, INHERITS)
    script.serves()

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    assert script.wait_for("environment", "2") == ["True", "False", "1"]


def test_new_program_is_no_child_of_the_old_one(programs: Programs) -> None:
    """Once it has called, the new program's parent is whoever takes orphans, neither the old one nor its shell."""
    script = Script(programs, THREADS, INHERITS)
    script.serves()

    programs.upgrade("web", "--probation", "0", "--wait", "exit")

    before, after, _ = script.wait_for("parent", "2")
    assert before != after
    assert int(after) == os.getpid()


def test_standard_error_after_commit(programs: Programs) -> None:
    """The new generation's errors, and those of a child from before the commit, go where the old one's went."""
    script = Script(
        programs,
        THREADS,
        f"""
import subprocess
with handoff.Service("web") as service:
    child = subprocess.Popen(["/bin/sh", "-c", "read line; echo child $line >&2"], stdin=subprocess.PIPE)

    def speak(connection, service):
        with connection:
            os.write(2, b"generation %d speaks\\n" % service.generation)
            child.communicate(b"%d\\n" % service.generation)
            connection.sendall(b"0 0\\n")

    serve(service, "{TCP}", answer=speak)
child.communicate()
""",
    )
    (address,) = script.serves()
    programs.upgrade("web", "--probation", "0", "--wait", "exit")
    assert script.process.wait(PATIENCE) == 0

    ask(address)

    logged(programs, "generation 2 speaks\n")
    logged(programs, "child 2\n")


def test_standard_error_of_a_third_generation(programs: Programs) -> None:
    """However many upgrades lie between, errors go where those of the first one went, and nobody passes them on."""
    _, (address,) = plain(programs)
    for _ in range(3):
        programs.upgrade("web", "--probation", "0", "--wait", "exit")

    pid = finish(connect(address))[1]

    assert os.readlink(f"/proc/{pid}/fd/2") == str(programs.errors)


# drain

KEPT = f"""
def keep(connection, service):
    with connection, connection.makefile("rb") as reader:
        while connection.wait_for_request(reader):
            line = reader.readline()
            if not line:
                return
            connection.sendall(f"{{service.generation}} {{service.draining}}\\n".encode())

with handoff.Service("web", grace=float(sys.argv[1]), drain_timeout=60) as service:
    serve(service, "{TCP}", answer=keep)
"""


def test_draining(programs: Programs) -> None:
    """`draining` is False while a generation serves and in probation, and True after the commit."""
    script = Script(programs, THREADS, KEPT, "60")
    (address,) = script.serves()
    with connect(address) as kept, kept.makefile("rb") as reader:
        told = []
        kept.sendall(b"?\n")
        told.append(reader.readline())
        programs.handoff("upgrade", "web", "--wait", "cutover", "--probation", "0.5")
        kept.sendall(b"?\n")
        told.append(reader.readline())
        wait_until(lambda: programs.status("web")["generation"] == 2, "commit")
        kept.sendall(b"?\n")
        told.append(reader.readline())

    assert told == [b"1 False\n", b"1 False\n", b"1 True\n"]
    assert script.process.wait(PATIENCE) == 0


def test_idle_connection_is_closed_after_the_grace_time(programs: Programs) -> None:
    """A kept connection on which nothing comes is closed after the grace time, long before the drain's deadline."""
    script = Script(programs, THREADS, KEPT, "0.3")
    (address,) = script.serves()
    with connect(address) as kept, kept.makefile("rb") as reader:
        kept.sendall(b"?\n")
        assert reader.readline() == b"1 False\n"

        record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

        assert reader.readline() == b""
    assert (record["open"], record["finished"], record["closed"]) == (1, 1, 0)
    assert record["steps"]["drain"] - record["steps"]["commit"] >= 0.3


def test_request_in_the_grace_time_is_answered(programs: Programs) -> None:
    """A request that comes on a kept connection after the commit is answered, and the client told to go."""
    port = programs.example("threaded", "--probation", "0")
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as kept, kept.makefile("rb") as reader:
        kept.sendall(b"GET /echo/one HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"Connection: close" not in response(reader)[0]
        programs.upgrade("web")

        kept.sendall(b"GET /echo/two HTTP/1.1\r\nHost: x\r\n\r\n")

        head, body = response(reader)
        assert b"Connection: close" in head and b"X-Generation: 1" in head
        assert body == b"two\n"
        assert reader.read() == b""


def response(reader: socket.SocketIO | object) -> tuple[bytes, bytes]:
    """Head and body of one answer with a length."""
    assert hasattr(reader, "readline") and hasattr(reader, "read")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        assert line, head
        head += line
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    return head, reader.read(length)


@pytest.mark.parametrize("example", ["threaded", "asyncio_http"])
@pytest.mark.parametrize("cut", [1, 20, 40])
def test_half_a_request(programs: Programs, example: str, cut: int) -> None:
    """Of a request half comes before the upgrade and half after the commit: it is answered by the old generation."""
    port = programs.example(example, "--probation", "0")
    request = b"GET /echo/half HTTP/1.1\r\nHost: example\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client, client.makefile("rb") as reader:
        client.sendall(request[:cut])
        wait_until(lambda: programs.status("web")["connections"] == 1, "it accepted")
        programs.upgrade("web")

        client.sendall(request[cut:])

        head, body = response(reader)
        assert head.startswith(b"HTTP/1.1 200 ") and b"x-generation: 1" in head.lower()
        assert body == b"half\n"
    assert programs.started[0].wait(PATIENCE) == 0


def test_slow_answer_is_finished(programs: Programs) -> None:
    """An answer that is under way at the commit comes to its end."""
    port = programs.example("threaded", "--probation", "0")
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client, client.makefile("rb") as reader:
        client.sendall(b"GET /slow/line/5/0.1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"

        programs.upgrade("web")

        whole = reader.read()
        assert [b"line %d" % number in whole for number in range(5)] == [True] * 5
        assert whole.endswith(b"0\r\n\r\n")


# TLS

TLS = f"""
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])

def encrypted(connection, service):
    try:
        answer(context.wrap_socket(connection, server_side=True), service)
    except OSError:
        pass

with handoff.Service("web", drain_timeout=float(sys.argv[3])) as service:
    serve(service, "{TCP}", answer=encrypted)
"""


@contextlib.contextmanager
def encrypted(address: str, crt: Path):  # type: ignore[no-untyped-def]
    """A TLS connection that is held."""
    context = ssl.create_default_context(cafile=str(crt))
    with context.wrap_socket(connect(address), server_hostname="localhost") as connection:
        connection.sendall(b"hold")
        assert connection.recv(10) == b"held"
        yield connection


def test_encrypted_connection_is_finished(programs: Programs, tmp_path: Path) -> None:
    """A TLS connection, whose descriptor another object has, is counted and waited for."""
    crt, key = certificate(tmp_path)
    script = Script(programs, THREADS, TLS, str(crt), str(key), "60")
    (address,) = script.serves()
    with (
        encrypted(address, crt) as held,
        Command("upgrade", "web", "--probation", "0", "--wait", "exit") as upgrade,
    ):
        assert programs.status("web")["connections"] == 1
        script.wait_for("drains", "1")

        held.sendall(b"?")

        assert held.recv(100).startswith(b"1 ")
        status, told = upgrade.end()
    assert status == 0, upgrade.stderr
    assert "; of 1 connections of generation 1, 0 had to be closed" in told


def test_encrypted_connection_is_closed_at_the_deadline(programs: Programs, tmp_path: Path) -> None:
    """A TLS connection that does not end is closed at the drain's deadline, and counted as that."""
    crt, key = certificate(tmp_path)
    script = Script(programs, THREADS, TLS, str(crt), str(key), "0.3")
    (address,) = script.serves()
    with encrypted(address, crt) as held:
        record = programs.upgrade("web", "--probation", "0", "--wait", "exit")

        with contextlib.suppress(ssl.SSLEOFError):
            assert held.recv(10) == b""
    assert (record["open"], record["finished"], record["closed"]) == (1, 0, 1)


def test_examples_are_programs() -> None:
    """The examples tell their options, as any program does."""
    for name in ("threaded", "asyncio_http"):
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0
        assert b"--listen" in done.stdout
