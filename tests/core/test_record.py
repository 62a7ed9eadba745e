"""The record of an upgrade: what is told, and what is taken from others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handoff.core.errors import BadMessage
from handoff.core.record import Record, Result, Step


def test_only_what_is_known_is_told() -> None:
    """Fields that are not known yet are left out."""
    record = Record(upgrade="u1", service="web", old=7)

    assert record.to_json() == {"upgrade": "u1", "service": "web", "old": 7, "started": 0.0, "steps": {}}


def test_record_comes_back() -> None:
    """A full record is read as the same one."""
    record = Record(
        upgrade="u1",
        service="web",
        old=7,
        new=8,
        started=1000.5,
        steps={Step.SPAWN.value: 0.1, Step.ROLLBACK.value: 1},
        result=Result.ROLLED_BACK.value,
        seconds=2.5,
        reason="no database",
        last_words="Traceback",
        kept=1,
        added=2,
        removed=3,
        open=4,
        finished=3,
        closed=1,
    )

    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_unknown_fields_are_ignored() -> None:
    """A later version may add fields."""
    record = Record.from_json({"upgrade": "u1", "service": "web", "old": 7, "colour": "green"})

    assert record == Record(upgrade="u1", service="web", old=7)


def test_records_share_no_steps() -> None:
    """Each record has steps of its own."""
    one, other = (Record(upgrade=name, service="web", old=7) for name in "ab")

    one.steps[Step.SPAWN.value] = 1.0

    assert other.steps == {}


@pytest.mark.parametrize("field", ["upgrade", "service", "old"])
def test_missing_field(field: str) -> None:
    """A record needs the upgrade, the service and the old generation."""
    body = {"upgrade": "u1", "service": "web", "old": 7}
    del body[field]

    with pytest.raises(BadMessage, match="lacks the upgrade, the service or the old generation"):
        Record.from_json(body)


@pytest.mark.parametrize(
    "field",
    [
        {"upgrade": 1},
        {"service": None},
        {"old": "7"},
        {"old": True},
        {"new": 8.0},
        {"started": "now"},
        {"steps": []},
        {"steps": None},
        {"result": 1},
        {"seconds": "1"},
        {"reason": ["x"]},
        {"last_words": {}},
        {"kept": "1"},
    ],
    ids=str,
)
def test_field_of_wrong_type(field: dict[str, Any]) -> None:
    """A field of the wrong type is refused by name: the one who takes charge counts on what it was given."""
    with pytest.raises(BadMessage, match=f"a record whose '{next(iter(field))}' is a "):
        Record.from_json({"upgrade": "u1", "service": "web", "old": 7, **field})


@pytest.mark.parametrize("seconds", ["1", None, True, []], ids=repr)
def test_step_without_time(seconds: object) -> None:
    """Every step has a time."""
    with pytest.raises(BadMessage, match="a record whose steps are no times"):
        Record.from_json({"upgrade": "u1", "service": "web", "old": 7, "steps": {"spawn": seconds}})


def test_steps_are_in_order() -> None:
    """The steps are those of design.md, in their order; the rollback is beside it."""
    assert [step.value for step in Step] == [
        "spawn",
        "adopt",
        "ready",
        "cutover",
        "probation",
        "commit",
        "drain",
        "exit",
        "rollback",
    ]
