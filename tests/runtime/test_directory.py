"""The runtime directory: numbers, control sockets, who is in charge, and what is refused."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handoff.core.errors import BadDirectory
from handoff.runtime.directory import LINK, RuntimeDirectory, base, path_of, services

PATIENCE = 15.0
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user, chown and mount")


class Generations:
    """Generations of the service `web` in one directory, without programs; `close` closes their sockets."""

    def __init__(self, directory: RuntimeDirectory) -> None:
        self.directory = directory
        self._sockets: dict[int, socket.socket] = {}

    def start(self) -> int:
        """Bind the next one; returns its number."""
        generation, control = self.directory.bind()
        self._sockets[generation] = control
        return generation

    def die(self, generation: int) -> None:
        """Have one die: nothing is cleaned up."""
        self._sockets.pop(generation).close()

    def close(self) -> None:
        """Close all."""
        for generation in list(self._sockets):
            self.die(generation)


@pytest.fixture
def directory(runtime_dir: Path) -> Iterator[RuntimeDirectory]:
    """The runtime directory of the service `web`."""
    opened = RuntimeDirectory("web", create=True)
    yield opened
    opened.close()


@pytest.fixture
def web(directory: RuntimeDirectory) -> Iterator[Generations]:
    """Generations in that directory."""
    generations = Generations(directory)
    yield generations
    generations.close()


def run(program: str, *arguments: str | Path) -> str:
    """Run a Python program to its end; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Where it is


def test_base_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given comes before the environment, and is made absolute."""
    monkeypatch.setenv("HANDOFF_RUNTIME_DIR", "/elsewhere")

    assert base("here") == f"{Path.cwd()}/here"


def test_base_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """HANDOFF_RUNTIME_DIR names the base."""
    monkeypatch.setenv("HANDOFF_RUNTIME_DIR", "/elsewhere")

    assert path_of("web") == "/elsewhere/web"


@AS_ROOT
def test_base_of_others() -> None:
    """A user's base is in XDG_RUNTIME_DIR, and without one in /tmp; root's is /run/handoff."""
    program = """
import os
from handoff.runtime.directory import path_of
for name in ("HANDOFF_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
    os.environ.pop(name, None)
print(path_of("web"))
os.setuid(65534)
print(path_of("web"))
os.environ["XDG_RUNTIME_DIR"] = "/run/user/65534"
print(path_of("web"))
"""
    assert run(program).split() == ["/run/handoff/web", "/tmp/handoff-65534/web", "/run/user/65534/handoff/web"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "-a", "a\n", "a\0", "ü", "x" * 101, ".hidden"])
def test_names_that_are_none(name: str) -> None:
    """A name that could lead out of the base, or into an option, is refused."""
    with pytest.raises(BadDirectory, match="a service's name has 1 to 100 letters"):
        path_of(name)


def test_services(directory: RuntimeDirectory, runtime_dir: Path) -> None:
    """The services are the directories in the base."""
    RuntimeDirectory("mail@1", create=True).close()

    assert services() == ["mail@1", "web"]


def test_no_services(tmp_path: Path) -> None:
    """Where no base is there are no services."""
    assert services(str(tmp_path / "nowhere")) == []


def test_created_for_us_alone(directory: RuntimeDirectory) -> None:
    """The directory, its sockets and its files are its owner's alone, whatever the umask."""
    program = """
import os
from handoff.runtime.directory import RuntimeDirectory
os.umask(0)
directory = RuntimeDirectory("mail", create=True)
generation, control = directory.bind()
directory.take_charge(generation, instead_of=None)
for name in (".", *os.listdir(directory.path)):
    print(oct(os.lstat(os.path.join(directory.path, name)).st_mode & 0o77), name)
"""
    lines = run(program).splitlines()

    # A link has no mode of its own, lchmod does not exist here: 0777 on every link.
    assert sorted(lines) == ["0o0 .", "0o0 gen-1.sock", "0o0 generation", "0o0 lock", "0o77 control.sock"]


def test_directory_that_is_missing(tmp_path: Path) -> None:
    """Who only looks creates nothing."""
    with pytest.raises(BadDirectory, match="it does not exist") as caught:
        RuntimeDirectory("web", str(tmp_path))

    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert os.listdir(tmp_path) == []


# Numbers


def test_first_number(web: Generations) -> None:
    """Generations count from one."""
    assert [web.start(), web.start(), web.start()] == [1, 2, 3]


def test_numbers_are_never_used_twice(web: Generations) -> None:
    """A number is not given again after its generation has left."""
    first = web.start()
    web.die(first)
    web.directory.leave(first)

    assert web.start() == 2


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"-5\n"])
def test_number_without_a_counter(web: Generations, runtime_dir: Path, content: bytes) -> None:
    """With a counter that was damaged no living generation's number is given again."""
    web.start()
    web.start()
    (runtime_dir / "web" / "generation").write_bytes(content)

    assert web.start() == 3


