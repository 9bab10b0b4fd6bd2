"""What messages show of files that anyone may have written."""

from __future__ import annotations

import pytest

from meshpeft.parallel.errors import MeshPEFTError, blamed_on, first_line, shown


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10**7,
        list(range(10**6)),
        10**5000,
        {str(i): i for i in range(10**5)},
        [[[[[[[["deep"]]]]]]]],
        "\ud800\x1b\n",
    ],
    ids=["string", "list", "number", "object", "nested", "characters"],
)
def test_a_value_is_shown_in_a_line(value: object) -> None:
    text = shown(value)
    assert 0 < len(text) <= 400
    assert text.isprintable() and text.encode()


def test_a_message_is_bounded_and_printable() -> None:
    message = str(MeshPEFTError(f"bell \x07, surrogate \ud800, {'x' * 10**6}"))
    assert message.startswith("bell \\x07, surrogate \\ud800, xxx") and len(message) < 20_100
    assert str(MeshPEFTError("one\ntwo")) == "one\ntwo"  # lines of a report stay lines


class Worse(Exception):
    def __str__(self) -> str:
        raise TypeError


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(13, "Permission denied"), "config.json: cannot be read: Permission denied"),
        (RecursionError("maximum"), "config.json: cannot be read: it is nested too deep"),
        (KeyError("shape"), "config.json: cannot be read: it lacks 'shape'"),
        (ZeroDivisionError("division by zero"), "config.json: cannot be read: division by zero"),
        (Worse(), "config.json: cannot be read: Worse"),
    ],
)
def test_what_another_package_raises_is_the_files_fault(error: Exception, sentence: str) -> None:
    with pytest.raises(MeshPEFTError) as caught, blamed_on("config.json: cannot be read", MeshPEFTError):
        raise error
    assert str(caught.value) == sentence and caught.value.__cause__ is error


def test_a_line_that_introduces_the_next_brings_it() -> None:
    assert first_line(ValueError("invalid field 'a':\n    TypeError: not a number\nand more")) == (
        "invalid field 'a': TypeError: not a number"
    )
