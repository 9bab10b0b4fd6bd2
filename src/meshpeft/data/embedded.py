"""The embedded default: a small base model in the package, and data from the running interpreter.

`meshpeft finetune` without arguments has to work on a machine that has no model, no data set and no
network. The base model is a directory of this package (`embedded_model_dir`; made by
`scripts/train_embedded_base.py`). The data set is made at run time from the standard library of the
interpreter that runs (`embedded_records`): a function's signature and body is the prompt, its
docstring the completion. The base saw that library's source only with its docstrings cut out
(`source_without_docstrings`), and never saw the held-out modules, so that what an adapter learns is
new and what the held-out loss measures was not seen.

Only the standard library is imported here.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "PROMPT_SUFFIX",
    "embedded_model_dir",
    "embedded_records",
    "is_held_out",
    "source_without_docstrings",
    "standard_library_modules",
]

#: Ends a prompt, so that a model sees where code ends and prose begins.
PROMPT_SUFFIX = "\n# Docstring:\n"
#: With the embedded tokenizer (3 to 4 characters a token) these two keep most records below 256 tokens.
MAX_CODE_CHARS = 600
MAX_DOCSTRING_CHARS = 400
MIN_DOCSTRING_CHARS = 20
HELD_OUT_PERCENT = 10

_SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "__phello__",  # a frozen-module example
        "dist-packages",
        "encodings",  # generated character tables
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",  # the language reference as one string
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def embedded_model_dir() -> Path:
    """Find the Hugging Face directory of the packaged base model (Llama architecture, bfloat16, with tokenizer).

    Raises:
        FileNotFoundError: The package was installed without its data files.
    """
    directory = Path(__file__).resolve().parent / "embedded_base"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded base model is missing: expected a Hugging Face model in {directory}; "
            "reinstall meshpeft with its package data, or give --model DIR"
        )
    return directory


def is_held_out(module: str) -> bool:
    """Return whether the module of this dotted name is held out: its name's hash falls in the last tenth.

    The split depends on the name alone, so that it is the same on every machine and Python version, and
    for the corpus that the base model was trained on.
    """
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 >= 100 - HELD_OUT_PERCENT


def standard_library_modules() -> Iterator[tuple[str, str]]:
    """Yield `(dotted name, source)` of the standard library's Python modules, sorted by name.

    Left out: installed packages, tests, generated tables and data (`encodings`, `pydoc_data`,
    `_sysconfigdata…`), and the applications `idlelib`, `lib2to3` and `turtledemo`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Path] = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_DIRECTORIES.isdisjoint(parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        if not all(part.isidentifier() for part in parts):  # e.g. config-3.11-x86_64-linux-gnu
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for name in sorted(found):
        try:
            with tokenize.open(found[name]) as file:  # honours the coding line
                yield name, file.read()
        except (SyntaxError, UnicodeDecodeError):  # not in the encoding that it declares: not source
            continue


def source_without_docstrings(source: str) -> str:
    """Cut the docstrings of its module, classes and functions out of `source`.

    Comments and the formatting of all other lines stay; the blank lines after a docstring go with it, and
    a body that held nothing else becomes `pass`. Lines end in a line feed in the result.

    Raises:
        SyntaxError: `source` is not valid Python.
    """
    lines, _ = _lines_without_docstrings(source)
    return "\n".join(line for line in lines if line is not None)


def embedded_records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Make the data set `(train, held_out)` from the running interpreter's standard library.

    Each record is `{"prompt": …, "completion": …}`: a documented function's signature and body, without
    its docstring and cut at a line's end after about 600 characters, and the docstring as
    `inspect.cleandoc` gives it, of 20 to 400 characters. No prompt and no completion occurs twice,
    in the two lists together. A module's records are all in one list (`is_held_out`). The order is
    that of the modules' names and of the lines in them, so the result depends on the interpreter's
    version only. The lists are the caller's own.
    """
    train, held_out = _all_records()
    return [dict(record) for record in train], [dict(record) for record in held_out]


@functools.cache
def _all_records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    prompts: set[str] = set()
    completions: set[str] = set()
    for module, source in standard_library_modules():
        if '"""' not in source and "'''" not in source:
            continue  # parsing is what takes the time
        records = held_out if is_held_out(module) else train
        for prompt, completion in _records_of(source):
            if prompt in prompts or completion in completions:
                continue
            prompts.add(prompt)
            completions.add(completion)
            records.append({"prompt": prompt, "completion": completion})
    return train, held_out


def _records_of(source: str) -> Iterator[tuple[str, str]]:
    try:
        lines, nodes = _lines_without_docstrings(source)
    except SyntaxError:  # a template or a file kept broken on purpose
        return
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        completion = inspect.cleandoc(docstring).strip()
        if not MIN_DOCSTRING_CHARS <= len(completion) <= MAX_DOCSTRING_CHARS:
            continue
        code = _code_of(node, lines)
        if code is not None and completion not in code:  # a docstring passed on by hand would be given away
            yield code + PROMPT_SUFFIX, completion


def _code_of(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str | None]) -> str | None:
    """Return the function's lines, without its docstring, moved to column 0 and cut; None if nothing is left."""
    indent = " " * node.col_offset
    kept: list[str] = []
    used = 0
    for line in lines[node.lineno - 1 : node.end_lineno]:
        if line is None:
            continue
        # The lines of a multi-line string may stand further left than the function itself.
        line = line.removeprefix(indent).rstrip()
        used += len(line) + 1
        if used > MAX_CODE_CHARS:
            break
        kept.append(line)
    return "\n".join(kept) if kept else None


def _lines_without_docstrings(source: str) -> tuple[list[str | None], list[_Documented]]:
    """Return the lines of `source` (None where one is cut out) and its documentable nodes, by line."""
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    tree = ast.parse(source)
    lines: list[str | None] = list(source.split("\n"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in reversed(nodes):
        strings: list[ast.stmt] = []
        for statement in node.body:  # cutting one string makes the next one the docstring
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                break
            if not isinstance(statement.value.value, str):
                break
            strings.append(statement)
        is_whole_body = len(strings) == len(node.body) and not isinstance(node, ast.Module)
        for statement in reversed(strings):
            _cut(lines, statement, leave_pass=is_whole_body and statement is strings[0])
    return lines, nodes


def _cut(lines: list[str | None], statement: ast.stmt, *, leave_pass: bool) -> None:
    """Cut a statement out of `lines`, in place; the numbering of the lines stays."""
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    first, last = statement.lineno - 1, statement.end_lineno - 1
    # ast counts columns in UTF-8 bytes.
    before = (lines[first] or "").encode()[: statement.col_offset].decode()
    after = (lines[last] or "").encode()[statement.end_col_offset :].decode()
    lines[first : last + 1] = [None] * (last + 1 - first)
    shares_line = bool(before.strip()) or (bool(after.strip()) and not after.lstrip().startswith("#"))
    if leave_pass or shares_line:
        lines[first] = before + "pass" + after
    elif after.strip():
        lines[first] = before + after.lstrip()
    else:
        following = last + 1  # the last "line" is what follows the final line feed: it stays
        while following < len(lines) - 1 and (line := lines[following]) is not None and not line.strip():
            lines[following] = None
            following += 1
