"""Starting programs, and how they end: sessions and groups, what is inherited, who the parent is."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from handoff.core.errors import CannotSpawn
from handoff.core.launch import Launch
from handoff.linux import processes
from handoff.linux.processes import Program
from tests.programs import reap

PATIENCE = 10.0


class Started:
    """Starts Python programs that write to a pipe; `end` kills what is left of them and reaps it."""

    def __init__(self) -> None:
        self._programs: list[Program] = []
        self._groups: list[int] = []
        self._pipes: list[int] = []

    def start(self, text: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> tuple[Program, int]:
        """Start a Python program; returns it and the reading end of its standard error."""
        return self.command(sys.executable, "-c", text, *arguments, environment=environment)

    def command(self, *command: str, environment: Mapping[str, str] = os.environ) -> tuple[Program, int]:
        """Start any program."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._pipes.append(reading)
        try:
            launch = Launch(command=command, cwd=os.getcwd(), environment=environment)
            program = processes.spawn(launch, writing)
        finally:
            os.close(writing)
        self._programs.append(program)
        self._groups.append(program.group)
        return program, reading

    def end(self) -> None:
        """Kill everything, group by group."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for program in self._programs:
            program.release()
        for pipe in self._pipes:
            read(pipe)  # ends once nobody is left who writes
            os.close(pipe)
        reap()


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts programs; none is left when the test is over."""
    programs = Started()
    yield programs
    programs.end()


def read(pipe: int) -> str:
    """Everything until end of file."""
    pieces = []
    while select.select([pipe], [], [], PATIENCE)[0] and (piece := os.read(pipe, 65536)):
        pieces.append(piece)
    return b"".join(pieces).decode()


def read_line(pipe: int) -> str:
    """One line that a program has written."""
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([pipe], [], [], PATIENCE)[0], f"no whole line came: {line!r}"
        piece = os.read(pipe, 1)
        assert piece, f"end of file after {line!r}"
        line += piece
    return line.decode().strip()


def ended(pidfd: int) -> bool:
    """Wait for a process's end."""
    return bool(select.select([pidfd], [], [], PATIENCE)[0])


# Starting

TELL_PID = 'import os, signal, sys; sys.stderr.write(f"{os.getpid()}\\n"); sys.stderr.flush(); signal.pause()'


def test_session_of_its_own(started: Started) -> None:
    """A program runs in a session and a process group of its own, so that a whole group can be ended."""
    text = "import os, sys; sys.stderr.write(f'{os.getsid(0)} {os.getpgrp()}')"

    program, pipe = started.start(text)

    assert read(pipe) == f"{program.group} {program.group}"
    assert program.group not in (os.getsid(0), os.getpgrp())


LIST_DESCRIPTORS = """
import json, os, sys
found = {}
for name in os.listdir("/proc/self/fd"):
    try:
        found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:  # the one that lists them
        pass
sys.stderr.write(json.dumps(found))
"""


