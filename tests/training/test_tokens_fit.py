"""Token ids and lengths meet the model before it computes: a sentence in every command, at both engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.simulate import simulate
from helpers.tiny_models import VOCAB_SIZE, save_tiny
from helpers.workers import run_on_ranks

from meshpeft.data.batches import PackedRows, pack_documents
from meshpeft.data.documents import Document
from meshpeft.data.tokenizers import end_tokens
from meshpeft.models import LanguageModel, ModelError, generate
from meshpeft.parallel import init_parallelism
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.training.base import find_base
from meshpeft.training.inputs import check_rows

POSITIONS = 16


def rows(*lengths: int, token: int = 5, seq_length: int = 64) -> PackedRows:
    documents = [Document(np.full(length, token, dtype=np.int32), np.arange(length) > 0) for length in lengths]
    return pack_documents(documents, seq_length)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    made: dict[str, LanguageModel] = {}

    def load(family: str) -> LanguageModel:
        if family not in made:
            short = {"rope_parameters": None} if family == "llama" else {}
            directory = tmp_path_factory.mktemp(family)
            save_tiny(family, directory, **short, max_position_embeddings=POSITIONS)
            made[family] = find_base(directory).load(torch.float32)
        return made[family]

    return load


@pytest.mark.parametrize("family", ("llama", "phi3", "gpt2"))
@pytest.mark.parametrize("token", (VOCAB_SIZE, 2**31 - 1))
def test_tokens_outside_of_the_vocabulary_are_refused(
    model: Callable[[str], LanguageModel], family: str, token: int
) -> None:
    check_rows(model(family), rows(4, token=VOCAB_SIZE - 1))
    with pytest.raises(ModelError, match=rf"token {token:,} is outside of the model's vocabulary of {VOCAB_SIZE}"):
        check_rows(model(family), rows(4), rows(4, token=token))
    for wide in (token, -1, 2**40):
        with pytest.raises(ModelError, match=r"the prompt: token .* is outside of the model's vocabulary"):
            generate(model(family), torch.tensor([[1, wide]]), 2)


@pytest.mark.parametrize("family", ("gpt2", "bert", "ctrl"))
def test_texts_beyond_a_table_of_positions_are_refused(model: Callable[[str], LanguageModel], family: str) -> None:
    check_rows(model(family), rows(POSITIONS, POSITIONS - 3, seq_length=POSITIONS))
    with pytest.raises(
        ModelError, match=rf"a text has {POSITIONS + 1} tokens, and the model positions for {POSITIONS}"
    ):
        check_rows(model(family), rows(POSITIONS + 1))
    with pytest.raises(ModelError, match="positions for 16"):
        generate(model(family), torch.ones((1, POSITIONS + 1), dtype=torch.long), 2)


def test_documents_that_share_a_row_are_counted_alone(model: Callable[[str], LanguageModel]) -> None:
    packed = rows(9, 9, 9, seq_length=2 * POSITIONS)
    assert len(packed) < 3
    check_rows(model("gpt2"), packed)
    batch = packed.gather(np.arange(1))
    model("gpt2")(batch.input_ids, batch.position_ids, batch.document_ids)


def test_generation_stops_at_the_last_position(model: Callable[[str], LanguageModel]) -> None:
    with pytest.warns(UserWarning, match="the model has 16 positions: it stops after 7 new tokens"):
        tokens = generate(model("gpt2"), torch.ones((1, 10), dtype=torch.long), 200)
    assert tokens.shape == (1, POSITIONS + 1)


def own_prompts(directory: Path) -> tuple[int, str]:
    """Tokens added to a prompt of another length on each rank, and what is said of one that is wrong on the last."""
    rank = init_parallelism().dp.rank
    model = find_base(directory).load(torch.float32)
    prompt = torch.ones((1, 4 + 6 * rank), dtype=torch.long)
    with pytest.warns(UserWarning, match="it stops after 7 new tokens"):
        added = generate(model, prompt, 200, eos_token_id=VOCAB_SIZE).shape[1] - prompt.shape[1]
    with pytest.raises(ModelError) as raised:
        generate(model, prompt + VOCAB_SIZE * rank, 2)
    return added, str(raised.value)


def test_ranks_with_prompts_of_their_own_stop_and_fail_together(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, max_position_embeddings=POSITIONS)
    for added, said in run_on_ranks(2, own_prompts, tmp_path, timeout=60):
        assert added == 7
        assert "is outside of the model's vocabulary" in said


@pytest.mark.parametrize("family", ("llama", "phi3"))
def test_rotary_positions_go_on_with_a_warning(model: Callable[[str], LanguageModel], family: str) -> None:
    with pytest.warns(UserWarning, match=r"a text has 17 tokens, and the model was made for 16"):
        check_rows(model(family), rows(POSITIONS + 1))
    with pytest.warns(UserWarning, match="the prompt: a text has 20 tokens"):
        assert generate(model(family), torch.ones((1, 20), dtype=torch.long), 2).shape == (1, 22)


def test_the_vocabulary_is_that_of_all_ranks(tmp_path: Path) -> None:
    base = find_base(save_tiny("llama", tmp_path))
    with simulate(tp=2):
        assert base.load(torch.float32).vocab_size == VOCAB_SIZE


def test_a_pad_token_outside_of_the_vocabulary_never_matters(tmp_path: Path) -> None:
    """Rows that have ended are filled while others go on."""
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 10**6}))
    model = find_base(tmp_path).load(torch.float32)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    first = generate(model, prompt, 1)[:, -1]
    assert first[0] != first[1]
    tokens = generate(model, prompt, 4, eos_token_id=int(first[0]))
    assert set(tokens[0, 3:].tolist()) == {int(first[0])}


class _Tokenizer:
    eos_token_id = 3


@pytest.mark.parametrize("value", ("2", True, [1, "2"], [[1]], {"a": 1}, 1.5, -1, 2**40, [None]))
def test_end_tokens_of_other_types_are_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(MeshPEFTError, match=r"generation_config.json: eos_token_id=.*; expected an integer"):
        end_tokens(tmp_path, _Tokenizer())  # type: ignore[arg-type]
