"""The pages about the code are true of the code."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "meshpeft"
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
PACKAGES = sorted(file.parent.name for file in SOURCE.glob("*/__init__.py"))
# What is done to an object that is in use, or read from one without its leave.
SURGERY = (
    r"\.__class__ = ",
    r"\w\.forward = ",
    r"(?<!super\(\))(?<!self)\.__init__\((?!self\b)",
    r"\.register_(?:full_)?(?:forward|backward)\w*hook\(",
    r"inspect\.getsource\(",
    r"inspect\.getclosurevars\(",
    r"sys\.meta_path\.insert",
    r"setattr\(sys,",
)


def _files_named_in(page: Path) -> set[str]:
    """Paths in backticks: from the root of the repository, or from that of the package."""
    return set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|json|svg))`", page.read_text()))


def test_every_place_that_changes_a_live_object_is_on_its_page() -> None:
    listed = _files_named_in(ROOT / "docs" / "live_objects.md")
    sources = {str(file.relative_to(SOURCE)): file.read_text() for file in sorted(SOURCE.rglob("*.py"))}
    found = {name for name, text in sources.items() if any(re.search(pattern, text) for pattern in SURGERY)}
    assert found - listed == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    named = {
        name for name in _files_named_in(page) if name.partition("/")[0] in (*PACKAGES, "tests", "scripts", "docs")
    }
    assert {name for name in named if not (ROOT / name).exists() and not (SOURCE / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_names_that_a_page_uses_exist(page: Path) -> None:
    text = page.read_text()
    names = set(re.findall(r"`(meshpeft(?!\.scales)(?:\.\w+)+)", text))
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("meshpeft"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in names if not _exists(name)} == set()


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return bool(module) and _exists(module) and hasattr(importlib.import_module(module), attribute)
    return True


def test_docstrings_name_other_objects_in_backticks() -> None:
    """One dialect: no roles of Sphinx, no references of mkdocstrings; scripts/docs_docstrings.py makes the links."""
    other = re.compile(r"\]\[meshpeft|:(?:class|func|meth|mod|attr|data|exc):`")
    assert [str(file) for file in SOURCE.rglob("*.py") if other.search(file.read_text())] == []
