"""Where a listener listens: parsing and printing of ``tcp://HOST:PORT`` and ``unix:///PATH``.

Two addresses are the same listener when their ``str()`` is equal: the options are not part of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from handoff.core.errors import BadAddress

MAX_PATH: Final = 106  # sun_path holds 108 with its NUL (unix(7)); one more is for the `~` of the name bound first
DEFAULT_BACKLOG: Final = 4096  # net.core.somaxconn since Linux 5.4, which caps it
_TRUE: Final = ("", "1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")


@attrs.frozen(kw_only=True)
class Address:
    """One listener's address and its options.

    `host` is as written (a name, or a literal without brackets) for TCP, and "" for Unix sockets; `port` 0 means any.
    """

    kind: str  # "tcp" or "unix"
    host: str = ""
    port: int = 0
    path: str = ""
    backlog: int = DEFAULT_BACKLOG
    reuseport: bool = False
    v6only: bool | None = None  # None: as the system has it
    mode: int | None = None  # of a Unix socket's file; None: as the umask has it

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse(text: str) -> Address:
    """Read an address such as ``tcp://[::1]:80?backlog=100``.

    Raises BadAddress, which quotes the whole text.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise BadAddress(text, "an address begins with tcp:// or unix://, as in tcp://127.0.0.1:8080")
    place, _, query = rest.partition("?")
    match scheme:
        case "tcp":
            host, port = _host_and_port(text, place)
            return Address(kind="tcp", host=host, port=port, **_options(text, query, _TCP_OPTIONS))
        case "unix":
            return Address(kind="unix", path=_path(text, place), **_options(text, query, _UNIX_OPTIONS))
        case _:
            raise BadAddress(text, f"{scheme}:// is not known; use tcp:// or unix://")


def _host_and_port(text: str, place: str) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or not host:
        raise BadAddress(text, "host or port is missing, as in tcp://127.0.0.1:8080")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadAddress(text, "an IPv6 address stands in brackets, as in tcp://[::1]:8080")
    if not host or any(character in "[]\0" for character in host):
        raise BadAddress(text, f"host {host!r} is no name and no address")
    if not _is_number(port, 65535):
        raise BadAddress(text, f"port {port!r} is not a number from 0 to 65535")
    return host, int(port)


def _path(text: str, place: str) -> str:
    if not place.startswith("/") or place.endswith("/"):
        raise BadAddress(text, "the path of a Unix socket is absolute, with three slashes, as in unix:///run/web.sock")
    if "\0" in place:
        raise BadAddress(text, "a path holds no NUL byte")
    length = len(place.encode("utf-8", "surrogateescape"))
    if length > MAX_PATH:
        raise BadAddress(text, f"the path has {length} bytes, and a Unix socket's takes at most {MAX_PATH}")
    return place


def _options(text: str, query: str, known: Mapping[str, Callable[[str, str, str], bool | int]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name not in known:
            raise BadAddress(text, f"option {name!r} is not known here; there are {', '.join(known)}")
        if name in options:
            raise BadAddress(text, f"option {name!r} is given twice")
        options[name] = known[name](text, name, value)
    return options


def _is_number(text: str, most: int) -> bool:
    # int() itself refuses more than 4300 digits, with an error of its own
    return text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= most


def _flag(text: str, name: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise BadAddress(text, f"{name}={value} is neither yes nor no")


def _backlog(text: str, name: str, value: str) -> int:
    if not _is_number(value, 2**31 - 1) or int(value) == 0:
        raise BadAddress(text, f"{name}={value} is not a number from 1 to 2147483647")
    return int(value)


def _mode(text: str, name: str, value: str) -> int:
    if not value or any(digit not in "01234567" for digit in value) or int(value, 8) > 0o777:
        raise BadAddress(text, f"{name}={value} is not an octal number from 0 to 777, as in mode=660")
    return int(value, 8)


_TCP_OPTIONS: Final[Mapping[str, Callable[[str, str, str], bool | int]]] = {
    "backlog": _backlog,
    "reuseport": _flag,
    "v6only": _flag,
}
_UNIX_OPTIONS: Final[Mapping[str, Callable[[str, str, str], bool | int]]] = {"backlog": _backlog, "mode": _mode}
