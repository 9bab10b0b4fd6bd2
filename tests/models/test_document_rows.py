"""Packed documents before convolutions and states: each computed as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_ids, save_tiny
from helpers.transformers_float64 import in_float64
from torch import Tensor

from meshpeft.models import load_transformers
from meshpeft.models.document_rows import DocumentRows, _groups, _order, _places
from meshpeft.parallel import init_parallelism

# Float64; a chunk of the kernels has other tokens beside it.
TOLERANCE = 1e-10
LENGTHS = ([1, 4, 2, 6], [9, 4])
FAMILIES = ("qwen3_next", "nemotron_h", "lfm2", "falcon_h1", "granitemoehybrid", "kimi_linear")
SLOW = ("granitemoehybrid", "kimi_linear")


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    init_parallelism()
    loaded: Any = in_float64(load_transformers(save_tiny(request.param, tmp_path), torch.float64))
    assert any(isinstance(module, DocumentRows) for module in loaded.modules())
    return loaded


def packed(seed: int) -> tuple[Tensor, Tensor]:
    documents = [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in LENGTHS]
    return random_ids(length=13, seed=seed), torch.stack(documents)


def alone(ids: Tensor) -> list[Tensor]:
    return [piece[None] for row, lengths in zip(ids, LENGTHS, strict=True) for piece in row.split(lengths)]


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES], indirect=True
)
def test_a_document_in_a_packed_row_is_computed_as_if_it_were_alone(model: Any) -> None:
    assert model.keeps_documents_apart()
    model.eval()
    ids, documents = packed(seed=0)
    found = model(ids, document_ids=documents).detach()
    expected = torch.cat([model(document).detach()[0] for document in alone(ids)])
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", ["qwen3_next", "nemotron_h", "lfm2"], indirect=True)
def test_gradients_are_those_of_the_documents(model: Any, recompute: bool) -> None:
    """Of two batches, whose backward passes come after both forward passes: each part remembers its documents."""
    model.set_activation_checkpointing(recompute)
    model.train()
    ids, documents = packed(seed=0)
    others = random_ids(length=13, seed=1)
    first = model.token_losses(ids, ids, document_ids=documents).sum()
    second = model.token_losses(others, others).sum()
    (first + 2 * second).backward()
    found = gradients(model)
    model.set_activation_checkpointing(False)
    losses = [model.token_losses(document, document).sum() for document in alone(ids)]
    (sum(losses) + 2 * model.token_losses(others, others).sum()).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("of", [{0: [5]}, {0: [1, 1, 8, 3, 2]}, {0: [7, 2, 6], 1: [1, 1, 1, 12]}, {0: [4], 1: [3, 1]}])
def test_every_token_has_one_place_and_comes_back(of: dict[int, list[int]]) -> None:
    groups, device = _groups(of), torch.device("cpu")
    for rank, lengths in of.items():
        count = sum(lengths)
        tokens = torch.arange(count + 1)
        rows = [tokens[_places(rank, group, count, device)] for group in groups]
        assert [len(row) for row in rows] == [len(group.of[0]) * group.width for group in groups]
        assert torch.equal(torch.cat(rows)[_order(rank, groups, count, device)], tokens[:-1])
        for group, row in zip(groups, rows, strict=True):
            for line in row.view(-1, group.width):
                held = line[line != count]
                assert len(held) in (0, *lengths) and torch.equal(held, held[:1] + torch.arange(len(held)))
                assert not len(held) or group.width < 2 * len(held)