def test_processes_at_once(runtime_dir: Path) -> None:
    """Twenty processes that bind at the same time get twenty numbers."""
    program = """
import sys
from handoff.runtime.directory import RuntimeDirectory
sys.stdin.read()
generation, control = RuntimeDirectory("web", create=True).bind()
print(generation, flush=True)
"""
    reading, writing = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=reading, stdout=subprocess.PIPE) for _ in range(20)
    ]
    os.close(reading)

    os.close(writing)  # all of them go on

    numbers = [int(process.communicate(timeout=PATIENCE)[0]) for process in processes]
    assert sorted(numbers) == list(range(1, 21))


def test_threads_at_once(directory: RuntimeDirectory) -> None:
    """A record lock does not keep threads apart; threads that bind at the same time get different numbers too."""
    start = threading.Barrier(8)
    numbers = []

    def bind() -> None:
        start.wait()
        for _ in range(5):
            generation, control = directory.bind()
            numbers.append(generation)
            control.close()

    threads = [threading.Thread(target=bind) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(numbers) == list(range(1, 41))


def test_lock_of_a_dead_process(directory: RuntimeDirectory) -> None:
    """A lock whose owner is dead does not block, though a child that it forked lives."""
    program = """
import os, signal
from handoff.runtime.directory import RuntimeDirectory
directory = RuntimeDirectory("web")
with directory._locked():
    child = os.fork()
    if child:
        os.write(1, b"%d\\n" % child)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        child = int(owner.stdout.readline())
        assert owner.wait(PATIENCE) == -9
        try:
            generation, control = directory.bind()
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)  # this process reaps orphans
    control.close()

    assert generation == 1


# Control sockets


def test_stale_sockets_are_removed(web: Generations) -> None:
    """What dead generations left behind is removed by the next one, and what lives stays."""
    dead, living = web.start(), web.start()
    web.die(dead)

    newest = web.start()

    assert web.directory.generations() == [living, newest]


def test_control_socket(web: Generations) -> None:
    """A control socket keeps packets apart, does not block, is not inherited and is its owner's alone."""
    generation, control = web.directory.bind()
    with control:
        found = os.stat(f"{web.directory.path}/gen-{generation}.sock")

        assert control.type == socket.SOCK_SEQPACKET
        assert (control.getblocking(), control.get_inheritable()) == (False, False)
        assert stat.S_IMODE(found.st_mode) == 0o600


def test_alive(web: Generations) -> None:
    """A generation lives as long as somebody listens at its control socket."""
    dead, living = web.start(), web.start()
    web.die(dead)

    assert [web.directory.alive(generation) for generation in (dead, living, 99, None)] == [False, True, False, False]


def test_alive_with_a_full_backlog(directory: RuntimeDirectory) -> None:
    """A generation whose backlog is full lives."""
    generation, control = directory.bind()
    control.listen(1)
    with control, contextlib.ExitStack() as clients:
        with pytest.raises(BlockingIOError):
            while True:
                clients.enter_context(directory.connect(generation))

        assert directory.alive(generation)


def test_connect_waits_for_a_place(directory: RuntimeDirectory) -> None:
    """Who gives a time waits for a place in the backlog, for that time."""
    generation, control = directory.bind()
    control.listen(1)
    with control, contextlib.ExitStack() as clients:
        with pytest.raises(BlockingIOError):
            while True:
                clients.enter_context(directory.connect(generation))

        with pytest.raises(TimeoutError):
            directory.connect(generation, timeout=0.05)


def test_connect_to_nobody(web: Generations) -> None:
    """Nobody in charge, and a dead generation, are told as connect(2) tells them."""
    dead = web.start()
    web.die(dead)

    with pytest.raises(FileNotFoundError):
        web.directory.connect()
    with pytest.raises(ConnectionRefusedError):
        web.directory.connect(dead)


def test_long_path(tmp_path: Path) -> None:
    """A runtime directory may lie deeper than a Unix socket's path can name."""
    deep = tmp_path
    for _ in range(4):
        deep /= "d" * 60
    deep.mkdir(parents=True, mode=0o700)
    directory = RuntimeDirectory("web", str(deep), create=True)
    generation, control = directory.bind()

    assert directory.take_charge(generation, instead_of=None)

    with control, directory.connect() as client:
        accepted, _ = control.accept()
        with accepted:
            accepted.send(b"hello")
        assert client.recv(10) == b"hello"
    directory.close()


# Who is in charge


def test_take_charge(web: Generations) -> None:
    """The first generation takes charge of a service that nobody has."""
    first = web.start()
    before = web.directory.in_charge()

    taken = web.directory.take_charge(first, instead_of=None)

    assert (before, taken, web.directory.in_charge()) == (None, True, first)


def test_nobody_takes_charge_from_one_that_lives(web: Generations) -> None:
    """Somebody alive stays in charge."""
    first, second = web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)

    taken = web.directory.take_charge(second, instead_of=None)

    assert (taken, web.directory.in_charge()) == (False, first)


