"""Two steps on one long document, sharded over two processes: peak memory as measured, beside what `plan` counts.

The document is made by joining the embedded data's: 32,768 tokens by default, far beyond the positions that the
embedded model was trained for, so the run is for its numbers only. Measured is, for each process, by how much its
resident size grew at most over the value just before the model is made (Linux). The allocator takes blocks of a MiB and
more from the system, and gives them back as they are freed (`MALLOC_MMAP_THRESHOLD_`): by itself it keeps freed blocks
of up to 32 MiB, which come to some 200 MiB here.

    python benchmarks/long_context.py [--tokens 32768] [--checkpointing none|selective|full]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import table

from meshpeft.cli.main import main as meshpeft
from meshpeft.data.embedded import embedded_model_dir, embedded_records
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.training.base import BaseModel
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.finetune import finetune
from meshpeft.training.launch import launch
from meshpeft.training.loop import TrainingLoop

MIB = 2**20


def document(tokens: int) -> str:
    """Texts of the embedded data, one after the other, as long as fits in `tokens` tokens, its end token included."""
    tokenizer = load_tokenizer(embedded_model_dir())
    texts = ["\n".join(record.values()) + "\n" for record in embedded_records()[0]]
    joined = "".join(itertools.islice(itertools.cycle(texts), tokens // 16))
    offsets = tokenizer(joined, return_offsets_mapping=True)["offset_mapping"]
    return joined[: offsets[tokens - 2][0]]


def resident(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(config: FinetuneConfig, results: Path) -> None:
    """Fine-tune as a worker does, and write by how much this process grew until the last step was done."""
    load, run = BaseModel.load, TrainingLoop.run
    before = 0

    def load_and_begin(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        nonlocal before
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        return load(self, *arguments, **options)

    def run_and_end(self: TrainingLoop, *arguments: Any) -> None:
        run(self, *arguments)
        (results / str(os.getpid())).write_text(json.dumps(resident("VmHWM") - before))

    with mock.patch.object(BaseModel, "load", load_and_begin), mock.patch.object(TrainingLoop, "run", run_and_end):
        finetune(config)


def planned(options: list[str]) -> float:
    """Bytes that `meshpeft plan` says one process holds together."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        meshpeft(["plan", *options])
    number, unit = re.findall(r"together +([\d.]+) (\w+)", printed.getvalue())[-1]
    return float(number) * {"KiB": 2**10, "MiB": MIB, "GiB": 2**30}[unit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    arguments = parser.parse_args()
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = directory / "document.jsonl"
        data.write_text(2 * (json.dumps({"text": document(arguments.tokens)}) + "\n"))  # one of them is held out
        config = FinetuneConfig(
            data=(data,),
            held_out=0.5,
            cp=2,
            seq_length=arguments.tokens,
            batch_size=1,
            micro_batch_size=1,
            steps=2,
            eval_every=0,
            activation_checkpointing=arguments.checkpointing,
            output_dir=directory / "run",
        ).resolved()
        results = directory / "results"
        results.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            launch(measured, config, results, workers=2)
        grown = [json.loads(path.read_text()) for path in results.iterdir()]
        layout = f"--cp 2 --seq-length {arguments.tokens} --batch-size 1 --micro-batch-size 1"
        counted = planned([*layout.split(), "--activation-checkpointing", arguments.checkpointing])
    rows = [
        (f"{number}", f"{found / MIB:,.0f} MiB", f"{counted / MIB:,.0f} MiB", f"{found / counted:.3f}")
        for number, found in enumerate(sorted(grown))
    ]
    header = ("process", "grown by at most", "plan", "measured / plan")
    title = (
        f"Two steps on one document of {arguments.tokens:,} tokens, cp=2, activations kept: {arguments.checkpointing}"
    )
    print(table(title, rows, header))


if __name__ == "__main__":
    main()
