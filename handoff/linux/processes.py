"""Starting the new program, and knowing whether a process lives (pidfd_open(2), PIDFD_GET_INFO)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
from typing import TYPE_CHECKING, Final

import attrs

from handoff.core.errors import CannotSpawn
from handoff.core.launch import Launch

if TYPE_CHECKING:
    import subprocess

# The program's parent until it has called: a shell waits for it and ends as it ended. Neither fork() in this process,
# which may have threads and gigabytes, nor a bare Python (7 ms against 1) would do better. It is no child of ours
# afterwards, so that a service manager sees its end. The trap lets TERM to the group end the program, not the shell.
_PARENT: Final = 'trap : HUP INT TERM; "$@"; exit $?'
_LONGEST_SHOWN: Final = 500  # characters
_PIDFD_GET_INFO: Final = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), linux/pidfd.h, Linux 6.13
_PIDFD_INFO_EXIT: Final = 1 << 3  # since Linux 6.15


@attrs.define
class Program:
    """A program that was started; owns its parent shell and the shell's pidfd until `release`."""

    shell: subprocess.Popen[bytes] = attrs.field(repr=False)
    pidfd: int  # readable once the program has ended
    group: int  # process group, and session, of the program and its children

    def status(self) -> int | None:
        """How it ended, as `subprocess` tells it (negative: a signal); None while it runs. Does not block."""
        code = self.shell.poll()
        # A shell tells a signal as 128 and its number; what is above the last signal is the program's own status.
        return 128 - code if code is not None and 128 < code < 128 + signal.NSIG else code

    def terminate(self) -> None:
        """Send TERM to the whole group."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send KILL to the whole group."""
        self._signal(signal.SIGKILL)

    def release(self) -> None:
        """Let go of the program: its parent is now init, or the service manager. Blocks for a millisecond."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.shell.kill()
        self.shell.wait()

    def _signal(self, number: signal.Signals) -> None:
        # While the shell is not reaped, or somebody of the group lives, the group's number is taken.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)


def own_launch() -> Launch:
    """How this process was started, so that its next version can be: nothing of it resolved.

    A `current` link that was moved since, a new virtual environment and a removed old release all take effect.
    """
    first, *rest = sys.orig_argv
    if rest and _runs_by_itself(rest[0], first):
        command = rest  # its first line names the interpreter, which may be another one by now
    else:
        command = [first if "/" in first else sys.executable or first, *rest]
    return Launch(command=tuple(command), cwd=_logical_directory(), environment={})


def _runs_by_itself(script: str, interpreter: str) -> bool:
    """Whether a script's first two lines (`#!`, and the detour by /bin/sh for long paths) name this interpreter."""
    if "/" not in script or script.startswith("-") or not os.access(script, os.X_OK):
        return False
    try:
        with open(script, "rb") as file:
            head = file.readline(4096) + file.readline(4096)
    except OSError:
        return False
    words = head.replace(b'"', b" ").replace(b"'", b" ").removeprefix(b"#!").split()
    return head.startswith(b"#!") and os.fsencode(interpreter) in words


def _logical_directory() -> str:
    """The working directory by the name that the shell gave it, if that is still the same one."""
    logical = os.environ.get("PWD", "")
    try:
        if logical.startswith("/") and os.path.samefile(logical, "."):
            return logical
        return os.getcwd()
    except OSError:  # it was removed
        return logical or "/"


def spawn(launch: Launch, stderr: int) -> Program:
    """Start a program in a session of its own; it inherits 0, 1 and, as 2, the borrowed `stderr`: nothing else.

    Blocks for the few milliseconds that vfork and exec take. Raises CannotSpawn.
    """
    import subprocess  # 2 ms at import, needed at an upgrade only

    name = _shown(launch.command[0]) if launch.command else "nothing"
    if not os.path.isdir(launch.cwd):
        raise CannotSpawn(name, f"its working directory {_shown(launch.cwd)} is gone; name another one with --cwd")
    if not launch.command or not _is_executable(launch.command[0], launch):
        raise CannotSpawn(name, f"no such command in {_shown(launch.cwd)} or on its PATH, or it may not be executed")
    environment = {**launch.environment, "PWD": launch.cwd}
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", _PARENT, "handoff", *launch.command],
            cwd=launch.cwd,
            env=environment,
            stderr=stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise CannotSpawn(name, f"{error.strerror} ({error.filename or 'fork'})") from None
    except ValueError as error:  # a NUL in the environment, or what the file system's encoding does not have
        raise CannotSpawn(name, f"no program can be given these words ({error})") from None
    try:
        return Program(shell, os.pidfd_open(shell.pid), shell.pid)
    except OSError as error:
        shell.kill()
        shell.wait()
        raise CannotSpawn(name, str(error.strerror)) from None


def _shown(text: str) -> str:
    """A text for an error, which goes into packets: cut where no sensible path is that long."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _is_executable(name: str, launch: Launch) -> bool:
    # shutil.which would do the same, for 3 ms of imports in the middle of an upgrade.
    places = [""] if "/" in name else os.get_exec_path(launch.environment)
    candidates = [os.path.join(launch.cwd, place, name) for place in places]
    return any(os.path.isfile(candidate) and os.access(candidate, os.X_OK) for candidate in candidates)


def is_dead(pidfd: int) -> bool:
    """Whether the process has ended (it may be a zombie)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def exit_status(pidfd: int, pid: int) -> int | None:
    """How a dead process ended that need not be a child (negative: a signal); None where the kernel doesn't tell."""
    # A zombie tells through /proc, and once it is reaped, through its pidfd: it may become the one just in between.
    code = _reaped_status(pidfd)
    if code is None:
        code = _zombie_status(pid)
    if code is None:
        code = _reaped_status(pidfd)
    return None if code is None else os.waitstatus_to_exitcode(code)


def _reaped_status(pidfd: int) -> int | None:
    buffer = bytearray(struct.pack("Q", _PIDFD_INFO_EXIT).ljust(64, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    mask, code = struct.unpack_from("Q", buffer)[0], struct.unpack_from("i", buffer, 60)[0]
    return int(code) if mask & _PIDFD_INFO_EXIT else None


def _zombie_status(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            state, *fields = stat.read().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return int(fields[-1]) if state == b"Z" else None  # exit_code is the last field, proc_pid_stat(5)


def kill_group(pidfd: int, pid: int, group: int | None) -> None:
    """Kill a living process and, if it still is of `group`, that whole group; does nothing to a dead one."""
    if is_dead(pidfd):
        return
    with contextlib.suppress(OSError):
        if group is not None and pid and os.getpgid(pid) == group:
            os.killpg(group, signal.SIGKILL)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def describe_exit(status: int | None) -> str:
    """The end of a process in words: "exited with status 3", "was killed by SIGKILL", "ended"."""
    if status is None:
        return "ended"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
        return f"was killed by signal {-status}"
    return f"exited with status {status}"
