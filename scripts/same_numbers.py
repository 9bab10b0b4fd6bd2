"""Checksums of the adapters and losses of a matrix of short runs: a change that should change no number changes none.

    python scripts/same_numbers.py --write before.json       # at the commit before the change
    python scripts/same_numbers.py --compare before.json     # at the commit after it

The runs are command lines of `meshpeft finetune` on the embedded model and on a tiny random mixture of experts, each a
few steps long. They run with the `meshpeft` that Python imports: set PYTHONPATH to compare another checkout. Numbers
are those of one machine and one version of torch; do not compare files of two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

EXPERTS = "EXPERTS"  # stands for the directory of the tiny model
RUNS = {
    "make finetune": "--tp 2",
    "lora": "--steps 6",
    "lora, tp 2, sequence parallel, dropout": "--steps 6 --tp 2 --sequence-parallel --dropout 0.1",
    "lora, dp 2, token shards": "--steps 6 --dp 2 --keep-token-shards",
    "canonical_lora, tp 2": "--steps 6 --tp 2 --method canonical_lora --rslora",
    "dora, tp 2, bf16": "--steps 6 --tp 2 --method dora --lora-dtype bf16",
    "lora on nf4, tp 2": "--steps 6 --tp 2 --quantize nf4",
    "lora, transformers, tp 2": "--steps 6 --tp 2 --engine transformers",
    "lora on experts, ep 2": f"--steps 6 --model {EXPERTS} --tp 1 --ep 2 --dp 2",
    "lora on experts, tp 2, etp 2, dropout": f"--steps 6 --model {EXPERTS} --tp 2 --dropout 0.1",
}


def save_experts(directory: Path) -> None:
    """A random Qwen3-MoE model of two layers, with the embedded model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    import meshpeft
    from meshpeft.training.streams import plain_warnings

    disable_progress_bar()
    embedded = next(Path(meshpeft.__file__).parent.glob("*/embedded_base"))
    config = json.loads((embedded / "config.json").read_text())
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    made = AutoConfig.for_model("qwen3_moe", vocab_size=config["vocab_size"], num_experts_per_tok=2, **sizes, **experts)
    with plain_warnings("same_numbers"):  # the libraries that transformers looks for speak to their developers
        AutoModelForCausalLM.from_config(made).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, directory)


def run(options: str, output: Path, experts: Path) -> dict[str, str]:
    """Run one command line, and return the checksum of its adapter and of its losses."""
    words = [str(experts) if word == EXPERTS else word for word in options.split()]
    command = [sys.executable, "-m", "meshpeft.cli.main", "finetune", "--output-dir", str(output), *words]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        return {"failed": (ended.stderr or ended.stdout)[-500:]}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [[row.get("step"), row.get("loss"), row.get("held_out_loss"), row.get("grad_norm")] for row in rows]
    adapter = (output / "adapter_model.safetensors").read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in (("adapter", adapter), ("losses", _text(losses)))}


def _text(values: object) -> bytes:
    return json.dumps(values).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--write", type=Path)
    wanted.add_argument("--compare", type=Path)
    given = parser.parse_args()
    before = json.loads(given.compare.read_text()) if given.compare else {}
    found, differing = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        experts = Path(folder) / "experts"
        save_experts(experts)
        for number, (name, options) in enumerate(RUNS.items()):
            found[name] = run(options, Path(folder) / str(number), experts)
            same = "failed" not in found[name] and found[name] == before.get(name)
            differing += not same
            verdict = "same" if same else "DIFFERENT" if before else ""
            print(
                f"{name:45} {found[name].get('adapter', found[name].get('failed', ''))[:16]:18} {verdict}", flush=True
            )
    if given.write:
        given.write.write_text(json.dumps(found, indent=1) + "\n")
        return int(any("failed" in each for each in found.values()))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