def test_nobody_takes_charge_from_another_one(web: Generations) -> None:
    """Who is to replace one generation does not replace another one that has taken charge meanwhile."""
    first, second, third = web.start(), web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)
    web.directory.take_charge(second, instead_of=first)

    taken = web.directory.take_charge(third, instead_of=first)

    assert (taken, web.directory.in_charge()) == (False, second)


def test_take_charge_in_an_upgrade(web: Generations) -> None:
    """The new generation takes charge instead of the old one, which lives."""
    first, second = web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)

    taken = web.directory.take_charge(second, instead_of=first)

    assert (taken, web.directory.in_charge()) == (True, second)


def test_take_charge_twice(web: Generations) -> None:
    """Who is in charge already may say so again."""
    first = web.start()
    web.directory.take_charge(first, instead_of=None)

    assert web.directory.take_charge(first, instead_of=None)


def test_take_charge_after_a_death(web: Generations) -> None:
    """A service whose generation in charge is dead is free."""
    first, second = web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)
    web.die(first)

    taken = web.directory.take_charge(second, instead_of=None)

    assert (taken, web.directory.in_charge()) == (True, second)


def test_take_over(web: Generations) -> None:
    """The survivor takes over from whoever is named, alive or not."""
    first, second = web.start(), web.start()
    web.directory.take_charge(second, instead_of=None)

    web.directory.take_over(first)

    assert web.directory.in_charge() == first


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_link_that_names_nobody(web: Generations, runtime_dir: Path, kind: str) -> None:
    """A control.sock that names no generation is replaced."""
    link = runtime_dir / "web" / LINK
    if kind == "file":
        link.write_text("nonsense")
    else:
        link.symlink_to("/etc/passwd" if kind == "link" else "gen-77.sock")
    first = web.start()

    taken = web.directory.take_charge(first, instead_of=None)

    assert (taken, web.directory.in_charge()) == (True, first)


def test_link_moves_atomically(web: Generations) -> None:
    """While control.sock is moved to and fro, whoever reads it finds it at every moment."""
    first, second = web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)
    over = threading.Event()
    seen: list[int | None] = []

    def look() -> None:
        while not over.is_set():
            seen.append(web.directory.in_charge())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(200):
        web.directory.take_charge(second, instead_of=first)
        web.directory.take_charge(first, instead_of=second)
    over.set()
    reader.join()

    assert seen
    assert set(seen) <= {first, second}


