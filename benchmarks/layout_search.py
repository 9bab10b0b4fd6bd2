"""What `meshpeft plan --devices` finds for models of 70, 235 and 671 billion parameters, and how long it takes.

Each search is a process of its own, of a directory that holds the model's configuration and nothing else.

    python benchmarks/layout_search.py [--only llama|qwen|deepseek] [--devices 8 64]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
HEADS_OF_128: dict[str, Any] = {"head_dim": 128}  # not among its own fields
# As published; what is not here is transformers' default.
MODELS: dict[str, tuple[str, PretrainedConfig]] = {
    "llama": (
        "Llama-3.1-70B",
        LlamaConfig(
            vocab_size=128256,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters=ROPE,
            architectures=["LlamaForCausalLM"],
        ),
    ),
    "qwen": (
        "Qwen3-235B-A22B",
        Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            architectures=["Qwen3MoeForCausalLM"],
            **HEADS_OF_128,
        ),
    ),
    "deepseek": (
        "DeepSeek-V3",
        DeepseekV3Config(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            first_k_dense_replace=3,
            num_attention_heads=128,
            num_key_value_heads=128,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            max_position_embeddings=163840,
            architectures=["DeepseekV3ForCausalLM"],
        ),
    ),
}
OPTIONS = "--memory 80GB --dtype bfloat16 --batch-size 64 --micro-batch-size 1 --seq-length 4096"
COMMAND = "import sys; from meshpeft.cli.main import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(MODELS))
    parser.add_argument("--devices", type=int, nargs="+", default=(8, 64))
    given = parser.parse_args()
    environment = {**os.environ, "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as directory:
        for key, (name, config) in MODELS.items():
            if given.only not in (None, key):
                continue
            (Path(directory) / name).mkdir()
            (Path(directory) / name / "config.json").write_text(json.dumps(config.to_diff_dict(), default=str))
            for devices in given.devices:
                words = f"plan --model {name} --devices {devices} {OPTIONS}"
                start = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", COMMAND, *words.split()],
                    cwd=directory,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                seconds = time.perf_counter() - start
                print(f"$ meshpeft {words}\n{done.stdout if done.returncode == 0 else done.stderr}", flush=True)
                print(f"({seconds:.0f} seconds)\n", flush=True)


if __name__ == "__main__":
    main()
