"""Messages: what is written can be read, and what is wrong is refused with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handoff.core.errors import BadMessage
from handoff.core.messages import FIELDS, MAX_DESCRIPTORS, MAX_PACKET, PROTOCOL, Kind, batches, decode, encode, meet

RECORD = {"upgrade": "u1", "service": "web", "old": 7}
# One message of each kind, with every field that it may have.
MESSAGES: dict[Kind, dict[str, Any]] = {
    Kind.HELLO: {"protocol": [1, 1], "service": "web", "generation": 8, "upgrade": "u1", "version": "0.1.0"},
    Kind.DIALLING: {"protocol": 1},
    Kind.REFUSED: {"code": "running", "reason": "generation 7 is running", "generation": 7},
    Kind.DESCRIPTORS: {"upgrade": "u1", "generation": 7, "batch": 1, "batches": 2, "entries": [{"kind": "stderr"}]},
    Kind.ADOPTED: {"batch": 1},
    Kind.READY: {"added": 1, "unclaimed": [0], "paths": [["/run/web.sock", 1, 2]]},
    Kind.ACCEPT: {},
    Kind.ACCEPTING: {},
    Kind.RELEASED: {},
    Kind.COMMITTED: {"record": RECORD},
    Kind.IN_CHARGE: {},
    Kind.DRAINED: {"record": RECORD},
    Kind.ROLLBACK: {"reason": "it was asked for"},
    Kind.ROLLED_BACK: {},
    Kind.FAILED: {"reason": "no database"},
    Kind.STOP: {},
    Kind.STOPPING: {},
    Kind.UPGRADE: {
        "command": ["server", "--new"],
        "cwd": "/srv",
        "environment": {"A": "b"},
        "respawn": 1,
        "wait": "exit",
        "timeout": 60,
        "probation": 0.5,
        "drain_timeout": 0.0,
    },
    Kind.STATUS: {},
    Kind.WAIT: {},
    Kind.ABORT: {},
    Kind.STEP: {"step": "ready", "seconds": 0.25},
    Kind.STATE: {"state": {"service": "web"}},
    Kind.RESULT: {"record": RECORD},
    Kind.ERROR: {"code": "too-late", "reason": "the upgrade is already ending"},
}
NEEDED = [(kind, field) for kind, fields in FIELDS.items() for field, (_, needed) in fields.items() if needed]
TYPED = [(kind, field) for kind, fields in FIELDS.items() for field in fields]


def packet(kind: Kind, **changes: Any) -> bytes:
    """A packet with every field of `kind`, some of them changed, unchecked."""
    return json.dumps({"type": kind.value, **MESSAGES[kind], **changes}).encode()


def test_every_kind_is_tested() -> None:
    """The messages of this file are all that there are, with all their fields."""
    assert {kind: set(fields) for kind, fields in MESSAGES.items()} == {kind: set(FIELDS[kind]) for kind in Kind}


@pytest.mark.parametrize("kind", Kind)
def test_message_comes_back(kind: Kind) -> None:
    """What is encoded is decoded to the same message."""
    message = decode(encode(kind, **MESSAGES[kind]))

    assert message.kind is kind
    assert message.fields == MESSAGES[kind]


@pytest.mark.parametrize("kind", Kind)
def test_unknown_fields_are_ignored(kind: Kind) -> None:
    """A later version may add fields: they are left out."""
    message = decode(packet(kind, colour="green"))

    assert message.fields == MESSAGES[kind]


@pytest.mark.parametrize(("kind", "field"), NEEDED)
def test_missing_field(kind: Kind, field: str) -> None:
    """A message without a field that it needs is refused, and the field named."""
    with pytest.raises(BadMessage) as caught:
        decode(packet(kind, **{field: None}))

    assert caught.value.reason == f"{kind.value} without {field!r}"


@pytest.mark.parametrize(("kind", "field"), TYPED)
def test_field_of_wrong_type(kind: Kind, field: str) -> None:
    """A field of another type is refused, needed or not: no field takes a text and an object."""
    wrong: object = {} if FIELDS[kind][field][0] != (dict,) else "text"

    with pytest.raises(BadMessage) as caught:
        decode(packet(kind, **{field: wrong}))

    assert caught.value.reason == f"{field!r} of {kind.value} is a {type(wrong).__name__}"


@pytest.mark.parametrize(("kind", "field"), [(Kind.ADOPTED, "batch"), (Kind.STEP, "seconds")])
def test_bool_is_no_number(kind: Kind, field: str) -> None:
    """True is no number, though Python has it so."""
    with pytest.raises(BadMessage, match="is a bool"):
        decode(packet(kind, **{field: True}))


def test_fraction_is_no_whole_number() -> None:
    """A count takes no fraction."""
    with pytest.raises(BadMessage, match="'batch' of adopted is a float"):
        decode(packet(Kind.ADOPTED, batch=1.0))


def test_optional_field_may_be_missing() -> None:
    """A field that isn't there reads as None by `get`, and as a KeyError by name."""
    message = decode(b'{"type":"rollback","reason":null}')

    assert message.get("reason") is None
    with pytest.raises(KeyError):
        message["reason"]


def test_field_is_read_by_name() -> None:
    """A field is read by its name."""
    message = decode(b'{"type":"adopted","batch":3}')

    assert message["batch"] == message.get("batch") == 3


