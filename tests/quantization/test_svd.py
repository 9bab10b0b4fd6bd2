"""Low-rank parts of many matrices: how much energy they capture, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshpeft.quantization import low_rank_part

RANK = 16
_PLACE = torch.arange(96.0, dtype=torch.float64)
SPECTRA = {
    "slow": torch.exp(-_PLACE / 30),
    "fast": torch.exp(-_PLACE / 2),
    "power law": 1 / (1 + _PLACE),
    "a step at the rank": torch.where(_PLACE < RANK, 0.30, 0.28).index_fill(0, torch.tensor(0), 1.0),
    "rank 5": (_PLACE < 5).double(),
    "all equal": torch.ones_like(_PLACE),
}


def matrix(spectrum: Tensor, rows: int = 96, columns: int = 160) -> Tensor:
    left, _ = torch.linalg.qr(torch.randn(rows, len(spectrum), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(spectrum), dtype=torch.float64))
    return (left * spectrum) @ right.mT


def captured(matrices: Tensor, rank: int, **options: object) -> float:
    """Energy that the low-rank part takes away, over the most that any could; the least of the matrices."""
    part = low_rank_part(matrices, rank, **options)
    left = (matrices - part.left @ part.right).square().sum((-2, -1))
    best = torch.linalg.svdvals(matrices)[..., :rank].square().sum(-1)
    return float(((matrices.square().sum((-2, -1)) - left) / best).min())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("transposed", [False, True])
def test_energy_within_one_percent_whatever_the_spectrum(spectrum, transposed):
    values = matrix(SPECTRA[spectrum])
    values = values.mT if transposed else values
    assert captured(values, RANK) > 0.99
    assert captured(values.float().double(), RANK, exact=True) > 1 - 1e-6


def test_energy_of_noise_within_one_percent_in_float32():
    # What quantising leaves: the flattest spectrum there is. One matrix of a size where M M^T is never made.
    assert captured(torch.randn(4, 128, 512), RANK) > 0.99
    assert captured(torch.randn(700, 800), 4) > 0.99


@pytest.mark.slow
def test_energy_of_large_noise_within_one_percent():
    # Its largest singular values are so close that 8 products leave 1.4% out; 64 products take all there is.
    values = torch.randn(4096, 11008)
    energy, best = (
        low_rank_part(values, 8, power_iterations=products).left.double().square().sum() for products in (None, 64)
    )
    assert energy > 0.99 * best


def test_every_matrix_of_a_batch_is_decomposed_on_its_own():
    matrices = torch.randn(2, 3, 64, 96)
    together = low_rank_part(matrices, 8)
    assert together.left.shape == (2, 3, 64, 8) and together.right.shape == (2, 3, 8, 96)
    alone = low_rank_part(matrices[1, 2], 8)
    # Batched products may sum in another order; vectors of close singular values mix by the roundings over the gap.
    assert torch.allclose(together.left[1, 2] @ together.right[1, 2], alone.left @ alone.right, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_factors_are_those_of_a_decomposition(exact):
    part = low_rank_part(torch.randn(64, 96, dtype=torch.float64), 8, exact=exact)
    values = part.left.norm(dim=0)
    assert torch.allclose(part.right @ part.right.mT, torch.eye(8, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(part.left.mT @ part.left, torch.diag(values.square()), atol=1e-8)
    assert (values.diff() <= 0).all()
    assert (part.right.gather(1, part.right.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("values", [torch.zeros(40, 50), torch.full((40, 50), 1e-20), torch.full((40, 50), 1e15)])
def test_degenerate_matrices_have_finite_factors(values):
    part = low_rank_part(values, 4)
    assert part.left.isfinite().all() and part.right.isfinite().all()
    assert torch.allclose(part.left @ part.right, values, rtol=1e-4)


def test_a_rank_beyond_the_matrix_is_padded_with_zeros():
    values = torch.randn(6, 10)
    part = low_rank_part(values, 9)
    assert part.left.shape == (6, 9) and part.right.shape == (9, 10)
    assert torch.allclose(part.left @ part.right, values, atol=1e-5)
    assert not part.left[:, 6:].any() and not part.right[6:].any()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="rank of at least 1"):
        low_rank_part(torch.randn(3, 3), 0)
