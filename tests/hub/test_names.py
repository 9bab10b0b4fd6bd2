from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import FAMILIES

from meshpeft.models import ModelError, hf_module_name, hf_tensor_names, load_pretrained, our_module_name
from meshpeft.parallel import layout_of_tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_names_map_one_to_one(tiny: Callable[[str], Path], family: str) -> None:
    names = []
    for name, parameter in load_pretrained(tiny(family)).named_parameters():
        layout = layout_of_tensor(parameter)
        assert layout is not None
        for stored, piece in zip(hf_tensor_names(name, layout), layout.pieces(), strict=True):
            assert our_module_name(stored.rpartition(".")[0]) == (name.rpartition(".")[0], piece.part, None)
            names.append(stored)
    assert len(names) == len(set(names))


def test_unknown_names_are_errors() -> None:
    assert hf_module_name("decoder.layers.11.mlp.linear_fc1", "up") == "model.layers.11.mlp.up_proj"
    for module, part in (("decoder.layers.0.mlp.linear_fc1", None), ("decoder.layers.0.mlp.routing", None), ("x", "q")):
        with pytest.raises(ModelError, match="has no name in Hugging Face checkpoints"):
            hf_module_name(module, part)
    for name in ("model.layers.0.mlp.gates", "transformer.h.0", "model.layers.x.mlp.up_proj"):
        with pytest.raises(ModelError, match="the decoder has no module for"):
            our_module_name(name)
