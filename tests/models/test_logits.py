"""The decoder computes what transformers computes, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.simulate import on_rank, simulate, the_same
from helpers.thinned import cross_section
from helpers.tiny_models import FAMILIES, random_ids, reference, save_tiny
from torch import Tensor
from torch.nn import functional

from meshpeft.models import hf_tensor_names, load_pretrained, save_pretrained
from meshpeft.parallel import (
    ModelParallelConfig,
    finalize_gradients,
    layout_of_tensor,
    vocab_parallel_cross_entropy,
)

# float64 leaves nothing but rounding; float32 is transformers' own error against float64, a few units of 1e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def parallel(tp: int, sequence_parallel: bool = False) -> ModelParallelConfig:
    return ModelParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)


@cross_section(2, family=FAMILIES, tp=(1, 2, 4), dtype=(torch.float32, torch.float64))
def test_logits_equal_transformers(tiny: Callable[[str], Path], family: str, tp: int, dtype: torch.dtype) -> None:
    ids = random_ids()
    expected = reference(tiny(family), dtype)(ids).logits
    with simulate(tp=tp):
        decoder = load_pretrained(tiny(family), dtype=dtype, parallel=parallel(tp))
        logits = the_same(decoder(ids, gather_logits=True))
    assert logits.dtype == dtype
    assert relative_error(logits, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tp", (2, 4))
def test_logits_are_divided_along_the_vocabulary(tiny: Callable[[str], Path], tp: int) -> None:
    ids = random_ids()
    expected = reference(tiny("llama"))(ids).logits.chunk(tp, -1)
    with simulate(tp=tp):
        logits = load_pretrained(tiny("llama"), dtype=torch.float64, parallel=parallel(tp))(ids)
        for rank in range(tp):
            assert relative_error(on_rank(logits, rank), expected[rank]) < 1e-10


@cross_section(2, tp=(2, 4), length=(1, 12, 13))
def test_sequence_parallel_pads_any_length(tiny: Callable[[str], Path], tp: int, length: int) -> None:
    ids = random_ids(length=length)
    expected = reference(tiny("qwen3"))(ids).logits
    with simulate(tp=tp):
        decoder = load_pretrained(tiny("qwen3"), dtype=torch.float64, parallel=parallel(tp, True))
        every = the_same(decoder(ids, gather_logits=True))
        last = the_same(decoder(ids, gather_logits=True, last_token_only=True))
    assert relative_error(every, expected) < 1e-10
    assert relative_error(last, expected[:, -1:]) < 1e-10


@pytest.mark.parametrize("sequence_parallel", (False, True))
@pytest.mark.parametrize("family", ("llama", "mistral"))  # a tied head, and one of its own
def test_a_vocabulary_with_one_added_token_is_whole(family: str, sequence_parallel: bool, tmp_path: Path) -> None:
    directory, ids = save_tiny(family, tmp_path / "model", vocab_size=97), random_ids()
    expected = reference(directory)(ids).logits
    with simulate(tp=2):
        decoder = load_pretrained(directory, dtype=torch.float64, parallel=parallel(2, sequence_parallel))
        logits = the_same(decoder(ids))
        last = the_same(decoder(ids, last_token_only=True, gather_logits=True))
        save_pretrained(decoder, tmp_path / "saved")
    assert relative_error(logits, expected) < 1e-10
    assert relative_error(last, expected[:, -1:]) < 1e-10
    assert relative_error(reference(tmp_path / "saved")(ids).logits, expected) < 1e-12


def test_bfloat16_is_transformers_bfloat16(tiny: Callable[[str], Path]) -> None:
    ids = random_ids()
    theirs = reference(tiny("mistral"), torch.bfloat16)(ids).logits.float()
    exact = reference(tiny("mistral"))(ids).logits.float()
    decoder = load_pretrained(tiny("mistral"), dtype=torch.bfloat16)
    ours = decoder(ids)
    assert ours.dtype == torch.bfloat16
    # No further from the exact logits than theirs: half as much again allows for another order of rounding.
    assert relative_error(ours.float(), exact) < 1.5 * relative_error(theirs, exact)


# tp, and sequence parallel.
@cross_section(2, family=FAMILIES, layout=((1, False), (2, False), (2, True)), activation_checkpointing=(False, True))
def test_every_gradient_equals_transformers(
    tiny: Callable[[str], Path], family: str, layout: tuple[int, bool], activation_checkpointing: bool
) -> None:
    ids = random_ids()
    model = reference(tiny(family))
    logits = model(ids).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    with simulate(tp=layout[0]):
        decoder = load_pretrained(
            tiny(family),
            dtype=torch.float64,
            parallel=parallel(*layout),
            activation_checkpointing=activation_checkpointing,
        )
        vocab_parallel_cross_entropy(decoder(ids)[:, :-1], ids[:, 1:]).mean().backward()
        finalize_gradients(decoder)
        found = {name: gradients_by_hf_name(name, parameter) for name, parameter in decoder.named_parameters()}
    compared = set()
    for gradients in found.values():
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) < 1e-10, name
            compared.add(name)
    assert compared == set(expected)


def test_activation_checkpointing_computes_each_layer_again(tiny: Callable[[str], Path]) -> None:
    decoder = load_pretrained(tiny("mistral"), activation_checkpointing=True)
    runs: list[object] = []
    for layer in decoder.decoder.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    decoder(random_ids()).sum().backward()
    assert len(runs) == 2 * len(decoder.decoder.layers)
    with torch.no_grad():
        decoder(random_ids())
    assert len(runs) == 3 * len(decoder.decoder.layers)


def gradients_by_hf_name(name: str, parameter: Tensor) -> dict[str, Tensor]:
    layout = layout_of_tensor(parameter)
    assert layout is not None
    assert parameter.grad is not None
    full = the_same(layout.gather(parameter.grad))
    sizes = [full.shape[0]] if layout.fused_parts is None else list(layout.fused_parts.sizes)
    return dict(zip(hf_tensor_names(name, layout), full.split(sizes), strict=True))
