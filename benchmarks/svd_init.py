"""Starting the adapters of 64 experts (256 x 512, rank 16) from what quantising them lost, against loops of full SVDs.

The residuals are those of normally distributed weights packed as NF4: noise, the spectrum that is hardest to
approximate. The peers decompose one expert after the other in full: ModelOpt's own function, in float64, and the same
in float32. Captured energy is the least over the experts of (energy that the factors take away) / (the most that any
factors of rank 16 could).

    python benchmarks/svd_init.py [--repeats 10]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from modelopt.torch.quantization.model_calib import svd as modelopt_svd
from timing import measure, ratio, table
from torch import Tensor

from meshpeft.quantization import low_rank_part
from meshpeft.quantization.formats import FORMATS

EXPERTS, ROWS, COLUMNS, RANK, BLOCK = 64, 256, 512, 16, 64
Factors = tuple[Tensor, Tensor]

OURS, MODELOPT, FLOAT32 = "MeshPEFT", "ModelOpt, a loop", "float32, a loop"


def residuals() -> Tensor:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(EXPERTS, ROWS, COLUMNS)
    nf4 = FORMATS["nf4"]
    return weight - nf4.unpack(nf4.pack(weight, BLOCK), BLOCK, torch.float32)


def loop(decompose: Callable[[Tensor], Factors], matrices: Tensor) -> Factors:
    """Left [experts, rows, rank] and right [experts, rank, columns] factors, one expert after the other."""
    left, right = zip(*(decompose(matrix) for matrix in matrices), strict=True)
    return torch.stack(left), torch.stack(right)


def float32_svd(matrix: Tensor) -> Factors:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :RANK] * s[:RANK], vt[:RANK]


def captured(factors: Factors, matrices: Tensor) -> float:
    exact = matrices.double()
    best = torch.linalg.svdvals(exact)[:, :RANK].square().sum(-1)
    left = (exact - factors[0].double() @ factors[1].double()).square().sum((-2, -1))
    return float(((exact.square().sum((-2, -1)) - left) / best).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    matrices = residuals()
    candidates: dict[str, Callable[[], Factors]] = {
        MODELOPT: lambda: loop(lambda matrix: modelopt_svd(matrix, RANK), matrices),
        FLOAT32: lambda: loop(float32_svd, matrices),
        OURS: lambda: low_rank_part(matrices, RANK),
    }
    energy = {name: captured(run(), matrices) for name, run in candidates.items()}
    seconds = measure(candidates, repeats=arguments.repeats, warmup=1)
    rows = [
        (name, str(ratio(seconds, MODELOPT, name)), str(ratio(seconds, FLOAT32, name)), f"{energy[name]:.6f}")
        for name in candidates
    ]
    header = ("initialisation", "times faster than ModelOpt", "than the float32 loop", "captured energy")
    print(table(f"{EXPERTS} experts of {ROWS} x {COLUMNS}, rank {RANK}", rows, header))


if __name__ == "__main__":
    main()
