"""Importing is cheap: what takes long is imported where it is used."""

from __future__ import annotations

import json
import subprocess
import sys

# Packages that a part of this one uses, and that take long to import or need not be installed.
COSTLY = (
    "bitsandbytes",
    "matplotlib",
    "megatron",
    "modelopt",
    "pyarrow",
    "regex",
    "rich",
    "safetensors",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torchao",
    "transformers",
    "transformer_engine",
    "tyro",
    "yaml",
)


def test_adapters_need_torch_and_the_command_line_does_not_before_it_runs() -> None:
    """`import meshpeft.peft` adds to `import torch` what spmd_types does (DTensor, above all), and little more."""
    program = f"""
import json, sys
import meshpeft.cli.main
early = [name for name in ("torch", *{COSTLY}) if name in sys.modules]
import meshpeft.peft
print(json.dumps([early, [name for name in {COSTLY} if name in sys.modules]]))
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == [[], []]
