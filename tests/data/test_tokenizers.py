"""A tokenizer's files are data: none runs code, and whatever is wrong with them is a sentence."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.byte_tokenizer import with_tokenizer
from helpers.fuzz import MANY, generators, guarded, mutated_bytes, mutated_json

import meshpeft
from meshpeft.data.documents import tokenize_records
from meshpeft.data.files import DataError
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.hub.transformers_load import transformers_config
from meshpeft.models import ModelError
from meshpeft.training.generate import prompt_tokens

SOURCES = sorted(Path(meshpeft.__file__).parent.rglob("*.py"))
CODE = "open('ran', 'w').write('x')\nclass Own: pass\n"
OWN = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoProcessor"), "own.Own")}
OWN["auto_map"]["AutoTokenizer"] = ["own.Own", "own.Own"]  # type: ignore[assignment]


def test_every_class_of_transformers_is_told_to_run_no_code_and_no_text_is_evaluated() -> None:
    told_so = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.endswith((".from_pretrained", ".from_config")):
                told = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                assert isinstance(told, ast.Constant) and told.value is False, f"{path}, line {node.lineno}"
                told_so += 1
            assert name not in ("eval", "exec", "compile", "os.system", "yaml.load", "torch.load", "pickle.load"), path
            # The process that renders templates reads from the one that trains.
            assert name != "pickle.loads" or path.name == "template_process.py", path
    assert told_so >= 4


@pytest.mark.parametrize("file", ("tokenizer_config.json", "config.json", "both"))
def test_code_of_a_directory_is_never_run_nor_asked_about(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "own.py").write_text(CODE)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    own = {"model_type": "own", "architectures": ["Own"], **OWN}
    (tmp_path / "config.json").write_text(json.dumps(config if file == "tokenizer_config.json" else own))
    if file != "config.json":
        given = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**given, "tokenizer_class": "Own", **OWN}))
    readers = {"tokenizer_config.json": [load_tokenizer], "config.json": [transformers_config]}
    with mock.patch("builtins.input", return_value="y") as asked:
        for reader in readers.get(file, [load_tokenizer, transformers_config]):
            with pytest.raises(ModelError, match="it needs code of its own, and code of a model's directory is never"):
                reader(tmp_path)
    assert not asked.called
    assert not (tmp_path / "ran").exists() and not (tmp_path / "modules").exists()


def test_a_configuration_cannot_choose_a_kernel_of_the_hub(tmp_path: Path) -> None:
    kernel = "kernels-community/flash-attn"
    names = ("attn_implementation", "_attn_implementation", "experts_implementation")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **dict.fromkeys(names, kernel)}))
    config = transformers_config(tmp_path)
    assert config._attn_implementation is None and config._experts_implementation is None


def _replacing(*steps: tuple[object, str]) -> dict[str, Any]:
    """A normalizer that replaces one after another."""
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in steps],
    }


@pytest.mark.parametrize(
    ("file", "change", "said"),
    (
        ("tokenizer.json", {"normalizer": _replacing(*[({"String": "a"}, "aa")] * 40)}, "1.1e[+]12 times as long"),
        ("tokenizer.json", {"normalizer": _replacing(({"Regex": ""}, "b" * 1000))}, "1e[+]03 times as long"),
        (
            "tokenizer.json",
            {"decoder": {"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 999}},
            "decoder",
        ),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, "invalid value"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "cannot be read"),
        ("tokenizer_config.json", {"tokenizer_class": ["a"]}, "cannot be read"),
        ("tokenizer_config.json", [], "cannot be read"),
        ("special_tokens_map.json", {"eos_token": 7}, "cannot be read"),
        ("config.json", [], "cannot be read"),
    ),
)
def test_a_tokenizer_that_cannot_be_is_a_sentence(
    file: str, change: Any, said: str, good: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    value = json.loads(good[file])
    (tmp_path / file).write_text(json.dumps({**value, **change} if isinstance(change, dict) else change))
    with guarded(tmp_path, said) as outcome:
        _use(tmp_path)
    assert isinstance(outcome.error, ModelError)
    assert str(tmp_path) in str(outcome.error) and re.search(said, str(outcome.error))


def test_a_panic_and_text_that_is_none_are_sentences(good: dict[str, bytes], tmp_path: Path) -> None:
    with_tokenizer(tmp_path, TEMPLATE)
    value = json.loads(good["tokenizer.json"])
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, value["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    tokenizer = load_tokenizer(tmp_path)
    long = "a" * 1000 + "!"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": long}]
    for record in ({"text": long}, {"text": "\ud83d"}, {"prompt": long, "completion": "b"}, {"messages": messages}):
        with guarded(tmp_path, "panic"), pytest.raises(DataError, match="the tokenizer makes no tokens of a text"):
            tokenize_records([record], tokenizer, 16)
    with pytest.raises(DataError, match="the tokenizer makes no tokens of a text"):
        prompt_tokens(tokenizer, "\udcff")


def test_the_replacements_of_tokenizers_in_use_pass(good: dict[str, bytes], tmp_path: Path) -> None:
    with_tokenizer(tmp_path)
    value = json.loads(good["tokenizer.json"])
    steps = (({"String": " "}, "\u2581"), ({"String": "``"}, '"'), ({"Regex": " {2,}"}, " "))
    value["normalizer"] = _replacing(*steps)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    load_tokenizer(tmp_path)


RECORDS: list[list[dict[str, Any]]] = [
    [{"text": "one é \x00 two"}, {"text": ""}],
    [{"prompt": "a", "completion": "b"}],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def _use(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    for records in RECORDS:
        tokenize_records(records, tokenizer, 16)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = with_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}')
    (directory / "added_tokens.json").write_text('{"<x>": 300}')
    _use(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@MANY
@pytest.mark.parametrize("name", ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
def test_no_tokenizer_ends_in_a_traceback(name: str, count: int, good: dict[str, bytes], tmp_path: Path) -> None:
    for file, content in good.items():
        (tmp_path / file).write_bytes(content)
    for rng in generators(name, count):
        mutated = mutated_bytes(good[name], rng) if rng.random() < 0.2 else mutated_json(json.loads(good[name]), rng)
        (tmp_path / name).write_bytes(mutated)
        with guarded(tmp_path, rng):
            _use(tmp_path)
