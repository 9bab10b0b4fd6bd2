"""The decoder on real processes, which simulation cannot stand for: one writes, all are told how it went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.model_jobs import load_generate_save
from helpers.tiny_models import random_ids
from safetensors.torch import load_file

from meshpeft.models import generate, load_pretrained
from meshpeft.training.launch import launch


def test_two_processes_generate_and_save_as_one_does(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    prompt = random_ids(2, 5)
    launch(load_generate_save, tiny("llama"), tmp_path, prompt.tolist(), workers=2)
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = generate(load_pretrained(tiny("llama"), dtype=torch.float64), prompt, 8, temperature=1.0, seed=5)
    for report in reports:
        assert report["tokens"] == expected.tolist()
        assert "holds a model (config.json)" in report["error"]
    saved, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", tiny("llama")))
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name].double()) for name in source)
