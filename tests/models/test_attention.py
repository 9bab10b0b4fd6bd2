"""Which tokens see which: documents, padding, windows, positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.simulate import simulate, the_same
from helpers.tiny_models import FAMILIES, random_ids, reference

from meshpeft.models import KVCache, ModelError, load_pretrained
from meshpeft.models.attention import attention_masks, positions_in_documents
from meshpeft.parallel import ModelParallelConfig


@pytest.mark.parametrize(("tp", "sequence_parallel"), ((1, False), (2, True)))
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_runs(
    tiny: Callable[[str], Path], family: str, tp: int, sequence_parallel: bool
) -> None:
    ids = random_ids(2, 17)
    lengths = ((3, 9, 5), (8, 1, 4))  # the second row ends in 4 tokens of padding
    documents = torch.tensor([[0] * 3 + [1] * 9 + [2] * 5, [0] * 8 + [1] * 1 + [2] * 4 + [-1] * 4])
    model = reference(tiny(family))
    parallel = ModelParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    with simulate(tp=tp):
        decoder = load_pretrained(tiny(family), dtype=torch.float64, parallel=parallel)
        packed = the_same(decoder(ids, document_ids=documents, gather_logits=True))
    assert packed.isfinite().all()
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            alone = model(ids[row : row + 1, start : start + length]).logits[0]
            error = (packed[row, start : start + length] - alone).abs().max() / alone.abs().max()
            assert error < 1e-10
            start += length


def test_positions_restart_in_each_document() -> None:
    documents = torch.tensor([[4, 4, 7, 7, 7, -1], [-1, -1, 0, 1, 1, 1]])
    assert positions_in_documents(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2]]


def test_positions_can_be_given(tiny: Callable[[str], Path]) -> None:
    ids, positions = random_ids(1, 6), torch.tensor([[5, 7, 8, 20, 21, 30]])
    expected = reference(tiny("llama"))(ids, position_ids=positions).logits
    found = load_pretrained(tiny("llama"), dtype=torch.float64)(ids, position_ids=positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_a_mask_is_made_only_where_the_kernels_causal_path_does_not_do() -> None:
    cpu = torch.device("cpu")
    prompt = attention_masks({None, 4, 8}, queries=8, past=0, device=cpu)
    assert prompt[None].is_causal and prompt[None].allowed is None
    assert prompt[8].is_causal and prompt[8].allowed is None
    assert prompt[4].allowed is not None
    assert prompt[4].allowed[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    one = attention_masks({None, 4}, queries=1, past=7, device=cpu)
    assert not one[None].is_causal and one[None].allowed is None
    assert one[4].allowed is not None
    assert one[4].allowed[0, 0, 0].tolist() == [False] * 4 + [True] * 4


def test_a_cache_filled_in_pieces_gives_the_same_logits(tiny: Callable[[str], Path]) -> None:
    ids = random_ids(2, 15)
    with simulate(tp=2):
        parallel = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
        decoder = load_pretrained(tiny("qwen2"), dtype=torch.float64, parallel=parallel)
        whole = the_same(decoder(ids, gather_logits=True))
        cache = KVCache()
        pieces = [the_same(decoder(piece, cache=cache, gather_logits=True)) for piece in ids.split([5, 1, 1, 8], 1)]
    assert cache.length == 15
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10 * whole.abs().max().item())


def test_inputs_of_other_shapes_are_errors(tiny: Callable[[str], Path]) -> None:
    decoder = load_pretrained(tiny("mistral"))
    ids = random_ids(2, 4)
    with pytest.raises(ModelError, match=r"input_ids has shape \(4,\)"):
        decoder(ids[0])
    with pytest.raises(ModelError, match=r"input_ids has shape \(2, 0\)"):
        decoder(ids[:, :0])
    with pytest.raises(ModelError, match=r"document_ids has shape \(2, 3\); expected that of input_ids, \(2, 4\)"):
        decoder(ids, document_ids=ids[:, :3])
    cache = KVCache()
    decoder(ids, cache=cache)
    with pytest.raises(ModelError, match="the cache was filled with documents, or without"):
        decoder(ids, document_ids=torch.zeros_like(ids), cache=cache)


def test_a_decoder_for_another_mesh_is_an_error(tiny: Callable[[str], Path]) -> None:
    with simulate(tp=2), pytest.raises(ModelError, match=r"tensor_model_parallel_size=4, but the mesh has tp=2"):
        load_pretrained(tiny("mistral"), parallel=ModelParallelConfig(tensor_model_parallel_size=4))
