"""How much memory reading and packing need: the packed model and one tensor, never the whole model in full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.gated_mlp import GatedMLP
from helpers.simulate import standing_at
from helpers.tiny_models import save_tiny
from torch import nn
from torch.profiler import ProfilerActivity, profile

from meshpeft.engines.transformers_experts import StackedExperts
from meshpeft.hub.coded_files import model_files
from meshpeft.models import load_pretrained, load_transformers
from meshpeft.parallel import init_parallelism
from meshpeft.quantization import BaseQuantizer, PackedLayer, quantize_base

SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "head_dim": 64},
}


@pytest.fixture(scope="module", params=SIZES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("big"), num_hidden_layers=1, **SIZES[request.param])


def held(model: nn.Module) -> int:
    """Bytes of what a model keeps."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def largest(model: nn.Module) -> int:
    """Bytes of the largest packed weight in float32, the type that the model computes in."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    return max(4 * layer.blocks.weight.size for layer in layers)


def peak_of(function: Callable[[], nn.Module], mapped: Path) -> tuple[int, nn.Module]:
    """The most bytes that torch's allocator had given out at a time, those inside operators included.

    The mapped weight file, which torch counts as one allocation of its size, is not the process's own memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = function()
    recorded = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    files = {sign * path.stat().st_size for path in mapped.glob("*.safetensors") for sign in (1, -1)}
    assert files & {change for _, change in changes}
    now = peak = 0
    for _, change in changes:
        now += 0 if change in files else change
        peak = max(peak, now)
    return peak, made


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_reading_and_packing_takes_the_packed_model_and_one_tensor(saved: Path, storage: Any) -> None:
    quantize_base(GatedMLP(), storage)  # imports the libraries
    peak, model = peak_of(lambda: load_pretrained(saved, quantize=BaseQuantizer(storage)), saved)
    # The tensor as it is read, and copies of the quarter of a million values that are packed at a time.
    assert 0.9 * largest(model) < peak - held(model) < 1.07 * largest(model)


def test_reading_takes_no_more_than_the_model(saved: Path) -> None:
    peak, model = peak_of(lambda: load_pretrained(saved), saved)
    assert peak < 1.01 * held(model)


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_experts_one_by_one_take_a_process_its_share_and_one_tensor(storage: Any, tmp_path: Path) -> None:
    """A model of transformers, which stacks them, as one of two processes of expert parallel."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 16, "num_hidden_layers": 2}
    sizes |= {"q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 64, "intermediate_size": 512}
    directory = save_tiny("deepseek_v3", tmp_path, **sizes, first_k_dense_replace=1)
    with model_files(directory) as files:
        assert "model.layers.1.mlp.experts.15.down_proj.weight" in files.names()
    quantizer = None if storage is None else BaseQuantizer(storage)
    whole = load_transformers(directory, quantize=quantizer)  # imports the libraries, too
    with standing_at(1, 2):
        init_parallelism(expert_parallel=2)
        peak, model = peak_of(lambda: load_transformers(directory, quantize=quantizer), directory)
    experts = [module for module in model.modules() if isinstance(module, StackedExperts)]
    assert len(experts) == 1 and held(whole) - held(model) > 0.9 * held(experts[0])
    tensor = 512 * 512 * 4 if storage is None else largest(model)
    assert peak - held(model) < 1.1 * tensor


# What the operating system says: memory that a fresh process wrote itself (RssAnon; the pages of the mapped file are
# not among it), sampled while the model is read.
MEASURE = """
import sys, threading, time
import torch
from meshpeft.models import load_pretrained
from meshpeft.quantization import BaseQuantizer

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
load_pretrained(sys.argv[2], quantize=BaseQuantizer("nf4"))  # imports the libraries
before = peak = held()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_pretrained(sys.argv[1], quantize=BaseQuantizer("nf4"))
done.set()
watcher.join()
kept = sum(parameter.nbytes for parameter in model.parameters())
largest = max(4 * layer.blocks.weight.size for layer in model.modules() if hasattr(layer, "weight_packed"))
print((peak - before - kept) / largest)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_the_operating_system_sees_no_second_tensor_either(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=4, **SIZES["llama"])
    first = save_tiny("llama", tmp_path / "first", hidden_size=64, intermediate_size=128)
    # The C library gives memory back as soon as it is freed, above its own first threshold, which would grow by itself.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEASURE, str(model), str(first)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=environment).stdout
    assert float(printed) < 1.15
