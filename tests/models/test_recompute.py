"""Parts of a layer that are computed again in the backward pass are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle_runs import config, moe_config
from helpers.simulate import simulate
from torch import Tensor, nn

from meshpeft.models import Decoder, DecoderConfig, ModelError
from meshpeft.models.recompute import kept_on_host
from meshpeft.parallel import ModelParallelConfig
from meshpeft.parallel.random import set_seed
from meshpeft.peft import DoRA, LoRA
from meshpeft.quantization import quantize_base
from meshpeft.verify.memory import MemoryWatch
from meshpeft.verify.simulation import count_collectives, on_rank, ranks
from meshpeft.verify.watch import watching

OPTIONS: dict[str, Any] = {"dim": 2, "lora_dtype": torch.float64, "lora_B_init_method": "normal"}
DENSE, EXPERTS = config(hidden_size=32, intermediate_size=64), moe_config()


def trained(structure: DecoderConfig, adapt: Any, mode: Any, **layout: Any) -> tuple[list[Tensor], int]:
    """Loss and gradients of every rank after one forward and backward pass, and the number of collectives."""
    sequence_parallel = layout.pop("sequence_parallel", False)
    with simulate(**layout):
        parallel = ModelParallelConfig(
            tensor_model_parallel_size=layout.get("tp", 1),
            expert_model_parallel_size=layout.get("ep", 1),
            expert_tensor_parallel_size=layout.get("etp"),
            sequence_parallel=sequence_parallel,
        )
        model = Decoder(structure, parallel, dtype=torch.float64)
        model.set_activation_checkpointing(mode)
        adapt(model)
        set_seed(3)
        ids = torch.arange(22).view(2, 11) % structure.vocab_size
        with count_collectives() as calls:
            loss = model(ids, document_ids=(ids % 11 > 5).long()).square().sum()
            loss.backward()
        found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return [on_rank(tensor, rank) for tensor in found for rank in ranks()], len(calls)


def packed(model: nn.Module) -> nn.Module:
    return LoRA(**OPTIONS)(quantize_base(model, "int8", block_size=32))


@pytest.mark.parametrize(
    ("structure", "adapt", "layout"),
    [
        (DENSE, LoRA(**OPTIONS, dropout=0.3), {}),  # simulated ranks' masks cannot be drawn again
        (DENSE, LoRA(**OPTIONS), {"tp": 2, "sequence_parallel": True}),
        (DENSE, DoRA(**OPTIONS), {"tp": 2}),
        (DENSE, packed, {"tp": 2}),
        (EXPERTS, DoRA(**OPTIONS), {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}),
    ],
    ids=("lora, dropout", "lora, shards of tokens", "dora", "packed", "experts"),
)
def test_what_is_computed_again_is_what_it_was(structure: DecoderConfig, adapt: Any, layout: dict[str, Any]) -> None:
    """Bit for bit; the collectives of rows and of the experts' exchange are not made again."""
    (kept, collectives), (parts, some_again), (layers, all_again) = (
        trained(structure, adapt, mode, **layout) for mode in ("none", "selective", "full")
    )
    assert len(kept) == len(parts) > 10
    assert all(torch.equal(*pair) for pair in zip(kept, parts, strict=True))
    assert all(torch.equal(*pair) for pair in zip(kept, layers, strict=True))
    assert collectives == some_again == all_again == 0 if not layout else collectives <= some_again < all_again


def test_parts_are_computed_again_in_training_alone() -> None:
    model = Decoder(DENSE)
    model.set_activation_checkpointing("selective")
    runs: list[str] = []
    for name in ("linear_qkv", "linear_proj"):
        for layer in model.decoder.layers:
            getattr(layer.self_attention, name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    ids = torch.arange(6)[None]
    model(ids).sum().backward()
    layers = len(model.decoder.layers)
    assert (runs.count("linear_qkv"), runs.count("linear_proj")) == (2 * layers, layers)
    runs.clear()
    with torch.no_grad():
        model(ids)
    model(ids, cache=model.new_cache()).sum().backward()
    assert runs.count("linear_qkv") == 2 * layers


def test_another_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="activation_checkpointing='some': expected none, selective or full"):
        Decoder(DENSE).set_activation_checkpointing("some")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_is_kept_on_the_host_comes_back(mode: Any) -> None:
    """On a CPU the copies are made all the same where they are asked for; weights are not copied."""
    found = []
    for moved in (False, True):
        model = LoRA(**OPTIONS)(Decoder(DENSE, dtype=torch.float64).requires_grad_(False))
        model.set_activation_checkpointing(mode)
        ids = torch.arange(11)[None]
        with watching(memory := MemoryWatch()):
            with kept_on_host(model, device_type="cpu" if moved else "cuda", smallest=1024):
                loss = model(ids).square().sum()
            kept = memory.alive()
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((kept, [loss.detach(), *gradients]))
    (kept, expected), (twice, same) = found
    assert all(torch.equal(*pair) for pair in zip(expected, same, strict=True))
    weights = sum(parameter.nbytes for parameter in Decoder(DENSE, dtype=torch.float64).parameters())
    assert kept != twice < kept + weights
