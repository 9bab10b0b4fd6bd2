"""The embedded default: its data set, the cutting out of docstrings, and the packaged base model."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meshpeft.data import embedded
from meshpeft.data.embedded import (
    embedded_model_dir,
    embedded_records,
    is_held_out,
    source_without_docstrings,
    standard_library_modules,
)

MEBIBYTE = 1 << 20


def documented_nodes(source: str) -> list[ast.AST]:
    documentable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documentable)]
    return [node for node in nodes if ast.get_docstring(node) is not None]


def code_of(source: str) -> Counter[type]:
    """How often each kind of syntax occurs, but for what a docstring or its `pass` is made of."""
    kinds = Counter(type(node) for node in ast.walk(ast.parse(source)))
    for kind in (ast.Expr, ast.Constant, ast.Pass):
        del kinds[kind]
    return kinds


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return dict(standard_library_modules())


@pytest.fixture(scope="module")
def records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return embedded_records()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_dir())


# -- cutting docstrings out


@pytest.mark.parametrize(
    ("source", "expected"),
    (
        ('"""M."""\n\nimport os  # kept\n', "import os  # kept\n"),
        ('def f(a):\n    """D.\n\n    More.\n    """\n\n    return a\n', "def f(a):\n    return a\n"),
        ('async def f():\n    r"""D."""\n', "async def f():\n    pass\n"),
        ('class A:\n    "D"\n    x = 1\n', "class A:\n    x = 1\n"),
        ('class A:\n    ("in "\n     "parts")\n    def f(self): "D"\n', "class A:\n    def f(self): pass\n"),
        ('def f(): "D"; return 1\n', "def f(): pass; return 1\n"),
        ('def f():\n    "D"; return 1\n', "def f():\n    pass; return 1\n"),
        ('def f():\n    """D."""  # why\n    return 1\n', "def f():\n    # why\n    return 1\n"),
        ('def f():\n    """D."""  # why\n', "def f():\n    pass  # why\n"),
        # Cutting the first string must not make a docstring of the second.
        ('def f():\n    "D"\n    "E"\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    "D"\n    "E"\n', "def f():\n    pass\n"),
        # Columns of the syntax tree are bytes, not characters.
        ('def é(): "ü日"; return "ß"  # ñ\n', 'def é(): pass; return "ß"  # ñ\n'),
        # These are no docstrings.
        ('def f():\n    x = """kept"""\n    """kept"""\n', 'def f():\n    x = """kept"""\n    """kept"""\n'),
        ('def f():\n    f"""{1}"""\n', 'def f():\n    f"""{1}"""\n'),
        ("def f():\n    b'kept'\n", "def f():\n    b'kept'\n"),
        # A form feed ends no line for Python, though it does for str.splitlines.
        ('\x0cdef f():\r\n    """D."""\r\n    return 1\r\n', "\x0cdef f():\n    return 1\n"),
    ),
)
def test_docstrings_are_cut_out_and_everything_else_stays(source: str, expected: str) -> None:
    assert source_without_docstrings(source) == expected
    ast.parse(expected)


def test_standard_library_without_docstrings_is_the_same_program(modules: dict[str, str]) -> None:
    # A sixth of the modules is enough of the language, and takes a second.
    for name in sorted(modules)[::6]:
        without = source_without_docstrings(modules[name])
        assert not documented_nodes(without), name
        assert without.count("#") <= modules[name].count("#"), name
        assert code_of(without) == code_of(modules[name]), name


def test_invalid_source_is_refused() -> None:
    with pytest.raises(SyntaxError):
        source_without_docstrings("def f(:\n")


# -- the data set


def test_held_out_is_about_a_tenth_of_the_modules(modules: dict[str, str]) -> None:
    held_out = [name for name in modules if is_held_out(name)]
    # 10% of the 400 to 460 modules of the supported versions: three standard deviations are 4.5 points.
    assert 0.055 < len(held_out) / len(modules) < 0.145
    # The packaged base was trained on the others: the split may never change.
    assert is_held_out("random")
    assert not is_held_out("tarfile")


def test_no_installed_package_and_no_test_is_a_source(modules: dict[str, str]) -> None:
    assert {"argparse", "asyncio.base_events", "json"} <= modules.keys()
    parts = {part for name in modules for part in name.split(".")}
    assert not parts & {"site", "torch", "test", "tests", "idlelib", "encodings", "pydoc_data"} - {"site"}
    assert list(modules) == sorted(modules)


def test_records_are_split_by_module(
    monkeypatch: pytest.MonkeyPatch, records: tuple[list[dict[str, str]], list[dict[str, str]]]
) -> None:
    train, held_out = records
    for module, is_test in (("random", True), ("tarfile", False)):
        only = {name: source for name, source in standard_library_modules() if name == module}
        monkeypatch.setattr(embedded, "standard_library_modules", lambda only=only: iter(only.items()))
        of_module = embedded._all_records.__wrapped__()
        monkeypatch.undo()
        assert of_module[1 - is_test] == []
        assert len(of_module[is_test]) >= 5
        prompts = {record["prompt"] for record in of_module[is_test]}
        # Some functions of the module may have been dropped as another module's duplicates, but not most.
        assert len(prompts & {record["prompt"] for record in records[is_test]}) > len(prompts) / 2
        assert not prompts & {record["prompt"] for record in records[1 - is_test]}
    for field in ("prompt", "completion"):
        values = [record[field] for record in train + held_out]
        assert len(values) == len(set(values)), f"a {field} occurs twice"


def test_records_are_deterministic_and_the_callers_own(
    records: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    embedded._all_records.cache_clear()
    again = embedded_records()
    assert again == records
    again[0][0]["prompt"] = "mine"
    again[1].clear()
    assert embedded_records() == records


def test_every_record_is_a_function_without_its_docstring(
    records: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> None:
    train, held_out = records
    assert len(train) > 2000
    assert len(held_out) > 200
    parsed = 0
    for record in train + held_out:
        assert set(record) == {"prompt", "completion"}
        prompt, completion = record["prompt"], record["completion"]
        assert prompt.endswith(embedded.PROMPT_SUFFIX)
        code = prompt.removesuffix(embedded.PROMPT_SUFFIX)
        assert code.startswith(("def ", "async def ")), code
        assert completion not in code
        assert completion == completion.strip()
        assert embedded.MIN_DOCSTRING_CHARS <= len(completion) <= embedded.MAX_DOCSTRING_CHARS
        assert len(code) <= embedded.MAX_CODE_CHARS
        try:
            assert not documented_nodes(code), code
            parsed += 1
        except SyntaxError:  # cut in the middle of its body
            continue
    assert parsed > 0.6 * len(train + held_out)


def test_a_function_is_moved_to_the_left_and_cut_at_a_lines_end() -> None:
    body = "".join(f"        x += {i}  # {'~' * 40}\n" for i in range(40))
    source = f'class A:\n    def f(self, x):\n        """What the function does."""\n{body}'
    ((prompt, completion),) = embedded._records_of(source)
    lines = prompt.removesuffix(embedded.PROMPT_SUFFIX).split("\n")
    assert completion == "What the function does."
    assert lines[0] == "def f(self, x):"
    assert all(line.startswith("    x += ") and line.endswith("~" * 40) for line in lines[1:])
    assert 5 < len(lines) < 20


@pytest.mark.parametrize("docstring", ("Too short.", "Too long. " * 100))
def test_docstrings_too_short_or_too_long_are_left_out(docstring: str) -> None:
    assert not list(embedded._records_of(f'def f(x):\n    """{docstring}"""\n    return x\n'))


# -- the packaged base model


def test_the_model_directory_is_small_and_says_how_it_was_made() -> None:
    directory = embedded_model_dir()
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 10 * MEBIBYTE
    record = json.loads((directory / "training.json").read_text())
    assert record["completed"]
    assert record["held_out_loss"] < 0.6 * record["initial_held_out_loss"]


def test_a_missing_model_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "embedded.py"))
    with pytest.raises(FileNotFoundError, match=r"embedded_base.*--model"):
        embedded_model_dir()


def test_the_base_model_knows_python(tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer) == 4096
    weights = json.loads((embedded_model_dir() / "config.json").read_text())["dtype"]
    assert weights == "bfloat16"
    text = "def __init__(self, name, value):\n    self.name = name\n    self.value = value\n"
    ids = tokenizer(tokenizer.eos_token + text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # a model that knows nothing has log(4096) = 8.3


@pytest.mark.parametrize(
    "text",
    (
        "def f(x):\n\treturn x\n",
        "naïve — 日本語 🙂\n",
        "  two  spaces \r\n\x00\x0c ",
        "".join(map(chr, range(1, 400))),
    ),
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer)


def test_the_tokenizer_has_its_special_tokens(tokenizer) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.unk_token is None
    assert tokenizer("x <|endoftext|>").input_ids[-1] == tokenizer.eos_token_id


def test_the_chat_template_ends_and_marks_what_the_assistant_says(tokenizer) -> None:
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    messages = [*question, {"role": "assistant", "content": "So."}]
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert asked == "# System:\nBe brief.\n# User:\nWhy?\n# Assistant:\n"
    assert whole == asked + "So.<|endoftext|>"
    tokens = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [i for i, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(spoken) == "So.<|endoftext|>"


@pytest.mark.slow
def test_most_records_fit_in_256_tokens(tokenizer, records: tuple[list[dict[str, str]], list[dict[str, str]]]) -> None:
    texts = [record["prompt"] + record["completion"] for record in records[0]]
    lengths = [len(ids) + 1 for ids in tokenizer(texts).input_ids]
    assert sum(length <= 256 for length in lengths) > 0.95 * len(lengths)
    assert max(lengths) < 512
