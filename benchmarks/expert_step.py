"""One forward and backward of per-expert LoRA over the same of the frozen mixture of experts, against PEFT.

Model: a Qwen3-MoE of 2 layers, hidden 512, experts of width 256, top-4, 512 tokens, rank 8, float32, with 8, 32 and
128 experts. Only the experts carry adapters: `linear_fc1` and `linear_fc2` here, PEFT's `target_parameters` there.
The embedding's output requires a gradient in every candidate, so that the frozen base too sends gradients all the
way down.

    python benchmarks/expert_step.py [--repeats 30] [--experts 8 32 128]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable

import peft
import torch
from adapter_step import step_of
from timing import measure, ratio, table
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from meshpeft.models import Decoder, load_pretrained
from meshpeft.peft import LoRA

RANK, TOKENS = 8, 512
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(experts: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )


def candidates(experts: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    reference = Qwen3MoeForCausalLM(config(experts)).requires_grad_(False)
    ids = torch.randint(reference.config.vocab_size, (1, TOKENS))

    def theirs(model: nn.Module) -> Callable[[], None]:
        embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        return step_of(model, embedding, lambda model: model(ids, use_cache=False).logits)

    options = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=PARAMETERS)
    found = {
        "transformers, frozen": theirs(reference),
        "PEFT target_parameters": theirs(peft.get_peft_model(copy.deepcopy(reference), options)),
    }

    def ours(adapt: LoRA | None) -> Callable[[], None]:
        model: Decoder = load_pretrained(directory, dtype=torch.float32).requires_grad_(False)
        if adapt is not None:
            adapt(model)
        return step_of(model, model.embedding, lambda model: model(ids))

    targets = ["*.experts.linear_fc1", "*.experts.linear_fc2"]
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        found["MeshPEFT, frozen"] = ours(None)
        found["MeshPEFT LoRA, one per expert"] = ours(LoRA(targets, dim=RANK, alpha=RANK, share_expert_adapters=False))
        found["MeshPEFT LoRA, one for all"] = ours(LoRA(targets, dim=RANK, alpha=RANK))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    arguments = parser.parse_args()
    rows = []
    for experts in arguments.experts:
        seconds = measure(candidates(experts), arguments.repeats)
        for name in seconds:
            base = "MeshPEFT, frozen" if name.startswith("MeshPEFT") else "transformers, frozen"
            rows.append(
                (
                    str(experts),
                    name,
                    str(ratio(seconds, name, base)),
                    str(ratio(seconds, name, "transformers, frozen")),
                )
            )
    header = ("experts", "step", "over its own frozen base", "over transformers' frozen base")
    print(table("A step with adapters on the experts over the frozen base's", rows, header))


if __name__ == "__main__":
    main()
