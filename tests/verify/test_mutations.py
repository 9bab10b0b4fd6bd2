"""The list of faults in scripts/mutations.toml fits the sources, and every one of them was seen."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "mutations.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_still_be_put_in(script: ModuleType) -> None:
    mutations, options = script.read_list()
    assert script.problems(mutations, options) == []


def test_there_are_faults_of_every_kind(script: ModuleType) -> None:
    counts = Counter(mutation.kind for mutation in script.read_list()[0])
    assert set(counts) == set(script.KINDS)
    assert min(counts.values()) >= 3 and counts.total() >= 40


def test_every_fault_was_seen_and_is_in_the_table(script: ModuleType) -> None:
    mutations, _ = script.read_list()
    results = script.read_results()
    unseen = [
        mutation.name
        for mutation in mutations
        if not any(map(script.noticed, (results[mutation.name].verify, results[mutation.name].test)))
    ]
    assert unseen == []
    assert script.table(mutations, results) in script.PAGE.read_text(encoding="utf-8")


def test_a_list_that_is_out_of_date_is_named(script: ModuleType) -> None:
    mutations, options = script.read_list()
    gone = script.replace(mutations[0], old="no such text")
    [problem] = script.problems([gone], options)
    assert "0 times" in problem and mutations[0].name in problem
