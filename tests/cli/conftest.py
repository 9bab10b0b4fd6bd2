from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.byte_tokenizer import VOCABULARY, with_tokenizer
from helpers.finetune_jobs import short_samples
from helpers.tiny_models import save_tiny


@pytest.fixture(scope="module", autouse=True)
def _short_samples() -> Iterator[None]:
    with short_samples():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of one token per byte."""
    return with_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("base"), vocab_size=VOCABULARY))


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows of one quantisation block and of two; over 2 processes some blocks are on both."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return with_tokenizer(save_tiny("llama", tmp_path_factory.mktemp("wide"), vocab_size=VOCABULARY, **sizes))


@pytest.fixture(scope="session")
def wide_experts_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE whose rows divide into quantisation blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 8}
    directory = tmp_path_factory.mktemp("wide_experts")
    return with_tokenizer(save_tiny("qwen3_moe", directory, vocab_size=VOCABULARY, num_hidden_layers=2, **sizes))


@pytest.fixture(scope="session")
def experts_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same of a family with experts; made once."""

    @cache
    def directory(family: str) -> Path:
        return with_tokenizer(save_tiny(family, tmp_path_factory.mktemp(family), vocab_size=VOCABULARY))

    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of different lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    numbers = random.Random(0)
    records = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}" * numbers.randint(1, 3)}
        for a, b in (numbers.choices(range(1000), k=2) for _ in range(40))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
