"""Names are matched as peft matches them, and no pattern takes longer than a moment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpeft.hub.adapter_config import Clock, EndsOfNames, Expression, KeyedValues
from meshpeft.hub.tensor_files import CheckpointError
from meshpeft.peft import wildcard_match

NAMES = [f"model.layers.{n}.{part}" for n in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts")]
LETTERS = st.text("ab.*", max_size=8)


def clock() -> Clock:
    return Clock(Path("adapter_config.json"))


def peft_key(keys: list[str], name: str) -> str | None:
    """What `get_pattern_key` of peft finds."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj", "up_proj"],
        ["self_attn.q_proj", "q_proj", "layers.1.mlp.up_proj"],
        ["layers.1..self_attn.q_proj", "layers.1.mlp.up_proj", r"layers\.\d+\.mlp\..*"],
        [r".*\.[24]\..*", "up_proj", "q_proj", "x|experts"],
        ["proj", "_proj", ".q_proj", "", "model"],
        [r"(?:up|q)_proj", r"\w+_proj", "model.layers.3.mlp.experts"],
        ["layers_1_mlp.up_proj", "l.yers.1.mlp.up_proj", "mlp.up.proj"],
    ],
)
def test_keys_are_found_as_peft_finds_them(keys: list[str]) -> None:
    values = KeyedValues({key: number for number, key in enumerate(keys)}, clock(), "rank_pattern")
    for name in NAMES:
        found = peft_key(keys, name)
        assert values.find(name, -1) == (-1 if found is None else keys.index(found)), name


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, unique=True, max_size=4), st.text("ab.", max_size=8))
def test_keys_of_letters_and_dots_are_found_as_peft_finds_them(keys: list[str], name: str) -> None:
    keys = [key.replace("*", "b.") for key in keys]
    values = KeyedValues({key: number for number, key in enumerate(keys)}, clock(), "rank_pattern")
    found = peft_key(list(dict.fromkeys(keys)), name)
    assert values.find(name, -1) == (-1 if found is None else list(dict.fromkeys(keys)).index(found))


def test_ends_of_names_follow_a_dot() -> None:
    ends = EndsOfNames(["q_proj", "mlp.up_proj", "proj"])
    assert [name for name in NAMES[:3] if ends.matches(name)] == NAMES[:2]


@settings(max_examples=300, deadline=None)
@given(LETTERS, st.text("ab.", max_size=8))
def test_a_star_stands_for_any_text(pattern: str, key: str) -> None:
    if "" in pattern.split("."):
        return  # warns, and matches nothing
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), key, re.DOTALL) is not None
    assert wildcard_match(pattern, key) == expected


LONG = "model.layers.0." + "a" * 60
HOSTILE = [
    "(a+)+b",
    "(.*)*(.*)*(.*)*x",
    ".*" * 50 + "x",
    "(a|aa)+$",
    "(.*a){12}",
    "(a{1000}){1000}",
    "((a{1,100}){1,100}){1,100}",
    "a{99999999999999999999}",
    "x" * 10**7,
    "(?:" * 5000,
    "(" * 5000 + ")" * 5000,
    "[",
    "a{e<=3}",
    "|".join(f"a{n}(b|c)*" for n in range(5000)),
    r"(?P<a>a)\1(?(a)b|c)",
    "(a?)" * 4000 + "b",
]


@pytest.mark.parametrize("expression", HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_no_expression_takes_long(expression: str, tmp_path: Path) -> None:
    with guarded(tmp_path, "targets"):
        pattern = Expression(expression, clock(), "target_modules")
        for name in [LONG, *NAMES]:
            pattern.matches(name)
    with guarded(tmp_path, "key"):
        values = KeyedValues({expression: 3}, clock(), "rank_pattern")
        for name in [LONG, *NAMES]:
            values.find(name, 1)


def test_an_expression_that_goes_back_is_refused(tmp_path: Path) -> None:
    slow = Expression("(.*a){12}b|(a|aa)+$", Clock(tmp_path / "adapter_config.json", 0.2), "target_modules")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: target_modules: .* takes longer than"):
        slow.matches("a" * 200 + "!")


@pytest.mark.parametrize("keys", [[f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(40) for e in range(250)]])
def test_thousands_of_keys_are_looked_up(keys: list[str], tmp_path: Path) -> None:
    with guarded(tmp_path, "keys") as outcome:
        values = KeyedValues({key: number for number, key in enumerate(keys)}, clock(), "rank_pattern")
        found: list[Any] = [values.find(key, -1) for key in keys]
    assert outcome.error is None and found == list(range(len(keys)))
