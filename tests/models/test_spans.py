"""Attention inside documents equals the dense mask, forward and backward, in every kernel and without S² memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshpeft.models import ModelError
from meshpeft.models.spans import Block, Spans, attend, kernel_for

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
# Two rows of 17: three documents, then two and three tokens of padding.
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 5, [0] * 8 + [1] * 6 + [-1] * 3])
SPANS = Spans.of_lengths([3, 9, 5, 8, 6, 3])
# Float64, sums in another order.
TOLERANCE = 1e-10


def inputs(
    seq: int = 17, batch: int = 2, groups: int = GROUPS, value_dim: int = HEAD_DIM, keys: int | None = None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(tokens, batch, heads, dim, dtype=torch.float64, generator=generator)
        return (2 * x).requires_grad_()

    keys = seq if keys is None else keys
    return [draw(seq, HEADS, HEAD_DIM), draw(keys, groups, HEAD_DIM), draw(keys, groups, value_dim)]


def allowed(documents: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """The mask, [batch, seq, seq], one pair of tokens after the other."""
    batch, seq = documents.shape
    mask = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for row in range(batch):
        first = 0
        for query in range(seq):
            if documents[row, query] != documents[row, first]:
                first = query
            for key in range(first, query + 1):
                is_near = window is None or query - key < window
                is_same_chunk = chunk is None or (query - first) // chunk == (key - first) // chunk
                mask[row, query, key] = is_near and is_same_chunk
    return mask


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the formula; mask [batch, queries, keys]."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : k.shape[0]]
    return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def error(found: Tensor, expected: Tensor, given: list[Tensor]) -> float:
    """The largest error of an output and of its gradients, each relative to its largest value, which is about 1."""
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    of_found, of_expected = (
        [out.detach(), *torch.autograd.grad(out, given, upstream, retain_graph=True)] for out in (found, expected)
    )
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=0.1)) for a, b in zip(of_found, of_expected, strict=True)
    )


def varlen_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` by the formula, as the kernel aligns queries and keys: at their ends."""
    for bounds, tokens in ((cu_seq_q, q), (cu_seq_k, k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(tokens)
        assert tokens.stride(-1) == 1
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    outs = []
    for number in range(len(cu_seq_q) - 1):
        own_q = q[cu_seq_q[number] : cu_seq_q[number + 1], None]
        own_k, own_v = (x[cu_seq_k[number] : cu_seq_k[number + 1], None] for x in (k, v))
        place = torch.arange(len(own_q))[:, None] + len(own_k) - len(own_q)
        key = torch.arange(len(own_k))
        mask = key <= place if window_size[0] < 0 else (key <= place) & (key >= place - window_size[0])
        outs.append(dense(own_q, own_k, own_v, mask[None], scale=scale)[:, 0].unflatten(-1, (q.shape[1], -1)))
    return torch.cat(outs)


@contextmanager
def by_kernel(kernel: str) -> Iterator[None]:
    """`attend` by one kernel, whatever it would choose; varlen's replaced by the formula."""
    with (
        mock.patch("meshpeft.models.spans.kernel_for", return_value=kernel),
        mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_on_cpu),
    ):
        yield


# Which kernels do it, the mask's options, and those of the softmax.
CASES: dict[str, tuple[tuple[str, ...], dict[str, int], dict[str, float]]] = {
    "causal": (("causal", "tiled", "varlen"), {}, {}),
    "a window as long as a document": (("causal", "tiled", "varlen"), {"window": 9}, {}),
    "a window": (("tiled", "varlen"), {"window": 4}, {}),
    "a window of one token": (("tiled", "varlen"), {"window": 1}, {}),
    "chunks": (("causal", "tiled", "varlen"), {"chunk": 4}, {}),
    "chunks and a window": (("tiled", "varlen"), {"chunk": 4, "window": 3}, {}),
    "a scale": (("causal", "tiled", "varlen"), {}, {"scale": 0.3}),
    "a soft cap": (("tiled",), {}, {"softcap": 1.5}),
    "a soft cap and a window": (("tiled",), {"window": 4}, {"softcap": 1.5}),
}


def in_documents(
    given: list[Tensor], spans: Spans, window: int | None = None, chunk: int | None = None, **more: Any
) -> Tensor:
    return attend(*given, spans if chunk is None else spans.chunked(chunk), window=window, **more)


@pytest.mark.parametrize("groups", (4, 2, 1))
@pytest.mark.parametrize(("case", "kernel"), [(case, kernel) for case in CASES for kernel in CASES[case][0]])
def test_it_equals_the_dense_mask(case: str, kernel: str, groups: int) -> None:
    _, of_mask, of_softmax = CASES[case]
    given = inputs(groups=groups)
    with by_kernel(kernel):
        found = in_documents(given, SPANS, **of_mask, **of_softmax)
    assert error(found, dense(*given, allowed(DOCUMENTS, **of_mask), **of_softmax), given) < TOLERANCE


@pytest.mark.parametrize("softcap", (None, 1.5))
@pytest.mark.parametrize("window", (None, 4))
def test_sinks_take_their_part_of_every_softmax(window: int | None, softcap: float | None) -> None:
    given, sinks = inputs(), torch.linspace(-1, 2, HEADS, dtype=torch.float64).requires_grad_()
    found = attend(*given, SPANS, window=window, softcap=softcap, sinks=sinks)
    expected = dense(*given, allowed(DOCUMENTS, window), softcap=softcap, sinks=sinks)
    assert error(found, expected, [*given, sinks]) < TOLERANCE


def test_values_may_have_other_channels_than_keys() -> None:
    given = inputs(value_dim=6)
    assert error(attend(*given, SPANS), dense(*given, allowed(DOCUMENTS)), given) < TOLERANCE


def test_a_tile_is_cut_anywhere() -> None:
    """Documents of many tiles, whose last is shorter; keys before, in and behind a window."""
    given, documents = inputs(70, 1), torch.tensor([[0] * 50 + [1] * 20])
    sinks = torch.zeros(HEADS, dtype=torch.float64, requires_grad=True)
    for window in (None, 5, 40):
        with mock.patch.dict("meshpeft.models.spans._TILE_SCORES", cpu=1):
            found = attend(*given, Spans.of_lengths([50, 20]), window=window, sinks=sinks)
        assert error(found, dense(*given, allowed(documents, window), sinks=sinks), [*given, sinks]) < TOLERANCE


def of_a_context_parallel_rank(rank: int, size: int, lengths: list[int]) -> tuple[Tensor, Spans]:
    """Two chunks of every document: the indices of a rank's tokens, and what they see."""
    tokens: list[int] = []
    blocks: list[Block] = []
    first = 0
    for length in lengths:
        cuts = [length * part // (2 * size) for part in range(2 * size + 1)]
        for part in (rank, 2 * size - 1 - rank):
            begin, end = cuts[part : part + 2]
            tokens += range(first + begin, first + end)
            blocks += [Block(end - begin, first, end)] * (end > begin)
        first += length
    return torch.tensor(tokens), Spans(tuple(blocks))


@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("kernel", ("tiled", "varlen"))
def test_queries_may_be_parts_of_documents(kernel: str, window: int | None) -> None:
    """As they are on a rank of context parallel, over all keys in natural order."""
    lengths = [3, 9, 5, 1, 13]
    _, keys, values = inputs(31, 1)
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))[None]
    for size in (1, 2, 4):
        for rank in range(size):
            own, spans = of_a_context_parallel_rank(rank, size, lengths)
            given = [inputs(len(own), 1)[0], keys, values]
            with by_kernel(kernel):
                found = attend(*given, spans, window=window)
            assert error(found, dense(*given, allowed(documents, window)[:, own]), given) < TOLERANCE
            # Early and late parts of a document share keys, which one call cannot have twice.
            assert len(spans.passes(None)) == 2