def test_none_is_left_out() -> None:
    """A field that is None is not sent."""
    assert encode(Kind.ROLLBACK, reason=None) == b'{"type":"rollback"}'


def test_packets_are_ascii() -> None:
    """Other characters are escaped, also the surrogates that stand for bytes of a path."""
    encoded = encode(Kind.FAILED, reason="Grüße \udcff")

    assert encoded.isascii()
    assert decode(encoded)["reason"] == "Grüße \udcff"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ('"nonsense"', "'nonsense'"),
        ("null", "'None'"),
        ("7", "'7'"),
        ("[]", "'[]'"),
        ('{"a": 1}', "\"{'a': 1}\""),
        ('"' + "x" * 1000 + '"', repr("x" * 40)),
    ],
)
def test_unknown_type(name: str, shown: str) -> None:
    """A type that is not known is refused; only its beginning is quoted."""
    with pytest.raises(BadMessage) as caught:
        decode(f'{{"type":{name}}}'.encode())

    assert caught.value.reason == f"type {shown} is not known"


def test_type_is_missing() -> None:
    """An object without a type is refused."""
    with pytest.raises(BadMessage, match="type 'None' is not known"):
        decode(b"{}")


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"hello",
        b'{"type":',
        b"\xff\xfe\x00",
        b'{"type":"failed","reason":"\xc3"}',
        b"1" * 5000,
        b"[" * 60000,
        b'{"a":' * 10000,
        b'{"type":"hello","service":' + b"[" * 20000 + b"]" * 20000 + b"}",
    ],
    ids=["empty", "word", "cut", "non-utf-8", "cut-utf-8", "huge-number", "deep-list", "deep-object", "deep-field"],
)
def test_garbage(garbage: bytes) -> None:
    """What is no JSON, or JSON that Python can't take, is refused by its length and not quoted."""
    with pytest.raises(BadMessage) as caught:
        decode(garbage)

    assert caught.value.reason == f"{len(garbage)} bytes that are no JSON"


@pytest.mark.parametrize(("body", "name"), [(b"[]", "list"), (b"1", "int"), (b'"hello"', "str"), (b"null", "NoneType")])
def test_no_object(body: bytes, name: str) -> None:
    """JSON that is no object is refused."""
    with pytest.raises(BadMessage, match=f"a JSON {name} instead of an object"):
        decode(body)


def test_largest_packet() -> None:
    """A packet may be full to the last byte."""
    room = MAX_PACKET - len(encode(Kind.FAILED, reason=""))

    assert len(encode(Kind.FAILED, reason="x" * room)) == MAX_PACKET


def test_packet_too_large() -> None:
    """One byte more is refused before it is sent."""
    room = MAX_PACKET - len(encode(Kind.FAILED, reason=""))

    with pytest.raises(BadMessage) as caught:
        encode(Kind.FAILED, reason="x" * (room + 1))

    assert caught.value.reason == "failed has 65537 bytes, and a packet takes at most 65536"


@pytest.mark.parametrize(
    ("ours", "theirs", "version"),
    [
        ((1, 1), [1, 1], 1),
        ((1, 3), [2, 5], 3),
        ((2, 5), [1, 3], 3),
        ((1, 5), [2, 3], 3),
        ((1, 1), [2, 3], None),
        ((2, 3), [1, 1], None),
        ((1, 3), [3, 1], None),
    ],
)
def test_versions_meet(ours: tuple[int, int], theirs: list[int], version: int | None) -> None:
    """The newest version in both ranges is spoken, or none."""
    assert meet(ours, theirs) == version


@pytest.mark.parametrize("theirs", [[], [1], [1, 1, 1], ["1", "1"], [True, True], [1.0, 1.0], [None, None], [[1], [1]]])
def test_versions_that_are_no_range(theirs: list[Any]) -> None:
    """What is no range of versions meets nothing."""
    assert meet(PROTOCOL, theirs) is None


def test_nothing_is_one_batch() -> None:
    """Without descriptors there is one batch all the same: it opens the session."""
    assert list(batches([])) == [[]]


def test_batches_by_count() -> None:
    """A batch holds no more entries than a packet takes descriptors."""
    entries = [{"n": number} for number in range(2 * MAX_DESCRIPTORS + 1)]

    runs = list(batches(entries))

    assert [len(run) for run in runs] == [MAX_DESCRIPTORS, MAX_DESCRIPTORS, 1]
    assert [entry for run in runs for entry in run] == entries


def test_batches_by_bytes() -> None:
    """A batch of large entries fits one packet, with all that stands beside them."""
    entries = [{"address": "unix:///" + "x" * 5000, "n": number} for number in range(30)]

    runs = list(batches(entries))

    assert len(runs) > 1
    assert [entry for run in runs for entry in run] == entries
    for run in runs:
        encode(
            Kind.DESCRIPTORS, upgrade="0" * 16, generation=10**15, batch=10**6, batches=10**6, entries=run
        )  # raises if it doesn't fit


def test_entry_too_large() -> None:
    """An entry that fits no packet is refused."""
    with pytest.raises(BadMessage, match="an entry has 65550 bytes, and a packet takes at most 65536"):
        list(batches([{"address": "x" * (MAX_PACKET - 1)}]))
