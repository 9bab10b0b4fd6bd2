from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from meshpeft.data.batches import (
    IGNORED_LABEL,
    PADDING_DOCUMENT,
    GlobalBatchSlice,
    MicroBatch,
    PackedRows,
    RowSampler,
    eval_batches,
    pack_documents,
)
from meshpeft.data.documents import Document
from meshpeft.data.files import DataError

SEQ_LENGTH = 8


def make_rows(count: int) -> PackedRows:
    """Unpacked rows of 2 to 8 tokens; a row's first token is its number."""
    documents = []
    for number in range(count):
        length = 2 + number % 7
        tokens = np.full(length, number, dtype=np.int32)
        documents.append(Document(tokens, np.arange(length) % 3 == 1))
    return pack_documents(documents, SEQ_LENGTH, packing=False)


def row_numbers(batches: GlobalBatchSlice) -> list[int]:
    """The rows of one rank's micro-batches, without padding."""
    return [
        int(micro.input_ids[at, 0])
        for micro in batches
        for at in range(len(micro.input_ids))
        if micro.document_ids[at, 0] != PADDING_DOCUMENT
    ]


def targets_of(micro: MicroBatch) -> int:
    return int((micro.labels != IGNORED_LABEL).sum())


@pytest.mark.parametrize("pad_to_longest", (False, True))
@pytest.mark.parametrize("micro_batch_size", (1, 2, 3, 16))
@pytest.mark.parametrize("dp_size", (1, 2, 3, 4, 7))
def test_the_global_batch_is_the_same_at_every_layout(
    dp_size: int, micro_batch_size: int, pad_to_longest: bool
) -> None:
    rows = make_rows(23)
    alone = RowSampler(rows=rows, batch_size=6, seed=5)
    ranks = [
        RowSampler(
            rows=rows,
            batch_size=6,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            seed=5,
            pad_to_longest=pad_to_longest,
        )
        for rank in range(dp_size)
    ]
    for step in range(9):  # over two epochs
        expected = alone.micro_batches(step)
        slices = [sampler.micro_batches(step) for sampler in ranks]
        assert sorted(chain.from_iterable(map(row_numbers, slices))) == sorted(row_numbers(expected))
        # Equally many forwards of equal shapes, and one divisor, known without asking.
        assert len({tuple(micro.input_ids.shape for micro in part) for part in slices}) == 1
        assert all(len(micro.input_ids) <= micro_batch_size for part in slices for micro in part)
        targets = sum(targets_of(micro) for part in slices for micro in part)
        assert {part.global_target_tokens for part in slices} == {targets}
        tokens = sum(int((micro.document_ids >= 0).sum()) for part in slices for micro in part)
        assert {part.global_tokens for part in slices} == {tokens}


@pytest.mark.parametrize("batch_size", (1, 4, 5, 10, 23))
def test_each_epoch_has_each_row_once_across_its_borders(batch_size: int) -> None:
    sampler = RowSampler(rows=make_rows(10), batch_size=batch_size, seed=1)
    epochs = np.concatenate([sampler.global_rows(step) for step in range(30)]).reshape(-1, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs[:3].tolist()}) == 3


def test_a_step_is_a_function_of_the_seed_and_its_number() -> None:
    rows = make_rows(40)
    sampler = RowSampler(rows=rows, batch_size=8, seed=2)
    forwards = [sampler.global_rows(step).tolist() for step in range(12)]
    resumed = RowSampler(rows=rows, batch_size=8, seed=2)
    assert [resumed.global_rows(step).tolist() for step in reversed(range(12))] == forwards[::-1]
    assert RowSampler(rows=rows, batch_size=8, seed=3).global_rows(0).tolist() != forwards[0]


def test_steps_count_epochs() -> None:
    sampler = RowSampler(rows=make_rows(10), batch_size=4)
    assert (len(sampler), sampler.steps_per_epoch, sampler.steps(2), sampler.steps(0.01)) == (3, 3, 5, 1)
    assert sampler.epochs(5) == 2.0


def test_padding_is_cut_to_the_longest_row_of_all_ranks() -> None:
    rows = make_rows(7)  # 2 to 8 tokens
    for rank in range(2):
        widths = [micro.input_ids.shape for micro in eval_batches(rows, 1, rank, 2)]
        assert widths == [torch.Size([1, width]) for width in (8, 6, 4, 2)]
        full = eval_batches(rows, 1, rank, 2, pad_to_longest=False)
        assert [micro.input_ids.shape for micro in full] == [torch.Size([1, SEQ_LENGTH])] * 4


@pytest.mark.parametrize("dp_size", (1, 2, 3, 4, 9))
@pytest.mark.parametrize("micro_batch_size", (1, 2, 4))
def test_evaluation_has_each_row_once_in_equally_many_forwards(dp_size: int, micro_batch_size: int) -> None:
    rows = make_rows(7)
    slices = [eval_batches(rows, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    assert Counter(chain.from_iterable(map(row_numbers, slices))) == Counter(range(7))
    assert len({len(list(part)) for part in slices}) == 1
    assert {part.global_target_tokens for part in slices} == {int(rows.row_targets.sum())}


def test_a_bounded_evaluation_takes_rows_of_every_length_once() -> None:
    rows = make_rows(70)
    slices = [eval_batches(rows, 2, rank, 2, most=7) for rank in range(2)]
    assert Counter(chain.from_iterable(map(row_numbers, slices))) == Counter(range(0, 70, 10))
    assert {part.global_target_tokens for part in slices} == {int(rows.row_targets[::10].sum())}
    assert len(eval_batches(rows, most=100).rows) == 70


def test_a_slice_is_a_sequence() -> None:
    part = eval_batches(make_rows(5), 2)
    assert len(part[1:]) == 2
    assert torch.equal(part[-1].input_ids, part[2].input_ids)
    with pytest.raises(IndexError):
        part[3]


def test_bad_sizes_are_refused() -> None:
    rows = make_rows(3)
    with pytest.raises(DataError, match="batch size: 0"):
        RowSampler(rows=rows, batch_size=0)
    with pytest.raises(DataError, match="micro-batch size: 0"):
        RowSampler(rows=rows, batch_size=1, micro_batch_size=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        RowSampler(rows=rows, batch_size=1, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match="step: -1"):
        RowSampler(rows=rows, batch_size=1).global_rows(-1)