@pytest.mark.parametrize("kernel", ("causal", "tiled", "varlen"))
@pytest.mark.parametrize(
    "spans",
    (Spans.of_lengths([4, 8, 5, 8, 6, 3]), Spans.of_lengths([3, 14, 8, 6, 3]), Spans.of_lengths([3, 9, 13, 6, 3])),
    ids=("a boundary off by one", "a boundary left out", "a document over two rows"),
)
def test_a_wrong_boundary_is_seen(kernel: str, spans: Spans) -> None:
    given = inputs()
    with by_kernel(kernel):
        assert error(attend(*given, spans), dense(*given, allowed(DOCUMENTS)), given) > 0.01


@pytest.mark.parametrize("kernel", ("tiled", "varlen"))
@pytest.mark.parametrize("window", (3, 5))
def test_a_wrong_window_is_seen(kernel: str, window: int) -> None:
    given = inputs()
    with by_kernel(kernel):
        assert error(attend(*given, SPANS, window=window), dense(*given, allowed(DOCUMENTS, 4)), given) > 0.01


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation makes or reads."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return made


@pytest.mark.parametrize(
    "options",
    ({}, {"window": 100}, {"chunk": 300}, {"softcap": 3.0}, {"sinks": torch.zeros(HEADS)}),
    ids=("causal", "window", "chunks", "soft cap", "sinks"),
)
@pytest.mark.parametrize("lengths", ([2048], [1500, 20, 500, 28]))
def test_no_tensor_has_a_mask_of_elements(lengths: list[int], options: dict[str, Any]) -> None:
    seq = sum(lengths)
    given = [x.detach().float().requires_grad_() for x in inputs(seq, 1)]
    with mock.patch.dict("meshpeft.models.spans._TILE_SCORES", cpu=1 << 17), LargestTensor() as largest:
        in_documents(given, Spans.of_lengths(lengths), **options).sum().backward()
    # A tile of the fewest queries has 16 rows of scores a head.
    assert largest.elements <= max(x.numel() for x in given) * 2
    assert largest.elements < seq * seq / 16


