"""Adapters of experts that are transformers' own code, as files: peft's form and the per-expert form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.peft_files import WEIGHTS, with_peft
from helpers.tiny_models import EXPERT_FAMILIES, ONE_OF_EACH_KIND, random_ids, reference, save_tiny
from helpers.transformers_float64 import in_float64
from safetensors.torch import load_file
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_peft_adapter, merge_adapter
from meshpeft.hub.tensor_files import Declared, TensorFileWriter
from meshpeft.models import load_transformers
from meshpeft.parallel import GroupedColumnParallelLinear, init_parallelism
from meshpeft.peft import DoRA, LoRA
from meshpeft.training.adapters import default_layers

Tiny = Callable[[str], Path]
# Both models compute in float64; sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-11}
IDS = random_ids()
FAMILIES = [
    name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in EXPERT_FAMILIES
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cache(lambda family: save_tiny(family, tmp_path_factory.mktemp(family)))


def base(directory: Path) -> Any:
    init_parallelism()
    return in_float64(load_transformers(directory, torch.float64))


def adapted(directory: Path, method: type[LoRA] = LoRA, **options: Any) -> Any:
    model = base(directory)
    targets = default_layers(model).adapted or []
    return method(target_modules=targets, dim=4, alpha=8, lora_B_init_method="normal", **options)(model).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Any = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("share", (True, False), ids=["shared", "one each"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_export_and_gives_our_logits(family: str, share: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny(family), share_expert_adapters=share)
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tiny(family)))
    expected = logits(model)
    assert (expected - logits(reference(tiny(family)))).abs().max() > 0.01
    torch.testing.assert_close(logits(with_peft(tiny(family), tmp_path / "adapter")), expected, **CLOSE)
    again = load_peft_adapter(base(tiny(family)), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, **CLOSE)


@pytest.mark.parametrize("method", [LoRA, DoRA], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_per_expert_form_goes_there_and_back(family: str, method: type[LoRA], tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny(family), method, share_expert_adapters=False)
    export_peft_adapter(model, tmp_path / "adapter", format="peft-per-expert")
    expected = logits(model)
    torch.testing.assert_close(logits(load_peft_adapter(base(tiny(family)), tmp_path / "adapter")), expected, **CLOSE)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v3", "model.layers.1.mlp.experts.7.gate_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.7.w3"),
        # Stacked in its files, too.
        ("gpt_oss", "model.layers.1.mlp.experts.3.up_proj"),
        ("nemotron_h", "backbone.layers.1.mixer.experts.3.up_proj"),
        ("nemotron_h", "backbone.layers.0.mixer.q_proj"),
    ],
)
def test_the_per_expert_form_has_the_names_of_the_files(family: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    export_peft_adapter(adapted(tiny(family)), tmp_path, format="peft-per-expert")
    assert f"base_model.model.{name}.lora_A.weight" in load_file(tmp_path / WEIGHTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_transformers(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny(family), share_expert_adapters=False)
    expected = logits(model)
    merge_adapter(model, tmp_path / "merged")
    torch.testing.assert_close(logits(reference(tmp_path / "merged")), expected, **CLOSE)
    before, after = load_file(tiny(family) / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}


class Blocks(nn.Module):
    """Grouped experts in a model that is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        init_parallelism()
        self.experts = nn.Module()
        self.experts.fc1 = GroupedColumnParallelLinear(3, 8, 4)


def test_grouped_experts_of_another_model_go_there_and_back(tmp_path: Path) -> None:
    model = LoRA(target_modules=["fc1"], dim=2, lora_B_init_method="normal", share_expert_adapters=False)(Blocks())
    export_peft_adapter(model, tmp_path)
    again = load_peft_adapter(Blocks(), tmp_path)
    for name, tensor in model.state_dict().items():
        if "adapter" in name:
            assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_file_holds_no_two_tensors_of_one_name(tmp_path: Path) -> None:
    twice = [Declared("a", torch.float32, (1,)), Declared("b", torch.float32, (1,)), Declared("a", torch.float32, (2,))]
    with pytest.raises(CheckpointError, match=r"file\.safetensors would hold a twice"):
        TensorFileWriter(tmp_path / "file.safetensors", twice)
    assert not list(tmp_path.iterdir())
