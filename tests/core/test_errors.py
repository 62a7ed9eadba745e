"""Errors: one base class, and a sentence each."""

from __future__ import annotations

import inspect
import pickle

import pytest

from handoff.core import errors

EXAMPLES = [
    (errors.BadAddress("h:1", "an address begins with tcp://"), "h:1: an address begins with tcp://"),
    (errors.CannotListen("tcp://h:1", "address in use"), "cannot listen on tcp://h:1: address in use"),
    (errors.BadDirectory("/run/web", "is not yours"), "runtime directory /run/web: is not yours"),
    (
        errors.NotRunning("web", "/run/handoff"),
        "web: no such service is running in /run/handoff; start it, or name its runtime directory with --runtime-dir",
    ),
    (
        errors.AlreadyRunning("web", 7, 42),
        "web: generation 7 (pid 42) is already running; replace it with `handoff upgrade web`, or stop it first",
    ),
    (
        errors.AlreadyRunning("web", 7, None),
        "web: generation 7 is already running; replace it with `handoff upgrade web`, or stop it first",
    ),
    (
        errors.NoAnswer("web", 42, 5.0),
        "web: no answer in 5 s from pid 42 at the control socket; it may be stopped or hung: look at it, or end it",
    ),
    (
        errors.NoAnswer("web", None, 0.5),
        "web: no answer in 0.5 s from the process at the control socket; "
        "it may be stopped or hung: look at it, or end it",
    ),
    (errors.Refused("web", "generation 7 serves", "no-upgrade"), "web: generation 7 serves"),
    (errors.RolledBack("web", 8, "no database"), "web: generation 8 was rolled back: no database"),
    (errors.CannotSpawn("/bin/web", "no such file"), "cannot start /bin/web: no such file"),
    (errors.BadMessage("no JSON"), "bad message: no JSON"),
    (errors.BadDescriptors("2 were announced"), "bad descriptors: 2 were announced"),
    (
        errors.ControlLost("web", 7),
        "web: the control thread of generation 7 ended by an error; the log has it: please report it",
    ),
]


@pytest.mark.parametrize(("error", "sentence"), EXAMPLES, ids=[type(error).__name__ for error, _ in EXAMPLES])
def test_sentence(error: errors.HandoffError, sentence: str) -> None:
    """Each error says what, which value and what to do, in one line without a full stop."""
    assert str(error) == sentence
    assert not sentence[0].isupper()
    assert not sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=[type(error).__name__ for error, _ in EXAMPLES])
def test_data_is_in_fields(error: errors.HandoffError) -> None:
    """An error's values can be read without taking its sentence apart, and its class can be caught as HandoffError."""
    values = tuple(vars(error).values())

    assert values and values == error.args
    assert isinstance(error, errors.HandoffError)


def test_every_error_is_tested() -> None:
    """No error is without an example here."""
    classes = {value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)}

    assert {type(error) for error, _ in EXAMPLES} == classes - {errors.HandoffError}


def test_errors_are_hashable() -> None:
    """Two errors are two, as Python's own are: tracebacks and contextlib count on it."""
    one, other = errors.BadMessage("x"), errors.BadMessage("x")

    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=[type(error).__name__ for error, _ in EXAMPLES])
def test_error_crosses_processes(error: errors.HandoffError) -> None:
    """An error can be pickled, as concurrent.futures does with what a worker raises."""
    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), str(copy)) == (type(error), str(error))


def test_refused_has_a_code_for_programs() -> None:
    """A refusal's code may be left out."""
    assert errors.Refused("web", "no").code == ""
