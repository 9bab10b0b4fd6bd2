"""Published few-bit weights: bit for bit the numbers of each format's own decoding, slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coded_weights import BLOCK, FORMATS, encode_files
from helpers.tiny_models import random_ids, save_tiny
from helpers.transformers_runs import count_read
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from meshpeft.hub.coded_files import model_files
from meshpeft.models import ModelError, load_pretrained, load_transformers, save_pretrained
from meshpeft.parallel import init_parallelism
from meshpeft.training.base import find_base
from meshpeft.verify.simulation import simulate, the_same

SIZES: dict[str, int] = {"hidden_size": 32, "intermediate_size": 64}
FAMILIES = {"fp8": "qwen3", "mxfp4": "gpt_oss", "nvfp4": "llama", "modelopt fp8": "qwen3"}


@pytest.fixture(params=FORMATS)
def coded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, dict[str, Tensor]]]:
    format = request.param
    sizes = {**SIZES, "hidden_size": 64} if format == "mxfp4" else SIZES
    full = save_tiny(FAMILIES[format], tmp_path / "full", **sizes)
    return format, tmp_path / "coded", encode_files(full, tmp_path / "coded", format)


def reference(format: str, parts: dict[str, Tensor]) -> Tensor:
    """What the packages that write these formats decode."""
    if format == "fp8":
        rows, columns = parts[""].shape
        # Theirs takes matrices of full blocks only.
        codes = torch.nn.functional.pad(parts[""].float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        decoded: Tensor = Fp8Dequantize(None)._dequantize_one(codes, parts["_scale_inv"], torch.bfloat16)
        return decoded[:rows, :columns]
    if format == "mxfp4":
        found: Tensor = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])
        return found
    if format == "nvfp4":
        nvfp4 = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
        codes = parts[""]
        made = nvfp4(torch.Size((codes.shape[0], 2 * codes.shape[1])), torch.bfloat16, codes)
        scales = {"scale": parts["_scale"], "double_scale": parts["_scale_2"], "block_sizes": {-1: 16}}
        result: Tensor = made.dequantize(torch.bfloat16, **scales)
        return result
    return (parts[""].float() * parts["_scale"]).bfloat16()


def test_the_numbers_are_those_of_the_format(coded: tuple[str, Path, dict[str, dict[str, Tensor]]]) -> None:
    format, directory, written = coded
    held = load_file(directory / "model.safetensors")
    plain = held.keys() - {f"{name}{end}" for name, parts in written.items() for end in parts}
    with model_files(directory) as files:
        assert files.names() == {*written, *(name for name in plain if not name.endswith("input_scale"))}
        for name, parts in written.items():
            expected = reference(format, parts)
            found = files.read(name)
            assert files.dtype(name, floating=True) == found.dtype == torch.bfloat16
            assert files.shape(name) == tuple(found.shape)
            assert torch.equal(found, expected)
            assert found.abs().max() > 0.1
            box = tuple((size // 3, size - size // 4 - size // 3) for size in found.shape)
            part = files.read_box(name, [start for start, _ in box], [length for _, length in box])
            assert torch.equal(part, found[tuple(slice(start, start + length) for start, length in box)])


def logits_at(directory: Path, tp: int) -> tuple[Tensor, int]:
    """Logits in float64, and how many values a process reads."""
    ids = random_ids()
    with simulate(tp=tp), count_read() as read:
        native = find_base(directory).engine == "native"
        load: Any = load_pretrained if native else load_transformers
        model = load(directory, torch.float64)
        with torch.no_grad():
            found = the_same(model(ids, gather_logits=True))
    return found, read[0]


def test_a_process_reads_its_slices(coded: tuple[str, Path, dict[str, dict[str, Tensor]]]) -> None:
    _, directory, _ = coded
    (whole, all_read), (sharded, of_two) = logits_at(directory, 1), logits_at(directory, 2)
    # transformers' models compute some of it in float32.
    torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-5)
    assert of_two < 1.1 * all_read  # of both simulated ranks together


def test_a_model_of_numbers_is_written_without_the_codes(
    coded: tuple[str, Path, dict[str, dict[str, Tensor]]], tmp_path: Path
) -> None:
    format, directory, written = coded
    init_parallelism()
    base = find_base(directory)
    assert base.stored_dtype() == torch.bfloat16
    save_pretrained(base.load(torch.bfloat16), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, parts in written.items():
        assert torch.equal(saved[name], reference(format, parts))


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"quant_method": "awq", "bits": 4}, "the weights are quantised already, by 'awq'; known are fp8, mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "by 'modelopt', 'W4A16_AWQ'; known are"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]: expected two sizes"),
        ("gguf", "by 'gguf'; known are"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_formats_are_refused(family: str, stated: Any, sentence: str, tmp_path: Path) -> None:
    directory = save_tiny(family, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    with pytest.raises(ModelError, match=sentence):
        find_base(directory).load(torch.float32)


@pytest.mark.parametrize(
    ("end", "change", "sentence"),
    [
        ("weight_scale_inv", None, "is F8_E4M3|lacks|stored as F8_E4M3"),
        (
            "weight_scale_inv",
            lambda scales: scales[:1],
            r"weight_scale_inv is F32 \(1, .*expected F32 or BF16 or F16 \(",
        ),
        ("weight", lambda codes: codes.float(), r"weight is F32 .*expected F8_E4M3"),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_refused(end: str, change: Any, sentence: str, tmp_path: Path) -> None:
    init_parallelism()
    encode_files(save_tiny("qwen3", tmp_path / "full", **SIZES), tmp_path / "coded", "fp8")
    path = tmp_path / "coded" / "model.safetensors"
    held = load_file(path)
    name = f"model.layers.0.mlp.up_proj.{end}"
    values = held.pop(name)
    save_file(held if change is None else {**held, name: change(values).contiguous()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=sentence):
        load_pretrained(tmp_path / "coded")
