"""Attention over packed rows: time and peak memory of one layer, and of one training step, against dense masks.

Rows hold documents whose lengths are drawn from the lognormal distribution that fits the embedded data's: the same
documents, 8,192 tokens in all, in rows of 512, 2,048 and 8,192 tokens, and four times over in one of 32,768. Candidates
are the dense mask, transformers' own attention (its `sdpa`, with the mask that it makes from restarting positions),
both up to 8,192 tokens, and attention by documents up to 32,768. Forward and backward, float32, 8 heads over 2 groups
of 64 channels, one thread. Times are those of the process, for the machine may be shared. The allocator keeps what is
freed: otherwise the system clears new pages for every large tensor of a call, at a cost by its size that has nothing to
do with attention. The masks are made beforehand, and count as memory. Peak memory is what a fresh process grows by,
above queries, keys and values.

The step trains LoRA of rank 16 on a decoder of 2 layers (hidden 512, vocabulary 4,096) on one row of 8,192 tokens.

    python benchmarks/attention.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from timing import measure, quartiles, ratio, table
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import LlamaConfig

from meshpeft.data.batches import MicroBatch
from meshpeft.data.embedded import embedded_model_dir
from meshpeft.data.tokenizers import load_tokenizer
from meshpeft.models import Decoder, DecoderConfig
from meshpeft.models.attention import attend_by_mask, attention_masks, positions_in_documents
from meshpeft.models.spans import Spans, attend
from meshpeft.peft import LoRA
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.inputs import load_inputs
from meshpeft.training.step import TrainStep, adamw

HEADS, GROUPS, HEAD_DIM = 8, 2, 64
TOKENS = 8192
SHAPES = ((16, 512), (4, 2048), (1, 8192), (1, 32768))  # rows, tokens of a row
DENSE, THEIRS, OURS = "dense mask", "transformers", "documents"


def lognormal() -> tuple[float, float]:
    """Mean and deviation of the logarithm of the embedded documents' lengths."""
    rows = load_inputs(FinetuneConfig(), load_tokenizer(embedded_model_dir())).train
    logs = np.log(np.diff(rows.document_starts))
    return float(logs.mean()), float(logs.std())


def documents_of(rows: int, seq: int, mean: float, deviation: float) -> Tensor:
    """Document ids [rows, seq] of the same documents at every shape: those of 8,192 tokens, as often as there is room.

    A document that is longer than what is left of a row goes on in the next as one of its own.
    """
    lengths = np.random.default_rng(0).lognormal(mean, deviation, TOKENS).astype(int) + 1
    ids = np.repeat(np.arange(TOKENS), lengths)[:TOKENS]
    again = np.concatenate([ids + copy * TOKENS for copy in range(rows * seq // TOKENS)])
    return torch.from_numpy(again).view(rows, seq)


def layer(name: str, documents: Tensor) -> Callable[[], None]:
    """Forward and backward of one attention."""
    rows, seq = documents.shape
    q, k, v = (torch.randn(seq, rows, heads, HEAD_DIM).requires_grad_() for heads in (HEADS, GROUPS, GROUPS))
    if name == OURS:
        forward: Callable[[], Any] = partial(attend, q, k, v, Spans.of_documents(documents))
    elif name == DENSE:
        mask = attention_masks([None], seq, 0, q.device, documents, documents)[None]
        forward = partial(attend_by_mask, q, k, v, mask)
    else:
        config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=GROUPS)
        config._attn_implementation = "sdpa"
        positions = positions_in_documents(documents)
        theirs = create_causal_mask(config, torch.empty(rows, seq, 1), None, None, positions)
        module = nn.Module()
        module.num_key_value_groups = HEADS // GROUPS  # type: ignore[assignment]
        by_head = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        forward = partial(sdpa_attention_forward, module, *by_head, theirs)

    def run() -> None:
        found = forward()
        out: Tensor = found[0] if isinstance(found, tuple) else found  # transformers' has weights too, or none
        out.backward(out.detach())
        q.grad = k.grad = v.grad = None

    return run


def step(name: str, documents: Tensor) -> Callable[[], None]:
    """One training step."""
    seq = documents.shape[1]
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=2,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        head_dim=HEAD_DIM,
    )
    model = LoRA(dim=16)(Decoder(config, dtype=torch.float32))
    train = TrainStep(model, adamw(model, lr=1e-4), clip=1.0)
    tokens = torch.randint(0, 4096, (1, seq))
    batch = MicroBatch(
        tokens, tokens.roll(-1, 1), positions_in_documents(documents), documents, Spans.of_documents(documents)
    )

    def by_mask(q: Tensor, k: Tensor, v: Tensor, spans: Any, **_: Any) -> Tensor:
        return attend_by_mask(q, k, v, mask)

    def run() -> None:
        nonlocal mask
        if name == OURS:
            float(train([batch], seq).loss)
            return
        mask = attention_masks([None], seq, 0, tokens.device, documents, documents)[None]
        with mock.patch("meshpeft.models.attention.attend", by_mask):
            float(train([batch], seq).loss)

    mask: Any = None
    return run


def peak(make: Callable[[str, Tensor], Callable[[], None]], name: str, documents: Tensor) -> float:
    """MiB by which a fresh process grows at most in a call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, name, documents))


def _peak(make: Callable[[str, Tensor], Callable[[], None]], name: str, documents: Tensor) -> float:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    make(name, documents[:, :64])()  # what is loaded once is loaded now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    make(name, documents)()
    inputs = documents.numel() * HEAD_DIM * (HEADS + 2 * GROUPS) * 4 / 2**20 if make is layer else 0
    return _resident("VmHWM") - before - inputs


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def keep_freed_memory() -> None:
    """Tell glibc to take no block from the system directly, and to give none back."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-4, 0)  # M_MMAP_MAX
    allocator.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    mean, deviation = lognormal()
    documents = {seq: documents_of(rows, seq, mean, deviation) for rows, seq in SHAPES}
    runs = {
        (seq, name): layer(name, documents[seq])
        for _, seq in SHAPES
        for name in (DENSE, THEIRS, OURS)
        if name == OURS or seq <= TOKENS
    }
    seconds = measure({f"{seq} {name}": run for (seq, name), run in runs.items()}, repeats, 1, time.process_time)
    rows = []
    shortest = SHAPES[0][1]
    for seq, name in runs:
        own, ids = f"{seq} {name}", documents[seq]
        over = str(ratio(seconds, own, f"{seq} {OURS}")) if name != OURS else "1"
        pairs = zip(seconds[own], seconds[f"{shortest} {OURS}"], strict=True)
        per_token = quartiles([a / ids.numel() / (b / documents[shortest].numel()) for a, b in pairs])
        shape = f"{len(ids)} x {seq:,}"
        rows.append((shape, name, over, str(per_token), f"{peak(layer, name, ids) / ids.numel() * 1024:,.1f}"))
    header = ("tokens", "attention", "time over documents'", "time a token over 512's", "peak, KiB a token")
    described = f"documents of exp(N({mean:.2f}, {deviation:.2f})) tokens"
    print(table(f"One attention layer, {described}", rows, header), flush=True)
    steps = {name: step(name, documents[TOKENS]) for name in (DENSE, OURS)}
    seconds = measure(steps, repeats, 1, time.process_time)
    rows = []
    for name in steps:
        over = str(ratio(seconds, name, OURS)) if name != OURS else "1"
        rows.append((name, over, f"{peak(step, name, documents[TOKENS]):,.0f}"))
    print(table(f"A training step of {TOKENS:,} tokens", rows, ("attention", "time over documents'", "peak, MiB")))


if __name__ == "__main__":
    main()
