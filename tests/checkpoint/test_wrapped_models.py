"""A wrapper around a model or a part of it leaves no trace in files: they hold the names of the model without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from meshpeft.checkpoint import export_peft_adapter, load_checkpoint, load_peft_adapter, save_checkpoint
from meshpeft.models import Decoder, load_pretrained

Tiny = Callable[[str], Path]


class DataParallel(nn.Module):
    """What data-parallel and mixed-precision wrappers are, for names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def with_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Decoder], nn.Module]:
    def change(model: Decoder) -> nn.Module:
        model.decoder.layers[1] = wrap(model.decoder.layers[1])
        return model

    return change


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPERS: dict[str, Callable[[Decoder], nn.Module]] = {
    "compiled block": with_block(compiled),
    "checkpointed block": with_block(checkpoint_wrapper),
    "compiled": compiled,
    "data parallel": DataParallel,
    "data parallel, compiled": lambda model: DataParallel(compiled(model)),
}


def factors(model: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if ".adapter." in name]


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in factors(model):
            parameter.zero_()
    return model


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_reads_the_checkpoint_of_a_plain_one_and_the_other_way_round(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    plain, wrapped = adapted(tiny("llama")), WRAPPERS[name](adapted(tiny("llama")))
    expected = [values.clone() for values in factors(plain)]
    assert len(expected) > 0
    for number, (saved, loaded) in enumerate(((plain, wrapped), (wrapped, plain))):
        save_checkpoint(saved, tmp_path / str(number), step=1)
        load_checkpoint(zeroed(loaded), tmp_path / str(number))
        assert all(map(torch.equal, factors(loaded), expected))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_adapter_of_a_wrapped_model_is_exported_and_read_as_that_of_a_plain_one(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    plain, wrapped = adapted(tiny("llama")), WRAPPERS[name](adapted(tiny("llama")))
    export_peft_adapter(plain, tmp_path / "plain")
    export_peft_adapter(wrapped, tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / path.name).read_bytes() == path.read_bytes()
    load_peft_adapter(zeroed(wrapped), tmp_path / "plain")
    assert all(map(torch.equal, factors(wrapped), factors(plain)))
    fresh = load_peft_adapter(WRAPPERS[name](load_pretrained(tiny("llama"), torch.float64)), tmp_path / "plain")
    assert all(map(torch.equal, factors(fresh), factors(plain)))