def test_only_standard_descriptors_are_inherited(started: Started) -> None:
    """A program gets 0, 1 and 2 and nothing else, while other threads open inheritable descriptors."""
    over = threading.Event()

    def open_inheritable() -> None:
        while not over.is_set():
            descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
            for descriptor in descriptors:
                os.set_inheritable(descriptor, True)
            for descriptor in descriptors:
                os.close(descriptor)

    threads = [threading.Thread(target=open_inheritable) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        found = [json.loads(read(started.start(LIST_DESCRIPTORS)[1])) for _ in range(10)]
    finally:
        over.set()
        for thread in threads:
            thread.join()

    assert [sorted(numbers) for numbers in found] == [["0", "1", "2"]] * 10


def test_standard_error_is_the_one_given(started: Started) -> None:
    """What a program writes to its standard error comes out of the pipe that it was given."""
    _, pipe = started.start(LIST_DESCRIPTORS)

    assert json.loads(read(pipe))["2"] == os.readlink(f"/proc/self/fd/{pipe}")


def test_environment(started: Started) -> None:
    """A program gets the environment that it was given, and not this process's."""
    text = "import os, sys; sys.stderr.write(os.environ['COLOUR'] + str('HOME' in os.environ))"

    _, pipe = started.start(text, environment={"COLOUR": "green"})

    assert read(pipe) == "greenFalse"


def test_arguments_are_kept(started: Started) -> None:
    """Arguments arrive as they are: the shell in between reads none of them."""
    arguments = ["a b", "$HOME", "`id`", "'", '"', "", "*", "-x", "a\nb", "\udcff"]

    _, pipe = started.start("import sys; sys.stderr.write(ascii(sys.argv[1:]))", *arguments)

    assert read(pipe) == ascii(arguments)


@pytest.mark.parametrize("command", ["no-such-command", "/no/such/command", "", "/etc/passwd", "/tmp"])
def test_no_such_command(started: Started, command: str) -> None:
    """A command that does not exist, or is no program, is refused by name, and nothing is started."""
    with pytest.raises(CannotSpawn) as caught:
        started.command(command)

    assert str(caught.value) == (
        f"cannot start {command}: no such command in {os.getcwd()} or on its PATH, or it may not be executed"
    )


def test_no_command_at_all() -> None:
    """An empty command is refused."""
    with pytest.raises(CannotSpawn):
        processes.spawn(Launch(command=(), cwd="/"), 2)


@pytest.mark.parametrize("word", ["\ud800", "a\0b"])
def test_words_that_the_system_cannot_take(started: Started, word: str) -> None:
    """Words and variables that no program can be given are refused, by the launch or when it is started."""
    with pytest.raises((ValueError, CannotSpawn)):
        started.command("true", word)
    with pytest.raises((ValueError, CannotSpawn)):
        started.command("true", environment={"COLOUR": word, "PATH": os.defpath})


def test_long_words_are_cut(started: Started) -> None:
    """An error quotes the beginning of a long command."""
    with pytest.raises(CannotSpawn) as caught:
        started.command("x" * 50_000)

    assert len(str(caught.value)) < 1000


def test_directory_that_is_gone() -> None:
    """A working directory that is gone is named, with what to do about it."""
    with pytest.raises(CannotSpawn) as caught:
        processes.spawn(Launch(command=("true",), cwd="/no/such/release"), 2)

    assert str(caught.value) == (
        "cannot start true: its working directory /no/such/release is gone; name another one with --cwd"
    )


def test_working_directory(tmp_path: Path) -> None:
    """A program starts in its launch's directory, and is told it by the name that it was given there."""
    (tmp_path / "release").mkdir()
    (tmp_path / "current").symlink_to("release")
    current = str(tmp_path / "current")
    text = "import os, sys; sys.stderr.write(os.getcwd() + ' ' + os.environ['PWD'])"
    reading, writing = os.pipe()

    program = processes.spawn(Launch(command=(sys.executable, "-c", text), cwd=current), writing)

    os.close(writing)
    told = read(reading)
    os.close(reading)
    assert ended(program.pidfd)
    program.release()
    assert told == f"{tmp_path}/release {current}"


def test_too_many_arguments(started: Started) -> None:
    """More arguments than the system takes are refused with its words."""
    with pytest.raises(CannotSpawn, match="Argument list too long"):
        started.command("true", *["x" * 100_000] * 100)


def test_command_by_the_programs_path(started: Started, tmp_path: Path) -> None:
    """A command is looked for in the PATH of the environment that it gets."""
    program = tmp_path / "greet"
    program.write_text("#!/bin/sh\necho hello >&2\n")
    program.chmod(0o755)

    _, pipe = started.command("greet", environment={"PATH": f"{tmp_path}:/bin:/usr/bin"})

    assert read(pipe) == "hello\n"


def test_own_launch() -> None:
    """What starts this program again runs the same file with the same arguments, in the same directory."""
    text = "from handoff.linux import processes; print(processes.own_launch().to_json())"

    done = subprocess.run([sys.executable, "-c", text, "a", "b"], capture_output=True, text=True, check=True)

    launch = json.loads(done.stdout)
    assert (launch["command"], launch["cwd"]) == ([sys.executable, "-c", text, "a", "b"], os.getcwd())


def test_own_launch_keeps_links(tmp_path: Path) -> None:
    """An interpreter that was called through a link is named by that link, which may point elsewhere by then."""
    (tmp_path / "current").symlink_to(Path(sys.executable).parent.parent)
    interpreter = str(tmp_path / "current" / "bin" / "python")
    text = "from handoff.linux import processes; print(processes.own_launch().command[0])"

    done = subprocess.run([interpreter, "-c", text], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == interpreter


# Ending


def wait_for_status(program: Program) -> int | None:
    """How a program ended, once it has."""
    assert ended(program.pidfd)
    return program.status()


@pytest.mark.parametrize("status", [0, 1, 3, 127, 128, 255])
def test_exit_status(started: Started, status: int) -> None:
    """A program's exit status is told."""
    program, _ = started.start(f"raise SystemExit({status})")

    assert wait_for_status(program) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGABRT])
