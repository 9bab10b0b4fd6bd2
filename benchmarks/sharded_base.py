"""A base sharded over two processes beside a whole one, and what `plan` says of layouts beside what they take.

Two gloo processes of one thread each train LoRA of rank 16 on a Llama of eight layers, hidden 512. All candidates are
in the same two processes and take their steps in turn, so that a noisy machine slows all alike.

* `sharded`: the time of a step over that of a whole base, float32 and NF4, and what a process holds of the base.
* `ranking`: the time of a step at layouts of exactly two processes, beside `plan`'s estimate for them. Rows
  are short, so that what is sent shows; the CPU's rates were chosen for rows of 128 and 512 tokens.
* `memory`: for each of these layouts, in processes of its own, by how much a process grew at most over the value just
  before its model is made, beside `plan`'s figure. A step of a tiny model runs first, since the pages of the libraries'
  code that a process uses for the first time, some 40 MiB, count as its memory. The allocator takes blocks of 64 KiB
  and more from the system, and gives them back as they are freed (`MALLOC_MMAP_THRESHOLD_`): smaller tensors leave
  holes.

    python benchmarks/sharded_base.py [--repeats 15] [--tokens 64] [--only sharded|ranking|memory]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from long_context import resident
from timing import measure, ratio, table

from meshpeft.data.batches import MicroBatch
from meshpeft.data.context import ContextShard
from meshpeft.data.embedded import embedded_model_dir
from meshpeft.hub.save import save_pretrained
from meshpeft.models import Decoder, DecoderConfig
from meshpeft.models.base_blocks import base_stores, shard_base
from meshpeft.parallel import ModelParallelConfig, init_parallelism, mesh, parallel_group_info
from meshpeft.parallel.sharded_base import is_stored
from meshpeft.peft import LoRA
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.base import BaseModel, find_base
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.finetune import finetune
from meshpeft.training.launch import launch
from meshpeft.training.loop import TrainingLoop
from meshpeft.training.step import TrainStep, adamw
from meshpeft.verify import Plan, plan
from meshpeft.verify.run import plan_of
from meshpeft.verify.work import MACHINES

CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
)
TINY = replace(CONFIG, vocab_size=512, hidden_size=128, intermediate_size=128, num_layers=1, head_dim=16)
TOKENS, ROWS, RANK = 512, 4, 16
MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """A layout of two processes, and how the base is stored."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    sharded: bool = False
    packed: bool = False
    seq_length: int = TOKENS

    @property
    def dp(self) -> int:
        return 2 // (self.tp * self.cp)

    def adapt(self, model: Any) -> Any:
        return LoRA(dim=RANK)(model)

    @property
    def quantizer(self) -> BaseQuantizer | None:
        return BaseQuantizer("nf4") if self.packed else None

    def planned(self) -> Plan:
        return plan(
            CONFIG,
            self.adapt,
            tp=self.tp,
            cp=self.cp,
            dp=self.dp,
            sequence_parallel=self.sequence_parallel,
            activation_checkpointing=self.recompute,
            shard_base="all" if self.sharded else "none",
            quantizer=self.quantizer,
            micro_batch_size=ROWS // self.dp,
            seq_length=self.seq_length,
            dtype=torch.float32,
            with_added=False,
        )

    def step(self, config: DecoderConfig = CONFIG) -> tuple[Callable[[], None], int]:
        """Make the model, and return its step and the bytes that this process holds of its base."""
        parallel = ModelParallelConfig(self.tp, context_parallel_size=self.cp, sequence_parallel=self.sequence_parallel)
        model = Decoder(config, parallel, dtype=torch.float32).requires_grad_(False)
        model.set_activation_checkpointing(self.recompute)
        if self.quantizer is not None:
            for name, layer in self.quantizer.layers_of(model).items():
                self.quantizer.pack_(layer, name)
        shard_base(model, "all" if self.sharded else "none")
        stores = base_stores(model)
        held = sum(store.nbytes + store.buffer_bytes for store in stores)
        held += sum(parameter.nbytes for parameter in model.parameters() if not is_stored(parameter))
        self.adapt(model)
        train = TrainStep(model, adamw(model, lr=1e-4), clip=1.0)
        info = parallel_group_info()
        rows = ROWS // self.dp
        places, spans = ContextShard(info.cp.rank, self.cp, self.tp).of_rows(
            [[self.seq_length]] * rows, self.seq_length
        )
        generator = torch.Generator().manual_seed(info.dp.rank)
        ids = torch.randint(0, config.vocab_size, (rows, self.seq_length), generator=generator)
        own = torch.from_numpy(places).long()
        batch = MicroBatch.of((ids.gather(1, own), ids.gather(1, own), own, torch.zeros_like(own)), spans)

        def run() -> None:
            dist.barrier()
            train([batch], ROWS * self.seq_length)

        return run, held


