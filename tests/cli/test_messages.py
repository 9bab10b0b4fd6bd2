"""What messages tell people to do can be done: every option that one names is an option of a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import meshpeft
from meshpeft.training.config import EvaluateConfig, ExportConfig, GenerateConfig, MergeConfig, PlanConfig

OPTIONS = {
    field.name.replace("_", "-")
    for config in (PlanConfig, EvaluateConfig, GenerateConfig, ExportConfig, MergeConfig)
    for field in fields(config)
}
# Of vLLM and of torchrun; and what begins the negative of a switch.
OTHERS = {
    "help",
    "version",
    "max-lora-rank",
    "nnodes",
    "nproc-per-node",
    "rdzv-backend",
    "rdzv-endpoint",
    "no-python",
    "no-",
}
# What these say is about models and layers that no command makes.
OF_THE_LIBRARY = frozenset({"transformers.py", "wrapper.py", "content.py", "same_tokens.py"})
ADVICE = re.compile(r"\b(?:use|with|give|choose|add|set) (?:one with )?([a-z]\w*)=")


@cache
def texts() -> list[tuple[str, str]]:
    return list(_texts())


def _texts() -> Iterator[tuple[str, str]]:
    """Every text in what is raised or warned of, with its file; fields of f-strings are left out."""
    for path in Path(next(iter(meshpeft.__path__))).rglob("*.py"):
        tree = ast.parse(path.read_text())
        within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in within:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "#" for part in node.values]
                yield path.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path.name, node.value


def test_options_in_messages_are_options() -> None:
    unknown = [
        (file, name)
        for file, text in texts()
        for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)
        if name not in OPTIONS | OTHERS and name.removeprefix("no-") not in OPTIONS
    ]
    assert unknown == []


def test_arguments_of_functions_are_named_with_their_option() -> None:
    """Who calls a function gives `dtype=`; who runs a command has other names."""
    lost = [
        (file, text)
        for file, text in texts()
        for name in ADVICE.findall(text)
        if name.replace("_", "-") not in OPTIONS and "(--" not in text and file not in OF_THE_LIBRARY
    ]
    assert lost == []