def test_exit_by_a_signal(started: Started, number: signal.Signals) -> None:
    """A program that a signal ended is told by the signal's negative number."""
    text = f"import os, signal; signal.signal({number}, 0) if {number} != 9 else 0; os.kill(os.getpid(), {number})"

    program, _ = started.start(text)

    assert wait_for_status(program) == -number


def test_status_of_one_that_runs(started: Started) -> None:
    """A program that runs has no status."""
    program, pipe = started.start(TELL_PID)
    read_line(pipe)

    assert program.status() is None


def test_terminate_reaches_the_program(started: Started) -> None:
    """TERM reaches the program, which may clean up: its parent shell waits for it and tells its status."""
    text = """
import signal, sys
def clean_up(*_):
    sys.stderr.write("cleaned up")
    raise SystemExit(7)
signal.signal(signal.SIGTERM, clean_up)
sys.stderr.write("ready\\n")
sys.stderr.flush()
while True:
    signal.pause()
"""
    program, pipe = started.start(text)
    assert read_line(pipe) == "ready"

    program.terminate()

    assert wait_for_status(program) == 7
    assert read(pipe) == "cleaned up"


def test_kill_ends_the_whole_group(started: Started) -> None:
    """KILL ends the program and its children, so that its standard error comes to an end."""
    text = """
import os, signal, sys
if os.fork():
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
signal.pause()
"""
    program, pipe = started.start(text)
    assert read_line(pipe) == "ready"

    program.kill()

    assert ended(program.pidfd)
    assert read(pipe) == ""


def test_kill_of_one_that_has_ended(started: Started) -> None:
    """Ending what has ended is harmless."""
    program, pipe = started.start("")
    read(pipe)
    assert wait_for_status(program) == 0

    program.kill()
    program.terminate()

    assert program.status() == 0


SPAWNER = """
import os, select, sys
from handoff.core.launch import Launch
from handoff.linux import processes
reading, writing = os.pipe()
launch = Launch(command=(sys.executable, "-c", sys.argv[1]), cwd=os.getcwd(), environment=os.environ)
program = processes.spawn(launch, writing)
os.close(writing)
pid = int(os.fdopen(reading).readline())
def parent():
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("PPid:"))
before = parent() == program.group
program.release()
program.release()
try:
    os.waitpid(-1, os.WNOHANG)
    children = True
except ChildProcessError:
    children = False
print(pid, before, parent(), children, flush=True)
"""