BASES = {
    "float32, whole": Candidate(),
    "float32, sharded": Candidate(sharded=True),
    "NF4, whole": Candidate(packed=True),
    "NF4, sharded": Candidate(packed=True, sharded=True),
}
# What memory is measured of.
LAYOUTS = {
    "dp=2": Candidate(),
    "dp=2, recomputed": Candidate(recompute=True),
    "dp=2, NF4": Candidate(packed=True),
    "dp=2, NF4, sharded, recomputed": Candidate(packed=True, sharded=True, recompute=True),
    "tp=2, sequence parallel": Candidate(tp=2, sequence_parallel=True),
    "cp=2, recomputed, sharded": Candidate(cp=2, recompute=True, sharded=True),
}
# Steps at these are timed beside those.
MORE_LAYOUTS = {
    "dp=2, sharded": Candidate(sharded=True),
    "dp=2, sharded, recomputed": Candidate(sharded=True, recompute=True),
    "tp=2, sequence parallel, recomputed": Candidate(tp=2, sequence_parallel=True, recompute=True),
    "tp=2, sequence parallel, NF4, recomputed": Candidate(tp=2, sequence_parallel=True, packed=True, recompute=True),
    "cp=2": Candidate(cp=2),
    "cp=2, NF4, sharded, recomputed": Candidate(cp=2, packed=True, sharded=True, recompute=True),
}


def begin(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)


def timed(rank: int, store: str, candidates: dict[str, Candidate], repeats: int, results: str) -> None:
    begin(rank, store)
    steps, held = {}, {}
    for name, candidate in candidates.items():
        init_parallelism(candidate.tp, context_parallel=candidate.cp)
        run, held[name] = candidate.step()
        info = parallel_group_info()

        def on_its_mesh(run: Callable[[], None] = run, info: Any = info) -> None:
            mesh._current = info  # one process, several meshes in turn
            run()

        steps[name] = on_its_mesh
    seconds = measure(steps, repeats, warmup=2)
    if rank == 0:
        torch.save((seconds, held), results)
    dist.destroy_process_group()


