"""transformers models whose linear layers are ours, in two processes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import random_ids, reference, save_tiny
from helpers.transformers_runs import (
    TARGETS,
    Run,
    adapter_parameters,
    collectives_of,
    largest_error,
    load,
    train,
)
from helpers.workers import run_on_ranks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from meshpeft.checkpoint import export_peft_adapter, load_peft_adapter
from meshpeft.engines.parallelize import parallelize
from meshpeft.parallel import (
    ParallelAxis,
    ParallelError,
    init_parallelism,
    layout_of_tensor,
    mp_gather,
    vocab_parallel_cross_entropy,
)
from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

# Float64, two orders of summation, two steps: some 1e-14.
TOLERANCE = 1e-10
# B starts at random: with the usual zeros the first step would not see A at all.
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
METHODS = {"lora": LoRA, "dora": DoRA, "canonical": CanonicalLoRA}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def directory(family: str) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family))

    return directory


def method_of(name: str, family: str) -> PEFT:
    method: PEFT = METHODS[name](target_modules=TARGETS[family], **OPTIONS)
    return method


def whole_logits(directory: Path) -> tuple[Tensor, Tensor, int]:
    """Logits and loss of the divided model without adapters, the head's slices left divided; parameters held."""
    tp = init_parallelism(tensor_parallel=2).tp
    model = parallelize(load(directory, "none"), gather_logits=False)
    ids = random_ids()
    logits = model(ids).logits
    assert logits.shape[-1] == 48
    loss = vocab_parallel_cross_entropy(logits[:, :-1], ids[:, 1:]).mean()
    return mp_gather(logits, -1, tp).detach(), loss.detach(), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt_neox", "llama"])
def test_logits_are_those_of_transformers(directories: Any, family: str) -> None:
    model, ids = reference(directories(family)), random_ids()
    want = model(ids).logits.detach()
    loss = nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    others = sum(p.numel() for p in model.parameters() if p.dim() != 2)
    for got, got_loss, held in run_on_ranks(2, whole_logits, directories(family)):
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(got_loss, loss, rtol=TOLERANCE, atol=TOLERANCE)
        assert matrices // 2 <= held <= matrices // 2 + others


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma", "lora"),
        ("gemma", "dora"),
        ("phi3", "lora"),
        ("phi3", "dora"),
        ("phi3", "canonical"),
        ("gpt_neox", "lora"),
        ("gpt_neox", "dora"),
        ("gpt_neox", "canonical"),
    ],
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process(directories: Any, family: str, method: str, ranks: int) -> None:
    directory = directories(family)
    # On one rank the layers are ours too; its logits are transformers' by the test above, its gradients by that below.
    want = train(directory, "parallelize", method_of(method, family))
    for got in run_on_ranks(ranks, train, directory, "parallelize", method_of(method, family), True):
        assert largest_error(got, want) < TOLERANCE


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_rank_has_the_gradients_of_the_plain_model(directories: Any, method: str) -> None:
    directory = directories("gemma")
    want: Run = train(directory, "none", method_of(method, "gemma"))
    assert largest_error(train(directory, "parallelize", method_of(method, "gemma")), want) < TOLERANCE


@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt_neox"])
def test_adapters_add_no_collective(directories: Any, family: str) -> None:
    for adapted, without in run_on_ranks(
        2, collectives_of, directories(family), "parallelize", method_of("lora", family)
    ):
        assert without
        assert adapted == without


def test_a_packed_layer_gathers_nothing(directories: Any) -> None:
    # Two layers of attention and MLP, each one reduction forward and one backward; the embedding's, and the head's
    # gather and reduction of the gradient.
    for _, without in run_on_ranks(2, collectives_of, directories("phi3"), "parallelize", method_of("lora", "phi3")):
        assert [call.name for call in without] == ["allgather"] + ["allreduce"] * 10


def exported(directory: Path, to: Path, family: str, method: PEFT) -> Tensor:
    """The adapted logits, and the adapter in `to`."""
    init_parallelism(tensor_parallel=2)
    model = method(load(directory, "parallelize")).eval()
    export_peft_adapter(model, to, base_model_name_or_path=str(directory))
    again = load_peft_adapter(load(directory, "parallelize"), to)
    values = adapter_parameters(again)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(values[name], parameter, rtol=0, atol=0)
    logits: Tensor = model(random_ids()).logits
    return logits.detach()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt_neox"])
def test_peft_loads_the_exported_adapter(directories: Any, tmp_path: Path, family: str, method: str) -> None:
    got = run_on_ranks(2, exported, directories(family), tmp_path, family, method_of(method, family))
    base = reference(directories(family))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
    want = loaded(random_ids()).logits
    torch.testing.assert_close(got[0], want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def plain(directories: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directories("gemma"))
    return model


def test_heads_that_do_not_divide_are_named_and_the_model_stays(plain: nn.Module) -> None:
    model = copy.deepcopy(plain)
    with pytest.raises(ParallelError, match=r"_proj: \d heads of 6 features cannot be split over tp=3; use"):
        parallelize(model, axis=ParallelAxis("tp", world_size=3))
    assert not any(layout_of_tensor(parameter) for parameter in model.parameters())


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(ParallelError, match="Linear has no tensor-parallel plan"):
        parallelize(nn.Linear(4, 4))


def test_a_plan_that_shards_no_block_is_refused() -> None:
    config = AutoConfig.for_model("bamba", num_hidden_layers=1, attn_layer_indices=[], hidden_size=64, mamba_n_heads=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    del model.model.layers[0].feed_forward  # its sizes say how it may be sharded
    with pytest.raises(ParallelError, match="BambaForCausalLM: neither its tensor-parallel plan nor the structure"):
        parallelize(model, axis=ParallelAxis("tp", world_size=2))
    parallelize(model, axis=ParallelAxis("tp"))


def test_a_block_that_does_not_say_how_wide_its_heads_are_is_left_alone(plain: nn.Module) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self.add_module(name, nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x

    model: Any = copy.deepcopy(plain)
    model.model.another = Attention()
    parallelize(model)
    assert type(model.model.another.o_proj) is nn.Linear


def test_adapters_come_after_it(plain: nn.Module) -> None:
    model = LoRA(target_modules=["q_proj"], dim=2)(copy.deepcopy(plain))
    with pytest.raises(ParallelError, match=r"q_proj: .* found a LoRALinear"):
        parallelize(model)


def test_tied_weights_stay_tied(plain: Any) -> None:
    model = parallelize(copy.deepcopy(plain))
    assert model.lm_head.weight is model.model.embed_tokens.weight
