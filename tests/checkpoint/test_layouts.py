"""Any layout reads what any other wrote: parameters and optimizer state, bit for bit, and every byte once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_jobs import (
    FAST_MODELS,
    MODELS,
    At,
    StackedLayers,
    load_known,
    load_stacked_layers,
    load_whole,
    on,
    save_experts_one_by_one,
    save_known,
    save_stacked_layers,
)
from helpers.workers import run_on_ranks
from torch import Tensor

from meshpeft.checkpoint.identity import describe_base
from meshpeft.checkpoint.manifest import MANIFEST, Manifest
from meshpeft.hub.tensor_files import TensorFiles
from meshpeft.parallel import RowParallelLinear, init_parallelism

FAST = [At(), At(tp=2, ep=2, etp=1, sequence_parallel=True), At(cp=2, ep=2)]
EVERY = [
    At(),
    At(tp=2),
    At(dp=2),
    At(dp=2, ep=2),
    At(dp=4, ep=2),
    At(tp=4, sequence_parallel=True),
    At(tp=2, dp=2, ep=2, sequence_parallel=True),
    At(tp=2, dp=2, ep=4, etp=1),
    At(tp=2, cp=2, ep=2),
]


def check_bytes(folder: Path, sizes: dict[str, int]) -> None:
    """No slice is lost and none is there twice: the bytes on the disk are those of the global tensors."""
    manifest = Manifest.read(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {MANIFEST, *manifest.files}
    stored = 0
    for name in manifest.files:
        with TensorFiles([folder / name]) as file:
            stored += sum(
                torch.Size(file.shape(tensor)).numel() * file.dtype(tensor).itemsize
                for tensor in file.names()
                if not tensor.startswith(("optimizer.step.", "random."))
            )
    assert stored == sum(sizes.values())


def every_one_loads_every_one(layouts: list[At], model: str, folder: Path) -> None:
    folders = [str(folder / str(at)) for at in layouts]
    for at, its in zip(layouts, folders, strict=True):
        check_bytes(Path(its) / "step-00000007", on(at, save_known, model, its))
    for other in layouts:
        assert on(other, load_known, model, folders) == [], other


@pytest.mark.parametrize("model", FAST_MODELS)
def test_what_one_layout_saves_the_others_load(model: str, tmp_path: Path) -> None:
    every_one_loads_every_one(FAST, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_what_each_of_nine_layouts_saves_every_other_loads(model: str, tmp_path: Path) -> None:
    every_one_loads_every_one(EVERY, model, tmp_path)


def test_experts_that_are_stored_one_by_one_are_stacked_at_every_layout(tmp_path: Path) -> None:
    on(At(dp=2, ep=2), save_experts_one_by_one, str(tmp_path))
    stored = Manifest.read(tmp_path / "step-00000007").tensors
    key = "model.decoder.layers.0.mlp.experts.linear_fc1.gate.weight"
    assert key not in stored and [stored[f"{key}{expert}"].shape for expert in range(8)] == [(12, 16)] * 8
    for at in FAST:
        assert on(at, load_whole, str(tmp_path)) == []


def test_layers_that_are_stored_stacked_are_told_apart(tmp_path: Path) -> None:
    """A rank that holds several slices of one global tensor saves, and loads, each of them with its own state."""
    expected = on(At(tp=2), save_stacked_layers, str(tmp_path))
    manifest = Manifest.read(tmp_path / "step-00000001")
    assert manifest.tensors["model.layers.weight"].shape == (2, 4, 8)
    assert len(manifest.tensors["model.layers.weight"].chunks) == 4
    for at in (At(), At(tp=2)):
        found = on(at, load_stacked_layers, str(tmp_path))
        assert len(found) == len(expected) == 4 and not torch.equal(expected[0], expected[1])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), at


@pytest.mark.parametrize("layer", (0, 1))
def test_a_base_whose_layers_are_stored_stacked_is_known_by_each_of_them(layer: int) -> None:
    model = StackedLayers()
    entries = list(model.sharded_state_dict().values())
    before = describe_base(model, entries)
    with torch.no_grad():
        model.layers[layer].weight[0, 0] += 1
    assert describe_base(model, entries) != before


@pytest.mark.parametrize(
    "change", (lambda w: w.flip(0), lambda w: w.flip(1), lambda w: w.roll(1, 1)), ids=("rows", "columns", "moved")
)
def test_a_base_with_the_same_values_in_other_places_is_another(change: Callable[[Tensor], Tensor]) -> None:
    model = RowParallelLinear(8, 4, input_is_parallel=True)
    entries = list(model.sharded_state_dict().values())
    before = describe_base(model, entries)
    with torch.no_grad():
        model.weight.copy_(change(model.weight).clone())
    assert describe_base(model, entries) != before


def described_twice() -> list[object]:
    """The description of a base, and that after its first rank alone changed its slice."""
    tp = init_parallelism(tensor_parallel=2).tp
    model = RowParallelLinear(8, 4, input_is_parallel=True)
    entries = list(model.sharded_state_dict().values())
    before = describe_base(model, entries)
    if tp.rank == 0:
        with torch.no_grad():
            model.weight[0, 0] += 1
    return [before, describe_base(model, entries)]


def test_a_base_that_one_rank_changed_is_another_on_all() -> None:
    first, second = run_on_ranks(2, described_twice, timeout=30.0)
    assert first == second
    assert first[0] != first[1]
