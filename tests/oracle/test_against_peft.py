"""On the same batch, from the same start, our gradients are those of Hugging Face `peft` on transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from helpers.simulate import simulate, the_same
from helpers.thinned import cross_section
from helpers.tiny_models import random_ids, reference, save_tiny
from torch import Tensor

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.models import hf_module_name, load_pretrained
from meshpeft.parallel import (
    ModelParallelConfig,
    TensorLayout,
    finalize_gradients,
    layout_of_tensor,
    vocab_parallel_cross_entropy,
)
from meshpeft.peft import PEFT, CanonicalLoRA, DoRA, LoRA

PARTS: dict[str, list[str | None]] = {"linear_qkv": ["q", "k", "v"], "linear_fc1": ["gate", "up"]}
OPTIONS: dict[str, Any] = {"dim": 4, "alpha": 8, "lora_B_init_method": "normal"}
METHODS: dict[str, PEFT] = {
    "lora": LoRA(**OPTIONS),
    "canonical_lora": CanonicalLoRA(**OPTIONS),
    "dora": DoRA(**OPTIONS),
}
FACTORS = {"linear_in.weight": "lora_A", "linear_out.weight": "lora_B", "weight_magnitude": "lora_magnitude_vector"}
PREFIX = "base_model.model."
# Float64; sums are taken in another order, over 26 tokens and three layers.
TOLERANCE = 1e-9


def their_gradients(base: Path, adapter: Path, ids: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    model = peft.PeftModel.from_pretrained(reference(base), adapter, is_trainable=True)
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    found = {
        name.removeprefix(PREFIX).replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), found


def our_gradients(
    method: PEFT,
    base: Path,
    layout: dict[str, int],
    sequence_parallel: bool,
    ids: Tensor,
    labels: Tensor,
    to: Path,
) -> tuple[float, dict[str, Tensor]]:
    with simulate(**layout):
        parallel = ModelParallelConfig(layout.get("tp", 1), sequence_parallel=sequence_parallel)
        model = method(load_pretrained(base, torch.float64, parallel))
        export_peft_adapter(model, to)
        loss = vocab_parallel_cross_entropy(model(ids), labels).sum() / labels.numel()
        # Every data-parallel rank has the whole batch here: the sum over them counts it once for each.
        (loss / layout.get("dp", 1)).backward()
        finalize_gradients(model)
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensor_layout = layout_of_tensor(parameter)
                assert isinstance(tensor_layout, TensorLayout)
                found[name] = the_same(tensor_layout.gather(parameter.grad))
        return the_same(loss).item(), found


# Family, layout, sequence parallel.
WHERE: list[tuple[str, dict[str, int], bool]] = [
    ("llama", {}, False),
    ("llama", {"tp": 2}, True),
    ("qwen3", {"tp": 4}, False),
    ("qwen3", {"tp": 2, "dp": 2}, False),
]


@cross_section(2, method=METHODS, where=WHERE)
def test_gradients_are_those_of_peft(method: str, where: tuple[str, dict[str, int], bool], tmp_path: Path) -> None:
    family, layout, sequence_parallel = where
    base = save_tiny(family, tmp_path / "base")
    ids, labels = random_ids(seed=1), random_ids(seed=2)
    adapter = tmp_path / "adapter"
    loss, ours = our_gradients(METHODS[method], base, layout, sequence_parallel, ids, labels, adapter)
    their_loss, theirs = their_gradients(base, adapter, ids, labels)
    assert abs(loss - their_loss) < TOLERANCE
    # A layer of ours that is fused is several of theirs: the rows of our gradients of B and of the magnitude are
    # theirs, and where their layers share our A, the sum of their gradients of A is ours.
    used = set()
    for name, gradient in ours.items():
        module, _, parameter = name.partition(".adapter.")
        part, _, rest = parameter.removeprefix("adapter_").partition(".")
        own_adapter = parameter.startswith("adapter_")
        parts = [part] if own_adapter else PARTS.get(module.rpartition(".")[2], [None])
        factor = FACTORS[rest if own_adapter else parameter]
        keys = [f"{hf_module_name(module, part)}.{factor}" for part in parts]
        pieces = [theirs[key] for key in keys]
        expected = torch.stack(pieces).sum(0) if factor == "lora_A" else torch.cat(pieces)
        assert expected.abs().max() > 0
        assert (gradient - expected).abs().max() <= TOLERANCE * expected.abs().max(), name
        used.update(keys)
    assert used == set(theirs)
