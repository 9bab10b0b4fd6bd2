"""One forward and backward of adapters over the same of the frozen base, against Hugging Face PEFT, one process.

Model: 2 layers, hidden 1024, intermediate 2816, 512 tokens, rank 16, float32. The embedding's output requires a
gradient in every candidate, so that the frozen base too sends gradients all the way down.

    python benchmarks/adapter_step.py [--repeats 40]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable

import peft
import torch
from timing import measure, ratio, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from meshpeft.models import load_pretrained
from meshpeft.peft import LoRA

RANK, TOKENS = 16, 512
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=1024,
)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def step_of(
    model: nn.Module, embedding: nn.Module, logits_of: Callable[[nn.Module], torch.Tensor]
) -> Callable[[], None]:
    """Forward, mean of squares, backward; gradients are dropped, as an optimizer's zero_grad would."""
    embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())

    def run() -> None:
        logits_of(model).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def candidates() -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    reference = LlamaForCausalLM(CONFIG).requires_grad_(False)
    ids = torch.randint(CONFIG.vocab_size, (1, TOKENS))
    found: dict[str, Callable[[], None]] = {}

    def theirs(model: nn.Module) -> Callable[[], None]:
        embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        return step_of(model, embedding, lambda model: model(ids, use_cache=False).logits)

    found["transformers, frozen"] = theirs(copy.deepcopy(reference))
    for name, dora in (("LoRA", False), ("DoRA", True)):
        options = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, use_dora=dora)
        found[f"PEFT {name}"] = theirs(peft.get_peft_model(copy.deepcopy(reference), options))

    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        for name, method in methods().items():
            model = load_pretrained(directory, dtype=torch.float32).requires_grad_(False)
            if method is not None:
                method(model)
            found[name] = step_of(model, model.embedding, lambda model: model(ids))
    return found


def methods() -> dict[str, Callable[[nn.Module], nn.Module] | None]:
    found: dict[str, Callable[[nn.Module], nn.Module] | None] = {
        "MeshPEFT, frozen": None,
        "MeshPEFT LoRA": LoRA(dim=RANK, alpha=RANK),
    }
    try:
        from meshpeft.peft import CanonicalLoRA, DoRA
    except ImportError:
        return found
    return found | {
        "MeshPEFT Canonical LoRA": CanonicalLoRA(dim=RANK, alpha=RANK),
        "MeshPEFT DoRA": DoRA(dim=RANK, alpha=RANK),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    seconds = measure(candidates(), arguments.repeats)
    rows = []
    for name in seconds:
        base = "MeshPEFT, frozen" if name.startswith("MeshPEFT") else "transformers, frozen"
        rows.append((name, str(ratio(seconds, name, base)), str(ratio(seconds, name, "transformers, frozen"))))
    print(
        table(
            "A step with adapters over the frozen base's",
            rows,
            ("step", "over its own frozen base", "over transformers' frozen base"),
        )
    )
    if "MeshPEFT Canonical LoRA" in seconds:
        print(f"Canonical over performant LoRA: {ratio(seconds, 'MeshPEFT Canonical LoRA', 'MeshPEFT LoRA')}")


if __name__ == "__main__":
    main()