def test_released_program_lives_on() -> None:
    """After its release a program is no child of who started it, and lives on when that one has ended."""
    with subprocess.Popen([sys.executable, "-c", SPAWNER, TELL_PID], stdout=subprocess.PIPE, text=True) as spawner:
        assert spawner.stdout
        pid, had_the_shell, parent, children = spawner.stdout.readline().split()
        assert spawner.wait(PATIENCE) == 0

    pidfd = os.pidfd_open(int(pid))
    alive = not processes.is_dead(pidfd)
    os.kill(int(pid), signal.SIGKILL)
    assert ended(pidfd)
    os.close(pidfd)
    reap()
    # This process is the nearest reaper of orphans, as a service manager would be.
    assert (had_the_shell, int(parent), children, alive) == ("True", os.getpid(), "False", True)


def kernel_tells_exit_status() -> bool:
    """Whether the kernel has PIDFD_INFO_EXIT."""
    process = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    status = processes.exit_status(pidfd, process.pid)
    os.close(pidfd)
    return status is not None


@pytest.mark.parametrize(("text", "status"), [("raise SystemExit(5)", 5), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_status_of_an_orphan(started: Started, text: str, status: int) -> None:
    """How a released program ended is known to whoever has its pidfd, before and after it was reaped."""
    if not kernel_tells_exit_status():
        pytest.skip("PIDFD_INFO_EXIT came with Linux 6.15")
    wait = 'import os, select, sys; sys.stderr.write(f"{os.getpid()}\\n"); sys.stderr.flush()\n'
    program, pipe = started.start(f"{wait}while os.getppid() != int(sys.argv[1]): os.sched_yield()\n{text}", tell_us())
    pid = int(read_line(pipe))
    pidfd = os.pidfd_open(pid)
    alive = processes.exit_status(pidfd, pid)

    program.release()

    assert ended(pidfd)
    as_zombie = processes.exit_status(pidfd, pid)
    os.waitpid(pid, 0)
    reaped = processes.exit_status(pidfd, pid)
    os.close(pidfd)
    assert (alive, as_zombie, reaped) == (None, status, status)


def tell_us() -> str:
    """The pid of this process, which orphans get as their parent."""
    return str(os.getpid())


def test_kill_group(started: Started) -> None:
    """A process is killed with its group, if it still is of that group."""
    program, pipe = started.start("import os; os.fork()\n" + TELL_PID)
    pid = int(read_line(pipe))
    read_line(pipe)
    pidfd = os.pidfd_open(pid)

    processes.kill_group(pidfd, pid, program.group)

    assert ended(pidfd)
    os.close(pidfd)
    assert read(pipe) == ""


def test_kill_of_another_group(started: Started) -> None:
    """A process that is not of the group that it was started in is killed alone."""
    program, pipe = started.start(TELL_PID)
    pid = int(read_line(pipe))
    other, other_pipe = started.start(TELL_PID)
    other_pid = int(read_line(other_pipe))
    pidfd, other_pidfd = os.pidfd_open(pid), os.pidfd_open(other_pid)

    processes.kill_group(pidfd, pid, other.group)

    gone = ended(pidfd)
    spared = not processes.is_dead(other_pidfd) and other.status() is None
    os.close(pidfd)
    os.close(other_pidfd)
    assert (gone, spared) == (True, True)
    assert wait_for_status(program) == -signal.SIGKILL


def test_kill_without_a_pid(started: Started) -> None:
    """A process of another pid namespace, whose pid is out of sight, is killed by its pidfd alone."""
    _, pipe = started.start(TELL_PID)
    pidfd = os.pidfd_open(int(read_line(pipe)))

    processes.kill_group(pidfd, 0, None)

    gone = ended(pidfd)
    os.close(pidfd)
    assert gone


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "ended"),
        (0, "exited with status 0"),
        (3, "exited with status 3"),
        (-9, "was killed by SIGKILL"),
        (-60, "was killed by signal 60"),
    ],
)
def test_words_for_an_end(status: int | None, words: str) -> None:
    """The end of a process in words."""
    assert processes.describe_exit(status) == words


def test_orphans_come_to_this_process() -> None:
    """The test run is a reaper of orphans, which the tests above rely on."""
    flag = ctypes.c_int()

    ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER

    assert flag.value == 1