def test_documents_are_runs_of_equal_ids() -> None:
    """Equal ids that are apart are two documents, as they are for positions; rows end documents, too."""
    assert Spans.of_documents(torch.tensor([[4, 4, 7, 4, -1, -1], [-1, 0, 0, 0, 0, 0]])) == Spans.of_lengths(
        [2, 1, 1, 2, 1, 5]
    )


def test_rows_are_padded_for_sequence_parallel() -> None:
    assert SPANS.padded(2, 3) == Spans.of_lengths([3, 9, 5, 3, 8, 6, 3, 3])
    assert SPANS.padded(2, 0) == SPANS
    with pytest.raises(ModelError, match="not those of 2 rows of whole documents"):
        Spans.of_lengths([3, 9, 6, 16]).padded(2, 3)


def test_chunks_of_a_part_of_a_document_begin_with_the_document() -> None:
    spans = Spans((Block(5, 10, 7),))  # tokens 2 to 6 of a document whose keys begin at 10
    assert spans.chunked(4).blocks == (Block(2, 10, 4), Block(3, 14, 3))


@pytest.mark.parametrize("block", (Block(0, 0, 3), Block(4, 0, 3), Block(1, -1, 3)))
def test_a_block_that_means_nothing_is_refused(block: Block) -> None:
    with pytest.raises(ModelError, match="no fewer keys than queries"):
        Spans((block,))


def test_spans_of_another_batch_are_refused() -> None:
    with pytest.raises(ModelError, match="spans of 34 queries over 34 keys, for 32 queries and 32 keys"):
        attend(*inputs(16), SPANS)


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dims", "options", "kernel"),
    (
        (CUDA, torch.bfloat16, (128, 128), {}, "varlen"),
        (CUDA, torch.float16, (256, 256), {"whole": False}, "varlen"),
        (CUDA, torch.bfloat16, (128, 128), {"scores_only": False}, "tiled"),
        (CUDA, torch.bfloat16, (192, 128), {}, "tiled"),
        (CUDA, torch.bfloat16, (512, 512), {}, "causal"),
        (CUDA, torch.bfloat16, (36, 36), {}, "tiled"),
        (CUDA, torch.float32, (64, 64), {}, "causal"),
        (CUDA, torch.float32, (64, 64), {"whole": False}, "tiled"),
        (CUDA, torch.float64, (64, 64), {}, "tiled"),
        (torch.device("cpu"), torch.float64, (6, 6), {}, "causal"),
        (torch.device("cpu"), torch.bfloat16, (64, 64), {"whole": False}, "tiled"),
        (torch.device("mps"), torch.float32, (64, 64), {}, "tiled"),
    ),
)
def test_the_kernel_follows_from_device_and_type(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], options: dict[str, bool], kernel: str
) -> None:
    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        assert kernel_for(device, dtype, head_dims, **options) == kernel


def test_a_gpu_without_the_varlen_kernel_takes_another() -> None:
    with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        assert kernel_for(CUDA, torch.float16, (64, 64)) == "causal"


@pytest.mark.parametrize("kernel", ("causal", "tiled"))
def test_sixteen_bits_are_computed_in_more(kernel: str) -> None:
    given = [x.detach().bfloat16().requires_grad_() for x in inputs()]
    with by_kernel(kernel):
        found = attend(*given, SPANS)
    wide = [x.detach().double().requires_grad_() for x in given]
    expected = dense(*wide, allowed(DOCUMENTS))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 2**-8 * expected.abs().max()
