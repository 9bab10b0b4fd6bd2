"""Tokens a second of a whole training step, against transformers' Trainer with Hugging Face PEFT, one process.

Model and data are the embedded ones; LoRA of rank 16 on every linear layer, AdamW, clipping at 1, 8 rows a step,
float32. A step is everything between two batches: making the batch, forward, backward, clipping, update. Both take
turns, step by step, inside one run of the Trainer.

* equal batches: the same rows of 512 tokens, all of them filled;
* short documents: the same functions and docstrings one by one, which the Trainer pads to the longest of a batch and
  MeshPEFT packs into rows of 512.

    python benchmarks/finetune_throughput.py [--steps 30]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from timing import Ratio, quartiles, table
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from meshpeft.data.batches import IGNORED_LABEL, PackedRows, RowSampler
from meshpeft.data.embedded import embedded_model_dir
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.models import load_pretrained
from meshpeft.peft import LoRA
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.inputs import load_inputs
from meshpeft.training.step import TrainStep, adamw

RANK, ROWS, WARMUP = 16, 8, 2
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def our_step(rows: PackedRows) -> Callable[[], int]:
    """Takes the next step and says how many tokens it had."""
    model = LoRA(dim=RANK, alpha=2 * RANK)(load_pretrained(embedded_model_dir(), torch.float32))
    step = TrainStep(model, adamw(model, lr=1e-4), clip=1.0)
    sampler = RowSampler(rows=rows, batch_size=ROWS, micro_batch_size=ROWS, dp_rank=0, dp_size=1, seed=0)
    numbers = itertools.count()

    def run() -> int:
        batch = sampler.micro_batches(next(numbers))
        float(step(batch, batch.global_target_tokens).loss)
        return batch.global_tokens

    return run


class TakeTurns(TrainerCallback):
    """Runs our step before each of the Trainer's, and times both."""

    def __init__(self, ours: Callable[[], int]) -> None:
        self.ours = ours
        self.rates: list[tuple[float, float]] = []
        self._tokens, self._start = 0, time.perf_counter()

    def count(self, module: Any, args: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Before each of the Trainer's forward passes: its tokens, without padding."""
        mask = inputs.get("attention_mask")
        self._tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer fetches the next batch after this, and that belongs to its next step."""
        begun = time.perf_counter()
        theirs = self._tokens / (begun - self._start)
        count = self.ours()
        self._start = time.perf_counter()
        self.rates.append((count / (self._start - begun), theirs))


def examples(rows: PackedRows) -> list[dict[str, list[int]]]:
    """Each row as the Trainer takes it: labels in place, the model shifts them."""
    found = []
    for row in range(len(rows)):
        filled = int(rows.row_tokens[row])
        batch = rows.gather(np.array([row]), filled)
        labels = [IGNORED_LABEL, *batch.labels[0, :-1].tolist()]
        found.append({"input_ids": batch.input_ids[0].tolist(), "labels": labels})
    return found


def compare(ours: PackedRows, theirs: list[dict[str, list[int]]], steps: int) -> Ratio:
    """Tokens a second of ours over theirs, step by step."""
    turns = TakeTurns(our_step(ours))

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in batch)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([example[name] + [value] * (width - len(example[name])) for example in batch])

        mask = [[1] * len(example["input_ids"]) + [0] * (width - len(example["input_ids"])) for example in batch]
        whole = {} if all(map(all, mask)) else {"attention_mask": torch.tensor(mask)}
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED_LABEL), **whole}

    base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES))
    model.register_forward_pre_hook(turns.count, with_kwargs=True)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=steps + WARMUP,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=theirs, data_collator=collate, callbacks=[turns]).train()
    return quartiles([one / other for one, other in turns.rates[WARMUP:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    config = FinetuneConfig()
    tokenizer = load_tokenizer(embedded_model_dir())
    packed = load_inputs(config, tokenizer).train
    alone = load_inputs(FinetuneConfig(fused_parts=False), tokenizer).train
    full = [example for example in examples(packed) if len(example["input_ids"]) == packed.seq_length]
    rows = [
        ("equal batches, 8 rows of 512 tokens", str(compare(packed, full, arguments.steps))),
        ("short documents, packed against padded", str(compare(packed, examples(alone), arguments.steps))),
    ]
    print(table("Tokens a second over those of Trainer and PEFT", rows, ("data", "MeshPEFT / Trainer + PEFT")))


if __name__ == "__main__":
    main()