def test_leave(web: Generations) -> None:
    """Who leaves takes its control socket and its link along."""
    first = web.start()
    web.directory.take_charge(first, instead_of=None)

    web.directory.leave(first)

    assert sorted(os.listdir(web.directory.path)) == ["generation", "lock"]


def test_leave_after_another_one_has_taken_charge(web: Generations) -> None:
    """Who leaves lets the link be that names another generation."""
    first, second = web.start(), web.start()
    web.directory.take_charge(first, instead_of=None)
    web.directory.take_charge(second, instead_of=first)

    web.directory.leave(first)

    assert (web.directory.in_charge(), web.directory.generations()) == (second, [second])


def test_leave_of_a_directory_that_is_gone(web: Generations, runtime_dir: Path) -> None:
    """Leaving never fails, also when somebody has removed the whole directory."""
    first = web.start()
    web.directory.take_charge(first, instead_of=None)
    for path in (runtime_dir / "web").iterdir():
        path.unlink()
    (runtime_dir / "web").rmdir()

    web.directory.leave(first)

    assert os.listdir(runtime_dir) == []


def test_bind_in_a_directory_that_is_gone(directory: RuntimeDirectory, runtime_dir: Path) -> None:
    """A directory that was removed under a living service is a clear error."""
    (runtime_dir / "web").rmdir()

    with pytest.raises(BadDirectory, match="it does not exist"):
        directory.bind()


def test_close_twice(runtime_dir: Path) -> None:
    """Closing twice closes no other descriptor."""
    directory = RuntimeDirectory("web", create=True)
    directory.close()
    reading, writing = os.pipe()

    directory.close()

    os.close(reading)
    os.close(writing)


# What is refused


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_writable_by_others(runtime_dir: Path, mode: int) -> None:
    """A directory that others can write to is refused, with the command that mends it."""
    path = runtime_dir / "web"
    path.mkdir()
    path.chmod(mode)

    with pytest.raises(BadDirectory) as caught:
        RuntimeDirectory("web", create=True)

    assert str(caught.value) == (
        f"runtime directory {path}: others can write to it (mode {mode:o}); mend it with `chmod go-w {path}`"
    )


def test_base_that_is_writable_by_others(runtime_dir: Path) -> None:
    """A base that others can write to is refused, though the directory in it is in order."""
    RuntimeDirectory("web", create=True).close()
    runtime_dir.chmod(0o777)

    with pytest.raises(BadDirectory, match=f"{runtime_dir}: others can write to it"):
        RuntimeDirectory("web", create=True)


def test_symbolic_link(runtime_dir: Path, tmp_path: Path) -> None:
    """A symbolic link in the directory's place is refused, by who creates and by who looks."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (runtime_dir / "web").symlink_to(tmp_path / "elsewhere")

    for create in (True, False):
        with pytest.raises(BadDirectory, match=r"it is .*a symbolic link; name the directory itself"):
            RuntimeDirectory("web", create=create)


def test_base_that_is_a_symbolic_link(runtime_dir: Path, tmp_path: Path) -> None:
    """A symbolic link in the base's place is refused: whoever owns it could swap what it names."""
    (tmp_path / "link").symlink_to(runtime_dir)

    with pytest.raises(BadDirectory, match="it is a symbolic link; name the directory itself"):
        RuntimeDirectory("web", str(tmp_path / "link"), create=True)


def test_regular_file(runtime_dir: Path) -> None:
    """A file in the directory's place is refused, by who creates and by who looks."""
    (runtime_dir / "web").write_text("")

    for create in (True, False):
        with pytest.raises(BadDirectory, match="it is no directory"):
            RuntimeDirectory("web", create=create)


@AS_ROOT
def test_foreign_owner(runtime_dir: Path) -> None:
    """A directory of another user is refused by name of both uids."""
    path = runtime_dir / "web"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)

    with pytest.raises(BadDirectory) as caught:
        RuntimeDirectory("web", create=True)

    assert str(caught.value) == (
        f"runtime directory {path}: it belongs to uid 65534, and this process has uid {os.geteuid()}"
    )


