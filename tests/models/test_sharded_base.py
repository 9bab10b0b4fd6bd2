"""A sharded base in real processes: what reads its values, and what is written of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_ids, save_tiny
from helpers.workers import run_on_ranks

from meshpeft.checkpoint import export_peft_adapter, load_checkpoint, merge_adapter, save_checkpoint
from meshpeft.hub.save import save_pretrained
from meshpeft.models import generate, load_pretrained, load_transformers
from meshpeft.models.base_blocks import ShardBase, base_stores
from meshpeft.parallel import init_parallelism, parallel_group_info
from meshpeft.peft import DoRA, LoRA
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.step import adamw
from meshpeft.verify.memory import MemoryWatch
from meshpeft.verify.watch import watching

FAMILIES = {"qwen2": load_pretrained, "qwen3_moe": load_pretrained, "starcoder2": load_transformers}


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def use(family: str, base: Path, folder: Path, shards: ShardBase, quantize: str | None) -> dict[str, Any]:
    """Load, train a step, and use everything that reads the base; what came of it on this rank."""
    init_parallelism()
    rank = parallel_group_info().world.rank
    load: Any = FAMILIES[family]
    options = {} if quantize is None else {"quantize": BaseQuantizer(quantize, block_size=32)}
    model = load(base, torch.float32, shard_base=shards, **options)
    method = DoRA if family == "starcoder2" else LoRA
    targets = ["*.layers.*"] if family == "starcoder2" else ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    adapted = method(targets, dim=4, alpha=8, lora_B_init_method="normal")(model)
    ids = random_ids()[rank : rank + 1]
    found: dict[str, Any] = {"stores": len(base_stores(model))}
    optimizer = adamw(adapted, lr=1e-2)
    loss = adapted.token_losses(ids, ids).sum()
    loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    found["loss"] = float(loss)
    found["gradients"] = float(sum(gradient.double().square().sum() for gradient in gradients if gradient is not None))
    for gradient in gradients:
        assert gradient is not None
        gradient.fill_(1)
    optimizer.step()
    adapted.eval()
    # One rank's text ends before the other's.
    first = int(generate(adapted, ids[:, :5], 1)[0, -1])
    found["generated"] = generate(
        adapted, ids[:, :5], 4, eos_token_id=first if rank == 0 else (first + 1) % 90
    ).tolist()
    export_peft_adapter(adapted, folder / "adapter")
    save_checkpoint(adapted, folder / "steps", step=1, optimizer=optimizer)
    load_checkpoint(adapted, folder / "steps", optimizer=optimizer)
    if quantize is None:
        merge_adapter(adapted, folder / "merged")
        save_pretrained(load(base, torch.float32, shard_base=shards), folder / "saved")
    return found


@pytest.mark.parametrize(
    ("family", "quantize"), [("qwen2", None), ("qwen2", "nf4"), ("qwen3_moe", None), ("starcoder2", None)]
)
def test_everything_that_reads_the_base_reads_a_sharded_one(family: str, quantize: str | None, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", intermediate_size=64, tie_word_embeddings=family == "starcoder2")
    results = {
        shards: run_on_ranks(2, use, family, base, tmp_path / str(shards), shards, quantize)
        for shards in ("none", "all")
    }
    for whole, sharded in zip(results["none"], results["all"], strict=True):
        assert whole.pop("stores") == 0 and sharded.pop("stores") > 0
        assert whole == sharded
    assert digests(tmp_path / "none" / "adapter") == digests(tmp_path / "all" / "adapter")
    for name in ("merged", "saved") if quantize is None else ():
        assert digests(tmp_path / "none" / name) == digests(tmp_path / "all" / name)


def save_whole(base: Path, folder: Path, shards: ShardBase) -> dict[str, Any]:
    """Save everything, and load it into bases whose values are gone; what each of them has then."""
    init_parallelism()
    load: Any = load_pretrained
    model = LoRA(dim=4)(load(base, torch.float32, shard_base=shards))
    save_checkpoint(model, folder / str(shards), step=1, full_model=True)
    found = {}
    for into in ("none", 2, "all"):
        fresh = LoRA(dim=4)(load(base, torch.float32, shard_base=into))
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.copy_(torch.zeros(parameter.shape))
        load_checkpoint(fresh, folder / str(shards))
        found[str(into)] = {entry.key: entry.data.clone() for entry in fresh.sharded_state_dict().values()}
    return found


def test_a_checkpoint_of_the_full_model_is_the_same_from_any_base_and_for_any(tmp_path: Path) -> None:
    base = save_tiny("qwen3_moe", tmp_path / "base")
    results = {shards: run_on_ranks(4, save_whole, base, tmp_path, shards)[0] for shards in ("none", 2, "all")}
    expected = results["none"]["none"]
    assert expected
    for found in results.values():
        for tensors in found.values():
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    stored = {
        shards: sum(file.stat().st_size for file in (tmp_path / shards).rglob("*.safetensors"))
        for shards in ("none", "2", "all")
    }
    # Each value once; the headers name the slices.
    assert max(stored.values()) - min(stored.values()) < 0.1 * min(stored.values())


def watch_loading(base: Path) -> tuple[int, int, int]:
    """Bytes of the largest layer, of the largest table, and those that loading takes beside what stays."""
    init_parallelism()
    load: Any = load_pretrained
    whole = load(base, torch.float32)
    sizes = {name: parameter.nbytes for name, parameter in whole.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    del whole
    with watching(memory := MemoryWatch()):
        model = load(base, torch.float32, shard_base="all")
    assert base_stores(model)
    return layer, sizes["embedding.weight"], memory.peak()


def test_loading_takes_a_layer_beside_a_ranks_share(tmp_path: Path) -> None:
    base = save_tiny("qwen2", tmp_path / "base", vocab_size=4096, tie_word_embeddings=False)
    for layer, table, taken in run_on_ranks(2, watch_loading, base):
        assert table > 10 * layer
        # A slice of a file is a part of its whole tensor, which is mapped and takes no memory. Beside that there are
        # a layer's tensors, the block made of them, and the rank's part of it.
        assert taken - table < 3 * layer
