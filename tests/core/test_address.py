"""Addresses: what is read, what is printed, what is refused."""

from __future__ import annotations

import pytest

from handoff.core.address import DEFAULT_BACKLOG, MAX_PATH, Address, parse
from handoff.core.errors import BadAddress


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:8080", Address(kind="tcp", host="127.0.0.1", port=8080)),
        ("tcp://localhost:0", Address(kind="tcp", host="localhost", port=0)),
        ("tcp://*:65535", Address(kind="tcp", host="*", port=65535)),
        ("tcp://[::1]:80", Address(kind="tcp", host="::1", port=80)),
        ("tcp://[fe80::1%eth0]:80", Address(kind="tcp", host="fe80::1%eth0", port=80)),
        ("tcp://h:1?backlog=100", Address(kind="tcp", host="h", port=1, backlog=100)),
        ("tcp://h:1?backlog=2147483647", Address(kind="tcp", host="h", port=1, backlog=2**31 - 1)),
        ("tcp://h:1?reuseport", Address(kind="tcp", host="h", port=1, reuseport=True)),
        ("tcp://h:1?reuseport=YES&v6only=off", Address(kind="tcp", host="h", port=1, reuseport=True, v6only=False)),
        ("tcp://h:1?", Address(kind="tcp", host="h", port=1)),
        ("tcp://h:1?v6only=1&", Address(kind="tcp", host="h", port=1, v6only=True)),
        ("unix:///run/web.sock", Address(kind="unix", path="/run/web.sock")),
        ("unix:///run/web.sock?mode=660", Address(kind="unix", path="/run/web.sock", mode=0o660)),
        ("unix:///run/web.sock?mode=0&backlog=1", Address(kind="unix", path="/run/web.sock", mode=0, backlog=1)),
        ("unix:///run/a:b=c&d.sock", Address(kind="unix", path="/run/a:b=c&d.sock")),
    ],
)
def test_parse(text: str, address: Address) -> None:
    """An address is read with its options."""
    assert parse(text) == address


@pytest.mark.parametrize(
    "text", ["tcp://127.0.0.1:8080", "tcp://[::1]:0", "tcp://web.example:1", "unix:///run/web.sock"]
)
def test_print(text: str) -> None:
    """An address is printed as it is written."""
    assert str(parse(text)) == text


def test_options_are_no_identity() -> None:
    """The same address with other options is printed alike: it is the same listener."""
    assert str(parse("tcp://h:1?backlog=7&reuseport")) == str(parse("tcp://h:1"))


def test_options_have_defaults() -> None:
    """Without options the backlog is the system's largest, and nothing else is set."""
    address = parse("tcp://h:1")

    assert (address.backlog, address.reuseport, address.v6only, address.mode) == (DEFAULT_BACKLOG, False, None, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "an address begins with"),
        ("127.0.0.1:80", "an address begins with tcp:// or unix://, as in tcp://127.0.0.1:8080"),
        ("udp://h:1", "udp:// is not known; use tcp:// or unix://"),
        ("TCP://h:1", "TCP:// is not known"),
        ("tcp://h", "host or port is missing"),
        ("tcp://:80", "host or port is missing"),
        ("tcp://", "host or port is missing"),
        ("tcp://::1:80", "an IPv6 address stands in brackets, as in tcp://[::1]:8080"),
        ("tcp://[::1:80", "an IPv6 address stands in brackets"),
        ("tcp://[]:80", "host '' is no name and no address"),
        ("tcp://[x:80", "host '[x' is no name and no address"),
        ("tcp://[::1]]:80", "host '::1]' is no name and no address"),
        ("tcp://a\0b:80", "host 'a\\x00b' is no name and no address"),
        ("tcp://h:", "port '' is not a number from 0 to 65535"),
        ("tcp://h:http", "port 'http' is not a number from 0 to 65535"),
        ("tcp://h:-1", "port '-1' is not a number"),
        ("tcp://h:65536", "port '65536' is not a number"),
        ("tcp://h:٣", "port '٣' is not a number"),
        ("tcp://h:" + "9" * 5000, "is not a number from 0 to 65535"),
        ("tcp://h:1?backlog=0", "backlog=0 is not a number from 1 to 2147483647"),
        ("tcp://h:1?backlog", "backlog= is not a number"),
        ("tcp://h:1?backlog=2147483648", "backlog=2147483648 is not a number"),
        ("tcp://h:1?backlog=" + "9" * 5000, "is not a number from 1 to 2147483647"),
        ("tcp://h:1?reuseport=maybe", "reuseport=maybe is neither yes nor no"),
        ("tcp://h:1?mode=660", "option 'mode' is not known here; there are backlog, reuseport, v6only"),
        ("tcp://h:1?backlog=1&backlog=2", "option 'backlog' is given twice"),
        ("unix://run/web.sock", "the path of a Unix socket is absolute, with three slashes"),
        ("unix://", "the path of a Unix socket is absolute"),
        ("unix:///run/", "the path of a Unix socket is absolute"),
        ("unix:///a\0b", "a path holds no NUL byte"),
        ("unix:///a?v6only", "option 'v6only' is not known here; there are backlog, mode"),
        ("unix:///a?mode=", "mode= is not an octal number from 0 to 777, as in mode=660"),
        ("unix:///a?mode=8", "mode=8 is not an octal number"),
        ("unix:///a?mode=1000", "mode=1000 is not an octal number"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    """What is no address is refused with the whole text, what is wrong with it, and what would be right."""
    with pytest.raises(BadAddress) as caught:
        parse(text)

    assert caught.value.address == text
    assert reason in caught.value.reason


def test_longest_path() -> None:
    """A path may have as many bytes as the kernel takes, less one for the name that is bound first."""
    path = "/" + "é" * ((MAX_PATH - 2) // 2) + "x"

    assert len(parse(f"unix://{path}").path.encode()) == MAX_PATH


def test_path_too_long() -> None:
    """One byte more is refused, and bytes are counted, not characters."""
    path = "/" + "é" * ((MAX_PATH + 1) // 2)

    with pytest.raises(BadAddress, match="the path has 107 bytes, and a Unix socket's takes at most 106"):
        parse(f"unix://{path}")


def test_path_that_is_not_utf8() -> None:
    """A path of other bytes is taken: its surrogates count as one byte each."""
    assert parse("unix:///run/\udcff.sock").path == "/run/\udcff.sock"
