"""The docstring dialect of the house, for the API reference (a griffe extension, named in mkdocs.yml).

Google style, with two things that plain sources read better with:

* one entry may describe several parameters, `device, dtype: Where the parameters lie, and their type.`; the reference
  shows one entry for each, and a name that is not in the signature still fails the build;
* another object is named in backticks, `mp_gather`; the reference links it if the name means something where it stands.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["DocstringDialect"]

_SECTION = re.compile(r"^(\s*)(Args|Attributes):\s*$")
_ENTRY = re.compile(r"^\s*(\*{0,2}\w+(?:, \*{0,2}\w+)+): ")
_NAME = re.compile(r"(?<![`\[\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])")


class DocstringDialect(griffe.Extension):
    """Rewrite every docstring of a package before it is parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of `pkg`."""
        _rewrite(pkg)


def _rewrite(object_: griffe.Object) -> None:
    if object_.docstring is not None:
        object_.docstring.value = _with_links(_one_entry_each(object_.docstring.value), object_)
    for member in object_.members.values():
        if not member.is_alias:
            _rewrite(member)


def _one_entry_each(text: str) -> str:
    """Write an entry of several names once for each of them."""
    lines: list[str] = []
    entry: list[str] = []
    names: list[str] = []
    section = entry_indent = -1

    def close() -> None:
        for name in names:
            lines.extend([entry[0].replace(", ".join(names), name, 1), *entry[1:]])
        if not names:
            lines.extend(entry)
        entry.clear()
        names.clear()

    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip())
        if found := _SECTION.match(line):
            close()
            section, entry_indent = len(found[1]), -1
        elif section >= 0 and line.strip():
            if indent <= section:
                close()
                section = -1
            elif entry_indent in (-1, indent):
                close()
                entry_indent = indent
                if several := _ENTRY.match(line):
                    names.extend(several[1].split(", "))
        entry.append(line)
    close()
    return "\n".join(lines)


def _with_links(text: str, object_: griffe.Object) -> str:
    """Link names in backticks that resolve where the docstring stands; examples and tables stay as they are."""

    def link(found: re.Match[str]) -> str:
        try:
            path = object_.resolve(found[1])
        except griffe.NameResolutionError:
            return found[0]
        if not path.startswith("meshpeft."):
            return found[0]
        return f'<autoref optional identifier="{path}">{found[0]}</autoref>'

    return "\n".join(line if ">>>" in line else _NAME.sub(link, line) for line in text.split("\n"))
