"""The plan: which listeners are kept, added and removed, and what is told of each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handoff.core.address import parse
from handoff.core.errors import BadMessage
from handoff.core.plan import LISTENER, STDERR, Entry, Plan, claim, plan

ONE = Entry(address="tcp://127.0.0.1:80", cookie=1)
TWO = Entry(address="tcp://127.0.0.1:40001", requested="tcp://127.0.0.1:0", cookie=2)
NAMED = Entry(address="tcp://127.0.0.1:81", requested="tcp://localhost:81", cookie=3)
PATH = Entry(address="unix:///run/web.sock", cookie=4, inode=(5, 6))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("tcp://127.0.0.1:80", ONE),
        ("tcp://127.0.0.1:40001", TWO),
        ("tcp://127.0.0.1:0", TWO),
        ("tcp://localhost:81", NAMED),
        ("unix:///run/web.sock", PATH),
        ("unix:///run/web.sock?mode=600", PATH),
        ("tcp://127.0.0.1:82", None),
        ("tcp://0.0.0.0:80", None),
        ("tcp://localhost:80", None),
    ],
)
def test_claim(wanted: str, found: Entry | None) -> None:
    """A listener is found by where it is bound, or by the words it was asked for with; options don't count."""
    assert claim(parse(wanted), [ONE, TWO, NAMED, PATH]) is found


def test_bound_address_counts_first() -> None:
    """Who is bound where it is asked for is preferred to who was only asked for so."""
    renamed = Entry(address="tcp://127.0.0.1:99", requested="tcp://127.0.0.1:80")

    assert claim(parse("tcp://127.0.0.1:80"), [renamed, ONE]) is ONE


def test_claimed_once_each() -> None:
    """Of several that were asked for by port 0, each claim takes the first that is left."""
    other = Entry(address="tcp://127.0.0.1:40002", requested="tcp://127.0.0.1:0")

    first = claim(parse("tcp://127.0.0.1:0"), iter([TWO, other]))
    second = claim(parse("tcp://127.0.0.1:0"), iter([other]))

    assert (first, second) == (TWO, other)


def test_nothing_is_inherited() -> None:
    """Where nothing was inherited, nothing is claimed."""
    assert claim(parse("tcp://127.0.0.1:80"), []) is None


def test_plan() -> None:
    """Listeners are kept, added and removed, in the order in which they are named."""
    outcome = plan([ONE, TWO, NAMED], [NAMED.address, PATH.address, ONE.address])

    assert outcome == Plan(kept=(ONE.address, NAMED.address), added=(PATH.address,), removed=(TWO.address,))


@pytest.mark.parametrize("entry", [ONE, TWO, NAMED, PATH, Entry(), Entry(kind=STDERR)])
def test_entry_comes_back(entry: Entry) -> None:
    """An entry that was sent as JSON is read as the same one."""
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_unknown_fields_are_ignored() -> None:
    """A later version may add fields to an entry, and other kinds."""
    entry = Entry.from_json({"kind": "database", "address": "x", "colour": "green"})

    assert entry == Entry(kind="database", address="x")


def test_entry_has_defaults() -> None:
    """An entry that says nothing is a listener without an address."""
    assert Entry.from_json({}) == Entry(kind=LISTENER)


@pytest.mark.parametrize(
    "field",
    [
        {"kind": 1},
        {"address": None},
        {"requested": []},
        {"cookie": "1"},
        {"cookie": True},
        {"cookie": 1.0},
        {"inode": 1},
        {"inode": [1]},
        {"inode": [1, 2, 3]},
        {"inode": [True, 1]},
        {"inode": ["1", 2]},
    ],
    ids=str,
)
def test_entry_with_wrong_type(field: dict[str, Any]) -> None:
    """A field of the wrong type is refused."""
    with pytest.raises(BadMessage, match="an entry with a field of the wrong type"):
        Entry.from_json(field)


@pytest.mark.parametrize("body", [None, 1, "x", []])
def test_entry_that_is_no_object(body: object) -> None:
    """What is no object is no entry."""
    with pytest.raises(BadMessage, match="an entry that is no object"):
        Entry.from_json(body)
