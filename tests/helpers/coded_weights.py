"""Models in the few-bit forms in which they are published, from small models in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
BLOCK = 12
"""Rows and columns of a block of FP8; the last ones of a matrix are cut."""


def in_fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return {"": codes.to(torch.float8_e4m3fn), "_scale_inv": scales}


def in_fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale}


def in_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    second = weight.abs().max() / (6 * 448)
    blocks = weight.unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    codes = _nearest(blocks / (scales.float() * second)[..., None]).flatten(-2)
    return {"": codes[..., 0::2] | codes[..., 1::2] << 4, "_scale": scales, "_scale_2": second}


def in_mxfp4(weight: Tensor) -> dict[str, Tensor]:
    """Of a stack [experts, in, out]."""
    blocks = weight.transpose(-2, -1).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil().clamp(-127, 128)
    codes = _nearest(blocks / exponents.exp2()[..., None])
    return {"_blocks": codes[..., 0::2] | codes[..., 1::2] << 4, "_scales": (exponents + 127).to(torch.uint8)}


def _nearest(values: Tensor) -> Tensor:
    return (values[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


Encode = Callable[[Tensor], dict[str, Tensor]]
FORMATS: dict[str, tuple[Encode, dict[str, Any]]] = {
    "fp8": (in_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}),
    "mxfp4": (in_mxfp4, {"quant_method": "mxfp4"}),
    "nvfp4": (in_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "modelopt fp8": (in_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


def encode_files(directory: Path, to: Path, format: str) -> dict[str, dict[str, Tensor]]:
    """Write a model's directory with the layers of its blocks in a format, all else in bfloat16.

    Returns:
        Of each parameter in codes, what was written of it, by the end of the name.
    """
    encode, stated = FORMATS[format]
    tensors: dict[str, Tensor] = {}
    coded: dict[str, dict[str, Tensor]] = {}
    for name, values in load_file(directory / "model.safetensors").items():
        is_matrix = ".layers." in name and (
            "experts" in name and values.dim() == 3 if format == "mxfp4" else values.dim() == 2
        )
        if not is_matrix:
            tensors[name] = values.bfloat16()
            continue
        coded[name] = {end: part.contiguous() for end, part in encode(values).items()}
        tensors |= {f"{name}{end}": part for end, part in coded[name].items()}
        if format.startswith("modelopt"):
            tensors[name.replace(".weight", ".input_scale")] = torch.tensor(1.0)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": stated, "dtype": "bfloat16"}))
    return coded