def save_base(directory: Path) -> Path:
    """Write the model with the embedded one's tokenizer, as a run reads it."""
    embedded = embedded_model_dir()
    shutil.copytree(embedded, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_pretrained(Decoder(CONFIG, dtype=torch.float32), directory)
    return directory


def run_of(candidate: Candidate, base: Path, output: Path) -> FinetuneConfig:
    """Return the options of two steps at a layout."""
    return FinetuneConfig(
        model=base,
        tp=candidate.tp,
        cp=candidate.cp,
        dp=candidate.dp,
        sequence_parallel=candidate.sequence_parallel,
        activation_checkpointing="full" if candidate.recompute else "none",
        shard_base="all" if candidate.sharded else "none",
        quantize="nf4" if candidate.packed else None,
        batch_size=ROWS,
        micro_batch_size=ROWS // candidate.dp,
        seq_length=candidate.seq_length,
        rank=RANK,
        steps=2,
        eval_every=0,
        eval_rows=ROWS,
        output_dir=output,
    ).resolved()


def measured(candidate: Candidate, config: FinetuneConfig, results: Path) -> None:
    """Fine-tune as a worker does, and write by how much this process grew until the last step was done."""
    if config.quantize is not None:
        importlib.import_module("bitsandbytes.functional")  # its code is no memory of the run
    load, run = BaseModel.load, TrainingLoop.run
    before = 0

    def load_and_begin(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        nonlocal before
        replace(candidate, seq_length=64).step(TINY)[0]()
        gc.collect()
        before = resident("VmRSS")
        model = load(self, *arguments, **options)
        # The peak begins anew: while it is read, the file's pages count as the process's.
        Path("/proc/self/clear_refs").write_text("5")
        return model

    def run_and_end(self: TrainingLoop, *arguments: Any) -> None:
        run(self, *arguments)
        (results / str(os.getpid())).write_text(str(resident("VmHWM") - before))

    with mock.patch.object(BaseModel, "load", load_and_begin), mock.patch.object(TrainingLoop, "run", run_and_end):
        finetune(config)


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(function, args=(str(Path(directory) / "store"), *arguments), nprocs=2)


def times_of(candidates: dict[str, Candidate], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    with tempfile.TemporaryDirectory() as directory:
        results = str(Path(directory) / "results")
        in_two_processes(timed, candidates, repeats, results)
        return torch.load(results)


def sharded(repeats: int) -> None:
    seconds, held = times_of(BASES, repeats)
    rows = []
    for name in BASES:
        whole = name.replace("sharded", "whole")
        over = "1" if name == whole else str(ratio(seconds, name, whole))
        rows.append((name, over, f"{held[name] / MIB:,.1f} MiB"))
    print(
        table("A step over a base sharded over two processes", rows, ("base", "over a whole one", "of the base held"))
    )


def ranks_of(values: Sequence[float]) -> list[int]:
    return [sorted(values).index(value) for value in values]


def unlike(found: dict[str, float], difference: float = 1.15) -> list[str]:
    """Choose, from the fastest on, layouts of which each takes more than so many times as long as the one before."""
    chosen: list[str] = []
    for name in sorted(found, key=lambda name: found[name]):
        if not chosen or found[name] > difference * found[chosen[-1]]:
            chosen.append(name)
    return chosen


def ranking(repeats: int, tokens: int) -> None:
    layouts = {name: replace(candidate, seq_length=tokens) for name, candidate in {**LAYOUTS, **MORE_LAYOUTS}.items()}
    seconds, _ = times_of(layouts, repeats)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    machine = MACHINES["cpu"]
    estimates = {
        name: candidate.planned().seconds_of_step(1, machine, torch.float32)[0] for name, candidate in layouts.items()
    }
    chosen = unlike(found)
    rows = [
        (
            name,
            f"{found[name] / found['dp=2']:.2f}",
            f"{estimates[name] / estimates['dp=2']:.2f}",
            "yes" if name in chosen else "",
        )
        for name in sorted(found, key=lambda name: found[name])
    ]
    header = ("layout", "measured", "estimated", "more than 15% over the last such")
    print(
        table(f"A step of {ROWS} rows of {tokens} tokens at layouts of two processes, over that at dp=2", rows, header)
    )
    for names, which in ((chosen, f"the {len(chosen)} that differ by more than 15%"), (list(found), "all")):
        ranked = (ranks_of([values[name] for name in names]) for values in (found, estimates))
        print(f"Spearman's rank correlation, {which}: {statistics.correlation(*ranked):.2f}")
    print()


def memory() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base = save_base(Path(name) / "base")
        for number, (layout, candidate) in enumerate(LAYOUTS.items()):
            config, results = run_of(candidate, base, Path(name) / f"run{number}"), Path(name) / f"results{number}"
            results.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):
                launch(measured, candidate, config, results, workers=2)
            most = max(int(path.read_text()) for path in results.iterdir())
            counted = plan_of(config, find_base(config.model, None), 2).together
            rows.append((layout, f"{most / MIB:,.0f} MiB", f"{counted / MIB:,.0f} MiB", f"{most / counted:.3f}"))
    header = ("layout", "grown by at most", "plan", "measured / plan")
    print(table("Memory of a process from before its model to the end of two steps", rows, header))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64, help="of a row, in `ranking`")
    parser.add_argument("--only", choices=("sharded", "ranking", "memory"))
    given = parser.parse_args()
    threshold = str(64 * 2**10)
    os.environ |= {
        "MALLOC_MMAP_THRESHOLD_": threshold,
        "MALLOC_TRIM_THRESHOLD_": threshold,
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], None]] = {
        "sharded": lambda: sharded(given.repeats),
        "ranking": lambda: ranking(given.repeats, given.tokens),
        "memory": memory,
    }
    for name, part in parts.items():
        if given.only in (None, name):
            part()


if __name__ == "__main__":
    main()
