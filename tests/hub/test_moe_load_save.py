"""Experts in Hugging Face directories: one by one or stacked, each rank its own, names both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.simulate import simulate
from helpers.tiny_models import MOE_FAMILIES, random_ids, reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from meshpeft.hub.tensor_files import TensorFiles
from meshpeft.models import (
    ModelError,
    hf_module_name,
    hf_tensor_names,
    load_pretrained,
    our_module_name,
    save_pretrained,
)
from meshpeft.parallel import ModelParallelConfig, layout_of_tensor


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def parallel(tp: int = 1, ep: int = 1, etp: int = 1) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )


@pytest.fixture(scope="module")
def stacked(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model of a family with stacked experts, as transformers has it in memory."""

    def directory(family: str) -> Path:
        made = tmp_path_factory.mktemp(f"{family}-stacked")
        AutoModelForCausalLM.from_pretrained(tiny(family)).save_pretrained(made, save_original_format=False)
        assert any(name.endswith("experts.gate_up_proj") for name in tensors(made))
        return made

    return directory


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_both_forms_load_at_every_layout_and_save_as_the_hubs(
    tiny: Callable[[str], Path], stacked: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    wanted = tensors(tiny(family))
    assert any(".experts.7." in name for name in wanted)  # transformers too saves them one by one
    forms = (tiny(family), stacked(family))
    for number, (source, sizes) in enumerate(
        (source, sizes) for source in forms for sizes in ({}, {"tp": 2, "dp": 2, "ep": 2, "etp": 2})
    ):
        target = tmp_path / str(number)
        with simulate(**sizes):
            decoder = load_pretrained(
                source, parallel=parallel(**{axis: size for axis, size in sizes.items() if axis != "dp"})
            )
            save_pretrained(decoder, target, max_shard_bytes=40_000)
        assert equal(tensors(target), wanted)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (tiny(family), target)]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(target)
    again.config._experts_implementation = "eager"
    ids = random_ids()
    assert torch.equal(again(ids).logits, reference(tiny(family), torch.float32)(ids).logits)


def test_mixtral_loads_with_the_names_of_transformers_modules(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("mixtral")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in tensors(source).items()}
    save_file(renamed, tmp_path / "model.safetensors")
    ids = random_ids()
    assert torch.equal(load_pretrained(tmp_path)(ids), load_pretrained(source)(ids))


@pytest.mark.parametrize("form", ("hub", "stacked"))
def test_each_rank_reads_only_its_experts(
    tiny: Callable[[str], Path], stacked: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    read: list[int] = []
    original = TensorFiles.read_into

    def counted(self: TensorFiles, *args: Any) -> Tensor:
        tensor = original(self, *args)
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(TensorFiles, "read_into", counted)
    source = tiny("mixtral") if form == "hub" else stacked("mixtral")
    with simulate(tp=2, dp=2, ep=2, etp=2):
        decoder = load_pretrained(source, parallel=parallel(2, 2, 2))
        held = sum(parameter.numel() for parameter in decoder.parameters())
        experts = decoder.decoder.layers[0].mlp.experts
        assert experts.linear_fc1.weight.shape == (4, 48, 32)
    assert sum(read) == 4 * held


def test_missing_and_misshapen_experts_are_clear_errors(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("qwen3_moe")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    held = tensors(source)
    lost = held.pop(name)
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks {name}, which a qwen3_moe model"):
        load_pretrained(tmp_path)
    save_file(held | {name: lost[1:].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} in .* has shape \(19, 32\); its config says \(20, 32\)"):
        load_pretrained(tmp_path)
    save_file(held | {name: lost, name.replace(".3.", ".8."): lost.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds the weights of 9 experts a layer; its config says 8"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_names_map_one_to_one(tiny: Callable[[str], Path], family: str) -> None:
    names = []
    for name, parameter in load_pretrained(tiny(family)).named_parameters():
        layout = layout_of_tensor(parameter)
        assert layout is not None
        module = name.rpartition(".")[0]
        wanted = [
            (module, piece.part, expert)
            for piece in layout.pieces()
            for expert in (range(layout.global_shape[0]) if layout.expert else (None,))
        ]
        stored = hf_tensor_names(name, layout, family)
        assert [our_module_name(stored_name.rpartition(".")[0]) for stored_name in stored] == wanted
        for stored_name, (_, part, expert) in zip(stored, wanted, strict=True):
            assert f"{hf_module_name(module, part, expert=expert, model_type=family)}.weight" == stored_name or (
                stored_name.endswith(".bias")
            )
        names += stored
    assert sorted(names) == sorted(tensors(tiny(family)))


def test_experts_have_two_names() -> None:
    fc1, fc2 = ("decoder.layers.3.mlp.experts.linear_fc1", "decoder.layers.3.mlp.experts.linear_fc2")
    assert hf_module_name(fc1) == "model.layers.3.mlp.experts.gate_up_proj"
    assert hf_module_name(fc1, "up", expert=11) == "model.layers.3.mlp.experts.11.up_proj"
    assert hf_module_name(fc2, expert=0, model_type="mixtral") == "model.layers.3.block_sparse_moe.experts.0.w2"
    assert our_module_name("model.layers.3.mlp.experts.gate_up_proj") == (fc1, None, None)
    for name in ("model.layers.3.block_sparse_moe.experts.5.w1", "model.layers.3.mlp.experts.5.gate_proj"):
        assert our_module_name(name) == (fc1, "gate", 5)
    assert hf_module_name("decoder.layers.0.mlp.router", model_type="mixtral") == "model.layers.0.block_sparse_moe.gate"
    with pytest.raises(ModelError, match="linear_fc1 \\(gate\\) has no name"):
        hf_module_name(fc1, "gate")
    with pytest.raises(ModelError, match=r"expert 2 of decoder.layers.0.mlp.linear_fc1 \(up\) has no name"):
        hf_module_name("decoder.layers.0.mlp.linear_fc1", "up", expert=2)
    with pytest.raises(ModelError, match="the decoder has no module"):
        our_module_name("model.layers.3.mlp.experts.5.w4")
