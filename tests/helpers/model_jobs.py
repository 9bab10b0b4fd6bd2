"""What real processes do in the tests of the decoder; in a module of its own, so that they can import it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from meshpeft.models import ModelError, generate, load_pretrained, save_pretrained
from meshpeft.parallel import ModelParallelConfig, init_parallelism


def load_generate_save(source: Path, results: Path, prompt: list[list[int]]) -> None:
    """Each of 2 workers reports its sampled tokens, and what it got from a save that only rank 0 can see fail."""
    info = init_parallelism(tensor_parallel=2)
    parallel = ModelParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    decoder = load_pretrained(source, dtype=torch.float64, parallel=parallel)
    tokens = generate(decoder, torch.tensor(prompt), 8, temperature=1.0, seed=5)
    save_pretrained(decoder, results / "saved")
    error = ""
    try:
        save_pretrained(decoder, results / "saved")
    except ModelError as caught:
        error = str(caught)
    (results / f"{info.tp.rank}.json").write_text(json.dumps({"tokens": tokens.tolist(), "error": error}))
