"""Decoders with experts compute what transformers computes, at every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.expert_jobs import load_run_save
from helpers.simulate import simulate, the_same
from helpers.tiny_models import MOE_FAMILIES, random_ids, reference
from helpers.workers import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from meshpeft.models import Decoder, generate, hf_tensor_names, load_pretrained
from meshpeft.parallel import (
    ModelParallelConfig,
    ParallelGroupInfo,
    TensorLayout,
    finalize_gradients,
    layout_of_tensor,
    vocab_parallel_cross_entropy,
)

# (tp, ep, etp, dp, sequence parallel)
Layout = tuple[int, int, int, int, bool]
MANY: list[Layout] = [
    (1, 1, 1, 1, False),
    (1, 2, 1, 2, False),
    (1, 2, 1, 4, False),
    (1, 4, 1, 4, False),
    (2, 2, 1, 1, False),
    (2, 2, 1, 1, True),
    (2, 2, 1, 2, False),
    (2, 2, 2, 2, False),
    (2, 2, 2, 2, True),
    (2, 1, 2, 1, True),
    (2, 1, 2, 2, False),
]
FEW: list[Layout] = [(1, 2, 1, 2, False), (2, 2, 1, 1, True), (2, 2, 2, 2, False)]
IDS = random_ids(4, 13)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Expected(NamedTuple):
    logits: Tensor
    gradients: dict[str, Tensor]


@functools.cache
def expected(directory: Path) -> Expected:
    model = reference(directory)
    logits = model(IDS).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return Expected(logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()})


def parallel(layout: Layout) -> ModelParallelConfig:
    tp, ep, etp, _, sequence_parallel = layout
    return ModelParallelConfig(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=sequence_parallel,
    )


def rows(mesh: ParallelGroupInfo, full: Tensor) -> TensorLayout:
    """The batch, divided over data parallel."""
    return TensorLayout(tuple(full.shape), ((0, mesh.dp),))


def mesh_of(layout: Layout) -> dict[str, int]:
    return dict(zip(("tp", "ep", "etp", "dp"), layout[:4], strict=True))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=[pytest.mark.slow] if number % 2 else [])
        for family in MOE_FAMILIES
        for number, layout in enumerate(MANY if family == "qwen2_moe" else FEW)
    ],
    ids=str,
)
def test_logits_and_every_gradient_equal_transformers(tiny: Callable[[str], Path], family: str, layout: Layout) -> None:
    wanted = expected(tiny(family))
    with simulate(**mesh_of(layout)) as mesh:
        decoder = load_pretrained(
            tiny(family), dtype=torch.float64, parallel=parallel(layout), activation_checkpointing=layout[4]
        )
        ids = rows(mesh, IDS).slice(IDS)
        logits = decoder(ids)
        # The sum over the rank's own targets, over the global number of targets.
        (vocab_parallel_cross_entropy(logits[:, :-1], ids[:, 1:]).sum() / IDS[:, 1:].numel()).backward()
        finalize_gradients(decoder)
        vocabulary = TensorLayout(tuple(wanted.logits.shape), ((0, mesh.dp), (2, mesh.tp)))
        assert relative_error(the_same(vocabulary.gather(logits)), wanted.logits) < 1e-10
        found = gradients_by_stored_name(decoder)
    theirs = stored_gradients(wanted.gradients, family)
    assert found.keys() == theirs.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, theirs[name]) < 1e-10, name


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_float32_is_as_near_as_transformers(tiny: Callable[[str], Path], family: str) -> None:
    with simulate(tp=2, ep=2, etp=2, dp=2):
        decoder = load_pretrained(tiny(family), parallel=parallel((2, 2, 2, 2, True)))
        logits = the_same(decoder(IDS, gather_logits=True))
    assert logits.dtype == torch.float32
    # A few units of 1e-6: transformers' own distance from float64.
    assert relative_error(logits.double(), expected(tiny(family)).logits) < 1e-5


@pytest.mark.parametrize("length", (1, 7))
def test_tokens_that_do_not_divide_are_padded(tiny: Callable[[str], Path], length: int) -> None:
    ids = IDS[:1, :length]
    wanted = reference(tiny("qwen2_moe"))(ids).logits
    for sequence_parallel in (False, True):
        with simulate(tp=4, ep=2, etp=2):
            decoder = load_pretrained(
                tiny("qwen2_moe"), dtype=torch.float64, parallel=parallel((4, 2, 2, 1, sequence_parallel))
            )
            found = the_same(decoder(ids, gather_logits=True))
        assert relative_error(found, wanted) < 1e-10


def test_packed_documents_equal_separate_runs(tiny: Callable[[str], Path]) -> None:
    documents = torch.tensor([[0] * 4 + [1] * 6 + [-1] * 3, [0] * 13])
    model = reference(tiny("mixtral"))
    with simulate(tp=2, ep=2, etp=1):
        decoder = load_pretrained(tiny("mixtral"), dtype=torch.float64, parallel=parallel((2, 2, 1, 1, True)))
        packed = the_same(decoder(IDS[:2], document_ids=documents, gather_logits=True))
    for start, end in ((0, 4), (4, 10)):
        assert relative_error(packed[0, start:end], model(IDS[:1, start:end]).logits[0]) < 1e-10
    assert relative_error(packed[1], model(IDS[1:2]).logits[0]) < 1e-10


def test_greedy_generation_is_that_of_transformers(tiny: Callable[[str], Path]) -> None:
    ids = random_ids(2, 5)
    model = reference(tiny("qwen3_moe"))
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    with simulate(tp=4, ep=2, etp=2):
        decoder = load_pretrained(tiny("qwen3_moe"), dtype=torch.float64, parallel=parallel((4, 2, 2, 1, False)))
        assert torch.equal(the_same(generate(decoder, ids, 6)), wanted)


def test_two_processes_compute_and_save_as_one_does(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    ids = [IDS[0].tolist(), IDS[1, :4].tolist()]
    model = reference(tiny("qwen3_moe"))
    logits = [model(torch.tensor([row])).logits for row in ids]
    sum(each.square().sum() for each in logits).backward()
    results = run_on_ranks(2, load_run_save, tiny("qwen3_moe"), tmp_path / "saved", ids)
    mlp = model.model.layers[-1].mlp
    for found, wanted in zip(results, logits, strict=True):
        assert relative_error(found["logits"], wanted) < 1e-10
        assert relative_error(found["router"], mlp.gate.weight.grad) < 1e-10
        assert relative_error(found["experts"], mlp.experts.down_proj.grad) < 1e-10
    saved, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", tiny("qwen3_moe")))
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name].double()) for name in source)


def gradients_by_stored_name(decoder: Decoder) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        layout = layout_of_tensor(parameter)
        assert layout is not None and parameter.grad is not None
        full = the_same(layout.gather(parameter.grad))
        parts = [full] if layout.fused_parts is None else full.split(list(layout.fused_parts.sizes), layout.fused_dim)
        matrices = [matrix for part in parts for matrix in (part if layout.expert else [part])]
        names = hf_tensor_names(name, layout, decoder.config.model_type)
        found.update(zip(names, matrices, strict=True))
    return found


def stored_gradients(gradients: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Of transformers' stacked experts, under the names of the hub's checkpoints."""
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    stored: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        experts, _, projection = name.rpartition(".")
        if experts.endswith(".experts"):
            for part, values in zip(names[projection], gradient.chunk(len(names[projection]), 1), strict=True):
                stored.update({f"{experts}.{index}.{part}.weight": matrix for index, matrix in enumerate(values)})
        else:
            stored[name] = gradient
    if family == "mixtral":
        for ours, theirs in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            stored = {name.replace(f".{ours}.", f".{theirs}."): gradient for name, gradient in stored.items()}
    return stored
