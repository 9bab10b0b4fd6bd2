"""Packing while a model is read, and adapters on a packed base that come back at another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.quantized_jobs import STARTS, TARGETS, adapted, token_ids, train_and_save
from helpers.tiny_models import save_tiny
from helpers.workers import run_on_ranks
from torch import Tensor, nn

from meshpeft.checkpoint import load_checkpoint, save_checkpoint
from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import MeshPEFTError
from meshpeft.peft import LoRA
from meshpeft.quantization import BaseQuantizer, PackedLayer, QuantizationError, quantize_base

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), **SIZES)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def test_packing_while_reading_is_packing_afterwards(llama):
    read = load_pretrained(llama, quantize=BaseQuantizer("nf4", residual_rank=2))
    afterwards = quantize_base(load_pretrained(llama), "nf4", residual_rank=2)
    assert len(packed_layers(read)) == 8
    state, want = read.state_dict(), afterwards.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
    for name, layer in packed_layers(read).items():
        other = packed_layers(afterwards)[name]
        assert layer.residual is not None and torch.equal(layer.residual.a, other.residual.a)
    assert torch.equal(read(token_ids()), afterwards(token_ids()))


def test_a_full_layer_is_gone_before_the_next_is_read(llama, monkeypatch):
    """So that the peak is the packed model plus one tensor."""
    full: list[int] = []
    assign = Decoder.assign_parameter

    def note(self: Decoder, name: str, value: Tensor) -> Tensor:
        new = assign(self, name, value)
        wanted = [layer for key, layer in self.named_modules() if key.rpartition(".")[2] in TARGETS]
        full.append(sum(hasattr(layer, "weight") and not layer.weight.is_meta for layer in wanted))
        return new

    monkeypatch.setattr(Decoder, "assign_parameter", note)
    load_pretrained(llama, quantize=BaseQuantizer("nf4"))
    assert max(full) == 1


def test_layers_that_cannot_be_packed_stop_the_reading_at_its_start(llama):
    with pytest.raises(QuantizationError, match="128 input features do not divide into blocks of 256"):
        load_pretrained(llama, quantize=BaseQuantizer("nf4", block_size=256))


@pytest.mark.parametrize("start", STARTS)
def test_adapters_come_back_at_another_layout(llama, tmp_path, start):
    """Also where the base gave its principal part up: it is the same part again."""
    saved, _ = run_on_ranks(2, train_and_save, str(llama), str(tmp_path / "two"), 20, start)
    # The workers that trained are other processes; this one starts from the files alone.
    decoder = adapted(str(llama), start)
    before = decoder(token_ids()).detach()
    load_checkpoint(decoder, tmp_path / "two")
    loaded = decoder(token_ids()).detach()
    # float64 sums in another order; training moved the logits by far more.
    assert (loaded - saved).norm() < 1e-10 * saved.norm() < 1e-3 * (loaded - before).norm()


def test_a_base_packed_otherwise_is_not_the_one_that_the_checkpoint_was_made_on(llama, tmp_path):
    decoder = LoRA(TARGETS, dim=2)(load_pretrained(llama, quantize=BaseQuantizer("nf4")))
    save_checkpoint(decoder, tmp_path / "saved", step=0)
    other = LoRA(TARGETS, dim=2)(load_pretrained(llama, quantize=BaseQuantizer("int4")))
    with pytest.raises(MeshPEFTError, match="weight_packed"):
        load_checkpoint(other, tmp_path / "saved")
    with torch.no_grad():
        packed_layers(decoder)["decoder.layers.1.mlp.linear_fc2.to_wrap"].weight_packed[5, 7] ^= 1
    with pytest.raises(MeshPEFTError, match=r"1\.mlp\.linear_fc2\.weight_packed has other values here"):
        load_checkpoint(decoder, tmp_path / "saved")
