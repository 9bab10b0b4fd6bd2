"""How much memory packing needs: the packed model and one tensor, never the whole model in full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import save_tiny

# In a process of its own, so that nothing else of the tests is counted. Memory that the process itself wrote
# (RssAnon): the pages of the mapped weight files are not its own. Sampled while the model is read.
MEASURE = """
import sys, threading, time
import torch
from meshpeft.models import load_pretrained
from meshpeft.quantization import BaseQuantizer, packed_size, quantize_base

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
quantize_base(torch.nn.Linear(64, 64), "nf4")  # imports the libraries
before = peak = held()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, held())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_pretrained(sys.argv[1], quantize=BaseQuantizer("nf4") if sys.argv[2] == "nf4" else None)
done.set()
watcher.join()
kept = sum(p.nbytes for p in model.parameters())
layers = [module for module in model.modules() if hasattr(module, "in_features")]
largest = max(layer.in_features * layer.out_features * 4 for layer in layers)
print(peak - before, kept, largest)
"""


def measured(model: Path, how: str) -> list[int]:
    """Bytes: the peak while the model is read, what it holds afterwards, the largest tensor in full."""
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model), how], check=True, capture_output=True, text=True, timeout=300
    )
    return list(map(int, printed.stdout.split()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_reading_and_packing_takes_the_packed_model_and_one_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    model = save_tiny("llama", tmp_path, num_attention_heads=16, **sizes)
    peak, packed, largest = measured(model, "nf4")
    full_peak, full, _ = measured(model, "full")
    assert packed < 0.16 * full < 0.16 * 1.1 * full_peak
    # The tensor as it is read, in parts that are then joined, and temporary copies of the million values that are
    # packed at a time.
    assert peak < packed + 4 * largest < 0.8 * full
