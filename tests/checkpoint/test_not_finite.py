"""No writer writes a value that is not finite, whichever rank holds it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_jobs import At, build
from helpers.workers import run_on_ranks

from meshpeft.checkpoint import export_peft_adapter, merge_adapter, save_checkpoint
from meshpeft.models import save_pretrained
from meshpeft.parallel import MeshPEFTError, parallel_group_info
from meshpeft.peft import adapter_wrappers

WRITERS = ["export_peft_adapter", "save_checkpoint", "merge_adapter", "save_pretrained", "optimizer"]


def refused(at: At, folder: str) -> dict[str, str]:
    """Every writer's error about a value that the last rank alone holds."""
    found = {}
    for writer in WRITERS:
        model, optimizer = build(at, "dense, lora")
        last = parallel_group_info().world.rank == at.world_size - 1
        # linear_fc2's A is sharded along its input.
        [layer] = [wrapper for name, wrapper in adapter_wrappers(model) if name.endswith("0.mlp.linear_fc2")]
        with torch.no_grad():
            if writer == "optimizer":
                for parameter in layer.adapter.parameters():
                    parameter.grad = torch.full_like(parameter, 1e200 if last else 0.0)  # its square is infinite
                optimizer.step()
            elif last:
                (layer.to_wrap.weight if writer == "save_pretrained" else layer.adapter.linear_in.weight)[0, 0] = (
                    math.inf
                )
        to = Path(folder) / writer
        try:
            if writer == "export_peft_adapter":
                export_peft_adapter(model, to)
            elif writer == "merge_adapter":
                merge_adapter(model, to)
            elif writer == "save_pretrained":
                merge_adapter(model)
                save_pretrained(model, to)
            else:
                save_checkpoint(model, to, step=1, optimizer=optimizer)
        except MeshPEFTError as error:
            found[writer] = str(error)
    return found


@pytest.mark.parametrize("at", [At(), At(tp=2)], ids=str)
def test_nothing_is_written_and_every_rank_says_why(at: At, tmp_path: Path) -> None:
    found = run_on_ranks(2, refused, at, str(tmp_path)) if at.tp > 1 else [refused(at, str(tmp_path))]
    where = " (NaN or infinity)" + (" on rank 1" if at.tp > 1 else "")
    for errors in found:
        assert set(errors) == set(WRITERS)
        for error in errors.values():
            assert "0.mlp.linear_fc2" in error and f"values that are not finite{where}" in error
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.json"))
