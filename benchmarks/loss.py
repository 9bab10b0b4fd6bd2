"""Time and memory of the loss from hidden states, head product included, against the ways that others have of it.

4,096 tokens, hidden 512, vocabularies of 32,000 and 152,000, float32, one thread: forward, and backward to the hidden
states. Time is CPU seconds; all candidates run in turn, and a figure is the median of paired ratios with the smallest
and the largest. A head with an adapter is compared with all logits of the same. Every run is a fork of a process that
has run none of them: memory is the peak of its resident size above what it was (Linux), and pages that another
candidate gave back to the allocator, and that would hide in what it was, are not there.

    python benchmarks/loss.py [--repeats 4]

The large vocabulary runs half as often, at least twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import table
from torch import Tensor, nn
from torch.nn import functional

from meshpeft.parallel import AdaptedHead, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from meshpeft.peft.fused import Term, fused_lora

TOKENS, HIDDEN, RANK = 4096, 512, 16
VOCABULARIES = (32_000, 152_000)
BASE, ADAPTED = "all logits, MeshPEFT", "all logits, MeshPEFT, LoRA on the head"
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(vocabulary: int) -> Case:
    """x, W, labels, and labels of which a part is ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator) / HIDDEN**0.5
    labels = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
    half = labels.masked_fill(torch.rand(TOKENS, generator=generator) < 0.5, -100)
    return x, weight, labels, half


def ours(case: Case) -> Tensor:
    x, weight, labels, _ = case
    return vocab_parallel_linear_cross_entropy(x, weight, labels).sum()


def half_ignored(case: Case) -> Tensor:
    x, weight, _, half = case
    return vocab_parallel_linear_cross_entropy(x, weight, half).sum()


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.full((RANK, HIDDEN), 0.01, requires_grad=True)
    return a, torch.full((len(weight), RANK), 0.01, requires_grad=True)


def adapter_all_logits(case: Case) -> Tensor:
    x, weight, labels, _ = case
    return vocab_parallel_cross_entropy(fused_lora(x, weight, Term(*factors(weight), 1.0)), labels).sum()


def with_adapter(case: Case) -> Tensor:
    """LoRA on the head, which computes its product again in the backward pass."""
    x, weight, labels, _ = case
    a, b = factors(weight)
    head = AdaptedHead(lambda rows, _: fused_lora(rows, weight, Term(a, b, 1.0)), len(weight), [a, b])
    return vocab_parallel_linear_cross_entropy(x, head, labels).sum()


def all_logits(case: Case) -> Tensor:
    x, weight, labels, _ = case
    return vocab_parallel_cross_entropy(functional.linear(x, weight), labels).sum()


def plain_torch(case: Case) -> Tensor:
    x, weight, labels, _ = case
    return functional.cross_entropy(functional.linear(x, weight), labels, reduction="sum")


def torch_linear(case: Case) -> Tensor:
    x, weight, labels, _ = case
    options = nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(x, weight, labels, options=options, reduction="sum")


def candidates() -> dict[str, Callable[[Case], Tensor]]:
    found: dict[str, Callable[[Case], Tensor]] = {
        BASE: all_logits,
        "all logits, torch": plain_torch,
        "MeshPEFT": ours,
        "MeshPEFT, half of the labels ignored": half_ignored,
        ADAPTED: adapter_all_logits,
        "MeshPEFT, LoRA on the head": with_adapter,
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):  # since torch 2.13
        found["torch's linear_cross_entropy"] = torch_linear
    return found


def resident(field: str) -> float:
    """Read VmRSS or VmHWM of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measured(run: Callable[[Case], Tensor], case: Case, results: Any) -> None:
    """Put CPU seconds, and the peak of the resident size above what it was, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before, start = resident("VmRSS"), time.process_time()
    run(case).backward()
    results.put((time.process_time() - start, resident("VmHWM") - before))


def run_once(run: Callable[[Case], Tensor], case: Case) -> tuple[float, float]:
    """Measure one run in a fork of this process."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=measured, args=(run, case, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with exit code {process.exitcode}")
    found: tuple[float, float] = results.get()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for vocabulary, repeats in zip(VOCABULARIES, (arguments.repeats, max(2, arguments.repeats // 2)), strict=True):
        case, runs = inputs(vocabulary), candidates()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for repeat in range(repeats):
            for name in list(runs) if repeat % 2 == 0 else reversed(runs):
                found[name].append(run_once(runs[name], case))
        for name, taken in found.items():
            base = found[ADAPTED if "LoRA" in name else BASE]
            ratios = [own[0] / other[0] for own, other in zip(taken, base, strict=True)]
            relative = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            seconds, peak = (statistics.median(column) for column in zip(*taken, strict=True))
            rows.append((f"{vocabulary:,}", name, relative, f"{seconds:.2f} s", f"{peak:,.0f} MiB"))
    header = ("vocabulary", "loss", "CPU time / all logits", "CPU time", "peak memory")
    print(table(f"The loss of {TOKENS:,} tokens, hidden {HIDDEN}, forward and backward", rows, header))


if __name__ == "__main__":
    main()