@AS_ROOT
def test_root_may_look(runtime_dir: Path) -> None:
    """Root may look into anybody's directory: it commands every service."""
    path = runtime_dir / "web"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)

    directory = RuntimeDirectory("web")

    assert directory.in_charge() is None
    directory.close()


AS_NOBODY = """
import os, sys
from handoff.runtime.directory import RuntimeDirectory, path_of, services
os.chdir(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    directory = RuntimeDirectory("web", ".", create=sys.argv[2] == "create")
    directory.bind()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def traversable() -> Iterator[Path]:
    """A directory that other users can get to."""
    path = Path(f"/tmp/handoff-directory-{os.getpid()}")
    path.mkdir(mode=0o755)
    yield path
    subprocess.run(["rm", "-r", path], check=True)


@AS_ROOT
@pytest.mark.parametrize("step", ["create", "look"])
def test_missing_rights(traversable: Path, step: str) -> None:
    """A directory that this user may not use is a clear error, with what to do about it."""
    (traversable / "web").mkdir(mode=0o700)

    said = run(AS_NOBODY, traversable, step)

    assert said == (
        f"BadDirectory runtime directory {traversable}/web: no right to use it as uid 65534; "
        "name another one with HANDOFF_RUNTIME_DIR"
    )


@AS_ROOT
def test_base_without_a_right_to_create(traversable: Path) -> None:
    """A base that this user can't create anything in is a clear error too."""
    said = run(AS_NOBODY, traversable, "create")

    assert said == (
        f"BadDirectory runtime directory {traversable}/web: no right to use it as uid 65534; "
        "name another one with HANDOFF_RUNTIME_DIR"
    )


def mounted(path: Path, options: str, program: str) -> str:
    """Run a Python program where a tmpfs with these options is mounted on a path; returns what it printed."""
    command = f'mount --make-rprivate / && mount -t tmpfs -o {options} none "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", path, sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BIND_ON_A_MOUNT = """
import os, subprocess, sys
from handoff.runtime.directory import RuntimeDirectory
def attempt():
    try:
        with directory.bind()[1]:
            print("bound")
    except Exception as error:
        print(type(error).__name__, error)
"""
FULL = "BadDirectory runtime directory {}/web: its file system is full; make room there, a few KiB are enough"


@AS_ROOT
def test_full_file_system(tmp_path: Path) -> None:
    """On a full file system binding fails with that reason, and works once there is room; no number is lost."""
    program = (
        BIND_ON_A_MOUNT
        + """
directory = RuntimeDirectory("web", sys.argv[1], create=True)
attempt()
filling = os.path.join(sys.argv[1], "filling")
with open(filling, "wb", 0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
attempt()
os.unlink(filling)
attempt()
print(directory.generations())
"""
    )
    assert mounted(tmp_path, "size=64k,mode=700", program).splitlines() == [
        "bound",
        FULL.format(tmp_path),
        "bound",
        "[2]",
    ]


@AS_ROOT
def test_no_inodes_left(tmp_path: Path) -> None:
    """A file system without inodes is full too, whichever file is the one too many."""
    program = (
        BIND_ON_A_MOUNT
        + """
directory = RuntimeDirectory("web", sys.argv[1], create=True)
attempt()
subprocess.run(["mount", "-o", "remount,nr_inodes=5", sys.argv[1]], check=True)
attempt()
"""
    )
    assert mounted(tmp_path, "nr_inodes=100,mode=700", program).splitlines() == ["bound", FULL.format(tmp_path)]


@AS_ROOT
def test_read_only_file_system(tmp_path: Path) -> None:
    """A read-only file system is told to be one."""
    program = (
        BIND_ON_A_MOUNT
        + """
directory = RuntimeDirectory("web", sys.argv[1], create=True)
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
attempt()
"""
    )
    assert mounted(tmp_path, "size=64k,mode=700", program) == (
        f"BadDirectory runtime directory {tmp_path}/web: its file system is read-only; "
        "name another one with HANDOFF_RUNTIME_DIR"
    )
